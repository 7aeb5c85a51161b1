"""An echo server with a thread a session: the shape of most threaded servers, and every thread just blocks.

    python echo_server.py --cert cert.pem --key key.pem --port 8443

Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import threading

import bridge


def serve(session: bridge.Session) -> None:
    try:
        with session:
            for line in session:  # until the peer has said that it is done
                session.send(line)
        print(f"{session.name}: done", flush=True)
    except bridge.SessionEnded as cause:  # any other end
        print(f"{session.name}: {type(cause).__name__}: {cause}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context = bridge.server_context(arguments.cert, arguments.key)
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge() as b:
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=bridge.codecs.Lines)
        print(f"listening on {listener.address[1]}", flush=True)
        for session in listener:
            threading.Thread(target=serve, args=(session,)).start()


if __name__ == "__main__":
    main()
