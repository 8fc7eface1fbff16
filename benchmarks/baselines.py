"""The usual ways to the kernel's result, written as one would who cares for speed.

Both form all per-sample gradients of one parameter after another, multiply them by themselves in
batches of equal units, and solve all Grams in one batched call at the end: in float32, the type
that the Grams have, which is the faster of the solver's two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.workloads import Inputs
from lightning_mat.mntk.kernel import Layer
from lightning_mat.units.unit import Rect


class Run(NamedTuple):
    """Units from ``unit`` on with slabs of equal size side by side in a parameter."""

    unit: int
    count: int
    first: Rect
    down: bool  # slabs of rows; otherwise of columns


def runs(owned: Sequence[tuple[int, Rect]]) -> list[Run]:
    """Return the fewest runs of slabs, so that each is one batched product.

    Example:
        >>> [(r.unit, r.count) for r in runs([(4 + i, Rect(i, i + 1, 0, 9)) for i in range(3)])]
        [(4, 3)]
    """
    found: list[Run] = []
    for unit, r in owned:
        if found:
            last = found[-1]
            height, width = last.first.r1 - last.first.r0, last.first.c1 - last.first.c0
            below = _moved(last.first, last.count * height, 0)
            beside = _moved(last.first, 0, last.count * width)
            follows = unit == last.unit + last.count
            if follows and r == below and (last.down or last.count == 1):
                found[-1] = last._replace(count=last.count + 1, down=True)
                continue
            if follows and r == beside and (not last.down or last.count == 1):
                found[-1] = last._replace(count=last.count + 1, down=False)
                continue
        found.append(Run(unit, 1, r, True))
    return found


def add_slabs(grams: Tensor, gradients: Tensor, owned: Sequence[tuple[int, Rect]]) -> None:
    """Add the products of per-sample gradients, [S, rows, columns], to their owners' Grams."""
    for unit, count, r, down in runs(owned):
        height, width = r.r1 - r.r0, r.c1 - r.c0
        if down:
            part = gradients[:, r.r0 : r.r0 + count * height, r.c0 : r.c1]
            # A view where the slabs have full width.
            slabs = part.unflatten(1, (count, height)).flatten(2).transpose(0, 1)
        else:
            part = gradients[:, r.r0 : r.r1, r.c0 : r.c0 + count * width]
            slabs = part.unflatten(2, (count, width)).permute(2, 0, 1, 3).flatten(2)
        grams[unit : unit + count].baddbmm_(slabs, slabs.mT)


def layerwise(inputs: Inputs) -> Tensor:
    """Return eigenvalues, [L, S] ascending: ``einsum`` per layer, ``bmm`` per run of units."""
    grams = _zeros(inputs)
    for layer, a, b in zip(inputs.plan.layers, inputs.a, inputs.b, strict=True):
        if _are_columns(layer):
            # Slabs of columns are slabs of rows of the transposed gradient, and need no copy.
            owned = [(unit, Rect(r.c0, r.c1, r.r0, r.r1)) for unit, r in layer.owned]
            add_slabs(grams, torch.einsum("std,stp->sdp", a, b), owned)
        else:
            add_slabs(grams, _gradients(layer, a, b), layer.owned)
    return torch.linalg.eigvalsh(grams)


def by_vmap(inputs: Inputs, weights: Sequence[Tensor], chunk: int | None = None) -> Tensor:
    """Return eigenvalues, [L, S] ascending: ``vmap(grad)`` of each layer's own product.

    Args:
        inputs: An input set.
        weights: The layers' parameters, see :func:`draw_weights`.
        chunk: Samples at a time; None for all.
    """
    grams = _zeros(inputs)
    for layer, a, b, weight in zip(inputs.plan.layers, inputs.a, inputs.b, weights, strict=True):
        bias = layer.kind == "bias"
        per_sample = vmap(
            grad(_PRODUCTS[layer.kind]), in_dims=(None, None if bias else 0, 0), chunk_size=chunk
        )
        gradients = per_sample(weight, a, b)
        add_slabs(grams, gradients.reshape(len(b), layer.rows, layer.columns), layer.owned)
    return torch.linalg.eigvalsh(grams)


def draw_weights(inputs: Inputs) -> list[Tensor]:
    """Return random parameters in the shapes in which their layers use them."""
    shapes = {
        "linear": lambda layer: (layer.rows, layer.columns),
        "conv": lambda layer: (layer.rows, -1, *layer.geometry.kernel),
        "bias": lambda layer: (layer.rows,),
        "scale": lambda layer: (layer.rows,),
    }
    return [
        torch.randn(layer.rows, layer.columns, device=b.device).reshape(shapes[layer.kind](layer))
        for layer, b in zip(inputs.plan.layers, inputs.b, strict=True)
    ]


# Each layer's output times its gradient, for one sample: the derivative by the parameter is wanted.
_PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda w, a, b: (F.linear(a, w) * b).sum(),
    "conv": lambda w, a, b: (
        F.conv2d(a.unsqueeze(0), w, padding=w.shape[-1] // 2).squeeze(0) * b
    ).sum(),
    "bias": lambda w, a, b: (w * b).sum(),
    "scale": lambda w, a, b: (w * a * b).sum(),
}


def _gradients(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """Return all per-sample gradients of a parameter, [S, rows, columns]."""
    if layer.kind == "linear":
        return torch.einsum("stp,std->spd", b, a)
    if layer.kind == "conv":
        patches = F.unfold(
            a, layer.geometry.kernel, padding=layer.geometry.padding
        )  # [S, columns, positions]
        return torch.einsum("spt,sdt->spd", b.flatten(2), patches)
    if layer.kind == "scale":
        return (a * b).sum(1).unsqueeze(-1)
    if layer.kind == "bias":
        return b.sum(1).unsqueeze(-1)
    raise ValueError(f"no baseline for layers of kind {layer.kind!r}")


def _are_columns(layer: Layer) -> bool:
    rects = [r for _, r in layer.owned]
    return (
        layer.kind == "linear"
        and all(r.r0 == 0 and r.r1 == layer.rows for r in rects)
        and any(r.c1 - r.c0 < layer.columns for r in rects)
    )


def _zeros(inputs: Inputs) -> Tensor:
    samples = len(inputs.b[0])
    return torch.zeros(inputs.plan.units, samples, samples, device=inputs.b[0].device)


def _moved(r: Rect, down: int, right: int) -> Rect:
    return Rect(r.r0 + down, r.r1 + down, r.c0 + right, r.c1 + right)
