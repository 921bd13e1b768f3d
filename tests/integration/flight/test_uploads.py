"""Rules of DoPut: what is taken is in the change log, whole batches of sound events, once; everything else is refused and leaves nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import flight

from fraiseql_pipeline import pipeline
from fraiseql_pipeline.changelog import open_changelog
from fraiseql_pipeline.encoding import to_wire, wire_schema
from fraiseql_pipeline.event import EVENT_SCHEMA
from fraiseql_pipeline.flight import protocol
from fraiseql_pipeline.flight.auth import new_token
from fraiseql_pipeline.flight.incoming import MAX_BATCH_BYTES
from fraiseql_pipeline.flight.server import FlightServer, serve
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from tests.conftest import new_database
from tests.integration.flight.conftest import MIDNIGHT, hour
from tests.support.events import TENANTS
from tests.support.uploads import EVENTS, SENT, sent


@dataclass(frozen=True, slots=True)
class Intake:
    """A server that takes uploads into the change log of ``url``."""

    server: FlightServer
    client: flight.FlightClient
    url: str
    settings: Settings

    def held(self, columns: str = "count(*)") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url) as connection:
            return connection.execute(f"SELECT {columns} FROM core.tb_entity_change_log").fetchall()

    def put(self, *batches: pa.RecordBatch, options: Any = None, descriptor: Any = EVENTS) -> list[dict[str, int]]:
        """Each batch is answered before the next one is sent."""
        writer, answers = self.client.do_put(descriptor, batches[0].schema, options)
        said = []
        with writer:
            for batch in batches:
                writer.write_batch(batch)
                answer = answers.read()
                if answer is None:  # the server has ended the call: closing the writer says why
                    break
                said.append(json.loads(answer.to_pybytes()))
        return said

    def refused(self, batch: pa.RecordBatch, **how: Any) -> str:
        """The sentence with which a batch is refused; nothing of it is in the log."""
        with pytest.raises((pa.ArrowException, flight.FlightError, NotImplementedError)) as refused:
            self.put(batch, **how)
        assert self.held() == [(0,)]
        return str(refused.value)


@pytest.fixture(scope="module")
def running(postgres: str, contract_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    lake = str(tmp_path_factory.mktemp("uploads") / "lake")
    with new_database(postgres, contract_template) as (_, url):
        settings = Settings(
            arrow_flight_bind="127.0.0.1:0",
            arrow_flight_uploads=True,
            database_url=url,
            lake_uri=lake,
            start=MIDNIGHT,
            seal_timeout_seconds=0,
        )
        with serve(settings) as server, flight.connect(server.url) as client:
            yield Intake(server, client, url, settings)


@pytest.fixture
def intake(running: Intake) -> Intake:
    """The log is empty at the start of each test."""
    with psycopg.connect(running.url, autocommit=True) as connection:
        connection.execute("TRUNCATE core.tb_entity_change_log")
    return running


def parsed(events: pa.Table) -> list[dict[str, Any]]:
    """Events by id, payloads parsed: jsonb prints them its own way."""
    return [event | {"data": json.loads(event["data"])} for event in events.sort_by("event_id").to_pylist()]


def test_an_uploaded_event_is_in_the_log_when_it_is_acknowledged_and_reaches_the_lake_as_it_was(intake: Intake) -> None:
    first, second = sent(300, seed=1), sent(200, seed=2)
    counted = intake.server.metrics.registry.get_sample_value
    before = counted("fraiseql_pipeline_flight_uploaded_rows_total")
    answers = intake.put(first, second)
    assert answers == [{"rows": 300, "inserted": 300, "known": 0}, {"rows": 200, "inserted": 200, "known": 0}]
    assert intake.held() == [(500,)]
    assert counted("fraiseql_pipeline_flight_uploaded_rows_total") == before + 500
    assert counted("fraiseql_pipeline_flight_rows_total") == 0
    with open_changelog(intake.settings) as log:
        pipeline.materialize([hour(0)], settings=intake.settings, changelog=log, lake=Lake.of(intake.settings))
    found = intake.client.do_get(flight.Ticket(b"events:*:2026-11-01:2026-11-01T01:00:00Z:1000")).read_all()
    assert parsed(found) == parsed(pa.Table.from_batches([first, second]))


def test_a_row_of_an_upload_is_what_another_producer_would_have_written(intake: Intake) -> None:
    batch = sent(
        4,
        event_type=["Created", "Updated", "Deleted", "Custom"],
        data=['{"a": 1}', "null", '{"b": 2}', "[]"],
        user_id=["7", None, "-3", "0"],
        org_id=[TENANTS[0], None, None, TENANTS[1]],
    )
    intake.put(batch)
    rows = intake.held(
        "modification_type, object_data, object_data_before, fk_contact, tenant_id::text, id::text, object_type, object_id::text, extra_metadata,"
        " created_at, commit_time IS NOT NULL AND seq IS NOT NULL"
    )
    meta = {"transport": "flight", "flight_user_id": "anonymous"}
    assert [row[:5] for row in rows] == [
        ("INSERT", {"a": 1}, None, 7, TENANTS[0]),
        ("UPDATE", None, None, None, None),
        ("DELETE", None, {"b": 2}, -3, None),
        ("CUSTOM", [], None, 0, TENANTS[1]),
    ]
    assert all(row[8] == meta and row[10] for row in rows)
    for position, name in enumerate(("event_id", "entity_type", "entity_id"), 5):
        assert [row[position] for row in rows] == batch.column(name).to_pylist()
    assert [row[9] for row in rows] == [at.to_pydatetime() for at in batch.column("timestamp").to_pandas()]


def test_an_event_that_is_sent_again_is_known_and_not_doubled(intake: Intake) -> None:
    intake.put(sent(100))
    assert intake.put(sent(100).slice(60), sent(100)) == [
        {"rows": 40, "inserted": 0, "known": 40},
        {"rows": 100, "inserted": 0, "known": 100},
    ]
    more = pa.concat_batches([sent(10, seed=5), sent(100)])
    assert intake.put(more) == [{"rows": 110, "inserted": 10, "known": 100}]
    assert intake.held("count(*), count(DISTINCT id)") == [(110, 110)]


def test_producers_that_send_the_same_events_at_once_write_them_once(intake: Intake) -> None:
    batches = [sent(400, seed) for seed in range(4)]
    answers: list[dict[str, int]] = []

    def produce() -> None:
        answers.extend(intake.put(*batches))

    producers = [threading.Thread(target=produce) for _ in range(4)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
    assert sum(answer["inserted"] for answer in answers) == 1_600
    assert sum(answer["known"] for answer in answers) == 4_800
    assert intake.held("count(*), count(DISTINCT id)") == [(1_600, 1_600)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an id that is none": ({"event_id": {3: "no-uuid"}}, "1 of the 50 events of a batch are refused, so none of it was taken: event_id:malformed 1."),
    "no id": ({"entity_id": {1: None, 2: None}}, "entity_id:null 2."),
    "an id twice": ({"event_id": {3: sent().column(0)[4].as_py()}}, "event_id:duplicate 1."),
    "a verb nobody knows": ({"event_type": {0: "Eaten"}}, "event_type:unknown 1."),
    "a type no ticket can name": ({"entity_type": {0: "*", 1: "a\nb"}}, "2 of the 50 events of a batch are refused, so none of it was taken: entity_type:malformed 2."),
    "half a payload": ({"data": {5: '{"a": ', 6: "NaN", 7: ""}}, "data:no_json 3."),
    "a payload with a NUL": ({"data": {5: '{"a": "\\u0000"}'}}, "data:no_json 1."),
    "half a character": ({"data": {5: '"\\ud800"'}}, "data:no_json 1."),
    "a user that is no number": ({"user_id": {5: "ada", 6: "007", 7: str(2**63), 8: str(-(2**63))}}, "user_id:not_a_bigint 3."),
    "a tenant that is no UUID": ({"org_id": {0: "acme"}}, "org_id:malformed 1."),
    "nanoseconds": ({"timestamp": {0: sent().column(4)[0].value + 1}}, "timestamp:finer_than_microseconds 1."),
    "two faults of one event, one of another": (
        {"user_id": {5: "ada", 6: "eve"}, "data": {5: "?"}},
        "2 of the 50 events of a batch are refused, so none of it was taken: user_id:not_a_bigint 2, data:no_json 1.",
    ),
    "a payload that is too large": ({"data": {5: f'"{"x" * (4 << 20)}"'}}, "data:too_large 1."),
    "a payload that would be too large in print": ({"data": {5: f"[{','.join(['1e131000'] * 40)}]"}}, "data:no_json 1."),
    "a number beyond jsonb": ({"data": {5: "1e200000"}}, "Postgres does not take a value of the batch (SQLSTATE 22003)"),
    "a payload too deep": ({"data": {5: "[" * 900 + "]" * 900, 6: "[" * 90_000 + "]" * 90_000}}, "data:no_json 1."),
}  # fmt: skip


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_one_bad_event_and_nothing_of_its_batch_is_taken(intake: Intake, changed: tuple[dict[str, Any], str]) -> None:
    values, sentence = changed
    assert sentence in intake.refused(sent(**values))


def test_a_refused_batch_leaves_those_before_it_and_none_after_it(intake: Intake) -> None:
    writer, answers = intake.client.do_put(EVENTS, SENT)
    writer.write_batch(sent(10, seed=1))
    assert json.loads(answers.read().to_pybytes())["inserted"] == 10
    with pytest.raises((pa.ArrowException, flight.FlightError)) as refused, writer:
        for batch in (sent(10, seed=2, data={0: "?"}), sent(10, seed=3)):
            writer.write_batch(batch)
        writer.done_writing()
        answers.read()
    assert "data:no_json 1" in str(refused.value)
    assert intake.held() == [(10,)]


def test_times_and_tenants_have_the_range_the_log_holds(intake: Intake) -> None:
    batch = sent(3).set_column(4, "timestamp", pa.array([-62135596800000000, 253402214400000000 - 1, 0], pa.timestamp("us", "UTC")))
    assert intake.put(batch)[0]["inserted"] == 3
    late = sent(1, seed=1).set_column(4, "timestamp", pa.array([253402214400000000], pa.timestamp("us", "UTC")))
    with pytest.raises(pa.ArrowInvalid, match="timestamp:outside 1"):
        intake.put(late)


def compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    return to_wire(batch, wire_schema((), "compact"))


WAYS: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "compact": compact,
    "microseconds": lambda batch: batch.set_column(4, "timestamp", batch.column(4).cast(EVENT_SCHEMA.field(4).type)),
    "large strings, as polars has them": lambda batch: pa.RecordBatch.from_arrays(
        [c.cast(pa.large_string()) if c.type == pa.string() else c for c in batch.columns], names=batch.schema.names
    ),
    "another order": lambda batch: batch.select(batch.schema.names[::-1]),
    "a zone": lambda batch: batch.set_column(4, "timestamp", batch.column(4).cast(pa.timestamp("us", "Asia/Tokyo"))),
    "no user and no tenant": lambda batch: batch.select(batch.schema.names[:6]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_the_types_of_every_profile_are_taken(intake: Intake, way: str, codec: str | None) -> None:
    options = flight.FlightCallOptions(write_options=pa.ipc.IpcWriteOptions(compression=codec, emit_dictionary_deltas=True))
    first, second = sent(40, seed=1), sent(40, seed=2)
    assert [a["inserted"] for a in intake.put(WAYS[way](first), WAYS[way](second), options=options)] == [40, 40]
    expected = pa.Table.from_batches([first, second])
    rows = intake.held(
        "id::text, object_type, fk_contact::text, tenant_id::text, (extract(epoch FROM created_at) * 1000000)::bigint"
    )
    there = [True, True, *["no user" not in way] * 2, True]
    micros = pc.cast(pc.cast(expected["timestamp"], pa.timestamp("us", "UTC")), pa.int64())
    columns = [expected[name] for name in ("event_id", "entity_type", "user_id", "org_id")] + [micros]
    wanted = zip(*[column.to_pylist() if kept else [None] * 80 for column, kept in zip(columns, there, strict=True)], strict=True)
    assert sorted(rows) == sorted(wanted)


WRONG: dict[str, tuple[pa.RecordBatch, str]] = {
    "a column too many": (sent(1).append_column("pk", pa.array([1])), "'pk' is no column of an event"),
    "one too few": (sent(1).drop_columns(["data"]), "data is missing"),
    "one twice": (sent(1).append_column("data", pa.array(["{}"])), "data is there twice"),
    "a number for a text": (sent(1).set_column(6, "user_id", pa.array([7])), "user_id is int64"),
    "a time without a zone": (
        sent(1).set_column(4, "timestamp", pa.array([0], pa.timestamp("us"))),
        "timestamp is timestamp[us]",
    ),
    "no column": (pa.RecordBatch.from_arrays([], names=[]), "event_id is missing; event_type is missing"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_columns_than_those_of_an_event_are_refused_by_name(intake: Intake, wrong: tuple[pa.RecordBatch, str]) -> None:
    batch, sentence = wrong
    said = intake.refused(batch)
    assert "An upload must have the columns event_id, event_type" in said
    assert sentence in said


@pytest.mark.parametrize(
    "descriptor", [flight.FlightDescriptor.for_path("orders"), flight.FlightDescriptor.for_command(b"events:*:now-1h:now:10")]
)
def test_an_upload_names_what_it_is(intake: Intake, descriptor: Any) -> None:
    assert "must be the path events, or the command events" in intake.refused(sent(1), descriptor=descriptor)
    assert intake.put(sent(1), descriptor=flight.FlightDescriptor.for_command(b"events"))[0]["inserted"] == 1


# ------------------------------------------------------------------------------------------------------------ who may


def test_an_upload_needs_the_scope_publish_and_is_of_its_callers_tenant(
    changelog_url: str, tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    tokens = {
        name: new_token(name, org_id, scopes)
        for name, org_id, scopes in (("ours", TENANTS[0], ["publish"]), ("reader", None, ["read", "admin"]))
    }
    (tmp_path / "tokens").write_text("\n".join(line for _, line in tokens.values()))
    settings = {"arrow_flight_uploads": True, "database_url": changelog_url, "arrow_flight_tokens_file": str(tmp_path / "tokens")}
    server = start_server(Lake(str(tmp_path / "lake")), **settings, arrow_flight_audit_log=str(tmp_path / "audit"))

    def bearing(name: str) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {tokens[name][0]}".encode())])

    with flight.connect(server.url) as client:
        intake = Intake(server, client, changelog_url, Settings(database_url=changelog_url))
        assert "needs the scope publish" in intake.refused(sent(5), options=bearing("reader"))
        foreign = sent(5, org_id=[TENANTS[0], TENANTS[1], None, TENANTS[2], TENANTS[0]])
        said = intake.refused(foreign, options=bearing("ours"))
        assert "2 of the 5 events of a batch are refused, so none of it was taken: org_id:foreign 2" in said
        assert not {TENANTS[1], TENANTS[2]} & set(said.replace("'", " ").split())
        intake.put(sent(5, org_id=[TENANTS[0], None, None, None, TENANTS[0]]), options=bearing("ours"))
    rows = intake.held("DISTINCT tenant_id::text, extra_metadata ->> 'flight_user_id'")
    assert rows == [(TENANTS[0], "ours")]
    server.stop(0)
    calls = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(c["method"], c["code"], c["rows"]) for c in calls] == [
        ("DoPut", "PERMISSION_DENIED", 0),
        ("DoPut", "INVALID_ARGUMENT", 0),
        ("DoPut", "OK", 5),
    ]


@pytest.mark.parametrize("chosen", [{}, {"arrow_flight_uploads": True}, {"database_url": "postgresql://nowhere/none"}])
def test_uploads_are_off_unless_the_operator_says_so_and_names_a_database(
    chosen: dict[str, Any], tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    server = start_server(Lake(str(tmp_path / "lake")), **chosen)
    with flight.connect(server.url) as client, pytest.raises((NotImplementedError, flight.FlightError)) as refused:
        writer, _ = client.do_put(EVENTS, SENT)
        with writer:
            writer.write_batch(sent(1))
    assert "with FRAISEQL_ARROW_FLIGHT_UPLOADS=true and a FRAISEQL_DATABASE_URL it takes events by DoPut" in str(refused.value)


def test_a_role_that_may_not_write_is_told_what_it_lacks(
    changelog_url: str, role: str, tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    url = psycopg.conninfo.make_conninfo(changelog_url, user=role)
    server = start_server(Lake(str(tmp_path / "lake")), arrow_flight_uploads=True, database_url=url)
    with flight.connect(server.url) as client:
        intake = Intake(server, client, changelog_url, Settings(database_url=url))
        said = intake.refused(sent(1))
        assert "The role may not append to core.tb_entity_change_log (42501); grant it USAGE on schema core" in said
        with psycopg.connect(changelog_url, autocommit=True) as owner:
            owner.execute(f"GRANT INSERT ON core.tb_entity_change_log TO {role}")
            owner.execute(f"GRANT USAGE ON SEQUENCE core.seq_entity_change_log TO {role}")
        assert intake.put(sent(1))[0]["inserted"] == 1


# -------------------------------------------------------------------------------------------------------------- limits


def call(server: FlightServer, name: str, *requests: Any) -> tuple[grpc.StatusCode, str]:
    """How a call with these messages ends."""
    messages = [request.SerializeToString() for request in requests]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        try:
            list(channel.stream_stream(f"/{protocol.SERVICE}/{name}")(iter(messages), timeout=60))
        except grpc.RpcError as error:
            return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def messages(batch: pa.RecordBatch, codec: str) -> list[Any]:
    """An upload as its messages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(batch)
    read = pa.ipc.MessageReader.open_stream(sink.getvalue())
    found = [
        protocol.FlightData(data_header=m.metadata.to_pybytes(), data_body=m.body.to_pybytes() if m.body else b"") for m in read
    ]
    found[0].flight_descriptor.CopyFrom(protocol.FlightDescriptor(type=protocol.PATH, path=["events"]))
    return found


def test_a_server_that_takes_uploads_takes_no_other_large_request(intake: Intake) -> None:
    large = b"events:*:2026-11-01:now:" + b"1" * 1_000_000
    for ask in (
        lambda: intake.client.do_get(flight.Ticket(large)).read_all(),
        lambda: intake.client.get_flight_info(flight.FlightDescriptor.for_command(large)),
        lambda: list(intake.client.do_action(("healthcheck", large))),
        lambda: list(intake.client.list_flights(large)),
    ):
        with pytest.raises(pa.ArrowInvalid, match="A request must not have more than 262144 bytes"):
            ask()
    for name, request in (
        ("DoExchange", protocol.FlightData(app_metadata=large)),
        ("Handshake", protocol.HandshakeRequest(payload=large)),
    ):
        assert call(intake.server, name, request)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert intake.put(sent(1))[0]["inserted"] == 1


def test_a_batch_that_would_become_too_large_is_refused_before_it_does(intake: Intake) -> None:
    payload = '"' + "a" * (MAX_BATCH_BYTES // 8) + '"'
    bomb = sent(10, data=[payload] * 10)
    options = flight.FlightCallOptions(write_options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert f"A batch must not have more than {MAX_BATCH_BYTES} bytes" in intake.refused(bomb, options=options)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_length_that_nobody_can_allocate_is_refused_before_anybody_tries(intake: Intake, codec: str) -> None:
    payload = '"' + "a" * 1_000 + '"'
    schema, batch = messages(sent(50, data=[payload] * 50), codec)
    assert call(intake.server, "DoPut", schema, batch)[0] is grpc.StatusCode.OK
    true = (50 * len(payload)).to_bytes(8, "little")
    at = batch.data_body.rindex(true)  # before it stands the last offset, the same number
    batch.data_body = batch.data_body[:at] + (2**60).to_bytes(8, "little") + batch.data_body[at + 8 :]
    code, sentence = call(intake.server, "DoPut", schema, batch)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"A batch must not have more than {MAX_BATCH_BYTES} bytes" in sentence


def test_a_dictionary_that_would_multiply_out_to_too_much_is_refused(intake: Intake) -> None:
    batch = sent(100)
    payloads = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), pa.array(['"' + "a" * 2_000_000 + '"']))
    assert f"A batch must not have more than {MAX_BATCH_BYTES} bytes" in intake.refused(batch.set_column(5, "data", payloads))


def test_a_message_beyond_what_the_server_receives_is_refused(intake: Intake) -> None:
    with pytest.raises((pa.ArrowException, flight.FlightError)):
        intake.put(sent(20, data=['"' + "a" * 1_000_000 + '"'] * 20))
    assert intake.held() == [(0,)]


def test_an_upload_has_no_more_rows_than_a_stream(
    changelog_url: str, tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    server = start_server(
        Lake(str(tmp_path / "lake")), arrow_flight_uploads=True, database_url=changelog_url, arrow_flight_max_rows=100
    )
    with flight.connect(server.url) as client:
        intake = Intake(server, client, changelog_url, Settings(database_url=changelog_url))
        with pytest.raises(pa.ArrowInvalid, match="must not have more than 100 events in one call"):
            intake.put(sent(60, seed=1), sent(60, seed=2))
        assert intake.held() == [(60,)]


def test_a_producer_that_sends_nothing_is_cut(
    changelog_url: str, tmp_path: Path, start_server: Callable[..., FlightServer]
) -> None:
    server = start_server(
        Lake(str(tmp_path / "lake")), arrow_flight_uploads=True, database_url=changelog_url, arrow_flight_stall_seconds=0.2
    )
    with flight.connect(server.url) as client:
        writer, answers = client.do_put(EVENTS, SENT)
        writer.write_batch(sent(3))
        assert json.loads(answers.read().to_pybytes())["inserted"] == 3
        with pytest.raises((pa.ArrowException, flight.FlightError), match=r"its client sent nothing whole for 0\.2 s"):
            if answers.read() is None:
                writer.close()


def test_a_batch_without_rows_is_answered(intake: Intake) -> None:
    assert intake.put(sent(3).slice(0, 0)) == intake.put(compact(sent(3)).slice(0, 0)) == [{"rows": 0, "inserted": 0, "known": 0}]
