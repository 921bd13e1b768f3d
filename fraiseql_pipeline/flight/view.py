"""Views: the published windows and files of one version, in a form that a plan looks things up in.

What lives here: ``View`` of a version of the lake, ``joined`` with settled events that are not in it yet, and ``Views``, which keeps those
that somebody may come back to. What must not: tickets' options (``plan.py``), where live events come from (``live.py``).

Invariants
 1. A view never changes. Everything it lists can be read as long as somebody holds it.
 2. A window of a view holds every event up to its ``settled_pk``; a view with a live part every event up to the one
    settled pk of that part, whatever its time.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from fraiseql_pipeline.encoding import NANOSECOND_RANGE_US
from fraiseql_pipeline.errors import LakeEmpty, TicketError
from fraiseql_pipeline.flight.segment import units
from fraiseql_pipeline.lake import File, Lake, Snapshot, by_time
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import FOREVER, Window, WindowSize, from_micros, to_micros

#: Versions whose view is kept: the newest, and those that tickets given out before are pinned to.
_KEPT_VIEWS = 8


class Span(NamedTuple):
    """One window as a view has it: [start, end) in µs. ``rows`` is exact where ``counted``."""

    window: Window
    start: int
    end: int
    settled_pk: int
    rows: int
    provisional: bool
    counted: bool


@dataclass(frozen=True, slots=True)
class LiveEvents:
    """What a view has beside the lake: every settled event up to ``settled_pk``; those from ``since`` (µs) on are not all in the lake.

    ``through`` (µs): when these were all that had settled. ``files`` hold what is not in the lake; ``kept`` keeps them on the disk.
    """

    settled_pk: int
    since: int
    through: int
    files: tuple[File, ...]
    kept: tuple[object, ...]


class View:
    """The windows and the files of one version, sorted, with sums. Raises ``LakeEmpty`` when there is no window."""

    def __init__(self, snapshot: Snapshot, spans: Iterable[Span] | None = None, live: LiveEvents | None = None) -> None:
        self.snapshot = snapshot
        self.live = live
        # By time, a day before its first hour; comparing numbers is 10 times as fast as comparing windows.
        found = sorted(_published(snapshot) if spans is None else spans, key=lambda span: (span.start, -span.end))
        if not found:
            raise LakeEmpty("Nothing is published in the lake yet; run fraiseql-pipeline materialize first.")
        self.spans = found
        columns = (list(column) for column in zip(*found, strict=True))
        _, self.starts, self.ends, self.settled_pks, rows, provisional, counted = columns
        self.reaches = list(accumulate(self.ends, max))
        self.rows = _sums(rows)
        self.provisional = _sums(provisional)
        # Where windows overlap, the commits do not count their events.
        before = (-FOREVER, *self.reaches)
        self.uncounted = _sums(not c or start < reach for c, start, reach in zip(counted, self.starts, before, strict=False))
        first, last = NANOSECOND_RANGE_US
        self.far = [
            (span.window, span.start, span.end)
            for span in (() if first <= self.starts[0] <= self.reaches[-1] <= last else found)
            if span.rows and not first <= span.start <= span.end <= last
        ]
        # What is not in the lake is not counted by windows: its files tell.
        self.far += [
            (Window.holding(from_micros(file.low), WindowSize.HOUR), file.low, file.high + 1)
            for file in (live.files if live is not None else ())
            if file.low is not None and file.high is not None
            if not first <= file.low <= file.high <= last
        ]
        self.holes = [(reach, start) for reach, start in zip(self.reaches, self.starts[1:], strict=False) if reach < start]

    @classmethod
    def after(cls, before: View | None, snapshot: Snapshot) -> View:
        """Of a version most of whose windows are those of the view ``before``: of 10,000 windows in 10 ms instead of 16, and somebody waits."""
        return cls(snapshot, _published(snapshot, before))

    @cached_property
    def units(self) -> list[int]:
        """Where in the snapshot's files each unit begins; see ``segment.units``."""
        return units(self.snapshot.files)

    @cached_property
    def unit_lows(self) -> list[int]:
        files = self.snapshot.files
        return [-FOREVER if (low := files[at].low) is None else low for at in self.units]

    @cached_property
    def unit_rows(self) -> list[int]:
        """The rows before each unit, and of all; a file whose log entry has no count is taken for empty."""
        rows = _sums(file.rows or 0 for file in self.snapshot.files)
        return [rows[at] for at in (*self.units, len(self.snapshot.files))]

    @property
    def extent(self) -> tuple[datetime, datetime]:
        """From the start of the oldest to the end of the newest window, or to when what it has was all that had settled."""
        return from_micros(self.starts[0]), from_micros(self._end)

    @property
    def _end(self) -> int:
        return self.reaches[-1] if self.live is None else self.live.through

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) before the end of the newest window that no window covers."""
        end = min(end, self.reaches[-1], self._end)
        found = []
        if start < min(self.starts[0], end):
            found.append((start, min(self.starts[0], end)))
        at = max(0, bisect_right(self.holes, (start, FOREVER)) - 1)
        while at < len(self.holes) and self.holes[at][0] < end:
            low, high = max(start, self.holes[at][0]), min(end, self.holes[at][1])
            if low < high:
                found.append((low, high))
            at += 1
        return found

    def covered(self, start: int, end: int) -> tuple[int, int]:
        """The windows that touch [start, end), as positions in ``spans``; among them may be some that do not, where sizes are mixed."""
        return bisect_right(self.reaches, start), bisect_left(self.starts, end)

    def uncovered(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that no window covers, those behind the newest one too."""
        behind = (max(start, self.reaches[-1]), end)
        return [*self.gaps(start, end), *([behind] if behind[0] < end else [])]

    def settled_pk_at(self, at: int) -> int | None:
        """Up to which pk the events of an instant (µs) are in; None: no window holds it."""
        low, high = self.covered(at, at + 1)
        return max((span.settled_pk for span in self.spans[low:high] if span.start <= at < span.end), default=None)

    def settled_pk_within(self, start: int, end: int) -> int:
        """The highest key up to which a window that touches [start, end) has its events; 0 where there is none."""
        return max(self.settled_pks[slice(*self.covered(start, end))], default=0)

    def covered_above(self, pk: int, start: int, end: int) -> int:
        """How many µs of [start, end) lie in windows that may have events above a key."""
        above = (span for span in self.spans[slice(*self.covered(start, end))] if span.settled_pk > pk)
        return sum(max(0, min(span.end, end) - max(span.start, start)) for span in above)

    def has_all_below(self, file: File, pk: int) -> bool:
        """Whether a file certainly holds no event above a pk: it lies in one window, which was settled before."""
        if file.low is None:
            return False
        low, high = self.covered(file.low, file.low + 1)
        if high != low + 1 or not file.within(self.starts[low], self.ends[low]):
            return False
        return bool(self.settled_pks[low] <= pk)

    def with_live(self, live: LiveEvents) -> View:
        """The same, as all there is up to the settled pk of ``live``, which has no files."""
        # Looked up here, so that it is done once for all who read this version.
        _ = self.unit_lows, self.unit_rows
        made = copy(self)
        made.live = live
        return made

    def stretches(self) -> list[tuple[datetime, datetime]]:
        """The ranges that are published without a hole, oldest first."""
        edges = [self.starts[0], *(edge for hole in self.holes for edge in hole), self.reaches[-1]]
        times = [from_micros(edge) for edge in edges]
        return list(zip(times[::2], times[1::2], strict=True))


def joined(
    base: View | None, nothing: Snapshot, start: int, end: int, spans: Sequence[Span], live: LiveEvents, after_pk: int
) -> View:
    """The windows of ``base`` that touch [start, end), those of ``spans``, and the files of both; ``spans`` count for the windows they name.

    ``nothing`` is a snapshot without files that can open the live ones. Files of windows without an event above ``after_pk`` are left out.
    """
    if base is None:
        return View(replace(nothing, files=by_time(live.files)), spans, live)
    low, high = base.covered(start, end)
    mine = {span.window for span in spans}
    kept = [span for span in base.spans[low:high] if span.window not in mine]
    files = [file for file in base.snapshot.files if file.touches(start, end)]
    if after_pk:
        files = [file for file in files if not base.has_all_below(file, after_pk)]
    snapshot = replace(base.snapshot, files=by_time([*files, *live.files]), storage=nothing.storage)
    return View(snapshot, [*kept, *spans], live)


class Views:
    """The views of a lake, kept for as long as somebody may come back to their version. May serve many threads."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, View] = OrderedDict()
        self._generation = 0

    def newest(self) -> View:
        """Of the newest version. Raises ``LakeEmpty``."""
        return self._of(self._lake.snapshot())

    def of(self, ticket: Ticket) -> View:
        """Of the version a ticket reads. Raises ``LakeEmpty`` and ``TicketError``."""
        if ticket.table_version is not None:
            generation = self._lake.snapshot().generation
            with self._lock:
                self._drop_others(generation)
                if (kept := self._kept.get(ticket.table_version)) is not None:
                    self._kept.move_to_end(ticket.table_version)
                    return kept
        return self._of(pinned(self._lake, ticket))

    def _drop_others(self, generation: int) -> None:
        if generation != self._generation:  # the lake was replaced: its versions are others
            self._generation = generation
            self._kept.clear()

    def _of(self, snapshot: Snapshot) -> View:
        with self._lock:
            self._drop_others(snapshot.generation)
            view = self._kept.get(snapshot.version)
            if view is None:
                before = next(reversed(self._kept.values()), None)
                view = self._kept[snapshot.version] = View.after(before, snapshot)
                while len(self._kept) > _KEPT_VIEWS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(snapshot.version)
            return view


def pinned(lake: Lake, ticket: Ticket) -> Snapshot:
    """The snapshot a ticket reads: the newest, or the one it names. Raises ``LakeEmpty`` and ``TicketError``."""
    newest = lake.snapshot()
    if ticket.table_version is None or ticket.table_version == newest.version:
        return newest
    if ticket.table_version > newest.version:
        raise TicketError(f'A ticket\'s "table_version" must be at most {newest.version}, the newest, got {ticket.table_version}.')
    return lake.snapshot(ticket.table_version)


def _published(snapshot: Snapshot, before: View | None = None) -> Iterator[Span]:
    """A span per window, that of ``before`` where the commit is the same."""
    # Compared by identity, so no commit of the one may go while this runs. Both are sorted alike; what is not has its window against it.
    same = {} if before is None else dict(zip(map(id, before.snapshot.published.values()), before.spans, strict=False))
    hour, day, hourly = WindowSize.HOUR.micros, WindowSize.DAY.micros, WindowSize.HOUR
    for window, commit in snapshot.published.items():
        known = same.get(id(commit))
        if known is not None and known.window is window:
            yield known
            continue
        start = to_micros(window.start)
        end = start + (hour if window.size is hourly else day)
        yield Span(window, start, end, commit.settled_pk, commit.accepted_rows, commit.state == "provisional", True)


def _sums(numbers: Iterable[int]) -> list[int]:
    """Of the numbers before each position, and of all."""
    return list(accumulate(numbers, initial=0))
