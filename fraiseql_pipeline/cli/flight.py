"""``serve``, ``read`` and ``token``: events over Arrow Flight."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.cli.events import Write, show, write_to
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import InputError, NotAuthenticated
from fraiseql_pipeline.event import UUID_PATTERN
from fraiseql_pipeline.flight.auth import SCOPES, new_token
from fraiseql_pipeline.flight.client import Client, connect
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.view import pinned
from fraiseql_pipeline.flight.workers import Started, log_to_stderr, run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket

#: Events whose type is looked at when a read found none of the asked type, and types that are named then.
_LOOKED_AT = 200_000
_NAMED = 10


@click.command()
@click.option("--insecure", is_flag=True, help="Listen on an address other machines reach even without TLS or authentication.")
@pass_output
def serve(output: Output, insecure: bool) -> None:
    """Serve the published windows over Arrow Flight until SIGTERM or Ctrl-C; running streams may finish."""
    settings = output.settings

    log_to_stderr()

    def started(where: Started) -> None:
        metrics = "no metrics" if where.metrics_url is None else f"metrics on {where.metrics_url}/metrics"
        output.say(f"Arrow Flight on {where.url}, {metrics}, lake {settings.lake_uri}, {_changing(settings)}; Ctrl-C stops it.")
        output.result({"url": where.url, "metrics_url": where.metrics_url})

    run(settings, insecure=insecure, started=started)


def _changing(settings: Settings) -> str:
    """What of the server needs the change log, and whether it has it."""
    wanted = {"live": settings.arrow_flight_live, "uploads": settings.arrow_flight_uploads}
    there = settings.database_url is not None
    said = ", ".join(f"{name}: {'on' if there and on else 'off'}" for name, on in wanted.items())
    return said if there else f"{said} (no FRAISEQL_DATABASE_URL)"


@click.command()
@click.argument("principal")
@click.option("--org", "org_id", help="The one tenant (a UUID) whose events the token opens; without it, all.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(sorted(SCOPES)), default=("read",), help="May be given several times."
)
@pass_output
def token(output: Output, principal: str, org_id: str | None, scopes: tuple[str, ...]) -> None:
    """Print a new bearer token for PRINCIPAL, and the line for FRAISEQL_ARROW_FLIGHT_TOKENS_FILE. The token is shown only now."""
    if not principal.strip() or principal.startswith("#") or not principal.isprintable():
        raise InputError("PRINCIPAL must be a name that can be printed and does not start with #.")
    if org_id is not None and not re.fullmatch(UUID_PATTERN, org_id.lower()):
        raise InputError(f"--org must be a UUID, got {org_id[:64]!r}.")
    new, line = new_token(principal, org_id, scopes)
    if not output.as_json:  # the secret goes to one place
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
@click.option("--allow-missing", is_flag=True, help="Skip windows that are not published, instead of refusing the range.")
@pass_output
def read(
    output: Output,
    ticket: str,
    target: Path | None,
    url: str | None,
    token_file: Path | None,
    tls_root_certs: Path | None,
    allow_missing: bool,
) -> None:
    """Read the events of a TICKET, for example events:Order:now-1h:now:5000; without --output, the first ones are shown.

    --json tells how many there were; --output events.json writes the events themselves, one JSON object per line.
    """
    for option, given in (("--token-file", token_file), ("--tls-root-certs", tls_root_certs)):
        if given is not None and url is None:
            raise InputError(f"{option} is for a Flight server; name one with --url, or leave {option} out.")
    now = datetime.now(UTC)
    if allow_missing:
        ticket = replace(Ticket.parse(ticket.encode(), now), allow_missing=True).json
    write = write_to(target) if target is not None else show(output)
    began = time.perf_counter()
    with ExitStack() as stack:
        if url is not None:
            rows, why = _from_server(stack.enter_context(_connected(url, token_file, tls_root_certs)), ticket, now, write)
        else:
            rows, why = _from_lake(output.settings, Ticket.parse(ticket.encode(), now), write)
    seconds = time.perf_counter() - began
    output.result({"rows": rows, "seconds": seconds, "output": None if target is None else str(target)})
    output.say(f"{rows:,} events in {seconds:.2f} s" + (f", written to {target}." if target else "."))
    if why:
        output.remark(why)


def _from_lake(settings: Settings, asked: Ticket, write: Write) -> tuple[int, str]:
    """How many events were written, and of none, why."""
    if asked.follow:
        raise InputError("Only a Flight server can follow the change log; name one with --url, or leave out follow.")
    decided = plan(asked, pinned(Lake.of(settings), asked), first=settings.first_window, size=settings.window)
    rows = write(decided.schema, decided.batches())
    if rows:
        return rows, ""
    low, high = decided.view.covered(*decided.span)
    if low >= high:
        first, last = (at.isoformat(timespec="minutes") for at in decided.view.extent)
        return 0, f"Nothing is published in that range; the lake holds {first} to {last}."
    return 0, _types_there(asked, decided.snapshot.read(asked.start, asked.end, columns=["entity_type"]))


def _from_server(client: Client, ticket: str, now: datetime, write: Write) -> tuple[int, str]:
    with client.stream(ticket) as stream:
        rows, receipt = write(stream.schema, iter(stream)), stream.receipt
    if rows or receipt is None:
        return rows, ""
    asked = Ticket.parse(ticket.encode(), now)
    if receipt.complete_through <= asked.start:
        return 0, f"Nothing is published in that range; windows are published up to {receipt.complete_through.isoformat()}."
    with client.stream(replace(asked, entity_types=(), columns=("entity_type",), limit=_LOOKED_AT).json) as others:
        return 0, _types_there(asked, others)


def _types_there(asked: Ticket, batches: Iterable[pa.RecordBatch]) -> str:
    """What a range without an event of the asked types holds instead, as far as a short look tells."""
    found: set[str] = set()
    rows = 0
    for batch in batches:
        found.update(pc.unique(batch.column("entity_type")).to_pylist())
        rows += batch.num_rows
        if rows >= _LOOKED_AT:
            break
    if not found or not asked.entity_types:
        return "No event is published in that range."
    named = sorted(found)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    wanted = " or ".join(repr(name) for name in asked.entity_types[:_NAMED])
    return f"There is no type {wanted} in that range; there are {', '.join(named[:_NAMED])}{more}."


@contextmanager
def _connected(url: str, token_file: Path | None, tls_root_certs: Path | None) -> Iterator[Client]:
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in {"grpc", "grpc+tls", "grpc+tcp"}:
        raise InputError(f"--url must start with grpc:// or grpc+tls://, got {scheme[:16]}://.")
    try:
        with connect(url, token=_token(token_file), tls_root_certs=tls_root_certs) as client:
            yield client
    except NotAuthenticated as error:
        remedy = "name the file that holds it with --token-file" if token_file is None else "check what --token-file holds"
        raise NotAuthenticated(f"{error} On the command line: {remedy}.", error.reason) from None


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"The token file {file.name!r} cannot be read; name a file that holds the token and nothing else."
        ) from None
