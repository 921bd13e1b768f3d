"""A failed run: what is retried, what is told, and what of it stays published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from assets import events
from assets.report import QUARANTINE
from fraiseql_pipeline.errors import LakeConflict, WindowShrinks
from fraiseql_pipeline.window import Window
from tests.support import code_location
from tests.support.code_location import Location, hours, write

MORNING = hours("2026-11-20", 6, 9)


def _attempts(run: dg.ExecuteInProcessResult) -> int:
    return 1 + sum(event.event_type_value == "STEP_UP_FOR_RETRY" for event in run.all_events)


def _failure(run: dg.ExecuteInProcessResult) -> Any:
    (failed,) = [event for event in run.all_events if event.event_type_value == "STEP_FAILURE"]
    failure = failed.step_failure_data.user_failure_data
    assert failure is not None
    return failure


def _message(run: dg.ExecuteInProcessResult) -> str:
    return _failure(run).description or ""


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(LakeConflict("Others won."), 3), (WindowShrinks("It would shrink."), 1), (KeyError("hunter2"), 1)],
    ids=["retryable", "final", "defect"],
)
def test_only_what_calls_itself_retryable_is_tried_again(
    location: Location, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(events.pipeline, "materialize", fail)
    run = location.run(MORNING[0])
    assert not run.success
    assert _attempts(run) == attempts
    assert "hunter2" not in repr([record.event_log_entry for record in location.instance.get_records_for_run(run.run_id).records])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, dg.DagsterExecutionInterruptedError])
def test_a_run_that_is_stopped_is_not_tried_again_and_tells_what_it_has_published(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    write(changelog_url, MORNING[0], 10)
    materialize = events.pipeline.materialize

    def stopped(windows: Any, **options: Any) -> None:
        materialize(windows[:1], **options)
        raise interrupt

    monkeypatch.setattr(events.pipeline, "materialize", stopped)
    run = location.run(*MORNING)
    assert not run.success
    assert _attempts(run) == 1
    assert "was stopped" in _message(run)
    assert location.metadata()[MORNING[0].key]["dagster/partition_row_count"] == 10


@pytest.mark.parametrize("asked", [(MORNING[1], MORNING[0]), ()], ids=["a range that ends before it begins", "no partition"])
def test_a_run_without_a_window_fails_with_a_sentence(location: Location, asked: tuple[Window, ...]) -> None:
    run = location.run(*asked)
    assert not run.success
    assert _attempts(run) == 1
    assert "This run was given no window: choose a partition, or a range that begins before it ends." in _message(run)
    assert location.metadata() == {}


@pytest.mark.parametrize("other", [{"FRAISEQL_WINDOW": "day"}, {"FRAISEQL_START": "2026-11-20T07:00:00"}])
def test_a_run_that_is_configured_for_other_windows_than_its_partitions_publishes_nothing(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    write(changelog_url, MORNING[0], 10)
    made = events.build_events(location.settings)
    monkeypatch.setattr(code_location, "build_events", lambda *_: made)
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    run = location.run(MORNING[0])
    assert not run.success
    assert "FRAISEQL_WINDOW and FRAISEQL_START must be for runs what they are for the code location" in _message(run)
    assert location.lake.published() == {}


def test_a_defect_after_the_commit_is_told_and_hides_no_window(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("hunter" + str(2))  # a place shows source lines, never values

    monkeypatch.setattr(events.report, "events_of", fail)
    write(changelog_url, MORNING[0], 10, broken=1)
    run = location.run(MORNING[0])
    assert not run.success
    assert location.metadata()[MORNING[0].key]["dagster/partition_row_count"] == 10
    assert location.metadata(QUARANTINE)[MORNING[0].key]["dagster/partition_row_count"] == 1
    assert _attempts(run) == 1
    assert "KeyError is a defect" in _message(run)
    assert "hunter2" not in repr([record.event_log_entry for record in location.instance.get_records_for_run(run.run_id).records])


def test_an_unreachable_source_is_tried_again_and_named(
    location: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FRAISEQL_DATABASE_URL", f"postgresql://user:hunter2@/none?host={tmp_path}")
    run = location.run(MORNING[0])
    assert not run.success
    assert _attempts(run) == 3
    assert "hunter2" not in _message(run)
    assert _message(run)


def test_windows_beside_refused_ones_are_reported_and_each_halted_one_tells_why(location: Location, changelog_url: str) -> None:
    halted = {MORNING[1], MORNING[2]}
    sound = [window for window in MORNING if window not in halted]
    write(changelog_url, MORNING[0], 10)
    write(changelog_url, MORNING[1], 100, broken=40)
    write(changelog_url, MORNING[2], 100, broken=50)
    run = location.run(*MORNING)
    assert not run.success
    assert _attempts(run) == 1
    assert all(window.key in _message(run) for window in halted)
    refused = _failure(run).metadata["refused windows"].value.splitlines()
    assert [("40 of 140" in line, "50 of 150" in line) for line in refused] == [(True, False), (False, True)]
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        window.key: 10 if window == MORNING[0] else 0 for window in sound
    }
    assert set(location.metadata(QUARANTINE)) == {window.key for window in sound}
    assert set(location.lake.published()) == set(sound)
    found = location.checks("quarantine_share")
    assert {found[window.key] for window in sound} == {("SUCCEEDED", True)}
    assert {found[window.key] for window in halted} == {("FAILED", True)}


def test_late_events_that_are_refused_keep_no_missing_window_waiting(location: Location, changelog_url: str) -> None:
    refused, standing, missing = MORNING[:3]
    write(changelog_url, refused, 30)
    assert location.run(refused, standing).success
    write(changelog_url, refused, 5, broken=90)
    write(changelog_url, missing, 10)
    run = location.run(refused, standing, missing, config={"only_new": True})
    assert not run.success
    assert refused.key in _message(run)
    assert location.metadata()[missing.key]["dagster/partition_row_count"] == 10
    found = location.checks("quarantine_share")
    assert found[refused.key][0] == "FAILED"
    assert found[standing.key] == found[missing.key] == ("SUCCEEDED", True)


def test_a_missing_window_that_halts_fails_its_own_check_and_leaves_the_standing_ones(
    location: Location, changelog_url: str
) -> None:
    standing, late, halted = MORNING[:3]
    write(changelog_url, standing, 30)
    write(changelog_url, late, 30)
    assert location.run(standing, late).success
    write(changelog_url, late, 4)
    write(changelog_url, halted, 5, broken=30)
    assert not location.run(standing, late, halted, config={"only_new": True}).success
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        standing.key: 30,
        late.key: 34,
    }
    assert location.checks("quarantine_share") == {
        standing.key: ("SUCCEEDED", True),
        late.key: ("SUCCEEDED", True),
        halted.key: ("FAILED", True),
    }


def test_late_events_that_halt_fail_the_check_of_their_window_and_hide_no_merge(location: Location, changelog_url: str) -> None:
    merged, halted = MORNING[:2]
    write(changelog_url, merged, 30)
    write(changelog_url, halted, 30)
    assert location.run(merged, halted).success
    write(changelog_url, merged, 4)
    write(changelog_url, halted, 0, broken=20)
    assert not location.run(merged, halted, config={"only_new": True}).success
    assert {window: commit.accepted_rows for window, commit in location.lake.published().items()} == {merged: 34, halted: 30}
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        merged.key: 34,
        halted.key: 30,
    }
    assert location.checks("quarantine_share") == {merged.key: ("SUCCEEDED", True), halted.key: ("FAILED", True)}


def test_a_limit_of_nothing_tolerates_nothing_in_a_window_that_stands(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(changelog_url, MORNING[0], 30, broken=1)
    assert location.run(MORNING[0]).success
    assert location.checks("quarantine_share") == {MORNING[0].key: ("SUCCEEDED", True)}
    monkeypatch.setenv("FRAISEQL_MAX_REJECTED_SHARE", "0")
    assert location.run(MORNING[0], config={"only_new": True}).success
    assert location.checks("quarantine_share") == {MORNING[0].key: ("FAILED", True)}


def test_a_run_after_a_transient_failure_reports_every_window(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for window in MORNING:
        write(changelog_url, window, 4)
    real, calls = events.pipeline.materialize, 0

    def fail_once(windows: list[Window], **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            real(windows[:2], **rest)
            raise LakeConflict("Others won.")
        return real(windows, **rest)

    monkeypatch.setattr(events.pipeline, "materialize", fail_once)
    assert location.run(*MORNING).success
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        window.key: 4 for window in MORNING
    }
    assert location.checks("counts_add_up") == {window.key: ("SUCCEEDED", True) for window in MORNING}


def test_a_shrinking_window_is_refused_unless_the_run_allows_it(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 10)
    location.run(MORNING[0])
    with psycopg.connect(changelog_url) as connection:
        connection.execute("DELETE FROM core.tb_entity_change_log WHERE pk_entity_change_log % 2 = 0")
    assert not location.run(MORNING[0]).success
    assert location.lake.published()[MORNING[0]].accepted_rows == 10
    assert location.run(MORNING[0], config={"allow_shrink": True}).success
    assert location.lake.published()[MORNING[0]].accepted_rows == 5
