"""Servers of blocking calls: stdlib `ssl`, pyOpenSSL and the drop-in with a thread per connection, and gevent."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, Protocol

from job import READ, SENDERS, Job, announce, lines


class Stream(Protocol):
    """What the blocking libraries have in common."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> Any: ...


def sink(stream: Stream) -> None:
    """Reads until the end."""
    while stream.recv(READ):
        pass


def source(stream: Stream, job: Job) -> None:
    """Sends until that fails."""
    payload = job.payload
    while True:
        stream.sendall(payload)


class Crew:
    """Sends lines to all streams from SENDERS threads at once, each message under its stream's lock."""

    def __init__(
        self,
        job: Job,
        spawn: Callable[..., Any],
        new_lock: Callable[[], Any],
        ends: tuple[type[Exception], ...],
    ) -> None:
        self._wanted, self._spawn, self._new_lock, self._ends = job.sessions, spawn, new_lock, ends
        self._streams: list[tuple[Any, Stream]] = []

    def add(self, stream: Stream) -> None:
        """Called once a stream's handshake is done; the last one starts the senders."""
        self._streams.append((self._new_lock(), stream))
        if len(self._streams) == self._wanted:
            for sender in range(SENDERS):
                self._spawn(self._send, sender)

    def _send(self, sender: int) -> None:
        with contextlib.suppress(*self._ends):
            for line in lines(sender):
                for lock, stream in self._streams:
                    with lock:
                        stream.sendall(line)


def talk(stream: Stream, job: Job, crew: Crew, spawn: Callable[..., Any]) -> None:
    """A connection's whole life in its own thread, after its handshake."""
    if job.role == "echo":
        while data := stream.recv(READ):
            stream.sendall(data)
    elif job.role == "source":
        source(stream, job)
    elif job.role == "sink":
        sink(stream)
    elif job.role == "both":
        spawn(source, stream, job)
        sink(stream)
    else:
        crew.add(stream)


def start(function: Callable[..., object], *arguments: object) -> None:
    """Runs *function* in a thread that dies quietly with its connection."""

    def run() -> None:
        with contextlib.suppress(OSError):
            function(*arguments)

    threading.Thread(target=run, daemon=True).start()


def accept_into_threads(handle: Callable[[socket.socket], None]) -> None:
    """The oldest server there is: a listening socket, and a thread per connection."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    announce(listener.getsockname()[1])
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=handle, args=(sock,), daemon=True).start()


def new_context(job: Job, module: Any = ssl) -> Any:
    """The defaults for a server, of the standard library or of what stands in its place."""
    context = module.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(job.cert, job.key)
    return context


def serve_stdlib(job: Job, module: Any = ssl) -> None:
    """stdlib `ssl`, a thread per connection."""
    context = new_context(job, module)
    crew = Crew(job, start, threading.Lock, (OSError,))

    def handle(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            stream = context.wrap_socket(sock, server_side=True)
            talk(stream, job, crew, start)
            if job.role != "lines":
                stream.close()

    accept_into_threads(handle)


def serve_bridge_dropin(job: Job) -> None:
    """The same program as for stdlib `ssl`, with `from bridge import ssl` in place of `import ssl`."""
    from bridge import ssl as ours

    serve_stdlib(job, ours)


def serve_pyopenssl(job: Job) -> None:
    """pyOpenSSL on blocking sockets, a thread per connection."""
    from OpenSSL import SSL

    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(job.cert)
    context.use_privatekey_file(job.key)
    crew = Crew(job, start, threading.Lock, (SSL.Error, OSError))

    def handle(sock: socket.socket) -> None:
        stream = SSL.Connection(context, sock)
        stream.set_accept_state()
        with contextlib.suppress(SSL.Error, OSError):
            stream.do_handshake()
            talk(stream, job, crew, start)
        if job.role != "lines":
            stream.close()

    accept_into_threads(handle)


def serve_gevent(job: Job) -> None:
    """gevent's own server, a greenlet per connection."""
    import gevent
    from gevent import ssl as green_ssl
    from gevent.event import Event
    from gevent.lock import BoundedSemaphore
    from gevent.server import StreamServer

    def spawn(function: Callable[..., object], *arguments: object) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                function(*arguments)

        gevent.spawn(run)

    crew = Crew(job, spawn, BoundedSemaphore, (OSError,))
    ended = Event()

    def handle(stream: Any, _: object) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            talk(stream, job, crew, spawn)
            if job.role == "lines":
                ended.wait()  # the server closes what its handler leaves

    server = StreamServer(("127.0.0.1", 0), handle, backlog=4096, ssl_context=new_context(job, green_ssl))
    server.start()
    announce(server.server_port)
    server.serve_forever()
