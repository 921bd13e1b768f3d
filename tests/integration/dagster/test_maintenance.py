"""The nightly job: it keeps every event, and tells what it did."""

from __future__ import annotations

import dagster as dg

from assets.definitions import definitions
from assets.resources import FraiseQL
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window
from tests.support.code_location import Location, hours, write

YESTERYEAR = hours("2026-01-05", 0, 3)


def _rows(location: Location) -> dict[Window, int]:
    return {window: sum(b.num_rows for b in location.lake.read(window.start, window.end, columns=["pk"])) for window in YESTERYEAR}


def test_maintenance_compacts_old_days_and_keeps_every_event(location: Location, changelog_url: str) -> None:
    for n, window in enumerate(YESTERYEAR, start=1):
        write(changelog_url, window, n)
    assert location.run(*YESTERYEAR).success
    before = _rows(location)
    assert before == {window: n for n, window in enumerate(YESTERYEAR, start=1)}
    job = definitions(location.settings).resolve_job_def("maintain")
    run = job.execute_in_process(resources={"fraiseql": FraiseQL()}, instance=location.instance)
    assert run.success
    (output,) = [event.step_output_data for event in run.all_events if event.event_type_value == "STEP_OUTPUT"]
    shown = {name: value.value for name, value in output.metadata.items()}
    assert shown["compacted_days"] == "events 2026-01-05"
    assert shown["files_after"] < shown["files_before"]
    assert _rows(location) == before


def test_a_window_of_a_compacted_day_passes_its_checks_again(location: Location, changelog_url: str) -> None:
    for window in YESTERYEAR:
        write(changelog_url, window, 3)
    location.run(*YESTERYEAR)
    definitions(location.settings).resolve_job_def("maintain").execute_in_process(
        resources={"fraiseql": FraiseQL()}, instance=location.instance
    )
    write(changelog_url, YESTERYEAR[1], 2)
    assert location.run(YESTERYEAR[1]).success
    for name in ("counts_add_up", "schema"):
        assert location.checks(name)[YESTERYEAR[1].key] == ("SUCCEEDED", True)
    assert location.metadata()[YESTERYEAR[1].key]["dagster/partition_row_count"] == 5


def test_the_nightly_schedule_is_stopped_until_somebody_starts_it() -> None:
    schedule = definitions(Settings()).resolve_schedule_def("maintain_nightly")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
