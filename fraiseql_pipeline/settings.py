"""The settings of a run: read once from the environment and an optional TOML file, frozen afterwards.

What lives here: ``Settings``, one field per ``FRAISEQL_…`` name, and the sentence that is shown when a value is wrong. What must not: a
connection, a clock, a read of the environment at import.

The environment wins over the file. All problems are reported at once, and no message repeats a value that may be a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from fraiseql_pipeline.errors import SettingsError, WindowError
from fraiseql_pipeline.window import Window, WindowSize, as_utc, parse_time

#: What an error message must not repeat: they may carry credentials.
_SECRET = frozenset(
    {
        "database_url",
        "lake_options",
        "arrow_flight_jwt_secret",
        "arrow_flight_ticket_key",
        "arrow_flight_token",
        "arrow_flight_url",
    }
)

#: Schemes of object stores; one with less than two slashes behind it would be the name of a directory.
_STORES = "s3a?|gc?s|az|azure|abfss?"

#: HS256 keys shorter than the hash weaken it (RFC 7518, 3.2).
_MIN_SECRET_BYTES = 32


class Settings(BaseSettings):
    """Every setting, its default and its meaning. Build it with ``Settings.load()``; keyword arguments win over everything."""

    model_config = SettingsConfigDict(
        env_prefix="FRAISEQL_",
        frozen=True,
        extra="forbid",  # a misspelt name in the file is an error, not a setting that silently keeps its default
        env_ignore_empty=True,
        str_strip_whitespace=True,
        allow_inf_nan=False,
    )

    database_url: str | None = Field(
        None,
        description="libpq URL of the change log; unset: an embedded Postgres with sample events under ./.fraiseql",
    )
    lake_uri: str = Field("./.fraiseql/lake", description="where the Delta tables are: a path, or an s3://, gs:// or az:// URI")
    lake_options: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="JSON object of storage options for an object store (AWS_ENDPOINT_URL, AWS_REGION, …)"
    )
    window: WindowSize = Field(WindowSize.HOUR, description="size of one window: hour or day")
    start: datetime = Field(
        datetime(2026, 1, 1, tzinfo=UTC),
        description="start of the first window; set, a read of earlier windows that are not published names them as missing",
    )
    max_rejected_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of rejected rows above which a window is halted; 10 rejected rows never halt one, unless the share is 0",
    )
    settle_timeout_seconds: float = Field(
        30.0, ge=0, le=86_400, description="how long to wait for open writers before a run gives up"
    )
    seal_timeout_seconds: float = Field(
        5.0, ge=0, le=86_400, description="how long to wait for open transactions before a window is provisional"
    )
    clock_margin_seconds: float = Field(
        5.0, ge=0, le=86_400, description="how far behind the database clock a window must end to be sealed"
    )
    read_connections: int = Field(2, ge=1, le=32, description="connections that read one window side by side")
    read_timeout_seconds: float = Field(700.0, gt=0, le=86_400, description="how long one read of a window may take in Postgres")
    windows_per_run: int = Field(96, ge=1, le=10_000, description="consecutive windows of a Dagster backfill that share one run")
    arrow_flight_enabled: bool = Field(True, description="whether the Flight server may start")
    arrow_flight_bind: str = Field("127.0.0.1:50051", description="host:port of the Flight server")
    arrow_flight_batch_size: int = Field(10_000, ge=1, le=1_000_000, description="rows per batch where a ticket names none")
    arrow_flight_encoding: Literal["plain+none", "plain+lz4", "plain+zstd", "compact+none", "compact+lz4", "compact+zstd"] = Field(
        "plain+zstd", description="profile and codec of streams where neither ticket, header nor session names them"
    )
    arrow_flight_cache_bytes: int = Field(
        2 * 1024**3, ge=0, description="disk space of encoded frames that are kept to be sent again"
    )
    arrow_flight_cache_dir: str | None = Field(None, description="directory of the kept frames; unset: the system's temporary one")
    arrow_flight_live: bool = Field(
        True,
        description="whether the server follows the change log of FRAISEQL_DATABASE_URL and serves events before they are published",
    )
    arrow_flight_live_bytes: int = Field(
        512 * 1024**2,
        ge=16 * 1024**2,
        description="disk space of events that are not published yet; beyond, they are read from Postgres",
    )
    arrow_flight_locations: str | None = Field(
        None, description="comma-separated grpc:// or grpc+tls:// URIs of the replicas that serve the same lake"
    )
    arrow_flight_ticket_key: str | None = Field(
        None, description="key that signs tickets, shared by replicas; unset: each server makes its own"
    )
    arrow_flight_ticket_seconds: float = Field(3600.0, gt=0, le=86_400 * 365, description="how long a signed ticket is valid")
    arrow_flight_max_streams: int = Field(
        64, ge=1, le=1024, description="streams the Flight server sends at once; one more is refused"
    )
    arrow_flight_max_streams_per_principal: int = Field(
        16, ge=1, le=1024, description="streams one authenticated principal may have at once"
    )
    arrow_flight_max_rows: int | None = Field(None, ge=1, description="most events of one stream or upload; unset: no limit")
    arrow_flight_max_range_days: int | None = Field(
        None, ge=1, description="most days of published windows one ticket may cover; unset: no limit"
    )
    arrow_flight_max_stream_seconds: float = Field(3600.0, gt=0, description="how long one stream may last before it is cut")
    arrow_flight_stall_seconds: float = Field(
        60.0,
        gt=0,
        description="how long a client may keep the server waiting, below the minimum rate or for its next message, before its stream is cut",
    )
    arrow_flight_min_bytes_per_second: int = Field(1024, ge=1, description="minimum rate of a client that keeps the server waiting")
    arrow_flight_drain_seconds: float = Field(30.0, ge=0, description="how long a stopping Flight server lets streams finish")
    arrow_flight_workers: int = Field(1, ge=1, le=64, description="processes of `serve` that share the Flight port")
    arrow_flight_tls_cert: str | None = Field(
        None, description="PEM file of the server's certificate chain; read again when it changes"
    )
    arrow_flight_tls_key: str | None = Field(None, description="PEM file of the certificate's private key")
    arrow_flight_tls_client_ca: str | None = Field(
        None, description="PEM file of the authorities whose client certificates are required (mutual TLS)"
    )
    arrow_flight_tokens_file: str | None = Field(
        None, description="file of bearer tokens, hashed, as `fraiseql-pipeline token` prints them; read again when it changes"
    )
    arrow_flight_jwt_algorithm: Literal["HS256", "RS256"] | None = Field(
        None, description="the one algorithm of accepted JWTs; unset: JWTs are not accepted"
    )
    arrow_flight_jwt_secret: str | None = Field(None, description="key of HS256, 32 bytes or more")
    arrow_flight_jwt_jwks_file: str | None = Field(None, description="JWKS file with the keys of RS256; read again when it changes")
    arrow_flight_jwt_issuer: str | None = Field(None, description="the `iss` a JWT must have")
    arrow_flight_jwt_audience: str | None = Field(None, description="the `aud` a JWT must have")
    arrow_flight_jwt_org_claim: str = Field(
        "org_id", description="claim of a JWT that holds the tenant; `*` in it stands for all tenants"
    )
    arrow_flight_uploads: bool = Field(
        False, description="whether the Flight server takes events of producers (DoPut) into the change log of the database URL"
    )
    arrow_flight_audit_log: str | None = Field(
        None, description="file that gets one JSON line per call, or `stderr`; unset: no audit log"
    )
    arrow_flight_url: str | None = Field(
        None, description="grpc:// or grpc+tls:// URI of the Flight server that Dagster tells of published windows; unset: none"
    )
    arrow_flight_token: str | None = Field(None, description="bearer token for that server, with the scopes `read` and `admin`")
    arrow_flight_root_certs: str | None = Field(
        None, description="PEM file of the authorities to trust for that server; unset: the system's"
    )
    metrics_bind: str = Field("127.0.0.1:8080", description="host:port of Prometheus metrics and health of `serve`; `off`: none")

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
        except OSError:
            raise SettingsError("The configuration file could not be read; this process must be allowed to read it.") from None
        except ValueError as error:
            # tomllib's own errors quote what it could not read; of them, the place is told.
            place = re.search(r" \(at (line \d+, column \d+|end of document)\)$", str(error))
            raise SettingsError(
                f"The configuration file could not be read{place[0] if place else ''}: it must be valid TOML in UTF-8 without a byte order mark."
            ) from None

    @property
    def first_window(self) -> datetime | None:
        """Start of the first window if somebody set it; None stands for "whatever is published first"."""
        return self.start if "start" in self.model_fields_set else None

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

    def __repr_args__(self) -> Iterable[tuple[str | None, object]]:
        """Without the values that a log must not hold."""
        return ((name, "…" if name in _SECRET and value else value) for name, value in super().__repr_args__())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_blanks(cls, value: object) -> object:
        """White space is no path, and an empty text in a file no wish; an empty variable never gets here."""
        if isinstance(value, str) and not value.strip():
            raise ValueError("must not be blank; leave it out for the default")
        return value

    @field_validator("lake_uri")
    @classmethod
    def _check_lake_uri(cls, value: str) -> str:
        if re.match(r"(?i)file:(?!///)", value):
            raise ValueError("must be a path, or start with file:/// and hold an absolute path")
        if found := re.match(rf"({_STORES}|https?):(?!//)", value):
            raise ValueError(f"must be a path, or start with {found[1]}:// and the bucket")
        if "://" not in value and re.search(r"[%\\\x00-\x1f\x7f]", value):
            raise ValueError("must not hold %, a backslash or a control character, which Delta's libraries take for parts of a URL")
        if value.lower().startswith("file:") and re.search("[#?]", value):
            raise ValueError("must not hold # or ?, which end the path of a URL; write it as a path")
        return value

    @field_validator("lake_options", mode="before")
    @classmethod
    def _parse_options(cls, value: object) -> object:
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(isinstance(name, str) and isinstance(option, str) for name, option in value.items()):
            return value
        raise ValueError("must be a JSON object whose values are strings")

    @field_validator("start", mode="before")
    @classmethod
    def _parse_start(cls, value: object) -> object:
        if isinstance(value, date) and not isinstance(value, datetime):  # what TOML makes of 2026-01-01
            value = datetime(value.year, value.month, value.day, tzinfo=UTC)
        try:
            if isinstance(value, datetime):
                return as_utc(value)
            if isinstance(value, str) and not value.startswith("now"):
                return parse_time(value, datetime.max.replace(tzinfo=UTC))
        except (WindowError, OverflowError):
            pass
        raise ValueError("must be an ISO 8601 date or time such as 2026-01-01")

    @field_validator("arrow_flight_locations")
    @classmethod
    def _check_locations(cls, value: str | None) -> str | None:
        if value is not None and not all(re.fullmatch(r"grpc(\+tls|\+tcp)?://[^\s/]+", part.strip()) for part in value.split(",")):
            raise ValueError("must be URIs like grpc://host:port, separated by commas")
        return value

    @field_validator("arrow_flight_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"grpc(\+tls|\+tcp)?://[^\s/@]+", value):
            raise ValueError("must be a URI like grpc://host:port")
        return value

    @property
    def locations(self) -> tuple[str, ...]:
        """The URIs of ``FRAISEQL_ARROW_FLIGHT_LOCATIONS``."""
        return tuple(part.strip() for part in (self.arrow_flight_locations or "").split(",") if part.strip())

    @field_validator("arrow_flight_bind", "metrics_bind")
    @classmethod
    def _check_bind(cls, value: str, info: ValidationInfo) -> str:
        if value == "off" and info.field_name == "metrics_bind":
            return value
        host, _, port = value.rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError("must be host:port")
        return value

    @model_validator(mode="after")
    def _check_start(self) -> Settings:
        try:
            on_boundary = Window.holding(self.start, self.window).start == self.start
        except WindowError:  # the window would end after the year 9999
            on_boundary = False
        if not on_boundary:
            raise ValueError(f"FRAISEQL_START must lie on the {self.window}, got {self.start.isoformat()}")
        return self

    @model_validator(mode="after")
    def _check_ticket_key(self) -> Settings:
        if self.arrow_flight_locations is not None and self.arrow_flight_ticket_key is None:
            raise ValueError(
                "FRAISEQL_ARROW_FLIGHT_TICKET_KEY must be set, the same on all replicas, with FRAISEQL_ARROW_FLIGHT_LOCATIONS"
            )
        if self.arrow_flight_ticket_key is not None and len(self.arrow_flight_ticket_key.encode()) < _MIN_SECRET_BYTES:
            raise ValueError(f"FRAISEQL_ARROW_FLIGHT_TICKET_KEY must have at least {_MIN_SECRET_BYTES} bytes")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if (self.arrow_flight_tls_cert is None) != (self.arrow_flight_tls_key is None):
            raise ValueError("FRAISEQL_ARROW_FLIGHT_TLS_CERT and FRAISEQL_ARROW_FLIGHT_TLS_KEY must be set together")
        if self.arrow_flight_tls_client_ca is not None and self.arrow_flight_tls_cert is None:
            raise ValueError("FRAISEQL_ARROW_FLIGHT_TLS_CLIENT_CA must come with FRAISEQL_ARROW_FLIGHT_TLS_CERT and its key")
        return self

    @model_validator(mode="after")
    def _check_jwt(self) -> Settings:
        secret, jwks = self.arrow_flight_jwt_secret, self.arrow_flight_jwt_jwks_file
        if self.arrow_flight_jwt_algorithm is None:
            if secret is not None or jwks is not None:
                raise ValueError("FRAISEQL_ARROW_FLIGHT_JWT_ALGORITHM must be set to accept JWTs: HS256 or RS256")
            return self
        if self.arrow_flight_jwt_issuer is None or self.arrow_flight_jwt_audience is None:
            raise ValueError("FRAISEQL_ARROW_FLIGHT_JWT_ISSUER and FRAISEQL_ARROW_FLIGHT_JWT_AUDIENCE must be set to accept JWTs")
        if self.arrow_flight_jwt_algorithm == "HS256" and (secret is None or jwks is not None):
            raise ValueError("HS256 must have FRAISEQL_ARROW_FLIGHT_JWT_SECRET and no FRAISEQL_ARROW_FLIGHT_JWT_JWKS_FILE")
        if self.arrow_flight_jwt_algorithm == "RS256" and (jwks is None or secret is not None):
            raise ValueError("RS256 must have FRAISEQL_ARROW_FLIGHT_JWT_JWKS_FILE and no FRAISEQL_ARROW_FLIGHT_JWT_SECRET")
        if secret is not None and len(secret.encode()) < _MIN_SECRET_BYTES:
            raise ValueError(f"FRAISEQL_ARROW_FLIGHT_JWT_SECRET must have at least {_MIN_SECRET_BYTES} bytes")
        return self


def _explain(error: ValidationError) -> str:
    problems: dict[str, str] = {}
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should ").removesuffix(".")
        if not problem["loc"]:
            problems[""] = message
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":  # a misspelt name may hold anything, a password too
            near = _nearest(name)
            problems[name] = f"there is no setting {name[:64]!r}" + (f" (did you mean {near!r}?)" if near else "")
            continue
        if not message.startswith("must "):
            message = "must " + message
        got = "" if name in _SECRET else f", got {str(problem['input'])[:64]!r}"
        problems[name] = f"FRAISEQL_{name.upper()} {message}{got}"
    return "Settings are wrong: " + "; ".join(problems.values()) + "."


# ------------------------------------------------------------------------------------------------------------- misspelt names

#: Variables of this project that are no settings of the package.
_ELSEWHERE = frozenset({"FRAISEQL_DBT_DATABASE", "FRAISEQL_TEST_DSN"})

#: ``difflib``'s measure from which two names are taken for one: 0.9 and more for a letter missing, added, doubled or swapped; other
#: programs' names reach 0.7 (NATS_URL and DATABASE_URL).
_NEAR = 0.78


def unknown_variables(names: Iterable[str]) -> dict[str, str | None]:
    """The variables that begin with ``FRAISEQL_`` and are no setting → the setting that was probably meant, or None.

    FraiseQL itself and its other programs have variables of that prefix too, so one that is like no setting is not a mistake.
    """
    found = sorted({name for name in names if name.upper().startswith("FRAISEQL_") and name.upper() not in _ELSEWHERE})
    bare = {name: name.upper().removeprefix("FRAISEQL_").lower() for name in found}
    unknown = {name: _nearest(short) for name, short in bare.items() if short not in Settings.model_fields}
    return {name: f"FRAISEQL_{near.upper()}" if near else None for name, near in unknown.items()}


def _nearest(name: str) -> str | None:
    """The setting that was probably meant; in a file, names have no prefix."""
    name, known = name.lower().removeprefix("fraiseql_"), list(Settings.model_fields)
    near = get_close_matches(name, known, 1, _NEAR)
    return near[0] if near else next((other for other in known if name and other.startswith(f"{name}_")), None)
