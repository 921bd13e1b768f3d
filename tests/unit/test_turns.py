"""Readers wait for the change log in turns, and not all that a server serves may."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight.turns import Turns


@pytest.mark.parametrize(("plans", "waiting"), [(1, 1), (3, 1), (8, 4), (1024, 512)])
def test_readers_that_wait_for_the_log_leave_half_of_the_plans_to_the_others(plans: int, waiting: int) -> None:
    turns = Turns(plans)
    with ExitStack() as stack:
        for _ in range(waiting):
            stack.enter_context(turns.waits())
        with pytest.raises(FlightUnavailable, match="gives them too slowly for all who wait"):
            stack.enter_context(turns.waits())
    with turns.waits():
        pass
