"""Arguments that several commands take, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import time
from typing import Any

import bridge
from bridge import starttls

VERSIONS = ("TLSv1.2", "TLSv1.3")


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPv6]:PORT``; ArgumentTypeError for anything else."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT (IPv6: [::1]:8443)")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{port!r} is not a port: a number from 0 to 65535")
    return host[1:-1] if bracketed else host, int(port)


def show_address(where: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """As `address` reads it."""
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclasses.dataclass(frozen=True)
class Positive:
    """A type for argparse: a positive number."""

    kind: type[int] | type[float]

    def __call__(self, text: str) -> float:
        """*text* as a number; ArgumentTypeError if it is not positive."""
        number = self.kind(text)
        if not 0 < number < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return number

    def __repr__(self) -> str:  # "invalid int value: 'x'"
        return self.kind.__name__


def silence(text: str) -> float:
    """A time in seconds, 0 or more; ArgumentTypeError for anything else."""
    seconds = float(text)
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor a positive number")
    return seconds


def add_password(parser: argparse.ArgumentParser) -> None:
    """What says how a private key is encrypted."""
    parser.add_argument("--password-file", metavar="FILE", help="its password: the first line of a file")


def password(arguments: argparse.Namespace) -> bytes | None:
    """The password of the private key, if one is given.  ConfigurationError if its file cannot be read."""
    path = arguments.password_file
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.readline().removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise bridge.ConfigurationError(f"cannot read the password in {path!r}: {error.strerror}") from error


def add_peer(parser: argparse.ArgumentParser) -> None:
    """What says which server to talk to, and on which terms."""
    parser.add_argument("address", type=address, metavar="HOST:PORT", help="IPv6: [::1]:8443")
    parser.add_argument(
        "--cafile", metavar="PEM", help="the CAs to trust, a file or a directory (default: the system's)"
    )
    parser.add_argument("--cert", metavar="PEM", help="this client's certificate, then its chain")
    parser.add_argument("--key", metavar="PEM", help="its private key (default: in --cert)")
    add_password(parser)
    parser.add_argument(
        "--server-name", metavar="NAME", help="who the server must prove to be (default: HOST)"
    )
    parser.add_argument("--alpn", default="", metavar="NAMES", help="protocols to offer: h2,http/1.1")
    parser.add_argument(
        "--min", choices=VERSIONS, default=VERSIONS[0], help="oldest version (default: %(default)s)"
    )
    parser.add_argument("--max", choices=VERSIONS, help="newest version")
    parser.add_argument(
        "--starttls", choices=starttls.PROTOCOLS, metavar="PROTOCOL", help=", ".join(starttls.PROTOCOLS)
    )
    parser.add_argument(
        "--timeout",
        type=Positive(float),
        default=10.0,
        metavar="S",
        help="seconds until it is connected (default: %(default)g)",
    )
    parser.add_argument("--insecure", action="store_true", help="talk to anybody: verify nothing")


def alpn(arguments: argparse.Namespace) -> list[str]:
    """The protocols to offer."""
    return [name for part in arguments.alpn.split(",") if (name := part.strip())]


def open_session(b: bridge.Bridge, arguments: argparse.Namespace) -> bridge.Session:
    """The session that *arguments* ask for, its handshake done.

    Raises ConfigurationError for files and names, `bridge.starttls.Refused`, OSError, or what `Bridge.adopt` does.
    """
    context = bridge.client_context(
        arguments.cafile,
        certfile=arguments.cert,
        keyfile=arguments.key or arguments.cert,
        password=password(arguments),
        alpn=alpn(arguments),
        verify=not arguments.insecure,
        minimum_version=arguments.min,
        maximum_version=arguments.max,
    )
    name = arguments.server_name or arguments.address[0]
    context.peer_name(name)
    deadline = time.monotonic() + arguments.timeout
    with _dial(_resolve(context, *arguments.address), deadline) as sock:
        if arguments.starttls:
            starttls.negotiate(arguments.starttls, sock, name, deadline)
        left = max(0.1, deadline - time.monotonic())
        return b.adopt(sock, context, server_hostname=name, timeout=left)


def _resolve(context: bridge.Context, host: str, port: int) -> list[Any]:
    """What `Bridge.connect` would ask for: Python's own names are those of IDNA 2003, which may be others'."""
    peer = None if host.isascii() else context.peer_name(host)
    try:
        return socket.getaddrinfo(host if peer is None else peer.ascii, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise bridge.ConfigurationError(f"{host!r} is no host name: {error.__cause__ or error}") from error


def _dial(addresses: list[Any], deadline: float) -> socket.socket:
    """A connection to the first of *addresses* that answers, each tried for its share of the time.  OSError."""
    failure = OSError("it has no address")
    for tried, (family, kind, protocol, _, where) in enumerate(addresses):
        try:
            with contextlib.ExitStack() as unless_connected:
                sock = unless_connected.enter_context(socket.socket(family, kind, protocol))
                sock.settimeout(max(0.01, deadline - time.monotonic()) / (len(addresses) - tried))
                sock.connect(where)
                unless_connected.pop_all()
                return sock
        except OSError as error:
            failure = error
    raise failure
