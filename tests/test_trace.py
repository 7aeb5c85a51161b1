"""Traces of real sessions: what is noted, what is not, and that nothing is left behind."""

from __future__ import annotations

import json
import xml.etree.ElementTree

import pytest
from conftest import KeyPair
from peers import PATIENCE, Background, until
from rig import only, raw_context, tcp_pair

import bridge
from bridge import tracing
from bridge.tap import _calling, _on_message

SECRET = b"correct horse battery staple"


def exchange(server_cert: KeyPair, ca_file: str, version: str, size: int = 0) -> None:
    """A handshake, an echo of SECRET, *size* bytes to the client, a close: both ends in this process."""
    server = bridge.server_context(server_cert.certfile, server_cert.keyfile, **only(version))
    client = bridge.client_context(ca_file, **only(version))
    with bridge.Bridge(workers=2) as b, b.listen(("127.0.0.1", 0), server) as listener:
        session = b.connect(listener.address, client, server_hostname="localhost", timeout=10)
        peer = listener.accept(timeout=10)
        session.send(SECRET)
        peer.send(peer.recv(timeout=10) + bytes(size))
        received = 0
        while received < len(SECRET) + size:
            received += len(session.recv(timeout=10))
        session.send_eof()
        assert list(peer) == []
        peer.close(timeout=5)
        session.close(timeout=5)


def test_a_trace_shows_the_handshake_the_wants_the_sleeps_and_the_close(
    server_cert: KeyPair, ca_file: str, tls_version: str
) -> None:
    with bridge.trace() as seen:
        exchange(server_cert, ca_file, tls_version)
    events = seen.events
    assert {event.lane for event in events} >= {"application", "worker"}
    client = [event for event in events if event.session.startswith("client")]
    messages = [(event.outcome, event.what) for event in client if event.kind == "message"]
    assert messages[:2] == [("sent", "ClientHello"), ("received", "ServerHello")]
    assert ("sent", "Finished") in messages and ("received", "Finished") in messages
    assert ("received", "NewSessionTicket") in messages
    assert any(e.what == "SSL_do_handshake" and e.outcome == "WANT_READ" for e in client)
    written = [e for e in client if e.what == "SSL_write"]
    assert [(e.asked, e.answered) for e in written] == [(len(SECRET), len(SECRET))]
    assert ("sent", "close_notify") in [(e.outcome, e.what) for e in client if e.kind == "alert"]
    woken = {e.outcome for e in events if e.kind == "sleep" and e.lane == "worker"}
    assert any("socket readable" in why for why in woken) and any("doorbell" in why for why in woken)
    sent = [e for e in client if e.kind == "record" and e.outcome == "sent" and e.what == "application data"]
    assert len(sent) == 1
    assert len(SECRET) < (sent[0].answered or 0) < len(SECRET) + 50


def test_record_sizes_of_a_bulk_transfer_are_those_of_full_records(
    server_cert: KeyPair, ca_file: str
) -> None:
    with bridge.trace() as seen:
        exchange(server_cert, ca_file, "TLSv1.3", 100_000)
    sizes = [
        e.answered or 0
        for e in seen.events
        if (e.kind, e.what, e.outcome) == ("record", "application data", "received")
    ]
    assert max(sizes) == 16384 + 17  # a byte of content type and a tag of 16 (RFC 8446, 5.2)
    assert sum(sizes) > 100_000


def test_a_trace_is_bounded_and_keeps_the_newest(server_cert: KeyPair, ca_file: str) -> None:
    with bridge.trace(limit=10) as seen:
        exchange(server_cert, ca_file, "TLSv1.3")
    assert len(seen.events) == 10
    assert seen.dropped == seen.events[0].number > 0


def test_no_payload_is_in_a_trace_and_its_pictures_are_well_formed(
    server_cert: KeyPair, ca_file: str
) -> None:
    with bridge.trace() as seen:
        exchange(server_cert, ca_file, "TLSv1.3")
    lines = seen.json_lines()
    assert [json.loads(line)["number"] for line in lines.splitlines()] == [e.number for e in seen.events]
    picture = seen.svg(rows=20)
    xml.etree.ElementTree.fromstring(picture)
    for lane in tracing.LANES:
        assert f">{lane}<" in picture
    assert "more events" in picture
    assert "correct horse" not in lines + seen.svg(1000)


def test_a_trace_shows_the_sleeps_of_a_stream_and_what_ended_each(server_cert: KeyPair, ca_file: str) -> None:
    server = bridge.server_context(
        server_cert.certfile, server_cert.keyfile, renegotiation=True, **only("TLSv1.2")
    )
    client = bridge.client_context(ca_file, **only("TLSv1.2"))
    near, far = tcp_pair()
    with bridge.Bridge(workers=1) as b, bridge.trace() as seen, Background() as background:
        ours = b.stream(near, client, server_hostname="localhost")
        session = b.adopt(far, server, wait=False)
        ours.handshake(PATIENCE)
        with pytest.raises(bridge.OperationTimeout):
            ours.read(1, 0.3)
        session.renegotiate()  # which its worker does in its own time
        until(lambda: any(event.what == "SSL_renegotiate" for event in seen.events))
        reading = background.run(ours.read, 1, PATIENCE)
        session.send(b"x")
        assert reading.result(PATIENCE) == b"x"
        asleep = background.run(ours.read, 1, PATIENCE)
        while not ours._lease._sleepers:
            assert not asleep.done()
        ours.close()
        assert asleep.exception(PATIENCE) is not None or asleep.result() == b""
    sleeps = {event.outcome for event in seen.events if event.kind == "sleep"}
    assert {"a deadline", "socket readable", "doorbell"} <= sleeps


def test_a_message_whose_class_has_no_length_passes_in_a_trace(server_cert: KeyPair, ca_file: str) -> None:
    class Scalar:
        """As an array of numpy that has no dimension."""

        def __len__(self) -> int:
            raise TypeError("len() of unsized object")

    class Scalars(bridge.codecs.Raw):
        def encode(self, message: object) -> bytes:
            return b"x"

        def decode(self, data: bytes) -> list[object]:  # type: ignore[override]
            return [Scalar()]

    server = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    client = bridge.client_context(ca_file)
    with bridge.trace() as seen, bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server, codec=Scalars)
        session = b.connect(listener.address, client, server_hostname="localhost", codec=Scalars)
        session.send(Scalar())  # type: ignore[arg-type]
        peer = listener.accept(PATIENCE)
        assert isinstance(peer.recv(PATIENCE), Scalar)
        session.abort()
        peer.abort()
    calls = [(e.what, e.asked, e.answered, e.outcome) for e in seen.events if e.kind == "api"]
    assert calls == [("session.send", None, None, "ok"), ("session.recv", None, None, "ok")]


def test_the_size_of_a_view_of_numbers_is_in_bytes(server_cert: KeyPair, ca_file: str) -> None:
    server = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.trace() as seen, bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server)
        session = b.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
        session.send(memoryview(bytes(12)).cast("i"))
        peer = listener.accept(PATIENCE)
        assert peer.recv(PATIENCE) == bytes(12)
        session.abort()
        peer.abort()
    assert [event.asked for event in seen.events if event.what == "session.send"] == [12]


def test_a_callback_that_makes_a_session_does_not_hide_its_own(server_cert: KeyPair, ca_file: str) -> None:
    outer = raw_context("TLSv1.3", server_cert)
    client = bridge.client_context(ca_file)
    with bridge.trace() as seen, bridge.Bridge(workers=2) as b:

        def ask(*_: object) -> None:
            inner, far = tcp_pair()
            peer = b.adopt(far, bridge.server_context(server_cert.certfile, server_cert.keyfile), wait=False)
            stream = b.stream(inner, client, server_hostname="localhost")
            stream.handshake(PATIENCE)
            stream.close()
            peer.abort()

        outer.set_tlsext_servername_callback(ask)
        near, far = tcp_pair()
        ours = b.stream(near, outer, server_side=True)
        visitor = b.adopt(far, client, server_hostname="localhost", wait=False)
        ours.handshake(PATIENCE)
        ours.close()
        visitor.abort()
    outermost = next(e.session for e in seen.events if (e.what, e.outcome) == ("ClientHello", "received"))
    messages = [e.what for e in seen.events if e.kind == "message" and e.session == outermost]
    assert messages[:3] == ["ClientHello", "ServerHello", "EncryptedExtensions"]


def test_a_message_of_no_bytes_and_one_outside_of_any_call_are_not_noted() -> None:
    """OpenSSL calls back in the middle of a call, and in a moment's time none is under way."""
    _on_message(1, 0, 22, b"x", 1)
    _calling.connection = None
    _on_message(0, 0, 22, b"", 0)


def test_nothing_is_noted_after_a_trace() -> None:
    with bridge.trace() as seen:
        pass
    seen.note("call", "SSL_read")
    assert seen.events == ()


def test_outside_of_a_trace_everything_is_as_it_was(server_cert: KeyPair, ca_file: str) -> None:
    def methods() -> list[object]:
        return [vars(owner)[name] for owner, name, _ in tracing._substitutes()]

    before = methods()
    with pytest.raises(KeyError), bridge.trace() as seen:
        assert all(new is not old for new, old in zip(methods(), before, strict=True))
        raise KeyError
    assert all(new is old for new, old in zip(methods(), before, strict=True))
    exchange(server_cert, ca_file, "TLSv1.3")
    assert seen.events == ()


def test_there_is_one_trace_at_a_time() -> None:
    with bridge.trace(), pytest.raises(bridge.ConfigurationError, match="one at a time"), bridge.trace():
        pass
    with pytest.raises(bridge.ConfigurationError, match="limit"), bridge.trace(limit=0):
        pass
    with bridge.trace():
        pass


def test_a_limit_beyond_all_memory_is_none() -> None:
    for _ in range(2):
        with bridge.trace(limit=10**30) as seen:
            assert seen.events == ()


def test_a_wait_that_is_over_says_so(server_cert: KeyPair, ca_file: str) -> None:
    server = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.trace() as seen, bridge.Bridge(workers=1) as b:
        listener = b.listen(("127.0.0.1", 0), server)
        client = bridge.client_context(ca_file)
        with b.connect(listener.address, client, server_hostname="localhost") as session:
            with pytest.raises(bridge.ReceiveTimeout):
                session.recv(timeout=0.3)
            begun = len(seen.events)
            session.abort()
    sleeps = [e.outcome for e in seen.events[:begun] if e.kind == "sleep" and e.lane == "application"]
    assert sleeps[-1] == "a deadline"
