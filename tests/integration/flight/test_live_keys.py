"""Next tickets on a server that follows a log: every event of the range once, whatever its time, whichever server settled further."""

from __future__ import annotations

import base64
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pyarrow import flight

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.errors import FlightUnavailable, SourceRefused, TicketError
from fraiseql_pipeline.flight import live as live_module
from fraiseql_pipeline.flight import service
from fraiseql_pipeline.flight import turns as turns_module
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import Client
from fraiseql_pipeline.flight.received import Receipt
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import publish
from tests.support.events import TENANTS, lake_events
from tests.support.following import HOUR, KEYS, LAST, Followed, Follower, followed
from tests.support.reading import execute, insert
from tests.support.waiting import eventually


def read(client: Client, ticket: str | None = None, **asked: Any) -> tuple[list[int], Receipt]:
    with client.stream(ticket) if ticket is not None else client.stream(columns=KEYS, **asked) as stream:
        keys = stream.read_all()["pk"].to_pylist()
    assert stream.receipt is not None
    return keys, stream.receipt


def test_what_has_settled_ahead_of_the_clock_is_in_a_read_up_to_now_and_never_skipped_by_the_next(live: Followed) -> None:
    written = live.write(datetime.now(UTC)) + live.write(datetime.now(UTC) + 2 * HOUR)
    live.reaches(written[-1])
    keys, receipt = read(live.client, start="now-1h")
    assert keys == written
    assert receipt.settled_pk == written[-1]
    assert receipt.complete_through <= datetime.now(UTC)
    keys, receipt = read(live.client, receipt.next_ticket)
    assert keys == []
    later = live.write(datetime.now(UTC)) + live.write(datetime.now(UTC) + HOUR)
    live.reaches(later[-1])
    assert read(live.client, receipt.next_ticket)[0] == later


def test_what_settles_while_a_view_is_made_is_in_it_or_in_the_next(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    written = live.write(datetime.now(UTC))
    live.reaches(written[-1])
    files = live.service.buffer.files

    def after_an_event(floors: dict[int, int]) -> Any:
        if len(written) == 1:
            written.extend(live.write(datetime.now(UTC)))
            live.reaches(written[-1])
        return files(floors)

    monkeypatch.setattr(live.service.buffer, "files", after_an_event)
    first, receipt = read(live.client, start="now-1h")
    assert [*first, *read(live.client, receipt.next_ticket)[0]] == written


def test_what_was_written_ahead_of_the_clock_before_the_server_is_read_through(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    ahead = datetime.now(UTC) + 3 * HOUR
    pk = insert(changelog_url, created_at=ahead)
    with followed(changelog_url, lake, start_server) as live:
        live.reaches(pk)
        assert live.keys() == [pk]
        assert live.keys(end=ahead - HOUR) == []
        assert live.keys(start="now", end=ahead + HOUR) == [pk]


def test_only_a_stream_knows_from_where_to_go_on(live: Followed) -> None:
    written = live.write(datetime.now(UTC))
    live.reaches(written[-1])
    assert live.client.info(start="now-1h").next_ticket is None
    assert read(live.client, start="now-1h")[1].next_ticket is not None


def test_the_next_ticket_of_a_range_that_ends_has_the_same_end(live: Followed) -> None:
    inside, behind = live.write(LAST, 2), live.write(LAST + HOUR)
    live.reaches(behind[-1])
    keys, receipt = read(live.client, start=LAST, end=LAST + HOUR)
    assert keys == inside
    late = live.write(LAST)
    live.materialize(LAST)
    live.reaches(late[-1])
    keys, receipt = read(live.client, receipt.next_ticket)
    assert keys == late, "of a range that is all in the lake by now"
    assert receipt.settled_pk == late[-1]
    later = live.write(LAST) + live.write(LAST + HOUR)
    live.reaches(later[-1])
    assert read(live.client, receipt.next_ticket)[0] == later[:1], "and nothing from behind its end"
    assert json.loads(receipt.next_ticket or "")["end"] == (LAST + HOUR).replace(tzinfo=None).isoformat() + "Z"


def test_a_range_that_is_all_in_the_lake_reaches_to_what_has_settled(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    settings = Settings(database_url=changelog_url, lake_uri=lake.uri, start=LAST, seal_timeout_seconds=0)
    old = insert(changelog_url, created_at=LAST)
    log = ChangeLog(changelog_url, settings)
    pipeline.materialize([Window(LAST, WindowSize.HOUR)], settings=settings, changelog=log, lake=lake)
    log.close()
    with followed(changelog_url, lake, start_server) as live:
        new = live.write(datetime.now(UTC))[-1]
        live.reaches(new)
        info = live.client.info(start=LAST, end=LAST + HOUR)
        assert (info.rows, info.settled_pk, info.complete_through) == (1, new, LAST + HOUR)
        assert live.keys(start=LAST, end=LAST + HOUR) == [old]


def test_a_key_that_another_server_has_reached_does_not_fall(live: Followed) -> None:
    written = live.write(datetime.now(UTC), 3)
    live.reaches(written[-1])
    reached = written[-1] + 2
    keys, receipt = read(live.client, start="now-1h", after_pk=reached)
    assert (keys, receipt.settled_pk) == ([], reached)
    later = live.write(datetime.now(UTC), 4)
    live.reaches(later[-1])
    assert read(live.client, receipt.next_ticket)[0] == [pk for pk in later if pk > reached]


def test_what_is_above_a_key_is_not_answered_from_the_lake_alone(live: Followed, postgres: str) -> None:
    old = live.write(LAST)
    live.materialize(LAST)
    live.reaches(old[-1])
    with disconnected(live, postgres):
        assert live.keys(start=LAST) == old
        with pytest.raises(FlightUnavailable, match="cannot be followed right now"):
            live.keys(start=LAST, after_pk=0)


def test_what_the_lake_alone_answers_has_no_next_ticket_where_a_log_is_followed(live: Followed, postgres: str) -> None:
    behind, old = live.write(LAST + HOUR), live.write(LAST)
    live.materialize(LAST)
    late = live.write(LAST)
    live.reaches(late[-1])
    keys, receipt = read(live.client, start=LAST, end=LAST + HOUR, table_version=live.lake.snapshot().version)
    assert (keys, receipt.settled_pk, receipt.next_ticket) == (old, old[-1], None), "of a version"
    with disconnected(live, postgres):
        keys, receipt = read(live.client, start=LAST)
        assert (keys, receipt.next_ticket) == (old, None), "it would begin behind what is late"
        assert receipt.settled_pk is None, "what is not published has smaller keys"
        assert live.client.info(start=LAST).next_ticket is None
    eventually(lambda: live.service.up)
    keys, receipt = read(live.client, start=LAST)
    assert keys == [*old, *late, *behind]
    assert receipt.next_ticket is not None


def test_nothing_published_and_no_log_is_for_a_moment(live: Followed, postgres: str) -> None:
    live.reaches(live.write(datetime.now(UTC))[-1])
    with disconnected(live, postgres), pytest.raises(FlightUnavailable, match="Nothing is published in the lake yet, and") as error:
        live.keys(start="now-1h")
    assert error.value.retryable


def test_a_range_without_events_is_an_empty_stream_where_nothing_is_published(live: Followed) -> None:
    assert live.keys(start=LAST, end=LAST + HOUR) == []
    assert live.keys(start=datetime.now(UTC) + HOUR, end=datetime.now(UTC) + 2 * HOUR) == []


def test_a_lake_that_is_published_from_another_log_moves_nothing_in_this_one(live: Followed) -> None:
    old = live.write(LAST, 3)
    live.reaches(old[-1])
    live.materialize(LAST)
    other = Window(LAST - HOUR, WindowSize.HOUR)
    publish(live.lake, other, lake_events(other, 5))
    assert len(live.keys(start=LAST - HOUR, end=LAST + HOUR)) == 8, "the lake alone"
    with pytest.raises(SourceRefused, match="cannot be followed: the server refuses it"):
        live.keys(after_pk=0)
    eventually(lambda: not live.service.up)
    assert live.service.buffer.settled_pk == old[-1]
    new = live.write(datetime.now(UTC), 2)
    mended = [other, Window(LAST, WindowSize.HOUR)]
    pipeline.materialize(mended, settings=live.settings, changelog=live.log, lake=live.lake, force=True, allow_shrink=True)
    live.reaches(new[-1])
    assert live.keys(start=LAST) == [*old, *new]


def test_no_key_is_reached_before_the_log_has_drawn_it(live: Followed) -> None:
    old = live.write(LAST)
    live.reaches(old[-1])
    live.service._proved_pk = old[-1] + 1_000
    new = live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    assert live.service.buffer.settled_pk == new[-1]
    assert live.keys(start=LAST) == [*old, *new]


def test_a_log_that_was_emptied_begins_anew_for_everybody(live: Followed) -> None:
    old = live.write(datetime.now(UTC), 5)
    live.reaches(old[-1])
    one = Follower(live.client, start=LAST)
    eventually(lambda: one.keys == old)
    begun = live.service.rounds.epoch
    execute(live.url, "TRUNCATE core.tb_entity_change_log RESTART IDENTITY")
    eventually(lambda: live.service.rounds.epoch != begun and live.service.up)
    one.ended()
    assert "rebuilt or replaced" in str(one.error)
    new = live.write(datetime.now(UTC), 3)
    live.reaches(new[-1])
    assert live.keys(start=LAST) == new


def test_what_is_published_leaves_memory_also_where_nobody_reads(live: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_LOOK_SECONDS", 0.05)
    old = live.write(LAST, 3)
    live.reaches(old[-1])
    assert live.service.buffer.rows == 3
    live.materialize(LAST)
    eventually(lambda: live.service.buffer.rows == 0)


@contextmanager
def disconnected(live: Followed, postgres: str) -> Iterator[None]:
    """While the database of the log lets nobody in."""
    name = psycopg.conninfo.conninfo_to_dict(live.url)["dbname"]
    live.log.close()
    execute(postgres, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        execute(postgres, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        eventually(lambda: not live.service.up)
        yield
    finally:
        execute(postgres, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


# ------------------------------------------------------------------------------------------------------------- endpoints


def endpoints(live: Followed, options: flight.FlightCallOptions | None = None, **asked: Any) -> list[Any]:
    said = {"type": "events", "entity_type": "*", "start": LAST.isoformat(), "end": "now", "columns": list(KEYS)} | asked
    descriptor = flight.FlightDescriptor.for_command(json.dumps(said).encode())
    return list(live.client._flight.get_flight_info(descriptor, options or flight.FlightCallOptions()).endpoints)


def test_endpoints_together_have_no_more_events_than_the_limit(live: Followed) -> None:
    old = live.write(LAST, 4)
    live.materialize(LAST)
    live.reaches(live.write(datetime.now(UTC), 4)[-1])
    found = [pk for e in endpoints(live, limit=3) for pk in live.client._flight.do_get(e.ticket).read_all()["pk"].to_pylist()]
    assert found == old[:3]


def test_the_endpoint_of_a_ticket_that_follows_follows(live: Followed) -> None:
    old = live.write(LAST, 2)
    live.materialize(LAST)
    new = live.write(datetime.now(UTC), 2)
    live.reaches(new[-1])
    for asked in ({}, {"start": "now"}):
        (endpoint,) = endpoints(live, follow=True, **asked)
        reader = live.client._flight.do_get(endpoint.ticket)
        settled = None
        found: list[int] = []
        later = live.write(datetime.now(UTC))
        while settled != later[-1]:
            chunk = reader.read_chunk()
            found += chunk.data["pk"].to_pylist() if chunk.data is not None else []
            settled = json.loads(chunk.app_metadata.to_pybytes())["settled_pk"] if chunk.app_metadata else settled
        reader.cancel()
        assert found == ([*old, *new, *later] if not asked else later)
        new += later


def test_a_tenants_endpoints_do_not_tell_of_others_late_events(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path
) -> None:
    token, line = new_token("ours", TENANTS[1], ["read"])
    tokens = tmp_path / "tokens"
    tokens.write_text(line + "\n")
    with followed(changelog_url, lake, start_server, token, arrow_flight_tokens_file=str(tokens)) as live:
        hours = [LAST - 2 * HOUR, LAST - HOUR, LAST]
        ours = live.write(LAST, tenant_id=TENANTS[1])
        live.materialize(*hours)
        live.reaches(ours[-1])
        options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())])

        def told(until: str) -> list[Any]:
            signed = [endpoint.ticket.ticket for endpoint in endpoints(live, options, start=hours[0].isoformat(), end=until)]
            return [json.loads(json.loads(base64.urlsafe_b64decode(one.split(b".")[1]))["ticket"]) for one in signed]

        for until in ((LAST + HOUR).isoformat(), "now"):
            before = told(until)
            live.client.read(start=hours[0].isoformat(), end=until)
            said = json.dumps({"type": "events", "entity_type": "*", "start": hours[0].isoformat(), "end": until}).encode()
            info = live.client._flight.get_flight_info(flight.FlightDescriptor.for_command(said), options)
            assert info.total_bytes == -1, "which frames are kept would tell of late events"
            late = live.write(hours[0], tenant_id=TENANTS[0])
            live.reaches(late[-1])
            assert told(until) == before
            pipeline.merge_late(settings=live.settings, changelog=live.log, lake=live.lake)


# -------------------------------------------------------------------------------------------------------------- planning


def test_times_that_nanoseconds_cannot_hold_are_refused_where_they_are_asked_for(live: Followed) -> None:
    far = live.write(datetime(2300, 1, 1, tzinfo=UTC))
    now = live.write(datetime.now(UTC))
    live.reaches(now[-1])
    assert live.keys(start="now-1h") == now
    with pytest.raises(TicketError, match="Window 2300-01-01-00:00 lies outside 1677-09-22 to 2262-04-11"):
        live.keys(start="now-1h", end="2301-01-01")
    found = live.client.read(start="now-1h", columns=["pk"])["pk"].to_pylist()
    assert found == [*now, *far], "a stream without times has it"


def test_only_an_end_that_says_now_is_no_end(live: Followed) -> None:
    far = live.write(datetime(2300, 1, 1, tzinfo=UTC))
    ahead = live.write(datetime.now(UTC) + 2 * HOUR)
    live.reaches(ahead[-1])
    with pytest.raises(TicketError, match="Window 2300-01-01-00:00 lies outside"):
        live.keys(start="now-1h", end="9999-12-31T23:59:59.999999Z")
    keys, receipt = read(live.client, start="now-1h", end="now")
    assert keys == ahead
    assert json.loads(receipt.next_ticket or "")["end"] == "now"
    keys = [pk for one in endpoints(live) for pk in live.client._flight.do_get(one.ticket).read_all()["pk"].to_pylist()]
    assert keys == ahead, "what an endpoint reads ends no earlier"
    names = [endpoint.ticket for endpoint in endpoints(live, columns=["pk"])]
    keys = [pk for one in names for pk in live.client._flight.do_get(one).read_all()["pk"].to_pylist()]
    assert keys == [*ahead, *far]


def test_hours_that_nobody_could_fill_are_counted_and_not_listed(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    insert(changelog_url, created_at="0001-01-01 00:00:00+00")
    with followed(changelog_url, lake, start_server, start=datetime.min.replace(tzinfo=UTC)) as live:
        live.reaches(1)
        tracemalloc.start()
        try:
            with pytest.raises(TicketError, match=r"has 17[0-9]{6} hours that are not published"):
                live.client.read('{"type":"ObserverEvents","entity_type":"*"}')
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("too", ["long", "many"])
def test_who_waits_too_long_for_the_log_or_with_too_many_is_told_so(
    changelog_url: str,
    lake: Lake,
    start_server: Callable[..., FlightServer],
    monkeypatch: pytest.MonkeyPatch,
    too: str,
) -> None:
    pks = [insert(changelog_url, created_at=LAST - number * HOUR) for number in (30, 40)]
    with followed(changelog_url, lake, start_server) as live:
        live.reaches(pks[-1])
        live.keys(start=LAST)
        turns = live.service._turns
        eventually(lambda: not turns._asking.locked())
        if too == "long":
            monkeypatch.setattr(turns_module, "_TURN_SECONDS", 0.05)
        else:
            monkeypatch.setattr(turns, "_waiting", threading.BoundedSemaphore(1))
            turns._waiting.acquire()
        found: list[list[int]] = []
        first = threading.Thread(target=lambda: found.append(live.keys(start=LAST - 30 * HOUR, end=LAST - 29 * HOUR)))
        with psycopg.connect(live.url) as locked:
            locked.execute("LOCK TABLE core.tb_entity_change_log IN ACCESS EXCLUSIVE MODE")
            first.start()
            eventually(turns._asking.locked)
            with pytest.raises(FlightUnavailable, match="the change log gives them too slowly for all who wait"):
                live.client.info(start=LAST - 40 * HOUR, end=LAST - 39 * HOUR)
            assert live.client.info(start=LAST, end=LAST + timedelta(minutes=1)).rows is None, "what is here waits for nobody"
        first.join(30)
        assert found == [[pks[0]]]


def test_the_limit_of_days_counts_what_a_reader_who_reads_on_has_not_had(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    with followed(changelog_url, lake, start_server, arrow_flight_max_range_days=1) as live:
        old = live.write(LAST - 30 * HOUR, 2)
        live.materialize(*(LAST - number * HOUR for number in range(31)))
        [new] = live.write(LAST + HOUR)
        live.reaches(new)
        assert live.keys(LAST - 31 * HOUR, after_pk=old[-1]) == [new], "a follower of yesterday comes back"
        with pytest.raises(TicketError, match="not cover more than 1 days"):
            live.keys(LAST - 31 * HOUR)
        with pytest.raises(TicketError, match="not cover more than 1 days"):
            live.keys(LAST - 31 * HOUR, after_pk=old[0])


def test_the_last_day_is_no_more_than_a_day_whatever_the_clock_of_the_database_says(
    changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with followed(changelog_url, lake, start_server, arrow_flight_max_range_days=1) as live:
        live.write(LAST - 40 * HOUR)
        written = live.write(LAST)
        live.reaches(written[-1])
        monkeypatch.setattr(service, "_now", lambda: datetime.now(UTC) - timedelta(seconds=30))
        assert live.keys("now-1d") == written
        with pytest.raises(TicketError, match="not cover more than 1 days"):
            live.keys("now-25h")
