"""What docs/clients.md shows in other languages than Python is what the programs say."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import pytest

from fraiseql_pipeline.lake import Lake
from tests.clients.conftest import execute

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


@pytest.mark.clients
def test_the_statement_for_clickhouse_is_understood(lake: Lake) -> None:
    """Over a local lake: the function of the page asks for an object store."""
    if find_spec("chdb") is None:
        pytest.skip("The engine of ClickHouse is not installed: make test-clients.")
    page = (ROOT / "docs" / "warehouses.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"^```sql\n(SELECT .*JSONExtractString.*?);\n```$", page, flags=re.MULTILINE | re.DOTALL)
    local, replaced = re.subn(r"deltaLake\('https:[^)]*\)", f"deltaLakeLocal('{lake.uri}/events')", statement)
    assert replaced == 1
    assert "toDate(now('UTC')) - 1\n" in local
    everything = local.replace("- 1\n", "- 10000\n")  # the events of these tests are of 2026
    shown = execute([sys.executable, "-c", "import sys, chdb; print(chdb.query(sys.argv[1]))", everything], Path(lake.uri))
    assert shown.returncode == 0, shown.stderr
    assert "Order" in shown.stdout
