"""Plan: a ticket over one view, decided once → what its stream will hold.

What lives here: which windows and files a ticket covers, what is missing among them, how it is shared out over endpoints, what
the client is told about it, and its rows for who wants no frames. What must not: gRPC, frames, the clock, how a view comes about (``view.py``).

Invariants
 1. A plan holds one view; everything its stream reads, and everything it says, is of that table version and, where the view has a live
    part, of its one settled pk.
 2. A window that is not published although a later one is, is a hole: ``WindowMissing``, unless the ticket allows it. What lies after
    the newest window is not a hole: the plan ends there and says so (``complete_through``).
 3. Before ``first``, the start of the first window this server is set up for, nothing is ever published, so nothing is missing there.
    Where nobody said what that is, it is the oldest published window.
 4. A plan costs the same whatever the number of windows, but for those it counts over: the view of a version is built once.
 5. Where a log is followed, the streams of a ticket and of the next tickets of their receipts hold every event of its range that settles,
    once: each begins at the key where the one before ended, and that key never falls. So such a range is bounded by that key and, where its
    ticket names an end, by that end; never by the time at which somebody asked. What the lake alone answers there has no next ticket.
 6. What a tenant is told of a plan, its endpoints included, does not depend on when others' events settled.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice, pairwise

import pyarrow as pa

from fraiseql_pipeline.encoding import Encoding, beyond_nanoseconds, stream_schema, to_wire, wire_schema
from fraiseql_pipeline.errors import LakeDamaged, WindowMissing
from fraiseql_pipeline.flight.segment import Filter, Types
from fraiseql_pipeline.flight.view import View
from fraiseql_pipeline.lake import File, Snapshot
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Gap, WindowSize, count_missing, from_micros, tile_gaps, to_micros

#: How many missing windows a message names.
_NAMED = 3

#: Clients open all endpoints at once, and some buffer five batches of each.
MAX_ENDPOINTS = 8
#: An endpoint with fewer events costs its reader more than it saves: a connection and a call against 30 ms of frames.
ENDPOINT_ROWS = 262_144

#: The last day of which nanoseconds can hold every time: what is endless ends here in a stream that has times.
_LAST_NANOSECONDS = datetime(2262, 4, 11, tzinfo=UTC)


@dataclass(frozen=True)
class Plan:
    """What the stream of a ticket holds, for the tenant ``org_id`` or for all.

    ``schema`` has the columns and the types of the profile plain, ``stream_schema`` those of the stream. ``rows`` is exact, or None where
    the range cuts a window or a filter applies. ``complete_through`` is the end of the newest published window, or when the live part was
    all that had settled, at most the end of the ticket; ``settled_pk``: every event of the range up to this key is in, at least the ticket's
    ``after_pk``, None where nothing is read or the key is not known; ``provisional_windows`` of the windows read may still get events of
    transactions that were open; ``missing_windows`` is 0 unless the ticket allows holes. ``followed``: the server follows a log, which may
    be away for the moment.
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
    followed: bool = False

    @property
    def snapshot(self) -> Snapshot:
        return self.view.snapshot

    @cached_property
    def schema(self) -> pa.Schema:
        return wire_schema(self.ticket.columns)

    @cached_property
    def stream_schema(self) -> pa.Schema:
        return stream_schema(self.ticket.columns, self.encoding)

    @cached_property
    def filter(self) -> Filter:
        # The order of the types does not change what they keep.
        return Filter(Types(sorted(self.ticket.entity_types)), self.org_id, self.ticket.after_pk)

    @cached_property
    def span(self) -> tuple[int, int]:
        """[start, end) of the ticket in microseconds since 1970."""
        return _span(self.ticket)

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
        """This plan as at most ``MAX_ENDPOINTS`` plans of about as many events each, in order; their streams together are its own.

        What is not all in the lake is one of them, the last. One that ends at a count of events, or goes on, is not cut; nor is a tenant's:
        cuts lie at first events of files and of hours, which would tell of others.
        """
        if self.ticket.limit is not None or self.ticket.follow or self.org_id is not None:
            return [self]
        live = self.view.live
        cut = self.span[1] if live is None else max(live.since, self.span[0])
        if cut >= self.span[1]:
            return self._pieces(MAX_ENDPOINTS)
        low, high = self.view.covered(self.span[0], cut)
        if cut == self.span[0] or low >= high:
            return [self]
        before = self._part(self.span[0], cut)
        return [*before._pieces(MAX_ENDPOINTS - 1), self._part(cut, self.span[1])]

    def _pieces(self, most: int) -> list[Plan]:
        sums, at = self.view.unit_rows, self.unit_range
        known = sums[at.stop] - sums[at.start] if at else 0
        count = min(most, known // ENDPOINT_ROWS)
        if count < 2:
            return [self]
        edges = [self.span[0]]
        for number in range(1, count):
            unit = bisect_left(sums, sums[at.start] + number * known // count, at.start, at.stop)
            if edges[-1] < (low := self.view.unit_lows[min(unit, at.stop - 1)]) < self.span[1]:
                edges.append(low)
        edges.append(self.span[1])
        return [self._part(low, high) for low, high in pairwise(edges)]

    def _part(self, low: int, high: int) -> Plan:
        last = high == self.span[1]
        end = self.ticket.end if last else from_micros(high)
        ticket = replace(self.ticket, start=from_micros(low), end=end, endless=self.ticket.endless and last)
        return replace(self, ticket=ticket, rows=None)

    def metadata(self, **more: object) -> bytes:
        """The JSON object that accompanies ``FlightInfo`` and, with what was sent, ends a stream."""
        facts = {
            "profile": self.encoding.profile,
            "codec": self.encoding.codec,
            "table_version": self.snapshot.version if self.snapshot.version >= 0 else None,
            "complete_through": self.complete_through.isoformat(),
            "settled_pk": self._settled_pk(more.get("rows", self.rows)),
            "provisional_windows": self.provisional_windows,
            "missing_windows": self.missing_windows,
            "next_ticket": self.next_ticket(),
        }
        return json.dumps(facts | more).encode()

    def _settled_pk(self, rows: object) -> int | None:
        """What is told of it with so many events: those that a limit cuts off may have any key above the ticket's."""
        whole = self.ticket.limit is None or (isinstance(rows, int) and rows < self.ticket.limit)
        return self.settled_pk if whole else self.ticket.after_pk

    def pinned_ticket(self) -> Ticket:
        """A ticket for the same events of the same table version in the same encoding, whenever it is redeemed.

        One that reaches into what is not in the lake yet names no version: its events may be in a later one when it is redeemed.
        Nor does one over hours that only the log proves to be empty; nor one that follows; nor a tenant's where a log is followed:
        it would tell whether others' events are late. Its end is a time, even of what is endless: it may start ahead of the clock,
        and then "now" would end before.
        """
        live = self.view.live
        moves = live is not None and (
            self.ticket.follow or self.org_id is not None or self.span[1] > live.since or bool(self.view.uncovered(*self.span))
        )
        version = None if moves else self.snapshot.version
        end = from_micros(self.span[1])
        profile, codec = self.encoding.profile, self.encoding.codec
        return replace(self.ticket, end=end, endless=False, table_version=version, profile=profile, codec=codec)

    def next_ticket(self) -> str | None:
        """The ticket for what comes after this stream, up to then; None behind a limit, which may end anywhere.

        Where a log is followed: for the events of the same range that settle later, whatever their time; None from the lake alone, which
        does not tell which of its events will have been late. Else: for what is published later, behind the range too.
        """
        if self.ticket.limit is not None or (self.followed and self.view.live is None):
            return None
        if self.view.live is not None:
            return replace(self.ticket, after_pk=self.settled_pk).json
        start = max(self.complete_through, self.ticket.start)
        # A key is one of the range: what lies behind the range was never read.
        after_pk = self.ticket.after_pk if start < self.ticket.end else None
        after = json.loads(replace(self.ticket, table_version=None, after_pk=after_pk).json)
        after |= {"start": start.isoformat(), "end": "now"}
        return json.dumps(after, ensure_ascii=False, separators=(",", ":"))

    def batches(self) -> Generator[pa.RecordBatch]:
        """The events without a frame store: batches of ``schema`` of any size, in (timestamp, pk) order, in bounded memory.

        Raises ``LakeDamaged`` at the end when the lake gave other rows than the commits of the windows count.
        """
        names = list(dict.fromkeys((*self.schema.names, *self.filter.columns)))
        rows = 0
        for found in self.snapshot.read(*map(from_micros, self.span), columns=names):
            mask = self.filter.mask(found.column)
            # A filter copies what it keeps: no byte of another tenant's is left behind in a buffer.
            batch = found if mask is None else found.filter(mask)
            wanted = batch if self.ticket.limit is None else batch.slice(0, self.ticket.limit - rows)
            rows += wanted.num_rows
            if wanted.num_rows:
                yield to_wire(wanted, self.schema)
            if rows == self.ticket.limit:
                break
        self.check_rows(rows)

    def check_rows(self, rows: int) -> None:
        """Raises ``LakeDamaged`` when the lake gave other rows than the commits of the windows count."""
        if self.rows not in {None, rows}:
            raise LakeDamaged(
                f"The lake gave {rows} events where the commits of the asked windows count {self.rows}; run fraiseql-pipeline fsck."
            )


def plan(
    ticket: Ticket,
    view: View | Snapshot,
    *,
    first: datetime | None,
    size: WindowSize,
    org_id: str | None = None,
    encoding: Encoding | None = None,
    followed: bool = False,
) -> Plan:
    """Decide what ``ticket`` reads of a version for the tenant ``org_id``, or for all.

    ``encoding`` is what the ticket leaves open; ``followed``: see ``Plan``. Raises ``WindowMissing`` for a hole, ``LakeEmpty`` when nothing
    is published at all.
    """
    view = View(view) if isinstance(view, Snapshot) else view
    start, end = _span(ticket)
    begin = view.starts[0]
    if first is not None:
        # What a live view has begins where there is an event.
        begin = to_micros(first) if view.live is None else max(begin, to_micros(first))
    gaps = [(from_micros(low), from_micros(high)) for low, high in view.gaps(max(start, begin), end)]
    if gaps and not ticket.allow_missing:
        raise _missing(gaps, size)
    low, high = view.covered(start, end)
    if _has_times(ticket) and org_id is None:  # a tenant is told of its own events alone, when they are encoded
        _check_nanoseconds(view, start, end)
    whole = (
        org_id is None
        and not ticket.entity_types
        and ticket.after_pk is None
        and not ticket.follow
        and (high <= low or (view.starts[low] >= start and view.reaches[high - 1] <= end))
        and view.uncounted[high] == view.uncounted[low]
    )
    rows = (view.rows[high] - view.rows[low] if high > low else 0) if whole else None
    default = encoding or Encoding()
    # The log has events outside the published windows, with smaller keys too.
    partial = followed and view.live is None and bool(view.uncovered(max(start, begin), end))
    return Plan(
        ticket=ticket,
        view=view,
        encoding=Encoding(ticket.profile or default.profile, ticket.codec or default.codec),
        rows=rows if rows is None or ticket.limit is None else min(rows, ticket.limit),
        complete_through=min(view.extent[1], ticket.end),
        settled_pk=None if partial else _settled(view, low, high, ticket.after_pk or 0),
        provisional_windows=view.provisional[high] - view.provisional[low] if high > low else 0,
        missing_windows=count_missing(gaps, size),
        org_id=org_id,
        followed=followed,
    )


def _settled(view: View, low: int, high: int, after_pk: int) -> int | None:
    """The ticket has the events up to ``after_pk`` already, even where another server has settled further than this one."""
    if view.live is not None:
        return max(view.live.settled_pk, after_pk)
    return max(min(view.settled_pks[low:high]), after_pk) if high > low else None


def _span(ticket: Ticket) -> tuple[int, int]:
    clamped = ticket.endless and _has_times(ticket)
    return to_micros(ticket.start), to_micros(max(_LAST_NANOSECONDS, ticket.start) if clamped else ticket.end)


def _has_times(ticket: Ticket) -> bool:
    return "timestamp" in (ticket.columns or ("timestamp",))


def _missing(gaps: Sequence[Gap], size: WindowSize) -> WindowMissing:
    count = count_missing(gaps, size)
    keys = [window.key for window in islice(tile_gaps(gaps, size), 1000)]
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
            raise beyond_nanoseconds(f"Window {window.key}")
