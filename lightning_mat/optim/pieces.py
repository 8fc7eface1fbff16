"""Piece: some elements of one parameter, handed to the optimizer as a tensor of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim.slabs import Box

# Below this many elements per box, the calls that a box costs (about 20 µs in AdamW's loop over
# tensors) exceed the copies of its parameters and gradients (about 1 ns per element together):
# measured on a CPU.
PACK_BELOW = 16_384


class Piece(ABC):
    """Some elements of a parameter, and the optimizer state of these elements."""

    def __init__(self, shape: torch.Size) -> None:
        """Start without state."""
        self.shape = shape
        self.state: dict[str, Any] = {}

    @abstractmethod
    def take(self, full: Tensor, out: Tensor | None = None) -> Tensor:
        """Return these elements of a tensor that is shaped like the parameter.

        Args:
            full: The tensor.
            out: Memory that a copy may use.
        """

    @abstractmethod
    def put(self, full: Tensor, part: Tensor) -> None:
        """Write ``part`` to these elements of ``full``, unless it is a view of them already."""

    def with_gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        """Return these elements of a parameter as a tensor with a gradient."""
        tensor = self.take(param)
        tensor.grad = self.take(grad)
        if tensor.grad.stride() != tensor.stride():  # fused kernels do not look
            tensor.grad = torch.empty_like(tensor).copy_(tensor.grad)
        return tensor


class View(Piece):
    """One box, in place: its tensors share the parameter's memory."""

    def __init__(self, box: Box, param: Tensor) -> None:
        """Remember the box."""
        super().__init__(param[box].shape)
        self.box = box

    def take(self, full: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the view."""
        return full[self.box]

    def put(self, full: Tensor, part: Tensor) -> None:
        """Copy ``part``, unless it is the view."""
        view = full[self.box]
        if view.data_ptr() != part.data_ptr():
            view.copy_(part)


class Packed(Piece):
    """Elements that are copied side by side to be stepped, and back."""

    _last: Tensor | None = None

    def with_gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        """Return a copy of these elements as a tensor with a gradient."""
        last = self._last
        if last is None or last.dtype != param.dtype or last.device != param.device:
            last = self._room(param)
            last.grad = self._room(param)
        tensor = self.take(param, out=last)
        tensor.grad = self.take(grad, out=last.grad)
        # Memory fresh from the system costs more than the step; on a GPU torch keeps it anyway.
        self._last = tensor if param.device.type == "cpu" else None
        return tensor

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=like.dtype, device=like.device)


class PackedRows(Packed):
    """Many short runs of rows."""

    def __init__(self, boxes: Sequence[Box], param: Tensor) -> None:
        """Number the rows."""
        rows = torch.cat([torch.arange(box[0].start, box[0].stop) for box in boxes])
        super().__init__(torch.Size((len(rows), *param.shape[1:])))
        self.rows = rows.to(param.device)

    def take(self, full: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a contiguous copy of the rows."""
        out = self._room(full) if out is None else out
        return torch.index_select(full, 0, self.rows, out=out)

    def put(self, full: Tensor, part: Tensor) -> None:
        """Copy the rows back."""
        full.index_copy_(0, self.rows, part)


class PackedBoxes(Packed):
    """Boxes that are short or not dense in memory."""

    def __init__(self, boxes: Sequence[Box], param: Tensor) -> None:
        """Remember the boxes and their sizes."""
        self.boxes = tuple(boxes)
        self.sizes = [param[box].numel() for box in boxes]
        super().__init__(torch.Size((sum(self.sizes),)))

    def take(self, full: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a flat copy of the boxes."""
        out = self._room(full) if out is None else out
        for box, flat in zip(self.boxes, out.split(self.sizes), strict=True):
            view = full[box]
            flat.view(view.shape).copy_(view)
        return out

    def put(self, full: Tensor, part: Tensor) -> None:
        """Copy the boxes back."""
        for box, flat in zip(self.boxes, part.split(self.sizes), strict=True):
            view = full[box]
            view.copy_(flat.view(view.shape))


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor without overlaps fills a stretch of memory without gaps."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()


def pieces_of(
    boxes: Sequence[Box], tensors: Sequence[Tensor], *, list_kernels: bool
) -> list[Piece]:
    """Return the pieces that cover some boxes of a parameter at the least cost.

    Args:
        boxes: Disjoint boxes.
        tensors: The parameter and its elementwise state.
        list_kernels: Whether one kernel steps many tensors (foreach on a GPU, fused anywhere).
            Fused kernels walk memory as if all tensors were dense and laid out alike, and would
            silently compute nonsense; one strided tensor sends a whole foreach list down the slow
            path.
    """
    param = tensors[0]
    short = len(boxes) > 1 and sum(param[b].numel() for b in boxes) < PACK_BELOW * len(boxes)
    alike = all(tensor.stride() == param.stride() for tensor in tensors)
    dense = alike and all(is_dense(param[b]) for b in boxes)
    if not short and (dense or not list_kernels):
        return [View(box, param) for box in boxes]
    if all(len(box) == 1 for box in boxes):
        return [PackedRows(boxes, param)]
    return [PackedBoxes(boxes, param)]
