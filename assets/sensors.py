"""The sensor that publishes what is missing and adds what came late.

What lives here: asking Dagster for runs. What must not: the decision (``needs.py``), and run keys: a run key never runs twice, so one
failed run would leave its window missing for ever.

Invariants
 1. A window that a run in flight was given is left alone, as long as that run is heard of: of a machine that went down with its runs
    nobody tells, and Dagster may show them as started for ever. Two runs of one window do no harm.
 2. Neighbouring windows share a run, up to ``windows_per_run``.
 3. Only partitions are asked for: Dagster refuses a tick as a whole for one key it does not know. A published window that is none gets
    a warning where it would get a run.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import dagster as dg

from fraiseql_pipeline.errors import WindowError
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, tile

from . import needs, partitions
from .report import EVENTS, QUARANTINE
from .resources import FraiseQL

#: Runs asked for in one tick.
MAX_RUNS = 10

#: A run that was begun and has told nothing for so long holds no windows: one that lives tells of each as it is published.
SILENCE = timedelta(hours=1)

_STATUS = dg.DagsterRunStatus
_IN_FLIGHT = [_STATUS.QUEUED, _STATUS.NOT_STARTED, _STATUS.MANAGED, _STATUS.STARTING, _STATUS.STARTED, _STATUS.CANCELING]
_PARTITION = "dagster/partition"
_RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
_ONLY_NEW = {"ops": {"events": {"config": {"only_new": True}}}}


def build_catch_up(events: dg.AssetsDefinition) -> dg.SensorDefinition:
    """The sensor over the asset; stopped until somebody starts it."""

    @dg.sensor(
        name="catch_up",
        target=[events],
        minimum_interval_seconds=60,
        description=(
            f"Publishes missing windows of the last {needs.LOOK_BACK.days} days; older ones need a backfill. "
            "Adds late events to every published window, however old."
        ),
    )
    def catch_up(context: dg.SensorEvaluationContext, fraiseql: FraiseQL) -> dg.SensorResult:
        settings, now, memory = fraiseql.settings(), datetime.now(UTC), needs.Memory.parse(context.cursor)
        partitions.must_be(events.partitions_def, settings)
        with fraiseql.changelog() as changelog:
            found = needs.look(settings, changelog, fraiseql.lake(), memory, now)
        due = needs.due(found, memory, in_flight(context.instance, time.time()), now)
        ours = [window for window in due if partitions.cover(settings, window)]
        spans = list(needs.spans(found, memory, ours, settings.windows_per_run))[:MAX_RUNS]
        others = [window for window in due if not partitions.cover(settings, window)]
        if others:
            context.log.warning(_not_ours(others))
        asked = [*others, *(window for span in spans for window in span)]
        return dg.SensorResult(
            run_requests=[_request(span) for span in spans],
            skip_reason=None if spans else dg.SkipReason(_why_nothing(settings, found.causes)),
            cursor=needs.remember(found, memory, asked, now).dump(),
        )

    return catch_up


def in_flight(instance: dg.DagsterInstance, now: float) -> set[Window]:
    """The windows that runs were given which have not ended; ``now`` in seconds, as Dagster's times are."""
    found: set[Window] = set()
    for record in instance.get_run_records(dg.RunsFilter(statuses=_IN_FLIGHT)):
        run = record.dagster_run
        if (run.asset_selection is None or run.asset_selection & {EVENTS, QUARANTINE}) and not _silent(instance, record, now):
            found.update(_windows(run.tags))
    return found


def _silent(instance: dg.DagsterInstance, record: dg.RunRecord, now: float) -> bool:
    if record.dagster_run.status is _STATUS.QUEUED:  # it has nothing to tell, however long the queue is
        return False
    last = instance.get_records_for_run(record.dagster_run.run_id, limit=1, ascending=False).records
    told = last[0].timestamp if last else record.create_timestamp.timestamp()
    return now - told > SILENCE.total_seconds()


def _not_ours(windows: Sequence[Window]) -> str:
    first = ", ".join(window.key for window in windows[:5])
    return (
        f"Events came late to {len(windows):,} published windows that are no partitions: {first}{', …' if windows[5:] else ''}. "
        "They are from another FRAISEQL_WINDOW or FRAISEQL_START than today's; add the events with `fraiseql-pipeline late`."
    )


def _why_nothing(settings: Settings, needy: Collection[Window]) -> str:
    waiting = sum(partitions.cover(settings, window) for window in needy)
    others = len(needy) - waiting
    said = []
    if waiting:
        said += [
            f"{waiting:,} window{'s wait' if waiting > 1 else ' waits'} for a run that was asked for, or for the next attempt."
        ]
    if others:
        said += [f"{others:,} published window{'s' if others > 1 else ''} with late events can get no run; see the warnings."]
    return " ".join(said) or "Nothing of the last two days is missing, and nothing came late."


def _windows(tags: Mapping[str, str]) -> Iterator[Window]:
    keys = [tags[tag] for tag in (_PARTITION, *_RANGE) if tag in tags]
    with suppress(WindowError):  # a run of a job of somebody else, partitioned otherwise
        if keys:
            first, last = Window.parse(keys[0]), Window.parse(keys[-1])
            yield from tile(first.start, last.end, first.size)


def _request(span: Sequence[Window]) -> dg.RunRequest:
    if len(span) == 1:
        return dg.RunRequest(partition_key=span[0].key, run_config=_ONLY_NEW)
    return dg.RunRequest(tags=dict(zip(_RANGE, (span[0].key, span[-1].key), strict=True)), run_config=_ONLY_NEW)
