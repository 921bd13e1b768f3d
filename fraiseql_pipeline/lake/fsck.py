"""What is broken in a lake, and how to repair it.

What lives here: ``examine``, which compares log, files and commit metadata. What must not: anything on the way of a normal read or commit.

Invariants
 1. Nothing is changed without ``repair``, and then only what loses nothing: torn entries and checkpoints are moved aside (kept,
    renamed), leftovers of dead writers are deleted. Rows are never touched; what lost rows is named so that it can be materialized
    again.
 2. An entry is reported torn only if it cannot be read whole: entries written here are fsynced before they get their number, so a
    torn one comes from another writer or from the disk.
 3. The two tables are judged on one state of both: what is found while a run moves them is looked at again before it is reported.
 4. Nothing is moved or deleted in an object store: there a remedy says what to do with the store's own tools.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraiseql_pipeline.errors import LakeDamaged, LakeError
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.facts import Commit, Finding
from fraiseql_pipeline.lake.storage import LOG, LocalStorage, entry_name
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.window import Window

_ENTRY = re.compile(rf"{LOG}/(\d{{20}})\.json")
_CHECKPOINT = re.compile(rf"{LOG}/(\d{{20}})\.checkpoint\.parquet")
#: Younger leftovers may belong to a writer at work: a file's time is that of its last row, and a long window's first files wait for its last.
_LEFTOVER_SECONDS = 86_400.0
#: How often both tables are looked at until they stand still; then only what every look found is reported.
_LOOKS = 4
#: What takes the place of a torn entry by hand.
_EMPTY_ENTRY = '{"commitInfo":{}}'


def examine(events: Table, quarantine: Table, *, repair: bool = False) -> list[Finding]:
    """Every defect found, in the order in which to deal with them. An empty list is a sound lake."""
    findings: list[Finding] = []
    for table in (quarantine, events):
        findings += _Log(table, repair).findings()
    return findings + _content_findings(events.reopened(), quarantine.reopened())


def _content_findings(events: Table, quarantine: Table) -> list[Finding]:
    always: list[Finding] | None = None
    for _ in range(_LOOKS):
        at, found = _look(events, quarantine)
        always = found if always is None else [f for f in always if f in found]
        if not found or at == _state(events, quarantine):
            return found
    return always or []


def _state(events: Table, quarantine: Table) -> tuple[object, ...] | None:
    """Equal as long as nobody commits; ``None`` where a table cannot be read."""
    try:
        return tuple((table.refresh(), table.generation, table.version) for table in (quarantine, events))
    except LakeError:
        return None


def _look(events: Table, quarantine: Table) -> tuple[tuple[object, ...] | None, list[Finding]]:
    at, findings = _state(events, quarantine), list[Finding]()
    for table in (quarantine, events):
        try:
            if table.refresh():
                findings += _file_findings(table)
        except LakeDamaged as error:
            remedy = (
                "Repair the log first (fsck --repair)." if table.storage.local else "Repair the log first, then run fsck again."
            )
            return at, [*findings, Finding(table.name, "unreadable", LOG, str(error), remedy)]
        except LakeError as error:
            remedy = "Deal with this first, then run fsck again."
            return at, [*findings, Finding(table.name, "unreadable", LOG, str(error), remedy)]
    if events.exists:
        findings += _window_findings(events, quarantine)
    return at, findings


class _Log:
    def __init__(self, table: Table, repair: bool) -> None:
        self._table = table
        self._storage = table.storage
        self._repaired = table.storage if repair and isinstance(table.storage, LocalStorage) else None
        self._names = table.storage.names(LOG)

    def findings(self) -> Iterator[Finding]:
        versions = sorted(int(m[1]) for n in self._names if (m := _ENTRY.fullmatch(n)))
        yield from self._checkpoints()
        for version in versions:
            if not _whole(self._storage.read(entry_name(version)) or b""):
                yield self._torn(version, tip=version == versions[-1])
        for version in sorted(set(range(versions[0], versions[-1] + 1)) - set(versions)) if versions else []:
            yield self._finding(
                "missing_entry",
                entry_name(version),
                f"Entry {version} of the log is missing.",
                "Restore it from a backup, or move the table away and materialize its windows again.",
            )
        yield from self._leftovers()

    def _torn(self, version: int, *, tip: bool) -> Finding:
        name = entry_name(version)
        problem = f"Entry {version} of the log is {'empty' if not self._names[name] else 'torn'}."
        if tip:
            how = self._how("Move it aside (fsck --repair)", "Delete it")
            remedy = f"{how}; its commit was never acknowledged, run the last materializations again."
        else:
            how = self._how("Replace it by an empty entry (fsck --repair keeps the torn one)", f"Put {_EMPTY_ENTRY} in its place")
            remedy = f"{how}; then materialize the windows that fsck names, and the holes that status shows: one of them was its."
        if self._repaired is not None:
            self._repaired.move_aside(name)
            if not tip:
                now_ms = time.time_ns() // 1_000_000
                info = {"commitInfo": {"timestamp": now_ms, "operation": "FSCK REPAIR", "operationParameters": {}}}
                self._repaired.link_entry(version, json.dumps(info).encode())
        return self._finding("torn_entry", name, problem, remedy)

    def _how(self, here: str, in_a_store: str) -> str:
        return here if self._storage.local else f"{in_a_store} with the object store's own tools (keep a copy)"

    def _checkpoints(self) -> Iterator[Finding]:
        named = self._storage.read(f"{LOG}/_last_checkpoint")
        for name in sorted(n for n in self._names if _CHECKPOINT.fullmatch(n)):
            try:
                with pq.ParquetFile(self._storage.open(name)) as checkpoint:
                    checkpoint.read(columns=["protocol"])
            except (OSError, pa.ArrowException):
                if self._storage.size(name) is None:  # maintain dropped it meanwhile
                    continue
                if self._repaired is not None:
                    self._repaired.move_aside(name)
                    self._repaired.delete(f"{LOG}/_last_checkpoint")
                how = self._how("Move it aside (fsck --repair)", f"Delete it and {LOG}/_last_checkpoint")
                yield self._finding("torn_checkpoint", name, "A checkpoint cannot be read.", f"{how}; every entry is still there.")
        if named is not None and not _whole(named):
            if self._repaired is not None:
                self._repaired.delete(f"{LOG}/_last_checkpoint")
            how = self._how("Remove it (fsck --repair)", "Delete it")
            yield self._finding("torn_checkpoint", f"{LOG}/_last_checkpoint", "The pointer to the checkpoint is torn.", f"{how}.")

    def _leftovers(self) -> Iterator[Finding]:
        old = time.time() - _LEFTOVER_SECONDS
        for name in sorted(name for name, at in self._storage.staged().items() if at < old):
            if self._repaired is not None:
                self._repaired.delete(name)
            yield self._finding(
                "leftover", name, "A writer died and left this behind; no reader sees it.", "Delete it (fsck --repair)."
            )

    def _finding(self, kind: str, subject: str, problem: str, remedy: str) -> Finding:
        """Everything but a missing entry is repaired by now if it was asked."""
        repaired = self._repaired is not None and kind != "missing_entry"
        return Finding(self._table.name, kind, subject, problem, remedy, repaired)


def _whole(text: bytes) -> bool:
    try:
        return bool(text.strip()) and all(isinstance(json.loads(line), dict) for line in text.splitlines() if line.strip())
    except ValueError:
        return False


def _file_findings(table: Table) -> Iterator[Finding]:
    again = "Materialize the windows of that date again with --force, or restore the file from a backup."
    for file in sorted(table.active(), key=lambda f: f.path):
        problem = kind = ""
        size = table.storage.size(file.path)
        if size is None:
            kind, problem = "missing_file", "A data file that the log lists is missing."
        elif size != file.size:
            kind, problem = "short_file", f"A data file has {size} bytes, the log says {file.size}."
        else:
            try:
                with pq.ParquetFile(table.storage.open_footer(file.path)) as source:
                    rows = source.metadata.num_rows
                if file.rows is not None and rows != file.rows:
                    kind, problem = "rows", f"A data file holds {rows} rows, the log says {file.rows}."
            except (OSError, pa.ArrowException):
                kind, problem = "short_file", "A data file cannot be read as Parquet."
        if kind:
            yield Finding(table.name, kind, file.path, problem, again)


def _window_findings(events: Table, quarantine: Table) -> Iterator[Finding]:
    published = events.published()
    held = _rows_by_window(events, list(published))
    rejected = _rows_by_window(quarantine, list(published)) if quarantine.exists else Counter[Window]()
    for window, commit in published.items():
        if held[window] != commit.accepted_rows:
            yield Finding(
                "events",
                "window_rows",
                window.key,
                f"The window holds {held[window]} events, its commit says {commit.accepted_rows}.",
                "Materialize it again with --force.",
            )
        if (pair := _pair_problem(quarantine, commit, rejected[window])) is not None:
            yield Finding(
                "events_quarantine",
                "pair",
                window.key,
                pair,
                "If no run is at work on it now, materialize it again with --force.",
            )


def _pair_problem(quarantine: Table, commit: Commit, rows: int) -> str | None:
    held = quarantine.window(commit.window) if quarantine.exists else None
    if rows != commit.quarantined_rows:
        return f"The quarantine holds {rows} rows of the window, its commit says {commit.quarantined_rows}."
    if (held.quarantine_hash if held is not None else "") != commit.quarantine_hash:
        return "The quarantine holds other rows of the window than its commit says."
    return None


def _rows_by_window(table: Table, windows: list[Window]) -> Counter[Window]:
    """Rows per window; only files that hold more than one window are read."""
    rows: Counter[Window] = Counter()
    by_date: dict[str, list[Window]] = {}
    for window in windows:
        by_date.setdefault(window.start.date().isoformat(), []).append(window)
    for file in table.active():
        near = [(w, *w.micros) for w in by_date.get(file.date, [])]
        inside = [w for w, start, end in near if file.within(start, end)]
        if inside and file.rows is not None:
            rows[inside[0]] += file.rows
            continue
        rows.update(_counted(table, file, [(w, start, end) for w, start, end in near if file.touches(start, end)]))
    return rows


def _counted(table: Table, file: File, near: list[tuple[Window, int, int]]) -> Counter[Window]:
    rows: Counter[Window] = Counter()
    try:
        with pq.ParquetFile(table.storage.open(file.path)) as source:
            for batch in source.iter_batches(columns=[table.span]):
                at = batch[table.span]
                for window, start, end in near:
                    if table.span == "timestamp":
                        ticks = at.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
                        mask = pc.and_(pc.greater_equal(ticks, start), pc.less(ticks, end))
                    else:
                        mask = pc.equal(at, window.key)
                    rows[window] += pc.sum(mask).as_py() or 0
    except (OSError, pa.ArrowException):  # reported by its own finding
        return Counter()
    return rows
