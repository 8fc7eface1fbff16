"""Batched experts in a compiled model: one graph for all decisions.

While a compiler traces the forward of a mixture, stand-ins take the place of its parameters. What
they leave in the graph is the plain product, and a backward that is an opaque operation: it looks
up which experts rest when it runs, as in :mod:`lightning_mat.gate.compiled`, at the same price:
the whole input of a product is saved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mat.gate.buffer import fresh_buffers
from lightning_mat.gate.compiled import Numbered
from lightning_mat.gate.grouped import (
    Chosen,
    Experts,
    by_loop,
    ends_of,
    keep,
    row_gradient,
    turns,
    weight_gradient,
)
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.stacked import Gathered, NotTracedError, StandIn


class StackPlace(Numbered):
    """A place of a parameter ``[E, ...]`` in compiled graphs.

    Attributes:
        experts: Who rests now; None where nobody does.
    """

    experts: Experts | None = None

    def train(self, weight: Tensor) -> Chosen:
        """Return the experts whose gradient is wanted."""
        return everyone(len(weight), weight.device) if self.experts is None else self.experts.train

    def zeros(self, weight: Tensor) -> Callable[[torch.dtype], Tensor]:
        """Return what makes a gradient of zeros."""
        if self.experts is not None:
            return self.experts.rest.zeros
        return lambda dtype: weight.new_zeros(weight.shape, dtype=dtype)

    def deliver(self, grad: Tensor) -> Tensor:
        """Return a gradient, noted as one in which what rests is zero."""
        return grad if self.experts is None else self.experts.rest.deliver(grad)

    def passing(self, count: int, device: torch.device) -> Chosen:
        """Return the experts, of so many, through which gradients travel."""
        return everyone(count, device) if self.experts is None else self.experts.passing


@functools.cache
def everyone(count: int, device: torch.device) -> Chosen:
    """Return all of so many experts."""
    return Chosen(range(count), count, device)


def show_products() -> None:
    """Have compilers show grouped products to tensor subclasses, as PyTorch itself does.

    They ask the functions that :mod:`torch.overrides` lists, and the list is of public names. Where
    this cannot be changed any more, :meth:`Mixture.trace` finds that products were not seen.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._dynamo.variables.torch import get_overridable_functions

        get_overridable_functions().add(torch._grouped_mm)


class TracedStack(StandIn):
    """Stands in for a parameter ``[E, ...]`` while a compiler traces the mixture's forward."""

    param: Tensor
    place: StackPlace
    turned: bool
    cuts: bool
    seen: dict[StackPlace, None]

    @staticmethod
    def make(
        param: Tensor,
        place: StackPlace,
        *,
        turned: bool = False,
        cuts: bool,
        seen: dict[StackPlace, None],
    ) -> TracedStack:
        """Return a stand-in.

        Args:
            param: The parameter.
            place: Its place.
            turned: Whether this is the parameter with its last two dimensions exchanged.
            cuts: Whether there are decisions in which some experts pass no gradients on.
            seen: Takes down the places whose products were handled.
        """
        made = (param.transpose(-2, -1) if turned else param).as_subclass(TracedStack)
        made.param, made.place, made.turned = param, place, turned
        made.cuts, made.seen = cuts, seen
        return made

    def plain(self) -> Tensor:
        """Return the parameter, turned as this is."""
        return self.param.transpose(-2, -1) if self.turned else self.param

    @staticmethod
    def handled(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Handle the products that mixtures make without going through the experts themselves."""
        first = args[0] if args else None
        if isinstance(first, TracedStack) and first.param.dim() == 3:
            if turns(func, args, kwargs):
                return TracedStack.make(
                    first.param,
                    first.place,
                    turned=not first.turned,
                    cuts=first.cuts,
                    seen=first.seen,
                )
            if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and not first.turned:
                return _gathered(first, args[1])
        ends = ends_of(func, args, kwargs)
        if ends is not None and isinstance(args[1], TracedStack):
            stack = args[1]
            stack.seen[stack.place] = None
            out = TracedProduct.apply(
                func, first, stack.param, ends, stack.place.number, stack.turned
            )
            return cast(Tensor, out)
        return None

    def refuse(self, func: Callable[..., Any]) -> None:
        """Give up tracing."""
        raise NotTracedError


def _gathered(stack: TracedStack, numbers: Tensor) -> Tensor | None:
    """Return one expert's matrix for each row, None where something else is taken."""
    if numbers.dim() != 1 or numbers.dtype == torch.bool:
        return None
    stack.seen[stack.place] = None
    rows = stack.param[numbers]
    if not stack.cuts:
        return rows
    live = torch.ops.lightning_mat.passing(numbers, stack.place.number, len(stack.param))
    return Gathered.make(rows, live)


class TracedProduct(torch.autograd.Function):
    """A grouped product that the compiler sees, and whose backward is looked up when it runs.

    As :class:`GroupedProduct`, for whatever experts rest by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        offs: Tensor,
        number: Tensor,
        turned: bool,
    ) -> Tensor:
        """Return ``func(x, weight, offs=offs)``."""
        ctx.save_for_backward(x, weight, offs, number)
        ctx.turned, ctx.loop = turned, bool(by_loop(func))
        return func(x, weight.transpose(-2, -1) if turned else weight, offs=offs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the rows and of the weight."""
        x, weight, offs, number = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:3])
        grads = torch.ops.lightning_mat.grouped_backward(
            grad, x, weight, offs, number, ctx.turned, ctx.loop, needs
        )
        found = (g if need else None for g, need in zip(grads, needs, strict=True))
        return None, *found, None, None, None


# A CUDA graph would record what trained when it was captured.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lightning_mat::grouped_backward", mutates_args=(), tags=_TAGS)
def grouped_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    number: Tensor,
    turned: bool,
    loop: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, empty where not needed."""
    place = cast(StackPlace, Numbered.at(number))
    passing, train = place.passing(len(weight), weight.device), place.train(weight)
    grad = grad.contiguous()
    if not needs[0]:
        grad_x = grad.new_empty(0)
    elif not passing.numbers:
        grad_x = x.new_zeros(x.shape)
    else:
        found = row_gradient(grad, weight, offs, passing, turned=turned, loop=loop)
        grad_x = found.contiguous()
    if not needs[1]:
        grad_weight = grad.new_empty(0)
    elif not train.numbers:
        grad_weight = weight.new_zeros(weight.shape)
    else:
        kept, zeros = keep(x, offs, train, loop=loop), place.zeros(weight)
        with fresh_buffers():
            found = weight_gradient(grad, kept, train, zeros, turned=turned, loop=loop)
            grad_weight = place.deliver(found.contiguous())
    return grad_x, grad_weight


@grouped_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    number: Tensor,
    turned: bool,
    loop: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs[0] else grad.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else grad.new_empty(0),
    )


@torch.library.custom_op("lightning_mat::passing", mutates_args=(), tags=_TAGS)
def passing(numbers: Tensor, number: Tensor, count: int) -> Tensor:
    """Return through which of some experts, of so many, gradients travel, bool."""
    place = cast(StackPlace, Numbered.at(number))
    return place.passing(count, numbers.device).among(numbers)


@passing.register_fake
def _(numbers: Tensor, number: Tensor, count: int) -> Tensor:
    return torch.empty_like(numbers, dtype=torch.bool)
