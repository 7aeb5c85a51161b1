"""Mutation testing: change one thing in a module, and see whether its tests notice.

``python tests/mutate.py codecs queues --sample 40 --seed 1``, or ``tox -e mutation``.  Works on a copy of the tree.  A
mutant is one comparison, operator, constant, condition, or statement changed; it is killed if a test fails or hangs.
Prints each that survives, and the score.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {
    "codecs": ["test_codecs.py", "test_queues.py"],
    "queues": ["test_queues.py", "test_protocol_model.py", "test_queue_api.py", "test_flow_control.py"],
    "engine": ["test_engine.py", "test_ends.py", "test_errors.py"],
    "worker": ["test_stalls.py", "test_listener.py", "test_deadlines.py", "test_lifecycle.py"],
    "coordinator": ["test_queue_api.py", "test_ends.py", "test_errors.py", "test_flow_control.py"],
}
"""The tests of each module, the fastest first."""
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


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """``(line, what, mutated source)`` for each change there is."""
    tree = ast.parse(source)
    nodes = [node for function in _functions(tree) for node in ast.walk(function)]
    for index, node in enumerate(nodes):
        for what in _changes(node):
            changed = copy.deepcopy(tree)
            target = [n for function in _functions(changed) for n in ast.walk(function)][index]
            if not _apply(target, what):
                continue
            yield getattr(node, "lineno", 0), what, ast.unparse(ast.fix_missing_locations(changed))


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """The outermost ones."""
    found: list[ast.FunctionDef] = []
    for node in ast.iter_child_nodes(tree):
        found += [node] if isinstance(node, ast.FunctionDef) else _functions(node)
    return found


def _changes(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        return ["comparison"]
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
        return ["operator"]
    if isinstance(node, (ast.If, ast.While)):
        return ["condition"]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int)):
        return ["constant"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ["call"]
    return []


def _apply(node: ast.AST, what: str) -> bool:
    if what == "comparison" and isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif what == "operator" and isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        node.op = SWAPS[type(node.op)]()
    elif what == "condition" and isinstance(node, (ast.If, ast.While)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif what == "constant" and isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif what == "call" and isinstance(node, ast.Expr):
        node.value = ast.Constant(None)
    else:
        return False
    return True


def killed(tree: Path, module: str, source: str) -> bool:
    """Whether a test fails with this *source* in the place of *module*'s."""
    path = tree / "bridge" / f"{module}.py"
    path.write_text(source, encoding="utf-8")
    tests = [str(tree / "tests" / name) for name in TESTS[module]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "20"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=180,
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="so many of each module, at random; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("bridge", "tests", "docs", "examples"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "tox.ini"):
            shutil.copy(ROOT / name, tree / name)
        for module in options.modules:
            original = (ROOT / "bridge" / f"{module}.py").read_text(encoding="utf-8")
            assert not killed(tree, module, original), f"the tests of {module} fail without a mutant"
            found = list(mutants(original))
            chosen = random.Random(options.seed).sample(found, min(options.sample or len(found), len(found)))
            alive = 0
            for line, what, source in sorted(chosen):
                if not killed(tree, module, source):
                    alive += 1
                    print(
                        f"survived: {module}.py:{line} {what}: {original.splitlines()[line - 1].strip()}",
                        flush=True,
                    )
            (tree / "bridge" / f"{module}.py").write_text(original, encoding="utf-8")
            print(
                f"{module}: {len(chosen) - alive} of {len(chosen)} killed, out of {len(found)} mutants",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
