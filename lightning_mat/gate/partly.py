"""Partly: a tensor of which only some features have gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from lightning_mat.gate.selection import Selection


class Partly(Tensor):
    """Values of shape ``[..., n]`` that are constant but for some features, the part.

    A gated layer whose resting outputs count as constants returns one. It is an ordinary tensor,
    the two merged, whose gradient is taken apart again: whoever knows nothing of it, compiled
    extensions included, is right. But activation functions, dropout and products between such
    tensors act on the values, which stay constants, and on the part, which autograd follows: what
    it saves and computes there has the part's size. A gated layer that reads the same features
    takes the part.

    Attributes:
        full: The values, without gradients.
        part: Shape ``[..., len(selection)]``.
        selection: Which features the part is.
        read: Whether the part has been used.
    """

    full: Tensor
    part: Tensor
    selection: Selection
    _merged: Tensor
    read: bool
    _apart: int

    @staticmethod
    def make(full: Tensor, part: Tensor, selection: Selection) -> Tensor:
        """Return constant values with a differentiable part.

        Args:
            full: Shape ``[..., n]``, without gradient.
            part: Shape ``[..., len(selection)]``, its selected features.
            selection: Which features these are.
        """
        if not part.requires_grad:
            return full
        merged = Merge.apply(part, full, selection)
        made = merged.as_subclass(Partly)
        made.full, made.part, made.selection, made._merged = full, part, selection, merged
        made._apart, made.read = full._version, False
        return cast(Tensor, made)

    def taken(self) -> Tensor:
        """Return the part, to be used in the place of the tensor."""
        self.read = True
        return self.part

    def merged(self) -> Tensor:
        """Return an ordinary tensor, one and the same; what reads it once, reads it always."""
        # Hooks that are set on it, and changes in place, would pass the part by.
        self._apart = -1
        return self._merged

    @property
    def apart(self) -> bool:
        """Whether values and part still stand for the tensor."""
        return self._apart == self.full._version

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Act on values and part where that is possible, on the merged tensor otherwise."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS:
                return func(*tree_map(_values, args), **tree_map(_values, kwargs))
            if func == _REQUIRES_GRAD:
                return True
            if func in _WATCHES and isinstance(args[0], Partly) and args[0].read:
                raise RuntimeError(
                    f"{func.__name__} on the output of a gated layer after it has been used would "
                    "see a part of its gradient only: call it before the tensor is used, or use "
                    'skip="weights"'
                )
            rule = _RULES.get(func)
            if rule is not None and torch.is_grad_enabled():
                out = rule(func, args, kwargs)
                if out is not None:
                    return out
            return func(*tree_map(_ordinary, args), **tree_map(_ordinary, kwargs))


class Merge(torch.autograd.Function):
    """Values of which a part has a gradient, as one tensor."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, full: Tensor, selection: Selection) -> Tensor:
        """Return the values: another tensor on the same memory, which may be changed in place."""
        ctx.selection = selection
        return full.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the part's gradient."""
        return ctx.selection.take(grad, -1), None, None


def _values(x: object) -> object:
    return x.full if isinstance(x, Partly) else x


def _ordinary(x: object) -> object:
    return x.merged() if isinstance(x, Partly) else x


def _live(x: object) -> bool:
    """Return whether values and part of a tensor still stand for it."""
    return isinstance(x, Partly) and x.apart


# ---- functions that act on every feature alone ---------------------------------------------------


def _unary(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Apply a function of one tensor that acts on every element alone, not in place."""
    x, *rest = args or [None]
    if not _live(x) or any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
        return None
    if kwargs.get("inplace", False) or any(value is True for value in rest):
        return None  # in place, however it was said
    with torch.no_grad():
        values = func(x.full, *rest, **kwargs)
    if values is x.full:  # .to() and the like, where there is nothing to do
        return cast(Partly, x)
    return Partly.make(values, func(x.taken(), *rest, **kwargs), x.selection)


def _dropout(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Drop the same elements of values and part, drawn as they always are."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, p, training = given["input"], given.get("p", 0.5), given.get("training", True)
    if not _live(x) or given.get("inplace", False):
        return None
    if not training or p == 0.0:
        return cast(Partly, x)
    with torch.no_grad():
        noise = func(torch.ones_like(x.full), p, True)
        values = x.full * noise
    return Partly.make(values, x.taken() * x.selection.take(noise, -1), x.selection)


def _binary(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Apply a function of two operands that acts on every element alone."""
    if len(args) != 2 or kwargs:
        return None
    known = [x for x in args if _live(x)]
    if not known or any(isinstance(x, Partly) and not _live(x) for x in args):
        return None
    selection, shape = known[0].selection, known[0].full.shape
    if any(x.selection.runs != selection.runs or x.full.shape != shape for x in known):
        return None
    parts = []
    for x in args:
        if isinstance(x, Partly):
            parts.append(x.part)
        elif isinstance(x, Tensor) and x.requires_grad:
            return None  # its gradient needs all features
        elif not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 1:
            parts.append(x)
        elif x.shape[-1] == shape[-1]:
            parts.append(selection.take(x, -1))
        else:
            return None
    for x in known:
        x.read = True
    with torch.no_grad():
        values = func(*(x.full if isinstance(x, Partly) else x for x in args))
    return Partly.make(values, func(*parts), selection)


def _chunk(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...] | None:
    """Cut along the features, as gated networks with both halves in one layer do."""
    names = ("input", "chunks", "dim")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, dim = given["input"], given.get("dim", 0)
    if not _live(x) or dim not in (-1, x.full.dim() - 1):
        return None
    pieces = []
    start = taken = 0
    for values in x.full.chunk(given["chunks"], -1):
        selection = x.selection.clip(start, start + values.shape[-1])
        part = x.taken().narrow(-1, taken, len(selection))
        pieces.append(Partly.make(values, part, selection))
        start, taken = start + values.shape[-1], taken + len(selection)
    return tuple(pieces)


def _functions(names: str) -> Iterator[Callable[..., Any]]:
    """Yield functions of these names from wherever a model may call them."""
    for name in names.split():
        for home in (torch, F, Tensor, torch._C._nn):
            found = getattr(home, name, None)
            if callable(found):
                yield found


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(
        _functions(
            "relu relu6 gelu silu mish hardswish hardsigmoid hardtanh elu selu celu "
            "leaky_relu sigmoid tanh softplus softsign logsigmoid square sqrt exp "
            "abs neg pow clamp clamp_min float half bfloat16 to clone contiguous __pow__ __neg__"
        ),
        _unary,
    ),
    **dict.fromkeys(
        _functions("mul add sub div true_divide maximum minimum"),
        _binary,
    ),
    **dict.fromkeys(
        (
            getattr(Tensor, f"__{side}{name}__")
            for name in ("mul", "add", "sub", "truediv")
            for side in ("", "r")
        ),
        _binary,
    ),
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
}

_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

_WATCHES = {Tensor.register_hook, Tensor.retain_grad}

# What a tensor is asked without touching its values.
_READS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "itemsize",
                     "is_sparse", "is_quantized", "is_nested", "is_meta", "is_mps", "is_xla")
    ),
    *_functions("size dim numel stride is_contiguous is_floating_point is_complex element_size "
                "__len__ get_device"),
}  # fmt: skip
