"""What every test stands on: certificates, peers to talk to, and the guard that nothing outlives a test."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import shutil
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from peers import Background
from structlog.testing import capture_logs

from bridge.poll import my_sleeper

pytest_plugins = ["dropin_rig", "rig"]

LEAK_PATIENCE = 5.0
"""Seconds that threads and descriptors have to end after their test did."""

TEARDOWN_PATIENCE = 60.0
"""Seconds that a failed test has to take down what it has set up."""

SCHEDULES = 300
"""Lockstep schedules of a test, unless the command line has another number."""

my_sleeper()  # the main thread's bed, which it keeps: made before anybody counts descriptors

_PASSED = pytest.StashKey[bool]()
_FDS = Path("/proc/self/fd")
_KEPT_BY_OTHERS = ("/dev/", "/proc/", "/sys/")  # opened once and kept, by the interpreter and by hypothesis


# ── options and markers ──


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bridge")
    group.addoption(
        "--schedules",
        type=int,
        metavar="N",
        help=f"lockstep schedules, counted from --seed (default {SCHEDULES})",
    )
    group.addoption(
        "--seed", type=int, metavar="S", help="the first lockstep schedule; without --schedules, the only one"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "seeds" in getattr(item, "fixturenames", ()):
            item.add_marker("lockstep")


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: a collection during one of them need not look at the others."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """faulthandler's dump may end the interpreter while threads compute (it does not take the GIL): it is for hangs.

    A test that says that it takes long has pytest-timeout's only.
    """
    if item.get_closest_marker("timeout"):
        faulthandler.cancel_dump_traceback_later()


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """A failed test has no timer any more, be it pytest-timeout's, and what it has left may hang its teardown."""
    if isinstance(node, pytest.Item) and not node.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(TEARDOWN_PATIENCE, exit=True, file=sys.__stderr__)


def pytest_runtest_logfinish() -> None:
    """It was taken down."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    """Whatever a test has configured, by `capture_logs` too, which leaves the default of printing all."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """What is logged during the test."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> range:
    """The seeds a lockstep test runs."""
    first: int | None = request.config.getoption("--seed")
    count: int | None = request.config.getoption("--schedules")
    if count is None:
        count = SCHEDULES if first is None else 1
    return range(first or 0, (first or 0) + count)


# ── nothing outlives a test ──


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture(autouse=True)
def nothing_outlives_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a thread, or on Linux a file descriptor, behind."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    deadline = time.monotonic() + LEAK_PATIENCE
    leaked = [f"thread {thread.name!r}" for thread in _surviving_threads(threads, deadline)]
    if request.node.stash.get(_PASSED, False):  # a failure's traceback keeps frames alive, and their sockets
        leaked += [f"fd {fd} -> {target}" for fd, target in _surviving_descriptors(descriptors, deadline)]
    if leaked:
        pytest.fail("outlived the test: " + ", ".join(leaked), pytrace=False)


def _surviving_threads(before: set[threading.Thread], deadline: float) -> list[threading.Thread]:
    new = [thread for thread in threading.enumerate() if thread not in before]
    for thread in new:
        if not isinstance(thread, threading._DummyThread):
            thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in new if thread.is_alive()]


def _surviving_descriptors(before: set[tuple[int, str]], deadline: float) -> list[tuple[int, str]]:
    """What is open and was not *before*, once garbage is collected and older threads have had a while."""
    new = _descriptors() - before
    if new:
        gc.collect()
    pause = threading.Event()
    while (new := new & _descriptors()) and time.monotonic() < deadline:
        pause.wait(0.01)
    return sorted(new)


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir(_FDS) if _FDS.is_dir() else ():
        try:
            target = os.readlink(_FDS / name)
        except FileNotFoundError:  # the one that listed the directory
            continue
        if not target.startswith(_KEPT_BY_OTHERS):
            found.add((int(name), target))
    return found


# ── certificates ──


@dataclasses.dataclass(frozen=True)
class KeyPair:
    """A certificate chain and its private key, as paths of PEM files."""

    certfile: str
    keyfile: str


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """The authority that the tests trust."""
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The authority's certificate, as the path of a PEM file."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def odd_path(tmp_path: Path) -> Path:
    """A directory whose name is not UTF-8; some systems have none."""
    made = tmp_path / os.fsdecode(b"odd \xff\xe9")
    try:
        made.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("every name is UTF-8 here")
    return made


@pytest.fixture(scope="session")
def server_cert(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """A server's certificate for localhost, 127.0.0.1 and ::1."""
    return write_key_pair(ca.issue_cert("localhost", "127.0.0.1", "::1"), tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def client_cert(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """A client's certificate, for alice@example.org."""
    return write_key_pair(ca.issue_cert("alice@example.org"), tmp_path_factory.mktemp("client"))


def write_key_pair(issued: trustme.LeafCert, directory: Path) -> KeyPair:
    """Write what trustme *issued* into *directory*."""
    pair = KeyPair(str(directory / "cert.pem"), str(directory / "key.pem"))
    issued.private_key_pem.write_to_path(pair.keyfile)
    for index, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(pair.certfile, append=index > 0)
    return pair


# ── peers ──


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def tls_version(request: pytest.FixtureRequest) -> str:
    """Each version of TLS in turn, by OpenSSL's name."""
    version: str = request.param
    return version


@pytest.fixture
def background() -> Iterator[Background]:
    """Threads of this test, and servers in them."""
    with Background() as made:
        yield made


@pytest.fixture(scope="session")
def openssl() -> str:
    """The path of the `openssl` program."""
    return _program("openssl")


@pytest.fixture(scope="session")
def curl() -> str:
    """The path of the `curl` program."""
    return _program("curl")


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is not None:
        return path
    if os.environ.get("BRIDGE_REQUIRE_PEERS"):
        pytest.fail(f"{name} is not installed, and BRIDGE_REQUIRE_PEERS is set", pytrace=False)
    pytest.skip(f"{name} is not installed")
