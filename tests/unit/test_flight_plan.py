from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fraiseql_pipeline.errors import LakeEmpty, TicketError, WindowMissing
from fraiseql_pipeline.flight.plan import Plan, plan
from fraiseql_pipeline.flight.view import View
from fraiseql_pipeline.lake import Commit, File, Snapshot
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Window, WindowSize, to_micros
from tests.support.commits import START, commit, hour, published


def view(windows: dict[Window, Commit]) -> View:
    return View(Snapshot(10**6, (), windows, None))


def planned(windows: dict[Window, Commit], start: datetime, end: datetime, **options: object) -> Plan:
    return plan(Ticket(start=start, end=end, **options), Snapshot(10**6, (), windows, None), first=START, size=WindowSize.HOUR)


def test_a_range_is_settled_as_far_as_the_window_that_is_settled_least() -> None:
    windows = {
        window: replace(each, settled_pk=pk) for (window, each), pk in zip(published(0, 1, 2).items(), (7, 3, 5), strict=True)
    }
    assert planned(windows, START, hour(2).end).settled_pk == 3
    assert planned(windows, hour(2).start, hour(2).end).settled_pk == 5


@given(hours=st.sets(st.integers(0, 40), min_size=1), start=st.integers(0, 44 * 4), length=st.integers(1, 44 * 4))
def test_a_hole_is_every_unpublished_window_of_the_range_before_the_newest_published_one(
    hours: set[int], start: int, length: int
) -> None:
    begin, end = START + timedelta(minutes=15 * start), START + timedelta(minutes=15 * (start + length))
    touched = {number for number in range(88) if hour(number).start < end and hour(number).end > begin}
    holes = sorted(number for number in touched - hours if number < max(hours))
    if not holes:
        assert planned(published(*hours), begin, end).missing_windows == 0
        return
    with pytest.raises(WindowMissing) as error:
        planned(published(*hours), begin, end)
    assert error.value.missing == tuple(hour(number).key for number in holes)
    assert planned(published(*hours), begin, end, allow_missing=True).missing_windows == len(holes)


def test_times_beyond_nanoseconds_are_told_of_to_whom_every_tenant_is_open() -> None:
    old = Window(datetime(1500, 1, 1, tzinfo=UTC), WindowSize.HOUR)
    ticket = Ticket(start=old.start, end=hour(1).end, allow_missing=True)
    both = Snapshot(10**6, (), {old: commit(old), hour(0): commit(hour(0))}, None)
    with pytest.raises(TicketError, match="lies outside"):
        plan(ticket, both, first=None, size=WindowSize.HOUR)
    assert plan(ticket, both, first=None, size=WindowSize.HOUR, org_id="a tenant that has no event there").rows is None


def test_a_message_about_many_holes_names_a_few_and_counts_the_rest() -> None:
    with pytest.raises(WindowMissing, match=r"has 9999 window\(s\).*2026-11-01-03:00 and 9996 more;"):
        planned(published(0, 10_000), START, hour(20_000).end)


def test_a_day_that_two_holes_touch_is_missing_once() -> None:
    view, ticket = View(Snapshot(10**6, (), published(0, 3, 6), None)), Ticket(start=START, end=hour(7).start)
    with pytest.raises(WindowMissing, match=r"has 1 window\(s\) .*: 2026-11-01; ") as error:
        plan(ticket, view, first=None, size=WindowSize.DAY)
    assert error.value.missing == ("2026-11-01",)
    assert plan(replace(ticket, allow_missing=True), view, first=None, size=WindowSize.DAY).missing_windows == 1


def test_nothing_is_missing_before_the_first_window_of_the_settings() -> None:
    far = datetime(2000, 1, 1, tzinfo=UTC)
    assert planned(published(0, 1), far, hour(1).end).missing_windows == 0


def test_rows_are_exact_only_where_whole_windows_are_read() -> None:
    windows = published(0, 1, 2)
    assert planned(windows, START, hour(2).end).rows == 30
    assert planned(windows, START, hour(100).end).rows == 30
    assert planned(windows, START, hour(2).end, limit=7).rows == 7
    assert planned(windows, START, hour(2).end, limit=70).rows == 30
    assert planned(windows, START + timedelta(microseconds=1), hour(2).end).rows is None
    assert planned(windows, START, hour(2).end, entity_types=("Order",)).rows is None
    assert planned(windows, START, hour(2).end, follow=True).rows is None, "it goes on"
    assert planned(windows, START, hour(2).end, after_pk=1).rows is None
    assert planned(windows, hour(3).start, hour(4).end).rows == 0


def test_a_plan_ends_where_the_published_windows_end() -> None:
    assert planned(published(0, 1), START, hour(9).end).complete_through == hour(1).end
    assert planned(published(0, 1), START, hour(0).end).complete_through == hour(0).end


def test_a_key_does_not_fall_below_the_tickets() -> None:
    assert planned(published(0, 1), START, hour(1).end).settled_pk == 1
    assert planned(published(0, 1), START, hour(1).end, after_pk=7).settled_pk == 7
    assert planned(published(0, 1), hour(5).start, hour(6).end, after_pk=7).settled_pk is None


def test_the_next_ticket_keeps_its_key_within_its_range_only() -> None:
    def following(end: datetime) -> dict[str, object]:
        said = planned(published(0, 1), START, end, after_pk=7).next_ticket()
        assert said is not None
        return json.loads(said)

    assert following(hour(5).end)["after_pk"] == 7
    assert "after_pk" not in following(hour(1).end), "what lies behind was never read"


def test_the_next_ticket_begins_where_its_range_does_if_nothing_of_that_is_published() -> None:
    said = planned(published(0, 1), hour(5).start, hour(6).end).next_ticket()
    assert said is not None
    assert json.loads(said)["start"] == hour(5).start.isoformat()


def test_a_ticket_that_is_given_out_ends_at_a_time_even_where_its_plan_is_endless() -> None:
    for columns, end in (((), datetime(2262, 4, 11, tzinfo=UTC)), (("pk",), datetime.max.replace(tzinfo=UTC))):
        # It starts ahead of the clock, where now would be before it.
        decided = planned(published(0, 1), START, datetime.max.replace(tzinfo=UTC), columns=columns, endless=True)
        given = Ticket.parse(decided.pinned_ticket().json.encode(), START - timedelta(days=1))
        assert (given.start, given.end, given.endless, given.table_version) == (START, end, False, 10**6)


def test_provisional_windows_of_the_range_are_counted() -> None:
    windows = published(0, 1) | {hour(2): commit(hour(2), state="provisional")}
    assert planned(windows, START, hour(2).end).provisional_windows == 1
    assert planned(windows, START, hour(1).end).provisional_windows == 0


def test_nothing_published_at_all_is_no_empty_table() -> None:
    with pytest.raises(LakeEmpty):
        planned({}, START, hour(1).end)


def test_events_that_nanoseconds_cannot_hold_are_refused_by_name() -> None:
    old = Window(datetime(1500, 1, 1, tzinfo=UTC), WindowSize.HOUR)
    far = (datetime(1400, 1, 1, tzinfo=UTC), hour(1).end)
    with pytest.raises(TicketError, match="Window 1500-01-01-00:00 lies outside 1677-09-22 to 2262-04-11"):
        planned({old: commit(old), hour(0): commit(hour(0))}, *far, allow_missing=True)
    assert planned({old: commit(old), hour(0): commit(hour(0))}, *far, allow_missing=True, columns=("pk",)).rows == 20
    assert planned({old: commit(old, rows=0), hour(0): commit(hour(0))}, *far, allow_missing=True).rows == 10


def test_days_and_hours_cover_a_range_together() -> None:
    day = Window(START, WindowSize.DAY)
    windows = {day: commit(day), hour(24): commit(hour(24))}
    assert planned(windows, START, hour(24).end).missing_windows == 0
    assert view(windows).stretches() == [(START, hour(24).end)]
    assert view(windows).extent == (START, hour(24).end)


def test_a_file_is_left_out_where_one_window_has_all_of_it_and_was_settled_before() -> None:
    windows = {window: replace(each, settled_pk=pk) for (window, each), pk in zip(published(0, 1).items(), (7, 9), strict=True)}

    def file(low: datetime, high: datetime) -> File:
        return File("", "", 0, 1, to_micros(low), to_micros(high))

    inside = file(START, START + timedelta(minutes=59))
    assert [view(windows).has_all_below(inside, pk) for pk in (6, 7)] == [False, True]
    assert not view(windows).has_all_below(file(START, hour(1).start), 100), "it lies in two windows"
    assert not view(windows).has_all_below(file(hour(5).start, hour(5).start), 100), "it lies in none"
    day = Window(START, WindowSize.DAY)
    overlapping = windows | {day: replace(commit(day), settled_pk=20)}
    assert not view(overlapping).has_all_below(inside, 7), "another window has it, too"


def test_stretches_end_at_holes() -> None:
    assert view(published(0, 1, 3)).stretches() == [(START, hour(1).end), (hour(3).start, hour(3).end)]
    with pytest.raises(LakeEmpty):
        view({})


def test_without_a_start_of_its_own_a_lake_begins_with_its_oldest_window() -> None:
    view = Snapshot(10**6, (), published(5, 6), None)
    ticket = Ticket(start=hour(0).start, end=hour(7).start)
    assert plan(ticket, view, first=None, size=WindowSize.HOUR).missing_windows == 0
    with pytest.raises(WindowMissing):
        plan(ticket, view, first=hour(0).start, size=WindowSize.HOUR)
    assert Settings().first_window is None
    assert Settings(start=START).first_window == START
