"""Streams: sessions without a thread of their own, worked by whoever calls, one thread at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import random
import select
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import KeyPair
from OpenSSL import SSL
from peers import (
    PATIENCE,
    Background,
    Checker,
    Pattern,
    in_a_child,
    receive_exactly,
    stdlib_context,
    until,
)
from rig import (
    Clock,
    Raw,
    forking,
    forks,
    interrupting,
    needs_hang_ups,
    only,
    raw_context,
    shrink,
    tcp_pair,
)
from structlog.testing import capture_logs

import bridge
from bridge.lease import Cot, Lease
from bridge.limits import RECORD_BYTES
from bridge.poll import Want
from bridge.stream import Stream
from bridge.transport import Transport

MEGABYTE = 1_000_000
Pair = tuple[Stream, Stream]


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1) as made:
        yield made


@pytest.fixture(autouse=True, params=["bells", "cots"])
def beds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether whoever waits has a bell beside its socket, or leaves that to a worker for want of descriptors."""
    if request.param == "cots":
        monkeypatch.setattr(bridge.lease, "my_sleeper", lambda: None)


@pytest.fixture
def contexts(tls_version: str, ca_file: str, server_cert: KeyPair) -> tuple[bridge.Context, bridge.Context]:
    """A client's and a server's, for each version in turn."""
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(tls_version)),
    )


def streams(b: bridge.Bridge, contexts: Any, near: socket.socket, far: socket.socket) -> Pair:
    return b.stream(near, contexts[0], server_hostname="localhost"), b.stream(far, contexts[1])


def now(call: Callable[..., Any], *arguments: Any) -> Any:
    """What *call* gives without waiting: its result, or the Want that it would wait for."""
    try:
        return call(*arguments, 0)
    except bridge.WouldBlock as error:
        return Want(error.want)


def shaken(client: Stream, server: Stream) -> Pair:
    """Both, their handshake done, without a thread."""
    while isinstance(now(client.handshake), Want) | isinstance(now(server.handshake), Want):
        pass
    assert now(client.read, 1) is Want.READ, "takes the tickets"
    return client, server


@pytest.fixture
def pair(b: bridge.Bridge, contexts: Any) -> Pair:
    """A client's and a server's stream over TCP."""
    return shaken(*streams(b, contexts, *tcp_pair()))


@pytest.fixture
def small_pair(b: bridge.Bridge, contexts: Any) -> Pair:
    """Likewise, with the smallest buffers."""
    return shaken(*streams(b, contexts, *map(shrink, socket.socketpair())))


def finished(stream: Stream) -> bridge.SessionEnded:
    """How *stream* ended, once its socket is closed."""
    return stream.gone.wait(PATIENCE, "gone").cause


def sleeping(stream: Stream, threads: int = 1) -> None:
    """Wait until so many threads sleep in calls of *stream*."""
    deadline = time.monotonic() + PATIENCE
    while len(stream._lease._sleepers) < threads:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def asleep(lease: Lease, mask: int) -> Iterator[None]:
    """Meanwhile, as others see it, somebody sleeps and has the socket polled for *mask*."""
    bed = Cot()
    lease._sleepers[bed] = mask
    yield
    del lease._sleepers[bed]


# ── one thread ──


def test_a_handshake_and_bytes_both_ways(pair: Pair, tls_version: str) -> None:
    client, server = pair
    assert client.info is not None and client.info.version == tls_version
    assert server.info is not None and server.info.cipher == client.info.cipher
    assert client.write(b"hello") == 5
    assert server.read(100, PATIENCE) == b"hello"
    assert server.write(bytearray(b"good bye")) == 8
    assert client.read(4, PATIENCE) == b"good" and client.read(100, PATIENCE) == b" bye"
    assert client.write(b"") == 0
    assert client.info.tls_unique and client.info.tls_unique == server.info.tls_unique


def test_the_bytes_of_streams_count_in_the_totals_of_their_bridge_before_and_after_their_end(
    b: bridge.Bridge, pair: Pair
) -> None:
    client, server = pair
    for size in (1, 700, 400_000):  # in a short turn, and in pieces
        done = threading.Thread(target=client.write, args=(bytes(size), PATIENCE))
        done.start()
        received = 0
        while received < size:
            received += len(server.read(size, PATIENCE))
        done.join(PATIENCE)
    carried = 1 + 700 + 400_000
    assert (b.totals().bytes_sent, b.totals().bytes_received) == (carried, carried)
    for stream in pair:
        stream.close()
    for stream in pair:
        finished(stream)
    assert (b.totals().bytes_sent, b.totals().bytes_received) == (carried, carried)


def test_a_read_takes_one_record_and_pending_tells_what_no_poll_will(pair: Pair) -> None:
    client, server = pair
    server.write(b"x" * 1000)
    assert client.peek(2000, PATIENCE) == b"x" * 1000
    assert client.read(10, PATIENCE) == b"x" * 10
    assert client.pending() == 990
    assert client.read(2000, 0) == b"x" * 990
    assert client.pending() == 0


def test_a_parked_session_reads_nothing_so_its_descriptor_tells_the_truth(pair: Pair) -> None:
    client, server = pair
    descriptor = client._transport.sock
    assert not select.select([descriptor], [], [], 0)[0]
    server.write(b"first")
    server.write(b"second")
    for expected in (b"first", b"second"):
        assert select.select([descriptor], [], [], PATIENCE)[0]
        assert client.read(100, 0) == expected
    assert not select.select([descriptor], [], [], 0)[0]


def test_a_read_that_times_out_harms_nothing(pair: Pair) -> None:
    client, server = pair
    with pytest.raises(bridge.OperationTimeout, match="The read operation timed out"):
        client.read(1, 0.01)
    server.write(b"late")
    assert client.read(10, PATIENCE) == b"late"


def test_a_write_that_times_out_says_so_and_what_was_taken_still_leaves(small_pair: Pair) -> None:
    client, server = small_pair
    with pytest.raises(bridge.OperationTimeout, match="The write operation timed out"):
        client.write(bytes(MEGABYTE), 0.01)
    assert server.read(100, PATIENCE)


@pytest.mark.parametrize("seed", range(20))
def test_lockstep_of_calls_that_never_wait(b: bridge.Bridge, contexts: Any, seed: int) -> None:
    """Seeded orders of small and large reads and writes on both ends: every byte arrives, once and in order."""
    chance = random.Random(seed)
    ends = shaken(*streams(b, contexts, *map(shrink, socket.socketpair())))
    total = 200_000
    pattern, written = Pattern(seed), [0, 0]
    checkers = [Checker(Pattern(seed)), Checker(Pattern(seed))]
    while min(checker.received for checker in checkers) < total:
        side = chance.randrange(2)
        if chance.random() < 0.5 and written[side] < total:
            size = min(chance.choice((1, 100, 16_384, 50_000)), total - written[side])
            count = now(ends[side].write, pattern.at(written[side], size))
            written[side] += 0 if isinstance(count, Want) else count
        else:
            data = now(ends[side].read, chance.choice((1, 77, 20_000)))
            if not isinstance(data, Want):
                checkers[side].feed(data)
    assert [checker.received for checker in checkers] == [total, total]


@pytest.fixture
def asking(b: bridge.Bridge, ca_file: str, server_cert: KeyPair) -> tuple[Stream, Raw]:
    """A client's stream in TLS 1.2, and a server that has just asked it for a new handshake."""
    near, far = socket.socketpair()
    far.setblocking(False)
    context = bridge.client_context(ca_file, **only("TLSv1.2"))
    client = b.stream(near, context, server_hostname="localhost")
    server = Raw(raw_context("TLSv1.2", server_cert), far, server_side=True)
    while isinstance(now(client.handshake), Want) | isinstance(server.handshake(), Want):
        pass
    assert now(client.read, 1) is Want.READ
    assert server.connection.renegotiate() and server.handshake() is None
    return client, server


def test_data_that_comes_with_a_request_for_a_handshake_is_read_and_the_request_answered(
    asking: tuple[Stream, Raw],
) -> None:
    client, server = asking
    assert server.write(b"data") == 4
    assert client.read(10, PATIENCE) == b"data"
    assert server.sock.recv(1, socket.MSG_PEEK) == b"\x16", "before the next call"
    while server.connection.renegotiate_pending():
        assert server.read() is now(client.read, 1) is Want.READ
    assert client.write(b"more") == 4 and server.read() == b"more"
    server.sock.close()


@needs_hang_ups
def test_records_behind_a_request_for_a_handshake_stay_in_order_though_a_writer_reads_them(
    asking: tuple[Stream, Raw], background: Background
) -> None:
    client, server = asking
    while server.connection.renegotiate_pending():
        assert server.read() is now(client.read, 1) is Want.READ
    reading = background.run(client.read, 2 * RECORD_BYTES, PATIENCE)
    sleeping(client)
    with client._lease.lock:  # so the writer comes first
        assert server.connection.renegotiate() and server.handshake() is None
        assert server.write(b"a" * RECORD_BYTES) == RECORD_BYTES and server.write(b"b") == 1
        server.sock.shutdown(socket.SHUT_WR)
        client._hand_over(b"x")
    assert reading.result(PATIENCE) == b"a" * RECORD_BYTES
    assert client.read(10, PATIENCE) == b"b"
    with pytest.raises(bridge.Truncated):
        client.read(10, PATIENCE)
    server.sock.close()


def test_a_close_notify_that_comes_with_a_request_for_a_handshake_is_a_clean_end_to_read_and_none_to_write(
    asking: tuple[Stream, Raw],
) -> None:
    client, server = asking
    server.call("shutdown")
    assert client.read(10, PATIENCE) == b"" == client.read(10)
    with pytest.raises(bridge.TLSError, match="in the middle of a renegotiation"):
        client.write(b"more")
    server.sock.close()


def test_a_byte_that_waits_for_the_end_of_a_handshake_is_sent_though_nobody_calls_again(
    asking: tuple[Stream, Raw],
) -> None:
    client, server = asking
    assert now(client.read, 1) is Want.READ
    assert client.write(b"x", 0) == 1
    deadline = time.monotonic() + PATIENCE
    while (data := server.read()) is Want.READ:
        assert time.monotonic() < deadline
    assert data == b"x"
    server.sock.close()


def test_a_close_that_waits_for_such_a_handshake_ends_where_the_peer_s_stream_does(
    asking: tuple[Stream, Raw],
) -> None:
    client, server = asking
    assert now(client.read, 1) is Want.READ
    assert client.write(b"x", 0) == 1
    server.sock.shutdown(socket.SHUT_WR)
    client.close()
    assert isinstance(finished(client), bridge.Truncated)
    assert client.report is not None and client.report.unsent == 1
    server.sock.close()


def test_a_write_to_a_peer_that_has_reset_the_connection_says_so(b: bridge.Bridge, contexts: Any) -> None:
    client, server = shaken(*streams(b, contexts, *tcp_pair()))
    server.abort()
    with pytest.raises(bridge.PeerReset):
        client.write(b"x")
    client.close()
    ending = client.gone.wait(PATIENCE, "gone")
    assert isinstance(ending.cause, bridge.PeerReset) and ending.report.unsent == 1


@needs_hang_ups
@pytest.mark.parametrize("timeout", [None, PATIENCE, 0])
@pytest.mark.parametrize("size", [1, MEGABYTE])
def test_what_a_peer_has_said_before_it_hangs_up_is_read_though_a_write_fails(
    pair: Pair, size: int, timeout: float | None
) -> None:
    client, server = pair
    for answer in (b"too ", b"much"):
        server.write(answer)
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(bytes(size), timeout)
    assert client.read(100) == b"too " and client.read(100) == b"much"
    with pytest.raises(bridge.PeerReset):
        client.read(100)


@needs_hang_ups
def test_likewise_if_something_was_read_a_while_before(pair: Pair) -> None:
    """What is written at once is an answer, and costs no look."""
    client, server = pair
    server.write(b"welcome")
    assert client.read(100) == b"welcome"
    client._transport.heard -= 1.0
    server.write(b"421 goodbye")
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(b"x")
    assert client.read(100) == b"421 goodbye"


@needs_hang_ups
def test_likewise_if_it_is_our_own_end_that_fails(pair: Pair) -> None:
    client, server = pair
    server.write(b"421 goodbye")
    server.abort()
    finished(server)
    client.send_eof(0)
    assert client.read(100) == b"421 goodbye"


@needs_hang_ups
def test_likewise_if_it_was_said_in_many_small_records(pair: Pair) -> None:
    client, server = pair
    sock = client._transport.sock
    assert sock is not None
    for _ in range(500):
        server.write(b"%050d" % 1)
    until(lambda: len(sock.recv(1 << 20, socket.MSG_PEEK)) > 300 * 80)
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(b"x")
    assert client.pending() >= 300 * 50


def test_likewise_if_it_hangs_up_in_the_middle_of_a_write(
    b: bridge.Bridge, contexts: Any, background: Background
) -> None:
    client, server = shaken(*streams(b, contexts, *map(shrink, tcp_pair())))
    writing = background.run(client.write, bytes(MEGABYTE), PATIENCE)
    sleeping(client)
    server.write(b"too much")
    server.abort()
    with pytest.raises(bridge.PeerReset):
        writing.result(PATIENCE)
    assert client.read(100) == b"too much"
    with pytest.raises(bridge.PeerReset):
        client.read(100)


@needs_hang_ups
def test_likewise_if_it_hangs_up_between_two_records_of_a_write(pair: Pair) -> None:
    client, server = pair
    client.write(b"question")
    really, asked = client._hung_up, []

    def hung_up(timeout: int) -> object:
        asked.append(timeout)
        if len(asked) == 2:
            server.write(b"too much")
            server.abort()
            finished(server)
        return really is not None and really(timeout)

    client._hung_up = hung_up
    with pytest.raises(bridge.PeerReset):
        client.write(bytes(100_000))  # one piece
    assert client.read(100) == b"too much"


@needs_hang_ups
def test_likewise_if_it_says_close_notify_before(b: bridge.Bridge, contexts: Any) -> None:
    client, server = shaken(*streams(b, contexts, *tcp_pair()))
    server.write(b"too much")
    server.send_eof()
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(bytes(MEGABYTE))
    assert client.read(100) == b"too much" and client.read(100) == b""


def test_what_a_peer_has_said_is_left_in_the_kernel_while_it_may_say_more(pair: Pair) -> None:
    client, server = pair
    server.write(b"answer")
    for size in (1, 1, 30_000):
        client.write(bytes(size))
        assert client.pending() == 0 and select.select([client._transport.sock], [], [], 0)[0]


def test_a_peer_that_has_shut_its_half_of_tcp_down_can_be_written_to(pair: Pair) -> None:
    client, server = pair
    server.write(b"cut")
    assert server._transport.sock is not None
    server._transport.sock.shutdown(socket.SHUT_WR)
    for size in (1, 30_000, 1):
        client.write(bytes(size))
        while size:
            size -= len(server.read(size, PATIENCE))
    assert client.read(100) == b"cut"
    with pytest.raises(bridge.Truncated):
        client.read(100)


def test_likewise_if_nothing_was_read_yet_but_what_is_no_data(
    b: bridge.Bridge, ca_file: str, server_cert: KeyPair
) -> None:
    near, far = tcp_pair()
    client = b.stream(near, bridge.client_context(ca_file), server_hostname="localhost")
    server = b.stream(far, bridge.server_context(server_cert.certfile, server_cert.keyfile))
    while isinstance(now(client.handshake), Want) | isinstance(now(server.handshake), Want):
        pass
    assert server._transport.sock is not None
    server._transport.sock.shutdown(socket.SHUT_WR)
    for _ in range(3):
        client.write(b"x")
    assert server.read(100, PATIENCE) == b"x"


def test_no_more_is_read_for_a_write_than_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.stream, "AHEAD_BYTES", 20_000)
    client, server = pair
    server.write(bytes(100_000), PATIENCE)
    assert server._transport.sock is not None
    server._transport.sock.shutdown(socket.SHUT_WR)
    for _ in range(3):
        client.write(b"x")
    assert 20_000 <= client.pending() < 20_000 + bridge.stream.RECORD_BYTES
    server.abort()


def test_only_the_first_write_after_a_read_is_an_answer_that_need_not_look(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.stream, "AT_ONCE", 2 * PATIENCE)
    client, server = pair
    server.write(b"question")
    assert client.read(100, PATIENCE) == b"question"
    client.write(b"answer")
    server.write(b"too much")
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(b"more")
    assert client.read(100) == b"too much"


def test_send_eof_is_that_of_tls_and_then_that_of_tcp(
    b: bridge.Bridge, contexts: Any, tls_version: str
) -> None:
    near, far = tcp_pair()
    far.setblocking(False)
    server, client = b.stream(near, contexts[1]), Raw(raw_context(tls_version), far, server_side=False)
    while isinstance(now(server.handshake), Want) | isinstance(client.handshake(), Want):
        pass
    server.send_eof()
    far.setblocking(True)
    with pytest.raises(SSL.ZeroReturnError):
        client.connection.recv(1)
    assert far.recv(1) == b""
    far.close()


def test_a_write_that_has_left_in_spite_of_send_eof_has_been_written(
    small_pair: Pair, background: Background
) -> None:
    client, server = small_pair
    writing = background.run(client.write, bytes(100_000), PATIENCE)
    until(client._sent.held)
    client.send_eof(0)
    received = 0
    while data := server.read(65_536, PATIENCE):
        received += len(data)
    assert received == writing.result(PATIENCE) == 100_000


def test_send_eof_of_what_is_not_open_is_nothing(b: bridge.Bridge, contexts: Any) -> None:
    client, server = streams(b, contexts, *tcp_pair())
    client.send_eof()
    shaken(client, server)
    assert client.write(b"x") == 1, "it was not open yet"
    client.abort()
    client.send_eof()


def test_a_stream_is_idle_after_its_last_byte_and_not_before(
    b: bridge.Bridge, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tcp_pair()
    client = b.stream(near, contexts[0], server_hostname="localhost", timeouts=bridge.Timeouts(idle=10))
    client, server = shaken(client, b.stream(far, contexts[1]))
    clock = Clock()
    for module in (bridge.lease, bridge.stream, bridge.transport):
        monkeypatch.setattr(module, "time", clock)
    for size in (1, 16_384, 30_000, 1):
        clock.now += 6
        server.write(bytes(size))
        while size:
            size -= len(client.read(size, PATIENCE))
        clock.now += 6
        assert now(client.read, 1) is Want.READ
    client.write(b"x")
    clock.now += 9
    assert now(client.read, 1) is Want.READ
    clock.now += 2
    with pytest.raises(bridge.IdleTimeout):
        client.read(1, 0)


def test_a_parked_stream_is_not_idle_though_a_worker_has_seen_it(b: bridge.Bridge, contexts: Any) -> None:
    near, far = tcp_pair()
    times = bridge.Timeouts(idle=0.05)
    client = b.stream(near, contexts[0], server_hostname="localhost", timeouts=times)
    server = b.stream(far, contexts[1])
    for stream in (client, server):
        stream.begin()
    assert client.handshake(PATIENCE) and server.handshake(PATIENCE)
    assert not threading.Event().wait(0.2) and client.end is None
    server.write(b"late")
    assert client.read(10, PATIENCE) == b"late"


# ── several threads ──


def test_a_sleeping_reader_is_no_obstacle_to_a_writer(pair: Pair, background: Background) -> None:
    client, server = pair
    reading = background.run(client.read, 100, PATIENCE)
    sleeping(client)
    client.write(b"question", PATIENCE)
    assert server.read(100, PATIENCE) == b"question"
    assert not reading.done()
    server.write(b"answer")
    assert reading.result(PATIENCE) == b"answer"


TURNS = ("turn", "read_at_once", "write_at_once", "send", "close")
"""The calls of a transport that a stream's callers come to, none of which makes another."""


def test_a_thread_without_a_bell_sleeps_until_there_is_something_for_it(
    b: bridge.Bridge, contexts: Any, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes when it sleeps no more is left to whoever reads next, though the worker was told to poll."""
    monkeypatch.setattr(bridge.lease, "my_sleeper", lambda: None)
    sleep, slept = Cot.sleep, []
    monkeypatch.setattr(Cot, "sleep", lambda *arguments: slept.append(sleep(*arguments)))
    near, far = tcp_pair()
    client = b.stream(near, contexts[0], server_hostname="localhost", timeouts=bridge.Timeouts(idle=10))
    client, server = shaken(client, b.stream(far, contexts[1]))
    reading = background.run(client.read, 100, PATIENCE)
    sleeping(client)
    assert concurrent.futures.wait([reading], 0.05).not_done and not slept
    server.write(b"something")
    assert reading.result(PATIENCE) == b"something" and len(slept) == 1
    clock = Clock()
    for module in (bridge.lease, bridge.stream, bridge.transport):
        monkeypatch.setattr(module, "time", clock)
    clock.now += 11
    server.write(b"more")
    until(lambda: not client._lease._caretaker.mask)
    assert client.read(100, PATIENCE) == b"more" and len(slept) == 1


def test_a_call_in_the_middle_of_another_is_refused_by_each_method(pair: Pair) -> None:
    client, _ = pair
    for call in (
        client.pending,
        client.send_eof,
        client.abort,
        lambda: client.read(1),
        lambda: client.write(b"x"),
    ):
        with client._lease.lock, pytest.raises(RuntimeError, match="in the middle of one of its own calls"):
            call()


def test_two_threads_are_never_inside_at_once(
    pair: Pair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the smallest switch interval; and whole writes of several threads never interleave."""
    client, server = pair
    inside: list[int] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Transport, *arguments: Any) -> Any:
            inside.append(id(self))
            assert inside.count(id(self)) == 1
            try:
                return method(self, *arguments)
            finally:
                inside.remove(id(self))

        return call

    for name in TURNS:
        monkeypatch.setattr(Transport, name, watched(getattr(Transport, name)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writers = [
            background.run(lambda n: [client.write(bytes([n]) * 10_000) for _ in range(20)], n)
            for n in range(4)
        ]
        echo = background.run(lambda: [server.write(server.read(16_384, PATIENCE)) for _ in range(80)])
        got = bytearray()
        while len(got) < 800_000:
            got += client.read(65_536, PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    for job in (*writers, echo):
        job.result(PATIENCE)
    assert all(len(set(got[start : start + 10_000])) == 1 for start in range(0, 800_000, 10_000))


def test_who_waits_in_a_read_is_told_to_read_no_more(pair: Pair, background: Background) -> None:
    reading = background.run(pair[0].read, 1, PATIENCE)
    sleeping(pair[0])
    pair[0].stop_reading()
    assert reading.result(PATIENCE / 2) == b""


def test_after_that_nothing_more_comes_though_a_write_fails(b: bridge.Bridge, contexts: Any) -> None:
    client, server = shaken(*streams(b, contexts, *tcp_pair()))
    server.write(b"unheard")
    client.stop_reading()
    server.abort()
    finished(server)
    with pytest.raises(bridge.PeerReset):
        client.write(b"x")
    assert client.read(100) == b""


def test_after_that_it_can_be_unwrapped(pair: Pair, background: Background) -> None:
    client, server = pair
    client.stop_reading()
    assert client.read(1) == b""
    unwrapping = background.run(server.unwrap, PATIENCE)
    for sock, _ in (client.unwrap(PATIENCE), unwrapping.result(PATIENCE)):
        sock.close()


def test_while_unwrap_would_have_to_wait_nothing_is_read_either(pair: Pair) -> None:
    client, _ = pair
    client.stop_reading()
    with pytest.raises(bridge.WouldBlock):
        client.unwrap(0)
    assert client.read(1, PATIENCE) == b""


@pytest.mark.parametrize("how", ["the peer", "we"])
def test_close_says_close_notify_also_behind_the_end_of_the_peers_tcp(
    b: bridge.Bridge, contexts: Any, server_cert: KeyPair, how: str, tls_version: str
) -> None:
    """OpenSSL, which reads that end first, would say a fatal alert."""
    near, far = tcp_pair()
    far.setblocking(False)
    with far:
        stream = b.stream(near, contexts[0], server_hostname="localhost")
        peer = Raw(raw_context(tls_version, server_cert), far, True)
        while stream.info is None:
            with contextlib.suppress(bridge.WouldBlock):
                stream.handshake(0)
            peer.handshake()
        if how == "the peer":
            far.shutdown(socket.SHUT_WR)
        else:
            stream._transport.sock.shutdown(socket.SHUT_RD)  # type: ignore[union-attr]
        stream.close()
        finished(stream)
        assert stream.report is not None and stream.report.close_notify_sent


def test_who_waits_in_a_read_hears_that_the_session_has_stalled(pair: Pair, background: Background) -> None:
    reading = background.run(pair[0].read, 1)
    sleeping(pair[0])
    pair[0]._lease._caretaker.stalled(100, "worker")
    with pytest.raises(bridge.SessionStalled):
        reading.result(PATIENCE)


def test_who_waits_without_a_timeout_hears_of_the_session_s_deadline(b: bridge.Bridge, contexts: Any) -> None:
    near, far = tcp_pair()
    hurried = bridge.Timeouts(handshake=0.05)
    with far, pytest.raises(bridge.HandshakeTimeout):
        b.stream(near, contexts[0], server_hostname="localhost", timeouts=hurried).handshake()


def test_the_rest_of_a_write_is_left_to_who_polls_for_room_and_to_nobody_else(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, told = pair[0]._lease, []
    with monkeypatch.context() as patch, lease.lock:
        patch.setattr(Lease, "_send_for_worker", lambda _, what: told.append(what))
        lease._transport.mask = Want.READ | Want.WRITE
        for mask, expected in ((Want.READ | Want.WRITE, []), (Want.READ, ["wake"])):
            with asleep(lease, mask):
                lease.leave()
            assert told == expected
        lease._transport.mask = Want.READ


def test_a_worker_closes_no_descriptor_under_a_sleeper(pair: Pair) -> None:
    """It might be another connection's by the time the sleeper looks again."""
    lease = pair[0]._lease
    caretaker = lease._caretaker
    with lease.lock:
        with asleep(lease, Want.READ):
            lease.abort(bridge.SessionAborted("over"))
            assert lease._transport.finished
            caretaker.turn(0, time.monotonic())
            assert not caretaker.finished
        lease.leave()
    assert caretaker.finished


def test_one_of_two_readers_is_woken_by_the_others_turn(pair: Pair, background: Background) -> None:
    client, server = pair
    readers = [background.run(client.read, 1, PATIENCE) for _ in range(2)]
    sleeping(client, 2)
    server.write(b"ab")
    assert sorted(reader.result(PATIENCE) for reader in readers) == [b"a", b"b"]


def test_a_writer_without_room_is_woken_by_whoever_sends_the_rest(
    small_pair: Pair, background: Background
) -> None:
    client, server = small_pair
    writing = background.run(client.write, bytes(300_000), PATIENCE)
    sleeping(client)
    got = 0
    while got < 300_000:
        now(client.read, 1)  # its turns send for the writer, too
        data = now(server.read, 65_536)
        got += 0 if isinstance(data, Want) else len(data)
    assert writing.result(PATIENCE) == 300_000


def test_what_did_not_wait_is_sent_by_a_worker_though_nobody_calls_again(small_pair: Pair) -> None:
    client, server = small_pair
    sent = 0
    while not isinstance(count := now(client.write, bytes(16_000)), Want):
        sent += count
    assert count is Want.WRITE
    got = 0
    while got < sent:
        got += len(server.read(65_536, PATIENCE))
    assert got == sent


def test_a_callback_that_calls_its_own_session_gets_an_error_and_no_deadlock(pair: Pair) -> None:
    client, _ = pair
    with client._lease.lock, pytest.raises(RuntimeError, match="by a callback or a signal handler"):
        client.read(1, 0)


def test_a_bug_in_a_turn_ends_the_session(
    b: bridge.Bridge, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tcp_pair()
    with far:
        stream = b.stream(near, contexts[0], server_hostname="localhost")

        def fall(*_: object) -> None:
            monkeypatch.undo()
            raise ValueError("a bug")

        monkeypatch.setattr(Transport, "turn", fall)
        with (
            capture_logs() as logs,
            pytest.raises(bridge.SessionAborted, match=r"internal error: ValueError\('a bug'\)"),
        ):
            stream.handshake(PATIENCE)
        assert not stream._lease.mine()
        stream.close()
    (failed,) = [entry for entry in logs if entry["event"] == "worker.failed"]
    assert failed["worker"] == threading.current_thread().name


def test_a_bug_in_a_worker_s_turn_ends_the_session_too(
    b: bridge.Bridge, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tcp_pair()
    with far:
        quick = bridge.Timeouts(close_notify=0.1)
        stream = b.stream(near, contexts[0], server_hostname="localhost", timeouts=quick)
        turn = Lease.turn

        def fall(*arguments: Any) -> None:
            if threading.current_thread().name.startswith("bridge-worker"):
                monkeypatch.undo()
                raise ValueError("a bug")
            turn(*arguments)

        monkeypatch.setattr(Lease, "turn", fall)
        stream.begin()
        assert isinstance(finished(stream), bridge.SessionAborted)
        stream.abort()
        stream.close()


def test_ctrl_c_does_not_keep_a_caller_from_regaining_the_lease(pair: Pair) -> None:
    lease, presses = pair[0]._lease, [KeyboardInterrupt(), KeyboardInterrupt()]

    class Lock:
        inner = lease.lock

        def acquire(self) -> bool:
            if presses:
                raise presses.pop()
            return self.inner.acquire()

        def _is_owned(self) -> bool:
            return self.inner._is_owned()  # type: ignore[attr-defined, no-any-return]

    lease.lock = Lock()  # type: ignore[assignment]
    lease._regain()
    assert lease.mine() and not presses
    lease.lock = Lock.inner
    lease.lock.release()


@forks
def test_a_child_forked_by_a_signal_handler_waits_for_nobody_who_is_in_the_parent(
    pair: Pair, background: Background
) -> None:
    client, server = pair

    def take_a_turn(fork: Callable[[], None]) -> None:
        sleeping(server)
        with server._lease.lock:
            fork()
        client.write(b"now")

    with forking(background, take_a_turn):
        assert server.read(3, 2.0) == b"now"


def test_a_signal_handler_cannot_write_in_the_middle_of_a_write(pair: Pair) -> None:
    client, _ = pair
    with client._writers, pytest.raises(RuntimeError, match="in the middle of one of its own calls"):
        client.write(b"x")
    assert client.write(b"y") == 1 and client.name in repr(client) and "open" in repr(client)


def test_an_interrupt_in_the_middle_of_a_turn_ends_the_session(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what was half done, so it is not silently gone on with."""
    client, server = pair
    server.write(b"x")
    engine = type(client._transport._engine)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.read(1, PATIENCE)
    with pytest.raises(bridge.SessionAborted, match="interrupted"):
        client.read(1, PATIENCE)


@pytest.mark.filterwarnings("ignore:(?s).*Interrupt:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
@pytest.mark.skipif(
    sys.gettrace() is not None, reason="leaves the tracer's own lock locked: that of coverage"
)
def test_interrupts_at_any_moment_leave_nothing_locked(b: bridge.Bridge, contexts: Any) -> None:
    """A handler that raises, as that of Ctrl-C does, a few hundred times in the middle of anything."""

    class Interrupt(BaseException):
        pass

    def handler(*_: object) -> None:
        raise Interrupt

    chance = random.Random(1)
    ends = streams(b, contexts, *tcp_pair())
    before = signal.signal(signal.SIGALRM, handler)
    try:
        client, server = shaken(*ends)
        for _ in range(300):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-5, 3e-4))
                    for _ in range(1000):  # and not for ever: Python drops what is raised in a finalizer
                        client.pending()
                        now(server.read, 100)
                        client.write(b"x", PATIENCE)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (Interrupt, bridge.SessionEnded):  # the alarm may also go off in the `finally`
                pass
            assert not client._lease.mine() and not client._writers._is_owned()  # type: ignore[attr-defined]
            if client.end is not None or server.end is not None:
                for end in (client, server):
                    end.close()
                client, server = shaken(*streams(b, contexts, *tcp_pair()))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_write_that_does_not_wait_never_lands_inside_another_threads(
    small_pair: Pair, background: Background
) -> None:
    client, server = small_pair
    writing = background.run(client.write, b"a" * 300_000, PATIENCE)
    sleeping(client)
    assert now(client.write, b"b") is Want.WRITE
    got = bytearray()
    while len(got) < 300_000:
        got += server.read(65_536, PATIENCE)
    assert writing.result(PATIENCE) == 300_000 and got == b"a" * 300_000


# ── handshakes that nobody waits for ──


def test_a_worker_makes_the_handshake_and_whoever_needs_it_waits(b: bridge.Bridge, contexts: Any) -> None:
    near, far = tcp_pair()
    server = b.stream(far, contexts[1])
    server.begin()
    with near:
        client = b.stream(near, contexts[0], server_hostname="localhost")
        assert client.handshake(PATIENCE).version
        client.write(b"x")
        assert server.read(1, PATIENCE) == b"x"


def test_a_mute_client_costs_its_own_session_and_a_bounded_time(b: bridge.Bridge, contexts: Any) -> None:
    near, far = tcp_pair()
    with near:
        server = b.stream(far, contexts[1], timeouts=bridge.Timeouts(handshake=0.05, close_notify=0.05))
        server.begin()
        with pytest.raises(bridge.HandshakeTimeout):
            server.read(1)
        server.close()
        assert isinstance(finished(server), bridge.HandshakeTimeout)


def test_a_refused_certificate_is_told_to_everybody_who_calls(
    b: bridge.Bridge, contexts: Any, background: Background
) -> None:
    near, far = tcp_pair()
    client = b.stream(near, contexts[0], server_hostname="elsewhere.example")
    server = background.run(b.stream(far, contexts[1]).handshake, PATIENCE)
    for call in (client.handshake, lambda: client.read(1), lambda: client.write(b"x")):
        with pytest.raises(bridge.HostnameMismatch, match=r"'localhost'.*elsewhere\.example"):
            call()
    with contextlib.suppress(bridge.SessionEnded):
        server.result(PATIENCE)


# ── ends ──


def test_a_clean_end_and_a_half_close(pair: Pair) -> None:
    client, server = pair
    client.write(b"request")
    client.send_eof()
    with pytest.raises(bridge.SessionClosed, match="closed its half"):
        client.write(b"more")
    assert server.read(100, PATIENCE) == b"request"
    assert server.read(100, PATIENCE) == b"" == server.read(100, PATIENCE)
    server.write(b"answer")
    server.close()
    assert client.read(100, PATIENCE) == b"answer"
    assert client.read(100, PATIENCE) == b"" == client.peek(100, PATIENCE)
    client.close()
    for end in pair:
        finished(end)
        assert end.report and end.report.close_notify_received


@pytest.mark.parametrize("threads", [1, 3])
def test_close_lets_everybody_go_before_the_descriptor_is_closed(
    pair: Pair, background: Background, threads: int
) -> None:
    client, server = pair
    readers = [background.run(client.read, 1) for _ in range(threads)]
    sleeping(client, threads)
    client.close()
    for reader in readers:
        assert isinstance(reader.exception(PATIENCE), bridge.SessionClosed)
    with pytest.raises(bridge.SessionClosed):
        client.read(1)
    assert server.read(1, PATIENCE) == b""
    server.close()
    assert isinstance(finished(client), bridge.SessionClosed)


def test_a_write_only_client_that_closes_at_once_loses_nothing(
    b: bridge.Bridge, ca_file: str, server_cert: KeyPair, background: Background
) -> None:
    """With unread tickets in its socket the kernel would reset the connection, and megabytes with it."""
    size = 3 * MEGABYTE

    def serve(sock: ssl.SSLSocket) -> int:
        return len(receive_exactly(sock, size)) + len(sock.recv(1))

    address, (served,) = background.serve_tls(
        stdlib_context(True, "TLSv1.3", **dataclasses.asdict(server_cert)), serve
    )
    client = b.stream(
        socket.create_connection(address), bridge.client_context(ca_file), server_hostname="localhost"
    )
    client.write(bytes(size))
    client.close()
    assert served.result(PATIENCE) == size
    assert finished(client)


@pytest.mark.parametrize("politely", [True, False])
def test_a_write_that_did_not_wait_arrives_also_at_a_peer_that_has_shut_its_half_of_tcp_down(
    small_pair: Pair, politely: bool
) -> None:
    client, server = small_pair
    size = client.write(bytes(100_000), 0)
    assert client._sent.held() and server._transport.sock is not None
    server._transport.sock.shutdown(socket.SHUT_WR)
    client.close(politely=politely)
    until(lambda: not client._transport.mask & Want.READ)
    while size:
        size -= len(server.read(size, PATIENCE))
    with contextlib.nullcontext() if politely else pytest.raises(bridge.Truncated):
        assert server.read(1, PATIENCE) == b""
    assert isinstance(finished(client), bridge.SessionClosed)


def test_a_cut_stream_is_no_end(pair: Pair, background: Background) -> None:
    client, server = pair
    reading = background.run(client.read, 1)
    sleeping(client)
    assert server._transport.sock is not None
    server._transport.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(bridge.Truncated):
        reading.result(PATIENCE)
    with pytest.raises(bridge.Truncated):
        client.read(1)
    assert isinstance(client.end, bridge.Truncated)


def test_close_lets_a_writer_without_room_go(small_pair: Pair, background: Background) -> None:
    client, _ = small_pair
    writing = background.run(client.write, bytes(300_000))
    sleeping(client)
    client.close()
    with pytest.raises(bridge.SessionClosed):
        writing.result(PATIENCE)
    client.abort()
    assert isinstance(finished(client), bridge.SessionEnded), "abort ends a close that is under way"


def test_a_later_close_with_less_time_is_heeded(
    b: bridge.Bridge, small_pair: Pair, background: Background
) -> None:
    client, _ = small_pair
    writing = background.run(client.write, bytes(300_000))
    sleeping(client)
    client.close()
    began = time.monotonic()
    client.close(0.01)
    finished(client)
    assert time.monotonic() - began < 10, "Timeouts.flush would be 30 s"
    with pytest.raises(bridge.SessionEnded):
        writing.result(PATIENCE)


def test_a_close_in_the_middle_of_a_call_is_left_to_the_worker(pair: Pair) -> None:
    """As from a signal handler."""
    client, server = pair
    with client._lease.lock:
        client.close()
    assert server.read(1, PATIENCE) == b""
    server.close()
    assert isinstance(finished(client), bridge.SessionClosed)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_what_makes_no_sense_is_refused_and_costs_no_byte(pair: Pair, timeout: float) -> None:
    """Nothing is the answer at the peer's end, and at no other time."""
    near, far = pair
    far.write(b"helloworld")
    for size in (0, -5):
        for call in (near.read, near.peek):
            with pytest.raises(ValueError, match="size must be positive"):
                call(size, PATIENCE)
    uses: list[Callable[[], object]] = [
        lambda: near.read(1, timeout),
        lambda: near.peek(1, timeout),
        lambda: near.write(b"x", timeout),
        lambda: near.unwrap(timeout),
    ]
    for use in uses:
        with pytest.raises(bridge.ConfigurationError, match="timeout must not be negative"):
            use()
    assert near.read(100, PATIENCE) == b"helloworld"


def test_abort_resets(pair: Pair) -> None:
    client, server = pair
    client.abort()
    with pytest.raises((bridge.PeerReset, bridge.Truncated)):
        server.read(1, PATIENCE)
    assert isinstance(finished(client), bridge.SessionAborted)
    for read in (client.read, client.peek):
        with pytest.raises(bridge.SessionAborted):
            read(1)


def test_unwrap_goes_on_in_plain_text(pair: Pair, background: Background) -> None:
    ends = [background.run(end.unwrap, PATIENCE) for end in pair]
    (near, early), (far, late) = (end.result(PATIENCE) for end in ends)
    with near, far:
        assert early == late == b""
        near.setblocking(True)
        far.setblocking(True)
        near.sendall(b"plain")
        assert far.recv(10) == b"plain"


def test_who_unwraps_again_gets_the_same_socket_while_it_is_open(pair: Pair, background: Background) -> None:
    near, far = (background.run(end.unwrap, PATIENCE) for end in pair)
    far.result(PATIENCE)[0].close()
    sock, _ = near.result(PATIENCE)
    assert sock is pair[0].unwrap(0)[0]
    sock.close()
    with pytest.raises(bridge.EndOfStream):
        pair[0].unwrap(0)


def test_unwrap_waits_as_long_as_its_caller_does(
    b: bridge.Bridge, contexts: Any, background: Background
) -> None:
    near, far = tcp_pair()
    client = b.stream(
        near, contexts[0], server_hostname="localhost", timeouts=bridge.Timeouts(close_notify=0.01)
    )
    client, server = shaken(client, b.stream(far, contexts[1]))
    unwrapping = background.run(client.unwrap, PATIENCE)
    assert server.read(1, PATIENCE) == b""
    assert not threading.Event().wait(0.1), "ten times what the session's own deadline would be"
    for sock, _ in (server.unwrap(PATIENCE), unwrapping.result(PATIENCE)):
        sock.close()


def test_a_socket_is_handed_back_when_the_worker_has_left_it(
    b: bridge.Bridge,
    contexts: Any,
    small_pair: Pair,
    background: Background,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it still polls may be closed by then, and its number be that of another socket."""
    monkeypatch.setattr(bridge.lease, "my_sleeper", bridge.poll.my_sleeper)
    client, server = small_pair
    while not isinstance(now(client.write, bytes(16_000)), Want):
        pass
    until(lambda: client._lease._caretaker.mask & Want.WRITE)
    other, _ = shaken(*streams(b, contexts, *tcp_pair()))
    worker = client._lease._worker
    with other._lease.lock:
        worker.post(other._lease._caretaker, "wake")
        until(lambda: not worker._mailbox._items)  # it has that word, and waits for the lock
        unwrapping = background.run(client.unwrap, PATIENCE)
        while server.read(65_536, PATIENCE):
            pass
        server.unwrap(PATIENCE)[0].close()
        until(lambda: client.end is not None)
        assert concurrent.futures.wait([unwrapping], 0.1).not_done
    unwrapping.result(PATIENCE)[0].close()
    others = streams(b, contexts, *tcp_pair())
    for stream in others:
        stream.begin()
    assert all(stream.handshake(PATIENCE) for stream in others), "the worker lives"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
def test_a_signal_handler_may_unwrap_what_its_thread_reads(pair: Pair, background: Background) -> None:
    client, server = pair
    far = background.run(server.unwrap, PATIENCE)
    found = []

    def handler(*_: object) -> None:
        found.append(client.unwrap(PATIENCE))

    with interrupting(handler):
        with contextlib.suppress(bridge.SessionEnded):
            assert client.read(1, PATIENCE) == b""
        until(lambda: found)
    for sock, _ in (*found, far.result(PATIENCE)):
        sock.close()


def test_unwrap_gives_up_in_time(pair: Pair) -> None:
    with pytest.raises(bridge.OperationTimeout):
        pair[0].unwrap(0.01)


def test_a_forgotten_stream_is_closed_by_its_worker(pair: Pair) -> None:
    client, server = pair
    with client._lease.lock:  # as in a finalizer that runs in the middle of a call
        client.forget()
    with pytest.raises(bridge.Truncated):
        server.read(1, PATIENCE)
    server.close()
    assert isinstance(finished(client), bridge.SessionClosed)


def test_closing_the_bridge_closes_its_streams(contexts: Any, background: Background) -> None:
    b = bridge.Bridge(workers=1)
    client, server = shaken(*streams(b, contexts, *tcp_pair()))
    assert [(seen.name, seen.state) for seen in b.snapshot().sessions] == [
        (end.name, "open") for end in (client, server)
    ]
    reading = background.run(client.read, 1)
    sleeping(client)
    b.close()
    assert isinstance(reading.exception(PATIENCE), bridge.SessionClosed)
    assert b.snapshot().sessions == () and b.snapshot().wants[("handshake", "read")] > 0
    with pytest.raises(bridge.SessionClosed):
        server.write(b"x")
    near, far = tcp_pair()
    with near, far, pytest.raises(bridge.BridgeClosed):
        streams(b, contexts, near, far)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@forks
def test_a_child_of_fork_is_refused_and_its_close_does_not_touch_the_session(
    b: bridge.Bridge, contexts: Any, pair: Pair
) -> None:
    client, server = pair
    gone = shaken(*streams(b, contexts, *tcp_pair()))[0]
    gone.abort()
    finished(gone)

    def check() -> None:
        with pytest.raises(bridge.ForkedError):
            client.write(b"x")
        client.close()
        client.forget()
        gone.forget()

    in_a_child(check)
    client.write(b"still here")
    assert server.read(100, PATIENCE) == b"still here"


def test_a_thread_that_ends_takes_its_bed_along(pair: Pair) -> None:
    client, server = pair
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        reader = threading.Thread(target=client.read, args=(1,))
        reader.start()
        sleeping(client)
        server.write(b"x")
        reader.join(PATIENCE)
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("value", ["5", -1, float("nan"), True])
def test_a_timeout_that_is_none_is_refused_and_ends_nothing(pair: Pair, value: Any) -> None:
    client, server = pair
    for call in (client.close, client.handshake, lambda timeout: client.read(1, timeout)):
        with pytest.raises(bridge.ConfigurationError, match="timeout"):
            call(value)
    client.write(b"still here")
    assert server.read(100) == b"still here" and client.end is None
