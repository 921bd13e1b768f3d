"""The client: events of a Flight server as Arrow, polars or pandas, whole or not at all.

What lives here: ``connect`` and what it returns, on top of stock ``pyarrow.flight``. What must not: what comes in (``received.py``), anything
only this package's server understands on the way in; every call here can be made with ``pyarrow.flight`` alone.

What it adds to ``pyarrow.flight``: tickets from arguments, errors of this package's tree in one sentence, and the receipt. A server
ends every whole stream with a receipt; a stream without one, or with other rows or another sum of event ids than its receipt says, is
``FlightUnavailable``, never a shorter table.

Profiles. ``connect(profile="compact")`` chooses how events travel: they arrive in fewer bytes and are turned back into the plain columns.
``read(profile="compact")`` chooses what you get: the compact columns as they came (UUIDs as 16 bytes, dictionaries).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import pyarrow as pa
from pyarrow import flight

from fraiseql_pipeline.encoding import Encoding
from fraiseql_pipeline.errors import FlightUnavailable, InputError, TicketError
from fraiseql_pipeline.flight.received import Receipt, Stream, facts_of, receipt_of, translated

if TYPE_CHECKING:
    import polars as pl

DEFAULT_URL = "grpc://localhost:50051"


class Asked(TypedDict, total=False):
    """What a ticket is made of, as arguments of ``Client.read``; ``ticket.py`` says what each means."""

    start: date | str
    end: date | str
    entity_types: Sequence[str] | str
    batch_size: int
    columns: Sequence[str]
    profile: str
    codec: str
    limit: int
    table_version: int
    allow_missing: bool
    after_pk: int
    follow: bool


class Tls(TypedDict, total=False):
    """What TLS needs, each PEM bytes or the path of a PEM file; see ``connect``."""

    tls_root_certs: str | bytes | Path | None
    cert_chain: str | bytes | Path | None
    private_key: str | bytes | Path | None


class Client:
    """A connection to a Flight server. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        profile: str | None = None,
        timeout_seconds: float | None = None,
        **tls: Unpack[Tls],
    ) -> None:
        self.url = url if "://" in url else f"grpc://{url}"
        if (tls.get("cert_chain") is None) != (tls.get("private_key") is None):
            # pyarrow takes no notice of the one without the other.
            raise InputError("cert_chain and private_key belong together; give both, or neither.")
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise InputError(f"timeout_seconds must be more than 0, or None for no limit, got {timeout_seconds}.")
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise InputError("A token must be printable ASCII without white space.")
        headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        if profile is not None:
            Encoding.named(profile)  # raises before the first call does
            headers.append((b"x-fraiseql-encoding", profile.encode()))
        self._options = flight.FlightCallOptions(headers=headers, timeout=timeout_seconds)
        files = {name: _pem(name, value) for name, value in tls.items() if value is not None}
        try:
            self._flight = flight.connect(self.url, **files)
        except (pa.ArrowException, OSError):  # nothing is asked of the server yet
            scheme, _, _ = self.url.partition("://")
            raise InputError(
                f"The URL of a Flight server must be grpc://host:port or grpc+tls://host:port; {scheme[:16]}:// with what follows is not."
            ) from None

    def stream(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> Stream:
        """The events of a ticket, batch by batch; see ``read`` for the arguments."""
        said = _ticket(ticket, **asked)
        with self._translated():
            reader = self._flight.do_get(flight.Ticket(said), self._options)
            return Stream(reader, reader.schema, self.url, plain=not _names_profile(said))

    def read(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> pa.Table:
        """The events of a ticket as one table, in (timestamp, pk) order.

        Either a ticket (``"events:Order:now-1h:now:5000"``) or what it is made of: ``start`` and ``end`` (a datetime, naive = UTC, a date, or an
        expression such as ``"now-1h"``; the end is exclusive and ``"now"`` when left out), ``entity_types`` (none: all),
        ``columns`` (none: the eight of an event), ``batch_size`` (most rows per batch), ``limit`` (most rows in all), ``allow_missing``
        (skip windows that are not published instead of failing), ``profile`` (``"compact"``: the columns as they travel), ``codec``,
        ``table_version``, ``after_pk`` (only events above that key). With ``follow`` the stream goes on as events settle: iterate over
        ``stream`` then, this would never return.

        Raises ``TicketError``, ``WindowMissing`` for a hole in the range, ``LakeEmpty``, or ``FlightUnavailable`` when the server cannot
        be reached or the stream broke off.
        """
        with self.stream(ticket, **asked) as stream:
            return stream.read_all()

    @contextmanager
    def exchange(self) -> Iterator[Exchange]:
        """One call for many tickets, whose streams have the same columns: what a program saves that reads small parts, one after the other."""
        with self._translated():
            writer, reader = self._flight.do_exchange(flight.FlightDescriptor.for_command(b""), self._options)
        exchange = Exchange(writer, reader, self.url)
        try:
            yield exchange
        finally:
            exchange.close()

    def polars(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> pl.DataFrame:
        """``read`` as a polars frame, without a copy."""
        import polars as pl

        return pl.DataFrame(self.read(ticket, **asked))

    def pandas(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> Any:
        """``read`` as a pandas frame; needs pandas installed."""
        return self.read(ticket, **asked).to_pandas()

    def info(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> Receipt:
        """What a read of the ticket would give now, without reading it."""
        with self._translated():
            descriptor = flight.FlightDescriptor.for_command(_ticket(ticket, **asked))
            found = self._flight.get_flight_info(descriptor, self._options)
            return receipt_of(facts_of(found.app_metadata), found.schema, None if found.total_records < 0 else found.total_records)

    def refresh(self) -> int | None:
        """Have the server follow the lake's log now; the table version it serves then, None while nothing is published. Needs ``admin``."""
        version: int | None = self._act("refresh", b"", "table_version")
        return version

    def warm(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> int:
        """Have the server encode the events of a ticket before anybody reads them; how many there are. Needs ``admin``."""
        rows: int = self._act("warm", _ticket(ticket, **asked), "rows")
        return rows

    def _act(self, name: str, body: bytes, wanted: str) -> Any:
        with self._translated():
            results = list(self._flight.do_action(flight.Action(name, body), self._options))
        try:
            return json.loads(results[0].body.to_pybytes())[wanted]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise FlightUnavailable(f"The server's answer to {name} cannot be read; is it a fraiseql-pipeline server?") from None

    def close(self) -> None:
        self._flight.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with translated(self.url):
            yield


class Exchange:
    """Streams of one call, one after the other; see ``Client.exchange``."""

    def __init__(self, writer: Any, reader: Any, url: str) -> None:
        self._writer = writer
        self._reader = reader
        self._url = url
        self._last: Stream | None = None

    def stream(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> Stream:
        """``Client.stream`` within the call. Raises ``InputError`` while the stream before has not been read to its end."""
        if self._last is not None and self._last.receipt is None:
            raise InputError(
                "A stream of an exchange must be read to its end before the next one is asked for; one that failed has ended the exchange, "
                "so open another."
            )
        said = _ticket(ticket, **asked)
        with translated(self._url):
            self._writer.write_metadata(said)
            schema = self._reader.schema
        self._last = Stream(self._reader, schema, self._url, plain=not _names_profile(said), alone=False)
        return self._last

    def read(self, ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> pa.Table:
        """``Client.read`` within the call."""
        return self.stream(ticket, **asked).read_all()

    def close(self) -> None:
        """End the call."""
        if self._last is None or self._last.receipt is None:
            self._reader.cancel()
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            self._writer.close()


def connect(
    url: str = DEFAULT_URL,
    *,
    token: str | None = None,
    profile: str | None = None,
    timeout_seconds: float | None = None,
    **tls: Unpack[Tls],
) -> Client:
    """A client of the Flight server at ``url``, ``grpc://host:port`` or ``grpc+tls://host:port``.

    ``token`` is sent with every call. For TLS: ``tls_root_certs``, the authorities to trust (the system's when left out), and for mutual
    TLS ``cert_chain`` and ``private_key``; each is PEM bytes, or the path of a PEM file. ``profile``: how events travel where a read says
    nothing else, such as ``compact`` or ``compact+lz4``, what it leaves out being the server's choice; they are turned back into the plain
    columns. ``timeout_seconds``: how long one call may take, a stream's last batch included; none: for ever. The connection is made by the
    first call.
    """
    return Client(url, token=token, profile=profile, timeout_seconds=timeout_seconds, **tls)


def _pem(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return Path(value).read_bytes()
    except OSError:
        raise InputError(f"{name} must be PEM bytes or the path of a PEM file that can be read, got {str(value)[:64]!r}.") from None


def _ticket(ticket: str | bytes | None = None, **asked: Unpack[Asked]) -> bytes:
    if ticket is not None:
        if asked:
            raise TicketError(f"A read takes a ticket or what it is made of, got a ticket and {', '.join(sorted(asked))}.")
        # A surrogate, as of bytes on a command line that are no UTF-8, is for who reads the ticket to refuse.
        return ticket.encode(errors="surrogatepass") if isinstance(ticket, str) else ticket
    if "start" not in asked:
        raise TicketError("A read needs a ticket, or at least a start such as 'now-1h'.")
    said: dict[str, Any] = {"type": "events", "end": "now", **asked}
    types = said.pop("entity_types", None) or "*"
    # One string is one type, whatever characters it has; only "*" stands for all.
    said["entity_type"] = types if types == "*" else [types] if isinstance(types, str) else list(types)
    for name in ("start", "end"):
        if isinstance(said[name], date):  # a datetime is one
            said[name] = said[name].isoformat()
    try:
        return json.dumps(said).encode()
    except (TypeError, ValueError, RecursionError):  # a number of numpy's, a list within itself
        raise TicketError(
            "The arguments of a read must be texts, times of datetime, whole numbers, flags and lists of texts, got "
            f"{', '.join(sorted(f'{name} of type {type(value).__name__}' for name, value in asked.items()))}."
        ) from None


def _names_profile(ticket: bytes) -> bool:
    """Whether a ticket says how its columns are to come; what is no JSON object cannot."""
    try:
        said = json.loads(ticket)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("profile") is not None
