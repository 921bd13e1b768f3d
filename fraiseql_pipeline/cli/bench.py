"""``bench``: our measurements against references, side by side in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from fraiseql_pipeline import benchmark, benchmark_live, pipeline
from fraiseql_pipeline.benchmark import Report
from fraiseql_pipeline.benchmark_flight import flight_server
from fraiseql_pipeline.changelog import SHAPES, ShapeName, open_changelog, scratch_changelog, write_sample
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import WindowSize, tile

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure against references on the same rows, and compare the ratios with the budgets. Exit code 1 when one is missed."""


_ROUNDS = click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50), help="How often every case is run.")
_SHAPE = click.option(
    "--shape", default="typical", show_default=True, type=click.Choice(SHAPES), help="Width of the events: 320 or 610 bytes."
)


def _events(text: str) -> Callable[[_Command], _Command]:
    return click.option("--events", default=1_000_000, show_default=True, type=click.IntRange(1000), help=text)


@contextmanager
def _filled(output: Output, events: int, shape: ShapeName, end: datetime) -> Iterator[str]:
    """URL of a scratch change log with the sample events of the day before ``end``."""
    with scratch_changelog(output.settings) as changelog:
        output.say(f"Writing {events:,} sample events of one day …")
        write_sample(changelog, events, days=1, end=end, shape=shape)
        yield changelog.url


@bench.command()
@_events("Events of the day that is materialized.")
@_SHAPE
@_ROUNDS
@pass_output
def materialize(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """Postgres to Delta: ours, polars + deltalake, a bare ADBC fetch, the server's own COPY."""
    day = benchmark.day_of()
    with _filled(output, events, shape, day.end) as url:
        report = benchmark.materialize(url, day, events, rounds=rounds, tell=output.say)
    _show(output, _of(shape, report))


@bench.command()
@click.option("--few", default=10, show_default=True, type=click.IntRange(1), help="Windows of the small lake.")
@click.option("--many", default=10_000, show_default=True, type=click.IntRange(2), help="Windows of the large lake.")
@_ROUNDS
@pass_output
def windows(output: Output, few: int, many: int, rounds: int) -> None:
    """What one more window costs in a small and in a large lake."""
    with scratch_changelog(output.settings) as changelog:
        report = benchmark.windows(changelog.url, benchmark.day_of(), few=few, many=many, rounds=rounds, tell=output.say)
    _show(output, report)


@bench.command()
@_events("Events of the day that is served.")
@_SHAPE
@_ROUNDS
@pass_output
def flight(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """Arrow Flight streams: ours in every encoding, a pyarrow.flight server, ROAPI and JSON lines; many readers, TLS, memory."""
    day = benchmark.day_of()
    with _filled(output, events, shape, day.end) as url, tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        settings = Settings(database_url=url, lake_uri=f"{directory}/lake", start=day.start)
        windows = list(tile(day.start, day.end, WindowSize.HOUR))
        with open_changelog(settings) as opened:
            pipeline.materialize(windows, settings=settings, changelog=opened, lake=Lake.of(settings))
        report = flight_server(settings.lake_uri, day.start, day.end, rounds=rounds, tell=output.say)
    _show(output, _of(shape, report))


@bench.command()
@_events("Events that are not published yet.")
@_SHAPE
@pass_output
def live(output: Output, events: int, shape: ShapeName) -> None:
    """Committed in Postgres to a Flight reader that follows, and events that are served before they are published."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with _filled(output, events, shape, end) as url, tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        report = benchmark_live.live(url, f"{directory}/lake", events, tell=output.say)
    _show(output, _of(shape, report))


@bench.command()
@_events("Events that are converted.")
@_SHAPE
@_ROUNDS
@pass_output
def convert(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """FraiseQL's event JSON to Arrow: ours, and json.loads + pyarrow."""
    day = benchmark.day_of()
    with _filled(output, events, shape, day.end) as url:
        report = benchmark.conversion(url, day, events, rounds=rounds, tell=output.say)
    _show(output, _of(shape, report))


def _of(shape: ShapeName, report: Report) -> Report:
    """The report, named as the command that repeats it."""
    return report if shape == "typical" else replace(report, bench=f"{report.bench} --shape {shape}")


def _show(output: Output, report: Report) -> None:
    output.result(report.as_dict())
    output.table(
        f"{report.bench}: {report.rows:,} rows",
        ("case", "metric", "median", "min", "max", "unit"),
        [
            (r.case, r.metric, _number(r.median), _number(r.min), _number(r.max), r.unit)
            if r.skipped is None
            else (r.case, r.metric, r.skipped, "", "", "")
            for r in report.results
        ],
    )
    marks = {True: "met", False: "missed", None: "not measured"}
    output.table(
        "Budgets",
        ("ratio", "value", "budget", ""),
        [(r.name, _number(r.value), f"{'≤' if r.at_most else '≥'} {r.budget:g}", marks[r.met]) for r in report.ratios],
    )
    if not report.met:
        raise SystemExit(1)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}"
