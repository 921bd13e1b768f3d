"""``doctor`` and ``sample``: what concerns the source."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from fraiseql_pipeline.changelog import SHAPES, ShapeName, open_changelog, write_sample
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import parse_time


@click.command()
@pass_output
def doctor(output: Output) -> None:
    """Check everything a run needs: the source, its privileges, open writers, the lake. Writes nothing."""
    settings = output.settings
    with open_changelog(settings) as changelog:
        contract = changelog.preflight()
        settlement = changelog.settle()
        unplaced = changelog.unplaced()
    published = Lake.of(settings).published()
    warnings = list(contract.warnings)
    if settlement.blockers:
        warnings += [f"open transaction: {blocker}" for blocker in settlement.blockers]
    if unplaced:
        warnings.append(
            f"{unplaced:,} events have an infinite or impossible created_at and belong to no window; correct them in the source"
        )
    output.result(
        {
            "source": contract.identity,
            "can_seal": contract.can_seal,
            "settled_pk": settlement.settled_pk,
            "sealed_until": settlement.sealed_until,
            "published_windows": len(published),
            "warnings": warnings,
        }
    )
    output.table(
        "Doctor",
        ("check", "found"),
        [
            ("change log", "readable"),
            ("windows can be proven complete", "yes" if contract.can_seal else "no, they stay provisional"),
            ("settled up to key", f"{settlement.settled_pk:,}"),
            ("sealed until", f"{settlement.sealed_until:%Y-%m-%d %H:%M:%S} UTC"),
            ("published windows", f"{len(published):,}"),
        ],
    )
    for warning in warnings:
        output.say(f"Warning: {warning}.")


@click.command()
@click.option("--events", default=300_000, show_default=True, type=click.IntRange(1), help="How many events to write.")
@click.option("--days", default=2, show_default=True, type=click.IntRange(1, 366), help="Over how many days up to --end.")
@click.option("--end", default="now", show_default=True, help="End of the sample; ISO 8601 or now.")
@click.option("--seed", default=1, show_default=True, help="The same seed gives the same events.")
@click.option(
    "--shape",
    default="typical",
    show_default=True,
    type=click.Choice(SHAPES),
    help="Width of the events: 155 bytes of JSON on average, or 450, most of it nested.",
)
@pass_output
def sample(output: Output, events: int, days: int, end: str, seed: int, shape: ShapeName) -> None:
    """Fill a database with sample events: orders, users, products, invoices, payments. For an empty change log only."""
    with open_changelog(output.settings, create=True) as changelog, output.progress("Writing", events, "events") as step:
        written = write_sample(
            changelog,
            events,
            days=days,
            end=parse_time(end, datetime.now(UTC)),
            seed=seed,
            shape=shape,
            progress=lambda n: step("", n),
        )
    output.result({"events": written.events, "seconds": written.seconds})
    output.say(f"{written.events:,} events written in {written.seconds:.1f} s ({written.events / written.seconds:,.0f} events/s).")
