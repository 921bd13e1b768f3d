"""What one client can take: so much and no more, and never from the others."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import psutil
import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import FlightBusy, FlightUnavailable, TicketError
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight import service as service_module
from fraiseql_pipeline.flight import stream as stream_module
from fraiseql_pipeline.flight.auth import Caller, new_token
from fraiseql_pipeline.flight.client import Client, connect
from fraiseql_pipeline.flight.edge import Call
from fraiseql_pipeline.flight.limits import HANDSHAKES_EACH, Running, Slots
from fraiseql_pipeline.flight.presence import ClientGone
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import EVERYTHING, HELD, ROWS, hour, publish
from tests.support.counting import cuts, in_progress
from tests.support.events import TENANTS, lake_events
from tests.support.waiting import eventually


def test_a_reader_that_stalls_is_cut_and_told_why(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    server = start_server(Lake(lake_uri), arrow_flight_stall_seconds=0.3, arrow_flight_audit_log=str(audit))
    with flight.connect(server.url) as client:
        reader = client.do_get(flight.Ticket(HELD))
        reader.read_chunk()
        eventually(lambda: cuts(server, "stalled") == 1)
        eventually(lambda: in_progress(server) == 0)
        with pytest.raises(Exception, match=r"resource exhausted.*took less than 1024 bytes per second for 0.3 s"):
            reader.read_all()
    [line] = [json.loads(line) for line in audit.read_text().splitlines()]
    assert (line["code"], line["reason"]) == ("CANCELLED", "stalled")


def test_a_stream_that_lasts_too_long_is_cut(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_max_stream_seconds=0.3)
    with connect(server.url) as client, client.stream(HELD) as stream:
        next(stream)
        eventually(lambda: cuts(server, "lifetime") == 1)
        with pytest.raises(FlightUnavailable, match=r"cut after 0\.3 s, the longest it may last"):
            stream.read_all()


def test_a_reader_above_the_minimum_rate_is_not_cut(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_stall_seconds=0.5)
    rows = 0
    with connect(server.url) as client, client.stream(EVERYTHING) as stream:
        for number, batch in enumerate(stream):
            rows += batch.num_rows
            if number % 20 == 0:
                time.sleep(0.1)  # slow enough for the server to wait, quick enough to be welcome
    assert rows == ROWS
    assert cuts(server, "stalled") == 0


def test_only_time_spent_waiting_for_the_reader_counts() -> None:
    running = Running(None, None, 1000.0, began=0.0)  # type: ignore[arg-type]
    assert running.verdict(900.0, 10, 100) is None, "it waits for events"
    running.waiting_since, running.sent_bytes = 900.0, 5000
    assert running.verdict(909.0, 10, 100) is None
    assert running.verdict(911.0, 10, 100) is None, "5000 bytes in 11 s are enough"
    assert running.verdict(920.0, 10, 100) is None
    running.sent_bytes += 50
    assert running.verdict(922.0, 10, 100) == "stalled", "50 in the 11 s since are not"
    assert running.verdict(1001.0, 10, 100) == "lifetime"


def test_a_call_that_was_cut_and_has_not_ended_is_not_cut_again() -> None:
    context, told = Mock(), list[str]()
    slots = Slots(Settings(arrow_flight_max_stream_seconds=0.02), told.append)
    try:
        with slots.probe(context) as first:
            first.lifetime_seconds = 0.0
            eventually(lambda: first.cut is not None)
            with slots.probe(context) as second:
                second.lifetime_seconds = 0.0
                eventually(lambda: len(told) >= 2 and second.cut is not None)
        assert told == ["lifetime", "lifetime"]
    finally:
        slots.close()


def test_requests_that_end_because_their_call_was_cut_are_not_their_end() -> None:
    call = Call("DoExchange", None)  # type: ignore[arg-type]
    call.running = Running(None, None, 1000.0)  # type: ignore[arg-type]
    assert list(call.received(iter([b"a"]))) == [b"a"]
    call.running.cut = "idle"
    with pytest.raises(ClientGone):
        list(call.received(iter([])))


def test_a_call_that_ends_gives_back_one_slot() -> None:
    slots, caller = Slots(Settings(arrow_flight_max_streams=2), lambda _: None), Caller("ada", None, frozenset())
    try:
        with slots.call("stream", caller, Mock(), shared=True):
            for _ in range(3):
                with slots.call("stream", caller, Mock(), shared=True):
                    with (
                        pytest.raises(FlightBusy, match="already sends 2 streams"),
                        slots.call("stream", caller, Mock(), shared=True),
                    ):
                        pass
    finally:
        slots.close()


def test_one_principal_cannot_take_all_streams(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    (greedy, first), (other, second) = new_token("greedy", None, ["read"]), new_token("other", None, ["read"])
    (tmp_path / "tokens").write_text(f"{first}\n{second}\n")
    server = start_server(
        Lake(lake_uri), arrow_flight_max_streams_per_principal=2, arrow_flight_tokens_file=str(tmp_path / "tokens")
    )
    with connect(server.url, token=greedy) as client:
        held = [client.stream(HELD) for _ in range(2)]
        first_rows = [next(stream).num_rows for stream in held]
        with pytest.raises(FlightBusy, match="already sends 2 streams to this principal"):
            client.read(EVERYTHING)
        assert client.info(EVERYTHING).rows == ROWS, "planning is no stream"
        with connect(server.url, token=other) as neighbour:
            assert neighbour.read(EVERYTHING).num_rows == ROWS
        assert first_rows[0] + held[0].read_all().num_rows == ROWS
        assert client.read(EVERYTHING).num_rows == ROWS
        held[1].close()


def test_a_refusal_says_when_to_try_again_in_every_form(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_max_streams=1)
    request = protocol.Ticket(ticket=HELD.encode()).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        get = channel.unary_stream(f"/{protocol.SERVICE}/DoGet")
        held = get(request)
        next(held)
        refused = get(request)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refused.trailing_metadata())
        held.cancel()
    assert trailers["grpc-retry-pushback-ms"] == "1000"
    details = trailers["grpc-status-details-bin"]
    assert b"type.googleapis.com/google.rpc.RetryInfo" in details
    assert b"\x0a\x02\x08\x01" in details, "RetryInfo(retry_delay=Duration(seconds=1))"


def test_a_ticket_for_too_many_events_is_refused(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_max_rows=1000)
    with connect(server.url) as client:
        with pytest.raises(TicketError, match="not have more than 1000 events on this server"):
            client.info(EVERYTHING)
        with pytest.raises(TicketError, match="not have more than 1000 events on this server"):
            client.read(start=hour(0).start, end=hour(0).end, entity_types="Order")
        assert client.read(start=hour(0).start, end=hour(0).end, limit=1000).num_rows == 1000


def test_a_ticket_for_too_many_days_is_refused(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number in range(3):
        publish(lake, hour(24 * number), lake_events(hour(24 * number), 1))
    server = start_server(lake, arrow_flight_max_range_days=1)
    with connect(server.url) as client:
        with pytest.raises(TicketError, match="not cover more than 1 days"):
            client.read(start="2000-01-01", end="2030-01-01", allow_missing=True)
        assert client.read(start="2026-11-03", end="2030-01-01").num_rows == 1
        assert client.read(start="2026-11-02T01:00:00", end="2030-01-01", allow_missing=True).num_rows == 1, "a day, to the hour"


def test_clients_nobody_knows_cannot_hold_all_threads(
    lake_uri: str, start_server: Callable[..., FlightServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(Lake(lake_uri))
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(30)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        shake = channel.stream_stream(f"/{protocol.SERVICE}/Handshake")
        waiting = [shake(nothing()) for _ in range(50)]
        eventually(lambda: sum(call.is_active() for call in waiting) == HANDSHAKES_EACH)
        assert {call.code() for call in waiting if not call.is_active()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        with connect(server.url) as client:
            assert client.read(EVERYTHING).num_rows == ROWS
        silence.set()
        for call in waiting:
            call.cancel()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == [], "a client that leaves is no defect"


@pytest.mark.slow
def test_forty_stalled_readers_do_not_disturb_a_healthy_one(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_stall_seconds=60.0)
    with flight.connect(server.url) as client:
        stalled = [client.do_get(flight.Ticket(HELD)) for _ in range(40)]
        for reader in stalled:
            reader.read_chunk()
        assert in_progress(server) == 40
        with connect(server.url) as healthy:
            assert healthy.read(EVERYTHING).num_rows == ROWS
        for reader in stalled:
            reader.cancel()
    eventually(lambda: in_progress(server) == 0, 5)


def test_abandoned_streams_free_their_files_and_threads(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_max_streams=8)
    process = psutil.Process()

    def open_files() -> int:
        """Of the lake and of the frame store, whose lock is not one of a stream's."""
        paths = [file.path for file in process.open_files()]
        return sum(path.startswith(lake_uri) or ("fraiseql-frames-" in path and not path.endswith("lock")) for path in paths)

    with flight.connect(server.url) as client:
        client.do_get(flight.Ticket(HELD)).read_all()
        for _ in range(3):
            abandoned = [client.do_get(flight.Ticket(HELD)) for _ in range(8)]
            for reader in abandoned:
                reader.read_chunk()
            assert in_progress(server) == 8
            assert open_files() > 0
            for reader in abandoned:
                reader.cancel()
            eventually(lambda: in_progress(server) == 0 and open_files() == 0, 5)
        threads = sum(thread.name.startswith("flight_") for thread in threading.enumerate())
    assert threads <= Settings().arrow_flight_max_streams + 64, "the pool's threads are kept and bounded"


def test_a_client_that_leaves_while_its_frames_are_made_frees_its_slot(
    lake_uri: str, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, made = threading.Event(), []
    read = stream_module.segments

    def held_up(*asked: Any) -> Iterator[Any]:
        made.append(asked)
        assert allowed.wait(60)
        return read(*asked)

    monkeypatch.setattr(stream_module, "segments", held_up)
    server = start_server(Lake(lake_uri), arrow_flight_max_streams=2)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        get = channel.unary_stream(f"/{protocol.SERVICE}/DoGet")
        for number in range(20):
            ticket = json.loads(HELD) | {"limit": number + 1, "columns": ["pk", "seq", "data"][: number % 3 + 1]}
            call = get(protocol.Ticket(ticket=json.dumps(ticket).encode()).SerializeToString())
            next(call)  # the schema
            call.cancel()
            eventually(lambda: in_progress(server) == 0)
        assert not allowed.is_set()
        allowed.set()
        with connect(server.url) as client:
            assert client.read(EVERYTHING).num_rows == ROWS
    assert len(made) <= 4, "what nobody waited for when its turn came was not begun"


def test_planning_that_hangs_holds_up_nothing_else(
    lake_uri: str, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = threading.Event()
    decide = service_module.plan

    def held_up(*asked: Any, **how: Any) -> Any:
        assert allowed.wait(60)
        return decide(*asked, **how)

    monkeypatch.setattr(service_module, "plan", held_up)
    server = start_server(Lake(lake_uri), arrow_flight_max_streams=2)
    request = protocol.FlightDescriptor(type=protocol.CMD, cmd=HELD.encode()).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        plans = [channel.unary_unary(f"/{protocol.SERVICE}/GetFlightInfo").future(request) for _ in range(100)]
        eventually(lambda: sum(plan.done() for plan in plans) == 98)
        assert {plan.code() for plan in plans if plan.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert channel.unary_unary(f"/{protocol.HEALTH_SERVICE}/Check")(b"", timeout=30)
        assert list(channel.unary_stream(f"/{protocol.SERVICE}/ListActions")(b"", timeout=30))
        allowed.set()
        assert sum(plan.code() is grpc.StatusCode.OK for plan in plans) == 2


def test_a_client_cancels_its_own_streams_only(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    (ada, first), (eve, second) = new_token("ada", None, ["read"]), new_token("eve", None, ["read"])
    (tmp_path / "tokens").write_text(f"{first}\n{second}\n")
    server = start_server(Lake(lake_uri), arrow_flight_tokens_file=str(tmp_path / "tokens"))
    mine, theirs = (flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())]) for token in (ada, eve))
    with flight.connect(server.url) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_command(HELD), mine)
        reader = client.do_get(info.endpoints[0].ticket, mine)
        reader.read_chunk()
        body = protocol.CancelFlightInfoRequest(info=protocol.FlightInfo.FromString(info.serialize())).SerializeToString()

        def cancel(options: flight.FlightCallOptions) -> int:
            [result] = client.do_action(flight.Action("CancelFlightInfo", body), options)
            return int(protocol.CancelFlightInfoResult.FromString(result.body.to_pybytes()).status)

        assert cancel(theirs) == protocol.NOT_CANCELLABLE
        assert cancel(mine) == protocol.CANCELLED
        with pytest.raises(flight.FlightError, match="ended by CancelFlightInfo"):
            reader.read_all()
        assert cancel(mine) == protocol.NOT_CANCELLABLE


def test_principals_of_one_name_in_two_tenants_are_two_callers(
    lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path
) -> None:
    (ours, first), (theirs, second) = (new_token("app", org_id, ["read"]) for org_id in TENANTS[:2])
    (tmp_path / "tokens").write_text(f"{first}\n{second}\n")
    server = start_server(
        Lake(lake_uri), arrow_flight_max_streams_per_principal=1, arrow_flight_tokens_file=str(tmp_path / "tokens")
    )
    ticket = protocol.FlightEndpoint(ticket=protocol.Ticket(ticket=HELD.encode()))
    body = protocol.CancelFlightInfoRequest(info=protocol.FlightInfo(endpoint=[ticket])).SerializeToString()

    def cancel(client: Client) -> int:
        [result] = client._flight.do_action(flight.Action("CancelFlightInfo", body), client._options)
        return int(protocol.CancelFlightInfoResult.FromString(result.body.to_pybytes()).status)

    with connect(server.url, token=ours) as mine, connect(server.url, token=theirs) as others:
        with mine.stream(HELD) as held:
            next(held)
            assert others.read(EVERYTHING).num_rows, "one has the slots of its own"
            assert cancel(others) == protocol.NOT_CANCELLABLE
            assert cancel(mine) == protocol.CANCELLED
            with pytest.raises(FlightUnavailable, match="ended by CancelFlightInfo"):
                held.read_all()
