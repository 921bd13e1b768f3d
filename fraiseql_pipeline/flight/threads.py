"""Threads: a pool that the end of the process does not wait for.

What lives here: ``Threads``. What must not: what they do.

The pools of ``concurrent.futures`` are joined when the interpreter ends, however long their work takes: a call that waits for a lock of
Postgres, or for a storage that does not answer, would keep a stopped server alive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Threads(Executor):
    """At most so many threads, each started when there is work and no other is idle. ``name``: what they are called, with a number."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Raises ``RuntimeError`` after ``shutdown``."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("these threads were shut down")
            self._waiting.append((future, lambda: fn(*args, **kwargs)))
            if len(self._waiting) <= self._idle:
                self._changed.notify()
            elif len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
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

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
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
