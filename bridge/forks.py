"""Threads do not survive fork(): in the child, every handle of the parent says so instead of corrupting a stream.

Nor do they, or anything of OpenSSL's, travel in a pickle.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, NoReturn, SupportsIndex

from bridge.errors import ForkedError

current = 0
"""The number of this process in its line of forks."""
_process = os.getpid()


class Handle:
    """What there is once, and in one process."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """TypeError, also for `copy.copy` and `copy.deepcopy`."""
        raise TypeError(
            f"no {type(self).__name__} can be pickled or copied: give it to other threads as it is, and make"
            " another one in another process"
        )


def check(born: int, what: str = "Bridge", whose: str = "its threads") -> None:
    """ForkedError if the process has forked since *born* was noted, as *what* was made.  Takes no lock; any thread."""
    if born != current:
        raise ForkedError(
            f"this {what} was made before fork(), and {whose} live in the parent only; make a new one in the child"
        )


def abandoned(born: int) -> bool:
    """Whether the process has forked since *born* was noted: for finalizers, which must take no lock then.

    Also in the middle of fork(): the child drops what threads had that it does not have before it counts `current`.
    """
    return born != current or os.getpid() != _process


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def open_lock() -> Any:
    """A reentrant lock for what a child may go on to use, who finds it open: whoever held it lives in the parent."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _in_child() -> None:
    global current, _process
    current += 1
    _process = os.getpid()
    for lock in list(_locks):
        if not lock._is_owned():  # by the thread that has forked, and goes on
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
