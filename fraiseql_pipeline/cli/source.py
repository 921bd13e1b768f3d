"""``doctor`` and ``sample``: what concerns the source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import click

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import SHAPES, ChangeLog, Contract, Settlement, ShapeName, open_changelog, write_sample
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import LakeUnavailable, PipelineError, SourceRefused
from fraiseql_pipeline.lake import Commit, Lake
from fraiseql_pipeline.lake.storage import LocalStorage
from fraiseql_pipeline.settings import unknown_variables
from fraiseql_pipeline.window import parse_time

_EMBEDDED = "embedded Postgres in .fraiseql, sample events"


@contextmanager
def source_of(output: Output, *, samples: bool = False) -> Iterator[ChangeLog]:
    """The change log of a command, which says so where it is one of made-up events. ``samples``: they may be made up now."""
    with open_changelog(output.settings, samples=samples) as changelog:
        if output.settings.database_url is None:
            output.remark(f"source: {_EMBEDDED}")
        yield changelog


@dataclass
class _Looked:
    """What the checks of ``doctor`` have found; None where a problem kept one from looking."""

    problems: list[PipelineError] = field(default_factory=list)
    where: str | None = None
    contract: Contract | None = None
    settlement: Settlement | None = None
    unplaced: int = 0
    published: int | None = None
    newest: Commit | None = None

    @contextmanager
    def check(self) -> Iterator[None]:
        try:
            yield
        except PipelineError as problem:
            self.problems.append(problem)

    def source(self, output: Output) -> None:
        with self.check(), source_of(output) as changelog:
            self.where = _EMBEDDED if output.settings.database_url is None else changelog.where()
            self.contract = changelog.preflight()
            with self.check():
                self.settlement = changelog.settle()
            with self.check():
                self.unplaced = changelog.unplaced()

    def lake(self, lake: Lake) -> None:
        with self.check():
            self.published, self.newest = len(lake.published()), lake.newest()
        if self.settlement is not None:
            self.problems += _unlike(self.newest, self.settlement)
        self.problems += _unwritable(lake)


@click.command()
@pass_output
def doctor(output: Output) -> None:
    """Check everything a run needs: the source, its privileges, open writers, the lake. Writes nothing.

    All checks are made and told, whatever the others find; the exit code is that of the worst problem, the highest.
    """
    settings, looked = output.settings, _Looked()
    looked.source(output)
    looked.lake(Lake.of(settings))
    contract, settlement, problems = looked.contract, looked.settlement, looked.problems
    warnings = [warning.rstrip(".") for warning in contract.warnings] if contract is not None else []
    warnings += [f"open transaction: {blocker}" for blocker in settlement.blockers] if settlement is not None else []
    if looked.unplaced:
        warnings.append(
            f"{looked.unplaced:,} events have an infinite or impossible created_at and belong to no window; correct them in the source"
        )
    warnings += [f"{name} is not a setting of this program" for name, meant in unknown_variables(os.environ).items() if not meant]
    sealed = settlement.sealed_until if settlement is not None and settlement.sealed_until.year > 1 else None
    output.result(
        {
            "source": contract.identity if contract is not None else None,
            "source_is": looked.where,
            "lake": settings.lake_uri,
            "can_seal": contract.can_seal if contract is not None else None,
            "settled_pk": settlement.settled_pk if settlement is not None else None,
            "sealed_until": sealed,
            "published_windows": looked.published,
            "warnings": warnings,
            "problems": [str(problem) for problem in problems],
        }
    )
    found: list[tuple[str, str | None]] = [("source", looked.where)]
    if contract is not None:
        found += [
            ("change log", "readable"),
            ("windows can be sealed", "yes" if contract.can_seal else "no, they stay provisional"),
        ]
    if settlement is not None:
        found += [
            ("settled up to key", f"{settlement.settled_pk:,}"),
            ("sealed until", f"{sealed:%Y-%m-%d %H:%M:%S} UTC" if sealed else "nothing"),
        ]
    found += [("lake", settings.lake_uri), ("published windows", None if looked.published is None else f"{looked.published:,}")]
    output.table("Doctor", ("check", "found"), [(check, "a problem, see below" if told is None else told) for check, told in found])
    for warning in warnings:
        output.say(f"Warning: {warning}.")
    if not problems:
        return
    worst = max(problems, key=lambda problem: problem.exit_code)
    for problem in problems:
        if problem is not worst:
            output.say(f"Problem: {problem}")
    raise worst


def _unlike(newest: Commit | None, settlement: Settlement) -> Iterator[PipelineError]:
    """What `materialize` would refuse: a source that is not the one the lake was published from."""
    try:
        pipeline.check_same_source(newest, settlement)
    except SourceRefused as error:
        yield error


def _unwritable(lake: Lake) -> Iterator[PipelineError]:
    """Whether the lake's directory takes files, without leaving one. Of an object store, only a write would tell."""
    storage = lake.events.storage
    if not isinstance(storage, LocalStorage):
        return
    try:
        at = next((folder for folder in (storage.root, *storage.root.parents) if folder.exists()), storage.root)
        with tempfile.TemporaryFile(dir=at):
            return
    except OSError as error:
        yield LakeUnavailable(
            f"The lake cannot be written: {os.strerror(error.errno) if error.errno else 'no such directory'}; "
            "check FRAISEQL_LAKE_URI and who may write there."
        )


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
    help="Width of the events: 155 bytes of JSON in `data` on average, or 450, most of it nested.",
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
