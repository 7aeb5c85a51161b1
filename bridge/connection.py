"""One connection, and the callbacks OpenSSL makes for it.

*A callback never raises.*  pyOpenSSL parks an exception of a callback on the *context*, which all connections
share, and whichever of them looks next raises it.  So a callback notes what went wrong on the
`bridge.record.Record` of its own connection, and refuses; what OpenSSL gives no way to refuse there,
`bridge.context.Context.verify` refuses after the handshake, before the first application byte.

OpenSSL calls the callbacks on the thread of the connection's owner, in the middle of a handshake.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal

from cryptography import x509
from cryptography.x509 import ocsp
from OpenSSL import SSL, crypto
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _lib

from bridge import forks
from bridge.errors import CertificateError, ConfigurationError, SessionEnded, TLSError, tls_error, words
from bridge.names import ADDRESS_MISMATCH, HOST_MISMATCH, PeerName, peer_certificate, refusal
from bridge.record import Record

OCSPStaple = bytes | Callable[[str | None], bytes] | None
"""What a server staples (DER): one response, or a callable given the SNI name; ``b""`` is nothing."""

OCSPCheck = Callable[[bytes, x509.Certificate], bool] | None
"""Whether a client accepts a stapled response (``b""`` if there is none) for the server's certificate."""

KeyLog = str | os.PathLike[str] | Callable[[bytes], object] | IO[Any] | Literal[False] | None
"""Where session secrets are written: a path, a callable given each line, a file; False is nowhere."""

# By names of their own, for where speed counts.
_get_error: Any = _lib.SSL_get_error
_read: Any = _lib.SSL_read
_write: Any = _lib.SSL_write
_unpack: Callable[[Any, int], bytes] = _ffi.unpack
_WANT_READ = _lib.SSL_ERROR_WANT_READ
_WANT_WRITE = _lib.SSL_ERROR_WANT_WRITE
_SYSCALL = _lib.SSL_ERROR_SYSCALL
_forget_errors: Callable[[], object] = _lib.ERR_clear_error
_NOT_YET = {errno.EAGAIN, errno.EWOULDBLOCK}
_REFUSED = "certificate verify failed"
"""SSL_R_CERTIFICATE_VERIFY_FAILED, in OpenSSL's words."""
_ACCEPTED = (0, 1)
"""X509_V_OK, and what OpenSSL makes of it where a callback refuses all the same: X509_V_ERR_UNSPECIFIED."""


SCRATCH_BYTES = 16 * 1024
ONE_RECORD = SCRATCH_BYTES + 1
"""A size for `Connection.recv` that its buffer is too small for: it makes one SSL_read(3) and gets behind nothing."""
OTHER_RECORDS = 4
"""How many records without data (tickets, new keys, requests for a handshake) one read gets behind: what honest peers
send in a row.  A peer that floods us with more has its turns like everybody."""
MOST_BYTES = 2**30
"""What one SSL_write(3) is given at most: it counts in an int."""
_scratches: list[Any] = []
"""Buffers that no thread reads into just now: as many as have ever been in use at once, not one for each thread."""


class Connection(SSL.Connection):
    """A pyOpenSSL connection that answers sooner, and with its own errors.  Belongs to one thread at a time.

    pyOpenSSL asks SSL_get_error(3) after every success, a foreign call of its own, and before that raises
    whatever a callback of the same context has parked, which may be another connection's.

    OpenSSL's queue of errors belongs to the thread, and SSL_get_error(3) looks into it first.  pyOpenSSL leaves there
    what a failed system call put; so the next connection whose call has to wait would seem to have failed.

    pyOpenSSL sets SSL_MODE_AUTO_RETRY: then one SSL_read(3) takes records without data for as long as the kernel has
    any, which a peer can see to.  Without it SSL_read stops behind each such record, and wants to read as if there
    were no more.  The difference is the EAGAIN of a socket that is empty; where it cannot be told, a poll will.
    Memory holds what it was given and no more, so there the mode stays.

    In TLS 1.3 SSL_get_error(3) does not recognize a close_notify after a user_canceled, and Java closes its sockets so.
    """

    def __init__(self, context: SSL.Context, sock: socket.socket | None) -> None:
        super().__init__(context, sock)
        if sock is not None:
            self._retry(False)

    def _retry(self, automatically: bool) -> None:
        set_or_clear = _lib.SSL_set_mode if automatically else _lib.SSL_clear_mode
        set_or_clear(_native(self), _lib.SSL_MODE_AUTO_RETRY)

    def _raise_ssl_error(self, ssl: Any, result: int) -> None:
        if result > 0:
            return
        number = _ffi.errno
        error = self._error(ssl, result)
        if error == _WANT_READ:
            raise SSL.WantReadError()
        if error == _WANT_WRITE:
            raise SSL.WantWriteError()
        if error == _SYSCALL and result == 0 and self.get_shutdown() & SSL.RECEIVED_SHUTDOWN:
            raise SSL.ZeroReturnError()
        if number:
            _ffi.errno = number
        try:
            super()._raise_ssl_error(ssl, result)
        except SSL.Error as refused:
            _forget_errors()
            self._note_refusal(refused)
            raise
        except Exception as parked:
            _forget_errors()
            record = self.get_app_data()
            if isinstance(record, Record):
                record.note(_tls_error("a callback of this OpenSSL.SSL.Context raised", parked), parked)
            raise SSL.Error([]) from parked

    def _note_refusal(self, error: SSL.Error) -> None:
        """Note why the peer's certificate was refused, if that is the *error*: a user's own callback notes nothing."""
        record = self.get_app_data()
        queue = error.args[0] if type(error) is SSL.Error and error.args else []
        if isinstance(record, Record) and any(reason == _REFUSED for _, _, reason in queue):
            code = _lib.SSL_get_verify_result(self._ssl)
            record.note(_verification_error(record.context.server_side, code))

    def _error(self, ssl: Any, result: int) -> int:
        """SSL_get_error(3)."""
        error: int = _get_error(ssl, result)
        if error == _SYSCALL and (_ffi.errno == 0 or _ffi.errno in _NOT_YET):
            _forget_errors()  # of somebody else, for no system call has failed
            error = _get_error(ssl, result)
        return error

    def recv(self, bufsiz: int, flags: int | None = None) -> bytes:
        """SSL_read(3) into a buffer that is used again and again; otherwise as pyOpenSSL's.

        WantReadError on a socket also behind a few records without data, whether or not more is there.
        """
        if flags or bufsiz > SCRATCH_BYTES:
            return super().recv(bufsiz, flags)
        try:
            scratch = _scratches.pop()
        except IndexError:
            scratch = _ffi.new("char[]", SCRATCH_BYTES)
        try:
            result = _read(self._ssl, scratch, bufsiz)
            if result <= 0:
                result = self._read_on(result, scratch, bufsiz)
            return _unpack(scratch, result)
        finally:
            _scratches.append(scratch)

    def _read_on(self, result: int, scratch: Any, size: int) -> int:
        """SSL_read(3) has returned *result*: again, if that was for a record without data.  It succeeds, or raises."""
        for _ in range(OTHER_RECORDS):
            blocked = _ffi.errno in _NOT_YET or self._into_ssl is not None
            if blocked or self._error(self._ssl, result) != _WANT_READ:
                break
            result = _read(self._ssl, scratch, size)
            if result > 0:
                return result
        self._raise_ssl_error(self._ssl, result)
        return result

    def send(self, buf: Any, flags: int = 0) -> int:
        """SSL_write(3) of bytes or a view, or of the beginning, without pyOpenSSL's conversions."""
        size = len(buf) if len(buf) < MOST_BYTES else MOST_BYTES
        result: int = _write(self._ssl, buf if type(buf) is bytes else _ffi.from_buffer(buf), size)
        if result <= 0:
            self._raise_ssl_error(self._ssl, result)
        return result

    def fed(self) -> int:
        """How many bytes were fed into memory and OpenSSL has not read (BIO_get_mem_data(3))."""
        return int(_lib.BIO_get_mem_data(self._into_ssl, _ffi.NULL))

    def said(self) -> int:
        """How many bytes `bio_read` would give."""
        return int(_lib.BIO_get_mem_data(self._from_ssl, _ffi.NULL))

    def unread(self) -> bytes:
        """What was fed into memory and OpenSSL has not read."""
        scratch = _ffi.new("char[]", self.fed() + 1)
        count = max(0, _lib.BIO_read(self._into_ssl, scratch, len(scratch)))
        return bytes(_ffi.buffer(scratch, count))

    def over_memory(self) -> None:
        """From now on read and write two memory BIOs: `bio_write`, `bio_read` (SSL_set_bio(3)).

        A record that is half written goes on into memory when the call is repeated.
        """
        into, out = _lib.BIO_new(_lib.BIO_s_mem()), _lib.BIO_new(_lib.BIO_s_mem())
        _lib.SSL_set_bio(_native(self), into, out)  # which takes both over
        vars(self).update(_into_ssl=into, _from_ssl=out)
        self._retry(True)

    def over_socket(self, sock: socket.socket) -> None:
        """From now on read and write *sock* itself (SSL_set_fd(3)); the memory BIOs must be empty."""
        vars(self).update(_into_ssl=None, _from_ssl=None)
        _lib.SSL_set_fd(_native(self), sock.fileno())
        self._retry(False)


def adopt_verification(connection: SSL.Connection, raw: SSL.Context) -> None:
    """Let *raw* decide whether *connection*'s peer is verified; note refusals if *raw* has no callback.

    SSL_set_SSL_CTX(3) leaves this as it was.  The connection's owner's thread.
    """
    mode = raw.get_verify_mode()
    callback = getattr(raw, "_verify_callback", None)
    if callback is None or not mode & SSL.VERIFY_PEER:
        connection.set_verify(mode, note_verification if mode & SSL.VERIFY_PEER else None)
    else:
        _lib.SSL_set_verify(_native(connection), mode, callback)
        vars(connection).update(_verify_helper=raw._verify_helper, _verify_callback=callback)  # kept alive


def add_options(connection: SSL.Connection, options: int) -> None:
    """SSL_set_options(3), which pyOpenSSL has since version 26 only.  The connection's owner's thread."""
    if hasattr(SSL.Connection, "set_options"):
        connection.set_options(options)
    else:
        _lib.SSL_set_options(_native(connection), options)


def session_reused(connection: SSL.Connection) -> bool:
    """SSL_session_reused(3), which pyOpenSSL does not offer.  The connection's owner's thread."""
    return bool(_lib.SSL_session_reused(_native(connection)))


def tls_unique(connection: SSL.Connection, server_side: bool) -> bytes:
    """The first Finished message of the newest handshake (RFC 5929, 3.1): the client's, or of a resumption the
    server's.  The connection's owner's thread."""
    ours = server_side == session_reused(connection)
    return (connection.get_finished() if ours else connection.get_peer_finished()) or b""


def session_size(session: SSL.Session) -> int:
    """Bytes that `session_der` would give.  Any thread."""
    return int(_lib.i2d_SSL_SESSION(getattr(session, "_session", None), _ffi.NULL))


def session_der(session: SSL.Session) -> bytes:
    """i2d_SSL_SESSION(3).  It holds the session's secret.  Any thread."""
    native = getattr(session, "_session", None)
    buffer = _ffi.new("unsigned char[]", session_size(session))
    _lib.i2d_SSL_SESSION(native, _ffi.new("unsigned char **", buffer))
    return bytes(_ffi.buffer(buffer))


def same_session(session: SSL.Session, other: SSL.Session | None) -> bool:
    """Whether both are one SSL_SESSION: OpenSSL makes a new one for each ticket.  Any thread."""
    return other is not None and bool(getattr(session, "_session", 1) == getattr(other, "_session", 2))


def _native(connection: SSL.Connection) -> Any:
    return getattr(connection, "_ssl", None)


def note_verification(
    connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, ok: int
) -> bool:
    """SSL_CTX_set_verify(3): note why a chain is refused, and change nothing about it.

    But for the name, which `Context.check_name` judges: OpenSSL only makes it do so in time (`expect_name`).
    """
    record = connection.get_app_data()
    if ok or not isinstance(record, Record):
        return bool(ok)
    try:
        if code not in (HOST_MISMATCH, ADDRESS_MISMATCH) or record.expected is None:
            raise _verification_error(record.context.server_side, code, certificate, depth)
        record.context.check_name(certificate.to_cryptography(), record.expected)
    except SessionEnded as error:
        record.note(error)
        return False
    except (ValueError, x509.InvalidVersion) as error:
        record.note(refusal(f"the peer's certificate is malformed: {error}", code))
        return False
    return True


def expect_name(connection: SSL.Connection, name: PeerName) -> None:
    """Have OpenSSL look for *name* in the peer's certificate, in the middle of the handshake.  Its owner's thread.

    X509_VERIFY_PARAM_set1_host(3).  So the wrong server is told in an alert, and not shown the client's certificate.
    """
    param = _lib.SSL_get0_param(_native(connection))
    if name.address is not None:
        _lib.X509_VERIFY_PARAM_set1_ip(param, name.address.packed, len(name.address.packed))
        return
    flags = _lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | _lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
    _lib.X509_VERIFY_PARAM_set_hostflags(param, flags)
    _lib.X509_VERIFY_PARAM_set1_host(param, name.ascii.encode(), len(name.ascii))


def _verification_error(
    server_side: bool, code: int, certificate: crypto.X509 | None = None, depth: int | None = None
) -> CertificateError:
    """Without *certificate* and *depth* if a callback of the user's has refused it."""
    whose, trust = ("client", "client_ca") if server_side else ("server", "cafile")
    text = _ffi.string(_lib.X509_verify_cert_error_string(code)).decode("ascii", "replace")
    more = ""
    if certificate is not None:
        more = f" (depth {depth}: {_described(certificate)})"
        more += f"; if you trust it, pass its CA as {trust}" if code in _UNTRUSTED else ""
    elif code in _ACCEPTED:
        code, text = 1, "the context's verify callback refused what OpenSSL accepts"
    return refusal(f"the {whose}'s certificate was refused: {text}{more}", code, text, depth)


def _described(certificate: crypto.X509) -> str:
    try:
        shown = certificate.to_cryptography()
        names = f"subject {shown.subject.rfc4514_string()!r}, issuer {shown.issuer.rfc4514_string()!r}"
        return f"{names}, valid from {shown.not_valid_before_utc} until {shown.not_valid_after_utc}"
    except Exception as error:
        return f"unreadable: {error}"


_UNTRUSTED = (18, 19, 20, 21)
"""X509_V_ERR_*: the chain ends where nobody is trusted."""


def select_alpn(protocols: Sequence[bytes], _: SSL.Connection, offered: list[bytes]) -> Any:
    """SSL_CTX_set_alpn_select_cb(3): the server's order decides."""
    return next((name for name in protocols if name in offered), SSL.NO_OVERLAPPING_PROTOCOLS)


def staple(source: bytes | Callable[[str | None], bytes], connection: SSL.Connection, _: object) -> bytes:
    """SSL_CTX_set_tlsext_status_cb(3), on a server: the OCSP response, or nothing if *source* fails."""
    try:
        if isinstance(source, bytes):
            return source
        name = connection.get_servername()
        return ocsp_response(source(name.decode("ascii", "replace") if name else None))
    except Exception as error:
        connection.get_app_data().note(_tls_error("our ocsp_staple failed with", error), error)
        return b""


def ocsp_response(response: object) -> bytes:
    """*response*, if it is one or empty: OpenSSL 4 silently staples nothing in place of anything else.

    TypeError or ValueError otherwise.  Any thread.
    """
    if not isinstance(response, bytes):
        raise TypeError(f"a response is bytes, not {type(response).__name__}")
    if response:
        ocsp.load_der_ocsp_response(response)
    return response


def check_staple(
    check: Callable[[bytes, x509.Certificate], bool], connection: SSL.Connection, response: bytes, _: object
) -> bool:
    """SSL_CTX_set_tlsext_status_cb(3), on a client: accept the server's certificate if *check* does."""
    record: Record = connection.get_app_data()
    try:
        certificate = peer_certificate(connection)
        if certificate is not None and check(response, certificate):
            return True
        what = f"the stapled response ({len(response)} bytes)" if response else "a server that stapled none"
        record.note(refusal(f"ocsp_check refused {what}"))
    except Exception as error:
        record.note(refusal(f"ocsp_check raised {type(error).__name__}: {words(error)}"), error)
    return False


def log_key(write: Callable[[bytes], object], connection: SSL.Connection, line: bytes) -> None:
    """SSL_CTX_set_keylog_callback(3)."""
    try:
        write(line)
    except Exception as error:
        connection.get_app_data().note(_tls_error("writing the key log failed with", error), error)


def _tls_error(what: str, cause: BaseException) -> TLSError:
    return tls_error("CALLBACK_FAILED", f"{what} {type(cause).__name__}: {words(cause)}")


# Key log (the format of SSLKEYLOGFILE, RFC 9850).


def keylog_writer(keylog: KeyLog) -> Callable[[bytes], object] | None:
    """What writes one line of the key log, under a lock; None for no key log."""
    if keylog is None and not sys.flags.ignore_environment:
        keylog = os.environ.get("SSLKEYLOGFILE") or None
    if keylog is None or keylog is False:
        return None
    lock = forks.open_lock()  # reentrant: a signal handler may shake hands in the middle
    write: Callable[[bytes], object]
    if isinstance(keylog, (str, os.PathLike)):
        write = functools.partial(_append_line, keylog)
        try:
            _append_line(keylog, None)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot write the key log {os.fspath(keylog)!r}: {error}") from error
    elif callable(keylog):
        write = keylog
    elif hasattr(keylog, "write"):
        write = functools.partial(_write_line, keylog)
    else:
        raise ConfigurationError(f"keylog must be a path, a callable or a file, not {type(keylog).__name__}")

    def locked(line: bytes) -> None:
        with lock:
            write(line)

    return locked


def _append_line(path: str | os.PathLike[str], line: bytes | None) -> None:
    """Open, append and close: no descriptor to leak, and O_APPEND keeps lines of several writers whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if line is not None:
            os.write(descriptor, line + b"\n")
    finally:
        os.close(descriptor)


def _write_line(file: IO[Any], line: bytes) -> None:
    text = hasattr(file, "encoding")
    file.write(line.decode("ascii") + "\n" if text else line + b"\n")
    file.flush()
