"""Frames that are kept: the same events as from the lake, made once, never stale, never another tenant's."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import flight

from fraiseql_pipeline.encoding import ENCODINGS, Encoding, to_plain
from fraiseql_pipeline.event import LAKE_SCHEMA, WIRE_SCHEMA
from fraiseql_pipeline.flight import segment, stream
from fraiseql_pipeline.flight.frames import FrameStore
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.flight.stream import FrameStreams, Sent
from fraiseql_pipeline.flight.view import View
from fraiseql_pipeline.lake import Lake, parquet
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import TENANTS, lake_events

ALL = flight.Ticket("events:*:2026-11-01:2026-11-01T04:00:00:10000")
ROW_GROUP_ROWS = 700


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The groups that were read from the lake since the test began."""
    found: list[object] = []
    read = stream.segments

    def counted(snapshot: object, group: object, *rest: object) -> Iterator[object]:
        found.append(group)
        return read(snapshot, group, *rest)

    monkeypatch.setattr(stream, "segments", counted)
    return found


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FlightServer, pa.Table]]:
    """A server over windows of many small row groups, and what it serves."""
    lake = Lake(str(tmp_path_factory.mktemp("grouped") / "lake"))
    tables = [lake_events(hour(number), rows) for number, rows in enumerate((3_000, 2_000, 0, 1_500))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_ROWS", ROW_GROUP_ROWS)
        for number, table in enumerate(tables):
            publish(lake, hour(number), table)
    with serving(lake) as server:
        yield server, pa.concat_tables(tables)


@pytest.fixture(scope="module")
def kept_streams() -> Iterator[FrameStreams]:
    """One store for all examples, so that most of them find frames that others have made."""
    with FrameStore(10**9) as store:
        yield FrameStreams(store)


def serving(lake: Lake) -> FlightServer:
    from fraiseql_pipeline.flight.server import serve
    from fraiseql_pipeline.settings import Settings

    return serve(Settings(arrow_flight_bind="127.0.0.1:0", start=MIDNIGHT), lake=lake)


def test_row_groups_that_share_an_instant_are_read_alone(grouped: tuple[FlightServer, pa.Table]) -> None:
    snapshot = grouped[0].lake.snapshot()
    groups = segment.Groups().of(snapshot, snapshot.files[:1])
    assert [group.index for group in groups] == [0, 1, 2, 3, 4]
    assert any(before.high == after.low for before, after in pairwise(groups))


@settings(max_examples=40)
@given(
    start=st.integers(0, 4 * 3600),
    length=st.integers(1, 4 * 3600),
    batch_size=st.sampled_from([None, 7, 300, 1_000, 4_000]),
    limit=st.sampled_from([None, None, 1, 999, 2_500]),
    types=st.sampled_from(["*", "Order", ["User", "Payment"], "Unicorn"]),
    columns=st.sampled_from([None, ["event_id", "pk"], ["timestamp", "event_date", "updated_fields", "org_id"]]),
    profile=st.sampled_from(["plain", "compact"]),
)
def test_any_part_is_what_the_lake_has(
    grouped: tuple[FlightServer, pa.Table],
    kept_streams: FrameStreams,
    start: int,
    length: int,
    batch_size: int | None,
    limit: int | None,
    types: str | list[str],
    columns: list[str] | None,
    profile: str,
) -> None:
    server, table = grouped
    low, high = MIDNIGHT + timedelta(seconds=start), MIDNIGHT + timedelta(seconds=start + length)
    kept = (pc.field("timestamp") >= low) & (pc.field("timestamp") < high)
    if types != "*":
        kept &= pc.field("entity_type").isin([types] if isinstance(types, str) else types)
    names = columns or WIRE_SCHEMA.names
    expected = table.filter(kept).select(names).slice(0, limit)
    schema = pa.schema([WIRE_SCHEMA.field(n) if n in WIRE_SCHEMA.names else LAKE_SCHEMA.field(n) for n in names])
    chosen = () if types == "*" else (types,) if isinstance(types, str) else tuple(types)
    ticket = Ticket(
        start=low, end=high, entity_types=chosen, batch_size=batch_size, limit=limit, columns=tuple(columns or ()), profile=profile
    )
    batches = read(kept_streams, server.lake, ticket)
    assert all(1 <= batch.num_rows <= (batch_size or 10_000) for batch in batches)
    found = pa.Table.from_batches([to_plain(batch) for batch in batches], schema=None if batches else schema)
    assert found.cast(schema).equals(expected.cast(schema))


def test_the_second_reader_of_anything_does_not_touch_the_lake(grouped: tuple[FlightServer, pa.Table], made: list[object]) -> None:
    with flight.connect(grouped[0].url) as client:
        for said in (
            {},
            {"entity_type": "Order"},
            {"entity_type": ["User", "Order"], "profile": "compact"},
            {"columns": ["data", "pk"]},
        ):
            # Another length, so that other tests have not asked for it.
            ticket = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-02", "codec": "lz4"} | said
            first = client.do_get(flight.Ticket(json.dumps(ticket))).read_all()
            assert made
            made.clear()
            assert client.do_get(flight.Ticket(json.dumps(ticket))).read_all().equals(first)
            # Smaller batches and a part are cut out of the same frames.
            assert (
                client.do_get(flight.Ticket(json.dumps(ticket | {"batch_size": 9_999_9, "limit": 50})))
                .read_all()
                .equals(first.slice(0, 50))
            )
            assert not made


def test_readers_that_come_together_read_the_lake_once(
    lake: Lake, start_server: Callable[..., FlightServer], made: list[object]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5_000))
    server = start_server(lake)
    together = threading.Barrier(8)

    def read(_: int) -> int:
        with flight.connect(server.url) as client:
            together.wait(30)
            return client.do_get(ALL).read_all().num_rows

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(8))) == {5_000}
    assert len(made) == 1


def test_a_window_materialized_again_is_never_served_from_its_old_frames(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 500))
    with flight.connect(start_server(lake).url) as client:
        first = client.do_get(ALL).read_all()
        for seed in (1, 2):
            again = lake_events(hour(0), 500, seed=seed)
            publish(lake, hour(0), again)
            found = client.do_get(ALL).read_all()
            assert found["event_id"].to_pylist() == again["event_id"].to_pylist() != first["event_id"].to_pylist()


def test_a_store_without_room_serves_all_the_same(lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    tables = [lake_events(hour(number), 400) for number in range(4)]
    for number, table in enumerate(tables):
        publish(lake, hour(number), table)
    cache = tmp_path / "cache"
    server = start_server(lake, arrow_flight_cache_bytes=0, arrow_flight_cache_dir=str(cache))
    expected = pa.concat_tables(tables)["event_id"].to_pylist()
    with flight.connect(server.url) as client:
        for _ in range(3):
            assert client.do_get(ALL).read_all()["event_id"].to_pylist() == expected
    server.stop(0)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("how", ["files that overlap", "files without a declared order"])
@pytest.mark.parametrize("profile", ["plain", "compact"])
def test_files_that_are_not_in_order_are_sorted(
    grouped: tuple[FlightServer, pa.Table], monkeypatch: pytest.MonkeyPatch, how: str, profile: str
) -> None:
    from fraiseql_pipeline.flight import view

    monkeypatch.setattr(segment, "_in_order", lambda *_: None)
    if how == "files that overlap":
        monkeypatch.setattr(view, "units", lambda _: [0])
    server, table = grouped
    low, high = hour(0).start + timedelta(minutes=13), hour(3).start + timedelta(minutes=2)
    with FrameStore(10**9) as store:
        for start, end, columns in ((low, high, ()), (MIDNIGHT, hour(3).end, ()), (low, high, ("pk", "event_date"))):
            for types in ((), ("Order",)):
                ticket = Ticket(start=start, end=end, profile=profile, entity_types=types, columns=columns)
                expected = table.filter((pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
                expected = expected.filter(pc.field("entity_type").isin(types)) if types else expected
                found = pa.Table.from_batches([to_plain(batch) for batch in read(FrameStreams(store), server.lake, ticket)])
                names = list(columns) or WIRE_SCHEMA.names
                assert found.cast(expected.select(names).schema).equals(expected.select(names))


def messages(streams: FrameStreams, lake: Lake, ticket: Ticket, org_id: str | None = None) -> list[bytes]:
    decided = plan(ticket, View(lake.snapshot()), first=MIDNIGHT, size=WindowSize.HOUR, org_id=org_id)
    return list(streams.messages(decided, ticket.batch_size or 10_000, Sent(lambda _: None)))


def read(streams: FrameStreams, lake: Lake, ticket: Ticket) -> list[pa.RecordBatch]:
    """The batches of a stream, put together from its bytes as any Arrow reader would."""
    from fraiseql_pipeline.flight import protocol

    parts = []
    for message in messages(streams, lake, ticket):
        found = protocol.FlightData.FromString(message)
        header = found.data_header + b"\0" * (-len(found.data_header) % 8)
        parts.append(b"\xff\xff\xff\xff" + len(header).to_bytes(4, "little") + header + found.data_body)
    return list(pa.ipc.open_stream(b"".join(parts)))


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name.endswith("+none")])
@pytest.mark.parametrize("general", [False, True], ids=["row groups", "files to sort"])
def test_no_byte_of_another_tenant_is_in_any_message(
    grouped: tuple[FlightServer, pa.Table], monkeypatch: pytest.MonkeyPatch, name: str, general: bool
) -> None:
    if general:
        monkeypatch.setattr(segment, "_in_order", lambda *_: None)
    server, table = grouped
    encoding = Encoding.parse(name)
    with FrameStore(10**9) as store:
        streams = FrameStreams(store)
        for start, end in ((MIDNIGHT, hour(3).end), (MIDNIGHT + timedelta(minutes=7), hour(1).start + timedelta(minutes=50))):
            ticket = Ticket(start=start, end=end, profile=encoding.profile, codec=encoding.codec)
            for own in TENANTS:
                sent = b"".join(messages(streams, server.lake, ticket, own))
                theirs = table.filter((pc.field("org_id") != own) | pc.field("org_id").is_null())
                # A part of the ids: looking for each takes a pass over all bytes.
                forbidden = {*theirs["event_id"].to_pylist()[::53], *(set(TENANTS) - {own})}
                assert not any(value.encode() in sent or bytes.fromhex(value.replace("-", "")) in sent for value in forbidden)
                mine = table.filter((pc.field("org_id") == own) & (pc.field("timestamp") >= start) & (pc.field("timestamp") < end))
                some = mine["event_id"][0].as_py()
                assert some.encode() in sent or bytes.fromhex(some.replace("-", "")) in sent


def test_a_tenant_gets_its_events_and_nothing_is_said_of_others(grouped: tuple[FlightServer, pa.Table]) -> None:
    server, table = grouped
    ticket = Ticket(start=MIDNIGHT, end=hour(3).end)
    decided = plan(ticket, View(server.lake.snapshot()), first=MIDNIGHT, size=WindowSize.HOUR, org_id=TENANTS[2])
    assert decided.rows is None
    with FrameStore(10**9) as store:
        sent = Sent(lambda _: None)
        list(FrameStreams(store).messages(decided, 10_000, sent))
    assert sent.rows == pc.sum(pc.equal(table["org_id"], TENANTS[2])).as_py()


def test_what_is_kept_takes_no_more_memory_however_many_types_its_readers_name(grouped: tuple[FlightServer, pa.Table]) -> None:
    server, _ = grouped
    with FrameStore(10**9) as store:
        for number in range(3):
            names = ("Order", *(f"{number}.{other}" for other in range(10_000)))
            messages(FrameStreams(store), server.lake, Ticket(start=MIDNIGHT, end=hour(3).end, entity_types=names))
        assert len(store._entries) % 3 == 0
        assert max(len(pickle.dumps(key)) for key in store._entries) < 1_000


def hours(windows: int) -> list[Window]:
    return [hour(number) for number in range(windows)]


def test_bytes_are_exact_when_all_frames_are_kept_and_unknown_before(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    for window in hours(3):
        publish(lake, window, lake_events(window, 300))
    descriptor = flight.FlightDescriptor.for_command(ALL.ticket.replace(b"04:00:00", b"03:00:00"))
    with flight.connect(start_server(lake).url) as client:
        info = client.get_flight_info(descriptor)
        assert info.total_bytes == -1
        client.do_get(info.endpoints[0].ticket).read_all()
        size = client.get_flight_info(descriptor).total_bytes
        assert 900 * 40 < size < 900 * 1_000


def test_rows_of_a_filter_are_exact_when_all_frames_are_kept_and_unknown_before(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    for window in hours(3):
        publish(lake, window, lake_events(window, 300))
    descriptor = flight.FlightDescriptor.for_command("events:Order|User:2026-11-01:2026-11-01T03:00:00:10000")
    part = flight.FlightDescriptor.for_command("events:Order|User:2026-11-01:2026-11-01T02:30:00:10000")
    with flight.connect(start_server(lake).url) as client:
        info = client.get_flight_info(descriptor)
        assert (info.total_records, info.total_bytes) == (-1, -1)
        rows = client.do_get(info.endpoints[0].ticket).read_all().num_rows
        info = client.get_flight_info(descriptor)
        assert info.total_records == rows > 0
        assert info.total_bytes > 0
        cut = client.get_flight_info(part)
        assert (cut.total_records, cut.total_bytes) == (-1, -1), "a frame is cut"


def test_the_time_a_filter_cuts_is_the_lakes(grouped: tuple[FlightServer, pa.Table]) -> None:
    server, table = grouped
    at: datetime = table["timestamp"][1_234].as_py()
    with flight.connect(server.url) as client:
        found = client.do_get(
            flight.Ticket(f"events:*:{at.isoformat()}:{(at + timedelta(microseconds=1)).isoformat()}:10000")
        ).read_all()
    assert found.num_rows == pc.sum(pc.equal(table["timestamp"], table["timestamp"][1_234])).as_py()
