"""Copies of boxes of many tensors to one flat tensor, and back, each in one call.

A table says what is copied: int64 ``[n, 6]`` on the CPU, one row ``(full, offset, stride, rows,
run, flat)`` for ``rows`` runs of ``run`` neighbouring elements, ``stride`` apart, from element
``offset`` on in the memory of ``fulls[full]``; they lie side by side in the flat tensor, from
element ``flat`` on. Boxes should not overlap: which of two is written last is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from lightning_mat import _extension
from lightning_mat.optim.slabs import Box


def gather_boxes(fulls: Sequence[Tensor], boxes: Tensor, flat: Tensor) -> None:
    """Copy boxes to a flat tensor: compiled where the library has kernels for the device.

    Args:
        fulls: Tensors of any strides, all of one dtype and device.
        boxes: The table, see above.
        flat: ``[m]``, contiguous, of the same dtype and device; modified in place.

    Raises:
        ValueError: If a dtype, device or row of the table does not fit.

    Example:
        >>> flat = torch.zeros(4)
        >>> column, row = (0, 1, 3, 2, 1, 0), (0, 3, 3, 1, 2, 2)
        >>> gather_boxes([torch.arange(6.0).view(2, 3)], torch.tensor([column, row]), flat)
        >>> flat.tolist()
        [1.0, 4.0, 3.0, 4.0]
    """
    if _has_kernels(flat):
        torch.ops.lightning_mat.gather_boxes(fulls, boxes, flat)
    else:
        gather_boxes_reference(fulls, boxes, flat)


def scatter_boxes(flat: Tensor, boxes: Tensor, fulls: Sequence[Tensor]) -> None:
    """Copy boxes back from a flat tensor: :func:`gather_boxes`, the other way round.

    Args:
        flat: See there; read only.
        boxes: The table.
        fulls: The tensors, modified in place.

    Raises:
        ValueError: If a dtype, device or row of the table does not fit.
    """
    if _has_kernels(flat):
        torch.ops.lightning_mat.scatter_boxes(flat, boxes, fulls)
    else:
        scatter_boxes_reference(flat, boxes, fulls)


def gather_boxes_reference(fulls: Sequence[Tensor], boxes: Tensor, flat: Tensor) -> None:
    """Copy as :func:`gather_boxes` does: eager, view by view."""
    inside, slots = _views(fulls, boxes, flat)
    if slots:
        torch._foreach_copy_(slots, inside)


def scatter_boxes_reference(flat: Tensor, boxes: Tensor, fulls: Sequence[Tensor]) -> None:
    """Copy as :func:`scatter_boxes` does: eager, view by view."""
    inside, slots = _views(fulls, boxes, flat)
    if slots:
        torch._foreach_copy_(inside, slots)


def runs_of(param: Tensor, box: Box) -> list[tuple[int, int, int, int]]:
    """Return one box of a parameter as rows of the table, in the order of its memory.

    Returns:
        ``(offset, stride, rows, run)`` each: one, unless its memory has more than two steps.

    Example:
        >>> runs_of(torch.zeros(4, 3, 2, 2), (slice(0, 4), slice(1, 2)))
        [(4, 12, 4, 4)]
    """
    view = param[box]
    first = int(view.storage_offset() - param.storage_offset())
    dims: list[tuple[int, int]] = []  # (stride, size), of what is no run with its neighbour
    steps = sorted(zip(view.stride(), view.shape, strict=True), reverse=True)
    for stride, size in steps:
        if size == 1:
            continue
        if dims and dims[-1][0] == stride * size:
            dims[-1] = (stride, size * dims[-1][1])
        else:
            dims.append((stride, size))
    run = dims.pop()[1] if dims and dims[-1][0] == 1 else 1
    stride, rows = dims.pop() if dims else (run, 1)
    others = product(*(range(0, step * size, step) for step, size in dims))
    return [(first + sum(offsets), stride, rows, run) for offsets in others]


def span_of(tensor: Tensor) -> int:
    """Return how many elements the memory of a tensor spans."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _has_kernels(flat: Tensor) -> bool:
    return flat.device.type in _extension.load().backends


def _views(
    fulls: Sequence[Tensor], boxes: Tensor, flat: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the boxes' views of their tensors and of the flat one, all ``[rows, run]``."""
    _check(fulls, boxes, flat)
    spans = [span_of(full) for full in fulls]
    insides, slots = [], []
    for k, (index, offset, stride, rows, run, start) in enumerate(boxes.tolist()):
        numbers = (index, offset, stride, rows, run, start)
        if min(numbers) < 0 or index >= len(fulls):
            raise ValueError(f"boxes[{k}] = {numbers} does not fit {len(fulls)} tensors")
        if rows * run == 0:
            continue
        if rows > 1 and stride < run:
            raise ValueError(f"boxes[{k}] has rows of {run} elements, {stride} apart: they overlap")
        if offset + (rows - 1) * stride + run > spans[index]:
            raise ValueError(
                f"boxes[{k}] = {numbers}: fulls[{index}] has {spans[index]} elements of memory"
            )
        if start + rows * run > len(flat):
            raise ValueError(f"boxes[{k}] = {numbers}: flat has {len(flat)} elements")
        full = fulls[index]
        first = full.storage_offset() + offset
        insides.append(full.as_strided((rows, run), (stride, 1), first))
        slots.append(flat[start : start + rows * run].view(rows, run))
    return insides, slots


def _check(fulls: Sequence[Tensor], boxes: Tensor, flat: Tensor) -> None:
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"flat must be contiguous and of one dimension, got shape {tuple(flat.shape)} and "
            f"strides {flat.stride()}"
        )
    table = boxes.dim() == 2 and boxes.shape[1] == 6 and boxes.dtype == torch.int64
    if not table or boxes.device.type != "cpu" or not boxes.is_contiguous():
        raise ValueError(
            "boxes must be a contiguous int64 tensor [boxes, 6] on the CPU with the columns (full, "
            f"offset, stride, rows, run, flat), got shape {tuple(boxes.shape)} of type "
            f"{boxes.dtype} on {boxes.device}"
        )
    for k, full in enumerate(fulls):
        if full.layout is not torch.strided:
            raise ValueError(f"fulls[{k}] has layout {full.layout}: pass strided tensors")
        if (full.dtype, full.device) != (flat.dtype, flat.device):
            raise ValueError(
                f"fulls[{k}] is {full.dtype} on {full.device}, flat {flat.dtype} on {flat.device}: "
                "put all on one device, in one type"
            )


def _fake_gather(fulls: Sequence[Tensor], boxes: Tensor, flat: Tensor) -> None:
    """Modify nothing that a shape could show."""


def _fake_scatter(flat: Tensor, boxes: Tensor, fulls: Sequence[Tensor]) -> None:
    """Modify nothing that a shape could show."""


if not _extension.load().error:
    torch.library.register_fake("lightning_mat::gather_boxes", _fake_gather)
    torch.library.register_fake("lightning_mat::scatter_boxes", _fake_scatter)
