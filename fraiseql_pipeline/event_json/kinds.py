"""What reading and writing event JSON share: upstream's names for what happened, how a time is read.

What lives here: those two. What must not: lines.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

#: Upstream's ``event_type`` → ours. The change log knows more verbs; an ``EntityEvent`` has these four.
KINDS = {"INSERT": "Created", "UPDATE": "Updated", "DELETE": "Deleted", "CUSTOM": "Custom"}

#: A fraction of a second of up to nine digits, of which microseconds keep six.
_FINER = r"(\.[0-9]{6})[0-9]{1,3}([^0-9]|$)"


def timestamps(texts: pa.Array, schema: pa.Schema) -> pa.Array | None:
    """None if any text is not an ISO 8601 time with an offset, or out of the range of the type."""
    wanted = schema.field("timestamp").type
    try:
        return texts.cast(wanted)
    except pa.ArrowInvalid:
        if wanted.unit == "ns":
            return None
    try:
        return pc.replace_substring_regex(texts, _FINER, r"\1\2").cast(wanted)
    except pa.ArrowInvalid:
        return None
