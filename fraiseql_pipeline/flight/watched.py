"""A file of the operator's that is read again when it changes: tokens, keys, certificates.

What lives here: ``Watched``. What must not: what is in the file.

Invariants
 1. A change is seen by the next use; unchanged files cost one ``stat`` each.
 2. A file that is missing or wrong at the start is ``SettingsError``. Later, what was read last stays in force and the log says so:
    an edit that is half done must not lock everybody out. What is wrong, ``parse`` decides; a list that was cut behind one of its lines is
    a shorter list, so an operator who edits one renames the new file into its place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from fraiseql_pipeline.errors import SettingsError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Stamp = tuple[tuple[int, int, int], ...]


class Watched(Generic[_T]):
    """What ``parse`` makes of the bytes of ``files``; ``parse`` raises ``SettingsError``. ``setting`` names them in messages."""

    def __init__(self, setting: str, files: tuple[str, ...], parse: Callable[..., _T]) -> None:
        self._setting = setting
        self._files = tuple(Path(file) for file in files)
        self._parse = parse
        self._lock = threading.Lock()
        # Stamped before it is read: a change in between is read twice, never missed.
        self._stamp = self._stamped()
        self._value = self._read()

    def get(self) -> _T:
        """The newest that could be read."""
        try:
            stamp = self._stamped()
        except SettingsError:
            stamp = ()
        if stamp != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._renew(stamp)
        return self._value

    def _renew(self, stamp: _Stamp) -> None:
        try:
            self._value = self._read()
            _log.info("%s changed and was read again", self._setting)
        except SettingsError as error:
            _log.error("%s The one read before stays in force.", error)
        self._stamp = stamp

    def _stamped(self) -> _Stamp:
        try:
            states = [file.stat() for file in self._files]
        except OSError:
            raise self._unreadable() from None
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)

    def _read(self) -> _T:
        try:
            contents = [file.read_bytes() for file in self._files]
        except OSError:
            raise self._unreadable() from None
        return self._parse(*contents)

    def _unreadable(self) -> SettingsError:
        return SettingsError(f"{self._setting} must name files that can be read.")
