"""Read the events of a ticket into a polars frame, without a copy, and count them.

    python read_with_polars.py [URL] [TICKET]

Needs fraiseql-pipeline, which brings polars.
"""

from __future__ import annotations

import argparse
import sys

import polars as pl

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import PipelineError


def main(url: str, ticket: str) -> None:
    with connect(url) as client:
        events = client.polars(ticket)

    print(f"rows={len(events)}")
    print(f"without_user={events['user_id'].null_count()}")
    print(f"data_bytes={events['data'].str.len_bytes().sum()}")
    if len(events):
        print(f"first={events['timestamp'].min():%Y-%m-%dT%H:%M:%SZ}")
        print(f"last={events['timestamp'].max():%Y-%m-%dT%H:%M:%SZ}")
    for entity_type, count in events.group_by("entity_type").agg(pl.len()).sort("entity_type").iter_rows():
        print(f"{entity_type}={count}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description="Count the events of a ticket.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_argument("url", nargs="?", default="grpc://localhost:50051", help="the Flight server")
    arguments.add_argument("ticket", nargs="?", default="events:*:now-24h:now:10000", help="which events")
    chosen = arguments.parse_args()
    try:
        main(chosen.url, chosen.ticket)
    except PipelineError as refused:
        sys.exit(str(refused))
