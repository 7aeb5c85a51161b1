"""The architecture, as rules a program can check: who imports whom, who may sleep, who may lock, who knows OpenSSL.

The tables here are the rules.  A module that needs more changes a table, and whoever reviews that sees the
architecture change.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge

pytestmark = pytest.mark.once

PACKAGE = Path(bridge.__file__).parent

FLOORS = (
    ("errors", "limits", "threads", "events", "states", "forks", "totals"),  # vocabulary
    (
        "poll",
        "names",
        "credentials",
        "record",
        "connection",
        "tap",
        "context",
        "codecs",
        "engine",
        "dialer",
        "addresses",
        "picture",
    ),  # one thread
    ("crossing", "outbox", "seat", "inbox", "terms"),  # what crosses
    ("transport", "acceptor", "worker", "lease", "coordinator"),  # threads
    ("session", "stream", "crew", "listener", "tracing", "bridge"),  # handles, and the only wiring
    # the drop-in: what the stdlib's classes are made of, and under their names
    (
        "ssl.facts",
        "ssl.failures",
        "ssl.process",
        "ssl.sessions",
        "ssl.sockets",
        "ssl.contexts",
        "ssl.injection",
        "ssl",
    ),
    (
        "prometheus",
        "window",
        "__init__",
        "demo",
        "starttls",
        "explain",
        "arguments",
        "connect_command",
        "top",
        "trace_command",
        "cli",
        "__main__",
    ),  # the door, and faces that come in by it
)
"""A module imports only from lower floors, and on its own floor only from its left."""

ORDER = [module for floor in FLOORS for module in floor]

OPENSSL = {
    "names",
    "credentials",
    "connection",
    "tap",
    "context",
    "engine",
    "listener",
    "tracing",
    "bridge",
    "ssl.contexts",
}
"""Who may import OpenSSL."""
OPENSSL_TYPES_ONLY = {
    "record": {"Session"},
    "listener": {"Context"},
    "tracing": {"Connection"},
    "bridge": {"Context", "Session"},
}
"""Of these: for the type of an argument, and nothing else."""
OPENSSL_PRIVATE = {"connection", "credentials", "tap", "ssl.contexts"}
"""Who may use private names of pyOpenSSL."""
OPENSSL_ERRORS = {"engine", "connection", "context", "credentials", "ssl.contexts"}
"""Who may catch OpenSSL's exceptions: where sessions' errors are translated, and where contexts are built."""

THREADING = {
    "threads": {"current_thread", "local", "main_thread"},
    "crossing": {"Lock", "RLock", "TIMEOUT_MAX"},
    "outbox": {"RLock"},
    "seat": {"Lock", "get_ident"},  # who holds it is the worker
    "inbox": {"RLock", "get_ident", "local", "main_thread"},
    "forks": {
        "RLock"
    },  # of what a child may go on to use: the key log, the sessions to resume, contexts being made
    "tap": {"local"},  # the connection a thread is in
    "tracing": {"Lock", "current_thread"},  # one trace at a time
    "transport": {"RLock"},  # of whose a session is for a turn
    "coordinator": {"RLock"},  # of whose the codecs are for a turn
    "lease": {"RLock", "current_thread"},  # who holds it owns the transport
    "stream": {"RLock", "TIMEOUT_MAX"},  # of writers: one whole write after the other
    "crew": {"Event", "RLock", "Thread", "current_thread"},  # of the inboxes that are attached
    "bridge": {"Thread", "current_thread"},  # who closes it
    "ssl.process": {"RLock"},  # of making the one bridge
    "ssl.injection": {"Lock"},
    "acceptor": {"RLock"},  # for its worker treats all alike
    "ssl.contexts": {"RLock"},  # of making a core context, and of the store it shares
    "ssl.sockets": {"RLock"},  # of whose a descriptor is
    "demo": {"Event", "Thread"},
    "connect_command": {"Event", "Thread"},
    "cli": {"Event", "Thread"},
    "window": {"Event", "Thread"},  # of its end, which a pause waits for
    "top": {"Event"},
}
"""What of `threading` each module may use."""

POLLS = {"select", "selectors"}
NEVER = {"asyncio", "multiprocessing", "concurrent", "trio", "gevent", "rich", "pytest"}
LAZILY = {("cli", "rich"), ("top", "rich"), ("trace_command", "rich")}
"""Who may import what inside a function, although nobody may at the top."""

LONGEST_FUNCTION = 40
"""Lines of a function, from its first statement to its last."""
TABLES_OF_FIELDS = {("transport", "__init__")}
"""Longer, but without a single branch: they say what an object is made of."""


def modules() -> Iterator[str]:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
    return (".".join(path.parts).removesuffix(".__init__") for path in paths)


each_module = pytest.mark.parametrize("module", list(modules()))


def tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child)


def imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """``(module, name)`` for each name imported; the name of ``import x`` is empty."""
    for found in runtime_nodes(node):
        if isinstance(found, ast.Import):
            yield from ((alias.name, "") for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "imports are absolute"
            yield from ((found.module or "", alias.name) for alias in found.names)


def imported_from_us(module: str) -> set[str]:
    """The modules of ours that *module* imports, wherever."""
    found = set()
    for source, name in imports(tree(module)):
        package, _, inner = source.partition(".")
        if package != "bridge":
            continue
        if inner:
            found.add(inner)
        elif name in ORDER:
            found.add(name)
        else:
            found.add("__init__")
    return found


def roots(node: ast.AST) -> set[str]:
    return {source.partition(".")[0] for source, _ in imports(node)}


def uses(module: str, of: str) -> set[str]:
    """The names of *of* that *module* uses: ``of.name``, or imported from it."""
    found = {name for source, name in imports(tree(module)) if source == of and name}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == of:
            found.add(node.attr)
    return found


# ── floors ──


def test_every_module_has_its_place_on_one_floor() -> None:
    assert sorted(ORDER) == sorted(modules())
    assert len(set(ORDER)) == len(ORDER)


@each_module
def test_a_module_imports_only_from_lower_floors_or_from_its_left(module: str) -> None:
    below = set(ORDER[: ORDER.index(module)])
    assert imported_from_us(module) <= below


def test_only_the_wiring_knows_all_the_others() -> None:
    known = {module: len(imported_from_us(module)) for module in modules() if module != "__init__"}
    assert max(known, key=lambda module: known[module]) == "bridge"


def test_faces_come_in_by_the_door() -> None:
    faces = FLOORS[-1]
    for module in faces[faces.index("__init__") + 1 :]:
        assert imported_from_us(module) <= {*faces, "ssl"}


def test_the_drop_in_does_not_reach_past_the_handles() -> None:
    below_the_handles = {
        "transport",
        "worker",
        "lease",
        "coordinator",
        "crossing",
        "outbox",
        "inbox",
        "acceptor",
        "dialer",
        "addresses",
        "codecs",
    }
    for module in modules():
        if module.startswith("ssl"):
            assert not imported_from_us(module) & below_the_handles, module


def test_the_rule_of_floors_can_be_broken() -> None:
    """What the checks above stand on sees an import at the top, in a function, and by either form."""
    source = ast.parse(
        "import bridge.worker\nfrom bridge import poll\ndef f():\n    from select import poll as p"
    )
    assert set(imports(source)) == {("bridge.worker", ""), ("bridge", "poll"), ("select", "poll")}
    hidden = ast.parse("if TYPE_CHECKING:\n    from bridge.session import Session")
    assert set(imports(hidden)) == set()


# ── who knows OpenSSL ──


def test_only_these_import_openssl() -> None:
    assert {module for module in modules() if "OpenSSL" in roots(tree(module))} == OPENSSL


@pytest.mark.parametrize("module", sorted(OPENSSL_TYPES_ONLY))
def test_handles_know_openssl_as_the_type_of_an_argument(module: str) -> None:
    assert uses(module, "SSL") == OPENSSL_TYPES_ONLY[module]


@each_module
def test_only_one_door_translates_openssls_errors(module: str) -> None:
    caught = [
        ast.unparse(handler.type)
        for handler in ast.walk(tree(module))
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
    ]
    catches = any(re.search(r"\b(SSL|crypto)\.", what) for what in caught)
    assert not catches or module in OPENSSL_ERRORS


@each_module
def test_private_names_of_pyopenssl_are_used_in_few_places(module: str) -> None:
    named = any(
        (isinstance(node, ast.Constant) and node.value == "_util")
        or (isinstance(node, ast.Attribute) and node.attr == "_util")
        or (isinstance(node, ast.ImportFrom) and "_util" in (node.module or ""))
        for node in ast.walk(tree(module))
    )
    assert named == (module in OPENSSL_PRIVATE)


# ── who sleeps, who locks, who starts threads ──


def test_only_poll_waits_for_descriptors() -> None:
    assert {module for module in modules() if POLLS & roots(tree(module))} == {"poll"}


@each_module
def test_nobody_sleeps_for_a_time(module: str) -> None:
    assert "sleep" not in uses(module, "time")


@each_module
def test_locks_live_in_the_queues(module: str) -> None:
    assert uses(module, "threading") <= THREADING.get(module, set())


@each_module
def test_nobody_imports_another_kind_of_concurrency_or_a_face(module: str) -> None:
    everywhere = roots(tree(module)) & NEVER
    assert {(module, name) for name in everywhere} <= LAZILY
    top = [node for node in tree(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not roots(ast.Module(body=list(top), type_ignores=[])) & NEVER


def test_import_bridge_needs_no_face_and_no_test_tool() -> None:
    # structlog imports rich and asyncio by itself if they are there, so the first are taken away here
    program = (
        "import sys\n"
        "for name in ('rich', 'pytest', 'hypothesis', 'trustme'): sys.modules[name] = None\n"
        "import bridge, bridge.cli, bridge.demo\n"
        "print(*bridge.__all__)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(bridge.__all__)


# ── states and size ──


@each_module
def test_the_state_changes_in_one_place(module: str) -> None:
    places = {
        f"{module}.{function.name}"
        for function in ast.walk(tree(module))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and target.attr == "state"
    }
    assert places == ({"transport.__init__", "transport._move"} if module == "transport" else set())


@each_module
def test_no_function_is_longer_than_a_reader_can_hold(module: str) -> None:
    lengths = {
        (function.lineno, function.name): body[-1].end_lineno - body[0].lineno + 1
        for function in ast.walk(tree(module))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and (body := function.body[ast.get_docstring(function) is not None :])
        and body[-1].end_lineno is not None
    }
    too_long = {(module, name): length for (_, name), length in lengths.items() if length > LONGEST_FUNCTION}
    assert too_long.keys() <= TABLES_OF_FIELDS, too_long


# ── the public face ──


def test_public_names_are_sorted_and_exist() -> None:
    assert list(bridge.__all__) == sorted(set(bridge.__all__))
    for name in bridge.__all__:
        assert hasattr(bridge, name)


def test_whatever_else_the_package_shows_is_a_module_or_private() -> None:
    others = {name for name in vars(bridge) if name not in bridge.__all__ and not name.startswith("_")}
    assert all(isinstance(getattr(bridge, name), types.ModuleType) for name in others), others


def documented(name: str, thing: Any) -> Iterator[tuple[str, str | None]]:
    """*thing* and, if it is a class or a module of ours, its public members, with their docstrings."""
    yield name, inspect.getdoc(thing)
    if isinstance(thing, types.ModuleType):
        for member in thing.__all__:
            yield from documented(f"{name}.{member}", getattr(thing, member))
    elif inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                yield f"{name}.{member}", inspect.getdoc(getattr(thing, member))


@pytest.mark.parametrize("name", bridge.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    missing = [where for where, text in documented(name, getattr(bridge, name)) if not (text or "").strip()]
    assert missing == []


@each_module
def test_every_module_says_what_it_is(module: str) -> None:
    text = ast.get_docstring(tree(module))
    assert (text and text[0].isupper()) or module == "__main__"


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# ── the ownership table ──

OWNERSHIP = {
    "Bridge, Session, Stream, queues": [
        "bridge.Bridge",
        "session.Session",
        "stream.Stream",
        "session.InboxView",
        "session.OutboxView",
    ],
    "SSL.Context": ["context.Context.raw"],
    "coordinator's mailbox": ["coordinator.Coordinator._mailbox"],
    "channels, codecs' decode": ["coordinator.Channel.codec", "codecs.Codec.decode"],
    "codecs' encode": ["codecs.Codec.encode"],
    "session inbox (messages)": ["inbox.SessionInbox.get", "coordinator.Channel.inbox"],
    "send credit (outbox)": ["outbox.Outbox.put", "outbox.Outbox.take", "outbox.Outbox.give_back"],
    "read credit": ["inbox.ReadCredit.spend", "inbox.ReadCredit.room", "inbox.ReadCredit._charge"],
    "worker's mailbox + doorbell": [
        "worker.Worker._mailbox",
        "worker.Worker._doorbell",
        "poll.Doorbell.ring",
    ],
    "the seat at a worker's poll": ["seat.Seat.place", "seat.Seat.offer", "worker.Worker.seat"],
    "a Stream's lease": ["lease.Lease.turn", "stream.Stream._lease"],
    "SSL.Connection, socket": ["engine.TLSEngine._connection", "transport.Transport.sock"],
    "poll set": ["worker.Worker._poller", "worker.Worker.lend", "worker.Worker.leave"],
    "state, deadlines": ["transport.Transport.state", "transport.Transport._deadlines"],
    "SessionInfo (peer, ALPN, …)": ["engine.SessionInfo.peer_certificate", "engine.SessionInfo.alpn"],
}
"""What each row of the table in the package's docstring is in the code."""


def table() -> dict[str, list[str]]:
    """The rows of the ownership table: what, and what each kind of thread may do with it."""
    assert bridge.__doc__ is not None
    header, *rows = (
        inspect.cleandoc(bridge.__doc__).split("::\n")[1].strip("\n").split("\n\n")[0].splitlines()
    )
    edges = [header.index(kind) for kind in ("application", "coordinator", "worker", "lock")]
    spans = list(zip([0, *edges], [*edges, None], strict=True))
    cells = [[row[start:end].strip() for start, end in spans] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_the_ownership_table_names_what_exists() -> None:
    assert list(table()) == list(OWNERSHIP)
    for names in OWNERSHIP.values():
        for name in names:
            module, owner, *attribute = name.split(".")
            kind = getattr(importlib.import_module(f"bridge.{module}"), owner)
            assert all(has(kind, wanted) for wanted in attribute), name


def has(kind: type, attribute: str) -> bool:
    """Whether *kind* or its instances have *attribute*."""
    annotated = attribute in getattr(kind, "__annotations__", {})
    return annotated or hasattr(kind, attribute) or f"self.{attribute}" in inspect.getsource(kind)


def test_the_ownership_table_gives_every_mutable_thing_at_most_one_owner() -> None:
    for what, cells in table().items():
        assert len(cells) == 4, what
        assert sum(cell.startswith("OWN") for cell in cells) <= 1, what
    assert sum(cell.startswith("OWN") for cells in table().values() for cell in cells) == 4


LOCKS = {
    "Coordinator._lock": "coordinator",
    "Inbox._lock": "inbox",
    "Lease.lock": "lease",
    "Mailbox._lock": "crossing",
    "Outbox._lock": "outbox",
    "Seat._lock": "seat",
    "Transport.lock": "transport",
}
"""Where the locks of the table are."""


def test_whatever_more_than_one_kind_of_thread_changes_has_a_lock() -> None:
    looks = ("·", "read", "read (frozen)", "pass on", "build, freeze")
    for what, (*cells, lock) in table().items():
        assert (lock != "·") == (sum(cell not in looks for cell in cells) > 1), what
        if lock != "·":
            owner, attribute = lock.split(".")
            assert has(getattr(importlib.import_module(f"bridge.{LOCKS[lock]}"), owner), attribute), what
