"""STARTTLS: the few words in plain text that come before the handshake, for each protocol that has them.

`negotiate` reads byte by byte where a byte too many could be one of TLS.  All of it has one deadline, and whatever the
peer says is bounded by `LONGEST`.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Callable

LONGEST = 64 * 1024
"""Bytes of an answer, before it is refused."""
_FEATURES = re.compile(rb"</(\w+:)?features>|<(\w+:)?features\s*/>")
"""The tag that ends what an XMPP server offers."""
_END = re.compile(rb"</.*>|<.*/>", re.DOTALL)
"""That which ends an element without others in it."""


class Refused(Exception):
    """The peer does not offer TLS, or does not speak the protocol.  The message is for people."""


def negotiate(protocol: str, sock: socket.socket, server_name: str, deadline: float) -> None:
    """Have the peer begin TLS on *sock* until *deadline* (monotonic).  Refused if it does not.  The caller's thread."""
    try:
        _PROTOCOLS[protocol](_Peer(sock, deadline), server_name)
    except TimeoutError:
        raise Refused(
            "no answer in plain text in time; it may speak TLS from the first byte, without --starttls"
        ) from None
    except OSError as error:
        raise Refused(f"the connection failed before TLS began: {error.strerror or error}") from error


class _Peer:
    """The other end of *sock*, heard and spoken to until *deadline*; TimeoutError after it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def say(self, data: bytes) -> None:
        self._patient().sendall(data)

    def receive(self, size: int) -> bytes:
        if size > LONGEST:
            raise Refused(f"the peer announces an answer of {size} bytes; it does not speak this protocol")
        data = b""
        while len(data) < size:
            part = self._patient().recv(size - len(data))
            if not part:
                raise Refused("the peer hung up before TLS began")
            data += part
        return data

    def until(self, ends: Callable[[bytes], object]) -> bytes:
        data = b""
        while not ends(data):
            if len(data) >= LONGEST:
                raise Refused(f"the peer's answer does not end after {LONGEST} bytes")
            data += self.receive(1)
        return data

    def line(self) -> str:
        return self.until(lambda data: data.endswith(b"\n")).decode("utf-8", "replace").rstrip("\r\n")

    def lines(self, goes_on: Callable[[list[str]], bool]) -> list[str]:
        """Those of an answer that *goes_on* after the lines so far."""
        lines, size = [self.line()], 0
        while goes_on(lines):
            size += len(lines[-1]) + 1
            if size > LONGEST:
                raise Refused(f"the peer's answer does not end after {LONGEST} bytes")
            lines.append(self.line())
        return lines

    def replies(self) -> list[str]:
        """The lines of a reply of SMTP or FTP (RFC 5321, 4.2; RFC 959, 4.2): the last may be the bare code."""
        return self.lines(lambda lines: lines[0][3:4] == "-" and f"{lines[-1]} "[:4] != f"{lines[0][:3]} ")

    def _patient(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock


def _expect(line: str, wanted: str, doing: str) -> None:
    if not line.upper().startswith(wanted):
        raise Refused(f"{doing}: the peer said {line[:200]!r}")


def _smtp(peer: _Peer, _: str) -> None:
    """RFC 3207."""
    _expect(peer.replies()[0], "220", "waiting for an SMTP greeting")
    peer.say(b"EHLO localhost\r\n")
    offered = peer.replies()
    _expect(offered[0], "250", "after EHLO")
    if not any(line[4:].strip().upper() == "STARTTLS" for line in offered):
        raise Refused("this SMTP server does not offer STARTTLS")
    peer.say(b"STARTTLS\r\n")
    _expect(peer.replies()[0], "220", "after STARTTLS")


def _ftp(peer: _Peer, _: str) -> None:
    """RFC 4217."""
    _expect(peer.replies()[0], "220", "waiting for an FTP greeting")
    peer.say(b"AUTH TLS\r\n")
    _expect(peer.replies()[0], "234", "after AUTH TLS")


def _imap(peer: _Peer, _: str) -> None:
    """RFC 9051, 6.2.1."""
    _expect(peer.line(), "* OK", "waiting for an IMAP greeting")
    peer.say(b"a1 STARTTLS\r\n")
    answer = peer.lines(lambda lines: lines[-1].startswith("* "))
    _expect(answer[-1], "A1 OK", "after STARTTLS")


def _pop3(peer: _Peer, _: str) -> None:
    """RFC 2595, 4."""
    _expect(peer.line(), "+OK", "waiting for a POP3 greeting")
    peer.say(b"STLS\r\n")
    _expect(peer.line(), "+OK", "after STLS")


def _postgres(peer: _Peer, _: str) -> None:
    """SSLRequest (PostgreSQL's protocol, 53.2.10)."""
    peer.say(struct.pack("!II", 8, 80877103))
    answer = peer.receive(1)
    if answer == b"N":
        raise Refused("this PostgreSQL server is not configured for TLS (ssl = off)")
    if answer != b"S":
        raise Refused(f"this is not a PostgreSQL server: it answered {answer!r} to SSLRequest")


def _mysql(peer: _Peer, _: str) -> None:
    """Protocol::SSLRequest of MySQL's client/server protocol."""
    size, number = struct.unpack("<IB", peer.receive(3) + b"\0" + peer.receive(1))
    greeting = peer.receive(size)
    if greeting[:1] == b"\xff":
        raise Refused(f"the MySQL server refused: {greeting[3:].decode('utf-8', 'replace')}")
    version_end = greeting.find(b"\0", 1)
    at = version_end + 1 + 4 + 8 + 1  # thread id, half of a salt, filler
    if greeting[:1] != b"\x0a" or version_end < 0 or len(greeting) < at + 2:
        raise Refused("this is not a MySQL server: its greeting is not one of protocol 10")
    protocol_41, ssl, secure_connection = 0x200, 0x800, 0x8000
    if not int.from_bytes(greeting[at : at + 2], "little") & ssl:
        raise Refused("this MySQL server is not configured for TLS")
    asked = struct.pack("<IIB23x", protocol_41 | ssl | secure_connection, 1 << 24, 45)
    peer.say(len(asked).to_bytes(3, "little") + bytes(((number + 1) & 0xFF,)) + asked)


def _ldap(peer: _Peer, _: str) -> None:
    """StartTLS, an extended operation (RFC 4511, 4.14)."""
    name = b"1.3.6.1.4.1.1466.20037"
    operation = bytes((0x80, len(name))) + name
    message = b"\x02\x01\x01\x77" + bytes((len(operation),)) + operation
    peer.say(b"\x30" + bytes((len(message),)) + message)
    if peer.receive(1) != b"\x30":
        raise Refused("this is not an LDAP server: its answer is not an LDAPMessage")
    answer = peer.receive(_ber_length(peer))
    code = re.search(rb"\x0a\x01(.)", answer, re.DOTALL)  # resultCode, the first ENUMERATED
    if code is None or code[1] != b"\0":
        shown = "no result code" if code is None else f"result code {code[1][0]}"
        raise Refused(f"the LDAP server refused StartTLS: {shown}")


def _ber_length(peer: _Peer) -> int:
    first = peer.receive(1)[0]
    return first if first < 0x80 else int.from_bytes(peer.receive(first & 0x7F), "big")


def _xmpp(peer: _Peer, server_name: str) -> None:
    """RFC 6120, 5.4."""
    domain = re.sub(r"[^\w.-]", "", server_name)
    peer.say(
        "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'"
        f" version='1.0' to='{domain}'>".encode()
    )
    offered = peer.until(lambda data: _FEATURES.fullmatch(_last_tag(data)))
    if b"urn:ietf:params:xml:ns:xmpp-tls" not in offered:
        raise Refused("this XMPP server does not offer STARTTLS")
    peer.say(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    answer = peer.until(lambda data: _END.fullmatch(_last_tag(data)))
    if b"<proceed" not in answer:
        raise Refused(f"after <starttls/>: the peer said {answer[:200]!r}")


def _last_tag(data: bytes) -> bytes:
    return data[data.rfind(b"<") :] if data.endswith(b">") else b""


_PROTOCOLS: dict[str, Callable[[_Peer, str], None]] = {
    "smtp": _smtp,
    "imap": _imap,
    "pop3": _pop3,
    "ftp": _ftp,
    "postgres": _postgres,
    "mysql": _mysql,
    "ldap": _ldap,
    "xmpp": _xmpp,
}
PROTOCOLS = tuple(_PROTOCOLS)
