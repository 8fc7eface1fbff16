"""Scalars: runs a model forward to the one scalar per sample that is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_mat.mntk.outputs import (
    Forward,
    Output,
    logits_of,
    project,
    sample_losses,
    targets_of,
)


@dataclass(frozen=True)
class Scalars:
    """The scalars z of a batch, and how they come from the logits.

    Args:
        model: The model.
        output: See :mod:`lightning_mat.mntk.outputs`.
        forward: ``(model, batch) -> logits``.
        seed: Of ``output="random"``.
    """

    model: nn.Module
    output: Output
    forward: Forward
    seed: int

    @property
    def projects(self) -> bool:
        """Whether z is a fixed projection of the logits."""
        return self.output in ("sum_logits", "random")

    def logits(self, batch: Any, samples: int) -> Tensor:
        """Return the logits, ``[S, ...]``."""
        return logits_of(self.forward(self.model, batch), samples)

    def project(self, logits: Tensor) -> Tensor:
        """Return z as the projection of the logits."""
        assert isinstance(self.output, str)
        return project(self.output, logits, self.seed)

    def collapsed(self, batch: Any, samples: int) -> Tensor:
        """Return z where the last layer gives the projection itself, ``[S, ..., 1]``."""
        return self.logits(batch, samples).flatten(1).sum(1)

    def __call__(self, batch: Any, samples: int) -> Tensor:
        """Return z, shape ``[S]``.

        Raises:
            ValueError: If a callable output returns another shape.
        """
        if isinstance(self.output, str):
            logits = self.logits(batch, samples)
            if self.output == "loss":
                return sample_losses(self.model, logits, targets_of(batch))
            return self.project(logits)
        return _checked(self.output, self.model, batch, samples)


def _checked(
    output: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any, samples: int
) -> Tensor:
    scalars = output(model, batch)
    if not isinstance(scalars, Tensor) or scalars.shape != (samples,):
        found = list(scalars.shape) if isinstance(scalars, Tensor) else type(scalars).__name__
        raise ValueError(
            f"output must return one scalar per sample, a tensor of shape [{samples}], got {found}"
        )
    return scalars
