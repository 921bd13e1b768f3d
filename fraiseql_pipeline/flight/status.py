"""Errors → gRPC statuses: the only place where a failure becomes what a client sees.

What lives here: the mapping. What must not: a reason to fail, a call (``edge.py``).

Invariants
 1. A client gets a status code and one sentence. An error this package did not raise on purpose is INTERNAL with an id; the error
    itself goes to the server's log under that id, never to the client.
 2. A stream that fails ends in a status, so a client can never take a part for the whole.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import NoReturn

import grpc

from fraiseql_pipeline.errors import (
    FlightBusy,
    FlightRefused,
    InputError,
    LakeDamaged,
    LakeEmpty,
    NotAllowed,
    NotAuthenticated,
    NotOffered,
    PipelineError,
    WindowMissing,
)
from fraiseql_pipeline.flight import protocol

_log = logging.getLogger(__name__)

_CODES: tuple[tuple[type[PipelineError], grpc.StatusCode], ...] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (WindowMissing, grpc.StatusCode.FAILED_PRECONDITION),
    (LakeEmpty, grpc.StatusCode.NOT_FOUND),
    (LakeDamaged, grpc.StatusCode.DATA_LOSS),
    (FlightBusy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotAuthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (NotAllowed, grpc.StatusCode.PERMISSION_DENIED),
    (NotOffered, grpc.StatusCode.UNIMPLEMENTED),
)

#: What FAILED_PRECONDITION is in Arrow's C++ clients (``arrow::StatusCode::Invalid``), with or without a detail.
_ARROW_INVALID = "4"

#: Bytes of a sentence. Statuses travel in HTTP/2 headers, which clients limit to 8 KiB or more, and what is no ASCII takes three times as much there.
_MAX_SENTENCE_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Status:
    """What a client gets for an error: a code, a sentence, and when to try again. ``kind``: the error's class where the code has several."""

    code: grpc.StatusCode
    sentence: str
    retry_after_seconds: float | None = None
    kind: str | None = None

    def abort(self, context: grpc.ServicerContext) -> NoReturn:
        """End the call in this status."""
        if self.retry_after_seconds is not None:
            # The first is for clients that retry by themselves (gRFC A6), the second for programs (google.rpc.RetryInfo).
            details = protocol.retry_details(self.code.value[0], self.sentence, self.retry_after_seconds)
            context.set_trailing_metadata(
                (("grpc-retry-pushback-ms", str(int(self.retry_after_seconds * 1000))), ("grpc-status-details-bin", details))
            )
        if self.kind is not None:
            # As Arrow's own servers say more than a code can: its C++ clients, pyarrow among them, show the detail behind the sentence.
            context.set_trailing_metadata((("x-arrow-status", _ARROW_INVALID), ("x-arrow-status-detail-bin", self.kind.encode())))
        context.abort(self.code, self.sentence)


def status_of(error: Exception) -> Status:
    """The status a client gets for an error. Logs what must not be told to it."""
    if not isinstance(error, PipelineError):
        incident = uuid.uuid4().hex[:12]
        _log.error("internal error, id %s", incident, exc_info=error)
        return Status(grpc.StatusCode.INTERNAL, f"Internal error, id {incident}; the server's log has the details under this id.")
    fallback = grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.FAILED_PRECONDITION
    code = next((code for kind, code in _CODES if isinstance(error, kind)), fallback)
    # What a caller brings about is told to him and counted: one who asks in a loop must not fill the log.
    if not isinstance(error, InputError | FlightRefused | FlightBusy):
        _log.warning("%s: %s", code.name, error)
    retry_after_seconds = error.retry_after_seconds if isinstance(error, FlightBusy) else None
    kind = type(error).__name__ if code is grpc.StatusCode.FAILED_PRECONDITION else None
    sentence = str(error).encode(errors="replace")[:_MAX_SENTENCE_BYTES].decode(errors="ignore")
    return Status(code, sentence, retry_after_seconds, kind)
