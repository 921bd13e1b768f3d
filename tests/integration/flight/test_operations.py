"""The server as an operator meets it: metrics and health."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from fraiseql_pipeline.errors import FlightUnavailable, LakeUnavailable, PipelineError, SettingsError
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.client import connect
from fraiseql_pipeline.flight.metrics import LakeState, MetricsServer
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.flight.workers import run
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.integration.flight.conftest import EVERYTHING, HELD, MIDNIGHT, ROWS, hour
from tests.support.counting import get, in_progress, samples
from tests.support.events import lake_events
from tests.support.lakes import publish as publish_rows
from tests.support.waiting import eventually

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
    assert after["fraiseql_pipeline_flight_first_message_seconds_count"] == 4, "once for each stream that was sent"
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


def test_the_time_of_a_call_is_in_its_audit_line(lake_uri: str, start_server: Callable[..., FlightServer], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    server = start_server(Lake(lake_uri), arrow_flight_audit_log=str(log))
    began = time.time()
    with connect(server.url) as client:
        client.info(EVERYTHING)
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert 0 <= line["seconds"] <= time.time() - began
    assert line["at"].endswith("+00:00")
