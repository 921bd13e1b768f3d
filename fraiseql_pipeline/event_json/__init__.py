"""Upstream's event JSON ⇄ Arrow columns: ``events_from_json`` and ``events_to_json``.

What lives here: the JSON form of FraiseQL's ``EntityEvent`` (what it puts on NATS), both ways, over bytes and Arrow data. What must
not: I/O, the change log's own columns (``changelog/``), validation rules of the pipeline (``validate.py``).

Source of the format: ``crates/fraiseql-observers/src/event.rs`` upstream. serde writes every field, in this order, without white
space, absent values as ``null``::

    {"id":…,"event_type":"INSERT","entity_type":…,"entity_id":…,"data":…,"changes":…,"user_id":…,"tenant_id":…,"timestamp":"…Z",
     "duration_ms":…,"seq":…,"actor_type":…,"acting_for":…,"schema_version":…,"cdc_source":…}

A line in that form is read column by column (``canonical.py``), any other one by one (``rows.py``); ``reading.py`` decides.

Invariants
 1. Both ways of reading give the same columns for every line, and accept the same lines.
 2. ``data`` keeps the bytes of the input: digits, key order, duplicate keys, white space. It is checked to be well-formed JSON
    (nested at most as deep as the interpreter's recursion limit allows, about 900), never parsed and printed again.
 3. A line is an event or the call fails; no line is skipped but a blank one.
 4. ``events_from_json(events_to_json(batch))`` gives the eight columns back, but for line feeds between the tokens of ``data``,
    which become spaces because events are one per line. A payload with half a surrogate pair is written as it stands and not
    read back: upstream refuses it too.
"""

from fraiseql_pipeline.event_json.kinds import KINDS
from fraiseql_pipeline.event_json.reading import events_from_json
from fraiseql_pipeline.event_json.writing import events_to_json

__all__ = ["KINDS", "events_from_json", "events_to_json"]
