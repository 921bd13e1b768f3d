"""The settings of a run: read once from the environment and an optional TOML file, frozen afterwards.

What lives here: ``Settings``, one field per ``FRAISEQL_…`` name, and the sentence that is shown when a value is wrong. What must not: a
connection, a clock, a read of the environment at import.

The environment wins over the file. All problems are reported at once, and no message repeats a value that may be a secret.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, Json, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from fraiseql_pipeline.errors import SettingsError, WindowError
from fraiseql_pipeline.window import Window, WindowSize, parse_time

#: What an error message must not repeat: they may carry credentials.
_SECRET = frozenset({"database_url", "lake_options"})


class Settings(BaseSettings):
    """Every setting, its default and its meaning. Build it with ``Settings.load()``; keyword arguments win over everything."""

    model_config = SettingsConfigDict(env_prefix="FRAISEQL_", frozen=True, extra="ignore", env_ignore_empty=True, str_strip_whitespace=True)

    database_url: str | None = Field(None, description="libpq URL of the change log; unset: an embedded Postgres with sample events")
    lake_uri: str = Field("./.fraiseql/lake", description="where the Delta tables are: a path, or an s3://, gs:// or az:// URI")
    lake_options: Json[dict[str, str]] | dict[str, str] = Field(
        default_factory=dict, description="JSON object of storage options for an object store (AWS_ENDPOINT_URL, AWS_REGION, …)"
    )
    window: WindowSize = Field(WindowSize.HOUR, description="size of one window: hour or day")
    start: datetime = Field(datetime(2026, 1, 1, tzinfo=UTC), description="start of the first window")
    max_rejected_share: float = Field(0.05, ge=0, le=1, description="share of rejected rows above which a window is halted")
    settle_timeout_seconds: float = Field(30.0, ge=0, description="how long to wait for open writers before a run gives up")
    seal_timeout_seconds: float = Field(5.0, ge=0, description="how long to wait for open transactions before a window is provisional")
    clock_margin_seconds: float = Field(5.0, ge=0, description="how far behind the database clock a window must end to be sealed")
    read_connections: int = Field(2, ge=1, le=32, description="connections that read one window side by side")
    read_timeout_seconds: float = Field(700.0, gt=0, description="how long one read of a window may take in Postgres")
    arrow_flight_enabled: bool = Field(True, description="whether the Flight server may start")
    arrow_flight_bind: str = Field("127.0.0.1:50051", description="host:port of the Flight server")
    arrow_flight_batch_size: int = Field(10_000, ge=1, le=1_000_000, description="rows per batch where a ticket names none")

    @classmethod
    def load(cls, config: Path | None = None, **overrides: Any) -> Settings:
        """The settings of this process; ``config`` is a TOML file with the same names in lower case, without the prefix.

        Raises ``SettingsError`` that names every wrong setting.
        """
        if config is not None and not config.is_file():
            raise SettingsError(f"The configuration file {config.name!r} does not exist; pass an existing TOML file.")
        # The file differs from call to call, pydantic-settings takes it from the class: so the class is made for the call.
        chosen = cls if config is None else type(cls.__name__, (cls,), {"model_config": {**cls.model_config, "toml_file": config}})
        try:
            return chosen(**overrides)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None
        except ValueError:  # tomllib's and the environment parser's own errors quote what they could not read
            raise SettingsError("The settings could not be read; the configuration file must be valid TOML.") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("start", mode="before")
    @classmethod
    def _parse_start(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse_time(value, datetime.max.replace(tzinfo=UTC)) if not value.startswith("now") else value
        except WindowError as error:
            raise ValueError(str(error)) from None

    @field_validator("arrow_flight_bind")
    @classmethod
    def _check_bind(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"must be host:port, got {value!r}")
        return value

    @model_validator(mode="after")
    def _check_start(self) -> Settings:
        if Window.holding(self.start, self.window).start != self.start:
            raise ValueError(f"start must lie on the {self.window}, got {self.start.isoformat()}")
        return self


def _explain(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        got = "" if name in _SECRET or not name else f", got {str(problem['input'])[:64]!r}"
        message = problem["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        problems.append(f"FRAISEQL_{name.upper()}: {message}{got if 'got' not in message else ''}" if name else f"FRAISEQL_{message}")
    return "Settings are wrong: " + "; ".join(problems) + "."
