"""The text of the statement that reads events: the column table (``event.py``) as SQL over the change log.

What lives here: ``Part``, a piece of a window, and the SELECTs over it. What must not: a connection.

The inner SELECT evens out older change logs (``contract.py``), filters by plain columns, so that the indexes serve, and orders; the outer
one computes. So a sort, where one is needed at all, moves stored values and not JSON printed as text.

Measured on 300,000 sample-shaped events (400 bytes of JSON, 12 % with an image from before), server alone, COPY of the projection TO
'/dev/null' (FORMAT binary), best of 4, µs per row: all columns 4.1 · with ORDER BY 4.1 (an incremental sort over the index on
created_at) · only ``data`` 2.0, of which 0.55 is the scan · uuid and jsonb sent as they are instead of as text 3.6. The last one
is not worth it: formatting a uuid costs 140 ns in polars or over byte slices, more than the server saves, and jsonb as text costs 2 % of
the CPU of both sides together (7.5 µs per row, of which ADBC takes 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fraiseql_pipeline.changelog.connection import TABLE
from fraiseql_pipeline.changelog.contract import TEXT_TYPES, Contract
from fraiseql_pipeline.event import EXTRACTED
from fraiseql_pipeline.window import from_micros

_US = "(extract(epoch FROM created_at) * 1000000)::bigint"
_WIDE = ("data", "data_before", "updated_fields", "cdc_source", "extra_metadata", "cascade")
#: A text that a row keeps although its JSON cannot be sent.
_SHORT_BYTES = 8192
_WIDE_SOURCES = ("object_data", "object_data_before", "updated_fields", "extra_metadata", "cascade")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a window: events with ``start_us <= created_at < end_us`` and ``after_pk < pk <= upto_pk``.

    ``after_key``: only those behind this (timestamp, pk) in the normal order. ``instant``: the piece is a range of pks inside one
    instant; it is read along the primary key.
    """

    start_us: int
    end_us: int
    upto_pk: int
    after_pk: int | None = None
    after_key: tuple[int, int] | None = None
    instant: bool = False


class Statements:
    """Builds the statements for one source."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._zone = contract.columns["created_at"] == "timestamp with time zone"
        self._kind = "timestamptz" if self._zone else "timestamp"
        self._columns = ", ".join(f'{column.sql or _quoted(column.source[0])} AS "{column.name}"' for column in EXTRACTED)

    def events(self, part: Part) -> str:
        """The events of a part: columns of ``BATCH_SCHEMA``, ordered by (timestamp, pk)."""
        return f"SELECT {self._columns} FROM ({self._ordered(part)}) AS log"

    def unreadable(self, part: Part, why: str, *, texts: bool) -> str:
        """The first event of a part without its JSON, and without long texts, or without any where not ``texts``: what is no text of the
        source's can always be sent. ``raw`` tells why they are missing and their stored sizes.
        """
        narrow = {
            column.name: column.source[0]
            for column in EXTRACTED
            if len(column.source) == 1 and column.name not in _WIDE and self._contract.columns.get(column.source[0]) in TEXT_TYPES
        }
        narrow.pop("event_type", None)  # a word of ours
        short = f"octet_length({{}}) <= {_SHORT_BYTES}" if texts else "{} IS NULL"
        sizes = ", ".join(
            [f"'{name}', pg_column_size(\"{name}\")" for name in _WIDE_SOURCES]
            + [
                f"'{name}', CASE WHEN NOT {short.format(_quoted(name))} THEN pg_column_size(\"{name}\") END"
                for name in narrow.values()
            ]
        )
        raw = f"json_build_object('unreadable', json_strip_nulls(json_build_object('why', '{why}', 'stored_bytes', json_build_object({sizes}))))::text"
        columns: Mapping[str, str] = {
            **dict.fromkeys(_WIDE, "NULL::text"),
            **{name: f"CASE WHEN {short.format(_quoted(source))} THEN {_quoted(source)} END" for name, source in narrow.items()},
            "updated_fields": "NULL::text[]",
            "raw": raw,
        }
        selected = ", ".join(
            f'{columns.get(column.name) or column.sql or _quoted(column.source[0])} AS "{column.name}"' for column in EXTRACTED
        )
        return f"SELECT {selected} FROM ({self._ordered(part)} LIMIT 1) AS log"

    def first_event(self, part: Part) -> str:
        """As ``events``, the first event only."""
        return f"SELECT {self._columns} FROM ({self._ordered(part)} LIMIT 1) AS log"

    def probe(self, points_us: list[int], end_us: int) -> str:
        """For each point the first event at or after it and before ``end_us``: (i, timestamp, pk, stored bytes of its JSON).

        Rows come in any order; points with no event behind them are absent. One descent of the index each: 15 µs.
        """
        points = ",".join(f'"{self._time(point)}"' for point in points_us)
        image = "pg_column_size(object_data_before)" if "object_data_before" in self._contract.columns else "0"
        return (
            "SELECT point.i, first.us, first.pk::bigint, first.bytes::bigint"
            f" FROM unnest('{{{points}}}'::{self._kind}[]) WITH ORDINALITY AS point(us, i) CROSS JOIN LATERAL ("
            f"SELECT {_US} AS us, pk_entity_change_log AS pk,"
            f" coalesce(pg_column_size(object_data), 0) + coalesce({image}, 0) AS bytes"
            f" FROM {TABLE} WHERE created_at >= point.us AND created_at < '{self._time(end_us)}' ORDER BY created_at LIMIT 1) AS first"
        )

    def counts(self, ranges_us: list[tuple[int, int]]) -> str:
        """For each [start, end): (i, events). Reads the index along all of them, 60 ns per event where the table is vacuumed."""
        starts, ends = (",".join(f'"{self._time(at)}"' for at in edge) for edge in zip(*ranges_us, strict=True))
        kind = self._kind
        return (
            f"SELECT piece.i, (SELECT count(*) FROM {TABLE} WHERE created_at >= piece.start AND created_at < piece.stop) AS n"
            f" FROM unnest('{{{starts}}}'::{kind}[], '{{{ends}}}'::{kind}[]) WITH ORDINALITY AS piece(start, stop, i)"
        )

    def last(self, part: Part) -> str:
        """pk of the last event of a part in time."""
        return f"SELECT pk_entity_change_log::bigint AS pk FROM {TABLE} AS log WHERE {self._within(part)} ORDER BY created_at DESC LIMIT 1"

    def bounds(self, part: Part) -> str:
        """Number of events of a part, their least and greatest pk: reads all its rows."""
        return (
            "SELECT count(*) AS n, min(pk_entity_change_log)::bigint AS least, max(pk_entity_change_log)::bigint AS greatest"
            f" FROM {TABLE} AS log WHERE {self._within(part)}"
        )

    def _ordered(self, part: Part) -> str:
        order = "log.pk_entity_change_log" if part.instant else "log.created_at, log.pk_entity_change_log"
        return f"SELECT {self._contract.projection} FROM {TABLE} AS log WHERE {self._within(part)} ORDER BY {order}"

    def _within(self, part: Part) -> str:
        start, end = f"log.created_at >= '{self._time(part.start_us)}'", f"log.created_at < '{self._time(part.end_us)}'"
        if part.instant:
            # Hidden from the planner: the index on created_at would lead through the whole instant for each of its pieces.
            start, end = f"({start}) IS TRUE", f"({end}) IS TRUE"
        terms = [start, end, f"log.pk_entity_change_log <= {part.upto_pk}"]
        if part.after_pk is not None:
            terms.append(f"log.pk_entity_change_log > {part.after_pk}")
        if part.after_key is not None:
            at, pk = part.after_key
            terms.append(
                f"log.created_at >= '{self._time(at)}' AND (log.created_at, log.pk_entity_change_log) > ('{self._time(at)}', {pk})"
            )
        return " AND ".join(terms)

    def _time(self, us: int) -> str:
        """A time as the text of a literal; unambiguous in every DateStyle and TimeZone."""
        return from_micros(us).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds") + ("+00" if self._zone else "")


def _quoted(name: str) -> str:
    return f'"{name}"'
