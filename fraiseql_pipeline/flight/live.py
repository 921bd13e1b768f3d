"""Live: the thread that follows the change log, and views that reach up to what has settled.

What lives here: following (connect, settle, read, hand out), filling what readers want of the past, joining the buffer with the lake. What
must not: SQL (``changelog/``), files of the buffer (``buffer.py``), tickets' options (``plan.py``), gRPC.

Invariants
 1. A view from here holds, of its range, every event up to one settled pk, once: of each hour the lake's up to the pk that its window was
    published with, and the buffer's above it. Hours ahead of the clock are no exception.
 2. Nothing here is needed to serve the lake: while the log cannot be followed, and only then, ``view`` gives None; who follows or asks for
    what is above a key is told, and whether it is a matter of a moment.
 3. Only the following thread moves on in the log; a reader may make it fetch nothing and wait for nothing.
 4. A reader waits here for Postgres or for other readers so long and no longer, and only so many at a time (``turns.py``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Set
from datetime import UTC, datetime, timedelta

from fraiseql_pipeline.changelog import ChangeLog, Settlement, Tail, open_changelog
from fraiseql_pipeline.errors import (
    FlightUnavailable,
    LakeEmpty,
    PipelineError,
    SettleTimeout,
    SourceRefused,
    SourceUnavailable,
    TicketError,
)
from fraiseql_pipeline.flight.buffer import Buffer
from fraiseql_pipeline.flight.held import HOUR_US, Held, HeldFiles, Place, window_of
from fraiseql_pipeline.flight.rounds import Rounds
from fraiseql_pipeline.flight.turns import Turns
from fraiseql_pipeline.flight.view import LiveEvents, Span, View, Views, joined
from fraiseql_pipeline.lake import Lake, Snapshot
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import FOREVER, Window, to_micros

_log = logging.getLogger(__name__)

#: How long the log is left alone where nobody notifies; one look costs the server 0.3 ms. Half of it, on the average, is what a follower waits.
POLL_SECONDS = 0.05
#: Pauses before another connection after a failure: the first, and the longest.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0

#: Hours that one view may fill: each costs some queries. More of them wait for a materialization.
_MAX_FILLED = 2_000
#: Between two reports of how far following has come.
_TELL_SECONDS = 1.0
#: Between two looks at what the lake has meanwhile, where no reader looks.
_LOOK_SECONDS = 60.0
#: What is read through when following begins, so that the first reader of the newest events need not wait for it.
_FILLED_AHEAD = timedelta(days=1)
#: How long a reader waits for the buffer to be where the lake is already, nearly always one look.
_CATCH_UP_SECONDS = 10.0
#: What the end waits for the following thread, which looks up every ``POLL_SECONDS`` where its database answers.
_CLOSE_SECONDS = 2.0
#: A view is decided again when the lake has moved on meanwhile; it does so about once a minute.
_ATTEMPTS = 10


class Live:
    """Follows the change log of the settings in a thread of its own until it is closed. ``place``: of its files."""

    def __init__(self, settings: Settings, lake: Lake, known: Views, place: Place) -> None:
        #: Told now and then how far following has come: events and bytes that are kept, and when they were all that had settled, or None.
        self.tell: Callable[[int, int, datetime | None], None] = lambda *_: None
        self._settings = settings
        self._lake = lake
        self._views = known
        files = HeldFiles(lake.events.storage, place)
        self.buffer = Buffer(files, settings.arrow_flight_live_bytes)
        self.rounds = Rounds()
        self._nothing = Snapshot(-1, (), {}, files)
        self._changelog: ChangeLog | None = None
        self._identity: str | None = None
        self._problem = ""
        #: Whether following ended in what does not pass by itself.
        self._refused = False
        self._ended = threading.Event()
        self._moved = threading.Condition()
        #: A key that a commit of the lake proves to be settled.
        self._proved_pk = 0
        #: When the buffer had last moved as a reader waited for it in vain.
        self._given_up_at: datetime | None = None
        #: Whether a reader found that the lake is published from another log now.
        self._is_of_another = False
        self._turns = Turns(settings.arrow_flight_max_streams)
        #: Hours ahead of the clock that had events when following began.
        self._ahead: frozenset[int] = frozenset()
        #: Settled pk by window, up to which it is known that no late event is missing here.
        self._checked: dict[Window, int] = {}
        self._dropped: tuple[int, int] | None = None
        self._first_event: int | None = None
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Tell the thread and every follower to end, and wait for nobody."""
        self._ended.set()
        self.rounds.close()

    def close(self) -> None:
        """End the thread. One that waits for a database that does not answer is left behind: it ends with the process."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    @property
    def up(self) -> bool:
        """Whether the log is being followed."""
        return self._changelog is not None

    @property
    def refused(self) -> bool:
        """Whether the log is refused until somebody changes it, the lake or the settings; it is tried again all the same."""
        return self._refused

    def away(self, what: str) -> PipelineError:
        """The error of who needs the log while it cannot be followed. Why it is refused is for the server's own log alone."""
        if self._refused:
            return SourceRefused(
                f"{what}: the server refuses it as it is, and its log says why; trying again helps when that is mended."
            )
        return FlightUnavailable(f"{what} right now; try again in a moment.")

    # ---------------------------------------------------------------------------------------------------------- following

    def _run(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._ended.is_set():
            try:
                self._follow()
            except PipelineError as error:
                if str(error) != self._problem:
                    _log.warning("live events stop: %s", error)
                self._problem, self._refused = str(error), not error.retryable
            except Exception:  # noqa: BLE001 - a thread has nobody above it; the server serves the lake meanwhile
                _log.exception("live events stop")
            if self.up:
                pause = _PAUSE_SECONDS
            self._changelog = None
            self.tell(self.buffer.rows, self.buffer.bytes, None)
            self._ended.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _follow(self) -> None:
        with open_changelog(self._settings) as changelog, changelog.tail(self._is_wanted_elsewhere) as tail:
            self._check_identity(tail.identity)
            self._is_of_another = False
            settled_pk, at = tail.settle()
            if tail.identity != self._identity or settled_pk < self.buffer.settled_pk:
                ahead = changelog.hours_from(at, _MAX_FILLED + 1)
                self._ahead = frozenset(to_micros(hour) // HOUR_US for hour in ahead)
                self.buffer.begin(settled_pk, at)
                self.rounds.begin(settled_pk)
                self._identity, self._checked, self._first_event = tail.identity, {}, None
                self._proved_pk = 0
            self._changelog, self._problem, self._refused = changelog, "", False
            threading.Thread(target=self._fill_ahead, name="live-fill", daemon=True).start()
            _log.info("live events are followed from key %d", self.buffer.settled_pk)
            told = looked = time.monotonic() - _TELL_SECONDS
            while not self._ended.is_set():
                if self._is_of_another:  # as a reader found
                    self._check_identity(tail.identity)
                    self._is_of_another = False
                self._take(tail, self._reached(tail, settled_pk), at)
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    self.tell(self.buffer.rows, self.buffer.bytes, at)
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._leave_what_is_published()
                tail.wait(POLL_SECONDS)
                before = settled_pk
                try:
                    settled_pk, at = tail.settle()
                except SettleTimeout as error:
                    if not self._is_wanted_elsewhere():
                        _log.warning("live events wait: %s", error)
                if settled_pk < before:  # what follows begins anew
                    raise SourceUnavailable(
                        f"The keys of the change log fell from {before} to {settled_pk}: it was emptied, rebuilt or restored."
                    )

    def _fill_ahead(self) -> None:
        """Have the hours that the lake has not yet, before somebody asks: those of the last day at most."""
        now = self.buffer.settled_at
        try:
            self.view(
                Ticket(start=max(now - _FILLED_AHEAD, self._settings.first_window or datetime.min.replace(tzinfo=UTC)), end=now)
            )
        except PipelineError as error:
            _log.info("nothing is read ahead: %s", error)

    def _leave_what_is_published(self) -> None:
        """Also where nobody reads, so that what is kept does not grow."""
        try:
            self._base()
        except SourceRefused:
            raise
        except PipelineError as error:
            _log.info("the lake was not looked at: %s", error)

    def _reached(self, tail: Tail, settled_pk: int) -> int:
        """What has settled, as far as the log says or a commit of the lake proves; of keys that the log has not drawn yet, nothing."""
        proved_pk = self._proved_pk
        if proved_pk <= settled_pk:
            return settled_pk
        drawn_pk = tail.drawn()
        return max(settled_pk, proved_pk if drawn_pk is None else min(proved_pk, drawn_pk))

    def _is_wanted_elsewhere(self) -> bool:
        return self._ended.is_set() or self._proved_pk > self.buffer.settled_pk

    def _take(self, tail: Tail, settled_pk: int, at: datetime) -> None:
        if settled_pk > self.buffer.settled_pk:
            for batch in tail.read(self.buffer.settled_pk, settled_pk):
                after_pk = self.buffer.settled_pk
                accepted = self.buffer.absorb(batch)
                self.rounds.add(after_pk, self.buffer.settled_pk, accepted)
            self.rounds.add(self.buffer.settled_pk, settled_pk, ())
        self.buffer.reached(settled_pk, at)
        with self._moved:
            self._moved.notify_all()

    def _check_identity(self, identity: str | None) -> None:
        newest = self._lake.newest()
        if newest is not None and newest.identity != identity:
            raise SourceRefused(
                "The change log is not the one the lake was published from (another cluster, timeline or table, or its keys began anew); check FRAISEQL_DATABASE_URL."
            )

    # ------------------------------------------------------------------------------------------------------------ viewing

    def view(self, ticket: Ticket) -> View | None:
        """A view for a ticket, of what has settled; None while the log cannot be followed.

        Reads through from Postgres what is neither published nor in the buffer. Raises ``TicketError`` where that would be too much,
        ``FlightUnavailable`` where it takes too long or the lake alone cannot answer, ``SourceRefused`` where it cannot and the log is refused,
        and what the source refuses.
        """
        changelog = self._changelog
        if changelog is None:
            self._needs_no_log(ticket)
            return None
        for _ in range(_ATTEMPTS):
            try:
                base = self._base()
            except SourceRefused:
                self._is_of_another = self._refused = True
                self._needs_no_log(ticket)
                return None
            if not self._catch_up(base, ticket):
                self._needs_no_log(ticket)
                return None
            floors = self._floors(changelog, base, ticket)
            with self.buffer.wanted(floors):
                for hour, floor in floors.items():
                    self._fill(changelog, hour, floor)
                held, settled_pk, at = self.buffer.files(floors)
                # Where the lake moved on meanwhile, events that only its newer version has may have left the buffer; and another hour
                # may have got its first event since the hours were chosen.
                whole = all(self.buffer.missing(hour, floor) is None for hour, floor in floors.items())
                if whole and self._tracked(*self._range(changelog, base, ticket)) <= floors.keys():
                    return self._joined(base, ticket, floors, held, settled_pk, at)
        raise FlightUnavailable("The lake changes faster than it can be read; try again in a moment.")

    def _needs_no_log(self, ticket: Ticket) -> None:
        """Raises ``away`` for what the lake alone cannot tell: which of its events came after a key was reached."""
        if ticket.follow or ticket.after_pk is not None:
            raise self.away("The change log cannot be followed")

    def _catch_up(self, base: View | None, ticket: Ticket) -> bool:
        """Wait until the buffer is as far as the lake is in the range: what a view holds must end at one key. False if that takes too long: then
        the lake alone answers, at once as long as nothing more comes from a database that has gone silent.
        """
        if base is None:
            return True
        needed = base.settled_pk_within(to_micros(ticket.start), to_micros(ticket.end))
        if needed <= self.buffer.settled_pk:
            return True
        if self._given_up_at == self.buffer.settled_at:
            return False
        with self._turns.waits(), self._moved:
            self._proved_pk = max(self._proved_pk, needed)
            if self._moved.wait_for(lambda: self.buffer.settled_pk >= needed, _CATCH_UP_SECONDS):
                return True
            self._given_up_at = self.buffer.settled_at
            _log.warning("the change log is silent or far behind the lake; what is published is served from the lake meanwhile")
            return False

    def _joined(
        self, base: View | None, ticket: Ticket, floors: dict[int, int], held: list[Held], settled_pk: int, at: datetime
    ) -> View:
        # Whole hours, the current one too: what has settled of it may be ahead of the clock.
        spans = [
            Span(window_of(hour), hour * HOUR_US, (hour + 1) * HOUR_US, settled_pk, 0, provisional=True, counted=False)
            for hour in floors
            if base is None or base.settled_pk_at(hour * HOUR_US) is None
        ]
        if base is not None:
            late = {one.hour * HOUR_US for one in held}
            spans += {
                span._replace(settled_pk=settled_pk, counted=False)
                for start in late
                for span in base.spans[slice(*base.covered(start, start + 1))]
            }
        since = min((span.start for span in spans), default=FOREVER)
        live = LiveEvents(settled_pk, since, to_micros(at), tuple(one.file for one in held), tuple(held))
        if base is not None and not spans:
            return base.with_live(live)
        start, end = to_micros(ticket.start), to_micros(ticket.end)
        return joined(base, self._nothing, start, end, spans, live, ticket.after_pk or 0)

    def _base(self) -> View | None:
        """The newest view of the lake; what it has leaves the buffer. Raises ``SourceRefused`` where the lake is of another log by now."""
        try:
            base = self._views.newest()
        except LakeEmpty:
            return None
        version = base.snapshot.generation, base.snapshot.version
        if version != self._dropped:
            self._check_identity(self._identity)
            tracked = self.buffer.hours(-FOREVER, FOREVER)
            self.buffer.drop({hour: floor for hour in tracked if (floor := base.settled_pk_at(hour * HOUR_US))})
            self._dropped = version
        return base

    def _floors(self, changelog: ChangeLog, base: View | None, ticket: Ticket) -> dict[int, int]:
        """The hours of a ticket that are not all in the lake, each with the key up to which they are; one at least where nothing is."""
        start, end = self._range(changelog, base, ticket)
        settled = to_micros(self.buffer.settled_at) + 1
        tracked = self._tracked(start, end)
        open_ranges = [(start, min(end, settled))] if base is None else base.uncovered(start, min(end, settled))
        hours = [range(low // HOUR_US, -(-high // HOUR_US)) for low, high in open_ranges if low < high]
        # Counted before they are listed: from the first event there may be, the year 1, they are millions.
        count = sum(map(len, hours)) + len(tracked & self._ahead)
        if count > _MAX_FILLED:
            raise TicketError(
                f"The asked range has {count} hours that are not published; materialize its windows, or ask for a part at a time."
            )
        floors = {hour: 0 for some in hours for hour in some}
        if base is None:
            floors |= dict.fromkeys(tracked or (() if floors else (settled // HOUR_US,)), 0)
        else:
            late = self._late(changelog, base, start, end)
            floors |= {hour: base.settled_pk_at(hour * HOUR_US) or 0 for hour in (*late, *tracked) if hour not in floors}
        return dict(sorted(floors.items()))

    def _tracked(self, start: int, end: int) -> Set[int]:
        """The hours of [start, end) that have or had events in the buffer, or are to be looked up because they had some before."""
        first, last = start // HOUR_US, (end - 1) // HOUR_US
        return {*self.buffer.hours(first, last), *(hour for hour in self._ahead if first <= hour <= last)}

    def _range(self, changelog: ChangeLog, base: View | None, ticket: Ticket) -> tuple[int, int]:
        """The part of a ticket's range that can have events (µs)."""
        start = max(to_micros(ticket.start), self._first(changelog, base))
        if ticket.follow:  # what settles is followed wherever the lake begins
            start = min(start, to_micros(self.buffer.settled_at))
        return start, to_micros(ticket.end)

    def _first(self, changelog: ChangeLog, base: View | None) -> int:
        """Before it nothing is published or read through."""
        if base is not None and self._settings.first_window is None:
            return base.starts[0]
        if self._first_event is None:
            try:
                with self._turns.asks():
                    self._first_event = to_micros(changelog.span()[0])
            except SourceRefused:  # there is no event
                return to_micros(self.buffer.settled_at) // HOUR_US * HOUR_US
        first = min([self._first_event // HOUR_US, *self.buffer.hours(-FOREVER, FOREVER)]) * HOUR_US
        if self._settings.first_window is None:
            return first
        # What is published may lie before everything that the log still has.
        first = first if base is None else min(first, base.starts[0])
        return max(first, to_micros(self._settings.first_window))

    def _late(self, changelog: ChangeLog, base: View, start: int, end: int) -> Iterable[int]:
        """The hours of published windows that had late events when following began. Looked up once per window and its settled pk."""
        low, high = base.covered(start, end)
        begun = self.buffer.started_pk

        def suspects() -> dict[Window, int]:
            return {
                span.window: span.settled_pk
                for span in base.spans[low:high]
                if span.settled_pk < begun and self._checked.get(span.window) != span.settled_pk
            }

        if not suspects():
            return []
        with self._turns.asks():
            # Somebody else may have asked meanwhile.
            found = suspects()
            late = {one.window for one in changelog.late(found)}
        hours = []
        for window, settled_pk in found.items():
            if window in late:
                for hour in range(to_micros(window.start) // HOUR_US, to_micros(window.end) // HOUR_US):
                    self._fill(changelog, hour, settled_pk)
                    hours.append(hour)
            self._checked[window] = settled_pk
        return hours

    def _fill(self, changelog: ChangeLog, hour: int, floor: int) -> None:
        if self.buffer.missing(hour, floor) is None:
            return
        with self._turns.asks():
            upto = self.buffer.missing(hour, floor)
            if upto is None:
                return
            settlement = Settlement(upto, datetime.min.replace(tzinfo=UTC), self.buffer.settled_at, self._identity or "")
            with changelog.read(window_of(hour), settlement, after_pk=floor or None) as batches:
                self.buffer.fill(hour, floor, upto, batches)
