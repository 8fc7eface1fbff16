"""Subsets of a data set: the same ones in every run, whatever its seed."""

from __future__ import annotations

import torch
from torch import Tensor

#: Seed of all subsets: runs with different seeds train and test on the same samples.
SEED = 0


def draw(n: int, size: int | None, name: str) -> Tensor:
    """Return ``size`` of the numbers below ``n``, ascending, int64; all of them if it is None.

    Args:
        n: Samples there are.
        size: Samples to keep.
        name: Name of the option, for the error message.

    Raises:
        ValueError: If there are not so many.

    Example:
        >>> draw(5, None, "train_size"), len(draw(5, 3, "train_size"))
        (tensor([0, 1, 2, 3, 4]), 3)
    """
    return draw_stratified(torch.zeros(n, dtype=torch.int64), size, name)


def draw_stratified(labels: Tensor, size: int | None, name: str) -> Tensor:
    """Return the places of ``size`` samples, ascending, every class with its share of them.

    Args:
        labels: Classes, int64, shape ``[N]``.
        size: Samples to keep; None keeps all.
        name: Name of the option, for the error message.

    Returns:
        int64, shape ``[size]``.

    Raises:
        ValueError: If there are not so many.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[draw_stratified(labels, 3, "train_size")]
        tensor([0, 0, 1])
    """
    n = len(labels)
    check_size(n, size, name)
    if size is None:
        return torch.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    # Where a sample stands in its class, from 0 to 1: the lowest ones are spread over all classes.
    rank = torch.empty(n, dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = (torch.arange(len(members)).double() + 0.5) / len(members)
    return rank.argsort(stable=True)[:size].sort().values


def check_size(n: int, size: int | None, name: str) -> None:
    """Raise a ValueError unless ``size`` is None or from 1 to ``n``."""
    if size is not None and not 1 <= size <= n:
        raise ValueError(f"{name} must be from 1 to {n} (the samples there are), got {size}")
