"""Read the events of a ticket into a polars frame, without a copy, and count them.

    python read_with_polars.py grpc://localhost:50051 'events:Order:now-1h:now:10000'

Needs fraiseql-pipeline, which brings polars.
"""

from __future__ import annotations

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
    try:
        main(*sys.argv[1:])
    except PipelineError as refused:
        sys.exit(str(refused))
