"""A data loader whose order depends on (seed, epoch) alone and that resumes inside an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.data.seeds import mixed


class EpochSampler(DistributedSampler[int]):
    """Yields ``epoch · n + i`` for every ``i`` in ``range(n)``, in an order drawn per epoch.

    The data set takes both numbers from the index, so what a worker process sees does not depend
    on when it started. Several processes deal the order out in turn: a step of R processes sees
    the samples that a step of one with R times the batch size sees.

    Args:
        n: Samples in the data set.
        seed: Seed of the order.
        ranks: Processes that share an epoch, R; what R does not divide is left out.
        rank: Which of them this is.

    Example:
        >>> sampler = EpochSampler(4, seed=0)
        >>> sampler.set_epoch(2)
        >>> sorted(sampler)
        [8, 9, 10, 11]
        >>> sorted([*EpochSampler(4, ranks=2, rank=0), *EpochSampler(4, ranks=2, rank=1)])
        [0, 1, 2, 3]
    """

    def __init__(self, n: int, seed: int = 0, ranks: int = 1, rank: int = 0) -> None:
        """Start at epoch 0."""
        # A DistributedSampler, so that Lightning does not deal the shares out once more.
        everything: Any = range(n)
        super().__init__(everything, num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.n = n
        self.skip = 0

    def __len__(self) -> int:
        """Return this process' samples of a whole epoch."""
        return self.n // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Iterate over this process' share of the epoch, without its first ``skip`` samples."""
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        share = order[: len(self) * self.num_replicas][self.rank :: self.num_replicas]
        return iter((share[self.skip :] + self.epoch * self.n).tolist())


class ResumableLoader(DataLoader[Any]):
    """A :class:`~torch.utils.data.DataLoader` over an :class:`EpochSampler` that can be resumed.

    Lightning saves ``state_dict()`` in every checkpoint and loads it before the first batch; the
    loader then goes on after the last batch that it had handed out. The state counts the samples
    of all processes, so that another number of them goes on at the same sample.
    """

    sampler: EpochSampler
    _epoch = 0
    _served = 0
    _resumed = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over what the epoch has left."""
        # A generator, so this runs at the first batch: after Lightning has set the epoch.
        resumes = self._resumed and self._epoch == self.sampler.epoch
        self._resumed = False
        self._epoch = self.sampler.epoch
        self._served = self._served if resumes else 0
        self.sampler.skip = self._served // self.sampler.num_replicas
        for batch in super().__iter__():
            self._served += (self.batch_size or 1) * self.sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the samples of it that all processes were handed."""
        return {"epoch": self._epoch, "samples": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state the next time that its epoch is iterated over."""
        self._epoch = state["epoch"]
        self._served = state["samples"]
        self._resumed = True


def training_batches(
    data: Dataset[Any],
    n: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
    ranks: int = 1,
    rank: int = 0,
) -> ResumableLoader:
    """Return a loader that shuffles per epoch and leaves an incomplete last batch out.

    Args:
        data: Data set that takes indices ``epoch · n + i``.
        n: Its samples.
        batch_size: Samples in a batch of one process.
        seed: Of the order.
        num_workers: Processes that prepare batches.
        collate: Makes a batch of what the data set gives; by default samples are stacked.
        ranks: Processes that share an epoch.
        rank: Which of them this is.
    """
    return ResumableLoader(
        data,
        batch_size=batch_size,
        sampler=EpochSampler(n, seed, ranks, rank),
        drop_last=True,
        num_workers=num_workers,
        collate_fn=collate,
        # Without one of its own, a loader takes a number from the global random stream.
        generator=torch.Generator(),
    )


def ordered_batches(
    data: Dataset[Any],
    batch_size: int,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return a loader over all samples in order, for validation and test."""
    return DataLoader(
        data,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )


def as_fetched(batch: Any) -> Any:
    """Return a batch as it is: the ``collate`` where ``__getitems__`` gives whole batches."""
    return batch
