"""A chat room: any number of guests, and three handler threads on one shared inbox.

python handler_pool.py --cert cert.pem --key key.pem --port 8443
openssl s_client -quiet -CAfile ca.pem -connect localhost:8443     (the first line you type is your name)
"""

from __future__ import annotations

import argparse
import contextlib
import threading

import bridge


class Room:
    """Who is there.  Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[bridge.Session, str] = {}

    def hear(self, session: bridge.Session, line: str | None) -> None:
        """A guest said *line*, or left if it is None."""
        with self._lock:
            name = self._names.get(session)
            if line is None:
                self._names.pop(session, None)
            elif name is None:
                self._names[session] = line
            guests = list(self._names)
        if line is None and name is not None:
            self._tell(guests, f"* {name} has left")
        elif line is not None:
            self._tell(guests, f"{name}: {line}" if name else f"* {line} has come")

    def _tell(self, guests: list[bridge.Session], line: str) -> None:
        for guest in guests:
            try:
                guest.send(line, timeout=0)
            except bridge.SendTimeout:  # a guest who does not read shall not keep a handler from the others
                guest.abort()
            except bridge.SessionEnded:  # its own end, (guest, None), is on its way
                pass


def handle(inbox: bridge.Inbox, room: Room) -> None:
    while True:
        try:
            session, line = inbox.get()
        except bridge.ShutDown:  # the Bridge was closed
            return
        room.hear(session, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context = bridge.server_context(arguments.cert, arguments.key)
    inbox, room = bridge.Inbox(), Room()
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge() as b:
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=bridge.codecs.Lines, inbox=inbox)
        for _ in range(3):
            threading.Thread(target=handle, args=(inbox, room)).start()
        print(f"listening on {listener.address[1]}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
