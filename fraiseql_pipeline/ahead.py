"""Working ahead: what one thread makes while another takes.

What lives here: ``ahead``. What must not: what is made.

Invariants
 1. At most ``depth`` items wait, so memory does not grow with how many there are.
 2. An error comes where its item would have come, and nothing reads on when the block has ended.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar, cast

_S = TypeVar("_S")
_T = TypeVar("_T")

_END = object()


@dataclass(frozen=True, slots=True)
class _Broken:
    error: BaseException


@contextmanager
def ahead(source: AbstractContextManager[_S], work: Callable[[_S], Generator[_T]], depth: int) -> Iterator[Iterator[_T]]:
    """What ``work`` makes of what ``source`` gives, by a thread of its own that is at most ``depth`` items ahead.

    An error of the thread is raised where its item would have come. Leaving the block stops the thread, closes the source and then waits
    for the thread: a source that says nothing holds nobody up, and nothing reads on behind the caller's back.
    """
    waiting: queue.Queue[object] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.05)
                return

    def produce(given: _S) -> None:
        try:
            with closing(work(given)) as items:
                for item in items:
                    put(item)
                    if stop.is_set():
                        return
            put(_END)
        except BaseException as error:  # noqa: BLE001 - raised again in the consuming thread
            put(_Broken(error))

    def consume() -> Generator[_T]:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Broken):
                raise item.error
            yield cast("_T", item)

    thread = None
    try:
        with source as given:
            thread = threading.Thread(target=produce, args=[given], name="ahead", daemon=True)
            try:
                thread.start()
                with closing(consume()) as consumer:
                    yield consumer
            finally:
                stop.set()
    finally:
        stop.set()  # a signal may raise between any two lines
        if thread is not None and thread.ident is not None:
            thread.join()
