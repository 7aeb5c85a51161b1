"""Addresses and the sockets behind them: found by name, made to listen, and taken over from whoever had them.

Any thread may call these; what they give belongs to nobody yet.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Sequence
from typing import Any

from bridge.dialer import Address, show_address
from bridge.errors import ConfigurationError
from bridge.names import PeerName

Place = tuple[str, int] | tuple[str, int, int, int] | str | bytes
"""Where to connect or to listen, as `socket.socket.getsockname` tells it: of IP, or a path, or an abstract name."""

_MOST_WAITING = 2**31 - 1
"""As listen(2) counts; no kernel comes near."""


def resolve(address: Place, passive: bool = False) -> tuple[str | None, tuple[Address, ...]]:
    """The host of *address*, if it has one, and all that its name stands for, in the order to be tried.

    *passive*: to listen there; no host, ``""``, is then every interface of IPv4, as for `socket.socket.bind`.
    ConfigurationError if it is no address, OSError if nobody knows it.
    """
    if isinstance(address, (str, bytes)):
        return None, (_unix(address, passive),)
    try:
        host, port, *more = address
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"address must be (host, port) or the path of a Unix socket, not {address!r}"
        ) from None
    _check_numbers(port, more)
    if not isinstance(host, str):
        raise ConfigurationError(f"the host must be a str, not {host!r}")
    try:  # Python itself encodes by IDNA 2003, and so would ask for another name than certificates hold
        name = host if host.isascii() else PeerName.parse(host).ascii
        if passive and not name:  # some systems tell "::" first, where others refuse IPv4
            name = "0.0.0.0"
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        service = f" and the service {port!r}" if isinstance(port, str) and not port.isdigit() else ""
        raise OSError(error.errno, f"cannot resolve {host!r}{service}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigurationError(f"{host!r} is no host name: {error.__cause__ or error}") from error
    return host, tuple(_scoped(one, more) for one in found)


def host_alone(address: Place) -> str | None:
    """*address* if it may be meant for a host, its port forgotten: the path of a Unix socket, without a slash."""
    path = os.fsdecode(address) if isinstance(address, (str, bytes)) else ""
    return None if not path or "/" in path or path.startswith("\0") else path


def _unix(path: str | bytes, passive: bool) -> Address:
    before, colon, after = os.fsdecode(path).rpartition(":")
    if colon and after.isdigit() and "/" not in before and not before.startswith("\0"):
        raise ConfigurationError(
            f"address must be (host, port), as ({before!r}, {after}), or the path of a Unix socket, not {path!r}"
        )
    family = getattr(socket, "AF_UNIX", None)
    if family is None:
        raise ConfigurationError(
            f"this system has no Unix sockets: address must be (host, port), not {path!r}"
        )
    alone = host_alone(path)
    if passive and alone is not None:
        raise ConfigurationError(
            f"address must be (host, port), as ({alone!r}, 443), not {path!r}; "
            f"for a Unix socket in the working directory write {'./' + alone!r}"
        )
    try:
        os.fsencode(path)
    except UnicodeError as error:
        raise ConfigurationError(f"address {path!r} is no path: {error}") from error
    return family, socket.SOCK_STREAM, 0, "", path


def _check_numbers(port: object, more: Sequence[object]) -> None:
    if isinstance(port, str) and port.isascii() and port:  # getaddrinfo takes no name for port 0
        port = int(port) if port.isdigit() else 0  # which stands for the name of a service
    if not _whole(port, 0xFFFF):
        raise ConfigurationError(f"the port must be a whole number from 0 to 65535, not {port!r}")
    bounds = (0xFFFFF, 0xFFFFFFFF)
    if len(more) > len(bounds) or not all(map(_whole, more, bounds)):
        raise ConfigurationError(
            f"after host and port an address has IPv6's flow information and scope, two numbers, not {more!r}"
        )


def _whole(number: object, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= most


def _scoped(found: Address, more: Sequence[int]) -> Address:
    """*found* with the flow information and scope that the address had, if it is one of IPv6."""
    family, kind, protocol, name, where = found
    if more and family == socket.AF_INET6:
        host, port, flow, scope = where
        where = (host, port, more[0] or flow, (more[1] if more[1:] else 0) or scope)
    return family, kind, protocol, name, where


class BoundPath:
    """The file of a Unix socket that was bound here, to be removed while that is open: no other has its number then."""

    def __init__(self, path: str | bytes) -> None:
        self._path = os.path.abspath(path)
        self._place = os.lstat(path)

    def remove(self) -> None:
        """Unless it is gone, or somebody else's by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._path), self._place):
                os.unlink(self._path)


def failed(doing: str, error: OSError, advice: str = "") -> OSError:
    """What to raise for *error*; Python itself finds that a path is too long for a Unix socket, and has no number."""
    return OSError(error.errno or errno.ENAMETOOLONG, f"{doing}: {error.strerror or error}{advice}")


def listening_socket(address: Place | socket.socket, backlog: int) -> tuple[socket.socket, BoundPath | None]:
    """A socket that listens on *address*, and its file if it has one; or *address* itself, taken over.

    OSError names what cannot be had.
    """
    backlog = min(backlog, _MOST_WAITING)
    if isinstance(address, socket.socket):
        _check_socket(address)
        sock = take_over(address)
        try:
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise failed("cannot listen on the socket given", error) from error
        return sock, None
    host, addresses = resolve(address, passive=True)
    family, kind, protocol, _, where = addresses[0]
    named = host is None and os.fsencode(where)[:1] not in (b"", b"\0")
    sock = socket.socket(family, kind, protocol)
    try:
        if host is not None and os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        path = BoundPath(where) if named else None
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        left = named and error.errno == errno.EADDRINUSE
        advice = "; remove the file if no program listens there" if left else ""
        raise failed(f"cannot listen on {show_address(where)}", error, advice) from error
    return sock, path


def _check_socket(sock: socket.socket) -> None:
    if isinstance(sock, ssl.SSLSocket):
        raise ConfigurationError(
            "sock is an ssl.SSLSocket, which does TLS already; pass the plain socket under it"
        )
    if not isinstance(sock, socket.socket):
        raise ConfigurationError(f"sock must be a socket.socket, not {sock!r}")
    if sock.fileno() == -1:
        raise ConfigurationError(
            "sock is closed, or was handed over before: who takes a socket over, has it alone"
        )
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
        raise ConfigurationError(
            f"sock is not connected ({error.strerror}); use Bridge.connect, or Bridge.listen"
        ) from error


def take_over(sock: socket.socket) -> socket.socket:
    """The descriptor of *sock* as a socket of ours, which does not block; *sock* is left without."""
    taken = socket.socket(fileno=sock.detach())
    taken.setblocking(False)
    return taken
