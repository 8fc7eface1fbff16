"""What changes of shape make of a tensor with a differentiable part: heads cut and joined again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mat.gate.partly import live, named, register_partly_rule
from lightning_mat.gate.selection import Selection
from lightning_mat.units.regions import merge_runs


def regrouped(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Return which consecutive dimensions of a shape become which of another of as many elements.

    Example:
        >>> regrouped((2, 5, 12), (2, 5, 3, 4))
        [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 2)), (range(2, 3), range(2, 4))]
    """
    groups = []
    i = j = 0
    while i < len(old) and j < len(new):
        a, b = i + 1, j + 1
        size, other = old[i], new[j]
        while size != other:
            if size < other:
                size, a = size * old[a], a + 1
            else:
                other, b = other * new[b], b + 1
        groups.append((range(i, a), range(j, b)))
        i, j = a, b
    return groups


def _reshape(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Cut or join dimensions, where features stay whole heads, or become neurons of heads."""
    x = args[0] if args else None
    if not live(x) or x.full.numel() == 0:
        return None

    def shape(tensor: Tensor) -> Tensor:
        return cast(Tensor, func(tensor, *args[1:], **kwargs))

    with torch.no_grad():
        full = shape(x.full)
    if full.dtype != x.full.dtype:  # view(dtype)
        return None
    found = _features(x.selection, x.full.shape, x.full.dim() + x.axis, full.shape)
    if found is None:
        return None
    selection, axis = found
    sizes = list(full.shape)
    sizes[axis] = len(selection)
    return x.reshaped(shape, full, x.part.reshape(sizes), selection, axis - len(sizes))


def _features(
    selection: Selection, old: Sequence[int], axis: int, new: Sequence[int]
) -> tuple[Selection, int] | None:
    """Return which features are selected in another shape, and their dimension there."""
    before, after = next(
        ((b, a) for b, a in regrouped(old, new) if axis in b), (range(0), range(0))
    )
    olds, news = [old[i] for i in before], [new[i] for i in after]
    if selection.size == 1:
        return None
    if len([size for size in olds if size != 1]) == 1:
        # One dimension cut into several: the first of them are the features, if runs are whole.
        place = next(i for i, size in enumerate(news) if size != 1)
        unit = prod(news[place + 1 :])
        if any(edge % unit for run in selection.runs for edge in run):
            return None
        runs = [(a // unit, b // unit) for a, b in selection.runs]
        return selection.like(runs, news[place]), after[place]
    if len([size for size in news if size != 1]) == 1:
        # Several joined into one: features must be the outermost.
        if prod(olds[: before.index(axis)]) != 1:
            return None
        unit = prod(olds[before.index(axis) + 1 :])
        place = next(i for i, size in enumerate(news) if size != 1)
        runs = list(merge_runs((a * unit, b * unit) for a, b in selection.runs))
        return selection.like(runs, news[place]), after[place]
    return None


def _permute(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Put dimensions into another order."""
    x = args[0] if args else None
    if not live(x):
        return None

    def shape(tensor: Tensor) -> Tensor:
        return cast(Tensor, func(tensor, *args[1:], **kwargs))

    # The dimension of the features is told by a mark.
    marked = torch.empty([1] * x.full.dim(), device="meta")
    sizes = [1] * x.full.dim()
    sizes[x.axis] = 2
    axis = list(shape(marked.expand(sizes)).shape).index(2) - x.full.dim()
    with torch.no_grad():
        full = shape(x.full)
    return x.reshaped(shape, full, shape(x.part), x.selection, axis)


def _chunk(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...] | None:
    """Cut along the features, as gated networks with both halves in one layer do."""
    names = ("input", "chunks", "dim")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, dim = given["input"], given.get("dim", 0)
    if not live(x) or dim not in (x.axis, x.full.dim() + x.axis):
        return None
    pieces = []
    start = taken = 0
    for values in x.full.chunk(given["chunks"], dim):
        size = values.shape[dim]
        selection = x.selection.clip(start, start + size)
        part = x.part.narrow(dim, taken, len(selection))

        def shape(tensor: Tensor, start: int = start, size: int = size) -> Tensor:
            return tensor.narrow(dim, start, size)

        pieces.append(x.reshaped(shape, values, part, selection, x.axis))
        start, taken = start + size, taken + len(selection)
    return tuple(pieces)


register_partly_rule(named("view reshape flatten unflatten"), _reshape)
register_partly_rule(named("transpose permute swapaxes movedim"), _permute)
register_partly_rule(named("chunk"), _chunk)
