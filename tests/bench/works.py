"""What the suite measures, and what the project promised of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable

from harness import (
    Bench,
    Broker,
    Server,
    run_half_open,
    run_http,
    run_idle,
    run_library,
    run_load,
    run_vanish,
)
from report import Figures, Goal

KIB = 1024
OURS = ("bridge-inbox", "bridge-threads", "bridge-dropin")
PEERS = (
    "c",
    "stdlib",
    "pyopenssl",
    "asyncio",
    "asyncio-streams",
    "uvloop",
    "twisted",
    "gevent",
    "trio",
    *OURS,
)
QUICK_PEERS = ("c", "stdlib", "pyopenssl", "asyncio", *OURS)
NEEDS = {
    "uvloop": "uvloop",
    "twisted": "twisted",
    "gevent": "gevent",
    "trio": "trio",
    "pyopenssl": "OpenSSL",
    **dict.fromkeys(OURS, "bridge"),
}
"""Which package a peer is made of; the rest is always there."""

STREAMS = tuple(peer for peer in PEERS if peer != "bridge-inbox")
DUPLEX = tuple(peer for peer in STREAMS if peer not in ("stdlib", "pyopenssl"))
"""Where one session may be read and written at once; two threads in one stdlib or pyOpenSSL object is no program."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long and how often."""

    rounds: int
    seconds: float
    warmup: float
    budget: float
    """Seconds after which no further run begins: each work has its first round before any has its second."""
    patience: float
    """A disturbed sample is repeated in the first so many seconds."""
    crowds: tuple[int, ...]
    """How many sessions are idle."""
    storm: int
    """How many clients stop half-way, or vanish."""


QUICK = Pace(rounds=3, seconds=0.25, warmup=0.1, budget=95, patience=20, crowds=(1_000,), storm=1_000)
FULL = Pace(
    rounds=5,
    seconds=2.0,
    warmup=0.5,
    budget=float("inf"),
    patience=600,
    crowds=(100, 1_000, 10_000),
    storm=5_000,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing to measure: *run* makes one sample of one peer.  *rounds* are at most so many."""

    name: str
    title: str
    kind: str
    peers: tuple[str, ...]
    reference: str
    run: Callable[[Bench, str], Figures]
    rounds: int = 1_000


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number > 1)}"


def share_of_others(figures: Figures) -> Figures:
    """Adds which share of the whole machine was used by neither the server nor the generator."""
    share = figures["other_cpu"] / figures["seconds"] / (os.cpu_count() or 1)
    return {**figures, "other_share": max(0.0, round(share, 4))}


def loaded(
    role: str, mode: str, pace: Pace, server: dict[str, object], **load: float
) -> Callable[[Bench, str], Figures]:
    """A run of one server in *role*, under a generator in *mode*."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, role, **server) as running:
            figures = run_load(bench, running, mode, seconds=pace.seconds, warmup=pace.warmup, **load)
            return share_of_others(figures)

    return run


def echo(pace: Pace, size: int, connections: int) -> Work:
    """*connections* clients, each with one message of *size* bytes on its way at a time.

    Ten thousand get longer: a server's first answer to each of them can take it seconds.
    """
    if connections >= 10_000:
        pace = dataclasses.replace(pace, seconds=3 * pace.seconds, warmup=6 * pace.warmup)
    run = loaded("echo", "echo", pace, {}, size=size, connections=connections)
    title = f"Echo of {size:,} B, {plural(connections, 'connection')}"
    return Work(f"echo-{size}-{connections}", title, "echo", PEERS, "stdlib", run)


def lines(pace: Pace, sessions: int) -> Work:
    """Messages of 100 bytes from 4 sender threads (tasks, greenlets) that share *sessions* sessions."""
    run = loaded("lines", "lines", pace, {"sessions": sessions}, connections=sessions)
    title = f"Pipelined lines of 100 B, 4 senders on {plural(sessions, 'session')}"
    return Work(f"lines-{sessions}", title, "lines", STREAMS, "stdlib", run)


def bulk(pace: Pace, mode: str, block: int) -> Work:
    """One connection; *block* is what a server that sends passes to one send."""
    role = {"down": "source", "up": "sink", "both": "both"}[mode]
    run = loaded(role, mode, pace, {"block": block})
    if mode == "both":
        return Work("bulk-both", "Bulk, both ways at once on one session", "both", DUPLEX, "asyncio", run)
    if mode == "up":
        return Work("bulk-up", "Bulk, to the server", "bulk", STREAMS, "pyopenssl", run)
    name, title = f"bulk-down-{block // KIB}", f"Bulk, from the server, sends of {block // KIB:,} KiB"
    return Work(name, title, "bulk", STREAMS, "pyopenssl", run)


def handshakes(pace: Pace, mode: str, workers: int, identity: str = "rsa2048") -> Work:
    """Clients that connect, shake hands, make one round trip of 64 B and go, 64 at a time.

    RSA's signature costs the server more than it costs the generator to verify; of 4,096 bits so much more that
    a server on two cores is the limit even where the generator shares one of them.
    """

    def run(bench: Bench, peer: str) -> Figures:
        cores = bench.two_cores if workers == 2 else str(bench.server_core)
        options: dict[str, object] = {"workers": workers, "cores": cores, "identity": identity}
        measured = loaded("echo", mode, pace, options, connections=64, size=64)
        return measured(bench, peer)

    kind = "New" if mode == "new" else "Resumed"
    title = f"{kind} sessions, {plural(workers, 'worker')} on {plural(workers, 'core')}"
    if mode == "new":
        title += f", {identity.upper()}"
    name = f"{mode}-{workers}" + "-4096" * (identity == "rsa4096")
    return Work(name, title, "handshakes", PEERS, "asyncio", run)


def idle(pace: Pace, connections: int) -> Work:
    """What sessions cost that do nothing, and what they cost those that do something."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "echo") as server:
            return share_of_others(run_idle(bench, server, connections, pace.seconds))

    title = f"{connections:,} idle sessions, and 50 that echo 64 B"
    return Work(f"idle-{connections}", title, "idle", PEERS, "stdlib", run, rounds=2)


def half_open(pace: Pace) -> Work:
    """The first honest client behind many that say half a ClientHello and no more."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "echo") as server:
            return run_half_open(bench, server, pace.storm)

    title = f"The first client behind {pace.storm:,} half-open handshakes"
    return Work(f"half-open-{pace.storm}", title, "half-open", PEERS, "stdlib", run, rounds=3)


def vanish(pace: Pace) -> Work:
    """Clients that all are gone at once, without a word."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, "echo") as server:
            return run_vanish(bench, server, pace.storm)

    title = f"The first client after {pace.storm:,} have vanished"
    return Work(f"vanish-{pace.storm}", title, "vanish", PEERS, "stdlib", run, rounds=3)


def http(pace: Pace, server: str, clients: int) -> Work:
    """Requests on *clients* connections that stay, by wrk, or where there is none by `http.client`."""

    def run(bench: Bench, peer: str) -> Figures:
        with Server(bench, peer, server) as running:
            return share_of_others(run_http(bench, running, clients, 2 * pace.seconds, pace.warmup))

    name = "http.server" if server == "http-server" else server
    title = f"{name}, keep-alive, {plural(clients, 'client')}"
    return Work(f"{name}-{clients}", title, "http", ("stdlib", "bridge-dropin"), "stdlib", run)


def mqtt(pace: Pace) -> Work:
    """From a publish to the message's return, paho-mqtt with a broker that is nobody's of these."""

    def run(bench: Bench, peer: str) -> Figures:
        with Broker(bench) as broker:
            return run_library(bench, "mqtt-client", peer, broker.port, seconds=2 * pace.seconds)

    return Work("mqtt", "MQTT, publish to receive", "mqtt", ("stdlib", "bridge-dropin"), "stdlib", run)


def plan(pace: Pace) -> list[Work]:
    """Everything this suite measures, in order."""
    return [
        *(echo(pace, 64, connections) for connections in (1, 64, 1_000)),
        *(echo(pace, 4 * KIB, connections) for connections in (1, 64, 1_000)),
        *(lines(pace, sessions) for sessions in (1, 64)),
        *(bulk(pace, "down", block) for block in (64 * KIB, 1024 * KIB)),
        bulk(pace, "up", 64 * KIB),
        bulk(pace, "both", 64 * KIB),
        *(handshakes(pace, mode, workers) for mode in ("new", "resume") for workers in (1, 2)),
        handshakes(pace, "new", 2, "rsa4096"),
        *(http(pace, server, clients) for server in ("http-server", "cheroot") for clients in (1, 16)),
        mqtt(pace),
        half_open(pace),
        vanish(pace),
        *(idle(pace, connections) for connections in pace.crowds),
        *(echo(pace, 64, connections) for connections in (10, 100, 10_000)),
    ]


QUICK_WORKS = {
    "echo-64-1": QUICK_PEERS,
    "echo-64-64": QUICK_PEERS,
    "echo-64-1000": QUICK_PEERS,
    "lines-1": ("stdlib", "bridge-threads"),
    "lines-64": ("stdlib", "bridge-threads"),
    "bulk-down-64": ("c", "stdlib", "pyopenssl", "asyncio", "bridge-threads", "bridge-dropin"),
    "bulk-up": ("c", "stdlib", "pyopenssl", "asyncio", "bridge-threads", "bridge-dropin"),
    "bulk-both": ("c", "asyncio", "bridge-threads", "bridge-dropin"),
    "new-2": ("c", "asyncio", "bridge-inbox"),
    "resume-2": ("c", "asyncio", "bridge-inbox"),
    "http.server-16": ("stdlib", "bridge-dropin"),
    "half-open-1000": ("stdlib", "asyncio", "bridge-inbox"),
    "vanish-1000": ("stdlib", "asyncio", "bridge-inbox"),
    "idle-1000": ("stdlib", "asyncio", "bridge-inbox"),
}
"""What two minutes have room for."""


def select(pace: Pace, quick: bool, only: str) -> list[Work]:
    """The works that *only* names, comma-separated: ``echo-64`` is also ``echo-64-1`` and ``echo-64-1000``.

    Without names all of them or, when it must be *quick*, those that make or break the goals.
    """
    works = plan(pace)
    names = [name for name in only.split(",") if name]
    if names:
        return [work for work in works if any(f"{work.name}-".startswith(f"{name}-") for name in names)]
    if quick:
        return [
            dataclasses.replace(work, peers=QUICK_WORKS[work.name])
            for work in works
            if work.name in QUICK_WORKS
        ]
    return works


def missing(peers: list[str]) -> dict[str, str]:
    """Which of *peers* cannot run here, and for want of what."""
    return {
        peer: NEEDS[peer] for peer in peers if peer in NEEDS and importlib.util.find_spec(NEEDS[peer]) is None
    }


def _goals() -> list[Goal]:
    inbox, threads, dropin = OURS
    at_64, at_1000, alone = "echo-64-64", "echo-64-1000", "echo-64-1"
    goals = [
        Goal(at_64, "rate", inbox, "stdlib", 1.25),
        Goal(at_64, "rate", inbox, "asyncio", 1.6),
        Goal(at_64, "rate", inbox, "c", 0.8, dream=True),
        Goal(at_1000, "rate", inbox, "stdlib", 2.2),
        Goal(at_1000, "rate", inbox, "asyncio", 1.8),
        Goal(at_1000, "rate", inbox, inbox, 0.9, reference_work=at_64),
        Goal(at_1000, "rate", inbox, "c", 0.8, dream=True),
        Goal(alone, "p50", inbox, "stdlib", 1.45, at_most=True),
        Goal(alone, "p50", inbox, "stdlib", 1.1, at_most=True, dream=True),
        Goal(alone, "p50", threads, "stdlib", 1.3, at_most=True),
        Goal(alone, "p50", threads, "stdlib", 1.0, at_most=True, dream=True),
        Goal(at_64, "rate", threads, "stdlib", 0.8),
        Goal(at_64, "rate", threads, "stdlib", 1.0, dream=True),
        Goal(at_1000, "rate", threads, "stdlib", 0.6),
        Goal(at_1000, "rate", threads, "stdlib", 1.0, dream=True),
    ]
    for work in ("lines-1", "lines-64"):
        goals += [
            Goal(work, "rate", threads, "stdlib", 5),
            Goal(work, "rate", threads, "stdlib", 10, dream=True),
        ]
    for work in ("bulk-down-64", "bulk-up"):
        goals += [
            Goal(work, "mb", threads, "pyopenssl", 0.9),
            Goal(work, "mb", threads, "asyncio", 1.3),
            Goal(work, "mb", threads, "stdlib", 1.0, dream=True),
        ]
    goals += [
        Goal("bulk-both", "mb", threads, "asyncio", 1.3),
        Goal("bulk-both", "mb", threads, "asyncio", 1.8, dream=True),
        Goal("new-2", "rate", inbox, "asyncio", 1.4),
        Goal("new-2", "rate", inbox, "asyncio", 1.8, dream=True),
        Goal("idle-10000", "kb", inbox, None, 26, at_most=True),
        Goal("idle-10000", "kb", inbox, None, 20, at_most=True, dream=True),
        Goal("idle-10000", "p99", inbox, "stdlib", 1.0, at_most=True),
        Goal("idle-10000", "p99", inbox, "asyncio", 1.0, at_most=True),
        Goal("idle-10000", "p99", inbox, "stdlib", 0.5, at_most=True, dream=True),
        Goal("idle-10000", "p99", inbox, "asyncio", 0.5, at_most=True, dream=True),
        Goal("idle-10000", "threads", inbox, None, 0, at_most=True),
        Goal("idle-10000", "cpu_idle", inbox, None, 0.05, at_most=True),
        Goal("half-open-5000", "first", inbox, None, 2_000, at_most=True),
        Goal("half-open-5000", "first", inbox, None, 1_000, at_most=True, dream=True),
        Goal("vanish-5000", "first", inbox, None, 500, at_most=True),
        Goal("vanish-5000", "first", inbox, None, 250, at_most=True, dream=True),
        Goal(alone, "p50", dropin, "stdlib", 1.15, at_most=True),
        Goal(at_64, "rate", dropin, "stdlib", 0.85),
        Goal(at_64, "rate", dropin, "pyopenssl", 1.0),
        Goal(at_1000, "rate", dropin, "stdlib", 0.7),
        Goal("http.server-1", "rate", dropin, "stdlib", 0.8),
        Goal("http.server-16", "rate", dropin, "stdlib", 0.85),
        Goal("mqtt", "p50", dropin, "stdlib", 1.3, at_most=True),
    ]
    return goals


GOALS = _goals()
"""CPU is in percent of a core: what a thread that never wakes shows is exactly 0."""
