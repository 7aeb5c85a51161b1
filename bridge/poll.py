"""Waiting for sockets: the only module that sleeps on file descriptors.

Theory of operation
-------------------
OpenSSL on a non-blocking socket never waits.  When it cannot go on it says what it waits for, WANT_READ or
WANT_WRITE, and *that has nothing to do with which call was made*: a read may have to write (a
renegotiation, the answer to a KeyUpdate) and a write may have to read.  Whoever owns the socket sleeps until
the wanted direction is ready and makes the same call again.  That owner is a worker, and here is its bed.

Three rules keep the sleep honest:

* The mask is made of wants and of nothing else, so a spin (armed for write, waiting for read) cannot happen.
* A session that wants nothing leaves the poll set altogether: `poll` reports a hang-up even for an empty
  mask, at once and for ever.
* Readable means bytes on the wire, not a message.  It is a hint to call OpenSSL again and nothing more.
"""

from __future__ import annotations

import enum
import selectors
import socket
from typing import Generic, TypeVar

T = TypeVar("T")

NOTHING = 0
LONGEST_SLEEP = 86_400.0
"""Seconds; epoll counts its milliseconds in 31 bits."""


class Want(enum.IntEnum):
    """What OpenSSL waits for.  The values are the selectors' event bits, so wants add up to a mask."""

    READ = selectors.EVENT_READ
    WRITE = selectors.EVENT_WRITE


class Poller(Generic[T]):
    """Sockets, what each is waited for, and who is to be told.  Owned by one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, sock: socket.socket, mask: int, told: T) -> None:
        """Wait for *mask* on *sock* from now on, for *told*."""
        self._selector.register(sock, mask, told)

    def change(self, sock: socket.socket, mask: int, told: T) -> None:
        """Wait for *mask* instead."""
        self._selector.modify(sock, mask, told)

    def forget(self, sock: socket.socket) -> None:
        """Wait for *sock* no longer; to be called before it is closed or handed on."""
        self._selector.unregister(sock)

    def wait(self, timeout: float | None) -> list[tuple[T, int]]:
        """Sleep until a socket is ready, at most *timeout* seconds (None: for ever, 0: only look), or a day."""
        at_most = timeout if timeout is None else min(timeout, LONGEST_SLEEP)
        return [(key.data, mask) for key, mask in self._selector.select(at_most)]

    def close(self) -> None:
        """Release the operating system's poll object."""
        self._selector.close()


class Doorbell:
    """Wakes a thread out of `Poller.wait`.  `ring` from any thread; the rest belongs to the sleeper.

    A socket pair, because it works with every selector on every system.  A ring that finds the pair full is
    dropped: whoever filled it has rung already.
    """

    def __init__(self) -> None:
        self.socket, self._button = socket.socketpair()
        self.socket.setblocking(False)
        self._button.setblocking(False)

    def ring(self) -> None:
        """Wake the sleeper, now or at its next sleep.  Never waits; reentrant; harmless after `close`."""
        try:
            self._button.send(b"\0")
        except OSError:
            pass

    def silence(self) -> None:
        """Forget all rings so far."""
        try:
            while self.socket.recv(1024):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Release both ends."""
        self.socket.close()
        self._button.close()
