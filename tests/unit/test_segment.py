"""Segments of what is in memory: cut where a dictionary would not fit a message."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from fraiseql_pipeline.encoding import MAX_DICTIONARY_BYTES, MAX_FRAME_BYTES, dictionary_fits, dictionary_frames, wire_schema
from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.flight.segment import Segment, held
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import lake_events

WINDOW = Window(datetime(2026, 11, 1, tzinfo=UTC), WindowSize.HOUR)
COLUMNS = ("pk", "event_type", "entity_type", "user_id", "data")


def segmented(column: str, values: list[str]) -> list[tuple[Segment, pa.Table]]:
    """The segments of events whose column has these values, each with its rows; together they are the events."""
    table = lake_events(WINDOW, len(values))
    at = table.schema.get_field_index(column)
    batch = table.set_column(at, LAKE_SCHEMA.field(at), pa.array(values)).combine_chunks().to_batches()[0]
    found = [(segment, pa.Table.from_batches([rows for rows, _, _ in segment.batches])) for segment in held(batch, COLUMNS)]
    for name in COLUMNS:
        assert [value for _, rows in found for value in rows[name].to_pylist()] == batch[name].to_pylist()
    return found


@pytest.mark.parametrize(
    ("column", "values", "least"),
    [
        ("entity_type", [f"Type{n}" for n in range(32_768)], 1),
        ("entity_type", [f"Type{n}" for n in range(32_769)], 2),
        ("event_type", [f"Verb{n % 300}" for n in range(1_000)], 4),
        ("user_id", [f"{n:0>1000}" for n in range(9_000)], 3),
    ],
)
def test_a_segment_has_as_many_events_as_its_dictionaries_can_hold(column: str, values: list[str], least: int) -> None:
    schema = wire_schema(COLUMNS, "compact")
    found = segmented(column, values)
    assert least <= len(found) <= 4 * least
    for segment, rows in found:
        assert all(dictionary_fits(name, few) for name, few in segment.dictionaries.items())
        assert segment.dictionaries[column].to_pylist() == sorted(set(rows[column].to_pylist())), "and no others"
        for codec in ("none", "lz4"):
            assert max(map(len, dictionary_frames(schema, segment.dictionaries, codec))) <= MAX_FRAME_BYTES


def test_a_value_that_fits_no_message_is_alone_in_its_dictionary() -> None:
    huge = "x" * (MAX_DICTIONARY_BYTES + 1)
    found = segmented("user_id", ["a"] * 50 + [huge] + ["b"] * 49)
    [alone] = [
        segment.dictionaries["user_id"].to_pylist() for segment, _ in found if huge in segment.dictionaries["user_id"].to_pylist()
    ]
    assert alone == [huge]
    assert len(found) < 20
