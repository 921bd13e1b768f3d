"""Windows as Dagster partitions: their keys, and how many of them one run takes.

What lives here: the partitions definition and the backfill policy, both made from settings by a function. What must not: a clock.

Invariants
 1. A partition key is a window's key; partitions are UTC, so no day has 23 or 25 hours.
 2. A partition exists once its window has ended.
"""

import dagster as dg

from fraiseql_pipeline.errors import InputError, SettingsError
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize


def windows(settings: Settings) -> dg.TimeWindowPartitionsDefinition:
    """Hourly or daily partitions from the first window on."""
    size = settings.window
    kind = dg.HourlyPartitionsDefinition if size is WindowSize.HOUR else dg.DailyPartitionsDefinition
    return kind(start_date=settings.start, timezone="UTC", fmt=size.key_format)


def cover(settings: Settings, window: Window) -> bool:
    """Whether a window is one of these once it has ended; the lake may hold others, from another FRAISEQL_WINDOW or FRAISEQL_START."""
    return window.size is settings.window and settings.start <= window.start


def must_be(defined: dg.PartitionsDefinition | None, settings: Settings) -> None:
    """Raises ``SettingsError`` where a run, or the sensor, is configured for other windows than its partitions were made from."""
    if defined != windows(settings):
        raise SettingsError(
            f"This run is configured for windows of one {settings.window.value} from {settings.start.isoformat()} on, which are not its "
            "partitions: FRAISEQL_WINDOW and FRAISEQL_START must be for runs what they are for the code location."
        )


def windows_of(context: dg.AssetExecutionContext) -> list[Window]:
    """The windows a run was given: one for a single partition, many for a range or a backfill. Raises ``InputError`` where there is none."""
    given = context.has_partition_key or context.has_partition_key_range
    windows = [Window.parse(key) for key in context.partition_keys] if given else []
    if not windows:
        raise InputError("This run was given no window: choose a partition, or a range that begins before it ends.")
    return windows


class _WindowsPerRun(dg.BackfillPolicy):
    """Many windows per run, in runs of a bounded size.

    A run costs a process start (2 to 3 seconds), a small window a few hundredths of a second, so a run takes as many windows as it is
    given. Backfills are cut into runs of ``max_partitions_per_run``, which is what the daemon goes by: it keeps a year of hours from
    being one run that nothing can work on side by side. The command line (`--partition-range`) cuts nothing and asks whether an asset
    can take a range in one run. It can, so ``policy_type`` says so; Dagster's own ``multi_run`` answers no and the range is refused.
    """

    __slots__ = ()

    @property
    def policy_type(self):  # type: ignore[no-untyped-def]  # an enum that dagster does not export
        return dg.BackfillPolicy.single_run().policy_type


# The code server sends policies to the daemon by class name; there it is Dagster's own again.
_WindowsPerRun.__name__ = dg.BackfillPolicy.__name__


def per_run(settings: Settings) -> dg.BackfillPolicy:
    """How a backfill is cut into runs: at most ``windows_per_run`` consecutive windows each."""
    return _WindowsPerRun(settings.windows_per_run)
