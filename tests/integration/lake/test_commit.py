"""One Delta commit per window: what is published, replaced, merged, refused."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from fraiseql_pipeline.errors import LakeConflict, LakeDamaged, LakeError, WindowShrinks
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.lake.storage import LocalStorage
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events
from tests.support.lakes import PK, assert_plain_protocol, content, publish, quarantine_events, rejected

HOUR = Window.parse("2026-11-01-13:00")
NEXT = Window.parse("2026-11-01-14:00")
DAY = Window.parse("2026-11-01")


def versions(lake: Lake) -> tuple[int, int]:
    fresh = Lake(lake.uri, lake.options)
    fresh.events.refresh()
    fresh.quarantine.refresh()
    return fresh.events.version, fresh.quarantine.version


def test_a_published_window_reads_back_as_it_was(lake: Lake) -> None:
    events = lake_events(HOUR, 2_500)
    commit = publish(lake, HOUR, events, 7)

    assert (commit.outcome, commit.accepted_rows, commit.quarantined_rows, commit.source_rows) == ("published", 2_500, 7, 2_507)
    assert content(lake, HOUR).equals(events)
    assert rejected(lake, HOUR).num_rows == 7
    assert commit.reasons == {"entity_id:uuid": 7}
    assert Lake(lake.uri).published() == {HOUR: commit}
    assert lake.fsck() == []
    assert_plain_protocol(lake)


def test_recommitting_a_window_changes_nothing(lake: Lake) -> None:
    first = publish(lake, HOUR, 300, 5)
    before = versions(lake)

    for settled_pk in (PK, PK + 1, PK + 2):
        again = publish(Lake(lake.uri), HOUR, 300, 5, settled_pk=settled_pk, batch_rows=77)
        assert again.outcome == "unchanged"
        assert (again.table_version, again.content_hash, again.settled_pk) == (first.table_version, first.content_hash, PK)

    assert versions(lake) == before
    assert content(lake, HOUR).num_rows == 300


def test_the_files_of_a_recommit_that_changed_nothing_are_gone(lake: Lake) -> None:
    publish(lake, HOUR, 300, 5)
    root = Path(lake.events_uri).parent
    before = sorted(root.rglob("*.parquet"))
    publish(lake, HOUR, 300, 5)
    assert sorted(root.rglob("*.parquet")) == before


def test_forcing_rewrites_the_same_content_once_more(lake: Lake) -> None:
    publish(lake, HOUR, 300, 5)
    again = publish(lake, HOUR, 300, 5, force=True)
    assert again.outcome == "replaced"
    assert content(lake, HOUR).num_rows == 300
    assert rejected(lake, HOUR).num_rows == 5


def test_a_provisional_window_becomes_sealed_without_touching_a_file(lake: Lake) -> None:
    first = publish(lake, HOUR, 300, state="provisional")
    files = lake.snapshot().files
    sealed = publish(lake, HOUR, 300, state="sealed", settled_pk=PK + 1)

    assert (sealed.outcome, sealed.state, sealed.settled_pk) == ("replaced", "sealed", PK + 1)
    assert sealed.content_hash == first.content_hash
    assert lake.snapshot().files == files
    assert publish(lake, HOUR, 300, state="provisional", settled_pk=PK + 2).outcome == "unchanged"


def test_replacing_a_window_leaves_its_neighbours_alone(lake: Lake) -> None:
    publish(lake, HOUR, 300, 3)
    publish(lake, NEXT, 200, 2)
    newer = lake_events(HOUR, 400, seed=9)
    commit = publish(lake, HOUR, newer, quarantine_events(HOUR, 4, seed=9))

    assert commit.outcome == "replaced"
    assert content(lake, HOUR).equals(newer)
    assert rejected(lake, HOUR).num_rows == 4
    assert content(lake, NEXT).equals(lake_events(NEXT, 200))
    assert rejected(lake, NEXT).num_rows == 2
    assert lake.fsck() == []


def test_a_lower_settled_pk_is_skipped(lake: Lake) -> None:
    publish(lake, HOUR, 300)
    before = versions(lake)
    assert publish(lake, HOUR, 500, 9, settled_pk=PK - 1).outcome == "skipped"
    assert versions(lake) == before
    assert content(lake, HOUR).num_rows == 300


def test_another_source_is_not_measured_by_the_first_ones_pks(lake: Lake) -> None:
    publish(lake, HOUR, 300)
    assert publish(lake, HOUR, lake_events(HOUR, 301, 4), settled_pk=5, identity="restored").outcome == "replaced"


def test_an_empty_window_is_published_too(lake: Lake) -> None:
    commit = publish(lake, HOUR, 0)
    assert (commit.outcome, commit.source_rows, commit.quarantine_version, commit.bytes) == ("published", 0, None, 0)
    assert list(Lake(lake.uri).published()) == [HOUR]
    assert publish(lake, HOUR, 0).outcome == "unchanged"
    assert publish(lake, HOUR, 10).outcome == "replaced"
    assert content(lake, HOUR).num_rows == 10


def test_an_empty_quarantine_that_stays_empty_gets_no_commit(lake: Lake) -> None:
    publish(lake, HOUR, 10)
    publish(lake, NEXT, 10)
    assert versions(lake) == (2, 0)


def test_a_row_that_became_sound_leaves_the_quarantine(lake: Lake) -> None:
    publish(lake, HOUR, 10, 4)
    commit = publish(lake, HOUR, 14)
    assert commit.quarantined_rows == 0
    assert rejected(lake, HOUR).num_rows == 0
    assert lake.fsck() == []


def test_a_shrinking_window_is_refused_unless_allowed(lake: Lake) -> None:
    publish(lake, HOUR, 300, 10)
    before = versions(lake)
    with pytest.raises(WindowShrinks, match="published with 310 rows, of which the source has 309 left"):
        publish(lake, HOUR, 305, 4)
    assert versions(lake) == before
    assert publish(lake, HOUR, 305, 4, allow_shrink=True).outcome == "replaced"
    assert content(lake, HOUR).num_rows == 305


def test_a_day_does_not_take_back_what_one_of_its_hours_has_of_a_later_settlement(lake: Lake) -> None:
    publish(lake, HOUR, 10, settled_pk=PK + 1)
    day = Window.holding(HOUR.start, WindowSize.DAY)
    with pytest.raises(LakeConflict, match=f"{HOUR} up to a later event"):
        publish(lake, day, lake_events(HOUR, 10))
    assert list(lake.published()) == [HOUR]


def test_a_day_of_another_source_is_not_measured_by_the_pks_of_its_hours(lake: Lake) -> None:
    publish(lake, HOUR, 10, settled_pk=PK + 1, identity="the source before")
    assert publish(lake, DAY, lake_events(HOUR, 10)).outcome == "published"
    assert list(lake.published()) == [DAY]


def test_a_day_without_rejected_rows_leaves_none_of_its_hours(lake: Lake) -> None:
    publish(lake, HOUR, 10, 2)
    assert publish(lake, DAY, lake_events(HOUR, 12)).quarantined_rows == 0
    assert rejected(lake, HOUR).num_rows == 0
    assert lake.fsck() == []


def test_hours_wait_for_a_day_whose_run_died_between_its_commits(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 10, 2)
    day = Window.holding(HOUR.start, WindowSize.DAY)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(lake.events, "commit", dies)
        publish(lake, day, lake_events(HOUR, 10), quarantine_events(day, 2), allow_shrink=True)
    for again in (HOUR, NEXT):
        with pytest.raises(LakeConflict, match=f"materialize {day}"):
            publish(Lake(lake.uri), again, 10, 2)
    with monkeypatch.context() as later, pytest.raises(LakeError, match=f"materialize {day}") as raised:
        later.setattr("fraiseql_pipeline.lake.publish._BETWEEN_COMMITS", timedelta(0))
        publish(Lake(lake.uri), HOUR, 10, 2)
    assert not raised.value.retryable
    done = publish(Lake(lake.uri), day, lake_events(HOUR, 10), quarantine_events(day, 2), allow_shrink=True)
    assert done.outcome == "published"
    assert lake.fsck() == []


def test_a_forced_run_that_late_events_overtook_is_to_be_tried_again(lake: Lake) -> None:
    """It read the source before they came: that it has fewer does not mean that any are gone."""
    settled = lake_events(HOUR, 15)
    newest = pc.max(settled["pk"]).as_py()
    first, late = (
        settled.filter(pc.is_in(settled["pk"], pa.array(pks)))
        for pks in (range(newest - 14, newest - 4), range(newest - 4, newest + 1))
    )
    publish(lake, HOUR, first, settled_pk=newest - 5)
    publish(lake, HOUR, late, settled_pk=newest, append=True)
    with pytest.raises(LakeConflict, match="up to a later event, with 15 rows of which this one has 10"):
        publish(lake, HOUR, first, settled_pk=newest - 5, force=True)
    with pytest.raises(WindowShrinks):
        publish(lake, HOUR, first, settled_pk=newest, force=True)
    assert publish(lake, HOUR, first, settled_pk=newest - 5, force=True, allow_shrink=True).accepted_rows == 10


def test_rows_that_do_not_add_up_are_refused(lake: Lake) -> None:
    from fraiseql_pipeline.lake import Facts
    from tests.support.lakes import SETTLED_AT

    with lake.stage(HOUR) as staged:
        staged.write(lake_events(HOUR, 10).to_batches()[0])
        with pytest.raises(LakeError, match="11 read, 10 accepted, 0 quarantined"):
            lake.commit(staged, Facts(1, "sealed", "s", "r", SETTLED_AT, 11))
    assert lake.published() == {}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (lambda: lake_events(NEXT, 10), "outside"),
        (lambda: lake_events(HOUR, 10).take(list(range(9, -1, -1))), "order"),
        (lambda: pa.concat_tables([lake_events(HOUR, 10)] * 2), "order"),
        (lambda: lake_events(HOUR, 10).drop_columns(["data"]), "missing"),
    ],
    ids=["another window's", "backwards", "twice", "a column short"],
)
def test_events_that_do_not_belong_are_refused_before_anything_is_written(lake: Lake, events: object, message: str) -> None:
    with pytest.raises(LakeError, match=message):
        publish(lake, HOUR, events())  # type: ignore[operator]
    assert lake.published() == {}


def test_an_older_run_never_overwrites_the_quarantine_of_a_newer_one(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 50, 2, settled_pk=PK)
    newer = Lake(lake.uri)
    monkeypatch.setattr(newer.events, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(newer, HOUR, 60, 6, settled_pk=PK + 10)
    monkeypatch.setattr("fraiseql_pipeline.lake.publish.ATTEMPTS", 2)
    with pytest.raises(LakeConflict):
        publish(lake, HOUR, 55, 5, settled_pk=PK + 5)
    assert rejected(lake, HOUR).num_rows == 6
    assert publish(lake, HOUR, 60, 6, settled_pk=PK + 10).outcome == "replaced"
    assert lake.fsck() == []


def test_a_day_replaces_its_hours_and_then_refuses_them(lake: Lake) -> None:
    publish(lake, HOUR, 300, 3)
    publish(lake, NEXT, 200, 2)
    other = Window.parse("2026-11-02-00:00")
    publish(lake, other, 10)
    with pytest.raises(WindowShrinks, match="published with 505 rows"):
        publish(lake, DAY, 100)
    commit = publish(lake, DAY, 600, 5, allow_shrink=True)

    assert list(Lake(lake.uri).published()) == [DAY, other]
    assert commit.outcome == "published"
    assert content(lake, DAY).equals(lake_events(DAY, 600))
    assert rejected(lake, HOUR).num_rows == 0
    assert rejected(lake, DAY).num_rows == 5
    assert lake.fsck() == []
    with pytest.raises(LakeError, match="2026-11-01 is published as one window"):
        publish(lake, HOUR, 300)


def test_a_window_inside_a_compacted_file_is_replaced_alone(lake: Lake) -> None:
    hours = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(4)]
    for hour in hours:
        publish(lake, hour, 500, 3)
    for uri in (lake.events_uri, lake.quarantine_uri):
        DeltaTable(uri).optimize.compact()
    assert len(lake.snapshot().files) == 1
    assert [content(lake, h).equals(lake_events(h, 500)) for h in hours] == [True] * 4

    newer = lake_events(hours[1], 600, seed=5)
    publish(lake, hours[1], newer, quarantine_events(hours[1], 4, seed=5))

    assert content(lake, hours[1]).equals(newer)
    assert [content(lake, h).equals(lake_events(h, 500)) for h in (hours[0], *hours[2:])] == [True] * 3
    assert [rejected(lake, h).num_rows for h in hours] == [3, 4, 3, 3]
    assert lake.fsck() == []
    assert_plain_protocol(lake)


def test_a_stale_run_never_doubles_what_a_compaction_moved(lake: Lake) -> None:
    publish(lake, HOUR, 500)
    publish(lake, NEXT, 500)
    stale = Lake(lake.uri)
    assert len(stale.snapshot().files) == 2
    DeltaTable(lake.events_uri).optimize.compact()
    publish(stale, HOUR, lake_events(HOUR, 600, 3))
    assert content(lake, HOUR).num_rows == 600
    assert content(lake, NEXT).num_rows == 500
    assert pa.table(DeltaTable(lake.events_uri).scan(["pk"])).num_rows == 1_100


def test_the_commit_is_found_after_checkpoints_by_one_lookup(lake: Lake) -> None:
    hours = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(24)]
    for hour in hours:
        publish(lake, hour, 3)
    publish(lake, hours[2], 4)
    log = Path(lake.events_uri) / "_delta_log"
    assert sorted(p.name for p in log.glob("*.checkpoint.parquet")) == [f"{v:020d}.checkpoint.parquet" for v in (10, 20)]

    fresh = Lake(lake.uri)
    assert fresh.published(hours[0].start, hours[0].end)[hours[0]].accepted_rows == 3
    assert [c.accepted_rows for c in Lake(lake.uri).published().values()] == [3, 3, 4] + [3] * 21
    opened = DeltaTable(lake.events_uri)
    for hour, commit in fresh.published().items():
        assert opened.transaction_version(f"fraiseql/events/{hour.key}") == commit.table_version
    assert_plain_protocol(lake)


def test_what_the_lake_is_published_from_is_told_by_the_latest_commit(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lake.newest() is None
    windows = [Window(HOUR.start + timedelta(hours=n), HOUR.size) for n in range(63)]
    for number, window in enumerate(windows):
        publish(lake, window, 0, settled_pk=PK + number)
    publish(lake, windows[40], 0, settled_pk=PK + 70, force=True)
    publish(lake, windows[2], 0, settled_pk=PK + 5, identity="restored", force=True)
    entries: list[str] = []
    read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda storage, name: entries.append(name) or read(storage, name))

    fresh = Lake(lake.uri)
    newest = fresh.newest()
    assert newest is not None
    assert (newest.identity, newest.settled_pk) == ("restored", PK + 5)
    assert len([name for name in entries if name.endswith(".json")]) < 60
    assert lake.newest() == Lake(lake.uri).newest()
    again = fresh.events.window(windows[40])  # not hidden by an older entry of the same window
    assert again is not None
    assert again.settled_pk == PK + 70


def test_the_commit_states_its_facts_in_the_history(lake: Lake) -> None:
    commit = publish(lake, HOUR, 30, 2, run_id="run-7")
    stated = DeltaTable(lake.events_uri).history(1)[0]["fraiseql"]
    assert stated == json.loads(json.dumps(commit.as_json()))
    assert (stated["window"], stated["settled_pk"], stated["run_id"]) == (HOUR.key, PK, "run-7")
    assert stated["quarantine_version"] == 1


def test_a_table_that_was_upgraded_by_somebody_else_is_refused(lake: Lake) -> None:
    publish(lake, HOUR, 30)
    DeltaTable(lake.events_uri).alter.add_constraint({"positive": "pk > 0"})
    for opened in (lake, Lake(lake.uri)):
        with pytest.raises(LakeError, match="protocol"):
            publish(opened, HOUR, 31)


def test_what_nobody_committed_is_deleted(lake: Lake) -> None:
    with pytest.raises(LakeDamaged), lake.stage(HOUR) as staged:
        staged.write(lake_events(HOUR, 100).to_batches()[0])
        staged.finish()
        raise LakeDamaged("the source broke off")
    assert list(Path(lake.uri).rglob("*.parquet")) == []
