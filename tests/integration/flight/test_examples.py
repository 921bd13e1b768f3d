from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import publish
from tests.support.certificates import Authority
from tests.support.events import lake_events

EXAMPLES = Path(__file__).parents[3] / "examples" / "python"


def count(server: FlightServer, *options: str) -> subprocess.CompletedProcess[str]:
    program = EXAMPLES / "flight_observer_client.py"
    chosen = ["--host", "127.0.0.1", "--port", str(server.port), "--entity-type", "*", "--hours", "48", *options]
    return subprocess.run([sys.executable, str(program), *chosen], capture_output=True, text=True, check=False, timeout=60)


def test_the_python_example_reads_the_last_hours(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    now = datetime.now(UTC)
    windows = [Window.holding(now - timedelta(hours=hours), WindowSize.HOUR) for hours in (2, 1)]
    for window in windows:
        publish(lake, window, lake_events(window, 200))
    run = count(start_server(lake, start=windows[0].start))
    assert run.returncode == 0, run.stderr
    assert "Received 400 events" in run.stdout


def test_the_python_example_reads_over_tls_with_a_token(
    lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path
) -> None:
    window = Window.holding(datetime.now(UTC) - timedelta(hours=1), WindowSize.HOUR)
    publish(lake, window, lake_events(window, 200))
    authority = Authority(tmp_path)
    pair, client = authority.issue("server"), authority.issue("client")
    token, line = new_token("reporting", None, ["read"])
    tokens, held = tmp_path / "tokens", tmp_path / "reporting.token"
    tokens.write_text(line, encoding="utf-8")
    held.write_text(f"{token}\n", encoding="utf-8")
    server = start_server(
        lake,
        start=window.start,
        arrow_flight_tls_cert=str(pair.cert),
        arrow_flight_tls_key=str(pair.key),
        arrow_flight_tls_client_ca=str(authority.ca),
        arrow_flight_tokens_file=str(tokens),
    )
    options = ("--ca", str(authority.ca), "--cert", str(client.cert), "--key", str(client.key))
    run = count(server, *options, "--token-file", str(held))
    assert run.returncode == 0, run.stderr
    assert "Received 200 events" in run.stdout
    refused = count(server, *options)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "not authenticated" in refused.stderr
