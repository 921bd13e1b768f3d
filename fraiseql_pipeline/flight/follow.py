"""Follow: the stream of a ticket that goes on with events as they settle.

What lives here: the turns of such a stream, and when it ends. What must not: where events come from (``live.py``), which frames a plan has
(``stream.py``), gRPC.

Invariants
 1. Behind the events that a plan finds come those that settle later, each once: within what settles together in (timestamp, pk) order.
 2. The last message of each turn says up to which key everything was sent (``settled_pk``), as does a message without events when
    nothing happens for a while: a reader who was cut goes on from there, with ``after_pk``.
 3. It ends like any stream, with a receipt: when its time is over, its limit is reached, its end has settled, or the server stops.
 4. A follower who falls behind the rounds in memory reads what it missed as any reader does; it holds up nobody.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from fraiseql_pipeline.encoding import receipt_frames, schema_frame, with_metadata
from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.live import Live
from fraiseql_pipeline.flight.plan import Plan
from fraiseql_pipeline.flight.rounds import Round
from fraiseql_pipeline.flight.stream import FrameStreams, Sender, frame_rows
from fraiseql_pipeline.flight.view import to_micros
from fraiseql_pipeline.ticket import Ticket

#: After so long without an event, a follower is told how far it is.
HEARTBEAT_SECONDS = 10.0
#: How often a follower without events looks whether its client is still there.
_LOOK_SECONDS = 0.5


def follow(
    decided: Plan,
    again: Callable[[Ticket], Plan],
    live: Live,
    streams: FrameStreams,
    sender: Sender,
    alive: Callable[[], bool],
    seconds: float,
) -> Generator[bytes, None, Plan]:
    """The messages of a plan and of what settles after it, for at most so long; returns the plan its receipt speaks of.

    ``again`` plans a ticket anew; ``alive``: whether the client is still there. Raises ``FlightUnavailable`` when the log is another one now.
    """
    deadline = time.monotonic() + seconds
    epoch = live.rounds.epoch
    yield schema_frame(decided.stream_schema)
    said = time.monotonic()
    while True:
        yield from streams.frames(decided, sender)
        pk = decided.settled_pk or 0
        yield from receipt_frames(decided.stream_schema, _note(pk), first=not sender.has_dictionaries)
        while True:
            over = sender.full or time.monotonic() > deadline or live.closed or not alive()
            if over or to_micros(live.buffer.settled_at) >= decided.span[1]:
                return replace(decided, settled_pk=pk, complete_through=min(decided.ticket.end, live.buffer.settled_at))
            if live.rounds.epoch != epoch or live.buffer.settled_pk < pk:
                raise FlightUnavailable("The change log was rebuilt or replaced; read anew.")
            found = live.rounds.above(pk, max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic())))
            if found is None:
                break
            rounds, pk = found
            for one in rounds:
                yield from _told(_turn(one, decided, sender), one.upto_pk)
                said = time.monotonic()
            if time.monotonic() - said > HEARTBEAT_SECONDS:
                said = time.monotonic()
                yield from receipt_frames(decided.stream_schema, _note(pk), first=not sender.has_dictionaries)
        decided = again(replace(decided.ticket, after_pk=pk))


def _turn(one: Round, decided: Plan, sender: Sender) -> Iterator[bytes]:
    wanted = replace(decided.filter, after_pk=None)  # whoever gets here is past it
    entry = one.entry(decided.stream_schema, decided.encoding, wanted, decided.span, frame_rows(sender.max_rows))
    for item in entry.items():
        if sender.full:
            return
        yield from sender.send(entry, item, whole=True)


def _told(messages: Iterator[bytes], pk: int) -> Iterator[bytes]:
    """The messages, the last with a note of the key."""
    last = None
    for message in messages:
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield with_metadata(last, _note(pk))


def _note(pk: int) -> bytes:
    return json.dumps({"settled_pk": pk}).encode()
