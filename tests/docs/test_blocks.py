"""What the documents show works: every shell and Python block is run, in its order, or says why it is not."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks, documents
from tests.support.credentials import make_credentials

BLOCKS = [block for document in documents() for block in blocks(document)]
RUN = [block for block in BLOCKS if block.why_not is None]

pytestmark = pytest.mark.timeout(300)

#: What starts each kind of server, besides where it listens.
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "server": (["serve"], {}),
    "secured": (["--config", "flight.toml", "serve"], {}),
    "mutual": (["--config", "flight.toml", "serve"], {"FRAISEQL_ARROW_FLIGHT_TLS_CLIENT_CA": "ca.pem"}),
}


class Reader:
    """A reader at a keyboard: one directory with nothing but the examples in it, the package installed, nothing configured."""

    def __init__(self, at: Path, made: Path, held: ExitStack) -> None:
        self.at = at
        self._made = made
        (at / "examples").symlink_to(ROOT / "examples")
        self._held = held
        self._addresses: dict[str, str] = {}
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("FRAISEQL_", "PYTHON", "DAGSTER_"))}
        self.environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "PYTHONWARNINGS": "default",
        }

    def run(self, block: Block) -> subprocess.CompletedProcess[str]:
        environment = self.environment
        if block.needs:
            self.lake()
        if block.needs in SERVERS:
            address = self.server(block.needs)
            block = replace(block, code=block.code.replace("localhost:50051", address))
            environment = {**environment, "FRAISEQL_ARROW_FLIGHT_BIND": address}
        return subprocess.run(block.command, cwd=self.at, env=environment, capture_output=True, text=True, check=False)

    def lake(self) -> None:
        """A lake with the last hours of a sample, unless the blocks above have made one: a copy of one that is made once for all readers."""
        if (self.at / ".fraiseql" / "lake").exists():
            return
        if not (self._made / ".fraiseql").exists():
            for arguments in (["sample", "--events", "20000"], ["materialize", "--start", "now-6h", "--end", "now"]):
                command = [str(Path(sys.executable).parent / "fraiseql-pipeline"), *arguments]
                subprocess.run(command, cwd=self._made, env=self.environment, capture_output=True, check=True)
        # With owners and modes: run as root, the embedded Postgres is somebody else's.
        subprocess.run(["cp", "-a", f"{self._made}/.fraiseql/.", f"{self.at}/.fraiseql"], check=True)

    def server(self, kind: str) -> str:
        """``host:port`` of a Flight server over this reader's lake, started when first asked for."""
        if kind not in self._addresses:
            arguments, settings = SERVERS[kind]
            if arguments != ["serve"] and not (self.at / "flight.toml").exists():
                make_credentials(self.at, self.environment)
            with closing(socket.socket()) as probe:
                probe.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{probe.getsockname()[1]}"
            process = subprocess.Popen(
                [Path(sys.executable).parent / "fraiseql-pipeline", *arguments],
                cwd=self.at,
                env={**self.environment, **settings, "FRAISEQL_ARROW_FLIGHT_BIND": address, "FRAISEQL_METRICS_BIND": "off"},
            )
            self._held.callback(process.wait, 60)
            self._held.callback(process.terminate)
            _wait_for(address, process)
            self._addresses[kind] = address
        return self._addresses[kind]


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it listened"
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server did not listen within a minute")


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    """One reader per document, so that a block finds what the blocks above it left."""
    with ExitStack() as held:
        found, made = {}, tmp_path_factory.mktemp("made")
        for document in {block.document for block in RUN}:
            found[document] = Reader(tmp_path_factory.mktemp("reader"), made, held)
        yield found


@pytest.mark.parametrize("block", RUN, ids=str)
def test_every_block_of_the_documents_runs(block: Block, readers: dict[str, Reader]) -> None:
    done = readers[block.document].run(block)
    assert done.returncode == 0, f"{block}:\n{block.code}\n{(done.stdout + done.stderr)[-4000:]}"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr or "Beta" in done.stderr or "Supersession" in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.why_not is not None], ids=str)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert block.why_not is not None
    assert len(block.why_not.split()) >= 4, f"{block} needs a reason"


def test_the_readme_has_blocks_that_run() -> None:
    assert sum(block.document == "README.md" for block in RUN) >= 6


def test_a_package_that_the_demo_does_not_bring_is_named_where_it_is_used() -> None:
    """A reader has what `make demo` has installed; the tests have more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {re.split(r"[^\w-]", each)[0] for extra in ("dbt", "clients") for each in project["optional-dependencies"][extra]}
    used = 0
    for block in BLOCKS:
        imported = (
            set(re.findall(r"^(?:import|from) (\w+)", block.code, flags=re.MULTILINE)) if block.language == "python" else set()
        )
        for package in sorted(optional):
            if package.replace("-", "_") in imported:
                (document,) = [each for each in documents() if each.relative_to(ROOT).as_posix() == block.document]
                assert re.search(rf"`(?:pip install )?{package}`", document.read_text(encoding="utf-8")), f"{block}: {package}"
                used += 1
    assert used >= 3


def test_a_block_cannot_hide_behind_an_unknown_marker() -> None:
    for document in documents():
        for marker in re.findall(r"<!-- ?(.*?) ?-->\n```", document.read_text(encoding="utf-8")):
            assert re.match(r"block: (server|secured|mutual|lake|dagster)$|not run: .+", marker), f"{document.name}: {marker}"
