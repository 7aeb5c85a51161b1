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

The locks here, of outboxes and of inboxes are held for a few assignments, never while waiting, never while calling out,
and never two at a time, except the byte counter of the whole bridge inside an outbox or an inbox.  (Some others are
held for a turn, a session's and the coordinator's, in this order by a receiver that reads for itself; others only try
them; a worker's seat is only ever tried.)  They are reentrant: finalizers and signal handlers come at any moment,
also in the middle of another call of the same thread.  A handler that raises (Ctrl-C) does so as a function is entered,
a call returns, or a loop goes round, and on Python 3.10 where any jump is taken: so what must not be half done is done
in a row of statements without any; what has been left undone is done by an ``except``; and nobody waits inside of a
``with``, which could not tell whether the lock was taken again.  Where each message comes by, a lock is taken and let
go by two calls, for a ``with`` takes CPython twice as long; an ``except`` lets go of it once more, unless it was held
before.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from bridge import forks
from bridge.errors import OperationTimeout
from bridge.threads import before_waiting

A_WHILE = 1.0
"""Seconds after which a thread that waits for a lock looks whether this is still the process that it began in."""
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


def take(lock: Any, born: int, timeout: float | None = None) -> bool:
    """Acquire *lock*, which is held for a turn; false if that takes *timeout* seconds.

    ForkedError if it belongs to a thread of the parent: a signal handler has forked in the middle of this, and here is
    the child.
    """
    deadline = deadline_after(timeout)
    while (left := time_left(deadline)) != 0.0:
        if lock.acquire(timeout=A_WHILE if left is None else min(A_WHILE, left)):
            return True
        forks.check(born)
    return False


def check_not_held(lock: Any) -> None:
    """RuntimeError if this thread has *lock*, a reentrant one, and is about to wait for who needs it."""
    if lock._is_owned():
        refuse_to_wait()


def refuse_to_wait() -> None:
    """Raise that RuntimeError."""
    raise RuntimeError("a signal handler may not wait for what it has interrupted")


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
            before_waiting()
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

    __slots__ = ("_items", "_lock", "_ring", "asleep")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._items: list[T] = []
        self.asleep = False
        """The owner is, or is about to be: the next put rings."""
        self._ring = ring

    def put(self, *items: T) -> None:
        """Add *items*, in this order and with nothing between them.  Never waits."""
        try:
            with self._lock:
                self._items.extend(items)
                asleep = self.asleep
                self.asleep = False
            if asleep:
                self._ring()
        except BaseException:  # Ctrl-C, and nobody knows where: a ring too many does no harm
            self._ring()
            raise

    def take(self) -> list[T]:
        """All there is."""
        if not self._items:
            return []
        with self._lock:
            items = self._items
            self._items = []
        return items

    def __len__(self) -> int:
        return len(self._items)

    def may_sleep(self) -> bool:
        """Whether the owner may go to sleep: nothing is here, and the next put will ring."""
        with self._lock:
            self.asleep = not self._items
            return self.asleep

    def awake(self) -> None:
        """The owner is up again: no need to ring."""
        self.asleep = False


class Reporter(Protocol):
    """Whose count is one of those that make a `Tally`, which notes here what it knows of it."""

    reported: int


class Keeper(Protocol):
    """Who holds back bytes that count in a `Tally`, to the byte."""

    kept: int


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

    def keep(self, keeper: Keeper, count: int) -> None:
        """*keeper* holds *count* back from now on."""
        with self._lock:
            self.used += count - keeper.kept
            keeper.kept = count

    def has_room(self) -> bool:
        """Whether the limit is not reached.  Any thread."""
        return self.used < self._limit

    def follow(self, member: Reporter, now: int) -> None:
        """The count of *member*, one of those that make this one, is *now*: note that, if it matters."""
        if member.reported == now or (now and -TALLY_STEP < now - member.reported < TALLY_STEP):
            return
        with self._lock:
            self.used += now - member.reported
            member.reported = now


TALLY_STEP = 4096
"""A session reports to its bridge's `Tally` when it has changed by so much, or is empty: not at each message."""


class Registry(Generic[T]):
    """The members of something, until it is sealed, and what those that have left add up to.  Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # for signal handlers and finalizers come at any moment
        self._members: dict[T, None] = {}
        self._left: dict[tuple[str, ...], float] = {}
        self.sealed = False

    def add(self, member: T, most: Callable[[], float] = lambda: math.inf) -> bool:
        """One more, if there are not *most* yet; False, and nothing done, if there are, or it is too late."""
        with self._lock:
            admitted = not self.sealed and len(self._members) < most()
            if admitted:
                self._members[member] = None
            return admitted

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
            self.sealed = True
            return list(self._members)

    def __contains__(self, member: T) -> bool:
        return member in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter(list(self._members))
