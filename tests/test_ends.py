"""Ends: clean, truncated and aborted are three different things, for every call, every thread, and for good."""

from __future__ import annotations

import contextlib
import functools
import gc
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from OpenSSL import SSL
from peers import Checker, Pattern, reset, until
from rig import Lockstep, is_open, raw_context, wants

import bridge
from bridge import codecs
from bridge.coordinator import Channel
from bridge.inbox import ReadCredit
from bridge.outbox import Outbox
from bridge.transport import Transport
from bridge.worker import STALLED_TURNS

PATIENCE = 30.0
MUCH = 3 * 1024 * 1024
MESSAGES = [f"message {number}" for number in range(20)]


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1, timeouts=bridge.Timeouts(close_notify=1.0)) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


@pytest.fixture
def stdlib_client(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


@pytest.fixture
def stdlib_server(server_cert: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_cert.certfile, server_cert.keyfile)
    return context


@contextlib.contextmanager
def tcp_pair(buffer: int | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as one:
        for sock in (listener, one) if buffer else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        one.connect(listener.getsockname())
        other = listener.accept()[0]
        other.settimeout(PATIENCE)
        with other:
            yield one, other


Facing = Callable[..., tuple[bridge.Session, ssl.SSLSocket]]


@pytest.fixture
def facing(
    b: bridge.Bridge,
    client_ctx: bridge.Context,
    stdlib_server: ssl.SSLContext,
    tls_version: str,
) -> Iterator[Facing]:
    """Makes our client session, and the stdlib's server on the other end, in this thread's hands."""
    stdlib_server.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    with contextlib.ExitStack() as stack:

        def make(*, buffer: int | None = None, **options: Any) -> tuple[bridge.Session, ssl.SSLSocket]:
            ours, theirs = stack.enter_context(tcp_pair(buffer))
            session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False, **options)
            stack.callback(session.abort)
            peer = stdlib_server.wrap_socket(theirs, server_side=True, suppress_ragged_eofs=False)
            stack.enter_context(peer)
            assert session.info.version == tls_version
            return session, peer

        yield make


@contextlib.contextmanager
def own_pair(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, codec: Any = codecs.Raw
) -> Iterator[tuple[bridge.Session, bridge.Session]]:
    """Both ends ours: client, server."""
    with b.listen(("127.0.0.1", 0), server_ctx, codec=codec) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codec)
        server = listener.accept(PATIENCE)
        try:
            yield client, server
        finally:
            client.abort()
            server.abort()


# ── three ends, and every way to meet them ──


def say_goodbye(peer: ssl.SSLSocket) -> None:
    with contextlib.suppress(OSError):  # nobody may answer
        peer.unwrap()


def end_clean(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    threading.Thread(target=say_goodbye, args=(peer,)).start()


def end_truncated(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    socket.socket.shutdown(peer, socket.SHUT_WR)


def end_reset(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    reset(peer)


def end_aborted(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    session.abort()


def end_closed(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    session.close(timeout=0.1)


def end_broken(session: bridge.Session, peer: ssl.SSLSocket) -> None:
    socket.socket.send(peer, b"\x17\x03\x03\x00\x20" + bytes(32))


ENDS = [
    (end_clean, bridge.EndOfStream, EOFError, "the peer closed the session"),
    (end_truncated, bridge.Truncated, ssl.SSLEOFError, "without close_notify"),
    (end_reset, bridge.PeerReset, ConnectionResetError, "(?i)reset"),
    (end_aborted, bridge.SessionAborted, ConnectionAbortedError, "this side aborted the session"),
    (end_closed, bridge.SessionClosed, ConnectionAbortedError, "this side closed the session"),
    (end_broken, bridge.TLSError, ssl.SSLError, r"\[SSL: .*\] .*while in read"),
]
every_end = pytest.mark.parametrize(
    ("end", "cause", "standard", "words"), ENDS, ids=[entry[0].__name__ for entry in ENDS]
)
RECEIVING: dict[str, Callable[[bridge.Session], Any]] = {
    "recv": lambda session: session.recv(PATIENCE),
    "peek": lambda session: session.peek(PATIENCE),
    "inbox.get": lambda session: session.inbox.get(timeout=PATIENCE),
}


@every_end
@pytest.mark.parametrize("call", RECEIVING)
def test_receiving_tells_the_ends_apart(
    facing: Facing, call: str, end: Any, cause: type[Exception], standard: type[Exception], words: str
) -> None:
    session, peer = facing()
    assert session.end is None
    end(session, peer)
    with pytest.raises(standard, match=words) as caught:
        RECEIVING[call](session)
    assert type(caught.value) is cause and isinstance(caught.value, bridge.ShutDown)
    assert type(session.end) is cause


@every_end
def test_iteration_ends_at_the_clean_end_and_raises_at_any_other(
    facing: Facing, end: Any, cause: type[Exception], standard: type[Exception], words: str
) -> None:
    session, peer = facing(codec=codecs.Lines)
    peer.sendall("".join(f"{message}\n" for message in MESSAGES).encode())
    received = [session.recv(PATIENCE) for _ in range(10)]
    end(session, peer)
    if cause is bridge.EndOfStream:
        received += list(session)
        assert received == MESSAGES
    else:
        with pytest.raises(cause):
            for message in session:
                received.append(message)
        assert received == MESSAGES[: len(received)]


@pytest.mark.parametrize("end", [end_clean, end_truncated])
def test_what_came_before_the_end_is_delivered_before_it(facing: Facing, end: Any) -> None:
    session, peer = facing(codec=codecs.Lines)
    peer.sendall("".join(f"{message}\n" for message in MESSAGES).encode())
    end(session, peer)
    assert [session.recv(PATIENCE) for _ in MESSAGES] == MESSAGES
    with pytest.raises((bridge.EndOfStream, bridge.Truncated)):
        session.recv(PATIENCE)


@every_end
def test_everybody_who_waits_learns_the_same_cause_and_so_does_whoever_comes_later(
    facing: Facing,
    pool: ThreadPoolExecutor,
    end: Any,
    cause: type[Exception],
    standard: type[Exception],
    words: str,
) -> None:
    session, peer = facing()
    waiting = [pool.submit(call, session) for call in RECEIVING.values() for _ in range(2)]
    end(session, peer)
    errors = [future.exception(PATIENCE) for future in waiting]
    with pytest.raises(cause) as sticky:
        session.recv(PATIENCE)
    session.close(timeout=0.1)
    session.abort()
    later = [pool.submit(call, session) for call in RECEIVING.values() for _ in range(2)]
    errors += [future.exception(PATIENCE) for future in later]
    assert {type(error) for error in errors} == {cause}
    assert {str(error) for error in errors} == {str(sticky.value)}
    assert len({id(error) for error in errors}) == len(errors), "tracebacks of threads must not mix"
    assert type(session.end) is cause


@every_end
def test_sending_after_the_end(
    facing: Facing, end: Any, cause: type[Exception], standard: type[Exception], words: str
) -> None:
    """A clean end is the peer's half only; any other end is the same for both directions."""
    session, peer = facing()
    end(session, peer)
    with pytest.raises(cause):
        session.recv(PATIENCE)
    if cause is bridge.EndOfStream:
        session.send(b"our half is open")
        assert session.state in ("peer_closed", "draining", "closed")
        return
    for send in (session.send, session.outbox.put, session.outbox.put_nowait):
        with pytest.raises(cause, match=words):
            send(b"too late")


# ── half closes ──


def test_send_eof_and_then_receive(facing: Facing, pool: ThreadPoolExecutor) -> None:
    session, peer = facing()
    session.send(b"all I have to say")
    session.send_eof()
    with pytest.raises(bridge.SessionClosed, match=r"send_eof\(\) was called"):
        session.send(b"one more thing")
    assert peer.recv(100) == b"all I have to say" and peer.recv(100) == b""
    pattern, checker = Pattern(), Checker(Pattern())
    sent = pool.submit(lambda: [peer.sendall(pattern.at(at, 1024)) for at in range(0, MUCH, 1024)])
    while checker.received < MUCH:
        checker.feed(session.recv(PATIENCE))
    sent.result(PATIENCE)
    assert session.end is None and session.state == "draining"
    peer.unwrap()
    with pytest.raises(bridge.EndOfStream):
        session.recv(PATIENCE)
    session.send_eof()  # again, and after the end
    assert session.close() == bridge.CloseReport(0, True, True)


def test_the_peer_s_send_eof_and_then_send(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    with own_pair(b, server_ctx, client_ctx) as (client, server):
        client.send(b"question")
        client.send_eof()
        assert list(server) == [b"question"]
        sent = pool.submit(lambda: [server.send(bytes(64 * 1024), PATIENCE) for _ in range(48)])
        assert sum(len(client.recv(PATIENCE)) for _ in iter(lambda: client.end, None)) == 0
        assert server.state == "peer_closed"
        received = 0
        while received < MUCH:
            received += len(client.recv(PATIENCE))
        sent.result(PATIENCE)
        server.send_eof()
        with pytest.raises(bridge.EndOfStream):
            client.recv(PATIENCE)
        for session in (client, server):
            assert session.close() == bridge.CloseReport(0, True, True)


def test_send_eof_before_the_handshake_waits_for_it(
    b: bridge.Bridge, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    with tcp_pair() as (ours, theirs):
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False)
        session.send(b"early")
        session.send_eof()
        with stdlib_server.wrap_socket(theirs, server_side=True) as peer:
            assert peer.recv(100) == b"early" and peer.recv(100) == b""
            peer.send(b"late")
            assert session.recv(PATIENCE) == b"late"
            session.abort()


# ── close ──


def test_a_close_that_the_peer_answers(facing: Facing, pool: ThreadPoolExecutor) -> None:
    session, peer = facing()
    session.send(b"goodbye")
    closing = pool.submit(session.close)
    assert peer.recv(100) == b"goodbye" and peer.recv(100) == b""
    peer.unwrap()
    assert closing.result(PATIENCE) == bridge.CloseReport(0, True, True)
    assert session.state == "closed" and bool(closing.result())


def test_close_carries_out_everything_that_was_sent_before(facing: Facing, pool: ThreadPoolExecutor) -> None:
    session, peer = facing(buffer=16 * 1024, limits=bridge.Limits(outbox_bytes=MUCH))
    pattern, checker = Pattern(), Checker(Pattern())
    for position in range(0, MUCH, 4096):
        session.send(bytes(pattern.at(position, 4096)))
    closing = pool.submit(session.close)
    while data := peer.recv(65536):
        checker.feed(data)
    assert checker.received == MUCH
    peer.unwrap()
    assert closing.result(PATIENCE) == bridge.CloseReport(0, True, True)


CutOff = Callable[[float], tuple[bridge.Session, ssl.SSLSocket, "Future[bridge.CloseReport]"]]


@pytest.fixture
def cut_off(facing: Facing, pool: ThreadPoolExecutor) -> CutOff:
    """Makes a session that is closing with much unsent, and has met the end of TCP that its peer has put first."""

    def make(patience: float) -> tuple[bridge.Session, ssl.SSLSocket, Future[bridge.CloseReport]]:
        session, peer = facing(buffer=16 * 1024, limits=bridge.Limits(outbox_bytes=MUCH))
        session.send(bytes(MUCH))
        closing = pool.submit(session.close, patience)
        until(lambda: session.state == "draining")
        peer.sendall(b"late")
        end_truncated(session, peer)
        until(lambda: "read" not in wants(session))
        return session, peer, closing

    return make


def test_close_carries_it_out_also_to_a_peer_that_has_shut_its_half_of_tcp_down(cut_off: CutOff) -> None:
    session, peer, closing = cut_off(PATIENCE)
    received = 0
    while data := peer.recv(65536):
        received += len(data)
    assert received == MUCH
    assert closing.result(PATIENCE) == bridge.CloseReport(0, True, False)
    assert type(session.end) is bridge.SessionClosed


def test_such_a_peer_that_does_not_read_is_given_up_in_time(cut_off: CutOff) -> None:
    session, _, closing = cut_off(2.0)
    report = closing.result(PATIENCE)
    assert report.unsent > 0 and not report.close_notify_sent
    assert type(session._channel.transport.cause) is bridge.CloseTimeout


@pytest.mark.parametrize("how", ["close", "abort", "both"])
def test_close_and_abort_from_many_threads_at_once(facing: Facing, how: str) -> None:
    session, peer = facing()
    reports: list[bridge.CloseReport] = []
    barrier = threading.Barrier(8)

    def end(number: int) -> None:
        barrier.wait(PATIENCE)
        if how == "abort" or (how == "both" and number % 2):
            session.abort()
        reports.append(session.close())

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(OSError):
        assert peer.recv(1) == b""
        peer.unwrap()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(reports) == 8 and len(set(map(repr, reports))) == 1, reports
    assert session.close() == reports[0]
    assert type(session.end) in (bridge.SessionClosed, bridge.SessionAborted)


def test_a_close_in_the_middle_of_the_handshake(
    b: bridge.Bridge, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    with tcp_pair() as (ours, theirs):
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False)
        assert theirs.recv(1) == b"\x16"
        waiting = pool.submit(session.recv)
        assert session.close() == bridge.CloseReport(0, False, False)
        with pytest.raises(bridge.SessionClosed, match="before the session was open"):
            session.info  # noqa: B018
        assert isinstance(waiting.exception(PATIENCE), bridge.SessionClosed)


def test_a_close_with_messages_waiting_for_the_handshake_still_sends_them(
    b: bridge.Bridge, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext, pool: ThreadPoolExecutor
) -> None:
    with tcp_pair() as (ours, theirs):
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False)
        session.send(b"early")
        closing = pool.submit(session.close)
        with stdlib_server.wrap_socket(theirs, server_side=True) as peer:
            assert peer.recv(100) == b"early" and peer.recv(100) == b""
            peer.unwrap()
        assert closing.result(PATIENCE) == bridge.CloseReport(0, True, True)


def test_abort_reports_what_was_lost_and_the_peer_sees_a_reset(facing: Facing) -> None:
    session, peer = facing(buffer=16 * 1024)
    with pytest.raises(bridge.SendTimeout):
        while True:
            session.send(bytes(10_000), timeout=1.0)
    session.abort()
    report = session.close()
    assert report.unsent > 0 and not report.close_notify_sent and not report
    with pytest.raises(ConnectionResetError):
        while True:  # the ciphertext: not every stdlib `ssl` tells a reset from an end
            assert socket.socket.recv(peer, 65536)
    with pytest.raises(bridge.SessionAborted):
        session.flush()


@pytest.mark.parametrize("then", ["close", "abort", "wait"])
def test_after_abort_that_is_the_cause_whoever_asks(facing: Facing, then: str) -> None:
    session, _ = facing()
    session.abort()
    if then != "wait":
        getattr(session, then)()
    for ask in (session.recv, lambda: session.send(b"x"), session.unwrap, session.inbox.get):
        with pytest.raises(bridge.SessionAborted, match="this side aborted the session"):
            ask()
    assert isinstance(session.end, bridge.SessionAborted)


@pytest.mark.parametrize("failing", [False, True])
def test_a_session_as_a_context_manager(facing: Facing, pool: ThreadPoolExecutor, failing: bool) -> None:
    session, peer = facing()
    seen = pool.submit(lambda: (peer.recv(100), peer.recv(100)))
    with contextlib.suppress(KeyError), session:
        session.send(b"hello")
        session.flush(PATIENCE)
        if failing:
            raise KeyError
    if failing:
        with pytest.raises(bridge.SessionAborted):
            session.recv(PATIENCE)
        assert isinstance(seen.exception(PATIENCE), (ConnectionResetError, ssl.SSLEOFError))
    else:
        assert isinstance(session.end, bridge.SessionClosed)
        assert seen.result(PATIENCE) == (b"hello", b"")


@pytest.mark.parametrize(
    ("options", "sends", "cause", "told"),
    [
        ({"codec": codecs.LengthPrefixed}, b"GET / HTTP/1.0\r\n\r\n", bridge.CodecError, bridge.Truncated),
        ({"timeouts": bridge.Timeouts(idle=0.1)}, b"", bridge.IdleTimeout, bridge.EndOfStream),
    ],
)
def test_what_the_peer_is_told_when_a_session_ends_that_tls_has_no_alert_for(
    b: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    options: dict[str, Any],
    sends: bytes,
    cause: type[bridge.SessionEnded],
    told: type[bridge.SessionEnded],
) -> None:
    with b.listen(("127.0.0.1", 0), server_ctx, **options) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        if sends:
            client.send(sends)
        with pytest.raises(cause):
            server.recv(PATIENCE)
        with pytest.raises(told):
            client.recv(PATIENCE)
        client.abort()


# ── unwrap ──


def test_unwrap_and_go_on_in_plain_text(facing: Facing, pool: ThreadPoolExecutor) -> None:
    session, peer = facing()
    session.send(b"over TLS")
    unwrapped = pool.submit(session.unwrap)
    assert peer.recv(100) == b"over TLS" and peer.recv(100) == b""
    plain = peer.unwrap()
    plain.settimeout(PATIENCE)
    sock, extra = unwrapped.result(PATIENCE)
    with sock, plain:
        assert extra == b"" and sock.getblocking()
        plain.send(b"plain 1")
        assert sock.recv(100) == b"plain 1"
        sock.send(b"plain 2")
        assert plain.recv(100) == b"plain 2"
    for call in (lambda: session.send(b"x"), session.recv):
        with pytest.raises(bridge.SessionEnded):
            call()


def test_who_unwraps_again_gets_the_same_socket_while_it_is_open(
    facing: Facing, pool: ThreadPoolExecutor
) -> None:
    session, peer = facing()
    unwrapping = [pool.submit(session.unwrap) for _ in range(2)]
    peer.unwrap().close()
    (sock, _), (same, _) = (one.result(PATIENCE) for one in unwrapping)
    assert sock is same is session.unwrap()[0]
    sock.close()
    with pytest.raises(bridge.EndOfStream):
        session.unwrap()


def test_unwrap_loses_no_plain_text_that_follows_the_peer_s_close_notify_at_once(
    b: bridge.Bridge, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext, pool: ThreadPoolExecutor
) -> None:
    """Even when the session was on its detour through memory, where it reads more than a record at a time."""
    with tcp_pair(16 * 1024) as (ours, theirs):
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        peer = stdlib_server.wrap_bio(incoming, outgoing, server_side=True)

        def pump(call: Callable[[], Any]) -> Any:
            while True:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    theirs.sendall(outgoing.read())
                    data = theirs.recv(65536)
                    assert data, "the other side hung up"
                    incoming.write(data)

        pump(peer.do_handshake)
        theirs.sendall(outgoing.read())
        assert session.info
        sent = 0
        with contextlib.suppress(bridge.SendTimeout):
            while True:
                session.send(bytes(10_000), timeout=1.0)
                sent += 10_000
        unwrapped = pool.submit(session.unwrap, PATIENCE)
        with pytest.raises(ssl.SSLWantReadError):
            peer.unwrap()
        theirs.sendall(outgoing.read() + b"plain at once")
        received = 0
        with pytest.raises(ssl.SSLZeroReturnError):
            while True:
                received += len(pump(lambda: peer.read(65536)))
        assert received == sent
        sock, extra = unwrapped.result(PATIENCE)
        with sock:
            sock.settimeout(5)
            while len(extra) < len(b"plain at once"):
                extra += sock.recv(100)
            assert extra == b"plain at once"


# ── one-way protocols and late bytes ──


def receive_much(session: bridge.Session) -> None:
    checker = Checker(Pattern())
    while checker.received < MUCH:
        checker.feed(session.recv(PATIENCE))


@pytest.mark.parametrize("ending", ["unwrap", "shutdown"])
def test_a_client_that_only_writes_gets_every_byte_through_to_us(
    b: bridge.Bridge,
    server_ctx: bridge.Context,
    stdlib_client: ssl.SSLContext,
    pool: ThreadPoolExecutor,
    ending: str,
) -> None:
    """(One that closes its socket with our tickets unread resets the connection itself, and nobody can help it.)"""
    pattern = Pattern()
    for _ in range(5):
        with b.listen(("127.0.0.1", 0), server_ctx) as listener:
            raw = socket.create_connection(listener.address, PATIENCE)
            with stdlib_client.wrap_socket(raw, server_hostname="localhost") as client:
                session = listener.accept(PATIENCE)
                received = pool.submit(receive_much, session)
                for position in range(0, MUCH, 1 << 16):
                    client.sendall(pattern.at(position, 1 << 16))
                if ending == "unwrap":
                    closing = pool.submit(session_close_after, session)
                    client.unwrap()
                    closing.result(PATIENCE)
                else:
                    socket.socket.shutdown(client, socket.SHUT_WR)
                received.result(PATIENCE)
                with pytest.raises(bridge.EndOfStream if ending == "unwrap" else bridge.Truncated):
                    session.recv(PATIENCE)
                session.close()


def session_close_after(session: bridge.Session) -> None:
    """What a server does: answer the peer's close_notify once it has come."""
    deadline = threading.Event()
    while session.state == "open":
        deadline.wait(0.005)
    session.send_eof()


@pytest.mark.parametrize("talk", [0, 1_000_000], ids=["silent server", "server that talks first"])
def test_as_a_client_that_only_writes_we_get_every_byte_through(
    facing: Facing, pool: ThreadPoolExecutor, talk: int
) -> None:
    """With unread tickets, or even unread messages, closing must not destroy what the server has yet to read."""
    session, peer = facing(timeouts=bridge.Timeouts(close_notify=PATIENCE))
    pattern, checker = Pattern(), Checker(Pattern())

    def serve() -> None:
        peer.sendall(bytes(talk))
        while data := peer.recv(1 << 16):
            checker.feed(data)
        peer.unwrap()

    serving = pool.submit(serve)
    for position in range(0, MUCH if not talk else 200_000, 1 << 16):
        session.send(bytes(pattern.at(position, 1 << 16)), PATIENCE)
    assert session.close().unsent == 0
    serving.result(PATIENCE)
    assert checker.received >= (MUCH if not talk else 200_000)


@pytest.fixture(scope="module")
def mutual(server_cert: KeyPair, ca_file: str) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile, client_ca=ca_file)


@pytest.mark.parametrize("shown", ["none", "of another CA"])
def test_lingering_close_the_alert_arrives_although_the_client_went_on_talking(
    b: bridge.Bridge,
    mutual: bridge.Context,
    stdlib_client: ssl.SSLContext,
    tmp_path: Any,
    shown: str,
    tls_version: str,
) -> None:
    stdlib_client.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    if shown != "none":
        pair = write_key_pair(trustme.CA().issue_cert("mallory@example.org"), tmp_path)
        stdlib_client.load_cert_chain(pair.certfile, pair.keyfile)
    for _ in range(20):
        with b.listen(("127.0.0.1", 0), mutual) as listener:
            raw = socket.create_connection(listener.address, PATIENCE)
            with (
                pytest.raises(ssl.SSLError, match=r"(?i)alert"),
                stdlib_client.wrap_socket(raw, server_hostname="localhost") as client,
            ):
                client.sendall(bytes(1_000_000))
                client.recv(1)


def test_the_alert_of_a_server_reaches_our_caller(
    b: bridge.Bridge, mutual: bridge.Context, client_ctx: bridge.Context, tls_version: str, ca_file: str
) -> None:
    context = bridge.client_context(ca_file, maximum_version=tls_version)
    with b.listen(("127.0.0.1", 0), mutual) as listener:
        for _ in range(20):
            with pytest.raises(bridge.TLSError, match=r"(?i)alert.*(certificate required|handshake failure)"):
                session = b.connect(listener.address, context, server_hostname="localhost")
                session.recv(PATIENCE)


# ── and nothing is left ──


@contextlib.contextmanager
def nothing_left(*kinds: type) -> Iterator[Callable[[], int]]:
    """Tells how many objects of these *kinds* the block has made; when it is over they go, all by themselves."""

    def living() -> set[int]:
        return {id(one) for one in gc.get_objects() if isinstance(one, kinds)}

    gc.collect()
    gc.disable()
    try:
        before = living()  # some of an earlier test may be about to go
        yield lambda: len(living() - before)
        until(lambda: living() <= before)
    finally:
        gc.enable()


def receive_to_the_end(receive: Callable[[], object]) -> type[BaseException] | None:
    try:
        while receive():
            pass
    except bridge.SessionEnded as error:
        return type(error)
    return None


KINDS = {"session": (SSL.Connection, Transport, Channel, Outbox, ReadCredit), "stream": (SSL.Connection,)}


@pytest.mark.parametrize("face", KINDS)
@every_end
def test_what_has_ended_is_freed_without_a_collector(
    b: bridge.Bridge,
    client_ctx: bridge.Context,
    stdlib_server: ssl.SSLContext,
    pool: ThreadPoolExecutor,
    face: str,
    end: Any,
    cause: type[Exception],
    standard: type[Exception],
    words: str,
) -> None:
    """A session is tens of kilobytes, most of it OpenSSL's, of which the garbage collector sees nothing."""
    with nothing_left(*KINDS[face]) as alive, tcp_pair() as (ours, theirs):
        wrapped = pool.submit(stdlib_server.wrap_socket, theirs, server_side=True)
        session: Any
        if face == "session":
            session = b.adopt(ours, client_ctx, server_hostname="localhost")
            receive = functools.partial(session.recv, PATIENCE)
        else:
            session = b.stream(ours, client_ctx, server_hostname="localhost")
            session.handshake()
            receive = functools.partial(session.read, 100)
        with wrapped.result(PATIENCE) as peer:
            assert alive() == len(KINDS[face])
            end(session, peer)
            assert receive_to_the_end(receive) in (cause, None)
            session.close()
        del session, receive


@pytest.mark.parametrize("said", [b"GET / HTTP/1.0\r\n\r\n", b"", b"\x15\x03\x01\x00\x02\x02\x00"])
def test_a_handshake_that_failed_is_freed_without_a_collector(
    b: bridge.Bridge, server_ctx: bridge.Context, said: bytes
) -> None:
    with nothing_left(*KINDS["session"]) as alive, tcp_pair() as (ours, theirs):
        session = b.adopt(ours, server_ctx, wait=False)
        assert alive() >= len(KINDS["session"]) - 1  # a worker makes the connection
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        assert receive_to_the_end(functools.partial(session.recv, PATIENCE)) not in (None, bridge.EndOfStream)
        session.abort()
        del session


def test_what_a_callback_raised_keeps_no_session_alive(
    b: bridge.Bridge, ca_file: str, stdlib_server: ssl.SSLContext, pool: ThreadPoolExecutor
) -> None:
    """Its error is the cause, and OpenSSL's the context: neither may keep the frames it came through."""

    def check(response: bytes, certificate: object) -> bool:
        raise ValueError("a user's bug")

    context = bridge.client_context(ca_file, ocsp_check=check)
    with nothing_left(SSL.Connection) as alive, tcp_pair() as (ours, theirs):
        wrapped = pool.submit(stdlib_server.wrap_socket, theirs, server_side=True)
        session = b.adopt(ours, context, server_hostname="localhost", wait=False)
        assert receive_to_the_end(functools.partial(session.recv, PATIENCE)) is not None
        assert isinstance(session.end, bridge.SessionEnded) and isinstance(session.end.__cause__, ValueError)
        until(lambda: alive() == 0)
        session.abort()
        del session
        with contextlib.suppress(OSError), wrapped.result(PATIENCE):
            pass


def test_behind_the_peers_end_a_half_close_is_one_of_tcp_too(
    b: bridge.Bridge, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext, pool: ThreadPoolExecutor
) -> None:
    """Whoever holds a copy of the descriptor, or goes on holding this one: the peer sees the end now."""
    with tcp_pair() as (ours, theirs):
        wrapped = pool.submit(stdlib_server.wrap_socket, theirs, server_side=True)
        session = b.adopt(ours, client_ctx, server_hostname="localhost")
        with wrapped.result(PATIENCE) as peer, session._channel.transport.sock.dup():  # type: ignore[union-attr]
            unwrapped = pool.submit(peer.unwrap)
            with pytest.raises(bridge.EndOfStream):
                session.recv(PATIENCE)
            session.close()
            with unwrapped.result(PATIENCE) as plain:
                assert plain.recv(1) == b""


@pytest.mark.parametrize("pieces", [50, 3 * STALLED_TURNS])
def test_a_reset_in_the_middle_of_a_slow_record_is_a_reset(
    server_ctx: bridge.Context, tls_version: str, pieces: int
) -> None:
    """Also for the watchdog, which looks into the kernel meanwhile; that tells of a reset but once."""
    with Lockstep() as rig:
        near, far = rig.tcp_pair()
        session = rig.session(server_ctx, near)
        peer = SSL.Connection(raw_context(tls_version), None)
        peer.set_connect_state()
        while not is_open(session):
            with contextlib.suppress(SSL.WantReadError):
                peer.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                far.sendall(peer.bio_read(65536))
            rig.settle()
            with contextlib.suppress(BlockingIOError):
                peer.bio_write(far.recv(65536))
        peer.send(bytes(4000))
        record = peer.bio_read(65536)
        for number in range(pieces):
            far.sendall(record[number : number + 1])
            assert session._channel.worker.step(PATIENCE)
        reset(far)
        rig.until(lambda: session.end is not None)
        assert type(session.end) is bridge.PeerReset
