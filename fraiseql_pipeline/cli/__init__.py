"""The command line ``fraiseql-pipeline``: thin commands over the library.

What lives here: the command group and the one place where an error becomes a sentence and an exit code. What must not: anything a
Python caller could want; that belongs in the library.

Exit codes: 0 done · 1 a defect or an interrupted run · 2 a wrong argument or setting · 3 Postgres · 4 validation halted a window ·
5 the lake · 6 the Flight server. ``fraiseql_pipeline/errors.py`` lists which error has which.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import click

from fraiseql_pipeline.cli import bench, demo, flight, lake, source, windows
from fraiseql_pipeline.cli.output import Output, printable
from fraiseql_pipeline.errors import LakeUnavailable, PipelineError, SettleTimeout
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.version import package_version


class Commands(click.Group):
    """A group whose commands end in one sentence instead of a traceback, and which takes its own options wherever they stand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own: list[str] = []
        others: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--config":
                own += [word, *islice(words, 1)]
            else:
                (own if word == "--json" or word.startswith("--config=") else others).append(word)
        return super().parse_args(ctx, [*own, *others])

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _interrupted_by_sigterm():
                return super().invoke(ctx)
        except PipelineError as error:
            lines = [f"Error: {error}"]
            if isinstance(error, SettleTimeout):
                lines += [f"  {blocker}" for blocker in error.blockers if blocker not in str(error)]
            if isinstance(error, LakeUnavailable) and isinstance(ctx.obj, Output):
                lines += _store(ctx.obj)
            click.echo("\n".join(printable(line) for line in lines), err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # Nobody reads stderr any more; closing it keeps the interpreter from complaining at exit.
            sys.stderr.close()
            ctx.exit(0)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that what it began is put in order; `serve` has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _store(output: Output) -> list[str]:
    """Which object store did not answer: the errors of its client name neither bucket nor endpoint."""
    if "settings" not in vars(output) or "://" not in output.settings.lake_uri:
        return []
    parts = urlsplit(output.settings.lake_uri)
    options = {name.lower(): value for name, value in (*os.environ.items(), *output.settings.lake_options.items())}
    endpoint = next(
        (options[name] for name in ("aws_endpoint_url", "aws_endpoint", "endpoint_url", "endpoint") if name in options), ""
    )
    where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return [f"  The lake is {where}" + (f" at {urlsplit(endpoint).netloc.rpartition('@')[2]}." if endpoint else ".")]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_version(), prog_name="fraiseql-pipeline")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with settings: their names in lower case, without FRAISEQL_.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.pass_context
def main(ctx: click.Context, config: Path | None, as_json: bool) -> None:
    """Change-log events of FraiseQL: from Postgres to Delta tables and Arrow Flight, in complete windows.

    Settings come from FRAISEQL_… environment variables; docs/configuration.md lists them.
    """
    from fraiseql_pipeline import memory

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows what it can
    memory.share_malloc()
    ctx.obj = Output(as_json=as_json, load=lambda: Settings.load(config))


for command in (
    demo.demo,
    windows.materialize,
    windows.late,
    windows.audit,
    windows.status,
    source.doctor,
    source.sample,
    lake.quarantine,
    lake.maintain,
    lake.fsck,
    flight.serve,
    flight.read,
    flight.token,
    bench.bench,
):
    main.add_command(command)
