"""websocket-client, and `websockets.sync` as client and as server: threads that read and write at the same time."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dropin_rig import CONTROL, Arrangement, library
from peers import PATIENCE, dial
from stubs import expected, our_client, spoken_by

from bridge.crossing import deadline_after, time_left

pytestmark = pytest.mark.usefixtures("default_bridge")

MESSAGES = [random.Random(seed).randbytes(size) for seed, size in enumerate((1, 0, 125, 65_536, 2_000_000))]
LONG = 60.0
"""Seconds between pings where none shall be needed; longer than any test may take."""


class Duplex(ssl.SSLSocket):
    """The stdlib's, made fit for two threads at once, which are two too many for CPython's own: one call of OpenSSL at
    a time, and none of them waits.

    Else a read fails, or runs out of time, or hangs because another thread has begun to send or has set a timeout.
    """

    _turn = threading.Lock()  # one for all will do
    _seconds: float | None = None

    def settimeout(self, value: float | None) -> None:
        super().settimeout(0)
        self._seconds = value

    def gettimeout(self) -> float | None:
        return self._seconds

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        give_up = deadline_after(self._seconds)
        while True:
            try:
                with self._turn:
                    return function(*arguments)
            except ssl.SSLWantReadError:
                want = selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                want = selectors.EVENT_WRITE
            with selectors.DefaultSelector() as selector:
                selector.register(self, want)
                if not selector.select(time_left(give_up)):
                    raise TimeoutError

    def do_handshake(self, block: bool = False) -> None:
        self._call(super().do_handshake)

    def recv(self, size: int = 1024, flags: int = 0) -> Any:
        return self._call(super().recv, size)

    def send(self, data: Any, flags: int = 0) -> Any:
        return self._call(super().send, data)


class Server:
    """A server of `websockets.sync`: what it does with a client depends on the path."""

    def __init__(self, context: Any) -> None:
        self.sides: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Whose TLS each connection spoke."""
        self.received: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        """What came while "/duplex" sent."""
        serve = library("websockets.sync.server").serve
        self._server = serve(
            self._handle, "127.0.0.1", 0, ssl=context, compression=None, max_size=None, open_timeout=PATIENCE
        )
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def port(self) -> int:
        """Where it listens."""
        number: int = self._server.socket.getsockname()[1]
        return number

    @property
    def url(self) -> str:
        """What a client connects to."""
        return f"wss://localhost:{self.port}"

    def _handle(self, connection: Any) -> None:
        self.sides.put(spoken_by(connection.socket))
        if connection.request.path == "/duplex":
            with sending(connection.send, MESSAGES):
                self.received.put([connection.recv(PATIENCE) for _ in MESSAGES])
        with contextlib.suppress(library("websockets.exceptions").ConnectionClosed):
            for message in connection:
                connection.send(message)
                if connection.request.path == "/one":
                    break

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for end in (self._server.shutdown_watcher, self._server.shutdown_notifier):
            if isinstance(end, int):  # which websockets before version 17 leaves open
                os.close(end)


@contextlib.contextmanager
def sending(send: Callable[[bytes], Any], messages: Iterable[bytes]) -> Iterator[None]:
    """Meanwhile a thread sends *messages*; what it fails with is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: [send(message) for message in messages])
        yield
        sent.result(PATIENCE)


@pytest.fixture
def server(arrangement: Arrangement, server_context: Any) -> Iterator[Server]:
    """A running server; its connections must have been by the class that the arrangement names."""
    if CONTROL or arrangement.server == "theirs":
        server_context.sslsocket_class = Duplex
    with Server(server_context) as made:
        yield made
        assert made.sides.get(timeout=PATIENCE) == expected(arrangement.server)


# ── websockets.sync ──


@pytest.fixture
def connect(arrangement: Arrangement, client_context: Any, server: Server) -> Callable[[str], Any]:
    """Makes a context manager of a connection to a path of the server."""
    if CONTROL or arrangement.client == "theirs":
        client_context.sslsocket_class = Duplex

    @contextlib.contextmanager
    def connected(path: str = "/") -> Iterator[Any]:
        client = library("websockets.sync.client").connect(
            server.url + path,
            ssl=client_context,
            proxy=None,
            compression=None,
            max_size=None,
            open_timeout=PATIENCE,
        )
        with client as connection:
            assert spoken_by(connection.socket) == expected(arrangement.client)
            yield connection

    return connected


def test_messages_come_back(connect: Callable[[str], Any]) -> None:
    with connect("/") as connection:
        for message in MESSAGES:
            connection.send(message)
            assert connection.recv(PATIENCE) == message
        connection.send("a text, with an ü")
        assert connection.recv(PATIENCE) == "a text, with an ü"


def test_both_sides_write_while_both_read(connect: Callable[[str], Any], server: Server) -> None:
    with connect("/duplex") as connection:
        with sending(connection.send, MESSAGES):
            assert [connection.recv(PATIENCE) for _ in MESSAGES] == MESSAGES
        assert server.received.get(timeout=PATIENCE) == MESSAGES
        connection.send(b"and an echo")
        assert connection.recv(PATIENCE) == b"and an echo"


def test_a_receive_that_times_out_leaves_the_connection_usable(connect: Callable[[str], Any]) -> None:
    with connect("/") as connection:
        for message in MESSAGES:
            with pytest.raises(TimeoutError):
                connection.recv(timeout=0.02)
            connection.send(message)
            assert connection.recv(PATIENCE) == message


def test_a_ping_is_answered_in_the_middle_of_the_messages(connect: Callable[[str], Any]) -> None:
    with connect("/") as connection:
        connection.send(MESSAGES[-1])
        answered = connection.ping()
        connection.send(b"the last")
        assert connection.recv(PATIENCE) == MESSAGES[-1]
        assert connection.recv(PATIENCE) == b"the last"
        assert answered.wait(PATIENCE)


def test_closing_wakes_a_thread_that_receives(connect: Callable[[str], Any]) -> None:
    exceptions = library("websockets.exceptions")
    with connect("/") as connection, ThreadPoolExecutor(1) as pool:
        connection.send(b"before")
        assert connection.recv(PATIENCE) == b"before"
        receiving = pool.submit(connection.recv, PATIENCE)
        connection.close(1000, "enough")
        with pytest.raises(exceptions.ConnectionClosedOK):
            receiving.result(PATIENCE)
        assert (connection.close_code, connection.close_reason) == (1000, "enough")


def test_a_thread_that_receives_hears_that_the_server_closes(connect: Callable[[str], Any]) -> None:
    exceptions = library("websockets.exceptions")
    with connect("/one") as connection, ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: [connection.recv(PATIENCE) for _ in range(2)])
        connection.send(b"the only one")
        with pytest.raises(exceptions.ConnectionClosedOK):
            receiving.result(PATIENCE)
        assert connection.close_code == 1000


def test_a_client_that_says_nothing_stalls_nobody(connect: Callable[[str], Any], server: Server) -> None:
    with dial(("127.0.0.1", server.port)):
        with connect("/") as connection:
            connection.send(b"hello")
            assert connection.recv(PATIENCE) == b"hello"


def test_a_client_in_clear_is_turned_away(connect: Callable[[str], Any], server: Server) -> None:
    with dial(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not heard_until_the_end(sock).startswith(b"HTTP/1.1 101")
    with connect("/") as connection:
        connection.send(b"hello")
        assert connection.recv(PATIENCE) == b"hello"


def heard_until_the_end(sock: socket.socket) -> bytes:
    """All that comes until the other side is gone, with or without a word."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            heard += data
    return heard


# ── websocket-client ──


@pytest.fixture
def websocket(arrangement: Arrangement, client_context: Any, server: Server) -> Iterator[Any]:
    """A connection of websocket-client's to an echo."""
    connection = library("websocket").create_connection(
        server.url, PATIENCE, sslopt={"context": client_context}, enable_multithread=True
    )
    with contextlib.closing(connection):
        assert spoken_by(connection.sock) == expected(arrangement.client)
        yield connection


def test_websocket_client_gets_its_messages_back(websocket: Any) -> None:
    for message in MESSAGES:
        websocket.send_binary(message)
        assert websocket.recv() == message
    websocket.send("a text, with an ü")
    assert websocket.recv() == "a text, with an ü"


@our_client
def test_websocket_client_writes_in_one_thread_and_reads_in_another(websocket: Any) -> None:
    if CONTROL:
        websocket.settimeout(None)  # with a time-out the stdlib loses the connection now and then
    with sending(websocket.send_binary, MESSAGES * 2):
        assert [websocket.recv() for _ in MESSAGES * 2] == MESSAGES * 2


def test_websocket_client_goes_on_after_a_time_out(websocket: Any) -> None:
    module = library("websocket")
    for message in MESSAGES:
        websocket.settimeout(0.02)
        with pytest.raises(module.WebSocketTimeoutException):
            websocket.recv()
        websocket.settimeout(PATIENCE)
        websocket.send_binary(message)
        assert websocket.recv() == message


@our_client
def test_websocket_client_is_woken_by_a_close_in_another_thread(websocket: Any) -> None:
    module = library("websocket")

    def receive() -> bool:
        try:
            opcode, _ = websocket.recv_data()
        except (module.WebSocketConnectionClosedException, OSError):
            return True
        return bool(opcode == module.ABNF.OPCODE_CLOSE)

    websocket.send_binary(b"before")
    assert websocket.recv() == b"before"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(receive)
        websocket.close()
        assert ended.result(PATIENCE)


class App:
    """A WebSocketApp in a thread of its own, whose callbacks put what they are told into a queue.

    It closes itself when it hears `GOOD_BYE`: a close by another thread may leave it asleep in its select.
    """

    GOOD_BYE = "good-bye"

    def __init__(self, url: str, context: Any, **options: Any) -> None:
        self.events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.app = library("websocket").WebSocketApp(
            url,
            on_open=lambda app: self.events.put(("open", spoken_by(app.sock.sock))),
            on_message=self._hear,
            on_pong=lambda _, data: self.events.put(("pong", data)),
            on_error=lambda _, error: self.events.put(("error", error)),
            on_close=lambda _, code, reason: self.events.put(("close", code, reason)),
        )
        self._thread = threading.Thread(
            target=self.app.run_forever, kwargs={"sslopt": {"context": context}, **options}
        )

    def _hear(self, app: Any, message: Any) -> None:
        self.events.put(("message", message))
        if message == self.GOOD_BYE:
            app.close()

    def next(self) -> tuple[Any, ...]:
        """What happens next."""
        return self.events.get(timeout=PATIENCE)

    def __enter__(self) -> App:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(library("websocket").WebSocketConnectionClosedException):
            self.app.send_text(self.GOOD_BYE)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def test_a_websocket_app_sleeps_in_select_and_is_woken_by_each_message(
    arrangement: Arrangement, client_context: Any, server: Server
) -> None:
    options = {"ping_interval": LONG + 1, "ping_timeout": LONG}
    with App(server.url, client_context, **options) as client:
        assert client.next() == ("open", expected(arrangement.client))
        for message in MESSAGES * 2:
            client.app.send_bytes(message)
            assert client.next() == ("message", message)


def test_a_websocket_app_pings(arrangement: Arrangement, client_context: Any, server: Server) -> None:
    with App(server.url, client_context, ping_interval=0.05, ping_payload="still there?") as client:
        assert client.next() == ("open", expected(arrangement.client))
        for _ in range(3):
            assert client.next() == ("pong", b"still there?")
