"""Files that somebody removes under a running server, as cleaners of temporary directories do, cost time and no event."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events
from tests.support.following import HOUR, LAST, Followed, followed

Clean = Callable[[Path], None]


def files(cache: Path) -> None:
    for path in cache.glob("fraiseql-frames-*/*"):
        if path.name != "lock":
            path.unlink()


def directory(cache: Path) -> None:
    for path in cache.glob("fraiseql-frames-*"):
        shutil.rmtree(path)


def ends(cache: Path) -> None:
    """The second half of every file with events, as a disk that failed leaves it."""
    for file in cache.rglob("*.parquet"):
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("clean", [files, directory])
def test_frames_that_were_removed_are_made_anew(
    lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path, clean: Clean
) -> None:
    for number in range(2):
        publish(lake, hour(number), lake_events(hour(number), 500))
    cache = tmp_path / "cache"
    with connect(start_server(lake, arrow_flight_cache_dir=str(cache)).url) as client:
        kept, new = ({"start": hour(number).start, "end": hour(number).end} for number in range(2))
        whole = client.read(**kept)
        clean(cache)
        for _ in range(2):
            assert client.read(**kept) == whole
            assert client.read(**new).num_rows == 500
            assert client.read(**kept, columns=["pk"]).num_rows == 500


@pytest.fixture
def live(changelog_url: str, lake: Lake, start_server: Callable[..., FlightServer], tmp_path: Path) -> Iterator[Followed]:
    with followed(changelog_url, lake, start_server, arrow_flight_cache_dir=str(tmp_path / "cache")) as made:
        yield made


@pytest.mark.parametrize("clean", [files, directory, ends])
def test_events_that_are_not_published_are_read_from_the_log_again(live: Followed, tmp_path: Path, clean: Clean) -> None:
    old, new = live.write(LAST - HOUR, 3), live.write(LAST, 2)
    live.reaches(new[-1])
    assert live.keys() == [*old, *new]
    clean(tmp_path / "cache")
    assert live.keys() == [*old, *new]
    clean(tmp_path / "cache")
    newest = live.write(LAST)
    live.reaches(newest[-1])
    # Of columns that nobody asked for before, so that no kept frame answers.
    found = live.client.read(start=LAST - 3 * HOUR, columns=["pk", "seq"])
    assert sorted(found["pk"].to_pylist()) == [*old, *new, *newest]
