"""fraiseql-pipeline: FraiseQL's change-log events as complete windows in Delta tables and over Arrow Flight.

    from fraiseql_pipeline import Settings, Window, connect, materialize

What is named here is stable. Importing the package opens no connection and reads no environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fraiseql_pipeline.changelog import open_changelog as open_changelog
    from fraiseql_pipeline.flight.client import connect as connect
    from fraiseql_pipeline.lake import Lake as Lake
    from fraiseql_pipeline.pipeline import materialize as materialize
    from fraiseql_pipeline.settings import Settings as Settings
    from fraiseql_pipeline.window import Window as Window

# Loaded when first asked for: a Flight client need not load Delta, and Airflow's parser need not load anything.
_HOME = {
    "Lake": "lake",
    "Settings": "settings",
    "Window": "window",
    "connect": "flight.client",
    "materialize": "pipeline",
    "open_changelog": "changelog",
}
__all__ = ["Lake", "Settings", "Window", "connect", "materialize", "open_changelog"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
