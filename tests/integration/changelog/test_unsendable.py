"""Events of which Postgres cannot send everything, or sends what is no text: they cost themselves alone, and nothing is lost beside them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adbc_driver_manager
import psycopg
import pyarrow as pa
import pytest

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import embedded, open_changelog, projection, reader
from fraiseql_pipeline.changelog import read as read_module
from fraiseql_pipeline.changelog.connection import sql
from fraiseql_pipeline.changelog.session import Session
from fraiseql_pipeline.errors import EventsUnreadable
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.support.reading import WINDOW, execute, expected_keys, fill, insert, keys, read

START = f"'{WINDOW.start.isoformat()}'::timestamptz"
BAD = WINDOW.start + timedelta(seconds=30, microseconds=1)

#: What a test does before it reads, the encoding its database begins with, and a byte that has no form in UTF-8 there.
DATABASES = {"without_a_form_in_utf_8": ("WIN1252", b"\x81", "22P05"), "not_of_its_encoding": ("SQL_ASCII", b"\xe9", "22021")}


@contextmanager
def foreign_database(postgres: str, encoding: str) -> Iterator[tuple[str, str]]:
    """Name and URL of a database with the empty contract in another encoding."""
    name = f"foreign_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        provider = "LOCALE_PROVIDER libc" if connection.info.server_version >= 150000 else ""
        connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' {provider} LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    try:
        url = embedded.database_url(postgres, name)
        execute(url, sql("contract"))
        yield name, url
    finally:
        execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


def insert_bytes(url: str, encoding: str, values: dict[str, bytes]) -> int:
    """One row of texts as they are, over sound defaults."""
    row = {
        "object_type": b"'Order'",
        "modification_type": b"'UPDATE'",
        "object_id": b"gen_random_uuid()",
        "object_data": b"'{}'",
        "created_at": f"'{BAD.isoformat()}'".encode(),
        **values,
    }
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SET client_encoding = '{encoding}'")
        statement = f"INSERT INTO core.tb_entity_change_log ({', '.join(row)}) VALUES (".encode() + b", ".join(row.values()) + b")"
        done = connection.pgconn.exec_(statement)
        assert done.status == psycopg.pq.ExecStatus.COMMAND_OK, done.error_message
    ((pk,),) = execute(url, "SELECT max(pk_entity_change_log) FROM core.tb_entity_change_log")
    return int(pk)


@pytest.mark.parametrize("how", DATABASES)
@pytest.mark.parametrize(
    ("column", "text", "lost"),
    [
        ("object_data", b'\'{"name": "a%bb"}\'', {"data"}),
        ("object_type", b"'Ord%br'", {"data", "entity_type", "schema_version"}),
        ("updated_fields", b"ARRAY['a%b']", {"data"}),
    ],
)
def test_a_text_that_is_none_in_utf_8_costs_its_row_alone(
    postgres: str, tmp_path: Path, how: str, column: str, text: bytes, lost: set[str]
) -> None:
    encoding, byte, why = DATABASES[how]
    with foreign_database(postgres, encoding) as (name, url):
        fill(url, 3_000, f"{START} + n * interval '20 ms'")
        pk = insert_bytes(url, encoding, {column: text % byte, "schema_version": b"'v1'"})
        if encoding == "SQL_ASCII":  # as somebody does who wants to be rid of it
            execute(postgres, "UPDATE pg_database SET encoding = pg_char_to_encoding('UTF8') WHERE datname = %s", name)
        (unsound,) = [event for event in read(url).to_pylist() if event["raw"] is not None]
        assert (unsound["pk"], unsound["event_type"], json.loads(unsound["raw"])["unreadable"]["why"]) == (pk, "Updated", why)
        kept = {"event_id", "entity_type", "entity_id", "timestamp", "schema_version"}
        assert {column for column in kept if unsound[column] is None} == kept & lost
        assert unsound["data"] is None

        settings = Settings(database_url=url, lake_uri=str(tmp_path / "lake"), start=WINDOW.start)
        with open_changelog(settings) as changelog:
            (done,) = pipeline.materialize([WINDOW], settings=settings, changelog=changelog, lake=Lake.of(settings))
            assert (done.commit.accepted_rows, done.commit.quarantined_rows) == (3_000, 1)
            assert pipeline.audit(WINDOW, done.commit, changelog=changelog, lake=Lake.of(settings)).equal
            with changelog.tail() as tail:
                assert sum(batch.num_rows for batch in tail.read(0, pk)) == 3_000


def test_a_long_text_beside_the_json_is_left_out_with_it(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers in the place of a gigabyte: the row fails for its JSON, and a text beyond the limit goes with it."""
    monkeypatch.setattr(projection, "_SHORT_BYTES", 100)
    insert(changelog_url, trace_id="t" * 101, schema_version="v" * 100, object_data={"n": 1})
    failing(monkeypatch, lambda query: "'unreadable'" not in query and ") > (" not in query)  # nor behind the row
    (event,) = read(changelog_url).to_pylist()
    assert (event["trace_id"], event["schema_version"], event["change_status"]) == (None, "v" * 100, None)
    told = json.loads(event["raw"])["unreadable"]
    assert told["stored_bytes"]["trace_id"] > 100
    assert not {"schema_version", "change_status"} & told["stored_bytes"].keys()


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool], sqlstate: str = "53200") -> None:
    """Statements over events for which ``fails`` holds end as if the server had run out of memory, or for another reason."""
    stream = Session.stream

    def failed(self: Session, query: str, batch_bytes: int) -> Iterator[pa.RecordBatch]:
        if fails(query):
            raise adbc_driver_manager.OperationalError(
                "what the server says", status_code=adbc_driver_manager.AdbcStatusCode.IO, sqlstate=sqlstate
            )
        yield from stream(self, query, batch_bytes)

    monkeypatch.setattr(Session, "stream", failed)


def test_a_value_whose_pieces_are_lost_costs_its_row_alone(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(changelog_url, 1, START)
    failing(monkeypatch, lambda query: "'unreadable'" not in query and ") > (" not in query, "XX001")
    (event,) = read(changelog_url).to_pylist()
    assert (event["data"], json.loads(event["raw"])["unreadable"]["why"]) == (None, "XX001")


def test_a_page_that_postgres_cannot_read_refuses_what_is_read(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(changelog_url, 1, START)
    failing(monkeypatch, lambda query: "ORDER BY" in query, "XX001")
    with pytest.raises(EventsUnreadable, match=r"finds core\.tb_entity_change_log or an index of it damaged \(SQLSTATE XX001\)"):
        read(changelog_url)


def test_more_events_that_cannot_be_sent_than_may_be_refuse_what_is_read(
    changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "MAX_UNREADABLE", 0)
    fill(changelog_url, 1, START)
    failing(monkeypatch, lambda query: "'unreadable'" not in query)
    with pytest.raises(EventsUnreadable, match="could not send 0 events of one window"):
        read(changelog_url)


def test_every_event_behind_an_error_arrives_however_many_batches_its_neighbours_make(
    changelog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 2 GiB in a column do not fit into one array: here a table that keeps its chunks stands for it."""
    kept_apart: Any = SimpleNamespace(
        Table=SimpleNamespace(from_batches=lambda rows: SimpleNamespace(combine_chunks=lambda: pa.Table.from_batches(rows)))
    )
    monkeypatch.setattr(reader, "pa", kept_apart)
    fill(changelog_url, 300, f"{START} + n * interval '1 s'")
    first = chain([True], iter(lambda: False, True))
    failing(monkeypatch, lambda query: "ORDER BY" in query and next(first))
    assert keys(read(changelog_url)) == expected_keys(changelog_url)


def test_what_is_read_row_by_row_is_passed_on_by_bytes(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "BATCH_BYTES", 50_000)
    fill(changelog_url, 300, f"{START} + n * interval '1 s'", payload="jsonb_build_object('t', repeat('x', 5000))")
    first = chain([True], iter(lambda: False, True))
    failing(monkeypatch, lambda query: "ORDER BY" in query and next(first))
    events = read(changelog_url)
    assert keys(events) == expected_keys(changelog_url)
    assert max(batch.nbytes for batch in events.to_batches()) < 60_000
