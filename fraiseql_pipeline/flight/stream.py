"""Streams: a plan → the messages its client gets.

What lives here: which kept frames fit a plan as they are, and what is made anew where they do not. What must not: which windows a ticket
covers (``plan.py``), how frames are kept (``frames.py``), gRPC.

Invariants
 1. A stream is: the schema; of each group of events its dictionaries and frames, in order; the receipt. A dictionary is sent before
    the first frame that needs it, and only if it differs from the one sent before.
 2. A frame is sent as it is kept unless the ticket's times, limit or rows per batch cut through it. Then its rows are cut, never more of them
    encoded than are sent.
 3. What is kept under a key was filtered before it was encoded: tenants and types share no frame and no dictionary.
 4. At any time a stream has two groups open: the one that is sent and the next one, which is being made meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fraiseql_pipeline.encoding import (
    checksum,
    decoded,
    dictionary_frames,
    frames,
    schema_frame,
    to_wire,
    without_dictionaries,
)
from fraiseql_pipeline.flight.frames import Entry, FrameStore, Item, Message
from fraiseql_pipeline.flight.plan import Plan
from fraiseql_pipeline.flight.presence import Presence
from fraiseql_pipeline.flight.segment import Filter, Group, Groups, Segment, segments

#: Rows per kept frame; a ticket gets the largest that its rows per batch allow, and smaller batches are cut out of the last. Larger
#: ones than the first are hardly smaller (50.7 bytes per typical sample event at 50,000 rows, 52.8 at 10,000, 54.2 at 5,000; wide
#: 109 and 117), and the plan's tickets ask for 10,000 and 5,000.
FRAME_ROWS = (10_000, 5_000, 1_000)

#: Rows of the first frame of each group: what a client waits for.
FIRST_ROWS = 1_000

#: Above, a plan does not look up the bytes of its frames: planning stays quick.
_SIZED_UNITS = 256


@dataclass(slots=True)
class Sent:
    """What a stream has sent so far. ``checksum`` is that of ``encoding.checksum``, summed; meaningless without ``event_id``.

    ``count`` is told of rows before they are sent, and may raise. ``presence``: of the client.
    """

    count: Callable[[int], None]
    presence: Presence = field(default_factory=Presence)
    rows: int = 0
    checksum: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """One group as a plan needs it."""

    group: Group
    filter: Filter
    key: tuple[object, ...]
    whole: bool


class FrameStreams:
    """Sends plans out of a frame store."""

    def __init__(self, store: FrameStore) -> None:
        self.store = store
        self._groups = Groups()

    def messages(self, plan: Plan, max_rows: int, sent: Sent) -> Generator[bytes]:
        """The schema and the frames of a plan, each of at most ``max_rows``; ``sent`` is kept up to date. The receipt is the caller's.

        Raises ``LakeDamaged`` at the end if the lake gave other rows than the commits of the windows count.
        """
        yield schema_frame(plan.stream_schema)
        yield from self.frames(plan, Sender(plan, max_rows, sent))
        plan.check_rows(sent.rows)

    def totals_of(self, plan: Plan, max_rows: int) -> tuple[int, int] | None:
        """The rows and the bytes of the frames of a plan; None unless all of them are kept, fit as they are, and none is left out as a
        dictionary may.
        """
        rows = size = 0
        if without_dictionaries(plan.stream_schema) != plan.stream_schema:
            return None
        if plan.ticket.limit is not None or max_rows < FRAME_ROWS[-1] or len(plan.unit_range) > _SIZED_UNITS:
            return None
        for unit in plan.units():
            groups = self._groups.known(unit)
            if groups is None:
                return None
            for part in self._parts_of(plan, groups, max_rows):
                totals = self.store.totals_of(part.key) if part.whole else None
                if totals is None:
                    return None
                rows, size = rows + totals[0], size + totals[1]
        return rows, size

    def frames(self, plan: Plan, sender: Sender) -> Iterator[bytes]:
        """The frames of a plan, behind what ``sender`` has sent before."""
        max_rows = sender.max_rows
        parts = self._parts(plan, max_rows)
        opened: deque[tuple[_Part, Entry]] = deque()

        def open_next() -> None:
            for part in islice(parts, 1):
                opened.append((part, self._open(plan, part, max_rows)))

        open_next()
        try:
            while opened:
                part, entry = opened[0]
                for item in entry.items(sender.presence):
                    yield from sender.send(entry, item, part.whole)
                    if sender.full:
                        break
                    # Not before the client has something: on a small machine the two would share a processor.
                    if item.rows and len(opened) == 1 and plan.ticket.limit is None:
                        open_next()
                if sender.full:
                    return
                if len(opened) == 1:
                    open_next()
                self.store.release(opened.popleft()[1])
        finally:
            for _, entry in opened:
                self.store.release(entry)

    def _parts(self, plan: Plan, max_rows: int) -> Iterator[_Part]:
        for unit in plan.units():
            yield from self._parts_of(plan, self._groups.of(plan.snapshot, unit), max_rows)

    def _parts_of(self, plan: Plan, groups: tuple[Group, ...], max_rows: int) -> Iterator[_Part]:
        start, end = plan.span
        wanted = plan.filter
        for group in groups:
            if group.low >= end or group.high < start or group.lacks(wanted):
                continue
            whole = start <= group.low and group.high < end
            # Frames without times cannot be cut at one, so what is cut is a group of its own.
            span = None if whole or "timestamp" in plan.schema.names else plan.span
            kept = group.simplified(wanted)
            key = (group.identity, str(plan.encoding), tuple(plan.schema.names), kept.key, frame_rows(max_rows), span)
            yield _Part(group, kept, key, whole or span is not None)

    def _open(self, plan: Plan, part: _Part, max_rows: int) -> Entry:
        span: Any = part.key[-1]

        def make() -> Iterator[Message]:
            schema = plan.stream_schema
            found = segments(plan.snapshot, part.group, schema.names, part.filter, span)
            return encoded(found, schema, plan.encoding.codec, frame_rows(max_rows))

        # A row group is soon done; files that overlap may be of any size.
        return self.store.open(part.key, make, keep_going=part.group.index is not None)


def encoded(found: Iterable[Segment], schema: pa.Schema, codec: str, frame_rows: int) -> Iterator[Message]:
    """The messages of segments: of each the dictionaries, then the frames."""
    dictionary_columns = [i for i, field in enumerate(schema) if pa.types.is_dictionary(field.type)]
    first = True
    for segment in found:
        for column, data in zip(dictionary_columns, dictionary_frames(schema, segment.dictionaries, codec), strict=True):
            yield Message(data, 0, checksum=xxhash.xxh3_64_intdigest(data), column=column)
        for batch, at, pk in _gathered(segment.batches, frame_rows):
            wire = to_wire(batch, schema)
            start = 0
            while start < batch.num_rows:
                # The first frame is small: the client has something while the next one is made.
                rows = min(FIRST_ROWS if first else frame_rows, batch.num_rows - start)
                first = False
                for data, count in frames(wire.slice(start, rows), frame_rows, codec):
                    keys = pc.min_max(pk.slice(start, count))
                    yield Message(
                        data,
                        count,
                        at[start].as_py(),
                        at[start + count - 1].as_py(),
                        keys["min"].as_py(),
                        keys["max"].as_py(),
                        checksum(wire.slice(start, count)) or 0,
                    )
                    start += count


_Read = tuple[pa.RecordBatch, pa.Array, pa.Array]


def _gathered(batches: Iterator[_Read], frame_rows: int) -> Iterator[_Read]:
    """Batches that a filter left small, put together to about a frame. The first is handed on as it is: somebody waits for it."""
    held: list[_Read] = []
    rows, least = 0, 1
    for read in batches:
        held.append(read)
        rows += read[0].num_rows
        if rows >= least:
            yield _joined(held)
            held, rows, least = [], 0, frame_rows * 3 // 4
    if held:
        yield _joined(held)


def _joined(held: list[_Read]) -> _Read:
    if len(held) == 1:
        return held[0]
    batch = pa.concat_batches([read[0] for read in held])
    return batch, pa.concat_arrays([read[1] for read in held]), pa.concat_arrays([read[2] for read in held])


class Readable(Protocol):
    """Kept messages: of a group in the store, or of a round in memory."""

    def read(self, item: Item) -> bytes: ...


class Sender:
    """Turns kept messages into what one plan's client gets."""

    def __init__(self, plan: Plan, max_rows: int, sent: Sent) -> None:
        self._plan = plan
        self.max_rows = max_rows
        self._sent = sent
        self._left = plan.ticket.limit
        self._start, self._end = plan.span
        self._schema = without_dictionaries(plan.stream_schema)
        self._dictionaries: dict[int, int] = {}  # column → checksum of what the client has
        self._pending: dict[int, tuple[Readable, Item]] = {}

    @property
    def presence(self) -> Presence:
        """Of its client."""
        return self._sent.presence

    @property
    def rows(self) -> int:
        """Sent so far."""
        return self._sent.rows

    @property
    def left(self) -> int | None:
        """Of the limit of the ticket; None: it has none."""
        return self._left

    @property
    def full(self) -> bool:
        """Whether the limit of the ticket is reached."""
        return self._left == 0

    @property
    def has_dictionaries(self) -> bool:
        """Whether the client was sent dictionaries, which stay in force until they are sent again."""
        return bool(self._dictionaries)

    def send(self, entry: Readable, item: Item, whole: bool) -> Iterator[bytes]:
        """What the client gets of one kept message."""
        if not item.rows:
            self._pending[item.column] = entry, item
            return
        if not whole and (item.high < self._start or item.low >= self._end):
            return
        inside = whole or (self._start <= item.low and item.high < self._end)
        fits = inside and item.rows <= self.max_rows and (self._left is None or item.rows <= self._left)
        if self._pending:
            yield from self._dictionary_messages()
        if fits:
            self._note(item.rows, item.checksum)
            yield entry.read(item)
            return
        yield from self._cut(decoded(entry.read(item), self._schema), inside)

    def _dictionary_messages(self) -> Iterator[bytes]:
        for column, (entry, item) in self._pending.items():
            if self._dictionaries.get(column) != item.checksum:
                self._dictionaries[column] = item.checksum
                yield entry.read(item)
        self._pending.clear()

    def _cut(self, batch: pa.RecordBatch, inside: bool) -> Iterator[bytes]:
        if not inside:
            at = pc.cast(batch.column("timestamp"), pa.int64())
            first, last = (bisect_left(at, edge * 1000, key=pa.Int64Scalar.as_py) for edge in (self._start, self._end))
            batch = batch.slice(first, last - first)
        if self._left is not None:
            batch = batch.slice(0, self._left)
        codec = self._plan.encoding.codec
        start = 0
        for data, rows in frames(batch, self.max_rows, codec):
            self._note(rows, checksum(batch.slice(start, rows)) or 0)
            start += rows
            yield data

    def _note(self, rows: int, part: int) -> None:
        self._sent.count(rows)
        self._sent.rows += rows
        self._sent.checksum = (self._sent.checksum + part) % 2**64
        if self._left is not None:
            self._left -= rows


def frame_rows(max_rows: int) -> int:
    """Rows per kept frame for a reader who wants so many at most."""
    return next((rows for rows in FRAME_ROWS if rows <= max_rows), FRAME_ROWS[-1])
