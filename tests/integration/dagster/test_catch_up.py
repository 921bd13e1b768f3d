"""The sensor and the schedule: what is missing or late gets a run, what a run is working on does not, and nothing is asked for in vain for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from assets import needs, sensors
from assets.definitions import definitions
from assets.resources import FraiseQL
from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.code_location import Location, hours, write

#: Ten hours of windows, all recent: what is before the first window is not missing.
NOON = datetime(2026, 11, 20, 12, 15, tzinfo=UTC)
DAY = hours("2026-11-20", 2, 11)


class Clock(datetime):
    """A clock that stands where a test put it."""

    at = NOON

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.at


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Clock]]:
    monkeypatch.setenv("FRAISEQL_START", "2026-11-20T02:00:00")
    monkeypatch.setattr(sensors, "datetime", Clock)
    yield Clock
    Clock.at = NOON


class Ticker:
    """Evaluates the sensor tick by tick, handing its cursor on as the daemon does."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.cursor: str | None = None
        self.said: str | None = None

    def tick(self, minutes_later: float = 1) -> list[tuple[str, str]]:
        """The first and the last window of every run that is asked for."""
        Clock.at += timedelta(minutes=minutes_later)
        defs = definitions(Settings.load())
        context = dg.build_sensor_context(
            self.location.instance, self.cursor, repository_def=defs.get_repository_def(), resources={"fraiseql": FraiseQL()}
        )
        told = defs.resolve_sensor_def("catch_up").evaluate_tick(context)
        self.cursor = told.cursor
        assert bool(told.run_requests) != bool(told.skip_message)
        self.said = told.skip_message
        assert all(request.run_key is None for request in told.run_requests or ())
        assert all(request.run_config["ops"]["events"]["config"] == {"only_new": True} for request in told.run_requests or ())
        return [_span(request) for request in told.run_requests or ()]


def _span(request: dg.RunRequest) -> tuple[str, str]:
    if request.partition_key:
        return request.partition_key[-5:], request.partition_key[-5:]
    ends = (request.tags["dagster/asset_partition_range_start"], request.tags["dagster/asset_partition_range_end"])
    return ends[0][-5:], ends[1][-5:]


@pytest.fixture
def ticker(location: Location) -> Ticker:
    return Ticker(location)


def test_missing_windows_are_asked_for_in_few_runs_and_only_once_they_have_ended(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAISEQL_WINDOWS_PER_RUN", "6")
    assert ticker.tick(-10) == [("02:00", "07:00"), ("08:00", "10:00")]  # 11:00 has ended five minutes ago: the schedule's business


def test_a_published_window_is_left_alone_until_an_event_comes_late(ticker: Ticker, changelog_url: str) -> None:
    for window in DAY:
        write(changelog_url, window, 2)
    assert ticker.location.run(*DAY).success
    assert ticker.tick() == []
    assert ticker.said == "Nothing of the last two days is missing, and nothing came late."
    write(changelog_url, DAY[3], 1)
    assert ticker.tick() == [("05:00", "05:00")]
    assert ticker.tick(0) == []
    assert ticker.said == "1 window waits for a run that was asked for, or for the next attempt."
    assert ticker.location.run(DAY[3], config={"only_new": True}).success
    assert ticker.tick() == []
    assert ticker.location.lake.published()[DAY[3]].accepted_rows == 3


def test_a_window_that_is_published_by_an_older_settlement_than_the_last_look_is_looked_at_from_there(
    ticker: Ticker, changelog_url: str
) -> None:
    settings = Settings.load()
    for window in DAY:
        write(changelog_url, window, 2)
    with open_changelog(settings) as changelog:
        settlement = changelog.settle()
        write(changelog_url, DAY[0], 1)  # late for whoever settled before
        ticker.location.run(*DAY[1:])
        Clock.at += timedelta(days=60)
        ticker.tick()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(changelog, "settle", lambda *_: settlement)
            patched.setattr(pipeline, "check_same_source", lambda *_: None)
            pipeline.materialize([DAY[0]], settings=settings, changelog=changelog, lake=ticker.location.lake)
    assert ticker.location.lake.published()[DAY[0]].accepted_rows == 2
    assert ("02:00", "02:00") in ticker.tick()


def test_a_late_event_reaches_a_window_of_any_age(ticker: Ticker, changelog_url: str) -> None:
    for window in DAY:
        write(changelog_url, window, 2)
    assert ticker.location.run(*DAY).success
    Clock.at += timedelta(days=60)
    ticker.tick()
    write(changelog_url, DAY[0], 1)
    asked = ticker.tick()
    assert ("02:00", "02:00") in asked
    write(changelog_url, DAY[4], 1)
    assert ("06:00", "06:00") in ticker.tick()  # the first one is known, still late and waits


def test_a_window_whose_runs_do_not_help_is_asked_for_ever_more_rarely(ticker: Ticker, changelog_url: str) -> None:
    for window in DAY[1:]:
        write(changelog_url, window, 1)
    assert ticker.location.run(*DAY[1:]).success
    asked = [minute for minute in range(1, 36) if ticker.tick()]
    assert asked == [1, 2, 4, 8, 16, 32]


def test_a_clock_that_was_ahead_makes_no_window_wait_for_it(ticker: Ticker, changelog_url: str) -> None:
    for window in DAY:
        write(changelog_url, window, 1)
    assert ticker.location.run(*DAY).success
    write(changelog_url, DAY[3], 1)
    assert ("05:00", "05:00") in ticker.tick(60 * 24 * 30)
    assert ticker.tick(-60 * 24 * 30) == [("05:00", "05:00")]
    assert ticker.tick(0) == []


def test_a_window_that_needed_many_runs_starts_afresh_with_a_new_cause(ticker: Ticker, changelog_url: str) -> None:
    for window in DAY[1:]:
        write(changelog_url, window, 1)
    assert ticker.location.run(*DAY[1:]).success
    for _ in range(6):
        ticker.tick()
    assert ticker.tick() == []
    write(changelog_url, DAY[0], 1)
    assert ticker.location.run(DAY[0]).success
    write(changelog_url, DAY[0], 1)
    assert ticker.tick() == [("02:00", "02:00")]


def test_a_window_that_cannot_be_published_does_not_hold_its_neighbours_back(
    ticker: Ticker, changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAISEQL_WINDOWS_PER_RUN", "4")
    write(changelog_url, DAY[2], 1, broken=30)
    for _ in range(2):
        for first, last in ticker.tick(5):
            ticker.location.run(*hours("2026-11-20", int(first[:2]), int(last[:2])), config={"only_new": True})
    assert set(DAY) - ticker.location.lake.published().keys() == {DAY[2]}


def _publish(location: Location, *windows: Window) -> None:
    """Publish windows as another code location did, with an earlier FRAISEQL_START."""
    settings = location.settings.model_copy(update={"start": datetime(2026, 11, 1, tzinfo=UTC)})
    with open_changelog(settings) as changelog:
        pipeline.materialize(windows, settings=settings, changelog=changelog, lake=location.lake, other_size=True)


def test_late_events_of_windows_that_are_no_partitions_are_a_warning_and_stop_nothing(
    ticker: Ticker, changelog_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before_the_first = hours("2026-11-20", 1, 1)[0]
    yesterday = Window.parse("2026-11-19")
    for window in (before_the_first, yesterday):
        write(changelog_url, window, 1)
    _publish(ticker.location, before_the_first, yesterday)
    for window in (before_the_first, yesterday):
        write(changelog_url, window, 1)
    assert ticker.tick() == [("02:00", "11:00")]
    said = capfd.readouterr().err
    assert "2 published windows that are no partitions: 2026-11-19, 2026-11-20-01:00." in said
    assert "fraiseql-pipeline late" in said
    assert ticker.tick(0) == []
    assert ticker.said == (
        "10 windows wait for a run that was asked for, or for the next attempt. "
        "2 published windows with late events can get no run; see the warnings."
    )
    assert "no partitions" not in capfd.readouterr().err  # not at every tick


def test_hours_of_a_day_that_is_published_as_one_window_are_not_missing(ticker: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_START", "2026-11-19T05:00:00")
    _publish(ticker.location, Window.parse("2026-11-19"))
    assert ticker.tick() == [("00:00", "11:00")]  # of the day after


@pytest.mark.parametrize("ranged", [False, True], ids=["one partition", "a range"])
def test_windows_in_flight_are_left_alone(ticker: Ticker, ranged: bool) -> None:
    job = definitions(Settings.load()).resolve_implicit_global_asset_job_def()
    ends = {"dagster/asset_partition_range_start": DAY[2].key, "dagster/asset_partition_range_end": DAY[4].key}
    run = ticker.location.instance.create_run_for_job(
        job, tags=ends if ranged else {"dagster/partition": DAY[2].key}, status=dg.DagsterRunStatus.STARTED
    )
    assert ticker.tick() == ([("02:00", "03:00"), ("07:00", "11:00")] if ranged else [("02:00", "03:00"), ("05:00", "11:00")])
    ticker.location.instance.report_run_failed(run)
    assert ticker.tick()[0][0] == "02:00"


def test_a_run_that_nobody_hears_of_holds_no_window_unless_it_is_queued(instance: dg.DagsterInstance) -> None:
    job = definitions(Settings.load()).resolve_implicit_global_asset_job_def()
    location = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "repository")
    run = instance.create_run_for_job(
        job,
        tags={"dagster/partition": DAY[2].key},
        status=dg.DagsterRunStatus.STARTED,
        remote_job_origin=RemoteJobOrigin(location, job.name),
    )
    silence = sensors.SILENCE.total_seconds()
    assert sensors.in_flight(instance, time.time()) == {DAY[2]}
    assert sensors.in_flight(instance, time.time() + silence + 60) == set()
    instance.report_engine_event("The run is heard of.", run)
    heard = instance.get_records_for_run(run.run_id, limit=1).records[0].timestamp
    assert sensors.in_flight(instance, heard + silence - 1) == {DAY[2]}
    assert sensors.in_flight(instance, heard + silence + 1) == set()
    instance.report_dagster_event(dg.DagsterEvent(dg.DagsterEventType.PIPELINE_ENQUEUED.value, job.name), run.run_id)
    assert sensors.in_flight(instance, time.time() + 10 * silence) == {DAY[2]}


def test_runs_of_others_do_not_hold_windows(ticker: Ticker) -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["a"]))
    def other() -> None: ...

    job = dg.Definitions([other]).resolve_implicit_global_asset_job_def()
    ticker.location.instance.create_run_for_job(job, tags={"dagster/partition": "a"}, status=dg.DagsterRunStatus.STARTED)
    assert ticker.tick() == [("02:00", "11:00")]


def test_the_cursor_survives_its_text() -> None:
    memory = needs.Memory(needs.Looked(17, 4, "log"), {DAY[0]: needs.Asked("missing", 3, NOON)})
    assert needs.Memory.parse(memory.dump()) == memory
    assert needs.Memory.parse(None) == needs.Memory()
    by_hand = '{"asked": {"2026-11-20-02:00": ["missing", -3, "2026-11-20T12:15:00"]}}'
    assert needs.Memory.parse(by_hand).asked == {DAY[0]: needs.Asked("missing", 0, NOON)}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "7",
        '{"asked": 3}',
        '{"asked": {"noon": ["missing", 1, "2026"]}}',
        '{"looked": [1]}',
        '{"looked": ["a", 1, ""]}',
        '{"looked": [Infinity, 1, ""]}',
    ],
)
def test_a_cursor_that_somebody_set_by_hand_is_none(text: str) -> None:
    assert needs.Memory.parse(text) == needs.Memory()


@pytest.mark.parametrize(
    ("size", "at", "key"),
    [
        ("hour", datetime(2026, 11, 20, 12, 1, tzinfo=UTC), "2026-11-20-11:00"),
        ("day", datetime(2026, 11, 21, 0, 1, tzinfo=UTC), "2026-11-20"),
    ],
)
def test_the_schedule_asks_for_the_window_that_has_just_ended(
    size: str, at: datetime, key: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAISEQL_START", "2026-11-01")
    monkeypatch.setenv("FRAISEQL_WINDOW", size)
    defs = definitions(Settings.load())
    schedule = defs.resolve_schedule_def("each_window")
    told = schedule.evaluate_tick(
        dg.build_schedule_context(instance, scheduled_execution_time=at, repository_def=defs.get_repository_def())
    )
    assert [request.partition_key for request in told.run_requests or ()] == [key]
    assert schedule.execution_timezone == "UTC"


def test_nothing_starts_by_itself() -> None:
    defs = definitions(Settings(window=WindowSize.HOUR))
    assert defs.resolve_sensor_def("catch_up").default_status is dg.DefaultSensorStatus.STOPPED
    assert defs.resolve_schedule_def("each_window").default_status is dg.DefaultScheduleStatus.STOPPED
