"""A worker: one thread that owns many sessions' sockets and sleeps in poll for all of them.

Theory of operation
-------------------
A step is: look at (or sleep in) the poll, take the words from the mailbox, see whose deadline has passed,
give each session concerned one turn, and hand everything the turns produced to the coordinator in *one*
batch.  Sessions that stopped for want of budget have their turn again in the next step, after the others,
and the worker does not sleep before that.

A handshake costs as much as a hundred turns of a session that is open, and a crowd of them may come at once.  So they
stand in line, first come, first served: a step lets a few of them on, after everybody else and what these have
produced.  Who stands in line has left the poll set, which would only say again what is known; deadlines and commands
reach it all the same.

`step` never sleeps unless it is told to, so a test can drive workers and coordinator from one thread in
any order; `run` is the thread.  Whatever one session's turn raises ends that session and nothing else.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from bridge import events
from bridge.crossing import Mailbox
from bridge.errors import SessionAborted, SessionEnded, words
from bridge.poll import EVERY, LENT, NOTHING, READ, Doorbell, Poller, Want
from bridge.seat import Seat
from bridge.terms import internal
from bridge.threads import let_through, serving_all

HAND_OVER = 64
"""Events a turn may gather before the coordinator gets the first of them."""
SPARE_TIMERS = 64
"""How many timers that are out of date may be there, besides one for each pollable, before they are cleared away."""
AT_A_TIME = 64
"""Ready sockets in one step: what has come from so many is answered before more is read, while it is in the cache.  All
of them while some have turns in each step, who stand in line or were cut short: the others shall not have fewer."""
HANDSHAKES = 8
"""Turns of handshakes in one step: some milliseconds."""
CROWD = 128
"""How many a worker may own and still lend their sockets: hundreds of threads that poll for themselves are woken in no
order, and some starve; a worker serves them in turn."""
ROUNDS = 0.01
"""Seconds after which the worker looks whether somebody is with each socket that stays lent."""
BUSY = 0.001
"""Seconds within which receivers follow each other if it is worth while to leave sockets lent, and to make rounds."""
AGAIN = 4
"""What stands in place of a poll's mask for a turn that was cut short by its budget."""
STALLED_TURNS = 100
"""Turns in a row that could have moved a byte, and moved none, before a session is taken for spinning."""


class Pollable(Protocol):
    """What a worker can own: sessions' transports, and listening sockets.  All of it is the worker's alone."""

    sock: socket.socket | None
    mask: int
    again: bool
    deadline: float | None
    finished: bool
    retired: list[socket.socket]
    now: float

    @property
    def opening(self) -> bool:
        """Whether it is not open yet, so that a turn may be costly."""

    @property
    def lock(self) -> Any:
        """A reentrant one.  The worker holds it for each turn; others for a moment, where the pollable lets them."""

    def turn(self, ready: int, now: float) -> bool:
        """The poll says *ready*: do all that is possible without sleeping, within a turn's budget.

        False if the worker need not look at what is above: nothing of it has changed.
        """

    def end(self, cause: SessionEnded, *, linger: bool = True) -> None:
        """Come to an end; if it may not *linger*, nor go on to, it has finished then."""

    def gone(self) -> None:
        """It has finished, and its sockets are closed."""

    @property
    def moved(self) -> int:
        """How many bytes of plaintext it has moved, ever."""

    def evidence(self) -> tuple[object, ...] | None:
        """What differs if a byte of anything has moved meanwhile; None for what moves no bytes."""

    def stalled(self, turns: int, whose: str) -> None:
        """After so many *turns* in vain in the hands of *whose* worker: end, and log where it stood."""


def fail(pollable: Pollable, error: BaseException, whose: str) -> None:
    """A turn of *pollable* raised *error*: a bug of ours, or of a callback.  It costs this session, not the thread.

    In the thread called *whose*, which owned it for that turn.
    """
    events.warning("worker.failed", worker=whose, error=words(error, repr))
    pollable.end(internal(error))
    pollable.again = True  # for a turn that finds out what to wait for now, and until when


class _Watch:
    """What the poll set holds for one pollable, and the deadline its timer is set to.

    Timers that are out of date stay in the heap until their time comes, or too many are there; they keep only this
    alive.
    """

    __slots__ = ("attended", "evidence", "idle", "mask", "moved", "pollable", "sock", "timer", "turns")

    def __init__(self, pollable: Pollable | None) -> None:
        self.pollable = pollable
        self.attended = False  # lent, and somebody sleeps beside it
        self.sock: socket.socket | None = None
        self.mask = NOTHING
        self.timer = math.inf
        self.turns = 0  # that could have got anywhere, since we last looked whether they did
        self.moved = 0
        self.evidence: tuple[object, ...] | None = None
        self.idle = 0  # turns that were watched, and moved nothing


Command = tuple[Pollable | None, str, tuple[Any, ...]]


class Worker:
    """Owns the poll set and every pollable given to it.  `post` is for all threads, the rest for its own."""

    def __init__(self, name: str, hand_over: Callable[[list[Any]], None]) -> None:
        self.name = name
        self._hand_over = hand_over
        self._doorbell = Doorbell()
        self._mailbox: Mailbox[Command] = Mailbox(self._doorbell.ring)
        try:
            self._poller: Poller[Pollable | None] = Poller()
            self._poller.watch(self._doorbell, Want.READ, None)
        except BaseException:
            self._doorbell.close()
            raise
        self._watched: dict[Pollable, _Watch] = {}
        self._runnable: dict[Any, int] = {}  # pollables, and what the poll says of each
        self._line: collections.deque[tuple[Pollable, int]] = collections.deque()  # likewise, of handshakes
        self._timers: list[tuple[float, int, _Watch]] = []
        self._rounds = _Watch(None)  # what its timer is for
        self._left = -math.inf  # when a receiver did so last
        self._asked = False  # to make rounds; a word is on its way
        self._order = itertools.count()
        self.produced: list[Any] = []
        """What the turns tell the coordinator, which gets it before the step ends.  Its own thread."""
        self._stopping = False  # it was told to
        self._ended = False
        self.seat = Seat(self)

    # Any thread.

    def post(self, pollable: Pollable, method: str, *arguments: Any) -> None:
        """Have *method* of *pollable* called by this worker, and then a step.  Never waits."""
        self._mailbox.put((pollable, method, arguments))

    def post_all(self, commands: list[Command]) -> None:
        """`post`, many at once."""
        self._mailbox.put(*commands)

    def stop(self) -> None:
        """The last command: end what is left, close everything, leave `run`.  Never waits."""
        self._mailbox.put((None, "_stop", ()))

    def ring(self) -> None:
        """Wake who sleeps in its poll.  Never waits."""
        self._doorbell.ring()

    def asleep(self) -> bool:
        """Whether who sits there sleeps, or is about to."""
        return self._mailbox.asleep

    def load(self) -> int:
        """How many pollables it owns."""
        return len(self._watched)

    def has_room(self) -> bool:
        """Whether its poll set holds one more, if each command on its way is to bring one."""
        return len(self._watched) + len(self._mailbox) + 1 < self._poller.most  # and the doorbell

    def lends(self) -> bool:
        """Whether `lend` is worth asking: the system can, and there is no crowd to serve."""
        return self._poller.lends and len(self._watched) <= CROWD

    # Any thread that holds the pollable's lock.

    def lend(self, pollable: Pollable) -> bool:
        """Where it `lends`, leave it to the caller to sleep beside the socket until there is something to read.

        Whether it may.  No promise: after a turn of the worker's own, which may have something else to wait for,
        both wait.
        """
        watch = self._watched.get(pollable)
        if watch is None:
            return False
        if watch.mask == LENT:
            watch.attended = True
            return True
        if watch.mask != READ:
            return False
        watch.attended = True
        watch.mask = LENT  # first: if the rest is interrupted, `take_back` sees to it
        return self._change(watch, LENT)

    def leave(self, pollable: Pollable, now: float, awaited: bool) -> None:
        """Whom it is lent to goes, and may be back in a moment.

        Among many that come and go it stays lent, which saves two system calls, until the worker makes its rounds; but
        not if it is *awaited* by somebody who cannot come for it himself.
        """
        watch = self._watched.get(pollable)
        if watch is None:
            return
        watch.attended = False
        left, self._left = self._left, now
        if awaited:
            self.take_back(pollable)
        elif self._rounds.timer == math.inf:
            if now - left > BUSY:
                self.take_back(pollable)
            elif not self._asked:
                self._ask_for_rounds()

    def _ask_for_rounds(self) -> None:
        self._asked = True  # first: the worker's answer is to come later
        try:
            self._mailbox.put((None, "_plan_rounds", ()))
        except BaseException:
            self._asked = False
            raise

    def take_back(self, pollable: Pollable) -> None:
        """Sleep beside it again, if it is still lent."""
        watch = self._watched.get(pollable)
        if watch is not None and watch.mask == LENT and self._change(watch, READ):
            watch.mask = READ

    def _change(self, watch: _Watch, mask: int) -> bool:
        """False if the descriptor is not its own any more: a turn of our own will meet that, and end it."""
        assert watch.sock is not None and watch.pollable is not None
        try:
            self._poller.change(watch.sock, mask, watch.pollable)
        except (OSError, ValueError):
            self.post(watch.pollable, "wake")
            return False
        return True

    # A guest in its seat.

    def step_in(self, timeout: float | None) -> bool:
        """As `step`, without handshakes and without an end: false if there is either to do, or more without a poll."""
        self._step(timeout, 0)
        return not (self._line or self._runnable or self._stopping)

    # Its own thread.

    def run(self) -> None:
        """The thread: step and sleep until `stop`."""
        try:
            with serving_all():
                self.seat.sit_down()
                while not self._ended:
                    self.step(None)
                    self.seat.offer(not (self._line or self._runnable or self._ended))
        finally:
            if not self._ended:  # only a bug leads here; nobody shall wait for us in vain
                self._shut_down()

    def step(self, timeout: float | None = 0.0) -> bool:
        """Sleep until there is something to do, at most *timeout* seconds; then do all that is possible.

        Whether anything was done.
        """
        done = self._step(timeout, HANDSHAKES)
        if self._stopping:
            self._shut_down()
        return done

    def _step(self, timeout: float | None, handshakes: int) -> bool:
        ready = self._look(timeout)
        now = time.monotonic()
        runnable, self._runnable = self._runnable, {}
        runnable.update(ready)
        if runnable.pop(None, NOTHING):
            self._doorbell.silence()
        commands = self._mailbox.take()
        if commands:
            self._obey(commands, runnable, now)
        self._fire_timers(runnable, now)
        self._line_up(runnable, handshakes)
        done = bool(runnable or self._line)
        self._take_turns(runnable, now)
        if self._line and handshakes:
            first = min(handshakes, len(self._line))
            self._take_turns(dict(self._line.popleft() for _ in range(first)), now)
        return done

    def _line_up(self, runnable: dict[Any, int], handshakes: int) -> None:
        opening = []
        for pollable, mask in runnable.items():
            if mask and pollable.opening:
                opening.append(pollable)
        for pollable in opening:
            self._line.append((pollable, runnable.pop(pollable)))
            if len(self._line) > handshakes:  # those before it have their turn in this very step
                self._look_away(self._watched[pollable])

    def _take_turns(self, runnable: dict[Any, int], now: float) -> None:
        for pollable, mask in runnable.items():
            watch = self._watched.get(pollable)
            if watch is not None:
                lock = pollable.lock
                lock.acquire()  # a ``with`` takes CPython twice as long
                try:
                    try:
                        if mask and watch.turns >= STALLED_TURNS:
                            changed = self._take_watched_turn(pollable, watch, mask, now)
                        else:
                            changed = pollable.turn(mask, now)
                    except BaseException as error:
                        changed = True
                        self._fail(pollable, error)
                    if changed:
                        watch.turns += mask != NOTHING
                        try:
                            self._attend(pollable, watch)
                        except BaseException as error:  # the descriptor is not its own, or not any more
                            self._fail(pollable, error)
                            self._runnable[pollable] = AGAIN
                finally:
                    lock.release()
            if len(self.produced) >= HAND_OVER:
                self._flush()
        self._flush()

    def _fail(self, pollable: Pollable, error: BaseException) -> None:
        let_through(error)
        fail(pollable, error, self.name)

    def _look(self, timeout: float | None) -> list[tuple[Pollable | None, int]]:
        most = EVERY if self._runnable or self._line else AT_A_TIME
        if most == EVERY or timeout == 0.0 or self._stopping or not self._mailbox.may_sleep():
            return self._poller.wait(0, most)
        while self._timers and self._timers[0][2].timer != self._timers[0][0]:
            heapq.heappop(self._timers)
        if self._timers:
            left = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = left if timeout is None else min(left, timeout)
        ready = self._poller.wait(timeout, most)
        self._mailbox.awake()
        return ready

    def _obey(self, commands: list[Command], runnable: dict[Any, int], now: float) -> None:
        for pollable, method, arguments in commands:
            if pollable is None:
                getattr(self, method)(now)
                continue
            if pollable not in self._watched:
                if pollable.finished:
                    continue
                self._watched[pollable] = _Watch(pollable)
            with pollable.lock:
                pollable.now = now
                try:
                    getattr(pollable, method)(*arguments)
                except BaseException as error:
                    self._fail(pollable, error)
            runnable.setdefault(pollable, NOTHING)

    def _stop(self, _: float) -> None:
        self._stopping = True

    def _plan_rounds(self, now: float) -> None:
        if self._rounds.timer == math.inf:
            self._set_timer(self._rounds, now + ROUNDS)
        self._asked = False  # last: who finds it unset finds the timer set

    def _make_rounds(self, now: float) -> None:
        """Take back what nobody attends to just now: its receiver may have gone for good.

        While somebody has the lock, be it for the time that a codec takes, he is not gone, and another round comes.
        """
        more = now - self._left <= ROUNDS
        for pollable, watch in self._watched.items():
            if watch.mask == LENT:
                if pollable.lock.acquire(False):
                    if not watch.attended:
                        self.take_back(pollable)
                    pollable.lock.release()
                else:
                    more = True
        if more:
            self._plan_rounds(now)

    def _set_timer(self, watch: _Watch, when: float) -> None:
        watch.timer = when
        if len(self._timers) >= SPARE_TIMERS + 2 * len(self._watched):
            current = {timer[2]: timer for timer in self._timers if timer[2].timer == timer[0]}
            self._timers = sorted(current.values())
        heapq.heappush(self._timers, (when, next(self._order), watch))

    def _fire_timers(self, runnable: dict[Any, int], now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            when, _, watch = heapq.heappop(self._timers)
            if watch.timer == when:
                watch.timer = math.inf
                if watch.pollable is None:
                    self._make_rounds(now)
                else:  # for a turn that looks at the clock; what the poll has said it will say again
                    runnable[watch.pollable] = NOTHING

    def _take_watched_turn(self, pollable: Pollable, watch: _Watch, ready: int, now: float) -> bool:
        """A turn of what has had many, to see whether they move anything: a session that spins is a bug, and ends.

        A turn may well move no plaintext, for a record may come byte by byte; then its ciphertext has moved.
        """
        before = None if pollable.moved != watch.moved else pollable.evidence()
        changed = pollable.turn(ready, now)
        if before is None or pollable.moved != watch.moved:
            watch.moved, watch.turns, watch.evidence = pollable.moved, 0, None
            return changed
        after = pollable.evidence()
        watch.idle = watch.idle + 1 if before == after == watch.evidence else 0
        watch.evidence = after
        if watch.idle >= STALLED_TURNS:
            pollable.stalled(watch.idle, self.name)
            return True
        return changed

    def _attend(self, pollable: Pollable, watch: _Watch) -> None:
        """Bring poll set and timers in line with what the pollable wants now."""
        sock, mask = pollable.sock, pollable.mask
        if sock is None or pollable.finished:
            mask = NOTHING
        if watch.sock is not sock or mask == NOTHING:
            self._look_away(watch)
        if mask != watch.mask:
            assert sock is not None
            if watch.mask == NOTHING:
                self._poller.watch(sock, mask, pollable)
            else:
                self._poller.change(sock, mask, pollable)
            watch.mask = mask
        watch.sock = sock
        for old in pollable.retired:
            old.close()
        pollable.retired.clear()
        if pollable.finished:
            del self._watched[pollable]
            watch.pollable, watch.timer = None, math.inf
            pollable.gone()
        elif pollable.deadline is not None and pollable.deadline < watch.timer:
            self._set_timer(watch, pollable.deadline)
        if pollable.again:
            self._runnable[pollable] = AGAIN

    def _look_away(self, watch: _Watch) -> None:
        if watch.mask != NOTHING:
            assert watch.sock is not None
            self._poller.forget(watch.sock)
            watch.mask = NOTHING

    def _flush(self) -> None:
        if self.produced:
            produced, self.produced = self.produced, []
            self._hand_over(produced)

    def _shut_down(self) -> None:
        self._ended = True
        for pollable, watch in list(self._watched.items()):
            with pollable.lock:
                pollable.end(SessionAborted("the bridge was closed"), linger=False)
                pollable.turn(NOTHING, time.monotonic())
                self._attend(pollable, watch)
        self._flush()
        self.close()

    def close(self) -> None:
        """Release what it sleeps in: `run` does so in the end, or never begins."""
        self._poller.close()
        self._doorbell.close()
