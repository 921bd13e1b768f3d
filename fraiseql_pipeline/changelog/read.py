"""The events of a window, as a stream of Arrow batches that is whole or ends in an error.

What lives here: ``Readers`` (the connections, kept between windows), the order in which batches of several connections are handed out,
their memory, retries and the watchdog. What must not: SQL (``projection.py``), ADBC (``session.py``), cuts (``split.py``), the work of
one connection (``reader.py``).

Invariants
 1. One window is read in one snapshot, whatever the number of connections: the first exports it, the others join it.
 2. Batches leave in the order of parts, and (timestamp, pk) rises from row to row over the whole stream; this is checked, so that no
    fault of a plan, an index or a retry can repeat or swap events unseen.
 3. A part counts as read when Postgres ended its COPY without an error. A reader that ends otherwise leaves an error that the stream
    raises: it never ends early.
 4. A failed part is read again from the event behind the last one received, in the same snapshot. Where the snapshot is lost, the
    window is read again from its start if nothing of it was handed out, and fails otherwise.
 5. In memory are at most ``BUFFER_BYTES`` of batches, waiting and under way, and one more batch for the part whose turn it is, so that
    the stream always moves on.
 6. No connection stays in a transaction when a window ends, however it ends.

Measured as a whole materialize of 500,000 sample events of the wide shape (820 Arrow bytes each) on 2 cores that Postgres shares:
one connection 107,000 to 117,000 events/s, two 137,000 to 138,000, three 135,000 to 140,000. Server and driver alone use about 7 µs
of CPU per event, so more connections help where the server has cores of its own. `fraiseql-pipeline bench materialize` with
FRAISEQL_READ_CONNECTIONS repeats it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pyarrow as pa

from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.projection import Part, Statements
from fraiseql_pipeline.changelog.reader import Reader, Stopped
from fraiseql_pipeline.changelog.session import FAILURES, Server, Session, discard, explained, key
from fraiseql_pipeline.changelog.split import split
from fraiseql_pipeline.errors import EventsUnreadable, SourceError, SourceUnavailable
from fraiseql_pipeline.event import in_order
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window

#: Bytes of COPY data in a batch: nearly every part (``split.py``) fits into one, because a batch costs milliseconds whatever its size. Peak
#: memory of a materialize of 3,000,000 events: typical samples 388 MiB (400 with 8 and 24 MiB), wide ones 395.
BATCH_BYTES = 7 << 20
BUFFER_BYTES = 16 << 20
#: Pauses before a window's retries; together longer than a restart of a small server.
PAUSES_SECONDS = (0.1, 0.3, 1.0, 3.0)
#: How much longer than the server's own time-out a reader may be silent before the watchdog gives it up.
GRACE_SECONDS = 2.0
#: Events that cannot be sent, per window, above which something else must be wrong.
MAX_UNREADABLE = 100


class Readers:
    """Connections that read windows, kept open between them. Safe to use from several threads; owned and closed by a ``ChangeLog``.

    An empty window takes 1.0 ms this way, one of 12,500 events 1 ms more than its query; opening connections for each would add 45 ms.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._server = Server(url)
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        self._closed = False

    @contextmanager
    def read(
        self, contract: Contract, window: Window, settled_pk: int, after_pk: int | None = None
    ) -> Iterator[Iterator[pa.RecordBatch]]:
        """The events of a window with ``after_pk < pk <= settled_pk``: batches of ``BATCH_SCHEMA`` in the order (timestamp, pk).

        Reading starts at once and runs ahead of the iterator, which hands out no empty batch. Leaving the block ends it, also for a
        thread that waits for a batch. An event that Postgres cannot send comes without its JSON and with ``raw`` set. Raises
        ``SourceUnavailable`` when the stream breaks or stalls, ``SourceRefused`` when Postgres will not let it be read,
        ``EventsUnreadable`` when it cannot read some of it itself.
        """
        whole = Part(*window.micros, settled_pk, after_pk)
        started = time.monotonic()
        reading = Reading(self, Statements(contract), whole, self._settings)
        changing, over = threading.Lock(), False

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal reading
            for pause in (*PAUSES_SECONDS, None):
                try:
                    yield from reading
                    return
                except SourceError as error:
                    spent = time.monotonic() - started > self._settings.read_timeout_seconds
                    if reading.handed_out or pause is None or spent or not error.retryable:
                        raise
                reading.stop()
                time.sleep(pause)
                with changing:
                    if over:
                        return
                    reading = Reading(self, Statements(contract), whole, self._settings)

        try:
            yield batches()
        finally:
            with changing:
                over = True
            reading.stop()

    def open(self, *, free_plan: bool = False, snapshot: str | None = None) -> Session:
        """A session in a transaction of its own, or in an exported snapshot. Idle connections that died meanwhile are passed over."""
        while True:
            with self._lock:
                session = self._idle.pop() if self._idle else None
            fresh = session is None
            if session is None:
                session = self._server.connect()
            try:
                session.begin(timeout_seconds=self._settings.read_timeout_seconds, free_plan=free_plan, snapshot=snapshot)
            except BaseException as error:
                discard(session)
                if isinstance(error, FAILURES) and fresh:
                    raise explained(error) from None
                if not isinstance(error, FAILURES):
                    raise
            else:
                return session

    def give_back(self, session: Session) -> None:
        """Ends the session's transaction and keeps the connection for the next window."""
        try:
            session.end()
        except FAILURES:
            discard(session)
            return
        with self._lock:
            if not self._closed and len(self._idle) < self._settings.read_connections:
                self._idle.append(session)
                return
        discard(session)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._idle:
                discard(self._idle.pop())
            with suppress(*FAILURES, RuntimeError):  # a reader that was given up may still hold a connection
                self._server.close()


@dataclass(eq=False, slots=True)
class Slot:
    """A part and what was read of it."""

    part: Part
    waiting: deque[pa.RecordBatch] = field(default_factory=deque)
    done: bool = False


class Reading:
    """One attempt to read a window in one snapshot: an iterator over its batches. Starts when made; ``stop`` it in any case."""

    def __init__(self, readers: Readers, statements: Statements, whole: Part, settings: Settings) -> None:
        self.readers, self.statements, self.whole = readers, statements, whole
        self.batch_bytes, self._buffer_bytes = BATCH_BYTES, BUFFER_BYTES
        self._connections = settings.read_connections
        self._silence_seconds = settings.read_timeout_seconds + GRACE_SECONDS
        self._changed = threading.Condition()
        self._slots: list[Slot] | None = None  # None: not planned yet
        self._claimed = 0  # slots that have a reader
        self._head = 0  # the slot whose turn it is
        self._bytes = 0  # in ``waiting``, and reserved by readers for the batch under way
        self._pauses = list(reversed(PAUSES_SECONDS))
        self._unreadable = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._last_key: tuple[int, int] | None = None
        self._crew: list[Reader] = []
        self._hire(None)

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> pa.RecordBatch:
        # No generator: it would keep the batch until it is asked for the next one.
        if (batch := self._next()) is None:
            raise StopIteration
        at, pk = batch["timestamp"], batch["pk"]
        if at.null_count or not in_order(at, pk) or (self._last_key is not None and key(batch, 0) <= self._last_key):
            raise EventsUnreadable(
                "Postgres returned events out of the order (created_at, pk); an index of the change log may be damaged, check it with amcheck."
            )
        self._last_key = key(batch, -1)
        return batch

    @property
    def handed_out(self) -> bool:
        return self._last_key is not None

    def stop(self) -> None:
        """Ends the readers. One that does not react is left behind: its thread ends with the process or when the network gives up."""
        with self._changed:
            whole = self._slots is not None and self._head == len(self._slots) and self._error is None
            self._stopped = not whole  # else the readers are on their way out, with connections worth keeping
            self._changed.notify_all()
        if not whole:
            for reader in self._crew:
                reader.cancel()
        deadline = time.monotonic() + GRACE_SECONDS
        for reader in self._crew:
            reader.join(max(0.0, deadline - time.monotonic()))

    def is_over(self) -> bool:
        """Whether it was stopped or failed, so that a session may be about to be cancelled and must not be kept."""
        with self._changed:
            return self._stopped or self._error is not None

    # What follows is called by readers.

    def plan(self, session: Session) -> None:
        """Cuts the window, and hires more readers where there is work for them."""
        late = self.whole.after_pk is not None
        parts = [self.whole] if late else split(session, self.statements, self.whole)
        helpers = min(self._connections, len(parts)) - 1
        snapshot = session.export() if helpers > 0 else None
        with self._changed:
            self._check()
            self._slots = [Slot(part) for part in parts]
            self._changed.notify_all()
            for _ in range(helpers):
                self._hire(snapshot)

    def claim(self) -> Slot | None:
        """The next part nobody reads yet."""
        with self._changed:
            self._check()
            if self._slots is None or self._claimed == len(self._slots):
                return None
            self._claimed += 1
            return self._slots[self._claimed - 1]

    def reserve(self, slot: Slot) -> None:
        """Waits until a batch of the slot may be fetched."""
        with self._changed:
            while self._bytes + self.batch_bytes > self._buffer_bytes and not (self._is_head(slot) and not slot.waiting):
                self._check()
                self._changed.wait()
            self._check()
            self._bytes += self.batch_bytes

    def put(self, slot: Slot, batch: pa.RecordBatch | None) -> None:
        """Gives a reservation back, for a batch if one came."""
        with self._changed:
            self._bytes += (batch.nbytes if batch is not None else 0) - self.batch_bytes
            if batch is not None:
                slot.waiting.append(batch)
            self._changed.notify_all()

    def done(self, slot: Slot) -> None:
        with self._changed:
            slot.done = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def pause(self, error: SourceError) -> None:
        """Waits before a retry; raises the error when it will not help or there were enough of them."""
        with self._changed:
            if not error.retryable or not self._pauses:
                raise error
            self._changed.wait_for(lambda: self._stopped, self._pauses.pop())
            self._check()

    def count_unreadable(self, why: str) -> None:
        with self._changed:
            self._unreadable += 1
            if self._unreadable > MAX_UNREADABLE:
                raise EventsUnreadable(
                    f"Postgres could not send {MAX_UNREADABLE} events of one window ({why}); see the server's log."
                )

    def wait_for_others(self) -> None:
        """Until every part is read: the snapshot lives as long as the transaction that exported it."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._error is not None or all(slot.done for slot in self._slots or ()))

    def _hire(self, snapshot: str | None) -> None:
        reader = Reader(self, snapshot)
        self._crew.append(reader)
        reader.start()

    def _check(self) -> None:
        if self._stopped or self._error is not None:
            raise Stopped

    def _is_head(self, slot: Slot) -> bool:
        return self._slots is not None and self._head < len(self._slots) and self._slots[self._head] is slot

    def _next(self) -> pa.RecordBatch | None:
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._stopped:  # by another thread than the one that waits here
                    raise SourceUnavailable("The read of the change log was stopped.")
                if self._slots is not None:
                    if self._head == len(self._slots):
                        return None
                    slot = self._slots[self._head]
                    if slot.waiting:
                        batch = slot.waiting.popleft()
                        self._bytes -= batch.nbytes
                        self._changed.notify_all()
                        return batch
                    if slot.done:
                        self._head += 1
                        self._changed.notify_all()
                        continue
                self._changed.wait(0.5)
                self._watch()

    def _watch(self) -> None:
        for reader in self._crew:
            silent = reader.silent_seconds()
            if silent > self._silence_seconds:
                self._error = SourceUnavailable(
                    f"Postgres sent nothing for {silent:.0f} s while events were read; check it and run again."
                )
                reader.cancel()
