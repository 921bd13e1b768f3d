"""Read the events of an entity type over Arrow Flight and count them with polars.

    python flight_observer_client.py [--host HOST] [--port PORT] [--entity-type Order] [--hours 1]

Needs pyarrow and polars, nothing else: any Arrow Flight client can do this. The ticket says what to read: entity type (* for all), start, end
(exclusive) and the most rows per batch; times without an offset are UTC.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
from pyarrow import flight


def main() -> None:
    arguments = argparse.ArgumentParser(description="Count the events of the last hours.")
    arguments.add_argument("--host", default="localhost")
    arguments.add_argument("--port", type=int, default=50051)
    arguments.add_argument("--entity-type", default="Order")
    arguments.add_argument("--hours", type=float, default=1.0)
    chosen = arguments.parse_args()

    now = datetime.now(UTC).replace(tzinfo=None)
    start, end = (now - timedelta(hours=chosen.hours)).isoformat(), now.isoformat()

    client = flight.connect(f"grpc://{chosen.host}:{chosen.port}")
    try:
        reader = client.do_get(flight.Ticket(f"events:{chosen.entity_type}:{start}:{end}:10000"))
        events = pl.from_arrow(reader.read_all())
    except (flight.FlightError, pa.ArrowException) as refused:
        sys.exit(str(refused))

    print(f"Received {len(events)} events")
    print(events.head())
    print(
        events.group_by("entity_type").agg(
            pl.len().alias("event_count"),
            pl.col("timestamp").min().alias("first_event"),
            pl.col("timestamp").max().alias("last_event"),
        )
    )


if __name__ == "__main__":
    main()
