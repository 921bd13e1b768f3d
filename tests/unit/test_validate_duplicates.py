"""An event id is accepted once per window, whatever the batches, the sizes and the hashes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraiseql_pipeline import event_ids
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.validate import Validator
from fraiseql_pipeline.window import Window
from tests.support.events import batch_events

WINDOW = Window.parse("2026-11-01-13:00")
DUPLICATE = {"event_id:duplicate"}


def ids(*numbers: int) -> list[str]:
    return [f"00000000-0000-4000-8000-{number:012x}" for number in numbers]


def test_the_first_of_a_batch_wins() -> None:
    batch = batch_events(WINDOW, 4, event_id=ids(1, 2, 1, 1))
    validation = Validator(WINDOW).check(batch)
    assert validation.accepted["pk"].to_pylist() == batch["pk"].to_pylist()[:2]
    assert validation.quarantined["reasons"].to_pylist() == [["event_id:duplicate"]] * 2
    assert validation.reasons == {"event_id:duplicate": 2}


def test_an_id_of_an_earlier_batch_is_a_duplicate() -> None:
    validator = Validator(WINDOW)
    assert validator.check(batch_events(WINDOW, 3, event_id=ids(1, 2, 3))).accepted.num_rows == 3
    assert validator.check(batch_events(WINDOW, 3, 1, event_id=ids(4, 2, 5))).quarantined["event_id"].to_pylist() == ids(2)
    assert validator.check(batch_events(WINDOW, 2, 2, event_id=ids(4, 6))).quarantined["event_id"].to_pylist() == ids(4)


def test_a_rejected_row_does_not_take_the_id_from_a_sound_one() -> None:
    validator = Validator(WINDOW)
    first = validator.check(batch_events(WINDOW, 3, event_id=ids(1, 1, 1), data={0: None}))
    assert first.quarantined["reasons"].to_pylist() == [["data:null"], ["event_id:duplicate"]]
    second = validator.check(batch_events(WINDOW, 2, 1, event_id=ids(1, 2), data={0: None}))
    assert second.quarantined["reasons"].to_pylist() == [["data:null", "event_id:duplicate"]]


def test_ids_already_published_are_duplicates() -> None:
    for known in (
        [pa.array(ids(1, 2))],
        [pa.array(ids(1, 2), pa.large_string())],
        [pa.array(ids(1)), pa.array(ids(2))],
        [pa.array([*ids(1, 2), None, "not an id"])],
        [pa.array(ids(1, 2)).dictionary_encode()],
    ):
        validation = Validator(WINDOW, known).check(batch_events(WINDOW, 3, event_id=ids(2, 3, 1)))
        assert validation.accepted["event_id"].to_pylist() == ids(3)
    assert Validator(WINDOW, [pa.array([], pa.string())]).check(batch_events(WINDOW, 3)).accepted.num_rows == 3


def test_missing_and_malformed_ids_are_never_duplicates() -> None:
    validation = Validator(WINDOW).check(batch_events(WINDOW, 5, event_id=[None, None, "x", "x", *ids(1)]))
    assert validation.reasons == {"event_id:malformed": 2, "event_id:null": 2}


def test_a_window_read_twice_is_quarantined_whole_the_second_time() -> None:
    validator = Validator(WINDOW)
    batch = batch_events(WINDOW, 2000)
    validator.check(batch)
    assert validator.check(batch).reasons == {"event_id:duplicate": 2000}


def test_validators_remember_nothing_of_each_other() -> None:
    batch = batch_events(WINDOW, 10)
    assert Validator(WINDOW).check(batch).accepted.num_rows == Validator(WINDOW).check(batch).accepted.num_rows == 10


BATCHES = st.lists(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12), max_size=30)


def assert_admits_each_once(batches: list[list[tuple[int, bool]]]) -> None:
    seen, model = event_ids.EventIds(), set[int]()
    for rows in batches:
        expected = []
        for at, (number, sound) in enumerate(rows):
            if number in model:
                expected.append(at)
            elif sound:
                model.add(number)
        numbers = pa.array(ids(*(number for number, _ in rows)), pa.string())
        sound = np.array([sound for _, sound in rows], np.bool_)
        assert seen.admit(numbers, None if sound.all() else sound).tolist() == expected


@settings(max_examples=100)
@given(BATCHES)
def test_each_id_is_admitted_once_over_many_batches(batches: list[list[tuple[int, bool]]]) -> None:
    assert_admits_each_once(batches)


@settings(max_examples=60)
@given(BATCHES)
def test_ids_that_share_a_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, batches: list[list[tuple[int, bool]]]) -> None:
    real = event_ids._hashes
    with monkeypatch.context() as patch:
        patch.setattr(event_ids, "_hashes", lambda *args: real(*args) % 3)
        assert_admits_each_once(batches)


@settings(max_examples=60)
@given(BATCHES)
def test_ids_spilled_to_disk_are_found_again(monkeypatch: pytest.MonkeyPatch, batches: list[list[tuple[int, bool]]]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(event_ids.EventIds, "_SPILL_BYTES", 100)
        assert_admits_each_once(batches)


def test_eight_bytes_per_event_stay_in_memory() -> None:
    seen = event_ids.EventIds()
    for seed in range(20):
        seen.admit(batch_events(WINDOW, 1000, seed)["event_id"])
    assert sum(run.nbytes for run in seen._runs) == 20_000 * 8
    assert len(seen._runs) < 5, "runs are merged, so that looking up does not take longer with every batch"


def test_a_duplicate_takes_no_memory() -> None:
    seen = event_ids.EventIds()
    batch = batch_events(WINDOW, 1000)["event_id"]
    for _ in range(3):
        seen.admit(batch)
    assert sum(len(run) for run in seen._runs) == 1000


def test_the_spill_file_is_closed_with_its_validator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_ids.EventIds, "_SPILL_BYTES", 10)
    validator = Validator(WINDOW)
    validator.check(batch_events(WINDOW, 10))
    texts: Any = validator._seen._texts
    assert not texts.closed
    gone = weakref.ref(validator)
    del validator
    gc.collect()
    assert gone() is None
    assert texts.closed


def test_a_temporary_directory_that_cannot_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(PipelineError, match=r"^The ids of a window could not be kept .* set TMPDIR"):
        Validator(WINDOW).check(batch_events(WINDOW, 40_000))


@pytest.mark.parametrize("spilled", [10, 1_000_000], ids=["on disk from the start", "on disk later"])
def test_a_temporary_directory_that_fills_up_is_one_sentence(monkeypatch: pytest.MonkeyPatch, spilled: int) -> None:
    monkeypatch.setattr(event_ids.EventIds, "_SPILL_BYTES", spilled)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *_, **__: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(PipelineError, match=r"^The ids of a window could not be kept .*No space left.* set TMPDIR"):
        Validator(WINDOW).check(batch_events(WINDOW, 40_000))
    gc.collect()  # nothing is said again when it is closed
