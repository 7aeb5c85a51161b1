"""A pytest plugin for the drop-in under real libraries (`tests/dropin`): who speaks TLS for either side."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
import ssl as stdlib_ssl
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import KeyPair

THEIR_CONTEXT = stdlib_ssl.SSLContext
_CONTEXT = {"theirs": stdlib_ssl.SSLContext}
"""The stdlib's own class, where injection, which looks at the names of modules, does not find it."""
CONTROL = bool(os.environ.get("BRIDGE_DROPIN_CONTROL"))
"""Run the tests with the stdlib on both sides: what fails then is the test's own fault."""


def our_ssl() -> ModuleType:
    """`bridge.ssl`; in a control run the stdlib's."""
    if CONTROL:
        return stdlib_ssl
    from bridge import ssl

    return ssl


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Whose TLS each side speaks: "ours" or "theirs"."""

    client: str
    server: str

    def __str__(self) -> str:
        return f"{self.client}-client-{self.server}-server"


ARRANGEMENTS = [Arrangement("ours", "theirs"), Arrangement("theirs", "ours"), Arrangement("ours", "ours")]


@pytest.fixture(params=ARRANGEMENTS, ids=str)
def arrangement(request: pytest.FixtureRequest) -> Arrangement:
    """Each arrangement in turn."""
    found: Arrangement = request.param
    return found


def context_class(side: str) -> Any:
    """The SSLContext class that *side* ("ours" or "theirs") uses."""
    return our_ssl().SSLContext if side == "ours" else _CONTEXT["theirs"]


def make_server_context(side: str, identity: KeyPair) -> Any:
    """A server's context, as its users write it."""
    context = context_class(side)(stdlib_ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certfile, identity.keyfile)
    return context


def make_client_context(side: str, ca_file: str) -> Any:
    """A client's context that verifies the server and its name."""
    context = context_class(side)(stdlib_ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca_file)
    return context


@pytest.fixture
def server_context(arrangement: Arrangement, server_cert: KeyPair) -> Any:
    """A server's context for localhost, by the class of the arrangement."""
    return make_server_context(arrangement.server, server_cert)


@pytest.fixture
def client_context(arrangement: Arrangement, ca_file: str) -> Any:
    """A client's context, by the class of the arrangement."""
    return make_client_context(arrangement.client, ca_file)


@contextlib.contextmanager
def injection(side: str = "ours") -> Iterator[None]:
    """For libraries that build their own context: inside, `ssl.SSLContext` is ours if *side* is."""
    if CONTROL or side != "ours":
        yield
        return
    ssl = our_ssl()
    ssl.inject()
    try:
        yield
    finally:
        ssl.extract()


def library(name: str) -> Any:
    """The module *name*; where it is missing the test is skipped, or fails under BRIDGE_REQUIRE_PEERS."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("BRIDGE_REQUIRE_PEERS"):
            pytest.fail(
                f"{name} cannot be imported ({error}), and BRIDGE_REQUIRE_PEERS is set", pytrace=False
            )
        pytest.skip(f"{name} is not installed")


def program(*names: str) -> str:
    """The path of the first of *names* that is installed (also in sbin); skipped or failed as `library`."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    if os.environ.get("BRIDGE_REQUIRE_PEERS"):
        pytest.fail(f"{names[0]} is not installed, and BRIDGE_REQUIRE_PEERS is set", pytrace=False)
    pytest.skip(f"{names[0]} is not installed")


@pytest.fixture(scope="module")
def default_bridge() -> Iterator[None]:
    """The process-wide bridge, up before a test looks for what it leaves behind, and closed after the module."""
    if CONTROL:
        yield
    else:
        with our_ssl().default_bridge():
            yield
