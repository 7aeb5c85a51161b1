"""HTTP/1.1 with h11 as the codec: the parser in one place, and a pool of handlers that see whole requests.

python http_server.py --cert cert.pem --key key.pem --port 8443
curl --cacert ca.pem https://localhost:8443/
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import h11

import bridge


class HTTP(bridge.codecs.Codec[Any]):
    def __init__(self) -> None:
        self._begin()

    def _begin(self, behind: bytes = b"") -> None:
        self._http = h11.Connection(h11.SERVER)
        self._request: h11.Request | None = None
        self._body = b""
        if behind:  # the next request is here already
            self._http.receive_data(behind)

    def decode(self, data: bytes) -> Iterator[Any]:
        self._http.receive_data(data)
        while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED, h11.ConnectionClosed()):
            if isinstance(event, h11.Request):
                self._request = event
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > 1_000_000:
                    raise bridge.MessageTooLarge("a body of more than a megabyte")
            elif isinstance(event, h11.EndOfMessage):
                yield self._http, self._request, self._body  # the first for the answer: one owner at a time
                self._begin(self._http.trailing_data[0])

    def encode(self, answer: tuple[h11.Connection, list[h11.Event]]) -> bytes:
        http, events = answer
        return b"".join(http.send(event) or b"" for event in events)


def handle(inbox: bridge.Inbox) -> None:
    while True:
        try:
            session, message = inbox.get()
        except bridge.ShutDown:  # the Bridge was closed
            return
        if message is None:
            continue
        http, request, body = message
        page = b"%s and %d bytes\n" % (request.target, len(body))
        head = h11.Response(status_code=200, headers=[("Content-Length", str(len(page)))])
        content = [] if request.method == b"HEAD" else [h11.Data(data=page)]
        with contextlib.suppress(bridge.SessionEnded):
            session.send((http, [head, *content, h11.EndOfMessage()]))
            if http.our_state is h11.MUST_CLOSE:
                session.send_eof()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    context, inbox = bridge.server_context(arguments.cert, arguments.key), bridge.Inbox()
    with contextlib.suppress(KeyboardInterrupt), bridge.Bridge() as b:
        listener = b.listen(("127.0.0.1", arguments.port), context, codec=HTTP, inbox=inbox)
        for _ in range(3):
            threading.Thread(target=handle, args=(inbox,)).start()
        print(f"listening on {listener.address[1]}", flush=True)
        threading.Event().wait()
