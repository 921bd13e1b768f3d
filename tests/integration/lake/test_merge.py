"""Late events, merged into the window they belong to: on top of what is there, counted, and whole or not at all."""

from __future__ import annotations

from datetime import timedelta

import pyarrow as pa
import pytest

from fraiseql_pipeline.errors import LakeConflict, LakeError
from fraiseql_pipeline.lake import Commit, Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events
from tests.support.lakes import PK, content, publish, quarantine_events, rejected

HOUR = Window.parse("2026-11-01-13:00")


def test_late_events_are_merged_on_top_and_counted(lake: Lake) -> None:
    everything = lake_events(HOUR, 1_000)
    late = list(range(3, 1_000, 97))
    early = [i for i in range(1_000) if i not in set(late)]
    column = everything.schema.get_field_index("pk")
    pks = [PK + i if i in set(late) else i for i in range(1_000)]
    everything = everything.set_column(column, everything.schema.field(column), pa.array(pks))
    everything = everything.sort_by([("timestamp", "ascending"), ("pk", "ascending")])
    first = publish(lake, HOUR, everything.filter(pa.compute.less(everything["pk"], PK)), 2, settled_pk=PK - 1)
    added = everything.filter(pa.compute.greater_equal(everything["pk"], PK))

    merged = publish(lake, HOUR, added, 0, settled_pk=PK + 5_000, append=True)

    assert (merged.outcome, merged.accepted_rows, merged.quarantined_rows) == ("merged", 1_000, 2)
    assert merged.source_rows == first.source_rows + len(late)
    assert (first.late_rows, merged.late_rows) == (0, len(late))
    assert len(early) + len(late) == 1_000
    assert content(lake, HOUR).equals(everything)
    assert lake.fsck() == []
    assert publish(lake, HOUR, added, 0, settled_pk=PK + 5_000, append=True).outcome == "skipped"
    with pytest.raises(LakeConflict, match="merge it again"):
        publish(lake, HOUR, added, 0, settled_pk=PK + 6_000, append=True)
    assert content(lake, HOUR).num_rows == 1_000


def test_late_events_are_counted_whether_they_are_merged_or_read_with_their_window(lake: Lake) -> None:
    def keyed(rows: int) -> pa.Table:
        """The first events of the hour, each with a key above those before it."""
        return lake_events(HOUR, 100).slice(0, rows)

    first_pk = keyed(1)["pk"][0].as_py()

    def published(rows: int, **more: object) -> int:
        commit = publish(lake, HOUR, keyed(rows), 0, settled_pk=first_pk + rows - 1, **more)
        assert Lake(lake.uri).published()[HOUR] == commit
        return commit.late_rows

    assert published(50) == 0
    assert published(60) == 10, "read again, with ten more"
    merged = publish(lake, HOUR, keyed(65).slice(60), 0, settled_pk=first_pk + 64, append=True)
    assert merged.late_rows == 15
    assert published(65, force=True) == 15, "read again, with the same"
    assert published(70) == 20
    assert published(5, allow_shrink=True, force=True) == 5, "no more than there are"
    day = publish(lake, Window.holding(HOUR.start, WindowSize.DAY), keyed(8), 0, settled_pk=first_pk + 7)
    assert (day.outcome, day.late_rows) == ("published", 8), "the day takes over what its hours counted"
    other = publish(lake, day.window, keyed(9), 0, settled_pk=first_pk + 8, identity="restored")
    assert other.late_rows == 0, "the keys of another source do not compare"


def test_a_commit_of_a_version_that_did_not_count_late_events_counts_none(lake: Lake) -> None:
    commit = publish(lake, HOUR, 30)
    stated = commit.as_json()
    del stated["late_rows"]
    assert Commit.from_json(stated, commit.table_version, 0).late_rows == 0


def test_late_events_need_a_published_window_of_the_same_source(lake: Lake) -> None:
    with pytest.raises(LakeError, match="not published"):
        publish(lake, HOUR, 5, append=True)
    publish(lake, HOUR, 5, settled_pk=10)
    with pytest.raises(LakeError, match="another source"):
        publish(lake, HOUR, 5, append=True, identity="other")


def test_a_merge_that_died_between_its_two_commits_leaves_nothing_behind(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def high(seed: int, pk: int) -> pa.Table:
        rows = quarantine_events(HOUR, 3, seed)
        column = rows.schema.get_field_index("pk")
        return rows.set_column(column, rows.schema.field(column), pa.array([pk, pk + 1, pk + 2]))

    publish(lake, HOUR, 50, 2, settled_pk=PK)
    dying = Lake(lake.uri)
    monkeypatch.setattr(dying.events, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(dying, HOUR, 0, high(1, PK + 10), settled_pk=PK + 100, append=True)
    assert rejected(lake, HOUR).num_rows == 5
    assert {f.kind for f in lake.fsck()} == {"pair"}

    merged = publish(lake, HOUR, 0, pa.concat_tables([high(1, PK + 10), high(2, PK + 150)]), settled_pk=PK + 200, append=True)

    assert merged.quarantined_rows == 8
    assert rejected(lake, HOUR)["pk"].to_pylist()[-6:] == [PK + 10, PK + 11, PK + 12, PK + 150, PK + 151, PK + 152]
    assert lake.fsck() == []


def test_late_events_are_not_merged_onto_what_a_run_left_that_died_between_its_two_commits(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, HOUR, 50, 2, settled_pk=10)
    dying = Lake(lake.uri)
    monkeypatch.setattr(dying.events, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(dying, HOUR, 49, 3, settled_pk=11, allow_shrink=True)
    with pytest.raises(LakeConflict, match="is between its two commits, or died there"):
        publish(lake, HOUR, 0, 1, settled_pk=12, append=True)
    monkeypatch.setattr("fraiseql_pipeline.lake.publish._BETWEEN_COMMITS", timedelta(0))
    with pytest.raises(LakeError, match=f"materialize {HOUR}") as raised:
        publish(lake, HOUR, 0, 1, settled_pk=12, append=True)
    assert not raised.value.retryable
    publish(lake, HOUR, 49, 3, settled_pk=12, allow_shrink=True)
    assert lake.fsck() == []
