"""Rules of an upload's messages: how many are decoded at a time, and what is let go when."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from fraiseql_pipeline.changelog import Appended
from fraiseql_pipeline.errors import FlightBusy, InputError
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.flight import incoming as module
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.edge import Call
from fraiseql_pipeline.flight.incoming import MAX_BATCH_ROWS, SMALL_BYTES, Incoming, Room
from fraiseql_pipeline.flight.limits import Running
from fraiseql_pipeline.flight.presence import ClientGone, Presence
from fraiseql_pipeline.flight.upload import uploads
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events


def upload(batches: int) -> list[bytes]:
    """The messages of an upload of so many empty batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, EVENT_SCHEMA) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array([], f.type) for f in EVENT_SCHEMA], schema=EVENT_SCHEMA))
    return framed(sink)


def framed(sink: pa.BufferOutputStream) -> list[bytes]:
    """The messages of an IPC stream as a client sends them."""
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return [
        protocol.FlightData(
            data_header=m.metadata.to_pybytes(), data_body=m.body.to_pybytes() if m.body else b"", app_metadata=b"x"
        ).SerializeToString()
        for m in messages
    ]


def free(room: Room) -> bool:
    return room._free > 0


def incoming_of(messages: Iterable[bytes], room: Room | None = None, presence: Presence | None = None) -> Incoming:
    return Incoming(iter(messages), room or Room(), presence or Presence())


def test_a_slot_is_held_from_a_message_to_its_answer_and_never_while_the_client_is_waited_for() -> None:
    room = Room(1)
    waited = []

    def requests() -> Iterator[bytes]:
        for message in upload(2):
            waited.append(free(room))
            yield message
        waited.append(free(room))

    incoming = incoming_of(requests(), room)
    assert incoming.named() == ()
    held = []
    while (batch := incoming.next_batch()) is not None:
        assert batch.schema.names == EVENT_SCHEMA.names
        held.append(free(room))
        incoming.let_go()
        held.append(free(room))
    assert waited == [True] * 4
    assert held == [False, True, False, True]


def test_an_upload_that_fails_gives_its_slot_back() -> None:
    room = Room(1)
    incoming = incoming_of([*upload(0), b"\xff"], room)
    incoming.named()
    with pytest.raises(InputError):
        incoming.next_batch()
    incoming.close()
    incoming.close()
    assert room._free == 1, "given back once"


def test_an_upload_that_waits_for_its_turn_waits_no_longer_than_its_client() -> None:
    room, presence = Room(1), Presence()
    room.enter(Presence())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(incoming_of(upload(1), room, presence).named)
        presence.leave()
        with pytest.raises(ClientGone):
            waiting.result(30)
    room.leave()
    assert room._free == 1


def test_messages_of_metadata_alone_are_passed_over() -> None:
    schema, batch = upload(1)
    alone = protocol.FlightData(app_metadata=b"hello").SerializeToString()
    incoming = incoming_of([schema, alone, batch, alone])
    incoming.named()
    found = incoming.next_batch()
    assert found is not None
    assert found.num_rows == 0
    assert incoming.next_batch() is None


def of_one_value(rows: int) -> list[bytes]:
    """The messages of an upload of so many rows that are one byte a column, and next to nothing compressed."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()).take(pa.array([0] * rows)), pa.array(["x"]))
    columns = dict.fromkeys(("event_id", "event_type", "entity_type", "entity_id", "data"), texts)
    batch = pa.record_batch({**columns, "timestamp": pa.array([0] * rows, pa.timestamp("us", "UTC"))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return framed(sink)


def test_a_batch_of_too_many_rows_is_refused_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_plain", lambda _: pytest.fail("looked at"))
    messages = of_one_value(MAX_BATCH_ROWS + 1)
    assert sum(map(len, messages)) < 5_000
    incoming = incoming_of(messages)
    incoming.named()
    with pytest.raises(InputError, match=f"more than {MAX_BATCH_ROWS} events, got {MAX_BATCH_ROWS + 1}; send smaller batches"):
        incoming.next_batch()


def test_a_batch_of_as_many_rows_as_allowed_is_read() -> None:
    incoming = incoming_of(of_one_value(MAX_BATCH_ROWS))
    incoming.named()
    batch = incoming.next_batch()
    assert batch is not None
    assert batch.num_rows == MAX_BATCH_ROWS


# ------------------------------------------------------------------------------------- what stays while a client is waited for


def with_dictionary(size: int, batches: int = 1) -> list[bytes]:
    """The messages of an upload whose ``data`` is a dictionary of so many bytes; each batch has one event."""
    values = pa.array(["x" * size])
    sink = pa.BufferOutputStream()
    schema = pa.schema(
        [pa.field(f.name, pa.dictionary(pa.int8(), pa.string()) if f.name == "data" else f.type, f.nullable) for f in EVENT_SCHEMA]
    )
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for _ in range(batches):
            columns = [
                pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), values)
                if f.name == "data"
                else pa.array([0 if pa.types.is_timestamp(f.type) else "x"], f.type)
                for f in EVENT_SCHEMA
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return framed(sink)


def test_dictionaries_of_all_uploads_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 250_000)
    room, large, small = Room(), 100_000 + SMALL_BYTES, SMALL_BYTES // 2
    waiting = [incoming_of(with_dictionary(large), room) for _ in range(2)]
    for incoming in waiting:
        incoming.named()
        assert incoming.next_batch() is not None
        incoming.let_go()
    third = incoming_of(with_dictionary(large), room)
    third.named()
    with pytest.raises(FlightBusy, match="no more than 250000 bytes of dictionaries"):
        third.next_batch()
    third.close()
    ordinary = incoming_of(with_dictionary(small, batches=3), room)
    ordinary.named()
    while ordinary.next_batch() is not None:
        ordinary.let_go()
    waiting[0].close()
    fourth = incoming_of(with_dictionary(large), room)
    fourth.named()
    assert fourth.next_batch() is not None
    for incoming in (ordinary, waiting[1], fourth):
        incoming.close()
    assert room._left == 250_000


def test_nothing_of_a_batch_is_kept_once_it_is_answered() -> None:
    held: list[weakref.ref[pa.RecordBatch]] = []

    def append(events: pa.RecordBatch, producer: str) -> Appended:
        held.append(weakref.ref(events))
        return Appended(events.num_rows, 0)

    class Asked(Call):
        def received(self, requests: Iterator[bytes]) -> Iterator[bytes]:
            return requests

    def requests() -> Iterator[bytes]:
        for message in (descriptor, *framed(two)):
            assert all(batch() is None for batch in held), "while the client is waited for"
            yield message

    batch = lake_events(Window(datetime(2026, 11, 1, tzinfo=UTC), WindowSize.HOUR), 3).select(EVENT_SCHEMA.names)
    batch = batch.set_column(6, EVENT_SCHEMA.field("user_id"), pa.nulls(3, pa.string()))
    two = pa.BufferOutputStream()
    with pa.ipc.new_stream(two, batch.schema) as writer:
        for _ in range(2):
            writer.write_table(batch)
    named = protocol.FlightDescriptor(type=protocol.PATH, path=["events"])
    descriptor = protocol.FlightData(flight_descriptor=named).SerializeToString()
    call = Asked("DoPut", None)  # type: ignore[arg-type]
    call.running = Running(None, None, 10.0)  # type: ignore[arg-type]
    assert len(list(uploads(append)(requests(), call))) == 2
    assert len(held) == 2
