"""`bridge.ssl.SSLContext`: every setting has the effect it has with the stdlib, seen by a peer of the stdlib."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dropin_rig import (
    CONTROL,
    THEIR_CONTEXT,
    context_class,
    injection,
    make_client_context,
    make_server_context,
)
from OpenSSL import SSL, crypto
from rig import PATIENCE

import bridge
from bridge.ssl import contexts

pytestmark = pytest.mark.usefixtures("default_bridge")

KINDS: dict[str, Any] = {"ours": context_class("ours"), "theirs": THEIR_CONTEXT}
"""In a dict, where `inject` does not replace them."""
needs_core = pytest.mark.skipif(CONTROL, reason="only our contexts have a core")
deprecated = pytest.mark.filterwarnings("ignore:ssl:DeprecationWarning")
each_side = pytest.mark.parametrize("side", ["client", "server"])

NOW = datetime.datetime.now(datetime.timezone.utc)


# ── two ends ──


@dataclasses.dataclass
class End:
    """What one side of a handshake and an exchange of bytes saw."""

    error: OSError | None = None
    version: str | None = None
    cipher: str = ""
    alpn: str | None = None
    peer: dict[str, Any] | None = None
    shared: list[str] = dataclasses.field(default_factory=list)
    reused: bool | None = None
    session: Any = None


def meet(
    client: Any, server: Any, hostname: str | None = "localhost", session: Any = None
) -> tuple[End, End]:
    """What client and server see when they shake hands and greet each other."""
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.settimeout(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(greet, server, far, server_side=True)
        calling = greet(client, near, server_hostname=hostname, session=session)
        return calling, serving.result()


def greet(context: Any, sock: socket.socket, **options: Any) -> End:
    end = End()
    try:
        with contextlib.closing(context.wrap_socket(sock, **options)) as wrapped:
            assert isinstance(wrapped, context.sslsocket_class)
            wrapped.sendall(b"greetings")
            if wrapped.recv(9) != b"greetings":
                raise ConnectionAbortedError("the peer left without a greeting")
            end.version, end.cipher = wrapped.version(), wrapped.cipher()[0]
            end.alpn, end.peer = wrapped.selected_alpn_protocol(), wrapped.getpeercert()
            end.shared = [cipher[0] for cipher in wrapped.shared_ciphers() or ()]
            end.reused, end.session = wrapped.session_reused, wrapped.session
    except OSError as error:
        end.error = error
    finally:
        sock.close()
    return end


def agreed(
    client: Any, server: Any, hostname: str | None = "localhost", session: Any = None
) -> tuple[End, End]:
    """`meet`, and nobody refuses."""
    ends = meet(client, server, hostname, session)
    assert [end.error for end in ends] == [None, None]
    return ends


def refused(client: Any, server: Any, hostname: str | None = "localhost") -> tuple[str | None, str | None]:
    """`meet`, and both see an error of TLS: the reasons, the client's first."""
    ends = meet(client, server, hostname)
    assert all(isinstance(end.error, OSError) for end in ends), ends
    reasons = [getattr(end.error, "reason", None) for end in ends]
    return reasons[0], reasons[1]


def blank(kind: str, side: str) -> Any:
    return KINDS[kind](ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)


def careless(kind: str = "ours") -> Any:
    """A client's context that verifies nobody."""
    context = blank(kind, "client")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.fixture
def pair(side: str, server_cert: KeyPair, ca_file: str) -> dict[str, Any]:
    """A client's and a server's context, and as "ours" the one of *side*, of our class; the other is the stdlib's."""
    client = make_client_context("ours" if side == "client" else "theirs", ca_file)
    server = make_server_context("ours" if side == "server" else "theirs", server_cert)
    return {"client": client, "server": server, "ours": client if side == "client" else server}


@pytest.fixture
def their_client(ca_file: str) -> Any:
    return make_client_context("theirs", ca_file)


@pytest.fixture
def their_server(server_cert: KeyPair) -> Any:
    return make_server_context("theirs", server_cert)


@pytest.fixture
def our_client(ca_file: str) -> Any:
    return make_client_context("ours", ca_file)


@pytest.fixture
def our_server(server_cert: KeyPair) -> Any:
    return make_server_context("ours", server_cert)


# ── certificates that trustme does not issue ──


def issue(
    ca: trustme.CA,
    subject: str = "localhost",
    *extensions: x509.ExtensionType,
    key: Any = None,
) -> tuple[x509.Certificate, Any]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    authority = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    builder = x509.CertificateBuilder(
        authority.subject, name, key.public_key(), 77, NOW - DAY, NOW + DAY, list[Any]()
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signing_key(ca), hashes.SHA256()), key


DAY = datetime.timedelta(days=1)


def signing_key(ca: trustme.CA) -> Any:
    return serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)


def write(directory: Path, certificate: x509.Certificate, key: Any, secret: bytes | None = None) -> KeyPair:
    protection = serialization.BestAvailableEncryption(secret) if secret else serialization.NoEncryption()
    pair = KeyPair(str(directory / "made-cert.pem"), str(directory / "made-key.pem"))
    Path(pair.certfile).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    Path(pair.keyfile).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    )
    return pair


def revocations(ca: trustme.CA, *serials: int) -> bytes:
    """The CRL of *ca*, as PEM."""
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes()).subject
    builder = x509.CertificateRevocationListBuilder(issuer, NOW - DAY, NOW + DAY)
    for serial in serials:
        builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, NOW - DAY).build())
    return builder.sign(signing_key(ca), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


# ── keys and certificates ──


@pytest.mark.parametrize("how", ["str", "bytes", "bytearray", "callable"])
def test_an_encrypted_key_is_opened_with_the_password_and_a_callable_is_asked_once(
    how: str, ca: trustme.CA, their_client: Any, tmp_path: Path
) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    pair = write(tmp_path, *issue(ca, "localhost", names), secret=b"open sesame")
    asked = []

    def ask() -> str:
        asked.append(how)
        return "open sesame"

    passwords: dict[str, Any] = {
        "str": "open sesame",
        "bytes": b"open sesame",
        "bytearray": bytearray(b"open sesame"),
        "callable": ask,
    }
    server = blank("ours", "server")
    server.load_cert_chain(pair.certfile, pair.keyfile, passwords[how])
    agreed(their_client, server)
    assert asked == ["callable"] * (how == "callable")


def test_files_are_read_when_they_are_loaded_and_may_go_then(
    ca: trustme.CA, their_client: Any, tmp_path: Path
) -> None:
    combined = tmp_path / "both.pem"
    combined.write_bytes(ca.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    server = blank("ours", "server")
    server.load_cert_chain(combined)
    combined.unlink()
    agreed(their_client, server)


@each_side
def test_the_intermediate_certificates_are_sent(
    side: str, pair: dict[str, Any], ca: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    identity = write_key_pair(ca.create_child_ca().issue_cert("localhost"), tmp_path)
    pair["ours"].load_cert_chain(identity.certfile, identity.keyfile)
    pair["server"].verify_mode = ssl.CERT_OPTIONAL
    pair["server"].load_verify_locations(ca_file)
    client, server = agreed(pair["client"], pair["server"])
    shown = server.peer if side == "client" else client.peer
    assert shown is not None
    assert shown["issuer"] != shown["subject"]
    own = ssl._ssl._test_decode_cert(identity.certfile)  # type: ignore[attr-defined]
    assert shown == own


def test_one_identity_for_each_kind_of_key_is_kept(
    ca: trustme.CA, their_client: Any, our_server: Any, tmp_path: Path
) -> None:
    rsa = write_key_pair(ca.issue_cert("localhost", key_type=trustme.KeyType.RSA), tmp_path)
    our_server.load_cert_chain(rsa.certfile, rsa.keyfile)
    their_client.maximum_version = ssl.TLSVersion.TLSv1_2
    for kind in ("ECDSA", "RSA"):
        their_client.set_ciphers(f"ECDHE-{kind}-AES128-GCM-SHA256")
        assert agreed(their_client, our_server)[0].cipher == f"ECDHE-{kind}-AES128-GCM-SHA256"


@pytest.mark.parametrize("secret", [None, "secret"])
def test_a_certificate_for_rsa_pss_only(
    secret: str | None, openssl: str, their_client: Any, tmp_path: Path
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = f"genpkey -algorithm rsa-pss -pkeyopt rsa_keygen_bits:2048 -out {key}"
    protect = () if secret is None else ("-aes256", "-pass", f"pass:{secret}")
    subprocess.run([openssl, *make.split(), *protect], check=True, capture_output=True)
    sign = f"req -x509 -subj /CN=pss -addext subjectAltName=DNS:localhost -key {key} -out {certificate}"
    subprocess.run([openssl, *sign.split(), "-passin", "pass:secret"], check=True, capture_output=True)
    server = KINDS["ours"](ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key, secret)
    their_client.load_verify_locations(certificate)
    client, _ = agreed(their_client, server)
    assert client.peer is not None and client.peer["subject"] == ((("commonName", "pss"),),)


def test_another_identity_replaces_the_one_before_for_later_connections(
    ca: trustme.CA, their_client: Any, our_server: Any, tmp_path: Path
) -> None:
    agreed(their_client, our_server)
    new = write_key_pair(ca.issue_cert("renewed.example"), tmp_path)
    our_server.load_cert_chain(new.certfile, new.keyfile)
    client, _ = agreed(their_client, our_server, "renewed.example")
    assert client.peer is not None
    assert client.peer["subjectAltName"] == (("DNS", "renewed.example"),)


# ── whom to trust ──


def hashed(directory: Path, pem: bytes) -> Path:
    """A directory with the certificate under the name that OpenSSL looks for (openssl-rehash(1))."""
    name = crypto.load_certificate(crypto.FILETYPE_PEM, pem).subject_name_hash()
    directory.mkdir()
    (directory / f"{name:08x}.0").write_bytes(pem)
    return directory


@pytest.mark.parametrize("source", ["cafile", "capath", "PEM", "DER", "nothing"])
def test_trust_comes_from_every_source(
    source: str, ca: trustme.CA, ca_file: str, their_server: Any, odd_path: Path
) -> None:
    other, client = trustme.CA().cert_pem.bytes(), blank("ours", "client")
    pems = other.decode() + "in between\n" + ca.cert_pem.bytes().decode()
    sources: dict[str, dict[str, Any]] = {
        "cafile": {"cafile": shutil.copy(ca_file, odd_path)},
        "capath": {"capath": hashed(odd_path / "ca", ca.cert_pem.bytes())},
        "PEM": {"cadata": pems},
        "DER": {
            "cadata": ssl.PEM_cert_to_DER_cert(other.decode())
            + ssl.PEM_cert_to_DER_cert(ca.cert_pem.bytes().decode())
        },
        "nothing": {"cadata": other.decode()},
    }
    client.load_verify_locations(**sources[source])
    if source == "nothing":
        assert refused(client, their_server)[0] == "CERTIFICATE_VERIFY_FAILED"
    else:
        agreed(client, their_server)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", None])
def test_default_trust_is_where_the_environment_says(
    variable: str | None,
    ca: trustme.CA,
    ca_file: str,
    their_server: Any,
    odd_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, empty = hashed(odd_path / "ca", ca.cert_pem.bytes()), odd_path / "empty"
    places = {"SSL_CERT_FILE": shutil.copy(ca_file, odd_path), "SSL_CERT_DIR": f"{empty}:{directory}"}
    for name in places:
        monkeypatch.setenv(name, places[name] if name == variable else str(empty))
    client = blank("ours", "client")
    client.load_default_certs()
    if variable is None:
        assert refused(client, their_server)[0] == "CERTIFICATE_VERIFY_FAILED"
    else:
        agreed(client, their_server)


def test_what_is_trusted_later_is_trusted_by_a_context_in_use(ca_file: str, their_server: Any) -> None:
    client = blank("ours", "client")
    refused(client, their_server)
    client.load_verify_locations(ca_file)
    agreed(client, their_server)


def test_what_is_commented_out_of_a_file_is_not_there(
    ca: trustme.CA, server_cert: KeyPair, tmp_path: Path
) -> None:
    def comment(pem: str) -> str:
        return "".join(f"# {line}\n" for line in pem.splitlines())

    key, certificate = Path(server_cert.keyfile).read_text(), Path(server_cert.certfile).read_text()
    root, another = ca.cert_pem.bytes().decode(), trustme.CA()
    old = another.issue_cert("localhost").private_key_and_cert_chain_pem.bytes().decode()
    (tmp_path / "all.pem").write_text(comment(old) + certificate + comment(root) + key)
    contexts = []
    for side in ("theirs", "ours"):
        server, client = blank(side, "server"), blank(side, "client")
        server.load_cert_chain(tmp_path / "all.pem")
        client.load_verify_locations(cadata=comment(another.cert_pem.bytes().decode()) + root)
        contexts.append((client, server))
    (their_client, their_server), (our_client, our_server) = contexts
    agreed(our_client, their_server)
    agreed(their_client, our_server)


# ── verification ──


@pytest.mark.parametrize(("revoked", "flag"), [(True, True), (False, True), (None, True), (True, False)])
def test_revocation_lists_are_heeded_when_the_flag_says_so(
    revoked: bool | None, flag: bool, ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    pair = write(tmp_path, *issue(ca, "localhost", names))
    server = make_server_context("theirs", pair)
    if revoked is not None:
        path = tmp_path / "crl.pem"
        path.write_bytes(revocations(ca, 77 if revoked else 78))
        our_client.load_verify_locations(path)
    if flag:
        our_client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if flag and revoked is not False:
        client, _ = meet(our_client, server)
        assert isinstance(client.error, ssl.SSLCertVerificationError)
        assert client.error.verify_code == (23 if revoked else 3)
    else:
        agreed(our_client, server)


@pytest.mark.parametrize("partial", [True, False])
def test_partial_chain_makes_an_intermediate_an_anchor(partial: bool, ca: trustme.CA, tmp_path: Path) -> None:
    intermediate = ca.create_child_ca()
    server = make_server_context("theirs", write_key_pair(intermediate.issue_cert("localhost"), tmp_path))
    client = blank("ours", "client")
    client.load_verify_locations(cadata=intermediate.cert_pem.bytes().decode())
    flag = getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0x80000)
    client.verify_flags = client.verify_flags | flag if partial else client.verify_flags & ~flag
    if partial:
        agreed(client, server)
    else:
        refused(client, server)


@pytest.mark.parametrize("strict", [True, False])
def test_strict_refuses_what_lacks_a_key_identifier(
    strict: bool, ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    server = make_server_context("theirs", write(tmp_path, *issue(ca, "localhost", names)))
    if strict:
        our_client.verify_flags |= ssl.VERIFY_X509_STRICT
        assert refused(our_client, server)[0] == "CERTIFICATE_VERIFY_FAILED"
    else:
        our_client.verify_flags &= ~ssl.VERIFY_X509_STRICT
        agreed(our_client, server)


@pytest.mark.parametrize("mode", [ssl.CERT_NONE, ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED])
@pytest.mark.parametrize("shown", ["trusted", "untrusted", "none"])
def test_verify_mode_of_a_server(
    mode: ssl.VerifyMode,
    shown: str,
    our_server: Any,
    their_client: Any,
    client_cert: KeyPair,
    ca_file: str,
    tmp_path: Path,
    tls_version: str,
) -> None:
    their_client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    if shown == "trusted":
        their_client.load_cert_chain(client_cert.certfile, client_cert.keyfile)
    elif shown == "untrusted":
        stranger = write_key_pair(trustme.CA().issue_cert("mallory@example.org"), tmp_path)
        their_client.load_cert_chain(stranger.certfile, stranger.keyfile)
    our_server.load_verify_locations(ca_file)
    our_server.verify_mode = mode
    if mode == ssl.CERT_NONE:
        assert agreed(their_client, our_server)[1].peer in (None, {})
    elif shown == "trusted":
        peer = agreed(their_client, our_server)[1].peer
        assert peer is not None
        assert peer["subjectAltName"] == (("email", "alice@example.org"),)
    elif shown == "none" and mode == ssl.CERT_OPTIONAL:
        assert agreed(their_client, our_server)[1].peer is None
    else:
        reasons = {"untrusted": "CERTIFICATE_VERIFY_FAILED", "none": "PEER_DID_NOT_RETURN_A_CERTIFICATE"}
        assert refused(their_client, our_server)[1] == reasons[shown]


def test_verify_mode_none_of_a_client_accepts_anybody(tmp_path: Path) -> None:
    stranger = write_key_pair(trustme.CA().issue_cert("localhost"), tmp_path)
    assert agreed(careless(), make_server_context("theirs", stranger))[0].peer == {}


@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.1", "::1", "LOCALHOST"])
def test_names_and_addresses_in_the_certificate_are_accepted(
    hostname: str, our_client: Any, their_server: Any
) -> None:
    agreed(our_client, their_server, hostname)


@pytest.mark.parametrize(("hostname", "code"), [("elsewhere.example", 62), ("127.0.0.2", 64)])
def test_another_name_is_refused_unless_names_are_not_checked(
    hostname: str, code: int, our_client: Any, their_server: Any
) -> None:
    client, _ = meet(our_client, their_server, hostname)
    assert isinstance(client.error, ssl.SSLCertVerificationError)
    assert client.error.verify_code == code
    our_client.check_hostname = False
    agreed(our_client, their_server, hostname)


@pytest.mark.parametrize(
    ("common_name", "alternative", "accepted"),
    [
        ("localhost", None, True),
        ("LocalHost", None, True),
        ("*.example.org", None, True),
        ("elsewhere.example", None, False),
        ("not a name", None, False),
        ("localhost", x509.DNSName("other.example"), False),
        ("localhost", x509.RFC822Name("a@example.org"), True),
    ],
)
def test_the_common_name_counts_where_no_dns_name_is_given_unless_told_otherwise(
    common_name: str, alternative: Any, accepted: bool, ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    extensions = [x509.SubjectAlternativeName([alternative])] if alternative else []
    server = make_server_context("theirs", write(tmp_path, *issue(ca, common_name, *extensions)))
    hostname = common_name.replace("*", "www") if "*" in common_name else "localhost"
    assert our_client.hostname_checks_common_name
    client, _ = meet(our_client, server, hostname)
    assert (client.error is None) is accepted
    our_client.hostname_checks_common_name = False
    assert isinstance(meet(our_client, server, hostname)[0].error, ssl.SSLCertVerificationError)


LOCALHOST, LOOPBACK = b"\x82\x09localhost", b"\x87\x04\x7f\0\0\1"


def alternatives(der: bytes) -> x509.UnrecognizedExtension:
    """A subjectAltName that `cryptography` would not make, of less than 128 bytes."""
    return x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, bytes((0x30, len(der))) + der)


@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("odd", [b"\x82\x09127.0.0.1", b"\x82\x07*.local", b"\x86\x07nocolon"])
def test_an_odd_name_takes_nothing_from_the_names_beside_it(
    odd: bytes, hostname: str, ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    pair = write(tmp_path, *issue(ca, "elsewhere.example", alternatives(odd + LOCALHOST + LOOPBACK)))
    agreed(our_client, make_server_context("theirs", pair), hostname)


@needs_core
def test_a_certificate_with_a_kind_of_name_that_cannot_be_read_is_refused(
    ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    edi_party = b"\xa5\x07\xa1\x05\x0c\x03abc"
    server = make_server_context(
        "theirs", write(tmp_path, *issue(ca, "x", alternatives(edi_party + LOCALHOST)))
    )
    client, _ = meet(our_client, server)
    assert type(client.error) is ssl.SSLCertVerificationError
    assert "EDIPartyName" in client.error.verify_message
    our_client.check_hostname = False
    agreed(our_client, server)


@needs_core
def test_the_common_name_of_a_certificate_that_cannot_be_read_does_not_count(
    ca: trustme.CA, our_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: object) -> None:
        raise ValueError("cut off")

    server = make_server_context("theirs", write(tmp_path, *issue(ca, "localhost")))
    agreed(our_client, server)
    monkeypatch.setattr(contexts, "certificate_dict", unreadable)
    assert isinstance(meet(our_client, server)[0].error, ssl.SSLCertVerificationError)


@needs_core
def test_an_address_is_never_found_in_the_common_name(
    ca: trustme.CA, our_client: Any, tmp_path: Path
) -> None:
    server = make_server_context("theirs", write(tmp_path, *issue(ca, "127.0.0.1")))
    assert refused(our_client, server, "127.0.0.1")[0] == "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize("willing", [True, False])
def test_a_client_shows_its_certificate_after_the_handshake_if_it_is_willing(
    willing: bool, our_client: Any, their_server: Any, client_cert: KeyPair, ca_file: str
) -> None:
    our_client.load_cert_chain(client_cert.certfile, client_cert.keyfile)
    our_client.post_handshake_auth = willing
    their_server.load_verify_locations(ca_file)
    their_server.verify_mode = ssl.CERT_REQUIRED
    their_server.post_handshake_auth = True
    near, far = socket.socketpair()
    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)

    def serve() -> Any:
        with their_server.wrap_socket(far, server_side=True) as sock:
            sock.recv(1)
            assert sock.getpeercert() is None
            try:
                sock.verify_client_post_handshake()
                sock.sendall(b"go")
            except ssl.SSLError as error:
                sock.sendall(b"no")
                return error.reason
            finally:
                sock.recv(1)
            return sock.getpeercert()["subjectAltName"]

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        with our_client.wrap_socket(near, server_hostname="localhost") as sock:
            sock.sendall(b"1")
            assert sock.recv(2) == (b"go" if willing else b"no")
            sock.sendall(b"2")
            assert serving.result() == (
                (("email", "alice@example.org"),) if willing else "EXTENSION_NOT_RECEIVED"
            )


# ── what is negotiated ──


@each_side
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_highest_and_the_lowest_version_hold(side: str, version: str, pair: dict[str, Any]) -> None:
    only = ssl.TLSVersion[version]
    pair["ours"].minimum_version = pair["ours"].maximum_version = only
    client, server = agreed(pair["client"], pair["server"])
    assert client.version == server.version == version.replace("_", ".")
    theirs = pair["server"] if side == "client" else pair["client"]
    if version == "TLSv1_3":
        theirs.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        theirs.minimum_version = ssl.TLSVersion.TLSv1_3
    refused(pair["client"], pair["server"])


@each_side
def test_the_extreme_versions_are_no_limits(side: str, pair: dict[str, Any]) -> None:
    pair["ours"].maximum_version = ssl.TLSVersion.TLSv1_2
    pair["ours"].minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    pair["ours"].maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.3"


@each_side
@deprecated
def test_old_versions_are_spoken_if_they_are_asked_for(side: str, pair: dict[str, Any]) -> None:
    for context in (pair["client"], pair["server"]):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    pair["ours"].maximum_version = ssl.TLSVersion.TLSv1_1
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.1"
    pair["ours"].options |= ssl.OP_NO_TLSv1_1
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1"


@each_side
@deprecated
def test_the_options_that_forbid_versions_hold(side: str, pair: dict[str, Any]) -> None:
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.3"
    pair["ours"].options |= ssl.OP_NO_TLSv1_3
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.2"
    pair["ours"].options &= ~ssl.OP_NO_TLSv1_3
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.3"


@deprecated
@each_side
@pytest.mark.parametrize(
    ("protocol", "version"), [("PROTOCOL_TLSv1_2", "TLSv1.2"), ("PROTOCOL_TLS", "TLSv1.3")]
)
def test_the_protocols_of_old_serve_both_sides(
    side: str, protocol: str, version: str, server_cert: KeyPair, pair: dict[str, Any]
) -> None:
    ours = KINDS["ours"](getattr(ssl, protocol))
    if side == "server":
        ours.load_cert_chain(server_cert.certfile, server_cert.keyfile)
    pair[side] = ours
    client, _ = agreed(pair["client"], pair["server"])
    assert client.version == version


@each_side
def test_ciphers_hold_and_so_does_their_order(side: str, pair: dict[str, Any]) -> None:
    pair["ours"].maximum_version = ssl.TLSVersion.TLSv1_2
    if side == "client":
        pair["server"].options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    ciphers = ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"]
    for wanted in (ciphers, ciphers[::-1], ciphers[1:]):
        pair["ours"].set_ciphers(":".join(wanted))
        assert agreed(pair["client"], pair["server"])[0].cipher == wanted[0]


@each_side
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("spelling", ["nonsense", "", "TLS_AES_128_GCM_SHA256"])
def test_ciphers_that_are_refused_leave_those_of_tls_13(
    spelling: str, used: bool, side: str, pair: dict[str, Any]
) -> None:
    if used:
        agreed(pair["client"], pair["server"])
    for context in pair[side], blank("theirs", side):
        with pytest.raises(ssl.SSLError, match="No cipher can be selected"):
            context.set_ciphers(spelling)
        assert {cipher["protocol"] for cipher in context.get_ciphers()} == {"TLSv1.3"}
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.3"
    pair["ours"].maximum_version = ssl.TLSVersion.TLSv1_2
    refused(pair["client"], pair["server"])
    pair["ours"].set_ciphers("ECDHE+AESGCM")
    assert agreed(pair["client"], pair["server"])[0].version == "TLSv1.2"


def test_a_client_offers_the_ciphers_of_the_stdlib(
    our_client: Any, their_client: Any, their_server: Any
) -> None:
    for spelling in (None, "DEFAULT", "ECDHE+AESGCM:ECDHE+CHACHA20"):
        if spelling is not None:
            our_client.set_ciphers(spelling)
            their_client.set_ciphers(spelling)
        offered = agreed(our_client, their_server)[1].shared
        assert len(offered) > 3
        assert offered == agreed(their_client, their_server)[1].shared


@each_side
def test_the_servers_order_of_protocols_decides(side: str, pair: dict[str, Any]) -> None:
    pair["client"].set_alpn_protocols(["h2", "http/1.1", "acme"])
    pair["server"].set_alpn_protocols(iter(["http/1.1", "h2"]))
    client, server = agreed(pair["client"], pair["server"])
    assert (client.alpn, server.alpn) == ("http/1.1", "http/1.1")


@each_side
@pytest.mark.parametrize("protocols", [["other"], []])
def test_no_common_protocol_is_no_reason_to_refuse(
    side: str, protocols: list[str], pair: dict[str, Any]
) -> None:
    pair["client"].set_alpn_protocols(["h2"])
    pair["server"].set_alpn_protocols(["h2"])
    pair["ours"].set_alpn_protocols(protocols)
    client, server = agreed(pair["client"], pair["server"])
    assert (client.alpn, server.alpn) == (None, None)


@each_side
def test_the_curve_is_the_only_one(side: str, pair: dict[str, Any]) -> None:
    pair["ours"].set_ecdh_curve("secp384r1")
    theirs = pair["server"] if side == "client" else pair["client"]
    theirs.set_ecdh_curve("secp384r1")
    agreed(pair["client"], pair["server"])
    theirs.set_ecdh_curve("prime256v1")
    refused(pair["client"], pair["server"])


FFDHE2048 = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group of RFC 7919, A.1."""


def test_the_parameters_for_diffie_hellman_are_used(ca: trustme.CA, tmp_path: Path) -> None:
    identity = write_key_pair(ca.issue_cert("localhost", key_type=trustme.KeyType.RSA), tmp_path)
    path = tmp_path / "dh.pem"
    path.write_text(FFDHE2048)
    server, client = make_server_context("ours", identity), careless("theirs")
    for context in (server, client):
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("DHE-RSA-AES128-GCM-SHA256")
    refused(client, server)
    server.load_dh_params(path)
    path.unlink()
    assert agreed(client, server)[0].cipher == "DHE-RSA-AES128-GCM-SHA256"


@each_side
def test_the_secrets_are_logged(side: str, pair: dict[str, Any], tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in ("client", "server")}
    for name, path in logs.items():
        pair[name].keylog_filename = str(path)
    agreed(pair["client"], pair["server"])
    pair["client"].keylog_filename = pair["server"].keylog_filename = None  # which the stdlib keeps open
    client, server = (
        {line for line in path.read_text().splitlines() if not line.startswith("#")} for path in logs.values()
    )
    assert {line.split()[0] for line in client} >= {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"}
    assert client == server


# ── resumption ──


@pytest.mark.parametrize("how", ["default", "OP_NO_TICKET", "num_tickets"])
def test_a_server_resumes_sessions_unless_told_otherwise(
    how: str, our_server: Any, their_client: Any, tls_version: str
) -> None:
    their_client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    if how == "OP_NO_TICKET":
        our_server.options |= ssl.OP_NO_TICKET
    elif how == "num_tickets":
        our_server.num_tickets = 0
        their_client.minimum_version = ssl.TLSVersion.TLSv1_3
        their_client.maximum_version = ssl.TLSVersion.TLSv1_3
    if CONTROL and how == "OP_NO_TICKET":
        pytest.skip("the stdlib's cache resumes without tickets")
    first, _ = agreed(their_client, our_server)
    second, _ = agreed(their_client, our_server, session=first.session)
    assert second.reused is (how == "default")


# ── SNI ──


@dataclasses.dataclass
class Heard:
    """What went to `sys.unraisablehook`."""

    types: list[Any] = dataclasses.field(default_factory=list)


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    monkeypatch.setattr(sys, "unraisablehook", lambda args: heard.types.append(args.exc_type))
    return heard


@pytest.mark.parametrize("hostname", ["localhost", None])
def test_the_sni_callback_is_given_socket_name_and_context(
    hostname: str | None, our_server: Any, tls_version: str
) -> None:
    seen: list[Any] = []
    our_server.sni_callback = lambda *arguments: seen.append((threading.get_ident(), *arguments))
    client = careless("theirs")
    client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    agreed(client, our_server, hostname)
    [(_, sock, name, context)] = seen
    assert isinstance(sock, our_server.sslsocket_class)
    assert name == hostname
    assert context is our_server
    our_server.sni_callback = None
    agreed(client, our_server, hostname)
    assert len(seen) == 1


@pytest.mark.parametrize("retry", [True, False])
def test_the_sni_callback_can_switch_to_another_context(
    retry: bool, ca: trustme.CA, our_server: Any, their_client: Any, tmp_path: Path, tls_version: str
) -> None:
    other = make_server_context("ours", write_key_pair(ca.issue_cert("other.example"), tmp_path))
    other.set_alpn_protocols(["other"])
    our_server.set_alpn_protocols(["default"])
    their_client.set_alpn_protocols(["default", "other"])
    their_client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    if retry:  # by HelloRetryRequest: the client's first guess at a key share is of no use
        for context in (our_server, other):
            context.set_ecdh_curve("secp521r1")
    chosen: list[Any] = []

    def choose(sock: Any, name: str | None, context: Any) -> None:
        if name == "other.example":
            sock.context = other
            chosen.append(sock)

    our_server.sni_callback = choose
    client, _ = agreed(their_client, our_server, "other.example")
    assert client.peer is not None
    assert client.peer["subjectAltName"] == (("DNS", "other.example"),)
    assert client.alpn == "other"
    assert all(sock.context is other for sock in chosen)
    client, _ = agreed(their_client, our_server, "localhost")
    assert client.alpn == "default"


def test_a_socket_keeps_the_settings_it_was_wrapped_with(
    ca: trustme.CA, our_server: Any, their_client: Any, tmp_path: Path
) -> None:
    near, far = socket.socketpair()
    with our_server.wrap_socket(far, server_side=True, do_handshake_on_connect=False) as wrapped:
        other = write_key_pair(ca.issue_cert("other.example"), tmp_path)
        our_server.load_cert_chain(other.certfile, other.keyfile)
        wrapped.settimeout(PATIENCE)
        near.settimeout(PATIENCE)
        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(wrapped.do_handshake)
            with their_client.wrap_socket(near, server_hostname="localhost") as client:
                served.result()
                assert ("DNS", "localhost") in client.getpeercert()["subjectAltName"]


@pytest.mark.skipif(CONTROL, reason="the stdlib goes on with the first context's mode")
def test_the_context_switched_to_decides_about_client_certificates(
    our_server: Any, their_client: Any, server_cert: KeyPair, ca_file: str, tls_version: str
) -> None:
    their_client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    strict = make_server_context("ours", server_cert)
    strict.load_verify_locations(ca_file)
    strict.verify_mode = ssl.CERT_REQUIRED

    def choose(sock: Any, name: str | None, context: Any) -> None:
        if name == "localhost":
            sock.context = strict

    our_server.sni_callback = choose
    their_client.check_hostname = False
    first, _ = agreed(their_client, our_server, "public.example")
    assert refused(their_client, our_server)[1] == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    ends = meet(their_client, our_server, session=first.session)  # a ticket must not open the door either
    assert all(end.error for end in ends)


def raise_error(sock: Any, name: str | None, context: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("callback", "alert", "reported"),
    [
        (lambda *_: ssl.ALERT_DESCRIPTION_ACCESS_DENIED, "ACCESS_DENIED", []),
        (lambda *_: int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME), "UNRECOGNIZED_NAME", []),
        (lambda *_: "nonsense", "INTERNAL_ERROR", [TypeError]),
        (raise_error, "HANDSHAKE_FAILURE", [ZeroDivisionError]),
    ],
)
def test_the_sni_callback_can_refuse_with_an_alert(
    callback: Callable[..., Any],
    alert: str,
    reported: list[Any],
    our_server: Any,
    their_client: Any,
    unraisable: Heard,
) -> None:
    our_server.sni_callback = callback
    reason, server = refused(their_client, our_server)
    assert reason is not None
    assert reason.endswith(alert)
    assert server == "CALLBACK_FAILED"
    assert unraisable.types == reported


def test_a_server_name_that_is_no_ascii_is_refused(our_server: Any, unraisable: Heard) -> None:
    our_server.sni_callback = raise_error
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)
    with ThreadPoolExecutor(1) as pool, near:
        serving = pool.submit(greet, our_server, far, server_side=True)
        client = SSL.Connection(SSL.Context(SSL.TLS_METHOD), near)
        client.set_tlsext_host_name(b"\xff.example")
        client.set_connect_state()
        with pytest.raises(SSL.Error, match="internal error"):
            client.do_handshake()
        assert isinstance(serving.result().error, ssl.SSLError)
    assert unraisable.types == [UnicodeDecodeError]


def test_a_servername_callback_is_an_sni_callback(our_server: Any, their_client: Any) -> None:
    names = []
    our_server.set_servername_callback(lambda sock, name, context: names.append(name))
    agreed(their_client, our_server)
    assert names == ["localhost"]


# ── still a context of the stdlib ──


SETTINGS: dict[str, Any] = {
    "options": ssl.OP_ALL | ssl.OP_NO_TICKET,
    "verify_flags": ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_TRUSTED_FIRST,
    "verify_mode": ssl.CERT_OPTIONAL,
    "minimum_version": ssl.TLSVersion.TLSv1_3,
    "maximum_version": ssl.TLSVersion.TLSv1_2,
    "check_hostname": True,
    "hostname_checks_common_name": False,
    "post_handshake_auth": True,
    "num_tickets": 1,
    "sni_callback": print,
    "_msg_callback": print,
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_can_be_read_back_and_is_of_the_same_type(name: str, kind: str, injected: bool) -> None:
    reference = blank("theirs", "server")
    setattr(reference, name, SETTINGS[name])
    with injection() if injected else contextlib.nullcontext():
        context = blank(kind, "server")
        setattr(context, name, SETTINGS[name])
        found = getattr(context, name)
    assert found == getattr(reference, name)
    assert type(found) is type(getattr(reference, name))


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_survives_that_the_class_stands_in_the_stdlibs_place(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssl, "SSLContext", KINDS["ours"])
    context = blank("ours", "server")
    setattr(context, name, SETTINGS[name])
    assert getattr(context, name) == SETTINGS[name]


BAD_CALLS: dict[str, Callable[[Any], Any]] = {
    "no certificate": lambda context: context.load_cert_chain("/nowhere.pem"),
    "no key in it": lambda context: context.load_cert_chain(__file__),
    "no path": lambda context: context.load_cert_chain(5),
    "a password of no kind": lambda context: context.load_cert_chain(__file__, password=5),
    "no CA file": lambda context: context.load_verify_locations("/nowhere.pem"),
    "no CA at all": lambda context: context.load_verify_locations(),
    "no PEM": lambda context: context.load_verify_locations(cadata="broken"),
    "no DER": lambda context: context.load_verify_locations(cadata=b"broken"),
    "no ASCII": lambda context: context.load_verify_locations(cadata="ü"),
    "no purpose": lambda context: context.load_default_certs(5),
    "no cipher": lambda context: context.set_ciphers("nonsense"),
    "no curve": lambda context: context.set_ecdh_curve("nonsense"),
    "an empty protocol": lambda context: context.set_alpn_protocols([""]),
    "a long protocol": lambda context: context.set_alpn_protocols(["a" * 256]),
    "NPN": lambda context: context.set_npn_protocols(["a"]),
    "no DH file": lambda context: context.load_dh_params("/nowhere.pem"),
    "no callback": lambda context: setattr(context, "sni_callback", 5),
    "no verification, but names": lambda context: setattr(context, "verify_mode", ssl.CERT_NONE),
    "a mode of no kind": lambda context: setattr(context, "verify_mode", 7),
    "no version": lambda context: setattr(context, "minimum_version", 7),
    "options of no kind": lambda context: setattr(context, "options", "all"),
    "no key log": lambda context: setattr(context, "keylog_filename", "/nowhere/log"),
    "few tickets": lambda context: setattr(context, "num_tickets", 2),
    "pickle": pickle.dumps,
    "copy": copy.copy,
}


@deprecated
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_mistakes_raise_what_the_stdlib_raises(call: Callable[[Any], Any]) -> None:
    raised = []
    for kind in KINDS:
        with pytest.raises(Exception) as caught:
            call(blank(kind, "client"))
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@each_side
def test_the_wrong_side_is_refused_as_the_stdlib_refuses_it(side: str) -> None:
    texts = []
    for kind in KINDS:
        context = blank(kind, side)
        context.check_hostname = False
        for sock in socket.socketpair():
            with sock, pytest.raises(ssl.SSLError) as caught:
                context.wrap_socket(sock, server_side=side == "client")
            texts.append(str(caught.value.args[1]).partition(" (_ssl.c")[0])
    assert len(set(texts)) == 1


def test_deprecations_point_at_the_line_that_asks_for_them() -> None:
    with pytest.warns(DeprecationWarning, match=r"ssl\.") as warnings:
        context = KINDS["ours"](ssl.PROTOCOL_TLSv1_2)
        context.options |= ssl.OP_NO_TLSv1_1
    assert {warning.filename for warning in warnings} == {__file__}


def test_a_subclass_may_take_more_arguments_and_keep_what_it_likes() -> None:
    class Mine(KINDS["ours"]):  # type: ignore[misc]
        def __init__(self, protocol: int, colour: str, *, shape: str) -> None:
            self.colour, self.shape = colour, shape

    mine = Mine(ssl.PROTOCOL_TLS_CLIENT, "red", shape="round")
    mine.taste = "sweet"
    assert (mine.colour, mine.shape, mine.taste) == ("red", "round", "sweet")
    assert isinstance(mine, ssl.SSLContext)
    assert mine.protocol is ssl.PROTOCOL_TLS_CLIENT


def test_tls_over_memory_stays_the_stdlibs(our_client: Any, our_server: Any) -> None:
    our_server.set_alpn_protocols(["memory"])
    our_client.set_alpn_protocols(["memory"])
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = our_client.wrap_bio(down, up, server_hostname="localhost")
    server = our_server.wrap_bio(up, down, server_side=True)
    for end in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert type(client) is ssl.SSLObject
    assert client.selected_alpn_protocol() == server.selected_alpn_protocol() == "memory"


def test_a_server_that_asks_after_the_handshake_does_not_ask_in_it(
    our_server: Any, their_client: Any
) -> None:
    our_server.verify_mode = ssl.CERT_REQUIRED
    their_client.minimum_version = ssl.TLSVersion.TLSv1_3
    refused(their_client, our_server)
    our_server.post_handshake_auth = True
    agreed(their_client, our_server)


@needs_core
@pytest.mark.parametrize("name", ["set_psk_client_callback", "set_psk_server_callback"])
def test_a_shared_key_is_refused_and_not_forgotten(name: str, our_client: Any) -> None:
    with pytest.raises(NotImplementedError):
        getattr(our_client, name)(lambda *_: (None, b"key"))


def test_what_the_stdlib_knows_about_its_trust_can_be_asked(our_client: Any) -> None:
    assert our_client.cert_store_stats() == {"x509": 1, "crl": 0, "x509_ca": 1}
    assert len(our_client.get_ca_certs()) == 1
    assert our_client.get_ciphers()


# ── the core ──


CHANGES: dict[str, Callable[[Any], Any]] = {
    **{
        name: lambda context, name=name: setattr(context, name, SETTINGS[name])
        for name in SETTINGS
        if name not in ("_msg_callback", "num_tickets", "check_hostname")
    },
    "num_tickets": lambda context: setattr(context, "num_tickets", 0),
    "set_alpn_protocols": lambda context: context.set_alpn_protocols(["h2"]),
    "set_ciphers": lambda context: context.set_ciphers("ECDHE+AESGCM"),
    "security_level": lambda context: context.set_ciphers("DEFAULT:@SECLEVEL=1"),
    "set_ecdh_curve": lambda context: context.set_ecdh_curve("prime256v1"),
}


@needs_core
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_core_is_made_anew_when_a_setting_changes_and_only_then(
    change: Callable[[Any], Any], our_server: Any
) -> None:
    before = our_server.core(True)
    assert our_server.core(True) is before
    change(our_server)
    after = our_server.core(True)
    assert after is not before
    change(our_server)
    assert our_server.core(True) is after


@needs_core
def test_each_side_has_its_own_core() -> None:
    with pytest.warns(DeprecationWarning, match="PROTOCOL_TLS"):
        context = KINDS["ours"](ssl.PROTOCOL_TLS)
    client, server = context.core(False), context.core(True)
    assert (client.server_side, server.server_side) == (False, True)
    assert (context.core(False), context.core(True)) == (client, server)


@needs_core
def test_a_core_checks_names_and_follows_renegotiation_as_its_context_says() -> None:
    context = blank("ours", "client")
    assert context.core(False).check_hostname
    assert context.core(False).renegotiation
    context.check_hostname = False
    context.options |= ssl.OP_NO_RENEGOTIATION
    assert not context.core(False).check_hostname
    assert not context.core(False).renegotiation


@needs_core
def test_a_core_gives_back_the_buffers_of_idle_sessions() -> None:
    assert blank("ours", "server").core(True).raw.set_mode(0) & SSL.MODE_RELEASE_BUFFERS


@needs_core
def test_a_core_remembers_no_sessions_by_itself(our_client: Any) -> None:
    connection = our_client.core(False).connection(None, "localhost", "a key to remember it by")
    assert not connection.get_app_data().to_be_remembered


@needs_core
def test_a_core_is_a_context_for_any_bridge(our_client: Any, their_server: Any) -> None:
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)
    with ThreadPoolExecutor(1) as pool, bridge.Bridge(workers=1) as ours:
        serving = pool.submit(greet, their_server, far, server_side=True)
        session = ours.adopt(near, our_client.core(False), server_hostname="localhost", timeout=PATIENCE)
        session.send(b"greetings")
        assert session.recv(PATIENCE) == b"greetings"
        assert serving.result().error is None
        session.close(PATIENCE)


@needs_core
def test_a_core_that_would_ask_whose_connection_it_is_refuses_those_of_nobody(
    our_server: Any, their_client: Any
) -> None:
    our_server.sni_callback = lambda *_: None
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)
    with ThreadPoolExecutor(1) as pool, bridge.Bridge(workers=1) as ours:
        calling = pool.submit(greet, their_client, far, server_hostname="localhost")
        session = ours.adopt(near, our_server.core(True), wait=False)
        error = calling.result().error
        session.close()
        assert isinstance(error, ssl.SSLError) and error.reason == "TLSV1_ALERT_INTERNAL_ERROR"


@needs_core
@each_side
def test_a_core_has_another_way_to_set_a_curve(
    side: str, pair: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(contexts._lib, "SSL_CTX_set1_curves_list", raising=False)
    pair["ours"].set_ecdh_curve("prime256v1")
    agreed(pair["client"], pair["server"])


@needs_core
def test_what_openssl_says_is_raised_as_the_stdlib_raises_it() -> None:
    with pytest.raises(SSL.Error):
        contexts._check(0)
    with pytest.raises(ssl.SSLError, match="this does not work: that is why"):
        with contexts._errors_of_ssl("this does not work"):
            raise ValueError("that is why")


@needs_core
def test_the_end_that_was_not_said_is_never_ignored(our_client: Any, their_server: Any) -> None:
    our_client.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    near, far = socket.socketpair()
    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)

    def serve() -> None:
        with their_server.wrap_socket(far, server_side=True) as sock:
            sock.sendall(b"only half")
            sock.recv(1)

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        with our_client.wrap_socket(near, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
            assert sock.recv(9) == b"only half"
            sock.sendall(b"1")
            serving.result()
            with pytest.raises(ssl.SSLEOFError):
                sock.recv(1)


@needs_core
def test_threads_that_ask_while_settings_change_all_get_a_core_that_fits(our_client: Any) -> None:
    protocols = [("a",), ("b",), ("c",)]
    barrier = threading.Barrier(4)

    def ask() -> set[tuple[str, ...]]:
        barrier.wait(PATIENCE)
        return {our_client.core(False).alpn for _ in range(200)}

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        barrier.wait(PATIENCE)
        for round in range(60):
            our_client.set_alpn_protocols(protocols[round % 3])
        seen = set().union(*(future.result() for future in asking))
    assert seen <= {(), *protocols}
    assert our_client.core(False).alpn == ("c",)


def test_a_client_of_another_thread_gets_the_one_core(our_client: Any, their_server: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(
            end.error is None
            for client, server in pool.map(lambda _: meet(our_client, their_server), range(4))
            for end in (client, server)
        )
