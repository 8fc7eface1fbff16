"""Suite ``bert``: masked language modelling on WikiText-2 (the paper's table 1)."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import comparison
from benchmarks.suites import methods
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Run, paired
from benchmarks.suites.train import train

TITLE = "BERT, masked words of {corpus} (paper: table 1)"

__all__ = ["TITLE", "report", "runs", "train"]


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return the paper's baselines, MAT and the controls."""
    return paired("bert", scale, tasks(scale, "bert"), methods.comparison("bert"), seeds)


def report(lines: list[Line]) -> str:
    """Return the tables."""
    return comparison.tables(lines)
