"""An Airflow DAG that publishes the windows that have ended, every hour; for Airflow 3.

Put it into the DAG folder, and the settings (``FRAISEQL_DATABASE_URL``, ``FRAISEQL_LAKE_URI``, …) into the environment of the workers. The
package is installed beside Airflow; where their requirements disagree, give it an environment of its own and write
``@task.external_python(python="/opt/fraiseql/bin/python")`` instead of ``@task``: the bodies import what they need.

What an outage of more than three hours left out are holes in ``fraiseql-pipeline status``; give ``publish`` more hours to fill them, and at any
time where windows are days.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.sdk import dag, task


@task(retries=3, retry_delay=timedelta(minutes=2))
def publish(hours: int) -> dict[str, int]:
    """Publish the last windows that have ended; those that are published already change nothing. Events accepted, by window."""
    from datetime import UTC, datetime, timedelta

    from fraiseql_pipeline import Lake, Settings, Window, materialize, open_changelog

    settings = Settings.load()
    now = datetime.now(UTC)
    windows = {Window.holding(now - timedelta(hours=n), settings.window) for n in range(1, hours + 1)}
    ended = sorted(window for window in windows if settings.start <= window.start and window.end <= now)
    with open_changelog(settings) as changelog:
        done = materialize(ended, settings=settings, changelog=changelog, lake=Lake.of(settings))
    return {one.window.key: one.commit.accepted_rows for one in done}


@task(retries=3, retry_delay=timedelta(minutes=2))
def add_late() -> list[str]:
    """Add late events to the published windows they belong to, of any age; the keys of those windows."""
    from fraiseql_pipeline import Lake, Settings, open_changelog
    from fraiseql_pipeline.pipeline import merge_late

    settings = Settings.load()
    with open_changelog(settings) as changelog:
        return [one.window.key for one in merge_late(settings=settings, changelog=changelog, lake=Lake.of(settings))]


@dag(schedule="5 * * * *", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1, tags=["fraiseql"])
def fraiseql_events() -> None:
    # Side by side: a window that is refused fails its task, and the run, and keeps no late event of another one waiting.
    publish(hours=3)
    add_late()


fraiseql_events()
