"""The edge: the one place every RPC passes, on its way in and on its way out.

What lives here: who calls, whether they may, how many may, what is counted and written down, and that a failure becomes a status. What
must not: an answer (``service.py``, ``actions.py``), a status code (``status.py``).

Invariants
 1. No method runs, and no request is waited for, before its caller is authenticated, has the scope and a slot; what a method gets is a
    ``Call``, never the bare connection.
 2. Every call is counted once and written to the audit log once, whatever became of it, also when its client has gone.
 3. No request above ``MAX_REQUEST_BYTES`` is parsed, whatever gRPC lets in for uploads.
 4. Every RPC is a stream both ways to gRPC, which is the same on the wire. Of other kinds gRPC itself would wait for the request, in a thread
    that no limit counts, and keep an answer that nobody takes in memory.
 5. The answers of a call are closed when it ends, so that files, snapshots and slots are free.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc

from fraiseql_pipeline.errors import InputError, NotAllowed, NotAuthenticated, NotOffered, PipelineError
from fraiseql_pipeline.flight import limits, status
from fraiseql_pipeline.flight.audit import AuditLog
from fraiseql_pipeline.flight.auth import READ, Authenticator, Caller
from fraiseql_pipeline.flight.limits import Running, Slots, Use
from fraiseql_pipeline.flight.metrics import Metrics
from fraiseql_pipeline.flight.presence import ClientGone, Presence

_log = logging.getLogger(__name__)

#: Every RPC of the protocol, as metrics and the audit log call it.
METHODS = (
    "Handshake",
    "ListFlights",
    "GetFlightInfo",
    "PollFlightInfo",
    "GetSchema",
    "DoGet",
    "DoPut",
    "DoExchange",
    "DoAction",
    "ListActions",
)

#: Bytes of a request, but for an upload's: a ticket has a few hundred.
MAX_REQUEST_BYTES = 256 * 1024

#: The scope of a call that finds out itself which one it needs.
ANY = ""

_NOBODY = Caller("", None, frozenset())


@dataclass(slots=True)
class Call:
    """One call: for whom it is made, and what is said of it when it is over. Methods call ``count`` and set ``action``.

    ``running.names`` are the bytes under which ``CancelFlightInfo`` finds this call.
    """

    method: str
    context: grpc.ServicerContext
    max_rows: int | None = None
    caller: Caller = _NOBODY
    action: str | None = None
    rows: int = 0
    sent_bytes: int = 0
    reason: str | None = None
    running: Running | None = None
    _rows_before: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    began: float = field(default_factory=time.monotonic)

    @property
    def org_id(self) -> str | None:
        """The tenant whose events the caller may have; None: all."""
        return self.caller.org_id

    @property
    def presence(self) -> Presence:
        """Of its client."""
        assert self.running is not None
        return self.running.presence

    def need(self, scope: str) -> None:
        """Raises ``NotAllowed`` unless the caller has the scope."""
        if scope not in {ANY, *self.caller.scopes}:
            what = f"{self.method} {self.action}" if self.action else self.method
            raise NotAllowed(f"{what} needs the scope {scope}, which this caller does not have.")

    def count(self, rows: int) -> None:
        """So many more events are about to be sent. Raises ``TicketError`` above ``FRAISEQL_ARROW_FLIGHT_MAX_ROWS``."""
        if self.max_rows is not None and not self.has_room(rows):
            raise limits.too_many_rows(self.max_rows)
        self.rows += rows

    def has_room(self, rows: int) -> bool:
        """Whether so many more events may be sent."""
        return self.max_rows is None or self.rows - self._rows_before + rows <= self.max_rows

    def header(self, name: str) -> list[str]:
        """The values of a header of the request."""
        return [str(value) for key, value in self.context.invocation_metadata() if key == name]

    def streams(self, ticket: bytes) -> None:
        """From now on this call streams a ticket: ``CancelFlightInfo`` finds it by these bytes, and its events are counted anew."""
        self._rows_before = self.rows
        if self.running is not None:
            self.running.names = frozenset({ticket})

    def received(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The requests of a client that sends several. One that keeps the server waiting for ``FRAISEQL_ARROW_FLIGHT_STALL_SECONDS`` is cut."""
        running = self.running
        assert running is not None
        while True:
            running.receiving_since = time.monotonic()
            try:
                request = next(requests)
            except StopIteration:
                if running.cut is not None:  # gRPC may end the requests before it knows that the call was cut
                    raise ClientGone from None
                return
            finally:
                running.receiving_since = None
            yield request


class Edge:
    """Makes gRPC handlers out of methods."""

    def __init__(self, authenticator: Authenticator, slots: Slots, metrics: Metrics, audit: AuditLog) -> None:
        self._authenticator = authenticator
        self._slots = slots
        self._metrics = metrics
        self._audit = audit

    def one(self, name: str, method: Callable[[bytes, Call], bytes]) -> Any:
        """An RPC with one answer, which may take a while: the lake and the database are asked for it."""

        def answer(request: bytes, call: Call) -> Iterator[bytes]:
            yield method(request, call)

        return self._handler(name, _of_one_request(answer), READ, "plan")

    def many(self, name: str, method: Callable[[bytes, Call], Iterator[bytes]], scope: str = READ, use: Use = "short") -> Any:
        """An RPC with a stream of answers. ``use``: whether it is one of the streams that ``FRAISEQL_ARROW_FLIGHT_MAX_STREAMS`` counts."""
        return self._handler(name, _of_one_request(method), scope, use)

    def both(
        self, name: str, method: Callable[[Iterator[bytes], Call], Iterator[bytes]], scope: str, *, uploads: bool = False
    ) -> Any:
        """An RPC with streams both ways. ``uploads``: its requests may be as large as gRPC lets them be."""
        return self._handler(name, method if uploads else _all_bounded(method), scope, "stream")

    def handshake(self, method: Callable[[Iterator[bytes], Call], Iterator[bytes]]) -> Any:
        """The RPC whose method finds out who calls. Its client gets seconds, not hours."""
        return self._handler("Handshake", _all_bounded(method), None, "short")

    def probe(self, method: Callable[[bytes], bytes]) -> Any:
        """An RPC that anybody may ask, so it is neither counted nor written down. ``LookupError`` of its method is NOT_FOUND."""

        def answer(request: bytes, call: Call) -> Iterator[bytes]:
            del call
            yield method(request)

        def answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Generator[bytes]:
            call = Call("Check", context)
            try:
                with self._slots.probe(context) as call.running:
                    yield from self._sent(call, _of_one_request(answer)(requests, call))
            except (grpc.RpcError, ClientGone):
                return
            except LookupError:
                context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
            except Exception as error:  # noqa: BLE001 - the edge of the process
                status.status_of(error).abort(context)

        return grpc.stream_stream_rpc_method_handler(answers)

    def _handler(self, name: str, method: Callable[[Iterator[bytes], Call], Iterator[bytes]], scope: str | None, use: Use) -> Any:
        def answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Generator[bytes]:
            call = Call(name, context, self._slots.max_rows)
            code = "OK"
            counted = use == "stream" and scope is not None
            try:
                if scope is not None:
                    self._admit(call, scope)
                with self._slot(call, use, scope) as call.running, closing(_generator(method(requests, call))) as messages:
                    if counted:
                        self._metrics.streams.inc()
                    try:
                        yield from self._sent(call, messages)
                    finally:
                        if counted:
                            self._metrics.streams.dec()
            except (GeneratorExit, grpc.RpcError, ClientGone) as gone:
                # Nobody is there: the answers are not wanted any more, or the rest of the request never comes.
                code, call.reason = "CANCELLED", (call.running and call.running.cut) or "client"
                if isinstance(gone, GeneratorExit):
                    raise
            except Exception as error:  # noqa: BLE001 - the edge of the process
                failed = self._failed(call, error)
                code = failed.code.name
                failed.abort(context)
            finally:
                self._ended(call, code)

        return grpc.stream_stream_rpc_method_handler(answers)

    def _sent(self, call: Call, messages: Iterator[bytes]) -> Iterator[bytes]:
        running = call.running
        assert running is not None
        first = call.method == "DoGet"
        for message in messages:
            if first:
                first = False
                self._metrics.first_message.observe(time.monotonic() - call.began)
            running.sending()
            yield message
            running.sent(len(message))
            call.sent_bytes += len(message)

    def _slot(self, call: Call, use: Use, scope: str | None) -> AbstractContextManager[Running]:
        if scope is None:
            return self._slots.handshake(self._authenticator.introduced(call.context.invocation_metadata()), call.context)
        return self._slots.call(use, call.caller, call.context, shared=not self._authenticator.knows_callers)

    def _admit(self, call: Call, scope: str) -> None:
        call.caller = self._authenticator.caller(call.context.invocation_metadata(), tuple(call.context.peer_identities() or ()))
        call.need(scope)

    def _failed(self, call: Call, error: Exception) -> status.Status:
        if isinstance(error, NotAuthenticated):
            call.reason = error.reason
            self._metrics.refused(error.reason)
        elif isinstance(error, PipelineError):
            call.reason = type(error).__name__
        return status.status_of(error)

    def _ended(self, call: Call, code: str) -> None:
        now = time.monotonic()
        seconds = now - call.began
        waited = 0.0 if call.running is None else call.running.waited_until(now)
        self._metrics.ended(call.method, code, seconds, sent_bytes=call.sent_bytes, rows=call.rows, waited=waited)
        self._audit.write(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            call=call.id,
            method=call.method,
            action=call.action,
            principal=call.caller.principal,
            org_id=call.caller.org_id,
            peer=call.context.peer(),
            code=code,
            reason=call.reason,
            rows=call.rows,
            bytes=call.sent_bytes,
            seconds=round(seconds, 6),
        )


def _bounded(request: bytes) -> bytes:
    if len(request) > MAX_REQUEST_BYTES:
        raise InputError(f"A request must not have more than {MAX_REQUEST_BYTES} bytes, got {len(request)}.")
    return request


def _of_one_request(method: Callable[[bytes, Call], Iterator[bytes]]) -> Callable[[Iterator[bytes], Call], Iterator[bytes]]:
    """A method of one request as one of a stream of them: what comes behind the first is not looked at."""

    def answers(requests: Iterator[bytes], call: Call) -> Iterator[bytes]:
        request = next(call.received(requests), None)
        if request is None:
            raise InputError("The call ended before its request came.")
        return method(_bounded(request), call)

    return answers


def _all_bounded(
    method: Callable[[Iterator[bytes], Call], Iterator[bytes]],
) -> Callable[[Iterator[bytes], Call], Iterator[bytes]]:
    return lambda requests, call: method(map(_bounded, requests), call)


def _generator(messages: Iterator[bytes]) -> Any:
    """The messages as something that can be closed."""
    return messages if hasattr(messages, "close") else (message for message in messages)


def not_offered(name: str, offered: str) -> Callable[[Any, Call], Any]:
    """A method that says what there is instead."""

    def answer(request: Any, call: Call) -> Any:
        del request, call
        raise NotOffered(f"{name} is not offered by this server; it answers {offered}.")

    return answer
