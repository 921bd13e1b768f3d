"""Windows tile time without gap or overlap, keys name them, and time expressions mean one instant or are refused."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fraiseql_pipeline.errors import WindowError
from fraiseql_pipeline.window import Window, WindowSize, as_utc, parse_time, tile

NOW = datetime(2026, 11, 22, 16, 30, 15, 123456, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
LAST = datetime.max.replace(tzinfo=UTC)

# Hypothesis takes the bounds of aware datetimes without their zone.
A_YEAR_FROM_THE_ENDS = {"min_value": datetime.min + timedelta(days=366), "max_value": datetime.max - timedelta(days=366)}  # noqa: DTZ901
SIZES = st.sampled_from(WindowSize)
INSTANTS = st.datetimes(timezones=st.just(UTC), max_value=datetime.max - timedelta(days=1))  # noqa: DTZ901
ZONES = st.timezones() | st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


# ---------------------------------------------------------------------------------------------------------------- windows


@given(INSTANTS, SIZES)
def test_a_window_holds_its_start_and_not_its_end(at: datetime, size: WindowSize) -> None:
    window = Window.holding(at, size)
    assert window.contains(at)
    assert window.contains(window.start)
    assert window.contains(window.end - MICROSECOND)
    assert not window.contains(window.end)
    assert window.end - window.start == size.duration


@given(INSTANTS, SIZES)
def test_a_key_names_its_window(at: datetime, size: WindowSize) -> None:
    window = Window.holding(at, size)
    assert Window.parse(window.key) == window
    assert str(window) == window.key


@given(INSTANTS.filter(lambda at: at.year >= 1000), SIZES)
def test_keys_are_dagsters_own_partition_keys(at: datetime, size: WindowSize) -> None:
    window = Window.holding(at, size)
    assert window.key == window.start.strftime(size.key_format)


@given(st.lists(INSTANTS, min_size=2, max_size=10), SIZES)
def test_keys_sort_like_their_windows(instants: list[datetime], size: WindowSize) -> None:
    windows = [Window.holding(at, size) for at in instants]
    assert [window.key for window in sorted(windows)] == sorted(window.key for window in windows)


@given(INSTANTS, st.timedeltas(timedelta(0), timedelta(days=9)), SIZES)
def test_tiles_cover_a_range_once_without_gap_or_overlap(start: datetime, length: timedelta, size: WindowSize) -> None:
    assume(start + length <= datetime(9999, 12, 30, tzinfo=UTC))
    end = start + length
    windows = list(tile(start, end, size))
    if start == end and start == Window.holding(start, size).start:
        assert windows == []
    for left, right in pairwise(windows):
        assert left.end == right.start
    for at in (start, end - MICROSECOND, start + length / 2):
        if start <= at < end:
            assert sum(window.contains(at) for window in windows) == 1
    if windows:
        assert windows[0].contains(start)
        assert windows[-1].start < end <= windows[-1].end


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
@pytest.mark.parametrize("year", [2026])
def test_no_day_has_23_or_25_hours(zone: str, year: int) -> None:
    start, end = datetime(year, 1, 1, tzinfo=ZoneInfo(zone)), datetime(year + 1, 1, 1, tzinfo=ZoneInfo(zone))
    hours, days = list(tile(start, end, WindowSize.HOUR)), list(tile(as_utc(start), as_utc(end), WindowSize.DAY))
    assert len({window.key for window in hours}) == len(hours) == 365 * 24
    assert {(window.end - window.start) for window in days} == {timedelta(hours=24)}


def test_a_zone_that_is_at_utc_by_chance_keeps_utc_days() -> None:
    london = datetime(2026, 3, 29, tzinfo=ZoneInfo("Europe/London"))  # the day the clocks go forward
    window = Window(london, WindowSize.DAY)
    assert window.end == datetime(2026, 3, 30, tzinfo=UTC)
    assert window.start.tzinfo is UTC
    assert window == Window.parse("2026-03-29")


@given(st.datetimes(**A_YEAR_FROM_THE_ENDS), ZONES, SIZES)
def test_an_instant_is_in_the_same_window_in_every_zone(at: datetime, zone: ZoneInfo, size: WindowSize) -> None:
    instant = at.replace(tzinfo=UTC)
    assert Window.holding(instant.astimezone(zone), size) == Window.holding(instant, size) == Window.holding(at, size)


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (datetime(2026, 1, 1), "must start at a UTC time"),  # noqa: DTZ001  a naive start is the fault
        (datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1))), "must start at a UTC time"),
        (datetime(2026, 1, 1, 1, tzinfo=UTC), "one day must start on the day"),
        (datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC), "one day must start on the day"),
        (datetime(9999, 12, 31, tzinfo=UTC), "must end in the years 1 to 9999"),
    ],
)
def test_a_window_that_is_no_window_is_refused(start: datetime, sentence: str) -> None:
    with pytest.raises(WindowError, match=sentence):
        Window(start, WindowSize.DAY)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "2026",
        "2026-1-1",
        "2026-01-01-1:00",
        "2026-01-01-13:30",
        "2026-01-01T13:00",
        "2026-02-30",
        "٢٠٢٦-01-01",
        " 2026-01-01",
        "9999-12-31",
    ],
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(WindowError, match="key must look like 2026-11-01-13:00"):
        Window.parse(key)


@given(st.text(max_size=40))
def test_any_text_is_a_key_or_a_window_error(text: str) -> None:
    try:
        window = Window.parse(text)
    except WindowError:
        return
    assert window.key == text


# ------------------------------------------------------------------------------------------------------------------ times


@given(st.datetimes(**A_YEAR_FROM_THE_ENDS), ZONES)
def test_an_iso_time_is_the_instant_it_says(at: datetime, zone: ZoneInfo) -> None:
    local = at.replace(tzinfo=UTC).astimezone(zone)
    offset = local.utcoffset()
    assume(offset is not None and offset.total_seconds() % 60 == 0)  # a historic offset with seconds is refused, not cut
    assert parse_time(local.isoformat(), NOW) == local
    assert parse_time(local.isoformat(" ", "microseconds"), NOW) == local
    assert parse_time(at.isoformat(), NOW) == at.replace(tzinfo=UTC), "a naive time is UTC"
    assert parse_time(at.isoformat() + "Z", NOW) == at.replace(tzinfo=UTC)
    assert parse_time(at.date().isoformat(), NOW) == at.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)


@given(INSTANTS, ZONES)
def test_every_time_is_in_utc(at: datetime, zone: ZoneInfo) -> None:
    assume(at > datetime(2, 1, 1, tzinfo=UTC))
    assert as_utc(at.astimezone(zone)) == at
    assert parse_time("now", at.astimezone(zone)).tzinfo is UTC
    assert parse_time("now", at.replace(tzinfo=None)) == at


def test_the_zone_of_the_machine_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    naive, monday = NOW.replace(tzinfo=None), datetime(2026, 11, 23, tzinfo=UTC)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "Asia/Kathmandu")
            time.tzset()
            assert as_utc(naive) == parse_time(naive.isoformat(), NOW) == parse_time("now", naive) == NOW
            assert Window.parse("2026-11-23").start == Window.holding(monday.replace(tzinfo=None), WindowSize.DAY).start == monday
    finally:
        time.tzset()


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("now", timedelta(0)),
        ("now-0s", timedelta(0)),
        ("now-15m", timedelta(minutes=15)),
        ("now-1h", timedelta(hours=1)),
        ("now-7d", timedelta(days=7)),
        ("now-2w", timedelta(days=14)),
        ("now-90s", timedelta(seconds=90)),
        ("now-007d", timedelta(days=7)),
    ],
)
def test_a_relative_time_counts_back_from_now(text: str, ago: timedelta) -> None:
    assert parse_time(text, NOW) == NOW - ago


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-01-31T23:59:59Z", datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-01-31T23:59:59z", datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31 23:59", datetime(2026, 1, 31, 23, 59, tzinfo=UTC)),
        ("2026-01-31T23:59:59.5", datetime(2026, 1, 31, 23, 59, 59, 500_000, tzinfo=UTC)),
        ("2026-01-31T23:59:59,25Z", datetime(2026, 1, 31, 23, 59, 59, 250_000, tzinfo=UTC)),
        ("2026-01-31T23:59:59.123456789Z", datetime(2026, 1, 31, 23, 59, 59, 123_456, tzinfo=UTC)),
        ("2026-01-31T23:59:59+0530", datetime(2026, 1, 31, 18, 29, 59, tzinfo=UTC)),
        ("2026-01-31T23:59:59-03:30", datetime(2026, 2, 1, 3, 29, 59, tzinfo=UTC)),
        ("2024-02-29", datetime(2024, 2, 29, tzinfo=UTC)),
    ],
)
def test_the_usual_forms_of_a_time_are_read(text: str, at: datetime) -> None:
    assert parse_time(text, NOW) == at


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "today",
            "NOW",
            "now ",
            "now-",
            "now-1",
            "now-1y",
            "now+1h",
            "now-1.5h",
            "now - 1h",
            "now--1h",
            "now-1h-1h",
            "now-٣h",
        ),
        *(
            "2026",
            "2026-01",
            "20260101",
            "2026-W01-1",
            "2026-001",
            "2026-13-01",
            "2025-02-29",
            "26-01-01",
            "2026-1-1",
            "12026-01-01",
        ),
        *(
            "2026-01-01T",
            "2026-01-01T24:00:01",
            "2026-01-01T23:60",
            "2026-01-01T23:59:60",
            "2026-01-01T1:00",
            "2026-01-01T00:00:00.",
        ),
        *(
            "2026-01-01T00:00:00+25:00",
            "2026-01-01T00:00:00+1",
            "2026-01-01T00:00:00 Z",
            "2026-01-01T00:00:00ZZ",
            "2026-01-01\n",
            "infinity",
        ),
        *("0000-01-01", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "now-999999999w", "now-1000000d", "-0001-01-01"),
    ],
)
def test_what_is_no_time_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(WindowError, match="A time must") as refused:
        parse_time(text, NOW)
    assert str(refused.value).endswith(".")


@given(st.text(max_size=80) | st.from_regex(r"\A(now)?[-+T:.Z0-9smhdw ]{0,30}\Z"))
def test_any_text_is_a_time_in_utc_or_a_window_error(text: str) -> None:
    try:
        at = parse_time(text, NOW)
    except WindowError as error:
        sentence = str(error)
    else:
        assert at.tzinfo is UTC
        return
    assert len(sentence) < 64 * 12


def test_the_ends_of_time_are_times() -> None:
    assert parse_time("0001-01-01T00:00:00Z", NOW) == datetime.min.replace(tzinfo=UTC)
    assert parse_time("9999-12-31T23:59:59.999999Z", NOW) == LAST
