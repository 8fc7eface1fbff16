"""Warnings about settings that leave MAT nothing to do, or too much."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor

from lightning_mat.policies.base import UnitTable, compact


class Rules(NamedTuple):
    """What the modular and the temporal policy say after one probe, before protection."""

    below: Tensor
    """Units with λ_max < λ_α, bool, shape ``[L]``."""
    settled: Tensor
    """Units that the temporal policy rests, bool, shape ``[L]``."""
    thresholds: dict[str, float]
    """λ_α of each kind."""
    measure: str
    """What λ_α is a threshold of."""

    def extreme(self, members: list[int]) -> str:
        """Return "none" if none of them is below λ_α, "all" if all rest by either rule, or ""."""
        if bool((self.below | self.settled)[members].all()):
            return "all"
        return "" if bool(self.below[members].any()) else "none"


def warn_about_extremes(
    rules: Rules, before: Rules | None, units: UnitTable, protect: bool
) -> None:
    """Warn of kinds of which the rules rest no unit or every unit, once per change.

    Args:
        rules: The rules after the newest probe.
        before: The rules after the probe before it; None at the first probe. A policy keeps no
            state, so what it said then is computed again.
        units: The L units. Kinds with a single unit are passed over.
        protect: Whether protection will wake units.
    """
    groups = units.by_layer_and_kind()
    for kind, members in units.by_kind().items():
        if len(members) < 2:
            continue
        if before is None and protect and len(members) == sum(k == kind for _, k in groups):
            warnings.warn(
                f"each of the {len(members)} units of kind {kind!r} is alone in its layer, so "
                "protect=True keeps all of them training: pass protect=False, or finer units",
                stacklevel=3,
            )
        extreme = rules.extreme(members)
        if before is not None and extreme == before.extreme(members):
            continue
        level = f"λ_α = {compact(rules.thresholds[kind])}"
        if extreme == "none":
            warnings.warn(
                f"the threshold rests none of the {len(members)} units of kind {kind!r}: every "
                f"{rules.measure} is at least {level}; set a higher alpha to rest some",
                stacklevel=3,
            )
        elif extreme == "all":
            low = int(rules.below[members].sum())
            warnings.warn(
                f"all {len(members)} units of kind {kind!r} rest by the rules ({low} below "
                f"{level}, {len(members) - low} temporal) and "
                f"{'only protected ones train' if protect else 'none trains'}: lower beta or alpha",
                stacklevel=3,
            )


def warn_about_budget(least: float, budget: float, protect: bool) -> None:
    """Warn that the cheapest step possible costs more than the budget.

    Args:
        least: Cost of that step as a share of a full step.
        budget: The share that was asked for.
        protect: Whether protected units are part of it.
    """
    what = "only the protected units" if protect else "no unit"
    warnings.warn(
        f"a step that trains {what} costs {least:.1%} of a full step, more than the budget of "
        f"{budget:.1%}, and is what is trained now: resting units save their weight gradients, at "
        "most about a third of a step; raise budget",
        stacklevel=4,
    )
