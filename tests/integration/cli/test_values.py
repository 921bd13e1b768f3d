"""What events say, on a screen and in a file: as it is, and never obeyed."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest

from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.cli.conftest import HOUR, TERMINAL, Run, insert, materialized
from tests.support.lakes import publish


def test_what_an_event_says_is_shown_and_never_obeyed(run: Run, changelog_url: str, end: datetime) -> None:
    name = "Ord[/b]er :ice: [red]"
    insert(changelog_url, end - HOUR, name + "\x1b[2J", verb="nonsense")
    insert(changelog_url, end - HOUR, name)
    materialized(run, changelog_url, end)
    key = Window.holding(end - HOUR, WindowSize.HOUR).key
    ticket = f"events:*:{(end - HOUR).isoformat()}:{end.isoformat()}:10"
    for environment in ({}, TERMINAL | {"COLUMNS": "250"}):
        quarantined, read = run("quarantine", "show", key, **environment), run("read", ticket, **environment)
        assert quarantined.exit_code == read.exit_code == 0
        assert name + r"\x1b[2J" in quarantined.stdout
        assert name in read.stdout
    assert "Line:  al:ice:*:read:" in run("token", "al:ice", **TERMINAL).stdout


def test_a_terminal_gets_a_line_per_event_and_a_pipe_whole_values(run: Run, lake: Lake, end: datetime) -> None:
    del lake
    ticket = f"events:*:{(end - HOUR).isoformat()}:{end.isoformat()}:10"
    drawn, piped = run("read", ticket, **TERMINAL), run("read", ticket)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn.stdout).splitlines()
    assert sum("│" in line for line in lines) == 10
    assert all(len(line) <= 120 for line in lines[:-2])
    assert "Not shown: event_id" in drawn.stdout
    assert len(piped.stdout.splitlines()[1].split()[0]) == 36


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("served", [False, True], ids=["lake", "server"])
def test_a_text_file_has_plain_types_whatever_the_stream_has(
    run: Run, changelog_url: str, end: datetime, tmp_path: Path, suffix: str, served: bool
) -> None:
    insert(changelog_url, end - HOUR)
    materialized(run, changelog_url, end)
    ticket = json.dumps(
        {
            "type": "events",
            "entity_type": "*",
            "start": (end - HOUR).isoformat(),
            "end": end.isoformat(),
            "columns": ["event_id", "entity_type", "updated_fields", "event_date"],
            "profile": "compact",
        }
    )
    target = tmp_path / f"events.{suffix}"
    if served:
        with serve(Settings(lake_uri=str(tmp_path / "lake"), arrow_flight_bind="127.0.0.1:0")) as server:
            done = run("read", ticket, "--output", str(target), "--url", server.url)
    else:
        done = run("read", ticket, "--output", str(target))
    assert done.exit_code == 0, done.output
    if suffix == "csv":
        table = pa.csv.read_csv(target)
        assert json.loads(table["updated_fields"][0].as_py()) == ["total", "a,b"]
        event = table.to_pylist()[0]
    else:
        event = json.loads(target.read_text().splitlines()[0])
        assert event["updated_fields"] == ["total", "a,b"]
    assert event["entity_type"] == "Order"
    assert len(event["event_id"]) == 36


def test_a_file_that_cannot_be_written_is_one_sentence(run: Run, lake: Lake, end: datetime) -> None:
    del lake
    ticket = f"events:*:{(end - HOUR).isoformat()}:{end.isoformat()}:10"
    for suffix in ("csv", "parquet", "arrow", "json"):
        refused = run("read", ticket, "--output", f"/proc/x.{suffix}")
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"Error: The output file 'x.{suffix}' cannot be written: ")


def test_a_read_of_nothing_says_what_there_is(run: Run, lake: Lake, end: datetime) -> None:
    start, before, after = (end - HOUR).isoformat(), (end - 30 * HOUR).isoformat(), (end + 9 * HOUR).isoformat()
    with serve(Settings(lake_uri=lake.uri, arrow_flight_bind="127.0.0.1:0")) as server:
        for at in ((), ("--url", server.url)):
            mistyped = run("read", f"events:order:{start}:{end.isoformat()}:10", *at)
            assert (mistyped.exit_code, mistyped.stdout.splitlines()[-1][:9]) == (0, "0 events ")
            assert "There is no type 'order' in that range; there are " in mistyped.stderr, at
            assert "Order" in mistyped.stderr
            assert "Nothing is published in that range" in run("read", f"events:*:{end.isoformat()}:{after}:10", *at).stderr
    assert f"the lake holds {end - 6 * HOUR:%Y-%m-%dT%H:%M}" in run("read", f"events:*:{before}:{start[:11]}01:00:10").stderr


def test_a_ticket_of_other_bytes_than_utf_8_is_one_sentence(run: Run) -> None:
    refused = run("read", os.fsdecode(b"events:\xff:now-1h:now:10"))
    assert refused.exit_code == 2
    assert "A ticket must be UTF-8 text, byte 7 is not." in refused.output


def test_a_hole_can_be_skipped_as_the_message_says(run: Run, lake: Lake, end: datetime) -> None:
    publish(lake, Window.holding(end + HOUR, WindowSize.HOUR), 5)
    ticket = f"events:*:{(end - HOUR).isoformat()}:{(end + 2 * HOUR).isoformat()}:10"
    refused = run("read", ticket, "--json")
    assert refused.exit_code == 5
    assert "allow_missing" in refused.stderr
    assert json.loads(run("read", ticket, "--json", "--allow-missing").stdout)["rows"] == 55
