"""Partly: a tensor of which only some features have gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.selection import Selection

#: ``rule(func, args, kwargs)`` returns what a function makes of tensors some of which are Partly,
#: or None where it cannot keep values and part apart.
Rule = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

_RULES: dict[Callable[..., Any], Rule] = {}


def register_partly_rule(functions: Iterator[Callable[..., Any]], rule: Rule) -> None:
    """Say how functions act on a :class:`Partly`; others get the merged tensor."""
    _RULES.update(dict.fromkeys(functions, rule))


def named(names: str) -> Iterator[Callable[..., Any]]:
    """Yield functions of these names from wherever a model may call them."""
    for name in names.split():
        for home in (torch, F, Tensor, torch._C._nn):
            found = getattr(home, name, None)
            if callable(found):
                yield found


class Look(Protocol):
    """Looks at the first gradient that arrives where none should."""

    done: bool

    def at(self, grad: Tensor) -> None:
        """Look at a gradient that is to be dropped."""


class Partly(Tensor):
    """Values of which some features are differentiable, the part, and the others constant.

    A gated layer whose resting outputs count as constants returns one. It is an ordinary tensor,
    the two merged, whose gradient is taken apart again: whoever knows nothing of it, compiled
    extensions included, is right. But activation functions, dropout, products between such
    tensors, and changes of shape act on the values, which stay constants, and on the part, which
    autograd follows: what it saves and computes there has the part's size. Attention takes the
    part of the heads, and a gated layer that reads the same features takes theirs.

    Attributes:
        full: The values, without gradients.
        part: The same but for dimension ``axis``, of which it has ``len(selection)``.
        selection: Which features the part is.
        axis: Dimension of the features, counted from the last, negative.
        look: Looks at the first gradient of the others, or None.
        base: What this is a view of, or None.
        read: Whether something was computed with the part, or with that of a view.
        watched: Whether somebody sees the merged tensor's gradient, or its memory: from then on
            all that is computed with this or with a view of it passes through the merged tensor.
    """

    full: Tensor
    part: Tensor
    selection: Selection
    axis: int
    look: Look | None
    base: Partly | None
    read: bool
    watched: bool
    _merged: Tensor
    _version_made: int

    @staticmethod
    def make(
        full: Tensor,
        part: Tensor,
        selection: Selection,
        axis: int = -1,
        look: Look | None = None,
        base: Partly | None = None,
        merged: Tensor | None = None,
    ) -> Tensor:
        """Return constant values with a differentiable part.

        Args:
            full: The values, without gradient.
            part: Its selected features.
            selection: Which features these are.
            axis: Dimension of the features, negative.
            look: Looks at the first gradient of the other features.
            base: What this is a view of.
            merged: The two as an ordinary tensor: that view of the base's.
        """
        if not part.requires_grad or len(selection) == 0:
            return full
        if merged is None:
            merged = cast(Tensor, Merge.apply(part, full, selection, axis, look))
        made = merged.as_subclass(Partly)
        made.full, made.part, made.selection, made._merged = full, part, selection, merged
        made.axis, made.look, made.base = axis, look, base
        made.read = made.watched = False
        made._version_made = full._version
        return cast(Tensor, made)

    def taken(self) -> Tensor:
        """Return the part, to be computed with in the place of the tensor."""
        for one in self._lineage():
            one.read = True
        return self.part

    def merged(self) -> Tensor:
        """Return the two as an ordinary tensor, one and the same."""
        return self._merged

    def _lineage(self) -> Iterator[Partly]:
        """Yield this and what it is a view of."""
        one: Partly | None = self
        while one is not None:
            yield one
            one = one.base

    def reshaped(
        self,
        shape: Callable[[Tensor], Tensor],
        full: Tensor,
        part: Tensor,
        selection: Selection,
        axis: int,
    ) -> Tensor:
        """Return the same values in another shape.

        Args:
            shape: Gives a tensor of the values' shape the other one.
            full: The values in their new shape.
            part: The part in its new shape.
            selection: Which features it is then.
            axis: Their dimension then.
        """
        if full.untyped_storage().data_ptr() != self.full.untyped_storage().data_ptr():
            self.taken()
            return Partly.make(full, part, selection, axis, self.look)
        # What is a view of the values is one of the merged tensor, too: whoever changes either in
        # place changes both, and autograd knows it.
        merged = shape(self._merged)
        return Partly.make(full, part, selection, axis, self.look, self, merged)

    def mapped(self, function: Callable[[Tensor], Tensor], axis: int | None = None) -> Tensor:
        """Return what a function that acts on every feature alone makes of values and part.

        Args:
            function: The function.
            axis: Dimension of the features in its result; by default the same.
        """
        with torch.no_grad():
            values = function(self.full)
        if values is self.full:  # .to() and the like, where there is nothing to do
            return self
        part = function(self.taken())
        return Partly.make(values, part, self.selection, axis or self.axis, self.look)

    def changed(self, change: Callable[[Tensor], object], part: Tensor) -> None:
        """Change the values in place, where nobody has a view of them.

        Args:
            change: Changes the tensor that it is given.
            part: The part as it is then.
        """
        with torch.no_grad():
            change(self.full)
        Replace.apply(self._merged, part, self.selection, self.axis, self.look)
        self.part, self._version_made = part, self.full._version

    def watch(self, func: Callable[..., Any]) -> None:
        """Send all that is still to be computed through the merged tensor.

        Raises:
            RuntimeError: If the function looks at its gradient, and something was computed already.
        """
        if func in _WATCHES and self.read:
            raise RuntimeError(
                f"{func.__name__} on the output of a gated layer after it has been used would see "
                "a part of its gradient only: call it before the tensor is used, or use "
                'skip="weights"'
            )
        for one in self._lineage() if func in _MEMORY else (self,):
            one.watched = True

    @property
    def apart(self) -> bool:
        """Whether values and part still stand for the tensor."""
        unchanged = self._version_made == self.full._version
        return unchanged and not any(one.watched for one in self._lineage())

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
        if torch.compiler.is_compiling():  # a graph that is handed one knows nothing of parts
            return func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        if not {Partly, Tensor}.issuperset(types):  # a subclass that has its own word to say
            return func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS:
                return func(*tree_map(_values, args), **tree_map(_values, kwargs))
            if func == _REQUIRES_GRAD and live(args[0]):
                return True
            if func in _WATCHES or _opens(func):
                for x in tree_leaves(_watched(func, args, kwargs)):
                    if isinstance(x, Partly):
                        x.watch(func)
            rule = _RULES.get(func)
            if rule is not None and torch.is_grad_enabled():
                out = rule(func, args, kwargs)
                if out is not None:
                    return out
            return func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))


class Merge(torch.autograd.Function):
    """Values of which a part has a gradient, as one tensor."""

    @staticmethod
    def forward(
        ctx: Any, part: Tensor, full: Tensor, selection: Selection, axis: int, look: Look | None
    ) -> Tensor:
        """Return the values: another tensor on the same memory, which may be changed in place."""
        ctx.set_materialize_grads(False)
        ctx.selection, ctx.axis, ctx.look = selection, axis, look
        return full.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the part's gradient."""
        if grad is None:
            return None, None, None, None, None
        part = ctx.selection.take(grad, ctx.axis)
        if ctx.look is not None and not ctx.look.done:
            others = grad.clone()
            ctx.selection.put(torch.zeros_like(part), others, ctx.axis)
            ctx.look.at(others)
        return part, None, None, None, None


class Replace(torch.autograd.Function):
    """A merged tensor whose values were changed in place: its part is another one now."""

    @staticmethod
    def forward(
        ctx: Any, merged: Tensor, part: Tensor, selection: Selection, axis: int, look: Look | None
    ) -> Tensor:
        """Return the merged tensor itself, with another history."""
        ctx.mark_dirty(merged)
        ctx.set_materialize_grads(False)
        ctx.selection, ctx.axis, ctx.look = selection, axis, look
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the part's gradient, and none for what the tensor was before."""
        return None, *Merge.backward(ctx, grad)[:1], None, None, None


def live(x: object) -> TypeGuard[Partly]:
    """Return whether something is a Partly whose values and part still stand for it."""
    return isinstance(x, Partly) and x.apart


def ordinary(x: Any) -> Any:
    """Return a tensor without a part: a Partly merged, anything else as it is."""
    return x.merged() if isinstance(x, Partly) else x


def _values(x: object) -> object:
    return x.full if live(x) else ordinary(x)


def _watched(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return those of a function's arguments that it looks at, or changes."""
    if func is torch.autograd.grad:
        return args[1:2], kwargs.get("inputs")
    return args, kwargs


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

# What looks at the gradient of a tensor.
_WATCHES = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}

# What gives access to the node that its gradient passes, where a hook may be put.
_NODE = Tensor.grad_fn.__get__  # type: ignore[union-attr]

# What gives access to its memory without a count of what is changed there.
_MEMORY = {
    Tensor.data.__get__,  # type: ignore[attr-defined]
    *named("data_ptr numpy __array__ __dlpack__ untyped_storage storage"),
}


def _opens(func: Callable[..., Any]) -> bool:
    """Return whether a function changes a tensor, or lets somebody do what the part misses."""
    name = getattr(func, "__name__", "")
    changes = name == "__set__" or (name.endswith("_") and not name.endswith("__"))
    return changes or func in _MEMORY or func == _NODE


# What a tensor is asked without touching its values.
_READS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "itemsize",
                     "is_sparse", "is_quantized", "is_nested", "is_meta", "is_mps", "is_xla")
    ),
    *named("size dim numel stride is_contiguous is_floating_point is_complex element_size "
           "__len__ get_device"),
}  # fmt: skip
