"""A server that is told to stop takes nothing new and ends soon, whatever its database and its disk do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from pyarrow import flight

from fraiseql_pipeline.changelog.connection import sql
from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight import stream as stream_module
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events
from tests.support.reading import execute, insert
from tests.support.uploads import EVENTS, sent
from tests.support.waiting import eventually

#: Far less than what Postgres lets a statement of ours wait for a lock (10 and 30 s), far more than a stop takes.
SOON_SECONDS = 8.0


@contextmanager
def stopped_soon(server: FlightServer) -> Iterator[None]:
    """The server is told to stop at once, and has stopped while what hangs still hangs."""
    stopping = threading.Thread(target=server.stop, args=(0.2,), daemon=True)
    stopping.start()
    stopping.join(SOON_SECONDS)
    assert not stopping.is_alive(), "it waits for what hangs"
    yield


def test_nothing_new_is_taken_before_followers_are_told(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    server = start_server(lake, database_url=changelog_url)
    told: list[bool] = []

    def late() -> None:
        with connect(server.url) as client, pytest.raises(FlightUnavailable):
            client.read(start=hour(0).start, end=hour(0).end)
        told.append(True)

    monkeypatch.setattr(server._service, "stop_following", late)
    server.stop(0)
    assert told == [True]


def test_an_upload_that_waits_for_the_log_does_not_hold_up_the_end(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    server = start_server(lake, arrow_flight_uploads=True, database_url=changelog_url)

    def upload(number: int) -> Any:
        with flight.connect(server.url) as client:
            batch = sent(3, seed=number)
            writer, answers = client.do_put(EVENTS, batch.schema)
            try:
                with writer:
                    writer.write_batch(batch)
                    return answers.read()
            except Exception as error:
                return type(error).__name__

    with psycopg.connect(changelog_url) as other, ThreadPoolExecutor() as pool:
        other.execute(sql("append_begin"))
        uploading = [pool.submit(upload, number) for number in range(4)]
        waiters = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: execute(changelog_url, waiters) == [(1,)])
        with stopped_soon(server):
            assert execute(changelog_url, waiters) == [(0,)], "and the database does not work for it any more"
            assert all(isinstance(one.result(30), str) for one in uploading), "no batch was acknowledged"
    assert execute(changelog_url, "SELECT count(*) FROM core.tb_entity_change_log") == [(0,)]


def test_a_locked_table_does_not_hold_up_the_end(changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    pk = insert(
        changelog_url, created_at=hour(0).start
    )  # before the server: of a log that it follows from its first key it reads nothing through
    server = start_server(lake, database_url=changelog_url)
    live = server._service.live
    assert live is not None
    eventually(lambda: live.up and live.buffer.settled_pk >= pk)

    def read() -> str:
        with connect(server.url) as client:
            try:
                return str(client.read(start=hour(1).start, end=hour(3).end).num_rows)
            except FlightUnavailable:
                return "unavailable"

    with psycopg.connect(changelog_url) as other, ThreadPoolExecutor() as pool:
        other.execute("LOCK TABLE core.tb_entity_change_log IN ACCESS EXCLUSIVE MODE")
        reading = [pool.submit(read) for _ in range(3)]
        eventually(lambda: execute(changelog_url, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted") == [(True,)])
        with stopped_soon(server):
            other.rollback()
        assert {one.result(60) for one in reading} == {"unavailable"}


def test_frames_that_are_never_made_do_not_hold_up_the_end(
    lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    allowed, asked = threading.Event(), threading.Event()
    read = stream_module.segments

    def hangs(*arguments: Any) -> Iterator[Any]:
        asked.set()
        assert allowed.wait(60)
        return read(*arguments)

    monkeypatch.setattr(stream_module, "segments", hangs)
    server = start_server(lake)
    with flight.connect(server.url) as client:
        reader = client.do_get(flight.Ticket("events:*:2026-11-01:2026-11-01T01:00:00:1000"))
        assert asked.wait(30)
        with stopped_soon(server):
            with pytest.raises(flight.FlightError):
                reader.read_all()
            allowed.set()
    server._service.store._encoders.join(30)
