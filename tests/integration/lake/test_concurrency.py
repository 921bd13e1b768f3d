"""Several writers, and readers beside them: one generation of a window, whole."""

from __future__ import annotations

import multiprocessing as mp
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from fraiseql_pipeline.errors import LakeError
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.lake import publish as publishing
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, assert_plain_protocol, content, publish, quarantine_events, rejected

HOUR = Window.parse("2026-11-01-13:00")
#: delta-rs cannot live in a forked child of a process that has used it; children of a fresh server can.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.lakes"])


def generation(n: int) -> tuple[pa.Table, pa.Table]:
    return lake_events(HOUR, 200 + n, seed=n), quarantine_events(HOUR, 1 + n % 5, seed=n)


def replace_repeatedly(uri: str, numbers: list[int], start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    lake = Lake(uri)
    for n in numbers:
        publish(lake, HOUR, *generation(n), settled_pk=PK + n, allow_shrink=True)


def publish_windows(uri: str, keys: list[str], start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    lake = Lake(uri)
    for key in keys:
        publish(lake, Window.parse(key), 50, 2)


def run(target: object, arguments: list[tuple[str, list[object]]]) -> None:
    start = PROCESSES.Barrier(len(arguments))
    children = [PROCESSES.Process(target=target, args=(*a, start)) for a in arguments]  # type: ignore[arg-type]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [c.exitcode for c in children] == [0] * len(children)


def test_four_processes_on_one_window_leave_the_newest_generation_whole(lake: Lake) -> None:
    run(replace_repeatedly, [(lake.uri, [i + 4 * k for k in range(6)]) for i in range(4)])

    events, quarantined = generation(23)
    assert content(lake, HOUR).equals(events)
    assert rejected(lake, HOUR)["pk"].to_pylist() == sorted(quarantined["pk"].to_pylist())
    assert lake.published()[HOUR].settled_pk == PK + 23
    assert lake.fsck() == []
    assert_plain_protocol(lake)
    sizes = {generation(n)[0].num_rows for n in range(24)}
    for version in range(1, lake.snapshot().version + 1):
        assert DeltaTable(lake.events_uri, version=version).count() in sizes


def test_four_processes_with_the_same_content_publish_it_once(lake: Lake) -> None:
    run(replace_repeatedly, [(lake.uri, [7]) for _ in range(4)])
    assert lake.snapshot().version == 1
    assert content(lake, HOUR).equals(generation(7)[0])


def test_four_processes_on_different_windows_do_not_disturb_each_other(lake: Lake) -> None:
    hours = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(-13, 11)]
    run(publish_windows, [(lake.uri, [h.key for h in hours[i::4]]) for i in range(4)])

    assert list(lake.published()) == hours
    assert [content(lake, h).equals(lake_events(h, 50)) for h in hours] == [True] * 24
    assert lake.fsck() == []
    assert_plain_protocol(lake)


def test_a_pinned_reader_sees_its_version_to_the_end(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("parquet", "read"):
        monkeypatch.setattr(f"fraiseql_pipeline.lake.{module}.ROW_GROUP_ROWS", 100)
    before = lake_events(HOUR, 1_000)
    publish(lake, HOUR, before)
    pinned = Lake(lake.uri).snapshot()
    stream = pinned.read(HOUR.start, HOUR.end)
    seen = [next(stream)]
    publish(lake, HOUR, lake_events(HOUR, 1_200, seed=2))

    assert pa.Table.from_batches([*seen, *stream]).equals(before)
    assert pa.Table.from_batches(pinned.read(HOUR.start, HOUR.end)).equals(before)
    assert pa.Table.from_batches(lake.read(HOUR.start, HOUR.end, version=pinned.version)).equals(before)
    assert content(lake, HOUR).num_rows == 1_200


def test_a_writer_that_loses_a_race_decides_again(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 100)
    rival = Lake(lake.uri)
    races = []
    link = lake.events.storage.link_entry  # type: ignore[union-attr]

    def beaten(version: int, text: bytes) -> bool:
        if not races:
            races.append(version)
            publish(rival, HOUR, lake_events(HOUR, 300, seed=3), settled_pk=PK + 50)
        return link(version, text)

    monkeypatch.setattr(lake.events.storage, "link_entry", beaten)
    assert publish(lake, HOUR, lake_events(HOUR, 200, seed=2), settled_pk=PK + 10).outcome == "skipped"
    assert races == [2]
    assert content(lake, HOUR).num_rows == 300


@pytest.mark.parametrize("force", [False, True])
def test_an_hour_gives_way_to_its_day_whose_run_is_between_its_commits(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    day, commit, races = Window.parse("2026-11-01"), lake.events.commit, []
    publish(lake, Window.parse("2026-10-30"), 5)

    def beaten(*args: object, **options: object) -> object:
        if not races:
            with pytest.raises(LakeError, match=f"a run of {day} as one window is between its two commits") as raised:
                publish(Lake(lake.uri), HOUR, 100, 3)
            races.append(raised)
        return commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lake.events, "commit", beaten)
    assert publish(lake, day, lake_events(day, 100), quarantine_events(day, 3), force=force).outcome == "published"
    assert races
    assert lake.quarantined(day).num_rows == 3
    assert lake.quarantined(HOUR).num_rows == 0
    assert lake.fsck() == []


@pytest.mark.parametrize("rows", [0, 4])
def test_a_forced_retry_keeps_what_its_first_try_quarantined(lake: Lake, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    publish(lake, HOUR, 100, 2)
    other, commit, races = Window(HOUR.end, HOUR.size), lake.events.commit, []

    def beaten(*args: object, **options: object) -> object:
        if not races:
            races.append(publish(Lake(lake.uri), other, 100, 3))
        return commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lake.events, "commit", beaten)
    assert publish(lake, HOUR, 100, rows, force=True, allow_shrink=True).outcome == "replaced"
    assert races
    assert lake.quarantine.version == 3, "one entry per window and publication"
    assert rejected(lake, HOUR).num_rows == rows
    assert lake.fsck() == []


def test_lost_races_are_counted_and_then_given_up(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 100)
    monkeypatch.setattr(publishing, "ATTEMPTS", 3)
    monkeypatch.setattr(lake.events.storage, "link_entry", lambda *_: False)
    with pytest.raises(publishing.LakeConflict, match="3 races"):
        publish(lake, HOUR, lake_events(HOUR, 200, 1))
    assert content(lake, HOUR).num_rows == 100
    assert Path(lake.events_uri, "_delta_log").exists()


def test_a_commit_that_is_replaced_at_once_is_told_as_what_it_was(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 100, 1)
    link = lake.events.storage.link_entry  # type: ignore[union-attr]

    def overtaken(version: int, text: bytes) -> bool:
        done = link(version, text)
        publish(Lake(lake.uri), HOUR, lake_events(HOUR, 130, 2), settled_pk=PK + 2, run_id="another")
        return done

    monkeypatch.setattr(lake.events.storage, "link_entry", overtaken)
    mine = publish(lake, HOUR, lake_events(HOUR, 110, 1), settled_pk=PK + 1)
    newest = Lake(lake.uri).published()[HOUR]
    assert (mine.outcome, mine.run_id, mine.accepted_rows, mine.settled_pk) == ("replaced", "run", 110, PK + 1)
    assert (newest.run_id, newest.accepted_rows, newest.table_version) == ("another", 130, mine.table_version + 1)


def test_a_window_that_is_replaced_right_behind_a_compaction_is_no_damage(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for hour in (HOUR, Window(HOUR.end, HOUR.size)):
        publish(lake, hour, 100)
    link = lake.events.storage.link_entry  # type: ignore[union-attr]

    def overtaken(version: int, text: bytes) -> bool:
        done = link(version, text)
        publish(Lake(lake.uri), HOUR, lake_events(HOUR, 130, 2))
        return done

    monkeypatch.setattr(lake.events.storage, "link_entry", overtaken)
    assert lake.maintain(HOUR.end + timedelta(days=9)).compacted_days == ("events 2026-11-01",)
    assert content(lake, HOUR).equals(lake_events(HOUR, 130, 2))
    assert lake.fsck() == []
