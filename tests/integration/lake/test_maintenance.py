"""Compaction, vacuum and checkpoints change no row."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, assert_plain_protocol, content, publish, rejected

HOUR = Window.parse("2026-11-01-10:00")
HOURS = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(4)]
YOUNG = Window.parse("2026-11-04-10:00")
NOW = YOUNG.end + timedelta(hours=1)


@pytest.fixture
def filled(lake: Lake) -> Lake:
    for hour in HOURS:
        publish(lake, hour, 300, 2)
    for minute in (0, 1):
        publish(lake, YOUNG, lake_events(YOUNG, 100 + minute, minute))
    return lake


def everything(lake: Lake) -> pa.Table:
    return pa.Table.from_batches(Lake(lake.uri).read(HOUR.start, YOUNG.end))


def test_compaction_rewrites_closed_days_in_order_and_keeps_every_row(filled: Lake) -> None:
    before = everything(filled)
    published = filled.published()
    done = filled.maintain(NOW)
    assert done.compacted_days == ("events 2026-11-01", "events_quarantine 2026-11-01")
    assert (done.files_before, done.files_after) == (8, 2)
    assert everything(filled).equals(before)
    assert [rejected(filled, h).num_rows for h in HOURS] == [2] * 4
    assert Lake(filled.uri).published() == published
    assert sorted(f.rows or 0 for f in filled.snapshot().files) == [101, 1_200]
    assert filled.fsck() == []
    assert_plain_protocol(filled)
    assert filled.maintain(NOW).compacted_days == ()


def test_a_day_is_left_alone_until_it_has_been_over_for_two(lake: Lake) -> None:
    for hour in HOURS[:2]:
        publish(lake, hour, 10)
    closed = YOUNG.start.replace(day=4, hour=0)
    assert lake.maintain(closed - timedelta(microseconds=1)).compacted_days == ()
    assert lake.maintain(closed).compacted_days == ("events 2026-11-01",)


def test_a_compaction_says_that_it_changed_no_data(filled: Lake) -> None:
    filled.maintain(NOW)
    log = Path(filled.events_uri, "_delta_log")
    texts = [p.read_text() for p in sorted(log.glob("*.json"))]
    compaction = next(t for t in texts if '"compacted"' in t)
    assert '"dataChange":false' in compaction
    assert '"dataChange":true' not in compaction


def test_compacted_windows_are_replaced_and_merged_as_before(filled: Lake) -> None:
    filled.maintain(NOW)
    newer = lake_events(HOURS[1], 350, 5)
    assert publish(filled, HOURS[1], newer, 2, settled_pk=PK + 1).outcome == "replaced"
    assert content(filled, HOURS[1]).equals(newer)
    assert [content(filled, h).num_rows for h in HOURS] == [300, 350, 300, 300]
    assert filled.fsck() == []


def test_a_compaction_gives_way_to_a_replacement(filled: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    rival, raced = Lake(filled.uri), []
    commit = filled.events.commit

    def late(*args: object, **options: object) -> object:
        if not raced:
            raced.append(publish(rival, HOURS[0], lake_events(HOURS[0], 400, 8)))
        return commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(filled.events, "commit", late)
    assert "events 2026-11-01" not in filled.maintain(NOW).compacted_days
    assert content(filled, HOURS[0]).num_rows == 400
    assert filled.fsck() == []
    monkeypatch.undo()
    assert "events 2026-11-01" in filled.maintain(NOW).compacted_days
    assert content(filled, HOURS[0]).equals(lake_events(HOURS[0], 400, 8))


def test_a_compaction_whose_commit_was_taken_and_reported_as_lost_is_done(filled: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = filled.events.commit

    def unanswered(*args: object, **options: object) -> None:
        commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(filled.events, "commit", unanswered)
    assert "events 2026-11-01" in filled.maintain(NOW).compacted_days
    assert [content(filled, h).num_rows for h in HOURS] == [300] * len(HOURS)
    assert filled.fsck() == []


def test_only_what_is_older_than_the_retention_is_deleted(filled: Lake) -> None:
    publish(filled, HOURS[0], lake_events(HOURS[0], 310, 4))
    day = Path(filled.events_uri, "event_date=2026-11-01")
    orphans = [day / "old.parquet", day / "young.parquet"]
    for orphan in orphans:
        shutil.copy(next(day.glob("window*")), orphan)
    os.utime(orphans[0], (1, 1))
    staged = Path(filled.events_uri, "_staging", "dead.parquet")
    staged.write_bytes(b"x")
    os.utime(staged, (1, 1))
    pinned = filled.snapshot()

    done = filled.maintain(HOURS[-1].end)

    assert (done.deleted_files, done.deleted_leftovers) == (1, 1)
    assert [o.exists() for o in orphans] == [False, True]
    assert pa.Table.from_batches(pinned.read(HOUR.start, YOUNG.end)).num_rows == 310 + 900 + 101
    with pytest.raises(InputError, match="at least one hour"):
        filled.maintain(NOW, retention=timedelta(0))
