"""The definitions load: with nothing configured, with anything configured, from anywhere, and without touching anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.definitions import definitions
from assets.report import EVENTS, QUARANTINE
from assets.resources import Flight, FraiseQL
from fraiseql_pipeline.settings import Settings

_ROOT = Path(__file__).parents[3]
_BARE = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DAGSTER_DISABLE_TELEMETRY": "yes"}


def _python(code: str, cwd: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=_BARE | env, capture_output=True, text=True, check=False
    )


def test_definitions_load_with_an_empty_environment_and_no_deprecation_and_touch_nothing(tmp_path: Path) -> None:
    code = f"""
import socket, sys
sys.path.insert(0, {str(_ROOT)!r})
def refuse(*_): raise AssertionError("a connection while definitions load")
socket.socket.connect = refuse
import dagster as dg
from assets.definitions import defs
dg.Definitions.validate_loadable(defs)
"""
    done = _python(code, tmp_path, "-W", "error::DeprecationWarning", "-W", "error::FutureWarning")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_named_when_definitions_load(tmp_path: Path) -> None:
    done = _python(f"import sys; sys.path.insert(0, {str(_ROOT)!r}); import assets.definitions", tmp_path, FRAISEQL_WINDOW="week")
    assert done.returncode != 0
    assert "FRAISEQL_WINDOW" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("directory", ["/", str(_ROOT)])
def test_the_workspace_loads_from_any_working_directory(directory: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dagster")), "definitions", "validate", "-w", str(_ROOT / "workspace.yaml")],
        cwd=directory,
        env=_BARE | {"DAGSTER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Validation successful" in done.stderr + done.stdout


def test_they_merge_into_definitions_that_have_an_executor_and_resources_of_their_own() -> None:
    flight = Flight(url="grpc://events:50051", profile="compact")
    mine = dg.Definitions(executor=dg.multiprocess_executor, resources={"warehouse": "theirs"})
    merged = dg.Definitions.merge(mine, definitions(Settings(), resources={"flight": flight}, executor=None))
    dg.Definitions.validate_loadable(merged)
    assert merged.executor is dg.multiprocess_executor
    assert merged.resources == {"warehouse": "theirs", "flight": flight, "fraiseql": FraiseQL()}


@pytest.mark.parametrize(("size", "key"), [("hour", "2026-03-01-13:00"), ("day", "2026-03-01")])
def test_partitions_are_the_windows_of_the_settings(size: str, key: str) -> None:
    graph = definitions(Settings(window=size, start="2026-03-01")).resolve_asset_graph()
    for asset in (EVENTS, QUARANTINE):
        partitions = graph.get(asset).partitions_def
        assert partitions is not None
        assert partitions.has_partition_key(key)
        assert not partitions.has_partition_key("2026-02-28" if size == "day" else "2026-02-28-23:00")


def test_both_tables_say_what_they_are() -> None:
    graph = definitions(Settings()).resolve_asset_graph()
    for asset in (EVENTS, QUARANTINE):
        node = graph.get(asset)
        assert node.description
        assert node.owners
        assert node.code_version
        assert "dagster/kind/deltalake" in node.tags
        columns = node.metadata["dagster/column_schema"].columns
        assert all(column.description for column in columns)
        assert {"event_id", "event_date"} <= {column.name for column in columns}


def test_whatever_can_be_switched_on_says_what_it_does() -> None:
    repository = definitions(Settings()).get_repository_def()
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    found = [*repository.schedule_defs, *repository.sensor_defs, *jobs]
    assert {one.name for one in found} == {"each_window", "maintain_nightly", "catch_up", "maintain", "benchmarks"}
    assert all(one.description for one in found)


def test_a_backfill_of_events_never_runs_the_benchmarks() -> None:
    defs = definitions(Settings())
    graph = defs.resolve_asset_graph()
    step = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={EVENTS, QUARANTINE})
    assert {node.name for node in step.nodes} == {"events"}
    assert {key.asset_key for key in graph.asset_check_keys if key.asset_key in {EVENTS, QUARANTINE}} == {EVENTS}


def test_runs_of_a_backfill_are_bounded_and_a_range_may_be_one_run() -> None:
    policy = definitions(Settings(windows_per_run=7)).resolve_asset_graph().get(EVENTS).backfill_policy
    assert policy is not None
    assert policy.max_partitions_per_run == 7
    assert policy.policy_type == dg.BackfillPolicy.single_run().policy_type  # what `--partition-range` asks for
    sent = dg.deserialize_value(dg.serialize_value(policy))
    assert sent == dg.BackfillPolicy.multi_run(7)  # what the daemon goes by
    assert sent.policy_type == dg.BackfillPolicy.multi_run(7).policy_type
