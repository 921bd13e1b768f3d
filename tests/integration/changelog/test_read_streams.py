"""The stream of a window: whole, in order, in bounded memory, or an error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fraiseql_pipeline.changelog import embedded, projection
from fraiseql_pipeline.changelog import read as read_module
from fraiseql_pipeline.changelog import split as split_module
from fraiseql_pipeline.changelog.connection import sql
from fraiseql_pipeline.errors import SourceRefused, SourceUnavailable
from fraiseql_pipeline.event import EXTRACTED
from tests.support.proxy import proxied
from tests.support.reading import WINDOW, execute, expected_keys, fill, insert, keys, pool, read, reading
from tests.support.waiting import eventually

START = f"'{WINDOW.start}'::timestamptz"
BACKENDS = """SELECT pid, state FROM pg_stat_activity
    WHERE application_name = 'fraiseql-pipeline' AND datname = current_database() ORDER BY backend_start"""
QUICK = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
WIDE = "jsonb_build_object('n', n, 't', repeat(md5(n::text), 30))"


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, batches and buffers so small that a few thousand rows need many, and most of a window is still in Postgres."""
    monkeypatch.setattr(split_module, "PART_BYTES", 200_000)
    monkeypatch.setattr(read_module, "BATCH_BYTES", 50_000)
    monkeypatch.setattr(read_module, "BUFFER_BYTES", 200_000)
    monkeypatch.setattr(read_module, "PAUSES_SECONDS", (0.05, 0.2, 0.5))


@pytest.fixture
def one_part(tiny_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``tiny_parts``, but the window is a single COPY that is far from its end while the first batches are handed out."""
    monkeypatch.setattr(split_module, "PART_BYTES", 1 << 30)


@dataclasses.dataclass(frozen=True)
class Crashing:
    """A server that may be stopped and killed, with a window of 6,000 rows."""

    url: str
    server: Any

    def restart(self) -> None:
        self.server.stop()
        self.server.start(QUICK)


@pytest.fixture(scope="module")
def own_server() -> Iterator[Crashing]:
    directory = Path(tempfile.mkdtemp(prefix="fq-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        with embedded.start(directory / "pg", QUICK) as url:
            execute(url, sql("contract"))
            fill(url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
            execute(url, "CHECKPOINT")
            yield Crashing(url, embedded._Server(embedded._programs(), directory / "pg"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def backends(url: str) -> list[tuple[int, str]]:
    """Our connections (pid, state), oldest first."""
    return [(int(pid), str(state)) for pid, state in execute(url, BACKENDS)]


def busy(url: str) -> list[int]:
    """Backends of readers that are in a transaction, the leading one first."""
    return [pid for pid, state in backends(url) if state in {"active", "idle in transaction", "idle in transaction (aborted)"}]


SHAPES = {
    "even": f"{START} + n * interval '0.9 s'",
    "one instant": f"{START} + interval '7 min'",
    "one instant at the start": START,
    "one instant at the end": f"{START} + interval '59 min 59.999999 s'",
    "a crowd among others": f"{START} + CASE WHEN n % 10 = 0 THEN n * interval '0.9 s' ELSE interval '30 min 0.000001 s' END",
    "two neighbouring instants": f"{START} + (n / 2001) * interval '1 us'",
    "crowded towards the end": f"{START} + interval '1 hour' * (1 - exp(-n / 200.0)) * 0.999",
    "back-dated": f"{START} + (n * 7919 % 3599) * interval '1 s' + n * interval '1 us'",
    "backwards": f"{START} + interval '59 min' - n * interval '0.8 s'",
    "around the window": f"{START} + (n - 2000) * interval '2 s'",
}


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_tile_a_window_whatever_its_shape(
    changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch, shape: str, connections: int
) -> None:
    fill(changelog_url, 4000, SHAPES[shape], payload=WIDE)
    parts = recorded_parts(monkeypatch)
    assert keys(read(changelog_url, read_connections=connections)) == expected_keys(changelog_url)
    assert len(parts) > 5


def recorded_parts(monkeypatch: pytest.MonkeyPatch) -> list[projection.Part]:
    """Filled with the parts of the windows that are read."""
    parts: list[projection.Part] = []

    def recorded(*arguments: Any) -> list[projection.Part]:
        parts.extend(split_module.split(*arguments))
        return list(parts)

    monkeypatch.setattr(read_module, "split", recorded)
    return parts


def test_gaps_in_the_sequence_do_not_shatter_a_small_window(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = recorded_parts(monkeypatch)
    for gap in range(4):
        insert(changelog_url, created_at=WINDOW.start + timedelta(minutes=gap))
        execute(changelog_url, f"SELECT setval('core.tb_entity_change_log_pk_entity_change_log_seq', {5_000_000_000 * (gap + 1)})")
        insert(changelog_url, created_at=WINDOW.start + timedelta(minutes=gap))  # the same instant
    assert keys(read(changelog_url)) == expected_keys(changelog_url)
    assert len(parts) < 10


def test_an_empty_window_is_an_empty_stream(changelog_url: str) -> None:
    insert(changelog_url, created_at=WINDOW.end)
    with reading(changelog_url) as batches:
        assert list(batches) == []


def test_late_events_come_in_order_too(changelog_url: str, tiny_parts: None) -> None:
    fill(changelog_url, 500, f"{START} + n * interval '1 s'")
    settled = max(pk for _, pk in expected_keys(changelog_url))
    fill(changelog_url, 3000, f"{START} + (n * 7919 % 3599) * interval '1 s'", payload=WIDE)
    late = read(changelog_url, after_pk=settled)
    assert keys(late) == [key for key in expected_keys(changelog_url) if key[1] > settled]


def test_one_window_is_one_snapshot_for_all_connections(
    changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    before = expected_keys(changelog_url)
    opened = read_module.Readers.open

    def retention_runs_first(self: read_module.Readers, **options: Any) -> object:
        if options.get("snapshot"):
            execute(
                changelog_url, "DELETE FROM core.tb_entity_change_log WHERE created_at >= %s", WINDOW.start + timedelta(minutes=1)
            )
        return opened(self, **options)

    monkeypatch.setattr(read_module.Readers, "open", retention_runs_first)
    assert keys(read(changelog_url, read_connections=2)) == before
    assert len(expected_keys(changelog_url)) < 200


@pytest.mark.parametrize("within", [True, False], ids=["within a batch", "from batch to batch"])
def test_events_that_come_out_of_order_are_refused(
    changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    fill(changelog_url, 600, SHAPES["even"], payload=WIDE)
    put, seen = read_module.Reading.put, list[pa.RecordBatch]()

    def damaged(self: read_module.Reading, slot: read_module.Slot, batch: pa.RecordBatch | None) -> None:
        if batch is not None and within:
            batch = batch.take(pa.array(range(batch.num_rows - 1, -1, -1)))
        elif batch is not None:
            seen.append(batch)
            batch = seen[0]  # again and again
        put(self, slot, batch)

    monkeypatch.setattr(read_module.Reading, "put", damaged)
    with pytest.raises(SourceRefused, match="amcheck"):
        read(changelog_url)


def test_memory_in_flight_stays_below_the_buffer(changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(changelog_url, 6000, SHAPES["even"].replace("0.9", "0.5"), payload=WIDE)
    most, put = 0, read_module.Reading.put

    def watched(self: read_module.Reading, *arguments: object) -> None:
        nonlocal most
        put(self, *arguments)  # type: ignore[arg-type]
        most = max(most, self._bytes)

    monkeypatch.setattr(read_module.Reading, "put", watched)
    with reading(changelog_url, read_connections=4) as batches:
        first = next(batches)
        eventually(lambda: most + read_module.BATCH_BYTES > read_module.BUFFER_BYTES)
        rows = first.num_rows + sum(batch.num_rows for batch in batches)
    assert rows == 6000
    assert most <= read_module.BUFFER_BYTES + read_module.BATCH_BYTES


def test_a_window_ends_without_an_open_transaction(changelog_url: str, tiny_parts: None) -> None:
    fill(changelog_url, 3000, SHAPES["even"], payload=WIDE)
    with pool(changelog_url, read_connections=2) as readers:
        for _ in range(3):
            assert readers.read().num_rows == 3000
            assert {state for _, state in backends(changelog_url)} == {"idle"}


def test_connections_are_kept_between_windows(changelog_url: str) -> None:
    insert(changelog_url)
    with pool(changelog_url) as readers:
        readers.read()
        first = backends(changelog_url)
        for _ in range(5):
            assert readers.read().num_rows == 1
        assert backends(changelog_url) == first
    eventually(lambda: backends(changelog_url) == [])


def test_a_stream_left_early_leaves_nothing_behind(changelog_url: str, tiny_parts: None) -> None:
    fill(changelog_url, 3000, SHAPES["even"], payload=WIDE)
    with pool(changelog_url, read_connections=2) as readers:
        with readers.reading() as batches:
            next(batches)
            assert busy(changelog_url)
        assert not [thread for thread in threading.enumerate() if thread.name == "changelog-reader"]
        eventually(lambda: backends(changelog_url) == [])
        assert readers.read().num_rows == 3000


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_backend_lost_before_anything_was_handed_out_is_tried_again(changelog_url: str, how: str) -> None:
    fill(changelog_url, 300, f"{START} + n * interval '1 s'")
    with pool(changelog_url) as readers, psycopg.connect(changelog_url) as blocker:
        blocker.execute("LOCK TABLE core.tb_entity_change_log")
        with readers.reading() as batches:
            waiting = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'core.tb_entity_change_log'::regclass"
            eventually(lambda: bool(execute(changelog_url, waiting)))
            execute(changelog_url, f"SELECT {how}(pid) FROM ({waiting}) AS waiting")
            blocker.rollback()
            assert sum(batch.num_rows for batch in batches) == 300


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_stream_broken_halfway_is_an_error_and_never_short(changelog_url: str, one_part: None, how: str) -> None:
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    with pool(changelog_url) as readers:
        with readers.reading() as batches:
            found = [next(batches)]
            execute(changelog_url, f"SELECT {how}(%s)", busy(changelog_url)[0])
            with pytest.raises(SourceUnavailable) as broken:
                found.extend(batches)
        assert "test_" not in str(broken.value)
        received = keys(pa.Table.from_batches(found))
        assert received == expected_keys(changelog_url)[: len(received)]
        assert len(received) < 6000
        assert keys(readers.read()) == expected_keys(changelog_url)


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_helping_connection_may_be_lost_at_any_time(
    changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(split_module, "PART_BYTES", 1_500_000)  # more than the buffer: a helper waits in the middle of its part
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    with pool(changelog_url, read_connections=2) as readers:
        with readers.reading() as batches:
            found = [next(batches)]
            execute(
                changelog_url, "DELETE FROM core.tb_entity_change_log WHERE created_at >= %s", WINDOW.start + timedelta(minutes=45)
            )
            for batch in batches:
                found.append(batch)
                if len(found) in {3, 9, 15}:
                    for helper in busy(changelog_url)[1:]:
                        execute(changelog_url, f"SELECT {how}(%s)", helper)
    read_keys = keys(pa.Table.from_batches(found))
    assert len(read_keys) == 6000
    assert read_keys == sorted(set(read_keys))


def test_a_second_connection_that_cannot_be_had_only_costs_time(changelog_url: str, tiny_parts: None) -> None:
    fill(changelog_url, 3000, SHAPES["even"], payload=WIDE)
    role = f"alone_{uuid.uuid4().hex[:8]}"
    execute(changelog_url, f"CREATE ROLE {role} LOGIN BYPASSRLS CONNECTION LIMIT 2")
    execute(changelog_url, f"GRANT USAGE ON SCHEMA core TO {role}; GRANT SELECT ON core.tb_entity_change_log TO {role}")
    url = changelog_url.replace("//postgres@", f"//{role}@")
    try:
        with pool(url, read_connections=4) as readers, psycopg.connect(url):
            assert keys(readers.read()) == expected_keys(changelog_url)
    finally:
        execute(changelog_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_migration_that_comes_before_the_second_connection_only_costs_time(
    changelog_url: str, tiny_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    migration = threading.Thread(
        target=execute, args=[changelog_url, "ALTER TABLE core.tb_entity_change_log ADD COLUMN note text"], daemon=True
    )
    queued = (
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database WHERE datname = current_database() AND NOT granted"
    )
    opened = read_module.Readers.open

    def asks_first(self: read_module.Readers, **options: Any) -> object:
        if options.get("snapshot") and migration.ident is None:
            migration.start()
            while execute(changelog_url, queued) == [(0,)]:
                time.sleep(0.01)
        return opened(self, **options)

    monkeypatch.setattr(read_module.Readers, "open", asks_first)
    # One that waits behind the migration is waited for by the first one, for which the migration waits.
    assert keys(read(changelog_url, read_connections=2)) == expected_keys(changelog_url)
    migration.join()


def test_a_server_that_restarts_between_windows_is_not_noticed(own_server: Crashing) -> None:
    with pool(own_server.url) as readers:
        before = keys(readers.read())
        own_server.restart()
        assert keys(readers.read()) == before


def test_a_server_that_restarts_while_a_window_is_read_is_an_error_and_the_next_read_is_right(
    own_server: Crashing, one_part: None
) -> None:
    with pool(own_server.url) as readers:
        with readers.reading() as batches:
            next(batches)
            own_server.restart()
            with pytest.raises(SourceUnavailable):
                list(batches)
        assert keys(readers.read()) == expected_keys(own_server.url)


def test_a_backend_killed_while_a_window_is_read_is_an_error_and_the_next_read_is_right(
    own_server: Crashing, one_part: None
) -> None:
    with pool(own_server.url) as readers:
        with readers.reading() as batches:
            next(batches)
            os.kill(busy(own_server.url)[0], signal.SIGKILL)
            with pytest.raises(SourceUnavailable):
                list(batches)
        assert keys(readers.read()) == expected_keys(own_server.url)


def test_a_connection_that_is_reset_is_an_error(changelog_url: str, one_part: None) -> None:
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    with proxied(changelog_url) as (proxy, url), pool(url) as readers:
        assert readers.read().num_rows == 6000
        with readers.reading() as batches:
            next(batches)
            proxy.cut()
            with pytest.raises(SourceUnavailable):
                list(batches)
        assert readers.read().num_rows == 6000


def test_a_network_that_falls_silent_is_an_error_and_not_a_wait_for_ever(
    changelog_url: str, one_part: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "GRACE_SECONDS", 0.2)
    fill(changelog_url, 6000, f"{START} + n * interval '0.5 s'", payload=WIDE)
    with proxied(changelog_url) as (proxy, url), pool(url, read_timeout_seconds=1) as readers:
        with readers.reading() as batches:
            next(batches)
            proxy.freeze()
            with pytest.raises(SourceUnavailable, match="sent nothing"):
                list(batches)
        proxy.cut()
        eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("changelog-")])


def test_a_statement_that_takes_too_long_is_an_error(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(changelog_url)
    monkeypatch.setattr(read_module, "PAUSES_SECONDS", (0.05,))
    with pool(changelog_url, read_timeout_seconds=0.2) as readers, psycopg.connect(changelog_url) as blocker:
        blocker.execute("LOCK TABLE core.tb_entity_change_log")
        with readers.reading() as batches, pytest.raises(SourceUnavailable, match="57014"):
            list(batches)


def test_a_value_the_driver_cannot_decode_costs_its_row_alone(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_stored = tuple(dataclasses.replace(column, sql=None) if column.name == "updated_fields" else column for column in EXTRACTED)
    monkeypatch.setattr(projection, "EXTRACTED", as_stored)
    pks = [insert(changelog_url, updated_fields=["a"], object_data={"n": n}) for n in range(5)]
    execute(
        changelog_url,
        "UPDATE core.tb_entity_change_log SET updated_fields = '[5:6]={a,b}' WHERE pk_entity_change_log = ANY(%s)",
        pks[1:3],
    )
    events = read(changelog_url).to_pylist()
    assert [event["pk"] for event in events] == pks
    assert [event["data"] for event in events] == ['{"n": 0}', None, None, '{"n": 3}', '{"n": 4}']
    assert [event["raw"] is None for event in events] == [True, False, False, True, True]
    told = json.loads(events[1]["raw"])["unreadable"]
    assert told["why"] == "undecodable"
    assert told["stored_bytes"]["updated_fields"] > 0
    assert all(events[1][name] for name in ("event_id", "entity_type", "entity_id", "timestamp", "event_type"))


@pytest.mark.slow
def test_an_event_too_large_for_postgres_to_send_costs_its_row_alone(changelog_url: str) -> None:
    fill(changelog_url, 200, f"{START} + n * interval '1 s'")
    execute(
        changelog_url,
        """INSERT INTO core.tb_entity_change_log (object_type, modification_type, created_at, object_id, object_data)
        SELECT 'Order', 'UPDATE', %s, gen_random_uuid(), jsonb_agg('1e100000'::jsonb) FROM generate_series(1, 11000)""",
        WINDOW.start + timedelta(seconds=100, microseconds=1),
    )
    events = read(changelog_url)
    assert keys(events) == expected_keys(changelog_url)
    (poison,) = events.filter(pc.is_valid(events["raw"])).to_pylist()
    assert (poison["pk"], poison["data"], poison["event_type"]) == (201, None, "Updated")
    told = json.loads(poison["raw"])["unreadable"]
    assert told["why"] == "54000"
    assert told["stored_bytes"]["object_data"] > 1000
