"""Preflight fails closed: what cannot be proved whole is refused, and the sentence says what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fraiseql_pipeline.changelog import ChangeLog, Contract, embedded
from fraiseql_pipeline.changelog import preflight as preflight_module
from fraiseql_pipeline.changelog.append import Appender
from fraiseql_pipeline.changelog.connection import explain_text, sql
from fraiseql_pipeline.changelog.contract import OPTIONAL, REQUIRED
from fraiseql_pipeline.errors import SettingsError, SourceError, SourceRefused, SourceUnavailable
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.settings import Settings
from tests.support.events import batch_events
from tests.support.reading import WINDOW, execute

_TABLE = "core.tb_entity_change_log"
_OLD_CONTRACT = f"""
    CREATE SCHEMA core;
    CREATE TABLE {_TABLE} (
        tenant_id text, object_data json, created_at timestamp NOT NULL DEFAULT now(), note text,
        object_id text, modification_type varchar(20), object_type varchar(80), id text,
        pk_entity_change_log serial PRIMARY KEY)
"""


def _preflight(url: str, user: str | None = None) -> Contract:
    if user is not None:
        url = embedded.database_url(url, psycopg.conninfo.conninfo_to_dict(url)["dbname"], user)
    changelog = ChangeLog(url, Settings(database_url=url))
    try:
        return changelog.preflight()
    finally:
        changelog.close()


_COLUMNS = f"SELECT attname FROM pg_attribute WHERE attrelid = '{_TABLE}'::regclass AND attnum > 0 AND NOT attisdropped"


@pytest.fixture
def stranger(owner: psycopg.Connection[Any]) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"stranger_{os.urandom(6).hex()}"
    owner.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_the_contract_passes_without_a_warning(changelog_url: str) -> None:
    contract = _preflight(changelog_url)
    assert set(contract.columns) == {*REQUIRED, *OPTIONAL}
    assert contract.can_seal
    assert contract.readable_sequence is not None
    assert contract.warnings == ()


def test_the_least_rights_pass_and_what_they_cost_is_said(changelog_url: str, role: str) -> None:
    contract = _preflight(changelog_url, role)
    assert not contract.can_seal
    assert contract.readable_sequence is None
    assert [warning.partition("GRANT ")[2] for warning in contract.warnings] == [
        "pg_read_all_stats to it to seal them.",
        "SELECT ON SEQUENCE core.tb_entity_change_log_pk_entity_change_log_seq to it.",
    ]


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("postgresql://someone:secret-9@localhost:1/events", SourceUnavailable, "nothing listens there"),
        ("postgresql:///events?host=/nowhere-at-all&user=someone&password=secret-9", SourceUnavailable, "nothing listens there"),
        ("postgresql://someone:secret-9@no-such-host.invalid/events", SourceUnavailable, "does not resolve"),
        ("postgresql://someone:secret-9@localhost:not-a-port/events", SettingsError, "must be a libpq URL"),
        ("host=localhost secret-9", SettingsError, "must be a libpq URL"),
    ],
)  # fmt: skip
def test_an_unreachable_server_is_said_so_without_repeating_the_url(url: str, error: type[SourceError], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        _preflight(url)
    for secret in ("secret-9", "someone", "localhost:1", "nowhere", "no-such-host"):
        assert secret not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_role_or_a_database_that_does_not_exist_is_refused(changelog_url: str, postgres: str) -> None:
    with pytest.raises(SourceRefused, match="no database of that name"):
        _preflight(embedded.database_url(postgres, "no_such_database"))
    with pytest.raises(SourceRefused, match=r"does not know the role|refused the user"):
        _preflight(changelog_url, "no_such_role")


def test_a_database_without_a_change_log_is_refused(database: str) -> None:
    with pytest.raises(SourceRefused, match="has no schema core"):
        _preflight(database)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA core")
    with pytest.raises(SourceRefused, match="has no table tb_entity_change_log in schema core"):
        _preflight(database)


def test_missing_columns_are_named(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} DROP COLUMN object_id, DROP COLUMN object_data")
    with pytest.raises(SourceRefused, match="lacks columns object_id and object_data; apply FraiseQL's"):
        _preflight(changelog_url)


def test_a_server_that_is_too_old_is_refused_before_it_is_asked(changelog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_module, "_OLDEST_SERVER", 990_000)
    monkeypatch.setattr(preflight_module, "_ask", lambda *_: pytest.fail("an older server may not know what is asked"))
    with pytest.raises(SourceRefused, match=r"The server is Postgres \d\d; the change log must be on Postgres 14 or newer"):
        _preflight(changelog_url)


def test_columns_of_an_unreadable_type_are_named(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN duration_ms TYPE numeric, ALTER COLUMN trace_id TYPE bytea USING NULL")
    with pytest.raises(SourceRefused, match="trace_id is bytea, not text; duration_ms is numeric, not integer"):
        _preflight(changelog_url)


def test_a_change_log_without_an_index_on_its_times_is_read_with_a_warning(
    changelog_url: str, owner: psycopg.Connection[Any]
) -> None:
    owner.execute("DROP INDEX core.idx_entity_log_created")
    (warning,) = _preflight(changelog_url).warnings
    assert warning.endswith("CREATE INDEX CONCURRENTLY ON core.tb_entity_change_log (created_at).")


@pytest.mark.parametrize(
    ("altered", "told"),
    [
        (
            f"ALTER TABLE {_TABLE} DROP CONSTRAINT tb_entity_change_log_pkey",
            f"{_TABLE} has no B-tree index that begins with pk_entity_change_log, so every settlement",
        ),
        ("DROP INDEX core.idx_entity_log_created", f"{_TABLE} has no B-tree index that begins with created_at, so every window"),
        (
            f"DROP INDEX core.idx_entity_log_created; CREATE INDEX ON {_TABLE} (created_at) WHERE object_type = 'Order'",
            f"{_TABLE} has no B-tree index that begins with created_at",
        ),
        (
            f"CREATE TABLE core.newest (PRIMARY KEY (created_at, pk_entity_change_log)) INHERITS ({_TABLE})",
            "core.newest has no B-tree index that begins with pk_entity_change_log",
        ),
    ],
    ids=["its key", "its time", "a part of its rows", "the key of a part"],
)
def test_an_index_that_is_missing_is_told(owner: psycopg.Connection[Any], changelog_url: str, altered: str, told: str) -> None:
    owner.execute(altered)
    (warning,) = _preflight(changelog_url).warnings
    assert warning.startswith(told)


@pytest.mark.parametrize(
    "unlogged",
    [
        f"ALTER TABLE {_TABLE} SET UNLOGGED",
        f"CREATE UNLOGGED TABLE core.newest (LIKE {_TABLE} INCLUDING INDEXES) INHERITS ({_TABLE})",
    ],
    ids=["the log", "a part of it"],
)
def test_a_log_that_a_crash_would_empty_is_told(owner: psycopg.Connection[Any], changelog_url: str, unlogged: str) -> None:
    assert _preflight(changelog_url).warnings == ()
    owner.execute(unlogged)
    (warning,) = _preflight(changelog_url).warnings
    assert "UNLOGGED" in warning


def test_an_older_contract_passes_and_its_missing_columns_are_null(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(_OLD_CONTRACT)
        connection.execute(
            f"INSERT INTO {_TABLE} (object_type, modification_type, id, object_id, object_data, created_at)"
            " VALUES ('Order', 'INSERT', 'e1', 'o1', '{\"a\": 1.10}', '2026-11-01 12:00')"
        )
        contract = _preflight(database)
        connection.execute("SET TimeZone = 'UTC'")
        row = connection.execute(
            f"SELECT pg_typeof(pk_entity_change_log)::text, created_at::text, object_id, object_data::text, seq, trace_id FROM (SELECT {contract.projection} FROM {_TABLE}) AS changes"
        ).fetchone()
    assert row == ("bigint", "2026-11-01 12:00:00+00", "o1", '{"a": 1.10}', None, None)
    index, missing, zone = contract.warnings
    assert "no B-tree index that begins with created_at" in index
    assert "trace_id" in missing
    assert "created_at" in zone
    assert "read as UTC" in zone


def test_a_domain_counts_as_the_type_beneath_it(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"CREATE DOMAIN core.label AS text; ALTER TABLE {_TABLE} ALTER COLUMN object_type TYPE core.label")
    assert _preflight(changelog_url).columns["object_type"] == "text"
    owner.execute(
        f"CREATE DOMAIN core.short_label AS core.label; ALTER TABLE {_TABLE} ALTER COLUMN object_type TYPE core.short_label"
    )
    assert _preflight(changelog_url).columns["object_type"] == "text"


def test_row_level_security_that_would_hide_rows_is_refused_with_the_remedy(
    changelog_url: str, owner: psycopg.Connection[Any], stranger: str
) -> None:
    owner.execute(f"GRANT USAGE ON SCHEMA core TO {stranger}; GRANT SELECT ON {_TABLE} TO {stranger}")
    with pytest.raises(SourceRefused, match=f"ALTER ROLE {stranger} BYPASSRLS") as raised:
        _preflight(changelog_url, stranger)
    assert "p_change_log_tenant_read" in str(raised.value)
    owner.execute(f"ALTER ROLE {stranger} BYPASSRLS")
    _preflight(changelog_url, stranger)


def test_a_tenant_in_the_session_is_no_excuse_for_reading_one_tenant(
    changelog_url: str, owner: psycopg.Connection[Any], stranger: str
) -> None:
    owner.execute(f"GRANT USAGE ON SCHEMA core TO {stranger}; GRANT SELECT ON {_TABLE} TO {stranger}")
    owner.execute(f"ALTER ROLE {stranger} SET fraiseql.tenant_id = '00000000-0000-4000-8000-000000000001'")
    owner.execute(f"ALTER ROLE {stranger} SET row_security = on")
    with pytest.raises(SourceRefused, match="hides rows"):
        _preflight(changelog_url, stranger)


def test_forced_row_level_security_is_refused_for_the_owner_too(
    changelog_url: str, owner: psycopg.Connection[Any], stranger: str
) -> None:
    owner.execute(f"GRANT USAGE ON SCHEMA core TO {stranger}; ALTER TABLE {_TABLE} OWNER TO {stranger}")
    _preflight(changelog_url, stranger)
    owner.execute(f"ALTER TABLE {_TABLE} FORCE ROW LEVEL SECURITY")
    with pytest.raises(SourceRefused, match="hides rows"):
        _preflight(changelog_url, stranger)


def test_a_role_without_rights_is_told_which_it_lacks(changelog_url: str, owner: psycopg.Connection[Any], stranger: str) -> None:
    owner.execute(f"ALTER ROLE {stranger} BYPASSRLS")
    with pytest.raises(SourceRefused, match="GRANT USAGE ON SCHEMA core"):
        _preflight(changelog_url, stranger)
    owner.execute(f"GRANT USAGE ON SCHEMA core TO {stranger}")
    with pytest.raises(SourceRefused, match=f"GRANT SELECT ON {_TABLE}"):
        _preflight(changelog_url, stranger)
    owner.execute(f"GRANT SELECT (id, object_type, modification_type, created_at) ON {_TABLE} TO {stranger}")
    with pytest.raises(SourceRefused, match="may not read columns object_id,"):
        _preflight(changelog_url, stranger)
    everything = ", ".join(name for (name,) in owner.execute(_COLUMNS).fetchall())
    owner.execute(f"GRANT SELECT ({everything}) ON {_TABLE} TO {stranger}")
    with pytest.raises(SourceRefused, match=f"not lock the table against migrations.*GRANT SELECT ON {_TABLE}"):
        _preflight(changelog_url, stranger)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("CACHE 20", "caches 20 values per session"),
        ("MINVALUE -5", "may give out negative keys"),
        ("CYCLE", "starts again when it is used up"),
        ("INCREMENT BY -1 MINVALUE -100 MAXVALUE 100 START 1", "counts by -1"),
    ],
)
def test_a_sequence_that_draws_out_of_order_is_refused(
    changelog_url: str, owner: psycopg.Connection[Any], change: str, says: str
) -> None:
    owner.execute(f"ALTER SEQUENCE core.tb_entity_change_log_pk_entity_change_log_seq {change}")
    with pytest.raises(SourceRefused, match=says):
        _preflight(changelog_url)


def test_a_key_without_a_sequence_is_refused(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN pk_entity_change_log DROP IDENTITY")
    with pytest.raises(SourceRefused, match="exactly one sequence, it has 0"):
        _preflight(changelog_url)


def test_a_sequence_that_is_only_a_default_is_found(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN pk_entity_change_log DROP IDENTITY; CREATE SEQUENCE core.keys")
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN pk_entity_change_log SET DEFAULT nextval('core.keys')")
    assert _preflight(changelog_url).readable_sequence == "core.keys"


def test_restored_rows_above_the_sequence_are_refused_with_the_remedy(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(
        f"INSERT INTO {_TABLE} (pk_entity_change_log, object_type, modification_type) OVERRIDING SYSTEM VALUE VALUES (7, 'Order', 'INSERT')"
    )
    with pytest.raises(SourceRefused, match=r"setval\('core.tb_entity_change_log_pk_entity_change_log_seq', 7\)"):
        _preflight(changelog_url)
    owner.execute("ALTER SEQUENCE core.tb_entity_change_log_pk_entity_change_log_seq RESTART WITH 8")
    _preflight(changelog_url)


def test_a_sequence_that_is_owned_but_not_drawn_from_is_not_taken_for_the_one(
    changelog_url: str, owner: psycopg.Connection[Any]
) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN pk_entity_change_log DROP IDENTITY")
    owner.execute(f"CREATE SEQUENCE core.other; CREATE SEQUENCE core.keys OWNED BY {_TABLE}.pk_entity_change_log")
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN pk_entity_change_log SET DEFAULT nextval('core.other'::text)")
    with pytest.raises(SourceRefused, match="exactly one sequence, it has 0"):
        _preflight(changelog_url)


def test_a_part_whose_writers_cannot_be_seen_is_refused(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("CREATE FOREIGN DATA WRAPPER far; CREATE SERVER away FOREIGN DATA WRAPPER far")
    owner.execute(f"CREATE FOREIGN TABLE core.elsewhere () INHERITS ({_TABLE}) SERVER away")
    with pytest.raises(SourceRefused, match="a foreign table, whose writers cannot be seen"):
        _preflight(changelog_url)


def test_a_view_in_place_of_the_table_is_refused(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} RENAME TO base; CREATE VIEW {_TABLE} AS SELECT * FROM core.base")
    with pytest.raises(SourceRefused, match="must be a table"):
        _preflight(changelog_url)


def test_the_identity_outlives_a_rewrite_and_neither_keys_that_begin_anew_nor_another_table(
    changelog_url: str, owner: psycopg.Connection[Any]
) -> None:
    before = _preflight(changelog_url).identity
    owner.execute(f"VACUUM FULL {_TABLE}")
    owner.execute("SELECT setval('core.tb_entity_change_log_pk_entity_change_log_seq', 9)")
    assert _preflight(changelog_url).identity == before
    owner.execute(f"TRUNCATE {_TABLE} RESTART IDENTITY")
    began_anew = _preflight(changelog_url).identity
    assert began_anew != before
    owner.execute(
        f"CREATE TABLE core.copy (LIKE {_TABLE} INCLUDING ALL); DROP TABLE {_TABLE} CASCADE; ALTER TABLE core.copy RENAME TO tb_entity_change_log"
    )
    assert _preflight(changelog_url).identity not in {before, began_anew}


def test_a_partitioned_log_passes(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            f"""CREATE SCHEMA core; CREATE SEQUENCE core.keys;
            CREATE TABLE {_TABLE} (
                pk_entity_change_log bigint NOT NULL DEFAULT nextval('core.keys'), object_type text, modification_type text, id uuid, object_id uuid,
                object_data jsonb, tenant_id uuid, created_at timestamptz NOT NULL DEFAULT now()) PARTITION BY RANGE (created_at);
            CREATE TABLE core.all_of_it PARTITION OF {_TABLE} DEFAULT"""
        )
    assert _preflight(database).columns["id"] == "uuid"


_LOG = f"""CREATE SCHEMA core; CREATE SEQUENCE core.keys;
    CREATE TABLE {_TABLE} (
        pk_entity_change_log bigint NOT NULL DEFAULT nextval('core.keys'), object_type text, modification_type text, id uuid, object_id uuid,
        object_data jsonb, tenant_id uuid, created_at timestamptz NOT NULL DEFAULT now())"""


@pytest.mark.parametrize("kind", ["part", "child", "grandchild"])
@pytest.mark.parametrize("own", ["IDENTITY", "DEFAULT", "constant"])
def test_a_part_with_keys_of_its_own_is_refused_until_the_remedy(database: str, kind: str, own: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(_LOG + (" PARTITION BY RANGE (created_at)" if kind == "part" else ""))
        if kind == "grandchild":
            connection.execute(f"CREATE TABLE core.child () INHERITS ({_TABLE})")
        connection.execute(f"CREATE TABLE core.own (LIKE {_TABLE} INCLUDING ALL); CREATE SEQUENCE core.others")
        change = "ALTER TABLE core.own ALTER COLUMN pk_entity_change_log"
        if own == "IDENTITY":
            connection.execute(f"{change} DROP DEFAULT; {change} ADD GENERATED ALWAYS AS IDENTITY")
        else:
            connection.execute(f"{change} SET DEFAULT " + ("nextval('core.others')" if own == "DEFAULT" else "5"))
        if kind == "part":
            if own == "IDENTITY" and connection.info.server_version >= 170000:
                return  # Postgres itself refuses such a part
            connection.execute(f"ALTER TABLE {_TABLE} ATTACH PARTITION core.own DEFAULT")
        else:
            connection.execute(f"ALTER TABLE core.own INHERIT {_TABLE if kind == 'child' else 'core.child'}")
        with pytest.raises(
            SourceRefused, match=r"core\.own, a part of .* has keys from elsewhere than the sequence core\.keys"
        ) as refused:
            _preflight(database)
        remedy = "DROP IDENTITY" if own == "IDENTITY" else "DROP DEFAULT"
        assert f"{change} {remedy}" in str(refused.value)
        connection.execute(f"{change} {remedy}")
        _preflight(database)
        connection.execute(f"{change} SET DEFAULT nextval('core.keys')")
        _preflight(database)


def test_parts_of_a_log_whose_key_is_an_identity_pass(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        identity = "GENERATED ALWAYS AS IDENTITY"
        connection.execute(_LOG.replace("DEFAULT nextval('core.keys')", identity) + " PARTITION BY RANGE (created_at)")
        connection.execute(f"CREATE TABLE core.own PARTITION OF {_TABLE} DEFAULT")
    _preflight(database)


def test_settings_of_the_role_and_the_database_do_not_reach_our_sessions(
    changelog_url: str, owner: psycopg.Connection[Any]
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(changelog_url)["dbname"]
    for setting in (
        "TimeZone = 'Asia/Kolkata'",
        "DateStyle = 'SQL, DMY'",
        "IntervalStyle = 'sql_standard'",
        "search_path = 'public'",
    ):
        owner.execute(f"ALTER DATABASE {name} SET {setting}")
    with psycopg.connect(changelog_url) as plain:
        assert plain.execute("SHOW TimeZone").fetchone() == ("Asia/Kolkata",)
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    shown = changelog._ask(
        lambda connection: [connection.execute(f"SHOW {name}").fetchone() for name in ("TimeZone", "DateStyle", "row_security")]
    )
    changelog.close()
    assert shown == [("UTC",), ("ISO, MDY",), ("off",)]


def test_a_role_for_which_all_identifiers_are_quoted_is_refused_with_the_remedy(
    changelog_url: str, owner: psycopg.Connection[Any], role: str
) -> None:
    owner.execute(f"GRANT pg_read_all_stats TO {role}; ALTER ROLE {role} SET quote_all_identifiers = on")
    with pytest.raises(SourceRefused, match=f"ALTER ROLE {role} SET quote_all_identifiers = off"):
        _preflight(changelog_url, role)
    owner.execute(f"ALTER ROLE {role} SET quote_all_identifiers = off")
    assert _preflight(changelog_url, role).can_seal


@pytest.mark.skipif("FRAISEQL_TEST_DSN" in os.environ, reason="makes a copy of a server's data directory")
def test_a_standby_is_refused(short_directory: Path) -> None:
    with embedded.start(short_directory / "primary", {"wal_level": "replica"}):
        pass
    subprocess.run(["cp", "-a", short_directory / "primary", short_directory / "standby"], check=True)
    (short_directory / "standby" / "standby.signal").touch()
    with (
        embedded.start(short_directory / "standby", {"wal_level": "replica"}) as url,
        closing(Appender(url)) as appender,
    ):
        with pytest.raises(SourceRefused, match="is a standby"):
            _preflight(url)
        with pytest.raises(SourceRefused, match="is a standby"):
            appender.append(batch_events(WINDOW, 1).select(EVENT_SCHEMA.names), "test")


@pytest.mark.skipif("FRAISEQL_TEST_DSN" in os.environ, reason="needs a server with logical replication")
@pytest.mark.parametrize("parts", [False, True], ids=["the log", "a part of it"])
def test_a_log_that_a_subscription_fills_is_refused(short_directory: Path, parts: bool) -> None:
    with embedded.start(short_directory / "pg", {"wal_level": "logical", "max_wal_senders": "4"}) as server:
        there, here = (embedded.database_url(server, name) for name in ("there", "here"))
        execute(server, "CREATE DATABASE there")
        execute(server, "CREATE DATABASE here")
        for url in (there, here):
            execute(url, sql("contract"))
        filled = _TABLE
        if parts:
            filled = "core.older"
            execute(there, f"CREATE TABLE {filled} (LIKE {_TABLE})")
            execute(here, f"CREATE TABLE {filled} () INHERITS ({_TABLE})")
        execute(there, f"CREATE PUBLICATION log FOR TABLE {filled}")
        execute(there, "SELECT pg_create_logical_replication_slot('log', 'pgoutput')")
        assert _preflight(here).can_seal
        execute(
            here,
            f"CREATE SUBSCRIPTION log CONNECTION 'host={short_directory}/pg user=postgres dbname=there' PUBLICATION log WITH (create_slot = false)",
        )
        execute(here, "CREATE ROLE reader LOGIN BYPASSRLS; GRANT USAGE ON SCHEMA core TO reader")
        execute(here, f"GRANT SELECT ON {_TABLE} TO reader")
        try:
            # Whatever has arrived, also where the sequence is ahead of it.
            with pytest.raises(SourceRefused, match=r"subscription 'log'.*publisher.*DISABLE"):
                _preflight(here, "reader")
            execute(here, "ALTER SUBSCRIPTION log DISABLE")
            assert _preflight(here).can_seal
        finally:
            execute(here, "ALTER SUBSCRIPTION log DISABLE")
            execute(here, "ALTER SUBSCRIPTION log SET (slot_name = NONE)")
            execute(here, "DROP SUBSCRIPTION log")


@pytest.mark.parametrize(
    ("text", "retryable"),
    [
        ("SSL connection has been closed unexpectedly", True),
        ("SSL SYSCALL error: EOF detected", True),
        ("SSL error: unexpected eof while reading", True),
        ("server closed the connection unexpectedly", True),
        ("SSL SYSCALL error: Connection reset by peer", True),
        ("SSL error: certificate verify failed", False),
        ("server does not support SSL, but SSL was required", False),
        ("transaction blocks not allowed in statement pooling mode\nserver closed the connection unexpectedly", False),
    ],
)
def test_a_connection_that_ends_may_be_tried_again_and_one_that_can_never_serve_may_not(text: str, retryable: bool) -> None:
    assert explain_text(text).retryable is retryable


def test_a_database_whose_encoding_nobody_knows_is_refused(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        provider = "LOCALE_PROVIDER libc" if connection.info.server_version >= 150000 else ""
        connection.execute(f"CREATE DATABASE untold TEMPLATE template0 ENCODING 'SQL_ASCII' {provider} LC_COLLATE 'C' LC_CTYPE 'C'")
    try:
        with pytest.raises(SourceRefused, match="SQL_ASCII"):
            _preflight(embedded.database_url(postgres, "untold"))
    finally:
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute("DROP DATABASE untold")
