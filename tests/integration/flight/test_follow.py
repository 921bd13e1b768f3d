"""Streams that go on: every event as it settles, whoever falls behind, is cut, or has read at another server before."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pyarrow import flight

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import FlightUnavailable, TicketError
from fraiseql_pipeline.flight import follow as module
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.support.following import HOUR, LAST, Followed, Follower, followed
from tests.support.reading import fill
from tests.support.waiting import eventually


def test_a_follower_gets_nothing_up_to_the_key_it_has(live: Followed) -> None:
    before = live.write(datetime.now(UTC), 2)
    live.reaches(before[-1])
    reached = before[-1] + 3  # on another server
    one = Follower(live.client, after_pk=reached)
    later = live.write(datetime.now(UTC), 5)
    eventually(lambda: one.stream.settled_pk == later[-1])
    assert one.keys == [pk for pk in later if pk > reached]
    one.stream.close()
    one.ended()


def test_a_key_that_the_log_does_not_come_to_is_told(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEHIND_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    live.reaches(live.write(datetime.now(UTC))[-1])
    one = Follower(live.client, after_pk=10**9)
    one.ended()
    assert isinstance(one.error, FlightUnavailable)
    assert "has not come to the key 1000000000 here" in str(one.error)


def test_a_follower_gets_what_is_ahead_of_the_clock_once(live: Followed) -> None:
    past = live.write(datetime.now(UTC) + 2 * HOUR)
    live.reaches(past[-1])
    one = Follower(live.client)
    eventually(lambda: one.keys == past)
    past += live.write(datetime.now(UTC) + 2 * HOUR)
    eventually(lambda: one.keys == past)
    one.stream.close()
    one.ended()


def test_a_follower_who_has_had_what_one_stream_may_have_gets_a_receipt_and_goes_on(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    with followed(changelog_url, lake, start_server, arrow_flight_max_rows=3) as live:
        written = live.write(datetime.now(UTC), 2)
        live.reaches(written[-1])
        one = Follower(live.client, start="now-1h")
        eventually(lambda: one.keys == written)
        written += live.write(datetime.now(UTC))
        eventually(lambda: one.keys == written)
        [more] = live.write(datetime.now(UTC))
        one.ended()
        receipt = one.stream.receipt
        assert one.error is None
        assert receipt is not None
        assert (one.keys, receipt.settled_pk) == (written, written[-1])
        with live.client.stream(receipt.next_ticket) as stream:
            assert next(stream)["pk"].to_pylist() == [more]
        fill(changelog_url, 4, "now()")
        eventually(lambda: live.service.buffer.settled_pk >= more + 4)
        with pytest.raises(TicketError, match="more than 3 events"):
            live.client.read(receipt.next_ticket)  # what one turn has too many of is no end that could be gone on from


def test_a_follower_whom_a_limit_cuts_is_told_the_key_up_to_which_it_has_everything(live: Followed) -> None:
    past = live.write(datetime.now(UTC), 3)
    live.reaches(past[-1])
    one = Follower(live.client, start="now-1h", limit=2)
    one.ended()
    assert (one.keys, one.stream.settled_pk) == (past[:2], None)
    asked = {"type": "events", "entity_type": "*", "start": "now-1h", "end": "now", "columns": ["pk"], "follow": True, "limit": 5}
    reader = live.client._flight.do_get(flight.Ticket(json.dumps(asked)))
    assert [pk for chunk in turn(reader, past[-1]) for pk in chunk.data["pk"].to_pylist()] == past
    fill(live.url, 6, "now() - n * interval '1 second'")  # the newest key first
    cut = turn(reader, past[-1])
    assert sum(chunk.data.num_rows for chunk in cut) == 2
    assert [chunk.app_metadata for chunk in cut[:-1]] == [None] * (len(cut) - 1), "the turn that was cut tells no key"
    assert json.loads(cut[-1].app_metadata.to_pybytes())["rows"] == 5
    live.reaches(past[-1] + 6)
    assert sorted(live.keys(after_pk=past[-1])) == list(range(past[-1] + 1, past[-1] + 7))


def turn(reader: flight.FlightStreamReader, pk: int) -> list[Any]:
    """The messages of a stream up to the one that tells a key, which is this one."""
    found = [reader.read_chunk()]
    while found[-1].app_metadata is None:
        found.append(reader.read_chunk())
    assert json.loads(found[-1].app_metadata.to_pybytes())["settled_pk"] == pk
    return found


@contextmanager
def busy(live: Followed) -> Iterator[list[int]]:
    """Events of a type nobody asks for, one after the other; their keys."""
    over, written = threading.Event(), []

    def write() -> None:
        while not over.is_set():
            written.extend(live.write(datetime.now(UTC), object_type="Often"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield written
    finally:
        over.set()
        writer.join()


def test_a_follower_of_what_is_rare_is_told_how_far_it_is_while_others_events_settle(
    live: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    one = Follower(live.client, entity_types=["Rare"])
    eventually(lambda: one.stream.settled_pk is not None)
    with busy(live) as written:
        eventually(lambda: len(written) > 1)
        eventually(lambda: (one.stream.settled_pk or 0) >= written[0])
    one.stream.close()
    one.ended()


def test_a_stream_that_follows_up_to_a_time_has_all_that_settled_before_it_ended(
    live: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock passes the end while a turn is sent: what settled meanwhile is sent still."""
    end = datetime.now(UTC) + HOUR
    gate = threading.Event()
    turn, reached = module._turn, live.service.buffer.reached

    def held_up(*arguments: Any) -> Iterator[bytes]:
        gate.wait(30)
        return turn(*arguments)

    monkeypatch.setattr(module, "_turn", held_up)
    one = Follower(live.client, end=end)
    eventually(lambda: one.stream.settled_pk is not None)
    written = live.write(datetime.now(UTC))
    live.reaches(written[-1])
    written += live.write(datetime.now(UTC))
    live.reaches(written[-1])
    monkeypatch.setattr(live.service.buffer, "reached", lambda settled_pk, _: reached(settled_pk, end))
    eventually(lambda: live.service.buffer.settled_at == end)
    gate.set()
    one.ended()
    assert one.error is None
    assert one.keys == written
    assert one.stream.receipt is not None
    assert one.stream.receipt.complete_through == end


def test_an_event_that_nanoseconds_cannot_hold_ends_no_stream(live: Followed) -> None:
    plain, keys = Follower(live.client), Follower(live.client, columns=["pk"])
    first = live.write(datetime.now(UTC))
    eventually(lambda: plain.keys == keys.keys == first)
    far = live.write(datetime(2300, 1, 1, tzinfo=UTC))
    live.reaches(far[-1])
    later = live.write(datetime.now(UTC))
    eventually(lambda: keys.keys == [*first, *far, *later])
    eventually(lambda: plain.keys == [*first, *later])
    for one in (plain, keys):
        assert one.error is None
        one.stream.close()
        one.ended()


def test_a_follower_gets_the_past_and_then_every_event_as_it_settles(live: Followed) -> None:
    past = live.write(LAST, 2)
    live.materialize(LAST)
    past += live.write(datetime.now(UTC))
    live.reaches(past[-1])
    one = Follower(live.client, start=LAST - HOUR)
    eventually(lambda: one.keys == past)
    late = live.write(LAST)
    eventually(lambda: one.keys == [*past, *late])
    now = live.write(datetime.now(UTC), 5)
    eventually(lambda: one.keys == [*past, *late, *now])
    eventually(lambda: one.stream.settled_pk == now[-1])
    live.server.stop(5)
    one.ended()
    assert one.error is None
    assert one.stream.receipt is not None
    assert one.stream.receipt.rows == len(one.keys)
    assert one.stream.receipt.settled_pk == now[-1]


@pytest.mark.parametrize("profile", ["plain", "compact+zstd", "compact+lz4"])
def test_followers_get_only_what_they_asked_for(live: Followed, profile: str) -> None:
    with connect(live.server.url, profile=profile) as client:
        orders = Follower(client, entity_types=["Order"], columns=["pk", "entity_type", "event_id", "org_id"])
        few = Follower(client, limit=2)
        live.write(datetime.now(UTC), object_type="User")
        wanted = live.write(datetime.now(UTC), 3)
        live.write(LAST, object_type="Order")  # before its start
        eventually(lambda: orders.keys == wanted)
        few.ended()
        assert few.error is None
        assert len(few.keys) == 2
        orders.stream.close()
        orders.ended()


def test_dictionaries_outlast_what_is_said_between_events(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    past = live.write(datetime.now(UTC))
    live.reaches(past[-1])
    with connect(live.server.url, profile="compact") as client:
        one = Follower(client, start="now-1h", columns=["pk", "entity_type", "event_type"])
        eventually(lambda: one.keys == past)
        for number in range(2):
            said = len(one.batches)
            new = live.write(datetime.now(UTC))
            eventually(lambda said=said: len(one.batches) > said or one.error is not None)  # type: ignore[misc]
            assert one.error is None, number
            assert one.batches[-1].to_pylist() == [{"pk": new[0], "entity_type": "Order", "event_type": "Created"}]
        one.stream.close()
        one.ended()


def test_a_follower_that_was_cut_goes_on_where_it_was(live: Followed) -> None:
    first = Follower(live.client)
    written = live.write(datetime.now(UTC), 2)
    eventually(lambda: first.stream.settled_pk == written[-1])
    assert first.keys == written
    first.stream.close()
    first.ended()
    missed = live.write(datetime.now(UTC), 3)
    second = Follower(live.client, start=LAST, after_pk=first.stream.settled_pk)
    eventually(lambda: second.keys == missed)
    second.stream.close()
    second.ended()


def test_a_follower_that_fell_behind_reads_what_it_missed(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    from fraiseql_pipeline.flight import rounds

    monkeypatch.setattr(rounds, "ROUNDS_BYTES", 0)  # one round is kept
    gate = threading.Event()
    gate.set()
    turn = module._turn

    def held_up(*arguments: Any) -> Iterator[bytes]:
        gate.wait(30)
        return turn(*arguments)

    monkeypatch.setattr(module, "_turn", held_up)
    one = Follower(live.client)
    written = live.write(datetime.now(UTC))
    eventually(lambda: one.keys == written)
    gate.clear()
    for _ in range(3):
        written += live.write(datetime.now(UTC))
        live.reaches(written[-1])
    gate.set()
    eventually(lambda: one.keys == written)
    one.stream.close()
    one.ended()


def test_a_stream_that_follows_ends_with_its_receipt_before_its_time_is_over(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    with followed(changelog_url, lake, start_server, arrow_flight_max_stream_seconds=1.0) as live:
        one = Follower(live.client)
        one.ended()
        assert one.error is None
        assert one.stream.receipt is not None
        assert one.stream.receipt.next_ticket is not None
        assert '"follow":true' in one.stream.receipt.next_ticket


def test_a_stream_can_follow_up_to_a_time(live: Followed) -> None:
    end = datetime.now(UTC) + timedelta(seconds=1)
    one = Follower(live.client, end=end)
    inside, outside = live.write(datetime.now(UTC)), live.write(end)
    one.ended()
    assert one.error is None
    assert one.keys == inside
    assert outside


@pytest.mark.parametrize("asked", [{"end": "now-1h", "start": "now-2h"}, {"table_version": 0}])
def test_what_cannot_be_followed_is_refused(live: Followed, asked: dict[str, Any]) -> None:
    with pytest.raises(TicketError, match='with "follow" must end now or later, and name no "table_version"'):
        live.client.read(**{"start": "now-1h", "follow": True, **asked})


def test_what_settles_is_followed_whatever_was_to_be_published(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    with followed(changelog_url, lake, start_server, start=datetime(2030, 1, 1, tzinfo=UTC)) as live:
        one = Follower(live.client)
        written = live.write(datetime.now(UTC))
        eventually(lambda: one.keys == written)
        one.stream.close()
        one.ended()
