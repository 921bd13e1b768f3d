"""Everything a client asks beside events: handshakes, actions, polling, health.

What lives here: requests in, answers out, as in ``service.py``. What must not: credentials (``auth.py``), which calls get this far
(``edge.py``).

Actions, their bodies and their results are listed in ``_ACTIONS``; those of the specification have its protobuf messages, ours have JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fraiseql_pipeline.errors import LakeEmpty, NotOffered, TicketError
from fraiseql_pipeline.flight import protocol, session
from fraiseql_pipeline.flight.auth import ADMIN, READ, Authenticator
from fraiseql_pipeline.flight.edge import ANY, Call, Edge
from fraiseql_pipeline.flight.limits import Slots
from fraiseql_pipeline.flight.protocol import parse
from fraiseql_pipeline.flight.service import FlightService
from fraiseql_pipeline.lake import Lake


@dataclass(frozen=True, slots=True)
class _Action:
    scope: str
    description: str
    answer: Callable[[Actions, bytes, Call], bytes]


class Actions:
    """The RPCs that send no events."""

    def __init__(self, lake: Lake, service: FlightService, authenticator: Authenticator, slots: Slots) -> None:
        self._lake = lake
        self._service = service
        self._authenticator = authenticator
        self._slots = slots

    def handlers(self, edge: Edge) -> dict[str, Any]:
        """RPC → handler."""
        return {
            "Handshake": edge.handshake(self.handshake),
            "DoAction": edge.many("DoAction", self.do_action, ANY),
            "ListActions": edge.many("ListActions", self.list_actions, ANY),
            "PollFlightInfo": edge.one("PollFlightInfo", self.poll_flight_info),
        }

    def handshake(self, requests: Iterator[bytes], call: Call) -> Iterator[bytes]:
        """The token for later calls, in the header ``authorization`` and, to a client that sent a payload, in the answer's payload.

        A payload is a ``BasicAuth`` message, or ``Bearer <token>`` as upstream's clients send it; without one, the header counts.
        """
        request = parse(protocol.HandshakeRequest, next(requests, b""))
        metadata = list(call.context.invocation_metadata())
        given = None
        if request.payload.startswith(b"Bearer "):
            metadata.append(("authorization", request.payload))
        elif request.payload:
            basic = parse(protocol.BasicAuth, request.payload)
            given = (basic.username, basic.password)
        identities = tuple(call.context.peer_identities() or ())
        call.caller, token = self._authenticator.handshake(metadata, given, identities)
        call.context.send_initial_metadata((("authorization", f"Bearer {token}"),))
        yield protocol.HandshakeResponse(protocol_version=request.protocol_version, payload=token.encode()).SerializeToString()

    def poll_flight_info(self, request: bytes, call: Call) -> bytes:
        """The whole answer at once: planning takes milliseconds."""
        info = protocol.FlightInfo.FromString(self._service.get_flight_info(request, call))
        return protocol.PollInfo(info=info, progress=1.0).SerializeToString()

    def list_actions(self, request: bytes, call: Call) -> Iterator[bytes]:
        """The actions the caller may ask for."""
        parse(protocol.Empty, request)
        for name, action in _ACTIONS.items():
            if action.scope in call.caller.scopes:
                yield protocol.ActionType(type=name, description=action.description).SerializeToString()

    def do_action(self, request: bytes, call: Call) -> Iterator[bytes]:
        """One result per action."""
        asked = parse(protocol.Action, request)
        name = _ALSO_CALLED.get(asked.type, asked.type)
        action = _ACTIONS.get(name)
        if action is None:
            raise NotOffered(f"There is no such action; this server has {', '.join(_ACTIONS)}.")
        call.action = name
        call.need(action.scope)
        yield protocol.Result(body=action.answer(self, asked.body, call)).SerializeToString()

    def _state(self, body: bytes, call: Call) -> bytes:
        """Of the lake: ``complete_through`` is the end of its newest window, as in receipts; holes before it are counted by ``/metrics``."""
        del call
        if body:
            raise TicketError("This action takes no body.")
        try:
            snapshot = self._lake.snapshot()
        except LakeEmpty:
            return json.dumps({"status": "ok", "table_version": None, "complete_through": None}).encode()
        through = max(window.end for window in snapshot.published).isoformat() if snapshot.published else None
        return json.dumps({"status": "ok", "table_version": snapshot.version, "complete_through": through}).encode()

    def _warm(self, body: bytes, call: Call) -> bytes:
        return json.dumps({"status": "ok", "rows": self._service.warm(body, call)}).encode()

    def _cancel(self, body: bytes, call: Call) -> bytes:
        info = parse(protocol.CancelFlightInfoRequest, body).info
        ended = sum(self._slots.cancel(endpoint.ticket.ticket, call.caller) for endpoint in info.endpoint)
        status = protocol.CANCELLED if ended else protocol.NOT_CANCELLABLE
        return protocol.CancelFlightInfoResult(status=status).SerializeToString()

    def _renew(self, body: bytes, call: Call) -> bytes:
        endpoint = parse(protocol.RenewFlightEndpointRequest, body).endpoint
        return self._service.renewed(endpoint, call).SerializeToString()

    def _set_options(self, body: bytes, call: Call) -> bytes:
        request = parse(protocol.SetSessionOptionsRequest, body)
        options = session.from_cookies(call.header("cookie"))
        errors = []
        for asked in request.session_options:
            kind = asked.value.WhichOneof("option_value")
            wrong = None
            if asked.key not in session.OPTIONS:
                wrong = protocol.INVALID_NAME
            elif kind is None:  # the specification's way to unset one
                options.pop(asked.key, None)
            else:
                value = _native(asked.value, kind)
                try:
                    session.check(asked.key, value)
                    options[asked.key] = value
                except TicketError:
                    wrong = protocol.INVALID_VALUE
            if wrong is not None:
                error = protocol.SessionOptionErrorValue(value=wrong)
                errors.append(protocol.SessionOptionError(key=asked.key, value=error))
        call.context.send_initial_metadata((("set-cookie", session.to_cookie(options)),))
        return protocol.SetSessionOptionsResult(errors=errors).SerializeToString()

    def _get_options(self, body: bytes, call: Call) -> bytes:
        parse(protocol.GetSessionOptionsRequest, body)
        found = []
        for name, value in session.from_cookies(call.header("cookie")).items():
            given = {"int64_value": value} if isinstance(value, int) else {"string_value": value}
            found.append(protocol.SessionOption(key=name, value=protocol.SessionOptionValue(**given)))
        return protocol.GetSessionOptionsResult(session_options=found).SerializeToString()

    def _close_session(self, body: bytes, call: Call) -> bytes:
        parse(protocol.CloseSessionRequest, body)
        call.context.send_initial_metadata((("set-cookie", session.to_cookie({})),))
        return protocol.CloseSessionResult(status=protocol.CLOSED).SerializeToString()


_ACTIONS = {
    "healthcheck": _Action(
        READ, "no body → JSON: status, table_version, complete_through (the end of the newest window, holes or not)", Actions._state
    ),
    "refresh": _Action(ADMIN, "no body → follow the lake's log now; JSON as of healthcheck", Actions._state),
    "warm": _Action(ADMIN, "a ticket → encode its frames before anybody reads them; JSON: status, rows", Actions._warm),
    "CancelFlightInfo": _Action(
        READ, "CancelFlightInfoRequest → CancelFlightInfoResult; ends the caller's streams of its tickets", Actions._cancel
    ),
    "RenewFlightEndpoint": _Action(READ, "RenewFlightEndpointRequest → FlightEndpoint", Actions._renew),
    "SetSessionOptions": _Action(
        READ, f"SetSessionOptionsRequest → SetSessionOptionsResult; options: {', '.join(session.OPTIONS)}", Actions._set_options
    ),
    "GetSessionOptions": _Action(READ, "GetSessionOptionsRequest → GetSessionOptionsResult", Actions._get_options),
    "CloseSession": _Action(READ, "CloseSessionRequest → CloseSessionResult", Actions._close_session),
}

#: As FraiseQL's own Flight server calls them.
_ALSO_CALLED = {"HealthCheck": "healthcheck"}


def health(edge: Edge) -> grpc.GenericRpcHandler[Any, Any]:
    """``grpc.health.v1``: whether there is a server. Probes have no credentials, so it says nothing else, and it is not counted.

    ``Watch`` is left to gRPC's UNIMPLEMENTED, which the protocol's clients take for "do not watch": a thread per prober is too much.
    """

    def check(request: bytes) -> bytes:
        try:
            service = protocol.HealthCheckRequest.FromString(request).service
        except DecodeError:
            service = None
        if service not in {"", protocol.SERVICE}:
            raise LookupError
        return protocol.HealthCheckResponse(status=protocol.SERVING).SerializeToString()

    return grpc.method_handlers_generic_handler(protocol.HEALTH_SERVICE, {"Check": edge.probe(check)})


def _native(value: Any, kind: str) -> Any:
    return list(value.string_list_value.values) if kind == "string_list_value" else getattr(value, kind)
