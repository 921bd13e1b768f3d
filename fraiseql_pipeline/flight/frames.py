"""The frame store: what was encoded once, kept on local disk to be sent to any number of readers.

What lives here: entries (the messages of one group of events in one encoding, and an index of them), who fills them, and which are let go.
What must not: what is in a message, the lake, gRPC.

An entry is filled by a thread of the store, never by a reader: the messages go to a file, and everybody who wants them reads behind the
writer, the first reader too. So a slow or vanished reader holds up nobody, two first readers do not encode twice, and what a stream has in
memory is one message. What nobody waits for any more before its turn comes is dropped.

Invariants
 1. An entry is only ever found under its key, and the key names the content (files are never rewritten under their name), so a window that
    was materialized again cannot be served from its old frames.
 2. The index is in memory only. What a crash leaves on disk can be found by nobody, and the next server removes it (``disk.py``).
 3. Complete entries take at most ``max_bytes`` on disk, and less where the disk has no room for more; the last used are kept. What is being
    filled or read comes on top.
 4. An entry that failed, or whose file somebody removed, is forgotten: its readers get the error, the next one fills it anew. So is the
    directory made again.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fraiseql_pipeline import memory
from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.disk import PrivateDirectory, is_full, no_disk
from fraiseql_pipeline.flight.presence import Presence
from fraiseql_pipeline.flight.threads import Threads

#: How the system says that the process has too many files open, which says nothing of the file.
_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})

#: Entries that are kept, whatever their size: one takes 3.2 KB of memory beside its file, and anybody who reads can ask in ever new ways.
MAX_ENTRIES = 16_384

#: Events filled after which memory is given back, as soon as nothing is being filled: 5 to 10 ms that no reader waits for. What the
#: last of them leave, up to so many, stays until the next. A server that has filled 1,000,000 wide events holds 71 to 99 MiB of what
#: encoding has freed in one encoding and 86 to 127 in six without it, 25 to 91 and 56 to 95 with it.
TIDY_ROWS = 100_000

#: What the end waits for threads that fill entries: one message takes milliseconds, but a storage may take its time.
_CLOSE_SECONDS = 2.0


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
        self.size = self.rows = 0
        self.complete = False
        self._path = path
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._grown = threading.Condition()
        self._readers = 0
        self._file = -1
        self._lost = False
        #: How it is filled, until that is begun.
        self._make: Callable[[], Iterable[Message]] | None = None

    def items(self, presence: Presence | None = None) -> Iterator[Item]:
        """The messages in order; waits for those that are still being made. Raises what their maker raised.

        ``presence``: of the client who wants them; raises ``ClientGone`` when it goes while it waits.
        """
        waiter = presence or Presence()
        at = 0
        while True:
            if at < len(self._items):
                yield self._items[at]
                at += 1
                continue
            with self._grown:
                waiter.wait_for(self._grown, partial(self._knows, at))
                if at == len(self._items):
                    if self._error is not None:
                        raise self._error
                    return

    def read(self, item: Item) -> bytes:
        """The bytes of a message. One read of the system, straight into the bytes that are sent: mapped memory would be copied just so."""
        try:
            data = os.pread(self._file, item.size, item.offset)
        except OSError:
            data = b""
        if len(data) != item.size:
            self._lost = True
            raise FlightUnavailable("The server lost frames that it kept on its disk; read again.")
        return data

    def _knows(self, at: int) -> bool:
        """Whether there is a message at a place, or it is known that there will be none."""
        return at < len(self._items) or self.complete or self._error is not None

    def _append(self, message: Message) -> None:
        data = message.data
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, memoryview(data)[written:], self.size + written)
        item = Item(self.size, len(data), *message[1:])
        with self._grown:
            self.size += len(data)
            self.rows += message.rows
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
        self._home = PrivateDirectory(directory or Path(tempfile.gettempdir()))
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._bytes = 0
        self._number = 0
        self._hits = self._misses = self._evictions = 0
        self._closed = False
        self._filling = 0
        self._untidy_rows = 0  # filled since memory was given back
        self._encoders = Threads(encoders or max(2, os.cpu_count() or 1), "frames")

    def open(self, key: Hashable, make: Callable[[], Iterable[Message]], *, keep_going: bool = True) -> Entry:
        """The entry under a key. If there is none, a thread of the store begins to fill it with the messages of ``make``.

        ``keep_going``: fill it to its end even if all its readers leave; for what is small, and likely to be read again.
        """
        with self._lock:
            if self._closed:
                raise _stopping()
            entry = self._entries.get(key)
            if entry is not None and self._is_there(entry):
                self._hits += 1
                self._entries.move_to_end(key)
                entry._readers += 1
                return entry
            self._misses += 1
            entry = self._new(key)
            entry._make = make
            entry._readers = 2  # the reader, and the thread that fills it
            self._entries[key] = entry
            self._encoders.submit(self._fill, entry, keep_going)
        return entry

    def release(self, entry: Entry) -> None:
        """A reader is done with an entry."""
        with self._lock:
            self._let_go_of(entry)
            # However many come and go while the threads are busy: no file and no plan is kept for them.
            if entry._readers == 1 and entry._make is not None:
                self._drop(entry, _unwanted())

    def directory(self) -> Path:
        """The private directory, for other files that live as long as the store; they are none of its bytes. Raises ``FlightUnavailable``."""
        with self._lock:
            if self._closed:
                raise _stopping()
            try:
                return self._home.path()
            except OSError:
                raise no_disk() from None

    def make_room(self) -> bool:
        """Give up what was used longest ago and nobody reads, for who finds the disk full; False: there is no such entry."""
        with self._lock:
            return self._evict()

    def totals_of(self, key: Hashable) -> tuple[int, int] | None:
        """The rows and the bytes of a complete entry; None for any other."""
        entry = self._entries.get(key)
        return (entry.rows, entry.size) if entry is not None and entry.complete else None

    def figures(self) -> Figures:
        with self._lock:
            return Figures(len(self._entries), self._bytes, self._hits, self._misses, self._evictions)

    def close(self) -> None:
        """Stop filling and remove the directory. Entries that readers hold stay readable until they are released."""
        with self._lock:
            self._closed = True
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._encoders.join(_CLOSE_SECONDS)
        with self._lock:
            left = [entry for entry in self._entries.values() if not entry.complete]
            self._entries.clear()
            for entry in left:
                if entry._make is not None:
                    self._drop(entry, _stopping())
                else:  # it hangs: who waits for it is told, and its thread lets go of it whenever it ends
                    entry._end(_stopping())
            self._home.remove()

    def __enter__(self) -> FrameStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, entry: Entry, keep_going: bool) -> None:
        with self._lock:
            make, entry._make = entry._make, None
            if make is None:  # dropped meanwhile
                return
            self._filling += 1
        error: Exception | None = None
        try:
            for message in make():
                if self._closed:
                    raise _stopping()
                if not keep_going and self._is_unwanted(entry):
                    raise _unwanted()
                self._write(entry, message)
        except Exception as failure:  # noqa: BLE001 - it is raised again by every reader
            error = failure
        with self._lock:
            self._filled(entry, error)
            self._filling -= 1
            self._untidy_rows += entry.rows
            tidies = not self._filling and self._untidy_rows >= TIDY_ROWS
            if tidies:
                self._untidy_rows = 0
        if tidies:
            memory.give_back()

    def _is_unwanted(self, entry: Entry) -> bool:
        """Whether nobody but the thread that fills it is left; nobody finds it any more then."""
        if entry._readers > 1:
            return False
        with self._lock:
            if entry._readers > 1:
                return False
            self._forget(entry)
            return True

    def _write(self, entry: Entry, message: Message) -> None:
        while True:
            try:
                entry._append(message)
                return
            except OSError as error:
                if not is_full(error) or not self.make_room():
                    raise no_disk() from None

    # What follows is called with the lock held.

    def _filled(self, entry: Entry, error: Exception | None) -> None:
        entry._end(error)
        if error is None and self._entries.get(entry.key) is entry:
            self._bytes += entry.size
        else:
            self._forget(entry)
        self._let_go_of(entry)

    def _drop(self, entry: Entry, error: Exception) -> None:
        """Give up an entry that is not begun."""
        entry._make = None
        self._filled(entry, error)

    def _let_go_of(self, entry: Entry) -> None:
        entry._readers -= 1
        if entry._readers == 0:
            os.close(entry._file)
            entry._file = -1
        while (self._bytes > self._max_bytes or len(self._entries) > MAX_ENTRIES) and self._evict():
            pass

    def _is_there(self, entry: Entry) -> bool:
        """Whether an entry can be read, its file open; it is forgotten if not. Somebody may tidy up the directory."""
        opened = -1
        try:
            if entry._file < 0:
                opened = os.open(entry._path, os.O_RDONLY)
                entry._lost = entry._lost or os.fstat(opened).st_size != entry.size
        except OSError as error:
            if error.errno in _TOO_MANY:
                raise no_disk() from None
            entry._lost = True
        if not entry._lost:
            entry._file = max(entry._file, opened)
            return True
        if opened >= 0:
            os.close(opened)
        self._forget(entry)
        return False

    def _new(self, key: Hashable) -> Entry:
        """An entry with its file, open. Raises ``FlightUnavailable``."""
        self._number += 1
        while True:
            try:
                entry = Entry(key, self._home.path() / str(self._number))
                entry._file = os.open(entry._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                return entry
            except OSError as error:
                if not is_full(error) or not self._evict():
                    raise no_disk() from None

    def _evict(self) -> bool:
        """Drop what was used longest ago; what somebody reads is passed over."""
        for entry in self._entries.values():
            if entry.complete and entry._readers == 0:
                self._evictions += 1
                self._forget(entry)
                return True
        return False

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            if entry.complete:
                self._bytes -= entry.size
        with suppress(OSError):
            entry._path.unlink()


def _stopping() -> FlightUnavailable:
    return FlightUnavailable("The server is stopping; try again in a moment.")


def _unwanted() -> FlightUnavailable:
    return FlightUnavailable("The server stopped making these frames; read again.")
