"""Validate: a batch as read → the events that are accepted, and the rows that are quarantined with every reason.

What lives here: what each rule of the column table means, who judges it, and when a window is halted. What must not: column names or types
of its own (``event.py``), I/O, a value of an event in a message.

Kernels over whole arrays find the rows that break a rule (a null too many, an id of a wrong shape, a name that fails among the distinct
names) and split the batch at once. The values that broke a rule are kept, and ``confirm`` has pandera judge them against the same rules: a
window is published only if both agree on every one of them. So pandera costs its fixed price once per window, not per batch: 17 of the
44 ms that a batch of 10,000 events with 25 bad ones took when it was asked each time. Measured over 500,000 sample events in batches of 8 MB,
nearly each with bad rows, CPU per event: 0.9 µs, look-up of earlier ids included.

Invariants
 1. ``accepted.num_rows + quarantined.num_rows == batch.num_rows``, or ``check`` raises; order is kept in both halves.
 2. A quarantined row is the row as read and has at least one reason; an accepted row has none. pandera confirms every reason but
    ``duplicate``, or ``confirm`` raises.
 3. ``accepted`` is ``LAKE_SCHEMA`` made of the arrays that were read: values never travel through polars and back.
 4. An ``event_id`` is accepted once per window: the first sound row in (timestamp, pk) order has it, later ones are ``event_id:duplicate``.
    Found by hash, confirmed by comparing the ids themselves.
 5. No value of a row reaches an exception, a log line or a reason. pandera's own errors hold values, so they end here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.errors import ValidationHalted
from fraiseql_pipeline.event import (
    BATCH_SCHEMA,
    EVENT_TYPES,
    EXTRACTED,
    LAKE_SCHEMA,
    PARTITION,
    QUARANTINE_SCHEMA,
    UUID_PATTERN,
    Column,
    Rule,
)
from fraiseql_pipeline.event_ids import NO_ROWS, EventIds, Rows, malformed_ids, rows_where
from fraiseql_pipeline.window import Window, to_micros

#: Rejected rows a window may have whatever their share: one bad row of three at night is a row to look at, not a reason to stop.
TOLERATED_ROWS = 10

#: A name is refused only if no door could name it: blank, ``*`` alone (which means all types), too long for a ticket (255 characters
#: fill 3 of its 4 KiB at worst), or holding characters that break lines and terminals. Dots, colons or spaces are odd for a GraphQL
#: type, but table names and producers have them, and tickets and subjects can encode them: no event is held back for its style.
_NAME = r"^[^\p{Cc}\p{Zl}\p{Zp}]{1,255}$"

#: Values that broke a rule and wait for pandera; a window of nothing but them is confirmed piece by piece.
_DOUBTFUL_BYTES = 4 << 20
#: Distinct names whose verdict is remembered; a window has a few dozen, unless somebody makes them up.
_REMEMBERED_VALUES = 10_000


@dataclass(frozen=True, slots=True)
class Validation:
    """One batch, judged. ``accepted`` is ``LAKE_SCHEMA``, ``quarantined`` is ``QUARANTINE_SCHEMA``; ``reasons`` counts rows per reason.

    A row with two reasons counts under both.
    """

    accepted: pa.RecordBatch
    quarantined: pa.RecordBatch
    reasons: dict[str, int]


class Span(Protocol):
    """What a validator needs of a window; an upload's batch has no window, its times may be any."""

    @property
    def start(self) -> datetime: ...
    @property
    def end(self) -> datetime: ...
    @property
    def key(self) -> str: ...


class Validator:
    """Judges the batches of one window, in (timestamp, pk) order; it remembers the ids it accepted. One thread at a time.

    ``confirm`` after the last batch, before anything is published. ``known_ids``: string arrays of event ids that the window already holds
    (a late merge); they count as accepted.
    """

    def __init__(self, window: Span, known_ids: Iterable[pa.Array] = ()) -> None:
        self._window = window
        self._seen = EventIds()
        self._verdicts: defaultdict[str, _Verdicts] = defaultdict(dict)
        self._doubts: defaultdict[str, list[_Doubt]] = defaultdict(list)
        self._doubtful_bytes = 0
        for known in known_ids:
            ids = known.cast(pa.string()).drop_null()
            self._seen.admit(ids.filter(pc.match_substring_regex(ids, UUID_PATTERN)))

    def check(self, batch: pa.RecordBatch) -> Validation:
        """Split a batch of ``BATCH_SCHEMA``; raises ``ValidationHalted`` if its columns are not that, or if counts do not add up."""
        _refuse_drift(batch.schema)
        faults = self._faults(batch)
        repeated = self._seen.admit(batch.column("event_id"), _all_but(batch.num_rows, faults.values()) if faults else None)
        if len(repeated):
            faults["event_id:duplicate"] = repeated
        if not faults:
            return Validation(self._accepted(batch), _NONE_QUARANTINED, {})
        rows = np.unique(np.concatenate([*faults.values()]))
        accepted, quarantined = self._accepted(_without(batch, rows)), self._quarantined(batch, faults, rows)
        if accepted.num_rows + quarantined.num_rows != batch.num_rows:
            raise ValidationHalted(
                f"Window {self._window}: {accepted.num_rows} accepted and {quarantined.num_rows} quarantined rows do not add up to the "
                f"{batch.num_rows} that were read; nothing was written, please report this as a bug.",
                window=self._window.key,
            )
        counts = sorted(((len(rows), reason) for reason, rows in faults.items()), key=lambda item: (-item[0], item[1]))
        return Validation(accepted, quarantined, {reason: count for count, reason in counts})

    def confirm(self) -> None:
        """Have pandera judge the values that broke a rule; raises ``ValidationHalted`` unless it finds the same faults in them, and
        no others.
        """
        doubts, self._doubts, self._doubtful_bytes = self._doubts, defaultdict(list), 0
        for column in _JUDGED:
            if column.name in doubts:
                self._confirm(column, doubts[column.name])

    def _confirm(self, column: Column, doubts: list[_Doubt]) -> None:
        values = pa.concat_arrays([doubt.values for doubt in doubts])
        claimed = [fault for doubt in doubts for fault in [doubt.fault] * len(doubt.values)]
        cases = _failure_cases(column, self._window, _frame(pa.RecordBatch.from_arrays([values], names=[column.name])))
        if cases is not None and cases["index"].null_count():
            broken = ", ".join(sorted({f"{name}:{check}" for name, check in cases.select("column", "check").iter_rows()}))
            raise ValidationHalted(
                f"Window {self._window}: the columns could not be judged ({broken}); please report this as a bug.",
                window=self._window.key,
            )
        found = set() if cases is None else set(cases.select("index", pl.col("check").replace("not_nullable", "null")).iter_rows())
        if found != set(enumerate(claimed)):
            raise ValidationHalted(
                f"Window {self._window}: rows were rejected for their {column.name} that pandera judges otherwise; nothing was published, "
                "please report this as a bug.",
                window=self._window.key,
            )

    def _faults(self, batch: pa.RecordBatch) -> dict[str, Rows]:
        """The rows that break each rule, by reason."""
        faults = {}
        for column in _JUDGED:
            values = batch.column(column.name)
            if values.null_count and not column.nullable:
                faults[f"{column.name}:null"] = self._doubted(column, "null", values, rows_where(values.is_null()))
            if column.rule is None or values.null_count == len(values):
                continue
            broken = self._breaking(column, values.drop_null() if values.null_count else values)
            if len(broken):
                fault = _RULES[column.rule].fault
                rows = rows_where(values.is_valid())[broken] if values.null_count else broken
                faults[f"{column.name}:{fault}"] = self._doubted(column, fault, values, rows)
        if self._doubtful_bytes > _DOUBTFUL_BYTES:
            self.confirm()
        return faults

    def _doubted(self, column: Column, fault: str, values: pa.Array, rows: Rows) -> Rows:
        doubt = _Doubt(fault, values.take(pa.array(rows)))
        self._doubts[column.name].append(doubt)
        self._doubtful_bytes += doubt.values.nbytes
        return rows

    def _breaking(self, column: Column, values: pa.Array) -> Rows:
        assert column.rule is not None
        meaning = _RULES[column.rule]

        def search(some: pa.Array) -> Rows:
            sound = _frame(pa.RecordBatch.from_arrays([some], names=["v"])).select(meaning.holds(pl.col("v"), self._window))
            return np.array((~sound.to_series()).arg_true().to_list(), np.int64)

        return meaning.screen(values, _Asked(self._window, self._verdicts[column.name], search))

    def _accepted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        # A window lies within one UTC date and its rows lie within the window, so their date is the window's.
        dates = pa.repeat(pa.scalar(self._window.start.date(), pa.date32()), batch.num_rows)
        return pa.RecordBatch.from_arrays(
            [dates if name == PARTITION else batch.column(name) for name in LAKE_SCHEMA.names], schema=LAKE_SCHEMA
        )

    def _quarantined(self, batch: pa.RecordBatch, faults: dict[str, Rows], rows: Rows) -> pa.RecordBatch:
        """The rows as read, with their reasons; ``rows`` are those of ``faults``, sorted."""
        reasons = sorted(faults)
        row_of = np.concatenate([faults[reason] for reason in reasons])
        reason_of = np.repeat(np.arange(len(reasons)), [len(faults[reason]) for reason in reasons])
        in_order = np.lexsort((reason_of, row_of))
        offsets = np.searchsorted(row_of[in_order], [*rows, batch.num_rows]).astype(np.int32)
        names = pa.array(reasons).take(pa.array(reason_of[in_order]))
        n = len(rows)
        derived = {
            "reasons": pa.ListArray.from_arrays(pa.array(offsets), names, type=QUARANTINE_SCHEMA.field("reasons").type),
            "window_key": pa.repeat(pa.scalar(self._window.key), n),
            # The window's date, not the row's: a row may have no time, and the quarantine of a window is replaced as a whole.
            PARTITION: pa.repeat(pa.scalar(self._window.start.date(), pa.date32()), n),
        }
        taken = batch.take(pa.array(rows))
        return pa.RecordBatch.from_arrays(
            [derived[name] if name in derived else taken.column(name) for name in QUARANTINE_SCHEMA.names], schema=QUARANTINE_SCHEMA
        )


def tolerated_rows(max_rejected_share: float) -> int:
    """How many rejected rows halt no window, however few it has."""
    return TOLERATED_ROWS if max_rejected_share > 0 else 0


def check_share(
    window: Window, accepted_rows: int, quarantined_rows: int, reasons: Mapping[str, int], max_rejected_share: float
) -> None:
    """Raise ``ValidationHalted`` if more than ``max_rejected_share`` of a window's rows were rejected, naming the counts per reason.

    Up to ``TOLERATED_ROWS`` rejected rows never halt a window, unless the share is 0: then the first one does.
    """
    rows = accepted_rows + quarantined_rows
    # As it is written: 0.29 as a binary fraction is less than 29 of 100.
    if quarantined_rows <= tolerated_rows(max_rejected_share) or quarantined_rows <= rows * Decimal(repr(max_rejected_share)):
        return
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    raise ValidationHalted(
        f"Window {window} is halted: {quarantined_rows:,} of {rows:,} events were rejected, more than the share of "
        f"{max_rejected_share:g} that FRAISEQL_MAX_REJECTED_SHARE allows ({counts}). Nothing of it was written; look at the producer, or raise the limit.",
        window=window.key,
    )


# ------------------------------------------------------------------------------------------------------------------ rules


_Verdicts = dict[str, bool]


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Values of a column that broke a rule, or are null where none may be."""

    fault: str
    values: pa.Array


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a screen may need: the window, what it found out about values of the column before, and ``search``, which gives the rows of
    an array without nulls for which ``holds`` is false.
    """

    window: Span
    verdicts: _Verdicts
    search: Callable[[pa.Array], Rows]


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a rule means. ``fault`` is its word in a reason; ``holds`` gives true for a sound value (nulls are not asked): pandera's view.

    ``screen`` finds the very rows of an array without nulls for which ``holds`` is false, and asks about far fewer values.
    """

    fault: str
    holds: Callable[[pl.Expr, Span], pl.Expr]
    screen: Callable[[pa.Array, _Asked], Rows]


def _by_distinct_values(values: pa.Array, asked: _Asked) -> Rows:
    distinct = pc.unique(values).to_pylist()
    new = [value for value in distinct if value not in asked.verdicts]
    if new:
        if len(asked.verdicts) > _REMEMBERED_VALUES:
            asked.verdicts.clear()
            new = distinct
        wrong = set(asked.search(pa.array(new, values.type)).tolist())
        asked.verdicts.update((value, at not in wrong) for at, value in enumerate(new))
    broken = [value for value in distinct if not asked.verdicts[value]]
    return rows_where(pc.is_in(values, pa.array(broken, values.type))) if broken else NO_ROWS


def _by_extremes(values: pa.Array, asked: _Asked) -> Rows:
    start, end = to_micros(asked.window.start), to_micros(asked.window.end)
    least, greatest = (extreme.value for extreme in pc.min_max(values).values())
    return NO_ROWS if start <= least and greatest < end else asked.search(values)


_RULES: dict[Rule, _Meaning] = {
    "uuid": _Meaning("malformed", lambda value, _: value.str.contains(UUID_PATTERN), lambda values, _: malformed_ids(values)),
    "verb": _Meaning("unknown", lambda value, _: value.is_in(EVENT_TYPES), _by_distinct_values),
    "name": _Meaning(
        "malformed",
        lambda value, _: value.str.contains(_NAME) & value.str.contains(r"\S") & (value != "*"),
        _by_distinct_values,
    ),
    "window": _Meaning("outside", lambda value, window: value.is_between(window.start, window.end, closed="left"), _by_extremes),
    "absent": _Meaning("unfit", lambda value, _: value.is_null(), lambda values, _: np.arange(len(values))),
}

_JUDGED = tuple(column for column in EXTRACTED if column.rule is not None or not column.nullable)


def _failure_cases(column: Column, window: Span, frame: pl.DataFrame) -> pl.DataFrame | None:
    """pandera's findings about a column, or none. The exception they came in quotes values, so it is not let out of here, not even
    as a context.
    """
    import pandera.polars as pandera  # 0.3 s and, where pandas is installed, 46 MiB: only for windows with bad rows

    checks = []
    if column.rule is not None:
        meaning = _RULES[column.rule]

        def holds(data: Any) -> pl.LazyFrame:
            values: pl.LazyFrame = data.lazyframe
            return values.select(meaning.holds(pl.col(data.key), window))

        checks.append(pandera.Check(holds, name=meaning.fault))
    judged = pandera.Column(_DTYPES[column.name], checks, nullable=column.nullable)
    try:
        pandera.DataFrameSchema({column.name: judged}, strict=True).validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        cases: pl.DataFrame = error.failure_cases
        return cases
    return None


# ---------------------------------------------------------------------------------------------------------- Arrow, polars


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _all_but(rows: int, unsound: Iterable[Rows]) -> npt.NDArray[np.bool_]:
    sound = np.ones(rows, np.bool_)
    for some in unsound:
        sound[some] = False
    return sound


def _without(batch: pa.RecordBatch, rows: Rows) -> pa.RecordBatch:
    """The batch without these rows (sorted). Few rows are cut out by copying what lies between them: 8 ms per 131,072 events against
    28 ms for a filter, which copies value by value.
    """
    if len(rows) > 512:
        return batch.filter(pa.array(_all_but(batch.num_rows, [rows])))
    edges = [-1, *rows.tolist(), batch.num_rows]
    pieces = [batch.slice(left + 1, right - left - 1) for left, right in pairwise(edges) if right - left > 1]
    return pa.concat_batches(pieces) if pieces else batch.slice(0, 0)


def _refuse_drift(schema: pa.Schema) -> None:
    if schema.equals(BATCH_SCHEMA):
        return
    expected, found = set(BATCH_SCHEMA.names), schema.names
    problems = [f"missing: {name}" for name in BATCH_SCHEMA.names if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [f"twice: {name}" for name in sorted({name for name in found if found.count(name) > 1})]
    problems += [
        f"{field.name}: {schema.field(field.name).type} instead of {field.type}"
        for field in BATCH_SCHEMA
        if found.count(field.name) == 1 and schema.field(field.name).type != field.type
    ]
    if problems or found != BATCH_SCHEMA.names:
        raise ValidationHalted(
            f"The columns of the change log are not those agreed on ({'; '.join(problems) or 'in another order'}). Nothing was written."
        )


_DTYPES = _frame(BATCH_SCHEMA.empty_table()).schema
_NONE_QUARANTINED = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in QUARANTINE_SCHEMA], schema=QUARANTINE_SCHEMA)
