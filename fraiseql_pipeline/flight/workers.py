"""``serve`` as an operator runs it: one process or several on one port, metrics beside them, and an orderly end.

What lives here: what happens between the start of the command and its exit. What must not: gRPC (``server.py``), what is counted
(``metrics.py``), what a worker is (``fleet.py``).

Several workers share the port through SO_REUSEPORT: the kernel gives each connection to one of them. The supervisor serves nothing but
metrics. It starts workers anew when they die, and holds the port meanwhile, so that nobody else can take it.

Invariants
 1. The command starts whole or not at all: a worker that cannot start is the command's error, and so is a change log that is refused. One
    that is refused later costs what needs it; the lake is served on, by workers that start then too.
 2. A worker that dies is replaced, later each time it dies young; the others go on.
"""

from __future__ import annotations

import logging
import os
import resource
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.errors import PipelineError, SettingsError
from fraiseql_pipeline.flight.fleet import MAX_PAUSE_SECONDS, Fleet
from fraiseql_pipeline.flight.metrics import LakeState, MetricsServer
from fraiseql_pipeline.flight.server import cannot_listen, check_address, serve
from fraiseql_pipeline.flight.signals import heard
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

_log = logging.getLogger(__name__)

#: Files, of which every connection is one.
_MANY_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Started:
    """Where a server listens. ``metrics_url`` is None when metrics are off."""

    url: str
    metrics_url: str | None


def run(settings: Settings, *, insecure: bool = False, started: Callable[[Started], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT, drained; to be called in the main thread. ``started`` is told once everything listens.

    Raises ``SettingsError`` when anything cannot start, ``SourceRefused`` where the log to follow is refused.
    """
    _check_source(settings)
    _allow_many_files()
    if settings.arrow_flight_workers > 1:
        _supervise(settings, insecure, started)
        return
    with ExitStack() as stack:
        server = stack.enter_context(serve(settings, insecure=insecure))
        lake = LakeState(server.lake, settings)
        registry = CollectorRegistry()
        registry.register(lake)
        metrics = _shown(stack, settings, (server.metrics.registry, registry), lambda: not server.draining and lake.ready())
        started(Started(server.url, metrics))
        server.run_until_signal()


def _check_source(settings: Settings) -> None:
    """Raises what is wrong with the log that is to be followed, unless it may pass: then the lake is served, and it is tried again.

    Asked once for all workers, and not for those that are replaced later.
    """
    if not settings.arrow_flight_live or settings.database_url is None:
        return
    with open_changelog(settings) as changelog:
        try:
            changelog.preflight()
        except PipelineError as error:
            if not error.retryable:
                raise _unfollowable(error) from None


def _unfollowable(error: PipelineError) -> PipelineError:
    told = copy(error)
    told.args = (f"{error} To serve the lake alone, set FRAISEQL_ARROW_FLIGHT_LIVE=false.",)
    return told


def _allow_many_files() -> None:
    """As many as the system lets this process open: each connection is one, and the default of 1,024 is soon reached. Workers inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _shown(stack: ExitStack, settings: Settings, registries: Any, ready: Callable[[], bool]) -> str | None:
    if settings.metrics_bind == "off":
        return None
    server = MetricsServer(settings.metrics_bind, registries, ready)
    stack.callback(server.close)
    return server.url


# ----------------------------------------------------------------------------------------------------------- supervisor


def _supervise(settings: Settings, insecure: bool, started: Callable[[Started], None]) -> None:
    with ExitStack() as stack:
        told, _ = stack.enter_context(heard(signal.SIGTERM, signal.SIGINT))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fraiseql-metrics-")))
        address = stack.enter_context(_held_port(check_address(settings, insecure=insecure)))
        # Spawned processes inherit it; this one must not count into files.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        stack.callback(os.environ.pop, "PROMETHEUS_MULTIPROC_DIR", None)
        # A ticket that one worker signs may be redeemed at another.
        key = settings.arrow_flight_ticket_key or secrets.token_hex(32)
        lake = Lake.of(settings)
        fleet = Fleet(settings.model_copy(update={"arrow_flight_bind": address, "arrow_flight_ticket_key": key}), lake, insecure)
        stack.callback(fleet.end)
        stack.callback(fleet.tell, signal.SIGTERM)
        fleet.start(settings.arrow_flight_workers, told)
        registry, summed = CollectorRegistry(), CollectorRegistry()
        state = LakeState(lake, settings)
        state.ready()  # a look, whatever it finds: for workers to come
        registry.register(state)
        MultiProcessCollector(summed, str(directory))  # type: ignore[no-untyped-call]
        draining = threading.Event()
        metrics = _shown(stack, settings, (summed, registry), lambda: not draining.is_set() and fleet.ready() and state.ready())
        if fleet.url:  # else a signal came before
            started(Started(fleet.url, metrics))
        _tend(fleet, settings.arrow_flight_workers, directory, told)
        draining.set()
        fleet.tell(signal.SIGTERM)
        waiting = threading.Thread(target=fleet.end, name="drain")
        waiting.start()
        while waiting.is_alive():
            if wait([told], timeout=0.05):
                told.recv(1)
                fleet.tell(signal.SIGINT)
        fleet.workers.clear()


def _tend(fleet: Fleet, wanted: int, directory: Path, told: socket.socket) -> None:
    """Keep ``wanted`` workers alive until a signal comes."""
    again = 0.0
    while True:
        watched: list[Any] = [told, *(worker.process.sentinel for worker in fleet.workers)]
        missing = wanted - len(fleet.workers)
        timeout = max(0.0, again - time.monotonic()) if missing else None
        ready = wait(watched, timeout)
        if told in ready:
            _log.info("signal %d: the Flight workers stop", told.recv(1)[0])
            return
        if ready:
            again = time.monotonic() + fleet.bury(directory)
        elif missing:
            try:
                fleet.start(missing, told)
            except SettingsError as error:
                _log.error("a Flight worker did not start: %s", error)
                again = time.monotonic() + MAX_PAUSE_SECONDS


@contextmanager
def _held_port(address: str) -> Iterator[str]:
    """The address with the port that is held: workers may share it, other servers may not take it."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as alone:  # fails where anybody listens, sharing or not
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(where)
            alone.listen(1)
            where = (where[0], alone.getsockname()[1], *where[2:])
        holder = socket.socket(family, kind)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(where)
    except OSError:
        raise cannot_listen(address) from None
    with holder:
        yield f"{host}:{holder.getsockname()[1]}"
