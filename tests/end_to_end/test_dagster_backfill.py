"""Backfills, the sensor and the command line with Dagster's real processes over a real change log."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from assets import checks
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile
from tests.support.code_location import write
from tests.support.deployment import Deployment, deployed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_ROOT = Path(__file__).parents[2]
_EVENTS = {"path": ["fraiseql", "events"]}
_QUARANTINE = {"path": ["fraiseql", "events_quarantine"]}

_LAUNCH = """mutation($asked: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $asked) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_BACKFILL = """query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {
  status error { message } runs(limit: 1000) { id status startTime endTime tags { key value } } } } }"""
_MATERIALIZATIONS = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  partitionStats { numMaterialized numFailed }
  assetMaterializations(limit: 2000) { partition runId metadataEntries { label
    ... on IntMetadataEntry { intValue } ... on TextMetadataEntry { text } } } } } }"""
_CHECKS = """query($key: AssetKeyInput!, $name: String!) { assetCheckExecutions(assetKey: $key, checkName: $name, limit: 2000) {
  status partition runId evaluation { success targetMaterialization { runId } metadataEntries { label ... on IntMetadataEntry { intValue } } } } }"""
_SENSOR = """mutation($sensor: SensorSelector!) { startSensor(sensorSelector: $sensor) { __typename } }"""
_TICKS = """query($sensor: InstigationSelector!) { instigationStateOrError(instigationSelector: $sensor) { ... on InstigationState {
  ticks(limit: 20) { status runIds skipReason error { message } } } } }"""
_RUNS = """query { runsOrError(limit: 100) { ... on Runs { results { id status tags { key value } } } } }"""


@pytest.fixture
def environment(changelog_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name.startswith(("FRAISEQL_", "DAGSTER_")) and name != "FRAISEQL_TEST_DSN"]:
        monkeypatch.delenv(name)
    chosen = {"FRAISEQL_DATABASE_URL": changelog_url, "FRAISEQL_LAKE_URI": str(tmp_path / "lake"), "FRAISEQL_START": "2026-06-01"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    return chosen


@pytest.fixture
def dagster(environment: dict[str, str], tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path, environment) as deployment:
        yield deployment


def _backfill(dagster: Deployment, windows: list[Window], *assets: dict[str, Any]) -> dict[str, Any]:
    asked = {"assetSelection": list(assets), "partitionNames": [window.key for window in windows]}
    launched = dagster.ask(_LAUNCH, asked=asked)["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = dagster.ask(_BACKFILL, id=launched["backfillId"])["partitionBackfillOrError"]
        return found if found["status"] in {"COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED"} else None

    return dagster.until("the backfill ends", ended, 500)


def _shown(dagster: Deployment, key: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = dagster.ask(_MATERIALIZATIONS, key=key)["assetNodeOrError"]["assetMaterializations"]
    return {
        one["partition"]: {entry["label"]: entry.get("intValue", entry.get("text")) for entry in one["metadataEntries"]}
        | {"run": one["runId"]}
        for one in reversed(found)
    }


def _checked(dagster: Deployment, name: str) -> dict[str, dict[str, Any]]:
    found = dagster.ask(_CHECKS, key=_EVENTS, name=name)["assetCheckExecutions"]
    return {one["partition"]: one for one in reversed(found)}


def test_500_windows_are_a_handful_of_runs_and_each_window_tells_its_own(dagster: Deployment, changelog_url: str) -> None:
    windows = list(tile(datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC) + timedelta(hours=500), WindowSize.HOUR))
    with psycopg.connect(changelog_url) as connection:
        # Hour n of the backfill holds n sound events and, every tenth hour, one that is quarantined.
        connection.execute(
            """INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, object_data, created_at)
               SELECT 'Order', CASE WHEN event = 0 THEN 'nonsense' ELSE 'INSERT' END, gen_random_uuid(), '{}',
                      %(start)s::timestamptz + hour * interval '1 hour' + event * interval '1 second'
                 FROM generate_series(0, 499) hour, generate_series(0, 499) event
                WHERE event BETWEEN 1 AND hour OR (event = 0 AND hour %% 10 = 0)""",
            {"start": windows[0].start},
        )
    ended = _backfill(dagster, windows, _EVENTS, _QUARANTINE)
    assert ended["status"] == "COMPLETED_SUCCESS", f"{ended['error']}\n{dagster.tail()}"
    runs = ended["runs"]
    assert len(runs) == 6  # 96 windows each
    began, ends = [run["startTime"] for run in runs], [run["endTime"] for run in runs]
    assert (
        max(sum(b <= at < e for b, e in zip(began, ends, strict=True)) for at in began) == 4
    )  # as many at once as the instance allows

    events, quarantine = _shown(dagster, _EVENTS), _shown(dagster, _QUARANTINE)
    published = Lake.of(Settings.load()).published()
    for n, window in enumerate(windows):
        assert events[window.key]["dagster/partition_row_count"] == n
        assert quarantine[window.key]["dagster/partition_row_count"] == (n % 10 == 0)
        assert events[window.key]["content hash"] == published[window].content_hash
        assert events[window.key]["table version"] == published[window].table_version
    for name in checks.NAMES:
        results = _checked(dagster, name)
        assert set(results) == {window.key for window in windows}, name  # each window has a row, and there is none without a window
        assert {result["status"] for result in results.values()} == {"SUCCEEDED"}
        assert all(result["evaluation"]["targetMaterialization"]["runId"] == events[key]["run"] for key, result in results.items())
    accounted = _checked(dagster, "source_accounted_for")
    for n, window in enumerate(windows):
        told = {entry["label"]: entry["intValue"] for entry in accounted[window.key]["evaluation"]["metadataEntries"]}
        assert told == {"source rows": n + (n % 10 == 0), "accepted rows": n, "quarantined rows": n % 10 == 0}


def test_a_backfill_with_a_halted_window_keeps_all_others(dagster: Deployment, changelog_url: str) -> None:
    windows = list(tile(datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 6, 1, 6, tzinfo=UTC), WindowSize.HOUR))
    for window in windows:
        write(changelog_url, window, 20)
    write(changelog_url, windows[3], 0, broken=30)
    ended = _backfill(dagster, windows, _EVENTS)
    assert ended["status"] == "COMPLETED_FAILED"
    stats = dagster.ask(_MATERIALIZATIONS, key=_EVENTS)["assetNodeOrError"]["partitionStats"]
    assert stats == {"numMaterialized": 5, "numFailed": 1}
    assert set(_shown(dagster, _QUARANTINE)) == {window.key for window in windows if window != windows[3]}
    assert _checked(dagster, "quarantine_share")[windows[3].key]["status"] == "FAILED"


def test_the_sensor_publishes_missing_windows_and_adds_late_events_by_itself(dagster: Deployment, changelog_url: str) -> None:
    now = datetime.now(UTC)
    windows = list(tile(now - timedelta(hours=49), now, WindowSize.HOUR))
    late = windows[20]
    write(changelog_url, late, 5)
    selector = {"repositoryLocationName": "fraiseql_pipeline", "repositoryName": "__repository__"}
    started = dagster.ask(_SENSOR, sensor={**selector, "sensorName": "catch_up"})
    assert started["startSensor"]["__typename"] == "Sensor"
    lake = Lake.of(Settings.load())

    def rows() -> int | None:
        commit = lake.published().get(late)
        return None if commit is None else commit.accepted_rows

    assert dagster.until("the missing windows are published", rows) == 5
    write(changelog_url, late, 2)
    dagster.until("the late events are there", lambda: True if rows() == 7 else None)
    ticks = dagster.ask(_TICKS, sensor={**selector, "name": "catch_up"})["instigationStateOrError"]["ticks"]
    assert [tick["error"] for tick in ticks if tick["error"]] == []
    runs = dagster.ask(_RUNS)["runsOrError"]["results"]
    # One for all that was missing, one for what came late, and at most one per hour that ended meanwhile.
    assert len(runs) <= 4, runs


@pytest.mark.parametrize(
    ("arguments", "count"),
    [(("--partition", "2026-06-01-02:00"), 1), (("--partition-range", "2026-06-01-00:00...2026-06-05-03:00"), 100)],
    ids=["--partition", "--partition-range"],
)
def test_the_command_line_materializes(
    environment: dict[str, str], changelog_url: str, tmp_path: Path, arguments: tuple[str, str], count: int
) -> None:
    write(changelog_url, Window.parse("2026-06-01-02:00"), 5)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("dagster")),
            "asset",
            "materialize",
            "-m",
            "assets.definitions",
            "--select",
            "fraiseql/events",
            *arguments,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    published = Lake.of(Settings.load()).published()
    assert len(published) == count
    assert published[Window.parse("2026-06-01-02:00")].accepted_rows == 5
