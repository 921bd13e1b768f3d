"""A window's content on its way in: counted, hashed and encoded while it streams, before anything is published.

What lives here: ``Staged``. What must not: Delta commits.

Invariants
 1. Accepted rows arrive in (timestamp, pk) order and lie in the window; anything else is refused here, before a reader could see it.
 2. Everything a commit has to decide on (counts, hashes, lowest pk, reasons) is known when the last batch was written.
 3. Files that were not published are deleted when the ``with`` block ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import LakeError
from fraiseql_pipeline.event import LAKE_SCHEMA, QUARANTINE_SCHEMA, in_order
from fraiseql_pipeline.lake.content import ContentHash
from fraiseql_pipeline.lake.parquet import FileWriter, NewFile
from fraiseql_pipeline.lake.storage import LocalStorage, ObjectStorage
from fraiseql_pipeline.window import Window


class Staged:
    """What will be one window: write accepted and quarantined batches, then hand it to ``Lake.commit``.

    ``write`` and ``quarantine`` encode in the caller's thread; they are not for several at once.
    """

    def __init__(self, window: Window, events: LocalStorage | ObjectStorage, quarantine: LocalStorage | ObjectStorage) -> None:
        self.window = window
        self.lowest_pk: int | None = None
        self.reasons: Counter[str] = Counter()
        self._start, self._end = window.micros
        date = window.start.date().isoformat()
        prefix = f"window-{window.key.replace(':', '')}"
        self._events = events
        self._quarantine = quarantine
        self._accepted = FileWriter(events, LAKE_SCHEMA, date, prefix, ordered=True)
        self._rejected = FileWriter(quarantine, QUARANTINE_SCHEMA, date, prefix, ordered=False)
        self._accepted_hash = ContentHash(LAKE_SCHEMA)
        self._rejected_hash = ContentHash(QUARANTINE_SCHEMA)
        self._last: tuple[int, int] | None = None
        self._renamed: set[int] = set()

    @property
    def accepted_rows(self) -> int:
        return self._accepted_hash.rows

    @property
    def quarantined_rows(self) -> int:
        return self._rejected_hash.rows

    @property
    def quarantine_hash(self) -> str:
        return self._rejected_hash.hexdigest() if self.quarantined_rows else ""

    @property
    def content_hash(self) -> str:
        """Equal for equal rows in equal order, both halves."""
        return f"{self._accepted_hash.hexdigest()}{self.quarantine_hash}"

    def write(self, accepted: pa.RecordBatch) -> None:
        """Add accepted events: ``LAKE_SCHEMA``, ordered by (timestamp, pk) within and across batches."""
        if not accepted.num_rows:
            return
        batch = _shaped(accepted, LAKE_SCHEMA)
        self._check_order(batch)
        self._accepted_hash.add(batch)
        self._note_pk(batch)
        self._accepted.write(batch)

    def quarantine(self, quarantined: pa.RecordBatch) -> None:
        """Add rejected rows: ``QUARANTINE_SCHEMA``, each with its reasons."""
        if not quarantined.num_rows:
            return
        batch = _shaped(quarantined, QUARANTINE_SCHEMA)
        if pc.any(pc.not_equal(batch["window_key"], self.window.key)).as_py():
            raise LakeError(f"A quarantined row names another window than {self.window}; this is a defect of the reader.")
        self._rejected_hash.add(batch)
        self._note_pk(batch)
        counts = pc.value_counts(batch["reasons"].flatten())
        for value, count in zip(counts.field("values"), counts.field("counts"), strict=True):
            self.reasons[value.as_py()] += count.as_py()
        self._rejected.write(batch)

    def _check_order(self, batch: pa.RecordBatch) -> None:
        at, pk = batch["timestamp"].view(pa.int64()), batch["pk"]
        first, last = (at[0].as_py(), pk[0].as_py()), (at[-1].as_py(), pk[-1].as_py())
        if (self._last is not None and self._last >= first) or not in_order(at, pk):
            raise LakeError(f"The events of {self.window} did not arrive in (timestamp, pk) order; this is a defect of the reader.")
        if first[0] < self._start or last[0] >= self._end:
            raise LakeError(f"An accepted event lies outside {self.window}; this is a defect of the reader.")
        self._last = last

    def _note_pk(self, batch: pa.RecordBatch) -> None:
        lowest = pc.min(batch["pk"]).as_py()
        if lowest is not None and (self.lowest_pk is None or lowest < self.lowest_pk):
            self.lowest_pk = lowest

    def finish(self) -> None:
        """Close the files; durable on local disks when this returns."""
        self._accepted.close()
        self._rejected.close()

    def events_files(self) -> list[NewFile]:
        """The closed files of accepted events under their final names."""
        return self._moved_in(self._events, self._accepted)

    def quarantine_files(self) -> list[NewFile]:
        """The closed files of quarantined rows under their final names."""
        return self._moved_in(self._quarantine, self._rejected)

    def _moved_in(self, storage: LocalStorage | ObjectStorage, writer: FileWriter) -> list[NewFile]:
        if id(writer) not in self._renamed and writer.files:
            storage.rename_in({f.staged: f.path for f in writer.files})
            self._renamed.add(id(writer))
        return writer.files

    def count(self, spans: Sequence[tuple[int, int, int]]) -> int:
        """How many of the rows, of both halves, lie in a span: [start, end) in microseconds, up to a pk. Reads the closed files."""
        found = 0
        for storage, writer in ((self._events, self._accepted), (self._quarantine, self._rejected)):
            for file in writer.files:
                with pq.ParquetFile(storage.open(file.path if id(writer) in self._renamed else file.staged)) as source:
                    for batch in source.iter_batches(columns=["timestamp", "pk"]):
                        at, pk = batch["timestamp"].view(pa.int64()), batch["pk"]
                        for start, end, upto in spans:
                            within = pc.and_(pc.and_(pc.greater_equal(at, start), pc.less(at, end)), pc.less_equal(pk, upto))
                            found += pc.sum(within, min_count=0).as_py()
        return found

    @property
    def bytes(self) -> int:
        return sum(f.size for f in (*self._accepted.files, *self._rejected.files))

    def discard(self) -> None:
        """Delete what was staged and not moved in."""
        for writer in (self._accepted, self._rejected):
            if id(writer) not in self._renamed:
                writer.abort()


def _shaped(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in exactly the schema: same names in any order; string views, dictionaries and nullability are brought in line."""
    if batch.schema.equals(schema):
        return batch
    missing = [n for n in schema.names if n not in batch.schema.names]
    extra = [n for n in batch.schema.names if n not in schema.names]
    if missing or extra:
        raise LakeError(f"A batch for the lake must have the columns of the table, got missing {missing} and unknown {extra}.")
    columns: Iterable[pa.Array] = (
        batch[f.name] if batch.schema.field(f.name).type == f.type else batch[f.name].cast(f.type) for f in schema
    )
    arrays = list(columns)
    for field, column in zip(schema, arrays, strict=True):
        if not field.nullable and column.null_count:
            raise LakeError(f"Column {field.name} of the lake must not be null; quarantine such rows.")
    return cast(pa.RecordBatch, pa.RecordBatch.from_arrays(arrays, schema=schema))
