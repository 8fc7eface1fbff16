"""The temporal rule: units whose principal eigenvalue has settled."""

from __future__ import annotations

import torch
from torch import Tensor


def settled(lambda_max: Tensor, beta: float, *, permanent: bool = False) -> Tensor:
    r"""Return which units the temporal policy rests after the newest probe.

    With t = 0 the first probe, after warm-up, and
    :math:`\Delta_t = |\lambda_{\max}(t) - \lambda_{\max}(0)|`, a unit rests at t ≥ 2 if

    .. math:: |\Delta_t - \Delta_{t-1}| < \beta\,\Delta_1,

    which is equation 6 multiplied by its denominator, so that a unit whose first variation
    :math:`\Delta_1` is zero divides by nothing and never rests.

    At t = 0 there is no variation yet. At t = 1 the left side of equation 6 is
    :math:`|\Delta_1 - 0| / \Delta_1 = 1` by definition, whatever the unit does: it says nothing,
    and the rule begins at t = 2.

    Args:
        lambda_max: Principal eigenvalues at each probe, shape ``[P, n]``, t = P - 1 the newest. A
            probe that did not measure a unit (NaN) counts for nothing to it.
        beta: β ≥ 0; with 0 nobody rests.
        permanent: Rest also if the condition held at any earlier t ≥ 2.

    Returns:
        bool, shape ``[n]``.

    Source:
        Shi et al., MAT (NeurIPS 2023), equation 6 and line 13 of algorithm 1.

    Example:
        >>> series = torch.tensor([[9.0, 9.0], [5.0, 5.0], [5.1, 3.0]])  # Δ: 0, 4, then 3.9 and 6
        >>> settled(series, beta=0.1)
        tensor([ True, False])
    """
    if lambda_max.isnan().any():
        seen = (column[~column.isnan()][:, None] for column in lambda_max.unbind(1))
        return torch.cat([settled(column, beta, permanent=permanent) for column in seen])
    if len(lambda_max) < 3:
        return torch.zeros(lambda_max.shape[1], dtype=torch.bool)
    variation = (lambda_max - lambda_max[0]).abs()
    change = (variation[2:] - variation[1:-1]).abs()
    rests = change < beta * variation[1]
    return rests.any(0) if permanent else rests[-1]
