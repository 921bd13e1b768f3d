from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fraiseql_pipeline.errors import FlightUnavailable
from fraiseql_pipeline.flight import frames as module
from fraiseql_pipeline.flight.frames import FrameStore, Message
from fraiseql_pipeline.flight.presence import ClientGone, Presence


def message(data: bytes, rows: int = 1) -> Message:
    return Message(data, rows)


def drained(store: FrameStore, key: object, *data: bytes) -> list[bytes]:
    """What a reader of a key gets, whose messages are ``data`` if they have to be made."""
    entry = store.open(key, lambda: [message(part) for part in data])
    try:
        return [entry.read(item) for item in entry.items()]
    finally:
        store.release(entry)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FrameStore]:
    with FrameStore(1000, tmp_path) as opened:
        yield opened


def never() -> list[Message]:
    raise AssertionError("made twice")


def test_what_was_made_once_is_read_again_without_being_made(store: FrameStore) -> None:
    assert drained(store, "a", b"one", b"two") == [b"one", b"two"]
    entry = store.open("a", never)
    assert [entry.read(item) for item in entry.items()] == [b"one", b"two"]
    store.release(entry)
    assert (store.figures().hits, store.figures().misses) == (1, 1)


def test_a_reader_gets_each_message_while_the_next_is_being_made(store: FrameStore) -> None:
    allowed = threading.Semaphore(1)

    def make() -> Iterator[Message]:
        for number in range(3):
            assert allowed.acquire(timeout=30)
            yield message(bytes([number]))

    entry = store.open("a", make)
    for number, item in enumerate(entry.items()):
        assert entry.read(item) == bytes([number])
        allowed.release()
    store.release(entry)


def test_readers_that_come_together_share_one_making(store: FrameStore) -> None:
    together = threading.Barrier(8)
    made = []

    def make() -> Iterator[Message]:
        made.append(1)
        for number in range(50):
            yield message(bytes([number]) * 10)

    def read(_: int) -> bytes:
        together.wait(30)
        entry = store.open("a", make)
        content = b"".join(entry.read(item) for item in entry.items())
        store.release(entry)
        return content

    with ThreadPoolExecutor(8) as pool:
        contents = set(pool.map(read, range(8)))
    assert len(made) == 1
    assert contents == {b"".join(bytes([number]) * 10 for number in range(50))}


def test_what_is_kept_stays_within_the_bound_and_the_last_used_stays(store: FrameStore) -> None:
    for key in range(10):
        drained(store, key, b"x" * 300)
        drained(store, 0, b"x" * 300)
    figures = store.figures()
    assert figures.bytes <= 1000
    assert figures.evictions == 7
    assert store.totals_of(0) == (1, 300)
    assert store.totals_of(1) is None


def test_there_are_no_more_entries_than_the_memory_is_meant_for(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    for key in range(5):
        drained(store, key, b"x")
    assert [store.totals_of(key) for key in range(5)] == [None, None, (1, 1), (1, 1), (1, 1)]


def test_a_bound_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    with FrameStore(0, tmp_path) as store:
        assert drained(store, "a", b"one") == [b"one"]
        assert store.figures().entries == 0
        assert [path.name for path in next(tmp_path.iterdir()).iterdir()] == ["lock"]


def test_what_is_being_read_is_not_let_go(store: FrameStore) -> None:
    entry = store.open("a", lambda: [message(b"x" * 900)])
    items = list(entry.items())
    drained(store, "b", b"y" * 900)
    assert entry.read(items[0]) == b"x" * 900
    store.release(entry)
    assert store.figures().bytes <= 1000


def test_a_failure_reaches_every_reader_and_the_next_one_tries_again(store: FrameStore) -> None:
    def make() -> Iterator[Message]:
        yield message(b"one")
        raise ValueError("broken")

    entry = store.open("a", make)
    with pytest.raises(ValueError, match="broken"):
        list(entry.items())
    store.release(entry)
    assert drained(store, "a", b"two") == [b"two"]


def test_a_reader_that_leaves_lets_what_is_small_be_finished_and_ends_the_rest(store: FrameStore) -> None:
    left = threading.Event()

    def make() -> Iterator[Message]:
        yield message(b"one")
        assert left.wait(30)
        yield message(b"two")

    for keep_going in (True, False):
        left.clear()
        entry = store.open(keep_going, make, keep_going=keep_going)
        next(entry.items())
        store.release(entry)
        left.set()
        with entry._grown:
            assert entry._grown.wait_for(lambda entry=entry: entry.complete or entry._error is not None, 30)
        assert entry.complete is keep_going
    assert store.figures().entries == 1


def test_who_comes_while_frames_are_given_up_has_them_made_anew(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    left, deciding, come = threading.Event(), threading.Event(), threading.Event()
    unwanted = module._unwanted

    def make() -> Iterator[Message]:
        yield message(b"a")
        assert left.wait(30)
        yield message(b"b")

    def slowly() -> FlightUnavailable:
        deciding.set()
        assert come.wait(30)
        return unwanted()

    monkeypatch.setattr(module, "_unwanted", slowly)
    entry = store.open("k", make, keep_going=False)
    next(entry.items())
    store.release(entry)
    left.set()
    assert deciding.wait(30)
    later = store.open("k", make, keep_going=False)
    come.set()
    assert [later.read(item) for item in later.items()] == [b"a", b"b"]
    store.release(later)


def test_files_are_open_only_while_somebody_reads(store: FrameStore) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    drained(store, "first", b"x")
    before = descriptors()
    for key in range(5):
        drained(store, key, b"x")
    assert descriptors() == before


def test_what_a_dead_server_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    for name in ("fraiseql-frames-dead", "fraiseql-frames-alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        (tmp_path / name / "1").write_bytes(b"frames")
    # Of another open file description, as another process has.
    with (tmp_path / "fraiseql-frames-alive" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with FrameStore(1000, tmp_path) as store:
            drained(store, "a", b"x")
            assert not (tmp_path / "fraiseql-frames-dead").exists()
            assert (tmp_path / "fraiseql-frames-alive" / "1").exists()


def left(directory: Path) -> Path:
    """What a server that died has left."""
    (directory / "fraiseql-frames-left").mkdir()
    (directory / "fraiseql-frames-left" / "lock").touch()
    return directory / "fraiseql-frames-left"


def test_what_another_user_has_left_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, another, open_file = left(tmp_path), os.geteuid() + 1, os.open
    opened: list[Path] = []

    def seen(path: Path, *rest: int) -> int:
        opened.append(path.parent)
        return open_file(path, *rest)

    monkeypatch.setattr(os, "geteuid", lambda: another)
    monkeypatch.setattr(os, "open", seen)
    with FrameStore(1000, tmp_path) as store:
        drained(store, "a", b"x")
    assert opened
    assert directory not in opened
    assert directory.exists()


@pytest.mark.parametrize("linked", ["lock", "directory"])
def test_a_link_is_not_followed_to_what_is_removed(tmp_path: Path, linked: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    link = tmp_path / "cache" / "fraiseql-frames-link"
    if linked == "directory":
        link.symlink_to(tmp_path / "elsewhere")
    else:
        link.mkdir()
        (link / "lock").symlink_to(tmp_path / "elsewhere" / "lock")
    with FrameStore(1000, tmp_path / "cache") as store:
        drained(store, "a", b"x")
    assert link.exists()


def test_a_lease_on_what_was_left_holds_up_no_start(tmp_path: Path) -> None:
    directory = left(tmp_path)
    lease = "import fcntl, signal, sys; signal.signal(signal.SIGIO, signal.SIG_IGN); file = open(sys.argv[1], 'r+')"
    program = f"{lease}; fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", program, directory / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder, ThreadPoolExecutor(1) as pool, FrameStore(1000, tmp_path) as store:
        if not holder.stdout.readline():
            pytest.skip("this file system has no leases")
        started = pool.submit(drained, store, "a", b"x")
        try:
            # The system breaks a lease after 45 s.
            assert started.result(30) == [b"x"]
        finally:
            holder.kill()


def test_a_closed_store_leaves_no_file(tmp_path: Path) -> None:
    store = FrameStore(1000, tmp_path)
    drained(store, "a", b"x")
    store.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FlightUnavailable, match="is stopping"):
        store.open("a", never)


def test_a_directory_that_cannot_be_written_is_said_without_naming_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with FrameStore(1000, tmp_path / "file") as store, pytest.raises(FlightUnavailable, match="cannot keep frames") as error:
        store.open("a", never)
    assert str(tmp_path) not in str(error.value)


# ------------------------------------------------------------------------------------------------- what somebody removed


def kept(directory: Path) -> list[Path]:
    """The files of entries, by number."""
    return sorted((path for path in directory.glob("fraiseql-frames-*/*") if path.name != "lock"), key=lambda path: int(path.name))


def cut(path: Path) -> None:
    os.truncate(path, 1)


@pytest.mark.parametrize("harm", [Path.unlink, cut, lambda path: shutil.rmtree(path.parent)], ids=["removed", "cut", "directory"])
def test_what_is_not_on_the_disk_any_more_is_made_anew(store: FrameStore, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    drained(store, "a", b"one")
    drained(store, "b", b"two")
    harm(kept(tmp_path)[0])
    for _ in range(2):
        assert drained(store, "a", b"one") == [b"one"]
        assert drained(store, "b", b"two") == [b"two"]
        assert drained(store, harm, b"new") == [b"new"]
    assert store.figures().bytes == 9, "nothing is counted twice"
    assert len(kept(tmp_path)) == 3


def test_a_reader_whose_file_is_cut_gets_an_error_and_the_next_one_the_frames(store: FrameStore, tmp_path: Path) -> None:
    drained(store, "a", b"one")
    first, second = store.open("a", never), store.open("a", never)
    cut(kept(tmp_path)[0])
    [item] = first.items()
    with pytest.raises(FlightUnavailable, match="read again"):
        first.read(item)
    assert drained(store, "a", b"one") == [b"one"], "while the other still holds it"
    store.release(first)
    store.release(second)
    assert store.figures().bytes == 3


def test_a_directory_made_again_is_nobody_elses(tmp_path: Path) -> None:
    with FrameStore(1000, tmp_path) as store:
        before = store.directory()
        shutil.rmtree(before)
        again = store.directory()
        assert again.is_dir()
        with FrameStore(1000, tmp_path) as other:
            other.directory()
            assert again.is_dir(), "another server takes it for one that is used"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ a full disk


class Disk:
    """Takes so many bytes of frames."""

    def __init__(self, directory: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        write = os.pwrite

        def tight(file: int, data: memoryview, offset: int) -> int:
            free = self.room - sum(path.stat().st_size for path in kept(directory))
            if free <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, data[:free], offset)

        monkeypatch.setattr(module.os, "pwrite", tight)


def test_on_a_full_disk_what_nobody_reads_makes_room(store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(tmp_path, 100, monkeypatch)
    for key in range(5):
        assert drained(store, key, b"x" * 40, b"y" * 5) == [b"x" * 40, b"y" * 5]
        assert drained(store, key, b"never") == [b"x" * 40, b"y" * 5]
    assert store.figures().bytes == 90
    assert store.figures().evictions == 3


def test_on_a_full_disk_what_is_read_stays_and_what_does_not_fit_is_an_error(
    store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 100, monkeypatch)
    drained(store, "read", b"x" * 80)
    entry = store.open("read", never)
    with pytest.raises(FlightUnavailable, match="cannot keep frames"):
        drained(store, "a", b"y" * 40)
    assert [entry.read(item) for item in entry.items()] == [b"x" * 80]
    store.release(entry)
    disk.room = 1000
    assert drained(store, "a", b"y" * 40) == [b"y" * 40]


# ------------------------------------------------------------------------------------------------------ readers that leave


def test_a_reader_whose_client_goes_while_it_waits_is_woken(store: FrameStore) -> None:
    waits, allowed = threading.Event(), threading.Event()

    def make() -> Iterator[Message]:
        yield message(b"one")
        waits.set()
        assert allowed.wait(30)
        yield message(b"two")

    gone = Presence()
    leaving, staying = store.open("a", make), store.open("a", never)

    def read() -> None:
        for _ in leaving.items(gone):
            pass

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert waits.wait(30)
        gone.leave()
        with pytest.raises(ClientGone):
            reading.result(30)
        assert not allowed.is_set()
        store.release(leaving)
        allowed.set()
    assert [staying.read(item) for item in staying.items()] == [b"one", b"two"]
    store.release(staying)


def test_what_nobody_waits_for_when_its_turn_comes_is_not_made(tmp_path: Path) -> None:
    allowed, made = threading.Event(), []

    def first() -> Iterator[Message]:
        assert allowed.wait(30)
        yield message(b"first")

    def other(number: int) -> Iterator[Message]:
        made.append(number)
        yield message(b"other")

    with FrameStore(1000, tmp_path, encoders=1) as store:
        entry = store.open("first", first)
        for number in range(50):
            store.release(store.open(number, lambda number=number: other(number)))
        kept_on = store.open("kept on", lambda: other(-1))
        assert len(kept(tmp_path)) == 2, "and costs no file while it would wait"
        allowed.set()
        assert [kept_on.read(item) for item in kept_on.items()] == [b"other"]
        assert made == [-1]
        store.release(entry)
        store.release(kept_on)
        assert store.figures().entries == 2
        assert len(kept(tmp_path)) == 2


def test_closing_tells_readers_and_does_not_wait_for_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.1)
    begun, allowed, ended = threading.Event(), threading.Event(), threading.Event()

    def hangs() -> Iterator[Message]:
        yield message(b"one")
        begun.set()
        assert allowed.wait(30)
        ended.set()
        yield message(b"two")

    store = FrameStore(1000, tmp_path, encoders=1)
    hanging, queued = store.open("a", hangs), store.open("b", never)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(hanging.items()))
        assert begun.wait(30)
        store.close()
        with pytest.raises(FlightUnavailable, match="is stopping"):
            reading.result(30)
    with pytest.raises(FlightUnavailable, match="is stopping"):
        list(queued.items())
    store.release(hanging)
    store.release(queued)
    assert list(tmp_path.iterdir()) == []
    assert not ended.is_set()
    allowed.set()
    store._encoders.join(30)
    assert ended.is_set()
    assert hanging._file == queued._file == -1


def test_memory_is_given_back_when_much_was_made_and_nothing_is_being_made(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[bool] = []
    monkeypatch.setattr(module.memory, "give_back", lambda: times.append(slow.complete))
    begun, allowed = threading.Event(), threading.Event()

    def slowly() -> Iterator[Message]:
        begun.set()
        assert allowed.wait(30)
        yield message(b"slow")

    slow = store.open("slow", slowly)
    assert begun.wait(30)
    much = store.open("much", lambda: [message(b"much", module.TIDY_ROWS)])
    assert len(list(much.items())) == 1
    store.release(much)
    allowed.set()
    assert len(list(slow.items())) == 1
    store.release(slow)
    drained(store, "little", b"little")
    store.close()  # waits for the threads that fill
    assert times == [True]
