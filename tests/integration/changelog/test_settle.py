"""What the settle and the seal barrier wait for, and what they do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from fraiseql_pipeline.changelog import ChangeLog, embedded, settle
from fraiseql_pipeline.changelog.settle import _earliest
from fraiseql_pipeline.errors import SettleTimeout, SourceRefused, SourceUnavailable
from fraiseql_pipeline.settings import Settings

_INSERT = "INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id) VALUES ('Order', 'INSERT', gen_random_uuid())"
_Session = psycopg.Connection[Any]


@pytest.fixture
def session(changelog_url: str) -> Iterator[Callable[..., _Session]]:
    """Opens sessions of other users of the database; they end with the test."""
    opened: list[_Session] = []

    def open_session(user: str | None = None, **settings: Any) -> _Session:
        url = embedded.database_url(changelog_url, psycopg.conninfo.conninfo_to_dict(changelog_url)["dbname"], user)
        opened.append(psycopg.connect(url, autocommit=True, **settings))
        return opened[-1]

    yield open_session
    for one in opened:
        one.close()


@contextmanager
def _open(url: str, **settings: Any) -> Iterator[ChangeLog]:
    defaults = {"settle_timeout_seconds": 20, "seal_timeout_seconds": 0.2, "clock_margin_seconds": 0}
    changelog = ChangeLog(url, Settings(database_url=url, **{**defaults, **settings}))
    try:
        yield changelog
    finally:
        changelog.close()


def _soon(action: Callable[[], object]) -> threading.Thread:
    """Does it in a moment, most likely while the change log waits; the test holds as well when it does not yet."""

    thread = threading.Timer(0.15, action)
    thread.start()
    return thread


def _now(session: _Session) -> datetime:
    (now,) = session.execute("SELECT clock_timestamp()").fetchone() or (None,)
    assert isinstance(now, datetime)
    return now


def test_an_empty_log_settles_at_zero_and_seals_up_to_now(changelog_url: str, session: Callable[..., _Session]) -> None:
    before = _now(session())
    with _open(changelog_url) as changelog:
        settlement = changelog.settle()
    assert settlement.settled_pk == 0
    assert settlement.sealed_until >= before
    assert settlement.settled_at >= settlement.sealed_until
    assert not settlement.blockers


def test_settling_waits_for_a_writer_that_drew_a_key(changelog_url: str, session: Callable[..., _Session]) -> None:
    writer, other = session(), session()
    writer.execute(f"BEGIN; {_INSERT}")
    other.execute(_INSERT)  # committed, with a larger key
    with _open(changelog_url) as changelog:
        committing = _soon(lambda: writer.execute("COMMIT"))
        settlement = changelog.settle()
        committing.join()
        assert settlement.settled_pk == 2
        assert other.execute("SELECT count(*) FROM core.tb_entity_change_log").fetchone() == (2,)


@pytest.mark.parametrize("part", ["core.child", "core.grandchild"])
def test_a_writer_that_brings_a_key_of_its_own_into_a_part_is_waited_for(
    changelog_url: str, session: Callable[..., _Session], part: str
) -> None:
    writer = session()
    writer.execute("CREATE TABLE core.child () INHERITS (core.tb_entity_change_log)")
    writer.execute("CREATE TABLE core.grandchild () INHERITS (core.child)")
    writer.execute(f"{_INSERT}; {_INSERT}")
    writer.execute(
        f"BEGIN; INSERT INTO {part} (pk_entity_change_log, object_type, modification_type) VALUES (1, 'Order', 'INSERT')"
    )
    with _open(changelog_url, settle_timeout_seconds=0) as changelog:
        with pytest.raises(SettleTimeout):
            changelog.settle()
        writer.execute("COMMIT")
        assert changelog.settle().settled_pk == 2


def test_an_aborted_key_does_not_hold_the_log_up(changelog_url: str, session: Callable[..., _Session]) -> None:
    writer = session()
    writer.execute(f"BEGIN; {_INSERT}; ROLLBACK; {_INSERT}")
    with _open(changelog_url, settle_timeout_seconds=0) as changelog:
        assert changelog.settle().settled_pk == 2


@pytest.mark.parametrize(
    "begin",
    [
        f"BEGIN; {_INSERT}",
        f"BEGIN; SAVEPOINT s; {_INSERT}; ROLLBACK TO s",
        f"BEGIN; DO $$ BEGIN {_INSERT}; RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN NULL; END $$",
        "BEGIN; LOCK TABLE core.tb_entity_change_log IN SHARE ROW EXCLUSIVE MODE",
    ],
    ids=["writer", "savepoint rolled back", "exception caught", "table locked"],
)
def test_a_transaction_that_stays_open_is_named_and_nothing_is_settled(
    changelog_url: str, session: Callable[..., _Session], begin: str
) -> None:
    writer = session(application_name="billing")
    writer.execute(begin)
    with _open(changelog_url, settle_timeout_seconds=0.1) as changelog, pytest.raises(SettleTimeout) as raised:
        changelog.settle()
    assert raised.value.retryable
    (blocker,) = raised.value.blockers
    assert blocker.startswith(
        f"pid {writer.info.backend_pid} (user postgres, application 'billing'): idle in transaction, in a transaction since "
    )
    assert blocker in str(raised.value)


def test_a_message_names_few_of_many_blockers_and_carries_all(changelog_url: str, session: Callable[..., _Session]) -> None:
    for _ in range(8):
        session().execute(f"BEGIN; {_INSERT}")
    with _open(changelog_url, settle_timeout_seconds=0.1) as changelog, pytest.raises(SettleTimeout, match="and 3 more") as raised:
        changelog.settle()
    assert len(raised.value.blockers) == 8


def test_no_statement_of_a_blocker_is_shown(changelog_url: str, session: Callable[..., _Session]) -> None:
    session().execute(f"BEGIN; {_INSERT}; SELECT 'canary-4711'")
    with _open(changelog_url, settle_timeout_seconds=0.1) as changelog, pytest.raises(SettleTimeout) as raised:
        changelog.settle()
    assert "canary" not in f"{raised.value} {raised.value.blockers}"
    assert "INSERT" not in f"{raised.value} {raised.value.blockers}"


def test_readers_and_sessions_that_wrote_nothing_do_not_hold_the_settling_up(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    session().execute(_INSERT)
    session().execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM core.tb_entity_change_log")
    session().execute("BEGIN; SELECT pg_current_xact_id()")
    session().execute("BEGIN; CREATE TABLE elsewhere (x int); INSERT INTO elsewhere VALUES (1)")
    with _open(changelog_url, settle_timeout_seconds=0, seal_timeout_seconds=0) as changelog:
        assert changelog.settle().settled_pk == 1


def test_writers_that_begin_while_others_are_waited_for_are_not(changelog_url: str, session: Callable[..., _Session]) -> None:
    first, second = session(), session()
    first.execute(f"BEGIN; {_INSERT}")

    def change_places() -> None:
        second.execute(f"BEGIN; {_INSERT}")
        first.execute("COMMIT")

    with _open(changelog_url, seal_timeout_seconds=0) as changelog:
        changing = _soon(change_places)
        assert changelog.settle().settled_pk == 1
        changing.join()


def test_a_prepared_transaction_is_waited_for_and_named(changelog_url: str, session: Callable[..., _Session]) -> None:
    writer = session()
    writer.execute(f"BEGIN; {_INSERT}; PREPARE TRANSACTION 'payment-17'")
    with _open(changelog_url, settle_timeout_seconds=0.1) as changelog:
        with pytest.raises(SettleTimeout, match="prepared transaction 'payment-17' of user postgres, prepared "):
            changelog.settle()
    with _open(changelog_url) as changelog:
        committing = _soon(lambda: writer.execute("COMMIT PREPARED 'payment-17'"))
        assert changelog.settle().settled_pk == 1
        committing.join()


def test_a_writer_that_becomes_prepared_is_still_waited_for(changelog_url: str, session: Callable[..., _Session]) -> None:
    writer = session()
    writer.execute(f"BEGIN; {_INSERT}")
    with _open(changelog_url, settle_timeout_seconds=0.6) as changelog:
        preparing = _soon(lambda: writer.execute("PREPARE TRANSACTION 'halfway'"))
        with pytest.raises(SettleTimeout, match="'halfway'"):
            changelog.settle()
        preparing.join()
    writer.execute("ROLLBACK PREPARED 'halfway'")


def test_transactions_prepared_by_others_meanwhile_do_not_prolong_the_wait(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    stop, busy = threading.Event(), session()

    def prepare_for_ever() -> None:
        number = 0
        while not stop.is_set():
            busy.execute(f"BEGIN; {_INSERT}; PREPARE TRANSACTION 'n{number}'")
            if number:
                busy.execute(f"COMMIT PREPARED 'n{number - 1}'")
            number += 1
        busy.execute(f"COMMIT PREPARED 'n{number - 1}'")

    preparing = threading.Thread(target=prepare_for_ever)
    preparing.start()
    try:
        with _open(changelog_url, seal_timeout_seconds=0) as changelog:
            for _ in range(5):
                changelog.settle()
    finally:
        stop.set()
        preparing.join()


def test_a_transaction_that_began_before_the_end_of_a_window_keeps_it_provisional(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    old = session(application_name="report")
    old.execute("BEGIN")
    (began,) = old.execute("SELECT now()").fetchone() or (None,)  # and it has written nothing
    with _open(changelog_url) as changelog:
        settlement = changelog.settle()
    assert settlement.sealed_until == began
    (blocker,) = settlement.blockers
    assert "application 'report'" in blocker
    old.execute(f"{_INSERT}; COMMIT")
    (written,) = old.execute("SELECT created_at FROM core.tb_entity_change_log").fetchone() or (None,)
    assert written == began  # and so it can still write where nothing was sealed


def test_a_transaction_that_began_after_the_windows_is_not_waited_for(changelog_url: str, session: Callable[..., _Session]) -> None:
    reader = session()
    end = _now(reader) - timedelta(seconds=1)
    reader.execute("BEGIN; SELECT 1")
    with _open(changelog_url, seal_timeout_seconds=600) as changelog:
        settlement = changelog.settle(end)
    assert settlement.sealed_until >= end
    assert not settlement.blockers


def test_what_a_transaction_of_the_first_barrier_wrote_is_settled_by_the_second(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    old = session()
    old.execute("BEGIN; SELECT 1")
    with _open(changelog_url, seal_timeout_seconds=20) as changelog:
        ending = _soon(lambda: old.execute(f"{_INSERT}; COMMIT"))
        settlement = changelog.settle()
        ending.join()
    rows = old.execute("SELECT pk_entity_change_log, created_at FROM core.tb_entity_change_log").fetchall()
    assert [(pk <= settlement.settled_pk, at < settlement.sealed_until) for pk, at in rows] == [(True, True)]


def test_the_second_transaction_of_one_message_writes_no_earlier_than_is_sealed(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    writer = session()
    message = f"BEGIN; SELECT pg_sleep(0.4); COMMIT; BEGIN; SELECT pg_sleep(0.3); {_INSERT}; COMMIT"
    sending = threading.Thread(target=writer.execute, args=(message,))
    sending.start()
    time.sleep(0.1)
    with _open(changelog_url, seal_timeout_seconds=0.45) as changelog:  # ends while the second one runs
        settlement = changelog.settle()
    sending.join()
    (written,) = writer.execute("SELECT created_at FROM core.tb_entity_change_log").fetchone() or (None,)
    assert settlement.sealed_until <= written


def test_the_clock_margin_lies_between_the_seal_and_now(changelog_url: str, session: Callable[..., _Session]) -> None:
    before = _now(session())
    with _open(changelog_url, clock_margin_seconds=60) as changelog:
        settlement = changelog.settle()
    assert before - timedelta(seconds=60) <= settlement.sealed_until <= settlement.settled_at - timedelta(seconds=60)


def test_a_window_that_has_just_ended_is_sealed_when_its_margin_has_passed(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    end = _now(session())
    with _open(changelog_url, clock_margin_seconds=0.3, seal_timeout_seconds=20) as changelog:
        assert changelog.settle(end).sealed_until >= end


def test_a_window_whose_margin_has_not_passed_at_the_last_look_is_provisional(
    changelog_url: str, session: Callable[..., _Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = _now(session())
    monkeypatch.setattr(settle, "_looks", lambda *_: iter([False, True]))
    with _open(changelog_url, clock_margin_seconds=20, seal_timeout_seconds=20) as changelog:
        assert changelog.settle(end).sealed_until < end


@pytest.mark.parametrize("busy", [True, False])
def test_a_role_that_cannot_see_other_sessions_settles_but_never_seals(
    changelog_url: str, session: Callable[..., _Session], role: str, busy: bool
) -> None:
    writer = session()
    writer.execute(_INSERT)
    if busy:
        writer.execute("BEGIN; SELECT 1")
    with _open(embedded.database_url(changelog_url, psycopg.conninfo.conninfo_to_dict(changelog_url)["dbname"], role)) as changelog:
        contract, settlement = changelog.preflight(), changelog.settle()
    assert not contract.can_seal
    assert settlement.settled_pk == 1
    assert settlement.sealed_until.year == 1
    assert "provisional" in contract.warnings[0]


def test_between_two_transactions_of_one_message_the_message_counts(now: datetime) -> None:
    earlier = now - timedelta(seconds=3)
    session = {"state": "active", "vxid": None, "xact_start": None, "query_start": earlier}
    assert _earliest(session, set(), now) == earlier
    assert _earliest({**session, "state": "idle"}, set(), now) == now
    assert _earliest({**session, "state": "disabled", "query_start": None}, set(), now) is None


def test_a_transaction_that_was_open_at_the_first_look_and_shows_no_start_is_unknown(now: datetime) -> None:
    session = {"state": "active", "vxid": "3/7", "xact_start": None, "query_start": now}
    assert _earliest(session, {"3/7"}, now) is None
    assert _earliest(session, set(), now) == now, "it began after the first look"


def test_a_wait_that_is_given_up_ends_at_its_next_look() -> None:
    assert next(settle._looks(600, given_up=lambda: True)), "the last look"


def test_an_open_transaction_that_hides_its_start_is_unknown_and_never_sealed_over(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    hidden = session(options="-c track_activities=off")
    hidden.execute("BEGIN; SELECT 1")
    with _open(changelog_url) as changelog:
        settlement = changelog.settle()
    assert settlement.sealed_until.year == 1
    assert len(settlement.blockers) == 1


def test_a_row_with_a_key_of_its_own_above_the_sequence_is_refused_until_the_sequence_is_set(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    owner = session()
    with _open(changelog_url) as changelog:
        changelog.preflight()
        owner.execute(
            "INSERT INTO core.tb_entity_change_log (pk_entity_change_log, object_type, modification_type) OVERRIDING SYSTEM VALUE VALUES (50, 'Order', 'INSERT')"
        )
        with pytest.raises(SourceRefused, match="setval") as raised:
            changelog.settle()
        remedy = str(raised.value).partition("SELECT ")[2].partition(", then")[0]
        owner.execute(f"SELECT {remedy}")
        assert changelog.settle().settled_pk == 50


def test_no_session_of_ours_stands_idle_in_a_transaction(changelog_url: str, session: Callable[..., _Session]) -> None:
    with _open(changelog_url) as changelog:
        changelog.preflight()
        changelog.settle()
        changelog.unplaced()
        states = session().execute(
            "SELECT state, backend_xmin IS NULL FROM pg_stat_activity WHERE application_name = 'fraiseql-pipeline' AND datname = current_database()"
        )
        assert states.fetchall() == [("idle", True)]


def test_a_control_connection_that_was_ended_while_it_stood_idle_is_opened_again(
    changelog_url: str, session: Callable[..., _Session]
) -> None:
    with _open(changelog_url) as changelog:
        changelog.settle()
        ((ended,),) = session().execute(
            "SELECT bool_and(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity"
            " WHERE application_name = 'fraiseql-pipeline' AND datname = current_database()"
        )
        assert ended
        assert changelog.settle().settled_pk == 0


@pytest.mark.slow
def test_a_server_that_stays_locked_by_a_migration_is_a_clear_error(changelog_url: str, session: Callable[..., _Session]) -> None:
    session().execute("BEGIN; LOCK TABLE core.tb_entity_change_log IN ACCESS EXCLUSIVE MODE")
    with _open(changelog_url) as changelog:
        changelog._ask(lambda connection: connection.execute("SET lock_timeout = '50ms'"))
        with pytest.raises(SourceUnavailable, match="stayed locked"):
            changelog.preflight()
