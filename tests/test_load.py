"""Crowds: sessions that idle, handshakes that stop half way, and all leave at once.  What a server holds afterwards.

``pytest -m stress -rP tests/test_load.py`` shows the figures at full size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from peers import PATIENCE, reset, stdlib_context
from records import HANDSHAKE, record

import bridge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and calls malloc_trim(3)")

ROOT = str(Path(bridge.__file__).parents[1])
PROGRAM = str(Path(__file__).with_name("loaded.py"))
SPARE = 100
"""Descriptors beside those of the crowd."""


@dataclasses.dataclass
class Loaded:
    """The server, in its process."""

    process: subprocess.Popen[str]
    context: ssl.SSLContext
    port: int = 0
    sockets: list[socket.socket] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def held(self) -> dict[str, Any]:
        """What it holds now."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.line())
        return found

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What it holds as soon as *condition* holds of that."""
        deadline = time.monotonic() + PATIENCE
        while not condition(found := self.held()):
            assert time.monotonic() < deadline, found
        return found

    def half(self) -> socket.socket:
        """A client that says half of a hello."""
        sock = self._connected()
        sock.sendall(record(HANDSHAKE, bytes(64), size=256))
        return sock

    def client(self) -> ssl.SSLSocket:
        """An honest client, which has been served once."""
        client = self.context.wrap_socket(self._connected(), server_hostname="localhost")
        self.sockets.append(client)
        ask(client)
        return client

    def _connected(self) -> socket.socket:
        self.sockets.append(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
        return self.sockets[-1]


def ask(client: ssl.SSLSocket) -> None:
    client.sendall(b"question")
    assert client.recv(100) == b"question"


def leave(client: ssl.SSLSocket) -> None:
    """Say close_notify, and do not wait."""
    client.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.unwrap()
    client.close()


def milliseconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return 1000 * (time.monotonic() - began)


@pytest.fixture
def server(server_cert: KeyPair, ca_file: str) -> Iterator[Loaded]:
    command = [sys.executable, PROGRAM, server_cert.certfile, server_cert.keyfile]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHONMALLOC": "malloc"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        loaded = Loaded(process, stdlib_context(False, "TLSv1.3", cafile=ca_file))
        loaded.port = int(loaded.line())
        yield loaded
        for sock in loaded.sockets:
            sock.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def come_and_go(server: Loaded, idle: int, halves: int) -> dict[str, Any]:
    """A crowd, among it one honest guest, and what the server holds when all are there."""
    shaken = server.held()["shaken"]
    guest, began = server.client(), time.monotonic()
    clients = [server.client() for _ in range(idle)]
    rate, kib = idle / (time.monotonic() - began), server.held()["kib"]
    half_open = [server.half() for _ in range(halves)]
    first = milliseconds(lambda: clients.append(server.client()))
    during = server.until(lambda held: held["sessions"] == 1 + idle + halves + 1)
    for client in clients[::2]:
        leave(client)
    storm = milliseconds(lambda: ask(guest))
    for one in (*half_open, *clients[1::2]):
        reset(one)
    vanished = milliseconds(lambda: ask(guest))
    leave(guest)
    assert during["shaken"] - shaken == 1 + idle + 1, "no honest handshake has failed"
    print(f"{idle:,} sessions, {rate:.0f} a second; with them {kib:,} KiB")
    print(f"the first client behind {halves:,} half-open handshakes: {first:.1f} ms")
    print(f"an echo behind {len(clients[::2]):,} closes: {storm:.1f} ms")
    print(f"an echo behind {halves + len(clients[1::2]):,} resets: {vanished:.1f} ms")
    return during


@pytest.mark.parametrize(
    ("idle", "halves"), [(300, 150), pytest.param(10_000, 5_000, marks=pytest.mark.stress)]
)
def test_a_crowd_comes_and_goes_and_leaves_nothing(server: Loaded, idle: int, halves: int) -> None:
    """A tenth of it was there before: tables of a dictionary, and arenas of malloc(3), stay as large as they were."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < (needed := idle + halves + SPARE):
        pytest.skip(f"{needed} descriptors are needed, and only {hard} allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    come_and_go(server, idle // 10, halves // 10)
    before = server.until(lambda held: not held["sessions"])
    during = come_and_go(server, idle, halves)
    after = server.until(
        lambda held: (
            not held["sessions"]
            and held["descriptors"] == before["descriptors"]
            and held["kib"] <= 1.1 * before["kib"]
        )
    )
    print(f"before: {before}\nduring: {during}\nafter: {after}")
    assert before["threads"] == during["threads"] == after["threads"]
