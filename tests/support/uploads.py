"""Events as producers send them over DoPut."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyarrow import flight

from fraiseql_pipeline.event import EVENT_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events

#: The eight columns, all of them nullable: what a client's library makes of its data.
SENT = pa.schema([field.with_nullable(True) for field in WIRE_SCHEMA])
EVENTS = flight.FlightDescriptor.for_path("events")
#: The window of the events.
FIRST_HOUR = Window.parse("2026-11-01-00:00")


def sent(rows: int = 50, seed: int = 0, **changed: Any) -> pa.RecordBatch:
    """Events of the first hour as a client sends them; ``changed``: values by column."""
    [batch] = lake_events(FIRST_HOUR, rows, seed).select(EVENT_SCHEMA.names).cast(SENT).combine_chunks().to_batches()
    for name, values in changed.items():
        at = SENT.get_field_index(name)
        whole = values
        if isinstance(values, dict):
            whole = [values.get(row, value) for row, value in enumerate(batch.column(at).to_pylist())]
        batch = batch.set_column(at, SENT.field(at), pa.array(whole, SENT.field(at).type))
    return batch
