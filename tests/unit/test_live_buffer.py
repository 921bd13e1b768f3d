"""The live buffer holds every event once, whatever the order they settle in, and gives up the oldest hours when it is full."""

from __future__ import annotations

import errno
import gc
import itertools
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraiseql_pipeline.errors import FlightUnavailable, TicketError
from fraiseql_pipeline.event import BATCH_SCHEMA
from fraiseql_pipeline.flight import buffer as module
from fraiseql_pipeline.flight import held as files_module
from fraiseql_pipeline.flight.buffer import Buffer
from fraiseql_pipeline.flight.held import HOUR_US, HeldFiles
from fraiseql_pipeline.lake.storage import LocalStorage

AT = datetime(2026, 11, 1, tzinfo=UTC)
FIRST = 490_000  # an hour in 2025


def events(times: list[tuple[int, int]], first_pk: int = 1) -> pa.RecordBatch:
    """One event for each (hour after the first, µs in it), keys rising."""
    n = len(times)
    columns = {
        "event_id": [f"00000000-0000-4000-8000-{first_pk + i:012x}" for i in range(n)],
        "event_type": ["Created"] * n,
        "entity_type": ["Order"] * n,
        "entity_id": ["00000000-0000-4000-8000-000000000000"] * n,
        "timestamp": [(FIRST + hour) * HOUR_US + us for hour, us in times],
        "data": ["{}"] * n,
        "pk": list(range(first_pk, first_pk + n)),
    }
    arrays = [
        pa.array(columns[f.name], pa.int64() if f.name == "timestamp" else f.type).cast(f.type)
        if f.name in columns
        else pa.nulls(n, f.type)
        for f in BATCH_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=BATCH_SCHEMA)


def held(buffer: Buffer, floors: dict[int, int]) -> list[tuple[int, int]]:
    """(time, pk) of what the buffer gives of some hours, as a reader gets it."""
    found = []
    files, _, _ = buffer.files(floors)
    for hour in sorted(floors):
        mine = sorted((one for one in files if one.hour == hour), key=lambda one: (one.file.low or 0, one.file.path))
        for batch in buffer._files.read(mine) if mine else ():
            found += list(zip(batch["timestamp"].cast(pa.int64()).to_pylist(), batch["pk"].to_pylist(), strict=True))
    return found


class Somewhere:
    """A place with so many things that can be removed for room."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.removable = 0

    def directory(self) -> Path:
        return self._directory

    def make_room(self) -> bool:
        self.removable -= 1
        return self.removable >= 0


def in_directory(directory: Path) -> HeldFiles:
    return HeldFiles(LocalStorage(directory), Somewhere(directory))


@pytest.fixture
def buffer(tmp_path: Path) -> Buffer:
    made = Buffer(in_directory(tmp_path), 1 << 30)
    made.begin(0, AT)
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "HEAD_BYTES", 2_000)
    monkeypatch.setattr(module, "FILE_ROWS", 64)
    monkeypatch.setattr(module, "_MERGED_FILES", 3)
    return


Times = st.lists(st.tuples(st.integers(0, 2), st.one_of(st.integers(0, 30), st.integers(0, HOUR_US - 1))), min_size=1, max_size=12)


@settings(max_examples=60)
@given(rounds=st.lists(Times, min_size=1, max_size=25), floors=st.lists(st.integers(0, 150), min_size=3, max_size=3))
def test_every_event_above_the_floor_is_held_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[list[tuple[int, int]]], floors: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("live")
    buffer = Buffer(in_directory(directory), 1 << 30)
    buffer.begin(0, AT)
    pk = 1
    written = []
    for times in rounds:
        batch = events(times, pk)
        assert sum(one.num_rows for one in buffer.absorb(batch)) == len(times)
        written += [((FIRST + hour) * HOUR_US + us, pk + i) for i, (hour, us) in enumerate(times)]
        pk += len(times)
    asked = {FIRST + hour: floor for hour, floor in enumerate(floors)}
    wanted = sorted((at, pk) for at, pk in written if pk > asked[at // HOUR_US])
    assert held(buffer, asked) == wanted
    assert held(buffer, asked) == wanted, "and again, from what was kept for the first"
    buffer.drop(asked)
    assert held(buffer, asked) == wanted, "the lake has the others"


def test_files_follow_each_other_so_that_old_ones_are_not_sorted_again(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MERGED_FILES", 1_000)
    pk = 1
    for round_number in range(60):
        # Out of order by a little, as transactions that overlap are.
        batch = events([(0, round_number * 100 + (i * 37) % 130) for i in range(10)], pk)
        buffer.absorb(batch)
        pk += 10
    files, settled_pk, _ = buffer.files({FIRST: 0})
    spans = sorted((one.file.low, one.file.high) for one in files)
    assert settled_pk == 600
    assert len(spans) > 3
    overlapping = sum(later[0] <= before[1] for before, later in itertools.pairwise(spans))  # type: ignore[operator]
    assert overlapping <= 1, "the head may reach into the last one"


def test_the_oldest_hours_are_given_up_and_can_be_filled_again(tmp_path: Path) -> None:
    buffer = Buffer(in_directory(tmp_path), 20_000)
    buffer.begin(0, AT)
    kept: dict[int, pa.RecordBatch] = {}
    for hour in range(4):
        kept[hour] = events([(hour, i) for i in range(100)], hour * 100 + 1)
        buffer.absorb(kept[hour])
    assert buffer.bytes <= 20_000
    missing = {hour: buffer.missing(FIRST + hour, 0) for hour in range(4)}
    assert missing[0] is not None
    assert missing[3] is None
    with buffer.wanted([FIRST]):
        buffer.fill(FIRST, 0, missing[0], [kept[0]])
        assert len(held(buffer, {FIRST: 0})) == 100
        assert buffer.missing(FIRST, 0) is None
    later = events([(0, 5)], 401)
    buffer.absorb(later)
    assert Counter(held(buffer, {FIRST: 0}))[(FIRST * HOUR_US + 5, 401)] == 1


def test_a_fill_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    buffer = Buffer(in_directory(tmp_path), 5_000)
    buffer.begin(1_000, AT)
    with pytest.raises(TicketError, match="FRAISEQL_ARROW_FLIGHT_LIVE_BYTES"), buffer.wanted([FIRST]):
        buffer.fill(FIRST, 0, 1_000, [events([(0, i) for i in range(1_000)])])


def test_what_is_given_up_while_it_was_filled_counts_as_missing(buffer: Buffer) -> None:
    buffer.begin(50, AT)

    def batches() -> Iterator[pa.RecordBatch]:
        buffer.begin(60, AT)  # the log was followed anew
        yield events([(0, 1)])

    buffer.fill(FIRST, 0, 50, batches())
    assert buffer.missing(FIRST, 0) == 60


def test_files_are_on_the_disk_as_long_as_somebody_holds_them(buffer: Buffer, tmp_path: Path) -> None:
    buffer.absorb(events([(0, i) for i in range(200)]))
    files, _, _ = buffer.files({FIRST: 0})
    buffer.drop({FIRST: 200})
    assert buffer.missing(FIRST, 0) == 200
    assert len(list(tmp_path.iterdir())) >= len(files)
    del files
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_costs_the_hour_and_not_the_server(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files_module, "write_file", full)
        assert sum(one.num_rows for one in buffer.absorb(events([(0, i) for i in range(200)]))) == 200
        with pytest.raises(FlightUnavailable, match="cannot keep frames"):
            buffer.fill(FIRST, 0, 200, [events([(0, i) for i in range(200)])])
        buffer.absorb(events([(1, 1)], 201))
        with pytest.raises(FlightUnavailable, match="cannot keep frames"):
            buffer.files({FIRST + 1: 0})
    assert buffer.missing(FIRST, 0) == 200
    buffer.fill(FIRST, 0, 200, [events([(0, i) for i in range(200)])])
    assert len(held(buffer, {FIRST: 0})) == 200


def test_what_can_be_made_again_makes_room_for_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, write = Somewhere(tmp_path), files_module.write_file

    def tight(path: str, rows: pa.Table) -> None:
        if place.removable > 0:
            Path(path).write_bytes(b"the half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, rows)

    monkeypatch.setattr(files_module, "write_file", tight)
    buffer = Buffer(HeldFiles(LocalStorage(tmp_path), place), 1 << 30)
    buffer.begin(0, AT)
    buffer.absorb(events([(0, 1)]))
    place.removable = 2
    assert held(buffer, {FIRST: 0}) == [(FIRST * HOUR_US + 1, 1)]
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1, "nothing is left of the attempts"


def test_an_hour_whose_file_somebody_removed_counts_as_missing(buffer: Buffer, tmp_path: Path) -> None:
    both = events([(hour, i) for hour in range(2) for i in range(100)])
    buffer.absorb(both)
    before = held(buffer, {FIRST: 0, FIRST + 1: 0})
    files, _, _ = buffer.files({FIRST: 0})
    (tmp_path / Path(files[0].file.path).name).unlink()
    with pytest.raises(FlightUnavailable, match="lost events"):
        buffer._files.open(files[0].file.path)
    buffer.files({FIRST: 0, FIRST + 1: 0})
    assert buffer.missing(FIRST, 0) == 200
    assert buffer.missing(FIRST + 1, 0) is None, "the other hour is whole"
    with buffer.wanted([FIRST]):
        buffer.fill(FIRST, 0, 200, [both.slice(0, 100)])
    assert held(buffer, {FIRST: 0, FIRST + 1: 0}) == before


def test_the_file_of_a_head_that_somebody_removed_is_written_again(buffer: Buffer, tmp_path: Path) -> None:
    buffer.absorb(events([(0, 1)]))
    for _ in range(2):
        assert held(buffer, {FIRST: 0}) == [(FIRST * HOUR_US + 1, 1)]
        for path in tmp_path.iterdir():
            path.unlink()


def test_files_that_are_gone_when_they_are_merged_cost_the_hour_and_not_the_turn(buffer: Buffer, tmp_path: Path) -> None:
    pk = 1
    while len(list(tmp_path.iterdir())) < 2:
        buffer.absorb(events([(0, pk + i) for i in range(10)], pk))
        pk += 10
    for path in tmp_path.iterdir():
        path.unlink()
    while buffer.missing(FIRST, 0) is None:
        assert pk < 5_000
        buffer.absorb(events([(0, pk + i) for i in range(10)], pk))
        pk += 10
    assert buffer.missing(FIRST, 0) == pk - 1


def test_unsound_events_are_left_out(buffer: Buffer) -> None:
    batch = events([(0, 1), (0, 2)])
    bad = batch.set_column(0, BATCH_SCHEMA.field("event_id"), pa.array(["no uuid", batch["event_id"][1].as_py()]))
    assert [one["pk"].to_pylist() for one in buffer.absorb(bad)] == [[2]]
    assert held(buffer, {FIRST: 0}) == [(FIRST * HOUR_US + 2, 2)]


def test_a_batch_that_could_not_be_judged_is_taken_whole_when_it_comes_again(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = events([(0, 1), (1, 1), (0, 2)])
    check, judged = module.Validator.check, iter(range(2))

    def fails_once(self: module.Validator, rows: pa.RecordBatch) -> object:
        if next(judged) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return check(self, rows)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(module.Validator, "check", fails_once)
        buffer.absorb(batch)
    assert sum(one.num_rows for one in buffer.absorb(batch)) == 3
    assert [pk for _, pk in held(buffer, {FIRST: 0, FIRST + 1: 0})] == [1, 3, 2]


def test_the_heads_of_many_hours_are_bounded_together(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    one = events([(0, us) for us in range(50)]).nbytes
    monkeypatch.setattr(module, "HEAD_BYTES", 1 << 30)
    monkeypatch.setattr(module, "HEADS_BYTES", 4 * one)
    for hour in range(30):
        buffer.absorb(events([(hour, us) for us in range(50)], hour * 50 + 1))
        assert sum(held.head_bytes for held in buffer._hours.values()) <= 6 * one
    assert len(held(buffer, dict.fromkeys(range(FIRST, FIRST + 30), 0))) == 30 * 50
