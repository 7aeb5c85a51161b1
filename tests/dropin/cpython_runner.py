"""As a program: run one module of CPython's own tests, and print as JSON how each of its tests ended.

``python cpython_runner.py [options] test_ssl``

Our classes are injected before the module is imported; the environment variable BRIDGE_DROPIN_CONTROL leaves the
stdlib's in place.  The tests run in a child process.  A test that hangs or crashes ends that child, and another one
runs the tests that are left, so every test gets an outcome:

``ok``, ``skip``, ``fail``, ``error``
    as unittest has it (an expected failure is ok, an unexpected success is a failure)
``hang``
    not done after ``--seconds``; the detail is where its threads were
``crash``
    the process died in it
``not run``
    one of the ``--not-run`` patterns names it

For a look at single tests: ``--only '*.test_echo' --seconds 5 --log dump.txt``.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CONTROL = bool(os.environ.get("BRIDGE_DROPIN_CONTROL"))
RESOURCES = ["cpu"]
"""What the tests may use: not the network, and no minutes of waiting (walltime)."""
DETAIL_LINES = 16


def test_name(test: Any) -> str:
    """The id of *test* without the package's name: ``test_ssl.ThreadedTests.test_echo``."""
    name: str = test.id()
    return name.replace("test.test_", "test_")


def matches(name: str, patterns: list[str]) -> bool:
    """Whether one of *patterns* covers *name*."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def last_lines(text: str) -> str:
    """The end of *text*, where a traceback says what happened."""
    return "\n".join(text.rstrip().splitlines()[-DETAIL_LINES:])


# ── the child: runs tests ──


class Sockets(Counter[str]):
    """How many SSL sockets were made, or were about to be, by their class."""

    def watch(self, owner: Any) -> None:
        """Count what the class *owner* creates, if it has a way of its own to do that."""
        if "_create" not in vars(owner):
            return
        original = vars(owner)["_create"].__func__

        def counting(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if cls is owner or "_create" not in vars(cls):  # else it is counted where cls is the owner
                self[f"{cls.__module__}.{cls.__qualname__}"] += 1
            return original(cls, *args, **kwargs)

        owner._create = classmethod(counting)


class Result(unittest.TestResult):
    """Writes each outcome into a journal (a line of JSON each) that outlives the process; ends tests that hang."""

    def __init__(self, journal: IO[str], sockets: Sockets, seconds: float) -> None:
        super().__init__()
        self._journal = journal
        self._sockets = sockets
        self._seconds = seconds
        self._running = False
        self._begin()

    def _begin(self) -> None:
        self._outcome, self._detail = "ok", ""
        self._before = Counter(self._sockets)
        self._started = time.monotonic()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._begin()
        self._running = True
        self.write(test=test_name(test))
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def stopTest(self, test: unittest.TestCase) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._running = False
        self._write_outcome(test)
        super().stopTest(test)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._settle(test, "fail", "".join(traceback.format_exception(*err)))

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self._settle(test, "error", "".join(traceback.format_exception(*err)))

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._settle(test, "skip", reason)

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._settle(test, "fail", "unexpected success")

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            outcome = "fail" if issubclass(err[0], test.failureException) else "error"
            self._settle(test, outcome, f"{subtest}\n" + "".join(traceback.format_exception(*err)))

    def _settle(self, test: unittest.TestCase, outcome: str, detail: str) -> None:
        """The first failure counts.  What happens outside a test, in a fixture, is an outcome of its own."""
        if not self._running:
            self._begin()
        if self._outcome == "ok" or (self._outcome == "skip" and outcome != "skip"):
            self._outcome, self._detail = outcome, last_lines(detail)
        if not self._running:
            self._write_outcome(test)

    def _write_outcome(self, test: unittest.TestCase) -> None:
        self.write(
            test=test_name(test),
            outcome=self._outcome,
            detail=self._detail,
            sockets=dict(self._sockets - self._before),
            seconds=round(time.monotonic() - self._started, 2),
        )

    def write(self, **entry: Any) -> None:
        """Append *entry* to the journal."""
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()


def inject(sockets: Sockets) -> None:
    """Put our classes in place, with the bridge up before a test looks which threads there are."""
    import ssl

    sockets.watch(ssl.SSLSocket)
    if not CONTROL:
        from bridge import ssl as ours

        ours.inject()
        ours.default_bridge()
        sockets.watch(ours.SSLSocket)


def flat(suite: unittest.TestSuite) -> Iterator[Any]:
    """Every test in *suite*, which is suites in suites."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def run_tests(options: argparse.Namespace) -> None:
    """Run those of the module's tests that are not in the journal yet."""
    sockets = Sockets()
    inject(sockets)
    support: Any = importlib.import_module("test.support")
    support.use_resources = RESOURCES
    module = importlib.import_module(f"test.{options.module}")
    with open(options.journal, "r+", encoding="utf-8") as journal:
        done = {entry["test"] for entry in map(json.loads, journal) if "test" in entry}
        result = Result(journal, sockets, options.seconds)
        suite = unittest.TestSuite()
        for test in flat(unittest.defaultTestLoader.loadTestsFromModule(module)):
            name = test_name(test)
            if name in done or not matches(name, options.only):
                continue
            if matches(name, options.not_run):
                result.write(test=name, outcome="not run", detail="", sockets={}, seconds=0)
            else:
                suite.addTest(test)
        suite.run(result)
        result.write(end=True)


# ── the parent: sees that every test gets an outcome ──


def run_child(arguments: list[str], journal: Path, seconds: float) -> tuple[str, str]:
    """Run tests in a new process until it ends, at most *seconds*; how a test ended if it did not, and stderr."""
    command = [sys.executable, "-X", "faulthandler", "-W", "default", __file__, *arguments]
    command += ["--journal", str(journal)]
    with tempfile.TemporaryFile("w+", dir=journal.parent, errors="replace") as log:
        try:
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=log, timeout=max(0.0, seconds))
            outcome = "crash"
        except subprocess.TimeoutExpired:
            outcome = "hang"
        log.seek(0)
        said = log.read()
    return ("hang" if "Timeout (" in said else outcome), said


def where(said: str) -> str:
    """What a child that died said last; of a dump of its threads, where the crashed or the main one was."""
    for mark in ("Current thread 0x", "Thread 0x"):
        _, found, thread = said.rpartition(mark)
        if found:
            return "\n".join(thread.splitlines()[1 : DETAIL_LINES + 1])
    return last_lines(said)


def supervise(arguments: list[str], options: argparse.Namespace, journal: Path) -> list[dict[str, Any]]:
    """Run children until one of them comes to the end of the module; every test with its outcome."""
    deadline = time.monotonic() + options.deadline
    journal.touch()
    while True:
        outcome, said = run_child(arguments, journal, deadline - time.monotonic())
        if options.log:
            with open(options.log, "a", encoding="utf-8") as log:
                log.write(said)
        entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        outcomes = [entry for entry in entries if "outcome" in entry]
        if any("end" in entry for entry in entries):
            return outcomes
        settled = {entry["test"] for entry in outcomes}
        culprits = [entry["test"] for entry in entries if entry["test"] not in settled]
        late = time.monotonic() >= deadline
        if late or not culprits:
            culprits.append(options.module)
        with journal.open("a", encoding="utf-8") as file:
            for name in culprits:
                entry = {"test": name, "outcome": outcome, "detail": where(said), "sockets": {}, "seconds": 0}
                file.write(json.dumps(entry) + "\n")
                outcomes.append(entry)
        if options.module in culprits:
            return outcomes


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", help="test_ssl, for example")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="run the tests that match")
    parser.add_argument("--not-run", action="append", default=[], metavar="PATTERN", help="leave these out")
    parser.add_argument("--seconds", type=float, default=20, help="for one test (default 20)")
    parser.add_argument("--deadline", type=float, default=600, help="seconds for all of them (default 600)")
    parser.add_argument("--log", help="append what the tests write to stderr to this file")
    parser.add_argument("--journal", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = options.only or ["*"]
    return options


def main() -> None:
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.journal:
        run_tests(options)
        sys.stderr.flush()
        os._exit(0)  # a test that failed may have left a thread that never ends
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # which ends the child too
    with tempfile.TemporaryDirectory() as folder:
        tests = supervise(arguments, options, Path(folder) / "journal")
    json.dump({"python": sys.version.split()[0], "control": CONTROL, "tests": tests}, sys.stdout, indent=1)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: nothing in it is to be imported by the tests
    main()
