"""Structured events, under stable names, with nothing secret in them.

A program that configured structlog gets them through structlog; any other gets them as lines of the
standard `logging` logger ``bridge``, which is silent below WARNING until it is asked for more.

=========================  =======  ===============================================================================
event                      level    fields
=========================  =======  ===============================================================================
session.state              DEBUG    session, peer, old, new, why (the table of states says it); on CLOSED also cause and
                                    error
session.stalled            WARNING  session, peer, worker, turns, and all that is known of where it stands: a bug in the
                                    bridge; the session ends, others live on
handshake.failed           INFO     session, peer, cause, error: of a listener's client (nobody else would tell)
listener.started           INFO     address
listener.refused           WARNING  address, peer, cause, error: a client for whom there is no session, because the
                                    codec factory raised or another listener was faster to reach `Limits.sessions`
listener.paused            WARNING  address, reason (once a pause, not once an attempt)
listener.resumed           INFO     address
listener.context_replaced  INFO     address
listener.closed            INFO     address
worker.failed              WARNING  worker (the thread whose turn it was), error: a bug in the bridge; the session
                                    concerned ends, others live on
coordinator.failed         WARNING  session, error: likewise
bridge.closed              DEBUG    sessions, unsent (bytes); without streams, and so the sockets of `bridge.ssl`
=========================  =======  ===============================================================================

*cause* is the name of an error's class, *error* its words.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import structlog

from bridge.threads import let_through

_LOGGER = logging.getLogger("bridge")
_LOGGER.addHandler(logging.NullHandler())
_METHODS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}
"""What every logger of structlog has for each level; not all of them have `log`."""
_RENDER = structlog.processors.KeyValueRenderer(key_order=["event"])


def debug(event: str, **fields: Any) -> None:
    """An ordinary step in the life of something.  Any thread; never raises, never waits for a lock of ours."""
    _emit(logging.DEBUG, event, fields)


def info(event: str, **fields: Any) -> None:
    """Something an operator may want to see.  Any thread; never raises."""
    _emit(logging.INFO, event, fields)


def warning(event: str, **fields: Any) -> None:
    """Something that went wrong for one session or listener.  Any thread; never raises."""
    _emit(logging.WARNING, event, fields)


def wanted() -> bool:
    """Whether anybody listens to the ordinary steps, so callers can skip the work of describing them."""
    return structlog.is_configured() or _LOGGER.isEnabledFor(logging.DEBUG)


def _emit(level: int, event: str, fields: dict[str, Any]) -> None:
    try:
        if structlog.is_configured():
            getattr(structlog.get_logger("bridge"), _METHODS[level])(event, **fields)
        elif _LOGGER.isEnabledFor(level):
            _LOGGER.log(level, "%s", _RENDER(None, "", {"event": event, **fields}))
    except BaseException as error:  # a user's processor or handler failed: the session it spoke of must not
        let_through(error)
        with contextlib.suppress(Exception):  # as that handler is asked once more
            _LOGGER.exception("a log processor failed on event %s", event)
