"""Full duplex from any thread, while the peer changes keys and renegotiates in the middle of it.

The peer is OpenSSL: through its C functions (`peers.EchoPeer`, in a process of its own), and, as a witness that
nobody here has written, the programs s_server(1) and s_client(1).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import peers
import pytest
from conftest import KeyPair
from peers import PATIENCE, Background, Checker, Pattern, Program, high, program

import bridge
from bridge import codecs

MEGABYTE = 1_000_000
BULK = int(os.environ.get("BRIDGE_DUPLEX_MB", "250")) * MEGABYTE
"""Bytes each way in the bulk tests."""
UPDATE_EVERY = 1 << 16
RENEGOTIATE_EVERY = 1 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or peers.libssl() is None, reason="needs Linux and a libssl that ctypes can use"
)


@pytest.fixture
def ours() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=2) as made:
        yield made


@pytest.fixture
def identity(server_cert: KeyPair) -> dict[str, Any]:
    return {"certfile": server_cert.certfile, "keyfile": server_cert.keyfile}


Trouble = dict[str, Any]
KEY_UPDATES: Trouble = {"version": "TLSv1.3", "update_every": UPDATE_EVERY}
RENEGOTIATIONS: Trouble = {"version": "TLSv1.2", "renegotiate_every": RENEGOTIATE_EVERY}
each_trouble = pytest.mark.parametrize(
    "trouble",
    [pytest.param(KEY_UPDATES, id="key-updates"), pytest.param(RENEGOTIATIONS, id="renegotiations")],
)


# ── hundreds of megabytes ──


class Died(Exception):
    """The client under test did not bring all bytes there and back."""


def our_client(port: int, total: int, ca_file: str, background: Background) -> None:
    """One thread that writes and one that reads, on a session of ours."""
    pattern, checker = Pattern(), Checker(Pattern())

    def write() -> None:
        for position in range(0, total, 1 << 16):
            session.send(bytes(pattern.at(position, min(1 << 16, total - position))), PATIENCE)

    with bridge.Bridge(workers=1) as made:
        session = made.connect(
            ("127.0.0.1", port), bridge.client_context(ca_file), server_hostname="localhost"
        )
        writer = background.run(write)
        while checker.received < total:
            checker.feed(session.recv(PATIENCE))
        writer.result(PATIENCE)
        assert session.close()


def raw_client(port: int, total: int, ca_file: str, background: Background) -> None:
    """The same with pyOpenSSL alone, in a process of its own: nobody knows how it ends."""
    run_client("raw", port=port, total=total)


def drop_in(port: int, total: int, ca_file: str, background: Background) -> None:
    """The same with an SSLSocket, of `bridge.ssl`."""
    run_client("sockets", 10 * PATIENCE, module="bridge.ssl", port=port, total=total, cafile=ca_file)


def run_client(name: str, patience: float = PATIENCE, **options: Any) -> None:
    with program(name, **options) as client:
        try:
            said = client.finish(patience)
        except subprocess.TimeoutExpired as error:
            raise Died("its threads wait for each other") from error
    if client.status != 0:
        raise Died(f"the program ended with status {client.status}: {said}")
    result = json.loads(said.splitlines()[-1])
    if result["errors"]:
        raise Died(result)


not_made_for_it = pytest.mark.xfail(
    raises=Died, strict=True, reason="OpenSSL is not made for a reader and a writer thread"
)


@pytest.mark.timeout(240)  # it computes all the time, and shares the machine with others
@each_trouble
@pytest.mark.parametrize(
    "client",
    [
        pytest.param(our_client, id="ours"),
        pytest.param(drop_in, id="drop-in"),
        pytest.param(raw_client, id="raw-pyopenssl", marks=not_made_for_it),
    ],
)
def test_hundreds_of_megabytes_both_ways(
    client: Callable[..., None],
    trouble: Trouble,
    identity: dict[str, Any],
    ca_file: str,
    background: Background,
) -> None:
    with program("echo", role="server", **trouble, **identity) as peer:
        client(peer.port(), BULK, ca_file, background)
        result = peer.result()
    assert result["error"] is None
    assert result["echoed"] == BULK
    assert result["updates"] + result["renegotiations"] >= BULK // RENEGOTIATE_EVERY // 12


@pytest.mark.timeout(240)
@pytest.mark.xfail(
    raises=Died, strict=False, reason="the stdlib's sockets neither, though they may get through"
)
def test_hundreds_of_megabytes_both_ways_with_the_stdlib(identity: dict[str, Any], ca_file: str) -> None:
    """While keys are updated; while the peer renegotiates it just hangs."""
    with program("echo", role="server", **KEY_UPDATES, **identity) as peer:
        run_client("sockets", module="ssl", port=peer.port(), total=BULK, cafile=ca_file)


# ── any number of senders and receivers ──


class Messages:
    """Messages that say who sent them and as which, and that can be checked; and which of them have come."""

    def __init__(self, senders: int, count: int) -> None:
        self._pattern = Pattern(1)
        self.expected = {(sender, number) for sender in range(senders) for number in range(count)}
        self.received: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def make(self, sender: int, number: int) -> bytes:
        """From 12 bytes to 40 KB: within one record, over several, and many in one."""
        size = (sender * 7919 + number * 104_729) % 997
        body = sender.to_bytes(4, "big") + number.to_bytes(4, "big")
        body += self._pattern.at(sender * 1000 + number, size * (40 if number % 10 == 0 else 1))
        return body + zlib.crc32(body).to_bytes(4, "big")

    def take(self, message: bytes) -> None:
        """Check *message*, and note it."""
        key = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
        assert message == self.make(*key), f"message {key} is not as it was sent"
        with self._lock:
            self.received.append(key)

    def all_came(self) -> bool:
        return len(self.received) >= len(self.expected)

    def each_came_once(self) -> bool:
        return len(self.received) == len(self.expected) and set(self.received) == self.expected

    def in_order_of_each_sender(self) -> bool:
        return all(
            [number for one, number in self.received if one == sender]
            == sorted(number for one, number in self.received if one == sender)
            for sender in {sender for sender, _ in self.expected}
        )


def send_all(session: bridge.Session, messages: Messages, sender: int) -> None:
    for number in sorted(number for one, number in messages.expected if one == sender):
        session.send(messages.make(sender, number), PATIENCE)


def receive(session: bridge.Session, messages: Messages) -> None:
    """One of several receivers.  Whoever takes the last message closes the session, which ends the others."""
    with contextlib.suppress(bridge.SessionClosed):
        while True:
            messages.take(session.recv(PATIENCE))
            if messages.all_came():
                session.close()


def trouble_maker(
    ours: bridge.Bridge, role: str, trouble: Trouble, identity: dict[str, Any], ca_file: str, codec: Any
) -> tuple[Program, bridge.Session]:
    """An echo that makes *trouble*, as client or as server, and our session with it."""
    if role == "server":
        peer = program("echo", role="server", **trouble, **identity)
        address = ("127.0.0.1", peer.port())
        return peer, ours.connect(
            address, bridge.client_context(ca_file), server_hostname="localhost", codec=codec
        )
    context = bridge.server_context(**identity, renegotiation=True)
    with ours.listen(("127.0.0.1", 0), context, codec=codec) as listener:
        peer = program("echo", role="client", port=listener.address[1], **trouble)
        return peer, listener.accept(PATIENCE)


@pytest.mark.parametrize(
    ("role", "trouble"),
    [
        pytest.param("server", KEY_UPDATES, id="server-key-updates"),
        pytest.param("client", KEY_UPDATES, id="client-key-updates"),
        pytest.param("server", RENEGOTIATIONS, id="server-renegotiations"),
    ],
)
@pytest.mark.parametrize("receivers", [1, 3])
def test_many_senders_and_receivers_on_one_session(
    receivers: int,
    role: str,
    trouble: Trouble,
    ours: bridge.Bridge,
    identity: dict[str, Any],
    ca_file: str,
    background: Background,
) -> None:
    messages = Messages(senders=4, count=1500)
    often = {key: value // 8 if isinstance(value, int) else value for key, value in trouble.items()}
    peer, session = trouble_maker(ours, role, often, identity, ca_file, codecs.LengthPrefixed)
    with peer, session:
        takers = [background.run(receive, session, messages) for _ in range(receivers)]
        for sender in [background.run(send_all, session, messages, sender) for sender in range(4)]:
            sender.result(PATIENCE)
        for taker in takers:
            taker.result(PATIENCE)
        result = peer.result()
    assert messages.each_came_once()
    assert receivers > 1 or messages.in_order_of_each_sender()
    assert result["error"] is None
    assert result["updates"] + result["renegotiations"] > 10


@pytest.mark.parametrize("who", ["openssl", "ours"])
def test_we_renegotiate_under_load(
    who: str, ours: bridge.Bridge, identity: dict[str, Any], ca_file: str, background: Background
) -> None:
    """Our server does, while both sides send as fast as they can."""
    messages, done = Messages(senders=4, count=1500), threading.Event()
    version = {"version": "TLSv1.2"}
    peer: Program | bridge.Session
    if who == "openssl":
        peer, session = trouble_maker(ours, "client", version, identity, ca_file, codecs.LengthPrefixed)
    else:
        peer, session = our_echo(ours, identity, ca_file, background)

    def renegotiate() -> int:
        count = 0
        while not done.wait(0.005):
            session.renegotiate()
            count += 1
        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(peer)
        stack.enter_context(session)
        stack.callback(done.set)
        asked = background.run(renegotiate)
        taker = background.run(receive_everything, session, messages)
        for sender in [background.run(send_all, session, messages, sender) for sender in range(4)]:
            sender.result(PATIENCE)
        taker.result(PATIENCE)
        done.set()
        assert asked.result(PATIENCE) > 10
        assert session.close()
    assert messages.each_came_once()
    assert messages.in_order_of_each_sender()


def receive_everything(session: bridge.Session, messages: Messages) -> None:
    while not messages.all_came():
        messages.take(session.recv(PATIENCE))


def our_echo(
    ours: bridge.Bridge, identity: dict[str, Any], ca_file: str, background: Background
) -> tuple[bridge.Session, bridge.Session]:
    """A client session of ours that sends back what it receives, and the server's session with it."""
    context = bridge.server_context(**identity, renegotiation=True, maximum_version="TLSv1.2")

    def echo() -> None:
        with client:
            for message in client:
                client.send(message, PATIENCE)

    with ours.listen(("127.0.0.1", 0), context, codec=codecs.LengthPrefixed) as listener:
        client = ours.connect(
            listener.address,
            bridge.client_context(ca_file),
            server_hostname="localhost",
            codec=codecs.LengthPrefixed,
        )
        background.run(echo)
        return client, listener.accept(PATIENCE)


# ── openssl(1) as a witness ──

PIECE = 1 << 13


def feed(peer: Program, position: int, total: int, command: bytes, every: int) -> None:
    """Have *peer* send *total* bytes of the pattern, and obey *command* before every so many pieces."""
    pattern = Pattern(2)
    for number, start in enumerate(range(position, position + total, PIECE)):
        if command and number % every == 0:
            peer.put(command)
        peer.put(high(bytes(pattern.at(start, PIECE))))


def send_high(session: bridge.Session, total: int) -> None:
    pattern = Pattern(3)
    for start in range(0, total, PIECE):
        session.send(high(bytes(pattern.at(start, PIECE))), PATIENCE)


def expect_high(data: bytes, seed: int) -> None:
    pattern = Pattern(seed)
    for start in range(0, len(data), PIECE):
        expected = high(bytes(pattern.at(start, PIECE)))
        assert data[start : start + PIECE] == expected, f"wrong between {start} and {start + PIECE}"


def receive_exactly(session: bridge.Session, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += session.recv(PATIENCE)
    assert len(received) == size
    return bytes(received)


def both_ways(
    session: bridge.Session, peer: Program, total: int, command: bytes, background: Background
) -> None:
    """*total* bytes each way at the same time, *command* in between, every byte checked."""
    jobs = [
        background.run(feed, peer, 0, total, command, 8),
        background.run(send_high, session, total),
        background.run(lambda: expect_high(peer.take(total), 3)),
    ]
    expect_high(receive_exactly(session, total), 2)
    for job in jobs:
        job.result(PATIENCE)


def s_server(openssl: str, version: str, identity: dict[str, Any], *more: str) -> Program:
    flag = "-" + version.lower().replace("v", "").replace(".", "_")
    own = ("-cert", identity["certfile"], "-key", identity["keyfile"])
    return Program(openssl, "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", flag, *own, *more)


def s_client(openssl: str, version: str, port: int, ca_file: str, *more: str) -> Program:
    flag = "-" + version.lower().replace("v", "").replace(".", "_")
    trust = ("-CAfile", ca_file, "-verify_return_error", "-verify_hostname", "localhost")
    return Program(
        openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", flag, *trust, *more
    )


WITNESS = 64 * 16 * PIECE


@pytest.mark.parametrize(
    ("version", "command"), [("TLSv1.3", b"K\n"), ("TLSv1.3", b"k\n"), ("TLSv1.2", b"r\n")]
)
def test_s_server_changes_keys_under_load(
    version: str,
    command: bytes,
    openssl: str,
    ours: bridge.Bridge,
    identity: dict[str, Any],
    ca_file: str,
    background: Background,
) -> None:
    with s_server(openssl, version, identity) as peer:
        address = ("127.0.0.1", peer.port())
        with ours.connect(address, bridge.client_context(ca_file), server_hostname="localhost") as session:
            both_ways(session, peer, WITNESS, command, background)
            assert session.close()
        assert peer.finish().count("SSL_do_handshake -> 1") == WITNESS // PIECE // 8


def test_s_client_changes_keys_under_load(
    openssl: str, ours: bridge.Bridge, identity: dict[str, Any], ca_file: str, background: Background
) -> None:
    with (
        ours.listen(("127.0.0.1", 0), bridge.server_context(**identity)) as listener,
        s_client(openssl, "TLSv1.3", listener.address[1], ca_file) as peer,
        listener.accept(PATIENCE) as session,
    ):
        both_ways(session, peer, WITNESS, b"K\n", background)
        assert session.close()
        assert peer.finish().count("KEYUPDATE") == WITNESS // PIECE // 8


def test_we_renegotiate_with_s_client(
    openssl: str, ours: bridge.Bridge, identity: dict[str, Any], ca_file: str
) -> None:
    """While it only receives: s_client(1) that sends meanwhile fails by itself, or falls asleep for ever since its
    SSL_read swallowed what its SSL_write waits for.  (For both ways at once there is the echo, above.)

    To ask while a handshake is under way changes nothing.  In a resumed one s_client says last that it is finished:
    what we send then leaves when we have heard of it."""
    context, finished = bridge.server_context(**identity, renegotiation=True), "SSLv3/TLS read finished"
    with (
        ours.listen(("127.0.0.1", 0), context) as listener,
        s_client(openssl, "TLSv1.2", listener.address[1], ca_file, "-state") as peer,
        listener.accept(PATIENCE) as session,
    ):
        for handshakes in range(2, 22):
            session.renegotiate()
            send_high(session, 32 * PIECE)
            expect_high(peer.take(32 * PIECE), 3)
            peer.wait_until_said(finished, handshakes)
            send_high(session, PIECE)
            expect_high(peer.take(PIECE), 3)
        assert session.close()
        assert peer.finish().count(finished) == 21


def test_s_client_may_not_renegotiate(
    openssl: str, ours: bridge.Bridge, identity: dict[str, Any], ca_file: str
) -> None:
    with (
        ours.listen(("127.0.0.1", 0), bridge.server_context(**identity, renegotiation=True)) as listener,
        s_client(openssl, "TLSv1.2", listener.address[1], ca_file) as peer,
        listener.accept(PATIENCE) as session,
    ):
        peer.put(b"R\n")
        with pytest.raises(bridge.SessionEnded) as caught:
            session.recv(PATIENCE)
        assert "no renegotiation" in peer.finish()
        assert isinstance(caught.value, bridge.TLSError)


# ── the end in the middle of it ──


def test_what_was_on_its_way_arrives_after_our_half_close(
    ours: bridge.Bridge, identity: dict[str, Any], ca_file: str, background: Background
) -> None:
    """RFC 8446, 6.1: after our close_notify we say nothing more, so nothing of ours can make the peer's kernel
    reset a connection that still holds its last bytes; not even the answer to a KeyUpdate."""
    total, pattern, checker = 20 * MEGABYTE, Pattern(), Checker(Pattern())
    peer, session = trouble_maker(ours, "server", KEY_UPDATES, identity, ca_file, codecs.Raw)

    def write() -> None:
        for position in range(0, total, MEGABYTE):
            session.send(bytes(pattern.at(position, MEGABYTE)), PATIENCE)
        session.send_eof()

    with peer, session:
        writer = background.run(write)
        for data in session:
            checker.feed(data)
        writer.result(PATIENCE)
        assert peer.result()["error"] is None
    assert checker.received == total


@each_trouble
def test_close_from_another_thread_in_the_middle_of_it(
    trouble: Trouble, ours: bridge.Bridge, identity: dict[str, Any], ca_file: str, background: Background
) -> None:
    """Every call ends with SessionClosed, every message that `send` took arrives, and no part of any other."""
    messages, enough = Messages(senders=4, count=100_000), threading.Event()
    peer, session = trouble_maker(ours, "server", trouble, identity, ca_file, codecs.LengthPrefixed)

    def send(sender: int) -> int:
        accepted = 0
        with contextlib.suppress(bridge.SessionClosed):
            for number in range(100_000):
                message = messages.make(sender, number)
                session.send(message, PATIENCE)
                accepted += 4 + len(message)
        return accepted

    def receive_some() -> None:
        with contextlib.suppress(bridge.SessionClosed):
            while True:
                messages.take(session.recv(PATIENCE))
                if len(messages.received) > 500:
                    enough.set()

    with peer, session:
        senders = [background.run(send, sender) for sender in range(4)]
        receivers = [background.run(receive_some) for _ in range(3)]
        assert enough.wait(PATIENCE)
        assert background.run(session.close).result(PATIENCE)
        accepted = sum(sender.result(1) for sender in senders)
        for receiver in receivers:
            receiver.result(1)
        result = peer.result()
    assert len(set(messages.received)) == len(messages.received)
    assert result["error"] is None
    assert result["echoed"] == accepted


BY_CLOSE = (bridge.SessionClosed, bridge.CloseTimeout)  # the latter for who waits for bytes to leave


@pytest.mark.parametrize(
    ("end", "errors"),
    [
        pytest.param(lambda ours, session: session.close(0.2), BY_CLOSE, id="close"),
        pytest.param(lambda ours, session: ours.close(0.2), BY_CLOSE, id="bridge-close"),
        pytest.param(lambda ours, session: session.abort(), bridge.SessionAborted, id="abort"),
    ],
)
def test_the_end_wakes_everybody_who_waits(
    end: Callable[[bridge.Bridge, bridge.Session], Any],
    errors: Any,
    ours: bridge.Bridge,
    tls_version: str,
    identity: dict[str, Any],
    ca_file: str,
    background: Background,
) -> None:
    """The peer neither reads nor writes, so senders, receivers and a flush all wait, until a third thread ends it."""
    over, begun = threading.Event(), threading.Barrier(8)
    context = peers.stdlib_context(True, tls_version, **identity)
    address, [mute] = background.serve_tls(context, lambda sock: over.wait(PATIENCE))
    session = ours.connect(address, bridge.client_context(ca_file), server_hostname="localhost")
    with contextlib.suppress(bridge.SendTimeout):
        while True:
            session.send(bytes(1 << 20), 0.2)

    def wait_in(call: Callable[..., Any], *arguments: Any) -> Exception:
        begun.wait(PATIENCE)
        with pytest.raises(bridge.SessionEnded) as caught:
            call(*arguments)
        return caught.value

    waiting = [background.run(wait_in, session.send, bytes(1 << 20), PATIENCE) for _ in range(3)]
    waiting += [background.run(wait_in, session.recv, PATIENCE) for _ in range(3)]
    waiting += [background.run(wait_in, session.flush, PATIENCE)]
    begun.wait(PATIENCE)
    try:
        end(ours, session)
        for one in waiting:
            assert isinstance(one.result(5), errors)
        assert not session.close()
    finally:
        over.set()
    mute.result(PATIENCE)
