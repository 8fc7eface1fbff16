r"""Layout: which rows of a layer's tensors belong to which sample.

A layer sees rows (tokens, images) of many samples at once, in an order that depends on the model:
samples first, time first, samples and frames merged, or routed tokens in any order. Shapes alone
cannot tell (T may equal S), so the order is measured. Backpropagating :math:`\sum_s w_s z_s` in
place of :math:`\sum_s z_s` multiplies a row's gradient by the weight of the one sample it belongs
to; a row whose gradient is multiplied by anything else depends on several samples, and has no
per-sample gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_PROJECTIONS = 4

NOTHING, BROKEN = -1, -2
"""In the place of a row's sample: its gradient is zero, or not finite."""

# Rows whose gradient is smaller than this share of the largest row's are not judged.
_NOISE = 1e-4


class CrossSampleError(ValueError):
    """A layer's rows depend on several samples of the batch."""


@dataclass(frozen=True)
class Layout:
    """Samples lie along one dimension of the rows, each with ``size / S`` neighbouring rows there.

    Args:
        dim: The dimension of the rows that holds the samples.
        major: Whether the rows of one sample are neighbours along ``dim`` (sample-major), or those
            of one position are (sample-minor).
    """

    dim: int
    major: bool = True

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """Return whether rows of this shape can be laid out so."""
        return self.dim < len(shape) and shape[self.dim] % samples == 0

    def ids(self, shape: Sequence[int], samples: int) -> Tensor:
        """Return the sample of every row, int64, shape ``shape``."""
        size = shape[self.dim]
        each = size // samples
        along = torch.arange(size)
        along = along // each if self.major else along % samples
        view = [1] * len(shape)
        view[self.dim] = size
        return along.view(view).expand(*shape)

    def to_samples(self, rows: Tensor, row_dims: int, samples: int) -> Tensor:
        """Return the rows with samples first: [*rows, *item] → [S, T, *item]."""
        item = rows.shape[row_dims:]
        each = rows.shape[self.dim] // samples
        split = (samples, each) if self.major else (each, samples)
        rows = rows.unflatten(self.dim, split)
        rows = rows.movedim(self.dim + (0 if self.major else 1), 0)
        return rows.reshape(samples, -1, *item)


@dataclass(frozen=True)
class Ragged:
    """Rows in no regular order, with a number per sample that differs (routed tokens)."""

    ids: Tensor
    """Sample of each row, int64, shape ``[rows]``, or NOTHING, or BROKEN."""

    def to_samples(self, rows: Tensor, row_dims: int, samples: int) -> Tensor:
        """Return the rows by sample, padded with zeros: [*rows, *item] → [S, longest, *item]."""
        item = rows.shape[row_dims:]
        rows = rows.reshape(-1, *item)
        # whose row holds NaN cannot be told: any sample's NaN makes the unit's spectrum NaN
        ids = self.ids.masked_fill(self.ids == BROKEN, 0)
        known = (ids != NOTHING).nonzero().squeeze(-1)
        order = known[ids[known].argsort(stable=True)]
        owner = ids[order]
        counts = torch.bincount(owner, minlength=samples)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=owner.device) - first[owner]
        longest = int(counts.max()) if len(order) else 1
        out = rows.new_zeros(samples, longest, *item)
        out[owner, place] = rows[order]
        return out


def sketch(grad: Tensor, row_dims: int) -> Tensor:
    """Return a few random projections of every row, which are enough to recognise its weight.

    Args:
        grad: Gradient, shape ``[*rows, *item]``.
        row_dims: How many leading dimensions index rows.

    Returns:
        Shape ``[*rows, k]`` with k ≤ 4, float64.
    """
    rows = grad.detach().reshape(*grad.shape[:row_dims], prod(grad.shape[row_dims:]))
    width = rows.shape[-1]
    if width <= _PROJECTIONS:
        return rows.double()
    generator = torch.Generator().manual_seed(width)
    directions = torch.randn(width, _PROJECTIONS, generator=generator)
    return (rows @ directions.to(rows)).double()


def row_ids(plain: Tensor, weighted: Tensor, row_dims: int, samples: int) -> Tensor:
    """Return the sample of each row from its gradients under weights 1 and under ``s + 1``.

    Args:
        plain: Gradient of Σ_s z_s, or its :func:`sketch`, shape ``[*rows, *item]``.
        weighted: The same of Σ_s (s + 1) z_s.
        row_dims: How many leading dimensions index rows.
        samples: S.

    Returns:
        int64, shape ``[*rows]``; NOTHING (-1) for rows whose gradient is zero, BROKEN (-2) for
        rows whose gradient is NaN or Inf.

    Raises:
        CrossSampleError: If a row's gradient is multiplied by anything but one sample's weight.
    """
    shape = plain.shape[:row_dims]
    if plain.numel() == 0:
        return torch.full(shape, -1, dtype=torch.int64, device=plain.device)
    first = plain.detach().reshape(prod(shape), -1).double()
    second = weighted.detach().reshape(prod(shape), -1).double()
    finite = first.isfinite().all(1) & second.isfinite().all(1)
    first, second = first * finite.unsqueeze(1), second * finite.unsqueeze(1)
    scale = first.abs().amax(1, keepdim=True)
    known = scale.squeeze(1) > 0
    unit = first / torch.where(scale > 0, scale, 1.0)
    twice = second / torch.where(scale > 0, scale, 1.0)
    ids = ((unit * twice).sum(1) / unit.square().sum(1).clamp_min(0.5)).round()
    residual = (twice - ids.unsqueeze(1) * unit).norm(dim=1)
    off = residual > 1e-2 * ids.abs().clamp_min(1) * unit.norm(dim=1)
    clean = known & ~off & (ids >= 1) & (ids <= samples)
    # rows far below the largest hold rounding noise, whose ratio means nothing
    loud = second.abs().amax(1) > _NOISE * second.abs().max().clamp_min(first.abs().max())
    if (loud & ~clean).any():
        raise CrossSampleError(
            f"{int((loud & ~clean).sum())} of {len(first)} rows have gradients from several samples"
        )
    found = torch.where(clean, ids - 1, torch.full_like(ids, NOTHING))
    return torch.where(finite, found, torch.full_like(ids, BROKEN)).long().view(shape)


def find_layout(ids: Tensor, samples: int) -> Layout | None:
    """Return the regular layout that agrees with the known rows, or None if none does.

    Args:
        ids: Sample of each row, shape ``[*rows]``, negative where unknown.
        samples: S.

    Example:
        >>> find_layout(torch.tensor([[0, 1], [0, 1], [0, 1]]), 2)
        Layout(dim=1, major=True)
    """
    shape = tuple(ids.shape)
    exact = [Layout(k) for k, size in enumerate(shape) if size == samples]
    multiple = [k for k, size in enumerate(shape) if size > samples and size % samples == 0]
    merged = [Layout(k, major) for k in multiple for major in (True, False)]
    for layout in exact + merged:
        expected = layout.ids(shape, samples).to(ids.device)
        if ((ids == expected) | (ids < 0)).all():
            return layout
    return None
