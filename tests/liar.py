"""A peer that shakes hands honestly and then says whatever it is told to, record by record.

OpenSSL makes the handshake, over memory; each flight of it passes through `Liar.mangle` on its way out.  What
follows is sealed here, without any regard for the rules of TLS.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from conftest import KeyPair
from OpenSSL import SSL
from peers import PATIENCE, receive_exactly
from records import ALERT, APPLICATION_DATA, HANDSHAKE, KEY_UPDATE, Keys, Keys13, talkative


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
        context, self._secrets = talkative(version, identity)
        self._connection = SSL.Connection(context, None)
        if self.server:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()

    def handshake(self) -> None:
        """All of it; a server of TLS 1.3 sends no tickets."""
        while not self._shake():
            self._connection.bio_write(self.next_record())
        client, server = self._secrets.keys(self._connection)
        self.write, self.read = (server, client) if self.server else (client, server)

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

    def handshake_keys(self) -> Keys:
        """What its flight is sealed with, in TLS 1.3, from the first sealed record on."""
        return self._secrets.handshake_keys("SERVER" if self.server else "CLIENT")

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
