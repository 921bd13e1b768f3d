"""Read the events of a ticket into a pandas frame and count them.

    python read_with_pandas.py [URL] [TICKET]
    python read_with_pandas.py --ca ca.pem --token-file token grpc+tls://HOST:50051 [TICKET]

Needs fraiseql-pipeline and pandas.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import PipelineError
from fraiseql_pipeline.flight.client import Client


def main(client: Client, ticket: str) -> None:
    events = client.pandas(ticket)

    print(f"rows={len(events)}")
    print(f"without_user={events['user_id'].isna().sum()}")
    print(f"data_bytes={sum(len(data.encode()) for data in events['data'])}")
    if len(events):
        print(f"first={events['timestamp'].min():%Y-%m-%dT%H:%M:%SZ}")
        print(f"last={events['timestamp'].max():%Y-%m-%dT%H:%M:%SZ}")
    for entity_type, count in events["entity_type"].value_counts().sort_index().items():
        print(f"{entity_type}={count}")


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
