"""Rules of reading a message's size: it is what Arrow makes of the message, and any bytes at all give a size or a ``ValueError``."""

from __future__ import annotations

import struct

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from fraiseql_pipeline.flight.ipc_size import BATCH, DICTIONARY, SCHEMA, Size, size_of

TEXTS = ["a" * 1_000] * 500
TABLE = pa.table(
    {
        "number": pa.array(range(500), pa.int64()),
        "text": TEXTS,
        "few": pa.array([f"value {n % 7}" for n in range(500)]).dictionary_encode(),
    }
)


def messages(codec: str | None, **options: object) -> list[tuple[bytes, bytes]]:
    """Header and body of each message of the table as a stream."""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, TABLE.schema, options=ipc.IpcWriteOptions(compression=codec, **options)) as writer:
        writer.write_table(TABLE)
    reader = ipc.MessageReader.open_stream(sink.getvalue())
    return [(m.metadata.to_pybytes(), b"" if m.body is None else m.body.to_pybytes()) for m in reader]


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_a_batch_says_what_it_becomes_whatever_it_weighs(codec: str | None) -> None:
    schema, dictionary, batch = (size_of(*message) for message in messages(codec))
    assert schema == Size(SCHEMA, 0)
    assert (dictionary.kind, dictionary.dictionary, dictionary.delta) == (DICTIONARY, 0, False)
    assert 7 * len("value 0") <= dictionary.bytes <= 200
    held = (
        sum(buffer.size for name in ("number", "text") for buffer in TABLE[name].chunk(0).buffers() if buffer is not None) + 500 * 4
    )
    assert batch.kind == BATCH
    assert 0 <= batch.bytes - held < 64 * 8  # what pads the buffers
    _, body = messages(codec)[2]
    assert batch.body_bytes == len(body)
    assert codec is None or len(body) < batch.bytes / 5


def test_a_delta_adds_to_its_dictionary() -> None:
    sink = pa.BufferOutputStream()
    kind = pa.dictionary(pa.int32(), pa.string())
    with ipc.new_stream(sink, pa.schema([("a", kind)]), options=ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for values in (["x"], ["x", "yy"]):
            writer.write_batch(pa.record_batch({"a": pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(values))}))
    reader = ipc.MessageReader.open_stream(sink.getvalue())
    sizes = [size_of(m.metadata.to_pybytes(), b"" if m.body is None else m.body.to_pybytes()) for m in reader]
    assert [(size.kind, size.delta) for size in sizes] == [
        (SCHEMA, False),
        (DICTIONARY, False),
        (BATCH, False),
        (DICTIONARY, True),
        (BATCH, False),
    ]


def test_a_length_that_lies_is_believed_before_anything_is_allocated() -> None:
    header, body = messages("zstd")[2]
    at = next(at for at in range(0, len(body) - 8, 8) if struct.unpack_from("<q", body, at)[0] == len("".join(TEXTS)))
    for lie in (2**62, 2**40):
        told = body[:at] + struct.pack("<q", lie) + body[at + 8 :]
        assert size_of(header, told).bytes >= lie
    for lie in (-2, -(2**63)):
        with pytest.raises(ValueError, match="length"):
            size_of(header, body[:at] + struct.pack("<q", lie) + body[at + 8 :])


def test_a_body_shorter_than_its_message_says_is_none() -> None:
    header, body = messages(None)[2]
    with pytest.raises(ValueError, match="body"):
        size_of(header, body[:-1])
    assert size_of(header, body + b"more").body_bytes == len(body)


def test_a_format_that_may_hide_its_compression_is_refused() -> None:
    header, body = messages(None, metadata_version=ipc.MetadataVersion.V4)[2]
    with pytest.raises(ValueError, match="version"):
        size_of(header, body)


@given(header=st.binary(max_size=300), body=st.binary(max_size=100))
def test_any_bytes_give_a_size_or_a_value_error(header: bytes, body: bytes) -> None:
    judged(header, body)


@given(data=st.data(), number=st.integers(0, 2), codec=st.sampled_from([None, "zstd"]))
def test_any_change_of_a_message_gives_a_size_or_a_value_error(data: st.DataObject, number: int, codec: str | None) -> None:
    header, body = MESSAGES[codec][number]
    changed = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + 4] = data.draw(
            st.sampled_from([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"]) | st.binary(min_size=1, max_size=4)
        )
    judged(bytes(changed), body[: data.draw(st.integers(0, len(body)))])


MESSAGES = {codec: messages(codec) for codec in (None, "zstd")}


def judged(header: bytes, body: bytes) -> None:
    try:
        size = size_of(header, body)
    except ValueError:
        return
    assert size.bytes >= 0
    assert 0 <= size.body_bytes <= len(body)
