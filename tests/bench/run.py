"""The benchmark suite: `python tests/bench/run.py [--quick]`, where the package is installed.

A load generator in C on one core, one server at a time on another, all over TLS 1.3 on 127.0.0.1.
Peers take turns, round after round and in alternating order, each in a fresh process.  A Markdown report
goes to stdout, progress to stderr, and everything measured to a JSON file on request.  Nothing here fails
because a figure is low; the exit status is 1 when one of our own servers could not be measured at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import Bench, Failed, prepare
from report import Result, Sample, markdown
from works import FULL, GOALS, OURS, PEERS, QUICK, Pace, Work, missing, select


def turns(works: list[Work], peers: list[str], rounds: int) -> Iterator[tuple[int, Work, str]]:
    """Round after round, every other one in reverse order, so that a drift of the machine hits all alike."""
    for number in range(rounds):
        for work in works:
            if number < work.rounds:
                mine = [peer for peer in work.peers if peer in peers]
                for peer in reversed(mine) if number % 2 else mine:
                    yield number, work, peer


def take(bench: Bench, work: Work, peer: str, number: int, deadline: float) -> Sample:
    """One undisturbed sample or, from the monotonic *deadline* on, the best there is.  Raises Failed."""
    sample = Sample(work.name, peer, number, work.run(bench, peer))
    while sample.disturbed and time.monotonic() < deadline:
        again = Sample(work.name, peer, number, work.run(bench, peer))
        sample = min(sample, again, key=lambda s: float(s.figures["other_share"]))
    return sample


def measure(
    bench: Bench, works: list[Work], peers: list[str], pace: Pace, began: float
) -> tuple[list[Sample], list[str]]:
    """Runs everything; what failed is told, noted, and not tried again in that work."""
    samples: list[Sample] = []
    failures: dict[tuple[str, str], str] = {}
    for number, work, peer in turns(works, peers, pace.rounds):
        if (work.name, peer) in failures:
            continue
        if time.monotonic() > began + pace.budget:
            print(f"{pace.budget:g} s are over: the rest is left out", file=sys.stderr)
            break
        print(f"{work.name}: {peer}, round {number + 1}", file=sys.stderr)
        try:
            samples.append(take(bench, work, peer, number, began + pace.patience))
        except Failed as error:
            failures[work.name, peer] = str(error)
            print(f"  failed: {error}", file=sys.stderr)
    return samples, [f"{peer}, {work}: {shorten(why)}" for (work, peer), why in failures.items()]


def shorten(text: str) -> str:
    """The first and the last line: what happened, and what a traceback ends with."""
    lines = text.splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def version(name: str) -> str:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str:
    """Of the source tree this file is in."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(bench: Bench, pace: Pace) -> dict[str, Any]:
    """What the figures depend on."""
    from OpenSSL import SSL

    bundled = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()
    others = ("uvloop", "Twisted", "gevent", "trio", "cheroot")
    budget = "" if pace.budget == float("inf") else f"; no run begins after {pace.budget:g} s"
    with Path("/proc/cpuinfo").open() as lines:
        models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}",
        "tls-bridge": f"{version('tls-bridge')}, revision {revision()}",
        "pyOpenSSL": f"{version('pyOpenSSL')}, cryptography {version('cryptography')}",
        "OpenSSL": f"{bundled} in cryptography, {ssl.OPENSSL_VERSION} in stdlib ssl and asyncio",
        "others": ", ".join(f"{name} {version(name)}" for name in others),
        "processor": ", ".join(models) or platform.machine(),
        "cores": f"{os.cpu_count()}; server on {bench.server_core}, generator on {bench.load_core}, "
        f"servers with two workers on {bench.two_cores}",
        "load average at the start": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        "pace": f"{pace.rounds} rounds of {pace.seconds:g} s after {pace.warmup:g} s of warm-up{budget}",
        "handler threads of bridge-inbox": bench.handlers,
    }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or *words* in its place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="short windows, and without --only a part of it: two minutes")
    add("--list", action="store_true", help="say what could be measured, and end")
    add("--only", default="", metavar="A,B", help="only these works; echo-64 means all that begin with it")
    add("--peers", default=",".join(PEERS), metavar="A,B", help=f"some of {','.join(PEERS)}")
    add("--rounds", type=int, help="override the number of rounds")
    add("--seconds", type=float, help="override the length of a measured window")
    add("--budget", type=float, metavar="SECONDS", help="begin no run after so long")
    add("--patience", type=float, metavar="SECONDS", help="repeat disturbed samples for so long")
    add("--handlers", type=int, default=2, help="handler threads of bridge-inbox (default 2)")
    add("--server-core", type=int, help="default: the first core this process may use")
    add("--load-core", type=int, help="default: the last core this process may use")
    add("--from", dest="sources", type=Path, nargs="+", metavar="FILE", help="measure nothing: report these")
    add("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    add("--markdown", type=Path, metavar="FILE", help="write the report to FILE too")
    add("--plots", type=Path, metavar="DIR", help="draw SVG files in DIR (needs matplotlib)")
    options = parser.parse_args(words)
    options.peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    options.works = select(QUICK if options.quick else FULL, options.quick, options.only)
    if not options.works:
        parser.error(f"no work is called {options.only}: see --list")
    return options


def pace_of(options: argparse.Namespace) -> Pace:
    """The pace that the options ask for."""
    pace = QUICK if options.quick else FULL
    asked = {
        name: getattr(options, name)
        for name in ("rounds", "seconds", "budget", "patience")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(pace, **asked)


def present(peers: list[str]) -> list[str]:
    """Without those that cannot run here, and says so."""
    without = missing(peers)
    for peer, package in without.items():
        print(f"{peer} is left out: the package `{package}` is not installed here", file=sys.stderr)
    return [peer for peer in peers if peer not in without]


def new_result(options: argparse.Namespace) -> Result:
    """Measures.  Raises Failed."""
    began, pace = time.monotonic(), pace_of(options)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("only one core: server and generator share it, and no figure means much", file=sys.stderr)
    server_core = cores[0] if options.server_core is None else options.server_core
    load_core = cores[-1] if options.load_core is None else options.load_core
    works = select(pace, options.quick, options.only)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = prepare(Path(folder), server_core, load_core, options.handlers)
        about = describe(bench, pace)
        samples, failures = measure(bench, works, present(options.peers), pace, began)
    about["took"] = f"{time.monotonic() - began:.0f} s"
    measured = {sample.work for sample in samples}
    kinds = {work.name: (work.title, work.kind, work.reference) for work in works if work.name in measured}
    return Result(about, kinds, samples, failures)


def main() -> int:
    """Measures, prints, and returns the exit status."""
    options = arguments()
    if options.list:
        print("\n".join(f"{work.name:18}{work.title}" for work in options.works))
        return 0
    try:
        result = Result.merged(options.sources) if options.sources else new_result(options)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    text = markdown(result, GOALS)
    print(text)
    if options.json:
        result.save(options.json)
    if options.markdown:
        options.markdown.write_text(text)
    if options.plots:
        from plots import draw

        draw(result, options.plots)
    return int(any(failure.startswith(OURS) for failure in result.failures))


if __name__ == "__main__":
    sys.exit(main())
