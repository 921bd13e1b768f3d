"""TLS: the PEM files of the settings → credentials of the gRPC server.

What lives here: reading, checking and renewing certificates. What must not: who a client is (``auth.py``).

Invariants
 1. A certificate that changed on disk is used from the next connection on; running streams keep theirs.
 2. Files that do not fit together never replace files that do.
"""

from __future__ import annotations

from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.flight.watched import Watched
from fraiseql_pipeline.settings import Settings

_NAMES = "FRAISEQL_ARROW_FLIGHT_TLS_CERT, _TLS_KEY and _TLS_CLIENT_CA"


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What the settings ask for; None: no TLS. Raises ``SettingsError`` for files that are missing or do not fit together."""
    if settings.arrow_flight_tls_cert is None or settings.arrow_flight_tls_key is None:
        return None
    authorities = settings.arrow_flight_tls_client_ca
    files = (settings.arrow_flight_tls_cert, settings.arrow_flight_tls_key, *(() if authorities is None else (authorities,)))
    watched = Watched(_NAMES, files, _configuration)
    given = watched.get()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        newest = watched.get()
        if newest is given:
            return None
        given = newest
        return newest

    # The stubs forget that a fetcher may answer None: nothing new.
    fetcher: Any = fetch
    return grpc.dynamic_ssl_server_credentials(given, fetcher, require_client_authentication=authorities is not None)


def _configuration(chain: bytes, key: bytes, authorities: bytes | None = None) -> grpc.ServerCertificateConfiguration:
    # gRPC takes anything here and fails every handshake later.
    try:
        certificate, *_ = x509.load_pem_x509_certificates(chain)
        fits = load_pem_private_key(key, password=None).public_key() == certificate.public_key()
        if authorities is not None:
            x509.load_pem_x509_certificates(authorities)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        raise SettingsError(f"{_NAMES} must be PEM files that fit together; the key must be the certificate's, without a password.")
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=authorities)
