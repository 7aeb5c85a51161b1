"""What surviving mutants of the queues and codecs have taught: exact counts, and exact edges."""

from __future__ import annotations

import threading
import time

import pytest
from peers import PATIENCE

import bridge
from bridge import queues
from bridge.codecs import LengthPrefixed
from bridge.queues import (
    TALLY_STEP,
    Gate,
    Inbox,
    Mailbox,
    Outbox,
    ReadCredit,
    Registry,
    SessionInbox,
    Tally,
)


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


class Interrupted(Gate):
    """Ctrl-C comes when it has just been rung."""

    __slots__ = ("before",)

    def sleep(self, timeout: float | None) -> None:
        self.before()  # type: ignore[attr-defined]
        raise KeyboardInterrupt


def test_what_an_interrupted_receiver_was_woken_for_is_somebody_else_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox = SessionInbox()
    taken: list[object] = []
    other = threading.Thread(target=lambda: taken.append(inbox.get(timeout=PATIENCE)))

    def wake() -> None:
        monkeypatch.undo()
        other.start()
        deadline = time.monotonic() + PATIENCE
        while len(inbox._sleepers) < 2:
            assert time.monotonic() < deadline
        inbox.put((None, "a word"))

    gate = Interrupted()
    gate.before = wake  # type: ignore[attr-defined]
    monkeypatch.setattr(queues, "Gate", lambda: gate)
    with pytest.raises(KeyboardInterrupt):
        inbox.get()
    other.join(PATIENCE)
    assert taken == ["a word"]


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
    assert tally.follow(0, TALLY_STEP - 1) == 0 == tally.used
    assert tally.follow(0, TALLY_STEP) == TALLY_STEP == tally.used
    assert tally.has_room()
    assert tally.follow(TALLY_STEP, 2 * TALLY_STEP) == 2 * TALLY_STEP == tally.used
    assert not tally.has_room()
    assert tally.follow(2 * TALLY_STEP, TALLY_STEP + 1) == 2 * TALLY_STEP == tally.used
    assert tally.follow(2 * TALLY_STEP, 2 * TALLY_STEP) == 2 * TALLY_STEP == tally.used
    assert tally.follow(2 * TALLY_STEP, TALLY_STEP) == TALLY_STEP == tally.used
    assert tally.follow(TALLY_STEP, 0) == 0 == tally.used
    assert tally.follow(0, 0) == 0 == tally.used
