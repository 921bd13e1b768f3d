"""The only place that talks to Postgres: the change log, read whole or not at all.

What lives here: everything that is asked of it, and what stands in for one. What must not: rules about values (``validate.py``), Delta,
Flight, an orchestrator.

    connection   connections, and what their failures mean
    contract     what preflight found; preflight: readable, whole, countable?
    settle       settle and seal: which events can still appear
    projection   the column table as SQL
    read         the events of a window as one stream; split: in parts, reader: by threads, session: over connections; utf8: texts proved
    tail         events as they settle, for the Flight server
    counts       late events, audits, rows without a window
    append       events of producers; the only write
    source       the door
    embedded     a Postgres of our own, for demos and tests; samples: what is written into it
"""

from fraiseql_pipeline.changelog.append import Appended
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.counts import Audit, Late
from fraiseql_pipeline.changelog.samples.fill import SampleSummary, write_sample
from fraiseql_pipeline.changelog.samples.sample import SHAPES, ShapeName
from fraiseql_pipeline.changelog.settle import Settlement
from fraiseql_pipeline.changelog.source import ChangeLog, open_changelog, scratch_changelog
from fraiseql_pipeline.changelog.tail import Tail

__all__ = [
    "SHAPES",
    "Appended",
    "Audit",
    "ChangeLog",
    "Contract",
    "Late",
    "SampleSummary",
    "Settlement",
    "ShapeName",
    "Tail",
    "open_changelog",
    "scratch_changelog",
    "write_sample",
]
