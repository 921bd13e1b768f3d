"""Event JSON read column by column: lines in the form that serde writes.

What lives here: finding such lines and cutting them up. What must not: what any other line is (``rows.py``).

How it is fast: a line in that form is cut at a few places, and every piece is then checked against what may stand there. The pieces cover
the line without gap, each in the language of its place (fixed text, a UUID, a string without escapes, JSON), so together they prove that
the line is JSON and that this is its only reading. So a place may be guessed: keys stand at the distances from each other at which they
stand in other lines, and are searched only in lines where they do not. A line that fails any check (other key order, white space, escapes)
is left to ``rows.py``. One malformed payload sends its chunk there.

Positions are numpy's: its calls are short, and what holds the interpreter keeps the other threads waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.event_ids import malformed_ids
from fraiseql_pipeline.event_json.kinds import KINDS, timestamps

_Places: TypeAlias = npt.NDArray[np.int32]
_Mask: TypeAlias = npt.NDArray[np.bool_]

_STRING = r'"[^"\\\x00-\x1f]*"'
_OPTIONAL_STRING = rf"(?:null|{_STRING})"
_OPTIONAL_INTEGER = r"(?:null|-?(?:0|[1-9][0-9]*))"
_MIDDLE = rf'^","event_type":"(?P<kind>{"|".join(KINDS)})","entity_type":"(?P<entity_type>[^"\\\x00-\x1f]*)","entity_id":"$'
_USER = rf'^,"user_id":(?P<user>{_OPTIONAL_STRING})$'
_TENANT = rf'^,"tenant_id":(?P<tenant>{_OPTIONAL_STRING})$'
_NUMBERS = rf'^","duration_ms":{_OPTIONAL_INTEGER},"seq":{_OPTIONAL_INTEGER}$'
_REST = (
    rf'^,"actor_type":{_OPTIONAL_STRING},"acting_for":{_OPTIONAL_STRING}'
    rf'(?:,"schema_version":{_OPTIONAL_STRING}(?:,"cdc_source":{_OPTIONAL_STRING})?)?\}}\n$'
)

_BEGIN = b'{"id":"'
_BEFORE_ENTITY_ID = '","entity_id":"'
_BEFORE_DATA = '","data":'
_BEFORE_CHANGES = ',"changes":'
_BEFORE_USER = ',"user_id":'
_BEFORE_TENANT = ',"tenant_id":'
_BEFORE_TIME = ',"timestamp":"'
_BEFORE_NUMBERS = '","duration_ms":'
_BEFORE_ACTOR = ',"actor_type":'
_UUID_BYTES = 36

#: Keys that are pieces of their own, which nothing looks at again.
_CUT_OUT = {_BEFORE_CHANGES, _BEFORE_TIME}
#: Octets that are compared at once.
_WORD = 8

#: Lines that are looked at to learn how far apart the keys stand, and how far from each other they are looked for there.
_LOOKED_AT, _NEAR = 32, 512


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
    middle = _from_start(text, starts, ends)
    before_changes, user, tenant, time, numbers, rest = _from_end(text, starts, ends)
    event_id, entity_id = starts + np.int32(len(_BEGIN)), middle + np.int32(len(_BEFORE_ENTITY_ID))
    cuts = {
        "head": starts,
        "middle": event_id + np.int32(_UUID_BYTES),
        "entity": entity_id,
        "data": entity_id + np.int32(_UUID_BYTES + len(_BEFORE_DATA)),
        "before_changes": before_changes,
        "changes": before_changes + np.int32(len(_BEFORE_CHANGES)),
        "user": user,
        "tenant": tenant,
        "before_time": time,
        "time": time + np.int32(len(_BEFORE_TIME)),
        "numbers": numbers,
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
        sizes = places[:, first + 1] - places[:, first]
        if sizes[0] and (sizes == sizes[0]).all():
            return _same_size(text, cuts[name], int(sizes[0]))
        return pieces.take(pa.array(np.arange(first, first + rows * len(cuts), len(cuts), dtype=np.int32)))

    event_ids, entity_ids = _same_size(text, event_id, _UUID_BYTES), _same_size(text, entity_id, _UUID_BYTES)
    data = piece("data")
    middle_fits, (kind, entity_type) = _matched(piece("middle"), _MIDDLE, _renamed, _same)
    user_fits, (user_id,) = _matched(piece("user"), _USER, _unquoted)
    tenant_fits, (tenant_id,) = _matched(piece("tenant"), _TENANT, _unquoted)
    rest_fits, _ = _matched(piece("rest"), _REST)
    changed = np.flatnonzero(~_nulls(text, cuts["changes"], cuts["user"]))
    changes = cuts["changes"][changed], cuts["user"][changed]
    fits = (
        _stands(text, starts, _BEGIN)
        & _stands(text, entity_id + np.int32(_UUID_BYTES), _BEFORE_DATA.encode())
        & _are_uuids(event_ids)
        & _are_uuids(entity_ids)
        & middle_fits
        & user_fits
        & tenant_fits
        & rest_fits
        & _alike(piece("numbers"), _NUMBERS)
        & _objects_or_null(text, cuts["data"], cuts["before_changes"])
    )
    fits[changed] &= _objects_or_null(text, *changes)
    if not fits.all():
        return None, fits
    timestamp = timestamps(piece("time"), schema)
    well_formed = _well_formed(text, cuts["data"], cuts["before_changes"]) and _well_formed(text, *changes)
    if timestamp is None or not well_formed:
        return None, ~fits
    return [event_ids, kind, entity_type, entity_ids, timestamp, data, user_id, tenant_id], fits


def _from_start(text: pa.Buffer, starts: _Places, ends: _Places) -> _Places:
    """Where ``_BEFORE_ENTITY_ID`` stands in each line."""
    middle = _usual(text, starts, +1, _BEFORE_ENTITY_ID)
    lost = middle < 0
    if lost.any():
        (middle[lost],) = _searched(text, starts[lost], ends[lost], _BEFORE_ENTITY_ID)
    return middle


def _from_end(text: pa.Buffer, starts: _Places, ends: _Places) -> list[_Places]:
    """Where ``_BEFORE_CHANGES`` stands in each line, and the keys behind it that are cut at."""
    wanted = (_BEFORE_CHANGES, _BEFORE_USER, _BEFORE_TENANT, _BEFORE_TIME, _BEFORE_NUMBERS, _BEFORE_ACTOR)
    places: list[_Places] = []
    for each in reversed(wanted):
        places.insert(0, _usual(text, places[0] if places else ends, -1, each))
    lost = np.minimum.reduce(places) < 0
    if lost.any():
        starts, ends = starts[lost], ends[lost]
        (changes,) = _searched(text, starts, ends, _BEFORE_CHANGES)
        # The others behind `changes` only: a payload may well have a `user_id` or a `timestamp` of its own.
        found = [changes, *_searched(text, np.maximum(changes, starts), ends, *wanted[1:])]
        for place, there in zip(places, found, strict=True):
            place[lost] = there
    return places


def _distances(text: pa.Buffer, anchors: _Places, way: int, wanted: bytes) -> list[int]:
    """How far from some of the anchors the text stands, the most frequent distance first. ``way`` is -1 for texts that stand before them."""
    view, seen = memoryview(text), Counter[int]()
    for anchor in anchors[:: -(-len(anchors) // _LOOKED_AT)].tolist():
        near = bytes(view[max(anchor - _NEAR, 0) : anchor] if way < 0 else view[anchor : anchor + _NEAR])
        at = near.rfind(wanted) if way < 0 else near.find(wanted)
        if at >= 0:
            seen[at - len(near) if way < 0 else at] += 1
    rare = 0 if len(anchors) <= _LOOKED_AT else 1
    return [distance for distance, times in seen.most_common() if times > rare]


def _usual(text: pa.Buffer, anchors: _Places, way: int, wanted: str) -> _Places:
    """Where a text stands before (``way`` -1) or behind (+1) each anchor, if at a distance at which it stands in other lines too; else -1.

    It need not be the place that was meant, nor in the same line: what lies between the cuts is checked. So is the text itself where it
    is part of a piece, and then its end is enough for a guess.
    """
    sought, left = wanted.encode(), np.flatnonzero(anchors >= 0)
    told = sought if wanted in _CUT_OUT else sought[-_WORD:]
    ahead = np.int32(len(sought) - len(told))
    places, before = np.full(len(anchors), -1, np.int32), 2 * len(left)
    while 0 < len(left) <= before // 2:
        before = len(left)
        for distance in _distances(text, anchors[left], way, sought):
            at = anchors[left] + np.int32(distance)
            there = _stands(text, at + ahead, told)
            places[left[there]] = at[there]
            left = left[~there]
            if not len(left):
                break
    return places


def _searched(text: pa.Buffer, starts: _Places, ends: _Places, *wanted: str) -> list[_Places]:
    """Where each of the wanted texts is first found between a start and its end; -1 if nowhere."""
    texts = pl.Series("text", _pieces(text, np.stack([starts, ends], axis=1))).gather_every(2).to_frame()
    found = texts.select(pl.col("text").str.find(each, literal=True).cast(pl.Int32).fill_null(-1).alias(each) for each in wanted)
    return [np.where(at < 0, at, at + starts) for at in (column.to_numpy() for column in found)]


def _pieces(text: pa.Buffer, places: npt.NDArray[np.int32]) -> pa.Array:
    """The pieces of ``text`` between neighbouring cuts, row after row, without a copy: of a row with n cuts n - 1 pieces and the gap to
    the next row. A piece that no check accepts may end within a character.
    """
    cuts = np.ascontiguousarray(places).reshape(-1)
    return pa.Array.from_buffers(pa.string(), max(len(cuts) - 1, 0), [None, pa.py_buffer(cuts), text])


def _stands(text: pa.Buffer, at: _Places, wanted: bytes) -> _Mask:
    """Whether ``wanted`` stands at each place. It is compared in words of up to eight octets, of which the last may overlap the one before."""
    width = min(_WORD, 1 << (len(wanted).bit_length() - 1))
    there = np.asarray((at >= 0) & (at <= len(text) - len(wanted)))
    if not there.any():
        return there
    words, at = _windows(text, f"<u{width}"), np.where(there, at, 0)
    for octet in (*range(0, len(wanted) - width, width), len(wanted) - width):
        there &= words[at + np.int32(octet)] == int.from_bytes(wanted[octet : octet + width], "little")
    return there


def _same_size(text: pa.Buffer, at: _Places, size: int) -> pa.Array:
    """The texts of one size that begin at these places."""
    ends = np.arange(0, (len(at) + 1) * size, size, dtype=np.int32)
    return pa.StringArray.from_buffers(len(at), pa.py_buffer(ends), pa.py_buffer(_windows(text, f"V{size}")[at]))


def _windows(text: pa.Buffer, dtype: str) -> npt.NDArray[Any]:
    """A view of ``text`` with one element for each octet at which one of this type may begin: gathers five times quicker than kernels do."""
    size = np.dtype(dtype).itemsize
    return np.ndarray((len(text) - size + 1,), dtype, text, strides=(1,))


def _mask(values: pa.Array) -> _Mask:
    mask: _Mask = values.to_numpy(zero_copy_only=False)
    return mask


def _matched(values: pa.Array, pattern: str, *columns: Callable[[pa.Array], pa.Array]) -> tuple[_Mask, list[pa.Array]]:
    """Which values match, and what ``columns`` make of each group of the pattern. Cheap because few values are distinct."""
    encoded = values.dictionary_encode()
    groups = pc.extract_regex(encoded.dictionary, pattern)
    made = [column(group) for column, group in zip(columns, groups.flatten(), strict=False)]
    return _mask(groups.is_valid())[encoded.indices.to_numpy()], [column.take(encoded.indices) for column in made]


def _alike(values: pa.Array, pattern: str) -> _Mask:
    """Which values match. Cheap where most are the same as the first."""
    fits = _mask(pc.equal(values, values[0]))
    others = np.flatnonzero(~fits) if pc.match_substring_regex(values[:1], pattern)[0].as_py() else np.arange(len(values))
    fits[others] = _mask(pc.match_substring_regex(values.take(pa.array(others)), pattern))
    return fits


def _same(texts: pa.Array) -> pa.Array:
    return texts


def _renamed(kinds: pa.Array) -> pa.Array:
    return pa.array([KINDS.get(kind) for kind in kinds.to_pylist()], pa.string())


def _unquoted(texts: pa.Array) -> pa.Array:
    """Strings without escapes, ``null`` as null."""
    return pc.if_else(pc.equal(texts, "null"), None, pc.utf8_slice_codeunits(texts, 1, -1))


def _are_uuids(values: pa.Array) -> _Mask:
    fits = np.ones(len(values), np.bool_)
    fits[malformed_ids(values)] = False
    return fits


def _objects_or_null(text: pa.Buffer, begins: _Places, ends: _Places) -> _Mask:
    """Which values look like a JSON object, or are ``null``; another payload is rare enough for the slow way."""
    octets = np.frombuffer(text, np.uint8)
    fits: _Mask = (octets[begins] == ord("{")) & (octets[ends - 1] == ord("}")) & (ends - begins > 1)
    others = np.flatnonzero(~fits)
    fits[others] = _nulls(text, begins[others], ends[others])
    return fits


def _nulls(text: pa.Buffer, begins: _Places, ends: _Places) -> _Mask:
    return np.asarray((ends - begins == len("null")) & _stands(text, begins, b"null"))


class _Nothing(msgspec.Struct, gc=False):
    """Any JSON object: every value is checked and passed over."""


_objects = msgspec.json.Decoder(_Nothing | None)


def _well_formed(text: pa.Buffer, begins: _Places, ends: _Places) -> bool:
    """Whether the text from each begin to its end is JSON; each is ``null`` or begins with ``{`` and ends with ``}``.

    The octet behind each becomes a line feed. Between ``}``, a line feed and ``{`` or ``null`` a JSON text cannot go on, neither in a string
    nor outside. So if the lines decode, as many values as lines, then each line is one value.
    """
    if not len(begins):
        return True
    rows = pa.array(np.arange(0, 2 * len(begins), 2, dtype=np.int32))
    last = np.cumsum(ends + 1 - begins) - 1
    # What was taken is a copy, so it may be written to.
    lines = np.frombuffer(_pieces(text, np.stack([begins, ends + 1], axis=1)).take(rows).buffers()[2], np.uint8)[: last[-1] + 1]
    lines[last] = ord("\n")
    try:
        return len(_objects.decode_lines(lines.data)) == len(begins)
    except (msgspec.DecodeError, RecursionError):
        return False
