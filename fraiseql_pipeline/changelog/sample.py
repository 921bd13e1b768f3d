"""Sample events: what a shop on FraiseQL writes into its change log in a few days.

What lives here: how the events look, as columns, and nothing that talks to a server (``fill.py`` does). What must not: a clock, a random
source that differs between versions of a library; the same arguments give the same events everywhere.

Users, products, orders, invoices and payments are created, updated some times and sometimes deleted; an order, its invoice and its
payment belong together and to one tenant. Tenants differ in size by two orders of magnitude, days have nights, payloads run from two
hundred bytes to ten kilobytes, and texts are in the world's scripts.

Invariants
 1. Events are in order of time, and those of one entity in the order of its life.
 2. A few rows are not sound, as in any real log: in a window of an hour or a day at most one in sixty, none in a small one, and two rows
    of the whole have an infinite time and belong to no window.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any

import polars as pl

from fraiseql_pipeline.changelog.lives import BLOCK, KINDS, Draws, Kind, joined, skeleton

#: Rows of one slice: 45 MB of text. Smaller slices pay more for their expressions: 5.8 µs of CPU a row at 25,000, 4.5 at 50,000, 4.2 at 100,000.
SLICE_ROWS = 50_000

#: What a slice holds: columns of the change log, as text for COPY. ``pk`` and ``seq`` are numbered by who writes them.
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

    def slices(self, rows: int = SLICE_ROWS) -> Iterator[pl.DataFrame]:
        """The events as frames of ``COLUMNS`` in order of time."""
        draws, pools = Draws(self.seed), _Pools(self.seed)
        for offset in range(0, self.events, rows):
            yield _rows(self.planned.slice(offset, rows), draws, pools)


def plan(events: int, *, days: int, end: datetime, seed: int) -> Sample:
    """A sample of so many events over the days before ``end``, exclusive."""
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
        skeleton(events, days, end, Draws(seed))
        .with_row_index("n")
        .with_columns(infinite=odd, hour=pl.col("at") // 3_600_000_000)
        .with_columns(unsound=unsound.otherwise(0).cast(pl.Int8))
        .drop("hour")
    )
    bounds = planned.filter(pl.col("infinite") == 0).select(first=pl.col("at").min(), last=pl.col("at").max()).row(0)
    first, last = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at) for at in bounds)
    return Sample(events, seed, first, last, int(planned.select((pl.col("unsound") > 0).sum()).item()), unplaced, planned)


# ----------------------------------------------------------------------------------------------------------------- texts

_NAMES = (
    "Zoë Müller", "Łukasz Żak", "Ana García", "Søren Ørsted", "José Álvarez", "李小龍", "王芳", "山田 太郎", "さくら", "김민준", "Нина Ковалёва",
    "Ελένη Παπαδοπούλου", "محمد علي", "דנה לוי", "प्रिया शर्मा", "ณัฐพล", "Nguyễn Thị Hoa", "O'Brien", "Anne-Marie D'Arcy", "Jean «Jeannot» Dupont",
    "Ada Lovelace", "Grace Hopper", "Bob", "X Æ A-12", "𝒜lice", "🦊 Fox", "Ìyábọ̀ Adé", "Þórdís Jónsdóttir", "İsmail Işık", "Ștefan Țăranu",
)  # fmt: skip
_CITIES = (
    "Zürich",
    "København",
    "São Paulo",
    "北京",
    "東京",
    "Αθήνα",
    "Київ",
    "القاهرة",
    "Montréal",
    "Reykjavík",
    "Tromsø",
    "Łódź",
    "Paris",
    "Kinshasa",
)
_WORDS = (
    "light", "Stuhl", "écran", "cable", "größe", "naïve", "blue", "鋼", "wool", "café", "wireless", "portable", "コーヒー", "сталь", "set", "pro",
    "mini", "XL", "2-in-1", "organic", "señor", "vintage", "½", "№5", "™",
)  # fmt: skip
_NOTES = (
    "ring twice", "leave at the door", 'he said "tomorrow"', "back\\slash", "line one\nline two\ttabbed", "bitte nicht stürzen ⚠️", "送り状不要",
    "👩‍👩‍👧 family order 🎁", "separator\u2028inside", "quote ' and ; -- no SQL", "עטיפת מתנה", "", "éé combining", "<b>bold</b> & co", "NULL", "null",
)  # fmt: skip
_CURRENCIES = pl.Series(("EUR", "USD", "GBP", "JPY", "CHF"))


class _Pools:
    """JSON fragments that are chosen from, as COPY wants them: pieces are what varies least, numbers and ids are written per row."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)

        def words(least: int, most: int) -> str:
            return " ".join(choose.choices(_WORDS, k=choose.randint(least, most)))

        self.names = _json_series(choose.choices(_NAMES, k=256))
        self.notes = _json_series([choose.choice(_NOTES) if choose.random() < 0.35 else None for _ in range(512)])
        self.descriptions = _json_series([words(2, 25) for _ in range(1024)])
        self.addresses = _json_series([self._address(choose) for _ in range(1024)])
        self.items = _json_series([self._items(choose, words(1, 4)) for _ in range(4096)])
        self.preferences = _json_series([self._preferences(choose) for _ in range(512)])
        self.attributes = _json_series(
            [self._attributes(choose, words(200, 1500) if at % 64 == 0 else words(1, 5)) for at in range(2048)]
        )
        sizes = [1 / (rank + 1) ** 1.6 for rank in range(24)]
        self.tenant_shares = pl.Series([share / math.fsum(sizes) for share in accumulate(sizes)])
        self.tenants = pl.Series([_uuid_text(choose) for _ in sizes] + [None], dtype=pl.String)

    @staticmethod
    def _address(choose: random.Random) -> dict[str, Any]:
        return {
            "street": f"{choose.choice(_WORDS).title()} {choose.randint(1, 250)}",
            "city": choose.choice(_CITIES),
            "postal_code": f"{choose.randint(1000, 99999)}",
            "geo": {"lat": round(choose.uniform(-60, 70), 5), "lon": round(choose.uniform(-180, 180), 5)}
            if choose.random() < 0.5
            else None,
        }

    @staticmethod
    def _items(choose: random.Random, name: str) -> list[dict[str, Any]]:
        return [
            {
                "sku": f"{choose.choice('ABCDEF')}{choose.randint(1000, 9999)}",
                "name": name if at == 0 else choose.choice(_WORDS),
                "quantity": choose.randint(1, 5),
                "price": f"{choose.uniform(1, 400):.2f}",
                "options": {"colour": choose.choice(_WORDS), "gift": True} if choose.random() < 0.1 else {},
            }
            for at in range(min(25, 1 + int(choose.expovariate(0.8))))
        ]

    @staticmethod
    def _preferences(choose: random.Random) -> dict[str, Any]:
        channels = [channel for channel in ("email", "sms", "push") if choose.random() < 0.5]
        return {
            "locale": choose.choice(("de-CH", "en", "fr", "ja", "ar")),
            "newsletter": choose.random() < 0.4,
            "channels": channels,
        }

    @staticmethod
    def _attributes(choose: random.Random, text: str) -> dict[str, Any]:
        return {
            "weight_g": choose.randint(5, 30000),
            "dimensions": [choose.randint(1, 300) for _ in range(3)],
            "tags": choose.sample(_WORDS, k=choose.randint(0, 6)),
            "manual": text,
        }


def _json_series(values: Sequence[Any]) -> pl.Series:
    """As COPY's text format wants them: JSON has no raw tab or line feed, so only its backslashes are doubled."""
    return pl.Series([json.dumps(value, ensure_ascii=False).replace("\\", "\\\\") for value in values], dtype=pl.String)


def _uuid_text(choose: random.Random) -> str:
    digits = f"{choose.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


# ------------------------------------------------------------------------------------------------------------------ rows

_STATUS = {
    "Order": ("placed", "paid", "packed", "shipped", "delivered", "returned"),
    "Invoice": ("draft", "sent", "overdue", "paid"),
    "Payment": ("authorised", "captured", "settled", "refunded"),
}


def _rows(planned: pl.DataFrame, draws: Draws, pools: _Pools) -> pl.DataFrame:
    """One slice as ``COLUMNS``, in the slice's order."""
    in_block = pl.col("entity") % BLOCK
    parts = []
    for kind in KINDS:
        part = planned.filter((in_block >= kind.first) & (in_block < kind.first + kind.count))
        if len(part):
            parts.append(_rows_of(kind, part, draws, pools))
    return pl.concat(parts).sort("n").select(COLUMNS)


def _rows_of(kind: Kind, part: pl.DataFrame, draws: Draws, pools: _Pools) -> pl.DataFrame:
    event, entity, at = part["n"], part["entity"], part["at"]
    block = entity // BLOCK
    luck, actor, producer = draws.share(event, 20), draws.share(event, 22), draws.share(event, 21)
    later, unsound = part["place"] > 0, part["unsound"]
    gone = later & (part["place"] == part["length"] - 1) & (draws.share(entity, 2) < kind.deleted_share)
    changed = later & ~gone
    triggered = producer > 0.93
    executed = ~triggered & ((producer < 0.9) | later)
    agent = (actor >= 0.90) & (actor < 0.96)
    object_id = draws.uuid(entity, 30)
    # The customer of an order: a user of this block of entities or of one before it.
    customer = (draws.share(entity, 47) * (block + 1)).cast(pl.UInt32) * BLOCK + entity % 2
    part = part.with_columns(object_id=object_id, customer=customer)
    with_before = part.filter(later & (draws.share(event, 23) < 0.2))
    earlier = with_before.select("n", object_data_before=_payload(kind, with_before, with_before["place"] - 1, draws, pools))
    duration = (draws.exponential(event, 24) * 12 + 1).cast(pl.Int32)
    verb = pl.when(changed).then(pl.lit("UPDATE")).when(gone).then(pl.lit("DELETE")).otherwise(pl.lit("INSERT"))
    return part.join(earlier, on="n", how="left", maintain_order="left").select(
        "n",
        object_type=pl.when(unsound == 5).then(pl.lit("")).otherwise(pl.lit(kind.name)),
        modification_type=pl.when(unsound == 1).then(pl.lit("UPSERT"))
        .when(changed & (luck < 0.01)).then(pl.lit("CUSTOM"))
        .when(changed & (luck < 0.015)).then(pl.lit("NOOP"))
        .when(luck > 0.995).then(verb.str.to_lowercase())
        .otherwise(verb),
        id=draws.uuid(event - (unsound == 3).cast(pl.UInt32), 32),  # a duplicate has the id of the event before it
        created_at=pl.when(part["infinite"] == 1).then(pl.lit("infinity"))
        .when(part["infinite"] == -1).then(pl.lit("-infinity"))
        .otherwise(_time(at)),
        # By their sizes; one event in a hundred has no tenant (system work, unauthenticated).
        tenant_id=pools.tenants.gather(pools.tenant_shares.search_sorted(draws.share(block, 25) / 0.99, side="right")),
        fk_contact=pl.when(executed & (actor < 0.96)).then((draws.below(block, 26, 4000) + 1).cast(pl.String)),
        object_id=pl.when(unsound != 2).then("object_id"),
        object_data=pl.when(~gone & (luck < 0.9985)).then(_payload(kind, part, part["place"], draws, pools)),
        object_data_before="object_data_before",
        updated_fields=pl.when(unsound == 4).then(pl.lit("{{status,draft},{total,0}}"))
        .when(executed & changed & (luck < 0.03)).then(pl.lit("{}"))
        .when(executed & changed).then(pl.lit(kind.changed)),
        cascade=pl.when(executed & (draws.share(event, 27) < 0.02)).then(
            joined('{"updated": [{"__typename": "', kind.name, '", "id": "', object_id, '"}], "deleted": []}')
        ),
        duration_ms=pl.when(executed).then(duration),
        started_at=pl.when(unsound == 6).then(pl.lit("infinity")).when(executed).then(_time(at - duration.cast(pl.Int64) * 1000)),
        commit_time=_time(at + draws.below(event, 28, 20_000).cast(pl.Int64)),
        actor_type=pl.when(actor < 0.80).then(pl.lit("human_user"))
        .when(actor < 0.90).then(pl.lit("service_account"))
        .when(agent).then(pl.lit("ai_agent"))
        .otherwise(pl.lit("system_job")),
        acting_for=pl.when(agent).then(draws.uuid(block, 34)),
        schema_version=pl.when(executed | triggered).then(pl.lit("9f2c4e7a1b305d68")),
        trace_id=pl.when(executed & (draws.share(event, 29) < 0.95)).then(draws.hex(event, 36)),
        change_status=pl.when(triggered).then(pl.lit("success")),
        extra_metadata=pl.when(triggered).then(pl.lit('{"cdc_source": "fallback_trigger"}'))
        .when(executed).then(pl.lit('{"duration_calc_version": 2}'))
        .otherwise(pl.lit('{"transport": "flight", "flight_user_id": "loader-7"}')),
    )  # fmt: skip


def _payload(kind: Kind, part: pl.DataFrame, place: pl.Series, draws: Draws, pools: _Pools) -> pl.Series:
    """JSON of the entities after so many changes."""
    entity = part["entity"]
    version = (place + 1).cast(pl.String)
    moment = entity.cast(pl.UInt64) * 64 + place
    order = entity - kind.behind

    def one_of(pool: pl.Series, key: pl.Series, salt: int) -> pl.Series:
        return pool.gather(draws.below(key, salt, len(pool)))

    def status() -> pl.Series:
        names = _STATUS[kind.name]
        return pl.Series(names).gather(place.clip(0, len(names) - 1))

    pieces: list[str | pl.Series] = ['{"id": "', part["object_id"], '", "version": ', version]
    if kind.name == "User":
        pieces += [
            ', "name": ',
            one_of(pools.names, entity, 40),
            ', "email": "user',
            entity.cast(pl.String),
            "+",
            version,
            '@example.com"',
        ]
        pieces += [', "preferences": ', one_of(pools.preferences, moment, 41), ', "address": ', one_of(pools.addresses, entity, 42)]
    elif kind.name == "Product":
        pieces += [', "name": ', one_of(pools.descriptions, entity, 43), ', "price": ', _money(draws.below(moment, 44, 90_000))]
        pieces += [
            ', "stock": ',
            draws.below(moment, 45, 500).cast(pl.String),
            ', "attributes": ',
            one_of(pools.attributes, entity, 46),
        ]
    else:
        pieces += [', "status": "', status(), '", "currency": "', one_of(_CURRENCIES, part["entity"] // BLOCK, 53), '", "total": ']
        pieces += [_money(draws.below(order, 48, 300_000))]
    if kind.name == "Order":
        customer = part["customer"]
        pieces += [
            ', "number": "O-',
            entity.cast(pl.String).str.zfill(9),
            '", "customer": {"id": "',
            draws.uuid(customer, 30),
            '", "name": ',
        ]
        pieces += [one_of(pools.names, customer, 40), '}, "items": ', one_of(pools.items, entity, 49)]
        pieces += [', "shipping": ', one_of(pools.addresses, entity, 50), ', "note": ', one_of(pools.notes, entity, 51)]
    elif kind.name == "Invoice":
        pieces += [', "order": "', draws.uuid(order, 30), '", "lines": ', one_of(pools.items, order, 49)]
        pieces += [', "billing": ', one_of(pools.addresses, order, 50)]
    elif kind.name == "Payment":
        last_digits = (draws.below(entity, 52, 9000) + 1000).cast(pl.String)
        pieces += [
            ', "order": "',
            draws.uuid(order, 30),
            '", "attempts": ',
            version,
            ', "method": {"kind": "card", "last4": "',
            last_digits,
            '"}',
        ]
    return joined(*pieces, "}")


def _money(cents: pl.Series) -> pl.Series:
    return joined((cents // 100).cast(pl.String), ".", (cents % 100).cast(pl.String).str.zfill(2))


def _time(at_us: pl.Series) -> pl.Series:
    return at_us.cast(pl.Datetime("us")).cast(pl.String)
