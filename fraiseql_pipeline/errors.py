"""Every error this package raises on purpose, and what a caller may do about it.

What lives here: the tree below, nothing else. What must not: imports, I/O, translation into another system's errors (Flight
statuses are made in ``flight/``, Dagster failures in ``assets/``; those two edges are the only translators).

    PipelineError                 exit code   retryable
    ├── SettingsError                 2          no     a setting or a configuration file is wrong
    ├── InputError                    2          no     an argument is wrong
    │   ├── WindowError               2          no     … a window key, a range or a time expression
    │   └── TicketError               2          no     … a ticket
    ├── SourceError                   3          no     Postgres
    │   ├── SourceUnavailable         3          yes    unreachable, or a read broke off
    │   ├── SourceRefused             3          no     the change log cannot be read safely (preflight)
    │   │   └── EventsUnreadable          3          no     … some of its events: damaged, or too many that cannot be sent
    │   └── SettleTimeout             3          yes    writers are still open; carries the blockers
    ├── ValidationHalted              4          no     too many rejected rows, or the columns drifted
    ├── LakeError                     5          no     Delta
    │   ├── LakeUnavailable           5          yes    the storage did not answer
    │   ├── LakeConflict              5          yes    other writers won every attempt
    │   ├── LakeDamaged               5          no     the log or a data file is torn; ``fsck`` tells
    │   ├── WindowShrinks             5          no     a re-run would lower a window's rows
    │   ├── WindowMissing             5          no     a hole in the asked range; carries the windows
    │   └── LakeEmpty                 5          no     nothing was published yet
    ├── FlightUnavailable             6          yes    the Flight server did not answer, or a stream broke off
    │   └── FlightBusy                6          yes    … it is at a limit of its own; carries when to try again
    └── FlightRefused                 6          no     the Flight server refuses the call
        ├── NotAuthenticated          6          no     … it does not know who calls
        ├── NotAllowed                6          no     … who calls may not do this
        └── NotOffered                6          no     … it has no such call

A message is one sentence or two: what failed, with which value, what to do. It never holds a DSN, a path of the server, SQL
text or a value out of an event, so it may be logged and sent to clients as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class PipelineError(Exception):
    """Base of the tree. ``exit_code`` is the command line's; ``retryable`` says whether the same call may succeed later.

    ``refused``: where a run over windows ends in this error, the keys of those that were refused, oldest first, each with its own error.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    refused: tuple[tuple[str, PipelineError], ...] = ()

    @property
    def of_one_window(self) -> bool:
        """Whether other windows may do although the one that was worked on did not, now or later."""
        return False


class SettingsError(PipelineError):
    exit_code = 2


class InputError(PipelineError):
    exit_code = 2


class WindowError(InputError):
    pass


class TicketError(InputError):
    pass


class SourceError(PipelineError):
    exit_code = 3


class SourceUnavailable(SourceError):
    retryable = True


class SourceRefused(SourceError):
    pass


class EventsUnreadable(SourceRefused):
    @property
    def of_one_window(self) -> bool:
        return True


class SettleTimeout(SourceError):
    """``blockers``: one sentence per session that still holds the change log, to be shown to the user."""

    retryable = True

    def __init__(self, message: str, blockers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.blockers = tuple(blockers)


class ValidationHalted(PipelineError):
    """``window``: the key of the window that is halted; None where the columns are at fault, which all windows share."""

    exit_code = 4

    def __init__(self, message: str, window: str | None = None) -> None:
        super().__init__(message)
        self.window = window

    @property
    def of_one_window(self) -> bool:
        return self.window is not None


class LakeError(PipelineError):
    exit_code = 5

    @property
    def of_one_window(self) -> bool:
        return not self.retryable


class LakeUnavailable(LakeError):
    retryable = True


class LakeConflict(LakeError):
    retryable = True


class LakeDamaged(LakeError):
    pass


class WindowShrinks(LakeError):
    pass


class WindowMissing(LakeError):
    """``missing``: the keys of the windows that are not published, in order."""

    def __init__(self, message: str, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class LakeEmpty(LakeError):
    pass


class FlightUnavailable(PipelineError):
    exit_code = 6
    retryable = True


class FlightBusy(FlightUnavailable):
    """``retry_after_seconds``: when the same call may succeed; None when nobody knows."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class FlightRefused(PipelineError):
    exit_code = 6


class NotAuthenticated(FlightRefused):
    """``reason``: one word for metrics and the audit log; a client is never told it."""

    def __init__(self, message: str, reason: str = "unknown") -> None:
        super().__init__(message)
        self.reason = reason


class NotAllowed(FlightRefused):
    pass


class NotOffered(FlightRefused):
    pass
