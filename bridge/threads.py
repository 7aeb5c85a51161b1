"""What is noted of each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from bridge.errors import ConfigurationError


class Notes:
    """Of one thread."""

    __slots__ = ("does_without", "seat", "serves_all", "sleeper")

    def __init__(self) -> None:
        self.serves_all = False
        """It serves all sessions just now, and must not wait for one of them."""
        self.seat: Any = None
        """The one that may be kept for it, while it is back quickly: to be given up before it waits otherwise."""
        self.sleeper: Any = None
        """The bed it sleeps in beside a socket, made at its first sleep."""
        self.does_without = False
        """There was no descriptor to spare for such a bed."""


class _ThisThread(threading.local):
    """Each thread sees its own."""

    def __init__(self) -> None:
        # One object, for each look into a `threading.local` costs as much as ten at that.
        self.notes = Notes()


this_thread = _ThisThread()


@contextlib.contextmanager
def serving_all() -> Iterator[None]:
    """Meanwhile `Notes.serves_all`."""
    notes = this_thread.notes
    notes.serves_all = True
    try:
        yield
    finally:
        notes.serves_all = False


def check_may_wait() -> None:
    """ConfigurationError on a thread that serves all sessions: it has come here through somebody's codec."""
    if this_thread.notes.serves_all:
        raise ConfigurationError(
            "a codec may not wait: while it runs, its thread serves no other session, so what it waits for might"
            " never come; yield the message, and do this on a thread of your own that receives it"
        )


def before_waiting() -> None:
    """`check_may_wait`, and nobody keeps a seat for who waits."""
    check_may_wait()
    give_up_seat(this_thread.notes)


def give_up_seat(notes: Notes) -> None:
    """Let the worker have the seat back that is kept for this thread, whose *notes* these are."""
    if notes.seat is not None:
        seat, notes.seat = notes.seat, None
        seat.give_up()


def let_through(error: BaseException) -> None:
    """Raise *error* if it may be of a signal handler, whose place is the main thread: it is not to be handled here.

    Whatever else comes out of somebody's codec, be it SystemExit, is that codec's failure.
    """
    if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
        raise error
