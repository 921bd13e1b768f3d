"""The audit log: one JSON line per call.

What lives here: what a line says and how it gets into the file. What must not: tickets, tokens, payloads, error sentences; a line says
who asked for what kind of thing, and what came of it.

A line: ``at`` (UTC), ``call`` (an id), ``method``, ``action`` of a DoAction, ``principal``, ``org_id`` (null: all tenants), ``peer``,
``code`` (of gRPC), ``reason`` of a refusal (of the credential, else the class of the error) or a cut, ``rows``, ``bytes``, ``seconds``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from fraiseql_pipeline.errors import SettingsError

_log = logging.getLogger(__name__)


class AuditLog:
    """Appends lines to a file, to stderr, or nowhere. A file that was moved away (logrotate) is made anew by the next line."""

    def __init__(self, target: str | None) -> None:
        self._path = None if target in {None, "stderr"} else Path(str(target))
        self._lock = threading.Lock()
        self._file = -1
        #: Whether the last line was cut, by a full disk.
        self._cut = False
        if target == "stderr":
            # The file itself: what Python's own object could not write it tries again with every line, and with it each line fails.
            with suppress(OSError, ValueError, AttributeError):  # there is none
                self._file = os.dup(sys.stderr.fileno())
        elif self._path is not None:
            try:
                self._file = self._open(self._path)
            except OSError:
                raise SettingsError("FRAISEQL_ARROW_FLIGHT_AUDIT_LOG must name a file that can be written, or be stderr.") from None

    def write(self, **facts: Any) -> None:
        """One line. Nothing that goes wrong here fails the call it speaks of, as on a full disk: it is logged."""
        try:
            with self._lock:
                if self._file >= 0:  # not closed: a stream may end after its server
                    if self._path is not None:
                        self._follow(self._path)
                    self._append((json.dumps(facts) + "\n").encode())
        except Exception as error:  # noqa: BLE001 - whatever it is
            problem = error.strerror if isinstance(error, OSError) else type(error).__name__
            _log.error("the audit log cannot be written: %s", problem)

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _append(self, line: bytes) -> None:
        left = b"\n" + line if self._cut else line
        # Nearly always one call: lines of several processes do not mix.
        while left:
            written = os.write(self._file, left)
            left = left[written:]
            self._cut = bool(left)

    def _follow(self, path: Path) -> None:
        ours = os.fstat(self._file)
        try:
            there = path.stat()
            if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
                return
        except FileNotFoundError:
            pass
        renewed = self._open(path)
        os.close(self._file)
        self._file, self._cut = renewed, False

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
