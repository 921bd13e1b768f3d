"""Plan: a ticket over one version of the lake, decided once → what its stream will hold.

What lives here: which published windows and files a ticket covers, what is missing among them, how it is shared out over endpoints, and what
the client is told about it. What must not: gRPC, frames, the clock.

Invariants
 1. A plan holds one snapshot; everything its stream reads, and everything it says, is of that table version.
 2. A window that is not published although a later one is, is a hole: ``WindowMissing``, unless the ticket allows it. What lies after
    the newest published window is not a hole: the plan ends there and says so (``complete_through``).
 3. Before ``first``, the start of the first window this server is set up for, nothing is ever published, so nothing is missing there.
    Where nobody said what that is, it is the oldest published window.
 4. A plan costs the same whatever the number of windows, but for those it counts over: the view of a version is built once.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import accumulate, islice, pairwise

import pyarrow as pa

from fraiseql_pipeline.encoding import NANOSECOND_RANGE_US, Encoding, stream_schema, to_wire, wire_schema
from fraiseql_pipeline.errors import LakeDamaged, LakeEmpty, TicketError, WindowMissing
from fraiseql_pipeline.flight.segment import Filter, units
from fraiseql_pipeline.lake import Commit, File, Lake, Snapshot
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Window, WindowSize, tile

#: How many missing windows a message names.
_NAMED = 3

#: Clients open all endpoints at once, and some buffer five batches of each.
MAX_ENDPOINTS = 8
#: An endpoint with fewer events costs its reader more than it saves: a connection and a call against 30 ms of frames.
ENDPOINT_ROWS = 262_144

#: Versions whose view is kept: the newest, and those that tickets given out before are pinned to.
_KEPT_VIEWS = 8

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_FOREVER = 1 << 62


class View:
    """The published windows and the files of one version, sorted, with sums: what a plan looks things up in. Raises ``LakeEmpty``."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        windows = sorted(snapshot.published)
        if not windows:
            raise LakeEmpty("Nothing is published in the lake yet; run fraiseql-pipeline materialize first.")
        commits = [snapshot.published[window] for window in windows]
        self.windows = windows
        self.starts = [_micros(window.start) for window in windows]
        self.ends = [start + window.size.duration // _MICROSECOND for start, window in zip(self.starts, windows, strict=True)]
        self.reaches = list(accumulate(self.ends, max))
        self.settled_pks = [commit.settled_pk for commit in commits]
        self.rows = _sums(commit.accepted_rows for commit in commits)
        self.provisional = _sums(commit.state == "provisional" for commit in commits)
        # Where windows overlap, or one was published again after this version, the commits do not count its events.
        self.uncounted = _sums(
            commit.table_version > snapshot.version or (at > 0 and self.starts[at] < self.reaches[at - 1])
            for at, commit in enumerate(commits)
        )
        self.far = [
            (window, start, end)
            for window, commit, start, end in zip(windows, commits, self.starts, self.ends, strict=True)
            if commit.accepted_rows and not NANOSECOND_RANGE_US[0] <= start <= end <= NANOSECOND_RANGE_US[1]
        ]
        self.holes = [(reach, start) for reach, start in zip(self.reaches, self.starts[1:], strict=False) if reach < start]

    @cached_property
    def units(self) -> list[int]:
        """Where in the snapshot's files each unit begins; see ``segment.units``."""
        return units(self.snapshot.files)

    @cached_property
    def unit_lows(self) -> list[int]:
        files = self.snapshot.files
        return [-_FOREVER if (low := files[at].low) is None else low for at in self.units]

    @cached_property
    def unit_rows(self) -> list[int]:
        """The rows before each unit, and of all; a file whose log entry has no count is taken for empty."""
        rows = _sums(file.rows or 0 for file in self.snapshot.files)
        return [rows[at] for at in (*self.units, len(self.snapshot.files))]

    @property
    def extent(self) -> tuple[datetime, datetime]:
        """From the start of the oldest to the end of the newest published window."""
        return _EPOCH + self.starts[0] * _MICROSECOND, _EPOCH + self.reaches[-1] * _MICROSECOND

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) before the end of the newest window that no window covers."""
        end = min(end, self.reaches[-1])
        found = []
        if start < min(self.starts[0], end):
            found.append((start, min(self.starts[0], end)))
        at = max(0, bisect_right(self.holes, (start, _FOREVER)) - 1)
        while at < len(self.holes) and self.holes[at][0] < end:
            low, high = max(start, self.holes[at][0]), min(end, self.holes[at][1])
            if low < high:
                found.append((low, high))
            at += 1
        return found

    def covered(self, start: int, end: int) -> tuple[int, int]:
        """The windows that touch [start, end), as positions in ``windows``; among them may be some that do not, where sizes are mixed."""
        return bisect_right(self.reaches, start), bisect_left(self.starts, end)

    def stretches(self) -> list[tuple[datetime, datetime]]:
        """The ranges that are published without a hole, oldest first."""
        edges = [self.starts[0], *(edge for hole in self.holes for edge in hole), self.reaches[-1]]
        times = [_EPOCH + edge * _MICROSECOND for edge in edges]
        return list(zip(times[::2], times[1::2], strict=True))


class Views:
    """The views of a lake, kept for as long as somebody may come back to their version. May serve many threads."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, View] = OrderedDict()

    def newest(self) -> View:
        """Of the newest version. Raises ``LakeEmpty``."""
        return self._of(self._lake.snapshot())

    def of(self, ticket: Ticket) -> View:
        """Of the version a ticket reads. Raises ``LakeEmpty`` and ``TicketError``."""
        if ticket.table_version is not None:
            with self._lock:
                # A version that was served as the newest is kept as it was then.
                if (kept := self._kept.get(ticket.table_version)) is not None:
                    self._kept.move_to_end(ticket.table_version)
                    return kept
        return self._of(pinned(self._lake, ticket))

    def _of(self, snapshot: Snapshot) -> View:
        with self._lock:
            view = self._kept.get(snapshot.version)
            if view is None:
                view = self._kept[snapshot.version] = View(snapshot)
                while len(self._kept) > _KEPT_VIEWS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(snapshot.version)
            return view


@dataclass(frozen=True)
class Plan:
    """What the stream of a ticket holds, for the tenant ``org_id`` or for all.

    ``schema`` has the columns and the types of the profile plain, ``stream_schema`` those of the stream. ``rows`` is exact, or None where
    the range cuts a window or a filter applies. ``complete_through`` is the end of the newest published window, at most the end of the
    ticket; ``settled_pk``: every event of the range up to this key is in; ``provisional_windows`` of the windows read may still get events
    of transactions that were open; ``missing_windows`` is 0 unless the ticket allows holes.
    """

    ticket: Ticket
    view: View
    encoding: Encoding
    rows: int | None
    complete_through: datetime
    settled_pk: int | None
    provisional_windows: int
    missing_windows: int
    org_id: str | None = None

    @property
    def snapshot(self) -> Snapshot:
        return self.view.snapshot

    @cached_property
    def schema(self) -> pa.Schema:
        return wire_schema(self.ticket.columns)

    @cached_property
    def stream_schema(self) -> pa.Schema:
        return stream_schema(self.ticket.columns, self.encoding)

    @property
    def filter(self) -> Filter:
        # The order of the types does not change what they keep.
        return Filter(tuple(sorted(self.ticket.entity_types)), self.org_id)

    @cached_property
    def span(self) -> tuple[int, int]:
        """[start, end) of the ticket in microseconds since 1970."""
        return _micros(self.ticket.start), _micros(self.ticket.end)

    @property
    def limit_rows(self) -> int | None:
        return self.ticket.limit

    @cached_property
    def unit_range(self) -> range:
        """The units of the view that may hold events of the ticket."""
        lows = self.view.unit_lows
        return range(max(0, bisect_right(lows, self.span[0]) - 1), bisect_left(lows, self.span[1]))

    def units(self) -> Iterator[tuple[File, ...]]:
        """The files to read, those together whose times overlap, in order."""
        files, begins = self.snapshot.files, self.view.units
        for at in self.unit_range:
            unit = files[begins[at] : begins[at + 1] if at + 1 < len(begins) else len(files)]
            if any(file.touches(*self.span) for file in unit):
                yield unit

    def parts(self) -> list[Plan]:
        """This plan as at most ``MAX_ENDPOINTS`` plans of about as many events each, in order; their streams together are its own."""
        sums, at = self.view.unit_rows, self.unit_range
        known = sums[at.stop] - sums[at.start] if at else 0
        count = min(MAX_ENDPOINTS, known // ENDPOINT_ROWS)
        # Cuts lie at first events of files: to a tenant, their number and their times would tell of others.
        if count < 2 or self.ticket.limit is not None or self.org_id is not None:
            return [self]
        edges = [self.span[0]]
        for number in range(1, count):
            unit = bisect_left(sums, sums[at.start] + number * known // count, at.start, at.stop)
            if edges[-1] < (low := self.view.unit_lows[min(unit, at.stop - 1)]) < self.span[1]:
                edges.append(low)
        edges.append(self.span[1])
        return [self._part(low, high) for low, high in pairwise(edges)]

    def _part(self, low: int, high: int) -> Plan:
        ticket = replace(self.ticket, start=_EPOCH + low * _MICROSECOND, end=_EPOCH + high * _MICROSECOND)
        return replace(self, ticket=ticket, rows=None)

    def metadata(self, **more: object) -> bytes:
        """The JSON object that accompanies ``FlightInfo`` and, with what was sent, ends a stream."""
        facts = {
            "profile": self.encoding.profile,
            "codec": self.encoding.codec,
            "table_version": self.snapshot.version,
            "complete_through": self.complete_through.isoformat(),
            "settled_pk": self.settled_pk,
            "provisional_windows": self.provisional_windows,
            "missing_windows": self.missing_windows,
            "next_ticket": self.next_ticket(),
        }
        return json.dumps(facts | more).encode()

    def pinned_ticket(self) -> Ticket:
        """A ticket for the same events of the same table version in the same encoding, whenever it is redeemed."""
        return replace(self.ticket, table_version=self.snapshot.version, profile=self.encoding.profile, codec=self.encoding.codec)

    def next_ticket(self) -> str | None:
        """The ticket for what is published after this stream, up to then; None behind a limit, which may end anywhere."""
        if self.ticket.limit is not None:
            return None
        start = max(self.complete_through, self.ticket.start)
        after = json.loads(replace(self.ticket, table_version=None).json) | {"start": start.isoformat(), "end": "now"}
        return json.dumps(after, ensure_ascii=False, separators=(",", ":"))

    def batches(self) -> Generator[pa.RecordBatch]:
        """The events without a frame store: batches of ``schema`` of any size, in (timestamp, pk) order, in bounded memory.

        Raises ``LakeDamaged`` at the end when the lake gave other rows than the commits of the windows count.
        """
        names = list(dict.fromkeys((*self.schema.names, *self.filter.columns)))
        rows = 0
        for found in self.snapshot.read(self.ticket.start, self.ticket.end, columns=names):
            mask = self.filter.mask(found.column)
            # A filter copies what it keeps: no byte of another tenant's is left behind in a buffer.
            batch = found if mask is None else found.filter(mask)
            wanted = batch if self.ticket.limit is None else batch.slice(0, self.ticket.limit - rows)
            rows += wanted.num_rows
            if wanted.num_rows:
                yield to_wire(wanted, self.schema)
            if rows == self.ticket.limit:
                break
        if self.rows not in {None, rows}:
            raise LakeDamaged(
                f"The lake gave {rows} events where the commits of the asked windows count {self.rows}; run fraiseql-pipeline fsck."
            )


def pinned(lake: Lake, ticket: Ticket) -> Snapshot:
    """The snapshot a ticket reads: the newest, or the one it names. Raises ``LakeEmpty`` and ``TicketError``."""
    newest = lake.snapshot()
    if ticket.table_version is None or ticket.table_version == newest.version:
        return newest
    if ticket.table_version > newest.version:
        raise TicketError(f'A ticket\'s "table_version" must be at most {newest.version}, the newest, got {ticket.table_version}.')
    older = lake.snapshot(ticket.table_version)
    return replace(older, published=_published_at(older, newest.published))


def _published_at(older: Snapshot, published: Mapping[Window, Commit]) -> dict[Window, Commit]:
    """The windows published at an older version, as far as the newest commits prove it.

    A window committed again since then was there before if that version has files for it. One that has none may have been published
    without events; it is taken for missing, so that the mistake is an error and never a shorter table.
    """
    return {
        window: commit
        for window, commit in published.items()
        if commit.table_version <= older.version or (commit.outcome != "published" and older.files_in(window.start, window.end))
    }


def plan(
    ticket: Ticket,
    view: View | Snapshot,
    *,
    first: datetime | None,
    size: WindowSize,
    org_id: str | None = None,
    encoding: Encoding | None = None,
) -> Plan:
    """Decide what ``ticket`` reads of a version for the tenant ``org_id``, or for all.

    ``encoding`` is what the ticket leaves open. Raises ``WindowMissing`` for a hole, ``LakeEmpty`` when nothing is published at all.
    """
    view = View(view) if isinstance(view, Snapshot) else view
    start, end = _micros(ticket.start), _micros(ticket.end)
    gaps = view.gaps(max(start, view.starts[0] if first is None else _micros(first)), end)
    if gaps and not ticket.allow_missing:
        raise _missing(gaps, size)
    low, high = view.covered(start, end)
    if "timestamp" in (ticket.columns or ("timestamp",)):
        _check_nanoseconds(view, start, end)
    whole = (
        org_id is None
        and not ticket.entity_types
        and (high <= low or (view.starts[low] >= start and view.reaches[high - 1] <= end))
        and view.uncounted[high] == view.uncounted[low]
    )
    rows = (view.rows[high] - view.rows[low] if high > low else 0) if whole else None
    default = encoding or Encoding()
    return Plan(
        ticket=ticket,
        view=view,
        encoding=Encoding(ticket.profile or default.profile, ticket.codec or default.codec),
        rows=rows if rows is None or ticket.limit is None else min(rows, ticket.limit),
        complete_through=min(view.extent[1], ticket.end),
        settled_pk=min(view.settled_pks[low:high]) if high > low else None,
        provisional_windows=view.provisional[high] - view.provisional[low] if high > low else 0,
        missing_windows=sum(_count(gap, size) for gap in gaps),
        org_id=org_id,
    )


_Gap = tuple[int, int]


def _count(gap: _Gap, size: WindowSize) -> int:
    step = size.duration // _MICROSECOND
    return -((gap[0] // step * step - gap[1]) // step)


def _missing(gaps: list[_Gap], size: WindowSize) -> WindowMissing:
    count = sum(_count(gap, size) for gap in gaps)
    ranges = ((_EPOCH + low * _MICROSECOND, _EPOCH + high * _MICROSECOND) for low, high in gaps)
    keys = [window.key for window in islice((window for gap in ranges for window in tile(*gap, size)), 1000)]
    named = ", ".join(keys[:_NAMED])
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    return WindowMissing(
        f"The asked range has {count} window(s) that are not published although later ones are: {named}{more}; "
        "materialize them, or ask with allow_missing for what is there.",
        keys,
    )


def _check_nanoseconds(view: View, start: int, end: int) -> None:
    for window, low, high in view.far:
        if low < end and high > start:
            raise TicketError(
                f"Window {window.key} lies outside 1677-09-22 to 2262-04-11, the times that nanoseconds can hold; "
                "ask for a range inside, or for columns without timestamp."
            )


def _sums(numbers: Iterator[int]) -> list[int]:
    """Of the numbers before each position, and of all."""
    return list(accumulate(numbers, initial=0))


def _micros(at: datetime) -> int:
    return (at - _EPOCH) // _MICROSECOND
