"""Rules of a run: what is published, what is refused, what stays as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import ChangeLog, embedded, open_changelog, source
from fraiseql_pipeline.errors import (
    EventsUnreadable,
    LakeError,
    LakeUnavailable,
    SourceRefused,
    SourceUnavailable,
    ValidationHalted,
    WindowError,
    WindowShrinks,
)
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.lake.publish import Publisher
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize

HOUR = timedelta(hours=1)
_INSERT = (
    "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, object_data, created_at)"
    " SELECT 'Order', %s, gen_random_uuid(), jsonb_build_object('n', n), %s::timestamptz + n * interval '1 millisecond'"
    " FROM generate_series(1, %s) n"
)


class Shop:
    """A change log, a lake, and the last whole hour but one."""

    def __init__(self, url: str, lake: Path) -> None:
        self.url = url
        self.settings = Settings(database_url=url, lake_uri=str(lake), seal_timeout_seconds=0)
        self.lake = Lake.of(self.settings)
        self.window = Window.holding(datetime.now(UTC) - 2 * HOUR, WindowSize.HOUR)

    def write(self, events: int, verb: str = "INSERT", at: datetime | None = None) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(_INSERT, [verb, at or self.window.start, events])

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)

    def materialize(self, *windows: Window, **options: Any) -> list[Materialization]:
        with open_changelog(self.settings) as changelog:
            return pipeline.materialize(
                windows or [self.window], settings=self.settings, changelog=changelog, lake=self.lake, **options
            )

    def merge_late(self, **options: Any) -> list[Materialization]:
        with open_changelog(self.settings) as changelog:
            return pipeline.merge_late(settings=self.settings, changelog=changelog, lake=self.lake, **options)


@pytest.fixture
def shop(changelog_url: str, tmp_path: Path) -> Shop:
    return Shop(changelog_url, tmp_path / "lake")


def test_events_of_other_windows_and_of_the_end_itself_stay_out(shop: Shop) -> None:
    for at in (shop.window.start - timedelta(milliseconds=1), shop.window.end - timedelta(milliseconds=1), shop.window.end):
        shop.write(1, at=at)
    assert shop.materialize()[0].commit.accepted_rows == 1


def test_an_empty_window_is_published_with_no_rows(shop: Shop) -> None:
    (done,) = shop.materialize()
    assert (done.commit.outcome, done.commit.source_rows) == ("published", 0)
    assert shop.window in shop.lake.published()


def test_a_window_that_has_not_ended_is_refused_and_nothing_is_published(shop: Shop) -> None:
    shop.write(3)
    running = Window.holding(datetime.now(UTC), WindowSize.HOUR)
    with pytest.raises(WindowError, match="has not ended"):
        shop.materialize(shop.window, running)
    assert shop.lake.published() == {}


def test_windows_come_back_oldest_first_and_each_is_told_once(shop: Shop) -> None:
    told: list[Window] = []
    windows = [Window(shop.window.start - n * HOUR, WindowSize.HOUR) for n in range(5)]
    done = shop.materialize(*windows, *windows, jobs=3, on_window=lambda one: told.append(one.window))
    assert [one.window for one in done] == sorted(windows)
    assert sorted(told) == sorted(windows)


def test_the_busy_time_of_every_stage_is_told(shop: Shop) -> None:
    shop.write(10)
    (done,) = shop.materialize()
    assert done.seconds.keys() == {"read", "validate", "encode", "commit", "total"}
    assert all(seconds > 0 for seconds in done.seconds.values())


def test_too_many_rejected_events_halt_the_window_before_anything_is_written(shop: Shop) -> None:
    shop.write(80)
    shop.write(20, verb="UPSERT")
    with pytest.raises(ValidationHalted, match=r"20 of 100 events"):
        shop.materialize()
    assert shop.lake.published() == {}
    assert not list(Path(shop.settings.lake_uri).rglob("*.parquet"))


def test_late_events_are_only_added_even_when_the_source_has_deleted_the_old_ones(shop: Shop) -> None:
    shop.write(10)
    shop.materialize()
    shop.execute("DELETE FROM core.tb_entity_change_log")
    shop.write(2)
    (merged,) = shop.merge_late()
    assert (merged.commit.outcome, merged.commit.accepted_rows, merged.commit.source_rows) == ("merged", 12, 12)
    assert shop.merge_late() == []


def test_a_late_copy_of_a_published_event_is_quarantined_as_a_duplicate(shop: Shop) -> None:
    shop.write(1)
    shop.materialize()
    shop.execute(
        "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id, object_id, created_at)"
        " SELECT object_type, modification_type, id, object_id, created_at FROM core.tb_entity_change_log"
    )
    (merged,) = shop.merge_late()
    assert merged.reasons == {"event_id:duplicate": 1}
    assert (merged.commit.accepted_rows, merged.commit.quarantined_rows) == (1, 1)


def test_a_few_late_events_are_judged_by_the_share_of_the_whole_window(shop: Shop) -> None:
    shop.write(1_000)
    shop.materialize()
    shop.write(12, verb="MELT")
    (merged,) = shop.merge_late()
    assert (merged.commit.accepted_rows, merged.commit.quarantined_rows) == (1_000, 12)
    shop.write(50, verb="MELT")
    with pytest.raises(ValidationHalted, match="62 of 1,062"):
        shop.merge_late()


def test_a_window_whose_late_events_are_refused_keeps_no_other_waiting(shop: Shop) -> None:
    after = Window(shop.window.end, WindowSize.HOUR)
    for window in (shop.window, after):
        shop.write(20, at=window.start)
    shop.materialize(shop.window, after)
    shop.write(50, verb="MELT")
    shop.write(5, at=after.start)
    with pytest.raises(ValidationHalted, match=shop.window.key):
        shop.merge_late()
    assert [commit.accepted_rows for commit in shop.lake.published().values()] == [20, 25]


def test_a_rebuilt_change_log_is_refused_until_it_is_forced(shop: Shop) -> None:
    shop.write(10)
    shop.materialize()
    shop.execute("TRUNCATE core.tb_entity_change_log RESTART IDENTITY")
    shop.write(3)
    for again in (shop.materialize, shop.merge_late):
        with pytest.raises(SourceRefused, match=r"keys began anew.*restored, rebuilt or replaced"):
            again()
    assert shop.lake.published()[shop.window].accepted_rows == 10
    (forced,) = shop.materialize(force=True, allow_shrink=True)
    assert (forced.commit.outcome, forced.commit.accepted_rows) == ("replaced", 3)
    assert shop.materialize()[0].commit.outcome == "unchanged"


def test_a_change_log_that_began_anew_is_refused_also_once_its_keys_have_caught_up(shop: Shop) -> None:
    shop.write(10)
    shop.materialize()
    shop.execute("TRUNCATE core.tb_entity_change_log RESTART IDENTITY")
    shop.write(30)
    with pytest.raises(SourceRefused, match="keys began anew"):
        shop.merge_late()


def test_keys_that_were_set_back_are_refused(shop: Shop) -> None:
    shop.write(10)
    shop.materialize()
    shop.execute("TRUNCATE core.tb_entity_change_log")
    shop.execute("SELECT setval('core.tb_entity_change_log_pk_entity_change_log_seq', 3)")
    with pytest.raises(SourceRefused, match="only reached key 3"):
        shop.materialize()


def test_late_events_do_not_make_up_for_those_that_the_source_has_lost(shop: Shop) -> None:
    shop.write(10)
    shop.materialize()
    shop.execute("DELETE FROM core.tb_entity_change_log WHERE pk_entity_change_log <= 5")
    shop.write(6)
    with pytest.raises(WindowShrinks, match="published with 10 rows, of which the source has 5 left"):
        shop.materialize()
    (merged,) = shop.merge_late()
    assert merged.commit.accepted_rows == 16
    (allowed,) = shop.materialize(allow_shrink=True)
    assert (allowed.commit.outcome, allowed.commit.accepted_rows) == ("replaced", 11)


def test_a_table_that_is_rewritten_during_a_run_loses_no_event(shop: Shop) -> None:
    windows = [Window(shop.window.start - n * HOUR, WindowSize.HOUR) for n in (2, 1, 0)]
    for window in windows:
        shop.write(20, at=window.start)
    rewriting, migrated = threading.Event(), list[threading.Thread]()

    def migrate() -> None:
        with psycopg.connect(shop.url) as connection:
            connection.execute("ALTER TABLE core.tb_entity_change_log ADD COLUMN x uuid DEFAULT gen_random_uuid()")
            rewriting.set()
            # Committed once the run waits for it, which it does before it takes the snapshot of the next window.
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'core.tb_entity_change_log'::regclass"
            while connection.execute(waits).fetchone() == (0,):
                time.sleep(0.01)

    def told(_: Materialization) -> None:
        if not migrated:
            migrated.append(threading.Thread(target=migrate))
            migrated[0].start()
            assert rewriting.wait(60)

    done = shop.materialize(*windows, on_window=told)
    migrated[0].join()
    assert [each.commit.accepted_rows for each in done] == [20, 20, 20]


def test_a_partitioned_log_is_published_by_a_role_that_may_read_no_part_by_itself(database: str, role: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            f"""CREATE SCHEMA core; CREATE SEQUENCE core.keys;
            CREATE TABLE core.tb_entity_change_log (
                pk_entity_change_log bigint NOT NULL DEFAULT nextval('core.keys'), object_type text, modification_type text,
                id uuid DEFAULT gen_random_uuid(), object_id uuid, object_data jsonb, tenant_id uuid,
                created_at timestamptz NOT NULL DEFAULT now()) PARTITION BY HASH (created_at);
            CREATE TABLE core.even PARTITION OF core.tb_entity_change_log FOR VALUES WITH (MODULUS 2, REMAINDER 0);
            CREATE TABLE core.odd PARTITION OF core.tb_entity_change_log FOR VALUES WITH (MODULUS 2, REMAINDER 1);
            CREATE INDEX ON core.tb_entity_change_log (created_at);
            GRANT USAGE ON SCHEMA core TO {role}; GRANT SELECT ON core.tb_entity_change_log TO {role}"""
        )
    shop = Shop(database, tmp_path / "lake")
    shop.write(40)
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    shop.settings = shop.settings.model_copy(update={"database_url": embedded.database_url(database, name, role)})
    (done,) = shop.materialize()
    assert done.commit.accepted_rows == 40
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {role}")


def test_another_change_log_is_refused(shop: Shop, database: str) -> None:
    shop.write(10)
    shop.materialize()
    from fraiseql_pipeline.changelog.connection import sql

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(sql("contract"))
    other = Shop(database, Path(shop.settings.lake_uri))
    other.write(500)
    with pytest.raises(SourceRefused, match="another cluster, timeline or table"):
        other.materialize()


def test_a_read_that_breaks_off_publishes_nothing_and_the_next_run_is_right(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write(500)
    whole = ChangeLog.read

    def broken(self: ChangeLog, *arguments: Any, **options: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def reading() -> Iterator[Iterator[pa.RecordBatch]]:
            with whole(self, *arguments, **options) as batches:

                def some() -> Iterator[pa.RecordBatch]:
                    yield next(batches).slice(0, 100)
                    raise SourceUnavailable("the stream broke off")

                yield some()

        return reading()

    with monkeypatch.context() as patched:
        patched.setattr(ChangeLog, "read", broken)
        with pytest.raises(SourceUnavailable, match="broke off"):
            shop.materialize()
    assert shop.lake.published() == {}
    assert shop.materialize()[0].commit.accepted_rows == 500


def test_windows_of_another_size_or_before_the_start_need_a_word(shop: Shop) -> None:
    shop.materialize()
    day = Window.holding(shop.window.start - timedelta(days=1), WindowSize.DAY)
    with pytest.raises(WindowError, match=rf"windows of one hour, such as {shop.window.key}, and {day.key} is one day"):
        shop.materialize(day)
    shop.materialize(day, other_size=True)
    shop.settings = shop.settings.model_copy(update={"start": day.end})
    with pytest.raises(WindowError, match=rf"before FRAISEQL_START .* got {day.key}"):
        shop.materialize(day, other_size=True)
    assert list(shop.lake.published()) == [day, shop.window]


@pytest.mark.parametrize("jobs", [1, 3])
def test_windows_that_are_refused_keep_no_other_waiting_and_are_all_named(shop: Shop, jobs: int) -> None:
    windows = [Window(shop.window.start - n * HOUR, WindowSize.HOUR) for n in range(6, -1, -1)]
    for window in windows:
        shop.write(20, at=window.start)
    shop.materialize(windows[4])
    halted, shrinks = windows[2], windows[4]
    shop.write(100, verb="UPSERT", at=halted.start)
    shop.execute(f"DELETE FROM core.tb_entity_change_log WHERE created_at >= '{shrinks.start}' AND created_at < '{shrinks.end}'")
    told: list[Window] = []
    with pytest.raises(
        ValidationHalted, match=rf"{halted.key} is halted: .* 2 of 7 windows, the others: {shrinks.key}\.$"
    ) as found:
        shop.materialize(*windows, jobs=jobs, on_window=lambda one: told.append(one.window))
    assert found.value.window == halted.key
    assert [(key, type(error)) for key, error in found.value.refused] == [
        (halted.key, ValidationHalted),
        (shrinks.key, WindowShrinks),
    ]
    assert sorted(told) == [window for window in windows if window not in {halted, shrinks}]
    assert list(shop.lake.published()) == [window for window in windows if window != halted]


def test_a_window_whose_events_cannot_be_read_keeps_no_other_waiting(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [Window(shop.window.start - n * HOUR, WindowSize.HOUR) for n in (2, 1, 0)]
    whole = ChangeLog.read

    def read(self: ChangeLog, window: Window, *arguments: Any, **options: Any) -> Any:
        if window == windows[1]:
            raise EventsUnreadable("a page is damaged")
        return whole(self, window, *arguments, **options)

    monkeypatch.setattr(ChangeLog, "read", read)
    with pytest.raises(EventsUnreadable, match=rf"^Window {windows[1].key}: a page is damaged$") as found:
        shop.materialize(*windows)
    assert [key for key, _ in found.value.refused] == [windows[1].key]
    assert list(shop.lake.published()) == [windows[0], windows[2]]


def test_what_concerns_every_window_ends_the_run_at_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [Window(shop.window.start - n * HOUR, WindowSize.HOUR) for n in (2, 1, 0)]
    shop.write(100, verb="UPSERT", at=windows[0].start)
    asked: list[Window] = []
    whole = ChangeLog.read

    def read(self: ChangeLog, window: Window, *arguments: Any, **options: Any) -> Any:
        asked.append(window)
        if window != windows[0]:
            raise SourceUnavailable("the server went away")
        return whole(self, window, *arguments, **options)

    monkeypatch.setattr(ChangeLog, "read", read)
    with pytest.raises(SourceUnavailable, match="went away") as found:
        shop.materialize(*windows)
    assert asked == windows[:2]
    assert [key for key, _ in found.value.refused] == [windows[0].key]
    assert shop.lake.published() == {}


def test_an_audit_beside_a_run_compares_with_what_that_run_made_of_the_window(shop: Shop) -> None:
    shop.write(10)
    (first,) = shop.materialize()
    shop.write(2)
    shop.merge_late()
    with open_changelog(shop.settings) as changelog:
        audited = pipeline.audit(shop.window, first.commit, changelog=changelog, lake=shop.lake)
        assert (audited.equal, audited.source_rows, audited.lake_rows) == (True, 12, 12)
        shop.execute("DELETE FROM core.tb_entity_change_log WHERE pk_entity_change_log = 3")
        assert not pipeline.audit(shop.window, first.commit, changelog=changelog, lake=shop.lake).equal


def test_an_audit_between_the_two_commits_of_a_merge_finds_no_difference(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write(300)
    shop.write(1, verb="MELT")
    (first,) = shop.materialize()
    shop.write(2, verb="MELT")

    def away(*_: object) -> None:
        raise LakeUnavailable("gone before the second commit")

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "_commit", away)
        with pytest.raises(LakeUnavailable):
            shop.merge_late()
    assert shop.lake.quarantined(shop.window).num_rows == 3
    with open_changelog(shop.settings) as changelog:
        audited = pipeline.audit(shop.window, first.commit, changelog=changelog, lake=shop.lake)
    assert (audited.equal, audited.lake_rows) == (True, 301)


def test_late_events_of_windows_published_before_a_failover_are_added_when_forced(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Window(shop.window.start - 5 * HOUR, WindowSize.HOUR)
    for window in (old, shop.window):
        shop.write(20, at=window.start)
    shop.materialize(old, shop.window)
    whole = source.preflight
    monkeypatch.setattr(source, "preflight", lambda connection: replace(whole(connection), identity="the next timeline"))
    shop.execute(f"DELETE FROM core.tb_entity_change_log WHERE created_at < '{old.end.isoformat()}'")  # kept for a few hours only
    shop.write(1, at=old.start)
    shop.write(1, verb="MELT", at=old.start)
    with pytest.raises(SourceRefused, match="another cluster, timeline or table"):
        shop.merge_late()
    shop.materialize(force=True)
    with pytest.raises(LakeError, match="late --force"):
        shop.merge_late()
    (merged,) = shop.merge_late(force=True)
    assert (merged.window, merged.commit.outcome, merged.commit.accepted_rows) == (old, "merged", 21)
    assert (merged.commit.identity, merged.commit.quarantined_rows) == ("the next timeline", 1)
    assert (merged.source_rows, merged.accepted_rows, merged.quarantined_rows) == (2, 1, 1)
    shop.write(1, at=old.start)
    (again,) = shop.merge_late()
    assert again.commit.accepted_rows == 22
