"""A selectors loop that watches TLS sessions next to plain sockets: datagrams come in, subscribers get them.

    python selectors_loop.py --cert cert.pem --key key.pem --port 8443

A subscriber sends the beginning of the lines it wants to see.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import selectors
import socket
import threading
from typing import Any

import bridge


class Doorbell:
    """An inbox that a selector can watch: readable while there are messages."""

    def __init__(self, inbox: bridge.Inbox) -> None:
        self._taken: queue.Queue[Any] = queue.Queue(1000)  # full: it waits, and so do the sessions
        self._bell, self._button = socket.socketpair()
        threading.Thread(target=self._carry, args=(inbox,), daemon=True).start()

    def _carry(self, inbox: bridge.Inbox) -> None:
        with contextlib.suppress(bridge.ShutDown, OSError), self._button:
            while True:
                self._taken.put(inbox.get())
                self._button.send(b"!")

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        self._bell.close()

    def messages(self) -> list[Any]:
        return [self._taken.get() for _ in self._bell.recv(1000)]


def serve(selector: selectors.BaseSelector, doorbell: Doorbell, datagrams: socket.socket) -> None:
    wanted: dict[bridge.Session, str] = {}
    for watched in (doorbell, datagrams):
        selector.register(watched, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is doorbell:
                for session, line in doorbell.messages():
                    if line is None:
                        wanted.pop(session, None)
                    else:
                        wanted[session] = line
            else:
                line = datagrams.recv(65536).decode(errors="replace").rstrip()
                for session in [each for each, start in wanted.items() if line.startswith(start)]:
                    with contextlib.suppress(bridge.SendTimeout, bridge.SessionEnded):
                        session.send(line, timeout=0)  # whoever does not keep up misses some


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context, inbox = bridge.server_context(arguments.cert, arguments.key), bridge.Inbox()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        b = stack.enter_context(bridge.Bridge())
        datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", 0))
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=bridge.codecs.Lines, inbox=inbox)
        print(f"listening on {listener.address[1]}\ndatagrams on {datagrams.getsockname()[1]}", flush=True)
        doorbell = stack.enter_context(contextlib.closing(Doorbell(inbox)))
        serve(stack.enter_context(selectors.DefaultSelector()), doorbell, datagrams)
