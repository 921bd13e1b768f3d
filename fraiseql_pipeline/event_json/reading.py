"""Event JSON as a table: chunks of lines, read side by side.

What lives here: ``events_from_json``, which lines go which way, and the sentence that refuses some. What must not: how a line is read
(``canonical.py``, ``rows.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import EVENT_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.event_json.canonical import after_line_feeds, canonical_rows, is_utf8
from fraiseql_pipeline.event_json.rows import Rows

#: Of the input, per task of the thread pool: small enough to stay in the caches, large enough to make a kernel's fixed cost small.
_CHUNK_BYTES = 8 << 20
_LARGEST_CHUNK_BYTES = 2**31 - 1
_SHOWN_LINES = 10

_Lines: TypeAlias = bytes | bytearray | memoryview | pa.Buffer


def events_from_json(lines: _Lines, *, schema: pa.Schema = WIRE_SCHEMA) -> pa.Table:
    """Event JSON, one event per line or all in one array, as a table in ``schema``, in the order of the input.

    ``schema`` is ``WIRE_SCHEMA`` (timestamp in nanoseconds) or ``EVENT_SCHEMA`` (microseconds, finer digits cut). Accepted is what
    upstream accepts: keys in any order, unknown keys, white space and blank lines; ``user_id`` and ``tenant_id`` may be absent; no key
    that is read twice. UUIDs become lower case. A timestamp is ISO 8601 with an offset.

    Raises ``InputError`` if any line is not an event: the message names the first such lines and what is wrong, never a value.
    Uses as many threads as there are cores.
    """
    if schema not in {WIRE_SCHEMA, EVENT_SCHEMA}:
        raise InputError("Event JSON can be read as WIRE_SCHEMA or EVENT_SCHEMA, not as another schema.")
    text = lines if isinstance(lines, bytes) else pa.py_buffer(lines).to_pybytes()
    if re.match(rb"[ \t\r\n]*\[", text):
        unit, converted = "element", [_convert_array(text, schema)]
    else:
        unit, converted = "line", _convert_lines(text, schema)
    _refuse(unit, converted)
    return pa.Table.from_batches([part.batch for part in converted], schema)


@dataclass(frozen=True, slots=True)
class _Converted:
    """``rejected``: the number of each line that is no event, from 0, and why."""

    batch: pa.RecordBatch
    lines: int
    rejected: list[tuple[int, str]]


def _convert_lines(text: bytes, schema: pa.Schema) -> list[_Converted]:
    if text and not text.endswith(b"\n"):
        text += b"\n"
    whole, chunks, at = pa.py_buffer(text), [], 0
    while at < len(text):
        end = text.find(b"\n", min(at + _CHUNK_BYTES, len(text)) - 1) + 1
        chunks.append(whole.slice(at, end - at))
        at = end
    if len(chunks) < 2:
        return [_convert(chunk, schema) for chunk in chunks]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(chunks)), "event-json") as pool:
        return list(pool.map(lambda chunk: _convert(chunk, schema), chunks))


def _convert_array(text: bytes, schema: pa.Schema) -> _Converted:
    try:
        elements = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        raise InputError("The event JSON begins with '[' but is not a well-formed array.") from None
    rows = Rows(schema)
    rows.read(range(len(elements)), (bytes(element) for element in elements))
    return _Converted(rows.batch(), len(elements), rows.rejected)


def _refuse(unit: str, converted: Sequence[_Converted]) -> None:
    rejected, before = [], 0
    for part in converted:
        rejected += [(before + row + 1, why) for row, why in part.rejected]
        before += part.lines
    if rejected:
        named = ", ".join(f"{unit} {number} ({why})" for number, why in rejected[:_SHOWN_LINES])
        more = ", …" if len(rejected) > _SHOWN_LINES else ""
        raise InputError(f"{len(rejected):,} of {before:,} {unit}s are not events, so nothing was converted: {named}{more}.")


def _convert(text: pa.Buffer, schema: pa.Schema) -> _Converted:
    """All lines of ``text``, which ends with a line feed."""
    if text.size > _LARGEST_CHUNK_BYTES:
        raise InputError(f"A line of event JSON must be shorter than {_LARGEST_CHUNK_BYTES:,} bytes.")
    ends = after_line_feeds(text)
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
    rows, columns = ends[:0], None
    if is_utf8(text):
        rows, columns = canonical_rows(text, starts, ends, schema)
    if columns is not None and len(rows) == len(ends):
        return _Converted(pa.RecordBatch.from_arrays(columns, schema=schema), len(ends), [])
    left = np.setdiff1d(np.arange(len(ends)), rows) if columns is not None else np.arange(len(ends))
    one_by_one = Rows(schema)
    view = memoryview(text)
    bounds = zip(starts[left].tolist(), ends[left].tolist(), strict=True)
    one_by_one.read(left.tolist(), (bytes(view[start:end]) for start, end in bounds))
    batch = one_by_one.batch()
    if columns is not None:
        order = pc.sort_indices(pa.concat_arrays([pa.array(rows, pa.int32()), pa.array(one_by_one.rows, pa.int32())]))
        both = (pa.concat_arrays(pair).take(order) for pair in zip(columns, batch.columns, strict=True))
        batch = pa.RecordBatch.from_arrays(list(both), schema=schema)
    return _Converted(batch, len(ends), one_by_one.rejected)
