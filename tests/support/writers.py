"""Random writers: everything producers do to a change log, at once, for as long as a test wants.

Used by the tests of settling and by the end-to-end test of the whole path. ``Writers`` runs sessions on threads until it is stopped; what
they committed is known to it by event id, and ``events_of`` asks the table itself, so that a test can tell a lost event from a broken
harness. Each row carries the way it was written in ``object_type``.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import psycopg

_INSERT = "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id, object_id, object_data) VALUES (%s, 'INSERT', %s, gen_random_uuid(), %s)"
_BACKDATED = (
    "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id, object_id, created_at)"
    " VALUES (%s, 'UPDATE', %s, gen_random_uuid(), clock_timestamp() - %s * interval '1 second')"
)
_Connection = psycopg.Connection[Any]


def events_of(url: str) -> Counter[tuple[int, str]]:
    """The multiset of (pk, event id) that the log holds now."""
    with psycopg.connect(url, autocommit=True) as connection:
        return Counter(connection.execute("SELECT pk_entity_change_log, id::text FROM core.tb_entity_change_log").fetchall())


class Writers:
    """Sessions that write at random until the block ends, or ``transactions`` have been made.

    ``ways`` limits them to some of ``WAYS``. An error of a session is raised when the block ends.
    """

    def __init__(
        self, url: str, *, sessions: int = 12, seed: int = 1, transactions: int | None = None, ways: Sequence[str] | None = None
    ) -> None:
        self.committed: Counter[str] = Counter()  # event ids
        self.done: Counter[str] = Counter()  # transactions per way
        self._url = url
        self._ways = tuple(ways or WAYS)
        self._left = transactions
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._write, args=(random.Random(seed * 1000 + n),), daemon=True) for n in range(sessions)
        ]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if error is None and self._errors:
            raise self._errors[0]

    def run_for(self, seconds: float) -> None:
        """Let them write that long, or until their transactions are made."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(thread.is_alive() for thread in self._threads) and not self._errors:
            time.sleep(0.02)

    def stop(self) -> None:
        """No new transactions; returns when those under way have ended."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self, choose: random.Random) -> None:
        try:
            with psycopg.connect(self._url, autocommit=True, application_name="writer") as connection:
                while not self._stop.is_set() and self._take():
                    way = choose.choice(self._ways)
                    ids = WAYS[way](connection, choose, way)
                    with self._lock:
                        self.committed.update(ids)
                        self.done[way] += 1
                    _pause(choose, 0.01)
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _take(self) -> bool:
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0


def _pause(choose: random.Random, at_most: float) -> None:
    time.sleep(choose.random() * at_most)


def _ids(choose: random.Random, at_most: int = 4) -> list[str]:
    return [str(uuid.UUID(int=choose.getrandbits(128), version=4)) for _ in range(choose.randint(1, at_most))]


def _insert(connection: _Connection, way: str, ids: Sequence[str]) -> None:
    for one in ids:
        connection.execute(_INSERT, [way, one, "{}"])


def _plain(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    ids = _ids(choose)
    with connection.transaction():
        _pause(choose, 0.05)
        _insert(connection, way, ids)
        _pause(choose, 0.2)
    return ids


def _at_once(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    ids = _ids(choose, 1)
    _insert(connection, way, ids)
    return ids


def _savepoints(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    kept: list[str] = []
    with connection.transaction():
        for _ in range(3):
            ids, keep = _ids(choose), choose.random() < 0.6
            connection.execute("SAVEPOINT here")
            _insert(connection, way, ids)
            if keep:
                kept += ids
            else:
                connection.execute("ROLLBACK TO SAVEPOINT here")
            _pause(choose, 0.05)
    return kept


def _exception_block(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    lost, kept = _ids(choose, 1)[0], _ids(choose, 1)[0]
    insert = "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id) VALUES ('{}', 'INSERT', '{}');"
    connection.execute(
        f"DO $$ BEGIN BEGIN {insert.format(way, lost)} RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN NULL; END;"
        f" PERFORM pg_sleep({choose.random() * 0.1}); {insert.format(way, kept)} END $$"
    )
    return [kept]


def _abort(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    with connection.transaction(force_rollback=True):
        _insert(connection, way, _ids(choose))
        _pause(choose, 0.2)
    return []


def _copy(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    ids = _ids(choose, 10)
    with (
        connection.cursor() as cursor,
        cursor.copy("COPY core.tb_entity_change_log (object_type, modification_type, id) FROM STDIN") as copy,
    ):
        for one in ids:
            copy.write_row((way, "INSERT", one))
            _pause(choose, 0.05)
    return ids


def _prepared(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    ids, name, commit = _ids(choose), f"writer-{choose.getrandbits(64):x}", choose.random() < 0.7
    connection.execute("BEGIN")
    _insert(connection, way, ids)
    _pause(choose, 0.05)
    connection.execute(f"PREPARE TRANSACTION '{name}'")
    _pause(choose, 0.3)
    connection.execute(f"{'COMMIT' if commit else 'ROLLBACK'} PREPARED '{name}'")
    return ids if commit else []


def _late_start(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    """A transaction that is old before it writes: it has no id of its own until then, and its now() is its start."""
    ids = _ids(choose)
    with connection.transaction():
        connection.execute("SELECT now()")
        _pause(choose, 1.5)
        _insert(connection, way, ids)
    return ids


def _one_message(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    """Two transactions in one simple-query message: the second one's now() is older than its start."""
    first, second = _ids(choose, 1)[0], _ids(choose, 1)[0]
    insert = "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id) VALUES ('{}', 'INSERT', '{}')"
    wait = f"SELECT pg_sleep({choose.random() * 0.5})"
    connection.execute(f"BEGIN; {insert.format(way, first)}; {wait}; COMMIT; BEGIN; {insert.format(way, second)}; COMMIT")
    return [first, second]


def _backdated(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    ids = _ids(choose)
    with connection.transaction():
        for one in ids:
            connection.execute(_BACKDATED, [way, one, choose.random() * 4])
    return ids


def _idle(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    with connection.transaction():
        connection.execute("SELECT count(*) FROM core.tb_entity_change_log")
        _pause(choose, 1.5)
    return []


def _mark_published(connection: _Connection, choose: random.Random, way: str) -> list[str]:
    """What FraiseQL's NATS bridge does to rows that are long committed."""
    connection.execute(
        "UPDATE core.tb_entity_change_log SET nats_published_at = now(), nats_event_id = gen_random_uuid()"
        " WHERE pk_entity_change_log IN (SELECT pk_entity_change_log FROM core.tb_entity_change_log"
        " WHERE nats_published_at IS NULL ORDER BY pk_entity_change_log LIMIT 5 FOR UPDATE SKIP LOCKED)"
    )
    return []


#: How a writer may write → does it once and returns the ids that are committed.
WAYS: dict[str, Callable[[_Connection, random.Random, str], list[str]]] = {
    "plain": _plain,
    "at_once": _at_once,
    "savepoints": _savepoints,
    "exception_block": _exception_block,
    "abort": _abort,
    "copy": _copy,
    "prepared": _prepared,
    "late_start": _late_start,
    "one_message": _one_message,
    "backdated": _backdated,
    "idle": _idle,
    "mark_published": _mark_published,
}
