"""The seat at a worker's poll: its own thread's, or for a while that of a handler who would only wait for it.

Theory of operation
-------------------
A handler that finds its shared inbox empty waits for what a worker is going to read.  To be woken by the worker is a
hand-over, which costs more than reading.  So a handler that comes back quickly may sit down in the worker's place: it
sleeps in the very same poll and makes the very same steps, until one of them brings a message for it.  Then it gets up.

The seat is a lock.  Who holds it *is* the worker, asleep or awake, and owns all that the worker owns.  Nobody waits for
it: guests try it, and the worker's own thread looks now and then.

Nobody is evicted.  A handler whose last messages all came from one worker, who comes back quickly, and finds the worker
there, lies down in a bed that *asks*.  The step that brings its message has the worker leave the seat.  From then on
the thread of the worker *stands by*: every `ROUND` it looks who sits.  Nobody, and not since a moment: then the guest
has found something else to do, and the worker sits down again.  The same guest as last time: then he mostly is asleep,
and the worker sleeps too, until he gets up.  A guest that is about to wait for anything else gives up his seat first
(`bridge.threads.before_waiting`), for then nobody has to find out.

A guest leaves the handshakes of sessions that are not open yet to the worker, for they take milliseconds while his
message is waiting; likewise what is to go on without a poll, and the end of the worker.  He gets up then, and the
worker sits down.  In the middle of a step he counts as one that may come late: what others bring is for another handler
(`takes`).  He never is the main thread, for a signal handler may raise there in the middle of a step; nor a thread
whose stack is nearly full, for a step would fill it (`_deep`).
"""

from __future__ import annotations

import contextvars
import math
import sys
import threading
import time
from typing import Protocol

from bridge.crossing import Gate, deadline_after, time_left
from bridge.threads import this_thread

QUICK = 0.001
"""Seconds: who is back for the next message so soon may sit down; for who is away for longer nobody keeps the seat."""
STEADY = 8
"""Times in a row that the last message in the inbox was of one worker's, after which a handler may take its seat."""
ROUND = 0.002
"""Seconds after which the worker looks who sits in its place."""
FRAMES = 300
"""How many calls deep a step may go, with a codec of the application's and its log processors in it."""


class Host(Protocol):
    """The worker whose seat it is."""

    def step_in(self, timeout: float | None) -> bool:
        """A step as its own, by a guest; false if the next one is to be made by the worker's own thread."""

    def ring(self) -> None:
        """Wake who sleeps in its poll.  Any thread; never waits."""

    def asleep(self) -> bool:
        """Whether who sits there sleeps, or is about to.  Any thread."""


class Seat:
    """Of one worker, whose own thread sits there to begin with."""

    __slots__ = (
        "_asked",
        "_context",
        "_error",
        "_gate",
        "_guests",
        "_host",
        "_left",
        "_lock",
        "_looks",
        "_open",
        "_whose",
    )

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._lock.acquire()
        self._context = contextvars.Context()  # what is logged in the worker's place is not of a guest's
        self._gate = Gate()  # of the worker, standing by
        self._whose = 0  # the thread's that sits, or for which the empty seat is kept
        self._asked: int | None = None  # the thread that did
        self._open = False  # to guests
        self._looks = True  # the worker, every ROUND; written by it alone
        self._guests = 0  # how many there were
        self._left = 0.0  # when the last one got up
        self._error: BaseException | None = None

    def place(self) -> Gate | Guest:
        """Where a handler that is back quickly is to sleep: the seat, if it is free, or a bed that asks for it."""
        if _deep():
            self.give_up()
            return Gate()
        if self._open and self._lock.acquire(False):
            if self._open:
                self._whose = threading.get_ident()
                return Guest(self)
            self._lock.release()  # it was claimed just now
            self._gate.ring()
        return _Asking(self)

    def is_mine(self) -> bool:
        """Whether this very thread sits there."""
        return self._whose == threading.get_ident() and self._lock.locked()

    def give_up(self) -> None:
        """Let the worker sit down at once, if the seat is kept for this very thread."""
        if self._open and self._whose == threading.get_ident() and not self._lock.locked():
            self._left = -math.inf
            self._gate.ring()

    # The worker's own thread.

    def sit_down(self) -> None:
        """Before its first step."""
        self._whose = threading.get_ident()

    def offer(self, at_rest: bool) -> None:
        """After a step: leave the seat if somebody asked for it in this one, and come back when guests do not any more.

        Unless the worker is *at_rest*, there is no use in it.
        """
        asked, self._asked = self._asked, None
        if asked is not None and at_rest:
            self._whose, self._left = asked, time.monotonic()
            self._looks = self._open = True
            self._lock.release()
            self._stand_by()
            self._open, self._asked = False, None
            self._whose = threading.get_ident()
            if self._error is not None:
                raise self._error

    def _stand_by(self) -> None:
        guests = -1
        while True:
            self._gate.sleep(ROUND if self._looks else None)
            if self._lock.acquire(False):
                if not self._open or time.monotonic() - self._left > QUICK:
                    return
                self._lock.release()
                self._looks = True
            elif guests == self._guests:
                self._looks = False  # first, and then look again: a guest does it the other way round
                self._looks = not self._lock.locked()
            guests = self._guests

    # A guest.

    def sit(self, guest: Guest, timeout: float | None) -> None:
        """Be the worker until *guest* is rung, at most *timeout* seconds."""
        notes = this_thread.notes
        notes.serves_all = True
        self._guests += 1
        try:
            self._context.run(self._work, guest, deadline_after(timeout))
        except BaseException as error:  # a bug, and the worker's
            self._error, self._open = error, False
        notes.serves_all = False
        self._left = time.monotonic()
        self._lock.release()
        if not (self._open and self._looks):
            self._gate.ring()

    def _work(self, guest: Guest, deadline: float | None) -> None:
        while not guest.rung and (left := time_left(deadline)) != 0.0:
            if not self._host.step_in(left):
                self._open = False
                return


def _deep() -> bool:
    """Whether this thread could not call `FRAMES` deep any more."""
    try:
        sys._getframe(sys.getrecursionlimit() - FRAMES)
    except ValueError:  # it has not so many
        return False
    return True


class _Asking(Gate):
    """The bed of a handler that would rather sit."""

    __slots__ = ("_ident", "_seat")

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat
        self._ident = threading.get_ident()

    def ring(self) -> None:
        if self._seat.is_mine():  # who rings may leave the seat, and now it is of use
            self._seat._asked = self._ident
        super().ring()


class Guest:
    """A handler that sits: its bed is the seat."""

    __slots__ = ("_seat", "rung")

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self.rung = False

    def ring(self) -> None:
        """Have it get up, now or at its next sleep.  Any thread; never waits."""
        if not self.rung:
            self.rung = True  # first: the bell may be silenced by a step that is under way
            if not self._seat.is_mine():
                self._seat._host.ring()

    def takes(self) -> int:
        """How many messages may wait for the one that was rung, and for nobody else.  Any thread.

        In the middle of a step, which may be long, the first that this has brought, and none that come otherwise.
        """
        if self._seat.is_mine():
            return 1
        return sys.maxsize if self._seat._host.asleep() else 0

    def sleep(self, timeout: float | None) -> None:
        """Be the worker until rung, at most *timeout* seconds."""
        self._seat.sit(self, timeout)
