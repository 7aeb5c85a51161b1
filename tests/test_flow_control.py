"""Flow control both ways, counted in bytes and messages: bounded memory, whole messages, nobody held up by others."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import KeyPair
from peers import Checker, Pattern, until
from rig import Lockstep, Raw, busy, is_open, raw_context

import bridge
from bridge import codecs, connection
from bridge.codecs import Codec
from bridge.coordinator import MESSAGE_BYTES
from bridge.limits import RECORD_BYTES

DEADLINE = 30.0
STALLED = 1.0
"""Seconds without room after which a socket on loopback is taken for stalled."""
BUFFER = 32 * 1024
"""What sockets are given to buffer; the kernel doubles it, and rounds."""


def framed() -> codecs.LengthPrefixed:
    return codecs.LengthPrefixed(4)


def numbered(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") + bytes(size - 4)


def kernel_buffers(*socks: socket.socket) -> int:
    """The most that the kernel holds between the sender's and the receiver's end, as it says itself."""
    names = (socket.SO_SNDBUF, socket.SO_RCVBUF)
    return sum(sock.getsockopt(socket.SOL_SOCKET, name) for sock in socks for name in names)


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one TCP connection with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as one:
        for sock in (listener, one):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        one.settimeout(DEADLINE)
        one.connect(listener.getsockname())
        other = listener.accept()[0]
        other.settimeout(DEADLINE)
        with other:
            yield one, other


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def stdlib_client(ca_file: str, tls_version: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    return context


@pytest.fixture
def stdlib_server(server_cert: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_cert.certfile, server_cert.keyfile)
    return context


@contextlib.contextmanager
def facing_stdlib(
    b: bridge.Bridge, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext, **options: Any
) -> Iterator[tuple[bridge.Session, ssl.SSLSocket]]:
    """Our client session, and the stdlib's server on the other end, in this thread's hands."""
    with tcp_pair() as (ours, theirs):
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False, **options)
        with stdlib_server.wrap_socket(theirs, server_side=True) as peer:
            yield session, peer


def fill(send: Callable[[bytes], None], size: int, most: int) -> int:
    """Send numbered messages until there is no room for long.  How many were accepted."""
    for number in range(most):
        try:
            send(numbered(number, size))
        except queue.Full:
            return number
    raise AssertionError(f"the peer does not read, and yet {most} messages of {size} bytes were accepted")


def read_frames(peer: ssl.SSLSocket, count: int) -> Iterator[bytes]:
    stream = peer.makefile("rb")
    for _ in range(count):
        size = int.from_bytes(stream.read(4), "big")
        yield stream.read(size)


# ── whose limits ──


@pytest.mark.parametrize("way", ["connect", "adopt", "listen"])
def test_the_nearest_limits_and_timeouts_win(
    server_ctx: bridge.Context, client_ctx: bridge.Context, way: str
) -> None:
    limits = bridge.Limits(message_bytes=10, outbox_bytes=20, inbox_bytes=30)
    timeouts = bridge.Timeouts(flush=40, close_notify=50, idle=60)
    with bridge.Bridge(workers=1) as b, bridge.Bridge(workers=1) as far, contextlib.ExitStack() as stack:
        mine: dict[str, Any] = {"limits": limits, "timeouts": timeouts}
        listening = b.listen(("127.0.0.1", 0), server_ctx, **(mine if way == "listen" else {}))
        address, name = listening.address, {"server_hostname": "localhost"}
        if way == "connect":
            session = b.connect(address, client_ctx, **name, **mine)
        elif way == "adopt":
            session = b.adopt(socket.create_connection(address), client_ctx, **name, **mine)
        else:
            stack.callback(far.connect(address, client_ctx, **name).abort)
            session = listening.accept(DEADLINE)
        stack.callback(session.abort)
        session.send(bytes(10))
        with pytest.raises(ValueError, match=r"over Limits\.message_bytes, which is 10"):
            session.send(bytes(11))
        channel = session._channel
        assert (channel.outbox._limit, channel.credit._limit) == (20, 30)
        assert session._timeouts is channel.transport._plan.timeouts is timeouts
        if way != "listen":
            listening.accept(DEADLINE).abort()


# ── receiving ──


def test_a_reader_that_stops_stops_the_peer_within_bounds_and_then_gets_every_byte(
    server_ctx: bridge.Context, stdlib_client: ssl.SSLContext
) -> None:
    limits = bridge.Limits(inbox_bytes=64 * 1024)
    pattern, total = Pattern(), 4_000_000
    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        tcp_pair() as (ours, theirs),
        ThreadPoolExecutor() as pool,
    ):
        room = kernel_buffers(ours, theirs)
        session = b.adopt(ours, server_ctx, wait=False)
        with stdlib_client.wrap_socket(theirs, server_hostname="localhost") as peer:
            accepted = 0
            peer.settimeout(STALLED)
            with contextlib.suppress(TimeoutError):
                while accepted < total:
                    accepted += peer.send(pattern.at(accepted, 1000))
            held = b.snapshot().sessions[0].inbox_bytes
            assert limits.inbox_bytes <= held <= limits.inbox_bytes + 2 * RECORD_BYTES
            assert session.inbox.full()
            assert accepted <= held + room

            peer.settimeout(DEADLINE)
            rest = pool.submit(peer.sendall, b"".join(part(pattern, accepted, total)))
            checker = Checker(pattern)
            while checker.received < total:
                checker.feed(session.recv(DEADLINE))
            rest.result(DEADLINE)
            assert checker.received == total and session.inbox.empty() and not session.inbox.full()
            session.abort()


@pytest.mark.parametrize("total", [1 << 30, 1], ids=["there is room in all", "there is none"])
@pytest.mark.parametrize("codec", [bridge.codecs.Lines, bridge.codecs.Raw])
def test_messages_of_one_byte_stay_within_bounds(
    server_ctx: bridge.Context, tls_version: str, codec: type[Codec[Any]], total: int
) -> None:
    """A message costs 64 bytes at least, so a byte may; before it is known no more than a record is read.

    So it is also where all sessions together have no room: none may starve, and none may have more than that.
    """
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        limits = bridge.Limits(inbox_bytes=64 * 1024, total_bytes=total)
        ours = lockstep.bridge(limits=limits)
        ours._inbox_tally.add(1)  # somebody else's
        session = ours.adopt(near, server_ctx, codec=codec, wait=False)
        peer = Raw(raw_context(tls_version), far, False)
        lockstep.until(lambda: peer.handshake() is None)
        assert peer.write_until_stuck(b"\n" * RECORD_BYTES) > 8 * RECORD_BYTES
        lockstep.settle()
        held = ours.snapshot().sessions[0].inbox_bytes
        if codec is bridge.codecs.Lines:
            assert session.inbox.qsize() == RECORD_BYTES and held == MESSAGE_BYTES * RECORD_BYTES
        elif total == 1:
            assert held == RECORD_BYTES
        else:
            assert limits.inbox_bytes <= held <= limits.inbox_bytes + RECORD_BYTES
        session.abort()
        lockstep.settle()


def test_records_of_a_byte_stay_within_bounds_while_the_coordinator_is_busy(
    server_ctx: bridge.Context, tls_version: str
) -> None:
    """Which cannot say yet how many messages they are."""
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        ours = lockstep.bridge(limits=bridge.Limits(inbox_bytes=64 * MESSAGE_BYTES))
        session = ours.adopt(near, server_ctx, wait=False)
        peer = Raw(raw_context(tls_version), far, False)
        lockstep.until(lambda: peer.handshake() is None)
        lockstep.until(lambda: is_open(session))
        lockstep.settle()
        worker = ours._workers[0]
        with busy(ours._coordinator):
            for _ in range(200):
                peer.write(b"x")
                worker.step()
            assert len(ours._coordinator._mailbox) == 64
        lockstep.settle()
        taken = sum(len(session.recv(0)) for _ in range(session.inbox.qsize()))
        while taken < 200:
            lockstep.until(lambda: not session.inbox.empty())
            taken += len(session.recv(0))
        assert session._channel.credit.held() == 0
        session.abort()
        lockstep.settle()


@pytest.fixture
def talk(tls_version: str, server_ctx: bridge.Context) -> Iterator[tuple[Lockstep, bridge.Session, Raw]]:
    """A session that gets lines, and its peer."""
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        session = lockstep.session(server_ctx, near, codec=codecs.Lines)
        peer = Raw(raw_context(tls_version), far, False)
        lockstep.until(lambda: peer.handshake() is None)
        lockstep.settle()
        yield lockstep, session, peer
        session.abort()
        lockstep.settle()


def test_whoever_waited_for_a_record_to_be_decoded_reads_on_while_there_is_room(
    talk: tuple[Lockstep, bridge.Session, Raw],
) -> None:
    """An inbox that is full is read for again at half of it; this one is not full."""
    lockstep, session, peer = talk
    line = b"y" * 1023 + b"\n"
    for _ in range(10):
        peer.write(16 * line)
        lockstep.settle()
    held = session._channel.credit.held()
    assert held > bridge.Limits().inbox_bytes // 2
    with busy(session._coordinator):
        for _ in range(2):
            peer.write(16 * line)
            for _ in range(3):
                lockstep.bridges[0]._workers[0].step()
    lockstep.settle()
    assert session._channel.credit.held() == held + 32 * len(line) and not session.inbox.full()


def test_no_record_is_decoded_before_the_session_is_known_to_be_open(
    server_ctx: bridge.Context, tls_version: str
) -> None:
    """Though it come in the same turn as the end of the handshake."""
    known: list[bool] = []

    class Looking(codecs.Lines):
        def decode(self, data: bytes) -> list[str]:
            known.append(is_open(session))
            return super().decode(data)

    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        session = lockstep.session(server_ctx, near, codec=Looking)
        peer = Raw(raw_context(tls_version), far, False)
        worker = session._channel.worker
        while peer.handshake() is not None:
            worker.step()
        peer.write(b"y" * (RECORD_BYTES - 1) + b"\n")
        lockstep.until(lambda: session.inbox.qsize() == 1)
        assert known == [True]
        session.abort()
        lockstep.settle()


def test_a_codec_is_not_run_with_another_session_s_lock(
    talk: tuple[Lockstep, bridge.Session, Raw], server_ctx: bridge.Context, tls_version: str
) -> None:
    """Or else a receiver of that session would wait for it, longer than its timeout may be."""
    lockstep, session, peer = talk
    locks: list[bool] = []

    class Looking(codecs.Lines):
        def decode(self, data: bytes) -> list[str]:
            locks.append(session._channel.transport.lock._is_owned())  # type: ignore[attr-defined]
            return super().decode(data)

    near, far = lockstep.large_pair()
    other = lockstep.bridges[0].adopt(near, server_ctx, codec=Looking, wait=False)
    friend = Raw(raw_context(tls_version), far, False)
    lockstep.until(lambda: friend.handshake() is None)
    lockstep.settle()
    for _ in range(4):  # whichever of both has the first turn
        friend.write(b"a line\n")
        peer.write(b"z" * (RECORD_BYTES - 1) + b"\n")
        lockstep.settle()
    assert len(locks) == 4 and not any(locks)
    other.abort()


def test_what_comes_with_the_end_of_the_handshake_is_not_decoded_before_that_is_known(
    server_ctx: bridge.Context, tls_version: str
) -> None:
    """Or a codec that refuses it would end a session of which a shared inbox has never heard."""
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        session = lockstep.session(server_ctx, near, codec=codecs.Lines)
        peer = Raw(raw_context(tls_version), far, False)
        known: list[bool] = []

        class Looking(codecs.Lines):
            def decode(self, data: bytes) -> list[str]:
                known.append(is_open(session))
                return super().decode(data)

        session._channel.codec = Looking()
        line = b"z" * (RECORD_BYTES - 1) + b"\n"
        while peer.handshake() is not None:
            lockstep.round()
        peer.write(line)  # with the client's Finished, in TLS 1.3
        lockstep.until(lambda: not session.inbox.empty())
        assert known and all(known) and session.recv(0) == line[:-1].decode()
        session.abort()
        lockstep.settle()


@pytest.mark.parametrize("messages", [1, 100])
def test_many_short_messages_at_once_are_read_to_the_end(
    server_ctx: bridge.Context, stdlib_client: ssl.SSLContext, messages: int
) -> None:
    """Reading record by record stops and goes on with the one who takes them."""
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(inbox_bytes=messages)) as b,
        tcp_pair() as (ours, theirs),
        ThreadPoolExecutor() as pool,
    ):
        session = b.adopt(ours, server_ctx, codec=bridge.codecs.Lines, wait=False)
        with stdlib_client.wrap_socket(theirs, server_hostname="localhost") as peer:
            lines = [str(number) for number in range(20_000)]
            sent = pool.submit(peer.sendall, "".join(f"{line}\n" for line in lines).encode())
            assert [session.recv(DEADLINE) for _ in lines] == lines
            sent.result(DEADLINE)
            session.abort()


def part(pattern: Pattern, begin: int, end: int) -> Iterator[bytes]:
    for position in range(begin, end, 1000):
        yield bytes(pattern.at(position, min(1000, end - position)))


def test_the_reader_is_stopped_again_and_again(
    server_ctx: bridge.Context, stdlib_client: ssl.SSLContext
) -> None:
    limits = bridge.Limits(inbox_bytes=1)
    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        tcp_pair() as (ours, theirs),
        ThreadPoolExecutor() as pool,
    ):
        session = b.adopt(ours, server_ctx, codec=framed, wait=False)
        with stdlib_client.wrap_socket(theirs, server_hostname="localhost") as peer:
            messages = [numbered(number, 5_000) for number in range(200)]
            sent = pool.submit(peer.sendall, b"".join(framed().encode(message) for message in messages))
            most = 0
            for message in messages:
                assert session.recv(DEADLINE) == message
                most = max(most, b.snapshot().sessions[0].inbox_bytes)
            sent.result(DEADLINE)
            assert most <= 1 + RECORD_BYTES + 5_004 + 5 * MESSAGE_BYTES, (
                "a record, and what completes its first message"
            )
            session.abort()


@pytest.mark.parametrize(
    ("codec", "wire", "message"),
    [
        (framed, (200_000).to_bytes(4, "big") + b"x" * 200_000, b"x" * 200_000),
        (codecs.Lines, b"y" * 200_000 + b"\n", "y" * 200_000),
        (lambda: codecs.Delimited(b"\0"), b"z" * 200_000 + b"\0", b"z" * 200_000),
    ],
    ids=["LengthPrefixed", "Lines", "Delimited"],
)
def test_a_message_larger_than_the_inbox_arrives_all_the_same(
    server_ctx: bridge.Context, ca_file: str, codec: Any, wire: bytes, message: Any
) -> None:
    limits = bridge.Limits(inbox_bytes=1_000, total_bytes=1_000)
    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        tcp_pair() as (ours, theirs),
        ThreadPoolExecutor() as pool,
    ):
        session = b.adopt(ours, server_ctx, codec=codec, wait=False)
        context = ssl.create_default_context(cafile=ca_file)
        with context.wrap_socket(theirs, server_hostname="localhost") as peer:
            sent = pool.submit(peer.sendall, wire * 3)
            for _ in range(3):
                assert session.recv(DEADLINE) == message
            sent.result(DEADLINE)
            session.abort()


# ── sending ──


@pytest.mark.parametrize("how", ["send", "put", "put_nowait"])
def test_a_message_without_room_is_not_sent_at_all(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext, how: str
) -> None:
    """In `send`, and in the outbox as a queue: TimeoutError and queue.Full, and the peer sees nothing of it."""
    size, limits = 3_000, bridge.Limits(outbox_bytes=20_000)
    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, peer),
    ):
        accepted = fill(lambda message: session.send(message, STALLED), size, most=2_000)
        assert limits.outbox_bytes - size - 4 < session.outbox.qsize() <= limits.outbox_bytes
        refused = numbered(999_999, size)
        attempt = {
            "send": lambda: session.send(refused, timeout=0.05),
            "put": lambda: session.outbox.put(refused, timeout=0.05),
            "put_nowait": lambda: session.outbox.put_nowait(refused),
        }[how]
        with pytest.raises(bridge.SendTimeout, match="nothing was sent") as caught:
            attempt()
        assert isinstance(caught.value, queue.Full) and isinstance(caught.value, TimeoutError)

        for number, message in enumerate(read_frames(peer, accepted)):
            assert message == numbered(number, size)
        session.send(numbered(accepted, size), DEADLINE)  # the session is unharmed, and in step
        assert list(read_frames(peer, 1)) == [numbered(accepted, size)]
        session.abort()


def test_a_writer_that_outruns_the_peer_waits_in_send_and_goes_on(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    size, count = 3_000, 1_000
    limits = bridge.Limits(outbox_bytes=20_000)

    def write(session: bridge.Session, sent: list[int]) -> None:
        for number in range(count):
            session.send(numbered(number, size), DEADLINE)
            sent.append(number)

    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        ThreadPoolExecutor() as pool,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, peer),
    ):
        sent: list[int] = []
        writer = pool.submit(write, session, sent)
        room = limits.outbox_bytes + 2 * kernel_buffers(peer) + RECORD_BYTES
        for number, message in enumerate(read_frames(peer, count)):
            assert message == numbered(number, size)
            assert (len(sent) - number - 1) * size <= room, "it did not wait"
            assert session.outbox.qsize() <= limits.outbox_bytes
        writer.result(DEADLINE)
        session.flush(DEADLINE)
        assert session.outbox.empty()
        session.abort()


def test_a_message_larger_than_the_outbox_goes_alone(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    large = numbered(1, 1_000_000)
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(outbox_bytes=1_000)) as b,
        ThreadPoolExecutor() as pool,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, peer),
    ):
        session.send(large, timeout=0)  # nothing is held, so there is room
        with pytest.raises(queue.Full):
            session.outbox.put_nowait(b"a byte")
        with pytest.raises(queue.Full):
            session.outbox.put_nowait(large)
        second = pool.submit(session.send, large, DEADLINE)
        for message in read_frames(peer, 2):
            assert message == large
        second.result(DEADLINE)
        session.abort()


def test_waiting_senders_are_served_in_the_order_they_came(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    """Also when a later, small message would have fitted: a large one is never overtaken until it starves."""
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(outbox_bytes=20_000)) as b,
        ThreadPoolExecutor() as pool,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, peer),
    ):
        accepted = fill(lambda message: session.send(message, STALLED), 3_000, most=2_000)
        waiting = session._channel.outbox._waiting
        senders = []
        for number, size in enumerate((19_000, 100, 40_000, 100, 100, 5_000)):
            senders.append(pool.submit(session.send, numbered(number, size), DEADLINE))
            until(lambda number=number: len(waiting) == number + 1)
        with pytest.raises(queue.Full):
            session.outbox.put_nowait(b"")
        arrived = list(read_frames(peer, accepted + len(senders)))[accepted:]
        assert [int.from_bytes(message[:4], "big") for message in arrived] == [0, 1, 2, 3, 4, 5]
        for sender in senders:
            sender.result(DEADLINE)
        session.abort()


def test_a_sender_that_gives_up_lets_the_next_one_go(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    """The large message at the front of the line times out; the small one behind it fits, and nobody rings."""
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(outbox_bytes=20_000)) as b,
        ThreadPoolExecutor() as pool,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, peer),
    ):
        accepted = fill(lambda message: session.send(message, STALLED), 3_000, most=2_000)
        waiting = session._channel.outbox._waiting
        large = pool.submit(session.send, numbered(0, 20_000), 2.0)
        until(lambda: len(waiting) == 1)
        small = pool.submit(session.send, numbered(7, 10), DEADLINE)
        until(lambda: len(waiting) == 2)
        with pytest.raises(bridge.SendTimeout):
            large.result(DEADLINE)
        small.result(DEADLINE)
        assert list(read_frames(peer, accepted + 1))[-1] == numbered(7, 10)
        session.abort()


def test_senders_without_room_learn_at_once_that_the_session_has_ended(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(outbox_bytes=20_000)) as b,
        ThreadPoolExecutor() as pool,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (session, _),
    ):
        fill(lambda message: session.send(message, STALLED), 3_000, most=2_000)
        senders = [pool.submit(session.send, numbered(number, 3_000)) for number in range(5)]
        flusher = pool.submit(session.flush)
        until(lambda: len(session._channel.outbox._waiting) == 5)
        session.abort()
        for blocked in (*senders, flusher):
            with pytest.raises(bridge.SessionAborted):
                blocked.result(DEADLINE)


def test_an_empty_message_needs_no_room_on_the_wire(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    """SSL_write of nothing looks like an end of file (DESIGN fact 8): it never happens."""
    with (
        bridge.Bridge(workers=1) as b,
        facing_stdlib(b, client_ctx, stdlib_server) as (session, peer),
    ):
        for message in (b"", b"a", b"", b"", b"b", b""):
            session.send(message, DEADLINE)
        session.flush(DEADLINE)
        assert peer.makefile("rb").read(2) == b"ab"
        session.abort()


# ── many sessions ──


def echo(listener: bridge.Listener) -> None:
    """One thread a session: sends back, until the clean end."""

    def serve(session: bridge.Session) -> None:
        with contextlib.suppress(bridge.SessionEnded):
            for message in session:
                session.send(message)
            session.close()

    threads = []
    for session in listener:
        threads.append(threading.Thread(target=serve, args=(session,)))
        threads[-1].start()
    for thread in threads:
        thread.join(DEADLINE)


@contextlib.contextmanager
def echo_server(b: bridge.Bridge, server_ctx: bridge.Context) -> Iterator[Any]:
    with b.listen(("127.0.0.1", 0), server_ctx, codec=framed) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(echo, listener)
        try:
            yield listener.address
        finally:
            listener.close()
            served.result(DEADLINE)


def round_trips(session: bridge.Session, count: int, size: int) -> int:
    for number in range(count):
        session.send(numbered(number, size), DEADLINE)
        assert session.recv(DEADLINE) == numbered(number, size)
    return count


def test_the_limit_over_all_sessions_starves_none(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """One session that nobody reads holds the whole budget; each of the others may still hold one message."""
    limits = bridge.Limits(total_bytes=10_000, inbox_bytes=30_000, outbox_bytes=30_000)
    with (
        bridge.Bridge(workers=2) as far,
        bridge.Bridge(workers=1, limits=limits) as near,
        ThreadPoolExecutor() as pool,
        echo_server(far, server_ctx) as address,
    ):
        hog = near.connect(address, client_ctx, server_hostname="localhost", codec=framed)
        for number in range(10):
            hog.send(numbered(number, 4_000), DEADLINE)
        until(lambda: near.snapshot().inbox_bytes >= limits.total_bytes)
        sessions = [
            near.connect(address, client_ctx, server_hostname="localhost", codec=framed) for _ in range(6)
        ]
        counts = [pool.submit(round_trips, session, 50, 12_000) for session in sessions]
        assert [count.result(DEADLINE) for count in counts] == [50] * 6
        assert near.snapshot().inbox_bytes >= limits.total_bytes, "the hog was to hold on all the time"
        assert [hog.recv(DEADLINE) for _ in range(10)] == [numbered(number, 4_000) for number in range(10)]
        until(lambda: near.snapshot().inbox_bytes == near.snapshot().outbox_bytes == 0)
        for session in (hog, *sessions):
            session.close()


def test_a_stalled_session_delays_no_other(
    server_ctx: bridge.Context, client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    """One worker for all: a peer that does not read, an application that does not, and a session at work."""
    limits = bridge.Limits(inbox_bytes=20_000, outbox_bytes=20_000)
    with (
        bridge.Bridge(workers=1, limits=limits) as b,
        echo_server(b, server_ctx) as address,
        facing_stdlib(b, client_ctx, stdlib_server, codec=framed) as (deaf_peer, _),
        facing_stdlib(b, client_ctx, stdlib_server, codec=codecs.Raw) as (deaf_application, chatty_peer),
    ):
        fill(lambda message: deaf_peer.send(message, STALLED), 3_000, most=2_000)
        chatty_peer.settimeout(STALLED)
        with pytest.raises(TimeoutError):
            while True:
                chatty_peer.send(bytes(1_000))
        session = b.connect(address, client_ctx, server_hostname="localhost", codec=framed)
        assert round_trips(session, 300, 1_000) == 300
        assert deaf_peer.outbox.qsize() > 16_000 and deaf_application.inbox.full(), "they were to be stalled"
        session.close()
        deaf_peer.abort()
        deaf_application.abort()


def test_a_stalled_session_costs_the_others_no_turn(
    client_ctx: bridge.Context, stdlib_server: ssl.SSLContext
) -> None:
    """Stepped by hand: while it is stalled, a session is not run at all, and the worker finds nothing to do."""
    with ThreadPoolExecutor(1) as pool, tcp_pair() as (ours, theirs):
        b = bridge.Bridge(workers=1, start=False, limits=bridge.Limits(outbox_bytes=20_000))
        worker, coordinator = b._workers[0], b._coordinator
        session = b.adopt(ours, client_ctx, server_hostname="localhost", wait=False)
        wrapped = pool.submit(stdlib_server.wrap_socket, theirs, server_side=True)
        while not wrapped.done() or session.state != "open":
            worker.step(0.01)
            coordinator.step()
        peer = wrapped.result()
        idle = 0
        while idle < 50:  # the kernel moves bytes while nobody steps: wait until it is really full
            with contextlib.suppress(queue.Full):
                session.outbox.put_nowait(bytes(3_000))
            coordinator.step()
            idle = 0 if worker.step(0.01) else idle + 1
        assert session.outbox.qsize() > 16_000
        assert [worker.step() for _ in range(100)] == [False] * 100
        assert b.snapshot().sessions[0].wants == {"read": "read", "write": "write"}
        session.abort()
        for _ in range(3):
            coordinator.step()
            worker.step()
        b.close()
        for thread in (worker, coordinator):
            thread.step()
        peer.close()


def test_what_a_codec_holds_of_a_message_counts_for_the_whole_bridge(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=bridge.codecs.Lines)
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        peer = listener.accept(10)
        client.send(b"a line without an end" * 1000)
        until(lambda: b._inbox_tally.used == 21_000)
        assert [s.inbox_bytes for s in b.snapshot().sessions if s.name == peer.name] == [21_000]
        client.send(b"\n")
        assert len(peer.recv(10)) == 21_000
        until(lambda: b._inbox_tally.used == 0)
        client.send(b"another")
        until(lambda: b._inbox_tally.used == 7)
        client.abort()
        until(lambda: b._inbox_tally.used == 0)


def test_a_message_that_one_ssl_write_cannot_count_leaves_in_parts(
    server_ctx: bridge.Context, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_BYTES", 1000)
    message = random.Random(1).randbytes(500_000)
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
        client.send(message)
        server, received = listener.accept(DEADLINE), b""
        while len(received) < len(message):
            received += server.recv(DEADLINE)
        assert received == message
        client.abort()
        server.abort()
