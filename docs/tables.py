"""Writes the tables of the documents from the code and the measurements they describe: ``make docs``. A test fails while they differ."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fraiseql_pipeline import ticket, validate
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.event import COLUMNS, EVENT_TYPES, EXTRACTED, QUARANTINE_SCHEMA, VERBS, Column, Rule
from fraiseql_pipeline.flight import received
from fraiseql_pipeline.flight.edge import METHODS
from fraiseql_pipeline.flight.metrics import LakeState, Metrics
from fraiseql_pipeline.flight.received import Receipt
from fraiseql_pipeline.settings import Settings

HERE = Path(__file__).parent
PAGES = (
    *(HERE / name for name in ("clients.md", "configuration.md", "operations.md", "performance.md", "tuning.md")),
    HERE.parent / "README.md",
)

#: What `fraiseql-pipeline --json bench …` printed, kept by `make measure`.
MEASUREMENTS = HERE / "measurements"

#: The budgets that the README shows, if they were measured; docs/performance.md has all of them.
HIGHLIGHTS = (
    ("materialize", "events/s, ours / polars read_database_uri(adbc) + write_delta"),
    ("materialize", "events/s, ours / the server's own COPY"),
    ("materialize", "peak memory of ours in MiB"),
    ("windows", "cost of a window, at 10,000 windows / at 10"),
    ("flight", "events/s of one warm stream in compact+zstd, ours / pyarrow.flight from memory"),
    ("flight", "bytes per event, event JSON / compact+zstd"),
    ("flight", "first batch in ms, warm, median"),
    ("live", "committed to follower in ms, p99"),
)

#: Why a budget is missed, by its name; shown while it is. No figures here: those are of the measurements.
MISSED = {
    "event JSON to Arrow in events/s": "Events per second follow the machine, and this is a small one. The budget beside it, the ratio to "
    "what one would write without this package, was measured on the same lines.",
    "events/s, ours / polars read_database_uri(adbc) + write_delta": "Most processor time goes into the server's query and the driver's decoding, "
    "and polars pays the same for both ([0002](decisions/0002-adbc-reads.md)). We validate every event besides, and polars does not. The wheel of the driver "
    "is built without optimisation; [one that is not](tuning.md#a-driver-built-with-optimisation) comes nearer.",
    "events/s, ours / the server's own COPY": "The reference throws its rows away and has the processors to itself. Ours shares them between the "
    "server, the driver, validation and Parquet, and the driver costs most after the server ([0002](decisions/0002-adbc-reads.md)); "
    "[built with optimisation](tuning.md#a-driver-built-with-optimisation) it costs a third.",
    "events/s of one warm stream in compact+zstd": "One stream is bound by its reader, who decompresses, and events per second follow the machine. "
    "The budget was set on events of the width of `typical`; `wide` has more bytes to decompress per event.",
    "first batch in ms, cold, slowest of all encodings": "The slowest is the first batch that a new server sends at all, which runs much "
    "of its code for the first time. On a server that has sent anything, a cold first batch of any encoding keeps the budget.",
    "bytes per event, event JSON / compact+zstd": "Most of a `wide` event is its nested document, which is sent as JSON text, so only zstd makes it "
    "smaller. The budget was set on events of the width of `typical`.",
}

NOT_EXPLAINED = "Nobody has said why yet."

#: What a key of a JSON ticket means, with an example of it; the keys are those of ``ticket.py``.
TICKET_KEYS = {
    "type": ('"events"', "required"),
    "entity_type": (
        '["Order", "User"]',
        'required: a name, names joined by `|`, a list of names taken as they are, or `"*"` for all',
    ),
    "start": ('"now-6h"', "required: first instant, ISO 8601 or `now`, `now-15m`, `now-1h`, `now-7d`; UTC where it has no offset"),
    "end": ('"now"', "required: first instant that is not meant any more"),
    "batch_size": ("5000", "most events of one batch; else the server's setting"),
    "columns": (
        '["pk", "event_id", "data"]',
        "columns of [`events`](configuration.md#columns-of-events), in this order; else the first eight",
    ),
    "profile": ('"compact"', "`plain` or `compact`; else the header's, the session's or the server's"),
    "codec": ('"lz4"', "`none`, `lz4` or `zstd`; likewise"),
    "table_version": ("0", "a version of the table, as receipts and commits name it; else the newest. Kept for seven days"),
    "after_pk": ("100", "only events whose key is larger, whatever their time: what settled since a receipt named that key"),
    "limit": ("100", "most events of the whole stream, the first in order"),
    "follow": ("true", "go on as events settle; `end` must be `now` or later, and no `table_version` named"),
    "allow_missing": ("true", "leave out windows that are not published; else a hole in the range is an error that names it"),
}

#: What a field of a receipt means; the fields are those of ``flight/received.py``, and how the stream was encoded.
RECEIPT_FIELDS = {
    "rows": "events of the stream; in `info`, null where neither commits nor kept frames tell: they do for whole windows, and for what was read before",
    "checksum": "sum of the event ids modulo 2^64, as `fraiseql_pipeline.encoding.checksum` makes it; null where they were not sent",
    "table_version": "the version of the table that was read; null while nothing is published",
    "complete_through": "published windows end here, or all that had settled by then is in: what the range has behind it is not among the events",
    "settled_pk": "every event of the range up to this key is in; null where that is not known",
    "provisional_windows": "windows of the range to which transactions that were open may add events",
    "missing_windows": "windows of the range that are not published and were skipped, because the ticket allows it",
    "next_ticket": "the ticket for what comes after this stream; null behind a `limit`, and where the log is followed but cannot be reached",
    "profile": "how the events were sent: `plain` or `compact`",
    "codec": "likewise: `none`, `lz4` or `zstd`",
}

_NULL = {
    "event_type": "`modification_type` is null, or none of the verbs above; `raw` then holds it",
    "timestamp": "`created_at` is null, infinite or outside the years 1 to 9999. No window has such a row: `doctor` counts them",
    "data": "the row is too large for Postgres to send; `raw` then says so",
}
_BROKEN: dict[Rule, str] = {
    "uuid": "not a UUID of lower-case hex digits with hyphens",
    "verb": f"none of {', '.join(f'`{name}`' for name in EVENT_TYPES)}",
    "name": "blank, `*` alone, longer than 255 characters, or with a control character or line separator in it",
    "window": "not a time of the window",
    "absent": "a value fits no column: an unknown `modification_type`, an infinite time, a nested `updated_fields`, a row too large for "
    "Postgres to send",
}


def settings() -> str:
    rows = [
        (f"`FRAISEQL_{name.upper()}`", _type(field), _default(field.default, field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    return _table(("name", "type", "default", "meaning"), rows)


def columns() -> str:
    rows = [(f"`{c.name}`", f"`{_arrow(c.type)}`", "yes" if c.nullable else "no", _source(c), c.part, c.doc) for c in COLUMNS]
    return _table(("column", "Arrow type", "null", "from", "part", "meaning"), rows)


def quarantine() -> str:
    described = {
        "raw": "what fitted no column: JSON, exactly as Postgres prints it",
        "reasons": "every rule the row broke, `column:rule`, sorted",
        "window_key": "key of the window that was materialized",
        "event_date": "UTC date on which that window starts; the partition column",
    }
    rows = [(f"`{name}`", f"`{_arrow(QUARANTINE_SCHEMA.field(name).type)}`", text) for name, text in described.items()]
    return _table(("column", "Arrow type", "meaning"), rows)


def verbs() -> str:
    return _table(("`modification_type`", "`event_type`"), [(f"`{verb}`", f"`{event}`") for verb, event in VERBS.items()])


def reasons() -> str:
    rows = []
    for column in EXTRACTED:
        if not column.nullable:
            rows.append((f"{column.name}:null", _NULL.get(column.name, f"{_source(column)} is null")))
        if column.rule is not None:
            rows.append((f"{column.name}:{validate._RULES[column.rule].fault}", _BROKEN[column.rule]))
        if column.name == "event_id":
            rows.append(("event_id:duplicate", "an event before it in the window, in order of time and key, has the same id"))
    return _table(("reason", "the row has it when"), [(f"`{reason}`", text) for reason, text in rows])


def tickets() -> str:
    known = {"type", "entity_type", "start", "end", *ticket._OPTIONS}
    if known != TICKET_KEYS.keys():
        raise KeyError(f"TICKET_KEYS must say what {sorted(known ^ TICKET_KEYS.keys())} mean.")
    rows = [(f"`{key}`", f"`{example}`", text) for key, (example, text) in TICKET_KEYS.items()]
    return _table(("key", "for example", "meaning"), rows)


def receipts() -> str:
    known = {field.name for field in fields(Receipt)} - {"schema"} | {"profile", "codec"}
    if known != RECEIPT_FIELDS.keys():
        raise KeyError(f"RECEIPT_FIELDS must say what {sorted(known ^ RECEIPT_FIELDS.keys())} mean.")
    rows = [(f"`{name}`", text, f"`fraiseql.{name}`" if name in received.KEPT else "") for name, text in RECEIPT_FIELDS.items()]
    return _table(("field", "meaning", "in the table's metadata"), rows)


def errors() -> str:
    rows = [
        ("&nbsp;" * 4 * depth + f"`{kind.__name__}`", str(kind.exit_code), "yes" if kind.retryable else "no")
        for depth, kind in _walk(PipelineError, 0)
    ]
    return _table(("error", "exit code", "may succeed later"), rows)


def measured() -> str:
    """Every budget, with the command that measures it."""
    rows = [
        (f"`fraiseql-pipeline bench {report['bench']}`", f"{report['rows']:,}", ratio["name"], *_held(ratio))
        for report in _reports()
        for ratio in report["ratios"]
    ]
    return _table(("command", "events", "what", "measured", "budget", "met"), rows)


def highlights() -> str:
    """The budgets of the README, and how many there are of all."""
    found = {(report["bench"], ratio["name"]): ratio for report in _reports() for ratio in report["ratios"]}
    rows = [(f"`bench {bench}`", name, *_held(found[bench, name])) for bench, name in HIGHLIGHTS if (bench, name) in found]
    met = sum(ratio["met"] is True for ratio in found.values())
    score = f"\n{met} of {len(found)} budgets are met; [docs/performance.md](docs/performance.md) has all, and why the others are missed.\n"
    return _table(("command", "what", "measured", "budget", "met"), rows) + score


def missed() -> str:
    """Every budget that is missed, and why."""
    found: dict[str, list[str]] = {}
    for report in _reports():
        for ratio in report["ratios"]:
            if ratio["met"] is False:
                found.setdefault(ratio["name"], []).append(report["bench"])
    lines = [
        f"- **{name}** (`bench {'`, `bench '.join(benches)}`). {MISSED.get(name, NOT_EXPLAINED)}\n"
        for name, benches in found.items()
    ]
    return "".join(lines) or "None.\n"


def shapes() -> str:
    """How wide the events of the two shapes are, in each of the forms they have."""
    rows = []
    for shape, file in (("typical", "flight"), ("wide", "flight-wide")):
        results = json.loads((MEASUREMENTS / f"{file}.json").read_text(encoding="utf-8"))["results"]
        widths = {result["case"]: result.get("median") for result in results if result["metric"] == "bytes_per_event"}
        cells = (widths.get(case) for case in ("event JSON", "plain+none", "plain+zstd", "compact+zstd"))
        rows.append((f"`{shape}`", *("not measured" if cell is None else f"{cell:.0f}" for cell in cells)))
    return _table(("shape", "event JSON, all fields", "plain, the eight columns", "plain+zstd", "compact+zstd"), rows)


def encodings() -> str:
    """What each encoding costs and gives, of events as wide as `typical`."""
    results = json.loads((MEASUREMENTS / "flight.json").read_text(encoding="utf-8"))["results"]
    found = {(result["case"], result["metric"]): result.get("median") for result in results}
    rows = []
    for name in get_args(Settings.model_fields["arrow_flight_encoding"].annotation):
        cells = (
            found.get((name, "bytes_per_event")),
            found.get((f"warm {name}", "rate")),
            found.get((f"cold {name}", "rate")),
            found.get((f"cold {name}", "first_batch")),
        )
        rows.append((f"`{name}`", *("not measured" if cell is None else _number(cell) for cell in cells)))
    return _table(("encoding", "bytes per event", "events/s, kept", "events/s, made for this read", "first batch then, ms"), rows)


def machine() -> str:
    """What the figures were measured on."""
    found = {json.dumps(report["machine"], sort_keys=True): report["machine"] for report in _reports()}
    said = (f"{m['cpus']} processors, {m['system']} {m['arch']}, Python {m['python']}" for m in found.values())
    return f"Measured on: {'; '.join(said)}.\n"


def _reports() -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(MEASUREMENTS.glob("*.json"))]


def _held(ratio: dict[str, Any]) -> tuple[str, str, str]:
    """Measured, budget, and whether that is met."""
    value = "not measured" if ratio["value"] is None else _number(ratio["value"])
    return value, _budget(ratio), {True: "✓", False: "✗", None: "–"}[ratio["met"]]


def metrics() -> str:
    shown = [*Metrics(METHODS).registry.collect(), *LakeState.described().values()]
    rows = [(f"`{m.name}{'_total' if m.type == 'counter' else ''}`", m.type, m.documentation) for m in shown]
    return _table(("metric", "type", "meaning"), sorted(rows))


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "columns": columns,
    "quarantine": quarantine,
    "reasons": reasons,
    "tickets": tickets,
    "receipts": receipts,
    "verbs": verbs,
    "errors": errors,
    "measured": measured,
    "machine": machine,
    "highlights": highlights,
    "missed": missed,
    "encodings": encodings,
    "shapes": shapes,
}


def render(page: str) -> str:
    """The page with every table between ``<!-- NAME -->`` and ``<!-- /NAME -->`` made anew; raises KeyError for a name without a table."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page, flags=re.DOTALL
    )


def _budget(ratio: dict[str, Any]) -> str:
    """The budget with its direction, which the report gives away by whether it was met."""
    above = ratio["value"] is not None and ratio["value"] >= ratio["budget"]
    sign = "" if ratio["met"] is None else "≥ " if ratio["met"] == above else "≤ "
    return f"{sign}{_number(ratio['budget'])}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _walk(kind: type[PipelineError], depth: int) -> list[tuple[int, type[PipelineError]]]:
    return [(depth, kind), *(found for child in kind.__subclasses__() for found in _walk(child, depth + 1))]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _source(column: Column) -> str:
    return ", ".join(f"`{name}`" for name in column.source) or "derived"


def _arrow(kind: pa.DataType) -> str:
    return str(kind).replace("element: ", "")


def _type(field: FieldInfo) -> str:
    bounds = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
    limits = [
        f"{sign} {getattr(limit, kind.__name__.lower()):,}"
        for limit in field.metadata
        for kind, sign in bounds.items()
        if isinstance(limit, kind)
    ]
    return ", ".join([_name(field.annotation), *limits])


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(dict.fromkeys(_name(part) for part in get_args(kind) if part is not type(None)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    names = {"datetime": "time", "str": "text", "int": "integer", "float": "number", "bool": "`true` or `false`", "Path": "path"}
    plain = getattr(kind, "__name__", str(kind))
    return names.get(plain, "JSON object" if "dict" in str(kind).lower() or plain == "Json" else plain)


def _default(value: Any, field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "empty"
    if value is None:
        return "unset"
    if isinstance(value, datetime):
        return f"`{value:%Y-%m-%d}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.value if isinstance(value, Enum) else value}`"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{', '.join(page.name for page in PAGES)}: tables written.\n")
