"""The disk that frames and live events are kept on: a directory of this process's own, and what is said where it takes no file.

What lives here: ``PrivateDirectory``, and which failures mean a full disk. What must not: what lies in the directory.

Invariants
 1. As long as the process lives, whatever ends it, nobody else takes the directory for one that was left: it is locked before another
    server can see it.
 2. What servers that died left is removed by the next one on the same parent; what another user has left is not looked at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from fraiseql_pipeline.errors import FlightUnavailable

_PREFIX = "fraiseql-frames-"
_LOCK = "lock"

#: How the system says that a disk has no room.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class PrivateDirectory:
    """A directory under ``parent``, made when it is first asked for, and again when somebody removed it. One thread at a time."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._made: Path | None = None
        self._held = -1

    def path(self) -> Path:
        """Where it is now; the ones of servers that died are removed when it is made. Raises ``OSError``."""
        if self._made is not None and not self._made.is_dir():
            self._leave()
        if self._made is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            for left in self._parent.glob(f"{_PREFIX}*"):
                _remove_if_left(left)
            making = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
            self._held = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._made = making.rename(self._parent / making.name.removeprefix("."))
        return self._made

    def remove(self) -> None:
        """With all that is in it."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            self._leave()

    def _leave(self) -> None:
        os.close(self._held)
        self._made = None


def _remove_if_left(directory: Path) -> None:
    try:
        found = directory.lstat()
        # In a directory that users share, others may have put there what makes an open wait: a lease holds it up for 45 s.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        held = os.open(directory / _LOCK, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # being made
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        return
    finally:
        os.close(held)


def is_full(error: OSError) -> bool:
    """Whether a disk has no room."""
    return error.errno in _FULL


def no_disk() -> FlightUnavailable:
    """What a client is told where a disk takes no file."""
    return FlightUnavailable(
        "The server cannot keep frames: its cache directory is full or cannot be written; see FRAISEQL_ARROW_FLIGHT_CACHE_DIR."
    )
