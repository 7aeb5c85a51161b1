"""To drive TLS from one thread: small sockets, raw pyOpenSSL as a witness, and bridges in lockstep."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import KeyPair
from OpenSSL import SSL
from peers import Background

import bridge
from bridge.coordinator import Coordinator
from bridge.engine import TLSEngine
from bridge.poll import HUNG_UP, NOTHING, Want
from bridge.session import Session

PATIENCE = 20.0
"""Seconds that a test waits for anything before it takes it for failed."""
VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}
MOVING_WRITE_BUFFER = 2
"""SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER (SSL_CTX_set_mode(3)), which pyOpenSSL sets by itself since version 25.2."""
ALLOW_CLIENT_RENEGOTIATION = 0x100
"""SSL_OP_ALLOW_CLIENT_RENEGOTIATION (SSL_CTX_set_options(3)), which pyOpenSSL does not name."""
BLOCK = 16_000
"""Bytes that fill one record, and do not fit the smallest buffers of a socket pair."""

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
needs_hang_ups = pytest.mark.skipif(
    HUNG_UP == NOTHING, reason="nobody can ask here whether a peer has hung up"
)


def only(version: str) -> dict[str, Any]:
    """The arguments of a context that speaks *version* and no other."""
    return {"minimum_version": version, "maximum_version": version}


class Clock:
    """Time that passes when the test says so; to stand in the place of the module `time`.

    It begins with a whole second, so that sums of whole seconds are exact."""

    def __init__(self) -> None:
        self.now = float(math.ceil(time.monotonic()))

    def monotonic(self) -> float:
        return self.now


# ── sockets ──


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


def shrink(sock: socket.socket) -> socket.socket:
    """*sock*, its buffers as small as the kernel allows."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    return sock


# ── raw pyOpenSSL ──


def raw_context(version: str, identity: KeyPair | None = None) -> SSL.Context:
    """A context as people write it: a server's with *identity*, else a client's that verifies nobody."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_mode(MOVING_WRITE_BUFFER)
    context.set_min_proto_version(VERSIONS[version])
    context.set_max_proto_version(VERSIONS[version])
    if identity is not None:
        context.use_certificate_chain_file(identity.certfile)
        context.use_privatekey_file(identity.keyfile)
    return context


class Raw:
    """A pyOpenSSL connection on a non-blocking socket, and nothing of ours."""

    def __init__(self, context: SSL.Context, sock: socket.socket, server_side: bool) -> None:
        self.sock = sock
        self.connection = SSL.Connection(context, sock)
        if server_side:
            self.connection.set_accept_state()
        else:
            self.connection.set_connect_state()

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a method of the connection, or the Want it raised; other errors are raised on."""
        try:
            return getattr(self.connection, name)(*arguments)
        except SSL.WantReadError:
            return Want.READ
        except SSL.WantWriteError:
            return Want.WRITE

    def handshake(self) -> Want | None:
        want: Want | None = self.call("do_handshake")
        return want

    def read(self, size: int = 65536) -> bytes | Want:
        data: bytes | Want = self.call("recv", size)
        return data

    def read_all(self) -> bytes:
        """Everything that is there now."""
        parts = []
        while not isinstance(data := self.read(), Want):
            parts.append(data)
        return b"".join(parts)

    def write(self, data: bytes) -> int | Want:
        sent: int | Want = self.call("send", data)
        return sent

    def write_until_stuck(self, data: bytes) -> int:
        """Write *data* again and again until the socket takes no more; how many bytes went."""
        count = 0
        while not isinstance(sent := self.write(data), Want):
            count += sent
        assert sent is Want.WRITE
        return count


def raw_pair(version: str, identity: KeyPair, near: socket.socket, far: socket.socket) -> tuple[Raw, Raw]:
    """Client and server, their handshake done, and what came after it (tickets) taken by the client."""
    client = Raw(raw_context(version), near, server_side=False)
    server = Raw(raw_context(version, identity), far, server_side=True)
    shake(client, server)
    assert client.read(1) is Want.READ
    return client, server


def shake(*ends: Any) -> None:
    """The handshake of two ends, in turns."""
    left = list(ends)
    for _ in range(100):
        left = [end for end in left if end.handshake() is not None]
        if not left:
            return
    raise AssertionError("the handshake does not come to an end")


# ── bridges in lockstep ──


class Lockstep:
    """Bridges without threads: their steps are made here, in turns."""

    def __init__(self) -> None:
        self.bridges: list[bridge.Bridge] = []
        self.sessions: list[Session] = []
        self.sockets: list[socket.socket] = []
        self.actors: list[Callable[[], object]] = []
        """What else shall happen in each round."""

    def small_pair(self) -> tuple[socket.socket, socket.socket]:
        """Two ends, non-blocking, with the smallest buffers the kernel gives."""
        return self._keep(*map(shrink, socket.socketpair()))

    def large_pair(self) -> tuple[socket.socket, socket.socket]:
        """Two ends, non-blocking, that take some hundred kilobytes at once."""
        return self._keep(*socket.socketpair())

    def tcp_pair(self) -> tuple[socket.socket, socket.socket]:
        """Two ends of a TCP connection, non-blocking: the kind that resets."""
        return self._keep(*tcp_pair())

    def small_tcp_pair(self) -> tuple[socket.socket, socket.socket]:
        """Likewise, with the smallest buffers."""
        return self._keep(*map(shrink, tcp_pair()))

    def _keep(self, near: socket.socket, far: socket.socket) -> tuple[socket.socket, socket.socket]:
        for end in (near, far):
            end.setblocking(False)
            self.sockets.append(end)
        return near, far

    def bridge(self, **options: Any) -> bridge.Bridge:
        """One more, with one worker."""
        made = bridge.Bridge(workers=1, start=False, **options)
        self.bridges.append(made)
        return made

    def session(self, context: Any, sock: socket.socket, **options: Any) -> Session:
        """A session over *sock* on a bridge of its own."""
        limits = options.pop("limits", None)
        name = None if getattr(context, "server_side", True) else "localhost"
        options.setdefault("server_hostname", name)
        made = self.bridge(limits=limits).adopt(sock, context, wait=False, **options)
        self.sessions.append(made)  # or it would be closed for having been forgotten
        return made

    def connect(self, address: Any, context: Any, **options: Any) -> Session:
        """A client's session to *address*, likewise."""
        made = self.bridge().connect(address, context, server_hostname="localhost", wait=False, **options)
        self.sessions.append(made)
        return made

    def round(self) -> bool:
        """A step of everybody.  Whether a bridge did anything."""
        moved = False
        for one in self.bridges:
            moved |= one._workers[0].step()
            moved |= one._coordinator.step()
        for act in self.actors:
            act()
        return moved

    def until(self, condition: Callable[[], object]) -> None:
        """Rounds until *condition* holds; AssertionError if it never does."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, [one.snapshot() for one in self.bridges]
            if not self.round() and self.bridges:
                self.bridges[0]._workers[0].step(0.001)

    def settle(self) -> None:
        """Rounds until nobody has anything to do."""
        quiet = 0
        while quiet < 3:
            quiet = 0 if self.round() else quiet + 1

    def close(self) -> None:
        """What is left ends at once."""
        for one in self.bridges:
            one._workers[0].stop()
            one._workers[0].step()
            one._coordinator.step()
        for sock in self.sockets:
            sock.close()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(name="rig")
def new_rig() -> Iterator[Lockstep]:
    """Bridges in lockstep, closed in the end."""
    with Lockstep() as made:
        yield made


@contextlib.contextmanager
def busy(coordinator: Coordinator) -> Iterator[None]:
    """Meanwhile *coordinator* is at work, as others see it."""
    free, taken = coordinator._lock, threading.Lock()
    taken.acquire()
    coordinator._lock = taken  # type: ignore[assignment]
    try:
        yield
    finally:
        coordinator._lock = free


def is_open(session: Session) -> bool:
    """Whether the handshake is done, and the coordinator knows."""
    return isinstance(session._channel.opened.peek(), bridge.SessionInfo)


def is_closed(session: Session) -> bool:
    """Whether the last word about *session* has been said."""
    return session._channel.closed.peek() is not None


def begin_close(session: Session) -> None:
    """`Session.close`, without the wait for it."""
    session._coordinator.close(session._channel, None)


def wants(session: Session) -> dict[str, str]:
    """What each call under way waits for."""
    found: dict[str, str] = session._channel.transport.describe()["wants"]
    return found


def received(session: Session) -> Iterator[Any]:
    """The messages that are there now."""
    inbox = session._own_inbox()
    while not inbox.empty():
        yield inbox.get_nowait()


def engine_of(session: Session) -> TLSEngine:
    """The engine under an open *session*."""
    engine = session._channel.transport._engine
    assert engine is not None
    return engine


@contextlib.contextmanager
def interrupting(handle: Callable[..., None], soon: float = 0.05) -> Iterator[None]:
    """A signal comes *soon*, and *handle* is its handler, called once.

    The signal comes again and again until then: one that comes just before a sleep begins does not end it.
    """

    def handler(*arguments: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not handled:
            handled.append(True)
            handle(*arguments)

    handled: list[bool] = []
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, soon, soon)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def forking(background: Background, interrupt: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Meanwhile *interrupt* runs in another thread: what it is given has a signal handler of this thread fork.

    In the child ForkedError must come out of what this is around.
    """
    children: list[int] = []
    begun, forked = threading.Event(), threading.Event()

    def fork(*_: object) -> None:
        if begun.is_set():
            return
        begun.set()
        children.append(os.fork())
        if children == [0]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))  # or it might wait for ever for who is not there
        else:
            forked.set()

    def send() -> None:
        """Again and again: a signal that comes just before a sleep begins does not end it."""
        give_up = time.monotonic() + PATIENCE
        while not begun.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            begun.wait(0.1)
            assert time.monotonic() < give_up
        assert forked.wait(PATIENCE)

    before = signal.signal(signal.SIGALRM, fork)
    try:
        interrupting = background.run(interrupt, send)
        yield
    except BaseException as error:
        if children == [0]:
            os._exit(not isinstance(error, bridge.ForkedError))
        raise
    finally:
        if children == [0]:
            os._exit(2)
        signal.signal(signal.SIGALRM, before)
    interrupting.result(PATIENCE)
    assert os.waitpid(children[0], 0)[1] == 0
