"""Upstream's event JSON ⇄ Arrow columns: ``events_from_json`` and ``events_to_json``.

What lives here: the JSON form of FraiseQL's ``EntityEvent`` (what it puts on NATS), both ways, over bytes and Arrow data. What must
not: I/O, the change log's own columns (``changelog/``), validation rules of the pipeline (``validate.py``).

Source of the format: ``crates/fraiseql-observers/src/event.rs`` upstream. serde writes every field, in this order, without white
space, absent values as ``null``::

    {"id":…,"event_type":"INSERT","entity_type":…,"entity_id":…,"data":…,"changes":…,"user_id":…,"tenant_id":…,"timestamp":"…Z",
     "duration_ms":…,"seq":…,"actor_type":…,"acting_for":…,"schema_version":…,"cdc_source":…}

How the reader is fast: a line in that form is cut at positions found by whole-column searches, and every piece is then checked
against what may stand there. The pieces cover the line without gap, each in the language of its place (fixed text, a UUID, a string
without escapes, JSON), so together they prove that the line is JSON and that this is its only reading; nothing is guessed from a
marker that a payload may hold too. A line that fails any of it (other key order, white space, escapes, a payload that holds
``"changes":``) is decoded one by one by msgspec, which decides alone what an event is. One malformed payload sends its chunk there.

Invariants
 1. Both ways of reading give the same columns for every line, and accept the same lines.
 2. ``data`` keeps the bytes of the input: digits, key order, duplicate keys, white space. It is checked to be well-formed JSON
    (nested at most as deep as the interpreter's recursion limit allows, about 900), never parsed and printed again.
 3. A line is an event or the call fails; no line is skipped but a blank one.
 4. ``events_from_json(events_to_json(batch))`` gives the eight columns back, but for line feeds between the tokens of ``data``,
    which become spaces because events are one per line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import compress, pairwise
from typing import Any, Literal, TypeAlias

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import EVENT_SCHEMA, UUID_PATTERN, WIRE_SCHEMA

#: Upstream's ``event_type`` → ours. The change log knows more verbs; an ``EntityEvent`` has these four.
KINDS = {"INSERT": "Created", "UPDATE": "Updated", "DELETE": "Deleted", "CUSTOM": "Custom"}

#: Of the input, per task of the thread pool: small enough to stay in the caches, large enough to make a kernel's fixed cost small.
_CHUNK_BYTES = 8 << 20
_LARGEST_CHUNK_BYTES = 2**31 - 1
_SHOWN_LINES = 10

_STRING = r'"[^"\\\x00-\x1f]*"'
_OPTIONAL_STRING = rf"(?:null|{_STRING})"
_OPTIONAL_INTEGER = r"(?:null|-?(?:0|[1-9][0-9]*))"
_MIDDLE = rf'^","event_type":"(?P<kind>{"|".join(KINDS)})","entity_type":"(?P<entity_type>[^"\\\x00-\x1f]*)","entity_id":"$'
_NUMBERS = rf'^","duration_ms":{_OPTIONAL_INTEGER},"seq":{_OPTIONAL_INTEGER}$'
_REST = (
    rf'^,"actor_type":{_OPTIONAL_STRING},"acting_for":{_OPTIONAL_STRING}'
    rf'(?:,"schema_version":{_OPTIONAL_STRING}(?:,"cdc_source":{_OPTIONAL_STRING})?)?\}}\n$'
)

_USER_OR_TENANT = r'^(?:null|"(?P<text>[^"\\\x00-\x1f]*)")$'

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

_ANY_UUID = "00000000-0000-0000-0000-000000000000"
_BEFORE_ENTITY_ID = '","entity_id":"'

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


def events_to_json(events: pa.Table | pa.RecordBatch, *, compact: bool = False) -> bytes:
    """Events as upstream writes them, one per line, each line ended: all fields present, no white space around them.

    Needs the eight columns of an event; the fields that are columns of the lake are taken from there if ``events`` has them, else they
    are ``null``, as ``changes`` always is (upstream's bridge to NATS writes the same). ``data`` is written as it stands, or without
    white space if ``compact`` (then it costs Python about a microsecond per event). Rows with ``data`` that is not JSON must not be
    passed: they are quarantined long before.

    Raises ``InputError`` if a column is missing, or null where an event may not be.
    """
    missing = [name for name in EVENT_SCHEMA.names if name not in events.schema.names]
    if missing:
        raise InputError(f"Event JSON needs the columns {', '.join(EVENT_SCHEMA.names)}; {', '.join(missing)} is missing.")
    known = [name for name in _WRITTEN.values() if name in events.schema.names]
    table = pa.Table.from_batches([events]) if isinstance(events, pa.RecordBatch) else events
    frame = pl.DataFrame(pl.from_arrow(table.select(known)))
    for field in EVENT_SCHEMA:
        if not field.nullable and frame[field.name].null_count():
            raise InputError(f"Event JSON cannot be written: {field.name} is null in {frame[field.name].null_count():,} rows.")
    pieces: list[pl.Expr] = []
    for key, name in _WRITTEN.items():
        pieces.append(pl.lit(f'{"," if pieces else "{"}"{key}":'))
        pieces.append(_value(frame, key, name, compact=compact) if name in known else pl.lit("null"))
    texts = frame.select(text=pl.concat_str([*pieces, pl.lit("}\n")]))["text"].rechunk()
    return _contents(texts.to_arrow(compat_level=pl.CompatLevel.oldest())).to_pybytes()


# ------------------------------------------------------------------------------------------------------------- reading


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
    rows = _Rows(schema)
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
    ends = _after_line_feeds(text)
    starts = pa.concat_arrays([pa.array([0], pa.int32()), ends[:-1]])
    everything = _range(len(ends))
    rows, columns = everything[:0], None
    if _is_utf8(text):
        rows, columns = _canonical_rows(text, starts, ends, everything, schema)
    if len(rows) == len(ends) and columns is not None:
        return _Converted(pa.RecordBatch.from_arrays(columns, schema=schema), len(ends), [])
    left = everything.filter(pc.invert(pc.is_in(everything, rows)))
    one_by_one = _Rows(schema)
    view = memoryview(text)
    bounds = zip(starts.take(left).to_pylist(), ends.take(left).to_pylist(), strict=True)
    one_by_one.read(left.to_pylist(), (bytes(view[start:end]) for start, end in bounds))
    batch = one_by_one.batch()
    if columns is not None:
        order = pc.sort_indices(pa.concat_arrays([rows, pa.array(one_by_one.rows, pa.int32())]))
        both = (pa.concat_arrays(pair).take(order) for pair in zip(columns, batch.columns, strict=True))
        batch = pa.RecordBatch.from_arrays(list(both), schema=schema)
    return _Converted(batch, len(ends), one_by_one.rejected)


def _after_line_feeds(text: pa.Buffer) -> pa.Array:
    """The position after each line feed, of which one is the last octet."""
    is_feed = pl.Series(pa.Array.from_buffers(pa.uint8(), text.size, [None, text])) == ord("\n")
    # Nearly every octet of the bitmap is zero and the others have one bit set, so looking for octets first is quicker than looking for
    # bits. The last bits are looked for in the text: the bitmap's last octet may be filled up with anything.
    bitmap, whole = is_feed.rechunk().to_arrow(), text.size // 8
    octets = pl.Series(pa.Array.from_buffers(pa.uint8(), whole, [None, bitmap.buffers()[1]]))
    some = (octets != 0).arg_true().to_arrow()
    places = _PLACE_OF_BIT.take(octets.to_arrow().take(some))
    if places.null_count or bitmap.offset:
        return pc.add(is_feed.arg_true().to_arrow().cast(pa.int32()), pa.scalar(1, pa.int32()))
    last = [whole * 8 + at + 1 for at, octet in enumerate(text.slice(whole * 8).to_pybytes()) if octet == ord("\n")]
    return pa.concat_arrays(
        [pc.add(pc.multiply(some.cast(pa.int32()), pa.scalar(8, pa.int32())), places), pa.array(last, pa.int32())]
    )


#: Of an octet with one bit set: which one, counted from 1.
_PLACE_OF_BIT = pa.array([{1 << bit: bit + 1 for bit in range(8)}.get(octet) for octet in range(256)], pa.int32())


def _is_utf8(text: pa.Buffer) -> bool:
    offsets = pa.array([0, text.size], pa.int32()).buffers()[1]
    try:
        pa.Array.from_buffers(pa.binary(), 1, [None, offsets, text]).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


def _canonical_rows(
    text: pa.Buffer, starts: pa.Array, ends: pa.Array, rows: pa.Array, schema: pa.Schema
) -> tuple[pa.Array, list[pa.Array] | None]:
    """Which of ``rows`` are lines as serde writes them, and their columns; no columns if there are none, or one payload is malformed."""
    while len(rows):
        columns, fits = _canonical(text, starts.take(rows), ends.take(rows), schema)
        if columns is not None:
            return rows, columns
        rows = rows.filter(fits)  # never all of them
    return rows, None


def _canonical(text: pa.Buffer, starts: pa.Array, ends: pa.Array, schema: pa.Schema) -> tuple[list[pa.Array] | None, pa.Array]:
    """The columns of these lines if all are as serde writes them; else which of them may be, never all."""
    middle, changes = _places(_cut_out(text, starts, ends), starts, _BEFORE_ENTITY_ID, ',"changes":')
    found = pc.and_(middle.is_valid(), changes.is_valid())
    if not _all(found):
        return None, found
    # The places below are searched after `changes` only: a payload may well have a `user_id` or a `tenant_id` of its own.
    keys = ("user_id", "tenant_id", "timestamp", "duration_ms", "actor_type")
    user, tenant, time, numbers, rest = _places(_cut_out(text, changes, ends), changes, *(f',"{key}":' for key in keys))
    event_id, entity_id = _after(starts, '{"id":"'), _after(middle, _BEFORE_ENTITY_ID)
    cuts = {
        "begin": starts,
        "event_id": event_id,
        "middle": _after(event_id, _ANY_UUID),
        "entity_id": entity_id,
        "before_data": _after(entity_id, _ANY_UUID),
        "data": _after(entity_id, _ANY_UUID + '","data":'),
        "before_changes": changes,
        "changes": _after(changes, ',"changes":'),
        "before_user": user,
        "user": _after(user, ',"user_id":'),
        "before_tenant": tenant,
        "tenant": _after(tenant, ',"tenant_id":'),
        "before_time": time,
        "time": _after(time, ',"timestamp":"'),
        "numbers": pc.subtract(numbers, pa.scalar(1, pa.int32())),
        "rest": rest,
        "end": ends,
    }
    rising = reduce(pc.and_, (pc.fill_null(pc.less_equal(a, b), fill_value=False) for a, b in pairwise(cuts.values())))
    if not _all(rising):
        return None, rising
    pieces = _between(text, cuts.values())
    one_per_row = _range(len(starts) * len(cuts), len(cuts))
    number_of = {name: number for number, name in enumerate(cuts)}

    def piece(name: str) -> pa.Array:
        """Of every row, what stands between the cut of this name and the next one."""
        return pieces.slice(number_of[name]).take(one_per_row)

    event_ids, entity_ids = piece("event_id"), piece("entity_id")
    data, changed = piece("data"), piece("changes")
    middle_fits, (kind, entity_type) = _matched(piece("middle"), _MIDDLE)
    rest_fits, _ = _matched(piece("rest"), _REST)
    user_fits, (user_id,) = _matched(piece("user"), _USER_OR_TENANT)
    tenant_fits, (tenant_id,) = _matched(piece("tenant"), _USER_OR_TENANT)
    checks = (
        pc.equal(piece("begin"), '{"id":"'),
        _are_uuids(event_ids),
        middle_fits,
        _are_uuids(entity_ids),
        pc.equal(piece("before_data"), '","data":'),
        _object_or_null(data),
        _object_or_null(changed),
        user_fits,
        tenant_fits,
        pc.equal(piece("before_time"), ',"timestamp":"'),
        pc.match_substring_regex(piece("numbers"), _NUMBERS),
        rest_fits,
    )
    fits = reduce(pc.and_, checks)
    if not _all(fits):
        return None, fits
    timestamp = _timestamps(piece("time"), schema)
    if timestamp is None or not _well_formed(data) or not _well_formed(changed):
        return None, pc.invert(fits)
    columns = (event_ids, _renamed(kind), entity_type, entity_ids, timestamp, data, user_id, tenant_id)
    return list(columns), fits


def _range(end: int, step: int = 1) -> pa.Array:
    return pl.int_range(0, end, step, dtype=pl.Int32, eager=True).to_arrow()


def _all(mask: pa.Array) -> bool:
    return bool(pc.all(mask, min_count=0).as_py())


def _after(positions: pa.Array, text: str) -> pa.Array:
    return pc.add(positions, pa.scalar(len(text), pa.int32()))


def _places(texts: pl.Series, starts: pa.Array, *wanted: str) -> list[pa.Array]:
    """Where each of the wanted texts is first found, null if nowhere; ``starts`` says where each text itself begins."""
    found = texts.to_frame("text").select(pl.col("text").str.find(text, literal=True).alias(text) for text in wanted)
    return [pc.add(starts, column.to_arrow().cast(pa.int32())) for column in found]


def _between(text: pa.Buffer, columns: Iterable[pa.Array]) -> pa.Array:
    """The pieces of ``text`` between neighbouring cuts, row after row, without a copy: of a row with n cuts n - 1 pieces and the gap to
    the next row. A piece that no check accepts may end within a character.
    """
    frame = pl.DataFrame({str(number): pl.Series(column) for number, column in enumerate(columns)})
    cuts = frame.select(pl.concat_arr(pl.all())).to_series().arr.explode().rechunk().to_arrow()
    return pa.Array.from_buffers(pa.string(), max(len(cuts) - 1, 0), [None, cuts.buffers()[1], text], offset=cuts.offset)


def _cut_out(text: pa.Buffer, starts: pa.Array, ends: pa.Array) -> pl.Series:
    """The text from each start to its end."""
    return pl.Series(_between(text, (starts, ends))).gather_every(2)


def _renamed(kinds: pa.Array) -> pa.Array:
    encoded = kinds.dictionary_encode()
    return pa.array([KINDS[kind] for kind in encoded.dictionary.to_pylist()], pa.string()).take(encoded.indices)


def _matched(values: pa.Array, pattern: str) -> tuple[pa.Array, tuple[pa.Array, ...]]:
    """Which values match, and what each group of the pattern holds; null for ``null``. Cheap because few values are distinct."""
    encoded = values.dictionary_encode()
    groups = pc.extract_regex(encoded.dictionary, pattern)
    is_null = pc.equal(encoded.dictionary, "null")
    texts = (pc.if_else(is_null, None, group) for group in groups.flatten())
    return pc.is_valid(groups).take(encoded.indices), tuple(text.take(encoded.indices) for text in texts)


def _are_uuids(values: pa.Array) -> pa.Array:
    """Which values of 36 bytes are UUIDs in lower case. That all are is told from their bytes as one text, six times quicker than row by row."""
    count = len(values)
    octets = values.buffers()[2][: 36 * count].to_pybytes()
    hyphens = b"-" * count
    if octets.translate(None, b"0123456789abcdef") == hyphens * 4 and all(octets[at::36] == hyphens for at in (8, 13, 18, 23)):
        return pa.repeat(pa.scalar(value=True), count)
    return pc.match_substring_regex(values, UUID_PATTERN)


def _object_or_null(values: pa.Array) -> pa.Array:
    """Which values look like a JSON object, or are ``null``; another payload is rare enough for the slow way."""
    return pc.or_(pc.and_(pc.starts_with(values, "{"), pc.ends_with(values, "}")), pc.equal(values, "null"))


class _Nothing(msgspec.Struct, gc=False):
    """Any JSON object: every value is checked and passed over."""


_objects = msgspec.json.Decoder(_Nothing)


def _well_formed(values: pa.Array) -> bool:
    """Whether all values are JSON; each is ``null`` or begins with ``{`` and ends with ``}``.

    Between ``}``, a line feed and ``{`` a JSON text cannot go on, neither in a string nor outside. So if the lines decode, as many
    values as lines, then each line is one value.
    """
    objects = values.filter(pc.not_equal(values, "null"))
    lines = pc.binary_join_element_wise(objects, "", "\n")
    try:
        return len(_objects.decode_lines(_contents(lines))) == len(objects)
    except (msgspec.DecodeError, RecursionError):
        return False


def _contents(texts: pa.Array) -> pa.Buffer:
    """All values, one after the other."""
    _, offsets, contents = texts.buffers()
    integer = pa.int64() if pa.types.is_large_string(texts.type) else pa.int32()
    ends = pa.Array.from_buffers(integer, len(texts) + 1, [None, offsets], offset=texts.offset)
    begin, end = ends[0].as_py(), ends[-1].as_py()
    return contents.slice(begin, end - begin) if end > begin else pa.py_buffer(b"")


def _timestamps(texts: pa.Array, schema: pa.Schema) -> pa.Array | None:
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


# ---------------------------------------------------------------------------------------------------- reading, line by line


class _Event(msgspec.Struct, gc=False):
    id: str
    event_type: Literal["INSERT", "UPDATE", "DELETE", "CUSTOM"]
    entity_type: str
    entity_id: str
    data: msgspec.Raw
    timestamp: str
    user_id: str | None = None
    tenant_id: str | None = None


_events = msgspec.json.Decoder(_Event)
_uuid = re.compile(UUID_PATTERN.replace("a-f", "a-fA-F"))
#: The keys that are read, as they stand in the text.
_KEYS = {name: f'"{name}"'.encode() for name in _Event.__struct_fields__}
#: A key may be spelt with escapes, so a line with an escaped ASCII character is looked at too.
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


class _Rows:
    """Events read one by one: ``rows`` are the numbers of the lines that are events, ``rejected`` those of lines that are not, and why."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows: list[int] = []
        self.events: list[tuple[Any, ...]] = []
        self.rejected: list[tuple[int, str]] = []

    def read(self, numbers: Iterable[int], lines: Iterable[bytes]) -> None:
        for number, line in zip(numbers, lines, strict=True):
            if not line.strip(b" \t\r\n"):
                continue
            try:
                self.events.append(_values(line))
                self.rows.append(number)
            except InputError as error:
                self.rejected.append((number, str(error)))

    def batch(self) -> pa.RecordBatch:
        timestamps = self._timestamps()
        at = self.schema.get_field_index("timestamp")
        columns: list[Iterable[Any]] = list(zip(*self.events, strict=True)) if self.events else [()] * len(self.schema)
        arrays = [timestamps if n == at else pa.array(values, self.schema.field(n).type) for n, values in enumerate(columns)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _timestamps(self) -> pa.Array:
        """Of all events; those without a sound one are rejected first."""
        at = self.schema.get_field_index("timestamp")
        texts = pa.array([event[at] for event in self.events], pa.string())
        timestamps = _timestamps(texts, self.schema)
        if timestamps is not None:
            return timestamps
        sound = [_timestamps(texts[n : n + 1], self.schema) is not None for n in range(len(texts))]
        why = "timestamp must be an ISO 8601 time with an offset, in the range of the column"
        self.rejected = sorted([*self.rejected, *((row, why) for row, fine in zip(self.rows, sound, strict=True) if not fine)])
        self.rows = list(compress(self.rows, sound))
        self.events = list(compress(self.events, sound))
        return _timestamps(texts.filter(pa.array(sound, pa.bool_())), self.schema)


def _values(line: bytes) -> tuple[Any, ...]:
    """The values of one event in the order of the schema, ``timestamp`` as text."""
    try:
        line.decode()  # msgspec passes over what it does not keep without a look at its encoding
        event = _events.decode(line)
        data = bytes(event.data)
        # Cheap and never too mild: a key counts as given twice if its text stands twice outside the payload.
        twice = any(line.count(key) > 1 and line.count(key) - data.count(key) > 1 for key in _KEYS.values())
        if twice or _ESCAPED_ASCII.search(line):
            _refuse_a_key_given_twice(line)
    except msgspec.ValidationError as error:
        raise InputError(_reason(error)) from None
    except RecursionError:
        raise InputError("nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InputError("not well-formed JSON") from None
    if not _uuid.fullmatch(event.id):
        raise InputError("id must be a UUID")
    if not _uuid.fullmatch(event.entity_id):
        raise InputError("entity_id must be a UUID")
    kind = KINDS[event.event_type]
    return (
        event.id.lower(),
        kind,
        event.entity_type,
        event.entity_id.lower(),
        event.timestamp,
        data.decode(),
        event.user_id,
        event.tenant_id,
    )


def _reason(error: msgspec.ValidationError) -> str:
    """The field a message of msgspec is about; the message itself may quote the value."""
    if missing := re.search(r"missing required field `(\w+)`", str(error)):
        return f"{missing[1]} is missing"
    if wrong := re.search(r"at `\$\.(\w+)`$", str(error)):
        return f"{wrong[1]} is not what an event holds there"
    return "not an object"


def _refuse_a_key_given_twice(line: bytes) -> None:
    """Readers disagree on which of two values counts, and one of the keys names the tenant; upstream refuses such an event too."""
    keys: list[str] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the last object to end is the event itself

    json.loads(line, object_pairs_hook=remember, parse_int=str, parse_float=str)
    for name in _KEYS:
        if keys.count(name) > 1:
            raise InputError(f"{name} is given twice")


# ------------------------------------------------------------------------------------------------------------- writing


def _value(frame: pl.DataFrame, key: str, name: str, *, compact: bool) -> pl.Expr:
    """The JSON text of a column, null as ``null``."""
    column = pl.col(name)
    if key == "data":
        if compact:
            return pl.lit(pl.Series([msgspec.json.format(text, indent=-1) for text in frame[name]], dtype=pl.String))
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
