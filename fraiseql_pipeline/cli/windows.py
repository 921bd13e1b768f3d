"""``materialize``, ``late``, ``audit`` and ``status``: what concerns windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice

import click

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.cli.lake import nothing_published
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.cli.source import source_of
from fraiseql_pipeline.errors import LakeEmpty, PipelineError, WindowError
from fraiseql_pipeline.lake import Commit, Lake, Standing
from fraiseql_pipeline.pipeline import Materialization
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window, parse_time, tile, tile_gaps

#: Of one run: more than a year of hours. A slip of the pen would fill the lake with empty windows, and no command takes them back.
_MOST_WINDOWS = 10_000
#: Holes that ``status`` names.
_LISTED_HOLES = 1_000
#: Of what ``status`` tells, what its table has in the first window and in the holes.
_SAID_BY_OTHERS = {"start", "more_holes"}

_TIME = "Time: ISO 8601 (naive is UTC), or now, now-1h, now-7d."


@click.command()
@click.option("--start", required=True, help=f"First instant. {_TIME}")
@click.option("--end", required=True, help="End, exclusive; of the windows up to it, those that have ended are published.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 32), help="Windows worked on side by side.")
@click.option(
    "--force",
    is_flag=True,
    help="Publish from this source whatever the lake was published from, and write every window anew: unchanged, damaged or settled "
    "further ones too.",
)
@click.option("--allow-shrink", is_flag=True, help="Let a window lose events that the source no longer has.")
@click.option("--other-size", is_flag=True, help="Publish windows of another size than the lake has, whole days instead of hours.")
@pass_output
def materialize(output: Output, start: str, end: str, jobs: int, force: bool, allow_shrink: bool, other_size: bool) -> None:
    """Publish the windows from --start to --end, one Delta commit each. Running it again changes nothing."""
    settings, lake = output.settings, Lake.of(output.settings)
    chosen = _windows(start, end, settings)
    with (
        _reported(output) as done,
        source_of(output, samples=True) as changelog,
        output.progress("Materializing", len(chosen), "windows") as step,
    ):

        def on_window(one: Materialization) -> None:
            done.append(one)
            step(one.window.key, 1)

        pipeline.materialize(
            chosen,
            settings=settings,
            changelog=changelog,
            lake=lake,
            jobs=jobs,
            force=force,
            allow_shrink=allow_shrink,
            other_size=other_size,
            on_window=on_window,
        )


@click.command()
@click.option("--start", help=f"Look only at windows from here. {_TIME}")
@click.option("--end", help="Look only at windows that start before this.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 32), help="Windows worked on side by side.")
@click.option(
    "--force",
    is_flag=True,
    help="Add them to windows published from a change log of another identity too: the same one, taken over by a standby.",
)
@pass_output
def late(output: Output, start: str | None, end: str | None, jobs: int, force: bool) -> None:
    """Add late events to the published windows they belong to."""
    settings, lake = output.settings, Lake.of(output.settings)
    published = _published(lake, start, end)
    with (
        _reported(output, late=True) as done,
        source_of(output) as changelog,
        output.progress("Late events", None, "windows") as step,
    ):

        def on_window(one: Materialization) -> None:
            done.append(one)
            step(one.window.key, 1)

        pipeline.merge_late(
            sorted(published), settings=settings, changelog=changelog, lake=lake, jobs=jobs, force=force, on_window=on_window
        )


@click.command()
@click.option("--start", help=f"Audit only windows from here. {_TIME}")
@click.option("--end", help="Audit only windows that start before this.")
@pass_output
def audit(output: Output, start: str | None, end: str | None) -> None:
    """Compare every published window with the source, row by row by fingerprint. Exit code 3 when they differ."""
    lake = Lake.of(output.settings)
    published = _published(lake, start, end)
    with source_of(output) as changelog, output.progress("Auditing", len(published), "windows") as step:
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
        fewer = " One that has fewer events in the source needs --allow-shrink besides." if any(map(_has_fewer, bad)) else ""
        output.say(
            f"Events may have been restored, deleted or written with an old key; `materialize --force` reads a window again.{fewer}"
        )
        raise SystemExit(3)
    output.say(f"{len(findings):,} windows equal the source.")


def _has_fewer(finding: pipeline.Audited) -> bool:
    return finding.source_rows < finding.lake_rows


@click.command()
@pass_output
def status(output: Output) -> None:
    """What is published: windows, events, the newest window and the holes before it, from FRAISEQL_START on if that is set."""
    settings, lake = output.settings, Lake.of(output.settings)
    published = lake.published()
    windows = sorted(published)
    standing = Standing.of(published, settings.first_window)
    listed = list(islice(tile_gaps(standing.gaps, settings.window), _LISTED_HOLES + 1))
    holes, more = listed[:_LISTED_HOLES], len(listed) > _LISTED_HOLES
    rows = {
        "lake": settings.lake_uri,
        "windows": len(windows),
        "first_window": windows[0].key if windows else None,
        "last_window": windows[-1].key if windows else None,
        "start": windows[0].start.isoformat() if windows else None,
        "holes": [hole.key for hole in holes],
        "more_holes": more,
        "provisional": standing.provisional,
        "accepted_rows": standing.accepted_rows,
        "quarantined_rows": standing.quarantined_rows,
        "late_rows": standing.late_rows,
        "complete_through": standing.complete_through.isoformat() if standing.complete_through else None,
    }
    output.result(rows)
    if not windows:
        output.say(nothing_published(lake))
        return
    shown = {
        **{name: value for name, value in rows.items() if name not in _SAID_BY_OTHERS},
        "holes": ", ".join(h.key for h in holes[:5])
        + (f" and {'more than ' if more else ''}{len(holes) - 5:,} more" if len(holes) > 5 else "")
        or "none",
    }
    output.table(
        "Lake", ("what", "value"), [(name.replace("_", " "), f"{v:,}" if isinstance(v, int) else v) for name, v in shown.items()]
    )


def _published(lake: Lake, start: str | None, end: str | None) -> dict[Window, Commit]:
    """The published windows of a range. Raises ``LakeEmpty`` when there is none: a check of nothing must not look like one that passed."""
    now = datetime.now(UTC)
    first, last = parse_time(start, now) if start else None, parse_time(end, now) if end else None
    if first is not None and last is not None:
        _check_order(first, last)
    if found := lake.published(first, last):
        return found
    standing = sorted(lake.published())
    if not standing:
        raise LakeEmpty(nothing_published(lake))
    bounds = [f"{word} {at.isoformat(timespec='minutes')}" for word, at in (("from", first), ("before", last)) if at is not None]
    raise LakeEmpty(f"Nothing is published {' and '.join(bounds)}; the lake holds {standing[0].key} to {standing[-1].key}.")


def _check_order(first: datetime, last: datetime) -> None:
    if first >= last:
        raise WindowError(f"--start must lie before --end, got {first.isoformat()} and {last.isoformat()}.")


def _windows(start: str, end: str, settings: Settings) -> list[Window]:
    """The windows that touch the range and have ended; a range up to ``now`` means up to the last of those."""
    now = datetime.now(UTC)
    first, last = parse_time(start, now), parse_time(end, now)
    _check_order(first, last)
    chosen = [w for w in islice(tile(first, min(last, now), settings.window), _MOST_WINDOWS + 1) if w.end <= now]
    if len(chosen) > _MOST_WINDOWS:
        raise WindowError(
            f"From {first.isoformat()} to {last.isoformat()} there are more than {_MOST_WINDOWS:,} windows, the most for one run; if it is "
            "no slip, publish them range by range."
        )
    if not chosen:
        raise WindowError(
            f"No {settings.window} has ended between {first.isoformat()} and {last.isoformat()}; choose a wider range."
        )
    return chosen


@contextmanager
def _reported(output: Output, *, late: bool = False) -> Iterator[list[Materialization]]:
    """Takes the windows of a run as they are done and reports them, oldest first, also where the run ends in an error."""
    done: list[Materialization] = []
    try:
        yield done
    except BaseException as error:
        refused = error.refused if isinstance(error, PipelineError) else ()
        if done or refused:
            _report(output, sorted(done, key=lambda one: one.window), refused, late=late)
        # Of several, or of a run that ended for another reason, the error does not have each one's.
        if refused and str(error) != str(refused[0][1]):
            output.table("Windows that were refused", ("window", "why"), refused)
        raise
    _report(output, sorted(done, key=lambda one: one.window), late=late)


def _report(
    output: Output, done: Sequence[Materialization], refused: Sequence[tuple[str, PipelineError]] = (), *, late: bool
) -> None:
    """Counts are those of whole windows; beside them, of late events, those of this run."""
    added = [one for one in done if one.commit.outcome == "merged"] if late else []
    total = {name: sum(_rows(one)[name] for one in added) for name in ("source_rows", "accepted_rows", "quarantined_rows")}
    output.result(
        {
            **({"late": total} if late else {}),
            "windows": [
                {
                    "window": one.window.key,
                    "outcome": one.commit.outcome,
                    "state": one.commit.state,
                    "table_version": one.commit.table_version,
                    "settled_pk": one.commit.settled_pk,
                    **_rows(one.commit),
                    "reasons": one.commit.reasons,
                    **({"late": {**_rows(one), "reasons": one.reasons}} if one in added else {}),
                    "seconds": one.seconds,
                }
                for one in done
            ],
            "refused": [{"window": key, "error": str(error)} for key, error in refused],
        }
    )
    if done:
        _show(output, done, late=late)
    if late and not (done or refused):
        output.say("No late events.")
    elif added:
        output.say(
            f"{total['source_rows']:,} late events: {total['accepted_rows']:,} accepted, {total['quarantined_rows']:,} quarantined."
        )


def _rows(counted: Materialization | Commit) -> dict[str, int]:
    return {name: getattr(counted, name) for name in ("source_rows", "accepted_rows", "quarantined_rows")}


def _show(output: Output, done: Sequence[Materialization], *, late: bool) -> None:
    shown = done if len(done) <= 20 or not output.is_terminal else [*done[:10], *done[-10:]]
    output.table(
        f"{len(done)} windows" if len(shown) == len(done) else f"{len(done)} windows, the first and the last ten",
        ("window", "outcome", "state", *(["late"] if late else []), "events", "accepted", "quarantined", "seconds"),
        [
            (
                one.window.key,
                one.commit.outcome,
                one.commit.state,
                *([f"{one.source_rows:,}"] if late else []),
                f"{one.commit.source_rows:,}",
                f"{one.commit.accepted_rows:,}",
                f"{one.commit.quarantined_rows:,}",
                f"{one.seconds['total']:.2f}",
            )
            for one in shown
        ],
    )
