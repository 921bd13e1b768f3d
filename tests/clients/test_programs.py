"""Every example program, in every language, reads what the lake holds."""

from __future__ import annotations

import re
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, flight

from fraiseql_pipeline.event import EVENT_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.clients.conftest import MIDNIGHT, PROGRAMS, Run, execute, instant
from tests.support.certificates import Authority

# The first test of a language builds its program, which may download what it is made of.
pytestmark = [pytest.mark.clients, pytest.mark.timeout(420)]

TICKETS = {
    "all": ("*", 0, 4, 100_000),
    "one type, small batches, in the middle of windows": ("Order", 0.75, 3.5, 100),
    "nothing": ("*", 2, 3, 10_000),
}

#: How the languages print where in the program something happened.
STACK = re.compile(r"Traceback|^\s+at |^goroutine|Error in |Warning", re.MULTILINE)


def held(lake: Lake, entity_type: str, start: float, end: float) -> pa.Table:
    """What the lake itself has for a ticket."""
    names = [field.name for field in EVENT_SCHEMA]
    read = lake.read(MIDNIGHT + timedelta(hours=start), MIDNIGHT + timedelta(hours=end), columns=names)
    events = pa.Table.from_batches(list(read), schema=pa.schema([EVENT_SCHEMA.field(name) for name in names]))
    kept = [entity_type in ("*", found) for found in events["entity_type"].to_pylist()]
    return events.filter(pa.array(kept, pa.bool_()))


def report(events: pa.Table) -> list[str]:
    """The lines that a program is to print."""
    lines = [
        f"rows={events.num_rows}",
        f"without_user={events['user_id'].null_count}",
        f"data_bytes={sum(len(data.encode()) for data in events['data'].to_pylist())}",
    ]
    if events.num_rows:
        times = events["timestamp"].to_pylist()
        lines += [f"{name}={time:%Y-%m-%dT%H:%M:%SZ}" for name, time in (("first", min(times)), ("last", max(times)))]
    return lines + [f"{name}={count}" for name, count in sorted(Counter(events["entity_type"].to_pylist()).items())]


def test_the_lake_of_these_tests_has_what_programs_get_wrong(lake: Lake) -> None:
    events = held(lake, "*", 0, 4)
    assert events["user_id"].null_count > 0
    assert any(len(data) != len(data.encode()) for data in events["data"].to_pylist())
    assert len(report(events)) == 10


@pytest.mark.parametrize("asked", TICKETS.values(), ids=TICKETS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_counts_what_the_lake_holds(
    program: str, asked: tuple[str, float, float, int], lake: Lake, server: FlightServer, run: Run
) -> None:
    entity_type, start, end, batch_size = asked
    done = run(program, server.url, f"events:{entity_type}:{instant(start)}:{instant(end)}:{batch_size}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == report(held(lake, entity_type, start, end))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_whose_ticket_is_refused_says_why_and_counts_nothing(program: str, server: FlightServer, run: Run) -> None:
    done = run(program, server.url, "events:*:yesterday:now:10000")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "A ticket must have a start and an end" in done.stderr
    assert not STACK.search(done.stderr)


#: What the client of docs/security.md has, as options of every program.
TOKEN = ("--ca", "ca.pem", "--token-file", "reporting.token")
PAIR = ("--cert", "reporting.pem", "--key", "reporting.key")


def files(options: tuple[str, ...], directory: Path) -> list[str]:
    return [option if option.startswith("--") else str(directory / option) for option in options]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_reads_over_tls_with_a_token(
    program: str, lake: Lake, secured: FlightServer, credentials: Path, run: Run
) -> None:
    assert secured.url.startswith("grpc+tls://")
    done = run(program, *files(TOKEN, credentials), secured.url, f"events:Order:{instant(0)}:{instant(4)}:10000")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == report(held(lake, "Order", 0, 4))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_shows_its_certificate_where_that_is_asked_for(
    program: str, lake: Lake, mutual: FlightServer, credentials: Path, run: Run
) -> None:
    asked = (mutual.url, f"events:Order:{instant(0)}:{instant(4)}:10000")
    done = run(program, *files((*TOKEN, *PAIR), credentials), *asked)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == report(held(lake, "Order", 0, 4))

    refused = run(program, *files(TOKEN, credentials), *asked)
    assert (refused.returncode, refused.stdout) == (1, "")


@pytest.mark.parametrize(
    "options",
    [("--ca", "ca.pem"), ("--token-file", "reporting.token"), ("--ca", "ca.pem", "--token-file", "wrong.token")],
    ids=["no token", "an authority nobody named", "a wrong token"],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_not_let_in_counts_nothing(
    program: str, options: tuple[str, ...], secured: FlightServer, credentials: Path, run: Run
) -> None:
    (credentials / "wrong.token").write_text("fq_nobody\n", encoding="utf-8")
    done = run(program, *files(options, credentials), secured.url, f"events:Order:{instant(0)}:{instant(4)}:10000")
    assert (done.returncode, done.stdout) == (1, "")
    assert not STACK.search(done.stderr)
    if "--ca" in options:
        assert "not authenticated" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--ca", "absent.pem"),
        ("--ca", "ca.pem", "--token-file", "absent.token"),
        ("--ca", "ca.pem", "--cert", "absent.pem", "--key", "reporting.key"),
        ("--ca", "tokens"),
        (*TOKEN, *PAIR[:2]),
    ],
    ids=["no such authority", "no such token", "no such certificate", "a file of another kind", "a certificate without its key"],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_given_a_wrong_file_says_so_and_counts_nothing(
    program: str, options: tuple[str, ...], secured: FlightServer, credentials: Path, run: Run
) -> None:
    done = run(program, *files(options, credentials), secured.url, f"events:Order:{instant(0)}:{instant(4)}:10000")
    assert done.returncode in {1, 2}
    assert done.stdout == ""
    assert done.stderr
    assert not STACK.search(done.stderr)
    if absent := [option for option in options if option.startswith("absent")]:
        assert absent[0] in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_that_a_certificate_is_not_one_it_trusts(
    program: str, secured: FlightServer, credentials: Path, run: Run
) -> None:
    another = Authority(credentials, "another authority")
    options = ("--ca", another.ca.name, "--token-file", "reporting.token")
    done = run(program, *files(options, credentials), secured.url, f"events:Order:{instant(0)}:{instant(4)}:10000")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"certificat", done.stderr, re.IGNORECASE)


class WithoutReceipt(flight.FlightServerBase):
    """Sends events and ends well, but never says how many there were."""

    def __init__(self, events: pa.Table) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.events = events

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        return flight.RecordBatchStream(self.events)


@pytest.mark.parametrize("program", ["pandas", "polars", "duckdb", "java", "go"])
def test_a_program_that_checks_the_receipt_counts_nothing_without_one(program: str, lake: Lake, run: Run) -> None:
    with WithoutReceipt(held(lake, "*", 3, 4).cast(WIRE_SCHEMA)) as other:
        done = run(program, f"grpc://127.0.0.1:{other.port}", "events:*:now-1h:now:10000")
    assert (done.returncode, done.stdout) == (1, "")
    assert "receipt" in done.stderr
    assert not STACK.search(done.stderr)


def test_loading_a_ticket_into_clickhouse_again_changes_nothing(lake: Lake, server: FlightServer, run: Run, tmp_path: Path) -> None:
    arguments = (server.url, f"events:*:{instant(1)}:{instant(4)}:1000", "--path", str(tmp_path / "clickhouse"))
    assert run("clickhouse", *arguments).stdout == run("clickhouse", *arguments).stdout != ""

    expected = held(lake, "*", 1, 4).sort_by("event_id")
    stored = tmp_path / "stored.arrow"
    shown = execute([sys.executable, "-c", READ_BACK, tmp_path / "clickhouse", stored])
    assert shown.returncode == 0, shown.stderr
    found = feather.read_table(stored).sort_by("event_id")
    assert found.to_pydict() == expected.set_column(4, "timestamp", expected["timestamp"].cast(pa.int64())).to_pydict()


# In a process of its own: the engine does not let go of a directory.
READ_BACK = f"""
import sys
import clickhouse_connect
from pyarrow import feather

columns = {[f"toString({c}) AS {c}" if c.endswith("_id") else c for c in EVENT_SCHEMA.names]!r}
columns[4] = "toUnixTimestamp64Micro(timestamp) AS timestamp"
with clickhouse_connect.get_client(interface="chdb", path=sys.argv[1]) as client:
    found = client.query_arrow(f"SELECT {{', '.join(columns)}} FROM observer_events FINAL", use_strings=True)
feather.write_feather(found, sys.argv[2])
"""
