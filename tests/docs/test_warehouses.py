"""What docs/warehouses.md shows besides running: a copy that keeps up with a lake is the lake, whatever became of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.docs.blocks import ROOT, blocks
from tests.support.code_location import hours
from tests.support.lakes import publish

(COPY,) = [block for block in blocks(ROOT / "docs" / "warehouses.md") if "copy.duckdb" in block.code]
FIRST, SECOND, THIRD, *_ = hours("2026-11-20", 6, 9)


class Reader:
    """A directory with a lake where the page has it, and the copy beside it."""

    def __init__(self, at: Path) -> None:
        self._at = at
        self.lake = at / ".fraiseql" / "lake"

    def publish(self, window: Window, events: int) -> None:
        publish(Lake(str(self.lake)), window, events)

    def copied(self) -> list[tuple[int, str]]:
        """What the copy has of the lake after the block was run once more."""
        done = subprocess.run([sys.executable, "-c", COPY.code], cwd=self._at, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with duckdb.connect(str(self._at / "copy.duckdb"), read_only=True) as connection:
            return connection.execute("SELECT pk, event_id FROM copied ORDER BY ALL").fetchall()

    def held(self) -> list[tuple[int, str]]:
        batches = Lake(str(self.lake)).read(FIRST.start, THIRD.end, columns=["pk", "event_id"])
        return sorted(pair for batch in batches for pair in zip(*batch.to_pydict().values(), strict=True))


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_a_copy_takes_in_what_newer_versions_name(reader: Reader) -> None:
    reader.publish(FIRST, 20)
    assert len(reader.copied()) == 20
    reader.publish(SECOND, 30)
    assert reader.copied() == reader.copied() == reader.held()


def test_a_copy_of_a_lake_that_was_restored_is_the_lake(reader: Reader) -> None:
    reader.publish(FIRST, 20)
    shutil.copytree(reader.lake, reader.lake.with_name("backup"))
    reader.publish(SECOND, 30)
    reader.publish(THIRD, 40)
    assert len(reader.copied()) == 90
    shutil.rmtree(reader.lake)
    reader.lake.with_name("backup").rename(reader.lake)
    reader.publish(THIRD, 10)
    assert reader.copied() == reader.held()
    assert len(reader.held()) == 30
