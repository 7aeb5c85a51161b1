"""A hostile network between OpenSSL and us, as client and as server, on both faces.

What is sent to the peer (`peers.EchoPeer`, OpenSSL's own C functions) comes back, while it changes keys or
renegotiates, through `faultproxy`.  One test runs a row of seeds; each of them says what the network does, and
what is sent.  To replay one: the command that the failure prints.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import faultproxy
import peers
import pytest
from conftest import KeyPair
from faces import FACES, Face
from faultproxy import FaultProxy, Plan
from peers import Background, Checker, EchoPeer, Pattern, PeerFailed
from rig import VERSIONS

import bridge

DEADLINE = 5.0
"""Seconds in which a hostile plan must have come to its typed error."""
PATIENCE = 20.0
LATENCY = 0.05
"""Seconds in which the next honest peer is served, handshake included: the median."""
LATENCY_UNDER_LOAD = 1.0
"""The same in the default run, when the machine has other things to do."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or peers.libssl() is None, reason="needs Linux and a libssl that ctypes can use"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One connection: who is who, what the network does, and what is sent."""

    seed: int
    face: str
    role: str
    """Ours."""
    version: str

    @property
    def plan(self) -> Plan:
        return Plan.make(self.seed)

    @property
    def dice(self) -> random.Random:
        return random.Random(f"traffic {self.seed} {self.face} {self.role} {self.version}")

    @property
    def chunks(self) -> list[int]:
        """The sizes of what is sent.  Ping-pong, each awaited before the next, if the seed is even."""
        dice = self.dice
        if self.ping_pong:
            return [dice.choice((3, 100, 1000, 5000)) for _ in range(24)]
        return [dice.choice((3, 1000, 16384, 30000)) for _ in range(24)]

    @property
    def ping_pong(self) -> bool:
        return self.dice.random() < 0.5

    @property
    def trouble(self) -> dict[str, int]:
        """What the peer does meanwhile, and how often."""
        if self.version == "TLSv1.3":
            return {"update_every": 9_000}
        return {"renegotiate_every": 30_000} if self.role == "client" else {}

    def __str__(self) -> str:
        test = f"tests/test_faults.py::test_faults[{self.face}-{self.role}-{self.version}]"
        return (
            f"{self.plan}, traffic {'ping-pong' if self.ping_pong else 'full duplex'}; replay it by\n"
            f'pytest "{test}" --seed {self.seed}'
        )


@dataclasses.dataclass
class Outcome:
    """How our side saw it."""

    received: int = 0
    error: BaseException | None = None
    """None after a clean end."""
    sending: BaseException | None = None
    """What the thread that sends was told."""


# ── one connection ──


class Bench:
    """A proxy, a peer and our side: for one connection after another."""

    def __init__(self, face: Face, identity: KeyPair, background: Background) -> None:
        self.face, self.identity, self.background = face, identity, background
        self.proxy = FaultProxy()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)

    def __enter__(self) -> Bench:
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()
        self.listener.close()
        self.face.close()

    def sockets(self, case: Case, address: Any) -> tuple[socket.socket, socket.socket]:
        """Ours and the peer's: whoever is the client calls *address*, and the other accepts."""
        caller = socket.create_connection(address, PATIENCE)
        accepted = self.listener.accept()[0]
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return (caller, accepted) if case.role == "client" else (accepted, caller)

    def echo(self, sock: socket.socket, case: Case) -> tuple[int, str | None]:
        """The peer, in a thread of its own: how much it has sent back, and what it failed of."""
        options = {"role": "server" if case.role == "client" else "client", "version": case.version}
        options |= {"certfile": self.identity.certfile, "keyfile": self.identity.keyfile}
        with sock:
            peer = EchoPeer(sock, {**options, **case.trouble})
            try:
                peer.run()
            except (PeerFailed, OSError) as failure:
                return peer.counts["echoed"], str(failure)
            finally:
                peer.free()
            return peer.counts["echoed"], None

    def run(self, case: Case) -> None:
        """One seed: AssertionError if the promise does not hold."""
        plan = case.plan
        address, passages = self.proxy.expect(
            plan, self.listener.getsockname(), ours_calls=case.role == "client"
        )
        ours, theirs = self.sockets(case, address)
        peer = self.background.run(self.echo, theirs, case)
        began = time.monotonic()
        outcome = self.exchange(ours, case, 0.4 if plan.hostile else PATIENCE)
        took = time.monotonic() - began
        if outcome.error is None:
            _, failure = peer.result(PATIENCE)
            assert failure is None or passages[0].harmless, f"the peer failed: {failure}"
        self.proxy.hang_up()
        peer.result(PATIENCE)
        self.judge(case, outcome, passages[0], took)

    def exchange(self, sock: socket.socket, case: Case, patience: float) -> Outcome:
        """Send, receive, and end: all that the application does."""
        outcome = Outcome()
        try:
            session = self.face.begin(sock, case.role, case.version, patience)
        except self.face.cuts as error:
            outcome.error = error
            return outcome
        try:
            (self.ping_pong if case.ping_pong else self.duplex)(session, case, outcome)
        except self.face.cuts as error:
            outcome.error = error
        finally:
            self.face.end(session)
        return outcome

    def ping_pong(self, session: Any, case: Case, outcome: Outcome) -> None:
        pattern, checker, sent = Pattern(case.seed), Checker(Pattern(case.seed)), 0
        for index, size in enumerate(case.chunks):
            if index == 5:
                self.trouble(session, case)
            self.face.send(session, bytes(pattern.at(sent, size)))
            sent += size
            while checker.received < sent:
                data = self.face.recv(session)
                assert data, "an end that nobody has made was taken for a clean one"
                checker.feed(data)
                outcome.received = checker.received
        self.face.send_eof(session)
        data = self.face.recv(session)
        assert data == b"", "more came than was sent"

    def trouble(self, session: Any, case: Case) -> None:
        """Once, in the middle of it."""
        if case.version == "TLSv1.2" and case.role == "server":
            self.face.renegotiate(session)

    def duplex(self, session: Any, case: Case, outcome: Outcome) -> None:
        checker = Checker(Pattern(case.seed))
        writer = self.background.run(self.write, session, case)
        try:
            while data := self.face.recv(session):
                checker.feed(data)
                outcome.received = checker.received
        finally:
            outcome.sending = writer.result(PATIENCE)

    def write(self, session: Any, case: Case) -> BaseException | None:
        pattern, sent = Pattern(case.seed), 0
        try:
            for index, size in enumerate(case.chunks):
                if index == 5:
                    self.trouble(session, case)
                self.face.send(session, bytes(pattern.at(sent, size)))
                sent += size
            self.face.send_eof(session)
        except self.face.cuts as error:
            return error
        return None

    def judge(self, case: Case, outcome: Outcome, passage: faultproxy.Passage, took: float) -> None:
        total = sum(case.chunks)
        if outcome.error is None:
            assert outcome.received == total, f"a clean end after {outcome.received} of {total} bytes"
            assert outcome.sending is None
            if passage.struck:
                assert passage.harmless, f"nobody noticed: {passage.struck}"
            return
        assert case.plan.hostile, f"a benign network ended the session: {outcome.error!r}"
        assert took < DEADLINE, f"it took {took:.1f} s to end in {outcome.error!r}"
        late = isinstance(outcome.error, (TimeoutError, bridge.DeadlineExceeded))
        assert passage.struck or late, f"nothing was done, and yet: {outcome.error!r}"

    def serve_honestly(self, case: Case) -> float:
        """Seconds for the next one, that nobody harms, from TCP to its answer."""
        ours, theirs = self.sockets(case, self.honest_address(case))
        peer = self.background.run(self.echo, theirs, case)
        began = time.monotonic()
        session = self.face.begin(ours, case.role, case.version, PATIENCE)
        self.face.send(session, b"ping")
        assert self.face.recv(session) == b"ping"
        took = time.monotonic() - began
        self.face.send_eof(session)
        assert self.face.recv(session) == b""
        self.face.end(session)
        assert peer.result(PATIENCE) == (4, None)
        return took

    def honest_address(self, case: Case) -> Any:
        return self.listener.getsockname()


# ── the tests ──

ARRANGEMENTS = [
    (face, role, version) for face in FACES for role in ("client", "server") for version in VERSIONS
]
SEEDS = 12
"""Of each arrangement in the default run; no two have the same, and together they go through all plans."""
MANY_SEEDS = int(os.environ.get("BRIDGE_FAULTS", "1000"))
"""Of each arrangement under stress."""
each_arrangement = pytest.mark.parametrize(
    ("face", "role", "version"), ARRANGEMENTS, ids=["-".join(each) for each in ARRANGEMENTS]
)


@pytest.fixture
def bench(
    face: str, server_cert: KeyPair, ca_file: str, background: Background, default_bridge: None
) -> Iterator[Bench]:
    with Bench(FACES[face](server_cert, ca_file), server_cert, background) as made:
        yield made


def run_all(bench: Bench, cases: list[Case]) -> list[float]:
    """Each case, and after each the honest one: how long these took."""
    latencies = []
    for case in cases:
        try:
            bench.run(case)
            latencies.append(bench.serve_honestly(case))
        except BaseException as error:
            raise AssertionError(f"{case}\n{error!r}") from error
    return latencies


def median_of(latencies: list[float]) -> float:
    """In seconds; and said aloud."""
    median = statistics.median(latencies)
    print(f"the next honest peer was served in {median * 1000:.1f} ms (median of {len(latencies)})")
    return median


@each_arrangement
def test_faults(bench: Bench, face: str, role: str, version: str, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    first = SEEDS * ARRANGEMENTS.index((face, role, version))
    seeds = range(first, first + SEEDS) if seed is None else range(seed, seed + 1)
    latencies = run_all(bench, [Case(one, face, role, version) for one in seeds])
    assert median_of(latencies) < LATENCY_UNDER_LOAD


@pytest.mark.stress
@each_arrangement
def test_many_faults(bench: Bench, face: str, role: str, version: str) -> None:
    first = 10_000 + MANY_SEEDS * ARRANGEMENTS.index((face, role, version))
    latencies = run_all(bench, [Case(seed, face, role, version) for seed in range(first, first + MANY_SEEDS)])
    assert median_of(latencies) < LATENCY
