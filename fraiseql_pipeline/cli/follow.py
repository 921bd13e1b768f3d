"""A read that goes on: events as they settle, on the screen or at the end of a file, until somebody ends it.

What lives here: the one turn after the other, and what Ctrl-C leaves behind. What must not: how events are shown or written (``events.py``).

Invariants
 1. A key is told only after every event that it stands for was written: who goes on behind it misses nothing.
 2. Ctrl-C and SIGTERM end a stream between two batches: no line is cut.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

from fraiseql_pipeline.cli.events import Grow
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.flight.client import Client
from fraiseql_pipeline.flight.received import Receipt, Stream

#: How often it is looked for a signal: polars has one that came begin a wait anew, which then would not end.
_LOOK_SECONDS = 0.2


@dataclass
class Followed:
    """What came of a stream so far. ``after_pk``: every event up to this key was written; None: not known of any. ``receipt``: it has ended."""

    began: bool = False
    rows: int = 0
    after_pk: int | None = None
    receipt: Receipt | None = None
    interrupted: bool = False

    @property
    def remark(self) -> str:
        """How to go on; nothing of a stream that a limit ended before a key was told."""
        if self.after_pk is None:
            return (
                ""
                if self.receipt is not None
                else "It ended before a key was told up to which everything had come; read the same ticket again."
            )
        return f'Every event up to key {self.after_pk} has come; a ticket with "after_pk": {self.after_pk} goes on from there.'

    def note(self, stream: Stream) -> None:
        if stream.settled_pk is not None:
            self.after_pk = stream.settled_pk
        self.receipt = stream.receipt


def follow(client: Client, ticket: str, grow: Grow, found: Followed) -> None:
    """Writes what comes until the stream ends, or somebody interrupts. Raises as the stream does; ``found`` then says how far it came."""
    with client.stream(ticket) as stream, grow(stream.schema) as add, ThreadPoolExecutor(1) as worker:
        found.began = True

        def take() -> None:
            for batch in stream:
                add(batch)
                found.rows += batch.num_rows
                found.note(stream)
            found.note(stream)

        # On a thread of its own: while pyarrow waits for a message, up to the next one of a silent log, no signal reaches Python.
        taken = worker.submit(take)
        try:
            while not wait([taken], _LOOK_SECONDS).done:
                continue
            taken.result()
        except KeyboardInterrupt:
            found.interrupted = True
            stream.close()
            with suppress(PipelineError):  # that it was cancelled
                taken.result()
            found.note(stream)  # what came before the last note was written
