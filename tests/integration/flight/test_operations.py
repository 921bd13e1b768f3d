"""The server as an operator meets it: metrics, health, several workers, an orderly end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from pyarrow import flight

from fraiseql_pipeline.errors import FlightUnavailable, LakeUnavailable, PipelineError, SettingsError, SourceRefused
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.metrics import LakeState, MetricsServer
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.flight.workers import _COUNTS, run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import MIDNIGHT, hour, publish
from tests.integration.flight.test_limits import HELD, eventually, in_progress
from tests.support.events import lake_events
from tests.support.lakes import publish as publish_rows

ROWS = 200_000
EVERYTHING = "events:*:2026-11-01:2026-11-01T01:00:00:1000"
PROGRAM = """
from fraiseql_pipeline.flight.workers import _COUNTS, run
from fraiseql_pipeline.settings import Settings
if __name__ == "__main__":
    run(Settings(), started=lambda where: print(where.url, where.metrics_url, flush=True))
"""


@pytest.fixture(scope="module")
def lake_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("operations") / "lake")
    publish(Lake(uri), hour(0), lake_events(hour(0), ROWS))
    return uri


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    """Series → value, of the exposition format."""
    return {series: float(value) for series, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


# -------------------------------------------------------------------------------------------------------------- metrics


def test_every_metric_that_is_shown_moves(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    token, line = new_token("ada", None, ["read"])
    (tmp_path / "tokens").write_text(line)
    server = start_server(
        Lake(lake_uri),
        arrow_flight_tokens_file=str(tmp_path / "tokens"),
        arrow_flight_stall_seconds=0.3,
        arrow_flight_cache_bytes=20_000_000,
    )
    with ExitStack() as stack:
        shown = MetricsServer("127.0.0.1:0", [server.metrics.registry], lambda: True)
        stack.callback(shown.close)
        code, text = get(f"{shown.url}/metrics")
        assert code == 200
        before = samples(text)
        with connect(server.url, token=token) as client:
            for _ in range(2):
                client.read(start=hour(0).start, end=hour(0).end, codec="zstd")
            kept = samples(get(f"{shown.url}/metrics")[1])
            assert kept["fraiseql_pipeline_flight_frames_bytes"] > 0
            client.read(start=hour(0).start, end=hour(0).end, codec="none")  # more than the cache holds
            with connect(server.url) as stranger, pytest.raises(PipelineError):
                stranger.read(EVERYTHING)
            stream = client.stream(HELD)
            next(stream)
            during = samples(get(f"{shown.url}/metrics")[1])
            assert during["fraiseql_pipeline_flight_streams_in_progress"] == 1
            eventually(lambda: in_progress(server) == 0)  # cut: nobody reads
            with pytest.raises(FlightUnavailable):
                stream.read_all()
        after = samples(get(f"{shown.url}/metrics")[1])
    assert after["fraiseql_pipeline_flight_streams_in_progress"] == 0
    assert after["fraiseql_pipeline_flight_rows_total"] > ROWS
    assert after['fraiseql_pipeline_flight_requests_total{code="OK",method="DoGet"}'] == 3
    assert after['fraiseql_pipeline_flight_requests_total{code="UNAUTHENTICATED",method="DoGet"}'] == 1
    assert after['fraiseql_pipeline_flight_auth_failures_total{reason="missing"}'] == 1
    assert after['fraiseql_pipeline_flight_streams_cut_total{reason="stalled"}'] == 1
    assert after["fraiseql_pipeline_flight_stalled_seconds_total"] > 0.2
    families = {re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", series) for series in before}
    still = {
        family
        for family in families
        if not family.endswith(("streams_in_progress", "frames_bytes"))  # gauges: seen above, and back where they were
        and not family.endswith("uploaded_rows_total")  # test_uploads.py
        and not family.startswith("fraiseql_pipeline_live_")  # test_live.py
        and all(after[series] == value for series, value in before.items() if series.startswith(family))
        and not any(series.startswith(family) for series in set(after) - set(before))
    }
    assert still == set(), "shown, and never moved"
    assert not any(series.endswith("_created") for series in after)


def of_lake(state: LakeState) -> dict[str, float]:
    """What the lake says, each without the prefix, and its label if it has one."""
    return {
        "/".join((sample.name.removeprefix("fraiseql_pipeline_"), *sample.labels.values())): sample.value
        for metric in state.collect()
        for sample in metric.samples
        if "build_info" not in sample.name
    }


NOTHING = {"windows/sealed": 0, "windows/provisional": 0, "holes": 0, "rows/accepted": 0, "rows/quarantined": 0, "late_rows": 0}


def test_every_metric_of_the_lake_moves_with_its_commits(lake: Lake) -> None:
    state = LakeState(lake, Settings(start=MIDNIGHT))
    assert of_lake(state) == NOTHING
    assert state.ready()
    publish_rows(lake, hour(0), 5, settled_pk=1)
    publish_rows(lake, hour(2), 3, 2, state="provisional")
    reach = {
        "watermark_timestamp_seconds": hour(2).end.timestamp(),
        "complete_through_timestamp_seconds": hour(0).end.timestamp(),
    }
    rows = {"rows/accepted": 8, "rows/quarantined": 2, "late_rows": 0, "quarantine_rows/entity_id:uuid": 2}
    assert of_lake(state) == {"windows/sealed": 1, "windows/provisional": 1, "holes": 1, **reach, **rows}
    publish_rows(lake, hour(0), lake_events(hour(0), 5, seed=1), 1, append=True)
    publish_rows(lake, hour(1), 1)
    publish_rows(lake, hour(2), 3, 2)
    reach["complete_through_timestamp_seconds"] = hour(2).end.timestamp()
    rows = {"rows/accepted": 14, "rows/quarantined": 3, "late_rows": 6, "quarantine_rows/entity_id:uuid": 3}
    assert of_lake(state) == {"windows/sealed": 3, "windows/provisional": 0, "holes": 0, **reach, **rows}
    shown = {name.partition("/")[0] for name in of_lake(state)}
    assert shown == LakeState.described().keys() - {"build_info"}, "shown, and never moved"


def test_windows_that_are_missing_from_the_start_on_are_holes(lake: Lake) -> None:
    publish_rows(lake, hour(3), 1)
    shown = of_lake(LakeState(lake, Settings(start=MIDNIGHT)))
    assert (shown["holes"], shown["complete_through_timestamp_seconds"]) == (3, MIDNIGHT.timestamp())
    shown = of_lake(LakeState(lake, Settings()))
    assert (shown["holes"], shown["complete_through_timestamp_seconds"]) == (0, hour(3).end.timestamp())


def test_a_lake_that_cannot_be_read_is_not_ready(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> None:
        raise LakeUnavailable("The storage did not answer.")

    state = LakeState(lake, Settings())
    shown = MetricsServer("127.0.0.1:0", [], state.ready)
    assert get(f"{shown.url}/readyz") == (200, "ready\n")
    monkeypatch.setattr(Lake, "published", unavailable)
    assert get(f"{shown.url}/readyz") == (503, "not ready\n")
    assert of_lake(state) == {}, "nothing is known, which is not 0"
    assert get(f"{shown.url}/healthz") == (200, "ok\n")
    assert get(f"{shown.url}/../../etc/passwd")[0] == 404
    shown.close()


@pytest.mark.parametrize("instead", ["nothing", "a file"])
@pytest.mark.parametrize("gone", [".", "events", "events/_delta_log"])
def test_a_lake_that_is_gone_is_not_ready_until_it_is_back(lake: Lake, tmp_path: Path, gone: str, instead: str) -> None:
    publish_rows(lake, hour(0), 1)
    place, elsewhere = (Path(lake.uri) / gone).resolve(), tmp_path / "elsewhere"
    state = LakeState(Lake(lake.uri), Settings())
    assert state.ready()
    place.rename(elsewhere)
    if instead == "a file":
        place.touch()
    assert not state.ready()
    assert of_lake(state) == {}
    place.unlink(missing_ok=True)
    elsewhere.rename(place)
    assert state.ready()
    assert of_lake(state)["rows/accepted"] == 1


def test_metrics_that_cannot_be_shown_stop_the_start(lake_uri: str) -> None:
    first = MetricsServer("127.0.0.1:0", [], lambda: True)
    with pytest.raises(SettingsError, match="choose another FRAISEQL_METRICS_BIND, or off"):
        run(Settings(arrow_flight_bind="127.0.0.1:0", metrics_bind=f"127.0.0.1:{first.port}", lake_uri=lake_uri, start=MIDNIGHT))
    first.close()


# --------------------------------------------------------------------------------------------------------------- health


def test_probes_need_no_credential(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(new_token("ada", None, ["read"])[1])
    server = start_server(Lake(lake_uri), arrow_flight_tokens_file=str(tmp_path / "tokens"))
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        check = channel.unary_unary(f"/{protocol.HEALTH_SERVICE}/Check")
        for name in ("", protocol.SERVICE):
            answer = check(protocol.HealthCheckRequest(service=name).SerializeToString())
            assert protocol.HealthCheckResponse.FromString(answer).status == protocol.SERVING
        for request in (protocol.HealthCheckRequest(service="x").SerializeToString(), b"\xff\xff"):
            with pytest.raises(grpc.RpcError) as unknown:
                check(request)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream(f"/{protocol.HEALTH_SERVICE}/Watch")
        with pytest.raises(grpc.RpcError) as refused:
            list(watch(b""))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_stock_health_client_understands_the_answer(server: FlightServer) -> None:
    health = pytest.importorskip("grpc_health.v1.health_pb2")
    from grpc_health.v1.health_pb2_grpc import HealthStub

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        answer = HealthStub(channel).Check(health.HealthCheckRequest())
    assert answer.status == health.HealthCheckResponse.SERVING


# -------------------------------------------------------------------------------------------------------------- workers

Start = Callable[..., tuple["subprocess.Popen[str]", str, str]]


@pytest.fixture
def start(lake_uri: str, tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run_program(**environment: str) -> tuple[subprocess.Popen[str], str, str]:
        chosen = {
            "FRAISEQL_LAKE_URI": lake_uri,
            "FRAISEQL_START": MIDNIGHT.isoformat(),
            "FRAISEQL_ARROW_FLIGHT_BIND": "127.0.0.1:0",
            "FRAISEQL_METRICS_BIND": "127.0.0.1:0",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "TMPDIR": str(tmp_path),
            **environment,
        }
        running.append(
            subprocess.Popen([sys.executable, str(program)], env=chosen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        assert running[-1].stdout is not None
        url, metrics_url = running[-1].stdout.readline().split()
        return running[-1], url, metrics_url

    yield run_program
    for process in running:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in [*children, process]:
            child.kill()
        process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


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
from fraiseql_pipeline.flight import workers
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
    workers._reserve(directory)
    workers._reserve(directory)
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
    print(file.name, state.st_size == workers._COUNTS_BYTES and state.st_blocks * 512 >= state.st_size)
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


def test_the_time_of_a_call_is_in_its_audit_line(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    server = start_server(Lake(lake_uri), arrow_flight_audit_log=str(log))
    began = time.time()
    with connect(server.url) as client:
        client.info(EVERYTHING)
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert 0 <= line["seconds"] <= time.time() - began
    assert line["at"].endswith("+00:00")
