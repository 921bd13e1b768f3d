"""``bench live``: how soon an event that was committed is readable over Flight, and what events cost a server that are not published yet.

What lives here: the cases, their figures and budgets. What must not: the server (``servers.py``), how a report looks
(``report.py``).

How a number is made: the events of a log of which nothing is published are read through and served; private memory is compared with
that of a server that does not follow. Then one reader follows, and events are committed one at a time; a time is that from the
return of the commit to the batch in the reader's hands, on the clock of this process. Beside it, in the second case, another
session commits 100 events every 50 ms.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psycopg
import pyarrow as pa
from pyarrow import flight

from fraiseql_pipeline.benchmark.readers import first_batch_ms, list_flights, read
from fraiseql_pipeline.benchmark.report import Ratio, Report, Result, Told
from fraiseql_pipeline.benchmark.servers import Server, server
from fraiseql_pipeline.errors import PipelineError

#: Commits per case: the 99th percentile is that of the fifth slowest.
_COMMITS = 500
_PAUSE_SECONDS = 0.01
_FIRST_BATCHES = 50
_PATIENCE_SECONDS = 60.0

_INSERT = (
    "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, object_data)"
    " SELECT 'Order', 'UPDATE', gen_random_uuid(), '{\"status\": \"paid\"}' FROM generate_series(1, %s) RETURNING pk_entity_change_log"
)


def live(database_url: str, lake_uri: str, rows: int, *, tell: Told = lambda _: None) -> Report:
    """``rows`` events of the last day in the log, an empty lake. Raises ``PipelineError`` when the server does not start or lags for ever."""
    with server("ours", lake_uri, database_url=database_url, follows=False) as running:
        list_flights(running)
        before = running.memory_mib()
    with server("ours", lake_uri, database_url=database_url) as running:
        ticket = _ticket(start="now-2d", profile="compact", codec="zstd")
        _until_followed(running)
        tell(f"reading {rows:,} events through")
        through = read(running, ticket)
        after = running.memory_mib()
        warm = read(running, ticket)
        firsts = sorted(first_batch_ms(running, ticket) for _ in range(_FIRST_BATCHES))
        results = [
            Result("read through", "rate", "events/s", through.rate, through.rate, through.rate),
            Result("read again", "rate", "events/s", warm.rate, warm.rate, warm.rate),
            Result("read again", "first_batch_p50", "ms", firsts[len(firsts) // 2], firsts[0], firsts[-1]),
        ]
        held = None if before is None or after is None else after - before
        results.append(Result("events that are not published", "memory", "MiB", held, held, held))
        slowest = {}
        with psycopg.connect(database_url, autocommit=True) as connection:
            for case, busy in (("one commit at a time", False), ("beside 2,000 events/s", True)):
                tell(case)
                times = _latencies(running, connection, database_url, busy=busy)
                slowest[case] = times[len(times) * 99 // 100]
                middle = times[len(times) // 2]
                results.append(Result(case, "committed_to_follower_p50", "ms", middle, times[0], times[-1]))
                results.append(Result(case, "committed_to_follower_p99", "ms", slowest[case], times[0], times[-1]))
    ratios = (
        Ratio("committed to follower in ms, p99", slowest["one commit at a time"], 250, at_most=True),
        Ratio("committed to follower in ms, p99, beside 2,000 events/s", slowest["beside 2,000 events/s"], 250, at_most=True),
        Ratio(f"memory in MiB for {rows:,} events that are not published", held, 100, at_most=True),
        Ratio("first batch of a read up to now in ms, median", firsts[len(firsts) // 2], 5, at_most=True),
    )
    return Report("live", through.rows, tuple(results), ratios)


def _latencies(running: Server, connection: psycopg.Connection[Any], database_url: str, *, busy: bool) -> list[float]:
    """Milliseconds of each commit, rising."""
    committed: dict[int, float] = {}
    arrived: dict[int, float] = {}
    with _following(running, arrived), _writing(database_url) if busy else nullcontext():
        for _ in range(_COMMITS):
            (pk,) = connection.execute(_INSERT, [1]).fetchone() or (0,)
            committed[pk] = time.perf_counter()
            time.sleep(_PAUSE_SECONDS)
        end = time.monotonic() + _PATIENCE_SECONDS
        while not committed.keys() <= arrived.keys():
            if time.monotonic() > end:
                raise PipelineError(
                    f"The benchmark's server did not send {len(committed.keys() - arrived.keys())} committed events."
                )
            time.sleep(_PAUSE_SECONDS)
    return sorted((arrived[pk] - at) * 1000 for pk, at in committed.items())


@contextmanager
def _following(running: Server, arrived: dict[int, float]) -> Iterator[None]:
    with flight.connect(running.url) as client:
        reader = client.do_get(flight.Ticket(_ticket(start="now", follow=True, columns=["pk", "timestamp"])))
        reader.read_chunk()  # the past, of which there is nothing: from here on it follows

        def follow() -> None:
            try:
                for chunk in reader:
                    at = time.perf_counter()
                    arrived.update(dict.fromkeys(chunk.data["pk"].to_pylist(), at))
            except flight.FlightError:
                pass  # it was cancelled

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        yield
        reader.cancel()
        thread.join()


@contextmanager
def _writing(database_url: str) -> Iterator[None]:
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            while not stop.wait(0.05):
                connection.execute(_INSERT, [100])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _until_followed(running: Server) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    descriptor = flight.FlightDescriptor.for_command(_ticket(start="now-1m"))
    with flight.connect(running.url) as client:
        while True:
            try:
                client.get_flight_info(descriptor)
            except (flight.FlightError, pa.ArrowException):  # nothing is published, and the log not followed yet
                if time.monotonic() > end:
                    raise PipelineError("The benchmark's server does not follow the change log.") from None
                time.sleep(0.1)
            else:
                return


def _ticket(**asked: object) -> bytes:
    return json.dumps({"type": "events", "entity_type": "*", "end": "now", **asked}).encode()
