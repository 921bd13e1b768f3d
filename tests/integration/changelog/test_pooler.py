"""Through PgBouncer in transaction mode, where each transaction may get another server connection."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.errors import SourceRefused
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window
from tests.support.events import batch_events
from tests.support.reading import WINDOW, execute, fill

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
PORT = 6432
POOL_SIZE = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)"),
]


@pytest.fixture
def pooled_url(changelog_url: str, short_directory: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The change log through a pooler with few server connections, which it swaps between transactions, or as the parameter says."""
    server = conninfo_to_dict(changelog_url)
    database, socket = server["dbname"], server["host"]
    short_directory.chmod(0o777)
    (short_directory / "users").write_text('"postgres" ""\n')
    (short_directory / "pgbouncer.ini").write_text(
        f"""[databases]
{database} = host={socket} port={server.get("port", 5432)} user=postgres dbname={database}
[pgbouncer]
listen_port = {PORT}
listen_addr =
unix_socket_dir = {short_directory}
auth_type = trust
auth_file = {short_directory / "users"}
pool_mode = {getattr(request, "param", "transaction")}
default_pool_size = {POOL_SIZE}
server_round_robin = 1
"""
    )
    assert PGBOUNCER is not None
    # It refuses to be root, and has to reach the server's socket all the same.
    if os.geteuid() == 0 and Path(str(socket)).is_dir():
        Path(str(socket)).parent.chmod(0o711)
    command = [PGBOUNCER, *(["-u", "nobody"] if os.geteuid() == 0 else []), str(short_directory / "pgbouncer.ini")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = make_conninfo("", host=str(short_directory), port=PORT, user="postgres", dbname=database)
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    psycopg.connect(url).close()
                    break
                except psycopg.OperationalError:
                    assert process.poll() is None, "the pooler ended"
                    assert time.monotonic() < deadline, "the pooler does not answer"
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def test_windows_through_a_pooler_are_those_read_directly(changelog_url: str, pooled_url: str, tmp_path: Path) -> None:
    fill(changelog_url, 3_000, f"'{WINDOW.start.isoformat()}'::timestamptz + n * interval '1 second'")
    hashes = []
    for name, url in (("direct", changelog_url), ("pooled", pooled_url)):
        settings = Settings(database_url=url, lake_uri=str(tmp_path / name), start=WINDOW.start)
        with open_changelog(settings) as changelog:
            done = pipeline.materialize([WINDOW], settings=settings, changelog=changelog, lake=Lake.of(settings))
            late = Window.parse(WINDOW.key)
            assert pipeline.audit(late, done[0].commit, changelog=changelog, lake=Lake.of(settings)).equal
        assert done[0].commit.accepted_rows == 3_000
        hashes.append(done[0].commit.content_hash)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("pooled_url", ["statement"], indirect=True)
def test_a_pooler_that_takes_no_transactions_is_refused_as_one(pooled_url: str, tmp_path: Path) -> None:
    settings = Settings(database_url=pooled_url, lake_uri=str(tmp_path / "lake"), start=WINDOW.start)
    with open_changelog(settings) as changelog, pytest.raises(SourceRefused, match="is behind a pooler in statement mode"):
        pipeline.materialize([WINDOW], settings=settings, changelog=changelog, lake=Lake.of(settings))


def test_a_pooled_connection_of_somebody_else_has_its_own_settings_after_our_work(
    changelog_url: str, pooled_url: str, tmp_path: Path
) -> None:
    fill(changelog_url, 3_000, f"'{WINDOW.start.isoformat()}'::timestamptz + n * interval '1 second'")
    settings = Settings(database_url=pooled_url, lake_uri=str(tmp_path / "lake"), start=WINDOW.start)
    events = batch_events(WINDOW, 10).select(EVENT_SCHEMA.names)
    with open_changelog(settings) as changelog:
        pipeline.materialize([WINDOW], settings=settings, changelog=changelog, lake=Lake.of(settings))
        assert changelog.append(events, "test").inserted_rows == 10
        pipeline.merge_late(settings=settings, changelog=changelog, lake=Lake.of(settings))
        with changelog.tail() as tail:
            tail.settle()
        assert [changelog.append(events, "test").known_rows for _ in range(8)] == [10] * 8
    # The pooler itself sets these, for each client its own.
    of_pooler = ["application_name", "client_encoding", "DateStyle", "TimeZone"]
    ask = "SELECT name, setting FROM pg_settings WHERE name <> ALL(%s) ORDER BY name"
    usual = execute(changelog_url, ask, of_pooler)
    with ExitStack() as stack:
        seen = set()
        for _ in range(POOL_SIZE):  # open together, so that each has a server connection of its own
            somebody = stack.enter_context(psycopg.connect(pooled_url, prepare_threshold=None))
            assert somebody.execute(ask, [of_pooler]).fetchall() == usual
            assert somebody.execute("SELECT pg_listening_channels()").fetchall() == []
            somebody.execute(
                "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id) VALUES ('A', 'INSERT', gen_random_uuid())"
            )
            seen.add(somebody.execute("SELECT pg_backend_pid()").fetchone())
        assert len(seen) == POOL_SIZE


def test_the_log_is_followed_through_a_pooler(changelog_url: str, pooled_url: str) -> None:
    with open_changelog(Settings(database_url=pooled_url)) as changelog, changelog.tail() as tail:
        settled_pk, _ = tail.settle()
        fill(changelog_url, 500, "now()")
        tail.wait(0.01)
        reached, _ = tail.settle()
        assert sum(batch.num_rows for batch in tail.read(settled_pk, reached)) == 500
