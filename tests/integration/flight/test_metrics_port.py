"""The metrics port answers whoever hangs: clients that send slowly, and a storage that does not answer."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fraiseql_pipeline.flight import metrics as module
from fraiseql_pipeline.flight.metrics import LakeState, MetricsServer
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import hour, publish
from tests.support.counting import get
from tests.support.events import lake_events
from tests.support.waiting import eventually


@pytest.fixture
def show() -> Iterator[Callable[..., MetricsServer]]:
    """Show a page; ``ready`` says what ``/readyz`` does."""
    with ExitStack() as stack:

        def shown(ready: Callable[[], bool] = lambda: True) -> MetricsServer:
            server = MetricsServer("127.0.0.1:0", [], ready)
            stack.callback(server.close)
            return server

        yield shown


def begun(server: MetricsServer) -> socket.socket:
    """A request that has begun and does not end."""
    opened = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    opened.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
    return opened


def answering() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_a_request_that_comes_a_byte_at_a_time_is_ended(
    show: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HTTP_SECONDS", 0.3)
    with begun(show()) as slow:
        slow.settimeout(0.02)
        with pytest.raises(ConnectionError):
            while True:
                slow.sendall(b"a")  # never silent for as long as a request may take
                try:
                    if not slow.recv(1_000):
                        raise ConnectionError
                except TimeoutError:
                    continue


def test_however_many_connections_hang_a_probe_is_answered_by_a_bounded_number_of_threads(
    show: Callable[..., MetricsServer],
) -> None:
    server = show()
    before = answering()
    with ExitStack() as stack:
        for _ in range(3 * module._HTTP_REQUESTS):
            stack.enter_context(begun(server))
        assert get(f"{server.url}/healthz") == (200, "ok\n")
        assert answering() - before <= module._HTTP_REQUESTS
    eventually(lambda: answering() == before)


def test_a_storage_that_hangs_holds_one_thread_and_is_not_ready_once_the_last_look_is_old(
    lake: Lake, show: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(lake, hour(0), lake_events(hour(0), 5))
    goes_on, looks, published = threading.Event(), 0, Lake.published

    def hangs(self: Lake) -> object:
        nonlocal looks
        looks += 1
        goes_on.wait()
        return published(self)

    state = LakeState(lake, Settings())
    server = show(state.ready)
    assert get(f"{server.url}/readyz")[0] == 200
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(Lake, "published", hangs)
    assert {get(f"{server.url}/readyz")[0] for _ in range(20)} == {200}, "what the last look found is young"
    monkeypatch.setattr(module, "_OLD_SECONDS", 0.0)
    assert {get(f"{server.url}/readyz")[0] for _ in range(20)} == {503}
    assert [metric.name for metric in state.collect() if metric.samples] == ["fraiseql_pipeline_build_info"]
    assert looks == 1
    assert sum(thread.name == "lake-look" for thread in threading.enumerate()) == 1
    monkeypatch.setattr(module, "_OLD_SECONDS", 10.0)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 10.0)
    goes_on.set()
    eventually(lambda: get(f"{server.url}/readyz")[0] == 200 and looks > 1)


def test_what_a_look_fails_of_is_not_kept(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Lake) -> None:
        raise RuntimeError("nobody thought of it")

    state = LakeState(lake, Settings())
    assert state.ready()
    with monkeypatch.context() as patched:
        patched.setattr(Lake, "published", fails)
        assert not state.ready()
    assert state.ready()


@pytest.mark.parametrize(
    ("path", "ready", "code"), [("/healthz", False, 200), ("/readyz", True, 200), ("/readyz", False, 503), ("/metrics", True, 200)]
)
def test_a_probe_that_wants_no_body_gets_the_answer_without_it(
    show: Callable[..., MetricsServer], path: str, ready: bool, code: int
) -> None:
    port = show(lambda: ready).port
    said = []
    for method in ("HEAD", "GET"):
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        asking.request(method, path)
        answer = asking.getresponse()
        said.append((answer.status, answer.getheader("Content-Length"), answer.getheader("Content-Type")))
        assert len(answer.read()) == (0 if method == "HEAD" else int(answer.getheader("Content-Length") or 0))
        asking.close()
    assert said[0] == said[1]
    assert said[0][0] == code
