"""The samples of a probe, which must be the same on every rank."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mat.parallel.ranks import Ranks

_NAMED = (type, FunctionType)


def same_batch(batch: Any, ranks: Ranks) -> Any:
    """Return a batch that is the same on all ranks: this one, or rank 0's where they differ.

    Samples are drawn by seed from the training set, which gives every rank the same ones, unless
    each rank has a data set of its own. A digest of 16 bytes finds out; only then the batch itself
    travels.

    Args:
        batch: Nested mappings, lists and tuples of tensors, arrays and other things.
        ranks: The processes.
    """
    with ranks.together("comparing samples"):
        own = digest(batch)
    digests = ranks.of_all(own)
    if len(set(digests)) == 1:
        return batch
    other = next(i for i, value in enumerate(digests) if value != digests[0])
    if ranks.rank == 0:
        warnings.warn(
            f"the probe's samples in process {other} are others than in process 0, as if every "
            "process had a data set of its own: all measure with those of process 0",
            stacklevel=2,
        )
    with ranks.together("packing samples"):
        if ranks.rank == 0:
            torch.save(batch, io.BytesIO())  # what cannot be sent fails before the others wait
    with ranks.together("sending samples"):
        return ranks.from_first(batch)


def digest(batch: Any) -> str:
    """Return a short string that differs for batches that differ.

    Objects are told by their attributes, functions and classes by their names, and what has
    neither by its ``repr``. Where that is a place in memory, batches differ that are the same:
    rank 0's is sent then for nothing.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)})
        True
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2, 1)})
        False
    """
    state = hashlib.blake2b(digest_size=16)
    for leaf in _leaves(batch, set()):
        if isinstance(leaf, Tensor):
            state.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            data = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            state.update(data.numpy().data)
        elif isinstance(leaf, np.ndarray):
            state.update(f"{leaf.dtype} {leaf.shape}".encode())
            state.update(leaf.tobytes())
        else:
            state.update(getattr(leaf, "__qualname__", repr(leaf)).encode())
    return state.hexdigest()


def _leaves(batch: Any, seen: set[int]) -> Iterator[Any]:
    """Yield tensors, arrays and plain things of a batch; of objects in a circle each once."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield str(key)
            yield from _leaves(value, seen)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _leaves(value, seen)
    elif isinstance(batch, (set, frozenset)):
        yield from sorted(map(repr, batch))
    elif isinstance(batch, np.ndarray) and batch.dtype.hasobject:
        yield from _leaves(batch.tolist(), seen)
    elif isinstance(batch, (Tensor, *_NAMED)) or not hasattr(batch, "__dict__"):
        yield batch
    elif id(batch) not in seen:
        seen.add(id(batch))
        yield type(batch)
        yield from _leaves(vars(batch), seen)
