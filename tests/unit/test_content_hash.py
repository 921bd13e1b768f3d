"""The content hash counts values and nothing else."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.lake.content import ContentHash
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events

HOUR = Window.parse("2026-11-01-13:00")
EVENTS = lake_events(HOUR, 500)


def hash_of(*batches: pa.RecordBatch, schema: pa.Schema = LAKE_SCHEMA) -> str:
    hashed = ContentHash(schema)
    for batch in batches:
        hashed.add(batch)
    return hashed.hexdigest()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 500), max_size=6))
def test_borders_between_batches_do_not_count(cuts: list[int]) -> None:
    whole = EVENTS.combine_chunks().to_batches()[0]
    bounds = [0, *sorted(cuts), 500]
    parts = [whole.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    assert hash_of(*parts) == hash_of(whole)


@pytest.mark.parametrize("name", LAKE_SCHEMA.names)
def test_every_column_counts(name: str) -> None:
    whole = EVENTS.combine_chunks().to_batches()[0]
    order = list(range(500))
    order[3], order[499] = order[499], order[3]
    column = whole.schema.get_field_index(name)
    if whole.column(column).take(pa.array(order)).equals(whole.column(column)):
        order = None  # both rows hold the same value: make the column null instead
    changed = whole.column(column).take(pa.array(order)) if order else pa.nulls(500, whole.column(column).type)
    altered = pa.RecordBatch.from_arrays(
        [c if i != column else changed for i, c in enumerate(whole.columns)], names=whole.schema.names
    )
    assert hash_of(altered) != hash_of(whole)


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.int32(), pa.date32(), pa.timestamp("us", "UTC")])
def test_what_lies_under_a_null_does_not_count(kind: pa.DataType) -> None:
    schema = pa.schema([("x", kind)])
    values = ["a", "bcd", ""] if kind == pa.string() else [1, 2, 3]
    full = pa.array(values, kind)
    validity = pa.py_buffer(bytes([0b101]))
    dirty = pa.Array.from_buffers(kind, 3, [validity, *full.buffers()[1:]], null_count=1)
    clean = pa.array([full[0], None, full[2]], kind)
    assert dirty.equals(clean)
    assert hash_of(pa.record_batch([dirty], schema=schema), schema=schema) == hash_of(
        pa.record_batch([clean], schema=schema), schema=schema
    )


def test_null_empty_and_moved_characters_differ() -> None:
    schema = pa.schema([("x", pa.string())])
    hashes = {
        hash_of(pa.record_batch([pa.array(v, pa.string())], schema=schema), schema=schema)
        for v in (["a", ""], ["", "a"], ["a", None], [None, "a"])
    }
    assert len(hashes) == 4
