"""The drop-in's `SSLContext`: the stdlib's own, which can also say in pyOpenSSL what it was told.

The context of the stdlib stays configured: it validates, raises, answers questions and serves `wrap_bio`.
What can be read back from it is read whenever a session begins; what cannot is recorded as it comes: keys and
certificates, whom to trust, the protocols for ALPN, parameters for key exchange.  Both together make an
`OpenSSL.SSL.Context`, and a new one only if something has changed, since the first connection freezes it.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import operator
import os
import re
import ssl
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import PublicKeyAlgorithmOID
from OpenSSL import SSL, crypto
from OpenSSL._util import exception_from_error_queue
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _lib

from bridge import forks
from bridge.connection import keylog_writer, log_key, note_verification, select_alpn
from bridge.context import Context
from bridge.credentials import certificates, reasons, uncommented
from bridge.errors import HostnameMismatch
from bridge.names import PeerName
from bridge.record import Record
from bridge.ssl.facts import certificate_dict
from bridge.ssl.failures import ssl_error
from bridge.ssl.sockets import SSLSocket, Wire

__all__ = ["SSLContext", "stdlib_properties"]

Path: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
Secret: TypeAlias = "str | bytes | bytearray"

_PEM_CERTIFICATE = re.compile(rb"-----BEGIN ((?:X509 )?CERTIFICATE)-----.*?-----END \1-----", re.DOTALL)
_PEM_KEY = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)
_ONE_VERSION = {
    ssl.PROTOCOL_TLSv1: SSL.TLS1_VERSION,
    ssl.PROTOCOL_TLSv1_1: SSL.TLS1_1_VERSION,
    ssl.PROTOCOL_TLSv1_2: SSL.TLS1_2_VERSION,
}
_WRONG_SIDE = {True: (ssl.PROTOCOL_TLS_CLIENT, "server"), False: (ssl.PROTOCOL_TLS_SERVER, "client")}
_VERIFY = {
    ssl.CERT_NONE: SSL.VERIFY_NONE,
    ssl.CERT_OPTIONAL: SSL.VERIFY_PEER,
    ssl.CERT_REQUIRED: SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
}
_NO_PSK = "the bridge has no pre-shared keys; use certificates, or the stdlib's ssl"
_ENABLE_KTLS = 1 << 3
_NOT_OURS = SSL.OP_IGNORE_UNEXPECTED_EOF | _ENABLE_KTLS
"""Options not passed on: what was cut off must not look ended, nor the kernel encrypt where the bridge does."""


_Stdlib = ssl.SSLContext
"""For good, whatever `bridge.ssl.inject` puts in its place."""


class _Settings(NamedTuple):
    """All that a core context is made from, at one moment."""

    versions: tuple[int, int]
    options: int
    security_level: int
    ciphers: tuple[str, ...]
    ciphersuites: tuple[str, ...]
    verify_mode: int
    verify_flags: int
    check_hostname: bool
    common_name: bool
    post_handshake_auth: bool
    tickets: bool
    keylog: str | None
    sni_callback: Callable[..., object] | None
    identities: tuple[tuple[list[x509.Certificate], Any], ...]
    alpn: tuple[bytes, ...]
    curve: str | None
    dh_params: Any


@dataclass
class _Recorded:
    """What a context of the stdlib does not give back, and the core contexts made so far, by side."""

    ciphers: tuple[str, ...]
    ciphersuites: tuple[str, ...]
    identities: dict[type, tuple[list[x509.Certificate], Any]] = field(default_factory=dict)
    """Chain and key, by the kind of key: OpenSSL has room for one of each."""
    alpn: tuple[bytes, ...] = ()
    curve: str | None = None
    dh_params: Any = None
    store: crypto.X509Store = field(default_factory=crypto.X509Store)
    made: dict[bool, tuple[_Settings, Context]] = field(default_factory=dict)
    lock: Any = field(default_factory=forks.open_lock)
    """Held while the store is filled, and while a core context is made; a signal handler may come in the middle."""


class _StandIn(abc.ABCMeta):
    """While `SSLContext` is in the stdlib's place, what is one of the stdlib's is one of it, as everybody expects.

    An `abc.ABCMeta`, so that whoever mixes a context with an abstract class still can.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        return (cls._stands_in() and isinstance(instance, _Stdlib)) or super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return (cls._stands_in() and issubclass(subclass, _Stdlib)) or super().__subclasscheck__(subclass)

    def _stands_in(cls) -> bool:
        return cls is ssl.SSLContext


class SSLContext(ssl.SSLContext, metaclass=_StandIn):
    """An `ssl.SSLContext` whose sockets are the bridge's.  Any thread."""

    sslsocket_class = SSLSocket

    def _wrap_socket(
        self,
        sock: Any,
        server_side: bool = False,
        server_hostname: str | None = None,
        *,
        owner: ssl.SSLSocket,
        session: Any = None,
    ) -> Any:
        """What an `ssl.SSLSocket` asks its context for, to speak TLS.  An unusable setting is refused here.

        One that is not ours gets the stdlib's TLS: it would not leave time-outs, and the end of its descriptor, to us.
        """
        if not isinstance(owner, SSLSocket):
            plain = super()._wrap_socket  # type: ignore[misc]
            return plain(sock, server_side, server_hostname, owner=owner, session=session)
        return Wire(owner, self, bool(server_side), server_hostname, session)

    def core(self, server_side: bool) -> Context:
        """The bridge's context with these settings; the same one until a setting changes.  Any thread.

        ssl.SSLError if the protocol is for the other side, or pyOpenSSL's OpenSSL refuses a setting.
        """
        protocol, side = _WRONG_SIDE[server_side]
        if _plain(self).protocol == protocol:
            raise ssl_error(ssl.SSLError, 0, f"Cannot create a {side} socket with a {protocol.name} context")
        recorded = self._recorded
        with recorded.lock:
            settings = self._settings(recorded)
            made = recorded.made.get(server_side)
            if made is None or made[0] != settings:
                with _errors_of_ssl("OpenSSL refuses a setting"):
                    made = settings, self._make(settings, recorded.store, server_side)
                recorded.made[server_side] = made
            return made[1]

    @property
    def _recorded(self) -> _Recorded:
        """Made when it is first needed: `__new__` stays the stdlib's, whose warnings name its caller's line."""
        found: _Recorded | None = vars(self).get("_recorded")
        if found is None:
            found = vars(self).setdefault("_recorded", _Recorded(*_cipher_names(self)))
        return found

    def _settings(self, recorded: _Recorded) -> _Settings:
        plain = _plain(self)
        return _Settings(
            versions=_versions(plain),
            options=plain.options,
            security_level=self.security_level,
            ciphers=recorded.ciphers,
            ciphersuites=recorded.ciphersuites,
            verify_mode=_VERIFY[plain.verify_mode],
            verify_flags=plain.verify_flags,
            check_hostname=plain.check_hostname,
            common_name=self.hostname_checks_common_name,
            post_handshake_auth=self.post_handshake_auth,
            tickets=self.num_tickets > 0,
            keylog=self.keylog_filename,
            sni_callback=self.sni_callback,
            identities=tuple(recorded.identities.values()),
            alpn=recorded.alpn,
            curve=recorded.curve,
            dh_params=recorded.dh_params,
        )

    def _make(self, settings: _Settings, store: crypto.X509Store, server_side: bool) -> Context:
        raw = SSL.Context(SSL.TLS_METHOD)
        options = _set_protocol(raw, settings, server_side)
        _set_verification(raw, settings, store, server_side)
        for chain, key in settings.identities:
            raw.use_certificate(chain[0])
            for certificate in chain[1:]:
                raw.add_extra_chain_cert(certificate)
            if isinstance(key, crypto.PKey):
                _check(_lib.SSL_CTX_use_PrivateKey(raw._context, key._pkey))
            else:
                raw.use_privatekey(key)
        write = keylog_writer(settings.keylog or False)
        if write is not None:
            raw.set_keylog_callback(functools.partial(log_key, write))
        if server_side and settings.sni_callback is not None:
            _set_servername_callback(raw, functools.partial(_switch, self, settings.sni_callback))
        return _Core(
            raw,
            server_side=server_side,
            check_hostname=settings.check_hostname and not server_side,
            common_name=settings.common_name,
            renegotiation=not options & SSL.OP_NO_RENEGOTIATION,
            alpn=tuple(name.decode() for name in settings.alpn),
            versions=settings.versions,
            options=options,
            resumption=False,
        )

    # What cannot be read back.  The stdlib's own method comes first: it raises what it always raised.

    def load_cert_chain(
        self,
        certfile: Path,
        keyfile: Path | None = None,
        password: Callable[[], Secret] | Secret | None = None,
    ) -> None:
        """As the stdlib's."""
        secret: Secret | None = None
        if callable(password):
            ask = password

            def once() -> Secret:
                nonlocal secret
                secret = ask()
                return secret

            super().load_cert_chain(certfile, keyfile, once)
        else:
            super().load_cert_chain(certfile, keyfile, password)
            secret = password
        with _errors_of_ssl("pyOpenSSL cannot use the certificate or its key"):
            chain = certificates(_read(certfile), "certfile")
            key = _private_key(_read(certfile if keyfile is None else keyfile), secret, chain[0])
        with self._recorded.lock:
            self._recorded.identities[type(key)] = chain, key

    def load_verify_locations(
        self, cafile: Path | None = None, capath: Path | None = None, cadata: Any = None
    ) -> None:
        """As the stdlib's."""
        super().load_verify_locations(cafile, capath, cadata)
        recorded = self._recorded
        with _errors_of_ssl("pyOpenSSL cannot use the CA certificates"), recorded.lock:
            if cafile is not None or capath is not None:
                recorded.store.load_locations(*map(_encoded, (cafile, capath)))
            for certificate in _authorities(cadata):
                recorded.store.add_cert(certificate)

    def set_default_verify_paths(self) -> None:
        """As the stdlib's, and so is where it looks: its OpenSSL was built for this system."""
        super().set_default_verify_paths()
        paths, recorded = ssl.get_default_verify_paths(), self._recorded
        cafile = os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)
        capath = os.environ.get(paths.openssl_capath_env, paths.openssl_capath)
        with recorded.lock:
            with contextlib.suppress(crypto.Error):
                recorded.store.load_locations(_encoded(cafile))
            with contextlib.suppress(crypto.Error):
                recorded.store.load_locations(None, _encoded(capath))

    def set_ciphers(self, cipherlist: str, /) -> None:
        """As the stdlib's.  One it refuses leaves none but those of TLS 1.3 there too."""
        try:
            super().set_ciphers(cipherlist)
        finally:
            self._recorded.ciphers, self._recorded.ciphersuites = _cipher_names(self)

    if sys.version_info >= (3, 15):

        def set_ciphersuites(self, ciphersuites: str, /) -> None:
            """As the stdlib's."""
            super().set_ciphersuites(ciphersuites)
            self._recorded.ciphers, self._recorded.ciphersuites = _cipher_names(self)

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """As the stdlib's."""
        protocols = list(alpn_protocols)
        super().set_alpn_protocols(protocols)
        self._recorded.alpn = tuple(protocol.encode() for protocol in protocols)

    def set_psk_client_callback(self, *_: object) -> NoReturn:
        """Refused: a program that relies on a pre-shared key must not think that it has one."""
        raise NotImplementedError(_NO_PSK)

    def set_psk_server_callback(self, *_: object, **__: object) -> NoReturn:
        """Refused likewise."""
        raise NotImplementedError(_NO_PSK)

    def set_ecdh_curve(self, name: str, /) -> None:
        """As the stdlib's."""
        super().set_ecdh_curve(name)
        self._recorded.curve = os.fsdecode(name)

    def load_dh_params(self, path: str, /) -> None:
        """As the stdlib's."""
        super().load_dh_params(path)
        with _errors_of_ssl("pyOpenSSL cannot use the DH parameters"):
            self._recorded.dh_params = _dh_params(_read(path))


class _Core(Context):
    """A core context that can also find a server's name in the subject of its certificate, as the stdlib can."""

    __slots__ = ("_common_name",)

    _common_name: bool

    def __init__(self, raw: SSL.Context, *, common_name: bool, **options: Any) -> None:
        super().__init__(raw, **options)
        object.__setattr__(self, "_common_name", common_name)

    def check_name(self, certificate: x509.Certificate, server_hostname: str) -> None:
        """As `Context.check_name`, with the common name in place of a subjectAltName that holds no DNS name."""
        try:
            super().check_name(certificate, server_hostname)
        except HostnameMismatch:
            if not self._common_name or not _is_common_name(certificate, server_hostname):
                raise


def _is_common_name(certificate: x509.Certificate, server_hostname: str) -> bool:
    name = PeerName.parse(server_hostname)
    try:
        facts = certificate_dict(certificate)
    except ValueError:
        return False
    if name.address is not None or any(kind == "DNS" for kind, _ in facts.get("subjectAltName", ())):
        return False
    attributes = (attribute for rdn in facts["subject"] for attribute in rdn)
    return any(what == "commonName" and name.fits(str(value)) for what, value in attributes)


# From settings to pyOpenSSL.


def _plain(context: ssl.SSLContext) -> Any:
    """The properties of *context* as the numbers they are: an enumeration makes each of them by a call or two."""
    return super(_Stdlib, context)


def _versions(context: Any) -> tuple[int, int]:
    """The lowest and the highest version, 0 for no limit; SSLv3 is none, as it may be unknown by now."""
    only = _ONE_VERSION.get(context.protocol)
    if only is not None:
        return only, only
    low, high = context.minimum_version, context.maximum_version
    return low if low > ssl.TLSVersion.SSLv3 else 0, max(high, 0)


def _cipher_names(context: ssl.SSLContext) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What *context* offers: the ciphers up to TLS 1.2, and those of TLS 1.3."""
    old: list[str] = []
    new: list[str] = []
    for cipher in context.get_ciphers():
        (new if cipher["protocol"] == "TLSv1.3" else old).append(cipher["name"])
    return tuple(old), tuple(new)


def _set_protocol(raw: SSL.Context, settings: _Settings, server_side: bool) -> int:
    """What holds whoever the peer is.  Returns the options set.

    A server whose `sni_callback` may switch contexts resumes nothing: see `bridge.context` about tickets.
    """
    raw.set_min_proto_version(settings.versions[0])
    raw.set_max_proto_version(settings.versions[1])
    raw.set_mode(SSL.MODE_RELEASE_BUFFERS)
    raw.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    raw.set_session_id(os.urandom(32))
    options = settings.options & ~_NOT_OURS
    if server_side and (settings.sni_callback is not None or not settings.tickets):
        options |= SSL.OP_NO_TICKET
    raw.set_options(options)
    # OpenSSL complains of a list with nothing for TLS 1.2, once it has taken it.
    with contextlib.nullcontext() if settings.ciphers else contextlib.suppress(SSL.Error):
        raw.set_cipher_list(":".join((f"@SECLEVEL={settings.security_level}", *settings.ciphers)).encode())
    _check(_lib.SSL_CTX_set_ciphersuites(raw._context, ":".join(settings.ciphersuites).encode()))
    if settings.curve is not None:
        _set_curve(raw, settings.curve)
    if settings.dh_params is not None:
        _check(_lib.SSL_CTX_set_tmp_dh(raw._context, settings.dh_params))
    if settings.alpn and server_side:
        raw.set_alpn_select_callback(functools.partial(select_alpn, settings.alpn))
    elif settings.alpn:
        raw.set_alpn_protos(list(settings.alpn))
    return options


def _set_curve(raw: SSL.Context, name: str) -> None:
    if hasattr(_lib, "SSL_CTX_set1_curves_list"):
        _check(_lib.SSL_CTX_set1_curves_list(raw._context, name.encode()))
    else:
        raw.set_tmp_ecdh(types.SimpleNamespace(name=name))  # type: ignore[arg-type]


def _set_verification(
    raw: SSL.Context, settings: _Settings, store: crypto.X509Store, server_side: bool
) -> None:
    mode = settings.verify_mode
    if settings.post_handshake_auth and not server_side:
        _lib.SSL_CTX_set_post_handshake_auth(raw._context, 1)
    elif settings.post_handshake_auth and mode & SSL.VERIFY_PEER:
        mode |= _lib.SSL_VERIFY_POST_HANDSHAKE
    raw.set_verify(mode, note_verification if mode & SSL.VERIFY_PEER else None)
    _check(_lib.X509_VERIFY_PARAM_set_flags(_lib.SSL_CTX_get0_param(raw._context), settings.verify_flags))
    _check(_lib.X509_STORE_up_ref(store._store))
    _lib.SSL_CTX_set_cert_store(raw._context, store._store)  # which takes the reference over


def _check(success: Any) -> None:
    """Raise what OpenSSL has to say unless its function returned *success*."""
    if not success:
        exception_from_error_queue(SSL.Error)


@contextlib.contextmanager
def _errors_of_ssl(what: str) -> Iterator[None]:
    """Raise pyOpenSSL's errors as the stdlib's: users of `ssl` know no others."""
    try:
        yield
    except (SSL.Error, crypto.Error, UnsupportedAlgorithm, TypeError, ValueError) as error:
        raise ssl_error(ssl.SSLError, ssl.SSL_ERROR_SSL, f"{what}: {reasons(error)}") from error


# Keys and certificates.


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _private_key(pem: bytes, secret: Secret | None, certificate: x509.Certificate) -> Any:
    """The first private key in *pem*, which the stdlib has found sound already: to check RSA again takes 0.1 s.

    One for RSA-PSS only is OpenSSL's: `cryptography` makes it one for RSA, which does not go with its certificate.
    """
    secret = secret.encode() if isinstance(secret, str) else bytes(secret or b"")
    found = _PEM_KEY.search(uncommented(pem))
    assert found is not None
    password = secret if b"ENCRYPTED" in found[0] else None
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        return crypto.load_privatekey(crypto.FILETYPE_PEM, found[0], password)
    return load_pem_private_key(found[0], password, unsafe_skip_rsa_key_validation=True)


def _encoded(path: Path | None) -> bytes | None:
    """*path* as pyOpenSSL is to pass it on: it takes every name for UTF-8."""
    return None if path is None else os.fsencode(path)


def _authorities(cadata: Any) -> Iterator[crypto.X509]:
    """The certificates in *cadata*: PEM if it is text, else DER, one after the other."""
    if isinstance(cadata, str):
        for block in _PEM_CERTIFICATE.finditer(uncommented(cadata.encode())):
            yield crypto.load_certificate(crypto.FILETYPE_PEM, block[0])
        return
    rest = b"" if cadata is None else bytes(cadata)
    while rest:
        certificate = crypto.load_certificate(crypto.FILETYPE_ASN1, rest)
        rest = rest[len(crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)) :]
        yield certificate


def _dh_params(pem: bytes) -> Any:
    text = _ffi.from_buffer(pem)
    bio = _ffi.gc(_lib.BIO_new_mem_buf(text, len(pem)), _lib.BIO_free)
    found = _lib.PEM_read_bio_DHparams(bio, _ffi.NULL, _ffi.NULL, _ffi.NULL)
    _check(found)
    return _ffi.gc(found, _lib.DH_free)


# SNI.


def _set_servername_callback(raw: SSL.Context, answer: Callable[[SSL.Connection], int | None]) -> None:
    """SSL_CTX_set_tlsext_servername_callback(3), refusing with the alert that *answer* returns.

    pyOpenSSL's own method has no way to refuse.
    """

    def called(native: Any, alert: Any, _: Any) -> int:
        refusal = answer(SSL.Connection._reverse_mapping[native])
        if refusal is None:
            return int(_lib.SSL_TLSEXT_ERR_OK)
        alert[0] = refusal
        return int(_lib.SSL_TLSEXT_ERR_ALERT_FATAL)

    callback = _ffi.callback("int (*)(SSL *, int *, void *)", called, error=_lib.SSL_TLSEXT_ERR_ALERT_FATAL)
    vars(raw).update(_tlsext_servername_callback=callback)  # kept alive
    _lib.SSL_CTX_set_tlsext_servername_callback(raw._context, callback)


def _switch(context: SSLContext, callback: Callable[..., object], connection: SSL.Connection) -> int | None:
    """Let the user's *callback* choose another context, or refuse: the alert to refuse with, or None.

    What it raises goes to `sys.unraisablehook`, as with the stdlib.
    """
    record: Record = connection.get_app_data()
    sock: Any = record.owner() if record.owner is not None else None
    if sock is None:
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
    try:
        name = (connection.get_servername() or b"").decode("ascii") or None
    except UnicodeDecodeError as error:
        _Unraisable(error)
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
    try:
        before = sock.context
        answer = callback(sock, name, context)
        if sock.context is not before:
            sock.context.core(True).take_over(connection, record)
    except BaseException as error:
        _Unraisable(error)
        return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
    if answer is None:
        return None
    try:
        return operator.index(answer)  # type: ignore[arg-type]
    except TypeError as error:
        _Unraisable(error)
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR


class _Unraisable:
    """Gives *error* to `sys.unraisablehook`, whose argument only the interpreter can make."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        try:
            raise self._error
        finally:
            del self._error  # whose traceback leads here


# Properties.


def _settled(found: property) -> property:
    """A property of `ssl.SSLContext`, for good.

    The stdlib's setters find their class by its global name, and would call themselves for ever once that is ours.
    """
    setter = found.fset
    assert isinstance(setter, types.FunctionType)
    names = {**setter.__globals__, "SSLContext": ssl.SSLContext}
    bound = types.FunctionType(
        setter.__code__, names, setter.__name__, setter.__defaults__, setter.__closure__
    )
    return property(found.fget, bound, doc=found.__doc__)


_PROPERTIES = {
    name: _settled(found)
    for name, found in vars(ssl.SSLContext).items()
    if isinstance(found, property) and found.fset is not None
}


def stdlib_properties() -> dict[str, property]:
    """The properties of the stdlib's class which can be set, working whatever `ssl.SSLContext` is.  Any thread."""
    return dict(_PROPERTIES)


for _name, _property in _PROPERTIES.items():
    setattr(SSLContext, _name, _property)
