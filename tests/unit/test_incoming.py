"""Rules of an upload's messages: how many are decoded at a time, and what is let go when."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.incoming import Incoming


def upload(batches: int) -> list[bytes]:
    """The messages of an upload of so many empty batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, EVENT_SCHEMA) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array([], f.type) for f in EVENT_SCHEMA], schema=EVENT_SCHEMA))
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    return [
        protocol.FlightData(
            data_header=m.metadata.to_pybytes(), data_body=m.body.to_pybytes() if m.body else b"", app_metadata=b"x"
        ).SerializeToString()
        for m in messages
    ]


def free(slots: threading.Semaphore) -> bool:
    found = slots.acquire(blocking=False)
    if found:
        slots.release()
    return found


def test_a_slot_is_held_from_a_message_to_its_answer_and_never_while_the_client_is_waited_for() -> None:
    slots = threading.Semaphore(1)
    waited = []

    def requests() -> object:
        for message in upload(2):
            waited.append(free(slots))
            yield message
        waited.append(free(slots))

    incoming = Incoming(requests(), slots)  # type: ignore[arg-type]
    assert incoming.named() == ()
    held = []
    for batch in incoming.batches():
        assert batch.schema.names == EVENT_SCHEMA.names
        held.append(free(slots))
        incoming.let_go()
        held.append(free(slots))
    assert waited == [True] * 4
    assert held == [False, True, False, True]


def test_an_upload_that_fails_gives_its_slot_back() -> None:
    slots = threading.Semaphore(1)
    incoming = Incoming(iter([*upload(0), b"\xff"]), slots)
    incoming.named()
    with pytest.raises(InputError):
        list(incoming.batches())
    incoming.close()
    incoming.close()
    assert free(slots)
    slots.acquire()
    assert not free(slots), "given back once"


def test_messages_of_metadata_alone_are_passed_over() -> None:
    schema, batch = upload(1)
    alone = protocol.FlightData(app_metadata=b"hello").SerializeToString()
    incoming = Incoming(iter([schema, alone, batch, alone]), threading.Semaphore(1))
    incoming.named()
    assert [found.num_rows for found in incoming.batches()] == [0]
