"""What is said of the lake without reading it: flights beyond a server's limits, older versions, warmed frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import TicketError
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Facts, Lake
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import lake_events


@pytest.mark.parametrize("limit", [{"arrow_flight_max_range_days": 1}, {"arrow_flight_max_rows": 60}])
def test_what_is_more_than_one_ticket_may_ask_is_listed(
    lake: Lake, start_server: Callable[..., FlightServer], limit: dict[str, Any]
) -> None:
    for number in range(30):
        publish(lake, hour(number), lake_events(hour(number), 3))
    server = start_server(lake, **limit)
    with flight.connect(server.url) as client:
        (found,) = client.list_flights()
        assert found.total_records == 90
    with connect(server.url) as client:
        with pytest.raises(TicketError, match="must not"):
            client.read(start=MIDNIGHT, end=hour(30).start)
        assert client.read(start=MIDNIGHT, end=hour(3).start).num_rows == 9


def test_an_older_version_says_no_key_that_only_a_newer_one_reached(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    events = lake_events(hour(0), 100)
    keys = sorted(events["pk"].to_pylist())
    publish_up_to(lake, events, keys[49], "provisional")
    version = lake.snapshot().version
    publish_up_to(lake, events, keys[99], "sealed")
    with connect(start_server(Lake(lake.uri)).url) as client:
        asked = {"start": hour(0).start, "end": hour(0).end}
        older, newest = client.info(table_version=version, **asked), client.info(**asked)
        assert client.read(table_version=version, **asked).num_rows == 50
    assert (older.settled_pk, older.provisional_windows) == (keys[49], 1)
    assert (newest.settled_pk, newest.provisional_windows) == (keys[99], 0)


def publish_up_to(lake: Lake, events: pa.Table, settled_pk: int, state: str) -> None:
    there = events.filter(pc.less_equal(events["pk"], settled_pk))
    with lake.stage(hour(0)) as staged:
        for batch in there.to_batches():
            staged.write(batch)
        facts = Facts(
            settled_pk=settled_pk, state=state, identity="test", run_id="test", settled_at=hour(0).end, source_rows=there.num_rows
        )
        lake.commit(staged, facts)


def test_events_that_are_warmed_are_not_counted_as_sent(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 100))
    server = start_server(lake)

    def sent() -> float:
        return server.metrics.registry.get_sample_value("fraiseql_pipeline_flight_rows_total") or 0.0

    with connect(server.url) as client:
        assert client.warm(start=hour(0).start, end=hour(0).end) == 100
        assert sent() == 0
        client.read(start=hour(0).start, end=hour(0).end)
    assert sent() == 100
