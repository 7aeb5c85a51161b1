"""The states of a session, in one table.

CONNECTING and HANDSHAKING end in CLOSED when they fail; nothing was delivered by then.  OPEN is full
duplex.  PEER_CLOSED: the peer said close_notify, we may still send.  DRAINING: this side called
`send_eof()`, `close()` or `unwrap()`; what was accepted before still leaves, then our close_notify, and
receiving goes on until the peer's.  CLOSED is final and keeps its first cause.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a session is in its life."""

    CONNECTING = "connecting"
    HANDSHAKING = "handshaking"
    OPEN = "open"
    PEER_CLOSED = "peer_closed"
    DRAINING = "draining"
    CLOSED = "closed"


TRANSITIONS: dict[State, dict[State, str]] = {
    State.CONNECTING: {
        State.HANDSHAKING: "TCP is connected",
        State.CLOSED: "no address answered, a deadline passed, or this side gave up",
    },
    State.HANDSHAKING: {
        State.OPEN: "handshake done, peer verified",
        State.CLOSED: "the handshake failed, a deadline passed, or this side gave up",
    },
    State.OPEN: {
        State.PEER_CLOSED: "the peer's close_notify",
        State.DRAINING: "send_eof(), close() or unwrap()",
        State.CLOSED: "an error, a deadline, or abort()",
    },
    State.PEER_CLOSED: {
        State.DRAINING: "send_eof(), close() or unwrap()",
        State.CLOSED: "an error, a deadline, or abort()",
    },
    State.DRAINING: {
        State.CLOSED: "both sides said close_notify, a deadline passed, an error, or abort()",
    },
    State.CLOSED: {},
}


class Aim(enum.IntEnum):
    """What this side wants of the session.  It only ever goes further: `close` overrules `unwrap`, not the reverse."""

    TALK = 0
    SEND_EOF = 1
    """Say close_notify after what was accepted, and go on reading."""
    HALF_CLOSE = 2
    """The same, and then half-close TCP too."""
    UNWRAP = 3
    """The same as SEND_EOF, and hand the socket back at the peer's close_notify."""
    CLOSE = 4
    """The same as HALF_CLOSE, and nobody will read what still comes."""
    HANG_UP = 5
    """The same as CLOSE, but TCP ends without a close_notify: nobody has said that this is all."""

    @property
    def call(self) -> str:
        """Which call says so."""
        return f"{Aim.SEND_EOF.name if self is Aim.HALF_CLOSE else self.name}()".lower()
