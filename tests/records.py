"""TLS records by hand: what OpenSSL would never send can be sealed here, and what it sends be opened.

OpenSSL makes the handshake, and its key log tells the secrets.  The rest is AES-GCM as of TLS 1.2 (RFC 5246, 6.3 and
RFC 5288) and of TLS 1.3 (RFC 8446, 5.2 and 7).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Protocol

from conftest import KeyPair
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL
from rig import raw_context

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
HELLO_REQUEST, CLIENT_HELLO, NEW_SESSION_TICKET, FINISHED, KEY_UPDATE = 0, 1, 4, 20, 24
WARNING, FATAL = 1, 2
CLOSE_NOTIFY = 0
RECORD_BYTES = 1 << 14


def record(kind: int, data: bytes, size: int | None = None, version: int = 0x0303) -> bytes:
    """A record as it is on the wire.  *size*: what its header says, if not the truth."""
    said = len(data) if size is None else size
    return bytes([kind]) + version.to_bytes(2, "big") + said.to_bytes(2, "big") + data


def records(wire: bytes) -> Iterator[bytes]:
    """The whole records that *wire* is made of."""
    while wire:
        size = 5 + int.from_bytes(wire[3:5], "big")
        yield wire[:size]
        wire = wire[size:]


def message(kind: int, body: bytes = b"", size: int | None = None) -> bytes:
    """A message of the handshake protocol.  *size* as of `record`."""
    said = len(body) if size is None else size
    return bytes([kind]) + said.to_bytes(3, "big") + body


class Keys(Protocol):
    """What one side seals its records with."""

    def seal(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        """The next record."""

    def open(self, wire: bytes) -> tuple[int, bytes]:
        """What is in the next record: its type, and its plaintext.  InvalidTag if it is not genuine."""


class Keys13:
    """Of TLS 1.3: one traffic secret, until `successor`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._hash = hashes.SHA256() if len(secret) == 32 else hashes.SHA384()
        self._gcm = AESGCM(self._expand(b"key", 16 if len(secret) == 32 else 32))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self._sequence = 0

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _nonce(self) -> bytes:
        self._sequence += 1
        return (self._iv ^ (self._sequence - 1)).to_bytes(12, "big")

    def successor(self) -> Keys13:
        """The keys after a KeyUpdate."""
        return Keys13(self._expand(b"traffic upd", len(self._secret)))

    def seal(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        inner = data + bytes([kind]) + bytes(padding)
        header = record(APPLICATION_DATA, b"", len(inner) + 16)
        return header + self._gcm.encrypt(self._nonce(), inner, header)

    def open(self, wire: bytes) -> tuple[int, bytes]:
        inner = self._gcm.decrypt(self._nonce(), wire[5:], wire[:5]).rstrip(b"\0")
        return inner[-1], inner[:-1]


class Keys12:
    """Of TLS 1.2, after the Finished, which had the number 0."""

    def __init__(self, key: bytes, salt: bytes) -> None:
        self._gcm, self._salt = AESGCM(key), salt
        self._sequence = 0

    def _about(self, kind: int, size: int) -> bytes:
        self._sequence += 1
        return self._sequence.to_bytes(8, "big") + record(kind, b"", size)

    def seal(self, kind: int, data: bytes, padding: int = 0) -> bytes:
        assert not padding, "TLS 1.2 has none"
        about = self._about(kind, len(data))
        return record(kind, about[:8] + self._gcm.encrypt(self._salt + about[:8], data, about))

    def open(self, wire: bytes) -> tuple[int, bytes]:
        about = self._about(wire[0], len(wire) - 5 - 8 - 16)
        return wire[0], self._gcm.decrypt(self._salt + wire[5:13], wire[13:], about)


class Secrets:
    """Those of one connection, as its *context* logs them (RFC 9850)."""

    def __init__(self, context: SSL.Context) -> None:
        self._found: dict[str, bytes] = {}
        context.set_keylog_callback(self._note)

    def _note(self, _: SSL.Connection, line: bytes) -> None:
        label, _random, secret = line.decode().split()
        self._found[label] = bytes.fromhex(secret)

    def keys(self, connection: SSL.Connection) -> tuple[Keys, Keys]:
        """What the client and the server seal with from the end of the handshake on."""
        if connection.get_protocol_version_name() == "TLSv1.3":
            client, server = (self._found[f"{side}_TRAFFIC_SECRET_0"] for side in ("CLIENT", "SERVER"))
            return Keys13(client), Keys13(server)
        seed = b"key expansion" + connection.server_random() + connection.client_random()
        block = _prf(self._found["CLIENT_RANDOM"], seed, 40)
        return Keys12(block[:16], block[32:36]), Keys12(block[16:32], block[36:])

    def handshake_keys(self, side: str) -> Keys:
        """What *side*, "CLIENT" or "SERVER", seals the rest of its handshake with in TLS 1.3."""
        return Keys13(self._found[f"{side}_HANDSHAKE_TRAFFIC_SECRET"])


def talkative(version: str, identity: KeyPair | None) -> tuple[SSL.Context, Secrets]:
    """A context of a server with *identity* or of a client, whose secrets are told and fit `Secrets.keys`."""
    context = raw_context(version, identity)
    if version == "TLSv1.2":
        context.set_cipher_list(b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256")
    return context, Secrets(context)


def _prf(secret: bytes, seed: bytes, size: int) -> bytes:
    """P_SHA256 (RFC 5246, 5); *seed* with its label."""
    out, chain = b"", seed
    while len(out) < size:
        chain = hmac.digest(secret, chain, "sha256")
        out += hmac.digest(secret, chain + seed, "sha256")
    return out[:size]
