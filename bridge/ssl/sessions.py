"""TLS sessions as the stdlib shows them: to be passed to `wrap_socket(session=...)` for resumption."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bridge.connection import session_der
from bridge.ssl.facts import elements

if TYPE_CHECKING:
    from OpenSSL import SSL

_TIME, _TIMEOUT, _LIFETIME, _TICKET = 0xA1, 0xA2, 0xA9, 0xAA
"""The tags of what we look for in i2d_SSL_SESSION(3)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SSLSession:
    """As `ssl.SSLSession`, whose attributes it has."""

    raw: SSL.Session
    context: object
    """Where it may be used: the SSLContext it came from."""
    core: object
    """What that had made of its settings, which OpenSSL resumes nothing without."""
    id: bytes
    time: int
    timeout: int
    ticket_lifetime_hint: int
    has_ticket: bool

    @classmethod
    def of(cls, raw: SSL.Session, context: object, core: object) -> SSLSession:
        """What can be said about *raw*."""
        fields = list(elements(next(elements(session_der(raw)))[1]))
        tagged = dict(fields)
        return cls(
            raw,
            context,
            core,
            id=fields[3][1],
            time=_number(tagged.get(_TIME)),
            timeout=_number(tagged.get(_TIMEOUT)),
            ticket_lifetime_hint=_number(tagged.get(_LIFETIME)),
            has_ticket=_TICKET in tagged,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SSLSession):
            return NotImplemented
        return self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


def _number(explicit: bytes | None) -> int:
    return 0 if explicit is None else int.from_bytes(next(elements(explicit))[1], "big")
