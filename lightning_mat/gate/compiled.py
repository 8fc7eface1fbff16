"""Gated layers in a compiled model: one graph for all decisions.

A compiler would bake what trains into its graph, and make a new one for every decision. Here the
graph holds the plain forward, and a backward that is an opaque operation: it looks up what trains
when it runs. The price is that the layer's whole input is saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from lightning_mat.gate.buffer import fresh_buffers
from lightning_mat.gate.once import once_differentiable

Needs = tuple[bool, bool, bool]


class Gradients(Protocol):
    """What computes the gradients of a layer ``(x, weight, bias) → y`` of which a part rests."""

    def __call__(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias, those that are needed."""


class Numbered:
    """What compiled graphs know by its number, which stays while what trains changes."""

    _known: ClassVar[weakref.WeakValueDictionary[int, Numbered]] = weakref.WeakValueDictionary()
    _count: ClassVar[int] = 0

    def __init__(self) -> None:
        """Take the next number."""
        # A tensor on the host: a number would be a constant of the graph, one for each layer.
        self.number = torch.tensor(Numbered._count, device="cpu")
        Numbered._known[Numbered._count] = self
        Numbered._count += 1

    @staticmethod
    def at(number: Tensor) -> Numbered:
        """Return what has a number.

        Raises:
            RuntimeError: If it is gone.
        """
        found = Numbered._known.get(int(number))
        if found is None:
            raise RuntimeError(
                "the gate or the model of this compiled model was deleted between its forward and "
                "its backward pass: keep the Gate and the model until the backward pass is done"
            )
        return found


class Place(Numbered):
    """A layer's place in compiled graphs.

    Args:
        plain: ``(x, weight, bias) -> y``, the layer's forward.

    Attributes:
        ran: Whether the layer has run with gradients, compiled or not, since the last decision.
    """

    def __init__(self, plain: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        """Take the next number."""
        super().__init__()
        self.plain = plain
        self._make: Callable[[], Gradients | None] = lambda: None
        self._gradients: Gradients | None = None
        self.ran = False

    def let(self, make: Callable[[], Gradients | None]) -> None:
        """Set what makes the gradients from now on; it is called when a compiled model asks."""
        self._make, self._gradients = make, None

    @property
    def gradients(self) -> Gradients:
        """What computes the gradients now."""
        if self._gradients is None:
            self._gradients = self._make() or self._in_full
        return self._gradients

    def _in_full(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the plain layer's gradients."""
        given = (x, weight, bias)
        leaves = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(given, needs, strict=True)
        ]
        with torch.enable_grad():
            out = self.plain(cast(Tensor, leaves[0]), cast(Tensor, leaves[1]), leaves[2])
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad))
        grads = [
            next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves
        ]
        return grads[0], grads[1], grads[2]


class StaticLayer(torch.autograd.Function):
    """A layer whose forward the compiler sees, and whose backward is looked up when it runs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plain: Callable[..., Tensor],
        module: object,
        number: Tensor,
    ) -> Tensor:
        """Return the plain layer's output."""
        ctx.save_for_backward(x, weight, bias, number)
        return plain(module, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        x, weight, bias, number = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        # Of the parameter: what is saved here may be a copy in a layout of the compiler's.
        strides = weight.stride()
        grads = torch.ops.lightning_mat.gated_backward(
            grad, x, weight, bias, number, needs, strides
        )
        found = (g if need else None for g, need in zip(grads, needs, strict=True))
        return *found, None, None, None


# A CUDA graph would record what trained when it was captured. Inductor lays convolutions out
# channels last: without the second tag it would copy everything to the layout of the eager model.
@torch.library.custom_op(
    "lightning_mat::gated_backward",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.flexible_layout),
)
def gated_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    number: Tensor,
    needs: list[bool],
    strides: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (laid out in strides) and bias, empty where not needed."""
    wanted = (needs[0], needs[1], needs[2])
    place = cast(Place, Numbered.at(number))
    place.ran = True
    with fresh_buffers():
        found = place.gradients(grad, x, weight, bias, wanted)
    out = []
    for gradient, like in zip(found, _outputs(grad, x, weight, bias, needs, strides), strict=True):
        if gradient is None:
            gradient = like.zero_()
        elif gradient.stride() != like.stride():
            gradient = like.copy_(gradient)
        out.append(gradient)
    return out[0], out[1], out[2]


@gated_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    number: Tensor,
    needs: list[bool],
    strides: list[int],
) -> tuple[Tensor, ...]:
    return _outputs(grad, x, weight, bias, needs, strides)


def _outputs(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    strides: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors laid out as the gradients are, not filled; empty where none is needed."""
    return (
        torch.empty_like(x) if needs[0] else grad.new_empty(0),
        weight.new_empty_strided(weight.shape, strides) if needs[1] else grad.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else grad.new_empty(0),
    )
