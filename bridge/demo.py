"""The main job, live: many threads on both ends of real TLS sessions, and every byte checked.

Each link is a client's session and the server's session it talks to, over TCP on the loopback interface.
On both ends several threads send and several receive at the same time.  A message carries its sender, its
sequence number, and bytes that follow from these and a seed, so a receiver knows what must come.  Some links
have tiny socket buffers, so that writes have to wait; on the TLS 1.2 links the server demands new handshakes
all the while.

This module works and judges; `bridge.cli` shows.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import itertools
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import bridge

VERSIONS = {"1.2": ("TLSv1.2",), "1.3": ("TLSv1.3",), "both": ("TLSv1.2", "TLSv1.3")}
CODEC = bridge.codecs.LengthPrefixed
SENDERS = 2
RECEIVERS = 2
WORKERS = 2
TINY_BUFFER = 16 * 1024
"""Bytes of a tiny socket buffer: one record does not fit, so SSL_write has to stop in the middle of it."""
PATIENCE = 30.0
"""Seconds without a message, or without room for one, that count as a fault."""
NEW_KEYS_EVERY = 0.05
"""Seconds between two renegotiations; each time it is the next TLS 1.2 link's turn."""
MOST_FAULTS = 20

_HEADER = struct.Struct(">HI")
_SIZES = (16, 100, 100, 1000, 1000, 4000, 16_000, 60_000)
_BLOCK = 1 << 20


class Pattern:
    """The messages: which bytes message *sequence* of *sender* has, by *seed*.  Any thread."""

    def __init__(self, seed: int) -> None:
        self._block = random.Random(seed).randbytes(_BLOCK)

    def message(self, sender: int, sequence: int) -> bytes:
        """The message as it must arrive."""
        mixed = ((sender + 1) * 0x9E3779B1 + (sequence + 1) * 0x85EBCA6B) % 2**32
        offset = mixed % (_BLOCK - max(_SIZES))
        return (
            _HEADER.pack(sender, sequence) + self._block[offset : offset + _SIZES[mixed >> 29] - _HEADER.size]
        )


class Judge:
    """What one receiving thread was given, and what was wrong with it.  Belongs to that thread.

    Of each sender a receiver must see ascending sequence numbers.  Not all of them: others receive from the
    same session, and only `compare` can say whether every message came to exactly one.
    """

    def __init__(self, pattern: Pattern, where: str, senders: Iterable[int]) -> None:
        self._pattern = pattern
        self._where = where
        self.received: dict[int, list[int]] = {sender: [] for sender in senders}
        self.messages = 0
        self.bytes = 0
        self.faults: list[str] = []

    def check(self, message: bytes) -> None:
        """Take *message* into account."""
        self.messages += 1
        self.bytes += len(message)
        if len(message) < _HEADER.size:
            return self._fault(f"a message of {len(message)} bytes, too short to be one")
        sender, sequence = _HEADER.unpack_from(message)
        if sender not in self.received:
            return self._fault(f"a message of sender {sender}, which does not send here")
        before = self.received[sender]
        if before and sequence <= before[-1]:
            self._fault(f"message {sequence} of sender {sender} came after its message {before[-1]}")
        before.append(sequence)
        expected = self._pattern.message(sender, sequence)
        if message != expected:
            self._fault(f"message {sequence} of sender {sender}: {_difference(message, expected)}")

    def failed(self, error: BaseException) -> None:
        """The thread was given an exception where there should be none."""
        self._fault(f"a receiver got {type(error).__name__}: {error}")

    def _fault(self, what: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(f"{self._where}: {what}")


def _difference(message: bytes, expected: bytes) -> str:
    if len(message) != len(expected):
        return f"{len(message)} bytes instead of {len(expected)}"
    position = next(i for i, (a, b) in enumerate(zip(message, expected, strict=True)) if a != b)
    return f"byte {position} is {message[position]:#04x} instead of {expected[position]:#04x}"


def compare(where: str, judges: Iterable[Judge], sent: dict[int, int]) -> list[str]:
    """All faults of one direction, when its threads have ended: what the *judges* noted, and what is missing.

    *sent*: how many messages each sender sent.
    """
    judges = list(judges)
    faults = [fault for judge in judges for fault in judge.faults]
    for sender, count in sent.items():
        came = sorted(itertools.chain.from_iterable(judge.received.get(sender, []) for judge in judges))
        missing = sorted(set(range(count)).difference(came))
        if missing:
            faults.append(
                f"{where}: {len(missing)} of {count} messages of sender {sender} are missing,"
                f" the first is {missing[0]}"
            )
        if len(came) + len(missing) != count:
            faults.append(f"{where}: {len(came) + len(missing) - count} messages of sender {sender} too many")
    return faults[:MOST_FAULTS]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.  *seconds* or *megabytes* (of all links together, both ways) say when senders stop."""

    seconds: float | None = 5.0
    megabytes: float | None = None
    clients: int = 4
    tls: str = "both"
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One direction of a link, as its receivers saw it."""

    messages: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class LinkResult:
    """What became of one link."""

    tls: str
    cipher: str
    tiny_buffers: bool
    resumed: bool
    to_server: Traffic
    to_client: Traffic


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of the job.  It is `ok` if every message came once, in order, and right in every byte."""

    ok: bool
    faults: list[str]
    seed: int
    seconds: float
    links: list[LinkResult]
    wants: dict[str, dict[str, int]]
    """How often OpenSSL answered each call with each want, over all sessions of both ends."""
    wants_seen_by_application: dict[str, int]
    """How many of them came out of `send` or `recv`, as an exception: there must be none."""
    renegotiations_asked_for: int
    renegotiations_done: int
    resumed_handshakes: int
    bridge_threads: int
    application_threads: int
    messages: int
    bytes: int
    bytes_per_second: float


class End:
    """One end of a link: a session, the threads on it, and what they saw."""

    def __init__(self, run: Run, where: str, session: bridge.Session) -> None:
        self.session = session
        self.where = where
        self.senders = [next(run.names) for _ in range(SENDERS)]
        self.sent = dict.fromkeys(self.senders, 0)
        self.judges: list[Judge] = []
        self.errors: list[BaseException] = []
        self._run = run

    def threads(self, peer: End) -> list[threading.Thread]:
        """The threads, not started.  *peer* is the other end."""
        self.judges = [Judge(self._run.pattern, self.where, peer.senders) for _ in range(RECEIVERS)]
        left = itertools.count(1)
        jobs: list[tuple[Callable[..., None], object]] = [(self._receive, judge) for judge in self.judges]
        jobs += [(lambda sender: self._send(sender, left), sender) for sender in self.senders]
        return [
            threading.Thread(target=target, args=(argument,), daemon=True, name=f"demo {self.where}")
            for target, argument in jobs
        ]

    def _send(self, sender: int, left: Iterator[int]) -> None:
        run, session, sent = self._run, self.session, self.sent
        budget = run.budget
        try:
            while not run.stop.is_set() and budget > 0:
                message = run.pattern.message(sender, sent[sender])
                session.send(message, timeout=PATIENCE)
                sent[sender] += 1
                budget -= len(message)
        except Exception as error:
            self.errors.append(error)
        finally:
            if next(left) == SENDERS:
                session.send_eof()

    def _receive(self, judge: Judge) -> None:
        try:
            while True:
                judge.check(self.session.recv(timeout=PATIENCE))
        except bridge.EndOfStream:
            pass
        except Exception as error:
            self.errors.append(error)
            judge.failed(error)

    def traffic(self) -> Traffic:
        """What has been received here so far.  Any thread."""
        return Traffic(sum(j.messages for j in self.judges), sum(j.bytes for j in self.judges))

    def faults(self, peer: End) -> list[str]:
        """What was wrong with what came from *peer*; after all threads have ended."""
        failed = [f"{self.where}: {type(e).__name__}: {e}" for e in self.errors]
        return compare(self.where, self.judges, peer.sent) + failed


@dataclasses.dataclass(frozen=True)
class Link:
    """A client's end and the server's end."""

    tiny: bool
    client: End
    server: End


class Run:
    """The job under way.  Use as a context manager: `wait` until it is done, then take the `result`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pattern = Pattern(plan.seed)
        self.names = itertools.count()
        self.stop = threading.Event()
        share = 2 * SENDERS * plan.clients
        self.budget = float("inf") if plan.megabytes is None else plan.megabytes * 1e6 / share
        self.server = bridge.Bridge(workers=WORKERS)
        self.client = bridge.Bridge(workers=WORKERS)
        self.links: list[Link] = []
        self.asked = 0
        self.seconds = 0.0
        self._handshakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._done = threading.Event()
        self._started = 0.0
        self.renegotiated = 0

    def __enter__(self) -> Run:
        try:
            self._connect()
            for link in self.links:
                self._threads += link.client.threads(link.server) + link.server.threads(link.client)
            self._started = time.monotonic()
            for thread in self._threads:
                thread.start()
            threading.Thread(target=self._supervise, daemon=True, name="demo supervisor").start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for end in (self.client, self.server):
            end.close(timeout=5)

    def wait(self, timeout: float | None) -> bool:
        """Whether the job is done, at the latest after *timeout* seconds (None: when it is)."""
        return self._done.wait(timeout)

    def elapsed(self) -> float:
        """Seconds since the first message."""
        return self.seconds or time.monotonic() - self._started

    def received(self) -> Traffic:
        """What all receivers have been given so far.  Any thread."""
        seen = [end.traffic() for link in self.links for end in (link.client, link.server)]
        return Traffic(sum(t.messages for t in seen), sum(t.bytes for t in seen))

    def wants(self) -> dict[str, dict[str, int]]:
        """How often OpenSSL wanted something so far, by call."""
        counts: dict[str, dict[str, int]] = {}
        for end in (self.client, self.server):
            for (call, want), count in end.snapshot().wants.items():
                row = counts.setdefault(call, {"read": 0, "write": 0})
                row[want] += count
        return counts

    # Setting up.

    def _connect(self) -> None:
        authority, certificate, key = throw_away_authority()
        server = bridge.server_context([certificate], key, renegotiation=True, keylog=self._count_handshakes)
        versions = VERSIONS[self.plan.tls]
        listeners = [
            self.server.listen(_listening_socket(tiny), server, codec=CODEC) for tiny in (False, True)
        ]
        for number in range(self.plan.clients):
            version, tiny = versions[number % len(versions)], number // len(versions) % 2 == 1
            context = bridge.client_context([authority], minimum_version=version, maximum_version=version)
            self._first_visit(listeners[tiny], context, tiny)
            ends = self._meet(listeners[tiny], context, tiny)
            names = (f"link {number + 1} to the client", f"link {number + 1} to the server")
            self.links.append(Link(tiny, *(End(self, *pair) for pair in zip(names, ends, strict=True))))

    def _meet(
        self, listener: bridge.Listener, context: bridge.Context, tiny: bool
    ) -> tuple[bridge.Session, bridge.Session]:
        sock = socket.socket()
        _make_tiny(sock, tiny)
        sock.connect(listener.address)
        client = self.client.adopt(sock, context, server_hostname="localhost", codec=CODEC, timeout=PATIENCE)
        return client, listener.accept(PATIENCE)

    def _first_visit(self, listener: bridge.Listener, context: bridge.Context, tiny: bool) -> None:
        """Come, be greeted, and go: the next handshake can resume this session."""
        client, server = self._meet(listener, context, tiny)
        server.send(b"welcome")
        server.send_eof()
        client.recv(PATIENCE)
        client.close(PATIENCE)
        server.close(PATIENCE)

    def _count_handshakes(self, line: bytes) -> None:
        """The key log: TLS 1.2 writes one such line a handshake, also when it renegotiates."""
        if line.startswith(b"CLIENT_RANDOM"):
            self._handshakes.put(None)

    # Under way.

    def _supervise(self) -> None:
        """A thread: have keys changed until senders shall stop, and see the job to its end."""
        before = self._handshakes.qsize()
        old = [link.server.session for link in self.links if link.server.session.info.version == "TLSv1.2"]
        ends = self._started + (self.plan.seconds or float("inf"))
        for session in itertools.cycle(old or [None]):
            if self.stop.wait(max(0.0, min(NEW_KEYS_EVERY, ends - time.monotonic()))):
                break
            if time.monotonic() >= ends or not any(thread.is_alive() for thread in self._threads):
                break
            if session is not None and session.end is None:
                session.renegotiate()
                self.asked += 1
        self.stop.set()
        for thread in self._threads:
            thread.join()
        self.seconds = time.monotonic() - self._started
        for link in self.links:
            link.client.session.close(PATIENCE)
            link.server.session.close(PATIENCE)
        self.renegotiated = self._handshakes.qsize() - before
        self._done.set()

    def result(self) -> Result:
        """The verdict; after `wait` said so."""
        links, total = self.links, self.received()
        errors = [error for link in links for end in (link.client, link.server) for error in end.errors]
        faults = [
            fault
            for link in links
            for fault in link.client.faults(link.server) + link.server.faults(link.client)
        ]
        described = [_describe(link) for link in links]
        return Result(
            ok=not faults,
            faults=faults,
            seed=self.plan.seed,
            seconds=self.seconds,
            links=described,
            wants=self.wants(),
            wants_seen_by_application={
                want: sum(f"want{want}" in type(error).__name__.lower() for error in errors)
                for want in ("read", "write")
            },
            renegotiations_asked_for=self.asked,
            renegotiations_done=self.renegotiated,
            resumed_handshakes=sum(link.resumed for link in described),
            bridge_threads=2 * (WORKERS + 1),
            application_threads=len(self._threads),
            messages=total.messages,
            bytes=total.bytes,
            bytes_per_second=total.bytes / self.seconds,
        )


def _describe(link: Link) -> LinkResult:
    info = link.client.session.info
    return LinkResult(
        info.version, info.cipher, link.tiny, info.resumed, link.server.traffic(), link.client.traffic()
    )


def _make_tiny(sock: socket.socket, tiny: bool) -> None:
    """Small buffers, before the socket is connected or listens (tcp(7)); accepted sockets inherit them."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if tiny else ():
        sock.setsockopt(socket.SOL_SOCKET, option, TINY_BUFFER)


def _listening_socket(tiny: bool) -> socket.socket:
    sock = socket.socket()
    _make_tiny(sock, tiny)
    sock.bind(("127.0.0.1", 0))
    return sock


def throw_away_authority() -> tuple[x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new authority's certificate, and a certificate for localhost that it issued, with the key of that."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tls-bridge demo: throw-away CA")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    authority = _unsigned(issuer, issuer, authority_key).add_extension(constraints, critical=True)
    leaf = _unsigned(subject, issuer, key).add_extension(x509.SubjectAlternativeName(names), critical=False)
    return authority.sign(authority_key, hashes.SHA256()), leaf.sign(authority_key, hashes.SHA256()), key


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
    )
