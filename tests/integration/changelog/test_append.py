"""Rules of the one write to a source: a batch is in the log whole and once, on disk, whoever writes at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pyarrow as pa
import pytest

from fraiseql_pipeline.changelog.append import Appended, Appender
from fraiseql_pipeline.changelog.connection import sql
from fraiseql_pipeline.errors import InputError, SourceRefused, SourceUnavailable
from fraiseql_pipeline.event import EVENT_SCHEMA
from tests.support.events import TENANTS, batch_events
from tests.support.reading import WINDOW, execute


def events(rows: int, seed: int = 0, **changed: object) -> pa.RecordBatch:
    return batch_events(WINDOW, rows, seed, **changed).select(EVENT_SCHEMA.names)


@pytest.fixture
def appender(changelog_url: str) -> Iterator[Appender]:
    opened = Appender(changelog_url)
    yield opened
    opened.close()


def held(url: str) -> list[tuple[int, int]]:
    return execute(url, "SELECT count(*), count(DISTINCT id) FROM core.tb_entity_change_log")


def until_somebody_waits(url: str, done: threading.Event) -> None:
    end = time.monotonic() + 30
    while not done.is_set() and execute(url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == [(0,)]:
        assert time.monotonic() < end


def test_an_event_that_another_append_has_not_committed_yet_is_waited_for_and_then_known(
    changelog_url: str, appender: Appender
) -> None:
    batch, done = events(1), threading.Event()
    event = batch.to_pylist()[0]
    with psycopg.connect(changelog_url) as other, ThreadPoolExecutor() as pool:
        other.execute(sql("append_begin"))
        other.execute(
            "INSERT INTO core.tb_entity_change_log (object_type, modification_type, id, created_at, tenant_id)"
            " VALUES ('Order', 'INSERT', %s, %s, %s)",
            [event["event_id"], event["timestamp"], event["org_id"]],
        )
        appending = pool.submit(appender.append, batch, "test")
        appending.add_done_callback(lambda _: done.set())
        until_somebody_waits(changelog_url, done)
        other.commit()
        assert appending.result() == Appended(0, 1)
    assert held(changelog_url) == [(1, 1)]


def test_appending_again_changes_nothing_and_an_id_at_another_time_is_another_event(changelog_url: str, appender: Appender) -> None:
    assert appender.append(events(500), "test") == Appended(500, 0)
    assert appender.append(events(500), "test") == Appended(0, 500)
    later = events(500, timestamp=WINDOW.end)
    assert appender.append(later, "test") == Appended(500, 0)
    assert appender.append(later, "test") == Appended(0, 500)
    assert held(changelog_url) == [(1_000, 500)]


def test_an_event_of_another_tenant_with_the_same_id_and_time_is_another_event(changelog_url: str, appender: Appender) -> None:
    batch = events(1)
    at = batch.schema.get_field_index("org_id")
    for tenant in (*TENANTS[:2], None):
        theirs = batch.set_column(at, batch.schema.field(at), pa.array([tenant], pa.string()))
        assert appender.append(theirs, "test") == Appended(1, 0)
        assert appender.append(theirs, "test") == Appended(0, 1)
    assert held(changelog_url) == [(3, 1)]


def test_closing_ends_the_append_that_runs_and_those_behind_it(changelog_url: str, appender: Appender) -> None:
    def ends(number: int) -> str:
        try:
            return str(appender.append(events(1, number), "test"))
        except SourceUnavailable as error:
            return type(error).__name__

    with psycopg.connect(changelog_url) as other, ThreadPoolExecutor() as pool:
        other.execute(sql("append_begin"))
        appending = [pool.submit(ends, number) for number in range(3)]
        until_somebody_waits(changelog_url, threading.Event())
        appender.close()
        assert [one.result(20) for one in appending] == ["SourceUnavailable"] * 3, "while the lock is still held"
    assert held(changelog_url) == [(0, 0)]
    assert ends(4) == "SourceUnavailable"


def test_events_keep_their_order(changelog_url: str, appender: Appender) -> None:
    batch = events(200)
    appender.append(batch, "test")
    found = execute(changelog_url, "SELECT id::text FROM core.tb_entity_change_log ORDER BY pk_entity_change_log")
    assert [found_id for (found_id,) in found] == batch.column("event_id").to_pylist()


@pytest.mark.parametrize("nothing", [None, "7"])
def test_one_event_alone_keeps_its_nulls(changelog_url: str, appender: Appender, nothing: str | None) -> None:
    appender.append(events(1, user_id={0: nothing}, org_id={0: None}), "test")
    expected = None if nothing is None else 7
    assert execute(changelog_url, "SELECT fk_contact, tenant_id FROM core.tb_entity_change_log") == [(expected, None)]


def test_what_was_appended_is_on_disk_also_where_the_role_would_not_wait_for_it(changelog_url: str, appender: Appender) -> None:
    (database,) = execute(changelog_url, "SELECT current_database()")[0]
    execute(changelog_url, f"ALTER DATABASE {database} SET synchronous_commit = off")
    execute(
        changelog_url,
        """CREATE FUNCTION core.noted() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.trace_id := current_setting('synchronous_commit'); RETURN NEW; END $$;
        CREATE TRIGGER noted BEFORE INSERT ON core.tb_entity_change_log FOR EACH ROW EXECUTE FUNCTION core.noted()""",
    )
    appender.append(events(1), "test")
    assert execute(changelog_url, "SELECT trace_id FROM core.tb_entity_change_log") == [("on",)]


def test_an_older_log_is_written_in_its_own_types(changelog_url: str, appender: Appender) -> None:
    execute(
        changelog_url,
        """ALTER TABLE core.tb_entity_change_log
        ALTER COLUMN object_id TYPE text, ALTER COLUMN id DROP DEFAULT, ALTER COLUMN id TYPE text, ALTER COLUMN fk_contact TYPE integer,
        ALTER COLUMN created_at TYPE timestamp, ALTER COLUMN object_data TYPE json, ALTER COLUMN object_data_before TYPE json""",
    )
    assert appender.append(events(50), "test") == Appended(50, 0)
    assert appender.append(events(50), "test") == Appended(0, 50)


def test_a_connection_that_broke_is_made_anew(changelog_url: str, appender: Appender) -> None:
    appender.append(events(5), "test")
    execute(
        changelog_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    with pytest.raises(SourceUnavailable):
        appender.append(events(5), "test")
    assert appender.append(events(5), "test") == Appended(0, 5)


def test_a_refusal_of_postgres_is_a_sentence_without_a_value(changelog_url: str, appender: Appender) -> None:
    with pytest.raises(InputError, match="SQLSTATE 22003") as refused:
        appender.append(events(3, data={1: '{"secret": 1e200000}'}), "test")
    execute(changelog_url, "ALTER TABLE core.tb_entity_change_log ADD CHECK (object_type <> 'Order')")
    with pytest.raises(SourceRefused, match="SQLSTATE 23514") as constrained:
        appender.append(events(50), "test")
    for error in (refused, constrained):
        assert not any(word in str(error.value) for word in ("secret", "1e2", "Order", "CHECK", "INSERT"))
    execute(
        changelog_url, "ALTER TABLE core.tb_entity_change_log ADD COLUMN more text NOT NULL DEFAULT 'x', DROP COLUMN fk_contact"
    )
    with pytest.raises(SourceRefused, match="SQLSTATE 42703"):
        appender.append(events(3), "test")
    assert held(changelog_url) == [(0, 0)]
