"""Clients of message brokers and directories, against small servers that speak their protocols."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dropin_rig import Arrangement, injection, library
from peers import PATIENCE
from stubs import Amqp, Kafka, Ldap, Stomp, expected, our_client, over_tls, serving, spoken_by

pytestmark = [
    pytest.mark.usefixtures("default_bridge"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(ldap3|kafka|importlib)"),  # as they import
]

LARGE = random.Random(7).randbytes(100_000)


# ── AMQP ──


@pytest.fixture
def amqp_port(server_context: Any) -> Iterator[int]:
    """Where an AMQP broker listens."""
    library("pika")
    with serving(over_tls(server_context, Amqp.talk)) as port:
        yield port


@pytest.fixture
def pika_connection(arrangement: Arrangement, client_context: Any, amqp_port: int) -> Iterator[Any]:
    """A BlockingConnection of pika's; its socket is non-blocking underneath."""
    pika = library("pika")
    parameters = pika.ConnectionParameters(
        "127.0.0.1",
        amqp_port,
        ssl_options=pika.SSLOptions(client_context, "localhost"),
        socket_timeout=PATIENCE,
        stack_timeout=PATIENCE,
        blocked_connection_timeout=PATIENCE,
    )
    with pika.BlockingConnection(parameters) as connection:
        assert spoken_by(connection._impl._transport._sock) == expected(arrangement.client)
        yield connection


def test_pika_publishes_and_fetches_a_large_message(pika_connection: Any) -> None:
    channel = pika_connection.channel()
    assert channel.queue_declare("queue").method.message_count == 0
    channel.basic_publish("", "queue", LARGE)
    method, _, body = channel.basic_get("queue", auto_ack=True)
    assert (method.NAME, body) == ("Basic.GetOk", LARGE)
    assert channel.basic_get("queue") == (None, None, None)
    channel.close()


def test_pika_consumes_what_it_publishes(pika_connection: Any) -> None:
    channel = pika_connection.channel()
    bodies = [LARGE, b"small", LARGE[::-1]]
    received = []
    for body in bodies:
        channel.basic_publish("", "queue", body)
    for method, _, body in channel.consume("queue", inactivity_timeout=PATIENCE):
        assert method is not None, "no message in time"
        channel.basic_ack(method.delivery_tag)
        received.append(body)
        if len(received) == len(bodies):
            break
    assert channel.cancel() == 0
    assert received == bodies


def test_pika_is_woken_by_another_thread_while_it_waits_for_data(pika_connection: Any) -> None:
    channel = pika_connection.channel()
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    channel.basic_consume("queue", lambda _channel, _method, _properties, body: received.put(body))

    def publish() -> None:
        pika_connection.add_callback_threadsafe(lambda: channel.basic_publish("", "queue", LARGE))

    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publish)
        while received.empty():
            pika_connection.process_data_events(time_limit=PATIENCE)
        published.result()
    assert received.get_nowait() == LARGE


def test_pika_refuses_a_server_of_another_name(server_context: Any, client_context: Any) -> None:
    pika = library("pika")

    def refused(sock: socket.socket) -> None:
        with pytest.raises(OSError), server_context.wrap_socket(sock, server_side=True) as wrapped:
            assert not wrapped.recv(1)
            raise ConnectionAbortedError("the client has gone without a word")

    with serving(refused) as port:
        options = pika.SSLOptions(client_context, "elsewhere.example")
        parameters = pika.ConnectionParameters("127.0.0.1", port, ssl_options=options)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            pika.BlockingConnection(parameters)


def test_py_amqp_publishes_fetches_and_consumes(
    arrangement: Arrangement, amqp_port: int, ca_file: str
) -> None:
    amqp = library("amqp")
    received: list[bytes] = []
    options = {"ca_certs": ca_file, "server_hostname": "localhost"}
    with injection(arrangement.client):
        connection = amqp.Connection(
            f"127.0.0.1:{amqp_port}", ssl=options, connect_timeout=PATIENCE, read_timeout=PATIENCE
        )
        connection.connect()
    with connection:
        assert spoken_by(connection.transport.sock) == expected(arrangement.client)
        channel = connection.channel()
        channel.basic_publish(amqp.Message(LARGE), routing_key="queue")
        assert channel.basic_get("queue").body == LARGE
        assert channel.basic_get("queue") is None
        channel.basic_consume("queue", callback=lambda message: received.append(message.body))
        channel.basic_publish(amqp.Message(LARGE[::-1]), routing_key="queue")
        connection.drain_events(timeout=PATIENCE)
        assert received == [LARGE[::-1]]


def test_py_amqp_times_out_and_goes_on(arrangement: Arrangement, amqp_port: int, ca_file: str) -> None:
    amqp = library("amqp")
    received: list[bytes] = []
    options = {"context": {"cafile": ca_file}, "server_hostname": "localhost"}
    with injection(arrangement.client):
        connection = amqp.Connection(f"127.0.0.1:{amqp_port}", ssl=options, connect_timeout=PATIENCE)
        connection.connect()
    with connection:
        assert spoken_by(connection.transport.sock) == expected(arrangement.client)
        channel = connection.channel()
        channel.basic_consume("queue", callback=lambda message: received.append(message.body))
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
        channel.basic_publish(amqp.Message(LARGE), routing_key="queue")
        connection.drain_events(timeout=PATIENCE)
        assert received == [LARGE]


# ── LDAP ──


def descriptions(entries: Any) -> list[bytes]:
    return [entry["raw_attributes"]["description"][0] for entry in entries]


EVERYBODY = [Ldap.description(number) for number in range(Ldap.ENTRIES)]
SEARCH = {"search_base": "dc=example", "search_filter": "(cn=*)", "attributes": ["description"]}


def ldap_connection(port: int, ca_file: str, use_ssl: bool, **options: Any) -> Any:
    """Not open yet; with a verified certificate once it is."""
    ldap3 = library("ldap3")
    tls = ldap3.Tls(validate=ssl.CERT_REQUIRED, ca_certs_file=ca_file, sni="localhost")
    server = ldap3.Server("localhost", port, use_ssl, tls=tls, get_info=ldap3.NONE)
    return ldap3.Connection(server, Ldap.USER, Ldap.PASSWORD, **options)


@pytest.mark.parametrize("secured", ["from-the-start", "by-start-tls"])
def test_ldap3_binds_and_searches(
    secured: str, arrangement: Arrangement, server_context: Any, ca_file: str
) -> None:
    at_once = secured == "from-the-start"
    talk = over_tls(server_context, Ldap.talk) if at_once else Ldap.with_start_tls(server_context)
    with serving(talk) as port, injection(arrangement.client):
        connection = ldap_connection(port, ca_file, at_once, receive_timeout=int(PATIENCE))
        connection.open()
        assert at_once or connection.start_tls()
        assert spoken_by(connection.socket) == expected(arrangement.client)
        assert connection.bind(), connection.result
        assert connection.search(**SEARCH), connection.result
        assert descriptions(connection.response) == EVERYBODY
        connection.unbind()
        assert connection.closed


@our_client
@pytest.mark.parametrize("secured", ["from-the-start", "by-start-tls"])
def test_ldap3_reads_in_a_thread_while_others_ask(
    secured: str, arrangement: Arrangement, server_context: Any, ca_file: str
) -> None:
    ldap3 = library("ldap3")
    at_once = secured == "from-the-start"
    talk = over_tls(server_context, Ldap.talk) if at_once else Ldap.with_start_tls(server_context)
    with serving(talk) as port, injection(arrangement.client):
        connection = ldap_connection(port, ca_file, at_once, client_strategy=ldap3.ASYNC)
        connection.open()
        assert at_once or connection.start_tls()
        assert spoken_by(connection.socket) == expected(arrangement.client)
        assert connection.bind(), connection.result

        def search() -> list[bytes]:
            response, result = connection.get_response(connection.search(**SEARCH), PATIENCE)
            assert result["description"] == "success"
            return descriptions(response)

        with ThreadPoolExecutor(3) as pool:
            for found in [pool.submit(search) for _ in range(3)]:
                assert found.result() == EVERYBODY
        receiver = connection.strategy.receiver
        connection.unbind()
        receiver.join(PATIENCE)
        assert not receiver.is_alive()


def test_ldap3_is_told_that_its_password_is_wrong(
    arrangement: Arrangement, server_context: Any, ca_file: str
) -> None:
    with serving(over_tls(server_context, Ldap.talk)) as port, injection(arrangement.client):
        connection = ldap_connection(port, ca_file, True)
        connection.password = "a guess"
        assert not connection.bind()
        assert connection.result["description"] == "invalidCredentials"
        connection.unbind()


# ── STOMP ──


def test_stomp_receives_what_it_sends(arrangement: Arrangement, server_context: Any, ca_file: str) -> None:
    stomp = library("stomp")
    heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    class Listener(stomp.ConnectionListener):  # type: ignore[misc]
        def on_connected(self, frame: Any) -> None:
            heard.put(("connected", frame.headers["version"]))

        def on_message(self, frame: Any) -> None:
            heard.put(("message", frame.body))

        def on_receipt(self, frame: Any) -> None:
            heard.put(("receipt", frame.headers["receipt-id"]))

        def on_disconnected(self) -> None:
            heard.put(("disconnected", None))

    with serving(over_tls(server_context, Stomp.talk)) as port, injection(arrangement.client):
        where = [("localhost", port)]
        connection = stomp.Connection12(where, timeout=PATIENCE, auto_decode=False)
        connection.set_ssl(where, ca_certs=ca_file)
        connection.set_listener("", Listener())
        connection.connect()
        assert heard.get(timeout=PATIENCE) == ("connected", "1.2")
        assert spoken_by(connection.transport.socket) == expected(arrangement.client)
        connection.subscribe("/queue/test", id="1")
        for body in (b"small", LARGE):
            connection.send("/queue/test", body)
            assert heard.get(timeout=PATIENCE) == ("message", body)
        connection.disconnect(receipt="good-bye")
        last = {heard.get(timeout=PATIENCE) for _ in range(2)}
        assert last == {("receipt", "good-bye"), ("disconnected", None)}
        assert not connection.is_connected()


# ── Kafka ──


def test_kafka_sends_a_large_record_and_reads_a_large_answer(
    arrangement: Arrangement, server_context: Any, client_context: Any
) -> None:
    kafka, broker = library("kafka"), Kafka()
    with serving(over_tls(server_context, broker.talk)) as port, contextlib.ExitStack() as stack:
        options: dict[str, Any] = {
            "bootstrap_servers": f"localhost:{port}",
            "security_protocol": "SSL",
            "ssl_context": client_context,
            "bootstrap_timeout_ms": PATIENCE * 1000,
        }
        producer = kafka.KafkaProducer(**options, enable_idempotence=False)
        stack.callback(producer.close, timeout=1)
        stored = producer.send(broker.TOPICS[0], LARGE).get(PATIENCE)
        assert (stored.topic, stored.partition, stored.offset) == (broker.TOPICS[0], 0, 0)
        assert LARGE in broker.records
        assert {spoken_by(sock) for sock in kafka_sockets(producer)} == {expected(arrangement.client)}

        consumer = kafka.KafkaConsumer(**options, group_id=None)
        stack.callback(consumer.close)
        assert consumer.topics() == set(broker.TOPICS)


def kafka_sockets(client: Any) -> list[Any]:
    """What *client* is connected by."""
    connections = client._sender._client._manager._conns.values()
    return [connection.transport._sock for connection in connections if connection.connected]
