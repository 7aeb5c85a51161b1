"""From birth to burial: bridges, sessions, threads, descriptors, processes, and what happens to the forgotten."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import KeyPair
from peers import until
from rig import Lockstep, tcp_pair
from structlog.testing import capture_logs

import bridge
from bridge import addresses
from bridge.crossing import Latch

PATIENCE = 30.0
ROOT = str(Path(bridge.__file__).parents[1])
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="signals between processes are POSIX's")


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


class StdlibServer:
    """The stdlib's server for one client at a time: what it receives, it keeps, and it notes how that ended."""

    def __init__(self, cert: KeyPair) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(cert.certfile, cert.keyfile)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()

    def serve(self, greeting: bytes = b"", read: bool = True) -> tuple[bytes, str]:
        """One client, until it ends.  What it sent, and "clean" or the name of the error."""
        self.listener.settimeout(PATIENCE)
        raw = self.listener.accept()[0]
        raw.settimeout(PATIENCE)
        with self.context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=False) as sock:
            sock.sendall(greeting)
            received = b""
            try:
                while data := sock.recv(65536):
                    received += data
            except OSError as error:
                return received, type(error).__name__
            with contextlib.suppress(OSError):
                sock.unwrap()
            return received, "clean"


@pytest.fixture
def server(server_cert: KeyPair) -> Iterator[StdlibServer]:
    made = StdlibServer(server_cert)
    with made.listener:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


def threads_of_bridges() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bridge-")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")

# ── Bridge.close ──


@needs_proc
def test_closing_a_bridge_ends_every_thread_and_descriptor(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    before = descriptors()
    b = bridge.Bridge(workers=3)
    assert sorted(threads_of_bridges()) == [
        "bridge-coordinator",
        "bridge-worker-0",
        "bridge-worker-1",
        "bridge-worker-2",
    ]
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    sessions = [b.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(10)]
    mute = socket.create_connection(listener.address)
    accepted = [listener.accept(PATIENCE) for _ in range(8)]
    until(lambda: listener._accepted.qsize() == 2)  # two are left waiting
    b.close()
    assert threads_of_bridges() == []
    mute.close()
    assert descriptors() == before
    assert b.snapshot().sessions == ()
    for session in (*sessions, *accepted):
        assert session.state == "closed" and isinstance(session.end, bridge.SessionEnded)
        assert session.close().close_notify_sent
        session.abort()
    b.close()


def test_closing_a_bridge_wakes_everybody_who_waits(
    server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    b = bridge.Bridge(workers=1)
    shared = bridge.Inbox()
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    session = b.connect(listener.address, client_ctx, server_hostname="localhost")
    peer = listener.accept(PATIENCE)
    waiting = {
        "recv": pool.submit(session.recv),
        "peek": pool.submit(peer.peek),
        "accept": pool.submit(listener.accept),
        "get": pool.submit(shared.get),
    }
    b.close()
    errors = {name: future.exception(PATIENCE) for name, future in waiting.items()}
    assert all(isinstance(error, bridge.ShutDown) for error in errors.values()), errors
    assert isinstance(errors["recv"], bridge.SessionClosed)


def test_closing_a_bridge_carries_out_what_was_sent(
    server: StdlibServer, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    message = bytes(2_000_000)
    with bridge.Bridge(workers=1) as b:
        served = pool.submit(server.serve)
        session = b.connect(server.address, client_ctx, server_hostname="localhost")
        session.send(message)
    assert served.result(PATIENCE) == (message, "clean")


def test_a_session_has_left_before_anybody_hears_that_it_is_over(
    server: StdlibServer, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    """So whoever has closed one may open another at once, where only so many are allowed."""

    class Watched(Latch[Any]):
        def set(self, value: Any) -> None:
            left.append((b.snapshot().sessions, sum(b.totals().endings.values())))
            super().set(value)

    left: list[Any] = []
    served = pool.submit(server.serve)
    with bridge.Bridge(workers=1) as b:
        session = b.connect(server.address, client_ctx, server_hostname="localhost")
        session._channel.closed = Watched()
        assert session.close()
    assert left == [((), 1)]
    assert served.result(PATIENCE) == (b"", "clean")


def test_a_bridge_is_closed_once_however_many_threads_close_it(
    server: StdlibServer, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    b = bridge.Bridge(workers=1)
    served = pool.submit(server.serve)
    session = b.connect(server.address, client_ctx, server_hostname="localhost")
    barrier = threading.Barrier(8)

    def close() -> list[str]:
        barrier.wait(PATIENCE)
        b.close()
        return threads_of_bridges()

    with ThreadPoolExecutor(8) as closers:
        assert [future.result(PATIENCE) for future in [closers.submit(close) for _ in range(8)]] == [[]] * 8
    assert served.result(PATIENCE) == (b"", "clean")
    assert isinstance(session.end, bridge.SessionClosed)


def test_a_connect_that_meets_the_end_of_its_bridge_does_not_wait_for_ever(
    server: StdlibServer, client_ctx: bridge.Context
) -> None:
    """The bridge is closed while the call is under way (here in its codec factory; elsewhere, resolving a name)."""
    b = bridge.Bridge(workers=1)
    outcome: list[BaseException] = []

    def codec() -> bridge.codecs.Raw:
        b.close()
        return bridge.codecs.Raw()

    def connect() -> None:
        try:
            b.connect(server.address, client_ctx, server_hostname="localhost", codec=codec)
        except BaseException as error:
            outcome.append(error)

    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(5)
    assert not connecting.is_alive(), "it waits for threads that have ended"
    assert isinstance(outcome[0], (bridge.BridgeClosed, bridge.SessionEnded))


def test_a_thread_of_the_bridge_cannot_close_it(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """It would wait for itself: refused, as the codec's own failure, and nothing hangs."""

    class Suicidal(bridge.codecs.Raw):
        def decode(self, data: bytes) -> Any:
            b.close()

    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=Suicidal)
        session = b.connect(listener.address, client_ctx, server_hostname="localhost")
        peer = listener.accept(PATIENCE)
        session.send(b"now")
        with pytest.raises(bridge.CodecError, match="would wait for"):
            peer.recv(PATIENCE)


@needs_proc
def test_two_hundred_connects_leave_nothing_behind(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        counts = []
        for round_trip in range(200):
            with b.connect(listener.address, client_ctx, server_hostname="localhost") as session:
                peer = listener.accept(PATIENCE)
                session.send(b"hello")
                assert peer.recv(PATIENCE) == b"hello"
                peer.send_eof()
            assert peer.close()
            if round_trip % 50 == 49:
                until(lambda: not b.snapshot().sessions)
                counts.append((descriptors(), threading.active_count(), len(b._workers[0]._watched)))
        assert counts[0] == counts[-1], counts


@needs_proc
def test_failed_connects_leave_nothing_behind(
    server_ctx: bridge.Context, client_ctx: bridge.Context, server: StdlibServer
) -> None:
    timeouts = bridge.Timeouts(close_notify=0.2)
    with (
        bridge.Bridge(workers=1, timeouts=timeouts) as b,
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        socket.socket() as nobody,
    ):
        nobody.bind(("127.0.0.1", 0))
        counts = []
        for number in range(60):
            with pytest.raises(bridge.HostnameMismatch):
                b.connect(listener.address, client_ctx, server_hostname="wrong.example")
            with pytest.raises(bridge.ConnectFailed):
                b.connect(nobody.getsockname(), client_ctx, server_hostname="localhost")
            if number % 20 == 19:
                until(lambda: not b.snapshot().sessions and len(b._workers[0]._watched) == 1)
                counts.append((descriptors(), threading.active_count()))
        assert counts[0] == counts[-1], counts


# ── closing while another thread is inside ──


def test_closing_from_another_thread_never_makes_a_receiver_read_a_reused_descriptor(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """As fast as descriptors are freed by `abort`, others take them; no receiver may see a byte from those."""
    with (
        bridge.Bridge(workers=2) as b,
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        ThreadPoolExecutor(4) as pool,
    ):
        for _ in range(100):
            sessions = [
                b.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(2)
            ]
            peers = [listener.accept(PATIENCE) for _ in range(2)]
            receiving = [pool.submit(session.recv) for session in (*sessions, *peers)]
            for session in sessions:
                session.abort()
            pairs = [socket.socketpair() for _ in range(4)]
            for near, far in pairs:
                near.send(b"\x17\x03\x03\x00\x04trap")
                far.send(b"\x17\x03\x03\x00\x04trap")
            for future in receiving:
                assert isinstance(future.exception(PATIENCE), (bridge.SessionAborted, bridge.PeerReset))
            for near, far in pairs:
                assert near.recv(100) == far.recv(100) == b"\x17\x03\x03\x00\x04trap", (
                    "somebody read or wrote here"
                )
                near.close()
                far.close()
            for peer in peers:
                peer.close()


# ── the forgotten ──


def test_a_forgotten_session_hangs_up_with_a_warning_and_what_was_sent_leaves(
    server: StdlibServer, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    with bridge.Bridge(workers=1) as b:
        served = pool.submit(server.serve)
        session = b.connect(server.address, client_ctx, server_hostname="localhost")
        session.send(b"remember me")
        name = session.name
        with pytest.warns(ResourceWarning, match=rf"session {name} was forgotten and is being closed"):
            del session
            gc.collect()
        assert served.result(PATIENCE) == (b"remember me", "SSLEOFError")
        until(lambda: not b.snapshot().sessions)


def test_a_loop_over_a_listener_or_a_session_keeps_nothing_of_what_it_gave(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    class Message(str):
        """Can be referred to weakly."""

    class Messages(bridge.codecs.Lines):
        def decode(self, data: bytes) -> list[str]:
            return [Message(line) for line in super().decode(data)]

    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=Messages)
        session = b.connect(listener.address, client_ctx, server_hostname="localhost")
        sessions = iter(listener)
        peer = next(sessions)
        session.send(b"x\n")
        messages = iter(peer)
        message = weakref.ref(next(messages))
        gc.collect()
        until(lambda: message() is None)  # the coordinator, who has brought it, lets go of it in its own time
        with pytest.warns(ResourceWarning, match="was forgotten and is being closed"):
            del messages, peer
            gc.collect()
        sessions.close()  # type: ignore[attr-defined]
        session.abort()


def test_a_session_that_is_forgotten_while_nobody_takes_its_last_words_ends(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """Though a sender has met the reset, and its error the sender's frames, which have the session."""
    with (
        bridge.Bridge(workers=1, limits=bridge.Limits(inbox_bytes=1)) as b,
        bridge.Bridge(workers=1) as there,
    ):
        near, far = tcp_pair()
        peer = there.stream(far, server_ctx)
        peer.begin()
        session = b.adopt(near, client_ctx, server_hostname="localhost")
        session.send(b"question")
        peer.read(10, PATIENCE)
        peer.write(bytes(60_000), PATIENCE)
        transport = session._channel.transport
        until(lambda: transport.received and not transport.mask)
        peer.abort()
        peer.gone.wait(PATIENCE, "gone")
        with pytest.raises(bridge.PeerReset):
            while True:
                session.send(bytes(20_000), PATIENCE)
        until(lambda: transport._hearing_out is not None)
        del session
        gc.collect()
        until(lambda: not b.snapshot().sessions)


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, None])
@pytest.mark.parametrize("said", [False, True], ids=["open", "after send_eof"])
@pytest.mark.parametrize("kind", ["session", "stream"])
def test_an_exception_through_the_with_of_a_bridge_is_nobody_s_word_that_all_was_said(
    server: StdlibServer,
    client_ctx: bridge.Context,
    pool: ThreadPoolExecutor,
    kind: str,
    said: bool,
    failure: type[BaseException] | None,
) -> None:
    served, begin = pool.submit(server.serve), time.monotonic()
    patient = bridge.Timeouts(close_notify=PATIENCE)
    message = b"row 1\n" * 20_000
    raised = contextlib.nullcontext() if failure is None else pytest.raises(failure)
    with raised, bridge.Bridge(workers=1, timeouts=patient) as b:
        near: Any
        if kind == "session":
            near = b.connect(server.address, client_ctx, server_hostname="localhost")
            near.send(message)
        else:
            sock = socket.create_connection(server.address)
            near = b.stream(sock, client_ctx, server_hostname="localhost")
            near.write(message)
        if said:
            near.send_eof()
        if failure is not None:
            raise failure
    assert served.result(PATIENCE) == (message, "clean" if said or failure is None else "SSLEOFError")
    assert time.monotonic() - begin < PATIENCE, "nobody has waited for an answer"


def test_a_forgotten_bridge_ends_its_threads_with_a_warning() -> None:
    before = set(threading.enumerate())
    forgotten = bridge.Bridge(workers=2)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    with pytest.warns(ResourceWarning, match="a Bridge was forgotten"):
        del forgotten
        gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_bridge_with_a_session_or_a_listener_is_not_forgotten(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    listener = bridge.Bridge(workers=1).listen(("127.0.0.1", 0), server_ctx)
    client = bridge.Bridge(workers=1).connect(listener.address, client_ctx, server_hostname="localhost")
    server = listener.accept(PATIENCE)
    gc.collect()
    client.send(b"x")
    assert server.recv(PATIENCE) == b"x"
    with pytest.warns(ResourceWarning, match="a Bridge was forgotten"):
        for one in (client, server, listener):
            one.close()
        del client, server, listener, one
        gc.collect()


def test_a_closed_session_is_forgotten_in_silence(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with (
        bridge.Bridge(workers=1) as b,
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        client.send_eof()
        assert list(server) == []
        server.close()
        with pytest.raises(bridge.EndOfStream):
            client.recv(PATIENCE)
        client.abort()
        del client, server
        gc.collect()
        assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("kept", ["inbox", "outbox"])
def test_the_queues_of_a_session_keep_it_alive(
    server_ctx: bridge.Context, client_ctx: bridge.Context, kept: str
) -> None:
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        queue = getattr(b.connect(listener.address, client_ctx, server_hostname="localhost"), kept)
        server = listener.accept(PATIENCE)
        gc.collect()
        if kept == "inbox":
            server.send(b"still here")
            assert queue.get(timeout=PATIENCE) == b"still here"
        else:
            queue.put(b"still here", timeout=PATIENCE)
            assert server.recv(PATIENCE) == b"still here"
        queue._session.abort()
        server.abort()


def test_sessions_on_a_shared_inbox_are_kept_alive_by_it(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        client.send(b"one")
        assert shared.get(timeout=PATIENCE)[1] == b"one"
        gc.collect()
        client.send(b"two")
        assert shared.get(timeout=PATIENCE)[1] == b"two"
        client.abort()


# ── whole processes ──

PRELUDE = """
import os, queue, signal, socket, sys, threading
import bridge
host, port, cafile, certfile, keyfile = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]
client_ctx = bridge.client_context(cafile)
server_ctx = bridge.server_context(certfile, keyfile)
def connect(b, **options):
    return b.connect((host, port), client_ctx, server_hostname="localhost", **options)
"""


class Program:
    """A Python program of ours, with every warning an error, facing a stdlib server in this process."""

    def __init__(self, code: str, server: StdlibServer, ca_file: str, cert: KeyPair) -> None:
        options = ["-X", "dev", "-X", "faulthandler", "-W", "error"]
        host, port = server.address
        self.process = subprocess.Popen(
            [
                sys.executable,
                *options,
                "-c",
                PRELUDE + code,
                host,
                str(port),
                ca_file,
                cert.certfile,
                cert.keyfile,
            ],
            env={**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def interrupt(self) -> str:
        """What it says to SIGINT.  CPython looks for signals before it falls asleep, not while: press again."""
        while True:
            self.process.send_signal(signal.SIGINT)
            if select.select([self.process.stdout], [], [], 3.0)[0]:
                return self.line()

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Exit status, the rest of what it said, and its complaints."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out.strip(), err.strip()


@pytest.fixture
def program(server: StdlibServer, ca_file: str, server_cert: KeyPair) -> Iterator[Callable[[str], Program]]:
    started: list[Program] = []

    def start(code: str) -> Program:
        started.append(Program(code, server, ca_file, server_cert))
        return started[-1]

    yield start
    for made in started:
        made.process.kill()
        made.process.communicate()


def test_a_program_without_fault_ends_without_a_word_in_development_mode(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    served = pool.submit(server.serve, b"welcome")
    running = program(
        """
with bridge.Bridge() as b:
    with connect(b) as session:
        session.send(b"hello")
        print(session.recv(30))
"""
    )
    assert running.end() == (0, "b'welcome'", "")
    assert served.result(PATIENCE) == (b"hello", "clean")


def test_a_forgotten_bridge_does_not_keep_the_interpreter_and_still_sends_what_is_queued(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    served = pool.submit(server.serve)
    running = program(
        """
b = bridge.Bridge()
listener = b.listen(("127.0.0.1", 0), server_ctx)
session = connect(b)
session.send(bytes(1_000_000))
"""
    )
    assert running.end() == (0, "", "")
    received, end = served.result(PATIENCE)
    assert len(received) == 1_000_000 and end == "SSLEOFError"


def test_a_forgotten_bridge_delays_the_exit_only_for_a_while_if_the_peer_takes_nothing(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    running = program(
        """
b = bridge.Bridge()
session = connect(b, wait=False, timeouts=bridge.Timeouts(handshake=None, flush=None, close_notify=None))
session.send(b"never")
print("over")
"""
    )
    assert running.line() == "over"
    begin = time.monotonic()
    assert running.end() == (0, "", "")
    assert time.monotonic() - begin < 15


def test_a_codec_that_does_not_come_to_an_end_delays_the_exit_only_for_a_while(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    running = program(
        """
import threading
decoding = threading.Event()
class Endless(bridge.codecs.Raw):
    def decode(self, data):
        decoding.set()
        threading.Event().wait()
b = bridge.Bridge(workers=1)
listener = b.listen(("127.0.0.1", 0), server_ctx, codec=Endless)
session = b.connect(listener.address, client_ctx, server_hostname="localhost")
session.send(b"x")
decoding.wait()
print("over")
"""
    )
    assert running.line() == "over"
    assert running.end() == (0, "", "")


@pytest.mark.parametrize("call", ["session.recv()", "shared.get()", "listener.accept()", "list(session)"])
def test_a_daemon_thread_that_waits_does_not_keep_the_interpreter(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor, call: str
) -> None:
    served = pool.submit(server.serve)
    running = program(
        f"""
b = bridge.Bridge()
session, shared = connect(b), bridge.Inbox()
listener = b.listen(("127.0.0.1", 0), server_ctx)
b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
started = threading.Event()
def wait():
    started.set()
    try:
        {call}
    except bridge.ShutDown:
        pass
threading.Thread(target=wait, daemon=True).start()
started.wait()
"""
    )
    assert running.end() == (0, "", "")
    assert served.result(PATIENCE)[1] == "SSLEOFError"


def test_a_program_whose_threads_are_no_daemons_goes_on_when_its_main_thread_has_ended(
    program: Callable[[str], Program], server: StdlibServer
) -> None:
    """Python waits for such threads, so a server may live in them alone: its bridge is not forgotten, but at work."""
    running = program(
        """
b = bridge.Bridge()
session = connect(b)
def work():
    threading.main_thread().join()
    print("main thread has ended", flush=True)
    print(session.recv(30).decode(), flush=True)
    b.close()
threading.Thread(target=work).start()
"""
    )
    with (
        server.listener.accept()[0] as raw,
        server.context.wrap_socket(raw, server_side=True) as sock,
    ):
        assert running.line() == "main thread has ended"
        sock.sendall(b"still here")
        assert running.line() == "still here"
        with contextlib.suppress(OSError):
            sock.unwrap()
    assert running.end() == (0, "", "")


def test_a_thread_that_waits_is_let_go_when_its_session_ends(
    program: Callable[[str], Program], server: StdlibServer
) -> None:
    """Whatever becomes of the bridge: the peer's end is enough."""
    running = program(
        """
b = bridge.Bridge()
session = connect(b)
threading.Thread(target=lambda: print(list(session))).start()
"""
    )
    with (
        server.listener.accept()[0] as raw,
        server.context.wrap_socket(raw, server_side=True) as sock,
    ):
        sock.sendall(b"last")
        with contextlib.suppress(OSError):
            sock.unwrap()
    status, out, err = running.end()
    assert (status, err) == (0, "") and out in ("[b'last']", "")


@needs_signals
@pytest.mark.parametrize("call", ["session.recv()", "shared.get()", "listener.accept()", "session.info"])
def test_ctrl_c_interrupts_whoever_waits(
    program: Callable[[str], Program], server: StdlibServer, call: str
) -> None:
    running = program(
        f"""
with bridge.Bridge(timeouts=bridge.Timeouts(handshake=None, close_notify=0.1)) as b:
    session, shared = connect(b, wait=False), bridge.Inbox()
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
    try:
        print("ready")
        {call}
    except KeyboardInterrupt:
        print("interrupted")
"""
    )
    assert running.line() == "ready"
    assert running.interrupt() == "interrupted"
    assert running.end() == (0, "", "")


@needs_signals
def test_ctrl_c_interrupts_a_send_without_room(
    program: Callable[[str], Program], server: StdlibServer
) -> None:
    running = program(
        """
with bridge.Bridge(timeouts=bridge.Timeouts(flush=0.1, close_notify=0.1)) as b:
    session = connect(b)
    while True:
        try:
            session.send(bytes(100_000), timeout=1.0)
        except bridge.SendTimeout:
            break
    try:
        print("ready")
        session.send(bytes(1_000_000))
    except KeyboardInterrupt:
        print("interrupted")
"""
    )
    with server.listener.accept()[0] as raw, server.context.wrap_socket(raw, server_side=True):
        assert running.line() == "ready"
        assert running.interrupt() == "interrupted"
        assert running.end() == (0, "", "")


@needs_signals
def test_a_second_ctrl_c_while_closing_does_not_make_the_exit_hang(
    program: Callable[[str], Program], server: StdlibServer
) -> None:
    """Closing may take half a minute if the peer takes nothing: a person presses Ctrl-C again, and means it."""
    running = program(
        """
b = bridge.Bridge()
session = connect(b)
while True:
    try:
        session.send(bytes(100_000), timeout=1.0)
    except bridge.SendTimeout:
        break
try:
    print("closing")
    b.close()
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    with server.listener.accept()[0] as raw, server.context.wrap_socket(raw, server_side=True):
        assert running.line() == "closing"
        until(lambda: "S" in state_of(running.process.pid))
        assert running.interrupt() == "interrupted"
        try:
            assert running.end(timeout=10)[:2] == (0, "")
        except subprocess.TimeoutExpired:
            pytest.fail("the interpreter waits at exit for a close that was interrupted", pytrace=False)


def state_of(pid: int) -> str:
    """The main thread's state: S when it sleeps, as it does once it waits inside close."""
    stat = Path(f"/proc/{pid}/task/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "S"


def test_a_handle_that_was_never_made_goes_in_silence() -> None:
    """As when Ctrl-C comes in the middle of its making."""
    bridge.Session.__new__(bridge.Session).__del__()


# ── a bridge that is closed at the same time ──


def test_what_comes_when_the_bridge_has_just_been_sealed_is_closed(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """`close` counts its sessions first, and then waits for these."""
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        for make in (b.adopt, b.stream):
            near, far = socket.socketpair()
            with near, far:
                b._channels.seal()
                b._streams.seal()
                with pytest.raises(bridge.BridgeClosed):
                    make(near, client_ctx, server_hostname="localhost")
                far.settimeout(PATIENCE)
                assert far.recv(1) == b""
        with socket.create_connection(listener.address) as client:
            client.settimeout(PATIENCE)
            assert client.recv(1) == b""
        assert not b.snapshot().sessions


# ── fork ──


FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork() with threads: that is the point
b = bridge.Bridge()
shared = bridge.Inbox()
session = connect(b)
listener = b.listen(("127.0.0.1", 0), server_ctx)
b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
"""


@needs_fork
def test_after_fork_every_handle_says_so_in_the_child_and_the_parent_goes_on(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    served = pool.submit(server.serve, b"welcome")
    running = program(
        FORK
        + """
calls = {
    "send": lambda: session.send(b"from the child"),
    "put": lambda: session.outbox.put_nowait(b"from the child"),
    "recv": lambda: session.recv(1),
    "peek": lambda: session.peek(1),
    "iterate": lambda: list(session),
    "inbox": lambda: session.inbox.get(timeout=1),
    "flush": lambda: session.flush(1),
    "send_eof": session.send_eof,
    "unwrap": lambda: session.unwrap(1),
    "info": lambda: session.info,
    "close": lambda: session.close(1),
    "abort": session.abort,
    "with": lambda: session.__exit__(None, None, None),
    "connect": lambda: connect(b, timeout=1),
    "listen": lambda: b.listen(("127.0.0.1", 0), server_ctx),
    "accept": lambda: listener.accept(1),
    "replace_context": lambda: listener.replace_context(server_ctx),
    "listener.close": listener.close,
    "shared.get": lambda: shared.get(timeout=1),
    "shared.put": lambda: shared.put((None, "from the child")),
    "snapshot": b.snapshot,
    "totals": b.totals,
    "bridge.close": b.close,
}
pid = os.fork()
if not pid:
    wrong = []
    for name, call in calls.items():
        try:
            call()
            wrong.append(f"{name}: no error")
        except bridge.ForkedError as error:
            if "fork" not in str(error) or "new one" not in str(error):
                wrong.append(f"{name}: {error}")
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")
    del session, calls
    os.write(1, (repr(wrong) + "\\n").encode())
    os._exit(0)
os.waitpid(pid, 0)
print(session.recv(30))
session.send(b"from the parent")
b.close()
"""
    )
    assert running.line() == "[]"
    assert running.end() == (0, "b'welcome'", "")
    assert served.result(PATIENCE) == (b"from the parent", "clean")


@needs_fork
def test_a_child_may_use_a_context_that_another_thread_was_inside_of(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    """The thread lives in the parent only, and would never let the lock of the key log go."""
    served = [pool.submit(server.serve) for _ in range(2)]
    running = program(
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork() with threads: that is the point
inside, parent = threading.Event(), os.getpid()

def log(line):
    if os.getpid() == parent:
        inside.set()
        gate.wait()

gate = threading.Event()
client_ctx = bridge.client_context(cafile, keylog=log)

def talk():
    with bridge.Bridge(workers=1) as b:
        connect(b, timeout=30).close()

thread = threading.Thread(target=talk)
thread.start()
inside.wait()
pid = os.fork()
if not pid:
    talk()
    os.write(1, b"the child has talked\\n")
    os._exit(0)
os.waitpid(pid, 0)
gate.set()
thread.join()
"""
    )
    assert running.end() == (0, "the child has talked", "")
    for one in served:
        one.result(PATIENCE)


@needs_fork
def test_a_child_that_was_forked_inside_of_a_lock_leaves_it_in_peace(
    program: Callable[[str], Program],
) -> None:
    running = program(
        """
from bridge import forks
lock = forks.open_lock()
with lock:
    pid = os.fork()
assert lock.acquire(False)
if not pid:
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert running.end() == (0, "7", "")


def beside_its_child(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor, child: str
) -> str:
    """What *child* says, in a child of fork() that exits as usual and leaves the session of its parent alone."""
    served = pool.submit(server.serve, b"welcome")
    running = program(
        FORK
        + f"""
pid = os.fork()
if not pid:
{textwrap.indent(child, "    ")}
    sys.exit(7)
status = os.waitpid(pid, 0)[1]
print("parent:", os.waitstatus_to_exitcode(status), session.recv(30))
session.send(b"from the parent")
b.close()
"""
    )
    said = running.line()
    status, out, err = running.end()
    assert (status, out) == (0, "parent: 7 b'welcome'"), err
    assert served.result(PATIENCE) == (b"from the parent", "clean")
    return said


@needs_fork
def test_the_child_of_a_fork_may_make_its_own_bridge_and_exit_as_usual(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    """Its exit runs finalizers and exit handlers, which must leave the parent's sessions alone."""
    child = """\
with bridge.Bridge() as mine:
    own = mine.listen(("127.0.0.1", 0), server_ctx)
    client = mine.connect(own.address, client_ctx, server_hostname="localhost")
    client.send(b"hello, me")
    print("child:", own.accept(30).recv(30), flush=True)
    client.abort()
"""
    assert beside_its_child(program, server, pool, child) == "child: b'hello, me'"


@needs_fork
def test_an_inbox_of_the_parent_is_refused_when_a_bridge_of_the_child_is_to_fill_it(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor
) -> None:
    """Of a server that forks first, and whose inbox is a global.  It would learn it at the first `get`."""
    child = """\
with bridge.Bridge(workers=1) as mine:
    own = mine.listen(("127.0.0.1", 0), server_ctx)
    sock = socket.create_connection(own.address)
    for call in (
        lambda: mine.listen(("127.0.0.1", 0), server_ctx, inbox=shared),
        lambda: mine.connect(own.address, client_ctx, server_hostname="localhost", inbox=shared),
        lambda: mine.adopt(sock, client_ctx, server_hostname="localhost", inbox=shared),
    ):
        try:
            print("no error:", call())
        except bridge.ForkedError as error:
            print("this Inbox was made before fork()" in str(error), end=" ")
    print(sock.fileno() != -1, flush=True)
    sock.close()
"""
    assert beside_its_child(program, server, pool, child) == "True True True True"


@needs_fork
def test_what_a_child_drops_of_the_parents_handlers_waits_for_no_lock(
    program: Callable[[str], Program],
) -> None:
    """In the middle of fork(), when nobody has told the child yet, and a lock may be held that nobody will let go."""
    running = program(
        """
import time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork() with threads: that is the point
shared, ready, leave = bridge.Inbox(), threading.Event(), threading.Event()


def handle():
    shared.put(("somebody", "a message"))
    shared.get()
    ready.set()
    leave.wait()


thread = threading.Thread(target=handle, daemon=True)
thread.start()
ready.wait(30)
with shared._lock:
    pid = os.fork()
    if not pid:
        os._exit(0)
deadline = time.monotonic() + 20
while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
    leave.wait(0.01)
if not ended[0]:
    os.kill(pid, 9)
print("child:", os.waitstatus_to_exitcode(ended[1]) if ended[0] else "stuck")
leave.set()
thread.join()
"""
    )
    assert running.end() == (0, "child: 0", "")


# ── the story in the log ──


def story(logs: list[Any], session: bridge.Session) -> list[tuple[str, str]]:
    """The moves of *session*; each event is checked for the fields that the table in bridge.events promises."""
    moves = []
    for entry in list(logs):
        if entry["event"] == "session.state" and entry["session"] == session.name:
            fields = {"event", "log_level", "session", "peer", "old", "new", "why"}
            if entry["new"] == "closed":
                fields |= {"cause", "error"}
            assert set(entry) == fields, entry
            assert entry["log_level"] == "debug"
            assert all(isinstance(value, str) for value in entry.values())
            moves.append((entry["old"], entry["new"]))
    return moves


def test_one_event_a_change_of_state(
    server_ctx: bridge.Context, client_ctx: bridge.Context, logs: list[Any]
) -> None:
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        client.send(b"not in the log")
        client.send_eof()
        assert list(server) == [b"not in the log"]
        server.close()
        assert list(client) == []
        client.close()
        aborted = b.connect(listener.address, client_ctx, server_hostname="localhost")
        aborted.abort()
        aborted.close()
        listener.accept(PATIENCE).abort()
        until(lambda: not b.snapshot().sessions)
    opening = [("connecting", "handshaking"), ("handshaking", "open")]
    assert story(logs, client) == [*opening, ("open", "draining"), ("draining", "closed")]
    assert story(logs, server) == [
        *opening,
        ("open", "peer_closed"),
        ("peer_closed", "draining"),
        ("draining", "closed"),
    ]
    assert story(logs, aborted) == [*opening, ("open", "closed")]
    causes = {entry["session"]: entry["cause"] for entry in logs if entry.get("new") == "closed"}
    assert causes[client.name] == "EndOfStream" and causes[aborted.name] == "SessionAborted"
    assert "not in the log" not in repr(logs)
    assert [entry for entry in logs if entry["event"] == "bridge.closed"] == [
        {"event": "bridge.closed", "log_level": "debug", "sessions": 0, "unsent": 0}
    ]


def test_a_bridge_says_what_it_could_not_send(
    server_ctx: bridge.Context, client_ctx: bridge.Context, logs: list[Any]
) -> None:
    with bridge.Bridge(workers=1) as there:
        listener = there.listen(("127.0.0.1", 0), server_ctx)
        b = bridge.Bridge(workers=1)
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        with pytest.raises(bridge.SendTimeout):
            while True:  # the peer takes nothing
                client.send(bytes(50_000), timeout=1.0)
        (seen,) = b.snapshot().sessions
        assert seen.outbox_bytes == client.outbox.qsize() == b.snapshot().outbox_bytes > 0
        b.close(timeout=0)
        listener.accept(PATIENCE).abort()
        unsent = client.close().unsent
    closed = [entry for entry in logs if entry["event"] == "bridge.closed"]
    assert [entry["unsent"] for entry in closed] == [unsent, 0] and unsent > 0


def test_a_failed_handshake_is_told_to_servers(server_ctx: bridge.Context, logs: list[Any]) -> None:
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        with socket.create_connection(listener.address) as sock:
            peer = "{}:{}".format(*sock.getsockname())
            sock.send(b"GET / HTTP/1.0\r\n\r\n")
            until(lambda: [entry for entry in list(logs) if entry["event"] == "handshake.failed"])
    (failed,) = [entry for entry in logs if entry["event"] == "handshake.failed"]
    assert set(failed) == {"event", "log_level", "session", "peer", "cause", "error"}
    assert failed["log_level"] == "info" and failed["cause"] == "NotTLS" and peer in failed["peer"]


@pytest.mark.parametrize("failure", [KeyError("a bug"), SystemExit("a processor's")], ids=["bug", "exit"])
def test_a_log_that_fails_harms_no_session(
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    caplog: pytest.LogCaptureFixture,
    failure: BaseException,
) -> None:
    def fail(*_: Any) -> Any:
        if isinstance(failure, Exception) or threading.current_thread() is not threading.main_thread():
            raise failure
        raise structlog.DropEvent

    structlog.configure(processors=[fail])
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        client.send(b"unharmed")
        assert server.recv(PATIENCE) == b"unharmed"
        client.abort()
        server.abort()
    assert "a log processor failed on event session.state" in caplog.text


def test_a_handler_of_logging_that_fails_harms_no_session(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """It is asked a second time, to say that it has failed."""

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(28, "no space left on device")

    handler, logger = Failing(), logging.getLogger("bridge")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
            client = b.connect(listener.address, client_ctx, server_hostname="localhost")
            server = listener.accept(PATIENCE)
            client.send(b"unharmed")
            assert server.recv(PATIENCE) == b"unharmed"
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "wrapper",
    [
        structlog.BoundLogger,
        structlog.stdlib.BoundLogger,
        structlog.make_filtering_bound_logger(logging.INFO),
    ],
    ids=["generic", "stdlib", "filtering"],
)
def test_every_logger_of_structlog_gets_the_events(
    wrapper: Any, server_ctx: bridge.Context, caplog: pytest.LogCaptureFixture
) -> None:
    capture = structlog.testing.LogCapture()
    structlog.configure(
        wrapper_class=wrapper, processors=[capture], logger_factory=structlog.stdlib.LoggerFactory()
    )
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), server_ctx):
        pass
    told = [(entry["event"], entry["log_level"]) for entry in capture.entries]
    assert told[:2] == [("listener.started", "info"), ("listener.closed", "info")]
    assert caplog.text == ""


@pytest.mark.parametrize("level", [None, "INFO", "DEBUG"])
def test_without_structlog_configured_the_standard_logging_tells_it(
    program: Callable[[str], Program], server: StdlibServer, pool: ThreadPoolExecutor, level: str | None
) -> None:
    served = pool.submit(server.serve)
    setup = f"logging.basicConfig(level=logging.{level}, stream=sys.stdout)" if level else ""
    running = program(
        f"""
import logging
{setup}
with bridge.Bridge() as b:
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    connect(b).close()
"""
    )
    status, out, err = running.end()
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert served.result(PATIENCE)[1] == "clean"
    assert all(line.startswith(("INFO:bridge:event='", "DEBUG:bridge:event='")) for line in lines), out
    events = [line.split("event='")[1].split("'")[0] for line in lines]
    listening = ["listener.started", "listener.closed"]
    if level is None:
        assert events == []
    elif level == "INFO":
        assert events == listening
    else:
        assert events.count("session.state") == 4 and set(events) == {
            *listening,
            "session.state",
            "bridge.closed",
        }


def test_a_snapshot_tells_what_every_session_is_doing(
    server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    with bridge.Bridge(workers=2) as b, b.listen(("127.0.0.1", 0), server_ctx) as listener:
        listening = bridge.ListenerSnapshot(f"127.0.0.1:{listener.address[1]}", 0, 0)
        workers = ("bridge-worker-0", "bridge-worker-1")
        assert b.snapshot() == bridge.Snapshot((), workers, {}, 0, 0, (listening,))
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        client.send(bytes(1_000))
        server.peek(PATIENCE)
        with socket.create_connection(listener.address):
            until(lambda: len(b.snapshot().sessions) == 3)
            seen = {one.name: one for one in b.snapshot().sessions}
            assert seen[client.name].state == seen[server.name].state == "open"
            (mute,) = set(seen) - {client.name, server.name}
            until(lambda: [s.state for s in b.snapshot().sessions if s.name == mute] == ["handshaking"])
        until(lambda: len(b.snapshot().sessions) == 2)
        snapshot = b.snapshot()
        for one in snapshot.sessions:
            assert one.worker in snapshot.workers and 0 <= one.seconds < PATIENCE
            assert one.wants == {"read": "read"} and one.outbox_bytes == 0
        assert 1_000 <= snapshot.inbox_bytes < 2_000
        assert {one.name: one.inbox_bytes for one in snapshot.sessions} == {
            client.name: 0,
            server.name: snapshot.inbox_bytes,
        }
        assert snapshot.wants["handshake", "read"] >= 1 and set(snapshot.wants) <= {
            (call, want)
            for call in ("handshake", "read", "write", "shutdown", "flush", "peek")
            for want in ("read", "write")
        }
        client.abort()
        server.abort()


# ── what may not be ──


class Closing(bridge.codecs.Raw):
    """A codec that does what no codec may."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call

    def decode(self, data: bytes) -> Any:
        self.call()
        return super().decode(data)


@contextlib.contextmanager
def two_pairs(
    server_ctx: bridge.Context, client_ctx: bridge.Context, call: Callable[[bridge.Bridge], object]
) -> Iterator[tuple[bridge.Bridge, list[bridge.Session]]]:
    """A bridge of one worker, a client's and a server's session, the server's with a `Closing` codec, and two more."""
    with bridge.Bridge(workers=1) as b:
        odd = b.listen(("127.0.0.1", 0), server_ctx, codec=lambda: Closing(lambda: call(b)))
        plain = b.listen(("127.0.0.1", 0), server_ctx)
        ends = []
        for listener in (odd, plain):
            ends += [b.connect(listener.address, client_ctx, server_hostname="localhost")]
            ends += [listener.accept(PATIENCE)]
        yield b, ends


@pytest.mark.parametrize("inside", ["a worker", "a receiver"])
@pytest.mark.parametrize("what", ["close", "flush"])
def test_a_codec_may_not_wait_for_the_bridge_it_is_in(
    server_ctx: bridge.Context, client_ctx: bridge.Context, what: str, inside: str
) -> None:
    ends: list[bridge.Session] = []

    def call(b: bridge.Bridge) -> None:
        if what == "close":
            b.close()
        elif inside == "a worker":
            ends[2].send(bytes(10_000_000))
            ends[2].flush()
        else:
            with ends[1]._channel.outbox._lock:
                ends[1]._channel.outbox._accepted += 1
            ends[1].flush()

    with two_pairs(server_ctx, client_ctx, call) as (b, made):
        ends += made
        if inside == "a worker":
            ends[0].send(b"x")
            until(lambda: ends[1].end is not None)
        else:
            with ThreadPoolExecutor(1) as pool:
                receiving = pool.submit(ends[1].recv, PATIENCE)
                inbox = ends[1]._own_inbox()
                until(lambda: inbox._sleepers or inbox.attendant is not None)
                ends[0].send(b"x")
                with pytest.raises(bridge.SessionEnded):
                    receiving.result(PATIENCE)
        assert isinstance(ends[1].end, bridge.CodecError)
        assert re.search("may not wait|by a thread of the Bridge itself", str(ends[1].end))
        assert not b.closed
        if what == "close":
            ends[2].send(b"the others live")
            assert ends[3].recv(PATIENCE) == b"the others live"


def test_a_codec_factory_that_exits_costs_its_own_client_only(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    made = []

    def factory() -> bridge.codecs.Raw:
        made.append(1)
        if len(made) == 2:  # the first is made as `listen` checks it
            sys.exit("no codec for this one")
        return bridge.codecs.Raw()

    with bridge.Bridge(workers=1) as b, bridge.Bridge(workers=1) as there:
        listener = there.listen(("127.0.0.1", 0), server_ctx, codec=factory)
        with pytest.raises(bridge.SessionEnded):
            b.connect(listener.address, client_ctx, server_hostname="localhost")
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        assert len(there._channels) + there._lingering.used == 1
        assert client.info.version == server.info.version


@pytest.mark.parametrize("method", ["decode", "eof", "a generator"])
def test_whatever_comes_out_of_a_codec_ends_its_own_session_only(
    server_ctx: bridge.Context, client_ctx: bridge.Context, method: str
) -> None:
    class Exiting(bridge.codecs.Raw):
        def decode(self, data: bytes) -> Any:
            if method == "decode":
                sys.exit("in decode")
            return self.generated() if method == "a generator" else super().decode(data)

        def eof(self) -> Any:
            if method == "eof":
                sys.exit("in eof")
            return super().eof()

        def generated(self) -> Iterator[bytes]:
            yield b"first"
            sys.exit("in a generator")

    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=Exiting)
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        client.send(b"x")
        client.send_eof()
        until(lambda: server.end is not None)
        assert isinstance(server.end, bridge.CodecError) and "SystemExit" in str(server.end)
        assert all(thread.is_alive() for thread in b._crew.threads)
        again = b.connect(listener.address, client_ctx, server_hostname="localhost")
        accepted = listener.accept(PATIENCE)
        assert again.info.version == accepted.info.version


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bridge_whose_worker_dies_of_a_bug_is_closed_and_nobody_waits_for_it(
    server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    shared = bridge.Inbox()
    with bridge.Bridge(workers=1) as there:
        b = bridge.Bridge(workers=2)
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
        clients = [there.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(4)]
        servers = [listener.accept(PATIENCE) for _ in clients]
        waiting = [pool.submit(call) for call in (listener.accept, shared.get, servers[0].recv)]
        b._workers[1]._poller.wait = None  # type: ignore[method-assign, assignment]
        b._workers[1]._doorbell.ring()
        for future in waiting:
            assert isinstance(future.exception(PATIENCE), bridge.ShutDown)
        for session in (*servers, *clients):
            with pytest.raises(bridge.SessionEnded):
                session.recv(PATIENCE)
        with pytest.raises(bridge.BridgeClosed):
            b.connect(listener.address, client_ctx, server_hostname="localhost")
        assert b.closed
        b.close()
        assert not any(thread.is_alive() for thread in b._crew.threads)


def test_a_listener_that_comes_to_a_bridge_whose_threads_have_ended_meanwhile_is_refused(
    server_ctx: bridge.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name takes seconds to resolve."""
    b = bridge.Bridge(workers=1)
    listening_socket = addresses.listening_socket

    def at_last(*arguments: Any) -> Any:
        b._crew.stop()
        b._crew.join()
        return listening_socket(*arguments)

    monkeypatch.setattr("bridge.bridge.listening_socket", at_last)
    with pytest.raises(bridge.BridgeClosed):
        b.listen(("127.0.0.1", 0), server_ctx)
    b.close()


@pytest.mark.parametrize("at", ["parked", "waiting", "closing", "unbegun"])
def test_a_stream_ends_with_the_threads_of_its_bridge_however_they_end(
    server: StdlibServer, client_ctx: bridge.Context, pool: ThreadPoolExecutor, at: str
) -> None:
    """As after a close that was interrupted."""
    b = bridge.Bridge(workers=1)
    stream = b.stream(socket.create_connection(server.address), client_ctx, server_hostname="localhost")
    if at != "unbegun":
        served = pool.submit(server.serve)
        stream.write(b"half of it")
        with contextlib.suppress(bridge.WouldBlock):
            stream.read(1, 0)
    if at == "waiting":
        reading = pool.submit(stream.read, 1)
        until(lambda: stream._lease._sleepers)
    elif at == "closing":
        stream.close()
    b._crew.stop()
    b.close()
    assert isinstance(stream.gone.wait(PATIENCE, "gone").cause, bridge.SessionEnded)
    assert stream._transport.sock is None and not b._streams
    if at == "waiting":
        assert isinstance(reading.exception(PATIENCE), (bridge.SessionAborted, bridge.SessionClosed))
    if at != "unbegun":
        assert served.result(PATIENCE)[0] == b"half of it"
    stream.close()


@pytest.fixture
def too_late(monkeypatch: pytest.MonkeyPatch) -> Iterator[bridge.Bridge]:
    """A bridge whose worker ends just before it is given a session."""
    b = bridge.Bridge(workers=1)
    launch = b._launch

    def late(channel: Any) -> None:
        b._crew.stop()
        b._crew.threads[0].join()
        launch(channel)

    monkeypatch.setattr(b, "_launch", late)
    yield b
    b.close()


def test_a_session_that_comes_too_late_for_its_worker_ends(
    too_late: bridge.Bridge, client_ctx: bridge.Context
) -> None:
    near, far = tcp_pair()
    with far, pytest.raises(bridge.SessionAborted, match="the bridge was closed"):
        too_late.adopt(near, client_ctx, server_hostname="localhost")


def test_what_such_a_session_was_given_is_reported_as_lost(
    too_late: bridge.Bridge, client_ctx: bridge.Context
) -> None:
    near, far = tcp_pair()
    with far, too_late._coordinator._lock:
        session = too_late.adopt(near, client_ctx, server_hostname="localhost", wait=False)
        session.send(b"lost")
    assert session.close(PATIENCE).unsent == 4


def test_closing_a_bridge_in_the_middle_of_closing_it_is_nothing(
    server_ctx: bridge.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second SIGTERM does, whose handler closes it."""
    b = bridge.Bridge(workers=1)
    sessions = b._close_sessions

    def interrupted(*how: Any) -> None:
        b.close()
        sessions(*how)

    monkeypatch.setattr(b, "_close_sessions", interrupted)
    b.close()
    assert b.closed and not any(thread.is_alive() for thread in b._crew.threads)


@pytest.mark.parametrize("call", ["listen", "connect", "adopt"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_meets_the_close_of_its_bridge_is_refused_and_leaves_nobody_waiting(
    call: str,
    shared: bool,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox = bridge.Inbox() if shared else None
    b = bridge.Bridge(workers=1)
    closed = []

    def factory() -> bridge.codecs.Raw:
        if not closed:  # behind the check whether it is open
            closed.append(b.close())  # type: ignore[func-returns-value]
        return bridge.codecs.Raw()

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
    ):
        options: dict[str, Any] = {"codec": factory, "inbox": inbox}
        with pytest.raises(bridge.BridgeClosed):
            if call == "listen":
                b.listen(("127.0.0.1", 0), server_ctx, **options)
            elif call == "connect":
                b.connect(server.getsockname(), client_ctx, server_hostname="localhost", **options)
            else:
                b.adopt(near, client_ctx, server_hostname="localhost", **options)
    if inbox is not None:
        assert not inbox._feeders


def test_a_forgotten_session_is_closed_also_where_warnings_are_errors(
    server_ctx: bridge.Context, client_ctx: bridge.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del client
            gc.collect()
        with pytest.raises(bridge.Truncated):
            server.recv(PATIENCE)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_a_unix_socket_with_a_full_backlog_is_waited_for(
    server_ctx: bridge.Context, client_ctx: bridge.Context, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        crowd = []
        while True:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            if sock.connect_ex(path):
                break
            crowd.append(sock)
        b = stack.enter_context(bridge.Bridge(workers=1))
        with pytest.raises(bridge.ConnectTimeout):
            b.connect(path, client_ctx, server_hostname="localhost", timeouts=bridge.Timeouts(connect=0.1))
        with capture_logs() as logs, ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(
                b.connect, path, client_ctx, server_hostname="localhost", timeout=PATIENCE
            )
            until(lambda: b.snapshot().sessions)
            for _ in crowd:
                stack.enter_context(listener.accept()[0])
            session = b.adopt(listener.accept()[0], server_ctx)
            assert connecting.result(PATIENCE).info and session.info
        assert not [entry for entry in logs if entry["event"] == "session.stalled"]


def test_a_path_too_long_for_a_unix_socket_is_said_to_be(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with bridge.Bridge(workers=1) as b:
        with pytest.raises(bridge.ConnectFailed, match="too long"):
            b.connect("/tmp/" + 200 * "x", client_ctx, server_hostname="localhost")
        with pytest.raises(OSError, match="cannot listen on .*too long") as caught:
            b.listen("/tmp/" + 200 * "x", server_ctx)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_limit_of_sessions_is_never_exceeded_by_those_that_come_at_once(
    server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with bridge.Bridge(workers=1) as there, bridge.Bridge(workers=1, limits=bridge.Limits(sessions=1)) as b:
        listener = there.listen(("127.0.0.1", 0), server_ctx)
        inside = threading.Barrier(2)

        def factory() -> bridge.codecs.Raw:
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.2)  # both have asked whether there is room
            return bridge.codecs.Raw()

        def connect() -> object:
            try:
                return b.connect(listener.address, client_ctx, server_hostname="localhost", codec=factory)
            except bridge.LimitExceeded as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            ends = [future.result(PATIENCE) for future in [pool.submit(connect), pool.submit(connect)]]
        assert sum(isinstance(end, bridge.Session) for end in ends) == 1
        for end in ends:
            if isinstance(end, bridge.Session):
                end.close()

        def broken() -> bridge.codecs.Raw:
            raise ValueError("no codec")

        with pytest.raises(ValueError, match="no codec"):
            b.connect(listener.address, client_ctx, server_hostname="localhost", codec=broken)
        inside.abort()
        last = connect()
        assert isinstance(last, bridge.Session), "who fails gives its place back"


def test_a_client_for_whom_there_was_room_is_refused_if_another_has_it_by_now(
    rig: Lockstep, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    b = rig.bridge(limits=bridge.Limits(sessions=1))
    near, _ = rig.tcp_pair()
    made = []

    def factory() -> bridge.codecs.Raw:
        if b._listeners:  # its client has been accepted, and is not counted yet
            made.append(b.adopt(near, client_ctx, server_hostname="localhost", wait=False))
        return bridge.codecs.Raw()

    listener = b.listen(("127.0.0.1", 0), server_ctx, codec=factory)
    with capture_logs() as logs, socket.create_connection(listener.address, PATIENCE) as client:
        rig.until(lambda: made)
        rig.settle()
        assert b.snapshot().sessions[0].name == made[0].name and len(b.snapshot().sessions) == 1
        assert client.recv(1) == b""
    assert [one["cause"] for one in logs if one["event"] == "listener.refused"] == ["LimitExceeded"]
    made[0].abort()


def test_a_session_for_which_there_was_room_is_refused_if_a_client_lingers_in_it_by_now(
    rig: Lockstep, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    b = rig.bridge(limits=bridge.Limits(sessions=1))
    listener = b.listen(("127.0.0.1", 0), server_ctx)

    class Meanwhile(bridge.Inbox):
        def _attach(self, feeder: object) -> None:
            super()._attach(feeder)
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            rig.until(lambda: b._lingering.used)
            assert not b._channels

    near, _ = rig.tcp_pair()
    with (
        socket.create_connection(listener.address, PATIENCE) as client,
        pytest.raises(bridge.LimitExceeded),
    ):
        b.adopt(near, client_ctx, server_hostname="localhost", inbox=Meanwhile(), wait=False)


def test_a_failed_client_counts_as_a_handshake_as_long_as_it_has_a_descriptor(
    server_ctx: bridge.Context,
) -> None:
    """Or strangers could have any number of them linger."""
    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, limits=bridge.Limits(handshakes=2))
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                sock = stack.enter_context(socket.create_connection(listener.address, PATIENCE))
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                sock.recv(100)  # an alert, or the end
            until(lambda: not b.snapshot().sessions)
            assert listener.handshakes.used == 2
        until(lambda: not listener.handshakes.used)
