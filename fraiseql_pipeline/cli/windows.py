"""``materialize``, ``late``, ``audit`` and ``status``: what concerns windows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import WindowError
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, parse_time, tile

_TIME = "Time: ISO 8601 (naive is UTC), or now, now-1h, now-7d."


@click.command()
@click.option("--start", required=True, help=f"First instant. {_TIME}")
@click.option("--end", required=True, help="End, exclusive; of the windows up to it, those that have ended are published.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 32), help="Windows worked on side by side.")
@click.option("--force", is_flag=True, help="Rewrite windows whose content is unchanged.")
@click.option("--allow-shrink", is_flag=True, help="Let a window lose events that the source no longer has.")
@pass_output
def materialize(output: Output, start: str, end: str, jobs: int, force: bool, allow_shrink: bool) -> None:
    """Publish the windows from --start to --end, one Delta commit each. Running it again changes nothing."""
    settings = output.settings
    chosen = _windows(start, end, settings)
    with open_changelog(settings) as changelog, output.progress("Materializing", len(chosen), "windows") as step:
        done = pipeline.materialize(
            chosen,
            settings=settings,
            changelog=changelog,
            lake=Lake.of(settings),
            jobs=jobs,
            force=force,
            allow_shrink=allow_shrink,
            on_window=lambda one: step(one.window.key, 1),
        )
    _report(output, done)


@click.command()
@click.option("--start", help=f"Look only at windows from here. {_TIME}")
@click.option("--end", help="Look only at windows that start before this.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 32), help="Windows worked on side by side.")
@pass_output
def late(output: Output, start: str | None, end: str | None, jobs: int) -> None:
    """Add late events to the published windows they belong to."""
    settings, lake = output.settings, Lake.of(output.settings)
    now = datetime.now(UTC)
    published = lake.published(parse_time(start, now) if start else None, parse_time(end, now) if end else None)
    with open_changelog(settings) as changelog:
        done = pipeline.merge_late(sorted(published), settings=settings, changelog=changelog, lake=lake, jobs=jobs)
    if not done:
        output.say("No late events.")
    _report(output, done)


@click.command()
@click.option("--start", help=f"Audit only windows from here. {_TIME}")
@click.option("--end", help="Audit only windows that start before this.")
@pass_output
def audit(output: Output, start: str | None, end: str | None) -> None:
    """Compare every published window with the source, row by row by fingerprint. Exit code 3 when they differ."""
    settings, lake = output.settings, Lake.of(output.settings)
    now = datetime.now(UTC)
    published = lake.published(parse_time(start, now) if start else None, parse_time(end, now) if end else None)
    with open_changelog(settings) as changelog, output.progress("Auditing", len(published), "windows") as step:
        findings = []
        for window in sorted(published):
            findings.append(pipeline.audit(window, published[window], changelog=changelog, lake=lake))
            step(window.key, 1)
    bad = [finding for finding in findings if not finding.equal]
    output.result(
        {
            "windows": len(findings),
            "differing": [{"window": f.window.key, "source_rows": f.source_rows, "lake_rows": f.lake_rows} for f in bad],
        }
    )
    if bad:
        output.table(
            "Windows that differ from the source",
            ("window", "source events", "lake events"),
            [(f.window.key, f.source_rows, f.lake_rows) for f in bad],
        )
        output.say("Events may have been restored, deleted or written with an old key; `materialize --force` reads a window again.")
        raise SystemExit(3)
    output.say(f"{len(findings):,} windows equal the source.")


@click.command()
@pass_output
def status(output: Output) -> None:
    """What is published: windows, events, the newest window and the holes before it."""
    settings = output.settings
    published = Lake.of(settings).published()
    windows = sorted(published)
    holes = [w for w in tile(windows[0].start, windows[-1].end, settings.window) if w not in published] if windows else []
    commits = list(published.values())
    rows = {
        "lake": settings.lake_uri,
        "windows": len(windows),
        "first_window": windows[0].key if windows else None,
        "last_window": windows[-1].key if windows else None,
        "holes": [hole.key for hole in holes],
        "provisional": sum(commit.state == "provisional" for commit in commits),
        "accepted_rows": sum(commit.accepted_rows for commit in commits),
        "quarantined_rows": sum(commit.quarantined_rows for commit in commits),
        "complete_through": (holes[0].start if holes else windows[-1].end).isoformat() if windows else None,
    }
    output.result(rows)
    if not windows:
        output.say(
            f"Nothing is published in {settings.lake_uri} yet; `fraiseql-pipeline materialize --start … --end now` publishes windows."
        )
        return
    shown = {
        **rows,
        "holes": ", ".join(h.key for h in holes[:5]) + (f" and {len(holes) - 5} more" if len(holes) > 5 else "") or "none",
    }
    output.table(
        "Lake", ("what", "value"), [(name.replace("_", " "), f"{v:,}" if isinstance(v, int) else v) for name, v in shown.items()]
    )


def _windows(start: str, end: str, settings: Settings) -> list[Window]:
    """The windows that touch the range and have ended; a range up to ``now`` means up to the last of those."""
    now = datetime.now(UTC)
    first, last = parse_time(start, now), parse_time(end, now)
    if first >= last:
        raise WindowError(f"--start must lie before --end, got {first.isoformat()} and {last.isoformat()}.")
    chosen = [window for window in tile(first, last, settings.window) if window.end <= now]
    if not chosen:
        raise WindowError(
            f"No {settings.window} has ended between {first.isoformat()} and {last.isoformat()}; choose a wider range."
        )
    return chosen


def _report(output: Output, done: Sequence[Materialization]) -> None:
    output.result(
        {
            "windows": [
                {
                    "window": one.window.key,
                    "outcome": one.commit.outcome,
                    "state": one.commit.state,
                    "table_version": one.commit.table_version,
                    "settled_pk": one.commit.settled_pk,
                    "source_rows": one.commit.source_rows,
                    "accepted_rows": one.commit.accepted_rows,
                    "quarantined_rows": one.commit.quarantined_rows,
                    "reasons": one.reasons,
                    "seconds": one.seconds,
                }
                for one in done
            ]
        }
    )
    if not done:
        return
    shown = done if len(done) <= 20 else [*done[:10], *done[-10:]]
    output.table(
        f"{len(done)} windows" if len(shown) == len(done) else f"{len(done)} windows, the first and the last ten",
        ("window", "outcome", "state", "events", "accepted", "quarantined", "seconds"),
        [
            (
                one.window.key,
                one.commit.outcome,
                one.commit.state,
                f"{one.commit.source_rows:,}",
                f"{one.commit.accepted_rows:,}",
                f"{one.commit.quarantined_rows:,}",
                f"{one.seconds['total']:.2f}",
            )
            for one in shown
        ],
    )
