"""What the commits of the published windows add up to."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fraiseql_pipeline.lake import Standing
from fraiseql_pipeline.window import Window, WindowSize, count_missing, tile, tile_gaps
from tests.support.commits import START, commit, hour, published


def test_nothing_published_reaches_nowhere() -> None:
    stands = Standing.of({}, START)
    assert (stands.windows, stands.through, stands.complete_through, stands.gaps) == (0, None, None, [])
    assert count_missing(stands.gaps, WindowSize.HOUR) == 0


@pytest.mark.parametrize(
    ("first", "hours", "complete", "holes"),
    [
        (None, (2, 3), 4, 0),
        (2, (2, 3), 4, 0),
        (0, (2, 3), 0, 2),
        (5, (2, 3), None, 0),
        (4, (2, 3), None, 0),
        (3, (2, 3), 4, 0),
        (None, (0, 2, 3, 6), 1, 3),
    ],
)
def test_what_is_complete_ends_at_the_first_hole(
    first: int | None, hours: tuple[int, ...], complete: int | None, holes: int
) -> None:
    stands = Standing.of(published(*hours), None if first is None else hour(first).start)
    assert stands.complete_through == (None if complete is None else hour(complete).start)
    assert count_missing(stands.gaps, WindowSize.HOUR) == holes
    assert stands.through == hour(max(hours)).end


def test_holes_are_as_many_as_the_windows_that_are_named() -> None:
    days = [Window(START + timedelta(days=n), WindowSize.DAY) for n in (1, 4)]
    windows = [hour(0), hour(5), hour(6), *days, hour(24 * 6)]
    stands = Standing.of({window: commit(window) for window in windows}, START - timedelta(hours=3))
    for size in WindowSize:
        named = list(tile_gaps(stands.gaps, size))
        assert named == sorted({window for gap in stands.gaps for window in tile(*gap, size)})
        assert count_missing(stands.gaps, size) == len(named)
