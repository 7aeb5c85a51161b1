"""A transport in lockstep: the moments that a real network rarely gives."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import records
from conftest import KeyPair
from forge import Forger
from OpenSSL import SSL
from peers import reset, until
from records import record
from rig import (
    ALLOW_CLIENT_RENEGOTIATION,
    BLOCK,
    Clock,
    Lockstep,
    Raw,
    begin_close,
    engine_of,
    is_closed,
    is_open,
    only,
    raw_context,
    received,
    tcp_pair,
    wants,
)
from structlog.testing import capture_logs

import bridge
from bridge import codecs, transport
from bridge.limits import RECORD_BYTES
from bridge.poll import Want
from bridge.session import Session
from bridge.terms import CloseReport

Contexts = tuple[bridge.Context, bridge.Context]


@pytest.fixture
def lockstep() -> Iterator[Lockstep]:
    with Lockstep() as made:
        yield made


@pytest.fixture
def contexts(tls_version: str, ca_file: str, server_cert: KeyPair) -> Contexts:
    """A client's and a server's, for each version in turn."""
    return (
        bridge.client_context(ca_file, **only(tls_version)),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(tls_version)),
    )


def shake_hands(lockstep: Lockstep, server: Session, far: socket.socket, version: str) -> None:
    """Open *server* to a raw client at *far*, of which nothing stays but the socket."""
    client = Raw(raw_context(version), far, server_side=False)
    while client.handshake() is not None:
        lockstep.round()
    lockstep.until(lambda: is_open(server))


def fill(sock: socket.socket) -> int:
    count = 0
    try:
        while True:
            count += sock.send(bytes(65_536))
    except BlockingIOError:
        return count


def fall_in_its_next_turn(monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
    """A bug of ours, which *session* meets once."""

    def fall(*_: object) -> None:
        monkeypatch.undo()
        raise ValueError("a bug")

    monkeypatch.setattr(transport.Transport, "turn", fall)
    session._channel.worker.post(session._channel.transport, "wake")


def test_a_hello_waits_for_room(lockstep: Lockstep, contexts: Contexts) -> None:
    near, far = lockstep.small_pair()
    junk = fill(near)
    client = lockstep.session(contexts[0], near)
    lockstep.settle()
    assert wants(client) == {"handshake": "write"}
    while junk:
        junk -= len(far.recv(min(junk, 65_536)))
    lockstep.settle()
    assert wants(client) == {"handshake": "read"} and far.recv(1) == b"\x16"


def test_a_hello_to_a_peer_that_is_gone_is_a_reset(lockstep: Lockstep, contexts: Contexts) -> None:
    near, far = tcp_pair()
    client = lockstep.session(contexts[0], near)
    reset(far)
    lockstep.until(lambda: is_closed(client))
    assert isinstance(client.end, bridge.PeerReset) and "the connection failed" in str(client.end)


def test_what_comes_after_an_abort_changes_nothing(lockstep: Lockstep, contexts: Contexts) -> None:
    near, _ = lockstep.large_pair()
    client = lockstep.session(contexts[0], near)
    channel = client._channel
    for command in (
        ("abort", bridge.SessionAborted("first")),
        ("start",),
        ("send", [b"x"]),
        ("close", None),
        ("abort", bridge.SessionAborted("second")),
    ):
        channel.worker.post(channel.transport, *command)
    lockstep.until(lambda: is_closed(client))
    assert str(client.end) == "first" and near.fileno() == -1


@pytest.mark.parametrize("method", ["close", "unwrap"])
@pytest.mark.parametrize("stuck", [False, True], ids=["the peer's answer", "what is to leave"])
def test_the_deadline_of_an_end_is_not_restarted_by_asking_again(
    lockstep: Lockstep, contexts: Contexts, method: str, stuck: bool
) -> None:
    """It may come nearer."""
    near, far = lockstep.small_pair()
    client = lockstep.session(contexts[0], near)
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    mute = lockstep.bridges.pop()
    channel = client._channel
    if stuck:
        client.send(bytes(200_000))
    deadlines = []
    for timeout in (None, None, 1000.0, 0.5):
        channel.worker.post(channel.transport, method, timeout)
        lockstep.settle()
        assert channel.transport.said_close() is not stuck
        deadlines.append(channel.transport._deadlines[bridge.CloseTimeout])
    assert deadlines[0] == deadlines[1] == deadlines[2] > deadlines[3]
    lockstep.bridges.append(mute)
    client.abort()
    server.abort()


def test_a_later_close_gives_no_more_time_than_the_first_though_nothing_had_left_by_then(
    lockstep: Lockstep, contexts: Contexts, clock: Clock
) -> None:
    near, far = lockstep.small_pair()
    client = lockstep.session(contexts[0], near, timeouts=bridge.Timeouts(close_notify=30))
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    channel, mute = client._channel, lockstep.bridges.pop()
    client.send(bytes(100_000))
    for timeout in (3.0, 20.0):
        channel.worker.post(channel.transport, "close", timeout)
        lockstep.settle()
    lockstep.bridges.append(mute)
    lockstep.settle()
    assert channel.transport.said_close() and not is_closed(client)
    clock.now += 3
    lockstep.settle()
    ending = channel.closed.peek()
    assert ending is not None and ending.report


@pytest.mark.parametrize(
    ("asked", "handed_back"),
    [(("unwrap", "close"), False), (("close", "unwrap"), False), (("send_eof", "unwrap"), True)],
    ids=str,
)
def test_of_two_ends_the_further_one_counts_whichever_is_asked_for_first(
    lockstep: Lockstep, contexts: Contexts, asked: tuple[str, str], handed_back: bool
) -> None:
    """Where `close` has thrown away what came, nobody is to go on behind it in plain text."""
    near, far = lockstep.small_pair()
    client = lockstep.session(contexts[0], near)
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    channel = client._channel
    for end in asked:
        channel.worker.post(channel.transport, end, *(() if end == "send_eof" else (None,)))
    server.send(b"last words")
    server.send_eof()
    lockstep.until(lambda: is_closed(client))
    ending: Any = channel.closed.peek()
    assert type(ending.cause) is (bridge.EndOfStream if handed_back else bridge.SessionClosed)
    assert (ending.sock is not None) is handed_back
    if handed_back:
        ending.sock.close()


def test_idleness_with_a_write_under_way_ends_without_a_close_notify(
    lockstep: Lockstep, contexts: Contexts
) -> None:
    near, far = lockstep.small_pair()
    timeouts = bridge.Timeouts(idle=0.05, write_stall=None)
    client = lockstep.session(contexts[0], near, timeouts=timeouts)
    server = lockstep.session(contexts[1], far, limits=bridge.Limits(inbox_bytes=1))
    lockstep.until(lambda: is_open(client) and is_open(server))
    client.send(bytes(200_000))
    lockstep.until(lambda: is_closed(client))
    ending: Any = client._channel.closed.peek()
    assert isinstance(ending.cause, bridge.IdleTimeout)
    assert not ending.report.close_notify_sent and ending.report.unsent > 0


def test_a_peer_that_does_not_stop_is_not_listened_to_for_ever(
    lockstep: Lockstep, contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "LINGER_BYTES", 1_000)
    near, far = lockstep.tcp_pair()
    server = lockstep.session(contexts[1], near)
    far.sendall(b"GET / HTTP/1.1\r\n\r\n")
    lockstep.until(lambda: is_closed(server))
    assert isinstance(server.end, bridge.NotTLS) and near.fileno() == -1
    assert not server._channel.transport.finished, "it lingers"
    far.sendall(bytes(900))
    lockstep.settle()
    assert not server._channel.transport.finished
    far.sendall(bytes(200))
    lockstep.until(lambda: server._channel.transport.finished)


def test_a_session_that_a_bug_has_ended_lingers_for_a_while_only(
    lockstep: Lockstep, contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer never says another word, and its turn did not come to what it would have waited for."""
    near, far = lockstep.tcp_pair()
    timeouts = bridge.Timeouts(close_notify=0.05, handshake=None)
    server = lockstep.session(contexts[1], near, timeouts=timeouts)
    lockstep.settle()
    mine = server._channel.transport
    fall_in_its_next_turn(monkeypatch, server)
    lockstep.until(lambda: mine.finished)
    assert isinstance(server.end, bridge.SessionAborted) and far.recv(1) == b""


@pytest.mark.parametrize(("unsent", "said", "polite"), [(0, True, True), (0, False, False), (1, True, False)])
def test_a_close_was_polite_if_all_has_left_and_close_notify_too(
    unsent: int, said: bool, polite: bool
) -> None:
    assert bool(CloseReport(unsent, said, not said)) is polite


def test_bytes_moved_are_those_of_both_ways(lockstep: Lockstep, contexts: Contexts) -> None:
    client, server = map(lockstep.session, contexts, lockstep.large_pair())
    lockstep.until(lambda: is_open(client) and is_open(server))
    client.send(b"12345")
    server.send(b"123")
    lockstep.until(lambda: not (client.inbox.empty() or server.inbox.empty()))
    lockstep.settle()
    assert client._channel.transport.moved == server._channel.transport.moved == 8


def test_a_write_that_begins_to_wait_for_a_handshake_is_not_let_down_for_want_of_credit(
    lockstep: Lockstep, ca_file: str, server_cert: KeyPair
) -> None:
    """Nobody takes the record that came right behind the request for a handshake; the answer lies behind it."""
    near, far = lockstep.large_pair()
    client = lockstep.session(
        bridge.client_context(ca_file, **only("TLSv1.2")), near, limits=bridge.Limits(inbox_bytes=1)
    )
    server = Raw(raw_context("TLSv1.2", server_cert), far, server_side=True)
    lockstep.until(lambda: server.handshake() is None and is_open(client))
    server.call("renegotiate")
    assert server.handshake() is None, "it has asked"
    assert server.write(bytes(RECORD_BYTES)) == RECORD_BYTES
    lockstep.settle()
    assert client.inbox.full() and engine_of(client).mid_handshake()
    assert wants(client) == {}, "it has the record, and no room for more"
    client.send(b"said in the middle of it")
    lockstep.settle()
    assert wants(client) == {"read": "read", "write": "read"}
    got: list[bytes | Want] = []
    lockstep.actors.append(lambda: got.append(server.read()))
    lockstep.until(lambda: b"said in the middle of it" in got)


def test_not_a_record_is_read_while_there_is_no_room(lockstep: Lockstep, contexts: Contexts) -> None:
    near, far = lockstep.large_pair()
    client = lockstep.session(contexts[0], near, limits=bridge.Limits(inbox_bytes=1))
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    for _ in range(3):
        server.send(b"x")
        lockstep.settle()
    assert client._channel.transport.received == client.inbox.qsize() == 1
    for count in (2, 3):
        assert client.recv(0) == b"x"
        lockstep.settle()
        assert client._channel.transport.received == count


def test_a_session_that_lingers_lets_its_worker_sleep(
    lockstep: Lockstep, contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = lockstep.tcp_pair()
    server = lockstep.session(contexts[1], near)
    lockstep.settle()
    mine = server._channel.transport
    fall_in_its_next_turn(monkeypatch, server)
    for _ in range(5):
        lockstep.round()
    assert is_closed(server) and not lockstep.round() and not mine.finished
    far.close()
    lockstep.until(lambda: mine.finished)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    made.now = 1_000.0
    for module in (bridge.worker, transport):
        monkeypatch.setattr(module, "time", made)
    return made


def test_a_deadline_has_come_when_its_very_moment_has(
    lockstep: Lockstep, contexts: Contexts, clock: Clock
) -> None:
    near, _ = lockstep.tcp_pair()
    server = lockstep.session(contexts[1], near, timeouts=bridge.Timeouts(handshake=8))
    lockstep.settle()
    clock.now = 1_007.0
    lockstep.settle()
    assert not is_closed(server)
    clock.now = 1_008.0
    for _ in range(3):
        lockstep.round()
    assert isinstance(server.end, bridge.HandshakeTimeout)


@pytest.fixture
def asking(lockstep: Lockstep, ca_file: str, server_cert: KeyPair) -> tuple[Session, Raw]:
    """A client in TLS 1.2, and a server that has just asked it for a new handshake."""
    near, far = lockstep.large_pair()
    client = lockstep.session(bridge.client_context(ca_file, **only("TLSv1.2")), near)
    server = Raw(raw_context("TLSv1.2", server_cert), far, server_side=True)
    while server.handshake() is not None:
        lockstep.round()
    lockstep.settle()
    assert is_open(client) and client._channel.transport.quiet
    assert server.connection.renegotiate() and server.handshake() is None
    return client, server


def test_data_that_comes_with_a_request_for_a_handshake_is_read_and_the_request_answered(
    lockstep: Lockstep, asking: tuple[Session, Raw]
) -> None:
    client, server = asking
    assert server.write(b"data") == 4
    lockstep.settle()
    assert client.recv(0) == b"data" and server.sock.recv(1, socket.MSG_PEEK) == b"\x16"
    while server.connection.renegotiate_pending():
        assert server.read() is Want.READ
        lockstep.settle()
    client.send(b"more")
    lockstep.settle()
    assert server.read() == b"more"


def test_a_close_notify_that_comes_with_a_request_for_a_handshake_is_a_clean_end_to_read_and_none_to_write(
    lockstep: Lockstep, asking: tuple[Session, Raw]
) -> None:
    client, server = asking
    server.call("shutdown")
    lockstep.until(lambda: is_closed(client))
    with pytest.raises(bridge.EndOfStream):
        client.recv(0)
    with pytest.raises(bridge.TLSError, match="in the middle of a renegotiation"):
        client.send(b"more")


def test_a_session_that_fails_with_what_it_reads_lingers_for_a_while_only(
    lockstep: Lockstep, contexts: Contexts, tls_version: str
) -> None:
    near, far = lockstep.tcp_pair()
    server = lockstep.session(contexts[1], near, timeouts=bridge.Timeouts(close_notify=0.05, handshake=None))
    shake_hands(lockstep, server, far, tls_version)
    mine = server._channel.transport
    assert mine.quiet
    far.send(record(23, bytes(32)))
    lockstep.until(lambda: mine.finished)
    assert isinstance(server.end, bridge.TLSError)


@pytest.mark.parametrize("codec", [codecs.Raw, codecs.Lines])
def test_what_a_peer_has_said_before_it_resets_is_heard_out(
    lockstep: Lockstep, contexts: Contexts, tls_version: str, server_cert: KeyPair, codec: Any
) -> None:
    """A write was stuck, so OpenSSL reads on when it has failed."""
    near, far = lockstep.small_tcp_pair()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it says is there before it resets
    client = lockstep.session(contexts[0], near, codec=codec)
    peer = Raw(raw_context(tls_version, server_cert), far, server_side=True)
    while not is_open(client):
        peer.handshake()
        lockstep.round()
    for _ in range(12):
        client.send(codec().decode(b"x" * 16_000 + b"\n")[0])
    lockstep.settle()
    for word in (b"sorry,\n", b"too much\n"):
        assert peer.write(word) == len(word)
    peer.call("shutdown")
    reset(far)
    lockstep.until(lambda: is_closed(client))
    got = [bytes(word, "ascii") if isinstance(word, str) else word.strip() for word in received(client)]
    assert b" ".join(got).split() == [b"sorry,", b"too", b"much"]
    assert isinstance(client.end, bridge.EndOfStream)


ROOM = 20_000
"""Bytes that an inbox may hold."""
INTERNAL_ERROR = 80


class Leaving:
    """A client's session that has much to say, and its peer, who takes none of it, says much, and resets."""

    def __init__(
        self, lockstep: Lockstep, contexts: Contexts, version: str, identity: KeyPair, **options: Any
    ) -> None:
        near, self._far = lockstep.tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self._lockstep = lockstep
        options = {"limits": bridge.Limits(inbox_bytes=ROOM)} | options
        self.session = lockstep.session(contexts[0], near, **options)
        self.channel = self.session._channel
        self.transport = self.channel.transport
        self._peer = Forger(version, self._far, identity)
        while self._peer.handshake() is not None:
            lockstep.round()
        lockstep.settle()
        self._peer.take_over()
        self._said = 0
        self.message: Any = "x" * BLOCK if options.get("codec") is codecs.Lines else bytes(BLOCK)
        while not self.channel.outbox.held():
            self.session.send(self.message)
            lockstep.settle()

    def say(self, data: bytes, kind: int = records.APPLICATION_DATA) -> None:
        """One more record, which the session does not read yet."""
        self._said += self._far.send(self._peer.seal(kind, data))

    def reset(self) -> None:
        """Once all has arrived.  The session finds it, and hears as much as there is room for."""
        sock = self.transport.sock
        assert sock is not None
        until(lambda: len(sock.recv(1 << 20, socket.MSG_PEEK)) == self._said)
        reset(self._far)
        self._lockstep.settle()

    def take(self) -> Iterator[Any]:
        """The messages one by one, to the last."""
        while not (is_closed(self.session) and self.session.inbox.empty()):
            yield self.session.recv(0)
            self._lockstep.settle()


@pytest.fixture
def leaving(
    lockstep: Lockstep, contexts: Contexts, tls_version: str, server_cert: KeyPair
) -> Callable[..., Leaving]:
    return functools.partial(Leaving, lockstep, contexts, tls_version, server_cert)


@pytest.mark.parametrize("codec", [codecs.Raw, codecs.Lines, codecs.LengthPrefixed])
def test_last_words_are_told_to_the_last_byte_as_there_is_room_for_them(
    leaving: Callable[..., Leaving], codec: Any
) -> None:
    one = leaving(codec=codec)
    encode, channel = codec().encode, one.channel
    words = [f"{number:05d}".ljust(999, ".") for number in range(120)]
    messages = words if codec is codecs.Lines else [word.encode() for word in words]
    said = b"".join(map(encode, messages))
    for start in range(0, len(said), 7_777):
        one.say(said[start : start + 7_777])
    one.say(bytes([records.WARNING, records.CLOSE_NOTIFY]), records.ALERT)
    one.reset()
    assert one.session.end is None and one.session.outbox.empty()
    for call in (lambda: one.session.send(one.message), one.session.flush):
        with pytest.raises(bridge.PeerReset):
            call()
    taken = []
    for message in one.take():
        taken.append(message)
        assert channel.credit.held() + channel.credit.kept <= ROOM + RECORD_BYTES
    assert taken == messages if codec is not codecs.Raw else b"".join(taken) == said
    ending = channel.closed.peek()
    assert isinstance(one.session.end, bridge.EndOfStream)
    assert ending is not None and isinstance(ending.cause, bridge.PeerReset)
    assert ending.report.close_notify_received and ending.report.unsent > 0


@pytest.mark.parametrize("codec", [codecs.Raw, codecs.Lines])
def test_last_words_keep_within_what_the_whole_bridge_may_hold(
    leaving: Callable[..., Leaving], lockstep: Lockstep, codec: Any
) -> None:
    one = leaving(codec=codec, limits=bridge.Limits(inbox_bytes=1 << 20, total_bytes=ROOM))
    for _ in range(6):
        one.say(b"x" * 15_999 + b"\n")
    one.reset()
    total, size = lockstep.bridges[0]._inbox_tally, 0
    for message in one.take():
        size += len(message)
        assert total.used <= ROOM + RECORD_BYTES
    assert size == 6 * (16_000 if codec is codecs.Raw else 15_999) and not total.used


def test_last_words_of_one_byte_each_cost_no_more_than_those_of_a_record(
    leaving: Callable[..., Leaving],
) -> None:
    one = leaving(codec=codecs.Lines)
    for _ in range(4):
        one.say(b"\n" * BLOCK)
    one.reset()
    taken = ""
    for message in one.take():
        taken += message + "\n"
        assert one.channel.credit.held() <= ROOM + 64 * BLOCK
    assert taken == "\n" * 4 * BLOCK and isinstance(one.session.end, bridge.PeerReset)


@pytest.mark.parametrize("command", ["close", "unwrap", "abort", "a codec that fails"])
def test_who_never_takes_last_words_may_end_the_session(
    leaving: Callable[..., Leaving], lockstep: Lockstep, command: str
) -> None:
    one = leaving()
    for _ in range(4):
        one.say(bytes(BLOCK))
    one.reset()
    assert not is_closed(one.session)
    if command == "close":
        begin_close(one.session)
    elif command == "abort":
        one.session.abort()
    else:
        argument = None if command == "unwrap" else bridge.CodecError("refused")
        one.channel.worker.post(one.transport, "conclude" if argument else command, argument)
    lockstep.settle()
    kinds = {"unwrap": bridge.PeerReset, "abort": bridge.SessionAborted, "close": bridge.SessionClosed}
    assert is_closed(one.session) and type(one.session.end) is kinds.get(command, bridge.CodecError)


def test_an_alert_behind_last_words_is_the_cause(leaving: Callable[..., Leaving]) -> None:
    one = leaving()
    for _ in range(4):
        one.say(bytes(BLOCK))
    one.say(bytes([records.FATAL, INTERNAL_ERROR]), records.ALERT)
    one.reset()
    assert sum(map(len, one.take())) == 4 * BLOCK
    assert isinstance(one.session.end, bridge.TLSError) and "ALERT" in one.session.end.reason


def test_last_words_that_nobody_takes_are_idle_and_those_that_are_taken_are_not(
    leaving: Callable[..., Leaving], lockstep: Lockstep, clock: Clock
) -> None:
    one = leaving(timeouts=bridge.Timeouts(idle=10, write_stall=15))
    for _ in range(10):
        one.say(bytes(BLOCK))
    one.reset()
    for _ in range(3):
        clock.now += 9
        lockstep.settle()
        assert one.session.end is None, "a byte has moved nine seconds ago"
        assert list(received(one.session))
        lockstep.settle()
    clock.now += 10
    lockstep.settle()
    assert is_closed(one.session) and isinstance(one.session.end, bridge.IdleTimeout)


def test_what_will_never_leave_is_not_kept_while_last_words_are(
    leaving: Callable[..., Leaving], lockstep: Lockstep
) -> None:
    """It counts for nothing any more."""
    one = leaving()
    for _ in range(2):
        one.session.send(bytes(100_000))
    lockstep.settle()
    for _ in range(4):
        one.say(bytes(BLOCK))
    one.reset()
    one.channel.worker.post(one.transport, "send", [b"on its way from the coordinator"])
    lockstep.settle()
    assert not is_closed(one.session)
    assert one.transport._chunk is None and not one.transport._chunks
    assert not lockstep.bridges[0]._outbox_tally.used


def test_nothing_is_waited_for_when_all_last_words_have_been_told(
    leaving: Callable[..., Leaving], lockstep: Lockstep
) -> None:
    one = leaving()
    for _ in range(2):
        one.say(bytes(BLOCK))
    one.reset()
    assert is_closed(one.session), "though there is no room for more"
    assert sum(map(len, one.take())) == 2 * BLOCK and isinstance(one.session.end, bridge.PeerReset)


def test_a_second_failure_cuts_no_linger_short(
    lockstep: Lockstep, contexts: Contexts, tls_version: str
) -> None:
    """A sender's, or a codec's, that was on its way when the first came."""
    near, far = lockstep.tcp_pair()
    server = lockstep.session(contexts[1], near)
    shake_hands(lockstep, server, far, tls_version)
    far.send(record(23, bytes(32)))
    lockstep.until(lambda: is_closed(server))
    channel = server._channel
    channel.worker.post(channel.transport, "conclude", bridge.CodecError("too late"))
    lockstep.settle()
    assert isinstance(server.end, bridge.TLSError) and not channel.transport.finished, "it lingers"
    channel.worker.post(channel.transport, "abort", bridge.SessionAborted("at once"))
    lockstep.settle()
    assert channel.transport.finished


# ── deadlines ──


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_the_time_for_a_connection_ends_with_it(
    lockstep: Lockstep, contexts: Contexts, clock: Clock, listener: socket.socket
) -> None:
    timeouts = bridge.Timeouts(connect=5, handshake=10)
    client = lockstep.connect(listener.getsockname(), contexts[0], timeouts=timeouts)
    lockstep.until(lambda: client.state == "handshaking")
    with listener.accept()[0]:
        clock.now += 6
        lockstep.settle()
        assert not is_closed(client)
        clock.now += 4
        lockstep.until(lambda: is_closed(client))
    assert isinstance(client.end, bridge.HandshakeTimeout)


def test_an_open_session_lets_its_worker_sleep_when_the_time_for_its_connection_has_passed(
    lockstep: Lockstep, contexts: Contexts, clock: Clock, listener: socket.socket
) -> None:
    timeouts = bridge.Timeouts(connect=5, handshake=5)
    client = lockstep.connect(listener.getsockname(), contexts[0], timeouts=timeouts)
    lockstep.until(lambda: client.state == "handshaking")
    server = lockstep.session(contexts[1], listener.accept()[0])
    lockstep.until(lambda: is_open(client) and is_open(server))
    clock.now += 6
    for _ in range(5):
        lockstep.round()
    assert not (lockstep.round() or is_closed(client))


def test_a_close_in_the_middle_of_the_handshake_is_bounded_beyond_it(
    lockstep: Lockstep, contexts: Contexts, clock: Clock
) -> None:
    near, far = lockstep.small_pair()
    client = lockstep.session(contexts[0], near, timeouts=bridge.Timeouts(flush=10, write_stall=None))
    server = lockstep.session(contexts[1], far, limits=bridge.Limits(inbox_bytes=1))
    client.send(bytes(200_000))
    begin_close(client)
    lockstep.until(lambda: client.state == "draining")
    lockstep.settle()
    clock.now += 9
    lockstep.settle()
    assert not is_closed(client) and client.outbox.qsize() > 0
    clock.now += 1
    for _ in range(3):
        lockstep.round()
    ending = client._channel.closed.peek()
    assert ending is not None and isinstance(ending.cause, bridge.CloseTimeout)
    assert is_open(server)


def test_what_was_to_leave_within_its_time_has_no_more_to_do_with_the_peer_s_answer(
    lockstep: Lockstep, contexts: Contexts, clock: Clock
) -> None:
    near, far = lockstep.large_pair()
    timeouts = bridge.Timeouts(flush=5, close_notify=None)
    client, server = (
        lockstep.session(contexts[0], near, timeouts=timeouts),
        lockstep.session(contexts[1], far),
    )
    lockstep.until(lambda: is_open(client) and is_open(server))
    begin_close(client)
    lockstep.settle()
    clock.now += 6
    lockstep.settle()
    assert not is_closed(client)
    begin_close(server)
    lockstep.until(lambda: is_closed(client))
    assert isinstance(client.end, bridge.SessionClosed)


@pytest.mark.parametrize("method", ["close", "unwrap"])
def test_who_has_closed_is_not_idle_as_long_as_its_peer_may_take_to_answer(
    lockstep: Lockstep, contexts: Contexts, clock: Clock, method: str
) -> None:
    near, far = lockstep.large_pair()
    client = lockstep.session(contexts[0], near, timeouts=bridge.Timeouts(idle=5, close_notify=20))
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    lockstep.settle()
    mute = lockstep.bridges.pop()
    client._channel.worker.post(client._channel.transport, method, None)
    lockstep.settle()
    clock.now += 19
    lockstep.settle()
    assert not is_closed(client)
    clock.now += 1
    lockstep.settle()
    assert type(client.end) is (bridge.SessionClosed if method == "close" else bridge.CloseTimeout)
    lockstep.bridges.append(mute)


def test_what_openssl_itself_had_to_say_stalls_nobody_once_it_has_left(
    lockstep: Lockstep, contexts: Contexts, clock: Clock
) -> None:
    def opened() -> tuple[Session, Session, bridge.Bridge]:
        near, far = lockstep.small_pair()
        client = lockstep.session(contexts[0], near, timeouts=bridge.Timeouts(write_stall=60))
        server = lockstep.session(contexts[1], far)
        lockstep.until(lambda: is_open(client) and is_open(server))
        lockstep.settle()
        return client, server, lockstep.bridges.pop()  # which takes no steps

    room = -1
    client, _, mute = opened()
    while not client._channel.outbox.held():
        client.send(b"x")
        lockstep.settle()
        room += 1
    lockstep.bridges.append(mute)
    client, server, mute = opened()
    for _ in range(room):
        client.send(b"x")
        lockstep.settle()
    client.send_eof()
    lockstep.settle()
    assert wants(client)["write"] == "write" and not client._channel.outbox.held()
    lockstep.bridges.append(mute)
    lockstep.settle()
    assert isinstance(server.end, bridge.EndOfStream) and client._channel.transport.said_close()
    clock.now += 61
    server.send(b"still here")
    lockstep.settle()
    assert client.end is None and list(received(client)) == [b"still here"]


@pytest.mark.parametrize("half_closed", [False, True])
def test_who_is_idle_parts_with_one_close_notify(
    lockstep: Lockstep, contexts: Contexts, clock: Clock, half_closed: bool
) -> None:
    near, far = lockstep.large_pair()
    client = lockstep.session(contexts[0], near, timeouts=bridge.Timeouts(idle=5))
    server = lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    if half_closed:
        client.send_eof()
    lockstep.settle()
    clock.now += 5
    lockstep.until(lambda: is_closed(client))
    ending = client._channel.closed.peek()
    assert ending is not None and isinstance(ending.cause, bridge.IdleTimeout)
    assert ending.report and not ending.report.close_notify_received
    lockstep.settle()
    with pytest.raises(bridge.EndOfStream):
        server.recv(0)


def test_small_messages_are_not_held_back(
    lockstep: Lockstep, contexts: Contexts, listener: socket.socket
) -> None:
    client = lockstep.connect(listener.getsockname(), contexts[0])
    lockstep.until(lambda: client.state == "handshaking")
    server = lockstep.session(contexts[1], listener.accept()[0])
    lockstep.until(lambda: is_open(client) and is_open(server))
    for session in (client, server):
        sock = session._channel.transport.sock
        assert sock is not None and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# ── commands ──


@pytest.fixture
def renegotiable(lockstep: Lockstep, ca_file: str, server_cert: KeyPair) -> tuple[Session, Session]:
    """Client and server in TLS 1.2, for which nothing is under way."""
    version = only("TLSv1.2")
    identity = server_cert.certfile, server_cert.keyfile
    near, far = lockstep.large_pair()
    client = lockstep.session(bridge.client_context(ca_file, **version), near)
    server = lockstep.session(bridge.server_context(*identity, renegotiation=True, **version), far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    lockstep.settle()
    assert client._channel.transport.quiet and server._channel.transport.quiet
    return client, server


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (21, ("close", None)),
        (21, ("send_eof",)),
        (21, ("unwrap", None)),
        (22, ("renegotiate",)),
        (23, ("send", [b"x"])),
    ],
    ids=str,
)
def test_a_command_is_obeyed_in_a_turn_to_which_data_has_come_too(
    lockstep: Lockstep, renegotiable: tuple[Session, Session], kind: int, command: tuple[Any, ...]
) -> None:
    client, server = renegotiable
    server._channel.outbox.hold(1)
    client.send(b"data")
    mine, theirs = server._channel.transport, client._channel.transport.sock
    server._channel.worker.post(mine, *command)
    server._channel.worker.step()
    assert mine.received == 4 and theirs is not None
    assert theirs.recv(1, socket.MSG_PEEK) == bytes([kind])


def test_a_client_may_ask_for_a_new_handshake_where_the_server_lets_it(
    lockstep: Lockstep, ca_file: str, server_cert: KeyPair
) -> None:
    near, far = lockstep.large_pair()
    client = lockstep.session(bridge.client_context(ca_file, **only("TLSv1.2")), near)
    context = raw_context("TLSv1.2", server_cert)
    context.set_options(ALLOW_CLIENT_RENEGOTIATION)
    server = Raw(context, far, server_side=True)
    while server.handshake() is not None:
        lockstep.round()
    lockstep.settle()
    mine, before = client._channel.transport, server.connection.get_finished()
    client.renegotiate()
    lockstep.settle()
    assert mine.deadline is not None and wants(client)["handshake"] == "read"
    client.send(b"data")
    while (data := server.read()) is Want.READ:
        lockstep.settle()
    lockstep.settle()
    assert data == b"data" and server.connection.get_finished() != before
    assert mine.quiet and mine.deadline is None and wants(client) == {"read": "read"}


def test_a_renegotiation_of_what_the_peer_has_closed_is_none(
    lockstep: Lockstep, renegotiable: tuple[Session, Session]
) -> None:
    client, server = renegotiable
    client.send_eof()
    lockstep.until(lambda: server.state == "peer_closed")
    server.renegotiate()
    lockstep.settle()
    server.send(b"still here")
    lockstep.until(lambda: not client.inbox.empty())
    assert client.recv(0) == b"still here"


def test_what_follows_in_plain_text_stays_in_the_kernel_also_behind_half_a_record(
    lockstep: Lockstep, contexts: Contexts, tls_version: str, server_cert: KeyPair
) -> None:
    near, far = lockstep.large_pair()
    client = lockstep.session(contexts[0], near)
    peer = Forger(tls_version, far, server_cert)
    while peer.handshake() is not None:
        lockstep.round()
    lockstep.settle()
    peer.take_over()
    record = peer.seal(records.APPLICATION_DATA, b"said in TLS")
    close_notify = peer.seal(records.ALERT, bytes([records.WARNING, records.CLOSE_NOTIFY]))
    far.send(record[:20])
    lockstep.settle()
    channel = client._channel
    channel.worker.post(channel.transport, "unwrap", None)
    lockstep.settle()
    assert channel.transport.said_close()
    far.send(record[20:] + close_notify + b"said in plain text")
    lockstep.until(lambda: is_closed(client))
    ending = channel.closed.peek()
    assert ending is not None and list(received(client)) == [b"said in TLS"]
    sock, leftover = ending.unwrap()
    with sock:
        assert leftover == b"" and sock.recv(100) == b"said in plain text"


def test_what_comes_after_close_is_read_but_nobody_is_troubled_with_it(
    lockstep: Lockstep, contexts: Contexts
) -> None:
    near, far = lockstep.large_pair()
    options = {"timeouts": bridge.Timeouts(close_notify=None), "limits": bridge.Limits(inbox_bytes=1)}
    client, server = lockstep.session(contexts[0], near, **options), lockstep.session(contexts[1], far)
    lockstep.until(lambda: is_open(client) and is_open(server))
    begin_close(client)
    lockstep.settle()
    for _ in range(3):
        server.send(bytes(1_000))
        lockstep.settle()
    (seen,) = lockstep.bridges[0].snapshot().sessions
    assert seen.received == 3_000 and seen.inbox_bytes == 0
    begin_close(server)
    lockstep.until(lambda: is_closed(client))
    assert isinstance(client.end, bridge.SessionClosed)


def test_send_eof_is_that_of_tls_and_not_of_tcp(
    lockstep: Lockstep, contexts: Contexts, tls_version: str
) -> None:
    near, far = lockstep.large_pair()
    session = lockstep.session(contexts[1], near)
    peer = Raw(raw_context(tls_version), far, server_side=False)
    while isinstance(peer.handshake(), Want):
        lockstep.round()
    lockstep.until(lambda: is_open(session))
    session.send_eof()
    lockstep.settle()
    with pytest.raises(SSL.ZeroReturnError):
        peer.read()
    with pytest.raises(BlockingIOError):
        far.recv(1)


def test_the_doctor_tells_what_is_left_inside(
    lockstep: Lockstep, renegotiable: tuple[Session, Session]
) -> None:
    client, server = renegotiable
    client.send(b"data")
    lockstep.bridges[0]._coordinator.step()
    lockstep.bridges[0]._workers[0].step()
    assert engine_of(server).peek(1) == b"d"
    with capture_logs() as logs:
        server._channel.transport.stalled(100, "w")
    (stalled,) = [entry for entry in logs if entry["event"] == "session.stalled"]
    assert stalled["inside"] == 4
