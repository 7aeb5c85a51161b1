"""The way of a session's bytes from its senders to the owner of its socket, and the credit that bounds it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from bridge.crossing import (
    TALLY_STEP,
    Gate,
    Tally,
    check_not_held,
    deadline_after,
    let_go,
    nobody,
    time_left,
)
from bridge.errors import BridgeError, OperationTimeout, SendTimeout, SessionEnded, fresh
from bridge.threads import before_waiting


class _Ticket:
    """A message whose sender waits for room.  Guarded by the outbox's lock, but for the gate."""

    __slots__ = ("alone", "data", "gate", "outcome")

    def __init__(self, data: bytes, alone: bool) -> None:
        self.data = data
        self.alone = alone  # its sender would rather have the outbox to itself
        self.gate = Gate()
        self.outcome: bool | None = None  # what `Outbox.put` is to answer


class Outbox:
    """What one session's senders have handed over and the kernel has not yet taken.

    Senders `put`, in the order they came; the coordinator `take`s; the owner of the socket gives credit
    back.  A message larger than the whole budget goes when it is alone.
    """

    __slots__ = (
        "_accepted",
        "_closed",
        "_flushing",
        "_gone",
        "_held",
        "_limit",
        "_lock",
        "_lost",
        "_notify",
        "_pending",
        "_tally",
        "_waiting",
        "reported",
    )

    def __init__(self, limit: int, tally: Tally, notify: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._flushing: tuple[tuple[int, Gate], ...] = ()  # up to which byte, and who waits for that
        self._pending: list[bytes] = []
        self._waiting: collections.deque[_Ticket] | None = None  # first come, first served
        self._limit = limit
        self._tally = tally
        self.reported = 0  # to the tally
        self._notify = notify
        self._accepted = 0  # bytes, since the beginning
        self._gone = 0  # of these, with the kernel; less what is ahead of them and is not
        self._held = 0  # accepted, and neither with the kernel nor lost
        self._closed: SessionEnded | None = None  # why nothing more is accepted
        self._lost: SessionEnded | None = None  # why what is held will never leave

    # Called by any application thread.

    def put(self, data: bytes, timeout: float | None, alone: bool = False) -> bool:
        """Hand over *data* whole, or raise and have handed over nothing.

        Waits for room at most *timeout* seconds (None: for ever), then raises SendTimeout; raises the cause
        when the session ended or this side closed it.  With *alone*: False, and nothing handed over, if it had to wait
        and nothing is ahead of it any more, nor behind it: there may be a shorter way.
        """
        size, ticket, first = len(data), None, False
        lock, nested = self._lock, self._lock._is_owned()  # type: ignore[attr-defined]
        try:
            lock.acquire()  # a ``with`` takes CPython twice as long
            try:
                closed = self._closed
                if closed is not None or not size:
                    pass
                elif self._held and (self._waiting or not self._fits(size)):
                    if timeout != 0.0:
                        before_waiting()
                    ticket = _Ticket(data, alone)
                    self._line_up(ticket)
                else:
                    first = self._accept(data, size)
            finally:
                lock.release()
            if closed is not None:
                raise fresh(closed)
            if ticket is not None:
                return self._wait_for_room(ticket, timeout)
            if first:
                self._notify()
        except BaseException as error:
            if not nested:
                let_go(lock)
            if not isinstance(error, BridgeError):
                # Ctrl-C, and nobody knows where: a word too many does no harm.
                if ticket is not None:
                    self._withdraw(ticket)
                self._notify()
            raise
        return True

    def _accept(self, data: bytes, size: int, ticket: _Ticket | None = None) -> bool:
        """Hold *data*, whose *ticket* is the first in line; whether it is all that the coordinator has to take."""
        first = not self._pending
        self._accepted += size
        self._held += size
        self._pending += (data,)
        if ticket is not None:
            ticket.outcome = True
            del self._waiting[0]  # type: ignore[union-attr]
        self._report()
        return first

    def _fits(self, size: int) -> bool:
        return not self._held or (self._held + size <= self._limit and self._tally.has_room())

    def _change(self, count: int) -> None:
        self._held += count
        self._report()

    def _report(self) -> None:
        if self.reported or self._held >= TALLY_STEP:
            self._tally.follow(self, self._held)

    def _line_up(self, ticket: _Ticket) -> None:
        if self._waiting is None:
            self._waiting = collections.deque()
        self._waiting.append(ticket)

    def _wait_for_room(self, ticket: _Ticket, timeout: float | None) -> bool:
        """Without the lock, until whoever makes room takes the message out of its sender's hands."""
        check_not_held(self._lock)
        ticket.gate.sleep(timeout)
        self._withdraw(ticket)
        if ticket.outcome is None:
            if self._closed is not None:
                raise fresh(self._closed)
            raise SendTimeout(
                f"no room for {len(ticket.data)} bytes within {timeout or 0:g} seconds; nothing was sent"
            )
        return ticket.outcome

    def _withdraw(self, ticket: _Ticket) -> None:
        """Its sender waits no more.  There may be room by now, just not enough to wake anybody for."""
        notify = False
        with self._lock:
            if self._waiting and ticket in self._waiting:
                notify = self._grant(self._limit)
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                    notify |= self._grant(self._limit)  # the next in line may be smaller
        if notify:
            self._notify()

    def _grant(self, most: int) -> bool:
        """Take what waits and has room now, unless *most* bytes are held; whether to notify."""
        waiting, before = self._waiting, len(self._pending)
        while waiting and self._held <= most:
            ticket = waiting[0]
            alone = ticket.alone and len(waiting) == 1
            if self._held if alone else not self._fits(len(ticket.data)):
                break
            ticket.gate.ring()  # first; its sender waits for the lock then
            if not alone:
                self._accept(ticket.data, len(ticket.data), ticket)
            else:
                ticket.outcome = False
                del waiting[0]
        return not before and bool(self._pending)

    def flush(self, timeout: float | None) -> None:
        """Wait until the kernel has every byte handed over before this call.

        OperationTimeout after *timeout* seconds; the cause, if the session ended before that.
        """
        check_not_held(self._lock)
        deadline, flusher = deadline_after(timeout), (self._accepted, Gate())
        try:
            while not self._has_left(flusher, timeout, deadline):
                flusher[1].sleep(time_left(deadline))
        finally:
            with self._lock:
                self._flushing = tuple(one for one in self._flushing if one is not flusher)

    def _has_left(self, flusher: tuple[int, Gate], timeout: float | None, deadline: float | None) -> bool:
        """Whether that many bytes have.  If not, the gate is rung when they have, or when they never will."""
        with self._lock:
            behind, lost, left = flusher[0] - self._gone, self._lost, time_left(deadline)
            if behind > 0 and lost is None and left != 0.0:
                before_waiting()
                if flusher not in self._flushing:
                    self._flushing += (flusher,)
        if behind > 0 and lost is not None:
            raise fresh(lost)
        if behind > 0 and left == 0.0:
            raise OperationTimeout(f"flush: {behind} bytes had not left within {timeout:g} seconds")
        return behind <= 0

    def _wake_flushing(self) -> None:
        if self._flushing:
            last = self._gone if self._lost is None else self._accepted
            for target, gate in self._flushing:
                if target <= last:
                    gate.ring()
            self._flushing = tuple(one for one in self._flushing if one[0] > last)

    def held(self) -> int:
        """Bytes accepted and not yet taken by the kernel."""
        return self._held

    @property
    def closed(self) -> bool:
        """Whether nothing more is accepted."""
        return self._closed is not None

    def idle(self) -> bool:
        """Whether more is accepted, and nothing is ahead of it."""
        return not self._held and self._closed is None

    def full(self) -> bool:
        """Whether even one more byte would have to wait."""
        return bool(self._waiting) or not self._fits(1)

    # Called by whoever has the session's transport, for a message that did not go this way.

    def hold(self, size: int) -> None:
        """*size* bytes, ahead of all others, were handed to the transport and have not left yet."""
        with self._lock:
            self._gone -= size  # whoever flushes what was put meanwhile has these to wait for as well
            self._change(size)

    # Called by the coordinator.

    def take(self) -> list[bytes]:
        """Everything accepted since the last call, in order."""
        with self._lock:
            pending = self._pending
            self._pending = []
        return pending

    # Called by the owner of the socket.

    def give_back(self, count: int) -> None:
        """The kernel took *count* bytes."""
        with self._lock:
            self._gone += count
            self._change(-count)
            notify = bool(self._waiting) and self._grant(self._limit // 2)  # enough to be worth the wake-ups
            self._wake_flushing()
        if notify:
            self._notify()

    # Called by any thread.

    def close(self, why: SessionEnded) -> bool:
        """Accept no more; waiting senders raise *why*.  What was accepted still leaves.  Whether this is news."""
        with self._lock:
            first = self._closed is None
            self._turn_away(why)
        return first

    def discard(self, why: SessionEnded) -> int:
        """Accept no more, and what is held will never leave.  How many bytes that is."""
        with self._lock:
            self._turn_away(why)
            self._lost = self._lost or why
            lost = self._held
            self._pending = []
            self._change(-lost)
            self._wake_flushing()
            self._notify = nobody
        return lost

    def _turn_away(self, why: SessionEnded) -> None:
        self._closed = self._closed or why
        while self._waiting:
            self._waiting[0].gate.ring()
            del self._waiting[0]
