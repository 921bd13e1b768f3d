"""Filling a database with sample events, fast; and databases made to be filled.

What lives here: creating the contract, the load, scratch databases. What must not: how the events look (``sample.py``), a write into a
log that holds events nobody asked to mix with samples.

The load is bound by Postgres: of its CPU time a typical event takes 5.3 µs in COPY's binary format (8.6 as text, of which parsing UUIDs and
times is most) without the five secondary indexes, which cost 3 when they are built afterwards; making the event and encoding it takes
2.8. So two connections COPY side by side while the next slice is made, and an empty log gets its indexes at the end. Keys are reserved
first and given explicitly, so that they follow the time although two connections write.

Measured, 500,000 events on 2 cores that Postgres shares: 131,000 typical events/s and 78,000 wide ones; as text 89,000 and 63,000.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import polars as pl
import psycopg

from fraiseql_pipeline.changelog import embedded
from fraiseql_pipeline.changelog.connection import SESSION, TABLE, connect, is_direct, opened, sql, translated
from fraiseql_pipeline.changelog.contract import ACCEPTED_TYPES
from fraiseql_pipeline.changelog.samples import sample
from fraiseql_pipeline.changelog.samples.binary import copied
from fraiseql_pipeline.errors import InputError, SourceRefused

#: How many events the embedded log gets when nobody fills it on purpose.
EMBEDDED_EVENTS = 300_000

#: Told after every slice how many events it wrote.
Progress = Callable[[int], None]

#: Below this the statements cost more than they save.
_WORTH_INDEXING_LATER = 50_000

#: What connections that write samples set beyond the others.
_WRITING = {"default_transaction_read_only": "off", "synchronous_commit": "off", "idle_in_transaction_session_timeout": "0"}

_DATABASE = "fraiseql"
_CONNECTIONS = 2
_COLUMNS = ("pk_entity_change_log", "seq", *sample.COLUMNS)
_TYPES = {name: ACCEPTED_TYPES[name][0] for name in _COLUMNS}
_COPY = f"COPY {TABLE} ({', '.join(_COLUMNS)}) FROM STDIN (FORMAT binary)"


class Located(Protocol):
    """What has a database: a ``ChangeLog``."""

    @property
    def url(self) -> str: ...


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What was written: ``quarantined_rows`` of the ``events`` are unsound and ``unplaced_rows`` belong to no window."""

    events: int
    quarantined_rows: int
    unplaced_rows: int
    first: datetime
    last: datetime
    seconds: float


def write_sample(
    changelog: Located,
    events: int,
    *,
    days: int = 2,
    end: datetime,
    seed: int = 1,
    shape: sample.ShapeName = "typical",
    progress: Progress | None = None,
    append: bool = False,
) -> SampleSummary:
    """Fill a change log with so many sample events of the ``days`` before ``end`` (exclusive); creates the contract where it is missing.

    The same seed and ``shape`` (``typical`` or ``wide``) give the same events. Nothing of them settles before all of them are written, and of
    a sample that fails or is interrupted nothing stays. Raises ``SourceRefused`` when the log already holds events, unless ``append``.
    """
    if events < 1 or days < 1:
        raise InputError(f"A sample needs at least one event and one day, got {events} events and {days} days.")
    began = time.perf_counter()
    create_contract(changelog.url)
    with _writing(changelog.url) as connection:
        if connection.execute("SELECT pg_try_advisory_lock(hashtext('fraiseql-pipeline sample is written'))").fetchone() != (True,):
            raise SourceRefused("Another sample is being written into this change log; wait for it.")
        if not append and connection.execute(f"SELECT 1 FROM {TABLE} LIMIT 1").fetchone():
            raise SourceRefused(
                "The change log already holds events, and samples are written into an empty one only; name an empty database in "
                "FRAISEQL_DATABASE_URL, or remove .fraiseql/ to begin anew with the embedded one."
            )
        _check_types(connection)
        planned = sample.plan(events, days=days, end=end, seed=seed, shape=shape)
        with nullcontext() if append or events < _WORTH_INDEXING_LATER else _indexed_later(changelog.url, connection):
            _write_all(changelog.url, connection, planned, events, progress)
        connection.execute(f"ANALYZE {TABLE}")
    seconds = time.perf_counter() - began
    return SampleSummary(events, planned.quarantined_rows, planned.unplaced_rows, planned.first, planned.last, seconds)


def create_contract(url: str) -> None:
    """The empty change log of FraiseQL's contract, where the database has none yet. Any number of processes may ask at once."""
    with _writing(url) as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('fraiseql-pipeline contract'))")
        if connection.execute(f"SELECT to_regclass('{TABLE}')").fetchone() == (None,):
            connection.execute(sql("contract"))


def embedded_changelog(server_url: str, *, create: bool, events: int) -> str | None:
    """URL of the change log on the embedded server; None where it holds no events.

    ``events``: fills an empty one with so many of the last two days. ``create``: an empty one is what is wanted.
    """
    url = embedded.database_url(server_url, _DATABASE)
    if create or events:
        with _writing(server_url) as connection, suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            if not _has_database(connection):
                connection.execute(f"CREATE DATABASE {_DATABASE}")
        create_contract(url)
    if create:
        return url
    with connect(server_url) as connection:
        if not _has_database(connection):
            return None
    with _writing(url) as connection:
        if connection.execute(f"SELECT to_regclass('{TABLE}')").fetchone() == (None,):
            return None
        if events:
            # Held while filling, so that processes started together fill once: they wait as long as it takes.
            connection.execute("SET lock_timeout = 0")
            connection.execute("SELECT pg_advisory_lock(hashtext('fraiseql-pipeline sample'))")
        if connection.execute(f"SELECT 1 FROM {TABLE} LIMIT 1").fetchone():
            return url
        if not events:
            return None
        write_sample(_Url(url), events, end=datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    return url


def _has_database(connection: psycopg.Connection[Any]) -> bool:
    return connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_DATABASE]).fetchone() is not None


@contextmanager
def scratch_database(server_url: str) -> Iterator[str]:
    """URL of a new database with the empty contract on a server, dropped at the end. The role must be allowed to create databases."""
    name = f"fraiseql_scratch_{uuid.uuid4().hex[:12]}"
    with _writing(server_url) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        url = embedded.database_url(server_url, name)
        create_contract(url)
        yield url
    finally:
        with _writing(server_url) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@dataclass(frozen=True, slots=True)
class _Url:
    url: str


@contextmanager
def _writing(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with opened(url) as connection, translated():
        if is_direct(connection):
            settings = {**SESSION, **_WRITING}
            connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        yield connection


def _check_types(connection: psycopg.Connection[Any]) -> None:
    """The binary format takes each type for what it is: text in the place of a UUID would be read as its bytes."""
    (table,) = connection.execute("SELECT %s::regclass::oid", [TABLE]).fetchone() or (None,)
    found = {name: kind for name, kind, *_ in connection.execute(sql("preflight_columns"), {"table": table})}
    if wrong := [name for name, kind in _TYPES.items() if found.get(name) != kind]:
        raise SourceRefused(
            f"Samples can only be written into a change log of the present contract; of this one {', '.join(wrong)} is missing or of an older "
            "type. Use an empty database."
        )


@contextmanager
def _reserved(connection: psycopg.Connection[Any], events: int) -> Iterator[tuple[int, int]]:
    """The first pk and seq of a range that nobody else draws from. Not settled before the block ends: its keys are drawn at once, and
    written by other connections later.
    """
    with connection.transaction():
        # Rolled back, so that writers are held up no longer than it takes: what was drawn from a sequence stays drawn, and the sequence stays
        # locked to the end of the outer transaction.
        with connection.transaction(force_rollback=True):
            pk, seq = _reserve(connection, events)
        yield pk, seq


def _reserve(connection: psycopg.Connection[Any], events: int) -> tuple[int, int]:
    names = {"pk_sequence": (TABLE, "pk_entity_change_log"), "seq_sequence": (TABLE, "seq")}
    connection.execute(f"LOCK TABLE {TABLE} IN EXCLUSIVE MODE")
    found = {
        name: (connection.execute("SELECT pg_get_serial_sequence(%s, %s)", where).fetchone() or (None,))[0]
        for name, where in names.items()
    }
    pk, seq, *_ = connection.execute(sql("sample_reserve"), {**found, "events": events - 1}).fetchone() or (1, 1)
    return pk, seq


@contextmanager
def _indexed_later(url: str, connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Drops the secondary indexes and makes them again at the end, also after a failure."""
    indexes = connection.execute(sql("sample_indexes")).fetchall()
    for drop, _ in indexes:
        connection.execute(drop)

    def make(index: tuple[str, str]) -> None:
        with _writing(url) as builder:
            builder.execute("SET maintenance_work_mem = '256MB'")
            builder.execute(index[1])

    try:
        yield
    finally:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(make, indexes))


def _write_all(
    url: str, connection: psycopg.Connection[Any], planned: sample.Sample, events: int, progress: Progress | None
) -> None:
    least = None
    try:
        with _reserved(connection, events) as (least, seq):
            _load(url, planned, least, seq, progress)
    except BaseException:
        if least is not None:
            with suppress(psycopg.Error):  # the first error is the one to tell
                keys = [least, least + events]
                connection.execute(f"DELETE FROM {TABLE} WHERE pk_entity_change_log >= %s AND pk_entity_change_log < %s", keys)
        raise


def _load(url: str, planned: sample.Sample, pk: int, seq: int, progress: Progress | None) -> None:
    slices: queue.Queue[tuple[int, tuple[bytes | memoryview, ...]] | None] = queue.Queue(1)
    failed = threading.Event()

    def write() -> None:
        try:
            with _writing(url) as connection, connection.cursor() as cursor:
                while (item := _take(slices, failed)) is not None:
                    rows, parts = item
                    with cursor.copy(_COPY) as copy:
                        for part in parts:
                            copy.write(part)
                    if progress is not None:
                        progress(rows)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="sample") as pool:
        writers = [pool.submit(write) for _ in range(_CONNECTIONS)]
        try:
            offset = 0
            for rows in planned.slices():
                _put(slices, (len(rows), copied(_numbered(rows, pk + offset, seq + offset), _TYPES)), failed)
                offset += len(rows)
            for _ in writers:
                _put(slices, None, failed)
            for writer in writers:
                writer.result()
        except BaseException:
            failed.set()  # the pool waits for its writers, and they would wait for slices
            raise


def _put(slices: queue.Queue[Any], item: Any, failed: threading.Event) -> None:
    while not failed.is_set():
        with suppress(queue.Full):
            slices.put(item, timeout=0.1)
            return


def _take(slices: queue.Queue[Any], failed: threading.Event) -> Any:
    """The next slice; None when there is no more, or no use."""
    while not failed.is_set():
        with suppress(queue.Empty):
            return slices.get(timeout=0.1)
    return None


def _numbered(rows: pl.DataFrame, pk: int, seq: int) -> pl.DataFrame:
    """The rows with their keys, in the order of ``_COLUMNS``."""
    numbers = pl.int_range(pl.len(), dtype=pl.Int64)
    return rows.with_columns(pk_entity_change_log=numbers + pk, seq=numbers + seq).select(_COLUMNS)
