"""Compact: what of one of DDP's buckets trains, as one tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mat.optim.boxes import gather_boxes, runs_of, scatter_boxes
from lightning_mat.optim.pieces import is_dense
from lightning_mat.optim.slabs import boxes_of
from lightning_mat.units.regions import Block


class Compact:
    """What of a bucket trains, as a table of runs for the compiled copies.

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
        [1.0, 4.0, 6.0, 7.0]
    """

    def __init__(self, params: Sequence[Tensor], blocks: Sequence[tuple[Block, ...]]) -> None:
        table: list[tuple[int, ...]] = []
        self.numel = self.total = 0
        for param, own in zip(params, blocks, strict=True):
            for offset, stride, rows, run in _runs(param.detach(), own):
                table.append((0, self.total + offset, stride, rows, run, self.numel))
                self.numel += rows * run
            self.total += param.numel()
        self._table = torch.tensor(table, dtype=torch.int64).view(-1, 6)

    def gather(self, buffer: Tensor) -> Tensor:
        """Return what trains, ``[numel]``: the bucket itself where that is all of it."""
        if self.numel == self.total:
            return buffer
        flat = torch.empty(self.numel, dtype=buffer.dtype, device=buffer.device)
        gather_boxes([buffer], self._table, flat)
        return flat

    def scatter(self, flat: Tensor, buffer: Tensor) -> None:
        """Write back what :meth:`gather` took; what rests stays as it is."""
        if self.numel < self.total:
            scatter_boxes(flat.to(buffer.dtype), self._table, [buffer])
        elif flat.data_ptr() != buffer.data_ptr():
            buffer.copy_(flat)


def _runs(param: Tensor, blocks: tuple[Block, ...]) -> list[tuple[int, int, int, int]]:
    """Return ``(offset, stride, rows, run)`` of what trains of one gradient in its place."""
    if sum(block.numel for block in blocks) == param.numel():
        return [(0, param.numel(), 1, param.numel())] if param.numel() else []
    # DDP lays a gradient out like its parameter where that fills its memory, else contiguously.
    like = param if is_dense(param) else torch.empty(param.shape, device="meta")
    rects = [rect for block in blocks for rect in block.rects()]
    return [run for box in boxes_of(rects, param.shape) for run in runs_of(like, box)]
