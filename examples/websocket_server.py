"""WebSocket with wsproto as the codec: handlers see whole messages, and every byte is parsed in one place.

python websocket_server.py --cert cert.pem --key key.pem --port 8443
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

from wsproto import events
from wsproto.connection import Connection, ConnectionType
from wsproto.handshake import H11Handshake

import bridge


class WebSocket(bridge.codecs.Codec[Any]):
    def __init__(self) -> None:
        self._handshake = self._parser = cast(Any, H11Handshake(ConnectionType.SERVER))
        self._parts: list[Any] = []
        self._sender, self._lock = Connection(ConnectionType.SERVER), threading.Lock()

    def decode(self, data: bytes) -> Iterator[Any]:
        self._parser.receive_data(data)
        for event in self._parser.events():
            if isinstance(event, events.Request):  # from now on the handshake is encode's, to answer by
                self._parser = Connection(ConnectionType.SERVER)
            if not isinstance(event, events.Message):
                yield event
            elif sum(map(len, self._parts)) + len(event.data) > 1_000_000:
                raise bridge.MessageTooLarge("a message of more than a megabyte")
            else:
                self._parts.append(event.data)
                if event.message_finished:
                    yield type(event)(data=type(event.data)().join(self._parts))
                    self._parts = []

    def encode(self, event: events.Event) -> bytes:
        with self._lock:
            accepts = isinstance(event, events.AcceptConnection)
            return bytes((self._handshake if accepts else self._sender).send(event))


def handle(inbox: bridge.Inbox) -> None:
    while True:
        try:
            session, event = inbox.get()
        except bridge.ShutDown:  # the Bridge was closed
            return
        with contextlib.suppress(bridge.SessionEnded):
            if isinstance(event, events.Request):
                session.send(events.AcceptConnection())
            elif isinstance(event, events.Ping):
                session.send(event.response())
            elif isinstance(event, events.Message):
                session.send(event)
            elif isinstance(event, events.CloseConnection):
                session.send(event.response())
                session.send_eof()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context, inbox = bridge.server_context(arguments.cert, arguments.key), bridge.Inbox()
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge() as b:
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=WebSocket, inbox=inbox)
        for _ in range(3):
            threading.Thread(target=handle, args=(inbox,)).start()
        print(f"listening on {listener.address[1]}", flush=True)
        threading.Event().wait()
