"""Contexts against real peers: themselves and the stdlib's `ssl`, over memory, pumped by the test itself."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import io
import os
import socket
import ssl
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtensionOID, NameOID
from OpenSSL import SSL
from peers import PATIENCE, reset_on_close
from test_errors import Wordless

from bridge import Bridge, credentials
from bridge import connection as connection_module
from bridge import context as context_module
from bridge.context import REMEMBERED_SESSIONS, Context, client_context, server_context
from bridge.errors import (
    CertificateError,
    ConfigurationError,
    HostnameMismatch,
    SessionEnded,
    TLSError,
    fresh,
)
from bridge.names import PeerName, peer_certificate, presented_chain, verified_chain
from bridge.record import Record

VERSIONS = ["TLSv1.2", "TLSv1.3"]
both_versions = pytest.mark.parametrize("version", VERSIONS)

CA = trustme.CA()
OTHER_CA = trustme.CA()
CLIENT_CA = trustme.CA()
CA_PEM = CA.cert_pem.bytes()


@functools.cache
def leaf(*names: str, ca: trustme.CA = CA) -> trustme.LeafCert:
    return ca.issue_cert(*names)


def pem(cert: trustme.LeafCert) -> bytes:
    return cert.private_key_and_cert_chain_pem.bytes()


def server(*names: str, **options: Any) -> Context:
    return server_context(pem(leaf(*(names or ("a.example",)))), **options)


def client(**options: Any) -> Context:
    return client_context(CA_PEM, **options)


def only(version: str) -> dict[str, Any]:
    return {"minimum_version": version, "maximum_version": version}


@pytest.fixture(autouse=True)
def _no_keylog_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)


# Two ends and a pump.


class Ours:
    """One end made by a `Context`, over memory."""

    def __init__(self, context: Context, name: str | None = None, key: object = None) -> None:
        self.context, self.name = context, name
        self.connection = context.connection(None, name, key)
        self.done = False

    @property
    def record(self) -> Record:
        record = self.connection.get_app_data()
        assert isinstance(record, Record)
        return record

    def handshake(self) -> None:
        try:
            self.connection.do_handshake()
        except SSL.Error as error:
            if self.record.error is not None and not isinstance(error, WANTS):
                raise fresh(self.record.error) from error
            raise
        self.context.verify(self.connection, self.name)
        self.done = True

    def take(self) -> bytes:
        with contextlib.suppress(SSL.WantReadError):
            return self.connection.bio_read(1 << 20)
        return b""

    def feed(self, data: bytes) -> None:
        self.connection.bio_write(data)

    def send(self, data: bytes) -> None:
        self.connection.send(data)

    def recv(self) -> bytes:
        try:
            return self.connection.recv(100)
        except SSL.WantReadError:
            return b""

    @property
    def certificate(self) -> x509.Certificate:
        certificate = self.connection.get_peer_certificate(as_cryptography=True)
        assert certificate is not None
        return certificate

    @property
    def alpn(self) -> str | None:
        return self.connection.get_alpn_proto_negotiated().decode() or None

    @property
    def resumed(self) -> bool:
        return connection_module.session_reused(self.connection)

    @property
    def verifies(self) -> bool:
        return bool(self.connection.get_verify_mode() & SSL.VERIFY_PEER)


class Stdlib:
    """One end made by the standard library, over memory."""

    def __init__(self, context: ssl.SSLContext, server_side: bool = False, name: str | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side, name)
        self.done = False

    def handshake(self) -> None:
        self.object.do_handshake()
        self.done = True

    def take(self) -> bytes:
        return self._outgoing.read()

    def feed(self, data: bytes) -> None:
        self._incoming.write(data)

    def send(self, data: bytes) -> None:
        self.object.write(data)

    def recv(self) -> bytes:
        try:
            return self.object.read(100)
        except ssl.SSLWantReadError:
            return b""


End = Ours | Stdlib
Ended = tuple[Exception | None, Exception | None]
WANTS = (SSL.WantReadError, SSL.WantWriteError, ssl.SSLWantReadError)


def pump(a: End, b: End) -> Ended:
    """Handshake until both are done or nothing moves; the error of each."""
    errors: list[Exception | None] = [None, None]
    moved = True
    while moved:
        moved = False
        for index, (end, peer) in enumerate(((a, b), (b, a))):
            if not end.done and errors[index] is None:
                try:
                    end.handshake()
                    moved = True
                except WANTS:
                    pass
                except Exception as error:
                    errors[index] = error
            data = end.take()
            if data:
                peer.feed(data)
                moved = True
    return errors[0], errors[1]


def meet(a: End, b: End) -> None:
    """A handshake that must succeed, and a message each way."""
    assert pump(a, b) == (None, None)
    assert a.done
    assert b.done
    for end, peer in ((a, b), (b, a)):
        end.send(b"hello")
        peer.feed(end.take())
        assert peer.recv() == b"hello"


def close(a: Ours, b: Ours) -> None:
    for end, peer in ((a, b), (b, a)):
        end.connection.shutdown()
        peer.feed(end.take())


def refused(end: End, peer: End) -> CertificateError:
    """The reason of *end* to refuse *peer*."""
    pump(end, peer)
    assert isinstance(end, Ours)
    assert isinstance(end.record.error, CertificateError)
    return end.record.error


def stdlib_client(version: str, ca: trustme.CA = CA) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    return context


def stdlib_server(version: str, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    leaf(*names).configure_cert(context)
    return context


def self_signed(
    *, begin: int = -10, end: int = 10, name: str = "a.example", **extensions: x509.ExtensionType
) -> tuple[x509.Certificate, Any]:
    """A certificate and its key, valid from *begin* to *end* days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now + datetime.timedelta(begin))
    builder = builder.not_valid_after(now + datetime.timedelta(end))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    for extension in extensions.values():
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()), key


def to_pem(thing: Any, password: bytes | None = None, old: bool = False) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    style = serialization.PrivateFormat.TraditionalOpenSSL if old else serialization.PrivateFormat.PKCS8
    secret: Any = serialization.NoEncryption()
    if password is not None:
        secret = serialization.BestAvailableEncryption(password)
    encoded: bytes = thing.private_bytes(serialization.Encoding.PEM, style, secret)
    return encoded


# Handshakes.


@both_versions
def test_both_ends_ours(version: str) -> None:
    a, b = Ours(client(), "a.example"), Ours(server(**only(version)))
    meet(a, b)
    assert a.connection.get_protocol_version_name() == version


@both_versions
def test_client_against_the_stdlib(version: str) -> None:
    meet(Ours(client(), "a.example"), Stdlib(stdlib_server(version, "a.example"), server_side=True))


@both_versions
def test_server_against_the_stdlib(version: str) -> None:
    meet(Stdlib(stdlib_client(version), name="a.example"), Ours(server()))


def test_tls_1_1_is_refused() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.set_ciphers("ALL:@SECLEVEL=0")
    _, error = pump(Stdlib(old, name="a.example"), Ours(server()))
    assert isinstance(error, SSL.Error)


@both_versions
def test_maximum_and_minimum_version_hold(version: str) -> None:
    other = VERSIONS[1 - VERSIONS.index(version)]
    a, b = Ours(client(**only(version)), "a.example"), Ours(server(**only(other)))
    assert all(pump(a, b))


def test_settings_that_every_context_has() -> None:
    for context in (server(), client()):
        assert context.raw.set_mode(0) & SSL.MODE_RELEASE_BUFFERS
        assert context.raw.set_options(0) & SSL.OP_NO_COMPRESSION
        assert context.raw.get_session_cache_mode() == SSL.SESS_CACHE_OFF


def test_ciphersuites_need_a_pyopenssl_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SSL.Context, "set_tls13_ciphersuites", raising=False)
    with pytest.raises(ConfigurationError, match="needs pyOpenSSL"):
        client(ciphersuites="TLS_AES_128_GCM_SHA256")


def test_the_server_chooses_among_ciphers_by_its_own_order() -> None:
    names = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"]
    a = Ours(client(ciphers=":".join(reversed(names))), "a.example")
    meet(a, Ours(server(ciphers=":".join(names), **only("TLSv1.2"))))
    assert a.connection.get_cipher_name() == names[0]


def test_ciphers() -> None:
    suites = (
        {"ciphersuites": "TLS_CHACHA20_POLY1305_SHA256"}
        if hasattr(SSL.Context, "set_tls13_ciphersuites")
        else {}
    )
    a, b = Ours(client(ciphers="ECDHE-ECDSA-AES256-GCM-SHA384", **suites), "a.example"), Ours(server())
    meet(a, b)
    if suites:
        assert a.connection.get_cipher_name() == "TLS_CHACHA20_POLY1305_SHA256"
    a, b = Ours(client(ciphers="ECDHE-ECDSA-AES256-GCM-SHA384"), "a.example"), Ours(server(**only("TLSv1.2")))
    meet(a, b)
    assert a.connection.get_cipher_name() == "ECDHE-ECDSA-AES256-GCM-SHA384"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minimum_version": "TLSv1"}, ["minimum_version", "'TLSv1'", "TLSv1.2"]),
        ({"minimum_version": 771}, ["minimum_version", "771"]),
        ({"maximum_version": "SSLv3"}, ["maximum_version", "'SSLv3'"]),
        ({"minimum_version": "TLSv1.3", "maximum_version": "TLSv1.2"}, ["above"]),
        ({"ciphers": "NONSENSE"}, ["ciphers", "'NONSENSE'"]),
        ({"ciphers": b"ALL"}, ["ciphers", "bytes"]),
        ({"ciphersuites": "NONSENSE"}, ["ciphersuites"]),
        ({"alpn": "h2"}, ["tuple", "'h2'"]),
        ({"alpn": ("",)}, ["1 to 255", "''"]),
        ({"alpn": ("x" * 256,)}, ["1 to 255"]),
        ({"alpn": (b"h2",)}, ["b'h2'"]),
        ({"alpn": ("ü",)}, ["ASCII"]),
        ({"alpn": tuple("x" * 250 + str(n) for n in range(300))}, ["ClientHello"]),
        ({"alpn": 5}, ["alpn", "5"]),
        ({"keylog": 5}, ["keylog", "int"]),
        ({"keylog": "/nowhere/key.log"}, ["/nowhere/key.log", "No such file"]),
    ],
)
@pytest.mark.parametrize("make", [server, client])
def test_unusable_options(make: Callable[..., Context], options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(**options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: server(client_cert="maybe"), ["client_cert", "'maybe'"]),
        (lambda: server(client_cert="optional"), ["client_ca"]),
        (lambda: server(ocsp_staple="x"), ["ocsp_staple", "str"]),
        (lambda: server(ocsp_staple=b"x"), ["ocsp_staple", "DER OCSP response"]),
        (lambda: client(ocsp_check=True), ["ocsp_check", "bool"]),
        (lambda: client(keyfile="x"), ["certfile"]),
    ],
)
def test_unusable_options_of_one_side(call: Callable[[], Context], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("value", [None, 0, 1, "no", "ca.pem"])
@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (client, "verify"),
        (client, "check_hostname"),
        (client, "resumption"),
        (client, "renegotiation"),
        (server, "renegotiation"),
        (server, "tickets"),
    ],
)
def test_a_flag_that_is_no_bool_decides_nothing(make: Callable[..., Context], flag: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{flag} must be True or False, not {value!r}"):
        make(**{flag: value})


# Who is trusted.


def as_directory(tmp_path: Path, certificate: bytes) -> Path:
    import subprocess

    (tmp_path / "ca.pem").write_bytes(certificate)
    digest = subprocess.run(
        ["openssl", "x509", "-subject_hash", "-noout"], input=certificate, capture_output=True, check=True
    )
    (tmp_path / f"{digest.stdout.decode().strip()}.0").write_bytes(certificate)
    return tmp_path


def as_file(tmp_path: Path, certificate: bytes) -> Path:
    path = tmp_path / "file.pem"
    path.write_bytes(certificate)
    return path


SOURCES: dict[str, Callable[[Path, bytes], Any]] = {
    "path": as_file,
    "str path": lambda tmp_path, certificate: str(as_file(tmp_path, certificate)),
    "directory": as_directory,
    "PEM bytes": lambda _, certificate: certificate,
    "PEM str": lambda _, certificate: certificate.decode(),
    "object": lambda _, certificate: x509.load_pem_x509_certificate(certificate),
    "objects": lambda _, certificate: [x509.load_pem_x509_certificate(certificate)],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_cafile_of_every_kind(tmp_path: Path, source: Callable[[Path, bytes], Any]) -> None:
    trusted = client_context(source(tmp_path, CA_PEM))
    meet(Ours(trusted, "a.example"), Ours(server()))
    stranger = server_context(pem(leaf("a.example", ca=OTHER_CA)))
    error = refused(Ours(trusted, "a.example"), Ours(stranger))
    assert "unable to get local issuer certificate" in str(error)


@both_versions
def test_an_untrusted_server_is_refused_with_openssl_s_reason(version: str) -> None:
    a, b = (
        Ours(client(), "a.example"),
        Ours(server_context(pem(leaf("a.example", ca=OTHER_CA)), **only(version))),
    )
    error = refused(a, b)
    assert isinstance(error, ssl.SSLCertVerificationError)
    assert (error.verify_code, error.verify_message) == (20, "unable to get local issuer certificate")
    assert vars(error)["depth"] == 0
    assert error.reason == "CERTIFICATE_VERIFY_FAILED"
    assert "trustme" in str(error)


def test_an_expired_server_is_refused_with_the_dates() -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("a.example")])
    certificate, key = self_signed(begin=-10, end=-1, names=names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with identity_files(certificate, key) as path:
        context.load_cert_chain(path)
    error = refused(Ours(client_context(certificate), "a.example"), Stdlib(context, server_side=True))
    assert error.verify_code == 10
    assert "expired" in str(error)
    assert f"until {certificate.not_valid_after_utc}" in str(error)


@contextlib.contextmanager
def identity_files(certificate: x509.Certificate, key: Any) -> Any:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(to_pem(key) + to_pem(certificate))
        file.flush()
        yield file.name


def test_verify_false_accepts_anybody() -> None:
    context = client_context(verify=False)
    assert not context.verifies_peer
    assert not context.check_hostname
    meet(Ours(context), Ours(server_context(pem(leaf("a.example", ca=OTHER_CA)))))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/ca.pem", ["cafile '/nowhere/ca.pem'", "No such file"]),
        (Path("/nowhere/ca.pem"), ["/nowhere/ca.pem", "No such file"]),
        ("bad\0path", ["cafile"]),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            ["PEM given as cafile", "damaged"],
        ),
        ("-----BEGIN RSA PUBLIC KEY-----\n", ["no certificate", "BEGIN CERTIFICATE"]),
        (b"\x30\x82", ["PEM given as cafile", "no certificate"]),
        (
            "-----BEGIN CERTIFICATE-----\udcff\n-----END CERTIFICATE-----\n",
            ["PEM given as cafile", "damaged"],
        ),
        ([], ["empty list"]),
        ([b"x"], ["bytes"]),
        (5, ["cafile", "int"]),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_unusable_cafile(source: Any, words: list[str], verify: bool) -> None:
    with pytest.raises(ConfigurationError) as caught:
        client_context(source, verify=verify)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_cafile_without_certificates(tmp_path: Path) -> None:
    path = as_file(tmp_path, b"hello")
    with pytest.raises(ConfigurationError, match=r"file\.pem.*holds no certificate"):
        client_context(path)
    path.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigurationError, match=r"OpenSSL cannot read cafile .*file\.pem"):
        client_context(path)
    with pytest.raises(ConfigurationError, match=r"without certificates under hashed names.*rehash"):
        client_context(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_must_not_be_read(tmp_path: Path) -> None:
    path = as_file(tmp_path, CA_PEM)
    path.chmod(0)
    with pytest.raises(ConfigurationError, match=r"file\.pem.*Permission denied"):
        client_context(path)


def test_paths_are_what_the_system_has_and_not_always_utf_8(odd_path: Path) -> None:
    file = as_file(odd_path, CA_PEM)
    server(client_ca=file)
    for cafile in (str(file), file, as_directory(odd_path, CA_PEM)):
        meet(Ours(client_context(cafile), "a.example"), Ours(server()))


def test_system_trust_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", str(as_file(tmp_path, CA_PEM)))
    meet(Ours(client_context(), "a.example"), Ours(server()))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigurationError, match=r"SSL_CERT_FILE=.*missing\.pem"):
        client_context()
    monkeypatch.setenv("SSL_CERT_DIR", str(as_directory(tmp_path, CA_PEM)))
    meet(Ours(client_context(), "a.example"), Ours(server()))


def test_a_directory_of_the_environment_that_must_not_be_read_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(os, "listdir", refuse)  # for root reads everything
    with pytest.raises(ConfigurationError, match="no CA certificate where the environment says"):
        client_context()


def test_a_system_without_trust_gets_certifi_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setattr(SSL.Context, "set_default_verify_paths", lambda self: None)
    monkeypatch.setattr(credentials, "_DEFAULT_DIRECTORIES", "/nowhere")
    assert credentials._trusts_anybody(client_context().raw)


def test_a_system_without_trust_and_without_certifi_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setattr(SSL.Context, "set_default_verify_paths", lambda self: None)
    monkeypatch.setattr(credentials, "_DEFAULT_DIRECTORIES", "/nowhere")
    monkeypatch.setitem(sys.modules, "certifi", None)
    with pytest.raises(ConfigurationError, match="install certifi"):
        client_context()
    monkeypatch.setattr(credentials, "_lib", None)
    client_context()  # where nobody can look, OpenSSL may still find something


def test_a_directory_that_goes_away_while_it_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read cafile .*: No such file"):
        credentials._hashed_files(tmp_path / "gone", "cafile")


# Who we are.


def test_an_identity_of_every_kind(tmp_path: Path) -> None:
    cert = leaf("a.example", ca=CA.create_child_ca())
    chain = b"".join(part.bytes() for part in cert.cert_chain_pems)
    key = cert.private_key_pem.bytes()
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "all.pem").write_bytes(key + chain)
    objects = x509.load_pem_x509_certificates(chain)
    kinds: list[tuple[Any, Any]] = [
        (tmp_path / "chain.pem", str(tmp_path / "key.pem")),
        (tmp_path / "all.pem", None),
        ((key + chain).decode(), None),
        (chain, key),
        (objects, serialization.load_pem_private_key(key, None)),
    ]
    for certfile, keyfile in kinds:
        a = Ours(client(), "a.example")
        meet(a, Ours(server_context(certfile, keyfile)))
        shown = a.connection.get_peer_cert_chain(as_cryptography=True)
        assert shown == objects


def test_a_single_certificate_object() -> None:
    certificate, key = self_signed()
    a = Ours(client_context(certificate, check_hostname=False))
    meet(a, Ours(server_context(certificate, key)))
    assert a.certificate == certificate


@pytest.mark.parametrize("old", [False, True], ids=["PKCS8", "traditional"])
def test_an_encrypted_key(old: bool) -> None:
    certificate, key = self_signed()
    encrypted = to_pem(key, b"secret", old)
    for password in ("secret", b"secret", lambda: "secret", lambda: b"secret"):
        meet(
            Ours(client_context(certificate, check_hostname=False)),
            Ours(server_context(certificate, encrypted, password=password)),
        )
    unusable: list[tuple[Any, str]] = [
        (None, "encrypted: pass its password"),
        ("wrong", "password .* wrong"),
        ("secret\udcff", "password .* wrong"),
        ("", "empty"),
        (5, "str or bytes, not int"),
        (lambda: None, "str or bytes, not NoneType"),
        (lambda: 1 / 0, "callable .* ZeroDivisionError"),
    ]
    for password, words in unusable:
        with pytest.raises(ConfigurationError, match=words):
            server_context(certificate, encrypted, password=password)


def test_a_password_is_not_asked_for_when_the_key_is_open() -> None:
    certificate, key = self_signed()
    server_context(certificate, to_pem(key), password=lambda: pytest.fail("asked"))


def test_the_password_is_in_no_message() -> None:
    certificate, key = self_signed()
    with pytest.raises(ConfigurationError) as caught:
        server_context(certificate, to_pem(key, b"good"), password="hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("begin_end", [(-10, -1), (5, 10)])
def test_our_own_certificate_must_be_valid_today(tmp_path: Path, begin_end: tuple[int, int]) -> None:
    certificate, key = self_signed(begin=begin_end[0], end=begin_end[1])
    path = as_file(tmp_path, to_pem(certificate) + to_pem(key))
    with pytest.raises(ConfigurationError) as caught:
        server_context(path)
    assert "file.pem" in str(caught.value)
    assert str(certificate.not_valid_before_utc) in str(caught.value)
    assert str(certificate.not_valid_after_utc) in str(caught.value)
    assert ("expired" if begin_end[1] < 0 else "not yet valid") in str(caught.value)


def test_a_key_that_is_not_the_certificate_s(tmp_path: Path) -> None:
    certificate, key = self_signed()
    other, other_key = self_signed(name="b.example")
    path = as_file(tmp_path, to_pem(certificate))
    with pytest.raises(ConfigurationError, match=r"does not match the certificate in certfile .*file\.pem"):
        server_context(path, other_key)
    with pytest.raises(ConfigurationError, match="number 2"):
        server_context([other, certificate], key)


@pytest.mark.parametrize("between", [b"\n", b"", b"\r\n  "])
@pytest.mark.parametrize("last", [b"-----BEGIN C", b"CERTIFICATE-----\nMII", b"\n-----END CERTIFICATE----"])
def test_a_file_half_written_is_refused(tmp_path: Path, last: bytes, between: bytes) -> None:
    certificate, key = self_signed()
    whole = to_pem(certificate).strip() + between + to_pem(self_signed(name="b.example")[0])
    half = whole[: whole.rindex(last) + len(last)]
    unusable: list[Callable[[], Context]] = [
        lambda: server_context(as_file(tmp_path, half), key),
        lambda: server(client_ca=half),
        lambda: client_context(half),
    ]
    for make in unusable:
        with pytest.raises(ConfigurationError, match="cut off"):
            make()


@pytest.mark.parametrize(
    "behind",
    [
        b"# more may follow, each from its -----BEGIN CERTIFICATE----- line on\n",
        b"-----BEGIN X-Y-----\nAAAA\n-----END X-Y-----\n",
        b"-----BEGIN EC PARAMETERS-----\r\nBggqhkjOPQMBBw==\r\n-----END EC PARAMETERS-----\r\n",
    ],
    ids=["a comment", "a label with a hyphen", "parameters"],
)
def test_what_stands_behind_a_whole_certificate_is_not_half_written(behind: bytes) -> None:
    certificate, key = self_signed()
    client_context(to_pem(certificate) + behind)
    server_context(to_pem(certificate) + behind, key)


def test_a_trusted_certificate_is_read_from_the_path_of_a_cafile_and_refused_elsewhere(
    tmp_path: Path,
) -> None:
    certificate, key = self_signed()
    trusted = to_pem(certificate).replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE")
    path = as_file(tmp_path, trusted)
    meet(
        Ours(client_context(path, check_hostname=False)),
        Ours(server_context(certificate, key)),
    )
    unusable: list[Callable[[], Context]] = [
        lambda: client_context(trusted),
        lambda: server_context(path, key),
        lambda: server_context(trusted + to_pem(certificate), key),
        lambda: server(client_ca=path),
    ]
    for make in unusable:
        with pytest.raises(
            ConfigurationError, match="TRUSTED CERTIFICATE.*whose path is given as cafile.*openssl x509"
        ):
            make()


@pytest.mark.parametrize(
    ("certfile", "keyfile", "words"),
    [
        ("/nowhere/c.pem", None, ["certfile '/nowhere/c.pem'", "No such file"]),
        (to_pem(self_signed()[0]), None, ["no private key", "keyfile"]),
        (to_pem(self_signed()[0]), "/nowhere/k.pem", ["keyfile '/nowhere/k.pem'", "No such file"]),
        (to_pem(self_signed()[0]), b"garbage", ["PEM given as keyfile", "no private key"]),
        (
            to_pem(self_signed()[0]),
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            ["keyfile", "damaged"],
        ),
        (to_pem(self_signed()[0]), 5, ["keyfile", "int"]),
        (to_pem(self_signed()[0]), to_pem(x25519.X25519PrivateKey.generate()), ["TLS cannot use: X25519"]),
        (self_signed()[0], None, ["keyfile is needed"]),
        (None, None, ["certfile", "NoneType"]),
    ],
)
def test_an_unusable_identity(certfile: Any, keyfile: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        server_context(certfile, keyfile)
    assert [word for word in words if word not in str(caught.value)] == []


def damaged(certificate: x509.Certificate, old: str, new: str) -> bytes:
    """*certificate* in PEM, with other bytes in one place (in hexadecimal); its signature does not fit them."""
    der = certificate.public_bytes(serialization.Encoding.DER)
    changed = der.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    assert changed != der
    return ssl.DER_cert_to_PEM_cert(changed).encode()


def of_version_8(certificate: x509.Certificate) -> bytes:
    return damaged(certificate, "a003020102", "a003020107")


def test_a_key_of_an_unknown_kind_is_openssl_s_to_judge() -> None:
    certificate, key = self_signed()
    with pytest.raises(ConfigurationError, match="OpenSSL refuses the certificate or key"):
        server_context(damaged(certificate, "06072a8648ce3d0201", "06072a8648ce3d027f"), to_pem(key))


def test_a_directory_is_no_certfile(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Is a directory"):
        server_context(tmp_path)


def test_openssl_s_refusal_of_a_weak_certificate_is_reported() -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = rsa.generate_private_key(65537, 1024)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weak")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        subject, subject, weak.public_key(), 1, now, now + datetime.timedelta(1)
    )
    with pytest.raises(ConfigurationError, match=r"OpenSSL refuses.*(too small|too weak)"):
        server_context(builder.sign(weak, hashes.SHA256()), weak)


# Client certificates.


def visitor(ca: trustme.CA = CLIENT_CA, **options: Any) -> Context:
    return client(certfile=pem(leaf("visitor.example", ca=ca)), **options)


@both_versions
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_mutual_tls(tmp_path: Path, source: Callable[[Path, bytes], Any], version: str) -> None:
    context = server(client_ca=source(tmp_path, CLIENT_CA.cert_pem.bytes()), **only(version))
    assert context.verifies_peer
    a, b = Ours(visitor(), "a.example"), Ours(context)
    meet(a, b)
    assert b.verifies
    issuer = x509.load_pem_x509_certificate(CLIENT_CA.cert_pem.bytes()).subject
    assert b.certificate.issuer == issuer
    assert [name.der() for name in a.connection.get_client_ca_list()] == [issuer.public_bytes()]


@both_versions
def test_a_client_of_another_ca_is_refused(version: str) -> None:
    b = Ours(server(client_ca=CLIENT_CA.cert_pem.bytes(), **only(version)))
    pump(Ours(visitor(OTHER_CA), "a.example"), b)
    assert not b.done
    assert isinstance(b.record.error, CertificateError)
    assert "the client's certificate was refused: unable to get local issuer" in str(b.record.error)


@both_versions
@pytest.mark.parametrize("client_cert", ["required", "optional"])
def test_a_client_without_a_certificate(version: str, client_cert: str) -> None:
    b = Ours(server(client_ca=CLIENT_CA.cert_pem.bytes(), client_cert=client_cert, **only(version)))
    _, error = pump(Ours(client(), "a.example"), b)
    assert b.done == (client_cert == "optional")
    if client_cert == "required":
        assert "peer did not return a certificate" in str(error)


# ALPN.


@both_versions
@pytest.mark.parametrize(
    ("offered", "served", "chosen"),
    [
        (("h2", "http/1.1"), ("http/1.1", "h2"), "http/1.1"),
        (("http/1.1",), ("h2", "http/1.1"), "http/1.1"),
        (("imap",), ("h2",), None),
        ((), ("h2",), None),
        (("h2",), (), None),
    ],
)
def test_alpn(version: str, offered: tuple[str, ...], served: tuple[str, ...], chosen: str | None) -> None:
    a, b = Ours(client(alpn=offered), "a.example"), Ours(server(alpn=served, **only(version)))
    meet(a, b)
    assert (a.alpn, b.alpn) == (chosen, chosen)
    peer = stdlib_client(version)
    if offered:
        peer.set_alpn_protocols(list(offered))
    c, d = Stdlib(peer, name="a.example"), Ours(server(alpn=list(served)))
    meet(c, d)
    assert (c.object.selected_alpn_protocol(), d.alpn) == (chosen, chosen)


# SNI.

VHOSTS = ("default.example", "a.example", "wild.example", "www.b.example", "idna.example")


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("a.example", "a.example"),
        ("A.EXAMPLE", "a.example"),
        ("a.example.", "a.example"),
        ("x.b.example", "wild.example"),
        ("www.b.example", "www.b.example"),
        ("x.y.b.example", "default.example"),
        ("b.example", "default.example"),
        ("unknown.example", "default.example"),
        ("bücher.example", "idna.example"),
        ("xn--bcher-kva.example", "idna.example"),
        ("192.0.2.1", "default.example"),
        (None, "default.example"),
    ],
)
@both_versions
def test_sni_routing(asked: str | None, served: str, version: str) -> None:
    contexts = {name: server(name, **only(version)) for name in VHOSTS[1:]}
    routes = {
        "A.example.": contexts["a.example"],
        "*.b.example": contexts["wild.example"],
        "www.b.example": contexts["www.b.example"],
        "Bücher.example": contexts["idna.example"],
    }
    default = server(VHOSTS[0], sni=routes, **only(version))
    a, b = Ours(client(check_hostname=False), asked), Ours(default)
    meet(a, b)
    names = a.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [served]
    assert b.record.context is default
    assert b.record.routed is contexts.get(served, default)


@pytest.mark.parametrize("asked", [b"B.Example", b"b.example.", b"WWW.C.EXAMPLE"])
def test_a_client_may_write_the_name_that_it_asks_for_as_it_likes(asked: bytes) -> None:
    other = server("b.example", "www.c.example", client_ca=CLIENT_CA.cert_pem.bytes())
    b = Ours(server(sni={"b.example": other, "*.c.example": other}))
    a = Ours(visitor(check_hostname=False))
    a.connection.set_tlsext_host_name(asked)
    meet(a, b)
    assert b.record.routed is other and b.verifies


@both_versions
def test_sni_switches_everything_that_must_switch(version: str) -> None:
    inner = server("b.example", alpn=("imap",), client_ca=CLIENT_CA.cert_pem.bytes(), **only(version))
    outer = server(alpn=("h2",), sni={"b.example": inner}, **only(version))

    a, b = Ours(visitor(alpn=("h2", "imap")), "b.example"), Ours(outer)
    meet(a, b)
    assert (a.alpn, b.verifies) == ("imap", True)
    assert len(a.connection.get_client_ca_list()) == 1

    b = Ours(outer)
    _, error = pump(Ours(client(), "b.example"), b)
    assert "peer did not return a certificate" in str(error)
    assert not b.done

    b = Ours(outer)
    pump(Ours(visitor(OTHER_CA), "b.example"), b)
    assert isinstance(b.record.error, CertificateError)

    a, b = Ours(client(alpn=("h2", "imap")), "a.example"), Ours(outer)
    meet(a, b)
    assert (a.alpn, b.verifies) == ("h2", False)


@both_versions
def test_sni_away_from_a_context_that_demands_certificates(version: str) -> None:
    free = server("b.example", **only(version))
    outer = server(client_ca=CLIENT_CA.cert_pem.bytes(), sni={"b.example": free}, **only(version))
    b = Ours(outer)
    meet(Ours(client(), "b.example"), b)
    assert not b.verifies
    b = Ours(outer)
    pump(Ours(client(), "a.example"), b)
    assert not b.done


@pytest.mark.parametrize("name", ["a.example", "b.example"])
def test_sni_after_a_hello_retry_request(name: str) -> None:
    inner = server("b.example", client_ca=CLIENT_CA.cert_pem.bytes(), **only("TLSv1.3"))
    outer = server(sni={"b.example": inner}, **only("TLSv1.3"))
    for context in (inner, outer):
        context.raw.set_tmp_ecdh(ec.SECP384R1())
    b = Ours(outer)
    meet(Ours(visitor(), name), b)
    b = Ours(outer)
    pump(Ours(client(), name), b)
    assert b.done == (name == "a.example")


@pytest.mark.parametrize(("first", "then"), [("a.example", "b.example"), ("b.example", "a.example")])
def test_the_last_name_counts_if_the_client_changes_it_in_between(first: str, then: str) -> None:
    inner = server("b.example", client_ca=CLIENT_CA.cert_pem.bytes(), **only("TLSv1.3"))
    outer = server(sni={"b.example": inner}, **only("TLSv1.3"))
    outer.raw.set_tmp_ecdh(ec.SECP384R1())
    a, b = Ours(client(check_hostname=False), first), Ours(outer)
    for end, peer in ((a, b), (b, a)):
        with pytest.raises(SSL.WantReadError):
            end.handshake()
        peer.feed(end.take())
    assert b.record.routed is (inner if first == "b.example" else outer)
    a.connection.set_tlsext_host_name(then.encode())
    pump(a, b)
    assert b.record.routed is (inner if then == "b.example" else outer)
    assert b.done == (then == "a.example")


@both_versions
def test_a_ticket_of_one_name_does_not_open_another(version: str) -> None:
    """CVE-2025-23419.  A ticket earned where nobody is verified must not stand in for a certificate."""
    inner = server("b.example", client_ca=CLIENT_CA.cert_pem.bytes(), **only(version))
    outer = server(sni={"b.example": inner}, **only(version))
    thief = client(check_hostname=False)
    a, b = Ours(thief, "a.example", "ticket"), Ours(outer)
    meet(a, b)
    close(a, b)
    thief.remember(a.connection, "ticket")
    a, b = Ours(thief, "b.example", "ticket"), Ours(outer)
    pump(a, b)
    assert not b.done
    assert not b.resumed


@both_versions
def test_a_context_that_asks_for_certificates_and_hands_over_to_others_gives_no_tickets(version: str) -> None:
    """CVE-2025-23419: whichever of them asks."""
    outer = server(
        client_ca=CLIENT_CA.cert_pem.bytes(),
        sni={"b.example": server("b.example", **only(version))},
        **only(version),
    )
    context = visitor()
    assert not resumption(context, outer) and not resumption(context, outer)


@both_versions
def test_names_without_client_certificates_may_resume(version: str) -> None:
    outer = server(sni={"b.example": server("b.example", **only(version))}, **only(version))
    context = client()
    assert [resumption(context, outer, "b.example") for _ in range(2)] == [False, True]


def test_sni_takes_a_context_of_the_user_s_own() -> None:
    seen: list[int] = []

    def callback(connection: Any, certificate: Any, code: int, depth: int, ok: int) -> bool:
        seen.append(depth)
        return bool(ok)

    raw = server("b.example", client_ca=CLIENT_CA.cert_pem.bytes()).raw
    raw.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, callback)
    outer = server(sni={"b.example": raw})
    meet(Ours(visitor(), "b.example"), Ours(outer))
    assert seen == [1, 0]
    b = Ours(outer)
    pump(Ours(client(), "b.example"), b)
    assert not b.done


@pytest.mark.parametrize("old", [False, True], ids=["pyOpenSSL-26", "older"])
def test_the_stricter_prohibition_holds(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old:
        monkeypatch.delattr(SSL.Connection, "set_options", raising=False)
    inner = server("b.example", renegotiation=False, **only("TLSv1.2"))
    outer = server(sni={"b.example": inner}, renegotiation=True, **only("TLSv1.2"))
    b = Ours(outer)
    meet(Ours(client(), "b.example"), b)
    with pytest.raises(SSL.Error):
        b.connection.renegotiate()


def test_a_session_that_missed_its_routing_is_refused() -> None:
    outer = server(sni={"b.example": server("b.example")})
    a, b = Ours(client(), "b.example"), Ours(outer)
    meet(a, b)
    b.record.routed = outer
    with pytest.raises(TLSError, match="server name") as caught:
        outer.verify(b.connection, None)
    assert caught.value.reason == "CALLBACK_FAILED"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {"b.example": client()}, ["client_context()", "server_context()"]),
        (lambda: {"b.example": None}, ["NoneType"]),
        (lambda: {b"b.example": server()}, ["bytes"]),
        (lambda: {"*": server()}, ["'*'"]),
        (lambda: {"a.*.example": server()}, ["'a.*.example'"]),
        (lambda: {"192.0.2.1": server()}, ["192.0.2.1"]),
        (lambda: {"b.example": server(), "B.example.": server()}, ["twice"]),
        (lambda: {"b.example": server(sni={"c.example": server()})}, ["one level"]),
        (lambda: {"b.example": server(minimum_version="TLSv1.3")}, ["minimum_version", "b.example"]),
        (lambda: [("b.example", server())], ["sni must be a dict", "not list"]),
        (lambda: "", ["sni must be a dict", "not str"]),
    ],
)
def test_unusable_sni(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        server(sni=make())
    assert [word for word in words if word not in str(caught.value)] == []


# Names.


@pytest.mark.parametrize(
    ("issued", "asked"),
    [
        ("a.example", "a.example"),
        ("a.example", "A.Example"),
        ("a.example", "a.example."),
        ("*.a.example", "x.a.example"),
        ("*.a.example", "bücher.a.example"),
        ("*.a.example", "XN--bcher-kva.a.example"),
        ("xn--bcher-kva.example", "bücher.example"),
        ("xn--bcher-kva.example", "BÜCHER.example."),
        ("xn--bcher-kva.example", "bücher。example。"),  # ideographic full stops (UTS 46, 2.3)
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:db8::1", "2001:0DB8:0::1"),
        ("fe80::1", "fe80::1%eth0"),
        ("localhost", "localhost"),
    ],
)
@both_versions
def test_names_that_match(issued: str, asked: str, version: str) -> None:
    a, b = Ours(client(), asked), Ours(server(issued, **only(version)))
    meet(a, b)
    sni = b.connection.get_servername()
    wanted = asked.lower().replace("。", ".").rstrip(".").replace("bücher", "xn--bcher-kva")
    assert sni == (None if issued[0].isdigit() or ":" in issued else wanted.encode())


@pytest.mark.parametrize(
    ("issued", "asked", "code"),
    [
        ("a.example", "b.example", 62),
        ("a.example", "x.a.example", 62),
        ("*.a.example", "a.example", 62),
        ("*.a.example", "x.y.a.example", 62),
        ("192.0.2.1", "192.0.2.2", 64),
        ("192.0.2.1", "a.example", 62),
        ("a.example", "192.0.2.1", 64),
        ("2001:db8::1", "2001:db8::2", 64),
        ("a.example", "bücher.example", 62),
        ("*.a.example", "bücher.b.example", 62),
        ("*.a.example", "bücher.x.a.example", 62),
    ],
)
@both_versions
def test_names_that_do_not_match(issued: str, asked: str, code: int, version: str) -> None:
    error, _ = pump(Ours(client(), asked), Ours(server(issued, **only(version))))
    assert isinstance(error, HostnameMismatch)
    assert isinstance(error, ssl.SSLCertVerificationError)
    assert repr(issued) in str(error)
    assert repr(asked) in str(error)
    assert error.verify_code == code


def test_check_hostname_can_be_off() -> None:
    meet(Ours(client(check_hostname=False), "b.example"), Ours(server()))
    meet(Ours(client(check_hostname=False)), Ours(server()))


def test_a_certificate_without_names_is_for_nobody() -> None:
    certificate, key = self_signed(name="a.example")
    error, _ = pump(Ours(client_context(certificate), "a.example"), Ours(server_context(certificate, key)))
    assert isinstance(error, HostnameMismatch)
    assert "common name does not count" in str(error)


@pytest.mark.parametrize(
    ("names", "asked"),
    [((), "a.example"), (("w*.b.example",), "www.b.example")],
    ids=["common name", "partial wildcard"],
)
def test_a_server_whose_name_does_not_match_learns_it_in_the_handshake(
    names: tuple[str, ...], asked: str
) -> None:
    """And is not shown the client's certificate."""
    extensions = (
        {"names": x509.SubjectAlternativeName([x509.DNSName(name) for name in names])} if names else {}
    )
    certificate, key = self_signed(name="a.example", **extensions)
    peer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(to_pem(certificate) + to_pem(key))
        file.flush()
        peer.load_cert_chain(file.name)
    end = Stdlib(peer, server_side=True)
    mine, its = pump(Ours(client_context(certificate), asked), end)
    assert isinstance(mine, HostnameMismatch)
    assert not end.done and isinstance(its, ssl.SSLError) and "ALERT" in its.reason


def test_a_certificate_with_hundreds_of_names_makes_no_endless_message() -> None:
    many = server(*(f"n{number}.example" for number in range(200)))
    error, _ = pump(Ours(client(), "b.example"), Ours(many))
    assert "'n0.example'" in str(error)
    assert "192 more" in str(error)


DNS, URI, ADDRESS, X400, EDI = 0x82, 0x86, 0x87, 0xA3, 0xA5
ODD_NAMES = {
    "an address as a DNS name": (DNS, b"127.0.0.1"),
    "a wildcard for a whole domain": (DNS, b"*.test"),
    "a wildcard for all": (DNS, b"*"),
    "two wildcards": (DNS, b"*.*.a.example"),
    "a wildcard inside": (DNS, b"a.*.example"),
    "nothing": (DNS, b""),
    "a wildcard": (DNS, b"*.a.example"),
    "no URI": (URI, b"nocolon"),
    "a URI with a wildcard": (URI, b"spiffe://*/x"),
    "a URI with a port": (URI, b"https://b.example:443/"),
}


def names_extension(*names: tuple[int, bytes]) -> x509.UnrecognizedExtension:
    """A subjectAltName as its DER, which need not be right."""
    der = b"".join(bytes((tag, len(content))) + content for tag, content in names)
    return x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes((0x30, len(der))) + der)


@pytest.mark.parametrize("asked", ["localhost", "b.example", "127.0.0.1"])
@pytest.mark.parametrize("odd", ODD_NAMES.values(), ids=list(ODD_NAMES))
def test_an_odd_name_takes_nothing_from_the_names_beside_it(odd: tuple[int, bytes], asked: str) -> None:
    extension = names_extension(odd, (DNS, b"localhost"), (DNS, b"b.example"), (ADDRESS, b"\x7f\0\0\1"))
    certificate, key = self_signed(extension=extension)
    meet(Ours(client_context(certificate), asked), Ours(server_context(certificate, key)))


@pytest.mark.parametrize(
    ("odd", "asked", "code", "words"),
    [
        ((DNS, b"127.0.0.1"), "127.0.0.1", 64, "holds as a DNS name, and not as an IP address"),
        ((DNS, b"*.test"), "a.test", 62, "'*.test', not for 'a.test'"),
        ((DNS, b"*"), "localhost", 62, "'*', not for 'localhost'"),
        ((DNS, b"*.*.a.example"), "x.y.a.example", 62, "'*.*.a.example'"),
        ((DNS, b"a.*.example"), "a.b.example", 62, "'a.*.example'"),
        ((DNS, b"xn--*.a.example"), "xn--bcher-kva.a.example", 62, "'xn--*.a.example'"),
        ((DNS, b"1_0"), "1_0", 62, "'1_0'"),
        ((URI, b"https://a.example/"), "a.example", 62, "without any host name"),
    ],
)
def test_an_odd_name_is_nobody_s(odd: tuple[int, bytes], asked: str, code: int, words: str) -> None:
    certificate, key = self_signed(extension=names_extension(odd))
    error, _ = pump(Ours(client_context(certificate), asked), Ours(server_context(certificate, key)))
    assert isinstance(error, HostnameMismatch)
    assert words in str(error) and error.verify_code == code


def twice() -> x509.Certificate:
    """A certificate with two subjectAltNames, which no library makes."""
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"\x30\0")
    certificate, _ = self_signed(extension=names_extension((DNS, b"a.example")), more=other)
    return x509.load_der_x509_certificate(
        certificate.public_bytes(serialization.Encoding.DER).replace(b"\x55\x1d\x63", b"\x55\x1d\x11")
    )


@pytest.mark.parametrize(
    "certificate",
    [
        lambda: self_signed(
            extension=x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"no names")
        )[0],
        lambda: self_signed(extension=names_extension((X400, b"\x30\0"), (DNS, b"a.example")))[0],
        lambda: self_signed(extension=names_extension((EDI, b"\xa1\x05\x0c\x03abc"), (DNS, b"a.example")))[0],
        twice,
    ],
    ids=["no names", "an X.400 address", "an EDI party", "names twice"],
)
def test_a_certificate_whose_names_cannot_be_read_is_for_nobody(
    certificate: Callable[[], x509.Certificate],
) -> None:
    with pytest.raises(CertificateError, match="holds damaged names"):
        PeerName.parse("a.example").check(certificate())


def test_a_server_that_shows_no_certificate_is_refused() -> None:
    """Anonymous key exchange: both must have been configured to be so careless."""
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.set_max_proto_version(SSL.TLS1_2_VERSION)
    raw.set_cipher_list(b"aNULL:@SECLEVEL=0")
    careless = client(ciphers="aNULL:@SECLEVEL=0", maximum_version="TLSv1.2")
    error, _ = pump(Ours(careless, "a.example"), Ours(Context.adopt(raw, server_side=True)))
    assert isinstance(error, CertificateError) and "the server showed no certificate" in str(error)


def test_a_certificate_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    certificate, key = self_signed()
    (tmp_path / "cert.pem").write_bytes(of_version_8(certificate))
    (tmp_path / "key.pem").write_bytes(to_pem(key))
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.use_certificate_chain_file(str(tmp_path / "cert.pem"))
    raw.use_privatekey_file(str(tmp_path / "key.pem"))
    strange = Context.adopt(raw, server_side=True)
    assert "unreadable" in str(refused(Ours(client(), "a.example"), Ours(strange)))
    careless = Ours(client_context(verify=False), "a.example")
    meet(careless, Ours(strange))
    with pytest.raises(CertificateError, match="the peer's certificate is malformed"):
        peer_certificate(careless.connection)
    assert presented_chain(careless.connection, None) == ()


def test_what_cannot_be_read_of_a_chain_is_left_out_of_what_is_said_about_it(tmp_path: Path) -> None:
    """OpenSSL has verified it all the same, and the stdlib takes it: an odd root of one's own, or one too many."""
    ca = trustme.CA()
    issued = ca.issue_cert("a.example")
    root = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    odd = damaged(root, "a003020102", "a003020101")  # version 2
    (tmp_path / "ca.pem").write_bytes(odd)
    (tmp_path / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes() + odd)
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.use_certificate_chain_file(str(tmp_path / "cert.pem"))
    raw.use_privatekey_file(str(tmp_path / "key.pem"))
    end = Ours(client_context(tmp_path / "ca.pem"), "a.example")
    meet(end, Ours(Context.adopt(raw, server_side=True)))
    connection, own = end.connection, peer_certificate(end.connection)
    assert len(connection.get_verified_chain() or ()) == len(connection.get_peer_cert_chain() or ()) == 2
    assert verified_chain(connection) == presented_chain(connection, own) == (own,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, ["server_hostname", "check_hostname=False"]),
        (b"a.example", ["bytes"]),
        ("", ["neither"]),
        ("[2001:db8::1]", ["without brackets"]),
        ("a..example", ["neither"]),
        ("a b.example", ["neither"]),
        ("*.example.com", ["neither"]),
        ("a.example:443", ["neither"]),
        ("https://a.example", ["neither"]),
        ("127.1", ["neither"]),
        ("2130706433", ["neither"]),
        ("x" * 64 + ".example", ["neither"]),
        ("ü" * 70 + ".example", ["internationalised"]),
        (".".join(["x" * 60] * 5), ["neither"]),
        (".".join(["x" * 63] * 3 + ["x" * 62]), ["neither"]),
        ("a\0.example", ["neither"]),
    ],
)
def test_unusable_server_hostnames(name: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        client().connection(None, name, None)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_name_may_be_as_long_as_dns_has_room_for() -> None:
    longest = ".".join(["x" * 63] * 3 + ["x" * 61])
    assert client().connection(None, longest, None) is not None


# The user's own OpenSSL.SSL.Context.


def raw_client(mode: int = SSL.VERIFY_PEER, trusted: trustme.CA = CA) -> SSL.Context:
    raw = SSL.Context(SSL.TLS_METHOD)
    store = raw.get_cert_store()
    assert store is not None
    from OpenSSL.crypto import X509

    store.add_cert(X509.from_cryptography(x509.load_pem_x509_certificate(trusted.cert_pem.bytes())))
    raw.set_verify(mode)
    return raw


def test_an_adopted_context_is_taken_as_it_is() -> None:
    raw = raw_client()
    adopted = Context.adopt(raw, server_side=False)
    assert adopted.raw is raw
    assert (adopted.verifies_peer, adopted.check_hostname) == (True, True)
    meet(Ours(adopted, "a.example"), Ours(server()))
    meet(Ours(adopted), Ours(server()))


def test_an_adopted_context_that_verifies_has_the_name_checked() -> None:
    adopted = Context.adopt(raw_client(), server_side=False)
    error, _ = pump(Ours(adopted, "b.example"), Ours(server()))
    assert isinstance(error, HostnameMismatch)
    lax = Context.adopt(raw_client(SSL.VERIFY_NONE), server_side=False)
    meet(Ours(lax, "b.example"), Ours(server()))


def test_an_adopted_context_says_why_it_refused() -> None:
    adopted = Context.adopt(raw_client(), server_side=False)
    error = refused(Ours(adopted, "a.example"), Ours(server_context(pem(leaf("a.example", ca=OTHER_CA)))))
    assert error.verify_code == 20


def judge(
    side: str, version: str, trusted: trustme.CA, callback: Callable[..., bool]
) -> tuple[CertificateError, str]:
    """Why an adopted context with a verify *callback* refuses its peer's certificate, and whose that is."""
    if side == "client":
        raw = raw_client(trusted=trusted)
        raw.set_verify(SSL.VERIFY_PEER, callback)
        peer = server(**only(version))
        return refused(Ours(Context.adopt(raw, server_side=False), "a.example"), Ours(peer)), "server"
    raw = server(client_ca=trusted.cert_pem.bytes(), **only(version)).raw
    raw.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, callback)
    return refused(Ours(Context.adopt(raw, server_side=True)), Ours(visitor(CA), "a.example")), "client"


@pytest.mark.parametrize("side", ["client", "server"])
@both_versions
def test_an_adopted_context_with_a_verify_callback_says_why_openssl_refused(side: str, version: str) -> None:
    error, whose = judge(side, version, OTHER_CA, lambda *seen: bool(seen[-1]))
    assert type(error) is CertificateError and error.reason == "CERTIFICATE_VERIFY_FAILED"
    assert error.verify_code in (19, 20) and error.depth is None
    assert "local issuer" in error.verify_message or "self-signed" in error.verify_message
    assert f"the {whose}'s certificate was refused: {error.verify_message}" in str(error)


@pytest.mark.parametrize("side", ["client", "server"])
@both_versions
def test_a_verify_callback_that_refuses_what_openssl_accepts_is_named(side: str, version: str) -> None:
    error, whose = judge(side, version, CA, lambda *_: False)
    assert type(error) is CertificateError and error.reason == "CERTIFICATE_VERIFY_FAILED"
    assert error.verify_code == 1
    assert error.verify_message == "the context's verify callback refused what OpenSSL accepts"
    assert f"the {whose}'s certificate was refused: {error.verify_message}" in str(error)


def test_adopting_what_cannot_be() -> None:
    ours = client()
    assert Context.adopt(ours, server_side=False) is ours
    with pytest.raises(ConfigurationError, match=r"made by client_context\(\).*needs.*server_context\(\)"):
        Context.adopt(ours, server_side=True)
    with pytest.raises(ConfigurationError, match=r"made by server_context\(\).*needs.*client_context\(\)"):
        Context.adopt(server(), server_side=False)
    with pytest.raises(ConfigurationError, match=r"client_context\(\).*not ssl\.SSLContext"):
        Context.adopt(ssl.create_default_context(), server_side=False)  # type: ignore[arg-type]


# Frozen.


@both_versions
def test_a_context_serves_connections_of_others_whatever_their_app_data(version: str) -> None:
    raw = server(**only(version)).raw
    ours, theirs = Ours(client(), "a.example"), SSL.Connection(raw, None)
    theirs.set_accept_state()
    theirs.set_app_data({"somebody": "else's"})
    for _ in range(10):
        for one, other in ((ours.connection, theirs), (theirs, ours.connection)):
            with contextlib.suppress(SSL.WantReadError):
                one.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(1 << 20))
    assert theirs.get_servername() == b"a.example" and theirs.get_protocol_version_name() == version


def test_a_context_is_frozen() -> None:
    context = client()
    for name in ("raw", "check_hostname", "something_new"):
        with pytest.raises(AttributeError, match=r"frozen.*replace_context"):
            setattr(context, name, None)
    with pytest.raises(AttributeError, match="frozen"):
        del context.check_hostname


def test_repr_tells_the_role_and_no_secret() -> None:
    inner = server("b.example")
    context = server(alpn=("h2",), client_ca=CA_PEM, sni={"*.b.example": inner}, keylog=False)
    assert repr(context) == ("<bridge.Context: server side, verifies the client, ALPN h2, SNI *.b.example>")
    assert repr(client_context(verify=False)) == "<bridge.Context: client side, does not verify the server>"
    assert "but not its name" in repr(client(check_hostname=False))


# Resumption.


def resumption(context: Context, peer: Context, name: str = "a.example", key: object = "peer") -> bool:
    """One whole session, remembered at its end; whether it was itself a resumption, as both ends see it."""
    a, b = Ours(context, name, key), Ours(peer)
    meet(a, b)
    close(a, b)
    context.remember(a.connection, key)
    assert a.resumed == b.resumed
    assert b.connection.get_servername() == name.encode(), (
        "also without sni=, and of a session that is resumed"
    )
    return a.resumed


@both_versions
@pytest.mark.parametrize("mutual", [False, True])
def test_sessions_are_resumed(version: str, mutual: bool) -> None:
    options = {"client_ca": CLIENT_CA.cert_pem.bytes()} if mutual else {}
    peer = server(**options, **only(version))
    context = visitor()
    assert [resumption(context, peer) for _ in range(3)] == [False, True, True]
    assert not resumption(context, peer, key="another")


@both_versions
def test_sessions_of_the_stdlib_s_server_are_resumed(version: str) -> None:
    context = client()
    peer_context = stdlib_server(version, "a.example")
    seen = []
    for _ in range(2):
        a, b = Ours(context, "a.example", "peer"), Stdlib(peer_context, server_side=True)
        meet(a, b)
        a.connection.shutdown()
        context.remember(a.connection, "peer")
        seen.append((a.resumed, b.object.session_reused))
    assert seen == [(False, False), (True, True)]


@both_versions
def test_a_resumed_server_s_name_is_still_checked(version: str) -> None:
    context = client()
    peer = server(**only(version))
    resumption(context, peer)
    error, _ = pump(Ours(context, "b.example", "peer"), Ours(peer))
    assert isinstance(error, HostnameMismatch)


@both_versions
def test_resumption_can_be_off_on_either_side(version: str) -> None:
    context, peer = client(resumption=False), server(**only(version))
    assert [resumption(context, peer) for _ in range(2)] == [False, False]
    context, peer = client(), server(tickets=False, **only(version))
    assert [resumption(context, peer) for _ in range(2)] == [False, False]


@both_versions
def test_a_session_that_was_cut_off_is_not_resumed(version: str) -> None:
    context, peer = client(), server(**only(version))
    a, b = Ours(context, "a.example", "peer"), Ours(peer)
    meet(a, b)
    context.remember(a.connection, "peer")
    del a, b
    assert not resumption(context, peer)


@both_versions
def test_a_ticket_of_tls_1_3_is_used_once(version: str) -> None:
    context, peer = client(), server(**only(version))
    resumption(context, peer)
    pairs = [(Ours(context, "a.example", "peer"), Ours(peer)) for _ in range(2)]
    for a, b in pairs:
        meet(a, b)
    assert [a.resumed for a, b in pairs] == [True, version == "TLSv1.2"]


def test_a_session_without_its_ticket_does_not_displace_one_with() -> None:
    context, peer = client(), server(**only("TLSv1.3"))
    resumption(context, peer)
    a = Ours(context, "a.example", "another")
    pump(a, Ours(peer))
    context.remember(a.connection, "peer")
    again = Ours(context, "a.example", "peer")
    assert pump(again, Ours(peer)) == (None, None)
    assert again.resumed
    context.remember(again.connection, "peer")
    last = Ours(context, "a.example", "peer")
    pump(last, Ours(peer))
    assert not last.resumed


def test_remembered_sessions_are_bounded() -> None:
    context, peer = client(), server(**only("TLSv1.2"))
    a, b = Ours(context, "a.example", 0), Ours(peer)
    meet(a, b)
    close(a, b)
    for key in range(REMEMBERED_SESSIONS + 1):
        if key == REMEMBERED_SESSIONS:
            Ours(context, "a.example", 0)  # now 1 is the least recently used
        context.remember(a.connection, key)
    assert resumption(context, peer, key=0)
    assert not resumption(context, peer, key=1)
    assert resumption(context, peer, key=3)


def test_a_session_too_large_for_any_hello_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    context, peer = client(), server(**only("TLSv1.2"))
    monkeypatch.setattr(context_module, "MOST_SESSION_BYTES", 10)
    resumption(context, peer)
    assert not resumption(context, peer)


# OCSP.


def ocsp_response(status: ocsp.OCSPResponseStatus) -> bytes:
    return ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(serialization.Encoding.DER)


STAPLE = ocsp_response(ocsp.OCSPResponseStatus.TRY_LATER)
NAMED_STAPLE = ocsp_response(ocsp.OCSPResponseStatus.UNAUTHORIZED)
INTERNAL_ERROR = ocsp_response(ocsp.OCSPResponseStatus.INTERNAL_ERROR)


@both_versions
@pytest.mark.parametrize(
    ("staple", "expected"),
    [(STAPLE, STAPLE), ({"a.example": NAMED_STAPLE}.__getitem__, NAMED_STAPLE), (b"", b""), (None, b"")],
    ids=["bytes", "callable", "empty", "none"],
)
def test_a_staple_reaches_the_check(version: str, staple: Any, expected: bytes) -> None:
    seen: list[tuple[bytes, x509.Certificate]] = []

    def check(response: bytes, certificate: x509.Certificate) -> bool:
        seen.append((response, certificate))
        return True

    a = Ours(client(ocsp_check=check), "a.example")
    meet(a, Ours(server(ocsp_staple=staple, **only(version))))
    assert seen == [(expected, a.certificate)]


def test_a_client_that_asks_for_no_name_gets_a_staple_too() -> None:
    asked: list[str | None] = []
    seen: list[bytes] = []

    def staple(name: str | None) -> bytes:
        asked.append(name)
        return STAPLE

    def check(response: bytes, certificate: x509.Certificate) -> bool:
        seen.append(response)
        return True

    meet(Ours(client(ocsp_check=check, check_hostname=False)), Ours(server(ocsp_staple=staple)))
    assert (asked, seen) == ([None], [STAPLE])


@both_versions
@pytest.mark.parametrize("staple", [STAPLE, None])
def test_a_staple_that_is_refused(version: str, staple: bytes | None) -> None:
    a = Ours(client(ocsp_check=lambda response, certificate: False), "a.example")
    error = refused(a, Ours(server(ocsp_staple=staple, **only(version))))
    assert (f"{len(STAPLE)} bytes" if staple else "stapled none") in str(error)
    assert not a.done


@both_versions
def test_a_check_that_raises_refuses(version: str) -> None:
    def check(response: bytes, certificate: x509.Certificate) -> bool:
        raise LookupError("no responder")

    error = refused(Ours(client(ocsp_check=check), "a.example"), Ours(server(**only(version))))
    assert "LookupError: no responder" in str(error)
    assert isinstance(error.__cause__, LookupError)


@pytest.mark.parametrize("what", ["ocsp_check", "keylog", "ocsp_staple"])
def test_also_if_its_error_cannot_be_told(what: str) -> None:
    """What a callback raises into OpenSSL may come out of another session."""

    def fail(*_: object) -> Any:
        raise Wordless

    theirs = {"ocsp_staple": fail} if what == "ocsp_staple" else {}
    ours = {"ocsp_check": lambda *_: True} if theirs else {what: fail}
    a, b = Ours(client(**ours), "a.example"), Ours(server(**theirs))
    pump(a, b)
    error = (b if theirs else a).record.error
    assert "an unprintable Wordless" in str(error) and isinstance(error.__cause__, Wordless)


@both_versions
@pytest.mark.parametrize(
    "staple", [lambda _: 1 / 0, lambda _: "text", lambda _: b"junk"], ids=["raises", "text", "junk"]
)
def test_a_staple_that_cannot_be_made_ends_that_session(version: str, staple: Any) -> None:
    b = Ours(server(ocsp_staple=staple, **only(version)))
    _, error = pump(Ours(client(ocsp_check=lambda *_: True), "a.example"), b)
    assert isinstance(error, TLSError)
    assert "ocsp_staple" in str(error)
    assert isinstance(error.__cause__, (ZeroDivisionError, TypeError, ValueError))


def test_the_stdlib_s_client_gets_no_staple_and_no_error() -> None:
    meet(Stdlib(stdlib_client("TLSv1.3"), name="a.example"), Ours(server(ocsp_staple=lambda name: 1 / 0)))


# Key log.

LABELS = {"TLSv1.2": b"CLIENT_RANDOM ", "TLSv1.3": b"CLIENT_HANDSHAKE_TRAFFIC_SECRET "}


@both_versions
@pytest.mark.parametrize("make", [server, client])
def test_keylog_to_a_path(version: str, make: Callable[..., Context], tmp_path: Path) -> None:
    path = tmp_path / "key.log"
    randoms = []
    for _ in range(2):
        logging = make(keylog=path, **only(version))
        a, b = (
            (Ours(client(), "a.example"), Ours(logging))
            if logging.server_side
            else (Ours(logging, "a.example"), Ours(server()))
        )
        meet(a, b)
        randoms.append(a.connection.client_random() or b"")
    log = path.read_bytes()
    assert log.count(LABELS[version]) == 2
    assert log.endswith(b"\n")
    assert all(random.hex().encode() in log for random in randoms)
    assert all(randoms)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    make(keylog=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "it is its owner's to say who may read it"


def test_keylog_to_what_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "env.log"))
    meet(Ours(client(keylog=False), "a.example"), Ours(server(keylog=False)))
    assert not (tmp_path / "env.log").exists()
    meet(Ours(client(), "a.example"), Ours(server(keylog=False)))
    assert LABELS["TLSv1.3"] in (tmp_path / "env.log").read_bytes()
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "missing" / "env.log"))
    with pytest.raises(ConfigurationError, match=r"env\.log"):
        client()


def test_keylog_to_callables_and_files() -> None:
    lines: list[bytes] = []
    text, binary = io.StringIO(), io.BytesIO()
    for keylog in (lines.append, text, binary):
        meet(Ours(client(keylog=keylog), "a.example"), Ours(server()))
    assert any(line.startswith(LABELS["TLSv1.3"]) for line in lines)
    assert LABELS["TLSv1.3"].decode() in text.getvalue()
    assert binary.getvalue().count(b"\n") == len(lines)


def test_a_key_log_is_written_to_by_one_thread_at_a_time() -> None:
    inside: list[bytes] = []
    counts: list[int] = []

    def write(line: bytes) -> None:
        inside.append(line)
        both.wait(0.05)  # for another, who may not come
        counts.append(len(inside))
        inside.remove(line)

    both, log = threading.Event(), connection_module.keylog_writer(write)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(log, [b"one", b"two"]))
    assert counts == [1, 1]


def test_a_key_log_that_fails_ends_that_session() -> None:
    def fail(line: bytes) -> None:
        raise OSError("disk full")

    error, _ = pump(Ours(client(keylog=fail), "a.example"), Ours(server()))
    assert isinstance(error, TLSError)
    assert "disk full" in str(error)


# Renegotiation (TLS 1.2).


def renegotiated(a: Ours, b: Ours) -> bool:
    """Whether *b* could start a renegotiation, and *a* followed."""
    b.connection.renegotiate()
    for _ in range(6):
        for end, peer in ((b, a), (a, b)):
            with contextlib.suppress(SSL.WantReadError):
                end.connection.do_handshake()
            end.recv()
            data = end.take()
            if data:
                peer.feed(data)
    return not b.connection.renegotiate_pending() and b.connection.total_renegotiations() == 1


def test_a_server_may_renegotiate_if_told_so() -> None:
    a, b = Ours(client(**only("TLSv1.2")), "a.example"), Ours(server(renegotiation=True))
    meet(a, b)
    assert renegotiated(a, b)


def test_a_server_does_not_renegotiate_by_default() -> None:
    a, b = Ours(client(**only("TLSv1.2")), "a.example"), Ours(server())
    meet(a, b)
    with pytest.raises(SSL.Error, match="no renegotiation"):
        b.connection.renegotiate()


def test_a_client_may_decline_to_follow() -> None:
    a, b = Ours(client(renegotiation=False, **only("TLSv1.2")), "a.example"), Ours(server(renegotiation=True))
    meet(a, b)
    with pytest.raises(SSL.Error, match="no renegotiation"):
        renegotiated(a, b)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_client_never_starts_one(allowed: bool) -> None:
    a, b = Ours(client(**only("TLSv1.2")), "a.example"), Ours(server(renegotiation=allowed))
    meet(a, b)
    a.connection.renegotiate()
    with contextlib.suppress(SSL.WantReadError):
        a.connection.do_handshake()
    b.feed(a.take())
    with contextlib.suppress(SSL.Error):
        b.recv()
    a.feed(b.take())
    with pytest.raises(SSL.Error):
        a.connection.do_handshake()


# Connections, and whose errors they raise.


def test_a_want_is_never_another_connection_s_error() -> None:
    """pyOpenSSL parks what the first connection's callback raises, and the second would raise it."""

    def broken(*_: object) -> bool:
        raise LookupError("of the first connection")

    raw = SSL.Context(SSL.TLS_METHOD)
    raw.set_verify(SSL.VERIFY_NONE, broken)
    context = Context.adopt(raw, server_side=False)
    innocent = Ours(context, "a.example")
    with pytest.raises(SSL.WantReadError):
        innocent.connection.do_handshake()
    first = Ours(context, "a.example")
    meet(first, Ours(server()))
    with pytest.raises(SSL.WantReadError):
        innocent.connection.do_handshake()
    stock = SSL.Connection(raw)
    stock.set_connect_state()
    with pytest.raises(LookupError):  # still true of pyOpenSSL itself: else this test proves nothing
        stock.do_handshake()


def test_what_a_user_s_own_callback_raised_is_noted() -> None:
    raw = raw_client()
    raw.set_verify(SSL.VERIFY_PEER, lambda *_: 1 / 0)  # type: ignore[arg-type]
    a = Ours(Context.adopt(raw, server_side=False), "a.example")
    error, _ = pump(a, Ours(server()))
    assert isinstance(error, TLSError)
    assert isinstance(a.record.error, TLSError)
    assert isinstance(a.record.error.__cause__, ZeroDivisionError)


def test_many_sessions_at_once_never_get_each_other_s_errors() -> None:
    """One server context and one client context for good and bad sessions together, in many threads."""

    def check(response: bytes, certificate: x509.Certificate) -> bool:
        if response == INTERNAL_ERROR:
            raise LookupError("bad staple")
        return response == STAPLE

    staples = {"good.example": STAPLE, "raise.example": INTERNAL_ERROR, "refuse.example": NAMED_STAPLE}

    def staple(name: str | None) -> bytes:
        return staples[str(name)]

    names = ("good.example", "raise.example", "refuse.example", "unstapled.example", "b.example")
    inner = server_context(pem(leaf(*names, ca=OTHER_CA)))
    ca = CLIENT_CA.cert_pem.bytes()
    peer = server(*names, ocsp_staple=staple, client_ca=ca, sni={"b.example": inner})
    good, intruder = visitor(ocsp_check=check), visitor(OTHER_CA, ocsp_check=check)
    start = threading.Barrier(8)

    def outcome(name: str, context: Context) -> str:
        a, b = Ours(context, name), Ours(peer)
        ours, theirs = pump(a, b)
        ours, theirs = a.record.error or ours, b.record.error or theirs
        if ours is None and theirs is None:
            return "fine"
        return f"{ours} | {theirs}"

    def worker(number: int) -> list[tuple[str, str]]:
        start.wait(10)
        found = []
        for turn in range(40):
            name = names[(number + turn) % 5] if turn % 2 else "good.example"
            stranger = turn % 8 == 4
            found.append(
                (name + (" stranger" if stranger else ""), outcome(name, intruder if stranger else good))
            )
        return found

    with ThreadPoolExecutor(8) as pool:
        results = [pair for found in pool.map(worker, range(8)) for pair in found]
    words = {
        "good.example": "fine",
        "raise.example": "LookupError: bad staple",
        "refuse.example": "refused the stapled response (5 bytes)",
        "unstapled.example": "ocsp_staple failed with KeyError",
        "b.example": "unable to get local issuer certificate",
        "good.example stranger": "the client's certificate was refused",
    }
    assert {case for case, _ in results} == set(words)
    assert [(case, text) for case, text in results if words[case] not in text] == []
    assert len({text for case, text in results if case == "good.example"}) == 1


@pytest.fixture
def tcp() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    with a, b:
        yield a, b


def test_the_operating_system_s_error_number_survives(tcp: tuple[socket.socket, socket.socket]) -> None:
    near, far = tcp
    reset_on_close(far)
    connection = client().connection(near, "a.example", None)
    far.close()
    with pytest.raises(SSL.SysCallError) as caught:
        connection.do_handshake()
    assert caught.value.args[1] in ("ECONNRESET", "EPIPE")


def test_an_error_leaves_nothing_behind_for_the_next_connection_of_the_thread() -> None:
    bad = Ours(client(), "a.example")
    with pytest.raises(SSL.WantReadError):
        bad.handshake()
    bad.feed(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(SSL.Error):
        bad.handshake()
    meet(Ours(client(), "a.example"), Ours(server()))


def test_threads_that_read_one_after_another_share_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread per session is a thousand threads, and a buffer is as large as a record."""
    buffers: list[Any] = []
    monkeypatch.setattr(connection_module, "_scratches", buffers)

    def read() -> None:
        with pytest.raises(SSL.WantReadError):
            Ours(client(), "a.example").connection.recv(100)

    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(read).result(PATIENCE)
    assert len(buffers) == 1


def test_a_refusal_is_a_session_s_end() -> None:
    error, _ = pump(Ours(client(), "b.example"), Ours(server()))
    assert isinstance(error, SessionEnded)


def test_an_international_address_is_resolved_by_the_name_its_certificate_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python would ask for strasse.de, by IDNA 2003, and so for somebody else."""
    asked: list[object] = []

    def getaddrinfo(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Bridge(workers=1) as b, pytest.raises(OSError, match="cannot resolve 'straße"):
        b.connect(("straße.example", 443), client_context())
    assert asked == ["xn--strae-oqa.example"]
