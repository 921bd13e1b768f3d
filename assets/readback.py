"""Whether a Flight server sends what was committed: the check ``flight_readback``.

What lives here: telling a server of windows, having it encode them ahead, and holding the stream it then sends against the lake. What must
not: where the server is (``resources.py``), the wire (``fraiseql_pipeline.flight.client``).

Invariants
 1. A server that cannot be asked (absent, too slow, refusing) is a warning and never fails a run. One that sends other events is an error
    of the check, and fails no run either: the window is published.
 2. A server that did not answer for one window is not asked for the rest of the run: a hundred windows do not wait a hundred times.
 3. What is expected comes from the lake. Stream and lake are read at one table version, so a window that somebody publishes again meanwhile
    is no difference.
 4. Without a server the check passes and says so. Left out it would be "skipped", and Dagster calls the health of an asset unknown for as
    long as one of its checks was never evaluated.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import dagster as dg

from fraiseql_pipeline.encoding import checksum, to_wire, wire_schema
from fraiseql_pipeline.errors import FlightBusy, FlightUnavailable, PipelineError
from fraiseql_pipeline.flight.client import Client
from fraiseql_pipeline.lake import Snapshot
from fraiseql_pipeline.window import Window

READBACK = "flight_readback"


def read_back(
    windows: Sequence[Window], stored: Snapshot, client: Callable[[], Client | None], warn: Callable[[str], None]
) -> Iterator[dg.AssetCheckResult]:
    """One result per window, in order. ``client`` gives None where no server is configured; ``warn`` hears each new reason to warn."""
    with ExitStack() as stack:
        try:
            connected = client()
            if connected is None:
                yield from [_nobody_to_ask() for _ in windows]
                return
            served = stack.enter_context(connected).refresh()
        except PipelineError as error:
            warn(_sentence(error))
            yield from [_not_compared(error) for _ in windows]
            return
        yield from _each(windows, stored, served, connected, warn)


def _each(
    windows: Sequence[Window], stored: Snapshot, served: int | None, client: Client, warn: Callable[[str], None]
) -> Iterator[dg.AssetCheckResult]:
    gone: PipelineError | None = None
    for window in windows:
        if gone is not None:
            yield _not_compared(gone)
            continue
        try:
            sent = _sent(window, stored.version, client)
        except PipelineError as error:
            warn(_sentence(error))
            yield _not_compared(error)
            if isinstance(error, FlightUnavailable) and not isinstance(error, FlightBusy):
                gone = error
        else:
            yield _compared(window, stored, served, sent)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a server sent of a window; its client has held rows and checksum against the stream's receipt."""

    rows: int
    checksum: int | None
    encoding: str
    warm_seconds: float
    read_seconds: float


def _sent(window: Window, table_version: int, client: Client) -> _Sent:
    began = time.perf_counter()
    client.warm(start=window.start, end=window.end, table_version=table_version)
    warm = time.perf_counter()
    with client.stream(start=window.start, end=window.end, table_version=table_version) as stream:
        rows = sum(batch.num_rows for batch in stream)
    encoding = (stream.schema.metadata or {}).get(b"fraiseql.encoding", b"plain").decode()
    total = stream.receipt.checksum if stream.receipt is not None else None
    return _Sent(rows, total, encoding, warm - began, time.perf_counter() - warm)


def _compared(window: Window, stored: Snapshot, served: int | None, sent: _Sent) -> dg.AssetCheckResult:
    accepted = stored.published[window].accepted_rows
    schema = wire_schema(("event_id",), sent.encoding.partition("+")[0])
    ids = stored.read(window.start, window.end, columns=schema.names)
    total = sum(checksum(to_wire(batch, schema)) or 0 for batch in ids) % 2**64
    return dg.AssetCheckResult(
        passed=sent.rows == accepted and sent.checksum == total and served is not None and served >= stored.version,
        check_name=READBACK,
        metadata={
            "sent rows": sent.rows,
            "accepted rows": accepted,
            "sent checksum": "none" if sent.checksum is None else f"{sent.checksum:016x}",
            "stored checksum": f"{total:016x}",
            "served table version": -1 if served is None else served,
            "table version": stored.version,
            "encoding": sent.encoding,
            "seconds to encode ahead": round(sent.warm_seconds, 4),
            "seconds to read back": round(sent.read_seconds, 4),
        },
    )


def _nobody_to_ask() -> dg.AssetCheckResult:
    said = "No Flight server is configured (FRAISEQL_ARROW_FLIGHT_URL), so there was nothing to read back."
    return dg.AssetCheckResult(passed=True, check_name=READBACK, description=said, metadata={"server": "none configured"})


def _not_compared(error: PipelineError) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=False,
        check_name=READBACK,
        severity=dg.AssetCheckSeverity.WARN,
        description=_sentence(error),
        metadata={"error": type(error).__name__},
    )


def _sentence(error: PipelineError) -> str:
    return f"The window is published, but was not read back over Flight: {error}"
