"""A saved state of one partition, and a model of another: what differs, and what carries over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_mat.policies.base import FULL, Decision
from lightning_mat.units import Partition

ON_CHANGE = ("refuse", "map")

_LISTED = 10


def check_partition_change(word: str) -> None:
    """Raise a ValueError if there is no such way to meet a state of other units."""
    if word not in ON_CHANGE:
        raise ValueError(f"on_partition_change must be one of {ON_CHANGE}, got {word!r}")


def unit_diff(saved: Sequence[str], own: Sequence[str]) -> str:
    """Return in words which units only one of two partitions has, at most ten names of each.

    Example:
        >>> unit_diff(["a", "b"], ["b", "c", "d"])
        "1 only in the saved run ('a'), 2 only in this one ('c', 'd')"
        >>> unit_diff(["a", "b"], ["b", "a"])
        'the same 2 units in another order'
    """
    gone, new = set(saved) - set(own), set(own) - set(saved)
    if not gone and not new:
        return f"the same {len(own)} units in another order"
    parts = []
    for names, where in ((gone, "only in the saved run"), (new, "only in this one")):
        order = saved if names is gone else own
        listed = [repr(name) for name in order if name in names]
        shown = ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
        parts.append(f"{len(listed)} {where}" + (f" ({shown})" if listed else ""))
    return ", ".join(parts)


def mapped_decision(decision: Decision, saved: Sequence[str], part: Partition) -> Decision:
    """Return the decision about a partition's units that one about others says.

    Args:
        decision: About the saved run's units.
        saved: Their names, in order.
        part: The partition; units that the saved run did not have train.
    """
    index = {name: i for i, name in enumerate(saved)}
    place = [index.get(name) for name in part.names]
    active = [True if i is None else bool(decision.active[i]) for i in place]
    reasons = [FULL if i is None else decision.reasons[i] for i in place]
    rates = None
    if decision.rates is not None:
        rates = torch.tensor(
            [1.0 if i is None else float(decision.rates[i]) for i in place], dtype=torch.float64
        )
    thresholds = {k: v for k, v in decision.thresholds.items() if k in set(part.kinds)}
    return Decision(
        torch.tensor(active, dtype=torch.bool),
        tuple(reasons),
        thresholds,
        part.kinds,
        rates,
        decision.measure,
    )
