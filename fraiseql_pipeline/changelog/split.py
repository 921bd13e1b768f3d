"""Cutting a window into parts that several connections read side by side.

What lives here: ``split``, which finds the cuts. What must not: reading events.

Invariants
 1. The parts tile the whole: every event of it lies in exactly one part, whatever was estimated. An estimate decides about speed only.
 2. All events of a part come before all events of the next in the normal order (timestamp, pk).

Parts must be small, because a part that is read ahead waits in memory until its turn, and they must be found without reading the
window. Postgres' own statistics do not know a window of fresh events, and counting along the index costs 5 to 14 % of the read. But pks
are drawn as events are inserted: between two points in time there are about as many events as pks. So the first event at or after each
of some points is looked up (15 µs each), finer where there are many. A gap in the sequence and an event with a made-up time only make
parts uneven; where pks do not rise with time at all, as after a load of old events, the events are counted. Events of one transaction
share one created_at: where a single instant holds more than a part, it is cut by pk.

Measured: a window that is not split pays 0.5 ms for its look-ups; one of 300,000 events 4 ms for 136 points (28 parts); one whose 300,000
events share an instant, 300 ms to count them, against 1.5 s to read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from fraiseql_pipeline.changelog.projection import Part, Statements
from fraiseql_pipeline.changelog.session import Session

#: Arrow bytes of a part: a part is one batch, two or three of them are in memory per connection. 300,000 events of 874 bytes over two
#: connections took 1.05 s in 12 parts, 1.06 s in 24; a part costs 0.8 ms of planning and round trips. Where batches of 6 MiB cut each part of
#: 10 in two, a materialize took 10 % more CPU.
PART_BYTES = 8 << 20
_MIN_ROWS, _MAX_ROWS = 16, 65_536
#: Arrow bytes of an event beside its JSON, and of its JSON per stored byte (large values are stored compressed).
_ENVELOPE_BYTES, _JSON_RATIO = 450, 1.2
_TOAST_BYTES, _TOAST_RATIO = 2000, 2.0
_FIRST_POINTS, _POINTS, _MAX_POINTS, _ROUNDS = 16, 512, 4096, 5


@dataclass(frozen=True, slots=True)
class _First:
    """The first event behind a point."""

    us: int
    pk: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class _Slice:
    """[start, end) of a window with about ``rows`` events; the first one at ``first_us``."""

    start_us: int
    end_us: int
    first_us: int
    rows: int

    @property
    def is_instant(self) -> bool:
        return self.end_us - self.start_us == 1


def split(session: Session, statements: Statements, whole: Part) -> list[Part]:
    """The parts of ``whole``, in order: none when it is empty, only itself when it is small."""
    found = _probed(session, statements, _between(whole.start_us, whole.end_us, _FIRST_POINTS), whole.end_us)
    first = found[whole.start_us]
    last = session.ask(statements.last(whole)) if first is not None else []
    if first is None or not last:
        return []
    part_rows = _part_rows(found)
    guess = last[0]["pk"] - first.pk + 1
    if _in_disorder(found):
        slices = _counted(session, statements, whole, part_rows)
    elif guess <= 2 * part_rows:
        return [whole]
    else:
        slices, part_rows = _guessed(session, statements, whole, found, last[0]["pk"])
    return list(_tiled(session, statements, whole, slices, part_rows))


def _guessed(
    session: Session, statements: Statements, whole: Part, found: dict[int, _First | None], last_pk: int
) -> tuple[list[_Slice], int]:
    """Slices by pks, and the rows of a part."""
    part_rows = _part_rows(found)
    slices = _slices(found, whole, last_pk)
    for _ in range(_ROUNDS):
        points = [
            point for slice_ in slices if slice_.rows > part_rows // 2 for point in _closer(slice_, part_rows) if point not in found
        ]
        if not points or len(found) + len(points) > _MAX_POINTS:
            break
        found = found | _probed(session, statements, points, whole.end_us)
        part_rows = _part_rows(found)
        slices = _slices(found, whole, last_pk)
        if _in_disorder(found):
            return _counted(session, statements, whole, part_rows), part_rows
    return slices, part_rows


def _counted(session: Session, statements: Statements, whole: Part, part_rows: int) -> list[_Slice]:
    """Slices with their events counted, each small or an instant."""
    slices = [_Slice(whole.start_us, whole.end_us, whole.start_us, 2 * part_rows + 1)]
    for _ in range(_ROUNDS):
        crowded = [slice_ for slice_ in slices if slice_.rows > 2 * part_rows and not slice_.is_instant]
        if not crowded:
            break
        finer = _POINTS // len(crowded) + 2
        ranges = [
            edges for slice_ in crowded for edges in pairwise([*_between(slice_.start_us, slice_.end_us, finer), slice_.end_us])
        ]
        counts = {row["i"] - 1: row["n"] for row in session.ask(statements.counts(ranges))}
        counted = [_Slice(start, end, start, counts[i]) for i, (start, end) in enumerate(ranges)]
        slices = sorted([*(slice_ for slice_ in slices if slice_ not in crowded), *counted], key=lambda slice_: slice_.start_us)
    return slices


def _in_disorder(found: dict[int, _First | None]) -> bool:
    """Whether pks do not rise with time, as after a load of old events: then they tell nothing about how many lie between two."""
    pks = [first.pk for _, first in sorted(found.items()) if first is not None]
    return sum(after < before for before, after in pairwise(pks)) > max(1, len(pks) // 10)


def _part_rows(found: dict[int, _First | None]) -> int:
    """How many events fill a part, by the stored bytes of some events' JSON."""
    sizes = [first.stored_bytes for first in found.values() if first is not None]
    arrow_bytes = [_ENVELOPE_BYTES + size * (_JSON_RATIO if size < _TOAST_BYTES else _TOAST_RATIO) for size in sizes]
    return min(_MAX_ROWS, max(_MIN_ROWS, int(PART_BYTES * len(sizes) / sum(arrow_bytes))))


def _between(start_us: int, end_us: int, pieces: int) -> list[int]:
    return sorted({start_us + (end_us - start_us) * piece // pieces for piece in range(pieces)})


def _closer(slice_: _Slice, part_rows: int) -> Iterable[int]:
    """Points that cut a slice finer, and its first event's instant out of it, which may be the one that holds them all."""
    if slice_.is_instant:
        return ()
    inner = set(_between(slice_.start_us, slice_.end_us, min(64, slice_.rows * 4 // part_rows + 1)))
    if slice_.rows > 2 * part_rows:
        inner |= {slice_.first_us, slice_.first_us + 1}
    return sorted(point for point in inner if slice_.start_us < point < slice_.end_us)


def _probed(session: Session, statements: Statements, points: list[int], end_us: int) -> dict[int, _First | None]:
    """Point → the first event at or after it, None where there is none."""
    rows = {
        points[row["i"] - 1]: _First(row["us"], row["pk"], row["bytes"]) for row in session.ask(statements.probe(points, end_us))
    }
    return {point: rows.get(point) for point in points}


def _slices(found: dict[int, _First | None], whole: Part, last_pk: int) -> list[_Slice]:
    """The window cut at every point; the number of events between two is taken from the pks of the first ones behind them."""
    slices = []
    for start, end in pairwise([*sorted(found), whole.end_us]):
        here, next_ = found[start], found.get(end)
        if here is None or here.us >= end:
            slices.append(_Slice(start, end, end, 0))
        else:
            next_pk = last_pk + 1 if next_ is None else next_.pk
            slices.append(_Slice(start, end, here.us, max(0, min(next_pk, whole.upto_pk + 1) - here.pk)))
    return slices


def _tiled(session: Session, statements: Statements, whole: Part, slices: list[_Slice], part_rows: int) -> Iterable[Part]:
    start_us, rows = whole.start_us, 0
    for slice_ in slices:
        crowded = slice_.is_instant and slice_.rows > 2 * part_rows
        if start_us < slice_.start_us and (crowded or (rows and rows + slice_.rows > part_rows)):
            yield replace(whole, start_us=start_us, end_us=slice_.start_us)
            start_us, rows = slice_.start_us, 0
        if crowded:
            yield from _instant(session, statements, replace(whole, start_us=start_us, end_us=slice_.end_us), part_rows)
            start_us, rows = slice_.end_us, 0
        else:
            rows += slice_.rows
    if start_us < whole.end_us:
        yield replace(whole, start_us=start_us)


def _instant(session: Session, statements: Statements, part: Part, part_rows: int) -> Iterable[Part]:
    """A crowded instant by ranges of pk; or what looked like one, because the sequence jumped there."""
    found = session.ask(statements.bounds(part))[0]
    if found["n"] <= 2 * part_rows:
        yield part
        return
    pieces = found["n"] // part_rows
    cuts = [found["least"] - 1 + (found["greatest"] - found["least"] + 1) * piece // pieces for piece in range(pieces + 1)]
    for after, upto in pairwise(cuts):
        yield replace(part, after_pk=after, upto_pk=upto, instant=True)
