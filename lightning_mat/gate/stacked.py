"""Stand-ins for parameters ``[E, ...]`` of mixtures, while their forward runs.

They know which experts rest; the module's own code runs with them, whatever it does in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mat.gate.grouped import Experts, GroupedProduct, ends_of, turns
from lightning_mat.gate.once import once_differentiable


class NotTracedError(Exception):
    """A mixture does with a parameter what no graph has for all decisions."""


class StandIn(Tensor):
    """Stands in for a tensor; what it has no answer for sees the tensor itself."""

    def plain(self) -> Tensor:
        """Return the tensor."""
        raise NotImplementedError

    @staticmethod
    def handled(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return what a function makes of stand-ins, None where it has no special case."""
        raise NotImplementedError

    def refuse(self, func: Callable[..., Any]) -> None:
        """Raise where another function may not make a tensor of this one."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, or ask the tensor itself."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            known = cls.handled(func, args, kwargs)
            if known is not None:
                return known
            out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            if any(isinstance(x, Tensor) for x in tree_leaves(out)):
                for x in tree_leaves((args, kwargs)):
                    if isinstance(x, StandIn):
                        x.refuse(func)
            return out


def _plain(x: object) -> object:
    return x.plain() if isinstance(x, StandIn) else x


class Stacked(StandIn):
    """Stands in for a parameter ``[E, ...]`` of which some experts rest.

    Experts that are taken out one by one are slices of the parameter, those at rest constants.
    Grouped products skip the experts at rest. Everything else sees the parameter itself.
    """

    param: Tensor
    experts: Experts
    turned: bool
    slices: tuple[Tensor, ...] | None

    @staticmethod
    def make(param: Tensor, experts: Experts, *, turned: bool = False) -> Stacked:
        """Return a stand-in; ``turned`` has the last two dimensions exchanged."""
        # In the graph, as the parameter itself: an operation that does not hear of subclasses, such
        # as a kernel of one's own, gives its gradient in full, and the parameter's hook clears it.
        made = (param.transpose(-2, -1) if turned else param).as_subclass(Stacked)
        made.param, made.experts, made.turned = param, experts, turned
        made.slices = None
        return made

    def plain(self) -> Tensor:
        """Return the parameter, turned as this is."""
        return self.param.transpose(-2, -1) if self.turned else self.param

    def expert(self, number: int) -> Tensor:
        """Return one expert's slice, a constant if it rests."""
        number %= len(self.param)
        position = self.experts.position(number)
        if position is not None:
            if self.slices is None:
                self.slices = cast("tuple[Tensor, ...]", Slices.apply(self.param, self.experts))
            return self.slices[position]
        fixed = self.param.detach()[number]
        return fixed if self.experts.passes(number) else fixed.as_subclass(Constant)

    def gathered(self, numbers: Tensor) -> Tensor | None:
        """Return one expert's matrix for each row, None where no gradient has to be cut."""
        if self.param.dim() != 3 or self.experts.passing.all or numbers.dtype == torch.bool:
            return None
        return Gathered.make(self.param[numbers], self.experts.passing.among(numbers))

    @staticmethod
    def handled(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Handle what mixtures do with their parameters."""
        first = args[0] if args else None
        if isinstance(first, Stacked):
            if func == Tensor.__getitem__ and not first.turned:
                number = _number(args[1])
                if number is not None:
                    return first.expert(number)
                return first.gathered(args[1]) if isinstance(args[1], Tensor) else None
            if first.param.dim() == 3 and turns(func, args, kwargs):
                return Stacked.make(first.param, first.experts, turned=not first.turned)
        ends = ends_of(func, args, kwargs)
        if ends is not None and isinstance(args[1], Stacked):
            stack = args[1]
            out = GroupedProduct.apply(func, first, stack.param, ends, stack.experts, stack.turned)
            return cast(Tensor, out)
        return None

    def refuse(self, func: Callable[..., Any]) -> None:
        """Raise where gradients would travel through experts at rest."""
        # Vectors, such as biases, pass gradients on to nothing but themselves.
        if self.param.dim() > 2 and not self.experts.passing.all:
            _refuse(self.param, func)


_PRODUCTS = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Gathered(StandIn):
    """A matrix for each row, that of its expert, some of which rest.

    Products with it are computed in full, and cut behind: right, but nothing is saved.
    """

    rows: Tensor
    live: Tensor

    @staticmethod
    def make(rows: Tensor, live: Tensor) -> Gathered:
        """Return a stand-in for ``rows``, of which those that are ``live`` pass gradients on."""
        # Still in the graph: what knows nothing of subclasses gets gradients in full, none is lost.
        made = rows.as_subclass(Gathered)
        made.rows, made.live = rows, live
        return made

    def plain(self) -> Tensor:
        """Return the matrices."""
        return self.rows

    @staticmethod
    def handled(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Make the products of experts at rest constants."""
        if func not in _PRODUCTS:
            return None
        live = next(x.live for x in tree_leaves((args, kwargs)) if isinstance(x, Gathered))
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if out.dim() != 3 or len(out) != len(live):
            return None
        return torch.where(live.view(-1, 1, 1), out, out.detach())

    def refuse(self, func: Callable[..., Any]) -> None:
        """Raise where gradients would travel through experts at rest."""
        _refuse(self.rows, func)


class Constant(Tensor):
    """An expert at rest whose output is a constant: what is computed with it has no gradient."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute without gradients; a view of it is one, too."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            out = func(*tree_map(_value, args), **tree_map(_value, kwargs or {}))
            if isinstance(out, Tensor) and all(isinstance(x, Constant) for x in tensors):
                return out.as_subclass(Constant)
            return out


class Slices(torch.autograd.Function):
    """The experts that train, each as a tensor, whose gradients are written in one piece."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, experts: Experts) -> Any:
        """Return ``param[e]`` for each of them."""
        ctx.set_materialize_grads(False)
        ctx.experts = experts
        shown = param.detach()
        return tuple(shown[e] for e in experts.train.numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of all experts: zero for those at rest."""
        experts: Experts = ctx.experts
        if all(grad is None for grad in grads):  # what came after passed none on
            return None, None
        result = experts.rest.zeros(next(g.dtype for g in grads if g is not None))
        for number, grad in zip(experts.train.numbers, grads, strict=True):
            if grad is None:  # no token was routed to it
                result[number].zero_()
            else:
                result[number].copy_(grad)
        return experts.rest.deliver(result), None


def _number(index: object) -> int | None:
    """Return an index that takes one expert as a number, None for any other index."""
    if isinstance(index, Tensor):
        # PyTorch reads it from the device in the same way.
        return int(index) if index.dim() == 0 and index.dtype != torch.bool else None
    return index if isinstance(index, int) and not isinstance(index, bool) else None


def _value(x: object) -> object:
    return x.as_subclass(Tensor) if isinstance(x, Constant) else x


def _refuse(param: Tensor, func: Callable[..., Any]) -> None:
    """Raise where gradients would travel through experts at rest."""
    if torch.compiler.is_compiling():
        raise NotTracedError
    raise RuntimeError(
        f'skip="units" cannot cut the gradients through experts at rest in '
        f"{getattr(func, '__name__', func)!r} of a parameter {list(param.shape)}: "
        'use skip="weights", or take experts out one by one or in grouped products (in Hugging '
        'Face set_experts_implementation("eager") or "grouped_mm")'
    )
