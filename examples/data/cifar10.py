"""CIFAR-10: normalised images, shifted and mirrored by seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.cifar10_files import Split, read
from examples.data.loader import as_fetched
from examples.data.seeds import AUGMENTATION, mixed
from examples.data.splits import ThreeSplits
from examples.data.subset import check_size, draw_stratified

#: Mean and standard deviation of the training images' red, green and blue, over 255.
MEAN = (0.49140, 0.48216, 0.44653)
STD = (0.24703, 0.24348, 0.26159)
#: Black pixels around an image before a window of the image's size is cut out.
PADDING = 4

Batch = tuple[Tensor, Tensor]


class Images(Dataset[Batch]):
    """Images that are normalised when they are read, in batches at once.

    Index ``epoch · n + i`` is image ``i`` as augmented in that epoch; plain indices are of epoch 0.
    Augmentation cuts the image out of its padded self at a place of 9 × 9 and mirrors it with
    probability 1/2, both drawn from (seed, epoch, i) alone.

    Args:
        images: uint8, shape ``[N, 3, h, w]``.
        labels: int64, shape ``[N]``.
        augment: Whether to augment.
        seed: Seed of the augmentation.

    Example:
        >>> data = Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> images, labels = data.__getitems__([3, 5 + 1])
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([3, 1]))
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, augment: bool = False, seed: int = 0
    ) -> None:
        """Keep the images as they are."""
        self.images, self.labels = images, labels
        self.augment, self.seed = augment, seed
        self._drawn = lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """Return one image, float32, ``[3, h, w]``, and its class.

        Raises:
            IndexError: If the index is negative.
        """
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return several images, float32, ``[S, 3, h, w]``, and their classes, ``[S]``.

        Raises:
            IndexError: If an index is negative.
        """
        if min(indices) < 0:
            raise IndexError(f"index of an image must be ≥ 0, got {min(indices)}")
        index = torch.tensor(indices)
        epochs, places = index // len(self), index % len(self)
        images = self.images[places]
        if self.augment:
            for epoch in epochs.unique().tolist():
                now = epochs == epoch
                images[now] = augmented(images[now], *self._drawn(epoch)[:, places[now]])
        scale = 255 * torch.tensor(STD).view(3, 1, 1)
        shift = 255 * torch.tensor(MEAN).view(3, 1, 1)
        return (images - shift) / scale, self.labels[places]

    def __getstate__(self) -> dict[str, object]:
        """Return what a worker process needs: not the draws, which it can make."""
        return {name: value for name, value in vars(self).items() if name != "_drawn"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin without draws."""
        self.__dict__.update(state)
        self._drawn = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> Tensor:
        """Return row, column and mirroring of every image in an epoch, int64, ``[3, N]``."""
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch, AUGMENTATION))
        window = torch.randint(2 * PADDING + 1, (2, len(self)), generator=generator)
        mirror = torch.randint(2, (1, len(self)), generator=generator)
        return torch.cat([window, mirror])


def augmented(images: Tensor, row: Tensor, column: Tensor, mirror: Tensor) -> Tensor:
    """Return each image's window of its padded self, some mirrored.

    Args:
        images: Shape ``[S, 3, h, w]``.
        row: Uppermost row of the window, int64, shape ``[S]``; :data:`PADDING` shifts nothing.
        column: Leftmost column of the window, in the same way.
        mirror: 1 where left and right change places, int64, shape ``[S]``.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (PADDING,) * 4)
    rows = row[:, None] + torch.arange(height)  # [S, h]
    across = torch.arange(width).expand(len(images), width)
    columns = column[:, None] + torch.where(mirror[:, None] == 1, width - 1 - across, across)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Cifar10(ThreeSplits):
    """CIFAR-10's training, validation and test images; a batch is (images, labels).

    Validation has the last images of the official training split, training is drawn from the
    others; subsets keep the shares of the classes and are the same for every seed.

    Args:
        data: Folder of the files, see :func:`examples.data.cifar10_files.read`; None downloads.
        batch_size: Images in a batch; an incomplete last training batch is left out.
        seed: Seed of the order and of the augmentation.
        train_size: Training images to use, None for all.
        valid_size: Images of the training split that are kept for validation.
        test_size: Test images to use, None for all.
        augment: Whether training images are shifted by up to 4 pixels and mirrored.
        num_workers: Processes that prepare batches.
        cache: Folder for what was unpacked, see :func:`examples.data.cache.cache_folder`.

    Raises:
        FileNotFoundError: If the files are not there; the message names them.
        ValueError: If a size does not fit.
    """

    name = "cifar-10"
    classes = 10
    collate = staticmethod(as_fetched)

    def __init__(
        self,
        data: str | Path | None,
        batch_size: int = 128,
        *,
        seed: int = 0,
        train_size: int | None = None,
        valid_size: int = 5000,
        test_size: int | None = None,
        augment: bool = False,
        num_workers: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        """Read the images and choose those that are used."""
        super().__init__()
        train, test = read(data, cache)
        check_size(len(train.labels) - 1, valid_size, "valid_size")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        held = len(train.labels) - valid_size
        rest, valid = (
            Split(*(t[part] for t in train)) for part in (slice(held), slice(held, None))
        )
        chosen = draw_stratified(rest.labels, train_size, "train_size")
        tested = draw_stratified(test.labels, test_size, "test_size")
        self.train = Images(rest.images[chosen], rest.labels[chosen], augment=augment, seed=seed)
        self.valid = Images(*valid)
        self.test = Images(test.images[tested], test.labels[tested])
        if len(self.train) < batch_size:
            raise ValueError(
                f"a batch needs {batch_size} images, but only {len(self.train)} are used for "
                "training: lower batch_size or raise train_size"
            )

    def with_seed(self, seed: int) -> Cifar10:
        """Return the same images with another order and augmentation, without reading them anew."""
        other = copy(self)
        other.seed, other.train = seed, copy(self.train)
        other.train.seed = seed
        return other

    def describe(self) -> dict[str, int | str | bool]:
        """Return name, augmentation and images per split."""
        return {
            "name": self.name,
            "augment": self.train.augment,
            "train_images": len(self.train),
            "valid_images": len(self.valid),
            "test_images": len(self.test),
        }
