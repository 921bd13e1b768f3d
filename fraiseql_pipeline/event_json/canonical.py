"""Event JSON read column by column: lines in the form that serde writes.

What lives here: finding such lines and cutting them up. What must not: what any other line is (``rows.py``).

How it is fast: a line in that form is cut at positions found by whole-column searches, and every piece is then checked against what may
stand there. The pieces cover the line without gap, each in the language of its place (fixed text, a UUID, a string without escapes, JSON),
so together they prove that the line is JSON and that this is its only reading; nothing is guessed from a marker that a payload may hold
too. A line that fails any of it (other key order, white space, escapes, a payload that holds ``"changes":``) is left to ``rows.py``. One
malformed payload sends its chunk there.

Of the time of an event of 560 bytes, a quarter is cutting, a sixth searching, a tenth checking payloads (profile of 64 MB). Positions are
numpy's: its calls are short, and what holds the interpreter keeps the other threads waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.event import UUID_PATTERN
from fraiseql_pipeline.event_json.kinds import KINDS, contents, timestamps

_Places: TypeAlias = npt.NDArray[np.int32]
_Mask: TypeAlias = npt.NDArray[np.bool_]

_STRING = r'"[^"\\\x00-\x1f]*"'
_OPTIONAL_STRING = rf"(?:null|{_STRING})"
_OPTIONAL_INTEGER = r"(?:null|-?(?:0|[1-9][0-9]*))"
_MIDDLE = rf'^","event_type":"(?P<kind>{"|".join(KINDS)})","entity_type":"(?P<entity_type>[^"\\\x00-\x1f]*)","entity_id":"$'
_WHO = rf'^,"user_id":(?P<user>{_OPTIONAL_STRING}),"tenant_id":(?P<tenant>{_OPTIONAL_STRING})$'
_NUMBERS = rf'^","duration_ms":{_OPTIONAL_INTEGER},"seq":{_OPTIONAL_INTEGER}$'
_REST = (
    rf'^,"actor_type":{_OPTIONAL_STRING},"acting_for":{_OPTIONAL_STRING}'
    rf'(?:,"schema_version":{_OPTIONAL_STRING}(?:,"cdc_source":{_OPTIONAL_STRING})?)?\}}\n$'
)

_BEGIN = b'{"id":"'
_BEFORE_ENTITY_ID = '","entity_id":"'
_BEFORE_DATA = b'","data":'
_BEFORE_CHANGES = ',"changes":'
_BEFORE_USER = ',"user_id":'
_BEFORE_TIME = ',"timestamp":"'
_UUID_BYTES = 36

#: From one key to the next where upstream's bridge writes what it usually does: no changes, a time with six digits.
_USUAL_CHANGES = len(',"changes":null')
_USUAL_TIME = len(',"timestamp":"2026-11-01T00:00:00.123456Z"')


def canonical_rows(text: pa.Buffer, starts: _Places, ends: _Places, schema: pa.Schema) -> tuple[_Places, list[pa.Array] | None]:
    """The numbers of the lines that are as serde writes them, and their columns; no columns if there are none, or one payload is malformed."""
    rows = np.arange(len(ends), dtype=np.int32)
    while len(rows):
        columns, fits = _canonical(text, starts[rows], ends[rows], schema)
        if columns is not None:
            return rows, columns
        rows = rows[fits]  # never all of them
    return rows, None


def after_line_feeds(text: pa.Buffer) -> _Places:
    """The position after each line feed, of which one is the last octet."""
    octets = np.frombuffer(text, np.uint8)
    # A bit per octet, looked at 64 at a time: nearly all words are zero, and of the others nearly all have one bit set.
    words = np.packbits(octets[: len(octets) // 64 * 64] == ord("\n"), bitorder="little").view("<u8")
    some = np.flatnonzero(words)
    bits = words[some]
    if (bits & (bits - np.uint64(1))).any():
        return (np.flatnonzero(octets == ord("\n")) + 1).astype(np.int32)
    last = np.flatnonzero(octets[len(words) * 64 :] == ord("\n")) + len(words) * 64
    return (np.concatenate([some * 64 + np.log2(bits.astype(np.float64)).astype(np.int64), last]) + 1).astype(np.int32)


def is_utf8(text: pa.Buffer) -> bool:
    offsets = pa.array([0, text.size], pa.int32()).buffers()[1]
    try:
        pa.Array.from_buffers(pa.binary(), 1, [None, offsets, text]).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


def _canonical(text: pa.Buffer, starts: _Places, ends: _Places, schema: pa.Schema) -> tuple[list[pa.Array] | None, _Mask]:
    """The columns of these lines if all are as serde writes them; else which of them may be, never all."""
    middle, changes = _found(text, starts, ends, _BEFORE_ENTITY_ID, _BEFORE_CHANGES)
    fits = (middle >= 0) & (changes >= 0)
    if not fits.all():
        return None, fits
    # The places below are searched after `changes` only: a payload may well have a `user_id` or a `tenant_id` of its own.
    user = _expected(text, changes, ends, _USUAL_CHANGES, _BEFORE_USER)
    time, rest = _found(text, changes, ends, _BEFORE_TIME, ',"actor_type":')
    numbers = _expected(text, np.maximum(time, changes), ends, _USUAL_TIME, ',"duration_ms":')
    event_id, entity_id = starts + np.int32(len(_BEGIN)), middle + np.int32(len(_BEFORE_ENTITY_ID))
    cuts = {
        "head": starts,
        "middle": event_id + np.int32(_UUID_BYTES),
        "entity": entity_id,
        "data": entity_id + np.int32(_UUID_BYTES + len(_BEFORE_DATA)),
        "before_changes": changes,
        "changes": changes + np.int32(len(_BEFORE_CHANGES)),
        "who": user,
        "before_time": time,
        "time": time + np.int32(len(_BEFORE_TIME)),
        "numbers": numbers - np.int32(1),
        "rest": rest,
        "end": ends,
    }
    places = np.stack(list(cuts.values()), axis=1)
    # A text that was not found is at -1, so a cut lies before the one that should come earlier.
    fits = np.asarray((places[:, 1:] >= places[:, :-1]).all(axis=1))
    if not fits.all():
        return None, fits
    pieces, rows = _pieces(text, places), len(starts)
    numbers_of = {name: number for number, name in enumerate(cuts)}

    def piece(name: str) -> pa.Array:
        """Of every row, what stands between the cut of this name and the next one."""
        first = numbers_of[name]
        return pieces.take(pa.array(np.arange(first, first + rows * len(cuts), len(cuts), dtype=np.int32)))

    head, entity = _fixed(piece("head"), len(_BEGIN) + _UUID_BYTES), _fixed(piece("entity"), _UUID_BYTES + len(_BEFORE_DATA))
    event_ids, entity_ids = _texts(head[:, len(_BEGIN) :]), _texts(entity[:, :_UUID_BYTES])
    data, changed = piece("data"), piece("changes")
    middle_fits, (kind, entity_type) = _matched(piece("middle"), _MIDDLE, _renamed, _same)
    who_fits, (user_id, tenant_id) = _matched(piece("who"), _WHO, _unquoted, _unquoted)
    rest_fits, _ = _matched(piece("rest"), _REST)
    fits = (
        (head[:, : len(_BEGIN)] == np.frombuffer(_BEGIN, np.uint8)).all(axis=1)
        & (entity[:, _UUID_BYTES:] == np.frombuffer(_BEFORE_DATA, np.uint8)).all(axis=1)
        & _are_uuids(event_ids)
        & _are_uuids(entity_ids)
        & middle_fits
        & who_fits
        & rest_fits
        & _mask(pc.match_substring_regex(piece("numbers"), _NUMBERS))
        & _objects_or_null(text, data, cuts["data"], cuts["before_changes"])
        & _objects_or_null(text, changed, cuts["changes"], cuts["who"])
    )
    if not fits.all():
        return None, fits
    timestamp = timestamps(piece("time"), schema)
    well_formed = _well_formed(text, cuts["data"], cuts["before_changes"]) and (
        _all(pc.equal(changed, "null")) or _well_formed(text, cuts["changes"], cuts["who"])
    )
    if timestamp is None or not well_formed:
        return None, ~fits
    return [event_ids, kind, entity_type, entity_ids, timestamp, data, user_id, tenant_id], fits


def _found(text: pa.Buffer, starts: _Places, ends: _Places, *wanted: str) -> list[_Places]:
    """Where each of the wanted texts is first found between a start and its end; -1 if nowhere."""
    texts = pl.Series("text", _pieces(text, np.stack([starts, ends], axis=1))).gather_every(2).to_frame()
    found = texts.select(pl.col("text").str.find(each, literal=True).cast(pl.Int32).fill_null(-1).alias(each) for each in wanted)
    return [np.where(at < 0, at, at + starts) for at in (column.to_numpy() for column in found)]


def _expected(text: pa.Buffer, starts: _Places, ends: _Places, after: int, wanted: str) -> _Places:
    """Where a text stands behind each start: a look at the usual place, a search where it is not there."""
    octets, sought = np.frombuffer(text, np.uint8), np.frombuffer(wanted.encode(), np.uint8)
    at = starts + np.int32(after)
    there = at + np.int32(len(sought)) <= ends
    for number, octet in enumerate(sought):
        there &= octets[np.minimum(at + np.int32(number), len(octets) - 1)] == octet
    if there.all():
        return at
    (found,) = _found(text, starts[~there], ends[~there], wanted)
    at[~there] = found
    return at


def _pieces(text: pa.Buffer, places: npt.NDArray[np.int32]) -> pa.Array:
    """The pieces of ``text`` between neighbouring cuts, row after row, without a copy: of a row with n cuts n - 1 pieces and the gap to
    the next row. A piece that no check accepts may end within a character.
    """
    cuts = np.ascontiguousarray(places).reshape(-1)
    return pa.Array.from_buffers(pa.string(), max(len(cuts) - 1, 0), [None, pa.py_buffer(cuts), text])


def _fixed(texts: pa.Array, size: int) -> npt.NDArray[np.uint8]:
    """Texts of one size, as a matrix of octets."""
    return np.frombuffer(texts.buffers()[2], np.uint8)[: len(texts) * size].reshape(len(texts), size)


def _texts(octets: npt.NDArray[np.uint8]) -> pa.Array:
    rows, size = octets.shape
    ends = np.arange(0, (rows + 1) * size, size, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(octets.tobytes()))


def _mask(values: pa.Array) -> _Mask:
    mask: _Mask = values.to_numpy(zero_copy_only=False)
    return mask


def _all(mask: pa.Array) -> bool:
    return bool(pc.all(mask, min_count=0).as_py())


def _matched(values: pa.Array, pattern: str, *columns: Callable[[pa.Array], pa.Array]) -> tuple[_Mask, list[pa.Array]]:
    """Which values match, and what ``columns`` make of each group of the pattern. Cheap because few values are distinct."""
    encoded = values.dictionary_encode()
    groups = pc.extract_regex(encoded.dictionary, pattern)
    made = [column(group) for column, group in zip(columns, groups.flatten(), strict=False)]
    return _mask(groups.is_valid())[encoded.indices.to_numpy()], [column.take(encoded.indices) for column in made]


def _same(texts: pa.Array) -> pa.Array:
    return texts


def _renamed(kinds: pa.Array) -> pa.Array:
    return pa.array([KINDS.get(kind) for kind in kinds.to_pylist()], pa.string())


def _unquoted(texts: pa.Array) -> pa.Array:
    """Strings without escapes, ``null`` as null."""
    return pc.if_else(pc.equal(texts, "null"), None, pc.utf8_slice_codeunits(texts, 1, -1))


def _are_uuids(values: pa.Array) -> _Mask:
    """Which values of 36 bytes are UUIDs in lower case. That all are is told from their bytes as one text, six times quicker than row by row."""
    count = len(values)
    octets = values.buffers()[2].to_pybytes()
    hyphens = b"-" * count
    if octets.translate(None, b"0123456789abcdef") == hyphens * 4 and all(octets[at::36] == hyphens for at in (8, 13, 18, 23)):
        return np.ones(count, np.bool_)
    return _mask(pc.match_substring_regex(values, UUID_PATTERN))


def _objects_or_null(text: pa.Buffer, values: pa.Array, begins: _Places, ends: _Places) -> _Mask:
    """Which values look like a JSON object, or are ``null``; another payload is rare enough for the slow way."""
    octets = np.frombuffer(text, np.uint8)
    braces = (octets[begins] == ord("{")) & (octets[ends - 1] == ord("}")) & (ends - begins > 1)
    return braces if braces.all() else braces | _mask(pc.equal(values, "null"))


class _Nothing(msgspec.Struct, gc=False):
    """Any JSON object: every value is checked and passed over."""


_objects = msgspec.json.Decoder(_Nothing | None)


def _well_formed(text: pa.Buffer, begins: _Places, ends: _Places) -> bool:
    """Whether the text from each begin to its end is JSON; each is ``null`` or begins with ``{`` and ends with ``}``.

    The octet behind each becomes a line feed. Between ``}``, a line feed and ``{`` or ``null`` a JSON text cannot go on, neither in a string
    nor outside. So if the lines decode, as many values as lines, then each line is one value.
    """
    rows = pa.array(np.arange(0, 2 * len(begins), 2, dtype=np.int32))
    lines = bytearray(contents(_pieces(text, np.stack([begins, ends + 1], axis=1)).take(rows)))
    np.frombuffer(lines, np.uint8)[np.cumsum(ends + 1 - begins) - 1] = ord("\n")
    try:
        return len(_objects.decode_lines(lines)) == len(begins)
    except (msgspec.DecodeError, RecursionError):
        return False
