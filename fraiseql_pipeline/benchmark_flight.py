"""``bench flight``: our server against a ``pyarrow.flight`` server that has the same events in memory, read by the same stock client.

What lives here: the cases of the Flight benchmark and the two servers, each in a process of its own. What must not: how a report looks and
what a budget is (``benchmark.py``).

How a number is made: every round starts our server anew, so that its first read is cold; then each encoding is read from ours (cold,
warm) and from the reference, one behind the other, so that a slow minute of the machine hits both. Ratios are medians of the ratios
round by round. The reader is this process: stock ``pyarrow.flight``, batches counted and dropped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight, ipc

from fraiseql_pipeline.benchmark import Ratio, Report, Result, Told
from fraiseql_pipeline.encoding import CODECS, ENCODINGS, Encoding, to_wire, wire_schema
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.event_json import events_to_json
from fraiseql_pipeline.flight.frames import FrameStore
from fraiseql_pipeline.flight.plan import View, plan
from fraiseql_pipeline.flight.stream import FrameStreams, Sent
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import WindowSize

#: Rows per batch of the reference: measured over 4,096 to 65,536, no codec is faster at another.
_REFERENCE_ROWS = 16_384
_FIRST_BATCHES = 100
#: Share of the events that each of many readers reads.
_READERS_SHARE = 8

_Figures = dict[tuple[str, str], list[float]]


def flight_server(
    lake_uri: str,
    start: datetime,
    end: datetime,
    *,
    rounds: int = 3,
    readers: tuple[int, ...] = (1, 4, 16, 64),
    tell: Told = lambda _: None,
) -> Report:
    """Streams of the events of [start, end) of a lake. Raises ``PipelineError`` when a server does not start."""
    figures: _Figures = defaultdict(list)
    rows = 0
    with _server("reference", lake_uri) as (reference, _):
        for name in ENCODINGS:
            _read(reference, name.encode())  # converts the table
        for number in range(rounds):
            with _server("ours", lake_uri) as (ours, pid):
                for name in ENCODINGS:
                    tell(f"round {number + 1} of {rounds}: {name}")
                    ticket = _ticket(start, end, name)
                    for case in ("cold", "warm", "reference"):
                        rows, rate, first = _read(*((reference, name.encode()) if case == "reference" else (ours, ticket)))
                        figures[f"{case} {name}", "rate"].append(rate)
                        figures[f"{case} {name}", "first_batch"].append(first)
                ticket = _ticket(start, end, "compact+zstd")
                firsts = sorted(_first_batch(ours, ticket) for _ in range(_FIRST_BATCHES))
                figures["warm", "first_batch_p50"].append(firsts[_FIRST_BATCHES // 2])
                figures["warm", "first_batch_p99"].append(firsts[_FIRST_BATCHES * 99 // 100])
                if (memory := _memory_mib(pid)) is not None:
                    figures["server", "memory"].append(memory)
                part = _ticket(start, start + (end - start) / _READERS_SHARE, "compact+zstd")
                for count in readers:
                    tell(f"round {number + 1} of {rounds}: {count} readers")
                    total, fairness = _together(ours, part, count)
                    figures[f"{count} readers", "rate"].append(total)
                    figures[f"{count} readers", "fairness"].append(fairness)
    tell("bytes per event")
    sizes = _bytes_per_event(lake_uri, start, end)
    for name, size in sizes.items():
        figures[name, "bytes_per_event"].append(size)
    return Report("flight", rows, tuple(_results(figures)), tuple(_ratios(figures, readers)))


_UNITS = {
    "rate": "events/s",
    "first_batch": "ms",
    "first_batch_p50": "ms",
    "first_batch_p99": "ms",
    "memory": "MiB",
    "fairness": "slowest/fastest",
    "bytes_per_event": "B",
}


def _results(figures: _Figures) -> Iterator[Result]:
    for (case, metric), values in figures.items():
        yield Result(case, metric, _UNITS[metric], statistics.median(values), min(values), max(values))


def _ratios(figures: _Figures, readers: tuple[int, ...]) -> Iterator[Ratio]:
    def over(metric: str, one: str, other: str) -> float | None:
        pairs = list(zip(figures.get((one, metric), ()), figures.get((other, metric), ()), strict=False))
        return statistics.median([a / b for a, b in pairs]) if pairs else None

    for name in ("plain+zstd", "compact+lz4", "compact+zstd"):
        yield Ratio(
            f"events/s of one warm stream in {name}, ours / pyarrow.flight from memory",
            over("rate", f"warm {name}", f"reference {name}"),
            2.2,
        )
    yield Ratio("bytes per event, event JSON / compact+zstd", over("bytes_per_event", "event JSON", "compact+zstd"), 10)
    yield Ratio("first batch in ms, warm, median", _median(figures, "warm", "first_batch_p50"), 5, at_most=True)
    yield Ratio("first batch in ms, cold, compact+zstd", _median(figures, "cold compact+zstd", "first_batch"), 25, at_most=True)
    yield Ratio("memory of the server in MiB, all events kept", _median(figures, "server", "memory"), 100, at_most=True)
    totals = [figure for count in readers if (figure := _median(figures, f"{count} readers", "rate")) is not None]
    if len(totals) > 1:
        yield Ratio(f"events/s in all, {readers[-1]} readers / best", totals[-1] / max(totals), 0.85)


def _median(figures: _Figures, case: str, metric: str) -> float | None:
    values = figures.get((case, metric))
    return statistics.median(values) if values else None


# ------------------------------------------------------------------------------------------------------------------ reading


def _ticket(start: datetime, end: datetime, name: str) -> bytes:
    encoding = Encoding.parse(name)
    return Ticket(start=start, end=end, profile=encoding.profile, codec=encoding.codec).text.encode()


def _read(url: str, ticket: bytes) -> tuple[int, float, float]:
    """Events, events per second, and milliseconds to the first batch."""
    with flight.connect(url) as client:
        began = time.perf_counter()
        rows, first = 0, 0.0
        for chunk in client.do_get(flight.Ticket(ticket)):
            if chunk.data is not None:
                first = first or time.perf_counter() - began
                rows += chunk.data.num_rows
        return rows, rows / (time.perf_counter() - began), first * 1000


def _first_batch(url: str, ticket: bytes) -> float:
    with flight.connect(url) as client:
        list(client.list_flights())  # the connection is made
        began = time.perf_counter()
        reader = client.do_get(flight.Ticket(ticket))
        reader.read_chunk()
        elapsed = time.perf_counter() - began
        reader.cancel()
        return elapsed * 1000


def _together(url: str, ticket: bytes, count: int) -> tuple[float, float]:
    """Events per second of all readers, and the rate of the slowest over that of the fastest."""
    ready = threading.Barrier(count)

    def read(_: int) -> tuple[int, float, float, float]:
        ready.wait()
        began = time.perf_counter()
        rows, rate, _first = _read(url, ticket)
        return rows, rate, began, time.perf_counter()

    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(read, range(count)))
    elapsed = max(end for *_, end in done) - min(began for _, _, began, _ in done)
    rates = [rate for _, rate, _, _ in done]
    return sum(rows for rows, *_ in done) / elapsed, min(rates) / max(rates)


def _memory_mib(pid: int) -> float | None:
    """Private memory of a process; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
    except (OSError, StopIteration):
        return None


def _bytes_per_event(lake_uri: str, start: datetime, end: datetime) -> dict[str, float]:
    """What one event takes on the wire, by encoding, and as event JSON."""
    lake = Lake(lake_uri)
    view = View(lake.snapshot())
    sizes = {}
    with FrameStore(0) as store:
        for name in ENCODINGS:
            sent = Sent(lambda _: None)
            decided = plan(Ticket(start=start, end=end), view, first=start, size=WindowSize.HOUR, encoding=Encoding.parse(name))
            total = sum(map(len, FrameStreams(store).messages(decided, 10_000, sent)))
            sizes[name] = total / max(sent.rows, 1)
    rows = total = 0
    for batch in lake.read(start, end):
        total += len(events_to_json(batch, compact=True))
        rows += batch.num_rows
    return sizes | {"event JSON": total / max(rows, 1)}


# ------------------------------------------------------------------------------------------------------------------ servers


@contextmanager
def _server(kind: str, lake_uri: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its URL and the process. It ends with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fraiseql_pipeline.benchmark_flight", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(json.dumps({"lake": lake_uri}) + "\n")
        process.stdin.flush()
        port = process.stdout.readline().strip()
        if not port:
            raise PipelineError(f"The server {kind!r} of the benchmark did not start; its message is above.")
        try:
            yield f"grpc://127.0.0.1:{port}", process.pid
        finally:
            process.stdin.close()
            process.wait()


def _serve_ours(lake_uri: str) -> Callable[[], object]:
    from fraiseql_pipeline.flight.server import serve

    extent = View(Lake(lake_uri).snapshot()).extent
    server = serve(Settings(lake_uri=lake_uri, start=extent[0], arrow_flight_bind="127.0.0.1:0"))
    _tell(server.port)
    return lambda: server.stop(0)


def _serve_reference(lake_uri: str) -> Callable[[], object]:
    extent = View(Lake(lake_uri).snapshot()).extent
    batches = list(Lake(lake_uri).read(extent[0], extent[1] + timedelta(hours=1), columns=WIRE_SCHEMA.names))
    tables: dict[str, pa.Table] = {}

    class Reference(flight.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: object, ticket: flight.Ticket) -> flight.RecordBatchStream:
            del context
            encoding = Encoding.parse(ticket.ticket.decode())
            if encoding.profile not in tables:
                schema = wire_schema((), encoding.profile)
                table = pa.Table.from_batches([to_wire(batch, schema) for batch in batches], schema).unify_dictionaries()
                tables[encoding.profile] = pa.Table.from_batches(table.combine_chunks().to_batches(_REFERENCE_ROWS))
            compression = CODECS[encoding.codec].compression
            return flight.RecordBatchStream(tables[encoding.profile], options=ipc.IpcWriteOptions(compression=compression))

    server = Reference("grpc://127.0.0.1:0")
    _tell(server.port)
    return server.shutdown


def _tell(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def _serve(kind: str) -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    stop = {"ours": _serve_ours, "reference": _serve_reference}[kind](asked["lake"])
    sys.stdin.read()
    stop()


if __name__ == "__main__":
    _serve(sys.argv[1])
