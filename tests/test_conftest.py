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


@pytest.mark.parametrize(("mark", "dumped"), [("", True), ("@pytest.mark.timeout(30)", False)])
def test_a_test_that_may_take_long_is_not_dumped_while_it_computes(
    tmp_path: Path, mark: str, dumped: bool
) -> None:
    """The dump ended the interpreter (CPython 3.13.0, segmentation fault) under a test that computed for 50 s."""
    (tmp_path / "test_it.py").write_text(WAITS.format(mark=mark))
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-o", "faulthandler_timeout=0.1"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert ("Timeout (0:00:00" in run.stderr) is dumped
