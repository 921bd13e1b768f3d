"""Which events are accepted, which are quarantined and for what, and when a window is halted."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraiseql_pipeline import event_ids, validate
from fraiseql_pipeline.errors import ValidationHalted
from fraiseql_pipeline.event import BATCH_SCHEMA, EVENT_TYPES, LAKE_SCHEMA, QUARANTINE_SCHEMA, UUID_PATTERN, Column
from fraiseql_pipeline.validate import TOLERATED_ROWS, Validator, check_share
from fraiseql_pipeline.window import Window
from tests.support.events import batch_events, lake_events

WINDOW = Window.parse("2026-11-01-13:00")
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
MICROSECOND = timedelta(microseconds=1)


def reasons_of(window: Window = WINDOW, n: int = 3, **overrides: Any) -> dict[int, list[str]]:
    """The reasons per row of one batch, by the number the row was read at."""
    batch = batch_events(window, n, **overrides)
    validation = Validator(window).check(batch)
    positions = {pk: row for row, pk in enumerate(batch["pk"].to_pylist())}
    quarantined = validation.quarantined
    return {positions[pk]: why for pk, why in zip(quarantined["pk"].to_pylist(), quarantined["reasons"].to_pylist(), strict=True)}


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_sound_events_are_accepted_as_they_are(n: int) -> None:
    batch = batch_events(WINDOW, n)
    validation = Validator(WINDOW).check(batch)
    assert validation.reasons == {}
    assert validation.quarantined.num_rows == 0
    assert validation.quarantined.schema.equals(QUARANTINE_SCHEMA, check_metadata=True)
    assert pa.Table.from_batches([validation.accepted]).equals(lake_events(WINDOW, n))
    assert validation.accepted.schema.equals(LAKE_SCHEMA, check_metadata=True)
    validation.accepted.validate(full=True)


def test_a_wholly_accepted_batch_shares_the_memory_it_was_read_into() -> None:
    batch = batch_events(WINDOW, 100)
    accepted = Validator(WINDOW).check(batch).accepted
    for name in BATCH_SCHEMA.names:
        if name != "raw":
            read, kept = batch[name].buffers()[-1], accepted[name].buffers()[-1]
            assert (read and read.address) == (kept and kept.address), name


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("event_id", None, "event_id:null"),
        ("event_id", "", "event_id:malformed"),
        ("event_id", UUID.upper(), "event_id:malformed"),
        ("event_id", UUID.replace("-", ""), "event_id:malformed"),
        ("event_id", "{" + UUID + "}", "event_id:malformed"),
        ("event_id", UUID + "\n", "event_id:malformed"),
        ("event_id", UUID[:-1] + "g", "event_id:malformed"),
        ("event_id", UUID[:-1] + "é", "event_id:malformed"),
        ("event_type", None, "event_type:null"),
        ("event_type", "created", "event_type:unknown"),
        ("entity_type", None, "entity_type:null"),
        ("entity_type", "", "entity_type:malformed"),
        ("entity_type", " \u00a0\u3000", "entity_type:malformed"),
        ("entity_type", "*", "entity_type:malformed"),
        ("entity_type", "Or\nder", "entity_type:malformed"),
        ("entity_type", "Order\x7f", "entity_type:malformed"),
        ("entity_type", "Order\u2028", "entity_type:malformed"),
        ("entity_type", "x" * 256, "entity_type:malformed"),
        ("entity_id", None, "entity_id:null"),
        ("entity_id", "42", "entity_id:malformed"),
        ("timestamp", None, "timestamp:null"),
        ("timestamp", WINDOW.start - MICROSECOND, "timestamp:outside"),
        ("timestamp", WINDOW.end, "timestamp:outside"),
        ("timestamp", datetime(1, 1, 1, tzinfo=UTC), "timestamp:outside"),
        ("timestamp", datetime(9999, 12, 31, tzinfo=UTC), "timestamp:outside"),
        ("data", None, "data:null"),
        ("pk", None, "pk:null"),
        ("org_id", "tenant-7", "org_id:malformed"),
        ("acting_for", "someone", "acting_for:malformed"),
        ("raw", '{"created_at": "infinity"}', "raw:unfit"),
    ],
)
def test_each_rule_names_what_it_rejects(column: str, value: object, reason: str) -> None:
    batch = batch_events(WINDOW, 3, **{column: {1: value}})
    validation = Validator(WINDOW).check(batch)
    assert validation.reasons == {reason: 1}
    assert validation.quarantined["reasons"].to_pylist() == [[reason]]
    assert validation.accepted["event_id"].to_pylist() == [batch["event_id"][0].as_py(), batch["event_id"][2].as_py()]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("entity_type", "core.tb_order"),
        ("entity_type", "Größe: a|b > 100 %*"),
        ("entity_type", "注文"),
        ("entity_type", "x" * 255),
        ("entity_type", "😀" * 255),
        ("timestamp", WINDOW.start),
        ("timestamp", WINDOW.end - MICROSECOND),
        ("data", "null"),
        ("data", '{"n": 1.10, "big": 12345678901234567890123, "text": "\\u0001 \U0010ffff"}'),
        ("user_id", None),
        ("org_id", None),
        ("acting_for", None),
        ("actor_type", "someone_of_an_older_contract"),
        ("updated_fields", ["", None, "naïve"]),
        ("duration_ms", -1),
    ],
)
def test_what_the_contract_allows_is_accepted_unaltered(column: str, value: object) -> None:
    accepted = Validator(WINDOW).check(batch_events(WINDOW, 3, **{column: {1: value}})).accepted
    assert accepted[column].to_pylist()[1] == value
    assert accepted.num_rows == 3


def test_a_row_has_every_reason_sorted() -> None:
    assert reasons_of(
        event_id={0: "x"}, event_type={0: None, 2: None}, raw={0: "{}", 2: "{}"}, timestamp={0: WINDOW.end}, data={0: None}
    ) == {
        0: ["data:null", "event_id:malformed", "event_type:null", "raw:unfit", "timestamp:outside"],
        2: ["event_type:null", "raw:unfit"],
    }


def test_a_quarantined_row_is_the_row_as_read() -> None:
    batch = batch_events(
        WINDOW, 50, event_type={3: None, 7: None}, raw={3: '{"modification_type": "MERGE"}', 7: "{}"}, timestamp={9: None}
    )
    quarantined = Validator(WINDOW).check(batch).quarantined
    assert quarantined.select(BATCH_SCHEMA.names).equals(batch.take(pa.array([3, 7, 9])))
    assert quarantined["window_key"].to_pylist() == [WINDOW.key] * 3
    assert set(quarantined["event_date"].to_pylist()) == {WINDOW.start.date()}
    assert quarantined.schema.equals(QUARANTINE_SCHEMA, check_metadata=True)
    quarantined.validate(full=True)


@pytest.mark.parametrize("bad", [1, 512, 513, 999, 1000])
def test_both_halves_add_up_and_keep_their_order(bad: int) -> None:
    batch = batch_events(WINDOW, 1000, event_type=[None] * bad + ["Created"] * (1000 - bad))
    validation = Validator(WINDOW).check(batch)
    assert (validation.quarantined.num_rows, validation.accepted.num_rows) == (bad, 1000 - bad)
    assert validation.quarantined["pk"].to_pylist() + validation.accepted["pk"].to_pylist() == batch["pk"].to_pylist()
    validation.accepted.validate(full=True)
    assert validation.accepted.schema.equals(LAKE_SCHEMA, check_metadata=True)


def test_the_date_of_a_daily_window_is_its_date() -> None:
    day = Window.parse("2026-03-29")
    validation = Validator(day).check(batch_events(day, 20, data={7: None}))
    assert {at.date() for at in validation.accepted["timestamp"].to_pylist()} == {day.start.date()}
    assert set(validation.accepted["event_date"].to_pylist()) == {day.start.date()}
    assert set(validation.quarantined["event_date"].to_pylist()) == {day.start.date()}


def test_a_slice_of_a_batch_is_judged_like_a_batch() -> None:
    batch = batch_events(WINDOW, 60, entity_id={30: "x"}, event_id={5: None, 31: "y"})
    validation = Validator(WINDOW).check(batch.slice(20, 25))
    assert validation.quarantined["pk"].to_pylist() == batch["pk"].to_pylist()[30:32]
    assert validation.accepted["pk"].to_pylist() == batch["pk"].to_pylist()[20:30] + batch["pk"].to_pylist()[32:45]


# ------------------------------------------------------------------------------------------------------------ the oracle

MALFORMED = ["", "x", UUID.upper(), UUID + "0"]
ROW = st.fixed_dictionaries(
    {},
    optional={
        "event_id": st.sampled_from([None, UUID, UUID.replace("0", "1"), *MALFORMED]),
        "event_type": st.sampled_from([None, "INSERT", *EVENT_TYPES]),
        "entity_type": st.one_of(st.none(), st.sampled_from(["", "*", "**", " ", "\x85", "a b"]), st.text(max_size=3)),
        "entity_id": st.sampled_from([None, UUID, *MALFORMED]),
        "timestamp": st.sampled_from([None, WINDOW.start, WINDOW.end, WINDOW.start - MICROSECOND, WINDOW.end - MICROSECOND]),
        "data": st.sampled_from([None, "null"]),
        "org_id": st.sampled_from([None, UUID, *MALFORMED]),
        "acting_for": st.sampled_from([None, UUID, *MALFORMED]),
        "raw": st.sampled_from([None, "{}"]),
    },
)


def expected_reasons(row: dict[str, Any], accepted_ids: set[str]) -> list[str]:
    found = [
        f"{name}:null" for name in ("event_id", "event_type", "entity_type", "entity_id", "timestamp", "data") if row[name] is None
    ]
    uuids = {name: row[name] for name in ("event_id", "entity_id", "org_id", "acting_for") if row[name] is not None}
    found += [f"{name}:malformed" for name, text in uuids.items() if not re.fullmatch(UUID_PATTERN.strip("^$"), text)]
    if row["event_type"] is not None and row["event_type"] not in EVENT_TYPES:
        found.append("event_type:unknown")
    name = row["entity_type"]
    if name is not None and (not name.strip() or name == "*" or re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", name)):
        found.append("entity_type:malformed")
    if row["timestamp"] is not None and not WINDOW.contains(row["timestamp"]):
        found.append("timestamp:outside")
    if row["raw"] is not None:
        found.append("raw:unfit")
    if row["event_id"] in accepted_ids:
        found.append("event_id:duplicate")
    return sorted(found)


@settings(max_examples=100)
@given(st.lists(st.lists(ROW, max_size=6), max_size=4))
def test_the_verdict_is_that_of_a_row_by_row_oracle(batches: list[list[dict[str, Any]]]) -> None:
    validator = Validator(WINDOW)
    accepted_ids: set[str] = set()
    for seed, rows in enumerate(batches):
        overrides: dict[str, dict[int, Any]] = {}
        for at, row in enumerate(rows):
            for name, value in row.items():
                overrides.setdefault(name, {})[at] = value
        batch = batch_events(WINDOW, len(rows), seed, **overrides)
        accepted, quarantined, counts = [], [], Counter[str]()
        for event in batch.to_pylist():
            if why := expected_reasons(event, accepted_ids):
                quarantined.append({**event, "reasons": why, "window_key": WINDOW.key, "event_date": WINDOW.start.date()})
                counts.update(why)
            else:
                del event["raw"]
                accepted.append({**event, "event_date": WINDOW.start.date()})
                accepted_ids.add(event["event_id"])
        validation = validator.check(batch)
        assert validation.accepted.to_pylist() == accepted
        assert validation.quarantined.to_pylist() == quarantined
        assert validation.reasons == counts
    validator.confirm()


@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.uuids().map(str), st.text("0123456789abcdefABCDEFg-é", min_size=34, max_size=37), st.none()), max_size=8),
    st.integers(0, 3),
)
def test_the_fast_screen_of_ids_finds_what_the_pattern_finds(ids: list[str | None], skipped: int) -> None:
    texts = [text for text in ids if text is not None]
    whole = pa.array([UUID] * skipped + texts, pa.string()).slice(skipped)
    wrong = [row for row, text in enumerate(texts) if not re.fullmatch(UUID_PATTERN.strip("^$"), text)]
    assert sorted(event_ids.malformed_ids(whole)) == wrong


@pytest.mark.parametrize("at", range(36))
def test_the_fast_screen_of_ids_sees_every_byte(at: int) -> None:
    for wrong in "-/:`gA\x00\x7f" if UUID[at] != "-" else "0af/.\x00":
        assert event_ids.malformed_ids(pa.array([UUID, UUID[:at] + wrong + UUID[at + 1 :], UUID])).tolist() == [1]


def test_ids_whose_wrong_lengths_add_up_are_found() -> None:
    assert sorted(event_ids.malformed_ids(pa.array([UUID, UUID + UUID[0], UUID[1:]]))) == [1, 2]


def test_pandera_is_not_asked_about_a_sound_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_failure_cases", lambda *_: pytest.fail("pandera was asked about a sound batch"))
    validator = Validator(WINDOW)
    assert validator.check(batch_events(WINDOW, 1000)).accepted.num_rows == 1000
    validator.confirm()


def test_pandera_confirms_the_values_that_broke_a_rule_and_only_them(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[str, list[str | None]]] = []
    real = validate._failure_cases

    def spy(column: Column, window: Window, frame: pl.DataFrame) -> pl.DataFrame | None:
        judged.append((column.name, frame[column.name].to_list()))
        return real(column, window, frame)

    monkeypatch.setattr(validate, "_failure_cases", spy)
    validator = Validator(WINDOW)
    validator.check(batch_events(WINDOW, 1000, entity_id={4: None, 7: "x"}, org_id={7: "y", 9: "z"}))
    validator.check(batch_events(WINDOW, 1000, 1, org_id={1: "w"}))
    assert judged == [], "its price is fixed, so it is paid once per window"
    validator.confirm()
    assert judged == [("entity_id", [None, "x"]), ("org_id", ["y", "z", "w"])]
    validator.confirm()
    assert len(judged) == 2


def test_many_bad_values_are_confirmed_before_the_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_DOUBTFUL_BYTES", 100)
    validator = Validator(WINDOW)
    validator.check(batch_events(WINDOW, 10, org_id=dict.fromkeys(range(9), "much too long to wait")))
    assert not validator._doubts


def test_of_names_that_somebody_makes_up_few_are_remembered_and_all_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_REMEMBERED_VALUES", 2)
    validator = Validator(WINDOW)
    for names in ("ab*", "acd", "ab*"):
        validation = validator.check(batch_events(WINDOW, 3, seed=ord(names[0]), entity_type=dict(enumerate(names))))
        assert validation.reasons.get("entity_type:malformed", 0) == names.count("*")
        assert len(validator._verdicts["entity_type"]) == 3


@pytest.mark.parametrize("told", [None, "entity_id:null"])
def test_a_row_rejected_without_cause_halts(monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    uuid = validate._RULES["uuid"]
    monkeypatch.setitem(
        validate._RULES, "uuid", validate._Meaning("malformed", uuid.holds, lambda values, _: np.arange(len(values)))
    )
    validator = Validator(WINDOW)
    validator.check(batch_events(WINDOW, 100, **({"entity_id": {4: None}} if told else {})))
    with pytest.raises(ValidationHalted, match="rejected for their event_id that pandera judges otherwise"):
        validator.confirm()


# ------------------------------------------------------------------------------------------------------------------ halts


def test_drifted_columns_halt_before_anything_is_judged() -> None:
    batch = batch_events(WINDOW, 2)
    at = BATCH_SCHEMA.get_field_index("pk")
    drifted = batch.drop_columns(["user_id"]).append_column("surprise", pa.array([1, 2]))
    drifted = drifted.set_column(at - 1, pa.field("pk", pa.int32()), pa.array([1, 2], pa.int32()))
    with pytest.raises(ValidationHalted, match=r"missing: user_id; unexpected: surprise; pk: int32 instead of int64"):
        Validator(WINDOW).check(drifted)


@pytest.mark.parametrize(
    ("type_", "name"), [(pa.large_string(), "data"), (pa.timestamp("us"), "timestamp"), (pa.timestamp("ns", "UTC"), "timestamp")]
)
def test_a_type_that_only_looks_alike_is_drift(type_: pa.DataType, name: str) -> None:
    batch = batch_events(WINDOW, 2)
    at = BATCH_SCHEMA.get_field_index(name)
    with pytest.raises(ValidationHalted, match=rf"{name}: .* instead of "):
        Validator(WINDOW).check(batch.set_column(at, pa.field(name, type_), batch[name].cast(type_)))


def test_columns_in_another_order_are_drift() -> None:
    with pytest.raises(ValidationHalted, match="in another order"):
        Validator(WINDOW).check(batch_events(WINDOW, 2).select([*BATCH_SCHEMA.names[1:], BATCH_SCHEMA.names[0]]))


def test_nullability_flags_and_metadata_of_a_reader_are_no_drift() -> None:
    batch = batch_events(WINDOW, 2)
    schema = pa.schema([field.with_nullable(field.name != "pk") for field in BATCH_SCHEMA], {"reader": "x"})
    batch = pa.RecordBatch.from_arrays(batch.columns, schema=schema)
    accepted = Validator(WINDOW).check(batch).accepted
    assert accepted.schema.equals(LAKE_SCHEMA, check_metadata=True)


@pytest.mark.parametrize(
    ("accepted", "rejected", "share", "halts"),
    [
        (71, 29, 0.29, False),  # exactly the share, which no binary fraction is
        (70, 30, 0.29, True),
        (0, 0, 0.05, False),
        (2, 1, 0.05, False),
        (0, TOLERATED_ROWS, 0.05, False),
        (0, TOLERATED_ROWS + 1, 0.05, True),
        (950, 50, 0.05, False),
        (949, 51, 0.05, True),
        (999_999, 1, 0.0, True),
        (5, 0, 0.0, False),
        (0, 1000, 1.0, False),
    ],
)
def test_a_window_is_halted_above_the_share_and_never_for_a_handful(
    accepted: int, rejected: int, share: float, *, halts: bool
) -> None:
    if not halts:
        check_share(WINDOW, accepted, rejected, {"data:null": rejected}, share)
        return
    with pytest.raises(ValidationHalted, match=WINDOW.key):
        check_share(WINDOW, accepted, rejected, {"data:null": rejected}, share)


def test_a_halt_counts_every_reason() -> None:
    with pytest.raises(ValidationHalted) as halted:
        check_share(WINDOW, 8000, 2000, {"event_id:duplicate": 500, "data:null": 1600}, 0.05)
    assert "2,000 of 10,000 events" in str(halted.value)
    assert "(data:null 1,600, event_id:duplicate 500)" in str(halted.value)
    assert "FRAISEQL_MAX_REJECTED_SHARE" in str(halted.value)


# ---------------------------------------------------------------------------------------------------------------- privacy

CANARY = "canary-7d1f"


def canary_batch() -> pa.RecordBatch:
    texts = {field.name: CANARY for field in BATCH_SCHEMA if field.type == pa.string()}
    return batch_events(WINDOW, 3, **texts)


def told(error: BaseException | None) -> str:
    """Everything a log of this exception could show, its hidden context too."""
    return "" if error is None else f"{error!r} {vars(error)} {told(error.__cause__)} {told(error.__context__)}"


def test_reasons_hold_no_value_of_a_row() -> None:
    validation = Validator(WINDOW).check(canary_batch())
    assert validation.quarantined.num_rows == 3
    assert CANARY not in str(validation.reasons)
    assert CANARY not in str(validation.quarantined["reasons"])


def test_drift_holds_no_value_of_a_row() -> None:
    with pytest.raises(ValidationHalted) as halted:
        Validator(WINDOW).check(canary_batch().drop_columns(["pk"]))
    assert CANARY not in told(halted.value)


def test_a_column_pandera_cannot_judge_halts_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(value: pl.Expr, _: Window) -> pl.Expr:
        return value.str.to_integer()

    rule = validate._RULES["uuid"]
    monkeypatch.setitem(validate._RULES, "uuid", validate._Meaning("malformed", broken, rule.screen))
    validator = Validator(WINDOW)
    validator.check(canary_batch())
    with pytest.raises(ValidationHalted, match="could not be judged") as halted:
        validator.confirm()
    assert CANARY not in told(halted.value)


def test_halves_that_do_not_add_up_halt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_without", lambda batch, _: batch.slice(0, 0))
    with pytest.raises(ValidationHalted, match="do not add up"):
        Validator(WINDOW).check(batch_events(WINDOW, 3, data={0: None}))
