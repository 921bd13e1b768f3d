"""DoPut: events of producers → the change log.

What lives here: who may upload what, which rows are refused, and the answer to each batch. What must not: SQL (``changelog/append.py``),
the bytes of a message (``incoming.py``), rules of the pipeline's own (``validate.py``).

The change log is where events come from, so an uploaded one reaches the windows, the lake and the readers like any other; and it is on disk
before the producer is told. This is the only way this package writes to a source.

Invariants
 1. A batch is taken whole or not at all: one bad row, and nothing of it is in the log.
 2. A batch is answered after its commit, and the next one is not read before.
 3. What a caller uploads is of its tenant.
 4. A refusal counts rows and names columns and rules; it holds no value of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.changelog import Appended
from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import BATCH_SCHEMA, EVENT_SCHEMA
from fraiseql_pipeline.event_ids import Rows, rows_where
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.edge import Call
from fraiseql_pipeline.flight.incoming import Incoming, Room
from fraiseql_pipeline.validate import Validator

#: The path or command of an upload's descriptor.
_NAME = "events"

#: What ``fk_contact`` holds: a bigint, written the one way Postgres prints it, so that it is read back as it was sent.
_BIGINT = r"^(0|-?[1-9][0-9]{0,18})$"
_BIGINT_RANGE = (-(2**63), 2**63 - 1)

#: Of one event's data, as it is uploaded and as Postgres prints it: 4 MiB of empty lists take Python 90 MiB while they are looked at.
MAX_DATA_BYTES = 4 << 20
#: A number with an exponent, which jsonb prints in full.
_EXPONENT = re.compile(r"[0-9][eE][+-]?[0-9]{2,}")


class _Ever:
    """The times the change log's columns hold, as ``validate.py`` wants a window."""

    start = datetime(1, 1, 1, tzinfo=UTC)
    end = datetime(9999, 12, 31, tzinfo=UTC)
    key = "upload"


def uploads(append: Callable[[pa.RecordBatch, str], Appended]) -> Callable[[Iterator[bytes], Call], Iterator[bytes]]:
    """DoPut over a change log's ``append``: takes the messages of a call, gives one ``PutResult`` per batch.

    A result's metadata is a JSON object: ``rows`` of the batch, of which ``inserted`` are new and ``known`` were in the log before.
    """
    room = Room()

    def put(requests: Iterator[bytes], call: Call) -> Iterator[bytes]:
        with closing(Incoming(call.received(requests), room, call.presence)) as incoming:
            if incoming.named() not in {(_NAME,), _NAME.encode()}:
                raise InputError(f"The descriptor of an upload must be the path {_NAME}, or the command {_NAME}.")
            while (batch := incoming.next_batch()) is not None:
                if call.max_rows is not None and call.rows + batch.num_rows > call.max_rows:
                    raise InputError(
                        f"An upload must not have more than {call.max_rows} events in one call on this server; go on in another call."
                    )
                events = sound(batch, call.org_id)
                done = append(events, call.caller.principal) if events.num_rows else Appended(0, 0)
                call.count(events.num_rows)
                said = {"rows": events.num_rows, "inserted": done.inserted_rows, "known": done.known_rows}
                del batch, events  # before the client is waited for, however long
                incoming.let_go()
                yield protocol.PutResult(app_metadata=json.dumps(said).encode()).SerializeToString()

    return put


def sound(batch: pa.RecordBatch, org_id: str | None) -> pa.RecordBatch:
    """The events of a batch as ``EVENT_SCHEMA``, tenants filled in. ``batch``: its columns, ``timestamp`` in micro- or nanoseconds.

    ``org_id``: the tenant all of them must be of; None: any. Raises ``InputError`` that counts the rows that break a rule.
    """
    faults: dict[str, Rows] = {}
    columns = {name: batch.column(name) for name in EVENT_SCHEMA.names}
    columns["timestamp"] = _microseconds(columns["timestamp"], faults)
    if org_id is not None:
        columns["org_id"] = pc.fill_null(columns["org_id"], org_id)
        _found(faults, "org_id:foreign", pc.not_equal(columns["org_id"], org_id))
    _found(faults, "user_id:not_a_bigint", _no_bigint(columns["user_id"]))
    data = columns["data"]
    too_large = pc.fill_null(pc.greater(pc.binary_length(data), MAX_DATA_BYTES), fill_value=False)
    _found(faults, "data:too_large", too_large)
    no_json = [text is not None and not _is_json(text) for text in pc.if_else(too_large, None, data).to_pylist()]
    _found(faults, "data:no_json", pa.array(no_json, pa.bool_()))
    rows = batch.num_rows
    read = [
        columns[field.name]
        if field.name in columns
        else pa.array(range(rows), field.type)
        if field.name == "pk"
        else pa.nulls(rows, field.type)
        for field in BATCH_SCHEMA
    ]
    judged = Validator(_Ever()).check(pa.RecordBatch.from_arrays(read, schema=BATCH_SCHEMA))
    counts = {**judged.reasons, **{reason: len(found) for reason, found in faults.items()}}
    if counts:
        refused = np.unique(np.concatenate([judged.quarantined.column("pk").to_numpy(), *faults.values()]))
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        raise InputError(f"{len(refused)} of the {rows} events of a batch are refused, so none of it was taken: {listed}.")
    return pa.RecordBatch.from_arrays([columns[name] for name in EVENT_SCHEMA.names], schema=EVENT_SCHEMA)


def _found(faults: dict[str, Rows], reason: str, broken: pa.Array) -> None:
    rows = rows_where(pc.fill_null(broken, fill_value=False))
    if len(rows):
        faults[reason] = rows


def _microseconds(at: pa.Array, faults: dict[str, Rows]) -> pa.Array:
    """The times as the change log holds them; what it would cut off is a fault."""
    target = EVENT_SCHEMA.field("timestamp").type
    if at.type.unit == "ns":
        numbers = at.cast(pa.int64())
        whole = pc.divide(numbers, 1000)
        _found(faults, "timestamp:finer_than_microseconds", pc.not_equal(pc.multiply(whole, 1000), numbers))
        return whole.cast(target)
    return at.cast(target)


def _no_bigint(texts: pa.Array) -> pa.Array:
    low, high = _BIGINT_RANGE
    wrong = {
        text: text is not None and not low <= int(text) <= high
        for text in pc.unique(texts.filter(pc.match_substring_regex(texts, _BIGINT))).to_pylist()
    }
    out_of_range = pa.array([text for text, beyond in wrong.items() if beyond], pa.string())
    return pc.or_(pc.invert(pc.match_substring_regex(texts, _BIGINT)), pc.is_in(texts, out_of_range))


def _is_json(text: str) -> bool:
    """Whether jsonb takes a text, and prints it in a bearable length, as far as this can be told without Postgres, which judges in the end."""
    try:
        value = _parse(text) if _EXPONENT.search(text) is None else _parsed_with_exponents(text)
        # jsonb holds text: no half of a surrogate pair, and no NUL.
        if "\\u" in text:
            "".join(_strings(value)).encode()
            return not any("\0" in found for found in _strings(value))
    except (ValueError, RecursionError):
        return False
    return True


def _refused(constant: str) -> Any:
    raise ValueError(constant)


# Numbers stay texts: what is large is Postgres' to judge, and Python would take long over it.
_parse = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refused).decode


def _parsed_with_exponents(text: str) -> Any:
    printed = len(text)

    def number(digits: str) -> str:
        nonlocal printed
        exponent = digits.lower().partition("e")[2]
        if exponent:  # one of eight characters is beyond any number that jsonb holds
            printed += abs(int(exponent)) if len(exponent) < 8 else MAX_DATA_BYTES
        if printed > MAX_DATA_BYTES:
            raise ValueError("too long in print")
        return digits

    return json.JSONDecoder(parse_float=number, parse_int=str, parse_constant=_refused).decode(text)


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            waiting += found.keys()
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
