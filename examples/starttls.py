"""STARTTLS: begin in plain text, go on under TLS, and come back to plain text, on one TCP connection.

    python starttls.py --cert cert.pem --key key.pem --cafile ca.pem

The dialogue is a mail server's, on both ends; it comes back to plain text by `unwrap`, as FTP's CCC does.
"""

from __future__ import annotations

import argparse
import functools
import socket
import threading

import bridge

SMTPLines = functools.partial(bridge.codecs.Lines, newline="\r\n")


def read_line(plain: socket.socket, line: bytes = b"") -> str:
    """One line, of which *line* is here already, and not a byte more: the bytes after it may be TLS."""
    while not line.endswith(b"\r\n"):
        byte = plain.recv(1)
        if not byte:
            raise EOFError("the peer hung up")
        line += byte
    return line[:-2].decode()


def serve(plain: socket.socket, b: bridge.Bridge, context: bridge.Context) -> None:
    plain.sendall(b"220 mail.example.org ready\r\n")
    assert read_line(plain) == "STARTTLS"
    plain.sendall(b"220 go ahead\r\n")
    session = b.adopt(plain, context, codec=SMTPLines, timeout=10)
    for line in session:
        session.send(f"250 {line.partition(' ')[2]}, pleased to meet you over {session.info.version}")
    plain, _ = session.unwrap(timeout=10)
    with plain:
        plain.sendall(b"221 bye, in plain text\r\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--cert", "--key", "--cafile"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    server = bridge.server_context(arguments.cert, arguments.key)
    with bridge.Bridge(workers=1) as b, socket.create_server(("127.0.0.1", 0)) as listening:
        plain = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        threading.Thread(target=serve, args=(accepted, b, server)).start()

        print("S:", read_line(plain))
        plain.sendall(b"STARTTLS\r\n")
        print("S:", read_line(plain))
        client = bridge.client_context(arguments.cafile)
        session = b.adopt(plain, client, server_hostname="localhost", codec=SMTPLines, timeout=10)
        print("(now under TLS)")
        session.send("EHLO client.example.org")
        print("S:", session.recv(timeout=10))
        plain, early = session.unwrap(timeout=10)
        print("(and back)")
        with plain:
            print("S:", read_line(plain, early))


if __name__ == "__main__":
    main()
