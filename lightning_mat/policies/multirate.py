"""Multirate: slow units step rarely and far, the baseline of Vlaar and Leimkuhler."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from lightning_mat.policies.base import BETWEEN, FAST, SLOW, Decision, UnitTable
from lightning_mat.policies.history import History


@dataclass(frozen=True)
class Multirate:
    """Fast units step every step, slow ones every k-th step with k times the learning rate.

    Of the n units of each (layer, kind), ``round(fast · n)`` are fast (Python's ``round``: halves
    go to the even number). They are drawn once, by the seed and the units alone, for the whole run.
    An episode is one optimizer step, and needs no probe; slow units step in the episodes 0, k, 2k,
    ...: the paper leaves open which of k steps it is, and a first step in which everything trains
    shows what a full step costs.

    Args:
        k: Steps of the fast units per step of the slow ones, at least 1; with 1 all are fast.
        fast: Share of fast units, in [0, 1].
        seed: Seed of the draw.
        protect: At least one unit of each (layer, kind) is fast.

    Raises:
        ValueError: If k is no whole number ≥ 1, or the share is outside [0, 1].

    Source:
        Vlaar & Leimkuhler, "Multirate Training of Neural Networks" (ICML 2022), in the form of Shi
        et al., MAT (NeurIPS 2023), appendix B.1: "fast heads updated every step of stepsize η and
        slow ones updated every k = 5 step of stepsize kη". The former's linear drift, which spreads
        a slow update over the k steps, is not part of it.

    Example:
        >>> table = UnitTable(("a", "b"), ("head",) * 2, ("x",) * 2, torch.zeros(2))
        >>> policy = Multirate(k=3)
        >>> print(policy.decide(History(), table, 0).summary())
        head: 2 of 2 train (1 fast, 1 slow), at up to 3 × the learning rate
        >>> print(policy.decide(History(), table, 1).summary())
        head: 1 of 2 train (1 fast, 1 between slow steps)
    """

    k: int = 5
    fast: float = 0.5
    seed: int = 0
    protect: bool = True

    needs_spectra: ClassVar[bool] = False
    every_n_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check k and the share."""
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(
                f"k must be a whole number ≥ 1, got {self.k}: slow units step every k-th step"
            )
        if not 0 <= self.fast <= 1:
            raise ValueError(
                f"fast must be in [0, 1], got {self.fast}: it is the share of units that step "
                "every step"
            )

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return who steps in this step, and how far; the history may be empty."""
        return _decision(self, episode % self.k == 0, units.layers, units.kinds)


# Two decisions alternate in every step of a run, and are the same ones each time.
@lru_cache(maxsize=16)
def _decision(
    policy: Multirate, together: bool, layers: tuple[str, ...], kinds: tuple[str, ...]
) -> Decision:
    """Return the decision in which the slow units step, too, or not."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(zip(layers, kinds, strict=True)):
        groups.setdefault(key, []).append(i)
    # Seeding by a string hashes all of it: nearby seeds share no draws.
    generator = random.Random(f"lightning_mat multirate {policy.seed}")
    is_fast = torch.zeros(len(kinds), dtype=torch.bool)
    for members in groups.values():
        drawn = round(policy.fast * len(members))
        chosen = generator.sample(members, max(drawn, 1) if policy.protect else drawn)
        is_fast[chosen] = True
    reasons = tuple(FAST if fast else SLOW if together else BETWEEN for fast in is_fast.tolist())
    active = torch.ones_like(is_fast) if together else is_fast
    rates = torch.where(is_fast, 1.0, float(policy.k)).double()
    return Decision(active, reasons, {}, kinds, rates=rates)
