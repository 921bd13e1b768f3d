"""Sample events: the same for the same seed, plausible, and nearly all of them sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import psycopg
import pytest

from fraiseql_pipeline.changelog import ChangeLog, SampleSummary, sample, write_sample
from fraiseql_pipeline.errors import InputError, SourceRefused
from fraiseql_pipeline.settings import Settings
from tests.conftest import new_database

_TABLE = "core.tb_entity_change_log"
_EVENTS = 20_000
_KNOWN = {
    "object_type": "Payment",
    "modification_type": "INSERT",
    "id": "d8b0620f-70d3-4e19-bec0-124483c30c93",
    "created_at": "2026-11-21 11:00:04.298696",
    "tenant_id": "91c03b23-3d6f-4b2c-a943-906ce0f47dca",
    "object_id": "530bf56e-c791-4465-8e1c-912f0d4932cf",
}


@pytest.fixture
def owner(changelog_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(changelog_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def changelog(changelog_url: str) -> Iterator[ChangeLog]:
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    yield changelog
    changelog.close()


@dataclass(frozen=True)
class _Filled:
    """A log that was filled once for the tests that only look at it."""

    changelog: ChangeLog
    owner: psycopg.Connection[Any]
    summary: SampleSummary

    def one(self, query: str) -> Any:
        (value,) = self.owner.execute(query.replace("{log}", _TABLE)).fetchone() or (None,)
        return value


@pytest.fixture(scope="module")
def filled(postgres: str, contract_template: str, now: datetime) -> Iterator[_Filled]:
    with new_database(postgres, contract_template) as (_, url), psycopg.connect(url, autocommit=True) as owner:
        changelog = ChangeLog(url, Settings(database_url=url))
        yield _Filled(changelog, owner, write_sample(changelog, _EVENTS, end=now))
        changelog.close()


def _frame(events: int, now: datetime, seed: int = 1, rows: int = sample.SLICE_ROWS) -> pl.DataFrame:
    return pl.concat(sample.plan(events, days=2, end=now, seed=seed).slices(rows))


def test_the_same_seed_gives_the_same_events_however_they_are_cut(now: datetime) -> None:
    frame = _frame(5000, now)
    assert frame.equals(_frame(5000, now, rows=777))
    other = _frame(5000, now, seed=2)
    assert not set(frame["id"]) & set(other["id"])
    assert not set(frame["object_id"].drop_nulls()) & set(other["object_id"].drop_nulls())


def test_the_events_of_a_seed_are_those_of_every_other_machine(now: datetime) -> None:
    frame = _frame(1500, now)
    row = frame.row(700, named=True)
    assert {name: row[name] for name in _KNOWN} == _KNOWN


def test_a_sample_has_as_many_events_as_asked_in_its_days_and_order(filled: _Filled, now: datetime) -> None:
    assert filled.summary.events == filled.changelog.count() == _EVENTS
    assert filled.changelog.span() == (filled.summary.first, filled.summary.last)
    assert now - timedelta(days=2) <= filled.summary.first < filled.summary.last < now
    assert filled.one("SELECT max(pk_entity_change_log) FROM {log}") == _EVENTS
    in_order = "SELECT bool_and(created_at >= earlier) FROM (SELECT created_at, lag(created_at) OVER (ORDER BY pk_entity_change_log) AS earlier FROM {log} WHERE isfinite(created_at)) AS pairs"
    assert filled.one(in_order)


def test_a_life_begins_with_its_creation_and_ends_with_its_deletion(filled: _Filled) -> None:
    lives = """SELECT string_agg(CASE upper(modification_type) WHEN 'INSERT' THEN 'c' WHEN 'DELETE' THEN 'd' ELSE 'u' END, '' ORDER BY pk_entity_change_log) AS life
                 FROM {log} WHERE object_id IS NOT NULL AND modification_type <> 'UPSERT' GROUP BY object_id
               HAVING count(*) = max(coalesce(object_data, object_data_before) ->> 'version')::int"""
    assert filled.one(f"SELECT count(*) FROM ({lives}) AS lives WHERE life ~ '^cu*d?$'") > 3000
    assert filled.one(f"SELECT count(*) FROM ({lives}) AS lives WHERE life !~ '^cu*d?$'") == 0
    assert filled.one("SELECT count(*) FROM {log} WHERE (object_data ->> 'id')::uuid <> object_id") == 0


def test_tenants_kinds_and_payloads_differ_in_size(filled: _Filled) -> None:
    largest, smallest = filled.owner.execute(
        f"SELECT max(n), min(n) FROM (SELECT count(*) AS n FROM {_TABLE} WHERE tenant_id IS NOT NULL GROUP BY tenant_id) AS t"
    ).fetchone() or (0, 0)
    assert largest > 50 * smallest
    assert filled.one("SELECT count(DISTINCT object_type) FROM {log} WHERE object_type <> ''") == 5
    assert filled.one("SELECT max(length(object_data::text)) > 20 * min(length(object_data::text)) FROM {log}")
    assert filled.one("SELECT count(*) FROM {log} WHERE object_data::text ~ '[^\\x01-\\x7f]'") > _EVENTS / 4
    for column in (
        "tenant_id",
        "fk_contact",
        "object_data",
        "object_data_before",
        "updated_fields",
        "trace_id",
        "duration_ms",
        "acting_for",
        "cascade",
    ):
        shares = filled.one(f'SELECT avg(("{column}" IS NULL)::int)::float8 FROM {{log}}')
        assert 0 < shares < 1, column


def test_unsound_events_are_counted_and_few_in_every_window(filled: _Filled) -> None:
    unsound = """modification_type = 'UPSERT' OR object_id IS NULL OR object_type = '' OR coalesce(array_ndims(updated_fields), 0) > 1 OR NOT isfinite(coalesce(started_at, now()))
                 OR pk_entity_change_log IN (SELECT max(pk_entity_change_log) FROM {log} GROUP BY id HAVING count(*) > 1)"""
    assert filled.one(f"SELECT count(*) FROM {{log}} WHERE {unsound}") == filled.summary.quarantined_rows
    assert filled.summary.quarantined_rows >= 20
    worst = f"SELECT max(share) FROM (SELECT avg(({unsound})::int) AS share FROM {{log}} GROUP BY date_trunc('hour', created_at)) AS hours"
    assert filled.one(worst) < 0.02
    assert filled.summary.unplaced_rows == filled.one("SELECT count(*) FROM {log} WHERE NOT isfinite(created_at)") == 2


def test_a_log_with_events_is_not_filled_unless_asked_to(changelog: ChangeLog, now: datetime) -> None:
    write_sample(changelog, 10, end=now)
    with pytest.raises(SourceRefused, match="already holds events"):
        write_sample(changelog, 10, end=now)
    told: list[int] = []
    write_sample(changelog, 30, end=now, seed=2, append=True, progress=told.append)
    assert changelog.count() == 40
    assert sum(told) == 30
    assert changelog.settle().settled_pk >= 40


def test_a_filled_log_settles_at_its_last_key_and_goes_on_from_there(filled: _Filled) -> None:
    assert filled.changelog.settle().settled_pk == _EVENTS
    with filled.owner.transaction(force_rollback=True):
        filled.owner.execute(f"INSERT INTO {_TABLE} (object_type, modification_type) VALUES ('Order', 'INSERT')")
        assert filled.one("SELECT max(pk_entity_change_log) FROM {log}") == filled.one("SELECT max(seq) FROM {log}") == _EVENTS + 1


@pytest.mark.parametrize("events", [1, 2, 59, 1000])
def test_small_samples_are_samples_too(changelog: ChangeLog, now: datetime, events: int) -> None:
    assert write_sample(changelog, events, days=1, end=now).events == changelog.count() == events


def test_a_sample_of_nothing_is_refused(changelog: ChangeLog, now: datetime) -> None:
    with pytest.raises(InputError, match="at least one event and one day, got 0 events"):
        write_sample(changelog, 0, end=now)
    with pytest.raises(InputError, match="got 5 events and 0 days"):
        write_sample(changelog, 5, days=0, end=now)


def test_a_large_sample_leaves_the_contract_with_all_of_its_indexes(
    changelog: ChangeLog, owner: psycopg.Connection[Any], now: datetime
) -> None:
    query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'core' ORDER BY 1"
    before = owner.execute(query).fetchall()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(changelog, 60_000, end=now, progress=interrupt)
    assert owner.execute(query).fetchall() == before
    owner.execute(f"TRUNCATE {_TABLE}")
    write_sample(changelog, 60_000, end=now)
    assert owner.execute(query).fetchall() == before
