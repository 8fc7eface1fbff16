"""Backward passes that are not differentiated themselves, and say so by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_MESSAGE = (
    "a layer of which a part rests has no second derivatives (create_graph=True): let units own "
    'whole parameters (units="layers"), or leave the layers that the loss differentiates twice '
    "out of the units"
)

Gradients = Tensor | None | tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward pass of an autograd function, not recorded itself.

    Source:
        ``torch.autograd.function.once_differentiable``, but for the message.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Gradients:
        with torch.no_grad():
            found: Gradients = backward(ctx, *grads)
        recorded = torch.is_grad_enabled()
        if not recorded or not any(isinstance(g, Tensor) and g.requires_grad for g in grads):
            return found
        several = found if isinstance(found, tuple) else (found,)
        # Whatever comes of the gradients leads to the error, should anybody differentiate it.
        refuse = torch._C._functions.DelayedError(_MESSAGE.encode(), len(several))
        given = [None if g is None else g.detach().requires_grad_() for g in several]
        return cast(Gradients, refuse(*given))  # type: ignore[arg-type]

    return run
