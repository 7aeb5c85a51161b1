"""What surviving mutants of `bridge.queues` have taught: exact counts, and exact edges."""

from __future__ import annotations

from bridge.queues import Counts, Outbox, Tally


def test_counts_are_exact() -> None:
    counts: Counts[str] = Counts()
    counts.add({"a": 2})
    counts.add({"a": 3, "b": 1})
    assert counts.copy() == {"a": 5, "b": 1}


def test_an_outbox_is_full_when_not_one_byte_more_fits() -> None:
    outbox = Outbox(3, Tally(100), lambda: None)
    outbox.put(b"aa", None)
    assert not outbox.full() and outbox.held() == 2
    outbox.put(b"a", None)
    assert outbox.full() and outbox.held() == 3
    outbox.give_back(1)
    assert not outbox.full()
