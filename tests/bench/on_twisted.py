"""The Twisted server, on its default reactor."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from job import SENDERS, Job, announce, lines
from twisted.internet import defer, interfaces, protocol, reactor, ssl, task
from zope.interface import implementer


@implementer(interfaces.IPullProducer)
class Blocks:
    """Sends a block whenever the transport asks for one."""

    def __init__(self, transport: Any, payload: bytes) -> None:
        self._transport, self._payload = transport, payload

    def resumeProducing(self) -> None:
        self._transport.write(self._payload)

    def stopProducing(self) -> None:
        pass


@implementer(interfaces.IHandshakeListener, interfaces.IPushProducer)
class Peer(protocol.Protocol):
    """One connection."""

    def __init__(self, job: Job, peers: list[Peer]) -> None:
        self._job, self._peers = job, peers
        self.resumed: Any = None
        """While the transport has enough: what comes when it wants more."""
        self.over = False

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def handshakeCompleted(self) -> None:
        if self._job.role in ("source", "both"):
            self.transport.registerProducer(Blocks(self.transport, self._job.payload), False)
        elif self._job.role == "lines":
            self.transport.registerProducer(self, True)
            self._peers.append(self)
            if len(self._peers) == self._job.sessions:
                for sender in range(SENDERS):
                    task.cooperate(send_lines(self._peers, sender))

    def dataReceived(self, data: bytes) -> None:
        if self._job.role == "echo":
            self.transport.write(data)

    def pauseProducing(self) -> None:
        self.resumed = self.resumed or defer.Deferred()

    def resumeProducing(self) -> None:
        waiting, self.resumed = self.resumed, None
        if waiting:
            waiting.callback(None)

    def stopProducing(self) -> None:
        self.over = True
        self.resumeProducing()


def send_lines(peers: list[Peer], sender: int) -> Generator[Any, None, None]:
    """One sender of all sessions, for Twisted's cooperator."""
    for line in lines(sender):
        for peer in peers:
            while peer.resumed:
                woken: Any = defer.Deferred()
                peer.resumed.chainDeferred(woken)
                yield woken
            if peer.over:
                return
            peer.transport.write(line)
        yield None


def serve_twisted(job: Job) -> None:
    """Serves until the process ends."""
    peers: list[Peer] = []
    identity = ssl.PrivateCertificate.loadPEM(Path(job.cert).read_bytes() + Path(job.key).read_bytes())
    factory = protocol.Factory.forProtocol(lambda: Peer(job, peers))
    factory.noisy = False
    port = reactor.listenSSL(0, factory, identity.options(), backlog=4096, interface="127.0.0.1")
    announce(port.getHost().port)
    reactor.run(installSignalHandlers=False)
