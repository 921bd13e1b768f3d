"""Events for people and for files: what ``read`` does with the batches it gets.

What lives here: the four kinds of files, the first rows as a table, and the two kinds of files and the lines that grow while events come.
What must not: where the events come from (``flight.py``, ``follow.py``).

Parquet and Arrow files hold the columns as they came. Texts hold the plain types: UUIDs and repeated values as text whatever the profile
of the stream, and a list, which CSV has no form for, as JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fraiseql_pipeline.cli.output import Output, printable
from fraiseql_pipeline.encoding import plain_schema, to_plain
from fraiseql_pipeline.errors import InputError

Write = Callable[[pa.Schema, Iterable[pa.RecordBatch]], int]
"""Takes a schema and its batches, says how many rows they had."""

Grow = Callable[[pa.Schema], AbstractContextManager[Callable[[pa.RecordBatch], None]]]
"""Takes a schema, gives what takes one batch after the other; each is there for others to see when it returns."""

#: Rows that are shown.
_FIRST = 10
#: On a terminal the columns that tell most come first, as many as a line holds, and a long value is cut.
_FOREMOST = ("timestamp", "event_type", "entity_type", "entity_id", "data")
_LONGEST, _SHORTEST = 60, 16
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: What a drawn column takes beside its cells: a blank on either side, and a line.
_FRAME = 3


def write_to(target: Path) -> Write:
    """Writes to a new file beside the target and renames it, so that a read that fails leaves no half file behind.

    Raises ``InputError`` for a file that cannot be written.
    """
    writers: dict[str, Callable[[Path, pa.Schema, Iterable[pa.RecordBatch]], None]] = {
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".csv": _csv,
        ".json": _json,
    }
    if target.suffix not in writers:
        raise InputError(f"The output file must end in {', '.join(writers)}; got {target.name!r}.")
    _check_folder(target)

    def write(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        rows = 0

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            for batch in batches:
                rows += batch.num_rows
                yield batch

        partial = target.with_name(f".{target.name}.partial")
        with _writing(target):
            try:
                writers[target.suffix](partial, schema, counted())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        return rows

    return write


def grow_at(target: Path, *, onto: bool) -> Grow:
    """Writes every batch at the end of the file as it comes. ``onto``: of the file that is there, which is replaced else.

    Raises ``InputError`` for a file that cannot be written, or be left before its end.
    """
    if target.suffix not in _GROWING:
        raise InputError(
            f"A stream that follows must go into a {' or '.join(_GROWING)} file, which can be read while it grows; got {target.name!r}."
        )
    _check_folder(target)

    @contextmanager
    def grow(schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
        with _writing(target), target.open("ab" if onto else "wb") as file:
            add = _GROWING[target.suffix](file, schema)

            def one(batch: pa.RecordBatch) -> None:
                add(batch)
                file.flush()

            yield one

    return grow


def _check_folder(target: Path) -> None:
    if not target.parent.is_dir():
        raise InputError(f"The folder of {target.name!r} does not exist; create it, or choose another one.")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:  # those of the source have been translated
        why = os.strerror(error.errno) if error.errno else "the file system refuses it"
        raise InputError(f"The output file {target.name!r} cannot be written: {why}; choose another place.") from None


def show(output: Output) -> Write:
    """Shows the first rows: whole values where something reads along, on a terminal what a line has room for."""

    def write(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        rows = 0
        shown: list[list[str]] = []
        for batch in map(to_plain, batches):
            rows += batch.num_rows
            shown += [[_text(value) for value in row.values()] for row in batch.slice(0, _FIRST - len(shown)).to_pylist()]
        if not output.is_terminal:
            output.table("", schema.names, shown)
            return rows
        short = [[_short(cell) for cell in row] for row in shown]
        kept = _fitting(schema.names, short, output.width)
        output.table(
            "", [schema.names[at] for at in sorted(kept)], [[_cut(row[at], kept[at]) for at in sorted(kept)] for row in short]
        )
        if left := [name for at, name in enumerate(schema.names) if at not in kept]:
            output.say(f"Not shown: {', '.join(left)}. --output FILE, or a pipe, gives all columns and whole values.")
        return rows

    return write


def show_as_they_come(output: Output) -> Grow:
    """A line per event, with whole values where something reads along; ``BrokenPipeError`` when nothing does any more."""

    @contextmanager
    def grow(schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
        kept: dict[int, int] = {}

        def one(batch: pa.RecordBatch) -> None:
            if output.as_json:
                return
            rows = [[printable(_text(value)) for value in row.values()] for row in to_plain(batch).to_pylist()]
            if output.is_terminal:
                rows = [[_short(cell) for cell in row] for row in rows]
            if not kept:
                kept.update(
                    _fitting(schema.names, rows, output.width) if output.is_terminal else dict.fromkeys(range(len(schema)), 0)
                )
                rows.insert(0, schema.names)
            for row in rows:
                line = "  ".join(row[at].ljust(kept[at]) for at in sorted(kept)).rstrip()
                output.say(_cut(line, output.width) if output.is_terminal else line)
            if output.console.quiet:
                raise BrokenPipeError

        yield one

    return grow


def _fitting(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> dict[int, int]:
    """The columns that a line of this width has room for, and how wide; the last of them may be cut."""
    kept: dict[int, int] = {}
    room = width - 1
    for at in sorted(range(len(names)), key=lambda at: _FOREMOST.index(names[at]) if names[at] in _FOREMOST else len(names)):
        wanted = max([len(names[at]), *(len(row[at]) for row in rows)])
        if kept and room - _FRAME < min(wanted, _SHORTEST):
            break
        kept[at] = max(len(names[at]), min(wanted, room - _FRAME))
        room -= kept[at] + _FRAME
    return kept


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def _short(text: str) -> str:
    if _UUID.fullmatch(text):
        return f"{text[:8]}…"
    return _cut(text.removesuffix("+00:00"), _LONGEST)


def _parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _csv(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with path.open("wb") as file:
        add = _csv_lines(file, schema)
        for batch in batches:
            add(batch)


def _csv_lines(file: BinaryIO, schema: pa.Schema) -> Callable[[pa.RecordBatch], None]:
    plain = plain_schema(schema)
    texts = pa.schema([field.with_type(pa.string()) if pa.types.is_list(field.type) else field for field in plain])
    header = pyarrow.csv.WriteOptions(include_header=file.tell() == 0)
    writer = pyarrow.csv.CSVWriter(file, texts, write_options=header)

    def add(batch: pa.RecordBatch) -> None:
        rows = to_plain(batch)
        columns = [_json_texts(column) if pa.types.is_list(column.type) else column for column in rows.columns]
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=texts))

    return add


def _json_texts(lists: pa.Array) -> pa.Array:
    return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in lists.to_pylist()], pa.string())


def _json(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with path.open("wb") as file:
        add = _json_lines(file, schema)
        for batch in batches:
            add(batch)


def _json_lines(file: BinaryIO, schema: pa.Schema) -> Callable[[pa.RecordBatch], None]:
    """One JSON object per line."""
    import polars as pl

    del schema
    return lambda batch: pl.DataFrame(to_plain(batch)).write_ndjson(file)


_GROWING = {".json": _json_lines, ".csv": _csv_lines}
