"""Pieces of the documentation that are drawn from the code, so that they cannot go stale."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import textwrap

from sphinx.pycode import ModuleAnalyzer

import bridge
from bridge import cli, limits
from bridge.states import TRANSITIONS, State


def ownership() -> str:
    """The table of who may touch what, out of the package's docstring."""
    doc = inspect.getdoc(bridge) or ""
    blocks = re.findall(r"::\n\n((?:[ ]+\S.*\n|\n)+)", doc + "\n")
    table = next(block for block in blocks if "coordinator" in block and "worker" in block)
    return _fenced(textwrap.dedent(table))


def states_table() -> str:
    """Every transition, as a Markdown table."""
    rows = ["| from | to | when |", "|---|---|---|"]
    for old, exits in TRANSITIONS.items():
        rows += [f"| `{old.name}` | `{new.name}` | {when} |" for new, when in exits.items()]
    return "\n".join(rows)


def states_picture() -> str:
    """The states from top to bottom, neighbours joined by straight arrows, others by arcs, as inline SVG."""
    top = {state: 10 + 62 * index for index, state in enumerate(State)}
    parts = [_box(state.name, y) for state, y in top.items()]
    for old, exits in TRANSITIONS.items():
        parts += [_arrow(top[old], top[new]) for new in exits]
    height = max(top.values()) + 45
    return (
        f'<svg viewBox="0 0 340 {height}" width="340" height="{height}"'
        ' role="img" aria-label="The states of a session"><defs><marker id="tip"'
        ' viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _box(name: str, y: int) -> str:
    return (
        f'<rect x="10" y="{y}" width="150" height="32" rx="6" fill="none" stroke="currentColor"/>'
        f'<text x="85" y="{y + 21}" text-anchor="middle" fill="currentColor" font-size="14">{name}</text>'
    )


def _arrow(start: int, end: int) -> str:
    if end - start == 62:
        path = f"M85 {start + 32}V{end}"
    else:
        reach = 160 + (end - start) * 0.55
        path = f"M160 {start + 16}C{reach} {start + 16} {reach} {end + 16} 160 {end + 16}"
    return f'<path d="{path}" fill="none" stroke="currentColor" marker-end="url(#tip)"/>'


def defaults(name: str) -> str:
    """The fields of `Timeouts` or `Limits`, each with its default and the reason that stands at it."""
    reasons = ModuleAnalyzer.for_module("bridge.limits").find_attr_docs()
    rows = ["| field | default | reason |", "|---|---|---|"]
    for field in dataclasses.fields(getattr(limits, name)):
        value = "none" if field.default is None else f"{field.default:,}"
        rows.append(f"| `{field.name}` | {value} | {' '.join(reasons[name, field.name]).strip()} |")
    return "\n".join(rows)


def commands() -> str:
    """What the command line says of itself."""
    os.environ["COLUMNS"] = "100"
    parts = []
    for command in ([], ["demo"], ["echo"], ["connect"], ["trace"], ["top"], ["run"]):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
        parts += [f"## `{' '.join(['tls-bridge', *command])}`", _fenced(said.getvalue())]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
