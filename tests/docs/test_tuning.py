"""What docs/tuning.md says of a setting is what the setting is."""

from __future__ import annotations

import re

import pytest

from fraiseql_pipeline.settings import Settings
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "FRAISEQL_" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].removeprefix("| ")[:40])
def test_the_default_that_is_given_is_the_default(row: list[str]) -> None:
    _, turned, default, _ = row
    names = re.findall(r"`FRAISEQL_([A-Z_]+)", turned)
    values = [
        getattr(Settings.model_fields[name.lower()].default, "value", Settings.model_fields[name.lower()].default) for name in names
    ]
    said = ["unset" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values]
    assert default in {", ".join(said), ", ".join(dict.fromkeys(said))}


def test_every_setting_that_bounds_the_flight_server_is_in_the_page() -> None:
    bounding = {
        f"FRAISEQL_{name.upper()}" for name in Settings.model_fields if re.search("_max_|_bytes$|workers|connections", name)
    }
    assert bounding - {"FRAISEQL_ARROW_FLIGHT_MIN_BYTES_PER_SECOND"} <= set(re.findall(r"FRAISEQL_[A-Z_]+[A-Z]", PAGE))
