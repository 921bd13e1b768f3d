"""The Flight server in a run: told of every window, read back, and never a reason to fail one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import checks, readback
from assets.readback import READBACK
from assets.report import EVENTS
from assets.resources import Flight
from fraiseql_pipeline.errors import FlightUnavailable, SettingsError
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import Client
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window
from tests.support.code_location import Location, hours, write
from tests.support.lakes import publish

MORNING = hours("2026-11-20", 6, 9)
Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start ``fraiseql-pipeline serve`` over the lake of the environment; its URL. It writes ``audit.log``."""
    running: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> str:
        chosen = {
            "FRAISEQL_ARROW_FLIGHT_BIND": "127.0.0.1:0",
            "FRAISEQL_ARROW_FLIGHT_AUDIT_LOG": str(tmp_path / "audit.log"),
            "FRAISEQL_METRICS_BIND": "off",
            **environment,
        }
        command = [str(Path(sys.executable).with_name("fraiseql-pipeline")), "--json", "serve"]
        running.append(subprocess.Popen(command, env=os.environ | chosen, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        url: str = json.loads(running[-1].stdout.readline())["url"]
        return url

    yield start
    for server in running:
        server.kill()
        server.communicate()


@pytest.fixture
def nobody() -> str:
    """A URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"grpc://127.0.0.1:{free.getsockname()[1]}"


def _results(location: Location) -> dict[str | None, dg.AssetCheckEvaluation]:
    """The newest result of the check, per window."""
    history = location.instance.event_log_storage.get_asset_check_execution_history(dg.AssetCheckKey(EVENTS, READBACK), limit=100)
    evaluations = [one.evaluation for one in reversed(history) if isinstance(one.evaluation, dg.AssetCheckEvaluation)]
    return {evaluation.partition: evaluation for evaluation in evaluations}


def _warnings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if " - WARNING - " in line]


def _calls(tmp_path: Path) -> list[str]:
    lines = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    return [line["action"] or line["method"] for line in lines]


def _shown(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in evaluation.metadata.items()}


@pytest.mark.parametrize("profile", [None, "compact+lz4"], ids=["the server's encoding", "compact"])
def test_every_window_of_a_run_is_encoded_ahead_and_read_back_as_committed(
    location: Location, changelog_url: str, serve: Serve, tmp_path: Path, profile: str | None
) -> None:
    for n, window in enumerate(MORNING[:3]):  # the last one stays empty
        write(changelog_url, window, 100 + n, broken=n)
    assert location.run(*MORNING, flight=Flight(url=serve(), profile=profile)).success
    assert location.checks(READBACK) == {window.key: ("SUCCEEDED", True) for window in MORNING}
    rows = {window.key: 100 + n for n, window in enumerate(MORNING[:3])} | {MORNING[3].key: 0}
    found = {key: _shown(result) for key, result in _results(location).items()}
    assert {key: (shown["sent rows"], shown["accepted rows"]) for key, shown in found.items()} == {
        key: (count, count) for key, count in rows.items()
    }
    assert {shown["encoding"] for shown in found.values()} == {profile or "plain+zstd"}
    assert all(shown["sent checksum"] == shown["stored checksum"] for shown in found.values())
    assert _calls(tmp_path) == ["refresh", *["warm", "DoGet"] * len(MORNING)]


def test_a_window_with_late_events_is_read_back_as_it_is_now(location: Location, changelog_url: str, serve: Serve) -> None:
    server = Flight(url=serve())
    write(changelog_url, MORNING[0], 5)
    location.run(*MORNING[:2], flight=server)
    write(changelog_url, MORNING[0], 2)
    assert location.run(*MORNING[:2], config={"only_new": True}, flight=server).success
    assert location.checks(READBACK) == {window.key: ("SUCCEEDED", True) for window in MORNING[:2]}
    assert _shown(_results(location)[MORNING[0].key])["sent rows"] == 7


def test_the_environment_names_the_server_and_the_token(
    location: Location, changelog_url: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, line = new_token("dagster", None, ("read", "admin"))
    (tmp_path / "tokens").write_text(line + "\n")
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_URL", serve(FRAISEQL_ARROW_FLIGHT_TOKENS_FILE=str(tmp_path / "tokens")))
    write(changelog_url, MORNING[0], 20)
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_TOKEN", "fq_hunter2" + "x" * 40)
    refused = location.run(MORNING[0])
    assert refused.success
    assert location.checks(READBACK) == {MORNING[0].key: ("FAILED", True)}
    assert _results(location)[MORNING[0].key].severity is dg.AssetCheckSeverity.WARN
    assert "hunter2" not in repr(
        [record.event_log_entry for record in location.instance.get_records_for_run(refused.run_id).records]
    )
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_TOKEN", token)
    assert location.run(MORNING[0]).success
    assert location.checks(READBACK) == {MORNING[0].key: ("SUCCEEDED", True)}


def test_a_missing_server_is_a_warning_told_once_and_no_failed_window(
    location: Location, changelog_url: str, nobody: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write(changelog_url, MORNING[0], 3)
    assert location.run(*MORNING, flight=Flight(url=nobody)).success
    assert set(location.lake.published()) == set(MORNING)
    assert location.checks(READBACK) == {window.key: ("FAILED", True) for window in MORNING}
    for result in _results(location).values():
        assert result.severity is dg.AssetCheckSeverity.WARN
        assert "No Flight server answers" in (result.description or "")
    for name in set(checks.NAMES) - {READBACK}:
        assert location.checks(name) == {window.key: ("SUCCEEDED", True) for window in MORNING}
    (warning,) = _warnings(capfd)
    assert "No Flight server answers" in warning


def test_a_server_that_never_answers_is_waited_for_once(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Window] = []
    real = readback._sent
    monkeypatch.setattr(readback, "_sent", lambda window, *rest: (waited.append(window), real(window, *rest))[1])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        assert location.run(*MORNING, flight=Flight(url=url, timeout_seconds=0.5)).success
    assert waited == []  # the first call of the run was the only one
    assert location.checks(READBACK) == {window.key: ("FAILED", True) for window in MORNING}


def test_a_server_that_goes_away_in_the_middle_of_a_run_is_not_asked_again(
    location: Location, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Window] = []

    def gone_after_one(window: Window, *rest: Any) -> Any:
        asked.append(window)
        if len(asked) == 1:
            return real(window, *rest)
        raise FlightUnavailable("The connection broke off.")

    real = readback._sent
    monkeypatch.setattr(readback, "_sent", gone_after_one)
    assert location.run(*MORNING, flight=Flight(url=serve())).success
    assert asked == MORNING[:2]
    first, *rest = (location.checks(READBACK)[window.key] for window in MORNING)
    assert (first, set(rest)) == (("SUCCEEDED", True), {("FAILED", True)})


def test_a_server_that_sends_other_events_fails_the_check_and_not_the_run(
    location: Location, changelog_url: str, serve: Serve, tmp_path: Path
) -> None:
    other = Lake(str(tmp_path / "other"))
    commit = publish(other, MORNING[0], 30)
    write(changelog_url, MORNING[0], 30)
    run = location.run(MORNING[0], flight=Flight(url=serve(FRAISEQL_LAKE_URI=other.uri)))
    assert run.success
    assert location.lake.published()[MORNING[0]].table_version == commit.table_version
    assert location.checks(READBACK) == {MORNING[0].key: ("FAILED", True)}
    result = _results(location)[MORNING[0].key]
    assert result.severity is dg.AssetCheckSeverity.ERROR
    shown = _shown(result)
    assert shown["sent rows"] == shown["accepted rows"] == 30
    assert shown["sent checksum"] != shown["stored checksum"]


def test_a_server_that_has_an_older_version_of_the_table_fails_the_check(
    location: Location, changelog_url: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(changelog_url, MORNING[0], 30)
    refresh = Client.refresh
    monkeypatch.setattr(Client, "refresh", lambda self: (refresh(self) or 0) - 1)
    assert location.run(MORNING[0], flight=Flight(url=serve())).success
    assert location.checks(READBACK) == {MORNING[0].key: ("FAILED", True)}
    shown = _shown(_results(location)[MORNING[0].key])
    assert shown["served table version"] == shown["table version"] - 1


def test_without_a_server_nothing_is_asked_and_the_check_says_so(
    location: Location, changelog_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write(changelog_url, MORNING[0], 3)
    assert location.run(*MORNING[:2], flight=Flight(url="")).success
    # Passed, not skipped: the health of an asset is unknown for as long as one of its checks was never evaluated.
    assert location.checks(READBACK) == {window.key: ("SUCCEEDED", True) for window in MORNING[:2]}
    assert all("No Flight server is configured" in (one.description or "") for one in _results(location).values())
    assert _warnings(capfd) == []


def test_windows_before_a_failed_one_are_read_back_too(location: Location, changelog_url: str, serve: Serve) -> None:
    write(changelog_url, MORNING[0], 10)
    write(changelog_url, MORNING[1], 100, broken=50)
    assert not location.run(*MORNING[:2], flight=Flight(url=serve())).success
    assert location.checks(READBACK)[MORNING[0].key] == ("SUCCEEDED", True)
    assert _shown(_results(location)[MORNING[0].key])["sent rows"] == 10


@pytest.mark.parametrize("url", ["http://flight:50051", "flight:50051", "grpc://user:hunter2@flight:50051"])
def test_a_url_that_is_none_of_a_flight_server_is_refused_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_URL", url)
    with pytest.raises(SettingsError, match="FRAISEQL_ARROW_FLIGHT_URL must be a URI like grpc://host:port") as refused:
        Settings.load()
    assert "hunter2" not in str(refused.value)
