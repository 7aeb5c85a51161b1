"""Small servers of real protocols: a blocking thread a connection, as people wrote them, and nothing that spares TLS.

The codecs of AMQP and Kafka are borrowed from pika and kafka-python; those of LDAP and STOMP are written out.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from dropin_rig import ARRANGEMENTS, CONTROL, library, our_ssl
from peers import PATIENCE, receive_exactly

Talk = Callable[[socket.socket], None]

our_client = pytest.mark.parametrize(
    "arrangement", [one for one in ARRANGEMENTS if one.client == "ours"], ids=str
)
"""For clients that read and write in two threads at once, which the stdlib's sockets do not bear."""


def spoken_by(sock: Any) -> str:
    """Whose TLS *sock* speaks, "ours" or "theirs"; AssertionError if none.  In a control run all is the stdlib's."""
    assert isinstance(sock, ssl.SSLSocket), sock
    return "ours" if isinstance(sock, our_ssl().SSLSocket) else "theirs"


def expected(side: str) -> str:
    """What `spoken_by` is to say about *side*."""
    return "ours" if CONTROL else side


@contextlib.contextmanager
def serving(talk: Talk) -> Iterator[int]:
    """A server on some port: *talk* for each connection, in a thread.  At the end it raises what they failed with."""
    listener = socket.create_server(("127.0.0.1", 0))
    failures: list[BaseException] = []

    def handle(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(PATIENCE)
            try:
                talk(sock)
            except BaseException as error:
                failures.append(error)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                pool.submit(handle, listener.accept()[0])

    try:
        with ThreadPoolExecutor(16) as pool, listener:
            pool.submit(accept)
            try:
                yield listener.getsockname()[1]
            finally:
                listener.shutdown(socket.SHUT_RDWR)
    finally:
        if failures:
            raise failures[0]


def over_tls(context: Any, talk: Talk) -> Talk:
    """*talk* behind a handshake by *context*."""

    def shake_hands(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            ours = (
                our_ssl().SSLContext in type(context).__mro__
            )  # of which all are instances while it is injected
            side = "ours" if ours else "theirs"
            assert spoken_by(wrapped) == side, f"{side} expected, not {type(wrapped)}"
            talk(wrapped)

    return shake_hands


# ── AMQP 0-9-1 ──


class Amqp:
    """A broker with one queue a connection: what is published is there to be fetched, or goes to the consumer."""

    FRAME_MAX = 16_384
    """Bytes in a frame, so a message of 100 KB comes in several."""

    def __init__(self, sock: socket.socket) -> None:
        self.spec, self.frame = library("pika.spec"), library("pika.frame")
        self.sock = sock
        self.published: deque[bytes] = deque()
        self.consumer: str | None = None
        self.delivered = 0
        self.body, self.left = b"", 0

    @classmethod
    def talk(cls, sock: socket.socket) -> None:
        """The whole conversation with one client."""
        broker = cls(sock)
        for frame in broker.frames():
            if not broker.answer(frame):
                break

    def frames(self) -> Iterator[Any]:
        """What the client sends, until it ends."""
        held = b""
        while data := self.sock.recv(1 << 16):
            held += data
            while (found := self.frame.decode_frame(held))[0]:
                held = held[found[0] :]
                yield found[1]

    def answer(self, frame: Any) -> bool:
        """React to *frame*.  Whether the conversation goes on."""
        spec = self.spec
        if isinstance(frame, self.frame.ProtocolHeader):
            self.say(0, spec.Connection.Start(server_properties={"product": "stub"}))
        elif isinstance(frame, self.frame.Header):
            self.body, self.left = b"", frame.body_size
        elif isinstance(frame, self.frame.Body):
            self.body += frame.fragment
            self.left -= len(frame.fragment)
            if not self.left:
                self.published.append(self.body)
                self.deliver(frame.channel_number)
        elif isinstance(frame, self.frame.Method):
            return self.answer_method(frame.channel_number, frame.method)
        return True

    def answer_method(self, channel: int, method: Any) -> bool:
        """The answer to a *method*, if it asks for any."""
        spec = self.spec
        answers: dict[str, Callable[[], Any]] = {
            "Connection.StartOk": lambda: spec.Connection.Tune(8, self.FRAME_MAX, 0),
            "Connection.Open": lambda: spec.Connection.OpenOk(),
            "Connection.Close": lambda: spec.Connection.CloseOk(),
            "Channel.Open": lambda: spec.Channel.OpenOk(),
            "Channel.Close": lambda: spec.Channel.CloseOk(),
            "Queue.Declare": lambda: spec.Queue.DeclareOk(method.queue, len(self.published), 0),
            "Basic.Cancel": lambda: spec.Basic.CancelOk(method.consumer_tag),
        }
        if method.NAME in answers:
            self.say(channel, answers[method.NAME]())
        elif method.NAME == "Basic.Get":
            self.get(channel)
        elif method.NAME == "Basic.Consume":
            self.consumer = method.consumer_tag or "a-consumer"
            self.say(channel, spec.Basic.ConsumeOk(self.consumer))
            self.deliver(channel)
        return bool(method.NAME != "Connection.Close")

    def get(self, channel: int) -> None:
        """One message, or that there is none."""
        if not self.published:
            self.say(channel, self.spec.Basic.GetEmpty())
            return
        self.delivered += 1
        self.say_content(
            channel, self.spec.Basic.GetOk(self.delivered, False, "", "queue", 0), self.published.popleft()
        )

    def deliver(self, channel: int) -> None:
        """All messages, once there is a consumer."""
        while self.consumer is not None and self.published:
            self.delivered += 1
            method = self.spec.Basic.Deliver(self.consumer, self.delivered, False, "", "queue")
            self.say_content(channel, method, self.published.popleft())

    def say(self, channel: int, method: Any) -> None:
        self.sock.sendall(self.frame.Method(channel, method).marshal())

    def say_content(self, channel: int, method: Any, body: bytes) -> None:
        size = self.FRAME_MAX - 8
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        frames = [
            self.frame.Method(channel, method),
            self.frame.Header(channel, len(body), self.spec.BasicProperties()),
            *(self.frame.Body(channel, part) for part in parts),
        ]
        self.sock.sendall(b"".join(one.marshal() for one in frames))


# ── LDAP ──


def ber(tag: int, *parts: bytes) -> bytes:
    """*parts* behind a tag and a length."""
    content = b"".join(parts)
    return bytes((tag, 0x84)) + len(content).to_bytes(4, "big") + content


class Ldap:
    """A directory of `ENTRIES` people and one user who may bind."""

    ENTRIES = 200
    USER, PASSWORD = "cn=admin,dc=example", "a secret"
    BIND, UNBIND, SEARCH, EXTENDED = 0x60, 0x42, 0x63, 0x77
    SUCCESS, INVALID_CREDENTIALS = 0, 49
    START_TLS = b"1.3.6.1.4.1.1466.20037"

    def __init__(self, sock: socket.socket, context: Any = None) -> None:
        self.sock, self.context = sock, context

    @classmethod
    def talk(cls, sock: socket.socket) -> None:
        """The conversation, over TLS from the start."""
        cls(sock).converse()

    @classmethod
    def with_start_tls(cls, context: Any) -> Talk:
        """The conversation in clear, where the client must ask for TLS before anything else."""
        return lambda sock: cls(sock, context).converse()

    @staticmethod
    def description(number: int) -> bytes:
        """Half a kilobyte about a person."""
        return f"person {number} ".encode() * 40

    def converse(self) -> None:
        while (message := self.read()) is not None:
            number, operation, content = message
            if operation == self.UNBIND:
                break
            if operation == self.EXTENDED:
                return self.start_tls(number, content)
            assert spoken_by(self.sock), "a request in clear"
            if operation == self.BIND:
                known = self.USER.encode() in content and self.PASSWORD.encode() in content
                self.say(number, self.result(0x61, self.SUCCESS if known else self.INVALID_CREDENTIALS))
            elif operation == self.SEARCH:
                entries = [self.entry(index) for index in range(self.ENTRIES)]
                self.say(number, *entries, self.result(0x65, self.SUCCESS))

    def read(self) -> tuple[bytes, int, bytes] | None:
        """Number, operation and content of the next message; None at the end."""
        header = receive_exactly(self.sock, 2)
        if len(header) < 2:
            return None
        size = header[1]
        if size & 0x80:
            size = int.from_bytes(receive_exactly(self.sock, size & 0x7F), "big")
        message = receive_exactly(self.sock, size)
        end = 2 + message[1]
        return message[:end], message[end], message[end + 1 :]

    def start_tls(self, number: bytes, content: bytes) -> None:
        """Say yes, and have the rest of the conversation over TLS."""
        assert self.START_TLS in content
        self.say(number, self.result(0x78, self.SUCCESS, ber(0x8A, self.START_TLS)))
        over_tls(self.context, Ldap.talk)(self.sock)

    def say(self, number: bytes, *operations: bytes) -> None:
        self.sock.sendall(b"".join(ber(0x30, number, one) for one in operations))

    def result(self, tag: int, code: int, *more: bytes) -> bytes:
        return ber(tag, ber(0x0A, bytes((code,))), ber(0x04), ber(0x04), *more)

    def entry(self, number: int) -> bytes:
        name, value = f"cn=person{number},dc=example".encode(), self.description(number)
        attribute = ber(0x30, ber(0x04, b"description"), ber(0x31, ber(0x04, value)))
        return ber(0x64, ber(0x04, name), ber(0x30, attribute))


# ── STOMP ──


class Stomp:
    """A broker of STOMP 1.2 whose messages go back to the sender's own subscription."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held = b""
        self.subscription = ""
        self.count = 0

    @classmethod
    def talk(cls, sock: socket.socket) -> None:
        """The whole conversation with one client; both say close_notify in the end, for the client waits for it."""
        broker = cls(sock)
        for command, headers, body in broker.frames():
            broker.answer(command, headers, body)
        with contextlib.suppress(OSError):
            sock.unwrap()  # type: ignore[attr-defined]

    def frames(self) -> Iterator[tuple[str, dict[str, str], bytes]]:
        """What the client sends, until it ends."""
        while (head := self.until(b"\n\n")) is not None:
            command, *lines = head.decode().lstrip("\n").split("\n")
            headers = dict(line.split(":", 1) for line in lines)
            size = int(headers.get("content-length", "0"))
            while len(self.held) <= size and (data := self.sock.recv(1 << 16)):
                self.held += data
            body, end = self.held[:size], self.held[size : size + 1]
            assert end == b"\0", end
            self.held = self.held[size + 1 :]
            yield command, headers, body

    def until(self, mark: bytes) -> bytes | None:
        """What comes before *mark*; None if the client ends."""
        while mark not in self.held:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self.held += data
        found, _, self.held = self.held.partition(mark)
        return found

    def answer(self, command: str, headers: dict[str, str], body: bytes) -> None:
        if command in ("CONNECT", "STOMP"):
            self.say("CONNECTED", {"version": "1.2", "heart-beat": "0,0"})
        elif command == "SUBSCRIBE":
            self.subscription = headers["id"]
        elif command == "SEND":
            self.count += 1
            about = {"subscription": self.subscription, "message-id": str(self.count)}
            self.say("MESSAGE", {**about, "destination": headers["destination"]}, body)
        if "receipt" in headers:
            self.say("RECEIPT", {"receipt-id": headers["receipt"]})

    def say(self, command: str, headers: dict[str, str], body: bytes = b"") -> None:
        lines = [command, *(f"{name}:{value}" for name, value in headers.items())]
        head = "\n".join([*lines, f"content-length:{len(body)}", "", ""])
        self.sock.sendall(head.encode() + body + b"\0")


# ── Kafka ──


class Kafka:
    """A cluster of one broker with many topics of one partition each, which keeps the last batch of records."""

    TOPICS = tuple(f"topic-{number:03}-{'x' * 100}" for number in range(1_000))
    VERSION = (2, 5)

    def __init__(self) -> None:
        self.metadata = library("kafka.protocol.metadata")
        self.producer = library("kafka.protocol.producer")
        self.versions = library("kafka.protocol.broker_version_data").BROKER_API_VERSIONS[self.VERSION]
        self.port = 0
        self.records = b""
        self.answers: dict[int, tuple[Any, Callable[[Any], Any]]] = {
            18: (self.metadata.ApiVersionsRequest, self.list_versions),
            3: (self.metadata.MetadataRequest, self.describe),
            0: (self.producer.ProduceRequest, self.keep),
        }

    def talk(self, sock: socket.socket) -> None:
        """The conversation with one client: requests, each answered at once."""
        self.port = sock.getsockname()[1]
        while header := receive_exactly(sock, 4):
            data = receive_exactly(sock, struct.unpack(">i", header)[0])
            key, version, number = struct.unpack_from(">hhi", data)
            request_class, answer = self.answers[key]
            response = answer(request_class.decode(data, version=version, header=True))
            response.API_VERSION = 0 if getattr(response, "error_code", 0) else version
            response.with_header(correlation_id=number)
            sock.sendall(response.encode(header=True, framed=True))

    def list_versions(self, request: Any) -> Any:
        """What the broker understands; an error if the question itself is too new."""
        kind = self.metadata.ApiVersionsResponse
        supported = [
            kind.ApiVersion(api_key=key, min_version=first, max_version=last)
            for key, (first, last) in self.versions.items()
        ]
        version = request.API_VERSION
        too_new = version > self.versions[18][1]
        return kind(error_code=35 if too_new else 0, api_keys=supported, throttle_time_ms=0)

    def describe(self, request: Any) -> Any:
        """All topics, or those that *request* names."""
        kind = self.metadata.MetadataResponse
        topic = kind.MetadataResponseTopic
        names = self.TOPICS if request.topics is None else [asked.name for asked in request.topics]
        partition = topic.MetadataResponsePartition(
            error_code=0, partition_index=0, leader_id=1, replica_nodes=[1], isr_nodes=[1]
        )
        broker = kind.MetadataResponseBroker(node_id=1, host="localhost", port=self.port)
        found = [topic(error_code=0, name=name, is_internal=False, partitions=[partition]) for name in names]
        return kind(throttle_time_ms=0, brokers=[broker], cluster_id="stub", controller_id=1, topics=found)

    def keep(self, request: Any) -> Any:
        """Say that the records are stored."""
        sent = request.topic_data[0]
        self.records = bytes(sent.partition_data[0].records)
        kind = self.producer.ProduceResponse
        topic = kind.TopicProduceResponse
        partition = topic.PartitionProduceResponse(index=0, error_code=0, base_offset=0)
        return kind(responses=[topic(name=sent.name, partition_responses=[partition])], throttle_time_ms=0)
