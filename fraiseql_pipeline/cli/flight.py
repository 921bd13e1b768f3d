"""``serve``, ``read`` and ``token``: events over Arrow Flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.markup import escape

from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import InputError
from fraiseql_pipeline.flight.auth import SCOPES, new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.view import pinned
from fraiseql_pipeline.flight.workers import Started, run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.ticket import Ticket


@click.command()
@click.option("--insecure", is_flag=True, help="Listen on an address other machines reach even without TLS or authentication.")
@pass_output
def serve(output: Output, insecure: bool) -> None:
    """Serve the published windows over Arrow Flight until SIGTERM or Ctrl-C; running streams may finish."""
    settings = output.settings

    def started(where: Started) -> None:
        metrics = "no metrics" if where.metrics_url is None else f"metrics on {where.metrics_url}/metrics"
        output.say(f"Arrow Flight on {where.url}, {metrics}, lake {settings.lake_uri}; Ctrl-C stops it.")
        output.result({"url": where.url, "metrics_url": where.metrics_url})

    run(settings, insecure=insecure, started=started)


@click.command()
@click.argument("principal")
@click.option("--org", "org_id", help="The one tenant (a UUID) whose events the token opens; without it, all.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(sorted(SCOPES)), default=("read",), help="May be given several times."
)
@pass_output
def token(output: Output, principal: str, org_id: str | None, scopes: tuple[str, ...]) -> None:
    """Print a new bearer token for PRINCIPAL, and the line for FRAISEQL_ARROW_FLIGHT_TOKENS_FILE. The token is shown only now."""
    new, line = new_token(principal, org_id, scopes)
    output.say(f"Token: {new}\nLine:  {line}")
    output.result({"token": new, "line": line})


@click.command()
@click.argument("ticket")
@click.option(
    "--output", "target", type=click.Path(path_type=Path, dir_okay=False), help="Write a .parquet, .arrow, .csv or .json file."
)
@click.option("--url", help="Read from a Flight server (grpc://host:port or grpc+tls://host:port) instead of the lake itself.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File that holds the bearer token for --url.")
@click.option(
    "--tls-root-certs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PEM file of the authorities to trust for --url; without it, the system's.",
)
@pass_output
def read(
    output: Output, ticket: str, target: Path | None, url: str | None, token_file: Path | None, tls_root_certs: Path | None
) -> None:
    """Read the events of a TICKET, for example events:Order:now-1h:now:5000; without --output, the first ones are shown."""
    write = _writer(target) if target is not None else _show(output)
    began = time.perf_counter()
    with ExitStack() as stack:
        if url is not None:
            client = stack.enter_context(connect(url, token=_token(token_file), tls_root_certs=tls_root_certs))
            stream = stack.enter_context(client.stream(ticket))
            schema, batches = stream.schema, iter(stream)
        else:
            settings = output.settings
            lake = Lake.of(settings)
            asked = Ticket.parse(ticket.encode(), datetime.now(UTC))
            decided = plan(asked, pinned(lake, asked), first=settings.first_window, size=settings.window)
            schema, batches = decided.schema, decided.batches()
        rows = write(schema, batches)
    seconds = time.perf_counter() - began
    output.result({"rows": rows, "seconds": seconds, "output": None if target is None else str(target)})
    output.say(f"{rows:,} events in {seconds:.2f} s" + (f", written to {target}." if target else "."))


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"The token file {file.name!r} cannot be read; name a file that holds the token and nothing else."
        ) from None


_Write = Callable[[pa.Schema, Iterable[pa.RecordBatch]], int]


def _writer(target: Path) -> _Write:
    """Writes to a new file beside the target and renames it, so that a read that fails leaves no half file behind."""
    writers: dict[str, Callable[[Path, pa.Schema, Iterable[pa.RecordBatch]], None]] = {
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".csv": _csv,
        ".json": _json,
    }
    if target.suffix not in writers:
        raise InputError(f"The output file must end in {', '.join(writers)}; got {target.name!r}.")
    if not target.parent.is_dir():
        raise InputError(f"The folder of {target.name!r} does not exist; create it, or choose another one.")

    def write(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        rows = 0

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            for batch in batches:
                rows += batch.num_rows
                yield batch

        partial = target.with_name(f".{target.name}.partial")
        try:
            writers[target.suffix](partial, schema, counted())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return rows

    return write


def _parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(path, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _csv(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pyarrow.csv.CSVWriter(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _json(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """One JSON object per line."""
    import polars as pl

    del schema
    with path.open("wb") as file:
        for batch in batches:
            pl.DataFrame(batch).write_ndjson(file)


def _show(output: Output, first: int = 10) -> _Write:
    def write(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        rows = 0
        shown: list[list[str]] = []
        for batch in batches:
            rows += batch.num_rows
            shown += [[_cell(value) for value in row.values()] for row in batch.slice(0, first - len(shown)).to_pylist()]
        output.table("", schema.names, shown)
        return rows

    return write


def _cell(value: object, width: int = 40) -> str:
    text = escape("" if value is None else str(value))
    return text if len(text) <= width else text[: width - 1] + "…"
