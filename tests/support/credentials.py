"""Certificates, tokens and keys, made as docs/security.md tells its readers to."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.docs.blocks import ROOT, blocks


def make_credentials(directory: Path, environment: Mapping[str, str]) -> None:
    """Run the blocks of the page, up to its server, in a directory: ``flight.toml`` there is the server's, and names the other files."""
    for block in blocks(ROOT / "docs" / "security.md"):
        if block.why_not is None and not block.needs:
            done = subprocess.run(block.command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}:\n{block.code}\n{(done.stdout + done.stderr)[-4000:]}"
