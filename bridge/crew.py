"""The threads of one Bridge, and how they end.

They are told once, by anybody, and then end by themselves: the workers, each with all that it owns; after the last of
them, when nothing more can come, the coordinator; and that lets go of the inboxes.  So whoever waits for it may be
interrupted, or never come.

A worker that ends without being told has met a bug.  Then all are told: a Bridge that is closed is something that a
program can see, and one that serves some of its sessions for ever and others not at all is not.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref

from bridge.coordinator import Channel, Coordinator
from bridge.crossing import Registry, Tally, time_left
from bridge.errors import LimitExceeded
from bridge.inbox import Inbox
from bridge.stream import Stream
from bridge.threads import this_thread
from bridge.worker import Worker

CROWDED = "each worker has as many sockets as this system's select(2) can wait for; have more workers"


class Crew:
    """A coordinator, so many workers, and their threads.

    It keeps no Bridge alive, nor its *streams*, nor a shared inbox: they may be forgotten meanwhile.
    """

    def __init__(self, workers: int, streams: Registry[Stream]) -> None:
        self.coordinator = Coordinator()
        self.workers: list[Worker] = []
        with contextlib.ExitStack() as undo:  # if there are too few descriptors
            for number in range(workers):
                self.workers.append(Worker(f"bridge-worker-{number}", self.coordinator.hand_over))
                undo.callback(self.workers[-1].close)
            undo.pop_all()
        self._turns = itertools.cycle(self.workers)
        self.threads = [
            threading.Thread(target=self._work, args=(worker,), name=worker.name, daemon=True)
            for worker in self.workers
        ]
        self.threads.append(threading.Thread(target=self._coordinate, name="bridge-coordinator", daemon=True))
        self.channels: Registry[Channel] = Registry()
        self._streams = weakref.ref(streams)
        self._inboxes: weakref.WeakSet[Inbox] = weakref.WeakSet()  # who waits there keeps it alive
        self._parted = False  # from them
        self._feeding = threading.RLock()  # of an inbox, which is attached once
        self._at_work = Tally(2**63)
        self._over = threading.Event()
        self.stopped = False
        """They were told to end."""

    def start(self) -> None:
        """Start the threads: all, or none that goes on."""
        self._at_work.add(len(self.threads))
        try:
            for thread in self.threads:
                thread.start()
        except BaseException as error:  # no more threads can be had, or Ctrl-C
            self.stop()
            self.coordinator.stop()
            if isinstance(error, RuntimeError):
                for worker, thread in zip(self.workers, self.threads, strict=False):
                    if thread.ident is None:
                        worker.close()
            raise

    def has_room(self) -> bool:
        """Whether any worker can own one more."""
        return any(worker.has_room() for worker in self.workers)

    def place(self) -> Worker:
        """Whose turn it is of the workers that can own one more.  LimitExceeded if none can.  Any thread."""
        for worker in itertools.islice(self._turns, len(self.workers)):
            if worker.has_room():
                return worker
        raise LimitExceeded(CROWDED)

    def feed(self, inbox: Inbox) -> None:
        """It will get what the sessions of this crew receive, until that is over.  Any thread."""
        with self._feeding:
            if self not in inbox._feeders:
                self._inboxes.add(inbox)
                inbox._attach(self)
                if self._parted:  # whoever waits there already learns that it is over
                    inbox._detach(self)

    def stop(self) -> None:
        """Tell all to end, which they do whoever waits for it.  Any thread, also twice; never waits."""
        self.stopped = True
        for worker in self.workers:
            worker.stop()
        if self.threads[-1].ident is None:  # nobody works: a test does, step by step
            self._part()

    def join(self, give_up: float | None = None) -> None:
        """Wait for that, until the monotonic time *give_up* at the latest."""
        if self.threads[-1].ident is not None:
            self._over.wait(time_left(give_up))
            for thread in self.threads:
                thread.join(time_left(give_up))

    def is_here(self) -> bool:
        """Whether the calling thread is one of them, or in the middle of a step in the place of one."""
        if this_thread.notes.serves_all and any(worker.seat.is_mine() for worker in self.workers):
            return True
        return threading.current_thread() in self.threads

    def serves(self) -> bool:
        """Whether they are at work, and nobody has told them to end."""
        return self.threads[0].is_alive() and not self.stopped

    def _work(self, worker: Worker) -> None:
        try:
            worker.run()
        finally:
            self.stop()
            self._at_work.add(-1)
            if self._at_work.used == 1:  # the coordinator is the last
                self.coordinator.stop()

    def _coordinate(self) -> None:
        try:
            self.coordinator.run()
        finally:
            self._part()

    def _part(self) -> None:
        """Nothing more will come."""
        try:
            for channel in self.channels.seal():
                if channel.closed.peek() is None:  # it came too late for its worker
                    self.coordinator.give_up(channel)
            streams = self._streams()
            for stream in () if streams is None else streams.seal():  # parked, so no worker had it to end
                stream.give_up()
        finally:
            with self._feeding:
                self._parted = True
                for inbox in list(self._inboxes):
                    self._inboxes.discard(inbox)
                    inbox._detach(self)
            self._over.set()
