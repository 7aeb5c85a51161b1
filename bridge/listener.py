"""The application's handle of a listening socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from bridge import events, forks
from bridge.context import Context
from bridge.crossing import Latch, Tally
from bridge.dialer import show_address
from bridge.errors import ConfigurationError, ReceiveTimeout, ShutDown
from bridge.inbox import Inbox, SessionInbox
from bridge.limits import check_timeout

if TYPE_CHECKING:
    from bridge.session import Session


class Listener(forks.Handle):
    """Sessions of clients, their handshakes done.  Made by `Bridge.listen`; any thread may use it.

    Iterate over it, or call `accept`, unless it was made with a shared inbox: then the sessions' messages
    are there, nothing is to be accepted, and the first that is heard of a session is its first message.  It listens
    until `close`, also if the handle is forgotten.
    """

    def __init__(
        self, address: Any, context: Context, inbox: Inbox | None, stop: Callable[[float | None], None]
    ) -> None:
        self.address = address
        """Where it listens, with the port the system chose: ``(host, port)``, four items for IPv6; a path; or bytes,
        the abstract name of a Unix socket.  `Bridge.connect` takes it."""
        self.inbox = inbox
        self.context = context
        self.handshakes = Tally(2**63)
        self._stop = stop
        self.gone: Latch[bool] = Latch()
        self._accepted = SessionInbox()
        self._born = forks.current
        self._closed = False
        self._over = False

    def waiting(self) -> int:
        """How many sessions wait for `accept`, or messages in the shared inbox."""
        return (self._accepted if self.inbox is None else self.inbox).qsize()

    def accept(self, timeout: float | None = None) -> Session:
        """The next session.  ReceiveTimeout after *timeout* seconds (None: never); ShutDown once closed."""
        forks.check(self._born)
        if self.inbox is not None:
            raise ConfigurationError("this listener's sessions deliver to the shared inbox it was made with")
        session: Session = self._accepted.get(timeout=check_timeout("timeout", timeout))
        return session

    def __iter__(self) -> Iterator[Session]:
        """Sessions, until the listener is closed."""
        with contextlib.suppress(ShutDown):
            while True:
                yield self.accept()  # and keep nothing alive meanwhile

    def replace_context(self, context: Context | SSL.Context) -> None:
        """Serve new sessions with *context* from now on; those under way keep theirs.

        A bad certificate never gets here: making its context has failed already, and the old one stays.
        """
        forks.check(self._born)
        if self._closed:
            raise ShutDown("the listener is closed")
        self.context = Context.adopt(context, server_side=True)
        events.info("listener.context_replaced", address=show_address(self.address))

    def close(self) -> None:
        """Stop listening.  Sessions that were accepted live on; those still waiting for `accept` are closed."""
        forks.check(self._born)
        self._close(None)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close(self, timeout: float | None) -> None:
        """`close`, but wait for its worker *timeout* seconds at most."""
        self._closed = True
        self._stop(timeout)

    def _deliver(self, session: Session) -> None:
        """Coordinator: a handshake is done."""
        if self.inbox is None:
            self._accepted._deliver(None, [session], None, 0, 0)
            if self._over:
                self._turn_away()

    def _finished(self) -> None:
        """Worker: the socket is closed.  Whoever waits in `accept` learns it; who was not accepted is closed."""
        self._over = True
        self.gone.set(True)
        self._accepted._finish(ShutDown("the listener is closed"))
        self._turn_away()

    def _turn_away(self) -> None:
        while True:
            try:
                session: Session = self._accepted.get(block=False)
            except (ReceiveTimeout, ShutDown):
                return
            session._coordinator.close(session._channel, None)
