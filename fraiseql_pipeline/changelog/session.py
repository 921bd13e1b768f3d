"""One connection of the data stream: a transaction with one snapshot, and events as Arrow batches.

What lives here: ``Server`` (opens connections cheaply), ``Session`` (one of them), and what ADBC's failures mean. What must not: which
part of a window is read, when, or by whom (``read.py``).

Invariants
 1. A statement of ours runs inside BEGIN … REPEATABLE READ READ ONLY with every setting made for that transaction only, so neither a
    role's defaults nor a pooler that swaps connections between transactions can change what a value means or which rows are seen.
 2. A session is either idle outside any transaction, or owned by one reader; whoever is in doubt closes it.
 3. No table is rewritten under a snapshot: the lock on the log is older than every snapshot that is taken here.
 4. What leaves ``stream`` has exactly ``BATCH_SCHEMA``, no metadata of the driver's and no extension types, and its texts are UTF-8.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import adbc_driver_manager
import adbc_driver_postgresql
import pyarrow as pa
from adbc_driver_manager import AdbcConnection, AdbcStatement
from adbc_driver_manager._reader import AdbcRecordBatchReader  # the only reader that keeps the SQLSTATE of an error
from psycopg.conninfo import make_conninfo

from fraiseql_pipeline.changelog.connection import (
    SESSION,
    TABLE,
    explain_sqlstate,
    explain_text,
    local_settings,
    startup,
)
from fraiseql_pipeline.changelog.utf8 import are_utf8
from fraiseql_pipeline.errors import SourceError, SourceRefused, SourceUnavailable
from fraiseql_pipeline.event import BATCH_SCHEMA

#: Planner: along the index on created_at, row by row in order, never the whole window sorted on the server's disk. Late events are few and
#: spread over a window, so the planner is free there.
_IN_ORDER = {"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_sort": "off"}
_ALWAYS = {"max_parallel_workers_per_gather": "0", "work_mem": "32MB"}

#: SQLSTATE of "one output row is larger than the server can build" (54000), or it ran out of memory or failed while building it; of a text
#: that has no form in UTF-8 (22P05), or is none in the encoding of the database (22021); of a value whose pieces are lost or damaged (XX001).
_OF_A_ROW = frozenset({"54000", "53200", "XX000", "XX001", "22P05", "22021"})
#: ADBC's words for a value that it cannot decode.
_UNDECODABLE = "ReadRecord failed"


class NotUtf8(ValueError):
    """A batch holds a text that Postgres sent as it is and that is not UTF-8."""

    sqlstate = "22021"


#: What fails in ADBC and Arrow while a stream is read; a connection that breaks off is an OSError.
FAILURES = (adbc_driver_manager.Error, OSError, pa.ArrowException, NotUtf8)


class Server:
    """The database behind a URL. ADBC reads its type map once (40 ms); a further connection takes 2 ms."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._database: Any = None
        self._lock = threading.Lock()

    def connect(self) -> Session:
        """A new session. Raises ``SourceUnavailable`` or ``SourceRefused``."""
        try:
            with self._lock:
                if self._database is None:
                    self._database = adbc_driver_postgresql.connect(make_conninfo(**startup(self._url)))
                return Session(AdbcConnection(self._database))
        except FAILURES as error:
            raise explained(error) from None

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None


class Session:
    """One connection, used by one thread at a time; ``cancel`` may be called from any."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def begin(self, *, timeout_seconds: float, free_plan: bool = False, snapshot: str | None = None) -> None:
        """Opens the transaction of a read, in an exported snapshot if one is named: fails then where somebody waits to alter the log."""
        timeout_seconds = max(0.001, timeout_seconds)  # 0 would be none
        self.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        if snapshot is not None:
            self.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            # Not behind a migration that waits for the transaction of the snapshot, which ends after this one has read.
            self.execute(f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE NOWAIT")
        else:
            # Before anything that takes the snapshot: the rows of an ALTER TABLE that writes the table anew are invisible to older ones.
            self.execute(f"SET LOCAL lock_timeout = '{SESSION['lock_timeout']}'")
            self.execute(f"SET LOCAL statement_timeout = {int(timeout_seconds * 1000)}")
            self.execute(f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE")
        self.ask(local_settings(timeout_seconds, {**_ALWAYS, **({} if free_plan else _IN_ORDER)}))

    def export(self) -> str:
        """Name of this transaction's snapshot, for ``begin`` of others as long as this transaction is open; before ``protect``."""
        return str(self.ask("SELECT pg_export_snapshot() AS name")[0]["name"])

    def protect(self) -> None:
        """From here on a failed statement costs the statement and not the snapshot: see ``recover``."""
        self.execute("SAVEPOINT before")

    def recover(self) -> None:
        """After a statement that failed: the transaction and its snapshot go on."""
        self.execute("ROLLBACK TO SAVEPOINT before")

    def end(self) -> None:
        self.execute("COMMIT")

    def execute(self, statement: str) -> None:
        """Runs a statement that returns nothing."""
        with AdbcStatement(self._connection) as running:
            running.set_sql_query(statement)
            running.execute_update()

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The rows of a small result."""
        return [row for batch in self._batches(query, 1 << 20) for row in batch.to_pylist()]

    def stream(self, query: str, batch_bytes: int) -> Generator[pa.RecordBatch, None, None]:
        """The events of a query as batches of ``BATCH_SCHEMA``; constant memory, about ``batch_bytes`` (of COPY data) each."""
        for batch in self._batches(query, batch_bytes):
            if batch.num_rows:
                yield _aligned(batch)

    def cancel(self) -> None:
        """Asks the server to cancel what runs now; may block as long as the network does."""
        self._connection.cancel()

    def close(self) -> None:
        self._connection.close()

    def _batches(self, query: str, batch_bytes: int) -> Generator[pa.RecordBatch, None, None]:
        with AdbcStatement(self._connection) as running:
            running.set_sql_query(query)
            running.set_options(**{adbc_driver_postgresql.StatementOptions.BATCH_SIZE_HINT_BYTES.value: str(batch_bytes)})
            handle, _ = running.execute_query()
            reader = AdbcRecordBatchReader._import_from_c(handle.address)
            try:
                with suppress(StopIteration):
                    while True:
                        yield reader.read_next_batch()
            finally:
                reader.close()


def discard(session: Session) -> None:
    """Closes a session whatever its state; the server ends its transaction."""
    with suppress(*FAILURES, RuntimeError):
        session.close()


def _aligned(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same values as ``BATCH_SCHEMA``. Only names inside lists and the driver's metadata may differ: nothing is converted.

    Raises ``NotUtf8``.
    """
    columns = []
    for field, name, column in zip(BATCH_SCHEMA, batch.schema.names, batch.columns, strict=True):
        if name != field.name or not (
            column.type == field.type or (pa.types.is_list(field.type) and pa.types.is_list(column.type))
        ):
            raise SourceRefused(
                f"Column {field.name} of the change log must be read as {field.type}, got {column.type}; check its type."
            )
        columns.append(column if column.type.equals(field.type) and not pa.types.is_list(field.type) else column.cast(field.type))
    if not are_utf8(columns):
        raise NotUtf8("not UTF-8")
    return pa.RecordBatch.from_arrays(columns, schema=BATCH_SCHEMA)


def key(batch: pa.RecordBatch, row: int) -> tuple[int, int]:
    """(timestamp in microseconds, pk) of a row."""
    return batch.column("timestamp")[row].value, batch.column("pk")[row].as_py()


def row_fault(error: BaseException) -> str | None:
    """Why a single row cannot be read: a SQLSTATE or ``undecodable``; None where the failure is not about a row."""
    code: str | None = getattr(error, "sqlstate", None)
    if code is None and _UNDECODABLE in str(error):
        return "undecodable"
    return code if code in _OF_A_ROW else None


def explained(error: BaseException) -> SourceError:
    """Our error for one of ``FAILURES``."""
    if isinstance(error, SourceError):
        return error
    if (code := getattr(error, "sqlstate", None)) is not None:
        return explain_sqlstate(code)
    if isinstance(error, OSError | adbc_driver_manager.OperationalError):
        return explain_text(str(error))
    return SourceUnavailable("The stream of events from Postgres broke off; run again.")
