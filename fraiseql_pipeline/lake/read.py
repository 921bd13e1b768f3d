"""Reading events in order from one pinned version.

What lives here: ``Snapshot``, and the sweep that turns files into (timestamp, pk) order. What must not: the log, commits, the wire.

Invariants
 1. Every row of the asked range comes exactly once, in (timestamp, pk) order, whoever wrote or compacted the files: the order inside a file is checked,
    never trusted.
 2. Memory is bounded by ``HELD_ROWS``: a row group is loaded when the sweep reaches its first timestamp and let go when it has been passed. Files
    whose row groups all overlap are read once per slice of time instead.
 3. A missing or short file is ``LakeDamaged``; a read never just ends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from itertools import count, pairwise
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import InputError, LakeDamaged, LakeUnavailable
from fraiseql_pipeline.event import LAKE_SCHEMA, ORDER, PARTITION, QUARANTINE_SCHEMA, in_order
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.facts import Commit
from fraiseql_pipeline.lake.parquet import ROW_GROUP_ROWS
from fraiseql_pipeline.window import FOREVER, Window, as_utc, to_micros

#: Rows of overlapping row groups that may be in memory together; beyond, the region is read in slices of time.
HELD_ROWS = 3 * ROW_GROUP_ROWS


class Opens(Protocol):
    """What files are read from: the storage of the table, or one that has other files beside."""

    def open(self, name: str) -> pa.NativeFile:
        """The bytes of a file, for random access."""


@dataclass(frozen=True)
class Snapshot:
    """One version of ``events``: its files with exact row counts, and the windows published up to it.

    ``files`` are ordered by their first timestamp; ``published`` maps windows to their commits of then.
    ``generation``: another one after the lake was replaced, whose versions are other versions.
    """

    version: int
    files: tuple[File, ...]
    published: Mapping[Window, Commit]
    storage: Opens = field(repr=False)
    generation: int = 0

    @cached_property
    def _lows(self) -> list[int]:
        return [-FOREVER if f.low is None else f.low for f in self.files]

    def files_in(self, start: datetime, end: datetime) -> list[File]:
        """The files that may hold events of [start, end), ordered by their first timestamp."""
        low, high = to_micros(as_utc(start)), to_micros(as_utc(end))
        return [f for f in self.files[: bisect_left(self._lows, high)] if f.touches(low, high)]

    def open(self, file: File) -> pa.NativeFile:
        """The bytes of one of the files, for random access."""
        return self.storage.open(file.path)

    def read(
        self, start: datetime, end: datetime, *, columns: Sequence[str] | None = None, entity_types: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """The events of [start, end) in (timestamp, pk) order, in batches of at most 131,072 rows and never an empty one.

        ``columns`` default to the whole ``LAKE_SCHEMA``; ``entity_types`` to all. Raises ``InputError`` for an unknown column and
        ``LakeDamaged`` when a file is missing or cannot be read.
        """
        names = LAKE_SCHEMA.names if columns is None else list(columns)
        if unknown := [n for n in names if n not in LAKE_SCHEMA.names]:
            raise InputError(f"Unknown columns {unknown}; the lake has {', '.join(LAKE_SCHEMA.names)}.")
        sweep = _Sweep(self.storage, to_micros(as_utc(start)), to_micros(as_utc(end)), names, tuple(entity_types))
        return sweep.run(self.files_in(start, end))


def read_rejected(storage: Opens, files: Iterable[File], window: Window, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one window out of files of ``events_quarantine``, ordered by pk: ``columns`` of ``QUARANTINE_SCHEMA``, all by default.

    A compacted file has the rows of a whole day: only the row groups that may hold the window's are read, one at a time.
    """
    names = QUARANTINE_SCHEMA.names if columns is None else list(columns)
    if unknown := [n for n in names if n not in QUARANTINE_SCHEMA.names]:
        raise InputError(f"Unknown columns {unknown}; the quarantine has {', '.join(QUARANTINE_SCHEMA.names)}.")
    schema = pa.schema([f for f in QUARANTINE_SCHEMA if f.name in {*names, "pk", "window_key"}])
    tables = [schema.empty_table()]
    for file in files:
        with file_errors(file), storage.open(file.path) as opened:
            source = pq.ParquetFile(opened)
            present = [n for n in schema.names if n in source.schema_arrow.names]
            for index in range(source.num_row_groups):
                if _may_hold(source.metadata, index, window.key):
                    group = source.read_row_group(index, columns=present)
                    tables.append(_conformed(group.filter(pc.equal(group["window_key"], window.key)), file, schema))
    return pa.concat_tables(tables).sort_by("pk").select(names)


def _may_hold(footer: pq.FileMetaData, group: int, key: str) -> bool:
    columns = footer.row_group(group)
    at = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == "window_key")
    stats = columns.column(at).statistics
    return stats is None or not stats.has_min_max or bool(stats.min <= key <= stats.max)


@dataclass
class _OpenFile:
    file: File
    parquet: pq.ParquetFile


@dataclass(frozen=True)
class _Group:
    """A row group whose rows lie in [low, high]."""

    source: _OpenFile
    index: int
    low: int
    high: int
    rows: int


class _Sweep:
    """Moves through time over files and row groups, smallest first timestamp first."""

    def __init__(self, storage: Opens, start: int, end: int, names: Sequence[str], entity_types: tuple[str, ...]) -> None:
        self._storage = storage
        self._start = start
        self._end = end
        self._names = list(names)
        self._types = entity_types
        needed = {*names, *ORDER, *(("entity_type",) if entity_types else ())}
        self._load_names = [n for n in LAKE_SCHEMA.names if n in needed]
        self._schema = pa.schema([LAKE_SCHEMA.field(n) for n in self._load_names])
        self._heap: list[tuple[int, int, File | _Group]] = []
        self._ties = count()

    def run(self, files: Sequence[File]) -> Iterator[pa.RecordBatch]:
        for file in files:
            self._push(self._start if file.low is None else max(file.low, self._start), file)
        held: list[pa.Table] = []
        groups: list[_Group] = []  # whose rows are held
        passed = self._start  # every row before it has been emitted
        while self._heap:
            _, _, item = heapq.heappop(self._heap)
            if isinstance(item, File):
                self._open(item)
                continue
            groups = [g for g in groups if g.high >= passed]
            groups.append(item)
            if len(groups) > 1 and sum(g.rows for g in groups) > HELD_ROWS:
                yield from self._in_slices(groups, passed)
                held, groups, passed = [], [], self._reached
                continue
            held.append(self._load(item, passed, self._end))
            upto = self._heap[0][0] if self._heap else self._end
            rows = _ordered(pa.concat_tables(held)) if len(held) > 1 else _ordered(held[0])
            cut = _first_at(rows, upto)
            yield from self._batches(rows.slice(0, cut))
            held, passed = ([rows.slice(cut)] if cut < rows.num_rows else []), max(passed, upto)

    def _push(self, low: int, item: File | _Group) -> None:
        heapq.heappush(self._heap, (low, next(self._ties), item))

    def _open(self, file: File) -> None:
        with file_errors(file):
            parquet = pq.ParquetFile(self._storage.open(file.path), pre_buffer=False)
        footer = parquet.metadata
        if file.rows is not None and footer.num_rows != file.rows:
            raise LakeDamaged(f"A data file of {file.date} holds {footer.num_rows} rows, the log says {file.rows}; run fsck.")
        columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
        source = _OpenFile(file, parquet)
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            low, high = -FOREVER, FOREVER
            stats = group.column(columns["timestamp"]).statistics
            # Other writers may store milliseconds, or the 96 bits of old.
            stored = str(footer.schema.column(columns["timestamp"]).logical_type)
            if stats is not None and stats.has_min_max and "timeUnit=microseconds" in stored:
                low, high = stats.min_raw, stats.max_raw
            if low >= self._end or high < self._start or self._lacks_types(group.column(columns["entity_type"]).statistics):
                continue
            self._push(max(low, self._start), _Group(source, index, low, high, group.num_rows))

    def _lacks_types(self, stats: pq.Statistics | None) -> bool:
        if not self._types or stats is None or not stats.has_min_max:
            return False
        return all(t < stats.min or t > stats.max for t in self._types)

    def _load(self, group: _Group, low: int, high: int) -> pa.Table:
        """The asked rows of a row group in [low, high), in the lake's types."""
        source = group.source
        with file_errors(source.file):
            present = set(source.parquet.schema_arrow.names)
            table = source.parquet.read_row_group(group.index, columns=[n for n in self._load_names if n in present])
        mask = None
        if group.low < low or group.high >= high:
            at = table["timestamp"].cast(LAKE_SCHEMA.field("timestamp").type)
            mask = pc.and_(pc.greater_equal(at, _instant(low)), pc.less(at, _instant(high)))
        if self._types:
            wanted = pc.is_in(table["entity_type"], value_set=pa.array(self._types, table["entity_type"].type))
            mask = wanted if mask is None else pc.and_(mask, wanted)
        if mask is not None:
            table = table.filter(mask)
        return _conformed(table, source.file, self._schema)

    def _in_slices(self, groups: list[_Group], passed: int) -> Iterator[pa.RecordBatch]:
        """The region of row groups that overlap too much to be held: several passes, each over a slice of time."""
        reach = max(g.high for g in groups)
        while self._heap and self._heap[0][0] <= reach:
            _, _, item = heapq.heappop(self._heap)
            if isinstance(item, File):
                self._open(item)
            else:
                groups.append(item)
                reach = max(reach, item.high)
        reach = min(reach, self._end - 1)
        times: list[pa.Array] = []
        for group in groups:
            with file_errors(group.source.file):
                read = group.source.parquet.read_row_group(group.index, columns=["timestamp"])["timestamp"]
            times += read.cast(LAKE_SCHEMA.field("timestamp").type).cast(pa.int64()).chunks
        every = pa.chunked_array(times, pa.int64()).sort()
        cuts = sorted({every[i].as_py() for i in range(0, len(every), HELD_ROWS // 2)})
        bounds = [passed, *(c for c in cuts if passed < c <= reach), reach + 1]
        for low, high in pairwise(bounds):
            parts = [self._load(g, low, high) for g in groups if g.low < high and g.high >= low]
            if parts:
                yield from self._batches(_ordered(pa.concat_tables(parts)))
        self._reached = reach + 1

    def _batches(self, rows: pa.Table) -> Iterator[pa.RecordBatch]:
        if rows.num_rows:
            yield from rows.select(self._names).combine_chunks().to_batches(max_chunksize=ROW_GROUP_ROWS)


def _conformed(table: pa.Table, file: File, schema: pa.Schema) -> pa.Table:
    """The table with the columns and types of ``schema``; the partition column comes from the file's place."""
    columns: list[pa.ChunkedArray | pa.Array] = []
    for wanted in schema:
        if wanted.name == PARTITION:
            columns.append(pa.repeat(pa.scalar(date.fromisoformat(file.date), wanted.type), table.num_rows))
        elif wanted.name not in table.column_names:  # written before the column was there
            columns.append(pa.nulls(table.num_rows, wanted.type))
        else:
            have = table[wanted.name]
            columns.append(have if have.type == wanted.type else have.cast(wanted.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _ordered(rows: pa.Table) -> pa.Table:
    """The rows in (timestamp, pk) order; sorted only if they are not."""
    rows = rows.combine_chunks()
    if rows.num_rows < 2:
        return rows
    at = rows["timestamp"].cast(pa.int64()).combine_chunks()
    pk = rows["pk"].combine_chunks()
    at, pk = (c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for c in (at, pk))
    if in_order(at, pk, strictly=False):
        return rows
    return rows.take(pc.sort_indices(rows, sort_keys=[(name, "ascending") for name in ORDER]))


def _first_at(rows: pa.Table, micros: int) -> int:
    """Number of leading rows before an instant, in ordered rows."""
    at = rows["timestamp"]
    low, high = 0, rows.num_rows
    while low < high:
        middle = (low + high) // 2
        if at[middle].value < micros:
            low = middle + 1
        else:
            high = middle
    return low


def _instant(micros: int) -> pa.Scalar:
    return pa.scalar(micros, pa.int64()).cast(LAKE_SCHEMA.field("timestamp").type)


@contextmanager
def file_errors(file: File) -> Iterator[None]:
    """What goes wrong while a file is read, in this package's words."""
    try:
        yield
    except FileNotFoundError:
        raise LakeDamaged(
            f"A data file of {file.date} is missing (it may have been vacuumed under an old version); run fsck."
        ) from None
    except pa.ArrowInvalid:
        raise LakeDamaged(f"A data file of {file.date} is torn; run fsck, which tells how to repair it.") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's own: the bytes are not what the footer says
            raise LakeDamaged(f"A data file of {file.date} is torn; run fsck, which tells how to repair it.") from None
        raise LakeUnavailable(f"The lake's storage failed while reading {file.date}; run it again.") from None
