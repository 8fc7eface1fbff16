"""Who measures what: a probe's units, shared out over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mat.units.core import Partition

# What a unit's Gram costs, in passes of the gradient through the layer that holds it.
GRAM = 2.0


def share_out(part: Partition, cost: Tensor | None, size: int) -> list[list[int]]:
    r"""Return the units that each rank measures, in the order of the ranks.

    Every rank runs the forward pass, and the backward pass down to the lowest layer that it
    measures. So each takes a stretch of neighbouring layers, rank 0 the lowest, and less the lower
    it is: with the layers in order and :math:`c_i` their cost, the stretch :math:`[a, b)` takes

    .. math:: \sum_{i \ge a} c_i + g \sum_{a \le i < b} c_i

    with g = :data:`GRAM`, and the greatest of these is made as small as it gets. Layers are taken
    whole where there are at least four for each rank. With more ranks than units, the last measure
    nothing.

    Args:
        part: The units.
        cost: FLOPs per sample of each unit's weight gradient, shape ``[L]``; None before the first
            probe, when the units' sizes stand for it.
        size: Number of ranks.

    Example:
        >>> from torch import nn
        >>> from lightning_mat.units import partition
        >>> model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
        >>> share_out(partition(model, "layers"), None, 2)
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]
    """
    weight = (part.numel.double() if cost is None else cost.double()).clamp_min(1e-9)
    items = _stretches(part, size)
    loads = [float(weight[item].sum()) for item in items]
    least, most = 0.0, (1 + GRAM) * sum(loads)
    shares = _fill(loads, size, most)
    # Bisection: the greatest load that still has room for everything.
    for _ in range(40):
        middle = (least + most) / 2
        found = _fill(loads, size, middle)
        if found is None:
            least = middle
        else:
            shares, most = found, middle
    assert shares is not None
    return [sorted(unit for i in share for unit in items[i]) for share in shares]


def _stretches(part: Partition, size: int) -> list[list[int]]:
    """Return the units of each layer, or single units where layers are few, from the bottom up."""
    place = {name: index for index, name in enumerate(part.shapes)}
    depth = [min(place[part.aliases[s.param]] for s in unit.slices) for unit in part]
    layers: dict[str, list[int]] = {}
    for index in sorted(range(len(part)), key=lambda i: (depth[i], i)):
        layers.setdefault(part.layers[index], []).append(index)
    if len(layers) >= 4 * size:
        return list(layers.values())
    return [[unit] for members in layers.values() for unit in members]


def _fill(loads: list[float], size: int, room: float) -> list[list[int]] | None:
    """Return stretches from the bottom up of which none takes more than a load, None if it fails.

    Greedy is best here: what a rank leaves can only make those above it fuller.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    backward, taken, rank = sum(loads), 0.0, 0
    for index, load in enumerate(loads):
        while backward + GRAM * (taken + load) > room * (1 + 1e-12):
            rank += 1
            if rank == size:
                return None
            backward, taken = sum(loads[index:]), 0.0
        shares[rank].append(index)
        taken += load
    return shares


def share_of_probe(part: Partition, cost: Tensor, shares: list[list[int]]) -> list[float]:
    """Return what each rank's backward pass and Grams cost, as shares of those of one process.

    Args:
        part: The units.
        cost: Of each, shape ``[L]``.
        shares: From :func:`share_out`.
    """
    total = (1 + GRAM) * float(cost.sum())
    order = [unit for item in _stretches(part, len(shares)) for unit in item]
    found = []
    for share in shares:
        if not share:
            found.append(0.0)
            continue
        lowest = min(order.index(unit) for unit in share)
        through = float(cost[torch.tensor(order[lowest:])].sum())
        found.append((through + GRAM * float(cost[torch.tensor(share)].sum())) / total)
    return found
