"""A peer for lockstep that can say anything: an honest handshake by pyOpenSSL, and after it records made by hand."""

from __future__ import annotations

import socket

from conftest import KeyPair
from records import APPLICATION_DATA, HANDSHAKE, Keys13, message, talkative
from rig import Raw

USER_CANCELED, NO_RENEGOTIATION = 90, 100
HELLO_REQUEST = message(0)
KEY_UPDATE, KEY_UPDATE_REQUESTED = message(24, b"\0"), message(24, b"\1")
TICKET = message(4, bytes(4) + bytes(4) + b"\1n" + b"\0\1t" + bytes(2))
"""NewSessionTicket (RFC 8446, 4.6.1): of no life time, its nonce "n", itself "t", without extensions."""


class Forger:
    """One end of a connection over *sock*: a client, or a server with *identity*.  Its handshake is honest.

    After that `seal` makes records; what is received is not looked at.
    """

    def __init__(self, version: str, sock: socket.socket, identity: KeyPair | None = None) -> None:
        context, self._secrets = talkative(version, identity)
        self.server = identity is not None
        self.raw = Raw(context, sock, self.server)

    def handshake(self) -> object:
        """As `rig.Raw`'s, to be called by `rig.shake`."""
        return self.raw.handshake()

    def take_over(self) -> None:
        """The handshake is done, and its last records are sent: from now on we write."""
        self._keys = self._secrets.keys(self.raw.connection)[self.server]
        if self.server and isinstance(self._keys, Keys13):
            for _ in range(2):  # as OpenSSL has done for its tickets
                self._keys.seal(APPLICATION_DATA, b"")

    def seal(self, kind: int, fragment: bytes) -> bytes:
        """The next record that we send; after a KeyUpdate with new keys."""
        sealed = self._keys.seal(kind, fragment)
        updated = kind == HANDSHAKE and fragment.endswith((KEY_UPDATE, KEY_UPDATE_REQUESTED))
        if updated and isinstance(self._keys, Keys13):
            self._keys = self._keys.successor()
        return sealed
