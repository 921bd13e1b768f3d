"""Writers that die, disks that fill, and the order in which things reach the disk."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fraiseql_pipeline.errors import LakeUnavailable
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, assert_plain_protocol, content, publish, quarantine_events, rejected

HOUR = Window.parse("2026-11-01-13:00")
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.lakes"])
CALLS = ("fsync", "link", "rename", "unlink", "stat")
BEFORE = (300, 4)
AFTER = (320, 6)


def replace_and_die(uri: str, step: int) -> None:
    """Replace the window, and die right before the ``step``-th system call of those that matter."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    publish(Lake(uri), HOUR, lake_events(HOUR, AFTER[0], 1), quarantine_events(HOUR, AFTER[1], 1), settled_pk=PK + 1)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_leaves_a_whole_table_and_the_retry_is_right(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    publish(Lake(str(sound)), HOUR, *BEFORE)
    step, killed = 0, 0
    while True:
        step += 1
        lake = Lake(str(tmp_path / f"step-{step}"))
        shutil.copytree(sound, lake.uri)
        child = PROCESSES.Process(target=replace_and_die, args=(lake.uri, step))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        killed += 1
        assert content(lake, HOUR).equals(lake_events(HOUR, BEFORE[0])) or content(lake, HOUR).equals(
            lake_events(HOUR, AFTER[0], 1)
        )
        assert {f.kind for f in lake.fsck()} <= {"leftover", "pair"}

        retry = publish(
            Lake(lake.uri), HOUR, lake_events(HOUR, AFTER[0], 1), quarantine_events(HOUR, AFTER[1], 1), settled_pk=PK + 2
        )

        assert retry.outcome in {"replaced", "unchanged"}
        assert content(lake, HOUR).equals(lake_events(HOUR, AFTER[0], 1))
        assert rejected(lake, HOUR).num_rows == AFTER[1]
        assert {f.kind for f in lake.fsck()} <= {"leftover"}
        lake.fsck(repair=True)
        assert lake.fsck() == []
        assert_plain_protocol(lake)
        shutil.rmtree(lake.uri)
    assert killed >= 20


def publish_for_ever(uri: str, started: Any) -> None:
    """Generation after generation of one window, each with a settled pk of its own."""
    lake = Lake(uri)
    generation = lake.published()[HOUR].settled_pk - PK
    while True:
        generation += 1
        publish(lake, HOUR, lake_events(HOUR, 300, generation), quarantine_events(HOUR, 4, generation), settled_pk=PK + generation)
        started.set()


def test_a_writer_killed_at_any_moment_leaves_one_generation_whole(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    publish(lake, HOUR, lake_events(HOUR, 300, 0), quarantine_events(HOUR, 4, 0), settled_pk=PK)
    moments = random.Random(4)
    seen = set()
    for _ in range(25):
        started = PROCESSES.Event()
        child = PROCESSES.Process(target=publish_for_ever, args=(lake.uri, started))
        child.start()
        assert started.wait(60)
        child.join(moments.uniform(0, 0.05))  # a generation takes about as long
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        read = Lake(lake.uri)
        generation = read.published()[HOUR].settled_pk - PK
        seen.add(generation)
        assert content(read, HOUR).equals(lake_events(HOUR, 300, generation))
        assert {found.kind for found in read.fsck()} <= {"leftover", "pair"}
    assert len(seen) == 25, "every writer got somewhere: the retry after each kill was right"


def test_data_reaches_the_disk_before_its_entry_and_the_entry_before_its_number(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, HOUR, *BEFORE)
    steps: list[tuple[str, str]] = []
    fsync, link, rename = os.fsync, os.link, os.rename

    def short(path: Any) -> str:
        name = os.fspath(path).removeprefix(str(Path(lake.uri)))
        return re.sub(
            r"window-[^/]*parquet", "data", re.sub(r"\.?\d{20}\.json(\.\w+\.tmp)?", lambda m: "aside" if m[1] else "entry", name)
        )

    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append(("fsync", short(Path(f"/proc/self/fd/{fd}").readlink()))), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "link", lambda a, b: (steps.append(("link", short(b))), link(a, b))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append(("rename", short(b))), rename(a, b))[1])
    publish(lake, HOUR, lake_events(HOUR, AFTER[0], 1), quarantine_events(HOUR, AFTER[1], 1))

    def committed(table: str) -> list[tuple[str, str]]:
        return [
            ("rename", f"/{table}/event_date=2026-11-01/data"),
            ("fsync", f"/{table}/event_date=2026-11-01"),
            ("fsync", f"/{table}/_delta_log/aside"),
            ("link", f"/{table}/_delta_log/entry"),
            ("fsync", f"/{table}/_delta_log"),
        ]

    assert steps == [
        ("fsync", "/events/_staging/data"),
        ("fsync", "/events_quarantine/_staging/data"),
        *committed("events_quarantine"),
        *committed("events"),
    ]

    steps.clear()
    publish(lake, Window(HOUR.start + timedelta(days=1), HOUR.size), *BEFORE)
    for table in ("events_quarantine", "events"):
        link = steps.index(("link", f"/{table}/_delta_log/entry"))
        assert ("fsync", f"/{table}") in steps[:link], "the first window of a day makes a directory"


def test_a_new_lake_is_durable_with_every_directory_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1])
    publish(Lake(str(tmp_path / "made" / "by us" / "lake")), HOUR, 10, 2)
    first = next(at for at, name in enumerate(synced) if re.search(r"\d{20}\.json\.\w+\.tmp", name))
    above = {str(tmp_path / path) for path in (".", "made", "made/by us", "made/by us/lake")}
    assert above <= set(synced[:first]), "before the first window gets its number"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_kernel_sees_every_fsync_before_the_commit_returns(lake: Lake, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    program = (
        "import sys; from tests.support.lakes import *; from fraiseql_pipeline.lake import Lake\n"
        f"publish(Lake({lake.uri!r}), Window.parse({HOUR.key!r}), 50, 2); print('done', flush=True)"
    )
    traced = "trace=fsync,linkat,link,rename,renameat,write"
    command = ["strace", "-f", "-qq", "-y", "-e", traced, "-o", str(trace), sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    if "ptrace" in ran.stderr and ran.returncode:
        pytest.skip("this machine does not allow tracing")
    assert ran.returncode == 0, ran.stderr
    lines = trace.read_text().splitlines()
    acknowledged = next(i for i, line in enumerate(lines) if "write(1<" in line and '"done' in line)

    def last(pattern: str) -> int:
        return max(i for i, line in enumerate(lines[:acknowledged]) if re.search(pattern, line))

    for table in ("events", "events_quarantine"):
        root = f"/{table}/"
        data = last(rf"fsync\(\d+<[^>]*{root}_staging/window")
        linked = last(rf"link(at)?\(.*{root}_delta_log/0+1\.json")
        assert data < last(rf"rename\w*\(.*{root}event_date") < last(rf"fsync\(\d+<[^>]*{root}event_date=[\d-]+>") < linked
        assert last(rf"fsync\(\d+<[^>]*{root}_delta_log/\.") < linked < last(rf"fsync\(\d+<[^>]*{root}_delta_log>")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small filesystem needs root and a kernel that allows it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free", [0, 4, 40, 120, 200, 400], ids=lambda k: f"{k} kB free")
def test_a_full_disk_is_one_sentence_and_the_run_after_it_succeeds(small_disk: Path, free: int) -> None:
    lake = Lake(str(small_disk / "lake"))
    publish(lake, HOUR, *BEFORE)
    ballast = small_disk / "ballast"
    room = os.statvfs(small_disk)
    ballast.write_bytes(bytes(max(room.f_bavail * room.f_frsize - free * 1024, 0)))
    big = lake_events(HOUR, 5_000, 1)

    with pytest.raises(LakeUnavailable, match="No space left"):
        publish(lake, HOUR, big, settled_pk=PK + 1)

    assert content(lake, HOUR).equals(lake_events(HOUR, BEFORE[0]))
    ballast.unlink()
    assert publish(lake, HOUR, big, settled_pk=PK + 1).outcome == "replaced"
    assert content(lake, HOUR).equals(big)
    assert {f.kind for f in lake.fsck()} <= {"leftover"}
