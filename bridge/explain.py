"""Why there is no session, in a sentence a person can act on, and as an exit status."""

from __future__ import annotations

import re
import socket

import bridge
from bridge import starttls

UNREACHABLE, REFUSED_STARTTLS, REFUSED_PEER, NO_HANDSHAKE, BROKEN = 3, 4, 5, 6, 1
"""Exit statuses: no TCP connection; no STARTTLS; the peer's certificate; any other handshake; ended badly later."""

_CERTIFICATE = {
    9: "its certificate is not valid yet; check the clock of this machine, or the certificate's dates",
    10: "its certificate has expired; renew it on the server (or check the clock of this machine)",
    18: "its certificate is self-signed, and not one you trust; if it is the right one, pass it with --cafile",
    19: "its chain ends in a CA that is not trusted here; if that is yours, pass its certificate with --cafile",
    20: "it is issued by a CA that is not trusted here; pass the CA with --cafile, or have the server"
    " send its intermediate certificates",
    21: "the server sent its own certificate only, and the CA that issued it is not trusted here; pass the CA"
    " with --cafile, or have the server send its intermediate certificates",
    23: "its certificate has been revoked",
}
"""By OpenSSL's X509_V_ERR_* (x509_verify.h)."""

_REASONS = (
    (
        r"ALERT_PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL|WRONG_SSL_VERSION",
        "it speaks no version of TLS that is allowed here; old servers stop at TLS 1.1, which is not safe any"
        " more: update the server (--min and --max say what is allowed here)",
    ),
    (
        r"CERTIFICATE_REQUIRED",
        "it demands a client certificate; pass one with --cert and --key",
    ),
    (
        r"ALERT_NO_APPLICATION_PROTOCOL",
        "it speaks none of the protocols offered by --alpn",
    ),
    (
        r"UNRECOGNIZED_NAME",
        "it does not know the name it was asked for (SNI); pass the right one with --server-name",
    ),
    (
        r"ALERT_(BAD_CERTIFICATE|UNKNOWN_CA|CERTIFICATE_\w+|UNSUPPORTED_CERTIFICATE|ACCESS_DENIED)",
        "it does not accept the certificate given with --cert, or wants one where none was given",
    ),
    (
        r"HANDSHAKE_FAILURE|INSUFFICIENT_SECURITY|NO_SHARED_CIPHER|NO_CIPHERS?_\w+",
        "it has no cipher suite in common with this side, or demands a client certificate (--cert)",
    ),
)
"""By OpenSSL's reasons: the alerts are RFC 8446, 6.2."""


def explain(error: BaseException, where: str, settled: bool = False) -> tuple[int, str]:
    """The exit status and the sentence for *error*, met at *where* (``host:port``); *settled*: after the handshake."""
    if isinstance(error, socket.gaierror):
        return UNREACHABLE, f"{where}: there is no such host; check the name ({error.strerror})"
    if isinstance(error, starttls.Refused):
        return REFUSED_STARTTLS, f"{where}: no TLS by STARTTLS: {error}"
    if isinstance(error, bridge.HostnameMismatch):
        return (
            REFUSED_PEER,
            f"{where}: its certificate is for another name: {error}; connect by that name, or pass it with"
            " --server-name",
        )
    if isinstance(error, bridge.CertificateError):
        code = getattr(error, "verify_code", None)
        return REFUSED_PEER, f"{where}: not trusted: {_CERTIFICATE.get(code or 0, str(error))}"
    if isinstance(error, bridge.NotTLS):
        return (
            NO_HANDSHAKE,
            f"{where}: it does not speak TLS: {error}; is it another port, or is --starttls missing?",
        )
    refused = _by_reason(error) if isinstance(error, bridge.TLSError) else None
    if refused is not None:  # with TLS 1.3 servers say so when our handshake is done
        return NO_HANDSHAKE, f"{where}: {refused}"
    if settled:
        return BROKEN, f"{where}: the session ended badly: {error}"
    if isinstance(error, bridge.TLSError):
        return NO_HANDSHAKE, f"{where}: the handshake failed: {error}"
    return _without_session(error, where)


def _by_reason(error: bridge.TLSError) -> str | None:
    reason = f"{error.reason} {error}".upper().replace(" ", "_")
    for pattern, sentence in _REASONS:
        if re.search(pattern, reason):
            return f"{sentence} ({error})"
    return None


def _without_session(error: BaseException, where: str) -> tuple[int, str]:
    if isinstance(error, bridge.DeadlineExceeded):
        return (
            NO_HANDSHAKE,
            f"{where}: it accepted the connection, but did not answer the handshake in time; it may not speak TLS"
            " (is --starttls missing?), or be overloaded (--timeout)",
        )
    if isinstance(error, ConnectionRefusedError):
        return (
            UNREACHABLE,
            f"{where}: connection refused: nothing listens on that port, or a firewall rejects it",
        )
    if isinstance(error, TimeoutError):
        return (
            UNREACHABLE,
            f"{where}: no answer in time: the host is down, or a firewall drops packets (--timeout)",
        )
    if isinstance(error, bridge.SessionEnded):
        return (
            NO_HANDSHAKE,
            f"{where}: it hung up during the handshake, without a word ({error}); it may not speak TLS, or a"
            " load balancer has nothing behind it",
        )
    return UNREACHABLE, f"{where}: cannot connect: {getattr(error, 'strerror', None) or error}"
