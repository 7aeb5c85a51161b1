"""Peers that flood: how much of a flood is handled in one step, which is how long everybody else has to wait.

Mostly in lockstep, and counted in bytes that are left in the kernel: how fast the machine is does not matter.
"""

from __future__ import annotations

import dataclasses
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any

import pytest
from conftest import KeyPair
from forge import (
    HELLO_REQUEST,
    KEY_UPDATE,
    KEY_UPDATE_REQUESTED,
    NO_RENEGOTIATION,
    TICKET,
    USER_CANCELED,
    Forger,
)
from records import ALERT, APPLICATION_DATA, HANDSHAKE, WARNING, message, record
from rig import (
    PATIENCE,
    Lockstep,
    Raw,
    engine_of,
    is_closed,
    is_open,
    only,
    raw_context,
    received,
)

import bridge
from bridge import transport
from bridge.engine import TLSEngine
from bridge.poll import Want
from bridge.session import Session

RECORDS = 1_000
"""In a flood: many times what one step may handle."""
A_STEP = 6
"""Records without data that one step may handle."""
AT_ONCE = 8
"""Handshakes that one step may let on."""
SHORT = 32
"""Records with next to no data that one step may handle, on the detour."""
CLIENT_HELLO = message(
    1, b"\3\3" + bytes(32) + b"\0" + b"\0\4\xc0\x2b\xc0\x2f" + b"\1\0" + b"\0\5" + b"\xff\1\0\1\0"
)


def unread(sock: socket.socket | None) -> int:
    """Bytes that the kernel holds for whoever reads *sock*."""
    if sock is None:
        return 0
    count: int = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]
    return count


@dataclasses.dataclass
class Flooded:
    """A session of ours, whose peer says what it likes."""

    session: Session
    forger: Forger
    step: Callable[[], object]

    @property
    def sock(self) -> socket.socket | None:
        """Ours, while the session lives."""
        return self.session._channel.transport.sock

    def say(self, *records: bytes) -> None:
        """All of it is in the kernel when this returns."""
        said = b"".join(records)
        before = unread(self.sock)
        assert self.forger.raw.sock.send(said) == len(said)
        assert unread(self.sock) == before + len(said)

    def in_one_step(self) -> int:
        """How many bytes the next step of the session's worker takes."""
        before = unread(self.sock)
        self.step()
        return before - unread(self.sock)


def flooded(rig: Lockstep, version: str, near: socket.socket, far: socket.socket, **options: Any) -> Flooded:
    """A session over *near* with a *context*, and at the *far* end the other side, after the handshake."""
    context, identity = options.pop("context"), options.pop("identity", None)
    session = rig.session(context, near, **options)
    forger = Forger(version, far, identity)
    rig.actors.append(forger.handshake)
    rig.until(lambda: is_open(session) and forger.handshake() is None)
    rig.actors.clear()
    rig.settle()
    forger.take_over()
    return Flooded(session, forger, rig.bridges[-1]._workers[0].step)


@pytest.fixture
def server(rig: Lockstep, server_cert: KeyPair) -> Callable[..., Flooded]:
    """Makes a server's session whose client floods."""

    def make(version: str, **options: Any) -> Flooded:
        context = bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(version), **options)
        return flooded(rig, version, *rig.large_pair(), context=context)

    return make


@pytest.fixture
def client(rig: Lockstep, server_cert: KeyPair, ca_file: str) -> Callable[..., Flooded]:
    """Makes a client's session whose server floods."""

    def make(version: str, **options: Any) -> Flooded:
        context = bridge.client_context(ca_file, **only(version), **options)
        return flooded(rig, version, *rig.large_pair(), context=context, identity=server_cert)

    return make


Makers = dict[str, Callable[..., Flooded]]


@pytest.fixture
def makers(server: Callable[..., Flooded], client: Callable[..., Flooded]) -> Makers:
    return {"server": server, "client": client}


FLOODS = {
    "server-key-updates": ("server", "TLSv1.3", KEY_UPDATE, {}),
    "server-key-updates-requested": ("server", "TLSv1.3", KEY_UPDATE_REQUESTED, {}),
    "client-key-updates": ("client", "TLSv1.3", KEY_UPDATE, {}),
    "client-key-updates-requested": ("client", "TLSv1.3", KEY_UPDATE_REQUESTED, {}),
    "client-tickets": ("client", "TLSv1.3", TICKET, {}),
    "client-requests-refused": ("client", "TLSv1.2", HELLO_REQUEST, {"renegotiation": False}),
    "client-requests-followed": ("client", "TLSv1.2", HELLO_REQUEST, {}),
    "server-hellos": ("server", "TLSv1.2", CLIENT_HELLO, {"renegotiation": True}),
    "server-hellos-refused": ("server", "TLSv1.2", CLIENT_HELLO, {}),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_step_takes_a_few_records_of_a_flood_and_all_of_it_is_taken_in_the_end(
    name: str, makers: Makers, rig: Lockstep
) -> None:
    side, version, said, options = FLOODS[name]
    victim = makers[side](version, **options)
    records = [victim.forger.seal(HANDSHAKE, said) for _ in range(RECORDS)]
    victim.say(*records)
    taken = [victim.in_one_step() for _ in range(10)]
    assert max(taken) <= A_STEP * max(map(len, records)), taken
    if victim.session.end is None and not name.startswith("server-hellos"):
        assert min(taken) >= len(records[0]), "and every step takes some"
    rig.until(lambda: unread(victim.sock) == 0)
    if not name.startswith(
        ("client-requests-followed", "server-hellos")
    ):  # they wait for an end of the handshake
        victim.say(victim.forger.seal(APPLICATION_DATA, b"data"))
        rig.until(lambda: not victim.session.inbox.empty())
        assert list(received(victim.session)) == [b"data"]


@pytest.mark.parametrize("side", ["server", "client"])
def test_data_in_a_flood_arrives_record_by_record(side: str, makers: Makers, rig: Lockstep) -> None:
    victim = makers[side]("TLSv1.3")
    seal = victim.forger.seal
    said = []
    for number in range(200):
        said += [seal(HANDSHAKE, KEY_UPDATE) for _ in range(number % 9)]
        said.append(seal(APPLICATION_DATA, b"%d," % number))
    victim.say(*said)
    most = (A_STEP + 1) * max(map(len, said))
    got = b""
    while unread(victim.sock):
        assert victim.in_one_step() <= most
        rig.round()
        got += b"".join(received(victim.session))
    rig.settle()
    got += b"".join(received(victim.session))
    assert got == b"".join(b"%d," % number for number in range(200))


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_detour_has_its_bounds_too(side: str, makers: Makers, rig: Lockstep) -> None:
    """A peer that does not read makes us write into memory, and then floods: with nothing, and with next to nothing."""
    victim = makers[side]("TLSv1.3")
    victim.session.send(bytes(128 * 1024))
    while not engine_of(victim.session).on_detour:
        victim.session.send(bytes(16 * 1024), timeout=1)
        rig.settle()
    seal = victim.forger.seal
    updates = [seal(HANDSHAKE, KEY_UPDATE) for _ in range(RECORDS)]
    victim.say(*updates)
    taken = [victim.in_one_step() for _ in range(10)]
    assert 0 < max(taken) <= A_STEP * len(updates[0]), taken
    rig.until(lambda: unread(victim.sock) == 0)
    bytewise = [seal(APPLICATION_DATA, b"x") for _ in range(RECORDS)]
    victim.say(*bytewise)
    taken = [victim.in_one_step() for _ in range(10)]
    assert 0 < max(taken) <= (SHORT + A_STEP) * len(bytewise[0]), taken
    assert engine_of(victim.session).on_detour
    rig.until(lambda: unread(victim.sock) == 0)
    rig.settle()
    assert b"".join(received(victim.session)) == b"x" * RECORDS


def test_a_request_in_two_pieces_is_met_on_the_detour_too(client: Callable[..., Flooded]) -> None:
    victim = client("TLSv1.2")
    first, *others = [victim.forger.seal(HANDSHAKE, HELLO_REQUEST) for _ in range(RECORDS)]
    victim.say(first[:3])
    assert victim.in_one_step() == 3
    victim.say(first[3:], *others)
    assert 0 < victim.in_one_step() <= A_STEP * len(first)


@pytest.mark.parametrize("kind", ["alerts", "no-renegotiation", "empty"])
def test_what_openssl_bounds_itself_ends_the_session_and_does_so_at_once(
    kind: str, side_and_version: tuple[str, str], makers: Makers, rig: Lockstep
) -> None:
    side, version = side_and_version
    victim = makers[side](version)
    content, said = {
        "alerts": (ALERT, bytes([WARNING, USER_CANCELED])),
        "no-renegotiation": (ALERT, bytes([WARNING, NO_RENEGOTIATION])),
        "empty": (APPLICATION_DATA, b""),
    }[kind]
    records = [victim.forger.seal(content, said) for _ in range(RECORDS)]
    victim.say(*records)
    victim.step()
    rig.until(lambda: is_closed(victim.session))
    assert isinstance(victim.session.end, bridge.TLSError)


@pytest.fixture(params=["server", "client"])
def side_and_version(request: pytest.FixtureRequest, tls_version: str) -> tuple[str, str]:
    return request.param, tls_version


def test_several_messages_in_one_record_are_all_taken(client: Callable[..., Flooded], rig: Lockstep) -> None:
    victim = client("TLSv1.3")
    victim.say(victim.forger.seal(HANDSHAKE, TICKET * 3 + KEY_UPDATE_REQUESTED))
    rig.settle()
    peer = victim.forger.raw
    assert peer.read_all() == b"", "and the request is answered: OpenSSL reads our new keys"
    victim.session.send(b"under new keys")
    rig.settle()
    assert peer.read_all() == b"under new keys"


def test_requests_for_a_handshake_in_the_middle_of_a_first_one(
    rig: Lockstep, ca_file: str, tls_version: str
) -> None:
    """They are skipped inside of one call, for as long as there are any."""
    near, far = rig.large_pair()
    session = rig.session(bridge.client_context(ca_file, **only(tls_version)), near)
    rig.until(lambda: unread(far) > 0)
    request = record(HANDSHAKE, HELLO_REQUEST)
    assert far.send(request * RECORDS) == len(request) * RECORDS
    step = rig.bridges[0]._workers[0].step

    def ours() -> socket.socket | None:
        return session._channel.transport.sock

    for _ in range(10):
        before = unread(ours())
        step()
        assert 0 < before - unread(ours()) <= A_STEP * len(request)
    session.abort()
    rig.until(lambda: is_closed(session))


HALF, HONEST = 200, 100
"""A crowd: clients that say half of a hello and no more, and behind them those that mean it."""


def test_a_session_does_not_wait_for_a_crowd_that_shakes_hands_and_all_of_the_crowd_have_their_turns(
    rig: Lockstep, tls_version: str, server_cert: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(tls_version))
    host, client_context = rig.bridge(), raw_context(tls_version)

    def client() -> tuple[Session, Raw]:
        near, far = rig.large_pair()
        session = host.adopt(near, context, wait=False)
        rig.sessions.append(session)
        return session, Raw(client_context, far, server_side=False)

    session, guest = client()
    rig.until(lambda: guest.handshake() is None and is_open(session))
    assert guest.read() is Want.READ, "tickets"
    for _ in range(HALF):
        client()[1].sock.send(record(HANDSHAKE, bytes(64), size=128))
    left = [client() for _ in range(HONEST)]
    calls = 0
    handshake = TLSEngine.handshake

    def count(engine: TLSEngine) -> Want | None:
        nonlocal calls
        calls += 1
        return handshake(engine)

    monkeypatch.setattr(TLSEngine, "handshake", count)
    worker, coordinator = host._workers[0], host._coordinator
    steps = called = 0
    while left := [one for one in left if one[1].handshake() is not None or not is_open(one[0])]:
        guest.write(b"%d" % steps)
        worker.step()
        coordinator.step()
        assert list(received(session)) == [b"%d" % steps], "in the very next step"
        assert calls - called <= AT_ONCE
        called, steps = calls, steps + 1
    assert calls == HALF + 2 * HONEST and steps <= calls // AT_ONCE + 3
    assert worker.step() is worker.step(0.01) is False, "and then the worker sleeps, whatever the others want"


def test_a_late_swallow_of_a_failed_session_is_bounded(
    server: Callable[..., Flooded], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = server("TLSv1.3")
    victim.say(record(HANDSHAKE, b"no TLS"))
    victim.step()
    assert victim.sock is not None, "it lingers"
    monkeypatch.setattr(transport, "READ_BUDGET", 1_000)
    victim.say(bytes(5_000))
    assert victim.in_one_step() == 1_000


def test_a_polite_close_ends_in_time_under_a_flood(server: Callable[..., Flooded], rig: Lockstep) -> None:
    victim = server("TLSv1.3")
    flood = [victim.forger.seal(HANDSHAKE, KEY_UPDATE) for _ in range(RECORDS)]
    victim.say(*flood)
    victim.session._coordinator.close(victim.session._channel, 0.01)
    rig.until(lambda: is_closed(victim.session))


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_a_read_of_a_stream_keeps_its_timeout_under_a_flood(
    timeout: float, ca_file: str, server_cert: KeyPair, background: Any
) -> None:
    near, far = socket.socketpair()
    with bridge.Bridge(workers=1) as one, near, far:
        stream = one.stream(
            near, bridge.client_context(ca_file, **only("TLSv1.3")), server_hostname="localhost"
        )
        forger = Forger("TLSv1.3", far, server_cert)
        shaken = background.run(stream.handshake, PATIENCE)
        far.setblocking(True)
        assert forger.handshake() is None
        shaken.result(PATIENCE)
        with pytest.raises(bridge.WouldBlock):
            stream.read(1, 0)  # OpenSSL's own tickets
        forger.take_over()
        ours = stream._transport.sock
        records = [forger.seal(HANDSHAKE, KEY_UPDATE) for _ in range(RECORDS)]
        far.sendall(b"".join(records))
        if timeout == 0:
            with pytest.raises(bridge.WouldBlock):
                stream.read(1, 0)
            assert unread(ours) >= len(records[0]) * (RECORDS - 4 * A_STEP)
        else:
            more = b"".join(forger.seal(HANDSHAKE, KEY_UPDATE) for _ in range(20 * RECORDS))
            background.run(far.sendall, more)  # until the end of the session
            with pytest.raises(bridge.OperationTimeout):
                stream.read(1, timeout)
            assert unread(ours) > 0
        stream.abort()
