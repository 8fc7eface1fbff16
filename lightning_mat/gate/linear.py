"""Gate rules for matrix products: ``nn.Linear`` and Hugging Face's ``Conv1D``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.gate.autocast import autocast_dtype, lowered
from lightning_mat.gate.compiled import Gradients, Needs
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.partly import Partly
from lightning_mat.gate.plan import (
    Passage,
    Plan,
    Term,
    constant_if_whole,
    covers,
    passing_blocks,
    passing_entries,
    training_blocks,
    training_entries,
)
from lightning_mat.gate.rules import Forward, Rest, Static, register_gate_rule
from lightning_mat.gate.selection import Selection, Taken, place
from lightning_mat.units.regions import Block, Run, merge_runs


@dataclass(frozen=True)
class LinearPlan(Plan):
    """A plan for a matrix product.

    Attributes:
        input_major: The weight is ``[in, out]`` (``Conv1D``), not ``[out, in]`` (``nn.Linear``).
        kept_of_part: What :attr:`kept` is among :attr:`into`.
    """

    input_major: bool
    kept_of_part: Selection


class PartialLinear(torch.autograd.Function):
    r"""Product with a weight of which a part trains, or passes gradients on.

    For tokens :math:`t`, :math:`y_t = W x_t + b`, and for every block of rows :math:`R` and columns
    :math:`C` that trains, respectively passes,

    .. math:: \nabla W_{RC} = \sum_t (\nabla y_t)_R \, (x_t)_C^\top, \qquad
              \nabla b_R = \sum_t (\nabla y_t)_R, \qquad
              (\nabla x_t)_C \mathrel{+}= W_{RC}^\top (\nabla y_t)_R.

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
        values: Tensor | None,
    ) -> Any:
        """Return the layer's output, bit by bit what the plain layer returns.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: Shape ``[..., in]``, or ``[..., len(plan.into)]`` where only that part has gradients.
            weight: Shape ``[out, in]``, or ``[in, out]`` where the plan says input-major.
            bias: Shape ``[out]``, or None.
            plan: What trains, and what passes.
            values: The whole input ``[..., in]`` where ``x`` is a part of it, or None.

        Returns:
            The output ``[..., out]``; where only some outputs pass gradients on, these
            ``[..., len(plan.out)]`` and, as a constant, the output.
        """
        # The output that is a constant has no gradient: not even one of zeros.
        ctx.set_materialize_grads(False)
        dtype = autocast_dtype(x.device)
        ctx.plan, ctx.x_shape, ctx.x_dtype, ctx.part = plan, x.shape, x.dtype, values is not None
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
        kept = None
        if ctx.needs_input_grad[1]:
            kept = (plan.kept if values is None else plan.kept_of_part).copy(_flat(x), 1)
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        full = x if values is None else lowered(values, dtype)
        out = (_conv1d if plan.input_major else _linear)(None, full, weight, bias)
        if plan.out.whole:
            return out
        ctx.mark_non_differentiable(out)
        return plan.out.copy(out, -1), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *constant: object) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        if grad is None:  # what came after passed none on
            return None, None, None, None, None
        plan: LinearPlan = ctx.plan
        kept, weight = ctx.saved_tensors
        taken = Taken(_flat(grad))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(taken, weight, plan, part=ctx.part)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(taken, kept, plan, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = plan.give_bias(taken, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def linear_gradients(
    module: nn.Module, rests: Mapping[str, Rest], *, input_major: bool = False
) -> Gradients | None:
    """Return what computes the gradients of a linear layer in a compiled model."""
    if not covers(module, rests):
        return None
    plan = linear_plan(module, rests, input_major=input_major)
    return lambda *args: all_gradients(plan, *args)


def all_gradients(
    plan: LinearPlan, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, given the whole input and the output's."""
    grad = plan.out.take(_flat(grad), 1)
    low_x, low_weight = x.to(grad.dtype), weight.to(grad.dtype)
    taken = Taken(grad)
    grad_x = grad_weight = grad_bias = None
    if needs[0] and len(plan.into):
        grad_x = _input_gradient(taken, low_weight, plan, part=False).view(x.shape).to(x.dtype)
    if needs[1] and plan.terms:
        kept = plan.kept.take(_flat(low_x), 1)
        grad_weight = _weight_gradient(taken, kept, plan, weight.dtype)
    if needs[2] and bias is not None and len(plan.bias):
        grad_bias = plan.give_bias(taken, bias.dtype)
    return grad_x, grad_weight, grad_bias


def _linear(module: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    # Of a strided input PyTorch computes one product where the weight needs a gradient, and many
    # where it does not, as inside of an autograd function: the same bits come from the former.
    out = _shaped(torch.mm(_flat(x), weight.t()), x)
    return out if bias is None else out.add_(bias)


def _conv1d(module: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.addmm(cast(Tensor, bias), _flat(x), weight)
    return _shaped(out, x)


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """Return tokens in the shape of the input, as no view: what follows may change it in place."""
    return cast(Tensor, torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]]))


def _flat(tensor: Tensor) -> Tensor:
    """Return ``[tokens, features]``, also where there are no tokens."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _input_gradient(grad: Taken, weight: Tensor, plan: LinearPlan, *, part: bool) -> Tensor:
    """Return ``[tokens, in]``, or the columns of ``plan.into`` alone."""
    if plan.passages is None:
        return grad.tensor @ (weight.t() if plan.input_major else weight)
    result: Tensor | None = None
    for passage in plan.passages:
        block = passage.columns.take(passage.rows.take(weight, 0), 1)
        out = grad.take(passage.grad) @ (block.t() if plan.input_major else block)
        inputs = passage.inner if part else passage.inputs
        if inputs.whole and len(plan.passages) == 1:
            return out
        if result is None:
            result = out.new_zeros(len(out), inputs.size)
        (inputs.put if len(plan.passages) == 1 else inputs.add)(out, result, 1)
    assert result is not None
    return result


def _weight_gradient(grad: Taken, kept: Tensor, plan: LinearPlan, dtype: torch.dtype) -> Tensor:
    def product(grad: Tensor, x: Tensor) -> Tensor:
        return x.t() @ grad if plan.input_major else grad.t() @ x

    if plan.weight_rest is None:
        return product(grad.tensor, kept).to(dtype)
    result = plan.weight_rest.zeros(dtype)
    for term in plan.terms:
        block = product(grad.take(term.grad), term.inputs.take(kept, 1))
        place(block, result, term.rows, term.columns)
    return plan.give_weight(result)


def linear_plan(module: nn.Module, rests: Mapping[str, Rest], *, input_major: bool) -> LinearPlan:
    """Return what of a matrix product's gradients is computed.

    Args:
        module: Has a ``weight`` and a ``bias``, which may be None.
        rests: What rests of them.
        input_major: The weight is ``[in, out]``.
    """
    weight, bias = cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)
    weight_rest, bias_rest = rests.get("weight"), rests.get("bias")
    sizes = tuple(weight.shape)
    device = weight.device
    out_size, in_size = reversed(sizes) if input_major else sizes

    def sides(block: Block) -> tuple[Selection, Selection, Selection, Selection]:
        """Return a block's outputs, inputs, rows and columns."""
        rows = Selection(block.rows, sizes[0], device)
        columns = Selection(block.columns, sizes[1], device)
        return (columns, rows, rows, columns) if input_major else (rows, columns, rows, columns)

    trains = [sides(block) for block in training_blocks(weight, weight_rest)]
    passes = [sides(block) for block in passing_blocks(weight, weight_rest)]

    def union(selections: Iterable[Selection], size: int, *more: Run) -> Selection:
        runs = merge_runs([run for some in selections for run in some.runs] + list(more))
        return Selection(runs, size, device)

    kept = union((inputs for _, inputs, _, _ in trains), in_size)
    into = union((inputs for _, inputs, _, _ in passes), in_size)
    passing = passing_entries(bias, bias_rest)
    out = union((outputs for outputs, _, _, _ in passes), out_size, *passing)
    entries = Selection(training_entries(bias, bias_rest), out_size, device)
    passages = tuple(
        Passage(outputs.within(out), rows, columns, inputs, inputs.within(into))
        for outputs, inputs, rows, columns in passes
    )
    return LinearPlan(
        terms=tuple(
            Term(outputs.within(out), inputs.within(kept), rows, columns)
            for outputs, inputs, rows, columns in trains
        ),
        kept=kept,
        bias=entries.within(out),
        bias_entries=entries,
        weight_rest=weight_rest,
        bias_rest=bias_rest,
        out=out,
        into=into,
        passages=None if weight_rest is None or weight_rest.passes else passages,
        input_major=input_major,
        kept_of_part=kept.within(into),
    )


def run_linear(layer: nn.Linear, input: Tensor, plan: LinearPlan) -> Tensor:
    """Return the layer's output for an input of which perhaps only a part has gradients."""
    weight = cast(Tensor, constant_if_whole(layer.weight, plan.weight_rest))
    bias = constant_if_whole(layer.bias, plan.bias_rest)
    x, values = input, None
    if input.is_nested:  # its tokens are in no two dimensions: in full, and the hooks clear
        if plan.passages is not None or not plan.out.whole:
            raise RuntimeError(
                'skip="units" cannot cut the gradients of a nested tensor: use skip="weights", or '
                "pad it (torch.nested.to_padded_tensor)"
            )
        return F.linear(input, weight, bias)
    if isinstance(input, Partly):
        same = (input.axis, input.selection.runs) == (-1, plan.into.runs)
        if same and plan.passages is not None and input.apart:
            x, values = input.taken(), input.full
        else:
            x = input.merged()
    if len(plan.into) == 0:
        x = x.detach()
    out = PartialLinear.apply(x, weight, bias, plan, values)
    return cast(Tensor, out) if plan.out.whole else Partly.make(out[1], out[0], plan.out)


def linear_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of an ``nn.Linear`` of which something rests."""
    if not covers(module, rests):
        return None
    layer = cast(nn.Linear, module)
    plan = linear_plan(module, rests, input_major=False)
    if any(not rest.whole or not rest.passes for rest in rests.values()):
        return lambda input: run_linear(layer, input, plan)

    def constant(input: Tensor) -> Tensor:
        weight = constant_if_whole(layer.weight, plan.weight_rest)
        bias = constant_if_whole(layer.bias, plan.bias_rest)
        return F.linear(input, cast(Tensor, weight), bias)

    return constant


def conv1d_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a Hugging Face ``Conv1D``: a linear layer with a weight [in, out]."""
    if not covers(module, rests):
        return None
    layer = cast(nn.Linear, module)
    plan = linear_plan(module, rests, input_major=True)
    return lambda x: run_linear(layer, x, plan)


register_gate_rule(nn.Linear, linear_rule, static=Static(plain=_linear, gradients=linear_gradients))
register_gate_rule(
    "transformers.pytorch_utils.Conv1D",
    conv1d_rule,
    static=Static(plain=_conv1d, gradients=functools.partial(linear_gradients, input_major=True)),
)
