"""A lake that is not there at the moment is an error of every call, never a shorter table: an empty mount point looks like a lake without windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import flight

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.metrics import LakeState
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events
from tests.support.following import HOUR, LAST, Followed
from tests.support.reading import execute
from tests.support.waiting import eventually

ALL = "events:*:2026-11-01T00:00:00Z:2026-11-01T02:00:00Z:10000"
AGAIN = "was there before and is not there at the moment"


@contextmanager
def gone(lake: Lake, instead: str) -> Iterator[None]:
    """The lake as it is where its disk is not mounted, or somebody moved it away."""
    place, elsewhere = Path(lake.uri), Path(f"{lake.uri}.elsewhere")
    place.rename(elsewhere)
    if instead == "an empty directory":
        place.mkdir()
    yield
    if instead == "an empty directory":
        place.rmdir()
    elsewhere.rename(place)


@pytest.mark.parametrize("instead", ["nothing", "an empty directory"])
def test_every_call_is_unavailable_while_the_lake_is_gone_and_works_when_it_is_back(
    lake: Lake, start_server: Callable[..., FlightServer], instead: str
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    version = publish(lake, hour(1), lake_events(hour(1), 3)).table_version
    server = start_server(Lake(lake.uri))
    ready = LakeState(server.lake, Settings()).ready
    old = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T02:00:00Z", "table_version": version - 1}
    with flight.connect(server.url) as client:

        def act(name: str, body: bytes = b"") -> dict[str, Any]:
            [result] = client.do_action((name, body))
            return dict(json.loads(result.body.to_pybytes()))

        def exchanged() -> int:
            with connect(server.url) as ours, ours.exchange() as exchange:
                return exchange.read(ALL).num_rows

        calls: dict[str, Callable[[], object]] = {
            "DoGet": lambda: client.do_get(flight.Ticket(ALL)).read_all().num_rows,
            "DoGet of a version": lambda: (
                client.do_get(flight.Ticket(json.dumps({**old, "allow_missing": True}))).read_all().num_rows
            ),
            "GetFlightInfo": lambda: client.get_flight_info(flight.FlightDescriptor.for_command(ALL)).total_records,
            "GetFlightInfo of a path": lambda: client.get_flight_info(flight.FlightDescriptor.for_path("events")).total_records,
            "GetSchema of a path": lambda: client.get_schema(flight.FlightDescriptor.for_path("events")).schema.names,
            "ListFlights": lambda: len(list(client.list_flights())),
            "DoExchange": exchanged,
            "healthcheck": lambda: act("healthcheck"),
            "refresh": lambda: act("refresh"),
            "warm": lambda: act("warm", ALL.encode()),
        }
        before = {name: call() for name, call in calls.items()}
        assert (before["DoGet"], before["DoGet of a version"], before["ListFlights"]) == (8, 5, 1)
        with gone(lake, instead):
            for name, call in calls.items():
                # OSError: pyarrow has no class for what a schema fails of.
                with pytest.raises((flight.FlightUnavailableError, FlightUnavailable, OSError), match=AGAIN) as told:
                    call()
                assert lake.uri not in str(told.value), name
            assert not ready(), "whoever it was that had seen the lake"
        assert {name: call() for name, call in calls.items()} == before
        assert ready()


def test_a_server_without_windows_yet_is_no_server_whose_lake_is_gone(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    server = start_server(Lake(lake.uri))
    with flight.connect(server.url) as client:
        assert list(client.list_flights()) == []
        assert LakeState(server.lake, Settings()).ready()
        publish(lake, hour(0), lake_events(hour(0), 5))
        assert len(list(client.list_flights())) == 1


def test_a_process_is_told_of_a_lake_that_another_one_has_read(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    with gone(lake, "nothing"):
        told = Lake(lake.uri)
        told.was_there = True
        with connect(start_server(told).url) as client, pytest.raises(FlightUnavailable, match=AGAIN):
            client.read(ALL)


def test_a_read_up_to_now_is_not_shorter_while_the_lake_is_gone(live: Followed) -> None:
    old = live.write(LAST - HOUR, 3)
    live.materialize(LAST - HOUR)
    execute(live.url, "DELETE FROM core.tb_entity_change_log")  # the source keeps what is new only
    new = live.write(datetime.now(UTC))
    live.reaches(new[-1])
    assert live.keys() == [*old, *new]
    for instead in ("nothing", "an empty directory"):
        with gone(live.lake, instead):
            for asked in ({}, {"follow": True}, {"after_pk": old[0]}):
                with pytest.raises(FlightUnavailable, match=AGAIN):
                    live.keys(**asked)
        eventually(lambda: live.service.up)
        assert live.keys() == [*old, *new]
