"""One TLS session as a state machine that never sleeps: data, or what it wants.

Theory of operation
-------------------
Every call below either does its work or answers with a `Want`.  The owner then waits for that direction
and makes *the same call again*.  Nobody else may make a call meanwhile, and six facts about OpenSSL
decide what "the same call" means:

* A write that answered with a want has been half done: the record may already be encrypted.  Since
  25.2 pyOpenSSL turns OpenSSL's own check off (SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER), so other bytes of the
  same length would be accepted in silence and the *old* bytes sent.  Hence the engine itself insists on the
  identical object.
* While a record is half written, no other call that has to write can: SSL_read answering a KeyUpdate or a
  renegotiation fails, fatally, with "bad length".  But not to read while a write is stuck is a deadlock when
  both sides write.  (OpenSSL puts a first KeyUpdate off; the second one, or a ClientHello, is fatal.)  So the
  engine never leaves a record half written: see the detour below.
* Empty operations lie: SSL_write of nothing looks like an end of file, SSL_read of nothing like a want.
  Neither is ever passed on.
* To SSL_read the end of TCP without close_notify is a fatal error, and SSL_write refuses to go on after it, though the
  peer may have shut down only its half.  Who has yet to write has the detour, where the engine meets that end itself.
* After one fatal error every later one is empty.  The first is kept and copies of it are raised, for ever: what is
  raised holds the frames it came through, and through them the engine.
* In the middle of a TLS 1.2 renegotiation SSL_write would run the handshake and is fatally surprised by
  application data of the peer, which is legitimate there; SSL_read takes both.  So a write steps back
  (Want.READ, without a call) until reads have finished the handshake.
* SSL_shutdown in the middle of a handshake is an error, and before the last write it loses that write.
  The first is answered by Want.READ likewise, the second is the caller's order of calls.  A renegotiation
  we have asked for counts as begun: after our close_notify OpenSSL would ignore the peer's answer, and leave
  the peer in the middle of its handshake for ever.

OpenSSL's exceptions end here: what leaves is a `SessionEnded` from `bridge.errors`.

The same engine runs over a socket, which OpenSSL reads and writes itself, and over memory (`sock=None`):
then Want.READ means "feed me ciphertext" and whatever it has to say waits in `take_output`.

The detour
----------
OpenSSL over a socket is fast as long as the kernel takes whole records.  When it does not (WANT_WRITE after
the handshake), the engine gives the connection two memory BIOs in the socket's place and repeats the call,
which now succeeds: the rest of the record is in memory, OpenSSL has nothing pending, and reading is safe.
`flush` carries the memory to the socket; when all is out and nothing read is left in memory either, the
connection gets its socket back.  At most one record and the answers to the peer's handshake messages
are ever in memory.

The length of a call
--------------------
How long a call takes must not be for the peer to say, whose turn it is not.  A read stops behind a few records that
carry no data (see `bridge.connection`); on the detour it is given no more than so many.  But a client in the middle
of a handshake skips each HelloRequest inside the one call, for as long as there are any (RFC 5246, 7.4.1.1).  So a
client shakes hands over memory, a record at a time; and where it follows a server of TLS 1.2 that asks for a new
handshake, it looks at the type of each record, which is not encrypted there, and meets such a one on the detour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from cryptography import x509
from OpenSSL import SSL

from bridge.connection import session_reused, tls_unique
from bridge.context import Context
from bridge.errors import NotTLS, PeerReset, SessionEnded, TLSError, Truncated, fresh, tls_error
from bridge.limits import RECORD_BYTES
from bridge.names import peer_certificate, presented_chain, verified_chain
from bridge.poll import Want
from bridge.record import Record

T = TypeVar("T")

_CALLS = ("handshake", "read", "peek", "write", "flush", "shutdown", "renegotiate")
_KEYS = {(call, want): (call, want) for call in _CALLS for want in Want}
"""One object for all sessions, which count by them."""
_ESTABLISHED = b"SSL negotiation finished successfully"
_TLS_CONTENT_TYPES = range(20, 25)  # RFC 8446, 5.1 and RFC 6520
HEADER_BYTES = 5
FEEDS = 6
"""How often one call is given a record, or as much of it as there is: what a server says at a time in TLS 1.3."""
_HANDSHAKE_RECORD = b"\x16"
_PLAIN_PROTOCOLS = {
    b"GET ": "HTTP",
    b"POST": "HTTP",
    b"HEAD": "HTTP",
    b"PUT ": "HTTP",
    b"OPTI": "HTTP",
    b"CONN": "HTTP",
    b"DELE": "HTTP",
    b"HTTP": "HTTP",
    b"PRI ": "HTTP/2",
    b"SSH-": "SSH",
    b"220 ": "SMTP or FTP",
    b"220-": "SMTP or FTP",
    b"EHLO": "SMTP",
    b"HELO": "SMTP",
    b"+OK ": "POP3",
    b"* OK": "IMAP",
}


@dataclasses.dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the handshake settled.  Made once by the session's owner, then read by anybody."""

    version: str
    """``"TLSv1.2"`` or ``"TLSv1.3"``."""
    cipher: str
    """OpenSSL's name of the cipher suite."""
    cipher_bits: int
    alpn: str | None
    peer_certificate: x509.Certificate | None
    verified_chain: tuple[x509.Certificate, ...]
    """Leaf first, root last; empty if the peer was not verified, or the session was resumed.

    Without those that OpenSSL can read and `cryptography` cannot, as in `presented_chain`."""
    server_name: str | None
    """The name in SNI (RFC 6066): what the client asked for."""
    peername: Any
    """The peer's address, as `socket.getpeername()` gives it."""
    resumed: bool
    presented_chain: tuple[x509.Certificate, ...] = ()
    """What the peer sent, its own certificate first, verified or not."""
    tls_unique: bytes = b""
    """The channel binding of that name (RFC 5929, 3).  In TLS 1.3 it binds nothing (RFC 9266)."""
    cipher_version: str = ""
    """The protocol that brought the cipher suite, as OpenSSL calls it: not always the one in use."""


class TLSEngine:
    """TLS over *sock* (non-blocking), or over memory if *sock* is None.  Belongs to one thread at a time."""

    __slots__ = (
        "_connection",
        "_context",
        "_due",
        "_error",
        "_established",
        "_follows",
        "_frozen",
        "_header",
        "_lost",
        "_mute",
        "_output",
        "_peer_closed",
        "_recv",
        "_resume_key",
        "_send",
        "_sock",
        "_steps_back",
        "first_bytes",
        "on_detour",
        "outlasting",
        "wants",
    )

    def __init__(
        self,
        context: Context,
        sock: socket.socket | None = None,
        *,
        server_hostname: str | None = None,
        resume_key: Hashable | None = None,
        resume: SSL.Session | None = None,
        owner: Callable[[], object] | None = None,
    ) -> None:
        self._context = context
        self._connection = context.connection(sock, server_hostname, resume_key, resume, owner)
        # Looked up once, and unbound: pyOpenSSL's class has a `__getattr__` and is slow, a bound method takes memory.
        self._recv, self._send = type(self._connection).recv, type(self._connection).send
        self._resume_key = resume_key
        self._sock: socket.socket | None = None  # what a detour leads round; a server's after the handshake
        self._output = b""  # taken from memory, not yet on the socket
        self._error: SessionEnded | None = None
        self._frozen: bytes | memoryview | None = None
        self._mute = False
        self.outlasting = False
        """It is on a detour for good: see `outlast`."""
        self._peer_closed = False
        self._steps_back = False
        self._established = False
        self._follows = False  # a server that asks for a new handshake
        self.on_detour = False
        """Whether ciphertext goes by way of memory just now."""
        self.first_bytes = b""
        """The peer's first bytes, if the owner has peeked at them: they tell what it speaks if not TLS."""
        self.wants: dict[tuple[str, Want], int] = {}
        """How often each call answered with each want."""
        if sock is not None and not context.server_side:
            self._sock = sock
            self._detour()

    # The calls.  Each answers with its result or with a Want, or raises the session's first cause.

    def handshake(self) -> Want | None:
        """SSL_do_handshake(3).  None when done."""
        want: Want | None = self._call("handshake", self._connection.do_handshake)
        if self._established or not self.on_detour:
            return want
        if not self.unflushed():
            want = self._fed_on("handshake", want, self._connection.do_handshake)
        return self.flush() or want

    def read(self, size: int) -> bytes | Want:
        """SSL_read(3): at most *size* bytes of one record; ``b""`` is the peer's close_notify and nothing else."""
        assert size > 0
        if self._error is not None:
            raise fresh(self._error)
        if self.on_detour:
            if not self.has_more() and not self._peer_closed:
                return self._received("read", self._wanted("read", Want.READ), size)
        elif self._follows:
            self._look_out()
        recv = self._recv  # to call it as a method takes CPython longer
        try:
            return recv(self._connection, size)
        except SSL.Error as error:
            return self._received("read", self._outcome("read", error, recv, self._connection, size), size)

    def last_words(self, size: int) -> bytes | Want:
        """As `read`, after a write has failed: what the peer had said before that, for as long as OpenSSL will read."""
        self._error = None
        return self.read(size)

    def peek(self, size: int) -> bytes | Want:
        """SSL_peek(3): as `read`, and the bytes stay."""
        assert size > 0
        return self._received(
            "peek",
            self._call("peek", self._recv, self._connection, size, socket.MSG_PEEK),
            size,
            socket.MSG_PEEK,
        )

    def _received(self, name: str, data: bytes | Want, *arguments: int) -> bytes | Want:
        if self.on_detour:
            data = self._fed_on(name, data, self._recv, self._connection, *arguments)
            if data is Want.READ and not self.unflushed():
                self._end_detour()
        if not data:
            self._peer_closed = True
        return data

    def _fed_on(self, name: str, result: T | Want, function: Callable[..., T], *args: Any) -> T | Want:
        """A call has answered with *result*: again, while it wants input and has some."""
        for _ in range(FEEDS):
            if result is not Want.READ or not self._feed_from_socket():
                break
            result = self._call(name, function, *args)
        return result

    def write(self, chunk: bytes | memoryview) -> int | Want:
        """SSL_write(3): how many bytes of *chunk* are on their way.  After a Want, only *chunk* itself may follow."""
        assert chunk
        if self._error is not None:
            raise fresh(self._error)
        if self._steps_back and self.mid_handshake():
            return self._wanted("write", Want.READ)
        if self._frozen is not None:
            assert self._frozen is chunk, "a pending write must be repeated with the same chunk"
            self._frozen = None
        send = self._send
        try:
            return send(self._connection, chunk)
        except SSL.Error as error:
            result: int | Want = self._outcome("write", error, send, self._connection, chunk)
            self._frozen = chunk if isinstance(result, Want) else None
            return result

    def shutdown(self) -> bool | Want:
        """SSL_shutdown(3): send close_notify.  Whether the peer's has been received too."""
        assert self._frozen is None, "close_notify would lose the pending write"
        if self.mid_handshake() or self.renegotiating():
            return self._wanted("shutdown", Want.READ)
        return self._call("shutdown", self._connection.shutdown)

    def renegotiate(self) -> None:
        """Schedule a renegotiation (TLS 1.2); `handshake` then starts it.  TLSError where it is not possible."""
        assert self._frozen is None, "a renegotiation must not overtake the pending write"
        self._call("renegotiate", self._connection.renegotiate)

    def renegotiating(self) -> bool:
        """Whether a renegotiation has been asked for and may still come; after close_notify no answer can."""
        return self._steps_back and not self._peer_closed and self._connection.renegotiate_pending()

    def mid_handshake(self) -> bool:
        """Whether a handshake is under way, so that application data cannot be written."""
        return self._steps_back and self._connection.get_state_string() != _ESTABLISHED

    def pending(self) -> int:
        """Decrypted bytes that are still inside OpenSSL."""
        return self._connection.pending()

    def session(self) -> SSL.Session | None:
        """SSL_get1_session(3): with TLS 1.3, of the newest ticket that was read."""
        return self._connection.get_session()

    def has_more(self) -> bool:
        """Whether something is inside, decrypted or not, that no poll will announce."""
        return self._connection.pending() > 0 or (self.on_detour and self._connection.fed() > 0)

    # After the handshake.

    def established(
        self, server_hostname: str | None, peername: Any, sock: socket.socket | None = None
    ) -> SessionInfo:
        """Verify who the peer is, and note what was settled.  CertificateError before any application byte.

        From here on wants to write *sock* lead to the detour.
        """
        self._context.verify(self._connection, server_hostname)
        connection = self._connection
        self._established = True
        self._end_detour()
        self._sock = sock
        version = sys.intern(connection.get_protocol_version_name())
        self._steps_back = version != "TLSv1.3"
        self.first_bytes = b""
        self._follows = self._steps_back and sock is not None and self._context.renegotiation
        self._follows &= not self._context.server_side
        name = connection.get_servername()
        alpn = connection.get_alpn_proto_negotiated()
        certificate = peer_certificate(connection)
        verified = connection.get_verify_mode() & SSL.VERIFY_PEER  # by the context that SNI chose
        return SessionInfo(
            version=version,
            cipher=sys.intern(connection.get_cipher_name() or ""),
            cipher_bits=connection.get_cipher_bits() or 0,
            alpn=alpn.decode("ascii", "replace") if alpn else None,
            peer_certificate=certificate,
            verified_chain=verified_chain(connection) if verified else (),
            server_name=_as_text(name) if name else server_hostname,
            peername=peername,
            resumed=session_reused(connection),
            presented_chain=presented_chain(connection, certificate),
            tls_unique=tls_unique(connection, self._context.server_side),
            cipher_version=sys.intern(connection.get_cipher_version() or ""),
        )

    def remember(self) -> None:
        """Keep the session for resumption, once its ticket has come (TLS 1.3: after the first reads)."""
        if self._resume_key is not None:
            self._context.remember(self._connection, self._resume_key)

    # The detour.

    def flush(self) -> Want | None:
        """Carry what is in memory to the socket; None when all is out and OpenSSL has its socket back, if it may."""
        assert self._sock is not None
        self.unflushed()
        while self._output:
            try:
                sent = self._sock.send(self._output)
            except BlockingIOError:
                return self._wanted("flush", Want.WRITE)
            except OSError as error:
                raise self.fail(error) from error
            self._output = self._output[sent:]
        self._end_detour()
        return None

    def unflushed(self) -> int:
        """Bytes of ciphertext that are waiting for `flush`."""
        if self.on_detour:
            output = self.take_output()  # also when mute: memory must not fill
            if not self._mute:
                self._output += output
        return len(self._output)

    def mute(self) -> None:
        """Say nothing more, after our close_notify (RFC 8446, 6.1), not even the answer to a KeyUpdate.

        OpenSSL would answer.  A peer that has read our close_notify and closed its socket answers *that* with a
        reset, which destroys what of the peer's last bytes we have not read yet.  So from here on it is a detour
        from which nothing comes out but what is in it already.
        """
        self.unflushed()
        self.outlast()
        self._mute = True

    def outlast(self) -> None:
        """From here on `write` goes on behind the end of the peer's stream, of which `read` says Truncated again.

        OpenSSL that has met that end writes nothing more.  So this is a detour for good, and the end is kept from it.
        """
        assert self._sock is not None
        if not self.on_detour:
            self._detour()
        self.outlasting = True

    def _detour(self) -> None:
        self._connection.over_memory()
        self.on_detour = True
        # Of the record that is being fed: its header so far, and bytes to come after that; whether that is a guess.
        self._header, self._due, self._lost = b"", 0, False

    def _end_detour(self) -> None:
        """Give the connection its socket back, if nothing is in memory and no call could take too long."""
        if not self.on_detour or self.outlasting or not self._established or self._connection.fed():
            return
        if self._follows and (self._lost or self._due or self._header or self.mid_handshake()):
            return
        assert self._sock is not None
        self._connection.over_socket(self._sock)
        self.on_detour = False

    def _look_out(self) -> None:
        """Take the detour if the next record may ask for a handshake."""
        assert self._sock is not None
        try:
            if self._sock.recv(1, socket.MSG_PEEK) == _HANDSHAKE_RECORD:
                self._detour()
        except BlockingIOError:
            pass
        except OSError as error:  # the kernel tells it once
            raise self.fail(error) from error

    def leftover(self) -> bytes:
        """What was read too far on a detour: the plain bytes behind the peer's close_notify."""
        return self._connection.unread() if self.on_detour else b""

    def _feed_from_socket(self) -> bool:
        """Read no further than the record OpenSSL waits for, so that a poll goes on to speak of the next."""
        assert self._sock is not None
        try:
            ciphertext = self._sock.recv(self._due or self._record_ahead())
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.fail(error) from error
        if not ciphertext and self.outlasting:
            raise _cut_off("while in read")
        self._due = max(0, self._due - len(ciphertext))
        self._into_memory(ciphertext)
        return True

    def _record_ahead(self) -> int:
        """How much there is to be read of the next record; of its header only, while that is not whole."""
        assert self._sock is not None
        begun = len(self._header)
        self._header += self._sock.recv(HEADER_BYTES - begun, socket.MSG_PEEK)
        ahead = len(self._header) - begun
        if len(self._header) == HEADER_BYTES:
            size, self._header = _record_size(self._header), b""
            self._lost |= size is None
            self._due = ahead = ahead + (RECORD_BYTES if size is None else size)
        return ahead or HEADER_BYTES  # at the end of the stream there is nothing

    def fail(self, error: OSError) -> SessionEnded:
        """The socket has failed with *error*, and so has every call from now on.  What they raise."""
        self._error = PeerReset(error.errno, f"the connection failed: {error.strerror}")
        self._error.__cause__ = error.with_traceback(None)
        return fresh(self._error)

    # Over memory.

    def feed(self, ciphertext: bytes) -> None:
        """Give the engine what the peer sent; ``b""`` is the end of the stream below."""
        if not self._established and len(self.first_bytes) < 16:
            self.first_bytes += ciphertext[:16]
        self._into_memory(ciphertext)

    def _into_memory(self, ciphertext: bytes) -> None:
        if ciphertext:
            self._connection.bio_write(ciphertext)
        else:
            self._connection.bio_shutdown()

    def take_output(self) -> bytes:
        """The ciphertext to send to the peer, ``b""`` if there is none.  To be called after every call above."""
        size = self._connection.said()
        return self._connection.bio_read(size) if size else b""

    # How a call ends.

    def _call(self, name: str, function: Callable[..., T], *args: Any) -> T | Any:
        if self._error is not None:
            raise fresh(self._error)
        try:
            return function(*args)
        except SSL.Error as error:
            return self._outcome(name, error, function, *args)

    def _outcome(self, name: str, error: SSL.Error, function: Callable[..., T], *args: Any) -> T | Any:
        """What a call answers that ended in *error*: a want, an end, or its translation raised."""
        if isinstance(error, SSL.WantReadError):
            return self._wanted(name, Want.READ)
        if isinstance(error, SSL.WantWriteError):
            want = self._wanted(name, Want.WRITE)
            if self._sock is None:
                return want
            self._detour()
            return self._call(name, function, *args)
        if isinstance(error, SSL.ZeroReturnError) and name in ("read", "peek"):
            return b""
        self._error = self._translate(name, error)
        if self.on_detour and self.unflushed() and self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.send(self._output)  # the alert
        raise fresh(self._error)

    def _wanted(self, name: str, want: Want) -> Want:
        key = _KEYS[name, want]
        self.wants[key] = self.wants.get(key, 0) + 1
        return want

    def _translate(self, name: str, error: SSL.Error) -> SessionEnded:
        record = self._connection.get_app_data()
        if isinstance(record, Record) and isinstance(record.error, SessionEnded):
            return record.error
        during = (
            f"during the {name}" if name in ("handshake", "shutdown", "renegotiate") else f"while in {name}"
        )
        if isinstance(error, SSL.ZeroReturnError):
            ended = Truncated(8, f"the peer said close_notify {during}")
            ended.reason = "CLOSE_NOTIFY"
            return ended
        if isinstance(error, SSL.SysCallError):
            number, text = error.args
            if number == -1:
                return _cut_off(during)
            return PeerReset(number, f"the connection failed {during}: {text}")
        reasons = [reason for _, _, reason in error.args[0]] if error.args and error.args[0] else []
        reason = (reasons and reasons[0]) or "unknown error"  # such as an alert that has no name
        if name == "handshake" and self.first_bytes and self.first_bytes[0] not in _TLS_CONTENT_TYPES:
            return self._not_tls(reason)
        return tls_error(_constant(reason), f"{reason} ({during})")

    def _not_tls(self, reason: str) -> TLSError:
        spoken = _PLAIN_PROTOCOLS.get(self.first_bytes[:4].upper())
        what = f"plain {spoken}" if spoken else "something else"
        shown, side = self.first_bytes, "the server speaks {}, not TLS"
        if self._context.server_side:  # of a client that may have begun with a password, a record's header
            shown, side = shown[:HEADER_BYTES], "the client speaks {} to this TLS port"
        text = f"{side.format(what)}; its first bytes are {shown!r} ({reason})"
        return tls_error(_constant(reason), text, NotTLS)


@functools.lru_cache(256)
def _as_text(name: bytes) -> str:
    """The name in SNI: one object for the sessions that ask for the same one, but no peer fills memory with names."""
    return name.decode("ascii", "replace")


def _record_size(header: bytes) -> int | None:
    """How much follows the *header* of a record (RFC 8446, 5.1).

    None if this is no header, for the detour may begin in the middle of a record: OpenSSL is given what there is.
    """
    size = int.from_bytes(header[3:5], "big")
    valid = header[0] in _TLS_CONTENT_TYPES and header[1] == 3 and size <= RECORD_BYTES + 2048
    return size if valid else None


def _cut_off(during: str) -> Truncated:
    return Truncated(8, f"the peer closed the connection without close_notify, {during}")


def _constant(reason: str) -> str:
    return reason.upper().replace(" ", "_")
