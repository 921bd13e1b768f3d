"""Change-log rows for tests of the read, and the read itself in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql
from psycopg.types.json import Jsonb

from fraiseql_pipeline.changelog.connection import connect
from fraiseql_pipeline.changelog.preflight import preflight
from fraiseql_pipeline.changelog.read import Readers
from fraiseql_pipeline.event import BATCH_SCHEMA
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize

WINDOW = Window(datetime(2026, 11, 20, 10, tzinfo=UTC), WindowSize.HOUR)
EVERYTHING = 2**62


def insert(url: str, **values: Any) -> int:
    """One row with the given columns over sound defaults; returns its pk. Mappings and lists become jsonb."""
    row = {
        "object_type": "Order",
        "modification_type": "INSERT",
        "created_at": WINDOW.start,
        "object_id": "6f1c9d5e-5a53-4f5c-9b53-0c1b5f3f2a11",
        "object_data": {"a": 1},
    }
    row |= values
    row = {name: Jsonb(value) if isinstance(value, dict) else value for name, value in row.items()}
    statement = sql.SQL("INSERT INTO core.tb_entity_change_log ({}) VALUES ({}) RETURNING pk_entity_change_log").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join(sql.Placeholder() * len(row))
    )
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(statement, list(row.values())).fetchone()
    assert found is not None
    return int(found[0])


def fill(url: str, rows: int, at: str, *, payload: str = "jsonb_build_object('n', n)", verb: str = "'INSERT'") -> None:
    """``rows`` rows in one transaction; ``at``, ``payload`` and ``verb`` are SQL over n = 1 … rows."""
    execute(
        url,
        f"""INSERT INTO core.tb_entity_change_log (object_type, modification_type, created_at, object_id, object_data)
        SELECT 'Order', {verb}, {at}, gen_random_uuid(), {payload} FROM generate_series(1, {rows}) AS n""",
    )


def execute(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def reading(
    url: str, window: Window = WINDOW, settled_pk: int = EVERYTHING, after_pk: int | None = None, **values: Any
) -> Iterator[Iterator[pa.RecordBatch]]:
    """The batches of a window, over connections of their own."""
    with connect(url) as connection:
        contract = preflight(connection)
    readers = Readers(url, Settings(**values))
    try:
        with readers.read(contract, window, settled_pk, after_pk) as batches:
            yield batches
    finally:
        readers.close()


def read(url: str, window: Window = WINDOW, settled_pk: int = EVERYTHING, after_pk: int | None = None, **values: Any) -> pa.Table:
    """A whole window."""
    with reading(url, window, settled_pk, after_pk, **values) as batches:
        return pa.Table.from_batches(batches, BATCH_SCHEMA)


def read_one(url: str, window: Window = WINDOW, **values: Any) -> dict[str, Any]:
    """The only event of a window."""
    events = read(url, window, **values).to_pylist()
    assert len(events) == 1
    return events[0]


class Pool:
    """``Readers`` after a preflight."""

    def __init__(self, url: str, **values: Any) -> None:
        with connect(url) as connection:
            self._contract = preflight(connection)
        self.readers = Readers(url, Settings(**values))

    def reading(self, window: Window = WINDOW) -> AbstractContextManager[Iterator[pa.RecordBatch]]:
        return self.readers.read(self._contract, window, EVERYTHING)

    def read(self, window: Window = WINDOW) -> pa.Table:
        with self.reading(window) as batches:
            return pa.Table.from_batches(batches, BATCH_SCHEMA)


@contextmanager
def pool(url: str, **values: Any) -> Iterator[Pool]:
    """Reads over connections that are kept."""
    kept = Pool(url, **values)
    try:
        yield kept
    finally:
        kept.readers.close()


def keys(events: pa.Table) -> list[tuple[int, int]]:
    """(timestamp in microseconds, pk) of each event."""
    return list(zip(events["timestamp"].cast(pa.int64()).to_pylist(), events["pk"].to_pylist(), strict=True))


def expected_keys(url: str, window: Window = WINDOW) -> list[tuple[int, int]]:
    """The same straight from the table."""
    rows = execute(
        url,
        """SELECT (extract(epoch FROM created_at) * 1000000)::bigint, pk_entity_change_log FROM core.tb_entity_change_log
        WHERE created_at >= %s AND created_at < %s ORDER BY created_at, pk_entity_change_log""",
        window.start,
        window.end,
    )
    return [(int(at), int(pk)) for at, pk in rows]
