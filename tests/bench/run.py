"""The benchmark suite: `python tests/bench/run.py [--quick]`, where the package and trustme are installed.

A load generator in C on one core, one server at a time on another, all over TLS 1.3 on 127.0.0.1.
Peers take turns, round after round and in alternating order, each in a fresh process.  A Markdown report
goes to stdout, progress to stderr, and everything measured to a JSON file on request.  Nothing here fails
because a figure is low; the exit status is 1 when one of our own servers could not be measured at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import Bench, Broker, Failed, Server, prepare, run_idle, run_library, run_load
from report import Figures, Goal, Sample, markdown

KIB = 1024
PEERS = ("c", "stdlib", "pyopenssl", "asyncio", "bridge-inbox", "bridge-threads", "bridge-dropin")
OURS = ("bridge-inbox", "bridge-threads", "bridge-dropin")
BULK_PEERS = ("c", "stdlib", "pyopenssl", "asyncio", "bridge-threads", "bridge-dropin")
LIBRARY_PEERS = ("stdlib", "bridge-dropin")


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long and how often; a disturbed sample is repeated in the first *patience* seconds of a run."""

    rounds: int
    idle_rounds: int
    seconds: float
    warmup: float
    idle_connections: int
    patience: float


QUICK = Pace(rounds=3, idle_rounds=1, seconds=0.3, warmup=0.1, idle_connections=1_000, patience=60)
FULL = Pace(rounds=5, idle_rounds=2, seconds=2.0, warmup=0.5, idle_connections=10_000, patience=600)


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing to measure: *run* makes one sample of one peer."""

    name: str
    kind: str
    peers: tuple[str, ...]
    reference: str
    rounds: int
    run: Callable[[Bench, str], Figures]


def share_of_others(figures: Figures) -> Figures:
    """Adds which share of the whole machine was used by neither the server nor the generator."""
    share = figures["other_cpu"] / figures["seconds"] / (os.cpu_count() or 1)
    return {**figures, "other_share": max(0.0, round(share, 4))}


def echo(pace: Pace, size: int, connections: int) -> Work:
    """*connections* clients, each with one message of *size* bytes on its way at a time."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "echo", KIB) as server:
            options = {
                "connections": connections,
                "size": size,
                "seconds": pace.seconds,
                "warmup": pace.warmup,
            }
            return share_of_others(run_load(bench, server, "echo", **options))

    return Work(f"echo {size} B, {connections}", "echo", PEERS, "stdlib", pace.rounds, run)


def bulk(pace: Pace, mode: str, block: int) -> Work:
    """One connection, one way; *block* is what a server that sends passes to one send."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "source" if mode == "down" else "sink", block) as server:
            return share_of_others(run_load(bench, server, mode, seconds=pace.seconds, warmup=pace.warmup))

    name = f"bulk down, sends of {block // KIB} KiB" if mode == "down" else "bulk up"
    return Work(name, "bulk", BULK_PEERS, "pyopenssl", pace.rounds, run)


def idle(pace: Pace) -> Work:
    """What sessions cost that do nothing."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "echo", KIB) as server:
            return run_idle(bench, server, pace.idle_connections, pace.seconds)

    return Work("idle sessions", "idle", PEERS, "stdlib", pace.idle_rounds, run)


def http(pace: Pace, clients: int) -> Work:
    """Requests on *clients* connections that stay, `http.client` against `http.server`, both with one `ssl`."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "http-server", KIB) as server:
            cpu = server.cpu()
            options = {"clients": clients, "seconds": 2 * pace.seconds, "warmup": pace.warmup}
            figures = run_library(bench, "http-client", peer, server.port, **options)
            return {**figures, "server_cpu": server.cpu() - cpu}

    return Work(f"http keep-alive, {clients}", "http", LIBRARY_PEERS, "stdlib", pace.rounds, run)


def mqtt(pace: Pace) -> Work:
    """From a publish to the message's return, paho-mqtt with a broker that is nobody's of these."""

    def run(bench: Bench, peer: str) -> Figures:
        with Broker(bench) as broker:
            return run_library(bench, "mqtt-client", peer, broker.port, seconds=2 * pace.seconds)

    return Work("mqtt publish to receive", "mqtt", LIBRARY_PEERS, "stdlib", pace.rounds, run)


def plan(pace: Pace) -> list[Work]:
    """Everything this suite measures, in order."""
    return [
        *(echo(pace, 64, connections) for connections in (1, 64, 1_000)),
        *(bulk(pace, "down", block) for block in (64 * KIB, 1024 * KIB)),
        bulk(pace, "up", 64 * KIB),
        *(http(pace, clients) for clients in (1, 16)),
        mqtt(pace),
        idle(pace),
    ]


GOALS = [
    Goal("echo 64 B, 64", "rate", "bridge-inbox", "stdlib", 1.0),
    Goal("echo 64 B, 1000", "rate", "bridge-inbox", "stdlib", 1.5),
    Goal("bulk down, sends of 64 KiB", "mb", "bridge-threads", "pyopenssl", 0.6),
    Goal("bulk down, sends of 1024 KiB", "mb", "bridge-threads", "pyopenssl", 0.6),
    Goal("bulk up", "mb", "bridge-threads", "pyopenssl", 0.6),
    Goal("echo 64 B, 1", "p50", "bridge-dropin", "stdlib", 1.15, at_most=True),
    Goal("echo 64 B, 64", "rate", "bridge-dropin", "pyopenssl", 1.0),
    Goal("echo 64 B, 64", "rate", "bridge-dropin", "stdlib", 0.85),
    Goal("echo 64 B, 1000", "rate", "bridge-dropin", "stdlib", 0.7),
    Goal("http keep-alive, 1", "rate", "bridge-dropin", "stdlib", 0.8),
    Goal("http keep-alive, 16", "rate", "bridge-dropin", "stdlib", 0.85),
    Goal("mqtt publish to receive", "p50", "bridge-dropin", "stdlib", 1.3, at_most=True),
    Goal("idle sessions", "kb", "bridge-inbox", None, 30, at_most=True),
    Goal("idle sessions", "threads", "bridge-inbox", None, 0, at_most=True),
    Goal("idle sessions", "cpu_empty", "bridge-inbox", None, 0.05, at_most=True),
    Goal("idle sessions", "cpu_idle", "bridge-inbox", None, 0.05, at_most=True),
]
"""CPU is in percent of a core: what a thread that never wakes shows is exactly 0."""


def turns(work: Work, peers: list[str]) -> Iterator[tuple[int, str]]:
    """Round after round, every other one in reverse order, so that a drift of the machine hits all alike."""
    mine = [peer for peer in work.peers if peer in peers]
    for number in range(work.rounds):
        for peer in reversed(mine) if number % 2 else mine:
            yield number, peer


def take(bench: Bench, work: Work, peer: str, number: int, deadline: float) -> Sample:
    """One undisturbed sample or, from the monotonic *deadline* on, the best there is.  Raises Failed."""
    sample = Sample(work.name, peer, number, work.run(bench, peer))
    while sample.disturbed and time.monotonic() < deadline:
        again = Sample(work.name, peer, number, work.run(bench, peer))
        sample = min(sample, again, key=lambda s: float(s.figures["other_share"]))
    return sample


def measure(
    bench: Bench, works: list[Work], peers: list[str], deadline: float
) -> tuple[list[Sample], list[str]]:
    """Runs everything; what failed is told, noted, and not tried again in that work."""
    samples: list[Sample] = []
    failures: dict[tuple[str, str], str] = {}
    for work in works:
        for number, peer in turns(work, peers):
            if (work.name, peer) in failures:
                continue
            print(f"{work.name}: {peer}, round {number + 1} of {work.rounds}", file=sys.stderr)
            try:
                samples.append(take(bench, work, peer, number, deadline))
            except Failed as error:
                failures[work.name, peer] = str(error)
                print(f"  failed: {error}", file=sys.stderr)
    return samples, [f"{peer}, {work}: {shorten(why)}" for (work, peer), why in failures.items()]


def shorten(text: str) -> str:
    """The first and the last line: what happened, and what a traceback ends with."""
    lines = text.splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def describe(bench: Bench, pace: Pace) -> dict[str, Any]:
    """What the figures depend on."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    from OpenSSL import SSL

    bundled = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}",
        "tls-bridge": version("tls-bridge"),
        "pyOpenSSL": f"{version('pyOpenSSL')}, cryptography {version('cryptography')}",
        "OpenSSL": f"{bundled} in cryptography, {ssl.OPENSSL_VERSION} in stdlib ssl and asyncio",
        "cores": f"{os.cpu_count()}; server on {bench.server_core}, generator on {bench.load_core}",
        "load average at the start": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        "pace": f"{pace.rounds} rounds of {pace.seconds:g} s after {pace.warmup:g} s of warm-up",
        "idle sessions": f"{pace.idle_connections:,}, {pace.idle_rounds} rounds",
        "handler threads of bridge-inbox": bench.handlers,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short windows, 1,000 idle sessions; under two minutes on a quiet machine",
    )
    parser.add_argument("--rounds", type=int, help="override the number of rounds")
    parser.add_argument("--seconds", type=float, help="override the length of a measured window")
    parser.add_argument(
        "--patience", type=float, metavar="SECONDS", help="repeat disturbed samples for so long"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only works whose name contains TEXT")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--handlers", type=int, default=2, help="handler threads of bridge-inbox (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--server-core", type=int, help="default: the first core this process may use")
    parser.add_argument("--load-core", type=int, help="default: the last core this process may use")
    options = parser.parse_args()
    options.peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    return options


def pace_of(options: argparse.Namespace) -> Pace:
    pace = QUICK if options.quick else FULL
    if options.rounds:
        pace = dataclasses.replace(pace, rounds=options.rounds, idle_rounds=options.rounds)
    if options.patience is not None:
        pace = dataclasses.replace(pace, patience=options.patience)
    return dataclasses.replace(pace, seconds=options.seconds) if options.seconds else pace


def present(peers: list[str]) -> list[str]:
    """Without our own servers where the package is not installed, and says so."""
    if importlib.util.find_spec("bridge") is not None:
        return peers
    print("the package `bridge` is not installed here: measuring the others only", file=sys.stderr)
    return [peer for peer in peers if peer not in OURS]


def main() -> int:
    """Measures, prints, and returns the exit status."""
    options, began = arguments(), time.monotonic()
    pace = pace_of(options)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("only one core: server and generator share it, and no figure means much", file=sys.stderr)
    server_core = cores[0] if options.server_core is None else options.server_core
    load_core = cores[-1] if options.load_core is None else options.load_core
    works = [work for work in plan(pace) if options.only in work.name]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            bench = prepare(Path(folder), server_core, load_core, options.handlers)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
        about = describe(bench, pace)
        samples, failures = measure(bench, works, present(options.peers), began + pace.patience)
    about["took"] = f"{time.monotonic() - began:.0f} s"
    measured = {sample.work for sample in samples}
    kinds = {work.name: (work.kind, work.reference) for work in works if work.name in measured}
    print(markdown(samples, kinds, GOALS, about, failures))
    if options.json:
        everything = {
            "about": about,
            "samples": [dataclasses.asdict(s) for s in samples],
            "failures": failures,
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return int(any(failure.startswith(OURS) for failure in failures))


if __name__ == "__main__":
    sys.exit(main())
