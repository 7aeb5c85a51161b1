"""The servers under test, each as its own users would write it.

Run as a process by `run.py`: prints ``port N`` once it listens, and ends when its stdin does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import threading

from job import READ, ROLES, Job

SERVERS = {
    "stdlib": "blocking",
    "pyopenssl": "blocking",
    "bridge-dropin": "blocking",
    "gevent": "blocking",
    "asyncio": "on_asyncio",
    "asyncio-streams": "on_asyncio",
    "uvloop": "on_asyncio",
    "twisted": "on_twisted",
    "trio": "on_trio",
    "bridge-threads": "ours",
    "bridge-inbox": "ours",
}
"""In which module the function of a peer is."""


def end_with_stdin() -> None:
    """Ends this process, whatever it is doing, when the harness closes its stdin or dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


def parse() -> Job:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=SERVERS)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--cert", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--cores", default="", help="run on these cores only: 0,1")
    parser.add_argument("--block", type=int, default=READ, help="bytes a source passes to one send")
    parser.add_argument("--handlers", type=int, default=2, help="threads of bridge-inbox")
    parser.add_argument("--workers", type=int, default=1, help="workers of the bridge")
    parser.add_argument("--sessions", type=int, default=1, help="how many sessions lines wait for")
    return Job(**vars(parser.parse_args()))


def main() -> None:
    """Serves until stdin ends."""
    job = parse()
    if job.cores:
        os.sched_setaffinity(0, {int(core) for core in job.cores.split(",")})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threading.Thread(target=end_with_stdin, daemon=True).start()
    serve = getattr(importlib.import_module(SERVERS[job.peer]), f"serve_{job.peer.replace('-', '_')}")
    serve(job)


if __name__ == "__main__":
    main()
