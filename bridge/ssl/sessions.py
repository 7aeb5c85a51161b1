"""TLS sessions as the stdlib shows them: to be passed to `wrap_socket(session=...)` for resumption."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.connection import session_der
from bridge.ssl.facts import elements

if TYPE_CHECKING:
    from OpenSSL import SSL

_TIME, _TIMEOUT, _LIFETIME, _TICKET = 0xA1, 0xA2, 0xA9, 0xAA
"""The tags of what we look for in i2d_SSL_SESSION(3)."""


class SSLSession:
    """As `ssl.SSLSession`, whose attributes it has."""

    def __init__(self, raw: SSL.Session, context: object) -> None:
        self.raw = raw
        self.context = context
        """Where it may be used: the SSLContext it came from."""
        fields = list(elements(next(elements(session_der(raw)))[1]))
        tagged = dict(fields)
        self.id: bytes = fields[3][1]
        self.time = _number(tagged.get(_TIME))
        self.timeout = _number(tagged.get(_TIMEOUT))
        self.ticket_lifetime_hint = _number(tagged.get(_LIFETIME))
        self.has_ticket = _TICKET in tagged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SSLSession):
            return NotImplemented
        return self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


def _number(explicit: bytes | None) -> int:
    return 0 if explicit is None else int.from_bytes(next(elements(explicit))[1], "big")
