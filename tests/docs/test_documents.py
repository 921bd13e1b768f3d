"""What the documents say is true: tables match the code, links lead somewhere, tests named as proof exist, nothing private is told."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest

from docs import tables
from fraiseql_pipeline.changelog import ChangeLog, write_sample
from fraiseql_pipeline.cli import main
from fraiseql_pipeline.event import COLUMNS
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.validate import TOLERATED_ROWS, Validator
from fraiseql_pipeline.window import Window, WindowSize
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
    known = {f"FRAISEQL_{name.upper()}" for name in Settings.model_fields} | {"FRAISEQL_DBT_DATABASE", "FRAISEQL_TEST_DSN"}
    # The README says of these that they are no settings here.
    known |= {"FRAISEQL_DELIVERY_MODE", "FRAISEQL_NATS_URL"}
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


def test_every_reason_that_sample_events_are_rejected_for_is_documented(changelog_url: str) -> None:
    documented = set(re.findall(r"^\| `(\w+:\w+)` \|", CONFIGURATION, flags=re.MULTILINE))
    found: set[str] = set()
    changelog = ChangeLog(changelog_url, Settings(database_url=changelog_url))
    write_sample(changelog, 6000, days=1, end=datetime(2026, 11, 20, tzinfo=UTC))
    settlement = changelog.settle()
    for hour in range(24):
        window = Window(datetime(2026, 11, 19, hour, tzinfo=UTC), WindowSize.HOUR)
        validator = Validator(window)
        with changelog.read(window, settlement) as batches:
            for batch in batches:
                found |= validator.check(batch).reasons.keys()
    changelog.close()
    assert len(found) >= 4
    assert found <= documented


def test_the_rejected_rows_that_never_halt_are_counted_as_in_the_code() -> None:
    assert f"Up to {TOLERATED_ROWS} rejected rows never halt a window" in CONFIGURATION


@pytest.mark.parametrize("key", sorted(tables.TICKET_KEYS.keys() - {"type", "entity_type", "start", "end"}))
def test_the_example_of_every_key_of_a_json_ticket_is_understood(key: str) -> None:
    shown: dict[str, Any] = {name: json.loads(tables.TICKET_KEYS[name][0]) for name in ("type", "entity_type", "start", "end", key)}
    ticket = Ticket.parse(json.dumps(shown).encode(), datetime(2026, 11, 20, 12, tzinfo=UTC))
    value = getattr(ticket, key)
    assert (list(value) if isinstance(value, tuple) else value) == shown[key]
    assert ticket.entity_types == ("Order", "User")


def test_the_ticket_of_the_observers_that_is_shown_is_understood() -> None:
    (shown,) = re.findall(r"`(\{\"type\": \"ObserverEvents\".*?\})`", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"))
    ticket = Ticket.parse(shown.encode(), datetime(2026, 11, 20, 12, tzinfo=UTC))
    assert (ticket.start, ticket.end) == (datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 3, tzinfo=UTC))


def test_every_extra_is_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (table,) = re.findall(r"^\| extra \|.*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line)))
    assert named == set(project["optional-dependencies"])


def test_a_budget_that_is_missed_is_marked_and_explained() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    missed = [
        ratio["name"]
        for file in tables.MEASUREMENTS.glob("*.json")
        for ratio in json.loads(file.read_text())["ratios"]
        if ratio["met"] is False
    ]
    assert page.count("| ✗ |") == len(missed)
    assert all(f"- **{name}**" in page for name in missed)
    assert tables.NOT_EXPLAINED not in page


def test_the_readme_shows_a_few_budgets_and_not_only_those_that_are_met() -> None:
    rows = re.findall(r"^\| `bench .*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert 6 <= len(rows) <= 8
    assert {name for _, name in tables.HIGHLIGHTS} & tables.MISSED.keys()


@pytest.mark.parametrize("program", sorted((ROOT / "examples" / "python").glob("*.py")), ids=lambda p: p.name)
def test_a_python_program_needs_no_argument_and_says_which_it_takes(program: Path) -> None:
    if "clickhouse" in program.name:
        pytest.importorskip("clickhouse_connect")
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usage = done.stdout.partition("\n\n")[0]
    assert "URL" not in re.sub(r"\[.*?\]", "", usage.upper())


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
