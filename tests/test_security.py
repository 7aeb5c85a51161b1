"""The promises of docs/explanation/security.md that no other test shows, and that every test it names exists."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from peers import PATIENCE, Background
from rig import Lockstep, is_closed, is_open, only

import bridge

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "security.md"
WEAK = re.compile(r"NULL|RC4|DES|EXP|ADH|AECDH|MD5|SEED|IDEA")
"""OpenSSL's own list also names PSK and SRP, which no context of ours can be given the keys for."""
SECRET = b"correct horse battery staple"


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
        fleeting = ("TLS_", "ECDHE-", "DHE-")  # keys: what was recorded stays closed when a key is stolen
        assert not [cipher for cipher in offered if not cipher.startswith(fleeting)]
        if context.server_side:
            assert not [cipher for cipher in offered if not re.search("GCM|CHACHA20", cipher)]


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


# ── what scanners say ──

SELF_MADE = {"certificate_path_validation", "maximum_certificate_lifespan"}
"""What Mozilla's profile has against certificates made for a test."""
OF_THE_TEST = {"cert_validityPeriod", "cert_revocation"}
"""What testssl.sh has against them."""
OF_THE_SCANNER = {"engine_problem", "sessionresumption_ticket"}
"""What it has against its own openssl(1): no engines, and it leaves before a ticket has come, as often as not."""
STRONGER = "{'X448', 'secp521r1'}"
"""What it has against OpenSSL's curves: these two are more than it asks for, and pyOpenSSL has no way to drop them."""


@pytest.fixture(params=["RSA", "ECDSA"])
def default_server(request: pytest.FixtureRequest, ca: trustme.CA, tmp_path: Path) -> Iterator[int]:
    """The port of an echo server with nothing but a certificate given, its key of each kind in turn."""
    issued = ca.issue_cert("localhost", key_type=trustme.KeyType[request.param])
    pair = write_key_pair(issued, tmp_path)
    with bridge.Bridge(workers=1) as b, Background() as background:
        inbox = bridge.Inbox()
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(pair.certfile, pair.keyfile), inbox=inbox)

        def echo() -> None:
            with contextlib.suppress(bridge.ShutDown):
                while True:
                    session, message = inbox.get()
                    if message is not None:
                        with contextlib.suppress(bridge.SessionEnded):
                            session.send(message, timeout=PATIENCE)

        background.run(echo)
        yield listener.address[1]
        b.close(PATIENCE)


def scan(program: str, *arguments: str) -> str:
    """What the scanner *program* prints."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: tox -e scanners")
    said = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=900, check=False)
    return said.stdout + said.stderr


def test_sslyze_has_nothing_to_complain_about(default_server: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    said = scan(
        "sslyze",
        *("--mozilla_config", "intermediate", "--early_data", "--resum", "--json_out", str(report)),
        f"localhost:{default_server}",
    )
    complaints = dict(re.findall(r"^ +\* (\w+): (.*)$", said.partition("COMPLIANCE")[2], re.MULTILINE))
    curves = complaints.pop("tls_curves", STRONGER)
    assert set(complaints) <= SELF_MADE, said
    assert set(re.findall(r"'(\w+)'", curves)) == set(re.findall(r"'(\w+)'", STRONGER)), said
    (server,) = json.loads(report.read_text(encoding="utf-8"))["server_scan_results"]
    found = {name: one["result"] for name, one in server["scan_result"].items() if one["result"]}
    spoken = {name for name, one in found.items() if one.get("is_tls_version_supported")}
    assert spoken == {"tls_1_2_cipher_suites", "tls_1_3_cipher_suites"}
    accepted = [
        one["cipher_suite"]["name"] for name in spoken for one in found[name]["accepted_cipher_suites"]
    ]
    assert len(accepted) == 6 and not [name for name in accepted if "CBC" in name or "TLS_RSA" in name]
    assert not found["tls_compression"]["supports_compression"]
    assert not found["tls_1_3_early_data"]["supports_early_data"]
    assert not found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"]
    assert not found["heartbleed"]["is_vulnerable_to_heartbleed"]
    assert found["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert found["session_renegotiation"]["supports_secure_renegotiation"]
    assert not found["session_renegotiation"]["client_renegotiations_success_count"]
    assert found["tls_extended_master_secret"]["supports_ems_extension"]
    assert found["session_resumption"]["tls_ticket_resumption_result"] == "FULLY_SUPPORTED"


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_testssl_has_nothing_to_complain_about(default_server: int, ca_file: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--warnings", "off", "--quiet", "--color", "0", "-n", "none", "--ip", "127.0.0.1"]
    options += ["--add-ca", ca_file, "--jsonfile", str(report)]
    said = scan("testssl", *options, *("-p", "-s", "-f", "-P", "-S", "-U"), f"localhost:{default_server}")
    findings = json.loads(report.read_text(encoding="utf-8"))
    complaints = {one["id"] for one in findings if one["severity"] not in ("OK", "INFO", "DEBUG")}
    assert complaints <= OF_THE_TEST | OF_THE_SCANNER, said
    assert {"protocol_negotiated", "cert_trust", "LUCKY13", "ROBOT", "secure_client_renego"} <= {
        one["id"] for one in findings
    }, said
