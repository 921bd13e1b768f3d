"""What reading and writing event JSON share: upstream's names for what happened, how a time is read, the bytes of a column.

What lives here: those three. What must not: lines.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

#: Upstream's ``event_type`` → ours. The change log knows more verbs; an ``EntityEvent`` has these four.
KINDS = {"INSERT": "Created", "UPDATE": "Updated", "DELETE": "Deleted", "CUSTOM": "Custom"}


def timestamps(texts: pa.Array, schema: pa.Schema) -> pa.Array | None:
    """None if any text is not an ISO 8601 time with an offset, or out of the range of the type."""
    wanted = schema.field("timestamp").type
    try:
        return texts.cast(wanted)
    except pa.ArrowInvalid:
        if wanted.unit == "ns":
            return None
    try:
        return pc.floor_temporal(texts.cast(pa.timestamp("ns", "UTC")), unit="microsecond").cast(wanted)
    except pa.ArrowInvalid:
        return None


def contents(texts: pa.Array) -> pa.Buffer:
    """All values, one after the other."""
    _, offsets, contents = texts.buffers()
    integer = pa.int64() if pa.types.is_large_string(texts.type) else pa.int32()
    ends = pa.Array.from_buffers(integer, len(texts) + 1, [None, offsets], offset=texts.offset)
    begin, end = ends[0].as_py(), ends[-1].as_py()
    return contents.slice(begin, end - begin) if end > begin else pa.py_buffer(b"")
