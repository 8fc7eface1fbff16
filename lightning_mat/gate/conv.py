"""Gate rule for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: filters and input channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_mat.gate.autocast import autocast_dtype, lowered
from lightning_mat.gate.plan import (
    Plan,
    Term,
    constant_if_whole,
    covers,
    training_blocks,
    training_entries,
)
from lightning_mat.gate.rules import Forward, Rest, register_gate_rule
from lightning_mat.gate.selection import Selection, place
from lightning_mat.units.regions import Run, merge_runs

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class ConvPlan(Plan):
    """A plan for a convolution.

    Attributes:
        stride: One per spatial dimension, as are the next two.
        padding: Zeros added on both sides, after what :attr:`pad` adds.
        dilation: Distance between the taps of the kernel.
        groups: Groups of channels.
        pad: What ``F.pad`` adds first, none for a layer that pads with zeros on both sides alike.
        pad_mode: Its mode.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]
    pad_mode: str


class PartialConv(torch.autograd.Function):
    r"""Convolution with a weight of which a part trains.

    Filters :math:`R` over input channels :math:`C` are a convolution of their own: their weight's
    gradient needs the output's gradient in channels :math:`R` and the input in channels :math:`C`
    only, so that the slices are taken before the convolution's backward operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: ConvPlan,
    ) -> Tensor:
        """Return the layer's output, bit by bit what the plain layer returns.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: Shape ``[n, in, ...]``.
            weight: Shape ``[out, in / groups, ...]``.
            bias: Shape ``[out]``, or None.
            plan: What trains.
        """
        dtype = autocast_dtype(x.device)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
        kept = plan.kept.copy(x, 1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        zeros = [0] * len(plan.stride)
        return torch.convolution(
            x, weight, bias, plan.stride, plan.padding, plan.dilation, False, zeros, plan.groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        plan: ConvPlan = ctx.plan
        kept, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Of the input this operation needs the shape alone.
            x = grad.new_empty(1).expand(ctx.x_shape)
            grad_x = _backward(grad, x, weight, plan, plan.groups, 0).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, kept, plan, ctx.weight_shape, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = plan.give_bias(grad, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: ConvPlan, groups: int, which: int
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
        False,
        [0] * len(plan.stride),
        groups,
        [which == 0, which == 1, False],
    )
    return gradients[which]


def _weight_gradient(
    grad: Tensor, kept: Tensor, plan: ConvPlan, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    def product(grad: Tensor, x: Tensor, rows: int, columns: int, groups: int) -> Tensor:
        # Of the weight this operation needs the shape alone.
        weight = grad.new_empty(1).expand(rows, columns, *shape[2:])
        return _backward(grad, x, weight, plan, groups, 1)

    if plan.weight_rest is None:
        return product(grad, kept, shape[0], shape[1], plan.groups).to(dtype)
    result = grad.new_zeros(shape, dtype=dtype)
    for term in plan.terms:
        part = term.grad.take(grad, 1), term.inputs.take(kept, 1)
        block = product(*part, len(term.rows), len(term.columns), term.groups)
        place(block, result, term.rows, term.columns)
    return plan.give_weight(result)


def _plain_parts(layer: Convolution, rest: Rest | None) -> list[tuple[list[Run], list[Run]]] | None:
    """Return (filters, input channels) of each term of a convolution with one group.

    None where a slice cuts through a kernel, since channels are the finest that can be left out.
    """
    taps = layer.weight[0, 0].numel()
    parts = []
    for block in training_blocks(layer.weight, rest):
        if any(edge % taps for run in block.columns for edge in run):
            return None
        channels = [(a // taps, b // taps) for a, b in block.columns]
        parts.append((list(block.rows), channels))
    return parts


def _grouped_parts(layer: Convolution, rest: Rest | None) -> dict[int, list[tuple[int, list[int]]]]:
    """Return, for each number of training filters, the groups that have so many, with the filters.

    Groups with equally many training filters make one grouped convolution together.
    """
    rows_per_group = layer.out_channels // layer.groups
    by_group: dict[int, list[int]] = {}
    for block in training_blocks(layer.weight, rest):
        for a, b in block.rows:
            for row in range(a, b):
                by_group.setdefault(row // rows_per_group, []).append(row)
    by_count: dict[int, list[tuple[int, list[int]]]] = {}
    for group, rows in sorted(by_group.items()):
        by_count.setdefault(len(rows), []).append((group, sorted(rows)))
    return by_count


def _terms(layer: Convolution, rest: Rest | None) -> tuple[tuple[Term, ...], Selection] | None:
    """Return the terms of the weight's gradient and the channels of the input that they need."""
    device, columns = layer.weight.device, layer.weight.shape[1]
    parts: list[tuple[list[Run], list[Run], list[Run], int]] = []
    if layer.groups == 1:
        plain = _plain_parts(layer, rest)
        if plain is None:
            return None
        parts = [(rows, channels, channels, 1) for rows, channels in plain]
    else:
        blocks = training_blocks(layer.weight, rest)
        if any(block.n_columns != layer.weight[0].numel() for block in blocks):
            return None
        for members in _grouped_parts(layer, rest).values():
            rows = [(row, row + 1) for _, group_rows in members for row in group_rows]
            channels = [(group * columns, (group + 1) * columns) for group, _ in members]
            parts.append((rows, channels, [(0, columns)], len(members)))
    kept = Selection(
        merge_runs(run for _, channels, _, _ in parts for run in channels),
        layer.in_channels,
        device,
    )
    terms = []
    for rows, channels, wanted, groups in parts:
        some_rows = Selection(merge_runs(rows), layer.out_channels, device)
        some = Selection(merge_runs(channels), layer.in_channels, device)
        columns_out = Selection(merge_runs(wanted), columns, device)
        terms.append(Term(some_rows, some.within(kept), some_rows, columns_out, groups))
    return tuple(terms), kept


def _padding(layer: Convolution) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Return (zeros on both sides, what ``F.pad`` adds before, its mode)."""
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return none, tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    if layer.padding == "valid":
        return none, (), "constant"
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        uneven = [value for t in reversed(total) for value in (0, t % 2)]
        return tuple(t // 2 for t in total), tuple(uneven) if any(uneven) else (), "constant"
    return cast("tuple[int, ...]", layer.padding), (), "constant"


def conv_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a convolution of which something rests.

    None where a slice cuts through a kernel, or through the channels of a grouped convolution.
    """
    if not covers(module, rests):
        return None
    layer = cast(Convolution, module)
    found = _terms(layer, rests.get("weight"))
    if found is None:
        return None
    terms, kept = found
    entries = training_entries(layer.bias, rests.get("bias"))
    padding, pad, pad_mode = _padding(layer)
    plan = ConvPlan(
        terms,
        kept,
        Selection(entries, layer.out_channels, layer.weight.device),
        rests.get("weight"),
        rests.get("bias"),
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=layer.groups,
        pad=pad,
        pad_mode=pad_mode,
    )
    spatial = len(layer.kernel_size)

    def run(input: Tensor) -> Tensor:
        weight = constant_if_whole(layer.weight, plan.weight_rest)
        bias = constant_if_whole(layer.bias, plan.bias_rest)
        x = F.pad(input, plan.pad, plan.pad_mode) if plan.pad else input
        batched = x.dim() == spatial + 2
        out = PartialConv.apply(x if batched else x.unsqueeze(0), weight, bias, plan)
        return cast(Tensor, out if batched else out.squeeze(0))

    return run


for _layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_gate_rule(_layer, conv_rule)
