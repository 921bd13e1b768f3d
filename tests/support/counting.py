"""What a Flight server counts: as its metrics port shows it, and as it stands in a server of this process."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

from fraiseql_pipeline.flight.server import FlightServer


def get(url: str) -> tuple[int, str]:
    """The status and the text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    """Series → value, of the exposition format."""
    return {series: float(value) for series, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


def in_progress(server: FlightServer) -> float | None:
    """Streams that are being sent."""
    return server.metrics.registry.get_sample_value("fraiseql_pipeline_flight_streams_in_progress")


def cuts(server: FlightServer, reason: str) -> float | None:
    """Streams that were cut for a reason."""
    return server.metrics.registry.get_sample_value("fraiseql_pipeline_flight_streams_cut_total", {"reason": reason})
