"""What all commands have in common: options, progress, and errors in one sentence."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from tests.integration.cli.conftest import HOUR, TERMINAL, Run, insert, materialized


def test_options_of_the_program_may_stand_behind_the_command(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('lake_uri = "elsewhere"\n')
    for given in (("--config", str(file)), (f"--config={file}",)):
        assert json.loads(run("status", *given, "--json", FRAISEQL_LAKE_URI="").stdout)["lake"] == "elsewhere"
    assert run("status", "--config").exit_code == 2
    file.write_text('fraiseql_lake_uri = "elsewhere"\n')
    assert "'fraiseql_lake_uri' (did you mean 'lake_uri'?)" in run("status", "--config", str(file)).stderr


def test_every_long_command_shows_on_a_terminal_that_it_goes_on(run: Run, changelog_url: str, end: datetime) -> None:
    insert(changelog_url, end - HOUR)
    materialized(run, changelog_url, end)
    ticket = f"events:*:{(end - 2 * HOUR).isoformat()}:{end.isoformat()}:10"
    for shown, command in (
        ("Examining the lake", ("fsck",)),
        ("Maintaining the lake", ("maintain",)),
        ("Late events", ("late",)),
        ("Reading", ("read", ticket)),
    ):
        drawn, piped = (run(*command, FRAISEQL_DATABASE_URL=changelog_url, **how) for how in (TERMINAL, {}))
        assert (drawn.exit_code, piped.exit_code) == (0, 0), drawn.output
        assert shown in drawn.stderr
        assert piped.stderr == ""


def test_an_object_store_that_fails_is_named(run: Run) -> None:
    options = {
        "AWS_ENDPOINT_URL": "http://key:hunter2@127.0.0.1:1",
        "AWS_REGION": "x",
        "AWS_ALLOW_HTTP": "true",
        "max_retries": "0",
    }
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    failed = run("status", FRAISEQL_LAKE_URI="s3://bucket/events", FRAISEQL_LAKE_OPTIONS=json.dumps(options | keys))
    assert failed.exit_code == 5
    assert "The lake is s3://bucket/events at 127.0.0.1:1." in failed.stderr
    assert "hunter2" not in failed.output


def test_less_than_the_budgets_are_meant_for_is_measured_and_not_judged(run: Run, changelog_url: str) -> None:
    small = run("bench", "convert", "--events", "1000", "--rounds", "1", FRAISEQL_DATABASE_URL=changelog_url)
    assert small.exit_code == 0, small.output
    assert "Budgets are meant for 1,000,000 events" in small.stdout
    assert "missed" not in small.stdout
    assert "≥ 1,000,000" in small.stdout
    assert "json_ours" not in small.output
