"""Listeners: accepting never waits for a handshake, limits pause it, and a certificate can be replaced."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair
from OpenSSL import SSL
from peers import until
from rig import Lockstep, Raw, busy, raw_context
from structlog.testing import capture_logs

import bridge
from bridge import codecs
from bridge.acceptor import ACCEPT_BUDGET
from bridge.states import State

PATIENCE = 30.0
ROOT = str(Path(bridge.__file__).parents[1])
QUICK = bridge.Timeouts(close_notify=0.3)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback")
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def b(pool: ThreadPoolExecutor) -> Iterator[bridge.Bridge]:
    """Closed before the pool, which waits for its threads: if a test fails, these may wait for the bridge."""
    with bridge.Bridge(workers=1, timeouts=QUICK) as made:
        yield made


@pytest.fixture
def far() -> Iterator[bridge.Bridge]:
    """Another bridge, for the clients."""
    with bridge.Bridge(workers=1, timeouts=QUICK) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def named(logs: list[Any], prefix: str) -> list[Any]:
    return [entry for entry in list(logs) if entry["event"].startswith(prefix)]


def exchange(client: bridge.Session, server: bridge.Session) -> None:
    client.send(b"question")
    assert server.recv(PATIENCE) == b"question"
    server.send(b"answer")
    assert client.recv(PATIENCE) == b"answer"


def exchange_with_the_next(client: bridge.Session, listener: bridge.Listener) -> None:
    """As `exchange`, with the session that *listener* has for *client*, which is over then."""
    server = listener.accept(PATIENCE)
    exchange(client, server)
    server.abort()


# ── accepting ──


def test_accept_gives_sessions_whose_handshake_is_done(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        host, port = listener.address
        assert host == "127.0.0.1" and 0 < port < 65536
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        assert server.state == "open" and server.info.server_name == "localhost"
        assert server.info.peername[0] == "127.0.0.1"
        exchange(client, server)
        client.abort()
        server.abort()


def test_iteration_ends_when_the_listener_is_closed(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    accepted: list[bridge.Session] = []
    iterating = pool.submit(lambda: [accepted.append(session) for session in listener])
    accepting = pool.submit(listener.accept)
    sleepers, clients = listener._accepted._sleepers, []

    def both_wait(number: int) -> bool:
        """First come, first served, if whoever got one of *number* sleeps again before the next one comes."""
        done = accepting.done()
        return len(accepted) + done == number and len(sleepers) + done == 2

    for number in range(5):
        until(functools.partial(both_wait, number))
        clients.append(b.connect(listener.address, client_ctx, server_hostname="localhost"))
    accepted.append(accepting.result(PATIENCE))
    until(lambda: len(accepted) == 5)
    blocked = pool.submit(listener.accept)
    listener.close()
    listener.close()
    iterating.result(PATIENCE)
    assert isinstance(blocked.exception(PATIENCE), bridge.ShutDown)
    with pytest.raises(bridge.ShutDown, match="the listener is closed"):
        listener.accept()
    with pytest.raises(bridge.ConnectFailed):
        b.connect(listener.address, client_ctx, server_hostname="localhost")
    assert {session.state for session in (*clients, *accepted)} == {"open"}, "what was accepted lives on"
    for session in (*clients, *accepted):
        session.abort()


def test_sessions_that_nobody_accepted_are_closed_with_the_listener(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    clients = [far.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(3)]
    until(lambda: listener._accepted.qsize() == 3)
    listener.close()
    for client in clients:
        with pytest.raises(bridge.EndOfStream):
            client.recv(PATIENCE)
        client.close()
    until(lambda: not b.snapshot().sessions)


def test_a_handshake_that_outlives_its_listener_leaves_no_session_behind(
    b: bridge.Bridge, server_ctx: bridge.Context, ca_file: str
) -> None:
    """Nobody can accept it any more, so it must be ended, not kept."""
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    with socket.create_connection(listener.address, PATIENCE) as raw:
        until(lambda: b.snapshot().sessions)
        listener.close()
        with pytest.raises(bridge.ShutDown):
            listener.accept(PATIENCE)
        raw.settimeout(5)
        context = ssl.create_default_context(cafile=ca_file)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                assert client.recv(1) == b""
        with pytest.raises(bridge.ShutDown):
            listener.accept(0.1)


def test_mute_clients_never_stall_an_honest_one(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """Before it, after it, with half a ClientHello: they cost a descriptor each, and nothing else."""
    with b.listen(("127.0.0.1", 0), server_ctx) as listener, contextlib.ExitStack() as stack:
        for number in range(150):
            mute = stack.enter_context(socket.create_connection(listener.address, PATIENCE))
            if number % 2:
                mute.send(b"\x16\x03\x01")
            if number % 10 == 9:
                client = far.connect(
                    listener.address, client_ctx, server_hostname="localhost", timeout=PATIENCE
                )
                server = listener.accept(PATIENCE)
                exchange(client, server)
                client.abort()
                server.abort()
        until(lambda: listener.handshakes.used == 150)


# ── limits ──


def test_the_limit_of_handshakes_pauses_accepting_and_says_so_once(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    logs: list[Any],
    pool: ThreadPoolExecutor,
) -> None:
    with (
        b.listen(("127.0.0.1", 0), server_ctx, limits=bridge.Limits(handshakes=2)) as listener,
        contextlib.ExitStack() as stack,
    ):
        mutes = [stack.enter_context(socket.create_connection(listener.address)) for _ in range(2)]
        until(lambda: named(logs, "listener.paused"))
        honest = pool.submit(
            far.connect, listener.address, client_ctx, server_hostname="localhost", timeout=PATIENCE
        )
        with pytest.raises(TimeoutError):
            listener.accept(0.5)  # five times as long as it looks again
        assert not honest.done() and listener.handshakes.used == 2
        mutes[0].close()
        with honest.result(PATIENCE) as client:
            exchange_with_the_next(client, listener)
        until(lambda: named(logs, "listener.resumed"))
        paused, resumed = named(logs, "listener.paused"), named(logs, "listener.resumed")
        assert len(paused) == 1 and len(resumed) == 1, (paused, resumed)
        assert paused[0]["log_level"] == "warning" and "Limits.handshakes" in paused[0]["reason"]
        host, port = listener.address
        assert paused[0]["address"] == resumed[0]["address"] == f"{host}:{port}"


def test_the_limit_of_sessions_pauses_accepting(
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    logs: list[Any],
    pool: ThreadPoolExecutor,
) -> None:
    with (
        bridge.Bridge(workers=1, timeouts=QUICK, limits=bridge.Limits(sessions=2)) as b,
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
    ):

        def connect() -> bridge.Session:
            return far.connect(listener.address, client_ctx, server_hostname="localhost", timeout=PATIENCE)

        clients = [connect() for _ in range(2)]
        servers = [listener.accept(PATIENCE) for _ in range(2)]
        third = pool.submit(connect)
        until(lambda: named(logs, "listener.paused"))
        with pytest.raises(TimeoutError):
            listener.accept(0.5)
        assert not third.done() and len(b.snapshot().sessions) == 2
        exchange(clients[0], servers[0])
        clients[1].close()
        servers[1].close()
        with third.result(PATIENCE) as client:
            exchange_with_the_next(client, listener)
        clients[0].abort()
        servers[0].abort()
        assert len(named(logs, "listener.paused")) == 1
        assert "Limits.sessions" in named(logs, "listener.paused")[0]["reason"]


def test_a_shared_inbox_that_nobody_empties_pauses_accepting(
    far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, logs: list[Any]
) -> None:
    """Or else clients that come, say something and go would fill it without bound."""
    shared = bridge.Inbox()
    with bridge.Bridge(workers=1, timeouts=QUICK, limits=bridge.Limits(sessions=2)) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=shared)
        for number in (1, 2):
            far.connect(listener.address, client_ctx, server_hostname="localhost").abort()
            until(lambda: shared._ends == number)  # noqa: B023
        with socket.create_connection(listener.address):
            until(lambda: named(logs, "listener.paused"))
        assert "2 sessions in the shared inbox" in named(logs, "listener.paused")[0]["reason"]
        assert shared.get_nowait()[1] is None
        with far.connect(listener.address, client_ctx, server_hostname="localhost"):
            pass


def test_a_session_that_was_closed_before_anybody_had_it_is_not_handed_out(
    server_ctx: bridge.Context, tls_version: str
) -> None:
    with Lockstep() as lockstep:
        b = lockstep.bridge()
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        sock = socket.create_connection(listener.address)
        sock.setblocking(False)
        lockstep.sockets.append(sock)
        client = Raw(raw_context(tls_version), sock, False)
        lockstep.until(lambda: client.handshake() is not None and len(b._channels) == 1)
        (channel,) = b._channels
        with busy(b._coordinator):
            while channel.transport.state is not State.OPEN:
                client.handshake()
                b._workers[0].step(0.001)
            told = b._coordinator._mailbox.take()
            b._coordinator.close(channel, None)
            b._coordinator._mailbox.put(*told)  # behind it
        with capture_logs() as logs:
            lockstep.settle()
        assert listener.waiting() == 0 and not named(logs, "coordinator.failed")
        channel.worker.post(channel.transport, "abort", bridge.SessionAborted("enough"))
        lockstep.settle()


def test_sessions_that_failed_count_while_they_linger(
    far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, logs: list[Any]
) -> None:
    """Each has a descriptor, and how many may have one is what the limit is for."""

    class Refusing(bridge.codecs.Raw):
        def decode(self, data: bytes) -> list[bytes]:
            raise bridge.CodecError("no")

    timeouts = bridge.Timeouts(close_notify=PATIENCE)
    with bridge.Bridge(workers=1, timeouts=timeouts, limits=bridge.Limits(sessions=2)) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=Refusing)
        with contextlib.ExitStack() as stack:
            clients = [
                far.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(2)
            ]
            servers = [listener.accept(PATIENCE) for _ in clients]
            for client in clients:
                client.send(b"x")
            for server in servers:
                with pytest.raises(bridge.CodecError):
                    server.recv(PATIENCE)
            until(lambda: not b.snapshot().sessions)
            stack.enter_context(socket.create_connection(listener.address))
            until(lambda: named(logs, "listener.paused"))
            for client in clients:
                client.abort()
            with far.connect(listener.address, client_ctx, server_hostname="localhost"):
                pass
        b.close(timeout=0)


def test_many_messages_of_a_few_sessions_keep_nobody_out(
    far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    with bridge.Bridge(workers=1, timeouts=QUICK, limits=bridge.Limits(sessions=4)) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=bridge.codecs.Lines, inbox=shared)
        with far.connect(listener.address, client_ctx, server_hostname="localhost") as client:
            client.send(b"\n" * 100)
            until(lambda: shared.qsize() == 100)
            with far.connect(listener.address, client_ctx, server_hostname="localhost"):
                pass
            client.abort()


def test_a_crowd_of_clients_is_let_in_by_and_by(server_ctx: bridge.Context) -> None:
    with Lockstep() as lockstep, socket.create_server(("127.0.0.1", 0), backlog=200) as sock:
        ours = lockstep.bridge(limits=bridge.Limits(backlog=200))
        listener = ours.listen(sock.dup(), server_ctx)
        lockstep.settle()
        with contextlib.ExitStack() as stack:
            for _ in range(ACCEPT_BUDGET + 10):
                stack.enter_context(socket.create_connection(listener.address))
            counts = []
            while not counts or counts[-1] != ACCEPT_BUDGET + 10:
                ours._workers[0].step(PATIENCE)
                counts.append(listener.handshakes.used)
            assert counts[0] == ACCEPT_BUDGET
        listener.close()  # which does not wait for a thread that is not there


OUT_OF_DESCRIPTORS = """
import os, resource, socket, sys, threading
import bridge, structlog
from structlog.testing import capture_logs
certfile, keyfile, cafile = sys.argv[1:]
server_ctx = bridge.server_context(certfile, keyfile)
client_ctx = bridge.client_context(cafile)
pause = threading.Event()
def until(condition):
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise SystemExit("waited in vain")
def named(event):
    return [entry for entry in list(logs) if entry["event"] == event]
with capture_logs() as logs, bridge.Bridge(workers=1) as b:
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    client = b.connect(listener.address, client_ctx, server_hostname="localhost")
    server = listener.accept(30)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
    hogs = []
    try:
        while True:
            hogs.append(os.dup(0))
    except OSError:
        pass
    os.close(hogs.pop())
    waiting = socket.socket()  # the last one
    waiting.connect(listener.address)
    until(lambda: named("listener.paused"))
    for number in range(100):  # others go on meanwhile
        client.send(b"%d" % number)
        assert server.recv(30) == b"%d" % number
    pause.wait(0.5)
    assert len(named("listener.paused")) == 1, named("listener.paused")
    assert "Too many open files" in named("listener.paused")[0]["reason"]
    for hog in hogs:
        os.close(hog)
    waiting.close()
    late = b.connect(listener.address, client_ctx, server_hostname="localhost", timeout=30)
    until(lambda: named("listener.resumed"))
    peer = listener.accept(30)
    late.send(b"recovered")
    print(peer.recv(30).decode(), len(named("listener.paused")), len(named("listener.resumed")))
    for session in (client, server, late, peer):
        session.abort()
"""


@pytest.mark.skipif(os.name != "posix", reason="descriptors are limited like this on POSIX")
def test_out_of_descriptors_it_backs_off_says_so_once_and_recovers(
    server_cert: KeyPair, ca_file: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-X", "dev", "-W", "error", "-c", OUT_OF_DESCRIPTORS),
            *(server_cert.certfile, server_cert.keyfile, ca_file),
        ],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("recovered 1 1", "", 0)


# ── replacing the certificate ──


def serial(session: bridge.Session) -> int:
    certificate = session.info.peer_certificate
    assert certificate is not None
    return certificate.serial_number


def test_a_replaced_context_serves_new_sessions_while_old_ones_go_on(
    b: bridge.Bridge, far: bridge.Bridge, ca: trustme.CA, client_ctx: bridge.Context, logs: list[Any]
) -> None:
    leaves = [ca.issue_cert("localhost") for _ in range(3)]
    contexts = [bridge.server_context(leaf.private_key_and_cert_chain_pem.bytes()) for leaf in leaves]
    with b.listen(("127.0.0.1", 0), contexts[0]) as listener:
        pairs = []
        for context in contexts:
            listener.replace_context(context)
            client = far.connect(listener.address, client_ctx, server_hostname="localhost")
            pairs.append((client, listener.accept(PATIENCE)))
        serials = [serial(client) for client, _ in pairs]
        assert len(set(serials)) == 3
        for client, server in pairs:
            exchange(client, server)
        replaced = named(logs, "listener.context_replaced")
        host, port = listener.address
        assert [entry["address"] for entry in replaced] == [f"{host}:{port}"] * 3
        for session in (session for pair in pairs for session in pair):
            session.abort()


def test_a_bad_context_is_refused_and_the_old_one_stays(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    tmp_path: Path,
) -> None:
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        for bad in (client_ctx, ssl.create_default_context(), None, "cert.pem"):
            with pytest.raises(bridge.ConfigurationError, match="server_context"):
                listener.replace_context(bad)  # type: ignore[arg-type]
        with pytest.raises(bridge.ConfigurationError):
            listener.replace_context(bridge.server_context(str(tmp_path / "no-such-file.pem")))
        client = far.connect(listener.address, client_ctx, server_hostname="localhost")
        exchange_with_the_next(client, listener)
        client.abort()


def test_a_ready_made_context_may_replace_ours(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    server_cert: KeyPair,
    client_ctx: bridge.Context,
) -> None:
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.use_certificate_chain_file(server_cert.certfile)
    raw.use_privatekey_file(server_cert.keyfile)
    raw.set_min_proto_version(SSL.TLS1_2_VERSION)
    raw.set_max_proto_version(SSL.TLS1_2_VERSION)
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        listener.replace_context(raw)
        client = far.connect(listener.address, client_ctx, server_hostname="localhost")
        exchange_with_the_next(client, listener)
        assert client.info.version == "TLSv1.2"
        client.abort()


def test_contexts_replaced_under_load_fail_no_client(
    b: bridge.Bridge, far: bridge.Bridge, ca: trustme.CA, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    contexts = [
        bridge.server_context(ca.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
        for _ in range(2)
    ]
    over, seen = threading.Event(), set()

    def replace(listener: bridge.Listener) -> int:
        count = 0
        while not over.is_set():
            listener.replace_context(contexts[count % 2])
            count += 1
            over.wait(0.001)
        return count

    with b.listen(("127.0.0.1", 0), contexts[0]) as listener:
        replacing = pool.submit(replace, listener)
        try:
            for _ in range(60):
                client = far.connect(listener.address, client_ctx, server_hostname="localhost")
                exchange_with_the_next(client, listener)
                seen.add(serial(client))
                client.abort()
        finally:
            over.set()
        assert replacing.result(PATIENCE) > 10
    assert len(seen) == 2


# ── other addresses ──


@needs_unix
def test_a_unix_socket(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "socket")
    with b.listen(path, server_ctx) as listener:
        assert listener.address == path
        client = far.connect(path, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        exchange(client, server)
        assert path in client.name
        report = client.close()
        assert report.close_notify_sent
        with pytest.raises(bridge.EndOfStream):
            server.recv(PATIENCE)
        server.close()
        with pytest.raises(bridge.ConfigurationError, match="server_hostname"):
            far.connect(path, client_ctx)
    with pytest.raises(bridge.ConnectFailed, match=path):
        far.connect(path + "x", client_ctx, server_hostname="localhost")


@needs_unix
def test_a_path_can_be_had_again_as_soon_as_its_listener_is_closed(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "socket"
    for address in (str(path), bytes(path), "./socket"):
        with b.listen(address, server_ctx) as listener:
            client = far.connect(address, client_ctx, server_hostname="localhost")
            exchange_with_the_next(client, listener)
            client.abort()
            monkeypatch.chdir("/")
        assert not path.exists()
        monkeypatch.chdir(tmp_path)
    with bridge.Bridge(workers=1) as ended:
        ended.listen(str(path), server_ctx)
    assert not path.exists()


@needs_unix
def test_a_listener_that_meets_the_close_of_its_bridge_leaves_no_file(
    server_ctx: bridge.Context, tmp_path: Path
) -> None:
    b = bridge.Bridge(workers=1)

    def factory() -> bridge.codecs.Raw:
        b.close()
        return bridge.codecs.Raw()

    with pytest.raises(bridge.BridgeClosed):
        b.listen(str(tmp_path / "socket"), server_ctx, codec=factory)
    assert list(tmp_path.iterdir()) == []


@needs_unix
def test_a_listener_leaves_a_file_that_is_not_its_own(
    b: bridge.Bridge, server_ctx: bridge.Context, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with b.listen(str(path), server_ctx) as listener:
        path.unlink()
        with b.listen(str(path), server_ctx):
            listener.close()
            assert path.exists(), "it is a successor's"
    with b.listen(str(path), server_ctx):
        path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        b.listen(theirs, server_ctx).close()
    assert path.exists(), "whoever has bound the socket removes it"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no abstract names here")
def test_an_abstract_unix_socket_s_address_is_one_to_connect_to(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    tmp_path: Path,
) -> None:
    for name in (f"\0{tmp_path}", f"\0{tmp_path.name}:1".encode()):
        with b.listen(name, server_ctx) as listener:
            assert listener.address == (name if isinstance(name, bytes) else name.encode())
            client = far.connect(listener.address, client_ctx, server_hostname="localhost")
            server = listener.accept(PATIENCE)
            exchange(client, server)
            assert tmp_path.name in client.name and "@" in client.name and "\0" not in client.name
            assert [one.address[0] for one in b.snapshot().listeners] == ["@"]
            client.abort()
            server.abort()
    with pytest.raises(bridge.ConnectFailed, match=r"cannot connect to @no\\xff: "):
        far.connect(b"\0no\xff", client_ctx, server_hostname="localhost")


@needs_unix
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names are text here")
def test_a_path_that_is_no_text_is_shown_as_text(
    b: bridge.Bridge, server_ctx: bridge.Context, tmp_path: Path
) -> None:
    """Whoever logs or exports it can: a client chooses its own."""
    ours, theirs = (os.fsencode(tmp_path / name) + b"\xff" for name in ("ours", "theirs"))
    with b.listen(ours, server_ctx), socket.socket(socket.AF_UNIX) as client:
        client.bind(theirs)
        client.connect(ours)
        until(lambda: b.snapshot().sessions)
        seen = b.snapshot()
        assert seen.listeners[0].address == rf"{tmp_path}/ours\udcff"
        assert seen.sessions[0].name.endswith(rf" from {tmp_path}/theirs\udcff")


def link_local() -> tuple[str, int, int, int]:
    """An address of this machine that means nothing without its scope."""
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, index, _, scope, flags, _ = line.split()
        if int(scope, 16) == 0x20 and not int(flags, 16) & 0x48:  # neither tentative nor a duplicate
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), 0, 0, int(index, 16)
    pytest.skip("no interface with a link-local address of IPv6")


def test_the_scope_of_an_address_is_kept(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with b.listen(link_local(), server_ctx) as listener:
        assert listener.address[3] == link_local()[3]
        client = far.connect(listener.address, client_ctx, server_hostname="localhost")
        exchange_with_the_next(client, listener)
        client.abort()


def test_no_host_is_every_interface_of_ipv4(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ipv6_first(*asked: Any, **options: Any) -> list[Any]:
        return sorted(found_here(*asked, **options), reverse=True)

    found_here = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", ipv6_first)  # as some systems tell them
    with b.listen(("", 0), server_ctx) as listener:
        assert listener.address[0] == "0.0.0.0"
        client = far.connect(("127.0.0.1", listener.address[1]), client_ctx)
        exchange_with_the_next(client, listener)
        client.abort()


@needs_ipv6
def test_ipv6(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with b.listen(("::1", 0), server_ctx) as listener:
        assert listener.address[0] == "::1"
        client = far.connect(listener.address, client_ctx)  # the certificate is for the address
        server = listener.accept(PATIENCE)
        exchange(client, server)
        assert f"[::1]:{listener.address[1]}" in client.name
        client.abort()
        server.abort()


@needs_ipv6
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="IPv6 and IPv4 need a socket each here")
def test_every_interface_of_ipv6_and_ipv4(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    sock = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with b.listen(sock, server_ctx) as listener:
        for host in ("127.0.0.1", "::1"):
            client = far.connect((host, listener.address[1]), client_ctx)
            exchange_with_the_next(client, listener)
            client.abort()


@pytest.mark.parametrize("own", [False, True])
def test_a_backlog_beyond_what_the_kernel_counts(
    b: bridge.Bridge, far: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, own: bool
) -> None:
    where: Any = ("127.0.0.1", 0)
    if own:
        where = socket.socket()
        where.bind(("127.0.0.1", 0))
    with b.listen(where, server_ctx, limits=bridge.Limits(backlog=2**31)) as listener:
        client = far.connect(listener.address, client_ctx, server_hostname="localhost")
        exchange_with_the_next(client, listener)
        client.abort()


@pytest.mark.parametrize("listening", [False, True], ids=["bound", "listening"])
def test_a_socket_of_the_user_s_own(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    listening: bool,
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listening:
            sock.listen()
        address = sock.getsockname()
        with b.listen(sock, server_ctx) as listener:
            assert listener.address == address
            assert sock.fileno() == -1, "it was taken over"
            client = far.connect(address, client_ctx, server_hostname="localhost")
            exchange_with_the_next(client, listener)
            client.abort()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere options are not always inherited")
def test_options_of_a_socket_of_the_user_s_own_hold_for_sessions_too(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """Of what a listening socket accepts, and of what is adopted: there is no other way to set them."""
    keepalive = socket.SOL_SOCKET, socket.SO_KEEPALIVE
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(*keepalive, 1)
        with b.listen(sock, server_ctx) as listener:
            plain = socket.create_connection(listener.address)
            plain.setsockopt(*keepalive, 1)
            client = b.adopt(plain, client_ctx, server_hostname="localhost")
            for session in (client, listener.accept(PATIENCE)):
                there = session._channel.transport.sock
                assert there is not None and there.getsockopt(*keepalive) == 1
                session.abort()


def test_the_address_can_be_had_again_at_once(
    b: bridge.Bridge,
    far: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    pool: ThreadPoolExecutor,
) -> None:
    """A server that restarts must not wait for connections in TIME_WAIT."""
    address: Any = ("127.0.0.1", 0)
    for _ in range(3):
        with b.listen(address, server_ctx) as listener:
            address = listener.address
            client = far.connect(address, client_ctx, server_hostname="localhost")
            server = listener.accept(PATIENCE)
            client.send_eof()
            assert list(server) == []
            closing = pool.submit(server.close)  # first, so its end of the connection is the one that waits
            assert list(client) == []
            client.close()
            closing.result(PATIENCE)
            listener.close()
            with pytest.raises(bridge.ShutDown):
                listener.accept(PATIENCE)


def test_whoever_closes_a_listener_too_waits_for_it_to_be_closed_too(
    b: bridge.Bridge, server_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    with b._listeners._lock:  # which its worker takes before it says so
        closing = [pool.submit(listener.close)]
        until(lambda: listener._closed)
        closing.append(pool.submit(listener.close))
        assert not wait(closing, 0.05).done
    for one in closing:
        one.result(PATIENCE)


# ── a listener's story in the log ──


def test_a_listener_tells_its_life(b: bridge.Bridge, server_ctx: bridge.Context, logs: list[Any]) -> None:
    listener = b.listen(("127.0.0.1", 0), server_ctx, codec=codecs.Lines)
    listener.close()
    with pytest.raises(bridge.ShutDown):
        listener.accept(PATIENCE)
    host, port = listener.address
    assert named(logs, "listener.") == [
        {"event": "listener.started", "log_level": "info", "address": f"{host}:{port}"},
        {"event": "listener.closed", "log_level": "info", "address": f"{host}:{port}"},
    ]


# ── nobody accepts ──


@pytest.mark.parametrize("shared", [False, True], ids=["accept", "shared-inbox"])
def test_clients_that_come_and_go_cannot_fill_what_nobody_empties(
    shared: bool, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """A session that has ended still waits to be seen; so many may, and then new clients wait in the kernel."""
    inbox = bridge.Inbox() if shared else None
    limits = bridge.Limits(backlog=4, sessions=100 if not shared else 4)
    quick = bridge.Timeouts(connect=2.0, handshake=2.0, close_notify=0.1)
    with bridge.Bridge(workers=1, limits=limits) as b, bridge.Bridge(workers=1, timeouts=quick) as others:
        listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=inbox)
        reached = 0
        with pytest.raises(bridge.DeadlineExceeded):
            while reached < 30:
                reached += 1
                others.connect(listener.address, client_ctx, server_hostname="localhost").close(PATIENCE)
        assert 3 <= reached < 12
        assert listener.waiting() <= 8
        if inbox is None:
            listener.accept(PATIENCE).close()
        else:
            assert inbox.get(timeout=PATIENCE)[1] is None


def test_a_closed_listener_takes_no_new_context(server_ctx: bridge.Context) -> None:
    with bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        listener.close()
        with pytest.raises(bridge.ShutDown, match="closed"):
            listener.replace_context(server_ctx)
