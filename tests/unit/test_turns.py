"""Readers wait for the change log in turns, and not all that a server serves may."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.frames import FrameStore
from fraiseql_pipeline.flight.live import Live
from fraiseql_pipeline.flight.view import Views
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings


@pytest.mark.parametrize(("plans", "waiting"), [(1, 1), (3, 1), (8, 4), (1024, 512)])
def test_readers_that_wait_for_the_log_leave_half_of_the_plans_to_the_others(tmp_path: Path, plans: int, waiting: int) -> None:
    lake = Lake(str(tmp_path / "lake"))
    settings = Settings(arrow_flight_max_streams=plans, arrow_flight_max_streams_per_principal=1)
    turns = Live(settings, lake, Views(lake), FrameStore(1 << 20, tmp_path))._turns
    with ExitStack() as stack:
        for _ in range(waiting):
            stack.enter_context(turns.waits())
        with pytest.raises(FlightUnavailable, match="gives them too slowly for all who wait"):
            stack.enter_context(turns.waits())
    with turns.waits():
        pass
