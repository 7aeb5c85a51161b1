"""Tracing: what OpenSSL is asked and answers, how long threads sleep and what wakes them, for a while.

Nothing of it is in the way of a session that is not traced: while a trace is on, and only then, a few methods are
*substituted* by others that do the same and note it (see `_substitutes`), and new sessions are given a
`bridge.tap.TappedConnection`.  A trace holds sizes, names and times; never a payload, a key or a secret.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from OpenSSL import SSL

from bridge.context import Context
from bridge.crossing import Gate, Mailbox
from bridge.errors import ConfigurationError
from bridge.poll import Poller, Sleeper, Want
from bridge.session import Session
from bridge.tap import TappedConnection, TraceEvent

LANES = ("application", "coordinator", "worker", "peer")
EVENTS = 10_000
"""How many a trace keeps by default: the newest."""

_one_at_a_time = threading.Lock()


class Trace:
    """What was seen, oldest first.  Any thread; made by `trace`."""

    def __init__(self, limit: int = EVENTS) -> None:
        self._events: collections.deque[TraceEvent] = collections.deque(maxlen=limit)
        self._numbers = itertools.count()
        self._names = itertools.count(1)
        self._began = time.monotonic()
        self._on = True

    @property
    def events(self) -> tuple[TraceEvent, ...]:
        """The newest events, in the order in which they ended."""
        return tuple(sorted(self._events.copy(), key=lambda event: event.number))

    @property
    def dropped(self) -> int:
        """How many older events there was no room for."""
        events = self.events
        return events[0].number if events else 0

    def json_lines(self) -> str:
        """One JSON object a line, with the fields of `TraceEvent`."""
        return "".join(json.dumps(dataclasses.asdict(event)) + "\n" for event in self.events)

    def svg(self, rows: int = 150) -> str:
        """A picture, with a lane for each kind of thread, of the first *rows* events worth drawing."""
        from bridge import picture

        return picture.svg(self.events, rows)

    def note(
        self,
        kind: str,
        what: str,
        *,
        session: str = "",
        asked: int | None = None,
        answered: int | None = None,
        outcome: str = "",
        started: float | None = None,
    ) -> None:
        """Keep an event of the calling thread."""
        if not self._on:
            return
        now = time.monotonic()
        started = now if started is None else started
        name = threading.current_thread().name
        lane = next((lane for lane in LANES if name.startswith(f"bridge-{lane}")), "application")
        self._events.append(
            TraceEvent(
                number=next(self._numbers),
                at=started - self._began,
                seconds=now - started,
                lane=lane,
                thread=name,
                kind=kind,
                what=what,
                session=session,
                asked=asked,
                answered=answered,
                outcome=outcome,
            )
        )

    def name(self, side: str) -> str:
        """What the next connection is called."""
        return f"{side} {next(self._names)}"

    def end(self) -> None:
        """Sessions that live on are noted no longer."""
        self._on = False


@contextlib.contextmanager
def trace(limit: int = EVENTS) -> Iterator[Trace]:
    """Note what the sessions that begin in the block do, and how the threads of all bridges sleep.

    Keeps the newest *limit* events.  One at a time in a process: ConfigurationError for another.  Any thread.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit must be a positive whole number, not {limit!r}")
    noted = Trace(min(limit, sys.maxsize))
    if not _one_at_a_time.acquire(blocking=False):
        raise ConfigurationError("a trace is on already; there can be one at a time in a process")
    originals = []
    try:
        for owner, name, make in _substitutes():
            originals.append((owner, name, vars(owner)[name]))
            setattr(owner, name, make(noted, vars(owner)[name]))
        yield noted
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)
        noted.end()
        _one_at_a_time.release()


Substitute = Callable[[Trace, Any], Any]


def _substitutes() -> list[tuple[type, str, Substitute]]:
    """All that is different while a trace is on: whose method, its name, and what makes the one in its place."""
    return [
        (Context, "make_connection", _tapped),
        (Poller, "wait", _waiting),
        (Sleeper, "sleep", _sleeping),
        (Gate, "sleep", _resting),
        (Mailbox, "take", _taking),
        (Session, "send", _sending),
        (Session, "recv", _receiving),
    ]


def _tapped(noted: Trace, _: Any) -> Any:
    def make(context: Context, sock: socket.socket | None) -> SSL.Connection:
        name = noted.name("server" if context.server_side else "client")
        return TappedConnection(context.raw, sock, name, noted.note)

    return make


def _waiting(noted: Trace, wait: Any) -> Any:
    def traced(self: Any, timeout: float | None, *most: int) -> Any:
        started = time.monotonic()
        ready = wait(self, timeout, *most)
        if timeout != 0:
            woken = [_woken_by(told, mask) for told, mask in ready] or ["a deadline"]
            noted.note("sleep", "sleep", outcome=" and ".join(woken), started=started)
        return ready

    return traced


def _woken_by(told: Any, mask: int) -> str:
    if told is None:
        return "doorbell"
    wants = [want.name.lower().removesuffix("e") + "able" for want in Want if mask & want]
    return f"socket {' and '.join(wants)}"


def _sleeping(noted: Trace, sleep: Any) -> Any:
    def traced(self: Any, sock: Any, mask: int, timeout: float | None) -> Any:
        started = time.monotonic()
        ready = sleep(self, sock, mask, timeout)
        late = timeout is not None and time.monotonic() - started >= timeout
        outcome = _woken_by(self, ready) if ready else "a deadline" if late else "doorbell"
        noted.note("sleep", "sleep", outcome=outcome, started=started)
        return ready

    return traced


def _resting(noted: Trace, sleep: Any) -> Any:
    def traced(self: Any, timeout: float | None) -> None:
        started = time.monotonic()
        sleep(self, timeout)
        late = timeout is not None and time.monotonic() - started >= timeout
        noted.note("sleep", "sleep", outcome="a deadline" if late else "a word", started=started)

    return traced


def _taking(noted: Trace, take: Any) -> Any:
    def traced(self: Any) -> Any:
        words = take(self)
        if words:
            noted.note("queue", "took words", answered=len(words))
        return words

    return traced


def _sending(noted: Trace, send: Any) -> Any:
    def traced(self: Session, message: Any, timeout: float | None = None) -> None:
        started, outcome = time.monotonic(), "raised"
        try:
            send(self, message, timeout)
            outcome = "ok"
        finally:
            noted.note("api", "session.send", asked=_size(message), outcome=outcome, started=started)

    return traced


def _size(message: Any) -> int | None:
    """Of bytes or text.  What a codec makes of anything else is its own affair."""
    if isinstance(message, memoryview):
        return message.nbytes  # its items may be longer
    return len(message) if isinstance(message, (bytes, bytearray, str)) else None


def _receiving(noted: Trace, recv: Any) -> Any:
    def traced(self: Session, timeout: float | None = None) -> Any:
        started, outcome, size = time.monotonic(), "raised", None
        try:
            message = recv(self, timeout)
            size, outcome = _size(message), "ok"
            return message
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            noted.note("api", "session.recv", answered=size, outcome=outcome, started=started)

    return traced
