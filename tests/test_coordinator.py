"""A coordinator alone, in lockstep: what it tells the worker, the application, and whoever counts the bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from peers import PATIENCE
from rig import busy
from structlog.testing import capture_logs

import bridge
from bridge.codecs import Codec, LengthPrefixed, Raw
from bridge.coordinator import MESSAGE_BYTES, Ask, Channel, Coordinator
from bridge.crossing import Tally
from bridge.engine import SessionInfo
from bridge.errors import EndOfStream, SessionAborted, SessionClosed, Truncated
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.limits import RECORD_BYTES
from bridge.outbox import Outbox
from bridge.terms import CloseReport, Ending, Told

INFO = SessionInfo("TLSv1.3", "some", 256, None, None, (), None, None, False)
LIMIT = 100_000


class Worker:
    """Notes what it is told, in place of a thread."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.batches = 0
        self.produced: list[Any] = []

    def post(self, transport: Any, method: str, *arguments: Any) -> None:
        self.commands.append((method, *arguments))

    def post_all(self, commands: list[Any]) -> None:
        self.batches += 1
        self.commands += [(method, *arguments) for _, method, arguments in commands]


class Transport:
    """Takes as much as it is told to."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.answerable = self.quiet = True
        self.written: list[bytes] = []
        self.takes = LIMIT
        self.frozen = False
        self.failure: BaseException | None = None

    def write_at_once(self, data: bytes) -> int:
        if self.failure is not None:
            raise self.failure
        self.written.append(data)
        return min(self.takes, len(data))

    def freeze(self) -> None:
        self.frozen = True


class Rig:
    """A coordinator with one channel, between a worker and an application that are not there."""

    def __init__(self, codec: Codec[Any] | None = None, inbox: Inbox | None = None) -> None:
        self.coordinator = Coordinator()
        self.inbox = SessionInbox() if inbox is None else inbox
        self.channel = Channel("s", codec or Raw(), self.inbox, self.coordinator)
        self.worker = self.channel.worker = Worker()  # type: ignore[assignment]
        self.transport = self.channel.transport = Transport()  # type: ignore[assignment]
        self.tally = Tally(10 * LIMIT)
        self.outbox = self.channel.outbox = Outbox(LIMIT, self.tally, self.channel.has_sent)
        self.credit = self.channel.credit = ReadCredit(LIMIT, self.tally, self.channel.resume, self.inbox)
        self.closed: list[Ending] = []
        self.channel.on_closed = lambda channel, ending: self.closed.append(ending)
        self.channel.handle = self

    def says(self, kind: str, payload: Any = None) -> None:
        """The worker has something to tell."""
        if kind == Told.DATA:
            self.credit.spend(len(payload))
        self.channel.tell(kind, payload)
        produced, self.worker.produced = self.worker.produced, []
        self.coordinator.hand_over(produced)

    def asks(self, what: str, payload: Any = None) -> None:
        """The application wants something."""
        self.coordinator.post(self.channel, what, payload)
        assert self.coordinator.step() and not self.coordinator.step()

    def forgets(self) -> None:
        """The application has let go of its handle."""
        self.coordinator.forget(self.channel)
        assert self.coordinator.step() and not self.coordinator.step()

    def ends(self, cause: bridge.SessionEnded) -> Ending:
        ending = Ending(cause, CloseReport(0, False, False))
        self.says(Told.CLOSED, ending)
        return ending

    def taken(self) -> list[Any]:
        """What the application finds."""
        return [self.inbox.get_nowait() for _ in range(self.inbox.qsize())]


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ── to the worker ──


def test_what_was_sent_goes_in_one_piece_and_once(rig: Rig) -> None:
    assert rig.outbox.put(b"a", None) and rig.outbox.put(b"b", None)
    assert rig.coordinator.step() and not rig.coordinator.step()
    assert rig.worker.commands == [("send", [b"a", b"b"])]
    rig.asks(Ask.SEND)
    assert len(rig.worker.commands) == 1 and rig.worker.batches == 1


@pytest.mark.parametrize(
    ("what", "payload", "command"),
    [
        (Ask.SEND_EOF, None, ("send_eof",)),
        (Ask.CLOSE, (3.0,), ("close", 3.0)),
        (Ask.UNWRAP, (None,), ("unwrap", None)),
        (Ask.RENEGOTIATE, None, ("renegotiate",)),
        (Ask.ABORT, ("why",), ("abort", "why")),
    ],
)
def test_what_is_asked_comes_after_what_was_sent(rig: Rig, what: str, payload: Any, command: Any) -> None:
    rig.outbox.put(b"a", None)
    rig.coordinator.post(rig.channel, what, payload)
    rig.coordinator.step()
    assert rig.worker.commands == [("send", [b"a"]), command] and rig.worker.batches == 1
    assert (rig.channel.end is not None) == (what in (Ask.CLOSE, Ask.ABORT))


def test_a_close_does_not_overtake_a_sender_who_has_not_got_round_to_telling(rig: Rig) -> None:
    rig.outbox._notify = lambda: None
    rig.outbox.put(b"a", None)
    rig.coordinator.close(rig.channel, None)
    rig.coordinator.step()
    assert rig.worker.commands == [("send", [b"a"]), ("close", None)]


def test_a_close_is_asked_for_until_it_is_done(rig: Rig) -> None:
    rig.coordinator.close(rig.channel, 1.0)
    rig.coordinator.close(rig.channel, 0.5)
    rig.coordinator.step()
    assert rig.worker.commands == [("close", 1.0), ("close", 0.5)]
    with pytest.raises(SessionClosed, match="this side closed"):
        rig.outbox.put(b"x", None)
    with pytest.raises(SessionClosed, match="this side closed"):
        rig.inbox.get_nowait()
    rig.ends(SessionClosed("done"))
    rig.coordinator.close(rig.channel, 0.1)
    assert not rig.coordinator.step()


def test_behind_the_peers_end_a_close_goes_straight_to_the_worker(rig: Rig) -> None:
    rig.says(Told.EOF)
    rig.coordinator.close(rig.channel, 1.0)
    assert rig.worker.commands == [("close", 1.0)]
    assert not rig.coordinator.step()


def test_but_not_past_what_was_sent(rig: Rig) -> None:
    rig.says(Told.EOF)
    rig.outbox.put(b"a", None)
    rig.coordinator.close(rig.channel, 1.0)
    assert rig.worker.commands == []
    rig.coordinator.step()
    assert rig.worker.commands == [("send", [b"a"]), ("close", 1.0)]


def test_nor_past_an_abort(rig: Rig) -> None:
    why = SessionAborted("this side aborted the session")
    rig.says(Told.EOF)
    rig.outbox.close(why)
    rig.coordinator.post(rig.channel, Ask.ABORT, (why,))
    rig.coordinator.close(rig.channel, None)
    assert rig.worker.commands == []
    rig.coordinator.step()
    assert rig.worker.commands == [("abort", why), ("close", None)]


def test_nor_past_the_end_that_a_codec_has_made() -> None:
    rig = Rig(LengthPrefixed())
    rig.says(Told.DATA, bytes([0, 0]))
    rig.says(Told.EOF)  # in the middle of a message
    told = rig.worker.commands.copy()
    assert [method for method, *_ in told] == ["conclude"]
    rig.coordinator.close(rig.channel, None)
    assert rig.worker.commands == told
    rig.coordinator.step()
    assert rig.worker.commands == [*told, ("close", None)]


def test_a_forgotten_session_is_closed_and_what_it_holds_is_given_up(rig: Rig) -> None:
    rig.says(Told.DATA, bytes(5000))
    assert rig.credit.held() == 5000 == rig.tally.used
    rig.forgets()
    assert rig.worker.commands == [("hang_up", None)]
    assert rig.credit.held() == 0 == rig.tally.used
    rig.ends(SessionClosed("done"))
    rig.asks(Ask.FORGET)
    assert rig.worker.commands == [("hang_up", None)]


def test_a_session_that_is_over_is_forgotten_without_a_word_unless_something_is_held(rig: Rig) -> None:
    rig.says(Told.DATA, bytes(5000))
    rig.ends(SessionClosed("done"))
    rig.forgets()
    assert rig.credit.held() == 0 == rig.tally.used and rig.worker.commands == []
    rig.coordinator.forget(rig.channel)
    assert not rig.coordinator.step()


# ── to the application ──


def test_the_handshake_is_told_once(rig: Rig) -> None:
    opened: list[Channel] = []
    rig.channel.on_open = opened.append
    assert rig.channel.opened.peek() is None
    rig.says(Told.OPEN, INFO)
    assert rig.channel.opened.peek() is INFO and opened == [rig.channel]


@pytest.mark.parametrize("codec", [Raw, lambda: LengthPrefixed(1)])
def test_messages_cost_what_they_hold_and_a_little_at_least(codec: Callable[[], Codec[Any]]) -> None:
    rig = Rig(codec())
    large, small = bytes(200), b"s"
    rig.says(Told.DATA, rig.channel.codec.encode(large))
    assert rig.credit.held() == len(rig.channel.codec.encode(large))
    assert rig.taken() == [large] and rig.credit.held() == 0
    rig.says(Told.DATA, rig.channel.codec.encode(small))
    assert rig.credit.held() == MESSAGE_BYTES and rig.taken() == [small] and rig.credit.held() == 0


def test_none_is_no_message_where_it_would_say_that_the_session_has_ended() -> None:
    class Nulls(Raw):
        def decode(self, data: bytes) -> list[Any]:
            return [data, None, data]

    shared, own = Rig(Nulls(), Inbox()), Rig(Nulls())
    shared.channel.given = True
    for rig in (shared, own):
        rig.says(Told.DATA, b"null")
    assert own.taken() == [b"null", None, b"null"]
    assert shared.taken() == [(shared, b"null"), (shared, None)]
    assert isinstance(shared.channel.end, bridge.CodecError) and "None" in str(shared.channel.end)
    assert shared.credit.held() == own.credit.held() == 0


def test_what_the_codec_holds_is_counted_and_shared_out_among_the_messages_it_becomes() -> None:
    rig = Rig(LengthPrefixed(2))
    wire = rig.channel.codec.encode(bytes(10_000)) + rig.channel.codec.encode(bytes(2_000))
    rig.says(Told.DATA, wire[:9_000])
    assert (rig.credit.held(), rig.credit.kept, rig.tally.used) == (0, 9_000, 9_000)
    rig.says(Told.DATA, wire[9_000:] + wire[:1_000])
    assert (rig.credit.held(), rig.credit.kept) == (len(wire) // 2 * 2, 1_000)
    assert [len(message) for message in rig.taken()] == [10_000, 2_000]
    assert (rig.credit.held(), rig.credit.kept, rig.tally.used) == (0, 1_000, 1_000)
    rig.ends(Truncated("cut"))
    assert (rig.credit.kept, rig.tally.used) == (0, 0)


class Bare:
    """A codec of a user's, with the three methods of the protocol and nothing else."""

    def decode(self, data: bytes) -> Iterable[bytes]:
        return (data,)

    def encode(self, message: bytes) -> bytes:
        return message

    def eof(self) -> Iterable[bytes]:
        return ()


def test_a_codec_need_not_say_what_it_holds() -> None:
    rig = Rig(Bare())
    rig.says(Told.DATA, bytes(100))
    assert (rig.credit.held(), rig.credit.kept, rig.tally.used) == (100, 0, 0)
    assert rig.taken() == [bytes(100)]


class Failing(Raw):
    """Raises what it is told to: at once, or when its messages have been looked at."""

    def __init__(self, error: Exception, at_once: bool) -> None:
        super().__init__()
        self.error, self.at_once = error, at_once

    def decode(self, data: bytes) -> Iterable[bytes]:
        if self.at_once:
            raise self.error
        return self._good_ones()

    eof = decode  # type: ignore[assignment]

    def _good_ones(self) -> Iterator[bytes]:
        yield b"good"
        raise self.error


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [bridge.CodecError("bad"), KeyError("worse")])
@pytest.mark.parametrize("when", [Told.DATA, Told.EOF])
def test_a_codec_that_raises_ends_its_session_after_the_good_messages(
    error: Exception, at_once: bool, when: str
) -> None:
    codec = Failing(error, at_once)
    if when == Told.EOF:
        codec.eof = lambda: codec.decode(b"")  # type: ignore[method-assign]
    rig = Rig(codec)
    rig.says(Told.OPEN, INFO)
    rig.says(when, b"data" if when == Told.DATA else None)
    if not at_once:
        assert rig.inbox.get_nowait() == b"good"
    assert rig.credit.held() == 0, "what was read is paid for"
    with pytest.raises(bridge.CodecError) as caught:
        rig.inbox.get_nowait()
    if isinstance(error, KeyError):
        assert caught.value.__cause__ is error and str(caught.value) == "the codec failed: KeyError('worse')"
    else:
        assert str(caught.value) == "bad"
    with pytest.raises(bridge.CodecError):
        rig.outbox.put(b"x", None)
    if when == Told.DATA:
        rig.asks(Ask.SEND)  # whose turn carries out what the batch left
    (command,) = rig.worker.commands
    assert command[0] == "conclude" and isinstance(command[1], bridge.CodecError)
    assert rig.channel.end is command[1]


@pytest.mark.parametrize(
    "buffered", [None, 1.5, -1, property(lambda _: 1 / 0)], ids=lambda lie: type(lie).__name__
)
@pytest.mark.parametrize("kind", [Raw, Bare])
def test_a_codec_that_lies_about_what_it_holds_ends_its_session_and_costs_the_bridge_nothing(
    kind: type, buffered: Any
) -> None:
    rig = Rig(type("Lying", (kind,), {"buffered": buffered})())
    rig.says(Told.OPEN, INFO)
    rig.says(Told.DATA, bytes(5_000))
    rig.says(Told.DATA, bytes(5_000))
    assert isinstance(rig.channel.end, bridge.CodecError)
    rig.ends(Truncated("cut"))
    rig.taken()
    assert (rig.credit.held(), rig.credit.kept, rig.tally.used) == (0, 0, 0)


def test_what_nobody_has_decoded_at_the_end_costs_the_bridge_nothing(rig: Rig) -> None:
    rig.credit.spend(10_000)
    rig.ends(Truncated("cut"))
    assert (rig.credit.held(), rig.tally.used) == (0, 0)


def test_after_the_end_nothing_is_decoded_and_nothing_is_held(rig: Rig) -> None:
    rig.says(Told.EOF)
    rig.says(Told.EOF)
    rig.says(Told.DATA, bytes(5000))
    assert rig.credit.held() == 0 and isinstance(rig.channel.end, EndOfStream)
    with pytest.raises(EndOfStream, match="the peer closed"):
        rig.inbox.get_nowait()
    ending = rig.ends(Truncated("cut"))
    assert isinstance(rig.channel.end, EndOfStream), "the first cause stays"
    assert rig.channel.closed.peek() is ending and rig.closed == [ending]
    assert rig.channel.opened.peek() is ending.cause and rig.channel.handle is None


class Ender(Raw):
    """Has a last word."""

    def eof(self) -> Iterable[bytes]:
        return [b"the last"]


def test_the_clean_end_may_complete_a_message() -> None:
    rig = Rig(Ender())
    rig.says(Told.EOF)
    assert rig.inbox.get_nowait() == b"the last"
    with pytest.raises(EndOfStream):
        rig.inbox.get_nowait()


@pytest.mark.parametrize("opened", [True, False])
def test_a_shared_inbox_hears_of_the_end_of_a_session_that_was_open(opened: bool) -> None:
    shared = Inbox()
    rig = Rig(inbox=shared)
    if opened:
        rig.says(Told.OPEN, INFO)
    rig.ends(Truncated("cut"))
    assert shared.qsize() == opened
    if opened:
        assert shared.get_nowait() == (rig, None)
    assert rig.channel.handle is None


def test_a_handler_that_comes_back_after_the_end_closes_its_session() -> None:
    shared = Inbox()
    rig = Rig(inbox=shared)
    rig.says(Told.OPEN, INFO)
    rig.says(Told.EOF)
    assert shared.get_nowait() == (rig, None)
    assert not rig.worker.commands
    shared.task_done()
    rig.coordinator.step()
    assert rig.worker.commands == [("close", None)]


# ── whose turn it is ──


def test_a_worker_s_batch_is_handled_at_once_after_what_is_queued(rig: Rig) -> None:
    rig.outbox.put(b"a", None)
    rig.says(Told.DATA, b"x")
    assert rig.worker.commands == [("send", [b"a"])] and rig.taken() == [b"x"]
    assert not rig.coordinator.step()


def test_a_batch_that_finds_the_coordinator_at_work_is_queued(rig: Rig) -> None:
    with busy(rig.coordinator):
        rig.says(Told.DATA, b"x")
        assert rig.inbox.empty()
    assert rig.coordinator.step() and rig.taken() == [b"x"]


def test_a_batch_that_fails_does_not_keep_the_coordinator_locked(rig: Rig) -> None:
    def fall(*_: Any) -> None:
        raise KeyboardInterrupt

    rig.coordinator._handlers[Told.EOF] = fall
    with pytest.raises(KeyboardInterrupt):
        rig.says(Told.EOF)
    rig.says(Told.DATA, b"x")
    assert rig.taken() == [b"x"]


def test_a_bug_costs_its_own_session_and_is_logged(rig: Rig) -> None:
    error = ValueError("a bug")

    def fall(channel: Channel) -> None:
        raise error

    rig.channel.on_open = fall
    with capture_logs() as logs:
        rig.says(Told.OPEN, INFO)
    assert [entry["event"] for entry in logs] == ["coordinator.failed"]
    assert logs[0]["session"] == "s" and logs[0]["error"] == "ValueError('a bug')"
    ((method, failure),) = rig.worker.commands
    assert method == "conclude" and isinstance(failure, bridge.SessionAborted)
    assert failure.__cause__ is error and str(failure) == "internal error: ValueError('a bug')"


def test_a_coordinator_sleeps_until_it_is_told_something_and_goes_when_all_is_done(rig: Rig) -> None:
    assert not rig.coordinator.step(0.01)
    thread = threading.Thread(target=rig.coordinator.run)
    thread.start()
    rig.outbox.put(b"a", None)
    rig.coordinator.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive() and rig.worker.commands == [("send", [b"a"])]
    assert not rig.coordinator.step(PATIENCE), "it sleeps no more"


# ── answers ──


def test_an_answer_is_written_by_its_sender_once_for_each_read(rig: Rig) -> None:
    assert rig.channel.answer(b"a") and rig.transport.written == [b"a"]
    assert not rig.transport.answerable and not rig.channel.answer(b"b")
    assert rig.channel.answer(bytes(RECORD_BYTES)), "a large message may always go this way"
    assert not rig.channel.answer(bytes(RECORD_BYTES - 1))
    rig.transport.answerable = True
    assert not rig.channel.answer(b"")
    assert rig.outbox.held() == 0 and not rig.worker.commands and not rig.transport.lock._is_owned()


@pytest.mark.parametrize("hindrance", ["not quiet", "held", "closed", "owned", "taken"])
def test_an_answer_with_something_in_its_way_is_not_taken(rig: Rig, hindrance: str) -> None:
    if hindrance == "not quiet":
        rig.transport.quiet = False
    elif hindrance == "held":
        rig.outbox.hold(1)
    elif hindrance == "closed":
        rig.outbox.close(SessionClosed("done"))
    elif hindrance == "owned":
        rig.transport.lock.acquire()
    elif hindrance == "taken":
        holder = threading.Thread(target=rig.transport.lock.acquire)
        holder.start()
        holder.join()
    assert not rig.channel.answer(b"a") and rig.transport.written == [] and rig.transport.answerable
    assert rig.transport.lock._is_owned() == (hindrance == "owned")


def test_what_the_kernel_did_not_take_of_an_answer_is_held_and_the_worker_told(rig: Rig) -> None:
    rig.transport.takes = 3
    assert rig.channel.answer(b"abcd")
    assert rig.outbox.held() == 1 and rig.worker.commands == [("wake",)]


def test_an_answer_that_meets_the_end_is_held_whole_and_ends_the_session(rig: Rig) -> None:
    failure = rig.transport.failure = Truncated("cut")
    assert rig.channel.answer(b"abcd")
    assert rig.outbox.held() == 4 and rig.worker.commands == [("conclude", failure)]
    assert not rig.transport.lock._is_owned() and not rig.transport.frozen


def test_an_answer_cut_short_by_ctrl_c_ends_the_session(rig: Rig) -> None:
    rig.transport.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rig.channel.answer(b"abcd")
    ((method, cause),) = rig.worker.commands
    assert method == "conclude" and isinstance(cause, bridge.SessionAborted)
    assert rig.transport.frozen and not rig.transport.lock._is_owned()


class InterruptedLock:
    """The interrupt comes when it has just been taken."""

    def __init__(self) -> None:
        self.inner = threading.RLock()

    def acquire(self, blocking: bool) -> bool:
        self.inner.acquire(blocking)
        raise KeyboardInterrupt

    def release(self) -> None:
        self.inner.release()

    def _is_owned(self) -> bool:
        return self.inner._is_owned()  # type: ignore[attr-defined, no-any-return]


def test_ctrl_c_leaves_no_session_locked(rig: Rig) -> None:
    lock: Any = InterruptedLock()
    rig.transport.lock = lock
    with pytest.raises(KeyboardInterrupt):
        rig.channel.answer(b"abcd")
    assert not lock._is_owned() and not rig.transport.written and not rig.worker.commands


def test_room_for_reading_is_told_to_the_worker(rig: Rig) -> None:
    rig.says(Told.DATA, bytes(LIMIT))
    assert rig.credit.room() == 0
    assert rig.taken() == [bytes(LIMIT)]
    assert rig.worker.commands == [("wake",)]
