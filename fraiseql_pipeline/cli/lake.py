"""``fsck``, ``maintain`` and ``quarantine``: what concerns the Delta tables."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click

from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import LakeEmpty
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window


def nothing_published(lake: Lake) -> str:
    """The sentence for a lake that is not there, which may be a path that is not meant."""
    return (
        f"Nothing is published in {lake.uri}; check FRAISEQL_LAKE_URI, or publish windows with "
        "`fraiseql-pipeline materialize --start … --end now`."
    )


def _check_something(lake: Lake) -> None:
    if lake.newest() is None:
        raise LakeEmpty(nothing_published(lake))


@click.command()
@click.option("--repair", is_flag=True, help="Do the repairs that lose nothing.")
@pass_output
def fsck(output: Output, repair: bool) -> None:
    """Look for torn log entries, missing files and counts that do not match. Exit code 5 when something is wrong."""
    lake = Lake.of(output.settings)
    with output.progress("Examining the lake", None, ""):
        findings = lake.fsck(repair=repair)
    if not findings:
        _check_something(lake)
    open_findings = [finding for finding in findings if not finding.repaired]
    output.result({"findings": [asdict(finding) for finding in findings]})
    if not findings:
        output.say("The lake is sound.")
        return
    output.table(
        "Findings",
        ("table", "where", "problem", "remedy"),
        [(f.table, f.subject, f.problem, "repaired" if f.repaired else f.remedy) for f in findings],
    )
    if open_findings:
        raise SystemExit(5)


@click.command()
@click.option(
    "--retention-days",
    default=7,
    show_default=True,
    type=click.IntRange(1),
    help="How long a file is kept that the newest version does not need: readers of older versions may.",
)
@pass_output
def maintain(output: Output, retention_days: int) -> None:
    """Compact days that ended two days ago, delete files that are not needed any more, write a checkpoint."""
    lake = Lake.of(output.settings)
    _check_something(lake)
    with output.progress("Maintaining the lake", None, ""):
        done = asdict(lake.maintain(datetime.now(UTC), retention=timedelta(days=retention_days)))
    output.result(done)
    rows = [(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else len(value)) for name, value in done.items()]
    output.table("Maintenance", ("what", "count"), rows)


@click.group()
def quarantine() -> None:
    """Look at rejected events."""


@quarantine.command("list")
@pass_output
def quarantine_list(output: Output) -> None:
    """How many events are quarantined, per window."""
    lake = Lake.of(output.settings)
    _check_something(lake)
    published = lake.published()
    held = {window: commit for window, commit in sorted(published.items()) if commit.quarantined_rows}
    output.result(
        {"windows": [{"window": w.key, "quarantined_rows": c.quarantined_rows, "reasons": c.reasons} for w, c in held.items()]}
    )
    if not held:
        output.say("Nothing is quarantined.")
        return
    rows = [
        (w.key, f"{c.quarantined_rows:,}", ", ".join(f"{name} ({count})" for name, count in sorted(c.reasons.items())))
        for w, c in held.items()
    ]
    output.table("Quarantined events", ("window", "events", "reasons"), rows)


@quarantine.command("show")
@click.argument("window")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="How many events at most.")
@pass_output
def quarantine_show(output: Output, window: str, limit: int) -> None:
    """The rejected events of one WINDOW (a key such as 2026-11-01-13:00): keys and reasons, with what fitted no column.

    --json has every column of them, and in `rows` how many there are.
    """
    lake, asked = Lake.of(output.settings), Window.parse(window)
    if asked not in lake.published(asked.start, asked.end):
        _check_something(lake)
        raise LakeEmpty(f"Window {window} is not published; `fraiseql-pipeline quarantine list` names those with rejected events.")
    held = lake.quarantined(asked)
    rows = held.slice(0, limit).to_pylist()
    output.result({"window": window, "rows": held.num_rows, "events": rows})
    if not rows:
        output.say(f"Window {window} has no quarantined events.")
        return
    output.table(
        f"Quarantined events of {window}",
        ("pk", "event", "entity type", "reasons", "did not fit"),
        [(r["pk"], r["event_id"], r["entity_type"], ", ".join(r["reasons"]), r["raw"] or "") for r in rows],
    )
    if held.num_rows > len(rows):
        output.remark(f"{len(rows):,} of {held.num_rows:,} are shown; --limit {held.num_rows} shows all.")
