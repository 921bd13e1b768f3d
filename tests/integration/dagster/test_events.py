"""What a run tells Dagster: of each window its own metadata and its own check results, whatever the number of windows."""

from __future__ import annotations

import dagster as dg
import psycopg
import pytest

from assets import checks
from assets.report import EVENTS, QUARANTINE
from fraiseql_pipeline.window import Window
from tests.support.code_location import Location, hours, write

MORNING = hours("2026-11-20", 6, 9)


def test_one_partition_publishes_its_window(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 60, broken=2)
    assert location.run(MORNING[0]).success
    commit = location.lake.published()[MORNING[0]]
    assert (commit.source_rows, commit.accepted_rows, commit.quarantined_rows) == (62, 60, 2)
    shown = location.metadata()[MORNING[0].key]
    assert shown["dagster/partition_row_count"] == 60
    assert shown["settled pk"] == commit.settled_pk
    assert shown["content hash"] == commit.content_hash
    assert shown["table version"] == commit.table_version
    assert {"state", "seconds read", "seconds validate", "seconds encode", "seconds commit"} <= shown.keys()
    assert location.metadata(QUARANTINE)[MORNING[0].key]["dagster/partition_row_count"] == 2


def test_windows_of_one_run_do_not_share_metadata(location: Location, changelog_url: str) -> None:
    for n, window in enumerate(MORNING):
        write(changelog_url, window, 100 + n, broken=n)
    assert location.run(*MORNING).success
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        window.key: 100 + n for n, window in enumerate(MORNING)
    }
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata(QUARANTINE).items()} == {
        window.key: n for n, window in enumerate(MORNING)
    }


def test_a_window_tells_its_own_rows_and_those_of_the_table(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 60, broken=2)
    write(changelog_url, MORNING[1], 40, broken=1)
    location.run(*MORNING[:2])
    assert location.run(MORNING[3]).success  # an empty hour, run last: what Dagster shows of the table must not be 0
    for key, rows in ((EVENTS, (0, 100)), (QUARANTINE, (0, 3))):
        shown = location.metadata(key)[MORNING[3].key]
        assert (shown["dagster/partition_row_count"], shown["dagster/row_count"]) == rows


@pytest.mark.parametrize("windows", [MORNING[:1], MORNING], ids=["one window", "four windows"])
def test_every_window_has_a_current_result_of_every_check(location: Location, changelog_url: str, windows: list[Window]) -> None:
    for window in windows:
        write(changelog_url, window, 3)
    assert location.run(*windows).success
    for name in checks.NAMES:
        assert location.checks(name) == {window.key: ("SUCCEEDED", True) for window in windows}, name


def test_a_check_fails_for_the_window_it_fails_for(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 1000)
    write(changelog_url, MORNING[1], 1000, broken=40)  # below the limit that halts, above the one that warns
    assert location.run(*MORNING[:2]).success
    assert location.checks("quarantine_share") == {MORNING[0].key: ("SUCCEEDED", True), MORNING[1].key: ("FAILED", True)}


def test_an_empty_window_is_materialized_with_no_rows(location: Location) -> None:
    assert location.run(*MORNING[:2]).success
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        window.key: 0 for window in MORNING[:2]
    }
    assert location.checks("counts_add_up") == {window.key: ("SUCCEEDED", True) for window in MORNING[:2]}
    assert set(location.lake.published()) == set(MORNING[:2])


@pytest.mark.parametrize("asked", [EVENTS, QUARANTINE])
def test_either_table_may_be_asked_for_and_both_are_told(location: Location, changelog_url: str, asked: dg.AssetKey) -> None:
    write(changelog_url, MORNING[0], 30, broken=1)
    assert location.run(*MORNING[:2], asked=(asked,)).success
    assert location.metadata()[MORNING[0].key]["dagster/partition_row_count"] == 30
    assert location.metadata(QUARANTINE)[MORNING[0].key]["dagster/partition_row_count"] == 1


def test_running_again_changes_nothing(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 5)
    location.run(*MORNING)
    before = location.lake.published()
    assert location.run(*MORNING).success
    assert {w: c.table_version for w, c in location.lake.published().items()} == {w: c.table_version for w, c in before.items()}
    assert {shown["outcome"] for shown in location.metadata().values()} == {"unchanged"}


def test_only_new_adds_late_events_and_missing_windows_and_leaves_the_rest(location: Location, changelog_url: str) -> None:
    early, late, missing = MORNING[:3]
    write(changelog_url, early, 5)
    write(changelog_url, late, 5)
    location.run(early, late)
    write(changelog_url, late, 2)
    write(changelog_url, missing, 7)
    assert location.run(early, late, missing, config={"only_new": True}).success
    rows = {window: commit.accepted_rows for window, commit in location.lake.published().items()}
    assert rows == {early: 5, late: 7, missing: 7}
    assert {key: shown["dagster/partition_row_count"] for key, shown in location.metadata().items()} == {
        early.key: 5,
        late.key: 7,
        missing.key: 7,
    }
    assert location.lake.published()[late].outcome == "merged"
    assert {window.key: location.metadata()[window.key]["late rows"] for window in (early, late, missing)} == {
        early.key: 0,
        late.key: 2,
        missing.key: 0,
    }


def test_only_new_tells_the_whole_window_not_what_it_added(location: Location, changelog_url: str) -> None:
    standing, late = MORNING[:2]
    write(changelog_url, standing, 30, broken=4)
    write(changelog_url, late, 30, broken=3)
    assert location.run(standing, late).success
    assert all(shown["events per second"] > 0 for shown in location.metadata().values())
    write(changelog_url, late, 2, broken=1)
    assert location.run(standing, late, config={"only_new": True}).success
    for window in (standing, late):
        assert "| `event_type:null` | 4 |" in location.metadata(QUARANTINE)[window.key]["reasons"]
        assert "events per second" not in location.metadata()[window.key]
    assert [location.metadata()[window.key]["outcome"] for window in (standing, late)] == ["unchanged", "merged"]


@pytest.mark.parametrize("only_new", [False, True])
def test_a_day_takes_the_place_of_its_hours(
    location: Location, changelog_url: str, monkeypatch: pytest.MonkeyPatch, only_new: bool
) -> None:
    for window in MORNING:
        write(changelog_url, window, 3)
    assert location.run(*MORNING).success
    monkeypatch.setenv("FRAISEQL_WINDOW", "day")
    day = Window.parse("2026-11-20")
    assert not location.run(day, config={"only_new": only_new}).success, "nothing takes that back, so it needs a word"
    assert day not in location.lake.published()
    assert location.run(day, config={"only_new": only_new, "other_size": True}).success
    assert location.metadata()[day.key]["dagster/partition_row_count"] == 12
    assert set(location.lake.published()) == {day}


def test_the_name_of_a_changed_field_may_be_null(location: Location, changelog_url: str) -> None:
    write(changelog_url, MORNING[0], 3)
    with psycopg.connect(changelog_url) as connection:
        connection.execute("UPDATE core.tb_entity_change_log SET updated_fields = ARRAY['total', NULL]")
    assert location.run(MORNING[0]).success
    assert "| Updated | Order | total, null |" in location.metadata()[MORNING[0].key]["sample"]


def test_no_value_of_an_event_is_shown_or_logged(location: Location, changelog_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    write(changelog_url, MORNING[0], 30, broken=1)
    run = location.run(MORNING[0])
    assert run.success
    told = [repr(record.event_log_entry) for record in location.instance.get_records_for_run(run.run_id).records]
    shown = "".join([*told, *capfd.readouterr()])
    assert "hunter2" not in shown
    assert "| Updated | Order | total |" in location.metadata()[MORNING[0].key]["sample"]
