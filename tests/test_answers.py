"""The short ways of a byte: answers that the sending thread writes, batches that workers handle, short turns.

All that can come between them and the long way, through the queues: mostly in lockstep, in the order in which it
would hurt.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peers
import pytest
from conftest import KeyPair
from peers import until
from rig import (
    ALLOW_CLIENT_RENEGOTIATION,
    PATIENCE,
    Clock,
    Lockstep,
    Raw,
    begin_close,
    busy,
    engine_of,
    is_closed,
    is_open,
    only,
    raw_context,
    received,
    shrink,
    wants,
)

import bridge
from bridge import codecs
from bridge.crossing import Tally
from bridge.engine import TLSEngine
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.outbox import Outbox
from bridge.poll import Want
from bridge.session import Session
from bridge.threads import check_may_wait

LARGE = b"x" * 16_000
"""One record, and more than the smallest socket buffers take."""
Pair = tuple[Session, Session]


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair, tls_version: str) -> tuple[bridge.Context, bridge.Context]:
    """Client's and server's, for each version in turn."""
    identity = server_cert.certfile, server_cert.keyfile
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(*identity, renegotiation=True, **only(tls_version)),
    )


def framed() -> codecs.LengthPrefixed:
    return codecs.LengthPrefixed(4)


def opened(
    rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context], *pair: Any, **options: Any
) -> Pair:
    """A client's session, made with *options*, and a server's, for which nothing is under way."""
    client = rig.session(contexts[0], pair[0], codec=framed, **options)
    server = rig.session(contexts[1], pair[1], codec=framed)
    rig.until(lambda: is_open(client) and is_open(server))
    rig.settle()
    return client, server


def asked(rig: Lockstep, client: Session, server: Session) -> None:
    """The server has sent something, so that the client may answer."""
    server.send(b"?")
    rig.until(lambda: not client.inbox.empty())
    assert client.recv(0) == b"?"
    rig.settle()
    assert client._channel.transport.answerable and client._channel.transport.quiet


def half_answered(rig: Lockstep, client: Session, server: Session) -> None:
    """The client has answered, and the socket is full in the middle of it."""
    asked(rig, client, server)
    client.send(LARGE)
    assert client.outbox.qsize() == len(LARGE) + 4


@pytest.fixture
def pair(rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]) -> Pair:
    return opened(rig, contexts, *rig.small_pair())


# ── on the way ──


def test_the_answer_to_a_large_message_is_written_at_once_too(
    rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    client, server = opened(rig, contexts, *rig.large_pair())
    for size in (1, 40_000):
        server.send(bytes(size))
        rig.until(lambda: not client.inbox.empty())
        assert len(client.recv(0)) == size
        rig.settle()
        client.send(b"!")
        assert client.outbox.empty()


# ── order ──


def test_an_answer_that_is_stuck_leaves_before_all_that_is_sent_after_it(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    for number in range(20):
        half_answered(rig, client, server)
        more = [b"%d.%d" % (number, count) for count in range(3)]
        for message in more:
            client.send(message)
        rig.until(lambda: server.inbox.qsize() == 4)
        assert list(received(server)) == [LARGE, *more]


def test_an_answer_does_not_overtake_what_this_side_has_sent_before_it(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    asked(rig, client, server)
    client.send(b"1")
    assert client.outbox.empty(), "an answer"
    client.send(b"2")
    assert client.outbox.qsize() > 0, "queued"
    worker = rig.bridges[0]._workers[0]
    server.send(b"?")
    rig.bridges[1]._coordinator.step()
    rig.bridges[1]._workers[0].step()
    worker.step()
    assert client._channel.transport.answerable
    client.send(b"3")
    rig.until(lambda: server.inbox.qsize() == 3)
    assert list(received(server)) == [b"1", b"2", b"3"]


def in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """The next call of SSL_write is interrupted by *act*, and then made."""
    original = TLSEngine.write

    def interrupted(engine: TLSEngine, chunk: bytes) -> int | Want:
        monkeypatch.undo()
        act()
        return original(engine, chunk)

    monkeypatch.setattr(TLSEngine, "write", interrupted)


def test_what_is_sent_in_the_middle_of_an_answer_comes_after_it(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler, a finalizer, or a callback of OpenSSL's: on this thread, with the session in its hands."""
    client, server = pair
    asked(rig, client, server)
    in_the_middle_of_a_write(monkeypatch, lambda: client.send(b"inner"))
    client.send(LARGE)
    rig.until(lambda: server.inbox.qsize() == 2)
    assert list(received(server)) == [LARGE, b"inner"]
    assert client.outbox.empty()


def test_nobody_waits_in_the_middle_of_an_answer(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler might: the worker would wait for the session's lock, and the handler for the worker."""
    client, server = pair
    asked(rig, client, server)

    def wait() -> None:
        with pytest.raises(bridge.ConfigurationError):
            client.recv(0.05)

    in_the_middle_of_a_write(monkeypatch, wait)
    client.send(b"answer")
    monkeypatch.undo()
    check_may_wait()  # as ever after that
    rig.until(lambda: server.inbox.qsize() == 1)
    assert server.recv(0) == b"answer"


def test_a_codec_may_answer_on_whichever_thread_decodes(
    rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    class Echo(codecs.LengthPrefixed):
        def decode(self, data: bytes) -> list[bytes]:
            messages = list(super().decode(data))
            for message in messages:
                sessions[0].send(message)
            return messages

    near, far = rig.small_pair()
    server = rig.session(contexts[1], far, codec=lambda: Echo(4))
    sessions = [server]
    client = rig.session(contexts[0], near, codec=framed)
    rig.until(lambda: is_open(client) and is_open(server))
    sent = [b"%d" % number * (number * 997 % 5_000) for number in range(1, 30)]
    for message in sent:
        client.send(message)
    rig.until(lambda: client.inbox.qsize() == len(sent))
    assert list(received(client)) == sent


# ── ends ──


@pytest.mark.parametrize("how", ["close", "send_eof"])
def test_a_stuck_answer_leaves_before_close_notify(rig: Lockstep, pair: Pair, how: str) -> None:
    client, server = pair
    half_answered(rig, client, server)
    if how == "close":
        begin_close(client)
    else:
        client.send_eof()
    for session in (client, client.outbox):
        with pytest.raises(bridge.SessionClosed):
            session.send(b"late") if session is client else session.put(b"late")
    rig.until(lambda: isinstance(server.end, bridge.EndOfStream))
    assert list(received(server)) == [LARGE]
    begin_close(server)
    rig.until(lambda: is_closed(client) and is_closed(server))
    report = client._channel.closed.peek().report  # type: ignore[union-attr]
    assert report and report.unsent == 0 and report.close_notify_received


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_closed_session_takes_no_answer_though_its_owner_has_not_heard_of_it(
    rig: Lockstep, pair: Pair, end: str
) -> None:
    client, server = pair
    asked(rig, client, server)
    if end == "abort":
        client.abort()
    else:
        begin_close(client)
    assert client._channel.transport.quiet, "its owner has not heard of it"
    with pytest.raises(bridge.SessionEnded):
        client.send(b"too late")
    rig.until(lambda: server.end is not None)
    assert list(received(server)) == []


def test_what_of_an_answer_has_not_left_is_reported_as_unsent(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    half_answered(rig, client, server)
    client.send(b"queued")
    client.abort()
    rig.until(lambda: is_closed(client))
    ending = client._channel.closed.peek()
    assert ending is not None and ending.report.unsent == len(LARGE) + 4 + len(b"queued") + 4
    assert rig.bridges[0].snapshot().outbox_bytes == 0


def test_an_answer_to_a_peer_that_is_gone_ends_the_session_and_nothing_else(
    rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    near, far = rig.small_pair()
    client, server = opened(rig, contexts, near, far)
    asked(rig, client, server)
    server.abort()
    rig.bridges[1]._coordinator.step()
    rig.bridges[1]._workers[0].step()
    client.send(b"to nobody")
    rig.until(lambda: is_closed(client))
    ending = client._channel.closed.peek()
    assert ending is not None and isinstance(ending.cause, bridge.PeerReset)
    assert ending.report.unsent == len(b"to nobody") + 4
    with pytest.raises(bridge.PeerReset):
        client.send(b"again")
    with pytest.raises(bridge.PeerReset):
        client.flush(0.1)


def test_after_ctrl_c_in_the_middle_of_an_answer_nothing_is_read_or_written_any_more(
    rig: Lockstep, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = pair
    asked(rig, client, server)
    calls: list[str] = []
    original = TLSEngine.write

    def interrupted(engine: TLSEngine, chunk: bytes) -> int:
        original(engine, chunk)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TLSEngine, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.send(b"cut")
    server.send(b"?")
    rig.bridges[1]._coordinator.step()
    rig.bridges[1]._workers[0].step()
    with monkeypatch.context() as patched:
        for name in ("write", "read"):
            patched.setattr(TLSEngine, name, lambda *_: calls.append("called"))
        transport = client._channel.transport
        transport.turn(Want.READ, time.monotonic())  # of a worker that was in the middle of its step
        client.send(b"by another thread")
        while not is_closed(client):
            rig.bridges[0]._workers[0].step()
            rig.bridges[0]._coordinator.step()
    assert not calls
    ending = client._channel.closed.peek()
    assert ending is not None and isinstance(ending.cause, bridge.SessionAborted)
    assert ending.report.unsent == len(b"by another thread") + 4


# ── deadlines ──


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("worker", "transport"):
        monkeypatch.setattr(getattr(bridge, module), "time", made)
    return made


@pytest.mark.parametrize("last", ["read", "answer"])
def test_a_session_is_idle_after_its_last_short_turn_and_not_before(
    clock: Clock, rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context], last: str
) -> None:
    near, far = rig.large_pair()
    client, server = opened(rig, contexts, near, far, timeouts=bridge.Timeouts(idle=10))
    worker = rig.bridges[0]._workers[0]
    for _ in range(5):
        clock.now += 6
        server.send(b"?")
        server.send(b"?")
        rig.until(lambda: client.inbox.qsize() == 2)
        assert list(received(client)) == [b"?", b"?"]
    clock.now += 3
    if last == "answer":
        client.send(b"!")
        assert client.outbox.empty(), "written at once"
        clock.now += 8
        worker.step()
        assert client._channel.transport.cause is None
        clock.now += 2
    else:
        clock.now += 7
    rig.until(lambda: is_closed(client))
    with pytest.raises(bridge.IdleTimeout):
        client.recv(0)


def test_a_deadline_that_comes_with_the_last_message_is_not_forgotten(
    clock: Clock, rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    near, far = rig.large_pair()
    client, server = opened(rig, contexts, near, far, timeouts=bridge.Timeouts(idle=10))
    clock.now += 6
    server.send(b"1")
    rig.until(lambda: client.inbox.qsize() == 1)
    clock.now += 6  # the timer was set to the deadline before that message
    server.send(b"2")
    rig.bridges[1]._coordinator.step()
    rig.bridges[1]._workers[0].step()
    rig.until(lambda: client.inbox.qsize() == 2)
    clock.now += 9
    rig.settle()
    assert not is_closed(client)
    clock.now += 2
    rig.settle()
    assert isinstance(client.end, bridge.IdleTimeout), "nothing has come for eleven seconds"


def test_a_stuck_answer_stalls(
    clock: Clock, rig: Lockstep, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    client, server = opened(rig, contexts, *rig.small_pair(), timeouts=bridge.Timeouts(write_stall=10))
    half_answered(rig, client, server)
    worker = rig.bridges[0]._workers[0]
    worker.step()
    clock.now += 9
    worker.step()
    assert client._channel.transport.cause is None
    clock.now += 2
    worker.step()
    assert isinstance(client._channel.transport.cause, bridge.WriteStalled)


# ── locks ──


class Snatched:
    """A session's lock, which its worker has."""

    def _is_owned(self) -> bool:
        return False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        assert not blocking, "would wait for the worker's turn, which may log, and call back"
        return False


def test_a_sender_does_not_wait_for_the_worker_s_turn(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    asked(rig, client, server)
    transport = client._channel.transport
    lock, transport.lock = transport.lock, Snatched()  # type: ignore[assignment]
    client.send(b"queued")
    transport.lock = lock
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"queued"


def test_a_busy_coordinator_gets_what_was_read_in_order(rig: Lockstep, pair: Pair) -> None:
    client, server = pair
    one = rig.bridges[0]
    for number in range(10):
        server.send(b"%d" % number)
        rig.bridges[1]._coordinator.step()
        rig.bridges[1]._workers[0].step()
        if number % 3:
            with busy(one._coordinator):
                one._workers[0].step()
        else:
            one._workers[0].step()
    rig.settle()
    assert list(received(client)) == [b"%d" % number for number in range(10)]


# ── renegotiation ──


def test_an_answer_in_the_middle_of_a_renegotiation_waits_for_its_end(
    rig: Lockstep, ca_file: str, server_cert: KeyPair
) -> None:
    version = only("TLSv1.2")
    contexts = (
        bridge.client_context(ca_file, **version),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, renegotiation=True, **version),
    )
    client, server = opened(rig, contexts, *rig.large_pair())
    asked(rig, client, server)
    server.renegotiate()
    rig.bridges[1]._coordinator.step()
    rig.bridges[1]._workers[0].step()
    while not engine_of(client).mid_handshake():
        rig.bridges[0]._workers[0].step()
    client.send(b"!")
    rig.bridges[0]._coordinator.step()
    rig.bridges[0]._workers[0].step()
    assert client.outbox.qsize() > 0 and wants(client)["write"] == "read"
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"!"
    rig.until(client.outbox.empty)
    asked(rig, client, server)


def test_an_answer_to_a_peer_that_has_begun_a_renegotiation_waits_for_its_end(
    rig: Lockstep, server_cert: KeyPair
) -> None:
    """Our own contexts refuse such a peer; one that the application made need not."""
    near, far = rig.large_pair()
    context = raw_context("TLSv1.2", server_cert)
    context.set_options(ALLOW_CLIENT_RENEGOTIATION)
    server = rig.session(context, near, server_side=True, codec=framed, server_hostname=None)
    client = Raw(raw_context("TLSv1.2"), far, server_side=False)
    while client.handshake() is not None:
        rig.round()
    assert client.write(b"\0\0\0\1?") == 5
    assert client.connection.renegotiate() and client.handshake() is Want.READ
    rig.until(lambda: not server.inbox.empty() and engine_of(server).mid_handshake())
    assert server._channel.transport.quiet
    server.send(b"!")
    assert server.outbox.qsize() == 5 and wants(server)["write"] == "read"
    while client.connection.renegotiate_pending():
        client.handshake()
        rig.settle()
    assert client.read_all() == b"\0\0\0\1!" and server.outbox.empty()


# ── credit ──


def outbox() -> Outbox:
    return Outbox(1000, Tally(1_000_000), lambda: None)


def test_flush_waits_for_its_own_bytes_and_not_for_as_many_of_an_answer() -> None:
    """The answer found the outbox idle, and came to stick only when somebody had put something into it."""
    box = outbox()
    box.put(b"x" * 10, 0)
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(box.flush, PATIENCE)
        until(lambda: len(box._flushing) == 1)
        box.hold(100)
        box.give_back(100)
        with pytest.raises(bridge.OperationTimeout):
            box.flush(0.05)
        assert not flushed.done()
        box.give_back(10)
        flushed.result(PATIENCE)
    box.hold(5)
    with pytest.raises(bridge.OperationTimeout, match="5 bytes"):
        box.flush(0)
    box.give_back(5)
    box.flush(0)
    assert box.held() == 0


class Overtaken(ReadCredit):
    """Read credit whose first count changes hands as soon as it has been looked at."""

    __slots__ = ("meanwhile",)

    def _look(self, name: str) -> int:
        value: int = getattr(ReadCredit, name).__get__(self)
        meanwhile, self.meanwhile = getattr(self, "meanwhile", None), None
        if meanwhile is not None:
            meanwhile()
        return value

    _used = property(lambda self: self._look("_used"), lambda self, n: ReadCredit._used.__set__(self, n))  # type: ignore[attr-defined]
    _decoded = property(
        lambda self: self._look("_decoded"),
        lambda self, n: ReadCredit._decoded.__set__(self, n),  # type: ignore[attr-defined]
    )
    _read = property(lambda self: self._look("_read"), lambda self, n: ReadCredit._read.__set__(self, n))  # type: ignore[attr-defined]


def test_what_becomes_a_message_just_now_is_never_taken_for_room() -> None:
    inbox = SessionInbox()
    credit = Overtaken(100, Tally(1_000_000), lambda: None, inbox)
    for _ in range(3):
        credit.spend(100)
        credit.meanwhile = lambda: inbox._deliver(None, [b"m"], credit, 100, 100)
        assert credit.room() <= 0
        assert inbox.get(block=False) == b"m"


def test_nobody_ever_sees_less_than_nothing_held() -> None:
    inbox = SessionInbox()
    credit = Overtaken(100, Tally(1_000_000), lambda: None, inbox)

    def more() -> None:
        credit.spend(50)
        inbox._deliver(None, [b"m"], credit, 50, 50)

    for number in range(3):
        credit.meanwhile = more
        assert credit.held() >= 50 * number


# ── threads ──


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change places at every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def handle(shared: Inbox) -> None:
    """Answer everything until a session ends."""
    while True:
        session, message = shared.get(timeout=10 * PATIENCE)
        if message is None:
            return
        session.send(b"answer " + message, PATIENCE)


def flood(session: Session, name: bytes, count: int) -> None:
    for number in range(count):
        session.send(name + b" %d " % number + bytes(number * 7919 % 2_000), PATIENCE)


def gather(session: Session, count: int) -> dict[bytes, list[int]]:
    """Who sent which numbers, in the order in which they came."""
    found: dict[bytes, list[int]] = {}
    for _ in range(count):
        *name, number, _ = session.recv(PATIENCE).rstrip(b"\0").split(b" ")
        found.setdefault(b" ".join(name), []).append(int(number))
    return found


@pytest.mark.parametrize("count", [300, pytest.param(5_000, marks=pytest.mark.stress)])
def test_answers_of_a_pool_and_floods_of_others_on_the_same_sessions_lose_nothing(
    restless: None, contexts: tuple[bridge.Context, bridge.Context], count: int
) -> None:
    """Tiny buffers and credit; each session floods, is flooded, and is answered by whichever handler has it."""
    shared, limits = bridge.Inbox(), bridge.Limits(inbox_bytes=3_000, outbox_bytes=3_000)
    patience = PATIENCE * max(1, count / 300)
    with (
        bridge.Bridge(workers=2, limits=limits) as far,
        bridge.Bridge(workers=2, limits=limits) as near,
        ThreadPoolExecutor(16) as pool,
    ):
        pairs = []
        for _ in range(3):
            ours, theirs = map(shrink, socket.socketpair())
            server = near.adopt(theirs, contexts[1], codec=framed, inbox=shared, wait=False)
            client = far.adopt(ours, contexts[0], server_hostname="localhost", codec=framed)
            pairs.append((client, server))

        handlers = [pool.submit(handle, shared) for _ in range(3)]
        gathering = [pool.submit(gather, client, 4 * count) for client, _ in pairs]
        floods = [pool.submit(flood, client, name, count) for client, _ in pairs for name in (b"a", b"b")]
        floods += [pool.submit(flood, server, name, count) for _, server in pairs for name in (b"c", b"d")]
        for future in floods:
            future.result(patience)
        whole = list(range(count))
        for future in gathering:
            assert future.result(patience) == dict.fromkeys([b"answer a", b"answer b", b"c", b"d"], whole)
        for client, server in pairs:
            server.flush(patience)
            assert server.outbox.empty() and client.outbox.empty()
        assert near.snapshot().inbox_bytes == far.snapshot().inbox_bytes == 0
        for client, _ in pairs:
            client.abort()
        for handler in handlers:
            handler.result(patience)


def answer_all(session: Session) -> int:
    """Answer with numbers while it may send, and read to the end.  How many were accepted."""
    accepted = 0
    with contextlib.suppress(bridge.SessionEnded):
        while True:
            message = session.recv(PATIENCE)
            session.send(b"%d" % accepted + message)
            accepted += 1
    with contextlib.suppress(bridge.SessionEnded):
        while True:
            session.recv(PATIENCE)
    return accepted


def ask_for_ever(session: Session, size: int) -> None:
    with contextlib.suppress(bridge.SessionEnded):
        while True:
            session.send(bytes(size), PATIENCE)


@pytest.mark.parametrize("rounds", [20, pytest.param(1_000, marks=pytest.mark.stress)])
@pytest.mark.parametrize("end", ["close", "send_eof"])
def test_every_answer_that_was_accepted_arrives_whenever_this_side_closes(
    restless: None, contexts: tuple[bridge.Context, bridge.Context], end: str, rounds: int
) -> None:
    rng = random.Random(rounds)
    with bridge.Bridge(workers=1) as far, bridge.Bridge(workers=1) as near, ThreadPoolExecutor(4) as pool:
        for _ in range(rounds):
            ours, theirs = map(shrink, socket.socketpair())
            server = near.adopt(theirs, contexts[1], codec=framed, wait=False)
            client = far.adopt(ours, contexts[0], server_hostname="localhost", codec=framed)
            size = rng.choice((1, 100, 3_000))
            asking = pool.submit(ask_for_ever, server, size)
            answering = pool.submit(answer_all, client)
            found = [server.recv(PATIENCE) for _ in range(rng.randrange(6))]
            closing = pool.submit(getattr(client, end))
            found += list(server)
            assert server.close()
            result = closing.result(PATIENCE)
            assert result or end == "send_eof", "nothing is unsent"
            accepted = answering.result(PATIENCE)
            assert found == [b"%d" % number + bytes(size) for number in range(accepted)]
            asking.result(PATIENCE)
            assert client.close()


@pytest.mark.skipif(
    sys.platform != "linux" or peers.libssl() is None, reason="needs Linux and a libssl that ctypes can use"
)
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param({"version": "TLSv1.3", "update_every": 1 << 13}, id="key-updates"),
        pytest.param({"version": "TLSv1.2", "renegotiate_every": 1 << 15}, id="renegotiations"),
    ],
)
def test_answers_go_on_while_the_peer_changes_keys_and_renegotiates(
    server_cert: KeyPair, ca_file: str, trouble: dict[str, Any]
) -> None:
    identity = {"certfile": server_cert.certfile, "keyfile": server_cert.keyfile}
    pattern, checker = peers.Pattern(), peers.Checker(peers.Pattern())
    with (
        peers.program("echo", role="server", **trouble, **identity) as peer,
        bridge.Bridge(workers=1) as ours,
    ):
        session = ours.connect(
            ("127.0.0.1", peer.port()), bridge.client_context(ca_file), server_hostname="localhost"
        )
        sent = 0
        for number in range(600):
            size = 1 + number * 7919 % 12_000
            session.send(bytes(pattern.at(sent, size)), PATIENCE)
            sent += size
            while checker.received < sent - 6_000 * (number % 3):  # now in turns, and now ahead
                checker.feed(session.recv(PATIENCE))
        while checker.received < sent:
            checker.feed(session.recv(PATIENCE))
        assert session.close()
        result = peer.result()
    assert result["error"] is None and result["echoed"] == sent
    assert result["updates"] + result["renegotiations"] > 20


def test_getters_that_give_up_all_the_time_swallow_no_wake_up(restless: None) -> None:
    inbox, count = Inbox(), 400

    def get(timeout: float) -> list[int]:
        found = []
        while True:
            try:
                number = inbox.get(timeout=timeout)[1]
            except bridge.ReceiveTimeout:
                continue
            if number is None:
                return found
            found.append(number)

    with ThreadPoolExecutor(6) as pool:
        getters = [pool.submit(get, timeout) for timeout in (0.0001, 0.0005, 0.001, 0.01, PATIENCE, PATIENCE)]
        for number in range(count):
            inbox.put((None, number))
            if number % 10 == 0:
                until(inbox.empty)
        for _ in getters:
            inbox.put((None, None))
        found = [number for getter in getters for number in getter.result(PATIENCE)]
    assert sorted(found) == list(range(count))
    assert inbox.empty() and not inbox._sleepers
