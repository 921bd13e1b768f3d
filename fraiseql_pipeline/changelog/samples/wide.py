"""The shape ``wide``: payloads of two hundred bytes to ten kilobytes, most of them nested.

What lives here: what the five kinds of entities look like in a log of whole documents. What must not: their lives (``lives.py``), the
columns around a payload (``sample.py``).
"""

from __future__ import annotations

import random
from typing import Any

import polars as pl

from fraiseql_pipeline.changelog.samples.lives import BLOCK, Draws, Kind, customer, joined
from fraiseql_pipeline.changelog.samples.texts import CITIES, CURRENCIES, NAMES, NOTES, WORDS, json_series, money, one_of, status


class Wide:
    """Pools of JSON fragments: pieces are what varies least, numbers and ids are written per row."""

    #: The changes of an entity are spread over its life.
    haste = 1

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)

        def words(least: int, most: int) -> str:
            return " ".join(choose.choices(WORDS, k=choose.randint(least, most)))

        self._names = json_series(choose.choices(NAMES, k=256))
        self._notes = json_series([choose.choice(NOTES) if choose.random() < 0.35 else None for _ in range(512)])
        self._descriptions = json_series([words(2, 25) for _ in range(1024)])
        self._addresses = json_series([_address(choose) for _ in range(1024)])
        self._items = json_series([_items(choose, words(1, 4)) for _ in range(4096)])
        self._preferences = json_series([_preferences(choose) for _ in range(512)])
        self._attributes = json_series(
            [_attributes(choose, words(200, 1500) if at % 64 == 0 else words(1, 5)) for at in range(2048)]
        )
        self._currencies = pl.Series(CURRENCIES)

    def payload(self, kind: Kind, entity: pl.Series, place: pl.Series, draws: Draws) -> pl.Series:
        """JSON of the entities after so many changes."""
        version = (place + 1).cast(pl.String)
        moment = entity.cast(pl.UInt64) * 64 + place
        order = entity - kind.behind

        def chosen(pool: pl.Series, key: pl.Series, salt: int) -> pl.Series:
            return one_of(pool, draws, key, salt)

        pieces: list[str | pl.Series] = ['{"id": "', draws.uuid_text(entity, 30), '", "version": ', version]
        if kind.name == "User":
            pieces += [', "name": ', chosen(self._names, entity, 40)]
            pieces += [', "email": "user', entity.cast(pl.String), "+", version, '@example.com"']
            pieces += [', "preferences": ', chosen(self._preferences, moment, 41)]
            pieces += [', "address": ', chosen(self._addresses, entity, 42)]
        elif kind.name == "Product":
            pieces += [', "name": ', chosen(self._descriptions, entity, 43), ', "price": ', money(draws.below(moment, 44, 90_000))]
            pieces += [', "stock": ', draws.below(moment, 45, 500).cast(pl.String)]
            pieces += [', "attributes": ', chosen(self._attributes, entity, 46)]
        else:
            currency = chosen(self._currencies, entity // BLOCK, 53)
            pieces += [', "status": "', status(kind.name, place), '", "currency": "', currency, '", "total": ']
            pieces += [money(draws.below(order, 48, 300_000))]
        if kind.name == "Order":
            buyer = customer(entity, draws)
            pieces += [
                ', "number": "O-',
                entity.cast(pl.String).str.zfill(9),
                '", "customer": {"id": "',
                draws.uuid_text(buyer, 30),
            ]
            pieces += ['", "name": ', chosen(self._names, buyer, 40), '}, "items": ', chosen(self._items, entity, 49)]
            pieces += [', "shipping": ', chosen(self._addresses, entity, 50), ', "note": ', chosen(self._notes, entity, 51)]
        elif kind.name == "Invoice":
            pieces += [', "order": "', draws.uuid_text(order, 30), '", "lines": ', chosen(self._items, order, 49)]
            pieces += [', "billing": ', chosen(self._addresses, order, 50)]
        elif kind.name == "Payment":
            last_digits = (draws.below(entity, 52, 9000) + 1000).cast(pl.String)
            pieces += [', "order": "', draws.uuid_text(order, 30), '", "attempts": ', version]
            pieces += [', "method": {"kind": "card", "last4": "', last_digits, '"}']
        return joined(*pieces, "}")


def _address(choose: random.Random) -> dict[str, Any]:
    return {
        "street": f"{choose.choice(WORDS).title()} {choose.randint(1, 250)}",
        "city": choose.choice(CITIES),
        "postal_code": f"{choose.randint(1000, 99999)}",
        "geo": {"lat": round(choose.uniform(-60, 70), 5), "lon": round(choose.uniform(-180, 180), 5)}
        if choose.random() < 0.5
        else None,
    }


def _items(choose: random.Random, name: str) -> list[dict[str, Any]]:
    return [
        {
            "sku": f"{choose.choice('ABCDEF')}{choose.randint(1000, 9999)}",
            "name": name if at == 0 else choose.choice(WORDS),
            "quantity": choose.randint(1, 5),
            "price": f"{choose.uniform(1, 400):.2f}",
            "options": {"colour": choose.choice(WORDS), "gift": True} if choose.random() < 0.1 else {},
        }
        for at in range(min(25, 1 + int(choose.expovariate(0.8))))
    ]


def _preferences(choose: random.Random) -> dict[str, Any]:
    channels = [channel for channel in ("email", "sms", "push") if choose.random() < 0.5]
    return {
        "locale": choose.choice(("de-CH", "en", "fr", "ja", "ar")),
        "newsletter": choose.random() < 0.4,
        "channels": channels,
    }


def _attributes(choose: random.Random, text: str) -> dict[str, Any]:
    return {
        "weight_g": choose.randint(5, 30000),
        "dimensions": [choose.randint(1, 300) for _ in range(3)],
        "tags": choose.sample(WORDS, k=choose.randint(0, 6)),
        "manual": text,
    }
