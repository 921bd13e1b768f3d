"""Signed tickets: what ``GetFlightInfo`` gives out, bound to whom it was given and for how long.

What lives here: making and opening them. What must not: what a ticket means (``ticket.py``), who calls (``auth.py``).

    signed.<base64url of JSON {"ticket", "until"}>.<base64url of its HMAC-SHA256>

A signed ticket adds to a plain one: the version and the encoding that were planned stay, and it is of no use to anybody else. It is no
capability: whoever redeems one is authenticated and gets what the same plain ticket would give.

Invariants
 1. The signature covers the ticket, its end of life and the caller's name and tenant; it is compared in constant time before anything is parsed.
 2. Servers behind one name must share a key, or a ticket of one is refused by the other; without a key every process makes its own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import datetime, timedelta

from fraiseql_pipeline.errors import TicketError
from fraiseql_pipeline.ticket import Ticket

_PREFIX = b"signed."


class Signer:
    """Signs tickets for callers. ``key``: shared by servers that redeem each other's; None: a random one."""

    def __init__(self, key: str | None, lifetime: timedelta) -> None:
        self._key = hashlib.sha256(key.encode()).digest() if key is not None else secrets.token_bytes(32)
        self._lifetime = lifetime

    def sign(self, ticket: Ticket, caller: str, now: datetime) -> tuple[bytes, datetime]:
        """The bytes of a ticket for one caller, and when they expire."""
        until = now + self._lifetime
        said = json.dumps({"ticket": ticket.json, "until": until.timestamp()}, ensure_ascii=False).encode()
        return b".".join((_PREFIX[:-1], urlsafe_b64encode(said), urlsafe_b64encode(self._mac(said, caller)))), until

    def opened(self, data: bytes, caller: str, now: datetime) -> bytes:
        """The ticket inside, or ``data`` itself if it is not signed. Raises ``TicketError`` for one that is not valid for this caller now."""
        if not data.startswith(_PREFIX):
            return data
        said, _, mac = data[len(_PREFIX) :].partition(b".")
        try:
            said, mac = urlsafe_b64decode(said), urlsafe_b64decode(mac)
        except ValueError:
            said, mac = b"", b""
        if not hmac.compare_digest(mac, self._mac(said, caller)):
            raise TicketError("The signed ticket was not given to this caller by this server; ask GetFlightInfo for a new one.")
        content = json.loads(said)
        if now.timestamp() >= content["until"]:
            raise TicketError("The signed ticket has expired; ask GetFlightInfo for a new one.")
        return str(content["ticket"]).encode()

    def _mac(self, said: bytes, caller: str) -> bytes:
        return hmac.digest(self._key, len(caller.encode()).to_bytes(4, "big") + caller.encode() + said, "sha256")
