"""Faults to be planted into the package, by name: ``BRIDGE_FAULT=leak pytest -p faults ...``.

Each is what a bug of that kind would look like; `test_planted_faults.py` shows that the tests notice.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from bridge.crossing import Mailbox
from bridge.engine import TLSEngine
from bridge.errors import TLSError, Truncated
from bridge.inbox import ReadCredit
from bridge.lease import Lease
from bridge.outbox import Outbox
from bridge.transport import Transport

_kept: list[socket.socket] = []


def leak() -> None:
    """A session's descriptor outlives it."""
    release = Transport._release

    def keep(self: Transport) -> None:
        if self.sock is not None:
            _kept.append(self.sock.dup())
        release(self)

    _plant(Transport, "_release", keep)


def hang() -> None:
    """A command is forgotten, and its caller waits for ever."""
    _plant(Transport, "close", lambda self, timeout: None)


def swallowed_alert() -> None:
    """The peer's alert passes for its clean end."""
    _plant(TLSEngine, "read", _answering(TLSError, b""))


def corrupted_byte() -> None:
    """One byte of a large record is another."""
    read = TLSEngine.read

    def spoil(self: TLSEngine, size: int) -> Any:
        data = read(self, size)
        if isinstance(data, bytes) and len(data) > 8_000:
            return data[:4_000] + bytes([data[4_000] ^ 1]) + data[4_001:]
        return data

    _plant(TLSEngine, "read", spoil)


def ragged_eof_taken_as_clean() -> None:
    """The end of the connection passes for close_notify."""
    _plant(TLSEngine, "read", _answering(Truncated, b""))


def unbounded_inbox() -> None:
    """Reading never stops."""
    _plant(ReadCredit, "room", lambda self: 1 << 20)


def unbounded_outbox() -> None:
    """Sending never waits."""
    _plant(Outbox, "_fits", lambda self, size: True)


def lost_wake_up_of_a_thread() -> None:
    """A sleeper looks first and says that it sleeps afterwards."""

    def careless(self: Mailbox[Any]) -> bool:
        if self._items:
            return False
        threading.Event().wait(0.001)  # here the word comes that nobody rings for
        self.asleep = True
        return True

    _plant(Mailbox, "may_sleep", careless)


def lost_wake_up_inside_openssl() -> None:
    """Input is the reader's alone: what it swallowed is not told to the others, which wait for it, too."""

    def ready_one(self: Transport, mask: int) -> None:
        waiting = [one for one in self._operations if one.want is not None and one.want & mask]
        for operation in waiting[:1]:
            operation.ready = True

    _plant(Transport, "on_ready", ready_one)
    _plant(Transport, "_input_was_consumed", lambda self: None)


class _Open:
    """A lock that excludes nobody."""

    def __init__(self) -> None:
        self._inside: set[int] = set()

    def acquire(self, *_: Any) -> bool:
        self._inside.add(threading.get_ident())
        return True

    def release(self) -> None:
        self._inside.discard(threading.get_ident())

    def _is_owned(self) -> bool:
        return threading.get_ident() in self._inside

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def second_owner() -> None:
    """Two threads are inside one session."""
    make = Lease.__init__

    def careless(self: Lease, *arguments: Any) -> None:
        make(self, *arguments)
        self.lock = _Open()  # type: ignore[assignment]

    _plant(Lease, "__init__", careless)
    for name in ("turn", "read_at_once", "write_at_once"):
        _plant(Transport, name, _slowly(getattr(Transport, name)))


def _slowly(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Transport, *arguments: Any) -> Any:
        threading.Event().wait(0.0002)  # or they would not often meet
        return method(self, *arguments)

    return call


def _plant(kind: type, name: str, fault: Any) -> None:
    setattr(kind, name, fault)


def _answering(error: type[Exception], answer: bytes) -> Callable[..., Any]:
    read = TLSEngine.read

    def forgiving(self: TLSEngine, size: int) -> Any:
        try:
            return read(self, size)
        except error:
            return answer

    return forgiving


FAULTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        leak,
        hang,
        swallowed_alert,
        corrupted_byte,
        ragged_eof_taken_as_clean,
        unbounded_inbox,
        unbounded_outbox,
        lost_wake_up_of_a_thread,
        lost_wake_up_inside_openssl,
        second_owner,
    )
}


def pytest_configure(config: Any) -> None:
    """Plant it before any test is imported."""
    if fault := os.environ.get("BRIDGE_FAULT"):
        FAULTS[fault]()
