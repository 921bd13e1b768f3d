"""The resources ``fraiseql`` and ``flight``: where change log, lake and Flight server are, and the library's own objects made from that.

What lives here: configuration that a deployment may bind (``dg.EnvVar`` where it is a secret), and methods that vend plain objects.
What must not: a connection or a read of the environment before a run asks for one. Nothing is opened when the resource is initialized:
opening is part of the step, so a source that is down for a minute is retried like any other failure of the step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from pydantic import Field

from fraiseql_pipeline.changelog import ChangeLog, open_changelog
from fraiseql_pipeline.flight.client import Client, connect
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings


class FraiseQL(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The library as a run is configured: by ``FRAISEQL_…`` in its environment, by a TOML file, and above both by what is bound here."""

    config_file: str | None = Field(default=None, description="TOML file with settings")
    database_url: str | None = Field(
        default=None, description="libpq URL of the change log; bind dg.EnvVar, it is shown in the UI otherwise"
    )
    lake_uri: str | None = Field(default=None, description="where the Delta tables are")

    def settings(self) -> Settings:
        bound = {"database_url": self.database_url, "lake_uri": self.lake_uri}
        return Settings.load(
            Path(self.config_file) if self.config_file else None, **{k: v for k, v in bound.items() if v is not None}
        )

    @contextmanager
    def changelog(self) -> Iterator[ChangeLog]:
        """The change log in Postgres; without a database URL an embedded server with sample events."""
        with open_changelog(self.settings(), samples=True) as changelog:
            yield changelog

    def lake(self) -> Lake:
        """The Delta tables; nothing is touched before the first read or commit."""
        return Lake.of(self.settings())


class Flight(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The Flight server that is told of published windows: ``FRAISEQL_ARROW_FLIGHT_URL`` and ``_TOKEN``, and above them what is bound here.

    Without a URL there is none, and nothing happens. ``profile`` is the encoding that is made ahead; none: the server's default, which is
    what clients get that ask for nothing else.
    """

    url: str | None = Field(default=None, description="grpc:// or grpc+tls:// URI; an empty one: no server")
    token: str | None = Field(default=None, description="bearer token; bind dg.EnvVar, it is shown in the UI otherwise")
    profile: str | None = Field(default=None, description="encoding to make ahead, such as compact or plain+lz4")
    tls_root_certs: str | None = Field(default=None, description="PEM file of the authorities to trust")
    tls_cert_chain: str | None = Field(default=None, description="PEM file of this client's certificate, for mutual TLS")
    tls_private_key: str | None = Field(default=None, description="PEM file of its private key")
    timeout_seconds: float = Field(default=300.0, gt=0, description="how long one call may take, the stream of a window included")

    def client(self, settings: Settings) -> Client | None:
        """A client, not yet connected; None where no server is configured."""
        url = settings.arrow_flight_url if self.url is None else self.url
        if not url:
            return None
        return connect(
            url,
            token=self.token or settings.arrow_flight_token,
            profile=self.profile,
            timeout_seconds=self.timeout_seconds,
            tls_root_certs=self.tls_root_certs or settings.arrow_flight_root_certs,
            cert_chain=self.tls_cert_chain,
            private_key=self.tls_private_key,
        )
