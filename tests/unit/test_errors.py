"""The tree of errors is what its drawing says."""

from __future__ import annotations

import inspect
import re

import pytest

from fraiseql_pipeline import errors
from fraiseql_pipeline.errors import PipelineError, SettleTimeout, WindowMissing

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PipelineError)}


def drawn() -> dict[str, tuple[str | None, int, bool]]:
    """Name → parent, exit code and retryable, read from the drawing in the module's docstring."""
    found: dict[str, tuple[str | None, int, bool]] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<code>\d) +(?P<retryable>yes|no) ", line):
            depth = len(match["branch"]) // 4
            parent = above.get(depth - 1, "PipelineError")
            above = {level: name for level, name in above.items() if level < depth} | {depth: match["name"]}
            found[match["name"]] = (parent, int(match["code"]), match["retryable"] == "yes")
    return found


def test_the_drawing_shows_every_error_where_it_stands() -> None:
    built = {
        name: (cls.__base__.__name__, cls.exit_code, cls.retryable) for name, cls in CLASSES.items() if cls is not PipelineError
    }
    assert drawn() == built


@pytest.mark.parametrize("cls", CLASSES.values())
def test_an_error_says_its_sentence_and_has_an_exit_code(cls: type[PipelineError]) -> None:
    assert str(cls("It broke.")) == "It broke."
    assert 0 < cls.exit_code < 64


def test_some_errors_carry_what_they_are_about() -> None:
    assert SettleTimeout("x", ["pid 7"]).blockers == ("pid 7",)
    assert WindowMissing("x", ["2026-11-01"]).missing == ("2026-11-01",)
    assert SettleTimeout("x").blockers == WindowMissing("x").missing == ()
