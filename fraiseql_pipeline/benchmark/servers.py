"""The servers that ``bench flight`` reads from, each in a process of its own.

What lives here: how each is started, what it serves, how it ends. What must not: reading (``readers.py``), cases and budgets
(``flight.py``).

    ours        the server of this package over a lake
    reference   a ``pyarrow.flight`` server with the lake's events in memory, in the same batches, profiles and codecs
    json        event JSON over HTTP, one event per line, from memory: what one had before
    roapi       ROAPI (``pip install roapi``) over the lake's table ``events``, through its Flight SQL; see ``roapi``
"""

from __future__ import annotations

import http.server
import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding as Form
from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat
from pyarrow import flight, ipc

from fraiseql_pipeline import memory
from fraiseql_pipeline.encoding import Encoding, to_wire, wire_schema
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.event_json import events_to_json
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

#: Rows per batch of the reference: measured over 4,096 to 65,536, no codec is faster at another.
_REFERENCE_ROWS = 16_384
#: What the reference compresses with: as ``encoding.CODECS``, the level too; with all threads, as pyarrow does by itself.
_REFERENCE_CODECS = {"none": None, "lz4": "lz4", "zstd": pa.Codec("zstd", compression_level=3)}
#: More readers than the largest case has.
_MAX_STREAMS = 128
_ROAPI_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; ``root_certs`` (PEM) where it has TLS."""

    url: str
    pid: int
    root_certs: bytes | None = None

    def memory_mib(self) -> float | None:
        """Private memory: anonymous pages, ``RssAnon``; what the system caches of files is not in it. None where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
        except (OSError, StopIteration):
            return None


class NotThere(Exception):
    """A reference that cannot run here; the message says why."""


@contextmanager
def server(
    kind: str, lake_uri: str, *, tls: bool = False, database_url: str | None = None, follows: bool = True
) -> Iterator[Server]:
    """One of ``ours`` (which ``follows`` the change log of a URL), ``reference`` and ``json``. It ends with its standard input.
    Raises ``PipelineError`` when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="fraiseql-bench-") as directory:
        pair = _certificate(Path(directory)) if tls else None
        asked = {
            "lake": lake_uri,
            "tls": None if pair is None else [str(file) for file in pair],
            "url": database_url,
            "follows": follows,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "fraiseql_pipeline.benchmark.servers", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            url = process.stdout.readline().strip()
            if not url:
                raise PipelineError(f"The server {kind!r} of the benchmark did not start; its message is above.")
            try:
                yield Server(url, process.pid, None if pair is None else pair[0].read_bytes())
            finally:
                process.stdin.close()
                process.wait()


@contextmanager
def roapi(lake_uri: str) -> Iterator[Server]:
    """ROAPI over the table of a lake on this machine. Raises ``NotThere`` with the reason when it cannot run.

    It reads the Parquet files for every query: of a partitioned Delta table it makes no table in memory (0.12.7: "Mismatch between schema
    and batches").
    """
    beside = Path(sys.executable).with_name("roapi")
    program = str(beside) if beside.exists() else shutil.which("roapi")
    if program is None:
        raise NotThere("roapi is not installed; pip install 'fraiseql-pipeline[bench]'")
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(3)]
    options = ("--addr-http", addresses[0], "--addr-postgres", addresses[1], "--addr-flight-sql", addresses[2])
    table = f"events={Path(lake_uri).absolute()}/events,format=delta,use_memory_table=false"
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen([program, *options, "--table", table], stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _until_listening(process, addresses[2])
            yield Server(f"grpc://{addresses[2]}", process.pid)
        finally:
            process.kill()


def _until_listening(process: subprocess.Popen[bytes], address: str) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + _ROAPI_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotThere(f"roapi ended with code {process.returncode} before it listened")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise NotThere(f"roapi did not listen within {_ROAPI_SECONDS} seconds")


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for loopback that signs itself, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(Form.PEM))
    files[1].write_bytes(key.private_bytes(Form.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


# ---------------------------------------------------------------------------------------------------- in the server's process

_Stop = Callable[[], object]


def _ours(lake: Lake, asked: dict[str, Any]) -> tuple[str, _Stop]:
    memory.share_malloc()  # as the command line does
    tls, database_url = asked["tls"], asked["url"]
    start = {} if database_url is not None else {"start": _extent(lake)[0]}
    files = {} if tls is None else {"arrow_flight_tls_cert": tls[0], "arrow_flight_tls_key": tls[1]}
    chosen: dict[str, Any] = {
        "lake_uri": lake.uri,
        "database_url": database_url,
        "arrow_flight_live": asked["follows"],
        **start,
        **files,
    }
    running = serve(Settings(arrow_flight_bind="127.0.0.1:0", arrow_flight_max_streams=_MAX_STREAMS, **chosen))
    return running.url, lambda: running.stop(0)


def _reference(lake: Lake, _: dict[str, Any]) -> tuple[str, _Stop]:
    batches = _events(lake)
    tables: dict[str, pa.Table] = {}

    class Reference(flight.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: object, ticket: flight.Ticket) -> flight.RecordBatchStream:
            del context
            encoding = Encoding.parse(ticket.ticket.decode())
            if encoding.profile not in tables:
                schema = wire_schema((), encoding.profile)
                table = pa.Table.from_batches([to_wire(batch, schema) for batch in batches], schema).unify_dictionaries()
                tables[encoding.profile] = pa.Table.from_batches(table.combine_chunks().to_batches(_REFERENCE_ROWS))
            options = ipc.IpcWriteOptions(compression=_REFERENCE_CODECS[encoding.codec])
            return flight.RecordBatchStream(tables[encoding.profile], options=options)

    running = Reference("grpc://127.0.0.1:0")
    return f"grpc://127.0.0.1:{running.port}", running.shutdown


def _json(lake: Lake, _: dict[str, Any]) -> tuple[str, _Stop]:
    lines = [events_to_json(batch, compact=True) for batch in _events(lake)]

    class Lines(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Content-Length", str(sum(map(len, lines))))
            self.end_headers()
            for part in lines:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lines)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{running.server_address[1]}", running.shutdown


def _extent(lake: Lake) -> tuple[datetime, datetime]:
    windows = lake.published()
    return min(window.start for window in windows), max(window.end for window in windows)


def _events(lake: Lake) -> list[pa.RecordBatch]:
    return list(lake.read(*_extent(lake), columns=WIRE_SCHEMA.names))


def _serve(kind: str) -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    url, stop = {"ours": _ours, "reference": _reference, "json": _json}[kind](Lake(asked["lake"]), asked)
    sys.stdout.write(url + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    stop()


if __name__ == "__main__":
    _serve(sys.argv[1])
