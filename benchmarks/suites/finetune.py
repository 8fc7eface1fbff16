"""Suite ``finetune``: a pretrained encoder on the sentiment of film reviews."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import comparison
from benchmarks.suites.methods import PAPER
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Method, Run, paired
from benchmarks.suites.train import train

TITLE = "Fine-tuning a pretrained encoder on {corpus} (compare AutoFreeze)"

#: Fine-tuning is where gradients into the lower layers are worth skipping: all skip by units.
_UNITS = {"skip": "units"}
METHODS = [
    Method("full"),
    Method("mat", "mat", PAPER["sentiment"], _UNITS),
    Method("random", "random", {"fraction": 0.5}, _UNITS),
    Method("lower-half", plain="lower-half"),
    Method("short", plain="short", like="mat"),
]

__all__ = ["TITLE", "report", "runs", "train"]


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return plain training, MAT, random, the lower half frozen, and fewer steps."""
    return paired("finetune", scale, tasks(scale, "finetune"), METHODS, seeds)


def report(lines: list[Line]) -> str:
    """Return the tables."""
    return comparison.tables(lines)
