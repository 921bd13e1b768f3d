"""The environment wins over the file, all problems are told at once, and no message repeats what may be a secret."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.settings import Settings, unknown_variables
from fraiseql_pipeline.window import WindowSize

SECRET = "hunter2-canary"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("FRAISEQL_")]:
        monkeypatch.delenv(name)


def refusal(config: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(SettingsError) as refused:
        Settings.load(config, **overrides)
    assert refused.value.__cause__ is None
    return str(refused.value)


def write(directory: Path, text: str) -> Path:
    config = directory / "settings.toml"
    config.write_text(text)
    return config


def test_nothing_needs_to_be_set() -> None:
    chosen = Settings.load()
    assert chosen.database_url is None
    assert (chosen.window, chosen.start) == (WindowSize.HOUR, datetime(2026, 1, 1, tzinfo=UTC))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_WINDOW", "day")
    monkeypatch.setenv("FRAISEQL_START", "2026-02-01")
    monkeypatch.setenv("FRAISEQL_LAKE_OPTIONS", '{"AWS_REGION": "eu-west-1"}')
    monkeypatch.setenv("FRAISEQL_DATABASE_URL", " postgresql://db/app ")
    chosen = Settings.load()
    assert chosen.window is WindowSize.DAY
    assert chosen.start == datetime(2026, 2, 1, tzinfo=UTC)
    assert chosen.lake_options == {"AWS_REGION": "eu-west-1"}
    assert chosen.database_url == "postgresql://db/app"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_DATABASE_URL", "")
    monkeypatch.setenv("FRAISEQL_WINDOW", "")
    assert Settings.load() == Settings()


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, 'lake_uri = "file"\nread_connections = 3\nwindow = "day"\n[lake_options]\nAWS_REGION = "eu"\n')
    monkeypatch.setenv("FRAISEQL_LAKE_URI", "environment")
    monkeypatch.setenv("FRAISEQL_READ_CONNECTIONS", "4")
    chosen = Settings.load(config, lake_uri="argument")
    assert (chosen.lake_uri, chosen.read_connections, chosen.window, chosen.lake_options) == (
        "argument",
        4,
        "day",
        {"AWS_REGION": "eu"},
    )
    assert isinstance(chosen, Settings)


def test_a_file_leaves_no_trace_in_the_next_load(tmp_path: Path) -> None:
    Settings.load(write(tmp_path, 'lake_uri = "file"'))
    assert Settings.load().lake_uri == Settings().lake_uri != "file"


@pytest.mark.parametrize(
    "said", ["2026-02-01", "2026-02-01T00:00:00", "2026-02-01T00:00:00Z", "2026-02-01 00:00:00", "2026-02-01T01:00:00+01:00"]
)
def test_a_start_is_an_instant_in_utc_however_it_is_written(said: str, tmp_path: Path) -> None:
    quoted, bare = Settings.load(write(tmp_path, f'start = "{said}"')), Settings.load(write(tmp_path, f"start = {said}"))
    assert quoted.start == bare.start == Settings.load(start=said).start == datetime(2026, 2, 1, tzinfo=UTC)
    assert quoted.start.tzinfo is bare.start.tzinfo is UTC


@pytest.mark.parametrize(
    "said", ["now-1d", "1767225600", "soon", "0001-01-01T00:00:00+01:00", 5, datetime.min.replace(tzinfo=UTC).date]
)
def test_a_start_must_be_a_time_of_its_own(said: object) -> None:
    assert "FRAISEQL_START must be an ISO 8601 date or time" in refusal(start=said)


def test_the_start_must_lie_on_a_window() -> None:
    assert (
        refusal(start="2026-01-01T00:30")
        == "Settings are wrong: FRAISEQL_START must lie on the hour, got 2026-01-01T00:30:00+00:00."
    )
    assert "FRAISEQL_START must lie on the day" in refusal(start="2026-01-01T01:00", window="day")
    assert "FRAISEQL_START must lie on the day" in refusal(start="9999-12-31", window="day")


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_WINDOW", "week")
    monkeypatch.setenv("FRAISEQL_MAX_REJECTED_SHARE", "2")
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_BIND", "localhost")
    monkeypatch.setenv("FRAISEQL_ARROW_FLIGHT_BATCH_SIZE", "0")
    assert refusal() == (
        "Settings are wrong: FRAISEQL_WINDOW must be 'hour' or 'day', got 'week'; "
        "FRAISEQL_MAX_REJECTED_SHARE must be less than or equal to 1, got '2'; "
        "FRAISEQL_ARROW_FLIGHT_BIND must be host:port, got 'localhost'; "
        "FRAISEQL_ARROW_FLIGHT_BATCH_SIZE must be greater than or equal to 1, got '0'."
    )


@pytest.mark.parametrize("bind", [":50051", "host:", "host:port", "host:65536", "host:²", "host:-1", "host:000050051"])
def test_a_bind_must_be_host_and_port(bind: str) -> None:
    assert "FRAISEQL_ARROW_FLIGHT_BIND must be host:port" in refusal(arrow_flight_bind=bind)


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "[::1]:50051", "flight.example.org:65535"])
def test_names_and_both_families_of_addresses_can_be_bound(bind: str) -> None:
    assert Settings.load(arrow_flight_bind=bind).arrow_flight_bind == bind


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.annotation is float])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon"])
def test_a_duration_or_share_must_be_a_finite_number_from_zero(name: str, value: str) -> None:
    assert f"FRAISEQL_{name.upper()} must be " in refusal(**{name: value})


def test_a_misspelt_name_in_the_file_is_an_error(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, f'databse_url = "postgresql://app:{SECRET}@db/app"\nwidnow = "day"'))
    assert message == (
        "Settings are wrong: there is no setting 'databse_url' (did you mean 'database_url'?); "
        "there is no setting 'widnow' (did you mean 'window'?)."
    )


def test_variables_of_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_OBSERVER_TRANSPORT", "postgres")
    assert Settings.load() == Settings()
    assert unknown_variables(["FRAISEQL_OBSERVER_TRANSPORT", "FRAISEQL_NATS_URL"]) == dict.fromkeys(
        ["FRAISEQL_NATS_URL", "FRAISEQL_OBSERVER_TRANSPORT"]
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FRAISEQL_DATABSE_URL", "FRAISEQL_DATABASE_URL"),
        ("FRAISEQL_DATABASE", "FRAISEQL_DATABASE_URL"),
        ("FRAISEQL_LAKE_URL", "FRAISEQL_LAKE_URI"),
        ("FRAISEQL_ARROW_FLIGHT_BNID", "FRAISEQL_ARROW_FLIGHT_BIND"),
        ("fraiseql_widnow", "FRAISEQL_WINDOW"),
    ],
)
def test_a_variable_that_is_almost_a_setting_is_found(name: str, meant: str) -> None:
    assert unknown_variables([name, meant, "FRAISEQL_TEST_DSN", "PATH"]) == {name: meant}


@pytest.mark.parametrize("uri", ["s3:/bucket/lake", "s3:bucket", "gs:/bucket", "https:/host/path"])
def test_a_store_with_a_slash_too_few_is_no_directory(uri: str) -> None:
    assert "FRAISEQL_LAKE_URI must be a path, or start with" in refusal(lake_uri=uri)


@pytest.mark.parametrize("uri", ["file:lake", "file://lake/x", "file://./lake"])
def test_a_file_uri_holds_an_absolute_path(uri: str) -> None:
    with pytest.raises(SettingsError, match="must be a path, or start with file:/// and hold an absolute path"):
        Settings.load(lake_uri=uri)


def test_white_space_is_no_value_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blank.toml").write_text('database_url = ""')
    with pytest.raises(SettingsError, match="FRAISEQL_DATABASE_URL must not be blank; leave it out for the default"):
        Settings.load(tmp_path / "blank.toml")
    monkeypatch.setenv("FRAISEQL_LAKE_URI", " ")
    with pytest.raises(SettingsError, match="FRAISEQL_LAKE_URI must not be blank"):
        Settings.load()


@pytest.mark.parametrize("uri", ["lake%20of/events", "lake\\events", "lake\nevents", "file:///lake#1", "file:///lake?1"])
def test_a_path_that_is_read_in_two_ways_is_refused(uri: str) -> None:
    assert "FRAISEQL_LAKE_URI must not hold" in refusal(lake_uri=uri)


@pytest.mark.parametrize("uri", ["s3://bucket/lake", "./lake", "/data/2026-11-01T10:00/lake", "file:///lake", "s3/lake"])
def test_a_lake_is_a_path_or_a_store(uri: str) -> None:
    assert Settings.load(lake_uri=uri).lake_uri == uri


@pytest.mark.parametrize("options", ["{", "[]", "5", '{"AWS_SECRET_ACCESS_KEY": 5}', "{" + SECRET, '{"a":' * 5000, f'["{SECRET}"]'])
def test_wrong_lake_options_are_told_without_their_text(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAISEQL_LAKE_OPTIONS", options)
    assert refusal() == "Settings are wrong: FRAISEQL_LAKE_OPTIONS must be a JSON object whose values are strings."


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'database_url = "{SECRET}', " (at end of document)"),
        (f"{SECRET}", " (at end of document)"),
        ("\x00", " (at line 1, column 1)"),
        (f"window = 'day'\n'{SECRET}' = ?", " (at line 2, column {})"),
        ("lake_options = {a = ", " (at end of document)"),
        ("\ufeffwindow = 'day'", " (at line 1, column 1)"),
    ],
)
def test_a_broken_file_is_told_with_the_place_and_without_its_text(text: str, place: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, text))
    wanted = place.format(len(SECRET) + 6)
    assert message == f"The configuration file could not be read{wanted}: it must be valid TOML in UTF-8 without a byte order mark."


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_bytes(b"\xff\xfe\x00")
    assert refusal(config).endswith("must be valid TOML in UTF-8 without a byte order mark.")


def test_a_file_that_cannot_be_read_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, "window = 'day'")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(config))

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(config) == "The configuration file could not be read; this process must be allowed to read it."


def test_a_missing_file_is_told_by_its_name_alone(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent.toml")
    assert "'absent.toml' does not exist" in message
    assert str(tmp_path) not in message


@given(
    st.dictionaries(
        st.sampled_from(sorted(Settings.model_fields)),
        st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none(),
    )
)
def test_any_values_are_settings_or_a_settings_error(values: dict[str, Any]) -> None:
    for name in ("database_url", "lake_options"):
        if name in values:
            values[name] = [SECRET, values[name]]
    try:
        Settings.load(**values)
    except SettingsError as error:
        assert SECRET not in str(error)  # noqa: PT017  either outcome is right


def test_settings_do_not_change() -> None:
    chosen = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        chosen.lake_uri = "elsewhere"


def test_every_setting_says_what_it_means() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.description.endswith("."), name


def test_what_a_log_prints_of_settings_holds_no_secret() -> None:
    settings = Settings(
        database_url=f"postgresql://app:{SECRET}@db/app", lake_options={"secret": SECRET}, arrow_flight_token=SECRET
    )
    assert SECRET not in repr(settings) + str(settings)
    assert "lake_uri" in repr(settings)
