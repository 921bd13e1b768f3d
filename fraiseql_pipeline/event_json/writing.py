"""Events as upstream's event JSON.

What lives here: ``events_to_json``. What must not: reading (``reading.py``).
"""

from __future__ import annotations

import msgspec
import polars as pl
import pyarrow as pa

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import EVENT_SCHEMA, LAKE_SCHEMA
from fraiseql_pipeline.event_json.kinds import KINDS

#: Upstream's fields in serde's order, and the column each is written from.
_WRITTEN = {
    "id": "event_id",
    "event_type": "event_type",
    "entity_type": "entity_type",
    "entity_id": "entity_id",
    "data": "data",
    "changes": "",
    "user_id": "user_id",
    "tenant_id": "org_id",
    "timestamp": "timestamp",
    "duration_ms": "duration_ms",
    "seq": "seq",
    "actor_type": "actor_type",
    "acting_for": "acting_for",
    "schema_version": "schema_version",
    "cdc_source": "cdc_source",
}
#: What must be escaped in a JSON string, as serde does it.
_ESCAPES = {
    **{chr(code): f"\\u{code:04x}" for code in range(32)},
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\f": "\\f",
    "\r": "\\r",
}


def events_to_json(events: pa.Table | pa.RecordBatch, *, compact: bool = False) -> bytes:
    """Events as upstream writes them, one per line, each line ended: all fields present, no white space around them.

    Needs the eight columns of an event; the fields that are columns of the lake are taken from there if ``events`` has them, else they
    are ``null``, as ``changes`` always is (upstream's bridge to NATS writes the same). ``data`` is written as it stands, or without
    white space if ``compact`` (then it costs Python about a microsecond per event). Rows with ``data`` that is not JSON must not be
    passed: they are quarantined long before. Dictionaries and times of any zone are written as the values they stand for.

    Raises ``InputError`` if a column is missing, of a type that its values cannot be had from, or null where an event may not be.
    """
    missing = [name for name in EVENT_SCHEMA.names if name not in events.schema.names]
    if missing:
        raise InputError(f"Event JSON needs the columns {', '.join(EVENT_SCHEMA.names)}; {', '.join(missing)} is missing.")
    known = [name for name in _WRITTEN.values() if name in events.schema.names]
    table = pa.Table.from_batches([events]) if isinstance(events, pa.RecordBatch) else events
    frame = pl.DataFrame(pl.from_arrow(pa.table({name: _plain(table[name], name) for name in dict.fromkeys(known)})))
    for field in EVENT_SCHEMA:
        if not field.nullable and frame[field.name].null_count():
            raise InputError(f"Event JSON cannot be written: {field.name} is null in {frame[field.name].null_count():,} rows.")
    pieces: list[pl.Expr] = []
    for key, name in _WRITTEN.items():
        pieces.append(pl.lit(f'{"," if pieces else "{"}"{key}":'))
        pieces.append(_value(frame, key, name, compact=compact) if name in known else pl.lit("null"))
    texts = frame.select(text=pl.concat_str([*pieces, pl.lit("}\n")]))["text"].rechunk()
    return _contents(texts.to_arrow(compat_level=pl.CompatLevel.oldest())).to_pybytes()


def _plain(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column in the type of the column table; a time keeps its unit, a text the width of its offsets."""
    wanted = LAKE_SCHEMA.field(name).type
    if pa.types.is_timestamp(wanted) and pa.types.is_timestamp(column.type):
        wanted = pa.timestamp(column.type.unit, wanted.tz)
    if column.type == wanted or (pa.types.is_string(wanted) and column.type in {pa.large_string(), pa.string_view()}):
        return column
    try:
        return column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"Event JSON needs {name} as {wanted}, got {column.type}.") from None


def _value(frame: pl.DataFrame, key: str, name: str, *, compact: bool) -> pl.Expr:
    """The JSON text of a column, null as ``null``."""
    column = pl.col(name)
    if key == "data":
        if compact:
            return pl.lit(pl.Series([_compact(text) for text in frame[name]], dtype=pl.String))
        return column.str.replace_all("\n", " ", literal=True)
    if key == "timestamp":
        # chrono's `%.f`, as serde's: no fraction, or 3, 6 or 9 digits.
        return '"' + column.dt.to_string("%Y-%m-%dT%H:%M:%S%.fZ") + '"'
    if frame.schema[name] != pl.String:
        return column.cast(pl.String).fill_null("null")
    if key == "event_type":
        column = column.replace_strict({ours: theirs for theirs, ours in KINDS.items()})
    elif frame[name].str.contains(r'["\\\x00-\x1f]').any():
        column = column.str.replace_many(_ESCAPES)
    return ('"' + column + '"').fill_null("null")


def _compact(text: str) -> str:
    """JSON without white space; as it stands where it holds half a surrogate pair, which a column of type json may and msgspec refuses."""
    try:
        return msgspec.json.format(text, indent=-1)
    except msgspec.DecodeError:
        return text.replace("\n", " ")


def _contents(texts: pa.Array) -> pa.Buffer:
    """All values, one after the other."""
    _, offsets, contents = texts.buffers()
    integer = pa.int64() if pa.types.is_large_string(texts.type) else pa.int32()
    ends = pa.Array.from_buffers(integer, len(texts) + 1, [None, offsets], offset=texts.offset)
    begin, end = ends[0].as_py(), ends[-1].as_py()
    return contents.slice(begin, end - begin) if end > begin else pa.py_buffer(b"")
