"""Metrics: what the Flight server counts, and the little HTTP server that shows it.

What lives here: every metric of a server, by name, and ``/metrics``, ``/healthz`` and ``/readyz``. What must not: who counts (``edge.py``).

Names start with ``fraiseql_pipeline_``; no label holds a principal, a tenant or a window, so the number of series is fixed.

Invariants
 1. Every series exists at zero before its first event, so that rates and alerts need no special case.
 2. The pages say nothing about events: counts and clocks only.
 3. Several workers write into files of one directory; the supervisor adds them up. Counters survive the restart of a worker.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fraiseql_pipeline.errors import PipelineError, SettingsError
from fraiseql_pipeline.flight.auth import REASONS
from fraiseql_pipeline.flight.frames import Figures
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.version import package_version

_log = logging.getLogger(__name__)
_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
CUTS = ("stalled", "idle", "lifetime", "cancelled")

#: Scrapers that hang must not hold threads.
_HTTP_SECONDS = 5.0


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


class LakeState:
    """What the lake says about itself, asked when a scraper asks."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake

    @staticmethod
    def described() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        """The metrics without their values."""
        return (
            GaugeMetricFamily("fraiseql_pipeline_build_info", "The version that runs; always 1.", labels=("version",)),
            GaugeMetricFamily(
                "fraiseql_pipeline_watermark_timestamp_seconds", "End of the newest published window; absent while there is none."
            ),
        )

    def collect(self) -> Iterable[Metric]:
        """Read the lake, and say what there is."""
        built, watermark = self.described()
        built.add_metric((package_version(),), 1)
        yield built
        try:
            if published := self._lake.published():
                watermark.add_metric((), max(window.end for window in published).timestamp())
        except PipelineError as error:
            _log.warning("the watermark cannot be read: %s", error)
        yield watermark

    def ready(self) -> bool:
        """Whether the lake can be read; one without windows can."""
        try:
            self._lake.published()
        except PipelineError as error:
            _log.warning("not ready: %s", error)
            return False
        return True


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

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
                del format, args

        host, _, port = bind.rpartition(":")
        kind = type("Http", (ThreadingHTTPServer,), {"daemon_threads": True, "address_family": _family(host)})
        try:
            self._server = kind((host.strip("[]"), int(port)), Handler)
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


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
