"""{our client, our server} x {TLS 1.2, TLS 1.3} x {the stdlib's ssl, openssl(1), curl}: they understand each other.

Also in the ways a session ends, for better or worse: each side must be able to tell them apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from peers import (
    PATIENCE,
    Background,
    Program,
    dial,
    high,
    listening_to_events,
    receive_exactly,
    reset,
    stdlib_context,
)

import bridge
from bridge import codecs

SMALL = b"a few bytes"
LARGE = random.Random(4).randbytes(3_000_000)


@pytest.fixture
def ours() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=2) as made:
        yield made


@pytest.fixture
def server_pair(server_cert: KeyPair) -> dict[str, Any]:
    return {"certfile": server_cert.certfile, "keyfile": server_cert.keyfile}


@pytest.fixture
def client_pair(client_cert: KeyPair) -> dict[str, Any]:
    return {"certfile": client_cert.certfile, "keyfile": client_cert.keyfile}


@pytest.fixture
def stranger(tmp_path: Path) -> dict[str, Any]:
    """A certificate of an authority that nobody trusts."""
    pair = write_key_pair(trustme.CA().issue_cert("localhost", "mallory@example.org"), tmp_path)
    return {"certfile": pair.certfile, "keyfile": pair.keyfile}


class Pair:
    """One session of ours and one stdlib socket, connected to each other, in either role."""

    def __init__(self, session: bridge.Session, peer: ssl.SSLSocket) -> None:
        self.session = session
        self.peer = peer


Connect = Callable[..., Pair]


@pytest.fixture(params=["our-client", "our-server"])
def connect(
    request: pytest.FixtureRequest,
    tls_version: str,
    ours: bridge.Bridge,
    background: Background,
    ca_file: str,
    server_pair: dict[str, Any],
) -> Iterator[Connect]:
    """Makes a `Pair`, with us as the client or as the server; the stdlib's side is used by the test itself."""
    with contextlib.ExitStack() as stack:

        def our_client(client: dict[str, Any], server: dict[str, Any], codec: Any = codecs.Raw) -> Pair:
            context = stdlib_context(True, tls_version, **server_pair, **server)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            accepted = background.run(lambda: wrap(listener.accept()[0], context))
            session = ours.connect(
                listener.getsockname(),
                bridge.client_context(ca_file, **client),
                server_hostname="localhost",
                codec=codec,
            )
            return Pair(session, stack.enter_context(accepted.result(PATIENCE)))

        def our_server(client: dict[str, Any], server: dict[str, Any], codec: Any = codecs.Raw) -> Pair:
            context = stdlib_context(False, tls_version, cafile=ca_file, **client)
            if "cafile" in server:
                server["client_ca"] = server.pop("cafile")
            listener = ours.listen(
                ("127.0.0.1", 0), bridge.server_context(**server_pair, **server), codec=codec
            )
            stack.enter_context(listener)
            peer = stack.enter_context(
                context.wrap_socket(dial(listener.address), server_hostname="localhost")
            )
            return Pair(listener.accept(PATIENCE), peer)

        make = our_client if request.param == "our-client" else our_server

        def made(
            client: dict[str, Any] | None = None, server: dict[str, Any] | None = None, **more: Any
        ) -> Pair:
            pair = make(client or {}, server or {}, **more)
            stack.callback(pair.session.abort)
            assert pair.session.info.version == pair.peer.version() == tls_version
            return pair

        yield made


def wrap(sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    sock.settimeout(PATIENCE)
    return context.wrap_socket(sock, server_side=True)


def take(session: bridge.Session, size: int) -> bytes:
    """The next *size* bytes of a session with the codec Raw."""
    received = bytearray()
    while len(received) < size:
        received += session.recv(PATIENCE)
    assert len(received) == size
    return bytes(received)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


# ── the stdlib's ssl: data ──


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_data_to_the_stdlib_and_back(connect: Connect, background: Background, data: bytes) -> None:
    pair = connect()

    def echo() -> None:
        left = len(data)
        while left:
            part = pair.peer.recv(1 << 16)
            pair.peer.sendall(part)
            left -= len(part)

    echoing = background.run(echo)
    sending = background.run(pair.session.send, data, PATIENCE)
    assert digest(take(pair.session, len(data))) == digest(data)
    sending.result(PATIENCE)
    echoing.result(PATIENCE)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_data_from_the_stdlib_and_back(connect: Connect, background: Background, data: bytes) -> None:
    pair = connect()

    def echo() -> None:
        for message in pair.session:
            pair.session.send(message, PATIENCE)

    echoing = background.run(echo)
    returned = bytearray()
    for start in range(0, len(data), 1 << 16):
        part = data[start : start + (1 << 16)]
        pair.peer.sendall(part)
        returned += receive_exactly(pair.peer, len(part))
    assert digest(returned) == digest(data)
    pair.session.close(0.1)
    with contextlib.suppress(bridge.SessionClosed):
        echoing.result(PATIENCE)


def test_alpn_with_the_stdlib(connect: Connect) -> None:
    pair = connect(client={"alpn": ("spdy/3", "h2")}, server={"alpn": ("h2", "http/1.1")})
    assert pair.session.info.alpn == pair.peer.selected_alpn_protocol() == "h2"


def test_no_alpn_in_common_with_the_stdlib(connect: Connect) -> None:
    pair = connect(client={"alpn": ("spdy/3",)}, server={"alpn": ("h2",)})
    assert pair.session.info.alpn is None
    assert pair.peer.selected_alpn_protocol() is None


def test_sni_of_our_client_reaches_the_stdlib(
    tls_version: str, ours: bridge.Bridge, background: Background, ca_file: str, server_pair: dict[str, Any]
) -> None:
    names: list[str | None] = []
    context = stdlib_context(True, tls_version, **server_pair)
    context.sni_callback = lambda sock, name, _: names.append(name)
    address, results = background.serve_tls(context, lambda sock: sock.recv(1), times=2)
    for name in ("localhost", "127.0.0.1"):  # an address is no host name: RFC 6066, 3
        ours.connect(address, bridge.client_context(ca_file), server_hostname=name).close()
    assert [result.result(PATIENCE) for result in results] == [b"", b""]
    assert names == ["localhost", None]


def test_sni_of_the_stdlib_chooses_our_certificate(
    tls_version: str, ours: bridge.Bridge, ca: trustme.CA, ca_file: str, server_pair: dict[str, Any]
) -> None:
    other = bridge.server_context(ca.issue_cert("other.example").private_key_and_cert_chain_pem.bytes())
    context = bridge.server_context(**server_pair, sni={"other.example": other})
    with ours.listen(("127.0.0.1", 0), context) as listener:
        for name in ("localhost", "other.example"):  # the stdlib checks that the certificate is for that name
            client = stdlib_context(False, tls_version, cafile=ca_file)
            with client.wrap_socket(dial(listener.address), server_hostname=name):
                session = listener.accept(PATIENCE)
                assert session.info.server_name == name
                session.close(0)


def test_mutual_tls_with_the_stdlib(
    connect: Connect, ca_file: str, client_pair: dict[str, Any], client_cert: KeyPair
) -> None:
    pair = connect(client=client_pair, server={"cafile": ca_file})
    shown = pair.session.info.peer_certificate
    assert shown is not None
    names = shown.subject.rfc4514_string() + str(list(shown.extensions))
    theirs = pair.peer.getpeercert()
    assert theirs is not None
    assert pair.session.info.verified_chain
    assert ("alice@example.org" in names) != ("alice@example.org" in str(theirs))
    assert ("localhost" in names) != ("localhost" in str(theirs))


def test_our_client_resumes_a_session_of_the_stdlib(
    tls_version: str, ours: bridge.Bridge, background: Background, ca_file: str, server_pair: dict[str, Any]
) -> None:
    def answer(sock: ssl.SSLSocket) -> bool | None:
        sock.sendall(SMALL)
        assert sock.recv(1) == b""
        return sock.session_reused

    context, client = stdlib_context(True, tls_version, **server_pair), bridge.client_context(ca_file)
    address, results = background.serve_tls(context, answer, times=2)
    resumed = []
    for _ in range(2):
        with ours.connect(address, client, server_hostname="localhost") as session:
            resumed.append(session.info.resumed)
            assert take(session, len(SMALL)) == SMALL
    assert resumed == [result.result(PATIENCE) for result in results] == [False, True]


def test_the_stdlib_resumes_a_session_of_our_server(
    tls_version: str, ours: bridge.Bridge, ca_file: str, server_pair: dict[str, Any]
) -> None:
    context, previous, resumed = stdlib_context(False, tls_version, cafile=ca_file), None, []
    with ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener:
        for _ in range(2):
            client = context.wrap_socket(
                dial(listener.address), server_hostname="localhost", session=previous
            )
            with client, listener.accept(PATIENCE) as session:
                session.send(SMALL)
                session.send_eof()
                assert receive_exactly(client, 100) == SMALL
                previous = client.session
                resumed.append((session.info.resumed, client.session_reused))
                client.unwrap().close()
    assert resumed == [(False, False), (True, True)]


# ── the stdlib's ssl: ends ──


def test_our_close_is_a_clean_end_for_the_stdlib(connect: Connect, background: Background) -> None:
    pair = connect()
    pair.peer.suppress_ragged_eofs = False  # type: ignore[attr-defined]
    pair.session.send(SMALL)
    closing = background.run(pair.session.close)
    assert receive_exactly(pair.peer, 100) == SMALL  # a ragged end would raise SSLEOFError
    pair.peer.unwrap().close()
    report = closing.result(PATIENCE)
    assert report and report.close_notify_received


def test_the_stdlib_s_close_is_a_clean_end_for_us(connect: Connect, background: Background) -> None:
    pair = connect()
    pair.peer.sendall(SMALL)
    unwrapping = background.run(pair.peer.unwrap)
    assert b"".join(pair.session) == SMALL
    assert isinstance(pair.session.end, bridge.EndOfStream)
    assert pair.session.close()
    unwrapping.result(PATIENCE).close()


def test_half_close_lets_the_stdlib_go_on(connect: Connect, background: Background) -> None:
    pair = connect()
    pair.session.send(SMALL)
    pair.session.send_eof()
    assert receive_exactly(pair.peer, 100) == SMALL

    def go_on() -> None:
        pair.peer.sendall(LARGE)
        pair.peer.unwrap().close()

    sending = background.run(go_on)
    assert digest(b"".join(pair.session)) == digest(LARGE)
    sending.result(PATIENCE)


def test_a_connection_cut_off_is_truncated(connect: Connect) -> None:
    pair = connect()
    pair.peer.sendall(SMALL)
    raw = socket.socket(fileno=pair.peer.detach())
    raw.shutdown(socket.SHUT_WR)
    assert take(pair.session, len(SMALL)) == SMALL
    with pytest.raises(bridge.Truncated, match="without close_notify") as caught:
        pair.session.recv(PATIENCE)
    assert isinstance(caught.value, ssl.SSLEOFError)
    raw.close()


def test_a_reset_connection_is_no_clean_end(connect: Connect) -> None:
    pair = connect()
    raw = socket.socket(fileno=pair.peer.detach())
    reset(raw)
    with pytest.raises((bridge.PeerReset, bridge.Truncated)):
        pair.session.recv(PATIENCE)


def test_our_abort_is_no_clean_end_for_the_stdlib(connect: Connect) -> None:
    pair = connect()
    pair.session.send(SMALL)
    pair.session.flush()
    pair.session.abort()
    pair.peer.suppress_ragged_eofs = False  # type: ignore[attr-defined]
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        receive_exactly(pair.peer, 100)


def test_what_we_sent_arrives_although_we_never_read(connect: Connect) -> None:
    """DESIGN fact 14: a close with unread input (tickets, a late request) must not make the kernel send RST."""
    pair = connect()
    pair.peer.sendall(SMALL)
    pair.session.send(LARGE, PATIENCE)

    def drain() -> str:
        return digest(receive_exactly(pair.peer, len(LARGE) + 1))

    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(Background())
        closing = threads.run(pair.session.close)
        assert threads.run(drain).result(PATIENCE) == digest(LARGE)
        pair.peer.unwrap().close()
        assert closing.result(PATIENCE)


# ── the stdlib's ssl: refusals, told to both sides ──


def refused_by_us(
    ours: bridge.Bridge, background: Background, context: ssl.SSLContext, client: bridge.Context, name: str
) -> tuple[Any, Any]:
    """What our client, and what the stdlib's server, say about a server that our client refuses."""
    address, [served] = background.serve_tls(context, lambda sock: sock.recv(1))
    with pytest.raises(bridge.SessionEnded) as caught:
        ours.connect(address, client, server_hostname=name)
    return caught.value, served.exception(PATIENCE)


def test_a_server_of_an_unknown_ca(
    tls_version: str, ours: bridge.Bridge, background: Background, ca_file: str, stranger: dict[str, Any]
) -> None:
    context = stdlib_context(True, tls_version, **stranger)
    ours_says, theirs = refused_by_us(ours, background, context, bridge.client_context(ca_file), "localhost")
    assert isinstance(ours_says, bridge.CertificateError)
    assert "unable to get local issuer certificate" in str(ours_says)
    assert "unknown ca" in str(theirs)


def test_a_server_of_another_name(
    tls_version: str,
    ours: bridge.Bridge,
    background: Background,
    ca_file: str,
    server_pair: dict[str, Any],
    client_cert: KeyPair,
) -> None:
    """It is told so in the middle of the handshake, before it is shown our certificate."""
    context = stdlib_context(True, tls_version, **server_pair)
    context.load_verify_locations(ca_file)
    context.verify_mode = ssl.CERT_OPTIONAL
    mine = bridge.client_context(ca_file, certfile=client_cert.certfile, keyfile=client_cert.keyfile)
    ours_says, theirs = refused_by_us(ours, background, context, mine, "example.org")
    assert isinstance(ours_says, bridge.HostnameMismatch)
    assert "example.org" in str(ours_says) and "localhost" in str(ours_says)
    assert isinstance(theirs, ssl.SSLError) and "bad certificate" in str(theirs)


def test_the_stdlib_refuses_our_server(
    tls_version: str, ours: bridge.Bridge, ca_file: str, stranger: dict[str, Any]
) -> None:
    context = stdlib_context(False, tls_version, cafile=ca_file)
    with (
        listening_to_events() as events,
        ours.listen(("127.0.0.1", 0), bridge.server_context(**stranger)) as listener,
        dial(listener.address) as sock,
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(sock, server_hostname="localhost")
        line = events.wait_for("handshake.failed")
    assert "TLSError" in line and "unknown ca" in line


@pytest.mark.parametrize("shown", ["none", "stranger"])
def test_our_server_s_refusal_reaches_a_client_that_talks(
    shown: str,
    tls_version: str,
    ours: bridge.Bridge,
    ca_file: str,
    server_pair: dict[str, Any],
    stranger: dict[str, Any],
) -> None:
    """A TLS 1.3 client has sent its request before it learns: only a lingering close saves the alert from a RST."""
    context = stdlib_context(False, tls_version, cafile=ca_file, **(stranger if shown == "stranger" else {}))
    server = bridge.server_context(**server_pair, client_ca=ca_file)
    with (
        listening_to_events() as events,
        ours.listen(("127.0.0.1", 0), server) as listener,
        dial(listener.address) as sock,
    ):
        with pytest.raises(ssl.SSLError) as caught:
            talk(context, sock)
        line = events.wait_for("handshake.failed")
    alert = {"stranger": "unknown ca"}.get(
        shown, "certificate required" if tls_version == "TLSv1.3" else "handshake failure"
    )
    assert alert in str(caught.value)
    reason = {"none": "peer did not return a certificate"}.get(
        shown, "unable to get local issuer certificate"
    )
    assert reason in line


def talk(context: ssl.SSLContext, sock: socket.socket) -> None:
    with context.wrap_socket(sock, server_hostname="localhost") as wrapped:
        wrapped.sendall(LARGE[:1_000_000])
        wrapped.recv(1)


@pytest.mark.parametrize("shown", ["none", "stranger"])
def test_the_stdlib_s_refusal_reaches_our_client(
    shown: str,
    tls_version: str,
    ours: bridge.Bridge,
    background: Background,
    ca_file: str,
    server_pair: dict[str, Any],
    stranger: dict[str, Any],
) -> None:
    context = stdlib_context(True, tls_version, cafile=ca_file, **server_pair)
    client = bridge.client_context(ca_file, **(stranger if shown == "stranger" else {}))
    address, [served] = background.serve_tls(context, lambda sock: None)
    with pytest.raises(
        bridge.TLSError
    ) as caught:  # in TLS 1.3 the client is done before the server has looked
        ours.connect(address, client, server_hostname="localhost").recv(PATIENCE)
    alert = {"stranger": "unknown ca"}.get(
        shown, "certificate required" if tls_version == "TLSv1.3" else "handshake failure"
    )
    assert alert in str(caught.value)
    assert isinstance(served.exception(PATIENCE), ssl.SSLError)


# ── in and out of TLS ──


@pytest.mark.parametrize("first", ["ours", "stdlib"])
def test_unwrap_and_starttls_again(
    first: str,
    connect: Connect,
    request: pytest.FixtureRequest,
    ours: bridge.Bridge,
    background: Background,
    tls_version: str,
    ca_file: str,
    server_pair: dict[str, Any],
) -> None:
    """TLS, plain text, TLS, on one TCP connection, whoever of the two ends TLS first."""
    pair = connect()
    pair.peer.sendall(b"from stdlib")
    assert take(pair.session, 11) == b"from stdlib"
    if first == "ours":
        unwrapping = background.run(pair.session.unwrap)
        assert pair.peer.recv(1) == b""
        theirs = pair.peer.unwrap()
        sock, more = unwrapping.result(PATIENCE)
    else:
        other = background.run(pair.peer.unwrap)
        assert list(pair.session) == []
        sock, more = pair.session.unwrap(PATIENCE)
        theirs = other.result(PATIENCE)
    with theirs:
        sock.sendall(b"plain?")
        assert receive_exactly(theirs, 6) == b"plain?"
        theirs.sendall(b"plain!")
        assert more + receive_exactly(sock, 6 - len(more)) == b"plain!"
        again(request, ours, background, tls_version, ca_file, server_pair, sock, theirs)


def again(
    request: pytest.FixtureRequest,
    ours: bridge.Bridge,
    background: Background,
    version: str,
    ca_file: str,
    server_pair: dict[str, Any],
    sock: socket.socket,
    theirs: socket.socket,
) -> None:
    """TLS over *sock* (ours) and *theirs*, the roles the other way round."""
    we_are_client = "our-server" in request.node.name
    if we_are_client:
        peer_context = stdlib_context(True, version, **server_pair)
        wrapping = background.run(lambda: peer_context.wrap_socket(theirs, server_side=True))
        session = ours.adopt(sock, bridge.client_context(ca_file), server_hostname="localhost")
    else:
        peer_context = stdlib_context(False, version, cafile=ca_file)
        wrapping = background.run(lambda: peer_context.wrap_socket(theirs, server_hostname="localhost"))
        session = ours.adopt(sock, bridge.server_context(**server_pair))
    assert sock.fileno() == -1
    with wrapping.result(PATIENCE) as peer, session:
        session.send(SMALL)
        assert receive_exactly(peer, len(SMALL)) == SMALL
        session.send_eof()
        assert peer.recv(1) == b""
        peer.unwrap().close()


def test_adopt_after_a_dialogue_in_plain_text(
    tls_version: str, ours: bridge.Bridge, background: Background, ca_file: str, server_pair: dict[str, Any]
) -> None:
    """STARTTLS as SMTP does it, our client with a server of the stdlib's."""
    context = stdlib_context(True, tls_version, **server_pair)

    def serve(sock: socket.socket) -> bytes:
        sock.sendall(b"220 ready\r\n")
        assert receive_exactly(sock, 10) == b"STARTTLS\r\n"
        sock.sendall(b"220 go ahead\r\n")
        with context.wrap_socket(sock, server_side=True) as wrapped:
            wrapped.sendall(b"250 welcome\r\n")
            return receive_exactly(wrapped, 100)

    address, [served] = background.serve(serve)
    sock = dial(address)
    assert receive_exactly(sock, 11) == b"220 ready\r\n"
    sock.sendall(b"STARTTLS\r\n")
    assert receive_exactly(sock, 14) == b"220 go ahead\r\n"
    client = bridge.client_context(ca_file)
    with ours.adopt(sock, client, server_hostname="localhost", codec=codecs.Lines) as session:
        assert session.recv(PATIENCE) == "250 welcome"
        session.send("QUIT")
    assert served.result(PATIENCE) == b"QUIT\n"


# ── no TLS at all ──


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (b"GET /index.html HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"EHLO client.example\r\n", "SMTP"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07 who knows", "something else"),
    ],
    ids=["http", "ssh", "smtp", "garbage"],
)
def test_a_client_that_speaks_no_tls(
    said: bytes, named: str, ours: bridge.Bridge, server_pair: dict[str, Any]
) -> None:
    with (
        listening_to_events() as events,
        ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener,
        dial(listener.address) as sock,
    ):
        sock.sendall(said)
        while sock.recv(100):  # an alert perhaps, and then the end: the client does not hang
            pass
        line = events.wait_for("handshake.failed")
    assert "NotTLS" in line and named in line
    assert re.escape(repr(said[:5])[2:-1]) in re.escape(line.replace("\\\\", "\\"))


@pytest.mark.parametrize(
    ("banner", "named"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"220 mail.example ESMTP\r\n", "SMTP"),
        (b"HTTP/1.1 400 Bad\r\n", "HTTP"),
    ],
    ids=["ssh", "smtp", "http"],
)
def test_a_server_that_speaks_no_tls(
    banner: bytes, named: str, ours: bridge.Bridge, background: Background, ca_file: str
) -> None:
    """Whenever its banner comes: before our ClientHello, while that leaves, or after it."""
    context, times = bridge.client_context(ca_file), 60
    late = iter([False, True] * (times // 2))

    def greet(sock: socket.socket) -> None:
        if next(late):
            sock.recv(1 << 16)
        sock.sendall(banner)

    address, served = background.serve(greet, times)
    for result in served:
        with pytest.raises(bridge.NotTLS) as caught:
            ours.connect(address, context, server_hostname="localhost")
        assert named in str(caught.value)
        assert repr(banner[:24]) in str(caught.value)
        result.result(PATIENCE)


# ── openssl(1) ──


def flag(version: str) -> str:
    return "-" + version.lower().replace("v", "").replace(".", "_")


@pytest.fixture
def s_server(openssl: str, tls_version: str, server_pair: dict[str, Any]) -> Callable[..., Program]:
    """Starts `openssl s_server`, for one connection."""
    own = ("-cert", server_pair["certfile"], "-key", server_pair["keyfile"])
    where = ("-accept", "127.0.0.1:0")

    def start(*more: str, times: int = 1) -> Program:
        return Program(openssl, "s_server", *where, "-naccept", str(times), flag(tls_version), *own, *more)

    return start


@pytest.fixture
def s_client(openssl: str, tls_version: str, ca_file: str) -> Callable[..., Program]:
    """Starts `openssl s_client`, which verifies us."""
    trust = ("-CAfile", ca_file, "-verify_return_error", "-verify_hostname", "localhost")

    def start(port: int, *more: str) -> Program:
        where = ("-connect", f"127.0.0.1:{port}", "-servername", "localhost")
        return Program(openssl, "s_client", *where, flag(tls_version), *trust, *more)

    return start


def type_into(program: Program, data: bytes) -> None:
    for start in range(0, len(data), 1 << 13):
        program.put(data[start : start + (1 << 13)])


def exchange(session: bridge.Session, peer: Program, data: bytes, background: Background) -> None:
    """*data* both ways, at once."""
    typing = background.run(type_into, peer, data)
    sending = background.run(session.send, data, PATIENCE)
    assert digest(take(session, len(data))) == digest(data)
    assert digest(peer.take(len(data))) == digest(data)
    typing.result(PATIENCE)
    sending.result(PATIENCE)


@pytest.mark.parametrize("data", [high(SMALL), high(LARGE)], ids=["small", "large"])
def test_data_with_s_server(
    data: bytes,
    s_server: Callable[..., Program],
    ours: bridge.Bridge,
    background: Background,
    ca_file: str,
) -> None:
    with s_server() as peer:
        address = ("127.0.0.1", peer.port())
        with ours.connect(address, bridge.client_context(ca_file), server_hostname="localhost") as session:
            exchange(session, peer, data, background)
            assert session.close()
        assert "CONNECTION CLOSED" in peer.finish()


@pytest.mark.parametrize("data", [high(SMALL), high(LARGE)], ids=["small", "large"])
def test_data_with_s_client(
    data: bytes,
    s_client: Callable[..., Program],
    ours: bridge.Bridge,
    background: Background,
    server_pair: dict[str, Any],
) -> None:
    with (
        ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener,
        s_client(listener.address[1]) as peer,
        listener.accept(PATIENCE) as session,
    ):
        exchange(session, peer, data, background)


def test_alpn_with_s_server(s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str) -> None:
    with s_server("-alpn", "h2,http/1.1") as peer:
        client = bridge.client_context(ca_file, alpn=("spdy/3", "http/1.1"))
        with ours.connect(("127.0.0.1", peer.port()), client, server_hostname="localhost") as session:
            assert session.info.alpn == "http/1.1"
        assert "ALPN protocols selected: http/1.1" in peer.finish()


def test_sni_with_s_server(
    s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str, server_pair: dict[str, Any]
) -> None:
    other = ("-cert2", server_pair["certfile"], "-key2", server_pair["keyfile"])
    with s_server("-servername", "localhost", "-servername_fatal", *other) as peer:
        client = bridge.client_context(ca_file)
        ours.connect(("127.0.0.1", peer.port()), client, server_hostname="localhost").close()
        assert 'Hostname in TLS extension: "localhost"' in peer.finish()


def test_alpn_sni_and_mutual_tls_with_s_client(
    s_client: Callable[..., Program],
    ours: bridge.Bridge,
    ca_file: str,
    server_pair: dict[str, Any],
    client_pair: dict[str, Any],
) -> None:
    context = bridge.server_context(**server_pair, client_ca=ca_file, alpn=("h2", "http/1.1"))
    own = ("-cert", client_pair["certfile"], "-key", client_pair["keyfile"])
    with (
        ours.listen(("127.0.0.1", 0), context) as listener,
        s_client(listener.address[1], "-alpn", "http/1.1,h2", *own) as peer,
    ):
        with listener.accept(PATIENCE) as session:
            assert session.info.alpn == "h2"
            assert session.info.server_name == "localhost"
            assert session.info.peer_certificate is not None
            assert len(session.info.verified_chain) == 2
        said = peer.finish()
    assert "ALPN protocol: h2" in said
    assert "Verify return code: 0 (ok)" in said or "Verification: OK" in said


def test_mutual_tls_with_s_server(
    s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str, client_pair: dict[str, Any]
) -> None:
    with s_server("-Verify", "1", "-verify_return_error", "-CAfile", ca_file) as peer:
        client = bridge.client_context(ca_file, **client_pair)
        with ours.connect(("127.0.0.1", peer.port()), client, server_hostname="localhost") as session:
            peer.put(high(SMALL))
            assert take(session, len(SMALL)) == high(SMALL)
        said = peer.finish()
    assert "Client certificate" in said


def test_s_server_s_refusal_reaches_our_client(
    s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str, stranger: dict[str, Any]
) -> None:
    with s_server("-Verify", "1", "-verify_return_error", "-CAfile", ca_file) as peer:
        client = bridge.client_context(ca_file, **stranger)
        with pytest.raises(bridge.TLSError, match="unknown ca"):
            ours.connect(("127.0.0.1", peer.port()), client, server_hostname="localhost").recv(PATIENCE)
        peer.wait_for("certificate verify failed")


def test_s_client_refuses_our_server_and_both_say_why(
    s_client: Callable[..., Program], ours: bridge.Bridge, stranger: dict[str, Any]
) -> None:
    with (
        listening_to_events() as events,
        ours.listen(("127.0.0.1", 0), bridge.server_context(**stranger)) as listener,
        s_client(listener.address[1]) as peer,
    ):
        assert "unknown ca" in events.wait_for("handshake.failed")
        assert "unable to get local issuer certificate" in peer.finish()
        assert peer.status == 1


def test_our_client_resumes_a_session_of_s_server(
    s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str
) -> None:
    client, resumed = bridge.client_context(ca_file), []
    with s_server(times=2) as peer:
        address = ("127.0.0.1", peer.port())
        for _ in range(2):
            with ours.connect(address, client, server_hostname="localhost") as session:
                resumed.append(session.info.resumed)
                peer.put(high(SMALL))
                assert take(session, len(SMALL)) == high(SMALL)
        said = peer.finish()
    assert resumed == [False, True]
    assert "Reused session-id" in said


def test_s_client_resumes_a_session_of_our_server(
    s_client: Callable[..., Program], ours: bridge.Bridge, server_pair: dict[str, Any], tmp_path: Path
) -> None:
    saved, seen = str(tmp_path / "session.pem"), []
    with ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener:
        for more in (("-sess_out", saved), ("-sess_in", saved)):
            with s_client(listener.address[1], *more) as peer:
                with listener.accept(PATIENCE) as session:
                    session.send(high(SMALL))
                    assert peer.take(len(SMALL)) == high(SMALL)
                    resumed = session.info.resumed
                said = peer.finish()
                seen.append((resumed, "Reused, TLSv1" in said, "New, TLSv1" in said))
    assert seen[0] == (False, False, True)
    assert seen[1][:2] == (True, True)


def test_s_client_sees_our_end_and_we_its(
    s_client: Callable[..., Program], ours: bridge.Bridge, server_pair: dict[str, Any]
) -> None:
    with ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener:
        with s_client(listener.address[1]) as peer:
            assert listener.accept(PATIENCE).close()
            said = peer.finish()
            assert "closed" in said and "unexpected eof" not in said
            assert peer.status == 0
        with s_client(listener.address[1]) as peer, listener.accept(PATIENCE) as session:
            peer.end_input()
            with pytest.raises(bridge.EndOfStream):
                session.recv(PATIENCE)
        with s_client(listener.address[1]) as peer, listener.accept(PATIENCE) as session:
            peer.put(high(SMALL))
            assert take(session, len(SMALL)) == high(SMALL)
            peer.kill()
            with pytest.raises((bridge.Truncated, bridge.PeerReset)):
                session.recv(PATIENCE)


def test_s_server_sees_our_end_and_we_its(
    s_server: Callable[..., Program], ours: bridge.Bridge, ca_file: str
) -> None:
    client = bridge.client_context(ca_file)

    def meet(peer: Program) -> bridge.Session:
        return ours.connect(("127.0.0.1", peer.port()), client, server_hostname="localhost")

    with s_server() as peer:
        assert meet(peer).close()
        said = peer.finish()
        assert "DONE" in said and "unexpected eof" not in said
    with s_server("-www") as peer, meet(peer) as session:
        session.send(b"GET / HTTP/1.0\r\n\r\n")
        assert b"s_server" in b"".join(session)
        assert isinstance(session.end, bridge.EndOfStream)
    with s_server() as peer, meet(peer) as session:
        peer.put(b"q\n")  # it closes the socket, and says no close_notify
        with pytest.raises(bridge.Truncated):
            session.recv(PATIENCE)
    with s_server() as peer, meet(peer) as session:
        peer.put(high(SMALL))
        assert take(session, len(SMALL)) == high(SMALL)
        peer.kill()
        with pytest.raises((bridge.Truncated, bridge.PeerReset)):
            session.recv(PATIENCE)
    with s_server() as peer:
        session = meet(peer)
        session.send(high(SMALL))
        assert peer.take(len(SMALL)) == high(SMALL)
        session.abort()
        assert re.search("unexpected eof|Connection reset|ERROR|errno", peer.finish())


# ── curl ──


class Curl:
    """Runs curl against a server of ours that answers one request a session."""

    def __init__(self, path: str, version: str, ca_file: str, background: Background) -> None:
        only = version[4:]
        self._command = [path, "-sS", "--http1.1", "--cacert", ca_file, "--max-time", str(PATIENCE)]
        self._command += [f"--tlsv{only}", "--tls-max", only, "--noproxy", "*"]
        self._background = background

    def get(self, listener: bridge.Listener, *more: str) -> Any:
        """A future of the finished process."""
        command = [*self._command, f"https://localhost:{listener.address[1]}/", "--ipv4", *more]
        return self._background.run(lambda: subprocess.run(command, capture_output=True, timeout=PATIENCE))


@pytest.fixture
def curls(curl: str, tls_version: str, ca_file: str, background: Background) -> Curl:
    return Curl(curl, tls_version, ca_file, background)


def request_of(session: bridge.Session) -> tuple[bytes, bytes]:
    """The head of the request, and the body that its Content-Length announces."""
    received = bytearray()
    while b"\r\n\r\n" not in received:
        received += session.recv(PATIENCE)
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    size = int(length[1]) if length else 0
    if b"100-continue" in head.lower():
        session.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    return head, body + (take(session, size - len(body)) if size > len(body) else b"")


def test_curl_downloads_until_close_notify(
    curls: Curl, ours: bridge.Bridge, server_pair: dict[str, Any]
) -> None:
    """A body without a length: its end is our close_notify."""
    context = bridge.server_context(**server_pair, alpn=("http/1.1",))
    with ours.listen(("127.0.0.1", 0), context) as listener:
        running = curls.get(listener)
        with listener.accept(PATIENCE) as session:
            assert request_of(session)[0].startswith(b"GET / HTTP/1.1")
            assert session.info.alpn == "http/1.1"
            assert session.info.server_name == "localhost"
            session.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + LARGE, PATIENCE)
        done = running.result(PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert digest(done.stdout) == digest(LARGE)


def test_curl_sees_an_aborted_download(curls: Curl, ours: bridge.Bridge, server_pair: dict[str, Any]) -> None:
    with ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener:
        running = curls.get(listener)
        session = listener.accept(PATIENCE)
        request_of(session)
        session.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n" + LARGE, PATIENCE)
        session.flush()
        session.abort()
        done = running.result(PATIENCE)
    assert done.returncode in (18, 56)  # curl(1): partial file; failure in receiving


def test_curl_uploads(curls: Curl, ours: bridge.Bridge, server_pair: dict[str, Any], tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(LARGE)
    with ours.listen(("127.0.0.1", 0), bridge.server_context(**server_pair)) as listener:
        running = curls.get(listener, "--data-binary", f"@{upload}")
        with listener.accept(PATIENCE) as session:
            answer = digest(request_of(session)[1]).encode()
            session.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            done = running.result(PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == digest(LARGE)


def test_curl_shows_its_certificate(
    curls: Curl, ours: bridge.Bridge, ca_file: str, server_pair: dict[str, Any], client_pair: dict[str, Any]
) -> None:
    context = bridge.server_context(**server_pair, client_ca=ca_file)
    with ours.listen(("127.0.0.1", 0), context) as listener:
        running = curls.get(listener, "--cert", client_pair["certfile"], "--key", client_pair["keyfile"])
        with listener.accept(PATIENCE) as session:
            request_of(session)
            assert session.info.peer_certificate is not None
            session.send(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert running.result(PATIENCE).returncode == 0


def test_curl_refuses_our_server_and_says_why(
    curls: Curl, ours: bridge.Bridge, stranger: dict[str, Any]
) -> None:
    with (
        listening_to_events() as events,
        ours.listen(("127.0.0.1", 0), bridge.server_context(**stranger)) as listener,
    ):
        done = curls.get(listener).result(PATIENCE)
        assert "unknown ca" in events.wait_for("handshake.failed")
    assert done.returncode == 60  # curl(1): the certificate cannot be authenticated
    assert b"unable to get local issuer certificate" in done.stderr
