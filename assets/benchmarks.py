"""The asset ``benchmarks``: what the pipeline is worth on this machine, as asset checks.

What lives here: an asset without partitions and with a job of its own, so that no backfill ever runs it. What must not: a measurement
(``fraiseql_pipeline/benchmark/``). The checks hold ratios against their budgets, both sides measured in this run on the same events of
a scratch database: a slow machine is slow for both. Absolute numbers are metadata, which Dagster plots over time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from fraiseql_pipeline.benchmark import comparison
from fraiseql_pipeline.benchmark.report import Report
from fraiseql_pipeline.changelog import scratch_changelog, write_sample

from .failures import STOPPED, failure
from .resources import FraiseQL

BENCHMARKS = dg.AssetKey(["fraiseql", "benchmarks"])

#: The name of the check → what is measured and what for.
MEASUREMENTS: Mapping[str, tuple[Callable[..., Report], str]] = {
    "conversion": (comparison.conversion, "Event JSON to Arrow, against the standard library."),
    "materialize": (comparison.materialize, "Postgres to Delta, against polars and deltalake and against the server's own COPY."),
    "flight_read": (
        comparison.flight_read,
        "Lake to client, against a pyarrow.flight server that holds the same events in memory.",
    ),
}


class Measuring(dg.Config):
    """How much is measured. The budgets are meant for a million events on a quiet machine; fewer tell sooner, and less."""

    events: int = Field(1_000_000, ge=1000, description="sample events of one day")
    rounds: int = Field(3, ge=1, le=50, description="how often every case is run")


def build_benchmarks() -> dg.AssetsDefinition:
    """The asset and its checks."""

    @dg.asset(
        key=BENCHMARKS,
        description="What the pipeline is worth on this machine: ratios against what one would use without it, measured side by side.",
        group_name="benchmarks",
        kinds={"python"},
        owners=["team:data"],
        check_specs=[dg.AssetCheckSpec(name, asset=BENCHMARKS, description=text) for name, (_, text) in MEASUREMENTS.items()],
    )
    def benchmarks(context: dg.AssetExecutionContext, config: Measuring, fraiseql: FraiseQL) -> dg.MaterializeResult:  # type: ignore[type-arg]  # Dagster reads it
        try:
            reports = dict(_measure(fraiseql, config, context.log.info))
        except (Exception, *STOPPED) as error:  # noqa: BLE001 - translated, never swallowed
            raise failure(error) from None
        return dg.MaterializeResult(
            metadata={"events": config.events}
            | {f"{name}: {label}": value for name, report in reports.items() for label, value in _numbers(report)},
            check_results=[_held(name, report) for name, report in reports.items()],
        )

    return benchmarks


def benchmarks_job() -> Any:  # the type has no public name
    """The job that measures; nothing else runs the asset unless it is asked for by name."""
    return dg.define_asset_job(
        "benchmarks", dg.AssetSelection.assets(BENCHMARKS), description="Measures the pipeline on this machine."
    )


def _measure(fraiseql: FraiseQL, config: Measuring, tell: Callable[[str], None]) -> Iterator[tuple[str, Report]]:
    day = comparison.day_of()
    with scratch_changelog(fraiseql.settings()) as changelog:
        write_sample(changelog, config.events, days=1, end=day.end)
        for name, (measure, _) in MEASUREMENTS.items():
            yield name, measure(changelog.url, day, config.events, rounds=config.rounds, tell=tell)


def _numbers(report: Report) -> Iterator[tuple[str, float]]:
    """The medians of all cases, references too, and the ratios."""
    for result in report.results:
        if result.median is not None:
            yield f"{result.case} ({result.unit})", round(result.median, 3)
    for ratio in report.ratios:
        if ratio.value is not None:
            yield ratio.name, round(ratio.value, 3)


def _held(name: str, report: Report) -> dg.AssetCheckResult:
    rows = [
        f"| {ratio.name} | {'not measured' if ratio.value is None else f'{ratio.value:.3g}'} | {'≤' if ratio.at_most else '≥'} {ratio.budget:g} |"
        for ratio in report.ratios
    ]
    return dg.AssetCheckResult(
        passed=report.met,
        check_name=name,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "budgets": dg.MetadataValue.md("\n".join(["| ratio | value | budget |", "|---|---:|---:|", *rows])),
            "report": dg.MetadataValue.json(report.as_dict()),
            **{ratio.name: round(ratio.value, 3) for ratio in report.ratios if ratio.value is not None},
        },
    )
