"""Memory: which allocator Arrow takes, and giving back to the system what is free.

What lives here: the two calls. What must not: when they are due; whoever makes much garbage knows that.
"""

from __future__ import annotations

import pyarrow as pa


def share_malloc() -> None:
    """One allocator for Arrow and for the driver that reads Postgres, so that what one frees serves the other; pyarrow's own keeps up to 100 MiB
    of it. For a program to choose, not for a library.
    """
    pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Have the allocators return what they hold free: what one thread makes and another frees leaves holes that they keep."""
    pool = pa.default_memory_pool()
    pool.release_unused()
    # The driver's buffers come from malloc, whatever Arrow's own pool is. Asking it twice would cost milliseconds.
    if pool.backend_name != "system":
        pa.system_memory_pool().release_unused()
