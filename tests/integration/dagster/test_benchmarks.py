"""The benchmarks as an asset: figures in metadata, ratios as checks that can fail, and nothing that a backfill would run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from assets import benchmarks
from assets.benchmarks import BENCHMARKS, build_benchmarks
from assets.definitions import definitions
from assets.report import EVENTS, QUARANTINE
from assets.resources import FraiseQL
from fraiseql_pipeline.benchmark.report import Ratio, Report, Result
from fraiseql_pipeline.settings import Settings
from tests.support.code_location import Location


def _measured(value: float | None, seen: list[Any] | None = None) -> Callable[..., Report]:
    def measure(url: str, day: Any, rows: int, *, rounds: int, tell: Callable[[str], None]) -> Report:
        tell("measuring")
        (seen if seen is not None else []).append((rows, rounds))
        results = (Result("ours", "rate", "events/s", 12.0, 10.0, 14.0), Result("copy", "rate", "events/s", skipped="not allowed"))
        return Report("any", rows, results, (Ratio("ours / theirs", value, 2.0),))

    return measure


def _run(location: Location, **config: int) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [build_benchmarks()],
        resources={"fraiseql": FraiseQL()},
        run_config={"ops": {"fraiseql__benchmarks": {"config": config}}},
        instance=location.instance,
    )


@pytest.mark.parametrize(("value", "passed"), [(2.5, True), (1.5, False), (None, True)], ids=["met", "missed", "not measured"])
def test_a_missed_budget_fails_its_check_and_no_other(
    location: Location, monkeypatch: pytest.MonkeyPatch, value: float | None, passed: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        benchmarks,
        "MEASUREMENTS",
        {
            "conversion": (_measured(3.0, seen), ""),
            "materialize": (_measured(value, seen), ""),
            "flight_read": (_measured(4.0, seen), ""),
        },
    )
    run = _run(location, events=1000, rounds=2)
    assert seen == [(1000, 2)] * 3
    found = {one.check_name: one for one in run.get_asset_check_evaluations()}
    assert {name: one.passed for name, one in found.items()} == {"conversion": True, "materialize": passed, "flight_read": True}
    assert found["materialize"].severity is dg.AssetCheckSeverity.WARN
    (shown,) = [event.materialization for event in run.get_asset_materialization_events()]
    assert shown.metadata["conversion: ours / theirs"].value == 3.0
    assert shown.metadata["conversion: ours (events/s)"].value == 12.0
    assert not [name for name in shown.metadata if "copy" in name]  # a case that was skipped has no figure


@pytest.mark.slow
def test_the_benchmarks_measure_every_ratio_in_the_run(location: Location) -> None:
    run = _run(location, events=5000, rounds=1)
    found = {one.check_name: one for one in run.get_asset_check_evaluations()}
    assert set(found) == set(benchmarks.MEASUREMENTS)
    for one in found.values():
        ratios = one.metadata["report"].value["ratios"]
        assert ratios
        assert all(ratio["value"] is not None for ratio in ratios), ratios


def test_only_its_own_job_runs_the_benchmarks() -> None:
    defs = definitions(Settings())
    graph = defs.resolve_asset_graph()
    assert graph.get(BENCHMARKS).partitions_def is None
    assert set(defs.resolve_job_def("benchmarks").asset_layer.executable_asset_keys) == {BENCHMARKS}
    for automation in (defs.resolve_schedule_def("each_window"), defs.resolve_sensor_def("catch_up")):
        job = defs.get_repository_def().get_job(automation.job_name)
        assert set(job.asset_layer.executable_asset_keys) == {EVENTS, QUARANTINE}
