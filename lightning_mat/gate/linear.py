"""Gate rules for matrix products: ``nn.Linear`` and Hugging Face's ``Conv1D``."""

from __future__ import annotations

from collections.abc import Mapping
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
from lightning_mat.units.regions import merge_runs


@dataclass(frozen=True)
class LinearPlan(Plan):
    """A plan for a matrix product.

    Attributes:
        input_major: The weight is ``[in, out]`` (``Conv1D``), not ``[out, in]`` (``nn.Linear``).
    """

    input_major: bool


class PartialLinear(torch.autograd.Function):
    r"""Product with a weight of which a part trains.

    For tokens :math:`t`, :math:`y_t = W x_t + b`, and for every block of rows :math:`R` and columns
    :math:`C` that trains

    .. math:: \nabla W_{RC} = \sum_t (\nabla y_t)_R \, (x_t)_C^\top, \qquad
              \nabla b_R = \sum_t (\nabla y_t)_R.

    The slices are taken out of the operands before the product, all runs of a block in one: on a
    CPU one product of a quarter of the rows costs a quarter of the full one, while a product for
    each run of 16 rows costs 1.6 times as much. Everything else of the gradients is zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: LinearPlan,
    ) -> Tensor:
        """Return the layer's output, bit by bit what the plain layer returns.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: Shape ``[..., in]``; ``[tokens, in]`` for an input-major weight.
            weight: Shape ``[out, in]``, or ``[in, out]`` where the plan says input-major.
            bias: Shape ``[out]``, or None.
            plan: What trains.
        """
        dtype = autocast_dtype(x.device)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
        kept = plan.kept.copy(_flat(x), 1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        if plan.input_major:
            return torch.addmm(cast(Tensor, bias), x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        plan: LinearPlan = ctx.plan
        kept, weight = ctx.saved_tensors
        grad = _flat(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight.t() if plan.input_major else weight)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, kept, plan, ctx.weight_shape, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = plan.give_bias(grad, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _flat(tensor: Tensor) -> Tensor:
    """Return ``[tokens, features]``, also where there are no tokens."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _weight_gradient(
    grad: Tensor, kept: Tensor, plan: LinearPlan, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    def product(grad: Tensor, x: Tensor) -> Tensor:
        return x.t() @ grad if plan.input_major else grad.t() @ x

    if plan.weight_rest is None:
        return product(grad, kept).to(dtype)
    result = grad.new_zeros(shape, dtype=dtype)
    for term in plan.terms:
        block = product(term.grad.take(grad, 1), term.inputs.take(kept, 1))
        place(block, result, term.rows, term.columns)
    return plan.give_weight(result)


def _plan(module: nn.Module, rests: Mapping[str, Rest], *, input_major: bool) -> LinearPlan:
    weight, bias = cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)
    blocks = training_blocks(weight, rests.get("weight"))
    rows = [Selection(block.rows, weight.shape[0], weight.device) for block in blocks]
    columns = [Selection(block.columns, weight.shape[1], weight.device) for block in blocks]
    grads, inputs = (columns, rows) if input_major else (rows, columns)
    kept = Selection(
        merge_runs(run for some in inputs for run in some.runs),
        weight.shape[0 if input_major else 1],
        weight.device,
    )
    terms = tuple(
        Term(grad, some.within(kept), r, c)
        for grad, some, r, c in zip(grads, inputs, rows, columns, strict=True)
    )
    entries = training_entries(bias, rests.get("bias"))
    trained = Selection(entries, weight.shape[1 if input_major else 0], weight.device)
    return LinearPlan(terms, kept, trained, rests.get("weight"), rests.get("bias"), input_major)


def linear_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of an ``nn.Linear`` of which something rests."""
    if not covers(module, rests):
        return None
    layer = cast(nn.Linear, module)
    plan = _plan(module, rests, input_major=False)
    sliced = any(not rest.whole for rest in rests.values())

    def run(input: Tensor) -> Tensor:
        weight = constant_if_whole(layer.weight, plan.weight_rest)
        bias = constant_if_whole(layer.bias, plan.bias_rest)
        if not sliced:
            return F.linear(input, cast(Tensor, weight), bias)
        return cast(Tensor, PartialLinear.apply(input, weight, bias, plan))

    return run


def conv1d_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a Hugging Face ``Conv1D``: a linear layer with a weight [in, out]."""
    if not covers(module, rests):
        return None
    layer = cast(nn.Linear, module)
    plan = _plan(module, rests, input_major=True)

    def run(x: Tensor) -> Tensor:
        weight = constant_if_whole(layer.weight, plan.weight_rest)
        bias = constant_if_whole(layer.bias, plan.bias_rest)
        out = cast(Tensor, PartialLinear.apply(x.view(-1, x.size(-1)), weight, bias, plan))
        return out.view(*x.shape[:-1], out.shape[-1])

    return run


register_gate_rule(nn.Linear, linear_rule)
register_gate_rule("transformers.pytorch_utils.Conv1D", conv1d_rule)
