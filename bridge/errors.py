"""Every exception the bridge raises, cut by whose fault it is and what to do about it.

One tree.  Each class also has the standard parent that a user's `except` clause already names::

    BridgeError
    ├── ConfigurationError      ValueError              bad input from us: fix the call
    ├── ForkedError             RuntimeError            used in a child of fork(): make a new Bridge there
    ├── BridgeClosed            RuntimeError            the Bridge was closed: nothing new can start
    ├── ReceiveTimeout          TimeoutError, queue.Empty   nothing arrived in time; the session lives on
    ├── SendTimeout             TimeoutError, queue.Full    no room in time; nothing of the message was sent
    ├── OperationTimeout        TimeoutError            flush, a stream's call: not done in time
    ├── WouldBlock              BlockingIOError         timeout=0: not without waiting; `want` says for what
    ├── LimitExceeded           RuntimeError            a limit refuses something new
    └── SessionEnded            ShutDown                the session is over; the subclass says why, for good
        ├── EndOfStream         EOFError                clean: the peer sent close_notify
        ├── SessionClosed       ConnectionAbortedError  we closed it
        ├── SessionAborted      ConnectionAbortedError  we aborted it
        │   └── SessionStalled                          a bug of ours: it spun, and moved no byte
        ├── Truncated           ssl.SSLEOFError         the peer vanished without close_notify
        ├── PeerReset           ConnectionResetError    the peer (or the network) reset the connection
        ├── ConnectFailed       ConnectionError         TCP never came up
        ├── TLSError            ssl.SSLError            the peer broke the protocol, or refused us by an alert
        │   ├── NotTLS                                  the peer does not speak TLS at all
        │   └── CertificateError  ssl.SSLCertVerificationError
        │       └── HostnameMismatch
        ├── DeadlineExceeded    TimeoutError            a session's own deadline passed
        │   ├── ConnectTimeout
        │   ├── HandshakeTimeout
        │   ├── IdleTimeout
        │   ├── WriteStalled
        │   └── CloseTimeout
        └── CodecError          ValueError              the codec refused the peer's bytes
            └── MessageTooLarge

A session keeps its *first* cause (OpenSSL's later errors are empty); everybody
who asks later is given a copy of it, so tracebacks of different threads do not mix.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any, TypeVar

if sys.version_info >= (3, 13):
    ShutDown = queue.ShutDown
else:

    class ShutDown(Exception):
        """What `queue.Queue.shutdown()` makes `get` and `put` raise, for Pythons before 3.13."""


class BridgeError(Exception):
    """The root of all errors the bridge raises on purpose."""


class ConfigurationError(BridgeError, ValueError):
    """An argument, file or context is unusable.  The message says what was wrong and what to do."""


class ForkedError(BridgeError, RuntimeError):
    """A Bridge, an Inbox or a Session was used in a child of `fork()`; its threads exist only in the parent."""


class BridgeClosed(BridgeError, RuntimeError):
    """The Bridge is closed, or closing: it starts nothing new."""


class ReceiveTimeout(BridgeError, TimeoutError, queue.Empty):
    """No message arrived within the caller's timeout.  The session is unharmed."""


class SendTimeout(BridgeError, TimeoutError, queue.Full):
    """No room within the caller's timeout; not a byte of the message was sent.  The session is unharmed."""


class OperationTimeout(BridgeError, TimeoutError):
    """A bounded wait ended before the thing waited for.  The session is unharmed."""


class WouldBlock(BridgeError, BlockingIOError):
    """The call was told not to wait (``timeout=0``), and would have to.  The session is unharmed."""

    def __init__(self, want: int) -> None:
        super().__init__(
            errno.EWOULDBLOCK, f"wait until the socket is {'readable' if want == 1 else 'writable'}"
        )
        self.want = want
        """For what to wait before calling again: `selectors.EVENT_READ` or `selectors.EVENT_WRITE`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.want,), self.__dict__


class LimitExceeded(BridgeError, RuntimeError):
    """A limit (see `bridge.Limits`; on Windows, of sockets a worker can own) refuses to start something new."""


class SessionEnded(BridgeError, ShutDown):
    """The session is over.  The subclass is the first cause and never changes afterwards."""

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class EndOfStream(SessionEnded, EOFError):
    """Clean: the peer said close_notify (RFC 8446, 6.1).  Nothing was cut off."""


class SessionClosed(SessionEnded, ConnectionAbortedError):
    """This side called `close()`, `send_eof()` or `unwrap()`, or closed the Bridge."""


class SessionAborted(SessionEnded, ConnectionAbortedError):
    """This side ended the session at once: `abort()`, an interrupt inside OpenSSL, a bug of ours or of a callback."""


class SessionStalled(SessionAborted):
    """A bug of the bridge: turn after turn it could go on and moved no byte.  Event ``session.stalled`` says where."""


class Truncated(SessionEnded, ssl.SSLEOFError):
    """The byte stream stopped without close_notify: what was received may be incomplete.

    In a handshake: the peer hung up."""


class PeerReset(SessionEnded, ConnectionResetError):
    """The connection was reset, or the network under it failed."""


class ConnectFailed(SessionEnded, ConnectionError):
    """No TCP connection could be made; the operating system's error is the `__cause__`."""


class TLSError(SessionEnded, ssl.SSLError):
    """The peer broke the TLS protocol, or refused us with an alert.  `reason` is OpenSSL's, or has its form."""

    reason = ""
    library = "SSL"


class NotTLS(TLSError):
    """The peer's first bytes are not TLS.  The message shows them, five of a client's, and may name the protocol."""


class CertificateError(TLSError, ssl.SSLCertVerificationError):
    """The peer's certificate was not accepted.  `verify_code` and `verify_message` are OpenSSL's."""

    depth: int | None = None
    """Where in the chain: 0 is the peer's own certificate; None the chain as a whole, or where a verify callback of an
    `OpenSSL.SSL.Context` of your own has refused it, which does not say."""


class HostnameMismatch(CertificateError):
    """The peer's certificate is valid, but for another name.  The message holds both names."""


class DeadlineExceeded(SessionEnded, TimeoutError):
    """A deadline of the session itself (`bridge.Timeouts`) passed; the session was ended."""


class ConnectTimeout(DeadlineExceeded):
    """TCP was not connected within `Timeouts.connect`; or no session was open within the *timeout* of the call.

    With the second, of `connect` or `adopt`, TCP may be up, and the peer slow in the handshake: the message says which.
    The session was aborted then, and `Bridge.totals` counts it as SessionAborted."""


class HandshakeTimeout(DeadlineExceeded):
    """The TLS handshake, or a renegotiation this side asked for, was not done within `Timeouts.handshake`."""


class IdleTimeout(DeadlineExceeded):
    """No application byte moved in either direction for `Timeouts.idle`."""


class WriteStalled(DeadlineExceeded):
    """The peer did not take one record within `Timeouts.write_stall`."""


class CloseTimeout(DeadlineExceeded):
    """The polite close was not complete within `Timeouts.flush`, or unwrap within `Timeouts.close_notify`."""


class CodecError(SessionEnded, ValueError):
    """The codec refused what the peer sent.  If it raised something else, that is the `__cause__`."""


class MessageTooLarge(CodecError):
    """The peer's message is over the codec's limit."""


def forget_frames(error: BaseException | None) -> None:
    """Keep *error* without what it would keep alive: the frames it came through, and their variables."""
    chain, known = [error], set()
    while chain:
        error = chain.pop()
        if error is not None and id(error) not in known:
            known.add(id(error))
            error.__traceback__ = None
            chain += (error.__cause__, error.__context__)


def words(error: BaseException, say: Callable[[object], str] = str) -> str:
    """What *error* says, also if it is of a user's class and fails to say it."""
    try:
        return say(error)
    except Exception:
        return f"an unprintable {type(error).__name__}"


_WINSOCK: dict[int, str] = getattr(socket, "errorTab", {})
"""What Windows' own numbers stand for, of which strerror(3) has not heard."""


def system_error(number: int) -> OSError:
    """What a call of the operating system raises that fails with *number*.  Any thread."""
    return OSError(number, _WINSOCK[number].rstrip(".") if number in _WINSOCK else os.strerror(number))


def tls_error(reason: str, text: str, kind: type[TLSError] = TLSError) -> TLSError:
    """One of *kind*, worded as OpenSSL's are, whose *reason* need not be its own.  Any thread."""
    error = kind(1, f"[SSL: {reason}] {text}")
    error.reason = reason
    return error


_E = TypeVar("_E", bound=BaseException)


def fresh(error: _E) -> _E:
    """A copy of *error*, without its traceback, for one more thread to raise.  Any thread.

    Its class is not called: a user's may take other arguments than it passes on.
    """
    kind = type(error)
    try:
        clone = kind.__new__(kind, *error.args)
    except Exception:  # it has a __new__ of its own: better one for all than none
        return error.with_traceback(None)
    clone.args = error.args
    vars(clone).update(vars(error))
    clone.__cause__ = error.__cause__
    return clone
