"""Plan: what of one layer's gradients is computed, shared by the rules of matrix-like layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mat.gate.rules import Rest
from lightning_mat.gate.selection import Selection
from lightning_mat.units.regions import Block, Run, merge_runs
from lightning_mat.units.unit import matrix_shape


@dataclass(frozen=True)
class Term:
    """One product of a weight gradient: which part of each operand gives which part of it.

    Attributes:
        grad: Features (channels) of the output's gradient that enter.
        inputs: Features (channels) of what was saved of the input that enter.
        rows: Rows of the weight (its dimension 0) that come out.
        columns: Columns of the weight (its dimension 1) that come out.
        groups: Groups of the convolution that gives this term; 1 for a matrix product.
    """

    grad: Selection
    inputs: Selection
    rows: Selection
    columns: Selection
    groups: int = 1


@dataclass(frozen=True)
class Plan:
    """What of one layer's gradients is computed, and what of its input that needs.

    Attributes:
        terms: Products that make up the weight's gradient; none where the weight rests.
        kept: Features (channels) of the input that some term needs; the others are not saved.
        bias: Entries of the bias that train; none where it rests or does not exist.
        weight_rest: The weight's :class:`Rest`, None where all of it trains.
        bias_rest: The bias' :class:`Rest`, None where all of it trains.
    """

    terms: tuple[Term, ...]
    kept: Selection
    bias: Selection
    weight_rest: Rest | None
    bias_rest: Rest | None

    def give_weight(self, grad: Tensor) -> Tensor:
        """Return the weight's gradient, known to be zero where the weight rests."""
        return grad if self.weight_rest is None else self.weight_rest.deliver(grad)

    def give_bias(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias' gradient from the output's gradient ``[n, out, ...]``."""
        total = self.bias.take(grad, 1).sum([i for i in range(grad.dim()) if i != 1])
        if self.bias_rest is None:
            return total.to(dtype)
        result = total.new_zeros(self.bias.size, dtype=dtype)
        self.bias.put(total, result, 0)
        return self.bias_rest.deliver(result)


def covers(module: nn.Module, rests: Mapping[str, Rest]) -> bool:
    """Return whether a module is a plain layer: its own, real ``weight`` and perhaps ``bias``."""
    weight = module._parameters.get("weight")
    return weight is not None and not weight.is_complex() and set(rests) <= {"weight", "bias"}


def training_blocks(param: Tensor, rest: Rest | None) -> tuple[Block, ...]:
    """Return what of a parameter trains, over its matrix view."""
    if rest is not None:
        return rest.blocks
    rows, columns = matrix_shape(param.shape)
    return (Block(((0, rows),), ((0, columns),)),)


def training_entries(bias: Tensor | None, rest: Rest | None) -> tuple[Run, ...]:
    """Return which entries of a bias train, none for a layer without one."""
    if bias is None:
        return ()
    return merge_runs(run for block in training_blocks(bias, rest) for run in block.rows)


def constant_if_whole(param: Tensor | None, rest: Rest | None) -> Tensor | None:
    """Return the parameter, detached where all of it rests: autograd then saves nothing for it."""
    if param is None or rest is None or not rest.whole:
        return param
    return param.detach()
