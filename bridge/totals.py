"""What the sessions of a Bridge add up to, those that have ended included: made when somebody asks.

A session keeps a few numbers anyway.  `account` writes them down as counts, by name; when the session ends its
last account is added to those of all that ended before.  So counting costs nothing while data flows.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bridge.errors import ConnectFailed, ConnectTimeout

if TYPE_CHECKING:
    from bridge.errors import SessionEnded
    from bridge.poll import Want

Account = dict[tuple[str, ...], float]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds, in seconds, of the classes in which the durations of handshakes are counted; the last has none."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a Bridge has done since it was made.  Every number only grows."""

    handshakes: dict[tuple[str, str, str], int]
    """How many ended so, by side ("server", "client"), result ("ok", or the class of the error), and version."""
    handshake_seconds: dict[str, tuple[tuple[int, ...], float]]
    """For each side: how many succeeded in at most so many seconds of `bridge.totals.BUCKETS` (and more than the
    one before), and the sum of their seconds."""
    endings: dict[str, int]
    """How many sessions ended so: by the class of the cause."""
    wants: dict[tuple[str, str], int]
    """How often OpenSSL answered each call with each want."""
    bytes_received: int
    """Decrypted, of sessions and of streams, and so of the sockets of `bridge.ssl`."""
    bytes_sent: int
    """Before encryption, and taken by the kernel.  Likewise."""


def account(
    side: str,
    shaken: tuple[str, float] | None,
    wants: dict[tuple[str, Want], int],
    cause: SessionEnded | None,
    received: int,
    sent: int,
) -> Account:
    """One session: how its handshake went, what OpenSSL wanted, what was carried, and its end if that has come."""
    counts: Account = {("wants", call, want.name.lower()): count for (call, want), count in wants.items()}
    counts["received",], counts["sent",] = received, sent
    if shaken is not None:
        version, seconds = shaken
        counts["handshakes", side, "ok", version] = 1
        counts["class", side, str(bisect.bisect_left(BUCKETS, seconds))] = 1
        counts["seconds", side] = seconds
    elif cause is not None and not isinstance(cause, (ConnectFailed, ConnectTimeout)):
        counts["handshakes", side, type(cause).__name__, ""] = 1
    if cause is not None:
        counts["endings", type(cause).__name__] = 1
    return counts


def total(accounts: Iterable[Account]) -> Totals:
    """All of them, added up."""
    sums: Account = {}
    for counts in accounts:
        for key, count in counts.items():
            sums[key] = sums.get(key, 0) + count

    def found(kind: str) -> dict[tuple[str, ...], int]:
        return {key[1:]: int(count) for key, count in sums.items() if key[0] == kind}

    classes = found("class")
    return Totals(
        handshakes={(side, result, version): n for (side, result, version), n in found("handshakes").items()},
        handshake_seconds={
            side: (tuple(classes.get((side, str(i)), 0) for i in range(len(BUCKETS) + 1)), seconds)
            for (kind, *rest), seconds in sums.items()
            if kind == "seconds"
            for side in rest
        },
        endings={cause: n for (cause,), n in found("endings").items()},
        wants={(call, want): n for (call, want), n in found("wants").items()},
        bytes_received=int(sums.get(("received",), 0)),
        bytes_sent=int(sums.get(("sent",), 0)),
    )
