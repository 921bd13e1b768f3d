"""The frame store: what was encoded once, kept on local disk to be sent to any number of readers.

What lives here: entries (the messages of one group of events in one encoding, and an index of them), who fills them, and which are let go.
What must not: what is in a message, the lake, gRPC.

An entry is filled by a thread of the store, never by a reader: the messages go to a file, and everybody who wants them reads behind the
writer, the first reader too. So a slow or vanished reader holds up nobody, two first readers do not encode twice, and what a stream has in
memory is one message.

Invariants
 1. An entry is only ever found under its key, and the key names the content (files are never rewritten under their name), so a window that
    was materialized again cannot be served from its old frames.
 2. The index is in memory only. What a crash leaves on disk can be found by nobody, and the next server removes it.
 3. Complete entries take at most ``max_bytes`` on disk, the last used are kept; what is being filled or read comes on top.
 4. An entry that failed is forgotten: its readers get the error, the next one tries again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fraiseql_pipeline.errors import FlightUnavailable

_PREFIX = "fraiseql-frames-"
_LOCK = "lock"


class Message(NamedTuple):
    """One message to keep. ``rows`` is 0 for a dictionary, ``column`` then the number of its column; times in µs, both ends inclusive."""

    data: bytes
    rows: int
    low: int = 0
    high: int = 0
    low_pk: int = 0
    high_pk: int = 0
    checksum: int = 0
    column: int = -1


class Item(NamedTuple):
    """Where a message lies, and what is in it. ``checksum`` of a dictionary: of its bytes."""

    offset: int
    size: int
    rows: int
    low: int
    high: int
    low_pk: int
    high_pk: int
    checksum: int
    column: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What the store has done so far, and what it holds."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: int


class Entry:
    """The messages under one key, while a reader has them. Give it back with ``FrameStore.release``."""

    def __init__(self, key: Hashable, path: Path) -> None:
        self.key = key
        self.size = 0
        self.complete = False
        self._path = path
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._grown = threading.Condition()
        self._readers = 0
        self._file = -1

    def items(self) -> Iterator[Item]:
        """The messages in order; waits for those that are still being made. Raises what their maker raised."""
        at = 0
        while True:
            if at < len(self._items):
                yield self._items[at]
                at += 1
                continue
            with self._grown:
                while at == len(self._items) and not self.complete and self._error is None:
                    self._grown.wait()
                if at == len(self._items):
                    if self._error is not None:
                        raise self._error
                    return

    def read(self, item: Item) -> bytes:
        """The bytes of a message. One read of the system, straight into the bytes that are sent: mapped memory would be copied just so."""
        data = os.pread(self._file, item.size, item.offset)
        if len(data) != item.size:
            raise FlightUnavailable("The server lost frames that it kept on its disk; read again.")
        return data

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._readers == 0

    def _append(self, message: Message) -> None:
        data = message.data
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, memoryview(data)[written:], self.size + written)
        item = Item(self.size, len(data), *message[1:])
        with self._grown:
            self.size += len(data)
            self._items.append(item)
            self._grown.notify_all()

    def _end(self, error: Exception | None) -> None:
        with self._grown:
            self._error = error
            self.complete = error is None
            self._grown.notify_all()


class FrameStore:
    """Keeps at most ``max_bytes`` of messages in a private directory under ``directory`` (the system's temporary one unless given).

    ``encoders``: how many entries are filled at once. Close it, or use it in a ``with`` block.
    """

    def __init__(self, max_bytes: int, directory: Path | None = None, encoders: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._parent = directory or Path(tempfile.gettempdir())
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._bytes = 0
        self._number = 0
        self._hits = self._misses = self._evictions = 0
        self._closed = False
        self._directory: Path | None = None
        self._held = -1
        self._encoders = ThreadPoolExecutor(encoders or max(2, os.cpu_count() or 1), thread_name_prefix="frames")

    def open(self, key: Hashable, make: Callable[[], Iterable[Message]], *, keep_going: bool = True) -> Entry:
        """The entry under a key. If there is none, a thread of the store begins to fill it with the messages of ``make``.

        ``keep_going``: fill it to its end even if all its readers leave; for what is small, and likely to be read again.
        """
        with self._lock:
            if self._closed:
                raise _stopping()
            entry = self._entries.get(key)
            if entry is not None:
                self._hits += 1
                self._entries.move_to_end(key)
                if entry._file < 0:
                    try:
                        entry._file = os.open(entry._path, os.O_RDONLY)
                    except OSError:
                        raise _no_disk() from None
                entry._readers += 1
                return entry
            self._misses += 1
            self._number += 1
            try:
                entry = Entry(key, self._home() / str(self._number))
                entry._file = os.open(entry._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                raise _no_disk() from None
            entry._readers = 2  # the reader, and the thread that fills it
            self._entries[key] = entry
        self._encoders.submit(self._fill, entry, make, keep_going)
        return entry

    def release(self, entry: Entry) -> None:
        """A reader is done with an entry."""
        with self._lock:
            entry._readers -= 1
            if entry._readers == 0:
                os.close(entry._file)
                entry._file = -1
            self._let_go()

    def directory(self) -> Path:
        """The private directory, for other files that live as long as the store; they are none of its bytes."""
        with self._lock:
            if self._closed:
                raise _stopping()
            return self._home()

    def size_of(self, key: Hashable) -> int | None:
        """The bytes of a complete entry; None for any other."""
        entry = self._entries.get(key)
        return entry.size if entry is not None and entry.complete else None

    def figures(self) -> Figures:
        with self._lock:
            return Figures(len(self._entries), self._bytes, self._hits, self._misses, self._evictions)

    def close(self) -> None:
        """Stop filling and remove the directory. Entries that readers hold stay readable until they are released."""
        with self._lock:
            self._closed = True
        self._encoders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            # What is not complete now was cancelled before it began.
            waiting = [entry for entry in self._entries.values() if not entry.complete]
            self._entries.clear()
        for entry in waiting:
            entry._end(_stopping())
            self.release(entry)
        with self._lock:
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                os.close(self._held)
                self._directory = None

    def __enter__(self) -> FrameStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, entry: Entry, make: Callable[[], Iterable[Message]], keep_going: bool) -> None:
        error: Exception | None = None
        try:
            for message in make():
                # One reader is this thread.
                if self._closed or (not keep_going and entry._readers == 1):
                    raise FlightUnavailable("The server stopped making these frames; read again.")
                try:
                    entry._append(message)
                except OSError:
                    raise _no_disk() from None
        except Exception as failure:  # noqa: BLE001 - it is raised again by every reader
            error = failure
        with self._lock:
            entry._readers -= 1
            if error is None:
                self._bytes += entry.size
            else:
                self._forget(entry)
            entry._end(error)
            if entry._readers == 0:
                os.close(entry._file)
                entry._file = -1
            self._let_go()

    def _let_go(self) -> None:
        """Drop what was used longest ago until the rest fits. What somebody reads is passed over."""
        if self._bytes <= self._max_bytes:
            return
        for entry in list(self._entries.values()):
            if self._bytes <= self._max_bytes:
                return
            if entry.complete and entry._readers == 0:
                self._bytes -= entry.size
                self._evictions += 1
                self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        with suppress(FileNotFoundError):
            entry._path.unlink()

    def _home(self) -> Path:
        """The private directory; made when it is first needed, and beside it the ones of servers that died are removed."""
        if self._directory is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            for left in self._parent.glob(f"{_PREFIX}*"):
                _remove_if_left(left)
            making = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
            self._held = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            # Held as long as the process lives, whatever ends it; taken before another server can see the directory.
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._directory = making.rename(self._parent / making.name.removeprefix("."))
        return self._directory


def _remove_if_left(directory: Path) -> None:
    try:
        held = os.open(directory / _LOCK, os.O_RDWR)
    except OSError:  # somebody else's, or being made
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        return
    finally:
        os.close(held)


def _stopping() -> FlightUnavailable:
    return FlightUnavailable("The server is stopping; try again in a moment.")


def _no_disk() -> FlightUnavailable:
    return FlightUnavailable(
        "The server cannot keep frames: its cache directory is full or cannot be written; see FRAISEQL_ARROW_FLIGHT_CACHE_DIR."
    )
