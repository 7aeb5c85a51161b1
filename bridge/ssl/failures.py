"""The bridge's errors as the stdlib's `ssl` and `socket` would have raised them: class, errno, reason and text.

Some libraries look an exception's very class up in a table, so these are the stdlib's own and never subclasses.
"""

from __future__ import annotations

import errno
import os
import re
import ssl

from bridge.errors import (
    BridgeError,
    CertificateError,
    DeadlineExceeded,
    EndOfStream,
    HostnameMismatch,
    OperationTimeout,
    PeerReset,
    SessionAborted,
    SessionClosed,
    TLSError,
    Truncated,
    WouldBlock,
)
from bridge.poll import Want

_RENAMED_ALERTS = re.compile(r"^(SSL/)?TLS_ALERT_")
"""What OpenSSL 3.2 and later call the alerts that SSL 3.0 brought; the stdlib goes by the older names."""


def as_stdlib(error: BridgeError, hostname: str | None = None) -> Exception:
    """What the stdlib raises where the bridge raised *error*.  Any thread."""
    if isinstance(error, WouldBlock):
        if error.want == Want.READ:
            return ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)")
        return ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")
    if isinstance(error, (OperationTimeout, DeadlineExceeded)):
        return TimeoutError(str(error))
    if isinstance(error, Truncated):
        return _protocol(ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol"), None)
    if isinstance(error, EndOfStream):
        return _protocol(
            ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "TLS/SSL connection has been closed (EOF)"),
            None,
        )
    if isinstance(error, CertificateError):
        return _verification(error, hostname)
    if isinstance(error, TLSError):
        reason = _RENAMED_ALERTS.sub("SSLV3_ALERT_", error.reason)
        return _protocol(ssl.SSLError(ssl.SSL_ERROR_SSL, str(error).replace(error.reason, reason, 1)), reason)
    if isinstance(error, PeerReset):
        number = error.errno or errno.ECONNRESET
        return OSError(number, os.strerror(number))
    if isinstance(error, (SessionClosed, SessionAborted)):
        return OSError(errno.EBADF, os.strerror(errno.EBADF))
    return error


def _protocol(error: ssl.SSLError, reason: str | None) -> ssl.SSLError:
    error.reason, error.library = reason or "", "SSL" if reason else ""
    return error


def _verification(error: CertificateError, hostname: str | None) -> ssl.SSLCertVerificationError:
    said = error.verify_message
    if isinstance(error, HostnameMismatch):
        said = f"Hostname mismatch, certificate is not valid for '{hostname}'."
        if error.verify_code == 64:
            said = f"IP address mismatch, certificate is not valid for '{hostname}'."
    text = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {said}"
    found = ssl.SSLCertVerificationError(ssl.SSL_ERROR_SSL, text)
    found.reason, found.library = "CERTIFICATE_VERIFY_FAILED", "SSL"
    found.verify_code, found.verify_message = error.verify_code, said
    return found
