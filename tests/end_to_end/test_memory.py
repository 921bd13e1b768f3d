"""The promise of bounded memory: publishing a window takes as much of it, however many events the window has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fraiseql_pipeline.changelog import open_changelog, write_sample
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window
from tests.conftest import new_database

DAY = Window.parse("2026-11-02")
_PUBLISH = """
import sys
from pathlib import Path
from fraiseql_pipeline import Lake, Settings, Window, materialize, open_changelog
settings, window = Settings(database_url=sys.argv[1], lake_uri=sys.argv[2], window="day"), Window.parse(sys.argv[3])
with open_changelog(settings) as changelog:
    print(materialize([window], settings=settings, changelog=changelog, lake=Lake.of(settings))[0].source_rows)
print(Path("/proc/self/status").read_text())
"""


def peak_mib(url: str, lake: Path, window: Window, events: int) -> float:
    """The most memory a process of its own had while it published a window of so many events."""
    command = [sys.executable, "-c", _PUBLISH, url, str(lake), window.key]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(told.split()[0]) > 0.99 * events, "the others have times that belong to no day"
    found = re.search(r"VmHWM:\s+(\d+) kB", told)
    assert found
    return int(found[1]) / 1024


@pytest.mark.slow
def test_a_window_of_five_times_the_events_takes_no_more_memory(postgres: str, contract_template: str, tmp_path: Path) -> None:
    peaks = []
    for events in (200_000, 1_000_000):
        with new_database(postgres, contract_template) as (_, url):
            with open_changelog(Settings(database_url=url)) as changelog:
                write_sample(changelog, events, days=1, end=DAY.end)
            peaks.append(peak_mib(url, tmp_path / str(events), DAY, events))
    few, many = peaks
    # 8 bytes per event grow by design, to know duplicates; the rest is what the allocator keeps. Measured: 16 and 28 MiB.
    assert many - few < 60, f"{few:.0f} MiB for 200,000 events, {many:.0f} for 1,000,000, whose eight columns alone are 300 MiB"
