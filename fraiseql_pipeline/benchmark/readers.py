"""How ``bench flight`` reads: one stream, its first batch, many readers at once, and the references that are no Flight server of events.

What lives here: clients with a clock, stock ``pyarrow.flight`` and the standard library; batches are counted and dropped. What must not:
servers (``servers.py``), cases and budgets (``flight.py``).

Many readers are threads of a few processes, each with a connection of its own: clients of one process would otherwise share one connection
to an address (gRPC's subchannel pool), and one HTTP/2 window with it.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pyarrow import flight

from fraiseql_pipeline.benchmark.servers import Server
from fraiseql_pipeline.errors import PipelineError

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
#: Readers share so many processes, however many they are: of 64 in 16 processes, what is measured is how the system shares two cores among
#: clients (1.2M to 2.5M events/s, where 4 processes got 3.6M from the same server in the same minute).
_PROCESSES = 4
_QUERY = "SELECT event_id, event_type, entity_type, entity_id, timestamp, data, user_id, org_id FROM events"


@dataclass(frozen=True, slots=True)
class Read:
    """One read: its events, how many per second, and milliseconds until the first were there."""

    rows: int
    rate: float
    first_ms: float


def read(server: Server, ticket: bytes) -> Read:
    """A whole stream on a connection of its own, the connection included."""
    began = time.perf_counter()
    with _connect(server.url, server.root_certs) as client:
        return _counted(began, (chunk.data for chunk in client.do_get(flight.Ticket(ticket))))


def list_flights(server: Server) -> None:
    """What a client does that only looks; the server has followed the lake's log then."""
    with _connect(server.url, server.root_certs) as client:
        list(client.list_flights())


def first_batch_ms(server: Server, ticket: bytes, *, newcomer: bool = False) -> float:
    """Until the first batch of a stream that is then left; of a ``newcomer``, from before the connection is made."""
    began = time.perf_counter()
    with _connect(server.url, server.root_certs) as client:
        if not newcomer:
            list(client.list_flights())  # the connection is made
            began = time.perf_counter()
        reader = client.do_get(flight.Ticket(ticket))
        reader.read_chunk()
        elapsed = time.perf_counter() - began
        reader.cancel()
        return elapsed * 1000


def read_sql(server: Server) -> Read:
    """All events of a Flight SQL server's table ``events``, in the order it likes; planning included."""
    statement = _field(1, _QUERY.encode())
    kind = b"type.googleapis.com/arrow.flight.protocol.sql.CommandStatementQuery"
    command = flight.FlightDescriptor.for_command(_field(1, kind) + _field(2, statement))
    began = time.perf_counter()
    with _connect(server.url, None) as client:
        endpoints = client.get_flight_info(command).endpoints
        return _counted(began, (chunk.data for endpoint in endpoints for chunk in client.do_get(endpoint.ticket)))


def read_lines(server: Server) -> Read:
    """Every line of an HTTP answer as a dict of the standard library's ``json``."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    began = time.perf_counter()
    connection.request("GET", "/")
    rows, first = 0, 0.0
    for line in connection.getresponse():
        json.loads(line)
        first = first or time.perf_counter() - began
        rows += 1
    connection.close()
    return Read(rows, rows / (time.perf_counter() - began), first * 1000)


def _counted(began: float, batches: Iterable[Any]) -> Read:
    rows, first = 0, 0.0
    for batch in batches:
        if batch is not None:
            first = first or time.perf_counter() - began
            rows += batch.num_rows
    return Read(rows, rows / (time.perf_counter() - began), first * 1000)


def _connect(url: str, root_certs: bytes | None) -> flight.FlightClient:
    return flight.connect(url, tls_root_certs=root_certs, generic_options=_OWN_CONNECTION)


def _field(number: int, value: bytes) -> bytes:
    """A protobuf field of bytes: Flight SQL's command is one of text within an ``Any``."""
    size, length = len(value), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + value


# ------------------------------------------------------------------------------------------------------------------- many


@dataclass(slots=True)
class Crowd:
    """Readers that read one ticket again and again. ``rows`` by reader, over ``seconds``, both there once they have been stopped."""

    rows: Sequence[int] = ()
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Events per second, all readers together."""
        return sum(self.rows) / self.seconds

    @property
    def fairness(self) -> float:
        """What the slowest got over what the fastest got."""
        return min(self.rows) / max(self.rows)


@contextmanager
def crowd(server: Server, ticket: bytes, count: int) -> Iterator[Crowd]:
    """``count`` readers that read while the block runs. Raises ``PipelineError`` if one of them fails."""
    found = Crowd()
    processes = [_start(server.url, ticket, share) for share in _shares(count)]
    for process in processes:
        _answer(process)  # all its readers are connected
    began = time.perf_counter()
    _tell(processes)
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - began
        _tell(processes)
        found.rows = [rows for process in processes for rows in _answer(process)]
        for process in processes:
            process.communicate()


def _shares(count: int) -> list[int]:
    processes = min(count, _PROCESSES)
    return [count // processes + (number < count % processes) for number in range(processes)]


def _start(url: str, ticket: bytes, readers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fraiseql_pipeline.benchmark.readers", url, ticket.decode(), str(readers)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _tell(processes: Iterable[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise PipelineError("A reader of the benchmark failed; its message is above.")
    return json.loads(line)


def _read_on(url: str, ticket: bytes, readers: int) -> None:
    """The child of ``crowd``: says when it is ready, reads from the first line of its input to the second, says how much."""
    rows, failed = [0] * readers, list[Exception]()
    connected, go, enough = threading.Barrier(readers + 1), threading.Event(), threading.Event()

    def one(number: int) -> None:
        with _connect(url, None) as client:
            list(client.list_flights())
            connected.wait()
            go.wait()
            while not enough.is_set():
                reader = client.do_get(flight.Ticket(ticket))
                for chunk in reader:
                    rows[number] += chunk.data.num_rows if chunk.data is not None else 0
                    if enough.is_set():
                        reader.cancel()
                        break

    def guarded(number: int, run: Callable[[int], None]) -> None:
        try:
            run(number)
        except Exception as error:  # noqa: BLE001 - the parent is told of any
            if not enough.is_set():
                failed.append(error)
                connected.abort()

    threads = [threading.Thread(target=guarded, args=(number, one), daemon=True) for number in range(readers)]
    for thread in threads:
        thread.start()
    connected.wait()
    _say("ready")
    sys.stdin.readline()
    go.set()
    sys.stdin.readline()
    got = list(rows)
    enough.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    _say(got)


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _read_on(sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]))
