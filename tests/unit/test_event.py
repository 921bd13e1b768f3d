"""One column table; every schema follows from it."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest

from fraiseql_pipeline.event import (
    BATCH_SCHEMA,
    COLUMNS,
    EVENT_SCHEMA,
    EVENT_TYPES,
    EXTRACTED,
    LAKE_SCHEMA,
    ORDER,
    QUARANTINE_SCHEMA,
    RAW,
    UUID_PATTERN,
    VERBS,
    WIRE_SCHEMA,
)
from fraiseql_pipeline.window import Window
from tests.support.events import batch_events, lake_events

EIGHT = ["event_id", "event_type", "entity_type", "entity_id", "timestamp", "data", "user_id", "org_id"]
WINDOW = Window.parse("2026-11-01-13:00")


def test_a_plain_stream_is_the_eight_columns_of_the_plan() -> None:
    assert EVENT_SCHEMA.names == WIRE_SCHEMA.names == LAKE_SCHEMA.names[:8] == EIGHT
    expected = pa.schema(
        [
            pa.field("event_id", pa.string(), nullable=False),
            pa.field("event_type", pa.string(), nullable=False),
            pa.field("entity_type", pa.string(), nullable=False),
            pa.field("entity_id", pa.string(), nullable=False),
            pa.field("timestamp", pa.timestamp("ns", "UTC"), nullable=False),
            pa.field("data", pa.string(), nullable=False),
            pa.field("user_id", pa.string()),
            pa.field("org_id", pa.string()),
        ]
    )
    assert WIRE_SCHEMA.equals(expected)


def test_the_lake_holds_microseconds_and_the_wire_nanoseconds() -> None:
    assert EVENT_SCHEMA.field("timestamp").type == pa.timestamp("us", "UTC")
    assert [field for field in WIRE_SCHEMA if field != EVENT_SCHEMA.field(field.name)] == [WIRE_SCHEMA.field("timestamp")]


def test_a_batch_is_the_lake_without_its_derived_column_and_with_raw() -> None:
    assert BATCH_SCHEMA.names == [*(name for name in LAKE_SCHEMA.names if name != "event_date"), "raw"]
    assert all(field.nullable for field in BATCH_SCHEMA), "a bad row must be seen to be quarantined"
    assert all(field.type == LAKE_SCHEMA.field(field.name).type for field in BATCH_SCHEMA if field.name != "raw")


def test_the_quarantine_is_a_batch_with_its_reasons() -> None:
    assert QUARANTINE_SCHEMA.names == [*BATCH_SCHEMA.names, "reasons", "window_key", "event_date"]
    assert list(QUARANTINE_SCHEMA)[: len(BATCH_SCHEMA)] == list(BATCH_SCHEMA)
    assert not any(QUARANTINE_SCHEMA.field(name).nullable for name in ("reasons", "window_key", "event_date"))


def test_names_are_unique_and_every_column_is_described() -> None:
    columns = [*COLUMNS, RAW]
    assert len({column.name for column in columns}) == len(columns)
    assert all(column.doc for column in columns)
    assert all(column.source or column.part == "derived" for column in columns)
    assert set(ORDER) <= set(LAKE_SCHEMA.names)


def test_a_row_with_values_that_fit_no_column_is_never_accepted() -> None:
    assert RAW in EXTRACTED
    assert RAW.rule == "absent"


def test_ids_names_verbs_and_times_have_rules() -> None:
    assert {column.name: column.rule for column in EXTRACTED if column.rule} == {
        "event_id": "uuid",
        "event_type": "verb",
        "entity_type": "name",
        "entity_id": "uuid",
        "timestamp": "window",
        "org_id": "uuid",
        "acting_for": "uuid",
        "raw": "absent",
    }


def test_verbs_map_onto_the_four_event_types() -> None:
    assert set(VERBS.values()) == set(EVENT_TYPES)
    assert all(verb == verb.upper() for verb in VERBS)
    assert [VERBS[verb] for verb in ("INSERT", "UPDATE", "DELETE", "CUSTOM", "NOOP", "READ")] == [*EVENT_TYPES, "Custom", "Custom"]


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_events_made_for_tests_keep_the_schemas_and_the_order(n: int) -> None:
    events, batch = lake_events(WINDOW, n), batch_events(WINDOW, n)
    events.validate(full=True)
    assert (events.schema, batch.schema) == (LAKE_SCHEMA, BATCH_SCHEMA)
    keys = list(zip(*(events[name].to_pylist() for name in ORDER), strict=True))
    assert keys == sorted(keys)
    assert len(keys) == n
    assert all(WINDOW.contains(at) for at, _ in keys)
    assert events.equals(lake_events(WINDOW, n))
    assert all(re.fullmatch(UUID_PATTERN, text) for text in events["event_id"].to_pylist())
    assert len(set(events["event_id"].to_pylist())) == n


def test_events_made_for_tests_differ_between_windows_and_seeds() -> None:
    tables = [lake_events(WINDOW, 100), lake_events(WINDOW, 100, seed=1), lake_events(Window.parse("2026-11-01-14:00"), 100)]
    ids = {text for table in tables for text in table["event_id"].to_pylist()}
    assert len(ids) == 300
    assert not set(tables[0]["pk"].to_pylist()) & set(tables[2]["pk"].to_pylist())
