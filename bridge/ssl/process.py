"""The bridge of this process: started at first use, a new one after fork(), closed at exit."""

from __future__ import annotations

import dataclasses
import os
import threading

from bridge.bridge import Bridge
from bridge.limits import Timeouts

TIMEOUTS = Timeouts(write_stall=None, flush=30.0, close_notify=2.0)
"""A socket's own time-out rules while it is open; these bound what happens when nobody waits: the handshake of an
accepted connection, and what is left to do after the close."""
UNHURRIED = dataclasses.replace(TIMEOUTS, handshake=None)
"""For a handshake that its caller makes: the socket's time-out is its deadline."""

_lock = threading.RLock()  # as a signal handler may come in the middle, and make a socket
_bridge: Bridge | None = None


def default_bridge() -> Bridge:
    """The one Bridge that all sockets of this process share.  Any thread.

    To close it is allowed: its sockets end, and the next use makes another.
    """
    global _bridge
    with _lock:
        if _bridge is None or _bridge.closed:
            made = Bridge(timeouts=TIMEOUTS)
            if _bridge is not None and not _bridge.closed:  # by a signal handler, meanwhile
                made.close()
            else:
                _bridge = made
        return _bridge


def _in_child() -> None:
    global _lock, _bridge
    _lock, _bridge = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
