"""Who may ask: every RPC times every state a credential can be in, scopes and handshakes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pyarrow import flight

from fraiseql_pipeline.cli import main
from fraiseql_pipeline.errors import NotAllowed, NotAuthenticated, SettingsError, TicketError
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.edge import METHODS
from fraiseql_pipeline.flight.limits import HANDSHAKES, HANDSHAKES_EACH
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.support.events import TENANTS, lake_events
from tests.support.waiting import eventually

TICKET = b"events:*:2026-11-01:2026-11-01T01:00:00:1000"
SECRET = "a secret of the tests, thirty-two bytes and more"
ISSUER, AUDIENCE = "https://issuer.test", "fraiseql-flight"
SENTENCE = "The call is not authenticated; send one valid bearer token in the authorization header."

DESCRIPTOR = protocol.FlightDescriptor(type=protocol.CMD, cmd=TICKET)
#: RPC → (how it is called, its request).
REQUESTS: dict[str, tuple[str, bytes]] = {
    "Handshake": ("stream_stream", protocol.HandshakeRequest().SerializeToString()),
    "ListFlights": ("unary_stream", b""),
    "GetFlightInfo": ("unary_unary", DESCRIPTOR.SerializeToString()),
    "PollFlightInfo": ("unary_unary", DESCRIPTOR.SerializeToString()),
    "GetSchema": ("unary_unary", DESCRIPTOR.SerializeToString()),
    "DoGet": ("unary_stream", protocol.Ticket(ticket=TICKET).SerializeToString()),
    "DoPut": ("stream_stream", protocol.FlightData(flight_descriptor=DESCRIPTOR).SerializeToString()),
    "DoExchange": ("stream_stream", protocol.FlightData(flight_descriptor=DESCRIPTOR).SerializeToString()),
    "DoAction": ("unary_stream", protocol.Action(type="healthcheck").SerializeToString()),
    "ListActions": ("unary_stream", b""),
}

Headers = list[tuple[str, str]]


def call(channel: grpc.Channel, name: str, headers: Headers) -> tuple[grpc.StatusCode, str, bytes]:
    """Status, sentence and every byte of the messages that came."""
    kind, request = REQUESTS[name]
    method = getattr(channel, kind)(f"/{protocol.SERVICE}/{name}")
    got = b""
    try:
        if kind == "unary_unary":
            got = method(request, metadata=headers, timeout=20)
        else:
            for message in method(iter([request]) if kind == "stream_stream" else request, metadata=headers, timeout=20):
                got += message
    except grpc.RpcError as error:
        return error.code(), error.details() or "", got
    return grpc.StatusCode.OK, "", got


def bearer(token: str) -> Headers:
    return [("authorization", f"Bearer {token}")]


def claims(**changed: Any) -> dict[str, Any]:
    now = int(time.time())
    said = {"sub": "ada", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 600, "org_id": TENANTS[0], "scope": "read publish admin"}
    return {name: value for name, value in (said | changed).items() if value is not None}


@pytest.fixture(scope="module")
def lake_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("access") / "lake")
    publish(Lake(uri), hour(0), lake_events(hour(0), 400))
    return uri


class Secured:
    """A server that knows static tokens and HS256 JWTs."""

    def __init__(self, lake_uri: str, directory: Path) -> None:
        self.file = directory / "tokens"
        self.everything, everything = new_token("root", None, ["read", "publish", "admin"])
        self.reader, reader = new_token("reader", TENANTS[0], ["read"])
        self.revoked, _ = new_token("gone", None, ["read", "publish", "admin"])
        self.file.write_text(f"# tokens of the tests\n\n{everything}\n{reader}\n")
        self.audit = directory / "audit.jsonl"
        self.server = serve(
            Settings(
                arrow_flight_bind="127.0.0.1:0",
                start=MIDNIGHT,
                arrow_flight_tokens_file=str(self.file),
                arrow_flight_jwt_algorithm="HS256",
                arrow_flight_jwt_secret=SECRET,
                arrow_flight_jwt_issuer=ISSUER,
                arrow_flight_jwt_audience=AUDIENCE,
                arrow_flight_audit_log=str(self.audit),
            ),
            lake=Lake(lake_uri),
        )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")


@pytest.fixture(scope="module")
def secured(lake_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    running = Secured(lake_uri, tmp_path_factory.mktemp("secured"))
    yield running
    running.channel.close()
    running.server.stop(0)


RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def signed(key: Any = SECRET, algorithm: str = "HS256", **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, algorithm=algorithm)


def tampered() -> str:
    head, body, signature = signed().split(".")
    other = base64.urlsafe_b64encode(json.dumps(claims(sub="eve")).encode()).decode().rstrip("=")
    return f"{head}.{other}.{signature if body != other else ''}"


#: State of a credential → its headers. None of them lets anyone in.
STATES: dict[str, Callable[[Secured], Headers]] = {
    "none": lambda _: [],
    "empty": lambda _: [("authorization", "")],
    "wrong scheme": lambda s: [("authorization", f"Token {s.everything}")],
    "expired": lambda _: bearer(signed(exp=int(time.time()) - 3600)),
    "without expiry": lambda _: bearer(signed(exp=None)),
    "not yet valid": lambda _: bearer(signed(nbf=int(time.time()) + 3600)),
    "wrong audience": lambda _: bearer(signed(aud="another service")),
    "wrong issuer": lambda _: bearer(signed(iss="https://elsewhere.test")),
    "no algorithm": lambda _: bearer(jwt.encode(claims(), None, algorithm="none")),
    "another algorithm": lambda _: bearer(signed(RSA_KEY, "RS256")),
    "another strength": lambda _: bearer(signed(SECRET + SECRET, "HS512")),
    "bad signature": lambda _: bearer(tampered()),
    "no tenant": lambda _: bearer(signed(org_id=None)),
    "tenant of another type": lambda _: bearer(signed(org_id=[TENANTS[0]])),
    "revoked": lambda s: bearer(s.revoked),
    "cut": lambda s: bearer(s.everything[:-1]),
    "two of them": lambda s: bearer(s.everything) + bearer(s.everything),
    "two kinds": lambda s: [*bearer(s.everything), ("auth-token-bin", s.everything.encode())],  # type: ignore[list-item]
}


@pytest.mark.parametrize("state", STATES)
def test_no_rpc_answers_a_caller_it_does_not_know(secured: Secured, state: str) -> None:
    headers = STATES[state](secured)
    assert set(REQUESTS) == set(METHODS)
    got = {name: call(secured.channel, name, headers) for name in REQUESTS}
    assert got == dict.fromkeys(REQUESTS, (grpc.StatusCode.UNAUTHENTICATED, SENTENCE, b""))


@pytest.mark.parametrize("name", REQUESTS)
def test_every_rpc_answers_a_caller_it_knows(secured: Secured, name: str) -> None:
    expected = grpc.StatusCode.UNIMPLEMENTED if name == "DoPut" else grpc.StatusCode.OK
    for token in (secured.everything, signed(), signed(nbf=int(time.time()) + 2)):
        assert call(secured.channel, name, bearer(token))[0] is expected


@pytest.mark.parametrize("scope", ["read", "publish", "admin"])
def test_a_scope_opens_its_calls_and_no_others(secured: Secured, scope: str) -> None:
    only = bearer(signed(scope=scope))
    needs = {name: {"DoPut": "publish"}.get(name, "read") for name in REQUESTS if name not in {"Handshake", "ListActions"}}
    for name, needed in needs.items():
        code, sentence, got = call(secured.channel, name, only)
        if scope == needed:
            assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED}
        else:
            what = "DoAction healthcheck" if name == "DoAction" else name
            assert (code, got) == (grpc.StatusCode.PERMISSION_DENIED, b"")
            assert sentence == f"{what} needs the scope {needed}, which this caller does not have."
    refresh = secured.channel.unary_stream(f"/{protocol.SERVICE}/DoAction")
    request = protocol.Action(type="refresh").SerializeToString()
    if scope == "admin":
        assert len(list(refresh(request, metadata=only))) == 1
    else:
        with pytest.raises(grpc.RpcError) as refused:
            list(refresh(request, metadata=only))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_token_without_scopes_opens_nothing(secured: Secured) -> None:
    for scopes in (None, "", "write superuser", ["read", 7]):
        code, _, _ = call(secured.channel, "GetSchema", bearer(signed(scope=scopes)))
        assert code is (grpc.StatusCode.OK if isinstance(scopes, list) else grpc.StatusCode.PERMISSION_DENIED)


def test_a_token_is_revoked_and_added_by_an_edit_of_the_file(secured: Secured) -> None:
    before = secured.file.read_text()
    token, line = new_token("temporary", None, ["read"])
    assert call(secured.channel, "GetSchema", bearer(token))[0] is grpc.StatusCode.UNAUTHENTICATED
    secured.file.write_text(before + line + "\n")
    assert call(secured.channel, "GetSchema", bearer(token))[0] is grpc.StatusCode.OK
    secured.file.write_text(before + "half an edit")
    assert call(secured.channel, "GetSchema", bearer(token))[0] is grpc.StatusCode.OK, "what was read last stays in force"
    for emptied in ("", "# tokens of the tests\n"):
        secured.file.write_text(emptied)
        assert call(secured.channel, "GetSchema", bearer(token))[0] is grpc.StatusCode.OK, "an edit begins so"
    secured.file.write_text(before)
    assert call(secured.channel, "GetSchema", bearer(token))[0] is grpc.StatusCode.UNAUTHENTICATED


def test_a_user_and_a_token_become_a_bearer_token(secured: Secured) -> None:
    with flight.connect(secured.server.url) as client:
        header = client.authenticate_basic_token("reader", secured.reader)
        assert header == (b"authorization", f"Bearer {secured.reader}".encode())
        options = flight.FlightCallOptions(headers=[header])
        assert client.do_get(flight.Ticket(TICKET), options).read_all().num_rows > 0
        for user, password in (("root", secured.reader), ("reader", "guess"), ("", ""), ("reader", "")):
            with pytest.raises(flight.FlightUnauthenticatedError, match="is not authenticated"):
                client.authenticate_basic_token(user, password)


def test_a_driver_that_always_shakes_hands_reads_from_an_open_server(
    lake_uri: str, start_server: Callable[..., FlightServer]
) -> None:
    with flight.connect(start_server(Lake(lake_uri)).url) as client:
        options = flight.FlightCallOptions(headers=[client.authenticate_basic_token("any", "thing")])
        assert client.do_get(flight.Ticket(TICKET), options).read_all().num_rows == 400


def test_a_jwt_is_a_password_too(secured: Secured) -> None:
    with flight.connect(secured.server.url) as client:
        assert client.authenticate_basic_token("ada", token := signed())[1] == f"Bearer {token}".encode()


class _Basic(flight.ClientAuthHandler):  # type: ignore[misc]
    def __init__(self, user: str, password: str) -> None:
        super().__init__()
        self._basic = flight.BasicAuth(user, password)
        self._token = b""

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        outgoing.write(self._basic.serialize())
        self._token = incoming.read()

    def get_token(self) -> bytes:
        return self._token


def test_a_handshake_with_a_payload_works_as_well(secured: Secured) -> None:
    with flight.connect(secured.server.url) as client:
        client.authenticate(_Basic("reader", secured.reader))
        assert client.do_get(flight.Ticket(TICKET)).read_all().num_rows > 0
    with flight.connect(secured.server.url) as client:
        with pytest.raises(flight.FlightUnauthenticatedError, match="is not authenticated"):
            client.authenticate(_Basic("reader", "guess"))


def silence(until: threading.Event) -> Iterator[bytes]:
    until.wait(30)
    yield from ()


def all_but_some_are_refused(handshakes: list[Any]) -> None:
    eventually(lambda: sum(shake.is_active() for shake in handshakes) == HANDSHAKES_EACH)
    assert {shake.code() for shake in handshakes if not shake.is_active()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_silent_strangers_keep_nobody_from_logging_in(secured: Secured) -> None:
    over = threading.Event()
    shake = secured.channel.stream_stream(f"/{protocol.SERVICE}/Handshake")
    # All of one address; a credential that is wrong is none.
    strangers = [shake(silence(over), metadata=bearer("guess") if number % 2 else None) for number in range(2 * HANDSHAKES)]
    all_but_some_are_refused(strangers)
    with flight.connect(secured.server.url) as client:
        assert client.authenticate_basic_token("reader", secured.reader)[0] == b"authorization"
    over.set()
    for stranger in strangers:
        stranger.cancel()


def test_a_principal_that_is_silent_keeps_no_other_from_logging_in(secured: Secured) -> None:
    over = threading.Event()
    shake = secured.channel.stream_stream(f"/{protocol.SERVICE}/Handshake")
    own = [shake(silence(over), metadata=bearer(secured.reader)) for _ in range(2 * HANDSHAKES_EACH)]
    all_but_some_are_refused(own)
    with flight.connect(secured.server.url) as client:
        client.authenticate(_Basic("root", secured.everything))
        assert client.authenticate_basic_token("root", secured.everything)[0] == b"authorization"
    over.set()
    for call in own:
        call.cancel()


def test_connect_sends_its_token(secured: Secured) -> None:
    with connect(secured.server.url, token=secured.reader) as client:
        rows = client.read(TICKET)
        assert set(rows["org_id"].to_pylist()) == {TENANTS[0]}
        assert client.info(TICKET).rows == rows.num_rows, "its own, which the kept frames tell"
    with connect(secured.server.url) as client, pytest.raises(NotAuthenticated, match="send one valid bearer token"):
        client.read(TICKET)
    with connect(secured.server.url, token=signed(scope="publish")) as client, pytest.raises(NotAllowed, match="scope read"):
        client.read(TICKET)


def test_keys_come_from_a_jwks_file_that_may_be_rotated(
    lake_uri: str, tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    file = tmp_path / "jwks.json"

    def write(**keys: rsa.RSAPrivateKey) -> None:
        listed = [
            {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": name, "use": "sig", "alg": "RS256"}
            for name, key in keys.items()
        ]
        file.write_text(json.dumps({"keys": listed}))

    write(first=RSA_KEY)
    server = start_server(
        Lake(lake_uri),
        arrow_flight_jwt_algorithm="RS256",
        arrow_flight_jwt_jwks_file=str(file),
        arrow_flight_jwt_issuer=ISSUER,
        arrow_flight_jwt_audience=AUDIENCE,
    )
    public = jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY.public_key())

    def token(key: Any, kid: str | None) -> str:
        return jwt.encode(claims(), key, algorithm="RS256", headers={} if kid is None else {"kid": kid})

    def swapped(public: str) -> str:
        """Signed with the public key as if it were a secret; PyJWT itself refuses to write such a token."""
        head = jwt.encode(claims(), SECRET, headers={"kid": "first"}).rpartition(".")[0]
        signature = hmac.digest(public.encode(), head.encode(), "sha256")
        return f"{head}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:

        def accepted(token: str) -> bool:
            code, _, _ = call(channel, "GetSchema", bearer(token))
            assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED}
            return code is grpc.StatusCode.OK

        assert accepted(token(RSA_KEY, "first"))
        assert accepted(token(RSA_KEY, None))
        assert not accepted(token(RSA_KEY, "second"))
        assert not accepted(token(other, "first"))
        assert not accepted(swapped(public)), "a public key is no secret"
        assert not accepted(swapped(RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()))
        assert not accepted(signed())
        write(first=RSA_KEY, second=other)
        assert accepted(token(other, "second"))
        assert not accepted(token(RSA_KEY, None)), "with two keys a token says which"
        write(second=other)
        assert not accepted(token(RSA_KEY, "first"))
        assert accepted(token(other, "second"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("root:*:read:nothex", "Line 1 of"),
        ("root:*:read:" + "A" * 64, "Line 1 of"),
        ("\nroot:tenant-1:read:" + "a" * 64, "Line 2 of"),
        ("root:*:write:" + "a" * 64, "Line 1 of"),
        ("*:read:" + "a" * 64, "Line 1 of"),
        ("", "has none"),
        ("# nobody yet\n", "has none"),
    ],
)
def test_a_wrong_tokens_file_stops_the_start(lake: Lake, tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(SettingsError, match=problem) as refused:
        serve(Settings(arrow_flight_bind="127.0.0.1:0", arrow_flight_tokens_file=str(file)), lake=lake)
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(SettingsError, match="must name files that can be read"):
        serve(Settings(arrow_flight_bind="127.0.0.1:0", arrow_flight_tokens_file=str(tmp_path / "missing")), lake=lake)


def test_a_tokens_file_holds_no_token() -> None:
    token, line = new_token("a:b", TENANTS[1].upper(), ["read", "admin", "read"])
    assert token not in line
    assert line == f"a:b:{TENANTS[1].upper()}:admin,read:{hashlib.sha256(token.encode()).hexdigest()}"
    with pytest.raises(SettingsError):
        new_token("a", "not a tenant", ["read"])


def test_the_command_prints_a_token_and_its_line(lake_uri: str, tmp_path: Path, start_server: Callable[..., FlightServer]) -> None:
    made = CliRunner().invoke(main, ["--json", "token", "ada", "--org", TENANTS[0], "--scope", "read", "--scope", "admin"])
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["line"].startswith(f"ada:{TENANTS[0]}:admin,read:")
    (tmp_path / "tokens").write_text(said["line"] + "\n")
    server = start_server(Lake(lake_uri), arrow_flight_tokens_file=str(tmp_path / "tokens"))
    with connect(server.url, token=said["token"]) as client:
        assert client.read(TICKET).num_rows > 0
    shown = CliRunner().invoke(main, ["token", "ada"])
    assert re.fullmatch(r"Token: fq_\S{43}\nLine:  ada:\*:read:[0-9a-f]{64}\n", shown.stdout)
    wrong = CliRunner().invoke(main, ["token", "ada", "--org", "acme"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_the_audit_log_knows_every_call_and_no_secret(secured: Secured) -> None:
    begin = len(secured.audit.read_text().splitlines())
    token, canary = signed(), f"guess-{secrets.token_hex(8)}"
    with connect(secured.server.url, token=token) as client:
        rows = client.read(TICKET).num_rows
    call(secured.channel, "GetFlightInfo", bearer(canary))
    call(secured.channel, "DoAction", bearer(secured.everything))
    with connect(secured.server.url, token=token) as client, pytest.raises(TicketError):
        client.read(b"no ticket")
    text = secured.audit.read_text()
    read, refused, action, mistaken = [json.loads(line) for line in text.splitlines()[begin:]]
    assert (read["method"], read["principal"], read["org_id"], read["code"]) == ("DoGet", "ada", TENANTS[0], "OK")
    assert read["rows"] == rows
    assert read["bytes"] > 0
    assert (refused["method"], refused["principal"], refused["code"], refused["reason"]) == (
        "GetFlightInfo",
        "",
        "UNAUTHENTICATED",
        "unknown",
    )
    assert (action["action"], action["principal"], action["org_id"]) == ("healthcheck", "root", None)
    assert (read["reason"], mistaken["code"], mistaken["reason"]) == (None, "INVALID_ARGUMENT", "TicketError")
    for secret in (token, canary, secured.everything, secured.reader, SECRET, TICKET.decode(), "2026-11-01:"):
        assert secret not in text
