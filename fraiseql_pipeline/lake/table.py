"""One Delta table as this process knows it: its active files and published windows at a version, brought forward entry by entry.

What lives here: loading a table, following its log, adding one entry to it, checkpoints. What must not: what is in an entry (``entry.py``),
which files a window needs, the content of data files.

Why the log is followed here and not by delta-rs: on local disks every delta-rs commit and every refresh lists the whole
``_delta_log`` (measured: 3 ms per commit at 20 entries, 19 ms at 2,000, growing with each), and it neither fsyncs an entry nor
notices an empty one. delta-rs creates and opens tables, checkpoints, and commits to object stores. The entries written here are
plain Delta protocol (reader 1, writer 2).

Invariants
 1. A commit is compare-and-swap on the version: it succeeds only as version + 1 of the state it was planned on. delta-rs's own
    conflict detection is never relied upon (``max_commit_retries=0``): it lets a replacement pass that removes a file which a
    compaction had already removed, and the rows are there twice.
 2. The state only moves forward by whole entries, and an entry that cannot be read is ``LakeDamaged``, never skipped.
 3. The protocol stays (1, 2) without features; a table that somebody upgraded is refused.
 4. A log that was removed, made anew or restored is loaded as a stranger would: ``generation`` counts the loads, and a version means
    something within one of them only.
 5. Where a store may overwrite what it is told to create (``may_overwrite``), an entry is read back before anybody is told of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from fraiseql_pipeline.errors import LakeDamaged, LakeError, LakeUnavailable
from fraiseql_pipeline.event import PARTITION
from fraiseql_pipeline.lake.entry import Entry, File, actions_of
from fraiseql_pipeline.lake.facts import Commit
from fraiseql_pipeline.lake.parquet import LOGGED, NewFile, parse_log_time
from fraiseql_pipeline.lake.published import Published
from fraiseql_pipeline.lake.storage import LOG, LocalStorage, ObjectStorage, entry_name, storage_errors
from fraiseql_pipeline.window import Window

#: Log entries stay: they hold the windows' commits, and time travel. Statistics for foreign writers: none on the JSON columns.
CONFIGURATION = {
    "delta.checkpointInterval": "10",
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.enableExpiredLogCleanup": "false",
    "delta.deletedFileRetentionDuration": "interval 7 days",
}

#: A writer that did not see an entry is through after as long as that entry took to be listed for and put, give or take: twice that.
_LOOKS_AGAIN_AFTER = 2.0
_LONGEST_LOOK_SECONDS = 5.0


class Table:
    """One table under the lake; ``span`` is the column that places a file in time: ``timestamp``, or ``window_key`` for its key's start."""

    def __init__(self, storage: LocalStorage | ObjectStorage, name: str, schema: pa.Schema, description: str, span: str) -> None:
        self.storage = storage
        self.name = name
        self.schema = schema
        self._description = description
        self.span = span
        self.lock = threading.RLock()
        self.version = -1
        self.generation = 0
        #: Whether a version of it has been read: one that is not there then is gone, and not to come.
        self.was_there = False
        self._stamp: object = None  # of the entry of ``version``
        self.checkpoint_version = -1
        self._opened: DeltaTable | None = None
        self._files: dict[str, dict[str, File]] | None = None  # date → path → file; loaded when first asked for
        self._unapplied: list[list[dict[str, Any]]] = []  # entries followed while ``_files`` is not loaded
        self._known = Published(storage, name)

    # ------------------------------------------------------------------------------------------------------------- following

    @property
    def exists(self) -> bool:
        return self.version >= 0

    def refresh(self, *, create: bool = False) -> bool:
        """Bring the state to the newest entry; ``False`` if there is no such table (and ``create`` was not asked)."""
        with self.lock, storage_errors(f"reading the log of {self.name}"):
            if self.exists and self.storage.stamp(entry_name(self.version)) != self._stamp:
                self.version, self._known = -1, Published(self.storage, self.name)
            if not self.exists and not self._load(create):
                return False
            while (text := self.storage.read(entry_name(self.version + 1))) is not None:
                self._apply(self.version + 1, text)
            return True

    def _load(self, create: bool) -> bool:
        self.generation += 1
        opened = self._open()
        if opened is None:
            if not create:
                return False
            self._create()
            opened = self._open()
            if opened is None:
                raise LakeUnavailable(
                    f"The table {self.name} was created but cannot be opened; check the storage and run it again."
                )
        self._check(opened)
        self._opened = opened
        version = opened.version()
        self._files = None
        self._unapplied.clear()
        self.checkpoint_version = self._read_checkpoint_version()
        # delta-rs takes an empty entry for one without actions, so the entries after the checkpoint are read here once more.
        first = max(self.checkpoint_version + 1, 0)
        self._known.begin(first, opened)
        for at in range(first, version + 1):
            text = self.storage.read(entry_name(at))
            if text is None:
                raise LakeDamaged(f"Entry {at} of the log of {self.name} is missing; fsck tells what to do.")
            self._known.note(at, actions_of(self.name, at, text))
        self._reach(version)
        return True

    def _reach(self, version: int) -> None:
        self.version = version
        self.was_there = True
        self._stamp = self.storage.stamp(entry_name(version))

    def _open(self, version: int | None = None) -> DeltaTable | None:
        try:
            return DeltaTable(self.storage.uri, version=version, storage_options=self.storage.options or None)
        except TableNotFoundError:
            if self.storage.local:  # delta-rs says so too of a directory that it may not enter
                with storage_errors(f"reading the log of {self.name}"):
                    self.storage.names(LOG)
            return None
        except (DeltaError, OSError) as error:
            self._look_for_damage()
            raise LakeUnavailable(
                f"The table {self.name} cannot be opened ({type(error).__name__}); check the storage, then run fsck."
            ) from None

    def _look_for_damage(self) -> None:
        """Raise ``LakeDamaged`` if the checkpoint or an entry after it cannot be read."""
        at = self._read_checkpoint_version()
        if at >= 0:
            try:
                pq.ParquetFile(self.storage.open_footer(f"{LOG}/{at:020d}.checkpoint.parquet")).close()
            except (OSError, pa.ArrowException):
                raise LakeDamaged(
                    f"The checkpoint of {self.name} cannot be read; run fsck, which tells how to repair it."
                ) from None
        at += 1
        while (text := self.storage.read(entry_name(at))) is not None:
            actions_of(self.name, at, text)
            at += 1

    def _create(self) -> None:
        try:
            DeltaTable.create(
                self.storage.uri,
                schema=Schema.from_arrow(self.schema),
                mode="error",
                partition_by=[PARTITION],
                name=self.name,
                description=self._description,
                configuration=self._configuration(),
                storage_options=self.storage.options or None,
                # Left to itself the loser of a race writes a second CREATE TABLE, with another table id, as version 1.
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except (DeltaError, OSError) as error:
            if self._open() is None:
                self.storage.check_links()
                raise LakeUnavailable(
                    f"The table {self.name} cannot be created ({type(error).__name__}); check the storage."
                ) from None
        self.storage.sync_log([entry_name(0)])
        self.storage.sync_parents()

    def _configuration(self) -> Mapping[str, str | None]:
        logged = ",".join(c for c in LOGGED if c in self.schema.names)
        return {**CONFIGURATION, "delta.dataSkippingStatsColumns": logged}

    def _check(self, opened: DeltaTable) -> None:
        protocol = opened.protocol()
        if (
            (protocol.min_reader_version, protocol.min_writer_version) != (1, 2)
            or protocol.reader_features
            or protocol.writer_features
        ):
            raise LakeError(
                f"The table {self.name} was upgraded by another writer to protocol ({protocol.min_reader_version},"
                f" {protocol.min_writer_version}); this lake needs (1, 2) without features: restore it or use another lake."
            )
        stored = pa.schema(opened.schema().to_arrow())
        have = {f.name: (f.type, f.nullable) for f in stored}
        wrong = [f.name for f in self.schema if not _same(have.get(f.name), f)]
        wrong += [name for name in have if name not in self.schema.names]
        if wrong or opened.metadata().partition_columns != [PARTITION]:
            raise LakeError(
                f"The table {self.name} has other columns than this version writes ({', '.join(wrong) or 'partitioning'});"
                " use the version that wrote it or another lake."
            )

    def _active(self, opened: DeltaTable) -> Iterable[File]:
        """The active files of an opened version, from delta-rs's flattened list."""
        adds = pa.table(opened.get_add_actions(flatten=True))
        names = set(adds.column_names)

        def column(name: str) -> list[Any]:
            return list(adds.column(name).to_pylist()) if name in names else [None] * adds.num_rows

        low, high = column(f"min.{self.span}"), column(f"max.{self.span}")
        if self.span == "timestamp" and f"min.{self.span}" in names:
            low, high = (list(adds.column(f"{end}.timestamp").cast(pa.int64()).to_pylist()) for end in ("min", "max"))
            # A maximum on a whole millisecond may have been cut by another writer.
            high = [h if h is None or h % 1000 else h + 999 for h in high]
        else:
            low, high = ([_key_start(k) for k in end] for end in (low, high))
        rows = zip(
            column("path"), column(f"partition.{PARTITION}"), column("size_bytes"), column("num_records"), low, high, strict=True
        )
        for path, date, size, records, first, last in rows:
            yield File(path, str(date), size, records, first, last)

    def reopened(self) -> Table:
        """The same table as a stranger sees it: nothing read yet."""
        return Table(self.storage, self.name, self.schema, self._description, self.span)

    def files_at(self, version: int) -> list[File]:
        """The active files of an older version, for time travel."""
        opened = self._open(version)
        if opened is None:
            raise LakeError(f"The lake has no table {self.name} yet; materialize a window first.")
        return list(self._active(opened))

    def _read_checkpoint_version(self) -> int:
        text = self.storage.read(f"{LOG}/_last_checkpoint")
        try:
            return int(json.loads(text)["version"]) if text else -1
        except (ValueError, KeyError, TypeError):
            return -1

    def _apply(self, version: int, text: bytes) -> None:
        actions = actions_of(self.name, version, text)
        for action in actions:
            if "metaData" in action or "protocol" in action:  # somebody altered the table: look at it as a stranger would
                self.version = -1
                self._load(create=False)
                return
        if self._files is None:
            self._unapplied.append(actions)
        else:
            self._apply_files(self._files, actions)
        self._known.note(version, actions)
        self._reach(version)

    # ----------------------------------------------------------------------------------------------------------------- files

    @property
    def files(self) -> dict[str, dict[str, File]]:
        """The active files by date and path. Listing them is most of what opening a large table costs, so it waits until it is asked for."""
        with self.lock:
            return self._load_files()

    def _load_files(self) -> dict[str, dict[str, File]]:
        if self._files is None:
            assert self._opened is not None
            files: dict[str, dict[str, File]] = {}  # kept when it is whole: what fails halfway would hide files from a replacement
            for file in self._active(self._opened):
                files.setdefault(file.date, {})[file.path] = file
            for actions in self._unapplied:
                self._apply_files(files, actions)
            self._files = files
            self._unapplied.clear()
        return self._files

    def active(self) -> Iterator[File]:
        """Every active file."""
        return (file for files in self.files.values() for file in files.values())

    def files_touching(self, window: Window) -> list[File]:
        """The active files that may hold rows of a window; looks at its date only."""
        start, end = window.micros
        return [f for f in self.files.get(window.start.date().isoformat(), {}).values() if f.touches(start, end)]

    def _apply_files(self, files: dict[str, dict[str, File]], actions: Sequence[Mapping[str, Any]]) -> None:
        for action in actions:
            if (remove := action.get("remove")) is not None:
                # ``partitionValues`` is optional in a ``remove``, so the date is looked for where it is missing.
                date = (remove.get("partitionValues") or {}).get(PARTITION)
                for at in [date] if date in files else list(files):
                    files[at].pop(remove["path"], None)
        for action in actions:
            if (add := action.get("add")) is not None:
                file = self._file_of(add)
                files.setdefault(file.date, {})[file.path] = file

    def _file_of(self, add: Mapping[str, Any]) -> File:
        stats = json.loads(add["stats"]) if add.get("stats") else {}
        low, high = ((stats.get(end) or {}).get(self.span) for end in ("minValues", "maxValues"))
        if self.span == "timestamp":
            least, greatest = (None if text is None else parse_log_time(text) for text in (low, high))
            first = None if least is None else least[0]
            last = None
            if greatest is not None:
                at, whole = greatest
                last = at if whole and at % 1000 else at + 999
        else:
            first, last = _key_start(low), _key_start(high)
        return File(add["path"], add["partitionValues"][PARTITION], add["size"], stats.get("numRecords"), first, last)

    # --------------------------------------------------------------------------------------------------------------- windows

    def window(self, window: Window) -> Commit | None:
        """The newest commit of one window, without reading the whole log."""
        with self.lock:
            return self._known.of(window)

    def published(self) -> dict[Window, Commit]:
        """The newest commit of every window, oldest window first, without hours that a later commit of their day replaced."""
        with self.lock:
            return self._known.current()

    def published_at(self, version: int) -> dict[Window, Commit]:
        """The same at an older version: each window with its commit of then."""
        with self.lock:
            return self._known.at(version)

    def newest(self) -> Commit | None:
        """The latest commit of a window. What was published before it, perhaps from a source that has been restored since, says nothing."""
        with self.lock:
            return self._known.newest()

    # ------------------------------------------------------------------------------------------------------------ committing

    def commit(
        self,
        adds: Sequence[NewFile],
        removes: Sequence[File],
        stated: Mapping[str, Any],
        window: Window | None,
        *,
        data_change: bool = True,
    ) -> int | None:
        """Add one entry as version + 1; returns the version, or ``None`` if another writer took it. The state then includes it."""
        with self.lock:
            version = self.version + 1
            entry = Entry(adds, removes, stated, None if window is None else self._known.app_id(window), data_change)
            if isinstance(self.storage, LocalStorage):
                with storage_errors(f"committing to {self.name}"):
                    done = self.storage.link_entry(version, entry.text(version))
            else:
                done = self._put(self.storage, entry, version)
            self.refresh()
            return version if done else None

    def _put(self, storage: ObjectStorage, entry: Entry, version: int) -> bool:
        began = time.monotonic()
        try:
            assert self._opened is not None
            self._load_files()  # they are those of the handle's version, and it moves on
            self._opened.update_incremental()
            if self._opened.version() != version - 1:
                return False
            entry.write(self._opened, version)
            if not storage.may_overwrite:
                return True
            time.sleep(min(_LOOKS_AGAIN_AFTER * (time.monotonic() - began), _LONGEST_LOOK_SECONDS))
            text = storage.read(entry_name(version))
            if text is not None and entry.is_in(actions_of(self.name, version, text)):
                return True
            self.version = -1  # another writer's is there now: look at the table as a stranger would
            return False
        except CommitFailedError:
            return False
        except (DeltaError, OSError) as error:
            raise LakeUnavailable(
                f"The lake's storage failed while committing to {self.name} ({type(error).__name__}); run it again."
            ) from None

    # ------------------------------------------------------------------------------------------------------------ checkpoints

    def checkpoint_interval(self) -> int:
        """Entries between two checkpoints: 10 up to version 500, then a share of the versions, so that the price per commit stays the same.

        A checkpoint costs what the table is long: 8 ms at 60 windows, 158 ms at 10,000. Every 10 entries that would be 16 ms per window.
        """
        interval = 10
        while interval * 50 < self.version:
            interval *= 2
        return interval

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint after every ``checkpoint_interval`` entries. It only speeds up opening: a failure is left to the next one."""
        with self.lock:
            if self.version > 0 and self.version % self.checkpoint_interval() == 0:
                try:
                    self.checkpoint()
                except LakeUnavailable:
                    return

    def checkpoint(self) -> None:
        """Write a checkpoint of the newest version."""
        opened = self._open()
        if opened is None:
            return
        try:
            opened.create_checkpoint()
        except (DeltaError, OSError) as error:
            raise LakeUnavailable(
                f"A checkpoint of {self.name} could not be written ({type(error).__name__}); run it again."
            ) from None
        with storage_errors(f"writing a checkpoint of {self.name}"):
            self.checkpoint_version = opened.version()
            name = f"{LOG}/{self.checkpoint_version:020d}.checkpoint.parquet"
            self.storage.sync_log([name, f"{LOG}/_last_checkpoint"])


def _same(stored: tuple[pa.DataType, bool] | None, field: pa.Field) -> bool:
    if stored is None:
        return False
    kind, nullable = stored
    if pa.types.is_list(field.type):
        return bool(pa.types.is_list(kind) and kind.value_type == field.type.value_type)
    return bool(kind == field.type and nullable == field.nullable)


def _key_start(key: str | None) -> int | None:
    """Microseconds of the start of the window a key names; ``None`` for no key."""
    if key is None:
        return None
    return Window.parse(key).micros[0]
