"""Which windows need a run: decided anew at every look, from the lake and the change log.

What lives here: the decision of the sensor and what one look tells the next. What must not: Dagster (``sensors.py``), a clock.

Invariants
 1. The cause is looked at, not what was done about it: a window needs a run as long as it is missing or has late events.
 2. A window whose runs do not help is asked for ever more rarely: after 1, 2, 4, 8 … minutes while its cause stays the same. So a
    permanent failure costs a dozen runs in two days, and an outage of less than that heals by itself. A clock that is set back
    makes no wait longer.
 3. It is asked for with ever fewer neighbours, in the end alone: a run ends at the window that fails, and one that fails for good
    must not keep those behind it from being published.
 4. A look reads keys of the change log only above what was settled when the look before was taken, except for windows that are recent
    or known to be late.
 5. Every published window is looked after, whatever its size and age. Who asks decides which of them it can ask for.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.errors import WindowError
from fraiseql_pipeline.lake import Commit, Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, as_utc, tile

#: How far back a window that was never published counts as missing; older ones are a backfill's business. Late events have no limit.
LOOK_BACK = timedelta(days=2)
#: How long after its end a window is left to the schedule before it counts as missing.
GRACE = timedelta(minutes=10)

_FIRST_WAIT = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for one window: why, how often, and until when it is left alone."""

    cause: str
    times: int
    until: datetime


@dataclass(frozen=True, slots=True)
class Looked:
    """How far late events were looked for: every event of the log ``identity`` up to ``pk`` was settled, hence visible, then. It holds for
    the windows of ``table_version``: one that was published since may be settled to less.
    """

    pk: int = 0
    table_version: int = -1
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a look tells the next one. Losing it costs one wider look and restarts the waits.

    ``looked``: how far it went. ``asked``: by window.
    """

    looked: Looked = field(default_factory=Looked)
    asked: Mapping[Window, Asked] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> "Memory":
        """What ``dump`` made; nothing is remembered of another text, which somebody may have set by hand."""
        try:
            kept: dict[str, Any] = json.loads(text) if text else {}
            asked = {
                Window.parse(key): Asked(str(cause), max(int(times), 0), as_utc(datetime.fromisoformat(at)))
                for key, (cause, times, at) in kept.get("asked", {}).items()
            }
            pk, table_version, identity = kept.get("looked", (0, -1, ""))
            return cls(Looked(int(pk), int(table_version), str(identity)), asked)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, WindowError):
            return cls()

    def dump(self) -> str:
        asked = {window.key: (one.cause, one.times, one.until.isoformat()) for window, one in self.asked.items()}
        return json.dumps({"looked": (self.looked.pk, self.looked.table_version, self.looked.identity), "asked": asked})


@dataclass(frozen=True, slots=True)
class Needs:
    """Why windows need a run, and how far late events have now been looked for."""

    causes: Mapping[Window, str]
    looked: Looked


def look(settings: Settings, changelog: ChangeLog, lake: Lake, memory: Memory, now: datetime) -> Needs:
    """Every window that needs a run: a recent one that was never published, any published one with events above its settled pk.

    An hour of a day that is published as one window is not missing: it can be published no more, and its events are in the day.
    A cause names the settled pk it was found at, so that it is a new cause once a run has helped.
    """
    published = lake.published()
    settled = {window: commit.settled_pk for window, commit in published.items()}
    first = max(settings.start, now - LOOK_BACK)
    recent = [window for window in tile(first, now, settings.window) if window.end + GRACE <= now]
    causes = {window: "missing" for window in recent if not {window, Window.holding(window.start, WindowSize.DAY)} & settled.keys()}
    looked = _looked(published)
    before = memory.looked
    known = before if before.identity == looked.identity and before.table_version <= looked.table_version else Looked()
    near = {
        window: commit.settled_pk
        for window, commit in published.items()
        if window.end > first or window in memory.asked or commit.table_version > known.table_version
    }
    far = {window: pk for window, pk in settled.items() if window not in near}
    late = (*(changelog.late(near) if near else ()), *(changelog.late(far, after_pk=known.pk) if far else ()))
    # The database's clock says when a window has ended and may be published, this one when it may be asked for.
    causes |= {found.window: f"late, settled to {settled[found.window]}" for found in late if found.window.end <= now}
    return Needs(causes, looked)


def _looked(published: Mapping[Window, Commit]) -> Looked:
    if not published:
        return Looked()
    newest = max(published.values(), key=lambda commit: commit.table_version)
    pks = (commit.settled_pk for commit in published.values() if commit.identity == newest.identity)
    return Looked(max(pks), newest.table_version, newest.identity)


def due(needs: Needs, memory: Memory, in_flight: Collection[Window], now: datetime) -> list[Window]:
    """The windows to ask for now, oldest first: in need, in no run, and not asked for in vain a moment ago."""

    def waits(window: Window) -> bool:
        asked = memory.asked.get(window)
        if asked is None or asked.cause != needs.causes[window]:
            return False
        # Further ahead than it was ever set: the clock was, when it was asked for.
        return now < asked.until <= now + _wait(asked.times)

    return sorted(window for window in needs.causes if window not in in_flight and not waits(window))


def remember(needs: Needs, memory: Memory, asked: Collection[Window], now: datetime) -> Memory:
    """The memory after runs for ``asked`` were requested, or a warning was given where there can be no run; windows that are in need no
    longer are forgotten.
    """
    kept = {window: one for window, one in memory.asked.items() if needs.causes.get(window) == one.cause}
    for window in asked:
        times = kept[window].times + 1 if window in kept else 1
        kept[window] = Asked(needs.causes[window], times, now + _wait(times))
    unasked = {window: Asked(cause, 0, now) for window, cause in needs.causes.items() if window not in kept}
    return Memory(needs.looked, kept | unasked)


def _wait(times: int) -> timedelta:
    """How long a window is left alone that was asked for so often."""
    return _FIRST_WAIT * 2 ** min(max(times - 1, 0), 20)


def spans(needs: Needs, memory: Memory, windows: Sequence[Window], longest: int) -> Iterator[list[Window]]:
    """Runs of neighbouring windows, at most ``longest`` each, a quarter of that for every time one was asked for in vain; ``windows`` are
    in order.
    """
    span, room = list[Window](), longest
    for window in windows:
        most = max(1, longest >> 2 * _times(needs, memory, window))
        if span and (span[-1].end != window.start or len(span) >= min(room, most)):
            yield span
            span, room = [], longest
        span.append(window)
        room = min(room, most)
    if span:
        yield span


def _times(needs: Needs, memory: Memory, window: Window) -> int:
    """How often a window was asked for because of its present cause."""
    asked = memory.asked.get(window)
    return asked.times if asked is not None and asked.cause == needs.causes[window] else 0
