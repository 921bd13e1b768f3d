"""Settle and seal: which events can still appear, proved by locks.

What lives here: the two barriers and ``Settlement``, what they proved. What must not: a guess, a wait for a fixed time, a read of events.

**Settle** (always). Read P, the newest key drawn; then list who holds the lock that drawing a key takes; wait until each of them has
ended. From then on every key up to P belongs to a transaction that committed, and is visible, or never will be. No clock, no
transaction id and no privilege is involved, and neither readers nor idle sessions are waited for.

**Seal** (a label on top, needs to see other users' sessions). ``created_at`` defaults to the start of the transaction, so an open
transaction can write into the past as far as its start. A window is sealed when it ends before the start of every transaction still
open when its rows were settled; ``clock_margin_seconds`` covers what happens between the arrival of a message and its report. Sealing
comes first and settling after it, because what a transaction of the first barrier wrote must be settled by the second.

Invariants
 1. P is read before the holders are, so a key that is drawn later is larger than P.
 2. A holder that turns into a prepared transaction is still waited for; one that is prepared later by somebody else is not.
 3. What cannot be seen is unknown, and unknown never seals.
 4. Every statement is a transaction of its own: we never stand idle in a transaction, and pg_stat_activity is fresh each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row

from fraiseql_pipeline.changelog.connection import TABLE, sql, translated
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.errors import SettleTimeout, SourceRefused
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, as_utc

#: The first pause between two looks at the locks, and the longest. Most writers end within the first few.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.1

#: Who follows the log is to have an event within 250 ms of its commit; a look costs the server 0.2 ms.
_FOLLOWERS_PAUSE_SECONDS = 0.02

#: Blockers that a message names; the error carries all of them.
_SHOWN = 5

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is proved about the change log.

    ``settled_pk``: every key up to it is committed and visible, or never will be. ``sealed_until``: a window that ends by then gets no
    more events except from producers that set ``created_at`` themselves; year 1 where nothing is sealed. ``settled_at``: the database's
    clock. ``identity``: of the ``Contract``. ``blockers``: one sentence per session that kept the seal from reaching further.
    """

    settled_pk: int
    sealed_until: datetime
    settled_at: datetime
    identity: str
    blockers: tuple[str, ...] = ()

    def state_of(self, window: Window) -> Literal["sealed", "provisional"]:
        return "sealed" if window.end <= self.sealed_until else "provisional"


def settle(
    connection: psycopg.Connection[Any], contract: Contract, settings: Settings, windows_end: datetime | None = None
) -> Settlement:
    """Seal as far as ``seal_timeout_seconds`` allow, then settle.

    ``windows_end``: end of the newest window that is to be published; transactions that began after it are not waited for. ``None``:
    seal up to now. Raises ``SettleTimeout`` with the blockers after ``settle_timeout_seconds``, and ``SourceUnavailable``.
    """
    with translated():
        sealed_until, blockers = _seal(connection, contract, settings, windows_end)
        settled_pk, settled_at = _settle(connection, contract, settings.settle_timeout_seconds)
    return Settlement(settled_pk, sealed_until, settled_at, contract.identity, blockers)


def settle_keys(
    connection: psycopg.Connection[Any], contract: Contract, timeout_seconds: float, given_up: Callable[[], bool] = lambda: False
) -> tuple[int, datetime]:
    """Settle without a seal, for whoever follows the log: the settled pk, and the database's clock when it was drawn.

    Raises ``SettleTimeout`` after the timeout, or once ``given_up`` says that nobody waits any more, and ``SourceUnavailable``.
    """
    with translated():
        return _settle(connection, contract, timeout_seconds, _FOLLOWERS_PAUSE_SECONDS, given_up)


def drawn_key(connection: psycopg.Connection[Any], contract: Contract) -> int | None:
    """The last key that the sequence has given out; None where the role may not read it. Raises ``SourceUnavailable``."""
    if contract.readable_sequence is None:
        return None
    with translated():
        return _point(connection, contract)[0]


# ------------------------------------------------------------------------------------------------------------------ seal


def _seal(
    connection: psycopg.Connection[Any], contract: Contract, settings: Settings, windows_end: datetime | None
) -> tuple[datetime, tuple[str, ...]]:
    if not contract.can_seal:
        return _NEVER, ()
    margin = timedelta(seconds=settings.clock_margin_seconds)
    needed = None if windows_end is None else as_utc(windows_end) + margin
    begun = _clock(connection)
    first: set[str] | None = None
    for last_look in _looks(settings.seal_timeout_seconds):
        if needed is not None and begun < needed <= begun + timedelta(seconds=settings.seal_timeout_seconds) and not last_look:
            begun = _clock(connection)  # the window has ended so recently that its own margin has not passed yet
            continue
        wanted = begun if needed is None else min(begun, needed)
        sessions = _sessions(connection)
        if first is None:
            first = {session["vxid"] for session in sessions if session["vxid"]}
        starts = [(_earliest(session, first, begun), session) for session in sessions]
        blocking = [session for start, session in starts if start is None or start < wanted]
        if not blocking or last_look:
            until = min((start or _NEVER for start, _ in starts), default=begun)
            until = min(begun, until)
            return (until - margin if until - _NEVER > margin else _NEVER), tuple(_describe(blocking))
    raise AssertionError("the last look returns")


def _clock(connection: psycopg.Connection[Any]) -> datetime:
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at


def _sessions(connection: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql("seal_transactions")).fetchall()


def _earliest(session: Mapping[str, Any], first: set[str], begun: datetime) -> datetime | None:
    """The earliest time this session can still write with ``DEFAULT now()``; ``None`` where that cannot be seen.

    A transaction writes no earlier than its start. One that was not open at the first look began after ``begun``, unless it came in one
    message with a transaction before it: then its ``now()`` is when that message arrived.
    """
    if session["state"] == "disabled" or (session["vxid"] in first and session["xact_start"] is None):
        return None
    starts = [begun, session["xact_start"]]
    if session["state"] in {"active", "fastpath function call"}:
        starts.append(session["query_start"])
    return min(start for start in starts if start is not None)


# ---------------------------------------------------------------------------------------------------------------- settle


def _settle(
    connection: psycopg.Connection[Any],
    contract: Contract,
    timeout_seconds: float,
    longest_pause_seconds: float = _LONGEST_PAUSE_SECONDS,
    given_up: Callable[[], bool] = lambda: False,
) -> tuple[int, datetime]:
    settled_pk, at = _point(connection, contract)
    awaited: set[str] | None = None
    prepared: set[str] | None = None
    for last_look in _looks(timeout_seconds, longest_pause_seconds, given_up):
        holders = connection.execute(sql("settle_holders"), {"sequence": contract.sequence}).fetchall()
        running = {holder: pid for holder, pid in holders if pid is not None}
        if awaited is None:
            awaited = set(running)
        still = awaited & running.keys()
        if not still and prepared is None:
            # The last of them has just ended, or became prepared: whatever is prepared now may be one of them, whatever comes later is not.
            prepared = {holder for holder, pid in holders if pid is None}
        owed = prepared & {holder for holder, pid in holders if pid is None} if prepared is not None else None
        if owed is not None and not owed:
            return settled_pk, at
        if last_look:
            pids = [running[holder] for holder in still]
            blockers = (*_describe(_named(connection, pids)), *_prepared(connection, holders))
            more = f"; and {len(blockers) - _SHOWN} more" if len(blockers) > _SHOWN else ""
            raise SettleTimeout(
                f"{TABLE} is still held by open transactions after {timeout_seconds:g} s, so nothing was published: "
                f"{'; '.join(blockers[:_SHOWN])}{more}. Commit or end them, or raise FRAISEQL_SETTLE_TIMEOUT_SECONDS; then run again.",
                blockers,
            )
    raise AssertionError("the last look returns")


def _point(connection: psycopg.Connection[Any], contract: Contract) -> tuple[int, datetime]:
    if contract.readable_sequence is None:
        row = connection.execute(sql("settle_point")).fetchone()
    else:
        row = connection.execute(sql("settle_point_of_sequence").format(sequence=contract.readable_sequence)).fetchone()
    assert row is not None
    newest, at, drawn = row
    if drawn is None:
        return newest, at
    if newest > drawn:
        raise SourceRefused(
            f"{TABLE} holds pk {newest} although its sequence has only reached {drawn}: rows were written with keys of their own and cannot be "
            f"settled; SELECT setval('{contract.readable_sequence}', {newest}), then run again."
        )
    return drawn, at


# -------------------------------------------------------------------------------------------------------------- blockers


def _named(connection: psycopg.Connection[Any], pids: Sequence[int]) -> list[dict[str, Any]]:
    if not pids:
        return []
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql("blocker_sessions"), {"pids": list(pids)}).fetchall()


def _prepared(connection: psycopg.Connection[Any], holders: Iterable[tuple[str, int | None]]) -> list[str]:
    if all(pid is not None for _, pid in holders):
        return []
    rows = connection.execute(sql("blocker_prepared")).fetchall()
    return [f"prepared transaction {gid!r} of user {owner}, prepared {_shown(at)}" for gid, owner, at in rows] or [
        "a prepared transaction"
    ]


def _describe(sessions: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for session in sessions:
        if session["state"] is None:
            yield f"pid {session['pid']} (of another user; GRANT pg_read_all_stats to see it)"
            continue
        begun = f"in a transaction since {_shown(session['xact_start'])}" if session["xact_start"] else "not in a transaction"
        asked = f", its statement began {_shown(session['query_start'])}" if session["query_start"] else ""
        application = f", application {session['application_name']!r}" if session["application_name"] else ""
        yield f"pid {session['pid']} (user {session['usename']}{application}): {session['state']}, {begun}{asked}"


def _shown(at: datetime) -> str:
    return as_utc(at).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")


def _looks(
    timeout_seconds: float, longest_pause_seconds: float = _LONGEST_PAUSE_SECONDS, given_up: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Paces looks at a condition, the first at once, rarer as time goes by; true for the last one, when the time is up."""
    deadline = time.monotonic() + timeout_seconds
    pause = _PAUSE_SECONDS
    while (left := deadline - time.monotonic()) > 0 and not given_up():
        yield False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, longest_pause_seconds)
    yield True
