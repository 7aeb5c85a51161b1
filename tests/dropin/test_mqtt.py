"""paho-mqtt, which selects on its socket and never blocks in it, against a Mosquitto broker."""

from __future__ import annotations

import contextlib
import queue
import random
import signal
import socket
import ssl as stdlib_ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daemons
import pytest
import trustme
from conftest import KeyPair
from daemons import START_UP, Daemon, assert_ours
from dropin_rig import injection, library, make_client_context
from peers import PATIENCE

pytestmark = [
    pytest.mark.usefixtures("default_bridge"),
    pytest.mark.timeout(2 * START_UP),
]

PAYLOAD = random.Random(11).randbytes(1_000_000)
VERSIONS = {"TLSv1.2": stdlib_ssl.TLSVersion.TLSv1_2, "TLSv1.3": stdlib_ssl.TLSVersion.TLSv1_3}
ROUND_TRIPS = 50
FAST = 10.0
"""Seconds for ROUND_TRIPS: with one lost wake-up each they would take paho's select time-out, 1 s, each."""


@pytest.fixture(scope="module")
def broker(server_cert: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """A Mosquitto broker."""
    library("paho.mqtt.client")
    with daemons.mosquitto(server_cert, ca_file) as server:
        yield server


@pytest.fixture
def context(ca_file: str) -> Any:
    """A client's context of the class under test."""
    return make_client_context("ours", ca_file)


class Talker:
    """A client of paho's that subscribes to a topic whenever it connects, and what its callbacks were told.

    The callbacks know the queues only: the client closes its sockets as its last reference goes, and a cycle
    would keep it from that.
    """

    def __init__(self, name: str, context: Any = None, topic: str | None = None) -> None:
        ready: queue.Queue[None] = queue.Queue()
        heard: queue.Queue[Any] = queue.Queue()
        ends: queue.Queue[Any] = queue.Queue()

        def on_connect(client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            if reason.is_failure:
                return
            if topic is None:
                ready.put(None)
            else:
                client.subscribe(topic, qos=2)

        mqtt = library("paho.mqtt.client")
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name)
        self.client.reconnect_delay_set(min_delay=0.1, max_delay=1)
        self.client.on_connect = on_connect
        self.client.on_subscribe = lambda *_: ready.put(None)
        self.client.on_message = lambda _client, _data, message: heard.put(message)
        self.client.on_disconnect = lambda _client, _data, _flags, reason, _properties: ends.put(reason)
        if context is not None:
            self.client.tls_set_context(context)
        self.ready, self.heard, self.ends = ready, heard, ends

    def wait_until_ready(self) -> None:
        """Wait for one more connection, with the subscription made."""
        self.ready.get(timeout=PATIENCE)

    def hear(self) -> tuple[str, bytes]:
        """The topic and the payload of the next message."""
        message = self.heard.get(timeout=PATIENCE)
        return message.topic, message.payload


@contextlib.contextmanager
def talking(broker: Daemon, talker: Talker, host: str = "localhost", keepalive: int = 60) -> Iterator[Talker]:
    """*talker*, connected, with paho's own thread for a loop; it says goodbye in the end."""
    talker.client.connect(host, broker.port, keepalive)
    talker.client.loop_start()
    try:
        talker.wait_until_ready()
        yield talker
    finally:
        talker.client.disconnect()
        talker.client.loop_stop()


@contextlib.contextmanager
def looping(broker: Daemon, talker: Talker) -> Iterator[Talker]:
    """As `talking`, with `loop_forever` in a thread of the caller's."""
    talker.client.connect("localhost", broker.port)
    loop = threading.Thread(target=talker.client.loop_forever)
    loop.start()
    try:
        talker.wait_until_ready()
        yield talker
    finally:
        talker.client.disconnect()
        loop.join(PATIENCE)
    assert not loop.is_alive()


@pytest.fixture(params=[talking, looping], ids=["loop_start", "loop_forever"])
def run(request: pytest.FixtureRequest) -> Any:
    """Each way to run paho's loop: in its thread, and in the caller's."""
    return request.param


def send(talker: Talker, topic: str, payload: bytes, qos: int) -> None:
    """Publish, and wait until the broker has acknowledged what it has to."""
    message = talker.client.publish(topic, payload, qos)
    message.wait_for_publish(PATIENCE)
    assert message.is_published()


def send_at_once(_client: Any, _data: Any, sock: Any) -> None:
    """Let TCP not wait for the acknowledgement of one segment before it sends the next."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# ── to connect ──


def test_paho_connects_with_a_context_of_the_user(broker: Daemon, context: Any, tls_version: str) -> None:
    context.minimum_version = context.maximum_version = VERSIONS[tls_version]
    with talking(broker, Talker("with-context", context, "news"), host="127.0.0.1") as talker:
        assert_ours(talker.client.socket(), tls_version)
        send(talker, "news", b"something", qos=1)
        assert talker.hear() == ("news", b"something")


def test_paho_connects_with_a_context_of_its_own(broker: Daemon, ca_file: str) -> None:
    talker = Talker("without-context", topic="news")
    with injection():
        talker.client.tls_set(ca_file)
    with talking(broker, talker):
        assert_ours(talker.client.socket())
        send(talker, "news", b"something", qos=1)
        assert talker.hear() == ("news", b"something")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # paho drops the socket that it could not use
def test_paho_refuses_a_broker_of_another_authority(broker: Daemon, tmp_path: Any) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "wrong.pem"))
    talker = Talker("stranger", make_client_context("ours", str(tmp_path / "wrong.pem")))
    with pytest.raises(stdlib_ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
        talker.client.connect("localhost", broker.port)


# ── to publish and to receive ──


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_messages_of_several_threads_arrive_once_and_in_order(
    broker: Daemon, context: Any, run: Any, qos: int
) -> None:
    threads, turns = 4, 100

    def publish(number: int) -> None:
        for turn in range(turns):
            talker.client.publish(f"news/{number}", f"{turn}:".encode() + PAYLOAD[: 10 * turn], qos)

    with run(broker, Talker("listener", context, "news/#")) as listener:
        with talking(broker, Talker("talker", context)) as talker:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(publish, range(threads)))
            heard = [listener.hear() for _ in range(threads * turns)]
            assert_ours(listener.client.socket())
    expected = [f"{turn}:".encode() + PAYLOAD[: 10 * turn] for turn in range(turns)]
    for number in range(threads):
        assert [payload for topic, payload in heard if topic == f"news/{number}"] == expected
    assert listener.heard.empty()


def test_a_payload_of_a_megabyte(broker: Daemon, context: Any, run: Any) -> None:
    with run(broker, Talker("large", context, "news")) as talker:
        for qos in (0, 1, 2):
            send(talker, "news", PAYLOAD, qos)
            assert talker.hear() == ("news", PAYLOAD)


@pytest.mark.parametrize(("qos", "size"), [(0, 10), (0, 40_000), (2, 10)])
def test_round_trips_do_not_wait_for_a_time_out_of_select(
    broker: Daemon, context: Any, run: Any, qos: int, size: int
) -> None:
    """With QoS 2 several packets arrive at once, of which paho takes one before it selects again."""
    talker = Talker("echo", context, "news")
    talker.client.on_socket_open = send_at_once
    with run(broker, talker):
        began = time.monotonic()
        for turn in range(ROUND_TRIPS):
            talker.client.publish("news", PAYLOAD[turn : turn + size], qos)
            assert talker.hear() == ("news", PAYLOAD[turn : turn + size])
        assert time.monotonic() - began < FAST


def test_a_keepalive_of_a_second_keeps_an_idle_connection(broker: Daemon, context: Any) -> None:
    pinged = threading.Event()

    def on_log(_client: Any, _data: Any, _level: int, text: str) -> None:
        if "PINGRESP" in text:
            pinged.set()

    talker = Talker("idle", context, "news")
    talker.client.on_log = on_log
    with talking(broker, talker, keepalive=1):
        assert pinged.wait(PATIENCE)
        send(talker, "news", b"still here", qos=1)
        assert talker.hear() == ("news", b"still here")
        assert talker.ends.empty()


# ── to part ──


def test_a_clean_disconnect_reaches_the_broker(broker: Daemon, context: Any, run: Any) -> None:
    name = f"polite-{run.__name__}"
    with run(broker, Talker(name, context)) as talker:
        assert_ours(talker.client.socket())
        talker.client.publish("news", PAYLOAD, qos=0)
    assert not talker.ends.get(timeout=PATIENCE).is_failure
    assert talker.client.socket() is None
    broker.wait_for_log(f"Client {name} disconnected.")


def test_a_client_that_was_ousted_comes_back(broker: Daemon, context: Any) -> None:
    """A second client of the same name makes the broker cut the first one's connection."""
    with talking(broker, Talker("double", context, "news")) as first:
        second = Talker("double", context)
        second.client._reconnect_on_failure = False
        second.client.connect("localhost", broker.port)
        with contextlib.ExitStack() as stack:
            second.client.loop_start()
            stack.callback(second.client.loop_stop)
            stack.callback(second.client.disconnect)
            assert first.ends.get(timeout=PATIENCE).is_failure
            first.wait_until_ready()
            assert second.ends.get(timeout=PATIENCE).is_failure
        assert_ours(first.client.socket())
        send(first, "news", b"here again", qos=1)
        assert first.hear() == ("news", b"here again")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_clients_reconnect_after_the_broker_was_restarted(
    broker: Daemon, context: Any, run: Any, how: int
) -> None:
    with run(broker, Talker("faithful", context, "news")) as talker:
        before = talker.client.socket()
        broker.stop(how)
        assert talker.ends.get(timeout=PATIENCE).is_failure
        broker.start()
        talker.wait_until_ready()
        assert talker.client.socket() is not before
        assert_ours(talker.client.socket())
        send(talker, "news", PAYLOAD, qos=2)
        assert talker.hear() == ("news", PAYLOAD)
