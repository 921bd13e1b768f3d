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
