"""The server as a process: where it binds, how it stops, what its death means for a client."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import FlightUnavailable, SettingsError
from fraiseql_pipeline.flight import service
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake, Snapshot
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import EVERYTHING, MIDNIGHT, ROWS, hour, publish
from tests.support.events import lake_events
from tests.support.servers import Start, processes
from tests.support.waiting import eventually


@pytest.fixture
def start(lake_uri: str, tmp_path: Path) -> Iterator[Start]:
    with processes(lake_uri, MIDNIGHT, tmp_path) as start:
        yield start


def test_a_server_killed_in_the_middle_of_a_stream_gives_its_clients_an_error(start: Start) -> None:
    server, url, _ = start()
    with flight.connect(url) as stock, connect(url) as ours:
        reader = stock.do_get(flight.Ticket(EVERYTHING))
        reader.read_chunk()
        stream = ours.stream(EVERYTHING)
        next(stream)
        server.kill()
        with pytest.raises(flight.FlightError):
            reader.read_all()
        with pytest.raises(FlightUnavailable):
            stream.read_all()


def test_sigterm_lets_a_running_stream_finish_and_refuses_new_ones(start: Start) -> None:
    server, url, _ = start()
    with flight.connect(url) as client:
        reader = client.do_get(flight.Ticket(EVERYTHING))
        rows = reader.read_chunk().data.num_rows
        server.send_signal(signal.SIGTERM)
        refused = False
        for _ in range(200):
            with flight.connect(url) as late:
                try:
                    late.get_flight_info(flight.FlightDescriptor.for_command(EVERYTHING))
                except flight.FlightError:
                    refused = True
                    break
            time.sleep(0.02)
        assert refused
        assert rows + reader.read_all().num_rows == ROWS
    assert server.wait(30) == 0


def test_a_reader_that_does_not_read_cannot_hold_up_the_end(start: Start) -> None:
    server, url, _ = start(FRAISEQL_ARROW_FLIGHT_DRAIN_SECONDS="0.5")
    with flight.connect(url) as client:
        reader = client.do_get(flight.Ticket(EVERYTHING))
        reader.read_chunk()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        with pytest.raises(flight.FlightError):
            reader.read_all()


def test_a_second_signal_ends_the_streams_at_once(start: Start) -> None:
    server, url, _ = start(FRAISEQL_ARROW_FLIGHT_DRAIN_SECONDS="3600")
    with flight.connect(url) as client:
        reader = client.do_get(flight.Ticket(EVERYTHING))
        reader.read_chunk()
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)  # not a second SIGTERM: two of a kind may be delivered as one
        assert server.wait(20) == 0


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
def test_an_address_others_can_reach_is_refused(lake: Lake, bind: str) -> None:
    with pytest.raises(SettingsError, match="FRAISEQL_ARROW_FLIGHT_BIND must be a loopback address"):
        serve(Settings(arrow_flight_bind=bind), lake=lake)


def test_an_address_others_can_reach_is_served_when_insisted_on(lake: Lake) -> None:
    with serve(Settings(arrow_flight_bind="0.0.0.0:0"), lake=lake, insecure=True) as server:
        assert server.port > 0


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:0"])
def test_loopback_is_served_and_a_free_port_is_told(lake: Lake, bind: str) -> None:
    with serve(Settings(arrow_flight_bind=bind), lake=lake) as server, flight.connect(server.url) as client:
        assert list(client.list_flights()) == []


def test_a_server_looks_at_the_lake_before_it_is_asked(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    version = publish(lake, hour(0), lake_events(hour(0), 5)).table_version
    server = start_server(Lake(lake.uri))
    eventually(lambda: list(server._service._views._kept) == [version])


def test_a_cache_directory_that_takes_no_file_is_said_before_anybody_is_served(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="FRAISEQL_ARROW_FLIGHT_CACHE_DIR"):
        serve(Settings(arrow_flight_bind="127.0.0.1:0", arrow_flight_cache_dir=str(tmp_path / "file" / "cache")), lake=lake)


def test_a_port_is_not_shared_with_another_server(lake: Lake) -> None:
    with serve(Settings(arrow_flight_bind="127.0.0.1:0"), lake=lake) as server:
        with pytest.raises(SettingsError, match="another process holds the port"):
            serve(Settings(arrow_flight_bind=f"127.0.0.1:{server.port}"), lake=lake)


def test_a_disabled_server_does_not_start(lake: Lake) -> None:
    with pytest.raises(SettingsError, match="disabled by FRAISEQL_ARROW_FLIGHT_ENABLED"):
        serve(Settings(arrow_flight_enabled=False), lake=lake)


def test_bytes_that_are_no_protocol_do_not_disturb_the_server(server: FlightServer, client: flight.FlightClient) -> None:
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 40,
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(noise)
    assert len(list(client.list_flights())) == 1


def test_an_abandoned_stream_frees_its_slot(lake_uri: str, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(Lake(lake_uri), arrow_flight_max_streams=1)
    with flight.connect(server.url) as abandoning:
        reader = abandoning.do_get(flight.Ticket(EVERYTHING))
        reader.read_chunk()
        reader.cancel()
    with connect(server.url) as client:
        for _ in range(500):
            try:
                assert client.read(EVERYTHING).num_rows == ROWS
                return
            except FlightUnavailable:
                time.sleep(0.01)
    pytest.fail("the slot of a cancelled stream was not freed")


def test_a_server_that_says_where_it_listens_has_looked_at_its_lake(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    looked, look = [], lake.snapshot
    monkeypatch.setattr(lake, "snapshot", lambda: looked.append(look()) or looked[-1])
    with serve(Settings(arrow_flight_bind="127.0.0.1:0"), lake=lake):
        assert [snapshot.version for snapshot in looked] == [lake.snapshot().version]


def test_a_lake_that_does_not_answer_keeps_no_server_from_listening(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    answered, look = threading.Event(), lake.snapshot

    def slow() -> Snapshot:
        assert answered.wait(60)
        return look()

    monkeypatch.setattr(lake, "snapshot", slow)
    monkeypatch.setattr(service, "_LOOK_AHEAD_SECONDS", 0.05)
    with serve(Settings(arrow_flight_bind="127.0.0.1:0", start=MIDNIGHT), lake=lake) as server, connect(server.url) as client:
        answered.set()
        assert client.read(EVERYTHING).num_rows == 10
