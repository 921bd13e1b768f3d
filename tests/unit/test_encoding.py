from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from fraiseql_pipeline.encoding import MAX_FRAME_BYTES, checksum, frame, frames, schema_frame, to_wire, wire_schema
from fraiseql_pipeline.event import COLUMNS, LAKE_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events

WINDOW = Window(datetime(2026, 11, 1, tzinfo=UTC), WindowSize.HOUR)
EVENTS = lake_events(WINDOW, 3_000).combine_chunks().to_batches()[0]


def decode(data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """What a client makes of a frame: the IPC message again, read with the stream's schema."""
    message = protocol.FlightData.FromString(data)
    header = message.data_header + b"\x00" * (-len(message.data_header) % 8)
    prefix = b"\xff\xff\xff\xff" + len(header).to_bytes(4, "little")
    return ipc.read_record_batch(ipc.read_message(pa.py_buffer(prefix + header + message.data_body)), schema)


def test_a_frame_is_what_protobuf_would_have_written() -> None:
    for header, metadata, body in (
        (b"h" * 300, b"", b"b" * 20_000),
        (b"", b'{"rows": 1}', b""),
        (b"h", b"m" * 128, b"b"),
        (b"", b"", b""),
    ):
        expected = protocol.FlightData(data_header=header, app_metadata=metadata, data_body=body).SerializeToString()
        assert frame(header=header, metadata=metadata, body=body) == expected


def test_frames_hold_the_rows_of_the_batch_in_order() -> None:
    wire = to_wire(EVENTS, wire_schema())
    sent = list(frames(wire, 700))
    assert pa.Table.from_batches([decode(f.data, WIRE_SCHEMA) for f in sent]) == pa.Table.from_batches([wire])
    assert [f.rows for f in sent] == [decode(f.data, WIRE_SCHEMA).num_rows for f in sent]


@settings(max_examples=30)
@given(max_rows=st.integers(1, 4_000), rows=st.integers(0, 400), offset=st.integers(0, 2_000))
def test_no_frame_has_more_rows_than_it_was_allowed(max_rows: int, rows: int, offset: int) -> None:
    counts = [f.rows for f in frames(to_wire(EVENTS.slice(offset, rows), wire_schema()), max_rows)]
    assert sum(counts) == rows
    assert all(1 <= count <= max_rows for count in counts)


def heavy(weights: list[int]) -> pa.RecordBatch:
    """Events whose payloads weigh so many bytes and do not compress."""
    noise = pc.cast(pc.random(max(weights, default=0) // 8 + 2, initializer=1), pa.string())
    text = "".join(noise.to_pylist())
    batch = to_wire(EVENTS.slice(0, len(weights)), wire_schema())
    return batch.set_column(5, WIRE_SCHEMA.field("data"), pa.array([text[:weight] for weight in weights], pa.string()))


@pytest.mark.parametrize(
    "weights",
    [[3_000_000] * 8, [10] * 500 + [3_900_000] + [10] * 500, [200_000] * 60, [1_500_000, 10] * 10],
    ids=["all heavy", "one heavy among light ones", "many of medium weight", "alternating"],
)
def test_no_frame_exceeds_the_default_limit_of_clients_whatever_payloads_weigh(weights: list[int]) -> None:
    batch = heavy(weights)
    sent = list(frames(batch, 1_000_000))
    assert max(len(f.data) for f in sent) <= MAX_FRAME_BYTES
    assert pa.Table.from_batches([decode(f.data, WIRE_SCHEMA) for f in sent]) == pa.Table.from_batches([batch])


def test_an_event_too_heavy_for_any_frame_travels_alone() -> None:
    sent = list(frames(heavy([10, 20_000_000, 10]), 1_000))
    assert [f.rows for f in sent if len(f.data) > MAX_FRAME_BYTES] == [1]
    assert sum(f.rows for f in sent) == 3


def test_an_empty_batch_becomes_no_frame() -> None:
    assert list(frames(to_wire(EVENTS.slice(0, 0), wire_schema()), 100)) == []


def test_the_first_frame_carries_the_schema_and_no_body() -> None:
    message = protocol.FlightData.FromString(schema_frame(WIRE_SCHEMA))
    assert message.data_body == b""
    header = message.data_header
    assert ipc.read_schema(pa.py_buffer(b"\xff\xff\xff\xff" + len(header).to_bytes(4, "little") + header)) == WIRE_SCHEMA


def test_the_wire_has_the_eight_columns_of_a_plain_ticket_and_nanoseconds() -> None:
    assert [f.name for f in wire_schema()] == [c.name for c in COLUMNS if c.part == "event"]
    assert wire_schema().field("timestamp").type == pa.timestamp("ns", "UTC")


def test_any_column_of_the_lake_can_be_asked_for_in_any_order() -> None:
    schema = wire_schema(["commit_time", "pk", "timestamp", "event_id"])
    assert schema.names == ["commit_time", "pk", "timestamp", "event_id"]
    assert schema.field("commit_time") == LAKE_SCHEMA.field("commit_time")
    assert to_wire(EVENTS, schema).column("pk") == EVENTS.column("pk")


def test_the_instant_of_an_event_is_kept_to_the_microsecond() -> None:
    sent = to_wire(EVENTS, wire_schema()).column("timestamp")
    assert pc.cast(sent, LAKE_SCHEMA.field("timestamp").type) == EVENTS.column("timestamp")


@pytest.mark.parametrize("columns", [("event_id", "data"), ("data", "event_id")])
def test_a_checksum_is_the_sum_of_the_words_of_the_ids_wherever_their_column_is(columns: tuple[str, str]) -> None:
    ids = ["00000000-0000-4000-8000-000000000001", "ffffffff-ffff-4fff-bfff-fffffffffffe"]

    def summed(*chosen: str) -> int | None:
        held = {"event_id": pa.array(chosen, pa.string()), "data": pa.array(["{}"] * len(chosen))}
        return checksum(pa.record_batch({name: held[name] for name in columns}))

    words = [int.from_bytes(one.encode()[at : at + 4], "little") for one in ids for at in range(0, 36, 4)]
    assert summed(*ids) == sum(words)
    odd = summed("an id of another length")
    assert summed(ids[0], "an id of another length", ids[1]) == (sum(words) + (odd or 0)) % 2**64, "beside one that is no UUID, too"
