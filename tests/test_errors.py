"""Bad input gets a clear error, on the message a person reads, and nothing else is lost."""

from __future__ import annotations

import contextlib
import copy
import datetime
import errno
import pickle
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from OpenSSL import SSL
from peers import reset_on_close

import bridge
from bridge import codecs
from bridge.addresses import resolve
from bridge.names import refusal
from bridge.window import Window

PATIENCE = 30.0
SECRET = "correct horse battery staple"


@pytest.fixture(scope="module")
def server_ctx(server_cert: KeyPair) -> bridge.Context:
    return bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture(scope="module")
def client_ctx(ca_file: str) -> bridge.Context:
    return bridge.client_context(ca_file)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1, timeouts=bridge.Timeouts(close_notify=0.5)) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


Pair = Callable[..., tuple[bridge.Session, bridge.Session]]


@pytest.fixture
def pair(b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context) -> Iterator[Pair]:
    """Makes a client session and the server session it speaks to, on the same bridge."""
    with contextlib.ExitStack() as stack:

        def make(codec: Any = codecs.Raw, server_codec: Any = None) -> tuple[bridge.Session, bridge.Session]:
            listener = stack.enter_context(
                b.listen(("127.0.0.1", 0), server_ctx, codec=server_codec or codec)
            )
            client = b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codec)
            server = listener.accept(PATIENCE)
            stack.callback(client.abort)
            stack.callback(server.abort)
            return client, server

        yield make


def assert_alive(*pairs: tuple[bridge.Session, bridge.Session], message: Any = b"alive") -> None:
    for client, server in pairs:
        client.send(message)
        assert server.recv(PATIENCE) == message
        server.send(message)
        assert client.recv(PATIENCE) == message


# ── what cannot be sent ──


@pytest.mark.parametrize(
    ("codec", "message", "good", "words"),
    [
        (codecs.Raw, "text", b"ok", "Raw sends bytes, not str"),
        (codecs.Raw, 5, b"ok", "Raw sends bytes, bytearray or memoryview, not int"),
        (codecs.Raw, None, b"ok", "not NoneType"),
        (codecs.Lines, b"bytes", "ok", "Lines sends str"),
        (codecs.LengthPrefixed, ["a"], b"ok", "LengthPrefixed sends bytes"),
        (codecs.Delimited, {}, b"ok", "Delimited sends bytes"),
    ],
)
def test_a_wrong_type(pair: Pair, codec: Any, message: Any, good: Any, words: str) -> None:
    client, server = pair(codec)
    for send in (client.send, client.outbox.put, client.outbox.put_nowait):
        with pytest.raises(TypeError, match=words):
            send(message)
    assert_alive((client, server), message=good)


class Clumsy(codecs.Raw):
    """Encodes to whatever it is given, or raises it."""

    def encode(self, message: Any) -> Any:
        if isinstance(message, Exception):
            raise message
        return message


@pytest.mark.parametrize("result", ["text", bytearray(b"x"), memoryview(b"x"), None, 5])
def test_an_encoder_that_returns_no_bytes(pair: Pair, result: Any) -> None:
    client, server = pair(Clumsy)
    with pytest.raises(TypeError, match=rf"Clumsy\.encode must return bytes, not {type(result).__name__}"):
        client.send(result)
    assert_alive((client, server))


def test_an_encoder_that_raises_raises_to_its_caller_only(pair: Pair) -> None:
    client, server = pair(Clumsy)
    with pytest.raises(KeyError, match="mine"):
        client.send(KeyError("mine"))
    assert_alive((client, server))


def test_a_message_over_its_limit(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    limits = bridge.Limits(message_bytes=1000)
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", limits=limits)
        server = listener.accept(PATIENCE)
        with pytest.raises(ValueError, match=r"1001 bytes is over Limits\.message_bytes, which is 1000"):
            client.send(bytes(1001))
        client.send(bytes(1000))
        assert server.recv(PATIENCE) == bytes(1000)
        assert_alive((client, server))
        client.abort()
        server.abort()


def test_a_message_over_the_codec_s_limit_is_refused_by_the_sender(pair: Pair) -> None:
    client, server = pair(lambda: codecs.LengthPrefixed(4, max_length=10))
    with pytest.raises(ValueError, match="a message of 11 bytes: the limit is 10 bytes"):
        client.send(bytes(11))
    assert_alive((client, server))


# ── what cannot be decoded ──


class Picky(codecs.Raw):
    """Raises on one word."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        for word in data.split():
            if word == b"poison":
                raise KeyError("I do not like it")
            yield word


def test_a_codec_that_raises_ends_its_own_session_only(pair: Pair, logs: list[Any]) -> None:
    others = [pair() for _ in range(3)]
    client, server = pair(codecs.Raw, Picky)
    client.send(b"one two poison three")
    assert [server.recv(PATIENCE), server.recv(PATIENCE)] == [b"one", b"two"]
    with pytest.raises(
        bridge.CodecError, match=r"the codec failed: KeyError\('I do not like it'\)"
    ) as caught:
        server.recv(PATIENCE)
    assert type(caught.value.__cause__) is KeyError and isinstance(caught.value, ValueError)
    with pytest.raises(bridge.CodecError):
        server.send(b"x")
    with pytest.raises((bridge.Truncated, bridge.EndOfStream)):
        client.recv(PATIENCE)
    assert_alive(*others)
    assert not [entry for entry in logs if entry["event"] in ("worker.failed", "coordinator.failed")]


class Wordless(Exception):
    """An error whose class is at fault, too: it cannot be told, nor why."""

    def __str__(self) -> str:
        raise Wordless

    __repr__ = __str__


def test_also_if_its_error_cannot_be_told(pair: Pair) -> None:
    class Broken(codecs.Raw):
        def decode(self, data: bytes) -> list[bytes]:
            raise Wordless

    others = pair()
    client, server = pair(codecs.Raw, Broken)
    client.send(b"x")
    with pytest.raises(bridge.CodecError, match="the codec failed: an unprintable Wordless"):
        server.recv(PATIENCE)
    assert_alive(others)


class Wrapper:
    """A codec by delegation: its class has no method of one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_codec_need_not_have_its_methods_from_its_class(pair: Pair) -> None:
    client, server = pair(lambda: Wrapper(codecs.Lines()))
    client.send("hello")
    assert server.recv(PATIENCE) == "hello"
    assert_alive((client, server), message="x")


class BadCommand(bridge.CodecError):
    """Takes other arguments than it passes on."""

    def __init__(self, command: str, position: int) -> None:
        super().__init__(f"bad command {command!r} at {position}")
        self.position = position


class BadWord(bridge.CodecError):
    """Makes its text of what it is given."""

    def __init__(self, word: str) -> None:
        super().__init__(f"bad word {word!r}")


class Fussy(bridge.CodecError):
    """As `BadCommand`, and before it is made."""

    def __new__(cls, command: str, position: int) -> Fussy:
        return super().__new__(cls, command)

    def __init__(self, command: str, position: int) -> None:
        super().__init__(f"fussy about {command!r}")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BadCommand("HELO", 7), "bad command 'HELO' at 7"),
        (BadWord("poison"), "bad word 'poison'"),
        (Fussy("HELO", 7), "fussy about 'HELO'"),
    ],
    ids=["two arguments", "one argument", "its own __new__"],
)
def test_a_codec_s_own_kind_of_codec_error_is_raised_as_it_is(
    pair: Pair, logs: list[Any], error: bridge.CodecError, text: str
) -> None:
    class Refusing(codecs.Raw):
        def decode(self, data: bytes) -> list[bytes]:
            raise error

    client, server = pair(codecs.Raw, Refusing)
    client.send(b"x")
    for _ in range(3):  # a copy for each
        with pytest.raises(type(error)) as caught:
            server.recv(PATIENCE)
        assert str(caught.value) == text and vars(caught.value) == vars(error)
    assert not [entry for entry in logs if entry["event"] == "coordinator.failed"]
    client.abort()


@pytest.mark.parametrize("wait", ["recv", "send", "connect", "inbox"])
def test_a_codec_that_waits_is_told_not_to(
    b: bridge.Bridge, pair: Pair, wait: str, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    """Without that it would wait for ever, and with it every session of the Bridge."""
    listener = b.listen(("127.0.0.1", 0), server_ctx)
    waits: dict[str, Callable[[], Any]] = {
        "recv": lambda: server.recv(),
        "send": lambda: [server.send(bytes(100_000)) for _ in range(1000)],
        "connect": lambda: b.connect(listener.address, client_ctx, server_hostname="localhost"),
        "inbox": lambda: bridge.Inbox().get(),
    }

    class Waiting(codecs.Raw):
        def decode(self, data: bytes) -> list[bytes]:
            waits[wait]()
            return [data]

    other = pair()
    client, server = pair(codecs.Raw, Waiting)
    client.send(b"x")
    with pytest.raises(bridge.CodecError, match="a codec may not wait: .* thread of your own") as caught:
        server.recv(PATIENCE)
    assert type(caught.value.__cause__) is bridge.ConfigurationError
    assert_alive(other)
    client.abort()
    server.abort()


def test_a_codec_that_raises_at_the_end(pair: Pair) -> None:
    client, server = pair(codecs.Raw, lambda: codecs.LengthPrefixed(4))
    client.send(b"\0\0\0\7half")
    client.send_eof()
    with pytest.raises(bridge.CodecError, match="ended inside a message"):
        server.recv(PATIENCE)


@pytest.mark.parametrize(
    ("codec", "wire", "words"),
    [
        (lambda: codecs.Lines(max_length=10), b"twelve bytes", "10"),
        (lambda: codecs.LengthPrefixed(4, max_length=10), b"\0\0\0\x0b", "11.*10"),
        (lambda: codecs.Delimited(max_length=10), b"twelve bytes", "10"),
    ],
)
def test_a_message_of_the_peer_over_the_limit(pair: Pair, codec: Any, wire: bytes, words: str) -> None:
    other = pair()
    client, server = pair(codecs.Raw, codec)
    client.send(wire)
    with pytest.raises(bridge.MessageTooLarge, match=words):
        server.recv(PATIENCE)
    assert_alive(other)


def test_a_codec_that_is_no_codec(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        socket.create_connection(listener.address) as sock,
    ):
        uses: list[Callable[[Any], Any]] = [
            lambda codec: b.listen(("127.0.0.1", 0), server_ctx, codec=codec),
            lambda codec: b.connect(listener.address, client_ctx, server_hostname="localhost", codec=codec),
            lambda codec: b.adopt(sock, client_ctx, server_hostname="localhost", codec=codec),
        ]
        for use in uses:
            with pytest.raises(bridge.ConfigurationError, match="codec must be a factory"):
                use(codecs.Raw())
            with pytest.raises(
                bridge.ConfigurationError, match="which is no codec: it lacks decode, encode, eof"
            ):
                use(object)
            with pytest.raises(bridge.ConfigurationError, match="no codec: it lacks an instance"):
                use(lambda: codecs.Lines)
            with pytest.raises(KeyError):
                use(lambda: {}["no"])
        assert sock.fileno() != -1
        assert listener.handshakes.used <= 1


@pytest.mark.parametrize(
    ("failure", "said"),
    [(KeyError("not this one"), "'not this one'"), (Wordless(), "an unprintable Wordless")],
    ids=["an error", "one without words"],
)
def test_a_factory_that_fails_for_one_client_does_not_end_the_listener(
    failure: Exception,
    said: str,
    b: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    logs: list[Any],
) -> None:
    calls = iter(range(100))

    def factory() -> codecs.Raw:
        if next(calls) == 1:  # the first call is `listen`'s, to see whether it is a factory at all
            raise failure
        return codecs.Raw()

    with b.listen(("127.0.0.1", 0), server_ctx, codec=factory) as listener:
        with pytest.raises((bridge.Truncated, bridge.PeerReset)):
            b.connect(listener.address, client_ctx, server_hostname="localhost")
        client = b.connect(listener.address, client_ctx, server_hostname="localhost")
        server = listener.accept(PATIENCE)
        assert_alive((client, server))
        client.abort()
        server.abort()
        refused = wait_for(logs, "listener.refused")
        assert refused["address"] == "{}:{}".format(*listener.address) and refused["log_level"] == "warning"
        assert (refused["cause"], refused["error"]) == (type(failure).__name__, said)
        assert "127.0.0.1:" in refused["peer"] != refused["address"]
    assert "handshake.failed" not in [entry["event"] for entry in logs]


# ── addresses and sockets ──


def test_an_address_in_use(b: bridge.Bridge, server_ctx: bridge.Context, tmp_path: Path) -> None:
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        port = listener.address[1]
        with pytest.raises(
            OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"
        ) as caught:
            b.listen(listener.address, server_ctx)
        assert caught.value.errno == errno.EADDRINUSE
    with b.listen(str(tmp_path / "socket"), server_ctx) as listener:
        words = (
            "cannot listen on .*/socket: Address already in use; remove the file if no program listens there$"
        )
        with pytest.raises(OSError, match=words):
            b.listen(listener.address, server_ctx)
        assert (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("address", "where"),
    [
        (("::1", 443, 5), ("::1", 443, 5, 0)),
        (("::1", 443, 5, 1), ("::1", 443, 5, 1)),
        (("127.0.0.1", 443, 5), ("127.0.0.1", 443)),
        ("/run/app:80", "/run/app:80"),
    ],
)
def test_an_address_is_taken_whole(address: Any, where: Any) -> None:
    _, found = resolve(address)
    assert [one[4] for one in found] == [where]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (("::1%no-such-interface", 443), "cannot resolve '::1%no-such-interface'"),
        (("localhost", "no-such-service"), "cannot resolve 'localhost' and the service 'no-such-service': "),
        (("localhost", ""), "port.*65535, not ''"),
        (("127.0.0.1", 65536), "port.*65535"),
        (("127.0.0.1", "65536"), "port.*65535"),
        (("127.0.0.1", "\udc80"), "port.*65535"),
        (("127.0.0.1", -1), "port.*65535|cannot resolve"),
        (("a" * 64 + ".example", 443), "is no host name: .*label (empty|too long|empty or too long)"),
        (("a..b", 443), "is no host name: .*label (empty|too long|empty or too long)"),
        ((5, 443), "the host must be a str, not 5"),
        (("localhost", None), "the port must be a whole number"),
        (("127.0.0.1",), r"address must be \(host, port\)"),
        ("localhost:443", r"address must be \(host, port\), as \('localhost', 443\)"),
        (("::1", 443, 0, 0, 0), "IPv6's flow information and scope, two numbers"),
        (("::1", 443, 0, -1), r"two numbers, not \[0, -1\]"),
        (("::1", 443, "flow"), r"two numbers, not \['flow'\]"),
        ("/nowhere/\ud800", r"address '/nowhere/\\ud800' is no path: .*surrogates not allowed"),
        (443, r"address must be \(host, port\)"),
        (None, r"address must be \(host, port\)"),
    ],
)
def test_an_address_that_is_none(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context, address: Any, words: str
) -> None:
    for use in (
        lambda: b.connect(address, client_ctx, server_hostname="localhost", timeout=PATIENCE),
        lambda: b.listen(address, server_ctx),
    ):
        with pytest.raises((OSError, ValueError), match=words) as caught:
            use()
        assert not isinstance(caught.value, bridge.SessionEnded), "known before anything was started"
    assert b.snapshot().sessions == ()


@pytest.mark.parametrize("address", ["example.org", b"example.org"])
def test_a_host_without_its_port_is_said_to_be_a_path(
    b: bridge.Bridge, client_ctx: bridge.Context, address: Any
) -> None:
    words = rf"{address!r} is taken for the path of a Unix socket; TCP takes .* \('example\.org', 443\)"
    with pytest.raises(
        bridge.ConfigurationError, match=f"{words}.*If it is a path, server_hostname is needed"
    ):
        b.connect(address, client_ctx)
    with pytest.raises(bridge.ConfigurationError, match="^server_hostname is needed"):
        b.connect("./example.org", client_ctx)
    with pytest.raises(bridge.ConnectFailed, match=r"cannot connect to example\.org"):
        b.connect(address, client_ctx, server_hostname="localhost")


@pytest.mark.parametrize("address", ["localhost", b"localhost"])
def test_a_host_without_its_port_is_nothing_to_listen_on(
    b: bridge.Bridge,
    server_ctx: bridge.Context,
    client_ctx: bridge.Context,
    address: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = rf"as \('localhost', 443\), not {address!r}; .* working directory write '\./localhost'"
    with pytest.raises(bridge.ConfigurationError, match=words):
        b.listen(address, server_ctx)
    assert list(tmp_path.iterdir()) == []
    with b.listen("./localhost", server_ctx) as listener:
        b.connect("localhost", client_ctx, server_hostname="localhost").abort()
        listener.accept(PATIENCE).abort()


def test_nobody_listens(b: bridge.Bridge, client_ctx: bridge.Context) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(
            ConnectionError, match=rf"cannot connect to 127\.0\.0\.1:{port}: Connection refused"
        ) as caught:
            b.connect(nobody.getsockname(), client_ctx, server_hostname="localhost")
    assert type(caught.value) is bridge.ConnectFailed
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ECONNREFUSED


def test_where_there_are_no_unix_sockets_it_is_said(
    b: bridge.Bridge, client_ctx: bridge.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    with pytest.raises(bridge.ConfigurationError, match="no Unix sockets: address must be"):
        b.connect("/nowhere", client_ctx, server_hostname="localhost")
    with pytest.raises(bridge.ConfigurationError, match="no Unix sockets"):
        Window(b, "/nowhere")


@pytest.mark.parametrize("wait", [True, False])
def test_adopting_what_the_peer_has_reset_already_is_no_fault_of_the_call(
    b: bridge.Bridge, server_ctx: bridge.Context, wait: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        reset_on_close(client)
        accepted = listener.accept()[0]
        client.close()
    with pytest.raises((bridge.Truncated, bridge.PeerReset)):
        b.adopt(accepted, server_ctx, wait=wait).recv(PATIENCE)
    assert accepted.fileno() == -1, "taken over, as any socket whose session fails"


def test_a_flag_that_is_no_bool_is_refused_and_the_socket_left_alone(
    b: bridge.Bridge, client_ctx: bridge.Context
) -> None:
    flags: dict[str, Any] = {"wait": None, "server_side": "no"}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for flag, value in flags.items():
            with pytest.raises(
                bridge.ConfigurationError, match=f"{flag} must be True or False, not {value!r}"
            ):
                b.adopt(ours, SSL.Context(SSL.TLS_METHOD), **{"server_side": False, flag: value})
        with pytest.raises(bridge.ConfigurationError, match="server_side must be True or False, not 1"):
            b.stream(ours, client_ctx, server_side=1)  # type: ignore[arg-type]
        with pytest.raises(bridge.ConfigurationError, match="wait must be True or False, not 0"):
            b.connect(("127.0.0.1", 1), client_ctx, wait=0)  # type: ignore[arg-type]
        assert ours.fileno() != -1
    with pytest.raises(bridge.ConfigurationError, match="start must be True or False, not None"):
        bridge.Bridge(start=None)  # type: ignore[arg-type]


def test_adopting_what_cannot_be_adopted(
    b: bridge.Bridge, client_ctx: bridge.Context, server_ctx: bridge.Context, ca_file: str
) -> None:
    closed = socket.socket()
    closed.close()
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        socket.socket() as unconnected,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        ssl.create_default_context(cafile=ca_file).wrap_socket(
            socket.create_connection(listener.address), server_hostname="localhost"
        ) as wrapped,
    ):
        for sock, words in [
            (closed, "sock is closed"),
            (unconnected, r"sock is not connected \(.*\); use Bridge\.connect"),
            (udp, "sock must be a stream socket, not .*DGRAM.*: TLS runs over streams"),
            (wrapped, "sock is an ssl.SSLSocket, which does TLS already"),
            (5, "sock must be a socket.socket, not 5"),
            (None, "sock must be a socket.socket, not None"),
        ]:
            before = sock.fileno() if isinstance(sock, socket.socket) else None
            with pytest.raises(bridge.ConfigurationError, match=words):
                b.adopt(sock, client_ctx, server_hostname="localhost")  # type: ignore[arg-type]
            if before is not None:
                assert sock.fileno() == before  # type: ignore[union-attr]
        server = listener.accept(PATIENCE)
        wrapped.send(b"unharmed")
        assert server.recv(PATIENCE) == b"unharmed"
        server.abort()


def test_listening_on_what_cannot_listen(b: bridge.Bridge, server_ctx: bridge.Context) -> None:
    closed = socket.socket()
    closed.close()
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.create_server(("127.0.0.1", 0)) as bound:
        with socket.create_connection(bound.getsockname()) as connected, pytest.raises(OSError) as caught:
            b.listen(connected, server_ctx)
        assert not isinstance(caught.value, bridge.SessionEnded)
        with pytest.raises(bridge.ConfigurationError, match="stream socket"):
            b.listen(udp, server_ctx)
    with pytest.raises(bridge.ConfigurationError, match="sock is closed"):
        b.listen(closed, server_ctx)
    taken = socket.create_server(("127.0.0.1", 0))
    b.listen(taken, server_ctx)
    with pytest.raises(bridge.ConfigurationError, match="or was handed over before"):
        b.listen(taken, server_ctx)


# ── contexts ──


def test_a_context_of_the_wrong_side(
    b: bridge.Bridge, client_ctx: bridge.Context, server_ctx: bridge.Context
) -> None:
    with pytest.raises(
        bridge.ConfigurationError, match=r"made by client_context\(\).*needs one made by server_context"
    ):
        b.listen(("127.0.0.1", 0), client_ctx)
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        with pytest.raises(
            bridge.ConfigurationError, match=r"made by server_context\(\).*by client_context\(\)"
        ):
            b.connect(listener.address, server_ctx)
        with socket.create_connection(listener.address) as sock:
            with pytest.raises(bridge.ConfigurationError, match="does not say which side"):
                b.adopt(sock, SSL.Context(SSL.TLS_METHOD))
            with pytest.raises(bridge.ConfigurationError, match="server_context"):
                b.adopt(sock, client_ctx, server_side=True)
            assert sock.fileno() != -1


def test_a_context_of_another_library(b: bridge.Bridge) -> None:
    with pytest.raises(
        bridge.ConfigurationError, match=r"client_context\(\).*OpenSSL\.SSL\.Context, not ssl\.SSLContext"
    ):
        b.connect(("127.0.0.1", 1), ssl.create_default_context())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "", "no such name", "under_score..dots"])
def test_a_name_that_is_missing_or_none(
    b: bridge.Bridge, client_ctx: bridge.Context, server_ctx: bridge.Context, name: Any
) -> None:
    """Refused by the call, as the caller's fault; not by a worker, as the bridge's."""
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        socket.create_connection(listener.address) as sock,
    ):
        with pytest.raises(bridge.ConfigurationError, match="server_hostname"):
            b.adopt(sock, client_ctx, server_hostname=name)
        assert sock.fileno() != -1
        if name is not None:
            with pytest.raises(bridge.ConfigurationError, match="server_hostname"):
                b.connect(listener.address, client_ctx, server_hostname=name)


# ── certificates of the peer ──


@contextlib.contextmanager
def stdlib_server(cert: trustme.LeafCert, pool: ThreadPoolExecutor) -> Iterator[Any]:
    """An address where the stdlib serves one client with *cert*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert.configure_cert(context)

    def serve() -> None:
        raw = listener.accept()[0]
        raw.settimeout(PATIENCE)
        with raw, contextlib.suppress(OSError):
            context.wrap_socket(raw, server_side=True).recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = pool.submit(serve)
        yield listener.getsockname()
        serving.result(PATIENCE)


def test_a_wrong_host_name_is_told_with_both_names(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        pytest.raises(
            ssl.SSLCertVerificationError, match=r"(?s)bank\.example.*localhost|localhost.*bank\.example"
        ) as caught,
    ):
        b.connect(listener.address, client_ctx, server_hostname="bank.example")
    assert type(caught.value) is bridge.HostnameMismatch


def test_an_unknown_ca(b: bridge.Bridge, client_ctx: bridge.Context, pool: ThreadPoolExecutor) -> None:
    with (
        stdlib_server(trustme.CA().issue_cert("localhost"), pool) as address,
        pytest.raises(
            ssl.SSLCertVerificationError, match="(?i)unable to get local issuer certificate|self-signed"
        ) as caught,
    ):
        b.connect(address, client_ctx, server_hostname="localhost")
    assert type(caught.value) is bridge.CertificateError
    assert caught.value.verify_code in (19, 20) and caught.value.verify_message in str(caught.value)
    assert "if you trust it, pass its CA as cafile" in str(caught.value)


def test_an_unknown_ca_is_one_too_where_a_context_of_the_user_s_own_has_a_callback(
    b: bridge.Bridge, server_ctx: bridge.Context
) -> None:
    raw = SSL.Context(SSL.TLS_METHOD)
    raw.set_verify(SSL.VERIFY_PEER, lambda connection, certificate, code, depth, ok: bool(ok))
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer certificate") as caught,
    ):
        b.connect(listener.address, raw, server_hostname="localhost")
    assert type(caught.value) is bridge.CertificateError and caught.value.verify_code == 20


def test_an_expired_certificate(
    b: bridge.Bridge, ca: trustme.CA, client_ctx: bridge.Context, pool: ThreadPoolExecutor
) -> None:
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    expired = ca.issue_cert(
        "localhost", not_before=yesterday - datetime.timedelta(days=9), not_after=yesterday
    )
    with (
        stdlib_server(expired, pool) as address,
        pytest.raises(bridge.CertificateError, match="certificate has expired") as caught,
    ):
        b.connect(address, client_ctx, server_hostname="localhost")
    assert caught.value.verify_code == 10


def test_a_server_tells_its_log_why_a_client_went_away(
    b: bridge.Bridge, server_ctx: bridge.Context, logs: list[Any]
) -> None:
    """The client's alert: nobody else would tell the operator that clients do not trust the certificate."""
    stranger = ssl.create_default_context()
    with b.listen(("127.0.0.1", 0), server_ctx) as listener:
        with (
            pytest.raises(ssl.SSLCertVerificationError),
            stranger.wrap_socket(socket.create_connection(listener.address), server_hostname="localhost"),
        ):
            pass
        failed = wait_for(logs, "handshake.failed")
    assert failed["cause"] == "TLSError" and "unknown ca" in failed["error"], failed


def wait_for(logs: list[Any], event: str) -> Any:
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        for entry in list(logs):
            if entry["event"] == event:
                return entry
        pause.wait(0.01)
    raise AssertionError(f"no {event} in {logs}")


# ── peers that do not speak TLS ──


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"GET /path HTTP/1.1\r\nHost: x\r\n\r\n", ["plain HTTP", "are b'GET /' (", "TLS port"]),
        (b"POST / HTTP/1.1\r\n\r\n", ["plain HTTP", "are b'POST ' ("]),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ["plain SSH", "are b'SSH-2' ("]),
        (b"EHLO mail.example\r\n", ["SMTP", "EHLO"]),
        (b"AUTH hunter2\r\n", ["something else", "are b'AUTH ' ("]),
        (b"\xff\xfe\xfd\xfc\xfb\xfa", ["something else", r"\xff\xfe"]),
    ],
)
def test_a_client_that_does_not_speak_tls(
    b: bridge.Bridge, server_ctx: bridge.Context, logs: list[Any], first: bytes, words: list[str]
) -> None:
    with (
        b.listen(("127.0.0.1", 0), server_ctx) as listener,
        socket.create_connection(listener.address) as sock,
    ):
        sock.sendall(first)
        failed = wait_for(logs, "handshake.failed")
    assert failed["cause"] == "NotTLS"
    for word in words:
        assert word in failed["error"], failed


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ["plain HTTP", "HTTP/1.1 400"]),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ["plain SSH", "SSH-2.0-OpenSSH"]),
        (b"220 mail.example ESMTP\r\n", ["SMTP", "220 mail.example"]),
        (b"* OK IMAP4rev1\r\n", ["IMAP", "* OK"]),
        (b"+OK POP3 ready\r\n", ["POP3", "+OK"]),
        (b"who are you?\n", ["something else", "who are you"]),
    ],
)
def test_a_server_that_does_not_speak_tls(
    b: bridge.Bridge, client_ctx: bridge.Context, first: bytes, words: list[str], pool: ThreadPoolExecutor
) -> None:
    def serve() -> None:
        with listener.accept()[0] as sock:
            sock.sendall(first)
            while sock.recv(1000):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = pool.submit(serve)
        with pytest.raises(ssl.SSLError, match="not TLS") as caught:
            b.connect(listener.getsockname(), client_ctx, server_hostname="localhost")
        assert type(caught.value) is bridge.NotTLS
        for word in words:
            assert word in str(caught.value)
        serving.exception(PATIENCE)


# ── errors elsewhere ──


ERRORS = [
    thing for thing in vars(bridge).values() if isinstance(thing, type) and issubclass(thing, BaseException)
]
AGAIN: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


def specimen(kind: type[BaseException]) -> BaseException:
    """An error as the bridge raises it, with attributes of its own."""
    if kind is bridge.WouldBlock:
        return bridge.WouldBlock(2)
    if issubclass(kind, bridge.CertificateError):
        return refusal("for nobody", 62, "hostname mismatch", 0, kind)
    return kind(errno.EIO, "what happened") if issubclass(kind, OSError) else kind("what happened")


@pytest.mark.parametrize("how", AGAIN.values(), ids=list(AGAIN))
@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_can_be_copied_and_sent_to_another_process(
    kind: type[BaseException], how: Callable[[Any], Any]
) -> None:
    error = specimen(kind)
    error.note = "mine"  # type: ignore[attr-defined]
    again = how(error)
    assert type(again) is type(error) and again is not error
    assert (again.args, str(again), vars(again)) == (error.args, str(error), vars(error))
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


# ── the bridge itself ──


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True])
def test_workers(workers: Any) -> None:
    with pytest.raises(bridge.ConfigurationError, match="workers must be a positive whole number, not"):
        bridge.Bridge(workers=workers)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
@pytest.mark.parametrize(
    "field",
    ["sessions", "handshakes", "inbox_bytes", "outbox_bytes", "total_bytes", "message_bytes", "backlog"],
)
def test_limits(field: str, value: Any) -> None:
    with pytest.raises(
        bridge.ConfigurationError, match=rf"Limits\.{field} must be a positive whole number, not"
    ):
        bridge.Limits(**{field: value})


def test_nothing_starts_after_the_end(server_ctx: bridge.Context, client_ctx: bridge.Context) -> None:
    b = bridge.Bridge(workers=1)
    b.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            for use in (
                lambda: b.connect(listener.getsockname(), client_ctx, server_hostname="localhost"),
                lambda: b.adopt(sock, client_ctx, server_hostname="localhost"),
                lambda: b.listen(("127.0.0.1", 0), server_ctx),
            ):
                with pytest.raises(bridge.BridgeClosed, match="this Bridge is closed; make a new one"):
                    use()
            assert sock.fileno() != -1


def test_the_limit_of_sessions(server_ctx: bridge.Context, client_ctx: bridge.Context) -> None:
    with (
        bridge.Bridge(workers=1) as far,
        far.listen(("127.0.0.1", 0), server_ctx) as listener,
        bridge.Bridge(workers=1, limits=bridge.Limits(sessions=2)) as b,
    ):
        sessions = [b.connect(listener.address, client_ctx, server_hostname="localhost") for _ in range(2)]
        with pytest.raises(bridge.LimitExceeded, match=r"Limits\.sessions is reached: 2 sessions are open"):
            b.connect(listener.address, client_ctx, server_hostname="localhost")
        sessions[0].abort()
        sessions[0].close()
        b.connect(listener.address, client_ctx, server_hostname="localhost").abort()
        sessions[1].abort()


def test_renegotiation_where_there_is_none(b: bridge.Bridge, pair: Pair) -> None:
    client, server = pair()
    for session in (client, server):
        with pytest.raises(bridge.ConfigurationError, match=r"TLS 1\.3 has no renegotiation"):
            session.renegotiate()
    assert_alive((client, server))


def test_receiving_where_messages_go_elsewhere(
    b: bridge.Bridge, server_ctx: bridge.Context, client_ctx: bridge.Context
) -> None:
    shared = bridge.Inbox()
    with b.listen(("127.0.0.1", 0), server_ctx, inbox=shared) as listener:
        client = b.connect(listener.address, client_ctx, server_hostname="localhost", inbox=shared)
        calls: list[Callable[[], Any]] = [
            client.recv,
            client.peek,
            lambda: client.inbox,
            lambda: list(client),
        ]
        for call in calls:
            with pytest.raises(bridge.ConfigurationError, match="shared inbox"):
                call()
        client.abort()
        with pytest.raises(bridge.ConfigurationError, match="shared inbox"):
            listener.accept(timeout=1)


@pytest.mark.parametrize("inbox", [[], "inbox", queue.Queue()], ids=["list", "str", "Queue"])
def test_an_inbox_that_is_none(b: bridge.Bridge, server_ctx: bridge.Context, inbox: Any) -> None:
    with pytest.raises(bridge.ConfigurationError, match=r"inbox must be a bridge\.Inbox"):
        b.listen(("127.0.0.1", 0), server_ctx, inbox=inbox)


# ── secrets ──


class Leaky(codecs.Raw):
    """As people write it: decodes text, and lets Python complain, whose complaint holds the text."""

    def decode(self, data: bytes) -> Iterator[Any]:
        yield data.decode()


@pytest.mark.parametrize("codec", [codecs.Lines, Leaky])
def test_what_a_peer_said_is_in_no_log(pair: Pair, logs: list[Any], codec: Any) -> None:
    client, server = pair(codecs.Raw, codec)
    client.send(f"password: {SECRET}".encode() + b"\xff\n")
    with pytest.raises(bridge.CodecError):
        server.recv(PATIENCE)
    wait_for([entry for entry in logs if entry.get("cause") == "CodecError"] or logs, "session.state")
    server.close()
    assert SECRET not in repr(logs)


def test_what_is_sent_is_in_no_error_and_no_log(pair: Pair, logs: list[Any]) -> None:
    client, server = pair(lambda: codecs.Delimited(b"\n", max_length=100))
    for message in (f"{SECRET}\n{SECRET}".encode(), SECRET.encode() * 10, SECRET):
        with pytest.raises((TypeError, ValueError)) as caught:
            client.send(message)
        assert SECRET not in str(caught.value)
    client.send(SECRET.encode())
    assert server.recv(PATIENCE) == SECRET.encode()
    client.abort()
    with pytest.raises(bridge.SessionEnded) as ended:
        server.recv(PATIENCE)
    assert SECRET not in str(ended.value) and SECRET not in repr(logs) and SECRET not in repr(client)


def test_a_password_is_in_no_error(tmp_path: Path, server_cert: KeyPair) -> None:
    with pytest.raises(bridge.ConfigurationError) as caught:
        bridge.server_context(server_cert.certfile, str(tmp_path / "none.pem"), password=SECRET)
    assert SECRET not in str(caught.value)


def test_a_client_certificate_of_a_stranger_is_told_to_the_log(
    b: bridge.Bridge, server_cert: KeyPair, ca_file: str, logs: list[Any], tmp_path: Path
) -> None:
    mutual = bridge.server_context(server_cert.certfile, server_cert.keyfile, client_ca=ca_file)
    stranger = write_key_pair(trustme.CA().issue_cert("mallory@example.org"), tmp_path)
    context = bridge.client_context(ca_file, certfile=stranger.certfile, keyfile=stranger.keyfile)
    with b.listen(("127.0.0.1", 0), mutual) as listener:
        with pytest.raises(bridge.TLSError, match="(?i)alert unknown ca"):
            b.connect(listener.address, context, server_hostname="localhost").recv(PATIENCE)
        failed = wait_for(logs, "handshake.failed")
    assert failed["cause"] == "CertificateError" and "issuer" in failed["error"]
