"""TLS in front of a server that has none: every connection is carried on to it, both ways, in plain text.

python reverse_proxy.py --cert cert.pem --key key.pem --backend 127.0.0.1:8080 --port 8443
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading

import bridge


def outward(backend: socket.socket, session: bridge.Session) -> None:
    """What the server says goes to the client; its end is our half close."""
    try:
        while data := backend.recv(65536):
            session.send(data)  # waits while the client does not read; then the server waits for us
        session.send_eof()
    except bridge.SessionEnded:
        pass
    except OSError:  # the server was cut off: the client must not take this for its end
        session.abort()


def inward(session: bridge.Session, backend: socket.socket) -> None:
    """What the client says goes to the server; so does its end."""
    try:
        for data in session:
            backend.sendall(data)
        backend.shutdown(socket.SHUT_WR)
    except (bridge.SessionEnded, OSError):
        with contextlib.suppress(OSError):
            backend.shutdown(socket.SHUT_RDWR)  # which wakes the other thread


def carry(session: bridge.Session, address: tuple[str, int]) -> None:
    try:
        with session, socket.create_connection(address, timeout=10) as backend:
            backend.settimeout(None)
            other = threading.Thread(target=outward, args=(backend, session))
            other.start()
            inward(session, backend)
            other.join()
    except OSError as error:
        print(f"{session.name}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--cert", "--key", "--backend"):
        parser.add_argument(option, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    host, _, port = arguments.backend.rpartition(":")
    context = bridge.server_context(arguments.cert, arguments.key)
    timeouts = bridge.Timeouts(idle=300)  # no byte either way for so long ends a connection
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge(timeouts=timeouts) as b:
        listener = b.listen(("127.0.0.1", arguments.port), context)
        print(f"listening on {listener.address[1]}", flush=True)
        for session in listener:
            threading.Thread(target=carry, args=(session, (host, int(port)))).start()


if __name__ == "__main__":
    main()
