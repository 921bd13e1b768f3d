"""Reads up to now: the lake and what has settled since, joined without a gap or a double, and what there is without a log."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from pyarrow import flight

from fraiseql_pipeline import connect, pipeline
from fraiseql_pipeline.changelog import ChangeLog, open_changelog
from fraiseql_pipeline.errors import FlightUnavailable, SourceRefused, TicketError
from fraiseql_pipeline.flight import live as live_module
from fraiseql_pipeline.flight.client import Client
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import publish
from tests.support.events import lake_events
from tests.support.following import HOUR, KEYS, LAST, Followed, Follower, followed
from tests.support.proxy import proxied
from tests.support.reading import execute, insert
from tests.support.waiting import eventually


def test_events_are_readable_when_they_have_settled_and_once_they_are_published(live: Followed) -> None:
    old, new = live.write(LAST, 3), live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    assert live.keys() == [*old, *new], "nothing is published yet"
    live.materialize(LAST)
    assert live.keys() == [*old, *new], "an hour came into the lake"
    late = live.write(LAST + timedelta(minutes=1))
    live.reaches(late[-1])
    assert live.keys() == [*old, *late, *new], "a late event stands where its time is"
    pipeline.merge_late(settings=live.settings, changelog=live.log, lake=live.lake)
    assert live.keys() == [*old, *late, *new], "the late event came into the lake"


def test_a_path_is_all_that_has_settled_whether_it_is_published_or_not(live: Followed) -> None:
    old, new = live.write(LAST, 3), live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    for published in (False, True):
        if published:
            live.materialize(LAST)
        info = live.client._flight.get_flight_info(flight.FlightDescriptor.for_path("events"))
        found = pa.concat_tables(live.client.read(endpoint.ticket.ticket) for endpoint in info.endpoints)
        assert found.num_rows == len(old) + len(new)
        assert found.equals(live.client.read(start=LAST))


def test_what_was_there_before_the_server_is_read_through(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    settings = Settings(database_url=changelog_url, lake_uri=lake.uri, start=LAST - 48 * HOUR, seal_timeout_seconds=0)
    hours = [LAST - 2 * HOUR, LAST - HOUR, LAST]
    pks = [insert(changelog_url, created_at=at) for at in hours]
    log = ChangeLog(changelog_url, settings)
    published = [Window(at, WindowSize.HOUR) for at in (hours[0], hours[2])]
    pipeline.materialize(published, settings=settings, changelog=log, lake=lake)
    late = insert(changelog_url, created_at=hours[0])
    log.close()
    with followed(changelog_url, lake, start_server) as live:
        live.reaches(late)
        assert live.keys() == [pks[0], late, *pks[1:]], "a hole and a late event"
        assert live.keys(start=hours[0], end=hours[1]) == [pks[0], late]
        assert live.client.info(start=hours[0]).missing_windows == 0


def test_the_parts_of_a_range_over_hours_without_events_are_read_like_the_whole(live: Followed) -> None:
    old, new = live.write(LAST, 3), live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    live.materialize(LAST)
    asked = {"type": "events", "entity_type": "*", "start": (LAST - 2 * HOUR).isoformat(), "end": "now"}
    stock = live.client._flight
    endpoints = stock.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(asked).encode())).endpoints
    assert len(endpoints) > 1
    assert sum(stock.do_get(endpoint.ticket).read_all().num_rows for endpoint in endpoints) == len([*old, *new])
    assert live.keys(start=LAST - 2 * HOUR) == [*old, *new]


def test_a_version_that_is_asked_for_holds_nothing_else(live: Followed) -> None:
    old = live.write(LAST)
    live.materialize(LAST)
    live.reaches(live.write(datetime.now(UTC))[0])
    version = live.client.info(start=LAST, end=LAST + HOUR).table_version
    assert live.keys(start=LAST, table_version=version) == old


def test_the_receipt_tells_how_far_it_reaches_and_the_next_ticket_goes_on_there(live: Followed) -> None:
    first = live.write(LAST) + live.write(datetime.now(UTC))
    live.reaches(first[-1])
    with live.client.stream(start=LAST - HOUR, columns=KEYS) as stream:
        assert stream.read_all()["pk"].to_pylist() == first
    assert stream.receipt is not None
    assert stream.receipt.settled_pk == first[-1]
    assert stream.receipt.complete_through <= datetime.now(UTC)
    behind = live.write(LAST) + live.write(datetime.now(UTC))
    live.reaches(behind[-1])
    assert live.client.read(stream.receipt.next_ticket)["pk"].to_pylist() == behind, "whatever their time"
    assert live.client.read(stream.receipt.next_ticket).num_rows == 2


def test_events_of_an_open_transaction_hold_back_what_was_written_after_them(live: Followed) -> None:
    before = live.write(datetime.now(UTC))
    live.reaches(before[-1])
    with psycopg.connect(live.url) as slow:
        (held,) = slow.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, object_data)"
            " VALUES ('Order', 'INSERT', gen_random_uuid(), '{}') RETURNING pk_entity_change_log"
        ).fetchone() or (0,)
        after = live.write(datetime.now(UTC))
        assert live.keys() == before, "whether the one before it will be there is not settled"
        slow.commit()
    live.reaches(after[-1])
    assert sorted(live.keys()) == [*before, held, *after]


def test_a_lake_that_moves_on_while_a_view_is_made_takes_nothing_from_it(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    written = live.write(LAST, 2)
    live.reaches(written[-1])
    service = live.server._service.live
    assert service is not None
    files = service.buffer.files

    def after_a_commit(floors: dict[int, int]) -> Any:
        if not live.lake.published():
            live.materialize(LAST)
            assert service is not None
            service._base()  # as another reader does: what the lake has leaves the buffer
        return files(floors)

    monkeypatch.setattr(service.buffer, "files", after_a_commit)
    assert live.keys() == written


def test_an_hour_that_gets_its_first_event_while_a_view_is_made_is_in_it(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    live.materialize(LAST - HOUR, LAST)
    new = live.write(datetime.now(UTC))
    live.reaches(new[-1])
    service = live.server._service.live
    assert service is not None
    files, late = service.buffer.files, []

    def after_a_late_event(floors: dict[int, int]) -> Any:
        if not late:
            late.extend(live.write(LAST - HOUR))
            live.reaches(late[-1])
        return files(floors)

    monkeypatch.setattr(service.buffer, "files", after_a_late_event)
    with live.client.stream(start=LAST - 2 * HOUR, columns=KEYS) as stream:
        keys = stream.read_all()["pk"].to_pylist()
    assert stream.receipt is not None
    assert stream.receipt.settled_pk == late[-1]
    assert keys == [*late, *new]


def test_unsound_events_are_not_served(live: Followed) -> None:
    sound = live.write(datetime.now(UTC))
    unsound = live.write(datetime.now(UTC), object_id=None) + live.write(datetime.now(UTC), modification_type="WHAT")
    live.reaches(unsound[-1])
    assert live.keys() == sound


def test_a_range_within_what_is_not_published_is_one_endpoint(live: Followed) -> None:
    written = live.write(datetime.now(UTC))
    live.reaches(written[-1])
    for start in ("now-1s", "now-30m", "now-10h"):
        ticket = json.dumps({"type": "events", "entity_type": "*", "start": start, "end": "now", "columns": list(KEYS)})
        info = live.client._flight.get_flight_info(_command(ticket))
        assert len(info.endpoints) == 1
        assert live.client._flight.do_get(info.endpoints[0].ticket).read_all()["pk"].to_pylist() == written


def test_endpoints_together_hold_what_one_stream_does(live: Followed) -> None:
    old = live.write(LAST, 2)
    live.materialize(LAST)
    new = live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    ticket = json.dumps({"type": "events", "entity_type": "*", "start": LAST.isoformat(), "end": "now", "columns": list(KEYS)})
    info = live.client._flight.get_flight_info(_command(ticket))
    assert len(info.endpoints) == 2, "what is in the lake, and what is not"
    parts = [live.client._flight.do_get(endpoint.ticket).read_all()["pk"].to_pylist() for endpoint in info.endpoints]
    assert parts == [old, new]
    live.materialize(LAST)
    late = live.write(LAST)
    live.reaches(late[-1])
    assert [live.client._flight.do_get(e.ticket).read_all()["pk"].to_pylist() for e in info.endpoints] == [old, new], "pinned"


def test_without_its_database_the_server_serves_the_lake_and_says_so(live: Followed, postgres: str) -> None:
    old = live.write(LAST)
    live.materialize(LAST)
    live.reaches(live.write(datetime.now(UTC))[0])
    name = psycopg.conninfo.conninfo_to_dict(live.url)["dbname"]
    live.log.close()
    execute(postgres, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        execute(postgres, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        service = live.server._service.live
        assert service is not None
        eventually(lambda: not service.up)
        with live.client.stream(start=LAST, columns=KEYS) as stream:
            assert stream.read_all()["pk"].to_pylist() == old
        assert stream.receipt is not None
        assert stream.receipt.complete_through == LAST + HOUR
        with pytest.raises(FlightUnavailable, match="cannot be followed right now"):
            live.client.read(start="now", follow=True)
    finally:
        execute(postgres, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    written = live.write(datetime.now(UTC))
    live.reaches(written[-1])
    assert live.keys()[-1] == written[-1], "it found its way back"


def test_what_is_published_is_served_while_the_database_is_silent(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "_CATCH_UP_SECONDS", 0.5)
    with proxied(changelog_url) as (proxy, through), followed(through, lake, start_server) as live:
        proxy.freeze()
        written = [insert(changelog_url, created_at=LAST)]
        with open_changelog(settings := live.settings.model_copy(update={"database_url": changelog_url})) as direct:
            pipeline.materialize([Window(LAST, WindowSize.HOUR)], settings=settings, changelog=direct, lake=live.lake)
        assert live.keys(start=LAST, end=LAST + HOUR) == written
        monkeypatch.setattr(live_module, "_CATCH_UP_SECONDS", 60.0)
        assert live.keys(start=LAST, end=LAST + HOUR) == written, "nobody waits again"
        proxy.cut()
        live.reaches(written[-1])
        assert live.keys(start=LAST) == written


def test_a_log_the_lake_was_not_published_from_is_not_followed(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, Window(LAST, WindowSize.HOUR), lake_events(Window(LAST, WindowSize.HOUR), 10))
    with connect(start_server(lake, database_url=changelog_url, start=LAST).url) as client:
        assert client.read(start=LAST).num_rows == 10, "the lake is served all the same"
        eventually(lambda: refusal(client) is SourceRefused)


def refusal(client: Client) -> type[Exception]:
    """What somebody gets who wants to follow."""
    with pytest.raises((SourceRefused, FlightUnavailable), match="The change log cannot be followed") as error:
        client.read(start="now", follow=True)
    assert error.value.retryable == (error.type is FlightUnavailable)
    return error.type


def test_who_needs_a_log_that_is_refused_is_told_that_it_takes_more_than_a_moment(live: Followed) -> None:
    old = live.write(LAST)
    live.materialize(LAST)
    live.reaches(live.write(datetime.now(UTC))[-1])
    one = Follower(live.client)
    live.log.close()
    execute(live.url, "ALTER TABLE core.tb_entity_change_log RENAME TO gone")
    execute(
        live.url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    one.ended()
    assert type(one.error) is SourceRefused
    assert "trying again helps when that is mended" in str(one.error)
    assert live.url not in str(one.error)
    assert refusal(live.client) is SourceRefused
    with pytest.raises(SourceRefused):
        live.keys(after_pk=0)
    assert live.keys(start=LAST) == old, "the lake is served all the same"
    execute(live.url, "ALTER TABLE core.gone RENAME TO tb_entity_change_log")
    live.reaches(live.write(datetime.now(UTC))[-1])
    assert not live.service.refused, "it found its way back"


def test_a_server_without_a_change_log_does_not_follow(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    with connect(start_server(lake).url) as client, pytest.raises(TicketError, match="FRAISEQL_DATABASE_URL"):
        client.read(start="now", follow=True)


def test_what_is_shown_of_following_moves(live: Followed) -> None:
    def shown() -> dict[str, float]:
        found = live.server.metrics.registry.collect()
        return {sample.name: sample.value for metric in found for sample in metric.samples if "_live_" in sample.name}

    live.reaches(live.write(datetime.now(UTC), 2)[-1])
    eventually(lambda: shown()["fraiseql_pipeline_live_rows"] == 2)
    assert shown()["fraiseql_pipeline_live_up"] == 1
    began = shown()["fraiseql_pipeline_live_settled_timestamp_seconds"]
    eventually(lambda: shown()["fraiseql_pipeline_live_settled_timestamp_seconds"] > began)
    live.client.read(start="now-1h")


def _command(ticket: str) -> Any:
    from pyarrow import flight

    return flight.FlightDescriptor.for_command(ticket.encode())
