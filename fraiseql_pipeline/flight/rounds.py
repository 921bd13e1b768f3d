"""Rounds: the newest events as they settled, encoded once for all who follow.

What lives here: ``Round`` and ``Rounds``, the last of them. What must not: Postgres, files (``buffer.py``), the stream of one follower
(``follow.py``).

Invariants
 1. Rounds follow each other without a gap: each begins at the key where the one before ended.
 2. An event that nanoseconds cannot hold is in no stream that has times; it ends nobody's stream.
 3. They take at most ``ROUNDS_BYTES``; whoever is further behind reads what is gone from the buffer's files, so a slow follower holds no
    memory.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.encoding import NANOSECOND_RANGE_US, Encoding
from fraiseql_pipeline.flight.frames import Item, Message
from fraiseql_pipeline.flight.segment import Filter, Segment, held
from fraiseql_pipeline.flight.stream import encoded

_log = logging.getLogger(__name__)

#: Bytes of the rounds that are kept, the last one aside: their events, and the messages that were made of them.
ROUNDS_BYTES = 8 << 20

#: What a batch takes at least, however few its events: 27 KiB were measured for one, of two dozen columns with buffers of their own.
_LEAST_BATCH_BYTES = 32 << 10

#: Ways of asking whose messages a round keeps; followers who ask in yet another way have theirs made for each of them.
_KEPT_WAYS = 8

#: [start, end) in µs that a follower asks for.
Times = tuple[int, int]


class Kept:
    """The messages of a round for followers who ask for the same; what ``frames.Entry`` is for a group."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._data = [message.data for message in messages]
        self._items = [Item(at, len(message.data), *message[1:]) for at, message in enumerate(messages)]

    @property
    def size(self) -> int:
        return sum(map(len, self._data))

    def items(self) -> Iterator[Item]:
        return iter(self._items)

    def read(self, item: Item) -> bytes:
        return self._data[item.offset]


@dataclass(eq=False)
class Round:
    """Events that settled together, up to a key: batches of ``LAKE_SCHEMA``, (timestamp, pk) rising over all."""

    upto_pk: int
    batches: tuple[pa.RecordBatch, ...]
    _kept: dict[object, Kept] = field(default_factory=dict)
    _kept_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _told: bool = False

    @property
    def bytes(self) -> int:
        return self._arrow_bytes + self._kept_bytes

    @cached_property
    def _arrow_bytes(self) -> int:
        return sum(max(batch.nbytes, _LEAST_BATCH_BYTES) for batch in self.batches)

    @cached_property
    def _low_pk(self) -> int:
        return min((pc.min(batch["pk"]).as_py() for batch in self.batches), default=self.upto_pk)

    def entry(self, schema: pa.Schema, encoding: Encoding, wanted: Filter, times: Times, frame_rows: int) -> Kept:
        """The messages of the events that are wanted; made by the first who asks, as long as there are few ways of asking."""
        if wanted.after_pk is not None and wanted.after_pk < self._low_pk:
            wanted = replace(wanted, after_pk=None)  # so that all who ask for the rest share it
        if "timestamp" in schema.names:
            times = max(times[0], NANOSECOND_RANGE_US[0]), min(times[1], NANOSECOND_RANGE_US[1] + 1)
            self._tell_of_far()
        span = None if self._within(times) else times
        key = (tuple(schema.names), str(encoding), wanted.key, span, frame_rows)
        with self._lock:
            if (kept := self._kept.get(key)) is None:
                messages = encoded(self._segments(schema.names, wanted, span), schema, encoding.codec, frame_rows)
                kept = Kept(list(messages))
                if len(self._kept) < _KEPT_WAYS:
                    self._kept[key] = kept
                    self._kept_bytes += kept.size
            return kept

    def _tell_of_far(self) -> None:
        with self._lock:
            told, self._told = self._told, True
        if told or self._within((NANOSECOND_RANGE_US[0], NANOSECOND_RANGE_US[1] + 1)):
            return
        at = [batch["timestamp"].cast(pa.int64()) for batch in self.batches]
        outside = (pc.or_(pc.less(some, NANOSECOND_RANGE_US[0]), pc.greater(some, NANOSECOND_RANGE_US[1])) for some in at)
        _log.warning(
            "%d event(s) lie outside 1677-09-22 to 2262-04-11, the times that nanoseconds can hold, and are left out of what followers get "
            "with timestamp; correct them where they are written",
            sum(pc.sum(some).as_py() for some in outside),
        )

    def _within(self, times: Times) -> bool:
        if not self.batches:
            return True
        return times[0] <= self.batches[0]["timestamp"][0].value and self.batches[-1]["timestamp"][-1].value < times[1]

    def _segments(self, columns: Sequence[str], wanted: Filter, span: Times | None) -> Iterator[Segment]:
        for batch in self.batches:
            mask = wanted.mask(batch.column)
            if span is not None:
                at = batch["timestamp"].cast(pa.int64())
                inside = pc.and_(pc.greater_equal(at, span[0]), pc.less(at, span[1]))
                mask = inside if mask is None else pc.and_(mask, inside)
            # A filter copies what it keeps: no byte of another tenant's is left behind in a buffer.
            kept = batch if mask is None else batch.filter(mask)
            if kept.num_rows:
                yield from held(kept, columns)


class Rounds:
    """The last rounds. ``begin`` and ``add`` are called by one thread, ``above`` by any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rounds: deque[Round] = deque()
        #: Every event above the first and up to the second is in a round.
        self._after_pk = self._upto_pk = 0
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """Changes when what settles next has nothing to do with what settled before, and when nothing will settle any more."""
        return self._epoch

    def begin(self, settled_pk: int) -> None:
        """Forget everything: keys begin anew here."""
        with self._changed:
            self._forget(settled_pk)
            self._epoch += 1
            self._changed.notify_all()

    def add(self, after_pk: int, upto_pk: int, batches: Sequence[pa.RecordBatch]) -> None:
        """All events with ``after_pk < pk <= upto_pk``, if there are any. What came before is forgotten unless this follows it."""
        with self._changed:
            if after_pk != self._upto_pk:
                self._forget(after_pk)
            if upto_pk == self._upto_pk:
                return
            self._upto_pk = upto_pk
            if batches:
                self._rounds.append(Round(upto_pk, tuple(batches)))
            excess = sum(one.bytes for one in self._rounds) - ROUNDS_BYTES  # rounds grow as followers ask
            while excess > 0 and len(self._rounds) > 1:
                gone = self._rounds.popleft()
                self._after_pk = gone.upto_pk
                excess -= gone.bytes
            self._changed.notify_all()

    def above(self, pk: int, seconds: float) -> tuple[list[Round], int] | None:
        """The rounds with the events above a key, and the key they reach; waits so long if there is nothing yet.

        None: some of these events are not here any more.
        """
        with self._changed:
            epoch = self._epoch
            self._changed.wait_for(lambda: self._upto_pk > pk or self._epoch != epoch, seconds)
            if self._upto_pk <= pk:
                return [], pk
            if pk < self._after_pk:
                return None
            return [one for one in self._rounds if one.upto_pk > pk], self._upto_pk

    def close(self) -> None:
        """Nothing comes any more."""
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    def _forget(self, pk: int) -> None:
        self._rounds.clear()
        self._after_pk = self._upto_pk = pk
