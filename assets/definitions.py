"""The code location: everything Dagster is told, in one place.

What lives here: ``definitions()`` and its result, ``defs``, which is what a workspace points at. What must not: an asset's body.

Loading reads settings, because the partitions follow from FRAISEQL_WINDOW and FRAISEQL_START; it opens no connection. With nothing
configured it loads with the defaults.
"""

from collections.abc import Mapping

import dagster as dg

from fraiseql_pipeline.settings import Settings

from .benchmarks import benchmarks_job, build_benchmarks
from .events import build_events, source_spec
from .maintenance import build_maintain
from .resources import Flight, FraiseQL
from .schedules import build_each_window
from .sensors import build_catch_up


def definitions(
    settings: Settings,
    *,
    resources: Mapping[str, object] | None = None,
    executor: dg.ExecutorDefinition | None = dg.in_process_executor,
) -> dg.Definitions:
    """The definitions for the windows of some settings, to be merged into yours with ``dg.Definitions.merge``.

    ``resources`` take the place of ours of the same name: ``fraiseql`` (a ``FraiseQL``) and ``flight`` (a ``Flight``). ``executor``: None
    where the definitions they are merged into have one; ours runs a step in the run's process.

    Partitions and what the UI says of the tables follow from these settings. A run reads its own, by the resource ``fraiseql``: they must
    have the same windows, or the run ends before it reads anything.
    """
    events = build_events(settings)
    return dg.Definitions(
        assets=[source_spec(), events, build_benchmarks()],
        jobs=[benchmarks_job()],
        schedules=[build_each_window(settings, events), build_maintain()],
        sensors=[build_catch_up(events)],
        resources={"fraiseql": FraiseQL(), "flight": Flight(), **(resources or {})},
        # One step per run, and a run is a process already: a second process would cost 2 to 3 seconds for nothing.
        executor=executor,
    )


defs = definitions(Settings.load())
