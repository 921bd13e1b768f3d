"""What sample payloads are made of: names, words and states, and how fragments of JSON are chosen and put together.

What lives here: texts in the world's scripts, and the small functions both shapes need. What must not: what an entity looks like
(``typical.py``, ``wide.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import polars as pl

from fraiseql_pipeline.changelog.samples.lives import Draws, joined

NAMES = (
    "Zoë Müller", "Łukasz Żak", "Ana García", "Søren Ørsted", "José Álvarez", "李小龍", "王芳", "山田 太郎", "さくら", "김민준", "Нина Ковалёва",
    "Ελένη Παπαδοπούλου", "محمد علي", "דנה לוי", "प्रिया शर्मा", "ณัฐพล", "Nguyễn Thị Hoa", "O'Brien", "Anne-Marie D'Arcy", "Jean «Jeannot» Dupont",
    "Ada Lovelace", "Grace Hopper", "Bob", "X Æ A-12", "𝒜lice", "🦊 Fox", "Ìyábọ̀ Adé", "Þórdís Jónsdóttir", "İsmail Işık", "Ștefan Țăranu",
)  # fmt: skip
CITIES = (
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
WORDS = (
    "light", "Stuhl", "écran", "cable", "größe", "naïve", "blue", "鋼", "wool", "café", "wireless", "portable", "コーヒー", "сталь", "set", "pro",
    "mini", "XL", "2-in-1", "organic", "señor", "vintage", "½", "№5", "™",
)  # fmt: skip
NOTES = (
    "ring twice", "leave at the door", 'he said "tomorrow"', "back\\slash", "line one\nline two\ttabbed", "bitte nicht stürzen ⚠️", "送り状不要",
    "👩‍👩‍👧 family order 🎁", "separator\u2028inside", "quote ' and ; -- no SQL", "עטיפת מתנה", "", "éé combining", "<b>bold</b> & co", "NULL", "null",
)  # fmt: skip
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF")

#: What an entity goes through; the last state stays.
STATUS = {
    "Order": ("placed", "paid", "packed", "shipped", "delivered", "returned"),
    "Invoice": ("draft", "sent", "overdue", "paid"),
    "Payment": ("authorised", "captured", "settled", "refunded"),
}


def json_series(values: Sequence[Any]) -> pl.Series:
    """Their JSON."""
    return pl.Series([json.dumps(value, ensure_ascii=False) for value in values], dtype=pl.String)


def one_of(pool: pl.Series, draws: Draws, key: pl.Series, salt: int) -> pl.Series:
    """For each key one of the pool."""
    return pool.gather(draws.below(key, salt, len(pool)))


def status(kind: str, place: pl.Series) -> pl.Series:
    """The state after so many changes."""
    names = STATUS[kind]
    return pl.Series(names).gather(place.clip(0, len(names) - 1))


def money(cents: pl.Series) -> pl.Series:
    """As a JSON number with two digits."""
    return joined((cents // 100).cast(pl.String), ".", (cents % 100).cast(pl.String).str.zfill(2))
