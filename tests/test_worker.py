"""A worker alone, in lockstep, with pollables that do as they are told: who has a turn, when, and what it sees."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peers import PATIENCE
from rig import Clock
from structlog.testing import capture_logs

from bridge.errors import SessionAborted, SessionEnded
from bridge.poll import NOTHING, Want
from bridge.threads import check_may_wait
from bridge.worker import AGAIN, AT_A_TIME, HAND_OVER, HANDSHAKES, SPARE_TIMERS, STALLED_TURNS, Worker

NO_TIME = 0.0


class Thing:
    """A pollable whose turns are noted."""

    def __init__(self, sock: socket.socket | None = None, mask: int = NOTHING) -> None:
        self.sock, self.mask = sock, mask
        self.again = self.finished = self.opening = False
        self.deadline: float | None = None
        self.retired: list[socket.socket] = []
        self.now = 0.0
        self.lock = threading.RLock()
        self.turns: list[int] = []
        self.ends: list[SessionEnded] = []
        self.lingers = False
        self.left = 0
        self.moved = 0
        self.stalls: list[int] = []
        self.act: Callable[[], Any] = lambda: None

    def turn(self, ready: int, now: float) -> bool:
        assert self.lock._is_owned()  # type: ignore[attr-defined]
        self.turns.append(ready)
        return self.act() is not False

    def poke(self, *arguments: Any) -> None:
        """A command that does nothing."""
        assert self.lock._is_owned()  # type: ignore[attr-defined]

    def end(self, cause: SessionEnded, *, linger: bool = True) -> None:
        self.ends.append(cause)
        self.lingers = linger

    def gone(self) -> None:
        self.left += 1

    def evidence(self) -> tuple[object, ...]:
        return ()

    def stalled(self, turns: int, whose: str) -> None:
        self.stalls.append(turns)
        self.mask = NOTHING


@pytest.fixture
def handed_over() -> list[list[Any]]:
    return []


@pytest.fixture
def worker(handed_over: list[list[Any]]) -> Iterator[Worker]:
    made = Worker("w", handed_over.append)
    yield made
    if not made._stopping:
        made.stop()
        made.step()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def given(worker: Worker, *things: Thing) -> None:
    """They have come to *worker*, and had their first turn."""
    for thing in things:
        worker.post(thing, "poke")
    worker.step()
    for thing in things:
        assert thing.turns.pop() == NOTHING and not thing.turns


# ── turns ──


def test_a_step_says_whether_anything_was_done(worker: Worker) -> None:
    thing = Thing()
    assert not worker.step()
    worker.post(thing, "poke")
    assert worker.step() and not worker.step()
    assert thing.turns == [NOTHING] and worker.load() == 1


def test_a_ring_for_nothing_is_nothing_done(worker: Worker) -> None:
    worker._doorbell.ring()
    assert not worker.step(PATIENCE)
    assert not worker._poller.wait(0), "it has been silenced"


def test_a_turn_is_told_what_the_poll_says_and_the_time(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.READ)
    before = time.monotonic()
    given(worker, thing)
    assert before <= thing.now <= time.monotonic()
    assert not worker.step()
    pair[1].send(b"x")
    assert worker.step() and worker.step()
    assert thing.turns == [Want.READ, Want.READ]
    worker.post(thing, "poke")
    worker.step()
    assert thing.turns == [Want.READ] * 3, "a word takes nothing from what the poll said"


def test_who_was_cut_short_goes_on_in_the_next_step_which_does_not_sleep_first(worker: Worker) -> None:
    thing = Thing()
    given(worker, thing)
    thing.again = True
    worker.post(thing, "poke")
    worker.step()
    begin = time.monotonic()
    assert worker.step(PATIENCE)
    thing.again = False
    assert worker.step(PATIENCE)
    assert time.monotonic() - begin < PATIENCE / 2
    assert thing.turns == [NOTHING, AGAIN, AGAIN]
    assert not worker.step()


def test_what_the_poll_says_counts_for_more_than_that_a_turn_was_cut_short(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.WRITE)
    given(worker, thing)
    thing.again = True
    worker.step()
    worker.step()
    assert thing.turns == [Want.WRITE, Want.WRITE]


def test_a_turn_in_which_nothing_has_changed_is_not_looked_at(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.READ)
    given(worker, thing)
    thing.mask, thing.act = NOTHING, lambda: False
    pair[1].send(b"x")
    worker.step()
    worker.step()
    assert thing.turns == [Want.READ] * 2 and worker._watched[thing].turns == 0
    thing.act = lambda: True
    worker.step()
    assert not worker.step() and worker._watched[thing].turns == 1


# ── the line ──


@contextlib.contextmanager
def many(worker: Worker, count: int) -> Iterator[list[Thing]]:
    """That many, and all have something to read."""
    pairs = [socket.socketpair() for _ in range(count)]
    things = [Thing(near, Want.READ) for near, _ in pairs]
    given(worker, *things)
    for _, far in pairs:
        far.send(b"hello")
    try:
        yield things
    finally:
        worker.stop()
        worker.step()
        for near, far in pairs:
            near.close()
            far.close()


@pytest.fixture
def crowd(worker: Worker) -> Iterator[list[Thing]]:
    """One that is open, and behind it thrice as many as a step lets on; all have something to read."""
    with many(worker, 1 + 3 * HANDSHAKES) as things:
        for thing in things[1:]:
            thing.opening = True
        yield things


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="other polls speak of all sockets at once")
def test_of_more_than_a_look_tells_of_each_has_its_turn_before_any_has_a_second(worker: Worker) -> None:
    with many(worker, 2 * AT_A_TIME) as things:
        for times in (1, 2, 3):
            worker.step()
            worker.step()
            assert [len(thing.turns) for thing in things] == [times] * len(things)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="other polls speak of all sockets at once")
def test_while_some_stand_in_line_a_step_leaves_out_nobody_else(worker: Worker) -> None:
    with many(worker, 3 * AT_A_TIME) as things:
        *line, guest = things
        for thing in line:
            thing.opening = True
        worker.step()
        assert len(guest.turns) == 0 and sum(bool(thing.turns) for thing in line) == HANDSHAKES
        worker.step()
        assert len(guest.turns) == 1 and sum(bool(thing.turns) for thing in line) == 2 * HANDSHAKES


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="other polls speak of all sockets at once")
def test_who_was_cut_short_has_no_more_turns_than_the_others(worker: Worker) -> None:
    with many(worker, 3 * AT_A_TIME) as things:
        greedy, *others = things
        greedy.again = True
        for _ in range(10):
            worker.step()
        assert len(greedy.turns) == 10 and {len(thing.turns) for thing in others} <= {9, 10}


def test_those_who_shake_hands_stand_in_line_and_the_others_do_not(
    worker: Worker, crowd: list[Thing], handed_over: list[list[Any]]
) -> None:
    for thing in crowd:
        thing.act = lambda thing=thing: worker.produced.append(thing)  # type: ignore[misc]
    guest, *line = crowd
    for number in range(6):
        assert worker.step(PATIENCE)
        first = number % 3 * HANDSHAKES
        assert handed_over == [[guest], line[first : first + HANDSHAKES]], (
            "and what the others say does not wait"
        )
        handed_over.clear()


def test_who_stands_in_line_is_not_asked_after_and_the_worker_does_not_sleep(
    worker: Worker, crowd: list[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[float | None, int]] = []
    wait = worker._poller.wait

    def count(timeout: float | None, most: int) -> Any:
        ready = wait(0, most)
        waits.append((timeout, len(ready)))
        return ready

    monkeypatch.setattr(worker._poller, "wait", count)
    for thing in crowd:
        thing.act = lambda thing=thing: setattr(thing, "mask", NOTHING)  # type: ignore[misc]
    while worker.step(None):
        pass
    assert waits == [(None, len(crowd)), (0, 0), (0, 0), (None, 0)]
    assert all(thing.turns == [Want.READ] for thing in crowd)


def test_commands_and_deadlines_reach_those_in_line(worker: Worker, crowd: list[Thing]) -> None:
    *_, gone, late = crowd
    worker.step()
    late.deadline = time.monotonic()
    gone.finished = True
    for thing in (gone, late):
        worker.post(thing, "poke")
        thing.mask = NOTHING
    worker.step()
    assert gone.turns == late.turns == [NOTHING] and worker.load() == len(crowd) - 1
    worker.step()
    assert gone.turns == [NOTHING] and late.turns == [NOTHING, NOTHING, Want.READ]


# ── the poll set ──


def test_what_is_waited_for_changes_with_the_mask_and_the_socket(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    thing = Thing(near, Want.READ)
    given(worker, thing)
    thing.mask = Want.READ | Want.WRITE
    given(worker, thing)
    worker.step()
    assert thing.turns.pop() == Want.WRITE
    other, its_end = socket.socketpair()
    with other, its_end:
        thing.sock, thing.mask = other, Want.READ
        worker.step()
        thing.turns.clear()
        far.send(b"for nobody")
        assert not worker.step()
        its_end.send(b"for us")
        assert worker.step() and thing.turns.pop() == Want.READ
        thing.mask = NOTHING
        worker.step()
        assert not worker.step()
        thing.turns.clear()
        thing.sock, thing.mask = near, Want.READ
        given(worker, thing)
        assert worker.step() and thing.turns == [Want.READ]
        thing.sock = None
        worker.step()
        assert not worker.step() and worker.load() == 1


def test_what_has_finished_is_let_go_and_its_sockets_closed(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    thing = Thing(near, Want.READ)
    given(worker, thing)
    thing.finished, thing.deadline, thing.retired = True, time.monotonic(), [near]
    given(worker, thing)
    assert near.fileno() == -1 and far.recv(1) == b"" and thing.retired == []
    assert thing.left == 1 and worker.load() == 0
    worker.post(thing, "unheard of")
    assert not worker.step() and worker.load() == 0


# ── deadlines ──


def test_a_deadline_is_kept_and_no_turn_comes_before_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    thing = Thing()
    thing.deadline = clock.now + 10
    given(worker, thing)
    given(worker, thing)
    assert len(worker._timers) == 1, "one timer is enough"
    clock.now += 9
    assert not worker.step()
    clock.now += 1
    assert worker.step() and thing.turns == [NOTHING]
    assert worker.step(), "it has not changed, so it has passed once more"
    thing.deadline = None
    worker.step()
    assert not worker.step() and not worker._timers


def test_an_earlier_deadline_comes_first_and_a_later_one_when_it_is_due(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    thing = Thing()
    thing.deadline = clock.now + 20
    given(worker, thing)
    thing.deadline = clock.now + 10
    given(worker, thing)
    clock.now += 10
    thing.deadline = clock.now + 20  # put off, which the worker need not know before it is due
    assert worker.step() and thing.turns == [NOTHING]
    clock.now += 10
    assert not worker.step(), "the first timer is out of date"
    clock.now += 10
    assert worker.step() and len(thing.turns) == 2


def test_deadlines_that_are_near_again_and_again_leave_no_heap_of_timers(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, thing = 1000.0, Thing()
    monkeypatch.setattr("bridge.worker.time", types.SimpleNamespace(monotonic=lambda: clock))
    given(worker, thing)
    for _ in range(10 * SPARE_TIMERS):
        thing.deadline = clock + 1
        worker.post(thing, "poke")
        worker.step()
        thing.deadline = 10_000.0
        clock += 1
        worker.step()
    assert len(worker._timers) <= SPARE_TIMERS + 3
    thing.turns.clear()
    clock = 10_000.0
    worker.step()
    assert thing.turns == [NOTHING], "the one that is left is kept"


def test_the_worker_sleeps_no_longer_than_to_the_next_deadline_nor_than_it_may(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float | None] = []
    wait = worker._poller.wait
    monkeypatch.setattr(worker._poller, "wait", lambda timeout, _: slept.append(timeout) or wait(0))
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    worker.step(None)
    thing, other = Thing(), Thing()
    thing.deadline = clock.now + 10
    given(worker, thing)
    slept.clear()
    worker.step(None)
    worker.step(4)
    worker.step(30)
    worker.step()
    thing.deadline = clock.now + 5
    given(worker, thing)
    thing.deadline = clock.now + 50
    clock.now += 5
    worker.step()  # the earlier one has passed, and the first is out of date
    slept.clear()
    worker.step(None)
    clock.now += 60
    worker.step(None)
    assert slept == [45, 0]
    other.deadline = clock.now - 1
    slept.clear()
    given(worker, other)
    worker.step(None)
    assert slept == [0, 0]


def test_a_worker_that_is_awake_is_not_rung(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[int] = []
    monkeypatch.setattr(worker._mailbox, "_ring", lambda: rings.append(1))
    monkeypatch.setattr(worker._poller, "wait", lambda *_: [])
    worker.step(None)
    worker.post(Thing(), "poke")
    assert not rings


# ── what turns produce, and what they raise ──


def test_what_turns_produce_is_handed_over_in_one_piece_or_in_few(
    worker: Worker, handed_over: list[list[Any]]
) -> None:
    things = [Thing() for _ in range(3)]

    def produce() -> None:
        worker.produced.extend(range(HAND_OVER // 2))

    for thing in things:
        thing.act = produce
    given(worker, *things)
    assert [len(batch) for batch in handed_over] == [HAND_OVER, HAND_OVER // 2]
    worker.step()
    assert len(handed_over) == 2 and worker.produced == []


def test_a_turn_that_raises_ends_its_own_session_and_says_so(worker: Worker) -> None:
    ill, well = Thing(), Thing()

    def fall() -> None:
        ill.mask, ill.finished = NOTHING, True
        raise ValueError("a bug")

    ill.act = fall
    with capture_logs() as logs:
        given(worker, ill, well)
    (cause,) = ill.ends
    assert isinstance(cause, SessionAborted) and isinstance(cause.__cause__, ValueError)
    assert str(cause) == "internal error: ValueError('a bug')"
    assert [entry["event"] for entry in logs] == ["worker.failed"]
    assert logs[0]["worker"] == "w" and logs[0]["error"] == "ValueError('a bug')"
    assert not well.ends and worker.load() == 1, "what it left is looked at"


def test_what_a_bug_has_ended_has_one_more_turn(worker: Worker) -> None:
    ill = Thing()

    def fall() -> None:
        ill.act = lambda: setattr(ill, "again", False)
        raise ValueError("a bug")

    ill.act = fall
    with capture_logs():
        given(worker, ill)
    assert worker.step() and ill.turns == [AGAIN] and not worker.step()


def test_a_session_that_spins_is_watched_and_ended_after_so_many_turns_in_vain(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.WRITE)
    given(worker, thing)
    for moved in [1, 1, 1] + [0] * (STALLED_TURNS - 3):
        thing.moved += moved
        worker.step()
    watch = worker._watched[thing]
    assert watch.turns == STALLED_TURNS, "it has its turns, and now they are looked at"
    worker.step()
    assert watch.turns == 1, "it has moved since: it gets as many again"
    for turns in range(1, STALLED_TURNS):
        assert watch.turns == turns
        worker.step()
    for _ in range(STALLED_TURNS + 1):  # the first of which only finds out how things stand
        assert not thing.stalls
        worker.step()
    assert thing.stalls == [STALLED_TURNS]
    assert not worker.step(), "and what it has become is looked at"


def test_a_session_that_has_never_moved_is_found_after_twice_as_many_turns(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.WRITE)
    given(worker, thing)
    for _ in range(2 * STALLED_TURNS + 1):
        assert not thing.stalls
        worker.step()
    assert thing.stalls == [STALLED_TURNS]


def changes_now_and_then(thing: Thing) -> None:
    proofs = iter(range(10_000))
    thing.evidence = lambda: (next(proofs) // STALLED_TURNS,)  # type: ignore[method-assign]


def moves_now_and_then(thing: Thing) -> None:
    turns = iter(range(10_000))

    def move() -> None:
        thing.moved += next(turns) % STALLED_TURNS == 0

    thing.act = move


def moves_no_bytes(thing: Thing) -> None:
    thing.evidence = lambda: None  # type: ignore[method-assign, assignment, return-value]


@pytest.mark.parametrize("kind", [changes_now_and_then, moves_now_and_then, moves_no_bytes])
def test_what_gets_on_or_has_nowhere_to_get_to_has_not_stalled(
    kind: Callable[[Thing], None], worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    thing = Thing(pair[0], Want.WRITE)
    kind(thing)
    given(worker, thing)
    for _ in range(5 * STALLED_TURNS):
        worker.step()
    assert not thing.stalls


# ── the end ──


def test_stop_ends_what_is_left_twice_and_closes_everything(
    worker: Worker,
    handed_over: list[list[Any]],
    pair: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[None] = []
    for part in (worker._poller, worker._doorbell):
        monkeypatch.setattr(part, "close", lambda close=part.close: closed.append(close()))
    thing = Thing(pair[0], Want.READ)
    given(worker, thing)
    thing.retired = [pair[0]]
    thing.act = lambda: worker.produced.append("the last word")
    worker.post(thing, "poke")
    worker.stop()
    worker.post(thing, "poke")
    worker.run()
    check_may_wait()  # as any thread again
    assert thing.turns == [NOTHING, NOTHING] and not thing.lingers
    assert [str(cause) for cause in thing.ends] == ["the bridge was closed"]
    assert pair[0].fileno() == -1
    assert handed_over == [["the last word"], ["the last word"]]
    assert closed == [None, None]


def test_a_command_that_raises_ends_its_own_session_only(worker: Worker) -> None:
    ill, well = Thing(), Thing()
    given(worker, ill, well)
    worker.post(ill, "no such command")
    with capture_logs() as logs:
        assert worker.step()
    assert (
        len(ill.ends) == 1
        and ill.lingers
        and not well.ends
        and [entry["event"] for entry in logs] == ["worker.failed"]
    )


def test_a_descriptor_that_another_session_has_ends_its_own_session_only(
    worker: Worker, pair: tuple[socket.socket, socket.socket]
) -> None:
    near = pair[0]
    twin = socket.socket(fileno=near.fileno())
    one, other = Thing(near, Want.READ), Thing(twin, Want.READ)
    other.act = lambda: setattr(other, "finished", bool(other.ends))
    with capture_logs():
        given(worker, one, other)
        worker.step()
    assert other.ends and not one.ends and worker.load() == 1
    twin.detach()


def test_a_bug_of_the_worker_ends_what_is_left_too(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = Thing()
    given(worker, thing)
    monkeypatch.setattr(worker, "_line_up", None)
    worker.post(thing, "poke")
    with pytest.raises(TypeError):
        worker.run()
    assert len(thing.ends) == 1 and not thing.lingers
    worker._stopping = True


# ── a guest's steps ──


def test_a_guest_makes_no_handshakes(worker: Worker) -> None:
    sockets = [socket.socketpair() for _ in range(3)]
    things = [Thing(near, Want.READ) for near, _ in sockets]
    given(worker, *things)
    for thing, (_, far) in zip(things, sockets, strict=True):
        thing.opening = True
        far.send(b"x")
    assert not worker.step_in(PATIENCE), "the worker is to go on"
    assert all(not thing.turns for thing in things) and len(things) < HANDSHAKES
    worker.step()
    assert all(thing.turns == [Want.READ] for thing in things), "one turn each"
    for thing in things:
        thing.mask = NOTHING
    worker.step()
    for both in sockets:
        for sock in both:
            sock.close()


def test_a_guest_does_not_end_the_worker(worker: Worker) -> None:
    worker.stop()
    assert not worker.step_in(PATIENCE) and not worker._ended
    worker.step(PATIENCE)
    assert worker._ended


def test_a_guest_s_step_is_a_step(worker: Worker, pair: tuple[socket.socket, socket.socket]) -> None:
    thing = Thing(pair[0], Want.READ)
    given(worker, thing)
    pair[1].send(b"x")
    assert worker.step_in(PATIENCE) and thing.turns == [Want.READ]


def test_a_guest_leaves_what_needs_no_poll_to_the_worker(worker: Worker) -> None:
    """It goes on at once, and the guest has a message to see to first."""
    thing = Thing()
    given(worker, thing)
    thing.again = True
    worker.post(thing, "poke")
    assert not worker.step_in(PATIENCE)
    thing.again = False
    worker.step()


def test_a_seat_is_not_offered_for_what_was_asked_in_an_earlier_step(worker: Worker) -> None:
    """Who asked is somewhere else by now, and nobody would sit there."""
    worker.seat._asked = threading.get_ident()
    worker.seat.offer(False)
    worker.seat.offer(True)
    assert not worker.seat._open
