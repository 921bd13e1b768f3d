"""Windows as they are published and told of: nothing passes for success, and nothing is hidden."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.cli.conftest import HOUR, TERMINAL, Run, insert, materialized


def test_windows_of_another_size_need_a_word(run: Run, changelog_url: str, end: datetime) -> None:
    for hour in range(24):
        insert(changelog_url, end - (hour + 0.5) * HOUR)
    materialized(run, changelog_url, end, hours=24)
    day = ("materialize", "--start", (end - 24 * HOUR).isoformat(), "--end", end.isoformat())
    environment = {"FRAISEQL_DATABASE_URL": changelog_url, "FRAISEQL_WINDOW": "day"}
    refused = run(*day, **environment)
    assert refused.exit_code == 2
    assert "set FRAISEQL_WINDOW=hour, or ask for it with --other-size" in refused.stderr
    assert json.loads(run("status", "--json", FRAISEQL_WINDOW="day").stdout)["holes"] == [], "hours cover their day"
    assert run(*day, "--other-size", **environment).exit_code == 0
    materialized(run, changelog_url, end + 2 * HOUR, "--other-size")
    told = json.loads(run("status", "--json").stdout)
    assert (told["windows"], told["holes"]) == (3, []), "a day covers its hours"
    materialized(run, changelog_url, end + 4 * HOUR, hours=1)
    told = json.loads(run("status", "--json").stdout)
    assert told["holes"] == [Window.holding(end + 2 * HOUR, WindowSize.HOUR).key]
    assert told["complete_through"] == (end + 2 * HOUR).isoformat()


def test_a_reader_that_goes_away_does_not_end_the_work(changelog_url: str, end: datetime, tmp_path: Path) -> None:
    insert(changelog_url, end - HOUR)
    command = f"'{Path(sys.executable).parent}/fraiseql-pipeline' materialize --start {end - 30 * HOUR:%Y-%m-%dT%H:%M} --end {end:%Y-%m-%d}"
    environment = {**os.environ, "FRAISEQL_DATABASE_URL": changelog_url, "FRAISEQL_LAKE_URI": str(tmp_path / "lake")}
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(Lake(str(tmp_path / "lake")).published()) == 30


def test_a_pipe_gets_every_row_and_no_progress(run: Run, changelog_url: str, end: datetime) -> None:
    insert(changelog_url, end - HOUR)
    piped = materialized(run, changelog_url, end, hours=30)
    assert len(piped.stdout.splitlines()) == 31
    assert "Materializing: 30 of 30 windows" in piped.stderr
    drawn = run(
        "materialize",
        "--start",
        (end - 30 * HOUR).isoformat(),
        "--end",
        end.isoformat(),
        FRAISEQL_DATABASE_URL=changelog_url,
        **TERMINAL,
    )
    assert "30 windows, the first and the last ten" in drawn.stdout


@pytest.mark.parametrize("terminal", [False, True])
def test_a_width_that_nobody_knows_hides_nothing(run: Run, lake: Lake, terminal: bool) -> None:
    del lake
    shown = run("status", **({**TERMINAL, "COLUMNS": "0"} if terminal else {"COLUMNS": "0"}))
    assert re.search(r"accepted rows\W+300", shown.stdout)


def test_what_is_not_published_is_not_taken_for_sound(run: Run, lake: Lake, end: datetime) -> None:
    del lake
    for command in ("late", "audit"):
        checked = run(command, "--end", (end - 10 * HOUR).isoformat())
        assert checked.exit_code == 5
        assert f"Nothing is published before {end - 10 * HOUR:%Y-%m-%dT%H:%M}" in checked.stderr
        checked = run(command, "--start", (end + HOUR).isoformat())
        assert f"Nothing is published from {end + HOUR:%Y-%m-%dT%H:%M}+00:00; the lake holds" in checked.stderr
    shown = run("quarantine", "show", Window.holding(end + HOUR, WindowSize.HOUR).key)
    assert shown.exit_code == 5
    assert "is not published" in shown.stderr
