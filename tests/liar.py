"""A peer that shakes hands honestly and then says whatever it is told to, record by record.

OpenSSL makes the handshake, over memory; each flight of it passes through `Liar.mangle` on its way out.  What
follows is sealed and opened here, with the secrets of that handshake and without any regard for the rules of TLS:
AES-GCM as of TLS 1.2 (RFC 5246, 6.3 and RFC 5288) and of TLS 1.3 (RFC 8446, 5.2 and 7).
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

from conftest import KeyPair
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL
from peers import PATIENCE, receive_exactly
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


def prf(secret: bytes, seed: bytes, size: int) -> bytes:
    """P_SHA256 (RFC 5246, 5)."""
    out, chain = b"", seed
    while len(out) < size:
        chain = hmac.digest(secret, chain, "sha256")
        out += hmac.digest(secret, chain + seed, "sha256")
    return out[:size]


class Liar:
    """One end of a connection: a server with *identity*, else a client."""

    def __init__(self, sock: socket.socket, version: str, identity: KeyPair | None = None) -> None:
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.version, self.server = sock, version, identity is not None
        self.modern = version == "TLSv1.3"
        self.said = b""
        """All the application data it has sent."""
        self.heard = bytearray()
        """All it has received."""
        self.flights = 0
        """How many it has sent in its handshake."""
        self.mangle: Callable[[bytes], bytes] = lambda flight: flight
        """What becomes of each."""
        self._secrets: dict[str, bytes] = {}
        context = raw_context(version, identity)
        if not self.modern:
            context.set_cipher_list(b"ECDHE-ECDSA-AES128-GCM-SHA256")
        context.set_keylog_callback(self._note)
        self._connection = SSL.Connection(context, None)
        if self.server:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()

    def _note(self, _: SSL.Connection, line: bytes) -> None:
        label, _random, secret = line.decode().split()
        self._secrets[label] = bytes.fromhex(secret)

    def handshake(self) -> None:
        """All of it; a server of TLS 1.3 sends no tickets."""
        while not self._shake():
            self._connection.bio_write(self.next_record())
        ours, theirs = self._keys()
        self.write, self.read = (theirs, ours) if self.server else (ours, theirs)

    def _shake(self) -> bool:
        try:
            self._connection.do_handshake()
            done = True
        except SSL.WantReadError:
            done = False
        try:
            flight = self._connection.bio_read(1 << 16)
        except SSL.WantReadError:
            return done
        if not (done and self.server and self.modern):
            self.sock.sendall(self.mangle(flight))
            self.flights += 1
        return done

    def _keys(self) -> tuple[Keys, Keys]:
        """The client's and the server's."""
        if self.modern:
            client, server = (self._secrets[f"{who}_TRAFFIC_SECRET_0"] for who in ("CLIENT", "SERVER"))
            return Keys13(client), Keys13(server)
        connection = self._connection
        seed = b"key expansion" + connection.server_random() + connection.client_random()
        block = prf(connection.master_key(), seed, 40)
        return Keys12(block[:16], block[32:36]), Keys12(block[16:32], block[36:])

    def handshake_keys(self) -> Keys:
        """What its flight is sealed with, in TLS 1.3, from the first sealed record on."""
        return Keys13(self._secrets[f"{'SERVER' if self.server else 'CLIENT'}_HANDSHAKE_TRAFFIC_SECRET"])

    # What it says.

    def send(self, kind: int, data: bytes, padding: int = 0) -> None:
        """One record, sealed.  A KeyUpdate in it, whole or the end of one, is to be followed by `update`."""
        self.sock.sendall(self.write.seal(kind, data, padding))

    def say(self, *pieces: bytes) -> None:
        """Application data, a record for each piece."""
        self.sock.sendall(b"".join(self.write.seal(APPLICATION_DATA, piece) for piece in pieces))
        self.said += b"".join(pieces)

    def alert(self, level: int, description: int) -> None:
        """One alert."""
        self.send(ALERT, bytes([level, description]))

    def update(self) -> None:
        """From now on seal with the next keys."""
        assert isinstance(self.write, Keys13)
        self.write = self.write.successor()

    # What it hears.

    def next_record(self) -> bytes:
        """As it is on the wire; EOFError at the end."""
        header = receive_exactly(self.sock, 5)
        size = int.from_bytes(header[3:5], "big")
        body = receive_exactly(self.sock, size)
        if len(header) < 5 or len(body) < size:
            raise EOFError("the connection was closed")
        return header + body

    def hear(self) -> tuple[int, bytes]:
        """The type and plaintext of the next record, new keys of the other side taken note of."""
        kind, data = self.read.open(self.next_record())
        if kind == HANDSHAKE and data[0] == KEY_UPDATE:
            assert isinstance(self.read, Keys13)
            self.read = self.read.successor()
        elif kind == APPLICATION_DATA:
            self.heard += data
        return kind, data

    def hear_echo(self) -> None:
        """Until all it has said has come back; whatever else comes meanwhile is not looked at."""
        while len(self.heard) < len(self.said):
            kind, data = self.hear()
            assert kind != ALERT, f"the alert {data.hex()}"
        assert self.heard == self.said
