"""Fixtures every suite shares: a real Postgres, fresh databases on it, a fixed instant.

``FRAISEQL_TEST_DSN`` (a superuser's URL) runs the tests against another server instead of the embedded one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import hypothesis
import psycopg
import pytest

from fraiseql_pipeline.changelog import embedded
from fraiseql_pipeline.changelog.connection import sql

# Machines are slow at times, and fixtures are as good for many examples as for one.
hypothesis.settings.register_profile(
    "rules",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("rules")

#: Where files are kept in memory, and the room a test session's Postgres may need there. A fresh database is some 300 files: on a disk
#: that others use 130 to 200 ms, in memory 17 to 28.
_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 4 << 30
_TEMPORARY = Path("/tmp")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", type=float, metavar="SECONDS", help="how long tests with random writers run (default: a few seconds)"
    )


@pytest.fixture
def run_seconds(request: pytest.FixtureRequest) -> float:
    """How long a test with random writers lets them write."""
    chosen: float | None = request.config.getoption("--long")
    return 6.0 if chosen is None else chosen


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a superuser on a Postgres of this test session's own."""
    if dsn := os.environ.get("FRAISEQL_TEST_DSN"):
        yield dsn
        return
    # A test may stop this server hard, but the machine stays up: no fsync.
    roomy = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES
    with (
        _short_directory(_MEMORY if roomy else _TEMPORARY) as directory,
        embedded.start(directory / "pg", {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}) as url,
    ):
        yield url


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path leaves room for a Unix socket."""
    with _short_directory(_TEMPORARY) as directory:
        yield directory


@pytest.fixture(scope="session")
def contract_template(postgres: str) -> Iterator[str]:
    """Name of a database that holds the empty contract, to be copied."""
    with new_database(postgres, "template0") as (name, url):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql("contract"))
        yield name


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """URL of a fresh, empty database."""
    with new_database(postgres, "template0") as (_, url):
        yield url


@pytest.fixture
def changelog_url(postgres: str, contract_template: str) -> Iterator[str]:
    """URL of a fresh database with the empty change log of the contract."""
    with new_database(postgres, contract_template) as (_, url):
        yield url


@pytest.fixture
def role(changelog_url: str) -> Iterator[str]:
    """A role with the least rights that read the whole change log: no owner, no superuser, BYPASSRLS."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN BYPASSRLS")
        connection.execute(f"GRANT USAGE ON SCHEMA core TO {name}; GRANT SELECT ON core.tb_entity_change_log TO {name}")
        yield name
        connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture(scope="session")
def now() -> datetime:
    """An instant in the middle of an hour, a Sunday in November 2026."""
    return datetime(2026, 11, 22, 12, 34, 56, 789012, tzinfo=UTC)


@contextmanager
def _short_directory(where: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="fq-", dir=where))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def new_database(server: str, template: str) -> Iterator[tuple[str, str]]:
    """Name and URL of a fresh database, for fixtures that live longer than a test."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as connection:
        copied = " STRATEGY wal_log" if connection.info.server_version >= 150000 else ""  # the quicker way
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8'{copied}")
    try:
        yield name, embedded.database_url(server, name)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
