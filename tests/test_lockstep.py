"""The whole bridge driven from one thread: every schedule is a seed, and every failure can be replayed.

Nothing here runs by itself.  Two bridges, each with its worker and its coordinator, face each other over real
TLS on socket pairs with the smallest buffers the kernel gives.  A seeded random order decides who steps next, who
sends or takes a message, and when the "network" lets a few more bytes through; so within milliseconds a run meets
wants, partial writes, backpressure and closes in orders that real threads would need days to find.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from rig import busy

import bridge
from bridge import codecs
from bridge.coordinator import Ask

STEPS = 30_000


class Drip:
    """Carries bytes between two sockets, a random few at a time, at the schedule's command."""

    def __init__(self, rng: random.Random, small: bool) -> None:
        self.rng = rng
        self.sizes = (1, 2, 5, 100) if small else (1, 100, 1_400, 20_000)
        self.ends: list[tuple[socket.socket, socket.socket]] = []
        self.pairs = []
        outer = []
        for _ in range(2):
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                end.setblocking(False)
            outer.append(ours)
            self.pairs.append(theirs)
        self.outer = tuple(outer)
        self.held: dict[int, bytes] = {0: b"", 1: b""}
        self.ended = {0: False, 1: False}
        self.moved = 0

    def step(self) -> bool:
        """Move at most a few bytes one way.  Whether anything moved."""
        way = self.rng.randrange(2)
        source, sink = self.pairs[way], self.pairs[1 - way]
        if not self.held[way] and not self.ended[way]:
            try:
                self.held[way] = source.recv(self.rng.choice(self.sizes))
            except (BlockingIOError, ConnectionError):
                return False
            if not self.held[way]:
                self.ended[way] = True
                try:
                    sink.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                return True
        if self.held[way]:
            try:
                sent = sink.send(self.held[way])
            except BlockingIOError:
                return False
            except OSError:
                self.held[way] = b""
                return False
            self.held[way] = self.held[way][sent:]
            self.moved += sent
            return sent > 0
        return False

    def cut(self) -> None:
        """The network is gone: both ends see the end of the stream, in the middle of whatever it was."""
        for way in range(2):
            self.held[way], self.ended[way] = b"", True
            self.pairs[way].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self.pairs:
            sock.close()


class Side:
    """One bridge, one session, and what the application on it does."""

    def __init__(self, rng: random.Random, name: str, messages: list[bytes]) -> None:
        self.rng = rng
        limits = bridge.Limits(
            inbox_bytes=rng.choice((1, 1000, 50_000)), outbox_bytes=rng.choice((1, 1000, 50_000))
        )
        self.bridge = bridge.Bridge(workers=1, start=False, limits=limits)
        self.name = name
        self.unsent = list(messages)
        self.received: list[bytes] = []
        self.session: Any = None
        self.eof_sent = False
        self.end: Exception | None = None
        worker: Any = self.bridge._workers[0]
        self._go_on, worker._fire_timers = worker._fire_timers, self._in_the_middle

    def _in_the_middle(self, *arguments: Any) -> None:
        """An application thread is quick, and the worker has looked at its poll and its mailbox already."""
        if self.rng.random() < 0.2:
            self.application(False)
        self._go_on(*arguments)

    def application(self, renegotiate: bool) -> None:
        """One thing an application might do now."""
        if self.session._channel.outbox.closed and not self.eof_sent:
            self.unsent.clear()
        action = self.rng.randrange(5)
        if action <= 1 and self.unsent:
            busy = self.rng.random() < 0.3  # so that what might be an answer is queued
            try:
                with self.session._channel.transport.lock if busy else contextlib.nullcontext():
                    self.session.outbox.put_nowait(self.unsent[0])
            except queue.Full:
                return
            except bridge.SessionEnded as error:
                self.end = self.end or error
                return
            del self.unsent[0]
        elif action == 2 and not self.unsent and not self.eof_sent:
            self.session.send_eof()
            self.eof_sent = True
        elif action == 3 and renegotiate and self.rng.random() < 0.05 and self.is_open():
            self.session.renegotiate()
        elif self.end is None:
            try:
                self.received.append(self.session.inbox.get_nowait())
            except queue.Empty:
                pass
            except bridge.SessionEnded as error:
                self.end = error

    def system(self) -> bool:
        """One step of one thread that does not exist."""
        actor = self.rng.choice((self.bridge._workers[0], self.bridge._coordinator))
        at_work = actor is not self.bridge._coordinator and self.rng.random() < 0.4
        with busy(self.bridge._coordinator) if at_work else contextlib.nullcontext():
            return actor.step()

    def is_open(self) -> bool:
        """Whether the coordinator has heard of the handshake: `renegotiate` would wait for it."""
        return self.session.state == "open" and self.session._channel.opened.peek() is not None

    def settled(self) -> bool:
        return self.end is not None and self.session._channel.closed.peek() is not None

    def dispose(self) -> None:
        ending = self.session._channel.closed.peek()
        if ending is not None and ending.sock is not None:
            ending.sock.close()
        self.session._channel.outbox.close(bridge.SessionClosed("test is over"))
        for _ in range(20):
            self.bridge._workers[0].step()
            self.bridge._coordinator.step()
        self.bridge._workers[0].stop()
        self.bridge._workers[0].step()
        self.bridge._coordinator.step()


def messages(rng: random.Random, count: int, largest: int) -> list[bytes]:
    made = []
    for index in range(count):
        size = rng.choice((0, 1, 10, 100, largest))
        made.append(f"{index}:".encode() + rng.randbytes(size))
    return made


def run(
    seed: int,
    version: str,
    contexts: Any,
    interfere: Callable[[int, tuple[Side, Side], Drip], None] | None = None,
) -> tuple[Side, Side, dict[str, list[bytes]], Drip]:
    rng = random.Random(seed)
    server_context, client_context = contexts[version]
    largest = rng.choice((200, 17_000, 40_000))
    small = largest == 200 and rng.random() < 0.5
    drip = Drip(rng, small)
    sent = {name: messages(rng, rng.randrange(1, 12), largest) for name in ("client", "server")}
    client = Side(rng, "client", sent["client"])
    server = Side(rng, "server", sent["server"])
    factory = lambda: codecs.LengthPrefixed(4)  # noqa: E731
    client.session = client.bridge.adopt(
        drip.outer[0], client_context, server_hostname="localhost", codec=factory, wait=False
    )
    server.session = server.bridge.adopt(drip.outer[1], server_context, codec=factory, wait=False)
    renegotiate = version == "TLSv1.2"
    for step in range(STEPS):
        if interfere is not None:
            interfere(step, (client, server), drip)
        actor = rng.randrange(8)
        if actor == 0:
            client.application(False)
        elif actor == 1:
            server.application(renegotiate)
        elif actor in (2, 3):
            client.system()
        elif actor in (4, 5):
            server.system()
        else:
            drip.step()
        if client.settled() and server.settled():
            break
    return client, server, sent, drip


def is_prefix(received: list[bytes], sent: list[bytes]) -> bool:
    return received == sent[: len(received)]


def run_to_a_sudden_end(
    seed: int, version: str, contexts: Any
) -> tuple[Side, Side, dict[str, list[bytes]], Drip]:
    """As `run`, but at some moment one side closes, aborts or unwraps, or the network is cut."""
    rng = random.Random(seed)
    moment = rng.choice((rng.randrange(200), rng.randrange(3_000)))
    ending = rng.choice(("close", "abort", "cut", "unwrap"))
    victim = rng.randrange(2)

    def interfere(step: int, sides: tuple[Side, Side], drip: Drip) -> None:
        if step < moment:
            return
        side = sides[victim]
        if step == moment and ending == "abort":
            side.session.abort()
        elif step == moment and ending == "unwrap":
            side.session._channel.outbox.close(bridge.SessionClosed("unwrap"))
            side.session._coordinator.post(side.session._channel, Ask.UNWRAP, (None,))
        elif step == moment and ending == "close":
            side.session._coordinator.close(side.session._channel, None)
        elif step == moment and ending == "cut":
            drip.cut()
        for other in sides:
            other.unsent.clear()

    return run(seed, version, contexts, interfere)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_sudden_end_at_any_moment_leaves_whole_messages_a_cause_and_nothing_waiting(
    version: str, contexts: Any, seeds: range
) -> None:
    for seed in seeds:
        client, server, sent, drip = run_to_a_sudden_end(seed, version, contexts)
        try:
            where = describe(seed, client, server)
            assert client.settled() and server.settled(), where
            assert is_prefix(server.received, sent["client"]) and is_prefix(
                client.received, sent["server"]
            ), where
            for side in (client, server):
                assert isinstance(side.end, bridge.SessionEnded), where
                assert side.session._channel.closed.peek() is not None, where
                seen = side.bridge.snapshot()
                assert seen.sessions == () and seen.inbox_bytes == seen.outbox_bytes == 0, where
        finally:
            client.dispose()
            server.dispose()
            drip.close()


def describe(seed: int, *sides: Side) -> str:
    states = [f"{side.session!r} {side.end!r} {side.bridge.snapshot()}" for side in sides]
    return f"seed {seed}: " + "; ".join(states)


def digest(items: list[bytes]) -> list[str]:
    return [f"{len(item)}:{hashlib.sha256(item).hexdigest()[:8]}" for item in items]


@pytest.fixture(scope="module")
def contexts(ca_file: str, server_cert: Any) -> Any:
    made = {}
    for version in ("TLSv1.2", "TLSv1.3"):
        made[version] = (
            bridge.server_context(
                server_cert.certfile,
                server_cert.keyfile,
                renegotiation=True,
                minimum_version=version,
                maximum_version=version,
            ),
            bridge.client_context(cafile=ca_file, minimum_version=version, maximum_version=version),
        )
    return made


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_every_schedule_delivers_every_message_once_in_order_and_ends_clean(
    version: str, contexts: Any, seeds: range
) -> None:
    for seed in seeds:
        client, server, sent, drip = run(seed, version, contexts)
        try:
            where = describe(seed, client, server)
            assert client.settled() and server.settled(), where
            assert digest(server.received) == digest(sent["client"]), where
            assert digest(client.received) == digest(sent["server"]), where
            assert isinstance(client.end, bridge.EndOfStream) and isinstance(
                server.end, bridge.EndOfStream
            ), where
        finally:
            client.dispose()
            server.dispose()
            drip.close()
