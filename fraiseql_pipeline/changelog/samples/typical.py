"""The shape ``typical``: flat payloads of some hundred bytes, and a long tail.

What lives here: what the five kinds of entities look like in most logs: a few fields with few distinct values, money, a name; one event
in thirty carries a nested document of half a kilobyte to two, a few one of ten. What must not: their lives (``lives.py``), the columns
around a payload (``sample.py``).

Measured over 1,000,000 events of a day: about 315 Arrow bytes in the eight columns of the wire, of which ``data`` 155 (median 134; 2.8 %
above 500, 0.2 % above 2,000, the longest 8,800); as event JSON and as frames: ``bench flight``, docs/performance.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import polars as pl

from fraiseql_pipeline.changelog.samples.lives import BLOCK, Draws, Kind, customer, joined
from fraiseql_pipeline.changelog.samples.texts import CITIES, CURRENCIES, NAMES, NOTES, WORDS, json_series, money, one_of, status

#: Shares of the entities of a kind that carry a nested document, and of the products whose document is a whole manual.
_NESTED = {"User": 0.05, "Product": 0.06, "Order": 0.03, "Invoice": 0.0, "Payment": 0.0}
_MANUALS = 0.012


class Typical:
    """Pools of JSON fragments. Keys stand in the order in which Postgres prints them: by length, then by letters."""

    #: Most changes of an entity follow its creation within minutes, some come days later.
    haste = 7

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        self._names = json_series(choose.choices(NAMES, k=256))
        self._titles = json_series([" ".join(choose.choices(WORDS, k=choose.randint(2, 4))) for _ in range(512)])
        self._notes = json_series([choose.choice(NOTES) if choose.random() < 0.2 else None for _ in range(512)])
        self._locales = json_series(["de-CH", "en", "fr", "ja", "ar"])
        self._currencies = json_series(CURRENCIES)
        self._methods = json_series(["card", "card", "card", "invoice", "wallet"])
        self._addresses = _nested("address", [_address(choose) for _ in range(64)])
        self._items = _nested("items", [_items(choose) for _ in range(256)])
        self._attributes = _nested("attributes", [_attributes(choose, 60) for _ in range(64)])
        self._manuals = _nested("attributes", [_attributes(choose, size) for size in range(300, 1500, 150)])

    def payload(self, kind: Kind, entity: pl.Series, place: pl.Series, draws: Draws) -> pl.Series:
        """JSON of the entities after so many changes."""
        version = (place + 1).cast(pl.String)
        moment = entity.cast(pl.UInt64) * 64 + place
        order = entity - kind.behind

        def chosen(pool: pl.Series, key: pl.Series, salt: int) -> pl.Series:
            return one_of(pool, draws, key, salt)

        def nested(pool: pl.Series, salt: int) -> pl.Series:
            has = draws.share(entity, salt) < _NESTED[kind.name]
            # The first of a pool is nothing.
            return pool.gather((draws.below(entity, salt + 1, len(pool) - 1) + 1) * has.cast(pl.UInt64))

        pieces: list[str | pl.Series]
        if kind.name == "User":
            pieces = ['{"name": ', chosen(self._names, entity, 40), ', "email": "user', entity.cast(pl.String), "+", version]
            pieces += ['@example.com", "locale": ', chosen(self._locales, entity, 41), nested(self._addresses, 54)]
            pieces += [', "version": ', version, ', "newsletter": ', chosen(_BOOLEANS, moment, 42), "}"]
        elif kind.name == "Product":
            large = (draws.share(entity, 46) < _MANUALS).cast(pl.UInt64)
            manual = self._manuals.gather((draws.below(entity, 47, len(self._manuals) - 1) + 1) * large)
            pieces = ['{"name": ', chosen(self._titles, entity, 43), ', "price": ', money(draws.below(entity, 44, 900) * 100 + 95)]
            pieces += [', "stock": ', draws.below(moment, 45, 500).cast(pl.String), ', "version": ', version]
            pieces += [pl.select(pl.when(large == 1).then(manual).otherwise(nested(self._attributes, 54))).to_series(), "}"]
        else:
            total = money(draws.below(order, 48, 300_000))
            currency = chosen(self._currencies, entity // BLOCK, 53)
            number = order.cast(pl.String).str.zfill(9)
            if kind.name == "Order":
                pieces = ['{"note": ', chosen(self._notes, entity, 51), nested(self._items, 54), ', "total": ', total]
                pieces += [', "number": "O-', number, '", "status": "', status(kind.name, place), '", "version": ', version]
                pieces += [', "currency": ', currency, ', "customer": ', chosen(self._names, customer(entity, draws), 40), "}"]
            elif kind.name == "Invoice":
                pieces = ['{"order": "O-', number, '", "total": ', total, ', "status": "', status(kind.name, place)]
                pieces += ['", "version": ', version, ', "currency": ', currency, "}"]
            else:
                pieces = ['{"order": "O-', number, '", "total": ', total, ', "method": ', chosen(self._methods, entity, 52)]
                pieces += [', "status": "', status(kind.name, place), '", "version": ', version, ', "attempts": ', version]
                pieces += [', "currency": ', currency, "}"]
        return joined(*pieces)


_BOOLEANS = pl.Series(("true", "false"))


def _nested(key: str, documents: Sequence[Any]) -> pl.Series:
    """Nothing, and one field for each document."""
    return pl.concat([pl.Series([""]), f', "{key}": ' + json_series(documents)])


def _address(choose: random.Random) -> dict[str, Any]:
    places = [
        {
            "zip": f"{choose.randint(1000, 99999)}",
            "city": choose.choice(CITIES),
            "kind": kind,
            "phone": None,
            "street": f"{choose.choice(WORDS).title()} {choose.randint(1, 250)}",
            "country": choose.choice(("CH", "DE", "JP", "BR")),
        }
        for kind in ("billing", "shipping", "office", "home", "other")
    ]
    return {"known": places, "verified": choose.random() < 0.5}


def _items(choose: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "sku": f"{choose.choice('ABCDEF')}{choose.randint(1000, 9999)}",
            "name": choose.choice(WORDS),
            "price": round(choose.uniform(1, 400), 2),
            "options": {"gift": True, "colour": choose.choice(WORDS)} if choose.random() < 0.1 else {},
            "quantity": choose.randint(1, 5),
        }
        for _ in range(choose.randint(6, 22))
    ]


def _attributes(choose: random.Random, words: int) -> dict[str, Any]:
    return {
        "tags": choose.sample(WORDS, k=choose.randint(0, 6)),
        "manual": " ".join(choose.choices(WORDS, k=words)),
        "weight_g": choose.randint(5, 30000),
        "dimensions": [choose.randint(1, 300) for _ in range(3)],
    }
