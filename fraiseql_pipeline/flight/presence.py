"""Presence: whether the client of a call is still there, for whatever waits on its behalf.

What lives here: ``Presence``. What must not: gRPC (``limits.py`` has it told), what is waited for.

Invariants
 1. A wait ends when what is waited for holds or the client is gone, whichever comes first; nobody polls.
 2. ``leave`` takes no longer than whoever holds the condition that is waited on: gRPC calls it in the one thread that takes all calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class ClientGone(Exception):
    """Nobody wants the rest."""


class Presence:
    """One call's client. Its thread waits, any other may tell that it left."""

    def __init__(self) -> None:
        self.gone = False
        self._waiting: threading.Condition | None = None

    def wait_for(self, condition: threading.Condition, holds: Callable[[], bool]) -> None:
        """Wait until something holds; the caller has the condition, whoever makes it hold notifies. Raises ``ClientGone``."""
        # Before ``gone`` is looked at: whoever leaves says so first and then looks here.
        self._waiting = condition
        try:
            condition.wait_for(lambda: self.gone or holds())
        finally:
            self._waiting = None
        if self.gone:
            raise ClientGone

    def leave(self) -> None:
        """The client is gone, for ever."""
        self.gone = True
        if (condition := self._waiting) is not None:
            with condition:
                condition.notify_all()
