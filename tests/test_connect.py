"""`tls-bridge connect` and `trace` against real servers: who is there, what passes, and why it failed."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from peers import Background, Program, receive_exactly, reset_on_close
from test_cli import DEADLINE, ENVIRONMENT, encrypted, run, wait_until_still
from test_context import DNS, EDI, names_extension, self_signed, to_pem

import bridge
from bridge import cli, starttls
from bridge.arguments import alpn
from bridge.connect_command import _certificate, _converse, _names, _speak, printable
from bridge.explain import explain
from bridge.trace_command import _style


def server_context(pair: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certfile, pair.keyfile)
    return context


def told(address: Any, *arguments: str) -> list[str]:
    return ["connect", f"localhost:{address[1]}", "--timeout", "5", *arguments]


def until_end(sock: socket.socket) -> bytes:
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except OSError:
        pass
    return b"".join(parts)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(list(arguments))
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1 and said.err.startswith("tls-bridge ")
    return status, said.err


# ── who is there, and a pipe ──


def test_stdin_reaches_the_peer_and_its_answer_stdout(server_cert: KeyPair, ca_file: str) -> None:
    content = bytes(range(256)) * 2000
    context = bridge.server_context(server_cert.certfile, server_cert.keyfile, alpn=["x"])
    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), context) as listener:
        command = told(listener.address, "--cafile", ca_file, "--alpn", "x")
        with subprocess.Popen(
            [sys.executable, "-m", "bridge", *command],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(content)
            process.stdin.close()
            session = listener.accept(timeout=DEADLINE)
            received = b"".join(session)  # to the end of stdin
            session.send(received[::-1])
            session.close(timeout=DEADLINE)
            assert process.stdout.read() == content[::-1]
            report = process.stderr.read().decode()
            assert process.wait(DEADLINE) == 0
    assert received == content
    assert "verified as localhost" in report and "TLSv1.3" in report and "ALPN x" in report
    assert "for localhost, 127.0.0.1, ::1" in report and "days left" in report


def test_json_says_who_the_server_is(server_cert: KeyPair, ca_file: str, openssl: str) -> None:
    identity = ("-cert", server_cert.certfile, "-key", server_cert.keyfile)
    with Program(
        openssl, "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-tls1_2", *identity
    ) as peer:
        result = run(*told(("", peer.port()), "--cafile", ca_file, "--json"))
        assert result.returncode == 0, result.stderr
        facts = json.loads(result.stdout)
    assert (facts["ok"], facts["version"], facts["verified"], facts["alpn"]) == (True, "TLSv1.2", True, None)
    assert "localhost" in facts["chain"][0]["names"]
    assert facts["chain"][0]["issuer"] == facts["chain"][1]["subject"]
    assert datetime.datetime.fromisoformat(facts["chain"][0]["not_after"]).tzinfo is not None


def test_insecure_says_so(server_cert: KeyPair, background: Background, capsys: Any) -> None:
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    assert cli.main(told(address, "--insecure", "--info")) == 0
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_a_client_certificate_is_shown(
    server_cert: KeyPair, client_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    context = server_context(server_cert)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca_file)
    address, results = background.serve_tls(context, lambda sock: sock.getpeercert())
    own = ("--cert", client_cert.certfile, "--key", client_cert.keyfile)
    assert cli.main(told(address, "--cafile", ca_file, "--info", *own)) == 0
    assert "alice@example.org" in str(results[0].result(DEADLINE))
    capsys.readouterr()


@pytest.mark.parametrize("command", ["connect", "trace"])
def test_the_key_of_a_client_may_be_encrypted(
    command: str,
    server_cert: KeyPair,
    client_cert: KeyPair,
    ca_file: str,
    background: Background,
    tmp_path: Path,
    capsys: Any,
) -> None:
    context = server_context(server_cert)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca_file)
    address, results = background.serve_tls(context, lambda sock: sock.getpeercert())
    (tmp_path / "password").write_text("correct horse\n")
    pair = encrypted(client_cert, tmp_path)
    own = ("--cert", pair.certfile, "--key", pair.keyfile, "--password-file", str(tmp_path / "password"))
    _, *words = told(address, "--cafile", ca_file, *own, "--json")
    assert cli.main([command, *words]) in (0, 1)  # the stdlib's server may hang up without a word
    assert "alice@example.org" in str(results[0].result(DEADLINE))
    capsys.readouterr()


def test_a_password_that_cannot_be_read_is_not_taken_for_the_peer(capsys: Any) -> None:
    status, said = fails(capsys, "connect", "localhost:1", "--cert", "c.pem", "--password-file", "/nowhere")
    assert status == 2 and "cannot read the password in '/nowhere'" in said


def test_what_the_peer_says_does_not_reach_the_terminal_unseen() -> None:
    assert printable("a\x1b[2Jb\r\n") == "a�[2Jb��"


# ── what becomes of our own output ──


@pytest.fixture
def greeter(server_cert: KeyPair, background: Background) -> list[str]:
    """`connect` to a server that says hello, and good bye at the end."""

    def greet(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"hello")
        until_end(sock)
        sock.unwrap()

    address, _ = background.serve_tls(server_context(server_cert), greet)
    return told(address, "--insecure")


@pytest.mark.parametrize("more", [(), ("--info",), ("--json",)], ids=" ".join)
def test_who_reads_no_more_is_not_taken_for_the_peer(greeter: list[str], more: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        status, said = speaks(sys.executable, "-m", "bridge", *greeter, *more, stdout=closed)
    assert status == 141
    assert "ended badly" not in said and "roken" not in said and ("connected to" in said) is (not more)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("more", [(), ("--info",), ("--json",)], ids=" ".join)
def test_a_full_disk_is_not_taken_for_the_peer(greeter: list[str], more: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        status, said = speaks(sys.executable, "-m", "bridge", *greeter, *more, stdout=full)
    assert status == 2
    assert said.splitlines()[-1] == "tls-bridge connect: error: No space left on device"
    assert "ended badly" not in said and ("connected to" in said) is (not more)


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(greeter: list[str], closing: str) -> None:
    command = f'exec "$@" {closing}'
    status, said = speaks("sh", "-c", command, "sh", sys.executable, "-m", "bridge", *greeter)
    assert status == 0 and ("connected to" in said) is ("2>" not in closing)


def speaks(
    *command: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.DEVNULL
) -> tuple[int, str]:
    ended = subprocess.run(
        command,
        env=ENVIRONMENT,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def test_names_that_stdout_cannot_spell_are_spelt_out(
    ca: trustme.CA, background: Background, tmp_path: Path
) -> None:
    pair = write_key_pair(ca.issue_cert("localhost", common_name="Zürich"), tmp_path)
    address, _ = background.serve_tls(server_context(pair), until_end)
    ended = subprocess.run(
        [sys.executable, "-m", "bridge", *told(address, "--insecure", "--info")],
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (ended.returncode, ended.stderr) == (0, "") and r"CN=Z\xfcrich" in ended.stdout


def test_ctrl_c_does_not_wait_for_a_server_that_does_not_read(
    server_cert: KeyPair, background: Background
) -> None:
    over = threading.Event()
    address, _ = background.serve_tls(server_context(server_cert), lambda _: over.wait(DEADLINE))
    with subprocess.Popen(
        [sys.executable, "-m", "bridge", *told(address, "--insecure")],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        assert b"connected to" in process.stderr.readline()
        pipe, pushed = process.stdin.fileno(), [0]
        os.set_blocking(pipe, False)

        def push() -> int:
            with contextlib.suppress(BlockingIOError):
                while True:
                    pushed[0] += os.write(pipe, bytes(65_536))
            return pushed[0]

        wait_until_still(push)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(DEADLINE / 2) == 130
            assert process.stderr.read().endswith(b"interrupted\n")
        finally:
            over.set()
            process.kill()


# ── why there is no session ──


def test_a_self_signed_or_unknown_authority_is_explained(
    server_cert: KeyPair, background: Background, capsys: Any, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    status, said = fails(capsys, *told(address, "--cafile", str(tmp_path / "other.pem")))
    assert status == 5 and "not trusted here" in said and "--cafile" in said


def test_an_expired_certificate_is_explained(
    ca: trustme.CA, ca_file: str, background: Background, capsys: Any, tmp_path: Path
) -> None:
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=3)
    pair = write_key_pair(ca.issue_cert("localhost", not_before=past, not_after=past), tmp_path)
    address, _ = background.serve_tls(server_context(pair), until_end)
    status, said = fails(capsys, *told(address, "--cafile", ca_file))
    assert status == 5 and "has expired" in said


def test_a_wrong_name_is_explained(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    status, said = fails(capsys, *told(address, "--cafile", ca_file, "--server-name", "example.org"))
    assert status == 5 and "another name" in said and "example.org" in said and "localhost" in said


def test_a_plain_server_is_explained(background: Background, capsys: Any) -> None:
    address, _ = background.serve(lambda sock: (sock.sendall(b"220 mail.example.org\r\n"), until_end(sock)))
    status, said = fails(capsys, *told(address))
    assert status == 6 and "does not speak TLS" in said and "SMTP" in said and "--starttls" in said


def test_an_old_version_is_explained(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    context = server_context(server_cert)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    address, _ = background.serve_tls(context, until_end)
    status, said = fails(capsys, *told(address, "--cafile", ca_file, "--min", "TLSv1.3"))
    assert status == 6 and "no version of TLS" in said


def test_no_common_cipher_is_explained(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    context = server_context(server_cert)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA")
    address, _ = background.serve_tls(context, until_end)
    status, said = fails(capsys, *told(address, "--cafile", ca_file))
    assert status == 6 and "no cipher suite in common" in said


def test_a_demand_for_a_client_certificate_is_explained(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any, tls_version: str
) -> None:
    context = server_context(server_cert)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca_file)
    address, _ = background.serve_tls(context, until_end)
    status, said = fails(capsys, *told(address, "--cafile", ca_file, "--max", tls_version, "--info"))
    assert status == 6 and "client certificate" in said and "--cert" in said


def test_no_common_protocol_is_explained(
    server_cert: KeyPair, ca_file: str, openssl: str, capsys: Any
) -> None:
    identity = ("-cert", server_cert.certfile, "-key", server_cert.keyfile, "-alpn", "h2")
    with Program(openssl, "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", *identity) as peer:
        status, said = fails(capsys, *told(("", peer.port()), "--cafile", ca_file, "--alpn", "x"))
    assert status == 6 and "none of the protocols offered by --alpn" in said


def test_a_server_that_ignores_the_protocols_offered_is_told_of(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    assert cli.main(told(address, "--cafile", ca_file, "--alpn", "h2", "--info")) == 0
    assert "ALPN none (offered: h2)" in capsys.readouterr().out


def test_a_server_that_does_not_know_the_name_is_explained(
    server_cert: KeyPair, ca_file: str, openssl: str, capsys: Any, tls_version: str
) -> None:
    identity = ("-cert", server_cert.certfile, "-key", server_cert.keyfile)
    names = ("-servername", "a.example", "-servername_fatal", "-cert2", server_cert.certfile)
    names += ("-key2", server_cert.keyfile)
    with Program(openssl, "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", *identity, *names) as peer:
        status, said = fails(
            capsys, *told(("", peer.port()), "--cafile", ca_file, "--max", tls_version, "--info")
        )
    assert status == 6 and "it does not know the name" in said and "--server-name" in said


def test_a_port_where_nobody_listens_is_explained(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    status, said = fails(capsys, "connect", f"127.0.0.1:{address[1]}")
    assert status == 3 and "refused" in said


@contextlib.contextmanager
def deaf() -> Iterator[Any]:
    """An address whose backlog is full, as of a host that does not answer."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()


def have_addresses(monkeypatch: pytest.MonkeyPatch, *addresses: Any) -> None:
    """Every host has them."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
def test_all_addresses_of_a_host_have_one_time_together(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with deaf() as address:
        have_addresses(monkeypatch, *[address] * 12)
        begun = time.monotonic()
        status, said = fails(capsys, "connect", "many.example:1", "--timeout", "1")
        assert status == 3 and "no answer in time" in said
        assert time.monotonic() - begun < 6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    server_cert: KeyPair, ca_file: str, background: Background, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    with deaf() as silent:
        have_addresses(monkeypatch, silent, address)
        assert cli.main(["connect", "localhost:1", "--cafile", ca_file, "--timeout", "3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["peer"].endswith(str(address[1]))


def test_a_host_is_asked_for_by_the_name_that_its_certificate_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[Any] = []

    def getaddrinfo(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    status, _ = fails(capsys, "connect", "straße.example:443")
    assert (status, asked) == (3, ["xn--strae-oqa.example"])


@pytest.mark.parametrize("more", [(), ("--server-name", "b.example")], ids=["alone", "with a server name"])
@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "\N{SNOWMAN}.example"])
def test_what_is_no_name_of_a_host_is_said_in_one_line(host: str, more: tuple[str, ...], capsys: Any) -> None:
    status, said = fails(capsys, "connect", f"{host}:443", *more)
    assert status == 2 and host in said


def test_blanks_between_protocols_are_not_offered() -> None:
    assert alpn(argparse.Namespace(alpn="h2, http/1.1 ,")) == ["h2", "http/1.1"]


def test_a_damaged_record_after_the_handshake_is_a_bad_end(
    server_cert: KeyPair, ca_file: str, background: Background
) -> None:
    heard = threading.Event()

    def damage(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"hello")
        assert heard.wait(DEADLINE)
        with socket.socket(fileno=sock.detach()) as plain:
            plain.sendall(b"\x17\x03\x03\0\x40" + bytes(64))
            until_end(plain)

    address, _ = background.serve_tls(server_context(server_cert), damage)
    with subprocess.Popen(
        [sys.executable, "-m", "bridge", *told(address, "--cafile", ca_file)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5) == b"hello"
        heard.set()
        said = process.stderr.read().decode()
        assert process.wait(DEADLINE) == 1
    assert "ended badly" in said.splitlines()[-1]


def test_silence_is_explained(background: Background, capsys: Any) -> None:
    address, _ = background.serve(until_end)
    status, said = fails(capsys, *told(address, "--timeout", "0.3"))
    assert status == 6 and "did not answer the handshake" in said


def test_a_peer_that_hangs_up_is_explained_in_json_as_well(background: Background, capsys: Any) -> None:
    address, _ = background.serve(lambda sock: sock.recv(1))
    assert cli.main(told(address, "--json")) == 6
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False and said["status"] == 6 and "hung up" in said["error"]


def tls_error(reason: str) -> bridge.TLSError:
    error = bridge.TLSError(1, f"[SSL: {reason}] {reason.lower()}")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "status", "words"),
    [
        ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", 1, "the session ended badly: [SSL: DECRYPTION_FAILED"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", 6, "it demands a client certificate"),
    ],
)
def test_a_tls_error_after_the_handshake_is_no_failed_handshake_unless_it_says_so(
    reason: str, status: int, words: str
) -> None:
    code, sentence = explain(tls_error(reason), "h:1", settled=True)
    assert code == status and sentence.startswith(f"h:1: {words}")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), 3, "h:1: there is no such host"),
        (TimeoutError(), 3, "h:1: no answer in time"),
        (OSError(113, "No route to host"), 3, "h:1: cannot connect: No route to host"),
        (RuntimeError("strange"), 3, "h:1: cannot connect: strange"),
        (tls_error("BAD_SIGNATURE"), 6, "h:1: the handshake failed: [SSL: BAD_SIGNATURE]"),
        (tls_error("TLSV1_UNRECOGNIZED_NAME"), 6, "h:1: it does not know the name"),
    ],
    ids=str,
)
def test_what_else_can_go_wrong_is_explained(error: Exception, status: int, words: str) -> None:
    code, sentence = explain(error, "h:1")
    assert code == status and sentence.startswith(words)


def test_unusable_files_are_status_2(capsys: Any) -> None:
    status, said = fails(capsys, "connect", "localhost:1", "--cafile", "/nowhere.pem")
    assert status == 2 and "/nowhere.pem" in said
    assert cli.main(["connect", "localhost:1", "--cafile", "/nowhere.pem", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["status"]) == (False, 2) and "/nowhere.pem" in said["error"]


def test_a_silence_after_all_was_said_is_the_end(
    server_cert: KeyPair, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = bridge.Timeouts(close_notify=0.1)
    near, far = socket.socketpair()
    with bridge.Bridge(workers=1, timeouts=quick) as b:
        client = b.adopt(near, bridge.client_context(ca_file), server_hostname="localhost", wait=False)
        server = b.adopt(far, bridge.server_context(server_cert.certfile, server_cert.keyfile), wait=False)
        words = [b"", b"a question"]
        monkeypatch.setattr(os, "read", lambda *_: words.pop())
        assert _converse(client, 0.6) == 0
        assert b"".join(server) == b"a question"
        server.close()


def test_it_is_not_silence_while_stdin_goes_on(
    server_cert: KeyPair, ca_file: str, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    words: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with bridge.Bridge(workers=1, timeouts=bridge.Timeouts(close_notify=0.1)) as b:
        client = b.adopt(near, bridge.client_context(ca_file), server_hostname="localhost", wait=False)
        server = b.adopt(far, bridge.server_context(server_cert.certfile, server_cert.keyfile))
        monkeypatch.setattr(os, "read", lambda *_: words.get())
        conversation = background.run(_converse, client, 0.0)
        assert not wait([conversation], 1.0).done
        for word in (b"late", b""):
            words.put(word)
        assert b"".join(server) == b"late"
        assert conversation.result(DEADLINE) == 0
        server.close()


def test_it_is_not_silence_while_what_was_said_is_on_its_way(
    server_cert: KeyPair, ca_file: str, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = bridge.Timeouts(flush=0.1, close_notify=0.1)
    room = bridge.Limits(outbox_bytes=2_000_000)
    near, far = socket.socketpair()
    with bridge.Bridge(workers=1, timeouts=hasty) as b:
        client = b.adopt(
            near, bridge.client_context(ca_file), server_hostname="localhost", limits=room, wait=False
        )
        context = bridge.server_context(server_cert.certfile, server_cert.keyfile)
        server = b.adopt(far, context, limits=bridge.Limits(inbox_bytes=1))
        words = [b"", *[bytes(10_000)] * 150]  # more than the kernel takes, and all of it is accepted
        monkeypatch.setattr(os, "read", lambda *_: words.pop())
        conversation = background.run(_converse, client, 0.1)
        assert not wait([conversation], 1.5).done
        assert len(b"".join(server)) == 1_500_000
        assert conversation.result(DEADLINE) == 0
        server.close()


def test_a_stdin_that_cannot_be_read_is_no_end_of_it(greeter: list[str]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb") as mute, open(writer, "wb"):
        status, said = speaks(sys.executable, "-m", "bridge", *greeter, stdin=mute)
    assert status == 2
    assert said.splitlines()[-1].startswith("tls-bridge connect: error: cannot read stdin: ")


def test_whoever_speaks_to_a_session_that_has_ended_leaves_it_to_the_receiver(
    server_cert: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    near, far = socket.socketpair()
    with bridge.Bridge(workers=1) as b, far:
        session = b.adopt(near, context, wait=False)
        session.abort()
        monkeypatch.setattr(os, "read", lambda *_: b"x")
        failures: list[OSError] = []
        _speak(session, failures)
        assert failures == []


def test_names_that_are_no_names_of_hosts_are_left_out(ca: trustme.CA) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.RegisteredID(x509.ObjectIdentifier("1.2.3")), x509.DNSName("a.example")]
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    assert list(_names(builder.sign(key, hashes.SHA256()))) == ["a.example"]


def test_a_name_of_a_kind_that_cannot_be_read_is_no_crash(
    background: Background, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = self_signed(
        extension=names_extension((EDI, b"\xa1\x05\x0c\x03abc"), (DNS, b"localhost"))
    )
    pair = KeyPair(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    Path(pair.certfile).write_bytes(to_pem(certificate))
    Path(pair.keyfile).write_bytes(to_pem(key))
    address, _ = background.serve_tls(server_context(pair), until_end)
    status, said = fails(capsys, *told(address, "--cafile", pair.certfile, "--info"))
    assert status == 5 and "holds damaged names" in said and "EDIPartyName" in said
    address, _ = background.serve_tls(server_context(pair), until_end)
    assert cli.main(told(address, "--insecure", "--info")) == 0
    assert "CN=a.example" in capsys.readouterr().out


def test_a_subject_that_cannot_be_read_is_no_crash() -> None:
    """Latin letters in a string of ASCII: a company's umlaut, in an old certificate."""
    certificate, _ = self_signed(name="Muller")
    der = certificate.public_bytes(serialization.Encoding.DER).replace(b"Muller", b"M\xfcller")
    shown = _certificate(x509.load_der_x509_certificate(der))
    assert shown["subject"] == shown["issuer"] == "(a name that cannot be read)"


# ── STARTTLS ──

Turn = bytes | str
"""What the server says, or what it waits for."""
DIALOGUES: dict[str, list[Turn]] = {
    "smtp": [
        b"220-mail\r\n220 ready\r\n",
        "EHLO localhost\r\n",
        b"250-mail\r\n250-STARTTLS\r\n250\r\n",
        "STARTTLS\r\n",
        b"220 go ahead\r\n",
    ],
    "imap": [b"* ok ready\r\n", "a1 STARTTLS\r\n", b"* NOTE\r\na1 ok begin\r\n"],
    "pop3": [b"+OK ready\r\n", "STLS\r\n", b"+OK begin\r\n"],
    "ftp": [b"220-ftp\r\n hello\r\n220 ready\r\n", "AUTH TLS\r\n", b"234 begin\r\n"],
    "postgres": ["\0\0\0\x08\x04\xd2\x16\x2f", b"S"],
    "mysql": [
        b"\x23\0\0\xff\x0a8.0\0" + bytes(13) + b"\xff\xff" + bytes(15),
        "\x20\0\0\0\0\x8a\0\0\0\0\0\x01\x2d" + "\0" * 23,
    ],
    "xmpp": [
        "version='1.0' to='localhost'>",
        b"<?xml version='1.0'?><stream:stream id='1'><stream:features>"
        b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>",
        "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
        b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    ],
    "ldap": [
        "\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037",
        b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\0\x04\0\x04\0",
    ],
}


def play(dialogue: list[Turn], then: Callable[[socket.socket], Any]) -> Callable[[socket.socket], Any]:
    def talk(sock: socket.socket) -> Any:
        for turn in dialogue:
            if isinstance(turn, bytes):
                sock.sendall(turn)
                continue
            wanted, heard = turn.encode("latin-1"), b""
            while not heard.endswith(wanted):
                byte = receive_exactly(sock, 1)
                assert byte, f"the client hung up after {heard!r}"
                heard += byte
        return then(sock)

    return talk


@pytest.mark.parametrize("protocol", DIALOGUES)
def test_starttls_leads_to_tls(
    protocol: str, server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    context = server_context(server_cert)

    def under_tls(sock: socket.socket) -> bytes:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            return until_end(wrapped)

    address, results = background.serve(play(DIALOGUES[protocol], under_tls))
    status = cli.main(told(address, "--cafile", ca_file, "--starttls", protocol, "--json"))
    assert (status, json.loads(capsys.readouterr().out)["verified"]) == (0, True)
    assert results[0].result(DEADLINE) == b""


@pytest.mark.parametrize("form", [b"<proceed xmlns='x'/>", b"<proceed xmlns='x'></proceed>"])
def test_an_answer_in_xmpp_ends_with_its_element(form: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"<features>urn:ietf:params:xml:ns:xmpp-tls</features>" + form + b"TLS")
        starttls.negotiate("xmpp", near, "localhost", time.monotonic() + DEADLINE)
        assert near.recv(10) == b"TLS"


REFUSALS: dict[str, list[Turn]] = {
    "smtp": [b"220 ready\r\n", "EHLO localhost\r\n", b"250-mail\r\n250 SIZE\r\n"],
    "imap": [b"* OK ready\r\n", "a1 STARTTLS\r\n", b"a1 BAD what?\r\n"],
    "pop3": [b"+OK ready\r\n", "STLS\r\n", b"-ERR what?\r\n"],
    "ftp": [b"220 ready\r\n", "AUTH TLS\r\n", b"502 what?\r\n"],
    "postgres": ["\0\0\0\x08\x04\xd2\x16\x2f", b"N"],
    "mysql": [b"\x4a\0\0\0\x0a8.0\0" + bytes(13) + b"\xff\xf7" + bytes(54)],
    "xmpp": ["to='localhost'>", b"<stream:stream><stream:features/>"],
    "ldap": ["1.3.6.1.4.1.1466.20037", b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x02\x04\0\x04\0"],
}


@pytest.mark.parametrize("protocol", REFUSALS)
def test_a_refused_starttls_is_explained(protocol: str, background: Background, capsys: Any) -> None:
    address, _ = background.serve(play(REFUSALS[protocol], until_end))
    status, said = fails(capsys, *told(address, "--starttls", protocol))
    assert status == 4 and "STARTTLS" in said


STRANGERS = [
    ("smtp", b"", "hung up before TLS"),
    ("smtp", b"220-mail\r\n" * 7_500, "answer does not end"),
    ("ftp", b"220-mail\r\n" + b"\n" * 66_000, "answer does not end"),
    ("imap", b"* OK\r\n" + b"* \n" * 22_000, "answer does not end"),
    ("postgres", b"E", "not a PostgreSQL server: it answered b'E'"),
    ("mysql", b"\x07\0\0\0\xff\x10\x04no, no", "MySQL server refused: no, "),
    ("mysql", b"\x02\0\0\0\x09\0", "not a MySQL server"),
    ("mysql", b"SSH-2.0-OpenSSH", "announces an answer of 4739923 bytes"),
    ("ldap", b"HTTP/1.1 400", "not an LDAP server"),
    ("xmpp", b"<features>urn:ietf:params:xml:ns:xmpp-tls</features><failure/>", "said b'<failure/>'"),
]


@pytest.mark.parametrize(("protocol", "answer", "words"), STRANGERS)
def test_starttls_with_whoever_does_not_speak_the_protocol(protocol: str, answer: bytes, words: str) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
        far.sendall(answer)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(starttls.Refused, match=words):
            starttls.negotiate(protocol, near, "localhost", time.monotonic() + DEADLINE)


def test_a_server_that_never_ends_its_greeting_is_left(background: Background, capsys: Any) -> None:
    address, _ = background.serve(lambda sock: (sock.sendall(b"220-" + b"x" * 70_000), until_end(sock)))
    status, said = fails(capsys, *told(address, "--starttls", "smtp"))
    assert status == 4 and "does not end" in said


def test_silence_before_starttls_is_explained(background: Background, capsys: Any) -> None:
    address, _ = background.serve(until_end)
    status, said = fails(capsys, *told(address, "--timeout", "1", "--starttls", "pop3"))
    assert status == 4 and "without --starttls" in said


def test_a_server_that_drips_does_not_hold_it_beyond_its_time(background: Background, capsys: Any) -> None:
    gone = threading.Event()

    def drip(sock: socket.socket) -> None:
        for _ in range(300):
            if gone.wait(0.05):
                return
            sock.sendall(b"2")

    address, _ = background.serve(drip)
    status, said = fails(capsys, *told(address, "--timeout", "1", "--starttls", "smtp"))
    gone.set()
    assert status == 4 and "in time" in said


def test_a_server_that_does_not_read_does_not_hold_it_either() -> None:
    near, far = socket.socketpair()
    with near, far, pytest.raises(starttls.Refused, match="in time"):
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                near.send(bytes(65_536))
        starttls.negotiate("postgres", near, "localhost", time.monotonic() + 0.1)


def test_a_reset_before_tls_is_a_refused_starttls(background: Background, capsys: Any) -> None:
    def reset(sock: socket.socket) -> None:
        receive_exactly(sock, 8)
        reset_on_close(sock)

    address, _ = background.serve(reset)
    status, said = fails(capsys, *told(address, "--starttls", "postgres"))
    assert status == 4 and "failed before TLS began: Connection reset" in said


# ── trace ──


def test_trace_shows_a_timeline_and_draws_it(server_cert: KeyPair, ca_file: str, tmp_path: Path) -> None:
    context = server_context(server_cert)
    with Background() as background:
        address, results = background.serve_tls(context, lambda sock: sock.sendall(sock.recv(100).upper()))
        picture = str(tmp_path / "t.svg")
        command = ["trace", f"localhost:{address[1]}", "--cafile", ca_file, "--send", r"hi\n"]
        result = run(*command, "--svg", picture)
        results[0].result(DEADLINE)
    assert result.returncode in (0, 1), result.stderr
    lines = result.stdout.splitlines()
    assert any("SSL_do_handshake() = WANT_READ" in line for line in lines)
    assert any("SSL_write(3) = 3 bytes" in line for line in lines)
    assert any("slept" in line and "socket readable" in line for line in lines)
    root = xml.etree.ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg") and "ClientHello" in Path(picture).read_text(encoding="utf-8")


def test_trace_of_what_fails_shows_how_far_it_came(background: Background, capsys: Any) -> None:
    address, _ = background.serve(lambda sock: (sock.sendall(b"SSH-2.0-x\r\n"), until_end(sock)))
    assert cli.main(["trace", f"localhost:{address[1]}", "--json"]) == 6
    said = capsys.readouterr()
    assert "SSH" in said.err
    assert any(json.loads(line)["what"] == "ClientHello" for line in said.out.splitlines())


def test_trace_sends_and_shows_it_in_colour_on_a_terminal(
    server_cert: KeyPair, ca_file: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    context = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    received: list[bytes] = []

    def answer() -> None:
        with listener.accept(DEADLINE) as session:
            received.append(session.recv(DEADLINE))

    with bridge.Bridge(workers=1) as b, b.listen(("127.0.0.1", 0), context) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        command = [
            "trace",
            f"localhost:{listener.address[1]}",
            "--cafile",
            ca_file,
            "--send",
            "a\\tb\\r\\n\udcff",
        ]
        assert cli.main(command) == 0
        thread.join(DEADLINE)
    assert received == [b"a\tb\r\n" + os.fsencode("\udcff")]
    shown = capsys.readouterr().out
    assert "ClientHello" in shown and "SSL_do_handshake" in shown


def test_trace_sends_what_is_no_text(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    address, results = background.serve_tls(server_context(server_cert), lambda sock: sock.recv(100))
    command = ["trace", f"localhost:{address[1]}", "--cafile", ca_file, "--send", "\udcff\u00e9"]
    assert cli.main(command) in (0, 1)
    assert results[0].result(DEADLINE) == b"\xff\xc3\xa9"


def test_trace_need_not_send_anything(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    address, _ = background.serve_tls(server_context(server_cert), lambda sock: sock.sendall(b"banner"))
    command = ["trace", f"localhost:{address[1]}", "--cafile", ca_file, "--wait", "0.1"]
    assert cli.main(command) in (0, 1)  # the stdlib's server may hang up without a word
    assert "SSL_read" in capsys.readouterr().out


def test_trace_need_not_wait_either(
    server_cert: KeyPair, ca_file: str, background: Background, capsys: Any
) -> None:
    address, _ = background.serve_tls(server_context(server_cert), until_end)
    command = ["trace", f"localhost:{address[1]}", "--cafile", ca_file, "--wait", "0"]
    assert cli.main(command) in (0, 1)
    assert "close_notify" in capsys.readouterr().out


def test_trace_does_without_rich(
    monkeypatch: pytest.MonkeyPatch, background: Background, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    address, _ = background.serve(until_end)
    assert cli.main(["trace", f"localhost:{address[1]}", "--timeout", "0.3"]) == 6
    assert "ClientHello" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_said_before_anybody_is_met(tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "nowhere" / "t.svg"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        status, said = fails(capsys, "trace", f"127.0.0.1:{listener.getsockname()[1]}", "--svg", str(picture))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert (status, said) == (2, f"tls-bridge trace: error: {picture}: No such file or directory\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_picture_that_does_not_fit_on_the_disk_is_named(background: Background, capsys: Any) -> None:
    address, _ = background.serve(lambda sock: sock.recv(1))
    assert cli.main(["trace", f"localhost:{address[1]}", "--svg", "/dev/full"]) == 2
    assert capsys.readouterr().err == "tls-bridge trace: error: /dev/full: No space left on device\n"


def test_a_trace_that_cannot_be_begun_leaves_the_picture_of_the_last_one(tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "t.svg"
    picture.write_text("of the last one")
    status, _ = fails(capsys, "trace", "localhost:1", "--cafile", "/nowhere.pem", "--svg", str(picture))
    assert (status, picture.read_text()) == (2, "of the last one")


def test_trace_of_what_cannot_be_begun_is_status_2(capsys: Any) -> None:
    status, said = fails(capsys, "trace", "localhost:1", "--cafile", "/nowhere.pem")
    assert status == 2 and "/nowhere.pem" in said


@pytest.mark.parametrize(
    ("what", "style"),
    [
        ("SSL_read WANT_READ", "yellow"),
        ("slept, doorbell", "dim"),
        ("sent Finished", "cyan"),
        ("received Finished", "cyan"),
        ("SSL_read 3", ""),
    ],
)
def test_what_matters_in_a_trace_has_its_colour(what: str, style: str) -> None:
    assert _style(what) == style
