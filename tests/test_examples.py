"""Each example, run as a script, in a real exchange."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import KeyPair

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


@contextlib.contextmanager
def serving(name: str, *arguments: str) -> Iterator[Server]:
    """The example *name*, until Ctrl-C, after which it must end without complaint."""
    with subprocess.Popen(
        command(name, *arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Server(process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=DEADLINE)
            assert (process.returncode, err) == (0, "")
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
