"""Deadlines: each is total, no byte of the peer's restarts one, and the error says which it was."""

from __future__ import annotations

import contextlib
import math
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import KeyPair

import bridge
from bridge.dialer import Dialer
from bridge.poll import Want

SHORT = 0.3
"""The deadline under test."""
LONG = 10.0
"""By when, at the latest, a deadline of SHORT must have been noticed, on a machine with other things to do."""
PATIENCE = 30.0
NEVER = bridge.Timeouts(
    connect=None, handshake=None, idle=None, write_stall=None, flush=None, close_notify=None
)


@contextlib.contextmanager
def takes(seconds: float) -> Iterator[None]:
    """The block ends after its deadline, and not long after."""
    begin = time.monotonic()
    yield
    elapsed = time.monotonic() - begin
    assert seconds * 0.9 <= elapsed < seconds + LONG, f"a deadline of {seconds} s ended after {elapsed:.2f} s"


def only(**deadline: float) -> bridge.Timeouts:
    """No other deadline than this one can be what ended it."""
    return bridge.Timeouts(**{**vars(NEVER), **deadline})


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1, timeouts=NEVER) as made:  # what is nearer counts
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as one:
        for sock in (listener, one):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        one.connect(listener.getsockname())
        other = listener.accept()[0]
        other.settimeout(PATIENCE)
        with other:
            yield one, other


@pytest.fixture
def stdlib_server(server_cert: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_cert.certfile, server_cert.keyfile)
    return context


@pytest.fixture
def facing(
    b: bridge.Bridge,
    client_ctx: bridge.Context,
    stdlib_server: ssl.SSLContext,
    wire: tuple[socket.socket, socket.socket],
) -> Iterator[Callable[..., tuple[bridge.Session, ssl.SSLSocket]]]:
    """Makes our client session, and the stdlib's server on the other end, in this thread's hands."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> tuple[bridge.Session, ssl.SSLSocket]:
            session = b.adopt(wire[0], client_ctx, server_hostname="localhost", wait=False, **options)
            peer = stdlib_server.wrap_socket(wire[1], server_side=True, suppress_ragged_eofs=False)
            stack.enter_context(peer)
            stack.callback(session.abort)
            return session, peer

        yield make


def fill(session: bridge.Session) -> None:
    """Send until the kernel takes no more, and then some, so that messages are left over."""
    with pytest.raises(bridge.SendTimeout):
        while True:
            session.send(bytes(10_000), timeout=1.0)


def drip(sock: socket.socket, step: Callable[[], Any]) -> int:
    """Every 50 ms call *step*, until the other side ends the connection.  How often that was."""
    sock.settimeout(0.05)
    for steps in range(int(PATIENCE / 0.05)):
        try:
            if not sock.recv(65536, socket.MSG_PEEK):
                return steps
        except TimeoutError:
            pass
        except OSError:
            return steps
        try:
            step()
        except OSError:
            return steps
    raise AssertionError("nobody ended the connection")


# ── connect ──


@pytest.fixture
def blackhole() -> Iterator[Any]:
    """An address on loopback where no connection is ever established: the backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                yield listener.getsockname()
                return
        pytest.skip("this kernel has no end of backlog")


def test_connect(b: bridge.Bridge, client_ctx: bridge.Context, blackhole: Any) -> None:
    with takes(SHORT), pytest.raises(bridge.ConnectTimeout, match=r"no TCP connection within 0\.3 seconds"):
        b.connect(blackhole, client_ctx, server_hostname="localhost", timeouts=only(connect=SHORT))


def test_a_dialer_gives_each_address_its_share_of_the_time(blackhole: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tcp = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        unheard_of = (9_999, socket.SOCK_STREAM, 0, "", ("nowhere", 1))
        retired: list[socket.socket] = []
        addresses = ((*tcp, blackhole), unheard_of, (*tcp, listener.getsockname()))
        dialer = Dialer(addresses, 30.0, retired)
        assert dialer.dial(0.0) is Want.WRITE and dialer.deadline == 10.0
        tried = dialer.sock
        assert dialer.dial(9.9) is Want.WRITE and dialer.sock is tried
        while isinstance(connected := dialer.dial(10.0), Want):
            assert dialer.sock is not tried and dialer.deadline is None  # the last may take what is left
        assert retired == [tried] and connected.getpeername() == listener.getsockname()
        connected.close()
        for sock in retired:
            sock.close()
    dialer = Dialer((unheard_of,), None, [])
    with pytest.raises(bridge.ConnectFailed, match="cannot connect to nowhere:1"):
        dialer.dial(0.0)


def test_an_address_takes_no_more_than_its_share_of_the_call_s_time(
    b: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    blackhole: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        tcp = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        found = [(*tcp, blackhole), (*tcp, listener.address)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        session = b.connect(("localhost", 1), client_ctx, timeout=4)
        assert session.info.peername == listener.address
        session.abort()


def test_connect_in_the_words_of_the_call(
    b: bridge.Bridge, client_ctx: bridge.Context, blackhole: Any
) -> None:
    with takes(SHORT), pytest.raises(TimeoutError, match=r"within 0\.3 seconds: no TCP yet") as caught:
        b.connect(blackhole, client_ctx, server_hostname="localhost", timeout=SHORT, timeouts=NEVER)
    assert type(caught.value) is bridge.ConnectTimeout


def test_the_timeout_of_the_call_spans_connect_and_handshake(
    b: bridge.Bridge, client_ctx: bridge.Context
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with takes(SHORT), pytest.raises(bridge.ConnectTimeout, match="no TLS session.*TCP is connected"):
            b.connect(
                mute.getsockname(), client_ctx, server_hostname="localhost", timeout=SHORT, timeouts=NEVER
            )
        with mute.accept()[0] as sock:
            sock.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass


# ── handshake ──


def test_handshake_with_a_mute_server(b: bridge.Bridge, client_ctx: bridge.Context) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        takes(SHORT),
        pytest.raises(bridge.HandshakeTimeout, match=r"handshake was not done within 0\.3 seconds"),
    ):
        b.connect(mute.getsockname(), client_ctx, server_hostname="localhost", timeouts=only(handshake=SHORT))


def test_handshake_with_a_mute_client(b: bridge.Bridge, server_ctx: bridge.Context) -> None:
    with (
        b.listen(
            ("127.0.0.1", 0), server_ctx, timeouts=only(handshake=SHORT, close_notify=SHORT)
        ) as listener,
        takes(SHORT),
        socket.create_connection(listener.address, PATIENCE) as client,
    ):
        assert client.recv(1) == b""


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    return outgoing.read()


def test_a_byte_now_and_then_does_not_restart_the_handshake_of_a_client(
    b: bridge.Bridge, server_ctx: bridge.Context
) -> None:
    hello = iter(client_hello())
    with (
        b.listen(("127.0.0.1", 0), server_ctx, timeouts=only(handshake=1.0, close_notify=SHORT)) as listener,
        takes(1.0),
        socket.create_connection(listener.address, PATIENCE) as client,
    ):
        assert drip(client, lambda: client.send(bytes([next(hello)]))) >= 2


def test_a_byte_now_and_then_does_not_restart_the_handshake_of_a_server(
    b: bridge.Bridge,
    client_ctx: bridge.Context,
    wire: tuple[socket.socket, socket.socket],
    pool: ThreadPoolExecutor,
) -> None:
    record = iter(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03" + bytes(10_000))
    with takes(1.0):
        session = pool.submit(
            b.adopt,
            wire[0],
            client_ctx,
            server_hostname="localhost",
            timeouts=only(handshake=1.0, close_notify=SHORT),
        )
        wire[1].recv(65536)
        assert drip(wire[1], lambda: wire[1].send(bytes([next(record)]))) >= 2
        with pytest.raises(bridge.HandshakeTimeout):
            session.result(PATIENCE)


def test_a_renegotiation_that_the_peer_ignores(
    b: bridge.Bridge,
    server_cert: KeyPair,
    ca_file: str,
    wire: tuple[socket.socket, socket.socket],
) -> None:
    context = bridge.server_context(
        server_cert.certfile, server_cert.keyfile, renegotiation=True, maximum_version="TLSv1.2"
    )
    session = b.adopt(wire[0], context, wait=False, timeouts=only(handshake=1.0, close_notify=SHORT))
    with ssl.create_default_context(cafile=ca_file).wrap_socket(wire[1], server_hostname="localhost"):
        assert session.info.version == "TLSv1.2"
        with takes(1.0):
            session.renegotiate()
            with pytest.raises(bridge.HandshakeTimeout, match="did not renegotiate within 1 seconds"):
                session.recv(PATIENCE)


# ── idle ──


def test_idle(facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]]) -> None:
    with takes(SHORT), pytest.raises(bridge.IdleTimeout, match=r"either direction for 0\.3 seconds"):
        session, peer = facing(timeouts=only(idle=SHORT, close_notify=SHORT))
        session.recv()
    assert peer.recv(1) == b"", "it parts politely: with close_notify"


@pytest.mark.parametrize("way", ["received", "sent"])
def test_a_byte_either_way_is_no_idleness(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], way: str
) -> None:
    session, peer = facing(timeouts=only(idle=1.0, close_notify=SHORT))
    with takes(2.0):
        for _ in range(10):
            with pytest.raises(bridge.ReceiveTimeout):
                session.recv(timeout=0.1)
            if way == "sent":
                session.send(b"x")
                assert peer.recv(1) == b"x"
            else:
                peer.send(b"x")
                assert session.recv(PATIENCE) == b"x"
        with pytest.raises(bridge.IdleTimeout):
            session.recv()


# ── write stall ──


def test_write_stall(facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]]) -> None:
    session, _ = facing(timeouts=only(write_stall=1.0, close_notify=SHORT))
    begin = time.monotonic()
    with pytest.raises(bridge.WriteStalled, match="did not take one record within 1 seconds"):
        while True:
            session.send(bytes(10_000))
    assert 0.9 <= time.monotonic() - begin < 1 + LONG


def test_reading_a_byte_now_and_then_does_not_restart_the_write_stall(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor
) -> None:
    session, peer = facing(timeouts=only(write_stall=1.0, close_notify=SHORT))
    read: list[bytes] = []

    def dribble() -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError):
            while session.end is None:
                read.append(socket.socket.recv(peer, 1))
                pause.wait(0.05)

    dribbling = pool.submit(dribble)
    begin = time.monotonic()
    with pytest.raises(bridge.WriteStalled):
        while True:
            session.send(bytes(10_000))
    assert 0.9 <= time.monotonic() - begin < 1 + LONG
    dribbling.result(PATIENCE)
    assert len(read) >= 5


def test_a_slow_peer_that_takes_records_is_not_stalled(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor
) -> None:
    """A message that takes longer than the deadline as a whole, but no record of it does."""
    session, peer = facing(timeouts=only(write_stall=1.0, close_notify=SHORT))
    pause, size = threading.Event(), 600_000

    def read() -> int:
        count = 0
        while count < size:
            count += len(peer.recv(16_384))
            pause.wait(0.06)
        return count

    reading = pool.submit(read)
    with takes(1.5):
        session.send(bytes(size))
        session.flush(PATIENCE)
        assert reading.result(PATIENCE) == size


# ── flush, send, receive, accept: bounded waits that harm nothing ──


@pytest.mark.parametrize("where", ["call", "timeouts"])
def test_flush(facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], where: str) -> None:
    timeouts = only(flush=SHORT, close_notify=SHORT) if where == "timeouts" else NEVER
    session, peer = facing(timeouts=timeouts)
    fill(session)
    with (
        takes(SHORT),
        pytest.raises(bridge.OperationTimeout, match=r"had not left within 0\.3 seconds") as caught,
    ):
        session.flush(*([SHORT] if where == "call" else []))
    assert not isinstance(caught.value, bridge.SessionEnded)
    peer.send(b"still here")
    assert session.recv(PATIENCE) == b"still here"


def test_flush_is_not_restarted_by_a_peer_that_dribbles(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor
) -> None:
    session, peer = facing(timeouts=NEVER)
    fill(session)
    over, pause = threading.Event(), threading.Event()

    def read() -> int:
        count = 0
        while not over.is_set():
            count += len(peer.recv(4_000))
            pause.wait(0.05)
        return count

    reading = pool.submit(read)
    try:
        with takes(SHORT), pytest.raises(bridge.OperationTimeout):
            session.flush(SHORT)
    finally:
        over.set()
    assert reading.result(PATIENCE) > 0


def test_receiving_and_accepting(
    b: bridge.Bridge, server_ctx: bridge.Context, facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]]
) -> None:
    session, peer = facing()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        waits: list[Callable[[], Any]] = [
            lambda: session.recv(timeout=SHORT),
            lambda: session.peek(timeout=SHORT),
            lambda: session.inbox.get(timeout=SHORT),
            lambda: bridge.Inbox().get(timeout=SHORT),
            lambda: listener.accept(timeout=SHORT),
        ]
        for wait in waits:
            with takes(SHORT), pytest.raises(TimeoutError) as caught:
                wait()
            assert isinstance(caught.value, bridge.ReceiveTimeout) and isinstance(caught.value, queue.Empty)
    peer.send(b"unharmed")
    assert session.recv(PATIENCE) == b"unharmed"


# ── close and unwrap ──


def test_close_with_a_peer_that_never_answers(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]],
) -> None:
    session, peer = facing(timeouts=only(close_notify=SHORT))
    session.send(b"last words")
    with takes(SHORT):
        report = session.close()
    assert report == bridge.CloseReport(unsent=0, close_notify_sent=True, close_notify_received=False)
    assert report
    assert peer.recv(100) == b"last words" and peer.recv(1) == b""
    with pytest.raises(bridge.SessionClosed):
        session.recv()


def test_close_is_not_prolonged_by_a_peer_that_goes_on_talking(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor
) -> None:
    session, peer = facing(timeouts=only(close_notify=SHORT))

    def talk() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.send(bytes(1_000))

    assert session.info
    talking = pool.submit(talk)
    with takes(SHORT):
        assert not session.close().close_notify_received
    talking.result(PATIENCE)


@pytest.mark.parametrize("where", ["call", "timeouts"])
def test_close_with_a_peer_that_does_not_take_what_was_sent(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], where: str
) -> None:
    session, _ = facing(timeouts=only(flush=SHORT, close_notify=SHORT) if where == "timeouts" else NEVER)
    fill(session)
    held = session.outbox.qsize()
    with takes(SHORT):
        report = session.close(*([SHORT] if where == "call" else []))
    assert 0 < report.unsent <= held and not report.close_notify_sent and not report


def test_a_second_close_may_be_more_impatient(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor
) -> None:
    session, _ = facing(timeouts=NEVER)
    others: list[Future[bridge.CloseReport]] = [
        pool.submit(session.close, at_most) for at_most in (None, 1000)
    ]
    with takes(SHORT):
        report = session.close(SHORT)
    assert [other.result(PATIENCE) for other in others] == [report] * 2


def test_unwrap(facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]]) -> None:
    session, _ = facing(timeouts=only(close_notify=SHORT))
    with takes(SHORT), pytest.raises(bridge.CloseTimeout, match="the peer's close_notify"):
        session.unwrap()


def test_unwrap_with_a_peer_that_does_not_take_what_was_sent(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]],
) -> None:
    session, _ = facing(timeouts=only(close_notify=SHORT))
    fill(session)
    with takes(SHORT), pytest.raises(bridge.CloseTimeout, match=r"\d+ bytes to leave"):
        session.unwrap(SHORT)


def test_a_failed_session_does_not_linger_for_ever(b: bridge.Bridge, server_ctx: bridge.Context) -> None:
    """After the alert, late input is swallowed for `close_notify` seconds in all, however it drips in."""
    with (
        b.listen(
            ("127.0.0.1", 0), server_ctx, timeouts=only(handshake=PATIENCE, close_notify=SHORT)
        ) as listener,
        socket.create_connection(listener.address, PATIENCE) as client,
        takes(SHORT),
    ):
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        while client.recv(1000):
            pass
        with pytest.raises(OSError):
            for _ in range(int(PATIENCE / 0.05)):
                client.send(b"x")
                threading.Event().wait(0.05)


def test_closing_the_bridge_is_bounded_over_all_sessions_together(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    with contextlib.ExitStack() as stack:
        b = bridge.Bridge(workers=1, timeouts=NEVER)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sessions = []
        for _ in range(5):
            address = listener.getsockname()
            sessions.append(b.connect(address, client_ctx, server_hostname="localhost", wait=False))
            peer = listener.accept()[0]
            stack.enter_context(stdlib_server.wrap_socket(peer, server_side=True))
        with takes(SHORT):
            b.close(SHORT)
        assert all(isinstance(session.end, bridge.SessionClosed) for session in sessions)


def test_closing_the_bridge_does_not_wait_longer_for_streams_that_linger(
    server_ctx: bridge.Context, wire: tuple[socket.socket, socket.socket], pool: ThreadPoolExecutor
) -> None:
    b = bridge.Bridge(workers=1, timeouts=NEVER)
    stream = b.stream(wire[0], server_ctx)
    wire[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(bridge.NotTLS):
        stream.handshake(PATIENCE)
    try:
        with takes(SHORT):
            pool.submit(b.close, SHORT).result(LONG)
    finally:
        wire[1].close()


# ── what is no deadline ──

UNUSABLE = [-1, -0.001, -(10**400), math.nan, "5", True, []]


@pytest.mark.parametrize("value", UNUSABLE, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("field", ["connect", "handshake", "idle", "write_stall", "flush", "close_notify"])
def test_unusable_timeouts_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(bridge.ConfigurationError, match=rf"^Timeouts\.{field} must (not )?be .*(?i:seconds)"):
        bridge.Timeouts(**{field: value})


def test_a_deadline_of_no_time_at_all_is_refused_where_no_session_could_keep_it() -> None:
    for field in ("connect", "handshake", "idle", "write_stall"):
        with pytest.raises(bridge.ConfigurationError, match=rf"^Timeouts\.{field} is 0, .* None is no limit"):
            bridge.Timeouts(**{field: 0})
    assert bridge.Timeouts(flush=0, close_notify=0) != bridge.Timeouts()


@pytest.mark.parametrize("value", [-1, math.nan, "5"], ids=repr)
def test_unusable_timeouts_of_calls_are_refused_and_nothing_is_lost(
    b: bridge.Bridge,
    client_ctx: bridge.Context,
    server_ctx: bridge.Context,
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]],
    value: Any,
) -> None:
    session, peer = facing()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener, socket.socket() as spare:
        calls: list[Callable[[], Any]] = [
            lambda: session.send(b"never", timeout=value),
            lambda: session.outbox.put(b"never", timeout=value),
            lambda: session.recv(timeout=value),
            lambda: session.peek(timeout=value),
            lambda: session.inbox.get(timeout=value),
            lambda: session.flush(timeout=value),
            lambda: session.unwrap(timeout=value),
            lambda: session.close(timeout=value),
            lambda: listener.accept(timeout=value),
            lambda: b.connect(listener.address, client_ctx, server_hostname="localhost", timeout=value),
            lambda: b.adopt(spare, client_ctx, server_hostname="localhost", timeout=value),
            lambda: b.close(timeout=value),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(ValueError, match="timeout must"):
                call()
                pytest.fail(f"call {number} took {value!r}")
        assert spare.fileno() != -1
    session.send(b"unharmed")
    assert peer.recv(100) == b"unharmed"


@pytest.mark.parametrize("value", [-1, math.nan, "5"], ids=repr)
def test_unusable_timeouts_of_a_shared_inbox_are_refused(value: Any) -> None:
    """As `queue.Queue.get` refuses them, which raises ValueError too."""
    with pytest.raises(ValueError, match="timeout must"):
        bridge.Inbox().get(timeout=value)


@pytest.mark.parametrize("what", ["timeouts", "limits"])
def test_a_dict_is_no_timeouts(b: bridge.Bridge, client_ctx: bridge.Context, what: str) -> None:
    for call in (
        lambda: bridge.Bridge(**{what: {"idle": 5}}),
        lambda: b.connect(("127.0.0.1", 1), client_ctx, **{what: {"idle": 5}}),
    ):
        with pytest.raises(bridge.ConfigurationError, match=rf"{what} must be a bridge\.{what.title()}"):
            call()


@pytest.mark.parametrize(
    "seconds",
    [30 * 86400.0, 1e12, 1e300, 10**400, math.inf],
    ids=["30 days", "1e12", "1e300", "1e400", "inf"],
)
def test_a_deadline_in_the_far_future_is_as_good_as_none(
    facing: Callable[..., tuple[bridge.Session, ssl.SSLSocket]], pool: ThreadPoolExecutor, seconds: float
) -> None:
    """poll(2) counts milliseconds in an int: 30 days are more than it takes."""
    fields = ("connect", "handshake", "idle", "write_stall", "flush", "close_notify")
    session, peer = facing(timeouts=bridge.Timeouts(**dict.fromkeys(fields, seconds)))
    shared = bridge.Inbox()
    got = pool.submit(shared.get, True, seconds)
    while not (shared._sleepers or got.done()):
        threading.Event().wait(0.005)
    shared.put((None, "a word"))
    assert got.result(PATIENCE) == (None, "a word")
    received = pool.submit(session.recv, seconds)
    session.send(b"ping", timeout=seconds)
    session.flush(timeout=seconds)
    assert peer.recv(10) == b"ping"
    peer.send(b"pong")
    assert received.result(PATIENCE) == b"pong"
    received = pool.submit(session.peek, seconds)
    peer.send(b"again")
    assert received.result(PATIENCE) == b"again"
    closed = pool.submit(session.close, seconds)
    assert peer.unwrap()
    assert closed.result(PATIENCE)
