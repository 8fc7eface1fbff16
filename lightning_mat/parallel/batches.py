"""The samples of a probe, which must be the same on every rank."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mat.parallel.ranks import Ranks


def same_batch(batch: Any, ranks: Ranks) -> Any:
    """Return a batch that is the same on all ranks: this one, or rank 0's where they differ.

    Samples are drawn by seed from the training set, which gives every rank the same ones, unless
    each rank has a data set of its own. A digest of 16 bytes finds out; only then the batch itself
    travels.

    Args:
        batch: Nested mappings, lists and tuples of tensors and plain values, on the CPU; what else
            there is is sent, but not looked at.
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
    # Where a rank fails, none may be on its way to the others.
    with ranks.together("packing samples"):
        packed = pickle.dumps(batch) if ranks.rank == 0 else b""
    packed = ranks.from_first(packed)
    with ranks.together("unpacking samples"):
        return pickle.loads(packed)


def digest(batch: Any) -> str:
    """Return a short string that differs for batches with different tensors or plain values.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)})
        True
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2, 1)})
        False
    """
    state = hashlib.blake2b(digest_size=16)
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            state.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            data = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            state.update(data.numpy().data)
        elif isinstance(leaf, (str, bytes, int, float, bool, type(None))):
            state.update(repr(leaf).encode())
    return state.hexdigest()


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield str(key)
            yield from _leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _leaves(value)
    else:
        yield batch
