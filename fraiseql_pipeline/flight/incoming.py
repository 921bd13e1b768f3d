"""What a client uploads: messages of a DoPut → batches of the eight columns of an event.

What lives here: the columns and sizes an upload may have, and its decoding. What must not: rules about values, the change log
(``upload.py``).

Arrow reads the upload as one IPC stream out of ``Incoming``, which hands it a message only after its size was judged.

Invariants
 1. Nothing is decompressed, and no dictionary is multiplied out, whose declared size is above ``MAX_BATCH_BYTES``; dictionaries
    that are kept for later batches count together. No row is looked at of a batch of more than ``MAX_BATCH_ROWS``.
 2. Arrow sees of a message exactly the bytes whose size was judged.
 3. Of all uploads of a server, ``AT_ONCE`` hold something decoded at a time, dictionaries for later batches aside: of those all uploads
    together hold at most ``KEPT_BYTES``, beside ``SMALL_BYTES`` of each.
 4. Whatever comes in, a batch that leaves has the eight columns, is valid to its last offset and character, and holds no dictionary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.encoding import UUID, uuid_texts
from fraiseql_pipeline.errors import FlightBusy, InputError
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.ipc_size import BATCH, DICTIONARY, SCHEMA, size_of
from fraiseql_pipeline.flight.presence import Presence

#: Bytes of a batch, decompressed: about 100,000 events of the samples, and what a server may need for each upload.
MAX_BATCH_BYTES = 64 * 1024 * 1024
#: Rows of a batch: events of the samples take more bytes than the batch may have sooner. Each costs about 9 µs to judge however
#: small it is, and a million of one value each are 3 kB on the wire.
MAX_BATCH_ROWS = 131_072
#: Two, so that one is decoded while the other is written to the change log, which takes one batch after the other.
AT_ONCE = 2
#: Bytes of dictionaries that uploads keep while they wait for their next batch, all uploads together, those of ``SMALL_BYTES`` and less not
#: counted: what an event's columns of few values need is a few hundred bytes, and nobody is refused it because of others.
KEPT_BYTES, SMALL_BYTES = MAX_BATCH_BYTES, 64 * 1024
_RETRY_SECONDS = 1.0
#: Bytes of a message's header; one of an upload has a few hundred.
_MAX_HEADER_BYTES = 64 * 1024

_OPTIONAL = ("user_id", "org_id")
_TEXTS = (pa.string(), pa.large_string())


class Room:
    """What all uploads of a server share: invariant 3."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._changed = threading.Condition()
        self._free = at_once
        self._left = KEPT_BYTES

    def enter(self, presence: Presence) -> None:
        """Wait for the right to decode. Raises ``ClientGone``."""
        with self._changed:
            presence.wait_for(self._changed, lambda: self._free > 0)
            self._free -= 1

    def leave(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()  # one of them may be about to find its client gone

    def keep(self, more: int) -> None:
        """Keep so many bytes more, or less. Raises ``FlightBusy``."""
        with self._changed:
            if more > self._left:
                raise FlightBusy(
                    f"The server keeps no more than {KEPT_BYTES} bytes of dictionaries for all uploads; send texts as they are, or try again "
                    "in a moment.",
                    _RETRY_SECONDS,
                )
            self._left -= more


class Incoming:
    """The messages of one upload. Use ``named``, then ``next_batch``; close it at the end. ``presence``: of its client."""

    def __init__(self, requests: Iterator[bytes], room: Room, presence: Presence) -> None:
        self._requests = requests
        self._room = room
        self._presence = presence
        self._held = False
        self._kept = 0
        self._reader: Any = None
        self._first: Any = None
        self._waiting = memoryview(b"")
        self._dictionaries: dict[int, int] = {}
        self._error: BaseException | None = None
        self.closed = False

    def named(self) -> tuple[str, ...] | bytes:
        """The path or the command of the upload's descriptor, which comes with the first message."""
        self._first = self._next_message()
        descriptor = None if self._first is None else self._first.flight_descriptor
        if descriptor is None or not (descriptor.path or descriptor.cmd):
            return ()
        return tuple(descriptor.path) if descriptor.path else bytes(descriptor.cmd)

    def next_batch(self) -> pa.RecordBatch | None:
        """The next batch: the columns of ``EVENT_SCHEMA``, ``timestamp`` as it came; None at the end. Raises ``InputError``.

        No generator: it would keep the batch until it is asked for the next one.
        """
        if self._reader is None:
            self._reader = self._decoding(lambda: pa.ipc.open_stream(pa.PythonFile(self, mode="r")))
            if self._reader is None:
                return None
            self._decoding(lambda: _check_schema(self._reader.schema))
        batch = self._decoding(self._reader.read_next_batch)
        if batch is None:
            return None
        _check_rows(batch.num_rows)
        self._decoding(lambda: batch.validate(full=True))
        return _plain(batch)

    def let_go(self) -> None:
        """What was decoded is gone, but for dictionaries; others may decode theirs."""
        if self._held:
            self._held = False
            self._room.leave()

    def read(self, size: int) -> bytes:
        """What Arrow reads: the stream as IPC writes it. Part of the file interface."""
        if not self._waiting:
            try:
                self._waiting = memoryview(self._next_bytes())
            except BaseException as error:
                self._error = error  # Arrow may report it as another
                raise
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        return bytes(taken)

    def close(self) -> None:
        self.closed = True
        self._reader = None
        self.let_go()
        self._keep(0)

    def _decoding(self, step: Any) -> Any:
        """What Arrow makes of the next message; None at the end."""
        try:
            return step()
        except StopIteration:
            return None
        except Exception as error:
            if self._error is not None:
                raise self._error from None
            if isinstance(error, pa.ArrowException | OSError | ValueError | TypeError | KeyError | IndexError):
                raise _unreadable() from None
            raise

    def _next_bytes(self) -> bytes:
        """The next message as IPC frames it; nothing at the end of the upload."""
        message, self._first = self._first or self._next_message(), None
        while message is not None and not message.data_header:
            if message.data_body:
                raise _unreadable()
            message = self._next_message()  # metadata alone
        if message is None:
            return b""
        header, body = message.data_header, message.data_body
        if len(header) > _MAX_HEADER_BYTES:
            raise _unreadable()
        try:
            size = size_of(header, body)
        except ValueError:
            raise _unreadable() from None
        if size.kind == DICTIONARY:
            before = self._dictionaries.get(size.dictionary, 0) if size.delta else 0
            self._dictionaries[size.dictionary] = before + size.bytes
        kept = sum(self._dictionaries.values())
        if size.kind != SCHEMA:
            _check_bytes(kept + (size.bytes if size.kind == BATCH else 0))
        self._keep(kept)
        padding = -len(header) % 8
        length = (len(header) + padding).to_bytes(4, "little")
        return b"".join((b"\xff\xff\xff\xff", length, header, bytes(padding), memoryview(body)[: size.body_bytes]))

    def _keep(self, total: int) -> None:
        counted = max(0, total - SMALL_BYTES)
        self._room.keep(counted - self._kept)
        self._kept = counted

    def _next_message(self) -> Any:
        self.let_go()
        request = next(self._requests, None)
        if request is None:
            return None
        self._room.enter(self._presence)
        self._held = True
        return protocol.parse(protocol.FlightData, request)


def _unreadable() -> InputError:
    return InputError(
        "The upload cannot be read: its messages must be an Arrow IPC stream of format V5, a schema and then batches."
    )


def _check_bytes(size: int) -> None:
    if size > MAX_BATCH_BYTES:
        raise InputError(
            f"A batch must not have more than {MAX_BATCH_BYTES} bytes, decompressed and with its dictionaries; send smaller batches."
        )


def _check_rows(rows: int) -> None:
    if rows > MAX_BATCH_ROWS:
        raise InputError(f"A batch must not have more than {MAX_BATCH_ROWS} events, got {rows}; send smaller batches.")


def _check_schema(schema: pa.Schema) -> None:
    """Raises ``InputError`` unless the columns are those of an event, in any order, in types of a profile."""
    problems = [f"{name} is missing" for name in EVENT_SCHEMA.names if name not in {*schema.names, *_OPTIONAL}]
    problems += [f"{name[:64]!r} is no column of an event" for name in schema.names if name not in EVENT_SCHEMA.names]
    problems += [f"{name} is there twice" for name in EVENT_SCHEMA.names if schema.names.count(name) > 1]
    problems += [
        f"{field.name} is {str(field.type)[:64]}"
        for field in schema
        if field.name in EVENT_SCHEMA.names and not _fits(field.name, field.type)
    ]
    if problems:
        raise InputError(
            f"An upload must have the columns {', '.join(EVENT_SCHEMA.names)} in the types of a stream, of which "
            f"{' and '.join(_OPTIONAL)} may be missing: {'; '.join(problems[:10])}."
        )


def _fits(name: str, kind: pa.DataType) -> bool:
    if name == "timestamp":
        return pa.types.is_timestamp(kind) and kind.unit in {"us", "ns"} and kind.tz is not None
    if pa.types.is_dictionary(kind):
        return kind.value_type in _TEXTS
    return kind in _TEXTS or (kind == UUID and name in {"event_id", "entity_id"})


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The eight columns with their texts as they are in ``EVENT_SCHEMA``."""
    _check_bytes(sum(_decoded_bytes(column) for column in batch.columns))
    columns = []
    for name in EVENT_SCHEMA.names:
        at = batch.schema.get_field_index(name)
        columns.append(pa.nulls(batch.num_rows, pa.string()) if at < 0 else _texts(batch.column(at)))
    return pa.RecordBatch.from_arrays(columns, names=EVENT_SCHEMA.names)


def _decoded_bytes(column: pa.Array) -> int:
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.fill_null(pc.binary_length(column.dictionary), 0).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices), min_count=0).as_py()) + 8 * len(column)


def _texts(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode().cast(pa.string())
    if column.type == UUID:
        texts = uuid_texts(column)
        return texts if not column.null_count else pc.if_else(column.is_valid(), texts, pa.scalar(None, pa.string()))
    return column if pa.types.is_timestamp(column.type) else column.cast(pa.string())
