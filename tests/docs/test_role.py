"""The statements that docs/configuration.md gives for the role are enough, and each is as needed as the page says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import psycopg
import pytest

from fraiseql_pipeline.changelog import ChangeLog, embedded
from fraiseql_pipeline.errors import SourceRefused
from fraiseql_pipeline.settings import Settings
from tests.docs.blocks import ROOT
from tests.support.code_location import hours, write

PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
(BLOCK,) = (code for code in re.findall(r"^```sql\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL) if "CREATE ROLE" in code)
(ROLE,) = re.findall(r"^CREATE ROLE (\w+)", BLOCK, flags=re.MULTILINE)


def _statements(heading: str) -> list[str]:
    """The statements under comments that begin with a word."""
    found, above = [], ""
    for line in BLOCK.splitlines():
        if line.startswith("-- "):
            above = line
        elif line and above.startswith(f"-- {heading}"):
            found.append(line)
    return found


REQUIRED, RECOMMENDED = _statements("Required"), _statements("Recommended")


@pytest.fixture
def reader(changelog_url: str) -> Iterator[Callable[..., ChangeLog]]:
    """The change log as the role has it once the block was run, but for some statements."""
    opened: list[ChangeLog] = []
    with psycopg.connect(changelog_url, autocommit=True) as owner:

        def run(*left_out: str) -> ChangeLog:
            for statement in BLOCK.split(";\n"):
                if not any(line.removesuffix(";") in left_out for line in statement.splitlines()):
                    owner.execute(statement)
            url = embedded.database_url(changelog_url, owner.info.dbname, ROLE)
            opened.append(ChangeLog(url, Settings(database_url=url)))
            return opened[-1]

        try:
            yield run
        finally:
            for changelog in opened:
                changelog.close()
            owner.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}")


def test_the_block_has_five_grants() -> None:
    assert (len(REQUIRED), len(RECOMMENDED)) == (3, 2)


def test_a_role_made_by_the_block_reads_everything_and_seals_without_a_warning(
    reader: Callable[..., ChangeLog], changelog_url: str
) -> None:
    (window,) = hours("2026-11-20", 6, 6)
    write(changelog_url, window, 5)
    changelog = reader()
    contract = changelog.preflight()
    assert contract.can_seal
    assert contract.warnings == ()
    settlement = changelog.settle(window.end)
    assert settlement.state_of(window) == "sealed"
    with changelog.read(window, settlement) as batches:
        assert sum(batch.num_rows for batch in batches) == 5
    assert changelog.audit(window, settlement.settled_pk).rows == 5
    assert changelog.late({window: 0})[0].late_rows == 5
    assert changelog.unplaced() == 0


@pytest.mark.parametrize("statement", REQUIRED)
def test_a_required_statement_that_is_missing_is_an_error_that_names_it(statement: str, reader: Callable[..., ChangeLog]) -> None:
    what = " ".join(statement.removesuffix(";").replace(f"TO {ROLE}", "").split())
    with pytest.raises(SourceRefused, match=re.escape(what)):
        reader(statement.removesuffix(";")).preflight()


@pytest.mark.parametrize("statement", RECOMMENDED)
def test_a_recommended_statement_that_is_missing_is_a_warning_that_names_it(
    statement: str, reader: Callable[..., ChangeLog]
) -> None:
    what = statement.partition(" TO ")[0]
    (warning,) = reader(statement.removesuffix(";")).preflight().warnings
    assert what in warning
