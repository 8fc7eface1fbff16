"""What the examples' LightningModules share: seeds per step, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from examples.data.seeds import mixed

Factor = Callable[[int], float]


class Example(L.LightningModule):
    """A module whose dropout masks depend on (``hparams["seed"]``, step) alone."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the dropout masks by step, so that a resumed run continues with the same ones."""
        torch.manual_seed(mixed(self.hparams["seed"], self.global_step))


def scheduled(optimizer: torch.optim.Optimizer, factor: Factor) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns: a schedule that is stepped every step.

    Args:
        optimizer: With the peak learning rate.
        factor: Of the peak learning rate, by step.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def linear(steps: int, warmup: int = 0) -> Factor:
    """Return a linear rise over ``warmup`` steps and a linear fall to 0 at ``steps``.

    Example:
        >>> [linear(8, warmup=4)(step) for step in (0, 3, 4, 6, 8)]
        [0.25, 1.0, 1.0, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return factor


def cosine(steps: int, warmup: int = 0) -> Factor:
    """Return a linear rise over ``warmup`` steps and half a cosine down to 0 at ``steps``.

    Example:
        >>> [round(cosine(8, warmup=4)(step), 3) for step in (0, 3, 4, 6, 8)]
        [0.25, 1.0, 1.0, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = min(1.0, (step - warmup) / max(1, steps - warmup))
        return (1 + math.cos(math.pi * part)) / 2

    return factor


def staircase(steps: int) -> Factor:
    """Return 1, a tenth from half of the steps on, and a hundredth from three quarters on.

    Source:
        The MAT paper, appendix B.1, for VGG.

    Example:
        >>> [staircase(8)(step) for step in (3, 4, 6)]
        [1.0, 0.1, 0.01]
    """

    def factor(step: int) -> float:
        return 1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01

    return factor
