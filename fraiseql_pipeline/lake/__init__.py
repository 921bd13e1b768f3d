"""The lake: the only place that talks to Delta.

What lives here: two Delta tables, ``events`` and ``events_quarantine``, and everything that reads or writes them. What must not: Postgres,
validation rules, the order of a run, Flight.

    facts        what is known about a window; the JSON object in the log
    storage      a directory or an object store: staging, fsync, log entries
    content      the content hash
    parquet      rows → files: encodings, row groups, statistics
    entry        one entry of a log: what it adds, removes and states
    published    the windows of a table, each with its newest commit
    table        one Delta table: following its log, adding an entry, checkpoints
    staging      a window on its way in
    rewrite      files that hold more than one window
    publish      the decision and the two commits of one window
    read         ordered reads from a pinned version
    standing     what the commits add up to, and what is missing among them
    fsck         what is broken, and how to repair it
    maintenance  compaction, vacuum, checkpoints
    lake         the door
"""

from fraiseql_pipeline.lake.entry import File, by_time
from fraiseql_pipeline.lake.facts import Commit, Facts, Finding
from fraiseql_pipeline.lake.lake import Lake
from fraiseql_pipeline.lake.parquet import write_file
from fraiseql_pipeline.lake.read import Opens, Snapshot, file_errors
from fraiseql_pipeline.lake.staging import Staged
from fraiseql_pipeline.lake.standing import Standing

__all__ = [
    "Commit",
    "Facts",
    "File",
    "Finding",
    "Lake",
    "Opens",
    "Snapshot",
    "Staged",
    "Standing",
    "by_time",
    "file_errors",
    "write_file",
]
