"""What a command prints: progress and tables on a terminal, plain lines elsewhere, one JSON object with ``--json``.

What lives here: the choice between the three. What must not: a decision about what is said.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fraiseql_pipeline.settings import Settings, unknown_variables

Step = Callable[[str, int], None]
"""Called as work is done: what was just done, and how many units that were."""


class _Console(Console):
    """Writes what it is given: no markup, no emoji, no wrapping of lines. Whoever read it may go away without ending the work."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.width:  # COLUMNS=0 says that nobody knows; rich takes it for lines without room, and prints none
            self.width = 80

    def on_broken_pipe(self) -> None:
        """The reader of a pipe (head, less) has seen enough: the rest goes nowhere, and neither does what Python flushes at its end."""
        self.quiet = True
        forget(self.file)


def forget(stream: IO[str]) -> None:
    """Let a stream whose reader is gone write into nothing."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


@dataclass
class Output:
    """Of one command. What it found goes to stdout, progress and remarks to stderr; with ``--json``, stdout has the object alone."""

    as_json: bool
    load: Callable[[], Settings]
    console: Console = field(init=False)
    aside: Console = field(init=False)

    def __post_init__(self) -> None:
        self.aside = _Console(stderr=True)
        self.console = self.aside if self.as_json else _Console(stderr=False)

    @cached_property
    def settings(self) -> Settings:
        for name, meant in unknown_variables(os.environ).items():
            if meant is not None:
                self.remark(f"{name} is not a setting; did you mean {meant}?")
        return self.load()

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    @property
    def width(self) -> int:
        """Characters of a line of the terminal."""
        return self.console.width

    def say(self, text: str) -> None:
        """A line for a person."""
        self.console.print(text, soft_wrap=True)

    def remark(self, text: str) -> None:
        """A line for a person that is no part of what the command was asked for."""
        self.aside.print(text, soft_wrap=True)

    def result(self, value: dict[str, Any]) -> None:
        """The command's result; printed only with ``--json``."""
        if self.as_json:
            try:
                click.echo(json.dumps(value, default=_plain))
            except BrokenPipeError:
                forget(sys.stdout)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Aligned columns, numbers to the right; drawn on a terminal. Nothing with ``--json``, which tells the same."""
        if self.as_json:
            return
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        right = [bool(cells) and all(map(_NUMBER.fullmatch, column)) for column in zip(*cells, strict=True)] or [False] * len(
            header
        )
        if self.is_terminal:
            drawn = Table(title=Text(title) if title else None, title_justify="left", title_style="bold")
            for name, number in zip(header, right, strict=True):
                drawn.add_column(Text(name), justify="right" if number else "left")
            for row in cells:
                drawn.add_row(*map(Text, row))
            self.console.print(drawn)
            return
        widths = [min(max(map(len, column)), _PADDED) for column in zip(header, *cells, strict=True)]
        for row in ([*header], *cells):
            aligned = (
                cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, right, strict=True)
            )
            self.say("  ".join(aligned).rstrip())

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Step]:
        """A bar on a terminal; elsewhere a line per tenth, so that a log shows that work goes on. On stderr: stdout is for the result.

        ``total``: None where nobody knows how much there is; a bar then tells that work goes on, and elsewhere there is nothing.
        """
        if self.aside.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                *([MofNCompleteColumn(), TextColumn(unit)] if unit else []),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.aside, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda what, units: bar.update(task, advance=units, description=f"{title} {what}".strip())
            return
        done = tenths = 0

        def step(what: str, units: int) -> None:
            nonlocal done, tenths
            done += units
            if total and done * 10 // total > tenths:
                tenths = done * 10 // total
                self.remark(f"{title}: {done:,} of {total:,} {unit} ({what})" if what else f"{title}: {done:,} of {total:,} {unit}")

        yield step


def _plain(value: object) -> str:
    """What JSON has no form for: a time as ISO 8601, anything else as its text."""
    return value.isoformat() if isinstance(value, date) else str(value)


#: A cell of a column of figures, with a unit or a share, or without one.
_NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?|")

#: Cells up to this are padded where lines are not drawn; a payload of 10 kB would push what follows as far to the right in every line.
_PADDED = 60


def printable(text: str) -> str:
    """The text with what would move the cursor, break the line or turn its direction spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pass_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command its ``Output`` as first argument."""
    return click.make_pass_decorator(Output)(command)
