"""Writes the tables of the documents from the code and the measurements they describe: ``make docs``. A test fails while they differ."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.event import COLUMNS, QUARANTINE_SCHEMA, VERBS, Column
from fraiseql_pipeline.flight.edge import METHODS
from fraiseql_pipeline.flight.metrics import LakeState, Metrics
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings

HERE = Path(__file__).parent
PAGES = (HERE / "configuration.md", HERE / "operations.md", HERE.parent / "README.md")

#: What `fraiseql-pipeline --json bench …` printed, kept by `make measure`.
MEASUREMENTS = HERE / "measurements"


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


def errors() -> str:
    rows = [
        ("&nbsp;" * 4 * depth + f"`{kind.__name__}`", str(kind.exit_code), "yes" if kind.retryable else "no")
        for depth, kind in _walk(PipelineError, 0)
    ]
    return _table(("error", "exit code", "may succeed later"), rows)


def measured() -> str:
    rows = []
    for file in sorted(MEASUREMENTS.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        command = f"`fraiseql-pipeline bench {report['bench']}`"
        for ratio in report["ratios"]:
            value = "not measured" if ratio["value"] is None else _number(ratio["value"])
            rows.append((command, f"{report['rows']:,}", ratio["name"], value, _budget(ratio)))
    return _table(("command", "rows", "what", "measured", "budget"), rows)


def metrics() -> str:
    shown = [*Metrics(METHODS).registry.collect(), *LakeState(Lake("")).described()]
    rows = [(f"`{m.name}{'_total' if m.type == 'counter' else ''}`", m.type, m.documentation) for m in shown]
    return _table(("metric", "type", "meaning"), sorted(rows))


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "columns": columns,
    "quarantine": quarantine,
    "verbs": verbs,
    "errors": errors,
    "measured": measured,
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
