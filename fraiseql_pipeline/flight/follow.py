"""Follow: the stream of a ticket that goes on with events as they settle.

What lives here: the turns of such a stream, and when it ends. What must not: where events come from (``live.py``), which frames a plan has
(``stream.py``), gRPC.

Invariants
 1. Behind the events that a plan finds come those that settle later, each once and none up to the ticket's ``after_pk``: within what settles
    together in (timestamp, pk) order.
 2. The last message of each turn says up to which key everything was sent (``settled_pk``), as does a message without events when
    nothing was sent for a while: a reader who was cut goes on from there, with ``after_pk``. This key never falls. A turn that a limit
    cuts says none, and the receipt that of the turn before.
 3. It ends like any stream, with a receipt: when its time is over, its limit is reached, its end has settled, the next turn would be more than
    one stream may have, or the server stops.
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
from fraiseql_pipeline.flight.rounds import Kept, Round
from fraiseql_pipeline.flight.stream import FrameStreams, Sender, frame_rows
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import to_micros

#: After so long without an event, a follower is told how far it is.
HEARTBEAT_SECONDS = 10.0
#: How long a server may be behind the key that a follower brought along from another one.
_BEHIND_SECONDS = 10.0
#: How often a follower without events looks whether its client is still there.
_LOOK_SECONDS = 0.5


def follow(
    decided: Plan,
    again: Callable[[Ticket], Plan],
    live: Live,
    streams: FrameStreams,
    sender: Sender,
    alive: Callable[[], bool],
    has_room: Callable[[int], bool],
    seconds: float,
) -> Generator[bytes, None, Plan]:
    """The messages of a plan and of what settles after it, for at most so long; returns the plan its receipt speaks of.

    ``again`` plans a ticket anew; ``alive``: whether the client is still there; ``has_room``: whether the stream may have so many events
    more. Raises ``FlightUnavailable`` when the log is another one now, ``SourceRefused`` when it is refused.
    """
    deadline = time.monotonic() + seconds
    epoch = live.rounds.epoch
    yield schema_frame(decided.stream_schema)
    through = decided.complete_through
    while True:
        yield from streams.frames(decided, sender)
        cut = sender.full
        if cut:
            return replace(decided, complete_through=through)
        pk = decided.settled_pk or 0
        yield from receipt_frames(decided.stream_schema, _note(pk), first=not sender.has_dictionaries)
        said = began = time.monotonic()
        while True:
            if time.monotonic() > deadline or live.closed or not alive():
                return replace(decided, settled_pk=pk, complete_through=through)
            if live.refused:
                raise live.away("The change log cannot be followed any more")
            if live.rounds.epoch != epoch:
                raise FlightUnavailable("The change log was rebuilt or replaced; read anew.")
            if live.buffer.settled_pk < pk and time.monotonic() - began > _BEHIND_SECONDS:
                raise FlightUnavailable(
                    f"The change log has not come to the key {pk} here; try again in a moment, or read anew if it was rebuilt or replaced."
                )
            # Asked before the rounds: what had settled by then is in them.
            settled_at = live.buffer.settled_at
            found = live.rounds.above(pk, max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic())))
            if found is None:
                break
            rounds, upto_pk = found
            for one in rounds:
                entry = _kept(one, pk, decided, sender)
                rows = sum(item.rows for item in entry.items())
                # Not at its beginning: what goes on there would be this turn again.
                if sender.rows and not has_room(rows if sender.left is None else min(rows, sender.left)):
                    return replace(decided, settled_pk=pk, complete_through=through)
                for message in _told(_turn(entry, sender), sender, one.upto_pk):
                    said = time.monotonic()
                    yield message
                if sender.full:
                    return replace(decided, ticket=replace(decided.ticket, after_pk=pk), complete_through=through)
                pk = one.upto_pk
            pk = upto_pk
            through = min(decided.ticket.end, max(through, settled_at))
            if to_micros(settled_at) >= decided.span[1]:
                return replace(decided, settled_pk=pk, complete_through=through)
            if time.monotonic() - said > HEARTBEAT_SECONDS:
                said = time.monotonic()
                yield from receipt_frames(decided.stream_schema, _note(pk), first=not sender.has_dictionaries)
        decided = again(replace(decided.ticket, after_pk=pk))
        through = max(through, decided.complete_through)


def _kept(one: Round, pk: int, decided: Plan, sender: Sender) -> Kept:
    """What of a round is for a follower who has everything up to a key."""
    wanted = replace(decided.filter, after_pk=pk)
    return one.entry(decided.stream_schema, decided.encoding, wanted, decided.span, frame_rows(sender.max_rows))


def _turn(entry: Kept, sender: Sender) -> Iterator[bytes]:
    for item in entry.items():
        if sender.full:
            return
        yield from sender.send(entry, item, whole=True)


def _told(messages: Iterator[bytes], sender: Sender, pk: int) -> Iterator[bytes]:
    """The messages, the last with a note of the key, unless the limit has cut it."""
    last = None
    for message in messages:
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield last if sender.full else with_metadata(last, _note(pk))


def _note(pk: int) -> bytes:
    return json.dumps({"settled_pk": pk}).encode()
