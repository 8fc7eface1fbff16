"""The samples of a probe, which must be the same on every rank."""

from __future__ import annotations

import hashlib
import io
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
        batch: Nested mappings, lists and tuples of tensors, arrays and what pickle can take.
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
    """Return a short string that differs for batches that differ.

    What pickle cannot take, for instance a function in a batch, is told by its type alone; it could
    not be sent either.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)})
        True
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2, 1)})
        False
    """
    state = hashlib.blake2b(digest_size=16)
    for leaf in _leaves(batch):
        state.update(_words(leaf))
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


class _Words(pickle.Pickler):
    """Pickles what a thing holds, and not where: tensors, equal strings, arrays."""

    def persistent_id(self, thing: Any) -> Any:
        """Return the data of a tensor, whose own pickle names its place in memory."""
        if not isinstance(thing, Tensor):
            return None
        data = thing.detach().cpu().contiguous().flatten().view(torch.uint8)
        state = hashlib.blake2b(data.numpy().data, digest_size=16)
        return f"{thing.dtype} {tuple(thing.shape)} {state.hexdigest()}"


def _words(leaf: Any) -> bytes:
    stream = io.BytesIO()
    words = _Words(stream)
    words.fast = True  # things are told by what they are, not by whether two of them are one
    try:
        words.dump(leaf)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, ValueError):
        return type(leaf).__qualname__.encode()
    return stream.getvalue()
