"""The promises of docs/explanation/security.md that no other test shows, and that every test it names exists."""

from __future__ import annotations

import logging
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import KeyPair
from peers import PATIENCE
from rig import Lockstep, is_closed, is_open, only
from structlog.testing import capture_logs

import bridge

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "security.md"
WEAK = re.compile(r"NULL|RC4|DES|EXP|ADH|AECDH|MD5|SEED|IDEA")
"""OpenSSL's own list also names PSK and SRP, which no context of ours can be given the keys for."""
SECRET = b"correct horse battery staple"


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """What is logged during the test; structlog is as before afterwards."""
    with capture_logs() as entries:
        yield entries
    structlog.reset_defaults()


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    there = {
        name
        for path in Path(__file__).parent.rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20 and named <= there, named - there


def test_no_weak_cipher_is_offered_or_accepted_by_default(server_cert: KeyPair, ca_file: str) -> None:
    for context in (
        bridge.server_context(server_cert.certfile, server_cert.keyfile),
        bridge.client_context(ca_file),
    ):
        name = None if context.server_side else "localhost"
        offered = context.connection(None, name, None).get_cipher_list()
        assert offered and not [cipher for cipher in offered if WEAK.search(cipher)]


def test_verification_and_modern_versions_are_the_default(server_cert: KeyPair, ca_file: str) -> None:
    client = bridge.client_context(ca_file)
    server = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    assert client.verifies_peer and client.check_hostname and not server.renegotiation
    with bridge.Bridge(workers=1) as ours, ours.listen(("127.0.0.1", 0), server) as listener:
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
            old.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.warns(DeprecationWarning, match="TLSVersion"):
                old.minimum_version = old.maximum_version = version
            with ssl.SSLContext.wrap_socket(  # it is the handshake that fails
                old, _dial(listener.address), do_handshake_on_connect=False
            ) as sock:
                sock.settimeout(PATIENCE)
                with pytest.raises(OSError):
                    sock.do_handshake()


def _dial(address: Any) -> Any:
    return socket.create_connection(address[:2], PATIENCE)


@pytest.mark.parametrize("failing", [False, True])
def test_neither_payload_nor_key_log_is_in_any_log_repr_or_error(
    tls_version: str,
    failing: bool,
    server_cert: KeyPair,
    ca_file: str,
    logs: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    lines: list[bytes] = []
    server = bridge.server_context(
        server_cert.certfile, server_cert.keyfile, keylog=lines.append, **only(tls_version)
    )
    client = bridge.client_context(ca_file, keylog=lines.append, **only(tls_version))
    with Lockstep() as lockstep:
        near, far = lockstep.large_pair()
        a = lockstep.session(client, near)
        b = lockstep.session(server, far, codec=lambda: bridge.codecs.LengthPrefixed(4))
        lockstep.until(lambda: is_open(a) and is_open(b))
        said = len(SECRET).to_bytes(4, "big") + SECRET
        a.send(SECRET if failing else said)  # as a length, the former is an error
        lockstep.settle()
        shown = [repr(thing) for thing in (a, b, a.info, client, server, lockstep.bridges)]
        shown += [repr(one.snapshot()) for one in lockstep.bridges]
        b._channel.transport.stalled(100, "worker")
        lockstep.until(lambda: is_closed(b))
        shown += [repr(b.end), str(b.end), repr(logs), caplog.text]
        secrets = [line.split()[-1].decode() for line in lines]
        assert len(secrets) >= 2 and "session.stalled" in repr(logs)
        for secret in [SECRET.decode(), SECRET.hex(), *secrets]:
            assert not [text for text in shown if secret in text]
