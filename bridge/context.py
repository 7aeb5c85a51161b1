"""TLS contexts: what both ends of a session agree on before the first byte.  Frozen, and safe by default.

`server_context` and `client_context` build one; `Context.adopt` takes a ready `OpenSSL.SSL.Context` as it is.
A `Context` then makes the connection of each session and says, after the handshake, who the peer is.

*A session ticket is a certificate check that will be skipped.*  OpenSSL decides about a ticket with the keys
of the listener's own context, whatever name the client asks for (SNI).  So where any of a listener's contexts
asks clients for certificates, the listener resumes nothing: a ticket earned at one name must not open another
(CVE-2025-23419).
"""

from __future__ import annotations

import functools
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Literal, NoReturn

from cryptography import x509
from OpenSSL import SSL

from bridge import forks
from bridge.connection import (
    Connection,
    KeyLog,
    OCSPCheck,
    OCSPStaple,
    add_options,
    adopt_verification,
    check_staple,
    expect_name,
    keylog_writer,
    log_key,
    note_verification,
    ocsp_response,
    same_session,
    select_alpn,
    session_size,
    staple,
)
from bridge.credentials import Certificates, Key, Password, announce, load_identity, load_trust, reasons
from bridge.errors import ConfigurationError, fresh, tls_error
from bridge.limits import check_flags
from bridge.names import PeerName, dns_name, peer_certificate, refusal
from bridge.record import Record

__all__ = [
    "REMEMBERED_SESSIONS",
    "Connection",
    "Context",
    "Record",
    "Routes",
    "client_context",
    "server_context",
]

REMEMBERED_SESSIONS = 256
"""Of how many peers a client context remembers a session to resume; the least recently used goes first."""
MOST_SESSION_BYTES = 32 * 1024
"""A larger one is forgotten: tickets may have 64 KiB, and such a one fits in no ClientHello."""

SERVER_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: a stolen key opens no recorded session, and there is no CBC to be got wrong."""
CLIENT_CIPHERS = f"{SERVER_CIPHERS}:DHE+AESGCM:DHE+CHACHA20:ECDHE+AES:!SHA1:!AESCCM:!aDSS"
"""As the stdlib's `ssl` has them: forward secrecy too, and CBC with SHA-2 for servers that have nothing better."""

_VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}


class Context(forks.Handle):
    """What a session's TLS is made from.  Frozen: any number of sessions and threads may share one."""

    __slots__ = (
        "_name_required",
        "_options",
        "_routes",
        "_sessions",
        "_staple_wanted",
        "_versions",
        "alpn",
        "check_hostname",
        "raw",
        "renegotiation",
        "server_side",
        "verifies_peer",
    )

    raw: SSL.Context
    """The pyOpenSSL context.  OpenSSL freezes it, too, with its first connection."""
    server_side: bool
    verifies_peer: bool
    """Whether a certificate of the peer, if it shows one, is verified."""
    check_hostname: bool
    """Whether `verify` compares the server's certificate with the name asked for."""
    renegotiation: bool
    """TLS 1.2 only.  Whether a server may start one, and a client follows a server that does."""
    alpn: tuple[str, ...]
    """The protocols spoken over TLS, most preferred first (RFC 7301)."""
    _routes: Routes | None
    _versions: tuple[int, int] | None
    """None if *raw* is a user's own."""
    _options: int
    _name_required: bool
    _staple_wanted: bool
    _sessions: _Sessions | None

    def __init__(
        self,
        raw: SSL.Context,
        *,
        server_side: bool,
        check_hostname: bool,
        renegotiation: bool = True,
        alpn: tuple[str, ...] = (),
        routes: Routes | None = None,
        versions: tuple[int, int] | None = None,
        options: int = 0,
        staple_wanted: bool = False,
        resumption: bool = True,
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("raw", raw)
        put("server_side", server_side)
        put("verifies_peer", bool(raw.get_verify_mode() & SSL.VERIFY_PEER))
        put("check_hostname", check_hostname)
        put("renegotiation", renegotiation)
        put("alpn", alpn)
        put("_routes", routes)
        put("_versions", versions)
        put("_options", options)
        put("_name_required", versions is not None and check_hostname)
        put("_staple_wanted", staple_wanted)
        put("_sessions", _Sessions(REMEMBERED_SESSIONS) if resumption and not server_side else None)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"cannot change {name!r}: a Context is frozen, since sessions share it.  Build a new one with "
            "server_context() or client_context(), and hand it to connect() or listener.replace_context()"
        )

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __repr__(self) -> str:
        peer = "client" if self.server_side else "server"
        facts = [f"{'server' if self.server_side else 'client'} side"]
        facts.append(f"verifies the {peer}" if self.verifies_peer else f"does not verify the {peer}")
        if self.verifies_peer and not self.server_side and not self.check_hostname:
            facts.append("but not its name")
        if self.alpn:
            facts.append(f"ALPN {' '.join(self.alpn)}")
        if self._routes:
            facts.append(f"SNI {' '.join(self._routes)}")
        return f"<bridge.Context: {', '.join(facts)}>"

    @classmethod
    def adopt(cls, context: Context | SSL.Context, server_side: bool) -> Context:
        """A `Context` for listening (*server_side*) or connecting.  Any thread.

        A user's own `OpenSSL.SSL.Context` is taken as it is; if it verifies servers, their names are checked
        as well where one is given.  ConfigurationError for a context of the other side, or of another
        library.
        """
        if isinstance(context, Context):
            if context.server_side != server_side:
                made, needed = ("client", "server") if server_side else ("server", "client")
                use = "accepting sessions" if server_side else "connecting"
                raise ConfigurationError(
                    f"this context was made by {made}_context(); {use} needs one made by {needed}_context()"
                )
            return context
        if not isinstance(context, SSL.Context):
            kind = f"{type(context).__module__}.{type(context).__qualname__}"
            maker = "server_context" if server_side else "client_context"
            raise ConfigurationError(
                f"a context must come from {maker}(), or be an OpenSSL.SSL.Context, not {kind}"
            )
        verifies = bool(context.get_verify_mode() & SSL.VERIFY_PEER)
        asks = getattr(context, "_ocsp_helper", None) is not None
        return cls(
            context, server_side=server_side, check_hostname=verifies and not server_side, staple_wanted=asks
        )

    def make_connection(self, sock: socket.socket | None) -> Connection:
        """A bare connection.  While a trace is on, another method makes them (see `bridge.tracing`)."""
        return Connection(self.raw, sock)

    def connection(
        self,
        sock: socket.socket | None,
        server_hostname: str | None,
        resume_key: Hashable | None,
        resume: SSL.Session | None = None,
        owner: Callable[[], object] | None = None,
    ) -> Connection:
        """A connection over *sock*, or over memory if None, ready for its handshake.

        Any thread may call this; the connection then belongs to one at a time.  A client puts
        *server_hostname* into SNI unless it is an IP address (RFC 6066, 3), and offers the session *resume*, or
        the one it remembers under *resume_key*.  Callbacks find *owner* on the record.  ConfigurationError if
        the name is needed and missing, or is no name.
        """
        name = None if self.server_side else self.peer_name(server_hostname)
        connection = self.make_connection(sock)
        record = Record(self, self, owner)
        connection.set_app_data(record)
        if self.verifies_peer and self._versions is None:
            adopt_verification(connection, self.raw)
        if self.server_side:
            connection.set_accept_state()
            return connection
        connection.set_connect_state()
        if name is not None and name.address is None:
            connection.set_tlsext_host_name(name.ascii.encode())
        if name is not None and self.check_hostname and self.verifies_peer and self._versions is not None:
            record.expected = server_hostname
            expect_name(connection, name)
        if self._staple_wanted:
            connection.request_ocsp()
        if resume is not None:
            connection.set_session(resume)
        elif self._sessions is not None and resume_key is not None:
            record.to_be_remembered = True
            remembered = self._sessions.take(resume_key)
            if remembered is not None:
                connection.set_session(remembered)
        return connection

    def peer_name(self, server_hostname: str | None) -> PeerName | None:
        """Who a client's peer must be; ConfigurationError if that is needed and missing, or no name.  Any thread."""
        if server_hostname is not None:
            return PeerName.parse(server_hostname)
        if self._name_required:
            raise ConfigurationError(
                "server_hostname is needed: this context checks the name in the server's certificate.  "
                'Pass server_hostname="...", or make the context with client_context(check_hostname=False)'
            )
        return None

    def verify(self, connection: SSL.Connection, server_hostname: str | None) -> None:
        """Refuse the wrong peer, after the handshake and before application data.  The owner's thread.

        Raises what a callback noted, or HostnameMismatch with both names (RFC 9525), or CertificateError.
        """
        record = connection.get_app_data()
        if isinstance(record, Record):
            if record.error is not None:
                raise fresh(record.error)
            if self._routes and self._routes.find(connection.get_servername(), self) is not record.routed:
                raise tls_error("CALLBACK_FAILED", "the session was not given the context of its server name")
            if record.to_be_remembered:
                record.before_tickets = connection.get_session()
        if self.server_side or not self.check_hostname or server_hostname is None:
            return
        certificate = peer_certificate(connection)
        if certificate is None:
            raise refusal("the server showed no certificate")
        self.check_name(certificate, server_hostname)

    def check_name(self, certificate: x509.Certificate, server_hostname: str) -> None:
        """HostnameMismatch unless *certificate* is for *server_hostname*.  Any thread."""
        PeerName.parse(server_hostname).check(certificate)

    def remember(self, connection: SSL.Connection, resume_key: Hashable) -> None:
        """Keep *connection*'s newest session for the next one with *resume_key*.  Its owner's thread.

        Call it after a TLS 1.3 server's first bytes were read (its tickets come after the handshake) and
        again after a clean close: OpenSSL never resumes a session whose connection was not shut down
        (SSL_SESSION_is_resumable(3)).
        """
        if self._sessions is None:
            return
        session = connection.get_session()
        once = connection.get_protocol_version() >= SSL.TLS1_3_VERSION
        record = connection.get_app_data()
        before = record.before_tickets if isinstance(record, Record) else None
        if session is None or (once and same_session(session, before)):
            return
        if session_size(session) > MOST_SESSION_BYTES:
            return
        self._sessions.put(resume_key, session, once)

    def take_over(self, connection: SSL.Connection, record: Record) -> None:
        """Make this context's rules *connection*'s, in the SNI callback.

        SSL_set_SSL_CTX(3) brings the certificate, ALPN, OCSP and the trusted CAs, but neither options nor,
        above all, whether a client certificate is demanded.
        """
        adopt_verification(connection, self.raw)
        connection.set_context(self.raw)
        add_options(connection, self._options)
        record.routed = self


class _Sessions:
    """Sessions to resume, by peer.  Any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = forks.open_lock()
        self._sessions: OrderedDict[Hashable, tuple[SSL.Session, bool]] = OrderedDict()

    def put(self, key: Hashable, session: SSL.Session, once: bool) -> None:
        with self._lock:
            self._sessions[key] = session, once
            self._sessions.move_to_end(key)
            if len(self._sessions) > self._size:
                self._sessions.popitem(last=False)

    def take(self, key: Hashable) -> SSL.Session | None:
        """The session for *key*; one of TLS 1.3 only once, or observers link its uses (RFC 8446, C.4)."""
        with self._lock:
            if key not in self._sessions:
                return None
            session, once = self._sessions[key]
            if once:
                del self._sessions[key]
            else:
                self._sessions.move_to_end(key)
            return session


def _route(connection: SSL.Connection) -> None:
    """SSL_CTX_set_tlsext_servername_callback(3): switch to the context for the name that the client asks for.

    Called again after a HelloRetryRequest, hence it may also have to switch back.  It is set where there is nothing to
    switch to as well: without it a resumed session of TLS 1.2 does not know its name.
    """
    record = connection.get_app_data()
    if not isinstance(record, Record):  # a connection that somebody else has made with our context
        return
    target = context = record.context
    if context._routes:
        target = context._routes.find(connection.get_servername(), context)
    if target is not record.routed:
        target.take_over(connection, record)


class Routes(Mapping[str, Context]):
    """A listener's contexts by SNI name: exact ones first, then those with ``*`` as the left-most label."""

    def __init__(self, sni: Mapping[str, Context | SSL.Context]) -> None:
        if not isinstance(sni, Mapping):
            raise ConfigurationError(
                f"sni must be a dict of contexts by name, as {{'a.example': context}}, not {type(sni).__name__}"
            )
        self._contexts: dict[str, Context] = {}
        for name, given in sni.items():
            if not isinstance(name, str):
                raise ConfigurationError(f"the names in sni must be str, not {type(name).__name__}")
            wildcard = name.startswith("*.")
            pattern = ("*." if wildcard else "") + dns_name(name[2:] if wildcard else name, "the sni name")
            context = Context.adopt(given, server_side=True)
            if context._routes:
                raise ConfigurationError(
                    f"the context for the sni name {name!r} has sni names of its own; only one level is used"
                )
            if pattern in self._contexts:
                raise ConfigurationError(f"sni has the name {name!r} twice, as {pattern!r}")
            self._contexts[pattern] = context

    def find(self, name: bytes | None, default: Context) -> Context:
        """The context for the *name* in a ClientHello; *default* if it is unknown or missing.  Any thread."""
        wanted = (name or b"").decode("ascii", "replace").lower().rstrip(".")
        wildcard = "*." + wanted.partition(".")[2]
        return self._contexts.get(wanted) or self._contexts.get(wildcard) or default

    def __getitem__(self, name: str) -> Context:
        return self._contexts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._contexts)

    def __len__(self) -> int:
        return len(self._contexts)


def server_context(
    certfile: Certificates,
    keyfile: Key | None = None,
    *,
    password: Password | None = None,
    client_ca: Certificates | None = None,
    client_cert: Literal["required", "optional"] = "required",
    alpn: Sequence[str] = (),
    sni: Mapping[str, Context | SSL.Context] | None = None,
    minimum_version: str = "TLSv1.2",
    maximum_version: str | None = None,
    ciphers: str | None = None,
    ciphersuites: str | None = None,
    renegotiation: bool = False,
    keylog: KeyLog = None,
    ocsp_staple: OCSPStaple = None,
    tickets: bool = True,
) -> Context:
    """A context for servers.  Any thread.  ConfigurationError says which argument is unusable, and why.

    *certfile*: the certificate, then its chain: a path to PEM, PEM, or `cryptography` certificates.  One that has
    expired, or is not yet valid, is refused here.
    *keyfile*: the private key, likewise; None if it is in *certfile*.  *password*: for an encrypted key, or a
    callable that returns it.

    *client_ca*: the CAs whose client certificates are accepted (mutual TLS), as `client_context`'s *cafile*;
    a client without a certificate is refused unless *client_cert* is ``"optional"``.

    *alpn*: protocol names, most preferred first (RFC 7301).  If client and server share none, the session
    goes on without one, as with the stdlib's `ssl`: look at ``session.info.alpn``.

    *sni*: other contexts by the name the client asks for, exact or ``*.example.com``; an unknown name gets
    this context. Certificate, ALPN, OCSP, key log and client certificates are then the chosen context's, and
    prohibitions (renegotiation, tickets) of both hold.  TLS versions must be the same, as OpenSSL settles
    them before the name; those of an `OpenSSL.SSL.Context` of your own are not looked at.

    *minimum_version*, *maximum_version*: ``"TLSv1.2"`` or ``"TLSv1.3"``.  *ciphers*: TLS 1.2, *ciphersuites*:
    TLS 1.3 (openssl-ciphers(1)); None, in TLS 1.2: ECDHE with AES-GCM or ChaCha20.  *renegotiation*: whether
    this server may start one (TLS 1.2); clients never may.

    *keylog*: where to write session secrets for Wireshark: a path (appended to; one that is created has mode 0600, one
    that exists keeps its own), a callable given each line as bytes, or a file; None is the SSLKEYLOGFILE of the
    environment, if any, and False is nowhere.

    *ocsp_staple*: a DER OCSP response, or a callable that makes one for the name asked for; ``b""`` is none.

    *tickets*: whether clients may resume sessions.  They may not, whatever this says, if *sni* is used and
    any of the contexts asks for client certificates.
    """
    check_flags(renegotiation=renegotiation, tickets=tickets)
    mode = _client_verification(client_ca, client_cert)
    routes = Routes({} if sni is None else sni)
    protocols = _alpn_names(alpn)
    versions = _version_range(minimum_version, maximum_version)
    _check_versions(routes, versions)
    mutual = bool(routes) and (
        mode != SSL.VERIFY_NONE or any(context.verifies_peer for context in routes.values())
    )
    options = SSL.OP_CIPHER_SERVER_PREFERENCE | (SSL.OP_NO_TICKET if mutual or not tickets else 0)
    ciphers = SERVER_CIPHERS if ciphers is None else ciphers
    raw, options = _raw_context(versions, ciphers, ciphersuites, options, renegotiation, keylog)
    load_identity(raw, certfile, keyfile, password)
    if client_ca is not None:
        load_trust(raw, client_ca, "client_ca")
        announce(raw, client_ca)
    raw.set_verify(mode, note_verification)
    if protocols:
        raw.set_alpn_select_callback(functools.partial(select_alpn, protocols))
    raw.set_tlsext_servername_callback(_route)
    if ocsp_staple is not None:
        _check_ocsp_staple(ocsp_staple)
        raw.set_ocsp_server_callback(functools.partial(staple, ocsp_staple))
    return Context(
        raw,
        server_side=True,
        check_hostname=False,
        renegotiation=renegotiation,
        alpn=tuple(alpn),
        routes=routes,
        versions=versions,
        options=options,
    )


def client_context(
    cafile: Certificates | None = None,
    *,
    certfile: Certificates | None = None,
    keyfile: Key | None = None,
    password: Password | None = None,
    alpn: Sequence[str] = (),
    check_hostname: bool = True,
    verify: bool = True,
    minimum_version: str = "TLSv1.2",
    maximum_version: str | None = None,
    ciphers: str | None = None,
    ciphersuites: str | None = None,
    keylog: KeyLog = None,
    ocsp_check: OCSPCheck = None,
    resumption: bool = True,
    renegotiation: bool = True,
) -> Context:
    """A context for clients.  Any thread.  ConfigurationError says which argument is unusable, and why.

    *cafile*: the CAs to trust: a path to PEM, a directory of hashed names (openssl-rehash(1)), PEM, or
    `cryptography` certificates.  None: the system's, which SSL_CERT_FILE and SSL_CERT_DIR can move;
    `certifi`'s if it has none.

    *check_hostname*: whether the certificate must be for the name asked for.  *verify*: False accepts any
    certificate of anybody, and then checks no name either; a *cafile* is read all the same.

    *ocsp_check*: a callable given the stapled OCSP response (``b""`` if the server stapled none) and the
    server's certificate; unless it returns true, the session is refused with CertificateError.  Not called
    for a resumed session.

    *resumption*: whether sessions are remembered, one for each server, to make the next handshake shorter.

    *renegotiation*: whether to follow a server that starts one (TLS 1.2).

    *ciphers*: as in `server_context`, but None also offers DHE, and AES-CBC with SHA-2 last of all.

    *certfile*, *keyfile*, *password* (of this client's own certificate) and all others are as in
    `server_context`.
    """
    check_flags(
        check_hostname=check_hostname, verify=verify, resumption=resumption, renegotiation=renegotiation
    )
    protocols = _alpn_names(alpn)
    versions = _version_range(minimum_version, maximum_version)
    if keyfile is not None and certfile is None:
        raise ConfigurationError("keyfile is given without certfile: the certificate is needed too")
    if ocsp_check is not None and not callable(ocsp_check):
        raise ConfigurationError(f"ocsp_check must be a callable, not {type(ocsp_check).__name__}")
    options = 0 if resumption else SSL.OP_NO_TICKET
    ciphers = CLIENT_CIPHERS if ciphers is None else ciphers
    raw, options = _raw_context(versions, ciphers, ciphersuites, options, renegotiation, keylog)
    if certfile is not None:
        load_identity(raw, certfile, keyfile, password)
    if verify or cafile is not None:
        load_trust(raw, cafile)
    if verify:
        raw.set_verify(SSL.VERIFY_PEER, note_verification)
    else:
        raw.set_verify(SSL.VERIFY_NONE)
    if protocols:
        raw.set_alpn_protos(protocols)
    if ocsp_check is not None:
        raw.set_ocsp_client_callback(functools.partial(check_staple, ocsp_check))
    return Context(
        raw,
        server_side=False,
        check_hostname=check_hostname and verify,
        renegotiation=renegotiation,
        alpn=tuple(alpn),
        versions=versions,
        options=options,
        staple_wanted=ocsp_check is not None,
        resumption=resumption,
    )


def _raw_context(
    versions: tuple[int, int],
    ciphers: str,
    ciphersuites: str | None,
    options: int,
    renegotiation: bool,
    keylog: KeyLog,
) -> tuple[SSL.Context, int]:
    """What both sides share, and the options it has.

    No session cache: tickets are stateless, and a cache would grow with every client.  A session id context
    of its own, without which OpenSSL refuses to resume mutual TLS (SSL_CTX_set_session_id_context(3)).
    MODE_RELEASE_BUFFERS: an idle session keeps no buffers.
    """
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.set_min_proto_version(versions[0])
    raw.set_max_proto_version(versions[1])
    raw.set_mode(SSL.MODE_RELEASE_BUFFERS)
    raw.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    raw.set_session_id(os.urandom(32))
    options |= SSL.OP_NO_COMPRESSION | (0 if renegotiation else SSL.OP_NO_RENEGOTIATION)
    raw.set_options(options)
    _set_ciphers(raw, ciphers, ciphersuites)
    write = keylog_writer(keylog)
    if write is not None:
        raw.set_keylog_callback(functools.partial(log_key, write))
    return raw, options


def _set_ciphers(raw: SSL.Context, ciphers: str, ciphersuites: str | None) -> None:
    for what, value in (("ciphers", ciphers), ("ciphersuites", ciphersuites)):
        if value is None:
            continue
        if not isinstance(value, str):
            raise ConfigurationError(f"{what} must be a str, names joined by ':', not {type(value).__name__}")
        try:
            if what == "ciphers":
                raw.set_cipher_list(value.encode())
            elif hasattr(raw, "set_tls13_ciphersuites"):
                raw.set_tls13_ciphersuites(value.encode())
            else:
                raise ConfigurationError("ciphersuites needs pyOpenSSL 25.2 or later")
        except SSL.Error as error:
            version = "1.2" if what == "ciphers" else "1.3"
            raise ConfigurationError(
                f"{what} {value!r} selects no TLS {version} cipher: {reasons(error)}"
            ) from error


def _version_range(minimum: str, maximum: str | None) -> tuple[int, int]:
    low = _version("minimum_version", minimum)
    high = _version("maximum_version", "TLSv1.3" if maximum is None else maximum)
    if low > high:
        raise ConfigurationError(f"minimum_version {minimum!r} is above maximum_version {maximum!r}")
    return low, high


def _version(what: str, name: object) -> int:
    if not isinstance(name, str) or name not in _VERSIONS:
        raise ConfigurationError(
            f"{what} must be 'TLSv1.2' or 'TLSv1.3', not {name!r}; anything older is not secure (RFC 8996)"
        )
    return _VERSIONS[name]


def _check_versions(routes: Routes, versions: tuple[int, int]) -> None:
    for name, context in routes.items():
        if context._versions is not None and context._versions != versions:
            raise ConfigurationError(
                f"the context for the sni name {name!r} has another minimum_version or maximum_version than "
                "this one; they must be the same, since OpenSSL settles the version before it reads the name"
            )


def _client_verification(client_ca: Certificates | None, client_cert: str) -> int:
    if client_cert not in ("required", "optional"):
        raise ConfigurationError(f"client_cert must be 'required' or 'optional', not {client_cert!r}")
    if client_ca is None:
        if client_cert == "optional":
            raise ConfigurationError(
                "client_cert='optional' needs client_ca: the CAs whose certificates are accepted"
            )
        return SSL.VERIFY_NONE
    return SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if client_cert == "required" else 0)


def _check_ocsp_staple(ocsp_staple: object) -> None:
    if callable(ocsp_staple):
        return
    try:
        ocsp_response(ocsp_staple)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"ocsp_staple must be a DER OCSP response, or a callable that makes one: {error}"
        ) from error


def _alpn_names(alpn: object) -> list[bytes]:
    if isinstance(alpn, (str, bytes)) or not isinstance(alpn, Sequence):
        raise ConfigurationError(
            f"alpn must be a tuple of protocol names, as ('h2', 'http/1.1'), not {alpn!r}"
        )
    for name in alpn:
        if not isinstance(name, str) or not name.isascii() or not 1 <= len(name) <= 255:
            raise ConfigurationError(
                f"an alpn name is 1 to 255 ASCII characters (RFC 7301, 3.1), not {name!r}"
            )
    encoded = [name.encode() for name in alpn]
    if sum(len(name) + 1 for name in encoded) > 65_535:
        raise ConfigurationError("the alpn names are longer than a ClientHello can hold")
    return encoded
