"""The tests can fail: each planted fault is noticed by a test of the normal run, which passes without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

TESTS = Path(__file__).parent
NOTICED_BY = {
    "leak": "test_lifecycle.py::test_closing_a_bridge_ends_every_thread_and_descriptor",
    "hang": "test_ends.py::test_a_close_that_the_peer_answers",
    "swallowed_alert": "test_ends.py::test_the_alert_of_a_server_reaches_our_caller",
    "corrupted_byte": "test_interop.py::test_half_close_lets_the_stdlib_go_on",
    "ragged_eof_taken_as_clean": "test_interop.py::test_a_connection_cut_off_is_truncated",
    "unbounded_inbox": "test_flow_control.py::test_a_reader_that_stops_stops_the_peer_within_bounds_and_then_gets_every"
    "_byte",
    "unbounded_outbox": "test_flow_control.py::test_a_message_without_room_is_not_sent_at_all",
    "lost_wake_up_of_a_thread": "test_threads.py::test_with_one_receiver_the_messages_of_each_sender_come_in_order",
    "lost_wake_up_inside_openssl": "test_full_duplex.py::test_we_renegotiate_under_load",
    "second_owner": "test_stream.py::test_two_threads_are_never_inside_at_once",
}


def run(test: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    # From the first failure on nothing more is run; what hangs is ended after ten seconds.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "faults", "--timeout", "10"]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / test)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"BRIDGE_FAULT": fault, "PYTHONPATH": path}
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=200
    )


def test_every_fault_has_a_test() -> None:
    assert set(NOTICED_BY) == set(FAULTS)


@pytest.mark.parametrize("fault", NOTICED_BY)
def test_a_planted_fault_is_noticed(fault: str) -> None:
    test = NOTICED_BY[fault]
    without = run(test)
    assert without.returncode == 0, without.stdout
    planted = run(test, fault)
    noticed = planted.returncode == 1 and ("FAILED" in planted.stdout or "ERROR" in planted.stdout)
    hung = "Timeout" in planted.stdout + planted.stderr
    assert noticed or hung, planted.stdout[-2000:] + planted.stderr[-2000:]
