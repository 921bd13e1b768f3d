"""Limits: how much one ticket may ask, how many calls of a kind there are, how long each may last, and how slow its reader may be.

What lives here: the check of a plan, the slots of calls, and the thread that cuts streams. What must not: sizes of tickets
(``ticket.py``) and messages (``server.py``).

A server cannot time out a send: gRPC blocks it while the client's window is full, and a status cannot overtake the messages before it.
What works (measured: the sender is free 2 ms later) is to cancel the call from another thread. gRPC's public ``cancel`` tells the client
CANCELLED, which pyarrow turns into a ``KeyboardInterrupt``; its call object takes a status and a sentence as well, so that is used where
it is there.

Invariants
 1. Every call that may take longer than its own computation holds a slot of its kind, and the threads of a server are more than all slots:
    whatever clients, storage and database do, a call without a slot is answered or refused at once.
 2. A call holds its slot until its last message is taken or its client is gone, and no longer than what it has under way with the database
    or the storage then.
 3. Only time in which the server waits for its client counts as stalled; a stream that waits for events is not slow.
 4. A call that waits for its client's next message waits no longer than a stalled one: gRPC hands over whole messages, so how fast a half
    of one comes cannot be seen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import grpc

from fraiseql_pipeline.errors import FlightBusy, TicketError
from fraiseql_pipeline.flight.auth import Caller
from fraiseql_pipeline.flight.plan import Plan
from fraiseql_pipeline.flight.presence import Presence
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import to_micros

_log = logging.getLogger(__name__)

#: What a client that is refused for want of a slot is told to wait.
_RETRY_SECONDS = 1.0

#: Calls other than streams of events that answer with several messages (ListFlights, DoAction …) and so can be held up by a client, and
#: those of one principal.
SHORT_CALLS, SHORT_CALLS_EACH = 24, 8

#: Health probes, and those of one address: a probe is a message and its answer.
PROBES, PROBES_EACH = 16, 8

#: Handshakes wait for a message of their client: so many of those whose header says who they are, and of those nobody knows yet; and of
#: each of them. So who is silent keeps nobody else from logging in, unless it has many addresses, and never who sends a header.
HANDSHAKES, HANDSHAKES_EACH = 16, 4
_HANDSHAKE_SECONDS = 10.0

#: What a ticket that says now-1d may have more than a day: its "now" is this server's, and what had settled is told by the
#: database's clock, after what was waited for.
_CLOCKS = timedelta(minutes=1)


def check(decided: Plan, settings: Settings) -> None:
    """Raises ``TicketError`` for a plan above ``FRAISEQL_ARROW_FLIGHT_MAX_ROWS``, as far as it knows, or ``_MAX_RANGE_DAYS``."""
    most = settings.arrow_flight_max_rows
    if most is not None and decided.rows is not None and decided.rows > most:
        raise too_many_rows(most)
    days = settings.arrow_flight_max_range_days
    if days is not None and _covered(decided) > timedelta(days=days) + _CLOCKS:
        raise TicketError(f"A ticket must not cover more than {days} days of events on this server; ask for a part at a time.")


def _covered(decided: Plan) -> timedelta:
    """How much of time a plan reads. A ticket may say "since ever": only what is published of it is work.

    Who reads on behind a key gets the range he began with, older with every read: of its windows, only those that have more by now are work.
    """
    start, after_pk = max(decided.ticket.start, decided.view.extent[0]), decided.ticket.after_pk
    if not after_pk:
        return decided.complete_through - start
    micros = decided.view.covered_above(after_pk, to_micros(start), to_micros(decided.complete_through))
    return timedelta(microseconds=micros)


def too_many_rows(most: int) -> TicketError:
    return TicketError(f"A stream must not have more than {most} events on this server; ask for a smaller range, or set a limit.")


Use = Literal["stream", "plan", "short"]
"""A stream of events; a call with one answer, which may wait for the lake and the database; any other call that sends messages."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Calls that share slots: ``most`` at a time, ``each`` of one client, none of them longer than ``seconds``.

    ``does`` and ``whom``: what a client that is refused is told of them.
    """

    most: int
    each: int | None
    seconds: float
    does: str
    whom: str = "to this principal"


@dataclass(slots=True, eq=False)
class Running:
    """A call that has a slot. ``caller``: None while nobody knows. ``cut``: why it was ended from outside; None: it was not."""

    context: grpc.ServicerContext
    caller: Caller | None
    lifetime_seconds: float
    began: float = field(default_factory=time.monotonic)
    names: frozenset[bytes] = frozenset()
    presence: Presence = field(default_factory=Presence)
    #: What its client can do about a cut.
    advice: str = "read faster, or read a smaller range"
    cut: str | None = None
    sent_bytes: int = 0
    waited: float = 0.0
    waiting_since: float | None = None
    receiving_since: float | None = None
    _checked_bytes: int = 0
    _checked_waited: float = 0.0

    def sending(self) -> None:
        self.waiting_since = time.monotonic()

    def sent(self, size: int) -> None:
        began, self.waiting_since = self.waiting_since, None
        self.waited += time.monotonic() - (began or 0.0)
        self.sent_bytes += size

    def waited_until(self, now: float) -> float:
        """Seconds the server has waited for this client, a wait that goes on included."""
        # In this order: between the two the sender may go on, and then too little is counted, never too much.
        waited, since = self.waited, self.waiting_since
        return waited + (0.0 if since is None else now - since)

    def verdict(self, now: float, stall_seconds: float, min_bytes_per_second: float) -> str | None:
        """Why this call has to end; None: it need not."""
        if now - self.began > self.lifetime_seconds:
            return "lifetime"
        receiving = self.receiving_since
        if receiving is not None and now - receiving > stall_seconds:
            return "idle"
        waited = self.waited_until(now)
        waiting = waited - self._checked_waited
        if waiting < stall_seconds:
            return None
        if self.sent_bytes - self._checked_bytes < min_bytes_per_second * waiting:
            return "stalled"
        self._checked_bytes, self._checked_waited = self.sent_bytes, waited
        return None


class Slots:
    """Every call that has a slot, and the thread that watches them. ``on_cut`` is told the reason of each cut."""

    def __init__(self, settings: Settings, on_cut: Callable[[str], None]) -> None:
        self._settings = settings
        self._on_cut = on_cut
        self.max_rows = settings.arrow_flight_max_rows
        streams, each = settings.arrow_flight_max_streams, settings.arrow_flight_max_streams_per_principal
        longest = settings.arrow_flight_max_stream_seconds
        self._of: dict[Use, Kind] = {
            "stream": Kind(streams, each, longest, "sends {} streams"),
            # As many as streams: whoever may read may plan.
            "plan": Kind(streams, each, longest, "plans {} tickets", "for this principal"),
            "short": Kind(SHORT_CALLS, SHORT_CALLS_EACH, longest, "answers {} such calls"),
        }
        self._probes = Kind(PROBES, PROBES_EACH, _HANDSHAKE_SECONDS, "answers {} probes", "from this address")
        self._logins = Kind(HANDSHAKES, HANDSHAKES_EACH, _HANDSHAKE_SECONDS, "answers {} handshakes")
        self._strangers = Kind(HANDSHAKES, HANDSHAKES_EACH, _HANDSHAKE_SECONDS, "answers {} handshakes", "from this address")
        self._lock = threading.Lock()
        self._running: set[Running] = set()
        self._held: Counter[Kind] = Counter()
        self._held_by: Counter[tuple[Kind, str]] = Counter()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def most(self) -> int:
        """Calls that may have a slot at a time, of all kinds."""
        return sum(kind.most for kind in (*self._of.values(), self._probes, self._logins, self._strangers))

    def call(self, use: Use, caller: Caller, context: grpc.ServicerContext, *, shared: bool) -> AbstractContextManager[Running]:
        """A call of somebody who is known. ``shared``: the principal is everyone, so no limit of one principal applies. Raises
        ``FlightBusy``.
        """
        return self._run(self._of[use], caller, context, None if shared else caller.name)

    def probe(self, context: grpc.ServicerContext) -> AbstractContextManager[Running]:
        """A call that anybody may make. Raises ``FlightBusy``."""
        return self._run(self._probes, None, context, _address(context))

    def handshake(self, caller: Caller | None, context: grpc.ServicerContext) -> AbstractContextManager[Running]:
        """A call of somebody who logs in. ``caller``: whom its header proves it to be; None: nobody yet. Raises ``FlightBusy``."""
        if caller is not None:
            return self._run(self._logins, caller, context, caller.name)
        return self._run(self._strangers, None, context, _address(context))

    def cancel(self, name: bytes, caller: Caller) -> int:
        """End the streams of a caller that carry this name; how many there were."""
        with self._lock:
            named = [r for r in self._running if r.caller is not None and r.caller.name == caller.name and name in r.names]
            found = [running for running in named if running.cut is None]
        for running in found:
            self._cut(running, "cancelled")
        return len(found)

    def close(self) -> None:
        self._ended.set()

    @contextmanager
    def _run(self, kind: Kind, caller: Caller | None, context: grpc.ServicerContext, limited: str | None) -> Iterator[Running]:
        running = Running(context, caller, kind.seconds)
        with self._lock:
            self._admit(kind, limited)
            if self._watch is None:
                watch = threading.Thread(target=self._watch_all, name="flight-watch", daemon=True)
                watch.start()  # first: where no thread can be had there is no slot
                self._watch = watch
            self._running.add(running)
            self._held[kind] += 1
            if limited is not None:
                self._held_by[kind, limited] += 1
        try:
            if not context.add_callback(running.presence.leave):
                running.presence.leave()
            yield running
        finally:
            with self._lock:
                self._running.discard(running)
                self._held[kind] -= 1
                if limited is not None:
                    self._held_by[kind, limited] -= 1
                    if not self._held_by[kind, limited]:
                        del self._held_by[kind, limited]

    def _admit(self, kind: Kind, limited: str | None) -> None:
        if self._held[kind] >= kind.most:
            raise FlightBusy(f"The server already {kind.does.format(kind.most)}, its limit; try again in a moment.", _RETRY_SECONDS)
        if limited is not None and kind.each is not None and self._held_by[kind, limited] >= kind.each:
            raise FlightBusy(
                f"The server already {kind.does.format(kind.each)} {kind.whom}, its limit; finish one, or try again in a moment.",
                _RETRY_SECONDS,
            )

    def _watch_all(self) -> None:
        settings = self._settings
        shortest = min(settings.arrow_flight_stall_seconds, settings.arrow_flight_max_stream_seconds, _HANDSHAKE_SECONDS)
        while not self._ended.wait(min(max(shortest / 4, 0.02), 1.0)):
            with self._lock:
                running = list(self._running)
            now = time.monotonic()
            for call in running:
                reason = call.verdict(now, settings.arrow_flight_stall_seconds, settings.arrow_flight_min_bytes_per_second)
                if reason is not None and call.cut is None:
                    self._cut(call, reason)

    def _cut(self, running: Running, reason: str) -> None:
        context: Any = running.context
        running.cut = reason
        self._on_cut(reason)
        code, sentence = {
            "stalled": (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                (
                    f"The stream was cut because its reader took less than {self._settings.arrow_flight_min_bytes_per_second} bytes "
                    f"per second for {self._settings.arrow_flight_stall_seconds:g} s; {running.advice}."
                ),
            ),
            "lifetime": (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"The call was cut after {running.lifetime_seconds:g} s, the longest it may last; ask for a smaller part.",
            ),
            "idle": (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                (
                    f"The call was cut because its client sent nothing whole for {self._settings.arrow_flight_stall_seconds:g} s; "
                    "end it when there is nothing to send, and send smaller batches on a slow network."
                ),
            ),
            "cancelled": (grpc.StatusCode.ABORTED, "The stream was ended by CancelFlightInfo."),
        }[reason]
        _log.info(
            "a call of %s was cut: %s", "somebody who logs in" if running.caller is None else running.caller.principal, reason
        )
        try:
            context._rpc_event.call.cancel(code.value[0], sentence)  # see the module's docstring
        except (AttributeError, TypeError):
            context.cancel()


def _address(context: grpc.ServicerContext) -> str:
    """Of the client, without its port."""
    return str(context.peer()).rpartition(":")[0]
