"""``serve`` as an operator runs it: one process or several on one port, metrics beside them, and an orderly end.

What lives here: what happens between the start of the command and its exit. What must not: gRPC (``server.py``), what is counted
(``metrics.py``).

Several workers share the port through SO_REUSEPORT: the kernel gives each connection to one of them. The supervisor serves nothing but
metrics. It starts workers anew when they die, and holds the port meanwhile, so that nobody else can take it.

Invariants
 1. The command starts whole or not at all: a worker that cannot start is the command's error, and so is a change log that is refused. One
    that is refused later costs what needs it; the lake is served on, by workers that start then too.
 2. No worker outlives its supervisor: it drains when the supervisor is gone, however that came about.
 3. A worker that dies is replaced, later each time it dies young; the others go on.
 4. A worker has room on the disk for all it may count before it counts: what is mapped into memory and finds no room kills the process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from fraiseql_pipeline import memory
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.errors import PipelineError, SettingsError
from fraiseql_pipeline.flight.metrics import LakeState, MetricsServer
from fraiseql_pipeline.flight.server import cannot_listen, check_address, serve
from fraiseql_pipeline.flight.signals import heard
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

_log = logging.getLogger(__name__)

#: A worker that lived shorter is not restarted at once.
_YOUNG_SECONDS = 10.0
_MAX_PAUSE_SECONDS = 30.0
#: Files, of which every connection is one.
_MANY_FILES = 65_536
_START_SECONDS = 60.0
#: Where the metrics of a worker are counted, by the names that prometheus_client gives them; and the bytes of each file: all series there can be
#: take 37 kB of the largest.
_COUNTS = ("counter", "histogram", "gauge_livesum", "gauge_livemax", "gauge_livemin")
_COUNTS_BYTES = 64 * 1024
#: How long the workers may take to answer, all of them together, before the server is called not ready; two idle ones take less than 4 ms.
_ANSWER_SECONDS = 2.0
#: What a supervisor sends a worker, beside the numbers of signals, and gets back.
_PING = b"\0"
#: How long after its drain a worker may take to end before it is killed.
_SPARE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Started:
    """Where a server listens. ``metrics_url`` is None when metrics are off."""

    url: str
    metrics_url: str | None


def log_to_stderr() -> None:
    """A line per warning, beginning with the time in UTC. For the process of a server and for those it starts."""
    lines = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    lines.converter = time.gmtime
    stderr = logging.StreamHandler()
    stderr.setFormatter(lines)
    logging.basicConfig(level=logging.WARNING, handlers=[stderr])
    # gRPC's binding writes down whole headers that are not ASCII, and one of them may be a token with something behind it.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL + 1)


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


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    control: socket.socket
    began: float
    #: Whether it has reported that it listens.
    listens: bool = False
    #: Whether it owes an answer, and when it gave the last one.
    asked: bool = False
    answered: float = 0.0

    @property
    def serves(self) -> bool:
        """Whether it listens and has not ended; nobody else needs to have noticed that."""
        return self.listens and not wait([self.process.sentinel], 0)

    def ask(self) -> None:
        """Have it answer, unless it was asked before and has not yet: what it is sent must not pile up."""
        if not self.asked:
            self.asked = True  # first: another thread may hear the answer at once
            try:
                self.control.send(_PING, socket.MSG_DONTWAIT)
            except OSError:
                self.asked = False

    def answers(self, since: float, until: float) -> bool:
        """Whether it answers between two times; several threads may ask at once."""
        while self.answered < since:
            left = until - time.monotonic()
            # Not for long: another thread may take the answer.
            if left <= 0 or (wait([self.control], min(left, 0.02)) and not self._hear()):
                return False
        return True

    def _hear(self) -> bool:
        try:
            heard = self.control.recv(16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self.asked, self.answered = False, time.monotonic()
        return bool(heard)


class _Fleet:
    def __init__(self, settings: Settings, lake: Lake, insecure: bool) -> None:
        self._settings = settings
        self._lake = lake
        self._insecure = insecure
        self._spawn = multiprocessing.get_context("spawn")
        self._deaths = 0
        self.workers: list[_Worker] = []
        self.url = ""

    def start(self, count: int, told: socket.socket) -> None:
        """Start workers and wait until they listen, or a signal comes. Raises ``SettingsError`` with the sentence of one that does not."""
        launched = [self._launch() for _ in range(count)]
        # All of them first: a worker takes a second or two to load.
        for worker, _ in launched:
            self.workers.append(worker)
        for worker, report in launched:
            ready = wait([report, told], _START_SECONDS)
            if told in ready:
                return
            try:
                said = report.recv() if ready else None
            except EOFError:
                said = None
            if not isinstance(said, str):
                worker.process.kill()
                raise (
                    said
                    if isinstance(said, SettingsError)
                    else SettingsError("A Flight worker ended before it listened; see the log.")
                )
            self.url, worker.listens = said, True

    def ready(self) -> bool:
        """Whether there are workers that serve, and each of them answers: of one that hangs, connections hang as well."""
        began = time.monotonic()
        try:
            serving = [worker for worker in list(self.workers) if worker.serves]
            for worker in serving:
                worker.ask()
            return bool(serving) and all(worker.answers(began, began + _ANSWER_SECONDS) for worker in serving)
        except (OSError, ValueError):  # one is being forgotten
            return False

    def _launch(self) -> tuple[_Worker, Connection]:
        ours, theirs = socket.socketpair()
        receiving, sending = self._spawn.Pipe(duplex=False)
        # Settings that come from a file are of a class made for the call, which cannot travel: their values can.
        process = self._spawn.Process(
            target=_work,
            # A worker that is replaced because the disk of the lake went away must not take that for a lake without windows.
            args=(self._settings.model_dump(exclude_unset=True), self._lake.was_there, self._insecure, theirs, sending),
            name="flight worker",
        )
        process.start()
        theirs.close()
        sending.close()
        return _Worker(process, ours, time.monotonic()), receiving

    def bury(self, directory: Path) -> float:
        """Forget the workers that died; how long to wait before they are replaced."""
        for worker in [worker for worker in self.workers if not worker.process.is_alive()]:
            self.workers.remove(worker)
            worker.control.close()
            mark_process_dead(worker.process.pid, str(directory))  # type: ignore[no-untyped-call]
            young = time.monotonic() - worker.began < _YOUNG_SECONDS
            self._deaths = self._deaths + 1 if young else 0
            _log.error("Flight worker %s ended with code %s", worker.process.pid, worker.process.exitcode)
        return min(2.0 ** (self._deaths - 1), _MAX_PAUSE_SECONDS) if self._deaths else 0.0

    def tell(self, number: int) -> None:
        """Pass a signal on."""
        for worker in self.workers:
            with suppress(OSError):  # it has ended
                worker.control.send(bytes([number]))

    def end(self) -> None:
        """Wait for the drained workers; what hangs is killed."""
        end = time.monotonic() + self._settings.arrow_flight_drain_seconds + _SPARE_SECONDS
        for worker in self.workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.control.close()


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
        fleet = _Fleet(settings.model_copy(update={"arrow_flight_bind": address, "arrow_flight_ticket_key": key}), lake, insecure)
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


def _tend(fleet: _Fleet, wanted: int, directory: Path, told: socket.socket) -> None:
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
                again = time.monotonic() + _MAX_PAUSE_SECONDS


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


# --------------------------------------------------------------------------------------------------------------- worker


def _work(chosen: dict[str, Any], lake_was_there: bool, insecure: bool, parent: socket.socket, report: Connection) -> None:
    # Ctrl-C reaches every process of a terminal; the supervisor decides what it means and says so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr()
    memory.share_malloc()  # as the command line does, which a spawned process is not
    try:
        _reserve(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        settings = Settings(**chosen)
        lake = Lake.of(settings)
        lake.was_there = lake_was_there
        server = serve(settings, lake=lake, insecure=insecure, share_port=True)
    except SettingsError as error:
        report.send(error)
        return
    report.send(server.url)
    report.close()
    signals, passed_on = socket.socketpair()
    with server, signals:
        threading.Thread(target=_answer, args=(parent, passed_on), name="control", daemon=True).start()
        server.run_until_signal(signals)


def _answer(parent: socket.socket, signals: socket.socket) -> None:
    """Answer the supervisor that asks, and pass on what is a signal; its end is passed on as well."""
    with signals, suppress(OSError):  # the server has stopped
        while said := parent.recv(16):
            if _PING in said:
                parent.send(_PING)
            if number := said.replace(_PING, b""):
                signals.send(number)


def _reserve(directory: Path) -> None:
    """Make the files of this process's counts, all their blocks taken; prometheus_client, which would leave holes, uses what is there."""
    making, made = directory / f"making_{os.getpid()}", []
    try:
        for file in (directory / f"{name}_{os.getpid()}.db" for name in _COUNTS):
            if file.exists():  # of a dead worker that had the same number; its counts go on
                continue
            with making.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, _COUNTS_BYTES)
            made.append(making.rename(file))
    except OSError:
        for file in (making, *made):
            file.unlink(missing_ok=True)
        raise SettingsError(
            f"A Flight worker needs {len(_COUNTS) * _COUNTS_BYTES} bytes for what it counts; make room in the temporary directory, or set TMPDIR "
            "to another."
        ) from None
