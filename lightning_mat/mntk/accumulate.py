r"""Add one parameter's per-sample gradients to the Grams of the units that own a part of it.

Two ways, chosen per parameter by counted multiply-adds for S samples, T tokens, R owned rows of
d columns and n units:

* direct: form G block by block and multiply it by itself, ``S·T·R·d + S²·R·d``;
* ghost: :math:`\Theta_{ss'} = \sum_{tt'} (a_{st}·a_{s't'}) (b_{st}·b_{s't'})`, never forming G,
  ``S²·T²·(d + R + n)``. It wins where T is small: T = 1, pooled features, late feature maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mat.mntk import ops
from lightning_mat.mntk.factors import Factor, Outer, Rows, TokenSum
from lightning_mat.units.regions import merge_runs
from lightning_mat.units.unit import Rect

Owned = Sequence[tuple[int, Rect]]

# A pass over S²T² numbers (product, sum) moves as many bytes as it does operations, and so costs
# about as much as this many multiply-adds of a matrix product.
_ELEMENTWISE = 12


def add_to_grams(
    grams: Tensor, factor: Factor, owned: Owned, *, workspace: int, backend: str = "auto"
) -> None:
    """Add a parameter's contribution to the Grams of its owners.

    Args:
        grams: Grams of all units, shape ``[L, S, S]``, modified in place.
        factor: The parameter's per-sample gradients, [S, rows, columns].
        owned: ``(unit, rectangle)`` pairs, disjoint.
        workspace: Bytes that the blocks of gradients may take at a time.
        backend: Backend of the Gram operation, see :mod:`lightning_mat.mntk.ops`.
    """
    if not owned:
        return
    rects = [rect for _, rect in owned]
    if _are_columns(rects, factor):
        # Slabs of columns are slabs of rows of the transposed gradient, which are contiguous.
        factor = factor.transposed()
        owned = [(unit, Rect(r.c0, r.c1, r.r0, r.r1)) for unit, r in owned]
        rects = [rect for _, rect in owned]
    if isinstance(factor, Rows):
        factor, rects = factor.compact(rects)
        owned = [(unit, rect) for (unit, _), rect in zip(owned, rects, strict=True)]
    if isinstance(factor, TokenSum) and _ghost_wins(factor, rects, grams, workspace):
        _ghost(grams, factor.token_form(), owned)
    else:
        _direct(grams, factor, owned, workspace, backend)


def _are_columns(rects: Sequence[Rect], factor: Factor) -> bool:
    return all(r.r0 == 0 and r.r1 == factor.rows for r in rects) and any(
        r.c1 - r.c0 < factor.columns for r in rects
    )


def _direct(grams: Tensor, factor: Factor, owned: Owned, workspace: int, backend: str) -> None:
    """Form blocks of rows that fit the workspace and multiply each by itself."""
    element = 8 if grams.dtype == torch.float64 else 4
    limit = max(1, workspace // (factor.samples * max(factor.columns, 1) * element))
    for start, stop in merge_runs((r.r0, r.r1) for _, r in owned):
        pieces = [(unit, r) for unit, r in owned if r.r0 < stop and r.r1 > start]
        count = -(-(stop - start) // limit)
        size = -(-(stop - start) // count) if count else 0
        for top in range(start, stop, max(size, 1)):
            bottom = min(top + size, stop)
            table = [
                (unit, max(r.r0, top) - top, min(r.r1, bottom) - top, r.c0, r.c1)
                for unit, r in pieces
                if r.r0 < bottom and r.r1 > top
            ]
            block = factor.block(top, bottom)
            ops.gram_accumulate(
                grams, block, torch.tensor(table, dtype=torch.int64), backend=backend
            )


def _ghost_wins(factor: TokenSum, rects: Sequence[Rect], grams: Tensor, workspace: int) -> bool:
    s, t, d = factor.samples, factor.tokens, factor.columns
    if any(r.c0 != 0 or r.c1 != d for r in rects):
        return False
    rows = sum(r.r1 - r.r0 for r in rects)
    pairs = (s * t) ** 2
    if (3 * pairs + s * t * d) * grams.element_size() > workspace:
        return False
    ghost = pairs * (d + rows + _ELEMENTWISE * (len(rects) + 1))
    return ghost < s * rows * d * (t + s)


def _ghost(grams: Tensor, factor: Outer, owned: Owned) -> None:
    """Multiply the Gram of the inputs, entry by entry, with that of the output gradients."""
    s, t = factor.samples, factor.tokens
    a = factor.a.reshape(s * t, -1).to(grams.dtype)
    b = factor.b.reshape(s * t, -1).to(grams.dtype)
    inputs = a @ a.T
    for unit, rect in owned:
        part = b[:, rect.r0 : rect.r1]
        product = inputs * part if part.shape[1] == 1 else inputs * (part @ part.T)
        if part.shape[1] == 1:
            product = product * part.T
        grams[unit] += product.view(s, t, s, t).sum((1, 3)) if t > 1 else product
