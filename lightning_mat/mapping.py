"""A saved state of one partition, and a model of another: what differs, and what carries over."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from lightning_mat.policies.base import FULL, Decision
from lightning_mat.units import Partition, Rect

ON_CHANGE = ("refuse", "map")

_LISTED = 10


def check_partition_change(word: str) -> None:
    """Raise a ValueError if there is no such way to meet a state of other units."""
    if word not in ON_CHANGE:
        raise ValueError(f"on_partition_change must be one of {ON_CHANGE}, got {word!r}")


def marks_of(part: Partition) -> list[str]:
    """Return for each unit a short string that is the same if and only if it owns the same.

    It depends on the elements that the unit owns, not on how its slices list them.
    """
    owned: list[list[tuple[str, Rect]]] = [[] for _ in part]
    for name, pieces in part.owners.items():
        for index, rect in pieces:
            owned[index].append((name, rect))
    return [hashlib.sha256(repr(sorted(own)).encode()).hexdigest()[:16] for own in owned]


def recut(state: Mapping[str, Any], own: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Return the names of units that own other slices than in the saved run.

    Args:
        state: ``"units"`` holds the saved run's names, ``"slices"`` their marks, of
            :func:`marks_of`; states of earlier versions have none, and then no unit is listed.
        own: The names of this run's units.
        marks: Their marks.
    """
    saved = dict(zip(state["units"], state.get("slices", ()), strict=False))
    pairs = zip(own, marks, strict=True)
    return [name for name, mark in pairs if saved.get(name, mark) != mark]


def unit_diff(saved: Sequence[str], own: Sequence[str], cut: Collection[str] = ()) -> str:
    """Return in words what differs between two partitions, at most ten names of each case.

    Args:
        saved: Names of the saved run's units.
        own: Names of this run's units.
        cut: Those of both that own other slices in this run.

    Example:
        >>> unit_diff(["a", "b"], ["b", "c", "d"])
        "1 only in the saved run ('a'), 2 only in this one ('c', 'd')"
        >>> unit_diff(["a", "b"], ["b", "a"])
        'the same 2 units in another order'
        >>> unit_diff(["a", "b"], ["a", "b"], ["b"])
        "1 with other slices ('b')"
    """
    gone, new = set(saved) - set(own), set(own) - set(saved)
    if not gone and not new and not cut:
        return f"the same {len(own)} units in another order"
    cases = [(saved, gone, "only in the saved run"), (own, new, "only in this one")]
    if not gone and not new:
        cases = []
    if cut:
        cases.append((own, set(cut), "with other slices"))
    parts = []
    for order, names, where in cases:
        listed = [repr(name) for name in order if name in names]
        shown = ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
        parts.append(f"{len(listed)} {where}" + (f" ({shown})" if listed else ""))
    return ", ".join(parts)


def mapped_decision(
    decision: Decision, saved: Sequence[str], part: Partition, new: Collection[str] = ()
) -> Decision:
    """Return the decision about a partition's units that one about others says.

    Args:
        decision: About the saved run's units.
        saved: Their names, in order.
        part: The partition; units that the saved run did not have train.
        new: Names of units that train although the saved run had units of these names.
    """
    index = {name: i for i, name in enumerate(saved)}
    place = [None if name in new else index.get(name) for name in part.names]
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
