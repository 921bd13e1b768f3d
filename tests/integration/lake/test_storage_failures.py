"""A storage that refuses a call: one sentence of this package, without a path, and never in place of the first error."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from fraiseql_pipeline.errors import LakeConflict, LakeError, LakeUnavailable, SourceUnavailable
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.lake.entry import File
from fraiseql_pipeline.lake.storage import LocalStorage
from fraiseql_pipeline.lake.table import Table
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, content, publish

HOUR = Window.parse("2026-11-01-10:00")
NEXT_DAY = Window.parse("2026-11-02-10:00")
CLOSED = NEXT_DAY.end + timedelta(days=5)


def refuse(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str, number: int) -> None:
    """Let calls fail whose first argument has ``part`` in it."""
    call: Callable[..., Any] = getattr(owner, name)

    def refusing(path: Any, *args: Any, **options: Any) -> Any:
        if part in os.fspath(path):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return call(path, *args, **options)

    monkeypatch.setattr(owner, name, refusing)


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [(Path, "mkdir", "event_date=2026-11-02"), (os, "rename", "_staging"), (os, "link", "_delta_log")],
    ids=["mkdir", "rename", "link"],
)
def test_what_fails_while_a_window_is_published_is_one_retryable_sentence(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str
) -> None:
    publish(lake, HOUR, 10)
    with monkeypatch.context() as broken, pytest.raises(LakeUnavailable, match="No space left") as raised:
        refuse(broken, owner, name, part, errno.ENOSPC)
        publish(lake, NEXT_DAY, 10, 2)
    assert lake.uri not in str(raised.value)
    assert "event_date" not in str(raised.value)
    assert publish(lake, NEXT_DAY, 10, 2).outcome == "published"
    assert {f.kind for f in lake.fsck()} <= {"leftover"}


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [(os, "scandir", "_delta_log"), (os, "scandir", "_staging"), (os, "rename", "_staging"), (Path, "unlink", "_staging")],
    ids=["listing the log", "listing what is staged", "rename", "deleting a leftover"],
)
def test_what_fails_while_a_lake_is_maintained_is_one_retryable_sentence(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str
) -> None:
    for hour in (HOUR, Window(HOUR.end, HOUR.size)):
        publish(lake, hour, 10)
    dead = Path(lake.events_uri, "_staging", "dead.parquet")
    dead.write_bytes(b"x")
    os.utime(dead, (1, 1))
    with monkeypatch.context() as broken, pytest.raises(LakeUnavailable, match="Permission denied") as raised:
        refuse(broken, owner, name, part, errno.EACCES)
        lake.maintain(CLOSED)
    assert lake.uri not in str(raised.value)
    lake.maintain(CLOSED)
    assert lake.fsck() == []
    assert content(lake, HOUR).num_rows == 10


@contextmanager
def closed_to_us(directory: Path) -> Iterator[None]:
    """A directory that may not be entered; root, who may enter any, is somebody else meanwhile."""
    user, mode = os.geteuid(), directory.stat().st_mode
    directory.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        directory.chmod(mode)


@pytest.mark.parametrize("part", ["", "events", "events/_delta_log"], ids=["lake", "table", "log"])
@pytest.mark.parametrize("open_before", [False, True])
def test_a_lake_that_may_not_be_entered_is_not_an_empty_one(lake: Lake, part: str, open_before: bool) -> None:
    publish(lake, HOUR, 10)
    lake = lake if open_before else Lake(lake.uri)
    with closed_to_us(Path(lake.uri, part)):
        for look in (lake.published, lake.newest, lake.snapshot, lambda: list(lake.read(HOUR.start, HOUR.end))):
            with pytest.raises(LakeUnavailable, match="Permission denied") as raised:
                look()
            assert lake.uri not in str(raised.value)
        with pytest.raises(LakeUnavailable, match="Permission denied"):
            lake.maintain(CLOSED)
    assert len(lake.published()) == 1


@pytest.mark.parametrize("closed", [True, False], ids=["closed files", "open files"])
def test_tidying_up_never_takes_the_place_of_the_first_error(lake: Lake, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    monkeypatch.setattr("fraiseql_pipeline.lake.parquet.ROW_GROUP_ROWS", 10)
    refuse(monkeypatch, Path, "unlink", "_staging", errno.EROFS)
    with pytest.raises(SourceUnavailable), lake.stage(HOUR) as staged:
        for batch in lake_events(HOUR, 20).to_batches():
            staged.write(batch)
        if closed:
            staged.finish()
        assert list(Path(lake.events_uri, "_staging").iterdir())
        raise SourceUnavailable("The stream broke off.")


def test_what_was_published_stays_published_when_tidying_up_fails(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 10)
    refuse(monkeypatch, Path, "unlink", "_staging", errno.EROFS)
    assert publish(lake, HOUR, 10).outcome == "unchanged"


def test_a_filesystem_without_hard_links_is_said_so_and_not_tried_again(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, HOUR, 10)
    refuse(monkeypatch, os, "link", "", errno.EOPNOTSUPP)
    with pytest.raises(LakeError, match="hard links") as raised:
        publish(lake, NEXT_DAY, 10)
    assert not raised.value.retryable


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_first_commit_says_so_too_where_there_are_no_hard_links(lake: Lake, tmp_path: Path) -> None:
    program = (
        "import sys; from tests.support.lakes import *; from fraiseql_pipeline.lake import Lake\n"
        f"try: publish(Lake({lake.uri!r}), Window.parse({HOUR.key!r}), 50, 2)\n"
        "except Exception as e: print(e.retryable, e)"
    )
    refused = ["-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EPERM"]
    command = ["strace", "-f", "-qq", *refused, "-o", str(tmp_path / "trace"), sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    if "ptrace" in ran.stderr and ran.returncode:
        pytest.skip("this machine does not allow tracing")
    assert ran.stdout.startswith("False The lake's filesystem makes no hard links"), ran.stdout + ran.stderr
    assert list(Path(lake.events_uri, "_delta_log").iterdir()) == []


@pytest.mark.parametrize("asked", ["published", "newest"])
def test_a_log_that_could_not_be_read_for_a_moment_hides_no_commit_afterwards(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    hours = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(12)]
    for n, hour in enumerate(hours):  # the first ten are behind a checkpoint
        publish(lake, hour, lake_events(hour, 50), settled_pk=n)
    late = lake_events(hours[2], 10, 7)
    publish(lake, hours[2], late, append=True)
    kept, read = Lake(lake.uri), LocalStorage.read

    def failing(storage: LocalStorage, name: str) -> bytes | None:
        if name.endswith("07.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(storage, name)

    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "read", failing)
        with pytest.raises(LakeUnavailable):
            getattr(kept, asked)()
    assert kept.newest() == Lake(lake.uri).newest()
    assert kept.published() == Lake(lake.uri).published()
    with pytest.raises(LakeConflict, match="up to a later event"):
        publish(kept, hours[2], late, settled_pk=PK + 1, append=True)
    assert content(lake, hours[2]).num_rows == 60


def test_a_list_of_files_that_could_not_be_had_for_a_moment_is_whole_afterwards(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hour in (HOUR, Window(HOUR.end, HOUR.size)):
        publish(lake, hour, 50)
    kept, active = Lake(lake.uri), Table._active

    def failing(table: Table, opened: DeltaTable) -> Iterator[File]:
        yield from islice(active(table, opened), 1)
        raise DeltaError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Table, "_active", failing)
        with pytest.raises((DeltaError, LakeUnavailable)):
            kept.snapshot()
    assert kept.snapshot().files == Lake(lake.uri).snapshot().files
