"""Flight servers as processes of their own, alone or with workers, as ``fraiseql-pipeline serve`` runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

_PROGRAM = """
from fraiseql_pipeline.flight.workers import run
from fraiseql_pipeline.settings import Settings
run(Settings(), started=lambda where: print(where.url, where.metrics_url, flush=True))
"""


class Running(NamedTuple):
    """A server that serves; ``metrics_url`` is that of its metrics port."""

    process: subprocess.Popen[str]
    url: str
    metrics_url: str


Start = Callable[..., Running]
"""Starts a server: ``start(FRAISEQL_…="…")``."""


@contextmanager
def processes(lake_uri: str, first: datetime, directory: Path) -> Iterator[Start]:
    """Servers over a lake whose windows begin with ``first``; ``directory`` for what they keep. All are killed at the end, workers too."""
    running: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> Running:
        chosen = {
            "FRAISEQL_LAKE_URI": lake_uri,
            "FRAISEQL_START": first.isoformat(),
            "FRAISEQL_ARROW_FLIGHT_BIND": "127.0.0.1:0",
            "FRAISEQL_METRICS_BIND": "127.0.0.1:0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TMPDIR": str(directory),
            **environment,
        }
        running.append(subprocess.Popen([sys.executable, "-c", _PROGRAM], env=chosen, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        url, metrics_url = running[-1].stdout.readline().split()
        return Running(running[-1], url, metrics_url)

    try:
        yield start
    finally:
        for process in running:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for child in [*children, process]:
                child.kill()
            process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that share the port of a server; none where it serves alone."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found
