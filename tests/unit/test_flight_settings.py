"""What the server's settings must have together: half of TLS or of a JWT set-up is a mistake, and no message repeats a secret."""

from __future__ import annotations

import os

import pytest

from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.settings import Settings

SECRET = "hunter2-canary, long enough for HS256 to accept it"
HS256 = {
    "arrow_flight_jwt_algorithm": "HS256",
    "arrow_flight_jwt_secret": SECRET,
    "arrow_flight_jwt_issuer": "https://issuer.test",
    "arrow_flight_jwt_audience": "flight",
}
RS256 = {**HS256, "arrow_flight_jwt_algorithm": "RS256", "arrow_flight_jwt_secret": None, "arrow_flight_jwt_jwks_file": "jwks.json"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("FRAISEQL_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("chosen", [HS256, RS256, {"metrics_bind": "off"}, {"metrics_bind": "[::]:9090"}])
def test_what_belongs_together_is_accepted(chosen: dict[str, str | None]) -> None:
    assert Settings.load(**chosen)


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"arrow_flight_tls_cert": "c.pem"}, "_TLS_CERT and FRAISEQL_ARROW_FLIGHT_TLS_KEY must be set together"),
        ({"arrow_flight_tls_key": "k.pem"}, "_TLS_CERT and FRAISEQL_ARROW_FLIGHT_TLS_KEY must be set together"),
        ({"arrow_flight_tls_client_ca": "ca.pem"}, "_TLS_CLIENT_CA must come with"),
        ({"arrow_flight_jwt_secret": SECRET}, "_JWT_ALGORITHM must be set"),
        ({**HS256, "arrow_flight_jwt_issuer": None}, "_JWT_ISSUER and FRAISEQL_ARROW_FLIGHT_JWT_AUDIENCE must be set"),
        ({**HS256, "arrow_flight_jwt_audience": None}, "_JWT_ISSUER and FRAISEQL_ARROW_FLIGHT_JWT_AUDIENCE must be set"),
        ({**HS256, "arrow_flight_jwt_secret": None}, "HS256 must have"),
        ({**HS256, "arrow_flight_jwt_jwks_file": "jwks.json"}, "HS256 must have"),
        ({**HS256, "arrow_flight_jwt_secret": SECRET[:31]}, "_JWT_SECRET must have at least 32 bytes"),
        ({**RS256, "arrow_flight_jwt_secret": SECRET}, "RS256 must have"),
        ({**HS256, "arrow_flight_jwt_algorithm": "none"}, "_JWT_ALGORITHM must be 'HS256' or 'RS256'"),
        ({"metrics_bind": "8080"}, "FRAISEQL_METRICS_BIND must be host:port"),
        ({"arrow_flight_bind": "off"}, "FRAISEQL_ARROW_FLIGHT_BIND must be host:port"),
        ({"arrow_flight_workers": 0}, "FRAISEQL_ARROW_FLIGHT_WORKERS must be"),
    ],
)
def test_half_of_it_is_refused_in_one_sentence(chosen: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(**chosen)
    assert sentence in str(refused.value)
    assert "hunter2" not in str(refused.value)
