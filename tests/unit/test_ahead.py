"""Rules of the thread that works ahead of the encoder."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from fraiseql_pipeline.ahead import ahead


def numbers(upto: int, fail_at: int | None = None) -> Generator[int]:
    for number in range(upto):
        if number == fail_at:
            raise OSError("the source broke")
        yield number


def ahead_threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_items_arrive_in_order_and_whole() -> None:
    with ahead(nullcontext(numbers(100)), iter, 2) as items:
        assert list(items) == list(range(100))


def test_an_error_is_raised_where_its_item_would_have_come() -> None:
    seen = []
    with pytest.raises(OSError, match="the source broke"), ahead(nullcontext(numbers(10, fail_at=3)), iter, 1) as items:
        seen.extend(iter(lambda: next(items), None))
    assert seen == [0, 1, 2]


def test_the_thread_is_never_further_ahead_than_its_depth() -> None:
    produced: list[int] = []
    third = threading.Event()

    def counted() -> Generator[int]:
        for number in range(50):
            produced.append(number)
            if number == 3:
                third.set()
            yield number

    with ahead(nullcontext(counted()), iter, 2) as items:
        assert next(items) == 0
        assert third.wait(10), "with one item taken and two waiting, the fourth is being produced"
        assert produced == [0, 1, 2, 3]


def test_a_signal_in_the_middle_of_starting_the_thread_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "ahead":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), ahead(nullcontext(numbers(1000)), iter, 1):
        raise AssertionError("it was not begun")
    assert ahead_threads() == 0


def test_leaving_early_stops_the_thread_and_closes_its_source() -> None:
    closed = threading.Event()

    def endless() -> Generator[int]:
        try:
            yield from iter(int, 1)
        finally:
            closed.set()

    with ahead(nullcontext(endless()), iter, 1) as items:
        next(items)
    assert closed.is_set()
    assert ahead_threads() == 0


def test_a_source_that_says_nothing_holds_nobody_up_who_leaves() -> None:
    ended = threading.Event()

    @contextmanager
    def silent() -> Iterator[Generator[int]]:
        def numbers() -> Generator[int]:
            yield 0
            assert ended.wait(60), "the source is closed before its reader is waited for"

        try:
            yield numbers()
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt), ahead(silent(), iter, 1) as items:
        next(items)
        raise KeyboardInterrupt
    assert ahead_threads() == 0
