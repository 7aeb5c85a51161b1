"""The standard library's servers, socketserver, http.server, wsgiref and xmlrpc.server, with TLS under them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import random
import socket
import socketserver
import ssl
import subprocess
import time
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dropin_rig import CONTROL, Arrangement, context_class, injection
from peers import PATIENCE, Program, dial, high, receive_exactly, reset_on_close
from serving import OUR_SERVER, Watched, WatchedTCPServer, is_of, serving

pytestmark = pytest.mark.usefixtures("default_bridge")

LARGE = random.Random(12).randbytes(2_000_000)
AT_ONCE = 5.0
"""Seconds in which a client is served if nobody keeps the server from it."""


class Upper(socketserver.StreamRequestHandler):
    """Sends every line back in capital letters."""

    timeout = PATIENCE

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Parting(socketserver.BaseRequestHandler):
    """Says all it has to say, and is gone."""

    def handle(self) -> None:
        self.request.sendall(LARGE)
        self.request.shutdown(socket.SHUT_WR)
        self.request.close()


class Digesting(socketserver.StreamRequestHandler):
    """Reads to the end and passes the digest on to the server's `digests`."""

    timeout = PATIENCE

    def handle(self) -> None:
        self.server.digests.append(hashlib.sha256(self.rfile.read()).hexdigest())  # type: ignore[attr-defined]


class Page(http.server.SimpleHTTPRequestHandler):
    """What is at / is LARGE; what is posted comes back."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        self.reply(LARGE)

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class HTTPServer(Watched, http.server.ThreadingHTTPServer):
    """A thread for each connection."""


def serving_upper(context: Any) -> contextlib.AbstractContextManager[Any]:
    return serving(WatchedTCPServer(("127.0.0.1", 0), Upper), context)


def connect(server: Any, context: Any, timeout: float = PATIENCE) -> ssl.SSLSocket:
    sock = socket.create_connection(server.server_address, timeout)
    wrapped: ssl.SSLSocket = context.wrap_socket(sock, server_hostname="localhost")
    return wrapped


def converse(server: Any, context: Any) -> None:
    """Be an honest client."""
    with connect(server, context) as sock:
        for word in b"one\n", b"two\n", b"x" * 30_000 + b"\n":
            sock.sendall(word)
            assert receive_exactly(sock, len(word)) == word.upper()


# ── socketserver ──


def test_a_threading_server_talks_to_many_clients_at_once(
    server_context: Any, client_context: Any, arrangement: Arrangement
) -> None:
    with serving_upper(server_context) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server, client_context)) for _ in range(5)]
        for number, sock in enumerate(clients):
            sock.sendall(b"number %d\n" % number)
        for number, sock in reversed(list(enumerate(clients))):
            assert receive_exactly(sock, 9) == b"NUMBER %d\n" % number
            assert is_of(type(sock), arrangement.client)
            assert sock.version() == "TLSv1.3"
        assert is_of(type(server.socket), arrangement.server)
    assert server.accepted == 5
    assert server.failures.empty()


def test_a_server_of_one_thread_serves_one_client_after_the_other(
    server_context: Any, client_context: Any
) -> None:
    class Server(Watched, socketserver.TCPServer):
        pass

    with serving(Server(("127.0.0.1", 0), Upper), server_context) as server:
        for _ in range(3):
            converse(server, client_context)
        assert server.accepted == 3


def test_what_is_sent_before_shutdown_and_close_arrives(server_context: Any, client_context: Any) -> None:
    with serving(WatchedTCPServer(("127.0.0.1", 0), Parting), server_context) as server:
        with connect(server, client_context) as sock:
            assert receive_exactly(sock, len(LARGE)) == LARGE
            assert sock.recv(1) == b""
    assert server.failures.empty()


@pytest.mark.skipif(CONTROL, reason="the stdlib's client loses data when it closes with unread tickets")
@pytest.mark.parametrize("arrangement", [Arrangement("ours", "theirs"), Arrangement("ours", "ours")], ids=str)
def test_what_a_client_that_only_writes_has_sent_before_its_end_arrives(
    server_context: Any, client_context: Any
) -> None:
    server = WatchedTCPServer(("127.0.0.1", 0), Digesting)
    server.digests = []  # type: ignore[attr-defined]
    with serving(server, server_context):
        sock = connect(server, client_context)
        sock.sendall(LARGE)
        sock.shutdown(socket.SHUT_WR)
        sock.close()
    assert server.digests == [hashlib.sha256(LARGE).hexdigest()]  # type: ignore[attr-defined]


# ── clients that mean no good ──


@pytest.mark.skipif(CONTROL, reason="the stdlib's accept() waits for the handshake of a mute client")
@OUR_SERVER
def test_mute_clients_do_not_keep_others_waiting(server_context: Any, client_context: Any) -> None:
    with serving_upper(server_context) as server, contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(dial(server.server_address))
        start = time.monotonic()
        converse(server, client_context)
        assert time.monotonic() - start < AT_ONCE


@OUR_SERVER
@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x00" * 600, bytes(range(128, 256)) * 20],
    ids=["plain-http", "zeros", "garbage"],
)
def test_a_client_that_does_not_speak_tls_ends_only_its_own_connection(
    server_context: Any, client_context: Any, greeting: bytes
) -> None:
    with serving_upper(server_context) as server:
        with dial(server.server_address) as sock:
            sock.sendall(greeting)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1000):  # perhaps an alert
                    pass
        converse(server, client_context)


def client_hello() -> bytes:
    """The first flight of a client."""
    context = context_class("theirs")(ssl.PROTOCOL_TLS_CLIENT)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@OUR_SERVER
@pytest.mark.parametrize("by_reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["mute", "half-a-hello", "hello"])
def test_a_client_that_vanishes_in_the_handshake_ends_only_its_own_connection(
    server_context: Any, client_context: Any, share: float, by_reset: bool
) -> None:
    if CONTROL and by_reset and share < 1:
        pytest.skip("the stdlib's accept() leaks the socket of a client that has gone already")
    with serving_upper(server_context) as server:
        for _ in range(3):
            with dial(server.server_address) as sock:
                hello = client_hello()
                sock.sendall(hello[: int(len(hello) * share)])
                if share == 1:
                    receive_exactly(sock, 1)  # the server is in the middle of it
                if by_reset:
                    reset_on_close(sock)
        converse(server, client_context)


@OUR_SERVER
def test_a_client_that_refuses_the_server_ends_only_its_own_connection(
    server_context: Any, client_context: Any
) -> None:
    with serving_upper(server_context) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(server, context_class("theirs")(ssl.PROTOCOL_TLS_CLIENT))
        converse(server, client_context)


@OUR_SERVER
def test_a_client_that_vanishes_in_its_conversation_ends_only_its_own_connection(
    server_context: Any, client_context: Any
) -> None:
    with serving_upper(server_context) as server:
        with connect(server, client_context) as sock:
            sock.sendall(b"half a li")
            reset_on_close(sock)
        converse(server, client_context)


def test_a_server_is_shut_down_while_a_client_is_idle(server_context: Any, client_context: Any) -> None:
    with serving_upper(server_context) as server:
        with connect(server, client_context) as sock:
            sock.sendall(b"one\n")
            assert receive_exactly(sock, 4) == b"ONE\n"
            server.shutdown()
            sock.sendall(b"two\n")
            assert receive_exactly(sock, 4) == b"TWO\n"
        address = server.server_address
        server.socket.close()
        with pytest.raises(ConnectionRefusedError):
            dial(address)


# ── http.server ──


def test_an_http_server_serves_a_page(server_context: Any, client_context: Any) -> None:
    with serving(HTTPServer(("127.0.0.1", 0), Page), server_context) as server:
        port = server.server_address[1]
        connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=client_context)
        with contextlib.closing(connection):
            for method, body in ("GET", None), ("POST", LARGE):
                connection.request(method, "/", body)
                with connection.getresponse() as response:
                    assert response.read() == LARGE
        assert server.accepted == 1


@pytest.mark.skipif(CONTROL, reason="the stdlib's accept() waits for the handshake of a mute client")
@OUR_SERVER
def test_a_mute_client_does_not_keep_an_http_server_from_others(
    server_context: Any, client_context: Any
) -> None:
    with serving(HTTPServer(("127.0.0.1", 0), Page), server_context) as server:
        with dial(server.server_address), connect(server, client_context, AT_ONCE) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\nConnection: close\r\n\r\n")
            with sock.makefile("rb") as file:
                assert file.read().endswith(LARGE)


# ── wsgiref ──


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answers with what it was sent."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Method", environ["REQUEST_METHOD"])])
    return [body[:1000], body[1000:]]


class QuietWSGIHandler(wsgiref.simple_server.WSGIRequestHandler):
    """Says nothing."""

    timeout = PATIENCE

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_wsgiref_serves_an_application(server_context: Any, client_context: Any) -> None:
    made = wsgiref.simple_server.make_server("127.0.0.1", 0, application, handler_class=QuietWSGIHandler)
    with serving(made, server_context) as server:
        for method, body in ("GET", b""), ("POST", LARGE):
            connection = http.client.HTTPSConnection(
                "localhost", server.server_port, timeout=PATIENCE, context=client_context
            )
            with contextlib.closing(connection):
                connection.request(method, "/", body)
                with connection.getresponse() as response:
                    assert (response.status, response.headers["X-Method"]) == (200, method)
                    assert response.read() == body


# ── xmlrpc ──


class QuietXMLRPCHandler(xmlrpc.server.SimpleXMLRPCRequestHandler):
    """Keeps connections, and may be called at /RPC2."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE


class XMLRPCServer(Watched, socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    """A thread for each connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), QuietXMLRPCHandler, logRequests=False)
        self.register_function(lambda data: xmlrpc.client.Binary(data.data[::-1]), "reverse")
        self.register_function(divmod)


def call(proxy: xmlrpc.client.ServerProxy) -> None:
    """A few remote calls: a small one, a large one, and one that fails."""
    assert proxy.divmod(17, 5) == [3, 2]
    assert proxy.reverse(xmlrpc.client.Binary(LARGE)).data == LARGE[::-1]  # type: ignore[union-attr]
    with pytest.raises(xmlrpc.client.Fault, match="ZeroDivisionError"):
        proxy.divmod(1, 0)


def test_xmlrpc_calls_over_one_connection(server_context: Any, client_context: Any) -> None:
    with serving(XMLRPCServer(), server_context) as server:
        url = f"https://localhost:{server.server_address[1]}/RPC2"
        with xmlrpc.client.ServerProxy(url, context=client_context) as proxy:
            call(proxy)
        assert server.accepted == 1


def test_xmlrpc_builds_its_own_context(
    server_context: Any, arrangement: Arrangement, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    with serving(XMLRPCServer(), server_context) as server, injection(arrangement.client):
        with xmlrpc.client.ServerProxy(f"https://localhost:{server.server_address[1]}/RPC2") as proxy:
            call(proxy)


# ── programs as clients ──


PROGRAM = pytest.mark.parametrize("arrangement", [Arrangement("program", "ours")], ids=str)


@pytest.fixture
def page_server(server_context: Any) -> Iterator[Any]:
    """The page, by the TLS of the arrangement."""
    with serving(HTTPServer(("127.0.0.1", 0), Page), server_context) as made:
        yield made


@pytest.fixture
def run_curl(curl: str, ca_file: str, page_server: Any) -> Callable[..., bytes]:
    """Runs curl, which verifies the page's server; what it downloads."""

    def run(*arguments: str) -> bytes:
        command = [
            curl,
            "-sS",
            "--noproxy",
            "*",
            "--max-time",
            str(PATIENCE),
            "--cacert",
            ca_file,
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, timeout=2 * PATIENCE, check=True).stdout

    return run


@PROGRAM
def test_curl_downloads_twice_over_one_connection(run_curl: Callable[..., bytes], page_server: Any) -> None:
    url = f"https://localhost:{page_server.server_address[1]}/"
    assert run_curl(url, url) == LARGE + LARGE
    assert page_server.accepted == 1


@PROGRAM
@pytest.mark.parametrize("flag", ["--tlsv1.2", "--tlsv1.3"])
def test_curl_uploads(run_curl: Callable[..., bytes], page_server: Any, flag: str, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(LARGE)
    url = f"https://localhost:{page_server.server_address[1]}/"
    assert run_curl(flag, "--tls-max", flag[-3:], "--data-binary", f"@{tmp_path / 'upload'}", url) == LARGE


@PROGRAM
def test_openssl_s_client_has_its_say(openssl: str, ca_file: str, server_context: Any) -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)

    with serving(WatchedTCPServer(("127.0.0.1", 0), Echo), server_context) as server:
        where = ("-connect", f"127.0.0.1:{server.server_address[1]}", "-servername", "localhost")
        trust = ("-CAfile", ca_file, "-verify_return_error", "-verify_hostname", "localhost")
        with Program(openssl, "s_client", *where, *trust) as peer:
            for piece in high(b"a few bytes"), high(LARGE[:8_000]):
                peer.put(piece)
                assert peer.take(len(piece)) == piece
            peer.end_input()
            assert "Verify return code: 0 (ok)" in peer.finish()
            assert peer.status == 0
    assert server.failures.empty()
