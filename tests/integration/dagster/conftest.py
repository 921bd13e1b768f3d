"""A code location configured by its environment, as in production, over a fresh change log and a fresh lake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.support.code_location import Location


@pytest.fixture(autouse=True)
def _only_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("FRAISEQL_", "DAGSTER_")) and name != "FRAISEQL_TEST_DSN"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "yes")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def location(changelog_url: str, tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setenv("FRAISEQL_DATABASE_URL", changelog_url)
    monkeypatch.setenv("FRAISEQL_LAKE_URI", str(tmp_path / "lake"))
    return Location(instance)
