"""One entry of a table's log: what a commit adds, removes and states.

What lives here: ``File``, ``Entry``, its two ways into a log (as text for local disks, through delta-rs for object stores) and the way out of
one. What must not: which version it becomes, and what happens when another writer has taken it (``table.py``).

Source of the format: the Delta protocol, "Actions" (https://github.com/delta-io/delta/blob/master/PROTOCOL.md#actions); reader 1, writer 2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.transaction import AddAction, RemoveAction

from fraiseql_pipeline.errors import LakeDamaged
from fraiseql_pipeline.event import PARTITION
from fraiseql_pipeline.lake.facts import KEY
from fraiseql_pipeline.lake.parquet import NewFile
from fraiseql_pipeline.window import FOREVER

ENGINE = "fraiseql-pipeline"


@dataclass(frozen=True, slots=True)
class File:
    """An active data file. Its rows lie in [``low``, ``high``] (microseconds, inclusive); ``None`` where the log does not say."""

    path: str
    date: str
    size: int
    rows: int | None
    low: int | None
    high: int | None

    def touches(self, start: int, end: int) -> bool:
        """Whether a row may lie in [start, end)."""
        return (self.low is None or self.low < end) and (self.high is None or self.high >= start)

    def within(self, start: int, end: int) -> bool:
        """Whether every row certainly lies in [start, end)."""
        return self.low is not None and self.high is not None and self.low >= start and self.high < end


def by_time(files: Iterable[File]) -> tuple[File, ...]:
    """In the order of their first timestamp; those that do not tell it come first."""
    return tuple(sorted(files, key=lambda file: (-FOREVER if file.low is None else file.low, file.path)))


@dataclass(frozen=True, slots=True)
class Entry:
    """``stated`` is our object in ``commitInfo``; ``app_id`` is the transaction that gets the entry's version as its own, if there is one.

    ``data_change``: False for a compaction, which moves rows and changes none.
    """

    adds: Sequence[NewFile]
    removes: Sequence[File]
    stated: Mapping[str, Any]
    app_id: str | None
    data_change: bool = True

    def text(self, version: int) -> bytes:
        """The entry as version ``version``: an action per line."""
        now_ms = time.time_ns() // 1_000_000
        actions: list[dict[str, Any]] = [
            {
                "commitInfo": {
                    "timestamp": now_ms,
                    "operation": "WRITE" if self.data_change else "OPTIMIZE",
                    "operationParameters": {"mode": "Append", "partitionBy": json.dumps([PARTITION])},
                    "readVersion": version - 1,
                    "isBlindAppend": False,
                    "engineInfo": ENGINE,
                    KEY: self.stated,
                }
            }
        ]
        if self.app_id is not None:
            actions.append({"txn": {"appId": self.app_id, "version": version, "lastUpdated": now_ms}})
        actions += [
            {
                "remove": {
                    "path": file.path,
                    "deletionTimestamp": now_ms,
                    "dataChange": self.data_change,
                    "extendedFileMetadata": True,
                    "partitionValues": {PARTITION: file.date},
                    "size": file.size,
                }
            }
            for file in self.removes
        ]
        actions += [{"add": file.add(self.data_change)} for file in self.adds]
        return "\n".join(json.dumps(action, separators=(",", ":"), ensure_ascii=False) for action in actions).encode()

    def write(self, opened: DeltaTable, version: int) -> None:
        """Commit the entry through a handle of version - 1. Raises what deltalake raises, ``CommitFailedError`` if any entry came between."""
        now_ms = time.time_ns() // 1_000_000
        actions: list[AddAction | RemoveAction] = [
            AddAction(file.path, file.size, {PARTITION: file.date}, file.written_ms, self.data_change, file.stats)
            for file in self.adds
        ]
        actions += [
            RemoveAction(file.path, self.data_change, now_ms, partition_values={PARTITION: file.date}, size=file.size)
            for file in self.removes
        ]
        opened.create_write_transaction(
            actions,
            "append",
            opened.schema(),
            partition_by=[PARTITION],
            commit_properties=CommitProperties(
                custom_metadata={KEY: dict(self.stated)},
                max_commit_retries=0,
                app_transactions=None if self.app_id is None else [Transaction(self.app_id, version)],
            ),
            post_commithook_properties=PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False),
        )

    def is_in(self, actions: Iterable[Mapping[str, Any]]) -> bool:
        """Whether these are the actions of this entry and not of another writer's."""
        found = list(actions)
        stated = next((a["commitInfo"].get(KEY) for a in found if "commitInfo" in a), None)
        adds, removes = ({a[kind]["path"] for a in found if kind in a} for kind in ("add", "remove"))
        mine = json.loads(json.dumps(self.stated))
        return (stated, adds, removes) == (mine, {f.path for f in self.adds}, {f.path for f in self.removes})


def actions_of(table: str, version: int, text: bytes) -> list[dict[str, Any]]:
    """The actions of one entry; an empty or half-written one is damage."""
    try:
        actions = [json.loads(line) for line in text.splitlines() if line.strip()]
        if actions and all(isinstance(a, dict) for a in actions):
            return actions
    except ValueError:
        pass
    raise LakeDamaged(f"Entry {version} of the log of {table} is empty or torn; run fsck, which tells how to repair it.")


def first_actions_of(table: str, version: int, text: bytes) -> list[dict[str, Any]]:
    """The first action of an entry, where every writer puts ``commitInfo``; all of them if it is another one."""
    line, _, _ = text.partition(b"\n")
    if line.startswith(b'{"commitInfo"'):
        return actions_of(table, version, line)
    return actions_of(table, version, text)
