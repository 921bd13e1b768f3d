"""What a new user gets wrong: nothing is invented, nothing passes for success, nothing ends in a traceback, and nothing is lost for good."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import embedded, open_changelog
from fraiseql_pipeline.cli import demo, flight, main
from fraiseql_pipeline.cli.source import _unwritable
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.flight.workers import Started, log_to_stderr
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile
from tests.support.lakes import publish

Run = Callable[..., Result]

HOUR = timedelta(hours=1)
#: What makes rich draw for a terminal where there is none.
TERMINAL = {"FORCE_COLOR": "1", "COLUMNS": "120"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FRAISEQL_") and name != "FRAISEQL_TEST_DSN"]:
        monkeypatch.delenv(name)


@pytest.fixture
def end() -> datetime:
    """The start of a day: two days before now, so that whole days have ended."""
    return Window.holding(datetime.now(UTC) - timedelta(days=2), WindowSize.DAY).start


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A command on a lake of its own, without a change log."""

    def run(*arguments: str, **environment: str) -> Result:
        return CliRunner(env={"FRAISEQL_LAKE_URI": str(tmp_path / "lake")} | environment).invoke(main, list(arguments))

    return run


@pytest.fixture
def lake(tmp_path: Path, end: datetime) -> Lake:
    """The six hours before ``end``, with 50 events each."""
    lake = Lake(str(tmp_path / "lake"))
    for window in tile(end - 6 * HOUR, end, WindowSize.HOUR):
        publish(lake, window, 50)
    return lake


def insert(url: str, at: datetime, object_type: str = "Order", verb: str = "INSERT") -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, updated_fields, created_at)"
            " VALUES (%s, %s, gen_random_uuid(), '{total,\"a,b\"}', %s)",
            [object_type, verb, at],
        )


def materialized(run: Run, url: str, end: datetime, *more: str, hours: int = 2) -> Result:
    done = run(
        "materialize", "--start", (end - hours * HOUR).isoformat(), "--end", end.isoformat(), *more, FRAISEQL_DATABASE_URL=url
    )
    assert done.exit_code == 0, done.output
    return done


# ------------------------------------------------------------------------------------------------------------------ source


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


# ----------------------------------------------------------------------------------------------------------------- windows


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


# ------------------------------------------------------------------------------------------------------------------ values


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


# ------------------------------------------------------------------------------------------------------------------ others


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


def test_options_of_the_program_may_stand_behind_the_command(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('lake_uri = "elsewhere"\n')
    for given in (("--config", str(file)), (f"--config={file}",)):
        assert json.loads(run("status", *given, "--json", FRAISEQL_LAKE_URI="").stdout)["lake"] == "elsewhere"
    assert run("status", "--config").exit_code == 2
    file.write_text('fraiseql_lake_uri = "elsewhere"\n')
    assert "'fraiseql_lake_uri' (did you mean 'lake_uri'?)" in run("status", "--config", str(file)).stderr


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


def test_serve_says_what_it_does_without_a_change_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_at_once(settings: Settings, *, insecure: bool, started: Callable[[Started], None]) -> None:
        del settings, insecure
        started(Started("grpc://127.0.0.1:1", None))

    monkeypatch.setattr(flight, "run", run_at_once)
    alone, following = run("serve"), run("serve", FRAISEQL_DATABASE_URL="postgresql://db/app")
    assert "live: off, uploads: off (no FRAISEQL_DATABASE_URL);" in alone.stdout
    assert "With FRAISEQL_DATABASE_URL set to the change log they reach up to now" in alone.stderr
    assert "live: on, uploads: off;" in following.stdout
    assert following.stderr == ""


def test_a_line_of_the_servers_log_begins_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    log_to_stderr()
    record = logging.LogRecord("flight", logging.WARNING, "", 0, "live events stop", (), None)
    record.created = 1_767_225_600.25
    record.msecs = 250
    assert logging.root.handlers[0].format(record) == "2026-01-01T00:00:00.250Z WARNING flight: live events stop"


def test_grpc_writes_no_header_into_the_servers_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    level = (binding := logging.getLogger("grpc._cython.cygrpc")).level
    try:
        log_to_stderr()
        # What it says of a header of other bytes than ASCII, such as a token with something behind it.
        binding.exception("Invalid encoding on %s", b"Bearer fq_token\xa0")
        logging.getLogger("grpc._server").error("heard")
    finally:
        binding.setLevel(level)
    assert "heard" in (said := capsys.readouterr().err)
    assert "fq_token" not in said


def test_less_than_the_budgets_are_meant_for_is_measured_and_not_judged(run: Run, changelog_url: str) -> None:
    small = run("bench", "convert", "--events", "1000", "--rounds", "1", FRAISEQL_DATABASE_URL=changelog_url)
    assert small.exit_code == 0, small.output
    assert "Budgets are meant for 1,000,000 events" in small.stdout
    assert "missed" not in small.stdout
    assert "≥ 1,000,000" in small.stdout
    assert "json_ours" not in small.output


@pytest.fixture(autouse=True)
def _root_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the handlers of the tests as they were."""
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers


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
