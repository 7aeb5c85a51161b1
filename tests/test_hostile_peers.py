"""Peers that lie.  Each is met by a session that echoes, on both faces, as client and as server.

Whatever it is told, the session either goes on as if nothing had happened, every byte in its place, or ends in
the error that says what was wrong; never in a clean end that the peer has not made, and never in an error of ours.
And after each lie somebody honest is served.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import pytest
from conftest import KeyPair
from faces import FACES, Core, Face
from liar import Liar
from OpenSSL import SSL
from peers import Background, reset
from records import (
    ALERT,
    APPLICATION_DATA,
    CHANGE_CIPHER_SPEC,
    CLIENT_HELLO,
    CLOSE_NOTIFY,
    FATAL,
    FINISHED,
    HANDSHAKE,
    HELLO_REQUEST,
    KEY_UPDATE,
    NEW_SESSION_TICKET,
    RECORD_BYTES,
    WARNING,
    Keys,
    message,
    record,
    records,
)
from rig import PATIENCE, shrink, tcp_pair

import bridge

SOON = 5.0
"""Seconds in which a session must have noticed."""
SHORT = 0.4
"""The patience of a session whose peer says nothing."""
MEBIBYTE = 1 << 20
SERVER_NAMES = {"client": "localhost", "server": None}


# ── a meeting ──


@dataclasses.dataclass
class Outcome:
    """How the session saw it."""

    received: bytearray = dataclasses.field(default_factory=bytearray)
    error: BaseException | None = None
    """None after a clean end."""


@dataclasses.dataclass
class Meeting:
    """A liar, and a session that echoes to it."""

    liar: Liar
    outcome: Future[Outcome]

    def goes_on(self) -> None:
        """The session answers as if nothing had happened, and ends cleanly."""
        self.liar.say(b"still here")
        self.liar.hear_echo()
        self.liar.alert(WARNING, CLOSE_NOTIFY)
        self.ended_cleanly()

    def ended_cleanly(self) -> None:
        """The session has seen a clean end, and every byte before it."""
        outcome = self.outcome.result(SOON)
        assert outcome.error is None, repr(outcome.error)
        assert outcome.received == self.liar.said

    def ended(self, kind: type[BaseException] = ssl.SSLError, words: str = "") -> None:
        """The session has ended in an error of *kind* that has *words*; it received nothing that was not said."""
        outcome = self.outcome.result(SOON)
        assert isinstance(outcome.error, kind), repr(outcome.error)
        assert re.search(words, str(outcome.error)), repr(outcome.error)
        assert self.liar.said.startswith(outcome.received)


def echo(face: Face, sock: socket.socket, role: str, version: str, patience: float) -> Outcome:
    """Our side."""
    outcome = Outcome()
    try:
        handle = face.begin(sock, role, version, patience)
    except face.cuts as error:
        outcome.error = error
        return outcome
    try:
        while data := face.recv(handle):
            outcome.received += data
            face.send(handle, data)
    except face.cuts as error:
        outcome.error = error
    finally:
        face.end(handle)
    return outcome


Meet = Callable[..., contextlib.AbstractContextManager[Meeting]]


@pytest.fixture(params=FACES)
def face(
    request: pytest.FixtureRequest, server_cert: KeyPair, ca_file: str, default_bridge: None
) -> Iterator[Face]:
    """Each of ours."""
    made = FACES[request.param](server_cert, ca_file)
    yield made
    made.close()


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest) -> str:
    """What we are."""
    found: str = request.param
    return found


@pytest.fixture
def meet(
    face: Face, role: str, tls_version: str, server_cert: KeyPair, background: Background
) -> Iterator[Meet]:
    """Makes meetings, their handshake done unless told otherwise."""

    @contextlib.contextmanager
    def meet(shaken: bool = True, patience: float = PATIENCE, small: bool = False) -> Iterator[Meeting]:
        ours, theirs = map(shrink, tcp_pair()) if small else tcp_pair()
        with theirs:
            outcome = background.run(echo, face, ours, role, tls_version, patience)
            liar = Liar(theirs, tls_version, server_cert if role == "client" else None)
            if shaken:
                liar.handshake()
            yield Meeting(liar, outcome)

    yield meet
    began = time.monotonic()
    with meet() as honest:
        honest.goes_on()
    assert time.monotonic() - began < SOON


@contextlib.contextmanager
def blaming(*what: object) -> Iterator[None]:
    """What failed, in a row of tries: for the reader of the failure."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error


def places(seed: int, upper: int, some: int) -> Iterable[int]:
    """*some* numbers below *upper*, or all of them under BRIDGE_EVERY_BYTE."""
    if os.environ.get("BRIDGE_EVERY_BYTE") or upper <= some:
        return range(upper)
    return sorted(random.Random(seed).sample(range(upper), some))


# ── alerts ──

NAMED = (10, 20, 22, 40, 42, 46, 48, 51, 70, 80, 86, 90, 100, 109, 116, 120)
NAMELESS = (1, 19, 99, 255)
NO_RENEGOTIATION, USER_CANCELED = 100, 90


@pytest.mark.parametrize("level", [WARNING, FATAL, 0, 255])
def test_every_alert(meet: Meet, tls_version: str, level: int) -> None:
    for description in NAMED + NAMELESS:
        with blaming(level, description), meet() as meeting:
            meeting.liar.say(b"before")
            meeting.liar.alert(level, description)
            if no_more_than_a_remark(tls_version, level, description):
                meeting.goes_on()
            else:
                meeting.ended(words=r"^\[SSL: [\w/]+\] \w.* \(while in read\)$")


def no_more_than_a_remark(version: str, level: int, description: int) -> bool:
    """RFC 5246, 7.2 and RFC 8446, 6.  OpenSSL does not forgive a no_renegotiation."""
    if version == "TLSv1.3":
        return description == USER_CANCELED
    return level == WARNING and description != NO_RENEGOTIATION


def test_a_close_notify_after_user_canceled_is_the_clean_end_that_java_makes(meet: Meet) -> None:
    with meet() as meeting:
        meeting.liar.say(b"all there is")
        meeting.liar.alert(WARNING, USER_CANCELED)
        meeting.liar.alert(WARNING, CLOSE_NOTIFY)
        meeting.ended_cleanly()


# ── whatever comes after the handshake ──

Tell = Callable[[Liar], object]
BOTH, OLD, NEW = ("TLSv1.2", "TLSv1.3"), ("TLSv1.2",), ("TLSv1.3",)
GOES_ON = "goes on"


@dataclasses.dataclass(frozen=True)
class Lie:
    """What is told, and what comes of it: GOES_ON, or words of the error."""

    name: str
    tell: Tell
    verdict: str
    versions: tuple[str, ...] = BOTH
    roles: tuple[str, ...] = ("client", "server")


def plain(*wire: bytes) -> Tell:
    """Not sealed."""
    return lambda liar: liar.sock.sendall(b"".join(wire))


def sealed(*content: tuple[int, bytes]) -> Tell:
    """A genuine record for each."""
    return lambda liar: [liar.send(kind, data) for kind, data in content]


def said(*pieces: bytes) -> Tell:
    return lambda liar: liar.say(*pieces)


def updates(body: bytes, times: int = 1) -> Tell:
    def tell(liar: Liar) -> None:
        for _ in range(times):
            liar.send(HANDSHAKE, message(KEY_UPDATE, body))
            liar.update()

    return tell


def in_halves(*between: tuple[int, bytes]) -> Tell:
    """A KeyUpdate in two records, and something between them."""
    whole = message(KEY_UPDATE, b"\0")

    def tell(liar: Liar) -> None:
        sealed((HANDSHAKE, whole[:2]), *between, (HANDSHAKE, whole[2:]))(liar)
        liar.update()

    return tell


def ticket(size: int, nonce: int = 1) -> bytes:
    """A NewSessionTicket of TLS 1.3."""
    life, age = (7200).to_bytes(4, "big"), bytes(4)
    return message(
        NEW_SESSION_TICKET,
        life + age + bytes([nonce]) + bytes(nonce) + size.to_bytes(2, "big") + bytes(size) + b"\0\0",
    )


def tickets(size: int, times: int = 1, nonce: int = 1) -> Tell:
    wire = ticket(size, nonce)
    pieces = [(HANDSHAKE, wire[at : at + RECORD_BYTES]) for at in range(0, len(wire), RECORD_BYTES)]
    return sealed(*pieces * times)


def padded(liar: Liar) -> None:
    liar.send(APPLICATION_DATA, b"x", RECORD_BYTES - 1)
    liar.said += b"x"


def flipped(liar: Liar) -> None:
    wire = bytearray(liar.write.seal(APPLICATION_DATA, b"hello"))
    wire[-1] ^= 1
    liar.sock.sendall(wire)


def lost(liar: Liar) -> None:
    liar.write.seal(APPLICATION_DATA, b"lost")
    liar.say(b"next")


NO_RECORD = "wrong version number|bad record type|packet length too long"
FORGED = "decryption failed|cipher operation failed|bad record|invalid aad"
LIES = [
    Lie("an empty alert", sealed((ALERT, b"")), "invalid alert|bad length"),
    Lie("half an alert", sealed((ALERT, b"\1")), "invalid alert"),
    Lie("two alerts in one record", sealed((ALERT, b"\1\x5a\1\x5a")), "invalid alert"),
    Lie("four warnings", sealed(*[(ALERT, b"\1\x5a")] * 4), GOES_ON),
    Lie("warnings without end", sealed(*[(ALERT, b"\1\x5a")] * 5), "too many warn alerts"),
    Lie("32 empty records", said(*[b""] * 32), GOES_ON),
    Lie("empty records without end", said(*[b""] * 33), "record too small"),
    Lie("every other record is empty", said(*[b"", b"x"] * 200), GOES_ON),
    Lie("a thousand records of one byte", said(*(bytes([i % 256]) for i in range(1000))), GOES_ON),
    Lie("full records", said(*[bytes(RECORD_BYTES)] * 3), GOES_ON),
    Lie("a record one byte too long", sealed((APPLICATION_DATA, bytes(RECORD_BYTES + 1))), "length too long"),
    Lie("the longest length", plain(record(APPLICATION_DATA, b"", 65_535)), "length too long"),
    Lie("nothing but a header", plain(record(APPLICATION_DATA, b"")), FORGED),
    Lie("too short for its seal", plain(record(APPLICATION_DATA, b"x" * 15)), FORGED),
    Lie("one byte, and padding for the rest", padded, GOES_ON, NEW),
    Lie("nothing but padding", lambda liar: liar.send(0, b"", 100), "bad record type", NEW),
    Lie("an unknown type", sealed((25, b"x")), "bad record type|unexpected record"),
    Lie("a heartbeat", sealed((24, b"\1\0\1x" + bytes(16))), "bad record type|unexpected record"),
    Lie("ChangeCipherSpec", sealed((CHANGE_CIPHER_SPEC, b"\1")), "bad record type|ccs received early"),
    Lie(
        "another version", plain(record(APPLICATION_DATA, bytes(40), version=0x0500)), "wrong version number"
    ),
    Lie("plain data", plain(record(APPLICATION_DATA, b"in the clear")), FORGED),
    Lie("a plain close_notify", plain(record(ALERT, b"\1\0")), FORGED),
    Lie("a plain fatal alert", plain(record(ALERT, b"\2\x28")), FORGED),
    Lie("a plain HelloRequest", plain(record(HANDSHAKE, message(HELLO_REQUEST))), FORGED),
    Lie("plain HTTP", plain(b"HTTP/1.1 400 Bad Request\r\n\r\n"), NO_RECORD),
    Lie("zeros", plain(bytes(100)), NO_RECORD),
    Lie("a flipped bit", flipped, FORGED),
    Lie("a record twice", lambda liar: liar.sock.sendall(liar.write.seal(23, b"") * 2), FORGED),
    Lie("a record is lost", lost, FORGED),
    Lie("an unknown message", sealed((HANDSHAKE, message(77, bytes(12)))), "unexpected message"),
    Lie("a message of 16 MB", sealed((HANDSHAKE, message(77, b"", (1 << 24) - 1))), "unexpected message"),
    Lie("a second Finished", sealed((HANDSHAKE, message(FINISHED, bytes(12)))), "unexpected message"),
    Lie("an empty message record", sealed((HANDSHAKE, b"")), "bad length", NEW),
    Lie("HelloRequest", sealed((HANDSHAKE, message(HELLO_REQUEST))), "unexpected message", NEW),
    Lie("HelloRequest", sealed((HANDSHAKE, message(HELLO_REQUEST))), "unexpected message", OLD, ("server",)),
    Lie("a long HelloRequest", sealed((HANDSHAKE, message(HELLO_REQUEST, b"x"))), "message", OLD),
    Lie("ClientHello", sealed((HANDSHAKE, message(CLIENT_HELLO, bytes(40)))), "unexpected message", NEW),
    Lie("CertificateRequest", sealed((HANDSHAKE, message(13, b"\0\0\4\0\x0d\0\0"))), "unexpected message"),
    Lie("KeyUpdate", sealed((HANDSHAKE, message(KEY_UPDATE, b"\0"))), "unexpected message", OLD),
    Lie("a KeyUpdate", updates(b"\0"), GOES_ON, NEW),
    Lie("a KeyUpdate to be answered", updates(b"\1"), GOES_ON, NEW),
    Lie("a KeyUpdate of no kind", updates(b"\2"), "bad key update", NEW),
    Lie("an empty KeyUpdate", updates(b""), "bad key update", NEW),
    Lie("a long KeyUpdate", updates(b"\0\0"), "excessive message size", NEW),
    Lie("a KeyUpdate, and the old keys", sealed((HANDSHAKE, message(KEY_UPDATE, b"\0"))), FORGED, NEW),
    Lie("new keys without a KeyUpdate", lambda liar: liar.update(), FORGED, NEW),
    Lie("two KeyUpdates in a record", sealed((HANDSHAKE, message(KEY_UPDATE, b"\0") * 2)), "boundary", NEW),
    Lie("a KeyUpdate in two records", in_halves(), GOES_ON, NEW),
    Lie("data in a KeyUpdate", in_halves((APPLICATION_DATA, b"x")), "mixed handshake", NEW),
    Lie("close_notify in a KeyUpdate", in_halves((ALERT, b"\1\0")), "mixed handshake", NEW),
    Lie("a ticket", tickets(32), GOES_ON, NEW, ("client",)),
    Lie("a ticket for a server", tickets(32), "unexpected message", NEW, ("server",)),
    Lie("a ticket at the wrong time", tickets(32), "unexpected message", OLD),
    Lie("an empty ticket", tickets(0), "length mismatch", NEW, ("client",)),
    Lie("half a ticket", sealed((HANDSHAKE, ticket(32)[:30])), "mixed|unexpected record", NEW, ("client",)),
    Lie("a ticket that fits in no ClientHello", tickets(65_535, nonce=255), GOES_ON, NEW, ("client",)),
]


def test_after_the_handshake(meet: Meet, role: str, tls_version: str) -> None:
    for lie in LIES:
        if role in lie.roles and tls_version in lie.versions:
            with blaming(lie.name), meet() as meeting:
                meeting.liar.say(b"before")
                lie.tell(meeting.liar)
                if lie.verdict == GOES_ON:
                    meeting.goes_on()
                else:
                    with contextlib.suppress(OSError):  # so much for that connection
                        meeting.liar.say(b"after")
                    meeting.ended(words=lie.verdict)


# ── the end ──

CLOSE = (ALERT, bytes([WARNING, CLOSE_NOTIFY]))


@pytest.mark.parametrize(
    "then",
    [
        sealed(CLOSE),
        sealed((ALERT, bytes([FATAL, 40]))),
        sealed((APPLICATION_DATA, b"late")),
        sealed((HANDSHAKE, message(KEY_UPDATE, b"\1"))),
        plain(b"plain text"),
        plain(bytes(100_000)),
    ],
    ids=["another", "a fatal alert", "data", "a KeyUpdate", "plain text", "much"],
)
def test_nothing_that_follows_close_notify_counts(meet: Meet, then: Tell) -> None:
    with meet() as meeting:
        meeting.liar.say(b"before")
        sealed(CLOSE)(meeting.liar)
        with contextlib.suppress(OSError):  # the session may have gone by then
            then(meeting.liar)
        meeting.ended_cleanly()


@pytest.mark.parametrize("kind", [ALERT, APPLICATION_DATA])
def test_a_record_cut_at_each_byte_is_no_clean_end(meet: Meet, kind: int) -> None:
    for place in places(kind, 24, 8):
        with blaming(place), meet() as meeting:
            meeting.liar.sock.sendall(meeting.liar.write.seal(kind, b"\1\0")[: place - 24])
            meeting.liar.sock.shutdown(socket.SHUT_WR)
            meeting.ended(ssl.SSLEOFError)


# ── in the handshake ──


class Cutter:
    """Cuts the handshake messages of a liar into records anew: a border after *place* bytes, or after each byte."""

    def __init__(self, liar: Liar, place: int | None = None) -> None:
        self.place, self.total = place, 0
        self._liar = liar
        self._changed = False  # TLS 1.2: what follows ChangeCipherSpec is sealed
        self._keys: tuple[Keys, Keys] | None = None

    def __call__(self, flight: bytes) -> bytes:
        return b"".join(self._cut(one) for one in records(flight))

    def _cut(self, one: bytes) -> bytes:
        kind, body = one[0], one[5:]
        if kind == CHANGE_CIPHER_SPEC:
            self._changed = not self._liar.modern
        if kind == APPLICATION_DATA:
            if self._keys is None:
                self._keys = self._liar.handshake_keys(), self._liar.handshake_keys()
            opening, sealing = self._keys
            return b"".join(sealing.seal(*piece) for piece in self._pieces(*opening.open(one)))
        if kind == HANDSHAKE and not self._changed:
            return b"".join(record(*piece) for piece in self._pieces(HANDSHAKE, body))
        return one

    def _pieces(self, kind: int, body: bytes) -> list[tuple[int, bytes]]:
        begin, self.total = self.total, self.total + len(body)
        if self.place is None:
            return [(kind, body[at : at + 1]) for at in range(len(body))]
        at = self.place - begin
        return [(kind, body[:at]), (kind, body[at:])] if 0 < at < len(body) else [(kind, body)]


def test_handshake_messages_cut_into_records_at_each_byte(meet: Meet) -> None:
    with meet(shaken=False) as meeting:
        whole = meeting.liar.mangle = Cutter(meeting.liar, 0)
        meeting.liar.handshake()
        meeting.goes_on()
    for place in (None, *places(1, whole.total, 12)):
        with blaming(place), meet(shaken=False) as meeting:
            meeting.liar.mangle = Cutter(meeting.liar, place)
            meeting.liar.handshake()
            meeting.goes_on()


class Stopped(Exception):
    """The liar has ended in the middle of its handshake."""


class Stop:
    """The liar ends after *left* bytes of its handshake."""

    def __init__(self, liar: Liar, left: int, reset: bool) -> None:
        self.sock, self.left, self.reset = liar.sock, left, reset

    def __call__(self, flight: bytes) -> bytes:
        if len(flight) <= self.left:
            self.left -= len(flight)
            return flight
        self.sock.sendall(flight[: self.left])
        if self.reset:
            reset(self.sock)
        else:
            self.sock.shutdown(socket.SHUT_WR)
        raise Stopped


@pytest.mark.parametrize("by_reset", [False, True], ids=["FIN", "RST"])
def test_a_handshake_that_stops_at_each_byte(meet: Meet, by_reset: bool) -> None:
    """After a reset it may be the stdlib's part of the drop-in that notices, or the question whether sock is
    connected: then it is another error, but an error all the same."""
    with meet(shaken=False) as meeting:
        all_of_it = meeting.liar.mangle = Stop(meeting.liar, 1 << 20, False)
        meeting.liar.handshake()
        meeting.goes_on()
    for place in places(2, (1 << 20) - all_of_it.left - 8, 12):  # the length of signatures differs
        with blaming(place), meet(shaken=False) as meeting:
            meeting.liar.mangle = Stop(meeting.liar, place, by_reset)
            with pytest.raises(Stopped):
                meeting.liar.handshake()
            meeting.ended((ssl.SSLError, ConnectionResetError) if by_reset else ssl.SSLEOFError)


def test_a_reset_before_the_first_byte_is_told_as_one(server_cert: KeyPair, ca_file: str) -> None:
    core = Core(server_cert, ca_file)
    for role in ("client", "server"):
        ours, theirs = tcp_pair()
        session = core.bridge.adopt(
            ours, core.contexts[role, "TLSv1.3"], server_hostname=SERVER_NAMES[role], wait=False
        )
        if role == "client":
            theirs.recv(1 << 16)
        reset(theirs)
        with pytest.raises(bridge.PeerReset):
            session.recv(PATIENCE)
        session.close()
    core.close()


INSTEAD = {
    "fatal alert": record(ALERT, b"\2\x28"),
    "close_notify": record(ALERT, b"\1\0"),
    "user_canceled and close_notify": record(ALERT, b"\1\x5a") + record(ALERT, b"\1\0"),
    "warnings": record(ALERT, b"\1\x5a") * 10,
    "data": record(APPLICATION_DATA, b"too early"),
    "empty record": record(HANDSHAKE, b"") * 40,
    "ChangeCipherSpecs": record(CHANGE_CIPHER_SPEC, b"\1") * 40,
    "plain text": b"220 mail.example.org ESMTP\r\n",
    "zeros": bytes(40),
    "unknown message": record(HANDSHAKE, message(77, bytes(20))),
    "endless message": record(HANDSHAKE, message(CLIENT_HELLO, bytes(RECORD_BYTES - 4), (1 << 24) - 1)),
}


@pytest.mark.parametrize("what", INSTEAD)
def test_something_else_before_each_flight(meet: Meet, what: str, role: str, tls_version: str) -> None:
    """A server has one flight in TLS 1.3 and else two, a client two."""
    for place in range(1 if (role, tls_version) == ("client", "TLSv1.3") else 2):
        with blaming(place), meet(shaken=False) as meeting:
            liar = meeting.liar

            def lie(flight: bytes, place: int = place, liar: Liar = liar) -> bytes:
                return INSTEAD[what] + flight if liar.flights == place else flight

            liar.mangle = lie
            with contextlib.suppress(EOFError, OSError, SSL.Error):  # the session turns away, in several ways
                liar.handshake()
            liar.sock.close()
            meeting.ended((ssl.SSLError, ConnectionError))
