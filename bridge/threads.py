"""What is noted of each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from bridge.errors import ConfigurationError


class _ThisThread(threading.local):
    """Each thread sees its own."""

    serves_all = False
    """It serves all sessions just now, and must not wait for one of them."""
    sleeper: Any = None
    """The bed it sleeps in beside a socket, made at its first sleep."""
    does_without = False
    """There was no descriptor to spare for such a bed."""


this_thread = _ThisThread()


@contextlib.contextmanager
def serving_all() -> Iterator[None]:
    """Meanwhile `this_thread.serves_all`."""
    this_thread.serves_all = True
    try:
        yield
    finally:
        this_thread.serves_all = False


def check_may_wait() -> None:
    """ConfigurationError on a thread that serves all sessions: it has come here through somebody's codec."""
    if this_thread.serves_all:
        raise ConfigurationError(
            "a codec may not wait: while it runs, its thread serves no other session, so what it waits for might"
            " never come; yield the message, and do this on a thread of your own that receives it"
        )


def let_through(error: BaseException) -> None:
    """Raise *error* if it may be of a signal handler, whose place is the main thread: it is not to be handled here.

    Whatever else comes out of somebody's codec, be it SystemExit, is that codec's failure.
    """
    if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
        raise error
