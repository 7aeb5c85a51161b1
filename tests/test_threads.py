"""The lockstep scenarios again, with real threads that change places as often as the interpreter lets them.

Nothing here is replayed by a seed; what makes these tests able to fail is `sys.setswitchinterval(1e-6)`, many threads
at the same thing, and that every byte and every end is checked.  Each wait has a deadline.
"""

from __future__ import annotations

import collections
import itertools
import queue
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from conftest import KeyPair
from rig import only, shrink

import bridge
from bridge import codecs
from bridge.session import Session

PATIENCE = 30.0
SENDERS = 4
MESSAGES = 60


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads change places at every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def applications() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64, thread_name_prefix="application") as pool:
        yield pool


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair, tls_version: str) -> tuple[bridge.Context, bridge.Context]:
    """Client's and server's, for each version in turn."""
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(
            server_cert.certfile, server_cert.keyfile, renegotiation=True, **only(tls_version)
        ),
    )


def messages_codec() -> codecs.Codec[bytes]:
    return codecs.LengthPrefixed(4)


def pair_of(
    bridges: list[bridge.Bridge],
    contexts: tuple[bridge.Context, bridge.Context],
    small: bool = True,
    **more: Any,
) -> tuple[Session, Session]:
    """A client's and a server's session, which face each other over a socket pair."""
    near, far = socket.socketpair()
    if small:
        shrink(near)
        shrink(far)
    server = bridges[-1].adopt(far, contexts[1], codec=messages_codec, wait=False, **more)
    client = bridges[0].adopt(
        near, contexts[0], server_hostname="localhost", codec=messages_codec, timeout=PATIENCE, **more
    )
    assert client.info.version == server.info.version
    return client, server


def numbered(sender: int, rng: random.Random) -> list[bytes]:
    """What one sender sends: who, which, and something of any size."""
    sizes = (0, 1, 100, 5_000, 20_000)
    return [b"%d:%d:" % (sender, number) + rng.randbytes(rng.choice(sizes)) for number in range(MESSAGES)]


def send_all(session: Session, messages: list[bytes]) -> None:
    for message in messages:
        session.send(message, PATIENCE)


def receive_all(session: Session, found: queue.SimpleQueue[bytes]) -> None:
    """Until the clean end."""
    while True:
        try:
            found.put(session.recv(PATIENCE))
        except bridge.EndOfStream:
            return


def finish(futures: list[Future[Any]]) -> None:
    """All of them, or the first failure; a hang is a failure."""
    _, late = wait(futures, PATIENCE)
    assert not late, "something hangs"
    for future in futures:
        future.result()


def drained(found: queue.SimpleQueue[bytes]) -> list[bytes]:
    return [found.get() for _ in range(found.qsize())]


# ── many senders, many receivers ──


def test_many_senders_and_receivers_on_many_sessions_of_one_bridge(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor, tls_version: str
) -> None:
    rng = random.Random(1)
    with bridge.Bridge(workers=2) as ours:
        sessions = [pair_of([ours], contexts) for _ in range(3)]
        work: list[Future[Any]] = []
        sent, found = [], []
        for pair in sessions:
            for session, peer in (pair, pair[::-1]):
                batches = [numbered(sender, rng) for sender in range(SENDERS)]
                arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
                senders = [applications.submit(send_all, session, batch) for batch in batches]
                applications.submit(end_after, senders, session)
                work += senders + [applications.submit(receive_all, peer, arrived) for _ in range(2)]
                sent.append(batches)
                found.append(arrived)
            if tls_version == "TLSv1.2":
                pair[1].renegotiate()
        finish(work)
        for batches, arrived in zip(sent, found, strict=True):
            got = drained(arrived)
            assert collections.Counter(got) == collections.Counter(itertools.chain(*batches))


def end_after(senders: list[Future[Any]], session: Session) -> None:
    wait(senders)
    session.send_eof()


def test_with_one_receiver_the_messages_of_each_sender_come_in_order(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor
) -> None:
    rng = random.Random(2)
    with bridge.Bridge(workers=1) as ours, bridge.Bridge(workers=1) as theirs:
        client, server = pair_of([ours, theirs], contexts)
        batches = [numbered(sender, rng) for sender in range(SENDERS)]
        arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        senders = [applications.submit(send_all, client, batch) for batch in batches]
        applications.submit(end_after, senders, client)
        finish([*senders, applications.submit(receive_all, server, arrived)])
        got = drained(arrived)
        for sender, batch in enumerate(batches):
            assert [message for message in got if message.startswith(b"%d:" % sender)] == batch


def test_a_shared_inbox_gives_each_message_to_one_handler_and_each_session_one_end(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor
) -> None:
    rng = random.Random(3)
    inbox = bridge.Inbox()
    found: queue.SimpleQueue[tuple[Session, bytes | None]] = queue.SimpleQueue()

    def handle() -> None:
        while True:
            try:
                session, message = inbox.get(timeout=PATIENCE)
            except bridge.ShutDown:
                return
            found.put((session, message))
            if message is not None:
                session.send(message, PATIENCE)

    with bridge.Bridge(workers=2) as theirs:
        listener = theirs.listen(("127.0.0.1", 0), contexts[1], codec=messages_codec, inbox=inbox)
        handlers = [applications.submit(handle) for _ in range(4)]
        with bridge.Bridge(workers=2) as ours:
            clients = [
                ours.connect(listener.address, contexts[0], server_hostname="localhost", codec=messages_codec)
                for _ in range(6)
            ]
            sent = [numbered(number, rng) for number, _ in enumerate(clients)]
            echoed: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in clients]
            work = [applications.submit(receive_all, *both) for both in zip(clients, echoed, strict=True)]
            work += [
                applications.submit(lambda c=client, b=batch: (send_all(c, b), c.send_eof()))
                for client, batch in zip(clients, sent, strict=True)
            ]
            finish(work)
            for batch, arrived in zip(sent, echoed, strict=True):
                assert collections.Counter(drained(arrived)) == collections.Counter(batch)
    finish(handlers)
    seen = [found.get() for _ in range(found.qsize())]
    ends = collections.Counter(session for session, message in seen if message is None)
    assert len(ends) == len(clients) and set(ends.values()) == {1}
    assert len(seen) == len(clients) * (MESSAGES + 1)


# ── sudden ends ──


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_sudden_end_in_the_middle_of_everything_leaves_whole_messages_and_nobody_waiting(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor, how: str
) -> None:
    rng = random.Random(4)
    with bridge.Bridge(workers=2) as ours:
        for _ in range(15):
            client, server = pair_of([ours], contexts)
            arrived: dict[Session, queue.SimpleQueue[bytes]] = {
                client: queue.SimpleQueue(),
                server: queue.SimpleQueue(),
            }
            batches = {session: numbered(0, rng) for session in arrived}
            work = [
                applications.submit(until_ended, send_all, session, batches[session]) for session in arrived
            ]
            work += [applications.submit(until_ended, receive_all, *both) for both in arrived.items()]
            victim = rng.choice((client, server))
            while arrived[victim].qsize() < 3 and not all(future.done() for future in work):
                threading.Event().wait(0.0005)
            ends = [applications.submit(getattr(victim, how)) for _ in range(3)]
            peer = server if victim is client else client
            ends.append(applications.submit(close_after, ends[0], peer))
            finish(ends + work)
            for session, other in ((client, server), (server, client)):
                got = drained(arrived[session])
                assert got == batches[other][: len(got)], "whole messages, in order, and nothing else"
                with pytest.raises(bridge.SessionEnded):
                    session.recv(PATIENCE)
                with pytest.raises(bridge.SessionEnded):
                    session.send(b"late")
        ours.close()
        assert ours.snapshot().sessions == ()


def close_after(ending: Future[Any], peer: Session) -> None:
    """As an application does that has its own reasons: not at once, but without waiting for the other's end."""
    wait([ending], 0.01)
    peer.close(PATIENCE)


def until_ended(work: Callable[..., None], session: Session, what: Any) -> None:
    try:
        work(session, what)
    except bridge.SessionEnded:
        pass


def test_closing_the_bridge_under_full_load_ends_every_thread(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor
) -> None:
    rng = random.Random(5)
    before = set(threading.enumerate())
    ours = bridge.Bridge(workers=2)
    bridge_threads = set(threading.enumerate()) - before
    assert len(bridge_threads) == 3
    work: list[Future[Any]] = []
    for _ in range(4):
        for session in pair_of([ours], contexts):
            work.append(applications.submit(until_ended, send_all, session, numbered(0, rng) * 10))
            work.append(applications.submit(until_ended, receive_all, session, queue.SimpleQueue()))
    closing = [applications.submit(ours.close, 0.2) for _ in range(3)]
    finish(closing + work)
    assert not any(thread.is_alive() for thread in bridge_threads)
    with pytest.raises(bridge.BridgeClosed):
        ours.listen(("127.0.0.1", 0), contexts[1])


# ── what must not happen ──


def test_an_idle_bridge_uses_no_cpu(contexts: tuple[bridge.Context, bridge.Context]) -> None:
    with bridge.Bridge(workers=2) as ours:
        sessions = [pair_of([ours], contexts) for _ in range(25)]
        for client, server in sessions:
            client.send(b"once")
            assert server.recv(PATIENCE) == b"once"
        waiting = ours.snapshot().sessions
        assert len(waiting) == 50 and all(session.wants == {"read": "read"} for session in waiting)
        used = time.process_time()
        threading.Event().wait(0.5)
        used = time.process_time() - used
    assert used < 0.1, f"{used:.3f} s of processor time in half a second of silence"


def test_a_paused_session_whose_peer_hung_up_uses_no_cpu(
    contexts: tuple[bridge.Context, bridge.Context],
) -> None:
    with bridge.Bridge(workers=1) as ours, bridge.Bridge(workers=1) as theirs:
        client, server = pair_of([ours, theirs], contexts, small=False, limits=bridge.Limits(inbox_bytes=1))
        for _ in range(20):
            server.send(b"nobody takes this", PATIENCE)
        server.flush(PATIENCE)
        server.abort()
        deadline = time.monotonic() + PATIENCE
        while theirs.snapshot().sessions or not client.inbox.full():
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
        used = time.process_time()
        threading.Event().wait(0.3)
        used = time.process_time() - used
        client.abort()
    assert used < 0.1, f"{used:.3f} s of processor time in 0.3 s"


def test_a_stalled_session_never_delays_another(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor
) -> None:
    limits = bridge.Limits(inbox_bytes=1000, outbox_bytes=1000)
    with bridge.Bridge(workers=1) as ours:
        stalled = [pair_of([ours], contexts, limits=limits) for _ in range(3)]
        senders = [
            applications.submit(until_ended, send_all, session, [b"x" * 20_000] * MESSAGES)
            for pair in stalled
            for session in pair
        ]
        deadline = time.monotonic() + PATIENCE
        while not all(session.outbox.full() and session.inbox.full() for pair in stalled for session in pair):
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
        client, server = pair_of([ours], contexts)
        for number in range(200):
            client.send(b"%d" % number, 5)
            assert server.recv(5) == b"%d" % number
            server.send(b"%d" % number, 5)
            assert client.recv(5) == b"%d" % number
        assert not any(sender.done() for sender in senders), "they are still stalled"
        for pair in stalled:
            for session in pair:
                session.abort()
        finish(senders)


def test_no_thread_is_added_by_sessions(contexts: tuple[bridge.Context, bridge.Context]) -> None:
    before = threading.active_count()
    with bridge.Bridge(workers=2) as ours:
        started = threading.active_count()
        assert started == before + 3, "two workers and the coordinator"
        listener = ours.listen(("127.0.0.1", 0), contexts[1], codec=messages_codec)
        sessions = [
            ours.connect(listener.address, contexts[0], server_hostname="localhost", codec=messages_codec)
            for _ in range(30)
        ]
        peers = [listener.accept(PATIENCE) for _ in sessions]
        for session in sessions:
            session.send(b"to")
        for peer in peers:
            assert peer.recv(PATIENCE) == b"to"
        assert threading.active_count() == started
        assert len(ours.snapshot().sessions) == 60
    assert threading.active_count() == before


def test_a_session_stays_with_its_worker(contexts: tuple[bridge.Context, bridge.Context]) -> None:
    with bridge.Bridge(workers=3) as ours:
        pairs = [pair_of([ours], contexts) for _ in range(6)]
        places = {session.name: session.worker for session in ours.snapshot().sessions}
        assert set(places.values()) == {f"bridge-worker-{number}" for number in range(3)}
        for client, server in pairs:
            client.send(b"x" * 50_000)
            assert len(server.recv(PATIENCE)) == 50_000
        assert {session.name: session.worker for session in ours.snapshot().sessions} == places


# ── one session, everything at once ──


def test_peeks_flushes_snapshots_and_questions_disturb_nothing(
    contexts: tuple[bridge.Context, bridge.Context], applications: ThreadPoolExecutor
) -> None:
    rng = random.Random(6)
    over = threading.Event()
    with bridge.Bridge(workers=2) as ours:
        client, server = pair_of([ours], contexts)
        batch = numbered(0, rng) * 3
        arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def ask() -> None:
            while not over.is_set():
                assert client.info.version and client.state and repr(server)
                client.outbox.qsize()
                server.inbox.full()
                client.flush(PATIENCE)
                ours.snapshot()

        curious = [applications.submit(ask) for _ in range(3)]
        sender = applications.submit(send_all, client, batch)
        applications.submit(end_after, [sender], client)
        finish([sender, applications.submit(receive_all, server, arrived)])
        over.set()
        finish(curious)
        assert drained(arrived) == batch
