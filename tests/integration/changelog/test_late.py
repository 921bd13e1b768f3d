"""Late events, audits, and rows that no window can hold."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from fraiseql_pipeline.changelog import Audit, ChangeLog, Late
from fraiseql_pipeline.errors import SourceRefused
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile

_TABLE = "core.tb_entity_change_log"
_START = datetime(2026, 3, 29, 0, tzinfo=UTC)  # a day of 23 hours in Zurich
_DAY = list(tile(_START, _START + timedelta(days=1), WindowSize.HOUR))


def _write(owner: psycopg.Connection[Any], *times: object) -> None:
    with owner.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO {_TABLE} (object_type, modification_type, object_id, created_at) VALUES ('Order', 'INSERT', gen_random_uuid(), %s)",
            [[at] for at in times],
        )


def test_an_event_above_the_settled_pk_of_its_window_is_late(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    first, second, third = _DAY[:3]
    _write(owner, first.start, second.start)
    published = {first: 2, second: 2}
    assert changelog.late(published) == []
    _write(
        owner, second.start, first.end - timedelta(microseconds=1), first.end, third.start, first.start - timedelta(microseconds=1)
    )
    assert changelog.late(published) == [Late(first, 1), Late(second, 2)]
    assert changelog.late({first: 4, second: 3}) == [Late(second, 1)]
    assert changelog.late(published, after_pk=4) == [Late(second, 1)]
    assert changelog.late({}) == []


def test_late_events_are_found_in_hours_and_days_at_once(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    hour, day = _DAY[23], Window(_START, WindowSize.DAY)
    _write(owner, hour.end - timedelta(microseconds=1))
    assert changelog.late({hour: 0, day: 0}) == [Late(day, 1), Late(hour, 1)]


@pytest.mark.parametrize("zone", ["Europe/Zurich", "Asia/Kolkata", "America/St_Johns"])
def test_the_zone_of_the_server_moves_no_event_to_another_window(
    changelog_url: str, owner: psycopg.Connection[Any], zone: str
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(changelog_url)["dbname"]
    owner.execute(f"ALTER DATABASE {name} SET TimeZone = '{zone}'; ALTER DATABASE {name} SET DateStyle = 'SQL, DMY'")
    _write(owner, *(at for window in _DAY for at in (window.start, window.end - timedelta(microseconds=1))))
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    assert changelog.late(dict.fromkeys(_DAY, 0)) == [Late(window, 2) for window in _DAY]
    assert [changelog.audit(window, 1000).rows for window in _DAY] == [2] * 24
    assert changelog.span() == (_START, _DAY[-1].end - timedelta(microseconds=1))
    changelog.close()


def test_times_without_a_zone_are_utc_for_late_events_and_audits(changelog_url: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN created_at TYPE timestamp USING created_at AT TIME ZONE 'UTC'")
    _write(owner, *(window.start.replace(tzinfo=None) for window in _DAY))
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    assert changelog.late(dict.fromkeys(_DAY, 0)) == [Late(window, 1) for window in _DAY]
    assert [changelog.audit(window, 1000).rows for window in _DAY] == [1] * 24
    assert changelog.span() == (_DAY[0].start, _DAY[-1].start)
    changelog.close()


def test_an_audit_equals_that_of_the_same_events_elsewhere(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    window, other = _DAY[:2]
    assert changelog.audit(window, 10) == Audit.of([])
    _write(owner, *[window.start] * 5, other.start)
    _write(owner, window.start)
    events = owner.execute(f"SELECT pk_entity_change_log, id::text FROM {_TABLE} ORDER BY 1").fetchall()
    assert changelog.audit(window, 6) == Audit.of(reversed(events[:5]))
    assert changelog.audit(window, 7) == Audit.of([*events[:5], events[6]])
    assert changelog.audit(other, 7) == Audit.of(events[5:6])


@pytest.mark.parametrize(
    "damage",
    [
        f"DELETE FROM {_TABLE} WHERE pk_entity_change_log = 2",
        f"UPDATE {_TABLE} SET id = gen_random_uuid() WHERE pk_entity_change_log = 2",
        f"UPDATE {_TABLE} a SET id = b.id FROM {_TABLE} b WHERE a.pk_entity_change_log + b.pk_entity_change_log = 5",
        f"INSERT INTO {_TABLE} (pk_entity_change_log, object_type, modification_type, created_at) OVERRIDING SYSTEM VALUE VALUES (-4, 'Order', 'INSERT', '2026-03-29')",
    ],
    ids=["a row is gone", "another id", "ids swapped", "restored with an old key"],
)
def test_an_audit_shows_what_late_events_cannot(changelog: ChangeLog, owner: psycopg.Connection[Any], damage: str) -> None:
    _write(owner, *[_START] * 6)
    before = changelog.audit(_DAY[0], 6)
    owner.execute(damage)
    assert changelog.late({_DAY[0]: 6}) == []
    assert changelog.audit(_DAY[0], 6) != before


def test_marking_events_as_published_changes_no_audit(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    _write(owner, *[_START] * 6)
    before = changelog.audit(_DAY[0], 6)
    owner.execute(f"UPDATE {_TABLE} SET nats_published_at = now(), nats_event_id = gen_random_uuid()")
    assert changelog.audit(_DAY[0], 6) == before


def test_times_that_no_window_holds_are_counted_and_are_in_none(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    _write(
        owner, "infinity", "-infinity", "0044-03-15 BC", "294276-12-31", "9999-12-31", "0001-01-01", "9999-12-30 23:59:59.999999+00"
    )
    assert changelog.unplaced() == 5
    assert changelog.count() == 7
    assert changelog.span() == (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 30, 23, 59, 59, 999999, UTC))
    assert changelog.late(dict.fromkeys(_DAY, 0)) == []


def test_a_log_without_a_placed_event_has_no_span(changelog: ChangeLog, owner: psycopg.Connection[Any]) -> None:
    with pytest.raises(SourceRefused, match="no event with a time"):
        changelog.span()
    _write(owner, "infinity")
    with pytest.raises(SourceRefused, match="no event with a time"):
        changelog.span()


def test_looking_for_late_events_reads_the_newest_keys_and_not_the_log(
    changelog: ChangeLog, owner: psycopg.Connection[Any]
) -> None:
    if owner.info.server_version < 150000:
        pytest.skip("Postgres 14 cannot be made to tell its statistics now")
    owner.execute(
        f"INSERT INTO {_TABLE} (object_type, modification_type, created_at) SELECT 'Order', 'INSERT', '2026-03-29'::timestamptz + n * interval '1 second'"
        " FROM generate_series(1, 80000) AS n"
    )
    owner.execute(f"VACUUM ANALYZE {_TABLE}")
    published = dict.fromkeys(_DAY, 79_990)

    def blocks_read() -> int:
        owner.execute("SELECT pg_stat_force_next_flush()")
        (blocks,) = owner.execute(
            f"SELECT heap_blks_hit + heap_blks_read FROM pg_statio_all_tables WHERE relid = '{_TABLE}'::regclass"
        ).fetchone() or (0,)
        return int(blocks)

    changelog.preflight()
    changelog._ask(lambda connection: connection.execute("SELECT pg_stat_force_next_flush()"))
    before = blocks_read()
    assert sum(late.late_rows for late in changelog.late(published)) == 10
    changelog._ask(lambda connection: connection.execute("SELECT pg_stat_force_next_flush()"))
    changelog._ask(lambda connection: connection.execute("SELECT 1"))
    assert blocks_read() - before < 50
