from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Commit, Facts, Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events
from tests.support.following import Followed, followed

MIDNIGHT = datetime(2026, 11, 1, tzinfo=UTC)


def hour(number: int) -> Window:
    """The windows of these tests: hours counted from 2026-11-01 00:00."""
    return Window(MIDNIGHT + timedelta(hours=number), WindowSize.HOUR)


def publish(lake: Lake, window: Window, events: pa.Table, *, state: str = "sealed") -> Commit:
    with lake.stage(window) as staged:
        for batch in events.to_batches():
            staged.write(batch)
        facts = Facts(
            settled_pk=2**62, state=state, identity="test", run_id="test", settled_at=window.end, source_rows=events.num_rows
        )
        return lake.commit(staged, facts, force=True, allow_shrink=True)


#: Events of a window that is more than the buffers between a server and a client that does not read can hold; a ticket for them.
ROWS = 200_000
EVERYTHING = "events:*:2026-11-01:2026-11-01T01:00:00:1000"
#: The same, uncompressed: far more than what gRPC buffers on a busy machine, where its windows grow.
HELD = json.dumps(
    {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T01:00:00", "batch_size": 1000, "codec": "none"}
)


@pytest.fixture(scope="session")
def lake_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with one large window, for tests that change nothing."""
    uri = str(tmp_path_factory.mktemp("large") / "lake")
    publish(Lake(uri), hour(0), lake_events(hour(0), ROWS))
    return uri


#: What no answer of a server may tell.
INSIDE = re.compile(
    rb"Traceback|File \"|\.py\b|site-packages|/(?:tmp|home|root)/|\.parquet|_delta_log|postgres(ql)?://|SELECT |Error\("
)


def nothing() -> pa.Table:
    return LAKE_SCHEMA.empty_table()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., FlightServer]]:
    """Start servers that stop with the test: ``start_server(lake, arrow_flight_…=…)``."""
    running: list[FlightServer] = []

    def start(lake: Lake, **chosen: object) -> FlightServer:
        settings = Settings(**{"arrow_flight_bind": "127.0.0.1:0", "lake_uri": str(tmp_path / "lake"), "start": MIDNIGHT, **chosen})
        running.append(serve(settings, lake=lake))
        return running[-1]

    yield start
    for server in running:
        server.stop(0)


@pytest.fixture
def live(changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]) -> Iterator[Followed]:
    with followed(changelog_url, lake, start_server) as made:
        yield made


@pytest.fixture(scope="module")
def events() -> dict[Window, pa.Table]:
    """What the shared lake holds: four hours, the third of them without events."""
    return {hour(n): lake_events(hour(n), rows) for n, rows in ((0, 3_000), (1, 2_000), (2, 0), (3, 1_000))}


@pytest.fixture(scope="module")
def server(events: dict[Window, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlightServer]:
    """One server over the shared lake, for tests that change nothing."""
    lake = Lake(str(tmp_path_factory.mktemp("shared") / "lake"))
    for window, table in events.items():
        publish(lake, window, table)
    with serve(Settings(arrow_flight_bind="127.0.0.1:0", start=MIDNIGHT), lake=lake) as running:
        yield running


@pytest.fixture
def client(server: FlightServer) -> Iterator[flight.FlightClient]:
    with flight.connect(server.url) as connected:
        yield connected
