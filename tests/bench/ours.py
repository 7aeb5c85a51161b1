"""Servers of the bridge's own API."""

from __future__ import annotations

import contextlib
import threading

from job import SENDERS, Job, announce, lines

import bridge


def sink(session: bridge.Session) -> None:
    """Reads until the end."""
    for _ in session:
        pass


def source(session: bridge.Session, job: Job) -> None:
    """Sends until the session ends."""
    payload = job.payload
    with contextlib.suppress(bridge.SessionEnded):
        while True:
            session.send(payload)


def talk(session: bridge.Session, job: Job) -> None:
    """The life of a thread that blocks on its own session."""
    with contextlib.suppress(bridge.SessionEnded), session:
        if job.role == "echo":
            for message in session:
                session.send(message)
        elif job.role == "source":
            source(session, job)
        else:
            if job.role == "both":
                threading.Thread(target=source, args=(session, job), daemon=True).start()
            sink(session)


def send_lines(sessions: list[bridge.Session], sender: int) -> None:
    """One sender of all sessions.  There is no lock: a message is sent whole."""
    with contextlib.suppress(bridge.SessionEnded):
        for line in lines(sender):
            for session in sessions:
                session.send(line)


def serve_bridge_threads(job: Job) -> None:
    """The bridge, a thread per session blocked in `recv` or `send`; for lines only the senders' threads."""
    sessions = []
    with bridge.Bridge(workers=job.workers) as b:
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(job.cert, job.key))
        announce(listener.address[1])
        for session in listener:
            if job.role != "lines":
                threading.Thread(target=talk, args=(session, job), daemon=True).start()
                continue
            sessions.append(session)
            if len(sessions) == job.sessions:
                for sender in range(SENDERS):
                    threading.Thread(target=send_lines, args=(sessions, sender), daemon=True).start()


def serve_bridge_inbox(job: Job) -> None:
    """The bridge, a pool of handler threads on one shared inbox."""
    shared = bridge.Inbox()

    def handle() -> None:
        while True:
            session, message = shared.get()
            if message is None:
                session.close()
                continue
            try:
                session.send(message)
            except bridge.SessionEnded:
                pass  # the inbox says so too

    with bridge.Bridge(workers=job.workers) as b:
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(job.cert, job.key), inbox=shared)
        announce(listener.address[1])
        for _ in range(job.handlers - 1):
            threading.Thread(target=handle, daemon=True).start()
        handle()
