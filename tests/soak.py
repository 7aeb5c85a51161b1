"""A soak: hours in minutes.  Seeded; every byte is accounted for, and what a process holds stays flat.

``python tests/soak.py --minutes 20 --seed 1``, or ``tox -e soak``.  Clients of one bridge connect to a listener of
another, send messages of 0 bytes to 64 MiB, take them back from an echo, compare them, and leave: politely, or
cut short by another thread.  Meanwhile the listener's certificate is swapped, and children are
forked that must find every handle refused.  At rest points, with every session gone, threads, descriptors and memory
are counted; after the first few they may not grow.  Exit status 1 and the reason if anything is wrong.

Memory is measured as `loaded` does it: what is resident once all that is free has gone back to the system.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import threading
import time
from typing import Any

import trustme
from loaded import descriptors, resident

import bridge

SIZES = (0, 1, 100, 5_000, 16_384, 70_000, 300_000, 2_000_000)
LARGEST = 64 * 1024 * 1024 - 4
CLIENTS = 8
PATIENCE = 120.0
REST_EVERY = 15.0
WARM_UP = 3
"""Rest points before memory is taken for settled: allocators keep their peaks."""
GROWTH = 0.10
"""Of the memory at rest, over what it was when settled."""
HONEST = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""For allocators that give back what is free: mallopt(3) says that the threshold grows otherwise, up to 32 MiB."""
SLACK = 8 << 20
"""And so many bytes, for what threads that are busy elsewhere have just freed."""


def codec() -> bridge.codecs.LengthPrefixed:
    return bridge.codecs.LengthPrefixed(4, max_length=LARGEST)


class Soak:
    def __init__(self, seed: int, leak: bool) -> None:
        self.rng = random.Random(seed)
        self.ca = trustme.CA()
        self.client_context = bridge.client_context(self.ca.cert_pem.bytes())
        self.leak = leak
        self.kept: list[Any] = []
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(("sessions", "messages", "bytes", "aborted", "swaps", "forks"), 0)
        self.faults: list[str] = []
        self.inbox = bridge.Inbox()

    def count(self, **more: int) -> None:
        with self.lock:
            for name, value in more.items():
                self.counts[name] += value

    def server_context(self) -> bridge.Context:
        issued = self.ca.issue_cert("localhost")
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        return bridge.server_context(chain, issued.private_key_pem.bytes())

    def run(self, minutes: float) -> None:
        end = time.monotonic() + minutes * 60
        with bridge.Bridge() as servers, bridge.Bridge() as clients:
            listener = servers.listen(("127.0.0.1", 0), self.server_context(), codec=codec, inbox=self.inbox)
            handlers = [threading.Thread(target=self.handle, daemon=True) for _ in range(3)]
            for handler in handlers:
                handler.start()
            settled: dict[str, int] = {}
            rests = 0
            while time.monotonic() < end and not self.faults:
                self.phase(clients, listener, min(end, time.monotonic() + REST_EVERY))
                found = self.rest(servers, clients)
                rests += 1
                print(f"{rests:4}  {found}  {self.counts}", flush=True)
                if rests <= WARM_UP:
                    settled = {name: max(value, settled.get(name, 0)) for name, value in found.items()}
                else:
                    self.compare(settled, found)
            if rests <= WARM_UP and not self.faults:
                self.faults.append(f"only {rests} rest points: too short to tell anything")
        for handler in handlers:
            handler.join(PATIENCE)

    def handle(self) -> None:
        while True:
            try:
                session, message = self.inbox.get()
            except bridge.ShutDown:
                return
            if message is not None:
                try:
                    session.send(message, timeout=PATIENCE)
                except bridge.SessionEnded:
                    pass
            del session, message  # while it waits for the next ones

    def phase(self, clients: bridge.Bridge, listener: bridge.Listener, until: float) -> None:
        seeds = [self.rng.random() for _ in range(CLIENTS)]
        threads = [
            threading.Thread(target=self.guarded, args=(clients, listener, random.Random(seed), until))
            for seed in seeds
        ]
        for thread in threads:
            thread.start()
        pause = threading.Event()
        while any(thread.is_alive() for thread in threads):
            pause.wait(1.0)
            listener.replace_context(self.server_context())
            self.count(swaps=1)
            if self.rng.random() < 0.3:
                self.fork(clients, listener)
        for thread in threads:
            thread.join()

    def guarded(self, *arguments: Any) -> None:
        try:
            self.churn(*arguments)
        except Exception as error:
            self.faults.append(f"a client failed: {error!r}")

    def churn(
        self, clients: bridge.Bridge, listener: bridge.Listener, rng: random.Random, until: float
    ) -> None:
        while time.monotonic() < until and not self.faults:
            session = clients.connect(
                listener.address,
                self.client_context,
                server_hostname="localhost",
                codec=codec,
                timeout=PATIENCE,
            )
            self.count(sessions=1)
            if self.leak:
                self.kept.append((bytearray(200_000), os.dup(0)))
            how = rng.random()
            if how < 0.2:
                self.cut_short(session, rng)
                continue
            for _ in range(rng.randrange(1, 12)):
                self.exchange(session, rng)
            if how < 0.6:
                session.send_eof()
                for _ in session:
                    self.faults.append("a message nobody sent")
            report = session.close(PATIENCE)
            if not report:
                self.faults.append(f"a polite close left {report}")

    def exchange(self, session: bridge.Session, rng: random.Random) -> None:
        size = LARGEST if rng.random() < 0.002 else rng.choice(SIZES)
        message = rng.randbytes(min(size, 65_536)) * max(1, size // 65_536)
        message = message[:size]
        session.send(message, timeout=PATIENCE)
        answer = session.recv(PATIENCE)
        if hashlib.sha256(answer).digest() != hashlib.sha256(message).digest():
            self.faults.append(f"{len(message)} bytes came back as {len(answer)} others")
        self.count(messages=1, bytes=len(message))

    def cut_short(self, session: bridge.Session, rng: random.Random) -> None:
        """Somebody else ends it, at any moment."""
        end = threading.Timer(rng.random() * 0.05, rng.choice([session.abort, session.close]))
        end.start()
        try:
            while True:
                self.exchange(session, rng)
        except bridge.SessionEnded:
            self.count(aborted=1)
        end.join()
        session.close(PATIENCE)

    def fork(self, clients: bridge.Bridge, listener: bridge.Listener) -> None:
        if not hasattr(os, "fork"):
            return
        child = os.fork()
        if child == 0:
            try:
                clients.connect(listener.address, self.client_context, server_hostname="localhost")
            except bridge.ForkedError:
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            self.faults.append("the child of a fork could use the bridge")
        self.count(forks=1)

    def rest(self, *bridges: bridge.Bridge) -> dict[str, int]:
        """What the process holds once every session is gone."""
        deadline, pause = time.monotonic() + PATIENCE, threading.Event()
        while any(one.snapshot().sessions for one in bridges):
            if time.monotonic() > deadline:
                self.faults.append(f"sessions do not end: {[one.snapshot() for one in bridges]}")
                break
            pause.wait(0.05)
        for one in bridges:
            seen = one.snapshot()
            if not self.faults and (seen.inbox_bytes or seen.outbox_bytes):
                self.faults.append(f"bytes that nobody has: {seen}")
        return {"threads": threading.active_count(), "fds": descriptors(), "rss": resident()}

    def compare(self, settled: dict[str, int], found: dict[str, int]) -> None:
        for name in ("threads", "fds"):
            if found[name] > settled[name]:
                self.faults.append(f"{name} have grown from {settled[name]} to {found[name]}")
        if found["rss"] > settled["rss"] * (1 + GROWTH) + SLACK:
            self.faults.append(f"memory has grown from {settled['rss'] >> 20} to {found['rss'] >> 20} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--leak", action="store_true", help="leak on purpose, to see that it is noticed")
    options = parser.parse_args()
    if not os.environ.keys() >= HONEST.keys() and hasattr(os, "execve"):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HONEST})
    soak = Soak(options.seed, options.leak)
    soak.run(options.minutes)
    for fault in soak.faults:
        print("FAULT:", fault)
    print(f"{'failed' if soak.faults else 'passed'}: {soak.counts}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
