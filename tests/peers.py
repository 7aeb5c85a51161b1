"""The other end: peers that are not ours, and what the tests need to look at the bytes they exchange.

As a program (``python peers.py NAME JSON``) this file *is* such a peer, in a process of its own:

``echo``
    OpenSSL itself, driven by one thread on a non-blocking socket through the C functions of the system's
    libssl (ctypes; no binding for Python offers SSL_key_update).  Whatever it receives it sends back, and
    every so many bytes it asks for new keys (TLS 1.3) or a new handshake (TLS 1.2) in the middle of that.
``raw``
    A pyOpenSSL client as people write it: one thread that reads and one that writes, each in its
    select loop, on one connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib
import json
import logging
import os
import queue
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PATIENCE = 20.0
"""Seconds that a peer waits for anything before it takes the test for failed."""


# ── bytes that can be checked ──


class Pattern:
    """An endless stream of bytes, each determined by its position.  Of no short period, so shifts show."""

    PERIOD = 1_000_003

    def __init__(self, seed: int = 0) -> None:
        self._bytes = memoryview(random.Random(seed).randbytes(self.PERIOD) * 2)

    def at(self, position: int, size: int) -> memoryview:
        """*size* bytes, at most PERIOD, from *position* on."""
        start = position % self.PERIOD
        return self._bytes[start : start + size]


class Corrupt(AssertionError):
    """A byte arrived that was not sent."""


class Checker:
    """Compares a received stream with the pattern, byte for byte."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.received = 0

    def feed(self, data: bytes) -> None:
        """The next bytes of the stream; Corrupt names the first wrong one."""
        view = memoryview(data)
        while view:
            part = view[: Pattern.PERIOD]
            expected = self._pattern.at(self.received, len(part))
            if part != expected:
                wrong = next(index for index in range(len(part)) if part[index] != expected[index])
                raise Corrupt(f"the byte at position {self.received + wrong} is wrong")
            self.received += len(part)
            view = view[len(part) :]


# ── OpenSSL through its C functions ──

ERROR_WANT_READ, ERROR_WANT_WRITE, ERROR_ZERO_RETURN = 2, 3, 6
KEY_UPDATE_REQUESTED = 1
CTRL_MODE, MODE_PARTIAL_MOVING_RELEASE = 33, 1 | 2 | 16
CTRL_SET_MIN_PROTO_VERSION, CTRL_SET_MAX_PROTO_VERSION = 123, 124
PROTO_VERSIONS = {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}
FILETYPE_PEM = 1


def libssl() -> Any:
    """The system's libssl with the types of what is used of it; None where there is none that can do this."""
    found = ctypes.util.find_library("ssl")
    crypto = ctypes.util.find_library("crypto")
    if found is None or crypto is None:
        return None
    lib: Any = ctypes.CDLL(found)
    text = ctypes.CDLL(crypto)
    pointer, number, string = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    signatures = {
        "TLS_method": (pointer, []),
        "SSL_CTX_new": (pointer, [pointer]),
        "SSL_CTX_ctrl": (ctypes.c_long, [pointer, number, ctypes.c_long, pointer]),
        "SSL_CTX_use_certificate_chain_file": (number, [pointer, string]),
        "SSL_CTX_use_PrivateKey_file": (number, [pointer, string, number]),
        "SSL_new": (pointer, [pointer]),
        "SSL_set_fd": (number, [pointer, number]),
        "SSL_set_accept_state": (None, [pointer]),
        "SSL_set_connect_state": (None, [pointer]),
        "SSL_do_handshake": (number, [pointer]),
        "SSL_read": (number, [pointer, pointer, number]),
        "SSL_write": (number, [pointer, pointer, number]),
        "SSL_get_error": (number, [pointer, number]),
        "SSL_shutdown": (number, [pointer]),
        "SSL_in_init": (number, [pointer]),
        "SSL_pending": (number, [pointer]),
        "SSL_key_update": (number, [pointer, number]),
        "SSL_renegotiate": (number, [pointer]),
        "SSL_renegotiate_pending": (number, [pointer]),
        "SSL_free": (None, [pointer]),
        "SSL_CTX_free": (None, [pointer]),
    }
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        return None
    text.ERR_get_error.restype = ctypes.c_ulong
    text.ERR_error_string_n.argtypes = [ctypes.c_ulong, ctypes.c_char_p, ctypes.c_size_t]
    lib.errors = text
    return lib


class PeerFailed(Exception):
    """OpenSSL, on the peer's side, reported a fatal error."""


class EchoPeer:
    """One TLS connection on a non-blocking socket: sends back what it receives, and makes trouble meanwhile.

    *update_every*: after so many bytes echoed, SSL_key_update(3) with the peer's update requested.
    *renegotiate_every*: after so many bytes echoed, SSL_renegotiate(3), as a server.

    A correct single-threaded program: a write that was answered by a want is repeated as it was.  While a
    renegotiation that it asked for is pending it writes only what the socket is sure to take whole, since a
    ClientHello that meets a half-written record is fatal inside OpenSSL.  One that it was asked for begins with
    the next call once nothing is half written or half read; in SSL_write application data that comes meanwhile
    is fatal as well, so it begins in SSL_read.
    """

    HOLD = 1 << 18
    CHUNK = 1 << 14
    SURE = 1 << 11

    def __init__(self, sock: socket.socket, options: dict[str, Any]) -> None:
        self.lib = libssl()
        self.sock = sock
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server = options["role"] == "server"
        self.update_every = options.get("update_every") or float("inf")
        self.renegotiate_every = options.get("renegotiate_every") or float("inf")
        self.ssl = self._new(options)
        self.room = ctypes.create_string_buffer(self.CHUNK)
        self.held = bytearray()
        self.frozen = b""
        self.ended = False
        self.counts = {"echoed": 0, "updates": 0, "renegotiations": 0}

    def _new(self, options: dict[str, Any]) -> Any:
        lib = self.lib
        context = lib.SSL_CTX_new(lib.TLS_method())
        version = PROTO_VERSIONS[options["version"]]
        lib.SSL_CTX_ctrl(context, CTRL_SET_MIN_PROTO_VERSION, version, None)
        lib.SSL_CTX_ctrl(context, CTRL_SET_MAX_PROTO_VERSION, version, None)
        lib.SSL_CTX_ctrl(context, CTRL_MODE, MODE_PARTIAL_MOVING_RELEASE, None)
        if self.server:
            ok = lib.SSL_CTX_use_certificate_chain_file(context, options["certfile"].encode())
            ok &= lib.SSL_CTX_use_PrivateKey_file(context, options["keyfile"].encode(), FILETYPE_PEM)
            assert ok == 1, self._errors()
        ssl = lib.SSL_new(context)
        lib.SSL_CTX_free(context)  # the connection keeps it
        lib.SSL_set_fd(ssl, self.sock.fileno())
        (lib.SSL_set_accept_state if self.server else lib.SSL_set_connect_state)(ssl)
        return ssl

    def _errors(self) -> str:
        text, found = ctypes.create_string_buffer(256), []
        while code := self.lib.errors.ERR_get_error():
            self.lib.errors.ERR_error_string_n(code, text, len(text))
            found.append(text.value.decode())
        return "; ".join(found) or f"errno {ctypes.get_errno()}"

    def call(self, name: str, *arguments: Any) -> int:
        """The result if positive; 0 for a want, which sets `mask`; -1 for close_notify; or PeerFailed."""
        result: int = getattr(self.lib, name)(self.ssl, *arguments)
        if result > 0:
            return result
        error = self.lib.SSL_get_error(self.ssl, result)
        if error == ERROR_WANT_READ:
            self.mask |= select.POLLIN
            return 0
        if error == ERROR_WANT_WRITE:
            self.mask |= select.POLLOUT
            return 0
        if error == ERROR_ZERO_RETURN:
            return -1
        raise PeerFailed(f"{name}: {self._errors()} (SSL_get_error says {error})")

    def run(self) -> None:
        """Until the other side's close_notify, which is answered once everything was echoed."""
        poll = select.poll()
        poll.register(self.sock, 0)
        self.mask = 0
        while self.call("SSL_do_handshake") == 0:
            self._sleep(poll)
        while not self.ended or self.held or self.frozen:
            self.mask = 0
            moved = self._read()
            moved |= self._write()
            self._make_trouble()
            if not moved:
                self._sleep(poll)
        self.mask = 0
        while self.call("SSL_shutdown") == 0:  # for the other side has said close_notify: done, or a want
            self._sleep(poll)

    def free(self) -> None:
        """Nothing is called any more."""
        self.lib.SSL_free(self.ssl)

    def _sleep(self, poll: Any) -> None:
        poll.modify(self.sock, self.mask)
        if not poll.poll(PATIENCE * 1000):
            raise PeerFailed(f"nothing happened for {PATIENCE} s; waiting for {self.mask}, {self.counts}")
        self.mask = 0

    def _read(self) -> bool:
        full = len(self.held) >= self.HOLD and not self.lib.SSL_in_init(self.ssl) and not self._asked()
        if self.ended or full:
            return False
        size = self.call("SSL_read", self.room, self.CHUNK)
        if size > 0:
            self.held += ctypes.string_at(self.room, size)
        self.ended = size < 0
        return size != 0

    def _write(self) -> bool:
        if self.lib.SSL_in_init(self.ssl):
            return False  # SSL_read goes on with the handshake, and takes application data meanwhile
        if not self.frozen and self.held:
            size = self.CHUNK
            if self._asked():
                return False
            if self.renegotiating():
                self.mask |= select.POLLOUT
                if not self._has_room():
                    return False
                size = self.SURE
            self.frozen = bytes(self.held[:size])
            del self.held[:size]
        if not self.frozen:
            return False
        sent = self.call("SSL_write", self.frozen, len(self.frozen))
        if sent < 0:  # after the other side's close_notify OpenSSL has no other word for a broken connection
            raise PeerFailed("SSL_write: the connection is gone")
        self.frozen = self.frozen[sent:]
        self.counts["echoed"] += sent
        return sent > 0

    def _has_room(self) -> bool:
        return bool(select.select([], [self.sock], [], 0)[1])

    def renegotiating(self) -> bool:
        """Whether a HelloRequest has not been answered by a whole handshake yet."""
        return bool(self.renegotiate_every < float("inf") and self.lib.SSL_renegotiate_pending(self.ssl))

    def _asked(self) -> bool:
        """Whether the server wants a renegotiation that has not begun."""
        return not self.server and bool(self.lib.SSL_renegotiate_pending(self.ssl))

    def _make_trouble(self) -> None:
        counts = self.counts
        if self.frozen or self.ended or self.lib.SSL_in_init(self.ssl):
            return
        if counts["echoed"] >= (counts["updates"] + 1) * self.update_every:
            self.call("SSL_key_update", KEY_UPDATE_REQUESTED)
            counts["updates"] += 1
        if (
            counts["echoed"] >= (counts["renegotiations"] + 1) * self.renegotiate_every
            and not self.renegotiating()
        ):
            self.call("SSL_renegotiate")
            self.call("SSL_do_handshake")
            counts["renegotiations"] += 1


def echo(options: dict[str, Any]) -> dict[str, Any]:
    """The ``echo`` program.  Says ``port N`` if it is to listen, and in the end how far it came."""
    with contextlib.ExitStack() as stack:
        if options["role"] == "server":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.settimeout(PATIENCE)
            print("port", listener.getsockname()[1], flush=True)
            sock = listener.accept()[0]
        else:
            sock = socket.create_connection(("127.0.0.1", options["port"]), PATIENCE)
        stack.enter_context(sock)
        peer = EchoPeer(sock, options)
        error = None
        try:
            peer.run()
        except (PeerFailed, OSError) as failure:
            error = str(failure)
        finally:
            peer.free()
        return {**peer.counts, "error": error}


# ── pyOpenSSL as people write it ──


class RawClient:
    """Sends *total* bytes of the pattern to an echo and reads them back, each in its thread.

    Kinder than most such programs: a lock round every call keeps the threads from being inside OpenSSL at
    once, and what was not sent is sent again as it was.
    """

    def __init__(self, port: int, total: int) -> None:
        from OpenSSL import SSL

        self.total, self.checker = total, Checker(Pattern())
        self.sock = dial(("127.0.0.1", port))
        self.connection = SSL.Connection(SSL.Context(SSL.TLS_METHOD), self.sock)
        self.connection.set_connect_state()
        self.sock.setblocking(True)
        self.connection.do_handshake()
        self.sock.setblocking(False)
        self.want_read, self.want_write = SSL.WantReadError, SSL.WantWriteError
        self.lock, self.errors = threading.Lock(), list[str]()

    def write(self) -> None:
        position, pattern = 0, Pattern()
        while position < self.total:
            chunk = pattern.at(position, min(1 << 16, self.total - position))
            position += self.patiently(self.connection.send, chunk)

    def read(self) -> None:
        while self.checker.received < self.total:
            self.checker.feed(self.patiently(self.connection.recv, 1 << 16))

    def patiently(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The answer's textbook: sleep until the socket can do what OpenSSL wants, and call again."""
        while not self.errors:
            try:
                with self.lock:
                    return call(*arguments)
            except self.want_read:
                select.select([self.sock], [], [], PATIENCE)
            except self.want_write:
                select.select([], [self.sock], [], PATIENCE)
        raise InterruptedError("the other thread has failed")

    def thread(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.errors.append(f"{work.__name__}: {error!r}")
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)  # wakes the other out of its select


def raw(options: dict[str, Any]) -> dict[str, Any]:
    """The ``raw`` program."""
    client = RawClient(options["port"], options["total"])
    threads = [threading.Thread(target=client.thread, args=(work,)) for work in (client.write, client.read)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    client.sock.close()
    return {"received": client.checker.received, "errors": client.errors}


# ── sockets that speak TLS, as people use them ──


def sockets(options: dict[str, Any]) -> dict[str, Any]:
    """The ``sockets`` program: a reader and a writer thread on one SSLSocket of ``module``."""
    module = importlib.import_module(options["module"])
    context = module.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(options["cafile"])
    total, pattern, checker = options["total"], Pattern(), Checker(Pattern())
    errors: list[str] = []

    def write() -> None:
        for position in range(0, total, 1 << 16):
            sock.sendall(pattern.at(position, min(1 << 16, total - position)))

    def read() -> None:
        while checker.received < total:
            checker.feed(sock.recv(1 << 16))

    def noting(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(f"{work.__name__}: {error!r}")
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes the other

    with context.wrap_socket(dial(("127.0.0.1", options["port"])), server_hostname="localhost") as sock:
        sock.settimeout(8)  # for a call: the stdlib's threads may end up waiting for each other
        threads = [threading.Thread(target=noting, args=(work,)) for work in (write, read)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    return {"received": checker.received, "errors": errors}


# ── programs ──


class Program:
    """A program at the other end, its input and output in the hands of the test.

    What is given to `put` reaches the program in one piece, as if typed: s_client(1) and s_server(1) take a
    letter at the beginning of a piece for a command.  On Linux a SOCK_SEQPACKET does that; a pipe does not.

    Application data is of bytes >= 128 and nothing else, so it can be told from what the program says itself.
    """

    def __init__(self, *command: str) -> None:
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        self._feed, stdin = socket.socketpair(socket.AF_UNIX, kind)
        self._feed.settimeout(PATIENCE)
        with stdin:
            self._process = subprocess.Popen(
                command, stdin=stdin.fileno(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        self._output = bytearray()
        self._data = bytearray()
        self._arrived = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            while piece := os.read(stdout.fileno(), 1 << 16):
                with self._arrived:
                    self._output += piece.translate(None, HIGH)
                    self._data += piece.translate(None, LOW)
                    self._arrived.notify_all()
        with self._arrived:
            self._over = True
            self._arrived.notify_all()

    def put(self, piece: bytes) -> None:
        """Give the program *piece* (16 KiB at most) as one read of its standard input."""
        self._feed.send(piece)

    def end_input(self) -> None:
        """Standard input ends."""
        self._feed.shutdown(socket.SHUT_WR)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Where *pattern* matches what the program has said, as soon as it does; AssertionError if it never does."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._over or re.search(pattern, self._said()), PATIENCE)
            match = re.search(pattern, self._said())
            assert match is not None, f"the program never said {pattern!r}: {self._said()}"
            return match

    def wait_until_said(self, word: str, times: int) -> None:
        """Until the program has said *word* so often."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._over or self._said().count(word) >= times, PATIENCE)
            count = self._said().count(word)
            assert count >= times, f"the program said {word!r} only {count} times: {self._said()[-2000:]}"

    def _said(self) -> str:
        return self._output.decode()

    def take(self, size: int) -> bytes:
        """The next *size* bytes of application data that the program received."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._over or len(self._data) >= size, PATIENCE)
            data = bytes(self._data[:size])
            del self._data[:size]
        assert len(data) == size, f"the program has received {len(data)} bytes, not {size}"
        return data

    def port(self) -> int:
        """Where it listens."""
        return int(self.wait_for(r"(?:ACCEPT .*:|port )(\d+)\n")[1])

    def finish(self, patience: float = PATIENCE) -> str:
        """All it has said, once it has ended by itself."""
        self._process.wait(patience)
        self._reader.join()
        return self._said()

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.poll()

    def result(self) -> Any:
        """What a program of this file reports, once it has ended by itself."""
        return json.loads(self.finish().splitlines()[-1])

    def kill(self) -> None:
        """End it at once: the kernel closes its connections, and nobody says close_notify."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reader.join()
        self._feed.close()


def program(name: str, **options: Any) -> Program:
    """A program of this file, in a process of its own."""
    return Program(sys.executable, __file__, name, json.dumps(options))


LOW, HIGH = bytes(range(128)), bytes(range(128, 256))


def high(data: bytes) -> bytes:
    """*data* as application data for a `Program`: the same length, all bytes >= 128."""
    return data.translate(bytes(byte | 128 for byte in range(256)))


# ── the standard library's ssl, blocking, in a thread ──


def stdlib_context(
    server_side: bool,
    version: str,
    *,
    cafile: str | None = None,
    certfile: str | None = None,
    keyfile: str | None = None,
    alpn: Iterable[str] = (),
) -> ssl.SSLContext:
    """The stdlib's context for one version of TLS; with *cafile* the other side must show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if cafile is not None:
        context.load_verify_locations(cafile)
        context.verify_mode = ssl.CERT_REQUIRED
    if certfile is not None:
        context.load_cert_chain(certfile, keyfile)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


class Background:
    """Threads of one test.  `run` gives a future; at the end of the test all must have ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(32)
        self._listeners: list[socket.socket] = []

    def run(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """*work* in a thread of its own."""
        return self._pool.submit(work, *arguments)

    def serve(self, handle: Callable[[socket.socket], Any], times: int = 1) -> tuple[Any, list[Future[Any]]]:
        """A server of plain TCP for *times* connections, each *handle*d in a thread; where it listens."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(PATIENCE)
        self._listeners.append(listener)
        results: list[Future[Any]] = [Future() for _ in range(times)]

        def accept() -> None:
            with listener:
                for result in results:
                    try:
                        with listener.accept()[0] as sock:
                            sock.settimeout(PATIENCE)
                            result.set_result(handle(sock))
                    except BaseException as error:
                        result.set_exception(error)

        self.run(accept)
        return listener.getsockname(), results

    def serve_tls(
        self, context: ssl.SSLContext, handle: Callable[[ssl.SSLSocket], Any], times: int = 1
    ) -> tuple[Any, list[Future[Any]]]:
        """`serve`, over TLS of the stdlib's."""

        def shake_hands(sock: socket.socket) -> Any:
            with context.wrap_socket(sock, server_side=True) as wrapped:
                return handle(wrapped)

        return self.serve(shake_hands, times)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # of whom nobody will call any more
        self._pool.shutdown()


def in_a_child(check: Callable[[], object]) -> None:
    """Call *check* in a child of fork(), which must end without an error."""
    child = os.fork()
    if child == 0:
        try:
            check()
            os._exit(0)
        finally:
            os._exit(1)
    signal.alarm(int(PATIENCE))
    assert os.waitpid(child, 0)[1] == 0
    signal.alarm(0)


def until(condition: Callable[[], object]) -> None:
    """Look again and again, PATIENCE seconds at most, until *condition* holds."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.005)


def reset_on_close(sock: socket.socket) -> None:
    """Let the close of *sock* be a reset where that is the kernel's to decide."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset(sock: socket.socket) -> None:
    """End the connection by a RST."""
    reset_on_close(sock)
    sock.close()


def dial(address: Any) -> socket.socket:
    """A plain, patient TCP connection."""
    return socket.create_connection(address[:2], PATIENCE)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """The next *size* bytes; fewer only at the end of the stream."""
    parts = []
    while size and (part := sock.recv(min(size, 1 << 16))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Events(logging.Handler):
    """The events of the bridge, as they are logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(record.getMessage())

    def wait_for(self, event: str) -> str:
        """The next line of *event*; queue.Empty if there is none in time."""
        while True:
            line = self._lines.get(timeout=PATIENCE)
            if event in line:
                return line


@contextlib.contextmanager
def listening_to_events() -> Iterator[Events]:
    """What the logger ``bridge`` says meanwhile."""
    logger, events = logging.getLogger("bridge"), Events()
    level = logger.level
    logger.addHandler(events)
    logger.setLevel(logging.INFO)
    try:
        yield events
    finally:
        logger.removeHandler(events)
        logger.setLevel(level)


if __name__ == "__main__":
    programs = {"echo": echo, "raw": raw, "sockets": sockets}
    print(json.dumps(programs[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
