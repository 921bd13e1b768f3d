"""Segments: what is read of the lake to make the frames of one stretch of time.

What lives here: the cut of a snapshot into units and groups, and their rows as batches. What must not: frames, tickets, gRPC.

    unit      files whose times overlap; nearly always one, since a file that this package writes holds one window
    group     what is encoded at once and kept together: one row group of a file that is in order, or else a whole unit
    segment   up to 131,072 events of a group that share their dictionaries; fewer where those would not fit a message

Invariants
 1. The segments of a group, and the groups of all units in order, hold every event once in (timestamp, pk) order, whoever wrote the files.
 2. A row group is read alone only if its file says that it is ordered, its columns are the lake's, and no other row group reaches into its
    time; the order inside is checked all the same. Everything else goes through ``Snapshot.read``, which sorts.
 3. What is filtered out leaves nothing behind: not in a buffer, not in a dictionary.
 4. Memory: the columns of few values, times and keys of one row group (about 5 MB), and ``FRAME_BYTES`` of the others at a time.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.encoding import FEW_VALUES, FRAME_BYTES, dictionary_fits
from fraiseql_pipeline.errors import LakeDamaged
from fraiseql_pipeline.event import LAKE_SCHEMA, ORDER, PARTITION, SORT_KEYS, in_order
from fraiseql_pipeline.lake import File, Snapshot, file_errors
from fraiseql_pipeline.window import FOREVER, from_micros, to_micros

#: Files whose row groups are remembered: 300 bytes each.
_REMEMBERED = 50_000
#: Rows read at once, however short they are: more decode no faster, and the first frame waits for them.
_READ_ROWS = 16_384


class Types(tuple[str, ...]):  # noqa: SLOT001 - what is made of them is kept in its __dict__
    """The entity types somebody asks for. A ticket has up to 26,000 of them, so what is made of them is made once for all its batches."""

    @cached_property
    def values(self) -> pa.Array:
        return pa.array(self, pa.string())

    @cached_property
    def digest(self) -> bytes:
        """Stands for them where something is kept: they themselves take 2.5 MB, and whoever reads can ask for ever others."""
        return hashlib.blake2b(json.dumps(self).encode(), digest_size=32).digest()


_EVERY = Types()


@dataclass(frozen=True, slots=True)
class Filter:
    """The events a reader may and wants to see; none: all. ``after_pk``: only those above it."""

    entity_types: Types = _EVERY
    org_id: str | None = None
    after_pk: int | None = None

    def mask(self, column: Callable[[str], pa.Array]) -> pa.Array | None:
        """Which rows are kept; none: all of them."""
        mask = None
        if self.entity_types:
            mask = pc.is_in(column("entity_type"), value_set=self.entity_types.values)
        if self.org_id is not None:
            own = pc.fill_null(pc.equal(column("org_id"), self.org_id), False)
            mask = own if mask is None else pc.and_(mask, own)
        if self.after_pk is not None:
            new = pc.greater(column("pk"), self.after_pk)
            mask = new if mask is None else pc.and_(mask, new)
        return mask

    @property
    def key(self) -> tuple[object, ...]:
        """Names the filter in a few bytes."""
        return (self.entity_types.digest, self.org_id, self.after_pk)

    @property
    def columns(self) -> tuple[str, ...]:
        chosen = {"entity_type": self.entity_types, "org_id": self.org_id is not None, "pk": self.after_pk is not None}
        return tuple(name for name, looked_at in chosen.items() if looked_at)


@dataclass(frozen=True, slots=True)
class Group:
    """``files`` and, where one row group of one file is meant, its number. Rows lie in [``low``, ``high``] (µs).

    ``extremes``: column, least and greatest value, of the columns that a filter looks at; ``pks``: of the keys.
    """

    files: tuple[File, ...]
    index: int | None
    low: int
    high: int
    rows: int | None
    extremes: tuple[tuple[str, str, str], ...] = ()
    pks: tuple[int, int] | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """Names the content: files are never written again under the same name."""
        return (*((file.path, file.size) for file in self.files), self.index)

    def simplified(self, wanted: Filter) -> Filter:
        """A filter that keeps the same events of this group, and is the same for as many readers as possible."""
        if wanted.after_pk is not None and self.pks is not None and self.pks[0] > wanted.after_pk:
            return replace(wanted, after_pk=None)
        return wanted

    def lacks(self, wanted: Filter) -> bool:
        """Whether it certainly has no event of the filter."""
        if wanted.after_pk is not None and self.pks is not None and self.pks[1] <= wanted.after_pk:
            return True
        for column, low, high in self.extremes:
            if column == "entity_type" and wanted.entity_types and all(t < low or t > high for t in wanted.entity_types):
                return True
            if column == "org_id" and wanted.org_id is not None and not low <= wanted.org_id <= high:
                return True
        return False


@dataclass(frozen=True, slots=True)
class Segment:
    """Events with shared dictionaries: ``batches`` yields (batch, time in µs, pk), each batch of the asked columns, none of them empty."""

    dictionaries: dict[str, pa.Array]
    batches: Iterator[tuple[pa.RecordBatch, pa.Array, pa.Array]]


def units(files: Sequence[File]) -> list[int]:
    """Where in ``files``, ordered by their first timestamp, each unit begins."""
    starts: list[int] = []
    reach = -FOREVER
    for number, file in enumerate(files):
        low = -FOREVER if file.low is None else file.low
        if not starts or low > reach:
            starts.append(number)
        reach = max(reach, FOREVER if file.high is None else file.high)
    return starts


class Groups:
    """Finds the groups of units, and remembers what footers say. One may serve many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[object, ...], tuple[Group, ...]] = OrderedDict()

    def of(self, snapshot: Snapshot, unit: tuple[File, ...]) -> tuple[Group, ...]:
        """The groups of a unit, in order."""
        key = tuple((file.path, file.size) for file in unit)
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        found = _in_order(snapshot, unit)
        if found is None:
            low = min(-FOREVER if file.low is None else file.low for file in unit)
            high = max(FOREVER if file.high is None else file.high for file in unit)
            rows = [file.rows for file in unit]
            found = (Group(unit, None, low, high, None if None in rows else sum(r for r in rows if r is not None)),)
        with self._lock:
            self._known[key] = found
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    def known(self, unit: tuple[File, ...]) -> tuple[Group, ...] | None:
        """The same, if it is remembered."""
        with self._lock:
            return self._known.get(tuple((file.path, file.size) for file in unit))


def _in_order(snapshot: Snapshot, unit: tuple[File, ...]) -> tuple[Group, ...] | None:
    """The row groups of a unit's files if they follow each other in time; None if that is not certain."""
    found: list[Group] = []
    for file in unit:
        with file_errors(file), _opened(snapshot, file) as parquet:
            footer = parquet.metadata
            if file.rows is not None and footer.num_rows != file.rows:
                raise LakeDamaged(f"A data file of {file.date} holds {footer.num_rows} rows, the log says {file.rows}; run fsck.")
            wanted = pa.schema([f for f in LAKE_SCHEMA if f.name != PARTITION])
            if not footer.schema.to_arrow_schema().equals(wanted):
                return None
            columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
            order = tuple(columns[name] for name in ORDER)
            for index in range(footer.num_row_groups):
                group = footer.row_group(index)
                declared = tuple(c.column_index for c in group.sorting_columns if not c.descending)
                stats = group.column(columns["timestamp"]).statistics
                if declared[:2] != order or stats is None or not stats.has_min_max:
                    return None
                if found and not _follows(snapshot, found[-1], file, index, stats.min_raw):
                    return None
                extremes = tuple(
                    (name, s.min, s.max)
                    for name in ("entity_type", "org_id")
                    if (s := group.column(columns[name]).statistics) is not None and s.has_min_max
                )
                keys = group.column(columns["pk"]).statistics
                pks = (keys.min, keys.max) if keys is not None and keys.has_min_max else None
                found.append(Group((file,), index, stats.min_raw, stats.max_raw, group.num_rows, extremes, pks))
    return tuple(found)


def _follows(snapshot: Snapshot, before: Group, file: File, index: int, low: int) -> bool:
    """Whether every row of a row group stands behind those of the one before; they often share an instant, then the keys decide."""
    if before.high != low:
        return before.high < low
    ends = []
    for at, number, row in ((before.files[0], before.index, -1), (file, index, 0)):
        with file_errors(at), _opened(snapshot, at) as parquet:
            rows = parquet.read_row_group(number, columns=list(ORDER), use_threads=False)
            ends.append(tuple(rows[name][row].value if name == "timestamp" else rows[name][row].as_py() for name in ORDER))
    return ends[0] <= ends[1]


def segments(
    snapshot: Snapshot, group: Group, columns: Sequence[str], wanted: Filter, span: tuple[int, int] | None = None
) -> Iterator[Segment]:
    """The events of a group that ``wanted`` keeps, as ``columns`` of the lake; ``span``: those in [start, end) only (µs).

    Columns of ``FEW_VALUES`` are dictionaries of exactly the values in the segment, sorted. Segments are read in order, each to its end.
    Raises ``LakeDamaged``.
    """
    if group.index is not None:
        with file_errors(group.files[0]), _opened(snapshot, group.files[0]) as parquet:
            yield from _read_alone(parquet, group, columns, wanted, span)
        return
    names = list(dict.fromkeys((*columns, *ORDER, *wanted.columns)))
    low, high = group.low, group.high + 1
    if span is not None:
        low, high = max(low, span[0]), min(high, span[1])
    # Files of other units do not reach into the time of this one.
    for found in snapshot.read(_instant(low), _instant(high), columns=names):
        mask = wanted.mask(lambda name, batch=found: batch.column(name))  # type: ignore[misc]
        batch = found if mask is None else found.filter(mask)
        if batch.num_rows:
            yield from held(batch, columns)


def _read_alone(
    parquet: pq.ParquetFile, group: Group, columns: Sequence[str], wanted: Filter, span: tuple[int, int] | None
) -> Iterator[Segment]:
    file = group.files[0]
    few = [name for name in FEW_VALUES if name in columns or name in wanted.columns]
    head = parquet.read_row_group(group.index, columns=[*ORDER, *few], use_threads=False)
    at, pk = (_whole(head[name]).cast(pa.int64()) for name in ORDER)
    heads = {name: _whole(head[name]) for name in few}
    mask = wanted.mask(lambda name: pk if name == "pk" else heads[name].dictionary_decode())
    if span is not None:
        inside = pc.and_(pc.greater_equal(at, span[0]), pc.less(at, span[1]))
        mask = inside if mask is None else pc.and_(mask, inside)
    if mask is not None and not pc.any(mask).as_py():
        return
    bulk = [name for name in columns if name not in few and name not in ORDER and name != PARTITION]
    if not in_order(at, pk, strictly=False):
        whole = parquet.read_row_group(group.index, columns=[*ORDER, *few, *bulk], use_threads=False)
        whole = whole.append_column(PARTITION, pa.repeat(_date(file), whole.num_rows))
        whole = whole if mask is None else whole.filter(mask)
        whole = whole.take(pc.sort_indices(whole, sort_keys=SORT_KEYS))
        for batch in whole.combine_chunks().to_batches():
            yield from held(batch, columns)
        return
    stretches = list(_stretches({name: heads[name] for name in few if name in columns}, mask, 0, len(at)))
    reads = _cut(_bulk(parquet, group.index, bulk, len(at)), [stretch.rows for stretch in stretches])

    def batches(stretch: _Stretch) -> Iterator[tuple[pa.RecordBatch, pa.Array, pa.Array]]:
        start, end = stretch.start, stretch.start + stretch.rows
        while start < end:
            read = next(reads)
            rows = read if isinstance(read, int) else read.num_rows
            kept = None if mask is None else mask.slice(start, rows)
            if kept is None or pc.any(kept).as_py():

                def part(values: pa.Array, first: int = start, rows: int = rows, kept: pa.Array | None = kept) -> pa.Array:
                    values = values.slice(first, rows)
                    return values if kept is None else values.filter(kept)

                some = None if isinstance(read, int) else read if kept is None else read.filter(kept)
                times, keys = part(at), part(pk)
                arrays = []
                for name in columns:
                    if name in stretch.indices:
                        indices = part(stretch.indices[name], start - stretch.start)
                        arrays.append(pa.DictionaryArray.from_arrays(indices, stretch.dictionaries[name]))
                    elif name == "timestamp":
                        arrays.append(times.cast(LAKE_SCHEMA.field(name).type))
                    elif name == "pk":
                        arrays.append(keys)
                    elif name == PARTITION:
                        arrays.append(pa.repeat(_date(file), len(times)))
                    else:
                        assert some is not None
                        arrays.append(some.column(name))
                yield pa.RecordBatch.from_arrays(arrays, list(columns)), times, keys
            start += rows

    for stretch in stretches:
        yield Segment(stretch.dictionaries, batches(stretch))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Rows whose columns of few values have dictionaries that fit, and indices into them, one per row (null where it is filtered out)."""

    start: int
    rows: int
    dictionaries: dict[str, pa.Array]
    indices: dict[str, pa.Array]


def _stretches(columns: Mapping[str, pa.DictionaryArray], mask: pa.Array | None, start: int, rows: int) -> Iterator[_Stretch]:
    """``rows`` rows of columns, halved until the dictionaries of each part fit; ``start`` says where they lie in the group."""
    found = {name: _narrowed(column, mask) for name, column in columns.items()}
    if rows > 1 and not all(dictionary_fits(name, values) for name, (values, _) in found.items()):
        # Each half looks at the values of this part only, however many the group has.
        narrowed = {name: pa.DictionaryArray.from_arrays(indices, values) for name, (values, indices) in found.items()}
        for first, count in ((0, rows // 2), (rows // 2, rows - rows // 2)):
            part = {name: column.slice(first, count) for name, column in narrowed.items()}
            yield from _stretches(part, None if mask is None else mask.slice(first, count), start + first, count)
        return
    yield _Stretch(
        start, rows, {name: values for name, (values, _) in found.items()}, {n: indices for n, (_, indices) in found.items()}
    )


def _cut(reads: Iterator[pa.RecordBatch | int], lengths: Sequence[int]) -> Iterator[pa.RecordBatch | int]:
    """What ``_bulk`` gives, cut at the ends of stretches of these lengths."""
    ends = iter(lengths)
    left = next(ends)
    for read in reads:
        rows, first = read if isinstance(read, int) else read.num_rows, 0
        while first < rows:
            count = min(rows - first, left)
            yield count if isinstance(read, int) else read.slice(first, count)
            first, left = first + count, left - count
            if not left:
                left = next(ends, 0)


def _bulk(parquet: pq.ParquetFile, index: int | None, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch | int]:
    """The other columns of a row group, in batches that weigh about a frame; without any, how many rows such a batch has."""
    if not names:
        yield rows
        return
    group = parquet.metadata.row_group(index)
    paths = set(names)
    weight = sum(
        group.column(i).total_uncompressed_size
        for i in range(group.num_columns)
        if group.column(i).path_in_schema.partition(".")[0] in paths
    )
    at_once = max(1, min(_READ_ROWS, FRAME_BYTES * rows // max(weight, 1)))
    yield from parquet.iter_batches(at_once, row_groups=[index], columns=list(names), use_threads=False)


def held(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[Segment]:
    """A batch that is in memory, as segments; it has the columns asked for and those of the order."""
    few = {name: batch.column(name) for name in columns if name in FEW_VALUES}
    encoded = {name: column if pa.types.is_dictionary(column.type) else column.dictionary_encode() for name, column in few.items()}
    for stretch in _stretches(encoded, None, 0, batch.num_rows):
        rows = batch.slice(stretch.start, stretch.rows)
        arrays = [
            pa.DictionaryArray.from_arrays(stretch.indices[name], stretch.dictionaries[name]) if name in few else rows.column(name)
            for name in columns
        ]
        at, pk = (rows.column(name).cast(pa.int64()) for name in ORDER)
        yield Segment(stretch.dictionaries, iter([(pa.RecordBatch.from_arrays(arrays, list(columns)), at, pk)]))


def _narrowed(encoded: pa.DictionaryArray, mask: pa.Array | None) -> tuple[pa.Array, pa.Array]:
    """The values that rows of the mask have, sorted, and all rows as indices into them (null where the value is not among them)."""
    indices = encoded.indices if mask is None else encoded.indices.filter(mask)
    values = encoded.dictionary.take(pc.unique(indices).drop_null())
    values = pc.unique(values)  # another writer's dictionary may hold a value twice
    values = values.take(pc.sort_indices(values))
    places = pc.index_in(encoded.dictionary, value_set=values)
    return values, places.take(encoded.indices)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type) and column.num_chunks > 1:
        column = column.unify_dictionaries()
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


@contextmanager
def _opened(snapshot: Snapshot, file: File) -> Iterator[pq.ParquetFile]:
    with snapshot.open(file) as source, pq.ParquetFile(source, read_dictionary=list(FEW_VALUES), pre_buffer=False) as parquet:
        yield parquet


def _date(file: File) -> pa.Scalar:
    return pa.scalar(date.fromisoformat(file.date), LAKE_SCHEMA.field(PARTITION).type)


def _instant(micros: int) -> datetime:
    first, last = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
    return from_micros(min(max(micros, to_micros(first)), to_micros(last)))
