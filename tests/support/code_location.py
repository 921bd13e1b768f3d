"""The Dagster code location over a real change log and a lake of its own, on an instance that forgets everything afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import psycopg

from assets.events import build_events
from assets.report import EVENTS, QUARANTINE
from assets.resources import Flight, FraiseQL
from fraiseql_pipeline.lake import Lake
from fraiseql_pipeline.settings import Settings
from fraiseql_pipeline.window import Window

#: No wait between attempts: a test is about which attempts there are.
AT_ONCE = dg.RetryPolicy(max_retries=2, delay=0)


@dataclass(frozen=True)
class Location:
    """The asset as the environment configures it, run on one instance."""

    instance: dg.DagsterInstance

    @property
    def settings(self) -> Settings:
        return Settings.load()

    @property
    def lake(self) -> Lake:
        return Lake.of(self.settings)

    def run(
        self,
        *windows: Window,
        config: Mapping[str, Any] | None = None,
        asked: tuple[dg.AssetKey, ...] = (EVENTS, QUARANTINE),
        flight: Flight | None = None,
    ) -> dg.ExecuteInProcessResult:
        """One run, given one window, the range from the first to the last as a backfill gives it, or none."""
        single = len(windows) == 1
        bounds = (windows[0].key, windows[-1].key) if windows else ()
        ends = dict(zip(("dagster/asset_partition_range_start", "dagster/asset_partition_range_end"), bounds, strict=False))
        return dg.materialize(
            [build_events(self.settings, AT_ONCE)],
            partition_key=windows[0].key if single else None,
            tags=None if single else ends,
            selection=list(asked),
            resources={"fraiseql": FraiseQL(), "flight": flight or Flight()},
            run_config={"ops": {"events": {"config": dict(config)}}} if config else None,
            instance=self.instance,
            raise_on_error=False,
        )

    def metadata(self, key: dg.AssetKey = EVENTS) -> dict[str, dict[str, Any]]:
        """The metadata of each window's newest materialization."""
        records = self.instance.fetch_materializations(key, limit=1000).records
        found = [record.asset_materialization for record in reversed(records)]
        return {m.partition or "": {name: value.value for name, value in m.metadata.items()} for m in found if m is not None}

    def checks(self, name: str) -> dict[str | None, tuple[str, bool]]:
        """Per window: how a check went, and whether Dagster takes that as the status of the newest materialization."""
        infos = self.instance.event_log_storage.get_asset_check_partition_info([dg.AssetCheckKey(EVENTS, name)])
        return {info.partition_key: (info.latest_execution_status.value, info.is_current) for info in infos}


def write(url: str, window: Window, events: int, *, broken: int = 0) -> None:
    """Put ``events`` sound events into a window, and ``broken`` ones that must be quarantined."""
    with psycopg.connect(url) as connection:
        connection.execute(
            """INSERT INTO core.tb_entity_change_log (object_type, modification_type, object_id, object_data, updated_fields, created_at)
               SELECT 'Order', CASE WHEN n <= %(broken)s THEN 'nonsense' ELSE 'UPDATE' END, gen_random_uuid(),
                      '{"total": 1.10, "secret": "hunter2"}', '{total}', %(start)s::timestamptz + n * interval '1 second'
                 FROM generate_series(1, %(all)s) n""",
            {"broken": broken, "all": events + broken, "start": window.start},
        )


def hours(day: str, first: int, last: int) -> list[Window]:
    """The windows of a day from one hour to another, both included."""
    return [Window.parse(f"{day}-{hour:02}:00") for hour in range(first, last + 1)]
