"""What surviving mutants of the queues and codecs have taught: exact counts, and exact edges."""

from __future__ import annotations

import concurrent.futures
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from peers import PATIENCE, Background

import bridge
from bridge import forks
from bridge.codecs import LengthPrefixed
from bridge.crossing import TALLY_STEP, Gate, Latch, Mailbox, Registry, Tally
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.outbox import Outbox, _Ticket


def test_an_outbox_is_full_when_not_one_byte_more_fits() -> None:
    outbox = Outbox(3, Tally(100), lambda: None)
    outbox.put(b"aa", None)
    assert not outbox.full() and outbox.held() == 2
    outbox.put(b"a", None)
    assert outbox.full() and outbox.held() == 3
    outbox.give_back(1)
    assert not outbox.full()


def test_read_credit_is_exact_and_resumes_once_also_at_its_smallest() -> None:
    resumed: list[int] = []
    inbox = SessionInbox()
    credit = ReadCredit(10, Tally(100), lambda: resumed.append(1), inbox)
    credit.spend(4)
    assert credit.room() == 6
    smallest = ReadCredit(1, Tally(100), lambda: resumed.append(2), inbox)
    smallest.spend(1)
    assert smallest.room() == 0
    smallest.settle(1)
    assert resumed == [2]


def test_a_prefix_that_came_whole_is_no_part_of_a_header() -> None:
    codec = LengthPrefixed(1)
    assert list(codec.decode(b"\x02")) == []
    with pytest.raises(bridge.CodecError, match="inside a message: 0 of 2 bytes came"):
        list(codec.eof())


def test_a_mailbox_rings_for_the_first_word_that_finds_its_owner_asleep_and_for_no_other() -> None:
    rings: list[int] = []
    mailbox: Mailbox[int] = Mailbox(lambda: rings.append(1))
    mailbox.put(1)
    assert not rings and not mailbox.may_sleep(), "nobody has ever slept"
    mailbox.put(2)
    assert not rings and mailbox.take() == [1, 2]
    assert mailbox.may_sleep()
    mailbox.put(3)
    mailbox.put(4)
    assert rings == [1] and mailbox.take() == [3, 4]
    assert mailbox.may_sleep()
    mailbox.awake()
    mailbox.put(5)
    assert rings == [1]


def test_a_registry_counts_its_members_and_keeps_what_the_others_counted() -> None:
    registry: Registry[str] = Registry()
    assert registry.add("a") and registry.add("b") and len(registry) == 2
    registry.remove("a", {("bytes",): 1})
    registry.remove("a", {("bytes",): 1})
    registry.remove("b", {("bytes",): 2})
    assert registry.census() == ([], {("bytes",): 3}) and len(registry) == 0
    assert registry.add("c") and registry.seal() == ["c"]
    assert not registry.add("d") and list(registry) == ["c"] and "d" not in registry


def test_a_thread_that_has_taken_nothing_is_done_with_nothing() -> None:
    inbox = Inbox()
    inbox.task_done()
    inbox.put(("session", 1))
    inbox.task_done()
    assert inbox.get_nowait() == ("session", 1)


class Scripted(Gate):
    """One that does something else in place of sleeping."""

    __slots__ = ("instead",)

    def __init__(self, instead: Callable[[], object]) -> None:
        super().__init__()
        self.instead = instead

    def sleep(self, timeout: float | None) -> None:
        self.instead()


def sleepers(inbox: Inbox, count: int) -> list[Gate]:
    """Those of *inbox*, once there are so many."""
    deadline = time.monotonic() + PATIENCE
    while len(inbox._sleepers) < count:
        assert time.monotonic() < deadline
    return list(inbox._sleepers)


def test_a_word_wakes_the_first_who_sleeps_and_nobody_else(background: Background) -> None:
    inbox = SessionInbox()
    first = background.run(lambda: inbox.get(timeout=PATIENCE))
    sleepers(inbox, 1)
    second = background.run(lambda: inbox.get(timeout=PATIENCE))
    _, gate = sleepers(inbox, 2)
    inbox.put((None, "a word"))
    assert first.result(PATIENCE) == "a word" and list(inbox._sleepers) == [gate]
    inbox.put((None, "another"))
    assert second.result(PATIENCE) == "another" and not inbox._sleepers


@pytest.mark.parametrize("kind", [Inbox, SessionInbox])
def test_whoever_comes_calls_the_next(
    monkeypatch: pytest.MonkeyPatch, background: Background, kind: type[Inbox]
) -> None:
    """So many messages at once do not wake everybody, for what one or two may have taken by then."""
    inbox = kind()
    others: list[Future[object]] = []

    def asleep() -> None:
        monkeypatch.undo()
        others.extend(background.run(lambda: inbox.get(timeout=PATIENCE)) for _ in range(2))
        gates = sleepers(inbox, 3)
        for word in "abc":
            inbox.put((None, word))
        assert list(inbox._sleepers) == gates[1:]

    monkeypatch.setattr("bridge.inbox.Gate", lambda: Scripted(asleep))
    got = [inbox.get(), *(other.result(PATIENCE) for other in others)]
    assert sorted(got) == sorted((None, word) if kind is Inbox else word for word in "abc")
    assert not inbox._sleepers and inbox._called is None


def test_what_an_interrupted_receiver_was_woken_for_is_somebody_else_s(
    monkeypatch: pytest.MonkeyPatch, background: Background
) -> None:
    inbox = SessionInbox()
    others, gates = [], []

    def wake_and_interrupt() -> None:
        """Ctrl-C comes when it has just been rung."""
        monkeypatch.undo()
        for count in (2, 3):
            others.append(background.run(lambda: inbox.get(timeout=PATIENCE)))
            gates[:] = sleepers(inbox, count)
        inbox.put((None, "a word"))
        raise KeyboardInterrupt

    monkeypatch.setattr("bridge.inbox.Gate", lambda: Scripted(wake_and_interrupt))
    with pytest.raises(KeyboardInterrupt):
        inbox.get()
    assert others[0].result(PATIENCE) == "a word"
    assert list(inbox._sleepers) == gates[-1:], "one word wakes one"
    inbox.put((None, "another"))
    assert others[1].result(PATIENCE) == "another"


def test_a_put_that_ctrl_c_cuts_short_rings_all_the_same() -> None:
    rings: list[int] = []

    def ring() -> None:
        rings.append(1)
        if len(rings) == 1:
            raise KeyboardInterrupt

    mailbox: Mailbox[int] = Mailbox(ring)
    assert mailbox.may_sleep()
    with pytest.raises(KeyboardInterrupt):
        mailbox.put(1)
    assert rings == [1, 1] and mailbox.take() == [1]


def test_a_tally_hears_of_large_changes_and_of_the_end() -> None:
    tally = Tally(2 * TALLY_STEP)
    member = types.SimpleNamespace(reported=0)

    def reported(now: int) -> int:
        tally.follow(member, now)
        assert member.reported == tally.used
        return tally.used

    assert reported(TALLY_STEP - 1) == 0
    assert reported(TALLY_STEP) == TALLY_STEP
    assert tally.has_room()
    assert reported(2 * TALLY_STEP) == 2 * TALLY_STEP
    assert not tally.has_room()
    assert reported(TALLY_STEP + 1) == 2 * TALLY_STEP
    assert reported(2 * TALLY_STEP) == 2 * TALLY_STEP
    assert reported(TALLY_STEP) == TALLY_STEP
    assert reported(0) == 0
    assert reported(0) == 0


def guarded(kind: type, *names: str) -> type:
    """*kind*, whose attributes *names* may be touched, once `made`, by whoever has its lock and by nobody else."""

    def guard(name: str) -> property:
        values: list[Any] = []

        def check(self: Any) -> None:
            assert not self.made or self._lock._is_owned(), name

        def get(self: Any) -> Any:
            check(self)
            return values[-1]

        def put(self: Any, value: Any) -> None:
            check(self)
            values.append(value)

        return property(get, put)

    return type("Guarded", (kind,), {"made": False, **{name: guard(name) for name in names}})


def test_ends_in_an_inbox_are_counted_with_its_lock() -> None:
    inbox = guarded(Inbox, "_ends")()
    inbox.made = True
    inbox._end("session", bridge.EndOfStream("over"), True, lambda back: None)
    assert inbox.get_nowait() == ("session", None)


def test_who_flushes_looks_with_the_lock_of_the_outbox() -> None:
    outbox = guarded(Outbox, "_gone", "_flushing")(100, Tally(100), lambda: None)
    outbox.put(b"x", None)
    outbox.made = True
    with pytest.raises(bridge.OperationTimeout):
        outbox.flush(0.001)


def test_a_latch_that_is_set_while_somebody_lies_down_lets_him_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`set` has looked for whom to wake, and does not come again."""

    class Meanwhile(list[Gate]):
        def append(self, gate: Gate) -> None:
            latch.set(1)
            super().append(gate)

    monkeypatch.setattr(Gate, "sleep", lambda *_: pytest.fail("nobody will wake it"))
    latch: Latch[int] = Latch()
    latch._gates = Meanwhile()
    assert latch.wait(None, "it is set") == 1


def outbox_of(limit: int) -> tuple[Outbox, list[int]]:
    told: list[int] = []
    return Outbox(limit, Tally(1 << 30), lambda: told.append(1)), told


def waiting_put(outbox: Outbox, data: bytes, background: Background, **how: bool) -> Future[bool]:
    """A `put` that waits for room, on a thread of its own."""
    count = len(outbox._waiting or ())
    future = background.run(lambda: outbox.put(data, PATIENCE, **how))
    deadline = time.monotonic() + PATIENCE
    while len(outbox._waiting or ()) == count:
        assert time.monotonic() < deadline and not future.done()
    return future


def test_a_flush_waits_for_the_very_last_byte() -> None:
    outbox, told = outbox_of(10)
    assert outbox.put(b"", None) and not told and outbox.idle()
    outbox.flush(0.0)
    assert outbox.put(b"ab", None) and told == [1]
    with pytest.raises(bridge.OperationTimeout, match="flush: 2 bytes had not left within 0 seconds"):
        outbox.flush(0.0)
    outbox.give_back(1)
    with pytest.raises(bridge.OperationTimeout, match="flush: 1 bytes"):
        outbox.flush(0.0)
    outbox.give_back(1)
    outbox.flush(0.0)
    outbox.hold(1)
    with pytest.raises(bridge.OperationTimeout, match="flush: 1 bytes"):
        outbox.flush(0.0)
    outbox.give_back(1)
    outbox.flush(0.0)


def test_who_waits_for_room_is_told_what_became_of_the_message(background: Background) -> None:
    outbox, told = outbox_of(3)
    outbox.put(b"aaa", None)
    assert outbox.take() == [b"aaa"] and told == [1]
    waiting = waiting_put(outbox, b"bbb", background)
    outbox.give_back(1)
    assert outbox.held() == 2 and outbox.take() == []
    outbox.give_back(2)
    assert waiting.result(PATIENCE) is True
    assert told == [1, 1] and outbox.take() == [b"bbb"] and outbox.held() == 3
    alone = waiting_put(outbox, b"ccc", background, alone=True)
    outbox.give_back(3)
    assert alone.result(PATIENCE) is False
    assert told == [1, 1] and outbox.take() == [] and outbox.held() == 0


def test_who_comes_later_waits_behind_who_waits_also_if_there_were_room(background: Background) -> None:
    outbox, _ = outbox_of(4)
    outbox.put(b"aaa", None)
    first = waiting_put(outbox, b"bbbb", background, alone=True)
    second = waiting_put(outbox, b"c", background)
    with pytest.raises(bridge.SendTimeout, match="no room for 1 bytes within 0 seconds"):
        outbox.put(b"d", 0.0)
    assert outbox.take() == [b"aaa"]
    outbox.give_back(3)
    assert first.result(PATIENCE) is True, "somebody is behind it"
    outbox.give_back(4)
    assert second.result(PATIENCE) is True
    assert outbox.take() == [b"bbbb", b"c"]


def test_who_gives_up_lets_the_next_in_line_through(background: Background) -> None:
    outbox, told = outbox_of(4)
    outbox.put(b"aaa", None)
    assert outbox.take() == [b"aaa"]
    first = background.run(outbox.put, b"bbbb", 0.1)
    deadline = time.monotonic() + PATIENCE
    while not outbox._waiting:
        assert time.monotonic() < deadline
    second = waiting_put(outbox, b"c", background)
    with pytest.raises(
        bridge.SendTimeout, match=r"no room for 4 bytes within 0\.1 seconds; nothing was sent"
    ):
        first.result(PATIENCE)
    assert second.result(PATIENCE) is True and outbox.take() == [b"c"] and told == [1, 1]


def test_whoever_gives_up_just_when_there_is_room_has_it_after_all() -> None:
    outbox, told = outbox_of(4)
    outbox.put(b"aaaa", None)
    assert outbox.take() == [b"aaaa"]
    ticket = _Ticket(b"b", False)
    ticket.gate = Scripted(lambda: outbox.give_back(1))
    outbox._line_up(ticket)
    assert outbox._wait_for_room(ticket, 0.0) is True
    assert outbox.take() == [b"b"] and told == [1, 1]


def test_the_end_lets_everybody_go_and_counts_what_is_lost(background: Background) -> None:
    outbox, _ = outbox_of(3)
    outbox.put(b"aaa", None)
    sender = waiting_put(outbox, b"b", background)
    outbox.close(bridge.SessionClosed("closed"))
    with pytest.raises(bridge.SessionClosed, match="closed"):
        sender.result(PATIENCE)
    assert outbox.closed and not outbox.idle() and outbox.held() == 3
    flushing = background.run(outbox.flush, PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while not outbox._flushing:
        assert time.monotonic() < deadline
    assert outbox.discard(bridge.Truncated("cut")) == 3
    with pytest.raises(bridge.Truncated, match="cut"):
        flushing.result(PATIENCE)
    assert outbox.discard(bridge.Truncated("again")) == 0 == outbox.held() and outbox.take() == []
    with pytest.raises(bridge.SessionClosed):
        outbox.put(b"x", None)
    with pytest.raises(bridge.Truncated, match="cut"):
        outbox.flush(None)


def test_the_bytes_of_the_whole_bridge_are_counted_and_bounded() -> None:
    tally = Tally(TALLY_STEP)
    one, other = (Outbox(1 << 20, tally, lambda: None) for _ in range(2))
    one.put(bytes(TALLY_STEP), None)
    assert tally.used == TALLY_STEP and one.full() and not other.full()
    other.put(b"the first goes", None)
    with pytest.raises(bridge.SendTimeout):
        other.put(b"the second does not", 0.0)
    one.give_back(TALLY_STEP)
    assert tally.used == 0
    other.put(b"now", 0.0)
    assert other.held() == 17 and other.discard(bridge.Truncated("cut")) == 17


def test_credit_that_is_gone_comes_back_when_half_of_it_is_free() -> None:
    resumed: list[int] = []
    inbox, tally = SessionInbox(), Tally(1 << 30)
    credit = ReadCredit(10, tally, lambda: resumed.append(1), inbox)
    credit.spend(10)
    assert credit.room() == 0 and credit.held() == 10 and credit.overdraft() == 0
    inbox._deliver(None, [b"a", b"b"], credit, 10, 5)
    assert credit.held() == 10 and not resumed
    assert inbox.get_nowait() == b"a" and resumed == [1] and credit.held() == 5
    assert inbox.get_nowait() == b"b" and resumed == [1] and credit.held() == 0
    credit.spend(12)
    assert credit.overdraft() == 2 and credit.room() == 0
    credit.settle(6)
    assert resumed == [1] and credit.held() == 6
    credit.settle(1)
    assert resumed == [1, 1] and credit.room() == 5


def test_what_a_bridge_holds_for_reading_is_counted_and_bounded() -> None:
    tally = Tally(2 * TALLY_STEP)
    inbox = SessionInbox()
    one, other = (ReadCredit(1 << 20, tally, lambda: None, inbox) for _ in range(2))
    one.spend(TALLY_STEP - 1)
    assert tally.used == 0
    one.spend(1)
    assert tally.used == TALLY_STEP and other.room() == 1 << 20
    one.keep(TALLY_STEP)
    assert tally.used == 2 * TALLY_STEP and one.kept == TALLY_STEP
    other.spend(1)
    assert other.room() == 0 == one.room()
    one.keep(0)
    assert tally.used == TALLY_STEP and one.room() == (1 << 20) - TALLY_STEP
    inbox._deliver(None, [b"m"], one, TALLY_STEP, TALLY_STEP)
    assert one.held() == TALLY_STEP == tally.used
    one.forfeit()
    assert one.held() == 0 == tally.used
    assert inbox.get_nowait() == b"m" and one.held() == 0 == tally.used


def test_who_waits_for_room_is_woken_when_half_of_it_is_free(background: Background) -> None:
    outbox, told = outbox_of(6)
    outbox.put(b"aaaaaa", None)
    assert outbox.take() == [b"aaaaaa"]
    waiting = waiting_put(outbox, b"b", background)
    outbox.give_back(2)
    assert outbox.held() == 4 and told == [1], "there is room, but it is not worth a wake-up yet"
    outbox.give_back(1)
    assert outbox.take() == [b"b"] and outbox.held() == 4 and told == [1, 1]
    assert waiting.result(PATIENCE) is True


def test_a_flush_that_is_done_just_in_time_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, _ = outbox_of(6)
    outbox.put(b"aaaaaa", None)
    late = [False]

    def too_late() -> None:
        late[0] = True
        outbox.give_back(6)

    monkeypatch.setattr("bridge.outbox.Gate", lambda: Scripted(too_late))
    monkeypatch.setattr("bridge.outbox.time_left", lambda deadline: 0.0 if late[0] else 1.0)
    outbox.flush(1.0)
    assert late[0]


def test_nobody_is_counted_as_flushing_who_is_not() -> None:
    outbox, _ = outbox_of(6)
    outbox.put(b"aaaaaa", None)
    with pytest.raises(bridge.OperationTimeout):
        outbox.flush(0.001)
    assert outbox._flushing == ()


class Meanwhile:
    """A lock that somebody else had until just now, and what happened meanwhile."""

    def __init__(self, happened: Callable[[], object]) -> None:
        self.happened = happened

    def __enter__(self) -> None:
        self.happened()

    def __exit__(self, *_: object) -> None:
        pass


def test_an_owner_who_finds_no_credit_just_when_all_is_taken_goes_on() -> None:
    """Nobody would ever call it back."""
    credit = ReadCredit(10, Tally(1 << 30), lambda: None, SessionInbox())
    credit.spend(10)

    def taken() -> None:
        credit._decoded += 10

    credit._lock = Meanwhile(taken)  # type: ignore[assignment]
    assert credit.room() == 10 and not credit._paused


def test_an_owner_takes_no_lock_for_a_small_read() -> None:
    credit = ReadCredit(1 << 20, Tally(1 << 30), lambda: None, SessionInbox())
    for _ in range(3):
        credit.spend(TALLY_STEP)
        credit.settle(TALLY_STEP)

    def refuse() -> None:
        raise AssertionError("it waits for the inbox")

    credit._lock = Meanwhile(refuse)  # type: ignore[assignment]
    credit.spend(TALLY_STEP - 1)
    assert credit.room() == (1 << 20) - TALLY_STEP + 1
    with pytest.raises(AssertionError, match="waits for the inbox"):
        credit.spend(1)


def test_what_messages_cost_counts_from_the_first_step_on() -> None:
    tally = Tally(1 << 30)
    inbox = SessionInbox()
    credit = ReadCredit(1 << 20, tally, lambda: None, inbox)
    inbox._deliver(None, [b"m"], credit, 0, TALLY_STEP - 1)
    assert tally.used == 0
    assert inbox.get_nowait() == b"m"
    inbox._deliver(None, [b"m"], credit, 0, TALLY_STEP)
    assert tally.used == TALLY_STEP
    assert inbox.get_nowait() == b"m" and tally.used == 0


def test_an_inbox_of_the_parent_is_refused_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox()
    inbox.put((None, "a word"))
    monkeypatch.setattr(forks, "current", forks.current + 1)
    with pytest.raises(bridge.ForkedError, match="this Inbox was made before fork"):
        inbox.get_nowait()
    with pytest.raises(bridge.ForkedError, match="this Inbox was made before fork"):
        inbox.put((None, "another"))


def test_a_shared_inbox_gives_credit_back_exactly_and_resumes_who_had_none() -> None:
    resumed: list[int] = []
    shared = Inbox()
    credit = ReadCredit(10, Tally(1 << 30), lambda: resumed.append(1), shared)
    credit.spend(10)
    assert credit.room() == 0
    shared._deliver("session", [b"a", b"b"], credit, 10, 5)
    assert shared.get_nowait() == ("session", b"a") and credit.held() == 5 and resumed == [1]
    assert shared.get_nowait() == ("session", b"b") and credit.held() == 0 and resumed == [1]
    with pytest.raises(bridge.ReceiveTimeout, match="no message within 0 seconds"):
        shared.get_nowait()
    with pytest.raises(bridge.ReceiveTimeout, match=r"no message within 0\.01 seconds"):
        shared.get(timeout=0.01)


def test_the_messages_of_a_session_wait_for_its_handler_and_those_of_nobody_for_none() -> None:
    shared = Inbox()
    for number in range(3):
        shared.put(("one", number))
    shared.put((None, "a word"))
    shared.put(("other", 0))
    shared.put((None, "another"))
    assert shared.qsize() == 6 and not shared.empty() and not shared.full()
    assert shared.get_nowait() == ("one", 0)
    other: list[object] = []

    def handle() -> None:
        for _ in range(3):
            other.append(shared.get_nowait())
        with pytest.raises(bridge.ReceiveTimeout):
            shared.get_nowait()

    thread = threading.Thread(target=handle)
    thread.start()
    thread.join()
    assert other == [(None, "a word"), ("other", 0), (None, "another")] and shared.qsize() == 2
    assert shared.get_nowait() == ("one", 1)
    shared.task_done()
    assert shared.get_nowait() == ("one", 2)
    shared.task_done()
    shared.task_done()
    assert shared.qsize() == 0 and shared._behind == {} and shared.empty()


def test_an_inbox_ends_with_the_last_of_its_feeders_after_what_is_in_it() -> None:
    shared = Inbox()
    shared._attach("a")
    shared._attach("b")
    shared.put(("one", 1))
    shared.put(("one", 2))
    shared._detach("a")
    assert shared._over is None
    shared._detach("b")
    assert shared.get_nowait() == ("one", 1) and shared.get_nowait() == ("one", 2)
    with pytest.raises(bridge.ShutDown, match="every Bridge that fed this inbox is closed"):
        shared.get_nowait()
    shared._attach("a")
    with pytest.raises(bridge.ReceiveTimeout):
        shared.get_nowait()
    shared._detach("a")
    shared.shutdown()
    with pytest.raises(bridge.ShutDown, match="every Bridge"):
        shared.get_nowait()
    shared._attach("a")
    with pytest.raises(bridge.ShutDown, match="every Bridge"):
        shared.get_nowait()


def test_an_inbox_that_is_fed_again_just_as_its_last_feeder_goes_is_open(background: Background) -> None:
    class Meanwhile(Inbox):
        def _finish(self, why: Exception) -> None:
            feeding.append(background.run(self._attach, "b"))
            concurrent.futures.wait(feeding, 0.05)
            super()._finish(why)

    feeding: list[Future[None]] = []
    shared = Meanwhile()
    shared._attach("a")
    shared._detach("a")
    feeding[0].result(PATIENCE)
    with pytest.raises(bridge.ReceiveTimeout):
        shared.get_nowait()


def test_a_handler_that_was_given_the_end_closes_the_session_when_it_comes_back(
    background: Background,
) -> None:
    shared, done = Inbox(), []
    shared._end("never open", bridge.Truncated("cut"), False, lambda back: done.append(("never", back)))
    shared._end("open", bridge.Truncated("cut"), True, lambda back: done.append(("open", back)))
    shared._end("two", bridge.Truncated("cut"), True, lambda back: done.append(("two", back)))
    assert shared.get_nowait() == ("open", None) and done == []
    thread = threading.Thread(target=shared.get_nowait)  # which ends with that
    thread.start()
    thread.join(PATIENCE)
    assert done == [("two", False)]
    with pytest.raises(bridge.ReceiveTimeout):
        shared.get_nowait()
    assert done == [("two", False), ("open", True)]


def test_a_look_leaves_the_message_and_its_credit_where_they_are() -> None:
    inbox = SessionInbox()
    credit = ReadCredit(10, Tally(1 << 30), lambda: None, inbox)
    with pytest.raises(bridge.ReceiveTimeout):
        inbox.peek(0.0)
    inbox._deliver(None, [b"a"], credit, 1, 5)
    assert inbox.peek() == b"a" == inbox.peek(0.0) and inbox.qsize() == 1 and credit.held() == 4
    assert inbox.get() == b"a" and credit.held() == -1


def in_a_handler_s_hands(messages: int) -> Inbox:
    """A shared inbox that was given so many of one session, the first of which this thread has taken."""
    shared = Inbox()
    for number in range(messages):
        shared.put(("session", number))
    assert shared.get_nowait() == ("session", 0)
    return shared


def test_a_handler_that_is_done_wakes_one_who_sleeps(background: Background) -> None:
    shared = in_a_handler_s_hands(2)
    first = background.run(lambda: shared.get(timeout=PATIENCE))
    sleepers(shared, 1)
    second = background.run(lambda: shared.get(timeout=PATIENCE))
    _, gate = sleepers(shared, 2)
    shared.task_done()
    assert first.result(PATIENCE) == ("session", 1) and list(shared._sleepers) == [gate]
    shared.put((None, "a word"))
    assert second.result(PATIENCE) == (None, "a word")


def test_a_handler_that_comes_back_for_the_next_wakes_nobody_for_it(background: Background) -> None:
    shared = in_a_handler_s_hands(2)
    other = background.run(lambda: shared.get(timeout=PATIENCE))
    (gate,) = sleepers(shared, 1)
    assert shared.get_nowait() == ("session", 1)
    assert list(shared._sleepers) == [gate]
    shared.put((None, "a word"))
    assert other.result(PATIENCE) == (None, "a word")


def test_a_handler_that_is_done_and_leaves_nothing_wakes_nobody(background: Background) -> None:
    shared = in_a_handler_s_hands(1)
    other = background.run(lambda: shared.get(timeout=PATIENCE))
    (gate,) = sleepers(shared, 1)
    shared.task_done()
    assert list(shared._sleepers) == [gate] and shared._called is None
    shared.put((None, "a word"))
    assert other.result(PATIENCE) == (None, "a word")


def test_everybody_who_sleeps_learns_of_the_end_once_all_is_taken(background: Background) -> None:
    shared = in_a_handler_s_hands(2)
    others = [background.run(lambda: shared.get(timeout=PATIENCE)) for _ in range(2)]
    before = sleepers(shared, 2)
    shared.shutdown()
    while set(sleepers(shared, 2)) & set(before):
        assert not any(other.done() for other in others), "something waits behind its session"
    assert shared.get_nowait() == ("session", 1)
    shared.task_done()
    for other in others:
        with pytest.raises(bridge.ShutDown):
            other.result(PATIENCE / 2)  # not only when its own time is up


def test_reading_goes_on_when_what_was_read_becomes_less() -> None:
    resumed: list[int] = []
    inbox = SessionInbox()
    credit = ReadCredit(10, Tally(1 << 30), lambda: resumed.append(1), inbox)
    credit.spend(10)
    assert credit.room() == 0
    inbox._deliver(None, [b"m"], credit, 10, 2)
    assert resumed == [1] and credit.room() == 8


def test_a_look_passes_its_wake_up_on_to_one(background: Background) -> None:
    inbox = SessionInbox()
    looking = background.run(lambda: inbox.peek(PATIENCE))
    sleepers(inbox, 1)
    first = background.run(lambda: inbox.get(timeout=PATIENCE))
    sleepers(inbox, 2)
    second = background.run(lambda: inbox.get(timeout=PATIENCE))
    *_, gate = sleepers(inbox, 3)
    inbox.put((None, "a word"))
    assert looking.result(PATIENCE) == first.result(PATIENCE) == "a word"
    assert list(inbox._sleepers) == [gate]
    inbox.put((None, "another"))
    assert second.result(PATIENCE) == "another"


def test_what_comes_after_shutdown_is_for_nobody_and_costs_its_session_what_it_may_read() -> None:
    resumed: list[int] = []
    came_back: list[bool] = []
    shared = Inbox()
    credit = ReadCredit(10, Tally(1 << 30), lambda: resumed.append(1), shared)
    shared._deliver("session", [b"before"], None, 0, 0)
    shared.shutdown()
    credit.spend(10)
    shared._deliver("session", [b"after"], credit, 10, 10)
    shared._end("session", bridge.EndOfStream("the peer closed the session"), True, came_back.append)
    assert shared.get_nowait() == ("session", b"before")
    with pytest.raises(bridge.ShutDown):
        shared.get()
    assert credit.room() == 0 and credit.held() == 10 and not resumed
    assert came_back == [False] and not shared._ends and not shared.qsize()


def test_a_receiver_whose_session_ends_as_it_looks_for_its_socket_hears_of_the_end() -> None:
    class Ending(SessionInbox):
        looks = 0

        @property
        def attend(self) -> Any:
            self.looks += 1
            return None if self.looks > 1 else lambda *_: False

        @attend.setter
        def attend(self, attend: Any) -> None:
            pass

    inbox = Ending()
    inbox._finish(bridge.SessionClosed("over"))
    with pytest.raises(bridge.SessionClosed, match="over"):
        inbox.get()
