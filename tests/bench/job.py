"""What a server is told to do, and what all servers share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

READ = 65_536
SENDERS = 4
"""Threads, tasks or greenlets that send lines to the same sessions."""
LINE = 100
NUMBERS = 1_000


@dataclasses.dataclass(frozen=True)
class Job:
    """What a server is to do.

    The roles: *echo* sends back what it gets, *source* sends blocks as fast as the client takes them, *sink* only
    reads, *both* is source and sink at once, and *lines* has SENDERS senders that share *sessions* sessions, and
    begin when all are there.  *block* is the bytes a source passes to one send.
    """

    peer: str
    role: str
    cert: str
    key: str
    cores: str
    block: int
    handlers: int
    workers: int
    sessions: int

    @property
    def payload(self) -> bytes:
        """The block a source sends again and again; the generator checks that byte n is n % 256."""
        return bytes(range(256)) * (self.block // 256)


ROLES = ("echo", "source", "sink", "both", "lines")


def lines(sender: int) -> Iterator[bytes]:
    """The messages of one sender, for ever; made beforehand, since nobody wants to measure their making."""
    made = [f"{sender} {n:04} ".encode().ljust(LINE - 1, b"x") + b"\n" for n in range(NUMBERS)]
    return itertools.cycle(made)


def announce(port: int) -> None:
    """Tells the harness where to connect."""
    print(f"port {port}", flush=True)
