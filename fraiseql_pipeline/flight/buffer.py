"""The live buffer: settled events that may not be in the lake yet, as files like the lake's own on local disk.

What lives here: ``Buffer``: taking events in by hours, keeping their files few and within bounds, handing them out. What must not: how a file
is written and opened (``held.py``), Postgres and threads (``live.py``), what is in the lake, tickets.

Because they are files like the lake's, everything that serves the lake serves them: order, filters, tenants, kept frames. In memory is only
the head of each hour, the events that came last: up to ``HEAD_BYTES``, and ``HEADS_BYTES`` of all hours.

Invariants
 1. Of an hour, the buffer holds every sound event whose key is above ``after_pk`` and at most ``settled_pk``, once.
 2. A file never changes. It lies on the disk as long as somebody holds its ``Held``; an hour whose file somebody else removed is given up.
 3. Files take at most ``max_bytes``, hours that somebody is about to read aside; the oldest hours are given up first, and can be filled
    again.
 4. Files of an hour follow each other in time, but for events that settled long after their time: those have files of their own until the
    next merge. So a reader of the newest events does not sort the older ones again.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline import memory
from fraiseql_pipeline.errors import FlightUnavailable, TicketError
from fraiseql_pipeline.event import LAKE_SCHEMA, SORT_KEYS
from fraiseql_pipeline.flight.held import HOUR_US, Held, HeldFiles, window_of
from fraiseql_pipeline.flight.segment import units
from fraiseql_pipeline.validate import Validator
from fraiseql_pipeline.window import FOREVER

_log = logging.getLogger(__name__)

#: Arrow bytes of an hour's head. Half of it is written when it is full; a reader of the newest events waits for a file of what is left,
#: 10 ms for 10,000 events.
HEAD_BYTES = 4 << 20
#: Of all heads together: events of many hours at once, as a migration writes them.
HEADS_BYTES = 16 << 20
#: Batches of a head, before they become one.
_HEAD_BATCHES = 64
#: Rows of the files that a fill or a merge writes: few enough to be encoded as one group, many enough that an hour has few files.
FILE_ROWS = 65_536
#: So many small files of an hour that follow each other are merged into one.
_MERGED_FILES = 8


@dataclass(eq=False)
class _Hour:
    """What the buffer holds of one hour; ``after_pk``: see invariant 1. ``head_number`` changes with the head."""

    number: int
    after_pk: int
    files: list[Held] = field(default_factory=list)
    head: list[pa.RecordBatch] = field(default_factory=list)
    head_bytes: int = 0
    head_number: int = 0
    #: Highest time in a file that follows the others.
    reach: int = -FOREVER
    #: The head as a file, for the readers of this very head: its number and the key it starts above, and the file.
    written: tuple[tuple[int, int], Held] | None = None
    validator: Validator | None = None

    @property
    def bytes(self) -> int:
        return sum(held.file.size for held in self.files)

    @property
    def rows(self) -> int:
        return sum(held.file.rows or 0 for held in self.files) + sum(batch.num_rows for batch in self.head)

    def became(self, head: list[pa.RecordBatch]) -> None:
        self.head, self.head_number, self.written = head, self.head_number + 1, None
        self.head_bytes = sum(batch.nbytes for batch in head)


class Buffer:
    """Events by hours since 1970. ``absorb`` and ``reached`` are called by one thread, everything else by any."""

    def __init__(self, files: HeldFiles, max_bytes: int) -> None:
        self._files = files
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._writing = threading.Lock()
        self._hours: dict[int, _Hour] = {}
        self._wanted: Counter[int] = Counter()
        self.started_pk = 0
        self.settled_pk = 0
        self.settled_at = datetime.min.replace(tzinfo=UTC)

    def begin(self, settled_pk: int, at: datetime) -> None:
        """Forget everything; from here on the events above ``settled_pk`` will be taken in."""
        with self._lock:
            self._hours.clear()
            self.started_pk = self.settled_pk = settled_pk
            self.settled_at = at

    def reached(self, settled_pk: int, at: datetime) -> None:
        """Every event up to this key was taken in."""
        with self._lock:
            self.settled_pk, self.settled_at = settled_pk, at

    def absorb(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Take in the next events (``BATCH_SCHEMA``, rising in pk); the sound ones as ``LAKE_SCHEMA``, those of an hour in order."""
        taken: list[tuple[int, pa.RecordBatch]] = []
        try:
            for number, part in _by_hour(batch):
                taken.append((number, self._judged(number, part)))
        except BaseException:
            # The hours before it have admitted these ids, and would take the same events for duplicates when they come again.
            for number in set(_hours_of(batch).tolist()):
                with self._lock:
                    hour = self._hours.get(number)
                if hour is not None:
                    self._forget(hour)
            raise
        taken = [(number, accepted) for number, accepted in taken if accepted.num_rows]
        with self._lock:
            for number, accepted in taken:
                hour = self._hours[number]  # another one, if it was given up meanwhile
                head = [*hour.head, accepted]
                # A batch of one event takes some kilobytes.
                hour.became(head if len(head) < _HEAD_BATCHES else _joined(pa.Table.from_batches(head, LAKE_SCHEMA)))
            self.settled_pk = batch.column("pk")[-1].as_py()
            full = self._full()
        for hour in full:
            try:
                self._flush(hour)
            except FlightUnavailable as error:  # the disk is full, or files are gone: readers get this hour from Postgres
                _log.warning("an hour of live events is given up: %s", error)
                self._forget(hour)
        return [accepted for _, accepted in taken]

    def _judged(self, number: int, part: pa.RecordBatch) -> pa.RecordBatch:
        with self._lock:
            hour = self._hours.setdefault(number, _Hour(number, self.started_pk))
        # Held here: a reader who sees the hour published takes it away from the hour at any time.
        validator = hour.validator = hour.validator or Validator(window_of(number))
        return validator.check(part).accepted

    def _full(self) -> list[_Hour]:
        """The hours whose heads are to be written: those that are full, and the fullest of many."""
        heads = sorted(self._hours.values(), key=lambda hour: hour.head_bytes, reverse=True)
        excess = sum(hour.head_bytes for hour in heads) - HEADS_BYTES
        full = []
        for hour in heads:
            if not hour.head or (hour.head_bytes <= HEAD_BYTES and excess <= 0):
                break
            full.append(hour)
            excess -= hour.head_bytes // 2  # the newer half stays
        return full

    def missing(self, number: int, above_pk: int) -> int | None:
        """Up to which key events of an hour above ``above_pk`` are not here; None: all of them are."""
        with self._lock:
            hour = self._hours.get(number)
            after = self.started_pk if hour is None else hour.after_pk
        return after if after > above_pk else None

    def fill(self, number: int, above_pk: int, upto_pk: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Take in what ``missing`` said is not here: events of an hour in (timestamp, pk) order, ``BATCH_SCHEMA``.

        Raises ``TicketError`` if what is wanted at once would not fit, ``FlightUnavailable`` where the disk takes no file.
        """
        files: list[Held] = []
        validator = Validator(window_of(number))
        for held in self._files.write_all(number, (validator.check(batch).accepted for batch in batches), FILE_ROWS):
            files.append(held)
            if sum(one.file.size for one in files) + self._wanted_bytes() > self._max_bytes:
                raise TicketError(
                    "The asked range holds more events that are not in the lake than this server keeps "
                    "(FRAISEQL_ARROW_FLIGHT_LIVE_BYTES); materialize its windows, or ask for a part at a time."
                )
        with self._lock:
            hour = self._hours.setdefault(number, _Hour(number, self.started_pk))
            if hour.after_pk == upto_pk:  # else it was given up meanwhile
                hour.files += files
                hour.after_pk = above_pk
                hour.reach = max([hour.reach, *(held.file.high or 0 for held in files)])
            self._give_up()
        memory.give_back()  # without it 1M events cost 130 MB and not 40

    @contextmanager
    def wanted(self, hours: Iterable[int]) -> Iterator[None]:
        """While these hours are wanted, they are not given up."""
        counted = Counter(hours)
        with self._lock:
            self._wanted.update(counted)
        try:
            yield
        finally:
            with self._lock:
                self._wanted.subtract(counted)
                self._wanted += Counter()

    def hours(self, first: int, last: int) -> list[int]:
        """The hours from ``first`` to ``last`` of which something is here, or was."""
        with self._lock:
            return sorted(number for number in self._hours if first <= number <= last)

    def files(self, floors: Mapping[int, int]) -> tuple[list[Held], int, datetime]:
        """The events of some hours, of each those above a key (hour → key); with the settled pk they reach, and when that was.

        An hour whose files are gone is given up: it is ``missing`` then. Raises ``FlightUnavailable`` where the disk takes no file.
        """
        with self._lock:
            found = [
                (hour, floor, list(hour.files), list(hour.head), hour.head_number)
                for number, floor in floors.items()
                if (hour := self._hours.get(number)) is not None
            ]
            settled_pk, at = self.settled_pk, self.settled_at
        held: list[Held] = []
        for hour, floor, files, head, head_number in found:
            if not all(one.is_there for one in files):
                _log.warning("an hour of live events is given up: somebody removed its files")
                self._forget(hour)
                continue
            for one in files:
                held += self._above(hour, one, floor)
            if head:
                held += self._head(hour, head, head_number, floor)
        return held, settled_pk, at

    def drop(self, floors: Mapping[int, int]) -> None:
        """Forget the events of hours up to a key (hour → key), which the lake has: whole files of them."""
        with self._lock:
            for number, floor in floors.items():
                hour = self._hours.get(number)
                if hour is None:
                    continue
                hour.files = [held for held in hour.files if held.high_pk > floor]
                head = [batch for batch in hour.head if pc.max(batch["pk"]).as_py() > floor]
                if len(head) < len(hour.head):
                    hour.became(head)
                hour.after_pk = max(hour.after_pk, floor)
                hour.validator = None  # what is late is judged against the lake when it is merged

    @property
    def rows(self) -> int:
        with self._lock:
            return sum(hour.rows for hour in self._hours.values())

    @property
    def bytes(self) -> int:
        """On the disk, of the files that are listed."""
        with self._lock:
            return sum(hour.bytes for hour in self._hours.values())

    # ------------------------------------------------------------------------------------------------------------- inside

    def _flush(self, hour: _Hour) -> None:
        """Write the older half of a head; events older than the files before them get a file of their own."""
        rows = _sorted(pa.Table.from_batches(hour.head, LAKE_SCHEMA))
        at = rows["timestamp"].cast(pa.int64()).to_numpy()
        late = int(np.searchsorted(at, hour.reach, side="right"))
        edge = len(at)
        if late < edge:
            # The half that stays takes in what settles a little out of order. No instant is cut: files follow each other.
            half = int(np.searchsorted(at, at[max(late, edge // 2)], side="left"))
            edge = half if half > late else edge
        pieces = [piece for piece in (rows.slice(0, late), rows.slice(late, edge - late)) if piece.num_rows]
        files = [self._files.write(hour.number, piece) for piece in pieces]
        # Copied: a slice would keep all of it in memory.
        rest = rows.take(np.arange(edge, len(at)))
        with self._lock:
            hour.files += files
            hour.became(_joined(rest))
            if edge > late:
                hour.reach = int(at[edge - 1])
        self._merge(hour)
        with self._lock:
            self._give_up()
        memory.give_back()

    def _merge(self, hour: _Hour) -> None:
        """Files of a good size for many small ones, with the files they overlap."""
        with self._lock:
            files = sorted(hour.files, key=lambda held: (held.file.low or 0, held.file.path))
        if sum(_is_small(held) for held in files) < _MERGED_FILES:
            return
        begins = units([held.file for held in files])
        run: list[Held] = []
        for low, high in pairwise([*begins, len(files)]):
            if any(_is_small(held) for held in files[low:high]):
                run += files[low:high]
            else:
                self._merge_run(hour, run)
                run = []
        self._merge_run(hour, run)

    def _merge_run(self, hour: _Hour, run: list[Held]) -> None:
        """One file, or a few, for files that follow each other."""
        if len(run) < 2:
            return
        merged = list(self._files.write_all(hour.number, self._files.read(run), FILE_ROWS))
        with self._lock:
            gone = set(run)
            if gone <= set(hour.files):  # else some were dropped meanwhile
                hour.files = [held for held in hour.files if held not in gone] + merged

    def _above(self, hour: _Hour, held: Held, floor: int) -> list[Held]:
        """A file's events above a key, as files."""
        if held.low_pk > floor:
            return [held]
        if held.high_pk <= floor:
            return []
        rows = pa.Table.from_batches(self._files.read([held]), LAKE_SCHEMA)
        rest = self._files.write(hour.number, rows.filter(pc.greater(rows["pk"], floor)))
        with self._lock:
            # The lake has the others.
            if held in hour.files:
                hour.files[hour.files.index(held)] = rest
                hour.after_pk = max(hour.after_pk, floor)
        return [rest]

    def _head(self, hour: _Hour, head: list[pa.RecordBatch], head_number: int, floor: int) -> list[Held]:
        """A head as a file, made once for all who read the same."""
        with self._writing:
            written = hour.written
            if written is not None and written[0] == (head_number, floor) and written[1].is_there:
                return [written[1]]
            rows = pa.Table.from_batches(head, LAKE_SCHEMA)
            rows = rows.filter(pc.greater(rows["pk"], floor))
            if not rows.num_rows:
                return []
            held = self._files.write(hour.number, _sorted(rows))
            with self._lock:
                if hour.head_number == head_number:
                    hour.written = (head_number, floor), held
            return [held]

    def _wanted_bytes(self) -> int:
        with self._lock:
            return sum(hour.bytes for number, hour in self._hours.items() if self._wanted[number])

    def _forget(self, hour: _Hour) -> None:
        """Give up an hour: its events can be read from Postgres again."""
        with self._lock:
            if self._hours.get(hour.number) is hour:
                self._hours[hour.number] = _Hour(hour.number, self.settled_pk)

    def _give_up(self) -> None:
        """Forget the oldest hours until the rest fits, but for the newest and those somebody wants."""
        held = {number: hour.bytes for number, hour in self._hours.items()}
        for number in sorted(held)[:-1]:
            if sum(held.values()) <= self._max_bytes:
                return
            if self._wanted[number]:
                continue
            self._forget(self._hours[number])
            del held[number]


def _is_small(held: Held) -> bool:
    return (held.file.rows or 0) < FILE_ROWS // 2


def _joined(rows: pa.Table) -> list[pa.RecordBatch]:
    """As one batch if there are rows; as several where a column has more than the 2 GiB that one may have."""
    return [batch for batch in rows.combine_chunks().to_batches() if batch.num_rows]


def _sorted(rows: pa.Table) -> pa.Table:
    return rows.take(pc.sort_indices(rows, sort_keys=SORT_KEYS))


def _by_hour(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The events of each hour, in (timestamp, pk) order."""
    hours = _hours_of(batch)
    for number in np.unique(hours).tolist():
        part = (
            batch
            if hours[0] == number and hours[-1] == number and (hours == number).all()
            else batch.filter(pa.array(hours == number))
        )
        yield number, part.take(pc.sort_indices(part, sort_keys=SORT_KEYS))


def _hours_of(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    return np.floor_divide(batch.column("timestamp").cast(pa.int64()).to_numpy(), HOUR_US)
