"""The cases of the benchmarks: what is measured, each alone in a process of its own, called by ``comparison.py``.

What lives here: the work of a case and its clock. What must not: what the figures mean (``comparison.py``). Libraries of the references are
imported where they are used, before the clock starts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from fraiseql_pipeline import memory
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize

#: What both Flight servers compress with: the fast one, so that it is the servers that are compared.
_CODEC = "lz4"


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


def publish_empty(database_url: str, at: Path, day: Window, count: int) -> None:
    """A lake of so many empty windows up to those that a round adds, committed one by one as a run commits them: 5 ms each."""
    from fraiseql_pipeline.changelog import open_changelog
    from fraiseql_pipeline.lake import Facts, Lake

    lake = Lake(str(at))
    with open_changelog(Settings(database_url=database_url, lake_uri=str(at))) as changelog:
        changelog.preflight()
        settled = changelog.settle(day.start)
    for window in hours(day, count)[:count]:
        facts = Facts(settled.settled_pk, settled.state_of(window), settled.identity, "bench", settled.settled_at, source_rows=0)
        with lake.stage(window) as staged:
            lake.commit(staged, facts)


def hours(day: Window, standing: int) -> list[Window]:
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

    added = hours(Window.parse(arguments["day"]), arguments["standing"][case])[-_ADDED:]
    shutil.copytree(Path(arguments["lakes"]) / case, at / "lake", copy_function=os.link)
    settings = Settings(database_url=arguments["url"], lake_uri=str(at / "lake"), start=added[0].start)
    with open_changelog(settings) as changelog:
        lake = Lake.of(settings)
        began = time.perf_counter()
        pipeline.materialize(added, settings=settings, changelog=changelog, lake=lake)
        return {"seconds_per_window": (time.perf_counter() - began) / len(added)}


#: Plans of which the median is taken.
_PLANS = 21


def _case_plan(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    """A ticket over all windows, shared out over endpoints, each of which names what it reads: once where the version's view is kept, and
    as the first after a commit, which makes a new one. In memory, over windows of one file each: where they lie is not read.
    """
    del at
    from fraiseql_pipeline.flight.plan import plan
    from fraiseql_pipeline.flight.view import View
    from fraiseql_pipeline.lake import Commit, File, Snapshot
    from fraiseql_pipeline.lake.storage import LocalStorage
    from fraiseql_pipeline.ticket import Ticket

    windows = hours(Window.parse(arguments["day"]), arguments["standing"]["many"])[:-_ADDED]
    rows = 10_000
    published = {
        window: Commit(
            window=window,
            outcome="published",
            table_version=version,
            quarantine_version=None,
            settled_pk=version,
            state="sealed",
            source_rows=rows,
            accepted_rows=rows,
            quarantined_rows=0,
            content_hash="",
            bytes=0,
            run_id="bench",
            committed_at=window.end,
            settled_at=window.end,
            identity="bench",
        )
        for version, window in enumerate(windows)
    }
    files = tuple(
        File(f"{window.key}.parquet", str(window.start.date()), 1, rows, window.micros[0], window.micros[1] - 1)
        for window in windows
    )
    snapshot = Snapshot(len(windows), files, published, LocalStorage(Path("nowhere")))
    ticket = Ticket(start=windows[0].start, end=windows[-1].end)

    def planned(view: View | None) -> tuple[float, View]:
        began = time.perf_counter()
        view = view or View.after(before, snapshot)
        decided = plan(ticket, view, first=windows[0].start, size=WindowSize.HOUR)
        found = sum(len(list(part.units())) for part in decided.parts())
        seconds = time.perf_counter() - began
        assert found >= len(windows)
        return seconds * 1000, view

    before = View(snapshot)
    _, view = planned(None)
    return {
        "plan": statistics.median(planned(view)[0] for _ in range(_PLANS)),
        "first_plan": statistics.median(planned(None)[0] for _ in range(_PLANS)),
    }


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


def write_event_json(database_url: str, at: Path, day: Window) -> Path:
    """A file of the day's events as event JSON, one per line."""
    from fraiseql_pipeline.event_json import events_to_json

    file = at / "events.jsonl"
    file.write_bytes(events_to_json(_events_of_day({"url": database_url, "day": day.key}, at)))
    return file


def _case_json_ours(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    del at
    from fraiseql_pipeline.event_json import events_from_json

    return _conversion_rates(arguments, events_from_json)


def _case_json_plain(arguments: Mapping[str, Any], at: Path) -> dict[str, float]:
    del at
    from fraiseql_pipeline.event import WIRE_SCHEMA
    from fraiseql_pipeline.event_json import KINDS

    def convert(lines: bytes) -> pa.Table:
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
        return pa.Table.from_pylist(events, WIRE_SCHEMA)

    return _conversion_rates(arguments, convert)


def _conversion_rates(arguments: Mapping[str, Any], convert: Callable[[bytes], pa.Table]) -> dict[str, float]:
    """Twice the same lines. The first time the process gets its memory from the system, which costs a small machine a quarter of the rate;
    a process that converts one file after the other does that once.
    """
    lines = Path(arguments["lines"]).read_bytes()
    convert(lines[: lines.index(b"\n")])  # loads what the libraries load late
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        rows = convert(lines).num_rows
        rates.append(rows / (time.perf_counter() - began))
    return {"first_rate": rates[0], "rate": rates[1]}


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


def _peak_memory_mib() -> float:
    """Peak resident memory of this process. Not ``getrusage``'s: that one also counts what the parent had before the child was exec'ed."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def _run_case(case: str) -> None:
    memory.share_malloc()  # as the command line does
    arguments = json.loads(sys.stdin.read())
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as at:
        figures: dict[str, Any] = globals()[f"_case_{case}"](arguments, Path(at))
    figures["peak_memory"] = _peak_memory_mib()
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    _run_case(sys.argv[1])
