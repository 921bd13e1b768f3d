"""Rounds: what followers get is theirs alone, encoded once, and of a bounded past."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fraiseql_pipeline.encoding import Encoding, stream_schema
from fraiseql_pipeline.event import LAKE_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.flight import rounds as module
from fraiseql_pipeline.flight.rounds import Kept, Round, Rounds
from fraiseql_pipeline.flight.segment import Filter, Types
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.events import TENANTS, lake_events

WINDOW = Window(datetime(2026, 11, 1, tzinfo=UTC), WindowSize.HOUR)
EVER = (-1 << 62, 1 << 62)
CANARY = "canary-of-another-tenant"


def batch(rows: int = 500) -> pa.RecordBatch:
    return lake_events(WINDOW, rows).combine_chunks().to_batches()[0]


@pytest.mark.parametrize("encoding", [Encoding("plain", "none"), Encoding("compact", "none")])
def test_no_byte_of_another_tenant_is_in_any_message(encoding: Encoding) -> None:
    events = batch()
    foreign = pc.fill_null(pc.not_equal(events["org_id"], TENANTS[0]), True)
    for name in ("data", "user_id", "entity_type", "actor_type", "acting_for", "trace_id", "org_id"):
        at = LAKE_SCHEMA.get_field_index(name)
        events = events.set_column(at, LAKE_SCHEMA.field(name), pc.if_else(foreign, f"{CANARY}-{name}", events[name]))
    schema = stream_schema(LAKE_SCHEMA.names, encoding)
    kept = Round(500, (events,)).entry(schema, encoding, Filter(org_id=TENANTS[0]), EVER, 1_000)
    messages = b"".join(kept.read(item) for item in kept.items())
    assert sum(item.rows for item in kept.items()) == pc.sum(pc.invert(foreign)).as_py() > 0
    assert CANARY.encode() not in messages


def test_what_is_asked_for_twice_is_encoded_once() -> None:
    one, encoding = Round(500, (batch(),)), Encoding("compact", "zstd")
    schema = stream_schema((), encoding)
    assert one.entry(schema, encoding, Filter(), EVER, 1_000) is one.entry(schema, encoding, Filter(), EVER, 1_000)
    orders = Filter(Types(("Order",)))
    assert one.entry(schema, encoding, orders, EVER, 1_000) is not one.entry(schema, encoding, Filter(), EVER, 1_000)


def test_a_follower_whose_key_lies_within_a_round_gets_what_is_above_it() -> None:
    events, encoding = batch(), Encoding()
    one, schema = Round(500, (events,)), stream_schema((), encoding)
    keys = sorted(events["pk"].to_pylist())

    def asked(after_pk: int | None) -> Kept:
        return one.entry(schema, encoding, Filter(after_pk=after_pk), EVER, 1_000)

    assert sum(item.rows for item in asked(keys[199]).items()) == 300
    assert asked(keys[0] - 1) is asked(None), "who is before it shares with all"


@pytest.mark.parametrize("at", [datetime(1600, 1, 1, tzinfo=UTC), datetime(2300, 1, 1, tzinfo=UTC)])
def test_times_that_nanoseconds_cannot_hold_are_left_out_where_times_are_sent_and_said(
    at: datetime, caplog: pytest.LogCaptureFixture
) -> None:
    window, encoding = Window(at, WindowSize.HOUR), Encoding()
    far = lake_events(window, 3).combine_chunks().to_batches()[0]
    one = Round(500, (far, batch(10)) if at < WINDOW.start else (batch(10), far))

    def rows(*columns: str) -> int:
        schema = stream_schema(columns, encoding)
        return sum(item.rows for item in one.entry(schema, encoding, Filter(), EVER, 1_000).items())

    assert rows("pk", "event_id") == 13
    assert not caplog.records
    assert rows() == rows("timestamp") == 10
    assert [record.getMessage()[:35] for record in caplog.records] == ["3 event(s) lie outside 1677-09-22 t"], "once"


def test_a_round_keeps_the_messages_of_a_few_ways_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_WAYS", 2)
    one, encoding = Round(500, (batch(),)), Encoding()
    schema = stream_schema((), encoding)

    def asked(name: str) -> object:
        return one.entry(schema, encoding, Filter(Types((name,))), EVER, 1_000)

    first, second, third = asked("Order"), asked("User"), asked("Product")
    assert asked("Order") is first
    assert asked("User") is second
    assert asked("Product") is not third


def test_what_a_round_keeps_takes_no_more_memory_however_many_types_its_followers_name() -> None:
    one, encoding = Round(500, (batch(),)), Encoding()
    names = Types(("Order", *(f"other.{number}" for number in range(10_000))))
    kept = one.entry(stream_schema((), encoding), encoding, Filter(names), EVER, 1_000)
    assert sum(item.rows for item in kept.items()) == pc.sum(pc.equal(one.batches[0]["entity_type"], "Order")).as_py() > 0
    assert max(len(pickle.dumps(key)) for key in one._kept) < 1_000


def test_times_cut_through_a_round() -> None:
    events, encoding = batch(), Encoding()
    at = events["timestamp"].cast(pa.int64())
    times = (at[100].as_py(), at[200].as_py())
    kept = Round(500, (events,)).entry(stream_schema((), encoding), encoding, Filter(), times, 1_000)
    inside = pc.and_(pc.greater_equal(at, times[0]), pc.less(at, times[1]))
    assert sum(item.rows for item in kept.items()) == pc.sum(inside).as_py()


def test_rounds_follow_each_other_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS_BYTES", 3 * module._LEAST_BATCH_BYTES)
    rounds = Rounds()
    rounds.begin(7)
    assert rounds.above(7, 0) == ([], 7)
    for after, upto in pairwise((7, 10, 12, 20, 21, 30)):
        rounds.add(after, upto, [batch(10)])
    rounds.add(30, 35, [])  # keys of nothing that is sound
    kept = rounds.above(12, 0)
    assert kept is not None
    assert [one.upto_pk for one in kept[0]] == [20, 21, 30]
    assert kept[1] == 35
    assert rounds.above(11, 0) is None, "gone: to be read as a view"
    assert rounds.above(30, 0) == ([], 35)


def test_rounds_of_few_events_are_counted_by_what_they_take() -> None:
    rounds = Rounds()
    rounds.begin(0)
    many = module.ROUNDS_BYTES // (27 << 10) + 1  # what a batch of one event was measured to take
    for upto in range(1, many + 1):
        rounds.add(upto - 1, upto, [batch(1)])
    assert rounds.above(0, 0) is None
    assert sum(one.bytes for one in rounds._rounds) <= module.ROUNDS_BYTES


def test_messages_that_were_made_for_followers_count_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS_BYTES", 10 * batch(10).nbytes)
    monkeypatch.setattr(module, "_LEAST_BATCH_BYTES", 0)
    rounds, plain = Rounds(), Encoding("plain", "none")
    rounds.begin(0)
    for upto in range(10, 90, 10):
        rounds.add(upto - 10, upto, [batch(10)])
    kept = rounds.above(0, 0)
    assert kept is not None
    for one in kept[0]:
        for columns in range(4):
            one.entry(stream_schema(tuple(WIRE_SCHEMA.names[: 5 + columns]), plain), plain, Filter(), (-(2**61), 2**61), 1_000)
    rounds.add(80, 90, [batch(10)])
    assert sum(one.bytes for one in rounds._rounds) <= 10 * batch(10).nbytes
    assert rounds.above(0, 0) is None


def test_what_does_not_follow_is_no_round_of_those_before() -> None:
    rounds = Rounds()
    rounds.begin(7)
    rounds.add(7, 10, [batch(10)])
    rounds.add(12, 20, [batch(10)])  # what was between was lost on its way here
    assert rounds.above(7, 0) is None
    assert rounds.above(10, 0) is None
    kept = rounds.above(12, 0)
    assert kept is not None
    assert [one.upto_pk for one in kept[0]] == [20]


def test_a_new_beginning_wakes_who_waits() -> None:
    rounds = Rounds()
    rounds.begin(7)
    epoch = rounds.epoch
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rounds.above, 7, 300)
        while not waiting.done():
            rounds.begin(3)
        assert waiting.result() == ([], 7)
    assert rounds.epoch != epoch
