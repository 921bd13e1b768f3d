"""Signals as bytes on a socket: how a server hears that it shall end.

What lives here: ``heard``. What must not: what is done about a signal (``server.py``, ``workers.py``).

A signal may reach any thread of gRPC's, and then wakes no lock that the main thread waits for: it has to come through a file descriptor.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard(*numbers: signal.Signals) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Signals, a byte each, as they come: the socket to read them from, and the one that others may write to as if they were a signal.

    To be used in the main thread; as long as the block runs, these signals do nothing else.
    """
    told, teller = socket.socketpair()
    teller.setblocking(False)
    with told, teller:
        descriptor = signal.set_wakeup_fd(teller.fileno())
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield told, teller
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
