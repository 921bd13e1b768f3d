"""The same lake in an object store."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any

import boto3
import polars as pl
import pyarrow as pa
import pytest

from fraiseql_pipeline.errors import LakeUnavailable, WindowShrinks
from fraiseql_pipeline.lake import Facts, Lake
from fraiseql_pipeline.lake.storage import ObjectStorage, _Handler
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, SETTLED_AT, assert_plain_protocol, content, publish, quarantine_events

HOUR = Window.parse("2026-11-01-10:00")
HOURS = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(4)]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process of its own: delta-rs keeps Python's lock while it opens an upload, and a server in this process could not answer."""
    program = (
        "import sys; from moto.server import ThreadedMotoServer; s = ThreadedMotoServer('127.0.0.1', 0, verbose=False); s.start();"
        "print(*s.get_host_and_port(), sep=':', flush=True); sys.stdin.read(); s.stop()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://{server.stdout.readline().strip()}", server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with served() as (endpoint, _):
        yield endpoint


def client_of(store: str) -> Any:
    return boto3.client("s3", endpoint_url=store, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")


def lake_in(store: str, **options: str) -> Lake:
    bucket = f"lake-{uuid.uuid4().hex[:12]}"
    client_of(store).create_bucket(Bucket=bucket)
    return Lake(f"s3://{bucket}/some/lake", {**KEYS, "AWS_ENDPOINT_URL": store, "AWS_ALLOW_HTTP": "true", **options})


@pytest.fixture
def lake(store: str) -> Lake:
    return lake_in(store)


def test_windows_are_published_replaced_merged_and_left_alone(lake: Lake) -> None:
    assert lake.published() == {}
    assert publish(lake, HOUR, 300, 5).outcome == "published"
    assert publish(Lake(lake.uri, lake.options), HOUR, 300, 5).outcome == "unchanged"
    with pytest.raises(WindowShrinks):
        publish(lake, HOUR, 200, 5)
    newer = lake_events(HOUR, 320, 2)
    assert publish(lake, HOUR, newer, quarantine_events(HOUR, 6, 2), settled_pk=PK - 1).outcome == "skipped"
    assert publish(lake, HOUR, newer, quarantine_events(HOUR, 6, 2)).outcome == "replaced"
    assert publish(lake, HOURS[1], 0).outcome == "published"
    assert content(lake, HOUR).equals(newer)
    assert content(lake, HOURS[1]).num_rows == 0
    assert Lake(lake.uri, lake.options).published().keys() == {HOUR, HOURS[1]}
    assert lake.fsck() == []
    assert_plain_protocol(lake)
    assert pl.scan_delta(lake.events_uri, storage_options=lake.options).select(pl.len()).collect().item() == 320


def test_a_failed_stage_leaves_no_object(lake: Lake, store: str) -> None:
    with pytest.raises(KeyboardInterrupt), lake.stage(HOUR) as staged:
        staged.write(lake_events(HOUR, 100).to_batches()[0])
        staged.finish()
        raise KeyboardInterrupt
    assert "Contents" not in client_of(store).list_objects_v2(Bucket=lake.uri.split("/")[2])


def test_two_writers_at_once_leave_one_generation(lake: Lake) -> None:
    publish(lake, HOUR, 10)

    def write(part: int) -> None:
        own = Lake(lake.uri, lake.options)
        for n in range(part, 8, 2):
            publish(own, HOUR, lake_events(HOUR, 100 + n, n), settled_pk=PK + n, allow_shrink=True)

    threads = [Thread(target=write, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(lake, HOUR).equals(lake_events(HOUR, 107, 7))
    assert lake.fsck() == []


def test_an_entry_that_another_writer_put_over_ours_is_a_lost_race(lake: Lake, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on stores that pass ``If-None-Match`` over: both writers are told that their entry is there, the first before the second writes."""
    publish(lake, HOURS[0], 10)
    client, place = client_of(store), {"Bucket": lake.uri.split("/")[2], "Key": f"some/lake/events/_delta_log/{2:020d}.json"}
    publish(Lake(lake.uri, lake.options), HOURS[1], 20)
    rival = client.get_object(**place)["Body"].read()
    client.delete_object(**place)
    pauses: list[float] = []

    def beaten_meanwhile(seconds: float) -> None:
        if not pauses:
            client.put_object(**place, Body=rival)
        pauses.append(seconds)

    monkeypatch.setattr("fraiseql_pipeline.lake.table.time.sleep", beaten_meanwhile)
    writer = Lake(lake.uri, lake.options)
    done = publish(writer, HOURS[0], 30)
    assert (done.outcome, done.table_version, done.accepted_rows) == ("replaced", 3, 30)
    assert pauses[0] > 0
    for reader in (writer, lake, Lake(lake.uri, lake.options)):
        assert list(reader.published()) == HOURS[:2]
    assert [content(lake, hour).num_rows for hour in HOURS] == [30, 20, 0, 0]
    assert lake.fsck() == []


def test_only_stores_that_may_overwrite_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert not ObjectStorage("s3://lake", KEYS).may_overwrite
    assert not ObjectStorage("gs://lake", {"endpoint": "http://somewhere"}).may_overwrite
    assert ObjectStorage("s3://lake", {"aws_endpoint": "http://somewhere"}).may_overwrite
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somewhere")
    assert ObjectStorage("s3://lake", KEYS).may_overwrite


def test_checkpoints_and_maintenance_change_no_row(lake: Lake) -> None:
    for n in range(3):
        for hour in HOURS:
            publish(lake, hour, lake_events(hour, 20 + n, n))
    before = pa.Table.from_batches(lake.read(HOURS[0].start, HOURS[-1].end))
    fresh = Lake(lake.uri, lake.options)
    assert [c.accepted_rows for c in fresh.published().values()] == [22] * 4
    done = fresh.maintain(HOUR.end + timedelta(days=5))
    assert done.compacted_days == ("events 2026-11-01",)
    assert pa.Table.from_batches(Lake(lake.uri, lake.options).read(HOURS[0].start, HOURS[-1].end)).equals(before)
    assert lake.fsck() == []


def test_a_compaction_whose_commit_was_taken_and_reported_as_lost_deletes_nothing(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hour in HOURS:
        publish(lake, hour, 30)
    commit = lake.events.commit

    def unanswered(*args: object, **options: object) -> None:
        commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lake.events, "commit", unanswered)
    assert lake.maintain(HOUR.end + timedelta(days=10)).compacted_days == ("events 2026-11-01",)
    assert [content(lake, hour).num_rows for hour in HOURS] == [30] * len(HOURS)


def test_what_fsck_says_of_an_object_store_can_be_done_there(lake: Lake, store: str) -> None:
    for hour in HOURS:
        publish(lake, hour, 20, 1)
    client, bucket, log = client_of(store), lake.uri.split("/")[2], "some/lake/events/_delta_log/"
    lake.events.checkpoint()

    def torn(name: str) -> str:
        client.put_object(Bucket=bucket, Key=log + name, Body=b"")
        found = [Lake(lake.uri, lake.options).fsck(repair=repair) for repair in (False, True)]
        assert found[0] == found[1], "nothing is repaired there"
        assert not any("--repair" in f.remedy for f in found[0])
        return found[0][0].remedy

    assert "Delete it and _delta_log/_last_checkpoint with the object store's own tools" in torn(f"{4:020d}.checkpoint.parquet")
    for name in (f"{4:020d}.checkpoint.parquet", "_last_checkpoint"):
        client.delete_object(Bucket=bucket, Key=log + name)
    assert Lake(lake.uri, lake.options).fsck() == []

    assert "Delete it with the object store's own tools" in torn(f"{4:020d}.json")
    client.delete_object(Bucket=bucket, Key=f"{log}{4:020d}.json")
    assert Lake(lake.uri, lake.options).fsck() == []

    assert 'Put {"commitInfo":{}} in its place' in torn(f"{2:020d}.json")
    client.put_object(Bucket=bucket, Key=f"{log}{2:020d}.json", Body=b'{"commitInfo":{}}')
    assert Lake(lake.uri, lake.options).fsck() == []
    for hour in (HOURS[1], HOURS[3]):
        assert publish(Lake(lake.uri, lake.options), hour, 20, 1).outcome == "published"
    assert list(Lake(lake.uri, lake.options).published()) == HOURS
    assert lake.fsck() == []


def test_force_takes_no_file_for_torn_while_the_store_does_not_answer(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for hour in HOURS:
        publish(lake, hour, 20)
    lake.maintain(HOUR.end + timedelta(days=5))
    fetched = _Handler.open_input_file

    def refused(self: _Handler, path: str) -> pa.PythonFile:
        if path.endswith(".parquet") and "day-" in path:
            raise OSError("Generic S3 error\n Error performing GET http://secret/ in 1s")
        return fetched(self, path)

    with monkeypatch.context() as broken, pytest.raises(LakeUnavailable, match="Generic S3 error") as raised:
        broken.setattr(_Handler, "open_input_file", refused)
        publish(Lake(lake.uri, lake.options), HOUR, 20, force=True)
    assert "secret" not in str(raised.value)
    assert [content(lake, hour).num_rows for hour in HOURS] == [20] * 4


def test_a_store_that_goes_away_while_a_window_is_staged_is_one_sentence() -> None:
    with served() as (endpoint, server):
        lake = lake_in(endpoint, max_retries="0", connect_timeout="1s", timeout="2s")
        publish(lake, HOUR, 20)
        with pytest.raises(LakeUnavailable) as raised, lake.stage(HOUR) as staged:
            for batch in lake_events(HOUR, 30, 1).to_batches():
                staged.write(batch)
            staged.finish()
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
            lake.commit(staged, Facts(PK, "sealed", "source", "run", SETTLED_AT, 30))
    assert endpoint.removeprefix("http://") not in str(raised.value)
    assert lake.uri.split("/")[2] not in str(raised.value)


def test_a_store_that_does_not_answer_is_one_sentence() -> None:
    quick = {
        "max_retries": "0",
        "connect_timeout": "1s",
        "timeout": "1s",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
    }
    unreachable = Lake("s3://nowhere-at-all/lake", {**KEYS, **quick})
    with pytest.raises(LakeUnavailable) as raised:
        unreachable.published()
    assert "127.0.0.1" not in str(raised.value)
    assert "nowhere" not in str(raised.value)
