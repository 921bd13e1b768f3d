"""The Flight RPCs: what each of them answers.

What lives here: requests in, answers out, one method per RPC. What must not: sockets, signals and processes (``server.py``), errors
as statuses (``status.py``), which windows a ticket covers (``plan.py``).

Invariants
 1. Every RPC of the protocol is answered: the ones not offered with UNIMPLEMENTED and a sentence that says which are.
 2. ``now`` is resolved once per request. As an end it is no time where a log is followed: a stream ends at a key (``plan.py``).
 3. What a caller gets, counts included, is of its tenant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fraiseql_pipeline.encoding import Encoding, receipt_frames, stream_schema
from fraiseql_pipeline.errors import LakeEmpty, PipelineError, TicketError
from fraiseql_pipeline.flight import limits, protocol, session
from fraiseql_pipeline.flight.auth import PUBLISH, READ
from fraiseql_pipeline.flight.edge import MAX_REQUEST_BYTES, Call, Edge, not_offered
from fraiseql_pipeline.flight.exchange import exchange
from fraiseql_pipeline.flight.follow import follow
from fraiseql_pipeline.flight.frames import FrameStore
from fraiseql_pipeline.flight.live import Live
from fraiseql_pipeline.flight.plan import Plan, plan
from fraiseql_pipeline.flight.protocol import parse
from fraiseql_pipeline.flight.signing import Signer
from fraiseql_pipeline.flight.stream import FrameStreams, Sender, Sent
from fraiseql_pipeline.flight.view import View, Views
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket

_OFFERED = "DoGet, DoExchange, GetFlightInfo, PollFlightInfo, GetSchema, ListFlights, DoAction, ListActions and Handshake"
_HOW_TO_UPLOAD = "with FRAISEQL_ARROW_FLIGHT_UPLOADS=true and a FRAISEQL_DATABASE_URL it takes events by DoPut"

#: The request header that names an encoding for tickets that leave it open.
ENCODING_HEADER = "x-fraiseql-encoding"

#: Tells a client that the server it asked is one of an endpoint's locations (Flight.rst, "Location URIs").
_THIS_CONNECTION = "arrow-flight-reuse-connection://?"

#: Bytes that a request may have around an endpoint it brings back: the messages of a renewal have some 30.
_AROUND_ENDPOINT_BYTES = 1024

#: A lake of two days is opened in 20 ms; the first reader of a server that has just started would wait for it.
_LOOK_AHEAD_SECONDS = 1.0

_BEGINNING = datetime.min.replace(tzinfo=UTC)

#: Where an endless ticket ends: events may be as far ahead of the clock as they like.
_FOR_EVER = datetime.max.replace(tzinfo=UTC)


def _now() -> datetime:
    return datetime.now(UTC)


class FlightService:
    """Answers Flight requests over one lake."""

    def __init__(self, settings: Settings, lake: Lake) -> None:
        self._settings = settings
        self._views = Views(lake)
        directory = settings.arrow_flight_cache_dir
        self.store = FrameStore(settings.arrow_flight_cache_bytes, None if directory is None else Path(directory))
        self._streams = FrameStreams(self.store)
        self._signer = Signer(settings.arrow_flight_ticket_key, timedelta(seconds=settings.arrow_flight_ticket_seconds))
        self._encoding = Encoding.parse(settings.arrow_flight_encoding)
        follows = settings.arrow_flight_live and settings.database_url is not None
        self.live = Live(settings, lake, self._views, self.store) if follows else None

    def start(self) -> None:
        """Follow the change log, if there is one, and look at the lake before somebody asks for it; one that is slow is not waited for."""
        if self.live is not None:
            self.live.start()
        looking = threading.Thread(target=self._look_ahead, name="lake-ahead", daemon=True)
        looking.start()
        looking.join(_LOOK_AHEAD_SECONDS)

    def _look_ahead(self) -> None:
        # Of the first batch that a new server sends, opening the table and sorting its files and windows is a third.
        with suppress(PipelineError):
            _ = self._views.newest().unit_rows

    def stop_following(self) -> None:
        """Streams that follow end with their receipts; nothing is waited for."""
        if self.live is not None:
            self.live.end()

    def close(self) -> None:
        """Give the disk space of the kept frames back. Streams that are still running end in an error."""
        if self.live is not None:
            self.live.close()
        self.store.close()

    def handlers(self, edge: Edge, put: Callable[[Iterator[bytes], Call], Iterator[bytes]] | None = None) -> dict[str, Any]:
        """RPC → handler. Messages pass as bytes: frames must not go through protobuf again. ``put`` takes uploads; None: nothing does."""
        return {
            "DoGet": edge.many("DoGet", self.do_get, use="stream"),
            "GetFlightInfo": edge.one("GetFlightInfo", self.get_flight_info),
            "GetSchema": edge.one("GetSchema", self.get_schema),
            "ListFlights": edge.many("ListFlights", self.list_flights),
            "DoPut": edge.both("DoPut", put or not_offered("DoPut", f"{_OFFERED}; {_HOW_TO_UPLOAD}"), PUBLISH, uploads=True),
            "DoExchange": edge.both(
                "DoExchange", lambda requests, call: exchange(requests, call, self.planned, self.messages), READ
            ),
        }

    def do_get(self, request: bytes, call: Call) -> Iterator[bytes]:
        """The events of a ticket; see ``messages``."""
        yield from self.messages(self.planned(parse(protocol.Ticket, request).ticket, call), call)

    def planned(self, asked: bytes, call: Call) -> Plan:
        """The plan of a ticket that the call streams next."""
        call.streams(asked)
        return self._plan(self._ticket(asked, call), call)

    def messages(self, decided: Plan, call: Call) -> Iterator[bytes]:
        """The stream of a plan: the schema, the batches, and a batch without rows that carries the receipt as its metadata.

        The receipt is a JSON object: ``rows`` and ``checksum`` (``encoding.checksum``; null where ``event_id`` is not sent) of the whole
        stream, and the facts of ``Plan.metadata``.
        """
        sent = Sent(call.count, call.presence)
        if decided.ticket.follow and self.live is not None:
            decided = yield from self._followed(decided, sent, call, self.live)
        else:
            with closing(self._streams.messages(decided, self._max_rows(decided.ticket), sent)) as messages:
                yield from messages
        ids = "event_id" in decided.schema.names
        receipt = decided.metadata(rows=sent.rows, checksum=sent.checksum if ids else None)
        yield from receipt_frames(decided.stream_schema, receipt, first=not sent.rows)

    def _followed(self, decided: Plan, sent: Sent, call: Call, live: Live) -> Generator[bytes, None, Plan]:
        if call.running is not None:
            call.running.advice = 'read on with "after_pk", the last "settled_pk" you got'
        sender = Sender(decided, self._max_rows(decided.ticket), sent)
        # Well before it would be cut.
        seconds = 0.9 * self._settings.arrow_flight_max_stream_seconds
        return (
            yield from follow(
                decided,
                lambda ticket: self._plan(ticket, call),
                live,
                self._streams,
                sender,
                call.context.is_active,
                call.has_room,
                seconds,
            )
        )

    def get_flight_info(self, request: bytes, call: Call) -> bytes:
        """Schema, rows and bytes where commits or kept frames tell them, and endpoints in order whose tickets name the same events
        of the same version.
        """
        descriptor = parse(protocol.FlightDescriptor, request)
        return self._info(descriptor, self._plan(self._described(descriptor, call), call), call).SerializeToString()

    def get_schema(self, request: bytes, call: Call) -> bytes:
        """The schema of the stream a descriptor's ticket gets."""
        ticket = self._described(parse(protocol.FlightDescriptor, request), call)
        encoding = self._encoding_of(self._chosen(ticket, call))
        return protocol.SchemaResult(schema=stream_schema(ticket.columns, encoding).serialize().to_pybytes()).SerializeToString()

    def list_flights(self, request: bytes, call: Call) -> Iterator[bytes]:
        """One flight per stretch of published windows without a hole, oldest first; none while the lake is empty.

        What is more than one ticket may ask is listed all the same: a part of it may be asked for. Criteria are a ticket, in any of
        its forms, or a part of a JSON ticket: then each flight is what the ticket asks of a stretch.
        """
        expression = parse(protocol.Criteria, request).expression
        asked = self._ticket(expression, call, partial=True) if expression else None
        try:
            view = self._views.newest() if asked is None else self._views.of(asked)
        except LakeEmpty:
            return
        for first, last in view.stretches():
            start, end = (first, last) if asked is None else (max(first, asked.start), min(last, asked.end))
            if start >= end:
                continue
            named = (
                Ticket(start=start, end=end) if asked is None else replace(asked, start=start, end=end, endless=False, follow=False)
            )
            descriptor = protocol.FlightDescriptor(type=protocol.CMD, cmd=named.text.encode())
            yield self._info(descriptor, self._decided(named, call, view), call).SerializeToString()

    def renewed(self, endpoint: Any, call: Call) -> Any:
        """The endpoint with a ticket that lives longer. Raises ``TicketError`` for one that is not valid any more."""
        ticket = self._ticket(endpoint.ticket.ticket, call)
        return self._endpoint(ticket, call)

    def warm(self, data: bytes, call: Call) -> int:
        """Encode the frames of a ticket before anybody reads them; how many events they hold. None of them counts as sent."""
        decided = self._plan(self._ticket(data, call), call)
        sent = Sent(lambda _: None, call.presence)
        with closing(self._streams.messages(decided, self._max_rows(decided.ticket), sent)) as messages:
            for _ in messages:
                if not call.context.is_active():
                    break
        return sent.rows

    def _info(self, descriptor: Any, decided: Plan, call: Call) -> Any:
        # Which frames are kept tells whether the files of the range are the same as before: whether others' events were late.
        told = decided.org_id is None or decided.view.live is None
        totals = self._streams.totals_of(decided, self._max_rows(decided.ticket)) if told else None
        kept_rows, size = totals or (None, -1)
        # Frames of what is not published yet are those of now: there may be more when an endpoint is asked for.
        rows = kept_rows if decided.rows is None and decided.view.live is None else decided.rows
        # What has settled grows until an endpoint is asked for: only a stream knows from which key to go on.
        unknown = {} if decided.view.live is None else {"next_ticket": None}
        return protocol.FlightInfo(
            schema=decided.stream_schema.serialize().to_pybytes(),
            flight_descriptor=descriptor,
            endpoint=[self._endpoint(part.pinned_ticket(), call) for part in decided.parts()],
            total_records=-1 if rows is None else rows,
            total_bytes=size,
            ordered=True,
            app_metadata=decided.metadata(**unknown),
        )

    def _endpoint(self, ticket: Ticket, call: Call) -> Any:
        signed, until = self._signer.sign(ticket, call.caller.name, _now())
        others = self._settings.locations
        endpoint = protocol.FlightEndpoint(
            ticket=protocol.Ticket(ticket=signed),
            location=[protocol.Location(uri=uri) for uri in ((_THIS_CONNECTION, *others) if others else ())],
        )
        endpoint.expiration_time.FromDatetime(until)
        if endpoint.ByteSize() > MAX_REQUEST_BYTES - _AROUND_ENDPOINT_BYTES:
            raise TicketError(
                f"A ticket of {len(ticket.json.encode())} bytes cannot be signed: what is signed is larger, and a request must not have more "
                f"than {MAX_REQUEST_BYTES} bytes. Ask DoGet for it as it is, or name fewer entity types."
            )
        return endpoint

    def _plan(self, ticket: Ticket, call: Call) -> Plan:
        decided = self._decided(ticket, call, self._view(ticket))
        limits.check(decided, self._settings)
        return decided

    def _view(self, ticket: Ticket) -> View:
        if self.live is None or ticket.table_version is not None:
            return self._views.of(ticket)
        if (view := self.live.view(ticket)) is not None:
            return view
        try:
            return self._views.of(ticket)
        except LakeEmpty:
            raise self.live.away("Nothing is published in the lake yet, and the change log cannot be followed") from None

    def _decided(self, ticket: Ticket, call: Call, view: View) -> Plan:
        chosen = self._chosen(ticket, call)
        return plan(
            # Not with the encoding: the ticket is read on with (``next_ticket``), over a connection that chooses for itself, and there it
            # would be one that the reader had named.
            replace(ticket, batch_size=chosen.batch_size),
            view,
            first=self._settings.first_window,
            size=self._settings.window,
            org_id=call.org_id,
            encoding=self._encoding_of(chosen),
            followed=self.live is not None,
        )

    def _max_rows(self, ticket: Ticket) -> int:
        return ticket.batch_size or self._settings.arrow_flight_batch_size

    def _described(self, descriptor: Any, call: Call) -> Ticket:
        """The ticket in a command, or of a path: ``events`` or ``events/<entity types>`` is all that is published.

        Where a log is followed, it has no end: all since the first published window, and all there is while nothing is published.
        """
        if descriptor.type == protocol.CMD:
            return self._ticket(descriptor.cmd, call)
        if descriptor.type != protocol.PATH or not 1 <= len(descriptor.path) <= 2:
            raise TicketError("A descriptor must be a command that holds a ticket, or a path of events or events/<entity types>.")
        name, types = (*descriptor.path, "*")[:2]
        if name != "events":
            raise TicketError(f"A path must start with events, got {name[:64]!r}.")
        wanted = () if types == "*" else tuple(types.split("|"))
        try:
            start, end = self._views.newest().extent
        except LakeEmpty:
            if self.live is None:
                raise
            start, end = _BEGINNING, _FOR_EVER
        endless = self.live is not None
        return Ticket(start=start, end=_FOR_EVER if endless else end, entity_types=wanted, endless=endless)

    def _ticket(self, data: bytes, call: Call, *, partial: bool = False) -> Ticket:
        now = _now()
        ticket = Ticket.parse(self._signer.opened(data, call.caller.name, now), now, partial=partial)
        if ticket.follow:
            self._check_follow(ticket, now)
        if self.live is not None and ticket.end == now and ticket.table_version is None:
            # What settles later happened later, or its clock is ahead of this one: how far a stream reaches is said by its key.
            return replace(ticket, end=_FOR_EVER, endless=True)
        return ticket

    def _check_follow(self, ticket: Ticket, now: datetime) -> None:
        if self.live is None:
            raise TicketError(
                'This server sends events that are published; leave "follow" out of the ticket. It follows a change log where '
                "FRAISEQL_DATABASE_URL is set."
            )
        if ticket.end < now or ticket.table_version is not None:
            raise TicketError('A ticket with "follow" must end now or later, and name no "table_version".')

    def _encoding_of(self, chosen: Ticket) -> Encoding:
        return Encoding(chosen.profile or self._encoding.profile, chosen.codec or self._encoding.codec)

    def _chosen(self, ticket: Ticket, call: Call) -> Ticket:
        """The ticket with what it leaves open and the call's header, then its session, say."""
        for named in call.header(ENCODING_HEADER)[-1:]:
            profile, codec = Encoding.named(named)
            ticket = replace(ticket, profile=ticket.profile or profile, codec=ticket.codec or codec)
        return session.filled(ticket, session.from_cookies(call.header("cookie")))
