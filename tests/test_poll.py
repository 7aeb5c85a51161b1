"""Sleeping beside sockets: what each system offers for it does the same."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from peers import PATIENCE

from bridge import poll
from bridge.poll import NOTHING, Doorbell, SelectorPoller, Sleeper, Want, my_sleeper

BOTH = Want.READ | Want.WRITE
POLLERS = [SelectorPoller, *([poll.EpollPoller] if hasattr(select, "epoll") else [])]
POLLS = [poll._Select, *([select.poll] if hasattr(select, "poll") else [])]


@pytest.fixture(params=POLLERS)
def poller(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture(params=["eventfd", "sockets"])
def doorbell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doorbell]:
    if request.param == "sockets":
        monkeypatch.delattr(os, "eventfd", raising=False)
    made = Doorbell()
    yield made
    made.close()
    made.ring()  # as a thread does that has not heard of the end


@pytest.fixture(params=POLLS)
def sleeper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeper]:
    monkeypatch.setattr(poll, "_Poll", request.param)
    made = Sleeper()
    yield made
    made.__del__()  # pytest keeps it a while longer


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        yield near, far


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(bytes(65_536))
    except BlockingIOError:
        pass


def empty(sock: socket.socket) -> None:
    try:
        while True:
            sock.recv(65_536)
    except BlockingIOError:
        pass


def test_a_poller_says_what_a_socket_is_ready_for(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    poller.watch(near, Want.READ, "told")
    assert poller.wait(0) == []
    far.send(b"x")
    assert poller.wait(None) == [("told", Want.READ)]
    poller.change(near, BOTH, "another")
    assert poller.wait(PATIENCE) == [("another", BOTH)]
    near.recv(1)
    assert poller.wait(0) == [("another", Want.WRITE)]
    poller.forget(near)
    assert poller.wait(0) == []


def test_a_poller_sleeps_as_long_as_it_may_and_no_longer(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    poller.watch(pair[0], Want.READ, None)
    begin = time.monotonic()
    assert poller.wait(0.02) == []
    assert 0.02 <= time.monotonic() - begin < PATIENCE
    pair[1].send(b"x")
    assert poller.wait(1e12) == [(None, Want.READ)], "longer than the system can count"


def test_the_end_of_the_peer_is_something_to_read(
    poller: Any, pair: tuple[socket.socket, socket.socket]
) -> None:
    poller.watch(pair[0], Want.READ, "told")
    pair[1].close()
    assert poller.wait(PATIENCE) == [("told", Want.READ)]


@pytest.fixture
def epoll() -> Iterator[Any]:
    if not hasattr(select, "epoll"):
        pytest.skip("not on Linux")
    made: Any = poll.EpollPoller()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[socket.socket]:
    """A socket that is readable."""
    near, far = socket.socketpair()
    with near, far:
        far.send(b"x")
        yield near


@pytest.fixture
def undead(
    epoll: Any, other: socket.socket, pair: tuple[socket.socket, socket.socket]
) -> Iterator[socket.socket]:
    """One that is watched, whose descriptor somebody has closed, who has a copy; it is readable for ever."""
    near, far = pair
    epoll.watch(near, Want.READ, "undead")
    copy = os.dup(near.fileno())
    os.close(near.fileno())
    far.send(b"x")
    yield near
    near.detach()
    os.close(copy)


@pytest.fixture
def heir(undead: socket.socket) -> Iterator[socket.socket]:
    """One that has been given the same number, and is not readable."""
    near, far = socket.socketpair()
    if near.fileno() != undead.fileno():
        os.dup2(near.fileno(), undead.fileno())
        near.close()
        near = socket.socket(fileno=undead.fileno())
    with near, far:
        yield near


def test_nothing_is_said_of_a_closed_descriptor_a_copy_of_which_lives(
    epoll: Any, other: socket.socket, undead: socket.socket
) -> None:
    epoll.forget(undead)
    assert epoll.wait(0) == []
    epoll.watch(other, Want.READ, "other")
    assert epoll.wait(0) == [("other", Want.READ)]


def test_nor_is_it_said_of_who_is_given_its_number(
    epoll: Any, undead: socket.socket, heir: socket.socket
) -> None:
    epoll.forget(undead)
    epoll.watch(heir, Want.READ, "heir")
    assert epoll.wait(0) == []


def test_nor_of_anybody_if_that_was_sooner(
    epoll: Any, other: socket.socket, undead: socket.socket, heir: socket.socket
) -> None:
    epoll.watch(other, Want.READ, "other")
    epoll.watch(heir, Want.READ, "heir")
    epoll.forget(undead)
    assert [("undead", Want.READ)] != epoll.wait(0) != [("heir", Want.READ)]
    assert epoll.wait(0) == [("other", Want.READ)]


def test_a_want_of_descriptors_puts_that_off(
    epoll: Any, other: socket.socket, undead: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    epoll.watch(other, Want.READ, "other")
    with monkeypatch.context() as patch:
        patch.setattr(select, "epoll", refuse)
        epoll.forget(undead)
        assert epoll.wait(0) == []
    epoll.wait(0)
    assert epoll.wait(0) == [("other", Want.READ)]


@pytest.mark.parametrize("moment", [1, 2])
def test_what_another_thread_changes_while_the_poll_set_is_renewed_is_changed(
    epoll: Any,
    pair: tuple[socket.socket, socket.socket],
    other: socket.socket,
    undead: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    real, added = select.epoll, []

    class Renewed:
        """A poll set to which so many members have just been added when the other thread comes."""

        def __init__(self) -> None:
            self._epoll = real()

        def register(self, fd: int, mask: int) -> None:
            self._epoll.register(fd, mask)
            added.append(fd)
            if len(added) == moment:
                epoll.change(other, poll.LENT, "other")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    epoll.watch(pair[1], Want.READ, "first")
    epoll.watch(other, Want.READ, "other")
    monkeypatch.setattr(select, "epoll", Renewed)
    epoll.forget(undead)
    epoll.wait(0)  # which may tell of it once
    assert len(added) == 2 and epoll.wait(0) == []


def test_a_doorbell_rings_until_it_is_silenced(poller: Any, doorbell: Doorbell) -> None:
    poller.watch(doorbell, Want.READ, "the bell")
    doorbell.silence()
    assert poller.wait(0) == []
    for _ in range(3):
        doorbell.ring()
    assert poller.wait(PATIENCE) == [("the bell", Want.READ)] == poller.wait(0)
    doorbell.silence()
    assert poller.wait(0) == []


def test_a_doorbell_takes_any_number_of_rings(poller: Any, doorbell: Doorbell) -> None:
    poller.watch(doorbell, Want.READ, "the bell")
    for _ in range(5_000):
        doorbell.ring()
    doorbell.silence()
    assert poller.wait(0) == []
    doorbell.ring()
    assert poller.wait(0) == [("the bell", Want.READ)]


def test_a_sleeper_says_what_its_socket_is_ready_for(
    sleeper: Sleeper, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    assert sleeper.sleep(near, Want.READ, 0) == NOTHING
    assert sleeper.sleep(near, BOTH, None) == Want.WRITE
    far.send(b"x")
    assert sleeper.sleep(near, BOTH, PATIENCE) == BOTH
    assert sleeper.sleep(near, Want.READ, 1e12) == Want.READ
    empty(near)
    fill(near)
    assert sleeper.sleep(near, BOTH, 0) == NOTHING
    empty(far)
    assert sleeper.sleep(near, Want.WRITE, PATIENCE) == Want.WRITE


def test_a_sleeper_wakes_at_a_ring_once(
    sleeper: Sleeper, doorbell: Doorbell, pair: tuple[socket.socket, socket.socket]
) -> None:
    thread = threading.Thread(target=sleeper.ring)
    thread.start()
    begin = time.monotonic()
    assert sleeper.sleep(pair[0], Want.READ, PATIENCE) == NOTHING
    assert time.monotonic() - begin < PATIENCE
    thread.join()
    assert sleeper.sleep(None, Want.READ, 0) == sleeper.sleep(pair[0], NOTHING, 0) == NOTHING
    begin = time.monotonic()
    assert sleeper.sleep(pair[0], Want.READ, 0.02) == NOTHING
    assert time.monotonic() - begin >= 0.02, "it was rung once"


def test_a_sleeper_hears_of_the_end_of_the_peer(
    sleeper: Sleeper, pair: tuple[socket.socket, socket.socket]
) -> None:
    pair[1].close()
    assert sleeper.sleep(pair[0], Want.READ, PATIENCE) == Want.READ
    assert sleeper.sleep(pair[0], Want.WRITE, PATIENCE) == Want.WRITE


def test_a_sleeper_wakes_if_its_socket_is_closed_already(sleeper: Sleeper) -> None:
    near, far = socket.socketpair()
    with far:
        os.close(near.fileno())
        assert sleeper.sleep(near, Want.READ, PATIENCE) == Want.READ
        near.detach()


@pytest.mark.parametrize("made", POLLS)
def test_a_look_says_what_a_socket_is_ready_for(
    made: Any, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poll, "_Poll", made)
    near, far = pair
    assert poll.look(near, Want.READ) == poll.look(near, NOTHING) == poll.look(None, BOTH) == NOTHING
    assert poll.look(near, BOTH) == Want.WRITE
    far.send(b"x")
    assert poll.look(near, BOTH) == BOTH and poll.look(near, Want.READ) == Want.READ
    empty(near)
    far.close()
    assert poll.look(near, BOTH) == BOTH


@pytest.mark.skipif(poll.resource is None, reason="descriptors are never short here")
def test_a_thread_has_no_bed_where_descriptors_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def beds() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(poll, "BELLS", 0)
            found.append(my_sleeper())
        found.append(my_sleeper())

    found: list[Any] = []
    for target in (beds, lambda: found.append(my_sleeper())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert found[:2] == [None, None], "nor does it try at each sleep"
    assert isinstance(found[2], Sleeper), "which is no other thread's affair"
