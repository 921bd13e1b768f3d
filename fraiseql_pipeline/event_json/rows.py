"""Event JSON read one by one: what msgspec alone makes of a line.

What lives here: which line is an event, decided for any form of it, and why one is not. What must not: speed (``canonical.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import compress
from typing import Any, Literal

import msgspec
import pyarrow as pa

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import UUID_PATTERN
from fraiseql_pipeline.event_json.kinds import KINDS, timestamps


class _Event(msgspec.Struct, gc=False):
    id: str
    event_type: Literal["INSERT", "UPDATE", "DELETE", "CUSTOM"]
    entity_type: str
    entity_id: str
    data: msgspec.Raw
    timestamp: str
    user_id: str | None = None
    tenant_id: str | None = None


_events = msgspec.json.Decoder(_Event)
_uuid = re.compile(UUID_PATTERN.replace("a-f", "a-fA-F"))
#: The keys that are read, as they stand in the text.
_KEYS = {name: f'"{name}"'.encode() for name in _Event.__struct_fields__}
#: A key may be spelt with escapes, so a line with an escaped ASCII character is looked at too.
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


class Rows:
    """Events read one by one: ``rows`` are the numbers of the lines that are events, ``rejected`` those of lines that are not, and why."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows: list[int] = []
        self.events: list[tuple[Any, ...]] = []
        self.rejected: list[tuple[int, str]] = []

    def read(self, numbers: Iterable[int], lines: Iterable[bytes]) -> None:
        for number, line in zip(numbers, lines, strict=True):
            if not line.strip(b" \t\r\n"):
                continue
            try:
                self.events.append(_values(line))
                self.rows.append(number)
            except InputError as error:
                self.rejected.append((number, str(error)))

    def batch(self) -> pa.RecordBatch:
        times = self._times()
        at = self.schema.get_field_index("timestamp")
        columns: list[Iterable[Any]] = list(zip(*self.events, strict=True)) if self.events else [()] * len(self.schema)
        arrays = [times if n == at else pa.array(values, self.schema.field(n).type) for n, values in enumerate(columns)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _times(self) -> pa.Array:
        """Of all events; those without a sound one are rejected first."""
        at = self.schema.get_field_index("timestamp")
        texts = pa.array([event[at] for event in self.events], pa.string())
        found = timestamps(texts, self.schema)
        if found is not None:
            return found
        sound = [timestamps(texts[n : n + 1], self.schema) is not None for n in range(len(texts))]
        why = "timestamp must be an ISO 8601 time with an offset, in the range of the column"
        self.rejected = sorted([*self.rejected, *((row, why) for row, fine in zip(self.rows, sound, strict=True) if not fine)])
        self.rows = list(compress(self.rows, sound))
        self.events = list(compress(self.events, sound))
        return timestamps(texts.filter(pa.array(sound, pa.bool_())), self.schema)


def _values(line: bytes) -> tuple[Any, ...]:
    """The values of one event in the order of the schema, ``timestamp`` as text."""
    try:
        line.decode()  # msgspec passes over what it does not keep without a look at its encoding
        event = _events.decode(line)
        data = bytes(event.data)
        # Cheap and never too mild: a key counts as given twice if its text stands twice outside the payload.
        twice = any(line.count(key) > 1 and line.count(key) - data.count(key) > 1 for key in _KEYS.values())
        if twice or _ESCAPED_ASCII.search(line):
            _refuse_a_key_given_twice(line)
    except msgspec.ValidationError as error:
        raise InputError(_reason(error)) from None
    except RecursionError:
        raise InputError("nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InputError("not well-formed JSON") from None
    if not _uuid.fullmatch(event.id):
        raise InputError("id must be a UUID")
    if not _uuid.fullmatch(event.entity_id):
        raise InputError("entity_id must be a UUID")
    kind = KINDS[event.event_type]
    return (
        event.id.lower(),
        kind,
        event.entity_type,
        event.entity_id.lower(),
        event.timestamp,
        data.decode(),
        event.user_id,
        event.tenant_id,
    )


def _reason(error: msgspec.ValidationError) -> str:
    """The field a message of msgspec is about; the message itself may quote the value."""
    if missing := re.search(r"missing required field `(\w+)`", str(error)):
        return f"{missing[1]} is missing"
    if wrong := re.search(r"at `\$\.(\w+)`$", str(error)):
        return f"{wrong[1]} is not what an event holds there"
    return "not an object"


def _refuse_a_key_given_twice(line: bytes) -> None:
    """Readers disagree on which of two values counts, and one of the keys names the tenant; upstream refuses such an event too."""
    keys: list[str] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the last object to end is the event itself

    json.loads(line, object_pairs_hook=remember, parse_int=str, parse_float=str)
    for name in _KEYS:
        if keys.count(name) > 1:
            raise InputError(f"{name} is given twice")
