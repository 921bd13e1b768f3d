"""``read``: what is not among the events is said, and a stream that goes on loses nothing when somebody ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.cli import main
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.lakes import publish
from tests.support.reading import insert
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)


@pytest.fixture
def end() -> datetime:
    """The hour three before this one: two have ended since, and this one has begun."""
    return Window.holding(datetime.now(UTC), WindowSize.HOUR).start - 2 * HOUR


@pytest.fixture
def lake(tmp_path: Path, end: datetime) -> Lake:
    """The two hours before ``end`` with 50 events each, the second provisional, and before them a hole and one more hour."""
    lake = Lake(str(tmp_path / "lake"))
    for hours, state in ((4, "sealed"), (2, "sealed"), (1, "provisional")):
        publish(lake, Window(end - hours * HOUR, WindowSize.HOUR), 50, state=state)
    return lake


def run(lake: Lake, *arguments: str, **environment: str) -> Result:
    return CliRunner(env={"FRAISEQL_LAKE_URI": lake.uri, "FRAISEQL_DATABASE_URL": ""} | environment).invoke(main, list(arguments))


@contextmanager
def served(lake: Lake, **chosen: Any) -> Iterator[FlightServer]:
    with serve(Settings(lake_uri=lake.uri, arrow_flight_bind="127.0.0.1:0", **chosen)) as server:
        yield server


def test_what_is_not_published_of_the_asked_range_is_said(lake: Lake, end: datetime, tmp_path: Path) -> None:
    since = (end - 4 * HOUR).isoformat()
    with served(lake) as server:
        for at in ((), ("--url", server.url)):
            read = run(lake, "read", f"events:*:{since}:now:10", "--allow-missing", "--output", str(tmp_path / "x.parquet"), *at)
            assert read.exit_code == 0, read.output
            assert "150 events in" in read.stdout
            skipped, provisional, behind = read.stderr.splitlines()
            assert skipped == "1 window(s) of the range are not published and were skipped."
            assert provisional.startswith("1 window(s) of the range are provisional")
            assert behind == (
                f"Windows are published up to {end.isoformat(timespec='minutes')}; "
                f"{'what the range has behind that is' if at else '3 window(s) behind that are'} left out."
            )
            told = json.loads(run(lake, "read", f"events:*:{since}:now:10", "--allow-missing", "--json", *at).stdout)
            assert told["rows"] == 150
            assert (told["complete_through"], told["missing_windows"], told["provisional_windows"]) == (end.isoformat(), 1, 1)
            assert told["table_version"] == lake.snapshot().version
            assert json.loads(told["next_ticket"])["start"] == end.isoformat()


def test_a_read_of_what_is_all_published_says_nothing_more(lake: Lake, end: datetime) -> None:
    start = (end - 2 * HOUR).isoformat()
    with served(lake) as server:
        for at in ((), ("--url", server.url)):
            assert run(lake, "read", f"events:*:{start}:{(end - HOUR).isoformat()}:10", *at).stderr == ""
            cut = json.dumps({"type": "events", "entity_type": "*", "start": start, "end": "now", "limit": 7})
            assert "published up to" not in run(lake, "read", cut, *at).stderr, "a limit was asked for"


def test_who_reads_the_lake_alone_is_told_that_a_server_reads_through(lake: Lake, end: datetime) -> None:
    url = {"FRAISEQL_DATABASE_URL": "postgresql://reader:secret@127.0.0.1:1/shop"}
    hole, short = f"events:*:{(end - 4 * HOUR).isoformat()}:now:10", f"events:*:{(end - 2 * HOUR).isoformat()}:now:10"
    refused = run(lake, "read", hole, **url)
    assert refused.exit_code == 5
    assert "On the command line: --allow-missing. A server that follows the change log has more" in refused.stderr
    assert "`fraiseql-pipeline serve`, and --url here" in run(lake, "read", short, **url).stderr
    for said in (run(lake, "read", hole), run(lake, "read", short)):
        assert "serve" not in said.stderr, "without a database URL a server reads no further"


# -------------------------------------------------------------------------------------------------------------------- follow


class Reading:
    """``read`` of a ticket that follows, as a shell starts it."""

    def __init__(self, url: str, *arguments: str, **ticket: object) -> None:
        asked = {
            "type": "events",
            "entity_type": "*",
            "start": "now-1h",
            "end": "now",
            "columns": ["pk", "timestamp"],
            "follow": True,
        }
        command = [sys.executable, "-m", "fraiseql_pipeline", "read", json.dumps(asked | ticket), "--url", url, *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FRAISEQL_")}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def interrupted(self, number: int = signal.SIGTERM) -> tuple[str, str]:
        """What it printed until it was told to end, as a file and as remarks."""
        assert self.process.poll() is None, self.process.communicate()
        self.process.send_signal(number)
        said = self.process.communicate(timeout=30)
        assert self.process.returncode == 1, said
        return said


@pytest.fixture
def following(changelog_url: str, tmp_path: Path) -> Iterator[FlightServer]:
    """A server that follows an empty change log."""
    lake = Lake(str(tmp_path / "lake"))
    with open_changelog(Settings(database_url=changelog_url)), served(lake, database_url=changelog_url) as server:
        live = server._service.live
        assert live is not None
        eventually(lambda: live.up)
        yield server


def write(url: str, rows: int) -> list[int]:
    return [insert(url, created_at=datetime.now(UTC)) for _ in range(rows)]


def keys(file: Path, suffix: str) -> list[int]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["pk"] for line in lines] if suffix == "json" else [int(line.split(",")[0]) for line in lines[1:]]


def test_a_read_up_to_now_of_a_server_that_follows_says_nothing_more(following: FlightServer, changelog_url: str) -> None:
    live, written = following._service.live, write(changelog_url, 3)
    assert live is not None
    eventually(lambda: live.buffer.settled_pk >= written[-1])
    read = CliRunner().invoke(main, ["read", "events:*:now-1h:now:10", "--url", following.url, "--json"])
    assert "left out" not in read.stderr
    told = json.loads(read.stdout)
    assert (told["rows"], told["settled_pk"]) == (3, written[-1])
    assert datetime.fromisoformat(told["complete_through"]) <= datetime.now(UTC)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_an_interrupted_follower_keeps_its_file_and_goes_on_behind_the_key_it_names(
    following: FlightServer, changelog_url: str, tmp_path: Path, suffix: str
) -> None:
    target = tmp_path / f"events.{suffix}"
    target.write_text("of another day\n")
    reading = Reading(following.url, "--output", str(target))
    first = write(changelog_url, 3)
    eventually(lambda: not target.read_text().startswith("of another day") and keys(target, suffix) == first)
    first += write(changelog_url, 2)
    eventually(lambda: keys(target, suffix) == first)
    _, remarks = reading.interrupted(signal.SIGINT if suffix == "json" else signal.SIGTERM)
    assert "Aborted" not in remarks
    reached = int(remarks.split('"after_pk": ')[1].split(" ")[0])
    assert reached == first[-1]
    reading = Reading(following.url, "--output", str(target), after_pk=reached)
    later = write(changelog_url, 2)
    eventually(lambda: keys(target, suffix) == first + later)
    reading.interrupted()
    assert keys(target, suffix) == first + later


def test_a_follower_shows_each_event_as_it_comes(following: FlightServer, changelog_url: str) -> None:
    reading = Reading(following.url)
    assert reading.process.stdout is not None
    written = write(changelog_url, 1)
    assert reading.process.stdout.readline().split() == ["pk", "timestamp"]
    assert reading.process.stdout.readline().split()[0] == str(written[0])
    written += write(changelog_url, 1)
    assert reading.process.stdout.readline().split()[0] == str(written[1])
    rest, remarks = reading.interrupted()
    assert rest.startswith("2 events in")
    assert f'a ticket with "after_pk": {written[1]} goes on from there.' in remarks


def test_a_stream_that_ends_by_itself_is_told_with_its_receipt(following: FlightServer, changelog_url: str, tmp_path: Path) -> None:
    written, target = write(changelog_url, 3), tmp_path / "events.json"
    asked = {"type": "events", "entity_type": "*", "start": "now-1h", "end": "now", "columns": ["pk"], "follow": True, "limit": 3}
    done = CliRunner().invoke(main, ["--json", "read", json.dumps(asked), "--url", following.url, "--output", str(target)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["rows"], told["missing_windows"], told["output"]) == (3, 0, str(target))
    assert keys(target, "json") == written
    assert "read the same ticket again" not in done.stderr, "it is whole"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_that_cannot_grow_is_refused_for_a_stream_that_follows(following: FlightServer, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"e.{suffix}"
    asked = {"type": "events", "entity_type": "*", "start": "now-1h", "end": "now", "follow": True}
    refused = CliRunner().invoke(main, ["read", json.dumps(asked), "--url", following.url, "--output", str(target)])
    assert (refused.exit_code, target.exists()) == (2, False)
    assert f"must go into a .json or .csv file, which can be read while it grows; got '{target.name}'" in refused.stderr
