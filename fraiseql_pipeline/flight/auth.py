"""Authentication: the metadata of a call → the ``Caller`` it is made for.

What lives here: bearer tokens (hashed and static, or JWT), Basic credentials in a handshake, client certificates. What must not: what a
caller may read (``plan.py``), which scope a call needs (``edge.py``), files that changed (``watched.py``).

A static token is 32 random bytes, so its SHA-256 is enough at rest. The file has one line per token, ``principal:org_id:scopes:sha256``,
where the org_id may be ``*`` (all tenants) and scopes are separated by commas; a principal with two lines has two tokens, which is how
they are rotated. A Basic credential is a principal and a token of it; the handshake answers with that same token, so the server keeps
no sessions and any replica knows it.

Invariants
 1. Whatever is wrong with a credential, the client gets the same status and the same sentence. The reason goes to metrics and audit.
 2. A call has exactly one credential; two are refused, so that no proxy and server can disagree on which one counts. In a handshake, header and
    payload may say the same.
 3. The algorithm of a JWT is the setting's, never the token's. ``exp``, ``iss``, ``aud``, ``sub`` and the tenant must be there.
 4. Tokens are compared in constant time, all of them.
 5. Nothing here writes a credential anywhere.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from fraiseql_pipeline.errors import NotAuthenticated, SettingsError
from fraiseql_pipeline.event import UUID_PATTERN
from fraiseql_pipeline.flight.watched import Watched
from fraiseql_pipeline.settings import Settings

READ, PUBLISH, ADMIN = "read", "publish", "admin"
SCOPES = frozenset({READ, PUBLISH, ADMIN})

#: Why a credential was refused, as metrics and the audit log say it.
REASONS = ("missing", "duplicate", "scheme", "unknown", "expired", "not_yet", "claims", "signature")

#: The header of pyarrow's and Java's handshake with a payload; the value is the token itself.
TOKEN_HEADER = "auth-token-bin"  # noqa: S105 - the name of a header

_SENTENCE = "The call is not authenticated; send one valid bearer token in the authorization header."
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,8192}", re.ASCII)
_PREFIX = "fq_"
#: What a header may have around its words, and no other blank: gRPC logs a header of other bytes, and hands it on.
_BLANKS = " \t"
#: Control characters and halves of surrogate pairs: no text of Postgres, and no line of a log, has them.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: Clocks of issuers and servers differ.
_LEEWAY_SECONDS = 10
_MIN_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom a call is made. ``org_id``: the one tenant whose events there are for it; None: all tenants."""

    principal: str
    org_id: str | None
    scopes: frozenset[str]

    @property
    def name(self) -> str:
        """Who it is, for what is one caller's own (tickets, streams, slots): two tenants may each have a principal of the same name."""
        return f"{self.principal}\0{self.org_id or ''}"


def new_token(principal: str, org_id: str | None, scopes: Iterable[str]) -> tuple[str, str]:
    """A new token, and the line for the tokens file. Raises ``SettingsError`` for what a line cannot say."""
    token = _PREFIX + secrets.token_urlsafe(32)
    line = f"{principal}:{org_id or '*'}:{','.join(sorted(set(scopes)))}:{hashlib.sha256(token.encode()).hexdigest()}"
    _parse_tokens(line.encode())
    return token, line


class Authenticator:
    """Knows who calls. ``everyone``: what a call is when nothing is set up to authenticate it."""

    def __init__(self, settings: Settings, everyone: Caller) -> None:
        self._everyone = everyone
        self._certificates = settings.arrow_flight_tls_client_ca is not None
        file = settings.arrow_flight_tokens_file
        self._tokens = None if file is None else Watched("FRAISEQL_ARROW_FLIGHT_TOKENS_FILE", (file,), _parse_tokens)
        self._jwt = None if settings.arrow_flight_jwt_algorithm is None else _Jwt(settings)

    @property
    def asks_for_tokens(self) -> bool:
        return self._tokens is not None or self._jwt is not None

    @property
    def knows_callers(self) -> bool:
        """Whether a principal is somebody, and not everyone."""
        return self.asks_for_tokens or self._certificates

    def caller(self, metadata: Sequence[tuple[str, str | bytes]], identities: Sequence[bytes] = ()) -> Caller:
        """Who makes a call with these headers. ``identities``: what the client's certificate says, if it was asked for one.

        Raises ``NotAuthenticated``.
        """
        if not self.asks_for_tokens:
            if self._certificates:
                if not identities:
                    raise NotAuthenticated(_SENTENCE, "missing")
                return Caller(identities[0].decode(errors="replace"), None, frozenset({READ}))
            return self._everyone
        scheme, credential = _credential(metadata)
        if scheme != "bearer":
            raise NotAuthenticated(_SENTENCE, "scheme")
        return self._of_token(credential)

    def introduced(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller | None:
        """Whom the header of a handshake proves to be there, before any message of it has come; None: it proves nobody."""
        if not self.asks_for_tokens:
            return None
        try:
            return self.handshake(metadata)[0]
        except NotAuthenticated:
            return None

    def handshake(
        self,
        metadata: Sequence[tuple[str, str | bytes]],
        payload: tuple[str, str] | None = None,
        identities: Sequence[bytes] = (),
    ) -> tuple[Caller, str]:
        """The caller and the token for its calls. ``payload``: user and password in the handshake itself; None: in its header."""
        if not self.asks_for_tokens:
            # Drivers that always shake hands want something to send along.
            return self.caller(metadata, identities), "none-needed"
        user, password = _shown(metadata) if payload is None else payload
        # pyarrow repeats the payload of its first handshake beside the header of a second one: the same credential is no other one.
        if payload is not None and _credentials(metadata) and _shown(metadata) not in {payload, (None, password)}:
            raise NotAuthenticated(_SENTENCE, "duplicate")
        caller = self._of_token(password)
        if user is not None and not hmac.compare_digest(caller.principal.encode(), user.encode()):
            raise NotAuthenticated(_SENTENCE, "unknown")
        return caller, password

    def _of_token(self, token: str) -> Caller:
        if not _TOKEN.fullmatch(token):
            raise NotAuthenticated(_SENTENCE, "unknown")
        if self._jwt is not None and token.count(".") == 2:
            return self._jwt.caller(token)
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, caller in self._tokens.get() if self._tokens is not None else ():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise NotAuthenticated(_SENTENCE, "unknown")
        return found


class _Jwt:
    def __init__(self, settings: Settings) -> None:
        self._algorithm = str(settings.arrow_flight_jwt_algorithm)
        self._issuer = settings.arrow_flight_jwt_issuer
        self._audience = settings.arrow_flight_jwt_audience
        self._org_claim = settings.arrow_flight_jwt_org_claim
        self._secret = settings.arrow_flight_jwt_secret
        file = settings.arrow_flight_jwt_jwks_file
        self._keys = None if file is None else Watched("FRAISEQL_ARROW_FLIGHT_JWT_JWKS_FILE", (file,), _parse_jwks)

    def caller(self, token: str) -> Caller:
        try:
            claims = jwt.decode(
                token,
                self._key(token),
                algorithms=[self._algorithm],
                issuer=self._issuer,
                audience=self._audience,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            return _claimed(claims, self._org_claim)
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated(_SENTENCE, "expired") from None
        except jwt.ImmatureSignatureError:
            raise NotAuthenticated(_SENTENCE, "not_yet") from None
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            raise NotAuthenticated(_SENTENCE, "signature") from None
        except jwt.DecodeError:
            raise NotAuthenticated(_SENTENCE, "unknown") from None
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            # PyJWT lets some oddly typed claims, and JSON nested too deeply, through to an error of Python's own.
            raise NotAuthenticated(_SENTENCE, "claims") from None

    def _key(self, token: str) -> Any:
        if self._keys is None:
            return self._secret
        keys = self._keys.get()
        wanted = jwt.get_unverified_header(token).get("kid")
        if wanted is None and len(keys) == 1:
            return next(iter(keys.values()))
        if not isinstance(wanted, str) or wanted not in keys:
            raise NotAuthenticated(_SENTENCE, "signature")
        return keys[wanted]


def _claimed(claims: dict[str, Any], org_claim: str) -> Caller:
    org_id = claims.get(org_claim)
    if org_id != "*" and not (isinstance(org_id, str) and re.fullmatch(UUID_PATTERN, org_id.lower())):
        raise ValueError(org_claim)
    scopes = claims.get("scope", "")
    named = scopes.split() if isinstance(scopes, str) else scopes
    principal = claims["sub"]
    if not isinstance(principal, str) or not principal or _UNWRITABLE.search(principal) or not isinstance(named, list):
        raise ValueError("sub")
    # An issuer may know scopes that mean nothing here.
    granted = frozenset(scope for scope in named if isinstance(scope, str)) & SCOPES
    return Caller(principal, None if org_id == "*" else org_id.lower(), granted)


def _credentials(metadata: Sequence[tuple[str, str | bytes]]) -> list[tuple[str, str | bytes]]:
    return [(name, value) for name, value in metadata if name in {"authorization", TOKEN_HEADER}]


def _credential(metadata: Sequence[tuple[str, str | bytes]]) -> tuple[str, str]:
    found = _credentials(metadata)
    if len(found) != 1:
        raise NotAuthenticated(_SENTENCE, "duplicate" if found else "missing")
    [(name, value)] = found
    text = value.decode("ascii", errors="replace") if isinstance(value, bytes) else value
    if name == TOKEN_HEADER:
        return "bearer", text
    scheme, _, credential = text.strip(_BLANKS).partition(" ")
    return scheme.lower(), credential.strip(_BLANKS)


def _shown(metadata: Sequence[tuple[str, str | bytes]]) -> tuple[str | None, str]:
    """User and password of a handshake's header; no user where it is a bearer token."""
    scheme, credential = _credential(metadata)
    if scheme == "bearer":
        return None, credential
    if scheme != "basic":
        raise NotAuthenticated(_SENTENCE, "scheme")
    return _basic(credential)


def _basic(credential: str) -> tuple[str, str]:
    try:
        user, colon, password = base64.b64decode(credential, validate=True).decode().rpartition(":")
    except (binascii.Error, ValueError):
        colon = user = password = ""
    if not colon:
        raise NotAuthenticated(_SENTENCE, "scheme")
    return user, password


def _parse_tokens(content: bytes) -> list[tuple[bytes, Caller]]:
    tokens = []
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise SettingsError("FRAISEQL_ARROW_FLIGHT_TOKENS_FILE must be UTF-8 text.") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        principal, org_id, scopes, digest = ("", "", "", "", *text.rsplit(":", 3))[-4:]
        granted = frozenset(scopes.split(","))
        if (
            not principal
            or (org_id != "*" and not re.fullmatch(UUID_PATTERN, org_id.lower()))
            or not granted <= SCOPES
            or not re.fullmatch(r"[0-9a-f]{64}", digest)
        ):
            raise SettingsError(
                f"Line {number} of FRAISEQL_ARROW_FLIGHT_TOKENS_FILE must be principal:org_id:scopes:sha256, the org_id a UUID or *, "
                f"the scopes out of {', '.join(sorted(SCOPES))}; fraiseql-pipeline token prints such a line."
            )
        tokens.append((bytes.fromhex(digest), Caller(principal, None if org_id == "*" else org_id.lower(), granted)))
    if not tokens:
        # What an editor leaves for a moment. Whoever wants to let nobody in stops the server.
        raise SettingsError(
            "FRAISEQL_ARROW_FLIGHT_TOKENS_FILE must have a line for each token, and has none; fraiseql-pipeline token prints such a line."
        )
    return tokens


def _parse_jwks(content: bytes) -> dict[str, Any]:
    """Key id → public key of RS256; a key without an id is its place in the list."""
    keys: dict[str, Any] = {}
    try:
        listed = json.loads(content)["keys"]
        for number, key in enumerate(listed):
            if key.get("kty") == "RSA" and key.get("alg", "RS256") == "RS256" and key.get("use", "sig") == "sig" and "d" not in key:
                name = str(key.get("kid", number))
                if name in keys:
                    raise ValueError(name)  # which of them signed would be a guess
                keys[name] = jwt.PyJWK(key, algorithm="RS256").key
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, jwt.PyJWTError):
        keys = {}
    if not keys or any(key.key_size < _MIN_RSA_BITS for key in keys.values()):
        raise SettingsError(
            f"FRAISEQL_ARROW_FLIGHT_JWT_JWKS_FILE must be a JSON Web Key Set with public RSA keys of {_MIN_RSA_BITS} bits or more, each with "
            "an id of its own."
        )
    return keys
