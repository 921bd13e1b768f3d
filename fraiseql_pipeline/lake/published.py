"""The windows of a table as its log tells: each with its newest commit, read as far as somebody asked.

What lives here: ``Published``, and which commits count. What must not: following the log (``table.py``), files, commits.

Source of the format: our object in ``commitInfo`` (``facts.py``), and the transaction ids of windows, whose version is the log entry that
published them; a checkpoint keeps these ids, so that no entry before it is read in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from fraiseql_pipeline.errors import LakeDamaged, WindowError
from fraiseql_pipeline.lake.entry import first_actions_of
from fraiseql_pipeline.lake.facts import KEY, Commit
from fraiseql_pipeline.lake.storage import LOG, LocalStorage, ObjectStorage, entry_name, storage_errors
from fraiseql_pipeline.window import Window, WindowSize

#: Windows' entries that ``newest`` looks at, beside those after the checkpoint. A run of 40 windows spent 22 ms on each where the lake had
#: 10,000 and all of their entries were read, and 8 where it had 10; now as much in both.
_LATEST_ENTRIES = 32


class Published:
    """Of one table; whoever calls holds the table's lock. ``note`` is told every entry from ``begin`` on, older ones are read when
    they are needed.
    """

    def __init__(self, storage: LocalStorage | ObjectStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._opened: DeltaTable | None = None
        self._windows: dict[str, Commit] = {}
        self._followed_from = 0  # entries from this version on are in ``_windows``; older ones when ``_complete``
        self._complete = False
        self._pointers: dict[str, int] | None = None
        self._current: dict[Window, Commit] | None = None

    def begin(self, version: int, opened: DeltaTable) -> None:
        """Forget everything; entries from this version on will be told, older ones are behind a checkpoint of ``opened``."""
        self._opened = opened
        self._windows = {}
        self._followed_from = version
        self._complete = False
        self._pointers = self._current = None

    def note(self, version: int, actions: Sequence[Mapping[str, Any]]) -> None:
        """An entry of the log, which may be about a window."""
        if (commit := self._commit_of(version, actions)) is not None:
            self._windows[commit.window.key] = commit
            self._current = None

    def of(self, window: Window) -> Commit | None:
        """The newest commit of one window, without reading the whole log: its transaction id in the table points at the entry."""
        if (known := self._windows.get(window.key)) is not None or self._complete or self._opened is None:
            return known
        pointer = self._pointer(window)
        if pointer is None or pointer >= self._followed_from:
            return None
        self._windows = self._read_entries([pointer]) | self._windows
        return self._windows.get(window.key)

    def current(self) -> dict[Window, Commit]:
        """As ``current`` of all windows. The first call reads the whole log, later ones nothing but what is new."""
        if not self._complete and self._opened is not None:
            self._windows = self._read_entries(self._pointed()) | self._windows
            self._complete, self._current = True, None
        if self._current is None:
            self._current = current(self._windows)
        return self._current

    def at(self, version: int) -> dict[Window, Commit]:
        """As ``current`` gave them at an older version. Reads those entries up to it that are no window's newest by now."""
        self.current()
        known = {key: commit for key, commit in self._windows.items() if commit.table_version <= version}
        older = self._read_entries(sorted({*range(version + 1)} - {commit.table_version for commit in known.values()}))
        return current(older | known)

    def newest(self) -> Commit | None:
        """The latest commit of a window, looked for among the latest entries."""
        if not self._complete and self._opened is not None:
            self._windows = self._read_entries(self._pointed()[-_LATEST_ENTRIES:]) | self._windows
        return max(self._windows.values(), key=lambda commit: commit.table_version, default=None)

    def app_id(self, window: Window) -> str:
        """The transaction id of a window; its version is the log entry that published it."""
        return f"fraiseql/{self._name}/{window.key}"

    def _pointer(self, window: Window) -> int | None:
        """The log entry of a window's newest commit up to the checkpoint."""
        if self._pointers is None:
            self._pointers = self._read_pointers()
        if self._pointers is not None:
            return self._pointers.get(self.app_id(window))
        assert self._opened is not None
        return self._opened.transaction_version(self.app_id(window))

    def _read_pointers(self) -> dict[str, int] | None:
        """Every transaction id in the checkpoint with its version, at once; ``None`` for a checkpoint in another form than delta-rs's.

        delta-rs answers for one id only, by reading all of them (3 ms at 10,000 windows).
        """
        if self._followed_from == 0:
            return {}
        name = f"{LOG}/{self._followed_from - 1:020d}.checkpoint.parquet"
        try:
            with pq.ParquetFile(self._storage.open(name)) as checkpoint:
                found = checkpoint.read(columns=["txn.appId", "txn.version"])["txn"].combine_chunks()
        except (OSError, KeyError, pa.ArrowException):
            return None
        ids, versions = (pc.struct_field(found, part).to_pylist() for part in ("appId", "version"))
        return {i: v for i, v in zip(ids, versions, strict=True) if i is not None}

    def _pointed(self) -> Sequence[int]:
        """The entries before ``_followed_from`` that are some window's newest; all of them if the checkpoint does not tell."""
        if self._pointers is None:
            self._pointers = self._read_pointers()
        if self._pointers is None:
            return range(self._followed_from)
        mine = f"fraiseql/{self._name}/"
        return sorted(v for i, v in self._pointers.items() if i.startswith(mine) and v < self._followed_from)

    def _commit_of(self, version: int, actions: Sequence[Mapping[str, Any]]) -> Commit | None:
        info = next((a["commitInfo"] for a in actions if "commitInfo" in a), None)
        stated = info.get(KEY) if info else None
        if info is None or not isinstance(stated, dict) or "window" not in stated:
            return None
        try:
            return Commit.from_json(stated, version, info["timestamp"])
        except (KeyError, ValueError, WindowError):
            raise LakeDamaged(
                f"Entry {version} of the log of {self._name} names a window in a way this version cannot read."
            ) from None

    def _read_entries(self, versions: Sequence[int]) -> dict[str, Commit]:
        """The commits in these entries, of each window the last. Nothing is kept of them here: the storage may fail at any one."""

        def read(version: int) -> bytes | None:
            return self._storage.read(entry_name(version))

        found: dict[str, Commit] = {}
        with storage_errors(f"reading the log of {self._name}"):
            if self._storage.local or len(versions) < 4:
                texts: Iterable[bytes | None] = map(read, versions)
            else:
                with ThreadPoolExecutor(32) as pool:
                    texts = list(pool.map(read, versions))
            for version, text in zip(versions, texts, strict=True):
                if text is None:
                    raise LakeDamaged(f"Entry {version} of the log of {self._name} is missing; fsck tells what to do.")
                if (commit := self._commit_of(version, first_actions_of(self._name, version, text))) is not None:
                    found[commit.window.key] = commit
        return found


def current(found: Mapping[str, Commit]) -> dict[Window, Commit]:
    """Commits by window, oldest first, without the hours that a later commit of their day replaced."""
    days = {key: commit.table_version for key, commit in found.items() if commit.window.size is WindowSize.DAY}
    return {
        commit.window: commit
        for key, commit in sorted(found.items())
        if commit.window.size is WindowSize.DAY or commit.table_version > days.get(key[:10], -1)
    }
