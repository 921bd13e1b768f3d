"""The declared messages are the ones every other Flight implementation speaks: pyarrow's C++ is the reference."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
from pyarrow import flight

from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.flight import protocol

EXPIRES = datetime(2026, 11, 1, 12, 30, tzinfo=UTC)


def test_flight_info_is_read_and_written_as_pyarrow_does() -> None:
    endpoint = flight.FlightEndpoint(
        b"ticket", ["grpc://replica:50051"], pa.scalar(EXPIRES, pa.timestamp("ns", "UTC")), b"of endpoint"
    )
    written = flight.FlightInfo(
        WIRE_SCHEMA, flight.FlightDescriptor.for_command(b"cmd"), [endpoint], 5, -1, True, b"of info"
    ).serialize()
    info = protocol.FlightInfo.FromString(written)
    assert info.SerializeToString(deterministic=True) == written
    assert (info.total_records, info.total_bytes, info.ordered, info.app_metadata) == (5, -1, True, b"of info")
    assert info.schema == WIRE_SCHEMA.serialize().to_pybytes()
    assert info.endpoint[0].ticket.ticket == b"ticket"
    assert info.endpoint[0].location[0].uri == "grpc://replica:50051"
    assert info.endpoint[0].expiration_time.seconds == EXPIRES.timestamp()
    assert info.endpoint[0].app_metadata == b"of endpoint"


def test_descriptors_are_read_as_pyarrow_writes_them() -> None:
    path = protocol.FlightDescriptor.FromString(flight.FlightDescriptor.for_path("events", "Order").serialize())
    command = protocol.FlightDescriptor.FromString(flight.FlightDescriptor.for_command(b"ticket").serialize())
    assert (path.type, list(path.path)) == (protocol.PATH, ["events", "Order"])
    assert (command.type, command.cmd) == (protocol.CMD, b"ticket")


def test_tickets_are_read_and_written_as_pyarrow_does() -> None:
    assert protocol.Ticket.FromString(flight.Ticket(b"abc").serialize()).ticket == b"abc"
    assert flight.Ticket.deserialize(protocol.Ticket(ticket=b"abc").SerializeToString()).ticket == b"abc"


def test_a_field_of_a_newer_specification_survives_the_way_through() -> None:
    unknown = b"\x9a\x06\x03new"  # field 99
    assert (
        protocol.Ticket.FromString(protocol.Ticket(ticket=b"t").SerializeToString() + unknown).SerializeToString().endswith(unknown)
    )
