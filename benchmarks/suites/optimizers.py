"""Suite ``optimizers``: MAT under the paper's Adam, β = (0, 0), and under AdamW."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import comparison
from benchmarks.suites.methods import PAPER
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Method, Run, paired
from benchmarks.suites.train import train

TITLE = "Optimizers: Adam with β = (0, 0), as in the paper, and AdamW with β = (0.9, 0.98)"

METHODS = [
    Method("full"),
    Method("mat", "mat", PAPER["bert"]),
    Method("mat-units", "mat", PAPER["bert"], {"skip": "units"}),
]

__all__ = ["TITLE", "report", "runs", "train"]


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return plain training and MAT, with both ways of skipping, under both optimizers."""
    return paired("optimizers", scale, tasks(scale, "optimizers"), METHODS, seeds)


def report(lines: list[Line]) -> str:
    """Return one table per optimizer."""
    return comparison.tables(lines)
