"""The ids of a window's events: which are UUIDs, and which were seen before.

What lives here: kernels over whole arrays of ids, and ``EventIds``, which remembers those of one window. What must not: rules and reasons
(``validate.py``), columns other than an id.

Invariants
 1. An id counts as seen only if the very text was admitted before; hashes raise a suspicion and never decide.
 2. Eight bytes of memory per id, whatever the number of batches. The text is spilled, and of it only the ids under suspicion are read again:
    what a batch costs does not depend on how many came before.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import weakref
from contextlib import suppress
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fraiseql_pipeline.errors import PipelineError, ValidationHalted

#: Rows of a batch, by number.
Rows: TypeAlias = npt.NDArray[np.int64]
NO_ROWS: Rows = np.empty(0, np.int64)

_UUID_BYTES = 36
_HYPHENS = (8, 13, 18, 23)
_IS_DIGIT = np.array([at not in _HYPHENS for at in range(_UUID_BYTES)])


def malformed_ids(ids: pa.Array) -> Rows:
    """The rows that hold no UUID in lower case; ``ids`` has no nulls.

    Texts of 36 bytes lie behind each other as one run of bytes. That all are sound is told from the run: without its hex digits it is four
    hyphens per text, and these stand at their places (18 ns per id where a regular expression takes 90). Else every byte is compared with
    what may stand there. Texts of another length are told apart first.
    """
    rows = len(ids)
    if rows == 0:
        return NO_ROWS
    lengths = pc.binary_length(ids)
    if [end.as_py() for end in pc.min_max(lengths).values()] != [_UUID_BYTES, _UUID_BYTES]:
        fits = pc.equal(lengths, _UUID_BYTES)
        return np.union1d(rows_where(pc.invert(fits)), rows_where(fits)[malformed_ids(ids.filter(fits))])
    octets, hyphens = bytes(_text(ids)), b"-" * rows
    if octets.translate(None, b"0123456789abcdef") == hyphens * 4 and all(octets[at::_UUID_BYTES] == hyphens for at in _HYPHENS):
        return NO_ROWS
    text = np.frombuffer(octets, np.uint8)
    # Unsigned bytes wrap below zero, so one comparison tests both ends of a range.
    digits = (text - ord("0") < 10) | (text - ord("a") < 6)
    no_digit = digits != np.tile(_IS_DIGIT, rows)
    no_hyphen = text.reshape(rows, _UUID_BYTES)[:, _HYPHENS] != ord("-")
    return np.flatnonzero(no_digit.reshape(rows, _UUID_BYTES).any(axis=1) | no_hyphen.any(axis=1))


def _text(ids: pa.Array) -> memoryview:
    """The bytes of an array of 36-byte strings without nulls, which lie one behind the other."""
    _, offsets, text = ids.buffers()
    first = memoryview(offsets).cast("i")[ids.offset]
    return memoryview(text)[first : first + len(ids) * _UUID_BYTES]


class EventIds:
    """The UUIDs accepted so far: 8 bytes of memory each, and their text in a spill file that is read only to confirm a duplicate.

    Memory holds sorted runs of keys: 32 bits of a hash, then the id's number in the spill file. A run is merged with the one before as long as
    that is less than twice as long, so there are few of them. 32 bits are enough: an id of a window of 10M is suspected wrongly
    once in 400, which costs reading 36 bytes. The text of the first ``_SPILL_BYTES`` stays in memory.
    """

    _SPILL_BYTES = 1024 * 1024
    #: A merge needs its run twice and a half in memory: 20 MB. Looking a batch up in one more run costs 0.06 µs per id.
    _RUN_IDS = 1 << 20

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []
        self._admitted = 0
        # Drawn anew for every window, so that nobody can make up ids that share a hash.
        self._factors = [secrets.randbits(64) | 1 for _ in _WORDS]
        self._texts = tempfile.SpooledTemporaryFile(max_size=self._SPILL_BYTES)  # noqa: SIM115  as long as self
        weakref.finalize(self, _close, self._texts)

    def admit(self, ids: pa.Array, sound: npt.NDArray[np.bool_] | None = None) -> Rows:
        """The positions of ids that were admitted before, or stand behind a sound one of the same batch; admits the other sound ones.

        ``sound``: whether the row may be accepted at all; none: all may. Where it is true, ``ids`` holds a UUID in lower case.
        """
        rows = None
        if sound is not None:
            fits = pc.fill_null(pc.equal(pc.binary_length(ids), _UUID_BYTES), fill_value=False)
            rows, ids = rows_where(fits), ids.filter(fits)
            sound = sound[rows]
        if not len(ids):
            return NO_ROWS
        texts = np.ndarray(len(ids), f"S{_UUID_BYTES}", _text(ids))
        hashes = _hashes(texts, self._factors)
        by_hash = np.argsort(hashes)
        repeated = np.zeros(len(ids), np.bool_)
        repeated[self._known(texts, hashes[by_hash], by_hash)] = True
        repeated[_twins(texts, hashes[by_hash], by_hash, sound)] = True
        self._remember(texts, hashes, ~repeated if sound is None else sound & ~repeated)
        found = np.flatnonzero(repeated)
        return found if rows is None else rows[found]

    def _known(self, texts: npt.NDArray[np.bytes_], ordered: npt.NDArray[np.uint64], by_hash: Rows) -> list[int]:
        """The rows whose text was admitted with an earlier batch; ``ordered`` are their hashes, rising, ``by_hash`` the rows in that order."""
        suspicions: list[tuple[int, int]] = []
        for run in self._runs:
            places = np.searchsorted(run, ordered << np.uint64(32))
            hits = np.flatnonzero(run[np.minimum(places, len(run) - 1)] >> np.uint64(32) == ordered)
            for hit in hits.tolist():
                place, key = int(places[hit]), int(ordered[hit])
                while place < len(run) and int(run[place]) >> 32 == key:
                    suspicions.append((int(run[place]) & 0xFFFF_FFFF, int(by_hash[hit])))
                    place += 1
        known = []
        for number, row in sorted(suspicions):
            self._texts.seek(number * _UUID_BYTES)
            if self._texts.read(_UUID_BYTES) == texts[row]:
                known.append(row)
        return known

    def _remember(self, texts: npt.NDArray[np.bytes_], hashes: npt.NDArray[np.uint64], kept: npt.NDArray[np.bool_]) -> None:
        hashes = hashes[kept]
        if not len(hashes):
            return
        first, self._admitted = self._admitted, self._admitted + len(hashes)
        if self._admitted > 1 << 32:
            raise ValidationHalted(
                "A window must not hold more than 4,294,967,296 events; use hourly windows. Nothing of it was written."
            )
        try:
            self._texts.seek(first * _UUID_BYTES)
            self._texts.write(texts[kept].tobytes())
            self._texts.flush()  # what is left to a later seek fails there
        except OSError as error:  # at ``_SPILL_BYTES`` a file is made
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            raise PipelineError(
                f"The ids of a window could not be kept in the temporary directory ({why}); set TMPDIR to one that can be written."
            ) from None
        run = np.sort(hashes << np.uint64(32) | np.arange(first, self._admitted, dtype=np.uint64))
        while self._runs and len(self._runs[-1]) < 2 * len(run) and len(self._runs[-1]) + len(run) <= self._RUN_IDS:
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # which merges what is sorted already
        self._runs.append(run)


def _close(texts: IO[bytes]) -> None:
    with suppress(OSError):  # of a full disk, told when it was written to
        texts.close()


def _twins(
    texts: npt.NDArray[np.bytes_], ordered: npt.NDArray[np.uint64], by_hash: Rows, sound: npt.NDArray[np.bool_] | None
) -> list[int]:
    """The rows behind the first sound one with the same text."""
    pairs = np.flatnonzero(ordered[1:] == ordered[:-1])
    first: set[bytes] = set()
    twins = []
    for row in np.unique(by_hash[np.concatenate([pairs, pairs + 1])]).tolist() if len(pairs) else ():
        text = bytes(texts[row])
        if text in first:
            twins.append(row)
        elif sound is None or sound[row]:
            first.add(text)
    return twins


#: Where the 64-bit words begin that cover an id; the last two overlap.
_WORDS = (0, 8, 16, 24, 28)


def _hashes(texts: npt.NDArray[np.bytes_], factors: list[int]) -> npt.NDArray[np.uint64]:
    """32 bits for each id, as 64-bit numbers; two ids may share them, so they only ever raise a suspicion."""
    total = np.zeros(len(texts), np.uint64)
    for at, factor in zip(_WORDS, factors, strict=True):
        total += np.ndarray(len(texts), "<u8", texts, at, (_UUID_BYTES,)) * np.uint64(factor)
    return total >> np.uint64(32)


def rows_where(mask: pa.Array) -> Rows:
    """The rows where a mask without nulls is true."""
    rows: Rows = pc.indices_nonzero(mask).to_numpy().astype(np.int64)
    return rows
