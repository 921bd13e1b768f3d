"""``connect``: the same events as with pyarrow.flight, and errors of this package's tree."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import flight

from fraiseql_pipeline import errors
from fraiseql_pipeline.errors import FlightBusy, FlightUnavailable, InputError, LakeEmpty, TicketError, WindowMissing
from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.flight import service as service_module
from fraiseql_pipeline.flight.client import Client, connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import lake_events
from tests.support.following import Followed

ALL = "events:*:2026-11-01T00:00:00Z:2026-11-01T04:00:00Z:10000"


@pytest.fixture
def ours(server: FlightServer) -> Iterator[Client]:
    with connect(server.url) as connected:
        yield connected


def test_a_read_is_what_pyarrow_reads(ours: Client, client: flight.FlightClient) -> None:
    expected = client.do_get(flight.Ticket(ALL)).read_all()
    assert ours.read(ALL).equals(expected)
    assert ours.read(ALL.encode()).equals(expected)
    assert ours.read(start=hour(0).start.replace(tzinfo=None), end="2026-11-01T04:00:00Z").equals(expected)
    assert ours.read(start=hour(0).start, end=hour(3).end, entity_types=[]).equals(expected)
    assert pa.Table.from_batches(ours.stream(ALL)).equals(expected)


def test_arguments_make_the_ticket(ours: Client) -> None:
    hour_one = {"start": hour(1).start, "end": hour(1).end}
    orders = ours.read(**hour_one, entity_types="Order", columns=["entity_type", "pk"])
    assert orders.column_names == ["entity_type", "pk"]
    assert set(orders["entity_type"].to_pylist()) == {"Order"}
    both = ours.read(**hour_one, entity_types=["Order", "User"])
    assert set(both["entity_type"].to_pylist()) == {"Order", "User"}
    assert ours.read(**hour_one, limit=7).equals(ours.read(**hour_one).slice(0, 7))
    assert max(batch.num_rows for batch in ours.stream(**hour_one, batch_size=10)) <= 10
    day = MIDNIGHT.date()
    assert ours.read(start=day, end=day + timedelta(days=1), allow_missing=True).equals(ours.read(ALL))


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_codec_gives_the_same_events(ours: Client, codec: str) -> None:
    assert ours.read(start=hour(0).start, end=hour(0).end, codec=codec).equals(ours.read(start=hour(0).start, end=hour(0).end))


def test_polars_reads_tables_and_streams(ours: Client) -> None:
    expected = pl.DataFrame(ours.read(ALL))
    assert expected.height == 6_000
    assert ours.polars(ALL).equals(expected)
    assert pl.DataFrame(ours.stream(ALL)).equals(expected)


def test_pandas_reads_a_table(ours: Client) -> None:
    assert len(ours.pandas(ALL)) == 6_000


def test_info_tells_rows_and_how_far_the_events_are_complete(ours: Client) -> None:
    info = ours.info("events:*:2026-11-01:2026-11-05:100")
    assert (info.rows, info.complete_through, info.schema) == (6_000, hour(3).end, WIRE_SCHEMA)
    assert ours.info("events:Order:2026-11-01:2026-11-05:100").rows is None


def test_the_receipt_is_there_when_a_stream_was_read_to_its_end(ours: Client) -> None:
    with ours.stream(ALL) as stream:
        next(stream)
        assert stream.receipt is None
        stream.read_all()
        assert stream.receipt is not None
        assert stream.receipt.rows == 6_000


def test_a_table_keeps_what_the_receipt_says(ours: Client, lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number, state in ((0, "sealed"), (2, "provisional")):
        publish(lake, hour(number), lake_events(hour(number), 5), state=state)
    with connect(start_server(lake).url) as holed, holed.exchange() as exchange:
        for read in (holed.read, exchange.read):
            kept = read(start=hour(0).start, end="2026-11-05", allow_missing=True).schema.metadata
            assert kept[b"fraiseql.complete_through"] == hour(2).end.isoformat().encode()
            assert (kept[b"fraiseql.missing_windows"], kept[b"fraiseql.provisional_windows"]) == (b"1", b"1")
            assert int(kept[b"fraiseql.table_version"]) == lake.snapshot().version
            assert json.loads(kept[b"fraiseql.next_ticket"])["start"] == hour(2).end.isoformat()
    compact = ours.read(start=hour(0).start, end=hour(1).end, profile="compact", limit=5).schema.metadata
    assert compact[b"fraiseql.encoding"].startswith(b"compact")
    assert compact[b"fraiseql.complete_through"] == hour(1).end.isoformat().encode()
    assert b"fraiseql.next_ticket" not in compact, "what a limit cut off may be anywhere"


def test_errors_are_of_this_packages_tree_with_the_sentence_of_the_server(
    ours: Client, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    for call in (ours.read, ours.info, ours.stream):
        with pytest.raises(TicketError, match=r"^A ticket must look like events:.*got 'nonsense'\.$"):
            call("nonsense")
    with (
        connect(start_server(lake).url) as empty,
        pytest.raises(LakeEmpty, match=r"^Nothing is published in the lake yet;.*first\.$"),
    ):
        empty.read(ALL)
    for number in (0, 2):
        publish(lake, hour(number), lake_events(hour(number), 5))
    with connect(start_server(lake).url) as holed:
        with pytest.raises(WindowMissing, match=r"^The asked range has 1 window\(s\).*what is there\.$"):
            holed.read(ALL)
        assert holed.read(start=hour(0).start, end=hour(3).end, allow_missing=True).num_rows == 10


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (errors.WindowMissing("A hole."), errors.WindowMissing),
        (errors.SourceRefused("A role."), errors.SourceRefused),
        (errors.ValidationHalted("A halt."), errors.ValidationHalted),
        (errors.LakeDamaged("A tear."), errors.LakeDamaged),
        (errors.LakeUnavailable("A storage."), FlightUnavailable),
        (errors.NotOffered("A call."), errors.NotOffered),
        (errors.NotAllowed("A scope."), errors.NotAllowed),
        (RuntimeError("a secret"), errors.FlightRefused),
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind events"])
def test_an_error_has_its_class_and_is_retryable_only_where_another_try_may_help(
    lake: Lake,
    start_server: Callable[..., FlightServer],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[errors.PipelineError],
    behind: bool,
) -> None:
    def fail(*_: object, **__: object) -> Iterator[bytes]:
        raise raised

    publish(lake, hour(0), lake_events(hour(0), 5))
    with connect(start_server(lake).url) as client:
        monkeypatch.setattr(service_module, "receipt_frames" if behind else "plan", fail)
        with pytest.raises(errors.PipelineError) as found:
            client.read(ALL)
    assert type(found.value) is expected
    assert found.value.retryable == getattr(raised, "retryable", False)
    assert (str(raised) in str(found.value)) == isinstance(raised, errors.PipelineError)


def test_an_action_the_server_does_not_know_is_not_offered(ours: Client) -> None:
    with pytest.raises(errors.NotOffered, match="There is no such action; this server has healthcheck"):
        ours._act("nonsense", b"", "nothing")


def test_a_server_at_its_limit_is_busy(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 100_000))
    with connect(start_server(lake, arrow_flight_max_streams=1).url) as client:
        with client.stream("events:*:2026-11-01:now:1000") as held:
            next(held)
            with pytest.raises(FlightBusy, match="try again in a moment"):
                client.read("events:*:2026-11-01:now:1000")


def test_a_call_that_takes_longer_than_it_may_is_told_as_one(live: Followed) -> None:
    with (
        connect(live.server.url, timeout_seconds=0.2) as client,
        pytest.raises(FlightUnavailable, match="took longer than the timeout_seconds it was given"),
    ):
        client.read(start="now-1h", follow=True)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="timeout_seconds must be more than 0"):
        connect(timeout_seconds=seconds)


def test_no_server_is_told_in_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{unused.getsockname()[1]}"
        with connect(url) as client, pytest.raises(FlightUnavailable, match=f"^No Flight server answers at {url}; start one with"):
            client.read(ALL)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "at least a start"),
        ({"ticket": ALL, "start": "now-1h"}, "a ticket or what it is made of"),
        ({"start": "now-1h", "limit": np.int64(5)}, "must be texts.*got limit of type int64, start of type str"),
        ({"ticket": "events:\udcff:now-1h:now:5"}, "must be UTF-8 text, byte 7 is not"),
    ],
)
def test_arguments_that_make_no_ticket_are_refused(ours: Client, asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TicketError, match=complaint):
        ours.read(**asked)


class LyingServer(flight.FlightServerBase):
    """Sends three events and then a receipt for four, a receipt nobody can read, or none."""

    def do_get(self, context: object, ticket: flight.Ticket) -> flight.FlightDataStream:
        batch = pa.record_batch([pa.array([1, 2, 3])], ["pk"])
        receipts = {
            b"wrong": {
                "rows": 4,
                "table_version": 1,
                "complete_through": "2026-11-01",
                "provisional_windows": 0,
                "missing_windows": 0,
            },
            b"unreadable": {"rows": 3},
        }
        messages: list[object] = [batch]
        if ticket.ticket in receipts:
            messages.append((batch.slice(0, 0), json.dumps(receipts[ticket.ticket]).encode()))
        return flight.GeneratorStream(batch.schema, messages)


@pytest.mark.parametrize(
    ("ticket", "complaint"),
    [
        ("wrong", "does not match its receipt of 4 events after 3 events; read it again"),
        ("unreadable", "receipt cannot be read"),
        ("none", "ended without its receipt after 3 events; read it again"),
    ],
)
def test_a_stream_without_a_true_receipt_is_an_error(ticket: str, complaint: str) -> None:
    with LyingServer("grpc://127.0.0.1:0") as server, connect(f"grpc://127.0.0.1:{server.port}") as client:
        with pytest.raises(FlightUnavailable, match=complaint):
            client.read(ticket)
