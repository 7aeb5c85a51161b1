"""The coordinator: one thread that routes what the application sends and decodes what the workers read.

The parser lives here and nowhere else: whatever woke a worker, and whichever OpenSSL call happened to
produce plaintext, the bytes come here, in order, and meet their session's codec.  Nothing here waits: inboxes take what
they are given, because reading stops long before they could grow (see `crossing`).

Which thread that is makes no difference.  What a worker has read meets the codec under the coordinator's lock, on its
own thread or on that of a worker which found it idle.  A receiver that has read its message itself has its session's
lock, and nothing else of the session is on its way here, so nobody else can come to this codec.  It delivers messages,
and that is all: the failure of a codec it leaves to the coordinator, and until that has seen to it, something of the
session is on its way.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from bridge import events, forks
from bridge.codecs import Codec
from bridge.crossing import Gate, Latch, Mailbox, let_go, nobody, take
from bridge.engine import SessionInfo
from bridge.errors import CodecError, EndOfStream, SessionAborted, SessionClosed, SessionEnded, fresh, words
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.limits import RECORD_BYTES
from bridge.outbox import Outbox
from bridge.poll import READ, my_sleeper
from bridge.terms import CloseReport, Ending, Told, cut_short_by, internal
from bridge.threads import check_may_wait, let_through, serving_all, this_thread
from bridge.transport import Transport
from bridge.worker import Command, Worker

MESSAGE_BYTES = 64
"""What a message costs at least, and before it is one what was read at once, however few its bytes are: so a million
empty lines are not free, nor as many records of a byte."""


class Ask:
    """What the application asks of a session by way of the coordinator."""

    SEND: Final = "send"  # the outbox has something
    SEND_EOF: Final = "send_eof"
    CLOSE: Final = "close"  # payload: (timeout,)
    HANG_UP: Final = "hang_up"  # payload: (timeout,)
    UNWRAP: Final = "unwrap"  # payload: (timeout,)
    RENEGOTIATE: Final = "renegotiate"
    ABORT: Final = "abort"  # payload: (cause,)
    FORGET: Final = "forget"  # the application has lost the handle

    FORWARDED: Final = (SEND_EOF, CLOSE, HANG_UP, UNWRAP, RENEGOTIATE, ABORT)  # methods of the transport


class Channel:
    """All the coordinator knows of one session, and the crossing points that hang on it.

    Owned by the coordinator: codec, decoding.  Safe from any thread: inbox, outbox, credit, the latches.
    """

    __slots__ = (
        "closed",
        "codec",
        "coordinator",
        "credit",
        "end",
        "given",
        "handle",
        "inbox",
        "name",
        "on_closed",
        "on_open",
        "opened",
        "outbox",
        "shared",
        "transport",
        "worker",
    )

    transport: Transport
    worker: Worker
    outbox: Outbox
    credit: ReadCredit

    def __init__(self, name: str, codec: Codec[Any], inbox: Inbox, coordinator: Coordinator) -> None:
        self.name = name
        self.coordinator = coordinator
        self.codec = codec
        self.inbox = inbox
        self.handle: Any = None
        """The application's handle, while nobody but the channel keeps it alive."""
        self.given = False
        """The application has the handle, whatever becomes of the handshake."""
        self.on_open: Callable[[Channel], None] = nobody
        self.on_closed: Callable[[Channel, Ending], None] = nobody
        self.opened: Latch[SessionInfo | SessionEnded] = Latch()
        self.closed: Latch[Ending] = Latch()
        self.shared = not isinstance(inbox, SessionInbox)
        """Its inbox is not its own."""
        if isinstance(inbox, SessionInbox):
            inbox.attend = self.attend
        self.end: SessionEnded | None = None
        """How receiving ended: the first cause, which stays."""

    def forget_handle(self) -> None:
        """From now on the application alone keeps its handle alive.  Coordinator."""
        self.handle = None

    def tell(self, kind: str, payload: Any) -> None:
        """For the transport: note an event.  The worker's thread."""
        if kind is not Told.DATA:
            pass
        elif len(payload) < MESSAGE_BYTES:
            self.credit.spend(MESSAGE_BYTES - len(payload))
        elif self.credit.stepwise and len(payload) >= RECORD_BYTES:
            alone = self.credit.undecoded() == len(payload) and self.opened.peek() is not None
            if alone and self.coordinator.decode_now(self, payload):
                return  # and more may be read at once
        self.worker.produced.append((self, kind, payload))

    def has_sent(self) -> None:
        """The outbox has something for the coordinator.  Any thread; never waits."""
        self.coordinator.post(self, Ask.SEND)

    def resume(self) -> None:
        """There is room again for what is read.  Any thread; never waits."""
        self.worker.post(self.transport, "wake")

    def answer(self, data: bytes) -> bool:
        """Write *data* on the calling thread, if it may be an answer and nothing is in its way; whether it was taken.

        Any thread; never waits, not even for a turn of the worker's, which may call back and log.  Of messages smaller
        than a record only one for each that was read goes this way: a stream of them is better merged.
        """
        transport, size = self.transport, len(data)
        if not transport.quiet or not ((transport.answerable and size) or size >= RECORD_BYTES):
            return False
        lock: Any = transport.lock
        if lock._is_owned():
            return False
        notes = this_thread.notes
        serves_all = notes.serves_all
        try:
            # A signal handler that waits would hold up the worker, which waits for the lock.
            notes.serves_all = True
            if not lock.acquire(False):
                return False
            quiet = transport.quiet and self.outbox.idle()
            if quiet:
                self._write(transport, data, size)
            lock.release()
            return quiet
        except BaseException:
            let_go(lock)
            raise
        finally:
            notes.serves_all = serves_all

    def _write(self, transport: Transport, data: bytes, left: int) -> None:
        transport.answerable = False
        try:
            left -= transport.write_at_once(data)
            if left:
                self.outbox.hold(left)
                self.worker.post(transport, "wake")
        except SessionEnded as error:
            self.outbox.hold(left)
            self.worker.post(transport, "conclude", error)
        except BaseException as error:  # Ctrl-C
            transport.freeze()
            self.worker.post(transport, "conclude", cut_short_by(error))
            raise

    def attend(self, inbox: SessionInbox, timeout: float | None, taken: list[Any] | None) -> bool:
        """Sleep beside the socket itself, at most *timeout* seconds, and read what comes; False if that may not be.

        It may be if the session is quiet, gets short messages, and nobody else waits for them.  Any thread that is
        about to wait for a message: if there is one, and no more, it is in *taken* then, or else in the inbox.
        Whatever else there is to be seen to is left to the worker.
        """
        notes = this_thread.notes
        if notes.serves_all:
            check_may_wait()
        transport, worker = self.transport, self.worker
        if not transport.brief or not worker.lends():  # before a bed is made, which is a descriptor
            return False
        before, bed = notes.sleeper, my_sleeper()  # of what a signal handler has interrupted, and ours
        if bed is None:
            return False
        lock: Any = transport.lock
        try:
            bed.asleep = notes.serves_all = True  # signal handlers take another bed, and may not wait for us
            if not (lock.acquire(False) or take(lock, bed.born, timeout)):
                return False
            received, at_rest = transport.received, transport.quiet and self.credit.settled()
            lent = at_rest and worker.lend(transport) and inbox.lie_down(bed)
            if not lent and inbox.attendant in (None, before):  # and so nobody is there
                worker.take_back(transport)
            lock.release()
            notes.serves_all = False
            if lent:
                bed.sleep(transport.sock, READ, timeout)
                notes.serves_all = True
                lock.acquire(False) or take(lock, bed.born)
                now = time.monotonic()
                if inbox.get_up() and transport.quiet and transport.received == received:
                    self._read(transport, now, taken)
                worker.leave(transport, now, inbox.awaited())
                lock.release()
            return lent
        except BaseException:  # Ctrl-C, mostly out of the sleep
            if bed.born == forks.current:  # or whoever has the lock may not live in this process
                with lock:
                    if inbox.attendant in (bed, None):
                        inbox.get_up()
                        worker.take_back(transport)
            let_go(lock)
            raise
        finally:
            bed.asleep = notes.serves_all = False

    def _read(self, transport: Transport, now: float, taken: list[Any] | None) -> None:
        try:
            data = transport.take_at_once(now)
            if data:
                self.coordinator.hand_in(self, data, taken)
        except BaseException as error:  # Ctrl-C, and what was read may be lost
            transport.freeze()
            self.worker.post(transport, "conclude", cut_short_by(error))
            raise
        if not transport.quiet or transport.mask != READ:
            self.worker.post(transport, "wake")


Word = tuple[Channel, str, Any]

Decoded = tuple[list[Any], int, int, "BaseException | None"]
"""What a codec has made of new bytes: messages; what these bytes cost; how many it keeps, of a message that is not
whole; and how it failed, if it did."""


class Coordinator:
    """Owns every channel's codec.  `post` is for all threads, the rest for its own."""

    def __init__(self) -> None:
        self._gate = Gate()
        self._lock = threading.RLock()  # whose the rest is for a turn: our thread's, or that of one who helps
        self._mailbox: Mailbox[Word] = Mailbox(self._gate.ring)
        self._outgoing: dict[Worker, list[Command]] = {}
        self._stopping = False
        self._handlers: dict[str, Callable[[Channel, Any], None]] = {
            **{ask: self._forward(ask) for ask in Ask.FORWARDED},
            Ask.SEND: self._send,
            Ask.FORGET: self._forget,
            Told.OPEN: self._opened,
            Told.DATA: self._data,
            Told.DECODED: self._decoded,
            Told.EOF: self._peer_closed,
            Told.CLOSED: self._closed,
        }

    # Any thread.

    def post(self, channel: Channel, what: str, payload: Any = None) -> None:
        """Have *what* handled.  Never waits; may be called by a finalizer."""
        self._mailbox.put((channel, what, payload))

    def close(self, channel: Channel, timeout: float | None, politely: bool = True) -> None:
        """Have the session closed; nothing more is accepted.  Never waits; idempotent.

        If not *politely*, without close_notify, unless it is being closed already.
        """
        first = channel.outbox.close(SessionClosed("this side closed the session"))
        if channel.closed.peek() is not None:
            return
        if politely and first and isinstance(channel.end, EndOfStream) and not channel.outbox.held():
            # The worker may have it at once: nothing that was sent or asked for before could still be on its way here.
            channel.worker.post(channel.transport, "close", timeout)
        else:
            self.post(channel, Ask.CLOSE if politely else Ask.HANG_UP, (timeout,))

    def forget(self, channel: Channel) -> None:
        """The application has let go of its handle.  Never waits; for a finalizer."""
        if channel.closed.peek() is None or channel.credit.held():
            self.post(channel, Ask.FORGET)

    def hand_over(self, words: list[Word]) -> None:
        """A worker's batch: handled on its own thread if the coordinator is idle, or else queued.  Workers only.

        Never waits, except for the codecs.
        """
        if self._lock.acquire(False):
            try:
                self._handle(self._mailbox.take() + words)
            finally:
                self._lock.release()
        else:
            self._mailbox.put(*words)

    def decode_now(self, channel: Channel, data: bytes) -> bool:
        """What a worker has read, if nothing else of its session is on its way: handled if the coordinator is idle.

        Whether it was.  With the session's lock, so nobody else's words are.  Workers only; waits for this codec alone.
        """
        if not self._lock.acquire(False):
            return False
        try:
            self._handle([(channel, Told.DATA, data)])
        finally:
            self._lock.release()
        return True

    def hand_in(self, channel: Channel, data: bytes, taken: list[Any] | None) -> None:
        """What a receiver has read of its own session, if nothing else of that is on its way.  With the session's lock.

        If it is one message, and *taken* is a list, that is where it goes: no room is taken by what is not kept.
        Waits for this codec alone.
        """
        if channel.end is not None:
            return
        decoded = messages, size, buffered, failure = _decode(channel, data)
        credit = channel.credit
        if taken is not None and failure is None and len(messages) == 1 and channel.end is None:
            if buffered or credit.kept:
                credit.keep(buffered)
            taken.append(messages[0])
            return
        credit.spend(size)
        if failure is None:
            self._deliver(channel, decoded)
        else:
            self.post(channel, Told.DECODED, decoded)

    def give_up(self, channel: Channel) -> None:
        """Nobody else will end the session any more: its worker has ended.  When `run` is over."""
        why, transport = SessionAborted("the bridge was closed"), channel.transport
        with transport.lock, self._lock:
            ending = Ending(why, CloseReport(channel.outbox.discard(why), False, False))
            transport.end(why, linger=False)
            for sock in transport.retired:
                sock.close()
            self._closed(channel, ending)

    def stop(self) -> None:
        """Leave `run`, after what is queued."""
        self._stopping = True
        self._gate.ring()

    # Its own thread.

    def run(self) -> None:
        """The thread: step and sleep until `stop`."""
        with serving_all():
            while not (self._stopping and self._mailbox.may_sleep()):
                self.step(None)

    def step(self, timeout: float | None = 0.0) -> bool:
        """Sleep until a word comes, at most *timeout* seconds; handle all there are.  Whether there were any."""
        if timeout != 0.0 and self._mailbox.may_sleep() and not self._stopping:
            self._gate.sleep(timeout)
        with self._lock:
            words = self._mailbox.take()
            self._handle(words)
        return bool(words)

    def _handle(self, words: list[Word]) -> None:
        for channel, what, payload in words:
            try:
                self._handlers[what](channel, payload)
            except BaseException as error:
                let_through(error)
                # A bug of ours, or of a user's class: it costs this session, not the thread.
                self._fail(channel, error)
        if not self._outgoing:
            return
        outgoing, self._outgoing = self._outgoing, {}
        for worker, commands in outgoing.items():
            worker.post_all(commands)

    def _fail(self, channel: Channel, error: BaseException) -> None:
        events.warning("coordinator.failed", session=channel.name, error=words(error, repr))
        self._command(channel, "conclude", internal(error))

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
            if method in (Ask.CLOSE, Ask.HANG_UP):
                self._end(channel, SessionClosed("this side closed the session"))
            elif method == Ask.ABORT:
                self._end(channel, payload[0])

        return forward

    # From the worker to the application.

    def _opened(self, channel: Channel, info: SessionInfo) -> None:
        channel.opened.set(info)
        channel.on_open(channel)

    def _data(self, channel: Channel, data: bytes) -> None:
        if channel.end is not None:
            channel.credit.settle(_price(data))
        else:
            self._deliver(channel, _decode(channel, data))

    def _decoded(self, channel: Channel, decoded: Decoded) -> None:
        if channel.end is not None:
            channel.credit.settle(decoded[1])
        else:
            self._deliver(channel, decoded)

    def _peer_closed(self, channel: Channel, _: None) -> None:
        if channel.end is None:
            self._deliver(channel, _decode(channel, b"", ended=True))
            self._end(channel, EndOfStream("the peer closed the session"))

    def _deliver(self, channel: Channel, decoded: Decoded) -> None:
        """Give the messages to the inbox; the owner has paid for new bytes.  End the session if the codec failed."""
        messages, size, buffered, failure = decoded
        credit, became = channel.credit, size
        if buffered or credit.kept:
            became += credit.kept - buffered
            credit.keep(buffered)
        settled = size if failure is None else 0
        if messages:
            share = became // len(messages)
            channel.inbox._deliver(
                channel.handle, messages, credit, settled, share if share > MESSAGE_BYTES else MESSAGE_BYTES
            )
        elif settled:
            credit.settle(settled)  # part of a message: the codec bounds that, and only more input can end it
        if failure is not None:
            self._refuse(channel, failure)
            credit.settle(size)  # last, for from then on a receiver may come to the codec

    def _refuse(self, channel: Channel, error: BaseException) -> None:
        """The codec failed: that ends its own session, with its error as the cause."""
        if isinstance(error, CodecError):
            failure = fresh(error)
        else:  # a user's codec
            failure = CodecError(f"the codec failed: {words(error, repr)}")
            failure.__cause__ = error.with_traceback(None)
        channel.outbox.close(failure)
        self._end(channel, failure)
        self._command(channel, "conclude", failure)

    def _forget(self, channel: Channel, _: None) -> None:
        if channel.closed.peek() is None:
            self._forward(Ask.HANG_UP)(channel, (None,))
        channel.credit.forfeit()

    def _end(self, channel: Channel, cause: SessionEnded) -> None:
        """Receiving is over; the first cause stays."""
        if channel.end is None:
            channel.end = cause
            known = channel.given or isinstance(channel.opened.peek(), SessionInfo)
            channel.inbox._end(channel.handle, cause, known, functools.partial(self.close, channel, None))
            channel.forget_handle()

    def _closed(self, channel: Channel, ending: Ending) -> None:
        self._end(channel, ending.cause)
        channel.credit.conclude()
        if channel.inbox.shut:
            channel.credit.forfeit()
        try:
            channel.on_closed(channel, ending)  # first: whoever waits for the end may count on its room
        finally:
            channel.opened.set(ending.cause)
            channel.closed.set(ending)


def _decode(channel: Channel, data: bytes, ended: bool = False) -> Decoded:
    """What the codec makes of *data*, or of the end, also if it fails in the middle of it.  One thread at a time."""
    codec = channel.codec
    messages: list[Any] = []
    try:
        for message in codec.eof() if ended else codec.decode(data):
            if message is None and channel.shared:
                raise TypeError("it gave None, which says in a shared inbox that a session has ended")
            messages.append(message)
        # A user's codec need not say what it keeps, but must not lie.
        buffered = getattr(codec, "buffered", 0)
        if type(buffered) is not int:
            buffered = operator.index(buffered)
        if buffered < 0:
            raise ValueError(f"{type(codec).__name__}.buffered is how many bytes it holds, not {buffered}")
    except BaseException as error:
        let_through(error)
        return messages, _price(data), 0, error
    return messages, _price(data), buffered, None


def _price(data: bytes) -> int:
    """What was spent for it (`Channel.tell`)."""
    size = len(data)
    return size if size >= MESSAGE_BYTES or not size else MESSAGE_BYTES
