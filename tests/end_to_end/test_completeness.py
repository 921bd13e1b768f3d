"""The promise of the whole: every committed event of a published window is in the lake exactly once, whatever writers do meanwhile."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.support.clock import FastClock, publish_ended
from tests.support.writers import Writers, events_of


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
                publish_ended(clock, settings, changelog, lake)
                writers.run_for(0.1)
        with psycopg.connect(changelog_url) as connection:
            (last,) = connection.execute("SELECT max(created_at) FROM core.tb_entity_change_log").fetchone() or ()
        while not any(window.contains(last) for window in lake.published()):
            publish_ended(clock, settings, changelog, lake)
        publish_ended(clock, settings, changelog, lake)
        merged = sum(commit.outcome == "merged" for commit in lake.published().values())
        audits = [pipeline.audit(window, commit, changelog=changelog, lake=lake) for window, commit in lake.published().items()]
    committed = events_of(changelog_url)
    assert Counter(event_id for _, event_id in committed.elements()) == writers.committed, "the harness knows what was committed"
    assert events_in(lake) == committed
    assert merged, "some events were late: the test has tested what it is for"
    assert all(audited.equal for audited in audits)
