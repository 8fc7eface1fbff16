"""What MATOptimizer promises, by construction: every slab is a Parameter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mat.units.core import Partition
from lightning_mat.units.unit import matrix_shape


class SlabOracle:
    """Steps each slab with a ``torch.optim`` optimizer of its own, ``grad=None`` while it rests.

    Args:
        model: The model; its parameters are read, never written.
        part: The units. Elements that no unit owns are one more slab per parameter.
        make: Makes the optimizer of slabs of the named parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Partition,
        make: Callable[[str, list[nn.Parameter]], Optimizer],
    ) -> None:
        self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.slabs: list[tuple[str, int | None, Tensor, nn.Parameter, Optimizer]] = []
        for name, param in self.params.items():
            for unit, index in _slab_indices(part, name):
                slab = nn.Parameter(param.flatten()[index].clone())
                self.slabs.append((name, unit, index, slab, make(name, [slab])))

    def step(self, grads: dict[str, Tensor | None], active: Sequence[bool]) -> None:
        """Step with whole gradients, of which resting slabs get nothing."""
        for name, unit, index, slab, optimizer in self.slabs:
            grad = grads[name]
            rests = unit is not None and not active[unit]
            slab.grad = None if rests or grad is None else grad.flatten()[index].clone()
            optimizer.step()
            flat = self.params[name].flatten()
            flat[index] = slab.detach()
            self.params[name] = flat.view(self.params[name].shape)

    def state(self, name: str) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return (flat indices, state) of each slab of a parameter."""
        return [(i, o.state.get(s, {})) for n, _, i, s, o in self.slabs if n == name]


def _slab_indices(part: Partition, name: str) -> list[tuple[int | None, Tensor]]:
    shape = part.shapes[name]
    owner = torch.full(matrix_shape(shape), -1)
    for unit, rect in part.owners.get(name, ()):
        owner[rect.r0 : rect.r1, rect.c0 : rect.c1] = unit
    found = owner.flatten()
    return [
        (None if unit < 0 else unit, (found == unit).nonzero().flatten())
        for unit in found.unique().tolist()
    ]
