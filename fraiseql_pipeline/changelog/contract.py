"""What preflight found: the source, proved readable, and the columns it really has.

What lives here: ``Contract`` and ``ACCEPTED_TYPES``, pure values. What must not: a connection.

Older change logs lack columns, hold them in another order or keep older types. ``Contract.projection`` evens that out, so that every
other statement can be written against the current contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fraiseql_pipeline.event import EXTRACTED

TEXT_TYPES = ("text", "character varying")
_JSON = ("jsonb", "json")

#: Column of the change log → the types it may have; the first is the contract's own.
ACCEPTED_TYPES: Mapping[str, tuple[str, ...]] = {
    "pk_entity_change_log": ("bigint", "integer"),
    "id": ("uuid", *TEXT_TYPES),
    "modification_type": TEXT_TYPES,
    "object_type": TEXT_TYPES,
    "object_id": ("uuid", *TEXT_TYPES),
    "created_at": ("timestamp with time zone", "timestamp without time zone"),
    "object_data": _JSON,
    "object_data_before": _JSON,
    "tenant_id": ("uuid", *TEXT_TYPES),
    "fk_contact": ("bigint", "integer", *TEXT_TYPES),
    "seq": ("bigint", "integer"),
    "updated_fields": ("text[]", "character varying[]"),
    "change_status": TEXT_TYPES,
    "actor_type": TEXT_TYPES,
    "acting_for": ("uuid", "bigint", *TEXT_TYPES),
    "schema_version": TEXT_TYPES,
    "trace_id": TEXT_TYPES,
    "duration_ms": ("integer", "smallint"),
    "started_at": ("timestamp with time zone", "timestamp without time zone"),
    "commit_time": ("timestamp with time zone", "timestamp without time zone"),
    "extra_metadata": ("jsonb",),
    "cascade": _JSON,
}

#: Older type → the contract's, where a cast alters no value. Every other accepted type is left alone: the column table prints it as text.
_CASTS = {"integer": "bigint", "smallint": "integer", "character varying": "text", "character varying[]": "text[]"}

#: Columns without which there is no event. ``object_data_before`` is only ever an addition: an older log without it is whole.
REQUIRED: tuple[str, ...] = tuple(
    dict.fromkeys(name for column in EXTRACTED if column.required for name in column.source if name != "object_data_before")
)
OPTIONAL: tuple[str, ...] = tuple(name for name in ACCEPTED_TYPES if name not in REQUIRED)


@dataclass(frozen=True, slots=True)
class Contract:
    """A source that passed preflight.

    ``identity``: changes when the cluster, its timeline or the table is another one, or its keys begin anew, so that settled pks of before
    mean nothing.
    ``columns``: columns of the change log that exist, with their type. ``can_seal``: other users' transactions are visible, so a window
    can be sealed and not only settled. ``sequence``: oid of the pk sequence; ``readable_sequence``: its name, quoted for SQL, where its
    last value may be read. ``warnings``: one sentence each, for the user.
    """

    identity: str
    columns: Mapping[str, str]
    can_seal: bool
    sequence: int
    readable_sequence: str | None
    warnings: tuple[str, ...] = ()

    @property
    def projection(self) -> str:
        """Select list over the table that gives every column of ``REQUIRED`` and ``OPTIONAL`` its contract's name and meaning.

        Missing columns are null. Times without a zone are read as UTC (every session of ours runs in UTC). ``uuid``, ``json`` and
        ``text`` variants keep their type: the column table casts them to text anyway.
        """
        return ", ".join(f'{self.expression(name)} AS "{name}"' for name in (*REQUIRED, *OPTIONAL))

    def expression(self, name: str) -> str:
        """One column of the table as the contract means it, for a statement ``FROM core.tb_entity_change_log``."""
        found, meant = self.columns.get(name), ACCEPTED_TYPES[name][0]
        if found is None:
            return f"NULL::{meant}"
        if found == "timestamp without time zone":
            return f"\"{name}\" AT TIME ZONE 'UTC'"
        if found != meant and _CASTS.get(found) == meant:
            return f'"{name}"::{meant}'
        return f'"{name}"'
