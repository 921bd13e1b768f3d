"""``demo``: what it tells, what it hands to Dagster, and what is left when somebody ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.cli import demo, main
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize


def test_the_demo_names_what_can_be_typed_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"make dev", "make serve", "make dbt"} <= {command for command, _ in demo._next()}
    monkeypatch.chdir(tmp_path)
    elsewhere = [command for command, _ in demo._next()]
    assert "fraiseql-pipeline serve" in elsewhere
    assert not any("make" in command or ".venv" in command for command in elsewhere)


def test_the_demos_dagster_process_gets_what_a_file_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: datetime) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "demo.toml"
    file.write_text(
        'window = "day"\nlake_uri = "elsewhere"\nmax_rejected_share = 0.5\narrow_flight_live = false\n[lake_options]\ntimeout = "5s"\n'
    )
    settings = Settings.load(file)
    given: dict[str, str] = {}

    def started(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        del command
        given.update(environment)
        return 0, ""

    monkeypatch.setattr(demo, "_run", started)
    demo._materialize("assets.definitions", [Window(end, WindowSize.DAY)], settings)
    for name in [name for name in given if name.startswith("FRAISEQL_")]:
        monkeypatch.setenv(name, given[name])
    assert Settings.load().model_dump() == settings.model_copy(update={"start": end}).model_dump()


def test_the_demo_tells_what_it_measured_and_what_a_second_one_does(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(_: str, windows: list[Window], settings: Settings) -> None:
        with open_changelog(settings) as changelog:
            pipeline.materialize(windows, settings=settings, changelog=changelog, lake=Lake.of(settings))

    monkeypatch.chdir(short_directory)
    monkeypatch.setattr(demo, "_materialize", in_this_process)
    first, again = (CliRunner().invoke(main, ["demo", "--events", "1000", "--json"]) for _ in range(2))
    for result in (first, again):
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert all(re.fullmatch("[a-z_]+", name) for name in told)
        assert told["dagster_events_per_second"] > 0
        assert told["events"] == told["accepted_rows"] + told["quarantined_rows"]
    assert "are published" not in first.stderr
    assert re.search(r"materializes (\d+) windows in one run; \1 are published, and are read and compared again", again.stderr)


_TELLS = """
import pathlib, signal, sys

def stop(number, _):
    with pathlib.Path("told").open("a") as told:
        told.write(signal.Signals(number).name)
    sys.exit(1)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
pathlib.Path("ready").touch()
while True:
    signal.pause()
"""


def test_an_interrupted_demo_lets_its_dagster_process_end(tmp_path: Path) -> None:
    program = (
        "import os, sys; from fraiseql_pipeline.cli.demo import _run; _run([sys.executable, '-c', sys.argv[1]], dict(os.environ))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, _TELLS], cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0
    ) as running:
        while not (tmp_path / "ready").exists():
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, said = running.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt")
    assert (tmp_path / "told").read_text() == "SIGTERM"
