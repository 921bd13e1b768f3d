"""Memory: what a server needs does not grow with what it sends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pyarrow import flight

from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import lake_events

ROWS = 150_000
WINDOWS = 6
PROGRAM = """
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.settings import Settings
with serve(Settings()) as server:
    print(server.port, flush=True)
    server.run_until_signal()
"""


class Peak:
    """The most private memory, in MiB, that a process had while the block ran."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mib = 0.0

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            line = next(line for line in self._status.read_text().splitlines() if line.startswith("RssAnon"))
            self.mib = max(self.mib, int(line.split()[1]) / 1024)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_first_read_of_many_windows_needs_no_more_memory_than_one_of_a_few(tmp_path: Path, codec: str) -> None:
    lake = Lake(str(tmp_path / "lake"))
    for number in range(WINDOWS):
        publish(lake, hour(number), lake_events(hour(number), ROWS))
    environment = os.environ | {
        "FRAISEQL_LAKE_URI": lake.uri,
        "FRAISEQL_START": MIDNIGHT.isoformat(),
        "FRAISEQL_ARROW_FLIGHT_BIND": "127.0.0.1:0",
        "FRAISEQL_ARROW_FLIGHT_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with flight.connect(f"grpc://127.0.0.1:{int(server.stdout.readline())}") as client:

                def read(first: int, last: int) -> float:
                    ticket = f'{{"type": "events", "entity_type": "*", "codec": "{codec}", "start": "{hour(first).start.isoformat()}", "end": "{hour(last).end.isoformat()}"}}'
                    with Peak(server.pid) as peak:
                        rows = sum(c.data.num_rows for c in client.do_get(flight.Ticket(ticket)) if c.data is not None)
                    assert rows == ROWS * (last - first + 1)
                    return peak.mib

                few = read(0, 1)
                many = read(2, WINDOWS - 1)
                again = read(0, WINDOWS - 1)
        finally:
            server.kill()
    print(
        f"private memory at its peak, MiB: {few:.0f} for 2 windows, {many:.0f} for {WINDOWS - 2}, {again:.0f} for all from the store"
    )
    assert many <= 1.25 * few
    assert again <= 1.25 * few
    assert few <= 400
