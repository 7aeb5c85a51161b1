"""Send the lines of standard input, print the answers: one thread writes and one reads, on one session.

python echo_client.py --cafile ca.pem --port 8443 < some.txt
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading

import bridge


def print_answers(session: bridge.Session) -> None:
    with contextlib.suppress(bridge.SessionEnded):  # `main` says so
        for line in session:
            print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cafile", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    context = bridge.client_context(arguments.cafile)
    try:
        with bridge.Bridge(workers=1) as b:
            session = b.connect(
                ("127.0.0.1", arguments.port),
                context,
                server_hostname="localhost",
                codec=bridge.codecs.Lines,
                timeout=10,
            )
            print(f"{session.info.version}, {session.info.cipher}", file=sys.stderr)
            reader = threading.Thread(target=print_answers, args=(session,))
            reader.start()
            for line in sys.stdin:
                session.send(line.rstrip("\r\n"))
            session.send_eof()  # we are done; the answers still come
            reader.join()
            with contextlib.suppress(bridge.EndOfStream):
                session.recv()  # raises how it ended, once more
            session.close()
    except bridge.SessionEnded as cause:
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
