"""Short cases side by side: ours, and what a user would write without this package.

What lives here: which cases are run side by side, and the budgets their ratios are held against. What must not: the work of a case
(``cases.py``), and a case that only exists to look good. A reference is what a user would write without this package, on the same
rows in the same run.

How a number is made: every case of a round runs in a fresh process, one after the other, and the rounds repeat, so that a slow minute
of the machine hits all cases alike. A process imports first, then measures; its peak memory is the operating system's own figure.
Medians are reported with minimum and maximum; only ratios are held against a budget.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fraiseql_pipeline.benchmark.cases import publish_empty, write_event_json
from fraiseql_pipeline.benchmark.report import Ratio, Report, Result, Told
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.window import Window, WindowSize


def materialize(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """One day of ``rows`` events: our materialize against what reads and what writes without us, and against the server itself."""
    cases = ("ours", "polars", "adbc", "copy")
    measured = _rounds(cases, {"url": database_url, "day": day.key}, rounds, tell)
    results = [
        result
        for case in cases
        for result in (_result(measured, case, "rate", "events/s"), _result(measured, case, "peak_memory", "MiB"))
        if not (case == "copy" and result.metric == "peak_memory")
    ]
    return Report(
        "materialize",
        rows,
        tuple(results),
        (
            Ratio("events/s, ours / polars read_database_uri(adbc) + write_delta", _over(measured, "ours", "polars"), 1.75),
            Ratio("events/s, ours / the server's own COPY", _over(measured, "ours", "copy"), 0.65),
            Ratio("peak memory of ours in MiB", _median(measured["ours"].get("peak_memory")), 400, at_most=True),
        ),
    )


def windows(
    database_url: str, day: Window, *, few: int = 10, many: int = 10_000, rounds: int = 3, tell: Told = lambda _: None
) -> Report:
    """Cost of one more window in a lake of ``few`` and of ``many`` windows; the windows are empty, so only the fixed cost is left. And of a
    plan over ``many``.

    The two lakes are published once; every round works on links of their files, which nothing alters once they are written.
    """
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        standing = {"few": few, "many": many}
        for case, count in standing.items():
            tell(f"publishing {count:,} empty windows")
            publish_empty(database_url, Path(directory) / case, day, count)
        arguments = {"url": database_url, "day": day.key, "lakes": directory, "standing": standing}
        measured = _rounds((*standing, "plan"), arguments, rounds, tell)
    cost = _over(measured, "many", "few", "seconds_per_window")
    return Report(
        "windows",
        many,
        (
            _result(measured, "few", "seconds_per_window", "s"),
            _result(measured, "many", "seconds_per_window", "s"),
            _result(measured, "plan", "plan", "ms"),
            _result(measured, "plan", "first_plan", "ms"),
        ),
        (
            Ratio(f"cost of a window, at {many:,} windows / at {few:,}", cost, 1.2, at_most=True),
            Ratio(f"plan over {many:,} windows in ms", _median(measured["plan"].get("plan")), 20, at_most=True),
            Ratio(
                f"plan over {many:,} windows in ms, the first after a commit",
                _median(measured["plan"].get("first_plan")),
                20,
                at_most=True,
            ),
        ),
    )


def conversion(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """Event JSON of one day's events into the eight columns: ours against the standard library's ``json`` and pyarrow."""
    cases = ("json_ours", "json_plain")
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        lines = write_event_json(database_url, Path(directory), day)
        measured = _rounds(cases, {"lines": str(lines)}, rounds, tell)
    return Report(
        "convert",
        rows,
        tuple(_result(measured, case, metric, "events/s") for metric in ("rate", "first_rate") for case in cases),
        (
            Ratio("event JSON to Arrow in events/s", _median(measured["json_ours"].get("rate")), 1_000_000),
            Ratio("events/s, ours / json.loads + pyarrow", _over(measured, "json_ours", "json_plain"), 4),
        ),
    )


def flight_read(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """A warm read of one day over Flight, by the same client with the same codec: our server against pyarrow.flight's, from memory."""
    measured = _rounds(("flight_ours", "flight_plain"), {"url": database_url, "day": day.key}, rounds, tell)
    return Report(
        "flight_read",
        rows,
        (_result(measured, "flight_ours", "rate", "events/s"), _result(measured, "flight_plain", "rate", "events/s")),
        (Ratio("events/s, ours / a pyarrow.flight server", _over(measured, "flight_ours", "flight_plain"), 2.2),),
    )


def _rounds(cases: Iterable[str], arguments: Mapping[str, Any], rounds: int, tell: Told) -> dict[str, dict[str, list[float]]]:
    """``{case: {metric: values}}``; a case that cannot run holds ``{"skipped: <why>": []}``."""
    measured: dict[str, dict[str, list[float]]] = {case: defaultdict(list) for case in cases}
    for number in range(rounds):
        for case, metrics in measured.items():
            tell(f"round {number + 1} of {rounds}: {case}")
            # The arguments hold a database URL: they go through the child's stdin, not through a command line that `ps` shows.
            done = subprocess.run(
                [sys.executable, "-m", "fraiseql_pipeline.benchmark.cases", case],
                input=json.dumps(arguments),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise PipelineError(f"The benchmark case {case!r} failed: {last[0]}")
            for metric, value in json.loads(done.stdout).items():
                if metric == "skipped":
                    metrics[f"skipped: {value}"] = []
                else:
                    metrics[metric].append(value)
    return measured


def _result(measured: Mapping[str, Mapping[str, list[float]]], case: str, metric: str, unit: str) -> Result:
    values = measured[case].get(metric)
    if not values:
        why = next((name.removeprefix("skipped: ") for name in measured[case] if name.startswith("skipped: ")), "not measured")
        return Result(case, metric, unit, skipped=why)
    return Result(case, metric, unit, statistics.median(values), min(values), max(values))


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _over(measured: Mapping[str, Mapping[str, list[float]]], ours: str, other: str, metric: str = "rate") -> float | None:
    """The median of the ratios round by round: both sides of a pair met the same minute of the machine."""
    pairs = zip(measured[ours].get(metric, ()), measured[other].get(metric, ()), strict=False)
    return _median([a / b for a, b in pairs])


def day_of(now: datetime | None = None) -> Window:
    """The last whole day: where the benchmarks put their events."""
    return Window.holding((now or datetime.now(UTC)) - timedelta(days=1), WindowSize.DAY)
