"""One connection at work: a thread that reads the parts of a window it can get.

What lives here: ``Reader``: fetching, going on after a failure, and finding the one event that cannot be read. What must not: the order
of parts, memory, the watchdog (``read.py``), SQL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from fraiseql_pipeline.changelog.projection import Part
from fraiseql_pipeline.changelog.session import FAILURES, Session, discard, explained, key, row_fault
from fraiseql_pipeline.errors import SourceError

if TYPE_CHECKING:
    from fraiseql_pipeline.changelog.read import Reading, Slot

#: Most rows of one batch while they are read one by one, and how many are tried alone behind the last one that came.
_ISOLATED_ROWS, _SINGLE_ROWS = 1024, 3


class Stopped(Exception):
    """Nobody wants the rest."""


class Reader(threading.Thread):
    """One connection at work. The first of a reading plans it and owns the snapshot."""

    def __init__(self, reading: Reading, snapshot: str | None) -> None:
        super().__init__(name="changelog-reader", daemon=True)
        self._reading = reading
        self._leads = snapshot is None
        self._snapshot = snapshot
        self._session: Session | None = None
        self._since: float | None = None

    def silent_seconds(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def cancel(self) -> None:
        """Asks the server to cancel; on a thread of its own, because a dead network blocks that too."""
        if (session := self._session) is not None:

            def ask() -> None:
                with suppress(*FAILURES, RuntimeError):
                    session.cancel()

            threading.Thread(target=ask, name="changelog-cancel", daemon=True).start()

    def run(self) -> None:
        sound = False
        try:
            self._since = time.monotonic()
            if self._open() and self._session is not None:
                if self._leads:
                    self._reading.plan(self._session)
                self._session.protect()
                while (slot := self._reading.claim()) is not None:
                    self._read(slot)
                self._since = None
                if self._leads:
                    self._reading.wait_for_others()
                sound = True
        except Stopped:
            pass
        except FAILURES as error:
            self._reading.fail(explained(error))
        except BaseException as error:  # noqa: BLE001 - a thread has nobody above it: the stream raises it
            self._reading.fail(error)
        finally:
            self._since = None
            if (session := self._session) is not None:
                self._session = None  # first: whoever cancels has ended the reading before it looks here
                if sound and not self._reading.is_over():
                    self._reading.readers.give_back(session)
                else:
                    discard(session)

    def _open(self) -> bool:
        try:
            self._session = self._reading.readers.open(free_plan=self._reading.whole.after_pk is not None, snapshot=self._snapshot)
        except SourceError:
            if self._leads:
                raise
            return False  # one connection fewer only costs time
        return True

    def _read(self, slot: Slot) -> None:
        rest: Part = slot.part
        while True:
            try:
                for batch in self._fetch(slot, self._reading.statements.events(rest), self._reading.batch_bytes):
                    rest = replace(rest, after_key=key(batch, -1))
                break
            except (*FAILURES, SourceError) as error:
                if (why := row_fault(error)) is not None:
                    rest = self._isolate(slot, rest, why)
                else:
                    self._reopen(explained(error))
        self._reading.done(slot)

    def _fetch(self, slot: Slot, query: str, batch_bytes: int) -> Iterator[pa.RecordBatch]:
        assert self._session is not None
        batches = self._session.stream(query, batch_bytes)
        try:
            while True:
                self._since = None
                self._reading.reserve(slot)
                self._since = time.monotonic()
                batch = None
                try:
                    batch = next(batches, None)
                finally:
                    self._reading.put(slot, batch)
                if batch is None:
                    return
                yield batch
        finally:
            batches.close()

    def _reopen(self, error: SourceError) -> None:
        """After a failure: goes on in the same snapshot, if it can still be joined."""
        if self._snapshot is None:
            raise error
        self._reading.pause(error)
        if self._session is not None:
            discard(self._session)
            self._session = None
        try:
            self._session = self._reading.readers.open(snapshot=self._snapshot)
            self._session.protect()
        except (*FAILURES, SourceError):
            raise error from None

    def _isolate(self, slot: Slot, rest: Part, why: str) -> Part:
        """Passes on the events before one that cannot be read, then that one without what cannot be sent; returns what remains.

        Row by row, because the error says nothing about the row: events arrive in order until shortly before the one that fails (the driver
        keeps one back), and that one is tried alone. So two reads fail, where bisecting the part would need one for each halving, at the
        cost of a gigabyte in the server each. If none fails alone, the server was short of memory, and no row is at fault.
        """
        session, statements = self._session, self._reading.statements
        assert session is not None
        self._since = time.monotonic()
        self._reading.count_unreadable(why)
        session.recover()
        rows: list[pa.RecordBatch] = []
        held_bytes = 0
        try:
            for row in session.stream(statements.events(rest), 1):
                rows.append(row)
                held_bytes += row.nbytes
                rest = replace(rest, after_key=key(row, -1))
                if len(rows) == _ISOLATED_ROWS or held_bytes >= self._reading.batch_bytes:
                    self._pass_on(slot, rows)
                    held_bytes = 0
        except FAILURES as error:
            if row_fault(error) is None:
                raise
            session.recover()
        self._pass_on(slot, rows)
        for _ in range(_SINGLE_ROWS):
            try:
                rows, fails = list(session.stream(statements.first_event(rest), 1)), False
            except FAILURES as error:
                if row_fault(error) is None:
                    raise
                session.recover()
                rows, fails = self._unreadable(session, rest, why), True
            if rows:
                rest = replace(rest, after_key=key(rows[0], 0))
                self._pass_on(slot, rows)
            if fails:
                break
        return rest

    def _unreadable(self, session: Session, rest: Part, why: str) -> list[pa.RecordBatch]:
        """The first event of a part with its short texts, or if it is one of them that cannot be sent, without."""
        statements = self._reading.statements
        try:
            return list(session.stream(statements.unreadable(rest, why, texts=True), 1))
        except FAILURES as error:
            if row_fault(error) is None:
                raise
            session.recover()
        return list(session.stream(statements.unreadable(rest, why, texts=False), 1))

    def _pass_on(self, slot: Slot, rows: list[pa.RecordBatch]) -> None:
        # Nearly always one batch; a column of more than 2 GiB makes several.
        for batch in pa.Table.from_batches(rows).combine_chunks().to_batches() if rows else ():
            self._reading.reserve(slot)
            self._reading.put(slot, batch)
        rows.clear()
