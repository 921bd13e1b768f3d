"""Lives of sample entities: which of them there are, what happens to each, and when.

What lives here: random numbers by row, the kinds of entities, the order of their events. What must not: what an event says
(``sample.py``), a random source that differs between versions of a library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from itertools import accumulate
from operator import mul

import numpy as np
import polars as pl
import pyarrow as pa

from fraiseql_pipeline.window import from_micros, to_micros


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of entity: where it stands in a block of twenty, how far behind its order, how often it changes, how long it lives."""

    name: str
    first: int
    count: int
    behind: int
    mean_updates: float
    deleted_share: float
    life: float
    changed: tuple[str, ...]


BLOCK = 20
KINDS = (
    Kind("User", 0, 2, 0, 2.0, 0.05, 0.6, ("email", "preferences")),
    Kind("Product", 2, 1, 0, 6.0, 0.08, 0.8, ("price", "stock")),
    Kind("Order", 3, 8, 0, 3.5, 0.03, 0.2, ("status", "version")),
    Kind("Invoice", 11, 5, 8, 1.5, 0.02, 0.15, ("status",)),
    Kind("Payment", 16, 4, 13, 1.2, 0.01, 0.05, ("status", "attempts")),
)


def customer(entity: pl.Series, draws: Draws) -> pl.Series:
    """The customers of orders: users of the same block of entities or of one before it."""
    return (draws.share(entity, 47) * (entity // BLOCK + 1)).cast(pl.UInt32) * BLOCK + entity % 2


class Draws:
    """Random numbers that are functions of a row's number: splitmix64, so the same in every version of every library."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def bits(self, key: pl.Series, salt: int) -> pl.Series:
        """64 random bits per key; another ``salt`` gives others."""
        mixed = key.cast(pl.UInt64) * _WORD[0] + _mixed(_mixed(self._seed % 2**64) ^ salt)
        mixed = (mixed ^ (mixed // 2**30)) * _WORD[1]
        mixed = (mixed ^ (mixed // 2**27)) * _WORD[2]
        return mixed ^ (mixed // 2**31)

    def share(self, key: pl.Series, salt: int) -> pl.Series:
        """Uniform in [0, 1)."""
        return (self.bits(key, salt) // 2**11).cast(pl.Float64) * 2.0**-53

    def below(self, key: pl.Series, salt: int, limit: int) -> pl.Series:
        """Uniform in 0 … limit − 1."""
        return self.bits(key, salt) % limit

    def exponential(self, key: pl.Series, salt: int) -> pl.Series:
        """Exponential with mean 1."""
        return -(1 - self.share(key, salt)).log()

    def uuid(self, key: pl.Series, salt: int) -> pl.Series:
        """UUIDs, version 4, as their 16 bytes."""
        words = np.empty((len(key), 2), "<u8")
        words[:, 0] = ((self.bits(key, salt) & (~(0xF << 52) % 2**64)) | (4 << 52)).to_numpy()
        words[:, 1] = ((self.bits(key, salt + 1) & (~0xC0 % 2**64)) | 0x80).to_numpy()
        return pl.Series(
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(key), [None, pa.py_buffer(words)]).cast(pa.binary())
        )

    def uuid_text(self, key: pl.Series, salt: int) -> pl.Series:
        """As ``uuid``, as text."""
        digits = self.uuid(key, salt).bin.encode("hex")
        cuts = ((0, 8), (8, 4), (12, 4), (16, 4), (20, 12))
        return pl.select(pl.concat_str([pl.lit(digits.str.slice(*cut)) for cut in cuts], separator="-")).to_series()

    def hex(self, key: pl.Series, salt: int) -> pl.Series:
        """32 hex digits."""
        words = np.column_stack([self.bits(key, salt).to_numpy(), self.bits(key, salt + 1).to_numpy()])
        data = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(key), [None, pa.py_buffer(words)])
        return pl.Series(data.cast(pa.binary())).bin.encode("hex")


#: The multipliers of splitmix64.
_WORD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _mixed(number: int) -> int:
    number = (number + _WORD[0]) % 2**64
    number = (number ^ (number >> 30)) * _WORD[1] % 2**64
    number = (number ^ (number >> 27)) * _WORD[2] % 2**64
    return number ^ (number >> 31)


def joined(*pieces: str | pl.Series) -> pl.Series:
    return pl.select(pl.concat_str(*(pl.lit(piece) for piece in pieces))).to_series()


def skeleton(events: int, days: int, end: datetime, draws: Draws, haste: int) -> pl.DataFrame:
    """entity, place in its life, length of it, time in µs since 1970: sorted by time.

    ``haste``: 1 spreads the changes of an entity over its life; with 7 two thirds of them happen in the first twentieth of it.
    """
    entities = events // 3 + BLOCK
    while len(happened := _happened(entities, draws, haste)) < events:
        entities += entities // 3
    happened = happened.head(events)
    at = _Clock(days, end).at(happened["moment"]).alias("at")
    return happened.with_columns(at).sort("at", "entity", "place").select("entity", "place", "length", "at")


def _happened(entities: int, draws: Draws, haste: int) -> pl.DataFrame:
    """The events of so many entities, as far as they happen within the sample; what comes later in a life is cut off."""
    events = _lives(entities, draws).with_columns(place=pl.int_ranges(0, "length", dtype=pl.UInt16)).explode("place")
    jitter = draws.share(events["entity"].cast(pl.UInt64) * 64 + events["place"], 11)
    even = (pl.col("place") - 1 + jitter) / (pl.col("length") - 1).clip(1)
    spread = reduce(mul, [even] * haste)  # not ``**``: how a power is rounded depends on the machine
    moment = pl.when(pl.col("place") == 0).then("birth").otherwise(pl.col("birth") + pl.col("life") * spread)
    return events.with_columns(moment=moment).filter(pl.col("moment") < 1)


def _lives(entities: int, draws: Draws) -> pl.DataFrame:
    """entity, birth and life as shares of the sample, and how many events it would have."""
    entity = pl.Series("entity", range(entities), dtype=pl.UInt32)
    kind = pl.Series([at for at, kind in enumerate(KINDS) for _ in range(kind.count)]).gather(entity % BLOCK)

    def of_kind(values: Sequence[float]) -> pl.Series:
        return pl.Series(values, dtype=pl.Float64).gather(kind)

    # An invoice and a payment are born a little after the order of their block that they belong to.
    behind = pl.Series([kind.behind for kind in KINDS], dtype=pl.UInt32).gather(kind)
    delay = draws.share(entity, 3) * 0.01 * (behind > 0).cast(pl.Float64)
    updates = (draws.exponential(entity, 1) * of_kind([k.mean_updates for k in KINDS])).floor().clip(0, 40)
    gone = draws.share(entity, 2) < of_kind([k.deleted_share for k in KINDS])
    return pl.DataFrame(
        [
            entity,
            (draws.share(entity - behind, 4) + delay).alias("birth"),
            (draws.exponential(entity, 5) * of_kind([k.life for k in KINDS])).alias("life"),
            (updates + gone.cast(pl.Float64) + 1).cast(pl.UInt16).alias("length"),
        ]
    )


class _Clock:
    """Turns a share of all events into the time by which that share has happened: nights are quiet, afternoons busy."""

    _STEP = 5 * 60 * 1_000_000

    def __init__(self, days: int, end: datetime) -> None:
        steps = days * 288
        end_us = to_micros(end)
        self._start, self._end = end_us - steps * self._STEP, end_us
        weights = [self._weight(self._start + step * self._STEP) for step in range(steps)]
        total = math.fsum(weights)
        self._reached = pl.Series([0.0, *(min(1.0, w / total) for w in accumulate(weights))])
        self._weights = pl.Series([w / total for w in weights])

    @staticmethod
    def _weight(at_us: int) -> float:
        at = from_micros(at_us)
        busy = 0.12 + math.sin(math.pi * ((at.hour + at.minute / 60 - 3) % 24) / 24) ** 4
        return busy * (0.6 if at.weekday() >= 5 else 1.0)

    def at(self, shares: pl.Series) -> pl.Series:
        step = (self._reached.search_sorted(shares, side="right").cast(pl.Int64) - 1).clip(0, len(self._weights) - 1)
        within = (shares - self._reached.gather(step)) / self._weights.gather(step)
        at = self._start + step * self._STEP + (within.clip(0, 1) * self._STEP).cast(pl.Int64)
        return at.clip(self._start, self._end - 1)
