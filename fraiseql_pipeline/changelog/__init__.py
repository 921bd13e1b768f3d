"""The only place that talks to Postgres: the change log, read whole or not at all.

What lives here: connections, preflight, settle and seal, the read, late events and audits, the embedded server and its samples. What
must not: rules about values (``validate.py``), Delta, Flight, an orchestrator.
"""

from fraiseql_pipeline.changelog.append import Appended
from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.fill import SampleSummary, write_sample
from fraiseql_pipeline.changelog.late import Audit, Late
from fraiseql_pipeline.changelog.sample import SHAPES, ShapeName
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
