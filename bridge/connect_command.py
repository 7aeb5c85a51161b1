"""The command `tls-bridge connect`: who is there, in words, and then a pipe to it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

import bridge
from bridge.arguments import add_peer, alpn, open_session, show_address, silence
from bridge.explain import explain
from bridge.starttls import Refused

PIECE_BYTES = 16 * 1024
QUIET_SECONDS = 2.0
"""How long a server may still say that it is not content with us, when only asked who it is."""

STATUSES = (
    "exit status: 0 connected, and ended cleanly; 1 ended badly after the handshake; 2 unusable arguments or"
    " files, or stdin or stdout failed; 3 no TCP connection; 4 the peer refused STARTTLS; 5 its certificate was"
    " refused; 6 the handshake failed otherwise, or the peer refused us; 130 interrupted; 141 nobody reads stdout"
    " any more"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.description = (
        "Connect to a TLS server, verify it, say on stderr who it is, then send stdin to it and what it sends"
        " to stdout. At the end of stdin the sending half is closed, and the rest of the answer awaited. If it"
        " fails, says why, and what to do."
    )
    parser.epilog = STATUSES
    add_peer(parser)
    parser.add_argument("--info", action="store_true", help="only say who it is, on stdout, and close")
    parser.add_argument("--json", action="store_true", help="as --info, as one JSON object, errors too")
    parser.add_argument(
        "--linger",
        type=silence,
        default=10.0,
        metavar="S",
        help="seconds of silence after the end of stdin until it closes (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit status.  ConfigurationError for unusable arguments, OSError of the standard streams."""
    where, settled = show_address(arguments.address), False
    try:
        with bridge.Bridge(workers=1) as b, open_session(b, arguments) as session:
            settled = True
            return _talk(session, arguments, where)
    except bridge.ConfigurationError as error:
        if not arguments.json:
            raise
        status, sentence = 2, str(error)
    except (bridge.BridgeError, OSError, Refused) as error:
        if settled and not isinstance(error, bridge.BridgeError):
            raise
        status, sentence = explain(error, where, settled)
    failure = {"ok": False, "address": where, "status": status, "error": sentence}
    if arguments.json:
        print(json.dumps(failure, indent=2))
    else:
        print(f"tls-bridge connect: {printable(sentence)}", file=sys.stderr)
    return status


def _talk(session: bridge.Session, arguments: argparse.Namespace, where: str) -> int:
    facts = describe(session.info, verified=not arguments.insecure)
    facts["alpn_offered"] = alpn(arguments)
    if arguments.info or arguments.json:
        _part(session)
        _print(arguments, {"ok": True, "address": where, **facts})
        return 0
    print(in_words(where, facts), file=sys.stderr, flush=True)
    return _converse(session, arguments.linger)


def _part(session: bridge.Session) -> None:
    """Close, and hear it if the peer has something against us: with TLS 1.3 it says so after the handshake."""
    session.send_eof()
    try:
        session.recv(timeout=QUIET_SECONDS)
    except (bridge.EndOfStream, bridge.ReceiveTimeout, bridge.Truncated, bridge.PeerReset):
        pass
    session.close(QUIET_SECONDS)


def _print(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2) if arguments.json else in_words(facts["address"], facts))


# The conversation.


def _converse(session: bridge.Session, linger: float) -> int:
    failures: list[OSError] = []
    speaker = threading.Thread(target=_speak, args=(session, failures), name="stdin", daemon=True)
    speaker.start()
    silence = 0.0
    while True:
        try:
            data = session.recv(timeout=0.5)
        except bridge.ReceiveTimeout:
            data = b""
        except bridge.EndOfStream:
            break
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        quiet = not (data or speaker.is_alive()) and session.outbox.empty()
        if failures:
            raise failures[0]
        silence = silence + 0.5 if quiet else 0.0
        if quiet and silence >= linger:
            break
    session.close()
    return 0


def _speak(session: bridge.Session, failures: list[OSError]) -> None:
    try:
        # Not sys.stdin: a thread that waits there may not be left behind.
        while data := os.read(0, PIECE_BYTES):
            session.send(data)
        session.send_eof()
    except bridge.SessionEnded:
        pass  # who receives finds out why
    except OSError as error:
        failures.append(OSError(error.errno, f"cannot read stdin: {error.strerror}"))


# Who it is.


def describe(info: bridge.SessionInfo, verified: bool) -> dict[str, Any]:
    """What the handshake settled, as JSON can hold it."""
    chain = info.verified_chain or info.presented_chain
    return {
        "peer": show_address(info.peername) if isinstance(info.peername, tuple) else str(info.peername),
        "verified": verified,
        "server_name": info.server_name,
        "version": info.version,
        "cipher": info.cipher,
        "cipher_bits": info.cipher_bits,
        "alpn": info.alpn,
        "resumed": info.resumed,
        "chain": [_certificate(certificate) for certificate in chain],
    }


def _certificate(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "subject": _distinguished(certificate, "subject"),
        "issuer": _distinguished(certificate, "issuer"),
        "names": list(_names(certificate)),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _distinguished(certificate: x509.Certificate, whose: str) -> str:
    try:
        name: x509.Name = getattr(certificate, whose)
        return name.rfc4514_string()
    except ValueError:
        return "(a name that cannot be read)"


def _names(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (
        x509.ExtensionNotFound,
        x509.UnsupportedGeneralNameType,
        x509.DuplicateExtension,
        ValueError,
    ):
        return
    for name in names:
        if isinstance(name, x509.DNSName | x509.IPAddress | x509.RFC822Name | x509.UniformResourceIdentifier):
            yield str(name.value)


def in_words(where: str, facts: dict[str, Any]) -> str:
    """*facts*, for a person."""
    trust = f"verified as {facts['server_name']}" if facts["verified"] else "NOT VERIFIED (--insecure)"
    lines = [
        f"connected to {where} ({facts['peer']}), {trust}",
        f"  {facts['version']}, {facts['cipher']} ({facts['cipher_bits']} bits),"
        f" ALPN {facts['alpn'] or _no_alpn(facts)}, {'resumed' if facts['resumed'] else 'not resumed'}",
    ]
    for depth, certificate in enumerate(facts["chain"]):
        until = datetime.datetime.fromisoformat(certificate["not_after"])
        days = (until - datetime.datetime.now(datetime.timezone.utc)).days
        lines.append(f"  {depth}: {certificate['subject'] or '(no subject)'}")
        if certificate["names"]:
            lines.append(f"     for {', '.join(certificate['names'])}")
        lines.append(f"     issued by {certificate['issuer'] or '(no name)'}")
        lines.append(f"     valid {certificate['not_before'][:10]} to {until:%Y-%m-%d} ({_left(days)})")
    return "\n".join(printable(line) for line in lines)


def _no_alpn(facts: dict[str, Any]) -> str:
    offered = ", ".join(facts["alpn_offered"])
    return f"none (offered: {offered})" if offered else "none"


def _left(days: int) -> str:
    return f"{days} days left" if days >= 0 else f"expired {-days} days ago"


def printable(text: str) -> str:
    """*text*, without what could move a terminal's cursor: much of it is the peer's."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
