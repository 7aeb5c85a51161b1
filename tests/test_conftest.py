"""What tests/conftest.py does for every test, in a run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

WAITS = """
import threading, pytest
{mark}
def test_waits():
    threading.Event().wait(0.5)
"""

HANGS = """
import conftest, pytest, threading
conftest.TEARDOWN_PATIENCE = 0.5
@pytest.fixture
def never_taken_down():
    yield
    threading.Event().wait()
def test_fails(never_taken_down):
    assert False
"""


def run(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    """*tests* in a run of their own in *folder*."""
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-p", "conftest", *options]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(("mark", "dumped"), [("", True), ("@pytest.mark.timeout(30)", False)])
def test_a_test_that_may_take_long_is_not_dumped_while_it_computes(
    tmp_path: Path, mark: str, dumped: bool
) -> None:
    """The dump ended the interpreter (CPython 3.13.0, segmentation fault) under a test that computed for 50 s."""
    ran = run(tmp_path, WAITS.format(mark=mark), "-o", "faulthandler_timeout=0.1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ("Timeout (0:00:00" in ran.stderr) is dumped


def test_a_failed_test_that_is_never_taken_down_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """pytest-timeout has stopped its timer by then, and one such test held up a whole run."""
    ran = run(tmp_path, HANGS, "--capture=no")
    assert ran.returncode == 1
    assert "Timeout (0:00:00.5" in ran.stderr and "test_it.py" in ran.stderr
