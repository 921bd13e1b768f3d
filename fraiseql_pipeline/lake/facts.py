"""What is known about a published window: the facts a commit states and the commit that came of them.

What lives here: ``Facts`` (in), ``Commit`` (out), ``Finding`` (of ``fsck``) and the one JSON object that carries them in the Delta log.
What must not: I/O.

The object lies in ``commitInfo`` under the key ``fraiseql``, where delta-rs shows it in the table's history. Times are ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from fraiseql_pipeline.window import Window, WindowSize

#: The key of our object in ``commitInfo``.
KEY = "fraiseql"

State = Literal["sealed", "provisional"]
Outcome = Literal["published", "replaced", "merged", "unchanged", "skipped"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the caller knows about the content it staged.

    ``source_rows`` is what was read; it must equal accepted + quarantined rows or the commit is refused.
    """

    settled_pk: int
    state: State
    identity: str
    run_id: str
    settled_at: datetime
    source_rows: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One published window.

    ``table_version`` is the version of ``events`` that published it; ``quarantine_version`` the version of ``events_quarantine`` that holds
    its rejected rows, ``None`` if it never had any. Rows and bytes are those of the whole window, late merges included.

    ``late_rows`` counts the events that came after the window was first published, accepted and quarantined together, whether they were merged
    or the window was read again. A window published anew from another source begins at 0, and so does one whose commits are of a version
    that did not count them.
    """

    window: Window
    outcome: Outcome
    table_version: int
    quarantine_version: int | None
    settled_pk: int
    state: State
    source_rows: int
    accepted_rows: int
    quarantined_rows: int
    content_hash: str
    bytes: int
    run_id: str
    committed_at: datetime
    settled_at: datetime
    identity: str
    reasons: Mapping[str, int] = field(default_factory=dict)
    quarantine_hash: str = ""
    schema_hash: str = ""
    package_version: str = ""
    late_rows: int = 0

    def as_json(self) -> dict[str, Any]:
        """The object for ``commitInfo``; what the log itself says (version, time) is left to it."""
        return {
            "window": self.window.key,
            "kind": self.outcome,
            "settled_pk": self.settled_pk,
            "state": self.state,
            "settled_at": self.settled_at.isoformat(),
            "identity": self.identity,
            "source_rows": self.source_rows,
            "accepted_rows": self.accepted_rows,
            "quarantined_rows": self.quarantined_rows,
            "late_rows": self.late_rows,
            "reasons": dict(self.reasons),
            "content_hash": self.content_hash,
            "quarantine_hash": self.quarantine_hash,
            "quarantine_version": self.quarantine_version,
            "bytes": self.bytes,
            "schema_hash": self.schema_hash,
            "package_version": self.package_version,
            "run_id": self.run_id,
        }

    @classmethod
    def from_json(cls, stated: Mapping[str, Any], version: int, committed_at_ms: int) -> Commit:
        """The commit that ``commitInfo`` states; raises ``KeyError``, ``ValueError`` or ``WindowError`` for anything else."""
        return cls(
            window=_window(stated["window"]),
            outcome=stated["kind"],
            table_version=version,
            quarantine_version=stated["quarantine_version"],
            settled_pk=stated["settled_pk"],
            state=stated["state"],
            source_rows=stated["source_rows"],
            accepted_rows=stated["accepted_rows"],
            quarantined_rows=stated["quarantined_rows"],
            content_hash=stated["content_hash"],
            bytes=stated["bytes"],
            run_id=stated["run_id"],
            committed_at=datetime.fromtimestamp(committed_at_ms / 1000, UTC),
            settled_at=datetime.fromisoformat(stated["settled_at"]),
            identity=stated["identity"],
            reasons=stated["reasons"],
            quarantine_hash=stated["quarantine_hash"],
            schema_hash=stated["schema_hash"],
            package_version=stated["package_version"],
            late_rows=stated.get("late_rows", 0),
        )


def _window(key: str) -> Window:
    """What ``Window.parse`` gives, ten times as fast: a cold start parses one key per window ever published."""
    if len(key) == len("2026-11-01"):
        return Window(datetime.fromisoformat(key).replace(tzinfo=UTC), WindowSize.DAY)
    return Window(datetime.fromisoformat(f"{key[:10]}T{key[11:]}+00:00"), WindowSize.HOUR)


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect that ``fsck`` found: where (table and name inside it), what is wrong, what to do, and whether it was repaired just now."""

    table: str
    kind: str
    subject: str
    problem: str
    remedy: str
    repaired: bool = False
