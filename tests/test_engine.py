"""The engine alone: every want in every call, over sockets and over memory, and what its errors say.

The network here has valves.  It passes a few bytes at a time, so any call may want to read; and each direction can be
clogged, whatever the size of the kernel's buffers, so any call may want to write.
"""

from __future__ import annotations

import collections
import itertools
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from conftest import KeyPair
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from records import records
from rig import BLOCK, Lockstep, Raw, only, raw_context, shake, shrink

import bridge
from bridge.engine import TLSEngine, _as_text, _record_size
from bridge.limits import RECORD_BYTES
from bridge.poll import Want

VERSIONS = ("TLSv1.2", "TLSv1.3")
ALL = 1 << 16
TURNS = 50_000


Pair = tuple[bridge.Context, bridge.Context]


@pytest.fixture(scope="module")
def contexts(ca_file: str, server_cert: KeyPair) -> dict[str, Pair]:
    """Client's and server's, for each version."""
    return {
        version: (
            bridge.client_context(ca_file, **only(version)),
            bridge.server_context(
                server_cert.certfile, server_cert.keyfile, renegotiation=True, **only(version)
            ),
        )
        for version in VERSIONS
    }


# ── a network with valves ──


class Network:
    """Between two sockets: passes a few bytes at a time, and clogs."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        pairs = [tuple(map(shrink, socket.socketpair())) for _ in range(2)]
        self.ends, self._inside = [near for near, _ in pairs], [far for _, far in pairs]
        for sock in (*self.ends, *self._inside):
            sock.setblocking(False)
        self._held = [bytearray(), bytearray()]
        self._junk = [0, 0]

    def turn(self) -> None:
        """Pass something on, or turn a valve."""
        way = self.rng.randrange(2)
        dice = self.rng.random()
        if dice < 0.1 and not self._junk[way]:
            self.clog(way)
        elif dice < 0.3 and self._junk[way]:
            self.unclog(way)
        else:
            self.pass_on(way, self.rng.choice((1, 10, 500, 20_000)))

    def pass_on(self, way: int, size: int) -> None:
        """Carry at most *size* bytes from end *way* to the other one."""
        if not self._junk[way] and len(self._held[way]) < size:
            self._collect(way, size)
        try:
            sent = self._inside[1 - way].send(self._held[way][:size])
        except (BlockingIOError, BrokenPipeError):
            return
        del self._held[way][:sent]

    def _collect(self, way: int, size: int) -> None:
        try:
            self._held[way] += self._inside[way].recv(size)
        except BlockingIOError:
            pass

    def clog(self, way: int) -> None:
        """End *way* can write nothing more: its socket's buffer is full, of bytes that nobody will get."""
        before = -1
        while len(self._held[way]) > before:
            before = len(self._held[way])
            self._collect(way, ALL)
        for size in (4096, 1):
            try:
                while True:
                    self._junk[way] += self.ends[way].send(bytes(size))
            except BlockingIOError:
                pass

    def unclog(self, way: int) -> None:
        """End *way* can write again."""
        while self._junk[way]:
            self._junk[way] -= len(self._inside[way].recv(min(ALL, self._junk[way])))

    def close(self) -> None:
        for sock in (*self.ends, *self._inside):
            sock.close()


class Owner:
    """Drives an engine as the transport does, but in any order, with each call as often as the dice say."""

    def __init__(
        self, rng: random.Random, engine: TLSEngine, sock: socket.socket, say: bytes, hear: bytes, again: int
    ) -> None:
        self.rng, self.engine, self.sock = rng, engine, sock
        self.say, self.hear, self.renegotiations = memoryview(say), hear, again
        self.heard = 0
        self.peeked = b""
        self.chunk: memoryview | None = None
        self.open = self.end_in_sight = self.hearing_over = self.said = self.handshaking = False
        self.answers: dict[str, list[Want]] = collections.defaultdict(list)
        """Of each call that is under way: its wants so far."""
        self.orders: set[tuple[str, Want, Want]] = set()
        """Which want came after which in one call, until it was done."""

    def turn(self) -> None:
        """One call."""
        call = self.rng.choice(self._possible())
        before = dict(self.engine.wants)
        done = call()
        name = call.__name__
        for key, count in self.engine.wants.items():
            if count > before.get(key, 0) and key[0] == name:
                self.answers[name].append(key[1])
        self.orders.update((name, first, second) for first, second in itertools.pairwise(self.answers[name]))
        if done:
            self.answers[name].clear()

    def _possible(self) -> list[Callable[[], bool]]:
        if not self.open:
            return [self.handshake]
        calls: list[Callable[[], bool]] = [self.flush] if self.engine.unflushed() else []
        if self.handshaking:
            calls.append(self.handshake)
        if not self.hearing_over:
            calls += [self.read, self.peek]
        if self.chunk is not None or self.say:
            calls.append(self.write)
        elif not self.said and not self.handshaking:
            calls.append(self.shutdown)
        if self.renegotiations and self.chunk is None and not self.said and not self.end_in_sight:
            calls.append(self.renegotiate)
        return calls or [self.rest]

    def rest(self) -> bool:
        return False

    def handshake(self) -> bool:
        if self.engine.handshake() is not None:
            return False
        if not self.open:
            self.engine.established("localhost", None, self.sock)
            self.open = True
        self.handshaking = False
        return True

    def renegotiate(self) -> bool:
        if not self.engine.renegotiating() and not self.engine.mid_handshake():
            self.engine.renegotiate()
            self.renegotiations -= 1
            self.handshaking = True
        return True

    def read(self) -> bool:
        data = self.engine.read(self.rng.choice((1, 100, BLOCK)))
        if isinstance(data, Want):
            assert not self.peeked, "what was peeked at must be there"
            return False
        assert data.startswith(self.peeked[: len(data)])
        self.peeked = self.peeked[len(data) :]
        assert data == self.hear[self.heard : self.heard + len(data)]
        self.heard += len(data)
        self.hearing_over = self.end_in_sight = not data
        assert data or self.heard == len(self.hear)
        return True

    def peek(self) -> bool:
        data = self.engine.peek(self.rng.choice((1, 100, BLOCK)))
        if isinstance(data, Want):
            assert not self.peeked
            return False
        assert data == self.hear[self.heard : self.heard + len(data)]
        self.peeked = max(self.peeked, data, key=len)
        self.end_in_sight = not data
        return True

    def write(self) -> bool:
        if self.engine.on_detour and self.engine.flush() is not None:
            return False
        if self.chunk is None:
            size = self.rng.choice((1, 100, 5000, BLOCK))
            self.chunk, self.say = self.say[:size], self.say[size:]
        sent = self.engine.write(self.chunk)
        if isinstance(sent, Want):
            return False
        self.chunk = self.chunk[sent:] if sent < len(self.chunk) else None
        return True

    def flush(self) -> bool:
        return self.engine.flush() is None

    def shutdown(self) -> bool:
        answer = self.engine.shutdown()
        self.said = not isinstance(answer, Want)
        return self.said

    def done(self) -> bool:
        return self.said and self.hearing_over and not self.engine.unflushed()


def play(seed: int, version: str, contexts: dict[str, Pair]) -> tuple[Owner, Owner]:
    """A whole session, from handshake to close_notify, in one of its possible orders."""
    rng = random.Random(seed)
    network = Network(rng)
    words = [rng.randbytes(rng.choice((10, 3_000, 40_000))) for _ in range(2)]
    owners = []
    for side in range(2):
        engine = TLSEngine(
            contexts[version][side], network.ends[side], server_hostname=None if side else "localhost"
        )
        again = 2 if side and version == "TLSv1.2" else 0
        owners.append(Owner(rng, engine, network.ends[side], words[side], words[1 - side], again))
    try:
        for _ in range(TURNS):
            actor: Any = rng.choice((*owners, network))
            actor.turn()
            if owners[0].done() and owners[1].done():
                break
        state = [(o.heard, len(o.hear), o.said, o.hearing_over, o.engine.wants) for o in owners]
        assert owners[0].done() and owners[1].done(), f"seed {seed}: {state}"
    finally:
        network.close()
    return owners[0], owners[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_want_in_every_call_in_any_order(version: str, contexts: dict[str, Pair], seeds: range) -> None:
    seen: set[tuple[str, Want]] = set()
    orders: set[tuple[str, Want, Want]] = set()
    for seed in seeds:
        for owner in play(seed, version, contexts):
            seen |= owner.engine.wants.keys()
            orders |= owner.orders
    if len(seeds) < 100:
        return
    assert seen >= {("handshake", want) for want in Want}
    assert seen >= {("read", Want.READ), ("peek", Want.READ)}
    assert seen >= {(call, Want.WRITE) for call in ("write", "shutdown", "flush")}
    if version == "TLSv1.2":  # where a renegotiation makes readers write, and writers read
        assert seen >= {(call, want) for call in ("read", "peek", "write", "shutdown") for want in Want}
    both = {(Want.READ, Want.WRITE), (Want.WRITE, Want.READ)}
    assert orders >= {("handshake", *order) for order in both}


def test_a_session_is_replayed_by_its_seed(contexts: dict[str, Pair]) -> None:
    first, second = (play(7, "TLSv1.2", contexts) for _ in range(2))
    assert [owner.heard for owner in first] == [owner.heard for owner in second]


# ── the detour ──


def engines(
    rig: Lockstep, pair: Pair, near: socket.socket, far: socket.socket
) -> tuple[TLSEngine, TLSEngine]:
    """Client and server over sockets, open, the tickets read."""
    client = TLSEngine(pair[0], near, server_hostname="localhost")
    server = TLSEngine(pair[1], far)
    shake(client, server)
    for engine, sock in ((client, near), (server, far)):
        engine.established("localhost", None, sock)
    assert client.read(1) is Want.READ
    client.wants.clear()
    server.wants.clear()
    return client, server


def read_all(engine: TLSEngine) -> bytes:
    parts = []
    while not isinstance(data := engine.read(BLOCK), Want):
        parts.append(data)
    return b"".join(parts)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_detour_begins_when_the_socket_is_full_and_ends_when_all_is_out(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"A" * 10) == 10
    assert not client.on_detour and not client.unflushed()
    assert client.write(b"B" * BLOCK) == BLOCK, "no want: the rest of the record is in memory"
    assert client.on_detour and 0 < client.unflushed() < BLOCK + 100
    assert client.flush() is Want.WRITE
    assert client.wants == {("write", Want.WRITE): 1, ("flush", Want.WRITE): 1}
    found = read_all(server)
    while client.flush() is Want.WRITE:
        found += read_all(server)
    assert not client.on_detour and not client.unflushed(), "OpenSSL has its socket back"
    assert client.write(b"C" * 10) == 10
    assert not client.on_detour and not client.unflushed()
    assert found + read_all(server) == b"A" * 10 + b"B" * BLOCK + b"C" * 10


@pytest.mark.parametrize("version", VERSIONS)
def test_the_detour_reads_no_further_than_it_is_asked_to(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    """What is behind the next record stays in the kernel, and a poll goes on to speak of it."""
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"B" * BLOCK) == BLOCK
    for number in range(4):
        assert server.write(b"%d" % number) == 1
    assert [client.read(BLOCK) for _ in range(2)] == [b"0", b"1"]
    assert client.on_detour and not client.has_more()
    found = b""
    while client.flush() is Want.WRITE:
        found += read_all(server)
    assert not client.on_detour
    assert [client.read(BLOCK) for _ in range(3)] == [b"2", b"3", Want.READ]
    assert found + read_all(server) == b"B" * BLOCK


@pytest.mark.parametrize("version", VERSIONS)
def test_on_the_detour_openssl_is_called_once_for_a_record(
    rig: Lockstep, version: str, contexts: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is empty is given a record first: a call that finds it empty costs as much as one that reads."""
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"B" * BLOCK) == BLOCK and client.on_detour
    calls = []
    recv = client._recv
    monkeypatch.setattr(client, "_recv", lambda *given: calls.append(given) or recv(*given))
    for number in range(4):
        assert server.write(b"%d" % number) == 1
        assert client.read(BLOCK) == b"%d" % number
    assert len(calls) == 4
    assert client.read(BLOCK) is Want.READ and len(calls) == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_the_detour_lasts_until_what_was_read_into_memory_is_read_out(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    """It may be more than the record, if the detour begins in the middle of one."""
    near, far = rig.large_pair()
    client, server = engines(rig, contexts[version], near, far)
    shrink(near)
    server._detour()
    for number in range(4):
        assert server.write(b"%d" % number * 1000) == 1000
    ciphertext = server._connection.bio_read(100_000)
    far.send(ciphertext[:100])
    assert client.read(BLOCK) is Want.READ, "the beginning of a record"
    far.send(ciphertext[100:])
    assert client.write(b"B" * BLOCK) == BLOCK and client.on_detour
    assert client.read(BLOCK) == b"0" * 1000
    assert client.has_more(), "three more records are in memory"
    while far.recv(BLOCK) and client.flush() is Want.WRITE:
        pass
    assert client.on_detour and not client.unflushed()
    assert [client.read(BLOCK) for _ in range(3)] == [b"1" * 1000, b"2" * 1000, b"3" * 1000]
    assert not client.has_more()
    assert client.read(BLOCK) is Want.READ
    assert client.on_detour is client._follows, "it does not know any more where a record begins"


@pytest.mark.parametrize("version", VERSIONS)
def test_close_notify_takes_the_detour_when_the_socket_is_full(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"B" * BLOCK) == BLOCK
    assert client.shutdown() is False
    found = b""
    while client.flush() is Want.WRITE:
        found += read_some(server)
    while data := read_some(server):
        found += data
    assert found == b"B" * BLOCK
    assert server.read(1) == b""
    assert server.shutdown() is True
    assert client.read(1) == b""


def read_some(engine: TLSEngine) -> bytes:
    data = engine.read(BLOCK)
    return b"" if isinstance(data, Want) else data


@pytest.mark.parametrize("version", VERSIONS)
def test_a_peek_on_the_detour_sees_what_is_on_the_socket(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"B" * BLOCK) == BLOCK
    assert server.write(b"hello") == 5
    assert client.on_detour
    assert client.peek(100) == b"hello"
    assert client.read(100) == b"hello"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("call", ["read", "peek", "flush"])
def test_a_reset_on_the_detour_is_a_cause_and_latched(
    rig: Lockstep, version: str, contexts: dict[str, Pair], call: str
) -> None:
    near, far = rig.small_pair()
    client, _ = engines(rig, contexts[version], near, far)
    assert client.write(b"B" * BLOCK) == BLOCK
    far.close()
    arguments = () if call == "flush" else (10,)
    with pytest.raises(bridge.PeerReset) as first:
        getattr(client, call)(*arguments)
    with pytest.raises(bridge.PeerReset) as later:
        client.read(10)
    assert str(later.value) == str(first.value)
    assert isinstance(first.value.__cause__, OSError) and first.value.errno == first.value.__cause__.errno
    assert later.value.__cause__ is first.value.__cause__


def test_clients_that_ask_for_ever_new_names_fill_no_memory() -> None:
    """Sessions that ask for the same one share it, and some Pythons keep an interned string for ever."""
    assert _as_text(b"a.example") is _as_text(b"a.example")
    for number in range(1000):
        _as_text(b"%d.example" % number)
    assert _as_text.cache_info().currsize <= 256


def test_during_the_handshake_a_want_to_write_is_the_owners(contexts: dict[str, Pair]) -> None:
    network = Network(random.Random(0))
    network.clog(0)
    try:
        client = TLSEngine(contexts["TLSv1.3"][0], network.ends[0], server_hostname="localhost")
        assert client.handshake() is Want.WRITE
        assert client.handshake() is Want.WRITE
        network.unclog(0)
        assert client.handshake() is Want.READ
        assert client.wants[("flush", Want.WRITE)] == 2
    finally:
        network.close()


def test_between_handshakes_write_and_shutdown_step_back(rig: Lockstep, contexts: dict[str, Pair]) -> None:
    client, server = engines(rig, contexts["TLSv1.2"], *rig.small_pair())
    server.renegotiate()
    assert server.renegotiating()
    assert server.shutdown() is Want.READ, "after close_notify the peer's answer would be lost"
    assert server.handshake() is None, "the HelloRequest is out"
    assert client.read(1) is Want.READ, "and answered"
    assert client.mid_handshake()
    assert client.write(b"x") is Want.READ
    assert client.shutdown() is Want.READ
    assert client.wants[("write", Want.READ)] == client.wants[("shutdown", Want.READ)] == 1
    while client.mid_handshake():
        assert client.flush() is None
        assert server.read(1) is Want.READ
        assert client.read(1) is Want.READ
    assert client.flush() is None and not client.on_detour
    assert server.read(1) is Want.READ
    assert not server.renegotiating()
    assert client.write(b"x") == 1 and server.read(1) == b"x"
    assert client.shutdown() is False and server.shutdown() is False


# ── over memory ──


def in_memory(pair: Pair) -> tuple[TLSEngine, TLSEngine]:
    """Client and server, open, the tickets read."""
    client, server = TLSEngine(pair[0], server_hostname="localhost"), TLSEngine(pair[1])
    while (client.handshake(), server.handshake()) != (None, None):
        carry(client, server)
        carry(server, client)
    for engine in (client, server):
        engine.established("localhost", None)
    carry(server, client)
    assert client.read(1) is Want.READ
    return client, server


def carry(source: TLSEngine, sink: TLSEngine) -> None:
    """Feed *sink* what *source* has to say, if anything: feeding nothing is the end of the stream."""
    if ciphertext := source.take_output():
        sink.feed(ciphertext)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_engine_over_memory(version: str, contexts: dict[str, Pair]) -> None:
    client, server = in_memory(contexts[version])
    assert client.read(10) is Want.READ, "feed me"
    assert client.write(b"x" * 100_000) <= 100_000
    ciphertext = client.take_output()
    assert len(ciphertext) > 16_000 and client.take_output() == b""
    server.feed(ciphertext)
    assert server.peek(5) == b"xxxxx"
    assert read_all(server)[:5] == b"xxxxx"
    assert client.shutdown() is False
    carry(client, server)
    assert server.read(10) == b""
    assert server.shutdown() is True
    carry(server, client)
    assert client.read(10) == b""


@settings(max_examples=50, deadline=None)
@given(
    messages=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=8),
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=20),
    version=st.sampled_from(VERSIONS),
)
def test_however_the_ciphertext_is_cut_the_plaintext_is_the_same(
    contexts: dict[str, Pair], messages: list[bytes], sizes: list[int], version: str
) -> None:
    client, server = in_memory(contexts[version])
    for message in messages:
        assert client.write(message) == len(message)
    assert client.shutdown() is False
    ciphertext, found, turn = client.take_output(), b"", 0
    while ciphertext:
        size = sizes[turn % len(sizes)]
        server.feed(ciphertext[:size])
        ciphertext = ciphertext[size:]
        turn += 1
        while (data := read_some(server)) != b"":
            found += data
    assert found == b"".join(messages)
    assert server.read(1) == b""


class Inner:
    """An engine over memory whose ciphertext is carried by another one."""

    def __init__(self, inner: TLSEngine, outer: TLSEngine) -> None:
        self.inner, self.outer = inner, outer
        self.said: memoryview = memoryview(b"")

    def carry(self) -> bool:
        """Move ciphertext both ways between the two.  Whether there was any."""
        if not self.said:
            self.said = memoryview(self.inner.take_output())
        moved = bool(self.said)
        if self.said:
            sent = self.outer.write(self.said)
            assert not isinstance(sent, Want)
            self.said = self.said[sent:]
        data = self.outer.read(BLOCK)
        if not isinstance(data, Want):
            self.inner.feed(data)
            moved = True
        return moved


@pytest.mark.parametrize("outer_version", VERSIONS)
@pytest.mark.parametrize("inner_version", VERSIONS)
def test_tls_inside_tls(contexts: dict[str, Pair], outer_version: str, inner_version: str) -> None:
    outer_client, outer_server = in_memory(contexts[outer_version])
    client_context, server_context = contexts[inner_version]
    client = Inner(TLSEngine(client_context, server_hostname="localhost"), outer_client)
    server = Inner(TLSEngine(server_context), outer_server)

    def pump() -> None:
        while client.carry() | server.carry():
            carry(outer_client, outer_server)
            carry(outer_server, outer_client)

    while (client.inner.handshake(), server.inner.handshake()) != (None, None):
        pump()
    infos = [end.inner.established("localhost", None) for end in (client, server)]
    assert [info.version for info in infos] == [inner_version] * 2
    for sender, receiver in ((client, server), (server, client)):
        message = random.Random(1).randbytes(50_000)
        view, found = memoryview(message), b""
        while view:
            sent = sender.inner.write(view)
            assert not isinstance(sent, Want)
            view = view[sent:]
            pump()
            found += read_all(receiver.inner)
        assert found == message
    assert client.inner.shutdown() is False
    pump()
    assert server.inner.read(1) == b""
    assert server.inner.shutdown() is True
    pump()
    assert client.inner.read(1) == b""
    assert outer_client.shutdown() is False
    carry(outer_client, outer_server)
    assert outer_server.read(1) == b""


# ── peers that speak something else ──


@pytest.mark.parametrize(
    ("said", "protocol"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "plain HTTP"),
        (b"POST /form HTTP/1.1\r\n\r\n", "plain HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "plain HTTP/2"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "plain SSH"),
        (b"EHLO client.example\r\n", "plain SMTP"),
        (b"who is there?\r\n", "something else"),
        (bytes(100), "something else"),
    ],
)
def test_a_client_that_does_not_speak_tls_is_named(
    contexts: dict[str, Pair], said: bytes, protocol: str
) -> None:
    server = TLSEngine(contexts["TLSv1.3"][1])
    server.feed(said)
    with pytest.raises(bridge.NotTLS) as caught:
        server.handshake()
    assert f"the client speaks {protocol} to this TLS port" in str(caught.value)
    assert f"first bytes are {said[:5]!r} (" in str(caught.value)
    assert caught.value.library == "SSL" and caught.value.reason
    assert caught.value.errno == ssl.SSL_ERROR_SSL


@pytest.mark.parametrize(
    ("said", "protocol"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "plain HTTP"),
        (b"220 mail.example ESMTP\r\n", "plain SMTP or FTP"),
        (b"* OK IMAP4rev1 ready\r\n", "plain IMAP"),
        (b"+OK POP3 ready\r\n", "plain POP3"),
        (b"who is there?\r\n", "something else"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "plain SSH"),
    ],
)
def test_a_server_that_does_not_speak_tls_is_named(
    contexts: dict[str, Pair], said: bytes, protocol: str
) -> None:
    client = TLSEngine(contexts["TLSv1.3"][0], server_hostname="localhost")
    assert client.handshake() is Want.READ
    client.feed(said)
    with pytest.raises(bridge.NotTLS, match=f"the server speaks {protocol}, not TLS"):
        client.handshake()


def test_bad_tls_is_not_taken_for_something_else(contexts: dict[str, Pair]) -> None:
    server = TLSEngine(contexts["TLSv1.3"][1])
    server.feed(b"\x16\x03\x01\x00\x05" + b"\xff" * 5)
    with pytest.raises(bridge.TLSError) as caught:
        server.handshake()
    assert not isinstance(caught.value, bridge.NotTLS)


# ── errors ──


def test_an_alert_is_told_with_openssls_reason(
    rig: Lockstep, contexts: dict[str, Pair], server_cert: KeyPair
) -> None:
    stranger = bridge.client_context(server_cert.certfile)  # trusts one leaf, and no CA
    near, far = rig.small_pair()
    client, server = (
        TLSEngine(stranger, near, server_hostname="localhost"),
        TLSEngine(contexts["TLSv1.2"][1], far),
    )
    assert client.handshake() is Want.READ
    assert server.handshake() is Want.READ
    with pytest.raises(bridge.CertificateError) as refused:
        client.handshake()
    assert isinstance(refused.value, ssl.SSLCertVerificationError)
    assert refused.value.reason == "CERTIFICATE_VERIFY_FAILED" and refused.value.verify_code in (2, 20)
    with pytest.raises(bridge.TLSError) as told:
        server.handshake()
    assert isinstance(told.value, ssl.SSLError) and isinstance(told.value, bridge.SessionEnded)
    assert told.value.library == "SSL" and "ALERT_UNKNOWN_CA" in told.value.reason
    assert str(told.value).startswith(f"[SSL: {told.value.reason}] ") and "during the handshake" in str(
        told.value
    )
    assert told.value.errno == ssl.SSL_ERROR_SSL


@pytest.mark.parametrize("version", VERSIONS)
def test_an_end_without_close_notify_is_a_truncation(version: str, contexts: dict[str, Pair]) -> None:
    client, server = in_memory(contexts[version])
    assert server.write(b"half of wh") == 10
    carry(server, client)
    client.feed(b"")
    assert client.read(100) == b"half of wh", "what came before comes first"
    for _ in range(2):
        with pytest.raises(bridge.Truncated, match="without close_notify, while in read") as caught:
            client.read(100)
        assert isinstance(caught.value, ssl.SSLEOFError)
        assert caught.value.errno == ssl.SSL_ERROR_EOF


def test_a_reset_is_told_with_its_errno(rig: Lockstep, contexts: dict[str, Pair]) -> None:
    near, far = rig.small_pair()
    client, _ = engines(rig, contexts["TLSv1.3"], near, far)
    assert client.write(b"unread") == 6
    far.close()
    with pytest.raises(bridge.PeerReset, match="while in read: ") as caught:
        client.read(10)
    assert isinstance(caught.value, ConnectionResetError) and caught.value.errno == 104


@pytest.mark.parametrize("version", VERSIONS)
def test_close_notify_in_the_middle_of_a_handshake_is_a_truncation(
    version: str, contexts: dict[str, Pair]
) -> None:
    client = TLSEngine(contexts[version][0], server_hostname="localhost")
    assert client.handshake() is Want.READ
    client.feed(b"\x15\x03\x03\x00\x02\x01\x00")
    with pytest.raises(bridge.Truncated, match="close_notify during the handshake") as caught:
        client.handshake()
    assert caught.value.errno == ssl.SSL_ERROR_EOF


def test_renegotiation_is_a_clear_error_where_there_is_none(contexts: dict[str, Pair]) -> None:
    client, _ = in_memory(contexts["TLSv1.3"])
    with pytest.raises(bridge.TLSError) as caught:
        client.renegotiate()
    assert "during the renegotiate" in str(caught.value)
    assert caught.value.errno == ssl.SSL_ERROR_SSL and caught.value.library == "SSL" and caught.value.reason


@pytest.mark.parametrize("version", VERSIONS)
def test_a_raw_peer_gets_every_byte_that_an_engine_on_a_detour_says(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    near, far = rig.small_pair()
    server = TLSEngine(contexts[version][1], far)
    client = Raw(raw_context(version), near, server_side=False)
    shake(client, server)
    server.established(None, None, far)
    said, found = b"", b""
    for number in range(20):
        piece = bytes([number]) * BLOCK
        assert server.write(piece) == BLOCK
        said += piece
        assert server.flush() is Want.WRITE
        while server.flush() is not None:
            found += client.read_all()
    assert found + client.read_all() == said


# ── exact ends ──


def test_on_the_detour_what_follows_close_notify_is_left_over(
    rig: Lockstep, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts["TLSv1.3"], *rig.small_pair())
    memory = TLSEngine(contexts["TLSv1.3"][0], server_hostname="localhost")
    assert client.leftover() == b"" == memory.leftover()
    assert client.write(b"B" * BLOCK) == BLOCK and client.on_detour
    assert server.shutdown() is False
    assert client.read(10) == b""
    client.feed(b"plain text")  # as it comes if the detour has begun in the middle of a record
    assert client.leftover() == b"plain text" and client.leftover() == b""


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("1703030010", 16),
        ("1603010200", 512),
        ("1403030001", 1),
        ("1803030003", 3),
        ("1703034800", RECORD_BYTES + 2048),
        ("1703034801", None),
        ("1303030010", None),
        ("1903030010", None),
        ("1702030010", None),
    ],
)
def test_how_much_follows_a_header(header: str, size: int | None) -> None:
    assert _record_size(bytes.fromhex(header)) == size


def test_the_detour_reads_no_further_than_the_record_that_openssl_waits_for(
    rig: Lockstep, contexts: dict[str, Pair]
) -> None:
    near, far = rig.small_pair()
    client, server = engines(rig, contexts["TLSv1.3"], near, far)
    assert client.write(b"B" * BLOCK) == BLOCK and client.on_detour
    assert server.write(b"one") == 3 and server.write(b"two") == 3
    there = len(near.recv(1 << 16, socket.MSG_PEEK))
    assert client.read(10) == b"one"
    assert len(near.recv(1 << 16, socket.MSG_PEEK)) == there // 2, "the second record is still in the kernel"
    assert client.read(10) == b"two" and client.read(10) is Want.READ and client.wants["read", Want.READ] >= 1


def test_after_an_error_each_call_says_the_same(contexts: dict[str, Pair]) -> None:
    client = TLSEngine(contexts["TLSv1.3"][0], server_hostname="localhost")
    assert client.handshake() is Want.READ
    client.feed(b"")
    for call in (
        client.handshake,
        lambda: client.read(1),
        lambda: client.peek(1),
        lambda: client.write(b"x"),
    ):
        with pytest.raises(bridge.Truncated, match="without close_notify, during the handshake"):
            call()


def test_first_bytes_are_kept_and_no_more_than_are_shown(contexts: dict[str, Pair]) -> None:
    server = TLSEngine(contexts["TLSv1.3"][1])
    for part in (b"GET /", b"a" * 11, b"b" * 16, b"c"):
        server.feed(part)
    assert server.first_bytes == b"GET /" + b"a" * 11
    server = TLSEngine(contexts["TLSv1.3"][1])
    server.feed(bytes(range(100)))
    assert server.first_bytes == bytes(range(16))


def test_a_want_of_each_call_is_counted(rig: Lockstep, contexts: dict[str, Pair]) -> None:
    client, _ = engines(rig, contexts["TLSv1.3"], *rig.small_pair())
    for count in (1, 2):
        assert client.read(1) is Want.READ
        assert client.wants == {("read", Want.READ): count}
    assert client.peek(1) is Want.READ
    assert client.wants == {("read", Want.READ): 2, ("peek", Want.READ): 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_says_hello_before_it_reads(rig: Lockstep, version: str, contexts: dict[str, Pair]) -> None:
    near, far = rig.large_pair()
    far.sendall(b"what does not wait for it")
    client = TLSEngine(contexts[version][0], near, server_hostname="localhost")
    assert client.handshake() is Want.READ
    flight = far.recv(1 << 16)
    assert flight[:3] == b"\x16\x03\x01" and len(flight) == 5 + int.from_bytes(flight[3:5], "big")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_owner_need_not_ask_who_the_peer_is(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    near, far = rig.large_pair()
    client = TLSEngine(contexts[version][0], near, server_hostname="localhost")
    server = TLSEngine(contexts[version][1], far)
    shake(client, server)
    client.established("localhost", None, near)
    assert client.write(b"there") == 5 and server.read(10) == b"there"
    assert server.write(b"back") == 4 and client.read(10) == b"back"
    assert not client.mid_handshake() and not client.renegotiating()
    assert client.shutdown() is False and server.read(1) == b"" and server.shutdown() is True
    assert client.read(1) == b"" and client.shutdown() is True


def test_a_renegotiation_that_the_peer_has_closed_the_door_to_is_none(
    rig: Lockstep, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts["TLSv1.2"], *rig.small_pair())
    assert not server.renegotiating()
    server.renegotiate()
    assert server.renegotiating()
    assert server.read(1) is Want.READ and server.renegotiating()
    assert client.shutdown() is False
    assert server.read(1) == b"" and not server.renegotiating()


def test_nothing_is_asked_of_openssl_that_it_lies_about(rig: Lockstep, contexts: dict[str, Pair]) -> None:
    client, _ = engines(rig, contexts["TLSv1.3"], *rig.small_pair())
    for call in (lambda: client.read(0), lambda: client.peek(0), lambda: client.write(b"")):
        with pytest.raises(AssertionError):
            call()
    assert client.write(b"x") == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_write_that_waits_is_repeated_with_the_same_chunk_and_nothing_comes_between(
    version: str, contexts: dict[str, Pair]
) -> None:
    client = TLSEngine(contexts[version][0], server_hostname="localhost")
    server = TLSEngine(contexts[version][1])
    chunk = b"the first words"
    assert client.write(chunk) is Want.READ, "they wait for the handshake"
    same_bytes = bytes(bytearray(chunk))
    for call in (lambda: client.write(same_bytes), client.shutdown, client.renegotiate):
        with pytest.raises(AssertionError):
            call()
    done: int | Want = Want.READ
    for _ in range(10):
        carry(client, server)
        server.handshake()
        carry(server, client)
        if done is Want.READ:
            done = client.write(chunk)
    assert done == len(chunk)
    assert client.write(b", and more") == 10
    carry(client, server)
    assert server.read(100) == chunk and server.read(100) == b", and more"
    assert client.shutdown() is False


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_handshake_settled_is_noted(rig: Lockstep, version: str, contexts: dict[str, Pair]) -> None:
    near, far = rig.small_pair()
    client = TLSEngine(contexts[version][0], near, server_hostname="localhost")
    server = TLSEngine(contexts[version][1], far)
    shake(client, server)
    ours, theirs = client.established("localhost", "there", near), server.established(None, "here", far)
    assert (ours.version, ours.peername, theirs.peername) == (version, "there", "here")
    assert ours.cipher == theirs.cipher and ours.cipher.startswith(("TLS_", "ECDHE-"))
    assert ours.cipher_bits == theirs.cipher_bits and ours.cipher_bits in (128, 256)
    assert ours.cipher_version.startswith("TLSv1") and not ours.resumed and not theirs.resumed
    assert ours.server_name == theirs.server_name == "localhost" and ours.alpn is theirs.alpn is None
    assert ours.peer_certificate is not None and theirs.peer_certificate is None
    assert ours.verified_chain[0] == ours.presented_chain[0] == ours.peer_certificate
    assert len(ours.verified_chain) == 2 and theirs.verified_chain == theirs.presented_chain == ()
    assert ours.tls_unique == theirs.tls_unique != b""


def test_one_byte_inside_is_something(rig: Lockstep, contexts: dict[str, Pair]) -> None:
    client, server = engines(rig, contexts["TLSv1.3"], *rig.small_pair())
    assert server.write(b"ab") == 2
    assert not client.has_more()
    assert client.read(1) == b"a" and client.has_more() and client.pending() == 1
    assert client.read(1) == b"b" and not client.has_more()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_is_remembered_by_its_key_and_not_without_one(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    resumed = []
    for key in (None, "key", "key", None):
        near, far = rig.small_pair()
        client = TLSEngine(contexts[version][0], near, server_hostname="localhost", resume_key=key)
        server = TLSEngine(contexts[version][1], far)
        shake(client, server)
        resumed.append(client.established("localhost", None, near).resumed)
        server.established(None, None, far)
        assert server.write(b"x") == 1 and client.read(1) == b"x", "and the tickets"
        client.remember()
        assert client.shutdown() is False and server.read(1) == b"" and server.shutdown() is True
        assert client.read(1) == b""
        client.remember()
    assert resumed == [False, False, True, False]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_mute_says_what_it_has_begun_and_nothing_more_and_goes_on_listening(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert client.write(b"B" * BLOCK) == BLOCK and client.on_detour
    client.mute()
    assert client.write(b"never said") == 10
    found = b""
    while client.flush() is Want.WRITE:
        found += read_all(server)
    assert found + read_all(server) == b"B" * BLOCK
    assert client.on_detour and client.unflushed() == 0
    assert server.write(b"heard") == 5 and client.read(10) == b"heard"


@pytest.mark.parametrize("version", VERSIONS)
def test_to_be_mute_is_a_detour(rig: Lockstep, version: str, contexts: dict[str, Pair]) -> None:
    client, server = engines(rig, contexts[version], *rig.small_pair())
    assert not client.on_detour
    client.mute()
    assert client.on_detour
    assert client.write(b"never said") == 10
    assert client.unflushed() == 0 and client.flush() is None and client.on_detour
    assert server.read(1) is Want.READ
    assert server.write(b"heard") == 5 and client.read(10) == b"heard"
    client.mute()
    assert client.on_detour and client.read(10) is Want.READ


@pytest.mark.parametrize("error", [SSL.Error(), SSL.Error([])])
def test_an_error_without_a_reason_is_told_all_the_same(error: SSL.Error, contexts: dict[str, Pair]) -> None:
    told = TLSEngine(contexts["TLSv1.3"][0], server_hostname="localhost")._translate("write", error)
    assert isinstance(told, bridge.TLSError) and told.reason == "UNKNOWN_ERROR"
    assert str(told) == "[SSL: UNKNOWN_ERROR] unknown error (while in write)"


def pour(source: socket.socket, sink: socket.socket) -> bytes:
    """Carry what is there; that."""
    try:
        data = source.recv(1 << 16)
    except BlockingIOError:
        return b""
    sink.sendall(data)
    return data


@pytest.mark.parametrize("version", VERSIONS)
def test_on_the_detour_a_record_may_come_in_parts(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    (near, inner), (outer, far) = rig.small_pair(), rig.large_pair()
    client = TLSEngine(contexts[version][0], near, server_hostname="localhost")
    server = TLSEngine(contexts[version][1], far)
    done = False
    while not done:
        done = (client.handshake() is None) & (server.handshake() is None)
        pour(inner, outer)
        pour(outer, inner)
    client.established("localhost", None, near)
    assert client.read(1) is Want.READ
    while not client.on_detour:
        assert client.write(b"B" * BLOCK) == BLOCK
    assert server.write(b"one") == 3
    first = outer.recv(1 << 16)
    assert server.write(b"two") == 3
    second = outer.recv(1 << 16)
    for part in (first[:3], first[3:7], first[7:-1]):
        inner.sendall(part)
        assert client.read(10) is Want.READ
    inner.sendall(first[-1:] + second)
    assert client.read(10) == b"one"
    assert near.recv(1 << 16, socket.MSG_PEEK) == second, "which a poll goes on to speak of"
    assert client.read(10) == b"two"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_shakes_hands_gives_openssl_whole_records(
    rig: Lockstep, version: str, contexts: dict[str, Pair]
) -> None:
    near, far = rig.large_pair()
    client = TLSEngine(contexts[version][0], near, server_hostname="localhost")
    server = TLSEngine(contexts[version][1], far)
    assert client.handshake() is server.handshake() is Want.READ
    flight = list(records(near.recv(ALL, socket.MSG_PEEK)))
    before = client.wants["handshake", Want.READ]
    client.handshake()
    in_vain = client.wants["handshake", Want.READ] - before
    assert in_vain <= 1 + len(flight), "before it has any, and after each"
    shake(client, server)
