"""A TCP proxy in front of a Postgres, to break the network: cut connections, or let them hang."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import parse_qs, urlsplit


class Proxy:
    """Forwards connections of ``port`` to a server's address until it is told otherwise."""

    def __init__(self, target: str | tuple[str, int]) -> None:
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """From now on nothing passes, and connections stay open: a dead network."""
        self._flowing.clear()

    def cut(self) -> None:
        """Resets every connection."""
        self._flowing.set()
        for end in self._ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                family = socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET
                far = socket.socket(family)
                far.connect(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy and the URL that leads through it."""
    parts = urlsplit(url)
    directory = parse_qs(parts.query).get("host", [""])[0]
    target: str | tuple[str, int]
    target = (
        f"{directory}/.s.PGSQL.{parts.port or 5432}"
        if directory.startswith("/")
        else (parts.hostname or directory, parts.port or 5432)
    )
    proxy = Proxy(target)
    user = parts.netloc.rpartition("@")[0]
    try:
        yield proxy, f"postgresql://{user}@127.0.0.1:{proxy.port}{parts.path}?gssencmode=disable&sslmode=disable"
    finally:
        proxy.close()
