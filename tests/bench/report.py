"""Medians, ratios with their spread, and the Markdown that shows them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Figures = dict[str, Any]

DISTURBED = 0.10
"""A sample is left out where strangers used more of the machine: they slow some peers more than others."""

GENERATOR_BOUND = 0.95
"""A generator that is busier than this may itself be the limit, so the figure is only a lower bound."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One run of one peer."""

    work: str
    peer: str
    round: int
    figures: Figures

    @property
    def disturbed(self) -> bool:
        """Whether strangers used so much of the machine that the figures mean little."""
        return bool(self.figures.get("other_share", 0) > DISTURBED)


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and the range around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1])

    def show(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}..{self.high:,.{digits}f})"


Metric = Callable[[Figures], float]

METRICS: dict[str, Metric] = {
    "rate": lambda f: f["operations"] / f["seconds"],
    "p50": lambda f: f["p50_us"],
    "p99": lambda f: f["p99_us"],
    "cpu_per_1000": lambda f: 1e6 * f["server_cpu"] / max(f["operations"], 1),
    "mb": lambda f: f["bytes"] / f["seconds"] / 1e6,
    "cpu_per_gb": lambda f: 1e9 * f["server_cpu"] / max(f["bytes"], 1),
    "generator": lambda f: 100 * f["generator_cpu"] / f["seconds"],
    "server": lambda f: 100 * f["server_cpu"] / f["seconds"],
    "kb": lambda f: f["kb_per_session"],
    "threads": lambda f: f["threads_per_session"],
    "cpu_empty": lambda f: 100 * f["cpu_empty"],
    "cpu_idle": lambda f: 100 * f["cpu_idle"],
}
"""In 1/s, µs, µs, ms per 1,000 operations, MB/s, CPU s per GB, % of a core (twice), KiB, threads, %, %."""

COLUMNS: dict[str, list[tuple[str, str, int]]] = {
    "echo": [
        ("round trips/s", "rate", 0),
        ("p50 µs", "p50", 0),
        ("p99 µs", "p99", 0),
        ("CPU ms per 1,000", "cpu_per_1000", 1),
        ("server %", "server", 0),
        ("generator %", "generator", 0),
    ],
    "bulk": [
        ("MB/s", "mb", 0),
        ("CPU s per GB", "cpu_per_gb", 2),
        ("server %", "server", 0),
        ("generator %", "generator", 0),
    ],
    "http": [("requests/s", "rate", 0), ("server's CPU ms per 1,000", "cpu_per_1000", 1)],
    "mqtt": [("p50 µs", "p50", 0), ("round trips/s", "rate", 0)],
    "idle": [
        ("KB per session", "kb", 1),
        ("threads per session", "threads", 2),
        ("CPU % without sessions", "cpu_empty", 2),
        ("CPU % with all of them", "cpu_idle", 2),
    ],
}
"""Heading, metric and digits; the first column is the one that ratios are taken of."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the project promised: *ours*' metric, over *reference*'s if there is one, against *bound*."""

    work: str
    metric: str
    ours: str
    reference: str | None
    bound: float
    at_most: bool = False

    def judge(self, samples: list[Sample]) -> str | None:
        """A row of the goals table, or None where the run did not measure it."""
        mine = [sample for sample in samples if (sample.work, sample.peer) == (self.work, self.ours)]
        if not mine:
            return None
        if self.reference is None:
            values = [METRICS[self.metric](sample.figures) for sample in mine if not sample.disturbed]
        else:
            values = ratios(samples, self.work, self.metric, self.ours, self.reference)
        what = f"{self.metric} of {self.ours}" + (f" / {self.reference}" if self.reference else "")
        goal = f"{'≤' if self.at_most else '≥'} {self.bound:g}"
        if not values:
            return f"| {self.work} | {what} | {goal} | | not judged: no undisturbed round to judge by |"
        got = Spread.of(values)
        met = got.median <= self.bound if self.at_most else got.median >= self.bound
        return f"| {self.work} | {what} | {goal} | {got.show(2)} | {'met' if met else '**not met**'} |"


def ratios(samples: list[Sample], work: str, metric: str, ours: str, reference: str) -> list[float]:
    """One ratio per round in which both ran undisturbed."""
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.work == work and not sample.disturbed:
            by_round.setdefault(sample.round, {})[sample.peer] = METRICS[metric](sample.figures)
    return [row[ours] / row[reference] for row in by_round.values() if row.get(reference) and ours in row]


def table(samples: list[Sample], work: str, kind: str, reference: str) -> list[str]:
    """One work's Markdown table, a row per peer in the order they first ran."""
    columns = COLUMNS[kind]
    mine = [sample for sample in samples if sample.work == work]
    heads = ["peer", *(head for head, _, _ in columns), f"{columns[0][0]} / {reference}"]
    lines = [f"### {work}", "", f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for peer in dict.fromkeys(sample.peer for sample in mine):
        rounds = [sample for sample in mine if sample.peer == peer]
        figures = [sample.figures for sample in rounds if not sample.disturbed] or [s.figures for s in rounds]
        cells = [Spread.of(METRICS[metric](f) for f in figures).show(digits) for _, metric, digits in columns]
        pairs = ratios(samples, work, columns[0][1], peer, reference)
        cells.append(Spread.of(pairs).show(2) if pairs else "")
        lines.append(f"| {peer}{remark(figures, rounds)} | {' | '.join(cells)} |")
    return [*lines, ""]


def remark(figures: list[Figures], rounds: list[Sample]) -> str:
    """What a reader must know before believing a row."""
    remarks = []
    if any(f.get("starved") for f in figures):
        remarks.append(f"{max(f['starved'] for f in figures)} connections starved")
    if disturbed := sum(sample.disturbed for sample in rounds):
        left_out = "left out" if disturbed < len(rounds) else "worth nothing"
        remarks.append(f"{disturbed} of {len(rounds)} rounds disturbed, {left_out}")
    if any(f.get("generator_cpu", 0) > GENERATOR_BOUND * f.get("seconds", 1) for f in figures):
        remarks.append("at least: the generator was busy too")
    return f" ({', '.join(remarks)})" if remarks else ""


def markdown(
    samples: list[Sample],
    works: dict[str, tuple[str, str]],
    goals: list[Goal],
    about: dict[str, Any],
    failures: list[str],
) -> str:
    """The whole report; *works* maps a name to its kind and the peer that ratios are taken against."""
    lines = ["## Benchmark", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Each figure: median (lowest..highest) of the rounds; a ratio is taken within each round."]
    lines += [f"*Disturbed*: programs not of this suite used more than {DISTURBED:.0%} of the machine.", ""]
    for work, (kind, reference) in works.items():
        lines += table(samples, work, kind, reference)
    judged = [row for goal in goals if (row := goal.judge(samples))]
    if judged:
        lines += [
            "### Goals",
            "",
            "| work | what | goal | measured | |",
            "|---|---|---|---:|---|",
            *judged,
            "",
        ]
    if failures:
        lines += ["### Runs without a figure", "", *(f"- {failure}" for failure in failures), ""]
    return "\n".join(lines)
