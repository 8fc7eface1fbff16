"""The protecting rule: every layer keeps training something."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mat.policies.base import UnitTable


def strongest(criterion: Tensor, units: UnitTable) -> Tensor:
    """Return which unit of each (layer, kind) has the largest criterion; of equals, the first.

    Args:
        criterion: λ_max, or what else units are compared by, at the newest probe, shape ``[L]``.
        units: The L units.

    Returns:
        bool, shape ``[L]``, exactly one True per (layer, kind).
    """
    keep = torch.zeros(len(units), dtype=torch.bool)
    values = criterion.tolist()
    for members in units.by_layer_and_kind().values():
        keep[max(members, key=values.__getitem__)] = True
    return keep


def protected(active: Tensor, criterion: Tensor, units: UnitTable) -> Tensor:
    """Return the units to wake so that each (layer, kind) trains at least one.

    Where every unit of a (layer, kind) rests, that is the one with the largest criterion; elsewhere
    nobody. A unit alone in its (layer, kind) therefore never rests under this rule.

    Args:
        active: Whether each unit trains so far, bool, shape ``[L]``.
        criterion: λ_max, or what else units are compared by, at the newest probe, shape ``[L]``.
        units: The L units.

    Returns:
        bool, shape ``[L]``, disjoint from ``active``.

    Source:
        Shi et al., MAT (NeurIPS 2023), appendix B.1: "a protecting strategy that maintains the
        gradient of at least one head or expert in each layer".
    """
    wake = strongest(criterion, units)
    for members in units.by_layer_and_kind().values():
        if active[members].any():
            wake[members] = False
    return wake
