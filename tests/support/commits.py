"""Windows and commits as a lake would state them, for what looks at nothing else of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fraiseql_pipeline.lake import Commit
from fraiseql_pipeline.window import Window, WindowSize

START = datetime(2026, 11, 1, tzinfo=UTC)


def hour(number: int) -> Window:
    """Counted from ``START``."""
    return Window(START + timedelta(hours=number), WindowSize.HOUR)


def commit(window: Window, *, rows: int = 10, version: int = 1, state: str = "sealed") -> Commit:
    return Commit(
        window=window,
        outcome="published",
        table_version=version,
        quarantine_version=None,
        settled_pk=1,
        state=state,
        source_rows=rows,
        accepted_rows=rows,
        quarantined_rows=0,
        content_hash="",
        bytes=0,
        run_id="",
        committed_at=window.end,
        settled_at=window.end,
        identity="",
    )


def published(*hours: int) -> dict[Window, Commit]:
    return {hour(number): commit(hour(number), version=number + 1) for number in hours}
