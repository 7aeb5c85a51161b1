"""Threaded servers as users of the standard library write them, and what the tests ask of them."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from dropin_rig import Arrangement, our_ssl
from peers import PATIENCE, reset_on_close

OUR_CLIENT = pytest.mark.parametrize(
    "arrangement", [Arrangement("ours", "theirs"), Arrangement("theirs", "theirs")], ids=str
)
"""For servers whose TLS is not for us to choose: our client, and theirs as the control."""
OUR_SERVER = pytest.mark.parametrize(
    "arrangement", [Arrangement("theirs", "ours"), Arrangement("ours", "ours")], ids=str
)
"""For what the stdlib's server side does not do."""


def is_of(found: type, side: str) -> bool:
    """Whether sockets of the class *found* speak the TLS of *side* ("ours" or "theirs")."""
    return issubclass(found, our_ssl().SSLSocket) if side == "ours" else found is ssl.SSLSocket


def becomes_readable(sock: socket.socket, timeout: float = PATIENCE) -> bool:
    """Whether poll() finds *sock* readable within *timeout* seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


class Watched:
    """A mix-in for servers: counts what is accepted, keeps what handlers raise, and waits for them in the end."""

    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 32

    def __init__(self, *args: Any, **more: Any) -> None:
        self.accepted = 0
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__(*args, **more)

    def get_request(self) -> Any:
        """Accept, and count it."""
        request = super().get_request()  # type: ignore[misc]
        self.accepted += 1
        return request

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the error for a test to look at; as text, since its traceback would hold on to the socket."""
        self.failures.put(repr(sys.exc_info()[1]))


class WatchedTCPServer(Watched, socketserver.ThreadingTCPServer):
    """A thread for each connection."""


@contextlib.contextmanager
def serving(server: Any, context: Any = None) -> Iterator[Any]:
    """*server* at work in a thread; with a *context* its listening socket is wrapped, as users do it."""
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ── protocols of lines, which can turn to TLS in the middle ──


class LineServer(WatchedTCPServer):
    """Holds a `Conversation` with each client.  *tls* is the context for those that turn to TLS halfway."""

    def __init__(self, conversation: type[Conversation], tls: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), conversation)
        self.tls = tls
        self.received: queue.Queue[bytes] = queue.Queue()
        self.sockets: queue.Queue[type] = queue.Queue()
        self.may_part = threading.Event()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self.server_address[1]
        return port

    def socket_class(self) -> type:
        """Of which class the socket of the next conversation was at its end."""
        return self.sockets.get(timeout=PATIENCE)


class Conversation(socketserver.StreamRequestHandler):
    """A line of the client's, an answer of the server's, and so on."""

    timeout = PATIENCE
    greeting = ""
    server: LineServer

    def handle(self) -> None:
        """Talk until one of the two has enough."""
        if self.greeting:
            self.say(self.greeting)
        while line := self.rfile.readline():
            if not self.answer(line.decode().rstrip("\r\n")):
                break

    def answer(self, line: str) -> bool:
        """Answer *line*; False ends the conversation."""
        raise NotImplementedError

    def say(self, *lines: str) -> bool:
        """Send *lines*.  And let the conversation go on."""
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())
        return True

    def start_tls(self) -> bool:
        """From now on in TLS.  And let the conversation go on."""
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        self.setup()
        return True

    def part(self, how: str) -> bool:
        """If *how* is "close" or "reset", end the connection so, once the server may; else let it go on."""
        if how in ("close", "reset"):
            self.server.may_part.wait(PATIENCE)
        if how == "reset":
            reset_on_close(self.request)
            self.request.close()
        return how not in ("close", "reset")

    def finish(self) -> None:
        """Close also what `start_tls` has made, which the server knows nothing of."""
        self.server.sockets.put(type(self.request))
        super().finish()
        self.server.shutdown_request(self.request)
