"""Measurements shared by ``fraiseql-pipeline bench``, the asset checks and the docs.

What lives here: the cases, how they are run side by side, and the budgets their ratios are held against. What must not: a case that
only exists to look good. A reference is what a user would write without this package, on the same rows in the same run.

How a number is made: every case of a round runs in a fresh process, one after the other, and the rounds repeat, so that a slow minute
of the machine hits all cases alike. A process imports first, then measures; its peak memory is the operating system's own figure.
Medians are reported with minimum and maximum; only ratios are held against a budget.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one case over the rounds; ``skipped`` says why there is none."""

    case: str
    metric: str
    unit: str
    median: float | None = None
    min: float | None = None
    max: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of ours over a reference's, and whether it keeps its budget (``>=`` for speed, ``<=`` for memory and cost)."""

    name: str
    value: float | None
    budget: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.budget if self.at_most else self.value >= self.budget


@dataclass(frozen=True, slots=True)
class Report:
    """Of one benchmark; ``as_dict`` is what ``--json`` prints."""

    bench: str
    rows: int
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...]

    @property
    def met(self) -> bool:
        """Whether no measured ratio misses its budget."""
        return all(ratio.met is not False for ratio in self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": {
                "cpus": os.cpu_count(),
                "system": platform.system(),
                "arch": platform.machine(),
                "python": platform.python_version(),
            },
            "rows": self.rows,
            "results": [{k: v for k, v in asdict(result).items() if v is not None} for result in self.results],
            "ratios": [{"name": r.name, "value": r.value, "budget": r.budget, "met": r.met} for r in self.ratios],
        }


Told = Callable[[str], None]

#: What both Flight servers compress with: the fast one, so that it is the servers that are compared.
_CODEC = "lz4"


def materialize(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """One day of ``rows`` events: our materialize against what reads and what writes without us, and against the server itself."""
    cases = ("ours", "polars", "adbc", "copy")
    measured = _rounds(cases, {"url": database_url, "day": day.key}, rounds, tell)
    results = [
        result
        for case in cases
        for result in (_result(measured, case, "rate", "events/s"), _result(measured, case, "peak_memory", "MiB"))
        if not (case == "copy" and result.metric == "peak_memory")
    ]
    return Report(
        "materialize",
        rows,
        tuple(results),
        (
            Ratio("events/s, ours / polars read_database_uri(adbc) + write_delta", _over(measured, "ours", "polars"), 1.75),
            Ratio("events/s, ours / the server's own COPY", _over(measured, "ours", "copy"), 0.65),
            Ratio("peak memory of ours in MiB", _median(measured["ours"].get("peak_memory")), 400, at_most=True),
        ),
    )


def windows(
    database_url: str, day: Window, *, few: int = 10, many: int = 10_000, rounds: int = 3, tell: Told = lambda _: None
) -> Report:
    """Cost of one more window in a lake of ``few`` and of ``many`` windows; the windows are empty, so only the fixed cost is left.

    The two lakes are published once; every round works on links of their files, which nothing alters once they are written.
    """
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        standing = {"few": few, "many": many}
        for case, count in standing.items():
            tell(f"publishing {count:,} empty windows")
            _publish_empty(database_url, Path(directory) / case, day, count)
        arguments = {"url": database_url, "day": day.key, "lakes": directory, "standing": standing}
        measured = _rounds(standing, arguments, rounds, tell)
    cost = _over(measured, "many", "few", "seconds_per_window")
    return Report(
        "windows",
        many,
        (_result(measured, "few", "seconds_per_window", "s"), _result(measured, "many", "seconds_per_window", "s")),
        (Ratio(f"cost of a window, at {many:,} windows / at {few:,}", cost, 1.2, at_most=True),),
    )


def conversion(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """Event JSON of one day's events into the eight columns: ours against the standard library's ``json`` and pyarrow."""
    measured = _rounds(("json_ours", "json_plain"), {"url": database_url, "day": day.key}, rounds, tell)
    return Report(
        "convert",
        rows,
        (_result(measured, "json_ours", "rate", "events/s"), _result(measured, "json_plain", "rate", "events/s")),
        (
            Ratio("event JSON to Arrow in events/s", _median(measured["json_ours"].get("rate")), 1_000_000),
            Ratio("events/s, ours / json.loads + pyarrow", _over(measured, "json_ours", "json_plain"), 4),
        ),
    )


def flight_read(database_url: str, day: Window, rows: int, *, rounds: int = 3, tell: Told = lambda _: None) -> Report:
    """A warm read of one day over Flight, by the same client with the same codec: our server against pyarrow.flight's, from memory."""
    measured = _rounds(("flight_ours", "flight_plain"), {"url": database_url, "day": day.key}, rounds, tell)
    return Report(
        "flight_read",
        rows,
        (_result(measured, "flight_ours", "rate", "events/s"), _result(measured, "flight_plain", "rate", "events/s")),
        (Ratio("events/s, ours / a pyarrow.flight server", _over(measured, "flight_ours", "flight_plain"), 2.2),),
    )


def _rounds(cases: Iterable[str], arguments: Mapping[str, Any], rounds: int, tell: Told) -> dict[str, dict[str, list[float]]]:
    """``{case: {metric: values}}``; a case that cannot run holds ``{"skipped: <why>": []}``."""
    measured: dict[str, dict[str, list[float]]] = {case: defaultdict(list) for case in cases}
    for number in range(rounds):
        for case, metrics in measured.items():
            tell(f"round {number + 1} of {rounds}: {case}")
            # The arguments hold a database URL: they go through the child's stdin, not through a command line that `ps` shows.
            done = subprocess.run(
                [sys.executable, "-m", "fraiseql_pipeline.benchmark", case],
                input=json.dumps(arguments),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise PipelineError(f"The benchmark case {case!r} failed: {last[0]}")
            for metric, value in json.loads(done.stdout).items():
                if metric == "skipped":
                    metrics[f"skipped: {value}"] = []
                else:
                    metrics[metric].append(value)
    return measured


def _result(measured: Mapping[str, Mapping[str, list[float]]], case: str, metric: str, unit: str) -> Result:
    values = measured[case].get(metric)
    if not values:
        why = next((name.removeprefix("skipped: ") for name in measured[case] if name.startswith("skipped: ")), "not measured")
        return Result(case, metric, unit, skipped=why)
    return Result(case, metric, unit, statistics.median(values), min(values), max(values))


def _median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _over(measured: Mapping[str, Mapping[str, list[float]]], ours: str, other: str, metric: str = "rate") -> float | None:
    """The median of the ratios round by round: both sides of a pair met the same minute of the machine."""
    pairs = zip(measured[ours].get(metric, ()), measured[other].get(metric, ()), strict=False)
    return _median([a / b for a, b in pairs])


# The cases. Each runs alone in a child process; libraries of the references are imported where they are used, before the clock starts.


def _case_ours(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    import pandera.polars  # noqa: F401 - the first window with bad rows imports it

    from fraiseql_pipeline import pipeline
    from fraiseql_pipeline.changelog import open_changelog
    from fraiseql_pipeline.lake import Lake

    day = Window.parse(arguments["day"])
    settings = Settings(database_url=arguments["url"], lake_uri=str(at / "lake"), window=WindowSize.DAY, start=day.start)
    with open_changelog(settings) as changelog:
        began = time.perf_counter()
        done = pipeline.materialize([day], settings=settings, changelog=changelog, lake=Lake.of(settings))
        return {"rate": done[0].commit.source_rows / (time.perf_counter() - began)}


def _case_polars(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    import polars as pl

    query = _select(arguments)
    pl.Series([1]).to_arrow()  # loads what polars loads late
    import deltalake  # noqa: F401 - write_delta imports it

    began = time.perf_counter()
    frame = pl.read_database_uri(query, arguments["url"], engine="adbc")
    frame.write_delta(str(at / "table"))
    return {"rate": frame.height / (time.perf_counter() - began)}


def _case_adbc(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    del at
    import adbc_driver_postgresql.dbapi as adbc

    query = _select(arguments)
    began = time.perf_counter()
    with adbc.connect(arguments["url"], autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        rows = sum(batch.num_rows for batch in cursor.fetch_record_batch())
    return {"rate": rows / (time.perf_counter() - began)}


def _case_copy(arguments: Mapping[str, Any], at: Path) -> dict[str, Any]:
    del at
    import psycopg

    with psycopg.connect(arguments["url"], autocommit=True) as connection:
        (allowed,) = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() or (False,)
        if not allowed:
            return {"skipped": "COPY to /dev/null on the server needs a superuser"}
        began = time.perf_counter()
        rows = connection.execute(f"COPY ({_select(arguments)}) TO '/dev/null' (FORMAT binary)").rowcount
        return {"rate": rows / (time.perf_counter() - began)}


def _select(arguments: Mapping[str, Any]) -> str:
    """The rows of the day with the columns a reader needs, as plain SQL: what a user of a reference would write."""
    from fraiseql_pipeline.event import COLUMNS

    day = Window.parse(arguments["day"])
    columns = ", ".join(f"{column.sql or column.source[0]} AS {column.name}" for column in COLUMNS if column.source)
    return (
        f"SELECT {columns} FROM core.tb_entity_change_log "
        f"WHERE created_at >= '{day.start.isoformat()}' AND created_at < '{day.end.isoformat()}'"
    )


#: Windows added in a round.
_ADDED = 40


def _publish_empty(database_url: str, at: Path, day: Window, count: int) -> None:
    """A lake of so many empty windows up to those that a round adds, committed one by one as a run commits them: 5 ms each."""
    from fraiseql_pipeline.changelog import open_changelog
    from fraiseql_pipeline.lake import Facts, Lake

    lake = Lake(str(at))
    with open_changelog(Settings(database_url=database_url, lake_uri=str(at))) as changelog:
        changelog.preflight()
        settled = changelog.settle(day.start)
    for window in _hours(day, count)[:count]:
        facts = Facts(settled.settled_pk, settled.state_of(window), settled.identity, "bench", settled.settled_at, source_rows=0)
        with lake.stage(window) as staged:
            lake.commit(staged, facts)


def _hours(day: Window, standing: int) -> list[Window]:
    first = day.start - timedelta(hours=standing + _ADDED)
    return [Window(first + timedelta(hours=n), WindowSize.HOUR) for n in range(standing + _ADDED)]


def _case_few(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    return _cost_per_window(arguments, at, "few")


def _case_many(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    return _cost_per_window(arguments, at, "many")


def _cost_per_window(arguments: Mapping[str, Any], at: Path, case: str) -> dict[str, float]:
    from fraiseql_pipeline import pipeline
    from fraiseql_pipeline.changelog import open_changelog
    from fraiseql_pipeline.lake import Lake

    added = _hours(Window.parse(arguments["day"]), arguments["standing"][case])[-_ADDED:]
    shutil.copytree(Path(arguments["lakes"]) / case, at / "lake", copy_function=os.link)
    settings = Settings(database_url=arguments["url"], lake_uri=str(at / "lake"), start=added[0].start)
    with open_changelog(settings) as changelog:
        lake = Lake.of(settings)
        began = time.perf_counter()
        pipeline.materialize(added, settings=settings, changelog=changelog, lake=lake)
        return {"seconds_per_window": (time.perf_counter() - began) / len(added)}


def _lake_of_day(arguments: Mapping[str, Any], at: Path) -> Settings:
    """The settings of a fresh lake that holds the day."""
    from fraiseql_pipeline import pipeline
    from fraiseql_pipeline.changelog import open_changelog
    from fraiseql_pipeline.lake import Lake

    day = Window.parse(arguments["day"])
    settings = Settings(
        database_url=arguments["url"],
        lake_uri=str(at / "lake"),
        window=WindowSize.DAY,
        start=day.start,
        arrow_flight_bind="127.0.0.1:0",
    )
    with open_changelog(settings) as changelog:
        pipeline.materialize([day], settings=settings, changelog=changelog, lake=Lake.of(settings))
    return settings


def _events_of_day(arguments: Mapping[str, Any], at: Path) -> pa.Table:
    from fraiseql_pipeline.event import EVENT_SCHEMA, WIRE_SCHEMA
    from fraiseql_pipeline.lake import Lake

    day, lake = Window.parse(arguments["day"]), Lake.of(_lake_of_day(arguments, at))
    return pa.Table.from_batches(lake.read(day.start, day.end, columns=EVENT_SCHEMA.names), EVENT_SCHEMA).cast(WIRE_SCHEMA)


def _case_json_ours(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    from fraiseql_pipeline.event_json import events_from_json, events_to_json

    lines = events_to_json(_events_of_day(arguments, at))
    events_from_json(lines[: lines.index(b"\n")])  # loads what the libraries load late
    began = time.perf_counter()
    rows = events_from_json(lines).num_rows
    return {"rate": rows / (time.perf_counter() - began)}


def _case_json_plain(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    from fraiseql_pipeline.event import WIRE_SCHEMA
    from fraiseql_pipeline.event_json import KINDS, events_to_json

    lines = events_to_json(_events_of_day(arguments, at))
    began = time.perf_counter()
    events = []
    for line in lines.splitlines():
        event = json.loads(line)
        event |= {
            "event_id": event["id"],
            "event_type": KINDS[event["event_type"]],
            "timestamp": datetime.fromisoformat(event["timestamp"]),
            "data": json.dumps(event["data"]),
            "org_id": event["tenant_id"],
        }
        events.append(event)
    rows = pa.Table.from_pylist(events, WIRE_SCHEMA).num_rows
    return {"rate": rows / (time.perf_counter() - began)}


def _case_flight_ours(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    from fraiseql_pipeline.ticket import Ticket

    day, settings = Window.parse(arguments["day"]), _lake_of_day(arguments, at)
    ticket = Ticket(start=day.start, end=day.end, codec=_CODEC).text.encode()
    return _flight_rate(_serve_ours, settings.lake_uri, ticket)


def _case_flight_plain(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    file = at / "events.arrow"
    events = _events_of_day(arguments, at)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, events.schema) as writer:
        writer.write_table(events, max_chunksize=Settings().arrow_flight_batch_size)
    return _flight_rate(_serve_plain, str(file), b"events")


def _flight_rate(serve: Callable[[str, Connection], None], of: str, ticket: bytes) -> dict[str, float]:
    """The rate of a warm read from a server in a process of its own."""
    from pyarrow import flight

    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=serve, args=(of, there), daemon=True)
    server.start()
    there.close()  # so that a server that does not start is an error here, not a wait
    with flight.connect(f"grpc://127.0.0.1:{here.recv()}") as client:
        rate = 0.0
        for _ in range(3):  # the first reads warm both sides up
            began = time.perf_counter()
            rows = client.do_get(flight.Ticket(ticket)).read_all().num_rows
            rate = max(rate, rows / (time.perf_counter() - began))
    here.send("done")
    server.join()
    return {"rate": rate}


def _serve_ours(lake_uri: str, told: Connection) -> None:
    from fraiseql_pipeline.flight.server import serve

    with serve(Settings(lake_uri=lake_uri, arrow_flight_bind="127.0.0.1:0")) as server:
        told.send(server.port)
        told.recv()


def _serve_plain(file: str, told: Connection) -> None:
    from pyarrow import flight

    events = pa.ipc.open_file(pa.memory_map(file)).read_all()
    options = pa.ipc.IpcWriteOptions(compression=_CODEC)

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: Any, ticket: Any) -> Any:
            del context, ticket
            return flight.RecordBatchStream(events, options=options)

    with Server("grpc://127.0.0.1:0") as server:
        told.send(server.port)
        told.recv()


def day_of(now: datetime | None = None) -> Window:
    """The last whole day: where the benchmarks put their events."""
    return Window.holding((now or datetime.now(UTC)) - timedelta(days=1), WindowSize.DAY)


def _peak_memory_mib() -> float:
    """Peak resident memory of this process. Not ``getrusage``'s: that one also counts what the parent had before the child was exec'ed."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def _run_case(case: str) -> None:
    pa.set_memory_pool(pa.system_memory_pool())  # as the command line does
    arguments = json.loads(sys.stdin.read())
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as at:
        figures: dict[str, Any] = globals()[f"_case_{case}"](arguments, Path(at))
    figures["peak_memory"] = _peak_memory_mib()
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    _run_case(sys.argv[1])
