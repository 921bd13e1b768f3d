"""Where events come from: nothing is made up in place of what somebody meant, and ``doctor`` tells what stands in the way."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import psycopg
import pytest

from fraiseql_pipeline.changelog import embedded
from fraiseql_pipeline.cli.source import _unwritable
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.cli.conftest import HOUR, Run, insert
from tests.support.lakes import publish


@pytest.mark.parametrize("command", [("doctor",), ("materialize", "--start", "now-3h", "--end", "now")])
def test_a_misspelt_url_is_named_and_no_events_are_made_up_in_its_place(
    run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run(*command, FRAISEQL_DATABSE_URL="postgresql://app:hunter2@db/app")
    assert refused.exit_code == 2
    assert "Error: FRAISEQL_DATABSE_URL is not a setting; did you mean FRAISEQL_DATABASE_URL?\n" in refused.stderr
    assert "hunter2" not in refused.output
    assert not list(tmp_path.iterdir()), "a command that was refused leaves nothing behind"


@pytest.mark.parametrize(
    ("command", "lake_uri"),
    [(("doctor",), "./lake"), (("materialize", "--start", "now-3h", "--end", "now"), "s3://company/lake")],
)
def test_only_a_local_lake_is_filled_from_made_up_events(
    run: Run, command: tuple[str, ...], lake_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run(*command, FRAISEQL_LAKE_URI=lake_uri)
    assert refused.exit_code == 2
    assert (
        refused.stderr == "Error: FRAISEQL_DATABASE_URL is not set; set it, or try sample events with `fraiseql-pipeline sample`.\n"
    )
    assert not list(tmp_path.iterdir())


def test_sample_events_are_made_on_request_and_named_wherever_they_are_read(
    run: Run, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_directory)
    assert run("sample", "--events", "1000").exit_code == 0
    looked = run("doctor", "--json")
    assert looked.stderr.splitlines()[0] == "source: embedded Postgres in .fraiseql, sample events"
    assert json.loads(looked.stdout)["settled_pk"] >= 1000
    published = run("materialize", "--start", "now-3h", "--end", "now", "--json")
    assert published.exit_code == 0, published.output
    assert "source: embedded Postgres in .fraiseql, sample events" in published.stderr


def test_a_command_that_is_told_to_end_leaves_nothing_half_done(changelog_url: str, tmp_path: Path) -> None:
    program = "import sys; from fraiseql_pipeline.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "sample", "--events", "2000000"]
    with (
        psycopg.connect(changelog_url, autocommit=True) as log,
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "FRAISEQL_DATABASE_URL": changelog_url}, stderr=subprocess.PIPE, text=True
        ) as running,
    ):
        while log.execute("SELECT count(*) FROM core.tb_entity_change_log").fetchone() == (0,):
            assert running.poll() is None
        running.terminate()
        _, said = running.communicate(timeout=60)
        assert (running.returncode, said.strip().splitlines()[-1]) == (1, "Aborted!")
        assert log.execute("SELECT count(*) FROM core.tb_entity_change_log").fetchone() == (0,)
        assert log.execute("SELECT count(*) FROM pg_indexes WHERE tablename = 'tb_entity_change_log'").fetchone() == (6,)


def test_doctor_names_source_and_lake_and_what_materialize_would_refuse(
    run: Run, changelog_url: str, role: str, end: datetime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(changelog_url, end - HOUR)
    reader = embedded.database_url(changelog_url, psycopg.conninfo.conninfo_to_dict(changelog_url)["dbname"], role)
    monkeypatch.setenv("FRAISEQL_NATS_URL", "nats://localhost")
    looked = run("doctor", FRAISEQL_DATABASE_URL=reader)
    assert looked.exit_code == 0, looked.output
    assert f"as {role}" in looked.stdout
    assert str(tmp_path / "lake") in looked.stdout
    assert "sealed until           nothing" in looked.stdout
    assert "FRAISEQL_NATS_URL is not a setting of this program." in looked.stdout
    assert ".." not in looked.stdout

    assert run("doctor", FRAISEQL_DATABASE_URL=reader, FRAISEQL_LAKE_URI="/proc/nope").exit_code == 5
    publish(Lake(str(tmp_path / "lake")), Window.holding(end, WindowSize.HOUR), 3)
    other = run("doctor", "--json", FRAISEQL_DATABASE_URL=reader)
    assert other.exit_code == 3
    assert "was published from one" in json.loads(other.stdout)["problems"][0]


def test_doctor_tells_of_a_lake_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as refused:
        refused.setattr(Path, "exists", closed)
        (problem,) = _unwritable(Lake("/somewhere/lake"))
    assert str(problem) == "The lake cannot be written: Permission denied; check FRAISEQL_LAKE_URI and who may write there."


def test_doctor_makes_every_check_whatever_the_others_find(run: Run, lake: Lake, changelog_url: str) -> None:
    del lake
    away = {"FRAISEQL_DATABASE_URL": "postgresql://reader:secret@127.0.0.1:1/shop"}
    looked = run("doctor", "--json", **away)
    told = json.loads(looked.stdout)
    assert (looked.exit_code, told["published_windows"], told["settled_pk"], len(told["problems"])) == (3, 6, None, 1)
    shown = run("doctor", **away)
    assert re.search(r"source +a problem, see below\n", shown.stdout)
    assert re.search(r"published windows +6\n", shown.stdout)
    assert "readable" not in shown.stdout
    both = run("doctor", "--json", **away, FRAISEQL_LAKE_URI="/proc/nope")
    assert both.exit_code == 5
    source, storage = json.loads(both.stdout)["problems"]
    assert ("FRAISEQL_DATABASE_URL" in source, "The lake cannot be written" in storage) == (True, True)
    assert f"Problem: {source}" in run("doctor", **away, FRAISEQL_LAKE_URI="/proc/nope").stdout
    with psycopg.connect(changelog_url) as writer:
        writer.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, created_at) VALUES ('Order', 'INSERT', 'infinity')"
        )
        writer.commit()
        writer.execute("INSERT INTO core.tb_entity_change_log (object_type, modification_type) VALUES ('Order', 'INSERT')")
        held = run("doctor", "--json", FRAISEQL_DATABASE_URL=changelog_url, FRAISEQL_SETTLE_TIMEOUT_SECONDS="0.1")
    told = json.loads(held.stdout)
    assert (held.exit_code, told["can_seal"], told["settled_pk"], told["published_windows"]) == (3, True, None, 6)
    assert told["warnings"][-1].startswith("1 events have an infinite or impossible created_at")


def test_who_blocks_is_told_once(run: Run, changelog_url: str, end: datetime) -> None:
    with psycopg.connect(changelog_url) as writer:
        writer.execute("INSERT INTO core.tb_entity_change_log (object_type, modification_type) VALUES ('Order', 'INSERT')")
        refused = run(
            "doctor", FRAISEQL_DATABASE_URL=changelog_url, FRAISEQL_SETTLE_TIMEOUT_SECONDS="0.1", FRAISEQL_SEAL_TIMEOUT_SECONDS="0"
        )
        assert refused.stderr.count(f"pid {writer.info.backend_pid} ") == 1
    assert refused.exit_code == 3
