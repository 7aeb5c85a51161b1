"""Medians, ratios with their spread, and the Markdown that shows them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

DISTURBED = 0.10
"""A sample is left out where strangers used more of the machine: they slow some peers more than others."""

GENERATOR_BOUND = 0.90
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
    "cpu_per_1000": lambda f: 1000 * f["server_cpu"] / f["operations"],
    "mb": lambda f: f["bytes"] / f["seconds"] / 1e6,
    "mb_up": lambda f: (f["bytes"] - f["received"]) / f["seconds"] / 1e6,
    "mb_down": lambda f: f["received"] / f["seconds"] / 1e6,
    "cpu_per_gb": lambda f: 1e9 * f["server_cpu"] / f["bytes"],
    "generator": lambda f: 100 * f["generator_cpu"] / f["seconds"],
    "server": lambda f: 100 * f["server_cpu"] / f["seconds"],
    "resumed": lambda f: 100 * f["resumed"] / f["operations"],
    "kb": lambda f: f["kb_per_session"],
    "threads": lambda f: f["threads_per_session"],
    "cpu_empty": lambda f: 100 * f["cpu_empty"],
    "cpu_idle": lambda f: 100 * f["cpu_idle"],
    "opening": lambda f: f["connections"] / f["opening_seconds"],
    "first": lambda f: f["first_ms"],
    "second": lambda f: f["second_ms"],
    "all_there": lambda f: 1000 * f["opening_seconds"],
    "base": lambda f: f["base_ms"],
    "server_threads": lambda f: f["threads"],
}
"""Rates are a second, p50 and p99 µs, CPU s per 1,000 operations or per GB, and else % of a core, KiB, ms."""

COST = [
    ("CPU s per 1,000", "cpu_per_1000", 4),
    ("server %", "server", 0),
    ("generator %", "generator", 0),
]
LATENCY = [("p50 µs", "p50", 0), ("p99 µs", "p99", 0)]

COLUMNS: dict[str, list[tuple[str, str, int]]] = {
    "echo": [("round trips/s", "rate", 0), *LATENCY, *COST],
    "lines": [("lines/s", "rate", 0), *COST],
    "bulk": [
        ("MB/s", "mb", 0),
        ("CPU s per GB", "cpu_per_gb", 2),
        ("server %", "server", 0),
        ("generator %", "generator", 0),
    ],
    "both": [
        ("MB/s, both ways", "mb", 0),
        ("down", "mb_down", 0),
        ("up", "mb_up", 0),
        ("CPU s per GB", "cpu_per_gb", 2),
        ("server %", "server", 0),
        ("generator %", "generator", 0),
    ],
    "handshakes": [("sessions/s", "rate", 0), *LATENCY, ("resumed %", "resumed", 0), *COST],
    "http": [("requests/s", "rate", 0), *LATENCY, *COST],
    "mqtt": [("p50 µs", "p50", 0), ("round trips/s", "rate", 0)],
    "idle": [
        ("KB per session", "kb", 1),
        ("threads per session", "threads", 2),
        ("CPU % while all are idle", "cpu_idle", 2),
        ("opened a second", "opening", 0),
        ("active: round trips/s", "rate", 0),
        *((f"active: {head}", metric, digits) for head, metric, digits in LATENCY),
        ("generator %", "generator", 0),
    ],
    "half-open": [
        ("first client ms", "first", 1),
        ("second ms", "second", 1),
        ("all half-open ones connected after ms", "all_there", 0),
        ("threads", "server_threads", 0),
    ],
    "vanish": [("next client ms", "first", 1), ("nothing left of them after ms", "base", 0)],
}
"""Heading, metric and digits; the first column is the one that ratios are taken of."""


@dataclasses.dataclass(frozen=True)
class Result:
    """All of one run, or of several: *works* maps a name to its title, its kind and the peer ratios are taken of."""

    about: dict[str, Any]
    works: dict[str, tuple[str, str, str]]
    samples: list[Sample]
    failures: list[str]

    def save(self, path: Path) -> None:
        """As JSON, a line a sample."""
        samples = ",\n  ".join(json.dumps(dataclasses.asdict(sample)) for sample in self.samples)
        rest = {"about": self.about, "works": self.works, "failures": self.failures}
        path.write_text(f'{json.dumps(rest, indent=1)[:-2]},\n "samples": [\n  {samples}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote."""
        found = json.loads(path.read_text())
        works = {name: (work[0], work[1], work[2]) for name, work in found["works"].items()}
        samples = [Sample(**sample) for sample in found["samples"]]
        return cls(found["about"], works, samples, found["failures"])

    @classmethod
    def merged(cls, paths: Sequence[Path]) -> Result:
        """Several, in one; of a work that is in two of them, the later counts.  What they differ in is said."""
        parts = [cls.load(path) for path in paths]
        owner = {name: index for index, part in enumerate(parts) for name in part.works}
        keys = dict.fromkeys(key for part in parts for key in part.about)
        about = {
            key: "; or ".join(dict.fromkeys(str(part.about[key]) for part in parts if key in part.about))
            for key in keys
        }
        return cls(
            about,
            {name: parts[index].works[name] for name, index in owner.items()},
            [s for index, part in enumerate(parts) for s in part.samples if owner[s.work] == index],
            list(dict.fromkeys(failure for part in parts for failure in part.failures)),
        )


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the project promised: *ours*' metric, over *reference*'s if there is one, against *bound*.

    The reference is measured in *reference_work*, by default the same; it may be ourselves elsewhere.
    """

    work: str
    metric: str
    ours: str
    reference: str | None
    bound: float
    at_most: bool = False
    dream: bool = False
    reference_work: str = ""

    def __str__(self) -> str:
        what = f"{self.metric} of {self.ours}"
        if self.reference_work:
            return f"{what} / {self.reference}'s of {self.reference_work}"
        return f"{what} / {self.reference}'s" if self.reference else what

    def judge(self, samples: list[Sample]) -> str:
        """A row of the goals table."""
        mine = [s for s in samples if (s.work, s.peer) == (self.work, self.ours)]
        if self.reference is None:
            values = known((s.figures for s in mine if not s.disturbed), self.metric)
        else:
            other = (self.reference_work or self.work, self.reference)
            values = ratios(samples, self.metric, (self.work, self.ours), other)
        goal = f"{'≤' if self.at_most else '≥'} {self.bound:g}"
        row = f"| {self.work} | {self} | {'dream' if self.dream else 'goal'} {goal} |"
        if not values:
            return f"{row} | {'no undisturbed pair of rounds' if mine else 'not measured in this run'} |"
        got = Spread.of(values)
        met = got.median <= self.bound if self.at_most else got.median >= self.bound
        return f"{row} {got.show(2)} | {'met' if met else '**not met**'} |"


def ratios(
    samples: list[Sample], metric: str, mine: tuple[str, str], reference: tuple[str, str]
) -> list[float]:
    """One ratio per round in which both ran undisturbed; *mine* and *reference* are a work and a peer."""
    sides: dict[tuple[str, str], dict[int, float | None]] = {mine: {}, reference: {}}
    for sample in samples:
        side = sides.get((sample.work, sample.peer))
        if side is not None and not sample.disturbed:
            side[sample.round] = measured(sample.figures, metric)
    pairs = ((value, sides[reference].get(number)) for number, value in sides[mine].items())
    return [value / other for value, other in pairs if value is not None and other]


def table(result: Result, work: str) -> list[str]:
    """One work's Markdown table, a row per peer."""
    title, kind, reference = result.works[work]
    columns = COLUMNS[kind]
    mine = [sample for sample in result.samples if sample.work == work]
    heads = ["peer", *(head for head, _, _ in columns), f"{columns[0][0]} / {reference}"]
    lines = [f"### {title}", "", f"`{work}`", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for peer in dict.fromkeys(sample.peer for sample in mine):
        rounds = [sample for sample in mine if sample.peer == peer]
        figures = [sample.figures for sample in rounds if not sample.disturbed] or [s.figures for s in rounds]
        cells = [show(figures, metric, digits) for _, metric, digits in columns]
        pairs = ratios(mine, columns[0][1], (work, peer), (work, reference))
        cells.append(Spread.of(pairs).show(2) if pairs else "")
        lines.append(f"| {peer}{remark(figures, rounds)} | {' | '.join(cells)} |")
    return [*lines, ""]


def show(figures: list[Figures], metric: str, digits: int) -> str:
    """A cell; empty where no run has that figure."""
    values = known(figures, metric)
    return Spread.of(values).show(digits) if values else ""


def known(figures: Iterable[Figures], metric: str) -> list[float]:
    """The metric of all runs that have it: who serves nobody has no latency, and no cost of serving."""
    values = (measured(one, metric) for one in figures)
    return [value for value in values if value is not None]


def measured(figures: Figures, metric: str) -> float | None:
    """The metric of one run, if it has it."""
    try:
        return METRICS[metric](figures)
    except (KeyError, ZeroDivisionError):
        return None


def remark(figures: list[Figures], rounds: list[Sample]) -> str:
    """What a reader must know before believing a row."""
    remarks = []
    if any(f.get("starved") for f in figures):
        remarks.append(f"{max(f['starved'] for f in figures)} connections starved")
    if any("received" in f and one_way(f) for f in figures):
        remarks.append("one way starves the other")
    if disturbed := sum(sample.disturbed for sample in rounds):
        left_out = "left out" if disturbed < len(rounds) else "worth nothing"
        remarks.append(f"{disturbed} of {len(rounds)} rounds disturbed, {left_out}")
    if any(f.get("generator_cpu", 0) > GENERATOR_BOUND * f.get("seconds", 1) for f in figures):
        remarks.append("at least: the generator was busy too")
    return f" ({', '.join(remarks)})" if remarks else ""


def one_way(figures: Figures) -> bool:
    """Whether of two ways one got less than a twentieth."""
    share = figures["received"] / max(figures["bytes"], 1)
    return bool(min(share, 1 - share) < 0.05)


def markdown(result: Result, goals: list[Goal]) -> str:
    """The whole report."""
    lines = ["## Benchmark", "", *(f"- {name}: {value}" for name, value in result.about.items()), ""]
    lines += ["Each figure: median (lowest..highest) of the rounds; a ratio is taken within each round."]
    lines += [f"*Disturbed*: programs not of this suite used more than {DISTURBED:.0%} of the machine."]
    lines += [
        "*Generator %*: of one core; where it is over 90, the generator may be the limit, and not the server."
    ]
    lines += ["", *goals_table(result, goals)]
    for work in result.works:
        lines += table(result, work)
    if result.failures:
        lines += ["### Runs without a figure", "", *(f"- {failure}" for failure in result.failures), ""]
    return "\n".join(lines)


def goals_table(result: Result, goals: list[Goal]) -> list[str]:
    """What was promised, and what was measured."""
    rows = [goal.judge(result.samples) for goal in goals]
    head = ["### Goals", "", "| work | what | asked for | measured | |", "|---|---|---|---:|---|"]
    return [*head, *rows, ""]
