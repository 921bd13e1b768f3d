"""``bench flight`` and ``bench convert``: every case is in the report, and one that could not run says why."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fraiseql_pipeline.benchmark import comparison, flight, servers
from fraiseql_pipeline.benchmark.servers import NotThere, roapi
from fraiseql_pipeline.changelog import scratch_changelog, write_sample
from fraiseql_pipeline.encoding import ENCODINGS
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.support.code_location import hours
from tests.support.lakes import publish

ROWS = 2000


@pytest.mark.slow
def test_a_report_on_flight_has_every_case_and_every_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, less in (("_FIRST_BATCHES", 3), ("_PAIRS", 1), ("_NEWCOMERS", 2), ("_CROWD_SECONDS", 0.1)):
        monkeypatch.setattr(flight, name, less)
    lake, windows = Lake(str(tmp_path / "lake")), hours("2026-11-20", 6, 7)
    for window in windows:
        publish(lake, window, ROWS)
    said: list[str] = []
    report = flight.flight_server(lake.uri, windows[0].start, windows[-1].end, rounds=1, readers=(1, 3), tell=said.append)
    assert report.rows == ROWS * len(windows)
    figures = {(result.case, result.metric) for result in report.results}
    for name in ENCODINGS:
        assert {(f"{case} {name}", "rate") for case in ("cold", "warm", "reference")} <= figures
        assert (name, "bytes_per_event") in figures
    for case in ("with TLS compact+zstd", "without TLS compact+zstd", "JSON lines over HTTP", "ROAPI, Flight SQL", "3 readers"):
        assert (case, "rate") in figures
    assert {("one more beside 3 readers", "first_batch_p99"), ("3 readers", "fairness")} <= figures
    assert ("server with compact+zstd kept", "memory") in figures
    assert all(result.skipped is None or result.case == "ROAPI, Flight SQL" for result in report.results)
    assert all(ratio.value is not None for ratio in report.ratios)
    cold = {result.case: result.median for result in report.results if (result.metric, result.case[:5]) == ("first_batch", "cold ")}
    assert [ratio.value for ratio in report.ratios if "cold" in ratio.name] == [cold["cold plain+zstd"], max(cold.values())]
    assert all(result.median is None or 0 < result.min <= result.median <= result.max for result in report.results)


def test_a_reference_that_is_not_installed_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(servers.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NotThere, match=r"pip install 'fraiseql-pipeline\[bench\]'"), roapi(str(tmp_path)):
        pass


@pytest.mark.slow
def test_conversion_is_held_against_a_rate_and_against_the_standard_library(changelog_url: str) -> None:
    day = comparison.day_of(datetime(2026, 11, 21, tzinfo=UTC))
    with scratch_changelog(Settings(database_url=changelog_url)) as changelog:
        write_sample(changelog, ROWS, days=1, end=day.end)
        report = comparison.conversion(changelog.url, day, ROWS, rounds=1)
    assert [ratio.budget for ratio in report.ratios] == [1_000_000, 4]
    assert all(ratio.value for ratio in report.ratios)
