"""The owner's half of a listener: it accepts, and does nothing else.

The handshake of what it accepted is a session's business, on whatever worker that has; so one silent
client costs a file descriptor and delays nobody.  When the process is out of descriptors, or a limit is
reached, the listening socket leaves the poll set for a moment and clients wait in the kernel's backlog;
that is logged once, not once an attempt.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from bridge import events
from bridge.addresses import BoundPath
from bridge.errors import SessionEnded
from bridge.poll import NOTHING, Want

ACCEPT_BUDGET = 64
"""Connections accepted in one turn, before sessions have theirs."""
PAUSE = 0.1
"""Seconds until a paused listener looks again."""


class Acceptor:
    """A listening socket in a worker's care, and its file if *path* is one to be removed.

    *admit* takes each accepted socket and its peer's address; *refuses* says why not now.
    """

    def __init__(
        self,
        sock: socket.socket,
        path: BoundPath | None,
        name: str,
        admit: Callable[[socket.socket, Any], None],
        refuses: Callable[[], str | None],
        closed: Callable[[], None],
    ) -> None:
        self.lock = threading.RLock()  # no other thread has any business here
        self.sock: socket.socket | None = sock
        self.mask: int = Want.READ
        self.again = False
        self.deadline: float | None = None
        self.finished = False
        self.retired: list[socket.socket] = []
        self.now = 0.0
        self._path = path
        self._name = name
        self._admit = admit
        self._refuses = refuses
        self._closed = closed
        self._paused = False
        self._exhausted: str | None = None

    def drop(self) -> None:
        """Close the listening socket, which no worker has been given."""
        assert self.sock is not None
        if self._path is not None:
            self._path.remove()
        self.sock.close()

    def start(self) -> None:
        """The first command: the listener has come to its worker."""

    def turn(self, ready: int, now: float) -> bool:
        """Accept what is there."""
        self.now = now
        if self.finished:
            return True
        reason = None
        for _ in range(ACCEPT_BUDGET):
            reason = self._refuses()
            if reason is not None or not self._accept_one():
                break
        if reason is None and self._exhausted is not None:
            reason = self._exhausted
        self._pause(reason)
        return True

    def _accept_one(self) -> bool:
        assert self.sock is not None
        self._exhausted = None
        try:
            sock, peer = self.sock.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return False
        except OSError as error:  # out of descriptors or memory, or the network is down: it may pass
            self._exhausted = error.strerror or repr(error)
            return False
        sock.setblocking(False)
        self._admit(sock, peer)
        return True

    def _pause(self, reason: str | None) -> None:
        if reason is None:
            self.mask, self.deadline = Want.READ, None
            if self._paused:
                events.info("listener.resumed", address=self._name)
        else:
            self.mask, self.deadline = NOTHING, self.now + PAUSE
            if not self._paused:
                events.warning("listener.paused", address=self._name, reason=reason)
        self._paused = reason is not None

    def end(self, cause: SessionEnded, *, linger: bool = True) -> None:
        """Close the listening socket."""
        if not self.finished:
            self.finished = True
            assert self.sock is not None
            if self._path is not None:
                self._path.remove()
            self.retired.append(self.sock)
            self.sock = None
            events.info("listener.closed", address=self._name)

    opening = False
    moved = 0

    def evidence(self) -> None:
        """It moves no bytes; a client that others of the same socket accepted first is no bug."""

    def stalled(self, turns: int, whose: str) -> None:
        """Never called, for want of evidence."""

    def gone(self) -> None:
        """The socket is closed."""
        self._closed()
