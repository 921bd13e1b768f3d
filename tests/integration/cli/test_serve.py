"""``serve``: what it says when it starts, and what it writes into its log."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from fraiseql_pipeline.cli import flight
from fraiseql_pipeline.flight.log import log_to_stderr
from fraiseql_pipeline.flight.workers import Started
from fraiseql_pipeline.settings import Settings
from tests.integration.cli.conftest import Run


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
