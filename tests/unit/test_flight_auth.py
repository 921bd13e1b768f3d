"""Credentials that only odd clients and odd issuers send, and key files that only odd editors write."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from fraiseql_pipeline.errors import NotAuthenticated, SettingsError
from fraiseql_pipeline.flight.auth import READ, Authenticator, Caller, new_token
from fraiseql_pipeline.settings import Settings
from tests.support.events import TENANTS

SECRET = "a secret of the tests, thirty-two bytes and more"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EVERYONE = Caller("anonymous", None, frozenset({READ}))


def claims(**changed: Any) -> dict[str, Any]:
    return {"sub": "ada", "iss": "i", "aud": "a", "exp": int(time.time()) + 600, "org_id": TENANTS[0], "scope": "read", **changed}


def refused(authenticator: Authenticator, *credentials: str, payload: tuple[str, str] | None = None) -> str:
    """The reason for which a handshake, and a call where there is no payload, is refused."""
    headers = [("authorization", credential) for credential in credentials]
    with pytest.raises(NotAuthenticated) as shaken:
        authenticator.handshake(headers, payload)
    if payload is None:
        with pytest.raises(NotAuthenticated) as called:
            authenticator.caller(headers)
        assert called.value.reason == shaken.value.reason
    return shaken.value.reason


@pytest.fixture
def known(tmp_path: Path) -> tuple[Authenticator, str]:
    token, line = new_token("reader", TENANTS[0], ["read"])
    (tmp_path / "tokens").write_text(line)
    return Authenticator(Settings(arrow_flight_tokens_file=str(tmp_path / "tokens")), EVERYONE), token


@pytest.fixture
def secret() -> Authenticator:
    return Authenticator(
        Settings(
            arrow_flight_jwt_algorithm="HS256",
            arrow_flight_jwt_secret=SECRET,
            arrow_flight_jwt_issuer="i",
            arrow_flight_jwt_audience="a",
        ),
        EVERYONE,
    )


@pytest.mark.parametrize("blank", ["\xa0", "\u2003", "\x85", "\x1f"])
def test_a_token_with_other_blanks_than_those_of_a_header_around_it_is_refused(
    known: tuple[Authenticator, str], blank: str
) -> None:
    authenticator, token = known
    assert authenticator.caller([("authorization", f" Bearer \t {token} \t")]).principal == "reader"
    for text in (f"Bearer {token}{blank}", f"Bearer {blank}{token}", f"{blank}Bearer {token}"):
        assert refused(authenticator, text) in {"unknown", "scheme"}


def test_the_header_and_the_payload_of_a_handshake_say_the_same_or_are_two_credentials(known: tuple[Authenticator, str]) -> None:
    authenticator, token = known
    payload = ("reader", token)
    same, other = (base64.b64encode(f"{name}:{token}".encode()).decode() for name in ("reader", "root"))
    assert authenticator.handshake([], payload)[1] == token
    for header in (f"Bearer {token}", f"Basic {same}"):
        assert authenticator.handshake([("authorization", header)], payload)[1] == token
    for headers in (["Bearer guess"], [f"Basic {other}"], [f"Bearer {token}", f"Bearer {token}"], ["Bearer guess", "Basic x"]):
        assert refused(authenticator, *headers, payload=payload) == "duplicate"
    assert refused(authenticator, f"Token {token}", payload=payload) == "scheme"


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\x7f", "\x9b", "\ud800", "b\udfff"])
def test_a_principal_that_cannot_be_written_down_is_nobody(secret: Authenticator, name: str) -> None:
    assert refused(secret, f"Bearer {jwt.encode(claims(sub=name), SECRET)}") == "claims"
    assert secret.caller([("authorization", f"Bearer {jwt.encode(claims(sub='Zoë 👩‍🚀'), SECRET)}")]).principal == "Zoë 👩‍🚀"


def test_a_token_of_deeply_nested_json_is_read_or_refused_like_any_other(secret: Authenticator) -> None:
    nested = ', "x": ' + "[" * 2_000 + "]" * 2_000 + "}"

    def signed(header: str, body: str) -> str:
        text = b".".join(jwt.utils.base64url_encode(part.encode()) for part in (header, body))
        signature = jwt.get_algorithm_by_name("HS256").sign(text, jwt.get_algorithm_by_name("HS256").prepare_key(SECRET))
        return b".".join((text, jwt.utils.base64url_encode(signature))).decode()

    header, body = json.dumps({"alg": "HS256"}), json.dumps(claims())
    assert secret.caller([("authorization", f"Bearer {signed(header, body)}")]).principal == "ada"
    for token in (signed(header[:-1] + nested, body), signed(header, body[:-1] + nested)):
        assert len(token) < 8_192
        with suppress(NotAuthenticated):  # what Python reads depends on its version
            secret.caller([("authorization", f"Bearer {token}")])


def jwk(key: rsa.RSAPrivateKey, **also: Any) -> dict[str, Any]:
    return {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "use": "sig", "alg": "RS256", **also}


WRONG: dict[str, Callable[[], str]] = {
    "deeply nested": lambda: "[" * 100_000,
    "deeply nested in a key": lambda: '{"keys": [{"kty": "RSA", "x": ' + "[" * 100_000,
    "two keys of one id": lambda: json.dumps({"keys": [jwk(KEY, kid="a"), jwk(OTHER, kid="a")]}),
    "an id that is another's place": lambda: json.dumps({"keys": [jwk(OTHER), jwk(KEY, kid="0")]}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_key_file_that_is_wrong_stops_the_start_and_later_leaves_the_one_before_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    file = tmp_path / "jwks.json"
    settings = Settings(
        arrow_flight_jwt_algorithm="RS256",
        arrow_flight_jwt_jwks_file=str(file),
        arrow_flight_jwt_issuer="i",
        arrow_flight_jwt_audience="a",
    )
    file.write_text(WRONG[wrong]())
    with pytest.raises(SettingsError, match=r"RSA keys of 2048 bits or more, each with an id of its own"):
        Authenticator(settings, EVERYONE)
    file.write_text(json.dumps({"keys": [jwk(KEY, kid="a"), {"kty": "EC", "kid": "a"}]}))
    authenticator = Authenticator(settings, EVERYONE)
    token = jwt.encode(claims(), KEY, algorithm="RS256", headers={"kid": "a"})
    file.write_text(WRONG[wrong]())
    assert authenticator.caller([("authorization", f"Bearer {token}")]).principal == "ada"
    assert [record.getMessage().endswith("The one read before stays in force.") for record in caplog.records] == [True]
