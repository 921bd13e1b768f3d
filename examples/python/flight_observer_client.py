"""Read the events of an entity type over Arrow Flight and count them with polars.

    python flight_observer_client.py [--host HOST] [--port PORT] [--entity-type Order] [--hours 1]
    python flight_observer_client.py --host HOST --ca ca.pem --token-file token

Needs pyarrow and polars, nothing else: any Arrow Flight client can do this. With ``--ca`` the server is asked over TLS. The ticket says what to read: entity type (* for all), start, end
(exclusive) and the most rows per batch; times without an offset are UTC.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import flight


def main() -> None:
    arguments = argparse.ArgumentParser(description="Count the events of the last hours.")
    arguments.add_argument("--host", default="localhost")
    arguments.add_argument("--port", type=int, default=50051)
    arguments.add_argument("--entity-type", default="Order")
    arguments.add_argument("--hours", type=float, default=1.0)
    arguments.add_argument("--token-file", type=Path, help="file that holds the bearer token")
    arguments.add_argument("--ca", help="ask over TLS, and trust the authorities in this PEM file")
    arguments.add_argument("--cert", help="PEM file of a client certificate, with --key")
    arguments.add_argument("--key", help="PEM file of its private key")
    chosen = arguments.parse_args()
    if (chosen.cert is None) != (chosen.key is None):
        arguments.error("--cert and --key belong together")

    now = datetime.now(UTC).replace(tzinfo=None)
    start, end = (now - timedelta(hours=chosen.hours)).isoformat(), now.isoformat()

    files = {"tls_root_certs": chosen.ca, "cert_chain": chosen.cert, "private_key": chosen.key}
    try:
        headers = [(b"authorization", f"Bearer {chosen.token_file.read_text().strip()}".encode())] if chosen.token_file else []
        with flight.connect(
            f"{'grpc+tls' if chosen.ca else 'grpc'}://{chosen.host}:{chosen.port}",
            **{name: Path(file).read_bytes() for name, file in files.items() if file},
        ) as client:
            ticket = flight.Ticket(f"events:{chosen.entity_type}:{start}:{end}:10000")
            reader = client.do_get(ticket, flight.FlightCallOptions(headers=headers))
            events = pl.from_arrow(reader.read_all())
    except (flight.FlightError, pa.ArrowException, OSError) as refused:
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
