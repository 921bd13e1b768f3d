"""Events made out of a seed, without a Postgres: what the change log would have given for one window.

The same arguments always give the same events; other windows give other pks and ids, so tables of several windows can be put together.
Payloads have the sizes of real ones (about 0.2 to 4 kB, half of them below 0.5 kB), three tenants of very different sizes and none,
non-ASCII text, and nulls in every column that may be null.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.event import BATCH_SCHEMA, EVENT_TYPES, LAKE_SCHEMA, SORT_KEYS, TIMESTAMP
from fraiseql_pipeline.window import Window

ENTITY_TYPES = ("Order", "User", "Product", "Invoice", "Payment")
TENANTS = (
    "11111111-1111-4111-8111-111111111111",
    "22222222-2222-4222-8222-222222222222",
    "33333333-3333-4333-8333-333333333333",
)
_NAMES = ("Ada Lovelace", "Zoë Müller", "山田 太郎", "Łukasz Żak", "عمر", 'O\'Brien "Bob"', "🦊 Fox", "Nguyễn Thị Hoa")
_PAYLOADS_PER_TYPE = 256


def lake_events(window: Window, n: int, seed: int = 0) -> pa.Table:
    """``n`` accepted events of ``window``: ``LAKE_SCHEMA``, in (timestamp, pk) order, event ids distinct."""
    batch = batch_events(window, n, seed)
    columns = [batch.column(name) for name in LAKE_SCHEMA.names if name != "event_date"]
    return pa.Table.from_arrays([*columns, batch.column("timestamp").cast(pa.date32())], schema=LAKE_SCHEMA)


def batch_events(window: Window, n: int, seed: int = 0, **overrides: Any) -> pa.RecordBatch:
    """``n`` events of ``window`` as the change log gives them: ``BATCH_SCHEMA``, in (timestamp, pk) order.

    An override replaces a column: a scalar fills it, a sequence of ``n`` values is it, a mapping ``{row: value}`` changes single rows.
    Overrides are applied after sorting, so row numbers are those of the result.
    """
    unknown = set(overrides) - set(BATCH_SCHEMA.names)
    if unknown:
        raise ValueError(f"BATCH_SCHEMA has no column {sorted(unknown)}.")
    columns = _columns(window, n, random.Random(f"{window.key}/{seed}"))
    table = pa.table([columns[name].cast(BATCH_SCHEMA.field(name).type) for name in BATCH_SCHEMA.names], schema=BATCH_SCHEMA)
    table = table.take(pc.sort_indices(table, sort_keys=SORT_KEYS)).combine_chunks()
    for name, value in overrides.items():
        at = BATCH_SCHEMA.get_field_index(name)
        table = table.set_column(at, BATCH_SCHEMA.field(at), _overridden(table.column(at), value))
    return pa.RecordBatch.from_arrays([_one_chunk(column) for column in table.columns], schema=BATCH_SCHEMA)


def _overridden(column: pa.ChunkedArray, value: Any) -> pa.Array:
    if isinstance(value, Mapping):
        values = column.to_pylist()
        for row, replacement in value.items():
            values[row] = replacement
        return pa.array(values, column.type)
    if isinstance(value, pa.Array):
        return value.cast(column.type)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return pa.repeat(pa.scalar(value, column.type), len(column))
    if len(value) != len(column):
        raise ValueError(f"An override must have {len(column)} values, got {len(value)}.")
    return pa.array(value, column.type)


def _columns(window: Window, n: int, rng: random.Random) -> dict[str, pa.Array]:
    entity_ids = _uuids(max(1, n // 4), rng)
    entity = _pick(entity_ids, n, rng)
    event_type = _pick(pa.array(EVENT_TYPES), n, rng, weights=(30, 58, 8, 4))
    entity_type = _pick(pa.array(ENTITY_TYPES), n, rng, weights=(40, 15, 10, 15, 20))
    data = _data(entity_type, entity, n, rng)
    timestamp = _timestamps(window, n, rng)
    started_at = pc.subtract(timestamp.cast(pa.int64()), pa.scalar(1_500, pa.int64())).cast(TIMESTAMP)
    base = (window.start - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    pk = pa.array(range(base, base + n), pa.int64())
    fields = pa.array([["total", "status"], ["email"], [], ["name", None], None], pa.list_(pa.field("element", pa.string())))
    mediated = _chance(0.9, n, rng)
    return {
        "event_id": _uuids(n, rng),
        "event_type": event_type,
        "entity_type": entity_type,
        "entity_id": entity,
        "timestamp": timestamp,
        "data": data,
        "user_id": _pick(pa.array([str(i) for i in range(1, 501)] + [None] * 50, pa.string()), n, rng),
        "org_id": _pick(pa.array([*TENANTS, None], pa.string()), n, rng, weights=(80, 15, 1, 4)),
        "pk": pk,
        "seq": pc.add(pk, 17),
        "data_before": _where(pc.and_(pc.equal(event_type, "Deleted"), _chance(0.8, n, rng)), data),
        "updated_fields": _pick(fields, n, rng),
        "change_status": _where(pc.invert(mediated), pa.repeat("success", n)),
        "actor_type": _pick(pa.array(["human_user", "service_account", "ai_agent", "system_job", None]), n, rng),
        "acting_for": _pick(pa.array([*TENANTS[:2], None, None, None, None], pa.string()), n, rng),
        "schema_version": pa.repeat("9b2f0c5d7a1e4f63", n),
        "trace_id": _where(mediated, _hex(n, 16, rng)),
        "duration_ms": _where(mediated, _pick(pa.array(range(1, 900), pa.int32()), n, rng)),
        "started_at": _where(mediated, started_at),
        "commit_time": _where(_chance(0.99, n, rng), timestamp),
        "cdc_source": _where(pc.invert(mediated), pa.repeat("fallback_trigger", n)),
        "extra_metadata": pc.if_else(mediated, '{"duration_calc_version": 2}', '{"cdc_source": "fallback_trigger"}'),
        "cascade": _where(_chance(0.1, n, rng), pa.repeat('{"updated": [], "deleted": []}', n)),
        "raw": pa.nulls(n, pa.string()),
    }


def _timestamps(window: Window, n: int, rng: random.Random) -> pa.Array:
    """Rising, a quarter of them shared with the event before (several events of one transaction), a few out of pk order."""
    step = (window.end - window.start) // timedelta(microseconds=1)
    start = (window.start - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    at = sorted(rng.randrange(step) for _ in range(n)) if n < 10_000 else _random_int(step, n, rng).sort().to_pylist()
    for i in range(1, n):
        if i % 4 == 0:
            at[i] = at[i - 1]
        elif i % 97 == 0:
            at[i], at[i - 1] = at[i - 1], at[i]
    return pc.add(pa.array(at, pa.int64()), start).cast(TIMESTAMP)


def _data(entity_type: pa.Array, entity_id: pa.Array, n: int, rng: random.Random) -> pa.Array:
    """JSON text as jsonb prints it; starts with the entity's id, so that no two entities share a payload."""
    base = pc.multiply(pc.index_in(entity_type, pa.array(ENTITY_TYPES)), pa.scalar(_PAYLOADS_PER_TYPE, pa.int32()))
    tail = _tails().take(pc.add(base, _random_int(_PAYLOADS_PER_TYPE, n, rng).cast(pa.int32())))
    return pc.binary_join_element_wise('{"id": "', entity_id, '", ', tail, "")


@cache
def _tails() -> pa.Array:
    """The payloads without their first field, the same for all seeds: printing them is what takes the time."""
    rng = random.Random("payloads")
    return pa.array([_tail(name, rng) for name in ENTITY_TYPES for _ in range(_PAYLOADS_PER_TYPE)], pa.string())


def _tail(entity_type: str, rng: random.Random) -> str:
    items = [
        {"sku": f"SKU-{rng.randrange(10**6):06d}", "qty": rng.randrange(1, 9), "price": f"{rng.randrange(100, 99999) / 100:.2f}"}
        for _ in range(min(40, int(rng.expovariate(0.25))))
    ]
    payload: dict[str, Any] = {
        "type": entity_type,
        "name": rng.choice(_NAMES),
        "total": rng.randrange(10**6) / 100,
        "status": rng.choice(("draft", "paid", "shipped", "cancelled", None)),
        "address": {"street": f"Straße {rng.randrange(999)}", "city": rng.choice(("Paris", "München", "東京")), "zip": None},
        "tags": rng.sample(("new", "vip", "déjà-vu", "b2b", "gift"), rng.randrange(4)),
        "items": items,
    }
    return json.dumps(payload, ensure_ascii=False)[1:]


def _uuids(n: int, rng: random.Random) -> pa.Array:
    digits = pl.col("digits").str
    hyphenated = pl.concat_str(
        digits.slice(0, 8),
        digits.slice(8, 4),
        pl.lit("4") + digits.slice(13, 3),
        pl.lit("8") + digits.slice(17, 3),
        digits.slice(20, 12),
        separator="-",
    )
    frame = pl.DataFrame({"digits": pl.Series(_hex(n, 16, rng))}, schema={"digits": pl.String})
    return _plain(frame.select(hyphenated.alias("uuid"))["uuid"])


def _hex(n: int, width: int, rng: random.Random) -> pa.Array:
    data = rng.randbytes(n * width).hex()
    offsets = pa.array(range(0, (n + 1) * 2 * width, 2 * width), pa.int32())
    return pa.StringArray.from_buffers(n, offsets.buffers()[1], pa.py_buffer(data.encode()))


def _plain(series: pl.Series) -> pa.Array:
    return series.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())


def _random_int(below: int, n: int, rng: random.Random) -> pa.Array:
    return pc.floor(pc.multiply(pc.random(n, initializer=rng.getrandbits(63)), float(below))).cast(pa.int64())


def _pick(values: pa.Array, n: int, rng: random.Random, weights: Sequence[int] | None = None) -> pa.Array:
    if weights is not None:
        values = values.take(pa.array([i for i, weight in enumerate(weights) for _ in range(weight)], pa.int32()))
    return values.take(_random_int(len(values), n, rng))


def _chance(share: float, n: int, rng: random.Random) -> pa.Array:
    return pc.less(pc.random(n, initializer=rng.getrandbits(63)), share)


def _where(mask: pa.Array, values: pa.Array) -> pa.Array:
    return pc.if_else(mask, values, pa.scalar(None, values.type))


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return (
        column
        if isinstance(column, pa.Array)
        else pa.concat_arrays(column.chunks)
        if column.num_chunks
        else pa.array([], column.type)
    )
