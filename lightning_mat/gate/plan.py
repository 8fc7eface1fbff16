"""Plan: what of one layer's gradients is computed, shared by the rules of matrix-like layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mat.gate.rules import Rest
from lightning_mat.gate.selection import Selection, Taken
from lightning_mat.units.regions import Block, Run, merge_runs
from lightning_mat.units.unit import matrix_shape


@dataclass(frozen=True)
class Term:
    """One product of a weight gradient: which part of each operand gives which part of it.

    Attributes:
        grad: Features (channels) of the output's gradient that enter, among those that pass.
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
class Passage:
    """One product of an input gradient: which part of the weight meets which of the output's.

    Attributes:
        grad: Features (channels) of the output's gradient that enter, among those that pass.
        rows: Rows of the weight (its dimension 0) that enter.
        columns: Columns of the weight (its dimension 1) that enter.
        inputs: Features (channels) of the input whose gradient comes out.
        inner: The same, counted among all that get a gradient.
        groups: Groups of the convolution that gives this part; 1 for a matrix product.
    """

    grad: Selection
    rows: Selection
    columns: Selection
    inputs: Selection
    inner: Selection
    groups: int = 1


@dataclass(frozen=True)
class Plan:
    """What of one layer's gradients is computed, and what of its input that needs.

    Attributes:
        terms: Products that make up the weight's gradient; none where the weight rests.
        kept: Features (channels) of the input that some term needs; the others are not saved.
        bias: Entries of the bias that train, counted among the outputs that pass; none where it
            rests or does not exist.
        bias_entries: The same, counted among all.
        weight_rest: The weight's :class:`Rest`, None where all of it trains.
        bias_rest: The bias' :class:`Rest`, None where all of it trains.
        out: Features (channels) of the output that gradients travel through.
        into: Features (channels) of the input that get a gradient.
        passages: Products that make up the input's gradient; None where the whole weight passes,
            which is one plain product.
    """

    terms: tuple[Term, ...]
    kept: Selection
    bias: Selection
    bias_entries: Selection
    weight_rest: Rest | None
    bias_rest: Rest | None
    out: Selection
    into: Selection
    passages: tuple[Passage, ...] | None

    def give_weight(self, grad: Tensor) -> Tensor:
        """Return the weight's gradient, known to be zero where the weight rests."""
        return grad if self.weight_rest is None else self.weight_rest.deliver(grad)

    def give_bias(self, grad: Taken, dtype: torch.dtype) -> Tensor:
        """Return the bias' gradient from that of the outputs that pass, ``[n, len(out), ...]``."""
        part = grad.take(self.bias)
        total = part.sum([i for i in range(part.dim()) if i != 1])
        if self.bias_rest is None:
            return total.to(dtype)
        result = self.bias_rest.zeros(dtype)
        self.bias_entries.put(total, result, 0)
        return self.bias_rest.deliver(result)


def covers(module: nn.Module, rests: Mapping[str, Rest]) -> bool:
    """Return whether a module is a plain layer: its own, real ``weight`` and perhaps ``bias``."""
    weight = module._parameters.get("weight")
    return weight is not None and not weight.is_complex() and set(rests) <= {"weight", "bias"}


def training_blocks(param: Tensor, rest: Rest | None) -> tuple[Block, ...]:
    """Return what of a parameter trains, over its matrix view."""
    return (everything(param),) if rest is None else rest.blocks


def passing_blocks(param: Tensor, rest: Rest | None) -> tuple[Block, ...]:
    """Return what of a parameter gradients travel through, over its matrix view."""
    return (everything(param),) if rest is None else rest.passing


def everything(param: Tensor) -> Block:
    """Return the block that covers a parameter's matrix view."""
    rows, columns = matrix_shape(param.shape)
    return Block(((0, rows),), ((0, columns),))


def rows_of(blocks: Sequence[Block]) -> tuple[Run, ...]:
    """Return the rows in which some block lies."""
    return merge_runs(run for block in blocks for run in block.rows)


def training_entries(bias: Tensor | None, rest: Rest | None) -> tuple[Run, ...]:
    """Return which entries of a bias train, none for a layer without one."""
    return () if bias is None else rows_of(training_blocks(bias, rest))


def passing_entries(bias: Tensor | None, rest: Rest | None) -> tuple[Run, ...]:
    """Return which entries of a bias gradients travel to, none for a layer without one."""
    return () if bias is None else rows_of(passing_blocks(bias, rest))


def constant_if_whole(param: Tensor | None, rest: Rest | None) -> Tensor | None:
    """Return the parameter, detached where all of it rests: autograd then saves nothing for it."""
    if param is None or rest is None or not rest.whole:
        return param
    return param.detach()
