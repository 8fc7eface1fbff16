"""Products of tokens with the experts that they were routed to, in one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

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
        """Return which of some experts' numbers, counted from behind too, are of these, bool."""
        self.index(numbers.device)
        return self._rank[numbers % (len(self._rank) - 1)] < len(self.numbers)

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


def by_loop(func: Callable[..., Any]) -> bool | None:
    """Return whether a grouped product goes through the experts one by one; None for other things.

    ``F.grouped_mm`` does not. Where that has no kernel, Hugging Face's models have their own.
    """
    if func is torch._grouped_mm:
        return False
    if getattr(func, "_qualified_op_name", None) == "transformers::grouped_mm_fallback":
        return True
    return None


def ends_of(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return where each expert's rows end, if a call is a grouped product and nothing more."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if by_loop(func) is None or len(args) != 2 or given.keys() != {"offs"}:
        return None
    return cast(Tensor, given["offs"])


_TRANSPOSES = (Tensor.transpose, torch.transpose, Tensor.swapaxes, Tensor.swapdims)
_MT = Tensor.mT.__get__  # type: ignore[attr-defined]


def turns(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function exchanges the last two dimensions of ``args[0]``, ``[E, n, m]``."""
    if func in _TRANSPOSES and not kwargs:
        return sorted(d % 3 for d in args[1:]) == [1, 2]
    return bool(func == _MT)


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
        ctx: Any,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        offs: Tensor,
        experts: Experts,
        turned: bool,
    ) -> Tensor:
        """Return ``func(x, weight, offs=offs)``.

        Args:
            ctx: What autograd keeps for the backward pass.
            func: The product, one that :func:`by_loop` knows.
            x: Shape ``[S, n]``, sorted by expert.
            weight: Shape ``[E, n, m]``, or ``[E, m, n]`` if turned.
            offs: Where each expert's rows end, shape ``[E]``.
            experts: Who trains, and who passes gradients on.
            turned: Whether the weight is taken with its last two dimensions exchanged.
        """
        ctx.loop = bool(by_loop(func))
        ctx.experts, ctx.turned, ctx.x_shape = experts, turned, x.shape
        kept: Kept = (None, None, None)
        if ctx.needs_input_grad[2] and experts.train.numbers:
            kept = keep(x, offs, experts.train, loop=ctx.loop)
        needed = weight if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(*kept, needed, offs)
        return func(x, weight.transpose(-2, -1) if turned else weight, offs=offs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the rows and of the weight."""
        experts: Experts = ctx.experts
        *kept, weight, offs = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if weight is not None and experts.passing.numbers:
            grad_x = row_gradient(
                grad, weight, offs, experts.passing, turned=ctx.turned, loop=ctx.loop
            )
        if kept[0] is not None:
            found = weight_gradient(
                grad, kept, experts.train, experts.rest.zeros, turned=ctx.turned, loop=ctx.loop
            )
            grad_weight = experts.rest.deliver(found)
        return None, grad_x, grad_weight, None, None, None


# Rows of the input, which rows those are (None: all), and where each expert's end.
Kept = tuple[Tensor | None, Tensor | None, Tensor | None]


def keep(x: Tensor, offs: Tensor, train: Chosen, *, loop: bool) -> Kept:
    """Return what the gradient of a weight needs of the input, for the experts that train."""
    if loop or train.all:
        return x, None, offs
    order, ends = train.rows(offs, len(x))
    return x[order], order, ends


def weight_gradient(
    grad: Tensor,
    kept: Sequence[Tensor | None],
    train: Chosen,
    zeros: Callable[[torch.dtype], Tensor],
    *,
    turned: bool,
    loop: bool,
) -> Tensor:
    """Return the gradient of a weight, zero for experts that rest.

    Args:
        grad: Gradient of the product, shape ``[S, m]``.
        kept: What :func:`keep` returned.
        train: Who trains.
        zeros: Makes the tensor that it is written to, zero in what rests.
        turned: As in :meth:`GroupedProduct.forward`.
        loop: Whether to go through the experts one by one.
    """
    x, order, ends = kept
    assert x is not None
    assert ends is not None
    rows = grad if order is None else grad[order]
    left, right = (rows, x) if turned else (x, rows)
    if loop:
        result = zeros(grad.dtype)
        for expert, part in _parts(train, ends):
            result[expert].copy_(left[part].t() @ right[part])
        return result
    found = F.grouped_mm(left.t(), right, offs=ends)
    if train.all:
        return found
    return zeros(found.dtype).index_copy_(0, train.index(found.device), found)


def row_gradient(
    grad: Tensor, weight: Tensor, offs: Tensor, passing: Chosen, *, turned: bool, loop: bool
) -> Tensor:
    """Return the gradient of the rows, zero for experts that pass none on."""
    back = weight if turned else weight.transpose(-2, -1)
    shape = (len(grad), back.shape[-1])
    if loop:
        result = grad.new_zeros(shape)
        for expert, part in _parts(passing, offs):
            torch.mm(grad[part], back[expert], out=result[part])
        return result
    if passing.all:
        return F.grouped_mm(grad, back, offs=offs)
    order, ends = passing.rows(offs, len(grad))
    chosen = weight.index_select(0, passing.index(weight.device))
    found = F.grouped_mm(grad[order], chosen if turned else chosen.transpose(-2, -1), offs=ends)
    if len(order) == len(grad):  # what lies behind the last group is not written
        position = torch.arange(len(order), device=found.device)
        found = found.masked_fill((position >= ends[-1]).unsqueeze(1), 0.0)
    return found.new_zeros(shape).index_copy_(0, order, found)


def _parts(chosen: Chosen, offs: Tensor) -> Iterable[tuple[int, slice]]:
    """Return some experts and their rows; the host waits for the device here."""
    ends = [0, *offs.tolist()]
    return [(e, slice(ends[e], ends[e + 1])) for e in chosen.numbers]
