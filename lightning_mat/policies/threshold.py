"""λ_α: the eigenvalue below which a unit is nuisance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

AUTO = "auto"


def default_alpha(kind: str) -> float | str:
    """Return the α of a kind of units where none is given: 0.1, for filters ``"auto"``.

    A few filters have kernels many times as large as all others, so that a share of the range
    rests most of them, at the cost of accuracy: see ``docs/decisions.md``.

    Example:
        >>> default_alpha("head"), default_alpha("filter")
        (0.1, 'auto')
    """
    return AUTO if kind == "filter" else 0.1


# Eigenvalues of a float32 probe are right to a relative 1e-3: a smaller gap is no gap.
_RESOLUTION = math.log1p(1e-3)


def eigenvalue_threshold(
    lambda_max: Sequence[float], lambda_min: Sequence[float], alpha: float
) -> float:
    r"""Return the threshold of one kind at one probe.

    .. math:: \lambda_\alpha =
        \tilde\lambda_{\min} + (\tilde\lambda_{\max} - \tilde\lambda_{\min})\,\alpha,

    with the minimum and maximum over all eigenvalues of all mNTKs of the kind, hence over the
    units' smallest and largest ones.

    Args:
        lambda_max: Principal eigenvalue of each unit of the kind.
        lambda_min: Smallest eigenvalue of each unit of the kind.
        alpha: α in (0, 1).

    Returns:
        λ_α, at most the largest of ``lambda_max``: α < 1 always leaves one unit above it.

    Source:
        Shi et al., MAT (NeurIPS 2023), equation 4.

    Example:
        >>> eigenvalue_threshold([100.0, 40.0], [1.0, 0.0], alpha=0.25)
        25.0
    """
    low, high = min(lambda_min), max(lambda_max)
    # Rounding keeps the promise: α < 1 rounds the product to at most the exact difference.
    return low + (high - low) * alpha


def gap_threshold(lambda_max: Sequence[float]) -> float:
    r"""Return the threshold in the widest gap between the sorted log λ_max of one kind.

    With :math:`\lambda_{(1)} \le \dots \le \lambda_{(n)}` the positive principal eigenvalues,

    .. math:: \lambda_\alpha = \sqrt{\lambda_{(j)} \lambda_{(j+1)}}, \quad
        j = \arg\max_i \log \lambda_{(i+1)} - \log \lambda_{(i)},

    the middle of the gap on a log axis; of equally wide gaps, the lowest.

    Where there is no gap, the threshold is the smallest eigenvalue of all, so that nobody rests:
    with one unit, with fewer than two positive eigenvalues, and where all positive ones are within
    a relative 1e-3 of their neighbours, the accuracy of a float32 probe. Zeros have no logarithm:
    they are left out of the search, and rest with the units below the gap that it finds.

    Args:
        lambda_max: Principal eigenvalue of each unit of the kind.

    Returns:
        λ_α; units with λ_max below it are nuisance.

    Example:
        >>> round(gap_threshold([1e3, 2e3, 8e7, 9e7]))
        400000
        >>> gap_threshold([5.0, 5.0, 5.0])
        5.0
    """
    logs = sorted(math.log(value) for value in lambda_max if value > 0)
    widest, middle = _RESOLUTION, None
    for below, above in pairwise(logs):
        if above - below > widest:
            widest, middle = above - below, (below + above) / 2
    return min(lambda_max) if middle is None else math.exp(middle)
