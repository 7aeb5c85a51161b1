"""A window into a running process: a Unix socket that tells whoever may open it what a Bridge is doing.

It is there only if the program asks for it.  The socket's mode is 0600, so only the same user (and root) can look
through; what there is to be seen holds no content and no secrets, and nothing can be done through it: a connection
gets one JSON object and its end, and not a byte is read from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import stat
import threading
from typing import Any

from bridge import forks
from bridge.addresses import BoundPath, failed
from bridge.bridge import Bridge
from bridge.crossing import deadline_after, time_left
from bridge.errors import ConfigurationError

PATIENCE = 2.0
"""Seconds in which a looker must have taken all, and in which whoever has the path must answer."""
PAUSE = 0.1
"""Seconds until a window that cannot let anybody look, for want of descriptors, tries again."""
NOBODY = {errno.ENOENT, errno.ENOTDIR, errno.ENOTSOCK, errno.ECONNREFUSED}
"""How it fails to look where there is no window."""


class Window:
    """Shows *bridge* at the socket *path* from now on until `close`, or the end of a ``with`` block.

    A socket that an ended process has left at *path* is replaced; anything else is not.  Raises ConfigurationError
    where there are no Unix sockets, and OSError if *path* cannot be had.
    """

    def __init__(self, bridge: Bridge, path: str | os.PathLike[str]) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigurationError("this system has no Unix sockets")
        self.path = os.fspath(path)
        self._bridge = bridge
        self._over = threading.Event()
        self._born = forks.current
        self._socket = _listen(self.path)
        self._file = BoundPath(self.path)
        self._thread = threading.Thread(target=self._serve, name="bridge-window", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show nothing any more.  Idempotent.  In a child of fork() it is still the parent's, who shows it."""
        if forks.abandoned(self._born):
            self._socket.close()
        if self._socket.fileno() == -1:
            return
        self._over.set()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as visitor:
            visitor.setblocking(False)
            visitor.connect(self.path)  # wakes `accept`
        self._file.remove()  # first: once nobody listens, a successor may have the path
        with contextlib.suppress(OSError):  # likewise, on Linux, if the path is another's by now
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                looker, _ = self._socket.accept()
            except OSError:  # it was closed, or the process is out of descriptors, which may pass
                if self._over.wait(PAUSE):
                    return
                continue
            if self._over.is_set():
                looker.close()
                return
            with looker, contextlib.suppress(OSError):
                looker.settimeout(PATIENCE)
                looker.sendall(json.dumps(self._view()).encode())
                looker.shutdown(socket.SHUT_WR)  # a child of fork() may hold it open

    def _view(self) -> dict[str, Any]:
        now, totals = self._bridge.snapshot(), self._bridge.totals()
        return {
            "pid": os.getpid(),
            "sessions": [dataclasses.asdict(session) for session in now.sessions],
            "listeners": [dataclasses.asdict(listener) for listener in now.listeners],
            "workers": now.workers,
            "inbox_bytes": now.inbox_bytes,
            "outbox_bytes": now.outbox_bytes,
            "bytes_received": totals.bytes_received,
            "bytes_sent": totals.bytes_sent,
            "endings": totals.endings,
            "handshakes": [[*key, count] for key, count in totals.handshakes.items()],
            "wants": [[*key, count] for key, count in totals.wants.items()],
        }


def look(path: str | os.PathLike[str], timeout: float = 5.0) -> dict[str, Any]:
    """What the Bridge behind the window at *path* is doing now.  OSError if nobody shows it in *timeout* seconds.

    A dict: *pid*; *sessions* and *listeners*, lists of dicts with the fields of `bridge.SessionSnapshot` and
    `bridge.ListenerSnapshot`; *workers*, *inbox_bytes* and *outbox_bytes* as in `bridge.Snapshot`; *bytes_received*,
    *bytes_sent*, *endings*, *handshakes* and *wants* as in `bridge.Totals`, where a key of several parts and its value
    are one list.
    """
    where = os.fspath(path)
    try:
        said = _hear(where, timeout)
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, "whoever has it does not answer", where) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NOBODY:
            reason += "; no program has opened a Window there, or it has ended"
        raise OSError(error.errno, reason, where) from error
    try:
        view = json.loads(said)
    except (ValueError, RecursionError):
        view = None
    if not isinstance(view, dict) or "sessions" not in view:
        raise OSError(errno.EPROTO, "this is no window, or one that is just closing", where)
    return view


def _hear(path: str, timeout: float) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        deadline = deadline_after(timeout)
        sock.settimeout(timeout)
        sock.connect(path)
        parts = []
        with contextlib.suppress(ConnectionResetError):  # it closes, and has not accepted us
            while data := sock.recv(65536):
                parts.append(data)
                left = time_left(deadline)
                if left == 0:
                    raise TimeoutError
                sock.settimeout(left)
    return b"".join(parts)


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        _clear(path)
        sock.bind(path)
        os.chmod(path, 0o600)  # before anybody can connect: it does not listen yet
        sock.listen()  # as many as may wait: connect() does not, where one more would have to
    except OSError as error:
        sock.close()
        raise failed(f"cannot show anything at {path}", error) from error
    return sock


def _clear(path: str) -> None:
    """Remove a socket at *path* at which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except (BlockingIOError, TimeoutError):  # somebody has it, who does not answer
            pass
