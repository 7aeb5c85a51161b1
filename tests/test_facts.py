"""The facts that decided the design (DESIGN.md, section 2), each a test by its number.

Most of them first show the fact with raw pyOpenSSL, on whatever OpenSSL is installed, so that the reason for a rule
stays proven; then that the bridge is right.  Nearly all are driven from one thread, in turns.
"""

from __future__ import annotations

import dataclasses
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import OpenSSL
import peers
import pytest
import trustme
from conftest import KeyPair, write_key_pair
from OpenSSL import SSL
from peers import reset
from rig import (
    BLOCK,
    PATIENCE,
    Lockstep,
    Raw,
    begin_close,
    engine_of,
    is_closed,
    is_open,
    only,
    raw_context,
    raw_pair,
    received,
    shake,
    wants,
)

import bridge
import bridge.connection
from bridge import codecs, transport
from bridge.engine import TLSEngine
from bridge.limits import RECORD_BYTES
from bridge.poll import Want
from bridge.session import Session


@dataclasses.dataclass(frozen=True)
class Contexts:
    """A server's and a client's context for one version, and the identity of the server."""

    server: bridge.Context
    client: bridge.Context
    identity: KeyPair
    version: str

    def raw_server(self, sock: socket.socket) -> Raw:
        return Raw(raw_context(self.version, self.identity), sock, server_side=True)

    def raw_client(self, sock: socket.socket) -> Raw:
        return Raw(raw_context(self.version), sock, server_side=False)


def contexts(version: str, ca_file: str, identity: KeyPair) -> Contexts:
    server = bridge.server_context(identity.certfile, identity.keyfile, renegotiation=True, **only(version))
    return Contexts(server, bridge.client_context(ca_file, **only(version)), identity, version)


@pytest.fixture
def tls12(ca_file: str, server_cert: KeyPair) -> Contexts:
    return contexts("TLSv1.2", ca_file, server_cert)


@pytest.fixture
def tls13(ca_file: str, server_cert: KeyPair) -> Contexts:
    return contexts("TLSv1.3", ca_file, server_cert)


@pytest.fixture
def tls(tls_version: str, ca_file: str, server_cert: KeyPair) -> Contexts:
    """For each version in turn."""
    return contexts(tls_version, ca_file, server_cert)


def opened(rig: Lockstep, session: Session, peer: Raw) -> Session:
    """*session*, once its handshake with a raw *peer* is done, and the peer has read what came after it."""
    done: list[Want | None] = [Want.READ]

    def act() -> None:
        if done[0] is not None:
            done[0] = peer.handshake()

    rig.actors.append(act)
    rig.until(lambda: is_open(session) and done[0] is None)
    rig.actors.remove(act)
    rig.settle()
    assert peer.read(1) is Want.READ
    return session


def both_opened(
    rig: Lockstep, tls: Contexts, *pair: socket.socket, **options: Any
) -> tuple[Session, Session]:
    """A client's and a server's session, both ours."""
    client = rig.session(tls.client, pair[0], **options)
    server = rig.session(tls.server, pair[1], **options)
    rig.until(lambda: is_open(client) and is_open(server))
    rig.settle()
    return client, server


def reading(peer: Raw, found: list[bytes]) -> Callable[[], None]:
    """An actor that reads all a raw *peer* can read, until its stream ends."""
    over = False

    def act() -> None:
        nonlocal over
        try:
            while not over and not isinstance(data := peer.read(), Want):
                found.append(data)
        except SSL.ZeroReturnError:
            over = True
            found.append(b"<close_notify>")
        except SSL.SysCallError as error:
            over = True
            found.append(f"<{error.args[1]}>".encode())

    return act


def ears(sock: socket.socket) -> bool:
    """Whether a poll would announce something to read."""
    return bool(select.select([sock], [], [], 0)[0])


def numbered(count: int) -> bytes:
    """*count* bytes, no two stretches alike."""
    return b"".join(index.to_bytes(4, "big") for index in range(count // 4 + 1))[:count]


# ── today's answers break: a read that has to answer, while a record is half written ──


def test_fact_00_raw_pyopenssl_dies_of_bad_length_when_a_read_must_answer_a_renegotiation(
    rig: Lockstep, server_cert: KeyPair
) -> None:
    client, server = raw_pair("TLSv1.2", server_cert, *rig.small_pair())
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    server.write_until_stuck(b"A" * BLOCK)
    assert client.read() is Want.READ, "answers with its ClientHello"
    with pytest.raises(SSL.Error, match="bad length"):
        server.read()


def test_fact_00_a_half_written_record_does_not_make_a_read_fail_that_must_answer_a_renegotiation(
    rig: Lockstep, tls12: Contexts
) -> None:
    near, far = rig.small_pair()
    client = tls12.raw_client(near)
    server = opened(rig, rig.session(tls12.server, far), client)
    server.renegotiate()
    rig.settle()
    message = numbered(100_000)
    server.send(message)
    rig.settle()
    assert wants(server)["write"] == "write"
    assert client.read() is Want.READ, "answers with its ClientHello"
    rig.settle()
    assert not is_closed(server)
    found: list[bytes] = []
    rig.actors.append(reading(client, found))
    rig.until(lambda: sum(map(len, found)) == len(message))
    assert b"".join(found) == message
    assert client.connection.total_renegotiations() == 1
    assert client.write(b"and back") == 8
    rig.until(lambda: not server.inbox.empty())
    assert server.recv(0) == b"and back"


@pytest.mark.skipif(peers.libssl() is None, reason="needs a libssl that ctypes can use")
def test_fact_00_raw_pyopenssl_dies_of_bad_length_when_a_read_must_answer_a_key_updates(
    rig: Lockstep, server_cert: KeyPair
) -> None:
    near, far = rig.small_tcp_pair()
    client = Raw(raw_context("TLSv1.3"), near, server_side=False)
    server = key_updater(far, server_cert)
    shake(client, server)
    assert client.read(1) is Want.READ
    client.write_until_stuck(b"A" * BLOCK)
    server.ask_for_new_keys()
    assert client.read(8) == b"new keys", "OpenSSL can put one answer off"
    server.ask_for_new_keys()
    with pytest.raises(SSL.Error, match="bad length"):
        client.read()


@pytest.mark.skipif(peers.libssl() is None, reason="needs a libssl that ctypes can use")
def test_fact_00_a_half_written_record_does_not_make_a_read_fail_that_must_answer_a_key_updates(
    rig: Lockstep, tls13: Contexts
) -> None:
    near, far = rig.small_tcp_pair()
    session = rig.session(tls13.client, near)
    server = key_updater(far, tls13.identity)
    rig.actors.append(server.handshake)
    rig.until(lambda: is_open(session))
    rig.actors.clear()
    rig.settle()
    message = numbered(40_000)
    session.send(message)
    rig.settle()
    assert wants(session)["write"] == "write"
    for _ in range(5):
        server.ask_for_new_keys()
        rig.until(lambda: not session.inbox.empty())
        assert session.recv(0) == b"new keys"
    found: list[bytes] = []
    rig.actors.append(lambda: found.extend(iter(server.read, b"")))
    rig.until(lambda: sum(map(len, found)) == len(message))
    assert b"".join(found) == message, "and the keys did change in the middle of it"


@pytest.mark.skipif(peers.libssl() is None, reason="needs a libssl that ctypes can use")
def test_fact_14_nothing_follows_our_close_notify_even_if_the_socket_is_full_when_it_is_said(
    rig: Lockstep, tls13: Contexts
) -> None:
    """The answer to a KeyUpdate would meet a closed socket, and its reset the peer's last bytes on their way."""
    near, far = rig.small_tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    client, server = (
        TLSEngine(tls13.client, near, server_hostname="localhost"),
        key_updater(far, tls13.identity),
    )
    shake(client, server)
    client.established("localhost", None, near)
    assert client.read(1) is Want.READ, "takes the tickets"
    for _ in range(2):
        server.ask_for_new_keys()
    assert client.write(numbered(8_000)) == 8_000
    assert client.shutdown() is False
    close_notify = client.unflushed()
    assert close_notify > 0, "the socket is full"
    client.mute()
    assert [client.read(8), client.read(8)] == [b"new keys"] * 2
    assert client.unflushed() == close_notify
    while client.flush() is not None:
        assert server.call("SSL_read", server.room, server.CHUNK) >= 0
    while server.call("SSL_read", server.room, server.CHUNK) >= 0:
        pass
    with pytest.raises(BlockingIOError):
        far.recv(1)


class KeyUpdater(peers.EchoPeer):
    """A TLS 1.3 server that asks its client for new keys."""

    mask = 0

    def handshake(self) -> Want | None:
        return None if self.call("SSL_do_handshake") > 0 else Want.READ

    def ask_for_new_keys(self) -> None:
        assert self.call("SSL_key_update", peers.KEY_UPDATE_REQUESTED) == 1
        assert self.call("SSL_write", b"new keys", 8) == 8

    def read(self) -> bytes:
        size = self.call("SSL_read", self.room, self.CHUNK)
        return self.room.raw[:size]


def key_updater(sock: socket.socket, identity: KeyPair) -> KeyUpdater:
    return KeyUpdater(sock, {"role": "server", "version": "TLSv1.3", **dataclasses.asdict(identity)})


# ── 1: one owner ──


def test_fact_01_one_thread_at_a_time_is_inside_a_connection_and_all_but_reads_and_writes_are_the_workers(
    tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: dict[SSL.Connection, set[str]] = {}
    for name in ("do_handshake", "shutdown", "pending"):
        spy_on(monkeypatch, name, callers)
    borrowers: dict[SSL.Connection, set[str]] = {}
    for name in ("recv", "send"):
        spy_on(monkeypatch, name, borrowers)
    with bridge.Bridge(workers=3) as ours, ThreadPoolExecutor(8) as applications:
        listener = ours.listen(("127.0.0.1", 0), tls.server)
        connect = lambda _: ours.connect(listener.address, tls.client, server_hostname="localhost")  # noqa: E731
        clients = list(applications.map(connect, range(4)))
        sessions = clients + [listener.accept(PATIENCE) for _ in clients]
        list(applications.map(lambda session: session.send(b"x" * 5000, PATIENCE), sessions * 3))
        for session in sessions:
            count = 0
            while count < 15_000:
                count += len(applications.submit(session.recv, PATIENCE).result(PATIENCE))
        assert all(applications.map(lambda session: session.close(PATIENCE), sessions))
    assert len(callers) == 8
    assert all(len(threads) == 1 for threads in callers.values()), callers
    workers = {f"bridge-worker-{number}" for number in range(3)}
    assert set().union(*callers.values()) <= workers
    assert set().union(*borrowers.values()) - workers, "answers are written by those who send them"


_inside: weakref.WeakKeyDictionary[SSL.Connection, threading.Lock] = weakref.WeakKeyDictionary()


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str, callers: dict[SSL.Connection, set[str]]) -> None:
    original = getattr(SSL.Connection, name)

    def spy(self: SSL.Connection, *arguments: Any) -> Any:
        callers.setdefault(self, set()).add(threading.current_thread().name)
        alone = _inside.setdefault(self, threading.Lock()).acquire(blocking=False)
        assert alone, f"a second thread calls {name}"
        try:
            return original(self, *arguments)
        finally:
            _inside[self].release()

    monkeypatch.setattr(bridge.connection.Connection, name, spy)


# ── 2: silent corruption ──


def test_fact_02_openssl_takes_a_changed_retry_buffer_in_silence_and_sends_the_old_bytes(
    rig: Lockstep, tls_version: str, server_cert: KeyPair
) -> None:
    client, server = raw_pair(tls_version, server_cert, *rig.small_pair())
    assert client.write(b"A" * BLOCK) is Want.WRITE
    found = b""
    while client.write(b"B" * BLOCK) is Want.WRITE:
        found += server.read_all()
    found += server.read_all()
    assert found == b"A" * BLOCK


def test_fact_02_openssl_calls_a_shorter_retry_a_bad_length(
    rig: Lockstep, tls_version: str, server_cert: KeyPair
) -> None:
    client, _ = raw_pair(tls_version, server_cert, *rig.small_pair())
    assert client.write(b"A" * BLOCK) is Want.WRITE
    with pytest.raises(SSL.Error, match="bad length"):
        client.write(b"A" * 100)


def test_fact_02_a_changed_retry_buffer_would_corrupt_silently_so_the_engine_refuses_it(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client, server = TLSEngine(tls.client, near, server_hostname="localhost"), tls.raw_server(far)
    shake(client, server)
    client.established("localhost", None)  # without the socket there is no detour: a want stays a want
    chunk = b"A" * BLOCK
    assert client.write(chunk) is Want.WRITE
    for changed in (b"B" * BLOCK, chunk[:100], bytes(bytearray(chunk))):
        with pytest.raises(AssertionError, match="must be repeated with the same chunk"):
            client.write(changed)
    found = b""
    while client.write(chunk) is Want.WRITE:
        found += server.read_all()
    assert found + server.read_all() == chunk


def test_fact_02_what_an_application_does_to_its_buffer_after_send_changes_nothing(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls.client, near), server := tls.raw_server(far))
    message = bytearray(b"A" * 100_000)
    client.send(message)
    rig.settle()
    assert wants(client)["write"] == "write"
    message[:] = b"B" * 100_000
    found: list[bytes] = []
    rig.actors.append(reading(server, found))
    rig.until(lambda: sum(map(len, found)) == 100_000)
    assert b"".join(found) == b"A" * 100_000


# ── 3: the lost wake-up ──


def test_fact_03_a_read_consumes_what_a_write_waits_for_and_no_poll_will_tell(
    rig: Lockstep, server_cert: KeyPair
) -> None:
    client, server = raw_pair("TLSv1.2", server_cert, *rig.small_pair())
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    assert client.read() is Want.READ, "answers with its ClientHello"
    assert client.write(b"hi") is Want.READ
    assert server.read() is Want.READ, "answers with its whole flight, for it resumes"
    assert ears(client.sock)
    assert client.read() is Want.READ, "finishes the handshake, and finds no data"
    assert not ears(client.sock)
    assert client.write(b"hi") == 2
    assert server.read() == b"hi"


def test_fact_03_the_lost_wake_up_a_read_that_consumes_the_handshake_sends_the_write_off_at_once(
    rig: Lockstep, tls12: Contexts
) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls12.client, near), server := tls12.raw_server(far))
    worker = rig.bridges[0]._workers[0]
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    worker.step()
    client.send(b"hi")
    rig.settle()
    assert wants(client) == {"read": "read", "write": "read"}
    assert server.read() is Want.READ, "answers with its whole flight, for it resumes"
    worker.step()
    assert wants(client) == {"read": "read"}
    assert server.read() == b"hi", "in the same turn, for the socket is silent from now on"


def test_fact_03_the_lost_wake_up_also_when_no_poll_announced_what_the_read_consumed(
    rig: Lockstep, tls12: Contexts
) -> None:
    """A reader without credit is not polled for; it is the write's want that lets it read, in the same turn."""
    near, far = rig.large_pair()
    limits = bridge.Limits(inbox_bytes=1)
    client = opened(rig, rig.session(tls12.client, near, limits=limits), server := tls12.raw_server(far))
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    assert server.write(bytes(RECORD_BYTES)) == RECORD_BYTES
    rig.settle()
    assert client.inbox.full() and engine_of(client).mid_handshake() and not wants(client)
    assert server.read() is Want.READ, "answers with its whole flight, for it resumes"
    client.send(b"hi")
    rig.bridges[0]._coordinator.step()
    rig.bridges[0]._workers[0].step()
    assert server.read() == b"hi"


# ── 4: drain before sleeping ──


def test_fact_04_poll_says_nothing_about_bytes_inside_openssl(
    rig: Lockstep, tls_version: str, server_cert: KeyPair
) -> None:
    client, server = raw_pair(tls_version, server_cert, *rig.small_pair())
    assert server.write(b"x" * 1000) == 1000
    assert client.read(10) == b"x" * 10
    assert client.connection.pending() == 990
    assert not ears(client.sock)


def test_fact_04_the_engine_knows_of_decrypted_bytes_that_no_poll_announces(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client, server = TLSEngine(tls.client, near, server_hostname="localhost"), tls.raw_server(far)
    shake(client, server)
    client.established("localhost", None, near)
    assert client.read(1) is Want.READ
    assert server.write(b"x" * 1000) == 1000
    assert client.read(10) == b"x" * 10
    assert client.has_more() and not ears(near)
    assert client.read(1000) == b"x" * 990
    assert not client.has_more()


def on_detour(rig: Lockstep, tls: Contexts, near: socket.socket, far: socket.socket, **options: Any) -> Any:
    """A client's session whose peer does not read, so that what it receives goes by way of the engine's memory."""
    client = opened(
        rig, rig.session(tls.client, near, codec=codecs.Lines, **options), server := tls.raw_server(far)
    )
    client.send("x" * BLOCK)
    rig.settle()
    assert engine_of(client).on_detour
    return client, server


def test_fact_04_a_read_budget_that_ends_a_turn_leaves_records_behind_and_the_next_turn_takes_them(
    rig: Lockstep, tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = rig.small_pair()
    client, server = on_detour(rig, tls, near, far)
    monkeypatch.setattr(transport, "READ_BUDGET", 1)
    for number in range(5):
        assert server.write(b"%d\n" % number) == 2
    worker, coordinator = rig.bridges[0]._workers[0], rig.bridges[0]._coordinator
    worker.step()
    assert ears(client._channel.transport.sock), "a detour reads no further than one record"
    for number in range(5):
        coordinator.step()
        assert list(received(client)) == [str(number)]
        worker.step(None if number < 4 else 0.0)  # and it does not sleep: this would last for ever


def test_fact_04_read_credit_that_ends_a_turn_leaves_records_behind_and_its_return_takes_them(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client, server = on_detour(rig, tls, near, far, limits=bridge.Limits(inbox_bytes=1, outbox_bytes=200_000))
    for number in range(5):
        assert server.write(b"%d\n" % number) == 2
    rig.settle()
    assert ears(client._channel.transport.sock), "a detour reads no further than one record"
    for number in range(5):
        assert client.inbox.qsize() == 1, "paused"
        assert list(received(client)) == [str(number)]
        rig.settle()
    assert client.inbox.empty()


def test_fact_04_read_credit_also_ends_a_turn_over_the_socket_and_its_return_goes_on(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.large_pair()
    limits = bridge.Limits(inbox_bytes=1)
    client = opened(
        rig, rig.session(tls.client, near, codec=codecs.Lines, limits=limits), server := tls.raw_server(far)
    )
    for number in range(5):
        server.write(b"%d\n" % number)
    for number in range(5):
        rig.settle()
        assert list(received(client)) == [str(number)]


# ── 5: shutdown ──


def test_fact_05_shutdown_with_a_write_pending_loses_that_write_for_good(
    rig: Lockstep, tls_version: str, server_cert: KeyPair
) -> None:
    client, server = raw_pair(tls_version, server_cert, *rig.small_pair())
    assert client.write(b"A" * BLOCK) is Want.WRITE
    assert client.call("shutdown") is Want.WRITE
    found: list[bytes] = []
    reading(server, found)()
    with pytest.raises(SSL.Error, match="protocol is shutdown"):
        client.write(b"A" * BLOCK)
    assert len(b"".join(found)) < BLOCK


def test_fact_05_the_engine_refuses_to_shut_down_with_a_write_pending(rig: Lockstep, tls: Contexts) -> None:
    near, far = rig.small_pair()
    client, server = TLSEngine(tls.client, near, server_hostname="localhost"), tls.raw_server(far)
    shake(client, server)
    client.established("localhost", None)
    assert client.write(b"A" * BLOCK) is Want.WRITE
    with pytest.raises(AssertionError, match="would lose the pending write"):
        client.shutdown()


def test_fact_05_close_with_a_write_pending_sends_it_first_and_then_close_notify(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls.client, near), server := tls.raw_server(far))
    message = numbered(100_000)
    client.send(message)
    rig.settle()
    assert wants(client)["write"] == "write"
    begin_close(client)
    rig.settle()
    found: list[bytes] = []
    rig.actors.append(reading(server, found))
    rig.until(lambda: found[-1:] == [b"<close_notify>"])
    assert b"".join(found[:-1]) == message
    assert server.call("shutdown") is True
    rig.until(lambda: is_closed(client))
    assert client.close() == bridge.CloseReport(0, True, True)


def test_fact_05_openssl_calls_shutdown_during_a_handshake_an_error(rig: Lockstep, tls_version: str) -> None:
    client = Raw(raw_context(tls_version), rig.small_pair()[0], server_side=False)
    assert client.handshake() is Want.READ
    with pytest.raises(SSL.Error, match="shutdown while in init"):
        client.call("shutdown")


def test_fact_05_close_during_the_handshake_ends_the_session_without_an_error_of_openssl(
    rig: Lockstep, tls: Contexts
) -> None:
    client = rig.session(tls.client, rig.small_pair()[0])
    rig.settle()
    assert client.state == "handshaking" and wants(client) == {"handshake": "read"}
    begin_close(client)
    rig.until(lambda: is_closed(client))
    with pytest.raises(bridge.SessionClosed, match="before the session was open"):
        client.info  # noqa: B018
    assert client.close() == bridge.CloseReport(0, False, False)


def test_fact_05_close_during_the_handshake_waits_for_it_if_something_is_to_be_sent(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client, server = rig.session(tls.client, near), tls.raw_server(far)
    client.send(b"last words")
    rig.settle()
    begin_close(client)
    rig.settle()
    assert not is_closed(client)
    found: list[bytes] = []
    rig.actors.append(lambda: None if server.handshake() else reading(server, found)())
    rig.until(lambda: len(found) == 2)
    assert found == [b"last words", b"<close_notify>"]


def test_fact_05_close_during_a_renegotiation_waits_for_it(rig: Lockstep, tls12: Contexts) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls12.client, near), server := tls12.raw_server(far))
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    rig.bridges[0]._workers[0].step()
    client.send(b"last words")
    begin_close(client)
    rig.settle()
    assert wants(client)["write"] == "read" and not is_closed(client)
    found: list[bytes] = []
    rig.actors.append(reading(server, found))
    rig.until(lambda: found[-1:] == [b"<close_notify>"])
    assert found == [b"last words", b"<close_notify>"]


# ── 6: poll and close ──


@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll()")
def test_fact_06_poll_is_not_woken_by_another_threads_close(rig: Lockstep) -> None:
    about_to_sleep = threading.Event()

    def sleep(sock: socket.socket) -> float:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        began = time.monotonic()
        about_to_sleep.set()
        poll.poll(200)
        return time.monotonic() - began

    with ThreadPoolExecutor(1) as sleeper:
        for _ in range(20):  # a close that comes before the sleep does not count
            about_to_sleep.clear()
            near, _far = rig.small_pair()
            asleep = sleeper.submit(sleep, near)
            assert about_to_sleep.wait(PATIENCE)
            near.close()
            if asleep.result(PATIENCE) >= 0.2:
                return
    pytest.fail("it was woken each time")


def test_fact_06_only_the_owner_closes_the_socket_and_everybody_else_wakes_it(
    rig: Lockstep, tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    closers: dict[int, str] = {}
    close = socket.socket.close

    def spy(self: socket.socket) -> None:
        if self.fileno() >= 0:
            closers[self.fileno()] = threading.current_thread().name
        close(self)

    with bridge.Bridge(workers=1) as ours:
        for end in ("abort", "close"):
            near, far = rig.tcp_pair()
            server = rig.session(tls.server, far)
            session = ours.adopt(near, tls.client, server_hostname="localhost", wait=False)
            rig.until(lambda server=server, session=session: is_open(server) and is_open(session))
            number = session._channel.transport.sock.fileno()
            monkeypatch.setattr(socket.socket, "close", spy)
            if end == "abort":
                session.abort()
            else:
                begin_close(session)
                begin_close(server)
            rig.until(lambda session=session: is_closed(session))
            rig.until(lambda number=number: number in closers)
            monkeypatch.undo()
            assert closers.pop(number) == "bridge-worker-0"


# ── 7: a hang-up and an empty mask ──


@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll()")
def test_fact_07_poll_with_an_empty_mask_returns_a_hang_up_at_once(rig: Lockstep) -> None:
    near, far = rig.small_pair()
    poll = select.poll()
    poll.register(near, 0)
    assert poll.poll(0) == []
    far.close()
    assert poll.poll(0) == [(near.fileno(), select.POLLHUP)]


def test_fact_07_a_paused_session_whose_peer_hung_up_leaves_the_poll_set_and_does_not_spin(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.large_pair()
    limits = bridge.Limits(inbox_bytes=1)
    client = opened(
        rig, rig.session(tls.client, near, codec=codecs.Lines, limits=limits), server := tls.raw_server(far)
    )
    for number in range(3):
        server.write(b"%d\n" % number)
    far.close()
    rig.settle()
    worker = rig.bridges[0]._workers[0]
    assert client.state == "open" and wants(client) == {}
    assert [worker.step() for _ in range(50)] == [False] * 50
    assert worker.step(0.05) is False, "it sleeps, too"
    for number in range(3):
        assert list(received(client)) == [str(number)], "nothing of it was lost"
        rig.settle()
    with pytest.raises((bridge.Truncated, bridge.PeerReset)):
        client.recv(0)


# ── 8: empty operations ──


def test_fact_08_empty_operations_lie(rig: Lockstep, tls_version: str, server_cert: KeyPair) -> None:
    client, server = raw_pair(tls_version, server_cert, *rig.small_pair())
    with pytest.raises(SSL.SysCallError, match="Unexpected EOF"):
        client.write(b"")
    assert server.write(b"x") == 1
    with pytest.raises((SSL.WantReadError, SSL.SysCallError)):
        client.connection.recv(0)


def test_fact_08_an_empty_message_sends_nothing_and_harms_nothing(rig: Lockstep, tls: Contexts) -> None:
    client, server = both_opened(rig, tls, *rig.small_pair())
    for message in (b"", b"x", b""):
        client.send(message)
        rig.settle()
        client.flush(0)
    assert list(received(server)) == [b"x"]
    assert client.state == server.state == "open"


def test_fact_08_the_engine_passes_no_empty_operation_on(rig: Lockstep, tls: Contexts) -> None:
    client = TLSEngine(tls.client, rig.small_pair()[0], server_hostname="localhost")
    for call in (client.write, client.read, client.peek):
        with pytest.raises(AssertionError):
            call(b"" if call == client.write else 0)  # type: ignore[arg-type]


# ── 9: latched errors ──


def test_fact_09_after_the_first_fatal_error_openssl_says_nothing_any_more(
    rig: Lockstep, tls_version: str, server_cert: KeyPair
) -> None:
    client, server = raw_pair(tls_version, server_cert, *rig.small_pair())
    client.sock.send(b"no record of TLS starts like this")
    with pytest.raises(SSL.Error) as first:
        server.read()
    assert first.value.args[0]
    for call in (server.read, lambda: server.write(b"x")):
        with pytest.raises(SSL.Error) as later:
            call()
        assert later.value.args[0] != first.value.args[0]


def test_fact_09_errors_latch_so_the_first_cause_goes_to_every_later_caller(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls.client, near), tls.raw_server(far))
    far.send(b"no record of TLS starts like this")
    rig.settle()
    causes = []
    for call in (client.recv, lambda: client.send(b"x"), client.recv, client.peek):
        with pytest.raises(bridge.TLSError) as caught:
            call()
        causes.append(caught.value)
    causes.append(client.end)
    assert len({str(cause) for cause in causes}) == 1 and causes[0].reason
    assert len(set(map(id, causes))) == len(causes), "each has its own copy, so tracebacks do not mix"


def test_fact_09_the_engine_keeps_its_first_cause(rig: Lockstep, tls: Contexts) -> None:
    near, far = rig.small_pair()
    client, server = TLSEngine(tls.client, near, server_hostname="localhost"), tls.raw_server(far)
    shake(client, server)
    far.send(b"no record of TLS starts like this")
    causes = []
    for call in (
        lambda: client.read(10),
        lambda: client.write(b"x"),
        lambda: client.peek(10),
        client.shutdown,
    ):
        with pytest.raises(bridge.TLSError) as caught:
            call()
        causes.append((caught.value.reason, str(caught.value)))
    assert len(set(causes)) == 1


@pytest.mark.parametrize("unread", [False, True], ids=["read-all", "unread"])
def test_fact_09_a_ragged_end_is_told_as_what_it_is(rig: Lockstep, tls: Contexts, unread: bool) -> None:
    near, far = rig.small_pair()
    client = opened(rig, rig.session(tls.client, near), tls.raw_server(far))
    if unread:
        client.send(b"the peer never reads this")
        rig.settle()
    far.close()
    rig.until(lambda: is_closed(client))
    with pytest.raises(bridge.PeerReset if unread else bridge.Truncated) as caught:
        client.recv()
    assert ("reset" in str(caught.value).lower()) == unread
    assert (caught.value.errno == 104) == unread or not unread


# ── 10: callbacks ──


def nosy_context(ca_file: str, boom: type[Exception], looks: Callable[[], None]) -> SSL.Context:
    """A user's own, whose verify callback raises; and right after that, before anybody looks, *looks* does."""
    context = raw_context("TLSv1.3")
    context.load_verify_locations(ca_file)

    def verify(connection: SSL.Connection, *_: object) -> bool:
        raise boom("this one is refused")

    def info(connection: SSL.Connection, where: int, result: int) -> None:
        if where == SSL.SSL_CB_WRITE_ALERT:
            looks()

    context.set_verify(SSL.VERIFY_PEER, verify)
    context.set_info_callback(info)
    return context


class Boom(Exception):
    """What a careless callback raises."""


def test_fact_09_an_error_left_in_the_threads_queue_is_not_charged_to_the_next_connection(
    rig: Lockstep, tls: Contexts
) -> None:
    """SSL_get_error(3) looks there first, and pyOpenSSL leaves there what a failed system call put.

    OpenSSL 4 no longer does, for what is none of the connection's.
    """
    near, far = rig.large_pair()
    client, server = tls.raw_client(near), TLSEngine(tls.server, far)
    shake(client, server)
    assert server.read(10) is Want.READ and not server.on_detour, "over memory nobody asks it"
    lib: Any = OpenSSL._util.lib
    lib.BIO_new_file(b"/nowhere/nothing", b"r")
    assert lib.ERR_peek_error() != 0
    assert server.read(10) is Want.READ


def test_fact_09_a_reset_of_one_session_leaves_nothing_that_another_could_take_for_its_own(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.tcp_pair()
    client, server = TLSEngine(tls.client, near, server_hostname="localhost"), tls.raw_server(far)
    shake(client, server)
    reset(far)
    with pytest.raises((bridge.PeerReset, bridge.Truncated)):
        client.read(10)
    lib: Any = OpenSSL._util.lib
    assert lib.ERR_peek_error() == 0


def test_fact_10_pyopenssl_raises_one_connections_callback_error_in_another(
    rig: Lockstep, ca_file: str, server_cert: KeyPair
) -> None:
    looked: list[object] = []

    def look() -> None:
        try:
            looked.append(innocent.handshake())
        except Boom as error:
            looked.append(error)

    context = nosy_context(ca_file, Boom, look)
    near, far = rig.small_pair()
    guilty, server = Raw(context, near, False), Raw(raw_context("TLSv1.3", server_cert), far, True)
    innocent = Raw(context, rig.small_pair()[0], False)
    assert guilty.handshake() is Want.READ
    assert server.handshake() is Want.READ
    with pytest.raises(SSL.Error):
        guilty.handshake()
    assert [type(answer) for answer in looked] == [Boom]


def test_fact_10_a_callback_never_leaks_into_another_session(
    rig: Lockstep, ca_file: str, server_cert: KeyPair
) -> None:
    looked: list[object] = []
    context = bridge.Context.adopt(
        nosy_context(ca_file, Boom, lambda: looked.append(innocent.handshake())), server_side=False
    )
    near, far = rig.small_pair()
    guilty, server = TLSEngine(context, near), Raw(raw_context("TLSv1.3", server_cert), far, True)
    innocent = TLSEngine(context, rig.small_pair()[0])
    assert guilty.handshake() is Want.READ
    assert server.handshake() is Want.READ
    with pytest.raises(bridge.TLSError, match="Boom: this one is refused") as caught:
        guilty.handshake()
    assert isinstance(caught.value.__cause__, Boom)
    assert looked == [Want.READ], "the innocent one wants what it would want anyway"


def test_fact_10_of_many_sessions_with_one_context_each_gets_its_own_error_or_none(
    rig: Lockstep, ca: trustme.CA, ca_file: str, tls_version: str, tmp_path: Any
) -> None:
    identities = {}
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        identities[name] = write_key_pair(ca.issue_cert("localhost", common_name=name), tmp_path / name)
    context = raw_context(tls_version)
    context.load_verify_locations(ca_file)

    def verify(connection: SSL.Connection, certificate: Any, code: int, depth: int, ok: int) -> bool:
        if depth == 0 and "CN=bad" in certificate.to_cryptography().subject.rfc4514_string():
            raise Boom(f"certificate of session {connection.get_servername()!r}")
        return bool(ok)

    context.set_verify(SSL.VERIFY_PEER, verify)
    sessions = []
    for number in range(20):
        near, far = rig.large_pair()
        kind = "bad" if number % 3 == 0 else "good"
        server = bridge.server_context(
            identities[kind].certfile, identities[kind].keyfile, **only(tls_version)
        )
        rig.session(server, far)
        sessions.append((kind, rig.session(context, near, server_side=False, server_hostname="localhost")))
    rig.until(lambda: all(is_open(session) or is_closed(session) for _, session in sessions))
    for kind, session in sessions:
        if kind == "good":
            assert session.info.version == tls_version
        else:
            with pytest.raises(bridge.TLSError, match="Boom: certificate of session"):
                session.info  # noqa: B018


# ── 11: frozen contexts ──


def test_fact_11_contexts_freeze_and_ours_says_what_to_do_instead(tls: Contexts) -> None:
    with pytest.raises(AttributeError, match=r"a Context is frozen.*replace_context"):
        tls.server.renegotiation = False  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del tls.server.raw


def test_fact_11_a_reload_is_a_new_context_for_new_sessions_and_the_others_keep_theirs(
    rig: Lockstep, tls: Contexts, ca: trustme.CA, tmp_path: Any
) -> None:
    newer = write_key_pair(ca.issue_cert("localhost", common_name="newer"), tmp_path)
    ours = rig.bridge()
    listener = ours.listen(("127.0.0.1", 0), tls.server)

    def connect() -> tuple[Session, Session]:
        client = ours.connect(listener.address, tls.client, server_hostname="localhost", wait=False)
        rig.sessions.append(client)
        rig.until(lambda: is_open(client) and listener._accepted.qsize())
        rig.sessions.append(listener.accept(0))
        return client, rig.sessions[-1]

    before, its_peer = connect()
    listener.replace_context(bridge.server_context(newer.certfile, newer.keyfile, **only(tls.version)))
    after, _ = connect()
    names = [
        session.info.peer_certificate.subject.rfc4514_string()  # type: ignore[union-attr]
        for session in (before, after)
    ]
    assert "newer" not in names[0] and "newer" in names[1]
    before.send(b"still here")
    rig.until(lambda: its_peer.inbox.qsize())
    assert its_peer.recv(0) == b"still here"


# ── 12: host names ──


def test_fact_12_pyopenssl_does_not_check_the_host_name(
    rig: Lockstep, ca_file: str, tls_version: str, server_cert: KeyPair
) -> None:
    near, far = rig.small_pair()
    context = raw_context(tls_version)
    context.load_verify_locations(ca_file)
    context.set_verify(SSL.VERIFY_PEER)
    client, server = Raw(context, near, False), Raw(raw_context(tls_version, server_cert), far, True)
    client.connection.set_tlsext_host_name(b"quite-another.example")
    shake(client, server)
    assert client.write(b"my password") == 11


def test_fact_12_the_host_name_is_verified_before_the_first_application_byte(
    rig: Lockstep, tls: Contexts
) -> None:
    near, far = rig.small_pair()
    client = rig.session(tls.client, near, server_hostname="quite-another.example")
    server = rig.session(tls.server, far)
    client.send(b"my password")
    rig.until(lambda: is_closed(client))
    with pytest.raises(bridge.HostnameMismatch) as caught:
        client.recv()
    assert "quite-another.example" in str(caught.value) and "localhost" in str(caught.value)
    rig.until(lambda: is_closed(server) or server.end is not None)
    assert list(received(server)) == []
    with pytest.raises(bridge.SessionEnded):
        server.recv(0)


# ── 13: renegotiation ──


def test_fact_13_a_client_that_starts_a_renegotiation_is_refused(rig: Lockstep, tls12: Contexts) -> None:
    near, far = rig.small_pair()
    client = tls12.raw_client(near)
    server = opened(rig, rig.session(tls12.server, far), client)
    assert client.call("renegotiate") is True
    assert client.handshake() is Want.READ
    rig.settle()
    with pytest.raises(SSL.Error, match="no renegotiation"):
        client.handshake()
    assert server._channel.transport._engine is None or client.connection.total_renegotiations() <= 1


def test_fact_13_a_server_may_renegotiate_if_its_context_allows_it_and_the_client_follows(
    rig: Lockstep, tls12: Contexts
) -> None:
    client, server = both_opened(rig, tls12, *rig.small_pair())
    for number in range(3):
        server.renegotiate()
        client.send(b"to")
        server.send(b"fro")
        rig.settle()
        connection = engine_of(client)._connection
        assert connection.total_renegotiations() == number + 1
        assert not engine_of(server).renegotiating()
        assert list(received(server)) == [b"to"] and list(received(client)) == [b"fro"]


def test_fact_13_a_renegotiation_asked_for_while_one_is_under_way_is_the_same_one(
    rig: Lockstep, tls12: Contexts
) -> None:
    near, far = rig.large_pair()
    client = tls12.raw_client(near)
    server = opened(rig, rig.session(tls12.server, far), client)
    for number in range(1, 3):
        server.renegotiate()
        rig.settle()
        assert client.read() is Want.READ, "answers with its ClientHello"
        rig.settle()
        assert engine_of(server).mid_handshake()
        server.renegotiate()
        rig.settle()
        assert client.read() is Want.READ
        rig.settle()
        assert client.read() is Want.READ, "no second HelloRequest"
        assert not engine_of(server).mid_handshake() and not engine_of(server).renegotiating()
        assert client.connection.total_renegotiations() == number
        assert server._channel.transport.deadline is None, "and nobody waits for one"
        server.send(b"fro")
        assert client.write(b"to") == 2
        rig.settle()
        assert server.recv(0) == b"to" and client.read() == b"fro"


def test_fact_13_a_server_does_not_renegotiate_by_default(
    rig: Lockstep, tls12: Contexts, server_cert: KeyPair
) -> None:
    default = bridge.server_context(server_cert.certfile, server_cert.keyfile, **only("TLSv1.2"))
    near, far = rig.small_pair()
    client, server = rig.session(tls12.client, near), rig.session(default, far)
    rig.until(lambda: is_open(client) and is_open(server))
    with pytest.raises(bridge.ConfigurationError, match="refuses renegotiation"):
        server.renegotiate()


def test_fact_13_a_client_told_not_to_follow_does_not(rig: Lockstep, tls12: Contexts, ca_file: str) -> None:
    stubborn = bridge.client_context(ca_file, renegotiation=False, **only("TLSv1.2"))
    near, far = rig.small_pair()
    client = opened(rig, rig.session(stubborn, near), server := tls12.raw_server(far))
    assert server.call("renegotiate") is True
    assert server.handshake() is None, "the HelloRequest is out"
    rig.settle()
    with pytest.raises(SSL.Error, match="no renegotiation"):
        server.read()
    assert client._channel.transport._engine is None or not engine_of(client).mid_handshake()


# ── 14: lingering close ──


def test_fact_14_closing_with_unread_tickets_makes_the_peer_lose_data(
    rig: Lockstep, server_cert: KeyPair
) -> None:
    near, far = rig.tcp_pair()
    client = Raw(raw_context("TLSv1.3"), near, False)
    server = Raw(raw_context("TLSv1.3", server_cert), far, True)
    shake(client, server)
    client.write_until_stuck(b"x" * BLOCK)
    near.close()  # with the server's tickets unread
    with pytest.raises(SSL.SysCallError, match="ECONNRESET"):
        server.read_all()


@pytest.mark.parametrize("peer_closes", [False, True], ids=["mute", "answers"])
def test_fact_14_a_write_only_session_with_unread_tickets_delivers_every_byte(
    rig: Lockstep, tls13: Contexts, peer_closes: bool
) -> None:
    near, far = rig.tcp_pair()
    client, server = rig.session(tls13.client, near), tls13.raw_server(far)
    message = numbered(3_000_000)
    client.send(message)  # before the handshake: it leaves with the very first turn
    rig.actors.append(server.handshake)
    rig.until(lambda: is_open(client))
    begin_close(client)
    found: list[bytes] = []
    rig.actors[:] = [reading(server, found)]
    rig.until(lambda: found[-1:] == [b"<close_notify>"])
    assert b"".join(found[:-1]) == message
    if peer_closes:
        server.write(b"a late answer that nobody will read" * 1000)
        server.call("shutdown")
    far.close()
    rig.until(lambda: is_closed(client))
    assert client.close() == bridge.CloseReport(0, True, peer_closes)


def test_fact_14_a_failed_session_lingers_so_that_its_peer_is_not_reset(rig: Lockstep, tls: Contexts) -> None:
    near, far = rig.tcp_pair()
    client = tls.raw_client(near)
    server = opened(rig, rig.session(tls.server, far, codec=lambda: codecs.Lines(max_length=100)), client)
    server.send("last words")
    rig.settle()
    client.write_until_stuck(b"a line that never ends " * 100)
    rig.until(lambda: is_closed(server))
    with pytest.raises(bridge.MessageTooLarge):
        server.recv(0)
    found: list[bytes] = []
    rig.actors.append(reading(client, found))
    rig.until(lambda: len(found) == 2)
    assert found == [b"last words\n", b"<Unexpected EOF>"], "and not <ECONNRESET>"


# ── 15: snapshots of facts ──


def test_fact_15_facts_are_snapshotted_and_survive_the_peers_close_and_our_own(
    rig: Lockstep, tls: Contexts
) -> None:
    client, server = both_opened(rig, tls, *rig.small_pair())
    known = [(session.info, dataclasses.asdict(session.info)) for session in (client, server)]
    assert known[0][0].version == tls.version and known[0][0].peer_certificate is not None
    server.abort()
    rig.until(lambda: is_closed(client) and is_closed(server))
    assert client._channel.transport._engine is None, "nothing is left to ask"
    for session, (info, facts) in zip((client, server), known, strict=True):
        assert session.info is info and dataclasses.asdict(session.info) == facts
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.version = "TLSv1.1"


def test_fact_15_nobody_asks_the_live_connection_after_the_handshake(
    rig: Lockstep, tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = both_opened(rig, tls, *rig.small_pair())
    asked: list[str] = []
    for name in dir(SSL.Connection):
        if name.startswith("get_"):
            monkeypatch.setattr(
                bridge.connection.Connection,
                name,
                lambda self, *_, name=name: asked.append(name),
                raising=False,
            )
    assert client.info.cipher and client.info.peername is not None and client.state and repr(client)
    rig.bridges[0].snapshot()
    assert asked == []


# ── 16: names ──


def test_fact_16_names_are_resolved_on_the_callers_thread(
    tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolvers = []
    resolve = socket.getaddrinfo

    def spy(*arguments: Any, **options: Any) -> Any:
        resolvers.append(threading.current_thread().name)
        return resolve(*arguments, **options)

    with bridge.Bridge(workers=2) as ours:
        listener = ours.listen(("127.0.0.1", 0), tls.server)
        monkeypatch.setattr(socket, "getaddrinfo", spy)
        with ThreadPoolExecutor(1, thread_name_prefix="caller") as caller:
            client = caller.submit(
                ours.connect, ("localhost", listener.address[1]), tls.client, timeout=PATIENCE
            ).result()
        assert client.info.version == tls.version
    assert resolvers and set(resolvers) == {"caller_0"}


# ── 17: batching is what pays ──


def test_fact_17_what_is_queued_behind_a_first_message_leaves_as_one_record_and_arrives_as_one_hand_over(
    rig: Lockstep, tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = both_opened(rig, tls, *rig.large_pair(), codec=codecs.Lines)
    records: list[int] = []
    write = TLSEngine.write

    def spy(self: TLSEngine, chunk: bytes) -> int | Want:
        records.append(len(chunk))
        return write(self, chunk)

    monkeypatch.setattr(TLSEngine, "write", spy)
    batches: list[int] = []
    hand_over = rig.bridges[1]._coordinator.hand_over
    rig.bridges[1]._workers[0]._hand_over = lambda words: (batches.append(len(words)), hand_over(words))[1]
    lines = [f"line {number}" for number in range(1000)]
    for line in lines:
        client.send(line)
    rig.settle()
    first, *others = (len(line) + 1 for line in lines)
    assert records == [first, sum(others)]
    assert batches == [1, 1]
    assert list(received(server)) == lines


def test_fact_17_memory_is_small_because_idle_sessions_keep_no_buffers(tls: Contexts) -> None:
    for context in (tls.server, tls.client):
        assert context.raw.set_mode(0) & SSL.MODE_RELEASE_BUFFERS


# ── 18: what made it fast ──


def test_fact_18_after_a_short_read_the_poll_comes_before_the_next_read(rig: Lockstep, tls: Contexts) -> None:
    client, server = both_opened(rig, tls, *rig.small_pair())
    before = dict(engine_of(client).wants)
    for _ in range(100):
        server.send(b"x" * 64)
        rig.settle()
        assert list(received(client)) == [b"x" * 64]
    assert engine_of(client).wants == before, "not one futile SSL_read in a hundred messages"


def test_fact_18_a_success_is_not_questioned_again(
    rig: Lockstep, tls: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = both_opened(rig, tls, *rig.small_pair())
    questions: list[int] = []
    ask = bridge.connection._get_error
    monkeypatch.setattr(
        bridge.connection, "_get_error", lambda ssl, result: (questions.append(result), ask(ssl, result))[1]
    )
    client.send(b"x" * 64)
    rig.settle()
    assert list(received(server)) == [b"x" * 64]
    assert questions == []
