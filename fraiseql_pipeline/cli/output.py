"""What a command prints: progress and tables on a terminal, plain lines elsewhere, one JSON object with ``--json``.

What lives here: the choice between the three. What must not: a decision about what is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fraiseql_pipeline.settings import Settings


def package_version() -> str:
    try:
        return version("fraiseql-pipeline")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


Step = Callable[[str, int], None]
"""Called as work is done: what was just done, and how many units that were."""


@dataclass
class Output:
    """Of one command. Human text goes to stdout, or to stderr when stdout carries JSON, so that a pipe stays machine-readable."""

    as_json: bool
    load: Callable[[], Settings]
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        self.console = Console(stderr=self.as_json, highlight=False, soft_wrap=not sys.stdout.isatty())

    @cached_property
    def settings(self) -> Settings:
        return self.load()

    def say(self, text: str) -> None:
        """A line for a person."""
        self.console.print(text, markup=False)

    def result(self, value: dict[str, Any]) -> None:
        """The command's result; printed only with ``--json``."""
        if self.as_json:
            click.echo(json.dumps(value, default=str))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Aligned columns, drawn on a terminal; nothing with ``--json``, which tells the same."""
        if self.as_json:
            return
        if self.console.is_terminal:
            drawn = Table(title=title or None, title_justify="left", title_style="bold")
            for name in header:
                drawn.add_column(name, justify="left" if name == header[0] else "right")
            for row in rows:
                drawn.add_row(*(str(cell) for cell in row))
            self.console.print(drawn)
            return
        widths = [max(len(str(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            self.say("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Step]:
        """A bar on a terminal; elsewhere a line per tenth, so that a log shows that work goes on."""
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda what, units: bar.update(task, advance=units, description=f"{title} {what}".strip())
            return
        done = tenths = 0

        def step(what: str, units: int) -> None:
            nonlocal done, tenths
            done += units
            if total and done * 10 // total > tenths:
                tenths = done * 10 // total
                self.say(f"{title}: {done:,} of {total:,} {unit} ({what})" if what else f"{title}: {done:,} of {total:,} {unit}")

        yield step


def pass_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command its ``Output`` as first argument."""
    return click.make_pass_decorator(Output)(command)
