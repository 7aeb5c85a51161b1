"""`bridge.ssl.SSLSocket` as a socket: what programs rely on, and what the stdlib itself is weak at."""

from __future__ import annotations

import array
import concurrent.futures
import contextlib
import dataclasses
import errno
import fractions
import gc
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from dropin_rig import Arrangement, make_client_context, make_server_context, our_ssl
from peers import PATIENCE, Background, dial, in_a_child, receive_exactly, reset, reset_on_close, until
from rig import Raw, forks, needs_hang_ups, raw_context, tcp_pair

import bridge
from bridge.ssl import process, sockets
from bridge.ssl.failures import as_stdlib
from bridge.ssl.process import default_bridge
from bridge.ssl.sessions import SSLSession
from bridge.stream import Stream

pytestmark = pytest.mark.usefixtures("default_bridge")

ROOT = str(Path(__file__).parents[2])
OURS = Arrangement("ours", "ours")
ours_and_theirs = pytest.mark.parametrize(
    "arrangement", [Arrangement("ours", "theirs"), OURS], ids=str, indirect=False
)
Ends = tuple[Any, Any]


def wrap(background: Background, client_context: Any, server_context: Any, *pair: socket.socket) -> Ends:
    """A client's and a server's socket over *pair* (TCP by default), their handshake done."""
    near, far = pair or tcp_pair()
    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)
    served = background.run(lambda: server_context.wrap_socket(far, server_side=True))
    client = client_context.wrap_socket(near, server_hostname="localhost")
    return client, served.result(PATIENCE)


@pytest.fixture
def ends(background: Background, ca_file: str, server_cert: KeyPair) -> Iterator[Ends]:
    """Our client and our server."""
    made = wrap(background, make_client_context("ours", ca_file), make_server_context("ours", server_cert))
    with made[0], made[1]:
        yield made


@pytest.fixture
def mixed(background: Background, ca_file: str, server_cert: KeyPair) -> Iterator[Ends]:
    """Our client and the stdlib's server."""
    made = wrap(background, make_client_context("ours", ca_file), make_server_context("theirs", server_cert))
    with made[0], made[1]:
        yield made


# ── what it is ──


def test_it_is_an_ssl_socket_of_the_same_descriptor_which_the_old_one_has_lost(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    near, far = tcp_pair()
    descriptor = near.fileno()
    client, server = wrap(
        background, make_client_context("ours", ca_file), make_server_context("ours", server_cert), near, far
    )
    with server:
        assert isinstance(client, ssl.SSLSocket) and isinstance(client, our_ssl().SSLSocket)
        assert near.fileno() == -1 and client.fileno() == descriptor
        client.close()
        assert client.fileno() == -1
        client.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            client.recv(1)


def test_facts_are_the_stdlibs(mixed: Ends) -> None:
    client, server = mixed
    assert client.version() == server.version() == "TLSv1.3"
    assert client.cipher() == server.cipher()
    assert client.get_channel_binding() == server.get_channel_binding() is not None
    assert client.getpeercert()["subjectAltName"] == (
        ("DNS", "localhost"),
        ("IP Address", "127.0.0.1"),
        ("IP Address", "0:0:0:0:0:0:0:1"),
    )
    assert ssl.DER_cert_to_PEM_cert(client.getpeercert(True))
    assert server.getpeercert() is None
    assert client.selected_alpn_protocol() is client.compression() is None
    assert (client.server_hostname, client.server_side) == ("localhost", False)
    server.close()
    assert client.recv(1) == b""
    assert client.version() == "TLSv1.3" and client.getpeercert(True), "also after the peer has gone"


def test_the_chains_are_those_of_the_stdlib_s_object(mixed: Ends, ends: Ends) -> None:
    for client in (mixed[0], ends[0]):
        wire = client._sslobj
        der = client.getpeercert(binary_form=True)
        sent = [shown.public_bytes(2) for shown in wire.get_unverified_chain()]
        verified = [shown.public_bytes(2) for shown in wire.get_verified_chain()]
        assert sent[0] == verified[0] == der and len(verified) > 1
        assert wire.owner is client


def test_a_chain_that_nobody_verifies_is_the_one_that_was_sent(
    background: Background, server_cert: KeyPair
) -> None:
    context = our_ssl().SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client, server = wrap(background, context, make_server_context("theirs", server_cert))
    with client, server:
        wire, der = client._sslobj, client.getpeercert(binary_form=True)
        for chain in (wire.get_verified_chain(), wire.get_unverified_chain()):
            assert [shown.public_bytes(2) for shown in chain] == [der]


def test_what_cannot_be_had_is_refused_as_the_stdlib_refuses_it(mixed: Ends, ends: Ends) -> None:
    texts = []
    for sock in mixed:
        with pytest.raises(ValueError) as caught:
            sock.get_channel_binding("tls-something")
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    for sock in mixed[0], ends[0]:
        with pytest.raises(ssl.SSLError, match="not server") as refused:
            sock._sslobj.verify_client_post_handshake()
        assert refused.value.reason == "NOT_SERVER"
    with pytest.raises(ssl.SSLError, match="after the handshake"):
        ends[1]._sslobj.verify_client_post_handshake()
    for sock in (*mixed, ends[0]):
        with pytest.raises(TypeError, match="The value must be a SSLContext"):
            sock.context = 5
    with pytest.raises(ValueError, match="size should not be negative"):
        mixed[0].read(-1)
    assert mixed[0].read(0) == b""


def test_before_the_handshake_there_are_no_facts(ca_file: str) -> None:
    near, far = tcp_pair()
    with (
        far,
        make_client_context("ours", ca_file).wrap_socket(
            near, server_hostname="localhost", do_handshake_on_connect=False
        ) as client,
    ):
        assert client.version() is client.cipher() is client.selected_alpn_protocol() is None
        with pytest.raises(ValueError, match="handshake not done yet"):
            client.getpeercert()


class TheirOwn(ssl.SSLSocket):
    """A subclass of the stdlib's, which knows nothing of ours."""


class OurOwn(our_ssl().SSLSocket):  # type: ignore[misc,name-defined]
    """A subclass of ours."""


@pytest.mark.parametrize("kind", [TheirOwn, OurOwn])
def test_a_class_of_ones_own_is_the_only_owner_of_its_descriptor(
    kind: type[ssl.SSLSocket], background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    context = make_client_context("ours", ca_file)
    context.sslsocket_class = kind
    client, server = wrap(background, context, make_server_context("theirs", server_cert))
    with server:
        assert type(client) is kind
        server.sendall(b"hello")
        assert client.recv(10) == b"hello"
        client.settimeout(0.01)
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert time.monotonic() - before < PATIENCE, "which is the time-out that it was wrapped with"
        descriptor = client.fileno()
        client.close()
        with contextlib.suppress(OSError):
            assert server.recv(1) == b""
        until(lambda: not is_open(descriptor))
        with open(os.devnull, "rb") as file:
            os.dup2(file.fileno(), descriptor)  # the number is free, and somebody else's now
            del client
            gc.collect()
            assert is_open(descriptor)
            os.close(descriptor)


def is_open(descriptor: int) -> bool:
    """Whether it is a descriptor of this process."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# ── bytes ──


def test_receiving_into_what_has_room(mixed: Ends) -> None:
    client, server = mixed
    server.sendall(b"0123456789" * 4)
    room = array.array("i", [0] * 2)
    assert client.recv_into(room) == 8 and room.tobytes() == b"01234567"
    exact = bytearray(10)
    assert client.recv_into(memoryview(exact)[2:5]) == 3 and exact == b"\0\0" + b"890" + b"\0" * 5
    assert client.recv_into(exact, 1) == 1 and client.read(2) == b"23"
    assert client.pending() == 26
    assert client.recv(0) == b"" and client.recv_into(bytearray(0), 0) == 0
    with pytest.raises(ValueError, match="non-zero flags not allowed"):
        client.recv(1, socket.MSG_PEEK)
    assert receive_exactly(client, 26) == b"456789" + b"0123456789" * 2


def test_a_size_that_is_no_integer_costs_no_bytes(mixed: Ends) -> None:
    client, server = mixed
    server.sendall(b"hello")
    for size in (2.0, "2", None):
        for call in (client.recv, client.read, lambda size: client.read(size, bytearray(9))):
            with pytest.raises(TypeError, match="object cannot be interpreted as an integer"):
                call(size)
    assert client.recv(True) == b"h" and client.recv(5) == b"ello"


def test_sending_what_has_bytes(mixed: Ends) -> None:
    client, server = mixed
    for data in (b"bytes", bytearray(b"more"), memoryview(b"view")[1:], array.array("H", [1, 2])):
        client.sendall(data)
        assert receive_exactly(server, memoryview(data).nbytes) == bytes(memoryview(data).cast("B"))
    assert client.send(b"") == 0
    with pytest.raises(TypeError):
        client.sendall("text")
    big = os.urandom(3_000_000)
    received = threading.Thread(target=lambda: got.append(receive_exactly(server, len(big))))
    got: list[bytes] = []
    received.start()
    assert client.send(big) == len(big), "a blocking send is never short"
    received.join(PATIENCE)
    assert got == [big]


def test_files_and_messages_never_leave_in_plain_text(mixed: Ends, tmp_path: Path) -> None:
    client, server = mixed
    (tmp_path / "secret").write_bytes(b"secret" * 20_000)
    with open(tmp_path / "secret", "rb") as file:
        assert client.sendfile(file) == 120_000
    assert receive_exactly(server, 120_000) == b"secret" * 20_000
    for call in (lambda: client.sendmsg([b"x"]), lambda: client.recvmsg(1), client.dup):
        with pytest.raises(NotImplementedError):
            call()
    for call in (lambda: client.sendto(b"x", ("127.0.0.1", 1)), lambda: client.recvfrom(1)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="unwrap"):
        client.detach()
    client.sendall(b"and it lives on")
    assert receive_exactly(server, 15) == b"and it lives on"


def test_a_file_object_outlives_its_socket(mixed: Ends) -> None:
    client, server = mixed
    file = client.makefile("rb")
    client.close()
    server.sendall(b"line one\nline two\n")
    assert file.readline() == b"line one\n" and file.readline() == b"line two\n"
    assert client.fileno() != -1
    file.close()
    assert client.fileno() == -1
    assert server.recv(1) == b""


def test_writes_of_several_threads_do_not_interleave(ends: Ends, background: Background) -> None:
    client, server = ends
    writers = [background.run(client.sendall, bytes([n]) * 200_000) for n in range(4)]
    got = receive_exactly(server, 800_000)
    for writer in writers:
        writer.result(PATIENCE)
    assert sorted({got[start] for start in range(0, 800_000, 200_000)}) == [0, 1, 2, 3]
    assert all(len(set(got[start : start + 200_000])) == 1 for start in range(0, 800_000, 200_000))


@needs_hang_ups
def test_a_write_that_fails_does_not_take_the_refusal_with_it(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """In TLS 1.3 a client's handshake is done before the server has seen that there is no certificate."""
    demanding = make_server_context("theirs", server_cert)
    demanding.verify_mode = ssl.CERT_REQUIRED

    def refuse(sock: socket.socket) -> None:
        with pytest.raises(ssl.SSLError):
            demanding.wrap_socket(sock, server_side=True)
        sock.close()

    address, (served,) = background.serve(refuse)
    with make_client_context("ours", ca_file).wrap_socket(
        dial(address), server_hostname="localhost"
    ) as client:
        served.result(PATIENCE)
        for call in (lambda: client.sendall(b"question"), lambda: client.recv(100)):
            with pytest.raises(ssl.SSLError) as caught:
                call()
            assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


# ── time-outs, and not waiting at all ──


def test_a_time_out_is_the_very_class_and_harms_nothing(mixed: Ends) -> None:
    client, server = mixed
    client.settimeout(0.02)
    with pytest.raises(TimeoutError, match="The read operation timed out") as caught:
        client.recv(1)
    assert type(caught.value) is TimeoutError and not isinstance(caught.value, ssl.SSLError)
    assert client.gettimeout() == client.timeout == 0.02 and client.getblocking()
    for wrong in (-1, "1", float("inf"), float("nan"), 1e12, 10**30, fractions.Fraction(1, 2)):
        refused = []
        for sock in (client, server):
            with pytest.raises((TypeError, ValueError, OverflowError)) as caught:
                sock.settimeout(wrong)
            refused.append((type(caught.value), str(caught.value)))
        assert refused[0] == refused[1] and client.gettimeout() == 0.02
    client.settimeout(PATIENCE)
    server.sendall(b"late")
    assert client.recv(10) == b"late"
    client.settimeout(0.02)
    with pytest.raises(TimeoutError, match="The write operation timed out"):
        client.sendall(bytes(50_000_000))


class Caller:
    """Somebody who reads from a socket in a method of his own."""

    def read(self, sock: Any) -> bytes:
        data: bytes = sock.recv(1)
        return data


def test_an_error_keeps_no_caller_alive(ends: Ends) -> None:
    """Else the callers' own sockets and files are closed by the garbage collector, whenever it comes."""
    _, server = ends
    server.settimeout(0.01)
    gc.collect()
    gc.disable()
    try:
        caller = Caller()
        gone = weakref.ref(caller)
        with contextlib.suppress(TimeoutError):
            caller.read(server)
        del caller
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("before", [True, False], ids=["before-the-wrap", "after-it"])
def test_so_rcvtimeo_is_heeded(
    before: bool, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    near, far = tcp_pair()
    option = (socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 20_000))
    if before:
        near.setsockopt(*option)
    client, server = wrap(
        background,
        make_client_context("ours", ca_file),
        make_server_context("theirs", server_cert),
        near,
        far,
    )
    with client, server:
        client.settimeout(None)
        if not before:
            client.setsockopt(*option)
        with pytest.raises(BlockingIOError) as caught:
            client.recv(1)
        assert caught.value.errno == errno.EAGAIN
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 9, 0))
        client.setsockopt(*option[:2], struct.pack("ll", 0, 0))
        assert client._sslobj.kernel_timeouts == {socket.SO_SNDTIMEO: 9.0}
        server.sendall(b"late")
        assert client.recv(10) == b"late"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 20_000))
        with pytest.raises(BlockingIOError) as caught:
            client.sendall(bytes(50_000_000))
        assert caught.value.errno == errno.EAGAIN


def wait_for(sock: Any, error: ssl.SSLError) -> None:
    if type(error) is ssl.SSLWantReadError:
        assert error.errno == ssl.SSL_ERROR_WANT_READ and select.select([sock], [], [], PATIENCE)[0]
    else:
        assert type(error) is ssl.SSLWantWriteError and error.errno == ssl.SSL_ERROR_WANT_WRITE
        assert select.select([], [sock], [], PATIENCE)[1]


def patiently(sock: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """What select-based programs do: wait for what the exception's very class says."""
    while True:
        try:
            return call(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            wait_for(sock, error)


@pytest.mark.parametrize("server", ["ours", "theirs"])
def test_without_blocking_with_a_truthful_descriptor(
    server: str, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    near, far = tcp_pair()
    far.settimeout(PATIENCE)
    serving = background.run(
        lambda: make_server_context(server, server_cert).wrap_socket(far, server_side=True)
    )
    near.setblocking(False)
    context = make_client_context("ours", ca_file)
    with context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False) as client:
        patiently(client, client.do_handshake)
        client.do_handshake()
        with serving.result(PATIENCE) as peer:
            echo = background.run(lambda: peer.sendall(receive_exactly(peer, 1_000_000)))
            sent, payload = 0, os.urandom(1_000_000)
            while sent < len(payload):
                count = patiently(client, client.send, payload[sent:])
                assert count > 0
                sent += count
            got = b""
            while len(got) < len(payload):
                got += patiently(client, client.recv, 65_536)
            assert got == payload
            echo.result(PATIENCE)
            with pytest.raises(ssl.SSLWantReadError):
                client.recv(1)
            assert not select.select([client], [], [], 0)[0]


def test_a_handshake_that_its_caller_makes_has_the_time_of_the_socket(
    background: Background, ca_file: str, server_cert: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = dataclasses.replace(sockets.TIMEOUTS, handshake=0.05)
    monkeypatch.setattr(sockets, "TIMEOUTS", hurried)
    near, far = tcp_pair()
    near.settimeout(PATIENCE)

    def late() -> None:
        assert receive_exactly(far, 1), "it has begun"
        threading.Event().wait(0.2)
        far.shutdown(socket.SHUT_WR)

    with far, pytest.raises(ssl.SSLEOFError):
        late_peer = background.run(late)
        make_client_context("ours", ca_file).wrap_socket(near, server_hostname="localhost")
    late_peer.result(PATIENCE)


def test_a_handshake_on_connect_cannot_be_had_without_blocking(ca_file: str) -> None:
    near, far = tcp_pair()
    near.setblocking(False)
    with far, pytest.raises(ValueError, match="do_handshake_on_connect should not be specified"):
        make_client_context("ours", ca_file).wrap_socket(near, server_hostname="localhost")


# ── ends ──


def test_after_shutdown_of_our_half_reading_goes_on_decrypted(mixed: Ends) -> None:
    """The stdlib hands out ciphertext here."""
    client, server = mixed
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert receive_exactly(server, 100) == b"question"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    with pytest.raises(OSError):
        client.send(b"more")


def test_after_it_the_descriptor_still_tells_of_each_record(mixed: Ends) -> None:
    client, server = mixed
    client.shutdown(socket.SHUT_WR)
    server.sendall(b"first")
    server.sendall(b"second")
    for expected in (b"first", b"second"):
        assert client.pending() or select.select([client], [], [], PATIENCE)[0]
        assert client.recv(100) == expected


def test_shutdown_does_not_wait_for_a_peer_that_does_not_read(ends: Ends, background: Background) -> None:
    client, _ = ends
    client.settimeout(None)
    writing = background.run(client.sendall, bytes(50_000_000))
    while not client._wire.stream._lease._sleepers:
        assert not writing.done()
    client.shutdown(socket.SHUT_RDWR)
    with pytest.raises(OSError):
        writing.result(PATIENCE)


def test_closing_the_bridge_takes_the_number_of_a_descriptor_from_its_socket(ca_file: str) -> None:
    """Or it would go by the number of what is somebody else's by then."""
    with bridge.Bridge(workers=1) as own, pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.ssl.sockets.default_bridge", lambda: own)
        near, far = tcp_pair()
        client = make_client_context("ours", ca_file).wrap_socket(
            near, server_hostname="localhost", do_handshake_on_connect=False
        )
        client.settimeout(0.01)
        with far, pytest.raises(TimeoutError):
            client.do_handshake()
    assert client.fileno() == -1


def client_of(own: Any, ca_file: str, near: socket.socket, **options: Any) -> Any:
    """Our client's socket on the bridge *own*, before its handshake."""
    return make_client_context("ours", ca_file).wrap_socket(near, do_handshake_on_connect=False, **options)


def test_a_socket_whose_bridge_is_closed_before_it_begins_is_closed(
    ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bridge.Bridge(workers=1)
    monkeypatch.setattr("bridge.ssl.sockets.default_bridge", lambda: own)
    near, far = tcp_pair()
    client = client_of(own, ca_file, near, server_hostname="localhost")
    own._streams.seal()
    with far, pytest.raises(OSError) as caught:
        client.do_handshake()
    assert caught.value.errno == errno.EBADF and client.fileno() == -1
    own.close()
    near, far = tcp_pair()
    client = client_of(own, ca_file, near, server_hostname="localhost")
    with far, client:
        with pytest.raises(OSError) as caught:
            client.do_handshake()
        assert caught.value.errno == errno.EBADF and client.fileno() != -1, "it was never the bridge's"


@pytest.mark.parametrize("known", [True, False])
def test_a_socket_whose_peer_has_gone_before_it_begins(known: bool, ca_file: str) -> None:
    near, far = tcp_pair()
    client = client_of(None, ca_file, near, server_hostname="localhost")
    with client:
        reset(far)
        if known:
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        with pytest.raises(OSError) as caught:
            client.do_handshake()
        assert type(caught.value) is (OSError if known else ConnectionResetError)
        assert caught.value.errno == (errno.ENOTCONN if known else errno.ECONNRESET)


@pytest.mark.parametrize("name", ["a b.example", "127.1", "a.example:443", "[::1]"])
def test_a_name_that_is_none_is_refused_at_the_handshake(name: str, ca_file: str) -> None:
    near, far = tcp_pair()
    with far, client_of(None, ca_file, near, server_hostname=name) as client:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch") as caught:
            client.do_handshake()
        assert type(caught.value) is ssl.SSLCertVerificationError and caught.value.verify_code == 62
        assert client.fileno() != -1


def test_it_is_refused_too_where_no_name_is_checked(ca_file: str) -> None:
    near, far = tcp_pair()
    context = make_client_context("ours", ca_file)
    context.check_hostname = False
    with far, pytest.raises(ValueError, match="neither a DNS name nor an IP address") as caught:
        context.wrap_socket(near, server_hostname="a b.example")
    assert type(caught.value) is ValueError


def test_a_socket_that_was_never_handed_out_is_closed_in_silence(
    ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tcp_pair()

    def broken(self: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(our_ssl().SSLSocket, "getpeername", broken)
    with far:
        far.settimeout(PATIENCE)
        with pytest.raises(OSError, match="broken"):
            client_of(None, ca_file, near, server_hostname="localhost")
        gc.collect()
        assert far.recv(1) == b""


def test_a_close_that_is_interrupted_before_tls_has_begun_is_made_up_for(
    ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = tcp_pair()

    def interrupt(self: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with far:
        far.settimeout(PATIENCE)
        made = [client_of(None, ca_file, near, server_hostname="localhost")]
        monkeypatch.setattr(ssl.SSLSocket, "_real_close", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            made[0].close()
        with pytest.warns(ResourceWarning, match="unclosed"):
            made.clear()
            gc.collect()
        assert far.recv(1) == b""


def test_facts_of_an_accepted_socket_wait_for_its_handshake(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    listener = make_server_context("ours", server_cert).wrap_socket(
        socket.create_server(("127.0.0.1", 0)), server_side=True
    )
    with listener, socket.create_connection(listener.getsockname()) as near:
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(PATIENCE)
            asking = background.run(accepted.version)
            with client_of(None, ca_file, near, server_hostname="localhost") as client:
                client.settimeout(PATIENCE)
                client.do_handshake()
                assert asking.result(PATIENCE) == client.version() == accepted.version()


def test_a_socket_that_is_closed_in_the_middle_of_unwrap_stays_closed(
    mixed: Ends, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = mixed
    unwrap = Stream.unwrap

    def closing(*arguments: Any) -> Any:
        inner, leftover = unwrap(*arguments)
        client.close()
        return inner, leftover

    monkeypatch.setattr(Stream, "unwrap", closing)
    unwrapping = background.run(server.unwrap)
    client.unwrap()
    assert client.fileno() == -1
    unwrapping.result(PATIENCE)


def test_the_session_of_a_connection_that_was_cut_off_is_the_last_one_seen(mixed: Ends) -> None:
    client, server = mixed
    server.sendall(b"x")
    assert client.recv(1) == b"x"
    seen = client.session
    socket.socket.shutdown(server, socket.SHUT_WR)
    assert client.recv(1) == b"" and client.session == seen


@pytest.mark.parametrize("waits", [True, False])
def test_shutting_down_for_reading_leaves_writing(mixed: Ends, background: Background, waits: bool) -> None:
    """The end that we have put there is not the peer's: a reader finds it, and TLS does not."""
    client, server = mixed
    reading = background.run(client.recv, 1) if waits else None
    while reading and not client._wire.stream._lease._sleepers:
        assert not reading.done()
    client.shutdown(socket.SHUT_RD)
    assert reading is None or reading.result(PATIENCE) == b""
    for timeout in (PATIENCE, 0):
        client.settimeout(timeout)
        assert client.recv(1) == b"" and select.select([client], [], [], 0)[0]
        client.sendall(b"still said")
        assert receive_exactly(server, 10) == b"still said"


def send_until_stuck(client: Any) -> int:
    """Without waiting; some of it is with TLS, and not with the kernel.  How many bytes were taken."""
    client.setblocking(False)
    taken = 0
    with pytest.raises(ssl.SSLWantWriteError):
        while True:
            taken += client.send(bytes(50_000))
    assert client._wire.stream._sent.held()
    return taken


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_what_send_took_leaves_in_spite_of_shutdown_and_close(how: int, mixed: Ends) -> None:
    client, server = mixed
    taken = send_until_stuck(client)
    client.shutdown(how)
    client.close()
    assert len(receive_exactly(server, taken)) == taken and server.recv(1) == b""


def test_and_in_spite_of_a_peer_that_has_shut_its_own_half_down(mixed: Ends) -> None:
    client, server = mixed
    taken = send_until_stuck(client)
    socket.socket.shutdown(server, socket.SHUT_WR)
    client.close()
    assert len(receive_exactly(server, taken)) == taken and server.recv(1) == b""


def test_shutdown_wakes_a_reader(ends: Ends, background: Background) -> None:
    client, server = ends
    reading = background.run(client.recv, 1)
    while not client._wire.stream._lease._sleepers:
        assert not reading.done()
    client.shutdown(socket.SHUT_RDWR)
    assert reading.result(PATIENCE) == b""
    assert server.recv(1) == b""


def test_a_reader_that_shutdown_wakes_may_close_at_once(
    ends: Ends, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = ends

    def read_and_close() -> None:
        assert client.recv(1) == b""
        client.close()

    reading = background.run(read_and_close)
    while not client._wire.stream._lease._sleepers:
        assert not reading.done()
    stop = Stream.stop_reading

    def stop_and_wait(stream: Stream) -> None:
        stop(stream)
        concurrent.futures.wait([reading], 0.1)

    monkeypatch.setattr(Stream, "stop_reading", stop_and_wait)
    client.shutdown(socket.SHUT_RDWR)
    reading.result(PATIENCE)


@pytest.mark.parametrize("how", ["closed", "raised", "forgotten"])
def test_who_dies_in_the_middle_does_not_look_like_who_is_done(
    background: Background, ca_file: str, server_cert: KeyPair, how: str
) -> None:
    """As with the stdlib's sockets, whose peer sees a ragged end there (and always)."""
    client, server = wrap(
        background, make_client_context("ours", ca_file), make_server_context("theirs", server_cert)
    )
    server.suppress_ragged_eofs = False
    with server:
        if how == "forgotten":
            client.sendall(b"row 1")
            with pytest.warns(ResourceWarning, match="unclosed"):
                del client
                gc.collect()
        else:
            with contextlib.suppress(ZeroDivisionError), client:
                client.sendall(b"row 1")
                if how == "raised":
                    raise ZeroDivisionError
        assert server.recv(5) == b"row 1"
        with contextlib.nullcontext() if how == "closed" else pytest.raises(ssl.SSLEOFError):
            assert server.recv(5) == b""


def test_shutdown_of_a_peer_that_is_quick_to_answer(
    mixed: Ends, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS's half close is that of TCP, too, so nothing may be left for the kernel to shut down."""
    client, server = mixed

    def read_and_close() -> None:
        while server.recv(100):
            pass
        server.close()

    reading, stop = background.run(read_and_close), Stream.stop_reading

    hung_up = select.poll()
    hung_up.register(client, select.POLLHUP)  # of which macOS tells only who asks

    def when_the_peer_has_gone(stream: Stream) -> None:
        stop(stream)
        reading.result(PATIENCE)
        assert hung_up.poll(PATIENCE * 1000)

    monkeypatch.setattr(Stream, "stop_reading", when_the_peer_has_gone)
    client.shutdown(socket.SHUT_RDWR)
    assert client.recv(1) == b""


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_after_shutdown_a_write_finds_a_broken_pipe(how: int, mixed: Ends) -> None:
    client, server = mixed
    client.shutdown(how)
    for call in (client.send, client.sendall, client.write):
        with pytest.raises(BrokenPipeError):
            call(b"too late")
    assert server.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        client.sendall(b"too late")


def test_shutdown_while_the_callback_of_its_handshake_sets_a_timeout(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """Neither may wait for what the other has: it was a worker's thread that did, and so all its sessions."""
    context = make_server_context("ours", server_cert)
    asked, answer = threading.Event(), threading.Event()

    def choose(sock: Any, name: str | None, _: Any) -> None:
        asked.set()
        assert answer.wait(PATIENCE)
        sock.settimeout(PATIENCE)

    context.sni_callback = choose
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        near = dial(listener.getsockname())
        client = make_client_context("theirs", ca_file)
        calling = background.run(lambda: client.wrap_socket(near, server_hostname="localhost"))
        accepted, _ = listener.accept()
        assert asked.wait(PATIENCE)
        shutting = background.run(accepted.shutdown, socket.SHUT_RDWR)
        concurrent.futures.wait([shutting], 0.1)
        answer.set()
        shutting.result(PATIENCE)
        accepted.close()
    with near, contextlib.suppress(OSError):
        calling.result(PATIENCE).close()


def test_close_wakes_a_reader(ends: Ends, background: Background) -> None:
    client, server = ends
    reading = background.run(client.recv, 1)
    while not client._wire.stream._lease._sleepers:
        assert not reading.done()
    client.close()
    assert reading.result(PATIENCE) == b""
    assert server.recv(1) == b""


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_sendall_and_close_at_once_loses_nothing(
    size: int, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """A write-only client has tickets unread; the stdlib's close makes the kernel reset the connection."""
    context = make_server_context("theirs", server_cert)
    address, (served,) = background.serve_tls(
        context, lambda sock: (len(receive_exactly(sock, size)), sock.recv(1))
    )
    client = make_client_context("ours", ca_file).wrap_socket(dial(address), server_hostname="localhost")
    client.sendall(bytes(size))
    client.close()
    assert served.result(PATIENCE) == (size, b"")


@pytest.mark.parametrize("suppress", [True, False])
def test_a_ragged_end(suppress: bool, background: Background, ca_file: str, server_cert: KeyPair) -> None:
    near, far = tcp_pair()
    far.settimeout(PATIENCE)
    served = background.run(
        lambda: make_server_context("theirs", server_cert).wrap_socket(far, server_side=True)
    )
    with (
        make_client_context("ours", ca_file).wrap_socket(
            near, server_hostname="localhost", suppress_ragged_eofs=suppress
        ) as client,
        served.result(PATIENCE) as server,
    ):
        server.sendall(b"cut o")
        server.shutdown(socket.SHUT_WR)
        assert receive_exactly(client, 5) == b"cut o"
        if suppress:
            assert client.recv(1) == b""
            assert client.recv_into(bytearray(1)) == 0 and client.read(1) == b""
        else:
            for call in (client.recv, client.read, lambda size: client.recv_into(bytearray(size))):
                with pytest.raises(ssl.SSLEOFError) as caught:
                    call(1)
                assert type(caught.value) is ssl.SSLEOFError and caught.value.errno == ssl.SSL_ERROR_EOF


def test_what_was_read_too_far_comes_before_the_plain_text(
    mixed: Ends, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = mixed
    unwrap = Stream.unwrap
    monkeypatch.setattr(Stream, "unwrap", lambda *arguments: (unwrap(*arguments)[0], b"read too far"))
    unwrapping = background.run(server.unwrap)
    assert client.unwrap() is client
    plain = unwrapping.result(PATIENCE)
    with pytest.raises(ValueError, match="Read on closed or unwrapped"):
        client.read(1)
    assert client.recv(4, socket.MSG_PEEK) == b"read" == client.recv(4)
    room = bytearray(20)
    assert client.recv_into(room, 4) == 4 and client.recv_into(room) == 4 and room[:4] == b" far"
    plain.sendall(b", and the rest")
    assert client.recv_into(room) == 14 and room[:14] == b", and the rest"


@ours_and_theirs
def test_unwrap_gives_the_plain_socket_back_which_can_be_wrapped_again(
    arrangement: Arrangement, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    contexts = (
        make_client_context(arrangement.client, ca_file),
        make_server_context(arrangement.server, server_cert),
    )
    client, server = wrap(background, *contexts)
    unwrapping = background.run(server.unwrap)
    plain, far = client.unwrap(), unwrapping.result(PATIENCE)
    plain.sendall(b"in plain text")
    assert far.recv(100) == b"in plain text"
    with pytest.raises(ValueError, match="No SSL wrapper around"):
        client.unwrap()
    again, served = wrap(background, *contexts, plain, far)
    with again, served:
        again.sendall(b"in TLS again")
        assert served.recv(100) == b"in TLS again"


def test_unwrap_heeds_so_rcvtimeo(mixed: Ends) -> None:
    client, _ = mixed
    client.settimeout(None)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 20_000))
    for _ in range(2):
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()
    client.settimeout(0.01)
    with pytest.raises(TimeoutError):
        client.unwrap()


@pytest.mark.parametrize("begun", [False, True], ids=["unread", "half-read"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_unwrap_with_data_unread_waits_for_nothing(
    whose: str, begun: bool, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    made = wrap(background, make_client_context(whose, ca_file), make_server_context("theirs", server_cert))
    with made[0] as client, made[1] as server:
        client.settimeout(None)
        server.sendall(b"unread")
        assert not begun or client.recv(1) == b"u"
        with pytest.raises(ssl.SSLError) as caught:
            client.unwrap()
        assert caught.value.args == (1, caught.value.args[1]) and caught.value.library == "SSL"
        assert caught.value.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"
        assert "application data after close notify" in str(caught.value)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_nothing_can_be_said_after_an_unwrap_that_would_block(
    whose: str, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    made = wrap(background, make_client_context(whose, ca_file), make_server_context("theirs", server_cert))
    with made[0] as client, made[1]:
        client.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()
        for call in (client.send, client.sendall, client.write):
            with pytest.raises(ssl.SSLError, match="protocol is shutdown") as caught:
                call(b"x")
            assert caught.value.reason == "PROTOCOL_IS_SHUTDOWN" and caught.value.errno == 1


def test_once_that_is_read_unwrap_goes_on(mixed: Ends, background: Background) -> None:
    client, server = mixed
    server.sendall(b"unread")
    with pytest.raises(ssl.SSLError, match="APPLICATION_DATA_AFTER_CLOSE_NOTIFY"):
        client.unwrap()
    assert server.recv(1) == b""
    unwrapping = background.run(server.unwrap)
    assert client.recv(100) == b"unread"
    client.unwrap().sendall(b"plain")
    assert unwrapping.result(PATIENCE).recv(100) == b"plain"


def give_up_unwrapping(client: Any, server: Any, background: Background) -> socket.socket:
    """And yet meet the peer's close_notify, in `recv`.  The server's end, in plain text."""
    client.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        client.unwrap()
    unwrapping = background.run(server.unwrap)
    client.settimeout(PATIENCE)
    with contextlib.suppress(OSError):
        assert client.recv(1) == b""
    plain: socket.socket = unwrapping.result(PATIENCE)
    return plain


def test_whoever_does_not_unwrap_after_all_leaves_no_descriptor(mixed: Ends, background: Background) -> None:
    client, server = mixed
    give_up_unwrapping(client, server, background)
    client.close()


def test_nor_is_its_descriptor_closed_under_it_with_the_bridge(
    ca_file: str, server_cert: KeyPair, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bridge.Bridge(workers=1)
    monkeypatch.setattr("bridge.ssl.sockets.default_bridge", lambda: own)
    near, far = tcp_pair()
    context = make_server_context("theirs", server_cert)
    served = background.run(lambda: context.wrap_socket(far, server_side=True))
    client = make_client_context("ours", ca_file).wrap_socket(near, server_hostname="localhost")
    give_up_unwrapping(client, served.result(PATIENCE), background).close()
    own.close()
    assert client.fileno() == -1
    client.close()


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_unwrap_before_the_handshake_waits_for_nothing(whose: str, ca_file: str) -> None:
    near, far = tcp_pair()
    with (
        far,
        make_client_context(whose, ca_file).wrap_socket(
            near, server_hostname="localhost", do_handshake_on_connect=False
        ) as client,
    ):
        client.settimeout(None)
        with pytest.raises(ssl.SSLError) as caught:
            client.unwrap()
        assert caught.value.reason == "SHUTDOWN_WHILE_IN_INIT" and caught.value.errno == 1


def test_an_accepted_socket_that_is_unwrapped_at_once_has_its_handshake_first(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    context = make_server_context("ours", server_cert)
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        near = dial(listener.getsockname())
        accepted, _ = listener.accept()
        unwrapping = background.run(accepted.unwrap)
        client = make_client_context("theirs", ca_file).wrap_socket(near, server_hostname="localhost")
        with client.unwrap(), unwrapping.result(PATIENCE):
            assert client.fileno() != -1


def test_a_forgotten_socket_is_closed_with_a_warning(
    ends: Ends, ca_file: str, server_cert: KeyPair, background: Background
) -> None:
    made = list(
        wrap(background, make_client_context("ours", ca_file), make_server_context("ours", server_cert))
    )
    with pytest.warns(ResourceWarning, match=r"unclosed <bridge\.ssl"):
        del made[0]
        gc.collect()
    with made[0] as server:
        assert server.recv(1) == b""


@pytest.mark.parametrize("began", [False, True], ids=["unconnected", "connected"])
def test_a_forgotten_socket_without_tls_is_closed_too(began: bool, ca_file: str) -> None:
    near, far = tcp_pair() if began else (socket.socket(), socket.socket())
    with far:
        made = [
            make_client_context("ours", ca_file).wrap_socket(
                near, server_hostname="x", do_handshake_on_connect=False
            )
        ]
        descriptor = made[0].fileno()
        with pytest.warns(ResourceWarning, match="unclosed"):
            made.clear()
            gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


# ── connecting, listening ──


def test_connecting_afterwards(background: Background, ca_file: str, server_cert: KeyPair) -> None:
    context = make_client_context("ours", ca_file)
    address, served = background.serve_tls(
        make_server_context("theirs", server_cert),
        lambda sock: sock.sendall(receive_exactly(sock, 2)),
        times=2,
    )
    for connect in ("connect", "connect_ex"):
        with context.wrap_socket(socket.socket(), server_hostname="localhost") as client:
            client.settimeout(PATIENCE)
            assert not getattr(client, connect)(address)
            client.sendall(b"hi")
            assert receive_exactly(client, 2) == b"hi"
    for one in served:
        one.result(PATIENCE)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with context.wrap_socket(socket.socket(), server_hostname="localhost") as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(unused.getsockname())


def test_a_connect_whose_handshake_fails_leaves_its_descriptor_one_owner(
    background: Background, server_cert: KeyPair
) -> None:
    """The stdlib's class forgets its TLS there; the bridge's must not, or it closes what is somebody else's by then."""
    context = our_ssl().create_default_context()  # which does not trust the server
    address, (served,) = background.serve_tls(make_server_context("theirs", server_cert), lambda sock: None)
    client = context.wrap_socket(socket.socket(), server_hostname="localhost")
    stream = None
    with pytest.raises(ssl.SSLCertVerificationError):
        client.connect(address)
    stream = client._wire.stream
    client.close()
    with socket.socket() as innocent:
        stream.gone.wait(PATIENCE, "gone")
        assert innocent.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    with pytest.raises(ssl.SSLError):
        served.result(PATIENCE)


def test_a_server_that_speaks_first_without_blocking(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """What comes first is a record that is only a ticket: it once left a reader asleep for good."""
    near, far = tcp_pair()
    far.setblocking(False)
    server = make_server_context("ours", server_cert).wrap_socket(
        far, server_side=True, do_handshake_on_connect=False
    )
    near.settimeout(PATIENCE)
    wrapping = background.run(
        lambda: make_client_context("ours", ca_file).wrap_socket(near, server_hostname="localhost")
    )
    with server:
        patiently(server, server.do_handshake)
        with wrapping.result(PATIENCE) as client:
            reading = background.run(client.recv, 100)
            while not client._wire.stream._lease._sleepers:
                assert not reading.done()
            server.send(b"+OK ready")
            assert reading.result(PATIENCE) == b"+OK ready"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_unix_sockets(background: Background, ca_file: str, server_cert: KeyPair) -> None:
    client, server = wrap(
        background,
        make_client_context("ours", ca_file),
        make_server_context("theirs", server_cert),
        *socket.socketpair(),
    )
    with client, server:
        client.sendall(b"hi")
        assert server.recv(10) == b"hi"


def test_a_client_that_was_reset_before_it_was_accepted_is_a_connection_error(server_cert: KeyPair) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    with make_server_context("ours", server_cert).wrap_socket(plain, server_side=True) as listener:
        with dial(listener.getsockname()) as near:
            reset_on_close(near)
        with pytest.raises(ConnectionResetError):
            listener.accept()


def test_a_mute_client_never_stalls_accept(ca_file: str, server_cert: KeyPair) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    with make_server_context("ours", server_cert).wrap_socket(plain, server_side=True) as listener:
        listener.settimeout(PATIENCE)
        with dial(listener.getsockname()):
            mute, _ = listener.accept()
            honest = socket.create_connection(listener.getsockname(), PATIENCE)
            accepted, _ = listener.accept()
            with make_client_context("ours", ca_file).wrap_socket(
                honest, server_hostname="localhost"
            ) as client:
                client.sendall(b"hi")
                assert accepted.recv(2) == b"hi" and accepted.version() == "TLSv1.3"
            mute.settimeout(0.02)
            with pytest.raises(TimeoutError):
                mute.recv(1)
            mute.close()
            accepted.close()


def test_plain_http_to_a_tls_port_is_told_apart(background: Background, server_cert: KeyPair) -> None:
    near, far = tcp_pair()
    with near:
        near.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ssl.SSLError, match="http request") as caught:
            make_server_context("ours", server_cert).wrap_socket(far, server_side=True)
    assert caught.value.errno == ssl.SSL_ERROR_SSL and caught.value.reason == "HTTP_REQUEST"


def test_plain_text_before_the_handshake_is_never_taken_for_data(server_cert: KeyPair) -> None:
    """CVE-2023-40217."""
    near, far = tcp_pair()
    near.sendall(b"DELETE / HTTP/1.0\r\n\r\n")
    near.close()
    with pytest.raises(OSError):
        with make_server_context("ours", server_cert).wrap_socket(far, server_side=True) as server:
            assert server.recv(100) == b"", "unreachable"


# ── resumption ──


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_session_is_resumed_when_it_is_passed_on(
    version: str, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    contexts = make_client_context("ours", ca_file), make_server_context("theirs", server_cert)
    contexts[0].maximum_version = contexts[0].minimum_version = ssl.TLSVersion[version]
    session = None
    for visit in range(2):
        near, far = tcp_pair()
        serving = background.run(lambda far=far: contexts[1].wrap_socket(far, server_side=True))
        with contexts[0].wrap_socket(near, server_hostname="localhost", session=session) as client:
            with serving.result(PATIENCE) as server:
                server.sendall(b"hi")
                assert client.recv(2) == b"hi"
                assert client.session_reused is server.session_reused is bool(visit)
                session = client.session
                assert session is not None and session.id and session.time > 1.7e9 and session.timeout > 0
                unwrapping = background.run(server.unwrap)
                client.unwrap()
                unwrapping.result(PATIENCE)
    assert session.has_ticket and session.ticket_lifetime_hint > 0
    other = make_client_context("ours", ca_file)
    near, far = tcp_pair()
    with far, pytest.raises(ValueError, match="Session refers to a different SSLContext"):
        other.wrap_socket(near, server_hostname="localhost", session=session)


@pytest.mark.parametrize("change", ["a setting", "the context"])
def test_a_session_from_before_a_change_is_not_resumed(
    change: str, background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """The handshake is a whole one, and its session the next to resume.  OpenSSL resumes none of another context."""
    context, server_context = make_client_context("ours", ca_file), make_server_context("theirs", server_cert)
    session = None
    for visit in ("first", "changed", "again"):
        near, far = tcp_pair()
        serving = background.run(lambda far=far: server_context.wrap_socket(far, server_side=True))
        if visit == "changed" and change == "a setting":
            context.set_alpn_protocols(["http/1.1"])
        with context.wrap_socket(
            near, server_hostname="localhost", session=session, do_handshake_on_connect=False
        ) as client:
            if visit == "changed" and change == "the context":
                client.context = context = make_client_context("ours", ca_file)
            client.do_handshake()
            with serving.result(PATIENCE) as server:
                server.sendall(b"hi")
                assert client.recv(2) == b"hi"
                assert client.session_reused is server.session_reused is (visit == "again")
                session = client.session


def test_sessions_are_told_apart_by_their_ids(mixed: Ends) -> None:
    client, server = mixed
    server.sendall(b"x")
    assert client.recv(1) == b"x"  # and the tickets came before it
    session, again = client.session, client.session
    assert session == again and hash(session) == hash(again) and session != session.id
    server.sendall(b"y")
    assert client.recv(1) == b"y" and len({session, client.session}) == 1
    with pytest.raises(AttributeError):
        session.id = b"another"


def test_a_server_has_one_to_show_too(background: Background, ca_file: str, server_cert: KeyPair) -> None:
    for server in ("ours", "theirs"):
        made = wrap(
            background, make_client_context("theirs", ca_file), make_server_context(server, server_cert)
        )
        with made[0], made[1]:
            session = made[1].session
            assert len(session.id) == 32 and not session.has_ticket and session.ticket_lifetime_hint == 0
            assert session.timeout == 7200 and session.time > 1e9


def test_a_session_is_set_before_the_handshake_on_a_client_s_side(mixed: Ends, ends: Ends) -> None:
    with pytest.raises(TypeError, match="Value is not a SSLSession"):
        ends[0].session = "none"
    for sock, words in (
        (ends[0], "Cannot set session after handshake"),
        (ends[1], "Cannot set session for server-side SSLSocket"),
    ):
        session = SSLSession.of(ends[0]._sslobj.stream.session(), sock.context, None)
        with pytest.raises(ValueError, match=words):
            sock.session = session


# ── processes ──


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@forks
def test_a_connected_socket_says_in_a_child_of_fork_that_it_is_none(ends: Ends) -> None:
    """By an OSError: programs and libraries expect no other of a socket."""
    client, server = ends
    calls: list[Callable[[], object]] = [
        *(lambda name=name: getattr(client, name)() for name in ("recv", "read", "pending", "unwrap")),
        *(lambda name=name: getattr(client, name)(b"x") for name in ("send", "sendall", "write")),
        lambda: client.shutdown(socket.SHUT_WR),
        lambda: client.session,
    ]

    def check() -> None:
        for call in calls:
            with pytest.raises(OSError, match=r"this TLS socket was made before fork\(\)") as caught:
                call()
            assert caught.value.errno == errno.EBADF
        client.close()

    in_a_child(check)
    client.sendall(b"still here")
    assert server.recv(100) == b"still here"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@forks
def test_a_child_may_close_a_socket_whose_first_call_was_under_way_in_the_parent(
    ca_file: str, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, let_go = threading.Event(), threading.Event()

    def slow() -> Any:
        inside.set()
        assert let_go.wait(PATIENCE)
        raise OSError("never mind")

    monkeypatch.setattr("bridge.ssl.sockets.default_bridge", slow)
    near, far = socket.socketpair()
    with far:
        client = make_client_context("ours", ca_file).wrap_socket(
            near, server_hostname="localhost", do_handshake_on_connect=False
        )
        shaking = background.run(client.do_handshake)
        assert inside.wait(PATIENCE)
        in_a_child(lambda: (signal.alarm(5), client.close()))
        let_go.set()
        with pytest.raises(OSError, match="never mind"):
            shaking.result(PATIENCE)
        client.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@forks
def test_a_server_that_forks_first_and_accepts_in_its_children(ca_file: str, server_cert: KeyPair) -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    with make_server_context("ours", server_cert).wrap_socket(plain, server_side=True) as listener:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(int(PATIENCE))
                sock, _ = listener.accept()
                sock.sendall(sock.recv(100))
                sock.close()
                our_ssl().default_bridge().close()
            finally:
                os._exit(0)
        with make_client_context("ours", ca_file).wrap_socket(
            dial(listener.getsockname()), server_hostname="localhost"
        ) as client:
            client.sendall(b"hi")
            assert receive_exactly(client, 100) == b"hi"
        os.waitpid(child, 0)


def test_a_program_that_closes_nothing_ends_at_once(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """And its peer sees a clean end."""
    program = """
import socket, sys
from bridge import ssl
sock = ssl.create_default_context(cafile=sys.argv[2]).wrap_socket(
    socket.create_connection(("127.0.0.1", int(sys.argv[1]))), server_hostname="localhost")
sock.sendall(b"hi")
"""
    context = make_server_context("theirs", server_cert)
    address, (served,) = background.serve_tls(context, lambda sock: (receive_exactly(sock, 2), sock.recv(1)))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(address[1]), ca_file],
        timeout=PATIENCE,
        cwd=ROOT,
        capture_output=True,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert served.result(PATIENCE) == (b"hi", b"")


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux's")
@pytest.mark.parametrize("module", ["ssl", "bridge.ssl as ssl"])
def test_a_thread_for_each_socket_needs_few_descriptors_more_than_with_the_stdlib(
    ca_file: str, server_cert: KeyPair, module: str
) -> None:
    """A program that has nearly as many sockets as it may; and threads are woken also without a bell of their own."""
    program = f"""
import resource, socket, sys, threading
import {module}
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
socks = []
def talk(sock):
    with context.wrap_socket(sock, server_side=True) as stream:
        socks.append(stream)
        while data := stream.recv(100):
            stream.sendall(data)
listener = socket.create_server(("127.0.0.1", 0), backlog=100)
print(listener.getsockname()[1], flush=True)
threads = []
while len(threads) < 100:
    threads.append(threading.Thread(target=talk, args=[listener.accept()[0]]))
    threads[-1].start()
sys.stdin.readline()
for sock in socks:
    sock.shutdown(socket.SHUT_RD)
for thread in threads:
    thread.join()
print("done")
"""
    command = [sys.executable, "-c", program, server_cert.certfile, server_cert.keyfile]
    context = make_client_context("theirs", ca_file)
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, text=True, cwd=ROOT, **pipes))
        stack.callback(server.kill)
        assert server.stdout is not None
        address = ("127.0.0.1", int(server.stdout.readline()))
        clients = [
            stack.enter_context(context.wrap_socket(dial(address), server_hostname="localhost"))
            for _ in range(100)
        ]
        for number in range(300):
            client = clients[number * 7 % 100]
            client.sendall(b"%05d" % number)
            assert receive_exactly(client, 5) == b"%05d" % number
        assert server.communicate("\n", PATIENCE) == ("done\n", "")


@pytest.mark.parametrize("then", [None, 5.0])
def test_a_failed_handshake_leaves_the_descriptor_to_the_bridge(
    then: float | None, background: Background, server_cert: KeyPair
) -> None:
    """`connect` has a time-out, and no other call: a worker must not block when that is taken back."""
    lingers, hung_up = threading.Event(), threading.Event()

    def refused(sock: socket.socket) -> None:
        into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = make_server_context("theirs", server_cert).wrap_bio(into, out, server_side=True)
        with contextlib.suppress(ssl.SSLError):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    server.do_handshake()
                sock.sendall(out.read())
                into.write(sock.recv(65_536))
        lingers.set()
        assert hung_up.wait(PATIENCE)

    address, (served,) = background.serve(refused)
    strange = our_ssl().create_default_context()
    client = strange.wrap_socket(socket.socket(), server_hostname="localhost")
    client.settimeout(PATIENCE)
    with pytest.raises(ssl.SSLCertVerificationError):
        client.connect(address)
    client.settimeout(then)
    assert client.gettimeout() == then and not os.get_blocking(client.fileno())
    with pytest.raises(ssl.SSLCertVerificationError):
        client.sendall(b"in plain text?")
    assert lingers.wait(PATIENCE)
    background.run(client.close).result(PATIENCE)
    hung_up.set()
    served.result(PATIENCE)


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_to_connect_a_connected_socket_leaves_it_as_it_is(method: str, ca_file: str) -> None:
    near, far = tcp_pair()
    context = make_client_context("ours", ca_file)
    with far, context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False) as client:
        with pytest.raises(ValueError, match="already-connected"):
            getattr(client, method)(far.getsockname())
        client.settimeout(0.01)
        with pytest.raises(TimeoutError):
            client.sendall(b"in plain text?")
        assert far.recv(100)[:1] == b"\x16", "a ClientHello"


@pytest.mark.parametrize("method", ["send", "sendall", "write", "recv", "read"])
def test_the_first_call_heeds_the_time_out(method: str, ca_file: str) -> None:
    near, far = tcp_pair()
    context = make_client_context("ours", ca_file)
    with far, context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False) as client:
        client.settimeout(0.01)
        with pytest.raises(TimeoutError):
            getattr(client, method)(1 if method in ("recv", "read") else b"x")
        client.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            getattr(client, method)(1 if method in ("recv", "read") else b"x")


@pytest.mark.parametrize("method", ["send", "sendall", "write", "recv", "read"])
def test_the_first_call_that_may_not_wait_does_not(method: str, ca_file: str) -> None:
    near, far = tcp_pair()
    context = make_client_context("ours", ca_file)
    with far, context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False) as client:
        client.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            getattr(client, method)(1 if method in ("recv", "read") else b"x")


def test_the_facts_of_an_accepted_socket_that_never_blocks_are_not_waited_for(
    ca_file: str, server_cert: KeyPair, background: Background
) -> None:
    context = make_server_context("ours", server_cert)
    with context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listener:
        near = dial(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.setblocking(False)
            assert accepted.version() is accepted.cipher() is accepted.selected_alpn_protocol() is None
            with pytest.raises(ValueError, match="handshake not done yet"):
                accepted.getpeercert()
            context = make_client_context("theirs", ca_file)
            connecting = background.run(lambda: context.wrap_socket(near, server_hostname="localhost"))
            patiently(accepted, accepted.do_handshake)
            with connecting.result(PATIENCE) as client:
                facts = accepted.version(), accepted.cipher(), accepted.getpeercert()
                assert facts == (client.version(), client.cipher(), None)


def test_a_signal_handler_may_make_and_close_sockets_whatever_it_interrupts(ca_file: str) -> None:
    """In the middle of whatever makes or closes one, on the same thread."""
    context = make_client_context("ours", ca_file)
    near, far = tcp_pair()
    with far, process._lock, context._recorded.lock, default_bridge()._streams._lock:
        client = context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False)
        client.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        client.close()


def test_a_bridge_that_a_signal_handler_has_made_meanwhile_is_the_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_bridge", None)
    made: list[bridge.Bridge] = []

    def make(**options: Any) -> bridge.Bridge:
        monkeypatch.setattr(process, "Bridge", bridge.Bridge)
        made.append(default_bridge())
        return bridge.Bridge(**options)

    monkeypatch.setattr(process, "Bridge", make)
    with default_bridge() as one:
        assert [one] == made and default_bridge() is one


def test_a_write_that_fails_does_not_hold_on_to_the_buffer(ends: Ends) -> None:
    """In the frames of its traceback."""
    client, _ = ends
    client.setblocking(False)
    buffer = bytearray(300_000)
    with pytest.raises(ssl.SSLWantWriteError) as caught:
        while True:
            client.send(buffer)
    buffer.clear()
    assert caught.value.__traceback__ is not None


def test_a_buffer_that_cannot_be_filled_costs_no_bytes(ends: Ends) -> None:
    client, server = ends
    server.sendall(b"hello")
    for buffer in (b"12345", memoryview(b"12345")):
        with pytest.raises(TypeError):
            client.recv_into(buffer)
    assert client.recv(5) == b"hello"


def test_what_is_a_tls_socket_already_is_refused_and_stays_as_it_is(ends: Ends, ca_file: str) -> None:
    client, server = ends
    with pytest.raises(ValueError, match="cannot be detached"):
        make_client_context("ours", ca_file).wrap_socket(client, server_hostname="localhost")
    gc.collect()
    client.sendall(b"hello")
    assert server.recv(5) == b"hello"


# ── errors ──


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (bridge.EndOfStream("the end"), ssl.SSLZeroReturnError),
        (bridge.SessionAborted("aborted"), OSError),
        (bridge.ForkedError("forked"), OSError),
        (bridge.ConfigurationError("not for the stdlib"), bridge.ConfigurationError),
    ],
)
def test_each_error_is_the_very_class_of_the_stdlib(error: bridge.BridgeError, kind: type[Exception]) -> None:
    made: Any = as_stdlib(error)
    assert type(made) is kind
    assert type(made) is not OSError or made.errno == errno.EBADF
    if isinstance(made, ssl.SSLError):
        assert made.reason is made.library is None


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_what_a_peer_says_instead_of_a_handshake(whose: str, ca_file: str) -> None:
    for said, kind, words in (
        (b"\1\0", ssl.SSLZeroReturnError, "TLS/SSL connection has been closed"),  # close_notify
        (b"\2\x28", ssl.SSLError, "SSLV3_ALERT_HANDSHAKE_FAILURE. sslv3 alert handshake failure"),
        (b"\2\x46", ssl.SSLError, "TLSV1_ALERT_PROTOCOL_VERSION. tlsv1 alert protocol version"),
    ):
        near, far = tcp_pair()
        far.sendall(b"\x15\3\3\0\2" + said)
        with (
            far,
            make_client_context(whose, ca_file).wrap_socket(
                near, server_hostname="localhost", do_handshake_on_connect=False
            ) as client,
        ):
            with pytest.raises(ssl.SSLError, match=words) as caught:
                client.do_handshake()
            assert type(caught.value) is kind and type(caught.value.args[0]) is int


def test_a_write_to_a_peer_that_asked_for_a_handshake_and_closed_is_an_error_with_a_reason(
    background: Background, ca_file: str, server_cert: KeyPair
) -> None:
    """The standard library's waits for an answer that cannot come."""
    near, far = tcp_pair()
    context = make_client_context("ours", ca_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    wrapping = background.run(lambda: context.wrap_socket(near, server_hostname="localhost"))
    server = Raw(raw_context("TLSv1.2", server_cert), far, server_side=True)
    assert server.handshake() is None
    with far, wrapping.result(PATIENCE) as client:
        assert server.connection.renegotiate() and server.handshake() is None
        server.connection.shutdown()
        assert client.recv(10) == b""
        with pytest.raises(ssl.SSLError, match="in the middle of a renegotiation") as caught:
            client.send(b"more")
        assert (caught.value.errno, caught.value.reason, caught.value.library) == (1, "CLOSE_NOTIFY", "SSL")


def test_errors_have_the_attributes_that_the_stdlibs_have() -> None:
    def attributes(call: Callable[[], Any]) -> tuple[Any, ...]:
        with pytest.raises(ssl.SSLError) as caught:
            call()
        error = caught.value
        return type(error), error.errno, error.reason, error.library

    found = []
    for module in (our_ssl(), ssl):
        near, far = tcp_pair()
        context = module.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        options = {"do_handshake_on_connect": False, "suppress_ragged_eofs": False}
        with far, context.wrap_socket(near, **options) as client:
            client.setblocking(False)
            waits = attributes(client.do_handshake)
            client.setblocking(True)
            far.shutdown(socket.SHUT_WR)
            found.append((waits, attributes(client.do_handshake)))
    assert found[0] == found[1]
