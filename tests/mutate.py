"""Mutation testing: change one thing in a module, and see whether its tests notice.

``python tests/mutate.py codecs outbox --sample 40 --seed 1``, or ``tox -e mutation``.  Works on a copy of the tree.  A
mutant is one comparison, operator, operand, constant, condition, lock, handler of an exception, or statement changed;
it is killed if a test fails or hangs.  Prints each that survives, and the score.

Quick in three ways.  One process imports what is not ours, and forks for each mutant.  A first run without a mutant
notes which lines each test reaches, and its time: only tests that reach the mutant are run, the quickest first, until
one fails.  And a test that takes much longer than it did then is taken for one that hangs.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BOTH = ["test_ends.py", "test_errors.py", "test_deadlines.py", "test_listener.py"]
CROSSING = [
    "test_queues.py",
    "test_coordinator.py",
    "test_protocol_model.py",
    "test_queue_api.py",
    "test_flow_control.py",
    "test_threads.py",
    "test_lockstep.py",
    "test_receivers.py",
    *BOTH,
]
DROP_IN = [f"dropin/test_{name}.py" for name in ("sockets", "contexts", "http", "injection")]
TESTS = {
    "codecs": ["test_codecs.py", "test_queues.py"],
    "crossing": CROSSING,
    "outbox": CROSSING,
    "inbox": CROSSING,
    "engine": ["test_engine.py", "test_lockstep.py", "test_stream.py", *BOTH],
    "worker": [
        "test_worker.py",
        "test_lifecycle.py",
        "test_stalls.py",
        "test_lockstep.py",
        "test_protocol_model.py",
        "test_receivers.py",
        "test_floods.py",
        *BOTH,
    ],
    "coordinator": [
        "test_coordinator.py",
        "test_answers.py",
        "test_lifecycle.py",
        "test_queue_api.py",
        "test_flow_control.py",
        "test_lockstep.py",
        "test_protocol_model.py",
        "test_receivers.py",
        *BOTH,
    ],
    "transport": [
        "test_transport.py",
        "test_engine.py",
        "test_answers.py",
        "test_facts.py",
        "test_lockstep.py",
        "test_stream.py",
        "test_flow_control.py",
        "test_stalls.py",
        "test_connect.py",
        "test_receivers.py",
        *BOTH,
    ],
    "poll": ["test_poll.py", "test_receivers.py", "test_worker.py", "test_stream.py"],
    "lease": ["test_stream.py", "test_interrupts.py", "test_lifecycle.py"],
    "stream": ["test_stream.py", "test_interrupts.py"],
    "connection": ["test_context.py", "test_engine.py", "test_facts.py"],
    "context": ["test_context.py", "test_security.py", "test_errors.py"],
    "names": ["test_context.py", "test_errors.py"],
    "addresses": ["test_errors.py", "test_listener.py"],
    "bridge": ["test_lifecycle.py", "test_interrupts.py", "test_window.py", *BOTH],
    "crew": ["test_lifecycle.py", "test_interrupts.py"],
    "ssl/sockets": DROP_IN,
    "ssl/contexts": DROP_IN,
}
"""Those that exercise each module."""
LIBRARIES = ["OpenSSL.SSL", "cryptography.x509", "hypothesis", "service_identity", "structlog", "trustme"]
HANG_SECONDS = 4.0
"""How much longer than without a mutant a test may take, at least."""
PATIENCE = 20.0
"""The most seconds of tests, as they take without a mutant, that one mutant may cost."""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}

Lines = set[int]
Names = frozenset[str]


# ── mutants ──


def mutants(source: str, within: Names) -> Iterator[tuple[int, str, Lines, str]]:
    """``(line, what, lines that reach it, mutated source)`` for each change there is."""
    tree = ast.parse(source)
    for index, (node, reach) in enumerate(_nodes(tree, within)):
        for what in _changes(node):
            changed = copy.deepcopy(tree)
            if _apply([n for n, _ in _nodes(changed, within)][index], what):
                mutated = ast.unparse(ast.fix_missing_locations(changed))
                yield getattr(node, "lineno", 0), what, reach, mutated


def _nodes(tree: ast.AST, within: Names) -> list[tuple[ast.AST, Lines]]:
    """Those of the functions of these names, if there are any, and which lines a test passes that comes to each."""
    found: list[tuple[ast.AST, Lines]] = []

    def visit(node: ast.AST, reach: Lines) -> None:
        found.append((node, reach))
        for child in ast.iter_child_nodes(node):
            visit(child, _lines(child) if isinstance(child, ast.stmt) else reach)

    for function in _functions(tree):
        if within and function.name not in within:
            continue
        visit(function, set(range(function.body[0].lineno, (function.end_lineno or 0) + 1)))
    return found


def _lines(statement: ast.stmt) -> Lines:
    """Where it begins, for one that holds others: these have lines of their own."""
    if isinstance(statement, (ast.If, ast.While)):
        return set(range(statement.lineno, (statement.test.end_lineno or 0) + 1))
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or 0
    return set(range(statement.lineno, max(last, statement.lineno) + 1))


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """The outermost ones."""
    found: list[ast.FunctionDef] = []
    for node in ast.iter_child_nodes(tree):
        found += [node] if isinstance(node, ast.FunctionDef) else _functions(node)
    return found


def _changes(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        return ["comparison"]
    if isinstance(node, ast.BoolOp):
        return ["operator", "first operand", "last operand"]
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPS:
        return ["operator"]
    if isinstance(node, (ast.If, ast.IfExp)):
        return ["condition", "always", "never"]
    if isinstance(node, ast.While):
        return ["condition", "never"]
    if isinstance(node, ast.With) and "lock" in ast.unparse(node.items[0]):
        return ["lock"]
    if isinstance(node, ast.ExceptHandler) and node.type is not None:
        return ["handler"]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ["not"]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int)):
        return ["constant"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ["call"]
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        return ["assignment"]
    return []


def _apply(node: ast.AST, what: str) -> bool:
    if what == "comparison" and isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif what == "operator" and isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        node.op = SWAPS[type(node.op)]()
    elif what == "condition" and isinstance(node, (ast.If, ast.While, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif what in ("always", "never") and isinstance(node, (ast.If, ast.While, ast.IfExp)):
        node.test = ast.Constant(what == "always")
    elif what.endswith("operand") and isinstance(node, ast.BoolOp):
        node.values = node.values[1:] if what == "first operand" else node.values[:-1]
    elif what == "lock" and isinstance(node, ast.With):
        node.items[0].context_expr = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
    elif what == "handler" and isinstance(node, ast.ExceptHandler):
        node.type = ast.Name("ZeroDivisionError", ast.Load())
    elif what == "not" and isinstance(node, ast.UnaryOp):
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
    elif what == "constant" and isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif what == "call" and isinstance(node, ast.Expr):
        node.value = ast.Constant(None)
    elif what == "assignment" and isinstance(node, ast.Assign):
        node.targets = [ast.Name("_", ast.Store())]
    else:
        return False
    return True


# ── tests ──

Notes = dict[str, tuple[float, list[int]]]
"""Of each test: the seconds it takes, and the lines of the module that it passes."""


class Recorder:
    """A plugin of pytest that makes notes of a run without a mutant."""

    def __init__(self, source: Path) -> None:
        self.source = str(source)
        self.notes: Notes = {}
        self._passed: Lines = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._passed = set()
        begin = time.monotonic()
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.notes[item.nodeid] = (time.monotonic() - begin, sorted(self._passed))

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename == self.source else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        self._passed.add(frame.f_lineno)
        return self._line


class Chosen:
    """A plugin of pytest that runs some tests, in their order, each within its time."""

    def __init__(self, chosen: list[str], notes: Notes) -> None:
        self.order = {name: index for index, name in enumerate(chosen)}
        self.notes = notes

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])
        for item in items:
            limit = HANG_SECONDS + 5 * self.notes[item.nodeid][0]
            item.add_marker(pytest.mark.timeout(limit), append=False)


def forked(work: Callable[[], int], seconds: float, output: Path) -> int | None:
    """The status of *work* in a process of its own; None if it was not done in time.  What it says goes to *output*."""

    def child() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(1, 2)
        status = 1
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    status = process.exitcode
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)  # whatever it has left behind, too
    except ProcessLookupError:
        pass
    process.join()
    return status


class Laboratory:
    """A copy of the tree, in which one module after the other is spoiled."""

    def __init__(self, tree: Path, module: str) -> None:
        self.tree = tree
        self.path = tree / "bridge" / f"{module}.py"
        self.output = tree / "output"
        self.files = [name for name in TESTS[module] if (tree / "tests" / name).exists()]
        self.notes = self._note()

    def _pytest(self, plugin: object, files: list[str]) -> int:
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = str(self.tree)
        sys.path[:0] = [str(self.tree), str(self.tree / "tests")]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed", "0"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # some of it is imported already
        return int(pytest.main([*options, *(str(self.tree / "tests" / name) for name in files)], [plugin]))

    def _note(self) -> Notes:
        found = self.tree / "notes.json"

        def work() -> int:
            recorder = Recorder(self.path)
            status = self._pytest(recorder, self.files)
            found.write_text(json.dumps(recorder.notes), encoding="utf-8")
            return status

        status = forked(work, 1200, self.output)
        assert status == 0, f"a test fails without a mutant: {self.output.read_text(encoding='utf-8')}"
        notes: Notes = json.loads(found.read_text(encoding="utf-8"))
        return notes

    def chosen(self, reach: Lines) -> list[str]:
        """The tests that come to one of these lines, the quickest first."""
        quickest = sorted(
            (seconds, name) for name, (seconds, lines) in self.notes.items() if reach & set(lines)
        )
        chosen, total = [], 0.0
        for seconds, name in quickest:
            total += seconds
            if total > PATIENCE:
                break
            chosen.append(name)
        return chosen

    def killed(self, source: str, reach: Lines) -> bool:
        """Whether a test fails, or hangs, with this *source*."""
        chosen = self.chosen(reach)
        if not chosen:
            return False
        files = [name for name in self.files if any(one.startswith(f"tests/{name}::") for one in chosen)]
        original = self.path.read_text(encoding="utf-8")
        self.path.write_text(source, encoding="utf-8")
        for compiled in self.path.parent.glob(f"__pycache__/{self.path.stem}.*"):
            compiled.unlink()

        def work() -> int:
            sys.dont_write_bytecode = True
            return self._pytest(Chosen(chosen, self.notes), files)

        try:
            status = forked(work, 3 * PATIENCE, self.output)
        finally:
            self.path.write_text(original, encoding="utf-8")
        return status != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="so many of each module, at random; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", metavar="NAME,NAME", help="only functions of these names")
    options = parser.parse_args()
    within = frozenset(options.within.split(",") if options.within else ())
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("bridge", "tests", "docs", "examples"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "tox.ini"):
            shutil.copy(ROOT / name, tree / name)
        for module in options.modules:
            try_out(Laboratory(tree, module), module, within, options.sample, options.seed)
    return 0


def try_out(laboratory: Laboratory, module: str, within: Names, sample: int, seed: int) -> None:
    """Try mutants of *module*, and print what became of them."""
    original = laboratory.path.read_text(encoding="utf-8")
    everywhere = set(range(original.count("\n") + 2))
    assert not laboratory.killed(original, everywhere), "without a mutant, and yet it is killed"
    found = list(mutants(original, within))
    chosen = random.Random(seed).sample(found, min(sample or len(found), len(found)))
    alive = 0
    for line, what, reach, source in sorted(chosen, key=lambda one: one[:2]):
        if not laboratory.killed(source, reach):
            alive += 1
            text = original.splitlines()[line - 1].strip()
            print(f"survived: {module}.py:{line} {what}: {text}", flush=True)
    score = f"{len(chosen) - alive} of {len(chosen)} killed"
    print(f"{module}: {score}, out of {len(found)} mutants", flush=True)


if __name__ == "__main__":
    sys.exit(main())
