"""What docs/clients.md shows in other languages than Python is what the programs say."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
SOURCES = {
    "java": "examples/java/src/main/java/ReadEvents.java",
    "go": "examples/go/read_events.go",
    "r": "examples/r/read_events.R",
    "sql": "examples/python/clickhouse_ingestion.py",
}


@pytest.mark.parametrize("language", SOURCES)
def test_the_code_that_is_shown_is_in_the_program(language: str) -> None:
    source = (ROOT / SOURCES[language]).read_text(encoding="utf-8")
    shown = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert shown
    for code in shown:
        assert any(indent(code, by) in source for by in ("", "  ", "    ", "\t", "\t\t")), code


def test_every_example_is_in_the_document() -> None:
    programs = [path for kind in ("*.py", "*.java", "*.go", "*.R") for path in (ROOT / "examples").rglob(kind)]
    assert len(programs) >= 8
    for program in programs:
        assert f"](../{program.relative_to(ROOT).as_posix()})" in PAGE
