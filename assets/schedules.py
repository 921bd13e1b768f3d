"""The schedule that publishes every window shortly after its end.

What lives here: when something runs. What must not: what it does. The schedule gives each window one run; a window that misses it,
because the daemon or the source was down, is found by the sensor ``catch_up``.
"""

import dagster as dg

from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize

#: Minutes after the end of a window: time for the transactions that were open at its end, so that its seal can be proved.
DELAY_MINUTES = 1


def build_each_window(settings: Settings, events: dg.AssetsDefinition) -> dg.ScheduleDefinition:
    """A run for every window, a minute after its end; stopped until somebody starts it."""
    size = settings.window
    hours = "0" if size is WindowSize.DAY else "*"

    @dg.schedule(
        name="each_window",
        target=[events],
        cron_schedule=f"{DELAY_MINUTES} {hours} * * *",
        execution_timezone="UTC",
        description="Publishes each window a minute after its end.",
    )
    def each_window(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        ended = Window.holding(context.scheduled_execution_time - size.duration, size)
        if ended.start < settings.start:
            return dg.SkipReason(f"The first window starts at {settings.start:%Y-%m-%d %H:%M} UTC.")
        return dg.RunRequest(partition_key=ended.key)

    return each_window
