"""What a gate promises, computed the plain way: every gradient in full, then resting parts removed.

Independent of the code it checks: masks come from the slices of the units, one index expression
each, not from the partition's arithmetic on rectangles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_mat.units.core import Partition


def resting(model: nn.Module, part: Partition, active: Sequence[bool]) -> dict[str, Tensor]:
    """Return, per parameter, a bool mask of what rests."""
    named = dict(model.named_parameters(remove_duplicate=False))
    masks = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    for unit, on in zip(part.units, active, strict=True):
        for piece in () if on else unit.slices:
            mask = masks[id(named[piece.param])]
            if piece.dim is None:
                mask.fill_(True)
            elif piece.dim == 0:
                mask[piece.start : piece.stop] = True
            else:
                mask[:, piece.start : piece.stop] = True
    return {name: masks[id(param)] for name, param in model.named_parameters()}


def expected_gradients(
    model: nn.Module, part: Partition, active: Sequence[bool], loss: Callable[[], Tensor]
) -> dict[str, Tensor | None]:
    """Return the gradients that a plain backward pass gives what trains, None for what rests whole.

    The model must carry no gate; its gradients are None before and after.
    """
    loss().backward()
    masks = resting(model, part, active)
    expected: dict[str, Tensor | None] = {}
    for name, param in model.named_parameters():
        grad, mask = param.grad, masks[name]
        if grad is None or (mask.numel() and bool(mask.all())):
            expected[name] = None
        else:
            expected[name] = grad.masked_fill(mask, 0.0)
        param.grad = None
    return expected
