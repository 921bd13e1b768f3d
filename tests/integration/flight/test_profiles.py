"""How events travel: profiles and codecs, and who chooses them."""

from __future__ import annotations

import json
from collections.abc import Callable

import grpc
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fraiseql_pipeline.encoding import CODECS, ENCODINGS, MAX_FRAME_BYTES, PROFILES, Encoding, checksum, wire_schema
from fraiseql_pipeline.errors import FlightUnavailable, TicketError
from fraiseql_pipeline.event import WIRE_SCHEMA
from fraiseql_pipeline.flight import protocol, stream
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.flight.session import to_cookie
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.ticket import CODECS as TICKET_CODECS
from fraiseql_pipeline.ticket import PROFILES as TICKET_PROFILES
from fraiseql_pipeline.window import Window
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events

ALL = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T04:00:00"}


def asked(**more: object) -> flight.Ticket:
    return flight.Ticket(json.dumps(ALL | more))


def decoded(table: pa.Table) -> pa.Table:
    """A compact table in plain types, by nothing of ours but the meaning of its bytes."""
    columns = []
    for field in table.schema:
        values = table[field.name]
        if field.type == pa.binary(16):
            hexes = [value.hex() for value in values.to_pylist()]
            columns.append(pa.array([f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}" for h in hexes]))
        else:
            columns.append(values.cast(pa.string()) if pa.types.is_dictionary(field.type) else values)
    return pa.table(columns, schema=WIRE_SCHEMA)


def test_tickets_and_frames_know_the_same_encodings() -> None:
    assert PROFILES == TICKET_PROFILES
    assert tuple(CODECS) == TICKET_CODECS


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_has_the_same_events(client: flight.FlightClient, events: dict[Window, pa.Table], name: str) -> None:
    encoding = Encoding.parse(name)
    expected = pa.concat_tables(events[window] for window in sorted(events)).select(WIRE_SCHEMA.names).cast(WIRE_SCHEMA)
    for _ in range(2):  # made, then kept
        found = client.do_get(asked(profile=encoding.profile, codec=encoding.codec)).read_all()
        assert (decoded(found) if encoding.profile == "compact" else found).equals(expected)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("columns", [None, ["pk"], ["org_id", "updated_fields"]])
@pytest.mark.parametrize("hours", [(0, 4), (2, 3)], ids=["events", "no events"])
def test_the_receipt_is_the_metadata_of_a_whole_batch_without_rows(
    client: flight.FlightClient, name: str, columns: list[str] | None, hours: tuple[int, int]
) -> None:
    encoding = Encoding.parse(name)
    start, end = (hour(number).start.isoformat() for number in hours)
    ticket = asked(profile=encoding.profile, codec=encoding.codec, columns=columns, start=start, end=end)
    *before, last = client.do_get(ticket)
    assert all(chunk.app_metadata is None and chunk.data.num_rows for chunk in before)
    last.data.validate(full=True)
    assert last.data.num_rows == 0
    table = client.do_get(ticket).read_all()
    assert json.loads(last.app_metadata.to_pybytes())["rows"] == table.num_rows == (6_000 if hours == (0, 4) else 0)
    assert last.data.schema.equals(table.schema, check_metadata=True)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("columns", [None, ["pk", "org_id", "acting_for", "event_id"]])
def test_info_and_stream_have_one_schema_and_name_their_encoding(
    client: flight.FlightClient, name: str, columns: list[str] | None
) -> None:
    encoding = Encoding.parse(name)
    ticket = asked(profile=encoding.profile, codec=encoding.codec, columns=columns)
    info = client.get_flight_info(flight.FlightDescriptor.for_command(ticket.ticket))
    reader = client.do_get(ticket)
    assert info.schema.equals(reader.schema, check_metadata=True)
    assert reader.schema.metadata == {b"fraiseql.encoding": name.encode()}
    assert reader.schema.equals(wire_schema(columns or (), encoding.profile), check_metadata=False)
    facts = json.loads(info.app_metadata)
    assert f"{facts['profile']}+{facts['codec']}" == name
    *_, last = client.do_get(info.endpoints[0].ticket)
    facts = json.loads(last.app_metadata.to_pybytes())
    assert f"{facts['profile']}+{facts['codec']}" == name


def test_each_part_of_an_encoding_is_the_tickets_else_the_headers_else_the_sessions_else_the_servers(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    with flight.connect(start_server(lake, arrow_flight_encoding="compact+lz4").url) as client:

        def chosen(header: str | None = None, session: dict[str, str] | None = None, **said: object) -> bytes:
            headers = [(b"x-fraiseql-encoding", header.encode())] if header else []
            headers += [(b"cookie", to_cookie(session).encode())] if session else []
            return client.do_get(asked(**said), flight.FlightCallOptions(headers=headers)).schema.metadata[b"fraiseql.encoding"]

        assert chosen() == b"compact+lz4"
        assert chosen("plain+none") == b"plain+none"
        assert (chosen("compact"), chosen("none"), chosen("plain")) == (b"compact+lz4", b"compact+none", b"plain+lz4"), (
            "the rest is left"
        )
        assert chosen("plain+none", codec="zstd") == b"plain+zstd"
        assert chosen("plain+none", profile="compact", codec="lz4") == b"compact+lz4"
        assert chosen(session={"profile": "plain", "codec": "none"}) == b"plain+none"
        assert chosen("compact+zstd", session={"profile": "plain", "codec": "none"}) == b"compact+zstd"
        assert chosen("zstd", session={"profile": "plain", "codec": "none"}) == b"plain+zstd"


@pytest.mark.parametrize("header", ["shredded+zstd", "plain+brotli", "", "+", "plain+zstd+", "x" * 500])
def test_an_unknown_encoding_is_refused_with_the_ones_there_are(client: flight.FlightClient, header: str) -> None:
    options = flight.FlightCallOptions(headers=[(b"x-fraiseql-encoding", header.encode())])
    with pytest.raises(
        pa.ArrowInvalid, match=r"must be one of plain.none, plain.lz4, plain.zstd, compact.none, compact.lz4, compact.zstd"
    ):
        client.do_get(asked(), options).read_all()
    with pytest.raises(TicketError, match="must be one of"):
        connect("grpc://127.0.0.1:1", profile=header or "+")


def test_dictionaries_hold_the_values_of_what_is_sent_and_no_others(client: flight.FlightClient) -> None:
    found = client.do_get(asked(profile="compact", entity_type="Order")).read_all()
    for name in ("entity_type", "user_id", "org_id"):
        for chunk in found[name].chunks:
            assert len(chunk.dictionary) == len(pc.unique(chunk.dictionary))
    assert {value for chunk in found["entity_type"].chunks for value in chunk.dictionary.to_pylist()} == {"Order"}


#: Of columns of few values: more types than 16 bits count, and users whose names do not fit one message.
MANY = 40_000


@pytest.fixture(scope="module")
def many_values(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("many") / "lake"))
    table = lake_events(hour(0), MANY)
    for name, values in (("entity_type", [f"Type{n}" for n in range(MANY)]), ("user_id", [f"{n:0>300}" for n in range(MANY)])):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values))
    publish(lake, hour(0), table)
    return lake


def test_columns_of_many_values_are_sent_in_compact_as_in_plain(
    many_values: Lake, start_server: Callable[..., FlightServer]
) -> None:
    with flight.connect(start_server(many_values).url) as client:
        middle = client.do_get(asked(columns=["pk"])).read_all()["pk"][MANY // 2].as_py()
        for more in ({}, {"batch_size": 700, "limit": 30_000}, {"after_pk": middle}, {"columns": ["entity_type", "user_id"]}):
            plain, compact = (client.do_get(asked(profile=profile, **more)).read_all() for profile in ("plain", "compact"))
            assert plain.num_rows
            assert [values.to_pylist() for values in compact.select(["entity_type", "user_id"]).columns] == [
                values.to_pylist() for values in plain.select(["entity_type", "user_id"]).columns
            ]
    with connect(start_server(many_values).url, profile="compact") as ours:
        assert ours.read(start=hour(0).start, end=hour(0).end).num_rows == MANY, "its receipt is right"


@pytest.mark.parametrize("codec", CODECS)
def test_every_message_fits_a_client_that_sets_no_limit(
    many_values: Lake, start_server: Callable[..., FlightServer], codec: str
) -> None:
    with grpc.insecure_channel(start_server(many_values).url.removeprefix("grpc://")) as channel:
        request = protocol.Ticket(ticket=asked(profile="compact", codec=codec).ticket).SerializeToString()
        messages = list(channel.unary_stream(f"/{protocol.SERVICE}/DoGet")(request))
    assert max(map(len, messages)) <= MAX_FRAME_BYTES
    assert json.loads(protocol.FlightData.FromString(messages[-1]).app_metadata)["rows"] == MANY


def test_a_connection_in_compact_gives_the_plain_columns(server: FlightServer, client: flight.FlightClient) -> None:
    expected = client.do_get(asked()).read_all()
    with connect(server.url, profile="compact") as compact:
        assert compact.read(asked().ticket).equals(expected)
        assert compact.read(start=hour(0).start, end=hour(3).end).equals(expected)
        assert compact.read(start=hour(0).start, end=hour(3).end, profile="compact").schema.field("event_id").type == pa.binary(16)
        streamed = compact.stream(start=hour(0).start, end=hour(3).end)
        assert pa.RecordBatchReader.from_stream(streamed).read_all().equals(expected)


def test_the_next_ticket_leaves_to_the_connection_what_the_ticket_left_to_it(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    url = start_server(lake).url
    with connect(url, profile="compact+lz4") as compact, connect(url) as plain:
        first = compact.read(start=hour(0).start, end=hour(3).end)
        publish(lake, hour(1), lake_events(hour(1), 10))
        ticket = first.schema.metadata[b"fraiseql.next_ticket"]
        with compact.stream(ticket) as stream:
            assert stream.schema.metadata[b"fraiseql.encoding"] == b"compact+lz4", "it still travels as the connection wants it"
            following = stream.read_all()
        assert following.equals(plain.read(ticket)), "and comes as the first read did"
        assert following.num_rows == 10
        named = compact.read(start=hour(0).start, end=hour(1).end, profile="compact")
        assert compact.read(named.schema.metadata[b"fraiseql.next_ticket"]).schema.field("event_id").type == pa.binary(16)
        session = flight.FlightCallOptions(headers=[(b"cookie", to_cookie({"profile": "compact", "codec": "none"}).encode())])
        with flight.connect(url) as stock:
            *_, last = stock.do_get(asked(end="now"), session)
        assert json.loads(last.app_metadata.to_pybytes())["next_ticket"].count("compact") == 0


def test_a_type_that_is_called_profile_comes_in_the_plain_columns(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    events = lake_events(hour(0), 10)
    at = events.schema.get_field_index("entity_type")
    publish(lake, hour(0), events.set_column(at, events.schema.field(at), pa.array(["profile"] * 10)))
    with connect(start_server(lake).url, profile="compact") as compact:
        found = compact.read(start=hour(0).start, end=hour(0).end, entity_types=["profile"])
        assert found.select(WIRE_SCHEMA.names).schema.equals(WIRE_SCHEMA)
        assert found.num_rows == 10
        with compact.exchange() as exchange:
            assert exchange.read(start=hour(0).start, end=hour(0).end, entity_types=["profile"]).equals(found)


def test_an_id_that_is_no_uuid_is_sent_in_plain_and_refused_in_compact(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    table = lake_events(hour(0), 5)
    odd = table.set_column(3, table.schema.field(3), pa.array(["Ö"] * 5))
    publish(lake, hour(0), odd)
    with flight.connect(start_server(lake).url) as client:
        assert client.do_get(asked()).read_all()["entity_id"].to_pylist() == ["Ö"] * 5
        with pytest.raises(Exception, match=r"The column entity_id has a value that is no UUID.*read with the profile plain"):
            client.do_get(asked(profile="compact")).read_all()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_checksum_depends_on_the_events_and_not_on_how_they_are_cut(client: flight.FlightClient, profile: str) -> None:
    sums = set()
    for batch_size in (13, 999, 1_000, 5_000, 100_000):
        *batches, last = client.do_get(asked(profile=profile, batch_size=batch_size))
        ours = sum(checksum(chunk.data) or 0 for chunk in batches if chunk.data is not None) % 2**64
        assert json.loads(last.app_metadata.to_pybytes())["checksum"] == ours
        sums.add(ours)
    assert len(sums) == 1


def test_a_stream_with_another_event_than_its_receipt_is_an_error(
    lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 50))
    monkeypatch.setattr(stream, "checksum", lambda _: 1)
    with (
        connect(start_server(lake).url) as client,
        pytest.raises(FlightUnavailable, match="has other event ids than its receipt says"),
    ):
        client.read(start=hour(0).start, end=hour(0).end)
