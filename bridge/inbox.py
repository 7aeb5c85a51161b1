"""The way of messages from the coordinator to the threads that take them, and the credit that bounds it."""

from __future__ import annotations

import collections
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from bridge import forks
from bridge.crossing import (
    TALLY_STEP,
    Bed,
    Gate,
    Tally,
    deadline_after,
    let_go,
    nobody,
    refuse_to_wait,
    time_left,
)
from bridge.errors import ReceiveTimeout, SessionEnded, ShutDown, fresh
from bridge.limits import check_timeout
from bridge.seat import QUICK, STEADY, Guest, Seat
from bridge.threads import before_waiting, check_may_wait, give_up_seat, this_thread


class ReadCredit:
    """How much more one session may read before the application takes what is there.

    The owner of the socket `spend`s, the inbox charges what messages cost and gives it back as they are taken.
    When the owner stops for want of credit, the change that makes enough room calls *resume*, once.

    What was read and has not come to the coordinator yet is the difference of two counts, each with one writer, so
    the owner needs no lock for it; the rest is guarded by the lock of the inbox, which holds it then anyway.

    A byte may become a message, which costs 64 times as much.  So where bytes can become many messages it is read
    *stepwise*: a record, and no more before the coordinator has said what has become of it.
    """

    __slots__ = (
        "_decoded",
        "_forfeit",
        "_limit",
        "_lock",
        "_paused",
        "_read",
        "_resume",
        "_tally",
        "_used",
        "kept",
        "reported",
        "seat",
        "stepwise",
    )

    def __init__(
        self,
        limit: int,
        tally: Tally,
        resume: Callable[[], None],
        inbox: Inbox,
        stepwise: bool = False,
        seat: Seat | None = None,
    ) -> None:
        self._lock = inbox._lock
        self._limit = limit
        self._tally = tally
        self._resume = resume
        self.stepwise = stepwise
        self.seat = seat
        """Of the worker that owns the socket, for a handler that waits for more."""
        self._read = 0  # bytes since the beginning; the owner alone counts them
        # Guarded by the lock.
        self._decoded = 0  # of these, with the coordinator
        self._used = 0  # what the messages in the inbox cost
        self.reported = 0  # to the tally
        self._paused = False
        self._forfeit = False
        self.kept = 0

    # Called by the owner of the socket.

    def allows(self) -> bool:
        """Whether there is any `room`."""
        return (self._read == self._decoded and not self._used) or self.room() > 0

    def room(self) -> int:
        """How many bytes may be read, or a record more.  If none, the owner will be called back."""
        room = self._room()
        if room <= 0:
            with self._lock:
                room = self._room()
                self._paused = room <= 0
        return room

    def _room(self) -> int:
        undecoded = self._read - self._decoded
        held = undecoded + self._used  # in this order: what moves just now counts twice
        scarce = not self._tally.has_room()
        if held and (scarce or held >= self._limit):
            return 0
        if self.stepwise and undecoded:
            return 0
        return 1 if scarce or self.stepwise else self._limit - held

    late_room = room

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
            self._tally.keep(self, count)

    def conclude(self) -> None:
        """Nothing more will be read or decoded, the codec holds nothing, and there is nobody to be called back."""
        self.keep(0)
        self._resume = nobody
        self.settle(self.undecoded())

    def forfeit(self) -> None:
        """Nobody will ever take what is in the inbox."""
        with self._lock:
            self._charge(0, -self._used)
            self._forfeit = True

    # Called by any thread.

    def settled(self) -> bool:
        """Whether all that was read has been decoded, so that what is read next may be decoded next."""
        return self._read == self._decoded

    def undecoded(self) -> int:
        """How many of all the bytes that were read the coordinator has not seen."""
        return self._read - self._decoded

    def held(self) -> int:
        """What is read and not taken, in bytes."""
        return -self._decoded + self._read + self._used  # in this order it is never less than nothing

    def overdraft(self) -> int:
        """By how much more was read than may be."""
        return self.held() - self._limit

    def review(self) -> None:
        """Something of it was taken: who has stopped for want of room reads on, if this makes enough."""
        with self._lock:
            resume = self._review()
        if resume:
            self._resume()

    # Called with the lock.

    def _charge(self, count: int, cost: int) -> bool:
        """Of what was read, *count* bytes have become messages that cost *cost*.  Whether to resume reading."""
        if not self._forfeit:
            self._used += cost
        self._decoded += count  # last: see `_room`
        if self._paused or self.reported or self._used >= TALLY_STEP:
            return self._review(count)
        return False

    def _review(self, decoded: int = 0) -> bool:
        """What is held has changed, *decoded* bytes of it by decoding: tell the tally.  Whether to resume reading."""
        if self.reported or self._used >= TALLY_STEP:
            self._report()
        if not self._paused or not (
            self.held() <= self._limit // 2 or (self.stepwise and decoded and self._room())
        ):
            return False
        self._paused = False
        return True

    def _report(self) -> None:
        self._tally.follow(self, self.held())


Done = Callable[[bool], None]
"""Called when the handler that was told of a session's end has come back, or false if it never will."""
Entry = tuple[tuple[Any, Any], "ReadCredit | None", int, "Done | None"]
"""One message on its way to the application: session and message, the credit and how much of it comes back when
the message is taken, and what to call when the handler comes back for the next one."""


_NOBODY: Any = types.SimpleNamespace(_used=0)
"""Who pays for a message that costs nothing."""
_NOTHING_YET: tuple[Any, ReadCredit | None, Gate | Guest | None] = None, None, None
"""What was taken, who has paid for it, and where its taker has slept."""


class _Turn:
    """The turn that one handler thread has with one session: until it comes back, or the thread ends."""

    __slots__ = ("_in_a_row", "_inbox", "_notes", "_seat", "_since", "done", "may_sit", "session")

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._notes = this_thread.notes
        self.may_sit = threading.get_ident() != threading.main_thread().ident
        self._seat: Seat | None = None  # of the last message behind which the inbox was empty
        self._in_a_row = 0  # how many of these came from there
        self._since = 0.0  # when the last one came
        self.session: object = None
        self.done: Done | None = None

    def begin(self, credit: ReadCredit | None) -> None:
        """It has the last message that was here, for which *credit* has paid, if anybody has."""
        self._since = time.monotonic()
        self._in_a_row += 1
        if credit is not None and credit.seat is not self._seat:
            give_up_seat(self._notes)
            self._seat, self._in_a_row = credit.seat, 1

    def place(self) -> Gate | Guest:
        """Where to sleep until more comes: where the last ones came from, if it is back so soon."""
        if self._seat is None or self._in_a_row < STEADY or time.monotonic() - self._since > QUICK:
            give_up_seat(self._notes)
            return Gate()
        if self._notes.seat is not self._seat:  # but that of another inbox's worker
            give_up_seat(self._notes)
            self._notes.seat = self._seat
        return self._seat.place()

    def end(self, came_back: bool = True) -> None:
        """Let another handler have the session; close it, if it has ended.  Or the handler has ended, and hangs up."""
        if self.done is not None:
            self.done(came_back)  # again, if Ctrl-C comes just now
            self.done = None
        if self.session is not None:
            try:
                with self._inbox._lock:
                    self._inbox._release(self)
                    self._inbox._call()
            except BaseException:
                with self._inbox._lock:
                    self._inbox._call()
                raise

    def __del__(self) -> None:
        if hasattr(self, "done") and not forks.abandoned(self._inbox._born):  # or Ctrl-C came as it was made
            self.end(came_back=False)


class Inbox(forks.Handle):
    """Messages of any number of sessions, for any number of handler threads.

    `get` returns ``(session, message)``, and ``(session, None)`` once when the session has ended
    (`session.end` says how).  The messages of one session go to one handler at a time, in order: the next
    one waits until the thread that took the last comes back for more, calls `task_done`, or ends.  So a pool
    does not reorder a session's answers, and a session that stalls holds one handler and no more.

    It is bounded by the sessions' read credit: a session whose messages are not
    taken stops reading, and the others go on.  So `put` never waits, and takes nothing but the item; `get`, `qsize`
    and `empty` are otherwise as a `queue.Queue` has them.  When every Bridge that feeds it is closed and all is taken,
    `get` raises ShutDown.

    A handler that has been given ``(session, None)`` may still send (the peer may have closed only its
    half).  When it comes back for the next message it is done, and the session is closed for it.  If its thread ends
    instead, the session ends as one that is forgotten.
    """

    _takes_more = True
    """Whether it takes what sessions deliver when it is over."""

    def __init__(self) -> None:
        # Of each session at most one entry is ready or in a handler's hands; the others wait behind it.
        self._entries: collections.deque[Entry] = collections.deque()
        self._behind: dict[object, collections.deque[Entry] | None] = {}
        self._waiting = 0  # how many those are
        self._ends = 0  # of all entries, how many say that a session has ended
        self._lock = threading.RLock()
        self._sleepers: collections.deque[Gate | Guest] = collections.deque()  # first come, first woken
        self._called: Gate | Guest | None = None  # who was woken for what is here, and has not come yet
        self._over: Exception | None = None
        self.shut = False
        """By the application, and so for good."""
        self._feeders: set[object] = set()
        self._handler = threading.local()
        self._born = forks.current

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next ``(session, message)``.  Any thread.

        Raises ReceiveTimeout (a `queue.Empty` and a `TimeoutError`) if nothing arrived within *timeout*
        seconds, or at once if *block* is false; ShutDown after the end.
        """
        if self._born != forks.current:
            self._check_process()
        if not block:
            timeout = 0.0
        deadline = None if timeout is None else deadline_after(check_timeout("timeout", timeout))
        try:
            turn: _Turn = self._handler.turn
        except AttributeError:
            turn = self._handler.turn = _Turn(self)
        if turn.done is not None:
            turn.end()
        return self._next(timeout, deadline, turn)

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
        """Add *item*, a pair, as if its session had delivered it: a word to the handlers.  Any thread; never waits.

        If its session is None, it is a word to any handler, and waits for no other.  ShutDown after `shutdown`.
        """
        self._check_process()
        if self.shut:
            raise ShutDown("the inbox was shut down")
        try:
            session, message = item
        except (TypeError, ValueError):
            raise TypeError(f"put takes a pair of a session, or None, and a message, not {item!r}") from None
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
        """After what is waiting, `get` raises ShutDown in every thread, and `put` now (as `queue.Queue.shutdown`).

        For good, whatever Bridge feeds it.  Sessions that deliver here are not closed by it, but what comes later is
        for nobody: they stop reading at `Limits.inbox_bytes`, and one that its peer ends is hung up.  Any thread;
        never waits.
        """
        self.shut = True
        self._finish(ShutDown("the inbox was shut down"))

    def _check_process(self) -> None:
        """ForkedError in a child of fork(): there nobody will fill it."""
        forks.check(self._born, "Inbox", "the threads that fill it")

    def _next(
        self, timeout: float | None, deadline: float | None, turn: _Turn | None, keep: bool = False
    ) -> Any:
        """What the next entry brings, a pair, which has left; with *turn*, in place of what its thread was given last.

        If it is to *keep* its place, it has been called for nothing.  ReceiveTimeout after the *deadline*, *timeout*
        seconds after it was set.  An entry leaves, with all that hangs on it, in a row without calls and, for the sake
        of Python 3.10, without a jump, or not at all.
        The lock is taken by two calls, for a ``with`` takes CPython twice as long; `_give_way` sees to interrupts.
        """
        item, credit, bed = _NOTHING_YET
        entries, lock, nested = self._entries, self._lock, self._lock._is_owned()  # type: ignore[attr-defined]
        try:
            while True:
                lock.acquire()
                try:
                    if bed is not None:
                        self._rise(bed)
                    if turn is not None and turn.session is not None:
                        self._release(turn)
                    if entries:
                        item, credit, cost, done = entries[0]
                        if keep:
                            self._call()
                            return item
                        payer, cost = (_NOBODY, 0) if credit is None or credit._forfeit else (credit, cost)
                        ended = 0 if done is None else 1
                        if turn is not None:
                            turn.session, turn.done = item[0], done
                        self._ends -= ended
                        payer._used -= cost
                        del entries[0]
                        if entries and self._sleepers:
                            self._call()
                        break
                    left = self._time_to_sleep(timeout, deadline, turn, nested)
                    bed = Gate() if turn is None else turn.place()
                    self._queue_up(bed)
                finally:
                    lock.release()
                bed.sleep(left)
            if credit is not None and (credit._paused or credit.reported):
                credit.review()
            if turn is not None and not entries and turn.may_sit:
                turn.begin(credit)
        except BaseException:
            self._give_way(bed, credit, nested)
            raise
        return item

    def _queue_up(self, bed: Gate | Guest) -> None:
        """With the lock: it is last in line; or first, if it is a seat, where nobody need be woken, or asks for one."""
        if type(bed) is Gate:
            self._sleepers.append(bed)
        else:
            self._sleepers.appendleft(bed)

    def _give_way(self, bed: Gate | Guest | None, credit: ReadCredit | None, nested: bool) -> None:
        """Nothing was taken in time, or Ctrl-C came, and nobody knows where."""
        if not nested:
            let_go(self._lock)
        with self._lock:
            if bed is not None:
                self._rise(bed)
            self._call()
            if credit is not None:
                credit._review()
        if credit is not None:
            credit._resume()

    def _time_to_sleep(
        self, timeout: float | None, deadline: float | None, turn: _Turn | None, nested: bool
    ) -> float | None:
        """With the lock, and nothing here: how long there may be something yet.  Raises what there will be instead."""
        if self._over is not None and not self._waiting:
            raise fresh(self._over)
        left = time_left(deadline)
        if left == 0.0:
            raise ReceiveTimeout(f"no message within {timeout or 0:g} seconds")
        if turn is None:
            before_waiting()
        else:
            check_may_wait()  # it may sit down
        if nested:
            refuse_to_wait()
        return left

    def _call(self) -> None:
        """With the lock: wake the next sleeper for what is here, if none is on its way.

        One at a time, for whoever takes something and leaves something calls the next.  So of a large pool no more are
        up than have something to do; a message each would wake all of them for what one can do.  A guest may be in the
        middle of a step, and come late.
        """
        while self._entries and self._sleepers and not self._suffices(self._called):
            bed = self._sleepers[0]
            bed.ring()  # first: a ring too many does no harm
            self._called = bed
            del self._sleepers[0]

    def _suffices(self, called: Gate | Guest | None) -> bool:
        """With the lock: whether *called* takes care of what is here."""
        return called is not None and (isinstance(called, Gate) or called.takes() >= len(self._entries))

    def _rise(self, bed: Gate | Guest) -> None:
        """With the lock: nobody sleeps in *bed* any more."""
        if self._called is bed:
            self._called = None
        if bed in self._sleepers:
            self._sleepers.remove(bed)

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
        done: Done | None = None,
    ) -> None:
        """Put *messages* in, which *size* bytes of *credit* have become, and each of which is to cost *share*."""
        resume, ahead, lock = False, self._behind, self._lock
        nested = lock._is_owned()  # type: ignore[attr-defined]
        try:
            lock.acquire()
            try:
                if credit is not None:
                    if self._over is not None and not self._takes_more:
                        messages = []
                    resume = credit._charge(size, share * len(messages))
                    if self.shut:  # nobody will take them, so they are never paid back
                        messages = []
                for message in messages:
                    entry = ((session, message), credit, share, done)
                    if session is None:
                        self._entries += (entry,)
                    elif session not in ahead:
                        ahead[session] = None
                        self._entries += (entry,)
                    else:
                        behind = ahead[session]
                        if behind is None:
                            behind = ahead[session] = collections.deque()
                        behind += (entry,)
                        self._waiting += 1
                if self._sleepers:
                    self._call()
            finally:
                lock.release()
        except BaseException:  # Ctrl-C, maybe just as it was taken
            if not nested:
                let_go(lock)
            with lock:
                self._call()
            raise
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

    def _attach(self, feeder: object) -> None:
        with self._lock:
            self._feeders.add(feeder)
            if not self.shut:
                self._over = None

    def _detach(self, feeder: object) -> None:
        with self._lock:
            self._feeders.discard(feeder)
            if not self._feeders:
                self._finish(ShutDown("every Bridge that fed this inbox is closed"))

    def _end(self, session: Any, why: SessionEnded, known: bool, done: Done) -> None:
        """A session that feeds this inbox has ended."""
        if known:  # one that never opened was never here: its `connect` raises, its listener logs
            with self._lock:
                shut = self.shut
                self._ends += not shut
            if shut:
                done(False)
            else:
                self._deliver(session, [None], None, 0, 0, done)


class SessionInbox(Inbox):
    """One session's own inbox: `get` returns just the message, and raises the cause after the end."""

    _takes_more = False

    def __init__(self) -> None:
        super().__init__()
        self.attend: Callable[[SessionInbox, float | None, list[Any] | None], bool] | None = None
        """What brings messages in on the thread of a receiver that would wait for them; false if it may not.

        What is the receiver's own comes into the list that it gives, and else into the inbox."""
        self.attendant: Bed | None = None
        """Of whom that lets sleep beside the socket."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message.  Any thread.  ReceiveTimeout, or how the session ended."""
        return self._take(timeout if block else 0.0, [])

    def peek(self, timeout: float | None = None) -> Any:
        """As `get`, and the message stays the next one."""
        return self._take(timeout, None)

    def _take(self, timeout: float | None, taken: list[Any] | None) -> Any:
        """The next message, by way of *taken* if this thread reads it itself; without that list it stays."""
        try:
            deadline, left = deadline_after(timeout), timeout
            while not self._entries and left != 0.0:
                attend = self.attend  # which another thread may set to None
                if attend is None or not attend(self, left, taken):
                    break
                if taken:
                    return taken[0]
                left = time_left(deadline)
            return self._next(timeout, deadline, None, keep=taken is None)[1]
        except BaseException:
            self._put_back(taken or [])
            raise

    def _put_back(self, taken: list[Any]) -> None:
        """A receiver gives up, be it for Ctrl-C: what it has *taken*, or was woken for, is for the next one."""
        with self._lock:
            self._entries.extendleft(((None, message), None, 0, None) for message in taken)
            self._call()
        self._ring()

    def lie_down(self, bed: Bed) -> bool:
        """From now on whatever comes rings *bed*; False if something is here, or somebody else waits for it."""
        lock = self._lock
        if lock._is_owned():  # type: ignore[attr-defined]
            return False  # a signal handler may not wait for what it has interrupted
        try:
            lock.acquire()
            vacant = not (
                self._entries or self._sleepers or self._over is not None or self.attendant is not None
            )
            if vacant:
                self.attendant = bed
            lock.release()
            return vacant
        except BaseException:
            let_go(lock)
            raise

    def get_up(self) -> bool:
        """No longer.  Whether nothing has come."""
        self.attendant = None
        return not self._entries

    def awaited(self) -> bool:
        """Whether anybody sleeps who does not attend to the socket."""
        return bool(self._sleepers)

    def _deliver(self, session: Any, *what: Any) -> None:
        """As of any inbox, but its receivers take whatever is next."""
        super()._deliver(None, *what)
        self._ring()

    def _ring(self) -> None:
        attendant = self.attendant
        if attendant is not None:
            attendant.ring()

    def _finish(self, why: Exception) -> None:
        super()._finish(why)
        self._ring()

    def _end(self, session: Any, why: SessionEnded, known: bool, done: Done) -> None:
        self.attend = None
        self._finish(why)
