"""Publishing made-up windows into a lake, and looking at what is there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from deltalake import DeltaTable

from fraiseql_pipeline.event import QUARANTINE_SCHEMA
from fraiseql_pipeline.lake import Commit, Facts, Lake
from fraiseql_pipeline.window import Window
from tests.support.events import batch_events, lake_events

SETTLED_AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
#: Above every pk that the made-up events have.
PK = 1 << 60


def quarantine_events(window: Window, n: int, seed: int = 0, reasons: Sequence[str] = ("entity_id:uuid",)) -> pa.Table:
    """``n`` rejected rows of a window: ``QUARANTINE_SCHEMA``."""
    batch = batch_events(window, n, seed + 1000)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns["reasons"] = pa.array([list(reasons)] * n, QUARANTINE_SCHEMA.field("reasons").type)
    columns["window_key"] = pa.array([window.key] * n)
    columns["event_date"] = pa.array([window.start.date()] * n)
    return pa.Table.from_arrays([columns[f.name] for f in QUARANTINE_SCHEMA], schema=QUARANTINE_SCHEMA)


def publish(
    lake: Lake,
    window: Window,
    events: pa.Table | int = 100,
    quarantined: pa.Table | int = 0,
    *,
    settled_pk: int = PK,
    state: Literal["sealed", "provisional"] = "sealed",
    identity: str = "source",
    run_id: str = "run",
    batch_rows: int = 1000,
    **options: Any,
) -> Commit:
    """Stage and commit; a number stands for that many made-up rows."""
    accepted = lake_events(window, events) if isinstance(events, int) else events
    rejected = quarantine_events(window, quarantined) if isinstance(quarantined, int) else quarantined
    with lake.stage(window) as staged:
        for batch in accepted.to_batches(max_chunksize=batch_rows):
            staged.write(batch)
        for batch in rejected.to_batches(max_chunksize=batch_rows):
            staged.quarantine(batch)
        facts = Facts(settled_pk, state, identity, run_id, SETTLED_AT, accepted.num_rows + rejected.num_rows)
        return lake.commit(staged, facts, **options)


def content(lake: Lake, window: Window, **options: Any) -> pa.Table:
    """What a fresh reader gets for a window."""
    batches = list(Lake(lake.uri, lake.options).read(window.start, window.end, **options))
    return pa.Table.from_batches(batches) if batches else lake_events(window, 0)


def rejected(lake: Lake, window: Window) -> pa.Table:
    """The pks of the quarantined rows of a window, as any Delta reader gets them, in order."""
    table = DeltaTable(lake.quarantine_uri, storage_options=lake.options or None)
    rows = pa.table(table.scan(columns=["pk"], predicate=f"window_key = '{window.key}'"))
    return rows.sort_by("pk")


def assert_plain_protocol(lake: Lake) -> None:
    """Reader 1, writer 2, no features, in both tables."""
    for uri in (lake.events_uri, lake.quarantine_uri):
        protocol = DeltaTable(uri, storage_options=lake.options or None).protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
        assert not protocol.reader_features
        assert not protocol.writer_features
