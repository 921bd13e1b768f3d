"""Read the events of a ticket into a pandas frame and count them.

    python read_with_pandas.py [URL] [TICKET]

Needs fraiseql-pipeline and pandas.
"""

from __future__ import annotations

import argparse
import sys

from fraiseql_pipeline import connect
from fraiseql_pipeline.errors import PipelineError


def main(url: str, ticket: str) -> None:
    with connect(url) as client:
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
    chosen = arguments.parse_args()
    try:
        main(chosen.url, chosen.ticket)
    except PipelineError as refused:
        sys.exit(str(refused))
