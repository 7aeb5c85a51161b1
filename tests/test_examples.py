"""Each example, run as a script, in a real exchange."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import KeyPair
from dropin.daemons import Daemon, redis_server
from peers import Background, dial, receive_exactly, reset_on_close

import bridge

DEADLINE = 30.0
EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bridge.__file__).parents[1]), "PYTHONWARNINGS": "error"}
MLLP = lambda: bridge.codecs.Delimited(b"\x1c\r", start=b"\x0b")  # noqa: E731


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *arguments]


def run(name: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments),
        env=ENVIRONMENT,
        input=given,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


class Server:
    """An example that serves, under way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._stdout = process.stdout
        self.port = int(self.read_line().removeprefix("listening on "))

    def read_line(self) -> str:
        return self._stdout.readline().rstrip("\n")


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its status after Ctrl-C, and its complaints.  CPython looks for signals before it falls asleep, not while."""
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=DEADLINE / 3)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE / 3)
    return process.returncode, err


@contextlib.contextmanager
def serving(name: str, *arguments: str, warnings: str = "error") -> Iterator[Server]:
    """The example *name*, until Ctrl-C, after which it must end without complaint."""
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": warnings}
    with subprocess.Popen(
        command(name, *arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Server(process)
            assert interrupt(process) == (0, "")
        finally:
            process.kill()


def identity(pair: KeyPair) -> tuple[str, ...]:
    return ("--cert", pair.certfile, "--key", pair.keyfile)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_tested_here(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
    assert f'"{path.name}"' in Path(__file__).read_text()


def test_echo_server_and_client(server_cert: KeyPair, ca_file: str) -> None:
    lines = "".join(f"line {number} – with an umlaut: ü\n" for number in range(1000))
    with serving("echo_server.py", *identity(server_cert)) as server:
        ended = run("echo_client.py", "--cafile", ca_file, "--port", str(server.port), given=lines)
        assert (ended.returncode, ended.stdout) == (0, lines), ended.stderr
        assert ended.stderr.startswith("TLSv1.3, ")
        assert server.read_line().endswith(": done")


def test_echo_client_says_why_it_was_not_served(
    server_cert: KeyPair, client_cert: KeyPair, tmp_path: Path
) -> None:
    with serving("echo_server.py", *identity(server_cert)) as server:
        ended = run("echo_client.py", "--cafile", client_cert.certfile, "--port", str(server.port))
        assert ended.returncode == 1
        assert ended.stderr.startswith("CertificateError: ")
        assert ended.stderr.count("\n") == 1


def test_echo_client_says_that_the_answer_was_cut_off(
    server_cert: KeyPair, ca_file: str, background: Background
) -> None:
    def cut_off(sock: ssl.SSLSocket) -> None:
        line = sock.recv(100)
        assert sock.recv(100) == b""  # all is read, so that there is no reset
        sock.sendall(line)
        sock.shutdown(socket.SHUT_RDWR)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_cert.certfile, server_cert.keyfile)
    address, _ = background.serve_tls(context, cut_off)
    ended = run("echo_client.py", "--cafile", ca_file, "--port", str(address[1]), given="a line\n")
    assert (ended.returncode, ended.stdout) == (1, "a line\n")
    version, why = ended.stderr.splitlines()
    assert version.startswith("TLSv1.3, ") and why.startswith("Truncated: ")


def test_handler_pool_is_a_chat_room(server_cert: KeyPair, ca_file: str) -> None:
    context = bridge.client_context(ca_file)
    with serving("handler_pool.py", *identity(server_cert)) as server, bridge.Bridge(workers=1) as b:

        def enter(name: str) -> bridge.Session:
            guest = b.connect(
                ("127.0.0.1", server.port), context, server_hostname="localhost", codec=bridge.codecs.Lines
            )
            guest.send(name)
            assert guest.recv(timeout=DEADLINE) == f"* {name} has come"
            return guest

        ann = enter("Ann")
        bob = enter("Bob")
        assert ann.recv(timeout=DEADLINE) == "* Bob has come"
        for number in range(100):
            ann.send(f"{number}")
        for guest in (ann, bob):
            assert [guest.recv(timeout=DEADLINE) for _ in range(100)] == [f"Ann: {n}" for n in range(100)]
        bob.close()
        assert ann.recv(timeout=DEADLINE) == "* Bob has left"
        ann.close()


def test_starttls_there_and_back(server_cert: KeyPair, ca_file: str) -> None:
    ended = run("starttls.py", *identity(server_cert), "--cafile", ca_file)
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        "S: 220 mail.example.org ready",
        "S: 220 go ahead",
        "(now under TLS)",
        "S: 250 client.example.org, pleased to meet you over TLSv1.3",
        "(and back)",
        "S: 221 bye, in plain text",
    ]


@contextlib.contextmanager
def old_hl7_server() -> Iterator[str]:
    """Acknowledges each message of one plain connection, in two pieces; yields its HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(DEADLINE)

        def acknowledge() -> None:
            connection, _ = listening.accept()
            codec = MLLP()
            with connection:
                while data := connection.recv(65536):
                    for message in codec.decode(data):
                        frame = codec.encode(b"MSA|AA|" + message.split(b"|")[9])
                        connection.sendall(frame[:5])
                        connection.sendall(frame[5:])

        thread = threading.Thread(target=acknowledge)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_mllp_gateway_forwards_and_acknowledges(
    server_cert: KeyPair, client_cert: KeyPair, ca_file: str
) -> None:
    context = bridge.client_context(ca_file, certfile=client_cert.certfile, keyfile=client_cert.keyfile)
    with (
        old_hl7_server() as backend,
        serving(
            "mllp_gateway.py", *identity(server_cert), "--partners", ca_file, "--backend", backend
        ) as gateway,
        bridge.Bridge(workers=1) as b,
    ):
        partner = b.connect(
            ("127.0.0.1", gateway.port), context, server_hostname="localhost", codec=MLLP, timeout=DEADLINE
        )
        for number in range(20):
            partner.send(b"MSH|^~\\&|LAB|A|HIS|B|20261124||ORU^R01|MSG%05d|P|2.5\rPID|1" % number)
            assert partner.recv(timeout=DEADLINE) == b"MSA|AA|MSG%05d" % number
            assert f"message {number + 1}, " in gateway.read_line()
        partner.close()


def test_mllp_gateway_lets_no_stranger_in(server_cert: KeyPair, ca_file: str) -> None:
    arguments = (*identity(server_cert), "--partners", ca_file, "--backend", "127.0.0.1:9")
    with serving("mllp_gateway.py", *arguments) as gateway, bridge.Bridge(workers=1) as b:
        address = ("127.0.0.1", gateway.port)
        with pytest.raises(bridge.TLSError):  # TLS 1.3: the refusal comes after the client's handshake
            b.connect(
                address, bridge.client_context(ca_file), server_hostname="localhost", timeout=DEADLINE
            ).recv(timeout=DEADLINE)


def test_mllp_gateway_says_that_the_server_behind_it_is_down(
    server_cert: KeyPair, client_cert: KeyPair, ca_file: str
) -> None:
    context = bridge.client_context(ca_file, certfile=client_cert.certfile, keyfile=client_cert.keyfile)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening
        backend = f"127.0.0.1:{nobody.getsockname()[1]}"
        with (
            serving(
                "mllp_gateway.py", *identity(server_cert), "--partners", ca_file, "--backend", backend
            ) as gateway,
            bridge.Bridge(workers=1) as b,
        ):
            address = ("127.0.0.1", gateway.port)
            partner = b.connect(address, context, server_hostname="localhost", codec=MLLP, timeout=DEADLINE)
            assert "ConnectionRefusedError" in gateway.read_line()
            with pytest.raises(bridge.SessionEnded):
                partner.recv(timeout=DEADLINE)


# ── the parser in one place ──


@pytest.fixture(scope="module")
def redis(server_cert: KeyPair, ca_file: str) -> Iterator[Daemon]:
    with redis_server(server_cert, ca_file) as daemon:
        yield daemon


def test_redis_client_asks_everything_before_anything_is_answered(redis: Daemon, ca_file: str) -> None:
    commands = "SET visits 0\n" + "INCR visits\n" * 1000 + "GET visits\nLPUSH visits x\nECHO ü\n"
    ended = run("redis_client.py", ca_file, str(redis.port), given=commands)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        "OK",
        *map(str, range(1, 1001)),
        "1000",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "ü",
    ]


def test_redis_client_says_why_there_will_be_no_answer(redis: Daemon, ca_file: str) -> None:
    ended = run("redis_client.py", ca_file, str(redis.port), given="QUIT\nGET visits\n")
    assert ended.stdout == "OK\n"
    assert ended.stderr.splitlines()[-1].startswith(("bridge.errors.EndOfStream", "bridge.errors.Truncated"))


def test_http_server_answers_curl(server_cert: KeyPair, ca_file: str, curl: str, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(900_000))
    with serving("http_server.py", *identity(server_cert)) as server:
        site = f"https://localhost:{server.port}"
        command = [curl, "--silent", "--show-error", "--cacert", ca_file, "--http1.1", "--max-time", "20"]
        command += [f"{site}/one", "--next", *command[1:], "--data-binary", f"@{large}", f"{site}/two"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert said.stderr == ""
        pages = ["/one and 0 bytes", "/two and 900000 bytes"]
        assert said.stdout.splitlines() == pages


def test_http_server_keeps_pipelined_answers_in_order_and_ends_when_asked_to(
    server_cert: KeyPair, ca_file: str
) -> None:
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number for number in range(200))
    requests += b"HEAD /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    context = ssl.create_default_context(cafile=ca_file)
    with serving("http_server.py", *identity(server_cert)) as server:
        with context.wrap_socket(dial(("127.0.0.1", server.port)), server_hostname="localhost") as sock:
            sock.sendall(requests)
            with sock.makefile("rb") as answers:
                said = answers.read()
    assert re.findall(rb"^/(\d+) and", said, re.MULTILINE) == [b"%d" % number for number in range(200)]
    assert said.endswith(b"Connection: close\r\n\r\n"), "the answer to HEAD has no body"


def test_http_server_refuses_what_is_not_http(server_cert: KeyPair, ca_file: str) -> None:
    context = bridge.client_context(ca_file)
    with serving("http_server.py", *identity(server_cert)) as server, bridge.Bridge(workers=1) as b:
        session = b.connect(("127.0.0.1", server.port), context, server_hostname="localhost")
        session.send(b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n")
        with pytest.raises(bridge.SessionEnded):
            session.recv(timeout=DEADLINE)


def test_websocket_server_echoes_whole_messages(server_cert: KeyPair, ca_file: str) -> None:
    websocket = pytest.importorskip("websocket")
    with serving("websocket_server.py", *identity(server_cert)) as server:
        options = {"sslopt": {"ca_certs": ca_file}, "timeout": DEADLINE}
        connection = websocket.create_connection(f"wss://localhost:{server.port}/", **options)
        with contextlib.closing(connection.sock), contextlib.closing(connection):
            for size in (0, 1, 125, 126, 65_535, 65_536, 900_000):
                connection.send("ü" * (size // 2))
                assert connection.recv() == "ü" * (size // 2)
                connection.send_binary(bytes(size))
                assert connection.recv() == bytes(size)
            for index, part in enumerate((b"in ", b"three ", b"parts")):
                kind = websocket.ABNF.OPCODE_CONT if index else websocket.ABNF.OPCODE_BINARY
                connection.send_frame(websocket.ABNF.create_frame(part, kind, index == 2))
            assert connection.recv() == b"in three parts"
            connection.ping("are you there?")
            opcode, payload = connection.recv_data(control_frame=True)
            assert (opcode, payload) == (websocket.ABNF.OPCODE_PONG, b"are you there?")
            connection.send_close(1000, b"bye")
            opcode, payload = connection.recv_data(control_frame=True)
            assert (opcode, payload[2:]) == (websocket.ABNF.OPCODE_CLOSE, b"bye")


def test_websocket_server_bounds_a_message(server_cert: KeyPair, ca_file: str) -> None:
    websocket = pytest.importorskip("websocket")
    with serving("websocket_server.py", *identity(server_cert)) as server:
        options = {"sslopt": {"ca_certs": ca_file}, "timeout": DEADLINE}
        connection = websocket.create_connection(f"wss://localhost:{server.port}/", **options)
        with contextlib.closing(connection.sock), contextlib.closing(connection):
            connection.send_binary(bytes(1_000_001))
            with pytest.raises((OSError, websocket.WebSocketException)):
                connection.recv()


# ── legacy servers ──


def chat_lines(port: int, ca_file: str) -> None:
    """Two clients of the socketserver example hear each other."""
    context = ssl.create_default_context(cafile=ca_file)
    with contextlib.ExitStack() as stack:

        def enter(name: bytes) -> tuple[ssl.SSLSocket, BinaryIO]:
            sock = stack.enter_context(
                context.wrap_socket(dial(("127.0.0.1", port)), server_hostname="localhost")
            )
            sock.sendall(name + b"\n")
            heard = stack.enter_context(sock.makefile("rb"))
            assert heard.readline() == b"* %s has come\n" % name
            return sock, heard

        ann, to_ann = enter(b"Ann")
        bob, to_bob = enter(b"Bob")
        assert to_ann.readline() == b"* Bob has come\n"
        for sock, name in ((ann, b"Ann"), (bob, b"Bob")):
            sock.sendall(b"hello\n")
            assert [heard.readline() for heard in (to_ann, to_bob)] == [name + b": hello\n"] * 2


def test_socketserver_after_is_before_with_one_line_changed() -> None:
    before, after = (
        [line for line in (EXAMPLES / f"socketserver_{when}.py").read_text().splitlines()[5:] if line]
        for when in ("before", "after")
    )
    assert [line for line in before if line not in after] == ["import ssl"]
    assert [line for line in after if line not in before] == ["from bridge import ssl"]


def test_socketserver_before_is_frozen_by_one_silent_client(server_cert: KeyPair, ca_file: str) -> None:
    quietly = {"warnings": "ignore"}  # the standard library of 3.10 forgets a socket whose handshake failed
    with serving("socketserver_before.py", *identity(server_cert), **quietly) as server:
        chat_lines(server.port, ca_file)
        with dial(("127.0.0.1", server.port)), dial(("127.0.0.1", server.port)) as victim:
            victim.settimeout(0.5)
            context = ssl.create_default_context(cafile=ca_file)
            with pytest.raises(TimeoutError):
                context.wrap_socket(victim, server_hostname="localhost")


def test_socketserver_after_is_not(server_cert: KeyPair, ca_file: str) -> None:
    with serving("socketserver_after.py", *identity(server_cert)) as server:
        with dial(("127.0.0.1", server.port)):
            chat_lines(server.port, ca_file)


def test_selectors_loop_sends_each_subscriber_what_it_wants(server_cert: KeyPair, ca_file: str) -> None:
    context = bridge.client_context(ca_file)
    with (
        serving("selectors_loop.py", *identity(server_cert)) as server,
        bridge.Bridge(workers=1) as b,
        socket.socket(type=socket.SOCK_DGRAM) as source,
    ):
        source.connect(("127.0.0.1", int(server.read_line().removeprefix("datagrams on "))))

        def subscribe(start: str) -> bridge.Session:
            session = b.connect(
                ("127.0.0.1", server.port), context, server_hostname="localhost", codec=bridge.codecs.Lines
            )
            session.send(start)
            while True:  # until the loop has heard of it: it answers with nothing but what it relays
                source.send(f"{start} hello".encode())
                with contextlib.suppress(bridge.ReceiveTimeout):
                    session.recv(timeout=0.05)
                    return session

        errors, everything = subscribe("error"), subscribe("")
        for number in range(100):
            source.send(b"%s %d" % (b"error" if number % 2 else b"notice", number))
            while not (line := everything.recv(timeout=DEADLINE)).endswith(f" {number}"):
                assert line.endswith("hello"), "more than one may have been on its way"
        heard = [
            line for line in iter(lambda: errors.recv(timeout=DEADLINE), "error 99") if "hello" not in line
        ]
        assert heard == [f"error {number}" for number in range(1, 99, 2)]
        for session in (errors, everything):
            session.close()


def test_reverse_proxy_in_front_of_a_plain_http_server(
    server_cert: KeyPair, ca_file: str, curl: str, tmp_path: Path, background: Background
) -> None:
    (tmp_path / "large").write_bytes(random.Random(6).randbytes(3_000_000))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        serving_it = background.run(plain.serve_forever, 0.05)
        backend = f"127.0.0.1:{plain.server_address[1]}"
        with serving("reverse_proxy.py", *identity(server_cert), "--backend", backend) as server:
            command = [curl, "--silent", "--show-error", "--cacert", ca_file, "--max-time", "20"]
            command += [f"https://localhost:{server.port}/large"]
            said = subprocess.run(command, capture_output=True, timeout=DEADLINE)
        plain.shutdown()
        serving_it.result(DEADLINE)
    assert said.stderr == b""
    assert said.stdout == (tmp_path / "large").read_bytes()


def test_reverse_proxy_carries_either_end_and_no_cut_for_an_end(
    server_cert: KeyPair, ca_file: str, background: Background
) -> None:
    context = bridge.client_context(ca_file)

    def answer_at_the_end(sock: socket.socket) -> int:
        heard = receive_exactly(sock, 1 << 30)  # which comes to its end
        sock.sendall(heard[::-1])
        return len(heard)

    def cut(sock: socket.socket) -> None:
        sock.sendall(b"half of it")
        assert sock.recv(1)
        reset_on_close(sock)

    for work in (answer_at_the_end, cut):
        address, (result,) = background.serve(work)
        with (
            serving(
                "reverse_proxy.py", *identity(server_cert), "--backend", f"127.0.0.1:{address[1]}"
            ) as server,
            bridge.Bridge(workers=1) as b,
        ):
            session = b.connect(("127.0.0.1", server.port), context, server_hostname="localhost")
            if work is cut:
                assert session.recv(timeout=DEADLINE) == b"half of it"
                session.send(b"!")
                with pytest.raises((bridge.Truncated, bridge.PeerReset)):
                    session.recv(timeout=DEADLINE)
            else:
                session.send(bytes(range(256)) * 1000)
                session.send_eof()
                assert b"".join(session) == (bytes(range(256)) * 1000)[::-1]
            result.result(DEADLINE)
