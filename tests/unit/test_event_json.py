"""Event JSON ⇄ Arrow: the quick way of reading must be indistinguishable from decoding line by line."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.event import EVENT_SCHEMA, LAKE_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.event_json import KINDS, events_from_json, events_to_json, reading
from fraiseql_pipeline.event_json.canonical import after_line_feeds, canonical_rows
from fraiseql_pipeline.event_json.rows import Rows
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events

ID = "0b9f8f1e-4f2a-4c1d-9a57-3a5b8f6f2c11"
ENTITY = "7d2c1a90-5f0e-4b6c-8e1d-2f3a4b5c6d7e"
TENANT = "11111111-1111-4111-8111-111111111111"


def event(**changes: Any) -> dict[str, Any]:
    """An event's keys in serde's order; a value of None is written as null, ``...`` leaves the key out."""
    fields = {
        "id": ID,
        "event_type": "UPDATE",
        "entity_type": "Order",
        "entity_id": ENTITY,
        "data": {"total": 1},
        "changes": None,
        "user_id": "42",
        "tenant_id": TENANT,
        "timestamp": "2026-11-01T13:00:00.123456Z",
        "duration_ms": 5,
        "seq": 7,
        "actor_type": "human_user",
        "acting_for": None,
        "schema_version": "v1",
        "cdc_source": None,
    }
    return {key: value for key, value in (fields | changes).items() if value is not ...}


def line(separators: tuple[str, str] = (",", ":"), **changes: Any) -> bytes:
    return json.dumps(event(**changes), ensure_ascii=False, separators=separators).encode()


def with_data(data: str, **changes: Any) -> bytes:
    """A line whose payload is this text, byte for byte."""
    return line(data="@@", **changes).replace(b'"@@"', data.encode(), 1)


def one_by_one(text: bytes, schema: pa.Schema = WIRE_SCHEMA) -> tuple[list[dict[str, Any]], list[int]]:
    """What msgspec alone makes of the text: the events, and the numbers of the lines that are none."""
    rows = Rows(schema)
    lines = text.split(b"\n")
    rows.read(range(len(lines)), lines)
    batch = rows.batch()
    return batch.to_pylist(), [row + 1 for row, _ in rows.rejected]


def read(text: bytes, schema: pa.Schema = WIRE_SCHEMA) -> tuple[list[dict[str, Any]], list[int]]:
    try:
        table = events_from_json(text, schema=schema)
    except InputError as error:
        return [], [int(number) for number in re.findall(r"line (\d+) \(", str(error))]
    table.validate(full=True)
    assert table.schema == schema
    return table.to_pylist(), []


def is_quick(*lines: bytes) -> bool:
    """Whether none of the lines was decoded one by one."""
    text = pa.py_buffer(b"".join(each + b"\n" for each in lines))
    ends = after_line_feeds(text)
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
    rows, columns = canonical_rows(text, starts, ends, WIRE_SCHEMA)
    return columns is not None and len(rows) == len(lines)


def test_an_event_of_upstream_becomes_the_eight_columns() -> None:
    text = (
        with_data('{"total":1.10,"id":12345678901234567890123}') + b"\n" + line(event_type="INSERT", user_id=None, tenant_id=None)
    )
    first, second = events_from_json(text).to_pylist()
    assert {**first, "timestamp": None} == {
        "event_id": ID,
        "event_type": "Updated",
        "entity_type": "Order",
        "entity_id": ENTITY,
        "timestamp": None,
        "data": '{"total":1.10,"id":12345678901234567890123}',
        "user_id": "42",
        "org_id": TENANT,
    }
    assert first["timestamp"].value == 1793538000123456000
    assert (second["event_type"], second["user_id"], second["org_id"]) == ("Created", None, None)


@pytest.mark.parametrize(
    "data",
    [
        "null",
        "{}",
        '{"a":1.10,"a":1.1e400,"b":-0}',
        '{"changes":null,"user_id":"other"}',
        '{"x":{"a":1,"changes":null,"user_id":null,"tenant_id":"stolen","timestamp":"2020-01-01T00:00:00Z"}}',
        '{"s":"\\",\\"changes\\":null,\\"user_id\\":\\"x\\""}',
        '{"s":"}{\\\\","t":"\\u0000\\ud83d\\ude00"}',
        '{ "total" : 1 ,\t"z" : [ ] }',
        '["a",{"b":[]}]',
        '"text"',
        "12",
        "true",
        '{"name":"山田 🦊"}',
    ],
)
def test_a_payload_keeps_its_bytes(data: str) -> None:
    (row,) = events_from_json(with_data(data)).to_pylist()
    assert (row["data"], row["org_id"], row["user_id"]) == (data, TENANT, "42")


def test_lines_as_upstream_writes_them_are_not_decoded_one_by_one() -> None:
    assert is_quick(
        line(),
        line(user_id=None, tenant_id=None, duration_ms=None, seq=None, actor_type=None, schema_version=None),
        line(changes={"total": {"old": 1, "new": {"changed": None}}}),
        line(cdc_source=...),
        line(cdc_source=..., schema_version=...),
        with_data('{"tenant_id":"other","user_id":1,"timestamp":"","text":"\\"changes\\":"}'),
        with_data("null"),
    )
    assert not is_quick(line((", ", ": ")))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (line(id=...), "id is missing"),
        (line(data=...), "data is missing"),
        (line(timestamp=...), "timestamp is missing"),
        (line(id="1"), "id must be a UUID"),
        (line(entity_id=ID.replace("-", "")), "entity_id must be a UUID"),
        (line(event_type="NOOP"), "event_type is not what an event holds there"),
        (line(user_id=42), "user_id is not what an event holds there"),
        (line(timestamp="2026-11-01"), "timestamp must be"),
        (line(timestamp="2026-02-30T00:00:00Z"), "timestamp must be"),
        (line(timestamp="2300-01-01T00:00:00Z"), "timestamp must be"),
        (line()[:-1], "not well-formed JSON"),
        (line() + b"{}", "not well-formed JSON"),
        (with_data('{"a":01}'), "not well-formed JSON"),
        (with_data('{"a":"\\x"}'), "not well-formed JSON"),
        (with_data('{"a":"\\ud800"}'), "not well-formed JSON"),
        (with_data('{"a":1}}'), "timestamp is missing"),
        (with_data('{"a":"\t"}'), "not well-formed JSON"),
        (with_data("{" + '"a":{' * 5000 + "}" * 5001), "nested too deeply"),
        (line(entity_type="@").replace(b"@", b"\xff"), "not well-formed JSON"),
        (with_data('{"a":"@"}').replace(b"@", b"\xff"), "not well-formed JSON"),
        (b"[]", "not an object"),
        (line()[:-1] + b',"tenant_id":"other"}', "tenant_id is given twice"),
        (line()[:-1] + b',"tenant\\u005fid":"other"}', "tenant_id is given twice"),
    ],
)
def test_a_line_that_is_no_event_fails_the_call_and_is_named_without_its_values(bad: bytes, why: str) -> None:
    text = b"\n".join([line(), b"", bad, line()])
    with pytest.raises(InputError) as caught:
        events_from_json(text)
    assert str(caught.value).startswith("1 of 4 lines are not events, so nothing was converted: line 3 (" + why)


@pytest.mark.parametrize(
    "payloads",
    [
        ('{"a":[1,', "2]} {}"),
        ('{"a":{}', "{}}"),
        ('{"a":"}', '{"}', "{}{}"),
        ('{"a":"}', '{":{}}', "{}{}"),
        ('{"a":{', "}}{}"),
        ('{"a":[{}', "{}]}", "{}{}"),
    ],
)
def test_payloads_that_complete_each_other_over_a_line_end_are_not_events(payloads: tuple[str, ...]) -> None:
    lines = [with_data(payload) for payload in payloads]
    assert read(b"\n".join(lines)) == ([], list(range(1, len(lines) + 1)))


def test_a_key_in_the_place_of_another_is_not_taken_for_it() -> None:
    for key in event():
        other = line().replace(f'"{key}":'.encode(), f'"{key[:-1]}_":'.encode(), 1)
        expected, rejected = one_by_one(other)
        assert read(other) == (expected, rejected)


def test_a_payload_may_hold_the_keys_of_an_event() -> None:
    spaced = with_data('{"id":1,"tenant_id":"other","tenant_id":"again"}', changes={"id": {"old": 1, "new": 2}}, later=1)
    assert events_from_json(spaced)["org_id"].to_pylist() == [TENANT]
    with pytest.raises(InputError, match="tenant_id is given twice"):
        events_from_json(with_data('"tenant_id"').replace(b"{", b'{"tenant_id":"other",', 1))


def test_lines_of_every_length_are_found() -> None:
    for filling in range(1, 40):
        text = b"\n" * (filling % 9) + line(entity_type="x" * filling) + b"\n" * filling + line() + b"\r\n \t\n" + line()
        rows, _ = read(text)
        assert [row["entity_type"] for row in rows] == ["x" * filling, "Order", "Order"]


def test_lines_that_have_no_distance_in_common_are_found() -> None:
    # So many that most lines are not among those whose distances are learned.
    texts = ["x" * n for n in range(150)]
    different = [line(data={"a": x}, changes={"a": x}, user_id=x, entity_type=f"T{x}", schema_version=x) for x in texts]
    assert is_quick(*different)
    rows, rejected = read(b"\n".join(different))
    assert (rows, rejected) == one_by_one(b"\n".join(different))
    assert [row["user_id"] for row in rows] == texts


def test_a_payload_that_ends_like_an_event_is_not_cut_at_its_keys() -> None:
    tail = line().decode()[line().index(b',"changes":') :]
    text = b"\n".join([*[line()] * 40, with_data('{"a":1' + tail, user_id="own"), *[line()] * 40])
    assert read(text) == one_by_one(text)
    assert read(text)[0][40]["user_id"] == "own"


def test_the_order_of_lines_is_kept_over_both_ways_and_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 5000)
    spaced = (", ", ": ")
    text = b"\n".join(line(spaced if n % 7 == 3 or 40 < n < 60 else (",", ":"), user_id=str(n)) for n in range(200))
    assert events_from_json(text)["user_id"].to_pylist() == [str(n) for n in range(200)]
    with pytest.raises(InputError, match=r"2 of 203 lines .* line 201 \(not well-formed JSON\), line 203 \("):
        events_from_json(text + b"\n{\n\n}")


def test_an_array_of_events_is_read_like_lines() -> None:
    lines = [line(), line((", ", ": "), user_id=None)]
    assert events_from_json(b" \n[" + b",\n".join(lines) + b"]").to_pylist() == events_from_json(b"\n".join(lines)).to_pylist()
    with pytest.raises(InputError, match=r"1 of 2 elements are not events, so nothing was converted: element 2 \(not an object\)"):
        events_from_json(b"[" + line() + b",1]")
    with pytest.raises(InputError, match="not a well-formed array"):
        events_from_json(b"[" + line() + b",")


def test_microseconds_hold_years_that_nanoseconds_do_not() -> None:
    text = line(timestamp="1600-01-01T00:00:00.000001Z") + b"\n" + line((", ", ": "), timestamp="9999-12-31T23:59:59Z")
    first, last = events_from_json(text, schema=EVENT_SCHEMA)["timestamp"].to_pylist()
    assert (first, last) == (datetime(1600, 1, 1, 0, 0, 0, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    fine = events_from_json(line(timestamp="1969-12-31T23:59:59.999999999Z"), schema=EVENT_SCHEMA)["timestamp"].cast(pa.int64())
    assert fine.to_pylist() == [-1]


def test_microseconds_reach_beyond_nanoseconds_whatever_the_digits() -> None:
    texts = [
        "1600-01-01T00:00:00.123456789Z",
        "2026-11-01T00:00:00.1234567Z",
        "1600-01-01T02:00:00.12+02:00",
        "9998-12-31T00:00:00Z",
    ]
    found = events_from_json(b"\n".join(line(timestamp=text) for text in texts), schema=EVENT_SCHEMA)["timestamp"].to_pylist()
    assert [at.isoformat() for at in found] == [
        "1600-01-01T00:00:00.123456+00:00",
        "2026-11-01T00:00:00.123456+00:00",
        "1600-01-01T00:00:00.120000+00:00",
        "9998-12-31T00:00:00+00:00",
    ]
    with pytest.raises(InputError, match="timestamp must be an ISO 8601 time"):
        events_from_json(line(timestamp="2026-11-01T00:00:00.1234567891Z"), schema=EVENT_SCHEMA)


@pytest.mark.parametrize("text", [b"", b"\n", b" \r\n\n", b"[]"])
def test_nothing_is_no_event(text: bytes) -> None:
    table = events_from_json(text)
    assert (table.num_rows, table.schema) == (0, WIRE_SCHEMA)


def test_every_kind_of_buffer_is_read() -> None:
    for form in (bytearray, memoryview, pa.py_buffer):
        assert events_from_json(form(line())).num_rows == 1


# Adversarial text: whole envelope keys, quotes and brackets wherever JSON lets them stand.
_keys = st.sampled_from(
    ["a", "id", "data", "changes", "user_id", "tenant_id", "timestamp", "duration_ms", "actor_type", "entity_id", '"', "\\", ""]
)
_texts = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            '","changes":null',
            '"changes":',
            "}\n{",
            "{",
            "}",
            '\\"',
            ',"user_id":"x"',
            "null",
            "é🦊",
            '","entity_id":"',
            "}{",
            "\x7f\u2028",
        ]
    ),
)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys | _texts, inner, max_size=4)),
    max_leaves=8,
)
_optional = st.one_of(st.none(), _texts)
_events = st.fixed_dictionaries(
    {
        "event_type": st.sampled_from(list(KINDS)),
        "entity_type": _texts,
        "data": _json | st.dictionaries(_keys, _json, max_size=3),
        "changes": st.none() | st.dictionaries(_keys, st.fixed_dictionaries({"old": _json, "new": _json}), max_size=2),
        "user_id": _optional,
        "tenant_id": _optional,
        "timestamp": st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)).map(lambda at: at.isoformat() + "Z"),  # noqa: DTZ001
        "duration_ms": st.none() | st.integers(),
        "seq": st.none() | st.integers(),
        "actor_type": _optional,
    }
)


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    fields = event(**draw(_events))
    form = draw(st.sampled_from(["serde", "serde", "serde", "spaces", "escapes", "order", "fewer", "more"]))
    if form == "order":
        fields = {key: fields[key] for key in draw(st.permutations(list(fields)))}
    if form == "fewer":
        fields.pop(draw(st.sampled_from(list(fields))))
    if form == "more":
        fields["later"] = draw(_json)
    separators = (", ", ": ") if form == "spaces" else (",", ":")
    return json.dumps(fields, ensure_ascii=form == "escapes", separators=separators).encode()


@settings(max_examples=200)
@given(st.lists(_lines(), max_size=6))
@example([with_data('{"changes":1}'), line()])
def test_both_ways_of_reading_agree(lines: list[bytes]) -> None:
    text = b"\n".join(lines)
    expected, rejected = one_by_one(text)
    assert read(text) == (([], rejected) if rejected else (expected, []))
    for got, source in zip(expected, lines, strict=False):
        if not rejected:
            assert json.loads(got["data"]) == json.loads(source)["data"]


@settings(max_examples=250)
@given(st.data())
def test_a_damaged_line_is_judged_alike_by_both_ways(data: st.DataObject) -> None:
    lines = [line(**data.draw(_events)) for _ in range(2)]
    damaged = bytearray(lines[1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        cut = data.draw(st.integers(0, 3))
        damaged[at : at + cut] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"}", b",", b"null", b"\x00", b"\xff", b"1", b"[", b" ", b'"changes":', b":"])
        )
    text = b"\n".join([lines[0], bytes(damaged), lines[0]])
    expected, rejected = one_by_one(text)
    assert read(text) == (([], rejected) if rejected else (expected, []))


def test_reading_what_was_written_gives_the_columns_back() -> None:
    events = lake_events(Window.parse("2026-11-01"), 3000, seed=5)
    eight = events.select(EVENT_SCHEMA.names)
    text = events_to_json(events)
    assert events_from_json(text, schema=EVENT_SCHEMA) == eight
    assert events_from_json(events_to_json(eight.to_batches()[0]), schema=EVENT_SCHEMA) == eight.slice(
        0, eight.to_batches()[0].num_rows
    )
    compact = events_from_json(events_to_json(events, compact=True), schema=EVENT_SCHEMA)
    assert [json.loads(data) for data in compact["data"].to_pylist()] == [json.loads(data) for data in eight["data"].to_pylist()]
    assert compact.drop_columns("data") == eight.drop_columns("data")


@pytest.mark.parametrize("compact", [False, True])
def test_half_a_surrogate_pair_is_written_as_it_stands(compact: bool) -> None:
    events = lake_events(Window.parse("2026-11-01"), 2)
    at = events.schema.get_field_index("data")
    events = events.set_column(at, events.schema.field(at), pa.array(['{"a": "\\ud800",\n"b": 1}', '{"a":1}']))
    lines = events_to_json(events, compact=compact).splitlines()
    assert [json.loads(line)["data"] for line in lines] == [{"a": "\ud800", "b": 1}, {"a": 1}]
    assert b'"data":{"a": "\\ud800", "b": 1},' in lines[0]


def test_all_fields_are_written_in_serdes_order_without_white_space() -> None:
    events = lake_events(Window.parse("2026-11-01"), 500)
    for row, text in zip(events.to_pylist(), events_to_json(events, compact=True).splitlines(), strict=True):
        written = json.loads(text)
        assert list(written) == list(event())
        assert text.decode() == json.dumps(written, ensure_ascii=False, separators=(",", ":"))
        assert written["changes"] is None
        assert (written["id"], written["tenant_id"], written["user_id"]) == (row["event_id"], row["org_id"], row["user_id"])
        for name in ("duration_ms", "seq", "actor_type", "acting_for", "schema_version", "cdc_source"):
            assert written[name] == row[name]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.text(max_size=8), _json, _optional, _optional, st.integers(-(2**62), 2**62)), min_size=1, max_size=4))
@example([('"\\\n\x00\x1f\x7f', {"a": "\n"}, "", "null", 0)])
def test_any_text_survives_the_way_out_and_back(rows: list[tuple[Any, ...]]) -> None:
    columns = [[ID] * len(rows), ["Custom"] * len(rows), [r[0] for r in rows], [ENTITY] * len(rows), [r[4] for r in rows]]
    columns += [[json.dumps(r[1]) for r in rows], [r[2] for r in rows], [r[3] for r in rows]]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, WIRE_SCHEMA, strict=True)], schema=WIRE_SCHEMA)
    text = events_to_json(table)
    assert [json.loads(each)["entity_type"] for each in text.split(b"\n")[:-1]] == columns[2]
    assert events_from_json(text) == table


def test_line_feeds_between_the_tokens_of_a_payload_become_spaces() -> None:
    table = events_from_json(line())
    table = table.set_column(5, WIRE_SCHEMA.field("data"), pa.array(['{\n"a": "\\n"}']))
    assert events_from_json(events_to_json(table))["data"].to_pylist() == ['{ "a": "\\n"}']


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_000_000, "1970-01-01T00:00:00.001Z"),
        (1_000, "1970-01-01T00:00:00.000001Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
    ],
)
def test_a_fraction_of_a_second_is_written_as_upstream_does(nanoseconds: int, text: str) -> None:
    table = events_from_json(line())
    table = table.set_column(4, WIRE_SCHEMA.field("timestamp"), pa.array([nanoseconds], WIRE_SCHEMA.field("timestamp").type))
    assert json.loads(events_to_json(table))["timestamp"] == text


@pytest.mark.parametrize("texts", [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize(
    "times", [pa.timestamp("us", "UTC"), pa.timestamp("ns", "Europe/Paris"), pa.timestamp("us", "-05:30")], ids=str
)
def test_the_same_values_are_written_alike_whatever_their_type(texts: pa.DataType, times: pa.DataType) -> None:
    events = lake_events(Window.parse("2026-11-01"), 50)
    other = events
    for at, field in enumerate(events.schema):
        if field.type == pa.string() or field.name == "timestamp":
            column = events.column(at)
            as_dictionary = field.type == pa.string() and pa.types.is_dictionary(texts)
            wanted = times if field.name == "timestamp" else texts
            other = other.set_column(at, field.name, column.dictionary_encode() if as_dictionary else column.cast(wanted))
    assert events_to_json(other) == events_to_json(events)


def test_what_is_no_event_is_not_written() -> None:
    events = lake_events(Window.parse("2026-11-01"), 2)
    numbers = events.set_column(5, "data", pa.array([[1], [2]]))
    with pytest.raises(InputError, match="needs data as string, got list"):
        events_to_json(numbers)
    table = events_from_json(line())
    with pytest.raises(InputError, match="event_id is missing"):
        events_to_json(table.drop_columns("event_id"))
    nullable = pa.table({**{name: table[name] for name in table.schema.names}, "entity_type": pa.array([None], pa.string())})
    with pytest.raises(InputError, match="entity_type is null in 1 rows"):
        events_to_json(nullable)
    with pytest.raises(InputError, match="WIRE_SCHEMA or EVENT_SCHEMA"):
        events_from_json(line(), schema=LAKE_SCHEMA)
    assert events_to_json(table.slice(0, 0)) == b""
