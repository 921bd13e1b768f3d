"""Session options: what a client wants in all its tickets, kept by the client in a cookie.

What lives here: the options there are, the cookie they travel in, and how they fill a ticket. What must not: state. Every worker and
replica understands the cookie, and nothing has to expire; it says nothing a ticket could not say.

An option fills what a ticket leaves out; a ticket always wins. The cookie's name is the one of the Flight specification.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fraiseql_pipeline.errors import TicketError
from fraiseql_pipeline.ticket import Ticket

COOKIE = "arrow_flight_session_id"

#: Option → what its value is.
OPTIONS: dict[str, type] = {"batch_size": int, "codec": str, "profile": str}

_SOME = Ticket(start=datetime(2000, 1, 1, tzinfo=UTC), end=datetime(2000, 1, 2, tzinfo=UTC))


def check(name: str, value: Any) -> None:
    """Raises ``TicketError`` for a value that no ticket could have."""
    if not isinstance(value, OPTIONS[name]) or isinstance(value, bool):
        raise TicketError(f"The session option {name} must be of type {OPTIONS[name].__name__}.")
    filled(_SOME, {name: value})


def to_cookie(options: Mapping[str, Any]) -> str:
    """The value of a Set-Cookie header; no options: one that ends the session."""
    if not options:
        return f"{COOKIE}=; Max-Age=0"
    return f"{COOKIE}={base64.urlsafe_b64encode(json.dumps(options, sort_keys=True).encode()).decode().rstrip('=')}"


def from_cookies(headers: Sequence[str]) -> dict[str, Any]:
    """The options in the Cookie headers of a call. Raises ``TicketError`` for a cookie that is not one of this server's."""
    pairs = (pair.strip().partition("=") for header in headers for pair in header.split(";"))
    values = [value for name, _, value in pairs if name == COOKIE and value]
    if not values:
        return {}
    try:
        options = json.loads(base64.urlsafe_b64decode(values[-1] + "=" * (-len(values[-1]) % 4)))
        for name, value in options.items():
            check(name, value)
    except (binascii.Error, ValueError, KeyError, AttributeError, TypeError, RecursionError, TicketError):
        raise TicketError(
            f"The cookie {COOKIE} is not one this server sets; close the session and set its options again."
        ) from None
    return dict(options)


def filled(ticket: Ticket, options: Mapping[str, Any]) -> Ticket:
    """The ticket with the options it leaves out."""
    return replace(ticket, **{name: value for name, value in options.items() if getattr(ticket, name) is None})
