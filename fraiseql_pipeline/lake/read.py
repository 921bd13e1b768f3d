"""Reading events in order from one pinned version.

What lives here: ``Snapshot``, and the sweep that turns files into (timestamp, pk) order. What must not: the log, commits, the wire.

Invariants
 1. Every row of the asked range comes exactly once, in (timestamp, pk) order, whoever wrote or compacted the files: the order
    inside a file is checked, never trusted.
 2. Memory is bounded by ``HELD_ROWS`` and ``HELD_BYTES``: a row group is loaded when the sweep reaches its first event and let go
    when it has been passed. Row groups that overlap too much, or are too large, are read once per piece of their range instead.
    Ranges are of (timestamp, pk), not of time: one transaction may write any number of events in one instant.
 3. A missing or short file is ``LakeDamaged``; a read never just ends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property, reduce
from itertools import count, pairwise
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import InputError, LakeDamaged, LakeUnavailable
from fraiseql_pipeline.event import LAKE_SCHEMA, ORDER, PARTITION, QUARANTINE_SCHEMA, SORT_KEYS, in_order
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.facts import Commit
from fraiseql_pipeline.lake.parquet import ROW_GROUP_BYTES, ROW_GROUP_ROWS
from fraiseql_pipeline.window import FOREVER, Window, as_utc, to_micros

#: Rows of overlapping row groups that may be in memory together; beyond, the region is read in pieces.
HELD_ROWS = 3 * ROW_GROUP_ROWS
#: The same in bytes, which is what counts where events are large. A column of more than 2 GiB cannot be sorted at all: its offsets have 32 bits.
HELD_BYTES = 4 * ROW_GROUP_BYTES
#: What is decoded at a time while a row group is read in pieces.
_DECODED_ROWS, _DECODED_BYTES = 16_384, 16 << 20

#: A place in the order of events: microseconds and pk.
_Key = tuple[int, int]
_FIRST_PK, _LAST_PK = -(1 << 63), (1 << 63) - 1


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
    return pa.concat_tables(_by_pk(pa.concat_tables(tables))).select(names)


def _by_pk(rows: pa.Table) -> list[pa.Table]:
    """The rows ordered by pk, in tables small enough to be sorted (see ``HELD_BYTES``)."""
    if rows.nbytes <= HELD_BYTES:
        return [rows.sort_by("pk")]
    pk = rows["pk"]
    middle = pk.take(pc.sort_indices(pk)[rows.num_rows // 2 :][:1])[0]
    return [
        *_by_pk(rows.filter(pc.less(pk, middle))),
        rows.filter(pc.equal(pk, middle)),
        *_by_pk(rows.filter(pc.greater(pk, middle))),
    ]


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
    """A row group whose rows lie in [low, high]; ``size``: of the columns to be loaded, decompressed."""

    source: _OpenFile
    index: int
    low: _Key
    high: _Key
    rows: int
    size: int


class _Sweep:
    """Moves through the events over files and row groups, smallest first event first."""

    def __init__(self, storage: Opens, start: int, end: int, names: Sequence[str], entity_types: tuple[str, ...]) -> None:
        self._storage = storage
        self._start: _Key = (start, _FIRST_PK)
        self._end: _Key = (end, _FIRST_PK)
        self._names = list(names)
        self._types = entity_types
        needed = {*names, *ORDER, *(("entity_type",) if entity_types else ())}
        self._schema = pa.schema([f for f in LAKE_SCHEMA if f.name in needed])
        self._keys = pa.schema([f for f in self._schema if f.name in ORDER or (entity_types and f.name == "entity_type")])
        self._heap: list[tuple[_Key, int, File | _Group]] = []
        self._ties = count()

    def run(self, files: Sequence[File]) -> Iterator[pa.RecordBatch]:
        for file in files:
            self._push(self._start if file.low is None else (file.low, _FIRST_PK), file)
        held: list[pa.Table] = []  # one table, in order, or none
        groups: list[_Group] = []  # whose rows are held
        passed = self._start  # every row before it has been emitted
        while self._heap:
            _, _, item = heapq.heappop(self._heap)
            if isinstance(item, File):
                self._open(item)
                continue
            groups = [*(g for g in groups if g.high >= passed), item]
            rows = None
            if sum(g.size for g in groups) <= HELD_BYTES and (len(groups) == 1 or sum(g.rows for g in groups) <= HELD_ROWS):
                rows = _ordered([*held, self._load(item, passed)])
            if rows is None:
                reached = self._gather(groups)
                yield from self._in_pieces(groups, passed, reached)
                held, groups, passed = [], [], reached
                continue
            upto = self._heap[0][0] if self._heap else self._end
            cut = _first_at(rows, upto)
            yield from self._batches(rows.slice(0, cut))
            held, passed = ([rows.slice(cut)] if cut < rows.num_rows else []), max(passed, upto)
        for rows in held:  # until a file that turned out to have no row group to load
            yield from self._batches(rows)

    def _push(self, low: _Key, item: File | _Group) -> None:
        heapq.heappush(self._heap, (max(low, self._start), next(self._ties), item))

    def _open(self, file: File) -> None:
        with file_errors(file):
            parquet = pq.ParquetFile(self._storage.open(file.path), pre_buffer=False)
        footer = parquet.metadata
        if file.rows is not None and footer.num_rows != file.rows:
            raise LakeDamaged(f"A data file of {file.date} holds {footer.num_rows} rows, the log says {file.rows}; run fsck.")
        columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
        loaded = [i for path, i in columns.items() if path.partition(".")[0] in self._schema.names]
        # Other writers may store milliseconds, or the 96 bits of old.
        whole = "timeUnit=microseconds" in str(footer.schema.column(columns["timestamp"]).logical_type)
        source = _OpenFile(file, parquet)
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            first, last = _extremes(group.column(columns["timestamp"]).statistics) if whole else (None, None)
            low_pk, high_pk = _extremes(group.column(columns["pk"]).statistics)
            low = (-FOREVER if first is None else first, _FIRST_PK if low_pk is None else low_pk)
            high = (FOREVER if last is None else last, _LAST_PK if high_pk is None else high_pk)
            if low >= self._end or high < self._start or self._lacks_types(group.column(columns["entity_type"]).statistics):
                continue
            size = sum(group.column(i).total_uncompressed_size for i in loaded)
            self._push(low, _Group(source, index, low, high, group.num_rows, size))

    def _lacks_types(self, stats: pq.Statistics | None) -> bool:
        if not self._types or stats is None or not stats.has_min_max:
            return False
        return all(t < stats.min or t > stats.max for t in self._types)

    def _load(self, group: _Group, low: _Key) -> pa.Table:
        """The asked rows of a row group from ``low`` on, in the lake's types."""
        source = group.source
        with file_errors(source.file):
            table = source.parquet.read_row_group(group.index, columns=_present(source, self._schema))
        return _conformed(self._asked(table, group, low, self._end), source.file, self._schema)

    def _asked(self, rows: pa.Table, group: _Group, low: _Key, high: _Key) -> pa.Table:
        """The rows of a row group in [low, high) and of the asked types."""
        masks = []
        if group.low < low or group.high >= high:
            at, pk = rows["timestamp"].cast(LAKE_SCHEMA.field("timestamp").type), rows["pk"]
            masks += [pc.invert(_before(at, pk, low))] if group.low < low else []
            masks += [_before(at, pk, high)] if group.high >= high else []
        if self._types:
            masks.append(pc.is_in(rows["entity_type"], value_set=pa.array(self._types, rows["entity_type"].type)))
        return rows.filter(reduce(pc.and_, masks)) if masks else rows

    # ---------------------------------------------------------------------------------------------------------------- pieces

    def _gather(self, groups: list[_Group]) -> _Key:
        """Add every row group that overlaps with one of these; the end of their region."""
        reach = max(g.high for g in groups)
        while self._heap and self._heap[0][0] <= reach:
            _, _, item = heapq.heappop(self._heap)
            if isinstance(item, File):
                self._open(item)
            else:
                groups.append(item)
                reach = max(reach, item.high)
        at, pk = reach
        return min((at + 1, _FIRST_PK) if pk == _LAST_PK else (at, pk + 1), self._end)

    def _in_pieces(self, groups: Sequence[_Group], low: _Key, high: _Key, least: int = 1) -> Iterator[pa.RecordBatch]:
        """The rows of [low, high) of row groups that cannot be held: several passes, each over a piece of it, of at ``least`` so many."""
        groups = [g for g in groups if g.low < high and g.high >= low]
        pieces = list(pairwise([low, *self._cuts(groups, low, high, least), high]))
        for start, end in pieces:
            # Rows of one key are not to be parted, and one event, however large, can be held.
            parts = self._load_piece(groups, start, end, bounded=least == 1 or len(pieces) > 1)
            rows = None if parts is None else _ordered(parts, bounded=False)
            if rows is None:
                yield from self._in_pieces(groups, start, end, least=2)
            else:
                yield from self._batches(rows)

    def _cuts(self, groups: Sequence[_Group], low: _Key, high: _Key, least: int) -> list[_Key]:
        """Keys between ``low`` and ``high`` that part the asked rows into pieces of half of what may be held, as far as one can tell."""
        batches = [batch for g in groups for batch in self._stream(g, low, high, self._keys)]
        keys = pa.Table.from_batches(batches, self._keys).select(ORDER).combine_chunks()
        if not keys.num_rows:
            return []
        size = sum(g.size for g in groups) / sum(g.rows for g in groups)
        rows = min(HELD_ROWS // 2, int(HELD_BYTES / 2 / max(size, 1)), -(-keys.num_rows // least))
        order = pc.sort_indices(keys, sort_keys=SORT_KEYS)
        at, pk = keys["timestamp"], keys["pk"]
        firsts = (order[i].as_py() for i in range(0, keys.num_rows, max(rows, 1)))
        return sorted({key for i in firsts if low < (key := (at[i].value, pk[i].as_py())) < high})

    def _load_piece(self, groups: Sequence[_Group], low: _Key, high: _Key, *, bounded: bool) -> list[pa.Table] | None:
        """The asked rows in [low, high); ``None`` if they are more than may be held."""
        batches: list[pa.RecordBatch] = []
        rows = size = 0
        for group in groups:
            if group.low < high and group.high >= low:
                for batch in self._stream(group, low, high, self._schema):
                    batches.append(batch)
                    rows, size = rows + batch.num_rows, size + batch.nbytes
                    if bounded and (rows > HELD_ROWS or size > HELD_BYTES):
                        return None
        return [pa.Table.from_batches(batches, self._schema)]

    def _stream(self, group: _Group, low: _Key, high: _Key, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The asked rows of a row group in [low, high), decoded in small steps: it may be far larger than what is taken of it."""
        source = group.source
        step = max(1, min(_DECODED_ROWS, group.rows * _DECODED_BYTES // max(group.size, 1)))
        with file_errors(source.file):
            for batch in source.parquet.iter_batches(step, row_groups=[group.index], columns=_present(source, schema)):
                rows = self._asked(pa.table(batch), group, low, high)
                if rows.num_rows:
                    yield from _conformed(rows, source.file, schema).to_batches()

    def _batches(self, rows: pa.Table) -> Iterator[pa.RecordBatch]:
        if rows.num_rows:
            yield from rows.select(self._names).combine_chunks().to_batches(max_chunksize=ROW_GROUP_ROWS)


def _extremes(stats: pq.Statistics | None) -> tuple[int | None, int | None]:
    return (stats.min_raw, stats.max_raw) if stats is not None and stats.has_min_max else (None, None)


def _present(source: _OpenFile, schema: pa.Schema) -> list[str]:
    """The columns of a schema that the file has."""
    present = set(source.parquet.schema_arrow.names)
    return [n for n in schema.names if n in present]


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


def _ordered(parts: Sequence[pa.Table], *, bounded: bool = True) -> pa.Table | None:
    """The rows in (timestamp, pk) order; sorted only if they are not. ``None`` if they would have to be, and are more than may be held."""
    rows = pa.concat_tables(parts)
    if rows.num_rows < 2:
        return rows
    at, pk = (_one_chunk(column) for column in (rows["timestamp"].cast(pa.int64()), rows["pk"]))
    if in_order(at, pk, strictly=False):
        return rows
    if bounded and rows.nbytes > HELD_BYTES:
        return None
    return rows.combine_chunks().take(pc.sort_indices(pa.table([at, pk], ORDER), sort_keys=SORT_KEYS))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _first_at(rows: pa.Table, key: _Key) -> int:
    """Number of leading rows before a key, in ordered rows."""
    at, pk = rows["timestamp"], rows["pk"]
    low, high = 0, rows.num_rows
    while low < high:
        middle = (low + high) // 2
        if (at[middle].value, pk[middle].as_py()) < key:
            low = middle + 1
        else:
            high = middle
    return low


def _before(at: pa.Array | pa.ChunkedArray, pk: pa.Array | pa.ChunkedArray, key: _Key) -> pa.Array | pa.ChunkedArray:
    """A mask of the rows before a key."""
    micros, least = key
    earlier = pc.less(at, _instant(micros))
    return earlier if least == _FIRST_PK else pc.or_(earlier, pc.and_(pc.equal(at, _instant(micros)), pc.less(pk, least)))


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
