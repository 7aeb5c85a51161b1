"""What crosses between threads, and the locks of it.

Theory of operation
-------------------
Two kinds of thing cross.  *Words* go through a `Mailbox`: unbounded in form, but every word in it is
paid for elsewhere (a chunk of bytes by credit, a command by the one call that made it), so putting never
waits.  *Bytes* are bounded by credit: senders take it in `Outbox.put`, the only place where anybody waits
for room, and the owner of the socket gives it back when the kernel took the bytes.  An answer that its sender
has written itself (`Channel.answer`) costs none, unless the kernel did not take all of it; what is left is then
held as if it had been put first.  Readers' credit runs the other way: the owner takes it with each read and
stops reading when it is gone; it comes back when the application takes the message.

The lost wake-up cannot happen because a sleeper declares itself asleep and looks into its mailbox *under
one lock*, and a putter puts and looks for a sleeper under the same lock: whichever comes second sees the
other.  Only the first put after that rings, so a busy thread is never rung at all.

The locks here are held for a few assignments, never while waiting, never while calling out, and never two at
a time, except the byte counter of the whole bridge inside an outbox or an inbox.  (Two others are held for a
turn, a session's and the coordinator's, in this order by a receiver that reads for itself; others only try them.)
They are reentrant because finalizers and signal handlers come at any moment, also in the middle of another call of the
same thread.  A handler that raises (Ctrl-C) does so as a function is entered, a call returns, or a loop goes round: so
what must not be half done is done in a row of statements without any; what has been left undone is done by an
``except``; and nobody waits inside of a ``with``, which could not tell whether the lock was taken again.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from bridge import forks
from bridge.errors import (
    BridgeError,
    OperationTimeout,
    ReceiveTimeout,
    SendTimeout,
    SessionEnded,
    ShutDown,
    fresh,
)
from bridge.limits import check_timeout
from bridge.threads import check_may_wait

T = TypeVar("T")


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic time *timeout* seconds from now; None for never."""
    return None if timeout is None else time.monotonic() + timeout


def time_left(deadline: float | None) -> float | None:
    """Seconds until *deadline*, not negative and not too many for a lock."""
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


class Bed(Protocol):
    """What a thread sleeps in."""

    def ring(self) -> None:
        """Wake the sleeper, now or at its next sleep.  Any thread; never waits."""


class Gate:
    """A bed for a thread that has no sockets to poll."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the sleeper, now or at its next sleep.  Any thread; never waits."""
        try:
            self._lock.release()
        except RuntimeError:  # rung already
            pass

    def sleep(self, timeout: float | None) -> None:
        """Sleep until rung, at most *timeout* seconds."""
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))


def let_go(lock: Any) -> None:
    """Release *lock*, a reentrant one, as often as this thread has it: for who was interrupted, and cannot know."""
    while lock._is_owned():
        lock.release()


def check_not_held(lock: Any) -> None:
    """RuntimeError if this thread has *lock*, a reentrant one, and is about to wait for who needs it."""
    if lock._is_owned():
        raise RuntimeError("a signal handler may not wait for what it has interrupted")


def _surely(call: Callable[[], None]) -> None:
    """*call*, which may be called twice, also if Ctrl-C comes just now."""
    try:
        call()
    except BaseException:
        call()
        raise


def nobody(*_: object) -> None:
    """Does nothing: the one to call where there is no one, or no one any more who need be kept alive for it."""


class Latch(Generic[T]):
    """A value that is set once and waited for by any number of threads."""

    __slots__ = ("_gates", "_value")

    def __init__(self) -> None:
        self._gates: list[Gate] | None = []  # of whoever waits
        self._value: T | None = None

    def set(self, value: T) -> None:
        """Let everybody through.  Only the first value counts; to be called again if it was interrupted."""
        if self._value is None:
            self._value = value
        gates = self._gates
        if gates is not None:
            for gate in list(gates):
                gate.ring()
            self._gates = None

    def peek(self) -> T | None:
        """The value, or None while it is not set.  Any thread; never waits."""
        return self._value

    def wait(self, timeout: float | None, what: str) -> T:
        """The value, as soon as it is set.  OperationTimeout, naming *what*, after *timeout* seconds."""
        gates = self._gates
        if self._value is None and gates is not None:
            check_may_wait()
            gate = Gate()
            try:
                gates.append(gate)  # first, and then look again: `set` does it the other way round
                if self._value is None:
                    gate.sleep(timeout)
            finally:
                gates.remove(gate)
        if self._value is None:
            raise OperationTimeout(f"{what} within {timeout:g} seconds")
        return self._value


class Mailbox(Generic[T]):
    """Words for one thread.  `put` from any thread, also from a finalizer; the rest is the owner's."""

    __slots__ = ("_asleep", "_items", "_lock", "_ring")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._items: list[T] = []
        self._asleep = False
        self._ring = ring

    def put(self, *items: T) -> None:
        """Add *items*, in this order and with nothing between them.  Never waits."""
        try:
            with self._lock:
                self._items.extend(items)
                asleep = self._asleep
                self._asleep = False
            if asleep:
                self._ring()
        except BaseException:  # Ctrl-C, and nobody knows where: a ring too many does no harm
            self._ring()
            raise

    def take(self) -> list[T]:
        """All there is."""
        with self._lock:
            items = self._items
            self._items = []
        return items

    def may_sleep(self) -> bool:
        """Whether the owner may go to sleep: nothing is here, and the next put will ring."""
        with self._lock:
            self._asleep = not self._items
            return self._asleep

    def awake(self) -> None:
        """The owner is up again: no need to ring."""
        self._asleep = False


class Tally:
    """A count that many threads change: bytes a whole bridge holds one way, sessions, handshakes."""

    __slots__ = ("_limit", "_lock", "used")

    def __init__(self, limit: int) -> None:
        self._lock = threading.RLock()
        self._limit = limit
        self.used = 0

    def add(self, count: int) -> None:
        """Count *count* in (or, negative, out).  Any thread."""
        with self._lock:
            self.used += count

    def take_one(self) -> bool:
        """Count one in, if the limit is not reached; whether it was not.  Any thread."""
        with self._lock:
            room = self.used < self._limit
            self.used += room
        return room

    def has_room(self) -> bool:
        """Whether the limit is not reached.  Any thread."""
        return self.used < self._limit

    def follow(self, reported: int, now: int) -> int:
        """One of the counts that make this one is *now*: report that, if it matters.  What is reported then."""
        if reported == now or (now and -TALLY_STEP < now - reported < TALLY_STEP):
            return reported
        self.add(now - reported)
        return now


TALLY_STEP = 4096
"""A session reports to its bridge's `Tally` when it has changed by so much, or is empty: not at each message."""


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
        "_moved",
        "_notify",
        "_pending",
        "_reported",
        "_tally",
        "_waiting",
    )

    def __init__(self, limit: int, tally: Tally, notify: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._moved: threading.Condition | None = None  # made for the first who flushes
        self._flushing = 0
        self._pending: list[bytes] = []
        self._waiting: collections.deque[_Ticket] | None = None  # first come, first served
        self._limit = limit
        self._tally = tally
        self._reported = 0  # to the tally
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
        try:
            with self._lock:
                if self._closed is not None:
                    raise fresh(self._closed)
                if not size:
                    return True
                if self._held and (self._waiting or not self._fits(size)):
                    ticket = _Ticket(data, alone)
                    self._line_up(ticket)
                else:
                    first = self._accept(data, size)
            if ticket is not None:
                return self._wait_for_room(ticket, timeout)
            if first:
                self._notify()
        except BridgeError:
            raise
        except BaseException:  # Ctrl-C, and nobody knows where: a word too many does no harm
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
        if self._reported or self._held >= TALLY_STEP:
            self._reported = self._tally.follow(self._reported, self._held)

    def _sleep(self, timeout: float | None) -> bool:
        """Wait, with the lock held, for bytes to leave or for the end; False if neither came in time."""
        check_may_wait()
        if self._moved is None:
            self._moved = threading.Condition(self._lock)
        self._flushing += 1
        try:
            return timeout != 0.0 and self._moved.wait(timeout)
        finally:
            self._flushing -= 1

    def _wake_flushing(self) -> None:
        if self._flushing:
            assert self._moved is not None
            self._moved.notify_all()

    def _line_up(self, ticket: _Ticket) -> None:
        check_may_wait()
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
        deadline = deadline_after(timeout)
        with self._lock:
            target = self._accepted
            while (behind := target - self._gone) > 0:
                if self._lost is not None:
                    raise fresh(self._lost)
                if not self._sleep(time_left(deadline)) and self._gone < target and self._lost is None:
                    raise OperationTimeout(f"flush: {behind} bytes had not left within {timeout:g} seconds")

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
        return not self._fits(1)

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


class ReadCredit:
    """How much more one session may read before the application takes what is there.

    The owner of the socket `spend`s, the inbox charges what messages cost and gives it back as they are taken.
    When the owner stops for want of credit, the change that makes enough room calls *resume*, once.

    What was read and has not come to the coordinator yet is the difference of two counts, each with one writer, so
    the owner needs no lock for it; the rest is guarded by the lock of the inbox, which holds it then anyway.
    """

    __slots__ = (
        "_decoded",
        "_forfeit",
        "_limit",
        "_lock",
        "_paused",
        "_read",
        "_reported",
        "_resume",
        "_tally",
        "_used",
        "kept",
    )

    def __init__(self, limit: int, tally: Tally, resume: Callable[[], None], inbox: Inbox) -> None:
        self._lock = inbox._lock
        self._limit = limit
        self._tally = tally
        self._resume = resume
        self._read = 0  # bytes since the beginning; the owner alone counts them
        # Guarded by the lock.
        self._decoded = 0  # of these, with the coordinator
        self._used = 0  # what the messages in the inbox cost
        self._reported = 0  # to the tally
        self._paused = False
        self._forfeit = False
        self.kept = 0

    # Called by the owner of the socket.

    def room(self) -> int:
        """How many bytes may be read.  If none, the owner will be called back."""
        held = self._read - self._decoded + self._used  # in this order: what moves just now counts twice
        if not held or (held < self._limit and self._tally.has_room()):
            return self._limit - held
        with self._lock:
            self._paused = self.held() > 0
            return 0 if self._paused else self._limit

    def spend(self, count: int) -> None:
        """*count* bytes were read."""
        self._read += count
        if self._read - self._decoded >= TALLY_STEP:
            with self._lock:
                self._report()

    # Called by the coordinator.

    def settle(self, count: int) -> None:
        """*count* bytes were read that cost nothing: they are part of a message, or nobody wants them."""
        with self._lock:
            resume = self._charge(count, 0)
        if resume:
            self._resume()

    def keep(self, count: int) -> None:
        """The codec holds *count* bytes of a message that is not whole.

        They count for the whole bridge, and not for this session: only by reading on can it get rid of them.
        """
        with self._lock:
            self._tally.add(count - self.kept)
            self.kept = count

    def conclude(self) -> None:
        """Nothing more will be read: the codec holds nothing, and there is nobody to be called back."""
        self.keep(0)
        self._resume = nobody

    def forfeit(self) -> None:
        """Nobody will ever take what is in the inbox."""
        with self._lock:
            self._charge(0, -self._used)
            self._forfeit = True

    # Called by any thread.

    def settled(self) -> bool:
        """Whether all that was read has been decoded, so that what is read next may be decoded next."""
        return self._read == self._decoded

    def held(self) -> int:
        """What is read and not taken, in bytes."""
        return -self._decoded + self._read + self._used  # in this order it is never less than nothing

    def overdraft(self) -> int:
        """By how much more was read than may be."""
        return self.held() - self._limit

    # Called with the lock.

    def _charge(self, count: int, cost: int) -> bool:
        """Of what was read, *count* bytes have become messages that cost *cost*.  Whether to resume reading."""
        self._decoded += count
        if not self._forfeit:
            self._used += cost
        if self._reported or self._used >= TALLY_STEP:
            self._report()
        if not self._paused or self.held() > self._limit // 2:
            return False
        self._paused = False
        return True

    def _report(self) -> None:
        self._reported = self._tally.follow(self._reported, self.held())


Entry = tuple[Any, Any, "ReadCredit | None", int, "Callable[[], None] | None"]
"""One message on its way to the application: session, message, the credit and how much of it comes back when
the message is taken, and what to call when the handler comes back for the next one."""


class _Turn:
    """The turn that one handler thread has with one session: until it comes back, or the thread ends."""

    __slots__ = ("_inbox", "done", "session")

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.session: object = None
        self.done: Callable[[], None] | None = None

    def end(self) -> None:
        """Let another handler have the session; close it, if it has ended."""
        done, self.done = self.done, None
        if done is not None:
            done()
        if self.session is not None:
            with self._inbox._lock:
                self._inbox._release(self)
                self._inbox._call()

    def __del__(self) -> None:
        if hasattr(self, "done") and not forks.abandoned(self._inbox._born):  # or Ctrl-C came as it was made
            self.end()


class Inbox:
    """Messages of any number of sessions, for any number of handler threads.

    `get` returns ``(session, message)``, and ``(session, None)`` once when the session has ended
    (`session.end` says how).  The messages of one session go to one handler at a time, in order: the next
    one waits until the thread that took the last comes back for more, calls `task_done`, or ends.  So a pool
    does not reorder a session's answers, and a session that stalls holds one handler and no more.

    It is bounded by the sessions' read credit: a session whose messages are not
    taken stops reading, and the others go on.  Otherwise as `queue.Queue`; when every Bridge that feeds it
    is closed and all is taken, `get` raises ShutDown.

    A handler that has been given ``(session, None)`` may still send (the peer may have closed only its
    half).  When it comes back for the next message it is done, and the session is closed for it.
    """

    _in_turns = True
    """Whether each session has one handler at a time."""

    def __init__(self) -> None:
        # Of each session at most one entry is ready or in a handler's hands; the others wait behind it.
        self._entries: collections.deque[Entry] = collections.deque()
        self._behind: dict[object, collections.deque[Entry] | None] = {}
        self._waiting = 0  # how many those are
        self._lock = threading.RLock()
        self._sleepers: collections.deque[Bed] = collections.deque()  # first come, first woken
        self._called: Bed | None = None  # who was woken for what is here, and has not come yet
        self._over: Exception | None = None
        self._feeders = 0
        self._handler = threading.local()
        self._born = forks.generation()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next ``(session, message)``.  Any thread.

        Raises ReceiveTimeout (a `queue.Empty` and a `TimeoutError`) if nothing arrived within *timeout*
        seconds, or at once if *block* is false; ShutDown after the end.
        """
        if self._born != forks.current:
            forks.check(self._born)
        if timeout is not None:
            check_timeout("timeout", timeout)
        try:
            turn: _Turn = self._handler.turn
        except AttributeError:
            turn = self._handler.turn = _Turn(self)
        if turn.done is not None:
            turn.end()
        if not block:
            timeout = 0.0
        entry = self._next(timeout, deadline_after(timeout), turn)
        return entry[0], entry[1]

    def task_done(self) -> None:
        """This thread is done with the message it got last; the session's next may go to any handler.

        `get` implies it.  Only a thread that goes on to something else has to call it.
        """
        turn = getattr(self._handler, "turn", None)
        if turn is not None:
            turn.end()

    def get_nowait(self) -> Any:
        """`get`, without waiting."""
        return self.get(block=False)

    def put(self, item: tuple[Any, Any]) -> None:
        """Add *item*, a pair, as if its session had delivered it: a word to the handlers.  Never waits.

        If its session is None, it is a word to any handler, and waits for no other.
        """
        session, message = item
        self._deliver(session, [message], None, 0, 0)

    def qsize(self) -> int:
        """How many messages are waiting."""
        return len(self._entries) + self._waiting

    def empty(self) -> bool:
        """Whether nothing is waiting."""
        return not self.qsize()

    def full(self) -> bool:
        """False: room is counted in bytes and for each session."""
        return False

    def shutdown(self) -> None:
        """After what is waiting, `get` raises ShutDown in every thread (as `queue.Queue.shutdown`)."""
        self._finish(ShutDown("the inbox was shut down"))

    def _next(self, timeout: float | None, deadline: float | None, turn: _Turn | None) -> Entry:
        """The next entry, which has left; with *turn*, in place of the one that its thread was given last."""
        entry, resume = None, None
        try:
            while entry is None:
                with self._lock:
                    if turn is not None and turn.session is not None:
                        self._release(turn)
                    if self._entries:
                        entry = self._entries[0]
                        if turn is not None:
                            turn.session, turn.done = entry[0], entry[4]
                        del self._entries[0]
                        resume = self._taken(entry)
                if entry is None:
                    self._wait(timeout, deadline)
        except BaseException:
            self._pass_on()
            raise
        if resume is not None:
            _surely(resume)
        return entry

    def _wait(self, timeout: float | None, deadline: float | None) -> None:
        """Until there may be a message.  ReceiveTimeout after the *deadline*, *timeout* seconds after it was set."""
        gate = Gate()
        try:
            with self._lock:
                if self._entries:
                    return
                if self._over is not None and not self._waiting:
                    raise fresh(self._over)
                left = time_left(deadline)
                if left == 0.0:
                    raise ReceiveTimeout(f"no message within {timeout or 0:g} seconds")
                check_may_wait()
                self._sleepers.append(gate)
            check_not_held(self._lock)
            gate.sleep(left)
            with self._lock:
                self._rise(gate)
        except BaseException:  # Ctrl-C, and nobody knows where
            with self._lock:
                self._rise(gate)
            raise

    def _pass_on(self) -> None:
        """Who was woken takes nothing, be it for Ctrl-C: somebody else shall have what is here."""
        with self._lock:
            self._call()

    def _taken(self, entry: Entry) -> Callable[[], None] | None:
        """With the lock: *entry* has left, and with it what it cost.  What is to be called without the lock."""
        if self._sleepers:
            self._call()
        credit = entry[2]
        return credit._resume if credit is not None and credit._charge(0, -entry[3]) else None

    def _call(self) -> None:
        """With the lock: wake the next sleeper for what is here, if none is on its way.

        One at a time, for whoever takes something and leaves something calls the next.  So of a large pool no more are
        up than have something to do; a message each would wake all of them for what one can do.
        """
        if self._entries and self._sleepers and self._called is None:
            bed = self._sleepers[0]
            bed.ring()  # first: a ring too many does no harm
            self._called = bed
            del self._sleepers[0]

    def _rise(self, bed: Bed) -> bool:
        """With the lock: nobody sleeps in *bed* any more.  Whether nobody has woken it."""
        if self._called is bed:
            self._called = None
        if bed not in self._sleepers:
            return False
        self._sleepers.remove(bed)
        return True

    def _wake_all(self) -> None:
        while self._sleepers:
            self._sleepers[0].ring()
            del self._sleepers[0]

    # Called by the coordinator, and by the wiring.

    def _deliver(
        self,
        session: Any,
        messages: list[Any],
        credit: ReadCredit | None,
        size: int,
        share: int,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Put *messages* in, which *size* bytes of *credit* have become, and each of which is to cost *share*."""
        if not self._in_turns:
            session = None
        with self._lock:
            resume = credit is not None and credit._charge(size, share * len(messages))
            for message in messages:
                if session not in self._behind:
                    self._entries.append((session, message, credit, share, done))
                    if session is not None:
                        self._behind[session] = None
                else:
                    behind = self._behind[session]
                    if behind is None:
                        behind = self._behind[session] = collections.deque()
                    behind.append((session, message, credit, share, done))
                    self._waiting += 1
            if self._sleepers:
                self._call()
        if resume:
            assert credit is not None
            credit._resume()

    def _release(self, turn: _Turn) -> None:
        """A handler's *turn* is over, so the session's next entry is ready."""
        session = turn.session
        behind = self._behind[session]
        if behind:
            self._entries += (behind[0],)
            del behind[0]
            self._waiting -= 1
        else:
            del self._behind[session]
        turn.session = None
        if self._over is not None:
            self._wake_all()

    def _finish(self, why: Exception) -> None:
        with self._lock:
            self._over = self._over or why
            self._wake_all()

    def _attach(self) -> None:
        with self._lock:
            self._feeders += 1
            self._over = None

    def _detach(self) -> None:
        with self._lock:
            self._feeders -= 1
            if self._feeders:
                return
        self._finish(ShutDown("every Bridge that fed this inbox is closed"))

    def _end(self, session: Any, why: SessionEnded, opened: bool, done: Callable[[], None]) -> None:
        """A session that feeds this inbox has ended."""
        if opened:  # one that never opened was never here: its `connect` raises, its listener logs
            self._deliver(session, [None], None, 0, 0, done)


class SessionInbox(Inbox):
    """One session's own inbox: `get` returns just the message, and raises the cause after the end."""

    _in_turns = False  # its receivers take whatever is next

    def __init__(self) -> None:
        super().__init__()
        self.attend: Callable[[SessionInbox, float | None], bool] | None = None
        """What brings messages in on the thread of a receiver that would wait for them; false if it may not."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message.  Any thread.  ReceiveTimeout, or how the session ended."""
        if not block:
            timeout = 0.0
        deadline = deadline_after(timeout) if self._entries else self._fetch(timeout)
        return self._next(timeout, deadline, None)[1]

    def peek(self, timeout: float | None = None) -> Any:
        """As `get`, and the message stays the next one."""
        deadline = self._fetch(timeout)
        try:
            while True:
                with self._lock:
                    if self._entries:
                        return self._entries[0][1]
                self._wait(timeout, deadline)
        finally:
            self._pass_on()  # this wake-up takes nothing

    def _fetch(self, timeout: float | None) -> float | None:
        """Bring a message in, if that is possible within *timeout* seconds.  When these are over."""
        deadline = deadline_after(timeout)
        while not self._entries and timeout != 0.0 and (attend := self.attend) and attend(self, timeout):
            timeout = time_left(deadline)
        return deadline

    def lie_down(self, bed: Bed) -> bool:
        """From now on whatever comes rings *bed*; False if something is here, or somebody else waits for it."""
        with self._lock:
            if self._entries or self._sleepers or self._over is not None:
                return False
            self._sleepers.append(bed)
            return True

    def get_up(self, bed: Bed, in_vain: bool = False) -> bool:
        """No longer.  Whether nothing has come; if so *in_vain*, it is for the next sleeper."""
        with self._lock:
            asleep = self._rise(bed)
            if in_vain and not asleep:
                self._call()
            return asleep

    def _end(self, session: Any, why: SessionEnded, opened: bool, done: Callable[[], None]) -> None:
        self.attend = None
        self._finish(why)


class Registry(Generic[T]):
    """The members of something, until it is sealed, and what those that have left add up to.  Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # for signal handlers and finalizers come at any moment
        self._members: dict[T, None] = {}
        self._left: dict[tuple[str, ...], float] = {}
        self._sealed = False

    def add(self, member: T) -> bool:
        """One more; False, and nothing done, if it is too late."""
        with self._lock:
            if not self._sealed:
                self._members[member] = None
            return not self._sealed

    def remove(self, member: T, account: dict[tuple[str, ...], float] | None = None) -> bool:
        """One less, whose counts are kept.  Whether it was a member."""
        with self._lock:
            found = member in self._members
            if found:
                del self._members[member]
                for key, count in (account or {}).items():
                    self._left[key] = self._left.get(key, 0) + count
        return found

    def census(self) -> tuple[list[T], dict[tuple[str, ...], float]]:
        """Who is a member, and the counts of all that have left: nobody is in both, or in neither."""
        with self._lock:
            return list(self._members), dict(self._left)

    def seal(self) -> list[T]:
        """From now on nothing is added.  Who is a member."""
        with self._lock:
            self._sealed = True
            return list(self._members)

    def __contains__(self, member: T) -> bool:
        return member in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter(list(self._members))
