"""Warnings about settings that leave MAT nothing to do, or too much."""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

from torch import Tensor

from lightning_mat.policies.base import UnitTable, compact

# What to do, without and with alpha="auto".
_MORE = (
    'set a higher alpha to rest some, or alpha="auto" for a threshold in their widest gap',
    "there is no gap between them; set alpha to a number to rest some",
)
_LESS = ('lower beta or alpha, or set alpha="auto"', "lower beta")


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
    automatic: tuple[str, ...]
    """Kinds whose α is ``"auto"``."""

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
                stacklevel=_outside(),
            )
        extreme = rules.extreme(members)
        if before is not None and extreme == before.extreme(members):
            continue
        level = f"λ_α = {compact(rules.thresholds[kind])}"
        automatic = kind in rules.automatic
        if extreme == "none":
            warnings.warn(
                f"the threshold rests none of the {len(members)} units of kind {kind!r}: every "
                f"{rules.measure} is at least {level}; {_MORE[automatic]}",
                stacklevel=_outside(),
            )
        elif extreme == "all":
            low = int(rules.below[members].sum())
            warnings.warn(
                f"all {len(members)} units of kind {kind!r} rest by the rules ({low} below "
                f"{level}, {len(members) - low} temporal) and "
                f"{'only protected ones train' if protect else 'none trains'}: {_LESS[automatic]}",
                stacklevel=_outside(),
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
        stacklevel=_outside(),
    )


def _outside() -> int:
    """Return the ``stacklevel`` at which a caller's warning leaves this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]
