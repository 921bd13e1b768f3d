"""Errors of the library as Dagster failures: the one place where they are translated.

What lives here: ``failure``. What must not: a second opinion on what may be retried; ``errors.py`` says so.

Invariants
 1. Only an error that calls itself retryable is retried; everything else, a defect and somebody who stops the run included, ends it at once.
 2. A failure shows the error's own sentence. Of an error that is not ours only its type and place are shown: its message may hold
    a value out of an event.
"""

import traceback

import dagster as dg

from fraiseql_pipeline.errors import PipelineError, SettleTimeout, WindowMissing
from fraiseql_pipeline.pipeline import NAMED

#: Three more attempts, after 5, 15 and 35 s (± jitter): long enough for a failover or a busy store, short enough to be told about.
RETRIES = dg.RetryPolicy(max_retries=3, delay=5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)

#: How a step is told to stop: by a signal, or by somebody who terminates the run. No ``Exception``, and a step with a policy for retries
#: that let it through would be retried.
STOPPED = (KeyboardInterrupt, dg.DagsterExecutionInterruptedError)


def failure(error: BaseException) -> dg.Failure:
    """What a step raises in place of ``error``, with ``from None``."""
    if isinstance(error, STOPPED):
        return dg.Failure("The run was stopped; what it had done until then stands.", allow_retries=False)
    if isinstance(error, PipelineError):
        return dg.Failure(str(error), metadata=_details(error), allow_retries=error.retryable)
    frames = "".join(traceback.format_tb(error.__traceback__))
    return dg.Failure(
        f"{type(error).__name__} is a defect of fraiseql-pipeline or of its installation; please report it with the place below.",
        metadata={"error": type(error).__name__, "place": dg.MetadataValue.md(f"```\n{frames}```")},
        allow_retries=False,
    )


def _details(error: PipelineError) -> dict[str, str | dg.MarkdownMetadataValue]:
    details: dict[str, str | dg.MarkdownMetadataValue] = {"error": type(error).__name__}
    if isinstance(error, SettleTimeout) and error.blockers:
        details["blockers"] = dg.MetadataValue.md("\n".join(f"- {blocker}" for blocker in error.blockers))
    if isinstance(error, WindowMissing) and error.missing:
        details["missing windows"] = dg.MetadataValue.md("\n".join(f"- {key}" for key in error.missing))
    # Of several, or of a run that ended for another reason, the sentence does not have each one's. As many are listed as it names.
    if error.refused and str(error) != str(error.refused[0][1]):
        lines = [f"- {key}: {refusal}" for key, refusal in error.refused[:NAMED]]
        more = [f"- and {len(error.refused) - NAMED} more"] if len(error.refused) > NAMED else []
        details["refused windows"] = dg.MetadataValue.md("\n".join(lines + more))
    return details
