"""Encoding: batches of the lake → the wire's schema → Flight frames.

What lives here: which columns and types a stream has in each profile, and how a batch becomes the bytes of one Flight message. What must
not: gRPC, tickets, the lake, where frames are kept.

A *frame* is one serialized ``FlightData`` message. An Arrow IPC message is a flatbuffer header and a body; Flight carries the same
two in protobuf fields 2 and 1000 (https://arrow.apache.org/docs/format/Flight.html), the body last. So a frame is written around the
buffers Arrow has made, without another pass through protobuf, and can be kept and sent again as it is.

Profiles. ``plain``: the types of the column table. ``compact``: ``event_id`` and ``entity_id`` as the 16 bytes of their UUID, and columns of
few values as dictionaries of text. ``org_id`` is one of the latter: as often repeated as it is, its text costs nothing, and every client
shows it as text.

Invariants
 1. The schema of a stream is made by ``stream_schema`` alone, for ``FlightInfo``, ``GetSchema`` and the stream itself.
 2. Frames hold the batch's rows in order; each holds at least one row and at most the rows it was allowed.
 3. No frame exceeds ``MAX_FRAME_BYTES`` (4 MiB, the limit of a Go, Rust or grpcio client that sets none), unless one single event
    does: nothing can split a value over two messages, so that event travels alone.
 4. A frame holds no dictionary: ``dictionary_frames`` makes those of a run of frames, of exactly the values they are given. Values that
    ``dictionary_fits`` make a message that 3. holds for.
 5. ``checksum`` depends on the events and the profile alone: not on order, codec or batches. The sum of parts is that of the whole.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pyarrow import ipc

from fraiseql_pipeline.errors import LakeDamaged, TicketError
from fraiseql_pipeline.event import LAKE_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.event_ids import malformed_ids

#: What clients that set no limit of their own accept in one message.
MAX_FRAME_BYTES = 4 * 1024 * 1024

#: Arrow bytes a frame is cut at, before compression. Measured over 1,000 to 16,384 rows per frame: uncompressed encoding peaks at
#: 2 MB (11.5M events/s) and halves at 6 MB, where the copies leave the cache. Compressed, what counts is what is behind a reader's search:
#: frames of 10,000 rows of the sample events (6 MB) are 5 % smaller than of 5,000, and 17 % than of 1,000, and not slower to read.
FRAME_BYTES = 2 * 1024 * 1024
COMPRESSED_FRAME_BYTES = 8 * 1024 * 1024

#: Bytes of the values of one dictionary: what does not compress grows a little, and its header comes on top.
MAX_DICTIONARY_BYTES = MAX_FRAME_BYTES // 16 * 15

#: Tags and lengths around the two parts of a message.
_ENVELOPE_BYTES = 16

PROFILES = ("plain", "compact")

#: How the bodies of a stream's messages are compressed. zstd level 3: compact frames of 10,000 rows take 52.8 bytes per typical sample event
#: where level 1 takes 54.9 and level 6 50.3 (wide ones 117 where level 1 takes 140), are read as fast, and are made at 2.3M events/s, at
#: level 6 at 0.6M.
CODECS = {
    codec: ipc.IpcWriteOptions(compression=compression, use_threads=False)
    for codec, compression in (("none", None), ("lz4", "lz4"), ("zstd", pa.Codec("zstd", compression_level=3)))
}

#: The instants nanoseconds can hold, as microseconds since 1970: 1677-09-21 to 2262-04-11.
NANOSECOND_RANGE_US = (-(2**63) // 1000 + 1, (2**63 - 1) // 1000)

UUID = pa.binary(16)
_UUID_TEXT_BYTES = 36
#: Where the 32 digits of a UUID stand in its 36 characters.
_DIGITS = tuple(at for at in range(_UUID_TEXT_BYTES) if at not in {8, 13, 18, 23})

#: The columns of ``compact`` that have another type than the lake's. A verb fits a byte and a GraphQL schema's types two; users and tenants
#: may be as many as the rows. A lake that has more is sent with more dictionaries: see ``dictionary_fits``.
_COMPACT = {
    "event_id": UUID,
    "entity_id": UUID,
    "event_type": pa.dictionary(pa.int8(), pa.string()),
    "entity_type": pa.dictionary(pa.int16(), pa.string()),
    **dict.fromkeys(
        ("user_id", "org_id", "change_status", "actor_type", "acting_for", "schema_version", "cdc_source"),
        pa.dictionary(pa.int32(), pa.string()),
    ),
}

#: Columns of few values: worth reading as dictionaries, whatever the profile.
FEW_VALUES = tuple(name for name, kind in _COMPACT.items() if pa.types.is_dictionary(kind))


@dataclass(frozen=True, slots=True)
class Encoding:
    """A profile and a codec; ``str`` is its name, as ``compact+zstd``."""

    profile: str = "plain"
    codec: str = "zstd"

    def __post_init__(self) -> None:
        if self.profile not in PROFILES or self.codec not in CODECS:
            raise TicketError(f"An encoding must be one of {', '.join(ENCODINGS)}, got {f'{self.profile}+{self.codec}'[:64]!r}.")

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """The encoding of a name, plain and zstd where it leaves them open. Raises ``TicketError`` with the names there are."""
        profile, codec = cls.named(name)
        return cls(profile or "plain", codec or "zstd")

    @classmethod
    def named(cls, name: str) -> tuple[str | None, str | None]:
        """The profile and the codec of a name; None: it is one of the other alone. Raises ``TicketError`` with the names there are."""
        profile, _, codec = name.partition("+")
        if not codec and profile in CODECS:
            return None, profile
        checked = cls(profile, codec or "zstd")
        return checked.profile, codec or None

    def __str__(self) -> str:
        return f"{self.profile}+{self.codec}"


ENCODINGS = tuple(f"{profile}+{codec}" for profile in PROFILES for codec in CODECS)


class Frame(NamedTuple):
    """One Flight message: its bytes, and how many events are in it."""

    data: bytes
    rows: int


# ------------------------------------------------------------------------------------------------------------------ schemas


def wire_schema(columns: Sequence[str] = (), profile: str = "plain") -> pa.Schema:
    """The columns and types of a stream, in this order; none: the eight of a plain ticket. ``KeyError`` for no column.

    In ``compact``, a field that holds UUIDs as bytes says so in its metadata: ``fraiseql.type`` is ``uuid``.
    """
    fields = [WIRE_SCHEMA.field(name) if name in WIRE_SCHEMA.names else LAKE_SCHEMA.field(name) for name in columns] or WIRE_SCHEMA
    if profile == "plain":
        return pa.schema(fields)
    fields = [field.with_type(_COMPACT.get(field.name, field.type)) for field in fields]
    return pa.schema([f.with_metadata({"fraiseql.type": "uuid"}) if f.type == UUID else f for f in fields])


def stream_schema(columns: Sequence[str], encoding: Encoding) -> pa.Schema:
    """``wire_schema`` as a stream announces it: the schema's metadata names the encoding (``fraiseql.encoding``)."""
    return wire_schema(columns, encoding.profile).with_metadata({"fraiseql.encoding": str(encoding)})


def without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """The schema of what a frame holds: of dictionary columns, the indices."""
    return pa.schema([f.with_type(f.type.index_type) if pa.types.is_dictionary(f.type) else f for f in schema])


def dictionary_fits(column: str, values: pa.Array) -> bool:
    """Whether a dictionary of ``compact`` can have these values: their number as its indices, their bytes in one message.

    One value alone fits whatever it weighs: nothing can split it.
    """
    most = 2 ** (_COMPACT[column].index_type.bit_width - 1)
    return len(values) <= 1 or (len(values) <= most and values.nbytes <= MAX_DICTIONARY_BYTES)


# ------------------------------------------------------------------------------------------------------------------ batches


def to_wire(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of ``schema`` out of a batch of the lake, ``timestamp`` in nanoseconds. Raises ``TicketError`` out of range.

    Columns of the batch may be dictionaries; where ``schema`` wants one, its values are those of the batch. Raises ``LakeDamaged`` for a
    value that the compact profile cannot hold: an id that is no UUID, which another writer has put into the lake.
    """
    arrays = [_converted(batch.column(field.name), field) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _converted(array: pa.Array, field: pa.Field) -> pa.Array:
    if array.type == field.type:
        return array
    if pa.types.is_dictionary(field.type):
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        try:
            return pa.DictionaryArray.from_arrays(encoded.indices.cast(field.type.index_type), encoded.dictionary)
        except pa.ArrowInvalid:
            raise _unfit(field.name, "has more distinct values than") from None
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    if field.type == UUID:
        if array.null_count or len(malformed_ids(array)):
            raise _unfit(field.name, "has a value that is no UUID, which is none of")
        return pa.FixedSizeBinaryArray.from_buffers(UUID, len(array), [None, pa.py_buffer(_uuid_bytes(array))])
    try:
        return pc.cast(array, field.type)
    except pa.ArrowInvalid:
        raise beyond_nanoseconds("An event") from None


def beyond_nanoseconds(what: str) -> TicketError:
    """The error of who asks for times that the wire cannot hold."""
    return TicketError(
        f"{what} lies outside 1677-09-22 to 2262-04-11, the times that nanoseconds can hold; ask for a range inside, or for columns "
        "without timestamp."
    )


def _unfit(column: str, why: str) -> LakeDamaged:
    return LakeDamaged(f"The column {column} {why} those the compact profile holds; read with the profile plain.")


def plain_schema(compact: pa.Schema) -> pa.Schema:
    """The schema of ``to_plain`` of batches of a schema of the compact profile."""
    return wire_schema(compact.names).with_metadata(compact.metadata)


def to_plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of the compact profile with the types of the plain one."""
    plain = plain_schema(batch.schema)
    return pa.RecordBatch.from_arrays(
        [_plain(array, field) for array, field in zip(batch.columns, plain, strict=True)], schema=plain
    )


def _plain(array: pa.Array, field: pa.Field) -> pa.Array:
    if array.type == UUID and field.type != UUID:
        return uuid_texts(array)
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    return array


def _uuid_bytes(texts: pa.Array) -> bytes:
    """The UUIDs of texts of 36 characters, 16 bytes each, one behind the other."""
    _, offsets, content = texts.buffers()
    if content is None or not len(texts):
        return b""
    first = memoryview(offsets).cast("i")[texts.offset]
    return unhexlify(memoryview(content)[first : first + len(texts) * _UUID_TEXT_BYTES].tobytes().translate(None, b"-"))


def uuid_texts(uuids: pa.Array) -> pa.Array:
    """The texts of UUIDs of 16 bytes without nulls."""
    rows = len(uuids)
    digits = memoryview(uuids.buffers()[1])[uuids.offset * 16 : (uuids.offset + rows) * 16].hex().encode()
    # Character by character over all rows: 32 strided copies, and no loop over rows.
    text = bytearray(b"-" * (rows * _UUID_TEXT_BYTES))
    for number, at in enumerate(_DIGITS):
        text[at::_UUID_TEXT_BYTES] = digits[number::32]
    ends = pl.int_range(0, (rows + 1) * _UUID_TEXT_BYTES, _UUID_TEXT_BYTES, dtype=pl.Int32, eager=True).to_arrow()
    return pa.StringArray.from_buffers(rows, ends.buffers()[1], pa.py_buffer(text))


def checksum(batch: pa.RecordBatch) -> int | None:
    """The sum of the event ids of a batch, modulo 2^64: of each, the 32-bit words, little-endian, of its bytes as they are sent.

    An id is sent as 36 characters, or 16 bytes in ``compact``. One of another length (another writer's) counts as the xxh3-64 of its text.
    None where the batch has no ``event_id``. It costs 1 to 3 ns per event; a hash of UUIDs, the same in every profile, 80 in plain.
    """
    at = batch.schema.get_field_index("event_id")
    if at < 0:
        return None
    ids = batch.column(at)
    if not len(ids):
        return 0
    if ids.type == UUID:
        content = memoryview(ids.buffers()[1])[ids.offset * 16 : (ids.offset + len(ids)) * 16]
    else:
        _, offsets, text = ids.buffers()
        ends = memoryview(offsets).cast("i")
        first, last = ends[ids.offset], ends[ids.offset + len(ids)]
        if last - first != len(ids) * _UUID_TEXT_BYTES or pc.any(pc.not_equal(pc.binary_length(ids), _UUID_TEXT_BYTES)).as_py():
            return sum(_word(value) for value in ids.to_pylist()) % 2**64
        content = memoryview(text)[first:last]
    words = pa.py_buffer(content)
    if words.address % 4:  # as gRPC hands it out; Arrow's kernels read aligned words
        words = pa.py_buffer(content.tobytes())
    return int(pc.sum(pa.Array.from_buffers(pa.uint32(), content.nbytes // 4, [None, words])).as_py())


def _word(text: str) -> int:
    data = text.encode()
    if len(data) != _UUID_TEXT_BYTES:
        return xxhash.xxh3_64_intdigest(data)
    return sum(int.from_bytes(data[at : at + 4], "little") for at in range(0, _UUID_TEXT_BYTES, 4))


# ------------------------------------------------------------------------------------------------------------------- frames


def schema_frame(schema: pa.Schema) -> bytes:
    """The first message of a stream."""
    message = ipc.read_message(schema.serialize())
    return frame(header=message.metadata)


def dictionary_frames(schema: pa.Schema, dictionaries: Mapping[str, pa.Array], codec: str = "zstd") -> list[bytes]:
    """One message per dictionary column of ``schema``, in its order: the values that indices of the frames behind them mean."""
    if not any(pa.types.is_dictionary(field.type) for field in schema):
        return []
    nothing = [
        pa.DictionaryArray.from_arrays(pa.array([], field.type.index_type), dictionaries[field.name])
        if pa.types.is_dictionary(field.type)
        else pa.array([], field.type)
        for field in schema
    ]
    reader = _written(pa.RecordBatch.from_arrays(nothing, schema=schema), codec)
    found = []
    while (message := reader.read_next_message()).type == "dictionary":
        found.append(frame(header=message.metadata, body=message.body))
    return found


def frames(batch: pa.RecordBatch, max_rows: int, codec: str = "zstd") -> Iterator[Frame]:
    """The messages of one batch of a wire schema, each of 1 to ``max_rows`` rows and at most ``MAX_FRAME_BYTES``.

    Of dictionary columns only the indices are sent; see ``dictionary_frames``.
    """
    if any(pa.types.is_dictionary(field.type) for field in batch.schema):
        bare = [column.indices if pa.types.is_dictionary(column.type) else column for column in batch.columns]
        batch = pa.RecordBatch.from_arrays(bare, schema=without_dictionaries(batch.schema))
    yield from _frames(batch, max_rows, codec)


def receipt_frames(schema: pa.Schema, receipt: bytes, *, first: bool) -> Iterator[bytes]:
    """The end of a whole stream: a batch without rows whose metadata is the receipt. Readers such as Go's take no message without a batch.

    ``first``: no batch was sent before it, so it brings the (empty) dictionaries of ``schema``.
    """
    if first:
        none = {field.name: pa.array([], field.type.value_type) for field in schema if pa.types.is_dictionary(field.type)}
        yield from dictionary_frames(schema, none, "none")
    bare = without_dictionaries(schema)
    nothing = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in bare], schema=bare)
    message = _written(nothing, "none").read_next_message()
    yield frame(header=message.metadata, metadata=receipt, body=message.body)


def _frames(batch: pa.RecordBatch, max_rows: int, codec: str) -> Iterator[Frame]:
    most = FRAME_BYTES if codec == "none" else COMPRESSED_FRAME_BYTES
    pieces = max(-(-batch.num_rows // max_rows), min(batch.num_rows, -(-batch.nbytes // most)))
    if pieces > 1:
        rows = -(-batch.num_rows // pieces)
        for start in range(0, batch.num_rows, rows):
            # A piece can still be too heavy: payloads differ. It is cut again until it fits or is one row.
            yield from _frames(batch.slice(start, rows), max_rows, codec)
    elif batch.num_rows:
        reader = _written(batch, codec)
        message = reader.read_next_message()
        if batch.num_rows > 1 and message.metadata.size + message.body.size > MAX_FRAME_BYTES - _ENVELOPE_BYTES:
            yield from _frames(batch, -(-batch.num_rows // 2), codec)  # it does not compress
        else:
            yield Frame(frame(header=message.metadata, body=message.body), batch.num_rows)


def _written(batch: pa.RecordBatch, codec: str) -> ipc.MessageReader:
    """The messages of a batch, behind that of the schema, which a stream sends once."""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema, options=CODECS[codec]) as writer:
        writer.write_batch(batch)
    reader = ipc.MessageReader.open_stream(sink.getvalue())
    reader.read_next_message()
    return reader


def frame(*, header: pa.Buffer | bytes = b"", metadata: bytes = b"", body: pa.Buffer | bytes = b"") -> bytes:
    """A serialized ``FlightData``: fields 2 (``data_header``), 3 (``app_metadata``) and 1000 (``data_body``), absent when empty."""
    parts: list[bytes | memoryview] = []
    for tag, value in ((b"\x12", header), (b"\x1a", metadata), (b"\xc2\x3e", body)):
        content = memoryview(value)
        if content.nbytes:
            parts += (tag, _varint(content.nbytes), content)
    return b"".join(parts)


def with_metadata(message: bytes, metadata: bytes) -> bytes:
    """A serialized ``FlightData`` without metadata, with it: protobuf takes fields in any order."""
    return b"".join((message, b"\x1a", _varint(len(metadata)), metadata))


def decoded(data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in a frame that ``frames`` made; ``schema`` is the one of ``without_dictionaries``."""
    content = memoryview(data)
    size, at = _read_varint(content, 1)
    header = content[at : at + size]
    body = content[0:0]
    if at + size < len(content):
        body = content[_read_varint(content, at + size + 2)[1] :]
    padding = -size % 8
    parts = (b"\xff\xff\xff\xff", (size + padding).to_bytes(4, "little"), header, bytes(padding), body)
    return ipc.read_record_batch(ipc.read_message(pa.py_buffer(b"".join(parts))), schema)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
