"""Suite ``sizes``: what MAT saves, and what its probes cost, by size of BERT (table 7)."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import sizes
from benchmarks.suites.methods import PAPER
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Method, Run, paired
from benchmarks.suites.train import train

TITLE = "Sizes of BERT: saving and overhead (paper: table 7)"

METHODS = [Method("full"), Method("mat", "mat", PAPER["bert"])]

__all__ = ["TITLE", "report", "runs", "train"]


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return plain training and MAT for each size."""
    return paired("sizes", scale, tasks(scale, "sizes"), METHODS, seeds)


def report(lines: list[Line]) -> str:
    """Return one row per size."""
    return sizes.table(lines)
