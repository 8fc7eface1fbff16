"""Gate rules for the affine parameters of normalisation layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.partly import Partly, live, ordinary
from lightning_mat.gate.plan import passing_entries
from lightning_mat.gate.rules import Forward, Rest, register_gate_rule
from lightning_mat.gate.selection import Selection
from lightning_mat.units.regions import Block

# Channels are dimension 1 of the first, whose subclasses share their forward. Of the others the
# affine parameters have the last dimensions.
CHANNELS: tuple[type[nn.Module], ...] = (nn.SyncBatchNorm, nn.GroupNorm, _InstanceNorm)
FEATURES: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)


def norm_rule(module: nn.Module, rests: Mapping[str, Rest], *, channels: bool) -> Forward | None:
    """Return the forward of a normalisation of whose affine parameters something may rest.

    A gradient of scale or shift is one sum per channel, and a by-product of the input's gradient:
    there is nothing to gather. It is computed with the others, and the parameter's hook clears it.
    Where gradients do not pass, that of the output is zero before anything is computed from it.
    A compiled model computes those of parameters that rest whole as well, and needs no other graph.
    """
    if not set(rests) <= {"weight", "bias"}:
        return None
    constants = [name for name, rest in rests.items() if rest.whole]
    cut = _mask(module, "weight", rests)
    if cut is None:  # of a cut bias the hook clears all that there is
        return lambda *args, **kwargs: _forward(module, constants, *args, *kwargs.values())
    bias_cut = _mask(module, "bias", rests)
    has_bias = module._parameters.get("bias") is not None
    shifts = torch.zeros_like(cut)
    if has_bias:
        shifts = cut if bias_cut is None else cut & ~bias_cut
    shifted = bool(shifts.any())
    nothing = bool(cut.all()) and not shifted

    def run(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (input,) = (*args, *kwargs.values())  # what each class calls it
        if nothing and not torch.compiler.is_compiling():
            with torch.no_grad():
                return _forward(module, (), input)
        bias = module._parameters["bias"] if shifted else None
        out = _forward(module, constants, input)
        return cast(Tensor, Cut.apply(out, bias, cut, shifts, channels))

    return run


def batch_norm_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a BatchNorm of whose affine parameters something may rest.

    No channel knows another, so that where some do not pass gradients on, the others are a
    normalisation of their own: only its input is saved, and only its gradients are computed.
    """
    in_full = norm_rule(module, rests, channels=True)
    layer = cast(_BatchNorm, module)
    if in_full is None or "weight" not in rests:
        return in_full
    masked = in_full
    entries = passing_entries(layer.weight, rests["weight"])
    passing = Selection(entries, layer.num_features, layer.weight.device)
    alike = layer.bias is None or passing_entries(layer.bias, rests.get("bias")) == entries
    if passing.whole or len(passing) == 0 or not alike:
        return in_full
    constants = [name for name, rest in rests.items() if rest.whole]

    def run(input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, masked(input))
        axis = 1 - input.dim()
        if live(input) and (input.axis, input.selection.runs) == (axis, passing.runs):
            part, input = input.taken(), input.full
        else:
            input = ordinary(input)
            part = cast(Tensor, Take.apply(input, passing))
        mean, var = layer.running_mean, layer.running_var
        batch = layer.training or (mean is None and var is None)
        with torch.no_grad():
            full = _forward(layer, (), input)
        scale, shift = (
            None if p is None else passing.take(p.detach() if name in constants else p, 0)
            for name, p in (("weight", layer.weight), ("bias", layer.bias))
        )
        part = F.batch_norm(
            part,
            None if batch or mean is None else passing.take(mean, 0),
            None if batch or var is None else passing.take(var, 0),
            scale,
            shift,
            batch,
            0.0,
            layer.eps,
        )
        return Partly.make(full, part, passing, axis)

    return run


class Cut(torch.autograd.Function):
    """A layer's output, some of whose channels or features pass no gradient on."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, bias: Tensor | None, cut: Tensor, shifts: Tensor, channels: bool
    ) -> Tensor:
        """Return the output: another tensor on the same memory, which may be changed in place.

        Args:
            ctx: What autograd keeps for the backward pass.
            out: Shape ``[n, channels, ...]``, or ``[..., *shape of the parameters]``.
            bias: The layer's shift, if some of it gets gradients where the output passes none.
            cut: Where the output passes none, bool, of the parameters' shape.
            shifts: Where the bias gets gradients nevertheless.
            channels: Which of both shapes it is.
        """
        ctx.cut, ctx.shifts, ctx.channels = cut, shifts, channels
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of output and bias."""
        cut = ctx.cut.to(grad.device)
        trailing = grad.dim() - 2 if ctx.channels else 0
        grad_bias = None
        if ctx.needs_input_grad[1]:
            dims = [1] if ctx.channels else range(grad.dim() - cut.dim(), grad.dim())
            total = grad.sum([d for d in range(grad.dim()) if d not in dims])
            grad_bias = total.masked_fill(~ctx.shifts.to(grad.device), 0.0)
        return grad.masked_fill(cut.view(*cut.shape, *[1] * trailing), 0.0), grad_bias, *[None] * 3


class Take(torch.autograd.Function):
    """Some channels of an input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: Selection) -> Tensor:
        """Return a copy of the channels, shape ``[n, len(channels), ...]``."""
        ctx.channels, ctx.like = channels, x.shape
        return channels.copy(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input, zero in the other channels."""
        result = grad.new_zeros(ctx.like)
        ctx.channels.put(grad, result, 1)
        return result, None


def _forward(module: nn.Module, constants: list[str] | tuple[()], input: Tensor) -> Tensor:
    """Return what the layer's class returns, with some of its parameters as constants."""
    if torch.compiler.is_compiling():
        return cast(Tensor, type(module).forward(module, input))
    held = {name: module._parameters[name] for name in constants}
    try:
        for name, param in held.items():
            module._parameters[name] = param.detach()  # type: ignore[assignment, union-attr]
        return cast(Tensor, type(module).forward(module, input))
    finally:
        module._parameters.update(held)


def _mask(module: nn.Module, name: str, rests: Mapping[str, Rest]) -> Tensor | None:
    """Return where a parameter passes no gradients, of its shape; None where all of it does."""
    rest = rests.get(name)
    if rest is None or rest.passes:
        return None
    mask = torch.ones(rest.param.shape, dtype=torch.bool)
    matrix = mask.view(len(mask), -1)
    for block in rest.passing:
        _clear(matrix, block)
    return mask.to(rest.param.device)


def _clear(matrix: Tensor, block: Block) -> None:
    for rect in block.rects():
        matrix[rect.r0 : rect.r1, rect.c0 : rect.c1] = False


# Asked in every decision, so that compiled models find the same forward in all of them.
for _kinds, _channels in ((CHANNELS, True), (FEATURES, False)):
    _rule = functools.partial(norm_rule, channels=_channels)
    for _layer in _kinds:
        register_gate_rule(_layer, _rule, always=True)
register_gate_rule(_BatchNorm, batch_norm_rule, always=True)
