"""Threads that the end of the process does not wait for do what threads of a pool do."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fraiseql_pipeline.flight.threads import Threads

ENDS = """
import threading
from fraiseql_pipeline.flight.threads import Threads
threads, begun = Threads(2, "hangs"), threading.Event()
def hang():
    begun.set()
    threading.Event().wait()
threads.submit(hang)
begun.wait()
threads.shutdown(wait=False)
print("over")
"""


def test_work_is_done_by_so_many_threads_and_no_more() -> None:
    threads, together, names = Threads(3, "some"), threading.Barrier(3), set()

    def work(number: int) -> int:
        names.add(threading.current_thread().name)
        if number < 3:
            together.wait(30)  # three at a time
        return number * number

    done = [threads.submit(work, number) for number in range(100)]
    assert [future.result(30) for future in done] == [number * number for number in range(100)]
    assert names == {"some_0", "some_1", "some_2"}
    threads.shutdown()


def test_what_work_raises_is_told_and_costs_no_thread() -> None:
    threads = Threads(1, "raises")
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(30)
    assert threads.submit(divmod, 7, 2).result(30) == (3, 1)
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(int)


def test_shutting_down_cancels_what_was_not_begun() -> None:
    threads, allowed, begun = Threads(1, "cancelled"), threading.Event(), threading.Event()

    def first() -> int:
        begun.set()
        assert allowed.wait(30)
        return 1

    running, waiting = threads.submit(first), [threads.submit(int) for _ in range(5)]
    assert begun.wait(30)
    threads.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    allowed.set()
    assert running.result(30) == 1
    threads.join(30)
    assert not any(thread.is_alive() for thread in threads._threads)


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", ENDS], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("over\n", "")


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_more_threads_can_be_started_work_waits_for_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, allowed, begun = Threads(20, "short"), threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert allowed.wait(30)

    running = threads.submit(first)
    assert begun.wait(30)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        waiting = [threads.submit(first) for _ in range(5)] + [threads.submit(int) for _ in range(10)]
        allowed.set()
        assert [future.result(30) for future in waiting[5:]] == [0] * 10
    assert running.result(30) is None
    # Once they can be started again, there are as many as ever.
    together = threading.Barrier(20)
    for future in [threads.submit(together.wait, 30) for _ in range(20)]:
        future.result(30)
    assert len({thread.name for thread in threads._threads}) == 20
    threads.shutdown()


def test_work_that_waits_since_no_thread_could_be_started_gets_one_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, together = Threads(20, "later"), threading.Barrier(11)
    held = [threads.submit(together.wait, 30) for _ in range(5)]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        held += [threads.submit(together.wait, 30) for _ in range(5)]
    held.append(threads.submit(together.wait, 30))
    assert sorted(future.result(30) for future in held) == list(range(11))
    threads.shutdown()
