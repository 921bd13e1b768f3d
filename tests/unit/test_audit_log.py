"""The audit log: nothing that happens to it is a call's business, and its lines stay whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fraiseql_pipeline.flight.audit import AuditLog

#: Writes two lines with stderr wherever it is, and says on stdout that nothing was raised.
TO_STDERR = """
from fraiseql_pipeline.flight.audit import AuditLog
log = AuditLog("stderr")
log.write(call="a")
log.write(call="b")
log.close()
print("over")
"""
ROOT = Path(__file__).parents[2]


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_go_to_stderr_whole() -> None:
    ended = subprocess.run([sys.executable, "-c", TO_STDERR], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line) for line in ended.stderr.splitlines()] == [{"call": "a"}, {"call": "b"}]


def test_a_full_disk_behind_stderr_fails_no_call() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", TO_STDERR], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=60, check=True
        )
    assert ended.stdout == b"over\n"


def test_a_closed_pipe_behind_stderr_fails_no_call() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = subprocess.run(
            [sys.executable, "-c", TO_STDERR], cwd=ROOT, stdout=subprocess.PIPE, stderr=gone, timeout=60, check=True
        )
    assert ended.stdout == b"over\n"


def test_a_process_without_stderr_serves_without_an_audit_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log = AuditLog("stderr")
    log.write(call="a")
    log.close()


def test_a_line_that_the_system_takes_in_parts_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:7]))
    log = AuditLog(str(tmp_path / "audit"))
    log.write(call="a" * 50)
    log.write(call="b")
    log.close()
    assert lines(tmp_path / "audit") == [{"call": "a" * 50}, {"call": "b"}]


def test_a_line_that_a_full_disk_cuts_costs_no_other_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, write = 10, os.write

    def until_full(file: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= (taken := write(file, bytes(data)[:room]))
        return taken

    log = AuditLog(str(tmp_path / "audit"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", until_full)
        for name in ("cut", "lost", "lost too"):
            log.write(call=name)
    log.write(call="b")
    log.write(call="c")
    log.close()
    cut, *rest = (tmp_path / "audit").read_text().splitlines()
    assert cut == '{"call": "'
    assert [json.loads(line) for line in rest] == [{"call": "b"}, {"call": "c"}]
    assert {record.getMessage() for record in caplog.records} == {"the audit log cannot be written: No space left on device"}


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    log = AuditLog(str(tmp_path / "audit"))
    threads = [threading.Thread(target=lambda n=n: [log.write(call=f"{n}") for _ in range(100)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(lines(tmp_path / "audit")) == 400


def test_what_no_line_can_hold_fails_no_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(str(tmp_path / "audit"))
    log.write(call=object())
    log.close()
    assert [record.getMessage() for record in caplog.records] == ["the audit log cannot be written: TypeError"]
