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
from pathlib import Path
from typing import Any

import pytest

from fraiseql_pipeline.errors import LakeError, LakeUnavailable, SourceUnavailable
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import content, publish

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
