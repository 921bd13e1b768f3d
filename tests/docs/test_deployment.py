"""The files of deploy/ fit the code: settings, commands, options, paths. No image is built and no container started here."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import dagster as dg
import pytest
import yaml

from assets.definitions import definitions
from fraiseql_pipeline.cli import main
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.docs.blocks import ROOT
from tests.support.code_location import write

DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"] == "fraiseql-pipeline")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DRAIN_SECONDS = Settings.model_fields["arrow_flight_drain_seconds"].default


def variables(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolated(value: str, given: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+):[-?][^}]*\}", lambda found: given[found[1]], value)


def settings_of(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a process with this environment has as settings; names that are none fail."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours = {name for name in environment if name.startswith("FRAISEQL_")}
    assert ours <= {f"FRAISEQL_{name.upper()}" for name in Settings.model_fields}
    return Settings.load()


@cache
def help_of(*command: str) -> str:
    """What a command of Dagster's says of itself; in this process, which has loaded Dagster already."""
    (program,) = entry_points(group="console_scripts", name=command[0])
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(told), pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", [*command, "--help"])
        program.load()()
    assert ended.value.code == 0
    return told.getvalue()


def check_command(words: list[str]) -> None:
    """A command exists and takes the options it is given."""
    program, *arguments = words
    name = Path(program).name
    if name == "fraiseql-pipeline":
        command: click.Command = main
        while isinstance(command, click.Group):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(name, arguments)
        return
    verbs = [] if not arguments or arguments[0].startswith("-") else arguments[: 2 if name == "dagster" else 1]
    told = help_of(name, *verbs)
    for option in (word for word in arguments if word.startswith("-")):
        assert re.search(rf"(^|[\s,]){re.escape(option)}[,\s]", told), f"{name} {' '.join(verbs)} has no {option}"


@pytest.mark.parametrize("service", OURS)
def test_a_service_has_settings_that_are_understood(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(DEPLOY / "env.example")
    environment = {name: interpolated(value, given) for name, value in SERVICES[service]["environment"].items()}
    settings = settings_of(environment, monkeypatch)
    assert settings.database_url == given["FRAISEQL_DATABASE_URL"]
    assert settings.arrow_flight_url is None


def test_everything_that_the_compose_file_asks_of_its_environment_is_in_the_example() -> None:
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE))
    assert asked == variables(DEPLOY / "env.example").keys()


@pytest.mark.parametrize("service", OURS)
def test_a_service_runs_a_command_that_exists(service: str) -> None:
    check_command(SERVICES[service]["command"])
    _, *check = SERVICES[service]["healthcheck"]["test"]
    if check[0] == "python":
        compile(check[2], "healthcheck", "exec")
    else:
        check_command(check)


@pytest.mark.parametrize("service", OURS)
def test_a_path_that_a_service_names_is_on_one_of_its_volumes(service: str) -> None:
    mounted = [volume.split(":")[1] for volume in SERVICES[service]["volumes"]]
    named = [value for value in SERVICES[service]["environment"].values() if value.startswith("/")]
    assert named
    for path in named:
        assert any(path == at or path.startswith(f"{at}/") for at in mounted), path


def test_a_volume_that_a_service_mounts_is_declared_or_lies_beside_the_file() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert source == "./secrets" or (DEPLOY / source).is_file()
            else:
                assert source in yaml.safe_load(COMPOSE)["volumes"]


def test_the_flight_server_has_longer_to_end_than_its_streams() -> None:
    assert int(SERVICES["flight"]["stop_grace_period"].rstrip("s")) > DRAIN_SECONDS
    unit = (DEPLOY / "systemd" / "fraiseql-flight.service").read_text(encoding="utf-8")
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)[0]) > DRAIN_SECONDS


def copied() -> list[str]:
    return [word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()]


def test_the_builder_gets_what_the_image_copies() -> None:
    let_through = set(re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(copied()) == let_through
    assert SERVICES["flight"]["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"}


def test_the_image_installs_an_extra_that_there_is_with_the_pins() -> None:
    (extras,) = re.findall(r"^RUN pip install .*-c constraints\.txt '\.\[([\w,]+)\]'$", DOCKERFILE, flags=re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", DOCKERFILE, flags=re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


def test_the_package_of_the_image_is_that_of_the_checkout(tmp_path: Path) -> None:
    there = tmp_path / "image"
    there.mkdir()
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, there / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, there / name)
    names = []
    for root in (ROOT, there):
        at = tmp_path / f"wheel-{len(names)}"
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(at)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (wheel,) = at.glob("*.whl")
        names.append(sorted(zipfile.ZipFile(wheel).namelist()))
    assert names[0] == names[1]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_runs_commands_that_exist(unit: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    assert "EnvironmentFile=/etc/fraiseql/pipeline.env" in text
    commands = re.findall(r"^ExecStart=(.+)$", text, flags=re.MULTILINE)
    assert len(commands) == (2 if unit.stem == "fraiseql-nightly" else 1)
    for command in commands:
        check_command(shlex.split(command))


def words_of(unit: str, key: str) -> set[str]:
    text = (DEPLOY / "systemd" / f"{unit}.service").read_text(encoding="utf-8")
    return {word for line in re.findall(rf"^{key}=(.+)$", text, flags=re.MULTILINE) for word in line.split()}


def test_late_events_are_added_after_the_windows_whatever_became_of_these() -> None:
    """Of two commands of one unit, the second is not run where the first fails."""
    assert "fraiseql-late.service" in words_of("fraiseql-windows", "Wants")
    assert "fraiseql-windows.service" in words_of("fraiseql-late", "After")
    assert not words_of("fraiseql-late", "(?:Requires|Requisite|BindsTo)")


def test_the_environment_of_the_units_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(variables(DEPLOY / "systemd" / "pipeline.env"), monkeypatch)
    assert settings.arrow_flight_tls_cert is not None


def test_a_timer_starts_a_unit_and_is_in_the_document() -> None:
    timers = list((DEPLOY / "systemd").glob("*.timer"))
    assert {timer.stem for timer in timers} == {"fraiseql-windows", "fraiseql-nightly"}
    for file in [*timers, *UNITS]:
        assert f"(../deploy/systemd/{file.name})" in PAGE
        assert file.suffix == ".service" or file.with_suffix(".service").is_file()


def test_the_instance_that_is_shown_is_one(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_monitoring_enabled
        assert instance.run_monitoring_max_runtime_seconds == 6 * 3600
        assert not instance.telemetry_enabled


def test_what_the_document_switches_on_is_there_and_off_before() -> None:
    defs = definitions(Settings())
    schedules = {one.name: one.default_status for one in defs.schedules or ()}
    sensors = {one.name: one.default_status for one in defs.sensors or ()}
    assert set(re.findall(r"dagster schedule start (\w+)", PAGE)) == schedules.keys()
    assert set(re.findall(r"dagster sensor start (\w+)", PAGE)) == sensors.keys()
    assert {status.value for status in (*schedules.values(), *sensors.values())} == {"STOPPED"}


def test_commands_of_dagster_in_the_document_exist() -> None:
    found = re.findall(r"exec daemon (dagster .+)$", PAGE, flags=re.MULTILINE)
    assert found
    for command in found:
        check_command(shlex.split(command))


# ------------------------------------------------------------------------------------------------------------- Airflow


class Node:
    """What Airflow makes of a task that is called in a DAG."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name, self.arguments, self.after = name, arguments, None

    def __rshift__(self, other: Node) -> Node:
        other.after = self.name
        return other


@pytest.fixture
def dag(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[Node], dict[str, Any]]:
    """The module of the DAG, the nodes it made, and what it says of itself, with stand-ins for Airflow's two decorators."""
    nodes: list[Node] = []
    said: dict[str, Any] = {}

    def task(**_: Any) -> Any:
        def of(body: Any) -> Any:
            def called(**arguments: Any) -> Node:
                nodes.append(Node(body.__name__, arguments))
                return nodes[-1]

            called.function = body  # type: ignore[attr-defined]
            return called

        return of

    def dag_of(**options: Any) -> Any:
        said.update(options)
        return lambda body: body

    sdk = ModuleType("airflow.sdk")
    sdk.dag, sdk.task = dag_of, task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "airflow", ModuleType("airflow"))
    monkeypatch.setitem(sys.modules, "airflow.sdk", sdk)
    spec = importlib.util.spec_from_file_location("fraiseql_events", DEPLOY / "airflow" / "fraiseql_events.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, nodes, said


def test_the_tasks_of_the_dag_publish_what_has_ended_and_what_came_late(
    dag: tuple[ModuleType, list[Node], dict[str, Any]], changelog_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, nodes, said = dag
    # One that waited for the other would not run where that failed.
    assert [(node.name, node.after) for node in nodes] == [("publish", None), ("add_late", None)]
    assert said["catchup"] is False
    monkeypatch.setenv("FRAISEQL_DATABASE_URL", changelog_url)
    monkeypatch.setenv("FRAISEQL_LAKE_URI", str(tmp_path / "lake"))
    window = Window.holding(datetime.now(UTC) - timedelta(hours=1), WindowSize.HOUR)
    write(changelog_url, window, 3)

    publish, add_late = module.publish.function, module.add_late.function
    begun = Window.holding(datetime.now(UTC), WindowSize.HOUR)
    first = publish(**nodes[0].arguments)
    assert len(first) == 3
    assert sum(first.values()) == 3
    version = Lake(str(tmp_path / "lake")).snapshot().version
    again = publish(**nodes[0].arguments)
    if Window.holding(datetime.now(UTC), WindowSize.HOUR) == begun:  # else another hour has ended meanwhile
        assert (again, Lake(str(tmp_path / "lake")).snapshot().version) == (first, version)

    assert add_late() == []
    write(changelog_url, window, 2)
    assert add_late() == [window.key]

    monkeypatch.setenv("FRAISEQL_START", window.end.isoformat())
    ended = Window.holding(datetime.now(UTC) - window.size.duration, window.size)
    assert set(publish(**nodes[0].arguments)) <= {ended.key} - {window.key}  # another hour may have ended meanwhile
