"""The Flight server: where it listens, how it is bounded, how it ends.

What lives here: the gRPC server around the services, in one process. What must not: what an RPC answers (``service.py``,
``actions.py``), who may ask (``edge.py``), several processes (``workers.py``).

Invariants
 1. An address others can reach is bound only with TLS and authentication, unless the caller insists (``insecure``).
 2. A request is refused above ``MAX_REQUEST_BYTES`` (an upload's message above ``_MAX_UPLOAD_BYTES``) before any of it is parsed; a port
    is never shared with another server, only among the workers of one.
 3. Stopping is bounded: new calls are refused at once, running streams may finish for the grace time, then they end in an error. What is under
    way with the database then is cancelled, and what does not end after a few seconds more is left behind: it ends with the process.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
from types import TracebackType

import grpc

from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.errors import FlightUnavailable, SettingsError
from fraiseql_pipeline.flight import protocol, tls
from fraiseql_pipeline.flight.actions import Actions, health
from fraiseql_pipeline.flight.audit import AuditLog
from fraiseql_pipeline.flight.auth import READ, SCOPES, Authenticator, Caller
from fraiseql_pipeline.flight.edge import MAX_REQUEST_BYTES, METHODS, Edge
from fraiseql_pipeline.flight.limits import Slots
from fraiseql_pipeline.flight.metrics import Metrics
from fraiseql_pipeline.flight.service import FlightService
from fraiseql_pipeline.flight.signals import heard
from fraiseql_pipeline.flight.threads import Threads
from fraiseql_pipeline.flight.upload import uploads
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

_log = logging.getLogger(__name__)

#: What gRPC takes in one message where the server takes uploads; every other RPC keeps to ``MAX_REQUEST_BYTES``.
_MAX_UPLOAD_BYTES = 16 * 1024 * 1024

#: Threads beyond those of calls with a slot: for calls that answer at once, and to refuse a call too many with a sentence.
_SPARE_THREADS = 8

#: What the end waits for the threads of calls that have ended: they write their lines of the audit log.
_END_SECONDS = 1.0

#: Calls that wait for a thread; more are refused by gRPC itself.
_WAITING_CALLS = 256

#: After which a connection ends once its calls have, where clients are known by their certificates: one that has expired, or whose authority
#: was taken away, is looked at again when the client connects anew.
_CERTIFIED_SECONDS = 600

_OPTIONS = (
    # A client that vanished without a word (power, network) is noticed, and its stream ended, after 60 + 20 seconds.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients that keep their connection warm are welcome; gRPC's default cuts those that ping more often than every 5 minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who is connected and asks for nothing holds a file of the process; a client that asks again connects again by itself.
    ("grpc.max_connection_idle_ms", 120_000),
)


def serve(settings: Settings, *, lake: Lake | None = None, insecure: bool = False, share_port: bool = False) -> FlightServer:
    """Start a Flight server on ``FRAISEQL_ARROW_FLIGHT_BIND`` and return it running; ``port`` says where when the setting says 0.

    ``lake`` is ``FRAISEQL_LAKE_URI`` unless given; it may be empty and is read as it grows. ``insecure`` allows an address others can
    reach without TLS or authentication; ``share_port`` lets other workers listen on the same port. Raises ``SettingsError`` when the
    server is disabled, a file of the settings is wrong, or the address is refused or cannot be bound.
    """
    address = check_address(settings, insecure=insecure)
    credentials = tls.credentials(settings)
    host = address.rpartition(":")[0]
    everyone = Caller("anonymous", None, SCOPES if is_loopback(host) else frozenset({READ}))
    authenticator = Authenticator(settings, everyone)
    metrics = Metrics(METHODS)
    slots = Slots(settings, metrics.cut)
    audit = AuditLog(settings.arrow_flight_audit_log)
    chosen = lake or Lake.of(settings)
    service = FlightService(settings, chosen)
    try:
        service.store.directory()
    except FlightUnavailable:
        audit.close()
        raise SettingsError(
            "The Flight server cannot write into its cache directory; set FRAISEQL_ARROW_FLIGHT_CACHE_DIR to one that it may write, with room."
        ) from None
    metrics.watch(service.store.figures)
    if service.live is not None:
        service.live.tell = metrics.live
    edge = Edge(authenticator, slots, metrics, audit)
    log = ChangeLog(settings.database_url, settings) if settings.arrow_flight_uploads and settings.database_url else None
    put = None if log is None else uploads(log.append)
    handlers = service.handlers(edge, put) | Actions(chosen, service, authenticator, slots).handlers(edge)
    most = slots.most + _SPARE_THREADS
    threads = Threads(most, "flight")
    server = grpc.server(
        threads,  # type: ignore[arg-type] # all that is asked of it is ``submit``
        handlers=[grpc.method_handlers_generic_handler(protocol.SERVICE, handlers), health(edge)],
        options=(
            *_OPTIONS,
            *((("grpc.max_connection_age_ms", _CERTIFIED_SECONDS * 1000),) if settings.arrow_flight_tls_client_ca else ()),
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES if log is None else _MAX_UPLOAD_BYTES),
            ("grpc.so_reuseport", int(share_port)),
        ),
        maximum_concurrent_rpcs=most + _WAITING_CALLS,
    )
    try:
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError:
        threads.shutdown(wait=False)
        service.close()
        audit.close()
        raise cannot_listen(address) from None
    server.start()
    service.start()
    _log.info("Flight server listens on %s, port %d", host, port)
    url = f"{'grpc' if credentials is None else 'grpc+tls'}://{host}:{port}"
    return FlightServer(server, threads, service, slots, audit, metrics, chosen, log, url, settings.arrow_flight_drain_seconds)


def cannot_listen(address: str) -> SettingsError:
    """The error of a server whose port cannot be had."""
    return SettingsError(
        f"The Flight server cannot listen on {address!r}: another process holds the port, or the address is not this machine's; "
        "choose another FRAISEQL_ARROW_FLIGHT_BIND."
    )


def check_address(settings: Settings, *, insecure: bool) -> str:
    """The address to listen on. Raises ``SettingsError`` when the server is disabled, or others would reach it unprotected."""
    if not settings.arrow_flight_enabled:
        raise SettingsError("The Flight server is disabled by FRAISEQL_ARROW_FLIGHT_ENABLED; set it to true to serve.")
    address = settings.arrow_flight_bind
    missing = [] if settings.arrow_flight_tls_cert is not None else ["TLS (FRAISEQL_ARROW_FLIGHT_TLS_CERT and _TLS_KEY)"]
    if all(
        unset is None
        for unset in (
            settings.arrow_flight_tokens_file,
            settings.arrow_flight_jwt_algorithm,
            settings.arrow_flight_tls_client_ca,
        )
    ):
        missing.append("authentication (FRAISEQL_ARROW_FLIGHT_TOKENS_FILE, _JWT_ALGORITHM or _TLS_CLIENT_CA)")
    if missing and not insecure and not is_loopback(address.rpartition(":")[0]):
        raise SettingsError(
            f"FRAISEQL_ARROW_FLIGHT_BIND must be a loopback address such as 127.0.0.1:50051 without {' and '.join(missing)}, "
            f"got {address!r}; set them, or pass --insecure to let everyone who reaches it read all events."
        )
    return address


class FlightServer:
    """A running server; leaving its ``with`` block drains it."""

    def __init__(
        self,
        server: grpc.Server,
        threads: Threads,
        service: FlightService,
        slots: Slots,
        audit: AuditLog,
        metrics: Metrics,
        lake: Lake,
        log: ChangeLog | None,
        url: str,
        drain_seconds: float,
    ) -> None:
        self._server = server
        self._threads = threads
        self._service = service
        self._slots = slots
        self._audit = audit
        self._log = log
        self._drain_seconds = drain_seconds
        self.metrics = metrics
        self.lake = lake
        self.draining = False
        self.url = url
        self.port = int(url.rpartition(":")[2])

    def stop(self, grace_seconds: float | None = None) -> None:
        """Refuse new calls, let streams finish for the grace time (``FRAISEQL_ARROW_FLIGHT_DRAIN_SECONDS``), then end them."""
        self._refuse(self._drain_seconds if grace_seconds is None else grace_seconds).wait()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._log is not None:
            self._log.close()
        self._slots.close()
        self._service.close()
        self._threads.join(_END_SECONDS)
        self._audit.close()

    def run_until_signal(self, parent: socket.socket | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends the streams at once. To be called in the main thread.

        ``parent``: what it sends counts like a signal, and so does its end.
        """
        numbers = (signal.SIGTERM,) if parent is not None else (signal.SIGTERM, signal.SIGINT)
        with heard(*numbers) as (told, teller):
            if parent is not None:
                threading.Thread(target=_relay, args=(parent, teller), name="parent", daemon=True).start()
            _log.info("signal %d: the Flight server stops, streams may finish for %g s", told.recv(1)[0], self._drain_seconds)
            self._drain(told, teller)

    def _refuse(self, grace_seconds: float) -> threading.Event:
        """From here on no call is taken; set when every call has ended, by itself or at the end of the grace time."""
        self.draining = True
        ended = self._server.stop(grace_seconds)
        self._service.stop_following()
        return ended

    def _drain(self, told: socket.socket, teller: socket.socket) -> None:
        ended = self._refuse(self._drain_seconds)

        def tell() -> None:
            ended.wait()
            teller.send(b"\0")

        waiting = threading.Thread(target=tell, name="drain")
        waiting.start()
        if told.recv(1) != b"\0":
            self._server.stop(0)
        waiting.join()

    def __enter__(self) -> FlightServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


def _relay(parent: socket.socket, teller: socket.socket) -> None:
    try:
        while message := parent.recv(1):
            teller.send(message)
        teller.send(bytes([signal.SIGTERM]))  # the parent is gone
    except OSError:
        pass  # the server has stopped


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
