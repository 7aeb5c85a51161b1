"""A Redis client that any number of threads may ask at once: one thread writes, one reads, on one session.

echo "INCR visits" | python redis_client.py ca.pem 6380
"""

from __future__ import annotations

import collections
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import hiredis

import bridge


class RESP(bridge.codecs.Codec[Any]):
    def __init__(self) -> None:
        self._reader = hiredis.Reader(encoding="utf-8", notEnoughData=Ellipsis)
        self.buffered = 0  # bytes of a reply that is not whole

    def decode(self, data: bytes) -> Iterator[Any]:
        self._reader.feed(data)
        self.buffered += len(data)
        while (reply := self._reader.gets()) is not Ellipsis:
            self.buffered = 0
            yield reply
        if self.buffered > 64 * 1024 * 1024:
            raise bridge.MessageTooLarge("a reply of more than 64 MiB")

    def encode(self, command: Any) -> bytes:
        return bytes(hiredis.pack_command(command))


class Redis:
    def __init__(self, session: bridge.Session) -> None:
        self._commands: queue.Queue[tuple[tuple[str, ...], Future[Any]]] = queue.Queue()
        self._asked: collections.deque[Future[Any]] = collections.deque()  # the answers come in this order
        for work in (self._write, self._read):
            threading.Thread(target=work, args=(session,), daemon=True).start()

    def ask(self, *command: str) -> Future[Any]:
        answer: Future[Any] = Future()
        self._commands.put((command, answer))
        return answer

    def _write(self, session: bridge.Session) -> None:
        while True:
            command, answer = self._commands.get()
            self._asked.append(answer)
            try:
                session.send(command)
            except bridge.SessionEnded as cause:
                self._fail(cause)

    def _read(self, session: bridge.Session) -> None:
        try:
            while True:
                reply = session.recv()
                self._asked.popleft().set_result(reply)
        except bridge.SessionEnded as cause:
            session.close()  # from now on every send fails
            self._fail(cause)

    def _fail(self, cause: bridge.SessionEnded) -> None:
        while self._asked:
            self._asked.popleft().set_exception(cause)


if __name__ == "__main__":
    cafile, port = sys.argv[1:]
    with bridge.Bridge() as b:
        redis = Redis(b.connect(("localhost", int(port)), bridge.client_context(cafile), codec=RESP))
        for answer in [redis.ask(*line.split()) for line in sys.stdin]:
            print(answer.result(timeout=10))
