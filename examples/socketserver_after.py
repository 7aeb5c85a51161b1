"""The same server after one line was changed: a chat room, a thread for each guest.

python socketserver_after.py --cert cert.pem --key key.pem --port 8443
"""

from __future__ import annotations

import argparse
import contextlib
import socketserver
import threading

from bridge import ssl

clients: dict[socketserver.BaseRequestHandler, threading.Lock] = {}


class Client(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            name = self.rfile.readline().strip()
            clients[self] = threading.Lock()
            tell_all(b"* %s has come\n" % name)
            for line in self.rfile:
                tell_all(b"%s: %s" % (name, line))
        except OSError as error:
            print(f"{self.client_address[0]}: {error}", flush=True)
        finally:
            clients.pop(self, None)


def tell_all(line: bytes) -> None:
    for client, lock in list(clients.items()):
        with contextlib.suppress(OSError), lock:
            client.request.sendall(line)  # while its own thread is in recv


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--cert", "--key"):
        parser.add_argument(option, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(arguments.cert, arguments.key)
    with Server(("127.0.0.1", arguments.port), Client) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        print(f"listening on {server.server_address[1]}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
