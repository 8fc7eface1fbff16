"""DDP's buckets, the same after a resume.

DDP makes its final buckets after the first backward pass, in the order in which the gradients came.
A run that is resumed would make others, because other units rest then, and where an element lies in
its bucket decides in which order three or more ranks add their gradients: the bits would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mat.gate.fallback import forget


def note_order(params: Mapping[str, nn.Parameter], order: list[str]) -> Callable[[], None]:
    """Append the names of parameters as autograd comes to them in the next backward passes.

    Args:
        params: Name → parameter.
        order: What to append to; each name once.

    Returns:
        What ends that.
    """
    handles = []
    for name, param in params.items():

        def note(_: Tensor | None, name: str = name) -> None:
            if name not in order:
                order.append(name)

        handles.append((param.register_hook(note), param))

    def remove() -> None:
        for handle, param in handles:
            handle.remove()
            forget(param)

    return remove


def repeat_order(
    ddp: DistributedDataParallel, params: Mapping[str, nn.Parameter], order: Sequence[str]
) -> bool:
    """Let DDP make the buckets that it made after a first backward pass in this order.

    It sees a backward pass in which the parameters are visited so, and all gradients are zero;
    afterwards they are None. A collective, before the first forward pass.

    Returns:
        Whether it did: not where the names are other than those of the parameters, as in another
        model's checkpoint, and where DDP walks the graph and so keeps its first buckets.
    """
    if ddp.find_unused_parameters or sorted(order) != sorted(params):
        return False
    first = params[order[0]]
    loss = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
    passed = loss
    # What is added last comes first in the backward pass.
    for name in reversed(order):
        passed = _Visit.apply(passed, params[name])
    ddp.reducer.prepare_for_forward()
    ddp.reducer.prepare_for_backward([])
    passed.backward()
    for param in params.values():
        param.grad = None
    return True


class _Visit(torch.autograd.Function):
    """The identity, which visits a parameter without a gradient for it."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, param: Tensor) -> Tensor:
        """Return the first tensor."""
        return passed.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient on."""
        return (*grads, None)
