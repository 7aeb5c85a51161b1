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
        State.CLOSED: "both sides said close_notify, or a deadline passed",
    },
    State.CLOSED: {},
}
