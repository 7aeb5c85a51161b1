"""The protocol between the threads, checked exhaustively for small sizes: every interleaving of the real classes.

What is covered: `Mailbox` with `Doorbell` (a worker) and with `Gate` (the coordinator), `Worker.step` and
`Coordinator.run` on top of them, `Outbox`, `ReadCredit`, `Tally`, `SessionInbox`, `Latch`, and a `Seat`; two or three
threads with one to three operations each; a switch of threads possible at every line of `bridge.crossing`, `outbox`
and `inbox`, with the small ones at every bytecode that touches an attribute (as on a Python without a GIL, but for the
order of memory).  For all of it: nobody sleeps for ever, no bound is broken, nothing is lost, repeated or reordered.
Not covered: more threads, the turns of a shared `Inbox`, OpenSSL, and the operating system's own queues.

`tests/interleavings.py` says how it is done.  The last tests plant faults, and every one is found.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from interleavings import CROSSING, Bed, Refuted, Report, World, explore, rung

import bridge
from bridge import inbox, seat
from bridge.coordinator import Coordinator
from bridge.crossing import Gate, Latch, Mailbox, Tally, nobody
from bridge.inbox import Inbox, ReadCredit, SessionInbox, _Turn
from bridge.outbox import Outbox
from bridge.poll import Doorbell
from bridge.seat import ROUND, Guest, Seat, _Asking
from bridge.threads import give_up_seat, this_thread
from bridge.worker import Worker

pytestmark = pytest.mark.once

GONE = bridge.SessionAborted("gone")


# ── words and bells ──


def words(
    world: World, mailbox: type[Mailbox[Any]] = Mailbox, plans: tuple[tuple[int, ...], ...] = ((1, 2), (3,))
) -> None:
    """Putters, and a worker that sleeps beside its doorbell."""
    bell = Doorbell()
    world.closing(bell.close)
    box = mailbox(bell.ring)
    got: list[int] = []
    world.share(box, bell, got)

    def owner() -> None:
        while len(got) < sum(map(len, plans)):
            if box.may_sleep():
                world.block(lambda: rung(bell), "sleep")
                box.awake()
                bell.silence()
            got.extend(box.take())

    world.actor("owner", owner)
    for plan in plans:
        world.actor(f"putter of {plan}", lambda plan=plan: [box.put(word) for word in plan] and None)
    world.finally_(lambda: in_order(got, plans))


def in_order(got: list[Any], plans: tuple[tuple[Any, ...], ...]) -> None:
    """Each word once, and those of each putter in their order."""
    assert sorted(got) == sorted(word for plan in plans for word in plan), got
    for plan in plans:
        assert [word for word in got if word in plan] == list(plan), got


class Thing:
    """What a worker may own, reduced to its words."""

    sock = None
    mask = 0
    again = False
    deadline = None
    now = 0.0
    moved = 0
    lock = threading.RLock()

    def __init__(self, words: int) -> None:
        self.got: list[int] = []
        self.left = words
        self.retired: list[Any] = []
        self.finished = False

    def word(self, word: int) -> None:
        self.got.append(word)
        self.left -= 1

    def turn(self, ready: int, now: float) -> bool:
        self.finished = not self.left
        return True

    def gone(self) -> None:
        pass


def worker(world: World, others: int = 1) -> None:
    """`Worker.step(None)` itself, its real poller and doorbell, and one or two who post."""
    owner = Worker("worker", lambda batch: None)
    owner._poller.close()
    owner._poller = Bed(world)
    owner._poller.watch(owner._doorbell, 1, None)
    world.closing(owner._poller.close)
    world.closing(owner._doorbell.close)
    thing = Thing(2 + others)
    world.share(owner, thing)

    def run() -> None:
        while not thing.finished:
            owner.step(None)

    world.actor("worker", run)
    world.actor("a", lambda: (owner.post(thing, "word", 1), owner.post(thing, "word", 2)))  # type: ignore[arg-type]
    if others:
        world.actor("b", lambda: owner.post(thing, "word", 3))  # type: ignore[arg-type]
    world.finally_(lambda: in_order(thing.got, ((1, 2), (3,)[:others])))


def coordinator(world: World, posters: int = 2) -> None:
    """`Coordinator.run` itself: some who post, and one who stops it afterwards; nothing posted before is lost."""
    owner = Coordinator()
    got: list[int] = []
    owner._handlers["word"] = lambda channel, word: got.append(word)
    posted = [0]
    world.share(owner, got, posted)

    def post(word: int) -> None:
        owner.post(None, "word", word)  # type: ignore[arg-type]
        posted[0] += 1

    def stop() -> None:
        world.block(lambda: posted[0] == posters, "join")
        owner.stop()

    world.actor("coordinator", owner.run)
    for word in range(posters):
        world.actor(f"poster {word}", lambda word=word: post(word))
    world.actor("closer", stop)
    world.finally_(lambda: in_order(got, tuple((word,) for word in range(posters))))


# ── credit ──


def sending(
    world: World,
    outbox: type[Outbox] = Outbox,
    plans: tuple[tuple[bytes, ...], ...] = ((b"aa", b"a"), (b"bbb",)),
    limit: int = 2,
    flush: bool = False,
) -> None:
    """Senders without room, and the owner who takes, writes and gives credit back."""
    tally, given = Tally(limit), [0]
    box = outbox(limit, tally, lambda: given.__setitem__(0, given[0] + 1))
    total = sum(len(m) for plan in plans for m in plan)
    written: list[bytes] = []
    flushed: list[int] = []
    world.share(box, tally, given, written, flushed)
    largest = max(len(m) for plan in plans for m in plan)
    world.always(lambda: box.held() <= max(limit, largest))

    def owner() -> None:
        while sum(map(len, written)) < total:
            world.block(lambda: given[0], "sleep")
            given[0] = 0
            for chunk in box.take():
                written.append(chunk)
                box.give_back(len(chunk))

    def sender(plan: tuple[bytes, ...]) -> None:
        for message in plan:
            box.put(message, None)
        if flush:
            box.flush(None)
            flushed.append(sum(len(chunk) for chunk in written if chunk in plan))

    world.actor("owner", owner)
    for plan in plans:
        world.actor(f"sender of {plan}", lambda plan=plan: sender(plan))

    def check() -> None:
        in_order(written, plans)
        assert box.held() == 0 == tally.used
        if flush:
            assert sorted(flushed) == sorted(sum(map(len, plan)) for plan in plans), "all was with the kernel"

    world.finally_(check)


def giving_up(world: World) -> None:
    """A sender that may time out harms neither the one behind it nor the count."""
    tally, rung_, written, outcome = Tally(9), [0], [], []
    box = Outbox(2, tally, lambda: rung_.__setitem__(0, 1))
    world.share(box, tally, rung_, written, outcome)
    box.put(b"aa", None)
    done = [0]
    world.share(done)

    def owner() -> None:
        for _ in range(2):
            world.block(lambda: rung_[0] or done[0] == 2, "sleep")
            rung_[0] = 0
            for chunk in box.take():
                written.append(chunk)
                box.give_back(len(chunk))
        world.block(lambda: done[0] == 2, "join")
        for chunk in box.take():
            written.append(chunk)
            box.give_back(len(chunk))

    def sender(message: bytes, timeout: float | None) -> None:
        try:
            box.put(message, timeout)
            outcome.append(message)
        except bridge.SendTimeout:
            pass
        done[0] += 1

    world.actor("owner", owner)
    world.actor("impatient", lambda: sender(b"bb", 1.0))
    world.actor("patient", lambda: sender(b"c", None))

    def check() -> None:
        assert sorted(written) == sorted([b"aa", *outcome]) and b"c" in written
        assert box.held() == 0 == tally.used and not box._waiting

    world.finally_(check)


def ending(world: World) -> None:
    """The session ends while senders and a flusher wait: all are let go, with the cause, and the count is right."""
    tally = Tally(9)
    box = Outbox(1, tally, lambda: None)
    outcome: list[str] = []
    world.share(box, tally, outcome)
    box.put(b"a", None)

    def told(name: str, call: Callable[[], None]) -> None:
        try:
            call()
            outcome.append(f"{name} done")
        except bridge.SessionEnded:
            outcome.append(f"{name} ended")

    world.actor("sender", lambda: told("send", lambda: box.put(b"b", None)))
    world.actor("flusher", lambda: told("flush", lambda: box.flush(None)))
    world.actor("owner", lambda: box.discard(GONE) and None)

    def check() -> None:
        assert sorted(outcome) == ["flush ended", "send ended"], outcome
        assert box.held() == 0 == tally.used and box.closed

    world.finally_(check)


def reading(world: World, credit: type[ReadCredit] = ReadCredit, messages: int = 3) -> None:
    """The owner reads while it has credit and sleeps without; the application takes messages and gives back."""
    tally, woken, box = Tally(2), [0], SessionInbox()
    account = credit(2, tally, lambda: woken.__setitem__(0, 1), box)
    taken: list[int] = []
    world.share(account, tally, woken, box, taken)
    world.always(lambda: account.held() <= 2 * 2)  # what moves just now counts twice

    def owner() -> None:
        number = 0
        while number < messages:
            while account.room() <= 0:
                world.block(lambda: woken[0], "sleep")
                woken[0] = 0
            account.spend(2)
            box._deliver(None, [number], account, 2, 2)
            number += 1

    def application() -> None:
        while len(taken) < messages:
            taken.append(box.get())

    world.actor("owner", owner)
    world.actor("application", application)

    def check() -> None:
        assert taken == list(range(messages)) and account.held() == 0 == tally.used

    world.finally_(check)


# ── inboxes ──


def receiving(
    world: World,
    inbox: type[SessionInbox] = SessionInbox,
    peek: bool = False,
    ends: bool = True,
    batches: tuple[tuple[int, ...], ...] = ((1,), (2,)),
) -> None:
    """Two receivers, one who delivers *batches*, and the end; with *peek* one of them only looks.

    Unless it *ends*, each takes one message, and must be woken by nothing but that.
    """
    box = inbox()
    got: list[int] = []
    world.share(box, got)
    session = object()

    def receiver() -> None:
        with contextlib.suppress(bridge.SessionEnded):
            got.append(box.get())
            while ends:
                got.append(box.get())

    def deliver() -> None:
        for batch in batches:
            box._deliver(session, list(batch), None, 0, 0)
        if ends:
            box._end(session, GONE, True, lambda: None)

    def look() -> None:
        with contextlib.suppress(bridge.SessionEnded):
            assert box.peek() in (1, 2)

    world.actor("receiver", receiver)
    world.actor("another", look if peek else receiver)
    world.actor("coordinator", deliver)
    world.finally_(lambda: in_order(sorted(got), ((1,), (2,))))


class Alone(Worker):
    """A worker whose steps are one thread's at a time."""

    inside = False

    def _step(self, timeout: float | None, handshakes: int) -> bool:
        assert not self.inside, "two threads are the worker"
        self.inside = True
        try:
            return super()._step(timeout, handshakes)
        finally:
            self.inside = False


class Speaker(Thing):
    """A session reduced to the words that its owner brings to a shared inbox."""

    def __init__(self, box: Inbox, credit: ReadCredit) -> None:
        super().__init__(1)
        self._box, self._credit = box, credit

    def word(self, word: int) -> None:
        self._box._deliver(None, [word], self._credit, 0, 0)

    def turn(self, ready: int, now: float) -> bool:
        return True

    def end(self, cause: bridge.SessionEnded, *, linger: bool = True) -> None:
        self.finished = True


def sitting(
    world: World,
    place: type[Seat] = Seat,
    count: int = 2,
    handlers: int = 1,
    timeout: float | None = None,
    word_of_mouth: bool = False,
    elsewhere: bool = False,
) -> None:
    """Handlers who may be guests in a worker's seat, the worker, who stands by, and one who has *count* words for them.

    The first is there already, and somebody has asked for the seat.  By *word_of_mouth*, the last does not come through
    the worker.  *elsewhere* is where a handler waits before it comes back.  How long a guest is away is left open:
    whenever the worker looks, it may have been too long.
    """
    before = seat.QUICK, inbox.STEADY
    seat.QUICK, inbox.STEADY = -1.0, 1
    world.closing(lambda: setattr(seat, "QUICK", before[0]))
    world.closing(lambda: setattr(inbox, "STEADY", before[1]))
    owner = Alone("worker", lambda batch: None)

    class Left(place):  # type: ignore[misc,valid-type]
        def sit(self, *arguments: Any) -> None:
            super().sit(*arguments)  # and what comes out of a step is the worker's
            world.check_alive()

    owner.seat = Left(owner)
    owner._poller.close()
    owner._poller = Bed(world)
    owner._poller.watch(owner._doorbell, 1, None)
    world.closing(owner.close)
    box, got = Inbox(), []
    account = ReadCredit(1_000, Tally(1_000), nobody, box, seat=owner.seat)
    world.share(owner, box, account, got)
    box._deliver(None, [0], account, 0, 0)
    owner.seat._asked = -1  # somebody

    def work() -> None:
        owner.seat.sit_down()
        owner.seat.offer(True)
        owner.run()

    def handler() -> None:
        this_thread.notes.serves_all, this_thread.notes.seat = False, None  # whatever another run has left
        with contextlib.suppress(bridge.ShutDown):
            while True:
                with contextlib.suppress(bridge.ReceiveTimeout):
                    got.append(box.get(timeout=timeout)[1])
                    if elsewhere:
                        give_up_seat(this_thread.notes)
                    if len(got) == count:
                        box.shutdown()
                        owner.stop()

    def speaker() -> None:
        for word in range(1, count - word_of_mouth):
            owner.post(Speaker(box, account), "word", word)
        if word_of_mouth:
            box.put((None, count - 1))

    world.actor("worker", work)
    for number in range(handlers):
        world.actor(f"handler {number}", handler)
    world.actor("speaker", speaker)

    def check() -> None:
        assert sorted(got) == list(range(count)) and owner._ended and not box._sleepers

    world.finally_(check)


def waiting(world: World) -> None:
    """Two wait for a latch, one of them not for ever."""
    latch: Latch[int] = Latch()
    got: list[int | None] = []
    world.share(latch, got)

    def patient() -> None:
        got.append(latch.wait(None, "never"))

    def impatient() -> None:
        try:
            got.append(latch.wait(1.0, "in time"))
        except bridge.OperationTimeout:
            got.append(None)

    world.actor("patient", patient)
    world.actor("impatient", impatient)
    world.actor("setter", lambda: latch.set(7))

    def check() -> None:
        assert got.count(7) >= 1 and set(got) <= {7, None}, got
        assert latch.peek() == latch.wait(None, "at once") == 7

    world.finally_(check)


SMALL: dict[str, Callable[[World], None]] = {
    "words": lambda world: words(world, plans=((1,), (2,))),
    "worker": lambda world: worker(world, others=0),
    "coordinator": lambda world: coordinator(world, posters=1),
    "sending": lambda world: sending(world, plans=((b"aa",), (b"bbb",))),
    "flushing": lambda world: sending(world, plans=((b"aa",),), flush=True),
    "ending": ending,
    "reading": lambda world: reading(world, messages=2),
    "receiving": lambda world: receiving(world, ends=False, batches=((1, 2),)),
    "waiting": waiting,
}
LARGE: dict[str, Callable[[World], None]] = {
    "words": words,
    "worker": worker,
    "coordinator": coordinator,
    "receiving": receiving,
    "receiving without end": lambda world: receiving(world, ends=False),
    "three putters": lambda world: words(world, plans=((1,), (2,), (3,))),
    "sending": sending,
    "flushing": lambda world: sending(world, flush=True),
    "giving up": giving_up,
    "reading": reading,
    "peeking": lambda world: receiving(world, peek=True),
}
SITTING: dict[str, dict[str, Any]] = {
    "a guest": {},
    "one who waits elsewhere": {"elsewhere": True},
}
"""At the lines of `bridge.seat`, and at each lock."""
LONG_SITTING: dict[str, dict[str, Any]] = {
    "one who gives up": {"timeout": 1.0},
    "a word by another way": {"word_of_mouth": True},
    "two guests": {"handlers": 2},
    "again and again": {"count": 3},
}
BYTECODE: dict[str, Callable[[World], None]] = {
    "words": lambda world: words(world, plans=((1,),)),
    "sending": lambda world: sending(world, plans=((b"aa", b"b"),)),
    "reading": lambda world: reading(world, messages=2),
}


def shown(report: Report) -> None:
    print(f"{report.runs} runs, {report.states} states, {report.points} points")
    assert report.states > 50


@pytest.mark.timeout(180)  # it computes all the time, and shares the machine with others
@pytest.mark.parametrize("name", SMALL)
def test_every_interleaving_keeps_every_promise(name: str) -> None:
    shown(explore(SMALL[name], *CROSSING))


def test_the_garbage_collector_has_no_turn_in_a_run() -> None:
    """What it finalizes, on whatever thread it comes to, is code under test that no schedule has in it."""

    def littered(world: World) -> None:
        loop: list[Any] = [_Turn(Inbox())]
        loop.append(loop)
        SMALL["flushing"](world)

    clean, threshold = explore(SMALL["flushing"], *CROSSING), gc.get_threshold()
    gc.set_threshold(20)
    try:
        assert explore(littered, *CROSSING) == clean
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", SITTING)
def test_every_interleaving_of_a_worker_and_its_guests_keeps_every_promise(how: str) -> None:
    shown(explore(lambda world: sitting(world, **SITTING[how]), seat.__file__))


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LARGE)
def test_so_it_does_with_more_threads_and_words(name: str) -> None:
    shown(explore(LARGE[name], *CROSSING))


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", LONG_SITTING)
def test_so_it_does_with_more_guests(how: str) -> None:
    shown(explore(lambda world: sitting(world, **LONG_SITTING[how]), seat.__file__))


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BYTECODE)
def test_so_it_does_with_a_switch_at_every_bytecode(name: str) -> None:
    shown(explore(BYTECODE[name], *CROSSING, opcodes=True))


# ── it can fail ──


class FallsAsleepCarelessly(Mailbox[Any]):
    """It looks first and says that it sleeps afterwards."""

    __slots__ = ()

    def may_sleep(self) -> bool:
        if self._items:
            return False
        self.asleep = True
        return True


class WakesNobody(Outbox):
    __slots__ = ()

    def _grant(self, most: int) -> bool:
        return False


class TakesAnything(Outbox):
    __slots__ = ()

    def _fits(self, size: int) -> bool:
        return True


class NeverResumes(ReadCredit):
    __slots__ = ()

    def _review(self, decoded: int = 0) -> bool:
        super()._review(decoded)
        return False


class TellsNobody(SessionInbox):
    def _call(self) -> None:
        pass


class CallsOneForAll(SessionInbox):
    """Whoever was called has come, but does not count as such: nobody calls the next."""

    def _rise(self, bed: Any) -> bool:
        called = self._called
        asleep = super()._rise(bed)
        self._called = called
        return asleep


class StandsByForEver(Seat):
    """Its worker does not look once more before it sleeps."""

    __slots__ = ()

    def _stand_by(self) -> None:
        while True:
            self._gate.sleep(ROUND if self._looks else None)
            if self._lock.acquire(False):
                return
            self.is_mine()  # a line of the seat's, where somebody else may go on
            self._looks = False


class LeavesWithoutAWord(Seat):
    """A guest who gets up does not say so."""

    __slots__ = ()

    class Mute(Gate):
        def ring(self) -> None:
            pass

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self._gate = self.Mute()


class ComesUninvited(Seat):
    """A guest does not ask whether the seat is free."""

    __slots__ = ()

    def place(self) -> Any:
        return Guest(self) if self._open else _Asking(self)


@pytest.mark.parametrize(
    ("scenario", "words_of_the_story"),
    [
        (lambda world: words(world, FallsAsleepCarelessly), "nobody can go on"),
        (lambda world: sending(world, WakesNobody), "nobody can go on"),
        (lambda world: sending(world, TakesAnything), "an invariant does not hold"),
        (lambda world: reading(world, NeverResumes), "nobody can go on"),
        (lambda world: receiving(world, TellsNobody, ends=False), "nobody can go on"),
        (lambda world: receiving(world, CallsOneForAll, ends=False), "nobody can go on"),
    ],
    ids=["careless sleep", "no wake-up", "no bound", "no resume", "no word of a message", "no next call"],
)
def test_a_planted_fault_is_found(scenario: Callable[[World], None], words_of_the_story: str) -> None:
    with pytest.raises(Refuted, match=words_of_the_story):
        explore(scenario, *CROSSING, __file__)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("place", "words_of_the_story"),
    [
        (StandsByForEver, "nobody can go on"),
        (LeavesWithoutAWord, "nobody can go on"),
        (ComesUninvited, "two threads are the worker"),
    ],
)
def test_a_fault_planted_in_the_seat_is_found(place: type[Seat], words_of_the_story: str) -> None:
    with pytest.raises(Refuted, match=words_of_the_story):
        explore(lambda world: sitting(world, place), seat.__file__)
