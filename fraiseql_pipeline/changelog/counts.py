"""Late events, audits and rows without a window: what the source says about its windows, in numbers.

What lives here: counts and fingerprints. What must not: the events themselves (``read.py``), a decision what to do about them
(``pipeline.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

import psycopg

from fraiseql_pipeline.changelog.connection import TABLE, sql, translated
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.errors import SourceRefused
from fraiseql_pipeline.window import Window, as_utc


@dataclass(frozen=True, slots=True, order=True)
class Late:
    """A published window and how many events have appeared in it since."""

    window: Window
    late_rows: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What a side holds of one window: ``rows``, the sum of their keys, and ``fingerprint`` over (pk, event_id), in no order.

    Two sides that hold the same events have equal audits; the source's comes from ``ChangeLog.audit``, any other from ``Audit.of``.
    """

    rows: int
    pk_sum: int
    fingerprint: int

    @classmethod
    def of(cls, events: Iterable[tuple[int, str | None]]) -> Audit:
        """The audit of (pk, event_id) pairs, as ``sql/audit.sql`` computes it; ``event_id`` in Postgres' text form."""
        rows = pk_sum = fingerprint = 0
        for pk, event_id in events:
            rows += 1
            pk_sum += pk
            fingerprint ^= int.from_bytes(
                hashlib.md5(f"{pk}:{event_id or ''}".encode(), usedforsecurity=False).digest()[:8], signed=True
            )
        return cls(rows, pk_sum, fingerprint)


def late(connection: psycopg.Connection[Any], contract: Contract, published: Mapping[Window, int], after_pk: int = 0) -> list[Late]:
    """The windows of ``published`` (window → settled pk of its commit) that have events above their settled pk, oldest first.

    Reads the keys above the lowest settled pk, so pass no more windows than may still get events. ``after_pk``: a settled pk up to which
    an earlier call has looked; only what is above it is counted.
    """
    found = []
    for size, group in groupby(sorted(published, key=lambda window: (window.size, window.start)), key=lambda window: window.size):
        windows = list(group)
        settled = [max(published[window], after_pk) for window in windows]
        parameters = {
            "above": min(settled),
            "start": windows[0].start,
            "end": windows[-1].end,
            "size": str(size),
            "starts": [window.start for window in windows],
            "pks": settled,
        }
        with translated():
            rows = connection.execute(sql("late").format(at=contract.expression("created_at")), parameters).fetchall()
        found += [Late(windows[ordinal - 1], count) for ordinal, count in rows]
    return sorted(found)


def audit(connection: psycopg.Connection[Any], window: Window, settled_pk: int) -> Audit:
    """What the source holds of a window up to a settled pk, quarantined rows included."""
    with translated():
        row = connection.execute(sql("audit"), {"start": window.start, "end": window.end, "settled_pk": settled_pk}).fetchone()
    assert row is not None
    return Audit(row[0], int(row[1]), row[2])


def hours_from(connection: psycopg.Connection[Any], contract: Contract, start: datetime, most: int) -> list[datetime]:
    """The hours that have events at ``start`` or later, oldest first, at most so many."""
    with translated():
        statement = sql("hours_from").format(at=contract.expression("created_at"))
        rows = connection.execute(statement, {"start": start, "most": most}).fetchall()
    return [as_utc(hour) for (hour,) in rows]


def unplaced(connection: psycopg.Connection[Any]) -> int:
    """How many rows have a ``created_at`` that is null, infinite or outside the years 1 to 9999: they belong to no window."""
    with translated():
        row = connection.execute(sql("unplaced")).fetchone()
    assert row is not None
    count: int = row[0]
    return count


def count(connection: psycopg.Connection[Any]) -> int:
    """How many rows the log holds."""
    with translated():
        row = connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()
    assert row is not None
    rows: int = row[0]
    return rows


def span(connection: psycopg.Connection[Any]) -> tuple[datetime, datetime]:
    """The first and the last ``created_at`` that a window can hold, UTC."""
    with translated():
        row = connection.execute(sql("span")).fetchone()
    first, last = row or (None, None)
    if first is None or last is None:
        raise SourceRefused(f"{TABLE} holds no event with a time; check that FraiseQL writes its change log into this database.")
    return as_utc(first), as_utc(last)
