"""Dagster as people run it: a webserver and a daemon as processes of their own, spoken to over GraphQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_ROOT = Path(__file__).parents[2]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Deployment:
    """``url`` of the webserver; ``logs`` of both processes, for when a test fails."""

    url: str
    logs: Path
    processes: Sequence[subprocess.Popen[bytes]]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data that answers a GraphQL query."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        assert "errors" not in found, found["errors"]
        data: dict[str, Any] = found["data"]
        return data

    def until(self, what: str, look: Callable[[], _T | None], seconds: float = 300) -> _T:
        """The first answer of ``look`` that is not ``None``."""
        end = time.monotonic() + seconds
        while (found := look()) is None:
            assert time.monotonic() < end, f"{what} within {seconds} s\n{self.tail()}"
            assert all(process.poll() is None for process in self.processes), f"a process ended before {what}\n{self.tail()}"
            time.sleep(0.5)
        return found

    def tail(self) -> str:
        """The last lines that the processes wrote."""
        return "\n".join(line for log in sorted(self.logs.glob("*.log")) for line in log.read_text().splitlines()[-40:])


@contextmanager
def deployed(directory: Path, environment: Mapping[str, str]) -> Iterator[Deployment]:
    """A webserver and a daemon over the workspace of this checkout, with an instance of their own in ``directory``."""
    home = directory / "dagster"
    home.mkdir()
    shutil.copy(_ROOT / "dagster.dev.yaml", home / "dagster.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workspace = ("-w", str(_ROOT / "workspace.yaml"))
    commands = {
        "webserver": ("dagster-webserver", *workspace, "-h", "127.0.0.1", "-p", str(port)),
        "daemon": ("dagster-daemon", "run", *workspace),
    }
    told = {**os.environ, **environment, "DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "yes", "PYTHONUNBUFFERED": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    deployment = Deployment(f"http://127.0.0.1:{port}", directory, processes)
    try:
        processes.append(_start(directory, "webserver", commands["webserver"], told))
        deployment.until("the webserver answers", lambda: _answers(deployment))
        # Not before: two processes that find no database both create it, and one of them fails.
        processes.append(_start(directory, "daemon", commands["daemon"], told))
        yield deployment
    finally:
        _stop(processes)


def _start(directory: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name(command[0])
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [str(program), *command[1:]],
            cwd=directory,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # The group: code servers and runs are children that would outlive them for a while.
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _answers(deployment: Deployment) -> bool | None:
    try:
        deployment.ask("{ version }")
    except (urllib.error.URLError, ConnectionError):
        return None
    return True
