"""The arithmetic of a convolution of which a part rests, transposed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mat.gate.autocast import autocast_dtype, lowered
from lightning_mat.gate.channels import Convolution, ConvPlan
from lightning_mat.gate.compiled import Needs
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.partly import Partly
from lightning_mat.gate.plan import constant_if_whole
from lightning_mat.gate.selection import Taken, place


class PartialConv(torch.autograd.Function):
    r"""Convolution with a weight of which a part trains, or passes gradients on.

    Filters :math:`R` over input channels :math:`C` are a convolution of their own: their weight's
    gradient needs the output's gradient in channels :math:`R` and the input in channels :math:`C`
    only, and what they add to the input's gradient lies in channels :math:`C`. The slices are taken
    before the convolution's backward operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: ConvPlan,
        output_padding: Sequence[int],
        values: Tensor | None,
    ) -> Any:
        """Return the layer's output, bit by bit what the plain layer returns.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: Shape ``[n, in, ...]``, or the channels that have gradients alone.
            weight: Shape ``[out, in / groups, ...]``; ``[in, out / groups, ...]`` if transposed.
            bias: Shape ``[out]``, or None.
            plan: What trains, and what passes.
            output_padding: What a transposed convolution adds to the output's size.
            values: The whole input ``[n, in, ...]`` where ``x`` is a part of it, or None.

        Returns:
            The output ``[n, out, ...]``; where the plan tells them apart, the channels that pass
            gradients on ``[n, len(plan.out), ...]`` and, as a constant, the output.
        """
        # The output that is a constant has no gradient: not even one of zeros.
        ctx.set_materialize_grads(False)
        dtype = autocast_dtype(x.device)
        ctx.plan, ctx.output_padding = plan, output_padding
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        x = x if values is None else values
        ctx.layout = _layout(x, weight)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
        kept = plan.kept.copy(x, 1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        out = torch.convolution(
            x,
            weight,
            bias,
            plan.stride,
            plan.padding,
            plan.dilation,
            plan.transposed,
            output_padding,
            plan.groups,
        )
        ctx.apart = plan.apart and not plan.out.whole
        if not ctx.apart:
            return out
        ctx.mark_non_differentiable(out)
        return plan.out.copy(out, 1), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *constant: object) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        if grad is None:  # what came after passed none on
            return (None,) * 6
        plan: ConvPlan = ctx.plan
        kept, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        # One copy of what passes serves all three.
        taken = Taken(grad if ctx.apart else plan.out.take(grad, 1))
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(
                taken, weight, plan, ctx.x_shape, ctx.output_padding, ctx.layout
            )
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(
                taken, kept, plan, ctx.weight_shape, ctx.weight_dtype, ctx.output_padding
            )
        if ctx.needs_input_grad[2]:
            grad_bias = plan.give_bias(taken, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def convolve(
    layer: Convolution, input: Tensor, plan: ConvPlan, output_padding: Sequence[int]
) -> Tensor:
    """Return a layer's output for an input of which perhaps only a part has gradients."""
    weight = cast(Tensor, constant_if_whole(layer.weight, plan.weight_rest))
    bias = constant_if_whole(layer.bias, plan.bias_rest)
    x, values = input, None
    if isinstance(input, Partly):
        reading = None
        if input.apart and input.axis == -len(plan.stride) - 1:
            reading = plan.reading(input.selection)
        if reading is None:
            x = input.merged()
        else:
            plan, x, values = reading, input.taken(), input.full
    return apply_plan(plan, x, weight, bias, output_padding, values)


def apply_plan(
    plan: ConvPlan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: Sequence[int],
    values: Tensor | None,
) -> Tensor:
    """Return the output, batched or not, see :meth:`PartialConv.forward`."""
    axis = -len(plan.stride) - 1
    if len(plan.into) == 0:
        x, values = (x if values is None else values).detach(), None
    x = F.pad(x, plan.pad, plan.pad_mode) if plan.pad else x
    if x.dim() == len(plan.stride) + 2:
        out = PartialConv.apply(x, weight, bias, plan, output_padding, values)
    else:
        values = None if values is None else values.unsqueeze(0)
        out = PartialConv.apply(x.unsqueeze(0), weight, bias, plan, output_padding, values)
        out = tuple(o.squeeze(0) for o in out) if isinstance(out, tuple) else out.squeeze(0)
    if isinstance(out, tuple):
        return Partly.make(out[1], out[0], plan.out, axis)
    return cast(Tensor, out)


def all_gradients(
    plan: ConvPlan, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, given the whole input and the output's."""
    low_x, low_weight = x.to(grad.dtype), weight.to(grad.dtype)
    padded = F.pad(low_x, plan.pad, plan.pad_mode) if plan.pad else low_x
    batched = x.dim() == len(plan.stride) + 2
    if not batched:
        grad, padded = grad.unsqueeze(0), padded.unsqueeze(0)
    extra = _output_padding(plan, padded.shape, weight.shape, grad.shape)
    taken = Taken(plan.out.take(grad, 1))
    grad_x = grad_weight = grad_bias = None
    if needs[0] and len(plan.into):
        layout = _layout(padded, weight)
        grad_x = _input_gradient(taken, low_weight, plan, padded.shape, extra, layout)
        grad_x = _unpad(grad_x, plan, x.shape[-len(plan.stride) :])
        grad_x = (grad_x if batched else grad_x.squeeze(0)).to(x.dtype)
    if needs[1] and plan.terms:
        kept = plan.kept.take(padded, 1)
        grad_weight = _weight_gradient(taken, kept, plan, weight.shape, weight.dtype, extra)
    if needs[2] and bias is not None and len(plan.bias):
        grad_bias = plan.give_bias(taken, bias.dtype)
    return grad_x, grad_weight, grad_bias


def _output_padding(
    plan: ConvPlan, x: torch.Size, weight: torch.Size, out: torch.Size
) -> Sequence[int]:
    """Return what a transposed convolution added to the size of its output."""
    if not plan.transposed:
        return [0] * len(plan.stride)
    sizes = zip(out[2:], x[2:], weight[2:], plan.stride, plan.padding, plan.dilation, strict=True)
    return [o - (i - 1) * s + 2 * p - d * (k - 1) - 1 for o, i, k, s, p, d in sizes]


def _unpad(grad: Tensor, plan: ConvPlan, sizes: Sequence[int]) -> Tensor:
    """Return the gradient of what was padded: every position's copies are summed."""
    if not plan.pad:
        return grad
    for i, size in enumerate(sizes):
        dim = i - len(sizes)
        before, after = plan.pad[-2 * (i + 1)], plan.pad[-2 * (i + 1) + 1]
        if plan.pad_mode == "constant":
            grad = grad.narrow(dim, before, size)
            continue
        positions = torch.arange(size, dtype=torch.float64, device=grad.device)
        source = F.pad(positions.view(1, 1, size), (before, after), plan.pad_mode).long().view(-1)
        shape = list(grad.shape)
        shape[dim] = size
        grad = grad.new_zeros(shape).index_add_(dim, source, grad)
    return grad


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the layout that the plain backward operation works in: the input's or the weight's."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and any(
        t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight)
    ):
        return last
    return torch.contiguous_format


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plan: ConvPlan,
    output_padding: Sequence[int],
    groups: int,
    which: int,
) -> Tensor:
    """Return the gradient of the input (``which`` 0) or of the weight (1)."""
    gradients: Sequence[Tensor] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        plan.stride,
        plan.padding,
        plan.dilation,
        plan.transposed,
        output_padding,
        groups,
        [which == 0, which == 1, False],
    )
    return gradients[which]


def _input_gradient(
    grad: Taken,
    weight: Tensor,
    plan: ConvPlan,
    shape: torch.Size,
    output_padding: Sequence[int],
    layout: torch.memory_format,
) -> Tensor:
    def product(grad: Tensor, weight: Tensor, channels: int, groups: int) -> Tensor:
        # Of the input this operation needs the shape alone. On a CPU it would copy one that is not
        # laid out properly, while memory that nobody touches costs nothing there.
        sizes = shape[0], channels, *shape[2:]
        if grad.device.type == "cpu":
            x = torch.empty(sizes, dtype=grad.dtype, memory_format=layout)
        else:
            x = grad.new_empty(1).expand(sizes)
        weight = weight.contiguous(memory_format=layout)
        return _backward(grad, x, weight, plan, output_padding, groups, 0)

    if plan.passages is None:
        return product(grad.tensor, weight, shape[1], plan.groups)
    result: Tensor | None = None
    for passage in plan.passages:
        block = passage.columns.take(passage.rows.take(weight, 0), 1)
        part = grad.take(passage.grad)
        out = product(part, block, len(passage.inputs), passage.groups)
        if passage.inputs.whole and len(plan.passages) == 1:
            return out
        if result is None:
            result = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=layout)
            result.zero_()
        if len(plan.passages) == 1:
            passage.inputs.put(out, result, 1)
        else:
            passage.inputs.add(out, result, 1)
    assert result is not None
    return result


def _weight_gradient(
    grad: Taken,
    kept: Tensor,
    plan: ConvPlan,
    shape: torch.Size,
    dtype: torch.dtype,
    output_padding: Sequence[int],
) -> Tensor:
    def product(grad: Tensor, x: Tensor, rows: int, columns: int, groups: int) -> Tensor:
        # Of the weight this operation needs the shape alone.
        weight = grad.new_empty(1).expand(rows, columns, *shape[2:])
        return _backward(grad, x, weight, plan, output_padding, groups, 1)

    if plan.weight_rest is None:
        return product(grad.tensor, kept, shape[0], shape[1], plan.groups).to(dtype)
    result = plan.weight_rest.zeros(dtype)
    for term in plan.terms:
        part = grad.take(term.grad), term.inputs.take(kept, 1)
        block = product(*part, len(term.rows), len(term.columns), term.groups)
        place(block, result, term.rows, term.columns)
    return plan.give_weight(result)
