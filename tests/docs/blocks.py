"""Finds the code blocks of the documents and says how each is to be run.

A block runs in the order of its document, in one directory and against one lake, as a reader would type it. A comment right above it may say

    <!-- block: lake -->       run it where the blocks above have made a lake, or make one
    <!-- block: dagster -->    run it beside a lake
    <!-- block: server -->     run it beside a lake and `fraiseql-pipeline serve`; localhost:50051 stands for wherever that listens
    <!-- block: secured -->    the same, but that server has the certificate and asks for the tokens of docs/security.md
    <!-- block: mutual -->     the same, and it asks for a certificate of the client, too
    <!-- not run: WHY -->      do not run it; WHY is a sentence for the reader of the source

Blocks of other languages than shell and Python are text.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNABLE = {"sh": "sh", "bash": "sh", "shell": "sh", "console": "sh", "python": "python", "py": "python"}

_FENCE = re.compile(
    r"(?:^<!-- (?P<key>block|not run)(?:: (?P<value>[^\n]*?))? -->\n)?^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    code: str
    needs: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code] if self.language == "python" else ["bash", "-euo", "pipefail", "-c", self.code]


def documents() -> list[Path]:
    """Every document of the project, in a fixed order."""
    return sorted(
        [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *(ROOT / "dbt_examples").glob("*.md"),
            *(ROOT / "examples").rglob("*.md"),
        ]
    )


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        language = RUNNABLE.get(fence["info"].strip().split(" ")[0])
        if language is None:
            continue
        found.append(
            Block(
                document.relative_to(ROOT).as_posix(),
                text.count("\n", 0, fence.start("code")),
                language,
                fence["code"],
                (fence["value"] or "") if fence["key"] == "block" else "",
                (fence["value"] or "") if fence["key"] == "not run" else None,
            )
        )
    return found
