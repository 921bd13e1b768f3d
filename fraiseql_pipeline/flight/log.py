"""The log of a server.

What lives here: what a line of it looks like, and what is kept out of it. What must not: what is logged.
"""

from __future__ import annotations

import logging
import time


def log_to_stderr() -> None:
    """A line per warning, beginning with the time in UTC. For the process of a server and for those it starts."""
    lines = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    lines.converter = time.gmtime
    stderr = logging.StreamHandler()
    stderr.setFormatter(lines)
    logging.basicConfig(level=logging.WARNING, handlers=[stderr])
    # gRPC's binding writes down whole headers that are not ASCII, and one of them may be a token with something behind it.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL + 1)
