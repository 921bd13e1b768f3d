"""Ask DuckDB about the events of a ticket while they stream: no table is made, so any range fits into memory.

    python read_with_duckdb.py [URL] [TICKET]
    python read_with_duckdb.py --ca ca.pem --token-file token grpc+tls://HOST:50051 [TICKET]

Needs fraiseql-pipeline and duckdb.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import duckdb

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.flight.client import Client

# To print a TIMESTAMPTZ, DuckDB wants a time zone database; the microseconds since 1970 need none.
BY_TYPE = """
    SELECT
        entity_type,
        count(*) AS events,
        count(*) FILTER (user_id IS NULL) AS without_user,
        sum(strlen(data))::BIGINT AS data_bytes,
        strftime(make_timestamp(epoch_us(min(timestamp)::TIMESTAMPTZ)), '%Y-%m-%dT%H:%M:%SZ') AS first,
        strftime(make_timestamp(epoch_us(max(timestamp)::TIMESTAMPTZ)), '%Y-%m-%dT%H:%M:%SZ') AS last
    FROM stream
    GROUP BY entity_type
    ORDER BY entity_type
"""


def main(client: Client, ticket: str) -> None:
    with client.stream(ticket) as stream, duckdb.connect() as database:
        database.register("stream", stream)
        by_type = database.execute(BY_TYPE).fetchall()

    print(f"rows={sum(row[1] for row in by_type)}")
    print(f"without_user={sum(row[2] for row in by_type)}")
    print(f"data_bytes={sum(row[3] for row in by_type)}")
    if by_type:
        print(f"first={min(row[4] for row in by_type)}")
        print(f"last={max(row[5] for row in by_type)}")
    for row in by_type:
        print(f"{row[0]}={row[1]}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description="Count the events of a ticket.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_argument("url", nargs="?", default="grpc://localhost:50051", help="the Flight server")
    arguments.add_argument("ticket", nargs="?", default="events:*:now-24h:now:10000", help="which events")
    arguments.add_argument("--token-file", type=Path, help="file that holds the bearer token")
    arguments.add_argument("--ca", help="for grpc+tls://: PEM file of the authorities to trust, instead of the system's")
    arguments.add_argument("--cert", help="PEM file of a client certificate, with --key")
    arguments.add_argument("--key", help="PEM file of its private key")
    chosen = arguments.parse_args()
    try:
        token = chosen.token_file.read_text().strip() if chosen.token_file else None
        with connect(chosen.url, token=token, tls_root_certs=chosen.ca, cert_chain=chosen.cert, private_key=chosen.key) as client:
            main(client, chosen.ticket)
    except (PipelineError, OSError) as refused:
        sys.exit(str(refused))
    except duckdb.Error as broken:
        # A stream that breaks off does so inside DuckDB, which puts the sentence into its own.
        sys.exit(str(broken).partition(" Detail: ")[0])
