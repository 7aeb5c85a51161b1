"""The stall doctor: a session that spins is a bug of ours, and costs that session alone; slow ones are no bug."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import KeyPair
from peers import PATIENCE, Background
from rig import Lockstep, begin_close, is_open, only, received, tcp_pair

import bridge
from bridge.poll import Want
from bridge.transport import Transport
from bridge.worker import STALLED_TURNS


def stalls(logs: list[Any]) -> list[Any]:
    return [entry for entry in list(logs) if entry["event"] == "session.stalled"]


@pytest.fixture
def contexts(tls_version: str, ca_file: str, server_cert: KeyPair) -> tuple[bridge.Context, bridge.Context]:
    """A client's and a server's, for each version in turn."""
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(tls_version)),
    )


# ── bugs, planted ──


def armed_for_write(transport: Transport) -> None:
    transport.mask |= Want.WRITE


def always_again(transport: Transport) -> None:
    transport.again = True
    transport.quiet = False  # or the short turns, which settle nothing, would be its cure


def deaf(transport: Transport) -> None:
    """It waits for input, and does not read it."""
    transport.mask = Want.READ
    transport.quiet = False
    transport._read.rest()


@pytest.mark.parametrize("bug", [armed_for_write, always_again, deaf])
def test_a_session_that_spins_is_ended_alone_and_the_log_says_where_it_stood(
    bug: Callable[[Transport], None],
    contexts: Any,
    logs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    background: Background,
) -> None:
    client_context, server_context = contexts
    with bridge.Bridge(workers=1) as ours, ours.listen(("127.0.0.1", 0), server_context) as listener:
        pairs = []
        for _ in range(2):
            client = ours.connect(listener.address, client_context, server_hostname="localhost")
            pairs.append((client, listener.accept(PATIENCE)))
        (victim, peer), (bystander, other) = pairs
        settle, ill = Transport._settle, victim._channel.transport

        def settle_badly(transport: Transport) -> None:
            settle(transport)
            if transport is ill and not transport.finished:
                bug(transport)

        monkeypatch.setattr(Transport, "_settle", settle_badly)
        with ill.lock:  # it does not spin before there is something to read
            ill._settle()
            victim._channel.worker.post(ill, "wake")
            peer.send(b"for it to read")
        with pytest.raises(bridge.SessionStalled, match="moved no byte"):
            for _ in range(10):
                victim.recv(PATIENCE)
        for message in (b"one", b"two"):
            bystander.send(message)
            assert other.recv(PATIENCE) == message
        (told, *_) = stalls(logs)
        assert told["session"] == victim.name and told["worker"] == "bridge-worker-0"
        assert told["turns"] == STALLED_TURNS and told["state"] == "open"
        assert {"wants", "ages", "ready", "mask", "again", "received", "sent", "outbox_bytes"} <= set(told)
        monkeypatch.undo()


def test_a_leased_session_that_spins_in_its_worker_is_ended_too(
    contexts: Any, logs: list[Any], monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    near, far = tcp_pair()
    with bridge.Bridge(workers=1) as ours, far:
        stream = ours.stream(near, contexts[0], server_hostname="localhost")
        settle = Transport._settle

        def settle_badly(transport: Transport) -> None:
            settle(transport)
            if not transport.finished:
                transport.mask = Want.WRITE

        monkeypatch.setattr(Transport, "_settle", settle_badly)
        stream.begin()  # and the peer never says a word
        deadline, pause = time.monotonic() + PATIENCE, threading.Event()
        while not stalls(logs):
            assert time.monotonic() < deadline
            pause.wait(0.005)
        monkeypatch.undo()
        with pytest.raises(bridge.SessionStalled):
            stream.handshake(PATIENCE)
        stream.close()


# ── no bugs ──


def carry(source: socket.socket, sink: socket.socket) -> Callable[[], None]:
    """Carries one byte at a time."""

    def one() -> None:
        try:
            sink.send(source.recv(1))
        except BlockingIOError:
            pass

    return one


def test_a_peer_that_dribbles_is_no_stall(contexts: Any, logs: list[Any]) -> None:
    client_context, server_context = contexts
    with Lockstep() as lockstep:
        (near, inner), (outer, far) = lockstep.large_pair(), lockstep.large_pair()
        client, server = lockstep.session(client_context, near), lockstep.session(server_context, far)
        lockstep.actors += [carry(inner, outer), carry(outer, inner)]
        lockstep.until(lambda: is_open(client) and is_open(server))
        client.send(bytes(4_000))
        got = bytearray()
        rounds = 0
        while len(got) < 4_000:
            lockstep.round()
            rounds += 1
            got += b"".join(received(server))
        assert rounds > 10 * STALLED_TURNS and not stalls(logs)
        assert server._channel.transport.received == client._channel.transport.sent == 4_000


def test_words_to_a_session_that_can_do_nothing_are_no_stall(contexts: Any, logs: list[Any]) -> None:
    client_context, server_context = contexts
    limits = bridge.Limits(inbox_bytes=1)
    with Lockstep() as lockstep:
        near, far = lockstep.small_pair()
        client = lockstep.session(client_context, near)
        server = lockstep.session(server_context, far, limits=limits)
        lockstep.until(lambda: is_open(client) and is_open(server))
        client.send(bytes(200_000))  # which nobody takes
        lockstep.settle()
        held = client.outbox.qsize()
        for _ in range(5 * STALLED_TURNS):
            client._channel.worker.post(client._channel.transport, "send", [])
            lockstep.round()
        assert client.outbox.qsize() == held > 0 and not stalls(logs)


def test_a_listener_whose_clients_are_taken_by_others_is_no_stall(
    server_cert: KeyPair, logs: list[Any]
) -> None:
    with Lockstep() as lockstep, socket.create_server(("127.0.0.1", 0)) as sock:
        ours = lockstep.bridge()
        context = bridge.server_context(server_cert.certfile, server_cert.keyfile)
        listener = ours.listen(sock.dup(), context)
        lockstep.settle()
        (watched,) = ours._workers[0]._watched
        for _ in range(3 * STALLED_TURNS):
            ours._workers[0]._runnable[watched] = True  # as if the poll had said so
            lockstep.round()
        assert listener.address and not stalls(logs)


# ── what a snapshot shows ──


def test_a_snapshot_shows_how_long_each_want_has_waited_and_the_bytes_of_each_session(
    contexts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_context, server_context = contexts
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        client, server = lockstep.session(client_context, near), lockstep.session(server_context, far)
        lockstep.until(lambda: is_open(client) and is_open(server))
        client.send(b"seven b")
        lockstep.until(lambda: not server.inbox.empty())
        lockstep.settle()
        clock = time.monotonic
        (mine,), (theirs,) = (one.snapshot().sessions for one in lockstep.bridges)
        assert (mine.sent, mine.received, theirs.sent, theirs.received) == (7, 0, 0, 7)
        assert set(mine.ages) == set(mine.wants) == {"read"} and 0 <= mine.ages["read"] < PATIENCE
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 100)
        (later,) = lockstep.bridges[0].snapshot().sessions
        assert 100 <= later.ages["read"] < 100 + PATIENCE and later.seconds >= 100
        server.send(b"x")
        lockstep.settle()
        (again,) = lockstep.bridges[0].snapshot().sessions
        assert again.ages["read"] < 100, "it was tried again"
        begin_close(client)
        lockstep.bridges[0]._coordinator.step()
        lockstep.bridges[0]._workers[0].step()
        (now,) = lockstep.bridges[0].snapshot().sessions
        assert now.state == "draining" and now.seconds < PATIENCE, "the time in this state"


def test_a_snapshot_shows_how_long_a_session_has_waited_for_its_first_turn(contexts: Any) -> None:
    client_context, server_context = contexts
    with Lockstep() as lockstep:
        begin = time.monotonic()
        near, far = lockstep.large_pair()
        client, server = lockstep.session(client_context, near), lockstep.session(server_context, far)
        for one in lockstep.bridges:
            (seen,) = one.snapshot().sessions
            assert seen.state == "connecting" and 0 <= seen.seconds <= time.monotonic() - begin
            assert not seen.wants and not (seen.sent or seen.received)
        lockstep.until(lambda: is_open(client) and is_open(server))
