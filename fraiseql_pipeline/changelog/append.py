"""Append: events of producers → rows of the change log. The only write of this package to a source.

What lives here: the connection that may write, and the transaction of one batch. What must not: who may append, and which events are
sound (``flight/upload.py``).

Invariants
 1. A batch is one transaction: all of its new events are in the log and on disk when ``append`` returns, or none is.
 2. Appending the same events again, at the same time or later, changes nothing: an event is known by its id at its time, for its tenant.
 3. Rows are what ``event.py`` reads back as the very events, except that jsonb prints their payload its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import errors as pg

from fraiseql_pipeline.changelog.connection import TABLE, explain, local_settings, opened, sql
from fraiseql_pipeline.errors import InputError, PipelineError, SourceRefused, SourceUnavailable
from fraiseql_pipeline.event import EVENT_SCHEMA, VERBS

#: ``event_type`` → ``modification_type``.
_VERBS = {event: verb for verb, event in reversed(VERBS.items())}

#: Between the values of a column in ``sql/append.sql``. No name, no number and no JSON may hold it. psycopg's own array of 10,000 payloads takes
#: 560 ms to write, this takes 1.
_BETWEEN = "\x01"

#: What other appends, or a migration, may hold a batch up.
_LOCK_SECONDS = 30
_SETTINGS = local_settings(120.0, {"lock_timeout": f"{_LOCK_SECONDS}s"})
#: What closing waits for Postgres to cancel an append, and for the append to end.
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a batch: ``inserted_rows`` are new, ``known_rows`` were in the log before."""

    inserted_rows: int
    known_rows: int


class Appender:
    """Appends to the change log behind a URL, one batch after the other. The connection is made by the first, and anew after it failed.

    Used by any thread. ``close`` ends what is under way.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._closed = False

    def append(self, events: pa.RecordBatch, producer: str) -> Appended:
        """Append events of ``EVENT_SCHEMA``, sound by the rules of the column table, whose ``user_id`` is a bigint as text.

        ``producer`` goes into the rows' ``extra_metadata``. Raises ``InputError`` for a payload that Postgres does not take, ``SourceRefused``
        when the role may not write, ``SourceUnavailable`` when it is not known whether the batch was appended: append it again.
        """
        values = {name: _BETWEEN.join(_texts(events, name)) for name in EVENT_SCHEMA.names}
        with self._turn():
            try:
                connection = self._connected()
                with connection.transaction():
                    connection.execute(f"{_SETTINGS}; {sql('append_begin')}")
                    inserted = connection.execute(sql("append"), {**values, "producer": producer}).rowcount
            except (PipelineError, psycopg.Error) as error:
                self._disconnect()
                raise _explained(error) from None
        return Appended(inserted, events.num_rows - inserted)

    def close(self) -> None:
        """Cancel the append that runs and refuse those that wait for it; returns after a few seconds even if the database does not answer."""
        self._closed = True
        if (connection := self._connection) is not None and self._lock.locked():
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=_CLOSE_SECONDS)
        if self._lock.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise SourceUnavailable("The change log is being closed; nothing of the batch was appended, send it again.")
            yield

    def _connected(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._disconnect()
            self._connection = self._open.enter_context(opened(self._url))
            # Of each BEGIN, whatever the role's defaults are.
            self._connection.isolation_level, self._connection.read_only = psycopg.IsolationLevel.READ_COMMITTED, False
        return self._connection

    def _disconnect(self) -> None:
        self._connection = None
        self._open.close()


def _texts(events: pa.RecordBatch, name: str) -> list[str]:
    """The values of a column as Postgres reads them, nulls as nothing."""
    column = events.column(name)
    if name == "event_type":
        return [_VERBS[value] for value in column.to_pylist()]
    texts: list[str] = pc.fill_null(column.cast(pa.string()), "").to_pylist()
    return texts


def _explained(error: PipelineError | psycopg.Error) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, pg.InsufficientPrivilege):
        return SourceRefused(
            f"The role may not append to {TABLE} (42501); grant it USAGE on schema core, SELECT and INSERT on the table, USAGE on the sequence of its "
            "column seq, and BYPASSRLS."
        )
    if isinstance(error, pg.ReadOnlySqlTransaction | pg.FeatureNotSupported):  # the latter for BEGIN READ WRITE on a standby
        return SourceRefused("This Postgres takes no writes: it is a standby; set FRAISEQL_DATABASE_URL to the primary.")
    if isinstance(error, pg.LockNotAvailable):
        return SourceUnavailable(
            f"{TABLE} was being written for more than {_LOCK_SECONDS} s by others (55P03); send the batch again."
        )
    if isinstance(error, pg.StatementTooComplex) or (isinstance(error, psycopg.DataError) and error.sqlstate is not None):
        return InputError(
            f"Postgres does not take a value of the batch (SQLSTATE {error.sqlstate}), such as a number or a nesting in data beyond what jsonb holds; "
            "nothing of the batch was appended."
        )
    if isinstance(error, pg.IntegrityError):
        return SourceRefused(
            f"A constraint of {TABLE} refuses the batch (SQLSTATE {error.sqlstate}); nothing of it was appended, the server's log has the details."
        )
    return explain(error)
