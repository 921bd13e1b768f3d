"""The resource ``fraiseql``: where the change log and the lake are, and the library's own objects made from that.

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
        with open_changelog(self.settings()) as changelog:
            yield changelog

    def lake(self) -> Lake:
        """The Delta tables; nothing is touched before the first read or commit."""
        return Lake.of(self.settings())
