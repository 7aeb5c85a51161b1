"""The application's handle of a session.  Every method may be called by any thread, at any time."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator
from typing import Any

from bridge import forks
from bridge.coordinator import Ask, Channel, Coordinator
from bridge.crossing import deadline_after, time_left
from bridge.engine import SessionInfo
from bridge.errors import ConfigurationError, EndOfStream, SessionAborted, SessionClosed, SessionEnded, fresh
from bridge.inbox import SessionInbox
from bridge.limits import RECORD_BYTES, Limits, Timeouts, check_timeout
from bridge.terms import CloseReport


class Session(forks.Handle):
    """One TLS session: whole messages out, whole messages in.

    Made by `Bridge.connect`, `Bridge.adopt` and listeners.  Any number of threads may send and receive at
    the same time.  A handle that is forgotten ends its session, with a ResourceWarning: what was sent leaves, but no
    close_notify follows, for nobody has said that this was all.

    The end of a ``with`` block closes it.  If the block raises, it is aborted: the peer sees a reset, so that it cannot
    take half an answer for all of it, and may lose what it has not read yet.
    """

    __slots__ = ("__weakref__", "_born", "_channel", "_coordinator", "_limits", "_timeouts")

    def __init__(
        self, channel: Channel, coordinator: Coordinator, timeouts: Timeouts, limits: Limits
    ) -> None:
        self._channel = channel
        self._coordinator = coordinator
        self._timeouts = timeouts
        self._limits = limits
        self._born = forks.current

    # Messages.

    def send(self, message: Any, timeout: float | None = None) -> None:
        """Hand over *message*, whole.  Returns when it is accepted, not when it has left: see `flush`.

        Waits for room at most *timeout* seconds (None: as long as the session lives), then raises
        SendTimeout, and nothing of the message was sent.  Raises TypeError or ValueError for what the codec
        cannot encode or what is over `Limits.message_bytes`; and the session's cause after its end.
        """
        if self._born != forks.current:
            forks.check(self._born)
        if timeout is not None:
            timeout = check_timeout("timeout", timeout)
        channel = self._channel
        data = channel.codec.encode(message)
        if type(data) is not bytes:
            raise TypeError(
                f"{type(channel.codec).__name__}.encode must return bytes, not {type(data).__name__}"
            )
        if len(data) > self._limits.message_bytes:
            raise ValueError(
                f"a message of {len(data)} bytes is over Limits.message_bytes, which is {self._limits.message_bytes}"
            )
        if not channel.answer(data):
            deadline = None if timeout is None else deadline_after(timeout)
            if not channel.outbox.put(data, timeout, len(data) >= RECORD_BYTES) and not channel.answer(data):
                channel.outbox.put(data, time_left(deadline))

    def recv(self, timeout: float | None = None) -> Any:
        """The next message.  Waits at most *timeout* seconds (None: for ever), then raises ReceiveTimeout.

        After the last message: EndOfStream if the peer ended cleanly, Truncated if it was cut off, or
        whatever else ended the session; always the same.
        """
        if timeout is not None:
            timeout = check_timeout("timeout", timeout)
        return self._own_inbox().get(True, timeout)

    def peek(self, timeout: float | None = None) -> Any:
        """As `recv`, but the message stays and is the next one again."""
        return self._own_inbox().peek(timeout=check_timeout("timeout", timeout))

    def __iter__(self) -> Iterator[Any]:
        """Messages until the clean end; any other end raises."""
        with contextlib.suppress(EndOfStream):
            while True:
                yield self.recv()  # and keep nothing alive meanwhile

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the kernel has everything that was sent before this call.

        OperationTimeout after *timeout* seconds (None: `Timeouts.flush`); the cause if the session ends first.
        """
        forks.check(self._born)
        timeout = check_timeout("timeout", timeout)
        self._channel.outbox.flush(self._timeouts.flush if timeout is None else timeout)

    @property
    def inbox(self) -> InboxView:
        """Receiving, as a `queue.Queue`."""
        self._own_inbox()
        return InboxView(self)

    @property
    def outbox(self) -> OutboxView:
        """Sending, as a `queue.Queue`."""
        return OutboxView(self)

    # Ends.

    def send_eof(self) -> None:
        """TLS half close: after all that was sent, close_notify (RFC 8446, 6.1).  Receiving goes on."""
        forks.check(self._born)
        self._channel.outbox.close(
            SessionClosed("this side has ended its half of the session: send_eof() was called")
        )
        self._coordinator.post(self._channel, Ask.SEND_EOF)

    def unwrap(self, timeout: float | None = None) -> tuple[socket.socket, bytes]:
        """End TLS on both sides and go on in plain text: the socket, blocking, and bytes read too far.

        OpenSSL reads record by record, so mostly there are none, ``b""``; there can be some if the connection
        was congested just then.  Messages received before the peer's close_notify stay in the inbox.  A later call
        gives the same socket, while that is open.  Takes *timeout* seconds at most (None: `Timeouts.flush` and then
        `Timeouts.close_notify`); then, or if the peer just hangs up, raises the cause.
        """
        forks.check(self._born)
        timeout = check_timeout("timeout", timeout)
        self._channel.outbox.close(SessionClosed("this side has ended TLS: unwrap() was called"))
        self._coordinator.post(self._channel, Ask.UNWRAP, (timeout,))
        ending = self._channel.closed.wait(None, "unwrap")
        return ending.unwrap()

    def close(self, timeout: float | None = None) -> CloseReport:
        """Polite close: what was sent leaves, close_notify is said, and the peer's awaited for a while.

        Takes *timeout* seconds at most (None: `Timeouts.flush` for the first part and
        `Timeouts.close_notify` for the second: 33 seconds by default).  With 0 only that leaves which the kernel takes
        at once.  What the peer still sends is thrown away.  The report says how far it got.  Idempotent: later calls
        return the same report.
        """
        forks.check(self._born)
        self._coordinator.close(self._channel, check_timeout("timeout", timeout))
        return self._channel.closed.wait(None, "close").report

    def abort(self) -> None:
        """End now: what has not left is lost, the peer sees a reset.  Idempotent; does not wait."""
        forks.check(self._born)
        why = SessionAborted("this side aborted the session")
        self._channel.outbox.close(why)
        if self._channel.closed.peek() is None:
            self._coordinator.post(self._channel, Ask.ABORT, (why,))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        # May run in any thread, at any moment: no lock that is not reentrant, and nothing that waits.
        try:
            channel, abandoned = self._channel, forks.abandoned(self._born)
        except AttributeError:
            return
        if abandoned:
            return
        try:
            if channel.closed.peek() is None and not channel.outbox.closed:
                warnings.warn(
                    f"session {channel.name} was forgotten and is being closed", ResourceWarning, source=self
                )
        finally:  # also where warnings are errors
            self._coordinator.forget(channel)

    # Facts.

    @property
    def info(self) -> SessionInfo:
        """What the handshake settled.  Waits for it, if it is still going on; raises the cause if it failed."""
        return self._wait_open(None)

    @property
    def end(self) -> SessionEnded | None:
        """How receiving ended: None while it goes on, then the cause, which never changes.

        After `abort`, which does not wait, it may be None for a moment still."""
        return self._channel.end

    @property
    def state(self) -> str:
        """The name of the state the session is in now (see the states page): for people, not for decisions."""
        return self._channel.transport.state.value

    @property
    def name(self) -> str:
        """What the session is called in events and snapshots."""
        return self._channel.name

    def renegotiate(self) -> None:
        """Ask the peer for a new TLS 1.2 handshake, while data goes on flowing (RFC 5246, 7.4.1.1).

        It returns at once.  While one is under way, to ask for another changes nothing.

        ConfigurationError on TLS 1.3, which has none (it changes keys by itself), and where the context
        does not allow it (``renegotiation=True``).  It is for servers: most let no client ask, and end its session.
        """
        forks.check(self._born)
        if self.info.version == "TLSv1.3":
            raise ConfigurationError("TLS 1.3 has no renegotiation; only a TLS 1.2 session can renegotiate")
        if not self._channel.transport.allows_renegotiation:
            raise ConfigurationError(
                "this session's context refuses renegotiation; make it with renegotiation=True"
            )
        self._coordinator.post(self._channel, Ask.RENEGOTIATE)

    def __repr__(self) -> str:
        return f"<Session {self._channel.name} {self.state}>"

    def _wait_open(self, timeout: float | None) -> SessionInfo:
        forks.check(self._born)
        outcome = self._channel.opened.wait(timeout, "the session did not open")
        if isinstance(outcome, SessionEnded):
            raise fresh(outcome)
        return outcome

    def _own_inbox(self) -> SessionInbox:
        if self._born != forks.current:
            forks.check(self._born)
        inbox = self._channel.inbox
        if not isinstance(inbox, SessionInbox):
            raise ConfigurationError(
                "this session delivers to the shared inbox it was made with; get its messages there"
            )
        return inbox


class InboxView:
    """A session's received messages as a `queue.Queue`; it keeps the session alive."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message; `queue.Empty` when there is none in time, ShutDown (the cause) after the end."""
        return self._session._own_inbox().get(block, check_timeout("timeout", timeout))

    def get_nowait(self) -> Any:
        """`get`, without waiting."""
        return self.get(block=False)

    def qsize(self) -> int:
        """How many messages are waiting."""
        return self._session._channel.inbox.qsize()

    def empty(self) -> bool:
        """Whether no message is waiting."""
        return not self.qsize()

    def full(self) -> bool:
        """Whether the session has stopped reading because its messages are not taken."""
        return self._session._channel.credit.overdraft() >= 0


class OutboxView:
    """A session's sending side as a `queue.Queue`; it keeps the session alive."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, message: Any, block: bool = True, timeout: float | None = None) -> None:
        """`Session.send`; `queue.Full` when there is no room in time, ShutDown (the cause) after the end."""
        self._session.send(message, timeout if block else 0.0)

    def put_nowait(self, message: Any) -> None:
        """`put`, without waiting."""
        self.put(message, block=False)

    def qsize(self) -> int:
        """Bytes (not messages) that the kernel has not taken yet."""
        return self._session._channel.outbox.held()

    def empty(self) -> bool:
        """Whether the kernel has everything."""
        return not self.qsize()

    def full(self) -> bool:
        """Whether any message would have to wait for room."""
        return self._session._channel.outbox.full()
