"""The benchmarks run, small: what they measure is the business of a quiet machine."""

from __future__ import annotations

from datetime import UTC, datetime

from fraiseql_pipeline.benchmark import comparison


def test_windows_are_added_to_the_same_two_lakes_in_every_round(changelog_url: str) -> None:
    told: list[str] = []
    day = comparison.day_of(datetime(2026, 11, 22, tzinfo=UTC))
    report = comparison.windows(changelog_url, day, few=2, many=25, rounds=2, tell=told.append)
    assert [line for line in told if line.startswith("publishing")] == ["publishing 2 empty windows", "publishing 25 empty windows"]
    assert [(result.case, result.metric, result.skipped) for result in report.results] == [
        ("few", "seconds_per_window", None),
        ("many", "seconds_per_window", None),
        ("plan", "plan", None),
        ("plan", "first_plan", None),
    ]
    assert [ratio.budget for ratio in report.ratios] == [1.2, 20, 20]
    assert all(ratio.value for ratio in report.ratios)
