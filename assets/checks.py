"""Checks of a published window, evaluated in the step that published it, one result per partition.

What lives here: the specs and how each is decided. What must not: validation of events, which happens before the commit
(``validate.py``); a check tells afterwards whether what is stored is what was promised.

Invariant: a result names its partition and the materialization it is about; only a window that has none is told of without. Dagster
derives neither for a run of many partitions, and shows no status of a materialized partition for a result that is about none.
"""

import warnings
from collections.abc import Iterator, Sequence

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as Target,  # public in every event, exported nowhere
)

from fraiseql_pipeline.event import LAKE_SCHEMA, PARTITION
from fraiseql_pipeline.lake import Snapshot
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.validate import tolerated_rows
from fraiseql_pipeline.window import Window

from .readback import READBACK
from .report import EVENTS

#: A window is halted above ``max_rejected_share``; the check warns from this part of it on, while events still get through.
_WARN_AT = 0.5

_DESCRIPTIONS = {
    "counts_add_up": "The table holds exactly the events that the window's commit says it accepted.",
    "source_accounted_for": "Every event read from the change log is in `events` or in `events_quarantine`.",
    "quarantine_share": "The share of quarantined events is well below the limit that halts a window.",
    "schema": "The stored files of the window have the columns, types and nullability of the column table.",
    READBACK: "The Flight server sends the window as it was committed: as many events, with the same ids.",
}
NAMES = tuple(_DESCRIPTIONS)


def specs(windows: dg.PartitionsDefinition) -> list[dg.AssetCheckSpec]:
    """The checks of ``events``, partitioned like it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitioned checks may change in a patch release; the tests would tell
        return [
            dg.AssetCheckSpec(name, asset=EVENTS, description=text, partitions_def=windows) for name, text in _DESCRIPTIONS.items()
        ]


def output_name(name: str) -> str:
    """The name of the step's output that stands for a check; Dagster wants one per check, whatever the number of partitions."""
    return dg.AssetCheckSpec(name, asset=EVENTS).get_python_identifier()


def evaluate(one: Materialization, settings: Settings, stored: Snapshot) -> Iterator[dg.AssetCheckResult]:
    """Every check of one window that needs the lake only; ``stored`` is the table after the run."""
    yield _counts(one.window, stored)
    yield _accounted(one)
    yield _share(one, settings)
    yield _schema(one.window, stored)


def targets(context: dg.AssetExecutionContext, windows: Sequence[Window]) -> dict[Window, Target]:
    """The materializations this run has just recorded for windows."""
    if not windows:
        return {}
    wanted = dg.AssetRecordsFilter(asset_key=EVENTS, asset_partitions=[window.key for window in windows])
    found = context.instance.fetch_materializations(wanted, limit=2 * len(windows)).records
    return {
        Window.parse(record.partition_key): _target(record)
        for record in reversed(found)
        if record.partition_key and record.run_id == context.run.run_id
    }


def standing(context: dg.AssetExecutionContext, window: Window) -> Target | None:
    """The newest materialization of a window, whichever run recorded it; none for a window that was never published."""
    wanted = dg.AssetRecordsFilter(asset_key=EVENTS, asset_partitions=[window.key])
    found = context.instance.fetch_materializations(wanted, limit=1).records
    return _target(found[0]) if found else None


def on(window: Window, result: dg.AssetCheckResult, target: Target | None) -> dg.AssetCheckEvaluation:
    """A result as the result of one partition."""
    return dg.AssetCheckEvaluation(
        asset_key=EVENTS,
        check_name=result.check_name or "",
        passed=result.passed,
        metadata=result.metadata,
        severity=result.severity,
        description=result.description,
        target_materialization_data=target,
        partition=window.key,
    )


def halted(window: Window, why: str, target: Target | None) -> dg.AssetCheckEvaluation:
    """The result for a window of which nothing was published because too many of its events were rejected; ``target`` still stands."""
    return on(window, dg.AssetCheckResult(passed=False, check_name="quarantine_share", description=why), target)


def _target(record: dg.EventLogRecord) -> Target:
    return Target(storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp)


def _counts(window: Window, stored: Snapshot) -> dg.AssetCheckResult:
    # Another run may have replaced the window since: its newest commit is the one to hold the table against.
    stated = stored.published[window].accepted_rows
    held = sum(batch.num_rows for batch in stored.read(window.start, window.end, columns=("pk",)))
    counts = {"stored rows": held, "accepted rows": stated}
    return dg.AssetCheckResult(passed=held == stated, check_name="counts_add_up", metadata=counts)


def _accounted(one: Materialization) -> dg.AssetCheckResult:
    commit = one.commit
    counts = {"source rows": commit.source_rows, "accepted rows": commit.accepted_rows, "quarantined rows": commit.quarantined_rows}
    passed = commit.source_rows == commit.accepted_rows + commit.quarantined_rows
    return dg.AssetCheckResult(passed=passed, check_name="source_accounted_for", metadata=counts)


def _share(one: Materialization, settings: Settings) -> dg.AssetCheckResult:
    commit = one.commit
    halts = settings.max_rejected_share
    tolerated = tolerated_rows(halts)
    return dg.AssetCheckResult(
        passed=commit.quarantined_rows <= max(tolerated, commit.source_rows * halts * _WARN_AT),
        check_name="quarantine_share",
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "share": commit.quarantined_rows / commit.source_rows if commit.source_rows else 0.0,
            "limits": f"warns above {halts * _WARN_AT:.2%}, halts above {halts:.2%}"
            + (f"; {tolerated} events are always tolerated" if tolerated else ""),
        },
    )


def _schema(window: Window, stored: Snapshot) -> dg.AssetCheckResult:
    files = stored.files_in(window.start, window.end)
    unlike = {field for file in files for field in _unlike(pq.read_schema(stored.open(file)))}
    return dg.AssetCheckResult(
        passed=not unlike,
        check_name="schema",
        metadata={"files": len(files), "unlike the column table": ", ".join(sorted(unlike)) or "none"},
    )


def _unlike(found: pa.Schema) -> set[str]:
    """The columns that differ from the column table in type or nullability, are missing or are too many; Delta keeps the partition
    column in the path.
    """
    wanted = {field.name: field for field in LAKE_SCHEMA if field.name != PARTITION}
    return {
        name
        for name in {*wanted, *found.names}
        if name not in wanted or name not in found.names or not wanted[name].equals(found.field(name))
    }
