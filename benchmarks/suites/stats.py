"""Paired statistics: per-seed differences, their mean, standard error and 95% interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: 97.5% quantiles of Student's t distribution with 1, 2, … 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """Mean of n values with its uncertainty.

    Attributes:
        n: Values.
        mean: Their mean; NaN without values.
        error: Standard error of the mean; NaN below two values.
        low: Lower end of the 95% interval (Student's t); NaN below two values.
        high: Its upper end.
    """

    n: int
    mean: float
    error: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether the interval covers zero; True where there is none: nothing was shown."""
        return not (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, standard error and 95% interval of some values.

    Example:
        >>> e = estimate([1.0, 2.0, 3.0])
        >>> e.mean, round(e.error, 4), round(e.low, 3), round(e.high, 3)
        (2.0, 0.5774, -0.484, 4.484)
        >>> estimate([1.0]).covers_zero
        True
    """
    n = len(values)
    if n < 2:
        mean = values[0] if values else math.nan
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(n)
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * error
    return Estimate(n, mean, error, mean - half, mean + half)


def differences(
    values: Mapping[int, float | None], base: Mapping[int, float | None]
) -> list[float]:
    """Return value − base for every seed that has both, in order of the seeds.

    Example:
        >>> differences({0: 1.5, 1: 2.0, 2: None}, {0: 1.0, 2: 3.0})
        [0.5]
    """
    return [
        value - other
        for seed in sorted(values)
        if (value := values[seed]) is not None and (other := base.get(seed)) is not None
    ]


def reached(
    curve: Sequence[Mapping[str, Any]], metric: str, target: float, cost: str, *, more: bool
) -> float | None:
    """Return the cost at which a curve first reaches a target, linear between its points.

    Args:
        curve: Points, in order.
        metric: What is compared with the target.
        target: Value to reach.
        cost: ``"seconds"``, ``"flops"``, ``"paper_flops"`` or ``"step"``.
        more: Whether larger values are better.

    Returns:
        The cost; None if the curve never gets there.

    Example:
        >>> curve = [{"loss": 4.0, "seconds": 10.0}, {"loss": 2.0, "seconds": 20.0}]
        >>> reached(curve, "loss", 3.0, "seconds", more=False)
        15.0
    """
    sign = 1 if more else -1
    before = None
    for point in curve:
        if point.get(metric) is None:
            before = None
            continue
        gap = sign * (point[metric] - target)
        if gap >= 0:
            if before is None or gap == 0:
                return float(point[cost])
            earlier = sign * (before[metric] - target)
            part = -earlier / (gap - earlier)
            return float(before[cost] + part * (point[cost] - before[cost]))
        before = point
    return None


def value_at(
    curve: Sequence[Mapping[str, Any]], metric: str, cost: str, amount: float, *, more: bool
) -> float | None:
    """Return the best value that a curve has seen by a cost; linear inside the last interval.

    Returns:
        None if the first point costs more, or nothing finite was seen.

    Example:
        >>> curve = [{"loss": 4.0, "seconds": 10.0}, {"loss": 2.0, "seconds": 20.0}]
        >>> value_at(curve, "loss", "seconds", 15.0, more=False)
        3.0
        >>> value_at(curve, "loss", "seconds", 99.0, more=False)
        2.0
    """
    best = max if more else min
    found: list[float] = []
    before = None
    for point in curve:
        value = point.get(metric)
        if point[cost] > amount:
            if before is not None and value is not None:
                part = (amount - before[cost]) / (point[cost] - before[cost])
                found.append(before[metric] + part * (value - before[metric]))
            break
        if value is not None:
            found.append(value)
        before = point if value is not None else None
    return best(found) if found else None


def best_point(
    curve: Sequence[Mapping[str, Any]], metric: str, *, more: bool
) -> Mapping[str, Any] | None:
    """Return the first of the best points of a curve; None where none has a value.

    Example:
        >>> best_point([{"loss": 4.0}, {"loss": 2.0}, {"loss": 3.0}], "loss", more=False)
        {'loss': 2.0}
    """
    points = [p for p in curve if p.get(metric) is not None]
    sign = -1 if more else 1
    return min(points, key=lambda p: sign * p[metric]) if points else None
