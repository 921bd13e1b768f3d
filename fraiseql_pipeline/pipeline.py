"""Materialize: the only place that knows the order in which a window is read, validated, stored and published.

What lives here: that order, and what a run tells about it. What must not: SQL (``changelog/``), rules (``validate.py``), Delta
(``lake/``), an orchestrator (``assets/``).

Invariants
 1. One settlement serves a whole run, and it is taken before the first read; nothing is published without one.
 2. A window is committed only after its stream ended cleanly and its counts added up: read = accepted + quarantined.
 3. Reading, validating and encoding one window overlap on threads of their own, joined by queues of a few batches, so memory does
    not grow with the window.
 4. A window that is refused keeps no other one waiting: its error ends the run after all of them. What concerns every window ends it at
    once. Windows committed before stay committed, and running again repeats nothing that is published.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

import pyarrow as pa

from fraiseql_pipeline import memory
from fraiseql_pipeline.ahead import ahead
from fraiseql_pipeline.changelog import Audit, ChangeLog, Settlement
from fraiseql_pipeline.errors import PipelineError, SourceRefused, WindowError
from fraiseql_pipeline.lake import Commit, Facts, Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.validate import Validation, Validator, check_share
from fraiseql_pipeline.window import Window, WindowSize

_T = TypeVar("_T")

#: After this many batches, what was freed goes back to the system; without this the peak rises with the window: of 3,000,000 events by
#: 45 MiB. It costs up to a tenth of the CPU.
_TIDY_EVERY = 4

#: Windows that an error names; a run of Dagster has 96 at most as it comes.
NAMED = 100

#: Validated batches that may wait while the encoder has one: enough to keep both sides busy. More only cost memory (about 16 MiB each).
_AHEAD = 1


@dataclass(frozen=True, slots=True)
class Materialization:
    """What one window became.

    ``seconds`` holds the busy time per stage (read, validate, encode, commit) and ``total``, the time from first read to commit; the
    stages overlap, so they may add up to more than the total. ``reasons`` counts quarantined rows per ``column:rule``. They and the three
    counts of rows are of what this run read, of late events alone where it merged some; ``commit`` counts the whole window.
    """

    window: Window
    commit: Commit
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    source_rows: int = 0
    accepted_rows: int = 0
    quarantined_rows: int = 0


def materialize(
    windows: Sequence[Window],
    *,
    settings: Settings,
    changelog: ChangeLog,
    lake: Lake,
    run_id: str | None = None,
    force: bool = False,
    allow_shrink: bool = False,
    other_size: bool = False,
    jobs: int = 1,
    on_window: Callable[[Materialization], None] | None = None,
) -> list[Materialization]:
    """Publish each window as one Delta commit; oldest first, in the order given back.

    ``force`` publishes from this source whatever the lake was published from, and writes every window anew: unchanged, damaged or settled
    further ones too. ``allow_shrink`` lets a window lose rows the source no longer has. ``other_size`` lets the lake have windows of both
    sizes; a day takes the place of its hours. ``jobs`` windows are worked on side by side. ``on_window`` hears of every window as it is
    done, from the thread that did it.

    Raises ``WindowError`` for a window that has not ended, lies before FRAISEQL_START where that is set, or is of another size than the
    lake's (unless ``other_size``), ``SourceRefused`` for a change log that is not the one the lake was published from (unless ``force``),
    ``SettleTimeout`` when writers stay open (nothing is published then), and whatever the source fails with. What validation, the
    lake or the source refuse of one window is raised when all others are published: the error of the oldest one, naming every one; see
    ``PipelineError.refused``.
    """
    ordered = sorted(set(windows))
    if not ordered:
        return []
    _check_start(ordered[0], settings.first_window)
    known = lake.newest()  # before settling: from then on only a rebuilt log can settle below it
    if not other_size and known is not None:
        _check_size(ordered, known, lake)
    changelog.preflight()
    settlement = changelog.settle(ordered[-1].end)
    if not force:
        check_same_source(known, settlement)
    if ordered[-1].end > settlement.settled_at:
        raise WindowError(
            f"Window {ordered[-1].key} has not ended yet (the database's clock says {settlement.settled_at:%Y-%m-%d %H:%M:%S} UTC); "
            "materialize it after its end."
        )
    run = run_id or str(uuid.uuid4())

    def one(window: Window) -> Materialization:
        return _publish(window, settlement, settings, changelog, lake, run, force=force, allow_shrink=allow_shrink)

    return _each(one, ordered, jobs, on_window)


def merge_late(
    windows: Sequence[Window] | None = None,
    *,
    settings: Settings,
    changelog: ChangeLog,
    lake: Lake,
    run_id: str | None = None,
    force: bool = False,
    jobs: int = 1,
    on_window: Callable[[Materialization], None] | None = None,
) -> list[Materialization]:
    """Add the late events of published windows to them, one commit per window that has any; ``windows`` narrows the search.

    Rows are only ever added, so a source that has deleted old rows loses nothing of the lake. ``force``: the change log is the one the
    windows were published from although its identity has changed (a standby took over); its events above their settled pk are added.

    Raises as ``materialize`` does.
    """
    published = lake.published()
    if windows is not None:
        published = {window: published[window] for window in sorted(set(windows) & published.keys())}
    if not published:
        return []
    newest = lake.newest()  # before settling, as above
    contract = changelog.preflight()
    if not force and newest is not None and newest.identity != contract.identity:
        raise _another_source(newest, _OTHER_IDENTITY)
    late = changelog.late({window: commit.settled_pk for window, commit in published.items()})
    if not late:
        return []
    settlement = changelog.settle(max(item.window.end for item in late))
    if not force:
        check_same_source(newest, settlement)
    run = run_id or str(uuid.uuid4())

    def one(window: Window) -> Materialization:
        return _publish(window, settlement, settings, changelog, lake, run, force=force, onto=published[window])

    return _each(one, sorted(item.window for item in late), jobs, on_window)


@dataclass(frozen=True, slots=True)
class Audited:
    """How many events a window has in the source and in the lake up to the settled pk of its commit, and whether they are the same."""

    window: Window
    source_rows: int
    lake_rows: int
    equal: bool


def audit(window: Window, commit: Commit, *, changelog: ChangeLog, lake: Lake) -> Audited:
    """Compare a published window with the source: the same keys with the same ids, accepted and quarantined together.

    ``commit`` is the newest one the caller knows. Where another run has committed since, the window is compared again as it is now.
    """
    while True:
        source = changelog.audit(window, commit.settled_pk)
        held = Audit.of(_held(lake, window, commit.settled_pk))
        newest = commit if source == held else lake.published(window.start, window.end).get(window, commit)
        if newest.table_version == commit.table_version:
            return Audited(window, source.rows, held.rows, source == held)
        commit = newest


def _held(lake: Lake, window: Window, settled_pk: int) -> Iterator[tuple[int, str | None]]:
    for batch in lake.read(window.start, window.end, columns=["pk", "event_id"]):
        yield from zip(batch["pk"].to_pylist(), batch["event_id"].to_pylist(), strict=True)
    rejected = lake.quarantined(window, ["pk", "event_id"])
    for pk, event_id in zip(rejected["pk"].to_pylist(), rejected["event_id"].to_pylist(), strict=True):
        # One above is of a merge between its two commits: the quarantine's comes first, readers trust the events'.
        if pk <= settled_pk:
            yield pk, event_id


def _publish(
    window: Window,
    settlement: Settlement,
    settings: Settings,
    changelog: ChangeLog,
    lake: Lake,
    run_id: str,
    *,
    force: bool = False,
    allow_shrink: bool = False,
    onto: Commit | None = None,
) -> Materialization:
    """Reads, judges, stores and commits one window; ``onto``: only what settled since that commit, merged into it."""
    began = time.perf_counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    reasons: Counter[str] = Counter()
    source_rows = 0
    after_pk = None if onto is None else onto.settled_pk
    validator = Validator(window, () if onto is None else _known_ids(lake, window))

    def validated(batches: Iterator[pa.RecordBatch]) -> Generator[Validation | None]:
        nonlocal source_rows
        while True:
            with _clock(seconds, "read"):
                batch = next(batches, None)
            if batch is None:
                break
            source_rows += batch.num_rows
            with _clock(seconds, "validate"):
                validation = validator.check(batch)
            del batch  # what was accepted of it may wait here for a while
            yield validation
        yield None  # nothing more to encode: the files are closed while the last values are judged
        with _clock(seconds, "validate"):
            validator.confirm()

    with lake.stage(window) as staged:
        with ahead(changelog.read(window, settlement, after_pk=after_pk), validated, _AHEAD) as validations:
            for number, validation in enumerate(validations, 1):
                with _clock(seconds, "encode"):
                    if validation is None:
                        staged.finish()
                        continue
                    staged.write(validation.accepted)
                    staged.quarantine(validation.quarantined)
                reasons.update(validation.reasons)
                if number % _TIDY_EVERY == 0:
                    memory.give_back()
        # A few late rows are not judged by themselves: the share is one of the whole window.
        accepted, quarantined = (0, 0) if onto is None else (onto.accepted_rows, onto.quarantined_rows)
        check_share(
            window,
            accepted + staged.accepted_rows,
            quarantined + staged.quarantined_rows,
            reasons + Counter({} if onto is None else onto.reasons),
            settings.max_rejected_share,
        )
        facts = Facts(
            settled_pk=settlement.settled_pk,
            state=settlement.state_of(window),
            identity=settlement.identity,
            run_id=run_id,
            settled_at=settlement.settled_at,
            source_rows=source_rows,
        )
        with _clock(seconds, "commit"):
            commit = lake.commit(staged, facts, force=force, allow_shrink=allow_shrink, append=onto is not None)
    seconds["total"] = time.perf_counter() - began
    return Materialization(window, commit, dict(reasons), dict(seconds), source_rows, staged.accepted_rows, staged.quarantined_rows)


def _check_start(oldest: Window, first: datetime | None) -> None:
    if first is not None and oldest.start < first:
        raise WindowError(
            f"No window before FRAISEQL_START ({first.isoformat()}) may be published, got {oldest.key}: all windows between them would be "
            "missing to every read. Choose a later one, or set an earlier FRAISEQL_START."
        )


def _check_size(windows: Sequence[Window], newest: Commit, lake: Lake) -> None:
    """A forgotten FRAISEQL_WINDOW would replace published hours by days, and nothing takes that back."""
    size = windows[0].size
    other = newest.window if newest.window.size is not size else None
    if other is None and size is WindowSize.DAY:
        other = next((w for w in lake.published(windows[0].start, windows[-1].end) if w.size is not size), None)
    if other is not None:
        raise WindowError(
            f"The lake holds windows of one {other.size}, such as {other.key}, and {windows[0].key} is one {size}; set FRAISEQL_WINDOW="
            f"{other.size}, or ask for it with --other-size (other_size) if the lake shall have both, days in the place of their hours."
        )


def check_same_source(known: Commit | None, settlement: Settlement) -> None:
    """Raises ``SourceRefused`` where a settlement is of another change log than the lake's newest commit, or of less of it."""
    if known is None or (known.identity == settlement.identity and known.settled_pk <= settlement.settled_pk):
        return
    raise _another_source(
        known, _OTHER_IDENTITY if known.identity != settlement.identity else f"has only reached key {settlement.settled_pk}"
    )


_OTHER_IDENTITY = "is another cluster, timeline or table, or its keys began anew"


def _another_source(known: Commit, what: str) -> SourceRefused:
    return SourceRefused(
        f"The change log {what}, but window {known.window.key} was published from one that had reached key {known.settled_pk}: it was restored, "
        "rebuilt or replaced. Check FRAISEQL_DATABASE_URL; if the change is meant, materialize the windows again with --force, or use a new lake."
    )


def _known_ids(lake: Lake, window: Window) -> Iterator[pa.Array]:
    return (batch.column(0) for batch in lake.read(window.start, window.end, columns=["event_id"]))


def _each(
    one: Callable[[Window], Materialization],
    windows: Sequence[Window],
    jobs: int,
    on_window: Callable[[Materialization], None] | None,
) -> list[Materialization]:
    """What ``one`` makes of each window, in order. Raises what a window was refused for when all others are done, anything else at once."""
    refused: dict[Window, PipelineError] = {}

    def attempt(window: Window) -> Materialization | None:
        try:
            done = one(window)
        except PipelineError as error:
            if not error.of_one_window:
                raise
            refused[window] = _naming(error, window)
            return None
        if on_window is not None:
            on_window(done)
        return done

    try:
        done = _side_by_side(attempt, windows, jobs)
    except PipelineError as error:
        error.refused = _keyed(refused)
        raise
    if refused:
        raise _refusal(refused, len(windows)) from min(refused.items())[1]
    return [each for each in done if each is not None]


def _naming(error: PipelineError, window: Window) -> PipelineError:
    """The error, whose sentence names the window: the source's does not know it."""
    if window.key not in str(error):
        error.args = (f"Window {window.key}: {error}",)
    return error


def _keyed(refused: Mapping[Window, PipelineError]) -> tuple[tuple[str, PipelineError], ...]:
    return tuple((window.key, error) for window, error in sorted(refused.items()))


def _refusal(refused: Mapping[Window, PipelineError], windows: int) -> PipelineError:
    """The error of the oldest refused window, whose message names the others too."""
    keyed = _keyed(refused)
    first = copy(keyed[0][1])
    first.refused = keyed
    if others := [key for key, _ in keyed[1:]]:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        first.args = (f"{first} Refused were {len(keyed)} of {windows} windows, the others: {', '.join(others[:NAMED])}{more}.",)
    return first


def _side_by_side(one: Callable[[Window], _T], windows: Sequence[Window], jobs: int) -> list[_T]:
    if jobs <= 1 or len(windows) <= 1:
        return [one(window) for window in windows]
    with ThreadPoolExecutor(jobs, thread_name_prefix="window") as pool:
        futures = [pool.submit(one, window) for window in windows]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


@contextmanager
def _clock(seconds: defaultdict[str, float], stage: str) -> Iterator[None]:
    at = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - at
