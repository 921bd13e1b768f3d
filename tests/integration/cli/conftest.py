"""The commands as a new user runs them: on a lake of their own, with nothing set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from fraiseql_pipeline.cli import main
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize, tile
from tests.support.lakes import publish

Run = Callable[..., Result]
HOUR = timedelta(hours=1)
#: What makes rich draw for a terminal where there is none.
TERMINAL = {"FORCE_COLOR": "1", "COLUMNS": "120"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FRAISEQL_") and name != "FRAISEQL_TEST_DSN"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _root_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the handlers of the tests as they were."""
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers


@pytest.fixture
def end() -> datetime:
    """The start of a day: two days before now, so that whole days have ended."""
    return Window.holding(datetime.now(UTC) - timedelta(days=2), WindowSize.DAY).start


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A command on a lake of its own, without a change log."""

    def run(*arguments: str, **environment: str) -> Result:
        return CliRunner(env={"FRAISEQL_LAKE_URI": str(tmp_path / "lake")} | environment).invoke(main, list(arguments))

    return run


@pytest.fixture
def lake(tmp_path: Path, end: datetime) -> Lake:
    """The six hours before ``end``, with 50 events each."""
    lake = Lake(str(tmp_path / "lake"))
    for window in tile(end - 6 * HOUR, end, WindowSize.HOUR):
        publish(lake, window, 50)
    return lake


def insert(url: str, at: datetime, object_type: str = "Order", verb: str = "INSERT") -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, updated_fields, created_at)"
            " VALUES (%s, %s, gen_random_uuid(), '{total,\"a,b\"}', %s)",
            [object_type, verb, at],
        )


def materialized(run: Run, url: str, end: datetime, *more: str, hours: int = 2) -> Result:
    done = run(
        "materialize", "--start", (end - hours * HOUR).isoformat(), "--end", end.isoformat(), *more, FRAISEQL_DATABASE_URL=url
    )
    assert done.exit_code == 0, done.output
    return done
