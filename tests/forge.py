"""A peer that can say anything: an honest handshake by pyOpenSSL, and after it records made by hand.

OpenSSL sends nothing that it should not.  So its secrets are taken from it (the key log, RFC 9850), and what a test
wants to be said is encrypted here, for AES-128-GCM with SHA-256, as RFC 5246 and RFC 8446 have it.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from typing import Any

from conftest import KeyPair
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL
from rig import Raw, raw_context

_lib: Any = vars(SSL)["_lib"]  # for what the oldest pyOpenSSL does not have

ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
WARNING, USER_CANCELED, NO_RENEGOTIATION = 1, 90, 100
CIPHERS = {"TLSv1.2": b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256", "TLSv1.3": b"DEFAULT"}


def record(kind: int, fragment: bytes) -> bytes:
    """A record as it goes over the wire."""
    return bytes([kind, 3, 3]) + len(fragment).to_bytes(2, "big") + fragment


def message(kind: int, body: bytes = b"") -> bytes:
    """A handshake message."""
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


HELLO_REQUEST = message(0)
KEY_UPDATE, KEY_UPDATE_REQUESTED = message(24, b"\0"), message(24, b"\1")
TICKET = message(4, bytes(4) + bytes(4) + b"\1n" + b"\0\1t" + bytes(2))
"""NewSessionTicket (RFC 8446, 4.6.1): of no life time, its nonce "n", itself "t", without extensions."""


class Forger:
    """One end of a connection over *sock*: a client, or a server with *identity*.  Its handshake is honest.

    After that `seal` makes records; what is received is not looked at.
    """

    def __init__(self, version: str, sock: socket.socket, identity: KeyPair | None = None) -> None:
        self.version = version
        self._side = b"CLIENT" if identity is None else b"SERVER"
        self._secrets: dict[bytes, bytes] = {}
        context = raw_context(version, identity)
        context.set_cipher_list(CIPHERS[version])
        _lib.SSL_CTX_set_ciphersuites(vars(context)["_context"], b"TLS_AES_128_GCM_SHA256")
        context.set_keylog_callback(self._note)
        self.raw = Raw(context, sock, server_side=identity is not None)
        self._sequence = 0

    def _note(self, _: SSL.Connection, line: bytes) -> None:
        label, _, secret = line.split()
        self._secrets[label] = bytes.fromhex(secret.decode())

    def handshake(self) -> object:
        """As `rig.Raw`'s, to be called by `rig.shake`."""
        return self.raw.handshake()

    def take_over(self) -> None:
        """The handshake is done, and its last records are sent: from now on we write."""
        connection = self.raw.connection
        if self.version == "TLSv1.3":
            assert connection.get_cipher_name() == "TLS_AES_128_GCM_SHA256"
            self._use(self._secrets[self._side + b"_TRAFFIC_SECRET_0"])
            self._sequence = 0 if self._side == b"CLIENT" else 2  # the tickets of OpenSSL
            return
        block = _prf(
            self._secrets[b"CLIENT_RANDOM"],
            b"key expansion" + connection.server_random() + connection.client_random(),
            2 * (16 + 4),
        )
        server = self._side == b"SERVER"
        self._aead, self._iv = AESGCM(block[16:32] if server else block[:16]), block[32 + 4 * server :][:4]
        self._sequence = 1  # after Finished

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._aead, self._iv = AESGCM(_expand(secret, b"key", 16)), _expand(secret, b"iv", 12)
        self._sequence = 0

    def seal(self, kind: int, fragment: bytes) -> bytes:
        """The next record that we send."""
        number = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        if self.version == "TLSv1.2":
            header = number + bytes([kind, 3, 3]) + len(fragment).to_bytes(2, "big")
            return record(kind, number + self._aead.encrypt(self._iv + number, fragment, header))
        nonce = bytes(a ^ b for a, b in zip(self._iv, bytes(4) + number, strict=True))
        header = record(APPLICATION_DATA, bytes(len(fragment) + 17))[:5]
        sealed = header + self._aead.encrypt(nonce, fragment + bytes([kind]), header)
        if kind == HANDSHAKE and fragment.endswith((KEY_UPDATE, KEY_UPDATE_REQUESTED)):
            self._use(_expand(self._secret, b"traffic upd", 32))
        return sealed


def _prf(secret: bytes, seed: bytes, size: int) -> bytes:
    """RFC 5246, 5; *seed* with its label."""
    out, part = b"", seed
    while len(out) < size:
        part = hmac.digest(secret, part, "sha256")
        out += hmac.digest(secret, part + seed, "sha256")
    return out[:size]


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446, 7.1), at most one block of it."""
    label = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    return hmac.digest(secret, info + b"\1", hashlib.sha256().name)[:size]
