"""What a scrape tells, compared with what the two ends of real sessions know."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KeyPair
from peers import dial, in_a_child, stdlib_context, until
from rig import PATIENCE, forks, only

import bridge

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, GCCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bridge.prometheus import BridgeCollector


class Scraped:
    """A Bridge that is scraped, as text, each time a value is asked for."""

    def __init__(self, *bridges: bridge.Bridge) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(BridgeCollector(*bridges))

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels, in the order of the labels' names."""
        text = generate_latest(self.registry).decode()
        samples = [
            (tuple(sample.labels.values()), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"tls_bridge_{name}"
        ]
        assert len(dict(samples)) == len(samples), "a series comes twice"
        return dict(samples)


def test_a_scrape_counts_what_was_carried_and_how_it_ended(
    server_cert: KeyPair, ca_file: str, tls_version: str
) -> None:
    lines = bridge.codecs.Lines
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    client_ctx = bridge.client_context(ca_file, **only(tls_version))
    with bridge.Bridge(workers=2) as b, bridge.Bridge(workers=1) as far:
        scraped = Scraped(b)
        listener = b.listen(("127.0.0.1", 0), server_ctx, codec=lines)
        pairs = []
        for _ in range(3):  # one after the other: two workers may hand them to accept in any order
            client = far.connect(listener.address, client_ctx, server_hostname="localhost", codec=lines)
            pairs.append((client, listener.accept(PATIENCE)))
        for client, peer in pairs:
            client.send("x" * 99)
            peer.recv(PATIENCE)
            peer.send("y" * 49)
            client.recv(PATIENCE)
        until(lambda: scraped.values("bytes_total")["sent",] == 150)
        assert scraped.values("sessions")["open",] == 3
        assert scraped.values("waiting") == {("read", "read"): 3}
        assert scraped.values("bytes_total")["received",] == 300
        assert scraped.values("handshakes_total") == {("ok", "server", tls_version): 3}
        assert scraped.values("handshake_seconds_count") == {("server",): 3}
        assert 0 < scraped.values("handshake_seconds_sum")["server",] < 3 * PATIENCE
        before = scraped.values("wants_total")
        for client, _ in pairs:
            client.send_eof()
        for _, peer in pairs:
            assert list(peer) == []
            peer.close()
        until(lambda: not b.snapshot().sessions)
        assert sum(scraped.values("sessions").values()) == 0
        assert scraped.values("bytes_total") == {("received",): 300, ("sent",): 150}
        assert scraped.values("endings_total") == {("SessionClosed",): 3}
        assert scraped.values("handshakes_total") == {("ok", "server", tls_version): 3}
        after = scraped.values("wants_total")
        assert all(after[key] >= count for key, count in before.items())
        for client, _ in pairs:
            client.close()


def test_a_scrape_counts_failed_handshakes_and_who_is_in_one(
    server_cert: KeyPair, client_cert: KeyPair, ca_file: str
) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.Bridge(workers=1) as b, bridge.Bridge(workers=1) as far:
        served, called = Scraped(b), Scraped(far)
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        address = (f"127.0.0.1:{listener.address[1]}",)
        with pytest.raises(bridge.CertificateError):
            far.connect(
                listener.address, bridge.client_context(client_cert.certfile), server_hostname="localhost"
            )
        until(lambda: not b.snapshot().sessions and not far.snapshot().sessions)
        assert called.values("handshakes_total") == {("CertificateError", "client", ""): 1}
        assert served.values("handshakes_total") == {("TLSError", "server", ""): 1}
        with dial(listener.address):
            until(lambda: served.values("listener_handshakes") == {address: 1})
            until(lambda: served.values("sessions")["handshaking",] == 1)
        late = far.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
        until(lambda: served.values("listener_waiting") == {address: 1})
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            with pytest.raises(bridge.ConnectFailed):
                far.connect(nobody.getsockname(), bridge.client_context(ca_file))
        until(lambda: called.values("endings_total").get(("ConnectFailed",)) == 1)
        assert sum(called.values("handshakes_total").values()) == 2, "no handshake was tried"
        late.abort()


def test_several_bridges_are_added_up_by_one_collector_and_a_second_is_refused(
    server_cert: KeyPair, ca_file: str
) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.Bridge(workers=1) as near, bridge.Bridge(workers=1) as far:
        scraped = Scraped(near, far)
        listener = near.listen(("127.0.0.1", 0), server_ctx)
        client = far.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
        peer = listener.accept(PATIENCE)
        client.send(bytes(100))
        peer.recv(PATIENCE)
        until(lambda: scraped.values("bytes_total") == {("received",): 100, ("sent",): 100})
        assert scraped.values("sessions")["open",] == 2
        assert set(scraped.values("handshakes_total").values()) == {1}
        assert scraped.values("handshake_seconds_count") == {("client",): 1, ("server",): 1}
        with pytest.raises(ValueError, match="tls_bridge_sessions"):
            scraped.registry.register(BridgeCollector(far))
        client.abort()


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="this system cannot share a port")
def test_listeners_of_one_address_are_one_series(server_cert: KeyPair) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.Bridge(workers=1) as b:
        scraped, address = Scraped(b), ("127.0.0.1", 0)
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
            address = b.listen(sock, server_ctx).address
        with dial(address), dial(address), dial(address):
            until(lambda: scraped.values("listener_handshakes") == {(f"127.0.0.1:{address[1]}",): 3})
        assert scraped.values("listener_waiting") == {(f"127.0.0.1:{address[1]}",): 0}


def test_a_stalled_peer_shows(server_cert: KeyPair, ca_file: str) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.Bridge(workers=1, timeouts=bridge.Timeouts(write_stall=2.0)) as b:
        scraped = Scraped(b)
        listener = b.listen(("127.0.0.1", 0), server_ctx)
        context = stdlib_context(False, "TLSv1.3", cafile=ca_file)
        context.check_hostname = False
        with context.wrap_socket(dial(listener.address)):
            peer = listener.accept(PATIENCE)
            with pytest.raises(bridge.SendTimeout):
                while True:
                    peer.send(bytes(50_000), timeout=0.2)
            assert scraped.values("waiting")["write", "write"] == 1
            assert scraped.values("queued_bytes")["outbox",] > 200_000
            until(lambda: scraped.values("endings_total") == {("WriteStalled",): 1})
            assert scraped.values("queued_bytes")["outbox",] == 0


def test_what_ended_sessions_have_left_in_an_inbox_is_queued_until_it_is_taken(
    server_cert: KeyPair, ca_file: str
) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    inbox = bridge.Inbox()
    with bridge.Bridge(workers=1) as b, bridge.Bridge(workers=1) as far:
        scraped = Scraped(b)
        listener = b.listen(("127.0.0.1", 0), server_ctx, inbox=inbox)
        clients = [
            far.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
            for _ in range(2)
        ]
        for client in clients:
            client.send(bytes(100_000))
        until(lambda: scraped.values("queued_bytes")["inbox",] == 200_000)
        for client in clients:
            client.abort()
        until(lambda: not b.snapshot().sessions)
        assert 190_000 < scraped.values("queued_bytes")["inbox",] <= 200_000
        while scraped.values("listener_waiting") != {(f"127.0.0.1:{listener.address[1]}",): 0}:
            inbox.get(timeout=PATIENCE)
        assert scraped.values("queued_bytes")["inbox",] == 0


def test_counters_never_go_back_while_sessions_come_and_go(server_cert: KeyPair, ca_file: str) -> None:
    server_ctx = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    client_ctx = bridge.client_context(ca_file)
    with bridge.Bridge(workers=2) as b, ThreadPoolExecutor(4) as pool:
        listener, scraped = b.listen(("127.0.0.1", 0), server_ctx), Scraped(b)

        def serve() -> None:
            for peer in listener:
                with peer:
                    peer.send(peer.recv(PATIENCE))

        def call(_: int) -> None:
            with b.connect(listener.address, client_ctx, server_hostname="localhost") as session:
                session.send(bytes(100))
                session.recv(PATIENCE)

        serving = pool.submit(serve)
        calls = [pool.submit(call, number) for number in range(40)]
        seen = {("received",): 0.0, ("sent",): 0.0}
        while not all(one.done() for one in calls):
            now = scraped.values("bytes_total")
            assert all(now[key] >= count for key, count in seen.items()), (now, seen)
            seen = now
        for one in calls:
            one.result(PATIENCE)
        listener.close()
        serving.result(PATIENCE)
        until(lambda: not b.snapshot().sessions)
        assert scraped.values("bytes_total") == {("received",): 8000, ("sent",): 8000}
        assert sum(scraped.values("endings_total").values()) == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
@forks
def test_a_child_of_fork_tells_nothing_of_its_parents_bridges() -> None:
    """And what else is in the registry is told: a program that forks its workers registers before it does."""
    with bridge.Bridge(workers=1) as b, bridge.Bridge(workers=1) as other:
        scraped = Scraped(b, other)
        assert scraped.values("sessions")["open",] == 0
        GCCollector(scraped.registry)

        def check() -> None:
            text = generate_latest(scraped.registry).decode()
            assert "tls_bridge_sessions" in text and "python_gc" in text
            assert set(scraped.values("sessions").values()) == {0} and not scraped.values("endings_total")

        in_a_child(check)
        check()
