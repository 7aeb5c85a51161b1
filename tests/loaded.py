"""The server that test_load.py puts under load, in a process of its own: ``python loaded.py CERT KEY``.

It echoes, says its port, and for each line of its input one line of JSON: what it holds at that moment.  Its memory is
what is resident once garbage is collected and malloc_trim(3) has given back to the system what is free; it is to be
started with PYTHONMALLOC=malloc, for Python's own allocator keeps a megabyte wherever one object is left of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import bridge

PROC = Path("/proc/self")


def echo(inbox: bridge.Inbox) -> None:
    """A handler, until all is over.  A traceback then, while the interpreter ends, can abort it."""
    while True:
        try:
            session, message = inbox.get()
        except bridge.ShutDown:
            return
        if message is not None:
            with contextlib.suppress(bridge.SessionEnded):
                session.send(message)


def resident() -> int:
    """Bytes of memory, without garbage and what is free; 0 where that cannot be told."""
    gc.collect()
    if sys.platform != "linux":
        return 0
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """How many this process has open; 0 where that cannot be told."""
    return len(list((PROC / "fd").iterdir())) if sys.platform == "linux" else 0


def held(b: bridge.Bridge) -> dict[str, Any]:
    """What this process holds now, and what its handshakes have come to since it began."""
    kib = resident() >> 10
    totals = b.totals()
    return {
        "sessions": len(b.snapshot().sessions),
        "shaken": sum(count for (_, result, _), count in totals.handshakes.items() if result == "ok"),
        "endings": totals.endings,
        "threads": len(list((PROC / "task").iterdir())),
        "descriptors": descriptors(),
        "kib": kib,
    }


def main() -> None:
    """Serve until standard input ends."""
    inbox = bridge.Inbox()
    with bridge.Bridge(timeouts=bridge.Timeouts(handshake=None)) as b:
        listener = b.listen(("127.0.0.1", 0), bridge.server_context(*sys.argv[1:3]), inbox=inbox)
        threading.Thread(target=echo, args=[inbox], daemon=True).start()
        print(listener.address[1], flush=True)
        for _ in sys.stdin:
            print(json.dumps(held(b)), flush=True)


if __name__ == "__main__":
    main()
