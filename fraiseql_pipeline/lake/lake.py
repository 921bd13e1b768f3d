"""The lake: two Delta tables under one URI, one commit per window.

What lives here: ``Lake``, the door to everything in this package. What must not: the work itself, which has a module per noun.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

import pyarrow as pa

from fraiseql_pipeline.errors import LakeEmpty, LakeUnavailable
from fraiseql_pipeline.event import LAKE_SCHEMA, QUARANTINE_SCHEMA
from fraiseql_pipeline.lake.entry import by_time
from fraiseql_pipeline.lake.facts import Commit, Facts, Finding
from fraiseql_pipeline.lake.fsck import examine
from fraiseql_pipeline.lake.maintenance import Maintenance, maintain
from fraiseql_pipeline.lake.publish import Publisher
from fraiseql_pipeline.lake.published import current
from fraiseql_pipeline.lake.read import Snapshot, read_rejected
from fraiseql_pipeline.lake.staging import Staged
from fraiseql_pipeline.lake.storage import storage_errors, storage_for
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, as_utc, tile

EVENTS = "events"
QUARANTINE = "events_quarantine"
#: Up to this many windows are looked up one by one; more are read with the whole log.
_LOOKED_UP_WINDOWS = 50


class Lake:
    """The tables ``events`` and ``events_quarantine`` under a URI. Building one touches nothing; one object may serve many threads.

    ``options`` are deltalake's storage options. An object keeps what it has read of the logs, so a long-lived one is cheaper.
    """

    def __init__(self, uri: str, options: Mapping[str, str] | None = None) -> None:
        self.uri = uri.rstrip("/") or "/"
        self.options = dict(options or {})
        self.events = Table(storage_for(f"{self.uri}/{EVENTS}", self.options), EVENTS, LAKE_SCHEMA, "FraiseQL events", "timestamp")
        self.quarantine = Table(
            storage_for(f"{self.uri}/{QUARANTINE}", self.options),
            QUARANTINE,
            QUARANTINE_SCHEMA,
            "Rejected FraiseQL events",
            "window_key",
        )
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None

    @classmethod
    def of(cls, settings: Settings) -> Lake:
        """The lake of a run's settings."""
        return cls(settings.lake_uri, settings.lake_options)

    @property
    def events_uri(self) -> str:
        """Where ``events`` is, as deltalake, polars and DuckDB take it."""
        return self.events.storage.uri

    @property
    def quarantine_uri(self) -> str:
        """Where ``events_quarantine`` is."""
        return self.quarantine.storage.uri

    @contextmanager
    def stage(self, window: Window) -> Iterator[Staged]:
        """Take a window's content in, batch by batch; commit it inside the block. What is not committed is deleted at its end."""
        staged = Staged(window, self.events.storage, self.quarantine.storage)
        try:
            yield staged
        finally:
            staged.discard()

    def commit(
        self, staged: Staged, facts: Facts, *, force: bool = False, allow_shrink: bool = False, append: bool = False
    ) -> Commit:
        """Publish what was staged as the whole window, or with ``append`` merge it into the published one (late events);
        ``force`` takes these from a source of another identity too.

        The outcome is ``published`` (first time), ``replaced``, ``merged``, ``unchanged`` (the same content is there: nothing was committed,
        unless ``force``) or ``skipped`` (a commit of a higher settled pk is there). Done means durable.

        Raises ``LakeConflict`` (retryable) when other writers won every race, ``WindowShrinks``, ``LakeDamaged``, ``LakeUnavailable``
        (retryable) and ``LakeError``; then the window is as it was.
        """
        with storage_errors(f"publishing {staged.window}"):
            return Publisher(
                self.events, self.quarantine, staged, facts, force=force, allow_shrink=allow_shrink, append=append
            ).publish()

    def published(self, start: datetime | None = None, end: datetime | None = None) -> dict[Window, Commit]:
        """The newest commit of every published window that touches [start, end), oldest window first. Empty if there is no table.

        Hours that a later commit of their whole day replaced are not in it.
        """
        low, high = (None if at is None else as_utc(at) for at in (start, end))
        with self.events.lock:
            if not self.events.refresh():
                return {}
            if low is not None and high is not None and high - low <= timedelta(hours=_LOOKED_UP_WINDOWS):
                windows = [*tile(low, high, WindowSize.HOUR), *tile(low, high, WindowSize.DAY)]
                found = current({w.key: c for w in windows if (c := self.events.window(w)) is not None})
            else:
                found = self.events.published()
        if low is None and high is None:
            return dict(found)
        return {w: c for w, c in found.items() if (low is None or w.end > low) and (high is None or w.start < high)}

    def newest(self) -> Commit | None:
        """The latest commit of a window: from which source the lake is published now, and how far that had settled.

        ``None`` if nothing is published. What it costs does not grow with the number of windows.
        """
        with self.events.lock:
            return self.events.newest() if self.events.refresh() else None

    @property
    def was_there(self) -> bool:
        """Whether this object has read a lake, or was told of one that another process has read; it may be gone by now."""
        return self.events.was_there

    @was_there.setter
    def was_there(self, known: bool) -> None:
        self.events.was_there = known

    def is_gone(self) -> bool:
        """Whether the lake was there and is not there any more: ``published`` and ``newest`` say then that there is nothing."""
        with self.events.lock:
            return not self.events.refresh() and self.was_there

    def snapshot(self, version: int | None = None) -> Snapshot:
        """The newest version, or an older one, pinned: what it lists stays readable until ``maintain`` removes it (7 days by default).

        Raises ``LakeEmpty`` if there is no table, ``LakeUnavailable`` where there was one: a disk that is not mounted looks like a
        lake in which nothing was ever published.
        """
        with self.events.lock:
            if not self.events.refresh():
                if self.was_there:
                    raise LakeUnavailable(
                        "The lake was there before and is not there at the moment; check its storage, and try again when it is back."
                    )
                raise LakeEmpty("Nothing is published in the lake yet; run fraiseql-pipeline materialize first.")
            if version is not None and version != self.events.version:
                files = by_time(self.events.files_at(version))
                return Snapshot(version, files, self.events.published_at(version), self.events.storage, self.events.generation)
            with self._lock:
                at, kept = (self.events.generation, self.events.version), self._snapshot
                if kept is None or (kept.generation, kept.version) != at:
                    files = by_time(self.events.active())
                    kept = Snapshot(
                        self.events.version, files, self.events.published(), self.events.storage, self.events.generation
                    )
                    self._snapshot = kept
                return kept

    def read(
        self,
        start: datetime,
        end: datetime,
        *,
        columns: Sequence[str] | None = None,
        entity_types: Sequence[str] = (),
        version: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The events of [start, end) of one version in (timestamp, pk) order; see ``Snapshot.read``. Holes are not its business:
        ``published`` tells which windows are there. Yields nothing if there is no table; raises ``LakeUnavailable`` as ``snapshot`` does.
        """
        try:
            snapshot = self.snapshot(version)
        except LakeEmpty:
            return iter(())
        return snapshot.read(start, end, columns=columns, entity_types=entity_types)

    def quarantined(self, window: Window, columns: Sequence[str] | None = None) -> pa.Table:
        """The rejected rows of a window as ``QUARANTINE_SCHEMA``, or some of its columns, ordered by pk; empty if there are none."""
        with self.quarantine.lock:
            files = [file for file in self.quarantine.active() if file.touches(*window.micros)] if self.quarantine.refresh() else []
        return read_rejected(self.quarantine.storage, files, window, columns)

    def fsck(self, repair: bool = False) -> list[Finding]:
        """What is broken and how to repair it; with ``repair`` the safe repairs are made. Empty means sound."""
        with storage_errors("examining the lake"):
            return examine(self.events, self.quarantine, repair=repair)

    def maintain(self, now: datetime, *, retention: timedelta = timedelta(days=7)) -> Maintenance:
        """Compact days that ended two days ago, delete files older than the retention that no version within it needs, checkpoint."""
        with storage_errors("maintaining the lake"):
            return maintain((self.events, self.quarantine), now, retention)
