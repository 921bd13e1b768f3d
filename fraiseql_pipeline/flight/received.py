"""What a client receives: batches, the receipt that proves them whole, and errors.

What lives here: ``Stream``, ``Receipt``, and what the errors of ``pyarrow.flight`` mean. What must not: what a client asks (``client.py``),
the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import flight

from fraiseql_pipeline import errors
from fraiseql_pipeline.encoding import checksum, plain_schema, to_plain
from fraiseql_pipeline.errors import (
    FlightBusy,
    FlightRefused,
    FlightUnavailable,
    InputError,
    LakeDamaged,
    LakeEmpty,
    NotAllowed,
    NotAuthenticated,
    NotOffered,
    PipelineError,
    TicketError,
)
from fraiseql_pipeline.window import as_utc


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a server says about a stream.

    ``rows``: events in it; None in an ``info`` where neither commits nor kept frames tell: they do for whole windows, and for what
    was read before. ``complete_through``: the published windows end here; events of the asked range after it will come later.
    ``provisional_windows`` may still get events of transactions that were open, ``missing_windows`` were holes the ticket allowed.
    ``schema``: the stream's columns. ``settled_pk``: every event of the range up to this key is in. ``checksum``: the sum of the
    event ids (``encoding.checksum``), None where they were not sent. ``next_ticket`` reads what comes after this; None behind a
    ``limit``, and in an ``info`` where a log is followed. ``table_version`` is None while nothing is published.
    """

    rows: int | None
    table_version: int | None
    complete_through: datetime
    provisional_windows: int
    missing_windows: int
    schema: pa.Schema
    settled_pk: int | None = None
    checksum: int | None = None
    next_ticket: str | None = None

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """What of it a table keeps, for the metadata of its schema; what is None is left out."""
        said = {name: getattr(self, name) for name in KEPT}
        return {
            f"fraiseql.{name}".encode(): (value.isoformat() if isinstance(value, datetime) else str(value)).encode()
            for name, value in said.items()
            if value is not None
        }


#: Of a receipt, what is true of a table as long as it exists; its rows and columns a table says itself.
KEPT = ("table_version", "complete_through", "settled_pk", "provisional_windows", "missing_windows", "next_ticket")


class Stream:
    """The batches of a stream, once, in order. ``receipt`` is there when they have all been read.

    Of a stream that follows, ``settled_pk`` says up to which key everything has come: a stream that broke goes on behind it with
    ``after_pk``. What came since then comes again.

    Also an Arrow C stream, so polars, DuckDB and every other Arrow consumer read it without a copy and without holding it whole.
    """

    def __init__(self, reader: Any, schema: pa.Schema, url: str, *, plain: bool = True, alone: bool = True) -> None:
        compact = (schema.metadata or {}).get(b"fraiseql.encoding", b"").startswith(b"compact")
        self.receipt: Receipt | None = None
        self.settled_pk: int | None = None
        self._reader = reader
        self._url = url
        self._rows = 0
        self._checksum = 0
        self._decodes = plain and compact
        self._alone = alone
        try:
            self.schema = plain_schema(schema) if self._decodes else schema
        except KeyError:
            raise self._broken("has columns that no event has") from None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        while self.receipt is None:
            chunk = self._chunk()
            if chunk is None:
                raise self._broken("ended without its receipt")
            rows = chunk.data.num_rows if chunk.data is not None else 0
            taken = self._taken(chunk.data) if rows else None
            self._rows += rows
            if chunk.app_metadata is not None:
                self._note(chunk.app_metadata.to_pybytes())
            if taken is not None:
                return taken
        raise StopIteration

    def _taken(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The events of a message, counted into the sum of ids."""
        try:
            self._checksum = (self._checksum + (checksum(batch) or 0)) % 2**64
            return to_plain(batch) if self._decodes else batch
        except (
            pa.ArrowException,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
        ):  # columns of other types, or nulls among ids
            raise self._broken("cannot be read as events") from None

    def _chunk(self) -> Any:
        with translated(self._url):
            try:
                return self._reader.read_chunk()
            except StopIteration:
                return None

    def _note(self, metadata: bytes) -> None:
        """What the metadata of a message says: how far a stream that follows has come, or that it is whole."""
        facts = facts_of(metadata)
        self.settled_pk = _number(facts.get("settled_pk"))
        if "rows" not in facts:
            return
        receipt = receipt_of(facts, self.schema)
        if receipt.rows != self._rows:
            raise self._broken(f"does not match its receipt of {receipt.rows} events")
        if receipt.checksum is None and "event_id" in self.schema.names:
            raise self._broken("has no sum of event ids in its receipt")
        if receipt.checksum not in {None, self._checksum}:
            raise self._broken("has other event ids than its receipt says")
        # The end of the stream carries its status: only now is it known that the server agrees.
        if self._alone and self._chunk() is not None:
            raise self._broken("goes on after its receipt")
        self.receipt = receipt

    def read_all(self) -> pa.Table:
        """The batches that are left, as a table; the metadata of its schema keeps what the receipt says (``fraiseql.complete_through``, …)."""
        table = pa.Table.from_batches(self, schema=self.schema)
        kept = {} if self.receipt is None else self.receipt.metadata
        return table.replace_schema_metadata({**(table.schema.metadata or {}), **kept})

    def close(self) -> None:
        """Tell the server that nothing more is wanted."""
        if self.receipt is None:
            self._reader.cancel()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.RecordBatchReader.from_batches(self.schema, self).__arrow_c_stream__(requested_schema)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _broken(self, what: str) -> FlightUnavailable:
        return FlightUnavailable(f"The stream from {self._url} {what} after {self._rows} events; read it again.")


def facts_of(metadata: bytes) -> dict[str, Any]:
    """The JSON object that accompanies a message or a ``FlightInfo``. Raises ``FlightUnavailable``."""
    try:
        facts = json.loads(metadata)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise _unreadable()
    return facts


def receipt_of(facts: dict[str, Any], schema: pa.Schema, rows: int | None = None) -> Receipt:
    """The receipt out of ``facts_of``; ``rows`` where they say none. Raises ``FlightUnavailable``."""
    try:
        following = facts.get("next_ticket")
        if not isinstance(following, str | None):
            raise _unreadable()
        return Receipt(
            rows=_number(facts.get("rows", rows)),
            table_version=_number(facts["table_version"]),
            complete_through=as_utc(datetime.fromisoformat(facts["complete_through"])),
            provisional_windows=_whole(facts["provisional_windows"]),
            missing_windows=_whole(facts["missing_windows"]),
            schema=schema,
            settled_pk=_number(facts.get("settled_pk")),
            checksum=_number(facts.get("checksum")),
            next_ticket=following,
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        raise _unreadable() from None


def _number(said: object) -> int | None:
    return None if said is None else _whole(said)


def _whole(said: object) -> int:
    """A whole number of a receipt. Raises ``FlightUnavailable``."""
    if type(said) is int:
        return said
    raise _unreadable()


def _unreadable() -> FlightUnavailable:
    return FlightUnavailable("The server's receipt cannot be read; is it a fraiseql-pipeline server?")


# pyarrow has a class for some statuses and only words for the others; the sentence of the server follows "with message: ".
_SENTENCE = re.compile(
    r"with message: (.*?)(?:\.? ?gRPC client debug context: .*|\.? ?Client context: .*|\.? ?Detail: .*)?", re.DOTALL
)
_KINDS: tuple[tuple[str, type[PipelineError]], ...] = (
    ("invalid argument error", TicketError),
    ("precondition failed error", FlightRefused),
    ("not found error", LakeEmpty),
    ("resource exhausted error", FlightBusy),
    ("data loss error", LakeDamaged),
    ("unimplemented error", NotOffered),
    # The same call fails the same way: whoever runs the server finds out why.
    ("internal error", FlightRefused),
)
# Of the errors that are no other code's, the server names the class: what asks for other data or another setup, and not for another try.
_DETAIL = re.compile(r"\.? ?Detail: (\w+)")
_NAMED = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, PipelineError) and not kind.retryable
}
# What gRPC says of a connection that does not come about, with which scheme, and what that means; the first that fits. A server that refuses
# a certificate, or speaks TLS to a client that does not, only hangs up, as one that is being stopped does: another try may help.
_NOT_CONNECTED: tuple[tuple[str, str, type[PipelineError], str], ...] = (
    (
        r"failed to connect.*wrong version number",
        "grpc+tls",
        FlightRefused,
        "The server at {url} does not speak TLS; connect to it with grpc://, or serve it with FRAISEQL_ARROW_FLIGHT_TLS_CERT and its key.",
    ),
    (
        r"failed to connect.*Peer name .* is not in peer certificate",
        "grpc+tls",
        FlightRefused,
        "The certificate of the server at {url} is not for that host; connect to it by a name or an address that its subjectAltName lists.",
    ),
    (
        r"failed to connect.*certificate (has expired|is not yet valid)",
        "grpc+tls",
        FlightRefused,
        "The certificate of the server at {url} has expired or is not valid yet; whoever runs the server renews it, or a clock is wrong.",
    ),
    (
        r"failed to connect.*Ssl handshake failed",
        "grpc+tls",
        FlightRefused,
        (
            "The certificate of the server at {url} is not one this client trusts; name the PEM file of the authority that signed it with "
            "tls_root_certs (--tls-root-certs)."
        ),
    ),
    (
        r"failed to connect.*(Socket closed|Connection reset)",
        "grpc+tls",
        FlightUnavailable,
        (
            "The server at {url} ended the TLS handshake: it seems to ask for a client certificate; give one that its authority has signed "
            "for clients and that has not expired with cert_chain and private_key (--cert-chain, --private-key)."
        ),
    ),
    (
        r"failed to connect.*(Socket closed|Connection reset)",
        "grpc",
        FlightUnavailable,
        "The server at {url} hung up at once: it seems to speak TLS; connect to it with grpc+tls://.",
    ),
    (
        "empty address list",
        "grpc+tls",
        InputError,
        (
            "The TLS files for {url} cannot be used: each must be PEM, and private_key (--private-key) the key of the first certificate in "
            "cert_chain (--cert-chain)."
        ),
    ),
    (
        "errors resolving",
        "",
        FlightUnavailable,
        "The host of {url} is not known here; check its name, or try again if names are not found right now.",
    ),
    ("failed to connect", "", FlightUnavailable, "No Flight server answers at {url}; start one with fraiseql-pipeline serve."),
)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """An error of ``pyarrow.flight`` becomes one of this package's tree, with the sentence of the server."""
    try:
        yield
    except (flight.FlightError, pa.ArrowException, OSError) as error:
        text = str(error)
        found = _SENTENCE.fullmatch(text, text.find("with message: "))
        sentence = found[1] if found else ""
        head = text.partition("with message: ")[0]
        if isinstance(error, flight.FlightUnauthenticatedError):
            raise NotAuthenticated(sentence) from None
        if isinstance(error, flight.FlightUnauthorizedError):
            raise NotAllowed(sentence) from None
        for words, kind in _KINDS:
            if found and sentence and words in head:
                detail = _DETAIL.match(text, found.end(1))
                raise _NAMED.get(detail[1] if detail else "", kind)(sentence) from None
        # The server has words of its own for a call that it cuts.
        if isinstance(error, flight.FlightTimedOutError) and "Deadline Exceeded" in sentence:
            raise FlightUnavailable(
                f"A call to the Flight server at {url} took longer than the timeout_seconds it was given; give more, or read a smaller range."
            ) from None
        if isinstance(error, flight.FlightUnavailableError):
            for words, scheme, not_connected, why in _NOT_CONNECTED:
                if re.search(words, sentence, re.DOTALL) and url.startswith(scheme):
                    raise not_connected(why.format(url=url)) from None
        raise FlightUnavailable(f"The Flight server at {url} failed: {sentence or 'the connection broke off'}") from None
