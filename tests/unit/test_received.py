"""A stream is whole as its receipt says, or one error of this package's tree, whatever a server sends."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from fraiseql_pipeline.encoding import UUID, checksum
from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.received import Stream, facts_of

RECEIPT = {
    "rows": 3,
    "table_version": 1,
    "complete_through": "2026-11-01T00:00:00+00:00",
    "provisional_windows": 0,
    "missing_windows": 0,
    "settled_pk": 7,
    "next_ticket": None,
}
EVENTS = pa.record_batch({"event_id": [f"{number:08x}-0000-4000-8000-000000000000" for number in range(3)], "pk": [1, 2, 3]})
COMPACT = {"fraiseql.encoding": "compact+zstd"}


class Reader:
    """Reads as pyarrow's does: an event batch, then a batch without rows that carries the receipt."""

    def __init__(self, batch: pa.RecordBatch, receipt: bytes) -> None:
        self._chunks = iter(
            [
                SimpleNamespace(data=batch, app_metadata=None),
                SimpleNamespace(data=batch.slice(0, 0), app_metadata=pa.py_buffer(receipt)),
            ]
        )

    def read_chunk(self) -> Any:
        return next(self._chunks)


def read(batch: pa.RecordBatch, **said: Any) -> pa.Table:
    receipt = {**RECEIPT, "rows": batch.num_rows, **said}
    return Stream(Reader(batch, json.dumps(receipt).encode()), batch.schema, "grpc://there").read_all()


def test_a_stream_is_what_its_receipt_says() -> None:
    assert read(EVENTS, checksum=checksum(EVENTS)).num_rows == 3
    assert read(EVENTS.select(["pk"]), checksum=None).num_rows == 3
    assert read(EVENTS.select(["pk"])).num_rows == 3


@pytest.mark.parametrize("said", [{"checksum": None}, {}], ids=["null", "absent"])
def test_a_receipt_without_the_sum_of_the_ids_that_were_sent_proves_nothing(said: dict[str, Any]) -> None:
    with pytest.raises(FlightUnavailable, match="has no sum of event ids in its receipt after 3 events; read it again"):
        read(EVENTS, **said)


@pytest.mark.parametrize(
    "said",
    [
        {"rows": 3.0},
        {"rows": True},
        {"checksum": [1]},
        {"settled_pk": "7"},
        {"table_version": {}},
        {"provisional_windows": None},
        {"missing_windows": "0"},
        {"next_ticket": 5},
        {"complete_through": 5},
        {"complete_through": "0001-01-01T00:00:00+14:00"},
    ],
)
def test_a_receipt_of_other_types_cannot_be_read(said: dict[str, Any]) -> None:
    with pytest.raises(FlightUnavailable, match="receipt cannot be read"):
        read(EVENTS, **{"checksum": checksum(EVENTS), **said})


@pytest.mark.parametrize("metadata", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"[]", b"", b"null"])
def test_what_is_no_json_object_cannot_be_read(metadata: bytes) -> None:
    with pytest.raises(FlightUnavailable, match="receipt cannot be read"):
        facts_of(metadata)


@pytest.mark.parametrize(
    "batch",
    [
        pa.record_batch({"event_id": [1, 2, 3]}),
        pa.record_batch({"event_id": [["a"], ["b"], ["c"]]}),
        pa.record_batch({"event_id": pa.array(["a", "b", "c"], pa.large_string())}),
        pa.record_batch({"event_id": [None, "b", "c"]}),
        pa.record_batch({"event_id": pa.nulls(3)}),
        pa.record_batch({"bogus": [1, 2, 3]}).replace_schema_metadata(COMPACT),
        pa.record_batch({"timestamp": pa.array([b"0" * 16] * 3, UUID)}).replace_schema_metadata(COMPACT),
        pa.record_batch({"data": pa.array([1, 2, 3])}).replace_schema_metadata(COMPACT),
    ],
    ids=lambda batch: str(batch.schema.field(0)),
)
def test_columns_that_are_no_events_are_an_error_of_this_package(batch: pa.RecordBatch) -> None:
    with pytest.raises(FlightUnavailable, match=r"The stream from grpc://there .* after \d events; read it again"):
        read(batch, checksum=1)
