"""Spending a budget: the units that give the most of a criterion, λ_max, per FLOP."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_mat.policies.base import UnitTable

# Sums of costs in another order differ by rounding: budget=1.0 must train every unit.
_ROUNDING = 1e-12


def within_budget(values: Tensor, units: UnitTable, budget: float, first: Tensor) -> Tensor:
    r"""Return the units to train so that a step costs at most a share of a full step.

    .. math:: \frac{C - \sum_{l\ \text{rests}} c_l}{C} \le \text{budget},

    with C the cost of a full step and c_l that of training unit l. The units of ``first`` train in
    any case; the others are taken by falling value / c_l (free ones before all, the first of
    equals), each if it still fits. So no unit rests that would fit into what is left.

    If the units of ``first`` alone exceed the budget, they train alone.

    Args:
        values: The criterion, e.g. principal eigenvalues, at the newest probe, shape ``[L]``.
        units: The L units; ``full_cost`` must be known.
        budget: Share of a full step, in (0, 1].
        first: Units to train whatever they cost, bool, shape ``[L]``.

    Returns:
        bool, shape ``[L]``.

    Raises:
        ValueError: If the cost of a full step is unknown, or below the sum of its units' costs.

    Example:
        >>> import torch
        >>> table = UnitTable(("a", "b", "c"), ("head",) * 3, ("x",) * 3,
        ...                   torch.tensor([10.0, 10.0, 20.0]), full_cost=100.0)
        >>> within_budget(torch.tensor([5.0, 1.0, 6.0]), table, 0.8,
        ...               first=torch.tensor([False, False, False]))
        tensor([ True,  True, False])
    """
    if units.full_cost == 0:
        raise ValueError(
            f"budget={budget} needs the cost of a full training step, which is unknown "
            "(full_cost is 0.0): count its FLOPs first, or use alpha instead of budget"
        )
    cost, value = units.cost.tolist(), values.tolist()
    base = units.full_cost - math.fsum(cost)
    if base < -_ROUNDING * units.full_cost:
        raise ValueError(
            f"the units cost {math.fsum(cost):.4g} and a full step {units.full_cost:.4g} FLOPs per "
            "sample: a step contains its units, so one of the two was counted wrongly"
        )
    limit = budget * units.full_cost + _ROUNDING * units.full_cost
    active = first.clone()
    spent = base + math.fsum(units.cost[first].tolist())
    per_flop = [v / c if c > 0 else math.inf for v, c in zip(value, cost, strict=True)]
    for i in sorted(range(len(units)), key=lambda i: -per_flop[i]):
        if not active[i] and spent + cost[i] <= limit:
            active[i] = True
            spent += cost[i]
    return active
