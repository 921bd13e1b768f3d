from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.settings import Settings


@pytest.fixture
def owner(changelog_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Who may do everything to the log."""
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def changelog(changelog_url: str) -> Iterator[ChangeLog]:
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    yield changelog
    changelog.close()
