"""What a transport and its surroundings say to each other: how a session is to be made, and how it ended.

All of it is frozen, or a protocol.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final, Protocol

from bridge.context import Context
from bridge.crossing import nobody
from bridge.dialer import Address
from bridge.errors import SessionAborted, SessionEnded, fresh, words
from bridge.limits import Timeouts

if TYPE_CHECKING:
    from OpenSSL import SSL


class Told:
    """What a transport tells the coordinator, or who has read from it."""

    OPEN: Final = "open"  # payload: SessionInfo
    DATA: Final = "data"  # payload: bytes
    DECODED: Final = "decoded"  # by a receiver, whose codec has failed; payload: what it has made of the data
    EOF: Final = "eof"  # the peer's close_notify; payload: None
    CLOSED: Final = "closed"  # payload: Ending


class SendCredit(Protocol):
    """Who is told what becomes of the bytes a transport was given: `bridge.outbox.Outbox`, mostly."""

    def give_back(self, count: int) -> None:
        """The kernel took *count* bytes."""

    def discard(self, why: SessionEnded) -> int:
        """What is held will never leave.  How many bytes that is."""

    def held(self) -> int:
        """Bytes accepted and not yet taken by the kernel."""


class ReceiveCredit(Protocol):
    """How much a transport may read: `bridge.inbox.ReadCredit`, mostly."""

    kept: int
    """Bytes of a message that is not whole yet."""

    def allows(self) -> bool:
        """Whether a record may be read."""

    def room(self) -> int:
        """How many bytes may be read."""

    def late_room(self) -> int:
        """How many may be read of what the peer had said before a write to it failed.

        If none, the owner will be called back; if less than none, it will not.
        """

    def spend(self, count: int) -> None:
        """So many were."""

    def held(self) -> int:
        """How many of these are not taken."""

    def overdraft(self) -> int:
        """By how much more was read than may be."""


@dataclasses.dataclass(frozen=True)
class CloseReport:
    """How far a polite close got.  True in a boolean context if everything accepted had left, and close_notify."""

    unsent: int
    """Bytes accepted by `send` that never left."""
    close_notify_sent: bool
    close_notify_received: bool

    def __bool__(self) -> bool:
        return self.unsent == 0 and self.close_notify_sent


@dataclasses.dataclass(frozen=True)
class Ending:
    """The last word about a session: its first cause, how far the close got, and its socket if it was unwrapped."""

    cause: SessionEnded
    report: CloseReport
    sock: socket.socket | None = None
    leftover: bytes = b""

    def unwrap(self) -> tuple[socket.socket, bytes]:
        """The socket, and what was read too far.  Raises the cause if it has none, or not any more.  Any thread."""
        if self.sock is None or self.sock.fileno() == -1:
            raise fresh(self.cause)
        return self.sock, self.leftover


def cut_short_by(error: BaseException) -> SessionAborted:
    """How a session ends in which *error* has cut a call short: nobody knows what is half done."""
    if not isinstance(error, Exception):
        return SessionAborted("interrupted in the middle of a call of OpenSSL")  # by Ctrl-C
    # A bug, or what a signal handler has raised.  It is on its way to the caller, who has the cause then.
    return SessionAborted(f"cut short in the middle of a call of OpenSSL by {words(error, repr)}")


def internal(error: BaseException) -> SessionAborted:
    """How a session ends in which *error* came up: a bug of ours, or of a user's class."""
    failure = SessionAborted(f"internal error: {words(error, repr)}")
    failure.__cause__ = error
    return failure


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How a session is to be made: everything its transport is told by the wiring."""

    context: Context
    server_hostname: str | None
    timeouts: Timeouts
    sock: socket.socket | None = None
    addresses: tuple[Address, ...] = ()
    awaited: float | None = None
    """Until when somebody waits for it to open (monotonic), so that no address takes all of that time."""
    resume_key: Hashable | None = None
    peer: str = ""
    """The peer's address, as people write it."""
    resume: SSL.Session | None = None
    """The session that a client offers to resume, whatever its context remembers."""
    owner: Callable[[], object] = nobody
    """What the context's callbacks are told whose session it is."""
