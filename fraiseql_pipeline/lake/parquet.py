"""Parquet as this lake writes it: how rows become files, and what a file says about itself in the Delta log.

What lives here: ``FileWriter`` (rows in, closed staged files out), its settings and the numbers that chose them. What must not: Delta
commits, windows.

Invariants
 1. A row group holds exactly ``ROW_GROUP_ROWS`` rows, but the last of a file, or fewer when the rows are huge (``ROW_GROUP_BYTES``).
 2. Rows stay in the order they were written. Nothing but the pending row group is held in memory.
 3. ``event_date`` is the partition value, so it is not in the file.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import LakeUnavailable
from fraiseql_pipeline.event import PARTITION, SORT_KEYS
from fraiseql_pipeline.lake.storage import LocalStorage, ObjectStorage, storage_errors
from fraiseql_pipeline.window import from_micros, to_micros

#: Rows per row group: one Flight batch of the cache, and small enough that 400 MB hold a writer and a reader.
ROW_GROUP_ROWS = 131_072
#: A row group ends early when its rows take more than this in memory: they wait as they were read until the group is whole. So events of more
#: than about 380 bytes make groups of fewer rows, those of 820 some 61,000. It is what bounds the memory of a writer.
ROW_GROUP_BYTES = 48 << 20
#: On 393,216 order-like events, 2 cores: level 1 wrote 0.80 M rows/s at 131.1 B/row, level 3 0.52 M rows/s at 136.0 B/row.
#: Few distinct keys in short JSON documents compress no better with the longer search.
ZSTD_LEVEL = 1
#: Columns with few distinct values per row group. ``entity_id`` is not: with a dictionary it was slower and not smaller.
DICTIONARY = (
    "event_type", "entity_type", "user_id", "org_id", "updated_fields.list.element", "change_status", "actor_type", "acting_for",
    "schema_version", "cdc_source", "reasons.list.element", "window_key",
)  # fmt: skip
#: Integers and times: packed differences; the sorted ones take next to nothing.
PACKED = ("timestamp", "pk", "seq", "duration_ms", "started_at", "commit_time")
#: Columns whose extremes help somebody skip a row group; none of the JSON columns.
STATISTICS = ("event_id", "event_type", "entity_type", "entity_id", "timestamp", "user_id", "org_id", "pk", "seq", "window_key")
#: Random ids, looked up one by one: 3 bytes per row and 10 % of the writer's time for both.
BLOOM = ("event_id", "entity_id")
BLOOM_FALSE_POSITIVES = 0.01
#: Columns whose extremes also go to the Delta log, where every reader skips whole files with them.
LOGGED = ("event_type", "entity_type", "timestamp", "org_id", "pk", "window_key")
#: A longer string is bounded in the log by its beginning. It cannot be left out: of a column without extremes delta-rs 1.6.6 tells
#: pyarrow that no row of the file is like anything, and the file is passed over. Accepted names have at most 255 characters,
#: rejected ones any number.
LOGGED_CHARACTERS = 64
_LAST_CHARACTER = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class NewFile:
    """A closed staged file: where it lies, where it will lie, and its ``add`` entry in the log. ``low`` to ``high`` (µs) holds its rows."""

    staged: str
    path: str
    date: str
    rows: int
    size: int
    stats: str
    written_ms: int

    def add(self, data_change: bool = True) -> dict[str, Any]:
        """The ``add`` action (Delta protocol, "Add File")."""
        return {
            "path": self.path,
            "partitionValues": {PARTITION: self.date},
            "size": self.size,
            "modificationTime": self.written_ms,
            "dataChange": data_change,
            "stats": self.stats,
        }


class FileWriter:
    """Writes batches of one date into as many files as they need."""

    def __init__(self, storage: LocalStorage | ObjectStorage, schema: pa.Schema, date: str, prefix: str, *, ordered: bool) -> None:
        self._storage = storage
        self._schema = pa.schema([f.remove_metadata() for f in schema if f.name != PARTITION])
        self._date = date
        self._prefix = prefix
        self._ordered = ordered
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._sink: pa.NativeFile | None = None
        self._staged = ""
        self._path = ""
        self._footers: list[pq.FileMetaData] = []
        self.files: list[NewFile] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch that has the schema's columns, ``event_date`` or not."""
        if not batch.num_rows:
            return
        self._pending.append(batch.select(self._schema.names))
        self._pending_rows += batch.num_rows
        self._pending_bytes += batch.nbytes
        while self._pending_rows >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush(self._pending_rows)

    def close(self) -> list[NewFile]:
        """Write what is pending and close the last file; durable on local disks when this returns."""
        if self._pending_rows:
            self._flush(self._pending_rows)
        self._end_file()
        return self.files

    def abort(self) -> None:
        """Give up: close without finishing and delete every file of this writer that was not renamed in.

        Never raises: what cannot be deleted is left to ``maintain``.
        """
        if self._sink is not None:
            if self._writer is not None:
                self._writer.is_open = False  # or it would write a footer when it is collected
                self._writer = None
            with suppress(OSError):  # the disk may be full: that may be why we are here
                self._storage.close_staged(self._staged, self._sink)
            self._sink = None
            self._drop(self._staged)
        for file in self.files:
            self._drop(file.staged)
        self.files = []

    def _drop(self, staged: str) -> None:
        with suppress(OSError, LakeUnavailable):  # no reader sees it: what brought us here matters more
            self._storage.delete(staged)

    def _flush(self, rows: int) -> None:
        table = pa.Table.from_batches(self._pending, self._schema)
        rest = table.slice(rows)
        self._pending = rest.to_batches() if rest.num_rows else []
        self._pending_rows = rest.num_rows
        self._pending_bytes = rest.nbytes if rest.num_rows else 0
        with storage_errors("writing a data file"):
            if self._writer is None:
                self._begin_file(rows)
            assert self._writer is not None
            assert self._sink is not None
            self._writer.write_table(table.slice(0, rows), row_group_size=rows)
            if self._sink.tell() >= self._storage.file_bytes:
                self._end_file()

    def _begin_file(self, rows: int) -> None:
        self._path = f"{PARTITION}={self._date}/{self._prefix}.{len(self.files):05d}.{uuid.uuid4().hex}.parquet"
        self._staged, self._sink = self._storage.stage(self._path)
        self._footers = []
        self._writer = _writer(self._sink, self._schema, rows, ordered=self._ordered, footers=self._footers)

    def _end_file(self) -> None:
        if self._writer is None or self._sink is None:
            return
        with storage_errors("closing a data file"):
            self._writer.close()
            footer = self._footers[0]
            size = self._sink.tell()
            self._storage.close_staged(self._staged, self._sink)
        self._writer = self._sink = None
        self.files.append(
            NewFile(
                staged=self._staged,
                path=self._path,
                date=self._date,
                rows=footer.num_rows,
                size=size,
                stats=json.dumps(_logged_statistics(footer), separators=(",", ":"), ensure_ascii=False),
                written_ms=time.time_ns() // 1_000_000,
            )
        )


def _writer(
    sink: pa.NativeFile | str, schema: pa.Schema, rows: int, *, ordered: bool, footers: list[pq.FileMetaData] | None = None
) -> pq.ParquetWriter:
    """``rows``: of the first row group. ``ordered``: rows will come in (timestamp, pk) order."""
    names = set(schema.names)
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[c for c in DICTIONARY if c.split(".")[0] in names],
        column_encoding={c: "DELTA_BINARY_PACKED" for c in PACKED if c in names},
        write_statistics=[c for c in STATISTICS if c in names],
        write_page_index=True,
        # Sized for this file: a filter for a full row group would be larger than a small window's data.
        bloom_filter_options={c: {"ndv": rows, "fpp": BLOOM_FALSE_POSITIVES} for c in BLOOM},
        sorting_columns=pq.SortingColumn.from_ordering(schema, SORT_KEYS) if ordered else None,
        metadata_collector=footers,
    )


def write_file(path: str, rows: pa.Table) -> None:
    """One local file as this lake writes them, of one row group, for readers in this process: not durable and of no table.

    ``rows``: ``LAKE_SCHEMA``, one date, at least one row, in (timestamp, pk) order.
    """
    kept = rows.drop_columns([PARTITION]).replace_schema_metadata()
    with _writer(path, kept.schema, kept.num_rows, ordered=True) as writer:
        writer.write_table(kept, row_group_size=kept.num_rows)


def _logged_statistics(footer: pq.FileMetaData) -> dict[str, Any]:
    """Delta's per-file statistics. Extremes are exact but for long strings, which get bounds, as the protocol allows; a column without a value
    has only its null count.
    """
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
    for name in LOGGED:
        if name not in columns:
            continue
        found = [footer.row_group(g).column(columns[name]).statistics for g in range(footer.num_row_groups)]
        if any(s is None or not s.has_null_count for s in found):
            continue
        nulls[name] = sum(s.null_count for s in found)
        valued = [s for s in found if s.num_values]
        if not valued:
            continue
        if footer.schema.column(columns[name]).physical_type == "BYTE_ARRAY":
            low[name], high[name] = _text_bounds([(s.min_raw, s.max_raw) if s.has_min_max else None for s in valued])
        elif all(s.has_min_max for s in valued):
            smallest, largest = min(s.min_raw for s in valued), max(s.max_raw for s in valued)
            low[name], high[name] = (log_time(smallest), log_time(largest)) if name == "timestamp" else (smallest, largest)
    return {"numRecords": footer.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}


def _text_bounds(extremes: Sequence[tuple[bytes | str, bytes | str] | None]) -> tuple[str, str]:
    """Bounds of strings that lie between these; ``None`` stands for strings so long (4 kB) that Parquet does not tell."""
    if any(pair is None for pair in extremes):
        return "", _LAST_CHARACTER * LOGGED_CHARACTERS
    texts = [v.decode() if isinstance(v, bytes) else v for pair in extremes if pair is not None for v in pair]
    low, high = min(texts), max(texts)
    return low[:LOGGED_CHARACTERS], high if len(high) <= LOGGED_CHARACTERS else _above(high)


def _above(text: str) -> str:
    """A string of ``LOGGED_CHARACTERS`` at most that is greater than a longer one: its beginning, with the last character raised that can be."""
    kept = text[:LOGGED_CHARACTERS].rstrip(_LAST_CHARACTER)
    if not kept:
        return text
    raised = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if raised == 0xD800 else raised)  # between them lie the halves of pairs, which are no characters


def log_time(micros: int) -> str:
    """A time in the log's form. Microseconds are written out: cut to milliseconds, a maximum would lie below the rows it bounds."""
    # Not strftime, which writes the year 202 with three digits.
    return from_micros(micros).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_log_time(text: str) -> tuple[int, bool] | None:
    """Microseconds since 1970 of a time in the log, and whether all its digits are there (most writers cut to milliseconds).

    None for a text that is no such time: statistics that nobody can read only fail to spare a file.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    _, _, fraction = text.partition(".")
    digits = len(fraction.rstrip("Z").split("+")[0].split("-")[0])
    return to_micros(at), digits >= 6
