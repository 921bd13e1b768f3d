"""The dbt project over a lake that our own writer made: it builds, it can be repeated, and it takes in what changes. No network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from fraiseql_pipeline.lake import Facts, Lake
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events

PROJECT = Path(__file__).parents[2] / "dbt_examples"
HOURS = [Window.parse(f"2026-11-01-{hour:02d}:00") for hour in range(24)]
EVENTS_PER_HOUR = 200
#: What a column of type json takes and DuckDB does not: a text that was cut within an emoji.
CUT_PAYLOAD = r'{"status": "paid", "note": "\ud83d"}'
CUT_ENTITY = "99999999-9999-4999-8999-999999999999"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Warehouse:
    """What one ``dbt build`` left: the mart's rows in a fixed order, its number of events, and the status of every node."""

    rows: list[tuple[object, ...]]
    events: int
    statuses: dict[str, str]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dbt")


@pytest.fixture(scope="module")
def dbt(at: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    nowhere = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "FRAISEQL_LAKE_URI": str(at / "lake"),
        "FRAISEQL_DBT_DATABASE": str(at / "events.duckdb"),
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_COLOR": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "dbt"), "--no-use-colors", *arguments, "--profiles-dir", "."]
        command += ["--target-path", str(at / "target"), "--log-path", str(at / "logs")]
        return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def builds(at: Path, dbt: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Warehouse]:
    """Four builds of one warehouse: ``first``, ``again`` over the same lake, ``grown`` after a new window and ``late`` after a late event."""
    lake = Lake(str(at / "lake"))

    def build() -> Warehouse:
        done = dbt("build")
        assert done.returncode == 0, done.stdout[-4000:]
        results = json.loads((at / "target" / "run_results.json").read_text())["results"]
        with duckdb.connect(str(at / "events.duckdb"), read_only=True) as connection:
            connection.execute("set timezone = 'UTC'")
            rows = connection.execute("select * from fct_events_hourly order by all").fetchall()
            events = connection.execute("select sum(events)::bigint from fct_events_hourly").fetchall()[0][0]
        return Warehouse(rows, events, {result["unique_id"]: result["status"] for result in results})

    for window in HOURS[:3]:
        publish(lake, window, lake_events(window, EVENTS_PER_HOUR))
    built = {"first": build(), "again": build()}
    publish(lake, HOURS[3], lake_events(HOURS[3], EVENTS_PER_HOUR))
    built["grown"] = build()
    late = lake_events(HOURS[0], EVENTS_PER_HOUR + 1, seed=7).slice(EVENTS_PER_HOUR)
    pk = max(lake_events(HOURS[3], EVENTS_PER_HOUR).column("pk").to_pylist()) + 1
    for name, value in {"pk": pk, "event_type": "Created", "entity_id": CUT_ENTITY, "data": CUT_PAYLOAD}.items():
        field = late.schema.field(name)
        late = late.set_column(late.schema.get_field_index(name), field, pa.array([value], field.type))
    publish(lake, HOURS[0], late, append=True)
    built["late"] = build()
    return built


def publish(lake: Lake, window: Window, events: pa.Table, *, append: bool = False) -> None:
    with lake.stage(window) as staged:
        for batch in events.to_batches():
            staged.write(batch)
        facts = Facts(
            settled_pk=max(events.column("pk").to_pylist()),
            state="sealed",
            identity="test",
            run_id="test",
            settled_at=datetime(2026, 11, 2, tzinfo=UTC),
            source_rows=events.num_rows,
        )
        lake.commit(staged, facts, append=append)


def test_every_model_and_test_of_the_project_passes(builds: dict[str, Warehouse]) -> None:
    for name, warehouse in builds.items():
        assert set(warehouse.statuses.values()) <= {"success", "pass"}, name
        assert sum(node.startswith("test.") for node in warehouse.statuses) >= 20, name


def test_the_mart_counts_every_event_of_the_lake(builds: dict[str, Warehouse]) -> None:
    assert builds["first"].events == 3 * EVENTS_PER_HOUR


def test_building_again_changes_nothing(builds: dict[str, Warehouse]) -> None:
    assert builds["again"].rows == builds["first"].rows


def test_a_new_window_adds_its_hour_and_leaves_the_others(builds: dict[str, Warehouse]) -> None:
    assert builds["grown"].events == 4 * EVENTS_PER_HOUR
    assert set(builds["first"].rows) < set(builds["grown"].rows)
    assert {row[0] for row in set(builds["grown"].rows) - set(builds["first"].rows)} == {HOURS[3].start}


def test_a_late_event_corrects_its_hour_and_no_other(builds: dict[str, Warehouse]) -> None:
    assert builds["late"].events == 4 * EVENTS_PER_HOUR + 1
    assert {row[0] for row in set(builds["late"].rows) ^ set(builds["grown"].rows)} == {HOURS[0].start}


def test_a_payload_that_the_engine_cannot_read_has_no_fields_and_ends_no_build(builds: dict[str, Warehouse], at: Path) -> None:
    assert builds["late"].statuses
    with duckdb.connect(str(at / "events.duckdb"), read_only=True) as connection:
        found = connection.execute("select status, payload from entities_current where entity_id = ?", [CUT_ENTITY]).fetchall()
        (typed,) = connection.execute("select count(status) from entities_current").fetchone() or (0,)
    assert found == [(None, CUT_PAYLOAD)]
    assert typed > 0


def test_columns_are_quoted_as_the_engine_quotes_them() -> None:
    """Double quotes make a text, and no column, of a name in Spark and BigQuery."""
    for model in (PROJECT / "models").rglob("*.sql"):
        statement = "\n".join(line for line in model.read_text(encoding="utf-8").splitlines() if "{#" not in line)
        assert '"timestamp"' not in statement, model
        assert '"data"' not in statement, model


def test_freshness_tells_a_stale_lake(builds: dict[str, Warehouse], dbt: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = dbt("source", "freshness")
    assert done.returncode != 0
    assert "STALE freshness of lake.events" in done.stdout


def test_every_column_of_the_mart_is_in_its_contract(at: Path, builds: dict[str, Warehouse]) -> None:
    manifest = json.loads((at / "target" / "manifest.json").read_text())
    mart = manifest["nodes"]["model.fraiseql_events.fct_events_hourly"]
    assert mart["contract"]["enforced"] is True
    with duckdb.connect(str(at / "events.duckdb"), read_only=True) as connection:
        columns = [name for name, *_ in connection.execute("describe fct_events_hourly").fetchall()]
    assert columns == list(mart["columns"])


def test_the_sources_describe_every_column_the_stream_has(builds: dict[str, Warehouse], at: Path) -> None:
    from fraiseql_pipeline.event import EVENT_SCHEMA

    manifest = json.loads((at / "target" / "manifest.json").read_text())
    described = manifest["sources"]["source.fraiseql_events.lake.events"]["columns"]
    assert set(EVENT_SCHEMA.names) <= set(described)
    assert all(described[name]["description"] for name in EVENT_SCHEMA.names)
