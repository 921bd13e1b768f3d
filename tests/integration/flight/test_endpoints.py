"""What a FlightInfo gives out: tickets that are signed, bound, pinned and shared out."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import SettingsError, TicketError
from fraiseql_pipeline.flight import plan as planning
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.edge import MAX_REQUEST_BYTES
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.flight.signing import Signer
from fraiseql_pipeline.flight.view import View, Views
from fraiseql_pipeline.lake import File, Lake, Snapshot
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Window, WindowSize
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.commits import commit
from tests.support.events import lake_events

ALL = flight.FlightDescriptor.for_command("events:*:2026-11-01:2026-11-02:10000")
ALL_OF_IT = flight.Ticket(ALL.command)
KEY = "k" * 32
TICKET = Ticket(start=MIDNIGHT, end=hour(5).start, entity_types=("Größe",), columns=("pk",), codec="lz4")
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def test_a_signed_ticket_is_the_ticket_for_its_caller_until_it_expires() -> None:
    signer = Signer(None, timedelta(seconds=10))
    signed, until = signer.sign(TICKET, "ada", NOW)
    assert until == NOW + timedelta(seconds=10)
    assert Ticket.parse(signer.opened(signed, "ada", NOW + timedelta(seconds=9)), NOW) == TICKET
    with pytest.raises(TicketError, match="has expired; ask GetFlightInfo"):
        signer.opened(signed, "ada", until)
    for other, opener in (("eve", signer), ("", signer), ("ada", Signer(None, timedelta(1))), ("ada", Signer(KEY, timedelta(1)))):
        with pytest.raises(TicketError, match="was not given to this caller by this server"):
            opener.opened(signed, other, NOW)


def test_servers_with_one_key_redeem_each_others_tickets() -> None:
    signed, _ = Signer(KEY, timedelta(1)).sign(TICKET, "ada", NOW)
    assert Signer(KEY, timedelta(2)).opened(signed, "ada", NOW) == TICKET.json.encode()


def test_no_altered_signed_ticket_is_opened() -> None:
    signer = Signer(KEY, timedelta(1))
    signed, _ = signer.sign(TICKET, "ada", NOW)
    head, said, mac = signed.split(b".")
    other = base64.urlsafe_b64encode(json.dumps({"ticket": "{}", "until": 10**12}).encode())
    for altered in (
        b".".join((head, other, mac)),
        b"signed.",
        b"signed..",
        b"signed.%%%.***",
        head + b"." + said,
        signed[:-9],
        b"signed.\xff.\xfe",
    ):
        with pytest.raises(TicketError, match="was not given"):
            signer.opened(altered, "ada", NOW)


def test_a_ticket_given_to_one_caller_is_of_no_use_to_another(
    lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 20))
    (ada, first), (eve, second) = new_token("ada", None, ["read"]), new_token("eve", None, ["read"])
    (tmp_path / "tokens").write_text(f"{first}\n{second}\n")
    server = start_server(lake, arrow_flight_tokens_file=str(tmp_path / "tokens"))
    mine, theirs = (flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())]) for token in (ada, eve))
    with flight.connect(server.url) as client:
        [endpoint] = client.get_flight_info(ALL, mine).endpoints
        assert client.do_get(endpoint.ticket, mine).read_all().num_rows == 20
        with pytest.raises(pa.ArrowInvalid, match="was not given to this caller"):
            client.do_get(endpoint.ticket, theirs).read_all()


def test_an_expired_ticket_is_refused_and_its_end_was_announced(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 20))
    with flight.connect(start_server(lake, arrow_flight_ticket_seconds=0.01).url) as client:
        [endpoint] = client.get_flight_info(ALL).endpoints
        until = endpoint.expiration_time.value / 1e9
        time.sleep(max(0.0, until - time.time()) + 0.001)
        with pytest.raises(pa.ArrowInvalid, match="has expired"):
            client.do_get(endpoint.ticket).read_all()


def test_endpoints_together_are_the_whole_in_order(
    lake: Lake, start_server: Callable[..., FlightServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        publish(lake, hour(number), lake_events(hour(number), 100 if number % 3 else 0))
    monkeypatch.setattr(planning, "ENDPOINT_ROWS", 100)
    with flight.connect(start_server(lake).url) as client:
        info = client.get_flight_info(ALL)
        assert 2 <= len(info.endpoints) <= planning.MAX_ENDPOINTS
        assert info.ordered
        whole = client.do_get(flight.Ticket(ALL.command)).read_all()
        tables, checksums = [], 0
        for endpoint in info.endpoints:
            *chunks, last = client.do_get(endpoint.ticket)
            tables += [pa.Table.from_batches([chunk.data]) for chunk in chunks if chunk.data is not None]
            checksums += json.loads(last.app_metadata.to_pybytes())["checksum"]
        assert pa.concat_tables(tables).equals(whole)
        *_, last = client.do_get(flight.Ticket(ALL.command))
        assert checksums % 2**64 == json.loads(last.app_metadata.to_pybytes())["checksum"]
        # An endpoint is about an eighth.
        assert max(table.num_rows for table in tables) <= whole.num_rows // 4
        limited = flight.FlightDescriptor.for_command(Ticket(start=MIDNIGHT, end=hour(20).start, limit=500).text)
        assert len(client.get_flight_info(limited).endpoints) == 1


def test_a_few_events_are_one_endpoint(client: flight.FlightClient) -> None:
    assert len(client.get_flight_info(ALL).endpoints) == 1


def test_replicas_are_locations_beside_this_connection(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 20))
    server = start_server(lake, arrow_flight_locations="grpc://a:1, grpc+tls://b:2", arrow_flight_ticket_key=KEY)
    with flight.connect(server.url) as client:
        [endpoint] = client.get_flight_info(ALL).endpoints
        assert [location.uri.decode() for location in endpoint.locations] == [
            "arrow-flight-reuse-connection://?",
            "grpc://a:1",
            "grpc+tls://b:2",
        ]
        assert client.do_get(endpoint.ticket).read_all().num_rows == 20
    with flight.connect(start_server(lake).url) as client:
        assert client.get_flight_info(ALL).endpoints[0].locations == []


@pytest.mark.parametrize(
    "chosen",
    [
        {"arrow_flight_locations": "grpc://a:1"},
        {"arrow_flight_locations": "http://a:1", "arrow_flight_ticket_key": KEY},
        {"arrow_flight_ticket_key": "short"},
        {"arrow_flight_encoding": "plain+brotli"},
    ],
)
def test_settings_that_could_not_work_are_refused(chosen: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.load(**chosen)
    assert KEY not in str(error.value)


def test_a_pinned_ticket_is_planned_against_what_was_published_then(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    server = start_server(lake)
    publish(lake, hour(0), lake_events(hour(0), 10))
    publish(lake, hour(1), lake_events(hour(1), 20))
    with flight.connect(server.url) as client:
        before = client.get_flight_info(ALL)
        facts = json.loads(before.app_metadata)
        publish(lake, hour(1), lake_events(hour(1), 5, seed=1))
        publish(lake, hour(2), lake_events(hour(2), 7))
        pinned = {
            "type": "events",
            "entity_type": "*",
            "start": "2026-11-01",
            "end": "2026-11-02",
            "table_version": facts["table_version"],
        }
        for info in (before, client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(pinned)))):
            assert info.total_records == 30
            assert json.loads(info.app_metadata)["complete_through"] == hour(1).end.isoformat()
            assert client.do_get(info.endpoints[0].ticket).read_all().num_rows == 30
        assert client.get_flight_info(ALL).total_records == 22
    # A server that has not seen that version reads in the log what was published then.
    with flight.connect(start_server(Lake(lake.uri)).url) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps(pinned)))
        assert info.total_records == 30
        assert json.loads(info.app_metadata) == facts | {"next_ticket": json.loads(info.app_metadata)["next_ticket"]}
        assert client.do_get(info.endpoints[0].ticket).read_all().num_rows == 30


def of_version(version: int, **asked: object) -> flight.Ticket:
    said = {"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-02", "table_version": version}
    return flight.Ticket(json.dumps(said | asked))


def test_an_older_version_ends_where_it_ended_whatever_was_published_since(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    day = Window(MIDNIGHT, WindowSize.DAY)
    first = publish(lake, hour(0), lake_events(hour(0), 50)).table_version
    empty = publish(lake, hour(1), lake_events(hour(1), 0)).table_version
    # A day that replaces the hours, and a later commit that replaces the day.
    replaced = publish(lake, day, lake_events(day, 500)).table_version
    whole = publish(lake, day, lake_events(day, 501, seed=2)).table_version
    with flight.connect(start_server(lake).url) as client:
        for version, rows, through in (
            (first, 50, hour(0).end),
            (empty, 50, hour(1).end),
            (replaced, 500, day.end),
            (whole, 501, day.end),
        ):
            *_, last = client.do_get(of_version(version))
            receipt = json.loads(last.app_metadata.to_pybytes())
            assert (receipt["rows"], receipt["complete_through"]) == (rows, through.isoformat())


@pytest.mark.parametrize("times", [1, 2])
def test_a_window_first_published_after_a_version_is_a_hole_of_it(
    lake: Lake, start_server: Callable[..., FlightServer], times: int
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 50))
    publish(lake, hour(2), lake_events(hour(2), 50))
    lake.maintain(MIDNIGHT + timedelta(days=30))  # one file over all three hours
    version = lake.snapshot().version
    for seed in range(times):
        publish(lake, hour(1), lake_events(hour(1), 70, seed=seed))
    with flight.connect(start_server(lake).url) as client:
        with pytest.raises(pa.ArrowInvalid, match="not published although later ones are: 2026-11-01-01:00;"):
            client.do_get(of_version(version)).read_all()
        *_, last = client.do_get(of_version(version, allow_missing=True))
        receipt = json.loads(last.app_metadata.to_pybytes())
        assert (receipt["rows"], receipt["missing_windows"]) == (100, 1)
        assert client.do_get(ALL_OF_IT).read_all().num_rows == 170


def test_a_window_that_was_compacted_and_published_again_is_in_the_versions_before(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    for number in range(3):
        publish(lake, hour(number), lake_events(hour(number), 50 * (number != 1)))
    lake.maintain(MIDNIGHT + timedelta(days=30))
    version = lake.snapshot().version
    for number in range(3):
        publish(lake, hour(number), lake_events(hour(number), 70, seed=1))
    with flight.connect(start_server(lake).url) as client:
        assert client.do_get(of_version(version)).read_all().num_rows == 100
        assert client.do_get(ALL_OF_IT).read_all().num_rows == 210


def test_no_version_is_answered_from_a_lake_that_was_replaced(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    version = publish(lake, hour(0), lake_events(hour(0), 50)).table_version
    with flight.connect(start_server(lake).url) as client:
        assert client.do_get(of_version(version)).read_all().num_rows == 50
        shutil.rmtree(lake.uri)
        assert publish(Lake(lake.uri), hour(0), lake_events(hour(0), 7, seed=9)).table_version == version
        assert client.do_get(of_version(version)).read_all().num_rows == 7


def test_the_next_ticket_reads_what_is_published_after(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 10))
    publish(lake, hour(1), lake_events(hour(1), 3))
    with flight.connect(start_server(lake).url) as client:
        ticket = flight.Ticket("events:*:2026-11-01T00:10:00:2026-12-01:10000")
        *_, last = client.do_get(ticket)
        following = json.loads(last.app_metadata.to_pybytes())["next_ticket"]
        publish(lake, hour(2), lake_events(hour(2), 4))
        assert client.do_get(flight.Ticket(following)).read_all().num_rows == 4
        *_, last = client.do_get(
            flight.Ticket('{"type":"events","entity_type":"*","start":"2026-11-01","end":"2026-12-01","limit":5}')
        )
        assert json.loads(last.app_metadata.to_pybytes())["next_ticket"] is None


def test_the_receipt_tells_the_key_up_to_which_the_range_is_whole(client: flight.FlightClient) -> None:
    *_, last = client.do_get(flight.Ticket(ALL.command))
    assert json.loads(last.app_metadata.to_pybytes())["settled_pk"] == 2**62


def many(windows: int) -> Snapshot:
    files = tuple(
        File(f"{n}.parquet", "2026-11-01", 1000, 50, n * 3_600_000_000 + 1, (n + 1) * 3_600_000_000 - 1) for n in range(windows)
    )
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    first = (MIDNIGHT - epoch) // timedelta(hours=1)
    shifted = tuple(
        File(f.path, f.date, f.size, f.rows, f.low + first * 3_600_000_000, f.high + first * 3_600_000_000)
        for f in files  # type: ignore[operator]
    )
    return Snapshot(windows, shifted, {hour(n): commit(hour(n), rows=50, version=n) for n in range(windows)}, None)


def test_a_view_is_built_once_per_version(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    init = View.__init__
    monkeypatch.setattr(
        View, "__init__", lambda self, snapshot, *more: (built.append(snapshot.version), init(self, snapshot, *more))[1]
    )
    views = Views(lake)
    for version in range(1, 4):
        publish(lake, hour(version), lake_events(hour(version), 3))
        for _ in range(5):
            views.newest()
    assert len(built) == 3


def test_a_view_that_is_made_of_the_one_before_is_as_one_made_anew(lake: Lake) -> None:
    views = Views(lake)
    for number, rows in ((3, 5), (1, 4), (3, 6), (0, 2), (1, 4)):
        publish(lake, hour(number), lake_events(hour(number), rows))
        found, alone = views.newest(), View(Lake(lake.uri).snapshot())
        for name in ("spans", "starts", "ends", "reaches", "settled_pks", "rows", "provisional", "uncounted", "far", "holes"):
            assert getattr(found, name) == getattr(alone, name), name
    publish(lake, hour(5), lake_events(hour(5), 1))
    last = views.newest()
    publish(lake, hour(1), lake_events(hour(1), 9))
    newest = views.newest()
    kept = [one is other for one, other in zip(last.spans, newest.spans, strict=True)]
    assert kept == [True, False, True, True], "only what was committed is made anew"
    snapshot = newest.snapshot
    shuffled = View(replace(snapshot, published=dict(reversed(snapshot.published.items()))))
    fewer = replace(snapshot, published=dict(list(snapshot.published.items())[:2]))
    assert View.after(shuffled, fewer).spans == newest.spans[:2], "whatever the order"


def test_endpoints_of_many_windows_share_them_evenly() -> None:
    decided = plan(Ticket(start=MIDNIGHT, end=hour(60_000).start), View(many(50_000)), first=MIDNIGHT, size=WindowSize.HOUR)
    assert decided.rows == 2_500_000
    parts = decided.parts()
    assert len(parts) == 8
    counts = [sum(1 for _ in part.units()) for part in parts]
    assert sum(counts) == 50_000
    assert max(counts) - min(counts) <= 2
    assert [part.ticket.start for part in parts[1:]] == [part.ticket.end for part in parts[:-1]]


@pytest.mark.parametrize("changed", [{"follow": True}, {"limit": 500_000}])
def test_what_goes_on_or_ends_at_a_count_is_one_endpoint(changed: dict[str, int]) -> None:
    ticket = Ticket(start=MIDNIGHT, end=hour(12_000).start, **changed)
    assert len(plan(ticket, View(many(12_000)), first=MIDNIGHT, size=WindowSize.HOUR).parts()) == 1


@pytest.mark.parametrize("name", ["é" * 240, "x" * 240, '"' * 200, "\\" * 200])
def test_every_ticket_that_is_given_out_is_redeemed(lake: Lake, start_server: Callable[..., FlightServer], name: str) -> None:
    publish(lake, hour(0), lake_events(hour(0), 50))
    refused = []
    with flight.connect(start_server(lake).url) as client:
        orders = client.do_get(flight.Ticket("events:Order:2026-11-01:2026-11-02:100")).read_all()
        for count in (100, 300, 500, 1000):
            types = ["Order", *(f"{name}{number}" for number in range(count))]
            said = {"type": "events", "entity_type": types, "start": "2026-11-01", "end": "2026-11-02"}
            asked = json.dumps(said, ensure_ascii=False).encode()
            if len(asked) > MAX_REQUEST_BYTES - 100:
                break
            assert client.do_get(flight.Ticket(asked)).read_all().equals(orders)
            try:
                info = client.get_flight_info(flight.FlightDescriptor.for_command(asked))
            except pa.ArrowInvalid as error:
                assert "cannot be signed" in str(error)  # noqa: PT017 - some are refused, and how many is not the rule
                refused.append(count)
                continue
            assert client.do_get(info.endpoints[0].ticket).read_all().equals(orders)
            endpoint = protocol.FlightInfo.FromString(info.serialize()).endpoint[0]
            body = protocol.RenewFlightEndpointRequest(endpoint=endpoint).SerializeToString()
            assert list(client.do_action(flight.Action("RenewFlightEndpoint", body)))
    assert refused, "one is too long"
    assert min(refused) > 100


def test_the_tickets_that_are_given_out_keep_the_encoding_that_was_planned(
    lake: Lake, start_server: Callable[..., FlightServer]
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 50))
    header = flight.FlightCallOptions(headers=[(b"x-fraiseql-encoding", b"compact+lz4")])
    with flight.connect(start_server(lake).url) as client:
        [endpoint] = client.get_flight_info(ALL, header).endpoints
        assert client.do_get(endpoint.ticket).schema.metadata == {b"fraiseql.encoding": b"compact+lz4"}
        [endpoint] = client.get_flight_info(ALL).endpoints
        assert client.do_get(endpoint.ticket, header).schema.metadata == {b"fraiseql.encoding": b"plain+zstd"}
