"""The workers of a server: processes that share its port, and what supervisor and worker say to each other.

What lives here: ``Fleet``, as the supervisor has them, and what a worker does from its start to its end. What must not: when workers are
started and told to end (``workers.py``), what they serve (``server.py``).

Invariants
 1. No worker outlives its supervisor: it drains when the supervisor is gone, however that came about.
 2. A worker has room on the disk for all it may count before it counts: what is mapped into memory and finds no room kills the process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from fraiseql_pipeline import memory
from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.flight.log import log_to_stderr
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

_log = logging.getLogger(__name__)

#: A worker that lived shorter is not restarted at once.
_YOUNG_SECONDS = 10.0
#: The longest pause before one that died is replaced.
MAX_PAUSE_SECONDS = 30.0
_START_SECONDS = 60.0
#: Where the metrics of a worker are counted, by the names that prometheus_client gives them; and the bytes of each file: all series there
#: can be take 37 kB of the largest.
_COUNTS = ("counter", "histogram", "gauge_livesum", "gauge_livemax", "gauge_livemin")
_COUNTS_BYTES = 64 * 1024
#: How long the workers may take to answer, all of them together, before the server is called not ready; two idle ones take less than 4 ms.
_ANSWER_SECONDS = 2.0
#: What a supervisor sends a worker, beside the numbers of signals, and gets back.
_PING = b"\0"
#: How long after its drain a worker may take to end before it is killed.
_SPARE_SECONDS = 5.0


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


class Fleet:
    """The workers of one server, as their supervisor sees them. ``url``: where they listen, once they do."""

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
        return min(2.0 ** (self._deaths - 1), MAX_PAUSE_SECONDS) if self._deaths else 0.0

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
        _tell(report, error)
        return
    _tell(report, server.url)
    signals, passed_on = socket.socketpair()
    with server, signals:
        threading.Thread(target=_answer, args=(parent, passed_on), name="control", daemon=True).start()
        server.run_until_signal(signals)


def _tell(report: Connection, said: str | SettingsError) -> None:
    """Tell where this worker listens, or why it does not; a supervisor that is told to stop meanwhile waits for no report."""
    with report, suppress(BrokenPipeError):
        report.send(said)


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
