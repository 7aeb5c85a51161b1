"""The suite's own tests: its arithmetic, its words, its options, and one small run of everything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import job
import pytest
import report
import run
import servers
import works
from report import Goal, Result, Sample, Spread, markdown, ratios

pytestmark = pytest.mark.once

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"


def echo(peer: str, number: int, rate: float, work: str = "echo-64-64", **more: Any) -> Sample:
    figures = {
        "operations": rate,
        "seconds": 1.0,
        "p50_us": 1e6 / rate,
        "p99_us": 2e6 / rate,
        "server_cpu": 0.5,
        "generator_cpu": 0.5,
        "other_share": 0.0,
    }
    return Sample(work, peer, number, {**figures, **more})


def result(samples: list[Sample], works: dict[str, tuple[str, str, str]] | None = None) -> Result:
    return Result({"date": "today"}, works or {"echo-64-64": ("Echo", "echo", "stdlib")}, samples, [])


# ── statistics ──


def test_a_spread_is_the_median_and_the_range() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    assert Spread.of([1, 2]).median == 1.5
    assert Spread(12_345.6, 1_000, 20_000).show(0) == "12,346 (1,000..20,000)"


def test_a_ratio_is_taken_within_a_round_and_never_across() -> None:
    samples = [echo("a", 0, 100), echo("b", 0, 50), echo("a", 1, 900), echo("b", 1, 300), echo("a", 2, 7)]
    assert ratios(samples, "rate", ("echo-64-64", "a"), ("echo-64-64", "b")) == [2.0, 3.0]


def test_a_round_in_which_either_was_disturbed_gives_no_ratio() -> None:
    samples = [echo("a", 0, 100), echo("b", 0, 50, other_share=0.2), echo("a", 1, 90), echo("b", 1, 30)]
    assert ratios(samples, "rate", ("echo-64-64", "a"), ("echo-64-64", "b")) == [3.0]


def test_a_ratio_may_be_to_another_work() -> None:
    samples = [echo("a", 0, 90, "echo-64-1000"), echo("a", 0, 100)]
    assert ratios(samples, "rate", ("echo-64-1000", "a"), ("echo-64-64", "a")) == [0.9]


# ── goals ──


@pytest.mark.parametrize(
    ("bound", "at_most", "verdict"),
    [
        (1.9, False, "| met |"),
        (2.1, False, "**not met**"),
        (2.1, True, "| met |"),
        (1.9, True, "**not met**"),
    ],
)
def test_a_goal_is_met_or_it_is_not(bound: float, at_most: bool, verdict: str) -> None:
    samples = [echo("a", 0, 100), echo("b", 0, 50)]
    assert verdict in Goal("echo-64-64", "rate", "a", "b", bound, at_most).judge(samples)


def test_what_was_not_measured_is_not_called_met() -> None:
    goal = Goal("echo-64-64", "rate", "a", "b", 0.0)
    assert "not measured in this run" in goal.judge([])
    assert "no undisturbed pair" in goal.judge([echo("a", 0, 1), echo("b", 0, 1, other_share=0.5)])


def test_every_goal_is_of_a_work_that_exists_and_of_peers_that_do_it() -> None:
    planned = {work.name: work for work in works.plan(works.FULL)}
    for goal in works.GOALS:
        kind = planned[goal.work].kind
        assert goal.ours in planned[goal.work].peers
        assert goal.reference is None or goal.reference in planned[goal.reference_work or goal.work].peers
        assert goal.metric in [metric for _, metric, _ in report.COLUMNS[kind]]


# ── the report ──


def test_the_report_says_when_the_generator_may_be_the_limit() -> None:
    text = markdown(result([echo("stdlib", 0, 9, generator_cpu=0.91)]), [])
    assert "stdlib (at least: the generator was busy too)" in text
    assert "generator was busy" not in markdown(result([echo("stdlib", 0, 9, generator_cpu=0.89)]), [])


def test_the_report_says_what_was_disturbed_or_starved() -> None:
    text = markdown(result([echo("a", 0, 9, other_share=0.3), echo("a", 1, 9, starved=3)]), [])
    assert "a (3 connections starved, 1 of 2 rounds disturbed, left out)" in text


def test_the_report_says_when_one_way_starves_the_other() -> None:
    works = {"both": ("Both", "both", "asyncio")}
    fair = {"bytes": 100, "received": 40, "seconds": 1.0, "server_cpu": 1, "generator_cpu": 0}
    samples = [Sample("both", "a", 0, fair), Sample("both", "b", 0, {**fair, "received": 97})]
    text = markdown(result(samples, works), [])
    assert "| a | 0 (0..0)" in text and "| b (one way starves the other) |" in text


def test_a_figure_that_a_run_does_not_have_is_an_empty_cell() -> None:
    sample = Sample(
        "http", "stdlib", 0, {"operations": 1, "seconds": 1.0, "server_cpu": 1, "generator_cpu": 1}
    )
    text = markdown(result([sample], {"http": ("HTTP", "http", "stdlib")}), [])
    assert "| stdlib (at least: the generator was busy too) | 1 (1..1) |  |  |" in text


def test_who_serves_nobody_has_no_latency_and_no_ratio() -> None:
    nobody = {"operations": 0, "seconds": 1.0, "server_cpu": 1, "generator_cpu": 0, "starved": 9}
    samples = [Sample("echo-64-64", "stdlib", 0, nobody), echo("a", 0, 100)]
    assert "| stdlib (9 connections starved) | 0 (0..0) |  |  |  |" in markdown(result(samples), [])
    for metric in ("rate", "p50", "cpu_per_1000"):
        assert not ratios(samples, metric, ("echo-64-64", "a"), ("echo-64-64", "stdlib"))


def test_a_result_survives_its_file_and_the_later_of_two_counts(tmp_path: Path) -> None:
    first, second = result([echo("a", 0, 1)]), result([echo("a", 0, 2)])
    first.save(tmp_path / "1.json")
    second.save(tmp_path / "2.json")
    assert Result.load(tmp_path / "1.json") == first
    assert Result.merged([tmp_path / "1.json", tmp_path / "2.json"]) == second


def test_the_documentation_shows_the_report_of_the_figures_it_keeps() -> None:
    figures = sorted((DOCS / "figures").glob("*.json"))
    assert markdown(Result.merged(figures), works.GOALS) == (DOCS / "figures" / "report.md").read_text()


# ── options ──


def test_a_work_is_chosen_by_its_name_or_the_beginning_of_it() -> None:
    assert [work.name for work in works.select(works.FULL, False, "echo-64-1")] == ["echo-64-1"]
    chosen = {work.name for work in works.select(works.FULL, False, "echo-4096,mqtt")}
    assert chosen == {"echo-4096-1", "echo-4096-64", "echo-4096-1000", "mqtt"}


def test_quick_is_a_part_and_what_it_names_exists() -> None:
    quick = works.select(works.QUICK, True, "")
    assert {work.name: work.peers for work in quick} == works.QUICK_WORKS
    full = {work.name: work for work in works.plan(works.QUICK)}
    assert all(set(work.peers) <= set(full[work.name].peers) for work in quick)
    assert works.select(works.QUICK, True, "lines-1")[0].peers == full["lines-1"].peers


def test_the_command_line_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (["--only", "echo-63"], "echo-63"), (["--peers", "stdlib,netty"], "netty"):
        with pytest.raises(SystemExit):
            run.arguments(words)
        assert why in capsys.readouterr().err


def test_an_option_overrides_the_pace() -> None:
    pace = run.pace_of(run.arguments(["--quick", "--seconds", "0.5", "--budget", "7"]))
    assert (pace.seconds, pace.budget, pace.rounds) == (0.5, 7, works.QUICK.rounds)


def test_every_peer_of_every_work_has_a_server() -> None:
    for work in works.plan(works.FULL):
        assert set(work.peers) <= {"c", *servers.SERVERS}
    assert set(works.PEERS) == {"c", *servers.SERVERS}


def test_peers_take_turns_in_alternating_order() -> None:
    both = works.Work("w", "W", "echo", ("a", "b"), "a", lambda bench, peer: {})
    once = works.Work("v", "V", "echo", ("a", "b"), "a", lambda bench, peer: {}, rounds=1)
    order = [(number, work.name + peer) for number, work, peer in run.turns([both, once], ["a", "b"], 2)]
    assert order == [(0, "wa"), (0, "wb"), (0, "va"), (0, "vb"), (1, "wb"), (1, "wa")]


def test_a_missing_package_leaves_its_peer_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(works, "NEEDS", {"uvloop": "no_such_package"})
    assert run.present(["stdlib", "uvloop"]) == ["stdlib"]
    assert (
        "uvloop is left out: the package `no_such_package` is not installed here" in capsys.readouterr().err
    )


def test_lines_are_numbered_for_each_sender() -> None:
    lines = job.lines(3)
    first, second = next(lines), next(lines)
    assert (len(first), first[:7], second[:7], first[-2:]) == (job.LINE, b"3 0000 ", b"3 0001 ", b"x\n")


# ── all of it, once ──


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the suite needs Linux")
@pytest.mark.skipif(shutil.which("cc") is None, reason="the load generator needs a C compiler")
def test_a_small_run_measures_and_reports(tmp_path: Path) -> None:
    only = ["--only", "echo-64-1,lines-1", "--peers", "c,stdlib,bridge-threads", "--rounds", "1"]
    short = ["--quick", "--seconds", "0.05", "--patience", "0", "--json", str(tmp_path / "result.json")]
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), *only, *short], capture_output=True, text=True, timeout=50
    )
    if "libssl-dev" in done.stderr:
        pytest.skip("the load generator needs OpenSSL's headers")
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "result.json").read_text())["samples"]
    assert {(sample["work"], sample["peer"]) for sample in samples} == {
        ("echo-64-1", "c"),
        ("echo-64-1", "stdlib"),
        ("echo-64-1", "bridge-threads"),
        ("lines-1", "c"),
        ("lines-1", "stdlib"),
        ("lines-1", "bridge-threads"),
    }
    assert "### Goals" in done.stdout and "### Echo of 64 B, 1 connection" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib")
def test_plots_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    result([echo("stdlib", 0, 100), echo("bridge-inbox", 0, 120)]).save(tmp_path / "result.json")
    command = [sys.executable, str(HERE / "run.py"), "--from", str(tmp_path / "result.json"), "--plots"]
    drawn = []
    for name in ("first", "second"):
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True, timeout=50)
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(drawn[0]) == {"echo.svg"}
    assert drawn[0] == drawn[1]
