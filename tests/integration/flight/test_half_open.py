"""Calls of which one half is missing, the request or whoever takes the answer, hold up nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.limits import PROBES_EACH, SHORT_CALLS_EACH
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.counting import cuts
from tests.support.events import lake_events
from tests.support.waiting import eventually

EVERYTHING = "events:*:2026-11-01:2026-11-01T01:00:00:1000"
ROWS = 1000


@pytest.fixture
def tokens(lake: Lake, tmp_path: Path) -> tuple[str, str]:
    """Of two principals; the lake has a window for them."""
    publish(lake, hour(0), lake_events(hour(0), ROWS))
    (first, one), (second, two) = new_token("first", None, ["read"]), new_token("second", None, ["read"])
    (tmp_path / "tokens").write_text(f"{one}\n{two}\n")
    return first, second


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


@contextmanager
def half_open(server: FlightServer, method: str, calls: int, metadata: Any = ()) -> Iterator[list[Any]]:
    """Calls whose headers were sent and whose request never is."""
    over = threading.Event()

    def never() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        opened = [channel.stream_stream(method)(never(), metadata=metadata) for _ in range(calls)]
        try:
            yield opened
        finally:
            over.set()
            for call in opened:
                call.cancel()


@pytest.mark.parametrize("rpc", ["GetFlightInfo", "DoGet", "DoAction", "ListFlights"])
def test_who_has_no_credential_is_refused_before_its_request_is_waited_for(
    lake: Lake, start_server: Callable[..., FlightServer], tokens: tuple[str, str], tmp_path: Path, rpc: str
) -> None:
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"))
    with half_open(server, f"/{protocol.SERVICE}/{rpc}", 100) as calls:
        eventually(lambda: not any(call.is_active() for call in calls))
        assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}


def test_half_open_probes_leave_a_thread_for_everybody_else(
    lake: Lake, start_server: Callable[..., FlightServer], tokens: tuple[str, str], tmp_path: Path
) -> None:
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"))
    with half_open(server, f"/{protocol.HEALTH_SERVICE}/Check", 300) as calls:
        eventually(lambda: sum(call.is_active() for call in calls) == PROBES_EACH)
        assert {call.code() for call in calls if not call.is_active()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        with connect(server.url, token=tokens[0]) as client:
            assert client.read(EVERYTHING).num_rows == ROWS


def test_a_request_that_does_not_come_is_waited_for_as_long_as_any_message(
    lake: Lake, start_server: Callable[..., FlightServer], tokens: tuple[str, str], tmp_path: Path
) -> None:
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"), arrow_flight_stall_seconds=0.3)
    with half_open(server, f"/{protocol.SERVICE}/GetFlightInfo", 3, bearer(tokens[0])) as calls:
        eventually(lambda: cuts(server, "idle") == 3)
        assert {call.code() for call in calls} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "sent nothing whole for 0.3 s" in calls[0].details()


def test_an_answer_that_nobody_takes_keeps_its_slot_and_is_cut(
    lake: Lake, start_server: Callable[..., FlightServer], tokens: tuple[str, str], tmp_path: Path
) -> None:
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"), arrow_flight_stall_seconds=0.3)
    # The answer has the request in it, and is larger than what a client lets come before it looks.
    asked = {"type": "events", "entity_type": [f"T{n}" for n in range(15_000)], "start": "2026-11-01", "end": "2026-11-02"}
    request = protocol.FlightDescriptor(type=protocol.CMD, cmd=json.dumps(asked).encode()).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.http2.bdp_probe", 0)]) as channel:
        ask = channel.unary_stream(
            f"/{protocol.SERVICE}/GetFlightInfo"
        )  # which takes nothing until it is asked for the next message
        untaken = [ask(request, metadata=bearer(tokens[0])) for _ in range(3)]
        eventually(lambda: cuts(server, "stalled") == 3)
        for call in untaken:
            call.cancel()


def test_one_principal_cannot_take_all_short_calls(
    lake: Lake, start_server: Callable[..., FlightServer], tokens: tuple[str, str], tmp_path: Path
) -> None:
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"))
    first, second = tokens
    with half_open(server, f"/{protocol.SERVICE}/ListActions", 40, bearer(first)) as calls:
        eventually(lambda: sum(call.is_active() for call in calls) == SHORT_CALLS_EACH)
        assert {call.code() for call in calls if not call.is_active()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            listed = channel.unary_stream(f"/{protocol.SERVICE}/ListActions")(b"", metadata=bearer(second), timeout=30)
            assert list(listed)
