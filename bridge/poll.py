"""Waiting for sockets: the only module that sleeps on file descriptors.

Theory of operation
-------------------
OpenSSL on a non-blocking socket never waits.  When it cannot go on it says what it waits for, WANT_READ or
WANT_WRITE, and *that has nothing to do with which call was made*: a read may have to write (a
renegotiation, the answer to a KeyUpdate) and a write may have to read.  Whoever owns the socket sleeps until
the wanted direction is ready and makes the same call again.  That owner is a worker, and here is its bed.

Three rules keep the sleep honest:

* A session's mask is made of its wants and of nothing else, so a spin (armed for write, waiting for read) cannot
  happen.
* A session that wants nothing leaves the poll set altogether: `poll` reports a hang-up even for an empty
  mask, at once and for ever.  (One that is lent to a thread stays in it, edge-triggered: it is told once.)
* Readable means bytes on the wire, not a message.  It is a hint to call OpenSSL again and nothing more.
"""

from __future__ import annotations

import _thread
import contextlib
import enum
import errno
import io
import math
import os
import select
import selectors
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from bridge import forks
from bridge.errors import ConfigurationError, LimitExceeded, system_error
from bridge.threads import give_up_seat, this_thread

try:
    import resource
except ImportError:  # Windows, where a process may have millions of handles
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

NOTHING = 0
LENT = 8
"""A mask as NOTHING, for a socket that stays in the poll set because another thread sleeps beside it."""
BELLS = 1 / 4
"""Of a process's descriptors, those of the lowest numbers, which may become threads' doorbells.  A program that has a
thread for each of a thousand sockets, and a limit of 1,024, needs the others for the sockets."""
SELECTED = 512
"""How many sockets select(2) takes on Windows, the only system that has nothing better."""
EVERY = -1
"""In place of a number of ready sockets: as many as one call tells of (epoll, in CPython: 1,023)."""
LONGEST_SLEEP = 86_400.0
"""Seconds; epoll counts its milliseconds in 31 bits."""


class Want(enum.IntEnum):
    """What OpenSSL waits for.  The values are the selectors' event bits, so wants add up to a mask."""

    READ = selectors.EVENT_READ
    WRITE = selectors.EVENT_WRITE


READ: Final = Want.READ
"""By a name of its own, for where speed counts."""


def _is_bad(fd: int) -> bool:
    """Whether it is the one, closed by somebody or of too high a number, for which select(2) fails for all."""
    try:
        select.select([fd], [], [], 0)
    except (OSError, ValueError):
        return True
    return False


class _Select:
    """`select.poll` for systems that lack it (Windows), as far as `Sleeper` uses it."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def register(self, fd: int, mask: int) -> None:
        self._masks[fd] = mask

    def poll(self, milliseconds: float | None) -> list[tuple[int, int]]:
        readers, writers = (
            [fd for fd, mask in self._masks.items() if mask & bit] for bit in (READABLE, WRITABLE)
        )
        if not readers and not writers:  # which select(2) of Windows refuses; nobody waits for nothing
            return []
        timeout = None if milliseconds is None else milliseconds / 1000
        try:
            can_read, can_write, failed = select.select(readers, writers, writers, timeout)
        except (OSError, ValueError):
            return [(fd, mask) for fd, mask in self._masks.items() if _is_bad(fd)]
        found = dict.fromkeys((*can_read, *can_write, *failed), 0)
        for fds, bit in ((can_read, READABLE), (can_write, WRITABLE), (failed, WRITABLE)):
            for fd in fds:
                found[fd] |= bit
        return list(found.items())


_Poll: Any = getattr(select, "poll", _Select)
READABLE: int = getattr(select, "POLLIN", 1)
WRITABLE: int = getattr(select, "POLLOUT", 4)
HUNG_UP: int = getattr(select, "POLLRDHUP", getattr(select, "POLLHUP", NOTHING))
"""Its half; of both halves, and of errors, a poll always speaks.  macOS has one name for half and whole, and looks only
if it is asked.  NOTHING on Windows, where a write can lose what a peer said before it hung up, as with the stdlib: to
look for that would be to read it, and then no `select` of the application's would see that there is something."""
_TO_POLL = {int(Want.READ): READABLE, int(Want.WRITE): WRITABLE, Want.READ | Want.WRITE: READABLE | WRITABLE}
_FROM_POLL = {bits: mask for mask, bits in _TO_POLL.items()}
"""Of anything else, an error or a hang-up, a mask gets all that it waits for."""
_TO_EPOLL = _TO_POLL | {LENT: getattr(select, "EPOLLET", NOTHING)}
"""While it is lent a hang-up is told once, and not for ever."""
_RING = (1).to_bytes(8, sys.byteorder)


class SelectorPoller(Generic[T]):
    """Sockets, what each is waited for, and who is to be told: on any system.  Owned by one thread."""

    lends = False
    """Whether any thread may `change` a mask to LENT and back, under a lock of the socket's."""
    most: float = SELECTED if sys.platform == "win32" else math.inf
    """How many can be watched at a time."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, sock: socket.socket | Doorbell, mask: int, told: T) -> None:
        """Wait for *mask* on *sock* from now on, for *told*.  LimitExceeded if that is one too many."""
        if len(self._selector.get_map()) >= self.most:
            raise LimitExceeded(f"select(2) takes no more than {self.most:g} sockets here")
        self._selector.register(sock, mask, told)

    def change(self, sock: socket.socket, mask: int, told: T) -> None:
        """Wait for *mask* instead."""
        self._selector.modify(sock, mask, told)

    def forget(self, sock: socket.socket) -> None:
        """Wait for *sock* no longer; to be called before it is closed or handed on.  No error if that has happened."""
        with contextlib.suppress(KeyError, OSError, ValueError):
            self._selector.unregister(sock)

    def wait(self, timeout: float | None, most: int = EVERY) -> list[tuple[T, int]]:
        """Sleep until a socket is ready, at most *timeout* seconds (None: for ever, 0: only look), or a day.

        *most* is of how many it tells, where it can choose; the next time the others come first.
        """
        at_most = timeout if timeout is None else min(timeout, LONGEST_SLEEP)
        try:
            ready = self._selector.select(at_most)
        except (OSError, ValueError):
            ready = [(key, key.events) for key in self._selector.get_map().values() if _is_bad(key.fd)]
        return [(key.data, mask) for key, mask in ready]

    def close(self) -> None:
        """Release the operating system's poll object."""
        self._selector.close()


class EpollPoller(Generic[T]):
    """The same over epoll(7), without the layer of `selectors`, which costs more than the system call."""

    lends = True
    most = math.inf

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, tuple[T, int]] = {}

    def watch(self, sock: socket.socket | Doorbell, mask: int, told: T) -> None:
        """As `SelectorPoller.watch`."""
        fd = sock.fileno()
        self._epoll.register(fd, _TO_EPOLL[mask])
        self._told[fd] = told, mask

    def change(self, sock: socket.socket, mask: int, told: T) -> None:
        """As `SelectorPoller.change`."""
        fd = sock.fileno()
        self._told[fd] = told, mask  # first: see `_renew`
        self._epoll.modify(fd, _TO_EPOLL[mask])

    def forget(self, sock: socket.socket) -> None:
        """As `SelectorPoller.forget`."""
        fd = sock.fileno()
        self._told.pop(fd, None)
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            self._renew()

    def wait(self, timeout: float | None, most: int = EVERY) -> list[tuple[T, int]]:
        """As `SelectorPoller.wait`."""
        at_most = timeout if timeout is None else min(timeout, LONGEST_SLEEP)
        ready = []
        for fd, event in self._epoll.poll(at_most, most):
            if fd not in self._told:
                self._renew()
                return []
            entry = told, mask = self._told[fd]
            if event != mask:  # as is READABLE, and readable is what most are waited for
                entry = told, mask & _FROM_POLL.get(event, mask)
            ready.append(entry)
        return ready

    def _renew(self) -> None:
        """Somebody has closed a descriptor that is watched.  If a copy of it lives, only with the poll set it goes."""
        try:
            renewed = select.epoll()
        except OSError:  # no descriptor can be had just now; the next event of that one comes back here
            return
        for fd, (_, mask) in list(self._told.items()):
            with contextlib.suppress(OSError):
                renewed.register(fd, _TO_EPOLL[mask])
        self._epoll = renewed  # the old one is not closed while a thread may be lending
        for fd, (_, mask) in list(self._told.items()):  # whose `change` has met the old one
            with contextlib.suppress(OSError):
                renewed.modify(fd, _TO_EPOLL[mask])

    def close(self) -> None:
        """As `SelectorPoller.close`."""
        self._epoll.close()


if sys.platform == "linux":
    Poller = EpollPoller
else:
    Poller = SelectorPoller  # not on Linux


def check_unpatched() -> None:
    """ConfigurationError where gevent or eventlet has made greenlets of threads, and taken away what they sleep in."""
    for function in (select.select, _thread.start_new_thread):
        patcher = function.__module__.partition(".")[0]
        if patcher in ("gevent", "eventlet"):
            raise ConfigurationError(
                f"{patcher} has patched the standard library, and a Bridge needs its threads and polls as they were;"
                f" use the ssl module with {patcher}, or run this part in a process that it does not patch"
            )


class Doorbell:
    """Wakes a thread out of its sleep.  `ring` from any thread; the rest belongs to the sleeper.

    An eventfd where the system has one (eventfd(2)): a descriptor, not two.  A pair of sockets elsewhere: it works
    with every selector on every system.  A ring that finds either full is dropped: whoever filled it has rung.
    """

    def __init__(self) -> None:
        self._ear: socket.socket | io.FileIO
        self._button: socket.socket | io.FileIO
        if hasattr(os, "eventfd"):
            self._ear = self._button = io.FileIO(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "r+")
            self._press = self._button.write
        else:
            self._ear, self._button = socket.socketpair()
            self._ear.setblocking(False)
            self._button.setblocking(False)
            self._press = self._button.send

    def fileno(self) -> int:
        """What becomes readable when it rings."""
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake the sleeper, now or at its next sleep.  Never waits; reentrant; harmless after `close`."""
        try:
            self._press(_RING)
        except (OSError, ValueError):
            pass

    def silence(self) -> None:
        """Forget all rings so far."""
        try:
            if isinstance(self._ear, socket.socket):
                while self._ear.recv(1024):
                    pass
            else:
                self._ear.read(8)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Release what it is made of."""
        self._ear.close()
        self._button.close()


_Watched = tuple[int, int, Callable[[float | None], list[tuple[int, int]]], list[tuple[int, int]] | None]
"""A descriptor, for what, what polls it, and what that says if the descriptor is ready for all of that, and no more."""


class Sleeper:
    """A thread's bed beside one socket at a time.  `ring` from any thread; the rest belongs to the sleeper.

    OSError if no descriptor can be spared for its bell: the first `BELLS` of all that the process may have are free to
    be taken, the others are for sockets.
    """

    __slots__ = ("_doorbell", "_watched", "asleep", "born", "ring")

    def __init__(self) -> None:
        self.born = forks.current
        self.asleep = False  # or about to be: whoever sleeps here says so
        self._doorbell = Doorbell()
        if not _to_spare(self._doorbell.fileno()):
            self._doorbell.close()
            raise system_error(errno.EMFILE)
        self.ring = self._doorbell.ring
        self._watched = self._watch(-1, NOTHING)  # a thread mostly sleeps beside one socket, for one thing

    def sleep(self, sock: socket.socket | None, mask: int, timeout: float | None) -> int:
        """Sleep until *sock* is ready for something in *mask*, or a ring, or *timeout* seconds (None: for ever).

        For what it is ready; nothing if that was not why the sleep ended.
        """
        fd = sock.fileno() if mask and sock is not None else -1
        watched, mask_watched, poll, hoped_for = self._watched
        if watched != fd or mask_watched != mask:
            self._watched = _, _, poll, hoped_for = self._watch(fd, mask)
        found = poll(None if timeout is None else min(timeout, LONGEST_SLEEP) * 1000)
        if self.born != forks.current:  # a signal handler has forked, and this is the child
            forks.check(self.born)
        if found == hoped_for:
            return mask
        ready = NOTHING
        for number, event in found:
            if number != fd:
                self._doorbell.silence()
            else:
                ready = mask & _FROM_POLL.get(event, mask)
        return ready

    def _watch(self, fd: int, mask: int) -> _Watched:
        """With a poll object of its own: one that Ctrl-C interrupts is not left half changed."""
        poll = _Poll()
        poll.register(self._doorbell.fileno(), READABLE)
        if fd == -1:
            return fd, mask, poll.poll, None
        poll.register(fd, _TO_POLL[mask])
        return fd, mask, poll.poll, [(fd, _TO_POLL[mask])]

    def __del__(self) -> None:
        if hasattr(self, "_doorbell"):  # there was a descriptor for it
            self._doorbell.close()


def look(sock: socket.socket | None, mask: int) -> int:
    """For what of *mask* the socket is ready now.  Any thread; never waits."""
    if sock is None or mask == NOTHING:
        return NOTHING
    poll = _Poll()
    poll.register(sock.fileno(), _TO_POLL[mask])
    return sum(mask & _FROM_POLL.get(event, mask) for _, event in poll.poll(0))


def hang_up_watch(sock: socket.socket) -> Callable[[int], object]:
    """Called with 0 it never waits, and says whether the peer has hung up: nothing more will come than is there."""
    poll = _Poll()
    poll.register(sock.fileno(), HUNG_UP)
    return poll.poll  # type: ignore[no-any-return]


def _to_spare(fd: int) -> bool:
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit < 0 or fd < limit * BELLS


def my_sleeper() -> Sleeper | None:
    """The calling thread's own, made at its first sleep; None if no descriptor can be spared for it.

    Another one in a child of fork(), which would share the bell, and in a signal handler that interrupts its sleep.
    """
    notes = this_thread.notes
    if notes.seat is not None:
        give_up_seat(notes)
    sleeper: Sleeper | None = notes.sleeper
    if sleeper is None or sleeper.asleep or sleeper.born != forks.current:
        if notes.does_without:
            return None
        try:
            sleeper = notes.sleeper = Sleeper()
        except OSError:
            notes.does_without = True  # not to try at each sleep
            return None
    return sleeper
