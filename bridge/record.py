"""The record on which the callbacks of one connection note what they saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bridge.errors import SessionEnded

if TYPE_CHECKING:
    from OpenSSL import SSL

    from bridge.context import Context


@dataclass(slots=True)
class Record:
    """What callbacks noted about one connection; its app data.  Belongs to the connection's owner.

    It also keeps *context* alive: OpenSSL goes on calling the SNI callback of the context a connection began
    with, even after the connection was switched to another.
    """

    context: Context
    """The context that made the connection."""
    routed: Context
    """The context whose certificate and rules hold: another one if SNI chose it."""
    owner: Callable[[], object] | None = None
    """Whose connection it is, for callbacks that want to know."""
    expected: str | None = None
    """The name that OpenSSL was told to look for in the peer's certificate."""
    error: SessionEnded | None = None
    """The first reason to refuse the peer.  A user's exception is its ``__cause__``."""
    to_be_remembered: bool = False
    """Whether this client's session is to be resumed later."""
    before_tickets: SSL.Session | None = field(default=None, repr=False)
    """Then: the session as the handshake left it; a TLS 1.3 ticket replaces it."""

    def note(self, error: SessionEnded, cause: BaseException | None = None) -> None:
        """Keep *error* if it is the first."""
        if self.error is None:
            error.__cause__ = cause
            self.error = error
