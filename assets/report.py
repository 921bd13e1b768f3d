"""What Dagster shows of a table and of a published window.

What lives here: metadata, made from the column table and from what the library returned. What must not: a value out of an event beyond
its type, its entity's type, its time and the names of its fields.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pyarrow as pa

from fraiseql_pipeline.event import COLUMNS, EXTRACTED, PARTITION, QUARANTINE_SCHEMA, Column
from fraiseql_pipeline.lake import Snapshot
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window

CHANGE_LOG = dg.AssetKey(["core", "tb_entity_change_log"])
EVENTS = dg.AssetKey(["fraiseql", "events"])
QUARANTINE = dg.AssetKey(["fraiseql", "events_quarantine"])

#: Changes when the columns or their expressions change, and only then: a new release does not make stored windows look outdated.
CODE_VERSION = hashlib.sha256(repr(COLUMNS).encode()).hexdigest()[:12]

_SAMPLE_ROWS = 5
_SAMPLE_COLUMNS = ("timestamp", "event_type", "entity_type", "updated_fields")
_QUARANTINE_DOCS = {
    "reasons": "why the row was rejected, `column:rule`, sorted",
    "window_key": "key of the window the row belongs to",
    PARTITION: "UTC date of the window; the partition column",
}


def events_table(settings: Settings) -> dict[str, Any]:
    """Metadata of the table ``events``: its columns, where each comes from, and where it is stored."""
    return _table("events", settings, [_column(c.field, c) for c in COLUMNS])


def quarantine_table(settings: Settings) -> dict[str, Any]:
    """Metadata of the table ``events_quarantine``: the columns as read, and why a row is there."""
    known = {column.name: column for column in EXTRACTED}
    return _table("events_quarantine", settings, [_column(field, known.get(field.name)) for field in QUARANTINE_SCHEMA])


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows of both tables, all published windows together. Dagster shows the newest materialization's count as that of the table."""

    events: int
    quarantined: int

    @classmethod
    def of(cls, stored: Snapshot) -> "Totals":
        """As the commits state them: nothing is read."""
        commits = stored.published.values()
        return cls(sum(commit.accepted_rows for commit in commits), sum(commit.quarantined_rows for commit in commits))


def events_of(done: Materialization, stored: Snapshot, totals: Totals) -> dict[str, Any]:
    """Metadata of one window of ``events``."""
    return {
        **events_committed(done),
        "dagster/row_count": totals.events,
        "sample": dg.MetadataValue.md(sample(done.window, stored)),
    }


def events_committed(done: Materialization) -> dict[str, Any]:
    """The part of it that the commit alone tells: nothing is read.

    The counts are those of the whole window, the seconds those of this run. A run that only added late events took them for these, so
    there is a rate only where a run read the window.
    """
    commit, total = done.commit, done.seconds.get("total", 0.0)
    read_it = total and commit.outcome in ("published", "replaced", "unchanged")
    return {
        "dagster/partition_row_count": commit.accepted_rows,
        **_window(done),
        "quarantined rows": commit.quarantined_rows,
        "source rows": commit.source_rows,
        "late rows": commit.late_rows,
        "table version": commit.table_version,
        "content hash": commit.content_hash,
        "stored bytes": commit.bytes,
        **({"events per second": round(commit.source_rows / total)} if read_it else {}),
        **{f"seconds {stage}": round(seconds, 4) for stage, seconds in done.seconds.items()},
    }


def quarantine_of(done: Materialization, totals: Totals) -> dict[str, Any]:
    """Metadata of one window of ``events_quarantine``."""
    return {**quarantine_committed(done), "dagster/row_count": totals.quarantined}


def quarantine_committed(done: Materialization) -> dict[str, Any]:
    """The part of it that the commit alone tells; the reasons are those of all rejected rows, whichever run rejected them."""
    commit = done.commit
    reasons = "\n".join(f"| `{reason}` | {rows} |" for reason, rows in sorted(commit.reasons.items()))
    return {
        "dagster/partition_row_count": commit.quarantined_rows,
        **_window(done),
        **({"table version": commit.quarantine_version} if commit.quarantine_version is not None else {}),
        "reasons": dg.MetadataValue.md(f"| reason | rows |\n|---|---:|\n{reasons}" if reasons else "none"),
    }


def sample(window: Window, stored: Snapshot) -> str:
    """The first events of a window as a Markdown table: what happened to what and when, and never with which values."""
    rows: list[dict[str, Any]] = []
    for batch in stored.read(window.start, window.end, columns=_SAMPLE_COLUMNS):
        rows += batch.slice(0, _SAMPLE_ROWS - len(rows)).to_pylist()
        if len(rows) >= _SAMPLE_ROWS:
            break
    if not rows:
        return "no events"
    lines = [
        f"| {row['timestamp']:%H:%M:%S.%f} | {row['event_type']} | {_cell(row['entity_type'])} | {_cell(_fields(row['updated_fields']))} |"
        for row in rows
    ]
    return "\n".join(["| time | event | entity | changed fields |", "|---|---|---|---|", *lines])


def lineage(columns: Iterable[Column]) -> dict[str, Any]:
    """Which columns of the change log a table's columns are made of. Dagster takes it from a table's newest materialization only."""
    deps = {column.name: [dg.TableColumnDep(CHANGE_LOG, source) for source in column.source] for column in columns if column.source}
    return {"dagster/column_lineage": dg.TableColumnLineage(deps)}


def _table(name: str, settings: Settings, columns: list[dg.TableColumn]) -> dict[str, Any]:
    return {
        "dagster/column_schema": dg.TableSchema(columns=columns),
        "dagster/table_name": name,
        "dagster/uri": f"{settings.lake_uri.rstrip('/')}/{name}",
    }


def _column(field: pa.Field, column: Column | None) -> dg.TableColumn:
    return dg.TableColumn(
        field.name,
        type=str(field.type),
        description=column.doc if column else _QUARANTINE_DOCS[field.name],
        constraints=dg.TableColumnConstraints(nullable=field.nullable),
    )


def _window(done: Materialization) -> Mapping[str, Any]:
    commit = done.commit
    return {
        "window": f"{done.window.start:%Y-%m-%d %H:%M} to {done.window.end:%Y-%m-%d %H:%M} UTC",
        "state": commit.state,
        "outcome": commit.outcome,
        "settled pk": commit.settled_pk,
        "committed at": dg.MetadataValue.timestamp(commit.committed_at),
    }


def _fields(names: list[str | None] | None) -> str:
    """The column is an array of nullable text, so any name may be null."""
    return ", ".join("null" if name is None else name for name in names or ())


def _cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", "\\|")[:120]
