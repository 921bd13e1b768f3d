"""The tail: events in the order of their keys, as they settle.

What lives here: ``Tail``: waiting for something new, settling, reading a range of keys. What must not: windows (``read.py``), who wants the
events, a thread.

Invariants
 1. ``read`` gives every event of its range that has a time a window can hold, once, in the order of pk; a stream that breaks raises.
 2. A notification (the trigger ``fn_entity_change_notify``, where upstream has it) only ends a wait sooner: events are found by
    settling, so a lost one costs a moment and never an event. Behind a pooler nobody listens: the session is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pyarrow as pa

from fraiseql_pipeline.changelog.connection import is_direct, translated
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.projection import Part, Statements
from fraiseql_pipeline.changelog.read import Readers
from fraiseql_pipeline.changelog.session import FAILURES, Session, discard, explained, row_fault
from fraiseql_pipeline.changelog.settle import drawn_key, settle_keys
from fraiseql_pipeline.window import to_micros

#: The channel that upstream's trigger notifies.
CHANNEL = "fraiseql_events"

#: Every time that a window can hold, in microseconds.
_FIRST_US, _LAST_US = to_micros(datetime(1, 1, 1, tzinfo=UTC)), to_micros(datetime(9999, 12, 31, tzinfo=UTC))

#: COPY data per batch of a tail: a burst arrives in pieces that are soon handed on.
_BATCH_BYTES = 4 << 20


class Tail:
    """Follows the log on connections of its own. Used by one thread; made by ``ChangeLog.tail``."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        contract: Contract,
        readers: Readers,
        timeout_seconds: float,
        given_up: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._contract = contract
        self._readers = readers
        self._timeout_seconds = timeout_seconds
        self._given_up = given_up
        self._statements = Statements(contract)
        self.identity = contract.identity
        with translated():
            if is_direct(connection):
                connection.execute(f"LISTEN {CHANNEL}")

    def settle(self) -> tuple[int, datetime]:
        """The settled pk, and the database's clock. Waits for open writers; raises ``SettleTimeout`` and ``SourceUnavailable``."""
        return settle_keys(self._connection, self._contract, self._timeout_seconds, self._given_up)

    def drawn(self) -> int | None:
        """The last key that the log's sequence has given out; None where the role may not read it. Raises ``SourceUnavailable``."""
        return drawn_key(self._connection, self._contract)

    def wait(self, seconds: float) -> None:
        """So long, or until the database says that an event was written."""
        with translated():
            for _ in self._connection.notifies(timeout=seconds, stop_after=1):
                pass

    def read(self, after_pk: int, upto_pk: int) -> Iterator[pa.RecordBatch]:
        """The settled events with ``after_pk < pk <= upto_pk`` as batches of ``BATCH_SCHEMA``, none empty, in the order of pk.

        An event that Postgres cannot send is left out: its window's materialization quarantines it.
        Raises ``SourceUnavailable`` and ``SourceRefused``.
        """
        ranges = [(after_pk, upto_pk)]
        while ranges:
            after, upto = ranges.pop()
            try:
                for batch in self._stream(after, upto):
                    yield batch
                    after = batch.column("pk")[-1].as_py()
            except FAILURES as error:
                if row_fault(error) is None:
                    raise explained(error) from None
                if upto - after > 1:
                    middle = (after + upto) // 2
                    ranges += [(middle, upto), (after, middle)]

    def _stream(self, after_pk: int, upto_pk: int) -> Iterator[pa.RecordBatch]:
        session: Session | None = self._readers.open()
        assert session is not None
        try:
            # Along the primary key.
            part = Part(_FIRST_US, _LAST_US, upto_pk, after_pk, instant=True)
            with closing(session.stream(self._statements.events(part), _BATCH_BYTES)) as batches:
                yield from batches
            done, session = session, None
            self._readers.give_back(done)
        finally:
            if session is not None:
                discard(session)
