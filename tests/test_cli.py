"""The command line, run as people run it, and the demo's judges, who must find every fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from cryptography.hazmat.primitives import serialization
from test_context import to_pem

import bridge
from bridge import cli, demo

DEADLINE = 30.0
ROOT = str(Path(bridge.__file__).parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "error"}
WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from bridge.cli import main; sys.exit(main())"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "bridge"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.01)


class Echo:
    """`tls-bridge echo` under way."""

    def __init__(self, cert: KeyPair, *arguments: str, code: str | None = None) -> None:
        start = ["-c", code] if code else ["-m", "bridge"]
        self.process = subprocess.Popen(
            [sys.executable, *start, "echo", "--cert", cert.certfile, "--key", cert.keyfile, *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stopped = False
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        host, _, port = self.first_line.removeprefix("listening on ").strip().rpartition(":")
        self.address = (host.strip("[]"), int(port or 0))

    def stop(self, how: signal.Signals) -> None:
        """Ask it to end; a second signal could meet an interpreter that has put its handlers away."""
        if not self.stopped:
            self.stopped = True
            self.process.send_signal(how)

    def end(self) -> tuple[int, str, str]:
        """Exit status, the rest of stdout, and stderr."""
        self.stop(signal.SIGTERM)
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


@contextlib.contextmanager
def echoing(cert: KeyPair, *arguments: str, code: str | None = None) -> Iterator[Echo]:
    echo = Echo(cert, *(arguments or ("--listen", "127.0.0.1:0")), code=code)
    try:
        yield echo
        assert echo.end() == (0, "", "")
    finally:
        echo.process.kill()
        echo.process.communicate()


# ── echo ──


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signals that a thread may not get")
def test_a_signal_that_does_not_wake_the_main_thread_ends_echo_all_the_same(server_cert: KeyPair) -> None:
    """As one that comes just before it falls asleep does not; here another thread is the one the kernel interrupts."""
    code = (
        "import signal, sys, threading; from bridge.cli import main;"
        "threading.Thread(target=threading.Event().wait, daemon=True).start();"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM});"
        "sys.exit(main())"
    )
    with echoing(server_cert, code=code) as echo:
        assert echo.address[1] > 0


def test_echo_first_says_where_it_listens(server_cert: KeyPair) -> None:
    with echoing(server_cert) as echo:
        assert echo.first_line == f"listening on 127.0.0.1:{echo.address[1]}\n"
        assert echo.address[1] > 0
        socket.create_connection(echo.address, DEADLINE).close()


def test_echo_shows_an_ipv6_address_in_brackets(server_cert: KeyPair) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with echoing(server_cert, "--listen", "[::1]:0") as echo:
        assert echo.first_line == f"listening on [::1]:{echo.address[1]}\n"
        socket.create_connection(echo.address, DEADLINE).close()


def test_echo_returns_every_byte_to_the_standard_library(
    server_cert: KeyPair, ca_file: str, tls_version: str
) -> None:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[tls_version.replace(".", "_")]
    data = os.urandom(1_000_000)
    with (
        echoing(server_cert, "--listen", "127.0.0.1:0", "--workers", "2") as echo,
        socket.create_connection(echo.address, DEADLINE) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        assert client.version() == tls_version
        received = bytearray()
        for start in range(0, len(data), 50_000):  # one thread, so never more under way than buffers hold
            client.sendall(data[start : start + 50_000])
            while len(received) < min(start + 50_000, len(data)):
                came = client.recv(65536)
                assert came, f"the server hung up after {len(received)} bytes"
                received += came
        assert bytes(received) == data


def test_echo_talks_to_openssl_s_client(server_cert: KeyPair, ca_file: str, openssl: str) -> None:
    with echoing(server_cert) as echo:
        command = [
            openssl,
            "s_client",
            "-connect",
            f"127.0.0.1:{echo.address[1]}",
            "-servername",
            "localhost",
        ]
        command += ["-CAfile", ca_file, "-verify_return_error", "-quiet", "-no_ign_eof"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as client:
            assert client.stdin is not None and client.stdout is not None
            try:
                client.stdin.write(b"hello\n")
                client.stdin.flush()
                assert client.stdout.readline() == b"hello\n"
                client.stdin.close()
                assert client.wait(DEADLINE) == 0
            finally:
                client.kill()


def test_echo_returns_everything_after_a_half_close_in_order(server_cert: KeyPair, ca_file: str) -> None:
    context = bridge.client_context(ca_file)
    data = [os.urandom(500_000) for _ in range(6)]
    with echoing(server_cert) as echo, bridge.Bridge(workers=1) as b:
        sessions = [b.connect(echo.address, context, server_hostname="localhost") for _ in data]

        def send(session: bridge.Session, content: bytes) -> None:
            for start in range(0, len(content), 997):
                session.send(content[start : start + 997], timeout=DEADLINE)
            session.send_eof()

        senders = [threading.Thread(target=send, args=pair) for pair in zip(sessions, data, strict=True)]
        for sender in senders:
            sender.start()
        for session, content in zip(sessions, data, strict=True):
            assert b"".join(receive_all(session)) == content
        for sender in senders:
            sender.join()


def receive_all(session: bridge.Session) -> Iterator[bytes]:
    """What comes until the clean end; any other end raises, and so does silence."""
    try:
        while True:
            yield session.recv(timeout=DEADLINE)
    except bridge.EndOfStream:
        return


@pytest.mark.timeout(240)  # it computes all the time, and shares the machine with others
def test_peers_that_do_not_read_hold_up_nobody_else_and_lose_nothing(
    server_cert: KeyPair, ca_file: str
) -> None:
    context = bridge.client_context(ca_file)
    data = os.urandom(48_000_000)  # more than all buffers on the way there and back can hold
    with echoing(server_cert) as echo, bridge.Bridge(workers=1) as b:
        stuck = []
        for _ in range(cli.HANDLERS + 1):
            sock = socket.socket()
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, 16_384)
            sock.connect(echo.address)
            stuck.append(b.adopt(sock, context, server_hostname="localhost"))
            stuck[-1].send(data)
        wait_until(lambda: all(session.inbox.full() for session in stuck))
        wait_until_still(lambda: [session.outbox.qsize() for session in stuck])
        assert all(session.outbox.qsize() > 0 for session in stuck), "they are not stuck"
        with b.connect(echo.address, context, server_hostname="localhost") as other:
            for number in range(50):
                other.send(b"%d" % number)
                assert other.recv(timeout=DEADLINE) == b"%d" % number
        for session in stuck:
            session.send_eof()
            assert b"".join(receive_all(session)) == data


def wait_until_still(look: Callable[[], object]) -> None:
    """Until *look* sees the same for half a second."""
    seen, since, pause = look(), time.monotonic(), threading.Event()
    while time.monotonic() < since + 0.5:
        pause.wait(0.05)
        if (now := look()) != seen:
            seen, since = now, time.monotonic()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_echo_ends_with_status_0_and_a_clean_end_for_its_peers(
    server_cert: KeyPair, ca_file: str, how: signal.Signals
) -> None:
    context = bridge.client_context(ca_file)
    with echoing(server_cert) as echo, bridge.Bridge(workers=1) as b:
        session = b.connect(echo.address, context, server_hostname="localhost")
        session.send(b"hello")
        assert session.recv(timeout=DEADLINE) == b"hello"
        echo.stop(how)
        with pytest.raises(bridge.EndOfStream):
            session.recv(timeout=DEADLINE)
        session.close()


def test_echo_works_without_rich(server_cert: KeyPair) -> None:
    with echoing(server_cert, code=WITHOUT_RICH) as echo:
        assert echo.address[1] > 0


# ── a pool of handlers on one inbox, as echo has it ──


@contextlib.contextmanager
def two_peers(server_cert: KeyPair, ca_file: str) -> Iterator[tuple[bridge.Inbox, list[bridge.Session]]]:
    inbox = bridge.Inbox()
    with bridge.Bridge(workers=1) as b:
        address = b.listen(
            ("127.0.0.1", 0), bridge.server_context(*vars(server_cert).values()), inbox=inbox
        ).address
        context = bridge.client_context(ca_file)
        yield inbox, [b.connect(address, context, server_hostname="localhost") for _ in range(2)]


def test_messages_of_a_session_wait_while_a_handler_is_busy_with_it(
    server_cert: KeyPair, ca_file: str
) -> None:
    """Else the second handler's answer could overtake the first one's."""
    with two_peers(server_cert, ca_file) as (inbox, (one, two)):
        one.send(b"first")
        assert inbox.get(timeout=DEADLINE)[1] == b"first"  # this thread is the first handler, and busy
        one.send(b"second")
        wait_until(lambda: inbox.qsize() == 1)
        two.send(b"other")
        wait_until(lambda: inbox.qsize() == 2)
        taken: list[bytes] = []
        handler = threading.Thread(target=lambda: taken.append(inbox.get(timeout=DEADLINE)[1]))
        handler.start()
        handler.join()
        assert taken == [b"other"]
        assert inbox.get(timeout=DEADLINE)[1] == b"second"


def test_the_end_of_a_session_waits_while_a_handler_is_busy_with_it(
    server_cert: KeyPair, ca_file: str
) -> None:
    """Else the second handler, when it comes back, would close the session under the first one's answer."""
    with two_peers(server_cert, ca_file) as (inbox, (one, two)):
        one.send(b"question")
        session, _ = inbox.get(timeout=DEADLINE)  # this thread is the first handler, and busy
        one.send_eof()
        wait_until(lambda: inbox.qsize() == 1)
        two.send(b"other")
        wait_until(lambda: inbox.qsize() == 2)
        taken: list[tuple[bridge.Session, bytes | None]] = []

        def handle() -> None:
            taken.append(inbox.get(timeout=DEADLINE))
            with contextlib.suppress(bridge.ReceiveTimeout):
                taken.append(inbox.get(block=False))

        handler = threading.Thread(target=handle)
        handler.start()
        handler.join()
        assert [message for _, message in taken] == [b"other"]
        session.send(b"answer")
        assert inbox.get(timeout=DEADLINE) == (session, None)
        with pytest.raises(bridge.ReceiveTimeout):
            inbox.get(block=False)
        assert list(receive_all(one)) == [b"answer"]


def test_a_handler_outlives_a_peer_that_is_gone(server_cert: KeyPair, ca_file: str) -> None:
    with two_peers(server_cert, ca_file) as (inbox, (one, two)):
        one.send(b"nobody waits for the answer")
        wait_until(lambda: inbox.qsize() == 1)
        one.abort()
        wait_until(lambda: inbox.qsize() == 2)
        cli._start_handler(inbox)
        two.send(b"and here")
        assert two.recv(DEADLINE) == b"and here"
        inbox.shutdown()


def test_how_far_a_demo_is() -> None:
    class Run:
        plan = demo.Plan(seconds=8.0)

        def elapsed(self) -> float:
            return 2.0

        def received(self) -> demo.Traffic:
            return demo.Traffic(1, 3_000_000)

    run: Any = Run()
    assert cli._fraction(run) == 0.25
    run.plan = demo.Plan(megabytes=6.0)
    assert cli._fraction(run) == 0.5


# ── what is wrong is said in one line ──


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["echo"], "the following arguments are required: --listen, --cert, --key"),
        (["echo", "--listen", "8443", "--cert", "c", "--key", "k"], "'8443' is not HOST:PORT"),
        (["echo", "--listen", "::1:8443", "--cert", "c", "--key", "k"], "'::1:8443' is not HOST:PORT"),
        (["echo", "--listen", "h:http", "--cert", "c", "--key", "k"], "'http' is not a port"),
        (["echo", "--listen", "h:65536", "--cert", "c", "--key", "k"], "'65536' is not a port"),
        (["echo", "--listen", "h:1", "--cert", "c", "--key", "k", "--workers", "0"], "0 is not a positive"),
        (
            ["echo", "--listen", "h:1", "--cert", "c", "--key", "k", "--workers", "x"],
            "invalid int value: 'x'",
        ),
        (["demo", "--seconds", "0"], "0 is not a positive number"),
        (["demo", "--seconds", "nan"], "nan is not a positive number"),
        (["demo", "--seconds", "1", "--megabytes", "1"], "not allowed with"),
        (["demo", "--tls", "1.1"], "invalid choice: '1.1'"),
        (["demo", "--clients", "-1"], "-1 is not a positive number"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["connect", "h:1", "--linger", "nan"], "--linger: nan is neither 0 nor a positive number"),
        (["connect", "h:1", "--linger", "-1"], "--linger: -1 is neither 0 nor a positive number"),
        (["trace", "h:1", "--wait", "nan"], "--wait: nan is neither 0 nor a positive number"),
        (["trace", "h:1", "--wait", "-1"], "--wait: -1 is neither 0 nor a positive number"),
        (["trace", "h:1", "--wait", "x"], "invalid silence value: 'x'"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_bad_arguments_end_the_process_with_status_2() -> None:
    ended = run("echo", "--listen", "nowhere")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("missing.pem", "good", "missing.pem"),
        ("good", "missing.pem", "missing.pem"),
        ("good", "other", "key"),
        ("garbage", "good", "garbage"),
    ],
)
def test_bad_files(
    cert: str, key: str, says: str, server_cert: KeyPair, client_cert: KeyPair, tmp_path: Path
) -> None:
    (tmp_path / "garbage").write_text("not PEM at all")
    paths = {"garbage": str(tmp_path / "garbage"), "missing.pem": str(tmp_path / "missing.pem")}
    cert = {**paths, "good": server_cert.certfile}[cert]
    key = {**paths, "good": server_cert.keyfile, "other": client_cert.keyfile}[key]
    ended = run("echo", "--listen", "127.0.0.1:0", "--cert", cert, "--key", key)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("tls-bridge echo: error: ")
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def encrypted(pair: KeyPair, folder: Path) -> KeyPair:
    """*pair*, its key encrypted with the password "correct horse"."""
    path = folder / "encrypted.pem"
    key = serialization.load_pem_private_key(Path(pair.keyfile).read_bytes(), None)
    path.write_bytes(to_pem(key, b"correct horse"))
    return KeyPair(pair.certfile, str(path))


@pytest.mark.parametrize("content", [b"correct horse", b"correct horse\n", b"correct horse\r\nbattery\n"])
def test_the_password_of_a_key_is_the_first_line_of_a_file(
    content: bytes, server_cert: KeyPair, tmp_path: Path
) -> None:
    (tmp_path / "password").write_bytes(content)
    pair = encrypted(server_cert, tmp_path)
    with echoing(pair, "--listen", "127.0.0.1:0", "--password-file", str(tmp_path / "password")) as echo:
        socket.create_connection(echo.address, DEADLINE).close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the password in '{}': No such file or directory"),
        (b"correct\nhorse", "password for the private key in keyfile "),
        (b"\ncorrect horse", "the password given is empty"),
    ],
    ids=["missing", "wrong", "empty"],
)
def test_a_password_that_is_none_is_one_line(
    content: bytes | None, says: str, server_cert: KeyPair, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    pair = encrypted(server_cert, tmp_path)
    identity = ("--cert", pair.certfile, "--key", pair.keyfile, "--password-file", str(file))
    ended = run("echo", "--listen", "127.0.0.1:0", *identity)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert says.format(file) in ended.stderr


def test_an_address_in_use(server_cert: KeyPair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run("echo", "--listen", where, "--cert", server_cert.certfile, "--key", server_cert.keyfile)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"tls-bridge echo: error: cannot listen on {where}: Address already in use\n"


def test_version_and_help() -> None:
    assert run("--version").stdout == f"tls-bridge {bridge.__version__}\n"
    ended = run("echo", "--help")
    assert ended.returncode == 0
    assert "--listen HOST:PORT" in ended.stdout


@pytest.mark.parametrize("asked", ["--version", "--help"])
def test_a_help_that_cannot_be_written_is_as_any_output(asked: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outcomes = [(writer, (141, ""))]
    if os.path.exists("/dev/full"):
        said = "tls-bridge: error: No space left on device\n"
        outcomes.append((os.open("/dev/full", os.O_WRONLY), (2, said)))
    buffered = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    for descriptor, outcome in outcomes:
        with open(descriptor, "wb") as stdout:
            ended = subprocess.run(
                [sys.executable, "-m", "bridge", asked],
                env=buffered,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                timeout=DEADLINE,
            )
        assert (ended.returncode, ended.stderr) == outcome


# ── demo ──


@pytest.mark.parametrize("tls", ["1.2", "1.3", "both"])
def test_demo_moves_what_was_asked_for_and_finds_nothing_wrong(tls: str) -> None:
    ended = run("demo", "--megabytes", "8", "--clients", "2", "--tls", tls, "--seed", "7", "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout)
    assert result["ok"] is True
    assert result["faults"] == []
    assert result["seed"] == 7
    assert 8_000_000 <= result["bytes"] < 9_000_000
    assert [link["tls"] for link in result["links"]] == list(demo.VERSIONS[tls] * 2)[:2]
    assert all(link["resumed"] for link in result["links"])
    assert result["resumed_handshakes"] == 2
    ways = [link[way] for link in result["links"] for way in ("to_server", "to_client")]
    assert all(way["messages"] > 0 for way in ways)
    assert sum(way["bytes"] for way in ways) == result["bytes"]
    assert sum(way["messages"] for way in ways) == result["messages"]
    assert result["wants"]["read"]["read"] > 0
    assert result["wants_seen_by_application"] == {"read": 0, "write": 0}
    assert result["application_threads"] == 16
    assert result["seconds"] > 0
    assert result["bytes_per_second"] == pytest.approx(result["bytes"] / result["seconds"])


def test_demo_renegotiates_under_load_and_meets_full_buffers() -> None:
    ended = run("demo", "--seconds", "2", "--clients", "2", "--tls", "1.2", "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout)
    assert 1 <= result["renegotiations_done"] <= result["renegotiations_asked_for"]
    assert result["wants"]["write"]["write"] > 0
    assert [link["tiny_buffers"] for link in result["links"]] == [False, True]


def test_demo_prints_plainly_when_nobody_looks() -> None:
    ended = run("demo", "--megabytes", "2", "--clients", "1", code=WITHOUT_RICH)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(
        "2 MB of messages on 1 links (TLSv1.2 and TLSv1.3), 8 threads each, seed 1\n"
    )
    assert "\nSSL_read " in ended.stdout
    assert "\x1b" not in ended.stdout
    assert ended.stdout.endswith("\nEvery message arrived once, in order, and right in every byte.\n")


@pytest.mark.parametrize("code", [None, WITHOUT_RICH], ids=["rich", "without rich"])
def test_demo_on_a_terminal(code: str | None) -> None:
    pty = pytest.importorskip("pty")
    if code is None:
        pytest.importorskip("rich")
    master, slave = pty.openpty()
    start = ["-c", code] if code else ["-m", "bridge"]
    command = [sys.executable, *start, "demo", "--megabytes", "2", "--clients", "2"]
    with (
        open(master, "rb", buffering=0) as screen,
        subprocess.Popen(command, env={**ENVIRONMENT, "TERM": "xterm"}, stdout=slave) as process,
    ):
        os.close(slave)
        shown = b"".join(until_hung_up(screen.fileno())).decode()
        assert process.wait(DEADLINE) == 0
    assert ("┃" in shown) is (code is None)
    assert "the application saw" in shown
    assert "right in every byte" in shown


def until_hung_up(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # EIO: the last process has closed its end (pts(4))
            return
        if not data:
            return
        yield data


def test_a_demo_whose_reader_has_gone_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "bridge", "demo", "--seconds", "60", "--clients", "1"],
            env=ENVIRONMENT,
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_demo_can_be_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bridge", "demo", "--seconds", "60", "--clients", "1"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "60 seconds" in process.stdout.readline()
        assert "messages" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (130, "interrupted\n")


class Spoiled(bridge.codecs.LengthPrefixed):
    """Hands out messages as they are, but for one thing done to the first few, once in each session."""

    how: Callable[[list[bytes]], Iterable[bytes]]
    done = False

    def decode(self, data: bytes) -> list[bytes]:
        messages = list(super().decode(data))
        if self.done or len(messages) < 4:
            return messages
        self.done = True
        return list(type(self).how(messages))


def wrong_byte(messages: list[bytes]) -> list[bytes]:
    middle = len(messages[1]) // 2
    bent = bytes([messages[1][middle] ^ 1])
    return [messages[0], messages[1][:middle] + bent + messages[1][middle + 1 :], *messages[2:]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (wrong_byte, " instead of 0x"),
        (lambda messages: messages[1:], " missing, the first is "),
        (lambda messages: messages[:1] + messages, "too many"),
        (lambda messages: messages[::-1], " came after its message "),
    ],
    ids=["a wrong byte", "a lost message", "a message twice", "another order"],
)
def test_a_spoiled_demo_ends_with_status_1(
    how: Callable[[list[bytes]], list[bytes]],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "CODEC", type("Spoiling", (Spoiled,), {"how": staticmethod(how)}))
    monkeypatch.setattr(demo, "RECEIVERS", 1)
    assert cli.main(["demo", "--megabytes", "3", "--clients", "1", "--tls", "1.3"]) == 1
    out = capsys.readouterr().out
    assert says in out
    assert out.endswith("\nSOMETHING IS WRONG.\n")


def test_a_demo_that_cannot_go_on_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, *_ = demo.throw_away_authority()
    _, certificate, key = demo.throw_away_authority()
    monkeypatch.setattr(demo, "throw_away_authority", lambda: (other, certificate, key))
    assert cli.main(["demo", "--seconds", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tls-bridge demo: CertificateError: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory there can be is the system's to say")
@pytest.mark.parametrize("size", [2**40, 2**45])  # some threads can be had, or hardly one
def test_a_demo_for_which_there_are_too_few_threads_says_so(size: int) -> None:
    code = (
        f"import sys, threading; threading.stack_size({size}); from bridge.cli import main; sys.exit(main())"
    )
    ended = run("demo", "--clients", "50", code=code)
    assert (ended.returncode, ended.stderr) == (1, "tls-bridge demo: RuntimeError: can't start new thread\n")


# ── the judges ──


@pytest.fixture
def pattern() -> demo.Pattern:
    return demo.Pattern(seed=3)


@pytest.fixture
def judge(pattern: demo.Pattern) -> demo.Judge:
    """Of one receiver, to whom senders 4 and 5 send."""
    return demo.Judge(pattern, "here", [4, 5])


def faults(judge: demo.Judge, four: int, five: int) -> list[str]:
    return demo.compare("here", [judge], {4: four, 5: five})


def test_a_right_stream_has_no_fault(judge: demo.Judge, pattern: demo.Pattern) -> None:
    for sequence in range(100):
        judge.check(pattern.message(4, sequence))
        judge.check(pattern.message(5, sequence))
    assert faults(judge, 100, 100) == []
    assert judge.messages == 200
    assert judge.bytes == sum(len(pattern.message(s, n)) for s in (4, 5) for n in range(100))


def test_messages_differ_by_seed_sender_and_sequence() -> None:
    made = [demo.Pattern(a).message(b, c) for a in (1, 2) for b in (1, 2) for c in range(64)]
    assert len(set(made)) == len(made)
    assert demo.Pattern(1).message(1, 1) == demo.Pattern(1).message(1, 1)


def test_every_wrong_byte_is_found(pattern: demo.Pattern) -> None:
    message = pattern.message(4, 0)
    for position in range(len(message)):
        judge = demo.Judge(pattern, "here", [4, 5])
        judge.check(message[:position] + bytes([message[position] ^ 0x80]) + message[position + 1 :])
        assert faults(judge, 1, 0), position


def test_a_wrong_byte_is_named(judge: demo.Judge, pattern: demo.Pattern) -> None:
    message = bytearray(pattern.message(4, 0))
    right, message[9] = message[9], message[9] ^ 0xFF
    judge.check(bytes(message))
    assert faults(judge, 1, 0) == [
        f"here: message 0 of sender 4: byte 9 is {right ^ 0xFF:#04x} instead of {right:#04x}"
    ]


def test_a_missing_message_is_named(judge: demo.Judge, pattern: demo.Pattern) -> None:
    judge.check(pattern.message(4, 0))
    judge.check(pattern.message(4, 2))
    assert faults(judge, 3, 1) == [
        "here: 1 of 3 messages of sender 4 are missing, the first is 1",
        "here: 1 of 1 messages of sender 5 are missing, the first is 0",
    ]


def test_swapped_messages_are_named(judge: demo.Judge, pattern: demo.Pattern) -> None:
    judge.check(pattern.message(4, 1))
    judge.check(pattern.message(4, 0))
    assert faults(judge, 2, 0) == ["here: message 0 of sender 4 came after its message 1"]


def test_a_message_that_two_receivers_got_is_named(pattern: demo.Pattern) -> None:
    judges = [demo.Judge(pattern, "here", [4]) for _ in range(2)]
    for judge in judges:
        judge.check(pattern.message(4, 0))
    assert demo.compare("here", judges, {4: 1}) == ["here: 1 messages of sender 4 too many"]


def test_two_receivers_may_share_a_stream(pattern: demo.Pattern) -> None:
    judges = [demo.Judge(pattern, "here", [4]) for _ in range(2)]
    for sequence in range(10):
        judges[sequence % 3 == 0].check(pattern.message(4, sequence))
    assert demo.compare("here", judges, {4: 10}) == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda message: message[:3], "here: a message of 3 bytes, too short to be one"),
        (lambda message: message[:-1], "bytes instead of"),
        (lambda message: message + b"x", "bytes instead of"),
        (lambda message: b"\0\7" + message[2:], "here: a message of sender 7, which does not send here"),
    ],
    ids=["too short", "cut", "longer", "a stranger's"],
)
def test_a_misshapen_message_is_named(
    spoil: Callable[[bytes], bytes], says: str, judge: demo.Judge, pattern: demo.Pattern
) -> None:
    judge.check(spoil(pattern.message(4, 0)))
    assert any(says in fault for fault in faults(judge, 1, 0))


def test_an_exception_in_a_receiver_is_a_fault(judge: demo.Judge) -> None:
    judge.failed(bridge.Truncated(8, "cut off"))
    assert faults(judge, 0, 0) == ["here: a receiver got Truncated: cut off"]


def test_a_flood_of_faults_is_cut_short(judge: demo.Judge) -> None:
    for _ in range(1000):
        judge.check(b"")
    assert len(faults(judge, 0, 0)) == demo.MOST_FAULTS
