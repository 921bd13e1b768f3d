"""What the documents say is true: tables match the code, links lead somewhere, tests named as proof exist, nothing private is told."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import click
import pytest

from docs import tables
from fraiseql_pipeline.cli import main
from fraiseql_pipeline.event import COLUMNS
from fraiseql_pipeline.settings import Settings
from tests.docs.blocks import ROOT, documents

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
SOURCES = ("*.py", "*.sql", "*.md", "*.yml", "*.yaml", "*.toml", "*.txt", "Makefile", ".ci/run")


def test_the_tables_are_the_ones_the_code_gives() -> None:
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.render(text) == text, f"{page.name} is out of date; run `make docs`"


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"`FRAISEQL_{name.upper()}`" in CONFIGURATION
    assert Settings.model_fields[name].description


def test_no_document_names_a_setting_that_does_not_exist() -> None:
    known = {f"FRAISEQL_{name.upper()}" for name in Settings.model_fields} | {"FRAISEQL_DBT_DATABASE"}
    for document in documents():
        named = set(re.findall(r"FRAISEQL_[A-Z_]+[A-Z]", document.read_text(encoding="utf-8")))
        assert named <= known, f"{document.name} names {sorted(named - known)}"


def test_the_configuration_file_that_is_shown_loads(tmp_path: Path) -> None:
    shown = re.findall(r"^```toml\n(.*?)^```$", CONFIGURATION, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 1
    file = tmp_path / "pipeline.toml"
    file.write_text(shown[0], encoding="utf-8")
    assert Settings.load(file).lake_uri in shown[0]


@pytest.mark.parametrize("column", [column.name for column in COLUMNS])
def test_every_column_is_documented(column: str) -> None:
    assert f"| `{column}` |" in CONFIGURATION


@pytest.mark.parametrize("document", documents(), ids=lambda d: d.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in _anchors(linked), f"{document.name}: {target}"


def test_every_test_named_as_proof_exists() -> None:
    defined = {
        f"{file.relative_to(ROOT).as_posix()}::{node.name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    text = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", text))
    assert named, "RELIABILITY.md names no tests"
    assert named <= defined, f"RELIABILITY.md names tests that do not exist: {sorted(named - defined)}"


def test_every_make_target_the_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for document in documents():
        named = set(re.findall(r"`make ([a-z-]+)", document.read_text(encoding="utf-8")))
        assert named <= targets, f"{document.name} names {sorted(named - targets)}"


def test_every_command_the_documents_name_exists() -> None:
    for document in documents():
        for line in re.findall(
            r"(?:`|^)fraiseql-pipeline (?:--json )?([a-z].*)", document.read_text(encoding="utf-8"), flags=re.MULTILINE
        ):
            command: click.Command = main
            for word in re.findall(r"^[a-z]+(?: [a-z]+)*", line)[0].split():
                if not isinstance(command, click.Group):
                    break
                assert word in command.commands, f"{document.name}: fraiseql-pipeline {line}"
                command = command.commands[word]


def test_nothing_in_the_tree_names_a_machine_or_a_registry() -> None:
    """Paths of a developer's machine and hosts of package registries work for one person only."""
    home = r"(?<![\w.])/(?:home|Users|root|work|opt/wheels)/"
    registry = "|".join(
        ("pypi" + r"\.org", "python" + "hosted", r"npmjs\.org", "deb" + r"\.debian", r"crates\.io", r"repo1?\.maven")
    )
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for pattern in SOURCES
        for file in _tracked(pattern)
        for match in re.finditer(f"{home}|{registry}", file.read_text(encoding="utf-8"))
        if file != Path(__file__)
    ]
    assert found == []


def test_the_pins_are_names_and_numbers() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line), line


def test_dagster_and_its_webserver_are_pinned_to_one_version() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert pins["dagster"] == pins["dagster-webserver"] == pins["dagster-graphql"]


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
