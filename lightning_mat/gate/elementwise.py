"""What functions that act on every feature alone make of a tensor with a differentiable part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mat.gate.partly import Partly, live, named, register_partly_rule


def _unary(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Apply a function of one tensor that acts on every element alone, not in place."""
    x, *rest = args or [None]
    if not live(x) or any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
        return None
    if kwargs.get("inplace", False):
        return _in_place(func, x, rest, kwargs)
    if any(value is True for value in rest):
        return None  # in place, said without a name
    return x.mapped(lambda tensor: func(tensor, *rest, **kwargs))


def _in_place(
    func: Callable[..., Any], x: Partly, rest: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Apply an activation function in place: of the values, nothing is saved."""
    if x.base is not None:
        return None
    part = func(x.part, *rest, **{**kwargs, "inplace": False})
    x.changed(lambda values: func(values, *rest, **kwargs), part)
    return x


def _dropout(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Drop the same elements of values and part, drawn as they always are."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, p = given["input"], given.get("p", 0.5)
    training = given.get("training", given.get("train", True))
    if not live(x) or given.get("inplace", False):
        return None
    if not training or p == 0.0:
        return x
    with torch.no_grad():
        noise = func(torch.ones_like(x.full), p, True)
        values = x.full * noise
    part = x.taken() * x.selection.take(noise, x.axis)
    return Partly.make(values, part, x.selection, x.axis, x.look)


def _binary(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Apply a function of two operands that acts on every element alone."""
    if len(args) != 2 or kwargs:
        return None
    known = [x for x in args if live(x)]
    if not known or any(isinstance(x, Partly) and not live(x) for x in args):
        return None
    selection, axis, shape = known[0].selection, known[0].axis, known[0].full.shape
    if any(
        (x.selection.runs, x.axis, x.full.shape) != (selection.runs, axis, shape) for x in known
    ):
        return None
    parts: list[Any] = []
    for x in args:
        if isinstance(x, Partly):
            parts.append(x)
        elif isinstance(x, Tensor) and x.requires_grad:
            return None  # its gradient needs all features
        elif not isinstance(x, Tensor) or x.dim() < -axis or x.shape[axis] == 1:
            parts.append(x)
        elif x.shape[axis] == shape[axis]:
            parts.append(selection.take(x, axis))
        else:
            return None
    with torch.no_grad():
        values = func(*(x.full if isinstance(x, Partly) else x for x in args))
    part = func(*(x.taken() if isinstance(x, Partly) else x for x in parts))
    look = next((x.look for x in known if x.look is not None), None)
    return Partly.make(values, part, selection, axis, look)


register_partly_rule(
    named(
        "relu relu6 gelu silu mish hardswish hardsigmoid hardtanh elu selu celu "
        "leaky_relu sigmoid tanh softplus softsign logsigmoid square sqrt exp "
        "abs neg pow clamp clamp_min float half bfloat16 to clone contiguous __pow__ __neg__"
    ),
    _unary,
)
register_partly_rule(named("mul add sub div true_divide maximum minimum"), _binary)
register_partly_rule(
    named(" ".join(f"__{side}{name}__" for name in ("mul", "add", "sub", "truediv")
                   for side in ("", "r"))),
    _binary,
)  # fmt: skip
register_partly_rule(iter((F.dropout, torch.dropout)), _dropout)
