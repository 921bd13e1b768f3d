"""Each RPC, asked by a stock client: what is offered conforms, what is not says so."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events

ALL = "events:*:2026-11-01T00:00:00Z:2026-11-01T04:00:00Z:10000"
DESCRIPTORS = [
    flight.FlightDescriptor.for_command(ALL),
    flight.FlightDescriptor.for_command("events:Order|User:2026-11-01:now:5"),
    flight.FlightDescriptor.for_path("events"),
    flight.FlightDescriptor.for_path("events", "Order"),
]


@pytest.mark.parametrize("descriptor", DESCRIPTORS, ids=str)
def test_info_schema_and_stream_agree(client: flight.FlightClient, descriptor: flight.FlightDescriptor) -> None:
    info = client.get_flight_info(descriptor)
    reader = client.do_get(info.endpoints[0].ticket)
    assert info.schema.equals(reader.schema, check_metadata=True)
    assert info.schema.equals(client.get_schema(descriptor).schema, check_metadata=True)
    assert info.schema.equals(WIRE_SCHEMA)
    assert info.descriptor == descriptor
    assert info.ordered
    assert info.total_records in {-1, reader.read_all().num_rows}


def test_rows_are_exact_for_whole_windows_and_unknown_otherwise(
    client: flight.FlightClient, events: dict[Window, pa.Table]
) -> None:
    def rows(ticket: str) -> int:
        return client.get_flight_info(flight.FlightDescriptor.for_command(ticket)).total_records

    kept = pc.sum(pc.equal(events[hour(1)]["entity_type"], "Order")).as_py()  # if another test has read it
    assert rows(ALL) == 6_000
    assert rows("events:*:2026-11-01T01:00:00Z:2026-11-01T03:00:00Z:10000") == 2_000
    assert rows("events:*:2026-11-01T01:30:00Z:2026-11-01T03:00:00Z:10000") == -1
    assert rows("events:Order:2026-11-01T01:00:00Z:2026-11-01T03:00:00Z:10000") in {-1, kept}


def test_what_lies_after_the_newest_window_is_told_and_not_an_error(client: flight.FlightClient) -> None:
    info = client.get_flight_info(flight.FlightDescriptor.for_command("events:*:2026-11-01:2026-11-05:10000"))
    assert json.loads(info.app_metadata)["complete_through"] == hour(3).end.isoformat()
    assert client.do_get(info.endpoints[0].ticket).read_all().num_rows == 6_000


def test_provisional_windows_are_counted(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    publish(lake, hour(1), lake_events(hour(1), 5), state="provisional")
    with flight.connect(start_server(lake).url) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_command(ALL))
    assert json.loads(info.app_metadata)["provisional_windows"] == 1


def test_the_list_holds_one_flight_per_stretch_without_a_hole(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number, rows in ((0, 3), (1, 4), (3, 5)):
        publish(lake, hour(number), lake_events(hour(number), rows))
    with flight.connect(start_server(lake).url) as client:
        listed = list(client.list_flights())
        assert [info.total_records for info in listed] == [7, 5]
        assert [client.do_get(info.endpoints[0].ticket).read_all().num_rows for info in listed] == [7, 5]
        again = [client.get_flight_info(info.descriptor).total_records for info in listed]
        assert again == [7, 5]


def test_criteria_are_a_ticket_and_list_what_it_asks_of_each_stretch(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number in (0, 1, 3):
        publish(lake, hour(number), lake_events(hour(number), 100))
    orders = f"events:Order:{hour(1).start.isoformat()}:{hour(9).end.isoformat()}:1000"
    with flight.connect(start_server(lake).url) as client:
        listed = list(client.list_flights(orders.encode()))
        found = [client.do_get(info.endpoints[0].ticket).read_all() for info in listed]
        assert [set(table["entity_type"].to_pylist()) for table in found] == [{"Order"}, {"Order"}]
        assert [client.do_get(flight.Ticket(info.descriptor.command)).read_all() for info in listed] == found
        assert list(client.list_flights(f"events:*:{hour(5).start.isoformat()}:{hour(9).end.isoformat()}:1000".encode())) == []
        with pytest.raises(pa.ArrowInvalid, match="A ticket must look like"):
            list(client.list_flights(b"everything"))
        # A part of a ticket is one of everything else.
        partial = [{"entity_type": "Order"}, {"type": "events", "entity_type": "Order"}, {"start": hour(2).start.isoformat()}, {}]
        found = [[one.descriptor.command for one in client.list_flights(json.dumps(asked).encode())] for asked in partial]
        assert [len(flights) for flights in found] == [2, 2, 1, 2]
        assert found[0] == found[1]
        assert all(b":Order:" in command or b'"Order"' in command for command in found[0])
        for refused in (b'{"entity_tpe": "Order"}', b'{"type": "what"}', b'{"entity_type": "Order", "entity_type": "User"}'):
            with pytest.raises(ValueError, match="ticket"):
                list(client.list_flights(refused))
        with pytest.raises(ValueError, match="type"):
            client.do_get(flight.Ticket(b'{"entity_type": "Order"}')).read_all()


def test_an_empty_lake_lists_no_flight(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    with flight.connect(start_server(lake).url) as client:
        assert list(client.list_flights()) == []


def test_an_rpc_that_is_not_offered_says_which_are(client: flight.FlightClient) -> None:
    with pytest.raises((NotImplementedError, flight.FlightError)) as refused:
        # The refusal may reach the client with its first message, its second or only at the end.
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("events"), pa.schema([("a", pa.int64())]))
        with writer:
            writer.write_batch(pa.record_batch({"a": [1]}))
    assert "DoPut is not offered by this server; it answers DoGet, DoExchange, GetFlightInfo, " in str(refused.value)
    assert "with FRAISEQL_ARROW_FLIGHT_UPLOADS=true and a FRAISEQL_DATABASE_URL it takes events by DoPut" in str(refused.value)


def test_no_message_exceeds_the_limit_of_clients_that_set_none(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    import grpc

    from fraiseql_pipeline.flight import protocol

    publish(lake, hour(0), lake_events(hour(0), 30_000))
    server = start_server(lake)
    request = protocol.Ticket(ticket=b"events:*:2026-11-01:now:1000000").SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:  # 4 MiB, gRPC's default
        messages = list(channel.unary_stream("/arrow.flight.protocol.FlightService/DoGet")(request))
    assert json.loads(protocol.FlightData.FromString(messages[-1]).app_metadata)["rows"] == 30_000


def test_windows_of_another_size_count_as_published(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    day = Window.parse("2026-11-01")
    publish(lake, day, lake_events(day, 24))
    publish(lake, hour(24), lake_events(hour(24), 2))
    with flight.connect(start_server(lake).url) as client:
        assert client.do_get(flight.Ticket("events:*:2026-11-01:2026-11-02T01:00:00:100")).read_all().num_rows == 26
