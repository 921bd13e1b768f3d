"""A server that follows a change log, everything a test does to the two, and clients that follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from fraiseql_pipeline import connect, pipeline
from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.flight.client import Client, Stream
from fraiseql_pipeline.flight.live import Live
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.reading import insert
from tests.support.waiting import eventually

HOUR = timedelta(hours=1)
#: An hour that has ended, with the two before it.
LAST = Window.holding(datetime.now(UTC) - HOUR, WindowSize.HOUR).start
KEYS = ("pk", "timestamp", "event_id")


class Followed:
    """A server over a fresh lake that follows a change log, and everything a test does to the three."""

    def __init__(self, url: str, settings: Settings, lake: Lake, server: FlightServer, client: Client, log: ChangeLog) -> None:
        self.url, self.settings, self.lake, self.server, self.client, self.log = url, settings, lake, server, client, log

    @property
    def service(self) -> Live:
        """What follows the log in the server."""
        found = self.server._service.live
        assert found is not None
        return found

    def write(self, at: datetime, rows: int = 1, **values: Any) -> list[int]:
        return [insert(self.url, created_at=at + n * timedelta(milliseconds=1), **values) for n in range(rows)]

    def materialize(self, *windows: datetime) -> None:
        chosen = [Window(start, WindowSize.HOUR) for start in windows]
        pipeline.materialize(chosen, settings=self.settings, changelog=self.log, lake=self.lake)

    def reaches(self, pk: int) -> None:
        """Wait until the server serves the events up to a key."""
        live = self.service
        eventually(lambda: live.up and live.buffer.settled_pk >= pk)

    def keys(self, start: datetime | str = LAST - 3 * HOUR, **asked: Any) -> list[int]:
        return self.client.read(start=start, columns=KEYS, **asked)["pk"].to_pylist()


@contextmanager
def followed(
    url: str, lake: Lake, start_server: Callable[..., FlightServer], token: str | None = None, **chosen: Any
) -> Iterator[Followed]:
    """A server that follows the log, once it does; ``token``: of its client."""
    settings = Settings(database_url=url, lake_uri=lake.uri, start=LAST - 48 * HOUR, seal_timeout_seconds=0)
    server = start_server(lake, **{"database_url": url, "start": settings.start, **chosen})
    log = ChangeLog(url, settings)
    try:
        with connect(server.url, token=token) as client:
            made = Followed(url, settings, lake, server, client, log)
            made.reaches(0)
            yield made
    finally:
        log.close()


class Follower:
    """Reads a stream that goes on, on a thread."""

    def __init__(self, client: Client, **asked: Any) -> None:
        self.stream: Stream = client.stream(**{"start": "now", "columns": KEYS, "follow": True, **asked})
        self.batches: list[pa.RecordBatch] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def keys(self) -> list[int]:
        return [pk for batch in self.batches for pk in batch["pk"].to_pylist()]

    def _read(self) -> None:
        try:
            self.batches.extend(self.stream)
        except Exception as error:
            self.error = error

    def ended(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
