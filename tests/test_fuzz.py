"""What strangers may send, and what anybody may pass: only documented errors, no hang, no memory without bound.

Hypothesis makes the input, the same in every run unless BRIDGE_FUZZ_EXAMPLES says how much more there shall be.  The
codecs are fuzzed in `test_codecs.py`.
"""

from __future__ import annotations

import base64
import functools
import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bridge
from bridge.engine import TLSEngine
from bridge.poll import Want

EXAMPLES = int(os.environ.get("BRIDGE_FUZZ_EXAMPLES", "0"))
"""How many of each; 0: few, and always the same."""
fuzzed = settings(max_examples=EXAMPLES or 60, deadline=None, derandomize=not EXAMPLES, database=None)
MOST_ANSWER = 64 * 1024
"""Bytes that an engine may have to say to a stranger who has said at most a few kilobytes."""


@functools.cache
def identity() -> tuple[bytes, bytes, bytes]:
    """A server's chain, its key, and the CA, as PEM."""
    ca = trustme.CA()
    issued = ca.issue_cert("localhost")
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    return chain, issued.private_key_pem.bytes(), ca.cert_pem.bytes()


@functools.cache
def server_context() -> bridge.Context:
    chain, key, _ = identity()
    return bridge.server_context(chain, key)


@functools.cache
def client_context() -> bridge.Context:
    return bridge.client_context(identity()[2])


def server() -> TLSEngine:
    return TLSEngine(server_context())


def client() -> TLSEngine:
    return TLSEngine(client_context(), server_hostname="localhost")


@functools.cache
def flights() -> tuple[bytes, bytes]:
    """A ClientHello, and a server's answer to it."""
    asking, answering = client(), server()
    assert asking.handshake() is Want.READ
    hello = asking.take_output()
    answering.feed(hello)
    assert answering.handshake() is Want.READ
    return hello, answering.take_output()


def meet(engine: TLSEngine, pieces: list[bytes]) -> None:
    """Give *engine* the *pieces*, and then the end.  Only typed ends; and it never says more than it should."""
    said = 0
    try:
        for piece in [*pieces, b""]:
            engine.feed(piece)
            for _ in range(4):
                if engine.handshake() is None:
                    raise AssertionError("a handshake without the keys")
                said += len(engine.take_output())
    except bridge.SessionEnded as error:
        assert isinstance(error, (bridge.TLSError, bridge.Truncated)), repr(error)
        with pytest.raises(type(error)):
            engine.handshake()  # for ever the same
        said += len(engine.take_output())
    else:
        raise AssertionError("the end of the stream was not noticed")
    assert said <= MOST_ANSWER


def cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = sorted({index % (len(data) + 1) for index in at} | {0, len(data)})
    return [piece for begin, end in itertools.pairwise(marks) if (piece := data[begin:end])]


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "drop", "repeat", "insert"]), st.integers(0, 1 << 16), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, filling in changes:
        at = where % len(data) if data else 0
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (filling[0] if filling else 1)]) + data[at + 1 :]
        elif kind == "drop":
            data = data[:at] + data[at + 1 + len(filling) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 64] + data[at:]
        else:
            data = data[:at] + filling + data[at:]
    return data


records = st.builds(
    lambda kind, version, length, body: (
        bytes([kind]) + version + (length or len(body)).to_bytes(2, "big") + body
    ),
    st.integers(20, 25),
    st.sampled_from([b"\3\1", b"\3\3", b"\3\4", b"\0\2"]),
    st.sampled_from([0, 0, 0, 1, 16_384, 16_641, 65_535]),
    st.binary(max_size=64),
)
anything = st.binary(max_size=2_000) | st.lists(records, max_size=12).map(b"".join)
cuts = st.lists(st.integers(0, 1 << 16), max_size=6)

CORPUS = (
    b"",
    b"\x16",
    b"\x16\x03\x01\x00\x00",  # an empty record
    b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",  # a ClientHello of 16 MiB
    b"\x15\x03\x01\x00\x02\x01\x00",  # close_notify, first thing
    b"\x15\x03\x01\x00\x02\x02\x28",  # a fatal alert
    b"\x14\x03\x03\x00\x01\x01" * 40,  # ChangeCipherSpec, again and again
    b"\x17\x03\x03\x00\x01x",  # application data before the handshake
    b"\x80\x2e\x01\x03\x01",  # SSLv2's hello
    b"GET / HTTP/1.1\r\n\r\n",
)


@pytest.mark.parametrize("make", [server, client])
@fuzzed
@given(data=anything, at=cuts)
def test_bytes_of_a_stranger(make: Callable[[], TLSEngine], data: bytes, at: list[int]) -> None:
    meet(make(), cut(data, at))


@pytest.mark.parametrize("make", [server, client])
@pytest.mark.parametrize("data", CORPUS)
def test_the_corpus(make: Callable[[], TLSEngine], data: bytes) -> None:
    meet(make(), [data] if data else [])
    meet(make(), [bytes([byte]) for byte in data])


@fuzzed
@given(changes=mutations, at=cuts)
def test_a_mutated_client_hello(changes: list[tuple[str, int, bytes]], at: list[int]) -> None:
    meet(server(), cut(mutated(flights()[0], changes), at))


@fuzzed
@given(changes=mutations, at=cuts)
def test_a_mutated_flight_of_a_server(changes: list[tuple[str, int, bytes]], at: list[int]) -> None:
    asking = client()
    assert asking.handshake() is Want.READ
    asking.take_output()
    meet(asking, cut(mutated(flights()[1], changes), at))


def test_a_stranger_who_says_much_gets_nowhere() -> None:
    """A ClientHello that never ends is refused, long before it fills the memory."""
    engine, fed = server(), 0
    with pytest.raises(bridge.TLSError):
        while fed < 1 << 22:
            body = (b"\1\xff\xff\xff" if not fed else b"") + bytes(16_000)
            engine.feed(b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body)
            fed += len(body)
            engine.handshake()
    assert fed < 1 << 20


# ── certificates and contexts ──


anything_at_all = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=200)
    | st.lists(st.integers() | st.text(max_size=5), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    | st.builds(object)
)


def documented(make: Callable[[], Any]) -> None:
    """It works, or says with one class of error what is wrong; the error can be shown and copied."""
    try:
        make()
    except bridge.ConfigurationError as error:
        assert str(error) and pickle.loads(pickle.dumps(error)).args == error.args


@fuzzed
@given(changes=mutations, which=st.integers(0, 2))
def test_mutated_pem(changes: list[tuple[str, int, bytes]], which: int) -> None:
    parts = list(identity())
    parts[which] = mutated(parts[which], changes)
    chain, key, ca = parts
    documented(lambda: bridge.server_context(chain, key, client_ca=ca))
    documented(lambda: bridge.client_context(ca))


def test_a_ca_that_only_openssl_finds_damaged() -> None:
    """cryptography loads it, and reads a name only when asked for; OpenSSL refuses the text that is no UTF-8."""
    ca = x509.load_pem_x509_certificate(identity()[2]).public_bytes(Encoding.DER)
    damaged = pem(ca.replace(b"trustme", b"\xffrustme"), "CERTIFICATE")
    with pytest.raises(
        bridge.ConfigurationError, match="OpenSSL refuses a certificate in the PEM given as cafile"
    ):
        bridge.client_context(damaged)
    chain, key, _ = identity()
    with pytest.raises(
        bridge.ConfigurationError, match="OpenSSL refuses a certificate in the PEM given as client_ca"
    ):
        bridge.server_context(chain, key, client_ca=damaged)


def pem(body: bytes, kind: str) -> bytes:
    return b"-----BEGIN %s-----\n%s-----END %s-----\n" % (
        kind.encode(),
        base64.encodebytes(body),
        kind.encode(),
    )


@fuzzed
@given(
    body=st.binary(max_size=300), kind=st.sampled_from(["CERTIFICATE", "PRIVATE KEY", "EC PRIVATE KEY", "X"])
)
def test_garbage_in_pem(body: bytes, kind: str) -> None:
    chain, key, _ = identity()
    documented(lambda: bridge.server_context(pem(body, kind), key))
    documented(lambda: bridge.server_context(chain, pem(body, kind)))
    documented(lambda: bridge.client_context(pem(body, kind)))


ARGUMENTS = (
    "certfile",
    "keyfile",
    "password",
    "client_ca",
    "client_cert",
    "alpn",
    "ciphers",
    "ciphersuites",
    "minimum_version",
    "maximum_version",
    "ocsp_staple",
)


@fuzzed
@given(name=st.sampled_from(ARGUMENTS), value=anything_at_all)
@example(name="password", value=0)
def test_wrong_types_and_values(name: str, value: Any) -> None:
    chain, key, _ = identity()
    documented(lambda: bridge.server_context(**{"certfile": chain, "keyfile": key, name: value}))


@fuzzed
@given(value=anything_at_all)
def test_any_name_of_a_peer(value: Any) -> None:
    documented(lambda: client_context().peer_name(value))
    documented(lambda: bridge.client_context(value))
