"""``serve``, ``read`` and ``token``: events over Arrow Flight."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.cli.events import Write, grow_at, show, show_as_they_come, write_to
from fraiseql_pipeline.cli.follow import Followed, follow
from fraiseql_pipeline.cli.output import Output, pass_output
from fraiseql_pipeline.errors import InputError, NotAuthenticated, WindowMissing
from fraiseql_pipeline.event import UUID_PATTERN
from fraiseql_pipeline.flight.auth import SCOPES, new_token
from fraiseql_pipeline.flight.client import Client, Tls, connect
from fraiseql_pipeline.flight.log import log_to_stderr
from fraiseql_pipeline.flight.plan import plan
from fraiseql_pipeline.flight.received import KEPT, Receipt, facts_of, receipt_of
from fraiseql_pipeline.flight.view import pinned
from fraiseql_pipeline.flight.workers import Started, run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.ticket import Ticket
from fraiseql_pipeline.window import Window, WindowSize

#: Events whose type is looked at when a read found none of the asked type, and types that are named then.
_LOOKED_AT = 200_000
_NAMED = 10

_WITHOUT_A_LOG = (
    "Reads end at what is published. With FRAISEQL_DATABASE_URL set to the change log they reach up to now; the embedded Postgres of the "
    "samples cannot be followed, it runs only while a command uses it."
)

_READS_ON = "A server that follows the change log has more: `fraiseql-pipeline serve`, and --url here."


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
        if settings.database_url is None:
            output.remark(_WITHOUT_A_LOG)
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
@click.option(
    "--cert-chain", type=click.Path(path_type=Path, dir_okay=False), help="PEM file of this client's certificate, for mutual TLS."
)
@click.option(
    "--private-key", type=click.Path(path_type=Path, dir_okay=False), help="PEM file of the private key of that certificate."
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
    cert_chain: Path | None,
    private_key: Path | None,
    allow_missing: bool,
) -> None:
    """Read the events of a TICKET, for example events:Order:now-1h:now:5000; without --output, the first ones are shown.

    Without --url this is the lake alone, which ends at what is published, whatever FRAISEQL_DATABASE_URL says. A server that
    `serve` has started with it also has what settled since.

    --json tells how many there were and what the receipt says; --output events.json writes the events themselves, one JSON
    object per line. Those of a ticket that follows are shown, or written into a .json or .csv file, as they come, until
    Ctrl-C; with an after_pk, they are added to the file.
    """
    tls: Tls = {"tls_root_certs": tls_root_certs, "cert_chain": cert_chain, "private_key": private_key}
    for name, given in {"token_file": token_file, **tls}.items():
        if given is not None and url is None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for a Flight server; name one with --url, or leave {option} out.")
    if (cert_chain is None) != (private_key is None):
        raise InputError("--cert-chain and --private-key belong together; give both, or neither.")
    now = datetime.now(UTC)
    # Bytes of the command line that are no UTF-8 are surrogates here, which the ticket refuses.
    asked = Ticket.parse(ticket.encode(errors="surrogatepass"), now)
    if allow_missing:
        asked = replace(asked, allow_missing=True)
        ticket = asked.json
    with ExitStack() as stack:
        client = None if url is None else stack.enter_context(_connected(url, token_file, tls))
        if asked.follow:
            _read_on(output, client, ticket, asked, target)
        else:
            _read(output, client, ticket, asked, target, now)


def _read(output: Output, client: Client | None, ticket: str, asked: Ticket, target: Path | None, now: datetime) -> None:
    write = write_to(target) if target is not None else show(output)
    began = time.perf_counter()
    if client is None:
        rows, receipt, remarks = _from_lake(output, asked, now, write)
    else:
        rows, receipt, remarks = _from_server(output, client, ticket, asked, now, write)
    _tell(output, rows, time.perf_counter() - began, target, receipt)
    for remark in remarks:
        output.remark(remark)


def _read_on(output: Output, client: Client | None, ticket: str, asked: Ticket, target: Path | None) -> None:
    """A stream that follows ends by itself, breaks, or is interrupted: what came is there, and how to go on is told."""
    if client is None:
        raise InputError("Only a Flight server can follow the change log; name one with --url, or leave out follow.")
    grow = show_as_they_come(output) if target is None else grow_at(target, onto=asked.after_pk is not None)
    began = time.perf_counter()
    found = Followed(after_pk=asked.after_pk)
    try:
        follow(client, ticket, grow, found)
    finally:
        if found.began:
            _tell(output, found.rows, time.perf_counter() - began, target, found.receipt, settled_pk=found.after_pk)
            if found.remark:
                output.remark(found.remark)
    if found.interrupted:
        raise SystemExit(1)


def _tell(output: Output, rows: int, seconds: float, target: Path | None, receipt: Receipt | None, **more: object) -> None:
    said = {name: getattr(receipt, name, None) for name in KEPT}
    output.result({"rows": rows, "seconds": seconds, "output": None if target is None else str(target), **said, **more})
    output.say(f"{rows:,} events in {seconds:.2f} s" + (f", written to {target}." if target else "."))


_Read = tuple[int, Receipt | None, list[str]]
"""How many events were written, what the receipt says, and what is to be said about what is not among them."""


def _from_lake(output: Output, asked: Ticket, now: datetime, write: Write) -> _Read:
    settings = output.settings
    try:
        decided = plan(asked, pinned(Lake.of(settings), asked), first=settings.first_window, size=settings.window)
    except WindowMissing as error:
        more = "" if settings.database_url is None else f" {_READS_ON}"
        raise WindowMissing(f"{error} On the command line: --allow-missing.{more}", error.missing) from None
    rows = write(decided.schema, _watched(output, decided.batches()))
    receipt = receipt_of(facts_of(decided.metadata(rows=rows)), decided.schema)
    remarks = list(_left_out(asked, now, rows, receipt, settings.window))
    if remarks and settings.database_url is not None:
        remarks.append(_READS_ON)
    if not rows:
        low, high = decided.view.covered(*decided.span)
        if low >= high:
            first, last = (at.isoformat(timespec="minutes") for at in decided.view.extent)
            return 0, receipt, [f"Nothing is published in that range; the lake holds {first} to {last}."]
        remarks.insert(0, _types_there(asked, decided.snapshot.read(asked.start, asked.end, columns=["entity_type"])))
    return rows, receipt, remarks


def _from_server(output: Output, client: Client, ticket: str, asked: Ticket, now: datetime, write: Write) -> _Read:
    with client.stream(ticket) as stream:
        rows, receipt = write(stream.schema, _watched(output, stream)), stream.receipt
    if receipt is None:
        return rows, None, []
    remarks = list(_left_out(asked, now, rows, receipt, None))
    if not rows:
        if receipt.complete_through <= asked.start:
            through = receipt.complete_through.isoformat()
            return 0, receipt, [f"Nothing is published in that range; windows are published up to {through}."]
        with client.stream(replace(asked, entity_types=(), columns=("entity_type",), limit=_LOOKED_AT).json) as others:
            remarks.insert(0, _types_there(asked, others))
    return rows, receipt, remarks


def _watched(output: Output, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    with output.progress("Reading", None, "events") as step:
        for batch in batches:
            step("", batch.num_rows)
            yield batch


def _left_out(asked: Ticket, now: datetime, rows: int, receipt: Receipt, size: WindowSize | None) -> Iterator[str]:
    """What the asked range has or will have besides these events, as far as the receipt tells. ``size``: of the windows, where it is known."""
    if receipt.missing_windows:
        yield f"{receipt.missing_windows:,} window(s) of the range are not published and were skipped."
    if receipt.provisional_windows:
        yield f"{receipt.provisional_windows:,} window(s) of the range are provisional: transactions that were open may add events."
    through, end = receipt.complete_through, min(asked.end, now)
    # What is published ends with a window, so on a full hour; a server that follows the log has all that has settled, up to any instant.
    published = Window.holding(through, WindowSize.HOUR).start == through
    if published and asked.start < through < end and rows != asked.limit:
        behind = (
            "what the range has behind that is"
            if size is None
            else f"{-((through - end) // timedelta(microseconds=size.micros)):,} window(s) behind that are"
        )
        yield f"Windows are published up to {through.isoformat(timespec='minutes')}; {behind} left out."


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
def _connected(url: str, token_file: Path | None, tls: Tls) -> Iterator[Client]:
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in {"grpc", "grpc+tls", "grpc+tcp"}:
        raise InputError(f"--url must start with grpc:// or grpc+tls://, got {scheme[:16]}://.")
    try:
        with connect(url, token=_token(token_file), **tls) as client:
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
