"""fraiseql-pipeline: FraiseQL's change-log events as complete windows in Delta tables and over Arrow Flight.

    from fraiseql_pipeline import Lake, Settings, WindowSize, connect, materialize, merge_late, open_changelog, tile

What is named here is stable. Importing the package opens no connection and reads no environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fraiseql_pipeline.changelog import open_changelog as open_changelog
    from fraiseql_pipeline.errors import PipelineError as PipelineError
    from fraiseql_pipeline.event_json import events_from_json as events_from_json
    from fraiseql_pipeline.event_json import events_to_json as events_to_json
    from fraiseql_pipeline.flight.client import connect as connect
    from fraiseql_pipeline.lake import Lake as Lake
    from fraiseql_pipeline.pipeline import Materialization as Materialization
    from fraiseql_pipeline.pipeline import audit as audit
    from fraiseql_pipeline.pipeline import materialize as materialize
    from fraiseql_pipeline.pipeline import merge_late as merge_late
    from fraiseql_pipeline.settings import Settings as Settings
    from fraiseql_pipeline.window import Window as Window
    from fraiseql_pipeline.window import WindowSize as WindowSize
    from fraiseql_pipeline.window import tile as tile

# Loaded when first asked for: a Flight client need not load Delta, and Airflow's parser need not load anything.
_HOME = {
    "Lake": "lake",
    "Materialization": "pipeline",
    "PipelineError": "errors",
    "Settings": "settings",
    "Window": "window",
    "WindowSize": "window",
    "audit": "pipeline",
    "connect": "flight.client",
    "events_from_json": "event_json",
    "events_to_json": "event_json",
    "materialize": "pipeline",
    "merge_late": "pipeline",
    "open_changelog": "changelog",
    "tile": "window",
}
__all__ = [
    "Lake",
    "Materialization",
    "PipelineError",
    "Settings",
    "Window",
    "WindowSize",
    "audit",
    "connect",
    "events_from_json",
    "events_to_json",
    "materialize",
    "merge_late",
    "open_changelog",
    "tile",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(f"{__name__}.version").package_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
