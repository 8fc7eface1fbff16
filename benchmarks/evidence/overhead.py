"""Table of the suite ``overhead``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.evidence.facts import sorted_facts
from benchmarks.evidence.words import plain
from benchmarks.suites.results import Line
from benchmarks.suites.stats import Estimate, estimate
from benchmarks.tabular import markdown


def step_ratio(lines: Sequence[Line], way: str) -> Estimate:
    """Return the seconds of a step of one way over plain Lightning's: a median per run."""
    return estimate(
        [
            statistics.median(
                r[way]["step_seconds"] / r["plain"]["step_seconds"] for r in line["rounds"]
            )
            for line in lines
        ]
    )


def table(lines: Sequence[Line]) -> str:
    """Return what a step and a probe cost more than a step of plain Lightning, per task."""
    rows = []
    for facts in sorted_facts(lines):
        own = list(facts.lines["interleaved"].values())
        plain_ms = estimate([1e3 * _median(line, "plain", "step_seconds") for line in own])
        probe = estimate(
            [
                _median(line, "probing", "probe_seconds") / _median(line, "plain", "step_seconds")
                for line in own
            ]
        )
        rows.append(
            [
                facts.place,
                str(len(own)),
                plain(plain_ms, 1),
                plain(step_ratio(own, "active"), 3),
                plain(step_ratio(own, "probing"), 3),
                plain(probe, 2),
                str(facts.task["n_samples"]),
            ]
        )
    head = [
        *("task", "runs", "plain step, ms", "callback, all active ÷ plain"),
        *("callback between probes ÷ plain", "a probe ÷ a plain step", "its samples"),
    ]
    return markdown(head, rows)


def _median(line: Line, way: str, what: str) -> float:
    return statistics.median(r[way][what] for r in line["rounds"])
