from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fraiseql_pipeline.changelog import ChangeLog
from fraiseql_pipeline.settings import Settings
from tests.support.reading import insert

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def test_the_hours_of_events_from_an_instant_on_are_named_once_and_in_order(changelog_url: str) -> None:
    for minutes in (150, 30, 45, -1, 151):
        insert(changelog_url, created_at=NOON + timedelta(minutes=minutes))
    log = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    try:
        assert log.hours_from(NOON, 10) == [NOON, NOON + timedelta(hours=2)]
        assert log.hours_from(NOON, 1) == [NOON]
        assert log.hours_from(NOON + timedelta(hours=3), 10) == []
    finally:
        log.close()
