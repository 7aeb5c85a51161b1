"""The pictures of sessions: each is a trace of a real one, made while the documentation is built."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import bridge
from bridge import picture
from bridge.demo import throw_away_authority
from bridge.tap import TraceEvent

PATIENCE = 10.0
CA, CERTIFICATE, KEY = throw_away_authority()


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
        while not any(event.outcome == "WANT_WRITE" for event in seen.events):
            threading.Event().wait(0.01)
        may_read.set()
        session.flush(PATIENCE)
        session.send_eof()
    opened = next(event.number for event in seen.events if event.what == "SSL_write")
    return _image([event for event in seen.events if event.number >= opened][:18], "SSL_write, WANT_WRITE")


def renegotiation() -> str:
    """A server of TLS 1.2 that asks for a new handshake: the client's SSL_read answers it."""
    versions = {"minimum_version": "TLSv1.2", "maximum_version": "TLSv1.2"}
    server = bridge.server_context([CERTIFICATE], KEY, renegotiation=True, **versions)
    client = bridge.client_context([CA], **versions)
    with bridge.trace() as seen, bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server)
        session = b.connect(listener.address, client, server_hostname="localhost", timeout=PATIENCE)
        with session, listener.accept(PATIENCE) as peer:
            begun = len(seen.events)
            peer.renegotiate()
            while (
                sum(event.what == "Finished" for event in seen.events[begun:]) < 4
            ):  # two, told by either end
                threading.Event().wait(0.01)
            peer.send(b"hello")
            session.recv(PATIENCE)
    events = [event for event in seen.events[begun:] if event.session.startswith("client")]
    return _image(events, "SSL_read of a client, in a renegotiation")


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

    def run() -> None:
        with context.wrap_socket(far, server_side=True) as sock:
            serve(sock)

    thread = threading.Thread(target=run)
    thread.start()
    with near:
        yield near
    thread.join()


def _image(events: list[TraceEvent] | tuple[TraceEvent, ...], what: str) -> str:
    """An image in Markdown that needs no file; as an image, its styles are its own."""
    drawn = picture.svg(events, 60)
    return f"![{what}](data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()})"
