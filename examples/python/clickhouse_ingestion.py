"""Load the events of a ticket into ClickHouse and let it count them.

    python clickhouse_ingestion.py [URL] [TICKET] [--host localhost] [--port 8123] [--interface chdb]
    python clickhouse_ingestion.py --ca ca.pem --token-file token grpc+tls://HOST:50051 [TICKET] …

Needs pyarrow and clickhouse-connect. The Arrow table goes in as it came: no row is ever a Python object. ``--interface chdb`` (needs
chdb) does the same in this process, without a server. The table is made if it is missing; loading a ticket again doubles nothing for
those who read it with FINAL.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import clickhouse_connect
import pyarrow as pa
from pyarrow import flight

# ReplacingMergeTree keeps one row of those whose sorting key is the same. What may be any text must be String: what does not
# fit a narrower type would arrive as NULL.
OBSERVER_EVENTS = """
    CREATE TABLE IF NOT EXISTS observer_events (
        event_id UUID,
        event_type LowCardinality(String),
        entity_type LowCardinality(String),
        entity_id UUID,
        timestamp DateTime64(9, 'UTC'),
        data String,
        user_id Nullable(String),
        org_id LowCardinality(Nullable(String))
    )
    ENGINE = ReplacingMergeTree
    PARTITION BY toYYYYMM(timestamp)
    ORDER BY (entity_type, timestamp, event_id)
"""

TOTALS = """
    SELECT
        count() AS events,
        countIf(user_id IS NULL),
        sum(length(data)),
        formatDateTime(min(timestamp), '%Y-%m-%dT%H:%i:%SZ'),
        formatDateTime(max(timestamp), '%Y-%m-%dT%H:%i:%SZ')
    FROM observer_events FINAL
"""

BY_TYPE = "SELECT entity_type, count() FROM observer_events FINAL GROUP BY entity_type ORDER BY entity_type"


def main() -> None:
    arguments = argparse.ArgumentParser(description="Load events into ClickHouse.")
    arguments.add_argument("url", nargs="?", default="grpc://localhost:50051")
    arguments.add_argument("ticket", nargs="?", default="events:*:now-24h:now:10000")
    arguments.add_argument("--token-file", type=Path, help="file that holds the bearer token")
    arguments.add_argument("--ca", help="for grpc+tls://: PEM file of the authorities to trust, instead of the system's")
    arguments.add_argument("--cert", help="PEM file of a client certificate, with --key")
    arguments.add_argument("--key", help="PEM file of its private key")
    arguments.add_argument("--host", default="localhost")
    arguments.add_argument("--port", type=int, default=8123)
    arguments.add_argument("--user", default="default")
    arguments.add_argument("--password", default="")
    arguments.add_argument("--interface", choices=["http", "https", "chdb"], default="http")
    arguments.add_argument("--path", help="with chdb: the directory of the database, instead of memory")
    chosen = arguments.parse_args()
    if (chosen.cert is None) != (chosen.key is None):
        arguments.error("--cert and --key belong together")

    # Fetch events from Flight
    files = {"tls_root_certs": chosen.ca, "cert_chain": chosen.cert, "private_key": chosen.key}
    try:
        headers = [(b"authorization", f"Bearer {chosen.token_file.read_text().strip()}".encode())] if chosen.token_file else []
        with flight.connect(chosen.url, **{name: Path(file).read_bytes() for name, file in files.items() if file}) as client:
            table = client.do_get(flight.Ticket(chosen.ticket), flight.FlightCallOptions(headers=headers)).read_all()
    except (flight.FlightError, pa.ArrowException, OSError) as refused:
        sys.exit(str(refused))

    # Insert into ClickHouse (direct Arrow support)
    if chosen.interface == "chdb":
        ch_client = clickhouse_connect.get_client(interface="chdb", **({"path": chosen.path} if chosen.path else {}))
    else:
        ch_client = clickhouse_connect.get_client(
            interface=chosen.interface, host=chosen.host, port=chosen.port, username=chosen.user, password=chosen.password
        )
    ch_client.command(OBSERVER_EVENTS)
    ch_client.insert_arrow("observer_events", table)

    events, without_user, data_bytes, first, last = ch_client.query(TOTALS).first_row
    print(f"rows={events}\nwithout_user={without_user}\ndata_bytes={data_bytes}")
    if events:
        print(f"first={first}\nlast={last}")
    for entity_type, count in ch_client.query(BY_TYPE).result_rows:
        print(f"{entity_type}={count}")
    ch_client.close()


if __name__ == "__main__":
    main()
