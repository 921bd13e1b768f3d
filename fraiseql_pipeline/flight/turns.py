"""Turns: readers that need Postgres ask it one after the other, and only so many wait.

What lives here: ``Turns``. What must not: what is asked, and for what else a reader waits (``live.py``).

Invariants
 1. Who waits holds a thread of the server: so long and no longer, and never all of those that plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fraiseql_pipeline.errors import FlightUnavailable

#: How long a reader waits for its turn.
_TURN_SECONDS = 10.0
#: Of the plans a server makes at once (``FRAISEQL_ARROW_FLIGHT_MAX_STREAMS``), one in so many may wait: who needs nothing of Postgres
#: gets his.
_WAITING_SHARE = 2


class Turns:
    """Of the readers of one server, which makes so many ``plans`` at once."""

    def __init__(self, plans: int) -> None:
        self._asking = threading.Lock()
        self._waiting = threading.BoundedSemaphore(max(1, plans // _WAITING_SHARE))

    @contextmanager
    def asks(self) -> Iterator[None]:
        """The turn of one reader. Raises ``FlightUnavailable`` when it does not come."""
        if not self._asking.acquire(blocking=False):
            with self.waits():
                if not self._asking.acquire(timeout=_TURN_SECONDS):
                    raise _too_slow()
        try:
            yield
        finally:
            self._asking.release()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """One of the readers that wait. Raises ``FlightUnavailable`` when there are enough of them."""
        if not self._waiting.acquire(blocking=False):
            raise _too_slow()
        try:
            yield
        finally:
            self._waiting.release()


def _too_slow() -> FlightUnavailable:
    return FlightUnavailable(
        "The asked range has events that are not published, and the change log gives them too slowly for all who wait for some; "
        "try again in a moment."
    )
