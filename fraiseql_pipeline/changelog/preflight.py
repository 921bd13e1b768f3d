"""Preflight: is this change log readable, whole and countable? Everything is asked before the first event is read.

What lives here: the questions and the sentence for each wrong answer. What must not: an answer taken for granted. A source that
cannot be proved whole is refused (``SourceRefused``), because an empty or filtered read looks exactly like a quiet hour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import dict_row

from fraiseql_pipeline.changelog.connection import TABLE, sql, translated
from fraiseql_pipeline.changelog.contract import ACCEPTED_TYPES, OPTIONAL, REQUIRED, Contract
from fraiseql_pipeline.errors import SourceRefused

#: Postgres 14 is the oldest whose pg_locks and planner the settle barrier was built for.
_OLDEST_SERVER = 140_000


class _Sequence(NamedTuple):
    oid: int
    name: str
    readable: bool


def preflight(connection: psycopg.Connection[Any]) -> Contract:
    """The contract this source keeps. Raises ``SourceRefused`` with what is wrong and what to do, ``SourceUnavailable`` when it broke off."""
    with translated():
        _check_version(connection.info.server_version)  # first: older ones do not know what is asked
        source = _ask(connection, "preflight_source")[0]
        _check_source(source)
        columns = _check_columns(_ask(connection, "preflight_columns", {"table": source["table_oid"]}))
        _check_visible(connection, source)
        sequence = _check_sequence(connection, source)
        names = connection.execute(sql("preflight_identity"), {"table": source["table_oid"], "sequence": sequence.oid}).fetchone()
    identity = hashlib.sha256("/".join(map(str, names or ())).encode()).hexdigest()[:32]
    can_seal = bool(source["may_see_sessions"] and source["tracks_sessions"])
    return Contract(
        identity,
        columns,
        can_seal,
        sequence.oid,
        sequence.name if sequence.readable else None,
        tuple(_warnings(source, columns, sequence)),
    )


def _ask(connection: psycopg.Connection[Any], name: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql(name), parameters).fetchall()


def _check_version(version: int) -> None:
    if version < _OLDEST_SERVER:
        raise SourceRefused(f"The server is Postgres {version // 10_000}; the change log must be on Postgres 14 or newer.")


def _check_source(source: Mapping[str, Any]) -> None:
    if source["standby"]:
        raise SourceRefused(
            "This Postgres is a standby: it cannot see the transactions of its primary, so no window can be proved complete; "
            "set FRAISEQL_DATABASE_URL to the primary."
        )
    if source["unencoded"]:
        raise SourceRefused(
            "The database has the encoding SQL_ASCII, so nobody knows what its texts say; move the change log to one with the encoding UTF8."
        )
    # Types have other names then, to us and to the driver, which reads theirs before anything of ours is set.
    if source["quotes_all"]:
        raise SourceRefused(
            f"The setting quote_all_identifiers is on for role {source['role']!r} in this database, so the types of columns cannot be told; "
            f"ALTER ROLE {source['role']} SET quote_all_identifiers = off."
        )
    if source["table_oid"] is None:
        what = "has no table tb_entity_change_log in schema core" if source["has_schema"] else "has no schema core"
        raise SourceRefused(
            f"The database {source['database']!r} {what}, so it holds no FraiseQL change log; "
            "check the database in FRAISEQL_DATABASE_URL, or let FraiseQL create the log."
        )
    if source["kind"] not in {"r", "p"}:
        raise SourceRefused(f"{TABLE} must be a table; it is a view or a foreign table, whose writers cannot be seen.")
    if source["has_foreign_part"]:
        raise SourceRefused(
            f"A part of {TABLE} is a foreign table, whose writers cannot be seen; read the database it is in, or detach that part."
        )
    if source["subscription"] is not None:
        raise SourceRefused(
            f"{TABLE} is filled by the subscription {source['subscription']!r}, and the transactions that still write it are open in another database, "
            "where they cannot be seen from here; set FRAISEQL_DATABASE_URL to the publisher. If this database has taken over, "
            "ALTER SUBSCRIPTION … DISABLE."
        )
    if not source["may_use_schema"]:
        raise SourceRefused(f"Role {source['role']!r} may not use schema core; GRANT USAGE ON SCHEMA core to it.")


def _check_columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    found = {row["attname"]: row for row in rows}
    if missing := [name for name in REQUIRED if name not in found]:
        raise SourceRefused(f"{TABLE} lacks {_listed('column', missing)}; apply FraiseQL's change-log migrations to it.")
    used = [name for name in (*REQUIRED, *OPTIONAL) if name in found]
    wrong = [
        f"{name} is {found[name]['type']}, not {ACCEPTED_TYPES[name][0]}"
        for name in used
        if found[name]["type"] not in ACCEPTED_TYPES[name]
    ]
    if wrong:
        raise SourceRefused(f"{TABLE} has columns of a type that cannot be read without altering values: {'; '.join(wrong)}.")
    if hidden := [name for name in used if not found[name]["readable"]]:
        raise SourceRefused(f"The role may not read {_listed('column', hidden)} of {TABLE}; GRANT SELECT ON {TABLE} to it.")
    return {name: found[name]["type"] for name in used}


def _check_visible(connection: psycopg.Connection[Any], source: Mapping[str, Any]) -> None:
    """Row-level security would hide rows without an error; ``row_security = off`` makes a hidden row one, and is asked to prove it."""
    if not source["may_read"]:
        raise SourceRefused(
            f"Role {source['role']!r} may read single columns of {TABLE}, but not lock the table against migrations while it reads; "
            f"GRANT SELECT ON {TABLE} to it."
        )
    remedy = f"ALTER ROLE {source['role']} BYPASSRLS, or connect as a role that has it"
    if source["filtered"]:
        policies = ", ".join(source["policies"] or ()) or "no policy, so all rows"
        raise SourceRefused(
            f"Row-level security on {TABLE} hides rows from role {source['role']!r} ({policies}), so windows would be short without an error; {remedy}."
        )
    try:
        connection.execute(f"SELECT 1 FROM {TABLE} LIMIT 0")
    except psycopg.errors.InsufficientPrivilege:
        raise SourceRefused(
            f"Role {source['role']!r} may not read {TABLE} in full; GRANT SELECT ON {TABLE} to it, and {remedy}."
        ) from None


def _check_sequence(connection: psycopg.Connection[Any], source: Mapping[str, Any]) -> _Sequence:
    """Settling rests on every pk being drawn from one sequence, one by one, upwards, under its lock."""
    found = _ask(connection, "preflight_sequence", {"table": source["table_oid"]})
    if len(found) != 1:
        raise SourceRefused(
            f"pk_entity_change_log of {TABLE} must draw from exactly one sequence, it has {len(found)}; "
            "make it GENERATED ALWAYS AS IDENTITY as in FraiseQL's contract."
        )
    sequence = found[0]
    for wrong, what, remedy in (
        (sequence["seqcache"] != 1, f"caches {sequence['seqcache']} values per session", "CACHE 1"),
        (sequence["seqincrement"] < 1, f"counts by {sequence['seqincrement']}", "INCREMENT BY 1"),
        (sequence["seqcycle"], "starts again when it is used up", "NO CYCLE"),
    ):
        if wrong:
            raise SourceRefused(
                f"The sequence {sequence['name']} {what}, so a smaller key may be drawn after a larger one and no window can be proved "
                f"complete; ALTER SEQUENCE {sequence['name']} {remedy}."
            )
    if sequence["seqmin"] < 0:
        raise SourceRefused(
            f"The sequence {sequence['name']} may give out negative keys, above which no event would be found; "
            f"ALTER SEQUENCE {sequence['name']} MINVALUE 1."
        )
    _check_parts(connection, source, sequence)
    if sequence["readable"]:
        newest, drawn = connection.execute(sql("preflight_above_sequence").format(sequence=sequence["name"])).fetchone() or (
            None,
            0,
        )
        if newest is not None and newest > drawn:
            raise SourceRefused(
                f"{TABLE} holds pk {newest} although its sequence has only reached {drawn}: rows were written with keys of their own, as a restore or "
                f"a replica does, and cannot be settled; SELECT setval('{sequence['name']}', {newest}), or read the database where they were first written."
            )
    return _Sequence(sequence["seqrelid"], sequence["name"], sequence["readable"])


def _check_parts(connection: psycopg.Connection[Any], source: Mapping[str, Any], sequence: Mapping[str, Any]) -> None:
    """A part that draws keys of its own gives events inserted into it directly keys that were settled long ago."""
    foreign = _ask(connection, "preflight_parts", {"table": source["table_oid"], "sequence": sequence["seqrelid"]})
    if not foreign:
        return
    name, column = foreign[0]["name"], "ALTER COLUMN pk_entity_change_log"
    dropped = "DROP IDENTITY" if foreign[0]["identity"] else "DROP DEFAULT"
    more = f" (so do {len(foreign) - 1} other parts)" if len(foreign) > 1 else ""
    raise SourceRefused(
        f"{name}, a part of {TABLE}, has keys from elsewhere than the sequence {sequence['name']}{more}, so events inserted into it directly may "
        f"come with keys that were settled before and would never be found; ALTER TABLE {name} {column} {dropped}, and where events are inserted "
        f"into it directly, {column} SET DEFAULT nextval('{sequence['name']}')."
    )


def _warnings(source: Mapping[str, Any], columns: Mapping[str, str], sequence: _Sequence) -> list[str]:
    warnings = []
    if not source["may_see_sessions"]:
        warnings.append(
            f"Role {source['role']!r} cannot see other sessions, so windows stay provisional; GRANT pg_read_all_stats to it to seal them."
        )
    elif not source["tracks_sessions"]:
        warnings.append("The server runs with track_activities = off, so windows stay provisional.")
    if not sequence.readable:
        warnings.append(
            f"Role {source['role']!r} may not read the sequence {sequence.name}, so rows written with keys of their own above it go unnoticed; "
            f"GRANT SELECT ON SEQUENCE {sequence.name} to it."
        )
    if source["unlogged"]:
        warnings.append(
            f"{TABLE} or a part of it is UNLOGGED: a crash of Postgres empties it, and what is not published by then is lost; ALTER TABLE … SET LOGGED."
        )
    for column, part in sorted((source["unindexed"] or {}).items()):
        reads = "every window reads" if column == "created_at" else "every settlement and every look for late events reads"
        warnings.append(
            f"{part} has no B-tree index that begins with {column}, so {reads} more of it than it needs, or all of it; "
            f"CREATE INDEX CONCURRENTLY ON {part} ({column})."
        )
    if missing := [name for name in OPTIONAL if name not in columns]:
        warnings.append(f"{TABLE} is of an older contract: {_listed('column', missing)} will be null.")
    if naive := [name for name, kind in columns.items() if kind == "timestamp without time zone"]:
        warnings.append(f"{_listed('Column', naive)} of {TABLE} hold times without a zone; they are read as UTC.")
    return warnings


def _listed(noun: str, names: list[str]) -> str:
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names[:-1])} and {names[-1]}"
