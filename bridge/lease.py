"""A transport without a thread of its own: whoever calls owns it, for a turn at a time.

Theory of operation
-------------------
A *lease* is a lock, and a rule: who holds it owns the transport and runs the very same `step` a worker would; and
*nobody holds it while asleep*.  A thread that has to wait lets the lease go, sleeps in poll for what the transport
wants, takes the lease again and makes another turn.  So a reader that sleeps is no obstacle to a writer, and a lock
held across a wait, which is the deadlock of full duplex, cannot be written down.

That a call must be repeated as it was after a want is no obstacle either: what is half done lives in the transport
and not in the thread that began it, so any thread that comes next goes on with it.

Two sleepers may wait for different things, and one's turn may bring what the other waits for (a write whose turn
reads in the middle of a renegotiation; a read whose turn sends the rest of a write).  The socket will not say so a
second time.  So each sleeper lies beside a doorbell, and a turn after which anything has changed rings all bells.
A bell is a descriptor; a thread that can be spared none lies in a cot, and a worker polls, and takes turns, for it.

Between calls the session is *parked*: nobody polls, nobody reads ahead, and the descriptor is as truthful for an
application's own select as that of a plain socket.  What must not wait for a next call goes to a worker, which is
then one more thread that takes turns: a handshake that nobody waits for, the rest of a write that did not wait,
and, after the close, what is left to send, close_notify, and the linger.  See `Lease.chores`.

Interrupts.  A signal handler may raise (Ctrl-C does), on the main thread, as a function is entered, as a call returns,
or as a loop goes round.  Inside a call of the transport that ends the session: nobody knows what was half done.
Anywhere else the session lives, and must be fit for whoever comes next.  ``with lease.lock:`` alone does not see to
that.  CPython 3.11 to 3.13 always leave a `with` of a lock by its end.  3.10 does not if the handler raises just as
another exception is about to run that end, and 3.14 does not if it raises just as the lock has been taken
(python/cpython#148874).  Nor does a `finally` run to its own end when it is interrupted itself.

So what may be left undone is done once more, outside of the `with`: `Lease.mend`.  Whatever it calls looks at the
state and not at how it came about, and may be called twice: the end of a session, its burial, a word to its worker.
One interrupt at a time is mended so; a second one within the same microseconds is not.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from bridge import forks
from bridge.crossing import Gate, deadline_after, let_go, time_left
from bridge.errors import SessionEnded
from bridge.poll import NOTHING, Sleeper, Want, look, my_sleeper
from bridge.terms import cut_short_by
from bridge.transport import Transport
from bridge.worker import Worker, fail

T = TypeVar("T")


class Cot:
    """The bed of a thread that has no doorbell: a worker polls in its place, and rings."""

    __slots__ = ("_born", "_gate", "asleep", "ring")

    def __init__(self) -> None:
        self._born = forks.current
        self._gate = Gate()
        self.asleep = False
        self.ring = self._gate.ring

    def sleep(self, sock: object, mask: int, timeout: float | None) -> int:
        """Sleep until rung, at most *timeout* seconds; nothing is left to do then for which a socket was ready."""
        self._gate.sleep(timeout)
        forks.check(self._born)
        return NOTHING


class Lease:
    """The turns that many threads take with one transport.  Only ``with lease.lock:`` may anything else be called.

    The lock is reentrant to know its owner, not to be entered again; an exception that leaves the `with` is to be
    followed by `mend`, unless it is one of ours.
    """

    __slots__ = (
        "_caretaker",
        "_sleepers",
        "_transport",
        "_worker",
        "attended",
        "changes",
        "closing",
        "lock",
        "unattended",
    )

    def __init__(
        self, transport: Transport, worker: Worker, leaving: Callable[[], None], gone: Callable[[], None]
    ) -> None:
        self.lock = forks.open_lock()  # for whoever was asleep: in the child it takes it to say ForkedError
        self._transport = transport
        self._worker = worker
        self._sleepers: dict[Sleeper | Cot, int] = {}  # and what each has its socket polled for
        self._caretaker = Caretaker(self, transport, leaving, gone)
        self.attended = False
        """The worker knows of it."""
        self.changes = 0
        """Counted up by whoever is told something by the transport that a sleeper may wait for."""
        self.closing = False
        """The application is done with the session; a worker brings it to its end."""
        self.unattended = False
        """A handshake is under way and nobody may be waiting for it; a worker brings it to its end."""

    def mine(self) -> bool:
        """Whether this very thread holds it: a callback or a signal handler in the middle of a call.  Any thread."""
        return bool(self.lock._is_owned())

    def check(self) -> None:
        """RuntimeError if this thread holds it already.  To be called before it is taken."""
        if self.lock._is_owned():
            self.refuse()

    def refuse(self) -> None:
        """Raise that RuntimeError."""
        raise RuntimeError(
            "this session was called by a callback or a signal handler in the middle of one of its own calls"
        )

    def leave(self) -> None:
        """To be called last: what cannot wait for the next call goes to somebody who is there."""
        transport = self._transport
        if (
            self.closing
            or self.unattended
            or transport.again
            or transport.mask & Want.WRITE
            or transport.owes()
        ):
            self._delegate()

    def turn(self, ready: int = NOTHING) -> None:
        """Whatever is possible now, of everybody's, within a turn's budget; *ready* is what a poll said."""
        transport, changes = self._transport, self.changes
        try:
            transport.turn(ready, time.monotonic())
        except Exception as error:
            fail(transport, error, threading.current_thread().name)
        except BaseException as error:
            self.cut_short(error)
            raise
        if self._sleepers and (self.changes != changes or transport.finished):
            self.ring()

    def at_once(self, call: Callable[..., T], *arguments: Any) -> T:
        """*call* something of the transport.  If Ctrl-C or a bug cuts it short, the session is over."""
        try:
            return call(*arguments)
        except BaseException as error:
            self.cut_short(error)
            raise

    def cut_short(self, error: BaseException) -> None:
        """End the session: *error*, Ctrl-C or a bug, came in the middle of a call of the transport."""
        self._transport.end(cut_short_by(error))
        self.ring()

    def until(self, done: Callable[[], object], timeout: float | None) -> bool:
        """Take turns until *done*, at most *timeout* seconds (None: for ever); false if that was too short."""
        transport = self._transport
        give_up = deadline_after(timeout)
        if transport.runnable():
            self.turn()
        while not done():
            if give_up is not None and time.monotonic() >= give_up:
                return False
            self.turn(NOTHING if transport.again else self.sleep(give_up))
        return True

    def sleep(self, until: float | None) -> int:
        """Without the lease, until the transport may get on, or somebody rings, or the monotonic time *until*.

        For what the socket is ready.
        """
        transport = self._transport
        if transport.deadline is not None:
            until = transport.deadline if until is None else min(until, transport.deadline)
        timeout = None if until is None else time_left(until)
        sock = transport.sock
        mask = NOTHING if sock is None else transport.mask
        bed: Sleeper | Cot | None = my_sleeper()
        if bed is None:
            if ready := look(sock, mask):
                return ready
            bed = Cot()
            self._send_for_worker("wake")
        self._sleepers[bed] = mask
        bed.asleep = True  # from here on a signal handler takes another bed
        try:
            self.lock.release()
            ready = bed.sleep(sock, mask, timeout)
            self.lock.acquire()
        except BaseException:
            self._regain()  # the caller's ``with`` is going to release it
            raise
        finally:
            bed.asleep = False
            del self._sleepers[bed]
        return ready

    def _regain(self) -> None:
        """Hold the lock, whatever interrupts the wait for it: one interruption is on its way already."""
        while not self.mine():
            try:
                self.lock.acquire()
            except BaseException:
                pass

    def mend(self, settle: Callable[[bool], object]) -> None:
        """For a call that was interrupted, outside of its ``with``: do what it may have left undone.

        With the lease, *settle* is called, and told whether anybody sleeps.  After that this thread does not hold it.
        """
        self._regain()
        try:
            settle(bool(self._sleepers))
            if self._transport.started():
                self.turn()
            self.ring()
            self.leave()
        finally:
            let_go(self.lock)

    def command(self, method: str, *arguments: Any) -> None:
        """Call a method of the transport that is a command, and see how far it gets."""
        self._transport.now = time.monotonic()
        self.at_once(getattr(self._transport, method), *arguments)
        self.turn()

    def close(self, timeout: float | None, how: str) -> None:
        """Let everybody go who waits, and have a worker bring the session to its end, by *timeout* if sooner."""
        self.closing = True  # first: if the rest is interrupted, a worker sees to it
        if not self._transport.finished and (not self._transport.closing() or timeout is not None):
            self.command(how, timeout)
        self.ring()

    def abort(self, why: SessionEnded) -> None:
        """Let everybody go who waits, and end the session now."""
        self.closing = True
        if not self._transport.finished:
            self.command("abort", why)
        self.ring()

    def give_up(self, why: SessionEnded) -> None:
        """End the session, which no worker attends to any more: whoever leaves it last buries it."""
        self._caretaker.end(why, linger=False)
        self.attended = False
        self.leave()

    def post_close(self, how: str) -> None:
        """`close`, without the lease, which this very thread may hold.  Never waits."""
        self._send_for_worker(how)

    def ring(self) -> None:
        """Have every sleeper look again."""
        for sleeper in self._sleepers:
            sleeper.ring()

    def chores(self) -> int:
        """The mask of what must go on although nobody calls: NOTHING while the session may stay parked."""
        transport = self._transport
        if self.closing or self.unattended or transport.owes() or Cot in map(type, self._sleepers):
            return transport.mask
        return transport.mask & Want.WRITE

    def _delegate(self) -> None:
        """Somebody has to go on: a sleeper that polls for it already, or else the worker."""
        if self.closing and self._transport.finished and not self.attended:
            if not self._sleepers:
                self._caretaker.bury()
                self.attended = True
            return
        if not self.closing and not self._transport.again:
            chores = self.chores()
            if any(mask & chores == chores for mask in self._sleepers.values()):
                return
        self._send_for_worker("close" if self.closing else "wake")

    def _send_for_worker(self, what: str) -> None:
        self.attended = True
        self._worker.post(self._caretaker, what)


class Caretaker:
    """What a worker does for a leased session.  It belongs to the worker; it owns the transport for its turns only."""

    __slots__ = (
        "_gone",
        "_lease",
        "_leaving",
        "_transport",
        "again",
        "deadline",
        "finished",
        "lock",
        "mask",
        "now",
        "retired",
        "sock",
    )

    def __init__(
        self, lease: Lease, transport: Transport, leaving: Callable[[], None], gone: Callable[[], None]
    ) -> None:
        self._lease = lease
        self.lock = lease.lock
        self._transport = transport
        self._leaving = leaving
        self._gone = gone
        self.sock: socket.socket | None = None
        self.mask = NOTHING
        self.again = False
        self.deadline: float | None = None
        self.finished = False
        self.retired: list[socket.socket] = []
        self.now = 0.0

    def wake(self) -> None:
        """The command that brings it to its worker, and back to its mind; the step that follows does the work."""

    def close(self) -> None:
        """The command for a session whose turn the application is in the middle of: close it, by `Lease.close`."""
        self._lease.close(None, "close")

    def hang_up(self) -> None:
        """The command for a session that the application has lost."""
        self._lease.close(None, "hang_up")

    def turn(self, ready: int, now: float) -> bool:
        """One turn with the transport, and what to wait for after it."""
        lease, transport = self._lease, self._transport
        needed = not ready or transport.again or lease.chores()  # who had us poll may not wait any more
        if needed:
            lease.turn(ready)
        self.mask = lease.chores()
        self.sock = transport.sock
        self.deadline = transport.deadline if self.mask else None  # parked, it is nobody's
        self.again = transport.again
        self.finished = lease.closing and transport.finished and not lease._sleepers
        if self.finished:
            self._collect()
        return True

    def end(self, cause: SessionEnded, *, linger: bool = True) -> None:
        """The bridge is closed, or there was a bug: the end, whoever is in the middle of a call."""
        self._transport.end(cause, linger=linger)
        self._lease.closing = True
        self._lease.ring()

    @property
    def opening(self) -> bool:
        """As of the transport."""
        return self._transport.opening

    @property
    def moved(self) -> int:
        """How many bytes of plaintext the session has moved, in whoever's turns."""
        return self._transport.moved

    def evidence(self) -> tuple[object, ...]:
        """As of the transport."""
        with self._lease.lock:
            return self._transport.evidence()

    def stalled(self, turns: int, whose: str) -> None:
        """As of the transport; whoever sleeps looks again."""
        with self._lease.lock:
            self._transport.stalled(turns, whose)
            self._lease.ring()

    def gone(self) -> None:
        """The socket is closed."""
        self._gone()

    def bury(self) -> None:
        """With the lease: close what the transport has done with, without troubling a worker.

        To be called again if it was interrupted.
        """
        self.finished = True
        self._collect()
        for sock in self.retired:
            sock.close()
        self._gone()

    def _collect(self) -> None:
        self._leaving()
        self.retired += self._transport.retired
        self._transport.retired.clear()
        self.sock = None
