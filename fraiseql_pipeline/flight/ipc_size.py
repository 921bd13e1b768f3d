"""What an Arrow IPC message says of its size, read before anything of it is decoded.

What lives here: the few fields of the flatbuffer header that tell how many bytes a message becomes. What must not: Arrow, gRPC, a limit.

An upload of a few kilobytes may say that it becomes gigabytes: each compressed buffer begins with the length it decompresses to
(https://arrow.apache.org/docs/format/Columnar.html#compression), and Arrow allocates that much before it looks at the rest. Arrow's Python
has no way to ask, so the header is read here: ``Message.fbs`` and ``Schema.fbs`` in a handful of offsets
(https://flatbuffers.dev/internals).

Invariants
 1. No offset is trusted: every read is checked against the bytes there are, in plain integers, so any header at all gives a ``Size``
    or ``ValueError``.
 2. Only what Arrow reads the same way is let through: format version V5, whose compression is in the header and nowhere else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SCHEMA, DICTIONARY, BATCH = 1, 2, 3
_KINDS = (SCHEMA, DICTIONARY, BATCH)

#: ``MetadataVersion.V5``; earlier ones may name a compression in their custom metadata.
_V5 = 4

_BYTE, _UINT16, _INT32, _UINT32, _INT64 = (struct.Struct(f"<{code}") for code in "BHiIq")
#: A buffer as a record batch lists it: offset and length in the body.
_BUFFER = struct.Struct("<qq")
#: What stands before a compressed buffer for "stored as it is".
_AS_IT_IS = -1


@dataclass(frozen=True, slots=True)
class Size:
    """What a message becomes: ``kind``, the ``bytes`` of its buffers decompressed, and of a dictionary which one it is.

    ``body_bytes`` of the body belong to the message.
    """

    kind: int
    body_bytes: int
    bytes: int = 0
    dictionary: int = 0
    delta: bool = False


def size_of(header: bytes, body: bytes) -> Size:
    """The size a message declares; ``header`` is its flatbuffer, without the length before it. Raises ``ValueError`` for no such message."""
    message = _Table.root(header)
    if message.number(0, _UINT16) != _V5:
        raise ValueError("version")
    kind = message.number(1, _BYTE)
    if kind not in _KINDS:
        raise ValueError("kind")
    length = message.number(3, _INT64)
    if not 0 <= length <= len(body):
        raise ValueError("body")
    if kind == SCHEMA:
        return Size(SCHEMA, length)
    content = message.table(2)
    if content is None:
        raise ValueError("header")
    if kind == BATCH:
        return Size(BATCH, length, _batch_bytes(content, body, length))
    batch = content.table(1)
    if batch is None:
        raise ValueError("dictionary")
    return Size(
        DICTIONARY,
        length,
        _batch_bytes(batch, body, length),
        content.number(0, _INT64),
        bool(content.number(2, _BYTE)),
    )


def _batch_bytes(batch: _Table, body: bytes, body_bytes: int) -> int:
    compressed = batch.table(3) is not None
    total = 0
    for offset, length in batch.buffers(2):
        if offset < 0 or length < 0 or offset + length > body_bytes:
            raise ValueError("buffer")
        declared = _AS_IT_IS
        if compressed and length:
            if length < _INT64.size:
                raise ValueError("buffer")
            (declared,) = _INT64.unpack_from(body, offset)
            if declared < _AS_IT_IS:
                raise ValueError("length")
        total += length if declared == _AS_IT_IS else declared
    return total


class _Table:
    """A flatbuffer table: fields by number, each found through the table's vtable."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - _read(_INT32, data, at)
        self._fields = _read(_UINT16, data, self._vtable)
        if self._fields % 2:
            raise ValueError("vtable")

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _read(_UINT32, data, 0))

    def number(self, field: int, kind: struct.Struct) -> int:
        """A scalar; 0, the default of every field read here, where it is absent."""
        at = self._place(field)
        return 0 if at is None else _read(kind, self._data, at)

    def table(self, field: int) -> _Table | None:
        at = self._place(field)
        return None if at is None else _Table(self._data, at + _read(_UINT32, self._data, at))

    def buffers(self, field: int) -> list[tuple[int, int]]:
        """A vector of ``Buffer`` structs."""
        at = self._place(field)
        if at is None:
            return []
        start = at + _read(_UINT32, self._data, at)
        count = _read(_UINT32, self._data, start)
        start += _UINT32.size
        if start + count * _BUFFER.size > len(self._data):
            raise ValueError("vector")
        return list(_BUFFER.iter_unpack(self._data[start : start + count * _BUFFER.size]))

    def _place(self, field: int) -> int | None:
        slot = 4 + 2 * field
        if slot + 2 > self._fields:
            return None
        offset = _read(_UINT16, self._data, self._vtable + slot)
        return self._at + offset if offset else None


def _read(kind: struct.Struct, data: bytes, at: int) -> int:
    if at < 0 or at + kind.size > len(data):
        raise ValueError("offset")
    number: int = kind.unpack_from(data, at)[0]
    return number
