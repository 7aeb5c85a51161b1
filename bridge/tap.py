"""A connection that says what is asked of OpenSSL, what it answers, and which records and messages pass.

It stands in the place of a plain `Connection` while `bridge.trace` is on, and is not there otherwise.  Sizes and
names only: never a payload, a key or a secret.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from OpenSSL import SSL
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _lib

from bridge import forks
from bridge.connection import Connection

T = TypeVar("T")

HEADER, INNER_TYPE = 0x100, 0x101  # SSL_CTX_set_msg_callback(3)
CONTENT = {20: "change cipher spec", 21: "alert", 22: "handshake", 23: "application data"}
"""RFC 8446, 5.1."""
MESSAGES = {
    0: "HelloRequest",
    1: "ClientHello",
    2: "ServerHello",
    4: "NewSessionTicket",
    5: "EndOfEarlyData",
    8: "EncryptedExtensions",
    11: "Certificate",
    12: "ServerKeyExchange",
    13: "CertificateRequest",
    14: "ServerHelloDone",
    15: "CertificateVerify",
    16: "ClientKeyExchange",
    20: "Finished",
    22: "CertificateStatus",
    24: "KeyUpdate",
    25: "CompressedCertificate",
}
"""RFC 8446, 4; RFC 5246, 7.4; RFC 8879."""
ALERTS = {
    0: "close_notify",
    10: "unexpected_message",
    20: "bad_record_mac",
    22: "record_overflow",
    40: "handshake_failure",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    100: "no_renegotiation",
    109: "missing_extension",
    110: "unsupported_extension",
    112: "unrecognized_name",
    113: "bad_certificate_status_response",
    115: "unknown_psk_identity",
    116: "certificate_required",
    120: "no_application_protocol",
}
"""RFC 8446, 6."""


@dataclasses.dataclass(frozen=True)
class TraceEvent:
    """Something that a thread did, at the moment it was done."""

    number: int
    """Counted from 0."""
    at: float
    """Seconds since the trace began."""
    seconds: float
    """How long it took; 0 for what has no length."""
    lane: str
    """The kind of thread: ``"application"``, ``"coordinator"`` or ``"worker"``."""
    thread: str
    kind: str
    """``"call"`` of OpenSSL, ``"sleep"`` of a thread, ``"record"``, ``"message"`` of a handshake, ``"alert"``,
    ``"queue"`` for what crosses between threads, or ``"api"`` for what the application calls."""
    what: str
    session: str
    """Which connection, ``"client 1"``; empty if it is of none, or of several."""
    asked: int | None
    """Bytes; for a sleep none."""
    answered: int | None
    """Bytes; of a record those behind its header."""
    outcome: str
    """``"ok"``, ``"WANT_READ"``, ``"sent"``, ``"received"``; for a sleep what ended it."""

    def __str__(self) -> str:
        if self.kind == "sleep":
            return f"slept {_milliseconds(self.seconds)}, woken by {self.outcome}"
        if self.kind == "queue":
            return f"took {self.answered} words from the mailbox"
        if self.kind in ("record", "message", "alert"):
            return f"{self.outcome} {self.kind} {self.what}, {self.answered} bytes"
        asked = "" if self.asked is None else f"{self.asked}"
        answer = self.outcome if self.answered is None else f"{self.answered} bytes"
        return f"{self.what}({asked}) = {answer}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


class Note(Protocol):
    """Where a tap writes.  Any thread; never waits, never raises."""

    def __call__(
        self,
        kind: str,
        what: str,
        *,
        session: str = "",
        asked: int | None = None,
        answered: int | None = None,
        outcome: str = "",
        started: float | None = None,
    ) -> None:
        """Keep an event of the calling thread."""


_calling = threading.local()  # the connection in whose call this thread is
_making = forks.open_lock()  # of a context's message callback, while a connection copies it


def _on_message(write: int, _: int, kind: int, data: Any, size: int, *__: object) -> None:
    tapped: TappedConnection | None = getattr(_calling, "connection", None)
    if tapped is not None and size:
        tapped.passed("sent" if write else "received", kind, bytes(_ffi.buffer(data, min(size, 5))), size)


_callback: Any = _ffi.callback(
    "void (*)(int, int, int, const void *, size_t, SSL *, void *)", _on_message, onerror=lambda *_: None
)


class TappedConnection(Connection):
    """A connection whose calls and messages are told to *note*.  Belongs to one thread at a time."""

    def __init__(self, raw: SSL.Context, sock: socket.socket | None, name: str, note: Note) -> None:
        self._note, self._name = note, name
        self._inner: str | None = None
        self._header: tuple[str, str, int] | None = None
        with _making:  # SSL_new(3) copies it, and there is none to set for a connection alone
            native = getattr(raw, "_context", None)
            _lib.SSL_CTX_set_msg_callback(native, _callback)
            try:
                super().__init__(raw, sock)
            finally:
                _lib.SSL_CTX_set_msg_callback(native, _ffi.NULL)

    def do_handshake(self) -> None:
        """As `Connection.do_handshake`."""
        self._tell("SSL_do_handshake", None, lambda: super(TappedConnection, self).do_handshake())

    def recv(self, bufsiz: int, flags: int | None = None) -> bytes:
        """As `Connection.recv`."""
        name = "SSL_peek" if flags else "SSL_read"
        return self._tell(name, bufsiz, lambda: super(TappedConnection, self).recv(bufsiz, flags))

    def send(self, buf: Any, flags: int = 0) -> int:
        """As `Connection.send`."""
        return self._tell("SSL_write", len(buf), lambda: super(TappedConnection, self).send(buf, flags))

    def shutdown(self) -> bool:
        """As `Connection.shutdown`."""
        return self._tell("SSL_shutdown", None, lambda: super(TappedConnection, self).shutdown())

    def renegotiate(self) -> bool:
        """As `Connection.renegotiate`."""
        return self._tell("SSL_renegotiate", None, lambda: super(TappedConnection, self).renegotiate())

    def _tell(self, what: str, asked: int | None, call: Callable[[], T]) -> T:
        started, outcome, answered = time.monotonic(), "ok", None
        outer = getattr(_calling, "connection", None)  # if a callback of its call makes this one
        _calling.connection = self
        try:
            result = call()
            answered = len(result) if isinstance(result, bytes) else result if asked is not None else None
            return result
        except Exception as error:
            outcome = _OUTCOMES.get(type(error)) or type(error).__name__
            raise
        finally:
            _calling.connection = outer
            self._flush_record()
            self._note(
                "call",
                what,
                session=self._name,
                asked=asked,
                answered=answered if isinstance(answered, int) else None,
                outcome=outcome,
                started=started,
            )

    def passed(self, direction: str, kind: int, data: bytes, size: int) -> None:
        """OpenSSL says that *data* begins something of *kind*.  In the middle of a call."""
        if kind == HEADER and len(data) == 5:
            self._flush_record()
            content = self._inner or CONTENT.get(data[0], f"content type {data[0]}")
            self._header, self._inner = (direction, content, int.from_bytes(data[3:5], "big")), None
        elif kind == INNER_TYPE:  # follows its header; in OpenSSL 3.0 a sent one goes before
            self._inner = CONTENT.get(data[0], f"content type {data[0]}")
            if self._header is not None:
                self._header, self._inner = (direction, self._inner, self._header[2]), None
                self._flush_record()
        elif kind in (21, 22):
            self._flush_record()
            known = kind == 22 and MESSAGES.get(data[0])
            what = known or f"handshake message {data[0]}"
            if kind == 21 and len(data) > 1:
                what = ALERTS.get(data[1], f"alert {data[1]}")
            self._note(
                "alert" if kind == 21 else "message",
                what,
                session=self._name,
                outcome=direction,
                answered=size,
            )

    def _flush_record(self) -> None:
        if self._header is not None:
            (direction, content, size), self._header = self._header, None
            self._note("record", content, session=self._name, outcome=direction, answered=size)


_OUTCOMES: dict[type[Exception], str] = {
    SSL.WantReadError: "WANT_READ",
    SSL.WantWriteError: "WANT_WRITE",
    SSL.ZeroReturnError: "close_notify",
}
