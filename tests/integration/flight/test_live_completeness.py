"""Reads up to now and a stream that goes on, while writers write and windows are published: every settled event, once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from fraiseql_pipeline import connect
from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import as_utc
from tests.support.clock import FastClock, publish_ended
from tests.support.following import HOUR, Follower
from tests.support.reading import execute
from tests.support.waiting import eventually
from tests.support.writers import Writers


@pytest.mark.timeout(0)
def test_every_read_up_to_now_holds_every_settled_event_once(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], run_seconds: float
) -> None:
    clock = FastClock(changelog_url, run_seconds)
    start = clock._base - 24 * HOUR
    settings = Settings(database_url=changelog_url, lake_uri=lake.uri, start=start, seal_timeout_seconds=0, max_rejected_share=1)
    server = start_server(lake, database_url=changelog_url, start=start)
    log = ChangeLog(changelog_url, settings)
    reads: list[tuple[int, Counter[int]]] = []
    with connect(server.url) as client:
        service = server._service.live
        assert service is not None
        eventually(lambda: service.up)
        one = Follower(client, start=start)
        with Writers(changelog_url, sessions=8) as writers:
            until = time.monotonic() + run_seconds
            published = threading.Thread(target=lambda: _publish_until(until, clock, settings, log, lake))
            published.start()
            while time.monotonic() < until:
                with client.stream(start=start, columns=["pk"]) as stream:
                    found = Counter(stream.read_all()["pk"].to_pylist())
                assert stream.receipt is not None
                assert stream.receipt.settled_pk is not None
                reads.append((stream.receipt.settled_pk, found))
                writers.run_for(0.05)
            published.join()
        sound = {
            pk: as_utc(at)
            for pk, at in execute(
                changelog_url, "SELECT pk_entity_change_log, created_at FROM core.tb_entity_change_log WHERE object_id IS NOT NULL"
            )
        }
        newest = max(sound)
        eventually(lambda: service.buffer.settled_pk >= newest)
        eventually(lambda: len(one.keys) >= len(sound))
        one.stream.close()
        one.ended()
    log.close()
    assert len(reads) > 3
    for settled_pk, found in reads:
        assert found == Counter(pk for pk, at in sound.items() if pk <= settled_pk and at >= start)
    assert Counter(one.keys) == Counter(sound.keys())
    assert lake.published(), "windows were published meanwhile"


def _publish_until(until: float, clock: FastClock, settings: Settings, log: ChangeLog, lake: Lake) -> None:
    while time.monotonic() < until:
        publish_ended(clock, settings, log, lake)
