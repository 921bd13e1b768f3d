"""Bytes nobody meant: whatever comes in, a clean status goes out, nothing leaks, and the next client is served."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pyarrow as pa
import pytest

from fraiseql_pipeline.encoding import CODECS, ENCODINGS, Encoding, to_wire, wire_schema
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import INSIDE, hour, publish
from tests.support.events import lake_events

TICKET = b"events:*:2026-11-01:2026-11-01T02:00:00Z:1000"
JSON = json.dumps({"type": "events", "entity_type": ["Order"], "start": "2026-11-01", "end": "2026-11-01T02:00:00Z"}).encode()
#: What a client may be told. INTERNAL is a defect, UNKNOWN an error nobody mapped.
CLEAN = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
WORDS = (
    b"events",
    b":",
    b"*",
    b"|",
    b"now",
    b"now-1h",
    b"2026-11-01",
    b"T01:00:00Z",
    b"{",
    b"}",
    b'"',
    b"type",
    b"limit",
    b"columns",
    b"profile",
    b"compact",
    b"null",
    b"-1",
    b"9" * 30,
    b"\x00",
    b"\xff",
    b"%3A",
    b"\xe2\x80\xa8",
    b"ObserverEvents",
    b"[[[[[[",
    b"1e309",
    b"../../etc/passwd",
    b"'; DROP TABLE events; --",
)


@pytest.fixture
def served(lake: Lake, start_server: Callable[..., FlightServer]) -> FlightServer:
    for number in range(2):
        publish(lake, hour(number), lake_events(hour(number), 50))
    return start_server(lake)


def mangled(rng: random.Random, seed: bytes) -> bytes:
    """The seed with a few things wrong, or something made of words, or noise."""
    kind = rng.random()
    if kind < 0.05:
        return seed
    if kind < 0.2:
        return rng.randbytes(rng.randrange(0, 200))
    if kind < 0.5:
        return b"".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 12)))
    data = bytearray(seed)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at:at] = rng.choice(WORDS)
        elif how == 2:
            del data[at : at + rng.randrange(1, 8)]
        else:
            data += data[: rng.randrange(40)]
    return bytes(data)


def requests(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """RPC and request, for ever: wrong inside a right message, or a wrong message."""
    while True:
        ticket = mangled(rng, rng.choice((TICKET, JSON)))
        descriptor = protocol.FlightDescriptor(type=rng.choice((protocol.CMD, protocol.CMD, protocol.PATH, 0)), cmd=ticket)
        if descriptor.type == protocol.PATH:
            descriptor.path.extend(ticket.decode("utf-8", "replace").split(":")[: rng.randrange(4)])
        info = protocol.FlightInfo(endpoint=[protocol.FlightEndpoint(ticket=protocol.Ticket(ticket=ticket))])
        option = protocol.SessionOption(key=rng.choice(("codec", "batch_size", "x")), value=_value(rng))
        body: Any = rng.choice(
            (
                protocol.CancelFlightInfoRequest(info=info),
                protocol.RenewFlightEndpointRequest(endpoint=info.endpoint[0]),
                protocol.SetSessionOptionsRequest(session_options=[option]),
            )
        ).SerializeToString()
        action = protocol.Action(
            type=rng.choice(
                (
                    "healthcheck",
                    "refresh",
                    "warm",
                    "CancelFlightInfo",
                    "RenewFlightEndpoint",
                    "SetSessionOptions",
                    "GetSessionOptions",
                    "drop",
                )
            ),
            body=rng.choice((body, ticket, b"")),
        )
        name, message = rng.choice(
            (
                ("DoGet", protocol.Ticket(ticket=ticket)),
                ("GetFlightInfo", descriptor),
                ("GetSchema", descriptor),
                ("PollFlightInfo", descriptor),
                ("ListFlights", protocol.Criteria(expression=ticket)),
                ("DoAction", action),
                ("ListActions", protocol.Empty()),
                ("Handshake", protocol.HandshakeRequest(payload=ticket)),
            )
        )
        request = message.SerializeToString()
        yield name, mangled(rng, request) if rng.random() < 0.3 else request


def uploads() -> list[list[Any]]:
    """Whole uploads as the messages of a DoPut, in every profile and codec."""
    found = []
    for name in ENCODINGS:
        encoding = Encoding.parse(name)
        batch = to_wire(lake_events(hour(0), 5).combine_chunks().to_batches()[0], wire_schema((), encoding.profile))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=CODECS[encoding.codec]) as writer:
            writer.write_batch(batch.slice(0, 3))
            writer.write_batch(batch.slice(2))
        messages = [
            protocol.FlightData(
                data_header=message.metadata.to_pybytes(), data_body=(message.body or b"") and message.body.to_pybytes()
            )
            for message in pa.ipc.MessageReader.open_stream(sink.getvalue())
        ]
        messages[0].flight_descriptor.CopyFrom(protocol.FlightDescriptor(type=protocol.PATH, path=["events"]))
        found.append(messages)
    return found


def streamed(rng: random.Random, seeds: list[list[Any]]) -> tuple[str, list[bytes]]:
    """The messages of a DoPut or a DoExchange: right ones with something wrong in some of them, their order, or their bytes."""
    name = rng.choice(("DoPut", "DoPut", "DoPut", "DoExchange"))
    if name == "DoPut" or rng.random() < 0.2:
        messages = [protocol.FlightData.FromString(message.SerializeToString()) for message in rng.choice(seeds)]
    else:
        messages = [protocol.FlightData(app_metadata=mangled(rng, rng.choice((TICKET, JSON)))) for _ in range(rng.randrange(1, 4))]
    for _ in range(rng.randrange(3)):
        message = rng.choice(messages)
        for _ in range(rng.randrange(1, 4)):
            part = "data_header" if rng.random() < 0.5 else "data_body"
            data = bytearray(getattr(message, part))
            if data:
                at = rng.randrange(len(data))
                data[at : at + rng.choice((1, 1, 4, 8))] = rng.choice(
                    (rng.randbytes(1), b"\xff\xff\xff\x7f", bytes(8), b"\xff" * 8)
                )
                setattr(message, part, bytes(data))
    how = rng.random()
    if how < 0.1:
        rng.shuffle(messages)
    elif how < 0.2:
        del messages[rng.randrange(len(messages))]
    elif how < 0.3:
        messages.append(rng.choice(messages))
    elif how < 0.35:
        messages = messages[:1] + rng.choice(seeds)
    encoded = [message.SerializeToString() for message in messages]
    if encoded and rng.random() < 0.1:
        at = rng.randrange(len(encoded))
        encoded[at] = mangled(rng, encoded[at])
    return name, encoded


def fuzz_streams(server: FlightServer, count: int, seed: int) -> Counter[tuple[str, grpc.StatusCode]]:
    rng, seeds = random.Random(seed), uploads()
    seen: Counter[tuple[str, grpc.StatusCode]] = Counter()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for number in range(count):
            name, messages = streamed(rng, seeds)
            code, answer = grpc.StatusCode.OK, b""
            try:
                list(channel.stream_stream(f"/{protocol.SERVICE}/{name}")(iter(messages), timeout=60))
            except grpc.RpcError as error:
                code, answer = error.code(), f"{error.details()} {error.trailing_metadata()}".encode()
            assert code in CLEAN, (number, name, messages, code, answer)
            assert not INSIDE.search(answer), (number, name, messages, answer)
            seen[name, code] += 1
    return seen


def _value(rng: random.Random) -> Any:
    return protocol.SessionOptionValue(
        **rng.choice(({"string_value": "zstd"}, {"int64_value": rng.randrange(-(2**63), 2**63)}, {"bool_value": True}, {}))
    )


def ask(channel: grpc.Channel, name: str, request: bytes, cookie: str) -> tuple[grpc.StatusCode, bytes]:
    """The status, and all bytes of the answer that are not events."""
    metadata = [("cookie", f"arrow_flight_session_id={cookie}")] if cookie else None
    try:
        if name in {"GetFlightInfo", "GetSchema", "PollFlightInfo"}:
            return grpc.StatusCode.OK, channel.unary_unary(f"/{protocol.SERVICE}/{name}")(request, metadata=metadata, timeout=60)
        if name == "Handshake":
            call = channel.stream_stream(f"/{protocol.SERVICE}/{name}")(iter([request]), metadata=metadata, timeout=60)
        else:
            call = channel.unary_stream(f"/{protocol.SERVICE}/{name}")(request, metadata=metadata, timeout=60)
        answers = list(call)
        return grpc.StatusCode.OK, b"" if name == "DoGet" else b"".join(answers)
    except grpc.RpcError as error:
        return error.code(), f"{error.details()} {error.trailing_metadata()}".encode()


def fuzz(server: FlightServer, count: int, seed: int) -> Counter[tuple[str, grpc.StatusCode]]:
    rng = random.Random(seed)
    seen: Counter[tuple[str, grpc.StatusCode]] = Counter()
    source = requests(rng)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for number in range(count):
            name, request = next(source)
            cookie = mangled(rng, b"eyJjb2RlYyI6Im5vbmUifQ").decode("ascii", "ignore") if rng.random() < 0.05 else ""
            code, answer = ask(channel, name, request, "".join(c for c in cookie if 32 < ord(c) < 127))
            assert code in CLEAN, (number, name, request, code, answer)
            # What a client itself wrote may come back to it, shortened.
            assert not INSIDE.search(answer.replace(b"SELECT ", b"")), (number, name, request, answer)
            seen[name, code] += 1
    return seen


def noise(server: FlightServer, count: int, seed: int) -> None:
    """Raw bytes on the port: no protocol, half of one, and frames that lie."""
    rng = random.Random(seed)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    for _ in range(count):
        kind = rng.randrange(5)
        if kind == 0:
            data = rng.randbytes(rng.randrange(1, 4096))
        elif kind == 1:
            data = preface + rng.randbytes(rng.randrange(0, 2048))
        elif kind == 2:  # a frame of a size that never comes
            data = preface + settings + bytes([255, 255, 255, rng.randrange(16), rng.randrange(256)]) + rng.randbytes(4)
        elif kind == 3:
            data = b"POST /arrow.flight.protocol.FlightService/DoGet HTTP/1.1\r\nHost: x\r\n\r\n" + rng.randbytes(100)
        else:
            data = (
                preface
                + settings
                + b"".join(
                    len(body).to_bytes(3, "big") + bytes([rng.randrange(12), rng.randrange(256)]) + rng.randbytes(4) + body
                    for body in (rng.randbytes(rng.randrange(64)) for _ in range(rng.randrange(1, 20)))
                )
            )
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.settimeout(0.001)
            try:
                connection.sendall(data)
                connection.recv(64)
            except OSError:
                pass  # the server hangs up on it


def assert_unharmed(server: FlightServer, threads: int, files: int) -> None:
    with connect(server.url) as client:
        assert client.read(TICKET).num_rows == 100
    assert threading.active_count() <= threads + 8
    assert psutil.Process().num_fds() <= files + 32


def run(server: FlightServer, calls: int, connections: int, seed: int) -> Counter[tuple[str, grpc.StatusCode]]:
    with connect(server.url) as client:
        client.read(TICKET)
    fuzz(server, 50, seed + 1)  # the threads and files of a running server
    threads, files = threading.active_count(), psutil.Process().num_fds()
    seen = fuzz(server, calls, seed)
    noise(server, connections, seed)
    assert_unharmed(server, threads, files)
    return seen


def test_wrong_requests_get_clean_statuses(served: FlightServer) -> None:
    seen = run(served, 3_000, 300, seed=1)
    assert {name for name, _ in seen} >= {"DoGet", "GetFlightInfo", "DoAction", "Handshake"}
    assert sum(count for (_, code), count in seen.items() if code is grpc.StatusCode.INVALID_ARGUMENT) > 300
    assert seen["DoGet", grpc.StatusCode.OK] > 10, "some of them are right, or the fuzzer tests nothing"


@pytest.fixture
def taking(lake: Lake, changelog_url: str, start_server: Callable[..., FlightServer]) -> FlightServer:
    """A server that takes uploads."""
    for number in range(2):
        publish(lake, hour(number), lake_events(hour(number), 50))
    return start_server(lake, arrow_flight_uploads=True, database_url=changelog_url)


def test_wrong_uploads_and_exchanges_get_clean_statuses(taking: FlightServer) -> None:
    threads, files = threading.active_count(), psutil.Process().num_fds()
    seen = fuzz_streams(taking, 1_000, seed=3)
    assert seen["DoPut", grpc.StatusCode.INVALID_ARGUMENT] > 200
    assert seen["DoPut", grpc.StatusCode.OK] > 50, "some of them are right, or the fuzzer tests nothing"
    assert seen["DoExchange", grpc.StatusCode.OK] > 10
    assert_unharmed(taking, threads, files)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_thousand_wrong_uploads_get_clean_statuses(taking: FlightServer) -> None:
    fuzz_streams(taking, 20_000, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_thousand_wrong_requests_get_clean_statuses(served: FlightServer) -> None:
    run(served, 50_000, 2_000, seed=2)
