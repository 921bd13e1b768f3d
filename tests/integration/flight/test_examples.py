from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import publish
from tests.support.events import lake_events

EXAMPLES = Path(__file__).parents[3] / "examples" / "python"


def test_the_python_example_reads_the_last_hours(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    now = datetime.now(UTC)
    windows = [Window.holding(now - timedelta(hours=hours), WindowSize.HOUR) for hours in (2, 1)]
    for window in windows:
        publish(lake, window, lake_events(window, 200))
    server = start_server(lake, start=windows[0].start)
    program = EXAMPLES / "flight_observer_client.py"
    options = ["--host", "127.0.0.1", "--port", str(server.port), "--entity-type", "*", "--hours", "48"]
    run = subprocess.run([sys.executable, str(program), *options], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "Received 400 events" in run.stdout
