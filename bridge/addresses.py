"""Addresses and the sockets behind them: found by name, made to listen, and taken over from whoever had them.

Any thread may call these; what they give belongs to nobody yet.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from bridge.dialer import Address, show_address
from bridge.errors import ConfigurationError
from bridge.names import PeerName


def resolve(address: tuple[str, int] | str) -> tuple[str | None, tuple[Address, ...]]:
    """The host of *address*, if it has one, and all that its name stands for, in the order to be tried.

    ConfigurationError if it is no address, OSError if nobody knows it.
    """
    if isinstance(address, str):
        before, colon, after = address.rpartition(":")
        if colon and after.isdigit() and "/" not in address:
            raise ConfigurationError(
                f"address must be (host, port), as ({before!r}, {after}), or the path of a Unix socket, not {address!r}"
            )
        family = getattr(socket, "AF_UNIX", None)
        if family is None:
            raise ConfigurationError(
                f"this system has no Unix sockets: address must be (host, port), not {address!r}"
            )
        return None, ((family, socket.SOCK_STREAM, 0, "", address),)
    try:
        host, port = address[:2]
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"address must be (host, port) or the path of a Unix socket, not {address!r}"
        ) from None
    number = isinstance(port, int) and not isinstance(port, bool) and 0 <= port <= 65535
    if not number and not isinstance(port, str):  # which is the name of a service
        raise ConfigurationError(f"the port must be a whole number from 0 to 65535, not {port!r}")
    if not isinstance(host, str):
        raise ConfigurationError(f"the host must be a str, not {host!r}")
    try:  # Python itself encodes by IDNA 2003, and so would ask for another name than certificates hold
        name = host if host.isascii() else PeerName.parse(host).ascii
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(error.errno, f"cannot resolve {host!r}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigurationError(f"{host!r} is no host name: {error.__cause__ or error}") from error
    return host, tuple(found)


def listening_socket(address: tuple[str, int] | str | socket.socket, backlog: int) -> socket.socket:
    """A socket that listens on *address*, or *address* itself, taken over.  OSError names what cannot be had."""
    if isinstance(address, socket.socket):
        _check_socket(address)
        sock = take_over(address)
        try:
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on the socket given: {error.strerror}") from error
        return sock
    host, addresses = resolve(address)
    family, kind, protocol, _, where = addresses[0]
    sock = socket.socket(family, kind, protocol)
    try:
        if host is not None and os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {show_address(where)}: {error.strerror}") from error
    return sock


def _check_socket(sock: socket.socket) -> None:
    if isinstance(sock, ssl.SSLSocket):
        raise ConfigurationError(
            "sock is an ssl.SSLSocket, which does TLS already; pass the plain socket under it"
        )
    if not isinstance(sock, socket.socket):
        raise ConfigurationError(f"sock must be a socket.socket, not {sock!r}")
    if sock.fileno() == -1:
        raise ConfigurationError("sock is closed")
    if sock.type != socket.SOCK_STREAM:
        raise ConfigurationError(f"sock must be a stream socket, not {sock.type!r}: TLS runs over streams")


def connected_to(sock: socket.socket) -> Any:
    """The address of *sock*'s peer; a ConfigurationError for what could never be a session's socket."""
    _check_socket(sock)
    try:
        return sock.getpeername()
    except OSError as error:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            # It was connected, until the peer reset it: that is the session's end, and no fault of the call.
            return "a peer that has gone already"
        raise ConfigurationError(f"sock is not connected ({error.strerror}); use Bridge.connect") from error


def take_over(sock: socket.socket) -> socket.socket:
    """The descriptor of *sock* as a socket of ours, which does not block; *sock* is left without."""
    taken = socket.socket(fileno=sock.detach())
    taken.setblocking(False)
    return taken
