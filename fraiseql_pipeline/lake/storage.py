"""Where one Delta table keeps its files: a local directory or an object store.

What lives here: reading, staging and publishing of single files, and what makes them durable. What must not: what the files mean.

Invariants
 1. A data file is visible under its final name only when it is whole: on local disks it is written in ``_staging`` on the same filesystem,
    fsynced and renamed; an object store shows an object when its upload is complete.
 2. On local disks a log entry is written aside, fsynced, and only then linked under its number: ``link`` fails if the number is taken, so
    two writers never share one, and no crash can leave a half-written entry under a number.
 3. Whoever returns from ``link_entry`` or ``rename_in`` has fsynced the directory too.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake.exceptions import DeltaError
from deltalake.fs import DeltaStorageHandler

from fraiseql_pipeline.errors import LakeDamaged, LakeError, LakeUnavailable, SettingsError

LOG = "_delta_log"
STAGING = "_staging"
#: A log entry before it gets its number: ours, delta-rs's.
_ASIDE = re.compile(rf"{LOG}/(\..*\.tmp|\d{{20}}\.json#\d+)")
#: What ``link`` fails with where there are no hard links: exFAT, some network and FUSE filesystems.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
#: What one request of an object store brings at most.
_PIECE_BYTES = 16 << 20


def entry_name(version: int) -> str:
    """The log entry of a version, relative to the table."""
    return f"{LOG}/{version:020d}.json"


def storage_for(uri: str, options: Mapping[str, str]) -> LocalStorage | ObjectStorage:
    """The storage of a table; touches nothing. A URI without a scheme, or with ``file``, is a local directory."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return LocalStorage(Path(unquote(parts.path)))
    if "://" not in uri:
        return LocalStorage(Path(os.path.abspath(os.path.expanduser(uri))))
    if parts.scheme not in {"s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss"}:
        raise SettingsError(f"A lake URI must be a path or start with s3://, gs:// or az://, got the scheme {parts.scheme!r}.")
    return ObjectStorage(uri, options)


#: What no further attempt changes: the path of the lake leads through a file, or it is on a file system that takes no writes.
_FOR_GOOD = frozenset({errno.ENOTDIR, errno.EROFS})


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's and delta-rs's I/O errors into one sentence without a path."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else _first_line(error)
        if error.errno in _FOR_GOOD:
            raise LakeError(f"The lake failed while {doing}: {reason}; check the directory in FRAISEQL_LAKE_URI.") from None
        hint = "free some space and run it again" if error.errno == errno.ENOSPC else "check the storage and run it again"
        raise LakeUnavailable(f"The lake's storage failed while {doing}: {reason}; {hint}.") from None
    except DeltaError as error:
        raise LakeUnavailable(f"The lake's storage failed while {doing} ({type(error).__name__}); run it again.") from None


def _first_line(error: Exception) -> str:
    """The beginning of what an error says: up to the first word that may be a path or an address."""
    lines = str(error).strip().splitlines()
    words = takewhile(lambda word: "/" not in word, lines[0].split(" at ")[0].split() if lines else [])
    return " ".join(words)[:120] or type(error).__name__


@contextmanager
def _reading() -> Iterator[None]:
    """The store's errors while an object is fetched: outside, nobody could tell them from pyarrow's about torn content."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LakeUnavailable(
            f"The lake's storage failed while reading a file: {_first_line(error)}; check the storage and run it again."
        ) from None


class LocalStorage:
    """A table in a directory of this machine (or of a filesystem that has hard links and fsync)."""

    local = True
    #: A new data file begins when the current one has grown past this.
    file_bytes = 128 << 20

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self.options: dict[str, str] = {}

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, ``None`` if there is none."""
        try:
            with open(self.root / name, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self.root / name).st_size
        except FileNotFoundError:
            return None

    def stamp(self, name: str) -> object:
        """Equal as long as it is the same file with the same content; ``None`` if there is none."""
        try:
            found = os.stat(self.root / name)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def names(self, directory: str) -> dict[str, int]:
        """The files right under a directory of the table, with their sizes."""
        return {name: found.st_size for name, found in self._found(directory) if stat.S_ISREG(found.st_mode)}

    def staged(self) -> dict[str, float]:
        """What writers have not finished, in the staging directory and aside in the log, with the time of its last change in seconds."""
        aside = [(name, found) for name, found in self._found(LOG) if _ASIDE.fullmatch(name)]
        return {name: found.st_mtime for name, found in [*self._found(STAGING), *aside]}

    def _found(self, directory: str) -> Iterator[tuple[str, os.stat_result]]:
        """What lies right under a directory; what somebody removes meanwhile is left out."""
        with suppress(FileNotFoundError), os.scandir(self.root / directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    yield f"{directory}/{entry.name}", entry.stat()

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access."""
        return pa.memory_map(str(self.root / name))

    def open_footer(self, name: str) -> pa.NativeFile:
        """For the metadata of a Parquet file."""
        return self.open(name)

    def stage(self, final: str) -> tuple[str, pa.NativeFile]:
        """Open the file for writing that will be ``final``; the name is where it lies until ``rename_in``."""
        name = f"{STAGING}/{final.rsplit('/', 1)[-1]}"
        (self.root / STAGING).mkdir(parents=True, exist_ok=True)
        return name, pa.OSFile(str(self.root / name), "wb")

    def close_staged(self, name: str, sink: pa.NativeFile) -> None:
        sink.close()
        _fsync(self.root / name)

    def rename_in(self, moves: Mapping[str, str]) -> None:
        """Give staged files their final names (staged → final), durably."""
        directories = {str(Path(final).parent) for final in moves.values()}
        created = [d for d in directories if not (self.root / d).is_dir()]
        for directory in created:
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        for staged, final in moves.items():
            os.rename(self.root / staged, self.root / final)
        for directory in directories:
            _fsync(self.root / directory)
        if created:
            _fsync(self.root)

    def sync_parents(self) -> None:
        """Make the directories durable that lead to the table, whoever made them: as far up as they are on its filesystem."""
        device = os.stat(self.root).st_dev
        for directory in self.root.parents:
            if os.stat(directory).st_dev != device:
                return
            with suppress(PermissionError):  # one that we may only pass through was there before
                _fsync(directory)

    def delete(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def link_entry(self, version: int, text: bytes) -> bool:
        """Add a log entry; ``False`` if the version is taken."""
        final = self.root / entry_name(version)
        aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(aside, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                _link(aside, final)
            except FileExistsError:
                return False
        finally:
            aside.unlink(missing_ok=True)
        _fsync(self.root / LOG)
        return True

    def check_links(self) -> None:
        """Raise ``LakeError`` if the filesystem makes no hard links."""
        names = [self.root / LOG / f".link-{uuid.uuid4().hex}.{end}.tmp" for end in ("from", "to")]
        names[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            names[0].touch()
            _link(*names)
        finally:
            for name in names:
                name.unlink(missing_ok=True)

    def sync_log(self, names: list[str]) -> None:
        """Make log files that somebody else wrote without fsync (delta-rs's checkpoints) durable."""
        for name in names:
            if (self.root / name).exists():
                _fsync(self.root / name)
        _fsync(self.root / LOG)
        _fsync(self.root)

    def move_aside(self, name: str) -> str:
        """Rename a damaged file so that no reader takes it for what it was."""
        aside = f"{name}.torn-{uuid.uuid4().hex[:8]}"
        os.rename(self.root / name, self.root / aside)
        _fsync((self.root / name).parent)
        return aside


class ObjectStorage:
    """A table in an object store, through delta-rs's own storage layer: the options are the ones that deltalake documents.

    Opening a file, for reading or writing, holds Python's lock for one round trip (delta-rs 1.6.6); reading and writing do not.
    """

    local = False
    #: Smaller than on disks, because a reader holds a whole file.
    file_bytes = 48 << 20

    def __init__(self, uri: str, options: Mapping[str, str]) -> None:
        self.uri = uri.rstrip("/")
        self.options = dict(options)
        self._opened: pafs.PyFileSystem | None = None

    @property
    def may_overwrite(self) -> bool:
        """Whether a log entry might take the place of another one: many stores that speak S3 pass ``If-None-Match`` over. Amazon's own, Google's
        and Azure's do not.
        """
        named = [*self.options, *(name for name in os.environ if name.upper().startswith("AWS_"))]
        return urlsplit(self.uri).scheme in {"s3", "s3a"} and any("endpoint" in name.lower() for name in named)

    @property
    def _files(self) -> pafs.PyFileSystem:
        if self._opened is None:
            try:
                self._opened = pafs.PyFileSystem(_Handler(self.uri, self.options))
            except OSError as error:
                raise LakeUnavailable(
                    f"The lake's storage could not be opened: {_first_line(error)}; check the URI and options."
                ) from None
        return self._opened

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, ``None`` if there is none."""
        try:
            with self._files.open_input_file(name) as file:
                # In one request: read() without a size asks for 64 kB at a time.
                return bytes(file.read_at(file.size(), 0)) if file.size() else b""
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        info = self._files.get_file_info(name)
        return None if info.type == pafs.FileType.NotFound else info.size

    def stamp(self, name: str) -> object:
        """Equal as long as it is the same object with the same content; ``None`` if there is none."""
        info = self._files.get_file_info(name)
        return None if info.type == pafs.FileType.NotFound else (info.mtime_ns, info.size)

    def names(self, directory: str) -> dict[str, int]:
        """The objects right under a prefix of the table, with their sizes."""
        infos = self._files.get_file_info(pafs.FileSelector(directory, allow_not_found=True))
        return {i.path: i.size for i in infos if i.type == pafs.FileType.File}

    def staged(self) -> dict[str, float]:
        """An object store has no staging directory: an unfinished upload is no object."""
        return {}

    def open(self, name: str) -> pa.NativeFile:
        """The whole object in memory, fetched in large pieces; ``file_bytes`` bounds it.

        Not delta-rs's file object: pyarrow's threads would call back into Python for every column, and a process that ends right after a
        read aborts when one of them lets go of the file too late (4 of 10 runs, with or without ``pre_buffer``).
        """
        with _reading(), self._files.open_input_file(name) as file:
            content = pa.allocate_buffer(file.size())
            view = memoryview(content).cast("B") if content.size else memoryview(b"")
            for start in range(0, content.size, _PIECE_BYTES):
                piece = file.read_at(min(_PIECE_BYTES, content.size - start), start)
                view[start : start + len(piece)] = piece
                if len(piece) != min(_PIECE_BYTES, content.size - start):
                    raise LakeDamaged("A data file is shorter than the store says; run fsck.")
        return pa.BufferReader(content)

    def open_footer(self, name: str) -> pa.NativeFile:
        """For the metadata of a Parquet file, without fetching its rows."""
        with _reading():
            return self._files.open_input_file(name)

    def stage(self, final: str) -> tuple[str, pa.NativeFile]:
        """Open a new object for writing, under its final name: nobody looks for it before the log names it."""
        return final, self._files.open_output_stream(final)

    def close_staged(self, name: str, sink: pa.NativeFile) -> None:
        del name
        sink.close()

    def rename_in(self, moves: Mapping[str, str]) -> None:
        del moves

    def delete(self, name: str) -> None:
        try:
            self._files.delete_file(name)
        except FileNotFoundError:
            return

    def sync_log(self, names: list[str]) -> None:
        del names

    def sync_parents(self) -> None:
        return

    def check_links(self) -> None:
        return


class _Handler(DeltaStorageHandler):
    """delta-rs's handler; its output stream takes ``bytes`` only, pyarrow hands it buffers."""

    def open_output_stream(self, path: str, metadata: dict[str, str] | None = None) -> pa.PythonFile:
        return pa.PythonFile(_BytesOnly(self._handler.open_output_stream(path, metadata)), mode="w")


class _BytesOnly:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.closed = False

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data))
        return len(data)

    def flush(self) -> None:
        return

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._stream.close()


def _link(aside: Path, final: Path) -> None:
    try:
        os.link(aside, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise LakeError(
            "The lake's filesystem makes no hard links, so two writers could take the same version; nothing was committed."
            " Put the lake on a filesystem that has them, or in an object store."
        ) from None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
