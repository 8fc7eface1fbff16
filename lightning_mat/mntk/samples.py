"""Samples of a batch: how many there are, and how to take some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor of nested mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map(value, function) for value in batch)
    return batch


def shapes_of(batch: Any) -> list[tuple[int, ...]]:
    """Return the shapes of a batch's tensors that have dimensions.

    Example:
        >>> shapes_of({"x": torch.zeros(8, 3), "temperature": torch.tensor(0.5)})
        [(8, 3)]
    """
    shapes: list[tuple[int, ...]] = []
    _map(batch, lambda tensor: shapes.append(tuple(tensor.shape)) if tensor.dim() else None)
    return shapes


def count_samples(batch: Any) -> int:
    """Return S, the size of dimension 0 of the batch's tensors.

    Raises:
        ValueError: If the batch holds no tensor, or its tensors disagree about S.

    Example:
        >>> count_samples({"x": torch.zeros(8, 3), "mask": None})
        8
    """
    sizes = [shape[0] for shape in shapes_of(batch)]
    if not sizes:
        raise ValueError(
            f"no tensor with samples found in a batch of type {type(batch).__name__}: pass nested "
            "dicts, lists or tuples of tensors with the samples in dimension 0"
        )
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the batch's tensors have {sorted(set(sizes))} samples in dimension 0: all must have "
            "the same number of samples"
        )
    return sizes[0]


def take_samples(batch: Any, start: int, stop: int) -> Any:
    """Return the samples ``[start, stop)`` of a batch, as views.

    Example:
        >>> take_samples((torch.arange(4), torch.tensor(0.5)), 1, 3)
        (tensor([1, 2]), tensor(0.5000))
    """
    return _map(batch, lambda tensor: tensor[start:stop] if tensor.dim() else tensor)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the given device."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))
