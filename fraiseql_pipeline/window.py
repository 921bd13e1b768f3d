"""Windows: half-open UTC intervals [start, end) with a key, instants as numbers, and the time expressions people write.

What lives here: ``Window``, tiling a range into windows and what is missing of it, microseconds since 1970 (the unit of files, frames and
statements), and ``parse_time`` ("now-1h", ISO 8601). What must not: a clock. ``now`` is always an argument, so that one request resolves it
once and every test can choose it.

Invariants
 1. ``start < end``, both aware, both UTC; an event belongs to a window iff ``start <= timestamp < end``.
 2. Windows of one size tile time without gap or overlap; hours and days are UTC, so no day has 23 or 25 hours.
 3. ``Window.parse(w.key) == w``. Keys are Dagster's own partition keys: ``2026-11-01-13:00`` (hour), ``2026-11-01`` (day).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from fraiseql_pipeline.errors import WindowError


class WindowSize(StrEnum):
    """How long one window is: ``FRAISEQL_WINDOW``."""

    HOUR = "hour"
    DAY = "day"

    @property
    def duration(self) -> timedelta:
        return timedelta(hours=1) if self is WindowSize.HOUR else timedelta(days=1)

    @property
    def micros(self) -> int:
        """How long it is in microseconds."""
        return self.duration // _MICROSECOND

    @property
    def key_format(self) -> str:
        """strftime format of a window's key; the default formats of Dagster's hourly and daily partitions."""
        return "%Y-%m-%d-%H:%M" if self is WindowSize.HOUR else "%Y-%m-%d"


_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A half-open UTC interval of one hour or one day that starts on its own boundary."""

    start: datetime
    size: WindowSize

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.start.utcoffset() != timedelta(0):
            raise WindowError(f"A window must start at a UTC time, got {self.start.isoformat()}.")
        # Zones that happen to be at UTC at this instant (London in winter) would count the hours of a day by their own clock.
        object.__setattr__(self, "start", self.start.astimezone(UTC))
        if _floor(self.start, self.size) != self.start:
            raise WindowError(f"A window of one {self.size} must start on the {self.size}, got {self.start.isoformat()}.")
        if self.start > _LAST - self.size.duration:
            raise WindowError(
                f"A window must end in the years 1 to 9999, got one of one {self.size} from {self.start.isoformat()}."
            )

    @property
    def end(self) -> datetime:
        return self.start + self.size.duration

    @property
    def micros(self) -> tuple[int, int]:
        """[start, end) in microseconds since 1970."""
        start = to_micros(self.start)
        return start, start + self.size.micros

    @property
    def key(self) -> str:
        # Not strftime alone: it prints years before 1000 with fewer than four digits.
        return self.start.date().isoformat() + (f"-{self.start:%H:%M}" if self.size is WindowSize.HOUR else "")

    def __str__(self) -> str:
        return self.key

    def contains(self, at: datetime) -> bool:
        return self.start <= at < self.end

    @classmethod
    def parse(cls, key: str) -> Window:
        """The window named by a key; raises ``WindowError`` for anything that is not a key."""
        for size in WindowSize:
            try:
                window = cls(datetime.strptime(key, size.key_format).replace(tzinfo=UTC), size)
            except (ValueError, WindowError):
                continue
            if window.key == key:
                return window
        raise WindowError(f"A window key must look like 2026-11-01-13:00 (hour) or 2026-11-01 (day), got {key[:64]!r}.")

    @classmethod
    def holding(cls, at: datetime, size: WindowSize) -> Window:
        """The window that holds an instant."""
        return cls(_floor(as_utc(at), size), size)


def tile(start: datetime, end: datetime, size: WindowSize) -> Iterator[Window]:
    """The windows that touch [start, end), oldest first; none when the range is empty."""
    start, end = as_utc(start), as_utc(end)
    at = _floor(start, size)
    while at < end:
        window = Window(at, size)
        yield window
        at = window.end


Gap = tuple[datetime, datetime]
"""[start, end) that no published window covers. Gaps come in order, and do not overlap."""


def tile_gaps(gaps: Iterable[Gap], size: WindowSize) -> Iterator[Window]:
    """The windows that are missing, oldest first; one that two gaps touch once."""
    last = None
    for gap in gaps:
        for window in tile(*gap, size):
            if window != last:
                yield window
            last = window


def count_missing(gaps: Iterable[Gap], size: WindowSize) -> int:
    """How many windows ``tile_gaps`` gives, at the cost of none."""
    step, count, counted = size.micros, 0, 0
    for low, high in gaps:
        first, behind = to_micros(low) // step, -(-to_micros(high) // step)
        count += behind - (max(first, counted) if count else first)
        counted = behind
    return count


def as_utc(at: datetime) -> datetime:
    """The same instant in UTC; a naive datetime is taken as UTC."""
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
#: In microseconds since 1970, later than any time that a calendar has; its negative is earlier than any.
FOREVER = 1 << 62


def to_micros(at: datetime) -> int:
    """Microseconds since 1970 of an aware time."""
    return (at - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The instant of microseconds since 1970, in UTC."""
    return _EPOCH + micros * _MICROSECOND


_RELATIVE = re.compile(r"now(?:-(\d{1,9})([smhdw]))?", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:Z|z|[+-]\d{2}:?\d{2})?)?", re.ASCII)
_EXPECTED = "an ISO 8601 time such as 2026-01-31T23:59:59Z, or now, now-15m, now-1h, now-7d"


def parse_time(text: str, now: datetime) -> datetime:
    """An instant in UTC from ``now``, ``now-<n><s|m|h|d|w>`` or an ISO 8601 date or time (naive = UTC, sub-microsecond digits cut).

    Raises ``WindowError`` for anything else, including times outside the years 1 to 9999.
    """
    if relative := _RELATIVE.fullmatch(text):
        if relative[1] is None:
            return as_utc(now)
        try:
            return as_utc(now) - timedelta(**{_UNITS[relative[2]]: int(relative[1])})
        except OverflowError:
            raise WindowError(f"A time must lie in the years 1 to 9999, got {text!r}.") from None
    if not _ISO.fullmatch(text):
        raise WindowError(f"A time must be {_EXPECTED}; got {text[:64]!r}.")
    try:
        return as_utc(datetime.fromisoformat(text.upper().replace(",", ".")))
    except (ValueError, OverflowError):
        raise WindowError(f"A time must be {_EXPECTED}; got {text[:64]!r}.") from None


def _floor(at: datetime, size: WindowSize) -> datetime:
    at = at.replace(minute=0, second=0, microsecond=0)
    return at.replace(hour=0) if size is WindowSize.DAY else at
