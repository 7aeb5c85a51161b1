"""The picture that `tls-bridge top` shows: what a running process's Bridge is doing, read through its window."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

from bridge.connect_command import printable
from bridge.window import NOBODY, look

COLUMNS = ("session", "worker", "state", "for", "waits for", "inbox", "outbox")


def rows(view: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each session, those with most in their queues first: a name may hold whatever its peer wanted."""
    sessions = sorted(
        view["sessions"], key=lambda one: (-one["inbox_bytes"] - one["outbox_bytes"], one["name"])
    )
    cells = [
        (
            one["name"],
            one["worker"].removeprefix("bridge-"),
            one["state"],
            f"{one['seconds']:.0f} s",
            ", ".join(f"{call}: {want}" for call, want in one["wants"].items()) or "-",
            f"{one['inbox_bytes']:,}",
            f"{one['outbox_bytes']:,}",
        )
        for one in sessions
    ]
    return [tuple(map(printable, row)) for row in cells]


def headline(view: dict[str, Any], rates: str = "") -> str:
    """The sums, in two lines."""
    handshakes = {"ok": 0, "failed": 0}
    for _, result, _, count in view["handshakes"]:
        handshakes["ok" if result == "ok" else "failed"] += count
    endings = ", ".join(f"{count} {cause}" for cause, count in sorted(view["endings"].items())) or "none"
    return (
        f"process {view['pid']}: {len(view['sessions'])} sessions, handshakes {handshakes['ok']} ok and"
        f" {handshakes['failed']} failed, received {view['bytes_received']:,} bytes, sent"
        f" {view['bytes_sent']:,}{rates}\nended: {endings}"
    )


def plain(view: dict[str, Any]) -> str:
    """All of it as text."""
    table = [COLUMNS, *rows(view)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([headline(view), "", *lines])


def watch(path: str, every: float) -> None:
    """Show it live, each *every* seconds, until the window closes (OSError), the terminal or Ctrl-C.  Needs `rich`."""
    from rich.live import Live

    pause, view, seen, rates = threading.Event(), look(path), time.monotonic(), ""
    with Live(screen=True, auto_refresh=False) as live:
        while live.console.is_terminal:
            live.update(shown(view, rates, live.console.height - 8), refresh=True)
            pause.wait(every)
            before, since = view, seen
            try:
                view, seen = look(path), time.monotonic()
            except OSError as error:
                if error.errno not in NOBODY | {errno.EPROTO}:
                    raise
                gone = f"process {view['pid']} has ended, or has closed its window"
                raise OSError(error.errno, gone, path) from error
            moved = [(view[key] - before[key]) / (seen - since) for key in ("bytes_received", "bytes_sent")]
            rates = f", now {moved[0]:,.0f} and {moved[1]:,.0f} a second"


def shown(view: dict[str, Any], rates: str = "", height: int = 40) -> Any:
    """What `watch` shows, as `rich` can print it, with so many rows at most."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS, expand=True)
    for row in rows(view)[: max(1, height)]:
        table.add_row(*map(Text, row))  # whose brackets are no markup
    return Group(Text(headline(view, rates)), table)
