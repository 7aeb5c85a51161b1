"""Other systems, and odd ones, as far as this one can stand in for them."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import KeyPair
from peers import PATIENCE
from rig import tcp_pair

import bridge
from bridge import poll

select_here = select.select


def select_there(readers: list[int], writers: list[int], failed: list[int], timeout: float | None) -> Any:
    """`select.select` as Windows has it."""
    if not (readers or writers or failed):
        raise OSError(10022, "An invalid argument was supplied")
    return select_here(readers, writers, failed, timeout)


@pytest.fixture
def contexts(ca_file: str, server_cert: KeyPair) -> tuple[bridge.Context, bridge.Context]:
    """A client's and a server's."""
    return bridge.client_context(ca_file), bridge.server_context(server_cert.certfile, server_cert.keyfile)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to sleep in but select(2)."""
    monkeypatch.setattr(select, "select", select_there)
    monkeypatch.setattr(poll, "_Poll", poll._Select)
    monkeypatch.setattr(poll, "HUNG_UP", poll.NOTHING)


@pytest.fixture
def b() -> Iterator[bridge.Bridge]:
    with bridge.Bridge(workers=1) as made:
        yield made


# ── what there is to sleep in ──


def test_streams_where_nobody_can_ask_whether_the_peer_has_hung_up(
    windows: None, b: bridge.Bridge, contexts: tuple[bridge.Context, bridge.Context]
) -> None:
    near, far = tcp_pair()
    client, server = b.stream(near, contexts[0], server_hostname="localhost"), b.stream(far, contexts[1])
    server.begin()
    assert client.write(b"there", PATIENCE) == 5 and server.read(9, PATIENCE) == b"there"
    assert server.write(b"and back", PATIENCE) == 8 and client.read(9, PATIENCE) == b"and back"


@pytest.mark.skipif(poll.HUNG_UP == poll.NOTHING, reason="there is nobody to ask here")
def test_a_watch_says_that_the_peer_has_hung_up_and_not_that_it_has_said_something() -> None:
    near, far = tcp_pair()
    with near, far:
        hung_up = poll.hang_up_watch(near)
        far.send(b"last words")
        assert not hung_up(0)
        far.shutdown(socket.SHUT_WR)
        assert hung_up(PATIENCE * 1000)
