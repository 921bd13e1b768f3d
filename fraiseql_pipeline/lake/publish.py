"""Publishing one window: which entry, if any, the two tables get.

What lives here: the decision (publish, replace, merge, unchanged, skipped, refuse), the two commits and their retries. What must not: encoding,
reading for users.

Invariants
 1. The quarantine is committed first, the events second, with the quarantine's version and hash in their commit. Readers trust the events.
 2. A window never goes back unasked: neither table takes content of a lower settled pk of the same source than it has, but with ``force``.
 3. Everything is decided on the state that the commit succeeds (compare-and-swap), so no decision is stale. After a lost race all of it
    is decided again; after ``ATTEMPTS`` the run fails with ``LakeConflict`` and nothing is changed.
 4. A replacement removes exactly the rows of its window. A file that also holds other rows is rewritten in the same commit. With ``force``
    neither the log nor the files are trusted: both tables are written anew, and files that cannot be read are removed as they are.
 5. While the quarantine has a day that the events do not have yet, no hour of it is published: the run of the day may still go on.
 6. A merge adds rows above the published settled pk only, and counts them onto what is there.
 7. Equal content of the same source commits nothing, whatever the settled pk: no event lies between the two pks, so the older one still finds
    every late event. It is recorded when a provisional window becomes sealed, and when the source's identity changes.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache

import xxhash

from fraiseql_pipeline.errors import LakeConflict, LakeError, WindowShrinks
from fraiseql_pipeline.event import LAKE_SCHEMA, QUARANTINE_SCHEMA
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.facts import Commit, Facts, Outcome
from fraiseql_pipeline.lake.parquet import NewFile
from fraiseql_pipeline.lake.rewrite import Rewriter
from fraiseql_pipeline.lake.staging import Staged
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.version import package_version
from fraiseql_pipeline.window import Window, WindowSize

#: 4 processes that replaced one window 25 times each as fast as they could lost 113 races for 100 commits.
ATTEMPTS = 100
_LONGEST_PAUSE_SECONDS = 0.5
#: How long a run is taken to be between its two commits, which are milliseconds apart, or minutes where it rewrites a large day's
#: files; then it died.
_BETWEEN_COMMITS = timedelta(minutes=15)


class Publisher:
    """Publishes one staged window into the pair of tables."""

    def __init__(
        self, events: Table, quarantine: Table, staged: Staged, facts: Facts, *, force: bool, allow_shrink: bool, append: bool
    ) -> None:
        self._events = events
        self._quarantine = quarantine
        self._staged = staged
        self._facts = facts
        self._force = force
        self._allow_shrink = allow_shrink
        self._append = append
        self._window = staged.window
        self._rewriter = Rewriter(staged.window, force and not append)
        self._tried: Commit | None = None

    def publish(self) -> Commit:
        """Commit what was staged, or say why not; see ``Lake.commit``."""
        staged, facts = self._staged, self._facts
        if staged.accepted_rows + staged.quarantined_rows != facts.source_rows:
            raise LakeError(
                f"The rows of {self._window} do not add up: {facts.source_rows} read, {staged.accepted_rows} accepted,"
                f" {staged.quarantined_rows} quarantined; nothing was committed."
            )
        staged.finish()
        for attempt in range(ATTEMPTS):
            with self._events.lock, self._quarantine.lock:
                self._events.refresh(create=True)
                self._quarantine.refresh(create=True)
                commit = self._attempt()
            if commit is not None:
                return commit
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_SECONDS, 0.002 * 1.3**attempt)))
        raise LakeConflict(f"Other writers won {ATTEMPTS} races for {self._window}; nothing was committed, run it again.")

    def _attempt(self) -> Commit | None:
        """One try on one state of both tables; ``None`` after a lost race."""
        day = Window.holding(self._window.start, WindowSize.DAY)
        if self._window != day:
            if self._events.window(day) is not None:
                raise LakeError(f"{self._window} cannot be published: {day} is published as one window; materialize days here.")
            if (between := self._quarantine.window(day)) is not None:
                raise _between(
                    between,
                    f"{self._window} cannot be published: a run of {day} as one window is between its two commits, or died there;"
                    f" materialize {day}.",
                )
        current = self._events.window(self._window)
        if current is not None and self._tried is not None and current.as_json() == self._tried.as_json():
            return current  # the store had taken the last try, although it reported a failure
        if (settled := self._settled(current)) is not None:
            assert current is not None
            return replace(current, outcome=settled)
        before = [current] if current is not None else self._replaced_hours()
        had_rows = self._had_rows(before)
        self._refuse_shrinking(before, had_rows)
        commit = self._planned(current, self._late_rows(before, had_rows))
        if current is not None and not self._append and not self._force and self._same_content(current):
            self._tried = replace(commit, quarantine_version=current.quarantine_version)
            return self._commit(self._tried, [], [])
        found, quarantine_version = self._commit_quarantine(commit, current)
        if not found:
            return None
        self._tried = replace(commit, quarantine_version=quarantine_version)
        extra, removes = ([], []) if self._append else self._rewriter.plan(self._events)
        return self._commit(self._tried, [*self._staged.events_files(), *extra], removes)

    def _commit(self, commit: Commit, adds: Sequence[NewFile], removes: Sequence[File]) -> Commit | None:
        version = self._events.commit(adds, removes, commit.as_json(), self._window)
        if version is None:
            return None
        self._events.checkpoint_if_due()
        newest = self._events.window(self._window)
        # It may be of another run that came right behind: told is what this one published.
        if newest is not None and newest.table_version != version:
            return replace(commit, table_version=version, committed_at=newest.committed_at)
        return newest

    # -------------------------------------------------------------------------------------------------------------- decision

    def _settled(self, current: Commit | None) -> Outcome | None:
        """``skipped`` or ``unchanged`` where nothing is to be committed; raises where nothing may be."""
        facts, staged = self._facts, self._staged
        if self._append:
            if current is None:
                raise LakeError(f"Late events cannot be merged into {self._window}: it is not published; materialize it.")
            if current.identity != facts.identity and not self._force:
                raise LakeError(
                    f"Late events of another source cannot be merged into {self._window}; materialize it again, or add them with"
                    " `late --force` if the change log is the same, taken over by a standby."
                )
            if facts.settled_pk <= current.settled_pk:
                return "skipped"
            if staged.lowest_pk is not None and staged.lowest_pk <= current.settled_pk:
                raise LakeConflict(f"Another run published {self._window} up to a later event meanwhile; merge it again.")
            return None
        if current is None:
            newer = [c.window for c in self._replaced_hours() if c.identity == facts.identity and c.settled_pk > facts.settled_pk]
            if newer and not self._force:
                raise LakeConflict(
                    f"Another run published {newer[0]} up to a later event meanwhile; materialize {self._window} again."
                )
            return None
        if current.identity != facts.identity:
            return None
        if facts.settled_pk < current.settled_pk and not self._force:
            return "skipped"
        if self._force or not self._same_content(current):
            return None
        return None if facts.state == "sealed" and current.state != "sealed" else "unchanged"

    def _same_content(self, current: Commit) -> bool:
        """Whether the window holds exactly what was staged, in both tables."""
        staged = self._staged
        held = self._quarantine.window(self._window)
        return (
            (current.content_hash, current.accepted_rows, current.quarantined_rows, current.schema_hash)
            == (staged.content_hash, staged.accepted_rows, staged.quarantined_rows, schema_hash())
        ) and (held.quarantine_hash if held is not None else "") == staged.quarantine_hash

    def _had_rows(self, before: Sequence[Commit]) -> int | None:
        """How many of the staged rows had been settled when these commits were made; ``None`` where they are of another source, whose keys
        do not compare, or where nothing but late events was staged.
        """
        if self._append or not before or any(c.identity != self._facts.identity for c in before):
            return None
        return self._staged.count([(*c.window.micros, c.settled_pk) for c in before])

    def _refuse_shrinking(self, published: Sequence[Commit], had_rows: int | None) -> None:
        if self._append or self._allow_shrink or not published:
            return
        before = sum(c.accepted_rows + c.quarantined_rows for c in published)
        # What has come since does not make up for what is gone.
        rows = self._staged.accepted_rows + self._staged.quarantined_rows if had_rows is None else had_rows
        if rows < before:
            if had_rows is not None and any(c.settled_pk > self._facts.settled_pk for c in published):
                raise LakeConflict(
                    f"Another run published {self._window} up to a later event, with {before} rows of which this one has {rows}; materialize it"
                    " again. If the source really went back, allow it (--allow-shrink)."
                )
            raise WindowShrinks(
                f"{self._window} was published with {before} rows, of which the source has {rows} left, and was left as it is;"
                " if the source really dropped old events, allow it (--allow-shrink)."
            )

    def _late_rows(self, published: Sequence[Commit], had_rows: int | None) -> int:
        """Those that earlier commits counted, and what is new in this one."""
        known = sum(c.late_rows for c in published)
        if self._append:
            return known + self._facts.source_rows
        return 0 if had_rows is None else min(known + self._facts.source_rows - had_rows, self._facts.source_rows)

    def _replaced_hours(self) -> list[Commit]:
        """The published hours that the first commit of their day replaces."""
        if self._window.size is WindowSize.HOUR:
            return []
        hours = (Window(self._window.start + timedelta(hours=h), WindowSize.HOUR) for h in range(24))
        return [c for h in hours if (c := self._events.window(h)) is not None]

    def _planned(self, current: Commit | None, late_rows: int) -> Commit:
        """The commit to be, but for its versions."""
        staged, facts = self._staged, self._facts
        commit = Commit(
            window=self._window,
            outcome="published" if current is None else "merged" if self._append else "replaced",
            table_version=-1,
            quarantine_version=None,
            settled_pk=facts.settled_pk,
            state=facts.state,
            source_rows=facts.source_rows,
            accepted_rows=staged.accepted_rows,
            quarantined_rows=staged.quarantined_rows,
            content_hash=staged.content_hash,
            bytes=staged.bytes,
            run_id=facts.run_id,
            committed_at=datetime.fromtimestamp(0, UTC),
            settled_at=facts.settled_at.astimezone(UTC),
            identity=facts.identity,
            reasons=dict(sorted(staged.reasons.items())),
            quarantine_hash=staged.quarantine_hash,
            schema_hash=schema_hash(),
            package_version=package_version(),
            late_rows=late_rows,
        )
        if current is None or not self._append:
            return commit
        return replace(
            commit,
            source_rows=current.source_rows + commit.source_rows,
            accepted_rows=current.accepted_rows + commit.accepted_rows,
            quarantined_rows=current.quarantined_rows + commit.quarantined_rows,
            bytes=current.bytes + commit.bytes,
            reasons=dict(sorted((Counter(current.reasons) + staged.reasons).items())),
            content_hash=_chained(current.content_hash, commit.content_hash) if facts.source_rows else current.content_hash,
            quarantine_hash=_chained(current.quarantine_hash, commit.quarantine_hash)
            if staged.quarantined_rows
            else current.quarantine_hash,
        )

    # ------------------------------------------------------------------------------------------------------------ quarantine

    def _commit_quarantine(self, commit: Commit, current: Commit | None) -> tuple[bool, int | None]:
        """Bring the quarantine to what the commit says; (whether it is there, its version)."""
        table = self._quarantine
        held = table.window(self._window)
        if held is None and not commit.quarantined_rows and not table.files_touching(self._window):
            return True, None
        held_hash = held.quarantine_hash if held is not None else ""
        stands = held is not None and (held_hash, held.quarantined_rows) == (commit.quarantine_hash, commit.quarantined_rows)
        if held is not None and stands and (self._append or not self._force):
            return True, held.table_version
        asked_back = self._force and not self._append
        if held is not None and held.identity == commit.identity and held.settled_pk > commit.settled_pk and not asked_back:
            return False, None  # a newer run is between its two commits: wait for it
        adds, removes = self._staged.quarantine_files(), list[File]()
        if not self._append:
            extra, removes = self._rewriter.plan(table)
            # What an earlier try of this very call brought in stays.
            mine, present = {f.path for f in adds}, table.files.get(self._window.start.date().isoformat(), {})
            adds = [*(f for f in adds if f.path not in present), *extra]
            removes = [f for f in removes if f.path not in mine]
            if held is not None and stands and not adds and not removes:
                return True, held.table_version
        elif current is not None and held_hash != current.quarantine_hash:
            if held is not None and held.outcome != "merged":
                raise _between(
                    held,
                    f"Late events cannot be merged into {self._window}: a run of it is between its two commits, or died there;"
                    f" materialize {self._window}.",
                )
            # A merge that died between its two commits left rows above the published pk: only those below stay.
            extra, removes = self._rewriter.plan(table, above_pk=current.settled_pk)
            adds = [*adds, *extra]
        version = table.commit(adds, removes, commit.as_json(), self._window)
        if version is not None:
            table.checkpoint_if_due()
        return version is not None, version


def _between(held: Commit, said: str) -> LakeError:
    """For who finds the first of a run's two commits without the second: to be tried again while that run may well go on."""
    return (LakeConflict if datetime.now(UTC) - held.committed_at < _BETWEEN_COMMITS else LakeError)(said)


def _chained(before: str, added: str) -> str:
    """The hash of content that came in two parts."""
    return xxhash.xxh3_128_hexdigest(f"{before}+{added}".encode())


@cache
def schema_hash() -> str:
    """Changes when a column, a type or the order of columns changes."""
    return xxhash.xxh3_64_hexdigest(f"{LAKE_SCHEMA}{QUARANTINE_SCHEMA}".encode())
