"""Metrics: what the Flight server counts, and the little HTTP server that shows it.

What lives here: every metric of a server, by name, and ``/metrics``, ``/healthz`` and ``/readyz``. What must not: who counts (``edge.py``).

Names start with ``fraiseql_pipeline_``; no label holds a principal, a tenant or a window, so the number of series is bounded.

Invariants
 1. Every series exists at zero before its first event, so that rates and alerts need no special case; but for what the lake alone knows: times
    while nothing is published, rules that nothing breaks, and everything of a lake that cannot be read.
 2. The pages say nothing about events: counts and clocks only.
 3. Whoever hangs, a client, the storage of the lake, holds a few threads of the metrics port and no more.
 4. Several workers write into files of one directory; the supervisor adds them up. Counters survive the restart of a worker.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fraiseql_pipeline.errors import LakeUnavailable, PipelineError, SettingsError
from fraiseql_pipeline.flight.auth import REASONS
from fraiseql_pipeline.flight.frames import Figures
from fraiseql_pipeline.lake import Commit, Lake, Standing
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.version import package_version
from fraiseql_pipeline.window import Window, count_missing

_log = logging.getLogger(__name__)
_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
CUTS = ("stalled", "idle", "lifetime", "cancelled")

#: What a request of the metrics port may take in all, and how many are answered at a time: who hangs, or sends a byte now and then,
#: holds no more threads, and no longer.
_HTTP_SECONDS, _HTTP_REQUESTS = 5.0, 16
#: How long a new connection waits for the place of the one that is ended for it.
_PLACE_SECONDS = 1.0
#: How long who asks waits for a look at the lake: probes rarely wait longer. And how old what is told of it instead may be.
_LOOK_SECONDS, _OLD_SECONDS = 1.0, 10.0


class Metrics:
    """What one server counts. ``methods``: the RPCs there are."""

    def __init__(self, methods: Iterable[str]) -> None:
        # The text format would get a second series per counter, with the time of its birth.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "fraiseql_pipeline", "registry": self.registry}
        self._requests = Counter("flight_requests", "Flight calls that ended, by gRPC status.", ("method", "code"), **named)
        self._seconds = Histogram(
            "flight_request_duration_seconds", "From the start of a call to its end.", ("method",), buckets=_BUCKETS, **named
        )
        self.first_message = Histogram(
            "flight_first_message_seconds", "From the start of DoGet to its first message.", buckets=_BUCKETS, **named
        )
        self.streams = Gauge("flight_streams_in_progress", "Streams being sent.", multiprocess_mode="livesum", **named)
        self._bytes = Counter("flight_bytes", "Bytes of the messages sent.", **named)
        self._rows = Counter("flight_rows", "Events sent.", **named)
        self._uploaded = Counter("flight_uploaded_rows", "Events taken by DoPut, those that were known included.", **named)
        self._stalled = Counter("flight_stalled_seconds", "Time in which streams waited for their readers.", **named)
        self._cuts = Counter("flight_streams_cut", "Streams the server ended, by reason.", ("reason",), **named)
        self._failures = Counter("flight_auth_failures", "Calls without a valid credential, by reason.", ("reason",), **named)
        self._kept_bytes = Gauge("flight_frames_bytes", "Encoded frames kept on disk.", multiprocess_mode="livesum", **named)
        self._hits = Counter("flight_frames_hits", "Groups of frames that were kept when a stream wanted them.", **named)
        self._misses = Counter("flight_frames_misses", "Groups of frames that had to be encoded.", **named)
        self._evictions = Counter("flight_frames_evictions", "Groups of frames given up for want of space.", **named)
        self._live_up = Gauge("live_up", "Servers that follow the change log.", multiprocess_mode="livesum", **named)
        self._live_rows = Gauge("live_rows", "Events kept that are not published yet.", multiprocess_mode="livemax", **named)
        self._live_bytes = Gauge("live_bytes", "Bytes of these events on disk.", multiprocess_mode="livesum", **named)
        self._live_settled = Gauge(
            "live_settled_timestamp_seconds",
            "The database's clock when the events served last were all that had settled; 0 before.",
            multiprocess_mode="livemin",
            **named,
        )
        self._lock = threading.Lock()
        self._figures: Callable[[], Figures] | None = None
        self._told = Figures(0, 0, 0, 0, 0)
        for method in methods:
            self._requests.labels(method, "OK")
            self._seconds.labels(method)
        for reason in CUTS:
            self._cuts.labels(reason)
        for reason in REASONS:
            self._failures.labels(reason)

    def ended(self, method: str, code: str, seconds: float, *, sent_bytes: int, rows: int, waited: float) -> None:
        """A call is over."""
        self._requests.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)
        self._bytes.inc(sent_bytes)
        (self._uploaded if method == "DoPut" else self._rows).inc(rows)
        self._stalled.inc(waited)
        self._follow()

    def watch(self, figures: Callable[[], Figures]) -> None:
        """Show these figures of the frame store, as they are when a call ends."""
        self._figures = figures

    def _follow(self) -> None:
        if self._figures is None:
            return
        with self._lock:
            now, before = self._figures(), self._told
            self._told = now
        self._kept_bytes.set(now.bytes)
        self._hits.inc(now.hits - before.hits)
        self._misses.inc(now.misses - before.misses)
        self._evictions.inc(now.evictions - before.evictions)

    def live(self, rows: int, size: int, settled_at: datetime | None) -> None:
        """How far the change log was followed; ``settled_at`` None: it is not."""
        self._live_up.set(settled_at is not None)
        self._live_rows.set(rows)
        self._live_bytes.set(size)
        if settled_at is not None:
            self._live_settled.set(settled_at.timestamp())

    def cut(self, reason: str) -> None:
        """A stream was ended by the server."""
        self._cuts.labels(reason).inc()

    def refused(self, reason: str) -> None:
        """A call had no valid credential."""
        self._failures.labels(reason).inc()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at the lake found, and when; ``published`` None: it could not be read."""

    published: Mapping[Window, Commit] | None
    at: float


class LakeState:
    """What the lake says about itself, asked when a scraper asks. ``settings`` say where its windows begin and how long they are.

    It is looked at by one thread at a time, however many ask: a storage that hangs holds no more of them.
    """

    def __init__(self, lake: Lake, settings: Settings) -> None:
        self._lake = lake
        self._settings = settings
        self._looks = threading.Condition()
        self._looking = False
        #: Until when who asks waits for the look that is under way.
        self._waited_until = 0.0
        self._seen = _Seen(None, 0.0)

    @staticmethod
    def described() -> dict[str, GaugeMetricFamily]:
        """The metrics without their values, each by its name without the prefix."""
        return {
            name: GaugeMetricFamily(f"fraiseql_pipeline_{name}", meaning, labels=labels)
            for name, meaning, *labels in (
                ("build_info", "The version that runs; always 1.", "version"),
                ("windows", "Published windows, by state.", "state"),
                ("holes", "Windows that were never published before the newest one, from FRAISEQL_START on if that is set."),
                ("watermark_timestamp_seconds", "End of the newest published window; absent while there is none."),
                ("complete_through_timestamp_seconds", "End of the last window before the first hole; absent while there is none."),
                ("rows", "Events of the published windows as they are now, by what became of them.", "outcome"),
                ("late_rows", "Events of the published windows that came after their window was first published."),
                (
                    "quarantine_rows",
                    "Quarantined events of the published windows, by each rule they break; absent for a rule that none breaks.",
                    "rule",
                ),
            )
        }

    def collect(self) -> Iterable[Metric]:
        """Read the lake, and say what there is; of one that cannot be read, or is gone, only the names."""
        shown = self.described()
        shown["build_info"].add_metric((package_version(),), 1)
        published = self._published()
        if published is None:
            return shown.values()
        stands = Standing.of(published, self._settings.first_window)
        shown["windows"].add_metric(("sealed",), stands.windows - stands.provisional)
        shown["windows"].add_metric(("provisional",), stands.provisional)
        shown["holes"].add_metric((), count_missing(stands.gaps, self._settings.window))
        for name, at in (("watermark", stands.through), ("complete_through", stands.complete_through)):
            if at is not None:
                shown[f"{name}_timestamp_seconds"].add_metric((), at.timestamp())
        shown["rows"].add_metric(("accepted",), stands.accepted_rows)
        shown["rows"].add_metric(("quarantined",), stands.quarantined_rows)
        shown["late_rows"].add_metric((), stands.late_rows)
        for rule, rows in stands.reasons.items():
            shown["quarantine_rows"].add_metric((rule,), rows)
        return shown.values()

    def ready(self) -> bool:
        """Whether the lake can be read. One without windows can, but for one that was there before: it is gone."""
        return self._published() is not None

    def _published(self) -> Mapping[Window, Commit] | None:
        """What a look at the lake finds, or found a moment ago where it takes long; None where it cannot be read."""
        with self._looks:
            if not self._looking:
                self._looking, self._waited_until = True, time.monotonic() + _LOOK_SECONDS
                threading.Thread(target=self._look, name="lake-look", daemon=True).start()
            before = self._seen
            self._looks.wait_for(lambda: self._seen is not before, self._waited_until - time.monotonic())
            if time.monotonic() - self._seen.at > _OLD_SECONDS:
                _log.warning("the lake does not answer")
                return None
            return self._seen.published

    def _look(self) -> None:
        published = None
        try:
            published = self._lake.published()
            if not published and self._lake.is_gone():
                raise LakeUnavailable("it was there before and is not there any more; check FRAISEQL_LAKE_URI and its storage.")
        except PipelineError as error:
            published = None
            _log.warning("the lake cannot be read: %s", error)
        except Exception:  # noqa: BLE001 - a thread has nobody above it, and who asks next looks again
            _log.exception("the lake cannot be read")
        with self._looks:
            self._seen, self._looking = _Seen(published, time.monotonic()), False
            self._looks.notify_all()


class MetricsServer:
    """Shows registries on ``bind`` until it is closed; ``port`` says where when the bind says 0. Raises ``SettingsError``."""

    def __init__(self, bind: str, registries: Iterable[CollectorRegistry], ready: Callable[[], bool]) -> None:
        shown = tuple(registries)

        class Handler(BaseHTTPRequestHandler):
            timeout = _HTTP_SECONDS
            server_version, sys_version = "fraiseql-pipeline", ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, b"".join(generate_latest(registry) for registry in shown))
                elif path == "/healthz":
                    self._answer(200, "text/plain", b"ok\n")
                elif path == "/readyz":
                    fine = ready()
                    self._answer(200 if fine else 503, "text/plain", b"ready\n" if fine else b"not ready\n")
                else:
                    self._answer(404, "text/plain", b"/metrics, /healthz or /readyz\n")

            def do_HEAD(self) -> None:
                """As probes of load balancers and ``wget --spider`` ask: the same answer without its body."""
                self.do_GET()

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
                del format, args

        host, _, port = bind.rpartition(":")
        try:
            self._server = _Http((host.strip("[]"), int(port)), Handler)
        except OSError:
            raise SettingsError(
                f"The metrics cannot be shown on {bind!r}: another process holds the port, or the address is not this machine's; "
                "choose another FRAISEQL_METRICS_BIND, or off."
            ) from None
        self.port: int = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Http(ThreadingHTTPServer):
    """A thread per connection, of which there are ``_HTTP_REQUESTS`` at most: the oldest is ended for a new one."""

    daemon_threads = True
    request_queue_size = 4 * _HTTP_REQUESTS

    def __init__(self, address: tuple[str, int], answers: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        #: The connections that are open, oldest first, each with when it is ended. One is a request: the next one needs another.
        self._open: dict[Any, float] = {}
        self._changed = threading.Condition()
        super().__init__(address, answers)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if len(self._open) >= _HTTP_REQUESTS:
                _end(next(iter(self._open)))
                self._changed.wait_for(lambda: len(self._open) < _HTTP_REQUESTS, _PLACE_SECONDS)
            full = len(self._open) >= _HTTP_REQUESTS
            if not full:
                self._open[request] = time.monotonic() + _HTTP_SECONDS
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changed:
            self._open.pop(request, None)
            self._changed.notify_all()
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called between requests, ten times a second at least."""
        now = time.monotonic()
        with self._changed:
            for request in [request for request, end in self._open.items() if end < now]:
                _end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address
        _log.debug("a request of the metrics port failed", exc_info=True)


def _end(connection: Any) -> None:
    """Wake the thread that reads or writes it, which closes it then."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
