"""``bench``: our measurements against references, side by side in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.benchmark import comparison
from fraiseql_pipeline.benchmark import live as live_benchmark
from fraiseql_pipeline.benchmark.flight import flight_server
from fraiseql_pipeline.benchmark.report import Report
from fraiseql_pipeline.changelog import SHAPES, ShapeName, open_changelog, scratch_changelog, write_sample
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import WindowSize, tile

#: How much the budgets are meant for; less is over before a fixed cost is small beside it.
_MEANT_EVENTS, _MEANT_WINDOWS = 1_000_000, 10_000

#: Cases as a table names them, where the report has a short word.
_NAMES: Mapping[str, str] = {
    "ours": "ours, with validation",
    "polars": "polars read_database_uri(adbc) + write_delta",
    "adbc": "ADBC fetch alone",
    "copy": "the server's own COPY",
    "json_ours": "ours",
    "json_plain": "json.loads + pyarrow",
}

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure against references on the same rows, and compare the ratios with the budgets. Exit code 1 when one is missed."""


_ROUNDS = click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50), help="How often every case is run.")
_SHAPE = click.option(
    "--shape",
    default="typical",
    show_default=True,
    type=click.Choice(SHAPES),
    help="Width of the events: 320 or 610 bytes in the eight columns, uncompressed.",
)


def _events(text: str) -> Callable[[_Command], _Command]:
    return click.option("--events", default=1_000_000, show_default=True, type=click.IntRange(1000), help=text)


@contextmanager
def _filled(output: Output, events: int, shape: ShapeName, end: datetime) -> Iterator[str]:
    """URL of a scratch change log with the sample events of the day before ``end``."""
    with scratch_changelog(output.settings) as changelog:
        output.remark(f"Writing {events:,} sample events of one day …")
        write_sample(changelog, events, days=1, end=end, shape=shape)
        yield changelog.url


@bench.command()
@_events("Events of the day that is materialized.")
@_SHAPE
@_ROUNDS
@pass_output
def materialize(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """Postgres to Delta: ours, polars + deltalake, a bare ADBC fetch, the server's own COPY."""
    day = comparison.day_of()
    with _filled(output, events, shape, day.end) as url:
        report = comparison.materialize(url, day, events, rounds=rounds, tell=_teller(output))
    _show(output, _of(shape, report), judged=events >= _MEANT_EVENTS)


@bench.command()
@click.option("--few", default=10, show_default=True, type=click.IntRange(1), help="Windows of the small lake.")
@click.option("--many", default=10_000, show_default=True, type=click.IntRange(2), help="Windows of the large lake.")
@_ROUNDS
@pass_output
def windows(output: Output, few: int, many: int, rounds: int) -> None:
    """What one more window costs in a small and in a large lake."""
    names = {"few": f"{few:,} windows", "many": f"{many:,} windows"}
    with scratch_changelog(output.settings) as changelog:
        report = comparison.windows(
            changelog.url, comparison.day_of(), few=few, many=many, rounds=rounds, tell=_teller(output, names)
        )
    _show(output, report, judged=many >= _MEANT_WINDOWS, names=names)


@bench.command()
@_events("Events of the day that is served.")
@_SHAPE
@_ROUNDS
@pass_output
def flight(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """Arrow Flight streams: ours in every encoding, a pyarrow.flight server, ROAPI and JSON lines; many readers, TLS, memory."""
    day = comparison.day_of()
    with _filled(output, events, shape, day.end) as url, tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        settings = Settings(database_url=url, lake_uri=f"{directory}/lake", start=day.start)
        windows = list(tile(day.start, day.end, WindowSize.HOUR))
        with open_changelog(settings) as opened:
            pipeline.materialize(windows, settings=settings, changelog=opened, lake=Lake.of(settings))
        report = flight_server(settings.lake_uri, day.start, day.end, rounds=rounds, tell=_teller(output))
    _show(output, _of(shape, report), judged=events >= _MEANT_EVENTS)


@bench.command()
@_events("Events that are not published yet.")
@_SHAPE
@pass_output
def live(output: Output, events: int, shape: ShapeName) -> None:
    """Committed in Postgres to a Flight reader that follows, and events that are served before they are published."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with _filled(output, events, shape, end) as url, tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        report = live_benchmark.live(url, f"{directory}/lake", events, tell=_teller(output))
    _show(output, _of(shape, report), judged=events >= _MEANT_EVENTS)


@bench.command()
@_events("Events that are converted.")
@_SHAPE
@_ROUNDS
@pass_output
def convert(output: Output, events: int, shape: ShapeName, rounds: int) -> None:
    """FraiseQL's event JSON to Arrow: ours, and json.loads + pyarrow."""
    day = comparison.day_of()
    with _filled(output, events, shape, day.end) as url:
        report = comparison.conversion(url, day, events, rounds=rounds, tell=_teller(output))
    _show(output, _of(shape, report), judged=events >= _MEANT_EVENTS)


def _of(shape: ShapeName, report: Report) -> Report:
    """The report, named as the command that repeats it."""
    return report if shape == "typical" else replace(report, bench=f"{report.bench} --shape {shape}")


def _teller(output: Output, names: Mapping[str, str] = _NAMES) -> Callable[[str], None]:
    """Says what is measured, the case as a table names it."""

    def tell(text: str) -> None:
        head, colon, case = text.rpartition(": ")
        output.remark(f"{head}{colon}{names.get(case, case)}")

    return tell


def _show(output: Output, report: Report, *, judged: bool, names: Mapping[str, str] = _NAMES) -> None:
    """``judged``: as much was measured as the budgets are meant for; of less, the ratios are told and nothing is missed."""
    told = report.as_dict()
    if not judged:
        told["ratios"] = [{**ratio, "met": None} for ratio in told["ratios"]]
    output.result(told)
    output.table(
        f"{report.bench}: {report.rows:,} {'windows' if report.bench == 'windows' else 'events'}",
        ("case", "metric", "median", "min", "max", "unit"),
        [
            (names.get(r.case, r.case), r.metric, _number(r.median), _number(r.min), _number(r.max), r.unit)
            if r.skipped is None
            else (names.get(r.case, r.case), r.metric, r.skipped, "", "", "")
            for r in report.results
        ],
    )
    marks = {True: "met", False: "missed", None: "not measured"}
    output.table(
        "Budgets",
        ("ratio", "value", "budget", ""),
        [
            (
                r.name,
                _number(r.value),
                f"{'≤' if r.at_most else '≥'} {_number(r.budget)}",
                marks[r.met] if judged or r.met is None else "",
            )
            for r in report.ratios
        ],
    )
    if not judged:
        output.say(f"Budgets are meant for {_MEANT_EVENTS:,} events, or {_MEANT_WINDOWS:,} windows.")
    elif not report.met:
        raise SystemExit(1)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.3g}"
