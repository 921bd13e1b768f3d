"""The commands, as a shell sees them: what they print, what they exit with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from fraiseql_pipeline.changelog import open_changelog, source, write_sample
from fraiseql_pipeline.cli import main, windows
from fraiseql_pipeline.event import QUARANTINE_SCHEMA
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile

Run = Callable[..., Result]


@pytest.fixture
def end() -> datetime:
    return Window.holding(datetime.now(UTC), WindowSize.HOUR).start


@pytest.fixture
def run(changelog_url: str, tmp_path: Path, end: datetime) -> Run:
    """A command on a change log with 2,000 events of the last six hours, and an empty lake."""
    environment = {
        "FRAISEQL_DATABASE_URL": changelog_url,
        "FRAISEQL_LAKE_URI": str(tmp_path / "lake"),
        "FRAISEQL_START": (end - timedelta(days=2)).isoformat(),
    }
    with open_changelog(Settings(database_url=changelog_url)) as changelog:
        write_sample(changelog, 2_000, days=1, end=end)

    def run(*arguments: str, **more: str) -> Result:
        return CliRunner(env=environment | more).invoke(main, list(arguments))

    return run


def said(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def materialize(run: Run, *more: str) -> dict[str, Any]:
    return said(run("materialize", "--start", "now-25h", "--end", "now", "--json", *more))


def test_materialize_publishes_every_ended_window_and_again_changes_nothing(run: Run, end: datetime) -> None:
    first, again = materialize(run, "--jobs", "2"), materialize(run)
    assert {window["outcome"] for window in first["windows"]} == {"published"}
    assert {window["outcome"] for window in again["windows"]} == {"unchanged"}
    assert sum(window["accepted_rows"] + window["quarantined_rows"] for window in first["windows"]) == sum(
        window["source_rows"] for window in first["windows"]
    )
    status = said(run("status", "--json"))
    assert status["windows"] == len(first["windows"])
    since = said(run("status", "--json", FRAISEQL_START=status["start"]))
    assert (since["holes"], since["complete_through"]) == ([], end.isoformat())


def test_holes_begin_where_the_first_window_was_set(run: Run, end: datetime) -> None:
    published = materialize(run)["windows"]
    status = said(run("status", "--json"))
    start = end - timedelta(days=2)
    missing = [window.key for window in tile(start, end, WindowSize.HOUR) if window.key < published[0]["window"]]
    assert (status["holes"], status["complete_through"]) == (missing, start.isoformat())


def test_a_late_event_is_merged_once_and_the_audit_agrees(run: Run, changelog_url: str, end: datetime) -> None:
    materialize(run)
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, created_at)"
            " VALUES ('Order', 'INSERT', gen_random_uuid(), %s)",
            [end - timedelta(hours=2)],
        )
    assert run("audit").exit_code == 0, "a late event is no difference: it is above the settled pk of its window"
    merged = said(run("late", "--json"))["windows"]
    assert [(window["outcome"], window["window"]) for window in merged] == [
        ("merged", (end - timedelta(hours=2)).strftime("%Y-%m-%d-%H:%M"))
    ]
    assert said(run("late", "--json"))["windows"] == []
    assert said(run("status", "--json"))["late_rows"] == 1
    assert said(run("audit", "--json"))["differing"] == []


def write(url: str, verb: str, at: datetime, events: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, created_at)"
            " SELECT 'Order', %s, gen_random_uuid(), %s FROM generate_series(1, %s)",
            [verb, at, events],
        )


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_a_run_that_fails_reports_what_it_published_and_what_it_refused(
    run: Run, changelog_url: str, end: datetime, jobs: str
) -> None:
    bad = [Window(end - timedelta(hours=hours), WindowSize.HOUR) for hours in (5, 3)]
    for window in bad:
        write(changelog_url, "MELT", window.start, 2_000)
    failed = run("materialize", "--start", (end - timedelta(hours=6)).isoformat(), "--end", "now", "--json", "--jobs", jobs)
    assert failed.exit_code == 4
    told = json.loads(failed.stdout)
    keys = [window.key for window in tile(end - timedelta(hours=6), end, WindowSize.HOUR)]
    assert [window["window"] for window in told["windows"]] == [key for key in keys if key not in {b.key for b in bad}]
    assert [refused["window"] for refused in told["refused"]] == [window.key for window in bad]
    assert all(refused["window"] in refused["error"] for refused in told["refused"])
    assert failed.stderr.splitlines()[-1].endswith(f"Refused were 2 of 6 windows, the others: {bad[1].key}.")
    shown = run("materialize", "--start", (end - timedelta(hours=6)).isoformat(), "--end", "now", "--jobs", jobs)
    assert shown.stdout.count("unchanged") == 4
    assert shown.stdout.count("is halted") == 2


def test_late_events_are_counted_apart_from_the_windows_they_are_added_to(run: Run, changelog_url: str, end: datetime) -> None:
    materialize(run)
    at = end - timedelta(hours=2)
    (before,) = (w for w in materialize(run)["windows"] if w["window"] == Window(at, WindowSize.HOUR).key)
    write(changelog_url, "INSERT", at, 5)
    write(changelog_url, "MELT", at, 2)
    write(changelog_url, "MELT", end - timedelta(hours=4), 2_000)
    failed = run("late", "--json")
    assert failed.exit_code == 4
    told = json.loads(failed.stdout)
    added = {"source_rows": 7, "accepted_rows": 5, "quarantined_rows": 2}
    assert told["late"] == added
    (merged,) = told["windows"]
    assert {name: merged["late"][name] for name in added} == added
    assert sum(merged["late"]["reasons"].values()) >= 2
    assert {name: merged[name] - before[name] for name in added} == added
    write(changelog_url, "INSERT", at, 1)
    shown = run("late", "--start", at.isoformat())
    assert shown.exit_code == 0
    assert "1 late events: 1 accepted, 0 quarantined." in shown.stdout


def test_late_events_of_a_log_that_a_standby_took_over_are_added_when_forced(
    run: Run, changelog_url: str, end: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    materialize(run)
    whole = source.preflight
    monkeypatch.setattr(source, "preflight", lambda connection: replace(whole(connection), identity="the next timeline"))
    write(changelog_url, "INSERT", end - timedelta(hours=2), 3)
    assert run("late").exit_code == 3
    assert said(run("late", "--force", "--json"))["late"]["accepted_rows"] == 3


def test_an_end_far_ahead_costs_no_more_than_now(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[datetime] = []

    def tiled(start: datetime, end: datetime, size: WindowSize) -> Iterator[Window]:
        looked.append(end)
        return tile(start, end, size)

    monkeypatch.setattr(windows, "tile", tiled)
    assert len(said(run("materialize", "--start", "now-3h", "--end", "9999-12-31", "--json"))["windows"]) in {2, 3}
    assert looked[0] <= datetime.now(UTC)


def test_audit_names_the_window_that_lost_an_event_in_the_source(run: Run, changelog_url: str, end: datetime) -> None:
    materialize(run)
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        gone = connection.execute(
            "DELETE FROM core.tb_entity_change_log WHERE pk_entity_change_log ="
            " (SELECT max(pk_entity_change_log) FROM core.tb_entity_change_log WHERE isfinite(created_at) AND created_at < %s)"
            " RETURNING pk_entity_change_log, created_at",
            [end - timedelta(hours=3)],
        ).fetchone()
    assert gone is not None
    audited = run("audit", "--json")
    assert audited.exit_code == 3
    (differing,) = json.loads(audited.stdout)["differing"]
    assert differing["source_rows"] == differing["lake_rows"] - 1
    assert "fewer events in the source needs --allow-shrink" in run("audit").stdout
    shrinking = run("materialize", "--start", "now-25h", "--end", "now")
    assert shrinking.exit_code == 5
    assert "--allow-shrink" in shrinking.output
    assert differing["window"] in shrinking.output
    again = materialize(run, "--allow-shrink")
    assert [window["window"] for window in again["windows"] if window["outcome"] == "replaced"] == [differing["window"]]
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO core.tb_entity_change_log (pk_entity_change_log, object_type, modification_type, object_id, created_at)"
            " OVERRIDING SYSTEM VALUE VALUES (%s, 'Order', 'INSERT', gen_random_uuid(), %s)",
            [gone[0], gone[1]],
        )
    restored = run("audit")
    assert (restored.exit_code, "--allow-shrink" in restored.stdout) == (3, False), "the source has more, and nothing would be lost"


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "json"])
def test_read_writes_the_same_events_from_the_lake_and_from_a_server(
    run: Run, tmp_path: Path, suffix: str, changelog_url: str
) -> None:
    materialize(run)
    settings = Settings(lake_uri=str(tmp_path / "lake"), arrow_flight_bind="127.0.0.1:0")
    ticket = "events:Order|User:now-25h:now-1h:100"
    with serve(settings) as server:
        local = said(run("read", ticket, "--output", str(tmp_path / f"local.{suffix}"), "--json"))
        remote = said(run("read", ticket, "--output", str(tmp_path / f"remote.{suffix}"), "--url", server.url, "--json"))
    assert local["rows"] == remote["rows"] > 0
    if suffix == "parquet":
        assert pq.read_table(tmp_path / "local.parquet").equals(pq.read_table(tmp_path / "remote.parquet"))
    elif suffix != "arrow":
        assert (tmp_path / f"local.{suffix}").read_bytes() == (tmp_path / f"remote.{suffix}").read_bytes()


def test_quarantine_shows_keys_and_reasons_of_every_rejected_event(run: Run) -> None:
    published = materialize(run)["windows"]
    listed = said(run("quarantine", "list", "--json"))["windows"]
    rejected = {window["window"]: window["quarantined_rows"] for window in published if window["quarantined_rows"]}
    assert {window["window"]: window["quarantined_rows"] for window in listed} == rejected
    busiest = max(rejected, key=lambda key: rejected[key])
    shown = said(run("quarantine", "show", busiest, "--json", "--limit", "2"))
    assert (shown["rows"], len(shown["events"])) == (rejected[busiest], min(2, rejected[busiest]))
    assert all(event["reasons"] and list(event) == QUARANTINE_SCHEMA.names for event in shown["events"])
    cut = run("quarantine", "show", busiest, "--limit", "1")
    assert (f"1 of {rejected[busiest]} are shown" in cut.stderr) == (rejected[busiest] > 1)


def test_a_new_token_is_told_once(run: Run) -> None:
    made = run("token", "alice", "--json")
    assert json.loads(made.stdout)["token"] not in made.stderr
    assert made.stderr == ""


def test_doctor_fsck_and_maintain_find_a_sound_lake_sound(run: Run) -> None:
    materialize(run)
    found = said(run("doctor", "--json"))
    assert found["can_seal"] is True
    assert datetime.fromisoformat(found["sealed_until"]).isoformat() == found["sealed_until"]
    assert said(run("fsck", "--json")) == {"findings": []}
    assert run("maintain").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "sentence"),
    [
        (("materialize", "--start", "yesterday", "--end", "now"), {}, 2, "'yesterday'"),
        (("materialize", "--start", "now", "--end", "now-1h"), {}, 2, "--start must lie before --end"),
        (("materialize", "--start", "2999-01-01", "--end", "2999-01-02"), {}, 2, "No hour has ended"),
        (("read", "orders"), {}, 2, "events:"),
        (("read", "events:*:now-1h:now:10"), {}, 5, "materialize"),
        (("read", "events:*:now-1h:now:10", "--output", "events.xlsx"), {}, 2, ".parquet"),
        (("read", "events:*:now-1h:now:10", "--url", "grpc://127.0.0.1:1"), {}, 6, "127.0.0.1:1"),
        (("quarantine", "show", "today"), {}, 2, "2026-11-01-13:00"),
        (("status",), {"FRAISEQL_WINDOW": "week"}, 2, "FRAISEQL_WINDOW"),
        (("serve",), {"FRAISEQL_ARROW_FLIGHT_ENABLED": "false"}, 2, "FRAISEQL_ARROW_FLIGHT_ENABLED"),
        (("serve",), {"FRAISEQL_ARROW_FLIGHT_BIND": "0.0.0.0:0"}, 2, "--insecure"),
        (("doctor",), {"FRAISEQL_DATABASE_URL": "postgresql://reader:secret@127.0.0.1:1/shop"}, 3, "FRAISEQL_DATABASE_URL"),
        (("--config", "absent.toml", "status"), {}, 2, "absent.toml"),
        (("demo",), {}, 2, "FRAISEQL_DATABASE_URL"),
        (("demo",), {"FRAISEQL_DATABASE_URL": "", "FRAISEQL_LAKE_URI": "s3://company/lake"}, 2, "kept out of object stores"),
        (("read", "events:*:now-1h:now:10", "--token-file", "token"), {}, 2, "--token-file is for a Flight server"),
        (("read", "events:*:now-1h:now:10", "--tls-root-certs", "ca.pem"), {}, 2, "--tls-root-certs is for a Flight server"),
        (("materialize", "--start", "2024-01-01", "--end", "2024-01-02"), {}, 2, "FRAISEQL_START"),
        (("materialize", "--start", "now-2h", "--end", "now"), {"FRAISEQL_LAKE_URI": "/proc/nope"}, 5, "storage"),
        (("read", '{"type":"events","entity_type":"*","start":"now-1h","end":"now","follow":true}'), {}, 2, "--url"),
        (("read", "events:*:now-1h:now:10", "--url", "http://127.0.0.1:1"), {}, 2, "grpc+tls://"),
        (("late", "--start", "now", "--end", "now-3h"), {}, 2, "--start must lie before --end"),
        (("late",), {}, 5, "Nothing is published in"),
        (("audit",), {}, 5, "Nothing is published in"),
        (("fsck",), {}, 5, "Nothing is published in"),
        (("maintain",), {}, 5, "Nothing is published in"),
        (("quarantine", "list"), {}, 5, "Nothing is published in"),
        (("quarantine", "show", "2026-11-01-13:00"), {}, 5, "Nothing is published in"),
        (("token", "alice", "--org", "acme"), {}, 2, "--org must be a UUID"),
        (("token", "#alice"), {}, 2, "PRINCIPAL"),
        (("sample", "--events", "1"), {}, 3, "name an empty database"),
    ],
)
def test_bad_input_gets_one_sentence_and_an_exit_code(
    run: Run, arguments: tuple[str, ...], environment: dict[str, str], code: int, sentence: str
) -> None:
    result = run(*arguments, **environment)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert "secret" not in result.output
