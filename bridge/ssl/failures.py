"""The bridge's errors as the stdlib's `ssl` and `socket` would have raised them: class, errno, reason and text.

Some libraries look an exception's very class up in a table, so these are the stdlib's own and never subclasses.
"""

from __future__ import annotations

import errno
import re
import ssl
from typing import Any

from bridge.errors import (
    BridgeError,
    CertificateError,
    DeadlineExceeded,
    EndOfStream,
    ForkedError,
    HostnameMismatch,
    OperationTimeout,
    PeerReset,
    SessionAborted,
    SessionClosed,
    TLSError,
    Truncated,
    WouldBlock,
    system_error,
)
from bridge.poll import Want

_RENAMED_ALERTS = re.compile(r"\b(SSL/)?TLS([_ ])ALERT([_ ])", re.IGNORECASE)
"""What OpenSSL 3.2 and later call the alerts that SSL 3.0 brought; the stdlib goes by the older names."""


_FORKED = (
    "this TLS socket was made before fork(), and what serves it lives in the parent only; accept, or connect, in the"
    " child, or serve it by a thread"
)
"""The program of a drop-in has no Bridge that it knows of, and no new one would help this socket."""


def as_stdlib(error: BridgeError, hostname: str | None = None) -> Exception:
    """What the stdlib raises where the bridge raised *error*.  Any thread."""
    if isinstance(error, WouldBlock):
        if error.want == Want.READ:
            text = "The operation did not complete (read)"
            return ssl_error(ssl.SSLWantReadError, ssl.SSL_ERROR_WANT_READ, text)
        text = "The operation did not complete (write)"
        return ssl_error(ssl.SSLWantWriteError, ssl.SSL_ERROR_WANT_WRITE, text)
    if isinstance(error, (OperationTimeout, DeadlineExceeded)):
        return TimeoutError(str(error))
    if isinstance(error, Truncated):
        reason = "UNEXPECTED_EOF_WHILE_READING"
        text = f"[SSL: {reason}] EOF occurred in violation of protocol"
        return ssl_error(ssl.SSLEOFError, ssl.SSL_ERROR_EOF, text, reason)
    if isinstance(error, EndOfStream):
        text = "TLS/SSL connection has been closed (EOF)"
        return ssl_error(ssl.SSLZeroReturnError, ssl.SSL_ERROR_ZERO_RETURN, text)
    if isinstance(error, CertificateError):
        return _verification(error, hostname)
    if isinstance(error, TLSError):
        reason, text = (_RENAMED_ALERTS.sub(_older, said) for said in (error.reason, str(error)))
        return ssl_error(ssl.SSLError, ssl.SSL_ERROR_SSL, text, reason)
    if isinstance(error, PeerReset):
        return system_error(error.errno or errno.ECONNRESET)
    if isinstance(error, ForkedError):
        return OSError(errno.EBADF, _FORKED)
    if isinstance(error, (SessionClosed, SessionAborted)):
        return system_error(errno.EBADF)
    return error


def ssl_error(kind: type[ssl.SSLError], number: int, text: str, reason: str | None = None) -> ssl.SSLError:
    """One that has the attributes of the stdlib's own, which its constructor does not give it.  Any thread."""
    error: Any = kind(int(number), text)  # and no enumeration, which every message would show
    error.reason, error.library = reason, reason and "SSL"
    return error  # type: ignore[no-any-return]


def _older(name: re.Match[str]) -> str:
    return "SSLV3_ALERT_" if name[0].isupper() else "sslv3 alert "


def _verification(error: CertificateError, hostname: str | None) -> ssl.SSLCertVerificationError:
    said = error.verify_message
    if isinstance(error, HostnameMismatch):
        said = f"Hostname mismatch, certificate is not valid for '{hostname}'."
        if error.verify_code == 64:
            said = f"IP address mismatch, certificate is not valid for '{hostname}'."
    text = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {said}"
    found: Any = ssl_error(ssl.SSLCertVerificationError, ssl.SSL_ERROR_SSL, text, "CERTIFICATE_VERIFY_FAILED")
    found.verify_code, found.verify_message = error.verify_code, said
    return found  # type: ignore[no-any-return]
