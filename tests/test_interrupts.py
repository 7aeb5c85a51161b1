"""Ctrl-C in the middle of anything: a handler that raises, at each moment at which Python can run one, one by one.

CPython runs signal handlers on the main thread only, and only as a function is entered, as a call returns, and as a
loop goes round (which no loop here does without a call).  A profile function is called at the same points, and what
it raises is raised there.  Python 3.10 has one point more, the entry of an ``except``, a ``finally`` or the end of a
``with`` that an exception in flight is about to run; a trace function is called there.
"""

from __future__ import annotations

import _thread
import contextlib
import dis
import functools
import gc
import itertools
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from conftest import KeyPair
from dropin_rig import make_client_context, make_server_context
from peers import Background, until
from rig import PATIENCE, Lockstep, begin_close, is_closed, is_open, only, received, shrink, tcp_pair

import bridge
from bridge.crossing import Gate, Latch, Tally, nobody
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.outbox import Outbox
from bridge.stream import Stream

PACKAGE = str(Path(bridge.__file__).parent)
BLOCKS = {dis.opmap[name] for name in ("SETUP_FINALLY", "SETUP_WITH") if sys.version_info < (3, 11)}
"""Of Python 3.10: the instructions that say where an exception goes on, and before which no handler runs."""
JUMPS = {dis.opmap[name] for name in ("POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE", "JUMP_ABSOLUTE") if BLOCKS}
"""Of Python 3.10: behind which a handler may run, if they do jump."""
KINDS = [
    "call",
    pytest.param("call inside OpenSSL", marks=pytest.mark.stress),  # where all moments are alike, and many
    pytest.param("handler", marks=pytest.mark.skipif(not BLOCKS, reason="of Python 3.10 only")),
    pytest.param("jump", marks=pytest.mark.skipif(not BLOCKS, reason="of Python 3.10 only")),
]
"""Of moments."""
INSIDE = {"engine.py", "connection.py", "context.py", "names.py"}
"""Modules that are called from within a call of the transport, and call OpenSSL."""
EARLY = (bridge.OperationTimeout, bridge.WouldBlock, bridge.SessionEnded)
"""What calls may raise here without an interrupt."""


class Interrupt(BaseException):
    """What the signal handler would raise."""


class Moment:
    """While it is entered: the *number*th moment, from 0, at which an interrupt can hit the bridge on this thread."""

    def __init__(self, kind: str, number: int) -> None:
        self.where = ""
        """Where it hit; nothing if there was no such moment."""
        self.lost = False
        """Whether Python dropped it, as it does with what is raised in a finalizer."""
        self._kind = kind
        self._left = number
        self._ahead: int | None = None  # where the jump that comes next leads

    def __enter__(self) -> Moment:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._drop
        self._tracer = sys.gettrace()
        gc.disable()  # whose moments are not always the same
        if self._kind in ("handler", "jump"):
            sys.settrace(self._trace)
        else:
            sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(self._tracer)
        gc.enable()
        sys.unraisablehook = self._hook

    def _drop(self, unraisable: Any) -> None:
        self.lost = isinstance(unraisable.exc_value, Interrupt)
        if not self.lost:
            self._hook(unraisable)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_back is not None and not _is_ours(frame):
            frame = frame.f_back
        if event in ("call", "return", "c_return") and _is_ours(frame):
            inside = Path(frame.f_code.co_filename).name in INSIDE
            if inside == (self._kind == "call inside OpenSSL"):
                self._pass(frame, event)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_ours(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and self._may_be_hit(frame):
            self._pass(frame, self._kind)
        return self._trace

    def _may_be_hit(self, frame: FrameType) -> bool:
        code, here = frame.f_code, frame.f_lasti
        if self._kind == "handler":
            return here in _handlers(code)
        jumped = here == self._ahead
        self._ahead = _jumps(code).get(here)
        return jumped and Path(code.co_filename).name not in INSIDE

    def _pass(self, frame: FrameType, event: str) -> None:
        self._left -= 1
        if self._left == -1:
            code = frame.f_code
            self.where = f"{Path(code.co_filename).name}:{frame.f_lineno}, {code.co_name}, {event}"
            raise Interrupt


class Handled(Moment):
    """While it is entered: that moment, at which a signal handler calls *handle* and returns."""

    def __init__(self, handle: Callable[[], object], number: int) -> None:
        super().__init__("call", number)
        self._handle = handle

    def _pass(self, frame: FrameType, event: str) -> None:
        try:
            super()._pass(frame, event)
        except Interrupt:
            sys.setprofile(None)
            self._handle()


class Reported(Moment):
    """While it is entered: that moment, at which a signal handler raises what some other session has told it."""

    def _pass(self, frame: FrameType, event: str) -> None:
        try:
            super()._pass(frame, event)
        except Interrupt:
            raise bridge.SessionAborted("another one") from None


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


@functools.cache
def _handlers(code: CodeType) -> frozenset[int]:
    """Where exceptions go on in *code* of Python 3.10, and may be met by another."""
    targets = {step.argval for step in dis.get_instructions(code) if step.opcode in BLOCKS}
    return frozenset(target for target in targets if code.co_code[target] not in BLOCKS)


@functools.cache
def _jumps(code: CodeType) -> dict[int, int]:
    """From where (their prefix, if any) to where the jumps in *code* of Python 3.10 lead that a handler may follow."""
    found, begin = {}, 0
    for step in dis.get_instructions(code):
        if step.opcode in JUMPS and code.co_code[step.argval] not in BLOCKS:
            found[begin] = step.argval
        if step.opcode != dis.EXTENDED_ARG:
            begin = step.offset + 2
    return found


class Pair:
    """Two streams of one connection, of which the first is interrupted."""

    def __init__(self, b: bridge.Bridge, contexts: Any, background: Background, small: bool) -> None:
        near, far = map(shrink, socket.socketpair()) if small else tcp_pair()
        self.near = b.stream(near, contexts[0], server_hostname="localhost")
        self.far = b.stream(far, contexts[1])
        self.background = background
        self.readers: list[Any] = []

    def shake_hands(self) -> None:
        """And take the tickets."""
        shaking = self.background.run(self.far.handshake, PATIENCE)
        self.near.handshake(PATIENCE)
        shaking.result(PATIENCE)
        with contextlib.suppress(bridge.WouldBlock):
            self.near.read(1, 0)

    def put_to_sleep(self, threads: int = 1) -> None:
        """Have threads wait in a read of the near end."""
        self.readers = [self.background.run(self.near.read, 1, PATIENCE) for _ in range(threads)]
        while len(self.near._lease._sleepers) < threads:
            assert not any(reader.done() for reader in self.readers)

    def unwrap_far(self) -> None:
        """Until the near end does, too."""

        def unwrap() -> None:
            with contextlib.suppress(*EARLY):
                self.far.unwrap(PATIENCE)[0].close()

        self.background.run(unwrap)

    def check(self) -> None:
        """The near end is of use for whoever comes next: it works or has ended, and can be closed."""
        assert not self.near._lease.mine()
        assert not self.near._writers._is_owned()  # type: ignore[attr-defined]
        self.background.run(self._use).result(3 * PATIENCE)

    def _use(self) -> None:
        near, far = self.near, self.far
        if self.readers and near.end is None:
            with contextlib.suppress(bridge.SessionEnded):
                far.write(b"cd", PATIENCE)
        for reader in self.readers:
            with contextlib.suppress(bridge.SessionEnded):
                reader.result(PATIENCE)
        answering = self.background.run(self._answer)
        if near.end is not None:  # a socket that was handed back to whom was interrupted is there still
            with contextlib.suppress(bridge.SessionEnded):
                near.unwrap(0)[0].close()
        try:
            near.write(b"!", PATIENCE)
            _read_to_mark(near)
        except bridge.SessionEnded:
            pass
        assert near._received.used == sum(map(len, near._received.parts))
        near.close()
        answering.result(PATIENCE)
        far.close()
        for end in (near, far):
            end.gone.wait(PATIENCE, "gone")

    def _answer(self) -> None:
        try:
            _read_to_mark(self.far)
            self.far.write(b"!", PATIENCE)
        except bridge.SessionEnded:
            self.far.close()


def _read_to_mark(stream: Stream) -> None:
    while (data := stream.read(65_536, PATIENCE)) and not data.endswith(b"!"):
        pass


def _peek_and_read(near: Stream) -> None:
    near.peek(2, PATIENCE)
    near.read(3, PATIENCE)
    near.pending()
    near.read(100, 0)


def _fill(near: Stream) -> None:
    while True:
        near.write(bytes(20_000), 0)


def _fill_and_close(near: Stream) -> None:
    with contextlib.suppress(bridge.WouldBlock):
        near.write(bytes(100_000), 0)
    near.close(0.01)


def _read_and_close(near: Stream) -> None:
    for _ in range(2):
        with contextlib.suppress(bridge.SessionEnded):
            near.read(1)
    near.close()


Prepare = Callable[[Pair], object]
SHAKE: Prepare = Pair.shake_hands
CASES: dict[str, tuple[tuple[Prepare, ...], Callable[[Stream], object]]] = {
    "handshake": ((lambda p: p.far.begin(),), lambda near: near.handshake(PATIENCE)),
    "begin": ((lambda p: p.far.begin(),), Stream.begin),
    "read": ((SHAKE, lambda p: p.far.write(b"data")), lambda near: near.read(10)),
    "read in vain": ((SHAKE,), lambda near: near.read(10, 0.001)),
    "read nothing": ((SHAKE,), lambda near: near.read(10, 0)),
    "peek": ((SHAKE, lambda p: p.far.write(b"data" * 10)), _peek_and_read),
    "write": ((SHAKE,), lambda near: near.write(b"x" * 100)),
    "write in time": ((SHAKE,), lambda near: near.write(b"x" * 100, PATIENCE)),
    "write too much": ((SHAKE,), lambda near: near.write(bytes(100_000), 0.001)),
    "write what fits": ((SHAKE,), _fill),
    "read the end": ((SHAKE, lambda p: p.far.close()), _read_and_close),
    "read a reset": ((SHAKE, lambda p: p.far.abort()), _read_and_close),
    "send_eof": ((SHAKE,), lambda near: near.send_eof(PATIENCE)),
    "unwrap": ((SHAKE, Pair.unwrap_far), lambda near: near.unwrap(PATIENCE)[0].close()),
    "unwrap in vain": ((SHAKE,), lambda near: near.unwrap(0.001)),
    "close": ((SHAKE,), Stream.close),
    "close second": ((SHAKE, lambda p: p.far.close()), Stream.close),
    "close with a rest": ((SHAKE,), _fill_and_close),
    "close unbegun": ((), Stream.close),
    "abort": ((SHAKE,), Stream.abort),
    "peek beside a reader": (
        (SHAKE, Pair.put_to_sleep, lambda p: p.far.write(b"ab")),
        lambda near: near.peek(1, 0),
    ),
    "write beside a reader": ((SHAKE, Pair.put_to_sleep), lambda near: near.write(b"x")),
    "close beside readers": ((SHAKE, lambda p: p.put_to_sleep(2)), Stream.close),
}
SMALL = {"write too much", "write what fits", "close with a rest"}
"""Over the smallest buffers."""
MORE_OF_THE_SAME = {"close second", "close with a rest", "read a reset"}
"""Which are worth seconds only under stress."""


@pytest.fixture
def b(background: Background) -> Iterator[bridge.Bridge]:
    """A bridge that can be closed after all that."""
    made = bridge.Bridge(workers=1)
    yield made
    background.run(made.close).result(PATIENCE)


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair) -> tuple[bridge.Context, bridge.Context]:
    """A client's and a server's."""
    version = only("TLSv1.3")
    return (
        bridge.client_context(ca_file, **version),
        bridge.server_context(server_cert.certfile, server_cert.keyfile, **version),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.stress if case in MORE_OF_THE_SAME else ()) for case in CASES],
)
def test_an_interrupt_leaves_nothing_locked_and_nobody_waiting(
    b: bridge.Bridge, contexts: Any, background: Background, case: str, kind: str
) -> None:
    """Whoever calls next is served, or told that the session has ended; it can be closed, and so can its bridge."""
    preparations, call = CASES[case]
    for number in itertools.count():
        pair = Pair(b, contexts, background, case in SMALL)
        for prepare in preparations:
            prepare(pair)
        interrupted = False
        with Moment(kind, number) as moment:
            try:
                call(pair.near)
            except EARLY:
                pass
            except Interrupt:
                interrupted = True
        assert interrupted == (moment.where != "" and not moment.lost), moment.where
        try:
            pair.check()
        except BaseException as error:
            raise AssertionError(f"after an interrupt at {moment.where}") from error
        if not moment.where:
            assert number or kind != "call"
            return


@pytest.mark.parametrize("case", ["read", "write", "write in time"])
def test_a_signal_handler_that_raises_an_error_of_ours_leaves_nothing_locked(
    b: bridge.Bridge, contexts: Any, background: Background, case: str
) -> None:
    preparations, call = CASES[case]
    for number in itertools.count():
        pair = Pair(b, contexts, background, small=False)
        for prepare in preparations:
            prepare(pair)
        with Reported("call", number) as moment, contextlib.suppress(bridge.SessionAborted):
            call(pair.near)
        assert not pair.near._lease.mine(), moment.where
        assert not pair.near._writers._is_owned(), moment.where  # type: ignore[attr-defined]
        for end in (pair.near, pair.far):
            end.close()
        if not moment.where:
            assert number > 10
            return


@pytest.mark.usefixtures("default_bridge")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["recv", "sendall", "close"])
def test_an_interrupted_socket_leaves_no_descriptor_open(
    background: Background, ca_file: str, server_cert: KeyPair, name: str, kind: str
) -> None:
    """The peer sees the end, though nobody closes once more what says that it is closed."""
    contexts = make_client_context("ours", ca_file), make_server_context("theirs", server_cert)
    arguments = {"recv": (10,), "sendall": (b"data",)}.get(name, ())
    for number in itertools.count():
        near, far = tcp_pair()
        served = background.run(_serve, contexts[1], far)
        client = contexts[0].wrap_socket(near, server_hostname="localhost")
        client.settimeout(PATIENCE)
        with Moment(kind, number) as moment, contextlib.suppress(Interrupt):
            getattr(client, name)(*arguments)
        if client.fileno() != -1:
            client.close()
        served.result(PATIENCE)
        if not moment.where:
            return


def _serve(context: Any, sock: socket.socket) -> None:
    """Say something, and read until the end, in TLS and beneath."""
    sock.settimeout(PATIENCE)
    with (
        contextlib.suppress(ConnectionError, ssl.SSLError),
        context.wrap_socket(sock, server_side=True) as tls,
    ):
        tls.sendall(b"data")
        while tls.recv(100):
            pass
        with tls.unwrap() as plain:
            assert plain.recv(1) == b""


# ── what crosses between threads ──
# A `with` that an exception leaves is another matter, in Python 3.10 and 3.14: see `bridge.lease`.


def test_an_interrupted_wait_for_a_latch_leaves_it_open_for_others(background: Background) -> None:
    for number in itertools.count():
        latch: Latch[int] = Latch()
        other = background.run(latch.wait, PATIENCE, "it did not open")
        setter = background.run(lambda held=latch: until(lambda: len(held._gates or ()) == 2) or held.set(1))
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            latch.wait(PATIENCE, "it did not open")
        if len(latch._gates or ()) < 2:
            latch.set(1)
        assert other.result(PATIENCE) == 1 and latch.wait(0, "it is open") == 1, moment.where
        if not moment.where:
            setter.result(PATIENCE)
            assert number > 5
            return
        with contextlib.suppress(AttributeError):
            latch._gates = [Gate(), Gate()]  # so that the setter ends
        setter.result(PATIENCE)


class Crossing:
    """An outbox, and what the coordinator and the owner of the socket do with it."""

    def __init__(self, limit: int) -> None:
        self.words = 0
        self.outbox = Outbox(limit, Tally(limit * 10), self.notify)
        self.left: list[bytes] = []

    def notify(self) -> None:
        self.words += 1

    def carry(self) -> None:
        """Until there is no word any more."""
        while self.words:
            self.words = 0
            taken = self.outbox.take()
            self.left += taken
            self.outbox.give_back(sum(map(len, taken)))


@pytest.mark.parametrize("full", [False, True], ids=["with room", "without"])
def test_an_interrupted_send_is_whole_or_nothing_and_the_next_one_leaves(full: bool) -> None:
    """And whoever flushes is told."""
    for number in itertools.count():
        crossing = Crossing(100)
        outbox = crossing.outbox
        if full:
            outbox.put(bytes(100), None)
        with Moment("call", number) as moment, contextlib.suppress(Interrupt, bridge.SendTimeout):
            outbox.put(b"interrupted", 0.001 if full else None)
        assert not outbox._lock._is_owned() and not outbox._waiting, moment.where
        crossing.carry()
        outbox.put(b"next", 0)
        crossing.carry()
        outbox.flush(0)
        assert outbox.held() == 0, moment.where
        messages = [message for message in crossing.left if message != bytes(100)]
        assert messages in ([b"next"], [b"interrupted", b"next"]), moment.where
        if not moment.where:
            assert number > 5
            return


def test_an_interrupted_flush_raises_just_that_and_leaves_nothing() -> None:
    for number in itertools.count():
        crossing = Crossing(100)
        outbox = crossing.outbox
        outbox.put(b"stuck", None)
        with Moment("call", number) as moment, contextlib.suppress(Interrupt, bridge.OperationTimeout):
            outbox.flush(0.001)
        assert not outbox._lock._is_owned(), moment.where
        crossing.carry()
        assert not outbox._flushing, moment.where
        if not moment.where:
            assert number > 5
            return


def test_an_interrupted_receiver_wakes_the_next(background: Background) -> None:
    for number in itertools.count():
        inbox = Inbox()
        with Moment("call", number) as moment, contextlib.suppress(Interrupt, bridge.ReceiveTimeout):
            inbox.get(timeout=0.001)
        assert not inbox._lock._is_owned() and not inbox._sleepers, moment.where
        inbox.put((None, "next"))
        assert background.run(inbox.get).result(PATIENCE) == (None, "next")
        if not moment.where:
            assert number > 5
            return


def test_what_an_interrupted_receiver_was_woken_for_wakes_the_next(background: Background) -> None:
    for number in itertools.count():
        inbox, over = Inbox(), threading.Event()

        def feed(inbox: Inbox = inbox, over: threading.Event = over) -> Any:
            until(lambda: inbox._sleepers or over.is_set())
            other = background.run(inbox.get, True, PATIENCE)
            until(lambda: len(inbox._sleepers) == 2 or over.is_set())
            inbox.put((None, "message"))
            return other

        feeding, taken = background.run(feed), None
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            taken = inbox.get(timeout=PATIENCE)
        over.set()
        other = feeding.result(PATIENCE)
        if taken is None:  # then nobody else need come for the other one to have it
            until(lambda other=other, inbox=inbox: other.done() or not inbox.qsize())  # type: ignore[misc]
        inbox.put((None, "next"))
        assert other.result(PATIENCE)[1] in ("message", "next"), moment.where
        if not moment.where:
            assert number > 10
            return


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_interrupted_put_is_whole_or_nothing_and_the_inbox_comes_to_its_end(before: int) -> None:
    for number in itertools.count():
        inbox, taken = Inbox(), []
        for index in range(before):
            inbox.put(("session", index))
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            inbox.put(("session", before))
        inbox.put(("session", "last"))
        inbox.shutdown()
        while inbox.qsize() > 0:
            taken.append(inbox.get(timeout=0)[1])
        with pytest.raises(bridge.ShutDown):
            inbox.get(timeout=0)
        assert taken[:before] == list(range(before)) and taken[-1] == "last", moment.where
        if not moment.where:
            assert number > 5
            return


@pytest.mark.parametrize("call", ["put", "task_done"])
def test_whoever_sleeps_is_woken_for_what_an_interrupted_call_has_made_ready(
    call: str, background: Background
) -> None:
    for number in itertools.count():
        inbox = Inbox()
        if call == "task_done":
            inbox.put(("session", 1))
            inbox.put(("session", 2))
            inbox.get()
        other = background.run(inbox.get, True, PATIENCE)
        until(lambda inbox=inbox: inbox._sleepers)  # type: ignore[misc]
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            if call == "task_done":
                inbox.task_done()
            else:
                inbox.put(("session", 2))
        if inbox._entries:
            assert other.result(PATIENCE) == ("session", 2), moment.where
        elif not other.done() and not inbox._called:
            inbox.task_done()
            inbox.put(("another", 2))
        other.result(PATIENCE)
        if not moment.where:
            assert number > 5
            return


class _Interrupting(tuple):  # type: ignore[type-arg]
    """As it is unpacked Ctrl-C comes, which Python sees to at the next moment at which it may."""

    __iter__ = functools.partial(  # type: ignore[assignment]
        itertools.chain, (("session", 1), None, 0), map(_thread.interrupt_main, [signal.SIGINT])
    )


@pytest.mark.skipif(not BLOCKS, reason="of Python 3.10 only")
def test_a_message_leaves_with_its_turn_or_not_at_all() -> None:
    """Where signal handlers are run also as a jump is taken."""
    inbox = Inbox()
    inbox.put(("session", 1))
    inbox.put(("session", 2))
    inbox._entries[0] = _Interrupting((("session", 1), None, 0, None))  # type: ignore[call-overload]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            inbox.get(timeout=0)
    finally:
        signal.signal(signal.SIGINT, before)
    if inbox.qsize() == 2:
        inbox._entries[0] = (("session", 1), None, 0, None)
        assert inbox.get(timeout=0) == ("session", 1)
    assert inbox.get(timeout=0) == ("session", 2)
    inbox.task_done()
    assert not inbox._behind and not inbox.qsize()


@pytest.mark.parametrize("receive", [SessionInbox.get, SessionInbox.peek], ids=["get", "peek"])
def test_what_an_interrupted_receiver_was_woken_for_beside_its_socket_wakes_the_next(
    receive: Callable[..., Any], background: Background
) -> None:
    for number in itertools.count():
        inbox, bed = SessionInbox(), Gate()
        others: list[Any] = []

        def attend(inbox: Any, timeout: Any, _: Any, bed: Gate = bed, others: list[Any] = others) -> bool:
            inbox.attend = None
            try:
                inbox.lie_down(bed)
                others.append(background.run(inbox.get, True, PATIENCE))
                until(lambda: inbox._sleepers)
                inbox._deliver(None, [b"message"], None, 0, 0)
            finally:
                inbox.get_up()
            return True

        inbox.attend = attend
        taken = None
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            taken = receive(inbox, timeout=PATIENCE)
        assert not inbox._lock._is_owned(), moment.where
        for other in others:
            if inbox.empty() and not other.done():  # lost with the interrupt, or taken
                inbox._deliver(None, [b"message"], None, 0, 0)
            assert other.result(PATIENCE) == b"message", moment.where
        if not moment.where:
            assert number > 10 and taken == b"message"
            return


def test_a_signal_handler_may_not_wait_for_what_it_interrupts_and_may_do_what_does_not_wait() -> None:
    crossing, inbox = Crossing(10), Inbox()
    with crossing.outbox._lock:
        crossing.outbox.put(b"whatever", None)
        with pytest.raises(RuntimeError, match="may not wait for what it has interrupted"):
            crossing.outbox.put(b"too much now", None)
        crossing.outbox.close(bridge.SessionAborted("by the handler"))
    with inbox._lock:
        inbox.put((None, "here"))
        assert inbox.get() == (None, "here")
        with pytest.raises(RuntimeError, match="may not wait for what it has interrupted"):
            inbox.get()
    assert not crossing.outbox._lock._is_owned() and not inbox._lock._is_owned()


def test_the_close_of_a_bridge_that_is_interrupted_is_finished_all_the_same(
    contexts: Any, background: Background
) -> None:
    """Or had not begun: whoever closes it again waits for the end, and nobody waits for messages any more."""
    for number in itertools.count():
        b, shared = bridge.Bridge(workers=2), Inbox()
        b.listen(("127.0.0.1", 0), contexts[1], inbox=shared)
        handlers = [background.run(shared.get, True, PATIENCE) for _ in range(2)]
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            b.close()
        if b.closed:
            for handler in handlers:
                assert isinstance(handler.exception(PATIENCE), bridge.ShutDown), moment.where
        b.close()
        assert not any(thread.is_alive() for thread in b._crew.threads), moment.where
        assert all(isinstance(handler.exception(PATIENCE), bridge.ShutDown) for handler in handlers)
        if not moment.where:
            return


@pytest.mark.parametrize("by", ["a signal handler", "another thread"])
def test_a_bridge_that_is_closed_twice_at_once_lets_go_of_its_inboxes_once(
    contexts: Any, background: Background, by: str
) -> None:
    """Or the handlers of another Bridge were told that all is over."""

    def elsewhere(call: Callable[[], object]) -> None:
        background.run(call).result(PATIENCE)

    for number in itertools.count():
        with Lockstep() as rig:
            b, shared = rig.bridge(), Inbox()
            shared._attach("another Bridge")
            b.listen(("127.0.0.1", 0), contexts[1], inbox=shared)

            close = b.close if by == "a signal handler" else functools.partial(elsewhere, b.close)
            with Handled(close, number) as moment:
                b.close()
            assert shared._feeders == {"another Bridge"}, moment.where
            if not moment.where:
                assert number > 10
                return
            del b, close, moment  # whose end has moments, too


# ── what is counted ──


def met(rig: Lockstep, contexts: Any, **options: Any) -> tuple[bridge.Session, bridge.Session]:
    """A client's session, and a server's with *options*."""
    near, far = rig.tcp_pair()
    client, server = rig.session(contexts[0], near), rig.session(contexts[1], far, **options)
    rig.until(lambda: is_open(client) and is_open(server))
    rig.settle()
    return client, server


def part(rig: Lockstep) -> None:
    """All sessions end, and are forgotten."""
    for number in range(len(rig.sessions)):
        begin_close(rig.sessions[number])
    rig.until(lambda: all(map(is_closed, rig.sessions)))
    rig.sessions.clear()
    gc.collect()
    rig.settle()


@pytest.mark.parametrize("shared", [False, True], ids=["session", "shared"])
def test_an_interrupted_receiver_gives_the_room_of_what_it_has_taken_back(
    contexts: Any, shared: bool
) -> None:
    """Or the session would never read again."""
    for number in itertools.count():
        with Lockstep() as rig:
            inbox = Inbox() if shared else None
            limits = bridge.Limits(inbox_bytes=20_000)
            client, server = met(rig, contexts, inbox=inbox, limits=limits)
            taken: list[Any] = []

            def take(inbox: Any = inbox or server, taken: list[Any] = taken) -> None:
                taken.append(inbox.get(timeout=0) if shared else inbox.recv(0))

            for _ in range(4):
                client.send(bytes(16_000))
            rig.settle()
            take()
            with Moment("call", number) as moment, contextlib.suppress(Interrupt):
                take()  # after which there is room to read on
            for _ in range(20):
                rig.settle()
                with contextlib.suppress(bridge.ReceiveTimeout):
                    take()
            size = sum(len(message[1] if shared else message) for message in taken)
            assert size in (48_000, 64_000), moment.where
            assert server._channel.credit.held() == 0 and client.outbox.empty(), moment.where
        if not moment.where:
            assert number > 10
            return


def test_a_handler_that_is_interrupted_as_it_comes_back_has_ended_its_session(contexts: Any) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            inbox = Inbox()
            client, server = met(rig, contexts, inbox=inbox)
            client.send_eof()
            rig.until(lambda: inbox.qsize() == 1)  # noqa: B023
            assert inbox.get_nowait() == (server, None)
            with Moment("call", number) as moment, contextlib.suppress(Interrupt, bridge.ReceiveTimeout):
                inbox.get_nowait()
            with contextlib.suppress(bridge.ReceiveTimeout):
                inbox.get_nowait()
            rig.until(lambda: is_closed(server))  # noqa: B023
        if not moment.where:
            assert number > 10
            return


@pytest.mark.parametrize("size", [8_000, 300_000])
def test_an_interrupted_send_leaves_the_bridge_nothing_to_count(contexts: Any, size: int) -> None:
    for number in itertools.count():
        with Lockstep() as rig:
            client, server = met(rig, contexts)
            client._channel.transport.answerable = size > 100_000
            with Moment("call", number) as moment, contextlib.suppress(Interrupt):
                client.send(bytes(size), timeout=0)
            rig.actors.append(lambda server=server: list(received(server)))  # type: ignore[misc]
            rig.settle()
            outbox = client._channel.outbox
            del client
            rig.actors.clear()
            part(rig)
            assert not outbox.held() and not rig.bridges[0]._outbox_tally.used, moment.where
        if not moment.where:
            assert number > 20
            return


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what was made and could not be handed over
def test_an_interrupted_adopt_takes_no_place_for_good(contexts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `Limits.sessions`."""
    monkeypatch.setattr(bridge.bridge, "take_over", lambda sock: sock)  # it is but a number, for a moment
    for number in itertools.count():
        with Lockstep() as rig:
            b = rig.bridge(limits=bridge.Limits(sessions=1))
            near, far = rig.tcp_pair()
            with Moment("call", number) as moment, contextlib.suppress(Interrupt):
                b.adopt(near, contexts[0], server_hostname="localhost", wait=False)
            far.close()
            gc.collect()
            rig.settle()
            near, far = rig.tcp_pair()
            rig.sessions.append(b.adopt(near, contexts[0], server_hostname="localhost", wait=False))
            part(rig)
        if not moment.where:
            assert number > 50
            return


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a listener that was interrupted
def test_a_handler_learns_that_all_is_over_though_the_call_that_fed_its_inbox_was_interrupted(
    contexts: Any, background: Background
) -> None:
    for number in itertools.count():
        b, shared = bridge.Bridge(workers=1), Inbox()
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            b.listen(("127.0.0.1", 0), contexts[1], inbox=shared)
        b.listen(("127.0.0.1", 0), contexts[1], inbox=shared)
        handler = background.run(shared.get, True, PATIENCE)
        b.close()
        assert isinstance(handler.exception(PATIENCE), bridge.ShutDown), moment.where
        if not moment.where:
            return


def test_an_interrupted_word_of_what_a_codec_holds_is_given_or_is_not() -> None:
    for number in itertools.count():
        tally = Tally(1_000_000)
        credit = ReadCredit(100_000, tally, nobody, SessionInbox())
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            credit.keep(50_000)
        assert tally.used == credit.kept, moment.where
        if not moment.where:
            return


@pytest.mark.parametrize("kind", [Inbox, SessionInbox])
def test_an_interrupt_keeps_no_room_of_the_whole_bridge(kind: type[Inbox]) -> None:
    """Which the last message had, that has left."""
    for number in itertools.count():
        inbox, tally = kind(), Tally(1_000_000)
        credit = ReadCredit(100_000, tally, nobody, inbox)
        credit.spend(50_000)
        inbox._deliver("session", [bytes(50_000)], credit, 50_000, 50_000)
        credit.conclude()  # and nothing that comes later looks again
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            inbox.get(timeout=0)
        while inbox.qsize():
            inbox.get(timeout=0)
        assert tally.used == credit.held() == 0, moment.where
        if not moment.where:
            return


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what was made and could not be handed over
def test_a_bridge_whose_making_is_interrupted_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd", raising=False)  # of which Python has but a number, for a moment
    before = set(threading.enumerate())
    for number in itertools.count():
        with Moment("call", number) as moment, contextlib.suppress(Interrupt):
            bridge.Bridge(workers=2).close()
        gc.collect()
        until(lambda: set(threading.enumerate()) <= before)
        if not moment.where:
            return
