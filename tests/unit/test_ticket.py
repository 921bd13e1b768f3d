"""What a ticket may say, in its three forms, and the one sentence that answers everything else."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraiseql_pipeline.errors import TicketError, WindowError
from fraiseql_pipeline.event import EVENT_SCHEMA, LAKE_SCHEMA
from fraiseql_pipeline.ticket import CODECS, MAX_BATCH_ROWS, MAX_BYTES, MAX_TEXT_BYTES, PROFILES, Ticket
from fraiseql_pipeline.window import parse_time

NOW = datetime(2026, 11, 22, 16, 30, 15, 123456, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def parse(ticket: str | bytes | dict[str, Any]) -> Ticket:
    data = json.dumps(ticket).encode() if isinstance(ticket, dict) else ticket.encode() if isinstance(ticket, str) else ticket
    return Ticket.parse(data, NOW)


def refusal(ticket: str | bytes | dict[str, Any]) -> str:
    with pytest.raises(TicketError) as refused:
        parse(ticket)
    return str(refused.value)


def parsed_or_refused(data: bytes) -> Ticket | None:
    """The ticket, or none if it was refused with a short sentence; any other error is one of the test."""
    try:
        return Ticket.parse(data, NOW)
    except TicketError as error:
        sentence = str(error)
    assert len(sentence) < 400
    assert sentence.isprintable()
    return None


# ------------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "types", "start", "end", "rows"),
    [
        (
            "events:Order:2026-01-01T00:00:00Z:2026-01-31T23:59:59Z:10000",
            ("Order",),
            datetime(2026, 1, 1, tzinfo=UTC),
            datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC),
            10000,
        ),
        ("events:*:now-1h:now:5000", (), NOW - HOUR, NOW, 5000),
        ("events:User:now-1d:now:1000", ("User",), NOW - DAY, NOW, 1000),
    ],
)
def test_the_tickets_of_the_plan_are_read(text: str, types: tuple[str, ...], start: datetime, end: datetime, rows: int) -> None:
    assert parse(text) == Ticket(entity_types=types, start=start, end=end, batch_size=rows)


def test_a_ticket_of_naive_utc_times_as_python_prints_them_is_read() -> None:
    end = datetime(2026, 11, 22, 12, 0, 0, 250000)  # noqa: DTZ001  what datetime.utcnow() gives
    start = end - timedelta(days=7)
    read = parse(f"events:Order:{start.isoformat()}:{end.isoformat()}:10000")
    assert (read.start, read.end) == (start.replace(tzinfo=UTC), end.replace(tzinfo=UTC))


TIMES = [
    "now-2d",
    "now-7d",
    "2026-01-01",
    "2026-01-01T00:00",
    "2026-01-01T00:00:00",
    "2026-01-01 00:00:00.5",
    "2026-01-01T00:00:00Z",
    "2026-01-01T00:00:00.123456Z",
    "2026-01-01T00:00:00+02:00",
    "2026-01-01T00:00:00-0330",
]


@pytest.mark.parametrize("start", TIMES)
@pytest.mark.parametrize(
    "end", ["now", "2026-11-22", "2026-11-22T16:00", "2026-11-22T16:00:00Z", "2026-11-22T16:00:00+05:30", "now-10m"]
)
def test_every_pair_of_times_is_cut_at_the_one_colon_between_them(start: str, end: str) -> None:
    expected = Ticket(start=parse_time(start, NOW), end=parse_time(end, NOW), batch_size=7)
    assert parse(f"events:*:{start}:{end}:7") == expected
    middle, cuts = f"{start}:{end}", 0
    for at in (at for at, character in enumerate(middle) if character == ":"):
        try:
            parse_time(middle[:at], NOW), parse_time(middle[at + 1 :], NOW)
        except WindowError:
            continue
        cuts += 1
    assert cuts == 1


def test_parts_may_be_percent_encoded() -> None:
    encoded = "events:%4Frder:2026-01-01T00%3A00%3A00Z:2026-01-02T00%3a00%3A00%2B01%3A00:5"
    assert parse(encoded) == parse("events:Order:2026-01-01T00:00:00Z:2026-01-02T00:00:00+01:00:5")


def test_several_types_are_joined_by_bars_and_counted_once() -> None:
    assert parse("events:Order|User|Order:now-1h:now:5").entity_types == ("Order", "User")


@pytest.mark.parametrize("name", ["a:b", "a|b", "100%", "core.tb_order", "Grüße 注文 😀", " x ", "now", "events", "%3A", ">", "**"])
def test_a_type_of_any_name_can_be_asked_for(name: str) -> None:
    ticket = Ticket(entity_types=(name, "Order"), start=NOW - HOUR, end=NOW, batch_size=5)
    assert ticket.text.startswith("events:")
    assert ticket.text.isascii()
    assert parse(ticket.text) == parse(ticket.json) == ticket


def test_a_colon_in_a_type_must_be_encoded() -> None:
    assert "got 'b:now-1h:now'" in refusal("events:a:b:now-1h:now:5")
    assert parse("events:a%3Ab:now-1h:now:5").entity_types == ("a:b",)


def test_now_is_the_same_instant_wherever_a_ticket_says_it() -> None:
    ticket = parse("events:*:now-1h:now:5")
    assert ticket.end - ticket.start == HOUR
    assert Ticket.parse(b"events:*:now-1h:now:5", NOW.replace(tzinfo=None)) == ticket


@pytest.mark.parametrize(
    ("ticket", "sentence"),
    [
        ("", "must look like events:<entity type>:<start>:<end>:<rows per batch>"),
        ("events", "must look like"),
        ("events:Order", "must look like"),
        ("Events:Order:now-1h:now:5", "must look like"),
        ("orders:Order:now-1h:now:5", "got 'orders:Order:now-1h:now:5'"),
        ("events:Order:now-1h:now", "rows per batch, a number from 1 to 1000000, got 'now'"),
        ("events:Order:now-1h:now:", "rows per batch, a number from 1 to 1000000, got ''"),
        ("events:Order:now-1h:now:-5", "got '-5'"),
        ("events:Order:now-1h:now:5k", "got '5k'"),
        ("events:Order:now-1h:now:٥", "rows per batch"),
        ("events:Order:now-1h:now:5\n", "rows per batch"),
        ("events:Order:now-1h:now:0", 'batch_size" must be from 1 to 1000000, got 0'),
        ("events:Order:now-1h:now:1000001", 'batch_size" must be from 1 to 1000000, got 1000001'),
        ("events:Order:now-1h:5", "a start and an end"),
        ("events:Order:yesterday:now:5", "got 'yesterday:now'"),
        ("events:Order:now:now+1h:5", "got 'now:now+1h'"),
        ("events:Order:now-1h:now-1h:now:5", "a start and an end"),
        ("events:Order:2026-02-30:now:5", "a start and an end"),
        ("events:Order:0000-01-01:now:5", "a start and an end"),
        ("events:Order:now-999999999w:now:5", "a start and an end"),
        ("events:Order:now:now:5", "must start before it ends, got 2026-11-22T16:30:15.123456Z to 2026-11-22T16:30:15.123456Z"),
        ("events:Order:now:now-1h:5", "must start before it ends"),
        ("events::now-1h:now:5", "1 to 255 characters, none of them a control character, got ''"),
        ("events:Order|:now-1h:now:5", "1 to 255 characters"),
        ("events:Or%0Ader:now-1h:now:5", r"got 'Or\nder'"),
        ("events:" + "x" * 256 + ":now-1h:now:5", "1 to 255 characters"),
        ("events:*|Order:now-1h:now:5", "entity types or all of them"),
        ("events:100%:now-1h:now:5", "percent sign"),
        ("events:%zz:now-1h:now:5", "percent sign"),
        ("events:%ff:now-1h:now:5", "percent sign"),
        (b"events:\xff:now-1h:now:5", "must be UTF-8 text, byte 7 is not"),
        (
            b"\n\x43type.googleapis.com/arrow.flight.protocol.sql.CommandStatementQuery\x12\xcb\x01\n\xc8\x01" + b"x" * 200,
            "speaks no Flight SQL",
        ),
        ("\ufeffevents:*:now-1h:now:5", "must look like"),
        ("[1]", "must look like"),
    ],
)
def test_a_wrong_text_gets_one_sentence(ticket: str | bytes, sentence: str) -> None:
    message = refusal(ticket)
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------------------------- JSON


def test_json_says_what_text_says_and_more() -> None:
    said = {"type": "events", "entity_type": "Order", "start": "2026-01-01T00:00:00Z", "end": "now", "batch_size": 10}
    assert parse(said) == parse("events:Order:2026-01-01T00:00:00Z:now:10")
    options = {
        "columns": ["pk", "event_date", "data"],
        "profile": "compact",
        "codec": "zstd",
        "table_version": 0,
        "limit": 5,
        "follow": True,
        "allow_missing": True,
    }
    read = parse(said | options)
    assert read.columns == ("pk", "event_date", "data")
    assert (read.profile, read.codec, read.table_version, read.limit, read.follow, read.allow_missing) == (
        "compact",
        "zstd",
        0,
        5,
        True,
        True,
    )
    assert read.text == read.json
    assert parse(read.json) == read


def test_json_needs_no_batch_size_and_takes_null_for_absent() -> None:
    said = {"type": "events", "entity_type": "*", "start": "now-1h", "end": "now"}
    assert parse(said) == parse(said | {"batch_size": None, "columns": None, "follow": None}) == Ticket(start=NOW - HOUR, end=NOW)
    assert parse("\n " + json.dumps(said)) == parse(said)


@pytest.mark.parametrize(
    ("named", "types"),
    [
        ("*", ()),
        (["*"], ()),
        ("Order", ("Order",)),
        ("Order|User", ("Order", "User")),
        (["Order", "User"], ("Order", "User")),
        (["a|b"], ("a|b",)),
    ],
)
def test_json_names_types_in_several_ways(named: str | list[str], types: tuple[str, ...]) -> None:
    assert parse({"type": "events", "entity_type": named, "start": "now-1h", "end": "now"}).entity_types == types


SOUND: dict[str, Any] = {"type": "events", "entity_type": "*", "start": "now-1h", "end": "now"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"type": "Events"}, '"type" must be "events" or "ObserverEvents", got \'Events\''),
        ({"type": None}, "got None"),
        ({"type": ["events"]}, "got a list"),
        ({"type": "GraphQLQuery", "query": "{ users }"}, "got 'GraphQLQuery'"),
        ({"colums": ["pk"], "batchsize": 5}, "has no 'batchsize, colums'; it may have after_pk, allow_missing, batch_size,"),
        ({"entity_type": None}, 'must have an "entity_type"'),
        ({"entity_type": 5}, 'must have an "entity_type": a name, "*" or a list of names, got 5'),
        ({"entity_type": []}, '"entity_type" must be a list of one or more names'),
        ({"entity_type": ["Order", 5]}, '"entity_type" must be a list of one or more names'),
        ({"entity_type": ["Order", "*"]}, "entity types or all of them"),
        ({"entity_type": "\ud800"}, r"got '\ud800'"),
        ({"entity_type": "a\u2028b"}, r"got 'a\u2028b'"),
        ({"entity_type": "\x00"}, r"got '\x00'"),
        ({"start": None}, '"start" must be an ISO 8601 date or time'),
        ({"start": 1767225600}, "got 1767225600"),
        (
            {"end": "tomorrow"},
            "\"end\" must be an ISO 8601 date or time such as 2026-01-31T23:59:59Z, or now, now-15m, now-1h, now-7d; got 'tomorrow'",
        ),
        ({"end": "now-1h"}, "must start before it ends"),
        ({"batch_size": 0}, '"batch_size" must be from 1 to 1000000, got 0'),
        ({"batch_size": "5000"}, "\"batch_size\" must be a whole number, got '5000'"),
        ({"batch_size": True}, '"batch_size" must be a whole number, got True'),
        ({"batch_size": 5.0}, '"batch_size" must be a whole number, got 5.0'),
        ({"limit": 0}, '"limit" must be from 1 to'),
        ({"table_version": -1}, '"table_version" must be from 0 to'),
        ({"table_version": 10**30}, '"table_version" must be from 0 to'),
        ({"columns": []}, '"columns" must be a list of one or more names'),
        ({"columns": "pk"}, '"columns" must be a list of one or more names'),
        ({"columns": {"pk": 1}}, "got an object"),
        ({"columns": ["pk", "raw", "password"]}, "columns of the events table, got 'raw, password'"),
        ({"columns": ["pk", "pk"]}, "each column once"),
        ({"profile": "shredded"}, "\"profile\" must be one of plain, compact, got 'shredded'"),
        ({"codec": "gzip"}, "\"codec\" must be one of none, lz4, zstd, got 'gzip'"),
        ({"codec": 1}, '"codec" must be a string, got 1'),
        ({"follow": "yes"}, "\"follow\" must be true or false, got 'yes'"),
        ({"allow_missing": 1}, '"allow_missing" must be true or false, got 1'),
    ],
)
def test_a_wrong_json_ticket_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    message = refusal(SOUND | change)
    assert sentence in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}x",
        '{"type": "events", "entity_type": "Order", "entity_type": "*", "start": "now-1h", "end": "now"}',
        '{"type": "events", "limit": NaN}',
        '{"type": "events", "limit": 1' + "0" * 5000 + "}",
        '{"a":' * 40_000,
        '{"a":' + "[" * 900 + "]" * 900 + "}",
        "{'type': 'events'}",
    ],
)
def test_what_is_no_json_object_is_refused_without_a_traceback(text: str) -> None:
    assert len(refusal(text)) < 250


# --------------------------------------------------------------------------------------------------------------- upstream


def test_upstreams_own_ticket_is_read() -> None:
    read = parse({"type": "ObserverEvents", "entity_type": "Order", "start_date": "2026-01-01", "limit": 10000})
    assert read == Ticket(entity_types=("Order",), start=datetime(2026, 1, 1, tzinfo=UTC), end=NOW, limit=10000)


def test_upstreams_ticket_without_dates_means_everything_until_now() -> None:
    read = parse({"type": "ObserverEvents", "entity_type": "*", "start_date": None, "end_date": None, "limit": None})
    assert read == Ticket(start=datetime.min.replace(tzinfo=UTC), end=NOW)
    assert parse(read.text) == read


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ("2026-01-31", datetime(2026, 2, 1, tzinfo=UTC)),
        ("2026-01-31T23:59:59Z", datetime(2026, 1, 31, 23, 59, 59, 1, tzinfo=UTC)),
        ("2026-01-31T23:59:59.999999+00:00", datetime(2026, 2, 1, tzinfo=UTC)),
    ],
)
def test_upstreams_end_is_inclusive(said: str, end: datetime) -> None:
    assert parse({"type": "ObserverEvents", "entity_type": "*", "start_date": "2026-01-01", "end_date": said}).end == end


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"start_date": "01/02/2026"}, '"start_date" must be an ISO 8601 date or time'),
        ({"end_date": "9999-12-31"}, "before the end of the year 9999"),
        ({"start_date": "2026-02-01", "end_date": "2026-01-01"}, "must start before it ends"),
        ({"limit": 0}, '"limit" must be from 1'),
        ({"limit": 1.5}, '"limit" must be a whole number'),
        ({"start": "now-1h"}, "has no 'start'; it may have end_date, entity_type, limit, start_date"),
        ({"entity_type": None}, 'must have an "entity_type"'),
    ],
)
def test_a_wrong_ticket_of_upstream_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal({"type": "ObserverEvents", "entity_type": "Order"} | change)


# ----------------------------------------------------------------------------------------------------------------- limits


def test_a_text_ticket_has_four_kilobytes_and_a_json_ticket_has_more() -> None:
    names = tuple(f"{i:03}" + "x" * 40 for i in range(100))
    ticket = Ticket(entity_types=names, start=NOW - HOUR, end=NOW, batch_size=5)
    assert len(ticket.text) > MAX_TEXT_BYTES
    assert ticket.text == ticket.json
    assert parse(ticket.text) == ticket
    assert "must not exceed 4 KiB" in refusal("events:" + "|".join(names) + ":now-1h:now:5")
    assert parse("events:" + "|".join(names[:90]) + ":now-1h:now:5").entity_types == names[:90]


def test_a_longest_name_fits_a_text_ticket() -> None:
    ticket = Ticket(entity_types=("😀" * 255,), start=NOW - HOUR, end=NOW, batch_size=MAX_BATCH_ROWS)
    assert ticket.text.startswith("events:")
    assert parse(ticket.text) == ticket


def test_no_ticket_exceeds_256_kilobytes() -> None:
    padded = json.dumps(SOUND).encode()
    assert Ticket.parse(padded + b" " * (MAX_BYTES - len(padded)), NOW) == parse(SOUND)
    assert refusal(padded + b" " * (MAX_BYTES - len(padded) + 1)) == f"A ticket must not exceed 256 KiB, got {MAX_BYTES + 1} bytes."


@pytest.mark.parametrize("length", [256, 4000, 200_000])
@pytest.mark.parametrize("character", ["a", "\x00", "é", "😀", "'", ":"])
def test_no_message_repeats_more_than_64_characters(length: int, character: str) -> None:
    long = (character * length)[: 200_000 // len(json.dumps(character))]
    messages = [refusal(long.encode()[:MAX_BYTES].decode(errors="ignore")), refusal("events:" + long[:1000] + ":now-1h:now:5k")]
    for key in ("type", "entity_type", "start", "end", "profile", "codec"):
        messages += [refusal(SOUND | {key: long})]
    messages += [refusal(SOUND | {long: 1}), refusal(SOUND | {"columns": [long]}), refusal(SOUND | {"batch_size": long})]
    for message in messages:
        assert len(message) < 330
        assert message.isprintable()
        assert message.count(character) < 64 + 30


# ------------------------------------------------------------------------------------------------------------- properties

INSTANTS = st.datetimes(timezones=st.just(UTC))
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=255).filter(
    lambda name: bool(name.strip()) and name != "*"
)
TICKETS = st.builds(
    lambda times, **rest: Ticket(start=min(times), end=max(times), **rest),
    times=st.lists(INSTANTS, min_size=2, max_size=2, unique=True),
    entity_types=st.lists(NAMES, max_size=4).map(tuple),
    batch_size=st.none() | st.integers(1, MAX_BATCH_ROWS),
    columns=st.just(()) | st.lists(st.sampled_from(LAKE_SCHEMA.names), unique=True).map(tuple),
    profile=st.none() | st.sampled_from(PROFILES),
    codec=st.none() | st.sampled_from(CODECS),
    table_version=st.none() | st.integers(0, 2**63 - 1),
    limit=st.none() | st.integers(1, 2**63 - 1),
    follow=st.booleans(),
    allow_missing=st.booleans(),
)


@settings(max_examples=200)
@given(TICKETS, INSTANTS)
def test_both_forms_of_a_ticket_read_back_as_the_ticket(ticket: Ticket, now: datetime) -> None:
    assert Ticket.parse(ticket.text.encode(), now) == ticket
    assert Ticket.parse(ticket.json.encode(), now) == ticket


@settings(max_examples=200)
@given(st.lists(NAMES, max_size=3), st.lists(INSTANTS, min_size=2, max_size=2, unique=True), st.integers(1, MAX_BATCH_ROWS))
def test_what_text_can_say_is_said_in_text(names: list[str], times: list[datetime], rows: int) -> None:
    ticket = Ticket(entity_types=tuple(names), start=min(times), end=max(times), batch_size=rows)
    assert ticket.text.startswith("events:") or len(ticket.json) > 1000
    assert Ticket.parse(ticket.text.encode(), NOW) == ticket


PIECES = st.sampled_from(
    [
        "events",
        ":",
        ":",
        ":",
        ":",
        "*",
        "|",
        "Order",
        "now",
        "-1h",
        "2026-01-01",
        "T00:00:00Z",
        "5000",
        "%3A",
        "%",
        "{",
        "}",
        '"',
        "\x00",
        "é",
        "-",
    ]
)


@settings(max_examples=500)
@given(
    st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | st.lists(PIECES, max_size=20).map(lambda pieces: "".join(pieces).encode())
)
def test_arbitrary_bytes_give_a_ticket_or_a_ticket_error(data: bytes) -> None:
    ticket = parsed_or_refused(data)
    assert ticket is None or Ticket.parse(ticket.text.encode(), NOW) == ticket


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["events", "now", "now-1h", "2026-01-01", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "entity_type",
    "start",
    "end",
    "start_date",
    "end_date",
    "limit",
    "batch_size",
    "columns",
    "codec",
    "table_version",
    "follow",
    "x",
]


@settings(max_examples=500)
@given(st.sampled_from(["events", "ObserverEvents", "other"]), st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_arbitrary_json_gives_a_ticket_or_a_ticket_error(kind: str, said: dict[str, Any]) -> None:
    parsed_or_refused(json.dumps({"type": kind} | said).encode())


def test_a_ticket_built_in_code_keeps_the_same_rules() -> None:
    with pytest.raises(TicketError, match="must start before"):
        Ticket(start=NOW, end=NOW)
    with pytest.raises(TicketError, match="batch_size"):
        Ticket(start=NOW - HOUR, end=NOW, batch_size=0)
    with pytest.raises(TicketError, match="entity type"):
        Ticket(start=NOW - HOUR, end=NOW, entity_types=("*",))
    naive = Ticket(start=(NOW - HOUR).replace(tzinfo=None), end=NOW)
    assert naive.start == NOW - HOUR
    assert hash(naive) == hash(Ticket(start=NOW - HOUR, end=NOW))


def test_the_columns_of_a_plain_ticket_can_be_named_too() -> None:
    assert parse(SOUND | {"columns": EVENT_SCHEMA.names}).columns == tuple(EVENT_SCHEMA.names)
