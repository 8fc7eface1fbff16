"""What a user would pick instead: other ways to train a part of a model, each in a few lines.

Each changes a model in place and returns a :class:`Rival`. The share that a rival trains is that of
its own parts (blocks by their parameters, units or branches by their number), as near to what was
asked for as it can get.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import Workload
from lightning_mat.units import Partition
from lightning_mat.units.unit import matrix_shape


class Rival(NamedTuple):
    """A model made to train a part of itself.

    Attributes:
        trained_share: Share of its own parts that trains.
        before_step: To be called before every step.
        draws: Steps after which its random choices come again; 1 if it makes none.
    """

    trained_share: float
    before_step: Callable[[], None]
    draws: int = 1


def frozen_at_random(
    workload: Workload, model: nn.Module, part: Partition, active: Tensor, share: float
) -> Rival:
    """Set ``requires_grad_(False)`` on random blocks.

    The backward pass still runs through them, down to what trains below.
    """
    blocks = [_parameters(block) for block in workload.blocks(model)]
    order = list(range(len(blocks)))
    random.Random(0).shuffle(order)
    return _freeze([blocks[i] for i in order], share, [])


def frozen_from_below(
    workload: Workload, model: nn.Module, part: Partition, active: Tensor, share: float
) -> Rival:
    """Set ``requires_grad_(False)`` on the lowest blocks and all below them.

    The backward pass ends at the lowest block that trains.
    """
    blocks = [_parameters(block) for block in workload.blocks(model)]
    inside = {id(p) for p in blocks[0]}
    below = []
    for parameter in model.parameters():
        if id(parameter) in inside:
            break
        below.append(parameter)
    return _freeze(blocks, share, below)


def zeroed_by_hooks(
    workload: Workload, model: nn.Module, part: Partition, active: Tensor, share: float
) -> Rival:
    """Multiply the gradients of MAT's own units by a mask, in hooks on the parameters.

    Everything is computed first, and the optimizer still decays and moves what rests.
    """
    for name, parameter in model.named_parameters():
        if name not in part.owners:
            continue
        mask = torch.zeros(matrix_shape(parameter.shape), device=parameter.device)
        for block in part.active_blocks(name, active):
            for r in block.rects():
                mask[r.r0 : r.r1, r.c0 : r.c1] = 1
        if not mask.all():
            parameter.register_hook(_masking(mask.view(parameter.shape)))
    return Rival(float(active.double().mean()), _nothing)


def dropped_branches(
    workload: Workload, model: nn.Module, part: Partition, active: Tensor, share: float
) -> Rival | None:
    """Detach random residual branches, others in every step; of each kind the same number.

    A branch that is dropped runs without autograd: it saves nothing, and nothing flows into it.

    Returns:
        None for a model without residual branches.

    Source:
        Woo et al., "DropBP" (NeurIPS 2024), without its sensitivities per layer.
    """
    kinds = [[_Branch(module) for module in kind] for kind in workload.branches(model)]
    if not kinds:
        return None
    generator = random.Random(0)
    kept = [max(1, round(share * len(kind))) for kind in kinds]
    draws = [
        {id(b) for kind, n in zip(kinds, kept, strict=True) for b in generator.sample(kind, n)}
        for _ in range(4)
    ]
    turn = 0

    def draw() -> None:
        nonlocal turn
        for branch in (branch for kind in kinds for branch in kind):
            branch.dropped = id(branch) not in draws[turn % len(draws)]
        turn += 1

    return Rival(sum(kept) / sum(map(len, kinds)), draw, len(draws))


#: Name → how it is made, and what it is.
RIVALS: dict[str, tuple[Callable[..., Rival | None], str]] = {
    "random blocks frozen": (
        frozen_at_random,
        "requires_grad_(False) on whole blocks drawn at random",
    ),
    "lower blocks frozen": (
        frozen_from_below,
        "requires_grad_(False) on the blocks nearest the input and what lies below them",
    ),
    "gradients zeroed": (
        zeroed_by_hooks,
        "a hook on each parameter multiplies its gradient by a mask of the same units",
    ),
    "branches detached": (
        dropped_branches,
        "DropBP: residual branches drawn anew in every step run without autograd",
    ),
}


class _Branch:
    """In place of a module's forward: runs it without autograd while it is dropped."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = module.forward
        self.dropped = False
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(not self.dropped):
            return self.inner(*args, **kwargs)


def _freeze(
    order: Sequence[list[nn.Parameter]], share: float, below: Sequence[nn.Parameter]
) -> Rival:
    """Freeze the first blocks of an order, so many that the share that trains comes nearest."""
    sizes = [sum(p.numel() for p in block) for block in order]
    total = sum(sizes)
    left = [sum(sizes[k:]) / total for k in range(len(sizes) + 1)]
    # Where nothing at all trained, there would be no backward pass.
    k = min(range(len(sizes)), key=lambda k: abs(left[k] - share))
    for parameter in (p for block in order[:k] for p in block):
        parameter.requires_grad_(False)
    if k:
        for parameter in below:
            parameter.requires_grad_(False)
    return Rival(left[k], _nothing)


def _parameters(block: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in block for p in module.parameters()]


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * mask


def _nothing() -> None:
    return None
