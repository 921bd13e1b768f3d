"""The assets ``events`` and ``events_quarantine``: one step publishes a window to both with one commit.

What lives here: the step and what it tells Dagster about each window. What must not: how a window is published
(``fraiseql_pipeline.pipeline``), what is shown of it (``report.py``), what is checked (``checks.py``).

Invariants
 1. A run settles once and commits at most once per window, whether it was given one window or a hundred. With ``only_new`` it settles
    once for what is late and once for what is missing.
 2. Every window carries its own metadata and its own check results; left to itself Dagster copies one result to all of a run.
 3. Whatever fails, a window or the telling of it, windows that this run committed are reported as materialized all the same, so a backfill
    asks again only for the rest.
 4. A window that halted is the one whose check fails, and what stands of it stays what it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg
from pydantic import Field

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.errors import PipelineError, ValidationHalted
from fraiseql_pipeline.event import COLUMNS, EXTRACTED
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window

from . import checks, partitions, readback, report
from .failures import RETRIES, STOPPED, failure
from .report import CHANGE_LOG, EVENTS, QUARANTINE
from .resources import Flight, FraiseQL

#: Limits how many runs read the change log at once, where the instance sets a limit for this pool.
POOL = "fraiseql_change_log"


class Publishing(dg.Config):
    """How a run publishes its windows; the defaults read every window again and replace what changed."""

    force: bool = Field(
        False,
        description="publish from this source whatever the lake was published from, and write every window anew: unchanged, damaged or settled "
        "further ones too",
    )
    allow_shrink: bool = Field(False, description="let a window lose events that the source no longer has")
    other_size: bool = Field(False, description="let the lake have windows of both sizes, days in the place of their hours")
    only_new: bool = Field(
        False, description="publish missing windows and add late events to the others, without reading these again"
    )


def build_events(settings: Settings, retries: dg.RetryPolicy = RETRIES) -> dg.AssetsDefinition:
    """The step, partitioned as ``settings`` say."""
    windows = partitions.windows(settings)

    @dg.multi_asset(
        name="events",
        description="Publishes windows of the change log: the accepted events, and beside them the rejected ones with their reasons.",
        specs=_specs(settings),
        check_specs=checks.specs(windows),
        partitions_def=windows,
        backfill_policy=partitions.per_run(settings),
        retry_policy=retries,
        pool=POOL,
        can_subset=True,
    )
    def events(context: dg.AssetExecutionContext, config: Publishing, fraiseql: FraiseQL, flight: Flight) -> Iterator[Any]:
        done = list[Materialization]()

        def on_window(one: Materialization) -> None:
            done.append(one)
            context.log.info(_line(one))

        try:
            asked = partitions.windows_of(context)
            partitions.must_be(windows, fraiseql.settings())
            with fraiseql.changelog() as changelog:
                publish(asked, config, fraiseql.settings(), changelog, fraiseql.lake(), context.run.run_id, on_window)
            shown = describe(done, fraiseql, flight, context.log.warning)
        except (Exception, *STOPPED) as error:  # noqa: BLE001 - whatever ended the run, what it published before is told first
            with suppress(Exception):  # the first error is the one to tell
                yield from partly_published(context, describe_anyhow(done, fraiseql, flight, context.log.warning), error)
            raise failure(error) from None
        yield from published(context, shown)

    return events


def source_spec() -> dg.AssetSpec:
    """The change log itself: nothing here writes it."""
    return dg.AssetSpec(
        CHANGE_LOG,
        description="FraiseQL's change log in Postgres: one row per mutation. Read, never written.",
        group_name="fraiseql",
        kinds={"postgres"},
    )


def _specs(settings: Settings) -> list[dg.AssetSpec]:
    common: dict[str, Any] = {
        "deps": [CHANGE_LOG],
        "group_name": "fraiseql",
        "kinds": {"deltalake", "python"},
        "owners": ["team:data"],
        "code_version": report.CODE_VERSION,
    }
    late = settings.window.duration
    return [
        dg.AssetSpec(
            EVENTS,
            description="Events of the change log, complete per window, each exactly once.",
            metadata=report.events_table(settings),
            freshness_policy=dg.FreshnessPolicy.time_window(fail_window=3 * late, warn_window=2 * late),
            **common,
        ),
        dg.AssetSpec(
            QUARANTINE,
            description="Rows of the change log that are no sound events, as read, with every reason. Published by the same commit as `events`.",
            metadata=report.quarantine_table(settings),
            **common,
        ),
    ]


def _line(one: Materialization) -> str:
    commit = one.commit
    return f"{one.window.key}: {commit.outcome}, {commit.accepted_rows:,} events, {commit.quarantined_rows:,} quarantined, {commit.state}"


def publish(
    asked: Sequence[Window],
    config: Publishing,
    settings: Settings,
    changelog: ChangeLog,
    lake: Lake,
    run_id: str,
    on_window: Callable[[Materialization], None],
) -> None:
    """Publish the windows of a run; ``on_window`` gets each as it is done, so that it is known even if a later one fails."""
    run: dict[str, Any] = {"settings": settings, "changelog": changelog, "lake": lake, "run_id": run_id}
    if not config.only_new:
        pipeline.materialize(
            asked,
            force=config.force,
            allow_shrink=config.allow_shrink,
            other_size=config.other_size,
            on_window=on_window,
            **run,
        )
        return
    published = lake.published(asked[0].start, asked[-1].end)  # of the other window size too
    standing = {window: published[window] for window in asked if window in published}
    told: set[Window] = set()
    refusal: PipelineError | None = None

    def merged(one: Materialization) -> None:
        told.add(one.window)
        on_window(one)

    try:
        pipeline.merge_late(list(standing), on_window=merged, **run)
    except PipelineError as error:
        if not error.of_one_window:
            raise
        refusal = error  # of some windows, which keep no other one waiting
        told.update(Window.parse(key) for key, _ in error.refused)
    for window, commit in standing.items():
        if window not in told:
            on_window(Materialization(window, replace(commit, outcome="unchanged")))
    # Last, so that a missing window that halts leaves those that stand told of, and not red in the UI.
    try:
        missing = [window for window in asked if window not in standing]
        pipeline.materialize(missing, other_size=config.other_size, on_window=on_window, **run)
    except PipelineError as error:
        if refusal is not None:
            error.refused = (*refusal.refused, *error.refused)
        raise
    if refusal is not None:
        raise refusal


@dataclass(frozen=True, slots=True)
class Shown:
    """What Dagster is told about one published window."""

    window: Window
    events: dict[str, Any]
    quarantine: dict[str, Any]
    checks: tuple[dg.AssetCheckResult, ...]


def describe(done: Sequence[Materialization], fraiseql: FraiseQL, flight: Flight, warn: Callable[[str], None]) -> list[Shown]:
    """What is to be told about windows that were published, oldest first. A Flight server is told of them here, all commits made."""
    if not done:
        return []
    stored, settings = fraiseql.lake().snapshot(), fraiseql.settings()
    totals = report.Totals.of(stored)
    ordered = sorted(done, key=lambda one: one.window)
    sent = readback.read_back([one.window for one in ordered], stored, lambda: flight.client(settings), warn)
    shown = [
        Shown(
            one.window,
            report.events_of(one, stored, totals),
            report.quarantine_of(one, totals),
            (*checks.evaluate(one, settings, stored), read),
        )
        for one, read in zip(ordered, sent, strict=True)
    ]
    for last in shown[-1:]:  # what Dagster shows of a table is what its newest materialization says
        last.events.update(report.lineage(COLUMNS))
        last.quarantine.update(report.lineage(EXTRACTED))
    return shown


def describe_anyhow(
    done: Sequence[Materialization], fraiseql: FraiseQL, flight: Flight, warn: Callable[[str], None]
) -> list[Shown]:
    """The same for a run that failed. If this is what failed, what the commits alone say; the checks then have no result."""
    try:
        return describe(done, fraiseql, flight, warn)
    except Exception as error:  # noqa: BLE001 - the run tells why it failed; this is about what it published
        warn(f"{len(done)} published windows are told without sample and checks: describing them failed ({type(error).__name__}).")
        ordered = sorted(done, key=lambda one: one.window)
        return [Shown(one.window, report.events_committed(one), report.quarantine_committed(one), ()) for one in ordered]


def published(context: dg.AssetExecutionContext, shown: Sequence[Shown]) -> Iterator[Any]:
    """The events of a run that published all of its windows."""
    selected = context.selected_asset_keys
    for one in shown:
        for key, metadata in ((EVENTS, one.events), (QUARANTINE, one.quarantine)):
            if key in selected:
                context.add_asset_metadata(metadata, asset_key=key, partition_key=one.window.key)
            else:  # one commit publishes to both tables, whichever was asked for
                yield dg.AssetMaterialization(key, partition=one.window.key, metadata=metadata)
    for key in selected:
        yield dg.MaterializeResult(key)
    yield from _checked(context, shown)
    for check in context.selected_asset_check_keys:
        yield dg.Output(None, checks.output_name(check.name))


def partly_published(context: dg.AssetExecutionContext, shown: Sequence[Shown], error: BaseException) -> Iterator[Any]:
    """The events of a run that failed after some of its windows; of a halted window, the check that tells why."""
    for one in shown:
        yield dg.AssetMaterialization(EVENTS, partition=one.window.key, metadata=one.events)
        yield dg.AssetMaterialization(QUARANTINE, partition=one.window.key, metadata=one.quarantine)
    yield from _checked(context, shown)
    for key, refusal in error.refused if isinstance(error, PipelineError) else ():
        if isinstance(refusal, ValidationHalted):
            window = Window.parse(key)
            yield checks.halted(window, str(refusal), checks.standing(context, window))


def _checked(context: dg.AssetExecutionContext, shown: Sequence[Shown]) -> Iterator[dg.AssetCheckEvaluation]:
    targets = checks.targets(context, [one.window for one in shown])
    for one in shown:
        for result in one.checks:
            yield checks.on(one.window, result, targets.get(one.window))
