"""Versions of the past: what was published in them."""

from __future__ import annotations

import random
from datetime import timedelta

from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window, WindowSize
from tests.support.lakes import publish

DAY = Window.parse("2026-11-01")
HOURS = [Window(DAY.start + timedelta(hours=n), WindowSize.HOUR) for n in range(6)]


def test_an_older_version_has_the_windows_and_commits_it_had_as_the_newest(lake: Lake) -> None:
    choose = random.Random(7)
    then = {}
    for number in range(30):  # beyond a checkpoint, from which a new reader begins
        window = choose.choice(HOURS) if number < 27 else DAY
        publish(lake, window, choose.randrange(5), run_id=str(number), force=True, allow_shrink=True)
        if number == 20:
            lake.maintain(DAY.end + timedelta(days=30))
        newest = lake.snapshot()
        then[newest.version] = newest
    for reader in (lake, Lake(lake.uri)):
        for version, snapshot in then.items():
            older = reader.snapshot(version)
            assert dict(older.published) == dict(snapshot.published)
            assert {file.path for file in older.files} == {file.path for file in snapshot.files}
