"""What a client gets when there is nothing to give: one sentence, and nothing of the server's inside."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

import pytest
from pyarrow import flight

from fraiseql_pipeline.flight import stream
from fraiseql_pipeline.flight.segment import Segment
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, nothing, publish
from tests.support.events import lake_events


def refusal(client: flight.FlightClient, ticket: str | bytes) -> tuple[type[Exception], str]:
    """The error and the server's sentence for a ticket, the same from every RPC that takes one."""
    calls = {
        "do_get": lambda: client.do_get(flight.Ticket(ticket)).read_all(),
        "get_flight_info": lambda: client.get_flight_info(flight.FlightDescriptor.for_command(ticket)),
    }
    refused = []
    for call in calls.values():
        with pytest.raises(Exception) as error:  # noqa: PT011 - which class is the caller's assertion
            call()
        sentence = re.search(r"with message: (.*?)(\. Detail: \w+|\. gRPC client debug context|$)", str(error.value), re.DOTALL)
        assert sentence is not None, str(error.value)
        refused.append((error.type, sentence[1]))
    assert refused[0] == refused[1]
    return refused[0]


BAD_TICKETS = [
    b"",
    b"events",
    b"events:Order",
    b"events:Order:2026-11-01:2026-11-02",
    b"events:Order:yesterday:now:100",
    b"events:Order:2026-11-02:2026-11-01:100",
    b"events:Order:now-1h:now:0",
    b"events:Order:now-1h:now:-5",
    b"events:Order:now-1h:now:many",
    b"events:Order:2026-13-45:now:100",
    b"events:*:now-99999999999d:now:100",
    b"events::now-1h:now:100",
    b"orders:Order:now-1h:now:100",
    b"\xff\xfe\x00binary",
    b"{",
    b"[]",
    b"null",
    b"SELECT * FROM events",
    b"events:Order:now-1h:now:" + b"9" * 5_000,
    "events:Größe\u2028:now-1h:now:x".encode(),
]


@pytest.mark.parametrize("ticket", BAD_TICKETS, ids=lambda ticket: repr(ticket[:40]))
def test_a_bad_ticket_gets_one_sentence(client: flight.FlightClient, ticket: bytes) -> None:
    kind, sentence = refusal(client, ticket)
    assert issubclass(kind, ValueError)  # pyarrow's class for INVALID_ARGUMENT
    assert sentence.endswith(".")
    assert len(sentence) < 500
    assert "\n" not in sentence
    assert not re.search(r"Traceback|File |\.py|site-packages|/tmp|/home|Error:", sentence)


def test_a_hole_in_the_range_is_named_and_not_skipped(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number in (0, 2, 9):
        publish(lake, hour(number), lake_events(hour(number), 5))
    with flight.connect(start_server(lake).url) as client:
        _, sentence = refusal(client, "events:*:2026-11-01:2026-11-01T10:00:00:100")
        assert sentence == (
            "The asked range has 7 window(s) that are not published although later ones are: "
            "2026-11-01-01:00, 2026-11-01-03:00, 2026-11-01-04:00 and 4 more; "
            "materialize them, or ask with allow_missing for what is there."
        )
        _, sentence = refusal(client, "events:*:2026-11-01T01:20:00:2026-11-01T01:30:00:100")
        assert "has 1 window(s)" in sentence
        assert "2026-11-01-01:00;" in sentence
        # A range beside the holes is whole.
        assert client.do_get(flight.Ticket("events:*:2026-11-01T02:00:00:2026-11-01T03:00:00:100")).read_all().num_rows == 5


def test_a_ticket_may_allow_holes(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for number in (0, 2):
        publish(lake, hour(number), lake_events(hour(number), 5))
    ticket = '{"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-02", "allow_missing": true}'
    with flight.connect(start_server(lake).url) as client:
        *_, last = client.do_get(flight.Ticket(ticket))
        assert b'"rows": 10' in last.app_metadata.to_pybytes()
        assert b'"missing_windows": 1' in last.app_metadata.to_pybytes()


def test_what_lies_before_the_first_window_of_the_settings_is_not_missing(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(5), lake_events(hour(5), 5))
    ticket = "events:*:2020-01-01:2026-11-02:100"
    with flight.connect(start_server(lake, start=hour(5).start).url) as client:
        assert client.do_get(flight.Ticket(ticket)).read_all().num_rows == 5
    with flight.connect(start_server(lake, start=hour(4).start).url) as client:
        assert "2026-11-01-04:00;" in refusal(client, ticket)[1]


def test_an_empty_lake_is_not_found_rather_than_an_empty_table(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    with flight.connect(start_server(lake).url) as client:
        kind, sentence = refusal(client, "events:*:now-1h:now:100")
    assert issubclass(kind, KeyError)  # pyarrow's class for NOT_FOUND
    assert sentence == "Nothing is published in the lake yet; run fraiseql-pipeline materialize first."


def test_a_range_after_everything_published_is_an_empty_stream(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), nothing())
    with flight.connect(start_server(lake).url) as client:
        assert client.do_get(flight.Ticket("events:*:2026-12-01:2026-12-02:100")).read_all().num_rows == 0


SECRET = "postgresql://admin:hunter2@db.internal/prod"


def broken(lake: Lake, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[list[object]], Iterator[object]]) -> Lake:
    """The same lake, whose reads give what ``spoil`` makes of their parts."""
    read = stream.segments

    def spoiled(*args: object, **kwargs: object) -> Iterator[object]:
        return spoil([Segment(found.dictionaries, iter(list(found.batches))) for found in read(*args, **kwargs)])

    monkeypatch.setattr(stream, "segments", spoiled)
    return lake


@pytest.mark.parametrize("sent", [0, 1], ids=["before the first batch", "in the middle"])
def test_a_defect_leaks_nothing_and_is_found_in_the_log(
    lake: Lake,
    start_server: Callable[..., FlightServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: int,
) -> None:
    def spoil(batches: list[object]) -> Iterator[object]:
        yield from batches[:sent]
        raise ValueError(SECRET)

    publish(lake, hour(0), lake_events(hour(0), 5))
    server = start_server(broken(lake, monkeypatch, spoil))
    with flight.connect(server.url) as client, pytest.raises(flight.FlightInternalError) as error:
        client.do_get(flight.Ticket("events:*:2026-11-01:now:100")).read_all()
    assert "hunter2" not in str(error.value)
    incident = re.search(r"Internal error, id ([0-9a-f]{12}); the server's log has the details under this id\.", str(error.value))
    assert incident is not None
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert incident[1] in logged.getMessage()
    assert logged.exc_info is not None
    assert SECRET in str(logged.exc_info[1])


def test_a_read_that_is_shorter_than_its_commits_is_an_error(
    lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    server = start_server(broken(lake, monkeypatch, lambda batches: iter(batches[:-1])))
    with flight.connect(server.url) as client, pytest.raises(flight.FlightInternalError) as error:
        client.do_get(flight.Ticket("events:*:2026-11-01:now:100")).read_all()
    assert "run fraiseql-pipeline fsck" in str(error.value)


def test_a_request_above_the_limit_is_refused_before_it_is_read(client: flight.FlightClient) -> None:
    with pytest.raises(Exception, match="larger than max"):
        client.do_get(flight.Ticket(b"events:" + b"x" * 300_000)).read_all()


def test_a_stream_too_many_is_refused_and_the_next_one_served(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 100_000))
    server = start_server(lake, arrow_flight_max_streams=2)
    # Uncompressed, so that what gRPC buffers cannot hold a stream whole.
    everything = flight.Ticket(
        '{"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "now", "batch_size": 10000, "codec": "none"}'
    )
    with flight.connect(server.url) as client:
        held = [client.do_get(everything) for _ in range(2)]
        for reader in held:
            reader.read_chunk()  # both are being sent, and wait for us
        with pytest.raises(Exception, match=r"resource exhausted error.*already sends 2 streams, its limit; try again in a moment"):
            client.do_get(everything).read_all()
        # Planning is no stream.
        assert client.get_flight_info(flight.FlightDescriptor.for_command("events:*:2026-11-01:now:1")).total_records == 100_000
        held[0].read_all()
        assert client.do_get(everything).read_all().num_rows == 100_000
        held[1].read_all()
