"""docs/troubleshooting.md names every error with its exit code, and the messages it shows are ones that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from fraiseql_pipeline import errors
from fraiseql_pipeline.errors import PipelineError
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PipelineError)}
NAMED = [(name, row[2]) for row in ROWS for name in re.findall(r"`(\w+)`", row[2]) if name in ERRORS]
MESSAGES = sorted({message for row in ROWS for message in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", row[0])})


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_is_in_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize(("name", "cell"), NAMED, ids=lambda one: one[:40])
def test_an_error_has_the_exit_code_that_is_given(name: str, cell: str) -> None:
    assert re.findall(r", (\d)", cell) == [str(ERRORS[name].exit_code)]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_shown_is_one_of_the_code(message: str) -> None:
    """``…`` stands for what differs from message to message, or is left out."""
    wanted = re.compile(".*".join(re.escape(part) for part in re.split(r"\s?…\s?", message)), re.DOTALL)
    assert any(wanted.search(text) for text in _texts()), message


@cache
def _texts() -> tuple[str, ...]:
    """Every string of the code; what an f-string puts in is left out."""
    files = [file for package in ("fraiseql_pipeline", "assets") for file in sorted((ROOT / package).rglob("*.py"))]
    return tuple(text for file in files for text in _strings(ast.parse(file.read_text(encoding="utf-8"))))


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value for part in node.values if isinstance(part, ast.Constant) and isinstance(part.value, str))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
