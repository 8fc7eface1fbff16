"""Piece: elements that are handed to the optimizer as a tensor of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mat.optim.slabs import Box

# Boxes of fewer elements are pooled: the calls that a box costs on its own (about 20 µs in AdamW's
# loop over tensors) exceed the copies of its parameters and gradients: measured on a CPU.
PACK_BELOW = 65_536

# The same where a kernel is fused: it costs few calls, so that less is worth a copy.
FUSED_PACK_BELOW = 16_384

# Elements of a chunk on a CPU, see chunk_of: fewer cost more in calls, more fall out of the caches.
CHUNK = 262_144

# The same where a kernel fuses the passes: what matters is that values and gradients stay in the
# last cache until they are copied back, and that there are few calls.
FUSED_CHUNK = 1_048_576

# Chunks of a batch, see batches_of.
BATCH = 2


class Piece:
    """Elements that are stepped as one tensor, and their optimizer state."""

    def __init__(self, shape: torch.Size) -> None:
        """Start without state."""
        self.shape = shape
        self.state: dict[str, Any] = {}


class View(Piece):
    """One box of a parameter, in place: its tensors share the parameter's memory."""

    def __init__(self, box: Box, param: Tensor) -> None:
        """Remember the box."""
        super().__init__(param[box].shape)
        self.box = box

    def with_gradient(self, param: Tensor, grad: Tensor) -> Tensor:
        """Return these elements of a parameter as a tensor with a gradient."""
        tensor = param[self.box]
        tensor.grad = grad[self.box]
        if tensor.grad.stride() != tensor.stride():  # fused kernels do not look
            tensor.grad = torch.empty_like(tensor).copy_(tensor.grad)
        return tensor

    def put(self, full: Tensor, part: Tensor) -> None:
        """Write ``part`` to these elements of ``full``, unless it is a view of them already."""
        view = full[self.box]
        if view.data_ptr() != part.data_ptr():
            view.copy_(part)


def chunk_of(param: Tensor) -> int:
    """Return how many elements of a parameter are best stepped at once where no kernel fuses.

    An optimizer in plain torch passes over its tensors a dozen times, and asks for memory for what
    is in between. Chunks fit the caches, and malloc keeps their temporary memory at hand.
    """
    if param.device.type != "cpu":
        return param.numel()
    return max(CHUNK, 32_768 * torch.get_num_threads())  # below that, torch leaves threads idle


def chunk_of_pool(param: Tensor, *, fused: bool) -> int:
    """Return how many elements a pool of parts of such parameters has at most."""
    if param.device.type != "cpu":
        return sys.maxsize
    return max(chunk_of(param), FUSED_CHUNK) if fused else chunk_of(param)


def batches_of(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return tensors in batches that a foreach optimizer best steps one after the other.

    It passes over its whole list a dozen times: chunks stay in the caches only if the list is
    short, too. The first batch is there also if there is nothing in it.
    """
    batches: list[list[Tensor]] = [[]]
    room = 0
    for tensor in tensors:
        if tensor.device.type == "cpu" and batches[-1] and tensor.numel() > room:
            batches.append([])
        if not batches[-1]:
            room = BATCH * chunk_of(tensor)
        batches[-1].append(tensor)
        room -= tensor.numel()
    return batches


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor without overlaps fills a stretch of memory without gaps."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()


def divide(
    boxes: Sequence[Box], tensors: Sequence[Tensor], *, below: int, fused: bool
) -> tuple[list[View], list[Box]]:
    """Return what of some boxes is best stepped in place, and what is best copied to a pool.

    Args:
        boxes: Disjoint boxes.
        tensors: The parameter and its elementwise state.
        below: Boxes of fewer elements are pooled.
        fused: Whether the optimizer's kernel is fused: it walks memory as if all tensors were dense
            and laid out alike, and would silently compute nonsense. On a GPU foreach needs that,
            too: one strided tensor sends a whole list down the slow path.
    """
    param = tensors[0]
    list_kernels = fused or param.device.type != "cpu"
    alike = all(tensor.stride() == param.stride() for tensor in tensors)
    chunk = param.numel() if fused else chunk_of(param)
    views: list[View] = []
    pooled: list[Box] = []
    for box in boxes:
        dense = alike and is_dense(param[box])
        if param[box].numel() < below or (list_kernels and not dense):
            pooled.append(box)
        else:
            views += [View(part, param) for part in cut(box, param, chunk)]
    return views, pooled


def cut(box: Box, param: Tensor, chunk: int) -> list[Box]:
    """Return runs of a box's rows, of at most a chunk each, or of one row."""
    if param[box].numel() <= chunk:
        return [box]
    start, stop = box[0].start, box[0].stop
    rows = max(chunk * (stop - start) // param[box].numel(), 1)
    return [(slice(first, min(first + rows, stop)), *box[1:]) for first in range(start, stop, rows)]
