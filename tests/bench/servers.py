"""The servers under test, each as its own users would write it.

Run as a process by `run.py`: prints ``port N`` once it listens, and ends when its stdin does.
Three roles: *echo* sends back what it gets, *source* sends as fast as the client takes it, *sink* only reads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import resource
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

READ = 65_536


@dataclasses.dataclass(frozen=True)
class Job:
    """What a server is to do; *block* is the bytes a source passes to one send."""

    peer: str
    role: str
    cert: str
    key: str
    core: int
    block: int
    handlers: int

    @property
    def payload(self) -> bytes:
        """The block a source sends again and again; the generator checks that byte n is n % 256."""
        return bytes(range(256)) * (self.block // 256)


class Stream(Protocol):
    """What the blocking libraries have in common."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> Any: ...


def announce(port: int) -> None:
    """Tells the harness where to connect."""
    print(f"port {port}", flush=True)


def talk(stream: Stream, job: Job) -> None:
    """A blocking connection's whole life, after its handshake."""
    if job.role == "echo":
        while data := stream.recv(READ):
            stream.sendall(data)
    elif job.role == "source":
        payload = job.payload
        while True:
            stream.sendall(payload)
    else:
        while stream.recv(READ):
            pass


def accept_into_threads(handle: Callable[[socket.socket], None]) -> None:
    """The oldest server there is: a listening socket, and a thread per connection."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    announce(listener.getsockname()[1])
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=handle, args=(sock,), daemon=True).start()


def stdlib_context(job: Job, module: Any = ssl) -> ssl.SSLContext:
    """The defaults for a server, of the standard library or of what stands in its place."""
    context: ssl.SSLContext = module.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(job.cert, job.key)
    return context


def serve_stdlib(job: Job, module: Any = ssl) -> None:
    """stdlib `ssl`, a thread per connection."""
    context = stdlib_context(job, module)

    def handle(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as stream:
            talk(stream, job)

    accept_into_threads(handle)


def serve_pyopenssl(job: Job) -> None:
    """pyOpenSSL on blocking sockets, a thread per connection."""
    from OpenSSL import SSL

    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file(job.cert)
    context.use_privatekey_file(job.key)

    def handle(sock: socket.socket) -> None:
        stream = SSL.Connection(context, sock)
        stream.set_accept_state()
        with contextlib.suppress(SSL.Error, OSError):
            stream.do_handshake()
            talk(stream, job)
        stream.close()

    accept_into_threads(handle)


class AsyncioPeer(asyncio.Protocol):
    """One connection of the asyncio server."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._payload = job.payload
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._job.role == "source":
            self._send_on()

    def data_received(self, data: bytes) -> None:
        if self._job.role == "echo":
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._job.role == "source":
            self._send_on()

    def _send_on(self) -> None:
        """Writes until told to pause, but yields to the loop after each block."""
        if not self._paused and not self._transport.is_closing():
            self._transport.write(self._payload)
            asyncio.get_running_loop().call_soon(self._send_on)


def serve_asyncio(job: Job) -> None:
    """asyncio with protocols, its fastest form."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: AsyncioPeer(job), "127.0.0.1", 0, ssl=stdlib_context(job), backlog=4096
        )
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def bridge_talk(session: Any, job: Job) -> None:
    """A thread that blocks on its own session."""
    import bridge

    with contextlib.suppress(bridge.SessionEnded):
        if job.role == "echo":
            for message in session:
                session.send(message)
        elif job.role == "source":
            payload = job.payload
            while True:
                session.send(payload)
        else:
            for _ in session:
                pass


def serve_bridge_threads(job: Job) -> None:
    """The bridge, a thread per session blocked in `recv` or `send`."""
    import bridge

    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(job.cert, job.key))
        announce(listener.address[1])
        for session in listener:
            threading.Thread(target=bridge_talk, args=(session, job), daemon=True).start()


def serve_bridge_dropin(job: Job) -> None:
    """The same program as for stdlib `ssl`, with `from bridge import ssl` in place of `import ssl`."""
    from bridge import ssl as ours

    serve_stdlib(job, ours)


def serve_bridge_inbox(job: Job) -> None:
    """The bridge, a pool of handler threads on one shared inbox."""
    import bridge

    shared = bridge.Inbox()

    def handle() -> None:
        while True:
            session, message = shared.get()
            if message is not None and job.role == "echo":
                try:
                    session.send(message)
                except bridge.SessionEnded:
                    pass  # the inbox says so too

    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(job.cert, job.key), inbox=shared)
        announce(listener.address[1])
        for _ in range(job.handlers - 1):
            threading.Thread(target=handle, daemon=True).start()
        handle()


SERVERS: dict[str, Callable[[Job], None]] = {
    "stdlib": serve_stdlib,
    "pyopenssl": serve_pyopenssl,
    "asyncio": serve_asyncio,
    "bridge-threads": serve_bridge_threads,
    "bridge-dropin": serve_bridge_dropin,
    "bridge-inbox": serve_bridge_inbox,
}


def end_with_stdin() -> None:
    """Ends this process, whatever it is doing, when the harness closes its stdin or dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


def main() -> None:
    """Serves until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=SERVERS)
    parser.add_argument("role", choices=("echo", "source", "sink"))
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--core", type=int, default=-1, help="run on this core only")
    parser.add_argument("--block", type=int, default=READ, help="bytes a source passes to one send")
    parser.add_argument("--handlers", type=int, default=2, help="threads of bridge-inbox")
    job = Job(**vars(parser.parse_args()))
    if job.core >= 0:
        os.sched_setaffinity(0, {job.core})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threading.Thread(target=end_with_stdin, daemon=True).start()
    SERVERS[job.peer](job)


if __name__ == "__main__":
    main()
