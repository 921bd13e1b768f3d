"""Files of events that are not published: of the form of the lake's, on local disk, as long as somebody holds them.

What lives here: ``Held``, one such file, and ``HeldFiles``, which writes and opens them. What must not: which events are in which file
(``buffer.py``), durability: what is in them is in Postgres, so a file that somebody removed costs a read of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.event import LAKE_SCHEMA
from fraiseql_pipeline.flight.disk import is_full, no_disk
from fraiseql_pipeline.lake import File, Opens, Snapshot, write_file
from fraiseql_pipeline.window import Window, WindowSize, from_micros

HOUR_US = WindowSize.HOUR.micros

#: How these files are told from the lake's.
_PREFIX = "live/"


def window_of(hour: int) -> Window:
    """An hour, counted from 1970, as a window."""
    return Window(from_micros(hour * HOUR_US), WindowSize.HOUR)


class Place(Protocol):
    """Where the files lie: the directory of a ``FrameStore``, beside its frames."""

    def directory(self) -> Path:
        """It exists. Raises ``FlightUnavailable``."""

    def make_room(self) -> bool:
        """Remove something that can be made again; False: there is nothing."""


class _OnDisk:
    """A file that is removed when nobody holds this object any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One file: some events of one hour, in (timestamp, pk) order."""

    hour: int
    file: File
    low_pk: int
    high_pk: int
    disk: _OnDisk = field(repr=False)

    @property
    def is_there(self) -> bool:
        """Whether the file is still on the disk, whole; somebody may tidy up the directory."""
        try:
            return self.disk.path.stat().st_size == self.file.size
        except OSError:
            return False


class HeldFiles:
    """Writes files to a place, and opens them; every other name is opened by ``lake``. May serve many threads."""

    def __init__(self, lake: Opens, place: Place) -> None:
        self._lake = lake
        self._place = place
        self._numbers = count()

    def open(self, name: str) -> pa.NativeFile:
        """The bytes of a file, for random access. Raises ``FlightUnavailable`` for one of ours that is not there."""
        if name.startswith(_PREFIX):
            try:
                return pa.memory_map(str(self._place.directory() / name.removeprefix(_PREFIX)))
            except FileNotFoundError:
                raise FlightUnavailable("The server lost events that it kept on its disk; read again.") from None
        return self._lake.open(name)

    def write(self, hour: int, rows: pa.Table) -> Held:
        """``rows``: of one hour, ``LAKE_SCHEMA``, in (timestamp, pk) order, at least one. Raises ``FlightUnavailable`` where the
        disk takes no file.
        """
        disk, size = self._written(rows)
        at, keys = rows["timestamp"], pc.min_max(rows["pk"])
        file = File(
            path=f"{_PREFIX}{disk.path.name}",
            date=from_micros(hour * HOUR_US).date().isoformat(),
            size=size,
            rows=rows.num_rows,
            low=at[0].value,
            high=at[-1].value,
        )
        return Held(hour, file, keys["min"].as_py(), keys["max"].as_py(), disk)

    def write_all(self, hour: int, batches: Iterable[pa.RecordBatch], file_rows: int) -> Iterator[Held]:
        """Files of about so many rows, for batches of one hour that are in order over all of them."""
        waiting: list[pa.RecordBatch] = []
        rows = 0
        for batch in batches:
            waiting.append(batch)
            rows += batch.num_rows
            if rows >= file_rows:
                yield self.write(hour, pa.Table.from_batches(waiting, LAKE_SCHEMA))
                waiting, rows = [], 0
        if rows:
            yield self.write(hour, pa.Table.from_batches(waiting, LAKE_SCHEMA))

    def _written(self, rows: pa.Table) -> tuple[_OnDisk, int]:
        while True:
            disk = _OnDisk(self._place.directory() / f"{next(self._numbers)}.parquet")
            try:
                write_file(str(disk.path), rows)
                return disk, disk.path.stat().st_size
            except OSError as error:
                if not is_full(error) or not self._place.make_room():
                    raise no_disk() from None

    def read(self, files: Sequence[Held]) -> Iterator[pa.RecordBatch]:
        """The events of files of one hour, in (timestamp, pk) order."""
        window = window_of(files[0].hour)
        return Snapshot(0, tuple(held.file for held in files), {}, self).read(window.start, window.end)
