"""Mistakes with TLS: each is told as what it is, and never as a server that is not there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from fraiseql_pipeline.cli import main
from fraiseql_pipeline.errors import FlightRefused, FlightUnavailable, InputError, PipelineError
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.certificates import Authority, Pair
from tests.support.events import lake_events

TICKET = "events:*:2026-11-01T00:00:00Z:2026-11-01T01:00:00Z:10000"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "another authority")


def _mutual(authority: Authority, pair: Pair) -> dict[str, str]:
    """The settings of a server that shows a pair and asks its clients for a certificate of the authority."""
    return {
        "arrow_flight_tls_cert": str(pair.cert),
        "arrow_flight_tls_key": str(pair.key),
        "arrow_flight_tls_client_ca": str(authority.ca),
    }


def _refused(url: str, **tls: Path) -> PipelineError:
    with connect(url, **tls) as client, pytest.raises(PipelineError) as found:
        client.read(TICKET)
    assert "No Flight server answers" not in str(found.value)
    assert url in str(found.value)
    return found.value


def test_each_mistake_with_tls_is_told_as_what_it_is(
    lake: Lake, start_server: Callable[..., FlightServer], authority: Authority, stranger: Authority
) -> None:
    pair, theirs = authority.issue("server"), stranger.issue("client")
    server = start_server(lake, **_mutual(authority, pair))
    plain = start_server(lake)
    untrusted = _refused(server.url, tls_root_certs=stranger.ca)
    assert (type(untrusted), "is not one this client trusts" in str(untrusted)) == (FlightRefused, True)
    for certificate in ({}, {"cert_chain": theirs.cert, "private_key": theirs.key}):
        unknown = _refused(server.url, tls_root_certs=authority.ca, **certificate)
        assert (type(unknown), "seems to ask for a client certificate" in str(unknown)) == (FlightUnavailable, True)
    without = _refused(server.url.replace("+tls", ""))
    assert "seems to speak TLS; connect to it with grpc+tls://" in str(without)
    unlike = _refused(server.url, tls_root_certs=authority.ca, cert_chain=pair.cert, private_key=theirs.key)
    assert (type(unlike), "each must be PEM" in str(unlike)) == (InputError, True)
    shown = {"arrow_flight_tls_cert": str(pair.cert), "arrow_flight_tls_key": str(pair.key)}
    unnamed = start_server(lake, arrow_flight_bind="127.0.0.2:0", **shown)
    elsewhere = _refused(unnamed.url, tls_root_certs=authority.ca)
    assert (type(elsewhere), "is not for that host" in str(elsewhere)) == (FlightRefused, True)
    spoken = _refused(plain.url.replace("grpc", "grpc+tls"), tls_root_certs=authority.ca)
    assert (type(spoken), "does not speak TLS" in str(spoken)) == (FlightRefused, True)


def test_a_certificate_that_has_expired_is_told_as_one(
    lake: Lake, start_server: Callable[..., FlightServer], authority: Authority
) -> None:
    pair = authority.issue("server", valid=timedelta(minutes=-1))
    server = start_server(lake, arrow_flight_tls_cert=str(pair.cert), arrow_flight_tls_key=str(pair.key))
    expired = _refused(server.url, tls_root_certs=authority.ca)
    assert (type(expired), "has expired or is not valid yet" in str(expired)) == (FlightRefused, True)


@pytest.mark.parametrize("url", ["https://localhost:50051", "grpc://localhost:port", "postgresql://ada:secret@localhost/app"])
def test_a_url_that_is_none_of_a_flight_server_is_refused_before_a_call(url: str) -> None:
    with pytest.raises(InputError, match=r"must be grpc://host:port or grpc\+tls://host:port") as refused:
        connect(url)
    assert "secret" not in str(refused.value)


def test_a_host_that_nobody_knows_is_told_as_one() -> None:
    with connect("grpc://nobody.invalid:50051") as client, pytest.raises(FlightUnavailable, match="is not known here"):
        client.read(TICKET)


@pytest.mark.parametrize("half", ["cert_chain", "private_key"])
def test_a_certificate_without_its_key_is_not_left_out_in_silence(half: str) -> None:
    with pytest.raises(InputError, match="belong together"):
        connect("grpc+tls://localhost:50051", **{half: b"half"})


def test_the_command_line_reads_over_mutual_tls(
    lake: Lake, start_server: Callable[..., FlightServer], authority: Authority, tmp_path: Path
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    pair, mine = authority.issue("server"), authority.issue("client")
    server = start_server(lake, **_mutual(authority, pair))
    trusting = ("read", TICKET, "--url", server.url, "--tls-root-certs", str(authority.ca))
    read = CliRunner().invoke(main, [*trusting, "--cert-chain", str(mine.cert), "--private-key", str(mine.key)])
    assert read.exit_code == 0, read.output
    assert "5 events" in read.stdout
    refused = CliRunner().invoke(main, [*trusting])
    assert (refused.exit_code, "--cert-chain" in refused.stderr) == (6, True)
    for half in (("--cert-chain", str(mine.cert)), ("--private-key", str(mine.key))):
        alone = CliRunner().invoke(main, [*trusting, *half])
        assert (alone.exit_code, "belong together" in alone.stderr) == (2, True)
    absent = CliRunner().invoke(main, [*trusting, "--cert-chain", "absent.pem", "--private-key", str(mine.key)])
    assert (absent.exit_code, "absent.pem" in absent.stderr) == (2, True)
    assert "--cert-chain is for a Flight server" in CliRunner().invoke(main, ["read", TICKET, "--cert-chain", "c.pem"]).stderr
