"""DoExchange: many tickets over one connection.

What lives here: which messages of a client are tickets, and that their streams have one schema. What must not: what a ticket covers
(``plan.py``), what its stream is (``service.py``).

Invariants
 1. Each ticket is answered by its batches and its receipt, in the order of the tickets; the schema comes once, before the first of them.
 2. Each ticket is a stream of its own as far as tenants, rows and its ``now`` are concerned. The first that fails ends the call.
 3. Nothing a client sends is taken for events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from fraiseql_pipeline.errors import TicketError
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.edge import Call
from fraiseql_pipeline.flight.plan import Plan


def exchange(
    requests: Iterator[bytes],
    call: Call,
    planned: Callable[[bytes, Call], Plan],
    messages: Callable[[Plan, Call], Iterator[bytes]],
) -> Iterator[bytes]:
    """The streams of the tickets a client sends, until it is done writing. Raises ``TicketError``."""
    schema = None
    for ticket in _tickets(call.received(requests)):
        decided = planned(ticket, call)
        if schema is not None and not decided.stream_schema.equals(schema, check_metadata=True):
            raise TicketError(
                f"All tickets of one exchange must give the same columns; the first gave {_described(schema)}, this one gives "
                f"{_described(decided.stream_schema)}. Open another exchange for it."
            )
        stream = messages(decided, call)
        if schema is not None:
            next(stream)  # the client has it
        schema = decided.stream_schema
        yield from stream


def _tickets(requests: Iterator[bytes]) -> Iterator[bytes]:
    for number, request in enumerate(requests):
        message = protocol.parse(protocol.FlightData, request)
        if message.data_body:
            raise TicketError("An exchange takes tickets, each as the metadata of a message, and no batches; DoPut takes events.")
        descriptor = message.flight_descriptor
        if descriptor.path or (descriptor.cmd and number):
            raise TicketError("The descriptor of an exchange must be a command that holds its first ticket, or an empty one.")
        if descriptor.cmd:
            yield descriptor.cmd
        if message.app_metadata:
            yield message.app_metadata


def _described(schema: pa.Schema) -> str:
    encoding = (schema.metadata or {}).get(b"fraiseql.encoding", b"").decode()
    return f"{', '.join(schema.names)} in {encoding}"
