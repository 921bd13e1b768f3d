"""A fresh lake per test, and how tests fill it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fraiseql_pipeline.lake import Lake


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))
