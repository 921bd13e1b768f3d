"""Rules of DoExchange: many tickets over one connection, each answered like a DoGet of its own, in order, with its receipt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import FlightBusy, InputError, TicketError
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.events import TENANTS, lake_events

ALL = "events:*:2026-11-01:2026-11-01T04:00:00Z:1000"
NOTHING = "events:*:2026-11-01T02:00:00Z:2026-11-01T03:00:00Z:1000"
ORDERS = "events:Order:2026-11-01:2026-11-01T01:30:00Z:700"


def asked(**more: Any) -> bytes:
    return json.dumps({"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T04:00:00Z", **more}).encode()


def answer(reader: Any) -> tuple[pa.Table, dict[str, Any]]:
    """The batches of one ticket, up to its receipt."""
    batches = []
    while True:
        chunk = reader.read_chunk()
        chunk.data.validate(full=True)
        batches.append(chunk.data)
        if chunk.app_metadata is not None:
            return pa.Table.from_batches(batches), json.loads(chunk.app_metadata.to_pybytes())


@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_every_ticket_is_answered_as_alone_in_the_order_of_the_tickets(client: flight.FlightClient, profile: str) -> None:
    tickets = [asked(profile=profile, **more) for more in ({}, {"start": NOTHING[9:29], "end": NOTHING[30:50]}, {"limit": 7}, {"entity_type": ["Order"]}, {})]  # fmt: skip
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(tickets[0]))
    with writer:
        for ticket in tickets[1:]:
            writer.write_metadata(ticket)
        writer.done_writing()
        for ticket in tickets:
            table, receipt = answer(reader)
            *_, last = client.do_get(flight.Ticket(ticket))
            assert receipt == json.loads(last.app_metadata.to_pybytes())
            assert table.to_pylist() == client.do_get(flight.Ticket(ticket)).read_all().to_pylist()
        with pytest.raises(StopIteration):
            reader.read_chunk()


def test_tickets_of_every_kind_come_when_the_client_wants(client: flight.FlightClient) -> None:
    [endpoint, *_] = client.get_flight_info(flight.FlightDescriptor.for_command(ALL.encode())).endpoints
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b""))
    with writer:
        for ticket, rows in ((endpoint.ticket.ticket, None), (NOTHING.encode(), 0), (asked(limit=3), 3)):
            writer.write_metadata(ticket)
            table, receipt = answer(reader)
            assert receipt["rows"] == table.num_rows == (receipt["rows"] if rows is None else rows)
        writer.done_writing()


def test_an_exchange_of_nothing_ends_well(client: flight.FlightClient) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b""))
    writer.done_writing()
    with pytest.raises(StopIteration):
        reader.read_chunk()
    writer.close()


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (asked(columns=["pk", "data"]), "this one gives pk, data in plain+zstd. Open another exchange for it."),
        (asked(profile="compact"), "org_id in compact+zstd. Open another exchange for it."),
        (b"events:*:yesterday:now:10", "A ticket must have a start and an end"),
    ],
)
def test_a_ticket_that_cannot_be_answered_ends_the_call_after_the_answers_before_it(
    client: flight.FlightClient, later: bytes, sentence: str
) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(asked(limit=5)))
    with pytest.raises(pa.ArrowInvalid) as refused, writer:
        assert answer(reader)[1]["rows"] == 5
        writer.write_metadata(later)
        writer.write_metadata(asked(limit=5))
        answer(reader)
    assert sentence in str(refused.value)


def test_batches_are_refused(client: flight.FlightClient) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b""))
    with (
        pytest.raises(pa.ArrowInvalid, match="An exchange takes tickets, each as the metadata of a message, and no batches"),
        writer,
    ):
        writer.begin(pa.schema([("a", pa.int64())]))
        writer.write_batch(pa.record_batch({"a": [1]}))
        reader.read_chunk()


def test_a_path_is_no_ticket(client: flight.FlightClient) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_path("events"))
    with pytest.raises(pa.ArrowInvalid, match="must be a command that holds its first ticket"), writer:
        reader.read_chunk()


@pytest.fixture
def shared(lake: Lake, tmp_path: Path, start_server: Callable[..., FlightServer]) -> tuple[FlightServer, str]:
    """A server whose caller is of one tenant, with the caller's token."""
    publish(lake, hour(0), lake_events(hour(0), 1_000))
    token, line = new_token("ada", TENANTS[0], ["read"])
    (tmp_path / "tokens").write_text(line)
    return (
        start_server(
            lake,
            arrow_flight_tokens_file=str(tmp_path / "tokens"),
            arrow_flight_audit_log=str(tmp_path / "audit"),
            arrow_flight_max_rows=900,
            arrow_flight_stall_seconds=0.5,
            arrow_flight_max_streams_per_principal=1,
        ),
        token,
    )


def test_an_exchange_is_bound_like_a_stream(shared: tuple[FlightServer, str], tmp_path: Path) -> None:
    server, token = shared
    with connect(server.url, token=token) as ours:
        with ours.exchange() as exchange:
            ticket = "events:*:2026-11-01:2026-11-01T01:00:00Z:1000"
            first = exchange.read(ticket)
            assert set(first["org_id"].to_pylist()) == {TENANTS[0]}
            assert 450 < first.num_rows <= 900
            # Each ticket is a stream of its own; together they have more rows than one may have.
            assert exchange.read(ticket).equals(first)
            with pytest.raises(FlightBusy, match="already sends 1 streams to this principal"):
                ours.read(ticket)
        # A client that neither asks nor ends is cut.
        with flight.connect(server.url) as stock:
            options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())])
            writer, reader = stock.do_exchange(flight.FlightDescriptor.for_command(ticket.encode()), options)
            assert answer(reader)[0].num_rows == first.num_rows
            with pytest.raises(pa.ArrowException, match=r"its client sent nothing whole for 0\.5 s"), writer:
                reader.read_chunk()
    server.stop(0)
    calls = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(c["method"], c["rows"], c["reason"]) for c in calls if c["method"] == "DoExchange"] == [
        ("DoExchange", 2 * first.num_rows, None),
        ("DoExchange", first.num_rows, "idle"),
    ]


@pytest.mark.parametrize("profile", [None, "compact+lz4"])
def test_our_client_reads_ticket_after_ticket_and_checks_each_receipt(server: FlightServer, profile: str | None) -> None:
    with connect(server.url, profile=profile) as client, client.exchange() as exchange:
        for ticket in (ORDERS, NOTHING, ALL):
            stream = exchange.stream(ticket)
            assert stream.read_all().equals(client.read(ticket))
            assert stream.receipt is not None
        assert exchange.read(start="2026-11-01", end="2026-11-01T04:00:00Z", limit=5).num_rows == 5


def test_our_client_keeps_to_one_stream_at_a_time(server: FlightServer) -> None:
    with connect(server.url) as client, client.exchange() as exchange:
        next(exchange.stream(ALL))
        with pytest.raises(InputError, match="must be read to its end before the next one"):
            exchange.stream(ALL)


def test_our_client_gives_the_servers_sentence_for_each_ticket(server: FlightServer) -> None:
    with connect(server.url) as client:
        with client.exchange() as exchange, pytest.raises(TicketError, match="A ticket must have a start and an end"):
            exchange.read("events:*:yesterday:now:10")
        with client.exchange() as exchange:
            exchange.read(NOTHING)
            with pytest.raises(TicketError, match="All tickets of one exchange must give the same columns"):
                exchange.read(asked(columns=["pk"]))
