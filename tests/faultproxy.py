"""A hostile network: a proxy that harms TCP connections as a seeded plan says, at the borders of TLS records.

A `Plan` is made from a seed and nothing else, so whatever it broke breaks again (as far as the scheduling of
threads allows).  The proxy sits between a peer and us; each direction is a lane, cut into records as they
come in, and shaped into pieces as they go out.

*Benign* plans change when bytes arrive and in what pieces, never which: a session must not notice.  *Hostile*
plans strike once, at one record of one lane, and after that the session must end in a typed error, or, where
TLS says that what was done is no harm (see `Plan.harmless`), go on as if nothing had happened.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from peers import reset_on_close

HEADER = 5
CHANGE_CIPHER_SPEC, ALERT, APPLICATION_DATA = 20, 21, 23
ALERT_SIZES = {(ALERT, 26), (APPLICATION_DATA, 19)}
"""Type and size of an encrypted alert in TLS 1.2 (an explicit nonce before it) and 1.3, with AES-GCM."""

BENIGN = ("dribble", "split", "coalesce", "delay", "stall", "tiny")
HOSTILE = (
    "reset in header",
    "reset in body",
    "end in header",
    "end in body",
    "half close",
    "flip in header",
    "flip in body",
    "garbage between",
    "garbage in body",
    "drop",
    "repeat",
    "reorder",
    "black hole",
    "freeze",
)
MOMENTS = ("handshake", "data", "close")
TO_US, TO_PEER = "to us", "to the peer"
HIGH_WATER = 64 * 1024
"""Bytes a lane holds before it reads no further."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the network does to one connection."""

    seed: int
    name: str
    """One of BENIGN or HOSTILE."""
    lane: str
    """TO_US or TO_PEER: where a hostile plan strikes."""
    moment: str
    """Around which of the MOMENTS."""
    record: int
    """Which record of the lane, from 0, is struck; at the close it is the first that looks like an alert."""

    @classmethod
    def make(cls, seed: int) -> Plan:
        """The plan of *seed*.  Successive seeds go through all names."""
        names = BENIGN + HOSTILE
        dice = random.Random(f"plan {seed}")
        moment = dice.choice(MOMENTS)
        record = dice.randrange(3) if moment == "handshake" else dice.randrange(5, 14)
        return cls(seed, names[seed % len(names)], dice.choice((TO_US, TO_PEER)), moment, record)

    @property
    def hostile(self) -> bool:
        """Whether the session may end of it."""
        return self.name in HOSTILE

    def dice(self, lane: str) -> random.Random:
        """What chance decides on *lane*."""
        return random.Random(f"dice {self.seed} {lane}")


class _Lane:
    """One direction of a connection: records in, pieces out, each at its time."""

    def __init__(self, plan: Plan, name: str, source: socket.socket, sink: socket.socket) -> None:
        self.name, self.source, self.sink = name, source, sink
        self.plan = plan
        self.dice = plan.dice(name)
        self.struck: str | None = None
        """What was done to which record, once it was."""
        self.harmless = False
        self.reset = False  # to be carried out by whoever owns both sockets
        self.ended = False  # nothing more goes in
        self.closed = False  # nothing more comes out
        self._armed = plan.hostile and plan.lane == name
        self._raw = bytearray()
        self._records = 0
        self._kept = b""  # the record that is overtaken by the next
        self._swallowing = self._frozen = False
        self._pieces: collections.deque[tuple[float, bytes]] = collections.deque()
        self._held = 0
        self._last_due = 0.0
        self._dribbled = 0

    # In.

    def wants_input(self) -> bool:
        return not (self.ended or self._frozen) and self._held < HIGH_WATER

    def take(self) -> None:
        """Read what there is."""
        try:
            data = self.source.recv(HIGH_WATER)
        except BlockingIOError:
            return
        except OSError:
            self.reset = True
            return
        if not data:
            self._put(bytes(self._raw))
            self.ended = True
        elif not self._swallowing:
            self._raw += data
            while not (self.ended or self._swallowing or self._frozen) and (record := self._next_record()):
                self._records += 1
                if self._is_time(record):
                    self._armed = False
                    self._strike(record)
                else:
                    self._put(record + self._kept)
                    self._kept = b""

    def _next_record(self) -> bytes:
        if len(self._raw) < HEADER:
            return b""
        size = HEADER + int.from_bytes(self._raw[3:5], "big")
        if len(self._raw) < size:
            return b""
        record = bytes(self._raw[:size])
        del self._raw[:size]
        return record

    def _is_time(self, record: bytes) -> bool:
        if not self._armed:
            return False
        if self.plan.moment == "close":
            return self._records > 3 and (record[0], len(record) - HEADER) in ALERT_SIZES
        return self._records > self.plan.record

    def _strike(self, record: bytes) -> None:
        what, dice = self.plan.name, self.dice
        inside = dice.randrange(1, HEADER) if what.endswith("header") else dice.randrange(HEADER, len(record))
        self.struck = f"{what} {self._records - 1} (type {record[0]}, {len(record)} bytes), {self.name}"
        last = self.plan.moment == "close"
        if record[0] == CHANGE_CIPHER_SPEC:
            self.harmless = True  # TLS 1.3 takes or leaves it (RFC 8446, appendix D.4)
        if what.startswith(("reset", "end")):
            self._put(record[:inside])
            self.reset = what.startswith("reset")
            self._swallowing = self.ended = True
        elif what == "half close":
            self._swallowing = self.ended = True
        elif what.startswith("flip"):
            place = dice.randrange(HEADER) if what.endswith("header") else inside
            self.harmless |= place in (1, 2)  # the version, which a receiver may ignore (RFC 8446, 5.1)
            damaged = bytearray(record)
            damaged[place] ^= 1 << dice.randrange(8)
            self._put(bytes(damaged))
        elif what == "garbage between":
            self._put(dice.randbytes(dice.randrange(1, 64)) + record)
        elif what == "garbage in body":
            self._put(record[:inside] + dice.randbytes(len(record) - inside))
        elif what == "repeat":
            self.harmless |= last
            self._put(record + record)
        elif what == "reorder":
            self._kept = record
        elif what == "black hole":
            self._swallowing = True
        elif what == "freeze":
            self._frozen = True
        else:
            assert what == "drop"

    # Out.

    def _put(self, data: bytes) -> None:
        """Send *data*, in the pieces and at the times of the plan."""
        if not data:
            return
        now, name, dice = time.monotonic(), self.plan.name, self.dice
        due = now
        if name == "coalesce":
            due = (now // 0.004 + 1) * 0.004
        elif name == "delay":
            due = now + dice.random() * 0.004
        elif name == "stall" and dice.randrange(12) == 0:
            due = now + 0.05
        self._last_due = due = max(due, self._last_due)
        for piece in self._cut(data) if name in ("dribble", "split") else (data,):
            self._pieces.append((due, piece))
        self._held += len(data)

    def _cut(self, data: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(data):
            if self.plan.name == "dribble" and self._dribbled < 3000:
                size = 1
                self._dribbled += 1
            else:
                size = self.dice.choice((1, 4, 5, 6, 300, 1400, 9000))
            yield data[position : position + size]
            position += size

    def due(self) -> float | None:
        """When there is something to send; None if there is nothing."""
        return self._pieces[0][0] if self._pieces else None

    def give(self, now: float) -> None:
        """Send what is due, and after the last of it the end."""
        try:
            if self._pieces and self._pieces[0][0] <= now:
                _, piece = self._pieces.popleft()
                if self.plan.name == "coalesce":
                    while self._pieces and self._pieces[0][0] <= now:
                        piece += self._pieces.popleft()[1]
                sent = self.sink.send(piece)
                self._held -= sent
                if sent < len(piece):
                    self._pieces.appendleft((now, piece[sent:]))
            if self.ended and not self._pieces and not self.closed and not self.reset:
                self.closed = True
                self.sink.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._pieces.appendleft((now, piece))
        except OSError:
            self.reset = True
            self._pieces.clear()


class Passage:
    """One connection through the proxy, and what became of it."""

    def __init__(self, plan: Plan, ours: socket.socket, peers: socket.socket) -> None:
        self.sockets = (ours, peers)
        for sock in self.sockets:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lanes = (_Lane(plan, TO_PEER, ours, peers), _Lane(plan, TO_US, peers, ours))
        self.over = False

    def wanted(self, now: float) -> tuple[dict[socket.socket, int], float | None]:
        """What to wait for on each socket, and when a piece is due."""
        masks, timer = dict.fromkeys(self.sockets, 0), None
        for lane in self.lanes:
            if lane.wants_input():
                masks[lane.source] |= selectors.EVENT_READ
            due = lane.due()
            if due is not None and due <= now:
                masks[lane.sink] |= selectors.EVENT_WRITE
            elif due is not None:
                timer = due if timer is None else min(due, timer)
        return masks, timer

    def turn(self, ready: dict[socket.socket, int], now: float) -> None:
        """Move what can be moved."""
        for lane in self.lanes:
            if ready.get(lane.source, 0) & selectors.EVENT_READ and lane.wants_input():
                lane.take()
            lane.give(now)
        if any(lane.reset and lane.due() is None for lane in self.lanes):
            self.close(reset=True)
        elif all(lane.closed for lane in self.lanes):
            self.close()

    def close(self, reset: bool = False) -> None:
        """The end of both connections."""
        self.over = True
        for sock in self.sockets:
            if reset:
                with contextlib.suppress(OSError):
                    reset_on_close(sock)
            sock.close()

    @property
    def struck(self) -> str | None:
        """What was done, once it was."""
        return next((lane.struck for lane in self.lanes if lane.struck), None)

    @property
    def harmless(self) -> bool:
        """Whether a session may live on after it."""
        return any(lane.harmless for lane in self.lanes)


class FaultProxy:
    """One thread that carries bytes between those who call it and *upstream*s, as the plans say."""

    def __init__(self) -> None:
        self._listeners = {tiny: self._listen(tiny) for tiny in (False, True)}
        self._bell, self._ringer = socket.socketpair()
        self._orders: collections.deque[tuple[Plan, Any, bool, list[Passage]]] = collections.deque()
        self._live: list[Passage] = []
        self._hang_up: collections.deque[threading.Event] = collections.deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)

    @staticmethod
    def _listen(tiny: bool) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0))
        if tiny:
            _shrink(listener)  # what it accepts inherits that
        listener.setblocking(False)
        return listener

    def expect(self, plan: Plan, upstream: Any, ours_calls: bool) -> tuple[Any, list[Passage]]:
        """The next caller is led to *upstream*, as *plan* says: where to call, and where the passage will be."""
        made: list[Passage] = []
        self._orders.append((plan, upstream, ours_calls, made))
        return self._listeners[plan.name == "tiny"].getsockname(), made

    def hang_up(self) -> None:
        """Reset whatever is still connected; returns when that is done."""
        done = threading.Event()
        self._hang_up.append(done)
        self._ring()
        assert done.wait(10), "the proxy is stuck"

    def _ring(self) -> None:
        self._ringer.send(b"!")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._ring()
        self._thread.join(10)
        for sock in (*self._listeners.values(), self._bell, self._ringer):
            sock.close()

    # The thread.

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (*self._listeners.values(), self._bell):
                selector.register(sock, selectors.EVENT_READ)
            while not self._stopping:
                self._turn(selector)
            for passage in self._live:
                passage.close(reset=True)

    def _turn(self, selector: selectors.BaseSelector) -> None:
        ready = self._wait(selector)
        now = time.monotonic()
        for passage in self._live:
            passage.turn(ready, now)
        for listener in self._listeners.values():
            if listener in ready:
                self._connect(listener)
        if self._bell in ready:
            self._bell.recv(64)
        if self._hang_up:
            for passage in self._live:
                passage.close(reset=True)
            self._hang_up.popleft().set()
        self._live = [passage for passage in self._live if not passage.over]

    def _wait(self, selector: selectors.BaseSelector) -> dict[Any, int]:
        """Sleep until a socket is ready or a piece is due; what is ready."""
        now, timers = time.monotonic(), []
        for passage in self._live:
            masks, timer = passage.wanted(now)
            if timer is not None:
                timers.append(timer)
            for sock, mask in masks.items():
                if mask:
                    selector.register(sock, mask)
        events = selector.select(max(0.0, min(timers) - now) if timers else None)
        for passage in self._live:
            for sock in passage.sockets:
                with contextlib.suppress(KeyError):
                    selector.unregister(sock)
        return {key.fileobj: mask for key, mask in events}

    def _connect(self, listener: socket.socket) -> None:
        try:
            near = listener.accept()[0]
        except OSError:
            return
        plan, upstream, ours_calls, made = self._orders.popleft()
        far = socket.socket()
        if plan.name == "tiny":
            _shrink(far)
        far.connect(upstream)
        passage = Passage(plan, *((near, far) if ours_calls else (far, near)))
        made.append(passage)
        self._live.append(passage)


def _shrink(sock: socket.socket) -> None:
    """Small buffers, and segments that fit them, or the kernel would drop these and wait to send them again."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
