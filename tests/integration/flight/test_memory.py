"""Memory: what a server needs does not grow with what it sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import flight

from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import lake_events
from tests.support.servers import Start, processes
from tests.support.waiting import eventually

ROWS = 150_000
WINDOWS = 6


@pytest.fixture
def start(lake: Lake, tmp_path: Path) -> Iterator[Start]:
    with processes(lake.uri, MIDNIGHT, tmp_path) as start:
        yield start


def private_mib(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def open_frames(pid: int) -> int:
    """Files of kept frames that a process has open; the lock of their directory is none."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:  # just closed
            continue
        found += "fraiseql-frames-" in target and not target.endswith("/lock")
    return found


class Peak:
    """The most private memory, in MiB, that a process had while the block ran."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.mib = 0.0

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.mib = max(self.mib, private_mib(self._pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.slow
def test_streams_that_are_abandoned_give_their_memory_back(lake: Lake, start: Start) -> None:
    publish(lake, hour(0), lake_events(hour(0), ROWS))
    ticket = flight.Ticket(f"events:*:{hour(0).start.isoformat()}:{hour(0).end.isoformat()}:1000".encode())
    server, url, _ = start()

    def abandon(streams: int) -> float:
        """Private memory when so many streams were begun, and left in the middle."""
        for _ in range(streams):
            with flight.connect(url) as client:
                client.do_get(ticket).read_chunk()  # the connection ends with the block, not the stream
        eventually(lambda: not open_frames(server.pid), 5)  # files of streams that nobody reads
        return private_mib(server.pid)

    first = abandon(20)
    assert abandon(60) <= first + 30, "of 60 streams, each of which may hold some frames of 0.5 MB"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_first_read_of_many_windows_needs_no_more_memory_than_one_of_a_few(lake: Lake, start: Start, codec: str) -> None:
    for number in range(WINDOWS):
        publish(lake, hour(number), lake_events(hour(number), ROWS))
    server, url, _ = start()
    with flight.connect(url) as client:

        def read(first: int, last: int) -> float:
            ticket = f'{{"type": "events", "entity_type": "*", "codec": "{codec}", "start": "{hour(first).start.isoformat()}", "end": "{hour(last).end.isoformat()}"}}'
            with Peak(server.pid) as peak:
                rows = sum(c.data.num_rows for c in client.do_get(flight.Ticket(ticket)) if c.data is not None)
            assert rows == ROWS * (last - first + 1)
            return peak.mib

        few = read(0, 1)
        many = read(2, WINDOWS - 1)
        again = read(0, WINDOWS - 1)
    print(
        f"private memory at its peak, MiB: {few:.0f} for 2 windows, {many:.0f} for {WINDOWS - 2}, {again:.0f} for all from the store"
    )
    assert many <= 1.25 * few
    assert again <= 1.25 * few
    assert few <= 400
