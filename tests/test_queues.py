"""What surviving mutants of the queues and codecs have taught: exact counts, and exact edges."""

from __future__ import annotations

import pytest

import bridge
from bridge.codecs import LengthPrefixed
from bridge.queues import Outbox, ReadCredit, SessionInbox, Tally


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
