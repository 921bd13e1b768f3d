"""Threads: a pool that the end of the process does not wait for.

What lives here: ``Threads``. What must not: what they do.

The pools of ``concurrent.futures`` are joined when the interpreter ends, however long their work takes: a call that waits for a lock of
Postgres, or for a storage that does not answer, would keep a stopped server alive.

Invariants
 1. There is always a thread. Where the system starts no more of them (``pids`` of a container), work waits for one that is free, and the next
    work that comes tries again: gRPC ends its own thread, and with it the server, when work is not taken.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

#: Threads that are started at once: so few that they cost nothing, and enough for probes beside a long stream.
_FIRST = 4


class Threads(Executor):
    """At most so many threads, each but the first few started when there is work and no other is idle. ``name``: what they are called, with a
    number. Raises ``RuntimeError`` where not even the first can be started.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        #: Those that look for work, or will as soon as they run.
        self._idle = 0
        self._closed = False
        for number in range(min(most, _FIRST)):
            if not self._start() and not number:
                raise RuntimeError("no thread can be started")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Raises ``RuntimeError`` after ``shutdown``."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("these threads were shut down")
            self._waiting.append((future, lambda: fn(*args, **kwargs)))
            self._changed.notify()
            # More than one, if some could not be started before.
            while len(self._waiting) > self._idle and len(self._threads) < self._most and self._start():
                pass
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; what waits is done still, or cancelled."""
        with self._changed:
            self._closed = True
            cancelled = list(self._waiting) if cancel_futures else []
            if cancel_futures:
                self._waiting.clear()
            self._changed.notify_all()
        for future, _ in cancelled:
            future.cancel()
        if wait:
            self.join(None)

    def join(self, seconds: float | None) -> None:
        """After ``shutdown``: wait until all threads have ended, at most so long."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))

    def _start(self) -> bool:
        """Whether one more thread could be started."""
        thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            return False
        self._threads.append(thread)
        self._idle += 1
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    return
                future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - whoever asked for the work is told
                    future.set_exception(error)
            del future, work
            with self._changed:
                self._idle += 1
