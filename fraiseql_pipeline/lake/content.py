"""The content hash of a stream of batches: equal rows in equal order give equal hashes, however they were cut into batches.

What lives here: ``ContentHash``. What must not: files, Delta.

Invariants
 1. Only values count: not the buffers' offsets, padding, what lies under a null, nor the borders between batches. So every column has its own
    hashers, one over validity, one over lengths, one over bytes, and null slots are zero.
 2. The order of columns and their names are part of the hash.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import xxhash


class ContentHash:
    """xxh3-128 over the values of the batches added, for one schema."""

    def __init__(self, schema: pa.Schema) -> None:
        self._columns = [_ColumnHash(field.type) for field in schema]
        self._names = schema.names
        self.rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.rows += batch.num_rows
        for hasher, column in zip(self._columns, batch.columns, strict=True):
            hasher.add(column)

    def hexdigest(self) -> str:
        total = xxhash.xxh3_128(str(self.rows).encode())
        for name, column in zip(self._names, self._columns, strict=True):
            total.update(name.encode())
            column.finish(total)
        return total.hexdigest()


class _ColumnHash:
    def __init__(self, kind: pa.DataType) -> None:
        self._validity = xxhash.xxh3_128()
        self._lengths = xxhash.xxh3_128()
        self._bytes = xxhash.xxh3_128()
        self._elements = _ColumnHash(kind.value_type) if pa.types.is_list(kind) else None
        if self._elements is None and not pa.types.is_string(kind):
            self._width = kind.bit_width // 8
            self._integer = {1: pa.int8(), 4: pa.int32(), 8: pa.int64()}[self._width]

    def add(self, column: pa.Array) -> None:
        if not len(column):
            return
        nulls = column.null_count
        self._validity.update(b"\1" * len(column) if not nulls else _fixed(column.is_valid().cast(pa.int8()), 1))
        if self._elements is not None:
            self._lengths.update(_fixed(pc.fill_null(pc.list_value_length(column), 0), 4))
            self._elements.add(column.flatten())
        elif pa.types.is_string(column.type):
            filled = pc.fill_null(column, "") if nulls else column
            self._lengths.update(_fixed(pc.binary_length(filled), 4))
            _, offsets, content = filled.buffers()
            ends = memoryview(offsets).cast("i")
            if content is not None:
                self._bytes.update(memoryview(content)[ends[filled.offset] : ends[filled.offset + len(filled)]])
        else:
            plain = column.view(self._integer)
            self._bytes.update(_fixed(pc.fill_null(plain, 0) if nulls else plain, self._width))

    def finish(self, total: xxhash.xxh3_128) -> None:
        for hasher in (self._validity, self._lengths, self._bytes):
            total.update(hasher.digest())
        if self._elements is not None:
            self._elements.finish(total)


def _fixed(column: pa.Array, width: int) -> memoryview:
    """The values of a column without nulls whose values are ``width`` bytes wide."""
    return memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
