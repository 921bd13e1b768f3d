"""Every committed event is read exactly once, whatever writers do while it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.changelog.connection import connect
from fraiseql_pipeline.settings import Settings
from tests.support.writers import WAYS, Writers, events_of

_SECOND = timedelta(seconds=1)
_ROWS = "SELECT pk_entity_change_log, id::text, object_type FROM core.tb_entity_change_log"


class _Reader:
    """The pipeline in miniature: windows of one second, each read once when it has ended, and late events after that."""

    def __init__(self, changelog: ChangeLog, connection: psycopg.Connection[Any], start: datetime) -> None:
        self.read: Counter[tuple[int, str]] = Counter()
        self.late_in_sealed: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self._changelog, self._connection = changelog, connection
        self._next = start
        self._settled: dict[datetime, int] = {}
        self._sealed: set[datetime] = set()

    def tick(self) -> None:
        (now,) = self._connection.execute("SELECT clock_timestamp()").fetchone() or ()
        settlement = self._changelog.settle(now)
        for start, before in self._settled.items():
            rows = self._rows(start, before, settlement.settled_pk)
            if start in self._sealed:
                self.late_in_sealed.update(way for _, _, way in rows)
            self._settled[start] = settlement.settled_pk
        while self._next + _SECOND <= settlement.settled_at:
            self._rows(self._next, 0, settlement.settled_pk)
            self._settled[self._next] = settlement.settled_pk
            sealed = self._next + _SECOND <= settlement.sealed_until
            self.states["sealed" if sealed else "provisional"] += 1
            if sealed:
                self._sealed.add(self._next)
            self._next += _SECOND

    def _rows(self, start: datetime, after_pk: int, upto_pk: int) -> list[tuple[int, str, str]]:
        where = " WHERE created_at >= %s AND created_at < %s AND pk_entity_change_log > %s AND pk_entity_change_log <= %s"
        rows = self._connection.execute(_ROWS + where, [start, start + _SECOND, after_pk, upto_pk]).fetchall()
        self.read.update((pk, event_id) for pk, event_id, _ in rows)
        return rows


@contextmanager
def _changelog(url: str, **settings: Any) -> Iterator[ChangeLog]:
    changelog = ChangeLog(url, Settings(database_url=url, **settings))
    try:
        yield changelog
    finally:
        changelog.close()


def test_every_committed_event_is_read_once_whatever_writers_do(changelog_url: str, run_seconds: float) -> None:
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=10)
    naive: set[tuple[int, str]] = set()
    with (
        _changelog(changelog_url, seal_timeout_seconds=0.5, clock_margin_seconds=0.25) as changelog,
        connect(changelog_url) as connection,
    ):
        reader = _Reader(changelog, connection, start)
        with Writers(changelog_url, sessions=14) as writers:
            until = datetime.now(UTC) + timedelta(seconds=run_seconds)
            while datetime.now(UTC) < until:
                reader.tick()
                # What "the rows above the last key" sees, the way most tools read a log.
                last = max((pk for pk, _ in naive), default=0)
                naive |= {(pk, one) for pk, one, _ in connection.execute(f"{_ROWS} WHERE pk_entity_change_log > %s", [last])}
                writers.run_for(0.05)
        (end,) = connection.execute("SELECT clock_timestamp() + interval '1 second'").fetchone() or ()
        while reader._next < end:
            reader.tick()
    committed = events_of(changelog_url)
    assert Counter(one for _, one in committed.elements()) == writers.committed
    assert set(writers.done) == set(WAYS)
    assert reader.read == committed
    assert reader.states["sealed"]
    assert set(reader.late_in_sealed) <= {"backdated"}  # producers that choose created_at are what a seal cannot promise
    assert set(committed) - naive, "the writers must be able to make a reader lose events, or this test proves nothing"
