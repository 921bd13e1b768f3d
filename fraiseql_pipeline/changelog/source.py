"""``ChangeLog``: the change log of one database, as the rest of the package sees it.

What lives here: opening it, and the calls. What must not: how any of them is done (``preflight.py``, ``settle.py``, ``read.py``,
``counts.py``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime
from typing import TypeVar

import psycopg
import pyarrow as pa

from fraiseql_pipeline.changelog import counts, embedded
from fraiseql_pipeline.changelog.append import Appended, Appender
from fraiseql_pipeline.changelog.connection import connect
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.counts import Audit, Late
from fraiseql_pipeline.changelog.preflight import preflight
from fraiseql_pipeline.changelog.read import Readers
from fraiseql_pipeline.changelog.samples import fill
from fraiseql_pipeline.changelog.settle import Settlement, settle
from fraiseql_pipeline.changelog.tail import Tail
from fraiseql_pipeline.errors import SettingsError, SourceUnavailable
from fraiseql_pipeline.settings import Settings, unknown_variables
from fraiseql_pipeline.window import Window

_T = TypeVar("_T")


class ChangeLog:
    """The change log behind a URL. Made by ``open_changelog``; safe to use from several threads.

    The control connection is opened by the first call that needs it, and again after it broke: at once where it was ended between two calls.
    Those that read are kept between windows.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.settings = settings
        self._lock = threading.RLock()
        self._open = ExitStack()
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._contract: Contract | None = None
        self._readers = Readers(url, settings)
        self._appender = Appender(url)

    def close(self) -> None:
        self._readers.close()
        self._appender.close()
        self._disconnect()

    def preflight(self) -> Contract:
        """Proves anew that the source can be read whole. Raises ``SourceRefused`` (says what to change) or ``SourceUnavailable``."""
        self._contract = None
        return self._proved()

    def settle(self, windows_end: datetime | None = None) -> Settlement:
        """What can be published now; waits for open writers. ``windows_end``: end of the newest window wanted.

        Raises ``SettleTimeout``, which carries the blockers, and what ``preflight`` raises.
        """
        contract = self._proved()
        return self._ask(lambda connection: settle(connection, contract, self.settings, windows_end))

    def read(
        self, window: Window, settlement: Settlement, *, after_pk: int | None = None
    ) -> AbstractContextManager[Iterator[pa.RecordBatch]]:
        """The settled events of a window as batches of ``BATCH_SCHEMA``, ordered by (timestamp, pk) over the whole iterator.

        ``after_pk`` leaves out the events up to that key: the late ones remain. Raises ``SourceUnavailable`` when the stream breaks; it
        never ends early.
        """
        return self._readers.read(self._proved(), window, settlement.settled_pk, after_pk)

    def late(self, published: Mapping[Window, int], after_pk: int = 0) -> list[Late]:
        """Published windows (→ settled pk of their commit) with events above it; see ``counts.late``."""
        if not published:
            return []
        contract = self._proved()
        return self._ask(lambda connection: counts.late(connection, contract, published, after_pk))

    def audit(self, window: Window, settled_pk: int) -> Audit:
        """What the source holds of a window up to a settled pk."""
        self._proved()
        return self._ask(lambda connection: counts.audit(connection, window, settled_pk))

    @contextmanager
    def tail(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[Tail]:
        """Follows the log on connections of its own. ``given_up``: whether a wait for open writers shall end."""
        contract = self.preflight()
        with connect(self.url, statement_timeout_seconds=self.settings.read_timeout_seconds) as connection:
            yield Tail(connection, contract, self._readers, self.settings.settle_timeout_seconds, given_up)

    def where(self) -> str:
        """Database, server and role as the connection has them, to be shown to who asks; never a password."""
        return self._ask(_where)

    def unplaced(self) -> int:
        """Rows that belong to no window: ``created_at`` is null, infinite or outside the years 1 to 9999."""
        self._proved()
        return self._ask(counts.unplaced)

    def count(self) -> int:
        """How many rows the log holds; reads all of it."""
        self._proved()
        return self._ask(counts.count)

    def span(self) -> tuple[datetime, datetime]:
        """The first and the last time of an event that has one. Raises ``SourceRefused`` when there is none."""
        self._proved()
        return self._ask(counts.span)

    def hours_from(self, start: datetime, most: int) -> list[datetime]:
        """The hours that have events at ``start`` or later, oldest first, at most so many: what was written ahead of the clock."""
        contract = self._proved()
        return self._ask(lambda connection: counts.hours_from(connection, contract, start, most))

    def append(self, events: pa.RecordBatch, producer: str) -> Appended:
        """Insert events that the log does not hold yet, in one transaction on a connection of its own; see ``append.Appender``."""
        return self._appender.append(events, producer)

    def _proved(self) -> Contract:
        with self._lock:
            if self._contract is None:
                self._contract = self._ask(preflight)
            return self._contract

    def _disconnect(self) -> None:
        with self._lock:
            self._open.close()
            self._connection = None

    def _ask(self, question: Callable[[psycopg.Connection[tuple[object, ...]]], _T]) -> _T:
        with self._lock:
            kept = self._connection
            if kept is not None and not kept.closed:
                try:
                    return question(kept)
                except SourceUnavailable:
                    # Servers and firewalls end what is idle for long (idle_session_timeout). Every question only reads, so it can
                    # be asked again.
                    if not kept.closed:
                        raise
            self._disconnect()
            self._connection = self._open.enter_context(
                connect(self.url, statement_timeout_seconds=self.settings.read_timeout_seconds)
            )
            return question(self._connection)


def _where(connection: psycopg.Connection[tuple[object, ...]]) -> str:
    info = connection.info
    server = "a Unix socket" if info.host.startswith("/") else f"{info.host}:{info.port}"
    return f"database {info.dbname} on {server} as {info.user}"


@contextmanager
def open_changelog(settings: Settings, *, create: bool = False, samples: bool = False) -> Iterator[ChangeLog]:
    """The change log of ``settings.database_url``; touches nothing until it is asked.

    Where no URL is set: the embedded one under the working directory, its server started or joined. Where there is none either,
    ``samples`` has it made and filled with sample events; without ``samples``, and where the lake is in an object store or a
    variable looks like a misspelt URL, nobody wants made-up events, and there is a ``SettingsError``. ``create`` makes the contract
    where it is missing, wherever the log is, and writes no events.
    """
    with ExitStack() as stack:
        url = settings.database_url
        if url is None:
            url = _embedded(stack, settings, create=create, samples=samples)
        elif create:
            fill.create_contract(url)
        changelog = ChangeLog(url, settings)
        stack.callback(changelog.close)
        yield changelog


def _embedded(stack: ExitStack, settings: Settings, *, create: bool, samples: bool) -> str:
    for name, meant in unknown_variables(os.environ).items():
        if meant == "FRAISEQL_DATABASE_URL":
            raise SettingsError(f"{name} is not a setting; did you mean {meant}?")
    if "://" in settings.lake_uri.removeprefix("file://"):
        samples = False
    if create or samples or embedded.exists():
        events = fill.EMBEDDED_EVENTS if samples and not create else 0
        url = fill.embedded_changelog(stack.enter_context(embedded.start()), create=create, events=events)
        if url is not None:
            return url
    raise SettingsError("FRAISEQL_DATABASE_URL is not set; set it, or try sample events with `fraiseql-pipeline sample`.")


@contextmanager
def scratch_changelog(settings: Settings) -> Iterator[ChangeLog]:
    """An empty change log in a database of its own, on the server of the settings or the embedded one, dropped at the end."""
    with ExitStack() as stack:
        server = settings.database_url or stack.enter_context(embedded.start())
        url = stack.enter_context(fill.scratch_database(server))
        changelog = ChangeLog(url, settings.model_copy(update={"database_url": url}))
        stack.callback(changelog.close)
        yield changelog
