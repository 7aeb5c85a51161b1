"""A gateway for a hospital's old HL7 server: partners speak MLLP over mutual TLS, the server plain MLLP.

    python mllp_gateway.py --cert c.pem --key k.pem --partners ca.pem --backend 127.0.0.1:2575 --port 6661

Each message waits for its acknowledgement, which goes back to the partner that sent it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import socket
import threading

import bridge

MLLP = functools.partial(bridge.codecs.Delimited, b"\x1c\r", start=b"\x0b")


class Backend:
    """A plain connection to the old server, framed by the very codec that frames the TLS side."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=10)
        self._codec = MLLP()

    def ask(self, message: bytes) -> bytes:
        """The acknowledgement of *message*."""
        self._socket.sendall(self._codec.encode(message))
        while True:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("the HL7 server hung up")
            for answer in self._codec.decode(data):
                return answer

    def close(self) -> None:
        self._socket.close()


def serve(partner: bridge.Session, host: str, port: int) -> None:
    certificate = partner.info.peer_certificate
    name = certificate.subject.rfc4514_string() if certificate else "nobody"
    try:
        with partner, contextlib.closing(Backend(host, port)) as backend:
            for number, message in enumerate(partner, 1):
                partner.send(backend.ask(message))
                print(f"{name}: message {number}, {len(message)} bytes", flush=True)
    except (bridge.SessionEnded, OSError) as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--cert", "--key", "--partners", "--backend"):
        parser.add_argument(option, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    host, _, port = arguments.backend.rpartition(":")
    context = bridge.server_context(arguments.cert, arguments.key, client_ca=arguments.partners)
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge() as b:
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=MLLP)
        print(f"listening on {listener.address[1]}", flush=True)
        for partner in listener:
            threading.Thread(target=serve, args=(partner, host, int(port))).start()


if __name__ == "__main__":
    main()
