"""CPython's own tests of ssl and of the modules on top of it, over our classes and at the same time over the stdlib's.

`cpython_runner.py` runs them; `cpython_expected.py` lists, with reasons, what may fail.  What fails over the stdlib's
classes too says nothing about ours and is only shown.  With BRIDGE_DROPIN_CONTROL=1 both are the stdlib's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpython_expected import FAILS, NOT_RUN, Exemption
from dropin_rig import CONTROL

import bridge

pytestmark = pytest.mark.usefixtures("default_bridge")

DEADLINE = 300.0
"""Seconds for the tests of one module."""
RUNNER = Path(__file__).with_name("cpython_runner.py")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "PYTHONPATH": str(Path(bridge.__file__).parents[1]),
}
MODULES = ["test_ssl", "test_httplib", "test_ftplib", "test_poplib", "test_imaplib", "test_urllib2_localnet"]


class Run:
    """How each test of a module ended, over one side's classes."""

    def __init__(self, printed: str) -> None:
        tests = json.loads(printed)["tests"]
        self.outcomes: dict[str, str] = {test["test"]: test["outcome"] for test in tests}
        self.details: dict[str, str] = {test["test"]: test["detail"] for test in tests}
        self.sockets: Counter[str] = sum((Counter(test["sockets"]) for test in tests), Counter())
        self.over_tls = {test["test"] for test in tests if test["sockets"]}

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(self.outcomes.values()).items())
        return f"{len(self.outcomes)} tests: {counts}; {len(self.over_tls)} over TLS, sockets {dict(self.sockets)}"


@contextlib.contextmanager
def running(module: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The runner under way in *folder*, which it has for itself."""
    folder.mkdir()
    options = [f"--not-run={exemption.pattern}" for exemption in NOT_RUN if exemption.applies]
    command = [sys.executable, str(RUNNER), *options, "--deadline", str(DEADLINE), module]
    with subprocess.Popen(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def run_both(module: str, folder: Path) -> tuple[Run, Run]:
    """The tests of *module* over our classes, and over the stdlib's; they mostly wait, so both at once."""
    with (
        running(module, folder / "ours") as ours,
        running(module, folder / "theirs", BRIDGE_DROPIN_CONTROL="1") as theirs,
    ):
        printed = [process.communicate(timeout=DEADLINE + 20)[0] for process in (ours, theirs)]
    return Run(printed[0]), Run(printed[1])


def verdict(name: str, ours: Run, theirs: Run, listed: list[Exemption]) -> str | None:
    """What is wrong with how the test *name* ended; None if nothing is."""
    outcome, reference = ours.outcomes.get(name, "gone"), theirs.outcomes.get(name, "gone")
    reasons = [exemption.reason for exemption in listed if exemption.covers(name)]
    if reference in ("fail", "error", "hang", "crash"):
        return None
    if outcome == "ok" and reasons:
        return f"{name} passes, and is listed: {reasons[0]}"
    if outcome == reference or (outcome in ("fail", "error") and reasons):
        return None
    return f"{name} ended with {outcome}, over the stdlib with {reference}\n{ours.details.get(name, '')}"


def problems(module: str, ours: Run, theirs: Run) -> list[str]:
    """Where our classes and the list do not agree."""
    listed = [] if CONTROL else [exemption for exemption in FAILS if exemption.applies]
    names = {**theirs.outcomes, **ours.outcomes}
    found = [problem for name in names if (problem := verdict(name, ours, theirs, listed))]
    for exemption in [*listed, *(exemption for exemption in NOT_RUN if exemption.applies)]:
        if exemption.pattern.startswith(f"{module}.") and not any(map(exemption.covers, names)):
            found.append(f"{exemption.pattern} is listed, and this Python has no such test")
    return found


@pytest.mark.timeout(DEADLINE + 60)
@pytest.mark.parametrize("module", MODULES)
def test_what_passes_over_the_stdlib_passes_over_our_classes(module: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(f"test.{module}") is None:
        pytest.skip(f"this Python comes without test.{module}")
    ours, theirs = run_both(module, tmp_path)
    print(f"{module} of Python {sys.version.split()[0]}")
    print(f"  over our classes: {ours}")
    print(f"  over the stdlib:  {theirs}")
    for name, outcome in theirs.outcomes.items():
        if outcome not in ("ok", "skip", "not run"):
            print(f"  fails over the stdlib too: {name}: {outcome}\n{theirs.details[name]}")
    found = problems(module, ours, theirs)
    assert not found, f"{len(found)} problems:\n" + "\n".join(found)
    assert ours.over_tls, "no test made an SSL socket"
    assert CONTROL or ours.sockets["ssl.SSLSocket"] == 0, "some were the stdlib's"
