"""What a row of the change log becomes, value by value."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from fraiseql_pipeline.changelog import embedded
from fraiseql_pipeline.changelog.connection import sql
from fraiseql_pipeline.errors import SourceRefused
from fraiseql_pipeline.event import BATCH_SCHEMA
from tests.support.reading import WINDOW, execute, fill, insert, keys, pool, read, read_one, reading

EDGE = timedelta(microseconds=1)


def test_a_window_holds_its_start_and_the_last_microsecond_but_not_its_end(changelog_url: str) -> None:
    times = {
        "before": WINDOW.start - EDGE,
        "start": WINDOW.start,
        "last": WINDOW.end - EDGE,
        "end": WINDOW.end,
    }
    for name, at in times.items():
        insert(changelog_url, created_at=at, object_type=name)
    events = read(changelog_url)
    assert events["entity_type"].to_pylist() == ["start", "last"]
    assert keys(events)[1][0] - keys(events)[0][0] == 3_600_000_000 - 1


def test_only_settled_events_are_read_and_late_ones_can_be_read_alone(changelog_url: str) -> None:
    pks = [insert(changelog_url) for _ in range(5)]
    assert read(changelog_url, settled_pk=pks[2])["pk"].to_pylist() == pks[:3]
    assert read(changelog_url, settled_pk=pks[3], after_pk=pks[1])["pk"].to_pylist() == pks[2:4]
    assert read(changelog_url, settled_pk=pks[4], after_pk=pks[4]).num_rows == 0


def test_the_schema_is_exact_and_carries_nothing_of_the_driver(changelog_url: str) -> None:
    insert(changelog_url, tenant_id=uuid.uuid4(), updated_fields=["a"], cascade={"x": 1}, acting_for=uuid.uuid4())
    with reading(changelog_url) as batches:
        (batch,) = batches
    assert batch.schema.equals(BATCH_SCHEMA, check_metadata=True)
    assert batch.schema.metadata is None
    assert all(field.metadata is None for field in batch.schema)
    batch.validate(full=True)


def test_every_column_arrives(changelog_url: str) -> None:
    tenant, actor, event = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    at = WINDOW.start + timedelta(minutes=1, microseconds=1)
    pk = insert(
        changelog_url,
        id=event,
        created_at=at,
        modification_type="UPDATE",
        tenant_id=tenant,
        fk_contact=42,
        object_data_before={"a": 0},
        updated_fields=["a", None, ""],
        duration_ms=7,
        started_at=at - EDGE,
        commit_time=at + EDGE,
        seq=99,
        actor_type="ai_agent",
        acting_for=actor,
        schema_version="v1",
        trace_id="t1",
        change_status="success",
        cascade={"c": []},
        extra_metadata={"cdc_source": "fallback_trigger"},
    )
    assert read_one(changelog_url) == {
        "event_id": str(event),
        "event_type": "Updated",
        "entity_type": "Order",
        "entity_id": "6f1c9d5e-5a53-4f5c-9b53-0c1b5f3f2a11",
        "timestamp": at,
        "data": '{"a": 1}',
        "user_id": "42",
        "org_id": str(tenant),
        "pk": pk,
        "seq": 99,
        "data_before": '{"a": 0}',
        "updated_fields": ["a", None, ""],
        "change_status": "success",
        "actor_type": "ai_agent",
        "acting_for": str(actor),
        "schema_version": "v1",
        "trace_id": "t1",
        "duration_ms": 7,
        "started_at": at - EDGE,
        "commit_time": at + EDGE,
        "cdc_source": "fallback_trigger",
        "extra_metadata": '{"cdc_source": "fallback_trigger"}',
        "cascade": '{"c": []}',
        "raw": None,
    }


OUT_OF_RANGE = ("infinity", "-infinity", "0044-03-15 12:00:00+00 BC", "294276-12-31 23:59:59.999999+00", "9999-12-31 00:00:00+00")


@pytest.mark.parametrize("column", ["started_at", "commit_time"])
def test_a_time_no_column_can_hold_is_kept_as_text(changelog_url: str, column: str) -> None:
    for text in (*OUT_OF_RANGE, "0001-01-01 00:00:00+00", "9999-12-30 23:59:59.999999+00"):
        insert(changelog_url, **{column: text})
    *wrong, first, last = read(changelog_url).to_pylist()
    assert [event[column] for event in wrong] == [None] * len(OUT_OF_RANGE)
    assert [json.loads(event["raw"]) for event in wrong] == [{column: text} for text in OUT_OF_RANGE]
    assert (first[column], first["raw"]) == (datetime(1, 1, 1, tzinfo=UTC), None)
    assert (last[column], last["raw"]) == (datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC), None)


def test_an_event_of_no_window_is_in_no_window_and_disturbs_none(changelog_url: str) -> None:
    for text in OUT_OF_RANGE:
        insert(changelog_url, created_at=text)
    pk = insert(changelog_url)
    assert read(changelog_url)["pk"].to_pylist() == [pk]


def test_sql_null_and_json_null_stay_apart_where_both_can_be(changelog_url: str) -> None:
    nothing = insert(changelog_url, object_data=None, object_data_before=None)
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        connection.execute("UPDATE core.tb_entity_change_log SET nats_published_at = now()")
    insert(changelog_url, object_data="null", object_data_before="null")
    first, second = read(changelog_url).to_pylist()
    assert (first["pk"], first["data"], first["data_before"]) == (nothing, "null", None)
    assert (second["data"], second["data_before"]) == ("null", "null")


def test_json_is_byte_for_byte_what_postgres_prints(changelog_url: str) -> None:
    text = '{"big": 12345678901234567890123, "tiny": 0.10000000000000000555, "price": 1.10, "huge": 1e400, "zero": -0.0, "deep": [[], {}, null]}'
    insert(changelog_url, object_data=text)
    (printed,) = execute(changelog_url, "SELECT object_data::text FROM core.tb_entity_change_log")[0]
    data = read_one(changelog_url)["data"]
    assert data == printed
    assert '"price": 1.10' in data
    assert "12345678901234567890123" in data
    assert "0.10000000000000000555" in data


def test_text_of_every_unicode_plane_survives(changelog_url: str) -> None:
    planes = "".join(chr(plane * 0x10000 + 0x1234) for plane in range(17) if not 0xD800 <= plane * 0x10000 + 0x1234 <= 0xDFFF)
    text = planes + "\u2028\u2029\u0001\u007f\ufeff\uffff\U0010ffff\\u0041\"'"
    insert(changelog_url, object_data={"t": text}, object_type=text.replace("\x01", ""))
    event = read_one(changelog_url)
    assert json.loads(event["data"]) == {"t": text}
    assert event["entity_type"] == text.replace("\x01", "")


def test_payloads_of_a_megabyte_arrive_whole(changelog_url: str) -> None:
    fill(
        changelog_url,
        40,
        f"'{WINDOW.start}'::timestamptz + n * interval '1 s'",
        payload="jsonb_build_object('n', n, 't', repeat(md5(n::text), 32768))",
    )
    events = read(changelog_url)
    assert events.num_rows == 40
    sizes = {len(text) for text in events["data"].to_pylist()}
    assert min(sizes) > 1 << 20
    assert [json.loads(text)["n"] for text in events["data"].to_pylist()] == list(range(1, 41))


def test_arrays_keep_null_empty_and_nesting_apart(changelog_url: str) -> None:
    cases: list[tuple[str | None, object, object]] = [
        (None, None, None),
        ("{}", [], None),
        ("{NULL}", [None], None),
        ('{""}', [""], None),
        ("{a,b}", ["a", "b"], None),
        ("[5:6]={a,b}", ["a", "b"], None),
        ("[-1:-1]={a}", ["a"], None),
        ("{{a,b},{c,NULL}}", None, {"updated_fields": [["a", "b"], ["c", None]]}),
        ("[2:2][3:4]={{a,b}}", None, {"updated_fields": [["a", "b"]]}),
    ]
    for written, _, _ in cases:
        insert(changelog_url, updated_fields=written)
    events = read(changelog_url).to_pylist()
    assert [event["updated_fields"] for event in events] == [fields for _, fields, _ in cases]
    assert [event["raw"] and json.loads(event["raw"]) for event in events] == [raw for _, _, raw in cases]


def test_empty_strings_are_not_null(changelog_url: str) -> None:
    insert(changelog_url, object_type="", schema_version="", trace_id=None)
    event = read_one(changelog_url)
    assert (event["entity_type"], event["schema_version"], event["trace_id"]) == ("", "", None)


@pytest.mark.parametrize("verb", ["DELETE", "delete", "Delete"])
def test_a_delete_carries_the_last_image_there_is(changelog_url: str, verb: str) -> None:
    for after, before in [({"a": 1}, {"b": 2}), ({"a": 1}, None), (None, {"b": 2}), (None, None)]:
        insert(changelog_url, modification_type=verb, object_data=after, object_data_before=before)
    events = read(changelog_url)
    assert events["event_type"].to_pylist() == ["Deleted"] * 4
    assert events["data"].to_pylist() == ['{"b": 2}', '{"a": 1}', '{"b": 2}', "{}"]
    assert events["data_before"].to_pylist() == ['{"b": 2}', None, '{"b": 2}', None]


def test_verbs_are_read_whatever_their_case(changelog_url: str) -> None:
    verbs = {"INSERT": "Created", "insert": "Created", "Update": "Updated", "custom": "Custom", "NOOP": "Custom", "read": "Custom"}
    for verb in verbs:
        insert(changelog_url, modification_type=verb)
    events = read(changelog_url)
    assert events["event_type"].to_pylist() == list(verbs.values())
    assert events["raw"].null_count == len(verbs)


def test_a_verb_that_is_none_is_kept_and_never_guessed(changelog_url: str) -> None:
    verbs = ["TRUNCATE", "", "c", "INSERT ", "İNSERT"]
    for verb in verbs:
        insert(changelog_url, modification_type=verb)
    events = read(changelog_url)
    assert events["event_type"].null_count == len(verbs)
    assert [json.loads(raw) for raw in events["raw"].to_pylist()] == [{"modification_type": verb} for verb in verbs]
    assert set(events["data"].to_pylist()) == {'{"a": 1}'}


def test_the_marker_of_a_write_past_fraiseql_must_be_a_string(changelog_url: str) -> None:
    for metadata in ({"cdc_source": "fallback_trigger"}, {"cdc_source": 1}, {"cdc_source": None}, {"other": "x"}, None):
        insert(changelog_url, extra_metadata=metadata)
    assert read(changelog_url)["cdc_source"].to_pylist() == ["fallback_trigger", None, None, None, None]


def test_odd_settings_of_role_and_database_change_nothing(changelog_url: str) -> None:
    at = WINDOW.start + timedelta(minutes=59, seconds=59, microseconds=999_999)
    insert(changelog_url, created_at=at, started_at="infinity", commit_time="0044-03-15 BC", object_data={"n": 0.1})
    sound = read_one(changelog_url)
    (name,) = execute(changelog_url, "SELECT current_database()")[0]
    for setting in (
        "TimeZone = 'America/St_Johns'",
        "DateStyle = 'German, DMY'",
        "IntervalStyle = 'sql_standard'",
        "extra_float_digits = -15",
        "search_path = 'nowhere'",
        "default_transaction_isolation = 'serializable'",
        "enable_indexscan = off",
        "bytea_output = 'escape'",
        "client_encoding = 'LATIN1'",
        "default_transaction_read_only = on",
    ):
        execute(changelog_url, f'ALTER DATABASE "{name}" SET {setting}')
    assert read_one(changelog_url) == sound
    assert json.loads(sound["raw"]) == {"started_at": "infinity", "commit_time": "0044-03-15 00:00:00+00 BC"}


def test_a_window_may_take_longer_than_the_database_lets_a_transaction_last(changelog_url: str) -> None:
    ((name, version),) = execute(changelog_url, "SELECT current_database(), current_setting('server_version_num')::int")
    if version < 170000:
        pytest.skip("transaction_timeout came with Postgres 17")
    at = f"'{WINDOW.start}'::timestamptz + n * interval '1 microsecond'"
    fill(changelog_url, 20_000, at, payload="jsonb_build_object('text', repeat('x', 2000))")  # more than is read ahead
    execute(changelog_url, f"ALTER DATABASE \"{name}\" SET transaction_timeout = '500ms'")
    with reading(changelog_url) as batches:
        rows = next(batches).num_rows
        execute(changelog_url, "SET transaction_timeout = 0; SELECT pg_sleep(1)")
        assert rows + sum(batch.num_rows for batch in batches) == 20_000


def test_texts_of_a_database_in_another_encoding_arrive_as_utf_8(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        provider = "LOCALE_PROVIDER libc" if connection.info.server_version >= 150000 else ""
        connection.execute(f"CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' {provider} LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        url = embedded.database_url(postgres, "latin")
        execute(url, sql("contract"))
        insert(url, object_type="Büro", object_data={"name": "é"})
        event = read_one(url)
        assert (event["entity_type"], event["data"]) == ("Büro", '{"name": "é"}')
    finally:
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute("DROP DATABASE latin WITH (FORCE)")


def test_an_older_change_log_reads_with_nulls_for_what_it_lacks(database: str) -> None:
    execute(
        database,
        """CREATE SCHEMA core;
        CREATE TABLE core.tb_entity_change_log (
            created_at timestamp NOT NULL, object_data jsonb, tenant_id uuid, extra text, object_id text, acting_for bigint,
            object_type varchar(80) NOT NULL, modification_type varchar(20) NOT NULL, id uuid DEFAULT gen_random_uuid() NOT NULL,
            pk_entity_change_log bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, object_data_before jsonb);
        INSERT INTO core.tb_entity_change_log (created_at, object_type, modification_type, object_id, acting_for, object_data)
        VALUES ('2026-11-20 10:00:00', 'Order', 'INSERT', 'not a uuid', 12, '{"a": 1.0}'), ('2026-11-20 09:59:59.999999', 'Order', 'INSERT', 'x', 1, '{}'),
               ('2026-11-20 10:59:59.999999', 'Order', 'oops', 'y', NULL, '{}')""",
    )
    (name,) = execute(database, "SELECT current_database()")[0]
    execute(database, f"ALTER DATABASE \"{name}\" SET TimeZone = 'Asia/Kathmandu'")
    first, second = read(database).to_pylist()
    assert (first["timestamp"], first["entity_id"], first["acting_for"], first["data"]) == (
        WINDOW.start,
        "not a uuid",
        "12",
        '{"a": 1.0}',
    )
    assert (first["updated_fields"], first["seq"], first["started_at"], first["cascade"], first["raw"]) == (
        None,
        None,
        None,
        None,
        None,
    )
    assert (second["timestamp"], json.loads(second["raw"])) == (WINDOW.end - EDGE, {"modification_type": "oops"})


def test_what_is_forbidden_or_gone_after_preflight_is_refused(changelog_url: str) -> None:
    insert(changelog_url)
    role = f"reader_{uuid.uuid4().hex[:8]}"
    execute(changelog_url, f"CREATE ROLE {role} LOGIN BYPASSRLS")
    execute(changelog_url, f"GRANT USAGE ON SCHEMA core TO {role}; GRANT SELECT ON core.tb_entity_change_log TO {role}")
    try:
        with pool(changelog_url.replace("//postgres@", f"//{role}@")) as readers:
            assert readers.read().num_rows == 1
            execute(changelog_url, f"ALTER ROLE {role} NOBYPASSRLS")
            with pytest.raises(SourceRefused, match="42501"):
                readers.read()  # and not an empty window
            execute(changelog_url, f"ALTER ROLE {role} BYPASSRLS; ALTER TABLE core.tb_entity_change_log DROP COLUMN trace_id")
            with pytest.raises(SourceRefused, match="42703") as refused:
                readers.read()
            assert "SELECT" not in str(refused.value)
    finally:
        execute(changelog_url, f"DROP OWNED BY {role}; DROP ROLE {role}")
