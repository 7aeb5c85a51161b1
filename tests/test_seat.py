"""A handler of a shared inbox as a guest in its worker's seat.  `test_protocol_model` has every interleaving of it."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import ssl
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from conftest import KeyPair
from peers import PATIENCE, Background, dial, until

import bridge
from bridge import inbox, seat
from bridge.crossing import Gate
from bridge.threads import before_waiting, serving_all

SOON = 0.05
BEFORE = seat.STEADY + 2
"""Answers after which a handler has a seat."""


class Noted(bridge.codecs.Lines):
    """Notes on whose thread it decodes."""

    threads: list[int]

    def decode(self, data: bytes) -> Any:
        self.threads.append(threading.get_ident())
        return super().decode(data)


class Served:
    """A bridge, whose sessions' lines come to one inbox."""

    def __init__(self, cert: KeyPair, ca_file: str, workers: int = 1) -> None:
        self.noted = type("Noted", (Noted,), {"threads": []})
        self.bridge = bridge.Bridge(workers=workers)
        self.inbox = bridge.Inbox()
        self.context = bridge.server_context(cert.certfile, cert.keyfile)
        self.listener = self.bridge.listen(("127.0.0.1", 0), self.context, codec=self.noted, inbox=self.inbox)
        self.seat = self.bridge._workers[0].seat
        self._context = ssl.create_default_context(cafile=ca_file)

    def dial(self) -> ssl.SSLSocket:
        """One more client, shaken hands with."""
        sock = dial(self.listener.address)
        sock.settimeout(PATIENCE)
        return self._context.wrap_socket(sock, server_hostname="localhost")

    def handler(self, background: Background) -> tuple[Future[int], list[int]]:
        """A thread that answers each line until the inbox is over: how many; and whose thread it is."""
        idents: list[int] = []

        def answer() -> int:
            idents.append(threading.get_ident())
            count = 0
            for session, line in iter(self.get, None):
                count += line is not None
                if line is not None:
                    session.send(line)
            return count

        return background.run(answer), idents

    def get(self) -> Any:
        """The next message; None after the end."""
        try:
            return self.inbox.get(timeout=PATIENCE)
        except bridge.ShutDown:
            return None

    def sits(self) -> bool:
        """Whether a guest does."""
        return self.seat._open and self.seat._lock.locked()

    def settled(self) -> bool:
        """Whether the worker has left the seat, or sleeps in it."""
        return (self.seat._open and not self.seat._lock.locked()) or self.bridge._workers[0].asleep()

    def seated(self, client: ssl.SSLSocket) -> None:
        """Its handler answers *client* until it is a guest, asleep."""
        for _ in range(BEFORE):
            assert ask(client, b"more") == b"more"
        until(self.sits)


def ask(client: ssl.SSLSocket, line: bytes) -> bytes:
    client.sendall(line + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        answer += client.recv(100)
    return answer[:-1]


@pytest.fixture
def served(server_cert: KeyPair, ca_file: str, background: Background) -> Iterator[Served]:
    """Closed before its handlers are waited for."""
    made = Served(server_cert, ca_file)
    with made.bridge:
        yield made


@pytest.fixture
def hospitable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is back within the time that a test may take is back quickly."""
    monkeypatch.setattr(inbox, "QUICK", 3 * PATIENCE)
    monkeypatch.setattr(seat, "QUICK", 3 * PATIENCE)


def test_a_handler_that_is_back_quickly_reads_for_itself(
    served: Served, background: Background, hospitable: None
) -> None:
    handling, idents = served.handler(background)
    with served.dial() as client:
        served.seated(client)
        served.noted.threads.clear()
        for _ in range(5):
            assert ask(client, b"more") == b"more"
        assert served.noted.threads == idents * 5
    served.bridge.close()
    assert handling.result(PATIENCE) == BEFORE + 5


def test_the_main_thread_is_no_guest(served: Served, background: Background, hospitable: None) -> None:
    """A signal handler may raise there, in the middle of a step."""
    with served.dial() as client:
        asking = background.run(lambda: [ask(client, b"more") for _ in range(2 * BEFORE)])
        for _ in range(2 * BEFORE):
            session, line = served.get()
            session.send(line)
            assert not served.sits()
        asking.result(PATIENCE)
    assert threading.get_ident() not in served.noted.threads


def test_one_who_has_been_away_for_long_is_no_guest(served: Served, background: Background) -> None:
    def slow() -> None:
        for _ in range(BEFORE):
            session, line = served.get()
            session.send(line)
        until(lambda: seat.time.monotonic() - served.inbox._handler.turn._since > seat.QUICK)
        served.get()

    handling = background.run(slow)
    with served.dial() as client:
        for _ in range(BEFORE):
            assert ask(client, b"1") == b"1"
        until(lambda: served.inbox._sleepers)
        assert type(served.inbox._sleepers[0]) is seat.Gate
        client.sendall(b"2\n")
        handling.result(PATIENCE)


@pytest.mark.parametrize("ends", [False, True], ids=["takes his time", "ends"])
def test_the_worker_sits_down_again_when_its_guest_does_not_come_back(
    ends: bool, served: Served, background: Background, hospitable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def handle_until_last() -> None:
        for session, line in iter(served.get, None):
            session.send(line)
            if line == "last":
                assert ends or let_go.wait(PATIENCE)
                return

    handling = background.run(handle_until_last)
    with served.dial() as client, served.dial() as other:
        served.seated(client)
        monkeypatch.setattr(seat, "QUICK", 0.0)  # it is soon enough that the worker has lost its patience
        assert ask(client, b"last") == b"last"
        served.handler(background)
        assert ask(other, b"?") == b"?"
        let_go.set()
        handling.result(PATIENCE)


def test_a_client_that_comes_while_a_guest_sits_is_welcome(
    served: Served, background: Background, hospitable: None
) -> None:
    served.handler(background)
    with served.dial() as client:
        served.seated(client)
        with served.dial() as another:
            assert ask(another, b"hello") == b"hello"


def test_a_word_from_another_thread_wakes_a_guest(
    served: Served, background: Background, hospitable: None
) -> None:
    found: list[Any] = []

    def handle() -> None:
        for session, line in iter(served.get, None):
            if session is None:
                found.append(line)
            else:
                session.send(line)

    background.run(handle)
    with served.dial() as client:
        served.seated(client)
        for number in range(3):
            served.inbox.put((None, number))
            until(lambda number=number: found[-1:] == [number])
            until(served.sits)  # he sits down again
        assert found == [0, 1, 2]


def test_a_guest_waits_no_longer_than_he_wants(
    served: Served, background: Background, hospitable: None
) -> None:
    def handle() -> None:
        session, line = served.get()
        while True:
            session.send(line)
            try:
                session, line = served.inbox.get(timeout=SOON)
            except bridge.ReceiveTimeout:
                return

    handling = background.run(handle)
    with served.dial() as client:
        for _ in range(BEFORE):
            assert ask(client, b"1") == b"1"
        handling.result(PATIENCE)
        served.handler(background)
        seat.QUICK = 0.0  # of the fixture's
        assert ask(client, b"2") == b"2"


def test_a_handler_of_two_workers_messages_sits_nowhere(
    server_cert: KeyPair, ca_file: str, background: Background, hospitable: None
) -> None:
    """Wherever he sat, the other one's messages would come for him."""
    served = Served(server_cert, ca_file, workers=2)
    with served.bridge:
        _, idents = served.handler(background)
        with served.dial() as one, served.dial() as other:
            for client in (one, other) * 3:
                for _ in range(seat.STEADY // 2):
                    assert ask(client, b"more") == b"more"
        assert idents[0] not in served.noted.threads


@pytest.mark.parametrize("where", ["another inbox", "a session"])
def test_a_handler_that_waits_for_something_else_gives_up_the_seat_that_is_kept_for_it(
    where: str, served: Served, background: Background, hospitable: None, ca_file: str
) -> None:
    quiet = served.bridge.listen(("127.0.0.1", 0), served.context)
    held = served.bridge.connect(quiet.address, bridge.client_context(ca_file), server_hostname="localhost")
    other = bridge.Inbox()

    def handle() -> None:
        for session, line in iter(served.get, None):
            session.send(line)
            if line == "wait":
                with contextlib.suppress(bridge.ShutDown):
                    other.get(timeout=PATIENCE) if where == "another inbox" else held.recv(PATIENCE)
                return

    handling = background.run(handle)
    with served.dial() as client, served.dial() as another:
        served.seated(client)
        assert ask(client, b"wait") == b"wait"
        served.handler(background)
        assert ask(another, b"?") == b"?"
        other.shutdown()
        held.abort()
        handling.result(PATIENCE)


def test_a_word_does_not_wait_for_the_codec_that_a_guest_is_in(
    served: Served, background: Background, hospitable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_there, let_go = threading.Event(), threading.Event()
    found: list[Any] = []

    def decode(self: Any, data: bytes) -> Any:
        in_there.set()
        assert let_go.wait(PATIENCE)
        return Noted.decode(self, data)

    def take_a_word() -> None:
        found.append(served.get())

    served.handler(background)
    with served.dial() as client:
        served.seated(client)
        taking = background.run(take_a_word)
        until(lambda: len(served.inbox._sleepers) == 2)
        monkeypatch.setattr(served.noted, "decode", decode)
        client.sendall(b"slow\n")
        assert in_there.wait(PATIENCE)
        served.inbox.put((None, "a word"))
        taking.result(PATIENCE / 2)
        assert found == [(None, "a word")]
        let_go.set()


def test_of_what_a_guest_s_step_brings_the_first_is_his_and_the_rest_is_for_others() -> None:
    class Host:
        def step_in(self, timeout: float | None) -> bool:
            raise AssertionError("nobody sits down here")

        def ring(self) -> None:
            pass

        def asleep(self) -> bool:
            return False

    one = seat.Seat(Host())
    one._open = True
    one._lock.release()
    box, bed, guest = bridge.Inbox(), seat.Gate(), one.place()
    box._sleepers += [guest, bed]
    box._deliver(None, ["first"], None, 0, 0)
    assert box._called is guest and list(box._sleepers) == [bed]
    box._deliver(None, ["second"], None, 0, 0)
    assert box._called is bed and not box._sleepers


def test_a_thread_that_serves_all_is_no_thread_of_every_bridge(served: Served) -> None:
    """A signal handler may come in the middle of a `send`, which serves all for a moment."""
    with serving_all(), pytest.raises(bridge.ConfigurationError):
        served.bridge.close()


@pytest.mark.parametrize("how", ["bridge", "inbox"])
def test_what_ends_while_a_guest_sits_lets_him_go(
    how: str, served: Served, background: Background, hospitable: None
) -> None:
    handling, _ = served.handler(background)
    with served.dial() as client:
        served.seated(client)
        if how == "bridge":
            served.bridge.close(SOON)
        else:
            served.inbox.shutdown()
        assert handling.result(PATIENCE) == BEFORE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_guest_s_step_is_the_worker_s(
    served: Served, background: Background, hospitable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: object) -> None:
        raise ValueError("a bug")

    handling, _ = served.handler(background)
    with served.dial() as client:
        served.seated(client)
        monkeypatch.setattr(served.bridge._workers[0], "_line_up", buggy)
        client.sendall(b"what now?\n")
        assert handling.result(PATIENCE) == BEFORE, "the inbox is over"
        until(lambda: not served.bridge._crew.serves())


def test_a_codec_may_not_close_the_bridge_in_a_guest_s_step_either(
    served: Served, background: Background, hospitable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[BaseException] = []

    def decode(self: Any, data: bytes) -> Any:
        served.noted.threads.append(threading.get_ident())
        try:
            served.bridge.close()
        except RuntimeError as error:
            refused.append(error)
        served.listener.close()  # and that does not wait here
        return bridge.codecs.Lines.decode(self, data)

    _, idents = served.handler(background)
    with served.dial() as client:
        served.seated(client)
        monkeypatch.setattr(served.noted, "decode", decode)
        assert ask(client, b"more") == b"more"
        assert served.noted.threads[-1] == idents[0]
        assert "by a thread of the Bridge itself" in str(refused[0])


def test_what_a_handler_has_in_its_context_is_not_the_worker_s(
    served: Served, background: Background, hospitable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = contextvars.ContextVar[str]("request", default="none")
    seen: list[tuple[int, str]] = []

    def decode(self: Any, data: bytes) -> Any:
        seen.append((threading.get_ident(), request.get()))
        return Noted.decode(self, data)

    def answer() -> int:
        request.set("mine")
        for session, line in iter(served.get, None):
            assert request.get() == "mine"
            session.send(line)
        return threading.get_ident()

    handling = background.run(answer)
    with served.dial() as client:
        served.seated(client)
        monkeypatch.setattr(served.noted, "decode", decode)
        assert ask(client, b"more") == b"more"
        served.inbox.shutdown()
        assert seen == [(handling.result(PATIENCE), "none")]


def test_a_handler_that_recurses_too_deep_fails_alone(
    served: Served, background: Background, hospitable: None
) -> None:
    """Were it a guest, a step would be what fills its stack, and the worker's failure."""
    answered = 0

    def answer() -> None:
        nonlocal answered
        session, line = served.get()
        session.send(line)
        answered += 1
        answer()

    recursing = background.run(answer)
    with served.dial() as client, served.dial() as another:
        with contextlib.suppress(OSError):  # whose answer is in its hands then
            while ask(client, b"more") == b"more":
                pass
        with pytest.raises(RecursionError):
            recursing.result(PATIENCE)
        assert answered > sys.getrecursionlimit() // 2
        served.handler(background)
        assert ask(another, b"?") == b"?" and not served.bridge.closed


def test_who_takes_turns_at_two_inboxes_keeps_one_seat(
    served: Served, background: Background, hospitable: None, server_cert: KeyPair, ca_file: str
) -> None:
    other = Served(server_cert, ca_file)

    def answer() -> None:
        for one in itertools.cycle((served, other)):
            if (taken := one.get()) is None:
                return before_waiting()
            taken[0].send(taken[1])
            one.inbox.task_done()
            until(one.settled)  # or the seat is kept for him only after he has gone on, and that for a minute

    handling = background.run(answer)
    with other.bridge, served.dial() as client, other.dial() as another:
        for _ in range(3 * BEFORE):
            assert ask(client, b"more") == ask(another, b"more") == b"more"
        assert ask(client, b"more") == b"more"
        until(lambda: not served.seat._open)  # and its worker reads
        assert ask(another, b"more") == b"more"
        served.inbox.shutdown()
        other.inbox.shutdown()
        handling.result(PATIENCE)


def test_whose_stack_is_nearly_full_is_no_guest(served: Served, background: Background) -> None:
    def deep() -> Any:
        try:
            return deep()
        except RecursionError:
            return type(served.seat.place())

    assert background.run(deep).result(PATIENCE) is Gate
    assert background.run(lambda: type(served.seat.place())).result(PATIENCE) is not Gate
