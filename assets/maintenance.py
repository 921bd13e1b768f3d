"""The job ``maintain`` and its nightly schedule: old days compacted, files that no version needs deleted.

What lives here: when that runs and what it shows. What must not: how it is done (``lake/``). It commits nothing that a reader would
notice, and runs beside everything else.
"""

from dataclasses import asdict
from datetime import UTC, datetime

import dagster as dg

from .failures import RETRIES, STOPPED, failure
from .resources import FraiseQL


def build_maintain() -> dg.ScheduleDefinition:
    """The job, on a schedule that is stopped until somebody starts it."""

    @dg.op(retry_policy=RETRIES)
    def maintain_lake(context: dg.OpExecutionContext, fraiseql: FraiseQL) -> None:
        """Compacts days that ended two days ago, deletes what has not been needed for seven."""
        try:
            done = fraiseql.lake().maintain(datetime.now(UTC))
        except (Exception, *STOPPED) as error:  # noqa: BLE001 - translated, never swallowed
            raise failure(error) from None
        context.add_output_metadata(
            {name: ", ".join(value) if isinstance(value, tuple) else value for name, value in asdict(done).items()}
        )

    @dg.job(
        description="Compacts old days of the lake and deletes files that no version needs.", executor_def=dg.in_process_executor
    )
    def maintain() -> None:
        maintain_lake()

    return dg.ScheduleDefinition(
        "maintain_nightly",
        job=maintain,
        cron_schedule="30 3 * * *",
        execution_timezone="UTC",
        description="Runs the job `maintain` every night at 03:30 UTC.",
    )
