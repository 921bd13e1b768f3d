"""The embedded Postgres: started once, joined by many, stopped by the last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fraiseql_pipeline.changelog import embedded, open_changelog, scratch_changelog, write_sample
from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.settings import Settings

_HOLD = """
import sys
from pathlib import Path
import psycopg
from fraiseql_pipeline.changelog import embedded
with embedded.start(Path(sys.argv[1])) as url:
    with psycopg.connect(url) as connection:
        print(connection.execute("SELECT pg_postmaster_start_time()::text").fetchone()[0], flush=True)
    sys.stdin.read()
"""


def _hold(data: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _HOLD, str(data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_processes_that_start_at_once_share_one_server_and_the_last_stops_it(short_directory: Path) -> None:
    data = short_directory / "pg"
    holders = [_hold(data) for _ in range(3)]
    started = {holder.stdout.readline() for holder in holders if holder.stdout}
    assert len(started) == 1
    assert "" not in started
    url = f"postgresql://postgres@/postgres?host={data}"
    holders[0].send_signal(signal.SIGKILL)  # leaves without a word
    holders[0].communicate()
    assert _answers(url)
    holders[1].communicate("")
    assert _answers(url)
    holders[2].communicate("")
    assert [holder.returncode for holder in holders[1:]] == [0, 0]
    assert not _answers(url)


def test_events_outlive_the_server(short_directory: Path) -> None:
    for expected in (None, "kept"):
        with embedded.start(short_directory / "pg") as url, psycopg.connect(url) as connection:
            found = connection.execute("SELECT to_regclass('kept')::text").fetchone()
            assert found == (expected,)
            connection.execute("CREATE TABLE IF NOT EXISTS kept ()")


def test_a_long_path_is_no_hindrance(short_directory: Path) -> None:
    data = short_directory / ("long " * 25).strip() / "it's here" / "pg"
    with embedded.start(data) as url:
        assert _answers(url)
        assert (data / "PG_VERSION").exists()


def test_only_the_user_who_started_it_is_let_in(short_directory: Path) -> None:
    with embedded.start(short_directory / "pg"):
        assert (short_directory / "pg" / "pg_hba.conf").read_text() == "local all all peer map=started\n"
        if os.geteuid() != 0:
            pytest.skip("only root can ask as somebody else")
        short_directory.chmod(0o755)
        (short_directory / "pg").chmod(0o755)
        psql = [str(embedded._programs() / "psql"), "-h", str(short_directory / "pg"), "-U", "postgres", "-c", "SELECT 1"]
        assert subprocess.run(psql, capture_output=True, check=False).returncode == 0
        try:
            stranger = subprocess.run(psql, user=65533, group=65533, capture_output=True, text=True, check=False)
        except PermissionError:
            pytest.skip("nobody else may run the programs of this environment")
        assert "Peer authentication failed" in stranger.stderr


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'fraiseql-pipeline\[demo\]'"), embedded.start(tmp_path / "pg"):
        pass


def test_without_a_url_events_are_made_up_only_where_nobody_can_take_them_for_others(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    monkeypatch.chdir(short_directory)
    monkeypatch.delenv("FRAISEQL_DATABASE_URL", raising=False)
    monkeypatch.setattr("fraiseql_pipeline.changelog.samples.fill.EMBEDDED_EVENTS", 3000)
    settings = Settings()
    for refused, samples in ((Settings(lake_uri="s3://bucket/lake"), True), (settings, False)):
        with pytest.raises(SettingsError, match="FRAISEQL_DATABASE_URL is not set"), open_changelog(refused, samples=samples):
            pass
    with monkeypatch.context() as misspelt:
        misspelt.setenv("FRAISEQL_DATABSE_URL", "postgresql://elsewhere/db")
        with pytest.raises(SettingsError, match="did you mean FRAISEQL_DATABASE_URL"), open_changelog(settings):
            pass
    assert not list(short_directory.iterdir()), "asking leaves nothing behind"
    with open_changelog(settings, create=True) as changelog:
        assert changelog.count() == 0
    with pytest.raises(SettingsError, match="`fraiseql-pipeline sample`"), open_changelog(settings):
        pass
    with open_changelog(settings, samples=True) as changelog:
        assert changelog.preflight().warnings == ()
        assert changelog.count() == 3000
    with open_changelog(settings) as changelog:
        assert changelog.count() == 3000


def test_create_makes_an_empty_log_and_leaves_an_existing_one_alone(database: str, now: datetime) -> None:
    settings = Settings(database_url=database)
    with open_changelog(settings, create=True) as changelog:
        assert changelog.count() == 0
        written = write_sample(changelog, 100, end=now)
    with open_changelog(settings, create=True) as changelog:
        assert changelog.count() == written.events


@pytest.mark.parametrize("named", ["path", "query", "words"])
def test_a_scratch_log_is_never_the_configured_one_however_its_url_is_written(changelog_url: str, named: str) -> None:
    given = conninfo_to_dict(changelog_url)
    query = {name: value for name, value in given.items() if name != "dbname"}
    written = {
        "path": f"postgresql:///{given['dbname']}?{urlencode(query)}",
        "query": f"postgresql:///?{urlencode(given)}",
        "words": make_conninfo(changelog_url),
    }[named]
    with scratch_changelog(Settings(database_url=written)) as changelog:
        assert conninfo_to_dict(changelog.url)["dbname"] != given["dbname"]
        write_sample(changelog, 10, end=datetime(2026, 11, 2, tzinfo=UTC))
    with open_changelog(Settings(database_url=written)) as changelog:
        assert changelog.count() == 0
