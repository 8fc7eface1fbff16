"""Full and Random: the baselines."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_mat.policies.base import DRAWN, FULL, NOT_DRAWN, PROTECTED, Decision, UnitTable
from lightning_mat.policies.history import History


@dataclass(frozen=True)
class Full:
    """Every unit trains, always: plain training, with the units' spectra if they are probed."""

    needs_spectra: ClassVar[bool] = False

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return that every unit trains; the history may be empty."""
        active = torch.ones(len(units), dtype=torch.bool)
        return Decision(active, (FULL,) * len(units), {}, units.kinds)


@dataclass(frozen=True)
class Random:
    """A random subset trains, a new one each episode: the baseline "Rand" of the MAT paper.

    Of the n units of each (layer, kind), exactly ``round(fraction · n)`` train (Python's ``round``:
    halves go to the even number). The draw depends on the seed, the episode and the units alone.

    Args:
        fraction: Share of units to train, in [0, 1].
        seed: Seed of the draws.
        protect: Train at least one unit of each (layer, kind).

    Raises:
        ValueError: If the fraction is outside [0, 1].

    Source:
        Shi et al., MAT (NeurIPS 2023), appendix B.1: "randomly selects and updates 50% heads in
        every epoch".
    """

    fraction: float = 0.5
    seed: int = 0
    protect: bool = True

    needs_spectra: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 <= self.fraction <= 1:
            raise ValueError(
                f"fraction must be in [0, 1], got {self.fraction}: it is the share of units that "
                "train"
            )

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return the draw of the episode; the history may be empty."""
        # Seeding by a string hashes all of it: nearby seeds and episodes share no draws.
        generator = random.Random(f"lightning_mat {self.seed} {episode}")
        active = torch.zeros(len(units), dtype=torch.bool)
        reasons = [NOT_DRAWN] * len(units)
        for members in units.by_layer_and_kind().values():
            drawn = round(self.fraction * len(members))
            reason = DRAWN if drawn else PROTECTED
            for i in generator.sample(members, max(drawn, 1) if self.protect else drawn):
                active[i] = True
                reasons[i] = reason
        return Decision(active, tuple(reasons), {}, units.kinds)
