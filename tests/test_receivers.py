"""The short way of a message: a receiver that has to wait sleeps beside the socket itself, and reads what comes.

Mostly in lockstep, where no worker has a thread: what is received then came the short way, or was read in the order
in which it would hurt.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from types import FrameType
from typing import Any

import pytest
from conftest import KeyPair
from peers import Background, until
from rig import (
    PATIENCE,
    Clock,
    Lockstep,
    begin_close,
    busy,
    forking,
    forks,
    interrupting,
    is_closed,
    is_open,
    only,
    received,
)
from test_interrupts import KINDS, Handled, Interrupt, Moment

import bridge
from bridge import codecs, coordinator, poll, threads, worker
from bridge.engine import TLSEngine
from bridge.inbox import ReadCredit
from bridge.poll import LENT, Want
from bridge.session import Session

SOON = 0.05
"""Seconds that are given to what must not come."""
linux = pytest.mark.skipif(not poll.Poller.lends, reason="where there is no epoll, workers lend nothing")
pytestmark = linux
Pair = tuple[Session, Session]


def framed() -> codecs.LengthPrefixed:
    return codecs.LengthPrefixed(4)


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair, tls_version: str) -> tuple[bridge.Context, bridge.Context]:
    """Client's and server's, for each version in turn."""
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(tls_version)),
    )


def opened(rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context], *sockets: Any) -> Pair:
    """A client's session and a server's, which has got short messages so far."""
    client, server = (
        rig.session(context, sock, codec=framed) for context, sock in zip(contexts, sockets, strict=True)
    )
    rig.until(lambda: is_open(client) and is_open(server))
    client.send(b"0")
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"0"
    rig.settle()
    return client, server


def timed(rig: Lockstep, contexts: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, Session, Session]:
    """A pair whose server gives up after 10 idle seconds, and the clock that counts them."""
    clock = Clock()
    for module in ("worker", "transport", "coordinator"):
        monkeypatch.setattr(getattr(bridge, module), "time", clock)
    near, far = rig.tcp_pair()
    client = rig.session(contexts[0], near, codec=framed)
    server = rig.session(contexts[1], far, codec=framed, timeouts=bridge.Timeouts(idle=10))
    rig.until(lambda: is_open(client) and is_open(server))
    return clock, client, server


@pytest.fixture
def pair(rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]) -> Pair:
    return opened(rig, contexts, *rig.tcp_pair())


def leave(rig: Lockstep, session: Session) -> None:
    """What *session* has to say is on its way; only its own bridge has a turn."""
    mine = next(one for one in rig.bridges if one._coordinator is session._coordinator)
    for _ in range(5):
        mine._coordinator.step()
        mine._workers[0].step()


def mask_of(session: Session) -> int:
    """What its worker has in the poll set for it."""
    return session._channel.worker._watched[session._channel.transport].mask


def test_a_receiver_that_waits_needs_no_worker(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    before = server._channel.transport.received
    for number in range(5):
        client.send(b"%d" % number)
        leave(rig, client)
        assert server.recv(PATIENCE) == b"%d" % number
    assert server._channel.transport.received == before + 5 * len(framed().encode(b"0"))


def test_so_do_peek_and_the_inbox(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    client.send(b"a")
    leave(rig, client)
    assert server.peek(PATIENCE) == b"a" == server.inbox.get(timeout=PATIENCE)


def test_what_came_with_a_message_is_there_for_the_next_receivers(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    for number in range(4):
        client.send(b"%d" % number)  # merged into one record
    leave(rig, client)
    assert [server.recv(PATIENCE) for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def test_after_that_the_worker_reads_again(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    client.send(b"1")
    leave(rig, client)
    assert server.recv(PATIENCE) == b"1" and mask_of(server) == Want.READ
    client.send(b"2")
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(0) == b"2"


def test_also_if_nothing_came_in_time(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    assert mask_of(server) == Want.READ
    client.send(b"1")
    rig.until(lambda: server.inbox.qsize() == 1)


@contextlib.contextmanager
def in_other_hands(session: Session, background: Background) -> Iterator[Any]:
    """Meanwhile another thread has *session*, as for the time that a codec takes."""
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with session._channel.transport.lock:
            held.set()
            assert let_go.wait(PATIENCE)

    holding = background.run(hold)
    assert held.wait(PATIENCE)
    yield holding
    let_go.set()
    holding.result(PATIENCE)


def hurrying(monkeypatch: pytest.MonkeyPatch, rounds: float = 1e-6) -> None:
    """However long this takes, receivers count as many that come and go."""
    monkeypatch.setattr(worker, "BUSY", PATIENCE)
    monkeypatch.setattr(worker, "ROUNDS", rounds)


def echoes(rig: Lockstep, client: Session, server: Session, count: int = 3) -> None:
    for number in range(count):
        client.send(b"%d" % number)
        leave(rig, client)
        assert server.recv(PATIENCE) == b"%d" % number


def test_among_receivers_that_come_and_go_a_socket_stays_lent_until_the_worker_makes_its_rounds(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurrying(monkeypatch)
    client, server = pair
    echoes(rig, client, server)
    assert mask_of(server) == LENT, "nobody has asked the system for anything"
    client.send(b"when it has gone for good")
    rig.until(lambda: server.inbox.qsize() == 1)
    assert mask_of(server) == Want.READ and server.recv(0) == b"when it has gone for good"


def test_rounds_end_when_everybody_has_come_back_or_gone(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    hurrying(monkeypatch)
    client, server = pair
    worker_of = server._channel.worker
    echoes(rig, client, server)
    receiver = asleep_beside(server, background)
    worker_of.step()
    assert worker_of._rounds.timer < math.inf
    rig.until(lambda: worker_of._rounds.timer == math.inf)
    assert mask_of(server) == LENT and not receiver.done(), "who is there keeps it"
    client.send(b"at last")
    leave(rig, client)
    assert receiver.result(PATIENCE) == b"at last"


def test_rounds_wait_for_nobody_s_codec(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    hurrying(monkeypatch)
    client, server = pair
    echoes(rig, client, server)
    worker_of = server._channel.worker
    with in_other_hands(server, background):
        for _ in range(3):
            worker_of.step()
            assert mask_of(server) == LENT and worker_of._rounds.timer < math.inf, "another round comes"
    rig.until(lambda: mask_of(server) == Want.READ)


def test_a_socket_does_not_stay_lent_while_others_wait_for_its_messages(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    hurrying(monkeypatch, rounds=PATIENCE)
    client, server = pair
    echoes(rig, client, server)
    first = asleep_beside(server, background)
    second = background.run(server.recv, PATIENCE)
    while not server._own_inbox()._sleepers:
        assert not second.done()
    client.send(b"1")
    leave(rig, client)
    assert first.result(PATIENCE) == b"1" and mask_of(server) == Want.READ
    client.send(b"2")
    rig.until(second.done)
    assert second.result() == b"2"


def test_receivers_leave_one_word_to_a_worker_that_is_long_in_coming(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurrying(monkeypatch)
    client, server = pair
    echoes(rig, client, server, 50)
    assert len(server._channel.worker._mailbox) <= 2


def test_who_gets_nothing_is_told_how_long_it_has_waited(pair: Pair) -> None:
    _, server = pair
    for receive in (server.recv, server.peek, lambda timeout: server.inbox.get(timeout=timeout)):
        with pytest.raises(bridge.ReceiveTimeout, match=f"within {SOON:g} seconds"):
            receive(SOON)


def test_other_sessions_codecs_keep_no_receiver(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    client.send(b"1")
    leave(rig, client)
    with busy(server._coordinator):
        assert server.recv(PATIENCE) == b"1"


@pytest.mark.parametrize("when", ["before", "as it sleeps"])
def test_a_descriptor_that_somebody_else_has_closed_ends_its_session_and_nothing_else(
    when: str, rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = pair
    descriptor = server._channel.transport.sock.fileno()  # type: ignore[union-attr]
    with open(os.devnull) as another:
        if when == "before":
            os.dup2(another.fileno(), descriptor)
        else:
            monkeypatch.setattr(
                poll.Sleeper, "sleep", lambda *_: os.dup2(another.fileno(), descriptor, False)
            )
        with pytest.raises(bridge.ReceiveTimeout):
            server.recv(SOON)
    threads.check_may_wait()
    assert not threads.this_thread.notes.sleeper.asleep
    rig.until(lambda: is_closed(server))


def test_a_message_that_comes_in_pieces_is_waited_for(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    wire = framed().encode(b"in pieces")
    client._channel.outbox.put(wire[:6], None)
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    client._channel.outbox.put(wire[6:], None)
    leave(rig, client)
    assert server.recv(PATIENCE) == b"in pieces"


def test_nothing_overtakes_what_a_worker_has_read_and_not_yet_handed_over(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    transport, worker = server._channel.transport, server._channel.worker
    client.send(b"1")
    leave(rig, client)
    with transport.lock:
        assert not transport.turn(Want.READ, time.monotonic()) and worker.produced
    client.send(b"2")
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    rig.until(lambda: server.inbox.qsize() == 2)
    assert list(received(server)) == [b"1", b"2"]


def test_nor_what_it_reads_while_the_receiver_sleeps(
    rig: Lockstep, pair: Pair, background: Background
) -> None:
    """A poll of the worker's that ended before the socket was lent: then both have been woken."""
    client, server = pair
    transport, worker = server._channel.transport, server._channel.worker
    receiver = asleep_beside(server, background)
    with transport.lock:
        client.send(b"1")
        leave(rig, client)
        assert not transport.turn(Want.READ, time.monotonic()) and worker.produced
        client.send(b"2")
        leave(rig, client)
    while mask_of(server) == LENT:  # until the receiver has looked, and gone to sleep as others do
        pass
    assert not receiver.done()
    worker.step()
    assert receiver.result(PATIENCE) == b"1"
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(0) == b"2"


def test_nothing_overtakes_what_is_just_being_delivered(
    rig: Lockstep, pair: Pair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it counts as decoded, and is not in the inbox yet."""
    client, server = pair
    transport, credit = server._channel.transport, server._channel.credit
    charge, charged, receiver = ReadCredit._charge, threading.Event(), asleep_beside(server, background)

    def slowly(self: ReadCredit, count: int, cost: int) -> bool:
        resume = charge(self, count, cost)
        if self is credit and not charged.is_set():
            charged.set()
            with contextlib.suppress(FutureTimeout):
                receiver.result(SOON)  # which has its chance to be faster
        return resume

    monkeypatch.setattr(ReadCredit, "_charge", slowly)
    with transport.lock:
        client.send(b"1")
        leave(rig, client)
        assert not transport.turn(Want.READ, time.monotonic())
        delivery = background.run(server._channel.worker._flush)
        assert charged.wait(PATIENCE)
        client.send(b"2")
        leave(rig, client)
    delivery.result(PATIENCE)
    assert receiver.result(PATIENCE) == b"1"


def test_a_receiver_that_waits_for_its_turn_does_not_set_the_idle_timeout_back(
    rig: Lockstep, contexts: Any, monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    clock, client, server = timed(rig, contexts, monkeypatch)
    client.send(b"0")
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"0"
    rig.settle()
    receiver, transport = asleep_beside(server, background), server._channel.transport
    with transport.lock:
        client.send(b"1")
        leave(rig, client)
        with contextlib.suppress(FutureTimeout):
            receiver.result(SOON)  # it is awake by then, and waits for the lock
        clock.now += 9
        transport.write_at_once(framed().encode(b"answer"))
    assert receiver.result(PATIENCE) == b"1"
    clock.now += 2
    rig.settle()
    assert server.end is None


def asleep_beside(session: Session, background: Background) -> Any:
    """A thread that waits for a message of *session*, beside its socket."""
    receiver = background.run(session.recv, PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while mask_of(session) != LENT or session._own_inbox().attendant is None:
        assert time.monotonic() < deadline and not receiver.done()
    with session._channel.transport.lock:  # which the receiver lets go as it goes to sleep
        return receiver


def test_a_second_receiver_sleeps_as_ever_and_both_are_served(
    rig: Lockstep, pair: Pair, background: Background
) -> None:
    client, server = pair
    first = asleep_beside(server, background)
    second = background.run(server.recv, PATIENCE)
    while not server._own_inbox()._sleepers:
        assert not second.done()
    client.send(b"1")
    leave(rig, client)
    while not (first.done() or second.done()):
        pass
    client.send(b"2")
    rig.until(lambda: first.done() and second.done())
    assert {first.result(), second.result()} == {b"1", b"2"}


def test_what_another_way_brings_wakes_the_receiver(
    rig: Lockstep, pair: Pair, background: Background
) -> None:
    _, server = pair
    receiver = asleep_beside(server, background)
    server._own_inbox()._deliver(server, [b"from elsewhere"], None, 0, 0)
    assert receiver.result(PATIENCE) == b"from elsewhere"


def test_what_is_here_is_taken_before_more_is_read(rig: Lockstep, pair: Pair, background: Background) -> None:
    """Or a session might read what there is no room for."""
    client, server = pair
    receiver = asleep_beside(server, background)
    with server._channel.transport.lock:
        client.send(b"1")
        leave(rig, client)
        server._own_inbox()._deliver(server, [b"from elsewhere"], None, 0, 0)
    assert receiver.result(PATIENCE) == b"from elsewhere"
    assert server.inbox.empty()


@pytest.mark.parametrize("end", ["close", "abort"])
def test_the_end_wakes_the_receiver(rig: Lockstep, pair: Pair, background: Background, end: str) -> None:
    _, server = pair
    receiver = asleep_beside(server, background)
    begin_close(server) if end == "close" else server.abort()
    rig.until(receiver.done)
    with pytest.raises(bridge.SessionClosed if end == "close" else bridge.SessionAborted):
        receiver.result()


@pytest.mark.parametrize("end", ["send_eof", "abort"])
def test_the_peers_end_is_for_the_worker_to_tell(rig: Lockstep, pair: Pair, end: str) -> None:
    client, server = pair
    client.send_eof() if end == "send_eof" else client.abort()
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    leave(rig, server)
    with pytest.raises(bridge.EndOfStream if end == "send_eof" else bridge.PeerReset):
        server.recv(SOON)


def test_so_is_what_breaks_the_session(rig: Lockstep, pair: Pair) -> None:
    """And of which nothing is left in the kernel for a poll to speak of."""
    client, server = pair
    client._channel.transport.sock.send(b"junk!")  # type: ignore[union-attr]
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    leave(rig, server)
    assert isinstance(server.end, bridge.TLSError)


def test_a_hang_up_while_the_socket_is_lent_is_told_once(
    rig: Lockstep, pair: Pair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll reports it for an empty mask too, and would for ever."""
    client, server = pair
    worker, transport = server._channel.worker, server._channel.transport
    monkeypatch.setattr(coordinator.Channel, "_read", lambda *_: None)  # the receiver is slow
    with transport.lock:
        assert worker.lend(transport)
    client.abort()
    leave(rig, client)
    told = [bool(worker._poller.wait(0)) for _ in range(5)]
    assert sum(told) == 1
    with transport.lock:
        worker.take_back(transport)
    rig.until(lambda: isinstance(server.end, bridge.PeerReset))


def test_nobody_sleeps_beside_a_session_that_has_more_to_do_than_to_read(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    answer = framed().encode(b"answer")
    with server._channel.transport.lock:
        server._channel.outbox.hold(len(answer))
        server._channel.transport.send([answer])
    client.send(b"1")
    leave(rig, client)
    monkeypatch.setattr(worker.Worker, "lend", None)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    rig.until(lambda: server.inbox.qsize() == client.inbox.qsize() == 1)
    assert server.recv(0) == b"1" and client.recv(0) == b"answer"


def test_nobody_reads_on_after_an_answer_that_was_interrupted(
    rig: Lockstep, pair: Pair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise Interrupt

    client, server = pair
    receiver = asleep_beside(server, background)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(TLSEngine, "write", interrupted)
        server.send(b"answer")
    threads.check_may_wait()
    client.send(b"1")
    leave(rig, client)
    while mask_of(server) == LENT:  # until the receiver has looked
        pass
    rig.until(receiver.done)
    with pytest.raises(bridge.SessionAborted, match="interrupted"):
        receiver.result()


def test_nor_answers_after_a_receiver_was_interrupted(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise Interrupt

    client, server = pair
    client.send(b"1")
    leave(rig, client)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(TLSEngine, "read", interrupted)
        server.recv(PATIENCE)
    monkeypatch.setattr(TLSEngine, "write", None)
    server.send(b"answer")
    rig.until(lambda: is_closed(server))
    assert isinstance(server.end, bridge.SessionAborted) and "interrupted" in str(server.end)


def test_whoever_does_not_wait_does_not_sleep_beside_the_socket(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    client.send(b"1")
    leave(rig, client)
    for look in (lambda: server.recv(0), lambda: server.peek(0), server._own_inbox().get_nowait):
        with pytest.raises(bridge.ReceiveTimeout):
            look()


def test_large_messages_are_left_to_the_worker(rig: Lockstep, contexts: Any) -> None:
    client, server = opened(rig, contexts, *rig.large_pair())
    large = bytes(range(256)) * 400
    client.send(large)
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(0) == large
    assert not server._channel.attend(server._own_inbox(), PATIENCE, []), "nor does a receiver spin"
    client.send(b"1")
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(0) == b"1"
    client.send(b"2")
    leave(rig, client)
    assert server.recv(PATIENCE) == b"2", "short ones again"


def test_a_large_message_while_the_receiver_sleeps(rig: Lockstep, pair: Pair, background: Background) -> None:
    client, server = pair
    receiver = asleep_beside(server, background)
    large = bytes(range(256)) * 400
    client.send(large)
    rig.until(receiver.done)
    assert receiver.result() == large


def test_whoever_has_no_descriptor_left_for_a_bed_sleeps_without(
    rig: Lockstep, pair: Pair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def exhausted() -> Any:
        tries.append(1)
        raise OSError(24, "Too many open files")

    client, server = pair
    monkeypatch.setattr(poll, "Doorbell", exhausted)
    with pytest.raises(bridge.ReceiveTimeout):
        background.run(server.recv, SOON).result(PATIENCE)  # a thread that has no bed yet
    client.send(b"1")
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(PATIENCE) == b"1"
    assert len(tries) == 1


def test_a_receiver_heeds_the_idle_timeout(ca_file: str, server_cert: KeyPair) -> None:
    near, far = socket.socketpair()
    timeouts = bridge.Timeouts(idle=1.0)
    with bridge.Bridge(timeouts=timeouts) as b, bridge.Bridge() as other:
        server = b.adopt(far, bridge.server_context(server_cert.certfile, server_cert.keyfile), wait=False)
        client = other.adopt(
            near, bridge.client_context(ca_file), server_hostname="localhost", timeout=PATIENCE
        )
        client.send(b"1")
        assert server.recv(PATIENCE) == b"1"
        with pytest.raises(bridge.IdleTimeout):
            server.recv(PATIENCE)
        client.abort()


def test_a_timer_that_fires_together_with_a_message_is_set_again(
    rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, client, server = timed(rig, contexts, monkeypatch)
    rig.settle()
    for message in (b"1", b"2"):
        clock.now += 3
        client.send(message)
        rig.until(lambda: not server.inbox.empty())
        assert server.recv(0) == message
        rig.settle()
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(0.001)  # beside the socket itself, so it sees to what the session waits for
    clock.now += 7.5
    client.send(b"3")
    leave(rig, client)
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"3"
    clock.now += 9.5
    rig.settle()
    assert server.end is None
    clock.now += 0.5
    rig.settle()
    assert isinstance(server.end, bridge.IdleTimeout)


def test_a_signal_handler_may_receive_from_another_session(
    rig: Lockstep, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll, "this_thread", threads._ThisThread())  # for the two that are used here
    client, server = opened(rig, contexts, *rig.tcp_pair())
    other_client, other_server = opened(rig, contexts, *rig.tcp_pair())
    other_client.send(b"other")
    leave(rig, other_client)
    seen = []

    def handle(*_: object) -> None:
        seen.append(other_server.recv(PATIENCE))
        client.send(b"1")
        leave(rig, client)

    with interrupting(handle):
        assert server.recv(PATIENCE) == b"1"
    assert seen == [b"other"]


def test_a_signal_handler_may_not_wait_while_the_session_is_in_its_thread_s_hands(
    rig: Lockstep, pair: Pair
) -> None:
    """At no moment: what it waits for may wait for this thread."""
    client, server = pair
    lock: Any = server._channel.transport.lock
    held = []

    class Look(Moment):
        def _pass(self, frame: FrameType, event: str) -> None:
            if lock._is_owned():
                held.append(threads.this_thread.notes.serves_all or (frame.f_lineno, event))

    for number in range(3):
        client.send(b"%d" % number)
        leave(rig, client)
        with Look("call", 0):
            server.recv(PATIENCE)
    assert set(held) == {True}


@forks
def test_a_signal_handler_that_forks_leaves_the_session_to_the_parent(
    pair: Pair, background: Background
) -> None:
    """Also if another thread was in the middle of a turn, and this one asleep."""
    _, server = pair

    def take_a_turn(fork: Callable[[], None]) -> None:
        until(lambda: server._own_inbox().attendant)
        with server._channel.transport.lock:
            fork()

    with forking(background, take_a_turn), pytest.raises(bridge.ReceiveTimeout):
        server.recv(40 * SOON)  # so that a busy machine forks before it is over


@forks
def test_likewise_if_this_thread_waited_for_that_turn(pair: Pair, background: Background) -> None:
    _, server = pair
    mine, begun = threads.this_thread.notes, threading.Event()

    def take_a_turn(fork: Callable[[], None]) -> None:
        with server._channel.transport.lock:
            begun.set()
            until(lambda: mine.serves_all)
            fork()

    with forking(background, take_a_turn), pytest.raises(bridge.ReceiveTimeout):
        assert begun.wait(PATIENCE)
        server.recv(SOON)


def test_and_what_rings_for_the_one_it_interrupts_is_heard(
    rig: Lockstep, contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll, "this_thread", threads._ThisThread())
    _, server = opened(rig, contexts, *rig.tcp_pair())
    _, other_server = opened(rig, contexts, *rig.tcp_pair())

    def handle(*_: object) -> None:
        server._own_inbox()._deliver(server, [b"from elsewhere"], None, 0, 0)
        with pytest.raises(bridge.ReceiveTimeout):
            other_server.recv(SOON)

    with interrupting(handle):
        assert server.recv(PATIENCE) == b"from elsewhere"


def test_a_signal_handler_may_receive_from_the_session_it_interrupts(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threads._ThisThread()  # for the second bell of this thread
    for module in (poll, coordinator):
        monkeypatch.setattr(module, "this_thread", here)
    client, server = pair
    seen: list[Any] = []

    def handle(*_: object) -> None:
        client.send(b"1")
        leave(rig, client)
        worker_of = server._channel.worker
        with ThreadPoolExecutor(1) as pool:
            serving = pool.submit(lambda: [worker_of.step() for _ in iter(lambda: not seen, False)])
            seen.append(server.recv(PATIENCE))
            serving.result(PATIENCE)

    with interrupting(handle), contextlib.suppress(bridge.ReceiveTimeout):
        server.recv(4 * SOON)
    assert seen == [b"1"]


def test_nor_may_it_wait_beside_the_socket_for_what_it_has_interrupted(pair: Pair) -> None:
    _, server = pair
    with server._own_inbox()._lock, pytest.raises(RuntimeError, match="may not wait"):
        server.recv(SOON)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", [False, True], ids=["timeout", "end"])
def test_an_interrupted_receiver_that_gets_nothing_leaves_nothing_locked(
    contexts: Any, kind: str, over: bool
) -> None:
    """Also if the interrupt meets what it was to be told."""
    for number in itertools.count():
        with Lockstep() as rig:
            _, server = opened(rig, contexts, *rig.tcp_pair())
            if over:
                server.abort()
                rig.until(lambda: is_closed(server))  # noqa: B023
            expected = (Interrupt, bridge.ReceiveTimeout, bridge.SessionEnded)
            with Moment(kind, number) as moment, contextlib.suppress(*expected):
                server.recv(0)
            inbox = server._own_inbox()
            assert not (inbox._lock._is_owned() or inbox._sleepers or inbox._called), moment.where  # type: ignore[attr-defined]
        if not moment.where:
            return


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["send", "flush", "flush after the end"])
def test_nor_does_a_sender_that_is_refused(contexts: Any, kind: str, call: str) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            _, server = opened(rig, contexts, *rig.tcp_pair())
            server._channel.transport.answerable = False
            server.send(b"on its way")
            if call != "flush":
                server.abort()
                rig.until(lambda: is_closed(server))  # noqa: B023
            expected = (Interrupt, bridge.OperationTimeout, bridge.SessionEnded)
            with Moment(kind, number) as moment, contextlib.suppress(*expected):
                if call == "send":
                    server.send(b"never")
                else:
                    server.flush(0)
            outbox = server._channel.outbox
            assert not (outbox._lock._is_owned() or outbox._flushing), moment.where  # type: ignore[attr-defined]
        if not moment.where:
            return


def test_a_signal_handler_may_take_what_is_being_peeked_at(contexts: Any) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            client, server = opened(rig, contexts, *rig.tcp_pair())
            client.send(b"1")
            rig.until(lambda: server.inbox.qsize() == 1)  # noqa: B023

            def take() -> None:
                with contextlib.suppress(bridge.ReceiveTimeout):
                    server.recv(0)  # noqa: B023

            with Handled(take, number) as moment, contextlib.suppress(bridge.ReceiveTimeout):
                server.peek(0)
        if not moment.where:
            return


def test_whoever_is_interrupted_passes_on_what_it_was_woken_for(
    rig: Lockstep, pair: Pair, background: Background
) -> None:
    _, server = pair
    inbox, second = server._own_inbox(), []

    def handle(*_: object) -> None:
        second.append(background.run(server.recv, PATIENCE))
        while not inbox._sleepers:
            assert not second[0].done()
        inbox._deliver(server, [b"1"], None, 0, 0)
        raise Interrupt

    with interrupting(handle), pytest.raises(Interrupt):
        server.recv(PATIENCE)
    assert second[0].result(PATIENCE) == b"1"


@pytest.mark.parametrize("moment", ["lend", "take_back"])
def test_a_signal_handler_may_not_wait_while_it_holds_up_the_worker(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Which waits for the session's lock: what the handler waits for might never come."""
    client, server = pair
    call, told = getattr(worker.Worker, moment), []

    def interrupted(*arguments: Any) -> Any:
        with pytest.raises(bridge.ConfigurationError):
            client.recv(SOON)
        told.append(moment)
        return call(*arguments)

    monkeypatch.setattr(worker.Worker, moment, interrupted)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    assert told


class Moody(codecs.Raw):
    """A codec that notes what it is asked, and does *then* as it decodes ``b"!"``."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.asked: list[bytes] = []
        self._then = then

    def decode(self, data: bytes) -> list[bytes]:
        self.asked.append(data)
        if data == b"!":
            self._then()
        return [data]


def moody_pair(rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context], codec: Moody) -> Pair:
    near, far = rig.tcp_pair()
    client = rig.session(contexts[0], near)
    server = rig.session(contexts[1], far, codec=lambda: codec)
    client.send(b"?")
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"?"
    rig.settle()
    return client, server


def fail() -> None:
    raise ValueError("not like this")


def test_a_codec_may_not_receive_what_it_is_decoding_for(rig: Lockstep, contexts: Any) -> None:
    """Which is as wrong on the thread of a receiver as on that of a worker."""
    client, server = moody_pair(rig, contexts, Moody(lambda: server.recv(PATIENCE)))
    client.send(b"!")
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    rig.until(lambda: is_closed(server))
    with pytest.raises(bridge.CodecError, match="a codec may not wait"):
        server.recv(PATIENCE)


def test_a_codec_that_has_failed_is_not_asked_again(rig: Lockstep, contexts: Any) -> None:
    """Also while the coordinator has not seen to it."""
    codec = Moody(fail)
    client, server = moody_pair(rig, contexts, codec)
    for message in (b"!", b"after"):
        client.send(message)
        leave(rig, client)
        with pytest.raises(bridge.ReceiveTimeout):
            server.recv(SOON)
    rig.until(lambda: is_closed(server))
    with pytest.raises(bridge.CodecError, match="not like this"):
        server.recv(PATIENCE)
    assert codec.asked == [b"?", b"!"] and server._channel.credit.held() == 0


@pytest.mark.parametrize("who", ["worker", "receiver"])
def test_nor_while_its_failure_is_being_told(
    who: str, rig: Lockstep, contexts: Any, background: Background
) -> None:
    """When what it has failed at counts as decoded, so that the next receiver may come to it."""

    class Talkative(ValueError):
        def __repr__(self) -> str:
            with pytest.raises(bridge.ReceiveTimeout):
                background.run(server.recv, SOON).result(PATIENCE)
            return "not like this"

    def fail_so() -> None:
        client.send(b"after")
        leave(rig, client)
        raise Talkative

    codec = Moody(fail_so)
    client, server = moody_pair(rig, contexts, codec)
    client.send(b"!")
    if who == "receiver":
        leave(rig, client)
        with pytest.raises(bridge.ReceiveTimeout):
            server.recv(SOON)
        server._coordinator.step()
    rig.until(lambda: is_closed(server))
    with pytest.raises(bridge.CodecError, match="not like this"):
        server.recv(PATIENCE)
    assert codec.asked == [b"?", b"!"] and server._channel.credit.held() == 0


def test_an_interrupted_receiver_whose_codec_fails_hears_of_the_end(contexts: Any) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            client, server = moody_pair(rig, contexts, Moody(fail))
            client.send(b"!")
            leave(rig, client)
            with Moment("call", number) as moment, contextlib.suppress(Interrupt, bridge.ReceiveTimeout):
                server.recv(SOON)
            rig.until(lambda: is_closed(server))  # noqa: B023
            with pytest.raises(bridge.SessionEnded):
                server.recv(0)
        if not moment.where:
            assert number > 50
            return


@pytest.mark.parametrize("then", [None, fail], ids=["messages", "failure"])
def test_nothing_comes_behind_the_end_that_the_coordinator_has_told(
    then: Callable[[], object] | None, rig: Lockstep, contexts: Any
) -> None:
    """While a receiver was decoding."""

    def close() -> None:
        begin_close(server)
        server._coordinator.step()
        assert server.end is not None
        if then is not None:
            then()

    client, server = moody_pair(rig, contexts, Moody(close))
    client.send(b"!")
    leave(rig, client)
    with pytest.raises(bridge.SessionClosed):
        server.recv(PATIENCE)
    server._coordinator.step()
    assert server.inbox.empty() and server._channel.credit.held() == 0
    assert server.state == "open", "its worker has not heard of it"


def until_received(rig: Lockstep, session: Session, last: bytes) -> list[bytes]:
    """What comes until *last*, or the end."""
    found: list[bytes] = []

    def over() -> bool:
        found.extend(received(session) if session.end is None else ())
        return is_closed(session) or last in found

    rig.until(over)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_receiver_loses_nothing_or_its_session(contexts: Any, kind: str) -> None:
    """And leaves nothing locked, and the socket to its worker."""
    for number in itertools.count():
        with Lockstep() as rig:
            client, server = opened(rig, contexts, *rig.tcp_pair())
            client.send(b"1")
            leave(rig, client)
            taken = []
            with Moment(kind, number) as moment, contextlib.suppress(Interrupt):
                taken.append(server.recv(PATIENCE))
            transport = server._channel.transport
            assert not transport.lock._is_owned(), moment.where  # type: ignore[attr-defined]
            assert not server._coordinator._lock._is_owned(), moment.where  # type: ignore[attr-defined]
            inbox = server._own_inbox()
            assert not (inbox._lock._is_owned() or inbox._sleepers or inbox.attendant), moment.where
            threads.check_may_wait()
            client.send(b"2")
            left = until_received(rig, server, b"2")
            if is_closed(server):
                assert isinstance(server.end, bridge.SessionAborted), moment.where
                assert moment.where
            else:
                popped = moment.where.startswith(("inbox.py", "session.py"))  # as with any queue
                assert taken + left == [b"1", b"2"] or (popped and left == [b"2"]), moment.where
        if not moment.where:
            assert number or kind != "call"
            return


def test_an_interrupted_receiver_leaves_its_bridge_nothing_to_count(contexts: Any) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            client, server = opened(rig, contexts, *rig.tcp_pair())
            client.send(bytes(8_000))
            leave(rig, client)
            with Moment("call", number) as moment, contextlib.suppress(Interrupt):
                server.recv(PATIENCE)
            rig.settle()
            begin_close(server)
            begin_close(client)
            rig.until(lambda ends=(client, server): all(map(is_closed, ends)))  # type: ignore[misc]
            rig.sessions.clear()
            del client, server
            gc.collect()
            rig.settle()
            assert not rig.bridges[1]._inbox_tally.used, moment.where
        if not moment.where:
            assert number > 50
            return


def test_a_worker_with_a_crowd_to_serve_lends_nothing(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    monkeypatch.setattr(worker, "CROWD", 1)
    client.send(b"1")
    leave(rig, client)
    assert server.recv(PATIENCE) == b"1", "one is no crowd"
    monkeypatch.setattr(worker, "CROWD", 0)
    monkeypatch.setattr(coordinator, "my_sleeper", None)  # nor costs each receiver a descriptor
    client.send(b"2")
    leave(rig, client)
    with pytest.raises(bridge.ReceiveTimeout):
        server.recv(SOON)
    rig.until(lambda: server.inbox.qsize() == 1)


def test_where_workers_lend_nothing_they_read(
    contexts: Any, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "Poller", poll.SelectorPoller)  # as on other systems
    monkeypatch.setattr(coordinator, "my_sleeper", None)  # nor makes each receiver a bed
    with Lockstep() as rig:
        client, server = opened(rig, contexts, *rig.tcp_pair())
        client.send(b"1")
        leave(rig, client)
        with pytest.raises(bridge.ReceiveTimeout):
            server.recv(SOON)
        rig.until(lambda: server.inbox.qsize() == 1)
        assert server.recv(PATIENCE) == b"1"
        receiver = background.run(server.recv, PATIENCE)
        while not server._own_inbox()._sleepers:
            assert not receiver.done()
        client.send(b"2")
        rig.until(receiver.done)
        assert receiver.result() == b"2"


@pytest.mark.parametrize("call", ["recv", "peek"])
def test_a_receiver_waits_no_longer_than_it_wants_for_another_s_codec(
    call: str, pair: Pair, background: Background
) -> None:
    """Who holds the session meanwhile."""
    _, server = pair
    with in_other_hands(server, background) as holding:
        with pytest.raises(bridge.ReceiveTimeout):
            getattr(server, call)(SOON)
        assert not holding.done()


def test_a_bug_in_an_answer_is_told_as_what_it_is(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: Any) -> Any:
        raise KeyError("a bug")

    _, server = pair
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(TLSEngine, "write", buggy)
        server.send(b"answer")
    rig.until(lambda: is_closed(server))
    with pytest.raises(bridge.SessionAborted, match="cut short .* by KeyError"):
        server.recv(PATIENCE)
