"""What is noted of a run's decisions, small enough for one line of a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.suites.methods import Record
from lightning_mat.engine import MAT

#: λ_max is kept per unit up to so many units, and as quartiles per layer above.
MANY_UNITS = 200


def number(value: float | torch.Tensor, digits: int = 7) -> float | None:
    """Return a float of so many digits; None for NaN and Inf, which JSON has no word for.

    Example:
        >>> number(1 / 3, 3), number(float("nan"))
        (0.333, None)
    """
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def groups(layers: Sequence[str], kinds: Sequence[str]) -> dict[str, list[int]]:
    """Return the units of each ``layer|kind``, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, key in enumerate(zip(layers, kinds, strict=True)):
        found.setdefault("|".join(key), []).append(i)
    return found


def episode(mat: MAT) -> dict[str, Any]:
    """Return an episode's decision.

    Returns:
        ``trained``: per ``layer|kind`` how many units train, and of how many. ``reasons``: how
        often each. Where there was a probe, ``lambda_max``: per ``layer|kind`` one value per unit,
        or the quartiles where the model has many units; and ``skew``: per kind the largest λ_max
        over the median.
    """
    active, decision = mat.active, mat.decision
    members = groups(mat.part.layers, mat.part.kinds)
    noted: dict[str, Any] = {
        "trained": {key: [int(active[own].sum()), len(own)] for key, own in members.items()},
        "reasons": dict(Counter(decision.reasons)),
    }
    if mat.spectra is not None:
        values = mat.spectra.lambda_max
        many = len(mat.part) > MANY_UNITS
        noted["lambda_max"] = {
            key: _quartiles(values[own]) if many else [number(v, 4) for v in values[own].tolist()]
            for key, own in members.items()
        }
        kinds = groups([""] * len(mat.part), mat.part.kinds)
        noted["skew"] = {key[1:]: _skew(values[own]) for key, own in kinds.items()}
    return noted


def record_of(line: Mapping[str, Any]) -> Record:
    """Return what ``Matched`` takes from a finished run's line.

    Raises:
        ValueError: If the run has no episode.
    """
    if not line["episodes"]:
        raise ValueError(f"the run {line['key']} noted no episode: there is nothing to match")
    return [
        {tuple(key.split("|")): count for key, (count, _) in noted["trained"].items()}
        for noted in line["episodes"]
    ]


def shares_trained(steps_trained: torch.Tensor, steps: int) -> dict[str, int]:
    """Return how many units trained in which share of the steps, shares in percent.

    Example:
        >>> shares_trained(torch.tensor([10, 10, 4]), steps=10)
        {'40': 1, '100': 2}
    """
    percent = (100 * steps_trained / max(steps, 1)).round().int().tolist()
    return {str(share): count for share, count in sorted(Counter(percent).items())}


def _skew(values: torch.Tensor) -> float | None:
    return number(values.nan_to_num().max() / values.nanmedian(), 4)


def _quartiles(values: torch.Tensor) -> list[float | None]:
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype)
    return [number(v, 4) for v in torch.nanquantile(values, points).tolist()]
