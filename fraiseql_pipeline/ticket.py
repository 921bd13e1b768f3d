"""Ticket: the bytes that name what to stream ⇄ ``Ticket``.

What lives here: the three forms of a ticket, their limits, and one sentence for each way to get one wrong. What must not: a clock (``now``
is an argument, resolved once per ticket), the lake, what a server is able to send.

    events:<entity type>:<start>:<end>:<rows per batch>          text, at most 4 KiB
    {"type": "events", "entity_type": …, "start": …, "end": …}   JSON, at most 256 KiB, with the options below
    {"type": "ObserverEvents", "entity_type": …, …}              upstream's JSON

Text. ``*`` stands for all types, ``|`` separates several, and every part may be percent-encoded: a type whose name holds ``:``, ``|`` or
``%`` must be. Times are those of ``window.parse_time`` and hold ``:`` themselves, so the prefix and the type are taken from the left, the
rows per batch from the right, and what is between is cut at the one ``:`` that leaves a time on either side. There is never a second such
``:``: an end starts with ``now`` or four digits and a hyphen, and no time goes on like that behind a colon.

JSON. ``entity_type`` is a name, ``*``, names joined by ``|``, or a list of names taken as they are. Optional: ``batch_size``, ``columns``
(of the lake, in the wanted order), ``profile``, ``codec``, ``table_version``, ``after_pk``, ``limit``, ``follow``, ``allow_missing``; null is
the same as not there. ``start`` and ``end`` are times as in the text.

Upstream's JSON has ``start_date``, ``end_date`` and ``limit``, all optional: no start is the beginning of time, no end is now. Its end is
inclusive: a date means all of that day, an instant itself, so ``Ticket.end`` is the day or the microsecond after it. Its limit keeps the
newest events there and the first in order here, where a stream has one order only.

Invariants
 1. ``Ticket.parse`` of ``ticket.text`` or ``ticket.json`` is the ticket itself, at any ``now``.
 2. Whatever the bytes, ``parse`` returns a ticket or raises ``TicketError``; a message shows at most 64 characters of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote

from fraiseql_pipeline.errors import TicketError, WindowError
from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.window import as_utc, parse_time

MAX_TEXT_BYTES = 4 * 1024
MAX_BYTES = 256 * 1024
MAX_BATCH_ROWS = 1_000_000
PROFILES = ("plain", "compact")
CODECS = ("none", "lz4", "zstd")

_FORM = "events:<entity type>:<start>:<end>:<rows per batch>, for example events:Order:now-1h:now:5000"
_SHOWN = 64
#: A command of Flight SQL is a protobuf ``Any`` of one of its messages (FlightSql.proto).
_FLIGHT_SQL = re.compile(rb"\n.type\.googleapis\.com/arrow\.flight\.protocol\.sql\.", re.DOTALL)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_ROWS = re.compile(r"\d{1,7}", re.ASCII)
_ENCODED = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*", re.DOTALL)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What to stream: the events of some types with ``start <= timestamp < end``, both in UTC.

    ``entity_types``: none means all. ``batch_size``: the most rows of one batch; none leaves it to the server. ``columns``: none
    means the eight of ``WIRE_SCHEMA``. ``limit``: the most events of the whole stream, the first in order. ``table_version``: the
    snapshot to read; none is the newest. ``endless``: the ticket said ``now`` and means all that has settled, which may be ahead of
    the clock; its ``end`` is then no time that anybody asked for, and its JSON form says ``now`` again. Raises ``TicketError`` for
    a value out of range.
    """

    start: datetime
    end: datetime
    entity_types: tuple[str, ...] = ()
    batch_size: int | None = None
    columns: tuple[str, ...] = ()
    profile: str | None = None
    codec: str | None = None
    table_version: int | None = None
    after_pk: int | None = None
    limit: int | None = None
    follow: bool = False
    allow_missing: bool = False
    endless: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", as_utc(self.start))
        object.__setattr__(self, "end", as_utc(self.end))
        object.__setattr__(self, "entity_types", tuple(dict.fromkeys(self.entity_types)))
        if self.start > self.end or (self.start == self.end and not self.follow):
            raise TicketError(
                f"A ticket must start before it ends, got {_iso(self.start)} to {_iso(self.end)}; the end is exclusive."
            )
        for name in self.entity_types:
            if not 1 <= len(name) <= 255 or not name.strip() or name == "*" or _CONTROL.search(name):
                raise TicketError(
                    f"An entity type must have 1 to 255 characters, none of them a control character, got {_shown(name)}."
                )
        _check_range("batch_size", self.batch_size, 1, MAX_BATCH_ROWS)
        _check_range("limit", self.limit, 1, 2**63 - 1)
        _check_range("table_version", self.table_version, 0, 2**63 - 1)
        _check_range("after_pk", self.after_pk, 0, 2**63 - 1)
        _check_choice("profile", self.profile, PROFILES)
        _check_choice("codec", self.codec, CODECS)
        if unknown := [name for name in self.columns if name not in LAKE_SCHEMA.names]:
            raise TicketError(f"A ticket's columns must be columns of the events table, got {_listed(unknown)}.")
        if len(set(self.columns)) != len(self.columns):
            raise TicketError("A ticket must name each column once.")

    @classmethod
    def parse(cls, data: bytes, now: datetime, *, partial: bool = False) -> Ticket:
        """The ticket in any of its forms; ``now`` is what its ``now`` means. Raises ``TicketError``.

        ``partial``: what a JSON ticket leaves out is everything, the type of ticket, the entity types and the times too.
        """
        if len(data) > MAX_BYTES:
            raise TicketError(f"A ticket must not exceed {MAX_BYTES // 1024} KiB, got {len(data)} bytes.")
        if _FLIGHT_SQL.match(data):
            raise TicketError(
                f"This server speaks no Flight SQL, so a driver for that cannot ask it; a ticket must look like {_FORM}."
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise TicketError(f"A ticket must be UTF-8 text, byte {error.start} is not.") from None
        if text.lstrip(" \t\r\n").startswith("{"):
            return _from_json(text, now, partial=partial)
        if len(data) > MAX_TEXT_BYTES:
            raise TicketError(
                f"A text ticket must not exceed {MAX_TEXT_BYTES // 1024} KiB, got {len(data)} bytes; a JSON ticket may."
            )
        return _from_text(text, now)

    @property
    def text(self) -> str:
        """The text form where it can say everything and fits, else the JSON form; times are absolute."""
        plain = Ticket(start=self.start, end=self.end, entity_types=self.entity_types, batch_size=self.batch_size)
        if self != plain or self.batch_size is None:
            return self.json
        types = "|".join(quote(name, safe="") for name in self.entity_types) or "*"
        text = f"events:{types}:{_iso(self.start)}:{_iso(self.end)}:{self.batch_size}"
        return text if len(text) <= MAX_TEXT_BYTES else self.json

    @property
    def json(self) -> str:
        """The JSON form, without the options that have their default; times are absolute, but for the end of an endless one."""
        said: dict[str, Any] = {"type": "events", "entity_type": list(self.entity_types) or "*"}
        said |= {"start": _iso(self.start), "end": "now" if self.endless else _iso(self.end)}
        said |= {name: getattr(self, name) for name, default in _OPTIONS.items() if getattr(self, name) != default}
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))


_OPTIONS = {field.name: field.default for field in fields(Ticket) if field.name not in {"entity_types", "start", "end", "endless"}}


# -------------------------------------------------------------------------------------------------------------------- text


def _from_text(text: str, now: datetime) -> Ticket:
    kind, _, rest = text.partition(":")
    types, _, rest = rest.partition(":")
    times, _, rows = rest.rpartition(":")
    if kind != "events" or not times:
        raise TicketError(f"A ticket must look like {_FORM}; got {_shown(text)}.")
    if not _ROWS.fullmatch(rows):
        raise TicketError(f"A ticket must end in the rows per batch, a number from 1 to {MAX_BATCH_ROWS}, got {_shown(rows)}.")
    start, end = _two_times(times, now)
    names = () if types == "*" else [_decoded(name) for name in types.split("|")]
    return Ticket(start=start, end=end, entity_types=_types(names), batch_size=int(rows))


def _two_times(text: str, now: datetime) -> tuple[datetime, datetime]:
    cuts = [at for at, character in enumerate(text) if character == ":"] if len(text) <= 4 * _SHOWN else []
    for at in cuts:
        try:
            return parse_time(_decoded(text[:at]), now), parse_time(_decoded(text[at + 1 :]), now)
        except WindowError:
            continue
    raise TicketError(
        "A ticket must have a start and an end, each an ISO 8601 time such as 2026-01-31T23:59:59Z, or now, now-15m, now-1h, now-7d; "
        f"got {_shown(text)}."
    )


def _decoded(part: str) -> str:
    try:
        if _ENCODED.fullmatch(part):
            return unquote(part, errors="strict")
    except UnicodeDecodeError:
        pass
    raise TicketError(f"A percent sign in a ticket must start the two hex digits of a byte of UTF-8, got {_shown(part)}.")


# -------------------------------------------------------------------------------------------------------------------- JSON


_EVERYTHING = {"type": "events", "entity_type": "*", "start": "0001-01-01T00:00:00Z", "end": "9999-12-31T23:59:59.999999Z"}


def _from_json(text: str, now: datetime, *, partial: bool) -> Ticket:
    try:
        said = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):  # the parser's own words would quote the ticket
        raise TicketError(f"A ticket that starts with a brace must be a JSON object, got {_shown(text)}.") from None
    said = {key: value for key, value in said.items() if value is not None}
    if partial and said.get("type", "events") == "events":
        said = _EVERYTHING | said
    kind = said.pop("type", None)
    if kind == "events":
        return _from_ours(said, now)
    if kind == "ObserverEvents":
        return _from_upstream(said, now)
    raise TicketError(f'A JSON ticket\'s "type" must be "events" or "ObserverEvents", got {_shown(kind)}.')


def _from_ours(said: dict[str, Any], now: datetime) -> Ticket:
    _refuse_unknown(said, {"entity_type", "start", "end", *_OPTIONS})
    options = {name: _KINDS[name](name, said[name]) for name in _OPTIONS if name in said}
    return Ticket(
        entity_types=_named_types(said),
        start=_time("start", said.get("start"), now),
        end=_time("end", said.get("end"), now),
        **options,
    )


def _from_upstream(said: dict[str, Any], now: datetime) -> Ticket:
    _refuse_unknown(said, {"entity_type", "start_date", "end_date", "limit"})
    start = _time("start_date", said["start_date"], now) if "start_date" in said else datetime.min.replace(tzinfo=UTC)
    end = _after("end_date", said["end_date"], now) if "end_date" in said else now
    limit = _integer("limit", said["limit"]) if "limit" in said else None
    return Ticket(entity_types=_named_types(said), start=start, end=end, limit=limit)


def _after(name: str, value: Any, now: datetime) -> datetime:
    """The first instant behind an inclusive end."""
    end = _time(name, value, now)
    try:
        return end + (timedelta(days=1) if _DATE.fullmatch(value) else timedelta(microseconds=1))
    except OverflowError:
        raise TicketError(f'A ticket\'s "{name}" must lie before the end of the year 9999, got {_shown(value)}.') from None


def _named_types(said: dict[str, Any]) -> tuple[str, ...]:
    named = said.get("entity_type")
    if isinstance(named, list):
        return () if named == ["*"] else _types(_names("entity_type", named))
    if not isinstance(named, str):
        raise TicketError(f'A JSON ticket must have an "entity_type": a name, "*" or a list of names, got {_shown(named)}.')
    return () if named == "*" else _types(named.split("|"))


def _time(name: str, value: Any, now: datetime) -> datetime:
    try:
        if isinstance(value, str):
            return parse_time(value, now)
    except WindowError:
        pass
    expected = "an ISO 8601 date or time such as 2026-01-31T23:59:59Z, or now, now-15m, now-1h, now-7d"
    raise TicketError(f'A ticket\'s "{name}" must be {expected}; got {_shown(value)}.')


def _integer(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TicketError(f'A ticket\'s "{name}" must be a whole number, got {_shown(value)}.')


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TicketError(f'A ticket\'s "{name}" must be true or false, got {_shown(value)}.')


def _word(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TicketError(f'A ticket\'s "{name}" must be a string, got {_shown(value)}.')


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TicketError(f'A ticket\'s "{name}" must be a list of one or more names, got {_shown(value)}.')


_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "batch_size": _integer,
    "columns": _names,
    "profile": _word,
    "codec": _word,
    "table_version": _integer,
    "after_pk": _integer,
    "limit": _integer,
    "follow": _flag,
    "allow_missing": _flag,
}


def _refuse_unknown(said: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(said) - known):
        raise TicketError(f"A ticket of this type has no {_listed(unknown)}; it may have {', '.join(sorted(known))}.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) != len(pairs):
        raise ValueError("a key stands twice")
    return said


# ------------------------------------------------------------------------------------------------------------------ common


def _types(names: Iterable[str]) -> tuple[str, ...]:
    """Names that leave something to read: one that stands for all among others is a mistake, not a filter."""
    found = tuple(names)
    if "*" in found and len(found) > 1:
        raise TicketError("A ticket must name entity types or all of them (*), not both.")
    return () if found == ("*",) else found


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise TicketError(f'A ticket\'s "{name}" must be from {low} to {high}, got {_shown(value)}.')


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise TicketError(f'A ticket\'s "{name}" must be one of {", ".join(choices)}, got {_shown(value)}.')


def _iso(at: datetime) -> str:
    return at.replace(tzinfo=None).isoformat() + "Z"


def _listed(names: list[str]) -> str:
    return _shown(", ".join(names))


def _shown(value: Any) -> str:
    """A value as a message shows it: printable, at most 64 characters, and a container only by its kind (it may be deep)."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
