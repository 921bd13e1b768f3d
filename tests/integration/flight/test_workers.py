"""The server as a program, in one process or in several: one port, one count, one log, and an orderly end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import FlightUnavailable, PipelineError, SettingsError, SourceRefused
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.fleet import _COUNTS
from fraiseql_pipeline.flight.server import serve
from fraiseql_pipeline.flight.workers import run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import EVERYTHING, HELD, MIDNIGHT, ROWS, hour, publish
from tests.support.counting import get, samples
from tests.support.events import lake_events
from tests.support.servers import Start, processes, workers_of
from tests.support.waiting import eventually


@pytest.fixture
def start(lake_uri: str, tmp_path: Path) -> Iterator[Start]:
    with processes(lake_uri, MIDNIGHT, tmp_path) as start:
        yield start


def read_whole(url: str) -> int:
    with connect(url) as client:
        return client.read(EVERYTHING).num_rows


def test_one_process_shows_metrics_and_stops_being_ready_when_told_to_end(start: Start) -> None:
    process, url, metrics = start()
    assert get(f"{metrics}/readyz")[0] == 200
    with connect(url) as client, client.stream(HELD) as stream:
        rows = next(stream).num_rows
        process.send_signal(signal.SIGTERM)
        eventually(lambda: get(f"{metrics}/readyz")[0] == 503)
        assert get(f"{metrics}/healthz")[0] == 200
        assert rows + stream.read_all().num_rows == ROWS
    assert process.wait(20) == 0


def test_workers_share_a_port_and_their_counts_are_added_up(start: Start, tmp_path: Path) -> None:
    process, url, metrics = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2")
    assert len(workers_of(process)) == 2
    for _ in range(4):  # a connection each; the kernel spreads them
        read_whole(url)
    shown = samples(get(f"{metrics}/metrics")[1])
    assert shown['fraiseql_pipeline_flight_requests_total{code="OK",method="DoGet"}'] == 4
    assert shown["fraiseql_pipeline_flight_rows_total"] == 4 * ROWS
    assert shown["fraiseql_pipeline_watermark_timestamp_seconds"] == hour(0).end.timestamp()
    with pytest.raises(SettingsError, match="another process holds the port"):
        serve(Settings(arrow_flight_bind=url.removeprefix("grpc://")), lake=Lake(str(tmp_path)))

    # One that dies is replaced, the other goes on, and nothing that was counted is lost.
    first, second = workers_of(process)
    first.kill()
    eventually(lambda: len(workers_of(process)) == 2 and first.pid not in {worker.pid for worker in workers_of(process)})
    assert second.is_running()
    eventually(lambda: read_or_none(url) == ROWS)
    after = samples(get(f"{metrics}/metrics")[1])
    assert after["fraiseql_pipeline_flight_rows_total"] >= 5 * ROWS

    # The end: a running stream finishes, and nobody is left.
    with connect(url) as client, client.stream(HELD) as stream:
        rows = next(stream).num_rows
        workers = workers_of(process)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: get(f"{metrics}/readyz")[0] == 503)
        assert rows + stream.read_all().num_rows == ROWS
    assert process.wait(20) == 0
    assert psutil.wait_procs(workers, 10)[1] == []
    assert not list(tmp_path.glob("fraiseql-metrics-*"))


def read_or_none(url: str) -> int | None:
    try:
        return read_whole(url)
    except FlightUnavailable:
        return None


COUNTS = """
import os, struct, sys
from pathlib import Path
import grpc
from fraiseql_pipeline.errors import SettingsError
from fraiseql_pipeline.flight import fleet
from fraiseql_pipeline.flight.edge import METHODS
from fraiseql_pipeline.flight.metrics import Metrics
directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
if "full" in sys.argv:
    made = iter(range(2))
    allocate = os.posix_fallocate
    def full(*rest):
        if next(made, None) is None:
            raise OSError(28, "No space left on device")
        allocate(*rest)
    os.posix_fallocate = full
try:
    fleet._reserve(directory)
    fleet._reserve(directory)
except SettingsError as error:
    print(error, len(list(directory.iterdir())))
    raise SystemExit(0)
metrics = Metrics(METHODS)
metrics.live(1, 1, None)
for method in METHODS:
    for code in grpc.StatusCode:
        metrics.ended(method, code.name, 1.0, sent_bytes=1, rows=1, waited=1.0)
for file in directory.iterdir():
    state = file.stat()
    print(file.name, state.st_size == fleet._COUNTS_BYTES and state.st_blocks * 512 >= state.st_size)
"""


def counted(directory: Path, *rest: str) -> list[str]:
    """What a process says that counts as a worker does."""
    directory.mkdir()
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    ended = subprocess.run(
        [sys.executable, "-c", COUNTS, *rest], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout.splitlines()


def test_all_that_a_worker_may_count_has_its_room_on_the_disk_before(tmp_path: Path) -> None:
    files = [line.rsplit(" ", 1) for line in counted(tmp_path / "counts")]
    assert {name.rsplit("_", 1)[0] for name, _ in files} == set(_COUNTS)
    assert {reserved for _, reserved in files} == {"True"}


def test_a_worker_without_room_for_its_counts_does_not_start_and_leaves_nothing(tmp_path: Path) -> None:
    [said] = counted(tmp_path / "counts", "full")
    assert "make room in the temporary directory" in said
    assert said.endswith(" 0")


def test_workers_that_hang_or_have_ended_are_not_ready(start: Start) -> None:
    process, _, metrics = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2")
    workers = workers_of(process)
    assert get(f"{metrics}/readyz")[0] == 200
    workers[0].suspend()
    assert get(f"{metrics}/readyz")[0] == 503, "half of the connections hang"
    workers[0].resume()
    eventually(lambda: get(f"{metrics}/readyz")[0] == 200)
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers, 10)
    assert get(f"{metrics}/readyz")[0] == 503, "those that replace them have not reported yet"
    eventually(lambda: get(f"{metrics}/readyz")[0] == 200)


@pytest.mark.slow
def test_a_worker_that_replaces_one_does_not_take_a_lake_that_is_gone_for_an_empty_one(start: Start, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    publish(Lake(str(lake)), hour(0), lake_events(hour(0), 5))
    process, url, metrics = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2", FRAISEQL_LAKE_URI=str(lake))
    lake.rename(tmp_path / "elsewhere")
    workers = workers_of(process)
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers, 10)

    def told() -> str:
        try:
            return str(read_whole(url))
        except PipelineError as error:
            return str(error)

    eventually(lambda: "No Flight server answers" not in told())
    assert "was there before and is not there at the moment" in told()
    assert get(f"{metrics}/readyz")[0] == 503
    (tmp_path / "elsewhere").rename(lake)
    assert told() == "5"
    eventually(lambda: get(f"{metrics}/readyz")[0] == 200)


@pytest.mark.slow
def test_no_worker_outlives_its_supervisor(start: Start) -> None:
    process, _, _ = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2")
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    assert psutil.wait_procs(workers, 15)[1] == []


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_a_stream_give_their_clients_an_error_and_are_replaced(start: Start) -> None:
    process, url, _ = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2")
    with connect(url) as client, client.stream(HELD) as stream:
        next(stream)
        killed = workers_of(process)
        for worker in killed:
            worker.kill()
        with pytest.raises(FlightUnavailable):
            stream.read_all()
    eventually(lambda: read_or_none(url) == ROWS)
    assert not {worker.pid for worker in killed} & {worker.pid for worker in workers_of(process)}


@pytest.mark.slow
def test_a_stop_is_heard_while_a_worker_is_being_replaced(start: Start, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(new_token("app", None, ["read"])[1] + "\n")
    process, _, metrics = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2", FRAISEQL_ARROW_FLIGHT_TOKENS_FILE=str(tokens))
    tokens.unlink()
    os.mkfifo(tokens)  # the next worker waits for somebody to write to it, for ever
    before = workers_of(process)
    before[0].kill()
    eventually(lambda: bool({worker.pid for worker in workers_of(process)} - {worker.pid for worker in before}))
    process.send_signal(signal.SIGTERM)
    eventually(lambda: get(f"{metrics}/readyz")[0] == 503)


@pytest.mark.slow
def test_a_stop_before_the_workers_listen_is_an_orderly_end(lake_uri: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "fraiseql_pipeline", "serve"]
    chosen = {
        "FRAISEQL_LAKE_URI": lake_uri,
        "FRAISEQL_ARROW_FLIGHT_BIND": "127.0.0.1:0",
        "FRAISEQL_METRICS_BIND": "off",
        "FRAISEQL_ARROW_FLIGHT_WORKERS": "2",
    }
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(tmp_path), **chosen}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: len(workers_of(process)) == 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_second_signal_ends_the_workers_at_once(start: Start) -> None:
    process, url, metrics = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2", FRAISEQL_ARROW_FLIGHT_DRAIN_SECONDS="3600")
    with flight.connect(url) as client:
        reader = client.do_get(flight.Ticket(HELD))
        reader.read_chunk()
        process.send_signal(signal.SIGTERM)
        eventually(lambda: get(f"{metrics}/readyz")[0] == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_worker_that_cannot_start_is_the_error_of_the_command(lake_uri: str) -> None:
    settings = Settings(
        arrow_flight_bind="127.0.0.1:0",
        metrics_bind="off",
        arrow_flight_workers=2,
        lake_uri=lake_uri,
        arrow_flight_tokens_file="/nowhere/tokens",
    )
    with pytest.raises(SettingsError, match="FRAISEQL_ARROW_FLIGHT_TOKENS_FILE must name files that can be read"):
        run(settings)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_change_log_that_is_refused_for_good_is_the_error_of_the_command(lake_uri: str, database: str, workers: int) -> None:
    settings = Settings(
        arrow_flight_bind="127.0.0.1:0",
        metrics_bind="off",
        arrow_flight_workers=workers,
        lake_uri=lake_uri,
        database_url=database,
    )
    with pytest.raises(SourceRefused, match=r"holds no FraiseQL change log.*set FRAISEQL_ARROW_FLIGHT_LIVE=false") as refused:
        run(settings, started=lambda _: pytest.fail("it does not serve"))
    assert refused.value.exit_code == 3


def test_a_database_that_is_away_for_the_moment_keeps_no_server_from_its_lake(start: Start) -> None:
    process, url, metrics = start(FRAISEQL_DATABASE_URL="postgresql://127.0.0.1:1/app")
    assert get(f"{metrics}/readyz")[0] == 200
    assert read_whole(url) == ROWS
    with connect(url) as client, pytest.raises(FlightUnavailable, match="cannot be followed right now"):
        client.read(start="now", follow=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.slow
def test_the_audit_log_of_all_workers_is_one_file(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    process, url, _ = start(FRAISEQL_ARROW_FLIGHT_WORKERS="2", FRAISEQL_ARROW_FLIGHT_AUDIT_LOG=str(log))
    for _ in range(4):
        read_whole(url)
    log.rename(tmp_path / "rotated.jsonl")
    read_whole(url)
    eventually(log.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    lines = [json.loads(line) for file in ("rotated.jsonl", "audit.jsonl") for line in (tmp_path / file).read_text().splitlines()]
    assert [line["rows"] for line in lines] == [ROWS] * 5
    assert log.stat().st_mode & 0o777 == 0o600
