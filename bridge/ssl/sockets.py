"""The stdlib's `SSLSocket`, with the TLS of the bridge in it.

`ssl.SSLSocket` is a thin class: whatever is TLS it asks of ``self._sslobj``, an object that its context makes.  Ours
makes a `Wire`, so what the class promises (its checks, its texts, its order of things) is the stdlib's own code.
Only what the stdlib leaves to the kernel is overridden here: time-outs, `close`, `shutdown`, and `accept`.

The descriptor is the TCP connection itself, always non-blocking, and known to two objects: the application's
SSLSocket, for `fileno()`, addresses and options, and the stream's inner socket, which alone closes it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import operator
import socket
import ssl
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from bridge import forks
from bridge.engine import SessionInfo
from bridge.errors import (
    BridgeClosed,
    BridgeError,
    ConfigurationError,
    EndOfStream,
    HostnameMismatch,
    OperationTimeout,
    PeerReset,
    SessionClosed,
    SessionEnded,
    Truncated,
    WouldBlock,
    system_error,
)
from bridge.names import HOST_MISMATCH, refusal
from bridge.poll import Want
from bridge.ssl.facts import certificate_dict
from bridge.ssl.failures import as_stdlib, ssl_error
from bridge.ssl.process import TIMEOUTS, UNHURRIED, default_bridge
from bridge.ssl.sessions import SSLSession
from bridge.stream import Stream

Buffer = Any
"""Whatever has the buffer interface."""


class _Certificate:
    """As `_ssl.Certificate`, as far as `ssl.SSLSocket` asks."""

    def __init__(self, der: bytes) -> None:
        self._der = der

    def public_bytes(self, encoding: int) -> bytes:
        return self._der


class Wire:
    """What `ssl.SSLSocket` expects of its ``_sslobj``, over a `Stream` that begins when the first call needs it."""

    def __init__(
        self, sock: SSLSocket, context: Any, server_side: bool, hostname: str | None, session: Any
    ) -> None:
        self.server_side = server_side
        self.context = context
        self.server_hostname = hostname
        self.timeout: float | None = None
        self.kernel_timeouts: dict[int, float] = {}
        """SO_RCVTIMEO and SO_SNDTIMEO, which a non-blocking descriptor does not heed."""
        self.stream: Stream | None = None
        self._streams_core: Any = None
        """What the stream was made with: the context may be another by now."""
        self.said_all = False
        """The application has shut the socket down for writing."""
        self.cut_off = False
        """It is closed by an exception, and nobody has said that this is all."""
        self._owner = weakref.ref(sock)
        self._session: SSLSession | None = None
        self._pooled = False
        self._unwrapping = False
        self.lock = forks.open_lock()
        """Of whose the descriptor is: the socket's, and from `begin` on the stream's."""
        if session is not None:
            self.session = session

    @property
    def context(self) -> Any:
        """The `SSLContext`, whose settings count as they are when it is set."""
        return self._context

    @context.setter
    def context(self, context: Any) -> None:
        try:
            core = context.core
        except AttributeError:
            raise TypeError("The value must be a SSLContext") from None
        self._core = core(self.server_side)
        self._context = context

    @property
    def owner(self) -> SSLSocket | None:
        """The socket, while it lives."""
        return self._owner()

    # The beginning.

    def begin(self) -> Stream:
        """The stream; the first call takes the connected descriptor over."""
        with self.lock:
            if self.stream is None:
                sock = self._owner()
                assert sock is not None
                _check_connected(sock)
                self.timeout = sock.gettimeout()
                self.kernel_timeouts = {
                    option: seconds
                    for option in _KERNEL_TIMEOUTS
                    if (seconds := _kernel_timeout(sock, option))
                }
                self.stream = self._made(sock)
                sock._wire = self
            return self.stream

    def _made(self, sock: SSLSocket) -> Stream:
        inner = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        core = self._streams_core = self._core
        try:
            return default_bridge().stream(
                inner,
                core,
                server_hostname=self.server_hostname,
                server_side=self.server_side,
                resume=self._resumable(core),
                owner=self._owner,
                leaving=functools.partial(_bereave, self._owner),
                timeouts=TIMEOUTS if self._pooled else UNHURRIED,
            )
        except BaseException as error:
            if inner.fileno() == -1:  # closed already
                socket.socket.detach(sock)
            else:
                inner.detach()
            if isinstance(error, BridgeClosed):
                raise OSError(errno.EBADF, str(error)) from None
            if isinstance(error, ConfigurationError):
                raise self._no_name(error) from None
            raise

    def _resumable(self, core: object) -> Any:
        """The session that the handshake offers: none from before a setting has changed, as OpenSSL refuses that."""
        session = self._session
        return session.raw if session is not None and session.core is core else None

    def _no_name(self, error: ConfigurationError) -> Exception:
        """For a `server_hostname` that can be nobody's: no certificate is valid for it."""
        if self.context.check_hostname and not self.server_side:
            return self.failure(refusal(str(error), HOST_MISMATCH, cls=HostnameMismatch))
        return ValueError(str(error))

    def begin_in_pool(self) -> None:
        """Have the handshake made by a worker, for whoever needs it done."""
        self._pooled = True
        self.begin().begin()

    def do_handshake(self) -> None:
        """The handshake, within the time-out."""
        stream = self.begin()
        self._shake_hands(stream, self.timeout)

    def _shake_hands(self, stream: Stream, timeout: float | None) -> None:
        try:
            stream.handshake(timeout)
        except Truncated as error:
            said_so = getattr(error, "reason", None) == "CLOSE_NOTIFY"
            raise self.failure(EndOfStream() if said_so else error) from None
        except BridgeError as error:
            raise self.failure(error) from None

    def _info(self) -> SessionInfo | None:
        """What the handshake settled; None if it is not done.  One that a worker makes is waited for."""
        stream = self.stream
        if stream is None:
            return None
        waits = self._pooled and self.timeout != 0 and not stream.busy_here()
        if waits and stream.info is None and stream.end is None:
            self._shake_hands(stream, self.timeout)
        return stream.info

    def failure(self, error: BridgeError, option: int | None = None) -> Exception:
        """What the stdlib would raise for *error*; *option*: which time-out of the kernel's it would be, if any."""
        if isinstance(error, OperationTimeout) and self.timeout is None and option in self.kernel_timeouts:
            return system_error(errno.EAGAIN)
        if self.said_all and option == socket.SO_SNDTIMEO and isinstance(error, SessionEnded):
            return system_error(errno.EPIPE)
        if self._unwrapping and isinstance(error, SessionClosed):
            return _protocol_error("PROTOCOL_IS_SHUTDOWN")
        return as_stdlib(error, self.server_hostname)

    def let_go(self, error: BridgeError) -> bool:
        """Whether *error* of a reader is that another thread has closed the socket: it finds nothing more to read."""
        return isinstance(error, SessionClosed) and not self._unwrapping

    # Bytes.

    def read(self, size: int = 1024, buffer: Buffer = None) -> Any:
        """At most *size* bytes, or into *buffer* and how many."""
        if type(size) is not int:
            size = operator.index(size)
        if buffer is not None:
            with memoryview(buffer) as view, view.cast("B") as room:
                if room.readonly:
                    raise TypeError(f"a read-write bytes-like object is needed, not {type(buffer).__name__}")
                if size <= 0 or size > len(room):
                    size = len(room)
                data = self.read(size)
                room[: len(data)] = data
            return len(data)
        stream, timeout = self.stream or self.begin(), self.timeout
        if size <= 0:
            if size < 0:
                raise ValueError("size should not be negative")
            return b""
        if timeout is None and self.kernel_timeouts:
            timeout = self.kernel_timeouts.get(socket.SO_RCVTIMEO)
        try:
            return stream.read(size, timeout)
        except BridgeError as error:
            if self.let_go(error):
                return b""
            raise self.failure(error, socket.SO_RCVTIMEO) from None

    def write(self, data: Buffer) -> int:
        """Hand *data* to the kernel, encrypted; how many bytes."""
        stream, timeout = self.stream or self.begin(), self.timeout
        if timeout is None and self.kernel_timeouts:
            timeout = self.kernel_timeouts.get(socket.SO_SNDTIMEO)
        try:
            return stream.write(data, timeout)
        except BridgeError as error:
            raise self.failure(error, socket.SO_SNDTIMEO) from None

    def pending(self) -> int:
        """Decrypted bytes that no poll announces."""
        if self.stream is None or self.stream.busy_here():
            return 0
        try:
            return self.stream.pending()
        except BridgeError as error:
            raise self.failure(error) from None

    # Ends.

    def shutdown(self) -> SSLSocket:
        """The end of TLS, both ways; the socket speaks plain text from then on."""
        stream, sock, timeout = self.begin(), self._owner(), self.timeout
        assert sock is not None
        if stream.info is None and stream.end is None and not self._pooled:
            raise _protocol_error("SHUTDOWN_WHILE_IN_INIT")
        if timeout is None and self.kernel_timeouts:
            timeout = self.kernel_timeouts.get(socket.SO_RCVTIMEO)
        self._unwrapping = True
        try:
            inner, leftover = stream.unwrap(timeout)
        except ConfigurationError:
            raise _protocol_error("APPLICATION_DATA_AFTER_CLOSE_NOTIFY") from None
        except OperationTimeout as error:
            raise self.failure(error if timeout == self.timeout else WouldBlock(Want.READ)) from None
        except BridgeError as error:
            raise self.failure(error) from None
        with self.lock:
            if sock.fileno() == -1:  # closed meanwhile
                inner.close()
            else:
                inner.detach()
                sock._go_on_in_plain_text(self.timeout, leftover)
        return sock

    # Facts.

    def getpeercert(self, binary_form: bool = False) -> Any:
        """The peer's certificate as a dict, or as DER."""
        info = self._info()
        if info is None:
            raise ValueError("handshake not done yet")
        certificate = info.peer_certificate
        if certificate is None:
            return None
        if binary_form:
            return _der(certificate)
        return certificate_dict(certificate) if self.context.verify_mode != ssl.CERT_NONE else {}

    def get_verified_chain(self) -> list[_Certificate] | None:
        """From the leaf to the root; as it was sent, if nothing is verified."""
        if self.context.verify_mode == ssl.CERT_NONE:
            return self.get_unverified_chain()
        info = self._info()
        return [_Certificate(_der(c)) for c in info.verified_chain] if info else None

    def get_unverified_chain(self) -> list[_Certificate] | None:
        """As the peer sent it."""
        info = self._info()
        return [_Certificate(_der(c)) for c in info.presented_chain] if info else None

    def cipher(self) -> tuple[str, str, int] | None:
        """Name, protocol that brought it, secret bits."""
        info = self._info()
        return (info.cipher, info.cipher_version, info.cipher_bits) if info else None

    def shared_ciphers(self) -> None:
        """Not known: pyOpenSSL has no way to ask."""
        return None

    def compression(self) -> None:
        """There never is any."""
        return None

    def version(self) -> str | None:
        """Of the protocol."""
        info = self._info()
        return info.version if info else None

    def selected_alpn_protocol(self) -> str | None:
        """By ALPN."""
        info = self._info()
        return info.alpn if info else None

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """RFC 5929."""
        if cb_type not in ssl.CHANNEL_BINDING_TYPES:
            raise ValueError(f"'{cb_type}' channel binding type not implemented")
        info = self._info()
        return info.tls_unique if info else None

    def verify_client_post_handshake(self) -> None:
        """Refused: see `SSLContext.post_handshake_auth`."""
        if not self.server_side:
            raise _protocol_error("NOT_SERVER")
        text = "the bridge does not ask for certificates after the handshake"
        raise ssl_error(ssl.SSLError, ssl.SSL_ERROR_SSL, text)

    @property
    def session(self) -> SSLSession | None:
        """What to pass on for resumption."""
        if self.stream is not None and self.stream.info is not None:
            try:
                raw = self.stream.session()
            except BridgeError as error:
                raise self.failure(error) from None
            if raw is not None:
                self._session = SSLSession.of(raw, self.context, self._streams_core)
        return self._session

    @session.setter
    def session(self, session: Any) -> None:
        if not isinstance(session, SSLSession):
            raise TypeError("Value is not a SSLSession.")
        if session.context is not self.context:
            raise ValueError("Session refers to a different SSLContext.")
        if self.server_side:
            raise ValueError("Cannot set session for server-side SSLSocket.")
        if self.stream is not None:
            raise ValueError("Cannot set session after handshake.")
        self._session = session

    @property
    def session_reused(self) -> bool:
        """Whether this one was resumed."""
        info = self._info()
        return bool(info and info.resumed)


class SSLSocket(ssl.SSLSocket):
    """An `ssl.SSLSocket` whose TLS is the bridge's.  Made by `SSLContext.wrap_socket`."""

    _sslobj: Wire | None
    _wire: Wire | None = None
    """What has the descriptor, also when the stdlib's class has dropped its ``_sslobj``."""
    suppress_ragged_eofs: bool
    do_handshake_on_connect: bool
    _leftover = b""

    def _real_connect(self, *arguments: Any) -> Any:
        try:
            return super()._real_connect(*arguments)  # type: ignore[misc]
        except (OSError, ValueError):
            if self._sslobj is None:  # but the wire has the descriptor, if the handshake has failed
                self._sslobj = self._wire
            raise

    # Bytes: the shortest way to the wire.

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As `socket.socket.recv`."""
        wire = self._sslobj
        if wire is None or flags:
            return self._recv_in_plain_text(buflen, flags) if self._leftover else super().recv(buflen, flags)
        stream = wire.stream
        if stream is None or type(buflen) is not int or buflen <= 0 or wire.kernel_timeouts:
            return self._forgiving(wire, buflen, None, b"")  # type: ignore[no-any-return]
        try:
            try:
                return stream.read(buflen, wire.timeout)
            except BridgeError as error:
                if wire.let_go(error):
                    return b""
                raise wire.failure(error) from None
        except ssl.SSLEOFError:
            if not self.suppress_ragged_eofs:
                raise
            return b""

    def recv_into(self, buffer: Buffer, nbytes: int | None = None, flags: int = 0) -> int:
        """As `socket.socket.recv_into`."""
        wire = self._sslobj
        if wire is None or flags:
            if not self._leftover:
                return super().recv_into(buffer, nbytes, flags)
            with memoryview(buffer) as view, view.cast("B") as room:
                data = self._recv_in_plain_text(nbytes or len(room), flags)
                room[: len(data)] = data
            return len(data)
        if nbytes is None:
            nbytes = memoryview(buffer).nbytes or 1024
        return int(self._forgiving(wire, nbytes, buffer, 0))

    def read(self, len: int = 1024, buffer: Buffer = None) -> Any:
        """As `ssl.SSLSocket.read`."""
        wire = self._sslobj
        if wire is None:
            raise ValueError("Read on closed or unwrapped SSL socket.")
        return self._forgiving(wire, len, buffer, b"" if buffer is None else 0)

    def _forgiving(self, wire: Wire, size: int, buffer: Buffer, nothing: Any) -> Any:
        try:
            return wire.read(size, buffer)
        except ssl.SSLEOFError:
            if not self.suppress_ragged_eofs:
                raise
            return nothing

    def send(self, data: Buffer, flags: int = 0) -> int:
        """As `socket.socket.send`; short only on a non-blocking socket."""
        wire = self._sslobj
        return super().send(data, flags) if wire is None or flags else wire.write(data)

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """As `socket.socket.sendall`.  Calls of several threads do not interleave; the time-out is for all of it."""
        wire = self._sslobj
        if wire is None or flags:
            super().sendall(data, flags)
            return
        stream = wire.stream or wire.begin()
        if wire.timeout == 0:
            super().sendall(data, flags)
        elif wire.kernel_timeouts:
            wire.write(data)
        else:
            try:
                stream.write(data, wire.timeout)
            except BridgeError as error:
                raise wire.failure(error, socket.SO_SNDTIMEO) from None

    # Time-outs: ours, since the descriptor never blocks.

    def settimeout(self, value: float | None) -> None:
        """As `socket.socket.settimeout`."""
        wire = self._sslobj
        with _NOBODYS if wire is None else wire.lock:
            if wire is None or wire.stream is None:
                super().settimeout(value)
                return
            if value is not None:
                super().settimeout(value)  # it refuses what is none, and leaves the descriptor as it is
                value = super().gettimeout()
            wire.timeout = value

    def gettimeout(self) -> float | None:
        """As `socket.socket.gettimeout`."""
        wire = self._sslobj
        return super().gettimeout() if wire is None or wire.stream is None else wire.timeout

    timeout = property(gettimeout)

    def setblocking(self, flag: bool) -> None:
        """As `socket.socket.setblocking`."""
        self.settimeout(None if flag else 0.0)

    def getblocking(self) -> bool:
        """As `socket.socket.getblocking`."""
        return self.gettimeout() != 0.0

    def setsockopt(self, level: int, optname: int, *value: Any) -> None:
        """As `socket.socket.setsockopt`; SO_RCVTIMEO and SO_SNDTIMEO are heeded."""
        super().setsockopt(level, optname, *value)
        wire = self._sslobj
        if wire is not None and level == socket.SOL_SOCKET and optname in _KERNEL_TIMEOUTS:
            found = {**wire.kernel_timeouts, optname: _kernel_timeout(self, optname)}
            wire.kernel_timeouts = {option: seconds for option, seconds in found.items() if seconds}

    # Ends.

    def shutdown(self, how: int) -> None:
        """As `socket.socket.shutdown`, of the bytes inside TLS: SHUT_WR is TLS's half close, and reading goes on.

        After SHUT_RD writing goes on.  What `send` took before still leaves, whichever half is shut down.
        """
        wire = self._sslobj
        if wire is None or wire.stream is None:
            super().shutdown(how)
            return
        shaken = wire.stream.info is not None
        try:
            if how != socket.SHUT_RD:
                wire.said_all = True
                wire.stream.send_eof(timeout=0)  # what is stuck leaves when it can
            if how != socket.SHUT_WR:
                wire.stream.stop_reading()
        except BridgeError as error:
            raise wire.failure(error) from None
        if shaken and how == socket.SHUT_RDWR and wire.stream.end is None:
            how = socket.SHUT_RD  # the other half is the stream's to shut down, once all has left
        if how != socket.SHUT_WR or not shaken:
            try:
                socket.socket.shutdown(self, how)
            except OSError as error:
                if self.fileno() == -1:  # a reader that was let go has closed it meanwhile
                    return
                # That of TLS has shut TCP down already; a peer that was quick to answer has left nothing to be done.
                if error.errno != errno.ENOTCONN or isinstance(wire.stream.end, PeerReset):
                    raise

    def detach(self) -> int:
        """As `socket.socket.detach`.  ValueError while TLS is on: the descriptor alone is of no use to anybody."""
        if self._sslobj is not None and self._sslobj.stream is not None:
            raise ValueError(
                "a TLS socket cannot be detached: its descriptor carries ciphertext; unwrap() it first"
            )
        self._sslobj = None
        return super().detach()

    def _real_close(self) -> None:
        wire = self._sslobj or self._wire
        stream = None
        try:
            with _NOBODYS if wire is None else wire.lock:
                if wire is not None and wire.stream is not None:
                    stream = self._give_up(wire)
                self._sslobj = self._wire = None
            if stream is None:
                super()._real_close()  # type: ignore[misc]
            else:
                assert wire is not None
                stream.close(politely=not wire.cut_off)
        except BaseException:
            if wire is not None and wire.stream is not None:
                wire.stream.forget()  # Ctrl-C, and nobody may try again
            raise

    def __exit__(self, *exception: object) -> None:
        """Close it, without close_notify if an exception comes through: the peer is not to take that for the end."""
        wire = self._sslobj or self._wire
        if wire is not None and exception and exception[0] is not None:
            wire.cut_off = True
        super().__exit__(*exception)

    def _give_up(self, wire: Wire) -> Stream:
        """The descriptor is from now on its stream's alone."""
        assert wire.stream is not None
        socket.socket.detach(self)
        return wire.stream

    def _bereave(self, stream: Stream) -> None:
        """For *stream*, which is about to close the descriptor of its own accord: its bridge is closed."""
        wire = self._wire
        if wire is not None and wire.stream is stream:
            self._sslobj = self._wire = None
            socket.socket.detach(self)

    def _go_on_in_plain_text(self, timeout: float | None, leftover: bytes) -> None:
        self._sslobj = self._wire = None
        self._leftover = leftover
        socket.socket.settimeout(self, timeout)

    def _recv_in_plain_text(self, size: int, flags: int) -> bytes:
        data = self._leftover[:size]
        if not flags & socket.MSG_PEEK:
            self._leftover = self._leftover[size:]
        return data

    def __del__(self) -> None:
        # May run in any thread, at any moment.
        if self.fileno() == -1:
            return
        if "_context" not in vars(self):  # it was to take a socket's descriptor over, and could not
            socket.socket.detach(self)
            return
        if "_connected" not in vars(self):  # `wrap_socket` has raised, and nobody ever had it
            socket.socket.close(self)
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)
        finally:  # also where warnings are errors
            if self._wire is None:
                socket.socket.close(self)
            else:
                self._give_up(self._wire).forget()

    # Servers.

    def accept(self) -> tuple[SSLSocket, Any]:
        """As `ssl.SSLSocket.accept`, but the handshake is made in the background: a mute client stalls nobody.

        Whoever uses the new socket first waits for it; if it failed, that call raises why.  A ConnectionError says that
        the client has gone already, as the stdlib's does.
        """
        plain, address = socket.socket.accept(self)
        try:
            _check_connected(plain)
        except OSError:  # it has gone already
            plain.close()
            raise
        made: Any = self.context.wrap_socket(
            plain,
            server_side=True,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=self.suppress_ragged_eofs,
        )
        made.do_handshake_on_connect = self.do_handshake_on_connect
        if self.do_handshake_on_connect and made._sslobj is not None:
            try:
                made._sslobj.begin_in_pool()
            except BaseException:
                made.close()
                raise
        return made, address


def _protocol_error(reason: str) -> ssl.SSLError:
    text = f"[SSL: {reason}] {reason.lower().replace('_', ' ')}"
    return ssl_error(ssl.SSLError, ssl.SSL_ERROR_SSL, text, reason)


def _bereave(owner: Callable[[], SSLSocket | None], stream: Stream) -> None:
    sock = owner()
    if sock is not None:
        sock._bereave(stream)


def _der(certificate: Any) -> bytes:
    return bytes(certificate.public_bytes(Encoding.DER))


def _check_connected(sock: socket.socket) -> None:
    """OSError if it is not connected, or closed by now, or reset by its peer."""
    try:
        sock.getpeername()
    except OSError:
        if sock.fileno() != -1 and (number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            raise system_error(number) from None
        raise


_NOBODYS = contextlib.nullcontext()
_KERNEL_TIMEOUTS = tuple(
    option for name in ("SO_RCVTIMEO", "SO_SNDTIMEO") if (option := getattr(socket, name, None)) is not None
)


def _kernel_timeout(sock: socket.socket, option: int) -> float:
    """What setsockopt(2) set as *option*, in seconds; 0 for none."""
    found = sock.getsockopt(socket.SOL_SOCKET, option, 16)
    if len(found) == 4:  # Windows: a DWORD of milliseconds
        return int.from_bytes(found, sys.byteorder) / 1000
    half = len(found) // 2
    seconds, microseconds = (int.from_bytes(part, sys.byteorder) for part in (found[:half], found[half:]))
    return seconds + microseconds / 1e6
