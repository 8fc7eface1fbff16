"""Heads: computing z without the vocabulary-sized logits where the last layer is linear.

For logits W h + b and a projection v, z = Σ v·(W h + b) = (vᵀW) h + v·b, which needs one row in
the place of W's many, and the logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.mntk.outputs import projection
from lightning_mat.mntk.rules.linear import LinearRule
from lightning_mat.mntk.tape import Tape


@contextmanager
def watching_outputs(model: nn.Module) -> Iterator[Callable[[Tensor], str | None]]:
    """Yield a function that names the linear layer whose output a tensor is, after a forward."""
    made: dict[int, tuple[str, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        plain = type(module).forward is nn.Linear.forward and "forward" not in module.__dict__
        if plain and not module._forward_hooks:

            def remember(_: nn.Module, __: Any, y: Tensor, name: str = name) -> None:
                made[id(y)] = (name, y)

            handles.append(module.register_forward_hook(remember))
    try:
        yield lambda tensor: made[id(tensor)][0] if id(tensor) in made else None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def collapsed(
    module: nn.Linear, name: str, output: str, seed: int, tape: Tape | None = None
) -> Iterator[None]:
    """Make a linear layer return the projection of its outputs, ``[..., 1]``.

    Args:
        module: The last layer.
        name: Its name.
        output: ``"sum_logits"`` or ``"random"``.
        seed: Of the random projection.
        tape: Where to report the call if the layer's own parameters are tracked: its output
            gradient is v at every position, known without a backward pass.
    """
    weight = module.weight.detach()
    vector = projection(output, module.out_features, seed, weight)
    row = (vector @ weight).unsqueeze(0)
    shift = None if module.bias is None else (vector @ module.bias.detach()).unsqueeze(0)

    def forward(x: Tensor) -> Tensor:
        names = tape.own_names(module) if tape is not None else {}
        if tape is not None and names:
            grad = vector.expand(*x.shape[:-1], module.out_features)
            tape.given(name, module, LinearRule(), names, x, grad)
        return F.linear(x, row, shift)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def same_scalars(first: Tensor, second: Tensor) -> bool:
    """Return whether two ways of computing z agree up to rounding."""
    tolerance = 1e-3 * float(first.abs().max()) + 1e-6
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=tolerance)
