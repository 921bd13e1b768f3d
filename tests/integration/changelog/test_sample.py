"""Sample events: the same for the same seed, plausible, and nearly all of them sound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import polars as pl
import psycopg
import pyarrow as pa
import pytest

from fraiseql_pipeline.changelog import SHAPES, ChangeLog, SampleSummary, ShapeName, write_sample
from fraiseql_pipeline.changelog.samples import fill, sample
from fraiseql_pipeline.changelog.samples.fill import _numbered
from fraiseql_pipeline.encoding import frames, to_wire, wire_schema
from fraiseql_pipeline.errors import InputError, SettleTimeout, SourceRefused
from fraiseql_pipeline.event_json import events_to_json
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.validate import Validator
from fraiseql_pipeline.window import WindowSize, tile
from tests.conftest import new_database

_TABLE = "core.tb_entity_change_log"
_EVENTS = 20_000
_KNOWN = {
    "typical": {
        "object_type": "Order",
        "modification_type": "UPDATE",
        "id": UUID("d8b0620f-70d3-4e19-bec0-124483c30c93").bytes,
        "created_at": 1_795_252_058_100_675,
        "tenant_id": UUID("cd613e30-d8f1-4adf-91b7-584a2265b1f5").bytes,
        "object_id": UUID("da61c27b-6746-4dbf-ac5f-ab58b72e3377").bytes,
        "object_data": '{"note": null, "total": 1847.60, "number": "O-000000309", "status": "returned", "version": 6, "currency": "USD",'
        ' "customer": "X Æ A-12"}',
    },
    "wide": {
        "object_type": "Payment",
        "modification_type": "INSERT",
        "id": UUID("d8b0620f-70d3-4e19-bec0-124483c30c93").bytes,
        "created_at": 1_795_258_804_298_696,
        "tenant_id": UUID("cd613e30-d8f1-4adf-91b7-584a2265b1f5").bytes,
        "object_id": UUID("530bf56e-c791-4465-8e1c-912f0d4932cf").bytes,
    },
}


@dataclass(frozen=True)
class _Filled:
    """A log that was filled once for the tests that only look at it."""

    shape: ShapeName
    changelog: ChangeLog
    owner: psycopg.Connection[Any]
    summary: SampleSummary

    def one(self, query: str) -> Any:
        (value,) = self.owner.execute(query.replace("{log}", _TABLE)).fetchone() or (None,)
        return value


@pytest.fixture(scope="module", params=SHAPES)
def filled(postgres: str, contract_template: str, now: datetime, request: pytest.FixtureRequest) -> Iterator[_Filled]:
    with new_database(postgres, contract_template) as (_, url), psycopg.connect(url, autocommit=True) as owner:
        changelog = ChangeLog(url, Settings(database_url=url))
        yield _Filled(request.param, changelog, owner, write_sample(changelog, _EVENTS, end=now, shape=request.param))
        changelog.close()


def _frame(events: int, now: datetime, seed: int = 1, rows: int = sample.SLICE_ROWS, shape: ShapeName = "typical") -> pl.DataFrame:
    return pl.concat(sample.plan(events, days=2, end=now, seed=seed, shape=shape).slices(rows))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_gives_the_same_events_however_they_are_cut(now: datetime, shape: ShapeName) -> None:
    frame = _frame(5000, now, shape=shape)
    assert frame.equals(_frame(5000, now, rows=777, shape=shape))
    other = _frame(5000, now, seed=2, shape=shape)
    assert not set(frame["id"]) & set(other["id"])
    assert not set(frame["object_id"].drop_nulls()) & set(other["object_id"].drop_nulls())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_events_of_a_seed_are_those_of_every_other_machine(now: datetime, shape: ShapeName) -> None:
    row = _frame(1500, now, shape=shape).row(700, named=True)
    known = _KNOWN[shape]
    assert {name: row[name] for name in known} == known


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
    assert filled.one("SELECT avg((length(object_data::text) > 500)::int) FROM {log}") > 0.02
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


def test_nothing_of_a_sample_settles_before_all_of_it_is_written(
    changelog: ChangeLog, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SLICE_ROWS", 500)
    hasty = ChangeLog(changelog.url, changelog.settings.model_copy(update={"settle_timeout_seconds": 0.0}))
    tried = []

    def settle(_: int) -> None:
        try:
            tried.append(hasty.settle().settled_pk)
        except SettleTimeout:
            tried.append(0)

    write_sample(changelog, 2_000, end=now, progress=settle)
    assert set(tried) == {0}
    assert changelog.settle().settled_pk == 2_000
    hasty.close()


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


@pytest.mark.parametrize("where", ["between slices", "in a writer"])
def test_an_interrupted_sample_leaves_no_event_and_all_indexes(
    changelog: ChangeLog, owner: psycopg.Connection[Any], now: datetime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'core' ORDER BY 1"
    before = owner.execute(query).fetchall()
    made = iter(range(2))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    def numbered(*given: Any) -> pl.DataFrame:
        if next(made):
            raise KeyboardInterrupt
        return _numbered(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "between slices":
            patched.setattr(fill, "_numbered", numbered)
        write_sample(changelog, 60_000, end=now, progress=interrupt if where == "in a writer" else None)
    assert owner.execute(query).fetchall() == before
    assert owner.execute(f"SELECT count(*) FROM {_TABLE}").fetchone() == (0,)
    write_sample(changelog, 60_000, end=now)
    assert owner.execute(query).fetchall() == before


def test_a_typical_event_is_as_wide_as_those_the_budgets_were_set_on(filled: _Filled, now: datetime) -> None:
    settlement = filled.changelog.settle()
    batches: list[pa.RecordBatch] = []
    for day in tile(now - timedelta(days=2), now, WindowSize.DAY):
        with filled.changelog.read(day, settlement) as read:
            validator = Validator(day)
            batches += [validator.check(batch).accepted for batch in read]
    events = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    plain = to_wire(events, wire_schema()).nbytes / len(events)
    compact = to_wire(events, wire_schema(profile="compact"))
    packed = sum(len(frame.data) for frame in frames(compact, 10_000, "zstd")) / len(events)
    document = len(events_to_json(events, compact=True)) / len(events)
    if filled.shape == "typical":
        assert 288 < plain < 352
        assert 480 < document < 580
        assert packed * 10 < document
    else:
        assert plain > 550


def test_what_a_sample_says_is_what_the_log_holds(filled: _Filled, now: datetime) -> None:
    made = _frame(_EVENTS, now, shape=filled.shape).filter(pl.col("created_at").abs() < sample.INFINITY)
    names = [name for name in sample.COLUMNS if name != "cascade"]
    times = {name for name in names if name.endswith(("_at", "_time"))}
    asked = [
        f"CASE WHEN isfinite({name}) THEN (extract(epoch FROM {name}) * 1000000)::bigint WHEN {name} > now() THEN {sample.INFINITY} END"
        if name in times
        else f"to_json({name})::text"
        if name == "updated_fields"
        else name
        for name in names
    ]
    rows = filled.owner.execute(
        f"SELECT {', '.join(asked)} FROM {_TABLE} WHERE isfinite(created_at) ORDER BY pk_entity_change_log"
    ).fetchall()
    assert len(rows) == len(made)
    for name, held, said in zip(names, zip(*rows, strict=True), made.select(names), strict=True):
        if name in {"object_data", "object_data_before", "extra_metadata", "updated_fields"}:
            said_values = [None if text is None else json.loads(text) for text in said]
            held_values = [json.loads(value) if isinstance(value, str) else value for value in held]
        elif said.dtype == pl.Binary:
            said_values, held_values = [None if value is None else UUID(bytes=value) for value in said], list(held)
        else:
            said_values, held_values = said.to_list(), list(held)
        assert held_values == said_values, name


def test_an_older_contract_gets_no_samples(changelog: ChangeLog, owner: psycopg.Connection[Any], now: datetime) -> None:
    owner.execute(f"ALTER TABLE {_TABLE} ALTER COLUMN object_id TYPE text, DROP COLUMN acting_for")
    with pytest.raises(SourceRefused, match="object_id, acting_for is missing or of an older type"):
        write_sample(changelog, 10, end=now)
    assert changelog.count() == 0


def test_two_samples_at_once_are_one(changelog_url: str, now: datetime) -> None:
    with psycopg.connect(changelog_url) as other:
        other.execute("SELECT pg_advisory_lock(hashtext('fraiseql-pipeline sample is written'))")
        with pytest.raises(SourceRefused, match="Another sample is being written"):
            write_sample(ChangeLog(changelog_url, Settings(database_url=changelog_url)), 100, end=now)
    assert write_sample(ChangeLog(changelog_url, Settings(database_url=changelog_url)), 100, end=now).events == 100
