"""The pictures of sessions: each is a trace of a real one, made while the documentation is built."""

from __future__ import annotations

import base64
import contextlib
import io
import select
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from OpenSSL import SSL

import bridge
from bridge import picture
from bridge.context import Context
from bridge.demo import throw_away_authority
from bridge.tap import TraceEvent
from bridge.top import shown
from bridge.window import Window, look

PATIENCE = 10.0
CA, CERTIFICATE, KEY = throw_away_authority()
TLS_1_2 = {"minimum_version": "TLSv1.2", "maximum_version": "TLSv1.2"}


def echo() -> str:
    """A handshake, "hello" and its echo, a close: with a server of the stdlib's."""

    def answer(sock: ssl.SSLSocket) -> None:
        sock.sendall(sock.recv(100))
        with contextlib.suppress(OSError):
            sock.unwrap()

    with bridge.trace() as seen, _stdlib_server(answer) as sock, bridge.Bridge(workers=1) as b:
        session = b.adopt(sock, bridge.client_context([CA]), server_hostname="localhost", timeout=PATIENCE)
        session.send(b"hello")
        session.recv(timeout=PATIENCE)
        session.close(PATIENCE)
    return _image(seen.events, "A handshake, a message, its echo and a close, as traced")


def silence() -> str:
    """A peer that says nothing for a while: the worker sleeps, and SSL_read is made again."""
    may_speak = threading.Event()

    def speak_late(sock: ssl.SSLSocket) -> None:
        may_speak.wait(PATIENCE)
        sock.sendall(b"hello")
        sock.recv(1)

    with bridge.trace() as seen, _stdlib_server(speak_late) as sock, bridge.Bridge(workers=1) as b:
        session = b.adopt(sock, bridge.client_context([CA]), server_hostname="localhost", timeout=PATIENCE)
        with contextlib.suppress(bridge.ReceiveTimeout):
            session.recv(timeout=0.1)
        begun = len(seen.events)
        may_speak.set()
        session.recv(timeout=PATIENCE)
        ended = len(seen.events)
    last = max(event.number for event in seen.events[:begun] if event.what == "SSL_read")
    return _image(seen.events[last:ended], "SSL_read wants to read, and the worker sleeps")


def stalled_write() -> str:
    """A peer that does not read for a while: SSL_write wants to write, and is made again when it can."""
    may_read = threading.Event()

    def read_late(sock: ssl.SSLSocket) -> None:
        may_read.wait(PATIENCE)
        while sock.recv(65536):
            pass

    with bridge.trace() as seen, _stdlib_server(read_late, small=True) as sock, bridge.Bridge(workers=1) as b:
        session = b.adopt(sock, bridge.client_context([CA]), server_hostname="localhost", timeout=PATIENCE)
        session.send(bytes(60_000))
        _until(lambda: any(event.outcome == "WANT_WRITE" for event in seen.events))
        _until(lambda: any(one.wants.get("write") == "write" for one in b.snapshot().sessions))
        threading.Event().wait(0.02)  # its worker is on its way to bed
        may_read.set()
        session.flush(PATIENCE)
        session.send_eof()
    opened = next(event.number for event in seen.events if event.what == "SSL_write")
    return _image([event for event in seen.events if event.number >= opened][:18], "SSL_write, WANT_WRITE")


def renegotiation() -> str:
    """A server of TLS 1.2 that asks for a new handshake: the client's SSL_read answers it."""
    server = bridge.server_context([CERTIFICATE], KEY, renegotiation=True, **TLS_1_2)
    client = bridge.client_context([CA], **TLS_1_2)
    with bridge.trace() as seen, bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server)
        session = b.connect(listener.address, client, server_hostname="localhost", timeout=PATIENCE)
        peer = listener.accept(PATIENCE)
        begun = len(seen.events)
        peer.renegotiate()
        _until(
            lambda: sum(event.what == "Finished" for event in seen.events[begun:]) == 4
        )  # two, told by either end
        peer.send(b"hello")
        session.recv(PATIENCE)
        ended = len(seen.events)
        session.abort()
        peer.abort()
    events = [event for event in seen.events[begun:ended] if event.session.startswith("client")]
    return _image(events, "SSL_read of a client, in a renegotiation")


def write_that_reads() -> str:
    """SSL_write by hand, while the peer renegotiates (TLS 1.2): the same call, until it has what it wants."""
    with bridge.trace() as seen, _renegotiating_server() as (near, server):
        client = bridge.client_context([CA], **TLS_1_2).connection(near, "localhost", None)
        shaking = threading.Thread(target=server.do_handshake)
        shaking.start()
        client.do_handshake()
        shaking.join()
        near.setblocking(False)
        begun = len(seen.events)
        _ask_for_a_new_handshake(server)
        with contextlib.suppress(SSL.WantReadError):
            client.recv(100)  # answers with a ClientHello
        heard = threading.Thread(target=server.recv, args=(100,))
        sent = None
        while sent is None:
            try:
                sent = client.send(b"question")
            except SSL.WantReadError:
                if not heard.is_alive():
                    heard.start()
                select.select([near], [], [], PATIENCE)
        heard.join()
    return _image(seen.events[begun:], "SSL_write wants to read, and is made again")


def write_that_meets_data() -> str:
    """The same in a session, and the peer says something meanwhile."""
    with bridge.trace() as seen, _renegotiating_server() as (near, server), bridge.Bridge(workers=1) as b:
        shaking = threading.Thread(target=server.do_handshake)
        shaking.start()
        client = bridge.client_context([CA], **TLS_1_2)
        session = b.adopt(near, client, server_hostname="localhost", timeout=PATIENCE)
        shaking.join()
        begun = len(seen.events)
        _ask_for_a_new_handshake(server)
        _until(lambda: any(event.what == "ClientHello" for event in seen.events[begun:]))
        session.send(b"question")
        server.send(b"news")  # in front of its part of the handshake
        session.recv(PATIENCE)
        server.recv(100)  # the handshake, and the question
        session.flush(PATIENCE)
        ended = len(seen.events)
        session.abort()
    return _image(
        seen.events[begun:ended], "A write that has to wait for a handshake, with data in front of it"
    )


def top() -> str:
    """What `tls-bridge top` shows of a few sessions, one of them with a peer that does not read."""
    from rich.console import Console

    with (
        tempfile.TemporaryDirectory() as folder,
        bridge.Bridge(workers=2) as b,
        Window(b, Path(folder, "window.sock")) as window,
    ):
        listener = b.listen(("127.0.0.1", 0), bridge.server_context([CERTIFICATE], KEY))
        client = bridge.client_context([CA])
        sessions = []
        for _ in range(3):
            sessions.append(
                b.connect(listener.address, client, server_hostname="localhost", timeout=PATIENCE)
            )
            sessions.append(listener.accept(PATIENCE))
        with contextlib.suppress(bridge.SendTimeout):
            while True:
                sessions[0].send(bytes(50_000), timeout=0.2)
        view = look(window.path)
        for session in sessions:
            session.abort()
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(shown(view))
    return _as_image(console.export_svg(title="tls-bridge top window.sock"), "tls-bridge top, live")


@contextlib.contextmanager
def _renegotiating_server() -> Iterator[tuple[socket.socket, SSL.Connection]]:
    """A socket to a server of TLS 1.2 that does nothing by itself."""
    context = bridge.server_context([CERTIFICATE], KEY, renegotiation=True, **TLS_1_2)
    near, far = socket.socketpair()
    with near, far:
        server = SSL.Connection(context.raw, far)
        server.set_accept_state()
        yield near, server


def _ask_for_a_new_handshake(server: SSL.Connection) -> None:
    server.renegotiate()
    server.do_handshake()  # says HelloRequest, and no more


def memory() -> str:
    """A client over memory BIOs: each call says what it has to say, or that it must be fed."""
    with bridge.trace() as seen:
        client = Context.adopt(bridge.client_context([CA]), False).connection(None, "localhost", None)
        server = Context.adopt(bridge.server_context([CERTIFICATE], KEY), True).connection(None, None, None)
        shaken: set[SSL.Connection] = set()
        while len(shaken) < 2:
            for engine, other in ((client, server), (server, client)):
                with contextlib.suppress(SSL.WantReadError):
                    engine.do_handshake()
                    shaken.add(engine)
                _pump(engine, other)
        client.send(b"hello")
        with contextlib.suppress(SSL.WantReadError):
            client.recv(100)
    return _image([event for event in seen.events if event.session.startswith("client")], "TLS over memory")


def _pump(one: SSL.Connection, other: SSL.Connection) -> None:
    with contextlib.suppress(SSL.WantReadError):
        while True:
            other.bio_write(one.bio_read(65_536))


def silent_descriptor() -> str:
    """A record of 1,000 bytes, read by hand in two parts: nothing on the wire tells about the second."""
    with (
        bridge.trace() as seen,
        _stdlib_server(lambda sock: (sock.recv(1), sock.sendall(bytes(1000)), sock.recv(1))) as sock,
    ):
        client = bridge.client_context([CA]).connection(sock, "localhost", None)
        client.do_handshake()
        begun = len(seen.events)
        client.send(b"?")
        first = client.recv(10)
        rest = client.recv(16_384)
        sock.setblocking(False)
        with contextlib.suppress(SSL.WantReadError):
            client.recv(16_384)
        ended = len(seen.events)
        assert (len(first), len(rest)) == (10, 990)
    return _image(seen.events[begun:ended], "10 bytes of a record, and 990 more that no poll speaks of")


def _until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not seen():
        assert time.monotonic() < deadline, "what the picture is to show has not come"
        threading.Event().wait(0.01)


@contextlib.contextmanager
def _stdlib_server(serve: Callable[[ssl.SSLSocket], None], small: bool = False) -> Iterator[socket.socket]:
    """A socket to a thread that *serve*s it, over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "identity.pem")
        path.write_bytes(
            KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + CERTIFICATE.public_bytes(Encoding.PEM)
        )
        context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near, far = socket.socket(), None
        if small:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        near.connect(listening.getsockname())
        far, _ = listening.accept()
    far.settimeout(PATIENCE)
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run() -> None:
        with context.wrap_socket(far, server_side=True) as sock:
            serve(sock)

    thread = threading.Thread(target=run)
    thread.start()
    with near:
        yield near
    thread.join()


def _image(events: Sequence[TraceEvent], what: str) -> str:
    """An image that needs no file; as an image, its styles are its own."""
    return _as_image(picture.svg(events, 60), what)


def _as_image(svg: str, what: str) -> str:
    drawn = base64.b64encode(svg.encode()).decode()
    return f'<div class="trace"><img alt="{what}" src="data:image/svg+xml;base64,{drawn}"></div>'
