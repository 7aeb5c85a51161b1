"""The pictures of a result, as SVG files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from report import Result, Spread, known
from works import PEERS

OURS, THEIRS, LIMIT = "#c2410c", "#64748b", "#94a3b8"
mpl.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "path", "font.size": 9})

COLOURS = dict(
    zip(
        PEERS,
        ("black", *(f"C{n}" for n in (0, 2, 4, 5, 6, 7, 8, 9)), OURS, "#9d174d", "#f59e0b"),
        strict=True,
    )
)
"""Of the peers' curves."""


@dataclasses.dataclass(frozen=True)
class Bars:
    """One picture: a panel a work, a bar a peer."""

    title: str
    metric: str
    unit: str
    works: tuple[str, ...]


PICTURES = {
    "echo": Bars("Echo of 64 B", "rate", "round trips/s", ("echo-64-1", "echo-64-64", "echo-64-1000")),
    "echo-4096": Bars(
        "Echo of 4 KiB", "rate", "round trips/s", ("echo-4096-1", "echo-4096-64", "echo-4096-1000")
    ),
    "lines": Bars("Pipelined lines of 100 B from 4 senders", "rate", "lines/s", ("lines-1", "lines-64")),
    "bulk": Bars("Bulk, one session", "mb", "MB/s", ("bulk-down-64", "bulk-up", "bulk-both")),
    "handshakes": Bars(
        "Handshakes", "rate", "sessions/s", ("new-1", "new-2", "new-2-4096", "resume-1", "resume-2")
    ),
    "idle": Bars("Memory of an idle session", "kb", "KB", ("idle-1000", "idle-10000")),
    "active": Bars("50 active among idle ones: p99", "p99", "µs", ("idle-1000", "idle-10000")),
    "storms": Bars("The first client in a storm", "first", "ms", ("half-open-5000", "vanish-5000")),
}


@dataclasses.dataclass(frozen=True)
class Growth:
    """One picture: how figures grow with the sessions; each panel's works are named *prefix* and their number."""

    title: str
    panels: tuple[tuple[str, str, str], ...]
    """Prefix, metric, unit."""


GROWTH = Growth(
    "From 1 to 10,000 sessions",
    (
        ("echo-64-", "rate", "round trips/s"),
        ("echo-64-", "p99", "p99 µs"),
        ("echo-64-", "cpu_per_1000", "CPU s per 1,000"),
        ("idle-", "kb", "KB per idle session"),
    ),
)


def values(result: Result, work: str, metric: str) -> dict[str, Spread]:
    """Each peer's figures; undisturbed ones, where there are any."""
    found: dict[str, Spread] = {}
    for peer in dict.fromkeys(s.peer for s in result.samples if s.work == work):
        mine = [s for s in result.samples if (s.work, s.peer) == (work, peer)]
        mine = [s for s in mine if not s.disturbed] or mine
        if figures := known((sample.figures for sample in mine), metric):
            found[peer] = Spread.of(figures)
    return found


def colour(peer: str) -> str:
    return OURS if peer.startswith("bridge") else LIMIT if peer == "c" else THEIRS


def draw_bars(result: Result, picture: Bars) -> Figure | None:
    """The picture, or None where nothing of it was measured."""
    works = [work for work in picture.works if work in result.works]
    if not works:
        return None
    figure = Figure(figsize=(3.6 * len(works), 3.4), layout="constrained")
    for axes, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works, strict=True):
        found = values(result, work, picture.metric)
        peers = list(found)[::-1]
        medians = [found[peer].median for peer in peers]
        around = [
            [found[peer].median - found[peer].low for peer in peers],
            [found[peer].high - found[peer].median for peer in peers],
        ]
        axes.barh(peers, medians, xerr=around, color=[colour(peer) for peer in peers], error_kw={"lw": 0.8})
        axes.set_title(result.works[work][0], fontsize=8)
        axes.set_xlabel(picture.unit)
        finish(axes)
    figure.suptitle(picture.title)
    return figure


def draw_growth(result: Result, growth: Growth) -> Figure | None:
    """The picture, or None where nothing grows."""
    panels = [(panel, growing(result, panel[0])) for panel in growth.panels]
    panels = [(panel, works) for panel, works in panels if len(works) > 1]
    if not panels:
        return None
    figure = Figure(figsize=(9, 3.4 * ((len(panels) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat
    named: dict[str, Any] = {}
    for axes, ((_, metric, unit), works) in zip(grid, panels, strict=False):
        curves: dict[str, list[tuple[int, float]]] = {}
        for sessions, work in works:
            for peer, spread in values(result, work, metric).items():
                curves.setdefault(peer, []).append((sessions, spread.median))
        for peer, points in curves.items():
            width = 2.4 if peer.startswith("bridge") else 1
            (named[peer],) = axes.plot(*zip(*points, strict=True), marker=".", lw=width, color=COLOURS[peer])
        axes.set(xscale="log", xlabel="sessions", title=unit)
        if metric in ("p99", "cpu_per_1000"):
            axes.set_yscale("log")
        finish(axes)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(growth.title)
    return figure


def growing(result: Result, prefix: str) -> list[tuple[int, str]]:
    """The works called *prefix* and a number, by that number."""
    numbers = {work.removeprefix(prefix): work for work in result.works if work.startswith(prefix)}
    return sorted((int(number), work) for number, work in numbers.items() if number.isdigit())


def finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw(result: Result, folder: Path) -> list[Path]:
    """Every picture of *result*, each as NAME.svg in *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: draw_bars(result, picture) for name, picture in PICTURES.items()}
    figures["growth"] = draw_growth(result, GROWTH)
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            drawn.append(path)
    return drawn
