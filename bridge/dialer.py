"""Making a TCP connection without sleeping: one address after the other, each with its share of the time."""

from __future__ import annotations

import errno
import socket
from typing import Any

from bridge.errors import ConnectFailed, system_error
from bridge.poll import Want

Address = tuple[int, int, int, str, Any]
"""As `socket.getaddrinfo` gives it: family, type, protocol, canonical name, address."""


_NOT_YET = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY)
_AF_UNIX = getattr(socket, "AF_UNIX", None)
RETRY = 0.02
"""Seconds until a Unix socket whose backlog is full is tried again."""


class Dialer:
    """Tries *addresses* in turn; all but the last leave time for the others until *until* (monotonic; None: no end).

    Sockets that came to nothing go to *retired*; the owner closes them once they have left the poll set.
    """

    def __init__(
        self, addresses: tuple[Address, ...], until: float | None, retired: list[socket.socket]
    ) -> None:
        self._addresses = list(addresses)
        self._until = until
        self.sock: socket.socket | None = None
        self.deadline: float | None = None
        """When the address being tried has used up its share; None for the last, for which others keep the time."""
        self._retired = retired

    def dial(self, now: float) -> socket.socket | Want:
        """The connected socket, or Want.WRITE while one is being tried; ConnectFailed when none is left."""
        if self.sock is not None and self.deadline is not None and now >= self.deadline:
            self._give_up(OSError(errno.ETIMEDOUT, "no answer"))
        while True:
            try:
                failure = self._try(now)
            except OSError as error:
                self._give_up(error)
                continue
            if failure in (0, errno.EISCONN):
                assert self.sock is not None
                return self.sock
            if failure in _NOT_YET:
                if failure == errno.EAGAIN and self._addresses[0][0] == _AF_UNIX:
                    self._try_later(now)
                return Want.WRITE
            self._give_up(system_error(failure))

    def _try(self, now: float) -> int:
        family, kind, protocol, _, address = self._addresses[0]
        if self.sock is not None:
            return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self.sock.connect_ex(address)
        last = len(self._addresses) == 1
        self.deadline = (
            None if last or self._until is None else now + (self._until - now) / len(self._addresses)
        )
        self.sock = socket.socket(family, kind, protocol)
        self.sock.setblocking(False)
        return self.sock.connect_ex(address)

    def _try_later(self, now: float) -> None:
        """The backlog is full, of a Unix socket: no attempt is under way, and no poll says when there is room."""
        self._abandon()
        self.deadline = now + RETRY

    def _abandon(self) -> None:
        if self.sock is not None:
            self._retired.append(self.sock)
            self.sock = None

    def _give_up(self, error: OSError) -> None:
        address = self._addresses.pop(0)[4]
        self._abandon()
        if not self._addresses:
            why = error.strerror or error
            raise ConnectFailed(f"cannot connect to {show_address(address)}: {why}") from error


def show_address(address: Any) -> str:
    """*address* as a person writes it: host:port, [v6]:port, a path, or the @name of an abstract Unix socket."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    raw = address if isinstance(address, bytes) else str(address).encode(errors="backslashreplace")
    text = raw.decode(errors="backslashreplace")
    return "@" + text[1:] if text.startswith("\0") else text
