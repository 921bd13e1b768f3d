"""What fsck finds, what it says, what it repairs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from deltalake import DeltaTable, write_deltalake

from fraiseql_pipeline.errors import LakeDamaged
from fraiseql_pipeline.lake import Facts, Finding, Lake, fsck
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, SETTLED_AT, content, publish, quarantine_events, rejected

HOUR = Window.parse("2026-11-01-13:00")
HOURS = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(4)]


@pytest.fixture
def filled(lake: Lake) -> Lake:
    for hour in HOURS:
        publish(lake, hour, 100, 2)
    return lake


def log(lake: Lake, table: str = "events") -> Path:
    return Path(lake.uri, table, "_delta_log")


def kinds(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(f.table, f.kind) for f in findings}


@pytest.mark.parametrize("damage", [b"", b'{"commitInfo":'], ids=["empty", "half"])
def test_a_torn_tip_is_moved_aside_and_the_window_comes_back_by_a_retry(filled: Lake, damage: bytes) -> None:
    tip = log(filled) / f"{4:020d}.json"
    tip.write_bytes(damage)
    found = filled.fsck()
    assert ("events", "torn_entry") in kinds(found)
    assert not any(f.repaired for f in found)
    assert tip.read_bytes() == damage

    repaired = Lake(filled.uri).fsck(repair=True)

    assert [f.kind for f in repaired if f.repaired] == ["torn_entry"]
    fresh = Lake(filled.uri)
    assert list(fresh.published()) == HOURS[:3]
    publish(fresh, HOURS[3], 100, 2)
    assert Lake(filled.uri).fsck() == []
    assert content(filled, HOURS[3]).num_rows == 100


def test_an_empty_entry_with_others_behind_it_names_the_window_to_materialize(filled: Lake) -> None:
    (log(filled) / f"{2:020d}.json").write_bytes(b"")
    assert ("events", "torn_entry") in kinds(Lake(filled.uri).fsck(repair=True))
    fresh = Lake(filled.uri)
    assert list(fresh.published()) == [HOURS[0], *HOURS[2:]]
    assert publish(fresh, HOURS[1], 100, 2).outcome == "published"
    assert Lake(filled.uri).fsck() == []


def test_a_torn_checkpoint_is_moved_aside_and_nothing_is_lost(lake: Lake) -> None:
    for n in range(12):
        publish(lake, HOUR, lake_events(HOUR, 10 + n, n))
    (log(lake) / f"{10:020d}.checkpoint.parquet").write_bytes(b"")
    assert kinds(lake.fsck()) == {("events", "torn_checkpoint"), ("events", "unreadable")}
    assert kinds(lake.fsck(repair=True)) == {("events", "torn_checkpoint")}
    assert lake.fsck() == []
    assert content(lake, HOUR).num_rows == 21


@pytest.mark.parametrize("table", ["events", "events_quarantine"])
def test_missing_and_short_files_are_named(filled: Lake, table: str) -> None:
    first, second, *_ = sorted(Path(filled.uri, table).rglob("*.parquet"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = {(f.kind, f.subject.rsplit("/", 1)[-1]) for f in filled.fsck() if f.table == table}
    assert {("missing_file", first.name), ("short_file", second.name)} <= found
    assert all(f.remedy for f in filled.fsck())


def test_rows_that_differ_from_the_commit_are_named(filled: Lake) -> None:
    DeltaTable(filled.events_uri).delete("entity_type = 'Order'")
    found = filled.fsck()
    assert {f.kind for f in found} == {"window_rows"}
    assert {f.subject for f in found} == {h.key for h in HOURS}


def test_rows_that_somebody_added_are_named(filled: Lake) -> None:
    write_deltalake(DeltaTable(filled.events_uri), lake_events(HOURS[1], 5, 77), mode="append")
    assert [(f.kind, f.subject) for f in filled.fsck()] == [("window_rows", HOURS[1].key)]


def test_a_quarantine_that_does_not_fit_is_named(filled: Lake) -> None:
    DeltaTable(filled.quarantine_uri).delete(f"window_key = '{HOURS[2].key}'")
    assert [(f.kind, f.subject) for f in filled.fsck()] == [("pair", HOURS[2].key)]
    assert publish(filled, HOURS[2], 100, 2, force=True).outcome == "replaced"
    assert filled.fsck() == []
    assert rejected(filled, HOURS[2]).num_rows == 2


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("how", ["missing", "torn"])
def test_force_brings_a_damaged_quarantine_back(filled: Lake, how: str) -> None:
    damage(sorted(Path(filled.quarantine_uri).rglob("*.parquet"))[1], how)
    assert filled.fsck() != []
    for hour in HOURS:
        assert publish(Lake(filled.uri), hour, 100, 2, force=True).outcome == "replaced"
    assert filled.fsck() == []
    assert [filled.quarantined(hour).num_rows for hour in HOURS] == [2] * 4


def test_force_leaves_each_rejected_row_once(filled: Lake) -> None:
    write_deltalake(DeltaTable(filled.quarantine_uri), quarantine_events(HOURS[1], 2), mode="append")
    assert kinds(filled.fsck()) == {("events_quarantine", "pair")}
    publish(filled, HOURS[1], 100, 2, force=True)
    assert filled.fsck() == []
    assert rejected(filled, HOURS[1]).num_rows == 2


@pytest.mark.parametrize("how", ["missing", "torn"])
@pytest.mark.parametrize("table", ["events", "events_quarantine"])
def test_a_damaged_compacted_file_comes_back_by_what_fsck_tells(filled: Lake, table: str, how: str) -> None:
    filled.maintain(HOUR.end + timedelta(days=5))
    damage(next(Path(filled.uri, table).rglob("day-*.parquet")), how)
    with pytest.raises(LakeDamaged):
        publish(Lake(filled.uri), HOURS[0], lake_events(HOURS[0], 110, 1), 3)

    while found := [f.subject for f in Lake(filled.uri).fsck() if f.kind in {"window_rows", "pair"}]:
        publish(Lake(filled.uri), Window.parse(found[0]), 100, 2, force=True)

    assert Lake(filled.uri).fsck() == []
    assert [content(filled, hour).equals(lake_events(hour, 100)) for hour in HOURS] == [True] * 4
    assert [rejected(filled, hour).num_rows for hour in HOURS] == [2] * 4


def test_a_run_beside_fsck_is_no_defect(filled: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    look, runs = fsck._file_findings, []

    def beside(table: Table) -> Iterator[Finding]:
        yield from look(table)
        if table.name == "events_quarantine" and not runs:
            runs.append(publish(Lake(filled.uri), Window(HOURS[3].end, HOUR.size), 50, 3))

    monkeypatch.setattr(fsck, "_file_findings", beside)
    assert filled.fsck() == []
    assert runs


def test_a_defect_is_found_beside_runs_that_never_pause(filled: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    DeltaTable(filled.events_uri).delete(
        f"timestamp >= '{HOURS[1].start.isoformat()}' AND timestamp < '{HOURS[1].end.isoformat()}'"
    )
    look, later = fsck._file_findings, (Window(HOURS[3].end + timedelta(hours=h), HOUR.size) for h in range(9))

    def beside(table: Table) -> Iterator[Finding]:
        yield from look(table)
        if table.name == "events_quarantine":
            publish(Lake(filled.uri), next(later), 50, 3)

    monkeypatch.setattr(fsck, "_file_findings", beside)
    assert [(f.kind, f.subject) for f in filled.fsck()] == [("window_rows", HOURS[1].key)]


def test_a_file_that_is_removed_while_a_directory_is_listed_hides_no_other(filled: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = log(filled) / "0.json"
    gone.symlink_to("nowhere")
    assert sorted(filled.events.storage.names("_delta_log")) == sorted(
        f"_delta_log/{path.name}" for path in log(filled).iterdir() if path != gone
    )


def test_old_leftovers_are_reported_and_deleted(filled: Lake) -> None:
    old = Path(filled.events_uri, "_staging", "window-x.parquet")
    young = Path(filled.events_uri, "_staging", "window-y.parquet")
    aside, under_way = (log(filled) / f".{9:020d}.json.{name}.tmp" for name in ("0123", "4567"))
    for path in (old, young, aside, under_way):
        path.write_bytes(b"x")
    for path in (old, aside):
        os.utime(path, (1, 1))
    assert {f.subject.rsplit("/", 1)[-1] for f in filled.fsck()} == {old.name, aside.name}
    filled.fsck(repair=True)
    assert [path.exists() for path in (old, young, aside, under_way)] == [False, True, False, True]
    assert filled.fsck() == []


def test_the_closed_files_of_a_long_window_are_no_leftovers(filled: Lake) -> None:
    window = Window(HOURS[3].end, HOUR.size)
    with filled.stage(window) as staged:
        for batch in lake_events(window, 20).to_batches():
            staged.write(batch)
        staged.finish()
        for path in Path(filled.events_uri, "_staging").iterdir():
            os.utime(path, (time.time() - 7_200,) * 2)
        assert Lake(filled.uri).fsck(repair=True) == []
        assert filled.commit(staged, Facts(PK, "sealed", "source", "run", SETTLED_AT, 20)).accepted_rows == 20
