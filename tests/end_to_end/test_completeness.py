"""The promise of the whole: every committed event of a published window is in the lake exactly once, whatever writers do meanwhile."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import ChangeLog, open_changelog
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile
from tests.support.writers import Writers, events_of

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


def publish(clock: FastClock, settings: Settings, changelog: ChangeLog, lake: Lake) -> None:
    fresh = [window for window in clock.windows() if window not in lake.published()]
    pipeline.materialize(fresh, settings=settings, changelog=changelog, lake=lake, jobs=2)
    pipeline.merge_late(settings=settings, changelog=changelog, lake=lake)


def events_in(lake: Lake) -> Counter[tuple[int, str]]:
    found: Counter[tuple[int, str]] = Counter()
    for window in lake.published():
        for batch in lake.read(window.start, window.end, columns=["pk", "event_id"]):
            found.update(zip(batch["pk"].to_pylist(), batch["event_id"].to_pylist(), strict=True))
        rejected = lake.quarantined(window)
        found.update(zip(rejected["pk"].to_pylist(), rejected["event_id"].to_pylist(), strict=True))
    return found


@pytest.mark.timeout(0)
def test_no_event_is_lost_and_none_is_doubled_while_writers_write(changelog_url: str, tmp_path: Path, run_seconds: float) -> None:
    clock = FastClock(changelog_url, run_seconds)
    # Some writers leave object_id null, as some producers do: those events are quarantined, and counted all the same.
    settings = Settings(database_url=changelog_url, lake_uri=str(tmp_path / "lake"), seal_timeout_seconds=0, max_rejected_share=1)
    lake = Lake.of(settings)
    with open_changelog(settings) as changelog:
        with Writers(changelog_url, sessions=10) as writers:
            until = datetime.now(UTC) + timedelta(seconds=run_seconds)
            while datetime.now(UTC) < until:
                publish(clock, settings, changelog, lake)
                writers.run_for(0.1)
        with psycopg.connect(changelog_url) as connection:
            (last,) = connection.execute("SELECT max(created_at) FROM core.tb_entity_change_log").fetchone() or ()
        while not any(window.contains(last) for window in lake.published()):
            publish(clock, settings, changelog, lake)
        publish(clock, settings, changelog, lake)
        merged = sum(commit.outcome == "merged" for commit in lake.published().values())
        audits = [pipeline.audit(window, commit, changelog=changelog, lake=lake) for window, commit in lake.published().items()]
    committed = events_of(changelog_url)
    assert Counter(event_id for _, event_id in committed.elements()) == writers.committed, "the harness knows what was committed"
    assert events_in(lake) == committed
    assert merged, "some events were late: the test has tested what it is for"
    assert all(audited.equal for audited in audits)
