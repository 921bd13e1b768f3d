"""The only place that talks to Postgres: the change log, read whole or not at all.

What lives here: connections, preflight, settle and seal, the read, late events and audits, the embedded server and its samples. What
must not: rules about values (``validate.py``), Delta, Flight, an orchestrator.
"""

from fraiseql_pipeline.changelog.contract import Contract
from fraiseql_pipeline.changelog.fill import SampleSummary, write_sample
from fraiseql_pipeline.changelog.late import Audit, Late
from fraiseql_pipeline.changelog.settle import Settlement
from fraiseql_pipeline.changelog.source import ChangeLog, open_changelog, scratch_changelog

__all__ = [
    "Audit",
    "ChangeLog",
    "Contract",
    "Late",
    "SampleSummary",
    "Settlement",
    "open_changelog",
    "scratch_changelog",
    "write_sample",
]
