"""What docs/dagster.md says of runs, limits and checks is what the code location has."""

from __future__ import annotations

import re
from pathlib import Path

import dagster as dg
import pytest
import yaml

from assets import checks, needs, sensors
from assets.definitions import definitions
from assets.events import POOL, Publishing
from assets.failures import RETRIES
from fraiseql_pipeline.settings import Settings
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "dagster.md").read_text(encoding="utf-8")
SHOWN = [yaml.safe_load(code) for code in re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)]
RUN, INSTANCE = SHOWN


def _first_cells(heading: str) -> set[str]:
    (table,) = re.findall(rf"^\| {heading} \|.*?\n\n", PAGE + "\n", flags=re.MULTILINE | re.DOTALL)
    return {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")}


def test_every_field_of_a_run_is_in_the_page() -> None:
    assert _first_cells("field") == Publishing.model_fields.keys()


def test_the_configuration_of_a_run_that_is_shown_is_one() -> None:
    job = definitions(Settings()).resolve_implicit_global_asset_job_def()
    assert dg.validate_run_config(job, RUN)
    with pytest.raises(dg.DagsterInvalidConfigError):
        dg.validate_run_config(job, {"ops": {"events": {"config": {"shrink": True}}}})


def test_the_instance_that_is_shown_keeps_runs_of_the_pool_in_the_queue(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"telemetry": {"enabled": False}, **INSTANCE}))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_monitoring_enabled
        assert instance.run_monitoring_max_runtime_seconds == 6 * 3600
        pools = instance.get_concurrency_config().pool_config
        assert pools.default_pool_limit == INSTANCE["concurrency"]["pools"]["default_limit"]
        assert pools.pool_granularity is not None
        assert pools.pool_granularity.value == "run"
    assert f"dagster instance concurrency set {POOL} " in PAGE


def test_what_runs_by_itself_and_every_check_are_in_the_page() -> None:
    defs = definitions(Settings())
    assert _first_cells("name") == {one.name for one in (*(defs.schedules or ()), *(defs.sensors or ()))}
    assert _first_cells("check") == set(checks.NAMES)


def test_the_numbers_are_those_of_the_code() -> None:
    assert (needs.LOOK_BACK.days, needs.GRACE.seconds // 60, sensors.MAX_RUNS) == (2, 10, 10)
    assert f"`FRAISEQL_WINDOWS_PER_RUN` windows ({Settings.model_fields['windows_per_run'].default})" in PAGE
    said = [int(number) for number in re.findall(r"after (\d+), (\d+) and (\d+) seconds", PAGE)[0]]
    assert RETRIES.backoff is dg.Backoff.EXPONENTIAL
    assert said == [RETRIES.delay * (2**attempt - 1) for attempt in range(1, RETRIES.max_retries + 1)]
