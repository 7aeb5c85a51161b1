"""Our two faces behind one set of calls: sessions of a Bridge (`Core`), and the drop-in's sockets (`DropIn`)."""

from __future__ import annotations

import socket
import ssl as stdlib_ssl
from typing import Any, Protocol

from conftest import KeyPair
from rig import PATIENCE, VERSIONS, only

import bridge

CUTS = (bridge.Truncated, bridge.PeerReset, bridge.TLSError, bridge.DeadlineExceeded)
"""How a session ends that the peer, or the network, has harmed.  Their standard parents are the drop-in's."""


class Face(Protocol):
    """One of them.  Every call but `close` may raise one of `cuts`, and nothing else unless there is a bug."""

    cuts: tuple[type[BaseException], ...]

    def begin(self, sock: socket.socket, role: str, version: str, patience: float) -> Any:
        """Shake hands over *sock* as a "client" or "server": the handle that the other calls take.

        No call takes longer than *patience* seconds.
        """

    def send(self, handle: Any, data: bytes) -> None:
        """All of *data*."""

    def recv(self, handle: Any) -> bytes:
        """What has come; ``b""`` at the clean end, and at no other."""

    def renegotiate(self, handle: Any) -> None:
        """Ask for a new handshake, as a server of TLS 1.2, if the face can."""

    def send_eof(self, handle: Any) -> None:
        """Half close."""

    def end(self, handle: Any) -> None:
        """Close, however it stands."""

    def close(self) -> None:
        """The face is not needed any more."""


class Core:
    """Sessions."""

    cuts: tuple[type[BaseException], ...] = CUTS

    def __init__(self, identity: KeyPair, ca_file: str) -> None:
        self.bridge = bridge.Bridge(workers=2)
        self.contexts = {
            ("client", version): bridge.client_context(ca_file, **only(version)) for version in VERSIONS
        }
        for version in VERSIONS:
            self.contexts["server", version] = bridge.server_context(
                identity.certfile, identity.keyfile, renegotiation=version == "TLSv1.2", **only(version)
            )

    def begin(self, sock: socket.socket, role: str, version: str, patience: float) -> bridge.Session:
        return self.bridge.adopt(
            sock,
            self.contexts[role, version],
            server_hostname="localhost" if role == "client" else None,
            timeouts=bridge.Timeouts(handshake=patience, idle=patience, write_stall=patience, close_notify=1),
        )

    def send(self, handle: bridge.Session, data: bytes) -> None:
        handle.send(data, PATIENCE)

    def recv(self, handle: bridge.Session) -> bytes:
        try:
            data: bytes = handle.recv(PATIENCE)
        except bridge.EndOfStream:
            return b""
        return data

    def renegotiate(self, handle: bridge.Session) -> None:
        handle.renegotiate()

    def send_eof(self, handle: bridge.Session) -> None:
        handle.send_eof()

    def end(self, handle: bridge.Session) -> None:
        cause = handle.end
        report = handle.close()
        if isinstance(cause, bridge.EndOfStream):
            assert report and report.close_notify_sent and report.close_notify_received
        assert cause is None or type(handle.end) is type(cause), "the first cause stays"

    def close(self) -> None:
        with self.bridge:
            assert not self.bridge.snapshot().sessions


class DropIn:
    """Sockets of `bridge.ssl`, which raise what the stdlib's do."""

    cuts: tuple[type[BaseException], ...] = (stdlib_ssl.SSLError, ConnectionError, TimeoutError)

    def __init__(self, identity: KeyPair, ca_file: str) -> None:
        from bridge import ssl

        self.contexts = {}
        for version in VERSIONS:
            client = ssl.SSLContext(stdlib_ssl.PROTOCOL_TLS_CLIENT)
            client.load_verify_locations(ca_file)
            server = ssl.SSLContext(stdlib_ssl.PROTOCOL_TLS_SERVER)
            server.load_cert_chain(identity.certfile, identity.keyfile)
            for role, context in (("client", client), ("server", server)):
                context.minimum_version = context.maximum_version = stdlib_ssl.TLSVersion[
                    version.replace(".", "_")
                ]
                self.contexts[role, version] = context

    def begin(self, sock: socket.socket, role: str, version: str, patience: float) -> Any:
        sock.settimeout(patience)
        try:
            return self.contexts[role, version].wrap_socket(
                sock,
                server_side=role == "server",
                server_hostname="localhost" if role == "client" else None,
                suppress_ragged_eofs=False,
            )
        finally:
            sock.close()

    def send(self, handle: Any, data: bytes) -> None:
        handle.sendall(data)

    def recv(self, handle: Any) -> bytes:
        data: bytes = handle.recv(1 << 16)
        return data

    def renegotiate(self, handle: Any) -> None:
        """The stdlib has no call for it."""

    def send_eof(self, handle: Any) -> None:
        handle.shutdown(socket.SHUT_WR)

    def end(self, handle: Any) -> None:
        handle.close()

    def close(self) -> None:
        """The process-wide bridge stays; the fixture `default_bridge` closes it."""


FACES: dict[str, type[Core] | type[DropIn]] = {"core": Core, "drop-in": DropIn}
