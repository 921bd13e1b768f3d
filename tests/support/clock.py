"""A change log whose hours pass faster than the wall's, and publishing what is over of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile

# An hour is too long for a test, so the log's clock runs faster: what a writer believes to be one second is up to one hour. Times chosen
# by a producer run with it, and so every event is written as the contract says, only elsewhere in time.
_FASTER = """
CREATE FUNCTION core.run_faster() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.created_at := '{base}'::timestamptz + (NEW.created_at - '{began}'::timestamptz) * {factor}; RETURN NEW; END $$;
CREATE TRIGGER run_faster BEFORE INSERT ON core.tb_entity_change_log FOR EACH ROW EXECUTE FUNCTION core.run_faster();
"""
_BACK = timedelta(hours=240)
_HOUR = timedelta(hours=1)


class FastClock:
    """The log's hours, ``factor`` times as fast as the wall's, all of them over by the wall's."""

    def __init__(self, url: str, seconds: float) -> None:
        self._began = datetime.now(UTC)
        self._base = Window.holding(self._began - _BACK, WindowSize.HOUR).start
        self._factor = min(3600.0, 0.8 * _BACK.total_seconds() / seconds)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(_FASTER.format(base=self._base.isoformat(), began=self._began.isoformat(), factor=self._factor))

    def windows(self) -> list[Window]:
        """The windows that have ended, from a day before the start: producers choose times in the past."""
        now = self._base + (datetime.now(UTC) - self._began) * self._factor
        return [window for window in tile(self._base - 24 * _HOUR, now, WindowSize.HOUR) if window.end <= now]


def publish_ended(clock: FastClock, settings: Settings, changelog: ChangeLog, lake: Lake) -> None:
    fresh = [window for window in clock.windows() if window not in lake.published()]
    pipeline.materialize(fresh, settings=settings, changelog=changelog, lake=lake, jobs=2)
    pipeline.merge_late(settings=settings, changelog=changelog, lake=lake)
