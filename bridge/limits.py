"""Deadlines and budgets: every default, each with its reason.

Both are frozen.  They are taken by `Bridge`, `listen`, `connect` and `adopt`; the nearest object
wins as a whole, so change one field with `dataclasses.replace(bridge.Timeouts(), idle=300)`.
"""

from __future__ import annotations

import dataclasses

from bridge.errors import ConfigurationError

RECORD_BYTES = 16 * 1024
"""The most plaintext one TLS record holds (RFC 8446, 5.1)."""


FOR_EVER = 1e9
"""Seconds (32 years) beyond which a timeout is none."""


def check_timeout(name: str, seconds: float | None) -> float | None:
    """*seconds* as a float, or None for no limit; ConfigurationError names *name* if it is not a duration."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ConfigurationError(f"{name} must be a number of seconds or None, not {seconds!r}")
    if not seconds >= 0:  # nor is NaN
        raise ConfigurationError(f"{name} must not be negative, but is {seconds!r} seconds")
    return None if seconds > FOR_EVER else float(seconds)


def check_flags(**flags: object) -> None:
    """ConfigurationError names the first that is no bool: what a ``"no"`` or a None means is not to be guessed."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} must be True or False, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Deadlines in seconds.  None means no limit; `flush` and `close_notify` may be 0, which is not to wait.

    All are on the monotonic clock, and total: no byte of the peer's restarts one.  But `idle` begins anew with each
    byte of application data, and `write_stall` with each record that the kernel takes.
    """

    connect: float | None = 10.0
    """TCP connection, over all addresses of the name together.  Four SYNs are lost in 7 s; 10 s forgives three."""
    handshake: float | None = 10.0
    """From TCP connected (or accepted) to TLS established; Netty's figure.  Bounds what a mute client costs.  A
    renegotiation that this side has asked for may take as long."""
    idle: float | None = None
    """No application byte in either direction for so long ends the session.  Off: silence is legitimate (IMAP IDLE)."""
    write_stall: float | None = 60.0
    """One record (16 KiB at most) must be taken by the kernel in this time: no peer may hold our memory for ever."""
    flush: float | None = 30.0
    """What was sent before `flush()` or `close()` has this long to leave, unless the call names its own timeout."""
    close_notify: float | None = 3.0
    """After our close_notify: how long to wait for the peer's, and to drain its late bytes (Netty: 3 s too)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            seconds = check_timeout(f"Timeouts.{name}", getattr(self, name))
            if seconds == 0 and name not in ("flush", "close_notify"):
                raise ConfigurationError(
                    f"Timeouts.{name} is 0, which no session could keep; None is no limit"
                )
            object.__setattr__(self, name, seconds)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Budgets in bytes and counts.  All positive whole numbers.

    *sessions* and *total_bytes* are of a whole Bridge: what `listen`, `connect` or `adopt` are given there is not
    looked at.
    """

    sessions: int = 20_000
    """Sessions of one Bridge at a time, streams not counted; one that was accepted and failed until its descriptor is
    closed.  A listener at the limit leaves new clients in the kernel's backlog.  On Windows a worker can own 511."""
    handshakes: int = 8_192
    """Unfinished handshakes of one listener, and failed ones whose descriptor lingers.  A client that has said nothing
    yet costs a socket and little else."""
    inbox_bytes: int = 256 * 1024
    """Received and not yet taken by the application, a session.  Beyond it we stop reading, and TCP the peer."""
    outbox_bytes: int = 256 * 1024
    """Sent and not yet taken by the kernel, a session.  Beyond it `send` waits.  A larger message goes alone."""
    total_bytes: int = 256 * 1024 * 1024
    """The same, each way, over all sessions.  Beyond it a session may hold one message at a time, or what one record
    holds, so none starves."""
    message_bytes: int = 64 * 1024 * 1024
    """The largest encoded message `send` takes."""
    backlog: int = 1_024
    """Connections the kernel keeps waiting for us (it caps this at its own somaxconn), and then sessions, their
    handshakes done, that wait for `accept`: a listener that has so many leaves new clients to the kernel."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"Limits.{field.name} must be a positive whole number, not {value!r}"
                )
