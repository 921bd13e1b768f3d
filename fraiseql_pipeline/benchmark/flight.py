"""``bench flight``: our server against what one would use without it, on the same events, read by the same stock client.

What lives here: the cases of the Flight benchmark, their figures and budgets. What must not: the servers (``servers.py``), the
readers (``readers.py``), how a report looks (``report.py``).

How a number is made: every round starts our server anew, so that its first read is cold; then each encoding is read from ours (cold,
warm) and from the reference, one behind the other, so that a slow minute of the machine hits both. Ratios are medians of the ratios
pair by pair. The reader is this process; many readers at once are processes of their own.

Memory is private memory (``RssAnon``) of a server that has only answered a list, of one that keeps all events in one encoding, and of one
that keeps them in all six; the budget is about what the events add. The kept frames are on disk; what the system caches of them is not
counted, it gives that up for anybody.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from fraiseql_pipeline.benchmark.readers import Read, crowd, first_batch_ms, list_flights, read, read_lines, read_sql
from fraiseql_pipeline.benchmark.report import Ratio, Report, Result, Told
from fraiseql_pipeline.benchmark.servers import NotThere, Server, roapi, server
from fraiseql_pipeline.encoding import ENCODINGS, Encoding
from fraiseql_pipeline.event_json import events_to_json
from fraiseql_pipeline.flight.frames import FrameStore
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.stream import FrameStreams, Sent
from fraiseql_pipeline.flight.view import View
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import WindowSize

_FIRST_BATCHES = 100
#: Warm reads per encoding and round, each beside one of the reference.
_PAIRS = 3
#: Of the first batches that one more reader gets while many others read.
_NEWCOMERS = 30
#: How long many readers read at least: two hundred streams of a second's worth of readers get their turns in it.
_CROWD_SECONDS = 3.0
#: The encoding of the cases that are about something else.
_USUAL = "compact+zstd"
#: What a stream is encoded in where nobody says it.
_DEFAULT = str(Settings.model_fields["arrow_flight_encoding"].default)
#: And of many readers, who share this machine's processors with the server: the one they spend least on. The server takes 33 to 38 ns of
#: CPU per event for 1 to 64 readers, a quarter of a core; with zstd, what they decompress is what is measured (6.6 to 7.9M events/s in all).
_CROWDED = "compact+lz4"

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
    skipped: dict[str, str] = {}
    rows = 0
    with server("reference", lake_uri) as reference:
        for name in ENCODINGS:
            read(reference, name.encode())  # converts the table
        for number in range(rounds):
            said = f"round {number + 1} of {rounds}: "
            with server("ours", lake_uri) as ours:
                for name in ENCODINGS:
                    tell(said + name)
                    rows = _encoding(figures, ours, reference, name, _ticket(start, end, name))
                _first_batches(figures, ours, _ticket(start, end, _USUAL))
                for count in readers:
                    tell(f"{said}{count} readers")
                    _crowd(figures, ours, _ticket(start, end, _CROWDED), count, newcomers=count == readers[-1])
                tell(f"{said}TLS")
                _tls(figures, ours, lake_uri, _ticket(start, end, _USUAL))
    for case, measure in (("JSON lines over HTTP", _lines), ("ROAPI, Flight SQL", _roapi)):
        tell(case)
        try:
            measure(figures, case, lake_uri, rounds)
        except NotThere as why:
            skipped[case] = str(why)
    tell("memory")
    _memory(figures, lake_uri, start, end)
    tell("bytes per event")
    for name, size in _bytes_per_event(lake_uri, start, end).items():
        figures[name, "bytes_per_event"].append(size)
        for rate in list(figures.get((f"warm {name}", "rate"), ())):
            figures[f"warm {name}", "bytes_rate"].append(rate * size / 1e6)
    return Report("flight", rows, (*_results(figures), *_skipped(skipped)), tuple(_ratios(figures, readers)))


# ------------------------------------------------------------------------------------------------------------------- cases


def _encoding(figures: _Figures, ours: Server, reference: Server, name: str, ticket: bytes) -> int:
    found = read(ours, ticket)
    _note(figures, f"cold {name}", found)
    for _ in range(_PAIRS):
        _note(figures, f"warm {name}", read(ours, ticket))
        _note(figures, f"reference {name}", read(reference, name.encode()))
    return found.rows


def _first_batches(figures: _Figures, ours: Server, ticket: bytes) -> None:
    firsts = sorted(first_batch_ms(ours, ticket) for _ in range(_FIRST_BATCHES))
    figures["warm", "first_batch_p50"].append(firsts[len(firsts) // 2])
    figures["warm", "first_batch_p99"].append(firsts[len(firsts) * 99 // 100])


def _crowd(figures: _Figures, ours: Server, ticket: bytes, count: int, *, newcomers: bool) -> None:
    with crowd(ours, ticket, count) as found:
        end = time.monotonic() + _CROWD_SECONDS
        if newcomers:
            firsts = sorted(first_batch_ms(ours, ticket, newcomer=True) for _ in range(_NEWCOMERS))
            case = f"one more beside {count} readers"
            figures[case, "first_batch_p50"].append(firsts[len(firsts) // 2])
            figures[case, "first_batch_p99"].append(firsts[len(firsts) * 99 // 100])
        time.sleep(max(0.0, end - time.monotonic()))
    figures[f"{count} readers", "rate"].append(found.rate)
    figures[f"{count} readers", "fairness"].append(found.fairness)


def _tls(figures: _Figures, plain: Server, lake_uri: str, ticket: bytes) -> None:
    with server("ours", lake_uri, tls=True) as secured:
        read(secured, ticket)
        for _ in range(_PAIRS):
            _note(figures, f"without TLS {_USUAL}", read(plain, ticket))
            _note(figures, f"with TLS {_USUAL}", read(secured, ticket))


def _lines(figures: _Figures, case: str, lake_uri: str, rounds: int) -> None:
    with server("json", lake_uri) as running:
        for _ in range(rounds):
            _note(figures, case, read_lines(running))


def _roapi(figures: _Figures, case: str, lake_uri: str, rounds: int) -> None:
    if "://" in lake_uri:
        raise NotThere("the lake is not on this machine")
    with roapi(lake_uri) as running:
        for _ in range(rounds):
            _note(figures, case, read_sql(running))


def _memory(figures: _Figures, lake_uri: str, start: datetime, end: datetime) -> None:
    def note(kept: str) -> None:
        if (memory := ours.memory_mib()) is not None:
            figures[f"server {kept}", "memory"].append(memory)

    with server("ours", lake_uri) as ours:
        list_flights(ours)
        note("before the first read")
        for _ in range(2):
            read(ours, _ticket(start, end, _USUAL))
        note(f"with {_USUAL} kept")
        for name in (*ENCODINGS, *ENCODINGS):
            read(ours, _ticket(start, end, name))
        note("with all encodings kept")


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


def _ticket(start: datetime, end: datetime, name: str) -> bytes:
    encoding = Encoding.parse(name)
    return Ticket(start=start, end=end, profile=encoding.profile, codec=encoding.codec).text.encode()


def _note(figures: _Figures, case: str, found: Read) -> None:
    figures[case, "rate"].append(found.rate)
    figures[case, "first_batch"].append(found.first_ms)


# ----------------------------------------------------------------------------------------------------------------- report

_UNITS = {
    "rate": "events/s",
    "bytes_rate": "MB/s",
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


def _skipped(skipped: dict[str, str]) -> Iterator[Result]:
    for case, why in skipped.items():
        yield Result(case, "rate", _UNITS["rate"], skipped=why)


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
    yield Ratio(f"events/s of one warm stream in {_USUAL}", _median(figures, f"warm {_USUAL}", "rate"), 8_000_000)
    yield Ratio(f"bytes per event, event JSON / {_USUAL}", over("bytes_per_event", "event JSON", _USUAL), 10)
    yield Ratio("first batch in ms, warm, median", _median(figures, "warm", "first_batch_p50"), 5, at_most=True)
    cold = {name: _median(figures, f"cold {name}", "first_batch") for name in ENCODINGS}
    yield Ratio(f"first batch in ms, cold, {_DEFAULT}", cold[_DEFAULT], 25, at_most=True)
    # The first of a round is the first that its server sends at all, so it is always among the slowest.
    measured = [figure for figure in cold.values() if figure is not None]
    yield Ratio("first batch in ms, cold, slowest of all encodings", max(measured, default=None), 25, at_most=True)
    for kept in (f"with {_USUAL} kept", "with all encodings kept"):
        idle, full = (_median(figures, f"server {state}", "memory") for state in ("before the first read", kept))
        added = full - idle if idle is not None and full is not None else None
        yield Ratio(f"private memory in MiB that all events add, {kept}", added, 100, at_most=True)
    totals = [figure for count in readers if (figure := _median(figures, f"{count} readers", "rate")) is not None]
    if len(totals) > 1:
        yield Ratio(f"events/s in all, {readers[-1]} readers / best", totals[-1] / max(totals), 0.85)


def _median(figures: _Figures, case: str, metric: str) -> float | None:
    values = figures.get((case, metric))
    return statistics.median(values) if values else None
