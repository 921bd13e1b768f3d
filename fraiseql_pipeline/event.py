"""THE column table: what an event is, column by column, and every schema that follows from it.

What lives here: ``COLUMNS`` and the schemas derived from it, and nothing that reads or writes. The SQL projection
(``changelog/``), the validation rules (``validate.py``), the Delta schema (``lake/``), the wire schema (``encoding.py``) and
the table in ``docs/`` are derived from this list; a column is added here and nowhere else.

Source of the format: FraiseQL's change-log contract (`docs/architecture/change-log-contract.md` upstream) and its Arrow event
schema. Values keep the bytes Postgres prints: JSON is never parsed and printed again.

Invariants
 1. The first eight columns, in order, are the stream that a plain ticket gets.
 2. SQL NULL of ``object_data`` becomes the JSON text ``null``; a delete carries its image from before, else the one after, else ``{}``.
 3. A value that no column can hold (an unknown verb, an infinite time, a nested array) makes its column null and is kept as JSON in
    ``raw``; a row with ``raw`` is always quarantined, so nothing is altered silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

TIMESTAMP = pa.timestamp("us", "UTC")
EVENT_TYPES = ("Created", "Updated", "Deleted", "Custom")
#: Upper-cased ``modification_type`` → ``event_type``. Anything else is not an event and is quarantined.
VERBS = {"INSERT": "Created", "UPDATE": "Updated", "DELETE": "Deleted", "CUSTOM": "Custom", "NOOP": "Custom", "READ": "Custom"}
#: The column the tables are partitioned by.
PARTITION = "event_date"
UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

Part = Literal["event", "envelope", "derived"]
#: What values keep beyond their type and nullability; ``validate.py`` says what each of them means.
Rule = Literal["uuid", "verb", "name", "window", "absent"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the lake.

    ``source`` names the columns of the change log it is made from: none for a derived column. ``sql`` is the expression over them;
    ``None`` stands for "the column itself, as it is". ``required`` columns must exist in the source; the others are null where an
    older change log lacks them. ``rule`` is what the values must keep for the event to be accepted.
    """

    name: str
    type: pa.DataType
    nullable: bool
    part: Part
    source: tuple[str, ...]
    doc: str
    sql: str | None = None
    required: bool = False
    rule: Rule | None = None

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable)


def _in_range(column: str) -> str:
    """Infinity and years that Arrow's microseconds cannot hold wrap to wrong values in the driver, so they never reach it."""
    return f"CASE WHEN {column} >= '0001-01-01 00:00:00+00' AND {column} < '9999-12-31 00:00:00+00' THEN {column} END"


def _out_of_range(column: str) -> str:
    """True where ``_in_range`` drops a value; null for null."""
    return f"({column} < '0001-01-01 00:00:00+00' OR {column} >= '9999-12-31 00:00:00+00')"


# Verbs are compared as written first: upper() cost 0.25 of 4.1 µs per row of the server's own COPY. In collation C it is about ASCII alone: a
# Turkish database has no `INSERT` for `insert`.
_VERB = 'upper(modification_type COLLATE "C")'
_VERB_LIST = ", ".join(f"'{verb}'" for verb in VERBS)
_IS_VERB = f"(modification_type IN ({_VERB_LIST}) OR {_VERB} IN ({_VERB_LIST}))"
_IS_DELETE = f"(modification_type = 'DELETE' OR modification_type NOT IN ('INSERT', 'UPDATE') AND {_VERB} = 'DELETE')"
_EVENT_CASES = "".join(f" WHEN '{verb}' THEN '{event}'" for verb, event in VERBS.items())
_EVENT_TYPE = f"CASE modification_type{_EVENT_CASES} ELSE CASE {_VERB}{_EVENT_CASES} END END"
_DATA = (
    f"CASE WHEN {_IS_DELETE} THEN coalesce(object_data_before::text, object_data::text, '{{}}')"
    " ELSE coalesce(object_data::text, 'null') END"
)
_TIMES = ("created_at", "started_at", "commit_time")
#: The sound row is decided by comparisons alone (4 % of the server's own COPY); JSON is built for the others only.
_RAW = (
    f"CASE WHEN NOT {_IS_VERB} OR {' OR '.join(_out_of_range(time) for time in _TIMES)} OR array_ndims(updated_fields) > 1"
    " THEN json_strip_nulls(json_build_object("
    f"'modification_type', CASE WHEN NOT {_IS_VERB} THEN modification_type END, "
    + ", ".join(f"'{time}', CASE WHEN {_out_of_range(time)} THEN {time}::text END" for time in _TIMES)
    + ", 'updated_fields', CASE WHEN array_ndims(updated_fields) > 1 THEN to_json(updated_fields) END))::text END"
)

COLUMNS: tuple[Column, ...] = (
    Column(
        "event_id", pa.string(), False, "event", ("id",), "public id of the event, a UUID", "id::text", required=True, rule="uuid"
    ),
    Column(
        "event_type",
        pa.string(),
        False,
        "event",
        ("modification_type",),
        "`Created`, `Updated`, `Deleted` or `Custom`",
        _EVENT_TYPE,
        required=True,
        rule="verb",
    ),
    Column(
        "entity_type",
        pa.string(),
        False,
        "event",
        ("object_type",),
        "GraphQL type of the entity",
        "object_type::text",
        required=True,
        rule="name",
    ),
    Column(
        "entity_id",
        pa.string(),
        False,
        "event",
        ("object_id",),
        "public id of the entity, a UUID",
        "object_id::text",
        required=True,
        rule="uuid",
    ),
    Column(
        "timestamp",
        TIMESTAMP,
        False,
        "event",
        ("created_at",),
        "start of the writing transaction, or what the producer set; nanoseconds on the wire",
        _in_range("created_at"),
        required=True,
        rule="window",
    ),
    Column(
        "data",
        pa.string(),
        False,
        "event",
        ("object_data", "object_data_before", "modification_type"),
        "JSON text of the entity after the change; of a deleted entity, before it",
        _DATA,
        required=True,
    ),
    Column("user_id", pa.string(), True, "event", ("fk_contact",), "acting contact", "fk_contact::text"),
    Column("org_id", pa.string(), True, "event", ("tenant_id",), "tenant, a UUID", "tenant_id::text", required=True, rule="uuid"),
    Column(
        "pk", pa.int64(), False, "envelope", ("pk_entity_change_log",), "internal key; orders events of one instant", required=True
    ),
    Column("seq", pa.int64(), True, "envelope", ("seq",), "upstream's change number"),
    Column(
        "data_before",
        pa.string(),
        True,
        "envelope",
        ("object_data_before",),
        "JSON text of the entity before the change",
        "object_data_before::text",
    ),
    Column(
        "updated_fields",
        pa.list_(pa.field("element", pa.string())),
        True,
        "envelope",
        ("updated_fields",),
        "names of the changed fields",
        # The slice counts from 1 again: the driver refuses arrays that count from elsewhere.
        "CASE WHEN array_ndims(updated_fields) > 1 THEN NULL WHEN array_lower(updated_fields, 1) <> 1 THEN updated_fields[:] ELSE updated_fields END",
    ),
    Column("change_status", pa.string(), True, "envelope", ("change_status",), "written by the capture trigger"),
    Column("actor_type", pa.string(), True, "envelope", ("actor_type",), "human_user, service_account, ai_agent or system_job"),
    Column(
        "acting_for",
        pa.string(),
        True,
        "envelope",
        ("acting_for",),
        "on whose behalf an agent acted, a UUID",
        "acting_for::text",
        rule="uuid",
    ),
    Column("schema_version", pa.string(), True, "envelope", ("schema_version",), "hash of FraiseQL's compiled schema"),
    Column("trace_id", pa.string(), True, "envelope", ("trace_id",), "W3C trace id"),
    Column("duration_ms", pa.int32(), True, "envelope", ("duration_ms",), "length of the mutation in milliseconds"),
    Column(
        "started_at",
        TIMESTAMP,
        True,
        "envelope",
        ("started_at",),
        "database clock when the mutation began",
        _in_range("started_at"),
    ),
    Column("commit_time", TIMESTAMP, True, "envelope", ("commit_time",), "database clock at the insert", _in_range("commit_time")),
    Column(
        "cdc_source",
        pa.string(),
        True,
        "envelope",
        ("extra_metadata",),
        "`fallback_trigger` for a write that went past FraiseQL",
        "CASE WHEN jsonb_typeof(extra_metadata -> 'cdc_source') = 'string' THEN extra_metadata ->> 'cdc_source' END",
    ),
    Column(
        "extra_metadata",
        pa.string(),
        True,
        "envelope",
        ("extra_metadata",),
        "JSON text, as the producer wrote it",
        "extra_metadata::text",
    ),
    Column("cascade", pa.string(), True, "envelope", ("cascade",), "JSON text of graphql-cascade", '"cascade"::text'),
    Column(PARTITION, pa.date32(), False, "derived", (), "UTC date of `timestamp`; the partition column"),
)

#: What a row kept that no column could hold: JSON text, null for a sound row. Extracted, never stored in ``events``.
RAW = Column(
    "raw",
    pa.string(),
    True,
    "derived",
    ("modification_type", "created_at", "started_at", "commit_time", "updated_fields"),
    "JSON of the values that fit no column, as Postgres prints them; of a row that cannot be sent, why, and its stored sizes",
    _RAW,
    rule="absent",
)

EVENT_SCHEMA = pa.schema([c.field for c in COLUMNS if c.part == "event"])
"""The eight columns of an event as the lake holds them (timestamp in microseconds)."""

WIRE_SCHEMA = pa.schema(
    [f if f.name != "timestamp" else pa.field("timestamp", pa.timestamp("ns", "UTC"), nullable=False) for f in EVENT_SCHEMA]
)
"""The eight columns of an event as Flight sends them: the plan's schema, timestamp in nanoseconds."""

EXTRACTED: tuple[Column, ...] = (*(c for c in COLUMNS if c.part != "derived"), RAW)
"""What one row of the change log becomes: the lake's columns but the derived one, and ``raw``."""

BATCH_SCHEMA = pa.schema([pa.field(c.name, c.type) for c in EXTRACTED])
"""A batch as read: every column nullable, because a bad row must be seen to be quarantined."""

LAKE_SCHEMA = pa.schema([c.field for c in COLUMNS])
"""The table ``events``, in this column order."""

QUARANTINE_SCHEMA = pa.schema(
    [
        *BATCH_SCHEMA,
        pa.field("reasons", pa.list_(pa.field("element", pa.string())), nullable=False),
        pa.field("window_key", pa.string(), nullable=False),
        pa.field(PARTITION, pa.date32(), nullable=False),
    ]
)
"""The table ``events_quarantine``: the row as read, why it was rejected (``column:rule``, sorted), the window and its date."""

ORDER = ("timestamp", "pk")
"""The order of events everywhere: in a window, in a file's row groups, in a stream."""

SORT_KEYS = [(name, "ascending") for name in ORDER]
"""The same, as Arrow's sorting takes it."""


def in_order(at: pa.Array, pk: pa.Array, *, strictly: bool = True) -> bool:
    """Whether rows with these times and keys, none of them null, stand in ``ORDER``; ``strictly``: and no two of them are the same."""
    times, next_times, keys, next_keys = at[:-1], at[1:], pk[:-1], pk[1:]
    rises = (pc.less if strictly else pc.less_equal)(keys, next_keys)
    in_place = pc.or_(pc.less(times, next_times), pc.and_(pc.equal(times, next_times), rises))
    return bool(pc.all(in_place, min_count=0).as_py())
