"""Keeping a lake quick to read: compaction of closed days, vacuum, checkpoints.

What lives here: ``maintain`` and what it did. What must not: a clock (``now`` is an argument), or anything that changes which rows there are.

Invariants
 1. A day is compacted only when it ended ``_HORIZON`` before ``now``: open windows are never in a compaction's way.
 2. A compaction writes the same rows in (timestamp, pk) order and marks them ``dataChange = false``. Rows are counted before, while
    writing and after the commit; a difference is an error and commits nothing.
 3. Nothing younger than the retention is deleted, so pinned readers and writers at work keep their files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from fraiseql_pipeline.errors import InputError, LakeDamaged, LakeUnavailable
from fraiseql_pipeline.lake.entry import File, by_time
from fraiseql_pipeline.lake.parquet import FileWriter, NewFile
from fraiseql_pipeline.lake.publish import ATTEMPTS
from fraiseql_pipeline.lake.read import Snapshot, file_errors
from fraiseql_pipeline.lake.rewrite import conformed
from fraiseql_pipeline.lake.storage import LOG, entry_name
from fraiseql_pipeline.lake.table import Table

#: How long ago a day must have ended: late events of yesterday are still coming.
_HORIZON = timedelta(days=2)
#: Checkpoints that stay: a reader that has just read the pointer may still open an older one.
_KEPT_CHECKPOINTS = 20


@dataclass(frozen=True, slots=True)
class Maintenance:
    """What one call did: days rewritten, files before and after in them, files and leftovers deleted, checkpoints dropped."""

    compacted_days: tuple[str, ...] = ()
    files_before: int = 0
    files_after: int = 0
    deleted_files: int = 0
    deleted_leftovers: int = 0
    dropped_checkpoints: int = 0


def maintain(tables: Sequence[Table], now: datetime, retention: timedelta) -> Maintenance:
    """Compact closed days, delete what no version within the retention needs, write a checkpoint."""
    if retention < timedelta(hours=1):
        raise InputError(f"The retention must be at least one hour, or readers lose the files they read; got {retention}.")
    done: list[str] = []
    before = after = deleted = leftovers = dropped = 0
    for table in tables:
        if not table.refresh():
            continue
        for day, files in sorted(table.files.items()):
            closed = datetime.combine(date.fromisoformat(day), time(), UTC) + timedelta(days=1) <= now - _HORIZON
            if closed and len(files) > -(-sum(f.size for f in files.values()) // table.storage.file_bytes):
                count = _compact(table, day)
                if count:
                    done.append(f"{table.name} {day}")
                    before, after = before + count[0], after + count[1]
        deleted += _vacuum(table, retention)
        leftovers += _clear_staging(table, now, retention)
        table.refresh()
        table.checkpoint()
        dropped += _drop_checkpoints(table)
    return Maintenance(tuple(done), before, after, deleted, leftovers, dropped)


def _compact(table: Table, day: str) -> tuple[int, int] | None:
    """Rewrite one day as one ordered run of files; (files before, after), or ``None`` if it changed meanwhile."""
    old = list(table.files.get(day, {}).values())
    expected = sum(_rows(table, f) for f in old)
    writer = FileWriter(table.storage, table.schema, day, f"day-{day}", ordered=table.span == "timestamp")
    try:
        for batch in _ordered_rows(table, day, old):
            writer.write(batch)
        new = writer.close()
        if sum(f.rows for f in new) != expected:
            raise LakeDamaged(
                f"Compacting {day} of {table.name} would turn {expected} rows into {sum(f.rows for f in new)}; run fsck."
            )
        table.storage.rename_in({f.staged: f.path for f in new})
        writer.files = []  # from here on an entry may name them, whatever is reported of it
    finally:
        writer.abort()
    return (len(old), len(new)) if _commit(table, day, old, new, expected) else None


def _commit(table: Table, day: str, old: list[File], new: list[NewFile], rows: int) -> bool:
    for _ in range(ATTEMPTS):
        with table.lock:
            table.refresh()
            present = table.files.get(day, {})
            if new and all(f.path in present for f in new):
                return True  # the last try was taken, although a failure was reported
            if any(f.path not in present for f in old):
                break
            total = sum(_rows(table, f) for f in present.values())
            version = table.commit(new, old, {"compacted": day, "rows": rows}, None, data_change=False)
            if version is None:
                continue
            # A run that published right behind it is in the state by now, and may well have changed how many rows there are.
            if table.version == version and sum(_rows(table, f) for f in table.files[day].values()) != total:
                raise LakeDamaged(
                    f"The rows of {day} of {table.name} changed in a compaction; restore the version before it and run fsck."
                )
            return True
    for file in (
        new if table.storage.local else []
    ):  # of an object store nobody knows what it is still about to take; vacuum finds them later
        with suppress(OSError):  # or vacuum finds it later
            table.storage.delete(file.path)
    return False


def _ordered_rows(table: Table, day: str, files: list[File]) -> Iterator[pa.RecordBatch]:
    if table.span == "timestamp":
        start = datetime.combine(date.fromisoformat(day), time(), UTC)
        snapshot = Snapshot(table.version, by_time(files), {}, table.storage)
        yield from snapshot.read(start, start + timedelta(days=1))
        return
    for file in by_time(files):
        with file_errors(file), pq.ParquetFile(table.storage.open(file.path)) as source:
            for batch in source.iter_batches(batch_size=16_384):
                yield conformed(batch, table.schema)


def _rows(table: Table, file: File) -> int:
    if file.rows is not None:
        return file.rows
    with file_errors(file), pq.ParquetFile(table.storage.open_footer(file.path)) as source:
        return int(source.metadata.num_rows)


def _vacuum(table: Table, retention: timedelta) -> int:
    """Delete files that no version within the retention lists, orphans of dead writers too (by their age)."""
    try:
        opened = DeltaTable(table.storage.uri, storage_options=table.storage.options or None)
        before = opened.version()
        gone = opened.vacuum(
            retention_hours=int(retention / timedelta(hours=1)), dry_run=False, enforce_retention_duration=False, full=True
        )
        opened.update_incremental()
    except (DeltaError, OSError) as error:
        raise LakeUnavailable(f"{table.name} could not be vacuumed ({type(error).__name__}); run it again.") from None
    # delta-rs tells in entries of its own that it begins and ends.
    table.storage.sync_log([entry_name(version) for version in range(before + 1, opened.version() + 1)])
    return len(gone)


def _clear_staging(table: Table, now: datetime, retention: timedelta) -> int:
    old = [n for n, at in table.storage.staged().items() if at < (now - retention).timestamp()]
    for name in old:
        table.storage.delete(name)
    return len(old)


def _drop_checkpoints(table: Table) -> int:
    """Delete all but the newest checkpoints: every log entry is kept, so nothing depends on the older ones."""
    old = sorted(n for n in table.storage.names(LOG) if n.endswith(".checkpoint.parquet"))[:-_KEPT_CHECKPOINTS]
    for name in old:
        table.storage.delete(name)
    return len(old)
