"""The picture of a trace: time goes down, a lane for each kind of thread, an arrow for what passes the wire."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bridge.tap import TraceEvent

X = {"application": 200, "coordinator": 410, "worker": 620, "peer": 900}
WIDTH, TOP, ROW = 1010, 64, 24


STYLE = (
    "text{font:12px ui-monospace,monospace;fill:#1b1f24}.head{font-weight:bold;font-size:14px}"
    ".time{fill:#57606a}.lane{stroke:#d0d7de}.box{fill:#ddf4ff;stroke:#54aeff}.want{fill:#fff1c2;stroke:#d4a72c}"
    ".fail{fill:#ffdce0;stroke:#cf222e}.sleep{fill:#eaeef2;stroke:#8c959f;stroke-dasharray:3 2}"
    ".queue{fill:#fff;stroke:#8c959f}.api{fill:#dafbe1;stroke:#4ac26b}.wire{stroke:#57606a;fill:none}.tip{fill:#57606a}"
)


def svg(events: Sequence[TraceEvent], rows: int) -> str:
    """*events*, the first *rows* of those worth drawing, as a self-contained SVG picture on a white ground."""
    worth = sorted((event for event in events if _is_worth_drawing(event)), key=lambda event: event.at)
    shown = worth[:rows]
    left_out = len(worth) - len(shown)
    height = TOP + ROW * (len(shown) + bool(left_out)) + 16
    several = len({event.session for event in shown if event.session}) > 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img" aria-label="A trace of TLS sessions"><style>',
        STYLE,
        '</style><defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
        ' orient="auto"><path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text class="time" x="12" y="30">ms</text>',
    ]
    for lane, x in X.items():
        parts.append(f'<text class="head" x="{x}" y="30" text-anchor="middle">{lane}</text>')
        parts.append(f'<path class="lane" d="M{x} 42V{height - 8}"/>')
    for row, event in enumerate(shown):
        parts.append(_row(event, TOP + ROW * row, several))
    if left_out:
        parts.append(f'<text class="time" x="12" y="{height - 16}">… and {left_out} more events</text>')
    return "".join(parts) + "</svg>\n"


def _is_worth_drawing(event: TraceEvent) -> bool:
    return event.kind != "record" or event.what == "application data"


def _row(event: TraceEvent, y: int, several: bool) -> str:
    time = f'<text class="time" x="12" y="{y + 4}">{event.at * 1000:.2f}</text>'
    if event.kind in ("record", "message", "alert"):
        return time + _arrow(event, y, several)
    return time + _box(event, y, several)


def _arrow(event: TraceEvent, y: int, several: bool) -> str:
    ends = X[event.lane], X["peer"]
    start, end = ends if event.outcome == "sent" else ends[::-1]
    label = f"{_whose(event, several)}{event.what}, {event.answered} B"
    line = f'<path class="wire" d="M{start} {y + 6}H{end}" marker-end="url(#tip)"/>'
    # Right of the middle lanes, where nothing else is.
    text = f'<text x="{X["peer"] - 12}" y="{y + 2}" text-anchor="end">{escape(label)}</text>'
    return line + text


def _box(event: TraceEvent, y: int, several: bool) -> str:
    label = _whose(event, several) + _label(event)
    wide, x = 7.3 * len(label) + 12, X[event.lane]
    shape = f'<rect class="{_kind(event)}" x="{x - wide / 2:.0f}" y="{y - 9}" width="{wide:.0f}" height="18" rx="4"/>'
    return shape + f'<text x="{x}" y="{y + 4}" text-anchor="middle">{escape(label)}</text>'


def _whose(event: TraceEvent, several: bool) -> str:
    return f"{event.session}: " if several and event.session else ""


def _label(event: TraceEvent) -> str:
    if event.kind == "sleep":
        return f"slept {event.seconds * 1000:.2f} ms → {event.outcome}"
    if event.kind == "queue":
        return f"took {event.answered} from its mailbox"
    answer = event.outcome if event.answered is None else f"{event.answered} B"
    return f"{event.what} → {answer}"


def _kind(event: TraceEvent) -> str:
    if event.kind in ("sleep", "api", "queue"):
        return event.kind
    if event.outcome.startswith("WANT"):
        return "want"
    return "box" if event.outcome in ("ok", "close_notify") else "fail"
