"""Suite ``switch``: masked language modelling with a mixture of experts (the paper's table 2)."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import comparison
from benchmarks.suites import methods
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Run, paired
from benchmarks.suites.train import train

TITLE = "Switch-Transformer, masked words of {corpus} (paper: table 2, on WikiText-103)"

__all__ = ["TITLE", "report", "runs", "train"]


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return the paper's baselines, MAT and the controls."""
    return paired("switch", scale, tasks(scale, "switch"), methods.comparison("switch"), seeds)


def report(lines: list[Line]) -> str:
    """Return the tables."""
    return comparison.tables(lines)
