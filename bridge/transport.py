"""The owner's half of a session: the socket, the engine over it, and what is still to be done.

Theory of operation
-------------------
Four *operations* may be under way at once: handshake (or renegotiation), read, write, shutdown.  Each is
either ready to be called, or waits for a want.  A step calls whatever is ready, in the order read, write,
shutdown, until nothing is.  The poll mask is the sum of the wants; an event readies the operations it was
wanted for.

The one rule that is easy to miss: a read may swallow the very bytes another operation waits for.  (TLS 1.2: the
server renegotiates; our write wants to read; our read consumes the server's handshake bytes, finds no data and
wants to read too.  Now the socket is silent and the write would succeed at once.)  So a read that has come to its
end, with data or without, readies all others that want to read, and the step goes on.

Reading stops a step early for three reasons: its budget is used up (fairness: the step asks for another
turn), the application's credit is (the read stays ready and costs nothing until credit returns), or the
record was short and nothing is left inside OpenSSL (poll is level-triggered: if there is more it says so,
and one futile SSL_read a message is saved).  A write that wants to read, or begins to, overrides the credit,
because only reading can move it on.

A session writes only through `self._chunk`, which does not change until OpenSSL took it.  Credit goes back
when the kernel has it, which is later only if the engine is on its detour (see `engine`).

Ends.  `close` waits for the chunks, says close_notify, half-closes the socket, and reads on until the peer
has answered or its time is up.  If the peer's stream ends before our close_notify, that ends the reading, and what
was accepted still leaves: the peer may have shut down its half and no more.  Closing a socket with unread input makes
the kernel send RST, which may destroy what the peer has not read yet, an alert of ours for instance; so a failed
session lingers likewise, with plain reads.  `abort` does none of that.  A peer that resets the connection may have
said why before, or have answered; that is read before the session ends, as long as OpenSSL will (once a write of its
own to a socket has failed, since version 4, it will not).

Which thread: everything here belongs to the session's owner, which holds `lock` for each turn and command.
Others reach it by its worker's mailbox, with one exception: while the session is `quiet` (open, and nothing but
reading under way) a sender may take the lock for one `write_at_once`, and a receiver for one `take_at_once`.  They
tell nobody anything and end nothing, for that is the owner's; what they could not finish is left as any write or read
is, and a word wakes the worker.
A quiet session's owner takes short turns likewise: one read, and neither wants nor deadlines to look at again.
Hence whatever starts something else, a command or a deadline, must end the quiet, or find the long turn.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bridge import events
from bridge.crossing import nobody
from bridge.dialer import Dialer
from bridge.engine import TLSEngine
from bridge.errors import (
    CloseTimeout,
    CodecError,
    ConnectTimeout,
    DeadlineExceeded,
    EndOfStream,
    HandshakeTimeout,
    IdleTimeout,
    PeerReset,
    SessionClosed,
    SessionEnded,
    SessionStalled,
    TLSError,
    Truncated,
    WriteStalled,
    forget_frames,
    tls_error,
)
from bridge.limits import RECORD_BYTES
from bridge.poll import NOTHING, READ, Want, look
from bridge.states import TRANSITIONS, Aim, State
from bridge.terms import CloseReport, Ending, Plan, ReceiveCredit, SendCredit, Told
from bridge.totals import Account, account

if TYPE_CHECKING:
    from OpenSSL import SSL

READ_BUDGET = 16 * RECORD_BYTES
"""Bytes a session may read in one step before the others have their turn."""
LEAST_READ = READ_BUDGET // 32
"""What the shortest record takes of that budget."""
WRITE_BUDGET = 16 * RECORD_BYTES
"""Bytes a session may write in one step."""
FORCED_READ_BYTES = 16 * 1024 * 1024
"""How far a write that wants to read may overdraw the read credit: what the kernels of both sides may hold by then,
for whoever shakes hands again sends nothing more, and its answer lies behind that."""
ANSWER_BYTES = 64 * 1024
"""How much OpenSSL may have to say, on its own account, to a peer that does not read, before we stop reading."""
EVIDENCE_BYTES = 1024
"""How much of what the kernel holds the watchdog looks at; ciphertext that has moved on looks different."""
LONG_AGO = -math.inf
_DATA = Told.DATA
"""By a name of its own, for where speed counts."""
_CALLS = ("read", "write", "shutdown", "handshake")
LINGER_BYTES = 16 * 1024 * 1024
"""How much late input a session that has failed swallows before its socket is closed anyway."""


class _Operation:
    """One kind of OpenSSL call: ready to be made, or waiting for a want, or neither (nothing to do)."""

    __slots__ = ("ready", "since", "want")

    def __init__(self) -> None:
        self.ready = False
        self.want: Want | None = None
        self.since = 0.0  # when it began to wait

    def wait_for(self, want: Want) -> None:
        self.ready, self.want, self.since = False, want, time.monotonic()

    def rest(self) -> None:
        self.ready, self.want = False, None


class Transport:
    """What a worker owns of one session.  The module's essay says who else may call what: next to nothing."""

    __slots__ = (
        "_accepted",
        "_aim",
        "_chunk",
        "_chunks",
        "_close_by",
        "_cut_off",
        "_deadlines",
        "_dialer",
        "_ended",
        "_engine",
        "_exchanging",
        "_handshake",
        "_hearing_out",
        "_hurried",
        "_idle",
        "_linger_left",
        "_lingering",
        "_peer_closed",
        "_plan",
        "_read",
        "_read_left",
        "_said_close",
        "_sent_close",
        "_shutdown",
        "_tell",
        "_unsent",
        "_wants",
        "_write",
        "_write_left",
        "again",
        "answerable",
        "brief",
        "cause",
        "credit",
        "deadline",
        "finished",
        "heard",
        "lock",
        "mask",
        "name",
        "now",
        "on_gone",
        "opening",
        "outbox",
        "quiet",
        "received",
        "retired",
        "sent",
        "shaken",
        "since",
        "sock",
        "state",
    )

    def __init__(
        self,
        name: str,
        plan: Plan,
        outbox: SendCredit,
        credit: ReceiveCredit,
        tell: Callable[[str, Any], None],
    ) -> None:
        self.name = name
        self.outbox = outbox
        self.credit = credit
        self._plan = plan
        self._tell = tell
        self.lock = threading.RLock()  # reentrant to know its owner, not to be entered again
        # What the worker reads after each step.
        self.sock = plan.sock
        self.mask = NOTHING
        self.again = False
        self.opening = True  # not open yet, and not over
        self.quiet = False  # nothing but reading is under way
        self.deadline: float | None = None
        self.finished = False
        self.retired: list[socket.socket] = []
        self.on_gone: Callable[[Transport], object] = nobody
        # Where the session is.
        self.state = State.CONNECTING
        self.cause: SessionEnded | None = None
        self.now = self.since = time.monotonic()
        self.shaken: tuple[str, float] | None = None  # the version of TLS, and how long its handshake took
        self._dialer: Dialer | None = None
        self._engine: TLSEngine | None = None
        self._exchanging = False  # the handshake is done, and the end has not come
        self._deadlines: dict[type[DeadlineExceeded], float] = {}
        self._idle = plan.timeouts.idle
        self.answerable = True
        """Something was read since the last `write_at_once`, which might be an answer to it; or nothing was written.

        Whoever calls that takes it back."""
        self.heard = LONG_AGO
        """When `read_at_once` has read something last, unless something was written since: whoever writes says so."""
        self.brief = False
        """What was read last was one short record, so `take_at_once` may be worth while."""
        # What is to be done.
        self._handshake = _Operation()
        self._read = _Operation()
        self._write = _Operation()
        self._shutdown = _Operation()
        self._chunks: list[bytes | memoryview] = []  # and not a deque, which costs half a kilobyte when empty
        self._chunk: bytes | memoryview | None = None
        self._read_left = self._write_left = 0  # of this turn's budgets
        self._accepted = 0  # bytes that OpenSSL took and the kernel may not have yet
        self._wants: dict[tuple[str, Want], int] = {}
        self.received = self.sent = 0  # bytes of plaintext: out of OpenSSL, and with the kernel
        # How it ends.
        self._aim = Aim.TALK
        self._ended = False  # and said so
        self._hearing_out: SessionEnded | None = None  # how it will end, when the last words have been told
        self._unsent = 0  # bytes that will never leave
        self._hurried = False  # the end has deadlines of its own
        self._close_by: float | None = None
        self._said_close = False  # OpenSSL has our close_notify
        self._sent_close = False  # the kernel has it
        self._peer_closed = False
        self._cut_off = False  # the peer's stream has ended without that, and ours goes on
        self._lingering = False
        self._linger_left = LINGER_BYTES

    @property
    def _operations(self) -> tuple[_Operation, ...]:
        return self._read, self._write, self._shutdown, self._handshake

    @property
    def peer(self) -> str:
        """The peer's address, as people write it.  Any thread."""
        return self._plan.peer

    @property
    def allows_renegotiation(self) -> bool:
        """Whether the context permits it.  Any thread: the context never changes."""
        return self._plan.context.renegotiation

    # What the worker calls.

    def turn(self, ready: int, now: float) -> bool:
        """The poll says *ready*: `on_ready` and `step`, or the short way if nothing but reading is under way.

        False after the short way: there is nothing new to wait for.
        """
        if self.quiet and ready == self.mask == READ and self.credit.allows():
            data = self.take_at_once(now)
            if data:
                self.credit.spend(len(data))
                tell = self._tell  # to call it as a method takes CPython longer
                tell(_DATA, data)
                if self.brief:
                    return False
        elif ready:
            self.on_ready(ready)
        self.step(now)
        return True

    def on_ready(self, mask: int) -> None:
        """The poll says *mask*: ready the operations that waited for it."""
        for operation in self._operations:
            if operation.want is not None and operation.want & mask:
                operation.ready = True

    def step(self, now: float) -> None:
        """Make all progress that is possible without sleeping, within this turn's budgets."""
        self.now = now
        self.again = False
        try:
            if self.deadline is not None and now >= self.deadline:
                self._check_deadlines()
            self._advance()
        except SessionEnded as error:
            self.end(error)
        except OSError as error:
            self.end(_reset(error))
        self._settle()

    # The shortest turns there are, for an owner that wants one thing only of a session that is `quiet`.

    def take_at_once(self, now: float) -> bytes:
        """The next record, if it is there; whatever else there is to be said is for the owner's next step to say.

        The caller spends the credit for it, if it is to wait in an inbox.  The owner has something to go on with
        unless the session is `quiet` after that, and its mask that of a read.
        """
        engine, read = self._engine, self._read
        try:
            answer = engine.read(RECORD_BYTES)  # type: ignore[union-attr]
        except SessionEnded:  # which the engine raises again
            answer = b""
        read.since = self.now = now
        if type(answer) is not bytes:
            assert isinstance(answer, Want)
            read.wait_for(answer)
            self._settle()
            return b""
        size = len(answer)
        if size:
            self.received += size
            self.answerable = True
            if self._idle is not None:
                self._touch()
            self.brief = size < RECORD_BYTES and not engine.on_detour  # type: ignore[union-attr]
            if self.brief:
                return answer
        self.brief, read.ready = False, True  # or it is the peer's close_notify, which the engine says again
        self._settle()
        return answer

    def read_at_once(self, size: int = RECORD_BYTES) -> bytes:
        """The next record if it is there and plain data; ``b""`` if it was anything else, which has been dealt with.

        With ONE_RECORD for *size* (`bridge.connection`), one record of whatever kind, and the kernel still has what is
        behind it.  On the detour, which may read on, data is told as in any turn, and ``b""`` the answer.
        """
        engine, read = self._engine, self._read
        assert engine is not None
        try:
            data = engine.read(size)
            if not data or type(data) is not bytes:
                self._no_data(data)
                if self._peer_closed:
                    self._on_peer_closed()
            else:
                size = len(data)
                self.received += size
                self.heard = read.since = time.monotonic()
                if size == RECORD_BYTES or self.mask != READ:
                    read.want, read.ready = READ, size == RECORD_BYTES
                    self.mask = NOTHING if read.ready else READ
                if self._idle is not None:
                    self.now = self.heard
                    self._touch()
                if not engine.on_detour:
                    return data
                read.ready |= engine.has_more()
                self.credit.spend(size)
                self._tell(Told.DATA, data)
        except SessionEnded as error:
            self.end(error)
        if engine.on_detour and self._exchanging:
            self.step(time.monotonic())  # to bring out what the read had to say
        else:
            self._settle()
        return b""

    def has_input(self) -> bool:
        """Whether the kernel holds anything that the peer has said, its end aside.  Raises as `write_at_once`."""
        assert self.sock is not None
        try:
            return bool(_peek(self.sock))
        except OSError as error:
            raise _reset(error) from None

    def write_at_once(self, data: bytes | memoryview, hung_up: Callable[[int], object] | None = None) -> int:
        """Write *data*, within a turn's budget.  How much of it has left; the rest is on its way, as after `send`.

        The caller does the accounting of the rest, and `end`s the session for the SessionEnded it raises.
        Between two records it stops, and the rest is the caller's, if the peer has *hung_up*: it stays `quiet` then.
        """
        engine, done, chunk = self._engine, 0, data
        assert engine is not None and self._chunk is None
        while True:
            count = engine.write(chunk)
            if type(count) is not int:
                assert isinstance(count, Want)
                self.now = time.monotonic()
                self._chunk = chunk
                self._wait_to_write(count)
                break
            if engine.on_detour:  # the kernel is full, and what OpenSSL took waits in memory
                self.now = time.monotonic()
                self._accepted = count
                self._chunk = chunk[count:] or None
                self._write.ready = True
                break
            self.sent += count
            if count == len(chunk):
                if self._idle is not None:
                    self.now = time.monotonic()
                    self._touch()
                return done + count
            done += count
            if hung_up is not None and hung_up(0):
                return done
            chunk = memoryview(data)[done:]
            if done >= WRITE_BUDGET:
                self._chunk = chunk
                self._write.ready = True
                break
        self._settle()
        return done

    def freeze(self) -> None:
        """Nobody knows what is half done: OpenSSL is not called any more, until the owner `end`s the session."""
        self.quiet = self._exchanging = False

    def runnable(self) -> bool:
        """Whether a step could get anywhere although no poll has announced anything."""
        return self._read.ready or self._write.ready or self._shutdown.ready or self._handshake.ready

    def owes(self) -> bool:
        """Whether something that was accepted has not left."""
        return self.outbox.held() > 0

    def started(self) -> bool:
        """Whether `start` was called."""
        return self.state is not State.CONNECTING

    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._aim >= Aim.CLOSE

    def said_close(self) -> bool:
        """Whether the kernel has our close_notify."""
        return self._sent_close

    def session(self) -> SSL.Session | None:
        """The newest session that a later connection could resume."""
        return None if self._engine is None else self._engine.session()

    def _advance(self) -> None:
        if self._exchanging:
            self._exchange()
            return
        if self.state is State.CONNECTING:
            self._connect()
        if self.state is State.HANDSHAKING:
            self._shake_hands()
        if self._lingering:
            self._linger()
        elif self._hearing_out is not None:
            self.end(self._hearing_out)
        elif self._exchanging:
            self._exchange()

    def _settle(self) -> None:
        """Say what to wait for, and until when."""
        mask = NOTHING
        for operation in self._operations:
            if operation.want is not None and not operation.ready:
                mask |= operation.want
        if self._read.ready and not self.again:
            mask &= ~READ  # no credit to read, and only reading could move whoever wants input
        self.mask = NOTHING if self.finished else mask
        self.quiet = (
            self._exchanging
            and self._aim < Aim.CLOSE
            and (self._read.ready or self._read.want is READ)
            and not (self._write.ready or self._shutdown.ready or self._handshake.ready)
            and self._shutdown.want is self._handshake.want is self._write.want is None
            and len(self._deadlines) == (IdleTimeout in self._deadlines)
            and not self._engine.on_detour  # type: ignore[union-attr]
        )
        self.deadline = min(self._deadlines.values()) if self._deadlines else None
        if self._dialer is not None and self._dialer.deadline is not None:
            self.deadline = min(self._dialer.deadline, self.deadline or self._dialer.deadline)

    def gone(self) -> None:
        """The socket is closed, or handed on.  The coordinator was told already."""
        self.on_gone(self)

    # Commands, by way of the worker's mailbox.

    def start(self) -> None:
        """The first command: the session has come to its worker."""
        if self.cause is not None:
            return
        if self.sock is None:
            self._set_deadline(ConnectTimeout, self._plan.timeouts.connect)
            ends = (self._deadlines.get(ConnectTimeout), self._plan.awaited)
            until = min((end for end in ends if end is not None), default=None)
            self._dialer = Dialer(self._plan.addresses, until, self.retired)
        else:
            self._begin_handshake()

    def send(self, chunks: Sequence[bytes | memoryview]) -> None:
        """More bytes to send, in order."""
        if self.cause is None and self._hearing_out is None:
            self.quiet = False
            self._chunks.extend(chunks)
            if self._write.want is None:
                self._write.ready = True

    def wake(self) -> None:
        """The command that does nothing: the turn that follows finds what is to be done."""

    def renegotiate(self) -> None:
        """Ask the peer for a new handshake (TLS 1.2)."""
        self.quiet = False
        if self.state is State.OPEN:
            self._handshake.ready = True

    def send_eof(self, half_close: bool = False) -> None:
        """Half close: after what was accepted, close_notify, and on demand that of TCP.  Receiving goes on."""
        self._drain(Aim.HALF_CLOSE if half_close else Aim.SEND_EOF)

    def close(self, timeout: float | None) -> None:
        """Polite close, within *timeout* seconds altogether (None: the session's own timeouts)."""
        self._drain_within(Aim.CLOSE, timeout)

    def hang_up(self, timeout: float | None) -> None:
        """`close`, for who has not said that it has said all, and never will: the peer is not to think so."""
        self._drain_within(Aim.HANG_UP if self._aim is Aim.TALK else Aim.CLOSE, timeout)

    def unwrap(self, timeout: float | None, bounded: bool = True) -> None:
        """End TLS both ways and hand the socket back, within *timeout* seconds altogether, if it is *bounded*."""
        self._drain_within(Aim.UNWRAP, timeout, bounded)

    def abort(self, why: SessionEnded) -> None:
        """End now; nothing more is sent, nothing waited for."""
        if not self.finished:
            self._reset_on_close()
            self.end(why, linger=False)

    def _drain_within(self, aim: Aim, timeout: float | None, bounded: bool = True) -> None:
        if bounded:
            self._hurried, self._idle = True, None
            self._lift_deadline(IdleTimeout)
        if timeout is not None and (self._close_by is None or self.now + timeout < self._close_by):
            self._close_by = self.now + timeout
        if not self._drain(aim):
            return
        if self._sent_close:
            self._after_close_notify()
        elif self._hurried:
            self._set_deadline(CloseTimeout, self._plan.timeouts.flush, self._close_by)

    def _drain(self, aim: Aim) -> bool:
        """Go for *aim*.  Whether there is anything to drain: the session is open, or will send what it has."""
        self.quiet = False
        self._aim = max(self._aim, aim)
        if self.state in (State.OPEN, State.PEER_CLOSED):
            self._start_draining()
        elif (
            self.state in (State.CONNECTING, State.HANDSHAKING)
            and self._aim >= Aim.UNWRAP
            and not self._chunks
        ):
            self.end(SessionClosed(f"{self._aim.call} before the session was open"))
        return self.state is not State.CLOSED

    def _start_draining(self) -> None:
        self._move(State.DRAINING, self._aim.call)
        self._shutdown.ready = True

    # Connecting and shaking hands.

    def _connect(self) -> None:
        assert self._dialer is not None
        try:
            connected = self._dialer.dial(self.now)
        finally:
            self.sock = self._dialer.sock
        if isinstance(connected, Want):
            self._handshake.wait_for(connected)
        else:
            self._dialer = None
            self._begin_handshake()

    def _begin_handshake(self) -> None:
        self._lift_deadline(ConnectTimeout)
        self._set_deadline(HandshakeTimeout, self._plan.timeouts.handshake)
        self._move(State.HANDSHAKING, "TCP is connected")
        self._handshake.wait_for(READ)
        self._handshake.ready = (
            not self._plan.context.server_side
        )  # a mute client shall not cost an SSL object

    def _shake_hands(self) -> None:
        if not self._handshake.ready:
            return
        assert self.sock is not None
        plan = self._plan
        if self._engine is None:
            _no_delay(self.sock)
            self._engine = TLSEngine(
                plan.context,
                self.sock,
                server_hostname=plan.server_hostname,
                resume_key=plan.resume_key,
                resume=plan.resume,
                owner=plan.owner,
            )
            self._wants = self._engine.wants
        if not self._engine.first_bytes:
            self._engine.first_bytes = _peek(self.sock)
        want = self._engine.handshake()
        if want is not None:
            self._handshake.wait_for(want)
            return
        info = self._engine.established(plan.server_hostname, _peername(self.sock), self.sock)
        self._handshake.rest()
        self._exchanging = True
        self._read.ready = True
        self._touch()
        self.shaken = info.version, self.now - self.since
        self._move(State.OPEN, "handshake done")
        self._tell(Told.OPEN, info)
        if self._aim is not Aim.TALK:
            self._start_draining()

    # Open.

    def _exchange(self) -> None:
        engine = self._engine
        assert engine is not None
        self._read_left, self._write_left = READ_BUDGET, WRITE_BUDGET
        progress = True
        while progress and self.cause is None:
            progress = False
            if self._read.ready:
                progress = self._read_some()
            if self._write.ready:
                progress |= self._write_some()
            if self._handshake.ready:
                progress |= self._renegotiate_now()
            if self._shutdown.ready and not self._write_pending():
                progress |= self._say_close_notify()
            if engine.on_detour and self.cause is None and self._write.want is None and engine.unflushed():
                progress |= not self._write.ready
                self._write.ready = True  # to bring out what a read or a shutdown had to say
            progress |= self._read.ready and self._room() > 0  # if somebody has begun to wait for input
        if HandshakeTimeout in self._deadlines and not engine.renegotiating():
            self._lift_deadline(HandshakeTimeout)
        self.again = (self._read.ready and self._read_left <= 0) or (
            self._write.ready and self._write_left <= 0
        )

    def _read_some(self) -> bool:
        """Read what there is, and hand it over in one piece; also what came before an error or the end."""
        received: list[bytes] = []
        first = self._read_left == READ_BUDGET
        try:
            self._read_into(received, self._room())
        finally:
            if received:
                data = received[0] if len(received) == 1 else b"".join(received)
                self.received += len(data)
                if self._aim < Aim.CLOSE:
                    self.credit.spend(len(data))
                    self._touch()
                    self.answerable = True
                    self.brief = first and len(data) < RECORD_BYTES
                    self._tell(Told.DATA, data)
        if self._peer_closed:
            self._on_peer_closed()
        return bool(received) or self._peer_closed

    def _read_into(self, received: list[bytes], room: int) -> None:
        engine = self._engine
        assert engine is not None
        if self._aim >= Aim.CLOSE and not self._said_close and not engine.outlasting:
            if not engine.has_more() and not look(self.sock, READ):
                self._read.wait_for(READ)
                return
            engine.outlast()
        while room > 0 and self._read_left > 0:
            try:
                data = engine.read(RECORD_BYTES)
            except Truncated:
                if self._aim < Aim.CLOSE or self._sent_close or self._cut_off:
                    raise
                self._cut_off = True
                break
            if isinstance(data, Want) or not data:
                self._no_data(data)
                break
            received.append(data)
            size = len(data)
            room -= size
            self._read_left -= max(size, LEAST_READ)
            if size < RECORD_BYTES and not (engine.on_detour and engine.has_more()):
                self._read.wait_for(READ)  # SSL_read takes a record to its end, so nothing decrypted is left
                break
        else:
            return
        self._input_was_consumed()

    def _no_data(self, answer: bytes | Want) -> None:
        """What a read has answered with instead: a want, or the peer's close_notify."""
        if isinstance(answer, Want):
            self._read.wait_for(answer)
        else:
            self._peer_closed = True
            self._read.rest()

    def _room(self) -> int:
        """How many bytes may be read in this turn; a record more does no harm."""
        engine = self._engine
        if engine is None or self._read_left <= 0:
            return 0
        if engine.on_detour and engine.unflushed() > ANSWER_BYTES:
            return 0  # a peer that asks for answers and does not take them
        if self._aim >= Aim.CLOSE:
            room = 0 if self._cut_off and not self._sent_close else READ_BUDGET
        else:
            room = self.credit.room()
        if room > 0 or self.credit.overdraft() >= FORCED_READ_BYTES:
            return room
        starving = any(o.want is READ for o in self._operations if o is not self._read)
        return RECORD_BYTES if starving else 0  # somebody waits for input, and only reading can move it

    def _input_was_consumed(self) -> None:
        """The lost wake-up: what the others wait for may have been swallowed by the call just made."""
        for operation in self._operations:
            if operation.want is READ and operation is not self._read:
                operation.ready = True

    def _write_some(self) -> bool:
        engine = self._engine
        assert engine is not None
        moved = False
        while self._write_left > 0:
            if engine.on_detour:
                want = engine.flush()
                if want is not None:
                    self._wait_to_write(want)
                    break
                moved |= self._written()
            if self._chunk is None and not self._next_chunk():
                self._write.rest()
                self._lift_deadline(WriteStalled)  # also of what was OpenSSL's own, and counted for nothing
                break
            assert self._chunk is not None
            count = engine.write(self._chunk)
            if isinstance(count, Want):
                self._wait_to_write(count)
                break
            self._write_left -= count
            self._accepted += count
            self._chunk = None if count == len(self._chunk) else memoryview(self._chunk)[count:]
        if not (engine.on_detour and engine.unflushed()):
            moved |= self._written()
        return moved

    def _wait_to_write(self, want: Want) -> None:
        self._write.wait_for(want)
        if WriteStalled not in self._deadlines:
            self._set_deadline(WriteStalled, self._plan.timeouts.write_stall)

    def _written(self) -> bool:
        """The kernel has all that OpenSSL accepted: give the credit back.  Whether that is anything."""
        accepted, self._accepted = self._accepted, 0
        if not accepted:
            return False
        self._lift_deadline(WriteStalled)
        self.sent += accepted
        self.outbox.give_back(accepted)
        self._touch()
        return True

    def _next_chunk(self) -> bool:
        """Freeze the next bytes to write: one large message, or what is queued up to the size of a record."""
        if not self._chunks or self._handshake.ready:
            return False
        chunks, count, size = self._chunks, 1, len(self._chunks[0])
        while count < len(chunks) and size + len(chunks[count]) <= RECORD_BYTES:
            size += len(chunks[count])
            count += 1
        self._chunk = chunks[0] if count == 1 else b"".join(chunks[:count])
        del chunks[:count]
        return True

    def _write_pending(self) -> bool:
        assert self._engine is not None
        return self._chunk is not None or bool(self._chunks) or self._engine.unflushed() > 0

    def _renegotiate_now(self) -> bool:
        assert self._engine is not None
        if self._chunk is not None:
            return False
        if self._handshake.want is None:
            self._engine.renegotiate()
            self._set_deadline(HandshakeTimeout, self._plan.timeouts.handshake)
        want = self._engine.handshake()
        if want is not None:
            self._handshake.wait_for(want)
            return False
        self._handshake.rest()
        self._write.ready = self._write_pending()
        return True

    def _on_peer_closed(self) -> None:
        if self.state is State.OPEN:
            self._move(State.PEER_CLOSED, "the peer's close_notify")
        if self._aim < Aim.CLOSE:
            self._tell(Told.EOF, None)
        if self._sent_close:
            self._complete()
        elif self._engine is not None and self._engine.mid_handshake():
            raise tls_error(
                "CLOSE_NOTIFY",
                "the peer closed the session in the middle of a renegotiation: nothing can be sent any more",
            )

    # Closing.

    def _say_close_notify(self) -> bool:
        assert self._engine is not None
        if not self._said_close:
            if self._aim is not Aim.HANG_UP:
                answer = self._engine.shutdown()
                if isinstance(answer, Want):
                    self._shutdown.wait_for(answer)
                    return False
            self._said_close = True
            # Behind the peer's close_notify nothing is read; in an unwrap what follows it is to stay in the kernel.
            if not (self._peer_closed or self._aim is Aim.UNWRAP):
                self._engine.mute()
        if not self._engine.unflushed():
            self._shutdown.rest()
            self._sent_close = True
            self._lift_deadline(CloseTimeout)  # what comes next has its own
            self.outbox.give_back(0)  # whoever waits for this looks again
            self._after_close_notify()
        return True

    def _after_close_notify(self) -> None:
        """Ours is sent.  Wait for the peer's: for good after send_eof(), for a while otherwise."""
        if self._aim is Aim.HALF_CLOSE or self._aim >= Aim.CLOSE:
            self._half_close()
        if self._peer_closed:
            self._complete()
        elif self._hurried:
            self._set_deadline(CloseTimeout, self._plan.timeouts.close_notify, self._close_by)

    def _half_close(self) -> None:
        assert self.sock is not None
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:  # the peer was faster
            pass

    def _complete(self) -> None:
        """Nothing is left to be said: the good end."""
        if self._peer_closed and self._aim < Aim.CLOSE:
            cause: SessionEnded = EndOfStream("the peer closed the session")
        else:
            cause = SessionClosed("this side closed the session")
        self._finish(cause)

    def end(self, cause: SessionEnded, *, linger: bool = True) -> None:
        """The bad end: *cause* becomes the session's cause, unless it has one already, or the peer has said why."""
        if isinstance(cause, PeerReset) and self._talks() and self._aim < Aim.UNWRAP:
            try:
                if not self._hear_out():
                    self._wait_for_room(cause)
                    return
            except TLSError as error:
                cause = error if "ALERT" in error.reason else cause
            except SessionEnded:
                pass
        cut_off = isinstance(cause, (Truncated, PeerReset))
        if self._sent_close and (self._aim is Aim.HANG_UP or (cut_off and self._aim is Aim.CLOSE)):
            # All was said, and an answer is not owed; to who hangs up some answer with an alert.
            cause = SessionClosed("this side closed the session")
        if self._ended:
            self._release()
        elif cut_off or not linger or self.state is State.CONNECTING:
            self._finish(cause)
        else:
            self._finish(cause, lingering=True)

    def conclude(self, cause: SessionEnded) -> None:
        """The command of whoever else has found out that it cannot go on: `end`, unless it has, and lingers."""
        if not self._ended:
            self.end(cause)

    def _hear_out(self) -> bool:
        """Tell what the peer had said before a write to it failed.  False if there is more, and no room for it now."""
        engine = self._engine
        assert engine is not None
        while not self._peer_closed:
            room = self.credit.late_room()
            if room <= 0:
                return room < 0 or not (engine.has_more() or self.has_input())
            data = engine.last_words(RECORD_BYTES)
            if isinstance(data, Want):
                break
            if data:
                self.received += len(data)
                self.credit.spend(len(data))
                self._touch()
                self._tell(Told.DATA, data)
            else:
                self._peer_closed = True
                self._tell(Told.EOF, None)
        return True

    def _talks(self) -> bool:
        return self._exchanging or self._hearing_out is not None

    def _wait_for_room(self, cause: SessionEnded) -> None:
        """Nothing is sent any more, nor polled for.  The credit calls when there is room; that turn hears on."""
        forget_frames(cause)  # a sender's hold the session itself, which could not be forgotten
        self._hearing_out = self._hearing_out or cause
        self._exchanging = False
        self._unsent += self.outbox.discard(cause)
        self._chunk = None
        self._chunks.clear()
        self._lift_deadline(WriteStalled)
        for operation in self._operations:
            operation.rest()

    def _finish(self, cause: SessionEnded, lingering: bool = False) -> None:
        """To be called again, by way of `end`, if it was interrupted."""
        forget_frames(cause)
        cause = self.cause = self.cause or cause
        self._unsent += self.outbox.discard(cause)
        said = self._sent_close and self._aim is not Aim.HANG_UP
        report = CloseReport(self._unsent, said, self._peer_closed)
        if self._engine is not None and self.state is not State.HANDSHAKING:
            self._engine.remember()
        if self.state is not State.CLOSED:
            self._move(State.CLOSED, TRANSITIONS[self.state][State.CLOSED])
        unwrapped, leftover = None, b""
        if self._engine is not None and self._aim is Aim.UNWRAP and self._sent_close and self._peer_closed:
            unwrapped, leftover = self.sock, self._engine.leftover()
            assert unwrapped is not None
            unwrapped.setblocking(True)
        self._exchanging = self.quiet = False
        self._hearing_out = None
        self._engine = self._dialer = self._chunk = None
        self._chunks.clear()
        self._deadlines.clear()
        for operation in self._operations:
            operation.rest()
        if lingering and self.sock is not None:
            self._lingering = True
            self._half_close()
            self._read.wait_for(READ)
            self._set_deadline(CloseTimeout, self._plan.timeouts.close_notify)
        elif unwrapped is None:
            self._release()
        self._tell(Told.CLOSED, Ending(cause, report, unwrapped, leftover))
        self._ended = True
        self._tell = nobody
        if unwrapped is not None:  # whose it is now
            self.sock = None
            self._release()

    def _release(self) -> None:
        self.finished = True
        self._lingering = False
        if self.sock is not None:
            self.retired.append(self.sock)
            self.sock = None

    def _linger(self) -> None:
        """After a failure: swallow what still comes, so that the kernel does not take our alert back by a RST."""
        assert self.sock is not None
        self._read.wait_for(READ)
        try:
            late = len(self.sock.recv(READ_BUDGET))
        except BlockingIOError:
            return
        except OSError:
            late = 0
        self._linger_left -= late
        if late == 0 or self._linger_left <= 0:
            self._read.rest()
            self._release()

    def _reset_on_close(self) -> None:
        if self.sock is not None:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:  # not on Linux
                pass

    # Bookkeeping.

    def _touch(self) -> None:
        if self._idle is not None:
            self._deadlines[IdleTimeout] = self.now + self._idle

    def _set_deadline(
        self, kind: type[DeadlineExceeded], seconds: float | None, at_most: float | None = None
    ) -> None:
        """*seconds* from now, or *at_most*; what is set already may come nearer, and not go further away."""
        when = math.inf if seconds is None else self.now + seconds
        when = min(when, math.inf if at_most is None else at_most, self._deadlines.get(kind, math.inf))
        if when < math.inf:
            self._deadlines[kind] = when

    def _lift_deadline(self, kind: type[DeadlineExceeded]) -> None:
        if kind in self._deadlines:
            del self._deadlines[kind]
            if not self._deadlines:
                self._deadlines.clear()  # the room for them too, which an idle session does not need

    def _check_deadlines(self) -> None:
        for kind, when in list(self._deadlines.items()):
            if when <= self.now:
                del self._deadlines[kind]
                self._expire(kind)

    def _expire(self, kind: type[DeadlineExceeded]) -> None:
        timeouts = self._plan.timeouts
        if self._lingering:
            self._release()
        elif kind is CloseTimeout and self._sent_close and self._aim >= Aim.CLOSE:
            self._complete()
        elif kind is CloseTimeout:
            missing = (
                "the peer's close_notify" if self._sent_close else f"{self.outbox.held()} bytes to leave"
            )
            raise CloseTimeout(f"closing took too long: still waiting for {missing}")
        elif kind is WriteStalled:
            raise WriteStalled(f"the peer did not take one record within {timeouts.write_stall:g} seconds")
        elif kind is HandshakeTimeout:
            if self.state is not State.HANDSHAKING:
                raise HandshakeTimeout(f"the peer did not renegotiate within {timeouts.handshake:g} seconds")
            raise HandshakeTimeout(f"the TLS handshake was not done within {timeouts.handshake:g} seconds")
        elif kind is ConnectTimeout:
            raise ConnectTimeout(f"no TCP connection within {timeouts.connect:g} seconds")
        else:
            self._part_politely()
            raise IdleTimeout(f"no application byte in either direction for {timeouts.idle:g} seconds")

    def _part_politely(self) -> None:
        """One close_notify if it can be said without waiting."""
        if self._exchanging and not self._write_pending() and not self._said_close:
            assert self._engine is not None
            self._sent_close = not isinstance(self._engine.shutdown(), Want) and not self._engine.unflushed()

    def _move(self, new: State, why: str) -> None:
        """The only place where the state changes, and where that is logged."""
        old = self.state
        assert new in TRANSITIONS[old], f"{old} cannot become {new}"
        self.state = new
        self.opening = new is State.HANDSHAKING
        self.since = self.now
        if events.wanted():
            fields = {
                "session": self.name,
                "peer": self._plan.peer,
                "old": old.value,
                "new": new.value,
                "why": why,
            }
            if self.cause is not None:
                fields |= {"cause": type(self.cause).__name__, "error": _loggable(self.cause)}
            events.debug("session.state", **fields)

    # For the watchdog, whose owner is the worker.

    @property
    def moved(self) -> int:
        """How many bytes of plaintext it has moved.  Any thread."""
        return self.received + self.sent

    def evidence(self) -> tuple[object, ...]:
        """What differs if a byte has moved, of whatever kind: what waits inside, and in the kernel."""
        engine, waiting = self._engine, None
        if (engine is not None or self._lingering) and self.sock is not None:
            try:
                waiting = _peek(self.sock, EVIDENCE_BYTES)
            except OSError as error:
                if engine is not None:
                    engine.fail(error)
        inside = () if engine is None else (engine.on_detour, engine.unflushed(), engine.pending())
        left = (self._linger_left, self._accepted, len(self._chunks))
        return (self.state, self.sock, waiting, inside, left, self.moved, self._said_close, self._peer_closed)

    def stalled(self, turns: int, whose: str) -> None:
        """After so many *turns* in vain: end, and log where it stood."""
        engine = self._engine
        seen = self.describe() | {
            "ready": [name for name, one in zip(_CALLS, self._operations, strict=True) if one.ready],
            "mask": self.mask,
            "again": self.again,
            "quiet": self.quiet,
            "inside": 0 if engine is None else engine.pending(),
            "on_detour": engine is not None and engine.on_detour,
            "chunk": 0 if self._chunk is None else len(self._chunk),
            "chunks": len(self._chunks),
        }
        del seen["since"]
        events.warning(
            "session.stalled", session=self.name, peer=self._plan.peer, worker=whose, turns=turns, **seen
        )
        self.end(SessionStalled(f"internal error: {turns} turns in a row have moved no byte"))
        self._settle()

    def describe(self) -> dict[str, Any]:
        """What the session is doing now.  From any thread: single reads of plain values, none of them acted on."""
        now, wants, ages = time.monotonic(), {}, {}
        for name, operation in zip(_CALLS, self._operations, strict=True):
            if (want := operation.want) is not None and not operation.ready:
                wants[name] = want.name.lower()
                ages[name] = max(0.0, now - operation.since)
        return {
            "state": self.state.value,
            "wants": wants,
            "ages": ages,
            "since": self.since,
            "received": self.received,
            "sent": self.sent,
            "inbox_bytes": self.credit.held() + self.credit.kept,
            "outbox_bytes": self.outbox.held(),
        }

    def account(self, ending: Ending | None) -> Account:
        """What the session adds to `Bridge.totals`; *ending* if it has come.  From any thread, likewise."""
        side = "server" if self._plan.context.server_side else "client"
        cause = None if ending is None else ending.cause
        return account(side, self.shaken, dict(self._wants), cause, self.received, self.sent)


def _loggable(cause: SessionEnded) -> str:
    """What a log may hold: a codec's error quotes what the peer said, which may be anybody's secret."""
    return "the codec refused what the peer sent" if isinstance(cause, CodecError) else str(cause)


def _no_delay(sock: socket.socket) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _reset(error: OSError) -> PeerReset:
    return PeerReset(error.errno, f"the connection failed: {error.strerror}")


def _peek(sock: socket.socket, size: int = 24) -> bytes:
    """The first *size* bytes that are there; OSError after a reset, of which the kernel tells but once."""
    try:
        return sock.recv(size, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


def _peername(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:  # gone already; the next read will say so
        return None
