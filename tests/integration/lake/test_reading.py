"""Reads: order, pruning, columns, types, whoever wrote or compacted the files."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, WriterProperties, write_deltalake

from fraiseql_pipeline.errors import InputError, LakeDamaged, LakeUnavailable
from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.lake import read as reading
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, content, publish, quarantine_events

HOUR = Window.parse("2026-11-01-13:00")
NEXT = Window.parse("2026-11-01-14:00")
ORDER = [("timestamp", "ascending"), ("pk", "ascending")]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 100 rows, and at most 300 rows held."""
    for module in ("parquet", "read"):
        monkeypatch.setattr(f"fraiseql_pipeline.lake.{module}.ROW_GROUP_ROWS", 100)
    monkeypatch.setattr("fraiseql_pipeline.lake.read.HELD_ROWS", 300)


def read(lake: Lake, start: datetime, end: datetime, **options: object) -> pa.Table:
    return pa.Table.from_batches(lake.read(start, end, **options), None)  # type: ignore[arg-type]


def test_a_lake_that_is_not_there_holds_nothing(lake: Lake) -> None:
    assert lake.published() == {}
    assert list(lake.read(HOUR.start, HOUR.end)) == []
    assert lake.fsck() == []
    assert not Path(lake.uri).exists()


def test_a_range_is_read_to_the_microsecond(lake: Lake) -> None:
    events = pa.concat_tables([lake_events(HOUR, 500), lake_events(NEXT, 500)])
    publish(lake, HOUR, events.slice(0, 500))
    publish(lake, NEXT, events.slice(500))
    at = events["timestamp"]
    for first, last in ((0, 1_000), (3, 997), (499, 501), (200, 201), (10, 10)):
        start = at[first].as_py()
        end = at[last].as_py() if last < 1_000 else NEXT.end
        wanted = events.filter(pc.and_(pc.greater_equal(at, start), pc.less(at, end)))
        batches = list(lake.read(start, end))
        assert all(b.num_rows for b in batches)
        assert pa.Table.from_batches(batches, LAKE_SCHEMA).equals(wanted)


def test_columns_and_entity_types_are_chosen(lake: Lake) -> None:
    events = lake_events(HOUR, 1_000)
    publish(lake, HOUR, events)
    names = ["data", "event_id", "event_date"]
    got = read(lake, HOUR.start, HOUR.end, columns=names, entity_types=("Order", "User"))
    wanted = events.filter(pc.is_in(events["entity_type"], pa.array(["Order", "User"]))).select(names)
    assert got.equals(wanted)
    assert list(lake.read(HOUR.start, HOUR.end, entity_types=("Ordering",))) == []
    with pytest.raises(InputError, match="Unknown columns \\['nope'\\]"):
        lake.read(HOUR.start, HOUR.end, columns=["nope"])


def test_row_groups_are_full_sorted_and_disjoint(lake: Lake, small_groups: None) -> None:
    publish(lake, HOUR, 1_050, batch_rows=33)
    file = lake.snapshot().files[0]
    parquet = pq.ParquetFile(Path(lake.events_uri, file.path))
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    assert [g.num_rows for g in groups] == [100] * 10 + [50]
    column = parquet.schema_arrow.get_field_index("timestamp")
    bounds = [(g.column(column).statistics.min, g.column(column).statistics.max) for g in groups]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(bounds))
    assert (file.rows, file.low, file.high) == (1_050, micros(bounds[0][0]), micros(bounds[-1][1]))


def micros(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def test_files_hold_what_was_decided(lake: Lake) -> None:
    publish(lake, HOUR, 3_000)
    parquet = pq.ParquetFile(Path(lake.events_uri, lake.snapshot().files[0].path))
    columns = {c.path_in_schema: c for c in (parquet.metadata.row_group(0).column(i) for i in range(parquet.metadata.num_columns))}
    assert "event_date" not in columns
    assert all(c.compression == "ZSTD" for c in columns.values())
    assert {n for n, c in columns.items() if c.statistics is not None} == {
        "event_id", "event_type", "entity_type", "entity_id", "timestamp", "user_id", "org_id", "pk", "seq",
    }  # fmt: skip
    assert {n for n, c in columns.items() if "DELTA_BINARY_PACKED" in c.encodings} == {
        "timestamp", "pk", "seq", "duration_ms", "started_at", "commit_time",
    }  # fmt: skip
    assert {n for n, c in columns.items() if c.has_dictionary_page} >= {"event_type", "entity_type", "org_id"}
    assert not any(columns[n].has_dictionary_page for n in ("data", "event_id", "entity_id", "data_before"))
    assert all(c.bloom_filter_offset is not None for n, c in columns.items() if n in ("event_id", "entity_id")) or not hasattr(
        columns["event_id"], "bloom_filter_offset"
    )
    assert parquet.metadata.row_group(0).sorting_columns


def test_statistics_in_the_log_are_exact(lake: Lake) -> None:
    events = lake_events(HOUR, 3_000)
    publish(lake, HOUR, events)
    log = Path(lake.events_uri, "_delta_log", f"{1:020d}.json").read_text().splitlines()
    stats = json.loads(next(json.loads(line)["add"]["stats"] for line in log if '"add"' in line))
    assert stats["numRecords"] == 3_000
    for name in ("event_type", "entity_type", "org_id", "pk"):
        extremes = pc.min_max(events[name]).as_py()
        assert (stats["minValues"][name], stats["maxValues"][name]) == (extremes["min"], extremes["max"])
        assert stats["nullCount"][name] == events[name].null_count
    assert datetime.fromisoformat(stats["minValues"]["timestamp"]) == events["timestamp"][0].as_py()
    assert datetime.fromisoformat(stats["maxValues"]["timestamp"]) == events["timestamp"][-1].as_py()
    assert "data" not in stats["minValues"]


@pytest.mark.parametrize(
    "long",
    ["z" * 65, "z" * 63 + "\U0010ffff" * 5, "a" * 63 + "\ud7ff" * 5, "\U0010ffff" * 70, "z" * 5_000],
    ids=["too long", "ends in the last character", "ends before the surrogates", "of the last character", "too long for Parquet"],
)
def test_a_type_too_long_for_the_log_hides_no_event(lake: Lake, long: str) -> None:
    publish(lake, HOUR, with_column(lake_events(HOUR, 10), "entity_type", ["A", long] * 5))
    publish(lake, NEXT, 10)
    stats = json.loads(_stats(lake))
    assert "" <= stats["minValues"]["entity_type"] <= "A"
    assert stats["maxValues"]["entity_type"] >= long or len(long) > 4_096
    dataset, frame = DeltaTable(lake.events_uri).to_pyarrow_dataset(), pl.scan_delta(lake.events_uri)
    for name in ("A", long):
        assert dataset.count_rows(filter=pc.field("entity_type") == name) == 5
        assert frame.filter(pl.col("entity_type") == name).select(pl.len()).collect().item() == 5
        assert pa.table(DeltaTable(lake.events_uri).scan(predicate=f"entity_type = '{name}'")).num_rows == 5
        assert read(lake, HOUR.start, NEXT.end, entity_types=[name]).num_rows == 5


def _stats(lake: Lake) -> str:
    log = Path(lake.events_uri, "_delta_log", f"{1:020d}.json").read_text().splitlines()
    return str(next(json.loads(line)["add"]["stats"] for line in log if '"add"' in line))


def test_files_in_any_order_are_read_in_order(lake: Lake, small_groups: None) -> None:
    """Foreign compactions leave rows, row groups and files in any order, all overlapping: too much to hold at once."""
    events = lake_events(HOUR, 2_000)
    publish(lake, HOUR, events)
    shuffled = events.take(pa.array([(i * 787) % 2_000 for i in range(2_000)]))
    table = DeltaTable(lake.events_uri)
    for part in range(2):
        write_deltalake(
            table, shuffled.slice(part * 1_000, 1_000), mode="overwrite" if part == 0 else "append", target_file_size=1 << 20
        )
    got = list(Lake(lake.uri).read(HOUR.start, HOUR.end))
    assert pa.Table.from_batches(got).equals(events)
    assert max(b.num_rows for b in got) <= 300
    at = events["timestamp"]
    start, end = at[700].as_py(), at[1_300].as_py()
    wanted = events.filter(pc.and_(pc.greater_equal(at, start), pc.less(at, end)))
    assert read(Lake(lake.uri), start, end).equals(wanted)


def test_rows_of_one_instant_are_ordered_by_pk_across_files(lake: Lake, small_groups: None) -> None:
    events = lake_events(HOUR, 600)
    column = events.schema.get_field_index("timestamp")
    same = pa.array([HOUR.start + timedelta(seconds=i // 200) for i in range(600)], events.schema.field(column).type)
    events = events.set_column(column, events.schema.field(column), same).sort_by(ORDER)
    highest = events["pk"].to_pylist()[-1]
    late = [i % 3 == 0 for i in range(600)]
    first, second = events.filter(pa.array([not x for x in late])), events.filter(pa.array(late))
    pk = events.schema.get_field_index("pk")
    second = second.set_column(pk, events.schema.field(pk), pa.array([highest + 1 + i for i in range(200)]))
    publish(lake, HOUR, first, settled_pk=highest)
    publish(lake, HOUR, second, settled_pk=PK, append=True)
    assert content(lake, HOUR).equals(pa.concat_tables([first, second]).sort_by(ORDER))


def with_column(events: pa.Table, name: str, values: list[object]) -> pa.Table:
    at = events.schema.get_field_index(name)
    return events.set_column(at, events.schema.field(at), pa.array(values, events.schema.field(at).type))


def test_events_of_the_asked_types_are_not_lost_before_a_file_of_others(lake: Lake) -> None:
    events = with_column(lake_events(HOUR, 120), "entity_type", ["Order"] * 120)
    users = with_column(lake_events(HOUR, 10, 1), "entity_type", ["User"] * 10)
    publish(lake, HOUR, events, settled_pk=PK - 20)
    publish(lake, HOUR, with_column(users, "pk", [PK - 15 + i for i in range(10)]), append=True)
    assert read(lake, HOUR.start, HOUR.end, entity_types=["Order"]).equals(events)


@pytest.mark.parametrize("seed", range(12))
def test_a_read_of_some_types_is_the_whole_read_without_the_others(
    lake: Lake, small_groups: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever the files hold: some types or all, long stretches or single instants, in order or not, small events or large."""
    rng = random.Random(seed)
    monkeypatch.setattr("fraiseql_pipeline.lake.read.HELD_BYTES", rng.choice((20_000, 200_000, 10_000_000)))
    highest = 1
    for part in range(4):
        n = rng.choice((1, 40, 350))
        second, width = rng.randrange(3_000), rng.choice((0, 0, 1_000_000, 600_000_000))
        events = with_column(
            lake_events(HOUR, n, part), "entity_type", rng.choices(rng.sample(["A", "B", "C"], rng.randint(1, 3)), k=n)
        )
        at = [HOUR.start + timedelta(seconds=second, microseconds=rng.randint(0, width)) for _ in range(n)]
        events = with_column(with_column(events, "timestamp", at), "pk", [highest + i for i in range(n)])  # type: ignore[arg-type]
        highest += n
        publish(lake, HOUR, events.sort_by(ORDER), settled_pk=highest - 1, append=part > 0)
    if seed % 3 == 0:
        table = DeltaTable(lake.events_uri)
        rows = pa.table(table.scan()).cast(LAKE_SCHEMA)
        write_deltalake(table, rows.take(pa.array(rng.sample(range(rows.num_rows), rows.num_rows))), mode="overwrite")
    reader = Lake(lake.uri)
    every = read(reader, HOUR.start, HOUR.end)
    assert every.equals(pa.table(DeltaTable(lake.events_uri).scan()).select(LAKE_SCHEMA.names).cast(LAKE_SCHEMA).sort_by(ORDER))
    for _ in range(8):
        types = rng.sample(["A", "B", "C"], rng.randint(1, 2))
        start, end = sorted(rng.choice((HOUR.start, HOUR.end, rng.choice(every["timestamp"]).as_py())) for _ in range(2))
        inside = pc.and_(pc.greater_equal(every["timestamp"], start), pc.less(every["timestamp"], end))
        wanted = every.filter(pc.and_(inside, pc.is_in(every["entity_type"], pa.array(types))))
        got = pa.Table.from_batches(reader.read(start, end, entity_types=types), LAKE_SCHEMA)
        assert got.equals(wanted), (types, start, end)


@pytest.fixture
def sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and bytes that were put in order together, each time."""
    seen, ordered = [], reading._ordered

    def noted(parts: list[pa.Table], **options: bool) -> pa.Table | None:
        done = ordered(parts, **options)
        if done is not None:
            seen.append((done.num_rows, done.nbytes))
        return done

    monkeypatch.setattr(reading, "_ordered", noted)
    return seen


def of_one_instant(n: int) -> pa.Table:
    """What a transaction of the database's default for ``created_at`` writes."""
    return with_column(lake_events(HOUR, n), "timestamp", [HOUR.start + timedelta(minutes=5)] * n).sort_by("pk")


@pytest.mark.parametrize("foreign", [False, True], ids=["our files", "shuffled files"])
def test_the_events_of_one_instant_are_never_held_together(
    lake: Lake, small_groups: None, sorted_at_once: list[tuple[int, int]], foreign: bool
) -> None:
    events = of_one_instant(3_000)
    publish(lake, HOUR, events, settled_pk=PK - 1)
    at = [HOUR.start + timedelta(minutes=5, seconds=-(i < 2)) for i in range(4)]
    late = with_column(with_column(lake_events(HOUR, 4, 1), "timestamp", at), "pk", [PK + i for i in range(4)])  # type: ignore[arg-type]
    publish(lake, HOUR, late, settled_pk=PK + 9, append=True)
    if foreign:
        table = DeltaTable(lake.events_uri)
        shuffled = events.take(pa.array([(i * 787) % 3_000 for i in range(3_000)]))
        groups = WriterProperties(max_row_group_size=100)
        write_deltalake(table, pa.concat_tables([shuffled, late]), mode="overwrite", writer_properties=groups)
    got = pa.Table.from_batches(Lake(lake.uri).read(HOUR.start, HOUR.end))
    assert got.equals(pa.concat_tables([events, late]).sort_by(ORDER))
    assert max(rows for rows, _ in sorted_at_once) <= 300


@pytest.mark.parametrize("foreign", [False, True], ids=["our files", "shuffled files"])
def test_large_events_are_held_by_their_bytes(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, sorted_at_once: list[tuple[int, int]], foreign: bool
) -> None:
    monkeypatch.setattr("fraiseql_pipeline.lake.read.HELD_BYTES", 200_000)
    events = of_one_instant(200)
    events = with_column(events, "data", ['"' + "x" * (40_000 if i % 50 == 0 else 1_000) + '"' for i in range(200)])
    publish(lake, HOUR, events)
    if foreign:
        write_deltalake(DeltaTable(lake.events_uri), events.take(pa.array([(i * 77) % 200 for i in range(200)])), mode="overwrite")
    assert pa.Table.from_batches(Lake(lake.uri).read(HOUR.start, HOUR.end)).equals(events)
    assert max(size for _, size in sorted_at_once) <= 250_000


def test_a_missing_file_is_damage_and_not_fewer_rows(lake: Lake) -> None:
    publish(lake, HOUR, 100)
    publish(lake, NEXT, 100)
    Path(lake.events_uri, lake.snapshot().files[0].path).unlink()
    with pytest.raises(LakeDamaged, match="missing"):
        list(lake.read(HOUR.start, NEXT.end))
    assert content(lake, NEXT).num_rows == 100


def test_the_rejected_rows_of_a_window_are_read_without_those_of_others(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for hour in (HOUR, NEXT):
        publish(lake, hour, 5, 10)
    expected = lake.quarantined(NEXT)
    monkeypatch.setattr("fraiseql_pipeline.lake.parquet.ROW_GROUP_ROWS", 10)
    lake.maintain(NEXT.end + timedelta(days=5))
    read_row_group, seen = pq.ParquetFile.read_row_group, []

    def counted(self: pq.ParquetFile, index: int, columns: list[str] | None = None) -> pa.Table:
        seen.append((index, columns))
        return read_row_group(self, index, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert lake.quarantined(NEXT).equals(expected)
    assert lake.quarantined(NEXT, columns=["event_id"]).equals(expected.select(["event_id"]))
    assert [index for index, _ in seen] == [1, 1]
    assert seen[1] == (1, ["event_id", "pk", "window_key"])
    with pytest.raises(InputError, match="Unknown columns"):
        lake.quarantined(NEXT, columns=["nothing"])


def test_rejected_rows_of_any_size_come_in_order_of_pk(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quarantine_events(HOUR, 200).sort_by("pk")
    publish(lake, HOUR, 5, rows.take(pa.array([(i * 77) % 200 for i in range(200)])))
    monkeypatch.setattr(reading, "HELD_BYTES", 2_000)
    assert lake.quarantined(HOUR).combine_chunks().equals(rows)


def test_a_torn_file_is_damage_and_not_fewer_rows(lake: Lake) -> None:
    publish(lake, HOUR, 100)
    path = Path(lake.events_uri, lake.snapshot().files[0].path)
    for torn in (path.read_bytes()[:-200], b""):
        path.write_bytes(torn)
        with pytest.raises(LakeDamaged, match="torn"):
            list(lake.read(HOUR.start, HOUR.end))


@pytest.mark.parametrize("damage", [b"", b'{"commitInfo":{"timest'], ids=["empty", "half"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "following"])
def test_a_torn_tip_is_damage_and_not_fewer_rows(lake: Lake, damage: bytes, cold: bool) -> None:
    publish(lake, HOUR, 100)
    reader = Lake(lake.uri)
    if not cold:
        assert reader.snapshot().version == 1
    publish(lake, NEXT, 100)
    Path(lake.events_uri, "_delta_log", f"{2:020d}.json").write_bytes(damage)
    for look in (
        reader.published,
        reader.snapshot,
        lambda: list(reader.read(HOUR.start, HOUR.end)),
        lambda: publish(reader, HOUR, 200),
    ):
        with pytest.raises(LakeDamaged, match="Entry 2 of the log of events is empty or torn"):
            look()


def test_the_published_windows_of_a_range_are_those_that_touch_it(lake: Lake) -> None:
    later = Window.parse("2026-11-05-00:00")
    for window in (later, HOUR, NEXT):
        publish(lake, window, 3)
    for reader in (lake, Lake(lake.uri)):
        assert list(reader.published(NEXT.start, NEXT.end)) == [NEXT]
        assert list(reader.published(HOUR.start + timedelta(minutes=59), NEXT.start + timedelta(minutes=1))) == [HOUR, NEXT]
        assert list(reader.published(NEXT.end, later.start)) == []
        assert list(reader.published(NEXT.start)) == [NEXT, later]
        assert list(reader.published()) == [HOUR, NEXT, later]


def test_a_snapshot_counts_the_rows_of_every_file(lake: Lake) -> None:
    publish(lake, NEXT, 70)
    publish(lake, HOUR, 50)
    snapshot = lake.snapshot()
    assert [f.rows for f in snapshot.files] == [50, 70]
    assert [f.rows for f in snapshot.files_in(NEXT.start, NEXT.end)] == [70]
    assert snapshot.published.keys() == {HOUR, NEXT}
    assert lake.snapshot() is snapshot
    publish(lake, HOUR, 51)
    assert lake.snapshot() is not snapshot
    assert pq.ParquetFile(lake.snapshot().open(snapshot.files[1])).metadata.num_rows == 70


def test_the_readers_people_use_see_the_same_events(lake: Lake) -> None:
    events = pa.concat_tables([lake_events(HOUR, 900), lake_events(NEXT, 600)])
    publish(lake, HOUR, events.slice(0, 900), 4)
    publish(lake, NEXT, events.slice(900))
    publish(lake, HOUR, events.slice(0, 900), 5)
    wanted = (
        1_500,
        pc.sum(events["pk"]).as_py(),
        events["timestamp"][0].as_py(),
        events["timestamp"][-1].as_py(),
        events["user_id"].null_count,
    )

    frame = pl.scan_delta(lake.events_uri)
    found = frame.select(
        pl.len(),
        pl.col("pk").cast(pl.Int128).sum(),
        low=pl.col("timestamp").min(),
        high=pl.col("timestamp").max(),
        nulls=pl.col("user_id").null_count(),
    ).collect()
    assert found.row(0) == wanted
    at = events["timestamp"][1_000].as_py()
    later = pc.sum(pc.greater_equal(events["timestamp"], at)).as_py()
    assert frame.filter(pl.col("timestamp") >= at).select(pl.len()).collect().item() == later
    assert frame.filter(pl.col("event_date") == HOUR.start.date()).select(pl.len()).collect().item() == 1_500

    delta = DeltaTable(lake.events_uri)
    assert pa.table(delta.scan(["pk"], predicate=f"timestamp >= '{at:%Y-%m-%dT%H:%M:%S.%fZ}'")).num_rows == later

    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("events", pa.RecordBatchReader.from_stream(delta.scan()))
    query = "SELECT count(*), sum(pk), epoch_us(min(timestamp)), epoch_us(max(timestamp)), count(*) FILTER (user_id IS NULL) FROM events"
    assert connection.execute(query).fetchone() == (*wanted[:2], micros(wanted[2]), micros(wanted[3]), wanted[4])


def test_an_event_of_the_first_centuries_is_read_by_a_lake_that_was_open_before(lake: Lake) -> None:
    early = Window.parse("0202-03-04-05:00")
    open_before = Lake(lake.uri)
    publish(lake, HOUR, 10)
    assert read(open_before, HOUR.start, HOUR.end).num_rows == 10
    publish(lake, early, 3)
    assert read(open_before, early.start, early.end).num_rows == 3
    assert read(Lake(lake.uri), early.start, early.end).num_rows == 3


def test_statistics_in_milliseconds_are_not_taken_for_microseconds(lake: Lake, tmp_path: Path) -> None:
    publish(lake, HOUR, 100)
    (file,) = Path(lake.events_uri).glob("event_date=*/*.parquet")
    rows = pq.ParquetFile(file).read()
    pq.write_table(rows, file, coerce_timestamps="ms", allow_truncated_timestamps=True)
    assert read(lake, HOUR.start, HOUR.end).num_rows == 100


def test_a_lake_that_was_removed_made_anew_or_restored_is_noticed(lake: Lake, tmp_path: Path) -> None:
    def held() -> tuple[int, list[str]]:
        return read(lake, HOUR.start, NEXT.end).num_rows if lake.published() else 0, [w.key for w in lake.published()]

    publish(lake, HOUR, 10)
    shutil.copytree(lake.uri, tmp_path / "backup")
    publish(lake, NEXT, 5)
    assert held() == (15, [HOUR.key, NEXT.key])

    shutil.rmtree(lake.uri)
    assert held() == (0, [])
    for reads in (lake.snapshot, lambda: read(lake, HOUR.start, NEXT.end)):
        with pytest.raises(LakeUnavailable, match="was there before and is not there at the moment"):
            reads()

    publish(Lake(lake.uri), HOUR, 3)  # by another process; the same version as before, of another table
    publish(Lake(lake.uri), NEXT, 1)
    assert held() == (4, [HOUR.key, NEXT.key])

    shutil.rmtree(lake.uri)
    shutil.copytree(tmp_path / "backup", lake.uri)
    assert held() == (10, [HOUR.key])
    assert lake.fsck() == []
