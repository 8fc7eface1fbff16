"""The mNTK by definition: the whole Jacobian by ``torch.func.jacrev``, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_mat.units import Partition
from lightning_mat.units.unit import matrix_shape


def jacobian_grams(
    model: nn.Module, scalars: Callable[[nn.Module], Tensor], part: Partition
) -> Tensor:
    """Return the mNTKs [L, S, S] of ``scalars(model) -> [S]``, from every entry of the Jacobian."""
    owned = {n: p.detach() for n, p in model.named_parameters() if n in part.owners}
    runner = _Runner(model, scalars)

    def function(parameters: dict[str, Tensor]) -> Tensor:
        prefixed = {f"model.{n}": p for n, p in parameters.items()}
        return functional_call(runner, prefixed, ())

    jacobians = jacrev(function)(owned)
    samples = next(iter(jacobians.values())).shape[0]
    grams = torch.zeros(len(part), samples, samples, dtype=torch.float64)
    for name, jacobian in jacobians.items():
        matrix = jacobian.reshape(samples, *matrix_shape(part.shapes[name])).double()
        for unit, rect in part.owners[name]:
            v = matrix[:, rect.r0 : rect.r1, rect.c0 : rect.c1].reshape(samples, -1)
            grams[unit] += v @ v.T
    return grams


class _Runner(nn.Module):
    def __init__(self, model: nn.Module, scalars: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.scalars = model, scalars

    def forward(self) -> Tensor:
        return self.scalars(self.model)
