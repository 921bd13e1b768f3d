"""TLS: whom the server trusts, what it shows, and which addresses it wants both for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import flight

from fraiseql_pipeline.cli import main
from fraiseql_pipeline.errors import NotAuthenticated, PipelineError, SettingsError
from fraiseql_pipeline.flight import server as server_module
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.certificates import Authority, Pair
from tests.support.events import TENANTS, lake_events
from tests.support.waiting import eventually

TICKET = b"events:*:2026-11-01:2026-11-01T01:00:00:1000"


@pytest.fixture(scope="module")
def lake_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("tls") / "lake")
    publish(Lake(uri), hour(0), lake_events(hour(0), 400))
    return uri


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def pair(authority: Authority, tmp_path: Path) -> Pair:
    return authority.issue("server", Pair(tmp_path / "cert.pem", tmp_path / "key.pem"))


def with_tls(pair: Pair) -> dict[str, str]:
    return {"arrow_flight_tls_cert": str(pair.cert), "arrow_flight_tls_key": str(pair.key)}


def test_tls_serves_who_trusts_its_authority(
    lake_uri: str, start_server: Callable[..., FlightServer], authority: Authority, pair: Pair
) -> None:
    server = start_server(Lake(lake_uri), **with_tls(pair))
    assert server.url.startswith("grpc+tls://")
    with connect(server.url, tls_root_certs=authority.ca) as client:
        assert client.read(TICKET).num_rows == 400
    read = CliRunner().invoke(main, ["--json", "read", TICKET.decode(), "--url", server.url, "--tls-root-certs", str(authority.ca)])
    assert json.loads(read.stdout)["rows"] == 400
    with flight.connect(server.url.replace("+tls", "")) as plain, pytest.raises(flight.FlightUnavailableError):
        list(plain.list_flights())


def test_a_renewed_certificate_is_used_without_a_restart(
    lake_uri: str, start_server: Callable[..., FlightServer], authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    server = start_server(Lake(lake_uri), **with_tls(pair))
    other = Authority(tmp_path, "other authority")
    with connect(server.url, tls_root_certs=authority.ca) as running:
        assert running.read(TICKET).num_rows == 400
        pair.cert.write_text("half written")
        with connect(server.url, tls_root_certs=authority.ca) as client:
            assert client.read(TICKET).num_rows == 400, "what does not fit together is not used"
        other.issue("server", pair)
        with connect(server.url, tls_root_certs=other.ca) as client:
            assert client.read(TICKET).num_rows == 400
        assert running.read(TICKET).num_rows == 400


def test_mutual_tls_asks_for_a_certificate_and_knows_its_holder(
    lake_uri: str, start_server: Callable[..., FlightServer], authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    audit = tmp_path / "audit.jsonl"
    server = start_server(
        Lake(lake_uri), **with_tls(pair), arrow_flight_tls_client_ca=str(authority.ca), arrow_flight_audit_log=str(audit)
    )
    mine = authority.issue("warehouse.example")
    with connect(server.url, tls_root_certs=authority.ca, cert_chain=mine.cert, private_key=mine.key) as client:
        assert client.read(TICKET).num_rows == 400
    assert json.loads(audit.read_text())["principal"] == "warehouse.example"
    theirs = Authority(tmp_path, "strangers").issue("stranger")
    for stranger in ({}, {"cert_chain": theirs.cert, "private_key": theirs.key}):
        with flight.connect(
            server.url,
            tls_root_certs=authority.ca.read_bytes(),
            **{name: path.read_bytes() for name, path in stranger.items()},
        ) as client:
            with pytest.raises(flight.FlightUnavailableError):
                list(client.list_flights())


def test_who_was_let_in_by_a_certificate_is_looked_at_again(
    lake_uri: str,
    start_server: Callable[..., FlightServer],
    authority: Authority,
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "_CERTIFIED_SECONDS", 1)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.ca.read_bytes())
    server = start_server(Lake(lake_uri), **with_tls(pair), arrow_flight_tls_client_ca=str(trusted))
    mine = authority.issue("warehouse.example")
    with connect(server.url, tls_root_certs=authority.ca, cert_chain=mine.cert, private_key=mine.key) as client:
        assert client.read(TICKET).num_rows == 400
        trusted.write_bytes(Authority(tmp_path, "the next").ca.read_bytes())

        def refused() -> bool:
            try:
                client.read(TICKET)
            except PipelineError:
                return True
            return False

        eventually(refused)


def test_a_certificate_does_not_replace_a_token(
    lake_uri: str, start_server: Callable[..., FlightServer], authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    token, line = new_token("ada", TENANTS[0], ["read"])
    (tmp_path / "tokens").write_text(line)
    mine = authority.issue("warehouse.example")
    server = start_server(
        Lake(lake_uri),
        **with_tls(pair),
        arrow_flight_tls_client_ca=str(authority.ca),
        arrow_flight_tokens_file=str(tmp_path / "tokens"),
    )
    certificate = {"tls_root_certs": authority.ca, "cert_chain": mine.cert, "private_key": mine.key}
    with connect(server.url, **certificate) as client, pytest.raises(NotAuthenticated):
        client.read(TICKET)
    with connect(server.url, token=token, **certificate) as client:
        assert set(client.read(TICKET)["org_id"].to_pylist()) == {TENANTS[0]}


def test_files_that_do_not_fit_together_stop_the_start(lake: Lake, authority: Authority, pair: Pair) -> None:
    for chosen in (
        {"arrow_flight_tls_cert": str(pair.cert), "arrow_flight_tls_key": str(authority.issue("another").key)},
        {"arrow_flight_tls_cert": str(pair.key), "arrow_flight_tls_key": str(pair.key)},
        {**with_tls(pair), "arrow_flight_tls_client_ca": str(pair.key)},
    ):
        with pytest.raises(SettingsError, match="must be PEM files that fit together"):
            serve(Settings(arrow_flight_bind="127.0.0.1:0", **chosen), lake=lake)


def test_an_address_others_reach_needs_tls_and_authentication(lake: Lake, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(new_token("ada", None, ["read"])[1])
    token = {"arrow_flight_tokens_file": str(tmp_path / "tokens")}
    with pytest.raises(SettingsError, match="without authentication"):
        serve(Settings(arrow_flight_bind="0.0.0.0:0", **with_tls(pair)), lake=lake)
    with pytest.raises(SettingsError, match=r"without TLS \("):
        serve(Settings(arrow_flight_bind="0.0.0.0:0", **token), lake=lake)
    with serve(Settings(arrow_flight_bind="0.0.0.0:0", **with_tls(pair), **token), lake=lake) as server:
        assert server.port > 0


def test_who_is_let_in_unknown_from_elsewhere_may_only_read(lake_uri: str) -> None:
    with serve(Settings(arrow_flight_bind="0.0.0.0:0", start=MIDNIGHT), lake=Lake(lake_uri), insecure=True) as server:
        with flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
            assert isinstance(client.do_get(flight.Ticket(TICKET)).read_all(), pa.Table)
            with pytest.raises(flight.FlightUnauthorizedError, match="needs the scope admin"):
                list(client.do_action("refresh"))
