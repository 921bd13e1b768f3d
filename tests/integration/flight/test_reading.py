"""What a stock pyarrow.flight client gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.integration.flight.conftest import hour, nothing, publish
from tests.support.events import lake_events

ALL = "events:*:2026-11-01T00:00:00Z:2026-11-01T04:00:00Z:10000"


def ticket(entity_types: str, start: datetime, end: datetime, batch_size: int = 10_000) -> flight.Ticket:
    return flight.Ticket(f"events:{entity_types}:{start.isoformat()}:{end.isoformat()}:{batch_size}")


def on_the_wire(table: pa.Table) -> pa.Table:
    return table.select(WIRE_SCHEMA.names).cast(WIRE_SCHEMA)


def together(events: dict[Window, pa.Table]) -> pa.Table:
    return pa.concat_tables(events[window] for window in sorted(events))


def test_a_ticket_for_all_windows_gets_every_event_in_order(client: flight.FlightClient, events: dict[Window, pa.Table]) -> None:
    assert client.do_get(flight.Ticket(ALL)).read_all().equals(on_the_wire(together(events)))


def test_the_stream_has_the_eight_columns_with_nanoseconds(client: flight.FlightClient) -> None:
    assert client.do_get(flight.Ticket(ALL)).schema.equals(
        WIRE_SCHEMA.with_metadata({"fraiseql.encoding": "plain+zstd"}), check_metadata=True
    )


def test_a_type_gets_its_events_only(client: flight.FlightClient, events: dict[Window, pa.Table]) -> None:
    everything = together(events)
    found = client.do_get(ticket("Order", hour(0).start, hour(3).end)).read_all()
    assert found.num_rows > 0
    assert found.equals(on_the_wire(everything.filter(pc.field("entity_type") == "Order")))


def test_the_end_of_a_range_is_exclusive_and_its_start_inclusive(
    client: flight.FlightClient, events: dict[Window, pa.Table]
) -> None:
    stamps = events[hour(0)]["timestamp"]
    start, end = stamps[500].as_py(), stamps[1_500].as_py()
    expected = events[hour(0)].filter((pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
    assert client.do_get(ticket("*", start, end)).read_all().equals(on_the_wire(expected))


def test_a_range_may_begin_or_end_at_any_event_of_a_window(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    events = lake_events(hour(0), 4)
    publish(lake, hour(0), events)
    with flight.connect(start_server(lake).url) as client:
        for number, at in enumerate(events["timestamp"].to_pylist()):
            assert client.do_get(ticket("*", at, hour(0).end)).read_all().equals(on_the_wire(events.slice(number)))
            if at > hour(0).start:
                assert client.do_get(ticket("*", hour(0).start, at)).read_all().equals(on_the_wire(events.slice(0, number)))


def test_a_window_without_events_is_an_empty_stream(client: flight.FlightClient) -> None:
    found = client.do_get(ticket("*", hour(2).start, hour(2).end)).read_all()
    assert found.num_rows == 0
    assert found.schema == WIRE_SCHEMA


def test_a_type_nobody_wrote_is_an_empty_stream(client: flight.FlightClient) -> None:
    assert client.do_get(ticket("Unicorn", hour(0).start, hour(3).end)).read_all().num_rows == 0


@pytest.mark.parametrize("batch_size", [1, 7, 999, 1_000_000])
def test_no_batch_has_more_rows_than_the_ticket_says(client: flight.FlightClient, batch_size: int) -> None:
    sizes = [
        chunk.data.num_rows
        for chunk in client.do_get(ticket("*", hour(3).start, hour(3).end, batch_size))
        if chunk.data is not None
    ]
    assert sum(sizes) == 1_000
    assert max(sizes) <= batch_size


def test_a_stream_ends_with_a_receipt(client: flight.FlightClient) -> None:
    *_, last = client.do_get(flight.Ticket(ALL))
    assert last.data.num_rows == 0
    receipt = json.loads(last.app_metadata.to_pybytes())
    assert receipt["rows"] == 6_000
    assert receipt["complete_through"] == hour(3).end.isoformat()
    assert (receipt["provisional_windows"], receipt["missing_windows"]) == (0, 0)


def test_what_a_limit_cuts_off_is_above_the_key_of_the_receipt(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    events = lake_events(hour(0), 100)
    publish(lake, hour(0), events)
    pks = events["pk"].to_pylist()

    def settled(said: bytes) -> int | None:
        return json.loads(said)["settled_pk"]

    with flight.connect(start_server(lake).url) as client:
        for limit, after_pk, told in ((10, None, None), (10, pks[4], pks[4]), (101, None, 2**62), (100, pks[0], 2**62)):
            asked = {"start": "2026-11-01", "end": "2026-11-02", "columns": ["pk"], "limit": limit, "after_pk": after_pk}
            said = json.dumps({"type": "events", "entity_type": "*"} | asked).encode()
            *batches, last = client.do_get(flight.Ticket(said))
            assert sum(batch.data.num_rows for batch in batches) == min(limit, len([pk for pk in pks if pk > (after_pk or 0)]))
            assert settled(last.app_metadata.to_pybytes()) == told
            if limit == 10:
                info = client.get_flight_info(flight.FlightDescriptor.for_command(said))
                assert settled(info.app_metadata) == told, "a plan of what will be cut knows it"


def test_the_last_microsecond_of_the_calendar_is_an_end_like_others(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    far = Window(datetime(2300, 1, 1, tzinfo=UTC), hour(0).size)
    publish(lake, hour(0), lake_events(hour(0), 5))
    publish(lake, far, lake_events(far, 7))
    with flight.connect(start_server(lake).url) as client:
        said = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "9999-12-31T23:59:59.999999Z"}
        ticket = flight.Ticket(json.dumps(said | {"allow_missing": True}))
        with pytest.raises(pa.ArrowInvalid, match="Window 2300-01-01-00:00 lies outside 1677-09-22 to 2262-04-11"):
            client.do_get(ticket).read_all()
        ticket = flight.Ticket(json.dumps(said | {"allow_missing": True, "columns": ["pk"]}))
        assert client.do_get(ticket).read_all().num_rows == 12


def test_the_calls_of_the_plan_work_with_naive_utc_times(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    last = Window(now - timedelta(hours=1), hour(0).size)
    before = Window(now - timedelta(hours=2), hour(0).size)
    orders = lake_events(last, 500).filter(pc.field("entity_type") == "Order")
    for window, table in ((before, nothing()), (last, orders)):
        publish(lake, window, table)
    server = start_server(lake, start=before.start)

    client = flight.connect(f"grpc://localhost:{server.port}")
    start = last.start.replace(tzinfo=None).isoformat()
    end = (datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=0.000_001)).isoformat()
    reader = client.do_get(flight.Ticket(f"events:Order:{start}:{end}:10000"))
    frame = pl.from_arrow(reader.read_all())

    assert isinstance(frame, pl.DataFrame)
    assert frame["event_id"].to_list() == orders["event_id"].to_pylist()
    assert frame.schema["timestamp"] == pl.Datetime("ns", "UTC")
    client.close()


def test_relative_times_mean_the_clock_of_the_server(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = Window(now - timedelta(hours=1), hour(0).size)
    publish(lake, window, lake_events(window, 100))
    with flight.connect(start_server(lake, start=window.start).url) as client:
        assert client.do_get(flight.Ticket("events:*:now-2h:now:10000")).read_all().num_rows == 100


def test_a_window_published_while_the_server_runs_is_there_for_the_next_read(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    with flight.connect(start_server(lake).url) as client:
        both = ticket("*", hour(0).start, hour(1).end)
        assert client.do_get(both).read_all().num_rows == 10
        # Another handle, as another process would use.
        publish(Lake(lake.uri), hour(1), lake_events(hour(1), 20))
        assert client.do_get(both).read_all().num_rows == 30


def test_a_window_materialized_again_during_a_read_does_not_change_that_read(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    before = lake_events(hour(0), 150_000, seed=1)
    publish(lake, hour(0), before)
    with flight.connect(start_server(lake).url) as client:
        reader = client.do_get(ticket("*", hour(0).start, hour(0).end, 100))
        first = reader.read_chunk().data
        publish(lake, hour(0), lake_events(hour(0), 5, seed=2))
        rest = [chunk.data for chunk in reader if chunk.data is not None]
        assert pa.Table.from_batches([first, *rest]).equals(on_the_wire(before))
        assert client.do_get(ticket("*", hour(0).start, hour(0).end)).read_all().num_rows == 5


def test_the_ticket_of_a_flight_info_names_its_version_of_the_table(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 100))
    with flight.connect(start_server(lake).url) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_command("events:*:2026-11-01:now:10000"))
        publish(lake, hour(0), lake_events(hour(0), 7, seed=3))
        assert client.do_get(info.endpoints[0].ticket).read_all().num_rows == info.total_records == 100


def test_readers_side_by_side_each_get_everything(server: FlightServer, events: dict[Window, pa.Table]) -> None:
    expected = on_the_wire(together(events))
    together_now = threading.Barrier(16)

    def read(_: int) -> bool:
        with flight.connect(server.url) as client:
            together_now.wait(30)
            return client.do_get(flight.Ticket(ALL)).read_all().equals(expected)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(16)))
