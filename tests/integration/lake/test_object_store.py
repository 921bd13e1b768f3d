"""The same lake in an object store."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from threading import Thread

import boto3
import polars as pl
import pyarrow as pa
import pytest

from fraiseql_pipeline.errors import LakeUnavailable, WindowShrinks
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.window import Window
from tests.support.events import lake_events
from tests.support.lakes import PK, assert_plain_protocol, content, publish, quarantine_events

HOUR = Window.parse("2026-11-01-10:00")
HOURS = [Window(HOUR.start + timedelta(hours=h), HOUR.size) for h in range(4)]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """A process of its own: delta-rs keeps Python's lock while it opens an upload, and a server in this process could not answer."""
    program = (
        "import sys; from moto.server import ThreadedMotoServer; s = ThreadedMotoServer('127.0.0.1', 0, verbose=False); s.start();"
        "print(*s.get_host_and_port(), sep=':', flush=True); sys.stdin.read(); s.stop()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://{server.stdout.readline().strip()}"
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def lake(store: str) -> Lake:
    bucket = f"lake-{uuid.uuid4().hex[:12]}"
    boto3.client(
        "s3", endpoint_url=store, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    ).create_bucket(Bucket=bucket)
    return Lake(f"s3://{bucket}/some/lake", {**KEYS, "AWS_ENDPOINT_URL": store, "AWS_ALLOW_HTTP": "true"})


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
    client = boto3.client("s3", endpoint_url=store, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
    assert "Contents" not in client.list_objects_v2(Bucket=lake.uri.split("/")[2])


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
