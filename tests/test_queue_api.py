"""Queues as programs know them: a session's own, and one shared by many sessions and a pool of handlers."""

from __future__ import annotations

import collections
import contextlib
import gc
import queue
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import KeyPair
from peers import until

import bridge
from bridge import codecs
from bridge.crossing import Tally
from bridge.outbox import Outbox

PATIENCE = 30.0
QUICK = bridge.Timeouts(close_notify=0.3)


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=2, timeouts=QUICK) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def framed() -> codecs.LengthPrefixed:
    return codecs.LengthPrefixed(4)


@pytest.fixture
def pair(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> Iterator[tuple[bridge.Session, bridge.Session]]:
    with b.listen(("127.0.0.1", 0), server_ctx, codec=framed) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", codec=framed)
        server = listener.accept(PATIENCE)
        yield client, server
        client.abort()
        server.abort()


# ── a session's own queues ──


def test_an_inbox_behaves_as_a_queue(pair: tuple[bridge.Session, bridge.Session]) -> None:
    client, server = pair
    inbox = server.inbox
    assert inbox.empty() and not inbox.full() and inbox.qsize() == 0
    for get in (
        inbox.get_nowait,
        lambda: inbox.get(False),
        lambda: inbox.get(block=False),
        lambda: inbox.get(True, 0.01),
        lambda: inbox.get(timeout=0),
    ):
        with pytest.raises(queue.Empty):
            get()
    for number in range(4):
        client.send(b"%d" % number)
    until(lambda: inbox.qsize() == 4)
    assert not inbox.empty()
    assert [inbox.get(), inbox.get(timeout=1), inbox.get(False), inbox.get_nowait()] == [
        b"0",
        b"1",
        b"2",
        b"3",
    ]
    assert inbox.empty() and inbox.qsize() == 0


def test_an_inbox_after_the_end_is_as_a_queue_that_was_shut_down(
    pair: tuple[bridge.Session, bridge.Session],
) -> None:
    client, server = pair
    client.send(b"last")
    client.send_eof()
    assert server.inbox.get(timeout=PATIENCE) == b"last", "what is there is still given out"
    for get in (server.inbox.get, server.inbox.get_nowait, lambda: server.inbox.get(timeout=PATIENCE)):
        with pytest.raises(bridge.ShutDown) as caught:
            get()
        assert type(caught.value) is bridge.EndOfStream and not isinstance(caught.value, queue.Empty)
    assert server.inbox.empty()


def test_an_outbox_is_full_while_somebody_waits_for_room() -> None:
    """Whoever comes next has to wait behind."""
    outbox = Outbox(10, Tally(1000), lambda: None)
    outbox.put(b"123456789", None)
    assert not outbox.full()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outbox.put, b"ab", PATIENCE)
        until(lambda: outbox._waiting)
        assert outbox.full()
        with pytest.raises(queue.Full):
            outbox.put(b"a", 0)
        outbox.give_back(9)
        assert waiting.result(PATIENCE)
    assert not outbox.full()


def test_a_session_that_fails_unseen_says_so_in_the_shared_inbox(
    b: bridge.Bridge, client_ctx: bridge.Context
) -> None:
    """Its `connect` has returned before that, and nobody can ask it."""
    shared = bridge.Inbox()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    session = b.connect(address, client_ctx, server_hostname="localhost", inbox=shared, wait=False)
    assert shared.get(timeout=PATIENCE) == (session, None)
    assert isinstance(session.end, bridge.ConnectFailed)
    with pytest.raises(bridge.ConnectFailed):
        b.connect(address, client_ctx, server_hostname="localhost", inbox=shared)
    assert shared.empty(), "who waits for it has been told"


def test_an_outbox_behaves_as_a_queue(pair: tuple[bridge.Session, bridge.Session]) -> None:
    client, server = pair
    outbox = client.outbox
    outbox.put(b"0")
    outbox.put(b"1", timeout=1)
    outbox.put(b"2", False)
    outbox.put(b"3", block=False)
    outbox.put_nowait(b"4")
    assert [server.recv(PATIENCE) for _ in range(5)] == [b"%d" % number for number in range(5)]
    until(outbox.empty)
    assert outbox.qsize() == 0 and not outbox.full()
    client.close()
    for put in (outbox.put, outbox.put_nowait, lambda message: outbox.put(message, timeout=PATIENCE)):
        with pytest.raises(bridge.ShutDown) as caught:
            put(b"late")
        assert type(caught.value) is bridge.SessionClosed and not isinstance(caught.value, queue.Full)


@pytest.mark.parametrize("odd", [b"x", 1, (1, 2, 3)])
def test_what_is_put_into_a_shared_inbox_is_a_pair(odd: Any) -> None:
    with pytest.raises(TypeError, match="put takes a pair"):
        bridge.Inbox().put(odd)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="queue.ShutDown came with Python 3.13")
def test_shut_down_is_python_s_own() -> None:
    assert bridge.ShutDown is queue.ShutDown
    assert issubclass(bridge.SessionEnded, queue.ShutDown)


def test_a_program_for_queues_takes_ours_instead(pair: tuple[bridge.Session, bridge.Session]) -> None:
    """A worker as in the manual of `queue`, given queue.Queue first and a session's queues then."""

    def work(incoming: Any, outgoing: Any) -> int:
        count = 0
        while True:
            try:
                item = incoming.get(timeout=PATIENCE)
            except bridge.ShutDown:
                return count
            if item == b"stop":
                return count
            outgoing.put(item.upper())
            count += 1

    client, server = pair
    plain_in: queue.Queue[bytes] = queue.Queue()
    plain_out: queue.Queue[bytes] = queue.Queue()
    for item in (b"a", b"b", b"stop"):
        plain_in.put(item)
        client.outbox.put(item)
    assert work(plain_in, plain_out) == work(server.inbox, server.outbox) == 2
    assert [plain_out.get(), plain_out.get()] == [client.inbox.get(), client.inbox.get()] == [b"A", b"B"]
    client.send_eof()
    assert work(server.inbox, server.outbox) == 0


def test_peek_leaves_the_message_for_the_next(
    pair: tuple[bridge.Session, bridge.Session], pool: ThreadPoolExecutor
) -> None:
    client, server = pair
    peeking = [pool.submit(server.peek, PATIENCE) for _ in range(5)]
    client.send(b"one")
    client.send(b"two")
    assert [future.result(PATIENCE) for future in peeking] == [b"one"] * 5
    assert [server.peek(), server.recv(), server.peek(), server.recv()] == [b"one", b"one", b"two", b"two"]


def test_a_peek_that_waits_does_not_swallow_a_receiver_s_wake_up(
    pair: tuple[bridge.Session, bridge.Session], pool: ThreadPoolExecutor
) -> None:
    client, server = pair
    for number in range(50):
        waiting = [pool.submit(server.peek, PATIENCE) for _ in range(3)]
        waiting.append(pool.submit(server.recv, PATIENCE))
        waiting += [pool.submit(server.peek, PATIENCE) for _ in range(3)]
        inbox = server._own_inbox()
        until(lambda inbox=inbox: len(inbox._sleepers) + (inbox.attendant is not None) == 7)  # type: ignore[misc]
        client.send(b"%d" % number)
        assert waiting[3].result(PATIENCE) == b"%d" % number
        client.send(b"more")
        for future in waiting:
            assert future.result(PATIENCE) in (b"%d" % number, b"more")
        assert server.recv(PATIENCE) == b"more"


def test_many_receivers_get_each_message_once(
    pair: tuple[bridge.Session, bridge.Session], pool: ThreadPoolExecutor
) -> None:
    client, server = pair
    count = 2_000

    def receive() -> list[int]:
        return [int(message) for message in server]  # to the clean end

    receiving = [pool.submit(receive) for _ in range(6)]
    sending = [
        pool.submit(lambda part: [client.send(b"%d" % n) for n in part], range(i, count, 4)) for i in range(4)
    ]
    for future in sending:
        future.result(PATIENCE)
    client.send_eof()
    received = [future.result(PATIENCE) for future in receiving]
    assert sorted(number for part in received for number in part) == list(range(count))


def test_messages_of_concurrent_senders_never_interleave(
    pair: tuple[bridge.Session, bridge.Session], pool: ThreadPoolExecutor
) -> None:
    """Each sender's own order holds, and every message is whole."""
    client, server = pair
    senders, each = 6, 200

    def send(sender: int) -> None:
        for number in range(each):
            client.send(bytes([sender]) + number.to_bytes(2, "big") + bytes([sender]) * (number * 37 % 5_000))

    sending = [pool.submit(send, sender) for sender in range(senders)]
    seen: dict[int, list[int]] = collections.defaultdict(list)
    for _ in range(senders * each):
        message = server.recv(PATIENCE)
        sender, number = message[0], int.from_bytes(message[1:3], "big")
        assert message[3:] == bytes([sender]) * (number * 37 % 5_000)
        seen[sender].append(number)
    assert seen == {sender: list(range(each)) for sender in range(senders)}
    for future in sending:
        future.result(PATIENCE)


# ── one inbox for many sessions ──


def test_an_inbox_of_a_user_s_class_may_be_false_while_it_is_empty(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    class Sized(bridge.Inbox):
        def __len__(self) -> int:
            return self.qsize()

    shared = Sized()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", inbox=shared)
        with listener.accept(PATIENCE) as peer:
            peer.send(b"hello")
            assert shared.get(timeout=PATIENCE) == (client, b"hello")


def test_several_listeners_and_clients_on_one_inbox(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared, count = bridge.Inbox(), 5
    listeners = [b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines, inbox=shared) for _ in range(2)]
    clients = [
        b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codecs.Lines, inbox=shared)
        for listener in listeners
        for _ in range(3)
    ]
    for number in range(count):
        for client in clients:
            client.send(f"{client.name} {number}")
    for client in clients:
        client.send_eof()
    said: dict[Any, list[Any]] = collections.defaultdict(list)
    for _ in range(len(clients) * (count + 2)):  # each server session's messages and end; each client's end
        session, message = shared.get(timeout=PATIENCE)
        assert isinstance(session, bridge.Session)
        assert None not in said[session], "something came after a session's end"
        said[session].append(message)
    assert shared.empty()
    servers = set(said) - set(clients)
    assert len(servers) == len(clients)
    for client in clients:
        assert said[client] == [None] and isinstance(client.end, bridge.EndOfStream)
    expected = [[f"{client.name} {number}" for number in range(count)] + [None] for client in clients]
    assert sorted((said[server] for server in servers), key=repr) == sorted(expected, key=repr)
    with pytest.raises(queue.Empty):
        shared.get_nowait()


@pytest.mark.parametrize("how", ["eof", "cut", "abort here", "close here", "codec", "bridge"])
def test_the_end_of_a_session_comes_exactly_once(
    server_ctx: bridge.Context, client_ctx: bridge.Context, how: str
) -> None:
    shared = bridge.Inbox()
    with bridge.Bridge(workers=1, timeouts=QUICK) as far, bridge.Bridge(workers=1, timeouts=QUICK) as b:
        codec = (lambda: codecs.LengthPrefixed(4, max_length=1)) if how == "codec" else codecs.Raw
        listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=shared, codec=codec)
        client = far.connect(listener.address, client_ctx, server_hostname="localhost")
        if how == "codec":
            client.send(b"\0\0\0\1x")
            assert shared.get(timeout=PATIENCE)[1] == b"x"
            session = next(iter(b._channels._members)).handle
            client.send(b"\0\0\0\2")
        else:
            client.send(b"x")
            session, message = shared.get(timeout=PATIENCE)
            assert message == b"x" and session.end is None
        cause: Any = {
            "eof": bridge.EndOfStream,
            "cut": (bridge.PeerReset, bridge.Truncated),
            "abort here": bridge.SessionAborted,
            "close here": bridge.SessionClosed,
            "codec": bridge.MessageTooLarge,
            "bridge": bridge.SessionClosed,
        }[how]
        {
            "eof": client.send_eof,
            "cut": client.abort,
            "abort here": session.abort,
            "close here": lambda: session.close(1),
            "codec": lambda: None,
            "bridge": lambda: b.close(1),
        }[how]()
        assert shared.get(timeout=PATIENCE) == (session, None)
        assert isinstance(session.end, cause)
        session.close()
        session.abort()
        b.close()
        with pytest.raises(bridge.ShutDown, match="closed"):
            shared.get(timeout=PATIENCE)
        client.abort()


def test_a_session_that_never_opened_is_not_on_the_inbox(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        with pytest.raises(bridge.HostnameMismatch):
            b.connect(listener.address, client_ctx, server_hostname="wrong.example", inbox=shared)
    until(lambda: not b.snapshot().sessions)
    assert shared.empty()


def test_a_pool_of_handlers_ends_when_the_bridge_is_closed(
    server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    """The whole server of the documentation: a pool of threads, one loop each."""
    shared = bridge.Inbox()

    def handle() -> int:
        handled = 0
        while True:
            try:
                session, message = shared.get()
            except bridge.ShutDown:
                return handled
            if message is not None:
                session.send(message.upper())
                handled += 1

    handlers = [pool.submit(handle) for _ in range(4)]
    with bridge.Bridge(workers=2, timeouts=QUICK) as far:
        with bridge.Bridge(workers=2, timeouts=QUICK) as b:
            listener = b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines, inbox=shared)
            clients = [
                far.connect(listener.address, client_ctx, server_hostname="localhost", codec=codecs.Lines)
                for _ in range(10)
            ]
            for number in range(50):
                for client in clients:
                    client.send(f"message {number}")
            for client in clients:
                assert [client.recv(PATIENCE) for _ in range(50)] == [f"MESSAGE {n}" for n in range(50)]
            assert not any(handler.done() for handler in handlers)
        assert sum(handler.result(PATIENCE) for handler in handlers) == 500
        for client in clients:
            with pytest.raises(bridge.EndOfStream):
                client.recv(PATIENCE)
            client.close()


def test_an_ended_session_may_still_be_sent_to_and_is_closed_when_its_handler_comes_back(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    listener = b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines, inbox=shared)
    client = b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codecs.Lines)
    client.send("how many?")
    client.send_eof()
    session, question = shared.get(timeout=PATIENCE)
    assert (question, *shared.get(timeout=PATIENCE)) == ("how many?", session, None)
    assert session.state == "peer_closed"
    session.send("forty-two")
    assert client.recv(PATIENCE) == "forty-two"
    with pytest.raises(queue.Empty):
        client.inbox.get(timeout=0.1)
    assert session.state == "peer_closed", "nobody has closed it yet"
    with pytest.raises(queue.Empty):
        shared.get_nowait()
    assert list(client) == []
    until(lambda: session.state == "closed")
    with pytest.raises(bridge.SessionClosed):
        session.send("too late")


@pytest.mark.parametrize("leave", ["task_done", "return"])
def test_an_ended_session_is_closed_when_its_handler_is_done_and_cut_off_when_that_is_gone(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, leave: str
) -> None:
    shared = bridge.Inbox()
    listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    client = b.connect(listener.address, client_ctx, server_hostname="localhost")
    client.send_eof()
    stay = threading.Event()

    def handle() -> None:
        assert shared.get(timeout=PATIENCE)[1] is None
        if leave == "task_done":
            shared.task_done()
            stay.wait(PATIENCE)

    handler = threading.Thread(target=handle)
    handler.start()
    with contextlib.nullcontext() if leave == "task_done" else pytest.raises(bridge.Truncated):
        assert list(client) == []
    stay.set()
    handler.join(PATIENCE)
    client.close()


def test_a_session_s_messages_go_to_one_handler_at_a_time_and_others_go_on(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    listener = b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines, inbox=shared)
    slow, fast = (
        b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codecs.Lines)
        for _ in range(2)
    )
    for number in range(3):
        slow.send(f"slow {number}")
    release, taken = threading.Event(), threading.Event()
    handled: list[str] = []

    def handle_slowly() -> None:
        handled.append(shared.get(timeout=PATIENCE)[1])
        taken.set()
        release.wait(PATIENCE)

    handler = threading.Thread(target=handle_slowly)
    handler.start()
    assert taken.wait(PATIENCE)
    until(lambda: shared.qsize() == 2)
    for number in range(3):
        fast.send(f"fast {number}")
    assert [shared.get(timeout=PATIENCE)[1] for _ in range(3)] == ["fast 0", "fast 1", "fast 2"]
    with pytest.raises(queue.Empty):
        shared.get(timeout=0.05)
    assert shared.qsize() == 2 and not shared.empty() and not shared.full()
    release.set()
    handled += [shared.get(timeout=PATIENCE)[1] for _ in range(2)]
    assert handled == ["slow 0", "slow 1", "slow 2"]
    handler.join(PATIENCE)
    slow.abort()
    fast.abort()


def test_a_pool_never_reorders_one_session_s_messages(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    shared, count = bridge.Inbox(), 300
    seen: dict[Any, list[int]] = collections.defaultdict(list)

    def handle() -> None:
        with contextlib.suppress(bridge.ShutDown):
            while True:
                session, message = shared.get()
                if message is not None:
                    seen[session].append(int(message))

    handlers = [pool.submit(handle) for _ in range(6)]
    listener = b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines, inbox=shared)
    clients = [
        b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codecs.Lines)
        for _ in range(5)
    ]
    for number in range(count):
        for client in clients:
            client.send(str(number))
    for client in clients:
        client.send_eof()
        assert list(client) == []  # its session has been closed by a handler that came back
    assert sorted(seen.values()) == [list(range(count))] * 5
    shared.shutdown()
    for handler in handlers:
        handler.result(PATIENCE)


def test_an_inbox_takes_words_and_can_be_shut_down(pool: ThreadPoolExecutor) -> None:
    shared = bridge.Inbox()
    waiting = [pool.submit(shared.get) for _ in range(3)]
    shared.put((None, "a word"))
    until(lambda: sum(future.done() for future in waiting) == 1)
    shared.put((None, "another"))
    shared.shutdown()
    results = [future.exception(PATIENCE) or future.result() for future in waiting]
    assert sorted(map(repr, results)) == [
        "(None, 'a word')",
        "(None, 'another')",
        "ShutDown('the inbox was shut down')",
    ]
    with pytest.raises(bridge.ShutDown):
        shared.get_nowait()


def test_an_inbox_of_a_forgotten_bridge_ends() -> None:
    shared = bridge.Inbox()
    forgotten = bridge.Bridge(workers=1)
    forgotten._count_in(forgotten._channels, None, shared)  # type: ignore[arg-type]
    forgotten._channels.remove(None)  # type: ignore[arg-type]
    with pytest.warns(ResourceWarning, match="a Bridge was forgotten"):
        del forgotten
        gc.collect()
    with pytest.raises(bridge.ShutDown):
        shared.get(timeout=PATIENCE)


def test_a_forgotten_inbox_goes_with_all_that_it_holds(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", inbox=shared)
        with listener.accept(PATIENCE) as peer:
            peer.send(bytes(100_000))
            until(lambda: b.snapshot().inbox_bytes >= 100_000)
            client.abort()
    forgotten = weakref.ref(shared), weakref.ref(client)
    del shared, client

    def gone() -> bool:
        gc.collect()
        return not any(ref() for ref in forgotten)

    until(gone)
    until(lambda: b.snapshot().inbox_bytes == 0)


def test_an_inbox_that_was_shut_down_stays_so(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    shared.shutdown()
    with pytest.raises(bridge.ShutDown, match="the inbox was shut down"):
        shared.put((None, "a word"))
    with b.listen(("127.0.0.1", 0), server_ctx, inbox=shared), pytest.raises(bridge.ShutDown):
        shared.get(timeout=PATIENCE)


def test_an_inbox_may_be_fed_by_several_bridges_and_ends_with_the_last(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    first, second = bridge.Bridge(workers=1, timeouts=QUICK), bridge.Bridge(workers=1, timeouts=QUICK)
    first.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    listener = second.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    second.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    first.close()
    with bridge.Bridge(workers=1, timeouts=QUICK) as far:
        with far.connect(listener.address, client_ctx, server_hostname="localhost") as client:
            client.send(b"still fed")
            assert shared.get(timeout=PATIENCE)[1] == b"still fed"
            second.close()
    assert shared.get(timeout=PATIENCE)[1] is None
    with pytest.raises(bridge.ShutDown, match="every Bridge that fed this inbox is closed"):
        shared.get(timeout=PATIENCE)
