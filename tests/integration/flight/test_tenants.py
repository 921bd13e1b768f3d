"""One tenant's token, every message it can get: not a byte of anybody else's is in them, and nothing of the server's inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fraiseql_pipeline.errors import TicketError
from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.flight import plan, protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import Client, connect
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import INSIDE, MIDNIGHT, hour, publish
from tests.support.events import TENANTS, lake_events

OURS = TENANTS[1]
CANARY = "canary-of-another-tenant"
#: Columns of text, any of which could give another tenant away.
TEXTS = [
    field.name
    for field in LAKE_SCHEMA
    if field.type == pa.string() and field.name not in {"org_id", "event_type", "event_id", "entity_id"}
]


def planted(table: pa.Table) -> pa.Table:
    """The events, those of other tenants and of none full of canaries."""
    foreign = pc.fill_null(pc.not_equal(table["org_id"], OURS), True)
    for name in TEXTS:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pc.if_else(foreign, f"{CANARY}-{name}", table[name]))
    fields = table.schema.get_field_index("updated_fields")
    lists = [
        [CANARY] if other else kept for other, kept in zip(foreign.to_pylist(), table["updated_fields"].to_pylist(), strict=True)
    ]
    return table.set_column(fields, table.schema.field(fields), pa.array(lists, table.schema.field(fields).type))


class Shared:
    """A lake of three tenants, a server, and a token of one tenant."""

    def __init__(self, directory: Path) -> None:
        uri = str(directory / "lake")
        lake = Lake(uri)
        self.events = pa.concat_tables([planted(lake_events(hour(number), 3_000)) for number in range(2)])
        for number in range(2):
            publish(lake, hour(number), self.events.slice(number * 3_000, 3_000))
        self.token, ours = new_token("ours", OURS, ["read", "publish", "admin"])
        self.other, other = new_token("other", TENANTS[0], ["read"])
        self.root, root = new_token("root", None, ["read", "admin"])
        (directory / "tokens").write_text(f"{ours}\n{other}\n{root}\n")
        self.server = serve(
            Settings(
                arrow_flight_bind="127.0.0.1:0",
                start=MIDNIGHT,
                lake_uri=uri,
                arrow_flight_tokens_file=str(directory / "tokens"),
                arrow_flight_max_rows=1_000_000,
            ),
            lake=lake,
        )
        mine = pc.fill_null(pc.equal(self.events["org_id"], OURS), False)
        self.mine = self.events.filter(mine)
        self.theirs = self.events.filter(pc.invert(mine))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("tenants"))
    yield made
    made.server.stop(0)


@pytest.fixture
def ours(shared: Shared) -> Iterator[Client]:
    with connect(shared.server.url, token=shared.token) as client:
        yield client


def ticket(**said: object) -> bytes:
    whole = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T02:00:00Z"}
    return json.dumps(whole | said).encode()


def messages(server: FlightServer, token: str, name: str, request: bytes) -> list[bytes]:
    """Everything a call brings: messages, or the status with its headers."""
    unary = name in {"GetFlightInfo", "PollFlightInfo", "GetSchema"}
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.max_receive_message_length", -1)]) as channel:
        method = (channel.unary_unary if unary else channel.unary_stream)(f"/{protocol.SERVICE}/{name}")
        got: list[bytes] = []
        try:
            if unary:
                return [method(request, metadata=[("authorization", f"Bearer {token}")], timeout=30)]
            for message in method(request, metadata=[("authorization", f"Bearer {token}")], timeout=30):
                got.append(message)  # noqa: PERF402 - what came before an error counts
        except grpc.RpcError as error:
            got.append(f"{error.details()} {error.trailing_metadata()} {error.initial_metadata()}".encode())
    return got


def foreign_bytes(shared: Shared) -> list[bytes]:
    """What no message may hold: canaries, tenants, and the ids of events and entities, as text and as 16 bytes."""
    ids = {tenant for tenant in TENANTS if tenant != OURS}
    ids -= {*shared.mine["acting_for"].to_pylist()}  # an agent of ours may have acted for one of them
    ids |= {*shared.theirs["event_id"].to_pylist()} | (
        {*shared.theirs["entity_id"].to_pylist()} - {*shared.mine["entity_id"].to_pylist()}
    )
    return [CANARY.encode(), *(name.encode() for name in ids), *(bytes.fromhex(name.replace("-", "")) for name in ids)]


def found(needles: Sequence[bytes], haystack: Sequence[bytes]) -> set[bytes]:
    """The needles that are in any of the messages, by one pass per length of needle."""
    hits = set()
    joined = b"\x00|\x00".join(haystack)
    for length in {len(needle) for needle in needles}:
        wanted = {needle for needle in needles if len(needle) == length}
        if len(wanted) < 8:
            hits |= {needle for needle in wanted if needle in joined}
        else:
            hits |= wanted & {joined[at : at + length] for at in range(len(joined) - length + 1)}
    return hits


READS = [
    {},
    {"columns": LAKE_SCHEMA.names},
    {"columns": ["data"]},
    {"columns": ["updated_fields", "pk"], "batch_size": 7},
    {"entity_type": [f"{CANARY}-entity_type"]},
    {"entity_type": ["Order", f"{CANARY}-entity_type"], "limit": 11},
    {"start": "2026-11-01T00:17:00Z", "end": "2026-11-01T01:01:01Z", "batch_size": 333},
]


@pytest.mark.parametrize("profile", ["plain", "compact"])
@pytest.mark.parametrize("said", READS, ids=lambda said: ",".join(said) or "everything")
def test_no_stream_holds_a_byte_of_another_tenant(shared: Shared, said: dict[str, object], profile: str) -> None:
    asked = ticket(codec="none", profile=profile, **said)
    request = protocol.Ticket(ticket=asked).SerializeToString()
    everything = messages(shared.server, shared.root, "DoGet", request)  # also fills whatever the server keeps for later
    got = messages(shared.server, shared.token, "DoGet", request)
    kept = messages(shared.server, shared.token, "DoGet", request)  # what was kept of the first
    needles = foreign_bytes(shared)
    if f"{CANARY}-entity_type" in json.dumps(said):
        needles = [needle for needle in needles if needle != CANARY.encode()]  # the ticket names it itself
    assert found(needles, [*got, *kept]) == set()
    if not said:
        assert len(found(needles, everything)) > 1000, "the search finds what is there"
        assert found([CANARY.encode()], everything)


def test_what_a_tenant_reads_is_all_of_its_own(shared: Shared, ours: Client) -> None:
    table = ours.read(ticket(columns=LAKE_SCHEMA.names))
    assert table["event_id"].to_pylist() == shared.mine["event_id"].to_pylist()
    assert table["data"].to_pylist() == shared.mine["data"].to_pylist()
    assert ours.read(ticket(columns=["data"]))["data"].to_pylist() == shared.mine["data"].to_pylist()
    assert ours.read(ticket(limit=10))["event_id"].to_pylist() == shared.mine["event_id"].to_pylist()[:10]
    with connect(shared.server.url, token=shared.root) as root:
        assert root.read(ticket()).num_rows == shared.events.num_rows


def test_a_type_only_others_have_is_as_unknown_as_one_nobody_has(ours: Client) -> None:
    for name in (f"{CANARY}-entity_type", "NoSuchType"):
        assert ours.read(ticket(entity_type=[name])).num_rows == 0


@pytest.mark.parametrize("name", ["GetFlightInfo", "PollFlightInfo", "GetSchema", "ListFlights", "ListActions", "DoAction"])
def test_no_other_answer_tells_of_another_tenant(shared: Shared, name: str) -> None:
    descriptor = protocol.FlightDescriptor(type=protocol.CMD, cmd=ticket()).SerializeToString()
    request = {"DoAction": protocol.Action(type="healthcheck").SerializeToString(), "ListFlights": b"", "ListActions": b""}
    got = messages(shared.server, shared.token, name, request.get(name, descriptor))
    assert got
    assert found(foreign_bytes(shared), got) == set()
    rows = shared.events.num_rows
    for message in got:
        assert str(rows).encode() not in message
    if name in {"GetFlightInfo", "ListFlights"}:
        infos = [protocol.FlightInfo.FromString(message) for message in got]
        assert {(info.total_records, info.total_bytes) for info in infos} == {(-1, -1)}


def test_endpoints_do_not_tell_how_much_others_have_or_when(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ENDPOINT_ROWS", 100)
    descriptor = protocol.FlightDescriptor(type=protocol.CMD, cmd=ticket()).SerializeToString()

    def endpoints(token: str) -> int:
        [message] = messages(shared.server, token, "GetFlightInfo", descriptor)
        return len(protocol.FlightInfo.FromString(message).endpoint)

    assert endpoints(shared.root) > 1
    assert endpoints(shared.token) == 1


def test_a_ticket_of_another_tenant_opens_nothing_of_its(shared: Shared, ours: Client) -> None:
    import pyarrow.flight as fl

    options = fl.FlightCallOptions(headers=[(b"authorization", f"Bearer {shared.other}".encode())])
    with fl.connect(shared.server.url) as client:
        info = client.get_flight_info(fl.FlightDescriptor.for_command(ticket()), options)
    for endpoint in info.endpoints:
        request = protocol.Ticket(ticket=endpoint.ticket.ticket).SerializeToString()
        assert found(foreign_bytes(shared), messages(shared.server, shared.token, "DoGet", request)) == set()


@pytest.mark.parametrize(
    "said",
    [
        {"columns": ["no_such_column"]},
        {"table_version": 99},
        {"start": "2026-11-02", "end": "2026-11-01"},
        {"codec": "snappy"},
        {"profile": "secret"},
        {"limit": -1},
        {"batch_size": "many"},
        {"follow": "yes"},
        {"entity_type": ["\x00"]},
        {"where": "org_id = '" + TENANTS[0] + "'"},
        {"org_id": TENANTS[0]},
    ],
    ids=str,
)
def test_an_error_tells_nothing_of_the_inside(shared: Shared, ours: Client, said: dict[str, object]) -> None:
    request = protocol.Ticket(ticket=ticket(**said)).SerializeToString()
    [answer] = messages(shared.server, shared.token, "DoGet", request)
    assert not INSIDE.search(answer)
    with pytest.raises(TicketError):
        ours.read(ticket(**said))


def test_a_damaged_lake_tells_no_path(lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    publish(lake, hour(0), lake_events(hour(0), 100))
    server = start_server(lake)
    for file in tmp_path.rglob("*.parquet"):
        file.write_bytes(b"PAR1 damaged")
    request = protocol.Ticket(ticket=ticket(end="2026-11-01T01:00:00Z")).SerializeToString()
    answer = messages(server, "", "DoGet", request)[-1]
    assert not INSIDE.search(answer), answer
