"""ThreeSplits: what the data modules have in common, the loaders of their three splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
from torch.utils.data import DataLoader

from examples.data.loader import ResumableLoader, ordered_batches, training_batches


class ThreeSplits(L.LightningDataModule):
    """A data module of a training, a validation and a test split, whose runs can be resumed.

    Attributes:
        train: Takes indices ``epoch · n + i``, so that a sample may depend on the epoch.
        valid: The validation split.
        test: The test split.
        batch_size: Samples in a batch; an incomplete last training batch is left out.
        seed: Of the order.
        num_workers: Processes that prepare batches.
        collate: Makes a batch of what a split gives; None to stack samples.
    """

    train: Any
    valid: Any
    test: Any
    batch_size: int
    seed: int
    num_workers: int
    collate: ClassVar[Callable[[Any], Any] | None] = None

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches of this process, shuffled per epoch."""
        return training_batches(
            self.train,
            len(self.train),
            self.batch_size,
            self.seed,
            self.num_workers,
            type(self).collate,
            ranks=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches in order."""
        return ordered_batches(self.valid, self.batch_size, self.num_workers, type(self).collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches in order."""
        return ordered_batches(self.test, self.batch_size, self.num_workers, type(self).collate)
