"""Sample events: what a shop on FraiseQL writes into its change log in a few days.

What lives here: how the events look, as columns, and nothing that talks to a server (``fill.py`` does). What must not: a clock, a random
source that differs between versions of a library; the same arguments give the same events everywhere.

Users, products, orders, invoices and payments are created, updated some times and sometimes deleted; an order, its invoice and its
payment belong together and to one tenant. Tenants differ in size by two orders of magnitude, days have nights, payloads run from a
hundred bytes to ten kilobytes, and texts are in the world's scripts. What a payload looks like is the sample's shape: ``typical`` (155
bytes of JSON on average) or ``wide`` (450), so that nothing is tuned to one width.

Invariants
 1. Events are in order of time, and those of one entity in the order of its life.
 2. A few rows are not sound, as in any real log: in a window of an hour or a day at most one in sixty, none in a small one, and two rows
    of the whole have an infinite time and belong to no window.
"""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Literal, Protocol, get_args

import polars as pl

from fraiseql_pipeline.changelog.samples.binary import INFINITY
from fraiseql_pipeline.changelog.samples.lives import BLOCK, KINDS, Draws, Kind, joined, skeleton
from fraiseql_pipeline.changelog.samples.typical import Typical
from fraiseql_pipeline.changelog.samples.wide import Wide
from fraiseql_pipeline.window import from_micros

#: Rows of one slice: 25 MB, or 41 of the wide shape. Smaller slices pay more for their expressions: 4.1 µs of CPU a row to make and encode at
#: 25,000, 2.8 at 50,000, 2.5 at 100,000.
SLICE_ROWS = 50_000

#: What a slice holds: columns of the change log. UUIDs as 16 bytes, times as microseconds since 1970 or ±``INFINITY``, JSON as text, arrays
#: as JSON. ``pk`` and ``seq`` are numbered by who writes them.
COLUMNS: tuple[str, ...] = (
    "object_type",
    "modification_type",
    "id",
    "created_at",
    "tenant_id",
    "fk_contact",
    "object_id",
    "object_data",
    "object_data_before",
    "updated_fields",
    "cascade",
    "duration_ms",
    "started_at",
    "commit_time",
    "actor_type",
    "acting_for",
    "schema_version",
    "trace_id",
    "change_status",
    "extra_metadata",
)

#: Which events of an hour are unsound: the 61st, and every 397th after it.
_UNSOUND_FIRST, _UNSOUND_EVERY = 60, 397
_UNSOUND_KINDS = 6

ShapeName = Literal["typical", "wide"]
SHAPES: tuple[ShapeName, ...] = get_args(ShapeName)


class Shape(Protocol):
    """What entities look like. ``haste``: how much sooner than evenly the changes of an entity follow its creation (``lives.py``)."""

    haste: int

    def payload(self, kind: Kind, entity: pl.Series, place: pl.Series, draws: Draws) -> pl.Series:
        """JSON of entities of one kind after so many changes."""
        ...


_SHAPES: Mapping[ShapeName, Callable[[int], Shape]] = {"typical": Typical, "wide": Wide}


@dataclass(frozen=True, slots=True)
class Sample:
    """The plan of a sample: every event's entity, place in its life and time; ``slices`` turns it into rows."""

    events: int
    seed: int
    first: datetime
    last: datetime
    quarantined_rows: int
    unplaced_rows: int
    planned: pl.DataFrame
    shape: Shape

    def slices(self, rows: int = SLICE_ROWS) -> Iterator[pl.DataFrame]:
        """The events as frames of ``COLUMNS`` in order of time."""
        draws, tenants = Draws(self.seed), _Tenants(self.seed)
        for offset in range(0, self.events, rows):
            yield _rows(self.planned.slice(offset, rows), draws, self.shape, tenants)


def plan(events: int, *, days: int, end: datetime, seed: int, shape: ShapeName = "typical") -> Sample:
    """A sample of so many events over the days before ``end``, exclusive."""
    looks = _SHAPES[shape](seed)
    unplaced = 2 if events >= 1000 else 0
    odd = pl.lit(0, pl.Int8)
    if unplaced:
        odd = pl.when(pl.col("n") == events // 3).then(1).when(pl.col("n") == 2 * events // 3).then(-1).otherwise(0).cast(pl.Int8)
    # Counted per hour of the events that have a place, so that no window has more than its share.
    in_hour = pl.int_range(pl.len()).over("hour")
    unsound = pl.when((in_hour % _UNSOUND_EVERY == _UNSOUND_FIRST) & (pl.col("infinite") == 0)).then(
        (in_hour // _UNSOUND_EVERY + pl.col("hour")) % _UNSOUND_KINDS + 1
    )
    planned = (
        skeleton(events, days, end, Draws(seed), looks.haste)
        .with_row_index("n")
        .with_columns(infinite=odd, hour=pl.col("at") // 3_600_000_000)
        .with_columns(unsound=unsound.otherwise(0).cast(pl.Int8))
        .drop("hour")
    )
    bounds = planned.filter(pl.col("infinite") == 0).select(first=pl.col("at").min(), last=pl.col("at").max()).row(0)
    first, last = map(from_micros, bounds)
    return Sample(events, seed, first, last, int(planned.select((pl.col("unsound") > 0).sum()).item()), unplaced, planned, looks)


# ------------------------------------------------------------------------------------------------------------------ rows


class _Tenants:
    """The tenants, and up to which share of all events each of them reaches."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        sizes = [1 / (rank + 1) ** 1.6 for rank in range(24)]
        self.shares = pl.Series([min(1.0, share / math.fsum(sizes)) for share in accumulate(sizes[:-1])])
        self.ids = pl.Series([uuid.UUID(int=choose.getrandbits(128), version=4).bytes for _ in sizes])


_KIND_IN_BLOCK = pl.Series([at for at, kind in enumerate(KINDS) for _ in range(kind.count)], dtype=pl.UInt8)
_NAMES = pl.Series([kind.name for kind in KINDS])
_CHANGED = pl.Series([json.dumps(kind.changed) for kind in KINDS])
_DELETED_SHARES = pl.Series([kind.deleted_share for kind in KINDS])


def _rows(planned: pl.DataFrame, draws: Draws, shape: Shape, tenants: _Tenants) -> pl.DataFrame:
    """One slice as ``COLUMNS``, in the slice's order."""
    event, entity, place, at, infinite, unsound = planned.select("n", "entity", "place", "at", "infinite", "unsound")
    block, kind = entity // BLOCK, _KIND_IN_BLOCK.gather(entity % BLOCK)
    luck, actor, producer = draws.share(event, 20), draws.share(event, 22), draws.share(event, 21)
    later = place > 0
    gone = later & (place == planned["length"] - 1) & (draws.share(entity, 2) < _DELETED_SHARES.gather(kind))
    changed = later & ~gone
    triggered = producer > 0.93
    executed = ~triggered & ((producer < 0.9) | later)
    agent = (actor >= 0.90) & (actor < 0.96)
    duration = (draws.exponential(event, 24) * 12 + 1).cast(pl.Int32)
    verb = pl.when(changed).then(pl.lit("UPDATE")).when(gone).then(pl.lit("DELETE")).otherwise(pl.lit("INSERT"))

    def payload(rows: pl.Series, places: pl.Series) -> pl.Series:
        """Of these rows, in their order."""
        kinds, entities = kind.gather(rows), entity.gather(rows)
        of_kind = [(kinds == at).arg_true() for at in range(len(KINDS))]
        texts = [
            shape.payload(KINDS[at], entities.gather(found), places.gather(found), draws)
            for at, found in enumerate(of_kind)
            if len(found)
        ]
        return pl.concat(texts).gather(pl.concat(of_kind).arg_sort()) if texts else pl.Series(dtype=pl.String)

    def cascade(rows: pl.Series) -> pl.Series:
        names, ids = _NAMES.gather(kind.gather(rows)), draws.uuid_text(entity.gather(rows), 30)
        return joined('{"updated": [{"__typename": "', names, '", "id": "', ids, '"}], "deleted": []}')

    return pl.select(
        object_type=pl.when(unsound == 5).then(pl.lit("")).otherwise(_NAMES.gather(kind)),
        modification_type=pl.when(unsound == 1).then(pl.lit("UPSERT"))
        .when(changed & (luck < 0.01)).then(pl.lit("CUSTOM"))
        .when(changed & (luck < 0.015)).then(pl.lit("NOOP"))
        .when(luck > 0.995).then(verb.str.to_lowercase())
        .otherwise(verb),
        id=draws.uuid(event - (unsound == 3).cast(pl.UInt32), 32),  # a duplicate has the id of the event before it
        created_at=pl.when(infinite == 1).then(INFINITY).when(infinite == -1).then(-INFINITY).otherwise(at),
        # By their sizes; one event in a hundred has no tenant (system work, unauthenticated).
        tenant_id=pl.when((luck < 0.5) | (luck >= 0.51)).then(
            tenants.ids.gather(tenants.shares.search_sorted(draws.share(block, 25), side="right"))
        ),
        fk_contact=pl.when(executed & (actor < 0.96)).then((draws.below(block, 26, 4000) + 1).cast(pl.Int64)),
        object_id=pl.when(unsound != 2).then(draws.uuid(entity, 30)),
        object_data=_where(~gone & (luck < 0.9985), lambda rows: payload(rows, place.gather(rows))),
        object_data_before=_where(later & (draws.share(event, 23) < 0.2), lambda rows: payload(rows, place.gather(rows) - 1)),
        updated_fields=pl.when(unsound == 4).then(pl.lit('[["status", "draft"], ["total", "0"]]'))
        .when(executed & changed & (luck < 0.03)).then(pl.lit("[]"))
        .when(executed & changed).then(_CHANGED.gather(kind)),
        cascade=_where(executed & (draws.share(event, 27) < 0.02), cascade),
        duration_ms=pl.when(executed).then(duration),
        started_at=pl.when(unsound == 6).then(INFINITY).when(executed).then(at - duration.cast(pl.Int64) * 1000),
        commit_time=at + draws.below(event, 28, 20_000).cast(pl.Int64),
        actor_type=pl.when(actor < 0.80).then(pl.lit("human_user"))
        .when(actor < 0.90).then(pl.lit("service_account"))
        .when(agent).then(pl.lit("ai_agent"))
        .otherwise(pl.lit("system_job")),
        acting_for=_where(agent, lambda rows: draws.uuid(block.gather(rows), 34)),
        schema_version=pl.when(executed | triggered).then(pl.lit("9f2c4e7a1b305d68")),
        trace_id=_where(executed & (draws.share(event, 29) < 0.95), lambda rows: draws.hex(event.gather(rows), 36)),
        change_status=pl.when(triggered).then(pl.lit("success")),
        extra_metadata=pl.when(triggered).then(pl.lit('{"cdc_source": "fallback_trigger"}'))
        .when(executed).then(pl.lit('{"duration_calc_version": 2}'))
        .otherwise(pl.lit('{"transport": "flight", "flight_user_id": "loader-7"}')),
    ).select(COLUMNS)  # fmt: skip


def _where(has: pl.Series, made: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """What is made of the numbers of the rows that have it; null in the others."""
    return made(has.arg_true()).gather(pl.select(pl.when(has).then(has.cum_sum() - 1)).to_series())
