"""Compact: what of one of DDP's buckets trains, as one tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_mat.gate.selection import Selection, place
from lightning_mat.optim.pieces import is_dense
from lightning_mat.units.regions import Block, Run, merge_runs
from lightning_mat.units.unit import matrix_shape


@dataclass(frozen=True)
class _Part:
    """Some rows and columns of one parameter's gradient in the bucket.

    Attributes:
        offset: Where the gradient begins in the bucket.
        shape: Of the gradient.
        stride: Of the gradient.
        rows: Which of dimension 0.
        columns: Which of dimension 1; all of a vector's only one.
        start: Where they begin in the compact tensor.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    rows: Selection
    columns: Selection
    start: int

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of what is taken."""
        return (len(self.rows), len(self.columns), *self.shape[2:])

    def of(self, buffer: Tensor) -> Tensor:
        """Return the gradient, at least of two dimensions, as a view of the bucket."""
        return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.offset)

    def slot(self, flat: Tensor) -> Tensor:
        """Return where it lies in the compact tensor."""
        return flat[self.start : self.start + prod(self.inner)].view(self.inner)


class Compact:
    """What of a bucket trains: runs of whole parameters, and rows and columns of others.

    A bucket is one flat tensor, in which the gradients lie one after the other, each laid out as
    its parameter is.

    Args:
        params: The bucket's parameters, in its order.
        blocks: What of each trains, over its matrix view.

    Attributes:
        numel: Elements that train.
        total: Elements of the bucket.

    Example:
        >>> from lightning_mat.units.regions import union
        >>> from lightning_mat.units.unit import Rect
        >>> first, second = torch.zeros(2, 3), torch.zeros(2)
        >>> some = Compact([first, second], [union([Rect(0, 2, 1, 2)]), union([Rect(0, 2, 0, 1)])])
        >>> some.gather(torch.arange(8.0)).tolist()
        [6.0, 7.0, 1.0, 4.0]
    """

    def __init__(self, params: Sequence[Tensor], blocks: Sequence[tuple[Block, ...]]) -> None:
        runs: list[Run] = []
        pieces: list[tuple[int, Tensor, Block]] = []
        offset = 0
        for param, own in zip(params, blocks, strict=True):
            if sum(block.numel for block in own) == param.numel():
                runs.append((offset, offset + param.numel()))
            else:
                pieces += [(offset, param, block) for block in own]
            offset += param.numel()
        self.total = offset
        self._runs = merge_runs(runs)
        start = sum(b - a for a, b in self._runs)
        self._parts: list[_Part] = []
        for begin, param, block in pieces:
            self._parts.append(_part(begin, param, block, start))
            start += block.numel
        self.numel = start

    def gather(self, buffer: Tensor) -> Tensor:
        """Return what trains, ``[numel]``: the bucket itself where that is all of it."""
        if self.numel == self.total:
            return buffer
        flat = torch.empty(self.numel, dtype=buffer.dtype, device=buffer.device)
        start = 0
        for a, b in self._runs:
            flat[start : start + b - a].copy_(buffer[a:b])
            start += b - a
        for part in self._parts:
            part.slot(flat).copy_(part.columns.take(part.rows.take(part.of(buffer), 0), 1))
        return flat

    def scatter(self, flat: Tensor, buffer: Tensor) -> None:
        """Write back what :meth:`gather` took; what rests stays as it is."""
        if self.numel == self.total:
            if flat.data_ptr() != buffer.data_ptr():
                buffer.copy_(flat)
            return
        start = 0
        for a, b in self._runs:
            buffer[a:b].copy_(flat[start : start + b - a])
            start += b - a
        for part in self._parts:
            values = part.slot(flat).to(buffer.dtype)
            place(values, part.of(buffer), part.rows, part.columns)


def _part(offset: int, param: Tensor, block: Block, start: int) -> _Part:
    """Return one block of a parameter; columns of its matrix view are counted in dimension 1."""
    rows, columns = matrix_shape(param.shape)
    inner = prod(param.shape[2:])
    width = columns // inner if inner else 0
    # As DDP lays it out: like the parameter where that fills its memory, else contiguous.
    stride = param.stride() if is_dense(param) else torch.empty(param.shape, device="meta").stride()
    shape = tuple(param.shape)
    if len(shape) < 2:
        shape, stride = (rows, 1), (*stride, 1) if shape else (1, 1)
    runs = tuple((a // inner, b // inner) for a, b in block.columns)
    return _Part(
        offset,
        shape,
        tuple(stride),
        Selection(block.rows, rows, param.device),
        Selection(runs, width, param.device),
        start,
    )
