"""Rewriting files that hold more than one window, so that one window's rows can go and the others stay.

What lives here: which files a replacement removes, and the new files with the rows that stay. What must not: the decision to replace.

Only a compaction makes such files (ours or another writer's), so this is the rare path; memory stays at one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import LakeDamaged
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.parquet import FileWriter, NewFile
from fraiseql_pipeline.lake.read import file_errors
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.window import Window, WindowSize

_BATCH_ROWS = 16_384


@dataclass
class Rewriter:
    """Plans the removal of one window's rows; a file is rewritten once, however many attempts the commit takes."""

    window: Window
    force: bool = False
    _rewritten: dict[tuple[str, int | None], list[NewFile] | None] = field(default_factory=dict)

    def plan(self, table: Table, above_pk: int | None = None) -> tuple[list[NewFile], list[File]]:
        """(files to add, files to remove) after which the table holds no row of the window, or none above a pk.

        With ``force`` a file that is missing or torn is removed as it is: the rows of other windows that it held are lost already, and
        ``fsck`` names these windows.
        """
        start, end = self.window.micros
        adds: list[NewFile] = []
        removes: list[File] = []
        for file in table.files_touching(self.window):
            if file.within(start, end) and above_pk is None:
                removes.append(file)
                continue
            key = (file.path, above_pk)
            if key not in self._rewritten:
                self._rewritten[key] = self._rewrite(table, file, above_pk)
            rest = self._rewritten[key]
            if rest is not None:
                removes.append(file)
                adds += rest
        return adds, removes

    def _rewrite(self, table: Table, file: File, above_pk: int | None) -> list[NewFile] | None:
        """New files with the rows that stay, in their order; ``None`` if all stay, so that the file may be left alone."""
        # What lies before and after the window goes to files of its own: one file around it would be in the way of the next replacement.
        writers = [FileWriter(table.storage, table.schema, file.date, "rest", ordered=False) for _ in range(3)]
        rows = gone = 0
        read = False
        try:
            with file_errors(file), pq.ParquetFile(table.storage.open(file.path)) as source:
                for batch in source.iter_batches(batch_size=_BATCH_ROWS):
                    rows += batch.num_rows
                    before, inside, after = self._parts(batch, table.span)
                    if above_pk is None:
                        gone += pc.sum(inside).as_py() or 0
                    else:
                        leaving = pc.and_(inside, pc.greater(batch["pk"], above_pk))
                        gone += pc.sum(leaving).as_py() or 0
                        writers[1].write(conformed(batch.filter(pc.and_not(inside, leaving)), table.schema))
                    writers[0].write(conformed(batch.filter(before), table.schema))
                    writers[2].write(conformed(batch.filter(after), table.schema))
            read = True
            if file.rows is not None and file.rows != rows and not self.force:
                raise LakeDamaged(
                    f"A data file of {table.name} on {file.date} holds {rows} rows, the log says {file.rows}; run fsck."
                )
            if not gone:
                return None
            files = [f for writer in writers for f in writer.close()]
            if sum(f.rows for f in files) != rows - gone:
                raise LakeDamaged(f"Rewriting a file of {table.name} on {file.date} lost rows; nothing was committed, run fsck.")
            table.storage.rename_in({f.staged: f.path for f in files})
            writers = []
            return files
        except LakeDamaged:
            if read or not self.force:
                raise
            return []
        finally:
            for writer in writers:
                writer.abort()

    def _parts(self, batch: pa.RecordBatch, span: str) -> tuple[pa.Array, pa.Array, pa.Array]:
        """Masks of the rows before, in and after the window."""
        at = batch[span]
        low: Any
        high: Any
        if span == "timestamp":
            low, high = pa.scalar(self.window.start, at.type), pa.scalar(self.window.end, at.type)
        else:  # keys sort like the times they name, and a day's key comes before those of its hours
            low = self.window.key
            high = f"{low}:" if self.window.size is WindowSize.HOUR else f"{low}-24"
        before, after = pc.less(at, low), pc.greater_equal(at, high)
        return before, pc.invert(pc.or_(before, after)), after


def conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch read from any writer's file in the table's types; columns the file lacks are not made up."""
    fields = [f for f in schema if f.name in batch.schema.names]
    return pa.RecordBatch.from_arrays([batch[f.name].cast(f.type) for f in fields], schema=pa.schema(fields))
