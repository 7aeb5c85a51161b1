"""The coordinator: one thread that routes what the application sends and decodes what the workers read.

The parser lives here and nowhere else: whatever woke a worker, and whichever OpenSSL call happened to
produce plaintext, the bytes come to this thread, in order, and meet their session's codec.  Nothing here
waits: inboxes take what they are given, because reading stops long before they could grow (see `queues`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

from bridge import events
from bridge.codecs import Codec
from bridge.engine import SessionInfo
from bridge.errors import CodecError, EndOfStream, SessionAborted, SessionClosed, SessionEnded, fresh
from bridge.queues import Gate, Inbox, Latch, Mailbox, Outbox, ReadCredit
from bridge.transport import Ending, Told, Transport, nobody
from bridge.worker import Command, Worker

MESSAGE_BYTES = 64
"""What a message costs beyond its bytes on the wire, so that a million empty lines are not free."""


class Ask:
    """What the application asks of a session by way of the coordinator."""

    SEND: Final = "send"  # the outbox has something
    SEND_EOF: Final = "send_eof"
    CLOSE: Final = "close"  # payload: (timeout,)
    UNWRAP: Final = "unwrap"  # payload: (timeout,)
    RENEGOTIATE: Final = "renegotiate"
    ABORT: Final = "abort"  # payload: (cause,)
    FORGET: Final = "forget"  # the application has lost the handle


class Channel:
    """All the coordinator knows of one session, and the crossing points that hang on it.

    Owned by the coordinator: codec, decoding.  Safe from any thread: inbox, outbox, credit, the latches.
    """

    __slots__ = (
        "closed",
        "codec",
        "credit",
        "end",
        "ended",
        "handle",
        "inbox",
        "name",
        "on_closed",
        "on_open",
        "opened",
        "outbox",
        "received",
        "transport",
        "worker",
    )

    transport: Transport
    worker: Worker
    outbox: Outbox
    credit: ReadCredit

    def __init__(self, name: str, codec: Codec[Any], inbox: Inbox) -> None:
        self.name = name
        self.codec = codec
        self.inbox = inbox
        self.handle: Callable[[], Any] = nobody
        """The application's handle; it is not kept alive by this, unless the wiring wants it so."""
        self.on_open: Callable[[Channel], None] = _ignore
        self.on_closed: Callable[[Channel, Ending], None] = _ignore
        self.opened: Latch[SessionInfo | SessionEnded] = Latch()
        self.closed: Latch[Ending] = Latch()
        self.end: SessionEnded | None = None
        """How receiving ended: the first cause."""
        self.ended = False
        self.received = 0
        """Bytes that the worker has read, since the beginning."""

    def forget_handle(self) -> None:
        """From now on the application alone keeps its handle alive.  Coordinator."""
        self.handle = nobody

    def tell(self, kind: str, payload: Any) -> None:
        """For the transport: note an event.  The worker's thread."""
        self.worker.produce((self, kind, payload))


def _ignore(*_: Any) -> None:
    pass


Word = tuple[Channel, str, Any]


class Coordinator:
    """Owns every channel's codec.  `post` is for all threads, the rest for its own."""

    def __init__(self) -> None:
        self._gate = Gate()
        self._mailbox: Mailbox[Word] = Mailbox(self._gate.ring)
        self._outgoing: dict[Worker, list[Command]] = {}
        self._stopping = False
        self._handlers: dict[str, Callable[[Channel, Any], None]] = {
            Ask.SEND: self._send,
            Ask.SEND_EOF: self._forward("send_eof"),
            Ask.CLOSE: self._forward("close"),
            Ask.UNWRAP: self._forward("unwrap"),
            Ask.RENEGOTIATE: self._forward("renegotiate"),
            Ask.ABORT: self._forward("abort"),
            Ask.FORGET: self._forget,
            Told.OPEN: self._opened,
            Told.DATA: self._data,
            Told.EOF: self._peer_closed,
            Told.CLOSED: self._closed,
        }

    # Any thread.

    def post(self, channel: Channel, what: str, payload: Any = None) -> None:
        """Have *what* handled.  Never waits; may be called by a finalizer."""
        self._mailbox.put((channel, what, payload))

    def sender(self, channel: Channel) -> Callable[[], None]:
        """`post` of SEND, made beforehand: it is called for almost every message."""
        return functools.partial(self._mailbox.put, (channel, Ask.SEND, None))

    def close(self, channel: Channel, timeout: float | None) -> None:
        """Have the session closed politely; nothing more is accepted.  Never waits; idempotent."""
        channel.outbox.close(SessionClosed("this side closed the session"))
        if channel.closed.peek() is None:
            self.post(channel, Ask.CLOSE, (timeout,))

    def post_all(self, words: list[Word]) -> None:
        """A worker's batch."""
        self._mailbox.put(*words)

    def stop(self) -> None:
        """Leave `run`, after what is queued."""
        self._stopping = True
        self._gate.ring()

    # Its own thread.

    def run(self) -> None:
        """The thread: step and sleep until `stop`."""
        while not (self._stopping and self._mailbox.may_sleep()):
            self.step(None)

    def step(self, timeout: float | None = 0.0) -> bool:
        """Sleep until a word comes, at most *timeout* seconds; handle all there are.  Whether there were any."""
        if timeout != 0.0 and self._mailbox.may_sleep() and not self._stopping:
            self._gate.sleep(timeout)
        words = self._mailbox.take()
        for channel, what, payload in words:
            try:
                self._handlers[what](channel, payload)
            except (
                Exception
            ) as error:  # a bug of ours, or of a user's class: it costs this session, not the thread
                self._fail(channel, error)
        outgoing, self._outgoing = self._outgoing, {}
        for worker, commands in outgoing.items():
            worker.post_all(commands)
        return bool(words)

    def _fail(self, channel: Channel, error: Exception) -> None:
        events.warning("coordinator.failed", session=channel.name, error=repr(error))
        failure = SessionAborted(f"internal error: {error!r}")
        failure.__cause__ = error
        self._command(channel, "end", failure)

    # From the application to the worker.

    def _command(self, channel: Channel, method: str, *arguments: Any) -> None:
        self._outgoing.setdefault(channel.worker, []).append((channel.transport, method, arguments))

    def _send(self, channel: Channel, _: None) -> None:
        chunks = channel.outbox.take()
        if chunks:
            self._command(channel, "send", chunks)

    def _forward(self, method: str) -> Callable[[Channel, Any], None]:
        def forward(channel: Channel, payload: Any) -> None:
            self._send(channel, None)  # what was accepted before goes before
            self._command(channel, method, *(() if payload is None else payload))
            if method == "close":
                self._end(channel, SessionClosed("this side closed the session"))

        return forward

    # From the worker to the application.

    def _opened(self, channel: Channel, info: SessionInfo) -> None:
        channel.opened.set(info)
        channel.on_open(channel)

    def _data(self, channel: Channel, data: bytes) -> None:
        channel.received += len(data)
        if channel.ended:
            channel.credit.give_back(len(data))
        else:
            self._decode(channel, len(data), lambda: channel.codec.decode(data))

    def _peer_closed(self, channel: Channel, _: None) -> None:
        if not channel.ended:
            self._decode(channel, 0, channel.codec.eof)
            self._end(channel, EndOfStream("the peer closed the session"))

    def _decode(self, channel: Channel, size: int, decode: Callable[[], Iterable[Any]]) -> None:
        """Deliver what *decode* makes of *size* new bytes, also if it raises after that."""
        codec = channel.codec
        held = getattr(codec, "buffered", 0)
        messages: list[Any] = []
        failure: SessionEnded | None = None
        try:
            for message in decode():
                messages.append(message)
        except CodecError as error:
            failure = fresh(error)
        except Exception as error:  # a user's codec: it ends its own session, with its error as the cause
            failure = CodecError(f"the codec failed: {error!r}")
            failure.__cause__ = error.with_traceback(None)
        if (buffered := getattr(codec, "buffered", 0)) != channel.credit.kept:
            channel.credit.keep(buffered)
        if messages:
            self._deliver(channel, messages, size, held + size - getattr(codec, "buffered", 0))
        elif size:
            channel.credit.give_back(
                size
            )  # part of a message: the codec bounds that, and only more input can end it
        if failure is not None:
            channel.outbox.close(failure)
            self._end(channel, failure)
            self._command(channel, "end", failure)

    def _deliver(self, channel: Channel, messages: list[Any], paid: int, size: int) -> None:
        """Give *messages*, *size* bytes on the wire, to the inbox; the owner has paid for *paid* of them."""
        credit, session = channel.credit, channel.handle()
        share = size // len(messages) + MESSAGE_BYTES
        credit.spend(share * len(messages) - paid)
        channel.inbox._deliver([(session, message, credit, share, None) for message in messages])

    def _forget(self, channel: Channel, _: None) -> None:
        if channel.closed.peek() is None:
            self._forward("close")(channel, (None,))
        channel.credit.forfeit()

    def _end(self, channel: Channel, cause: SessionEnded) -> None:
        """Receiving is over; the first cause stays."""
        if not channel.ended:
            channel.ended = True
            channel.end = cause
            opened = isinstance(channel.opened.peek(), SessionInfo)
            channel.inbox._end(channel.handle(), cause, opened, lambda: self.close(channel, None))
            channel.forget_handle()

    def _closed(self, channel: Channel, ending: Ending) -> None:
        self._end(channel, ending.cause)
        channel.credit.keep(0)
        channel.opened.set(ending.cause)
        channel.closed.set(ending)
        channel.on_closed(channel, ending)
