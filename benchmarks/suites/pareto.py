"""Suite ``pareto``: who is best at the same cost, by share of the units that train.

A share is that of the units of each kind. The share of a full step's FLOPs that this leaves is
counted and stands in the report: forward pass, embeddings and decoder always run, so that it is
larger. At ``cpu`` shares are 50 and 25%.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence import pareto
from benchmarks.suites.results import Line
from benchmarks.suites.scales import tasks
from benchmarks.suites.spec import Method, Run, paired
from benchmarks.suites.train import train

TITLE = "Who is best at the same cost"

SHARES = {
    "cpu": (0.5, 0.25),
    "gpu": (0.75, 0.5, 0.35, 0.25, 0.15),
    "paper": (0.75, 0.5, 0.35, 0.25, 0.15),
    "test": (0.5,),
}

#: What ranks the units: criterion, output, per FLOP.
RANKINGS = (
    ("lambda_max", "sum_logits", False),
    ("lambda_max", "random", False),
    ("lambda_max", "loss", False),
    ("lambda_max", "loss", True),
    ("coherence", "sum_logits", False),
    ("coherence", "loss", False),
    ("trainability", "loss", False),
)

__all__ = ["RANKINGS", "SHARES", "TITLE", "methods", "report", "runs", "train"]


def methods(shares: Iterable[float]) -> list[Method]:
    """Return the full run and, for every share, all that compete at about the same cost.

    All skip by units; ``lambda_max`` of the loss and random also by weights, marked ``weights``.
    ``matched`` draws as many units of each layer as ``lambda_max`` of the loss chooses; ``short``
    costs what that costs, probes included.
    """
    found = [Method("full")]
    for share in shares:
        percent = f"{share:.0%}"
        for criterion, output, per_flop in RANKINGS:
            name = f"top-{criterion}-{output}{'-per-flop' if per_flop else ''}-{percent}"
            arguments = {"fraction": share, "criterion": criterion, "per_flop": per_flop}
            found.append(Method(name, "top", arguments, {"skip": "units", "output": output}))
        like = f"top-lambda_max-loss-{percent}"
        loss = {"fraction": share, "criterion": "lambda_max"}
        draw = {"fraction": share}
        found += [
            Method(f"bottom-{percent}", "bottom", loss, {"skip": "units", "output": "loss"}),
            Method(f"random-{percent}", "random", draw, {"skip": "units"}),
            Method(f"top-weights-{percent}", "top", loss, {"skip": "weights", "output": "loss"}),
            Method(f"random-weights-{percent}", "random", draw, {"skip": "weights"}),
            Method(f"matched-{percent}", "matched", callback={"skip": "units"}, like=like),
            Method(f"short-{percent}", plain="short", like=like),
        ]
    return found


def runs(scale: str, seeds: Iterable[int]) -> list[Run]:
    """Return all methods at all shares."""
    return paired("pareto", scale, tasks(scale, "pareto"), methods(SHARES[scale]), seeds)


def report(lines: list[Line]) -> str:
    """Return one table per share."""
    return pareto.tables(lines)
