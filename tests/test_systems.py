"""Other systems, and odd ones, as far as this one can stand in for them."""

from __future__ import annotations

import _thread
import contextlib
import copy
import os
import pickle
import select
import selectors
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from peers import PATIENCE, dial, until
from rig import needs_hang_ups, tcp_pair

import bridge
from bridge import errors, poll, worker
from bridge.ssl import sockets
from bridge.ssl.failures import as_stdlib

select_here = select.select
Contexts = tuple[bridge.Context, bridge.Context]
MOST = 8
"""As many sockets may be waited for at a time where `windows` are."""


def select_there(readers: list[int], writers: list[int], failed: list[int], timeout: float | None) -> Any:
    """`select.select` as Windows has it."""
    if not (readers or writers or failed):
        raise OSError(10022, "An invalid argument was supplied")
    if max(map(len, (readers, writers, failed))) > MOST:
        raise ValueError("too many file descriptors in select()")
    return select_here(readers, writers, failed, timeout)


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair) -> Contexts:
    """A client's and a server's."""
    return bridge.client_context(ca_file), bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to sleep in but select(2)."""
    monkeypatch.setattr(select, "select", select_there)
    monkeypatch.setattr(poll, "_Poll", poll._Select)
    monkeypatch.setattr(poll, "HUNG_UP", poll.NOTHING)
    monkeypatch.setattr(selectors.SelectSelector, "_select", staticmethod(select_there))
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    monkeypatch.setattr(poll.SelectorPoller, "most", MOST, raising=False)
    monkeypatch.setattr(worker, "Poller", poll.SelectorPoller)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1) as made:
        yield made


def said(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in list(logs) if entry["event"] == event]


@contextlib.contextmanager
def joined(
    b: bridge.Bridge, listener: bridge.Listener, contexts: Contexts
) -> Iterator[tuple[bridge.Session, bridge.Session]]:
    """A session and its peer, which are aborted afterwards."""
    client = b.connect(listener.address, contexts[0], server_hostname="localhost", timeout=PATIENCE)
    server = listener.accept(PATIENCE)
    try:
        yield client, server
    finally:
        client.abort()
        server.abort()


def exchange(client: bridge.Session, server: bridge.Session) -> None:
    client.send(b"question")
    assert server.recv(PATIENCE) == b"question"
    server.send(b"answer")
    assert client.recv(PATIENCE) == b"answer"


# ── what there is to sleep in ──


def test_streams_where_nobody_can_ask_whether_the_peer_has_hung_up(
    windows: None, b: bridge.Bridge, contexts: Contexts
) -> None:
    near, far = tcp_pair()
    client, server = b.stream(near, contexts[0], server_hostname="localhost"), b.stream(far, contexts[1])
    server.begin()
    assert client.write(b"there", PATIENCE) == 5 and server.read(9, PATIENCE) == b"there"
    assert server.write(b"and back", PATIENCE) == 8 and client.read(9, PATIENCE) == b"and back"


@needs_hang_ups
def test_a_watch_says_that_the_peer_has_hung_up_and_not_that_it_has_said_something() -> None:
    near, far = tcp_pair()
    with near, far:
        hung_up = poll.hang_up_watch(near)
        far.send(b"last words")
        assert not hung_up(0)
        far.shutdown(socket.SHUT_WR)
        assert hung_up(PATIENCE * 1000)


def test_more_clients_than_a_worker_can_wait_for_wait_in_the_kernel(
    windows: None, b: bridge.Bridge, contexts: Contexts, logs: list[Any]
) -> None:
    listener = b.listen(("127.0.0.1", 0), contexts[1])
    near, far = tcp_pair()
    with joined(b, listener, contexts) as (client, server), near, far:
        silent = [dial(listener.address) for _ in range(2 * MOST)]
        until(lambda: said(logs, "listener.paused"))
        for refused in (
            lambda: b.connect(listener.address, contexts[0]),
            lambda: b.adopt(near, contexts[1]),
            lambda: b.stream(near, contexts[1]),
            lambda: b.listen(("127.0.0.1", 0), contexts[1]),
        ):
            with pytest.raises(bridge.LimitExceeded, match="have more workers"):
                refused()
        assert near.fileno() != -1, "what was refused is still the caller's"
        exchange(client, server)
        for sock in silent:
            sock.close()
        until(lambda: said(logs, "listener.resumed") and len(b.snapshot().sessions) == 2)
        with joined(b, listener, contexts) as another:
            exchange(*another)
    assert {"select(2)" in entry["reason"] for entry in said(logs, "listener.paused")} == {True}
    assert not said(logs, "worker.failed")


def test_a_session_is_placed_where_there_is_room(windows: None, contexts: Contexts) -> None:
    with bridge.Bridge(workers=2) as b, contextlib.ExitStack() as stack:
        listeners = [b.listen(("127.0.0.1", 0), contexts[1]) for _ in range(2 * MOST - 6)]
        for listener in listeners[1::2]:
            listener.close()
        for _ in range(3):
            exchange(*stack.enter_context(joined(b, listeners[0], contexts)))
        assert [one.load() for one in b._workers] == [MOST - 1, 4]


def test_a_socket_too_many_costs_its_own_session(
    windows: None, b: bridge.Bridge, contexts: Contexts, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are made at the same moment do not see each other yet."""
    monkeypatch.setattr(worker.Worker, "has_room", lambda _: True, raising=False)
    listener = b.listen(("127.0.0.1", 0), contexts[1])
    with joined(b, listener, contexts) as (client, server):
        silent = [dial(listener.address) for _ in range(2 * MOST)]
        until(lambda: len(said(logs, "handshake.failed")) > MOST)
        exchange(client, server)
        for sock in silent:
            sock.close()


def test_a_descriptor_that_somebody_has_closed_ends_its_own_session(
    windows: None, b: bridge.Bridge, contexts: Contexts, logs: list[Any]
) -> None:
    listener = b.listen(("127.0.0.1", 0), contexts[1])
    with joined(b, listener, contexts) as (ill, its_peer), joined(b, listener, contexts) as (client, server):
        sock = ill._channel.transport.sock
        assert sock is not None
        os.close(sock.fileno())
        for end in (ill, its_peer):
            with pytest.raises(bridge.SessionEnded):
                end.recv(PATIENCE)
        exchange(client, server)


# ── what a Bridge is made of ──


@pytest.mark.parametrize("patched", [(select, "select"), (_thread, "start_new_thread")])
@pytest.mark.parametrize("patcher", ["gevent", "eventlet"])
def test_threads_that_are_greenlets(
    patcher: str, patched: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def green() -> None: ...

    green.__module__ = f"{patcher}.green"
    monkeypatch.setattr(*patched, green)
    monkeypatch.delattr(select, "epoll", raising=False)  # as both do
    with pytest.raises(bridge.ConfigurationError, match=f"{patcher} has patched"):
        bridge.Bridge()


SHORT_OF_DESCRIPTORS = """
import os, resource
import bridge
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
refused = 0
for spare in range(64):
    hogs = []
    try:
        while True:
            hogs.append(os.dup(0))
    except OSError:
        pass
    for hog in hogs[:spare]:
        os.close(hog)
    try:
        made = bridge.Bridge(workers=3)
    except OSError as error:
        refused += 1
    else:
        made.close()
        break
    finally:
        for hog in hogs[spare:]:
            os.close(hog)
    left = os.dup(0)
    assert left == hogs[0], "all that was made is closed"
    os.close(left)
print(refused)
"""


@pytest.mark.skipif(os.name != "posix", reason="descriptors are limited like this on POSIX")
def test_a_bridge_that_is_short_of_descriptors_closes_what_it_has() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SHORT_OF_DESCRIPTORS],
        env={**os.environ, "PYTHONPATH": str(Path(bridge.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" and int(done.stdout) >= 3


def test_a_bridge_that_is_short_of_threads_ends_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        if self.name == "bridge-worker-1":
            raise RuntimeError("can't start new thread")
        start_here(self)

    start_here, before = threading.Thread.start, threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        bridge.Bridge(workers=3)
    until(lambda: threading.active_count() == before)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_handles_stay_where_they_are(copied: Any, b: bridge.Bridge, contexts: Contexts) -> None:
    listener = b.listen(("127.0.0.1", 0), contexts[1])
    near, far = tcp_pair()
    stream = b.stream(near, contexts[1])
    with far, joined(b, listener, contexts) as (session, _):
        for handle in (b, listener, session, stream, contexts[0], bridge.Inbox()):
            with pytest.raises(TypeError, match=f"no {type(handle).__name__} can be pickled or copied"):
                copied(handle)
        with pytest.raises(TypeError, match="no Session can be"):
            copy.deepcopy({"of a program": session})
    stream.close()


# ── what the system says ──


def test_errors_of_windows_have_words(
    b: bridge.Bridge, contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 10061  # WSAECONNREFUSED, of which strerror(3) knows nothing
    monkeypatch.setattr(errors, "_WINSOCK", {refused: "Connection refused."})
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, address: refused)
    with pytest.raises(bridge.ConnectFailed, match=r"^cannot connect to 127\.0\.0\.1:9: Connection refused$"):
        b.connect(("127.0.0.1", 9), contexts[0])
    assert str(as_stdlib(bridge.PeerReset(refused, "reset"))) == f"[Errno {refused}] Connection refused"


@pytest.mark.parametrize("found", ["=qq", "=ii", "=I"])
def test_a_time_out_of_the_kernel_is_understood_as_each_system_tells_it(found: str) -> None:
    class Told(socket.socket):
        def getsockopt(self, *_: int) -> Any:
            return struct.pack(found, 5_250) if found == "=I" else struct.pack(found, 5, 250_000)

    with Told() as sock:
        assert sockets._kernel_timeout(sock, socket.SO_RCVTIMEO) == 5.25
