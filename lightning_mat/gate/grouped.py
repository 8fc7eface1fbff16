"""Products of tokens with the experts that they were routed to, in one operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.plan import rows_of
from lightning_mat.gate.rules import Rest


class Chosen:
    """Some experts of E, with what it takes to find their tokens without asking the device.

    Args:
        numbers: The experts.
        count: E.
        device: Where the tensors live.
    """

    def __init__(self, numbers: Iterable[int], count: int, device: torch.device) -> None:
        """Rank the chosen experts first; rows beyond the last group's end are of expert E."""
        self.numbers = tuple(numbers)
        self.all = len(self.numbers) == count
        others = [e for e in range(count + 1) if e not in set(self.numbers)]
        rank = [0] * (count + 1)
        for position, number in enumerate((*self.numbers, *others)):
            rank[number] = position
        self._rank = torch.tensor(rank, device=device)
        self._index = torch.tensor(self.numbers, dtype=torch.int64, device=device)

    def index(self, device: torch.device) -> Tensor:
        """Return the experts' numbers; copied only if the model has moved since."""
        if self._index.device != device:
            self._index, self._rank = self._index.to(device), self._rank.to(device)
        return self._index

    def among(self, numbers: Tensor) -> Tensor:
        """Return which of some experts' numbers are of these experts, bool."""
        self.index(numbers.device)
        return self._rank[numbers] < len(self.numbers)

    def rows(self, offs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return which rows are of these experts, and where each expert's end among them.

        Args:
            offs: Where each expert's rows end, shape ``[E]``.
            count: Rows in all.

        Returns:
            Row numbers and ends, shape ``[len(numbers)]``. On an accelerator the rows of all other
            experts follow: how many there are, only the device knows.
        """
        index = self.index(offs.device)
        position = torch.arange(count, device=offs.device, dtype=offs.dtype)
        expert = torch.searchsorted(offs, position, right=True)
        order = self._rank[expert].argsort(stable=True)
        sizes = torch.diff(offs, prepend=offs.new_zeros(1))
        ends = sizes[index].cumsum(0, dtype=offs.dtype)
        if offs.device.type == "cpu":
            order = order[: int(ends[-1])]
        return order, ends


class Experts:
    """Which experts of a parameter ``[E, ...]`` train, and which pass gradients on.

    Args:
        rest: What rests of the parameter: whole experts.
    """

    def __init__(self, rest: Rest) -> None:
        """Number them."""
        self.rest = rest
        count, device = rest.param.shape[0], rest.param.device

        def numbers(runs: Iterable[tuple[int, int]]) -> list[int]:
            return [e for start, stop in runs for e in range(start, stop)]

        self.train = Chosen(numbers(rows_of(rest.blocks)), count, device)
        self.passing = Chosen(numbers(rows_of(rest.passing)), count, device)
        self._positions = {e: i for i, e in enumerate(self.train.numbers)}
        self._passes = frozenset(self.passing.numbers)

    def position(self, number: int) -> int | None:
        """Return which of those that train an expert is, None for one at rest."""
        return self._positions.get(number)

    def passes(self, number: int) -> bool:
        """Return whether gradients travel through an expert."""
        return number in self._passes


class GroupedProduct(torch.autograd.Function):
    r"""Rows times their expert's matrix, where some experts rest.

    With :math:`e(s)` the expert of row :math:`s`, :math:`y_s = x_s W_{e(s)}`, and for the experts
    that train, respectively pass gradients on,

    .. math:: \nabla W_e = \sum_{s: e(s) = e} x_s^\top \nabla y_s, \qquad
              \nabla x_s = \nabla y_s W_{e(s)}^\top,

    zero for the others. Rows of those experts are brought to the front, and products end there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offs: Tensor, experts: Experts, turned: bool
    ) -> Tensor:
        """Return ``F.grouped_mm(x, weight, offs=offs)``.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: Shape ``[S, n]``, sorted by expert.
            weight: Shape ``[E, n, m]``, or ``[E, m, n]`` if turned.
            offs: Where each expert's rows end, shape ``[E]``.
            experts: Who trains, and who passes gradients on.
            turned: Whether the weight is taken with its last two dimensions exchanged.
        """
        ctx.experts, ctx.turned, ctx.x_shape = experts, turned, x.shape
        kept = order = ends = None
        if ctx.needs_input_grad[1] and experts.train.numbers:
            order, ends = experts.train.rows(offs, len(x))
            kept = x[order]
        needed = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept, order, ends, needed, offs)
        return F.grouped_mm(x, weight.transpose(-2, -1) if turned else weight, offs=offs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the rows and of the weight."""
        experts: Experts = ctx.experts
        kept, order, ends, weight, offs = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if weight is not None:
            grad_x = _row_gradient(grad, weight, offs, experts.passing, ctx.x_shape, ctx.turned)
        if kept is not None:
            rows = grad[order]
            left, right = (rows, kept) if ctx.turned else (kept, rows)
            found = F.grouped_mm(left.t(), right, offs=ends)
            grad_weight = experts.rest.zeros(found.dtype)
            grad_weight.index_copy_(0, experts.train.index(found.device), found)
            grad_weight = experts.rest.deliver(grad_weight)
        return grad_x, grad_weight, None, None, None


def _row_gradient(
    grad: Tensor, weight: Tensor, offs: Tensor, passing: Chosen, shape: torch.Size, turned: bool
) -> Tensor | None:
    """Return the gradient of the rows, zero for experts that pass none on."""
    if not passing.numbers:
        return None
    if passing.all:
        return F.grouped_mm(grad, weight if turned else weight.transpose(-2, -1), offs=offs)
    order, ends = passing.rows(offs, len(grad))
    chosen = weight.index_select(0, passing.index(weight.device))
    found = F.grouped_mm(grad[order], chosen if turned else chosen.transpose(-2, -1), offs=ends)
    if len(order) == len(grad):  # what lies behind the last group is not written
        position = torch.arange(len(order), device=found.device)
        found = found.masked_fill((position >= ends[-1]).unsqueeze(1), 0.0)
    return found.new_zeros(shape).index_copy_(0, order, found)
