"""``demo``: the whole way of an event on this machine, in one command.

An embedded Postgres with sample events, Dagster that materializes the windows, a Flight server, and a client that reads a window back.
Everything lies under ``./.fraiseql`` and may be deleted; a second run starts from what is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import click

from fraiseql_pipeline.changelog import open_changelog, write_sample
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import PipelineError, SettingsError
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, WindowSize, tile

#: How long the Dagster process may take to tell what it has published, once it is interrupted.
_STOP_SECONDS = 30


@click.command()
@click.option("--events", default=300_000, show_default=True, type=click.IntRange(1000), help="Sample events of the first run.")
@pass_output
def demo(output: Output, events: int) -> None:
    """Show it all: sample events in a real Postgres, windows by Dagster, a read over Arrow Flight."""
    settings = output.settings
    if settings.database_url is not None:
        raise SettingsError(
            "The demo fills an embedded Postgres; unset FRAISEQL_DATABASE_URL, or use `fraiseql-pipeline materialize`."
        )
    if "://" in settings.lake_uri.removeprefix("file://"):
        raise SettingsError(
            "The demo publishes sample events, which are kept out of object stores; set FRAISEQL_LAKE_URI to a directory."
        )
    code_location = _code_location()
    end = Window.holding(datetime.now(UTC), WindowSize.HOUR).start
    with _alone(), open_changelog(settings, create=True) as changelog:
        held = changelog.count()
        if held == 0:
            output.say("1/3 Postgres: an embedded server, FraiseQL's change log, two days of sample events")
            with output.progress("Writing", events, "events") as step:
                summary = write_sample(changelog, events, days=2, end=end, progress=lambda rows: step("", rows))
            output.say(f"    {summary.events:,} events in {summary.seconds:.1f} s")
        else:
            output.say(f"1/3 Postgres: the embedded server of an earlier demo, {held:,} events")
        first, last = changelog.span()
        windows = [w for w in tile(first, last + timedelta(microseconds=1), settings.window) if w.end <= datetime.now(UTC)]
        lake = Lake.of(settings)
        before = lake.published()
        new = len(set(windows) - before.keys())
        again = "" if new == len(windows) else f"; {len(windows) - new} are published, and are read and compared again"
        output.say(f"2/3 Dagster: materializes {len(windows)} windows in one run{again}")
        began = time.perf_counter()
        with _following(lake, len(before), output, new or None):
            _materialize(code_location, windows, settings)
        seconds = time.perf_counter() - began
    commits = [commit for window, commit in lake.published().items() if window in set(windows)]
    read_rows = sum(commit.source_rows for commit in commits)
    busiest = max(commits, key=lambda commit: commit.accepted_rows)
    output.say(f"3/3 Arrow Flight: reads window {busiest.window.key} back, then all of them")
    with serve(settings.model_copy(update={"arrow_flight_bind": "127.0.0.1:0"})) as server, connect(server.url) as client:
        one = client.read(f"events:*:{busiest.window.start.isoformat()}:{busiest.window.end.isoformat()}:10000")
        client.read(start=windows[0].start, end=windows[-1].end)  # the first read encodes, the others are served what it left
        at = time.perf_counter()
        table = client.read(start=windows[0].start, end=windows[-1].end)
        took = time.perf_counter() - at
    if one.num_rows != busiest.accepted_rows:
        raise PipelineError(f"The Flight read returned {one.num_rows:,} events, the window holds {busiest.accepted_rows:,}.")
    accepted, quarantined = sum(c.accepted_rows for c in commits), sum(c.quarantined_rows for c in commits)
    stored = sum(commit.bytes for commit in commits)
    found = {
        "events": ("events", read_rows),
        "windows": ("windows", len(commits)),
        "accepted_rows": ("accepted", accepted),
        "quarantined_rows": ("quarantined", quarantined),
        "provisional": ("provisional windows", sum(commit.state == "provisional" for commit in commits)),
        "dagster_seconds": ("Dagster run, seconds (start-up included)", round(seconds, 1)),
        "dagster_events_per_second": ("Dagster run, events/s (start-up included)", round(read_rows / seconds)),
        "bytes_per_event": ("stored bytes per event", round(stored / max(accepted, 1), 1)),
        "flight_rows": ("events read over Flight", table.num_rows),
        "flight_events_per_second": ("Flight read, second time, events/s", round(table.num_rows / took)),
        "lake": ("lake", settings.lake_uri),
    }
    output.result({key: value for key, (_, value) in found.items()})
    output.table(
        "What happened",
        ("what", "value"),
        [(name, f"{value:,}" if isinstance(value, int | float) else value) for name, value in found.values()],
    )
    output.say("What to type next:")
    for command, purpose in _next():
        output.say(f"  {command:<55} {purpose}")


def _next() -> Iterator[tuple[str, str]]:
    """Commands as they are typed here: in a checkout, or wherever the package was installed."""
    checkout = Path("Makefile").exists() and Path("dbt_examples").exists()
    serve = "make serve" if checkout else "fraiseql-pipeline serve"
    yield (
        "make dev" if checkout else f'DAGSTER_HOME="$PWD/.fraiseql/dagster" dagster dev -m {_code_location()}',
        "the Dagster UI: partitions, backfills, checks",
    )
    yield serve, "a Flight server for pyarrow, pandas, polars, R, Java: what is published"
    yield f"FRAISEQL_DATABASE_URL=… {serve}", "the same up to now, for a change log of your own (FRAISEQL_LAKE_URI: a new lake)"
    if checkout:
        yield "make dbt", "a dbt project over the Delta tables"
    yield f"{'.venv/bin/' if checkout else ''}fraiseql-pipeline quarantine list", "the events that were rejected, and why"


@contextmanager
def _alone() -> Iterator[None]:
    """Dagster's files in this directory are for one demo at a time."""
    state = Path(".fraiseql")
    state.mkdir(exist_ok=True)
    with (state / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError("Another demo runs in this directory; wait for it, or start one in another directory.") from None
        yield


def _code_location() -> str:
    for module in ("assets.definitions", "fraiseql_pipeline.assets.definitions"):
        try:
            if find_spec(module) is not None and find_spec("dagster") is not None:
                return module
        except ModuleNotFoundError:
            continue
    raise SettingsError("The demo needs Dagster; install it with `pip install 'fraiseql-pipeline[demo]'`.")


def _materialize(module: str, windows: list[Window], settings: Settings) -> None:
    """One Dagster run over the windows, as ``dagster asset materialize`` starts it."""
    home = Path(".fraiseql/dagster").resolve()
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", module, "--select", "fraiseql/events"]
    command += (
        ["--partition", windows[0].key] if len(windows) == 1 else ["--partition-range", f"{windows[0].key}...{windows[-1].key}"]
    )
    environment = {
        **os.environ,
        **_variables(settings),
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "FRAISEQL_START": windows[0].start.isoformat(),
        "PYTHONWARNINGS": "ignore",
    }
    code, said = _run(command, environment)
    if code != 0:
        log = home / "last-run.log"
        log.write_text(said)
        raise PipelineError(
            "The Dagster run failed; its log is in .fraiseql/dagster/last-run.log. Remove .fraiseql/ to begin the demo anew."
        )


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a process, and what it wrote. Whoever interrupts us interrupts it, and it may put in order what it began: Dagster
    shows a run whose process was killed as running for ever. It is told once and by us: Ctrl-C would reach it as well in our group.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            said = process.communicate()  # of two pipes: polars has a signal begin a read of one anew, and nobody hears of it
        except BaseException:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=_STOP_SECONDS)
            finally:
                process.kill()
            raise
    return process.returncode, "".join(said)


def _variables(settings: Settings) -> dict[str, str]:
    """What was set, in the environment or a file, as variables of the process that has no --config."""
    chosen = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {f"FRAISEQL_{name.upper()}": value if isinstance(value, str) else json.dumps(value) for name, value in chosen.items()}


@contextmanager
def _following(lake: Lake, before: int, output: Output, total: int | None) -> Iterator[None]:
    """Progress of the Dagster process, seen where it matters: the windows that are published. ``total``: None where all were before."""
    stop = threading.Event()
    with output.progress("Materializing", total, "windows") as step:

        def watch() -> None:
            seen = before
            while not stop.wait(0.5):
                now = len(lake.published())
                step("", now - seen)
                seen = now

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
