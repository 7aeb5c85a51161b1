"""A TLS session as a stream of bytes, served by the threads that call it: what a socket look-alike stands on.

Where a `Session` reads ahead, in whole messages, through queues, a `Stream` reads when somebody asks for bytes, on
the thread of whoever asks (see `bridge.lease`).  Every method may be called by any thread, at any time.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from bridge import forks
from bridge.connection import ONE_RECORD
from bridge.crossing import Latch, deadline_after, let_go
from bridge.engine import SessionInfo
from bridge.errors import (
    BridgeError,
    ConfigurationError,
    OperationTimeout,
    SessionAborted,
    SessionClosed,
    SessionEnded,
    WouldBlock,
    fresh,
)
from bridge.lease import Lease
from bridge.limits import RECORD_BYTES, check_timeout
from bridge.poll import READ, Want, hang_up_watch
from bridge.states import State
from bridge.terms import CloseReport, Ending, Plan, Told
from bridge.totals import Account
from bridge.transport import LONG_AGO, Transport
from bridge.worker import Worker

if TYPE_CHECKING:
    from OpenSSL import SSL

PIECE_BYTES = 16 * RECORD_BYTES
"""How much of a large write is handed to the transport at a time: what one turn may write."""
AHEAD_BYTES = 1024 * 1024
"""How much may be read that nobody asked for, before a write fails."""
AT_ONCE = 0.001
"""Seconds after which a write is no answer any more to what was read, and the peer may have hung up meanwhile."""
LEAVING_SECONDS = 1.0
"""How long a socket that is handed back may wait for the worker's next step."""
ANYTHING = Want.READ | Want.WRITE
_DRAINING = State.DRAINING
"""By a name of its own, for where speed counts."""
_TOO_LATE = "The write operation timed out"
P = ParamSpec("P")
T = TypeVar("T")


class _Sent:
    """What the transport was given and the kernel does not have yet.  Guarded by the lease."""

    __slots__ = ("_held", "_lease")

    def __init__(self) -> None:
        self._held = 0
        self._lease: Lease

    def take(self, count: int) -> None:
        self._held += count

    def give_back(self, count: int) -> None:
        self._held -= count
        self._lease.changes += 1

    def discard(self, why: SessionEnded) -> int:
        lost, self._held = self._held, 0
        return lost

    def held(self) -> int:
        return self._held


class _Received:
    """What was decrypted and not asked for yet, and how much may be.  Guarded by the lease."""

    __slots__ = ("asking", "deaf", "kept", "parts", "used")

    def __init__(self) -> None:
        self.deaf = False
        """Nobody will ask again: what is in the kernel stays there, and so does an end that is of our own making."""
        self.asking = 0
        """How many bytes somebody wants to see, for whatever reason."""
        self.parts: collections.deque[bytes] = collections.deque()
        self.used = self.kept = 0

    def allows(self) -> bool:
        return self.used < self.asking and not self.deaf

    def room(self) -> int:
        return self.asking if self.allows() else 0

    def late_room(self) -> int:
        return -1 if self.deaf else AHEAD_BYTES - self.used or -1

    def spend(self, count: int) -> None:
        self.used += count

    def held(self) -> int:
        return self.used

    def overdraft(self) -> int:
        return self.used - 1

    def take(self, size: int) -> bytes:
        """At most *size* bytes, of the oldest part."""
        part = self.parts[0]
        if len(part) > size:
            self.parts[0] = part[size:]
            part = part[:size]
        else:
            self.parts.popleft()
        self.used -= len(part)
        return part

    def keep(self, data: bytes) -> None:
        if data:
            self.parts.append(data)
            self.used += len(data)

    def peek(self, size: int) -> bytes:
        return self.parts[0][:size]

    def settle(self, somebody_waits: bool) -> None:
        """Count again: a call was interrupted."""
        self.used = sum(map(len, self.parts))
        if not somebody_waits:
            self.asking = 0


def _leased(method: Callable[Concatenate[Stream, P], T]) -> Callable[Concatenate[Stream, P], T]:
    """*method*, with the lease.

    `read` and `write` do the same by hand: each frame of Python on these two ways is felt among many threads, and a
    ``with`` of a lock takes CPython twice as long as its two calls.  Between those and the ``try`` a signal handler may
    raise, also one of our own errors: so whatever comes out, they let go once more.
    """

    @functools.wraps(method)
    def call(self: Stream, /, *arguments: P.args, **options: P.kwargs) -> T:
        forks.check(self._born)
        lease = self._lease
        lease.check()
        try:
            with lease.lock:
                try:
                    return method(self, *arguments, **options)
                finally:
                    lease.leave()
        except BridgeError:
            raise
        except BaseException:
            lease.mend(self._received.settle)
            raise

    return call


class Stream(forks.Handle):
    """One TLS session as a stream of bytes.  Made by `Bridge.stream`; the handshake starts with the first call.

    `Timeouts.idle` is not watched while nobody calls.
    """

    __slots__ = (
        "__weakref__",
        "_born",
        "_ending",
        "_eof",
        "_handed_back",
        "_hung_up",
        "_info",
        "_lease",
        "_let_go",
        "_received",
        "_sent",
        "_transport",
        "_writers",
        "gone",
        "worker",
    )

    def __init__(
        self,
        name: str,
        plan: Plan,
        worker: Worker,
        gone: Callable[[Stream, Ending], None],
        leaving: Callable[[Stream], object],
    ) -> None:
        self._born = forks.current
        self._sent, self._received = _Sent(), _Received()
        self._transport = Transport(name, plan, self._sent, self._received, self._told)
        self.worker = worker.name
        self.gone: Latch[Ending] = Latch()
        self._lease = self._sent._lease = Lease(
            self._transport, worker, self._leaving, lambda: self._buried(gone)
        )
        self._writers = threading.RLock()  # one write at a time: those of several threads never interleave
        self._let_go = leaving
        # Guarded by the lease.
        self._info: SessionInfo | None = None
        self._ending: Ending | None = None
        self._eof = False  # the peer's close_notify has come
        self._handed_back = False  # by unwrap, which may end without its caller
        self._hung_up: Callable[[int], object] | None = None
        """Whether the peer has, and was not heard out yet."""

    # What the transport tells: always in a turn, so with the lease.

    def _told(self, kind: str, payload: Any) -> None:
        self._lease.changes += 1
        if kind == Told.DATA:
            self._received.parts.append(payload)
        elif kind == Told.OPEN:
            self._info = payload
            self._lease.unattended = False
        elif kind == Told.EOF:
            self._eof = True
        else:
            self._ending = payload
            self._lease.unattended = False

    def _leaving(self) -> None:
        if not self._handed_back:
            self._let_go(self)
            if self._ending is not None and self._ending.sock is not None:
                self._ending.sock.close()

    def _buried(self, gone: Callable[[Stream, Ending], None]) -> None:
        assert self._ending is not None
        gone(self, self._ending)
        self.gone.set(self._ending)

    # The handshake.

    @_leased
    def begin(self) -> None:
        """Have a worker make the handshake; whoever needs it done waits for it.  Does not wait."""
        self._start()
        self._lease.unattended = self._info is None and self._ending is None

    @_leased
    def handshake(self, timeout: float | None = None) -> SessionInfo:
        """The handshake, if it is not done yet, and what it settled.

        *timeout* in seconds: OperationTimeout after that, None: never, 0: WouldBlock unless it can be done at once.
        Raises the cause if it fails.
        """
        _check(timeout)
        self._open(timeout)
        assert self._info is not None
        return self._info

    def _start(self) -> None:
        if not self._transport.started():
            self._lease.command("start")

    def _open(self, timeout: float | None) -> None:
        """With the lease: make sure that the handshake is done."""
        if self._info is not None:
            return
        self._start()
        if timeout == 0:  # who polls for it is not to find that a worker has taken what came
            self._lease.unattended = False
        self._wait(
            lambda: self._info is not None or self._ending is not None, timeout, "handshake", Want.READ
        )
        if self._info is None:
            assert self._ending is not None
            raise fresh(self._ending.cause)

    def _wait(self, done: Callable[[], object], timeout: float | None, what: str, first: Want) -> None:
        """With the lease: until *done*; *first* is the want to name if it would block for both."""
        if timeout == 0 and not done():
            self._lease.turn(ANYTHING)
            if not done():
                mask = self._transport.mask
                raise WouldBlock(first if mask & first or not mask else ANYTHING - first)
        elif not self._lease.until(done, timeout):
            raise OperationTimeout(f"The {what} operation timed out")

    # Bytes.

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """At least one byte and at most *size* (which is positive); ``b""`` at the peer's close_notify.

        *timeout* as for `handshake`.  Any other end raises the cause, after all that came before it; also that this
        side has closed it, or aborted.
        """
        lease, received, transport = self._lease, self._received, self._transport
        lock = lease.lock
        if self._born != forks.current or lock._is_owned():
            self._refuse()
        give_up = None if timeout is None and size > 0 else _deadline(timeout, size)
        try:
            lock.acquire()
            try:
                if received.parts:
                    return self._take(size)
                if not transport.quiet or received.deaf or timeout == 0:
                    return self._await_and_take(size, timeout, give_up)
                if transport.mask:  # there is nothing to read that the poll would not speak of
                    received.asking += 1
                    try:
                        ready = lease.sleep(give_up)
                    finally:
                        received.asking -= 1
                    if ready != READ or not transport.quiet or received.parts or received.deaf:
                        return self._await_and_take(size, timeout, give_up)
                try:
                    data = transport.read_at_once()
                except BaseException as error:
                    lease.cut_short(error)
                    raise
                if data and len(data) <= size:
                    return data
                lease.ring()
                received.keep(data)
                return self._take(size) if data else self._await_and_take(size, timeout, give_up)
            finally:
                if not transport.quiet:
                    lease.leave()
                lock.release()
        except BridgeError:
            let_go(lock)
            raise
        except BaseException:
            lease.mend(received.settle)
            raise

    def _refuse(self) -> None:
        """Raise why: the process has forked, or this very thread is in the middle of a call."""
        forks.check(self._born)
        self._lease.refuse()

    def _take(self, size: int) -> bytes:
        data = self._received.take(size)
        if self._transport.runnable():
            self._lease.ring()  # there is room again, for somebody who wants input
        return data

    def _await_and_take(self, size: int, timeout: float | None, give_up: float | None) -> bytes:
        return self._take(size) if self._await_bytes(timeout, give_up) else b""

    @_leased
    def peek(self, size: int, timeout: float | None = None) -> bytes:
        """As `read`, and the bytes stay."""
        _check(timeout, size)
        give_up = deadline_after(timeout)
        if not self._received.parts and not self._await_bytes(timeout, give_up):
            return b""
        return self._received.peek(size)

    def _await_bytes(self, timeout: float | None, give_up: float | None) -> bool:
        """Whether there are any; false at the clean end, and other ends raise."""
        if self._info is None:
            self._open(timeout and _left(give_up))
        received = self._received
        if received.deaf:
            return bool(received.parts)
        received.asking += 1
        try:
            self._wait(self._readable, timeout and _left(give_up), "read", Want.READ)
        finally:
            received.asking -= 1
        if received.parts or self._eof or received.deaf:
            return bool(received.parts)
        if self._ending is None:
            raise SessionClosed("this side closed the session")
        raise fresh(self._ending.cause)

    def _readable(self) -> bool:
        over = self._eof or self._received.deaf or self._lease.closing or self._ending is not None
        return over or bool(self._received.parts)

    @_leased
    def pending(self) -> int:
        """Decrypted bytes that `read` would give without waiting and that no poll announces.  Does not wait."""
        return self._received.used

    def write(self, data: bytes | bytearray | memoryview, timeout: float | None = None) -> int:
        """Hand *data* to the kernel, encrypted; returns how many bytes, which is all of them unless *timeout* is 0.

        *timeout* in seconds, total: OperationTimeout after that, and nobody knows how much has left; None: never;
        0: at least one byte is taken, or WouldBlock raised.  What was taken leaves in any case.  Raises the cause
        once the session has ended or this side has closed it.
        """
        lease, writers, transport = self._lease, self._writers, self._transport
        lock = lease.lock
        if (
            self._born != forks.current or lock._is_owned() or writers._is_owned()  # type: ignore[attr-defined]
        ):
            self._refuse()
        give_up = None if timeout is None else _deadline(timeout)
        try:
            if timeout is None:
                writers.acquire()
            else:
                self._await_writers(timeout)
            try:
                if give_up is not None and timeout == 0:
                    return self._write_now(data)
                lock.acquire()
                try:
                    if type(data) is not bytes or not data or len(data) > PIECE_BYTES:
                        return self._write_pieces(data, give_up)
                    self._hand_over(data, give_up)
                    if not transport.quiet:
                        self._see_off(give_up)
                    return len(data)
                finally:
                    if not transport.quiet:
                        lease.leave()
                    lock.release()
            finally:
                writers.release()
        except BaseException as error:
            try:
                if not isinstance(error, BridgeError):
                    lease.mend(self._received.settle)
            finally:
                let_go(lock)
                let_go(writers)
            raise

    def _await_writers(self, timeout: float) -> None:
        if not self._writers.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
            raise WouldBlock(Want.WRITE) if timeout == 0 else OperationTimeout(_TOO_LATE)

    def _write_pieces(self, data: bytes | bytearray | memoryview, give_up: float | None) -> int:
        size = 0
        for piece in _pieces(data):
            self._hand_over(piece, give_up)
            if not self._transport.quiet:
                self._see_off(give_up)
            size += len(piece)
        return size

    def _see_off(self, give_up: float | None) -> None:
        """What could not leave at once."""
        if self._sent.held():
            self._wait(self._all_gone, _left(give_up), "write", Want.WRITE)
        if self._ending is not None or self._sent.held():
            self._check_writable()

    @_leased
    def _write_now(self, data: bytes | bytearray | memoryview) -> int:
        done = 0
        with (
            memoryview(data) as whole,
            whole.cast("B") as view,
        ):  # let go with the frame alive, as in a traceback
            while done < len(view):
                if self._sent.held():
                    self._lease.turn(ANYTHING)
                if self._sent.held() and done == 0:
                    self._check_writable()
                    raise WouldBlock(Want.WRITE if self._transport.mask & Want.WRITE else Want.READ)
                if self._sent.held():
                    break
                self._ready_to_write(0)
                piece = bytes(view[done : done + RECORD_BYTES])
                self._hand_over(piece)
                if self._sent.held():
                    self._lease.turn()
                self._check_writable()
                done += len(piece)
        return done

    def _ready_to_write(self, timeout: float | None) -> None:
        if self._info is None:
            self._open(timeout)
        self._check_writable()

    def _hand_over(self, piece: bytes | memoryview, give_up: float | None = None) -> None:
        """Write *piece*, and leave to the transport what the kernel does not take; cut short, it ends the session.

        By *give_up* the session is to be open.
        """
        transport, left, hung_up = self._transport, len(piece), None
        if not transport.quiet or transport.state is _DRAINING or self._lease.closing:
            self._ready_to_write(_left(give_up))
        try:
            try:
                if left > RECORD_BYTES or time.monotonic() - transport.heard > AT_ONCE:  # it is no answer
                    hung_up = self._look_for_an_end()
                transport.heard = LONG_AGO
                while transport.quiet:
                    left -= transport.write_at_once(piece, hung_up)
                    if not left:
                        return
                    if not transport.quiet:
                        self._sent.take(left)
                        self._lease.ring()
                        return
                    piece = memoryview(piece)[-left:]
                    hung_up = self._hear_out()
            except SessionEnded as error:
                self._sent.take(left)
                transport.end(error)
                self._lease.ring()
                return
            if self._ending is None:
                self._sent.take(left)
                transport.send([piece])
        except BaseException as error:
            self._lease.cut_short(error)
            raise

    def _look_for_an_end(self) -> Callable[[int], object] | None:
        if not self._transport.quiet:
            return None
        hung_up = self._hung_up
        return self._hear_out() if hung_up is None or hung_up(0) else hung_up

    def _hear_out(self) -> Callable[[int], object] | None:
        """Before a write to a peer that has hung up: it may fail, and what the peer has said would be lost with it.

        OpenSSL reads no more after that.  While the peer may say more, nothing is read, and the descriptor tells
        the truth; from then on it is readable for ever.  Returned is what to ask between records, if anything.
        """
        if self._received.deaf or self._lease.closing:
            return None
        transport, received = self._transport, self._received
        assert transport.sock is not None
        hung_up = self._hung_up = self._hung_up or hang_up_watch(transport.sock)
        if not hung_up(0):
            return hung_up
        while transport.quiet and received.used < AHEAD_BYTES:  # it can say no more than is there
            if not transport.has_input():
                self._hung_up = _never
                break
            received.keep(transport.read_at_once(ONE_RECORD))
        self._lease.changes += 1
        self._lease.ring()
        return None

    def _all_gone(self) -> bool:
        shut = self._received.deaf and self._transport.state is _DRAINING
        return not self._sent.held() or self._lease.closing or shut

    def _check_writable(self) -> None:
        if self._ending is not None:
            raise fresh(self._ending.cause)
        if self._lease.closing or self._transport.state is _DRAINING:
            raise SessionClosed("this side has closed its half of the session")

    # Ends.

    @_leased
    def send_eof(self, timeout: float | None = None) -> None:
        """TLS half close (RFC 8446, 6.1), and then that of TCP.  Reading goes on.

        *timeout* as for `handshake`; but with 0 it is no error if close_notify cannot leave at once: it leaves when
        it can.
        """
        if self._info is None or self._ending is not None:
            return
        self._lease.at_once(self._look_before_the_end)
        self._lease.command("send_eof", True)
        if timeout != 0:
            self._wait(self._said_close, timeout, "shutdown", Want.WRITE)

    def _look_before_the_end(self) -> None:
        if self._transport.quiet:
            try:
                self._hear_out()
            except SessionEnded as error:
                self._transport.end(error)
                self._lease.ring()

    def _said_close(self) -> bool:
        return self._transport.said_close() or self._ending is not None

    @_leased
    def stop_reading(self) -> None:
        """From now on `read` gives what is there already and then ``b""``, also to whoever waits in it."""
        self._received.deaf = True
        self._lease.ring()

    def unwrap(self, timeout: float | None = None) -> tuple[socket.socket, bytes]:
        """End TLS both ways and go on in plain text: the socket, and bytes read too far.

        *timeout* as for `handshake`; with 0, call it again after WouldBlock.  Raises the cause if the peer just
        hangs up; and ConfigurationError if application data comes, or is there, before its close_notify: once that is
        read, call it again.
        """
        _check(timeout)
        unwrapped = self._unwrap(timeout)
        if self._lease.attended:
            # A worker that was polling must not meet a closed descriptor.  In a signal handler that has interrupted a
            # sleeper of this very session it is in vain.
            with contextlib.suppress(OperationTimeout):
                self.gone.wait(LEAVING_SECONDS, "unwrap")
        return unwrapped

    @_leased
    def _unwrap(self, timeout: float | None) -> tuple[socket.socket, bytes]:
        give_up = deadline_after(timeout)
        self._open(timeout)
        received = self._received
        deaf, received.deaf = received.deaf, False  # of the peer's close_notify it is to hear
        received.asking += 1
        try:
            if self._ending is None:
                self._lease.command("unwrap", None, False)
            self._wait(
                lambda: self._ending is not None or received.parts,
                timeout and _left(give_up),
                "unwrap",
                Want.READ,
            )
        finally:
            received.asking -= 1
            received.deaf |= deaf
        if self._ending is None:
            raise ConfigurationError(
                "unwrap() met application data before the peer's close_notify; read it first"
            )
        unwrapped = self._ending.unwrap()
        self._handed_back = self._lease.closing = True
        return unwrapped

    def close(self, timeout: float | None = None, politely: bool = True) -> None:
        """Polite close, in the background: what was taken leaves, close_notify is said, late input is drained.

        *timeout* bounds that, in seconds (None: `Timeouts.flush` and `Timeouts.close_notify`).  If not *politely*, no
        close_notify is said, so that the peer does not take what it got for all there is; unless `send_eof` has said
        it.  Whoever waits in a call is let go.  Does not wait; idempotent; in a child of fork() it only closes the
        child's descriptor.
        """
        timeout = check_timeout("timeout", timeout)
        how = "close" if politely else "hang_up"
        if self._born != forks.current:
            self._abandon()
        elif self._lease.mine():  # a signal handler, in the middle of a call of this very session
            self._lease.post_close(how)
        else:
            self._close(timeout, how)

    @_leased
    def _close(self, timeout: float | None, how: str) -> None:
        self._lease.close(timeout, how)

    def forget(self) -> None:
        """`close`, and not politely, for a finalizer: it may run in the middle of a call of this very session.

        Never waits.
        """
        if forks.abandoned(self._born):
            self._abandon()
        else:
            self._lease.post_close("hang_up")

    @_leased
    def abort(self) -> None:
        """End now; what has not left is lost, and the peer sees a reset.  Idempotent; does not wait."""
        self._lease.abort(SessionAborted("this side aborted the session"))

    def give_up(self) -> None:
        """The threads of its Bridge have ended, and it has not."""
        with self._lease.lock:
            self._lease.give_up(SessionAborted("the bridge was closed"))

    def busy_here(self) -> bool:
        """Whether this very thread is in the middle of a call of it: in a callback, or in a signal handler."""
        return self._lease.mine()

    def _abandon(self) -> None:
        """In a child of fork(): nothing but the descriptors is ours."""
        for sock in (self._transport.sock, *self._transport.retired):
            if sock is not None:
                sock.close()

    # Facts.

    @property
    def info(self) -> SessionInfo | None:
        """What the handshake settled; None before that.  Stays after the end."""
        return self._info

    @property
    def end(self) -> SessionEnded | None:
        """How it ended: the first cause, which never changes; None while it lives."""
        return None if self._ending is None else self._ending.cause

    @property
    def report(self) -> CloseReport | None:
        """How far the close got; None while the session lives."""
        return None if self._ending is None else self._ending.report

    @_leased
    def session(self) -> SSL.Session | None:
        """What a later session may offer to resume: with TLS 1.3, the newest ticket that was read."""
        return self._transport.session()

    @property
    def name(self) -> str:
        """What it is called in events and snapshots."""
        return self._transport.name

    def describe(self) -> dict[str, Any]:
        """What it is doing now, for `Bridge.snapshot`."""
        return self._transport.describe()

    def account(self, ending: Ending | None) -> Account:
        """What it adds to `Bridge.totals`.  Any thread."""
        return self._transport.account(ending)

    def __repr__(self) -> str:
        return f"<Stream {self.name} {self._transport.state.value}>"


def _check(timeout: float | None, size: int = 1) -> None:
    """ValueError for a *size* that makes no sense, and ConfigurationError, which is one, for such a *timeout*."""
    if size <= 0:
        raise ValueError(f"size must be positive, not {size!r}")
    if timeout is not None and not (type(timeout) is float and timeout >= 0):
        check_timeout("timeout", timeout)


def _deadline(timeout: float | None, size: int = 1) -> float | None:
    """The monotonic time after *timeout* seconds; ValueError as `_check`."""
    _check(timeout, size)
    return deadline_after(timeout)


def _never(_: int) -> bool:
    return False


def _left(give_up: float | None) -> float | None:
    """Seconds until then; never 0, which would mean not to wait."""
    return None if give_up is None else max(1e-6, give_up - time.monotonic())


def _pieces(data: bytes | bytearray | memoryview) -> Iterable[bytes | memoryview]:
    """What the transport is to be given one by one, and what does not change meanwhile."""
    view = memoryview(data).cast("B")
    pieces = (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))
    return pieces if isinstance(data, bytes) else map(bytes, pieces)
