"""Connections to the change log's Postgres, and what their failures mean.

What lives here: what every transaction of ours sets, the short control connection (psycopg), the SQL files, and the one translation of
psycopg's errors into ours. What must not: a statement about events (``preflight.py``, ``settle.py``, ``counts.py``), the data stream
(``read.py``).

Invariants
 1. Every statement of ours reads UTF-8, UTC and ISO whatever the server, the role or the database say, and with ``row_security`` off:
    Postgres then refuses where it would otherwise filter.
 2. Nothing is set for longer than a transaction: behind a pooler the server's connection is somebody else's in the next one. What only a
    session can hold (LISTEN, the settings of samples) is left alone where the session is not ours, see ``is_direct``.
 3. No message repeats a DSN, a host, a server's path, SQL or a value; Postgres' own texts carry all of them, so none is passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict

from fraiseql_pipeline.errors import EventsUnreadable, SettingsError, SourceError, SourceRefused, SourceUnavailable

TABLE = "core.tb_entity_change_log"

#: What every transaction sets. Not as start-up options, which poolers refuse.
SESSION: dict[str, str] = {
    "application_name": "fraiseql-pipeline",
    "client_encoding": "UTF8",
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "search_path": "pg_catalog",
    "row_security": "off",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "600s",
    "jit": "off",
}

#: Postgres 17 and later can end a transaction by its age; a window takes as long as it takes, and the statement's own time-out bounds it.
NO_TRANSACTION_TIMEOUT = (
    "CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL THEN set_config('transaction_timeout', '0', true) END"
)

#: A dead network must end a read instead of blocking it for ever: libpq's parameters, added where the URL does not set them.
KEEPALIVE: dict[str, str] = {
    "connect_timeout": "10",
    "keepalives": "1",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


@cache
def sql(name: str) -> str:
    """The text of ``sql/<name>.sql``."""
    return (files(__package__) / "sql" / f"{name}.sql").read_text("utf-8")


def local_settings(statement_timeout_seconds: float, more: Mapping[str, str] | None = None) -> str:
    """The statement that sets ``SESSION`` and ``more`` for the transaction it stands in; without parameters, with a row of no use."""
    settings = {**SESSION, **(more or {}), "statement_timeout": str(int(statement_timeout_seconds * 1000))}
    set_all = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"SELECT {set_all}, {NO_TRANSACTION_TIMEOUT}"


def parameters(url: str) -> dict[str, Any]:
    """libpq's parameters out of a URL or a key=value string, with ``KEEPALIVE`` filled in.

    Raises ``SettingsError`` when libpq cannot read it; the message does not repeat it.
    """
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        given = None
    if given is None or not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
        raise SettingsError(
            "FRAISEQL_DATABASE_URL must be a libpq URL such as postgresql://user@host:5432/database; this one cannot be read."
        )
    return {**KEEPALIVE, **given}


def startup(url: str) -> dict[str, Any]:
    """``parameters`` with what is said in the first message, which poolers pass on: who we are, and our encoding."""
    return {"application_name": SESSION["application_name"], **parameters(url), "client_encoding": SESSION["client_encoding"]}


@contextmanager
def opened(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A connection with the server's own settings, autocommit, closed at the end: for who begins transactions, and sets them up.

    psycopg's errors leave it translated: ``SourceUnavailable`` (try again) or ``SourceRefused`` (something must be changed first).
    """
    try:
        connection = psycopg.connect(**startup(url), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        raise explain(error) from None
    try:
        with connection:
            yield connection
    except psycopg.Error as error:
        raise explain(error) from None


@contextmanager
def connect(url: str, *, statement_timeout_seconds: float = 60.0) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A control connection, as ``opened``: every statement is a transaction of its own that reads and has ``SESSION``."""
    before = (
        f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY, NOT DEFERRABLE; {local_settings(statement_timeout_seconds)}"
    )

    class Question(psycopg.ClientCursor[Any]):
        """Sends the settings and the statement in one message, which Postgres takes for one transaction: one round trip, and a connection
        that breaks in the middle leaves no transaction open.
        """

        def execute(self, query: Any, params: Any = None, **options: Any) -> Question:
            super().execute(f"{before}; {query}", params, **options)
            while self.nextset():
                pass
            return self

    with opened(url) as connection:
        connection.cursor_factory = Question
        for kind in ("timestamptz", "timestamp"):
            connection.adapters.register_loader(kind, _Time)
        yield connection


class _Time(Loader):
    """Times as ``SESSION`` has them printed; psycopg's own loader goes by the DateStyle of the session, which is not the transaction's."""

    def load(self, data: Any) -> datetime:
        return datetime.fromisoformat(bytes(data).decode())


def is_direct(connection: psycopg.Connection[Any]) -> bool:
    """Whether the session at the other end is ours alone: a pooler makes up the process that it names when a client connects."""
    return connection.execute("SELECT pg_backend_pid()").fetchone() == (connection.info.backend_pid,)


@contextmanager
def translated() -> Iterator[None]:
    """Turns psycopg's errors into ours."""
    try:
        yield
    except psycopg.Error as error:
        raise explain(error) from None


#: How libpq and Postgres say why a connection failed → our sentence and whether trying again may help.
_CONNECT_FAILURES: tuple[tuple[str, type[SourceError], str], ...] = (
    (
        r"statement pooling mode",
        SourceRefused,
        "is behind a pooler in statement mode, which takes no transactions: use its transaction mode",
    ),
    (
        r"password authentication failed|authentication failed|no password supplied",
        SourceRefused,
        "refused the user or the password",
    ),
    (r"pg_hba\.conf", SourceRefused, "has no rule that lets this user in from here (pg_hba.conf)"),
    (r"role .* does not exist", SourceRefused, "does not know the role of this user"),
    (r"role .* is not permitted to log in", SourceRefused, "does not let this role log in"),
    (r"database .* does not exist", SourceRefused, "has no database of that name"),
    (r"permission denied for database", SourceRefused, "does not let this role connect to the database"),
    (
        r"SSL SYSCALL|(closed|eof)\b.* unexpectedly|unexpected eof|EOF detected|reset by peer",
        SourceUnavailable,
        "ended the connection",
    ),
    (r"certificate|SSL", SourceRefused, "and this machine could not agree on TLS"),
    (
        r"could not translate host name|Name or service not known|failed to resolve host",
        SourceUnavailable,
        "was not found: its host name does not resolve",
    ),
    (r"remaining connection slots|too many (clients|connections)", SourceUnavailable, "has no free connection"),
    (r"starting up|shutting down|recovery mode|not yet accepting", SourceUnavailable, "is starting up or shutting down"),
    (r"timeout expired|timed out", SourceUnavailable, "did not answer within the time allowed"),
    (r"refused|No such file|Is the server running", SourceUnavailable, "cannot be reached: nothing listens there"),
)


def explain(error: psycopg.Error) -> SourceError:
    """Our error for psycopg's. SQLSTATE decides; texts are looked at only where libpq gives no code, and never repeated."""
    return explain_sqlstate(error.sqlstate) if error.sqlstate is not None else explain_text(str(error))


def explain_text(text: str) -> SourceError:
    """Our error for one of libpq's that has no SQLSTATE: no connection came about, or one broke off."""
    for pattern, kind, what in _CONNECT_FAILURES:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"Postgres {what}; check FRAISEQL_DATABASE_URL and the server.")
    return SourceUnavailable(
        "The connection to Postgres failed or broke off; check FRAISEQL_DATABASE_URL and the server, then run again."
    )


def explain_sqlstate(code: str) -> SourceError:
    """Our error for a SQLSTATE."""
    if code == pg.QueryCanceled.sqlstate:
        return SourceUnavailable("Postgres cancelled a statement of ours (57014: a time-out or an administrator); run again.")
    if code == pg.LockNotAvailable.sqlstate:
        return SourceUnavailable(
            f"{TABLE} stayed locked by another session, such as a migration (55P03); run again when it has ended."
        )
    if code in {pg.InvalidPassword.sqlstate, pg.InvalidAuthorizationSpecification.sqlstate, pg.InvalidCatalogName.sqlstate}:
        return SourceRefused(
            f"Postgres refused the connection ({code}); check the user, password and database in FRAISEQL_DATABASE_URL."
        )
    if code == pg.InsufficientPrivilege.sqlstate:
        return SourceRefused(
            f"The role may not read {TABLE} in full (42501); grant it USAGE on schema core, SELECT on the table and BYPASSRLS."
        )
    if code in {pg.DataCorrupted.sqlstate, pg.IndexCorrupted.sqlstate}:
        return EventsUnreadable(
            f"Postgres finds {TABLE} or an index of it damaged (SQLSTATE {code}); the server's log says where. Restore it from a backup, or REINDEX."
        )
    # 08 connection, 25P03 and 25P04 a session or transaction ended for its age, 40 rollback (recovery conflict), 53 resources,
    # 57P operator intervention, 58 system errors
    if code[:2] in {"08", "40", "53", "58"} or code.startswith("57P") or code in {"25P03", "25P04"}:
        return SourceUnavailable(f"Postgres ended the work (SQLSTATE {code}); run again.")
    return SourceRefused(f"Postgres refused a statement of ours (SQLSTATE {code}); the server's log has the details.")
